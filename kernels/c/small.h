/* The small work beside the products: what small.c has for the other files. */
#ifndef COMPRESS_SMALL_H
#define COMPRESS_SMALL_H

#include "step.h"

/* What a processor does it by. */
typedef struct {
    /* Activations of GROUP columns in the order of the kernels, from a row that is filled up with zeros. */
    void (*ordered)(const float *x, const uint16_t *order, float *y);
    /* The same rounded to 8 bits; returns the scale. */
    float (*rounded)(const float *x, const uint16_t *order, int8_t *code, int32_t *sum);
    /* x * factor * inputs, as float32 (`width` 4) or bfloat16 (2); `inputs` may be NULL. */
    void (*scaled)(const float *x, float factor, const float *inputs, int64_t count, void *y, int64_t width);
    void (*norm)(const float *x, const float *weight, float *y, int64_t count, float epsilon);
    void (*turn)(float *x, const float *cosine, const float *sine, int64_t channels);
    void (*gated)(float *gate, const float *up, int64_t count, int64_t activation);
    void (*attend)(const Step *step, int64_t batch, int64_t head, const float *query, float *scores, float *out);
} Small;

const Small *small_of(int64_t isa);

#endif
