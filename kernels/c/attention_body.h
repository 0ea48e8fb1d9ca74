/* Attention to packed states, for one instruction set: included by attention.c, which gives `codes` and NAME. */

/* x[d] = first[d] + step[d] * code of channel d, of one token. */
INLINE void NAME(token)(const KV *kv, const uint8_t *const planes[], const float *first, const float *step, float *x)
{
    for (int64_t d = 0; d < kv->channels; d += LANES) {
        uint8_t code[LANES];
        const uint8_t *from[MAX_BITS];
        for (int plane = 0; plane < kv->bits; plane++)
            from[plane] = planes[plane] + d / 8;
        int64_t bytes = (kv->channels - d + 7) / 8;
        NAME(codes)((int)kv->bits, from, bytes < LANES / 8 ? bytes : LANES / 8, code);
        for (int at = 0; at < LANES; at += 16) {
            Bytes narrow;
            memcpy(&narrow, code + at, sizeof narrow);
            Floats value = __builtin_convertvector(narrow, Floats), f, s;
            memcpy(&f, first + d + at, sizeof f);
            memcpy(&s, step + d + at, sizeof s);
            value = f + s * value;
            memcpy(x + d + at, &value, sizeof value);
        }
    }
}

/* What code 0 stands for and the step from a code to the next, of every channel of token t. */
INLINE void NAME(affine)(const KV *kv, int64_t head, int64_t t, float *first, float *step)
{
    int64_t along_tokens = kv->along_tokens, count = along_tokens ? kv->channels : kv->channels / kv->group;
    int64_t row = along_tokens ? head * (kv->tokens / kv->group) + t / kv->group : head * kv->tokens + t;
    const uint16_t *low = kv->low ? kv->low + row * count : 0, *wide = (const uint16_t *)kv->span + row * count;
    const uint8_t *narrow = (const uint8_t *)kv->span + row * count;
    float cells = kv->nested ? (float)(1 << kv->bits) : (float)((1 << kv->bits) - 1), middle = kv->nested ? 0.5f : 0.0f;
    int64_t each = along_tokens ? 1 : kv->group;
    for (int64_t g = 0; g < count; g++) {
        float span = widened(low ? wide[g] : (uint16_t)(narrow[g] << 7)), s = span / cells;
        float f = (low ? widened(low[g]) : -0.5f * span) + middle * s;
        for (int64_t i = 0; i < each; i++)
            first[g * each + i] = f, step[g * each + i] = s;
    }
}

INLINE float NAME(product)(const float *a, const float *b, int64_t channels)
{
    Floats sum = {0}, v, w;
    float lanes[16];
    for (int64_t d = 0; d < channels; d += 16) {
        memcpy(&v, a + d, sizeof v);
        memcpy(&w, b + d, sizeof w);
        sum += v * w;
    }
    memcpy(lanes, &sum, sizeof sum);
    for (int width = 8; width; width /= 2)
        for (int i = 0; i < width; i++)
            lanes[i] += lanes[i + width];
    return lanes[0];
}

static void NAME(head)(const Attention *job, int64_t head)
{
    const KV *kv = job->kv;
    int64_t bytes = (kv->channels + 7) / 8;
    float first[MAX_CHANNELS] = {0}, step[MAX_CHANNELS] = {0}, held[MAX_CHANNELS];
    for (int64_t t = 0; t < kv->tokens; t++) {
        const uint8_t *planes[MAX_BITS];
        float *x = job->mode == STATES ? job->vectors + (head * kv->tokens + t) * job->width : held;
        for (int plane = 0; plane < kv->bits; plane++)
            planes[plane] = kv->planes[plane] + (head * kv->tokens + t) * bytes;
        if (!kv->along_tokens || t % kv->group == 0)
            NAME(affine)(kv, head, t, first, step);
        NAME(token)(kv, planes, first, step, x);
        for (int64_t row = 0; row < job->rows; row++) {
            float *vector = job->vectors + (head * job->rows + row) * job->width;
            float *weight = job->weights + (head * job->rows + row) * job->stride + t;
            if (job->mode == PRODUCTS)
                *weight = NAME(product)(vector, x, kv->channels);
            else
                for (int64_t d = 0; d < kv->channels; d += 16) {
                    Floats v, w;
                    memcpy(&v, vector + d, sizeof v);
                    memcpy(&w, x + d, sizeof w);
                    v += *weight * w;
                    memcpy(vector + d, &v, sizeof v);
                }
        }
    }
}
