/* Products by packed matrices, shared out to a team of threads: what driver.c has for the other files. */
#ifndef COMPRESS_DRIVER_H
#define COMPRESS_DRIVER_H

#include "bitplane.h"

#include <stddef.h>

#define ALIGN 64

/* One product: y[m, n] = or += factor[n] * sum over k of value[n, code(n, k)] * x[m, k] + bias[n]. */
typedef struct {
    const Matrix *matrix;
    const Kernels *kernels;
    Activations x;
    const float *totals;       /* int8 mode: [batch], the sum of each row's activations as rounded */
    float *y;
    int64_t step;              /* from a row of y to the next */
    int add;                   /* to what y holds */
} Product;

/* Products that a team works off a few rows at a time. */
typedef struct {
    const Product *products;
    int count;
    int64_t next;              /* the first piece that no thread has taken */
} Queue;

const Kernels *kernels_of(int64_t isa); /* NULL if this processor cannot run them */
int64_t smaller(int64_t a, int64_t b);
int64_t taken(int64_t *next);           /* the number of the next piece of work, of threads that share a counter */
void *aligned(size_t bytes, void **block);

/* Bring activations, whose rows begin `step` apart, into the order and type that a matrix is multiplied in. `room` is aligned
 * memory of arranged_bytes(), which has to last as long as the product; y, its step and `add` are the caller's to set. */
size_t arranged_bytes(const Matrix *matrix, int batch);
Product arrange(const Matrix *matrix, const float *x, int64_t step, int batch, void *room);
void work_off(Queue *queue);

#endif
