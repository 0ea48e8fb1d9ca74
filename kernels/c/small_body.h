/* The small work beside the products, for one instruction set: included by small.c, which gives NAME.
 *
 * Vectors go in and out by pointers: how they are passed by value depends on the instruction set.
 */

/* e**x to float32's precision, 0 below -87 (Cephes' polynomial). */
INLINE void NAME(exponential)(Floats *value)
{
    const Floats most = {0}, x = *value;
    Ints below = x < most - 87.0f, above = x > most + 88.0f;
    Floats y = CHOSEN(below, most - 87.0f, CHOSEN(above, most + 88.0f, x)), n = y * 1.44269504088896341f;
    Ints whole = __builtin_convertvector(n + CHOSEN(n < 0.0f, most - 0.5f, most + 0.5f), Ints);
    n = __builtin_convertvector(whole, Floats);
    y = (y - n * 0.693359375f) + n * 2.12194440e-4f;
    Floats p = y * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * y + 8.3334519073e-3f;
    p = p * y + 4.1665795894e-2f;
    p = p * y + 1.6666665459e-1f;
    p = p * y + 5.0000001201e-1f;
    p = p * y * y + y + 1.0f;
    p *= (Floats)((whole + 127) << 23);
    *value = CHOSEN(below, most, p);
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

INLINE float NAME(largest)(const Floats *all)
{
    float lanes[16];
    memcpy(lanes, all, sizeof lanes);
    for (int width = 8; width; width /= 2)
        for (int i = 0; i < width; i++)
            lanes[i] = lanes[i] > lanes[i + width] ? lanes[i] : lanes[i + width];
    return lanes[0];
}

static void NAME(ordered)(const float *x, const uint16_t *order, float *y)
{
    for (int i = 0; i < GROUP; i++)
        y[i] = x[order[i]];
}

/* One group of activations to 8 bits; returns the scale, NaN if the group has a value that is not finite. */
static float NAME(rounded)(const float *x, const uint16_t *order, int8_t *code, int32_t *sum)
{
    float value[GROUP];
    const Floats none = {0};
    const Ints sign = (Ints)(none - 0.0f) | (int32_t)0x80000000;
    Floats v, size, most = none;
    Ints finite = ~(Ints){0}, codes = {0};
    NAME(ordered)(x, order, value);
    for (int i = 0; i < GROUP; i += 16) {
        memcpy(&v, value + i, sizeof v);
        size = (Floats)((Ints)v & ~sign);
        finite &= size <= none + 3.402823466e38f;
        most = CHOSEN(size > most, size, most);
    }
    float largest = NAME(largest)(&most), inverse = largest >= 1e-36f ? 127.0f / largest : 0.0f;
    int32_t all = -1, lanes[16];
    memcpy(lanes, &finite, sizeof lanes);
    for (int i = 0; i < 16; i++)
        all &= lanes[i];
    inverse = all ? inverse : 0.0f;
    for (int i = 0; i < GROUP; i += 16) {
        memcpy(&v, value + i, sizeof v);
        v *= inverse;
        v = CHOSEN(finite, v, none) + (Floats)(((Ints)v & sign) | (Ints)(none + 0.5f));
        Ints whole = __builtin_convertvector(v, Ints);
        Chars narrow = __builtin_convertvector(whole, Chars);
        codes += whole;
        memcpy(code + i, &narrow, sizeof narrow);
    }
    memcpy(lanes, &codes, sizeof lanes);
    *sum = 0;
    for (int i = 0; i < 16; i++)
        *sum += lanes[i];
    return all ? (inverse > 0 ? largest / 127.0f : 0.0f) : NAN;
}

/* A simple loop, which compilers turn into one of vectors for each width. */
static void NAME(scaled)(const float *x, float factor, const float *inputs, int64_t count, void *y, int64_t width)
{
    float *whole = y;
    uint16_t *half = y;
    for (int64_t i = 0; i < count; i++) {
        float value = x[i] * factor * (inputs ? inputs[i] : 1.0f);
        uint32_t word;
        if (width == 4) {
            whole[i] = value;
            continue;
        }
        memcpy(&word, &value, sizeof word);
        half[i] = (uint16_t)((word + 0x7fff + (word >> 16 & 1)) >> 16); /* to the nearest, ties to even */
    }
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

/* gate = activation(gate) * up; both have room for whole vectors. */
static void NAME(gated)(float *gate, const float *up, int64_t count, int64_t activation)
{
    for (int64_t i = 0; i < count; i += 16) {
        Floats x, u, e;
        memcpy(&x, gate + i, sizeof x);
        memcpy(&u, up + i, sizeof u);
        e = activation == SILU ? -x : -1.59576912160573072f * (x + 0.044715f * x * x * x);
        NAME(exponential)(&e);
        x = x / (1.0f + e) * u;
        memcpy(gate + i, &x, sizeof x);
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

/* Products of a few queries with all tokens, which are read once: sixteen tokens' sums are added up together. Of each query the products
 * begin `room` behind those of the one before. */
INLINE void NAME(scores)(const Step *step, const int64_t width, const int queries, int64_t start, const float *query, float *scores, int64_t room)
{
    int64_t channels = step->layer->channels, tokens = step->past + step->length;
    for (int64_t first = 0; first < tokens; first += 16) {
        float lanes[QUERIES][16][16], fours[16][4];
        int64_t here = tokens - first < 16 ? tokens - first : 16;
        for (int64_t i = 0; i < here; i++) {
            Floats sum[QUERIES] = {{0}}, q, k;
            for (int64_t d = 0; d < channels; d += 16) {
                NAME(cached)(step->keys, start + (first + i) * channels + d, width, &k);
                for (int n = 0; n < queries; n++) {
                    memcpy(&q, query + n * channels + d, sizeof q);
                    sum[n] += q * k;
                }
            }
            for (int n = 0; n < queries; n++)
                memcpy(lanes[n][i], sum + n, sizeof *sum);
        }
        for (int n = 0; n < queries; n++) {
            for (int i = 0; i < 16; i++)
                for (int j = 0; j < 4; j++)
                    fours[i][j] = (lanes[n][i][j] + lanes[n][i][j + 8]) + (lanes[n][i][j + 4] + lanes[n][i][j + 12]);
            for (int i = 0; i < 16; i++)
                scores[n * room + first + i] = ((fours[i][0] + fours[i][2]) + (fours[i][1] + fours[i][3])) * (float)step->layer->scale;
        }
    }
}

/* The weights of the tokens that one row sees; `seen` of them, then what the mask says. */
INLINE void NAME(softmax)(const Step *step, int64_t batch, int64_t token, float *scores, int64_t seen)
{
    int64_t row = batch * step->mask_batch + token * step->mask_row;
    if (step->mask && step->mask_width == 4)
        for (int64_t t = 0; t < seen; t++)
            scores[t] += ((const float *)step->mask)[row + t];
    else if (step->mask)
        for (int64_t t = 0; t < seen; t++)
            scores[t] = ((const uint8_t *)step->mask)[row + t] ? scores[t] : -INFINITY;
    for (int64_t t = seen; t % 16; t++)
        scores[t] = -INFINITY; /* there is room for whole vectors */
    Floats v, all = (Floats){0} - INFINITY, sum = {0};
    for (int64_t t = 0; t < seen; t += 16) {
        memcpy(&v, scores + t, sizeof v);
        all = CHOSEN(v > all, v, all);
    }
    float most = NAME(largest)(&all);
    most = most > -INFINITY ? most : 0; /* a row that sees nothing: all weights are 0 */
    for (int64_t t = 0; t < seen; t += 16) {
        memcpy(&v, scores + t, sizeof v);
        v -= most;
        NAME(exponential)(&v);
        sum += v;
        memcpy(scores + t, &v, sizeof v);
    }
    float whole = NAME(total)(&sum), inverse = whole > 0 ? 1.0f / whole : 0.0f;
    for (int64_t t = 0; t < seen; t++)
        scores[t] *= inverse;
}

/* What the weights of a few queries make of `vectors` times sixteen channels of the values from `start` on, which are read once. */
INLINE void NAME(sums)(const Step *step, const int64_t width, const int queries, const int vectors, int64_t start, const float *weights,
                       int64_t room, int64_t seen, float *out)
{
    int64_t channels = step->layer->channels;
    Floats sum[QUERIES][VECTORS] = {{{0}}}, v[VECTORS];
    for (int64_t t = 0; t < seen; t++) {
        for (int i = 0; i < vectors; i++)
            NAME(cached)(step->values, start + t * channels + 16 * i, width, v + i);
        for (int n = 0; n < queries; n++)
            for (int i = 0; i < vectors; i++)
                sum[n][i] += weights[n * room + t] * v[i];
    }
    for (int n = 0; n < queries; n++)
        for (int i = 0; i < vectors; i++)
            memcpy(out + n * channels + 16 * i, &sum[n][i], sizeof v[i]);
}

/* A few query heads of one key head, of one token that sees `seen`. */
INLINE void NAME(heads)(const Step *step, const int64_t width, const int queries, int64_t batch, int64_t token, int64_t start,
                        const float *query, float *scores, int64_t seen, float *out)
{
    int64_t channels = step->layer->channels, room = (step->past + step->length + 15) / 16 * 16, d = 0;
    NAME(scores)(step, width, queries, start, query, scores, room);
    for (int n = 0; n < queries; n++)
        NAME(softmax)(step, batch, token, scores + n * room, seen);
    for (; d + 16 * VECTORS <= channels; d += 16 * VECTORS)
        NAME(sums)(step, width, queries, VECTORS, start + d, scores, room, seen, out + d);
    for (; d < channels; d += 16)
        NAME(sums)(step, width, queries, 1, start + d, scores, room, seen, out + d);
}

/* All query heads of one key head, of all tokens of one sequence. */
static void NAME(attend)(const Step *step, int64_t batch, int64_t head, const float *query, float *scores, float *out)
{
    const Layer *layer = step->layer;
    int64_t each = layer->heads / layer->key_heads, start = batch * step->batch_stride + head * step->head_stride;
    for (int64_t token = 0; token < step->length; token++) {
        int64_t seen = step->past + (step->mask ? step->length : token + 1), row = batch * step->length + token;
        for (int64_t i = 0; i < each; i += QUERIES) {
            int64_t place = (row * layer->heads + head * each + i) * layer->channels;
            int wide = step->width == 4, queries = each - i < QUERIES ? (int)(each - i) : QUERIES;
#define HEADS(width, queries) NAME(heads)(step, width, queries, batch, token, start, query + place, scores, seen, out + place)
            switch (queries) {
            case 1: wide ? HEADS(4, 1) : HEADS(2, 1); break;
            case 2: wide ? HEADS(4, 2) : HEADS(2, 2); break;
            case 3: wide ? HEADS(4, 3) : HEADS(2, 3); break;
            default: wide ? HEADS(4, QUERIES) : HEADS(2, QUERIES);
            }
#undef HEADS
        }
    }
}
