/* One block of a Llama for a few tokens: norms, products, rotation, attention to the cache, activation, in one call.
 *
 * One team of threads does it all. Where all of them have to wait for each other, the last to arrive does what is too little to
 * share (a norm, bringing activations into order) before it lets the others go on.
 */
#define _POSIX_C_SOURCE 200809L
#include "small.h"

#include <math.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>

#if defined(__GNUC__)
INLINE uint16_t to_bfloat16(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if (value != value)
        return 0x7fc0;
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16); /* to the nearest, ties to even */
}

/* A team has as many threads as there are cores, if nothing else runs; if something does, let it run. */
INLINE void wait_a_little(int64_t tries)
{
#ifdef COMPRESS_X86
    __builtin_ia32_pause();
#endif
    if (tries > 1000)
        sched_yield();
}

#define MOST 3 /* products of one input */

/* Where a step is, for all threads. */
typedef struct {
    const Layer *layer;
    const Step *step;
    const Small *small;
    int (*team_size)(void);
    float *normed, *query, *key, *value, *mixed, *gate, *up, *scores; /* [rows, ...] each */
    void *room;                /* of arranged activations */
    size_t room_bytes;         /* for each of MOST */
    Product products[MOST];
    Queue queue;
    int64_t rows, heads;
    int64_t arrived, round;    /* at the place where threads wait for each other */
} Work;

/* Take products of one input up as what threads work off next. */
static void enqueue(Work *work, const Matrix *const matrices[], int count, const float *x, int64_t step)
{
    for (int i = 0; i < count; i++) {
        const Matrix *one = matrices[i], *before = i ? matrices[i - 1] : NULL;
        if (before && one->bits == before->bits && one->inputs == before->inputs && !one->affine == !before->affine &&
            !one->groups == !before->groups) {
            work->products[i] = work->products[i - 1]; /* the same activations in the same order */
            work->products[i].matrix = one;
        } else
            work->products[i] = arrange(one, x, step, (int)work->rows, (char *)work->room + (size_t)i * work->room_bytes);
        work->products[i].add = 0;
    }
    work->queue = (Queue){.products = work->products, .count = count};
}

static void put(Work *work, int place, float *y, int add)
{
    work->products[place].y = y;
    work->products[place].step = work->products[place].matrix->rows;
    work->products[place].add = add;
}

static void norms(Work *work, const float *weight, const float *x, int64_t width, float *y, int64_t rows)
{
    for (int64_t m = 0; m < rows; m++)
        work->small->norm(x + m * width, weight, y + m * width, width, (float)work->layer->epsilon);
}

static void start_attention(Work *work)
{
    const Layer *layer = work->layer;
    norms(work, layer->norm, work->step->x, layer->hidden, work->normed, work->rows);
    const Matrix *const matrices[] = {layer->query, layer->key, layer->value};
    enqueue(work, matrices, 3, work->normed, layer->hidden);
    put(work, 0, work->query, 0), put(work, 1, work->key, 0), put(work, 2, work->value, 0);
}

/* Write a token's keys or values of one head into the cache. */
static void store(const Step *step, void *cache, int64_t place, const float *x, int64_t channels)
{
    if (step->width == 4)
        memcpy((float *)cache + place, x, sizeof(float) * (size_t)channels);
    else
        for (int64_t d = 0; d < channels; d++)
            ((uint16_t *)cache)[place + d] = to_bfloat16(x[d]);
}

static void turn_and_store(Work *work)
{
    const Layer *layer = work->layer;
    const Step *step = work->step;
    int64_t channels = layer->channels;
    if (layer->query_norm)
        norms(work, layer->query_norm, work->query, channels, work->query, work->rows * layer->heads);
    if (layer->key_norm)
        norms(work, layer->key_norm, work->key, channels, work->key, work->rows * layer->key_heads);
    for (int64_t m = 0; m < work->rows; m++) {
        int64_t batch = m / step->length, token = m % step->length;
        const float *cosine = step->cosine + (batch * step->turns + token) * channels;
        const float *sine = step->sine + (batch * step->turns + token) * channels;
        for (int64_t head = 0; head < layer->heads; head++)
            work->small->turn(work->query + (m * layer->heads + head) * channels, cosine, sine, channels);
        for (int64_t head = 0; head < layer->key_heads; head++) {
            float *key = work->key + (m * layer->key_heads + head) * channels;
            int64_t place = batch * step->batch_stride + head * step->head_stride + (step->past + token) * channels;
            work->small->turn(key, cosine, sine, channels);
            store(step, step->keys, place, key, channels);
            store(step, step->values, place, work->value + (m * layer->key_heads + head) * channels, channels);
        }
    }
    work->heads = 0;
}

static void attend(Work *work)
{
    const Layer *layer = work->layer;
    const Step *step = work->step;
    int64_t unit, units = work->rows / step->length * layer->key_heads;
    int64_t each = (step->past + step->length + 15) / 16 * 16 * (layer->heads / layer->key_heads);
    while ((unit = taken(&work->heads)) < units)
        work->small->attend(step, unit / layer->key_heads, unit % layer->key_heads, work->query,
                            work->scores + unit * each, work->mixed);
}

static void end_attention(Work *work)
{
    enqueue(work, &work->layer->out, 1, work->mixed, work->layer->heads * work->layer->channels);
    put(work, 0, work->step->x, 1);
}

static void start_mlp(Work *work)
{
    const Layer *layer = work->layer;
    norms(work, layer->mlp_norm, work->step->x, layer->hidden, work->normed, work->rows);
    const Matrix *const matrices[] = {layer->gate, layer->up};
    enqueue(work, matrices, 2, work->normed, layer->hidden);
    put(work, 0, work->gate, 0), put(work, 1, work->up, 0);
}

static void end_mlp(Work *work)
{
    int64_t inner = work->layer->gate->rows;
    work->small->gated(work->gate, work->up, work->rows * inner, work->layer->activation);
    enqueue(work, &work->layer->down, 1, work->gate, inner);
    put(work, 0, work->step->x, 1);
}

/* Wait for all threads of the team; the last to arrive does `last` first. */
static void meet(Work *work, void (*last)(Work *))
{
    int64_t size = work->team_size ? work->team_size() : 1;
    int64_t round = __atomic_load_n(&work->round, __ATOMIC_ACQUIRE);
    if (__atomic_add_fetch(&work->arrived, 1, __ATOMIC_ACQ_REL) == size) {
        last(work);
        __atomic_store_n(&work->arrived, 0, __ATOMIC_RELAXED);
        __atomic_store_n(&work->round, round + 1, __ATOMIC_RELEASE);
        return;
    }
    for (int64_t tries = 0; __atomic_load_n(&work->round, __ATOMIC_ACQUIRE) == round; tries++)
        wait_a_little(tries);
}

static void all_of_it(void *data)
{
    Work *work = data;
    meet(work, start_attention);
    work_off(&work->queue);
    meet(work, turn_and_store);
    attend(work);
    meet(work, end_attention);
    work_off(&work->queue);
    meet(work, start_mlp);
    work_off(&work->queue);
    meet(work, end_mlp);
    work_off(&work->queue);
}

static size_t largest(const Layer *layer, int rows)
{
    const Matrix *const all[] = {layer->query, layer->key, layer->value, layer->out, layer->gate, layer->up, layer->down};
    size_t most = 0;
    for (int i = 0; i < 7; i++)
        if (arranged_bytes(all[i], rows) > most)
            most = arranged_bytes(all[i], rows);
    return most;
}

static int one_block(const Step *step, Team team, int (*team_size)(void), int threads)
{
    const Layer *layer = step->layer;
    int64_t rows = step->batch * step->length, tokens = step->past + step->length;
    int64_t queries = layer->heads * layer->channels, keys = layer->key_heads * layer->channels;
    int64_t sizes[] = {layer->hidden, queries, keys, keys, queries, layer->gate->rows, layer->gate->rows, layer->heads * (tokens + 15) / 16 * 16};
    Work work = {.layer = layer, .step = step, .small = small_of(layer->query->isa), .rows = rows};
    float **parts[] = {&work.normed, &work.query, &work.key, &work.value, &work.mixed, &work.gate, &work.up, &work.scores};
    if (rows < 1 || rows > MAX_BATCH || !kernels_of(layer->query->isa))
        return -1;
    size_t count = 0;
    void *block;
    for (int i = 0; i < 8; i++)
        count += (size_t)((sizes[i] + 15) / 16 * 16 * rows);
    work.room_bytes = largest(layer, (int)rows);
    work.room = aligned(MOST * work.room_bytes + count * sizeof(float), &block);
    if (!work.room)
        return -1;
    float *at = (float *)((char *)work.room + MOST * work.room_bytes);
    for (int i = 0; i < 8; i++)
        *parts[i] = at, at += (sizes[i] + 15) / 16 * 16 * rows;
    work.team_size = team && threads > 1 ? team_size : NULL;
    if (work.team_size)
        team(all_of_it, &work, (unsigned)threads, 0);
    else
        all_of_it(&work);
    free(block);
    return 0;
}

int compress_steps(const Step *steps, int64_t count, Team team, int (*team_size)(void), int threads)
{
    for (int64_t i = 0; i < count; i++)
        if (one_block(steps + i, team, team_size, threads))
            return -1;
    return 0;
}
#else
int compress_steps(const Step *steps, int64_t count, Team team, int (*team_size)(void), int threads)
{
    (void)steps, (void)count, (void)team, (void)team_size, (void)threads;
    return -1;
}
#endif
