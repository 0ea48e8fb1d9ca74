/* Attention to keys and values that are bit planes (kernels/kv.py): products with queries, and sums by weights.
 *
 * A token's codes become floats in registers and in the first-level cache, are used for all rows of queries that share the head, and
 * are gone: nothing dense is left in memory. Heads are shared out to threads.
 */
#include "bitplane.h"

#include <string.h>

#define LANES 64
#define MAX_CHANNELS 1024

/* Every field is eight bytes: the caller packs them one after another. */
typedef struct {
    const uint8_t *planes[MAX_BITS]; /* [heads, tokens, ceil(channels / 8)], most significant first */
    const uint16_t *low;             /* float16 [heads, tokens / group, channels] or [heads, tokens, channels / group]; NULL: centred */
    const void *span;                /* the same; where groups are centred, bytes: bits 7 to 14 of a float16 */
    int64_t heads, tokens, channels, bits, group;
    int64_t along_tokens;            /* whether a group is tokens of one channel */
    int64_t nested;                  /* whether a code stands for the middle of its cell */
    int64_t isa;
} KV;

enum { PRODUCTS, SUMS, STATES }; /* multiply states by queries, add them up by weights, or write them as they are */

typedef struct {
    const KV *kv;
    float *vectors;                  /* [heads, rows, width]: queries or sums, zeros beyond the channels; or states [heads, tokens, width] */
    float *weights;                  /* [heads, rows, stride]: the product with each token, or its weight */
    int64_t rows, width, stride;     /* no rows where states are written */
    int mode;
    int64_t next;                    /* the first head that no thread has taken */
} Attention;

#if defined(__GNUC__)
typedef float Floats __attribute__((vector_size(64)));
typedef uint8_t Bytes __attribute__((vector_size(16)));

/* A half as a float, but for infinities and what is no number, which groups do not have. */
INLINE float widened(uint16_t half)
{
    uint32_t bits = (uint32_t)(half & 0x8000) << 16 | (uint32_t)(half & 0x7fff) << 13;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value * 0x1p112f;
}

/* `bytes` of each plane as codes; the rest of LANES is zero. */
INLINE void codes_plain(int bits, const uint8_t *const planes[], int64_t bytes, uint8_t code[LANES])
{
    for (int64_t byte = 0; byte < LANES / 8; byte++)
        for (int d = 0; d < 8; d++) {
            int found = 0;
            for (int plane = 0; plane < bits; plane++)
                found = found << 1 | (byte < bytes ? planes[plane][byte] >> d & 1 : 0);
            code[8 * byte + d] = (uint8_t)found;
        }
}
#define NAME(function) function##_plain
#include "attention_body.h"
#undef NAME

#ifdef COMPRESS_X86
ISA_BEGINS("avx2,fma")
#include <immintrin.h>

INLINE void codes_avx2(int bits, const uint8_t *const planes[], int64_t bytes, uint8_t code[LANES])
{
    const __m256i bit = _mm256_set1_epi64x((int64_t)0x8040201008040201ull), one = _mm256_set1_epi8(1);
    const __m256i spread = _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3,
                                            3, 3, 3, 3, 3);
    for (int half = 0; half < 2; half++) {
        __m256i sum = _mm256_setzero_si256();
        for (int plane = 0; plane < bits; plane++) {
            uint32_t word = 0;
            if (bytes - 4 * half >= 4)
                memcpy(&word, planes[plane] + 4 * half, 4);
            else if (bytes > 4 * half)
                memcpy(&word, planes[plane] + 4 * half, (size_t)(bytes - 4 * half));
            __m256i each = _mm256_shuffle_epi8(_mm256_set1_epi32((int)word), spread);
            each = _mm256_and_si256(_mm256_cmpeq_epi8(_mm256_and_si256(each, bit), bit), one);
            sum = _mm256_or_si256(_mm256_add_epi8(sum, sum), each);
        }
        _mm256_storeu_si256((__m256i *)(code + 32 * half), sum);
    }
}
#define NAME(function) function##_avx2
#include "attention_body.h"
#undef NAME
ISA_ENDS
ISA_BEGINS(WIDE)

INLINE void codes_avx512(int bits, const uint8_t *const planes[], int64_t bytes, uint8_t code[LANES])
{
    __m512i sum = _mm512_setzero_si512();
    const __m512i one = _mm512_set1_epi8(1);
    for (int plane = 0; plane < bits; plane++) {
        uint64_t mask = 0;
        if (bytes == 8)
            memcpy(&mask, planes[plane], 8);
        else
            memcpy(&mask, planes[plane], (size_t)bytes);
        sum = _mm512_add_epi8(sum, sum);
        sum = _mm512_mask_add_epi8(sum, (__mmask64)mask, sum, one);
    }
    _mm512_storeu_si512(code, sum);
}
#define NAME(function) function##_avx512
#include "attention_body.h"
#undef NAME
ISA_ENDS
#endif

static void heads(void *data)
{
    Attention *job = data;
    int64_t head;
    while ((head = __atomic_fetch_add(&job->next, 1, __ATOMIC_RELAXED)) < job->kv->heads) {
#ifdef COMPRESS_X86
        if (job->kv->isa == AVX512)
            head_avx512(job, head);
        else if (job->kv->isa == AVX2)
            head_avx2(job, head);
        else
#endif
            head_plain(job, head);
    }
}

int compress_attention(const KV *kv, float *vectors, int64_t width, float *weights, int64_t stride, int64_t rows, int mode,
                       Team team, int threads)
{
    Attention job = {.kv = kv, .vectors = vectors, .weights = weights, .rows = rows, .width = width, .stride = stride, .mode = mode};
    if (kv->isa < 0 || kv->isa > compress_best_isa() || width > MAX_CHANNELS || width % LANES || width < kv->channels)
        return -1;
    if (team && threads > 1 && kv->heads > 1)
        team(heads, &job, (unsigned)(threads < kv->heads ? threads : kv->heads), 0);
    else
        heads(&job);
    return 0;
}
#else
int compress_attention(const KV *kv, float *vectors, int64_t width, float *weights, int64_t stride, int64_t rows, int mode,
                       Team team, int threads)
{
    (void)kv, (void)vectors, (void)width, (void)weights, (void)stride, (void)rows, (void)mode, (void)team, (void)threads;
    return -1;
}
#endif
