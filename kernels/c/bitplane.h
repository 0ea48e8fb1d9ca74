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
#define GROUP 64        /* columns of a row that may share a size; activations that share a scale in the int8 mode */
#define GROUPS (CHUNK / GROUP)
#define UNIT 255.0f     /* looked-up values are multiplied by their group's number in these parts */
#define MAX_BATCH 16    /* rows of activations in one pass over the weights */
#define MAX_BITS 8
#define ROWS_AT_ONCE 32 /* rows of weights that pass by one block of activations */

/* A few rows of the weights, from the start of a chunk on. */
typedef struct {
    const uint8_t *planes[MAX_BITS];
    const void *table; /* of the first row: float16 or float32, or bytes in the int8 mode */
    int64_t rows, stride;
    int64_t table_step; /* bytes from a row's table to the next one's; 0: all rows have one */
    int64_t bytes; /* of each plane; only the last stretch of a row may be no multiple of CHUNK_BYTES */
    int bits;
    int width; /* bytes of a table entry */
    const uint8_t *groups; /* of the first row: what the values of every GROUP columns are multiplied by; or NULL */
    int64_t group_step;    /* from a row's groups to the next one's */
    float excess;          /* with groups in the int8 mode: what is added to every table entry before */
} Block;

/* The activations that belong to it; those of batch row m begin `step` further on than those of row m - 1. */
typedef struct {
    const float *values;   /* exact mode: float32, in kernel order */
    const int8_t *codes;   /* int8 mode: value = scale * code, in kernel order */
    const float *scales;   /* one per GROUP codes */
    const float *sums;     /* int8 mode with groups: of every GROUP columns as rounded, zeros behind them to whole chunks */
    int64_t step;          /* a multiple of GROUP */
    int64_t sum_step;      /* of the sums of a row of activations: a multiple of GROUPS */
    int batch;             /* 1 to MAX_BATCH */
} Activations;

/* What looked-up values are multiplied by, beside their groups; either may be NULL. */
typedef struct {
    const float *factors; /* by row */
    const float *inputs;  /* by column */
    int width; /* of a result: 4 for float32, 2 for bfloat16 */
} Scaling;

typedef struct {
    /* order[i]: the column of a chunk whose activation the kernels want in place i; behind it, that of a unit of GROUP columns. */
    void (*exact_order)(int bits, uint16_t order[CHUNK + GROUP]);
    void (*int8_order)(int bits, uint16_t order[CHUNK + GROUP]);
    /* sum[row][m] += sum over the columns of table[code] * x[m], in float32. */
    void (*exact)(const Block *w, const Activations *x, float sum[][MAX_BATCH]);
    /* The same with values 0 to 255 and activations of 8 bits. */
    void (*int8)(const Block *w, const Activations *x, float sum[][MAX_BATCH]);
    /* The entries of one row (w->rows is 1), of 2 or 4 bytes, in the order of the columns. */
    void (*look_up)(const Block *w, int64_t columns, void *out);
    /* All rows, behind each other, multiplied and rounded once; NULL: the driver does it behind look_up. */
    void (*scaled)(const Block *w, int64_t columns, const Scaling *by, void *out);
    /* What the int8 kernels take off every table entry. */
    float int8_excess;
    /* So many columns behind the last whole chunk, or fewer, are taken in units of GROUP; more are a chunk. */
    int tail;
} Kernels;

extern const Kernels portable_kernels;
#if defined(__x86_64__) && defined(__GNUC__)
#define COMPRESS_X86 1
extern const Kernels avx2_kernels, avx512_kernels;

/* Functions between these two are compiled for an instruction set, whatever the file is compiled for. */
#define PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define ISA_BEGINS(features) PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define ISA_ENDS PRAGMA(clang attribute pop)
#define WIDE "avx512f,avx512bw,avx512vl,avx512dq,fma"
#else
#define ISA_BEGINS(features) PRAGMA(GCC push_options) PRAGMA(GCC target(features))
#define ISA_ENDS PRAGMA(GCC pop_options)
#define WIDE "avx512f,avx512bw,avx512vl,avx512dq,fma,prefer-vector-width=512"
#endif
#endif

#define SLOTS(bits) ((bits) <= 1 ? 1 : (bits) <= 2 ? 2 : (bits) <= 4 ? 4 : 8) /* bits that a column is given */

#if defined(__GNUC__)
#define INLINE static inline __attribute__((always_inline))
#define NOINLINE __attribute__((noinline))
#define PREFETCH(address) __builtin_prefetch((const void *)(address))
#else
#define INLINE static inline
#define NOINLINE
#define PREFETCH(address) ((void)(address))
#endif

/* Of one row of activations, a row of weights leaves the lanes of its sum, which add_up_rows() adds up for all rows at once.
 *
 * A product of its own for every width, with sizes of groups or without, and for one to four rows of activations or as many as there
 * are: functions apart, as compilers take more than twice as long over one that has them all. */
typedef void Multiply(const Block *w, const Activations *x, float sum[][MAX_BATCH]);
#define ROWS(function, bits, grouped, name, batch)                                                                            \
    static NOINLINE void function##_##bits##_##grouped##_##name(const Block *w, const Activations *x, float sum[][MAX_BATCH]) \
    {                                                                                                                         \
        Lanes lanes[ROWS_AT_ONCE], *each = lanes;                                                                             \
        for (int64_t row = 0; row < w->rows; row++)                                                                           \
            function(bits, grouped, batch, w, row, x, sum[row], each++);                                                      \
        if (batch == 1)                                                                                                       \
            add_up_rows(lanes, w->rows, sum);                                                                                 \
    }
#define BATCHES(function, bits, grouped)                                          \
    ROWS(function, bits, grouped, 1, 1) ROWS(function, bits, grouped, 2, 2)       \
    ROWS(function, bits, grouped, 3, 3) ROWS(function, bits, grouped, 4, 4)       \
    ROWS(function, bits, grouped, any, x->batch)
#define WIDTH(function, bits) BATCHES(function, bits, 0) BATCHES(function, bits, 1)
#define NAMES(function, bits, grouped)                                                \
    {function##_##bits##_##grouped##_1, function##_##bits##_##grouped##_2,            \
     function##_##bits##_##grouped##_3, function##_##bits##_##grouped##_4,            \
     function##_##bits##_##grouped##_any}
#define BOTH(function, bits) {NAMES(function, bits, 0), NAMES(function, bits, 1)}
#define PRODUCT(name, function)                                                                       \
    WIDTH(function, 1) WIDTH(function, 2) WIDTH(function, 3) WIDTH(function, 4)                       \
    WIDTH(function, 5) WIDTH(function, 6) WIDTH(function, 7) WIDTH(function, 8)                       \
    static void name(const Block *w, const Activations *x, float sum[][MAX_BATCH])                    \
    {                                                                                                 \
        static Multiply *const all[MAX_BITS][2][5] = {                                                \
            BOTH(function, 1), BOTH(function, 2), BOTH(function, 3), BOTH(function, 4),               \
            BOTH(function, 5), BOTH(function, 6), BOTH(function, 7), BOTH(function, 8)};              \
        all[w->bits - 1][w->groups != 0][x->batch > 4 ? 4 : x->batch - 1](w, x, sum);                 \
    }

/* What callers use. */

enum { PORTABLE = 0, AVX2 = 1, AVX512 = 2 };

/* How OpenMP runtimes start a team: GCC's entry point, which LLVM's and Intel's offer too. */
typedef void (*Team)(void (*work)(void *), void *data, unsigned threads, unsigned flags);

/* Every field is eight bytes: the caller packs them one after another. */
typedef struct {
    const uint8_t *planes[MAX_BITS];
    const void *table;         /* [rows, 2**bits]: values, or bytes in the int8 mode, or words to copy */
    const float *affine;       /* int8 mode: [rows, 2], value = byte * affine[0] + affine[1]; else NULL */
    const float *inputs;       /* [columns]: what activations are multiplied by first; or NULL */
    const float *factors;      /* [rows]: what sums are multiplied by; or NULL */
    const float *bias;         /* [rows]: what is added then; or NULL */
    const uint16_t *order;     /* what compress_order() writes, so that it is not computed again; or NULL */
    const uint8_t *groups;     /* [rows, columns / GROUP, rounded up]: what the values of GROUP columns are multiplied by; or NULL */
    int64_t stride, rows, columns, bits;
    int64_t isa;
    int64_t width;             /* bytes of a table entry: 2 (float16) or 4 (float32); 1 in the int8 mode */
    int64_t shared;            /* whether there is one row of table (and affine) for all rows */
    int64_t group_stride;      /* bytes from a row of groups to the next */
} Matrix;

int compress_abi(void);      /* changes with everything below, and with attention.c */
int compress_best_isa(void); /* the best this processor can run */

/* The order in which a matrix of these bits, mode and instruction set wants activations; 0, or -1 if this processor lacks the set. */
int compress_order(const Matrix *matrix, uint16_t order[CHUNK + GROUP]);
/* y[m, n] = sum over k of groups[n, k / GROUP] * value[n, code(n, k)] * x[m, k], in float32; x is [batch, columns], y [batch, rows]. In the int8 mode
 * activations are rounded to 8 bits, 64 columns at a time. `team` may be NULL: then the calling thread does it all. Returns 0,
 * or -1: this processor lacks `isa`, or there is no memory. */
int compress_product(const Matrix *matrix, const float *x, int batch, float *y, Team team, int threads);
/* out[i, k] = factors[n] * table[n, code(n, k)] * inputs[k], and * groups[n, k / GROUP] / UNIT, for the rows n = places[i], or first + i if `places` is NULL. Entries of 2
 * or 4 bytes are copied as they are if there is nothing to multiply by and `width` is theirs; else they are float32 and what is
 * written is float32 (`width` 4) or bfloat16 (2), rounded once. */
int compress_look_up(const Matrix *matrix, const int64_t *places, int64_t first, int64_t count, void *out, int64_t width,
                     Team team, int threads);

#endif
