/* The library's entry points: which kernels run here, activations brought into their order, rows shared out to threads. */
#include "bitplane.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define ROWS_AT_ONCE 16      /* rows of weights that pass by one block of activations */
#define BLOCK_BYTES 32768    /* such a block of the first row stays in or near the first-level cache */
#define ALIGN 64

typedef struct {
    const Matrix *matrix;
    const Kernels *kernels;
    Activations x;
    const float *totals;       /* int8 mode: [batch], the sum of each row's activations as rounded */
    float *y;                  /* [batch, rows] */
    const int64_t *places;     /* when codes are only looked up: of which rows, or NULL */
    void *out;                 /* then: [rows, columns] */
    int64_t rows;              /* to do */
    int64_t block;             /* columns of activations at a time */
    int64_t next;              /* the first row that no thread has taken */
} Job;

int compress_abi(void)
{
    return 2;
}

int compress_best_isa(void)
{
#ifdef COMPRESS_X86
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma"))
        return PORTABLE;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vbmi") &&
        __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("gfni"))
        return AVX512;
    return AVX2;
#else
    return PORTABLE;
#endif
}

static const Kernels *kernels_of(int64_t isa)
{
    if (isa < 0 || isa > compress_best_isa())
        return NULL;
#ifdef COMPRESS_X86
    if (isa == AVX512)
        return &avx512_kernels;
    if (isa == AVX2)
        return &avx2_kernels;
#endif
    return &portable_kernels;
}

static int64_t smaller(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

static int64_t padded(int64_t columns)
{
    return (columns + CHUNK - 1) / CHUNK * CHUNK;
}

static void *aligned(size_t bytes, void **block)
{
    *block = malloc(bytes + ALIGN);
    return *block ? (void *)(((uintptr_t)*block + ALIGN - 1) / ALIGN * ALIGN) : NULL;
}

/* The rows a thread takes next; 0 when there are none left. */
static int64_t take(Job *job, int64_t *first)
{
#if defined(__GNUC__)
    *first = __atomic_fetch_add(&job->next, ROWS_AT_ONCE, __ATOMIC_RELAXED);
#else
    *first = job->next, job->next += ROWS_AT_ONCE; /* threads are only started by runtimes that come with GCC's entry */
#endif
    return *first < job->rows ? smaller(ROWS_AT_ONCE, job->rows - *first) : 0;
}

static Block block_of(const Matrix *matrix, int64_t row, int64_t rows, int64_t column, int64_t columns)
{
    Block w = {.rows = rows, .stride = matrix->stride, .bits = (int)matrix->bits, .width = (int)matrix->width};
    for (int plane = 0; plane < w.bits; plane++)
        w.planes[plane] = matrix->planes[plane] + row * matrix->stride + column / 8;
    w.table = (const uint8_t *)matrix->table + (matrix->shared ? 0 : row * (matrix->width << matrix->bits));
    w.bytes = smaller((columns + 7) / 8, matrix->stride - column / 8);
    return w;
}

static void multiply(void *data)
{
    Job *job = data;
    const Matrix *matrix = job->matrix;
    int64_t first, rows, span = padded(matrix->columns);

    while ((rows = take(job, &first))) {
        float sum[ROWS_AT_ONCE][MAX_BATCH] = {{0}};
        int64_t together = matrix->shared ? 1 : rows; /* kernels take the table of one row behind that of another */
        for (int64_t column = 0; column < span; column += job->block) {
            Activations x = job->x;
            if (matrix->affine) {
                x.codes += column;
                x.scales += column / GROUP;
            } else
                x.values += column;
            for (int64_t i = 0; i < rows; i += together) {
                int64_t columns = smaller(job->block, matrix->columns - column);
                Block w = block_of(matrix, first + i, together, column, columns);
                (matrix->affine ? job->kernels->int8 : job->kernels->exact)(&w, &x, sum + i);
            }
        }
        for (int64_t i = 0; i < rows; i++)
            for (int m = 0; m < job->x.batch; m++) {
                const float *affine = matrix->affine ? matrix->affine + (matrix->shared ? 0 : 2 * (first + i)) : NULL;
                float y = sum[i][m];
                if (affine)
                    y = affine[0] * y + (affine[1] + affine[0] * job->kernels->int8_excess) * job->totals[m];
                job->y[m * matrix->rows + first + i] = y;
            }
    }
}

static void start(Job *job, void (*work)(void *), Team team, int threads)
{
    threads = (int)smaller(threads, (job->rows + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE);
    if (team && threads > 1)
        team(work, job, (unsigned)threads, 0);
    else
        work(job);
}

int compress_exact(const Matrix *matrix, const float *x, int batch, float *y, Team team, int threads)
{
    const Kernels *kernels = kernels_of(matrix->isa);
    int64_t span = padded(matrix->columns);
    uint16_t order[CHUNK];
    void *block;
    float *values = kernels ? aligned(sizeof(float) * (size_t)(batch * span), &block) : NULL;
    if (!values)
        return -1;
    kernels->exact_order((int)matrix->bits, order);
    for (int m = 0; m < batch; m++)
        for (int64_t start = 0; start < span; start += CHUNK) {
            const float *from = x + m * matrix->columns + start;
            float *to = values + m * span + start;
            int64_t here = smaller(CHUNK, matrix->columns - start);
            for (int i = 0; i < CHUNK; i++)
                to[i] = order[i] < here ? from[order[i]] : 0.0f;
        }
    Job job = {.matrix = matrix, .kernels = kernels, .rows = matrix->rows, .y = y};
    job.x = (Activations){.values = values, .step = span, .batch = batch};
    job.block = padded(BLOCK_BYTES / (int64_t)sizeof(float) / batch);
    start(&job, multiply, team, threads);
    free(block);
    return 0;
}

/* One group of activations to 8 bits; returns the scale, NaN if the group has a value that is not finite. */
static float round_group(const float *value, int8_t *code)
{
    float largest = 0;
    int finite = 1;
    for (int i = 0; i < GROUP; i++) {
        float size = fabsf(value[i]);
        finite &= size <= 3.402823466e38f;
        largest = size > largest ? size : largest;
    }
    float inverse = finite && largest >= 1e-36f ? 127.0f / largest : 0.0f;
    for (int i = 0; i < GROUP; i++) {
        float scaled = finite ? value[i] * inverse : 0.0f;
        code[i] = (int8_t)(scaled + (scaled < 0 ? -0.5f : 0.5f));
    }
    return finite ? (inverse > 0 ? largest / 127.0f : 0.0f) : NAN;
}

int compress_int8(const Matrix *matrix, const float *x, int batch, float *y, Team team, int threads)
{
    const Kernels *kernels = kernels_of(matrix->isa);
    int64_t span = padded(matrix->columns);
    uint16_t order[CHUNK];
    float totals[MAX_BATCH];
    void *block;
    size_t size = (size_t)(batch * span); /* of the codes, which come first: they must be aligned */
    int8_t *codes = kernels ? aligned(size + size / GROUP * sizeof(float), &block) : NULL;
    if (!codes)
        return -1;
    float *scale = (float *)(codes + size);
    kernels->int8_order((int)matrix->bits, order);
    for (int m = 0; m < batch; m++) {
        double total = 0;
        for (int64_t start = 0; start < span; start += GROUP) {
            const float *from = x + m * matrix->columns + start / CHUNK * CHUNK;
            int64_t here = matrix->columns - start / CHUNK * CHUNK, place = m * span + start;
            float group[GROUP];
            int32_t sum = 0;
            for (int i = 0; i < GROUP; i++) {
                int column = order[start % CHUNK + i];
                group[i] = column < here ? from[column] : 0.0f;
            }
            scale[place / GROUP] = round_group(group, codes + place);
            for (int i = 0; i < GROUP; i++)
                sum += codes[place + i];
            total += (double)scale[place / GROUP] * sum;
        }
        totals[m] = (float)total;
    }
    Activations activations = {.codes = codes, .scales = scale, .step = span, .batch = batch};
    Job job = {.matrix = matrix, .kernels = kernels, .rows = matrix->rows, .y = y, .x = activations, .totals = totals};
    job.block = padded(BLOCK_BYTES / batch);
    start(&job, multiply, team, threads);
    free(block);
    return 0;
}

static void copy(void *data)
{
    Job *job = data;
    const Matrix *matrix = job->matrix;
    int64_t first, rows;
    while ((rows = take(job, &first)))
        for (int64_t row = first; row < first + rows; row++) {
            Block w = block_of(matrix, job->places ? job->places[row] : row, 1, 0, matrix->columns);
            job->kernels->look_up(&w, matrix->columns, (uint8_t *)job->out + row * matrix->columns * matrix->width);
        }
}

int compress_look_up(const Matrix *matrix, const int64_t *places, int64_t count, void *out, Team team, int threads)
{
    const Kernels *kernels = kernels_of(matrix->isa);
    Job job = {.matrix = matrix, .kernels = kernels, .places = places, .out = out};
    job.rows = places ? count : matrix->rows;
    if (!kernels)
        return -1;
    start(&job, copy, team, threads);
    return 0;
}
