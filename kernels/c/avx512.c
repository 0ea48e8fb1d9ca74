/* AVX-512 with VBMI, VNNI and GFNI (Ice Lake, Zen 4 and later).
 *
 * One cache line of every plane is interleaved by bytes until each 8-byte element holds the planes of as many columns as
 * fit, 1, 2, 4 or 8 slots per column; missing slots are filled with the first plane. One multiplication by the identity
 * over GF(2) turns each element from planes of columns into columns of planes. Codes are left where they
 * lie: a look-up takes them from the low bits of its lane and ignores the rest, because tables are repeated.
 */
#include "bitplane.h"

#ifdef COMPRESS_X86
ISA_BEGINS("fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni,gfni")
#include <immintrin.h>
#include <string.h>

#define VALUES (CHUNK / 16) /* vectors of float32 in a chunk */
#define TAIL 256            /* columns: above, a whole chunk is fewer instructions than units of GROUP */
#define AHEAD 1536           /* bytes of a plane from what is read to what is asked for */

#include "avx512.h"

typedef __m512 Lanes;

static void int8_order(int bits, uint16_t order[CHUNK + GROUP])
{
    int slots = SLOTS(bits), units = 8 / slots;
    for (int i = 0; i < CHUNK; i++)
        order[i] = (uint16_t)column_of(slots, i / 64 / units, i / 64 % units, i % 64);
    for (int i = 0; i < GROUP; i++)
        order[CHUNK + i] = (uint16_t)i;
}

static void exact_order(int bits, uint16_t order[CHUNK + GROUP])
{
    int slots = SLOTS(bits), units = 8 / slots;
    for (int i = 0; i < CHUNK + GROUP; i++) {
        int vector = i / 64 / units, unit = i / 64 % units, quarter = i / 16 % 4, lane = i % 16;
        /* Up to five bits, quarter j takes byte j of every four; above, it takes bytes 4 j to 4 j + 3 of every sixteen. */
        int byte = bits <= 5 ? 4 * lane + quarter : lane / 4 * 16 + 4 * quarter + lane % 4;
        order[i] = (uint16_t)(i < CHUNK ? column_of(slots, vector, unit, byte) : byte);
    }
}

INLINE void prefetch(const int bits, const Block *w, int64_t place)
{
    for (int plane = 0; plane < bits; plane++)
        PREFETCH((uintptr_t)w->planes[plane] + (uintptr_t)(place + AHEAD));
}

/* Every row of activations is added up in four chains, however many rows there are: the sums are the same to the last bit. */
#define CHAINS 4

INLINE void add_up(const int batch, const __m512 *total, float *sum, Lanes *lanes)
{
    for (int m = 0; m < batch; m++) {
        const __m512 *chain = total + m * CHAINS;
        __m512 all = _mm512_add_ps(_mm512_add_ps(chain[0], chain[1]), _mm512_add_ps(chain[2], chain[3]));
        if (batch == 1)
            *lanes = all;
        else
            sum[m] += _mm512_reduce_add_ps(all);
    }
}

/* Add lanes i and i + 8, then i and i + 4, 2 and 1, as _mm512_reduce_add_ps() does, of sixteen rows at once. */
INLINE void add_up_sixteen(Lanes lanes[16], int64_t rows, float sum[][MAX_BATCH])
{
    const __m512i order = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
    float found[16];
    for (int64_t row = rows; row < 16; row++)
        lanes[row] = _mm512_setzero_ps();
    for (int i = 0; i < 8; i++)
        lanes[i] = _mm512_add_ps(_mm512_shuffle_f32x4(lanes[2 * i], lanes[2 * i + 1], 0x44),
                                 _mm512_shuffle_f32x4(lanes[2 * i], lanes[2 * i + 1], 0xee));
    for (int i = 0; i < 4; i++)
        lanes[i] = _mm512_add_ps(_mm512_shuffle_f32x4(lanes[2 * i], lanes[2 * i + 1], 0x88),
                                 _mm512_shuffle_f32x4(lanes[2 * i], lanes[2 * i + 1], 0xdd));
    for (int i = 0; i < 2; i++)
        lanes[i] = _mm512_add_ps(_mm512_shuffle_ps(lanes[2 * i], lanes[2 * i + 1], 0x44),
                                 _mm512_shuffle_ps(lanes[2 * i], lanes[2 * i + 1], 0xee));
    *lanes = _mm512_add_ps(_mm512_shuffle_ps(lanes[0], lanes[1], 0x88), _mm512_shuffle_ps(lanes[0], lanes[1], 0xdd));
    _mm512_storeu_ps(found, _mm512_permutexvar_ps(order, *lanes));
    for (int64_t row = 0; row < rows; row++)
        sum[row][0] += found[row];
}

INLINE void add_up_rows(Lanes lanes[ROWS_AT_ONCE], int64_t rows, float sum[][MAX_BATCH])
{
    for (int64_t row = 0; row < rows; row += 16)
        add_up_sixteen(lanes + row, rows - row < 16 ? rows - row : 16, sum + row);
}

/* The sizes of the groups in a chunk, or of those there are in `bytes` of a plane, zeros behind them. */
INLINE __m256 sizes_of(const Block *w, int64_t row, int64_t start)
{
    int64_t count = (w->bytes - start + 7) / 8;
    __mmask16 present = count >= GROUPS ? 0xff : (__mmask16)((1u << count) - 1);
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_maskz_loadu_epi8(present, w->groups + row * w->group_step + start / 8)));
}

/* What the lanes of the first half of a chunk's vectors are multiplied by, and those of the second: the first 64 of every 128
 * columns and the others. At 1 bit both halves have the columns of all groups, those of a group in two neighbouring lanes. */
INLINE void spread(const int bits, __m256 sizes, __m512 lanes[2])
{
    const __m512i quarters = _mm512_set_epi32(6, 6, 6, 6, 4, 4, 4, 4, 2, 2, 2, 2, 0, 0, 0, 0);
    const __m512i eighths = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
    for (int half = 0; half < 2; half++)
        lanes[half] = _mm512_permutexvar_ps(bits == 1 ? eighths : _mm512_add_epi32(quarters, _mm512_set1_epi32(half)),
                                            _mm512_castps256_ps512(sizes));
}

/* With groups, half a chunk is added up in two chains of its own, which are multiplied by the sizes only then, and start anew. */
#define PARTS 2
#define HALVES(bits, grouped) ((grouped) && (bits) > 1 ? 2 : 1)

INLINE void fold(__m512 part[PARTS], __m512 sizes, __m512 *total)
{
    for (int i = 0; i < PARTS; i++) {
        total[i] = _mm512_fmadd_ps(part[i], sizes, total[i]);
        part[i] = _mm512_setzero_ps();
    }
}

/* Add the products of a chunk's values and up to four rows of activations to their chains, which are in registers meanwhile. */
INLINE void chunk_of_rows(const int bits, const int grouped, const int rows, const __m512 value[VALUES], const float *x, int64_t step,
                          const __m512 sizes[2], __m512 *total)
{
    const int chains = grouped ? PARTS : CHAINS, halves = HALVES(bits, grouped);
    __m512 sum[4 * CHAINS];
    for (int half = 0; half < halves; half++) {
        for (int i = 0; i < rows * chains; i++)
            sum[i] = grouped ? _mm512_setzero_ps() : total[i];
        for (int place = half * VALUES / 2; place < (half + 1) * VALUES / halves; place += chains)
            for (int i = 0; i < chains; i++)
                for (int m = 0; m < rows; m++)
                    sum[m * chains + i] =
                        _mm512_fmadd_ps(value[place + i], _mm512_load_ps(x + m * step + 16 * (place + i)), sum[m * chains + i]);
        for (int i = 0; !grouped && i < rows * chains; i++)
            total[i] = sum[i];
        for (int m = 0; grouped && m < rows; m++)
            fold(sum + m * PARTS, sizes[half], total + m * CHAINS);
    }
}

INLINE void some_rows(const int bits, const int grouped, int rows, const __m512 value[VALUES], const float *x, int64_t step,
                      const __m512 sizes[2], __m512 *total)
{
    switch (rows) {
    case 1: chunk_of_rows(bits, grouped, 1, value, x, step, sizes, total); break;
    case 2: chunk_of_rows(bits, grouped, 2, value, x, step, sizes, total); break;
    case 3: chunk_of_rows(bits, grouped, 3, value, x, step, sizes, total); break;
    default: chunk_of_rows(bits, grouped, 4, value, x, step, sizes, total);
    }
}

INLINE void exact_row(const int bits, const int grouped, const int batch, const Block *w, int64_t row, const Activations *x, float *sum, Lanes *lanes)
{
    const int slots = SLOTS(bits), units = 8 / slots, each = VALUES / slots;
    const void *values = (const uint8_t *)w->table + row * w->table_step;
    __m512 total[MAX_BATCH * CHAINS], small[2], held[VALUES], sizes[2], part[PARTS] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    __m512i split[4][4];
    for (int i = 0; i < batch * CHAINS; i++)
        total[i] = _mm512_setzero_ps();
    if (bits <= 5)
        small_table(bits, values, w->width, small);
    else
        split_table(bits, values, w->width, split);

    int64_t start = 0;
    for (; w->bytes - start > TAIL / 8; start += CHUNK_BYTES) {
        __m512i codes[8];
        prefetch(bits, w, row * w->stride + start);
        transposed(bits, w->planes, row * w->stride + start, w->bytes - start, codes);
        if (grouped)
            spread(bits, sizes_of(w, row, start), sizes);
        for (int vector = 0; vector < slots; vector++) {
            __m512 value[VALUES];
            if (bits <= 5)
                for (int i = 0; i < each; i++) {
                    __m512i code = _mm512_srli_epi32(codes[vector], (unsigned)(slots * (units - 1 - i / 4) + 8 * (i % 4)));
                    value[i] = bits == 5 ? _mm512_permutex2var_ps(small[0], code, small[1])
                                         : _mm512_permutexvar_ps(code, small[0]);
                }
            else
                values_by_bytes(bits, split, codes[vector], value);
            for (int i = 0; i < each; i++) {
                int place = vector * each + i;
                __m512 *chain = grouped ? &part[i % PARTS] : &total[i % CHAINS];
                if (batch == 1)
                    *chain = _mm512_fmadd_ps(value[i], _mm512_load_ps(x->values + start * 8 + 16 * place), *chain);
                else
                    held[place] = value[i];
            }
            if (grouped && batch == 1 && (vector + 1) % (slots / HALVES(bits, 1)) == 0)
                fold(part, sizes[2 * vector / slots], total);
        }
        if (batch > 1)
            for (int m = 0; m < batch; m += 4)
                some_rows(bits, grouped, batch - m, held, x->values + m * x->step + start * 8, x->step, sizes, total + m * CHAINS);
    }
    for (; start < w->bytes; start += GROUP / 8) {
        __m512i codes = unit_of(bits, w->planes, row * w->stride + start, w->bytes - start);
        __m512 value[4];
        if (bits <= 5)
            for (int i = 0; i < 4; i++) {
                __m512i code = _mm512_srli_epi32(codes, (unsigned)(8 * i));
                value[i] = bits == 5 ? _mm512_permutex2var_ps(small[0], code, small[1]) : _mm512_permutexvar_ps(code, small[0]);
            }
        else
            values_by_bytes(bits, split, codes, value);
        for (int i = 0; grouped && i < 4; i++)
            value[i] = _mm512_mul_ps(value[i], _mm512_set1_ps(w->groups[row * w->group_step + start / 8]));
        for (int m = 0; m < batch; m++)
            for (int i = 0; i < 4; i++) {
                __m512 *chain = &total[m * CHAINS + i % CHAINS];
                *chain = _mm512_fmadd_ps(value[i], _mm512_load_ps(x->values + m * x->step + start * 8 + 16 * i), *chain);
            }
    }
    add_up(batch, total, sum, lanes);
}

/* Add what every table entry's excess is multiplied by in the chunk from `start` on: sizes of groups by sums of activations. */
INLINE void add_offsets(const int batch, const Block *w, int64_t row, int64_t start, const Activations *x, __m256 *offset)
{
    for (int m = 0; m < batch; m++)
        offset[m] = _mm256_fmadd_ps(sizes_of(w, row, start), _mm256_loadu_ps(x->sums + m * x->sum_step + start / 8), offset[m]);
}

INLINE void int8_table(const int bits, const uint8_t *bytes, __m512i table[4])
{
    if (bits == 1)
        table[0] = _mm512_set1_epi16((short)(bytes[0] | bytes[1] << 8));
    else if (bits == 2)
        table[0] = _mm512_broadcastd_epi32(_mm_loadu_si32(bytes));
    else if (bits == 3)
        table[0] = _mm512_broadcastq_epi64(_mm_loadu_si64(bytes));
    else if (bits == 4)
        table[0] = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)bytes));
    else if (bits == 5)
        table[0] = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)bytes));
    else
        for (int part = 0; part < (1 << bits) / 64; part++)
            table[part] = _mm512_loadu_si512(bytes + 64 * part);
}

INLINE void int8_row(const int bits, const int grouped, const int batch, const Block *w, int64_t row, const Activations *x, float *sum, Lanes *lanes)
{
    const int slots = SLOTS(bits), units = 8 / slots;
    __m512 total[MAX_BATCH * CHAINS], sizes[2];
    __m256 offset[MAX_BATCH]; /* sums over groups of sizes and activations */
    __m512i table[4];
    for (int i = 0; i < batch * CHAINS; i++)
        total[i] = _mm512_setzero_ps();
    for (int m = 0; m < batch; m++)
        offset[m] = _mm256_setzero_ps();
    int8_table(bits, (const uint8_t *)w->table + row * w->table_step, table);

    int64_t start = 0;
    for (; w->bytes - start > TAIL / 8; start += CHUNK_BYTES) {
        __m512i codes[8], value[GROUPS];
        prefetch(bits, w, row * w->stride + start);
        transposed(bits, w->planes, row * w->stride + start, w->bytes - start, codes);
        for (int group = 0; group < GROUPS; group++) {
            __m512i code = _mm512_srli_epi16(codes[group / units], (unsigned)(slots * (units - 1 - group % units)));
            value[group] = byte_look_up(bits, table, code);
        }
        if (grouped) {
            add_offsets(batch, w, row, start, x, offset);
            spread(bits, sizes_of(w, row, start), sizes);
        }
        for (int m = 0; m < batch; m++) {
            int64_t place = m * x->step + start * 8;
            const float *scale = x->scales + place / GROUP;
            __m512 half = _mm512_setzero_ps();
            for (int group = 0; group < GROUPS; group++) {
                __m512i activation = _mm512_load_si512(x->codes + place + group * GROUP);
                __m512i dot = _mm512_dpbusd_epi32(_mm512_setzero_si512(), value[group], activation);
                __m512 *chain = grouped ? &half : &total[m * CHAINS + group % CHAINS];
                *chain = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), _mm512_set1_ps(scale[group]), *chain);
                if (grouped && (group + 1) % (GROUPS / 2) == 0) {
                    chain = &total[m * CHAINS + group / (GROUPS / 2)];
                    *chain = _mm512_fmadd_ps(half, sizes[group / (GROUPS / 2)], *chain);
                    half = _mm512_setzero_ps();
                }
            }
        }
    }
    if (grouped && start < w->bytes)
        add_offsets(batch, w, row, start, x, offset);
    for (; start < w->bytes; start += GROUP / 8) {
        __m512i value = byte_look_up(bits, table, unit_of(bits, w->planes, row * w->stride + start, w->bytes - start));
        for (int m = 0; m < batch; m++) {
            int64_t place = m * x->step + start * 8;
            __m512i dot = _mm512_dpbusd_epi32(_mm512_setzero_si512(), value, _mm512_load_si512(x->codes + place));
            __m512 *chain = &total[m * CHAINS];
            float scale = x->scales[place / GROUP] * (grouped ? w->groups[row * w->group_step + start / 8] : 1.0f);
            *chain = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), _mm512_set1_ps(scale), *chain);
        }
    }
    for (int m = 0; grouped && m < batch; m++)
        total[m * CHAINS] = _mm512_fmadd_ps(_mm512_zextps256_ps512(offset[m]), _mm512_set1_ps(w->excess), total[m * CHAINS]);
    add_up(batch, total, sum, lanes);
}

PRODUCT(exact, exact_row)
PRODUCT(int8, int8_row)

/* 64 entries of four bytes, from byte tables. */
INLINE void four_bytes_each(const int bits, __m512i table[4][4], __m512i codes, float *out)
{
    __m512 value[4];
    values_by_bytes(bits, table, codes, value);
    for (int i = 0; i < 4; i++) {
        _mm_storeu_ps(out + 4 * i, _mm512_castps512_ps128(value[i]));
        _mm_storeu_ps(out + 16 + 4 * i, _mm512_extractf32x4_ps(value[i], 1));
        _mm_storeu_ps(out + 32 + 4 * i, _mm512_extractf32x4_ps(value[i], 2));
        _mm_storeu_ps(out + 48 + 4 * i, _mm512_extractf32x4_ps(value[i], 3));
    }
}

/* 32 entries of two bytes; table[i] holds entries 32 i to 32 i + 31. */
INLINE __m512i two_bytes_each(const int bits, const __m512i table[8], __m512i codes)
{
    __m512i found[4];
    if (bits <= 5)
        return _mm512_permutexvar_epi16(codes, table[0]);
    for (int i = 0; i < 1 << (bits - 6); i++)
        found[i] = _mm512_permutex2var_epi16(table[2 * i], codes, table[2 * i + 1]);
    for (int bit = 6; bit < bits; bit++) {
        __mmask32 upper = _mm512_test_epi16_mask(codes, _mm512_set1_epi16((short)(1 << bit)));
        for (int i = 0; i < 1 << (bits - 1 - bit); i++)
            found[i] = _mm512_mask_blend_epi16(upper, found[2 * i], found[2 * i + 1]);
    }
    return found[0];
}

/* Compilers do not see that what is used of tables is set. */
INLINE void no_table(__m512 small[2], __m512i split[4][4])
{
    for (int i = 0; i < 16; i++)
        split[i / 4][i % 4] = _mm512_setzero_si512();
    small[0] = small[1] = _mm512_setzero_ps();
}

INLINE void float_table(const int bits, const void *table, int width, __m512 small[2], __m512i split[4][4])
{
    if (bits <= 5)
        small_table(bits, table, width, small);
    else
        split_table(bits, table, width, split);
}

/* 64 entries as float32. */
INLINE void floats_of(const int bits, const __m512 small[2], __m512i split[4][4], __m512i codes, __m512 value[4])
{
    float held[64];
    if (bits > 5)
        four_bytes_each(bits, split, codes, held);
    for (int i = 0; i < 4; i++) {
        __m512i code = _mm512_cvtepu8_epi32(i == 0 ? _mm512_castsi512_si128(codes) : i == 1 ? _mm512_extracti32x4_epi32(codes, 1)
                                          : i == 2 ? _mm512_extracti32x4_epi32(codes, 2) : _mm512_extracti32x4_epi32(codes, 3));
        value[i] = bits > 5 ? _mm512_loadu_ps(held + 16 * i)
                 : bits == 5 ? _mm512_permutex2var_ps(small[0], code, small[1]) : _mm512_permutexvar_ps(code, small[0]);
    }
}

/* 32 values to the nearest bfloat16, ties to even. */
INLINE __m512i bfloat16_of(const __m512 value[2])
{
    static const uint16_t upper[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                       33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
    __m512i word[2];
    for (int i = 0; i < 2; i++) {
        word[i] = _mm512_castps_si512(value[i]);
        __m512i odd = _mm512_and_si512(_mm512_srli_epi32(word[i], 16), _mm512_set1_epi32(1));
        word[i] = _mm512_add_epi32(_mm512_add_epi32(word[i], _mm512_set1_epi32(0x7fff)), odd);
    }
    return _mm512_permutex2var_epi16(word[0], _mm512_loadu_si512(upper), word[1]);
}

INLINE void store_floats(float *out, int64_t count, const __m512 value[4])
{
    for (int i = 0; i < 4 && 16 * i < count; i++)
        _mm512_mask_storeu_ps(out + 16 * i, count - 16 * i >= 16 ? 0xffff : (__mmask16)((1u << (count - 16 * i)) - 1), value[i]);
}

INLINE void store_halves(uint16_t *out, int64_t count, __m512i first, __m512i second)
{
    for (int i = 0; i < 2 && 32 * i < count; i++)
        _mm512_mask_storeu_epi16(out + 32 * i, count - 32 * i >= 32 ? ~0u : (1u << (count - 32 * i)) - 1, i ? second : first);
}

INLINE void copied_row(const int bits, const Block *w, int64_t columns, void *out)
{
    const int count = 1 << bits;
    __m512 small[2], value[4];
    __m512i split[4][4], words[8];
    no_table(small, split);
    for (int i = 0; i < 8; i++)
        words[i] = _mm512_setzero_si512();
    for (int i = 0; w->width == 2 && i < (count + 31) / 32; i++)
        words[i] = _mm512_maskz_loadu_epi16(count >= 32 ? ~0u : (1u << (count % 32)) - 1, (const uint16_t *)w->table + 32 * i);
    if (w->width == 4)
        float_table(bits, w->table, 4, small, split);
    for (int64_t start = 0; start < columns; start += GROUP) {
        int64_t here = columns - start < GROUP ? columns - start : GROUP;
        __m512i codes = unit_of(bits, w->planes, start / 8, w->bytes - start / 8);
        if (w->width == 4) {
            floats_of(bits, small, split, codes, value);
            store_floats((float *)out + start, here, value);
        } else
            store_halves((uint16_t *)out + start, here,
                         two_bytes_each(bits, words, _mm512_cvtepu8_epi16(_mm512_castsi512_si256(codes))),
                         two_bytes_each(bits, words, _mm512_cvtepu8_epi16(_mm512_extracti64x4_epi64(codes, 1))));
    }
}

static void look_up(const Block *w, int64_t columns, void *out)
{
    switch (w->bits) {
    case 1: copied_row(1, w, columns, out); break;
    case 2: copied_row(2, w, columns, out); break;
    case 3: copied_row(3, w, columns, out); break;
    case 4: copied_row(4, w, columns, out); break;
    case 5: copied_row(5, w, columns, out); break;
    case 6: copied_row(6, w, columns, out); break;
    case 7: copied_row(7, w, columns, out); break;
    default: copied_row(8, w, columns, out);
    }
}

INLINE void scaled_rows(const int bits, const Block *w, int64_t columns, const Scaling *by, uint8_t *out)
{
    __m512 small[2], value[4];
    __m512i split[4][4];
    no_table(small, split);
    for (int64_t row = 0; row < w->rows; row++, out += columns * by->width) {
        const uint8_t *groups = w->groups ? w->groups + row * w->group_step : NULL;
        float factor = by->factors ? by->factors[row] : 1.0f;
        if (row == 0 || w->table_step)
            float_table(bits, (const uint8_t *)w->table + row * w->table_step, w->width, small, split);
        for (int64_t start = 0; start < columns; start += GROUP) {
            int64_t here = columns - start < GROUP ? columns - start : GROUP;
            __m512 size = _mm512_set1_ps(groups ? factor * (groups[start / GROUP] / UNIT) : factor);
            __m512i codes = unit_of(bits, w->planes, row * w->stride + start / 8, w->bytes - start / 8);
            floats_of(bits, small, split, codes, value);
            for (int i = 0; i < 4; i++)
                value[i] = _mm512_mul_ps(value[i], size);
            for (int i = 0; by->inputs && i < 4 && 16 * i < here; i++) {
                __mmask16 present = here - 16 * i >= 16 ? 0xffff : (__mmask16)((1u << (here - 16 * i)) - 1);
                value[i] = _mm512_mul_ps(value[i], _mm512_maskz_loadu_ps(present, by->inputs + start + 16 * i));
            }
            if (by->width == 4)
                store_floats((float *)out + start, here, value);
            else
                store_halves((uint16_t *)out + start, here, bfloat16_of(value), bfloat16_of(value + 2));
        }
    }
}

static void scaled(const Block *w, int64_t columns, const Scaling *by, void *out)
{
    switch (w->bits) {
    case 1: scaled_rows(1, w, columns, by, out); break;
    case 2: scaled_rows(2, w, columns, by, out); break;
    case 3: scaled_rows(3, w, columns, by, out); break;
    case 4: scaled_rows(4, w, columns, by, out); break;
    case 5: scaled_rows(5, w, columns, by, out); break;
    case 6: scaled_rows(6, w, columns, by, out); break;
    case 7: scaled_rows(7, w, columns, by, out); break;
    default: scaled_rows(8, w, columns, by, out);
    }
}


const Kernels avx512_kernels = {exact_order, int8_order, exact, int8, look_up, scaled, 0.0f, TAIL};

ISA_ENDS
#endif
