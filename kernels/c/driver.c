/* The library's entry points: which kernels run here, activations brought into their order, rows shared out to threads. */
#include "small.h"

#include <stdlib.h>
#include <string.h>

#define BLOCK 4096           /* columns of activations at a time: the same for any number of rows, so that sums are the same */

int compress_abi(void)
{
    return 8;
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

const Kernels *kernels_of(int64_t isa)
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

int64_t smaller(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

int64_t taken(int64_t *next)
{
#if defined(__GNUC__)
    return __atomic_fetch_add(next, 1, __ATOMIC_RELAXED);
#else
    return (*next)++; /* threads are only started by runtimes that come with GCC's entry */
#endif
}

void *aligned(size_t bytes, void **block)
{
    *block = malloc(bytes + ALIGN);
    return *block ? (void *)(((uintptr_t)*block + ALIGN - 1) / ALIGN * ALIGN) : NULL;
}

static int64_t rounded_up(int64_t count, int64_t unit)
{
    return (count + unit - 1) / unit * unit;
}

/* The columns that kernels are given: whole chunks, then, where they can, units of GROUP. */
static int64_t padded(const Kernels *kernels, int64_t columns)
{
    int64_t behind = columns % CHUNK;
    return behind > kernels->tail ? rounded_up(columns, CHUNK) : columns - behind + rounded_up(behind, GROUP);
}

static Block block_of(const Matrix *matrix, int64_t row, int64_t rows, int64_t column, int64_t columns)
{
    Block w; /* clearing what is set anyway would take as long as a row */
    w.rows = rows, w.stride = matrix->stride, w.bits = (int)matrix->bits, w.width = (int)matrix->width, w.excess = 0;
    for (int plane = 0; plane < w.bits; plane++)
        w.planes[plane] = matrix->planes[plane] + row * matrix->stride + column / 8;
    w.table_step = matrix->shared ? 0 : matrix->width << matrix->bits;
    w.table = (const uint8_t *)matrix->table + row * w.table_step;
    w.bytes = smaller((columns + 7) / 8, matrix->stride - column / 8);
    w.group_step = matrix->group_stride;
    w.groups = matrix->groups ? matrix->groups + row * w.group_step + column / GROUP : NULL;
    return w;
}

static const float *affine_of(const Matrix *matrix, int64_t row)
{
    return matrix->affine + (matrix->shared ? 0 : 2 * row);
}

/* A few rows of a product. */
static void multiply(const Product *product, int64_t first, int64_t rows)
{
    const Matrix *matrix = product->matrix;
    float sum[ROWS_AT_ONCE][MAX_BATCH];
    int64_t together = matrix->affine && matrix->groups && !matrix->shared ? 1 : rows; /* whose excess is the same */
    for (int64_t i = 0; i < rows; i++)
        for (int m = 0; m < product->x.batch; m++)
            sum[i][m] = 0;
    for (int64_t column = 0; column < matrix->columns; column += BLOCK) {
        int64_t columns = smaller(BLOCK, matrix->columns - column);
        Activations x = product->x;
        if (matrix->affine) {
            x.codes += column;
            x.scales += column / GROUP;
            x.sums += column / GROUP;
        } else
            x.values += column;
        for (int64_t i = 0; i < rows; i += together) {
            Block w = block_of(matrix, first + i, together, column, columns);
            if (matrix->affine && matrix->groups) {
                const float *affine = affine_of(matrix, first + i);
                w.excess = affine[1] / affine[0] + product->kernels->int8_excess;
            }
            (matrix->affine ? product->kernels->int8 : product->kernels->exact)(&w, &x, sum + i);
        }
    }
    const float *factors = matrix->factors, *bias = matrix->bias;
    const float excess = product->kernels->int8_excess;
    const int add = product->add;
    for (int m = 0; m < product->x.batch; m++) {
        float *to = product->y + m * product->step + first;
        for (int64_t i = 0; matrix->affine && i < rows; i++) {
            const float *affine = affine_of(matrix, first + i);
            sum[i][m] *= affine[0];
            if (!matrix->groups) /* else the kernels have added it */
                sum[i][m] += (affine[1] + affine[0] * excess) * product->totals[m];
        }
        for (int64_t i = 0; i < rows; i++) {
            float y = (factors ? factors[first + i] * sum[i][m] : sum[i][m]) + (bias ? bias[first + i] : 0);
            to[i] = add ? to[i] + y : y;
        }
    }
}

static int64_t pieces(int64_t rows)
{
    return (rows + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE;
}

void work_off(Queue *queue)
{
    for (;;) {
        const Product *product = queue->products, *end = product + queue->count;
        int64_t piece = taken(&queue->next);
        while (product < end && piece >= pieces(product->matrix->rows))
            piece -= pieces(product++->matrix->rows);
        if (product == end)
            return;
        int64_t first = piece * ROWS_AT_ONCE;
        multiply(product, first, smaller(ROWS_AT_ONCE, product->matrix->rows - first));
    }
}

static void work(void *queue)
{
    work_off(queue);
}

size_t arranged_bytes(const Matrix *matrix, int batch)
{
    size_t row = (size_t)rounded_up(matrix->columns, CHUNK), values = row * (size_t)batch;
    size_t bytes = matrix->affine ? values + 2 * values / GROUP * sizeof(float) + MAX_BATCH * sizeof(float) : values * sizeof(float);
    return (bytes + ALIGN - 1) / ALIGN * ALIGN + row * sizeof(float); /* and one row that is filled up with zeros */
}

int compress_order(const Matrix *matrix, uint16_t order[CHUNK + GROUP])
{
    const Kernels *kernels = kernels_of(matrix->isa);
    if (kernels)
        (matrix->affine ? kernels->int8_order : kernels->exact_order)((int)matrix->bits, order);
    return kernels ? 0 : -1;
}

/* Add the activations of a group in the order of the kernels, as rounded, to the sums of the groups of columns they are of. Eight
 * neighbours in that order, of any kernels, are of one such group. */
static void add_to_columns(const int8_t *code, float scale, const uint16_t *order, float *sums)
{
    for (int i = 0; i < GROUP; i += 8) {
        int32_t sum = 0;
        for (int j = 0; j < 8; j++)
            sum += code[i + j];
        sums[order[i] / GROUP] += scale * (float)sum;
    }
}

Product arrange(const Matrix *matrix, const float *x, int64_t step, int batch, void *room)
{
    const Kernels *kernels = kernels_of(matrix->isa);
    int64_t span = padded(kernels, matrix->columns);
    uint16_t own[CHUNK + GROUP];
    const uint16_t *order = matrix->order ? matrix->order : own;
    const Small *small = small_of(matrix->isa);
    float *values = room, *scales = (float *)((int8_t *)room + batch * span), *totals = scales + batch * span / GROUP;
    float *sums = totals + MAX_BATCH;
    int64_t sum_step = rounded_up(matrix->columns, CHUNK) / GROUP;
    float *row = (float *)((char *)room + arranged_bytes(matrix, batch)) - rounded_up(matrix->columns, CHUNK);
    if (!matrix->order)
        compress_order(matrix, own);
    memset(row, 0, sizeof(float) * (size_t)rounded_up(matrix->columns, CHUNK));
    if (matrix->affine && matrix->groups)
        memset(sums, 0, sizeof(float) * (size_t)(batch * sum_step));
    for (int m = 0; m < batch; m++) {
        double total = 0;
        for (int64_t k = 0; k < matrix->columns; k++)
            row[k] = matrix->inputs ? x[m * step + k] * matrix->inputs[k] : x[m * step + k];
        for (int64_t start = 0; start < span; start += GROUP) {
            int64_t chunk = start / CHUNK * CHUNK, place = m * span + start;
            int whole = chunk + CHUNK <= span;
            const uint16_t *group = order + (whole ? start - chunk : CHUNK);
            const float *from = row + (whole ? chunk : start);
            int32_t sum;
            if (!matrix->affine) {
                small->ordered(from, group, values + place);
                continue;
            }
            scales[place / GROUP] = small->rounded(from, group, (int8_t *)room + place, &sum);
            total += (double)scales[place / GROUP] * sum;
            if (matrix->groups)
                add_to_columns((int8_t *)room + place, scales[place / GROUP], group, sums + m * sum_step + (whole ? chunk : start) / GROUP);
        }
        if (matrix->affine)
            totals[m] = (float)total;
    }
    Activations arranged = {.values = values, .codes = room, .scales = scales, .sums = sums, .step = span, .batch = batch};
    arranged.sum_step = sum_step;
    return (Product){.matrix = matrix, .kernels = kernels, .x = arranged, .totals = totals};
}

int compress_product(const Matrix *matrix, const float *x, int batch, float *y, Team team, int threads)
{
    void *block;
    void *room = kernels_of(matrix->isa) ? aligned(arranged_bytes(matrix, batch), &block) : NULL;
    if (!room)
        return -1;
    Product one = arrange(matrix, x, matrix->columns, batch, room);
    one.y = y, one.step = matrix->rows;
    Queue queue = {.products = &one, .count = 1};
    threads = (int)smaller(threads, pieces(matrix->rows));
    if (team && threads > 1)
        team(work, &queue, (unsigned)threads, 0);
    else
        work_off(&queue);
    free(block);
    return 0;
}

/* Rows that are looked up, a few at a time. */
typedef struct {
    const Matrix *matrix;
    const Kernels *kernels;
    const int64_t *places; /* which rows, or NULL for those from `first` on */
    uint8_t *out;          /* [rows, columns] */
    int64_t first, rows, next, width;
} LookUp;

/* Some rows behind each other, where the kernels multiply and round themselves. */
static void scaled_rows(const LookUp *job, int64_t row, int64_t rows, uint8_t *out)
{
    const Matrix *matrix = job->matrix;
    Block w = block_of(matrix, row, rows, 0, matrix->columns);
    Scaling by = {.factors = matrix->factors ? matrix->factors + row : NULL, .inputs = matrix->inputs, .width = (int)job->width};
    job->kernels->scaled(&w, matrix->columns, &by, out);
}

/* One row, multiplied by what the matrix has to multiply it by and rounded once. */
static void scaled_row(const LookUp *job, int64_t row, uint8_t *out)
{
    const Matrix *matrix = job->matrix;
    const float factor = matrix->factors ? matrix->factors[row] : 1.0f;
    float values[BLOCK];
    for (int64_t column = 0; column < matrix->columns; column += BLOCK) {
        int64_t columns = smaller(BLOCK, matrix->columns - column);
        const float *inputs = matrix->inputs ? matrix->inputs + column : NULL;
        Block w = block_of(matrix, row, 1, column, columns);
        job->kernels->look_up(&w, columns, values);
        int64_t unit = matrix->groups ? GROUP : columns;
        for (int64_t at = 0; at < columns; at += unit) {
            float size = matrix->groups ? w.groups[at / GROUP] / UNIT : 1.0f;
            small_of(matrix->isa)->scaled(values + at, factor * size, inputs ? inputs + at : NULL, smaller(unit, columns - at),
                                          out + (column + at) * job->width, job->width);
        }
    }
}

static void copy(void *data)
{
    LookUp *job = data;
    const Matrix *matrix = job->matrix;
    int plain = job->width == matrix->width && !matrix->inputs && !matrix->factors && !matrix->groups;
    int64_t piece;
    while ((piece = taken(&job->next)) < pieces(job->rows)) {
        int64_t start = piece * ROWS_AT_ONCE, end = smaller(start + ROWS_AT_ONCE, job->rows), bytes = matrix->columns * job->width;
        int together = !plain && job->kernels->scaled && !job->places;
        if (together)
            scaled_rows(job, job->first + start, end - start, job->out + start * bytes);
        for (int64_t i = start; !together && i < end; i++) {
            int64_t row = job->places ? job->places[i] : job->first + i;
            uint8_t *out = job->out + i * bytes;
            if (plain) {
                Block w = block_of(matrix, row, 1, 0, matrix->columns);
                job->kernels->look_up(&w, matrix->columns, out);
            } else if (job->kernels->scaled)
                scaled_rows(job, row, 1, out);
            else
                scaled_row(job, row, out);
        }
    }
}

int compress_look_up(const Matrix *matrix, const int64_t *places, int64_t first, int64_t count, void *out, int64_t width,
                     Team team, int threads)
{
    LookUp job = {.matrix = matrix, .kernels = kernels_of(matrix->isa), .places = places, .out = out, .width = width};
    job.first = first, job.rows = count;
    if (!job.kernels)
        return -1;
    threads = (int)smaller(threads, pieces(job.rows));
    if (team && threads > 1)
        team(copy, &job, (unsigned)threads, 0);
    else
        copy(&job);
    return 0;
}
