/* Every kernel against a plain double sum, each buffer ending where memory ends.
 *
 * Built plainly, buffers end at a page that may not be touched; built with AddressSanitizer, they are exact allocations
 * that it watches. Prints the number of products checked, or the first that is wrong.
 */
#define _GNU_SOURCE
#include "bitplane.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#if defined(__SANITIZE_ADDRESS__)
static void *at_the_end(size_t bytes) { return malloc(bytes); }
static void give_back(void *start, size_t bytes) { (void)bytes, free(start); }
#else
static size_t whole_pages(size_t bytes)
{
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    return (bytes + page - 1) / page * page;
}

static void *at_the_end(size_t bytes)
{
    size_t page = (size_t)sysconf(_SC_PAGESIZE), size = whole_pages(bytes);
    uint8_t *start = mmap(NULL, size + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (start == MAP_FAILED || mprotect(start + size, page, PROT_NONE))
        exit(2);
    return start + size - bytes;
}

static void give_back(void *start, size_t bytes)
{
    size_t page = (size_t)sysconf(_SC_PAGESIZE), size = whole_pages(bytes);
    munmap((uint8_t *)start + bytes - size, size + page);
}
#endif

#define MOST_COLUMNS 4500

static uint32_t seed = 1;

static uint32_t draw(void)
{
    seed = seed * 1664525u + 1013904223u;
    return seed >> 8;
}

static float normal(void)
{
    return (float)(draw() % 2001) / 1000.0f - 1.0f;
}

static int code_of(const Matrix *w, int64_t row, int64_t column)
{
    int code = 0;
    for (int plane = 0; plane < w->bits; plane++)
        code = 2 * code + (w->planes[plane][row * w->stride + column / 8] >> (column % 8) & 1);
    return code;
}

static double entry(const Matrix *w, int64_t row, int code)
{
    if (w->shared)
        row = 0;
    int64_t place = (row << w->bits) + code;
    if (w->affine)
        return (double)((const uint8_t *)w->table)[place] * w->affine[2 * row] + w->affine[2 * row + 1];
    return ((const float *)w->table)[place];
}

static double size_of(const Matrix *w, int64_t row, int64_t column)
{
    return w->groups ? w->groups[row * w->group_stride + column / GROUP] : 1;
}

static void check(const Matrix *w, const float *x, int batch, const float *y, const char *what)
{
    double largest = 0;
    for (int64_t i = 0; i < batch * w->columns; i++)
        largest = fmax(largest, fabs(x[i]));
    double values[MOST_COLUMNS];
    for (int64_t row = 0; row < w->rows; row++) {
        for (int64_t k = 0; k < w->columns; k++)
            values[k] = size_of(w, row, k) * entry(w, row, code_of(w, row, k));
        for (int m = 0; m < batch; m++) {
            double sum = 0, size = 0, weights = 0;
            for (int64_t k = 0; k < w->columns; k++) {
                double term = values[k] * x[m * w->columns + k];
                sum += term, size += fabs(term), weights += fabs(values[k]);
            }
            double bound = 1e-6 * size + (w->affine ? weights * largest / 127 * 0.501 + 1e-3 * largest : 0);
            if (!(fabs(y[m * w->rows + row] - sum) <= bound)) {
                printf("%s: isa %d, %d bits, %d x %d, batch %d: y[%d, %d] is %g, not %g\n", what, (int)w->isa,
                       (int)w->bits, (int)w->rows, (int)w->columns, batch, m, (int)row, y[m * w->rows + row], sum);
                exit(1);
            }
        }
    }
}

static int one(int isa, int bits, int64_t rows, int64_t columns, int batch)
{
    int64_t stride = (columns + 31) / 32 * 4, entries = rows << bits;
    Matrix w = {.stride = stride, .rows = rows, .columns = columns, .bits = bits, .isa = isa, .width = 4};
    size_t x_size = sizeof(float) * (size_t)(batch * columns), y_size = sizeof(float) * (size_t)(batch * rows);
    size_t table_size = sizeof(float) * (size_t)entries, out_size = sizeof(float) * (size_t)(rows * columns);
    float *x = at_the_end(x_size), *y = at_the_end(y_size), *table = at_the_end(table_size), *out = at_the_end(out_size);
    uint8_t *bytes = at_the_end((size_t)entries);
    float *affine = at_the_end(sizeof(float) * 2 * (size_t)rows);
    int64_t across = (columns + GROUP - 1) / GROUP;
    uint8_t *groups = at_the_end((size_t)(rows * across));
    for (int64_t i = 0; i < rows * across; i++)
        groups[i] = (uint8_t)(1 + draw() % 255);
    uint16_t *half = at_the_end(table_size / 2);
    for (int plane = 0; plane < bits; plane++) {
        uint8_t *bits_of = at_the_end((size_t)(rows * stride));
        for (int64_t i = 0; i < rows * stride; i++) /* set padding too: it must not count */
            bits_of[i] = (uint8_t)draw();
        w.planes[plane] = bits_of;
    }
    for (int64_t i = 0; i < batch * columns; i++)
        x[i] = normal();
    for (int64_t i = 0; i < entries; i++) {
        half[i] = (uint16_t)(0x3000 + draw() % 0x1000 + (draw() % 2 << 15));
        table[i] = normal(), bytes[i] = (uint8_t)(1 + draw() % 255);
    }
    for (int64_t i = 0; i < 2 * rows; i++)
        affine[i] = i % 2 ? normal() : 0.01f;

    w.table = table;
    if (compress_product(&w, x, batch, y, NULL, 1) || compress_look_up(&w, NULL, 0, rows, out, 4, NULL, 1))
        exit(3);
    check(&w, x, batch, y, "exact");
    for (int64_t i = 0; i < rows * columns; i++)
        if (out[i] != table[(i / columns << bits) + code_of(&w, i / columns, i % columns)])
            exit(4);
    uint16_t *brief = at_the_end(out_size / 2);
    w.inputs = x, w.factors = affine;
    if (compress_look_up(&w, NULL, 0, rows, out, 4, NULL, 1) || compress_look_up(&w, NULL, 0, rows, brief, 2, NULL, 1))
        exit(3);
    for (int64_t i = 0; i < rows * columns; i++) {
        float value = table[(i / columns << bits) + code_of(&w, i / columns, i % columns)] * affine[i / columns] * x[i % columns];
        uint32_t wide = (uint32_t)brief[i] << 16;
        float written;
        memcpy(&written, &wide, sizeof written);
        if (out[i] != value || fabsf(written - value) > fabsf(value) / 256)
            exit(5);
    }
    give_back(brief, out_size / 2);
    w.inputs = w.factors = NULL;
    w.table = half, w.width = 2; /* no reference here: the guards watch, Python compares */
    if (compress_product(&w, x, batch, y, NULL, 1) || compress_look_up(&w, NULL, 0, rows, out, 2, NULL, 1))
        exit(3);
    w.table = bytes, w.affine = affine, w.width = 1;
    if (compress_product(&w, x, batch, y, NULL, 1))
        exit(3);
    check(&w, x, batch, y, "int8");

    int64_t last = rows - 1; /* its table, which ends where memory ends, for all rows; and that row alone looked up */
    w.shared = 1, w.table = bytes + (last << bits), w.affine = affine + 2 * last;
    if (compress_product(&w, x, batch, y, NULL, 1))
        exit(3);
    check(&w, x, batch, y, "int8, shared");
    w.table = table + (last << bits), w.affine = NULL, w.width = 4;
    if (compress_product(&w, x, batch, y, NULL, 1) ||
        compress_look_up(&w, &last, 0, 1, out + last * columns, 4, NULL, 1))
        exit(3);
    check(&w, x, batch, y, "exact, shared");
    for (int64_t k = 0; k < columns; k++)
        if (out[last * columns + k] != (float)entry(&w, last, code_of(&w, last, k)))
            exit(4);

    w.groups = groups, w.group_stride = across;
    if (compress_product(&w, x, batch, y, NULL, 1))
        exit(3);
    check(&w, x, batch, y, "exact, groups");
    for (int width = 2; width <= 4; width += 2)
        if (compress_look_up(&w, &last, 0, 1, (char *)out + (rows * columns * 4 - columns * width), width, NULL, 1))
            exit(3);
    for (int64_t k = 0; k < columns; k++)
        if (out[last * columns + k] != (float)size_of(&w, last, k) / UNIT * (float)entry(&w, last, code_of(&w, last, k)))
            exit(4);
    w.table = bytes + (last << bits), w.affine = affine + 2 * last, w.width = 1;
    if (compress_product(&w, x, batch, y, NULL, 1))
        exit(3);
    check(&w, x, batch, y, "int8, groups");

    for (int plane = 0; plane < bits; plane++)
        give_back((void *)w.planes[plane], (size_t)(rows * stride));
    give_back(x, x_size), give_back(y, y_size), give_back(table, table_size), give_back(out, out_size);
    give_back(groups, (size_t)(rows * across));
    give_back(bytes, (size_t)entries), give_back(affine, sizeof(float) * 2 * (size_t)rows), give_back(half, table_size / 2);
    return batch * (int)rows;
}

int main(void)
{
    static const int columns[] = {1, 31, 32, 33, 250, 256, 257, 500, 512, 513, 576, 700, 1024, MOST_COLUMNS};
    static const int batches[] = {1, 2, 7, 16};
    int products = 0;
    for (int isa = 0; isa <= compress_best_isa(); isa++)
        for (int bits = 1; bits <= MAX_BITS; bits++)
            for (size_t i = 0; i < sizeof columns / sizeof *columns; i++)
                for (size_t j = 0; j < sizeof batches / sizeof *batches; j++)
                    products += one(isa, bits, 1 + (int)(i + j) % 3 * 9, columns[i], batches[j]);
    printf("%d\n", products);
    return 0;
}
