/* How avx512.c decodes: planes to codes, codes to values by tables. Included once, where its instructions are allowed. */
#ifndef COMPRESS_AVX512_H
#define COMPRESS_AVX512_H

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

#endif
