/* AVX2 with FMA and F16C (Haswell, Zen and later).
 *
 * Half a cache line of every plane is merged with its neighbours by shifts and masks until each byte holds as many columns
 * as fit, in fields of 1, 2, 4 or 8 bits (slots); missing slots are zero. Values come from byte shuffles (int8 mode) or from
 * permutations of eight float32 (exact mode), with a tree of blends above them for tables that do not fit one register.
 */
#include "bitplane.h"

#ifdef COMPRESS_X86
ISA_BEGINS("avx2,fma,f16c")
#include <immintrin.h>
#include <string.h>

#define HALF 256 /* columns in 32 bytes of a plane */
#define HALF_BYTES 32
#define AHEAD 1536           /* bytes of a plane from what is read to what is asked for */

INLINE __m256i line_of(const uint8_t *from, int64_t bytes)
{
    uint8_t rest[HALF_BYTES] = {0};
    if (bytes >= HALF_BYTES)
        return _mm256_loadu_si256((const __m256i *)from);
    if (bytes > 0)
        memcpy(rest, from, (size_t)bytes);
    return _mm256_loadu_si256((const __m256i *)rest);
}

/* Fields of `shift` bits of two vectors side by side: the even ones of both in even, the odd ones in odd. */
INLINE void merge(const int shift, __m256i high, __m256i low, __m256i *even, __m256i *odd)
{
    const __m256i mask = _mm256_set1_epi8(shift == 1 ? 0x55 : shift == 2 ? 0x33 : 0x0f);
    *even = _mm256_or_si256(_mm256_slli_epi16(_mm256_and_si256(high, mask), shift), _mm256_and_si256(low, mask));
    *odd = _mm256_or_si256(_mm256_andnot_si256(mask, high), _mm256_and_si256(_mm256_srli_epi16(low, shift), mask));
}

/* 256 codes in SLOTS(bits) vectors; `bytes` may be read of each plane. */
INLINE void merged(const int bits, const uint8_t *const planes[], int64_t place, int64_t bytes, __m256i out[8])
{
    const int slots = SLOTS(bits);
    __m256i line[8], pair[8], four[8];
    for (int slot = 0; slot < slots; slot++) {
        int plane = slot - (slots - bits);
        line[slot] = plane < 0 ? _mm256_setzero_si256() : line_of(planes[plane] + place, bytes);
    }
    if (slots == 1)
        out[0] = line[0];
    for (int i = 0; i < slots / 2; i++) /* pair[0..3]: even columns, pair[4..7]: odd ones */
        merge(1, line[2 * i], line[2 * i + 1], &pair[i], &pair[4 + i]);
    if (slots == 2)
        out[0] = pair[0], out[1] = pair[4];
    for (int odd = 0; odd < 2; odd++) {
        for (int i = 0; i < slots / 4; i++)
            merge(2, pair[4 * odd + 2 * i], pair[4 * odd + 2 * i + 1], &four[4 * odd + i], &four[4 * odd + 2 + i]);
        for (int i = 0; i < 2; i++)
            if (slots == 4)
                out[2 * odd + i] = four[4 * odd + 2 * i];
            else if (slots == 8)
                merge(4, four[4 * odd + 2 * i], four[4 * odd + 2 * i + 1], &out[4 * odd + 2 * i], &out[4 * odd + 2 * i + 1]);
    }
}

/* The column among eight whose code is field `field` (from the least significant) of vector `vector` of merged(). */
static int column_of(int slots, int vector, int field)
{
    static const uint8_t first[9][8] = {
        [1] = {0}, [2] = {0, 1}, [4] = {0, 2, 1, 3}, [8] = {0, 4, 2, 6, 1, 5, 3, 7},
    };
    return first[slots][vector] + slots * field;
}

static void int8_order(int bits, uint16_t order[CHUNK + GROUP])
{
    int slots = SLOTS(bits), units = 8 / slots;
    for (int i = 0; i < CHUNK; i++) {
        int vector = i % HALF / 32;
        order[i] = (uint16_t)(i / HALF * HALF + i % 32 * 8 + column_of(slots, vector / units, vector % units));
    }
}

static void exact_order(int bits, uint16_t order[CHUNK + GROUP])
{
    int slots = SLOTS(bits), units = 8 / slots;
    for (int i = 0; i < CHUNK; i++) {
        int vector = i % HALF / 32, byte = 4 * (i % 8) + i / 8 % 4;
        order[i] = (uint16_t)(i / HALF * HALF + byte * 8 + column_of(slots, vector / units, vector % units));
    }
}

/* A row's table as float32, repeated to eight entries at least. */
INLINE void stage(const int bits, const Block *w, int64_t row, float *values)
{
    const int count = 1 << bits;
    const uint8_t *from = (const uint8_t *)w->table + row * w->table_step;
    if (w->width == 4)
        memcpy(values, from, sizeof(float) * (size_t)count);
    else
        for (int i = 0; i < count; i += 8) {
            uint16_t half[8] = {0};
            memcpy(half, from + 2 * i, count < 8 ? 2 * (size_t)count : 16);
            _mm256_storeu_ps(values + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)half)));
        }
    for (int i = count; i < 8; i++)
        values[i] = values[i - count];
}

/* Eight values; the code is in the low bits of each 32, with anything above it. */
INLINE __m256 values_of(const int bits, const float *staged, const __m256 *table, __m256i code)
{
    const int last = bits == 4 ? 1 : bits == 5 ? 3 : 0;
    __m256 value[4];
    if (bits > 5)
        return _mm256_i32gather_ps(staged, _mm256_and_si256(code, _mm256_set1_epi32(255)), 4);
    for (int i = 0; i <= last; i++)
        value[i] = _mm256_permutevar8x32_ps(table[i], code);
    if (bits == 5) {
        __m256 bit3 = _mm256_castsi256_ps(_mm256_slli_epi32(code, 28));
        value[2] = _mm256_blendv_ps(value[2], value[3], bit3);
        value[0] = _mm256_blendv_ps(value[0], value[1], bit3);
        value[0] = _mm256_blendv_ps(value[0], value[2], _mm256_castsi256_ps(_mm256_slli_epi32(code, 27)));
    }
    if (bits == 4)
        value[0] = _mm256_blendv_ps(value[0], value[1], _mm256_castsi256_ps(_mm256_slli_epi32(code, 28)));
    return value[0];
}

typedef __m256 Lanes;

INLINE float add_lanes(__m256 x)
{
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}

/* Every row of activations is added up in four chains, however many rows there are: the sums are the same to the last bit. */
#define CHAINS 4

INLINE void add_up(const int batch, const __m256 *total, float *sum, Lanes *lanes)
{
    for (int m = 0; m < batch; m++) {
        const __m256 *chain = total + m * CHAINS;
        __m256 all = _mm256_add_ps(_mm256_add_ps(chain[0], chain[1]), _mm256_add_ps(chain[2], chain[3]));
        if (batch == 1)
            *lanes = all;
        else
            sum[m] += add_lanes(all);
    }
}

INLINE void add_up_rows(const Lanes lanes[ROWS_AT_ONCE], int64_t rows, float sum[][MAX_BATCH])
{
    for (int64_t row = 0; row < rows; row++)
        sum[row][0] += add_lanes(lanes[row]);
}

INLINE void prefetch(const int bits, const Block *w, int64_t place)
{
    for (int plane = 0; plane < bits; plane++)
        PREFETCH((uintptr_t)w->planes[plane] + (uintptr_t)(place + AHEAD));
}

/* The sizes of the groups in 256 columns, or of those there are, zeros behind them. */
INLINE __m128 sizes_of(const Block *w, int64_t row, int64_t start)
{
    int64_t count = (w->bytes - start + 7) / 8;
    int32_t bytes = 0;
    memcpy(&bytes, w->groups + row * w->group_step + start / 8, count >= 4 ? 4 : (size_t)count);
    return _mm_cvtepi32_ps(_mm_cvtepu8_epi32(_mm_cvtsi32_si128(bytes)));
}

/* In both kernels the columns of a group are in two neighbouring lanes of every vector. */
INLINE __m256 spread(__m128 sizes)
{
    return _mm256_permutevar8x32_ps(_mm256_castps128_ps256(sizes), _mm256_set_epi32(3, 3, 2, 2, 1, 1, 0, 0));
}

INLINE void exact_row(const int bits, const int grouped, const int batch, const Block *w, int64_t row, const Activations *x, float *sum, Lanes *lanes)
{
    const int slots = SLOTS(bits), units = 8 / slots, each = 4 * units;
    float staged[1 << MAX_BITS];
    __m256 total[MAX_BATCH * CHAINS], part[MAX_BATCH * CHAINS], table[4], *sums = grouped ? part : total;
    stage(bits, w, row, staged);
    for (int i = 0; i < 4; i++)
        table[i] = _mm256_loadu_ps(staged + (bits <= 3 ? 0 : 8 * i % (1 << bits)));
    for (int i = 0; i < batch * CHAINS; i++)
        total[i] = _mm256_setzero_ps();

    for (int64_t start = 0; start < w->bytes; start += HALF_BYTES) {
        __m256i codes[8];
        prefetch(bits, w, row * w->stride + start);
        merged(bits, w->planes, row * w->stride + start, w->bytes - start, codes);
        for (int i = 0; grouped && i < batch * CHAINS; i++)
            part[i] = _mm256_setzero_ps();
        for (int vector = 0; vector < slots; vector++) {
            __m256 value[32];
            for (int i = 0; i < each; i++) {
                __m256i code = _mm256_srli_epi32(codes[vector], slots * (i / 4) + 8 * (i % 4));
                value[i] = values_of(bits, staged, table, code);
            }
            for (int m = 0; m < batch; m++) {
                const float *place = x->values + m * x->step + start * 8 + vector * each * 8;
                for (int i = 0; i < each; i++) {
                    __m256 *chain = &sums[m * CHAINS + i % CHAINS];
                    *chain = _mm256_fmadd_ps(value[i], _mm256_load_ps(place + 8 * i), *chain);
                }
            }
        }
        for (int i = 0; grouped && i < batch * CHAINS; i++)
            total[i] = _mm256_fmadd_ps(part[i], spread(sizes_of(w, row, start)), total[i]);
    }
    add_up(batch, total, sum, lanes);
}

/* The table as signed bytes, sixteen entries to a register: 128 is taken off every entry, and int8_excess says so. */
INLINE void int8_table(const int bits, const uint8_t *bytes, __m256i table[16])
{
    for (int part = 0; part < (bits <= 4 ? 1 : 1 << (bits - 4)); part++) {
        uint8_t entries[16] = {0};
        memcpy(entries, bytes + 16 * part, bits < 4 ? (size_t)1 << bits : 16);
        __m256i both = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)entries));
        table[part] = _mm256_xor_si256(both, _mm256_set1_epi8((char)0x80));
    }
}

INLINE __m256i byte_look_up(const int bits, const __m256i table[16], __m256i code)
{
    __m256i found[16], low = bits <= 4 ? code : _mm256_and_si256(code, _mm256_set1_epi8(0x0f));
    int left = bits <= 4 ? 1 : 1 << (bits - 4);
    for (int i = 0; i < left; i++)
        found[i] = _mm256_shuffle_epi8(table[i], low);
    for (int bit = 4; bit < bits; bit++) {
        __m256i choice = _mm256_slli_epi16(code, 7 - bit); /* into the sign of each byte */
        left /= 2;
        for (int i = 0; i < left; i++)
            found[i] = _mm256_blendv_epi8(found[2 * i], found[2 * i + 1], choice);
    }
    return found[0];
}

/* Products of 32 signed values and activations, added by fours. */
INLINE __m256i dot(__m256i value, const int8_t *code)
{
    __m256i x = _mm256_load_si256((const __m256i *)code);
    __m256i twos = _mm256_maddubs_epi16(_mm256_abs_epi8(x), _mm256_sign_epi8(value, x)); /* at most 2 * 127 * 127 */
    return _mm256_madd_epi16(twos, _mm256_set1_epi16(1));
}

INLINE void int8_row(const int bits, const int grouped, const int batch, const Block *w, int64_t row, const Activations *x, float *sum, Lanes *lanes)
{
    const int slots = SLOTS(bits), units = 8 / slots;
    __m256 total[MAX_BATCH * CHAINS];
    __m128 offset[MAX_BATCH]; /* sums over groups of sizes and activations */
    __m256i table[16];
    int8_table(bits, (const uint8_t *)w->table + row * w->table_step, table);
    for (int i = 0; i < batch * CHAINS; i++)
        total[i] = _mm256_setzero_ps();
    for (int m = 0; m < batch; m++)
        offset[m] = _mm_setzero_ps();

    for (int64_t start = 0; start < w->bytes; start += HALF_BYTES) {
        __m256i codes[8], value[8];
        prefetch(bits, w, row * w->stride + start);
        merged(bits, w->planes, row * w->stride + start, w->bytes - start, codes);
        for (int i = 0; i < 8; i++) {
            __m256i code = _mm256_srli_epi16(codes[i / units], slots * (i % units));
            if (slots < 8)
                code = _mm256_and_si256(code, _mm256_set1_epi8((1 << slots) - 1));
            value[i] = byte_look_up(bits, table, code);
        }
        __m128 sizes = grouped ? sizes_of(w, row, start) : _mm_setzero_ps();
        for (int m = 0; m < batch; m++) {
            int64_t place = m * x->step + start * 8;
            if (grouped)
                offset[m] = _mm_fmadd_ps(sizes, _mm_loadu_ps(x->sums + m * x->sum_step + start / 8), offset[m]);
            for (int group = 0; group < HALF / GROUP; group++) {
                __m256i sums = _mm256_add_epi32(dot(value[2 * group], x->codes + place + GROUP * group),
                                                dot(value[2 * group + 1], x->codes + place + GROUP * group + 32));
                __m256 *chain = &total[m * CHAINS + group % CHAINS];
                __m256 scale = _mm256_set1_ps(x->scales[place / GROUP + group]);
                *chain = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums), grouped ? _mm256_mul_ps(scale, spread(sizes)) : scale, *chain);
            }
        }
    }
    for (int m = 0; grouped && m < batch; m++)
        total[m * CHAINS] = _mm256_fmadd_ps(_mm256_zextps128_ps256(offset[m]), _mm256_set1_ps(w->excess), total[m * CHAINS]);
    add_up(batch, total, sum, lanes);
}

PRODUCT(exact, exact_row)
PRODUCT(int8, int8_row)

static void look_up(const Block *w, int64_t columns, void *out)
{
    portable_kernels.look_up(w, columns, out);
}

const Kernels avx2_kernels = {exact_order, int8_order, exact, int8, look_up, NULL, 128.0f, 0};

ISA_ENDS
#endif
