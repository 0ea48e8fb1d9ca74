/* Plain C for any processor, and the yardstick for the other files: codes in column order, look-up, dot product. */
#include "bitplane.h"

#include <string.h>

#define LANES 16 /* partial sums, so that a compiler may use vectors without reordering one sum */

/* Bytes 0..7 of x, each the same eight columns in another plane (byte 7 - b holds bit b), to eight codes. */
INLINE uint64_t transpose(uint64_t x)
{
    uint64_t t;
    t = (x ^ (x >> 7)) & 0x00AA00AA00AA00AAull;
    x ^= t ^ (t << 7);
    t = (x ^ (x >> 14)) & 0x0000CCCC0000CCCCull;
    x ^= t ^ (t << 14);
    t = (x ^ (x >> 28)) & 0x00000000F0F0F0F0ull;
    return x ^ t ^ (t << 28);
}

static void codes_in_order(const uint8_t *const planes[], int bits, int64_t bytes, uint8_t codes[CHUNK])
{
    if (bytes < CHUNK_BYTES)
        memset(codes, 0, CHUNK);
    for (int64_t octet = 0; octet < bytes; octet++) {
        uint64_t square = 0;
        for (int plane = 0; plane < bits; plane++)
            square |= (uint64_t)planes[plane][octet] << (8 * (bits - 1 - plane));
        square = transpose(square);
        for (int column = 0; column < 8; column++)
            codes[8 * octet + column] = (uint8_t)(square >> (8 * column));
    }
}

static void natural(int bits, uint16_t order[CHUNK + GROUP])
{
    (void)bits;
    for (int i = 0; i < CHUNK; i++)
        order[i] = (uint16_t)i;
}

/* Bytes of a plane in the chunk from `start` on. */
INLINE int64_t left_of(const Block *w, int64_t start)
{
    return w->bytes - start < CHUNK_BYTES ? w->bytes - start : CHUNK_BYTES;
}

INLINE void chunk_codes(const Block *w, int64_t row, int64_t start, uint8_t codes[CHUNK])
{
    const uint8_t *here[MAX_BITS];
    for (int plane = 0; plane < w->bits; plane++)
        here[plane] = w->planes[plane] + row * w->stride + start;
    codes_in_order(here, w->bits, left_of(w, start), codes);
}

/* float16 to float32. */
static float widened(uint16_t half)
{
    uint32_t exponent = (half >> 10) & 31, fraction = half & 1023;
    uint32_t bits = (uint32_t)(half & 0x8000) << 16 | (exponent + (exponent == 31 ? 224 : 112)) << 23 | fraction << 13;
    float value = (float)fraction * 0x1p-24f; /* what a subnormal means */
    if (exponent == 0)
        return half & 0x8000 ? -value : value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static void table_of(const Block *w, int64_t row, float table[1 << MAX_BITS])
{
    int64_t entries = (int64_t)1 << w->bits;
    const void *from = (const uint8_t *)w->table + row * w->table_step;
    if (w->width == 4)
        memcpy(table, from, sizeof(float) * (size_t)entries);
    else
        for (int64_t i = 0; i < entries; i++)
            table[i] = widened(((const uint16_t *)from)[i]);
}

static void exact(const Block *w, const Activations *x, float sum[][MAX_BATCH])
{
    for (int64_t row = 0; row < w->rows; row++) {
        float lanes[MAX_BATCH][LANES] = {{0}}, table[1 << MAX_BITS];
        table_of(w, row, table);
        for (int64_t start = 0; start < w->bytes; start += CHUNK_BYTES) {
            uint8_t codes[CHUNK];
            float weight[CHUNK];
            chunk_codes(w, row, start, codes);
            for (int i = 0; i < CHUNK; i++)
                weight[i] = table[codes[i]];
            for (int i = 0; w->groups && i < (left_of(w, start) + 7) / 8 * GROUP; i++)
                weight[i] *= w->groups[row * w->group_step + start / 8 + i / GROUP];
            for (int m = 0; m < x->batch; m++) {
                const float *value = x->values + m * x->step + start * 8;
                for (int i = 0; i < CHUNK; i += LANES)
                    for (int lane = 0; lane < LANES; lane++)
                        lanes[m][lane] += weight[i + lane] * value[i + lane];
            }
        }
        for (int m = 0; m < x->batch; m++)
            for (int lane = 0; lane < LANES; lane++)
                sum[row][m] += lanes[m][lane];
    }
}

static void int8(const Block *w, const Activations *x, float sum[][MAX_BATCH])
{
    for (int64_t row = 0; row < w->rows; row++) {
        const uint8_t *table = (const uint8_t *)w->table + row * w->table_step;
        for (int64_t start = 0; start < w->bytes; start += CHUNK_BYTES) {
            uint8_t codes[CHUNK];
            chunk_codes(w, row, start, codes);
            for (int i = 0; i < CHUNK; i++)
                codes[i] = table[codes[i]];
            for (int m = 0; m < x->batch; m++)
                for (int group = 0; group < (left_of(w, start) + 7) / 8; group++) {
                    int64_t place = m * x->step + start * 8 + group * GROUP;
                    int32_t dot = 0;
                    for (int i = 0; i < GROUP; i++)
                        dot += codes[group * GROUP + i] * x->codes[place + i];
                    float part = x->scales[place / GROUP] * (float)dot;
                    if (w->groups)
                        part = w->groups[row * w->group_step + start / 8 + group] *
                               (part + w->excess * x->sums[m * x->sum_step + start / 8 + group]);
                    sum[row][m] += part;
                }
        }
    }
}

static void look_up(const Block *w, int64_t columns, void *out)
{
    for (int64_t start = 0; start < columns; start += CHUNK) {
        uint8_t codes[CHUNK];
        int64_t count = columns - start < CHUNK ? columns - start : CHUNK;
        chunk_codes(w, 0, start / 8, codes);
        if (w->width == 4)
            for (int64_t i = 0; i < count; i++)
                ((uint32_t *)out)[start + i] = ((const uint32_t *)w->table)[codes[i]];
        else
            for (int64_t i = 0; i < count; i++)
                ((uint16_t *)out)[start + i] = ((const uint16_t *)w->table)[codes[i]];
    }
}

const Kernels portable_kernels = {natural, natural, exact, int8, look_up, NULL, 0.0f, 0};
