/* Multiplication by weights that are bit planes and one table of values per row: shared declarations.
 *
 * A matrix of N rows and K columns is `bits` planes, most significant first; a row of a plane is `stride` bytes, and
 * column k is bit k % 8 of its byte k / 8 (quant/FORMAT.md). The planes are read as they are stored, a cache line (512
 * columns, a CHUNK) of each at a time: nothing is packed again, so any number of leading planes is a narrower matrix.
 *
 * Every instruction set brings the columns of a chunk out in an order of its own; the driver brings the activations
 * into that order once per call, filled up with zeros to whole chunks, so what a kernel makes of the bits
 * behind column K does not count.
 */
#ifndef COMPRESS_BITPLANE_H
#define COMPRESS_BITPLANE_H

#include <stdint.h>

#define CHUNK 512       /* columns */
#define CHUNK_BYTES 64  /* of one plane */
#define GROUP 64        /* activations that share a scale in the int8 mode */
#define GROUPS (CHUNK / GROUP)
#define MAX_BATCH 16    /* rows of activations in one pass over the weights */
#define MAX_BITS 8

/* A stretch of one row of the weights, from the start of a chunk. */
typedef struct {
    const uint8_t *planes[MAX_BITS];
    int bits;
    int64_t bytes;  /* of each plane; only the row's last stretch may be no multiple of CHUNK_BYTES */
    int64_t ahead;  /* bytes from here to what will be read soon */
} Stretch;

/* The activations that belong to it; those of batch row m begin `step` further on than those of row m - 1. */
typedef struct {
    const float *values;   /* exact mode: float32, in kernel order */
    const int8_t *codes;   /* int8 mode: value = scale * code, in kernel order */
    const float *scales;   /* one per GROUP codes */
    int64_t step;          /* a multiple of CHUNK */
    int batch;             /* 1 to MAX_BATCH */
} Activations;

typedef struct {
    /* order[i]: the column of a chunk whose activation the kernels want in place i. */
    void (*exact_order)(int bits, uint16_t order[CHUNK]);
    void (*int8_order)(int bits, uint16_t order[CHUNK]);
    /* sum[m] = sum over the columns of table[code] * x[m]; table has 2**bits values, at least 16 to read. */
    void (*exact)(const Stretch *w, const float *table, const Activations *x, float *sum);
    /* The same with values 0 to 255 and activations of 8 bits. */
    void (*int8)(const Stretch *w, const uint8_t *table, const Activations *x, float *sum);
    /* Codes of one chunk in the order of the columns; `bytes` (at most CHUNK_BYTES) may be read of each plane. */
    void (*codes)(const uint8_t *const planes[], int bits, int64_t bytes, uint8_t codes[CHUNK]);
    /* count values of float16 to float32 */
    void (*widen)(const uint16_t *half, int count, float *single);
} Kernels;

extern const Kernels portable_kernels;
#if defined(__x86_64__) && defined(__GNUC__)
#define COMPRESS_X86 1
extern const Kernels avx2_kernels, avx512_kernels;
#endif

#if defined(__GNUC__)
#define INLINE static inline __attribute__((always_inline))
#define PREFETCH(address) __builtin_prefetch((const void *)(address))
#else
#define INLINE static inline
#define PREFETCH(address) ((void)(address))
#endif

#endif
