/* kernels.c: the forward pass of GPT-2 in C, at the speed of the memory, the same bits everywhere.
 *
 * Goals      One inner loop, fed with weights in the order of the file. The same logits, bit for
 *            bit, on every instruction set, with any number of threads, however a prompt is cut.
 * Non-goals  Training, other number formats, other architectures, a BLAS.
 *
 * The rule behind the equal bits: vector lanes run over outputs, so every output is one chain of
 * fused multiply-adds over its inputs, in order. No width, tile, thread or chunk can change it.
 * Where numbers are summed across lanes (layer norm, softmax) it is in 16 lanes, lane = index
 * modulo 16, joined by one fixed tree; exp and erfc are polynomials of our own.
 *
 * build.py compiles this file once for each instruction set, -DTG_ISA=avx512|avx2|neon|portable,
 * which gives one table of operations, and once without for the rest: which table, threads, the
 * forward pass, the choice of a token; -DTG_STANDALONE adds a command. In C, these eight do it all:
 * tg_model_new, tg_session_new, tg_forward, tg_logits, tg_log_probability, tg_choose, and the two
 * that free. Nothing here prints, exits, or keeps a pointer to an argument but to the weights,
 * which must outlive the model.
 *
 * SPDX-License-Identifier: MIT */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define TG_API __attribute__((visibility("default")))
#define LANES 16      /* outputs side by side in a panel */
#define LOGIT_ROWS 48 /* rows of logits that a session holds at a time */
#define MAX_THREADS 256

enum { TG_GELU_NEW, TG_GELU, TG_RELU };
enum { TG_DONE, TG_MORE, TG_BUSY, TG_BAD_ARGUMENT, TG_NOT_FINITE };

typedef struct {
    int32_t vocab_size, n_positions, n_embd, n_layer, n_head, n_inner, activation;
    int32_t scale_attn_weights, scale_attn_by_inverse_layer_idx, tied;
    float layer_norm_epsilon;
} tg_config;

typedef struct {
    double temperature, top_p, min_p, repetition_penalty;
    double uniform; /* a random number from 0 to 1, 1 excluded */
    const double *bias;                /* [n_bias] */
    const int32_t *bias_tokens, *seen; /* [n_bias], [n_seen], each without repetition */
    int32_t top_k, n_bias, n_seen;
} tg_options;

typedef struct tg_model tg_model;
typedef struct tg_session tg_session;

/* The operations of one instruction set. up(n) is n rounded up to whole 16 lanes; no vector needs
 * to be aligned, and nothing is read or written beyond the sizes that are told. */
typedef struct {
    const char *name;
    double budget; /* multiply-adds that take some 40 ms at worst, between two looks at the clock */
    /* c[m, 16 panels] = bias[16 panels] (NULL: zeros) + a[m, k] x w[panels, k, 16], where rows of
     * a and c are lda and ldc floats apart, panels of w `stride` floats. */
    void (*product)(const float *a, size_t lda, int m, const float *w, size_t stride, int panels,
                    int k, const float *bias, float *c, size_t ldc);
    /* x[n]; weight, bias, y [up(n)] */
    void (*layer_norm)(const float *x, const float *weight, const float *bias, float epsilon, int n,
                       float *y);
    void (*activate[3])(float *x, int n);                    /* in place, [up(n)] */
    float (*softmax)(float *x, int n, int end, float scale); /* in place, [up(end)]; see there */
    void (*log_sum)(const float *x, int n, float *top, float *sum); /* [n]: top + log(sum) */
    void (*exp)(float *x, int n);                            /* of x <= 0, in place, [up(n)] */
    int (*best)(const float *x, int n); /* [n]: where the largest is first; -1: not all finite */
} tg_kernels;

TG_API const char *tg_version(void);
/* The table called `wanted` (NULL: $TINYGPT2_ISA, or else the best), and its name; NULL if this
 * processor or this build has none of that name. */
TG_API const tg_kernels *tg_find_kernels(const char *wanted);
TG_API const char *tg_isa_name(const char *wanted);
/* `offsets`: byte positions in `file` of the tensors of a .tg2 file, in its order. They and the
 * sizes must have been checked. NULL: no such instruction set, or no memory. */
TG_API tg_model *tg_model_new(const tg_config *config, const void *file, const int64_t *offsets,
                              const char *isa, int threads);
TG_API void tg_model_free(tg_model *model);
/* How many tokens to compute at a time at most, so that tg_forward can look at the clock. */
TG_API int tg_chunk(const tg_model *model);
/* With all memory that it ever uses: the cache of keys and values, which the system lends as it
 * is touched, and scratch space for `chunk` tokens. NULL: there is not that much. */
TG_API tg_session *tg_session_new(const tg_model *model, int chunk);
TG_API void tg_session_free(tg_session *session);
/* Compute n tokens at the positions from `start`; those before must have been computed. TG_MORE
 * after 20 ms or so: go on by calling with n = 0, or give this up by calling with other tokens. */
TG_API int tg_forward(tg_session *session, const int32_t *tokens, int n, int start);
/* The logits after `count` of these tokens (at most LOGIT_ROWS) from index `first`: rows in
 * *logits, up(vocab_size) floats apart, until the session is used again. */
TG_API int tg_logits(tg_session *session, int first, int count, const float **logits);
TG_API double tg_log_probability(const tg_session *session, int row, int32_t token);
/* The next token after the logits' row 0, or -1 if the bias rules out every one. */
TG_API int32_t tg_choose(tg_session *session, const tg_options *options);

static inline size_t up(size_t n) { return (n + LANES - 1) / LANES * LANES; }

#ifdef TG_ISA
/* -------------------------------------------------------------------------------------------------
 * 1. The vector vocabulary. An instruction set says how wide its registers are and how they
 *    multiply and add; the compiler's own vector types do the rest. v16 is sixteen floats in as many
 *    registers as that takes, and all that follows is written in it.
 * ---------------------------------------------------------------------------------------------- */
#define INLINE static inline __attribute__((always_inline))
#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
#define TEXT_(a) #a
#define TEXT(a) TEXT_(a)
#define IS_avx512 1
#define IS_avx2 2
#define IS_neon 3
#define IS_portable 4
#define IS JOIN(IS_, TG_ISA)
#ifdef __clang__
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif
/* ROWS x PANELS x 16 accumulators fill the registers of a tile. */
#if IS == IS_avx512
#include <immintrin.h>
enum { WIDTH = 16, ROWS = 12, PANELS = 2 };
#define FMA(a, b, c) _mm512_fmadd_ps(a, b, c)
#elif IS == IS_avx2
#include <immintrin.h>
enum { WIDTH = 8, ROWS = 6, PANELS = 1 };
#define FMA(a, b, c) _mm256_fmadd_ps(a, b, c)
#elif IS == IS_neon
#include <arm_neon.h>
enum { WIDTH = 4, ROWS = 6, PANELS = 1 };
#define FMA(a, b, c) vfmaq_f32(c, a, b)
#else
enum { WIDTH = 4, ROWS = 6, PANELS = 1 };
#define FMA(a, b, c) (part){fmaf(a[0], b[0], c[0]), fmaf(a[1], b[1], c[1]), \
                            fmaf(a[2], b[2], c[2]), fmaf(a[3], b[3], c[3])}
#endif
typedef float part __attribute__((vector_size(4 * WIDTH)));
typedef int32_t bits __attribute__((vector_size(4 * WIDTH)));
typedef struct { part p[LANES / WIDTH]; } v16;
#define EACH UNROLL for (int i = 0; i < LANES / WIDTH; i++)
INLINE part load(const float *x) { part a; memcpy(&a, x, sizeof a); return a; }
INLINE v16 v_load(const float *x) { v16 a; EACH a.p[i] = load(x + i * WIDTH); return a; }
INLINE void v_store(float *x, v16 a) { EACH memcpy(x + i * WIDTH, &a.p[i], sizeof(part)); }
INLINE v16 v_set(float x) { v16 a; EACH a.p[i] = x - (part){0}; return a; } /* -0 - 0 is -0 */
INLINE v16 v_add(v16 a, v16 b) { EACH a.p[i] += b.p[i]; return a; }
INLINE v16 v_sub(v16 a, v16 b) { EACH a.p[i] -= b.p[i]; return a; }
INLINE v16 v_mul(v16 a, v16 b) { EACH a.p[i] *= b.p[i]; return a; }
INLINE v16 v_div(v16 a, v16 b) { EACH a.p[i] /= b.p[i]; return a; }
INLINE v16 v_fma(v16 a, v16 b, v16 c) { EACH c.p[i] = FMA(a.p[i], b.p[i], c.p[i]); return c; }
/* x > y ? a : b, so b where x or y is not a number */
INLINE v16 v_pick(v16 x, v16 y, v16 a, v16 b) {
    EACH {
        bits above = x.p[i] > y.p[i];
        a.p[i] = (part)((above & (bits)a.p[i]) | (~above & (bits)b.p[i]));
    }
    return a;
}
INLINE v16 v_max(v16 a, v16 b) { return v_pick(a, b, a, b); }
/* 2^n for a sum t = n + MAGIC, in whose low bits the whole number n stands. */
#define MAGIC 12582912.0f /* 1.5 * 2^23: adding it rounds to a whole number */
INLINE v16 v_pow2(v16 t) { EACH t.p[i] = (part)(((bits)t.p[i] << 23) + (127 << 23)); return t; }

/* x[0 .. 16), where lanes from `count` on are not read but filled: the end of a vector */
INLINE v16 v_load_some(const float *x, int count, float fill) {
    if (count >= LANES) return v_load(x);
    float lanes[LANES];
    for (int i = 0; i < LANES; i++) lanes[i] = i < count ? x[i] : fill;
    return v_load(lanes);
}

/* The sum of sixteen lanes by the one tree: those 8, 4, 2, 1 apart. */
static float sum_lanes(v16 a) {
    float x[LANES];
    v_store(x, a);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) x[i] += x[i + half];
    return x[0];
}

static float max_of(const float *x, int n) {
    float lanes[LANES];
    v16 top = v_set(-INFINITY);
    for (int i = 0; i < n; i += LANES) top = v_max(v_load_some(x + i, n - i, -INFINITY), top);
    v_store(lanes, top);
    for (int i = 1; i < LANES; i++) lanes[0] = lanes[i] > lanes[0] ? lanes[i] : lanes[0];
    return lanes[0];
}

/* -------------------------------------------------------------------------------------------------
 * 2. The microkernel
 * ---------------------------------------------------------------------------------------------- */

/* A tile of rows x panels outputs, whose accumulators stay in registers over all k inputs. With
 * `rows` and `panels` constant where it is inlined, every loop but the one over k disappears. One
 * row is as fast as memory delivers w, so that is asked for AHEAD inputs early, across pages, where
 * the processor's own prefetching ends. */
#define AHEAD 32
INLINE void tile(int rows, int panels, const float *a, size_t lda, const float *w, size_t stride,
                 int k, const float *init, size_t ldi, float *c, size_t ldc) {
    v16 sum[ROWS][4];
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int j = 0; j < panels; j++)
            sum[r][j] = init ? v_load(init + r * ldi + j * LANES) : v_set(0);
    for (int p = 0; p < k; p++) {
        v16 b[4];
        UNROLL for (int j = 0; j < panels; j++) {
            b[j] = v_load(w + j * stride + (size_t)p * LANES);
            if (rows == 1) __builtin_prefetch(w + j * stride + (size_t)(p + AHEAD) * LANES);
        }
        UNROLL for (int r = 0; r < rows; r++) {
            v16 x = v_set(a[r * lda + p]);
            UNROLL for (int j = 0; j < panels; j++) sum[r][j] = v_fma(x, b[j], sum[r][j]);
        }
    }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int j = 0; j < panels; j++) v_store(c + r * ldc + j * LANES, sum[r][j]);
}

static void any_tile(int rows, int panels, const float *a, size_t lda, const float *w,
                     size_t stride, int k, const float *init, size_t ldi, float *c, size_t ldc) {
#define TILE(r, j) tile(r, j, a, lda, w, stride, k, init, ldi, c, ldc)
#define CASE(r, j) case r: if (panels == 1) TILE(r, 1); else TILE(r, j); break;
    switch (rows) {
        CASE(1, 4) CASE(2, PANELS) CASE(3, PANELS) CASE(4, PANELS) CASE(5, PANELS) CASE(6, PANELS)
#if IS == IS_avx512
        CASE(7, 2) CASE(8, 2) CASE(9, 2) CASE(10, 2) CASE(11, 2) CASE(12, 2)
#endif
    }
}

/* The product of the table. One row takes four panels at a time: more streams from memory. Many
 * rows go in blocks of DEPTH inputs, so that a block of panels stays in the nearest cache while the
 * rows pass; storing and reloading the accumulators continues the same chain. */
#define DEPTH 256
static void product(const float *a, size_t lda, int m, const float *w, size_t stride, int panels,
                    int k, const float *bias, float *c, size_t ldc) {
    int tiles = (m + ROWS - 1) / ROWS, step = m == 1 ? 4 : PANELS, depth = m == 1 ? k : DEPTH;
    for (int p = 0; p < k; p += depth) {
        if (depth > k - p) depth = k - p;
        for (int j = 0, width; j < panels; j += width) {
            width = panels - j < step ? 1 : step;
            const float *block = w + j * stride + (size_t)p * LANES;
            for (int t = 0; t < tiles; t++) {
                int row = (int)((int64_t)m * t / tiles), end = (int)((int64_t)m * (t + 1) / tiles);
                float *out = c + row * ldc + j * LANES;
                const float *init = p ? out : bias ? bias + j * LANES : NULL;
                any_tile(end - row, width, a + row * lda + p, lda, block, stride, depth, init,
                         p ? ldc : 0, out, ldc);
            }
        }
    }
}

/* -------------------------------------------------------------------------------------------------
 * 3. The small operations
 * ---------------------------------------------------------------------------------------------- */

/* exp(x) for x <= 0, within 1 ulp or so; below -87 it is exp(-87), and NaN stays NaN. x is
 * n ln 2 + r with |r| <= ln 2 / 2, and exp(r) = 1 + r + r^2 p(r), p a minimax polynomial. */
INLINE v16 v_exp(v16 x) {
    static const float p[] = {1.381459688e-3f, 8.368716859e-3f, 4.166838807e-2f, 1.666652063e-1f,
                              4.999999345e-1f};
    x = v_max(v_set(-87.0f), x);
    v16 t = v_fma(x, v_set(1.44269504f), v_set(MAGIC)), n = v_sub(t, v_set(MAGIC));
    v16 r = v_fma(n, v_set(-0.693359375f), x); /* ln 2 in two parts, the first exact times n */
    r = v_fma(n, v_set(2.12194440e-4f), r);
    v16 sum = v_set(p[0]);
    UNROLL for (int i = 1; i < 5; i++) sum = v_fma(sum, r, v_set(p[i]));
    sum = v_add(v_fma(v_mul(r, r), sum, r), v_set(1.0f));
    return v_mul(sum, v_pow2(t));
}

static void exp_all(float *x, int n) {
    for (int i = 0; i < n; i += LANES) v_store(x + i, v_exp(v_load(x + i)));
}

INLINE v16 v_minus_abs(v16 x) { return v_pick(x, v_set(0), v_sub(v_set(0), x), x); }

/* Ba et al. 2016, with epsilon inside the root. */
static void layer_norm(const float *x, const float *weight, const float *bias, float epsilon, int n,
                       float *y) {
    v16 sum = v_set(0), squares = v_set(0);
    for (int i = 0; i < n; i += LANES) sum = v_add(sum, v_load_some(x + i, n - i, 0));
    float mean = sum_lanes(sum) / (float)n;
    for (int i = 0; i < n; i += LANES) {
        v16 d = v_sub(v_load_some(x + i, n - i, mean), v_set(mean));
        squares = v_fma(d, d, squares);
    }
    v16 scale = v_set(1.0f / sqrtf(sum_lanes(squares) / (float)n + epsilon));
    for (int i = 0; i < n; i += LANES) {
        v16 d = v_sub(v_load_some(x + i, n - i, mean), v_set(mean));
        v_store(y + i, v_fma(v_mul(d, scale), v_load(weight + i), v_load(bias + i)));
    }
}

/* 0.5 x (1 + tanh u) is x / (1 + exp(-2u)), or with e = exp(-2|u|), which cannot overflow,
 * x / (1 + e) for u > 0 and x e / (1 + e) otherwise: nothing cancels on either side. */
static void gelu_new(float *x, int n) {
    const v16 root = v_set(0.79788456f), cubic = v_set(0.79788456f * 0.044715f), one = v_set(1.0f);
    for (int i = 0; i < n; i += LANES) {
        v16 a = v_load(x + i), u = v_mul(a, v_fma(v_mul(a, a), cubic, root));
        v16 e = v_exp(v_mul(v_minus_abs(u), v_set(2.0f)));
        v_store(x + i, v_div(v_mul(a, v_pick(a, v_set(0), one, e)), v_add(one, e)));
    }
}

/* x P(Z <= x), with P(Z > |x|) = erfc(z) / 2 for z = |x| / sqrt 2, and erfc(z) = exp(-z^2) t q(t)
 * with t = 1 / (1 + 0.4 z) and a minimax polynomial q, exact to 7e-9 for z up to 9.4. What
 * rounding loses of x^2 is put back, as exp would magnify it. */
static void gelu(float *x, int n) {
    static const float q[] = {-0.03080066274f, 0.2046001047f, -0.5143945198f, 0.5683587286f,
                              -0.3019029412f,  0.2815610921f, 0.1263649405f,  0.2156372753f,
                              0.224864516f,    0.2257114731f};
    const v16 one = v_set(1.0f), half = v_set(-0.5f);
    for (int i = 0; i < n; i += LANES) {
        v16 a = v_load(x + i);
        v16 z = v_max(v_set(-13.0f), v_minus_abs(a)); /* -sqrt 2 z; beyond, erfc is nothing */
        v16 square = v_mul(z, z), lost = v_fma(z, z, v_sub(v_set(0), square));
        v16 e = v_exp(v_mul(square, half));
        v16 t = v_div(one, v_fma(z, v_set(-0.4f * 0.70710678f), one)), sum = v_set(q[0]);
        UNROLL for (int j = 1; j < 10; j++) sum = v_fma(sum, t, v_set(q[j]));
        v16 above = v_mul(v_mul(v_mul(v_fma(v_mul(lost, half), e, e), t), sum), v_set(0.5f));
        v_store(x + i, v_mul(a, v_pick(a, v_set(0), v_sub(one, above), above)));
    }
}

static void relu(float *x, int n) {
    for (int i = 0; i < n; i += LANES) v_store(x + i, v_max(v_set(0), v_load(x + i)));
}

/* Scores to weights of attention: x[i] = exp(scale x[i] - their maximum) for i < n, and an exact
 * zero from n to up(end), for the positions that must not be seen. Returns the sum, by which the
 * caller divides later: there are fewer outputs than weights. */
static float softmax(float *x, int n, int end, float scale) {
    v16 top = v_set(scale * max_of(x, n)), sum = v_set(0);
    for (int i = 0; i < n; i += LANES)
        v_store(x + i, v_exp(v_sub(v_mul(v_load(x + i), v_set(scale)), top)));
    for (int i = n; i < (int)up(end); i++) x[i] = 0;
    for (int i = 0; i < n; i += LANES) sum = v_add(sum, v_load(x + i));
    return sum_lanes(sum);
}

static void log_sum(const float *x, int n, float *top, float *sum) {
    v16 s = v_set(0);
    *top = max_of(x, n);
    for (int i = 0; i < n; i += LANES)
        s = v_add(s, v_exp(v_sub(v_load_some(x + i, n - i, -INFINITY), v_set(*top))));
    *sum = sum_lanes(s);
}

static int best(const float *x, int n) {
    v16 zero = v_set(0); /* 0 x is 0 only for finite x */
    for (int i = 0; i < n; i += LANES)
        zero = v_fma(v_load_some(x + i, n - i, 0), v_set(0), zero);
    if (!(sum_lanes(zero) == 0)) return -1;
    float top = max_of(x, n);
    int i = 0;
    while (x[i] != top) i++;
    return i;
}

extern const tg_kernels JOIN(tg_kernels_, TG_ISA);
const tg_kernels JOIN(tg_kernels_, TG_ISA) = {
    TEXT(TG_ISA), IS == IS_portable ? 4e7 : 2e9, product, layer_norm, {gelu_new, gelu, relu},
    softmax, log_sum, exp_all, best,
};

#else
/* -------------------------------------------------------------------------------------------------
 * 4. Which instruction set
 * ---------------------------------------------------------------------------------------------- */
#ifndef TG_VERSION
#define TG_VERSION "unknown"
#endif
extern const tg_kernels tg_kernels_avx512, tg_kernels_avx2, tg_kernels_neon, tg_kernels_portable;

const char *tg_version(void) { return TG_VERSION; }

/* The compiler's test asks CPUID for the instructions and XGETBV whether the system saves them. */
const tg_kernels *tg_find_kernels(const char *wanted) {
    const tg_kernels *found[3];
    int n = 0;
#if defined(__x86_64__)
    __builtin_cpu_init();
    int fma = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (fma && __builtin_cpu_supports("avx512f")) found[n++] = &tg_kernels_avx512;
    if (fma) found[n++] = &tg_kernels_avx2;
#elif defined(__aarch64__)
    found[n++] = &tg_kernels_neon;
#endif
    found[n++] = &tg_kernels_portable;
    if (!wanted) wanted = getenv("TINYGPT2_ISA");
    if (!wanted || !*wanted) return found[0];
    for (int i = 0; i < n; i++)
        if (!strcmp(found[i]->name, wanted)) return found[i];
    return NULL;
}

const char *tg_isa_name(const char *wanted) {
    const tg_kernels *kernels = tg_find_kernels(wanted);
    return kernels ? kernels->name : NULL;
}

/* -------------------------------------------------------------------------------------------------
 * 5. Threads. One pool for the process, started when a forward pass first has work for it. A job is
 *    some units, which whoever is free takes one by one; what a unit gives depends not on whom.
 * ---------------------------------------------------------------------------------------------- */
typedef struct task task;
typedef void job(const task *t, int unit);

static struct {
    /* Who may help (16 bits), how many units, which is next (24 each): one word, so that taking a
     * unit is one compare-and-swap. Who succeeds may read `run` and `t`, as they change only after
     * every unit is done. */
    _Alignas(64) _Atomic uint64_t ticket;
    _Alignas(64) _Atomic int done;
    _Alignas(64) job *run;
    const task *t;
    atomic_flag taken; /* by the one call that uses the pool */
    int workers, prepared;
    _Atomic char asleep[MAX_THREADS];
    pthread_mutex_t lock;
    pthread_cond_t wake;
} pool = {.lock = PTHREAD_MUTEX_INITIALIZER, .wake = PTHREAD_COND_INITIALIZER};
static _Thread_local int worker; /* which of them this thread is; 0: the caller */

static int64_t nanoseconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * INT64_C(1000000000) + t.tv_nsec;
}

#if defined(__x86_64__)
#define RELAX() __builtin_ia32_pause()
#else
#define RELAX() __asm__ volatile("" ::: "memory")
#endif

/* Whether the ticket t has a unit left for this thread. */
static int offers(uint64_t t) {
    return worker < (int)(t >> 48) && (t & 0xffffff) < (t >> 24 & 0xffffff);
}

static void work(void) {
    for (uint64_t t = atomic_load(&pool.ticket); offers(t);) {
        if (!atomic_compare_exchange_weak(&pool.ticket, &t, t + 1)) continue;
        pool.run(pool.t, (int)(t & 0xffffff));
        atomic_fetch_add(&pool.done, 1);
        t = atomic_load(&pool.ticket);
    }
}

/* A worker looks out for work for a fifth of a millisecond, which bridges the gaps between layers
 * and between tokens, then sleeps: an idle process uses no processor. */
static void *worker_main(void *index) {
    for (worker = (int)(intptr_t)index;; work()) {
        int64_t until = nanoseconds() + 200000;
        while (!offers(atomic_load(&pool.ticket)) && nanoseconds() < until) RELAX();
        if (offers(atomic_load(&pool.ticket))) continue;
        pthread_mutex_lock(&pool.lock);
        atomic_store(&pool.asleep[worker], 1);
        while (!offers(atomic_load(&pool.ticket))) pthread_cond_wait(&pool.wake, &pool.lock);
        atomic_store(&pool.asleep[worker], 0);
        pthread_mutex_unlock(&pool.lock);
    }
    return NULL;
}

/* A forked child has none of its parent's threads: it starts its own when it needs them. */
static void forget_workers(void) {
    pool.workers = worker = 0;
    atomic_store(&pool.ticket, 0);
    memset((void *)pool.asleep, 0, sizeof pool.asleep);
    pthread_mutex_init(&pool.lock, NULL);
    pthread_cond_init(&pool.wake, NULL);
    atomic_flag_clear(&pool.taken);
}

/* Start the workers that are missing, deaf to signals, which are for the program's own threads.
 * Where the system gives fewer, fewer do the work. */
static void start_workers(int threads) {
    sigset_t all, old;
    if (!pool.prepared) pool.prepared = !pthread_atfork(NULL, NULL, forget_workers);
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    for (pthread_t thread; pool.workers < threads - 1; pool.workers++) {
        if (pthread_create(&thread, NULL, worker_main, (void *)(intptr_t)(pool.workers + 1))) break;
        pthread_detach(thread);
    }
    pthread_sigmask(SIG_SETMASK, &old, NULL);
}

/* Compute all units of a job; `threads` above 1 says that the caller has taken the pool. Little
 * work (`cost` in multiply-adds) is not worth the wait for another processor. */
static void parallel(int threads, int units, double cost, job *run, const task *t) {
    int sleepers = 0, unit = 0;
    if (threads < 2 || units < 2 || cost < 1e5) {
        while (unit < units) run(t, unit++);
        return;
    }
    if (pool.workers < threads - 1) start_workers(threads);
    pool.run = run, pool.t = t;
    atomic_store(&pool.done, 0);
    atomic_store(&pool.ticket, (uint64_t)threads << 48 | (uint64_t)units << 24);
    for (int i = 1; i < threads; i++) sleepers += atomic_load(&pool.asleep[i]);
    if (sleepers) {
        pthread_mutex_lock(&pool.lock);
        pthread_cond_broadcast(&pool.wake);
        pthread_mutex_unlock(&pool.lock);
    }
    work();
    for (int spins = 0; atomic_load(&pool.done) < units; spins++)
        if (spins < 1000) RELAX();
        else sched_yield(); /* perhaps there are more threads than processors */
}

/* -------------------------------------------------------------------------------------------------
 * 6. The forward pass
 * ---------------------------------------------------------------------------------------------- */
enum { WTE, WPE, LAYERS }; /* the tensors in the file's order: these, the layers', the last */
enum { LN_1, C_ATTN = 2, ATTN_PROJ = 4, LN_2 = 6, C_FC = 8, MLP_PROJ = 10, LAYER = 12 };
enum { LN_F, LM_HEAD = 2 }; /* each but wte, wpe and lm_head is a weight and a bias */
enum { ATTENTION_ROWS = 24 };

struct tg_model {
    tg_config config;
    const tg_kernels *kernels;
    int threads, head_size;
    const float *tensors[]; /* matrices [up(outputs) / 16, inputs, 16]; wpe [.., up(n_embd)] */
};

typedef struct { double score; float e; int32_t token; } candidate;

struct tg_session {
    const tg_model *model;
    atomic_flag busy;
    int chunk, threads;  /* threads: of the call under way, 1 if another had taken the pool */
    int layer, n, start; /* of the pass under way: layers done, how many tokens, where the first */
    int best;            /* the greedy choice after row 0 of the logits */
    size_t wide, reach;  /* how far apart rows are: of x, a, h; of weights */
    void *memory;        /* all that follows lies in it */
    float *keys;         /* [n_layer, n_head, up(n_positions) / 16, head_size, 16]: by position */
    float *values;       /* [n_layer, n_head, up(head_size) / 16, n_positions, 16] */
    float *x;            /* [chunk, n_embd]: the residual stream */
    float *a;            /* [chunk, n_embd]: what a layer norm, attention or the MLP makes of it */
    float *h;            /* [chunk, 3 n_embd or n_inner] */
    float *weights;      /* [threads, ATTENTION_ROWS, n_positions, then head_size]: of attention */
    float *logits;       /* [LOGIT_ROWS, up(vocab_size)] */
    float *e;            /* [vocab_size]: for the choice of a token, as are */
    candidate *candidates; /* [vocab_size] */
    int32_t *tokens;     /* [chunk] */
};

struct task { /* what the units of one job share: rows of the session, a layer, a matrix */
    tg_session *s;
    int first, count, layer, inputs, panels, group; /* group: panels in a unit */
    const float *const *tensor;                     /* a weight and a bias */
    const float *in;
    float *out, *residual; /* residual: what the outputs are added to, or NULL */
    size_t out_row;
    void (*activate)(float *x, int n); /* on the outputs, or NULL */
};

/* out[count, 16 panels] = linear(in[count, inputs]), one group of panels */
static void linear_unit(const task *t, int unit) {
    int from = unit * t->group, panels = t->panels - from < t->group ? t->panels - from : t->group;
    size_t stride = (size_t)t->inputs * LANES, row = t->s->wide;
    const float *bias = t->tensor[1] ? t->tensor[1] + from * LANES : NULL;
    float *out = t->out + from * LANES;
    t->s->model->kernels->product(t->in, row, t->count, t->tensor[0] + from * stride, stride,
                                  panels, t->inputs, bias, out, t->out_row);
    for (int i = 0; i < t->count; i++, out += t->out_row) {
        if (t->activate) t->activate(out, panels * LANES);
        for (int c = 0; t->residual && c < panels * LANES; c++)
            t->residual[i * row + from * LANES + c] += out[c];
    }
}

/* Units of many panels, so that a processor reads long stretches of memory; many units, so that
 * none waits long for the last. */
static void linear(tg_session *s, int count, const float *in, int inputs,
                   const float *const *tensor, int outputs, float *out,
                   void (*activate)(float *, int), float *residual) {
    task t = {.s = s, .count = count, .inputs = inputs, .panels = (int)up(outputs) / LANES,
              .group = 32, .tensor = tensor, .in = in, .out = out, .residual = residual,
              .out_row = out == s->logits ? up(outputs) : s->wide, .activate = activate};
    while (t.group > 1 && t.panels < t.group * s->threads * (t.group > 4 ? 8 : 2)) t.group /= 2;
    parallel(s->threads, (t.panels + t.group - 1) / t.group, (double)count * inputs * outputs,
             linear_unit, &t);
}

/* x = the token's embedding, which is one column of one panel, plus where it stands */
static void embed_unit(const task *t, int i) {
    const tg_session *s = t->s;
    size_t token = s->tokens[i], n_embd = s->model->config.n_embd;
    const float *wte = s->model->tensors[WTE] + token / LANES * n_embd * LANES + token % LANES;
    const float *wpe = s->model->tensors[WPE] + (s->start + i) * up(n_embd);
    for (size_t c = 0; c < n_embd; c++) s->x[i * s->wide + c] = wte[c * LANES] + wpe[c];
}

/* a = layer norm of x, which begins at the row `first` */
static void norm_unit(const task *t, int i) {
    const tg_session *s = t->s;
    const tg_config *c = &s->model->config;
    s->model->kernels->layer_norm(s->x + (t->first + i) * s->wide, t->tensor[0], t->tensor[1],
                                  c->layer_norm_epsilon, c->n_embd, s->a + i * s->wide);
}

static void norm(tg_session *s, const float *const *tensor, int first, int count) {
    task t = {.s = s, .first = first, .tensor = tensor};
    parallel(s->threads, count, 4.0 * count * s->model->config.n_embd, norm_unit, &t);
}

/* a = what one head of each token gathers from the tokens up to itself. The keys and values go from
 * h into the cache; then, ATTENTION_ROWS tokens at a time, scores, weights, and values by weight.
 * Weights are zeros beyond a token's own position. */
static void attention_unit(const task *t, int head) {
    const tg_session *s = t->s;
    const tg_config *c = &s->model->config;
    const tg_kernels *f = s->model->kernels;
    size_t d = s->model->head_size, positions = c->n_positions, row = s->reach;
    size_t which = (size_t)t->layer * c->n_head + head, to_keys = c->n_embd;
    float *keys = s->keys + which * up(positions) * d, *query = s->h + head * d;
    float *values = s->values + which * positions * up(d), *gathered = s->a + head * d;
    float *p = s->weights + worker * ATTENTION_ROWS * row, *y = p + up(positions);
    for (int i = 0; i < s->n; i++) {
        const float *key = query + i * s->wide + to_keys, *value = key + to_keys;
        size_t at = s->start + i;
        for (size_t e = 0; e < d; e++) {
            keys[(at / LANES * d + e) * LANES + at % LANES] = key[e];
            values[(e / LANES * positions + at) * LANES + e % LANES] = value[e];
        }
    }
    double scale = c->scale_attn_weights ? 1 / sqrt((double)d) : 1;
    if (c->scale_attn_by_inverse_layer_idx) scale /= t->layer + 1;
    for (int first = 0, m; first < s->n; first += m) {
        m = s->n - first < ATTENTION_ROWS ? s->n - first : ATTENTION_ROWS;
        int end = s->start + first + m;
        f->product(query + first * s->wide, s->wide, m, keys, d * LANES, (int)up(end) / LANES,
                   (int)d, NULL, p, row);
        for (int i = 0; i < m; i++)
            p[i * row + row - 1] = f->softmax(p + i * row, end - m + i + 1, end, (float)scale);
        f->product(p, row, m, values, positions * LANES, (int)up(d) / LANES, end, NULL, y, row);
        for (int i = 0; i < m; i++)
            for (size_t e = 0; e < d; e++)
                gathered[(first + i) * s->wide + e] = y[i * row + e] / p[i * row + row - 1];
    }
}

/* The transformer: attention, then the MLP, each added to x. */
static void forward_layer(tg_session *s, int layer) {
    const tg_config *c = &s->model->config;
    const float *const *w = s->model->tensors + LAYERS + layer * LAYER;
    int n = s->n;
    task t = {.s = s, .layer = layer};
    norm(s, w + LN_1, 0, n);
    linear(s, n, s->a, c->n_embd, w + C_ATTN, 3 * c->n_embd, s->h, NULL, NULL); /* h = q, k, v */
    parallel(s->threads, c->n_head, (double)n * (s->start + n) * c->n_embd, attention_unit, &t);
    linear(s, n, s->a, c->n_embd, w + ATTN_PROJ, c->n_embd, s->h, NULL, s->x);
    norm(s, w + LN_2, 0, n);
    linear(s, n, s->a, c->n_embd, w + C_FC, c->n_inner, s->h,
           s->model->kernels->activate[c->activation], NULL);
    linear(s, n, s->h, c->n_inner, w + MLP_PROJ, c->n_embd, s->a, NULL, s->x);
}

/* A session belongs to one call at a time; so does the pool, and who finds it taken works alone. */
static int enter(tg_session *s) {
    if (atomic_flag_test_and_set(&s->busy)) return 0;
    s->threads = s->model->threads;
    if (s->threads > 1 && atomic_flag_test_and_set(&pool.taken)) s->threads = 1;
    return 1;
}

static int leave(tg_session *s, int result) {
    if (s->threads > 1) atomic_flag_clear(&pool.taken);
    atomic_flag_clear(&s->busy);
    return result;
}

static int begin(tg_session *s, const int32_t *tokens, int n, int start) {
    const tg_config *c = &s->model->config;
    task t = {.s = s};
    if (n < 1 || n > s->chunk || start < 0 || start > c->n_positions - n) return 0;
    for (int i = 0; i < n; i++)
        if (tokens[i] < 0 || tokens[i] >= c->vocab_size) return 0;
    memcpy(s->tokens, tokens, n * sizeof *tokens);
    s->n = n, s->start = start, s->layer = 0;
    parallel(s->threads, n, 8.0 * n * c->n_embd, embed_unit, &t);
    return 1;
}

int tg_forward(tg_session *s, const int32_t *tokens, int n, int start) {
    int64_t until = nanoseconds() + 20000000;
    if (!enter(s)) return TG_BUSY;
    if ((n || !s->n) && !begin(s, tokens, n, start)) return leave(s, TG_BAD_ARGUMENT);
    while (s->layer < s->model->config.n_layer) {
        forward_layer(s, s->layer++);
        if (nanoseconds() > until) return leave(s, TG_MORE);
    }
    return leave(s, TG_DONE);
}

int tg_logits(tg_session *s, int first, int count, const float **logits) {
    const tg_config *c = &s->model->config;
    const float *const *last = s->model->tensors + LAYERS + c->n_layer * LAYER;
    const float *head[] = {c->tied ? s->model->tensors[WTE] : last[LM_HEAD], NULL};
    if (!enter(s)) return TG_BUSY;
    if (!s->n || s->layer < c->n_layer || count < 1 || count > LOGIT_ROWS || first < 0 ||
        first > s->n - count)
        return leave(s, TG_BAD_ARGUMENT);
    norm(s, last + LN_F, first, count);
    linear(s, count, s->a, c->n_embd, head, c->vocab_size, s->logits, NULL, NULL);
    *logits = s->logits;
    for (int i = count - 1; i >= 0; i--) {
        s->best = s->model->kernels->best(s->logits + i * up(c->vocab_size), c->vocab_size);
        if (s->best < 0) return leave(s, TG_NOT_FINITE);
    }
    return leave(s, TG_DONE);
}

double tg_log_probability(const tg_session *s, int row, int32_t token) {
    const float *x = s->logits + row * up(s->model->config.vocab_size);
    float top, sum;
    s->model->kernels->log_sum(x, s->model->config.vocab_size, &top, &sum);
    return (double)x[token] - top - log(sum);
}

/* -------------------------------------------------------------------------------------------------
 * 7. The choice of a token: the filters and the draw of the Python module's section 6
 * ---------------------------------------------------------------------------------------------- */
static int before(candidate a, candidate b) {
    return a.score > b.score || (a.score == b.score && a.token < b.token);
}

/* Let c[i] sink to its place in a heap of n, whose root comes before all others. */
static void sink(candidate *c, int n, int i) {
    for (int child; (child = 2 * i + 1) < n; i = child) {
        if (child + 1 < n && before(c[child + 1], c[child])) child++;
        if (!before(c[child], c[i])) return;
        candidate other = c[i];
        c[i] = c[child], c[child] = other;
    }
}

/* The i-th best of n, where *left are still in the heap: as they come out of it, they go behind the
 * rest, so that only as many are put in order as are looked at. */
static const candidate *nth(candidate *c, int n, int *left, int i) {
    while (n - *left <= i) {
        candidate best = c[0];
        c[0] = c[--*left], c[*left] = best;
        sink(c, *left, 0);
    }
    return &c[n - 1 - i];
}

/* All tokens that are not ruled out, with bias and penalty, as a heap. Their number. */
static int collect(const tg_session *s, const tg_options *o) {
    candidate *c = s->candidates;
    int n = 0, size = s->model->config.vocab_size;
    for (int t = 0; t < size; t++) c[t] = (candidate){s->logits[t], 0, t};
    for (int i = 0; i < o->n_bias; i++) c[o->bias_tokens[i]].score += o->bias[i];
    for (int i = 0; i < o->n_seen; i++) {
        double *x = &c[o->seen[i]].score;
        *x = *x < 0 ? *x * o->repetition_penalty : *x / o->repetition_penalty;
    }
    for (int t = 0; t < size; t++)
        if (c[t].score > -INFINITY) c[n++] = c[t];
    for (int i = n / 2; i >= 0; i--) sink(c, n, i);
    return n;
}

int32_t tg_choose(tg_session *s, const tg_options *o) {
    if (o->temperature == 0 && !o->n_bias && !o->n_seen) return s->best;
    candidate *c = s->candidates;
    int n = collect(s, o), left = n, kept = n, i = 0;
    if (!n || o->temperature == 0) return n ? c[0].token : -1;
    double mass = 0, sum = 0, drawn = 0;
    for (int t = 0; t < n; t++) s->e[t] = (float)((c[t].score - c[0].score) / o->temperature);
    s->model->kernels->exp(s->e, n);
    for (int t = 0; t < n; t++) mass += c[t].e = s->e[t];
    if (o->top_k > 0 && o->top_k < n) { /* and those as good as the k-th */
        double least = nth(c, n, &left, o->top_k - 1)->score;
        for (kept = 0, mass = 0; kept < n && nth(c, n, &left, kept)->score >= least; kept++)
            mass += nth(c, n, &left, kept)->e;
    }
    if (o->top_p < 1 || o->min_p > 0) {
        for (; i < kept; sum += nth(c, n, &left, i++)->e)
            if (i && (sum >= o->top_p * mass || nth(c, n, &left, i)->e < o->min_p)) break;
        kept = i, mass = sum;
    }
    for (i = 0; i < kept - 1; i++)
        if ((drawn += nth(c, n, &left, i)->e) > o->uniform * mass) break;
    return nth(c, n, &left, i)->token;
}

/* -------------------------------------------------------------------------------------------------
 * 8. Models and sessions
 * ---------------------------------------------------------------------------------------------- */
tg_model *tg_model_new(const tg_config *config, const void *file, const int64_t *offsets,
                       const char *isa, int threads) {
    const tg_kernels *kernels = tg_find_kernels(isa);
    int n = LAYERS + config->n_layer * LAYER + LM_HEAD + !config->tied;
    tg_model *m = kernels ? malloc(sizeof *m + n * sizeof *m->tensors) : NULL;
    if (!m) return NULL;
    m->config = *config, m->kernels = kernels;
    m->threads = threads < 1 ? 1 : threads > MAX_THREADS ? MAX_THREADS : threads;
    m->head_size = config->n_embd / config->n_head;
    for (int i = 0; i < n; i++) m->tensors[i] = (const float *)((const char *)file + offsets[i]);
    return m;
}

void tg_model_free(tg_model *model) { free(model); }

int tg_chunk(const tg_model *m) {
    double layer = (double)m->config.n_embd * (4.0 * m->config.n_embd + 2.0 * m->config.n_inner);
    double tokens = m->kernels->budget / layer;
    return tokens < 1 ? 1 : tokens > 256 ? 256 : (int)tokens;
}

/* Lay out a session's memory from `base`; returns its size. */
static size_t lay_out(tg_session *s, char *base) {
    const tg_config *c = &s->model->config;
    size_t heads = (size_t)c->n_layer * c->n_head, d = s->model->head_size, size = 0;
    size_t words = up(c->vocab_size);
#define PLACE(field, count) \
    s->field = base ? (void *)(base + size) : NULL, \
    size += ((count) * sizeof *s->field + 63) / 64 * 64
    PLACE(keys, heads * up(c->n_positions) * d), PLACE(values, heads * c->n_positions * up(d));
    PLACE(x, s->chunk * s->wide), PLACE(a, s->chunk * s->wide), PLACE(h, s->chunk * s->wide);
    PLACE(weights, s->model->threads * ATTENTION_ROWS * s->reach);
    PLACE(logits, LOGIT_ROWS * words), PLACE(e, words), PLACE(candidates, words);
    PLACE(tokens, (size_t)s->chunk);
    return size;
}

tg_session *tg_session_new(const tg_model *model, int chunk) {
    const tg_config *c = &model->config;
    tg_session *s = chunk > 0 ? calloc(1, sizeof *s) : NULL;
    if (!s) return NULL;
    s->model = model, s->chunk = chunk;
    /* 64 bytes more in a row keep one column of many rows out of a single set of the cache. */
    s->wide = up(c->n_inner > 3 * c->n_embd ? c->n_inner : 3 * c->n_embd) + LANES;
    s->reach = up(c->n_positions) + up(model->head_size) + LANES;
    s->memory = aligned_alloc(64, lay_out(s, NULL));
    if (!s->memory) return free(s), NULL;
    lay_out(s, s->memory);
    return s;
}

void tg_session_free(tg_session *session) {
    if (session) free(session->memory);
    free(session);
}

#ifdef TG_STANDALONE
/* -------------------------------------------------------------------------------------------------
 * 9. The command. It trusts no file: the configuration in its header says what all else must be.
 * ---------------------------------------------------------------------------------------------- */
#include <fcntl.h>
#include <stdio.h>
#include <sys/mman.h>
#include <unistd.h>
#define FAIL(code, ...) (fprintf(stderr, "tinygpt2: error: " __VA_ARGS__), exit(code))
#define REFUSE(what, ...) FAIL(1, "%s: " what "\n", path, __VA_ARGS__)
static const char *path, *at, *bytes; /* the file, how far its header was read, all tokens' bytes */
static const uint32_t *places;        /* where each token's bytes begin; NULL: no tokenizer */
static size_t data, place;            /* where the tensors begin; from there on, the next one */
static int vocab, eos, bos, held;     /* held: bytes of a character whose end is to come */

/* Where the next tensor lies: a x b x c numbers (0: not there), c padded; the header must agree. */
static int64_t tensor(const char *name, int layer, const char *type, size_t a, size_t b, size_t c) {
    char full[40], shape[64], text[200];
    size_t size = type[1] == '8' ? 1 : 4, from = place;
    c = (c * size + 63) / 64 * 64 / size, place += (a ? a : 1) * (b ? b : 1) * c * size;
    snprintf(full, sizeof full, name, layer), snprintf(shape, sizeof shape, "%zu,%zu,%zu", a, b, c);
    snprintf(text, sizeof text, ",'%s':{'dtype':'%s','shape':[%s],'data_offsets':[%zu,%zu]}", full,
             type, shape + 2 * (!a + !b), from, place);
    if (strncmp(at, text, strlen(text))) REFUSE("header: expected %s, found %.99s", text, at);
    return at += strlen(text), data + from;
}

/* Map the file, check all in it that is used, and open the model. */
static tg_model *open_model(int threads) {
    static int64_t offsets[9999 * LAYER + 5], *next = offsets;
    static char text[1 << 24], *out = text;
    int file = open(path, O_RDONLY | O_NONBLOCK), i = 0, n_bytes; /* a pipe would make it wait */
    size_t size = file < 0 ? 0 : lseek(file, 0, SEEK_END);
    const char *map = mmap(NULL, size, PROT_READ, MAP_PRIVATE, file, 0);
    if (map == MAP_FAILED) fputs("tinygpt2: error: ", stderr), perror(path), exit(1);
    if (size < 64 || (memcpy(&data, map, 8), data > size - 8) || data >= 1 << 24 || data % 64 != 56)
        REFUSE("header length: expected 56, 120, 184, below %zu, found %zu", size, data);
    for (const char *p = map + 8; p < map + 8 + data; p++) /* no blanks, no \ of JSON in JSON */
        if (*p > ' ' && *p < 127 && *p != '\\') *out++ = *p == '"' ? '\'' : *p;
    tg_config c;
    char bend[9], eps[32], scale[6], deep[6], tied[6], first[9], last[9], merges[10];
    int known = sscanf(text, "{'__metadata__':{'format':'tinygpt2','format_version':'1','config':'{"
        "'vocab_size':%8d,'n_positions':%8d,'n_embd':%6d,'n_layer':%4d,'n_head':%4d,'n_inner':%7d,"
        "'activation_function':'%8[a-z_]','layer_norm_epsilon':%31[0-9.e-],'scale_attn_weights':"
        "%5[truefals],'scale_attn_by_inverse_layer_idx':%5[truefals],'tie_word_embeddings':"
        "%5[truefals],'bos_token_id':%8[0-9nul],'eos_token_id':%8[0-9nul],'n_merges':%9[0-9nul],"
        "'n_token_bytes':%9d", &c.vocab_size, &c.n_positions, &c.n_embd, &c.n_layer, &c.n_head,
        &c.n_inner, bend, eps, scale, deep, tied, first, last, merges, &n_bytes);
    at = strstr(text, ",'wte.weight'"), data += 8;
    if (!at || known < 15 || c.n_positions < 1 || c.n_embd < 1 || c.n_layer < 1 || c.n_head < 1 ||
        c.n_inner < 1 || n_bytes < 0 || c.n_embd % c.n_head || atoi(first) >= c.vocab_size ||
        atoi(last) >= c.vocab_size || !(atof(eps) >= 0 && atof(eps) < 1) ||
        (strcmp(bend, "gelu_new") && strcmp(bend, "gelu") && strcmp(bend, "relu")))
        REFUSE("header: expected format tinygpt2 1 and a GPT-2's config, found %.999s", text);
    c.activation = *bend == 'r' ? TG_RELU : bend[4] ? TG_GELU_NEW : TG_GELU, c.tied = *tied == 't';
    c.scale_attn_weights = *scale == 't', c.scale_attn_by_inverse_layer_idx = *deep == 't';
    c.layer_norm_epsilon = (float)atof(eps), vocab = c.vocab_size;
    bos = *first == 'n' ? -1 : atoi(first), eos = *last == 'n' ? -1 : atoi(last);
    size_t e = c.n_embd, inner = c.n_inner, words = c.vocab_size;
#define F32(name, a, b, c) *next++ = tensor(name, i, "F32", a, b, c)
#define NORM(name) F32(name ".weight", 0, 0, e), F32(name ".bias", 0, 0, e)
#define LINEAR(name, n, k) F32(name ".weight", up(n) / 16, k, 16), F32(name ".bias", 0, 0, n)
    F32("wte.weight", up(words) / 16, e, 16), F32("wpe.weight", 0, c.n_positions, e);
    for (; i < c.n_layer; i++)
        NORM("h.%d.ln_1"), LINEAR("h.%d.attn.c_attn", 3 * e, e), LINEAR("h.%d.attn.c_proj", e, e),
        NORM("h.%d.ln_2"), LINEAR("h.%d.mlp.c_fc", inner, e), LINEAR("h.%d.mlp.c_proj", e, inner);
    NORM("ln_f");
    if (!c.tied) F32("lm_head.weight", up(words) / 16, e, 16);
    if (*merges != 'n') bytes = map + tensor("vocab.bytes", 0, "U8", 0, 0, n_bytes);
    if (bytes) places = (const void *)(map + tensor("vocab.offsets", 0, "U32", 0, 0, words + 1));
    if (data + place > size) REFUSE("expected %zu bytes, found %zu", data + place, size);
    for (size_t t = 0; places && t <= words; t++)
        if (places[t] > (t < words ? places[t + 1] : (uint32_t)n_bytes))
            REFUSE("vocab.offsets: expected them to rise to %d, found %u", n_bytes, places[t]);
    tg_model *m = tg_model_new(&c, map, offsets, NULL, threads);
    return m ? m : (FAIL(2, "TINYGPT2_ISA: expected what this processor has, found another\n"), m);
}

/* Print a token up to its last whole character, or only remember the rest; as Python decodes. */
static void say(int token, int quiet) {
    static unsigned char b[4];
    for (uint32_t i = places[token]; i < places[token + 1]; i++) {
        int c = (unsigned char)bytes[i], lead = held == 1 ? *b : 0;
        int low = lead == 0xE0 ? 0xA0 : lead == 0xF0 ? 0x90 : 0x80;
        int high = lead == 0xED ? 0x9F : lead == 0xF4 ? 0x8F : 0xBF;
        if (held && (c < low || c > high)) held = 0, fputs(quiet ? "" : "\uFFFD", stdout);
        b[held++] = (unsigned char)c;
        int size = *b < 0x80 ? 1 : *b < 0xC2 || *b > 0xF4 ? 0 : 2 + (*b > 0xDF) + (*b > 0xEF);
        if (held < size) continue;
        fwrite(size ? (char *)b : "\uFFFD", 1, quiet ? 0 : size ? size : 3, stdout), held = 0;
    }
}

int main(int count, char **arguments) {
    tg_options o = {.temperature = 0.8, .top_p = 1, .repetition_penalty = 1, .top_k = 40};
    const char *ids = NULL, *a = "the end", *wish = getenv("TINYGPT2_THREADS");
    double most = 200, threads = wish && *wish ? atoi(wish) : sysconf(_SC_NPROCESSORS_ONLN);
    int print_ids = 0, n = 0, done = 0, part, start;
    uint64_t seed = nanoseconds();
#ifdef CPU_COUNT
    cpu_set_t set;
    if (!(wish && *wish) && !sched_getaffinity(0, sizeof set, &set)) threads = CPU_COUNT(&set);
#endif
    for (int i = 1; i < count; i++) {
        char *end, *v = arguments[i + 1] ? arguments[i + 1] : "";
        double x = strtod(v, &end);
        int ok = *v && !*end, whole = ok && !v[strspn(v, "-0123456789")], natural = whole && x >= 0;
#define OPT(name, good) else if (!strcmp(a, "--" #name) && (good) && ++i < count)
        if (!strcmp(a = arguments[i], "--print-ids")) print_ids = 1;
        OPT(ids, 1) ids = v; OPT(threads, natural && x >= 1 && x <= MAX_THREADS) threads = x;
        OPT(max-tokens, natural) most = x; OPT(top-k, natural) o.top_k = (int)fmin(x, 1e9);
        OPT(temperature, ok && x >= 0 && x <= 1e6) o.temperature = x;
        OPT(seed, whole) for (seed = 0, end = v + (*v == '-'); *end; end++) /* modulo 2^64 */
            seed = seed * 10 + (uint64_t)(*v == '-' ? '0' - *end : *end - '0');
        else if (*a != '-' && !path) path = a;
        else ids = NULL, count = 0;
    }
    if (!path || !ids)
        FAIL(2, "expected FILE.tg2 --ids \"15 99\" [--max-tokens N] [--temperature T] [--top-k K] "
             "[--seed N] [--threads N] [--print-ids], found something else at %s\n", a);
    if (threads < 1) FAIL(2, "TINYGPT2_THREADS: expected a number from 1 to 256, found %s\n", wish);
    tg_model *m = open_model((int)threads);
    tg_session *s = tg_session_new(m, tg_chunk(m));
    int32_t room = m->config.n_positions, *tokens = malloc((room + 1) * sizeof *tokens);
    if (!s || !tokens) FAIL(1, "out of memory\n");
    if (!places && !print_ids) FAIL(2, "%s: no tokenizer inside: use --print-ids\n", path);
    for (char *end; *(ids += strspn(ids, " ,\t\n")); ids = end) {
        long long id = strtoll(ids, &end, 10);
        if (!strchr(" ,\t\n", *end) || id < 0 || id >= vocab || n == room)
            FAIL(2, "--ids: expected at most %d numbers below %d, found %.40s\n", room, vocab, ids);
        tokens[n++] = (int32_t)id;
    }
    for (int i = n < 4 ? 0 : n - 4; !print_ids && i < n; i++) say(tokens[i], 1);
    if (!n && (tokens[n++] = eos < 0 ? bos : eos) < 0) FAIL(2, "--ids: expected one, found none\n");
    for (start = n; n - start < most && done < room; done += part) {
        part = n - done < s->chunk ? n - done : s->chunk;
        if (tg_forward(s, tokens + done, part, done)) while (tg_forward(s, NULL, 0, 0)) {}
        if (done + part < n) continue;
        if (tg_logits(s, part - 1, 1, &(const float *){0})) REFUSE("%s", "NaN or infinite logits");
        uint64_t z = seed += 0x9E3779B97F4A7C15; /* SplitMix64, as in the Python module */
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9, z = (z ^ z >> 27) * 0x94D049BB133111EB;
        o.uniform = (double)((z ^ z >> 31) >> 11) * 0x1p-53;
        if ((tokens[n] = tg_choose(s, &o)) == eos) break;
        print_ids ? (void)printf("%d ", tokens[n]) : say(tokens[n], 0), n++, fflush(stdout);
    }
    puts(n > start && held ? "\uFFFD" : "");
    if (n - start < most && done == room)
        fprintf(stderr, "tinygpt2: stopped: all %d positions of the context are used\n", room);
}
#endif
#endif
