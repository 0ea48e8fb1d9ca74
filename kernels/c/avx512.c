/* AVX-512 with VBMI, VNNI and GFNI (Ice Lake, Zen 4 and later).
 *
 * One cache line of every plane is interleaved by bytes until each 8-byte element holds the planes of as many columns as
 * fit, 1, 2, 4 or 8 slots per column; missing slots are filled with the first plane. One multiplication by the identity
 * over GF(2) turns each element from planes of columns into columns of planes. Codes are left where they
 * lie: a look-up takes them from the low bits of its lane and ignores the rest, because tables are repeated.
 */
#include "bitplane.h"

#ifdef COMPRESS_X86
ISA_BEGINS("f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni,gfni")
#include <immintrin.h>
#include <string.h>

#define VALUES (CHUNK / 16) /* vectors of float32 in a chunk */
#define TAIL 256            /* columns: above, a whole chunk is fewer instructions than units of GROUP */
#define AHEAD 1536           /* bytes of a plane from what is read to what is asked for */

/* One cache line of every slot, or what there is of it, into SLOTS(bits) vectors of transposed elements. */
INLINE void transposed(const int bits, const uint8_t *const planes[], int64_t start, int64_t bytes, __m512i out[8])
{
    const int slots = SLOTS(bits);
    const __m512i identity = _mm512_set1_epi64(0x8040201008040201ll);
    __mmask64 present = bytes >= CHUNK_BYTES ? ~0ull : (1ull << bytes) - 1;
    __m512i line[8], pair[8], four[8];

    for (int slot = 0; slot < slots; slot++) {
        int plane = slot - (slots - bits);
        line[slot] = _mm512_maskz_loadu_epi8(present, planes[plane < 0 ? 0 : plane] + start);
    }
    for (int i = 0; i < slots / 2; i++) {
        pair[2 * i] = _mm512_unpacklo_epi8(line[2 * i], line[2 * i + 1]);
        pair[2 * i + 1] = _mm512_unpackhi_epi8(line[2 * i], line[2 * i + 1]);
    }
    for (int i = 0; i < slots / 4; i++)
        for (int half = 0; half < 2; half++) {
            four[4 * i + 2 * half] = _mm512_unpacklo_epi16(pair[4 * i + half], pair[4 * i + 2 + half]);
            four[4 * i + 2 * half + 1] = _mm512_unpackhi_epi16(pair[4 * i + half], pair[4 * i + 2 + half]);
        }
    for (int i = 0; i < slots; i++) {
        __m512i x;
        if (slots == 8)
            x = i % 2 ? _mm512_unpackhi_epi32(four[i / 2], four[i / 2 + 4])
                      : _mm512_unpacklo_epi32(four[i / 2], four[i / 2 + 4]);
        else
            x = slots == 4 ? four[i] : slots == 2 ? pair[i] : line[i];
        out[i] = _mm512_gf2p8affine_epi64_epi8(identity, x, 0);
    }
}

/* The codes of 64 columns in their order, one byte each, from eight bytes of every plane, or what there is of them. */
INLINE __m512i unit_of(const int bits, const uint8_t *const planes[], int64_t start, int64_t bytes)
{
    static const uint8_t by_columns[64] = {
        0, 8,  16, 24, 32, 40, 48, 56, 1, 9,  17, 25, 33, 41, 49, 57, 2, 10, 18, 26, 34, 42, 50, 58, 3, 11, 19, 27, 35, 43, 51, 59,
        4, 12, 20, 28, 36, 44, 52, 60, 5, 13, 21, 29, 37, 45, 53, 61, 6, 14, 22, 30, 38, 46, 54, 62, 7, 15, 23, 31, 39, 47, 55, 63};
    __m512i lines = _mm512_setzero_si512();
    for (int plane = 0; plane < bits; plane++) {
        int64_t word = 0;
        if (bytes >= 8)
            memcpy(&word, planes[plane] + start, 8);
        else
            memcpy(&word, planes[plane] + start, (size_t)bytes);
        lines = _mm512_mask_set1_epi64(lines, (__mmask8)(1u << (8 - bits + plane)), word);
    }
    lines = _mm512_permutexvar_epi8(_mm512_loadu_si512(by_columns), lines);
    return _mm512_gf2p8affine_epi64_epi8(_mm512_set1_epi64(0x8040201008040201ll), lines, 0);
}

/* The column whose code lies in byte `byte` of vector `vector` of transposed(), in its unit `unit` of SLOTS bits,
 * counted from the most significant. */
static int column_of(int slots, int vector, int unit, int byte)
{
    int units = 8 / slots, lane = byte / 16, element = byte / 8 % 2;
    return 128 * lane + 8 * (2 * units * vector + units * element + unit) + byte % 8;
}

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

/* `count` (at most 16) entries of a table as float32, zeros behind them. */
INLINE __m512 entries(const void *table, int width, int64_t first, int count)
{
    __mmask16 present = (__mmask16)((1u << count) - 1);
    if (width == 4)
        return _mm512_maskz_loadu_ps(present, (const float *)table + first);
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(present, (const uint16_t *)table + first));
}

/* The table of a row of at most five bits: two registers, repeated to fill them. */
INLINE void small_table(const int bits, const void *values, int width, __m512 table[2])
{
    const int count = bits <= 4 ? 1 << bits : 16;
    table[0] = table[1] = entries(values, width, 0, count);
    if (bits == 5)
        table[1] = entries(values, width, 16, 16);
    if (bits < 4)
        table[0] = _mm512_permutexvar_ps(_mm512_and_si512(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2,
                                                                           1, 0),
                                                          _mm512_set1_epi32(count - 1)), table[0]);
}

/* Byte tables of up to 256 entries: register i holds entries 64 i to 64 i + 63. */
INLINE __m512i byte_look_up(const int bits, const __m512i table[4], __m512i codes)
{
    if (bits <= 6)
        return _mm512_permutexvar_epi8(codes, table[0]);
    __m512i low = _mm512_permutex2var_epi8(table[0], codes, table[1]);
    if (bits == 7)
        return low;
    __m512i high = _mm512_permutex2var_epi8(table[2], codes, table[3]);
    return _mm512_mask_blend_epi8(_mm512_movepi8_mask(codes), low, high);
}

/* The four bytes of float32 values as four byte tables. */
INLINE void split_table(const int bits, const void *values, int width, __m512i table[4][4])
{
    for (int part = 0; part < (1 << bits) / 64; part++) {
        __m512i word[4];
        for (int i = 0; i < 4; i++)
            word[i] = _mm512_castps_si512(entries(values, width, 64 * part + 16 * i, 16));
        for (int byte = 0; byte < 4; byte++) {
            __m512i all = _mm512_setzero_si512();
            for (int i = 3; i >= 0; i--) {
                __m128i quarter = _mm512_cvtepi32_epi8(_mm512_srli_epi32(word[i], (unsigned)(8 * byte)));
                all = i == 3 ? _mm512_inserti32x4(all, quarter, 3)
                    : i == 2 ? _mm512_inserti32x4(all, quarter, 2)
                    : i == 1 ? _mm512_inserti32x4(all, quarter, 1) : _mm512_inserti32x4(all, quarter, 0);
            }
            table[byte][part] = all;
        }
    }
}

/* Four vectors of values from 64 codes, by four byte look-ups whose results are interleaved. */
INLINE void values_by_bytes(const int bits, __m512i table[4][4], __m512i codes, __m512 *value)
{
    __m512i byte[4];
    for (int i = 0; i < 4; i++)
        byte[i] = byte_look_up(bits, table[i], codes);
    for (int half = 0; half < 2; half++) {
        __m512i low = half ? _mm512_unpackhi_epi8(byte[0], byte[1]) : _mm512_unpacklo_epi8(byte[0], byte[1]);
        __m512i high = half ? _mm512_unpackhi_epi8(byte[2], byte[3]) : _mm512_unpacklo_epi8(byte[2], byte[3]);
        value[2 * half] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(low, high));
        value[2 * half + 1] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(low, high));
    }
}

INLINE void prefetch(const int bits, const Block *w, int64_t place)
{
    for (int plane = 0; plane < bits; plane++)
        PREFETCH((uintptr_t)w->planes[plane] + (uintptr_t)(place + AHEAD));
}

/* Every row of activations is added up in four chains, however many rows there are: the sums are the same to the last bit. */
#define CHAINS 4

INLINE void add_up(const int batch, const __m512 *total, float *sum)
{
    for (int m = 0; m < batch; m++) {
        const __m512 *chain = total + m * CHAINS;
        sum[m] += _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(chain[0], chain[1]), _mm512_add_ps(chain[2], chain[3])));
    }
}

/* Add the products of a chunk's values and up to four rows of activations to their chains, which are in registers meanwhile. */
INLINE void chunk_of_rows(const int rows, const __m512 value[VALUES], const float *x, int64_t step, __m512 *total)
{
    __m512 sum[4 * CHAINS];
    for (int i = 0; i < rows * CHAINS; i++)
        sum[i] = total[i];
    for (int place = 0; place < VALUES; place += CHAINS)
        for (int i = 0; i < CHAINS; i++)
            for (int m = 0; m < rows; m++)
                sum[m * CHAINS + i] =
                    _mm512_fmadd_ps(value[place + i], _mm512_load_ps(x + m * step + 16 * (place + i)), sum[m * CHAINS + i]);
    for (int i = 0; i < rows * CHAINS; i++)
        total[i] = sum[i];
}

INLINE void some_rows(int rows, const __m512 value[VALUES], const float *x, int64_t step, __m512 *total)
{
    switch (rows) {
    case 1: chunk_of_rows(1, value, x, step, total); break;
    case 2: chunk_of_rows(2, value, x, step, total); break;
    case 3: chunk_of_rows(3, value, x, step, total); break;
    default: chunk_of_rows(4, value, x, step, total);
    }
}

INLINE void exact_row(const int bits, const int batch, const Block *w, int64_t row, const Activations *x, float *sum)
{
    const int slots = SLOTS(bits), units = 8 / slots, each = VALUES / slots;
    const void *values = (const uint8_t *)w->table + row * (w->width << bits);
    __m512 total[MAX_BATCH * CHAINS], small[2], held[VALUES];
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
                if (batch == 1)
                    total[i % CHAINS] = _mm512_fmadd_ps(value[i], _mm512_load_ps(x->values + start * 8 + 16 * place), total[i % CHAINS]);
                else
                    held[place] = value[i];
            }
        }
        if (batch > 1)
            for (int m = 0; m < batch; m += 4)
                some_rows(batch - m, held, x->values + m * x->step + start * 8, x->step, total + m * CHAINS);
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
        for (int m = 0; m < batch; m++)
            for (int i = 0; i < 4; i++) {
                __m512 *chain = &total[m * CHAINS + i % CHAINS];
                *chain = _mm512_fmadd_ps(value[i], _mm512_load_ps(x->values + m * x->step + start * 8 + 16 * i), *chain);
            }
    }
    add_up(batch, total, sum);
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

INLINE void int8_row(const int bits, const int batch, const Block *w, int64_t row, const Activations *x, float *sum)
{
    const int slots = SLOTS(bits), units = 8 / slots;
    __m512 total[MAX_BATCH * CHAINS];
    __m512i table[4];
    for (int i = 0; i < batch * CHAINS; i++)
        total[i] = _mm512_setzero_ps();
    int8_table(bits, (const uint8_t *)w->table + (row << bits), table);

    int64_t start = 0;
    for (; w->bytes - start > TAIL / 8; start += CHUNK_BYTES) {
        __m512i codes[8], value[GROUPS];
        prefetch(bits, w, row * w->stride + start);
        transposed(bits, w->planes, row * w->stride + start, w->bytes - start, codes);
        for (int group = 0; group < GROUPS; group++) {
            __m512i code = _mm512_srli_epi16(codes[group / units], (unsigned)(slots * (units - 1 - group % units)));
            value[group] = byte_look_up(bits, table, code);
        }
        for (int m = 0; m < batch; m++) {
            int64_t place = m * x->step + start * 8;
            const float *scale = x->scales + place / GROUP;
            for (int group = 0; group < GROUPS; group++) {
                __m512i activation = _mm512_load_si512(x->codes + place + group * GROUP);
                __m512i dot = _mm512_dpbusd_epi32(_mm512_setzero_si512(), value[group], activation);
                __m512 *chain = &total[m * CHAINS + group % CHAINS];
                *chain = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), _mm512_set1_ps(scale[group]), *chain);
            }
        }
    }
    for (; start < w->bytes; start += GROUP / 8) {
        __m512i value = byte_look_up(bits, table, unit_of(bits, w->planes, row * w->stride + start, w->bytes - start));
        for (int m = 0; m < batch; m++) {
            int64_t place = m * x->step + start * 8;
            __m512i dot = _mm512_dpbusd_epi32(_mm512_setzero_si512(), value, _mm512_load_si512(x->codes + place));
            __m512 *chain = &total[m * CHAINS];
            *chain = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), _mm512_set1_ps(x->scales[place / GROUP]), *chain);
        }
    }
    add_up(batch, total, sum);
}

static void exact(const Block *w, const Activations *x, float sum[][MAX_BATCH])
{
    EVERY_WIDTH(EXACT)
}

static void int8(const Block *w, const Activations *x, float sum[][MAX_BATCH])
{
    EVERY_WIDTH(INT8)
}

/* The codes of a chunk in the order of the columns. */
INLINE void codes_in_order(const int bits, const uint8_t *const planes[], int64_t start, int64_t bytes, uint8_t codes[CHUNK])
{
    /* Eight slots whatever the width: each vector then holds sixteen columns in a row per lane. */
    const uint8_t *slots[8];
    __m512i out[8];
    for (int slot = 0; slot < 8; slot++)
        slots[slot] = planes[slot < 8 - bits ? 0 : slot - (8 - bits)];
    transposed(8, slots, start, bytes, out);
    for (int vector = 0; vector < 8; vector++) {
        __m512i code = _mm512_and_si512(out[vector], _mm512_set1_epi8((char)((1 << bits) - 1)));
        _mm_storeu_si128((__m128i *)(codes + 16 * vector), _mm512_castsi512_si128(code));
        _mm_storeu_si128((__m128i *)(codes + 128 + 16 * vector), _mm512_extracti32x4_epi32(code, 1));
        _mm_storeu_si128((__m128i *)(codes + 256 + 16 * vector), _mm512_extracti32x4_epi32(code, 2));
        _mm_storeu_si128((__m128i *)(codes + 384 + 16 * vector), _mm512_extracti32x4_epi32(code, 3));
    }
}

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

INLINE void look_up_row(const int bits, const Block *w, int64_t columns, void *out)
{
    const int count = 1 << bits;
    __m512 small[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    __m512i split[4][4], words[8];
    for (int i = 0; i < 8; i++) /* compilers do not see that what is used has been set */
        words[i] = _mm512_setzero_si512();
    if (w->width == 4 && bits <= 5)
        small_table(bits, w->table, 4, small);
    else if (w->width == 4)
        split_table(bits, w->table, 4, split);
    else
        for (int i = 0; i < (count + 31) / 32; i++)
            words[i] = _mm512_maskz_loadu_epi16(count >= 32 ? ~0u : (1u << (count % 32)) - 1,
                                                (const uint16_t *)w->table + 32 * i);
    for (int64_t start = 0; start < columns; start += CHUNK) {
        uint8_t codes[CHUNK];
        int64_t here = columns - start < CHUNK ? columns - start : CHUNK;
        codes_in_order(bits, w->planes, start / 8, w->bytes - start / 8, codes);
        if (w->width == 2)
            for (int64_t i = 0; i < here; i += 32) {
                __m512i code = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)(codes + i)));
                __mmask32 present = here - i >= 32 ? ~0u : (1u << (here - i)) - 1;
                _mm512_mask_storeu_epi16((uint16_t *)out + start + i, present, two_bytes_each(bits, words, code));
            }
        else if (bits <= 5)
            for (int64_t i = 0; i < here; i += 16) {
                __m512i code = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(codes + i)));
                __mmask16 present = here - i >= 16 ? 0xffff : (__mmask16)((1u << (here - i)) - 1);
                __m512 value = bits == 5 ? _mm512_permutex2var_ps(small[0], code, small[1])
                                         : _mm512_permutexvar_ps(code, small[0]);
                _mm512_mask_storeu_ps((float *)out + start + i, present, value);
            }
        else
            for (int64_t i = 0; i < here; i += 64) {
                float last[64], *to = here - i >= 64 ? (float *)out + start + i : last;
                four_bytes_each(bits, split, _mm512_loadu_si512(codes + i), to);
                if (to == last)
                    memcpy((float *)out + start + i, last, sizeof(float) * (size_t)(here - i));
            }
    }
}

static void look_up(const Block *w, int64_t columns, void *out)
{
#define LOOK_UP(bits) look_up_row(bits, w, columns, out);
    EVERY_WIDTH(LOOK_UP)
#undef LOOK_UP
}

const Kernels avx512_kernels = {exact_order, int8_order, exact, int8, look_up, 0.0f, TAIL};

ISA_ENDS
#endif
