/* kernels.c: the forward pass of GPT-2 in C, at the speed of the memory, the same bits everywhere.
 *
 * Goals      One inner loop, fed with weights in the order of the file. The same logits, bit for
 *            bit, on every instruction set, with any number of threads, however a prompt is cut.
 * Non-goals  Training, other number formats, other architectures, a BLAS.
 *
 * The rule behind the equal bits: vector lanes run over outputs, so every output is one chain of
 * fused multiply-adds over its inputs, in order. Sums across lanes (layer norm, softmax) are in 16
 * lanes, lane = index modulo 16, joined by one fixed tree; exp and erfc are polynomials of our own.
 *
 * build.py compiles this once for each instruction set, -DTG_ISA=avx512|avx2|neon|portable, which
 * gives a table of operations, and once without for the rest; -DTG_STANDALONE adds a command.
 * Nothing here prints, exits, or keeps a pointer to an argument but to the weights.
 *
 * SPDX-License-Identifier: MIT */
#define _GNU_SOURCE 1
#include <fenv.h>
#include <limits.h>
#include <math.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
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
    double temperature, top_p, min_p, repetition_penalty, uniform; /* uniform: random, 0 <= u < 1 */
    const double *bias;                /* [n_bias] */
    const int32_t *bias_tokens, *seen; /* [n_bias], [n_seen], each without repetition */
    int32_t top_k, n_bias, n_seen;
} tg_options;
typedef struct tg_model tg_model;     /* a file's weights, for any number of sessions */
typedef struct tg_session tg_session; /* one text: its keys and values, its logits */
/* The operations of one instruction set. up(n) is n rounded up to whole 16 lanes; no vector needs
 * to be aligned, and nothing is read or written beyond the sizes that are told. */
typedef struct {
    const char *name;
    double budget; /* multiply-adds that take some 40 ms at worst, between two looks at the clock */
    /* c[m, 16 panels] = bias[16 panels] (NULL: zeros) + a[m, k] x w[panels, k, 16], where rows of
     * a and c are lda and ldc floats apart, panels of w `stride` floats. */
    void (*product)(const float *a, size_t lda, int m, const float *w, size_t stride, int panels,
                    int k, const float *bias, float *c, size_t ldc);
    void (*layer_norm)(const float *x, const float *weight, const float *bias, float epsilon, int n,
                       float *y);                            /* x[n]; weight, bias, y [up(n)] */
    void (*activate[3])(float *x, int n);                    /* in place, [up(n)] */
    void (*softmax)(float *x, int n, int end, float scale);  /* in place, [up(end)]; see there */
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
 * sizes must have been checked; the file must outlive the model. NULL: no `isa`, or no memory. */
TG_API tg_model *tg_model_new(const tg_config *config, const void *file, const int64_t *offsets,
                              const char *isa, int threads);
TG_API void tg_model_free(tg_model *model);
TG_API int tg_chunk(const tg_model *model); /* how many tokens to compute at a time at most */
/* With all memory that it ever uses, also to compute `chunk` tokens at a time. NULL: too much. */
TG_API tg_session *tg_session_new(const tg_model *model, int chunk);
TG_API void tg_session_free(tg_session *session);
/* Compute n tokens at the positions from `start`; those before must have been computed. TG_MORE
 * after 20 ms or so: go on by calling with n = 0, or give this up by calling with other tokens. */
TG_API int tg_forward(tg_session *session, const int32_t *tokens, int n, int start);
/* The logits after `count` of these tokens (at most LOGIT_ROWS) from index `first`: rows in
 * *logits, up(vocab_size) floats apart, until the session is used again. */
TG_API int tg_logits(tg_session *session, int first, int count, const float **logits);
TG_API double tg_log_probability(const tg_session *session, int row, int32_t token);
/* The next token after the logits' row 0; -1 if the bias rules out every one, or -TG_BUSY. */
TG_API int32_t tg_choose(tg_session *session, const tg_options *options);
_Static_assert(sizeof(size_t) == 8, "the largest models need sizes of 64 bits");
static inline size_t up(size_t n) { return (n + LANES - 1) / LANES * LANES; }
#ifdef TG_ISA
/* ---- 1. The compiler's vectors; an instruction set adds their width and its multiply-add ----- */
#define INLINE static inline __attribute__((always_inline))
#define JOIN(a, b) a##b
#define TEXT(a) #a
#define EXPAND(macro, ...) macro(__VA_ARGS__)
#ifdef __clang__
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 64")
#endif
#define WIDTH_avx512 16 /* floats in a vector */
#define WIDTH_avx2 8
#define WIDTH_neon 4
#define WIDTH_portable 1
#define WIDTH EXPAND(JOIN, WIDTH_, TG_ISA)
typedef float vec __attribute__((vector_size(4 * WIDTH)));
typedef vec loose __attribute__((aligned(4), may_alias)); /* in memory, at any address */
typedef int32_t bits __attribute__((vector_size(4 * WIDTH)));
#if WIDTH >= 8
#include <immintrin.h>
#elif WIDTH == 4
#include <arm_neon.h>
#endif
#define FMA_avx512(a, b, c) _mm512_fmadd_ps(a, b, c)
#define FMA_avx2(a, b, c) _mm256_fmadd_ps(a, b, c)
#define FMA_neon(a, b, c) vfmaq_f32(c, a, b)
#define FMA_portable(a, b, c) (vec){fmaf((a)[0], (b)[0], (c)[0])}
#define FMA EXPAND(JOIN, FMA_, TG_ISA)
enum { PARTS = LANES / WIDTH };
/* For all i below n in steps of a vector, whose place in sixteen lanes is `part`. */
#define EACH(n) for (int from = 0; from < (n); from += LANES) \
    UNROLL for (int part = 0, i = from; part < PARTS; part++, i += WIDTH)
INLINE vec load(const float *x) { return *(const loose *)x; }
INLINE void store(float *x, vec a) { *(loose *)x = a; }
INLINE vec all(float x) { return x - (vec){0}; } /* as -0 - 0 is -0 */
/* x > y ? a : b, so b where x or y is not a number */
INLINE vec pick(vec x, vec y, vec a, vec b) {
    bits above = x > y;
    return (vec)((above & (bits)a) | (~above & (bits)b));
}
INLINE vec max(vec a, vec b) { return pick(a, b, a, b); }
INLINE vec minus_abs(vec a) { return pick(a, all(0), 0 - a, a); }
/* The end of an array: lanes from `count` on are not read but filled. */
INLINE vec load_some(const float *x, int count, float fill) {
    vec a = count < WIDTH ? all(fill) : load(x);
    for (int i = 0; i < count && count < WIDTH; i++) a[i] = x[i];
    return a;
}
/* The sum of sixteen lanes by the one tree: those 8, 4, 2, 1 apart. */
INLINE float sum_of(const vec *lanes) {
    float x[LANES];
    EACH(LANES) store(x + i, lanes[part]);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) x[i] += x[i + half];
    return x[0];
}
static float max_of(const float *x, int n) {
    float top = -INFINITY;
    vec lanes[PARTS];
    EACH(LANES) lanes[part] = all(top);
    EACH(n) lanes[part] = max(load_some(x + i, n - i, top), lanes[part]);
    for (int i = 0; i < LANES; i++) top = fmaxf(top, lanes[i / WIDTH][i % WIDTH]);
    return top;
}

/* ---- 2. The microkernel -------------------------------------------------------------------------
 * ROWS x PANELS x 16 sums fill the registers; DEPTH inputs of PANELS, the nearest cache. One row
 * asks for its weights AHEAD bytes early, across pages, where the processor's prefetching ends;
 * FEW_TILES or less ask for those of the next inputs. A tile's rows of a are APART. */
enum { ROWS = WIDTH == 16 ? 12 : 6, PANELS = WIDTH == 16 ? 2 : 1, DEPTH = 256, AHEAD = 2048 };
enum { FEW_TILES = 16, APART = DEPTH + LANES };
typedef struct { /* c = init (NULL: zeros) + a[rows, k] x w[panels, k, 16], with their strides */
    const float *a, *w, *init;
    float *c;
    size_t stride, ldi, ldc, k;
    uintptr_t next, step; /* what to prefetch at each input, in bytes; step 0: nothing */
} operands;

/* The sums stay in registers over all inputs: all but `o` are constants where this is inlined, so
 * that only the loop over k remains. */
INLINE void tile(int rows, int panels, int early, operands o) {
    vec sum[ROWS][4 * PARTS], b[4 * PARTS];
#define EACH_SUM \
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int j = 0; j < panels * PARTS; j++)
    EACH_SUM sum[r][j] = o.init ? load(o.init + r * o.ldi + j * WIDTH) : all(0);
    for (size_t p = 0; p < o.k; p++, o.w += LANES, o.next += o.step) {
        if (early) __builtin_prefetch((const void *)o.next, 0, 2);
        UNROLL for (int j = 0; j < panels * PARTS; j++) {
            if (rows == 1 && j % PARTS == 0)
                __builtin_prefetch((const void *)((uintptr_t)(o.w + j / PARTS * o.stride) + AHEAD));
            b[j] = load(o.w + j / PARTS * o.stride + j % PARTS * WIDTH);
        }
        UNROLL for (int r = 0; r < rows; r++) {
            vec x = all(o.a[r * APART + p]);
            UNROLL for (int j = 0; j < panels * PARTS; j++) sum[r][j] = FMA(x, b[j], sum[r][j]);
        }
    }
    EACH_SUM store(o.c + r * o.ldc + j * WIDTH, sum[r][j]);
}
static void any_tile(int rows, int panels, operands o) {
#define TILE(r, most) case r: if (r > ROWS) break; \
    if (panels < most) { tile(r, 1, 0, o); break; } \
    if (WIDTH > 1 && o.step) { tile(r, most, 1, o); break; } tile(r, most, 0, o); break;
    switch (rows) {
        TILE(1, 4) TILE(2, PANELS) TILE(3, PANELS) TILE(4, PANELS) TILE(5, PANELS) TILE(6, PANELS)
        TILE(7, 2) TILE(8, 2) TILE(9, 2) TILE(10, 2) TILE(11, 2) TILE(12, 2)
    }
}

/* The product of the table, by tiles of nearly equal height. Storing and reloading sums between
 * blocks of inputs continues their chains. Rows of a are first copied side by side: one fetch for
 * all panels, one register for all addresses. One row takes four panels: more streams of memory. */
static void product(const float *a, size_t lda, int m, const float *w, size_t stride, int panels,
                    int k, const float *bias, float *c, size_t ldc) {
    int most = m == 1 ? 4 : PANELS, depth = m == 1 ? k : DEPTH, tiles = (m + ROWS - 1) / ROWS;
    int share = (tiles + PANELS - 1) / PANELS; /* of how many tiles one prefetches a panel */
    float block[ROWS * APART];
    for (int p = 0; p < k; p += depth) {
        if (depth > k - p) depth = k - p;
        for (int t = 0, row = 0, rows; t < tiles; t++, row += rows) {
            rows = (m - row) / (tiles - t);
            for (int r = 0; r < rows && m > 1; r++)
                memcpy(block + r * APART, a + (row + r) * lda + p, depth * sizeof *a);
            /* After these weights come the next inputs, or panels; of them, this tile's part: */
            size_t later = p + depth < k ? (size_t)depth * LANES : panels * stride - p * LANES;
            size_t step = m > 1 && tiles <= FEW_TILES ? LANES * sizeof *w / share : 0;
            later = (later + t / share * stride) * sizeof *w + t % share * depth * step;
            for (int j = 0, width; j < panels; j += width) {
                width = panels - j < most ? 1 : most;
                const float *from = w + j * stride + (size_t)p * LANES;
                float *out = c + row * ldc + j * LANES;
                const float *init = p ? out : bias ? bias + j * LANES : NULL;
                any_tile(rows, width, (operands){m > 1 ? block : a, from, init, out, stride,
                         p ? ldc : 0, ldc, depth, (uintptr_t)from + later, step});
            }
        }
    }
}

/* ---- 3. The small operations ----------------------------------------------------------------- */
/* exp(x) for x <= 0, within 1 ulp or so; below -87 it is exp(-87), and NaN stays NaN. x is
 * n ln 2 + r with |r| <= ln 2 / 2, and exp(r) = 1 + r + r^2 p(r), p a minimax polynomial. */
INLINE vec v_exp(vec x) {
    static const float p[] = {0.0013814597f, 0.008368717f, 0.04166839f, 0.16666521f, 0.49999994f};
    const float round = 12582912.0f; /* 1.5 * 2^23: with it, t is n in the lowest bits */
    x = max(all(-87), x);
    vec t = FMA(x, all(1.44269504f), all(round)), n = t - round, sum = all(p[0]);
    vec r = FMA(n, all(2.12194440e-4f), FMA(n, all(-0.693359375f), x)); /* ln 2 in two parts, */
    UNROLL for (int i = 1; i < 5; i++) sum = FMA(sum, r, all(p[i])); /* the first exact times n */
    return (FMA(r * r, sum, r) + 1) * (vec)(((bits)t << 23) + (127 << 23)); /* times 2^n */
}

/* 0.5 x (1 + tanh u) is x / (1 + exp(-2u)), or with e = exp(-2|u|), which cannot overflow,
 * x / (1 + e) for u > 0 and x e / (1 + e) otherwise: nothing cancels on either side. */
INLINE vec v_gelu_new(vec x) {
    const float root = 0.79788456f, cubic = 0.79788456f * 0.044715f;
    vec e = v_exp(2 * minus_abs(x * FMA(x * x, all(cubic), all(root))));
    return x * pick(x, all(0), all(1), e) / (1 + e);
}

/* x P(Z <= x), with P(Z > |x|) = erfc(z) / 2 for z = |x| / sqrt 2, and erfc(z) = exp(-z^2) t q(t)
 * with t = 1 / (1 + 0.4 z) and a minimax polynomial q, exact to 7e-9 for z up to 9.4. What
 * rounding loses of x^2 is put back, as exp would magnify it. */
INLINE vec v_gelu(vec x) {
    static const float q[] = {-0.030800663f, 0.20460011f, -0.5143945f, 0.5683587f, -0.30190295f,
                              0.2815611f, 0.12636495f, 0.21563728f, 0.22486451f, 0.22571148f};
    vec z = max(all(-13), minus_abs(x)); /* -sqrt 2 z; beyond, erfc is nothing */
    vec square = z * z, lost = FMA(z, z, -square), e = v_exp(square * -0.5f);
    vec t = 1 / FMA(z, all(-0.4f * 0.70710678f), all(1)), sum = all(q[0]);
    UNROLL for (int i = 1; i < 10; i++) sum = FMA(sum, t, all(q[i]));
    vec above = FMA(lost * -0.5f, e, e) * t * sum * 0.5f;
    return x * pick(x, all(0), 1 - above, above);
}

static void exp_all(float *x, int n) { EACH(n) store(x + i, v_exp(load(x + i))); }
static void gelu_new(float *x, int n) { EACH(n) store(x + i, v_gelu_new(load(x + i))); }
static void gelu(float *x, int n) { EACH(n) store(x + i, v_gelu(load(x + i))); }
static void relu(float *x, int n) { EACH(n) store(x + i, max(all(0), load(x + i))); }
/* Ba et al. 2016, with epsilon inside the root. */
static void layer_norm(const float *x, const float *weight, const float *bias, float epsilon, int n,
                       float *y) {
    vec sum[PARTS] = {{0}}, squares[PARTS] = {{0}};
    EACH(n) sum[part] += load_some(x + i, n - i, 0);
    float mean = sum_of(sum) / (float)n;
    EACH(n) store(y + i, load_some(x + i, n - i, mean) - mean);
    EACH(n) squares[part] = FMA(load(y + i), load(y + i), squares[part]);
    float scale = 1 / sqrtf(sum_of(squares) / (float)n + epsilon);
    EACH(n) store(y + i, FMA(load(y + i) * scale, load(weight + i), load(bias + i)));
}

/* Scores to weights of attention: x[i] = exp(scale x[i] - their maximum) for i < n, then zeros, for
 * the positions that must not be seen, and all of it times 1 / the sum. The weights add up to 1
 * before any value is weighted: a sum of huge values divided only afterwards would overflow. */
static void softmax(float *x, int n, int end, float scale) {
    vec sum[PARTS] = {{0}};
    float top = scale * max_of(x, n);
    EACH(n) store(x + i, v_exp(load(x + i) * scale - top));
    for (int i = n; i < (int)up(end); i++) x[i] = 0;
    EACH(n) sum[part] += load(x + i);
    vec share = all(1 / sum_of(sum));
    EACH(n) store(x + i, load(x + i) * share);
}
static void log_sum(const float *x, int n, float *top, float *sum) {
    vec lanes[PARTS] = {{0}};
    *top = max_of(x, n);
    EACH(n) lanes[part] += v_exp(load_some(x + i, n - i, -INFINITY) - *top);
    *sum = sum_of(lanes);
}
static int best(const float *x, int n) {
    vec zero[PARTS] = {{0}};
    EACH(n) zero[part] += 0 * load_some(x + i, n - i, 0);
    if (!(sum_of(zero) == 0)) return -1; /* 0 x is 0 only for finite x */
    float top = max_of(x, n);
    for (n = 0; x[n] != top;) n++;
    return n;
}
const tg_kernels EXPAND(JOIN, tg_kernels_, TG_ISA) = {
    EXPAND(TEXT, TG_ISA), WIDTH == 1 ? 4e7 : 2e9, product, layer_norm,
    {gelu_new, gelu, relu}, softmax, log_sum, exp_all, best};
#else
/* ---- 4. Which instruction set ---------------------------------------------------------------- */
const char *tg_version(void) { return TG_VERSION; } /* build.py takes it from the Python module */
extern const tg_kernels tg_kernels_avx512, tg_kernels_avx2, tg_kernels_neon, tg_kernels_portable;
#if defined(__x86_64__)
#include <cpuid.h>
#endif
/* CPUID tells what the processor can do, XGETBV whether the system saves the registers for it. */
const tg_kernels *tg_find_kernels(const char *wanted) {
    const tg_kernels *found[3] = {&tg_kernels_portable}; /* the best one last */
    int n = 1;
#if defined(__x86_64__)
    unsigned a, b = 0, c = 0, d, saved = 0;
    if (__get_cpuid(1, &a, &b, &c, &d) && (c & bit_OSXSAVE))
        __asm__("xgetbv" : "=a"(saved), "=d"(d) : "c"(0));
    int fma = (c & bit_FMA) && __get_cpuid_count(7, 0, &a, &b, &c, &d);
    if (fma && (b & bit_AVX2) && (saved & 6) == 6) found[n++] = &tg_kernels_avx2;
    if (n > 1 && (b & bit_AVX512F) && (saved & 0xe6) == 0xe6) found[n++] = &tg_kernels_avx512;
#elif defined(__aarch64__)
    found[n++] = &tg_kernels_neon;
#endif
    if (!wanted) wanted = getenv("TINYGPT2_ISA");
    while (n--)
        if (!wanted || !*wanted || !strcmp(found[n]->name, wanted)) return found[n];
    return NULL;
}
const char *tg_isa_name(const char *wanted) {
    const tg_kernels *kernels = tg_find_kernels(wanted);
    return kernels ? kernels->name : NULL;
}

/* ---- 5. Models and sessions ------------------------------------------------------------------ */
enum { WTE, WPE, LAYERS }; /* the tensors in the file's order: these, the layers', the last */
enum { LN_1, C_ATTN = 2, ATTN_PROJ = 4, LN_2 = 6, C_FC = 8, MLP_PROJ = 10, LAYER = 12 };
enum { LN_F, LM_HEAD = 2 }; /* each but wte, wpe and lm_head is a weight and a bias */
enum { STEPS = 4, ATTENTION_ROWS = 24 }; /* of a layer; tokens whose attention is side by side */

struct tg_model {
    tg_config config;
    const tg_kernels *kernels;
    int threads, head_size;
    const float *tensors[]; /* matrices [up(outputs) / 16, inputs, 16]; wpe [.., up(n_embd)] */
};
typedef struct { double score; float e; int32_t token; } candidate;
struct tg_session {
    _Alignas(64) const tg_model *model;
    atomic_flag busy;
    fenv_t env; /* of the caller's arithmetic, while ours is the usual */
    int chunk, n, start, step; /* of the pass under way: tokens, where the first is, steps done */
    int best, heap, all; /* after row 0 of the logits: the greedy choice; how many candidates */
    size_t narrow, wide, reach; /* how far apart rows are: of x and a; of h; of weights */
    float *keys;        /* [n_layer, n_head, up(n_positions) / 16, head_size, 16]: by position */
    float *values;      /* [n_layer, n_head, up(head_size) / 16, n_positions, 16] */
    float *x;           /* [chunk, n_embd]: the residual stream */
    float *a;           /* [chunk, n_embd]: what a layer norm, attention or the MLP makes of it */
    float *h;           /* [chunk, 3 n_embd or n_inner] */
    float *weights;     /* [threads, ATTENTION_ROWS, n_positions, then head_size]: of attention */
    float *logits;      /* [LOGIT_ROWS, up(vocab_size)] */
    float *e;           /* [up(vocab_size)]: for the choice of a token, as are */
    candidate *candidates; /* [heap]: a heap, [all - heap]: what came out of it, the best last */
};

tg_model *tg_model_new(const tg_config *config, const void *file, const int64_t *offsets,
                       const char *isa, int threads) {
    const tg_kernels *kernels = tg_find_kernels(isa);
    int n = LAYERS + config->n_layer * LAYER + LM_HEAD + !config->tied;
    tg_model *m = kernels ? malloc(sizeof *m + n * sizeof *m->tensors) : NULL;
    if (!m) return NULL;
    m->config = *config, m->kernels = kernels, m->head_size = config->n_embd / config->n_head;
    m->threads = threads < 1 ? 1 : threads > MAX_THREADS ? MAX_THREADS : threads;
    for (int i = 0; i < n; i++) m->tensors[i] = (const float *)((const char *)file + offsets[i]);
    return m;
}
void tg_model_free(tg_model *model) { free(model); }
void tg_session_free(tg_session *session) { free(session); }
int tg_chunk(const tg_model *m) {
    const tg_config *c = &m->config;
    double step = fmax(fmax(c->n_inner, 3.0 * c->n_embd), 2.0 * c->n_positions) * c->n_embd;
    return (int)fmax(1, fmin(512, m->kernels->budget / step));
}
tg_session *tg_session_new(const tg_model *m, int chunk) {
    const tg_config *c = &m->config;
    size_t d = m->head_size, heads = (size_t)c->n_layer * c->n_head, words = up(c->vocab_size);
    size_t wide = up(c->n_inner > 3 * c->n_embd ? c->n_inner : 3 * c->n_embd);
    /* 64 bytes more in a row keep one column of many rows out of a single set of the cache. */
    tg_session *s = NULL, new = {.model = m, .chunk = chunk, .narrow = up(c->n_embd) + LANES,
        .wide = wide + LANES, .reach = up(c->n_positions) + up(d) + LANES};
    while (chunk > 0) { /* once to add up the sizes, in whole 64 bytes, once to give them memory */
        uintptr_t end = (uintptr_t)s + sizeof new;
#define PLACE(field, count) new.field = (void *)end, end += (count) * sizeof *new.field
        PLACE(keys, heads * up(c->n_positions) * d), PLACE(values, heads * c->n_positions * up(d));
        PLACE(x, chunk * new.narrow), PLACE(a, chunk * new.narrow), PLACE(h, chunk * new.wide);
        PLACE(weights, m->threads * ATTENTION_ROWS * new.reach), PLACE(logits, LOGIT_ROWS * words);
        PLACE(e, words), PLACE(candidates, words);
        if (s) return memcpy(s, &new, sizeof new);
        if (!(s = aligned_alloc(64, end))) break;
    }
    return NULL;
}

/* ---- 6. Threads ---------------------------------------------------------------------------------
 * One pool for the process, started when a forward pass first has work for it. A job is some units,
 * which whoever is free takes one by one; what a unit gives depends not on whom. */
typedef struct { /* what the units of a job share; a job leaves out what it does not need */
    tg_session *s;
    const int32_t *tokens;        /* [m] */
    const float *in, *const *w;   /* [m, k]; a weight [up(n) / 16, k, 16] and a bias [up(n)] */
    float *out, *add;             /* [m, n]: h when `in` is a, or a when it is h; added to what */
    void (*then)(float *x, int n);/* on the outputs */
    int m, k, n, group;           /* group: how many of the n are in a unit */
} task;
static struct {
    /* Who may help (10 bits), how many units, which is next (27 each). Who takes a unit by
     * compare-and-swap may read `run` and `t`: they change only after every unit is done. */
    _Alignas(64) _Atomic uint64_t ticket;
    _Alignas(64) _Atomic int done;
    _Alignas(64) void (*run)(const task *t, int unit);
    const task *t;
    atomic_flag taken; /* by the one job that uses the pool */
    int workers;
    pthread_mutex_t lock;
    pthread_cond_t wake;
} pool = {.lock = PTHREAD_MUTEX_INITIALIZER, .wake = PTHREAD_COND_INITIALIZER};
static _Thread_local int worker; /* which of them this thread is; 0: the caller */
static int64_t nanoseconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * INT64_C(1000000000) + t.tv_nsec;
}

/* The ticket, if it has a unit left for this thread, else 0. */
static uint64_t offer(void) {
    uint64_t t = atomic_load(&pool.ticket), mask = (1 << 27) - 1;
    return worker < (int)(t >> 54) && (t & mask) < (t >> 27 & mask) ? t : 0;
}
static void work(void) {
    for (uint64_t t; (t = offer());)
        if (atomic_compare_exchange_weak(&pool.ticket, &t, t + 1)) {
            pool.run(pool.t, t & ((1 << 27) - 1));
            atomic_fetch_add(&pool.done, 1);
        }
}

/* A worker looks out for work for a fifth of a millisecond, which bridges the gaps between layers
 * and between tokens, then sleeps: an idle process uses no processor. */
static void *worker_main(void *index) {
    for (worker = (int)(intptr_t)index;; work()) {
        for (int64_t until = nanoseconds() + 200000; !offer() && nanoseconds() < until;) {}
        if (offer()) continue;
        pthread_mutex_lock(&pool.lock);
        while (!offer()) pthread_cond_wait(&pool.wake, &pool.lock);
        pthread_mutex_unlock(&pool.lock);
    }
    return NULL;
}

/* A forked child has none of its parent's threads: it starts its own when it needs them. */
static void forget_workers(void) {
    memset((void *)&pool, 0, sizeof pool);
    pthread_mutex_init(&pool.lock, NULL);
    pthread_cond_init(&pool.wake, NULL);
}

/* Start the workers that are missing, deaf to signals. Where the system gives fewer, fewer work. */
static void start_workers(int count) {
    static int prepared;
    sigset_t all, old;
    prepared = prepared || !pthread_atfork(NULL, NULL, forget_workers);
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    for (pthread_t thread; pool.workers < count; pool.workers++) {
        if (pthread_create(&thread, NULL, worker_main, (void *)(intptr_t)(pool.workers + 1))) break;
        pthread_detach(thread);
    }
    pthread_sigmask(SIG_SETMASK, &old, NULL);
}

/* Compute all units of a job. Who finds the pool taken works alone, and so does who has little work
 * (`cost` in multiply-adds): it is not worth the wait for another processor. */
static void parallel(void (*run)(const task *, int), const task *t, int units, double cost) {
    int threads = t->s->model->threads;
    if (threads < 2 || units < 2 || cost < 1e5 || atomic_flag_test_and_set(&pool.taken)) {
        for (int unit = 0; unit < units; unit++) run(t, unit);
        return;
    }
    if (pool.workers < threads - 1) start_workers(threads - 1);
    pool.run = run, pool.t = t;
    atomic_store(&pool.done, 0);
    atomic_store(&pool.ticket, (uint64_t)threads << 54 | (uint64_t)units << 27);
    pthread_mutex_lock(&pool.lock); /* nobody is between his last look and his sleep */
    pthread_cond_broadcast(&pool.wake);
    pthread_mutex_unlock(&pool.lock);
    work();
    for (int64_t until = nanoseconds() + 50000; atomic_load(&pool.done) < units;)
        if (nanoseconds() > until) sched_yield(); /* perhaps more threads than processors */
    atomic_flag_clear(&pool.taken);
}

/* ---- 7. The forward pass --------------------------------------------------------------------- */
/* out = in w + bias, for one group of outputs, and what comes after it */
static void linear_unit(const task *t, int unit) {
    const tg_session *s = t->s;
    size_t from = (size_t)unit * t->group, all = up(t->n), k = t->k;
    size_t apart = t->out == s->logits ? all : t->out == s->h ? s->wide : s->narrow;
    int n = (int)(all - from) < t->group ? (int)(all - from) : t->group;
    float *out = t->out + from;
    s->model->kernels->product(t->in, t->in == s->h ? s->wide : s->narrow, t->m,
                               t->w[0] + from * k, k * LANES, n / LANES, t->k,
                               t->w[1] ? t->w[1] + from : NULL, out, apart);
    for (int i = 0; i < t->m; i++, out += apart) {
        if (t->then) t->then(out, n);
        for (int j = 0; t->add && j < n; j++) t->add[i * s->narrow + from + j] += out[j];
    }
}

/* For one row, units of long stretches of memory, and many, so that none waits long for the last;
 * for more, of many panels for each copy of the rows, and as many as let all end together. */
static void linear(tg_session *s, int m, task t) {
    t.s = s, t.m = m;
    int panels = (int)up(t.n) / LANES, threads = s->model->threads, group = 32, least = INT_MAX;
    while (group > 1 && panels < group * threads * (group > 4 ? 8 : 2)) group /= 2;
    for (int g = m > 192 ? 24 : m > 1 ? 16 : 0; g; g -= g > 4 ? 4 : 1) {
        int most = ((panels + g - 1) / g + threads - 1) / threads * g; /* that a thread gets */
        if (most < least) least = most, group = g;
    }
    t.group = group * LANES;
    if (!t.out) t.out = t.in == s->a ? s->h : s->a;
    parallel(linear_unit, &t, (panels + group - 1) / group, (double)m * t.k * t.n);
}
/* a = layer norm of in */
static void norm_unit(const task *t, int i) {
    const tg_config *c = &t->s->model->config;
    t->s->model->kernels->layer_norm(t->in + i * t->s->narrow, t->w[0], t->w[1],
                                     c->layer_norm_epsilon, c->n_embd, t->s->a + i * t->s->narrow);
}

/* x = the token's embedding, which is one column of one panel, plus where it stands */
static void embed_unit(const task *t, int i) {
    size_t token = t->tokens[i], d = t->s->model->config.n_embd;
    const float *wte = t->s->model->tensors[WTE] + token / LANES * d * LANES + token % LANES;
    const float *wpe = t->s->model->tensors[WPE] + (t->s->start + i) * up(d);
    for (size_t e = 0; e < d; e++) t->s->x[i * t->s->narrow + e] = wte[e * LANES] + wpe[e];
}

/* a = what one head of each token gathers from the tokens up to itself. Keys and values go from h
 * into the cache; then, ATTENTION_ROWS tokens at a time, scores, weights, values by weight. */
static void attention_unit(const task *t, int head) {
    const tg_session *s = t->s;
    const tg_config *c = &s->model->config;
    const tg_kernels *f = s->model->kernels;
    size_t d = s->model->head_size, positions = c->n_positions, wide = s->wide, reach = s->reach;
    size_t which = (size_t)(s->step / STEPS) * c->n_head + head;
    float *keys = s->keys + which * up(positions) * d, *query = s->h + head * d;
    float *values = s->values + which * positions * up(d), *gathered = s->a + head * d;
    float *p = s->weights + worker * ATTENTION_ROWS * reach, *y = p + up(positions);
    for (int i = 0; i < s->n; i++) {
        const float *key = query + i * wide + c->n_embd, *value = key + c->n_embd;
        size_t at = s->start + i;
        for (size_t e = 0; e < d; e++) keys[(at / LANES * d + e) * LANES + at % LANES] = key[e];
        for (size_t e = 0; e < d; e += LANES)
            memcpy(values + e * positions + at * LANES, value + e,
                   (d - e < LANES ? d - e : LANES) * sizeof *value);
    }
    double scale = c->scale_attn_weights ? 1 / sqrt((double)d) : 1;
    if (c->scale_attn_by_inverse_layer_idx) scale /= s->step / STEPS + 1;
    for (int first = 0, n; first < s->n; first += n) {
        n = s->n - first < ATTENTION_ROWS ? s->n - first : ATTENTION_ROWS;
        int end = s->start + first + n;
        f->product(query + first * wide, wide, n, keys, d * LANES, (int)up(end) / LANES, (int)d,
                   NULL, p, reach);
        for (int i = 0; i < n; i++)
            f->softmax(p + i * reach, end - n + i + 1, end, (float)scale);
        f->product(p, reach, n, values, positions * LANES, (int)up(d) / LANES, end, NULL, y, reach);
        for (int i = 0; i < n; i++)
            for (size_t e = 0; e < d; e++)
                gathered[(first + i) * s->narrow + e] = y[i * reach + e];
    }
}

/* The transformer: attention, then the MLP, each added to x. The clock is looked at between these
 * steps, so that many tokens can go together: then each weight comes from memory once for all. */
static void forward_step(tg_session *s) {
    const tg_config *c = &s->model->config;
    const float *const *w = s->model->tensors + LAYERS + s->step / STEPS * LAYER;
    int m = s->n, d = c->n_embd, inner = c->n_inner, step = s->step % STEPS;
    const task norm = {.s = s, .in = s->x, .w = w + (step ? LN_2 : LN_1)}, lines[STEPS] = {
        {.in = s->a, .k = d, .w = w + C_ATTN, .n = 3 * d},
        {.in = s->a, .k = d, .w = w + ATTN_PROJ, .n = d, .add = s->x},
        {.in = s->a, .k = d, .w = w + C_FC, .n = inner,
         .then = s->model->kernels->activate[c->activation]},
        {.in = s->h, .k = inner, .w = w + MLP_PROJ, .n = d, .add = s->x}};
    if (step % 2 == 0) parallel(norm_unit, &norm, m, 4.0 * m * d);
    if (step == 1) parallel(attention_unit, &norm, c->n_head, (double)m * (s->start + m) * d);
    linear(s, m, lines[step]);
}
/* From `enter`, unless it is 0, to `leave` the session is ours, and numbers are rounded as usual,
 * whatever the caller told the processor: the bits must not depend on that. */
static int enter(tg_session *s) {
    return !atomic_flag_test_and_set(&s->busy) && !fegetenv(&s->env) && !fesetenv(FE_DFL_ENV);
}
static int leave(tg_session *s, int r) { return fesetenv(&s->env), atomic_flag_clear(&s->busy), r; }

int tg_forward(tg_session *s, const int32_t *tokens, int n, int start) {
    const tg_config *c = &s->model->config;
    int64_t until = nanoseconds() + 20000000;
    if (!enter(s)) return TG_BUSY;
    if (n || !s->n) {
        int fits = n > 0 && n <= s->chunk && start >= 0 && start <= c->n_positions - n;
        for (int i = 0; i < n && fits; i++) fits = tokens[i] >= 0 && tokens[i] < c->vocab_size;
        if (!fits) return leave(s, TG_BAD_ARGUMENT);
        s->n = n, s->start = start, s->step = 0;
        parallel(embed_unit, &(task){.s = s, .tokens = tokens}, n, 8.0 * n * c->n_embd);
    }
    for (; s->step < c->n_layer * STEPS && nanoseconds() < until; s->step++) forward_step(s);
    return leave(s, s->step < c->n_layer * STEPS ? TG_MORE : TG_DONE);
}
int tg_logits(tg_session *s, int first, int count, const float **logits) {
    const tg_model *m = s->model;
    const float *const *last = m->tensors + LAYERS + m->config.n_layer * LAYER;
    const float *head[] = {m->config.tied ? m->tensors[WTE] : last[LM_HEAD], NULL};
    int d = m->config.n_embd, size = m->config.vocab_size, best = 0;
    if (!enter(s)) return TG_BUSY;
    int fits = s->n && s->step == m->config.n_layer * STEPS && count > 0 && count <= LOGIT_ROWS;
    if (!fits || first < 0 || first > s->n - count) return leave(s, TG_BAD_ARGUMENT);
    task norm = {.s = s, .in = s->x + first * s->narrow, .w = last + LN_F};
    parallel(norm_unit, &norm, count, 4.0 * count * d);
    linear(s, count, (task){.in = s->a, .k = d, .w = head, .n = size, .out = s->logits});
    for (int i = count; i-- && best >= 0;) best = m->kernels->best(s->logits + i * up(size), size);
    s->best = best, *logits = s->logits;
    return leave(s, best < 0 ? TG_NOT_FINITE : TG_DONE);
}
double tg_log_probability(const tg_session *s, int row, int32_t token) {
    const float *x = s->logits + row * up(s->model->config.vocab_size);
    float top, sum;
    s->model->kernels->log_sum(x, s->model->config.vocab_size, &top, &sum);
    return (double)x[token] - top - log(sum);
}

/* ---- 8. The choice of a token: the filters and the draw of the Python module's section 6 ----- */
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
/* The i-th best candidate. Only as many are put in order as are looked at. */
static candidate nth(tg_session *s, int i) {
    candidate *c = s->candidates;
    while (s->all - s->heap <= i) {
        candidate best = c[0];
        c[0] = c[--s->heap], c[s->heap] = best;
        sink(c, s->heap, 0);
    }
    return c[s->all - 1 - i];
}

int32_t tg_choose(tg_session *s, const tg_options *o) {
    candidate *c = s->candidates;
    double mass = 0, sum = 0, drawn = 0;
    int n = 0, size = s->model->config.vocab_size, kept, i = 0;
    if (!enter(s)) return -TG_BUSY;
    if (o->temperature == 0 && !o->n_bias && !o->n_seen) return leave(s, s->best);
    for (int t = 0; t < size; t++) c[t] = (candidate){s->logits[t], 0, t};
    for (int t = 0; t < o->n_bias; t++) c[o->bias_tokens[t]].score += o->bias[t];
    for (int t = 0; t < o->n_seen; t++) {
        double *score = &c[o->seen[t]].score;
        *score = *score < 0 ? *score * o->repetition_penalty : *score / o->repetition_penalty;
    }
    for (int t = 0; t < size; t++)
        if (c[t].score > -INFINITY) c[n++] = c[t]; /* not ruled out */
    for (int t = n / 2; t >= 0; t--) sink(c, n, t);
    s->heap = s->all = kept = n;
    if (!n || o->temperature == 0) return leave(s, n ? c[0].token : -1);
    for (int t = 0; t < n; t++) s->e[t] = (float)((c[t].score - c[0].score) / o->temperature);
    s->model->kernels->exp(s->e, n);
    for (int t = 0; t < n; t++) mass += c[t].e = s->e[t];
    if (o->top_k > 0 && o->top_k < n) /* and those as good as the k-th */
        for (kept = 0, mass = 0; kept < n; mass += nth(s, kept++).e)
            if (kept >= o->top_k && nth(s, kept).score < nth(s, kept - 1).score) break;
    if (o->top_p < 1 || o->min_p > 0) {
        for (; i < kept; sum += nth(s, i++).e)
            if (i && (sum >= o->top_p * mass || nth(s, i).e < o->min_p)) break;
        kept = i, mass = sum;
    }
    for (i = 0; i < kept - 1; i++)
        if ((drawn += nth(s, i).e) > o->uniform * mass) break;
    return leave(s, nth(s, i).token);
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
    const char *map = file < 0 ? MAP_FAILED : mmap(NULL, size, PROT_READ, MAP_PRIVATE, file, 0);
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
    if (known < 15 || c.n_positions < 1 || c.n_embd < 1 || c.n_layer < 1 || c.n_head < 1 ||
        c.n_inner < 1 || n_bytes < 0 || c.n_embd % c.n_head || !(atof(eps) >= 0 && atof(eps) < 1) ||
        fmax(atoi(first), atoi(last)) >= c.vocab_size || !(at = strstr(text, ",'wte.weight'")) ||
        (strcmp(bend, "gelu_new") && strcmp(bend, "gelu") && strcmp(bend, "relu")))
        REFUSE("header: expected format tinygpt2 1 and a GPT-2's config, found %.999s", text);
    c.activation = *bend == 'r' ? TG_RELU : bend[4] ? TG_GELU_NEW : TG_GELU, c.tied = *tied == 't';
    c.scale_attn_weights = *scale == 't', c.scale_attn_by_inverse_layer_idx = *deep == 't';
    c.layer_norm_epsilon = (float)atof(eps), vocab = c.vocab_size, data += 8;
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
    double most = 200, threads = wish && *wish ? atof(wish) : sysconf(_SC_NPROCESSORS_ONLN);
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
        OPT(ids, 1) ids = v; OPT(temperature, ok && x >= 0 && x <= 1e6) o.temperature = x;
        OPT(max-tokens, natural) most = x; OPT(top-k, natural) o.top_k = (int)fmin(x, 1e9);
        OPT(threads, whole && x >= 1 && x <= MAX_THREADS) threads = x, wish = NULL;
        OPT(seed, whole) for (seed = 0, end = v + (*v == '-'); *end; end++) /* modulo 2^64 */
            seed = seed * 10 + (uint64_t)(*v == '-' ? '0' - *end : *end - '0');
        else if (*a != '-' && !path) path = a;
        else ids = NULL, count = 0;
    }
    if (!path || !ids)
        FAIL(2, "expected FILE.tg2 --ids \"15 99\" [--max-tokens N] [--temperature T] [--top-k K] "
             "[--seed N] [--threads N] [--print-ids], found something else at %s\n", a);
    if (wish && (wish[strspn(wish, "0123456789")] || threads < 1 || threads > MAX_THREADS))
        FAIL(2, "TINYGPT2_THREADS: expected 1 to %d, found %s\n", MAX_THREADS, wish);
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
    if (puts(n > start && held ? "\uFFFD" : "") < 0 || fflush(stdout)) FAIL(1, "cannot write\n");
    if (n - start < most && done == room)
        fprintf(stderr, "tinygpt2: stopped: all %d positions of the context are used\n", room);
}
#endif
#endif
