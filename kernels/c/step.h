/* What compress_steps() takes. Every field is eight bytes: the caller packs them one after another. */
#ifndef COMPRESS_STEP_H
#define COMPRESS_STEP_H

#include "driver.h"

enum { SILU = 0, GELU_TANH = 1 };

/* A block of N hidden values. */
typedef struct {
    const Matrix *query, *key, *value, *out, *gate, *up, *down;
    const float *norm, *mlp_norm;        /* [hidden] */
    const float *query_norm, *key_norm;  /* [channels], for every head, or NULL */
    int64_t hidden, heads, key_heads, channels, activation;
    double epsilon, scale;
} Layer;

/* `batch` sequences of `length` tokens each, behind `past` that their caches hold. */
typedef struct {
    const Layer *layer;
    float *x;                            /* [batch, length, hidden], replaced by what the block makes of it */
    const float *cosine, *sine;          /* [1 or batch, length, channels] */
    void *keys, *values;                 /* [batch, key_heads, room, channels], float32 or bfloat16, with room for the tokens */
    const void *mask;                    /* [.., length, past + length], bool (visible) or float32 (added); or NULL: all before it */
    int64_t batch, length, past;
    int64_t turns;                       /* rows of cosine from a sequence to the next; 0 if there is one set for all */
    int64_t batch_stride, head_stride;   /* of keys and values, in values */
    int64_t width;                       /* bytes of one of them */
    int64_t mask_width;                  /* bytes of an entry: 1 or 4 */
    int64_t mask_batch, mask_row;        /* strides, in entries */
} Step;

/* Several blocks one after the other. 0, or -1: no memory, kernels that this processor cannot run, or more than MAX_BATCH tokens. `team_size` tells a thread how many
 * there are in its team. */
int compress_steps(const Step *steps, int64_t count, Team team, int (*team_size)(void), int threads);

#endif
