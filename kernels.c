/* kernels.c: the forward pass of GPT-2 in C. It runs at the speed of the memory and gives the same
 * bits everywhere.
 *
 * Goals      One inner loop, which reads the weights in the order of the file. The same logits, bit
 *            for bit, on every instruction set, with any number of threads, however a text is cut
 *            into passes and whatever other texts are computed in the same pass.
 * Non-goals  Training, other number formats, other architectures, a BLAS.
 *
 * The rule behind the equal bits: each vector lane computes another output, so every output adds
 * its products one after the other, in the order of its inputs, by fused multiply-adds. Sums
 * across lanes (layer norm, softmax) are kept in 16 lanes, lane = index modulo 16, and joined
 * by one fixed tree. exp, erfc and log are polynomials of our own. Nothing else may decide the
 * order of a sum. The compiler must not fuse or reorder arithmetic: build.py passes
 * -ffp-contract=off and forbids -ffast-math.
 *
 * build.py compiles this file once for each instruction set, with -DTG_ISA=avx512, avx2, neon
 * or portable (sections 1 to 4, which give a table of operations), and once without it (sections 5
 * to 10).
 *
 * Nothing here prints, exits, or keeps a pointer to an argument, except to the weights.
 *
 * SPDX-License-Identifier: MIT */
#define _GNU_SOURCE 1
#include <fenv.h>
#include <limits.h>
#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

#define TG_API __attribute__((visibility("default")))
#define LANES 16      /* outputs side by side in a panel */
#define LOGIT_ROWS 48 /* rows of logits that a pass holds at a time */
#define MAX_THREADS 256

_Static_assert(sizeof(size_t) == 8, "the largest models need sizes of 64 bits");

/* ---- The interface --------------------------------------------------------------------------- */

enum { TG_GELU_NEW, TG_GELU, TG_RELU };                             /* as ACTIVATIONS in Python */
enum { TG_DONE, TG_MORE, TG_BUSY, TG_BAD_ARGUMENT, TG_NOT_FINITE }; /* what a function returns */
enum { TG_NO_TOKEN = -1 };                                          /* see tg_choose */

typedef struct tg_model tg_model; /* a file's weights, for any number of texts; never changes */
typedef struct tg_cache tg_cache; /* the keys and values of one text */
typedef struct tg_pass tg_pass;   /* the scratch memory of one pass, and its logits */

typedef struct {
    int32_t vocab_size, n_positions, n_embd, n_layer, n_head, n_inner, activation;
    int32_t scale_attn_weights, scale_attn_by_inverse_layer_idx, tied;
    float layer_norm_epsilon;
} tg_config;

typedef struct { /* one text's part of a pass */
    tg_cache *cache;       /* its keys and values; those before `start` must have been computed */
    const int32_t *tokens; /* [n] */
    int32_t n, start;      /* the tokens stand at the positions from `start` */
    int32_t wanted;        /* the logits after the last `wanted` of them are wanted: 0 to n */
} tg_span;

typedef struct { /* how to choose a token */
    double temperature, top_p, min_p, repetition_penalty;
    uint64_t seed;
    int64_t position;           /* how many tokens the text has before the one to choose */
    const double *bias;         /* [n_bias]: added to the scores of */
    const int32_t *bias_tokens; /* [n_bias], none twice */
    const int32_t *seen;        /* [n_seen]: tokens that the penalty is for, none twice */
    const uint8_t *allowed;     /* [vocab_size]: 0 rules a token out; NULL: all are allowed */
    int32_t top_k, n_bias, n_seen;
} tg_options;

/* The operations of one instruction set. up(n) is n rounded up to a multiple of 16. No vector needs
 * to be aligned, and nothing is read or written beyond the sizes given here. */
typedef struct {
    const char *name;
    int width; /* floats in a vector */

    /* c[m, 16 panels] = bias[16 panels] (NULL: zeros) + a[m, k] x w[panels, k, 16]. Rows of a and c
     * are a_stride and c_stride floats apart, panels of w w_stride floats. With m = 1, bias may be
     * c: this continues the sums in c. */
    void (*product)(const float *a, size_t a_stride, int m, const float *w, size_t w_stride,
                    int panels, int k, const float *bias, float *c, size_t c_stride);
    void (*layer_norm)(const float *x, const float *weight, const float *bias, float epsilon, int n,
                       float *y);                           /* x[n]; weight, bias, y [up(n)] */
    void (*activate[3])(float *x, int n);                   /* in place, [up(n)] */
    void (*softmax)(float *x, int n, float scale);          /* in place, [up(n)]; of scale x */
    void (*log_sum)(const float *x, int n, float *top, float *sum); /* [n]: top + log(sum) */
    void (*exp)(float *x, int n);                           /* of x <= 0, in place, [up(n)] */
    int (*best)(const float *x, int n); /* [n]: index of the first largest; -1: not all finite */
    double (*log)(double x);            /* of finite x > 0 */
} tg_kernels;

TG_API const char *tg_version(void);

/* The table called `wanted` (NULL: $TINYGPT2_ISA, or else the best one), and its name. NULL if this
 * processor or this build has none of that name. */
TG_API const tg_kernels *tg_find_kernels(const char *wanted);
TG_API const char *tg_isa_name(const char *wanted);

/* `offsets`: byte positions in `file` of the float32 tensors of a .tg2 file, in its order. They and
 * the sizes must have been checked, and the file must outlive the model. NULL: no instruction set
 * called `isa`, or no memory. */
TG_API tg_model *tg_model_new(const tg_config *config, const void *file, const int64_t *offsets,
                              const char *isa, int threads);
TG_API void tg_model_free(tg_model *model);
TG_API int tg_chunk(const tg_model *model); /* rows (tokens of all spans) in one pass at most */

/* NULL: no memory. The system gives the memory page by page, as positions fill. */
TG_API tg_cache *tg_cache_new(const tg_model *model);
TG_API void tg_cache_free(tg_cache *cache);

/* The first n positions: copied between caches of one model; written to a snapshot, which is
 * keys[n_layer, n_head, up(n) / 16, head_size, 16] and values[n_layer, n_head, up(head_size) / 16,
 * n, 16], with zeros where there is no position or number; read from a snapshot.
 *
 * sums[n_layer, n_head, 2, 2, 16] tell whether a snapshot was changed. Those of a head's keys, and
 * then of its values, are 16 sums of every 16th word (of 32 bits) and 16 sums of all values that
 * those have had on the way, modulo 2^64. They are taken from the copy. */
TG_API void tg_cache_copy(tg_cache *to, const tg_cache *from, int n);
TG_API void tg_cache_dump(const tg_cache *cache, int n, float *keys, float *values,
                          uint64_t *sums);
TG_API void tg_cache_restore(tg_cache *cache, int n, const float *keys, const float *values,
                             uint64_t *sums);

/* All scratch memory that passes of up to tg_chunk rows need. NULL: no memory. */
TG_API tg_pass *tg_pass_new(const tg_model *model);
TG_API void tg_pass_free(tg_pass *pass);

/* Starts a pass (n_spans > 0) or goes on with the one under way (n_spans = 0). TG_MORE after 20 ms
 * or so: call again, or give the pass up by starting another. The first call copies the spans and
 * uses up the tokens; the caches must live until the pass is done. A cache may appear in one span
 * only. At the end the pass holds the wanted rows, from which tg_logits computes. */
TG_API int tg_forward(tg_pass *pass, const tg_span *spans, int n_spans);

/* *logits: the vocab_size logits of a wanted row (of all spans, in their order), until another row
 * is asked for or a pass starts. Computes the block of rows around it if that is not there. Does
 * not check for NaN or infinity. */
TG_API int tg_logits(tg_pass *pass, int row, const float **logits);

/* The next six take any row of logits [vocab_size], in the pass or copied from it before; `pass`
 * lends scratch memory. They return TG_NOT_FINITE if a logit is NaN or infinite. tg_check does no
 * more than that. */
TG_API int tg_check(tg_pass *pass, const float *logits);

/* The chosen token, or TG_NO_TOKEN where every one is ruled out. */
TG_API int tg_choose(tg_pass *pass, const float *logits, const tg_options *options,
                     int32_t *token);

/* The order in which a caller who cannot use the choice tries the others: the tokens that the
 * filters keep, as the draw ranks them, then the rest by score. *count: how many of the first n
 * there are. */
TG_API int tg_order(tg_pass *pass, const float *logits, const tg_options *options, int n,
                    int32_t *tokens, int32_t *count);
TG_API int tg_log_probability(tg_pass *pass, const float *logits, int32_t token, double *result);

/* How many tokens are better than this one; of equals the lower token is better. */
TG_API int tg_rank(tg_pass *pass, const float *logits, int32_t token, int32_t *rank);

/* The n best tokens, best first, and their log-probabilities; of equals the lower token first. */
TG_API int tg_top(tg_pass *pass, const float *logits, int n, int32_t *tokens, double *logprobs);

static inline size_t up(size_t n) { return (n + LANES - 1) / LANES * LANES; }

static inline int smaller(int a, int b) { return a < b ? a : b; }

#ifdef TG_ISA

/* ---- 1. Vectors: the compiler's own; an instruction set adds their width and multiply-add ---- */

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

#if WIDTH >= 8
#include <immintrin.h>
#elif WIDTH == 4
#include <arm_neon.h>
#endif

#define FMA_avx512(a, b, c) _mm512_fmadd_ps(a, b, c)
#define FMA_avx2(a, b, c) _mm256_fmadd_ps(a, b, c)
#define FMA_neon(a, b, c) vfmaq_f32(c, a, b)
#define FMA_portable(a, b, c) (vec){fmaf((a)[0], (b)[0], (c)[0])}
#define FMA EXPAND(JOIN, FMA_, TG_ISA) /* a b + c, rounded once */

typedef float vec __attribute__((vector_size(4 * WIDTH)));
typedef vec vec_in_memory __attribute__((aligned(4), may_alias)); /* at any address */
typedef int32_t bits __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t unsigned_bits __attribute__((vector_size(4 * WIDTH)));

enum { PARTS = LANES / WIDTH }; /* vectors in sixteen lanes */

INLINE vec load(const float *x) { return *(const vec_in_memory *)x; }

INLINE void store(float *x, vec a) { *(vec_in_memory *)x = a; }

/* x in every lane; also -0, as -0 - 0 is -0. */
INLINE vec all(float x) { return x - (vec){0}; }

/* x > y ? a : b, so b where x or y is NaN. */
INLINE vec pick(vec x, vec y, vec a, vec b) {
    bits above = x > y;
    return (vec)((above & (bits)a) | (~above & (bits)b));
}

INLINE vec max(vec a, vec b) { return pick(a, b, a, b); }

INLINE vec minus_abs(vec a) { return pick(a, all(0), 0 - a, a); }

/* The end of an array: lanes from `count` on are not read but filled. */
INLINE vec load_some(const float *x, int count, float fill) {
    if (count >= WIDTH) return load(x);
    vec a = all(fill);
    for (int i = 0; i < count; i++) a[i] = x[i];
    return a;
}

/* The sum of sixteen lanes by the one tree: first those 8 apart, then 4, 2, 1. */
INLINE float sum_of(const vec *lanes) {
    float x[LANES];
    UNROLL
    for (int part = 0; part < PARTS; part++) store(x + part * WIDTH, lanes[part]);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) x[i] += x[i + half];
    return x[0];
}

/* The largest of n numbers. NaN is skipped. */
static float max_of(const float *x, int n) {
    vec most = all(-INFINITY);
    for (int i = 0; i < n; i += WIDTH) most = max(load_some(x + i, n - i, -INFINITY), most);

    float top = -INFINITY;
    for (int i = 0; i < WIDTH; i++) top = fmaxf(top, most[i]);
    return top;
}

/* ---- 2. The microkernel: rows of inputs times panels of weights ---------------------------------
 *
 *            one panel: k inputs x 16 outputs             one tile: its sums stay in registers
 *
 *               outputs                                        panel j        panel j + 1
 *               0    1    2  ...  15                         +------------+ +------------+
 *   input 0   [ w    w    w  ...  w  ]  64 bytes             | w[p], 16   | | w[p], 16   |
 *   input 1   [ w    w    w  ...  w  ]  the next 64          +------------+ +------------+
 *     ...                                             a[0,p] |sum[0]      | |            |
 *   input k-1 [ w    w    w  ...  w  ]                a[1,p] |sum[1]      | |            |
 *                                                       ...  |  ...       | |            |
 *   The next panel holds outputs 16 to 31.            a[r,p] |sum[r]      | |            |
 *                                                            +------------+ +------------+
 *
 * For each input p in order, a tile multiplies one number of each row by the sixteen weights of
 * each panel and adds the products to its sums. ROWS x PANELS x 16 sums fill the registers. */
enum { ROWS = WIDTH == 16 ? 12 : 6, PANELS = WIDTH == 16 ? 2 : 1, MOST_PANELS = 4 };

/* Long chains are cut into blocks of inputs; the sums are stored and loaded again in between, which
 * continues the chains. For few rows a block is deep, as long streams of weights come fastest from
 * memory. For many rows, what a block reads must stay in the cache from tile to tile. */
enum { FEW_ROWS = 12, DEPTH_FOR_FEW = 1024, DEPTH_FOR_MANY = 256 };

/* From row to row of a block: 17 cache lines more than a multiple of 4 KB, so that the rows fall
 * into different sets of the cache. */
enum { BLOCK_STRIDE = DEPTH_FOR_FEW + DEPTH_FOR_MANY + LANES };

enum { AHEAD = 2048 }; /* bytes */

/* What to prefetch while a tile computes: for each input, one cache line for each panel. */
typedef struct {
    const char *next; /* the line of the first panel; */
    size_t step;      /* then `next` moves on by so many bytes */
} prefetch;

typedef struct {        /* c = init + a x w, for one tile */
    const float *a;     /* [rows, k]; rows are BLOCK_STRIDE apart */
    const float *w;     /* [panels, k, 16] */
    size_t w_stride;    /* from panel to panel */
    const float *init;  /* [rows, 16 panels]; NULL: zeros */
    size_t init_stride; /* from row to row; 0: the same for all */
    float *c;           /* [rows, 16 panels] */
    size_t c_stride;    /* from row to row */
    int k;
    prefetch ahead;
} tile_operands;

/* Asks for panel j's line. One row always asks for its own panel's weights AHEAD: at a constant
 * distance there is no address to compute. Measured on Zen 1: 12 % of one row's time. */
INLINE void ask_ahead(int rows, const tile_operands *o, int j) {
    size_t to_panel = j * o->w_stride * sizeof *o->w;
    const char *line = rows == 1 ? (const char *)o->w + AHEAD : o->ahead.next;
    __builtin_prefetch(line + to_panel);
}

/* One tile. rows and panels are constants where this is inlined, so the sums are registers and only
 * the loop over the inputs remains. */
INLINE void tile(int rows, int panels, tile_operands o) {
    vec sum[ROWS][MOST_PANELS * PARTS];
    vec weights[MOST_PANELS * PARTS];

    UNROLL
    for (int r = 0; r < rows; r++) {
        UNROLL
        for (int j = 0; j < panels * PARTS; j++)
            sum[r][j] = o.init ? load(o.init + r * o.init_stride + j * WIDTH) : all(0);
    }

    for (int p = 0; p < o.k; p++) {
        UNROLL
        for (int j = 0; j < panels; j++) {
            ask_ahead(rows, &o, j);
            UNROLL
            for (int part = 0; part < PARTS; part++)
                weights[j * PARTS + part] = load(o.w + j * o.w_stride + part * WIDTH);
        }
        if (rows > 1) o.ahead.next += o.ahead.step; /* one row has an address of its own */
        o.w += LANES;

        UNROLL
        for (int r = 0; r < rows; r++) {
            vec x = all(o.a[r * BLOCK_STRIDE + p]);
            UNROLL
            for (int j = 0; j < panels * PARTS; j++) sum[r][j] = FMA(x, weights[j], sum[r][j]);
        }
    }

    UNROLL
    for (int r = 0; r < rows; r++) {
        UNROLL
        for (int j = 0; j < panels * PARTS; j++)
            store(o.c + r * o.c_stride + j * WIDTH, sum[r][j]);
    }
}

/* How many panels a tile of so many rows takes at a time. Few rows leave registers for more panels,
 * and each panel is one more stream of memory. */
INLINE int panels_at_a_time(int rows) {
    if (rows == 1) return MOST_PANELS;
    if (WIDTH == 16 && rows <= 6) return MOST_PANELS;
    if (WIDTH == 8 && rows <= 3) return 2;
    return PANELS;
}

/* A tile of one panel, or of as many as its rows take at a time. The first line keeps the compiler
 * from making tiles that the registers cannot hold. */
INLINE void tile_of_rows(int rows, int panels, const tile_operands *o) {
    if (rows > ROWS) return;

    if (panels == 1)
        tile(rows, 1, *o);
    else
        tile(rows, panels_at_a_time(rows), *o);
}

static void any_tile(int rows, int panels, const tile_operands *o) {
    switch (rows) {
    case 1: tile_of_rows(1, panels, o); break;
    case 2: tile_of_rows(2, panels, o); break;
    case 3: tile_of_rows(3, panels, o); break;
    case 4: tile_of_rows(4, panels, o); break;
    case 5: tile_of_rows(5, panels, o); break;
    case 6: tile_of_rows(6, panels, o); break;
    case 7: tile_of_rows(7, panels, o); break;
    case 8: tile_of_rows(8, panels, o); break;
    case 9: tile_of_rows(9, panels, o); break;
    case 10: tile_of_rows(10, panels, o); break;
    case 11: tile_of_rows(11, panels, o); break;
    case 12: tile_of_rows(12, panels, o); break;
    }
}

/* The prefetch of a tile that shares its weights with no other tile: weights AHEAD bytes further
 * in the same panel. The processor's own prefetching stops at the end of each page. Measured on
 * Zen 1, two rows against one: 1.05, and 1.39 if they ask for the next block's weights instead.
 * A prototype on AVX-512, 5 to 12 rows against one: 1.15 to 1.25. */
static prefetch same_panel(const float *w) {
    return (prefetch){.next = (const char *)w + AHEAD, .step = LANES * sizeof *w};
}

/* The prefetch of one of several tiles that use the same weights: each asks for 1 / `parts` of
 * the weights that are needed next, and this one for share number `part`. Measured on Zen 1, two
 * tiles of four rows against one row: 1.9, and 2.1 if both ask for their own panel. */
static prefetch part_of(const float *later, int depth, int part, int parts) {
    size_t step = LANES * sizeof *later / parts;
    return (prefetch){.next = (const char *)later + part * depth * step, .step = step};
}

typedef struct { /* c = bias + a x w, as in the table */
    const float *a;
    size_t a_stride;
    int m;
    const float *w;
    size_t w_stride;
    int panels;
    int k;
    const float *bias; /* or NULL */
    float *c;
    size_t c_stride;
} operands;

/* Copies rows of a side by side: one fetch for all panels, and constant distances. */
static void copy_rows(float *block, const operands *o, int row, int rows, int p, int depth) {
    for (int r = 0; r < rows; r++) {
        const float *a = o->a + (row + r) * o->a_stride + p;
        for (int i = 0; i < depth; i += WIDTH)
            store(block + r * BLOCK_STRIDE + i, load_some(a + i, depth - i, 0));
    }
}

/* The tile of c from (row, panel) for the inputs from p, whose rows of a are in `block`. The first
 * inputs begin with the bias, all others go on with c. */
static tile_operands tile_at(const operands *o, const float *block, int row, int panel, int p,
                             int depth) {
    float *c = o->c + row * o->c_stride + panel * LANES;
    tile_operands t = {
        .a = block,
        .w = o->w + panel * o->w_stride + (size_t)p * LANES,
        .w_stride = o->w_stride,
        .init = o->bias ? o->bias + panel * LANES : NULL,
        .c = c,
        .c_stride = o->c_stride,
        .k = depth,
    };
    if (p > 0) {
        t.init = c;
        t.init_stride = o->c_stride;
    }
    return t;
}

/* How many panels the tile at `panel` takes. */
static int panels_from(const operands *o, int panel, int rows) {
    int width = panels_at_a_time(rows);
    return o->panels - panel < width ? 1 : width;
}

/* One row reads each weight once: all that counts is the memory. */
static void product_of_one_row(const operands *o) {
    for (int j = 0, width; j < o->panels; j += width) {
        width = panels_from(o, j, 1);
        tile_operands t = tile_at(o, o->a, 0, j, 0, o->k);
        any_tile(1, width, &t);
    }
}

/* Few rows: one tile, or two of nearly equal height that use a panel one after the other, while it
 * is in the nearest cache. */
static void product_of_few_rows(const operands *o) {
    float block[FEW_ROWS * BLOCK_STRIDE];
    int tiles = (o->m + ROWS - 1) / ROWS;
    int first = o->m / tiles; /* rows of the first tile */

    for (int p = 0, depth; p < o->k; p += depth) {
        depth = smaller(o->k - p, DEPTH_FOR_FEW);
        copy_rows(block, o, 0, o->m, p, depth);

        for (int j = 0, width; j < o->panels; j += width) {
            width = panels_from(o, j, o->m - first ? o->m - first : first);
            tile_operands t = tile_at(o, block, 0, j, p, depth);
            const float *after = t.w + width * o->w_stride; /* the weights of the panels after */
            t.ahead = tiles == 1 ? same_panel(t.w) : part_of(after, depth, 0, 2);
            any_tile(first, width, &t);
            if (tiles == 1) continue;

            t = tile_at(o, block + first * BLOCK_STRIDE, first, j, p, depth);
            t.ahead = part_of(after, depth, 1, 2);
            any_tile(o->m - first, width, &t);
        }
    }
}

/* The prefetch of tile `i` of many, which all use the weights w of a block; those of the next block
 * come `to_later` further on. With AVX-512 a tile is done before its weights can arrive from
 * memory, so the tiles of one block share the next block out. Elsewhere only the first tile reads
 * memory, and it asks for its own weights: two blocks at once would fill the second cache of some
 * processors. Measured on Zen 1 (512 KB): with shares a prompt of 512 tokens takes
 * 1.3 times as long, 24 rows 1.06 times. */
static prefetch of_many(const float *w, size_t to_later, int depth, int i, int tiles) {
    if (WIDTH == 16) return part_of(w + to_later, depth, i, tiles);
    if (i == 0) return same_panel(w);
    return (prefetch){.next = (const char *)w, .step = 0}; /* in the cache already */
}

/* Many rows: each tile goes through all panels, whose weights of this block stay in the second
 * cache from tile to tile. */
static void product_of_many_rows(const operands *o) {
    float block[ROWS * BLOCK_STRIDE];
    int tiles = (o->m + ROWS - 1) / ROWS;

    for (int p = 0, depth; p < o->k; p += depth) {
        depth = smaller(o->k - p, DEPTH_FOR_MANY);
        /* From these weights to those of the next inputs, or of the panels after these. */
        size_t to_later = (size_t)depth * LANES;
        if (p + depth == o->k) to_later = o->panels * o->w_stride - (size_t)p * LANES;

        for (int i = 0, row = 0, rows; i < tiles; i++, row += rows) {
            rows = (o->m - row) / (tiles - i);
            copy_rows(block, o, row, rows, p, depth);
            for (int j = 0, width; j < o->panels; j += width) {
                width = panels_from(o, j, rows);
                tile_operands t = tile_at(o, block, row, j, p, depth);
                t.ahead = of_many(t.w, to_later, depth, i, tiles);
                any_tile(rows, width, &t);
            }
        }
    }
}

static void product(const float *a, size_t a_stride, int m, const float *w, size_t w_stride,
                    int panels, int k, const float *bias, float *c, size_t c_stride) {
    operands o = {a, a_stride, m, w, w_stride, panels, k, bias, c, c_stride};
    if (m == 1)
        product_of_one_row(&o);
    else if (m <= FEW_ROWS)
        product_of_few_rows(&o);
    else
        product_of_many_rows(&o);
}

/* ---- 3. The small operations ----------------------------------------------------------------- */

/* exp(x) for x <= 0, within 1 ulp or so; below -87 it is exp(-87), and NaN stays NaN. With
 * x = n ln 2 + r and |r| <= ln 2 / 2, exp(x) = 2^n (1 + r + r^2 p(r)), p a minimax polynomial. */
INLINE vec v_exp(vec x) {
    static const float p[] = {0.0013814597f, 0.008368717f, 0.04166839f, 0.16666521f, 0.49999994f};
    const float round = 12582912.0f; /* 1.5 * 2^23: added to it, n lands in the lowest bits */
    const float ln2_high = 0.693359375f; /* its product with n is exact */
    const float ln2_low = -2.12194440e-4f;

    x = max(all(-87), x);
    vec t = FMA(x, all(1.44269504f), all(round));
    vec n = t - round;
    vec r = FMA(n, all(-ln2_low), FMA(n, all(-ln2_high), x));

    vec sum = all(p[0]);
    UNROLL
    for (int i = 1; i < 5; i++) sum = FMA(sum, r, all(p[i]));

    vec power = (vec)(((unsigned_bits)t << 23) + (127u << 23)); /* 2^n */
    return (FMA(r * r, sum, r) + 1) * power;
}

/* 0.5 x (1 + tanh u) is x / (1 + exp(-2u)). With e = exp(-2|u|), which cannot overflow, this is
 * x / (1 + e) for u > 0 and x e / (1 + e) otherwise: nothing cancels on either side. */
INLINE vec v_gelu_new(vec x) {
    const float root = 0.79788456f; /* sqrt(2 / pi) */
    const float cubic = 0.79788456f * 0.044715f;
    vec u = x * FMA(x * x, all(cubic), all(root));
    vec e = v_exp(2 * minus_abs(u));
    return x * pick(x, all(0), all(1), e) / (1 + e);
}

/* x P(Z <= x), with P(Z > |x|) = erfc(z) / 2 for z = |x| / sqrt 2, and erfc(z) = exp(-z^2) t q(t)
 * with t = 1 / (1 + 0.4 z) and a minimax polynomial q, exact to 7e-9 for z up to 9.4. What rounding
 * loses of x^2 is put back, as exp would magnify it. */
INLINE vec v_gelu(vec x) {
    static const float q[] = {-0.030800663f, 0.20460011f, -0.5143945f, 0.5683587f, -0.30190295f,
                              0.2815611f, 0.12636495f, 0.21563728f, 0.22486451f, 0.22571148f};
    vec z = max(all(-13), minus_abs(x)); /* -sqrt 2 z; beyond -13, erfc is nothing */
    vec square = z * z;
    vec lost = FMA(z, z, -square);
    vec e = v_exp(square * -0.5f);
    vec t = 1 / FMA(z, all(-0.4f * 0.70710678f), all(1));

    vec sum = all(q[0]);
    UNROLL
    for (int i = 1; i < 10; i++) sum = FMA(sum, t, all(q[i]));

    vec above = FMA(lost * -0.5f, e, e) * t * sum * 0.5f;
    return x * pick(x, all(0), 1 - above, above);
}

static void exp_all(float *x, int n) {
    for (int i = 0; i < (int)up(n); i += WIDTH) store(x + i, v_exp(load(x + i)));
}

static void gelu_new(float *x, int n) {
    for (int i = 0; i < (int)up(n); i += WIDTH) store(x + i, v_gelu_new(load(x + i)));
}

static void gelu(float *x, int n) {
    for (int i = 0; i < (int)up(n); i += WIDTH) store(x + i, v_gelu(load(x + i)));
}

static void relu(float *x, int n) {
    for (int i = 0; i < (int)up(n); i += WIDTH) store(x + i, max(all(0), load(x + i)));
}

/* Ba et al. 2016, with epsilon inside the root. */
static void layer_norm(const float *x, const float *weight, const float *bias, float epsilon, int n,
                       float *y) {
    vec sum[PARTS] = {{0}};
    for (int i = 0; i < n; i += LANES) {
        UNROLL
        for (int part = 0; part < PARTS; part++) {
            int at = i + part * WIDTH;
            sum[part] += load_some(x + at, n - at, 0);
        }
    }
    float mean = sum_of(sum) / (float)n;

    vec squares[PARTS] = {{0}};
    for (int i = 0; i < n; i += LANES) {
        UNROLL
        for (int part = 0; part < PARTS; part++) {
            int at = i + part * WIDTH;
            vec deviation = load_some(x + at, n - at, mean) - mean;
            store(y + at, deviation);
            squares[part] = FMA(deviation, deviation, squares[part]);
        }
    }
    float scale = 1 / sqrtf(sum_of(squares) / (float)n + epsilon);

    for (int i = 0; i < (int)up(n); i += WIDTH)
        store(y + i, FMA(load(y + i) * scale, load(weight + i), load(bias + i)));
}

/* Scores to weights of attention: x[i] = exp(scale x[i] - their maximum) / the sum of all those,
 * and zeros up to up(n). The weights add up to 1 before any value is weighted: a sum of huge values
 * that is divided afterwards could overflow. */
static void softmax(float *x, int n, float scale) {
    float top = scale * max_of(x, n);
    for (int i = 0; i < (int)up(n); i += WIDTH) store(x + i, v_exp(load(x + i) * scale - top));
    for (int i = n; i < (int)up(n); i++) x[i] = 0;

    vec sum[PARTS] = {{0}};
    for (int i = 0; i < n; i += LANES) {
        UNROLL
        for (int part = 0; part < PARTS; part++) sum[part] += load(x + i + part * WIDTH);
    }

    float share_of_one = 1 / sum_of(sum);
    for (int i = 0; i < (int)up(n); i += WIDTH) store(x + i, load(x + i) * share_of_one);
}

static void log_sum(const float *x, int n, float *top, float *sum) {
    *top = max_of(x, n);

    vec lanes[PARTS] = {{0}};
    for (int i = 0; i < n; i += LANES) {
        UNROLL
        for (int part = 0; part < PARTS; part++) {
            int at = i + part * WIDTH;
            lanes[part] += v_exp(load_some(x + at, n - at, -INFINITY) - *top);
        }
    }
    *sum = sum_of(lanes);
}

/* 0 x is 0 only for finite x, so the sum of all 0 x tells. */
static int all_finite(const float *x, int n) {
    vec zero = all(0);
    for (int i = 0; i < n; i += WIDTH) zero += 0 * load_some(x + i, n - i, 0);

    for (int i = 0; i < WIDTH; i++)
        if (!(zero[i] == 0)) return 0;
    return 1;
}

static int best(const float *x, int n) {
    if (!all_finite(x, n)) return -1;

    float top = max_of(x, n);
    int i = 0;
    while (x[i] != top) i++;
    return i;
}

/* ---- 4. The logarithm ------------------------------------------------------------------------ */

/* log(x) within 1 ulp, for finite x > 0. It must not be the C library's, whose last bit differs
 * from machine to machine. With x = 2^k m, m from sqrt(1/2) to sqrt 2, f = m - 1 and
 * s = f / (2 + f), log(m) = log((1 + s) / (1 - s)) = 2 s + s R with R = 2/3 s^2 + 2/5 s^4 + ...
 * As 2 s = f - s f, the large part f stays exact: log(m) = f - (f^2 / 2 - s (f^2 / 2 + R)). */
static double log_of(double x) {
    const double ln2_high = 0x1.62e42feep-1; /* its product with k is exact */
    const double ln2_low = 0x1.a39ef35793c76p-33;
    int k;
    double m = frexp(x, &k);
    if (m < 0.70710678118654752) {
        m *= 2;
        k--;
    }

    double f = m - 1;
    double s = f / (2 + f);
    double z = s * s;
    double series = 0;
    for (int i = 11; i >= 1; i--) series = fma(series, z, 2.0 / (2 * i + 1));
    double r = series * z;

    double half_square = 0.5 * f * f;
    double correction = fma(s, half_square + r, k * ln2_low);
    return fma(k, ln2_high, f - (half_square - correction));
}

const tg_kernels EXPAND(JOIN, tg_kernels_, TG_ISA) = {
    .name = EXPAND(TEXT, TG_ISA),
    .width = WIDTH,
    .product = product,
    .layer_norm = layer_norm,
    .activate = {gelu_new, gelu, relu},
    .softmax = softmax,
    .log_sum = log_sum,
    .exp = exp_all,
    .best = best,
    .log = log_of,
};

#else /* the part that all instruction sets share */

/* ---- 5. Which instruction set ---------------------------------------------------------------- */

extern const tg_kernels tg_kernels_avx512, tg_kernels_avx2, tg_kernels_neon, tg_kernels_portable;

#if defined(__x86_64__)
#include <cpuid.h>
#endif

const char *tg_version(void) { return TG_VERSION; } /* build.py takes it from the Python module */

/* Fills the list with the tables that this processor can run, the best one last, and returns how
 * many there are. CPUID tells what the processor can do, XGETBV whether the system saves the
 * registers for it. */
static int list_kernels(const tg_kernels *list[3]) {
    int n = 0;
    list[n++] = &tg_kernels_portable;

#if defined(__x86_64__)
    unsigned a, b = 0, c = 0, d;
    unsigned saved = 0;
    if (__get_cpuid(1, &a, &b, &c, &d) && (c & bit_OSXSAVE))
        __asm__("xgetbv" : "=a"(saved), "=d"(d) : "c"(0));
    int fma = (c & bit_FMA) && __get_cpuid_count(7, 0, &a, &b, &c, &d);
    if (fma && (b & bit_AVX2) && (saved & 6) == 6) {
        list[n++] = &tg_kernels_avx2;
        if ((b & bit_AVX512F) && (saved & 0xe6) == 0xe6) list[n++] = &tg_kernels_avx512;
    }
#elif defined(__aarch64__)
    list[n++] = &tg_kernels_neon;
#endif

    return n;
}

const tg_kernels *tg_find_kernels(const char *wanted) {
    const tg_kernels *list[3];
    int n = list_kernels(list);
    if (!wanted) wanted = getenv("TINYGPT2_ISA");
    if (!wanted || !*wanted) return list[n - 1];

    for (int i = 0; i < n; i++)
        if (!strcmp(list[i]->name, wanted)) return list[i];
    return NULL;
}

const char *tg_isa_name(const char *wanted) {
    const tg_kernels *kernels = tg_find_kernels(wanted);
    return kernels ? kernels->name : NULL;
}

/* ---- 6. Models, caches, passes --------------------------------------------------------------- */

/* The tensors in the file's order: wte, wpe, those of each layer, ln_f, lm_head. All but wte, wpe
 * and lm_head are pairs of a weight and a bias. */
enum { WTE, WPE, FIRST_LAYER };
enum { LN_1, C_ATTN = 2, ATTN_PROJ = 4, LN_2 = 6, C_FC = 8, MLP_PROJ = 10, TENSORS_PER_LAYER = 12 };
enum { LN_F, LM_HEAD = 2 }; /* counted from the end of the layers */

enum { ATTENTION_ROWS = 24 }; /* rows of one text whose attention is computed side by side */

struct tg_model {
    tg_config config;
    const tg_kernels *kernels;
    int threads;
    int head_size;
    const float *tensors[]; /* matrices [up(outputs) / 16, inputs, 16]; wpe [.., up(n_embd)] */
};

/* Both by panels, as `product` reads its weights: for a score, a position is an output and the
 * head's numbers are the inputs; for a weighted sum of values it is the other way round. */
struct tg_cache {
    _Alignas(64) const tg_model *model;
    int positions; /* how many there is room for */
    float *keys;   /* [n_layer, n_head, up(positions) / 16, head_size, 16] */
    float *values; /* [n_layer, n_head, up(head_size) / 16, positions, 16] */
};

typedef struct { /* a matrix of activations */
    float *data;
    size_t stride; /* floats from row to row */
} rows;

typedef struct { /* a span inside a pass */
    tg_cache *cache;
    int row; /* its first row of the pass; */
    int n;   /* it has n of them, */
    int start; /* for the positions from `start` */
    int wanted;
} placed_span;

typedef struct { /* a token that may be chosen */
    double score;
    float weight; /* its probability without the common factor; set by weigh */
    int32_t token;
} candidate;

struct tg_pass {
    _Alignas(64) const tg_model *model;
    int chunk;       /* rows at most */
    atomic_flag busy;
    fenv_t caller;   /* the caller's floating-point environment while a function runs */

    placed_span *spans; /* [chunk] */
    int n_spans;
    int n_rows;   /* in x: all rows, from the last layer on only the wanted ones */
    int n_wanted;
    int step;     /* how many steps are done; NOT_STARTED before the first pass */

    rows x;       /* [chunk, n_embd]: the residual stream */
    rows a;       /* [chunk, n_embd]: what a layer norm, attention or the MLP makes of it */
    rows h;       /* [chunk, 3 n_embd or n_inner]: queries, keys, values; inside of the MLP */
    rows scores;  /* [threads, ATTENTION_ROWS, n_positions]: of attention, then its weights */
    rows sums;    /* [threads, ATTENTION_ROWS, head_size]: values by weight */

    rows logits;  /* [LOGIT_ROWS, vocab_size], of which */
    int first_logits, n_logits; /* these wanted rows are there */

    candidate *candidates; /* [vocab_size] */
    candidate *sorted;     /* [vocab_size], in buckets; */
    int *starts;           /* [vocab_size + 2], of these */
    double *heap;          /* [vocab_size] */
    float *weights;        /* [up(vocab_size)] */
};

enum { NOT_STARTED = -1 };

static inline float *row_of(rows r, size_t i) { return r.data + i * r.stride; }

static int n_tensors(const tg_config *c) {
    return FIRST_LAYER + c->n_layer * TENSORS_PER_LAYER + (c->tied ? LM_HEAD : LM_HEAD + 1);
}

static const float *const *layer_tensors(const tg_model *m, int layer) {
    return m->tensors + FIRST_LAYER + layer * TENSORS_PER_LAYER;
}

tg_model *tg_model_new(const tg_config *config, const void *file, const int64_t *offsets,
                       const char *isa, int threads) {
    const tg_kernels *kernels = tg_find_kernels(isa);
    int n = n_tensors(config);
    tg_model *m = kernels ? malloc(sizeof *m + n * sizeof *m->tensors) : NULL;
    if (!m) return NULL;

    m->config = *config;
    m->kernels = kernels;
    m->threads = threads < 1 ? 1 : smaller(threads, MAX_THREADS);
    m->head_size = config->n_embd / config->n_head;
    for (int i = 0; i < n; i++) m->tensors[i] = (const float *)((const char *)file + offsets[i]);
    return m;
}

void tg_model_free(tg_model *model) { free(model); }

/* The outputs of the widest linear layer but the head. */
static size_t widest(const tg_config *c) {
    return c->n_inner > 3 * c->n_embd ? c->n_inner : 3 * c->n_embd;
}

/* The most rows in a pass, such that one step, between two looks at the clock, takes some 40 ms on
 * one thread (100 ms on a slow one). */
int tg_chunk(const tg_model *m) {
    const tg_config *c = &m->config;
    double budget = m->kernels->width == 1 ? 4e7 : 2e9; /* multiply-adds */
    double row = fmax(widest(c), 2.0 * c->n_positions) * c->n_embd;
    return (int)fmax(1, fmin(512, budget / row));
}

/* The rows of logits in a block: no more work than one step of a layer has for a full chunk. */
static int logits_at_a_time(const tg_model *m) {
    double n = (double)tg_chunk(m) * widest(&m->config) / m->config.vocab_size;
    return (int)fmax(1, fmin(LOGIT_ROWS, n));
}

/* Hands out parts of one block of memory; without a block it only counts. */
typedef struct {
    char *block; /* or NULL */
    size_t used;
} arena;

static void *take(arena *memory, size_t count, size_t size) {
    void *part = memory->block ? memory->block + memory->used : NULL;
    memory->used += (count * size + 63) / 64 * 64;
    return part;
}

/* 64 bytes more in a row keep one column of many rows out of a single set of the cache. */
static rows take_rows(arena *memory, size_t n, size_t width) {
    rows r = {.stride = up(width) + LANES};
    r.data = take(memory, n * r.stride, sizeof *r.data);
    return r;
}

/* take_cache and take_pass run twice: without a block they add up the size that is needed, then
 * with one they assign the addresses. */
static tg_cache *take_cache(const tg_model *m, arena *memory) {
    const tg_config *c = &m->config;
    size_t heads = (size_t)c->n_layer * c->n_head;
    size_t d = m->head_size;

    tg_cache *cache = take(memory, 1, sizeof *cache);
    tg_cache made = {.model = m, .positions = c->n_positions};
    made.keys = take(memory, heads * up(c->n_positions) * d, sizeof *made.keys);
    made.values = take(memory, heads * c->n_positions * up(d), sizeof *made.values);
    if (cache) *cache = made;
    return cache;
}

static tg_pass *take_pass(const tg_model *m, arena *memory) {
    const tg_config *c = &m->config;
    size_t words = c->vocab_size;
    size_t attention_rows = (size_t)m->threads * ATTENTION_ROWS;

    tg_pass *pass = take(memory, 1, sizeof *pass);
    tg_pass made = {.model = m, .chunk = tg_chunk(m), .step = NOT_STARTED};
    made.spans = take(memory, made.chunk, sizeof *made.spans);
    made.x = take_rows(memory, made.chunk, c->n_embd);
    made.a = take_rows(memory, made.chunk, c->n_embd);
    made.h = take_rows(memory, made.chunk, widest(c));
    made.scores = take_rows(memory, attention_rows, c->n_positions);
    made.sums = take_rows(memory, attention_rows, m->head_size);
    made.logits = take_rows(memory, LOGIT_ROWS, words);
    made.candidates = take(memory, words, sizeof *made.candidates);
    made.sorted = take(memory, words, sizeof *made.sorted);
    made.starts = take(memory, words + 2, sizeof *made.starts);
    made.heap = take(memory, words, sizeof *made.heap);
    made.weights = take(memory, up(words), sizeof *made.weights);
    if (pass) memcpy(pass, &made, sizeof made);
    return pass;
}

tg_cache *tg_cache_new(const tg_model *model) {
    arena memory = {0};
    take_cache(model, &memory);
    memory = (arena){.block = aligned_alloc(64, memory.used)};
    return memory.block ? take_cache(model, &memory) : NULL;
}

tg_pass *tg_pass_new(const tg_model *model) {
    arena memory = {0};
    take_pass(model, &memory);
    memory = (arena){.block = aligned_alloc(64, memory.used)};
    return memory.block ? take_pass(model, &memory) : NULL;
}

void tg_cache_free(tg_cache *cache) { free(cache); }

void tg_pass_free(tg_pass *pass) { free(pass); }

/* Where one head's keys [up(positions) / 16, head_size, 16] begin. */
static float *keys_of(const tg_cache *cache, int layer, int head) {
    const tg_model *m = cache->model;
    size_t which = (size_t)layer * m->config.n_head + head;
    return cache->keys + which * up(cache->positions) * m->head_size;
}

/* Where one head's values [up(head_size) / 16, positions, 16] begin. */
static float *values_of(const tg_cache *cache, int layer, int head) {
    const tg_model *m = cache->model;
    size_t which = (size_t)layer * m->config.n_head + head;
    return cache->values + which * cache->positions * up(m->head_size);
}

/* Where, in one head's keys or values, number e of a position is. */
static size_t key_index(const tg_cache *cache, size_t position, size_t e) {
    return (position / LANES * cache->model->head_size + e) * LANES + position % LANES;
}

static size_t value_index(const tg_cache *cache, size_t position, size_t e) {
    return (e / LANES * cache->positions + position) * LANES + e % LANES;
}

/* ---- 7. Threads ---------------------------------------------------------------------------------
 *
 * One pool of workers for the process, started when a pass first has work for it. A job has some
 * units; every thread that is free takes the next one. The result of a unit does not depend on the
 * thread that computes it. */

typedef void unit_function(const void *job, int unit);

static struct {
    /* How many threads may help (10 bits), how many units the job has and which is next (27 bits
     * each). A thread that took a unit, by compare-and-swap, may read `run` and `job`: they change
     * only after every unit is done. */
    _Alignas(64) _Atomic uint64_t ticket;
    _Alignas(64) _Atomic int done; /* units */
    _Alignas(64) unit_function *run;
    const void *job;
    atomic_flag taken; /* by the one job that uses the pool */
    int workers;
    pthread_mutex_t lock;
    pthread_cond_t wake;
} pool = {.lock = PTHREAD_MUTEX_INITIALIZER, .wake = PTHREAD_COND_INITIALIZER};

enum { UNIT_BITS = 27 };
#define UNIT_MASK ((UINT64_C(1) << UNIT_BITS) - 1)

static _Thread_local int worker; /* which worker this thread is; 0: none, but a job's owner */

static int64_t nanoseconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * INT64_C(1000000000) + t.tv_nsec;
}

/* The ticket, if it has a unit left for this thread, else 0. */
static uint64_t offer(void) {
    uint64_t ticket = atomic_load(&pool.ticket);
    int threads = (int)(ticket >> 2 * UNIT_BITS);
    uint64_t units = ticket >> UNIT_BITS & UNIT_MASK;
    uint64_t next = ticket & UNIT_MASK;
    return worker < threads && next < units ? ticket : 0;
}

static void work(void) {
    uint64_t ticket;
    while ((ticket = offer())) {
        if (!atomic_compare_exchange_weak(&pool.ticket, &ticket, ticket + 1)) continue;
        pool.run(pool.job, (int)(ticket & UNIT_MASK));
        atomic_fetch_add(&pool.done, 1);
    }
}

/* A worker looks out for work for a fifth of a millisecond, which bridges the gaps between layers
 * and between tokens. Then it sleeps: an idle process uses no processor. */
static void *worker_main(void *index) {
    worker = (int)(intptr_t)index;
    for (;;) {
        int64_t until = nanoseconds() + 200000;
        while (!offer() && nanoseconds() < until) {
        }

        if (!offer()) {
            pthread_mutex_lock(&pool.lock);
            while (!offer()) pthread_cond_wait(&pool.wake, &pool.lock);
            pthread_mutex_unlock(&pool.lock);
        }

        work();
    }
    return NULL;
}

/* A forked child has none of its parent's threads. It starts its own when it needs them. */
static void forget_workers(void) {
    memset((void *)&pool, 0, sizeof pool);
    pthread_mutex_init(&pool.lock, NULL);
    pthread_cond_init(&pool.wake, NULL);
}

/* Starts the workers that are missing, with all signals blocked. If the system gives fewer, fewer
 * work. */
static void start_workers(int count) {
    static int prepared;
    if (!prepared) prepared = !pthread_atfork(NULL, NULL, forget_workers);

    sigset_t every, old;
    sigfillset(&every);
    pthread_sigmask(SIG_SETMASK, &every, &old);
    while (pool.workers < count) {
        pthread_t thread;
        void *index = (void *)(intptr_t)(pool.workers + 1);
        if (pthread_create(&thread, NULL, worker_main, index)) break;
        pthread_detach(thread);
        pool.workers++;
    }
    pthread_sigmask(SIG_SETMASK, &old, NULL);
}

/* Offers the units to the workers, helps, and returns when all are done. */
static void share_out(int threads, unit_function *run, const void *job, int units) {
    if (pool.workers < threads - 1) start_workers(threads - 1);
    pool.run = run;
    pool.job = job;
    atomic_store(&pool.done, 0);
    atomic_store(&pool.ticket, (uint64_t)threads << 2 * UNIT_BITS | (uint64_t)units << UNIT_BITS);

    pthread_mutex_lock(&pool.lock); /* no worker is between its last look and its sleep */
    pthread_cond_broadcast(&pool.wake);
    pthread_mutex_unlock(&pool.lock);

    work();
    int64_t until = nanoseconds() + 50000;
    while (atomic_load(&pool.done) < units)
        if (nanoseconds() > until) sched_yield(); /* perhaps more threads than processors */
}

/* Computes all units of a job. A thread that finds the pool taken works alone. So does one that has
 * little work (`cost` in multiply-adds): the other processors would answer too late. */
static void parallel(int threads, unit_function *run, const void *job, int units, double cost) {
    int alone = threads < 2 || units < 2 || cost < 1e5;
    if (alone || atomic_flag_test_and_set(&pool.taken)) {
        for (int unit = 0; unit < units; unit++) run(job, unit);
        return;
    }

    share_out(threads, run, job, units);
    atomic_flag_clear(&pool.taken);
}

/* ---- 8. Copies of caches --------------------------------------------------------------------- */

typedef struct {
    const tg_cache *to;
    const tg_cache *from;
    int n;          /* positions */
    uint64_t *sums; /* [n_layer, n_head, 2, 2, 16], of a snapshot; see the interface */
} copy_job;

typedef struct { /* one head of one layer */
    float *keys;
    float *values;
} head_part;

static head_part part_at(const tg_cache *cache, int unit) {
    int layer = unit / cache->model->config.n_head;
    int head = unit % cache->model->config.n_head;
    return (head_part){keys_of(cache, layer, head), values_of(cache, layer, head)};
}

static void copy_unit(const void *argument, int unit) {
    const copy_job *job = argument;
    size_t d = job->from->model->head_size;
    size_t n = job->n;
    head_part to = part_at(job->to, unit);
    head_part from = part_at(job->from, unit);
    if (n == 0) return; /* there may be no memory */

    memcpy(to.keys, from.keys, up(n) * d * sizeof(float));
    for (size_t e = 0; e < d; e += LANES)
        memcpy(to.values + value_index(job->to, 0, e), from.values + value_index(job->from, 0, e),
               n * LANES * sizeof(float));
}

/* Adds n rows of 16 words to 16 sums and 16 sums of sums. */
static void add_words(uint64_t sums[2][LANES], const void *rows, size_t n) {
    const uint32_t(*words)[LANES] = rows;
    for (size_t i = 0; i < n; i++) {
        for (int lane = 0; lane < LANES; lane++) {
            sums[0][lane] += words[i][lane];
            sums[1][lane] += sums[0][lane];
        }
    }
}

/* The sums of what copy_unit has copied, which is in a cache of the processor. */
static void sum_copy(const copy_job *job, int unit) {
    size_t d = job->to->model->head_size;
    size_t n = job->n;
    head_part part = part_at(job->to, unit);
    uint64_t sums[2][2][LANES] = {0};

    add_words(sums[0], part.keys, up(n) / LANES * d);
    for (size_t e = 0; e < d; e += LANES)
        add_words(sums[1], part.values + value_index(job->to, 0, e), n);
    memcpy(job->sums + unit * sizeof sums / sizeof *job->sums, sums, sizeof sums);
}

/* Zeros where a head of a snapshot has no position or no number. */
static void clear_padding(const copy_job *job, int unit) {
    size_t d = job->to->model->head_size;
    size_t n = job->n;
    head_part part = part_at(job->to, unit);

    for (size_t position = n; position < up(n); position++)
        for (size_t e = 0; e < d; e++) part.keys[key_index(job->to, position, e)] = 0;
    for (size_t position = 0; position < n; position++)
        for (size_t e = d; e < up(d); e++) part.values[value_index(job->to, position, e)] = 0;
}

static void dump_unit(const void *argument, int unit) {
    copy_unit(argument, unit);
    clear_padding(argument, unit);
    sum_copy(argument, unit);
}

static void restore_unit(const void *argument, int unit) {
    copy_unit(argument, unit);
    sum_copy(argument, unit);
}

/* Fresh memory comes page by page when it is first written, which takes longer than the copying. So
 * memory of which three quarters will be used is wanted in pages of 2 MB, where the system has
 * them. A cache that fills slowly is better off with small ones. */
static void prefer_large_pages(const tg_cache *cache, int n) {
#ifdef MADV_HUGEPAGE
    const uintptr_t page = 1 << 21;
    const tg_config *c = &cache->model->config;
    size_t heads = (size_t)c->n_layer * c->n_head;
    uintptr_t end = (uintptr_t)(cache->values + heads * cache->positions * up(cache->model->head_size));
    uintptr_t start = ((uintptr_t)cache->keys + page - 1) / page * page;
    if (n > cache->positions / 4 * 3 && start < end / page * page)
        madvise((void *)start, end / page * page - start, MADV_HUGEPAGE);
#else
    (void)cache, (void)n;
#endif
}

/* Several threads pay even where one could copy as fast as the memory can, as they share the work
 * of providing memory. */
static void copy_heads(copy_job job, unit_function *run) {
    const tg_config *c = &job.from->model->config;
    double cost = 2.0 * job.n * c->n_embd * c->n_layer;
    parallel(job.from->model->threads, run, &job, c->n_layer * c->n_head, cost);
}

void tg_cache_copy(tg_cache *to, const tg_cache *from, int n) {
    prefer_large_pages(to, n);
    if (n > 0) copy_heads((copy_job){.to = to, .from = from, .n = n}, copy_unit);
}

/* A snapshot is a cache that has room for its n positions and no more. */
void tg_cache_dump(const tg_cache *cache, int n, float *keys, float *values, uint64_t *sums) {
    tg_cache snapshot = {.model = cache->model, .positions = n, .keys = keys, .values = values};
    copy_heads((copy_job){.to = &snapshot, .from = cache, .n = n, .sums = sums}, dump_unit);
}

void tg_cache_restore(tg_cache *cache, int n, const float *keys, const float *values,
                      uint64_t *sums) {
    tg_cache snapshot = {
        .model = cache->model,
        .positions = n,
        .keys = (float *)keys, /* which are only read */
        .values = (float *)values,
    };
    prefer_large_pages(cache, n);
    copy_heads((copy_job){.to = cache, .from = &snapshot, .n = n, .sums = sums}, restore_unit);
}

/* ---- 9. The forward pass --------------------------------------------------------------------- */

/* Linear layers: out = in x weight + bias for all rows, then the activation, or added to the
 * residual stream. */
typedef struct {
    const tg_kernels *kernels;
    int m;                             /* rows */
    int k;                             /* inputs */
    int n;                             /* outputs */
    rows in;                           /* [m, k] */
    const float *weight;               /* [up(n) / 16, k, 16] */
    const float *bias;                 /* [up(n)], or NULL */
    rows out;                          /* [m, up(n)] */
    void (*activation)(float *x, int n); /* or NULL */
    rows residual;                     /* [m, n]; data NULL: none */
    int group;                         /* panels in a unit */
} linear_job;

static void linear_unit(const void *argument, int unit) {
    const linear_job *job = argument;
    size_t from = (size_t)unit * job->group * LANES; /* the first output */
    int panels = smaller(job->group, (int)((up(job->n) - from) / LANES));
    int n = panels * LANES;

    job->kernels->product(job->in.data, job->in.stride, job->m, job->weight + from * job->k,
                          (size_t)job->k * LANES, panels, job->k,
                          job->bias ? job->bias + from : NULL, job->out.data + from,
                          job->out.stride);

    for (int i = 0; i < job->m; i++) {
        float *out = row_of(job->out, i) + from;
        if (job->activation) job->activation(out, n);
        if (job->residual.data) {
            float *x = row_of(job->residual, i) + from;
            for (int j = 0; j < n; j++) x[j] += out[j];
        }
    }
}

/* How many panels are in a unit. For one row, units are long stretches of memory, yet so many that
 * no thread waits long for the last. For more rows, a unit has many panels for each copy of the
 * rows, and the number is the one that lets all threads end together. */
static int panels_in_unit(int m, int panels, int threads) {
    int group = 32;
    while (group > 1 && panels < group * threads * (group > 4 ? 8 : 2)) group /= 2;
    if (m == 1) return group;

    int least = INT_MAX;
    for (int g = m > 192 ? 24 : 16; g > 0; g -= g > 4 ? 4 : 1) {
        int units = (panels + g - 1) / g;
        int most = (units + threads - 1) / threads * g; /* panels that one thread computes */
        if (most < least) {
            least = most;
            group = g;
        }
    }
    return group;
}

static void linear(const tg_model *model, linear_job job) {
    int panels = (int)(up(job.n) / LANES);
    if (job.m == 0) return;

    job.kernels = model->kernels;
    job.group = panels_in_unit(job.m, panels, model->threads);
    int units = (panels + job.group - 1) / job.group;
    parallel(model->threads, linear_unit, &job, units, (double)job.m * job.k * job.n);
}

/* Layer norms, row by row. */
typedef struct {
    const tg_model *model;
    rows in;             /* [m, n_embd] */
    const float *weight; /* [up(n_embd)] */
    const float *bias;   /* [up(n_embd)] */
    rows out;            /* [m, up(n_embd)] */
} norm_job;

static void norm_unit(const void *argument, int unit) {
    const norm_job *job = argument;
    const tg_config *c = &job->model->config;
    job->model->kernels->layer_norm(row_of(job->in, unit), job->weight, job->bias,
                                    c->layer_norm_epsilon, c->n_embd, row_of(job->out, unit));
}

/* a = layer norm of x. `tensors`: the weight and the bias. */
static void layer_norm(tg_pass *p, const float *const *tensors) {
    norm_job job = {
        .model = p->model,
        .in = p->x,
        .weight = tensors[0],
        .bias = tensors[1],
        .out = p->a,
    };
    double cost = 4.0 * p->n_rows * p->model->config.n_embd;
    parallel(p->model->threads, norm_unit, &job, p->n_rows, cost);
}

/* The embeddings of one span's tokens, row by row. */
typedef struct {
    const tg_model *model;
    const tg_span *span;
    rows out; /* [span->n, n_embd] */
} embed_job;

/* A token's embedding, which is one column of one panel, plus that of its position. */
static void embed_unit(const void *argument, int unit) {
    const embed_job *job = argument;
    const tg_model *m = job->model;
    size_t d = m->config.n_embd;
    size_t token = job->span->tokens[unit];
    size_t position = job->span->start + unit;
    const float *wte = m->tensors[WTE] + token / LANES * d * LANES + token % LANES;
    const float *wpe = m->tensors[WPE] + position * up(d);
    float *x = row_of(job->out, unit);
    for (size_t e = 0; e < d; e++) x[e] = wte[e * LANES] + wpe[e];
}

static void embed(const tg_model *m, const tg_span *span, rows out) {
    embed_job job = {.model = m, .span = span, .out = out};
    parallel(m->threads, embed_unit, &job, span->n, 8.0 * span->n * m->config.n_embd);
}

/* Attention. A unit is one head of one span. */
typedef struct {
    tg_pass *pass;
    int layer;
    float scale; /* of the scores */
} attention_job;

/* The head's keys and values of a span's rows go from h into the text's cache. */
static void store_keys_and_values(const attention_job *job, const placed_span *span, int head) {
    const tg_model *m = job->pass->model;
    size_t n_embd = m->config.n_embd;
    size_t d = m->head_size;
    float *keys = keys_of(span->cache, job->layer, head);
    float *values = values_of(span->cache, job->layer, head);

    for (int i = 0; i < span->n; i++) {
        const float *key = row_of(job->pass->h, span->row + i) + n_embd + head * d;
        const float *value = key + n_embd;
        size_t position = span->start + i;
        for (size_t e = 0; e < d; e++) keys[key_index(span->cache, position, e)] = key[e];
        for (size_t e = 0; e < d; e += LANES)
            memcpy(values + value_index(span->cache, position, e), value + e,
                   (d - e < LANES ? d - e : LANES) * sizeof *value);
    }
}

/* sums = values by weight, for n rows, the first of which sees `seen` positions and each other one
 * more than the row before it. What all see is one product. Then each row goes on alone to its own
 * end: what stands in the cache behind it, be it NaN, is not read. */
static void weigh_values(const tg_model *m, rows weights, int n, int seen, const float *values,
                         rows sums) {
    size_t stride = (size_t)m->config.n_positions * LANES;
    int panels = (int)up(m->head_size) / LANES;
    m->kernels->product(weights.data, weights.stride, n, values, stride, panels, seen, NULL,
                        sums.data, sums.stride);
    for (int i = 1; i < n; i++) {
        float *sum = row_of(sums, i);
        m->kernels->product(row_of(weights, i) + seen, 0, 1, values + (size_t)seen * LANES, stride,
                            panels, i, sum, sum, 0);
    }
}

/* One head of n rows of a span, from row `first` of it: scores of all positions up to the row's
 * own, softmax, and the sum of the values by these weights, which goes to `a`. */
static void attend(const attention_job *job, const placed_span *span, int head, int first, int n) {
    tg_pass *p = job->pass;
    const tg_model *m = p->model;
    size_t d = m->head_size;
    rows scores = {row_of(p->scores, (size_t)worker * ATTENTION_ROWS), p->scores.stride};
    rows sums = {row_of(p->sums, (size_t)worker * ATTENTION_ROWS), p->sums.stride};
    const float *query = row_of(p->h, span->row + first) + head * d;
    int seen = span->start + first + 1; /* positions that the first row sees */
    int panels = (int)up(seen + n - 1) / LANES;

    m->kernels->product(query, p->h.stride, n, keys_of(span->cache, job->layer, head), d * LANES,
                        panels, (int)d, NULL, scores.data, scores.stride);
    for (int i = 0; i < n; i++) m->kernels->softmax(row_of(scores, i), seen + i, job->scale);

    weigh_values(m, scores, n, seen, values_of(span->cache, job->layer, head), sums);
    for (int i = 0; i < n; i++)
        memcpy(row_of(p->a, span->row + first + i) + head * d, row_of(sums, i), d * sizeof(float));
}

static void attention_unit(const void *argument, int unit) {
    const attention_job *job = argument;
    int n_head = job->pass->model->config.n_head;
    const placed_span *span = &job->pass->spans[unit / n_head];
    int head = unit % n_head;

    store_keys_and_values(job, span, head);
    for (int first = 0; first < span->n; first += ATTENTION_ROWS)
        attend(job, span, head, first, smaller(ATTENTION_ROWS, span->n - first));
}

/* a = what each row gathers from the positions of its own text up to itself. */
static void attention(tg_pass *p, int layer) {
    const tg_config *c = &p->model->config;
    double scale = c->scale_attn_weights ? 1 / sqrt((double)p->model->head_size) : 1;
    if (c->scale_attn_by_inverse_layer_idx) scale /= layer + 1;

    double cost = 0;
    for (int i = 0; i < p->n_spans; i++) {
        const placed_span *span = &p->spans[i];
        cost += (double)span->n * (span->start + span->n) * c->n_embd;
    }

    attention_job job = {.pass = p, .layer = layer, .scale = (float)scale};
    parallel(p->model->threads, attention_unit, &job, p->n_spans * c->n_head, cost);
}

/* Moves the wanted rows of x and a to the front. After the last layer's attention no row needs the
 * others, so from there on only the wanted ones are computed. */
static void keep_wanted_rows(tg_pass *p) {
    size_t size = p->model->config.n_embd * sizeof(float);
    int kept = 0;
    for (int i = 0; i < p->n_spans; i++) {
        const placed_span *span = &p->spans[i];
        int end = span->row + span->n;
        for (int row = end - span->wanted; row < end; row++) {
            memmove(row_of(p->x, kept), row_of(p->x, row), size);
            memmove(row_of(p->a, kept), row_of(p->a, row), size);
            kept++;
        }
    }
    p->n_rows = kept;
}

/* The steps of a layer. tg_forward looks at the clock between them. */
enum { QUERIES_KEYS_VALUES, ATTENTION, MLP_INSIDE, MLP_OUT, STEPS_PER_LAYER };

static void layer_step(tg_pass *p, int layer, int step) {
    const tg_model *m = p->model;
    const tg_config *c = &m->config;
    const float *const *w = layer_tensors(m, layer);
    int d = c->n_embd;
    int inner = c->n_inner;

    switch (step) {
    case QUERIES_KEYS_VALUES:
        layer_norm(p, w + LN_1);
        linear(m, (linear_job){
            .m = p->n_rows, .k = d, .n = 3 * d,
            .in = p->a, .weight = w[C_ATTN], .bias = w[C_ATTN + 1], .out = p->h,
        });
        break;

    case ATTENTION:
        attention(p, layer);
        if (layer == c->n_layer - 1) keep_wanted_rows(p);
        linear(m, (linear_job){
            .m = p->n_rows, .k = d, .n = d,
            .in = p->a, .weight = w[ATTN_PROJ], .bias = w[ATTN_PROJ + 1], .out = p->h,
            .residual = p->x,
        });
        break;

    case MLP_INSIDE:
        layer_norm(p, w + LN_2);
        linear(m, (linear_job){
            .m = p->n_rows, .k = d, .n = inner,
            .in = p->a, .weight = w[C_FC], .bias = w[C_FC + 1], .out = p->h,
            .activation = m->kernels->activate[c->activation],
        });
        break;

    case MLP_OUT:
        linear(m, (linear_job){
            .m = p->n_rows, .k = inner, .n = d,
            .in = p->h, .weight = w[MLP_PROJ], .bias = w[MLP_PROJ + 1], .out = p->a,
            .residual = p->x,
        });
        break;
    }
}

static int is_done(const tg_pass *p) {
    return p->step == p->model->config.n_layer * STEPS_PER_LAYER + 1;
}

/* Runs the next step of the transformer: a part of a layer, which adds attention or an MLP to x;
 * or, at the end, the final layer norm, from whose rows in `a` the logits are computed. */
static void next_step(tg_pass *p) {
    int layer = p->step / STEPS_PER_LAYER;
    if (layer < p->model->config.n_layer)
        layer_step(p, layer, p->step % STEPS_PER_LAYER);
    else
        layer_norm(p, layer_tensors(p->model, layer) + LN_F);
    p->step++;
}

/* From `enter`, unless it returns 0, to `leave` the pass is this thread's, and the floating-point
 * environment is the default one: the bits must not depend on the caller's rounding mode, and
 * denormal numbers are numbers. */
static int enter(tg_pass *p) {
    if (atomic_flag_test_and_set(&p->busy)) return 0;
    fegetenv(&p->caller);
    fesetenv(FE_DFL_ENV);
    return 1;
}

static int leave(tg_pass *p, int status) {
    fesetenv(&p->caller);
    atomic_flag_clear(&p->busy);
    return status;
}

static int span_is_good(const tg_pass *p, const tg_span *span) {
    const tg_config *c = &p->model->config;
    if (!span->cache || span->cache->model != p->model) return 0;
    if (span->n < 1 || span->n > p->chunk) return 0;
    if (span->start < 0 || span->start > c->n_positions - span->n) return 0;
    if (span->wanted < 0 || span->wanted > span->n) return 0;
    for (int i = 0; i < span->n; i++)
        if (span->tokens[i] < 0 || span->tokens[i] >= c->vocab_size) return 0;
    return 1;
}

static int spans_are_good(const tg_pass *p, const tg_span *spans, int n_spans) {
    int n_rows = 0;
    if (n_spans < 1 || n_spans > p->chunk) return 0;
    for (int i = 0; i < n_spans; i++) {
        if (!span_is_good(p, &spans[i])) return 0;
        n_rows += spans[i].n;
        if (n_rows > p->chunk) return 0;
        for (int other = 0; other < i; other++)
            if (spans[other].cache == spans[i].cache) return 0;
    }
    return 1;
}

/* Places the spans' rows one after the other and fills x with their embeddings. */
static void start_pass(tg_pass *p, const tg_span *spans, int n_spans) {
    p->n_spans = n_spans;
    p->n_rows = 0;
    p->n_wanted = 0;
    p->n_logits = 0;
    p->step = 0;
    for (int i = 0; i < n_spans; i++) {
        const tg_span *span = &spans[i];
        p->spans[i] = (placed_span){span->cache, p->n_rows, span->n, span->start, span->wanted};
        embed(p->model, span, (rows){row_of(p->x, p->n_rows), p->x.stride});
        p->n_rows += span->n;
        p->n_wanted += span->wanted;
    }
}

int tg_forward(tg_pass *p, const tg_span *spans, int n_spans) {
    int64_t until = nanoseconds() + 20000000;
    if (!enter(p)) return TG_BUSY;

    if (n_spans != 0) {
        if (!spans_are_good(p, spans, n_spans)) return leave(p, TG_BAD_ARGUMENT);
        start_pass(p, spans, n_spans);
    }
    if (p->step == NOT_STARTED) return leave(p, TG_BAD_ARGUMENT);

    while (!is_done(p) && nanoseconds() < until) next_step(p);
    return leave(p, is_done(p) ? TG_DONE : TG_MORE);
}

/* The logits of wanted rows from `first`: a x the head, which is wte where they are tied. */
static void compute_logits(tg_pass *p, int first, int n) {
    const tg_model *m = p->model;
    const float *const *last = layer_tensors(m, m->config.n_layer);
    linear(m, (linear_job){
        .m = n, .k = m->config.n_embd, .n = m->config.vocab_size,
        .in = {row_of(p->a, first), p->a.stride},
        .weight = m->config.tied ? m->tensors[WTE] : last[LM_HEAD],
        .out = p->logits,
    });
    p->first_logits = first;
    p->n_logits = n;
}

int tg_logits(tg_pass *p, int row, const float **logits) {
    if (!enter(p)) return TG_BUSY;
    if (p->step == NOT_STARTED || !is_done(p) || row < 0 || row >= p->n_wanted)
        return leave(p, TG_BAD_ARGUMENT);

    if (row < p->first_logits || row >= p->first_logits + p->n_logits) {
        int n = logits_at_a_time(p->model);
        int first = row / n * n;
        compute_logits(p, first, smaller(n, p->n_wanted - first));
    }
    *logits = row_of(p->logits, row - p->first_logits);
    return leave(p, TG_DONE);
}

/* ---- 10. The choice of a token -------------------------------------------------------------------
 *
 * Chance belongs to the place, not to a stream of random numbers: the noise of a token is a hash of
 * the seed, the position and the token. The chosen token is the one with the largest
 * score / temperature - log(-log(u)) (Gumbel-max), which draws exactly by the probabilities. */

#define GAMMA UINT64_C(0x9E3779B97F4A7C15)

/* The mixing steps of SplitMix64: Steele, Lea & Flood, "Fast Splittable Pseudorandom Number
 * Generators", 2014. */
static uint64_t mix(uint64_t z) {
    z = (z ^ z >> 30) * UINT64_C(0xBF58476D1CE4E5B9);
    z = (z ^ z >> 27) * UINT64_C(0x94D049BB133111EB);
    return z ^ z >> 31;
}

static uint64_t key_of(uint64_t seed, int64_t position) {
    return mix(mix(seed + GAMMA) + ((uint64_t)position + 1) * GAMMA);
}

static uint64_t hash_of(uint64_t key, int32_t token) {
    return mix(key + ((uint64_t)token + 1) * GAMMA);
}

/* -log(-log(u)) with u from the hash, between 0 and 1 and never either. */
static double gumbel(const tg_kernels *kernels, uint64_t hash) {
    double u = ((double)(hash >> 12) + 0.5) * 0x1p-52;
    return -kernels->log(-kernels->log(u));
}

/* A number that gumbel(hash) cannot exceed, without a logarithm. As -log(u) >= 1 - u, it is at most
 * -log(1 - u); with z leading ones in the hash, 1 - u > 2^-(z + 1). 0.6932 is above log(2). */
static double gumbel_bound(uint64_t hash) {
    int ones = __builtin_clzll(~hash | 1 << 11);
    return (ones + 1) * 0.6932;
}

/* A score as the draw and the filters need it: the difference from the best one, by temperature.
 * Nothing overflows upwards. */
static double relative(double score, double best, double temperature) {
    return (score - best) / temperature;
}

/* The draw. Nearly all tokens are skipped by the bound, which costs a hash, a multiplication and a
 * comparison. The bound has a margin that is far larger than the rounding error of the
 * multiplication. */
static int32_t draw(const tg_kernels *kernels, const candidate *c, int n, double best_score,
                    const tg_options *o) {
    uint64_t key = key_of(o->seed, o->position);
    double inverse = fmin(1 / o->temperature, 0x1p1023); /* finite, so that the bound is one */
    double best = -INFINITY;
    int32_t token = TG_NO_TOKEN;
    for (int i = 0; i < n; i++) {
        uint64_t hash = hash_of(key, c[i].token);
        if (best - (c[i].score - best_score) * inverse >= gumbel_bound(hash)) continue;

        double noisy = relative(c[i].score, best_score, o->temperature) + gumbel(kernels, hash);
        if (noisy > best || (noisy == best && c[i].token < token) || token == TG_NO_TOKEN) {
            best = noisy;
            token = c[i].token;
        }
    }
    return token;
}

static int comes_before(candidate a, candidate b) {
    return a.score > b.score || (a.score == b.score && a.token < b.token);
}

/* The best of candidates that are in the order of their tokens. */
static candidate first_best(const candidate *c, int n) {
    int best = 0;
    for (int i = 1; i < n; i++)
        if (c[i].score > c[best].score) best = i;
    return c[best];
}

/* Lets c[i] sink to its place in a heap of n, whose root comes before all others. */
static void sink(candidate *c, int n, int i) {
    candidate sinking = c[i];
    for (;;) {
        int child = 2 * i + 1;
        if (child + 1 < n && comes_before(c[child + 1], c[child])) child++;
        if (child >= n || !comes_before(c[child], sinking)) break;
        c[i] = c[child];
        i = child;
    }
    c[i] = sinking;
}

static void make_heap(candidate *c, int n) {
    for (int i = n / 2 - 1; i >= 0; i--) sink(c, n, i);
}

/* Takes the best candidate out of a heap of n and puts it behind the n - 1 that are left. */
static candidate take_best(candidate *c, int n) {
    candidate best = c[0];
    c[0] = c[n - 1];
    c[n - 1] = best;
    sink(c, n - 1, 0);
    return best;
}

/* Replaces the smallest number of a heap of n, which is its root. */
static void replace_smallest(double *heap, int n, double number) {
    int i = 0;
    for (;;) {
        int child = 2 * i + 1;
        if (child + 1 < n && heap[child + 1] < heap[child]) child++;
        if (child >= n || heap[child] >= number) break;
        heap[i] = heap[child];
        i = child;
    }
    heap[i] = number;
}

/* The k-th largest score. The heap [k] holds the k largest so far. */
static double kth_score(const candidate *c, int n, int k, double *heap) {
    for (int i = 0; i < k; i++) heap[i] = -INFINITY;
    for (int i = 0; i < n; i++)
        if (c[i].score > heap[0]) replace_smallest(heap, k, c[i].score);
    return heap[0];
}

/* Keeps the candidates whose score is `least` or better, in their order; returns how many. */
static int keep_scores(candidate *c, int n, double least) {
    int kept = 0;
    for (int i = 0; i < n; i++)
        if (c[i].score >= least) c[kept++] = c[i];
    return kept;
}

/* Keeps the k best, and those as good as the k-th. */
static int keep_top_k(candidate *c, int n, int k, double *heap) {
    if (k <= 0 || k >= n) return n;
    return keep_scores(c, n, kth_score(c, n, k, heap));
}

/* Weighs the candidates by exp of their relative scores; returns the sum of the weights. */
static double weigh(tg_pass *p, int n, double best, double temperature) {
    candidate *c = p->candidates;
    for (int i = 0; i < n; i++) p->weights[i] = (float)relative(c[i].score, best, temperature);
    p->model->kernels->exp(p->weights, n);

    double sum = 0;
    for (int i = 0; i < n; i++) {
        c[i].weight = p->weights[i];
        sum += c[i].weight;
    }
    return sum;
}

/* Copies every candidate, as a branch that the processor cannot predict would cost more. */
static int keep_weights(candidate *c, int n, double least) {
    int kept = 0;
    for (int i = 0; i < n; i++) {
        candidate next = c[i];
        c[kept] = next;
        kept += next.weight >= least;
    }
    return kept;
}

/* Candidates in buckets, each of which holds better ones than the next. */
typedef struct {
    int count;
    double best;      /* score */
    double per_score; /* buckets */
    int *starts;      /* [count + 2]: bucket i has the candidates from starts[i] to starts[i + 1] */
} buckets;

static int bucket_of(const buckets *b, candidate c) {
    return (int)((b->best - c.score) * b->per_score);
}

/* Copies n candidates to `out`, in n buckets of equal ranges of scores. So most buckets have few,
 * and little is left to be sorted. */
static void fill_buckets(buckets *b, const candidate *c, int n, candidate *out) {
    double range = 0;
    for (int i = 0; i < n; i++) range = fmax(range, b->best - c[i].score);
    b->count = n;
    b->per_score = range > 1e-300 ? (n - 1) / range : 0; /* which does not overflow */

    memset(b->starts, 0, (n + 2) * sizeof *b->starts);
    for (int i = 0; i < n; i++) b->starts[bucket_of(b, c[i]) + 2]++;
    for (int i = 0; i < n; i++) b->starts[i + 2] += b->starts[i + 1];
    for (int i = 0; i < n; i++) out[b->starts[bucket_of(b, c[i]) + 1]++] = c[i];
}

/* Keeps the fewest best that hold at least the part top_p of the probability. The tokens that
 * are cut hold at most 1 - top_p together. So a token below (1 - top_p) / n is always cut,
 * and it is dropped before the rest is sorted. */
static int keep_top_p(tg_pass *p, int n, double best, const tg_options *o) {
    candidate *c = p->candidates;
    if (o->top_p >= 1) return n;

    double sum = weigh(p, n, best, o->temperature);
    n = keep_weights(c, n, (1 - o->top_p) * sum / n);
    buckets b = {.best = best, .starts = p->starts};
    fill_buckets(&b, c, n, p->sorted);
    int kept = 0;
    double held = 0;
    for (int i = 0; i < b.count; i++) {
        candidate *bucket = p->sorted + b.starts[i];
        int left = b.starts[i + 1] - b.starts[i];
        make_heap(bucket, left);
        for (; left > 0; left--) {
            if (kept > 0 && held >= o->top_p * sum) return kept;
            c[kept] = take_best(bucket, left);
            held += c[kept++].weight;
        }
    }
    return kept;
}

/* Keeps those whose probability is at least min_p times that of the best. */
static int keep_min_p(tg_pass *p, int n, double best, const tg_options *o) {
    candidate *c = p->candidates;
    if (!(o->min_p > 0)) return n;

    double least = p->model->kernels->log(o->min_p);
    int kept = 0;
    for (int i = 0; i < n; i++)
        if (relative(c[i].score, best, o->temperature) >= least) c[kept++] = c[i];
    return kept;
}

/* Whether every token may be chosen, by its logit. */
static int is_plain(const tg_options *o) {
    return o->n_bias == 0 && o->n_seen == 0 && !o->allowed;
}

/* Fills the candidates with the tokens that are allowed, bias and penalty included, but for those
 * with a score of -infinity; returns how many. */
static int list_candidates(tg_pass *p, const float *logits, const tg_options *o) {
    candidate *c = p->candidates;
    int size = p->model->config.vocab_size;

    for (int t = 0; t < size; t++) c[t] = (candidate){.score = logits[t], .token = t};
    for (int i = 0; i < o->n_bias; i++) c[o->bias_tokens[i]].score += o->bias[i];
    for (int i = 0; i < o->n_seen; i++) {
        double *score = &c[o->seen[i]].score;
        *score = *score < 0 ? *score * o->repetition_penalty : *score / o->repetition_penalty;
    }

    if (is_plain(o)) return size;
    int n = 0;
    for (int t = 0; t < size; t++)
        if (c[t].score > -INFINITY && (!o->allowed || o->allowed[t])) c[n++] = c[t];
    return n;
}

/* Applies the filters to candidates whose best score is `best`; returns how many are kept. */
static int filter(tg_pass *p, int n, double best, const tg_options *o) {
    n = keep_top_k(p->candidates, n, o->top_k, p->heap);
    n = keep_top_p(p, n, best, o);
    return keep_min_p(p, n, best, o);
}

/* `top` is the token with the largest logit. */
static int32_t choose(tg_pass *p, const float *logits, const tg_options *o, int top) {
    candidate *c = p->candidates;
    int n = list_candidates(p, logits, o);
    if (n == 0) return TG_NO_TOKEN;

    candidate best = is_plain(o) ? c[top] : first_best(c, n);
    if (o->temperature == 0) return best.token;

    n = filter(p, n, best.score, o);
    return draw(p->model->kernels, c, n, best.score, o);
}

/* Takes the n best of `left` candidates, best first; returns how many there were. */
static int take_tokens(candidate *c, int left, int n, int32_t *tokens) {
    n = smaller(n, left);
    make_heap(c, left);
    for (int i = 0; i < n; i++) tokens[i] = take_best(c, left - i).token;
    return n;
}

/* Replaces each candidate's score by the number that `draw` compares. */
static void add_noise(tg_pass *p, int n, double best, const tg_options *o) {
    candidate *c = p->candidates;
    uint64_t key = key_of(o->seed, o->position);
    for (int i = 0; i < n; i++)
        c[i].score = relative(c[i].score, best, o->temperature) +
                     gumbel(p->model->kernels, hash_of(key, c[i].token));
}

/* Lists the candidates that are not among the first `n` tokens. */
static int list_others(tg_pass *p, const float *logits, const tg_options *o, const int32_t *tokens,
                       int n) {
    candidate *c = p->candidates;
    float *is_taken = p->weights; /* the filters need them no more */
    for (int t = 0; t < p->model->config.vocab_size; t++) is_taken[t] = 0;
    for (int i = 0; i < n; i++) is_taken[tokens[i]] = 1;

    int all = list_candidates(p, logits, o);
    int left = 0;
    for (int i = 0; i < all; i++)
        if (!is_taken[c[i].token]) c[left++] = c[i];
    return left;
}

static int order(tg_pass *p, const float *logits, const tg_options *o, int n, int32_t *tokens) {
    candidate *c = p->candidates;
    int all = list_candidates(p, logits, o);
    if (all == 0 || o->temperature == 0) return take_tokens(c, all, n, tokens);

    double best = first_best(c, all).score;
    int kept = filter(p, all, best, o);
    add_noise(p, kept, best, o);
    int taken = take_tokens(c, kept, n, tokens);
    if (taken == n || taken == all) return taken;

    int left = list_others(p, logits, o, tokens, taken);
    return taken + take_tokens(c, left, n - taken, tokens + taken);
}

static int is_token(const tg_pass *p, int32_t token) {
    return token >= 0 && token < p->model->config.vocab_size;
}

static int options_are_good(const tg_pass *p, const tg_options *o) {
    for (int i = 0; i < o->n_bias; i++)
        if (!is_token(p, o->bias_tokens[i])) return 0;
    for (int i = 0; i < o->n_seen; i++)
        if (!is_token(p, o->seen[i])) return 0;
    return 1;
}

int tg_check(tg_pass *p, const float *logits) {
    if (!enter(p)) return TG_BUSY;
    int best = p->model->kernels->best(logits, p->model->config.vocab_size);
    return leave(p, best < 0 ? TG_NOT_FINITE : TG_DONE);
}

int tg_choose(tg_pass *p, const float *logits, const tg_options *o, int32_t *token) {
    if (!enter(p)) return TG_BUSY;
    if (!options_are_good(p, o)) return leave(p, TG_BAD_ARGUMENT);

    int top = p->model->kernels->best(logits, p->model->config.vocab_size);
    if (top < 0) return leave(p, TG_NOT_FINITE);

    *token = is_plain(o) && o->temperature == 0 ? top : choose(p, logits, o, top);
    return leave(p, TG_DONE);
}

int tg_order(tg_pass *p, const float *logits, const tg_options *o, int n, int32_t *tokens,
             int32_t *count) {
    int size = p->model->config.vocab_size;
    if (!enter(p)) return TG_BUSY;
    if (!options_are_good(p, o) || n < 1 || n > size) return leave(p, TG_BAD_ARGUMENT);
    if (p->model->kernels->best(logits, size) < 0) return leave(p, TG_NOT_FINITE);

    *count = order(p, logits, o, n, tokens);
    return leave(p, TG_DONE);
}

/* ---- 11. Log-probabilities ------------------------------------------------------------------- */

typedef struct {
    double top; /* the largest logit */
    double log; /* of the sum of exp(logit - top) */
} normalizer;

static normalizer normalizer_of(const tg_pass *p, const float *logits) {
    const tg_kernels *kernels = p->model->kernels;
    float top;
    float sum;
    kernels->log_sum(logits, p->model->config.vocab_size, &top, &sum);
    return (normalizer){.top = top, .log = kernels->log(sum)};
}

static double log_probability(normalizer n, float logit) { return (double)logit - n.top - n.log; }

int tg_log_probability(tg_pass *p, const float *logits, int32_t token, double *result) {
    if (!enter(p)) return TG_BUSY;
    if (!is_token(p, token)) return leave(p, TG_BAD_ARGUMENT);
    if (p->model->kernels->best(logits, p->model->config.vocab_size) < 0)
        return leave(p, TG_NOT_FINITE);

    *result = log_probability(normalizer_of(p, logits), logits[token]);
    return leave(p, TG_DONE);
}

int tg_rank(tg_pass *p, const float *logits, int32_t token, int32_t *rank) {
    int size = p->model->config.vocab_size;
    if (!enter(p)) return TG_BUSY;
    if (!is_token(p, token)) return leave(p, TG_BAD_ARGUMENT);
    if (p->model->kernels->best(logits, size) < 0) return leave(p, TG_NOT_FINITE);

    int better = 0;
    for (int t = 0; t < token; t++) better += logits[t] >= logits[token];
    for (int t = token + 1; t < size; t++) better += logits[t] > logits[token];
    *rank = better;
    return leave(p, TG_DONE);
}

int tg_top(tg_pass *p, const float *logits, int n, int32_t *tokens, double *logprobs) {
    static const tg_options plain = {.repetition_penalty = 1};
    int size = p->model->config.vocab_size;
    if (!enter(p)) return TG_BUSY;
    if (n < 1 || n > size) return leave(p, TG_BAD_ARGUMENT);
    if (p->model->kernels->best(logits, size) < 0) return leave(p, TG_NOT_FINITE);

    int left = list_candidates(p, logits, &plain);
    left = keep_top_k(p->candidates, left, n, p->heap);
    take_tokens(p->candidates, left, n, tokens);
    normalizer sum = normalizer_of(p, logits);
    for (int i = 0; i < n; i++) logprobs[i] = log_probability(sum, logits[tokens[i]]);
    return leave(p, TG_DONE);
}

#endif
