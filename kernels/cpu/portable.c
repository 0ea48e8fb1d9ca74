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

static void natural(int bits, uint16_t order[CHUNK])
{
    (void)bits;
    for (int i = 0; i < CHUNK; i++)
        order[i] = (uint16_t)i;
}

INLINE void chunk_codes(const Stretch *w, int64_t start, uint8_t codes[CHUNK])
{
    const uint8_t *here[MAX_BITS];
    int64_t left = w->bytes - start;
    for (int plane = 0; plane < w->bits; plane++)
        here[plane] = w->planes[plane] + start;
    codes_in_order(here, w->bits, left < CHUNK_BYTES ? left : CHUNK_BYTES, codes);
}

static void exact(const Stretch *w, const float *table, const Activations *x, float *sum)
{
    float lanes[MAX_BATCH][LANES] = {{0}};
    for (int64_t start = 0; start < w->bytes; start += CHUNK_BYTES) {
        uint8_t codes[CHUNK];
        float weight[CHUNK];
        chunk_codes(w, start, codes);
        for (int i = 0; i < CHUNK; i++)
            weight[i] = table[codes[i]];
        for (int m = 0; m < x->batch; m++) {
            const float *value = x->values + m * x->step + start * 8;
            for (int i = 0; i < CHUNK; i += LANES)
                for (int lane = 0; lane < LANES; lane++)
                    lanes[m][lane] += weight[i + lane] * value[i + lane];
        }
    }
    for (int m = 0; m < x->batch; m++) {
        sum[m] = 0;
        for (int lane = 0; lane < LANES; lane++)
            sum[m] += lanes[m][lane];
    }
}

static void int8(const Stretch *w, const uint8_t *table, const Activations *x, float *sum)
{
    memset(sum, 0, sizeof(float) * (size_t)x->batch);
    for (int64_t start = 0; start < w->bytes; start += CHUNK_BYTES) {
        uint8_t codes[CHUNK];
        chunk_codes(w, start, codes);
        for (int i = 0; i < CHUNK; i++)
            codes[i] = table[codes[i]];
        for (int m = 0; m < x->batch; m++)
            for (int group = 0; group < GROUPS; group++) {
                const int8_t *code = x->codes + m * x->step + start * 8 + group * GROUP;
                int32_t dot = 0;
                for (int i = 0; i < GROUP; i++)
                    dot += codes[group * GROUP + i] * code[i];
                sum[m] += x->scales[(m * x->step + start * 8) / GROUP + group] * (float)dot;
            }
    }
}

static void widen(const uint16_t *half, int count, float *single)
{
    for (int i = 0; i < count; i++) {
        uint32_t sign = (uint32_t)(half[i] & 0x8000) << 16, exponent = (half[i] >> 10) & 31, fraction = half[i] & 1023;
        uint32_t bits = sign | ((exponent + 112) << 23) | (fraction << 13);
        if (exponent == 31)
            bits += 112u << 23;
        memcpy(&single[i], &bits, sizeof bits);
        if (exponent == 0) {
            single[i] = (float)fraction * 0x1p-24f;
            if (sign)
                single[i] = -single[i];
        }
    }
}

const Kernels portable_kernels = {natural, natural, exact, int8, codes_in_order, widen};
