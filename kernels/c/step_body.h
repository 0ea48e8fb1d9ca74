/* The small work of a block, for one instruction set: included by step.c, which gives NAME. */

/* e**x to float32's precision for x of at most 0 that is not below -87; 0 below (Cephes' polynomial). */
INLINE float NAME(exponential)(float x)
{
    float y = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x, n = y * 1.44269504088896341f;
    n = (float)(int32_t)(n + (n < 0 ? -0.5f : 0.5f));
    y = (y - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * y + 1.3981999507e-3f;
    p = p * y + 8.3334519073e-3f;
    p = p * y + 4.1665795894e-2f;
    p = p * y + 1.6666665459e-1f;
    p = p * y + 5.0000001201e-1f;
    p = p * y * y + y + 1.0f;
    union {
        int32_t bits;
        float value;
    } power = {((int32_t)n + 127) << 23};
    return x < -87.0f ? 0.0f : p * power.value;
}

INLINE float NAME(total)(const Floats *sum)
{
    float lanes[16];
    memcpy(lanes, sum, sizeof lanes);
    for (int width = 8; width; width /= 2)
        for (int i = 0; i < width; i++)
            lanes[i] += lanes[i + width];
    return lanes[0];
}

static void NAME(norm)(const float *x, const float *weight, float *y, int64_t count, float epsilon)
{
    Floats sum = {0}, v;
    float rest = 0;
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) {
        memcpy(&v, x + i, sizeof v);
        sum += v * v;
    }
    for (; i < count; i++)
        rest += x[i] * x[i];
    float inverse = 1.0f / sqrtf((NAME(total)(&sum) + rest) / (float)count + epsilon);
    for (i = 0; i < count; i++)
        y[i] = weight[i] * (x[i] * inverse);
}

/* The rotary embedding of one head. */
static void NAME(turn)(float *x, const float *cosine, const float *sine, int64_t channels)
{
    int64_t half = channels / 2;
    for (int64_t d = 0; d < half; d++) {
        float low = x[d], high = x[d + half];
        x[d] = low * cosine[d] - high * sine[d];
        x[d + half] = high * cosine[d + half] + low * sine[d + half];
    }
}

static void NAME(gated)(float *gate, const float *up, int64_t count, int64_t activation)
{
    if (activation == SILU)
        for (int64_t i = 0; i < count; i++)
            gate[i] = gate[i] / (1.0f + NAME(exponential)(-gate[i])) * up[i];
    else
        for (int64_t i = 0; i < count; i++) {
            float x = gate[i], inner = 0.79788456080286536f * (x + 0.044715f * x * x * x);
            gate[i] = x / (1.0f + NAME(exponential)(-2.0f * inner)) * up[i];
        }
}

/* 16 values of the cache, or of what is float32 anyhow. */
INLINE void NAME(cached)(const void *cache, int64_t place, int64_t width, Floats *v)
{
    if (width == 4)
        memcpy(v, (const float *)cache + place, sizeof *v);
    else {
        uint16_t half[16];
        uint32_t wide[16];
        memcpy(half, (const uint16_t *)cache + place, sizeof half);
        for (int i = 0; i < 16; i++)
            wide[i] = (uint32_t)half[i] << 16;
        memcpy(v, wide, sizeof *v);
    }
}

INLINE void NAME(scores)(const Step *step, const int64_t width, int64_t start, const float *query, float *scores)
{
    int64_t channels = step->layer->channels, tokens = step->past + step->length;
    for (int64_t t = 0; t < tokens; t++) {
        Floats sum = {0}, q, k;
        for (int64_t d = 0; d < channels; d += 16) {
            memcpy(&q, query + d, sizeof q);
            NAME(cached)(step->keys, start + t * channels + d, width, &k);
            sum += q * k;
        }
        scores[t] = NAME(total)(&sum) * (float)step->layer->scale;
    }
}

/* The weights of the tokens that one row sees; `seen` of them, then what the mask says. */
INLINE void NAME(softmax)(const Step *step, int64_t batch, int64_t token, float *scores, int64_t seen)
{
    float most = -INFINITY, sum = 0;
    int64_t row = batch * step->mask_batch + token * step->mask_row;
    if (step->mask && step->mask_width == 4)
        for (int64_t t = 0; t < seen; t++)
            scores[t] += ((const float *)step->mask)[row + t];
    else if (step->mask)
        for (int64_t t = 0; t < seen; t++)
            scores[t] = ((const uint8_t *)step->mask)[row + t] ? scores[t] : -INFINITY;
    for (int64_t t = 0; t < seen; t++)
        most = scores[t] > most ? scores[t] : most;
    most = most > -INFINITY ? most : 0; /* a row that sees nothing: all weights are 0 */
    for (int64_t t = 0; t < seen; t++)
        scores[t] = NAME(exponential)(scores[t] - most);
    for (int64_t t = 0; t < seen; t++)
        sum += scores[t];
    float inverse = sum > 0 ? 1.0f / sum : 0.0f;
    for (int64_t t = 0; t < seen; t++)
        scores[t] *= inverse;
}

INLINE void NAME(sums)(const Step *step, const int64_t width, int64_t start, const float *weights, int64_t seen, float *out)
{
    int64_t channels = step->layer->channels;
    for (int64_t d = 0; d < channels; d += 16) {
        Floats sum = {0}, v;
        for (int64_t t = 0; t < seen; t++) {
            NAME(cached)(step->values, start + t * channels + d, width, &v);
            sum += weights[t] * v;
        }
        memcpy(out + d, &sum, sizeof sum);
    }
}

/* All query heads of one key head, of all tokens of one sequence. */
static void NAME(attend)(const Step *step, int64_t batch, int64_t head, const float *query, float *scores, float *out)
{
    const Layer *layer = step->layer;
    int64_t each = layer->heads / layer->key_heads, start = batch * step->batch_stride + head * step->head_stride;
    for (int64_t token = 0; token < step->length; token++) {
        int64_t seen = step->past + (step->mask ? step->length : token + 1), row = batch * step->length + token;
        for (int64_t i = head * each; i < (head + 1) * each; i++) {
            int64_t place = (row * layer->heads + i) * layer->channels;
            if (step->width == 4) {
                NAME(scores)(step, 4, start, query + place, scores);
                NAME(softmax)(step, batch, token, scores, seen);
                NAME(sums)(step, 4, start, scores, seen, out + place);
            } else {
                NAME(scores)(step, 2, start, query + place, scores);
                NAME(softmax)(step, batch, token, scores, seen);
                NAME(sums)(step, 2, start, scores, seen, out + place);
            }
        }
    }
}
