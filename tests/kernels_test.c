/* kernels_test.c: kernels.c used from C, without Python.
 *
 * Small random models of several shapes must give the same logits, choices and log-probabilities,
 * bit for bit, on every instruction set that this machine has, with any number of threads, however
 * a text is cut into passes, and whatever other texts are in them. Then what C programs may do with
 * it: copy caches, compute in several threads, use one pass in two threads, fork, give up a pass,
 * set the floating-point environment, use arguments and weights that are wrong.
 *
 * The first thing that does not hold is printed with its line, and the exit code is 1. Otherwise
 * two hashes are printed: of all logits, and of all that is made of them. They are the same on
 * every machine.
 *
 * Arguments: `nofork` leaves out fork, which ThreadSanitizer and QEMU do not support beside
 * threads; `brief` tries fewer threads and cuts, where all is slow; `hash` computes the hashes
 * alone.
 *
 * SPDX-License-Identifier: MIT */
#include "../kernels.c" /* whose head is the header */

#include <dirent.h>
#include <limits.h>
#include <stddef.h>
#include <stdio.h>
#include <sys/wait.h>
#include <unistd.h>

#define CHECK(condition) check(condition, #condition, __LINE__)
#define COUNT(array) ((int)(sizeof(array) / sizeof *(array)))

enum { POSITIONS = 72, VOCAB = 300, CHOICES = 32, TOP = 8, FORKS = 40 };

static void check(int holds, const char *what, int line) {
    if (holds) return;
    fprintf(stderr, "kernels_test.c:%d: expected %s\n", line, what);
    exit(1);
}

/* -------------------------------------------------------------------------------------------------
 * Models in memory
 * ---------------------------------------------------------------------------------------------- */

typedef struct {
    tg_config config;
    float *file; /* the tensors, one after the other, as in a .tg2 file */
    size_t size; /* of that, in floats */
    int64_t *offsets;
    int n_tensors;
    uint64_t random;
} example;

/* SplitMix64: Steele, Lea & Flood, "Fast Splittable Pseudorandom Number Generators" (2014). */
static uint64_t next_random(uint64_t *state) {
    uint64_t z = *state += 0x9e3779b97f4a7c15;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
}

/* From -1/2 to 1/2, in steps that float32 has exactly. */
static float small_number(example *e) {
    return (float)(next_random(&e->random) >> 40) / 16777216 - 0.5f;
}

static int whole_lanes(int n) { return (n + LANES - 1) / LANES * LANES; }

static float *add_tensor(example *e, size_t count) {
    e->offsets[e->n_tensors++] = (int64_t)(e->size * sizeof *e->file);
    e->size += count;
    return e->file + e->size - count;
}

static void add_matrix(example *e, int inputs, int outputs) {
    float *panels = add_tensor(e, (size_t)whole_lanes(outputs) * inputs);
    for (int o = 0; o < outputs; o++)
        for (int i = 0; i < inputs; i++)
            panels[(o / LANES * inputs + i) * LANES + o % LANES] = small_number(e);
}

static void add_vector(example *e, int n, float mean) {
    float *vector = add_tensor(e, whole_lanes(n));
    for (int i = 0; i < n; i++) vector[i] = mean + small_number(e);
}

static void add_norm(example *e) {
    add_vector(e, e->config.n_embd, 1);
    add_vector(e, e->config.n_embd, 0);
}

static void add_linear(example *e, int inputs, int outputs) {
    add_matrix(e, inputs, outputs);
    add_vector(e, outputs, 0);
}

/* A model of these sizes. With `repeat`, all its layers are the first one. */
static example new_example(tg_config config, int repeat) {
    example e = {.config = config, .random = (uint64_t)config.n_embd};
    int n_embd = config.n_embd;
    e.file = calloc(1 << 20, sizeof *e.file);
    e.offsets = calloc(12 * config.n_layer + 5, sizeof *e.offsets);
    CHECK(e.file && e.offsets);
    add_matrix(&e, n_embd, config.vocab_size);
    float *wpe = add_tensor(&e, (size_t)config.n_positions * whole_lanes(n_embd));
    for (int t = 0; t < config.n_positions; t++)
        for (int i = 0; i < n_embd; i++) wpe[t * whole_lanes(n_embd) + i] = small_number(&e);
    for (int i = 0; i < config.n_layer; i++) {
        if (i && repeat) {
            for (int j = 0; j < 12; j++, e.n_tensors++)
                e.offsets[e.n_tensors] = e.offsets[e.n_tensors - 12];
            continue;
        }
        add_norm(&e);
        add_linear(&e, n_embd, 3 * n_embd);
        add_linear(&e, n_embd, n_embd);
        add_norm(&e);
        add_linear(&e, n_embd, config.n_inner);
        add_linear(&e, config.n_inner, n_embd);
    }
    add_norm(&e);
    if (!config.tied) add_matrix(&e, n_embd, config.vocab_size);
    CHECK(e.size <= 1 << 20);
    return e;
}

static void free_example(example *e) {
    free(e->file);
    free(e->offsets);
}

static tg_model *new_model(const example *e, const char *isa, int threads) {
    tg_model *model = tg_model_new(&e->config, e->file, e->offsets, isa, threads);
    CHECK(model != NULL);
    return model;
}

static tg_pass *new_pass(const tg_model *model) {
    tg_pass *pass = tg_pass_new(model);
    CHECK(pass != NULL);
    return pass;
}

static tg_cache *new_cache(const tg_model *model) {
    tg_cache *cache = tg_cache_new(model);
    CHECK(cache != NULL);
    return cache;
}

/* Widths and head sizes of one lane or less, of no whole lanes, of several; all activations. */
static const tg_config shapes[] = {
    {.vocab_size = 3, .n_positions = 40, .n_embd = 2, .n_layer = 2, .n_head = 2, .n_inner = 3,
     .activation = TG_RELU, .scale_attn_weights = 1, .tied = 1, .layer_norm_epsilon = 1e-5f},
    {.vocab_size = 50, .n_positions = 70, .n_embd = 8, .n_layer = 2, .n_head = 4, .n_inner = 21,
     .activation = TG_GELU_NEW, .scale_attn_weights = 1, .layer_norm_epsilon = 1e-5f},
    {.vocab_size = 300, .n_positions = 66, .n_embd = 24, .n_layer = 2, .n_head = 1, .n_inner = 100,
     .activation = TG_GELU, .scale_attn_by_inverse_layer_idx = 1, .layer_norm_epsilon = 1e-3f},
    {.vocab_size = 300, .n_positions = 72, .n_embd = 64, .n_layer = 2, .n_head = 8, .n_inner = 130,
     .activation = TG_GELU_NEW, .scale_attn_weights = 1, .tied = 1, .layer_norm_epsilon = 1e-5f},
};
static const tg_config *const largest = &shapes[COUNT(shapes) - 1];

/* -------------------------------------------------------------------------------------------------
 * What a model says to a text
 * ---------------------------------------------------------------------------------------------- */

typedef struct {
    float logits[POSITIONS][VOCAB];
    int32_t choices[CHOICES]; /* of the next token, as are */
    double log_probabilities[VOCAB];
    int32_t top[TOP];
    double top_log_probabilities[TOP];
} answer;

static void forward(tg_pass *pass, const tg_span *spans, int n_spans) {
    int status = tg_forward(pass, spans, n_spans);
    while (status == TG_MORE) status = tg_forward(pass, NULL, 0);
    CHECK(status == TG_DONE);
}

/* One text's tokens; all their logits are wanted. */
static void forward_one(tg_pass *pass, tg_cache *cache, const int32_t *tokens, int n, int start) {
    forward(pass, &(tg_span){cache, tokens, n, start, n}, 1);
}

static const float *logits_of(tg_pass *pass, int row) {
    const float *logits = NULL;
    CHECK(tg_logits(pass, row, &logits) == TG_DONE);
    return logits;
}

static void text_of(const tg_config *c, uint64_t seed, int32_t *tokens) {
    for (int i = 0; i < c->n_positions; i++)
        tokens[i] = (int32_t)(next_random(&seed) % (uint64_t)c->vocab_size);
}

static void choose_all(tg_pass *pass, const tg_config *c, const float *logits, int32_t *choices) {
    static const tg_options all[] = {
        {.temperature = 1, .top_p = 1, .repetition_penalty = 1},
        {.temperature = 0.7, .top_p = 1, .repetition_penalty = 1, .top_k = 40},
        {.temperature = 1.5, .top_p = 0.9, .min_p = 0.01, .repetition_penalty = 1},
        {.temperature = 0, .top_p = 1, .repetition_penalty = 1.3},
    };
    const double bias[] = {-2, 1.5};
    const int32_t tokens[] = {0, c->vocab_size - 1};
    const int32_t seen[] = {1, 2};
    for (int i = 0; i < CHOICES; i++) {
        tg_options o = all[i % COUNT(all)];
        o.seed = (uint64_t)i * 1000;
        o.position = c->n_positions;
        if (o.repetition_penalty != 1) {
            o.seen = seen;
            o.n_seen = 2;
        }
        if (o.min_p > 0) {
            o.bias = bias;
            o.bias_tokens = tokens;
            o.n_bias = 2;
        }
        CHECK(tg_choose(pass, logits, &o, &choices[i]) == TG_DONE);
        CHECK(choices[i] >= 0 && choices[i] < c->vocab_size);
    }
}

/* The rows' logits of the pass that was just computed, from row `first` of it. */
static void copy_logits(tg_pass *pass, const tg_config *c, int first, int n, float (*out)[VOCAB]) {
    for (int i = 0; i < n; i++)
        memcpy(out[i], logits_of(pass, first + i), c->vocab_size * sizeof(float));
}

/* What follows from the logits of the last row. */
static void judge(tg_pass *pass, const tg_config *c, answer *out) {
    const float *last = out->logits[c->n_positions - 1];
    int n_top = c->vocab_size < TOP ? c->vocab_size : TOP;
    choose_all(pass, c, last, out->choices);
    for (int i = 0; i < c->vocab_size; i++)
        CHECK(tg_log_probability(pass, last, i, &out->log_probabilities[i]) == TG_DONE);
    CHECK(tg_top(pass, last, n_top, out->top, out->top_log_probabilities) == TG_DONE);
}

/* All of it, `chunk` tokens at a time; with `again`, each chunk after another text in its place. */
static void answer_text(tg_pass *pass, tg_cache *cache, const tg_config *c, int chunk, int again,
                        answer *out) {
    int32_t tokens[POSITIONS];
    int32_t others[POSITIONS];
    memset(out, 0, sizeof *out);
    text_of(c, 1, tokens);
    text_of(c, 2, others);
    for (int start = 0, n; start < c->n_positions; start += n) {
        n = c->n_positions - start < chunk ? c->n_positions - start : chunk;
        if (again) forward_one(pass, cache, others + start, n, start);
        forward_one(pass, cache, tokens + start, n, start);
        copy_logits(pass, c, 0, n, out->logits + start);
    }
    judge(pass, c, out);
}

/* FNV-1a. */
static uint64_t hash(uint64_t value, const void *bytes, size_t size) {
    const unsigned char *byte = bytes;
    for (size_t i = 0; i < size; i++) value = (value ^ byte[i]) * 0x100000001b3;
    return value;
}

/* -------------------------------------------------------------------------------------------------
 * The contract
 * ---------------------------------------------------------------------------------------------- */

static void expect_same(const answer *got, const answer *expected, const char *isa, int threads,
                        int chunk, const tg_config *c) {
    if (!memcmp(got, expected, sizeof *got)) return;
    fprintf(stderr, "other bits: %s, %d threads, %d tokens at a time, width %d\n", isa, threads,
            chunk, c->n_embd);
    exit(1);
}

typedef enum { HASH, BRIEF, ALL } effort;

static const char *const isas[] = {"portable", "neon", "avx2", "avx512"};

/* One instruction set, one number of threads, some ways to cut the text. The first answer of all is
 * what every other one must be. */
static void test_cuts(const example *e, const char *isa, int threads, int n_chunks,
                      answer *expected, int *tested) {
    static const int chunks[] = {POSITIONS, 7, 1, 2, 64};
    static answer got;
    tg_model *model = new_model(e, isa, threads);
    tg_pass *pass = new_pass(model);
    tg_cache *cache = new_cache(model);
    CHECK(tg_chunk(model) >= POSITIONS);
    for (int i = 0; i < n_chunks; i++) {
        answer_text(pass, cache, &e->config, chunks[i], chunks[i] == 7, &got);
        if (!*tested) *expected = got;
        *tested = 1;
        expect_same(&got, expected, isa, threads, chunks[i], &e->config);
    }
    tg_cache_free(cache);
    tg_pass_free(pass);
    tg_model_free(model);
}

static void test_every_isa(const tg_config *c, effort how, answer *expected) {
    static const int n_chunks[] = {[HASH] = 1, [BRIEF] = 2, [ALL] = 5};
    example e = new_example(*c, 0);
    int tested = 0;
    for (int i = 0; i < COUNT(isas); i++) {
        if (!tg_isa_name(isas[i])) continue;
        test_cuts(&e, isas[i], i % 2 ? 4 : 1, n_chunks[how], expected, &tested);
        if (how != ALL) continue;
        for (int threads = 1; threads <= 4; threads++)
            test_cuts(&e, isas[i], threads, n_chunks[how], expected, &tested);
    }
    CHECK(tested);
    free_example(&e);
}

/* The comparisons mean something: a token changes every later row of logits, and no earlier one. */
static void test_logits_depend_on_the_text(const answer *expected) {
    example e = new_example(*largest, 0);
    tg_model *model = new_model(&e, NULL, 1);
    tg_pass *pass = new_pass(model);
    tg_cache *cache = new_cache(model);
    int32_t tokens[POSITIONS];
    text_of(largest, 1, tokens);
    tokens[40] = (tokens[40] + 1) % VOCAB;
    forward_one(pass, cache, tokens, POSITIONS, 0);
    for (int i = 0; i < POSITIONS; i++) {
        int differs = !!memcmp(logits_of(pass, i), expected->logits[i], VOCAB * sizeof(float));
        CHECK(differs == (i >= 40));
    }
    tg_cache_free(cache);
    tg_pass_free(pass);
    tg_model_free(model);
    free_example(&e);
}

/* -------------------------------------------------------------------------------------------------
 * Several texts in one pass
 * ---------------------------------------------------------------------------------------------- */

enum { TEXTS = 5, ROUNDS = 60 };

typedef struct {
    tg_cache *cache;
    int32_t tokens[POSITIONS];
    float alone[POSITIONS][VOCAB]; /* the logits when it is computed alone, all at once */
    int length;                    /* tokens in the cache */
} text;

/* From 0 to n - 1. */
static int random_below(uint64_t *random, int n) {
    return (int)(next_random(random) % (uint64_t)n);
}

static void start_text(text *t, const tg_model *model, tg_pass *pass, uint64_t seed) {
    const tg_config *c = &model->config;
    t->cache = new_cache(model);
    t->length = 0;
    text_of(c, seed, t->tokens);
    forward_one(pass, t->cache, t->tokens, c->n_positions, 0);
    copy_logits(pass, c, 0, c->n_positions, t->alone);
}

/* Some tokens of some texts: the next ones, or, after going back, tokens that were there before. */
static int random_spans(uint64_t *random, const tg_config *c, text *texts, tg_span *spans) {
    int n_spans = 0;
    for (int i = 0; i < TEXTS; i++) {
        text *t = &texts[i];
        if (random_below(random, 4) == 0) t->length = random_below(random, t->length + 1);
        int room = c->n_positions - t->length;
        int n = random_below(random, random_below(random, 2) ? 3 : room + 1);
        if (n > room) n = room;
        if (n == 0) continue;

        int wanted = random_below(random, n + 1);
        spans[n_spans++] = (tg_span){t->cache, t->tokens + t->length, n, t->length, wanted};
        t->length += n;
    }
    return n_spans;
}

static const text *text_with(const text *texts, const tg_cache *cache) {
    while (texts->cache != cache) texts++;
    return texts;
}

static void check_spans(tg_pass *pass, const tg_config *c, const text *texts, const tg_span *spans,
                        int n_spans) {
    int row = 0;
    for (int i = 0; i < n_spans; i++) {
        const text *t = text_with(texts, spans[i].cache);
        int end = spans[i].start + spans[i].n;
        for (int position = end - spans[i].wanted; position < end; position++, row++)
            CHECK(!memcmp(logits_of(pass, row), t->alone[position], c->vocab_size * sizeof(float)));
    }
    const float *logits;
    CHECK(tg_logits(pass, row, &logits) == TG_BAD_ARGUMENT);
}

/* Rows have the bits that they have alone, whatever is computed beside them. */
static void test_texts_in_one_pass(const tg_config *c, const char *isa, int threads, int rounds) {
    static text texts[TEXTS];
    example e = new_example(*c, 0);
    tg_model *model = new_model(&e, isa, threads);
    tg_pass *pass = new_pass(model);
    uint64_t random = 7;
    for (int i = 0; i < TEXTS; i++) start_text(&texts[i], model, pass, i + 10);
    for (int round = 0; round < rounds; round++) {
        tg_span spans[TEXTS];
        int n_spans = random_spans(&random, c, texts, spans);
        if (n_spans == 0) continue;
        forward(pass, spans, n_spans);
        check_spans(pass, c, texts, spans, n_spans);
    }
    for (int i = 0; i < TEXTS; i++) tg_cache_free(texts[i].cache);
    tg_pass_free(pass);
    tg_model_free(model);
    free_example(&e);
}

/* Makes everything that a cache holds NaN. */
static void poison(tg_cache *cache) {
    const tg_model *model = cache->model;
    const tg_config *c = &model->config;
    size_t heads = (size_t)c->n_layer * c->n_head;
    size_t n_keys = heads * whole_lanes(c->n_positions) * model->head_size;
    size_t n_values = heads * c->n_positions * whole_lanes(model->head_size);
    for (size_t i = 0; i < n_keys; i++) cache->keys[i] = NAN;
    for (size_t i = 0; i < n_values; i++) cache->values[i] = NAN;
}

/* What the memory of a cache holds behind a row's end must not matter, not even NaN. */
static void test_nan_behind_the_end(const tg_config *c, const char *isa, const answer *expected) {
    static answer got;
    example e = new_example(*c, 0);
    tg_model *model = new_model(&e, isa, 1);
    tg_pass *pass = new_pass(model);
    tg_cache *cache = new_cache(model);
    for (int chunk = 1; chunk < 40; chunk += 6) {
        poison(cache);
        answer_text(pass, cache, c, chunk, 0, &got);
        expect_same(&got, expected, isa, 1, chunk, c);
    }
    tg_cache_free(cache);
    tg_pass_free(pass);
    tg_model_free(model);
    free_example(&e);
}

/* A position whose numbers are NaN spoils its own row and later ones, and no row before it, though
 * all are in one pass. */
static void test_nan_in_a_later_row(const tg_config *c, const char *isa, const answer *expected) {
    enum { BAD = 30 };
    example e = new_example(*c, 0);
    tg_model *model = new_model(&e, isa, 1);
    tg_pass *pass = new_pass(model);
    tg_cache *cache = new_cache(model);
    int32_t tokens[POSITIONS];
    text_of(c, 1, tokens);
    e.file[e.offsets[WPE] / 4 + BAD * whole_lanes(c->n_embd)] = NAN;
    forward_one(pass, cache, tokens, c->n_positions, 0);
    for (int i = 0; i < c->n_positions; i++) {
        const float *logits = logits_of(pass, i);
        int32_t token;
        int status = tg_choose(pass, logits, &(tg_options){.repetition_penalty = 1}, &token);
        CHECK(status == (i < BAD ? TG_DONE : TG_NOT_FINITE));
        if (i < BAD)
            CHECK(!memcmp(logits, expected->logits[i], c->vocab_size * sizeof(float)));
    }
    tg_cache_free(cache);
    tg_pass_free(pass);
    tg_model_free(model);
    free_example(&e);
}

/* -------------------------------------------------------------------------------------------------
 * Caches that are copied, written out and read in
 * ---------------------------------------------------------------------------------------------- */

/* Goes on with a text at `start`, and must get the rest of the answer. */
static void go_on(tg_pass *pass, tg_cache *cache, const tg_config *c, int start,
                  const answer *expected) {
    int32_t tokens[POSITIONS];
    int n = c->n_positions - start;
    text_of(c, 1, tokens);
    forward_one(pass, cache, tokens + start, n, start);
    for (int i = 0; i < n; i++)
        CHECK(!memcmp(logits_of(pass, i), expected->logits[start + i],
                      c->vocab_size * sizeof(float)));
}

/* A cache as its snapshot: keys, values and the sums of both. */
typedef struct {
    float *keys;
    float *values;
    size_t n_keys, n_values;
    uint64_t *sums;
    size_t n_sums;
} snapshot;

static snapshot dump_of(const tg_cache *cache, int n) {
    const tg_config *c = &cache->model->config;
    size_t heads = (size_t)c->n_layer * c->n_head;
    size_t d = cache->model->head_size;
    snapshot s = {.n_keys = heads * up(n) * d, .n_values = heads * up(d) * n, .n_sums = heads * 64};
    s.keys = malloc((s.n_keys + 1) * sizeof *s.keys);
    s.values = malloc((s.n_values + 1) * sizeof *s.values);
    s.sums = malloc((s.n_sums + 1) * sizeof *s.sums);
    CHECK(s.keys && s.values && s.sums);
    s.keys[s.n_keys] = s.values[s.n_values] = 77;
    s.sums[s.n_sums] = 77;
    tg_cache_dump(cache, n, s.keys, s.values, s.sums);
    CHECK(s.keys[s.n_keys] == 77 && s.values[s.n_values] == 77 && s.sums[s.n_sums] == 77);
    return s;
}

static void free_snapshot(snapshot s) {
    free(s.keys);
    free(s.values);
    free(s.sums);
}

static void test_cache(const tg_config *c, const answer *expected) {
    example e = new_example(*c, 0);
    tg_model *model = new_model(&e, NULL, 1);
    tg_pass *pass = new_pass(model);
    tg_cache *first = new_cache(model);
    int32_t tokens[POSITIONS];
    text_of(c, 1, tokens);
    forward_one(pass, first, tokens, c->n_positions, 0);
    for (int n = 0; n < c->n_positions; n += 13) {
        tg_cache *copy = new_cache(model);
        tg_cache *restored = new_cache(model);
        poison(copy);
        poison(restored);
        tg_cache_copy(copy, first, n);
        snapshot of_first = dump_of(first, n);
        snapshot of_copy = dump_of(copy, n);
        CHECK(!memcmp(of_first.keys, of_copy.keys, of_first.n_keys * sizeof(float)));
        CHECK(!memcmp(of_first.values, of_copy.values, of_first.n_values * sizeof(float)));

        uint64_t *sums = malloc(of_first.n_sums * sizeof *sums);
        CHECK(sums != NULL);
        tg_cache_restore(restored, n, of_first.keys, of_first.values, sums);
        CHECK(!memcmp(sums, of_first.sums, of_first.n_sums * sizeof *sums));
        CHECK(!memcmp(sums, of_copy.sums, of_first.n_sums * sizeof *sums));
        go_on(pass, copy, c, n, expected);
        go_on(pass, restored, c, n, expected);

        free(sums);
        free_snapshot(of_first);
        free_snapshot(of_copy);
        tg_cache_free(copy);
        tg_cache_free(restored);
    }
    tg_cache_free(first);
    tg_pass_free(pass);
    tg_model_free(model);
    free_example(&e);
}

/* The sums of n numbers, as the interface defines them. */
static void check_sums(const float *numbers, size_t n, const uint64_t *found) {
    uint64_t sums[2 * LANES] = {0};
    for (size_t i = 0; i < n; i++) {
        uint32_t word;
        memcpy(&word, numbers + i, sizeof word);
        sums[i % LANES] += word;
        sums[LANES + i % LANES] += sums[i % LANES];
    }
    CHECK(!memcmp(sums, found, sizeof sums));
}

/* A snapshot is keys[n_layer, n_head, up(n) / 16, head_size, 16] and values[n_layer, n_head,
 * up(head_size) / 16, n, 16], with zeros where there is no position or number. */
static void test_dump_order(void) {
    enum { N = 20 };
    const tg_config *c = largest;
    example e = new_example(*c, 0);
    tg_model *model = new_model(&e, NULL, 1);
    tg_pass *pass = new_pass(model);
    tg_cache *cache = new_cache(model);
    size_t d = c->n_embd / c->n_head;
    size_t key_size = up(N) * d;
    size_t value_size = up(d) * N;
    int32_t tokens[POSITIONS];
    text_of(c, 1, tokens);
    poison(cache);
    forward_one(pass, cache, tokens, N, 0);
    snapshot s = dump_of(cache, N);

    for (int head = 0; head < c->n_layer * c->n_head; head++) {
        const float *keys = s.keys + head * key_size;
        const float *values = s.values + head * value_size;
        const float *old_keys = keys_of(cache, head / c->n_head, head % c->n_head);
        const float *old_values = values_of(cache, head / c->n_head, head % c->n_head);
        for (size_t i = 0; i < up(N); i++) {
            for (size_t j = 0; j < up(d); j++) {
                size_t key = (i / LANES * d + j) * LANES + i % LANES;
                size_t value = (j / LANES * N + i) * LANES + j % LANES;
                size_t old_value = (j / LANES * c->n_positions + i) * LANES + j % LANES;
                if (j < d) CHECK(keys[key] == (i < N ? old_keys[key] : 0));
                if (i < N) CHECK(values[value] == (j < d ? old_values[old_value] : 0));
            }
        }
        check_sums(keys, key_size, s.sums + 64 * head);
        check_sums(values, value_size, s.sums + 64 * head + 32);
    }

    free_snapshot(s);
    tg_cache_free(cache);
    tg_pass_free(pass);
    tg_model_free(model);
    free_example(&e);
}

/* -------------------------------------------------------------------------------------------------
 * The caller's floating-point environment
 * ---------------------------------------------------------------------------------------------- */

#ifdef __x86_64__
#include <immintrin.h>
enum { FLUSH = 0x8040 }; /* MXCSR: results, and operands, that are denormal are zero */
static unsigned read_control(void) { return _mm_getcsr() & ~0x3fu; }
static void flush_denormals(void) { _mm_setcsr(_mm_getcsr() | FLUSH); }
#else
static unsigned read_control(void) { return (unsigned)fegetround(); }
static void flush_denormals(void) {}
#endif

/* Every function that computes gives the same bits in any mode, and leaves the mode as it was. */
static void test_floating_point_environment(const answer *expected) {
    static const int modes[] = {FE_TONEAREST, FE_UPWARD, FE_DOWNWARD, FE_TOWARDZERO};
    static answer got;
    example e = new_example(*largest, 0);
    tg_model *model = new_model(&e, NULL, 1);
    tg_pass *pass = new_pass(model);
    tg_cache *cache = new_cache(model);
    fenv_t usual;
    CHECK(fegetenv(&usual) == 0);
    for (int i = 0; i < COUNT(modes); i++) {
        for (int flush = 0; flush < 2; flush++) {
            CHECK(fesetround(modes[i]) == 0);
            if (flush) flush_denormals();
            unsigned before = read_control();
            answer_text(pass, cache, largest, 40, 0, &got);
            CHECK(read_control() == before);
            CHECK(fegetround() == modes[i]);
            CHECK(fesetenv(&usual) == 0);
            CHECK(!memcmp(&got, expected, sizeof got));
        }
    }
    tg_cache_free(cache);
    tg_pass_free(pass);
    tg_model_free(model);
    free_example(&e);
}

/* A NaN with its sign bit set goes through every operation; a sanitizer sees what is undefined. */
static void test_negative_nan(void) {
    for (int i = 0; i < COUNT(isas); i++) {
        const tg_kernels *kernels = tg_isa_name(isas[i]) ? tg_find_kernels(isas[i]) : NULL;
        if (!kernels) continue;
        for (int activation = 0; activation < 4; activation++) {
            float x[LANES] = {-1, -NAN, NAN, copysignf(NAN, -1), -INFINITY};
            if (activation < 3)
                kernels->activate[activation](x, LANES);
            else
                kernels->exp(x, LANES);
            CHECK(isfinite(x[0]));
        }
        float x[LANES] = {copysignf(NAN, -1), 1, 2};
        kernels->softmax(x, 3, 1);
        CHECK(isnan(x[1]));
    }
}

/* -------------------------------------------------------------------------------------------------
 * Threads and processes
 * ---------------------------------------------------------------------------------------------- */

typedef struct {
    tg_pass *pass;
    tg_cache *cache;
    const answer *expected;
    answer got;
    int rounds;
    _Atomic int *stop; /* or NULL */
    pthread_t thread;
} talker;

/* Computes the same text again and again. It allocates nothing, so that a fork meanwhile finds no
 * lock of the allocator taken. */
static void *talk(void *argument) {
    talker *t = argument;
    for (int i = 0; t->stop ? !atomic_load(t->stop) : i < t->rounds; i++) {
        answer_text(t->pass, t->cache, largest, i % 2 ? 7 : POSITIONS, 0, &t->got);
        CHECK(!memcmp(&t->got, t->expected, sizeof t->got));
    }
    return NULL;
}

static void start_talking(talker *t, const tg_model *model, const answer *expected, int rounds,
                          _Atomic int *stop) {
    t->pass = new_pass(model);
    t->cache = new_cache(model);
    t->expected = expected;
    t->rounds = rounds;
    t->stop = stop;
    CHECK(pthread_create(&t->thread, NULL, talk, t) == 0);
}

static void end_talking(talker *t) {
    CHECK(pthread_join(t->thread, NULL) == 0);
    tg_cache_free(t->cache);
    tg_pass_free(t->pass);
}

static void test_two_passes_in_two_threads(const answer *expected) {
    static talker talkers[2];
    example e = new_example(*largest, 0);
    tg_model *model = new_model(&e, NULL, 4);
    for (int i = 0; i < 2; i++) start_talking(&talkers[i], model, expected, 6, NULL);
    for (int i = 0; i < 2; i++) end_talking(&talkers[i]);
    tg_model_free(model);
    free_example(&e);
}

/* How many threads this process has; 0 where the system does not tell. */
static int count_threads(void) {
    DIR *folder = opendir("/proc/self/task");
    int n = 0;
    if (!folder) return 0;
    for (struct dirent *entry; (entry = readdir(folder));) n += entry->d_name[0] != '.';
    closedir(folder);
    return n;
}

/* A child computes on, with threads of its own, whatever its parent's threads were doing. */
static void test_fork(const answer *expected) {
    static talker talkers[2];
    static answer got;
    _Atomic int stop = 0;
    example e = new_example(*largest, 0);
    tg_model *model = new_model(&e, NULL, 4);
    tg_pass *pass = new_pass(model);
    tg_cache *cache = new_cache(model);
    answer_text(pass, cache, largest, POSITIONS, 0, &got);
    for (int i = 0; i < 2; i++) start_talking(&talkers[i], model, expected, 0, &stop);
    for (int i = 0; i < FORKS; i++) {
        pid_t child = fork();
        CHECK(child >= 0);
        if (!child) {
            alarm(60); /* ends a child that hangs */
            answer_text(pass, cache, largest, POSITIONS, 0, &got);
            _exit(memcmp(&got, expected, sizeof got) || count_threads() == 1);
        }
        int status;
        CHECK(waitpid(child, &status, 0) == child);
        CHECK(status == 0);
    }
    atomic_store(&stop, 1);
    for (int i = 0; i < 2; i++) end_talking(&talkers[i]);
    tg_cache_free(cache);
    tg_pass_free(pass);
    tg_model_free(model);
    free_example(&e);
}

/* -------------------------------------------------------------------------------------------------
 * One pass in two threads, and giving up
 * ---------------------------------------------------------------------------------------------- */

/* So deep that no machine computes many tokens in one call, yet soon done with one. */
static example deep_example(void) {
    tg_config c = *largest;
    c.n_embd = c.n_inner = 8;
    c.n_head = 1;
    c.n_layer = 2000;
    return new_example(c, 1);
}

typedef struct {
    tg_pass *pass;
    _Atomic int busy; /* one bit for each function that said so */
    _Atomic int stop;
} intruder;

enum { FUNCTIONS = 5 };

static void remember(intruder *in, int function, int status) {
    if (status == TG_BUSY) atomic_fetch_or(&in->busy, 1 << function);
}

/* Goes on with what the other thread has begun, whenever that one is outside. */
static void *intrude(void *argument) {
    intruder *in = argument;
    static const float row[VOCAB];
    const float *logits;
    int32_t token;
    double number;
    while (!atomic_load(&in->stop)) {
        remember(in, 0, tg_forward(in->pass, NULL, 0));
        remember(in, 1, tg_logits(in->pass, 0, &logits));
        remember(in, 2, tg_choose(in->pass, row, &(tg_options){.repetition_penalty = 1}, &token));
        remember(in, 3, tg_log_probability(in->pass, row, 0, &number));
        remember(in, 4, tg_top(in->pass, row, 1, &token, &number));
    }
    return NULL;
}

static void test_one_pass_in_two_threads(void) {
    example e = deep_example();
    tg_model *model = new_model(&e, NULL, 2);
    tg_pass *pass = new_pass(model);
    tg_pass *other = new_pass(model);
    tg_cache *cache = new_cache(model);
    intruder in = {.pass = pass};
    int32_t tokens[POSITIONS];
    pthread_t thread;
    text_of(&e.config, 1, tokens);
    CHECK(pthread_create(&thread, NULL, intrude, &in) == 0);
    time_t until = time(NULL) + 60;
    while (atomic_load(&in.busy) != (1 << FUNCTIONS) - 1) {
        CHECK(time(NULL) < until);
        int status = tg_forward(pass, &(tg_span){cache, tokens, 1, 0, 1}, 1);
        CHECK(status == TG_DONE || status == TG_MORE || status == TG_BUSY);
    }
    atomic_store(&in.stop, 1);
    CHECK(pthread_join(thread, NULL) == 0);
    forward_one(pass, cache, tokens, 1, 0);
    forward_one(other, cache, tokens, 1, 0);
    CHECK(!memcmp(logits_of(pass, 0), logits_of(other, 0), VOCAB * sizeof(float)));
    tg_cache_free(cache);
    tg_pass_free(pass);
    tg_pass_free(other);
    tg_model_free(model);
    free_example(&e);
}

static void test_giving_up(void) {
    example e = deep_example();
    tg_model *model = new_model(&e, NULL, 1);
    tg_pass *pass = new_pass(model);
    tg_pass *other = new_pass(model);
    tg_cache *cache = new_cache(model);
    int32_t tokens[POSITIONS];
    const float *logits;
    text_of(&e.config, 1, tokens);
    CHECK(tg_forward(pass, &(tg_span){cache, tokens, POSITIONS, 0, 1}, 1) == TG_MORE);
    CHECK(tg_logits(pass, 0, &logits) == TG_BAD_ARGUMENT);
    forward_one(pass, cache, tokens + 9, 1, 0);
    forward_one(other, cache, tokens + 9, 1, 0);
    CHECK(!memcmp(logits_of(pass, 0), logits_of(other, 0), VOCAB * sizeof(float)));
    tg_cache_free(cache);
    tg_pass_free(pass);
    tg_pass_free(other);
    tg_model_free(model);
    free_example(&e);
}

/* -------------------------------------------------------------------------------------------------
 * What is wrong
 * ---------------------------------------------------------------------------------------------- */

static void test_bad_models(void) {
    example e = new_example(*largest, 0);
    CHECK(tg_version() && *tg_version());
    CHECK(!tg_isa_name("abacus") && !tg_find_kernels("abacus"));
    CHECK(!tg_model_new(&e.config, e.file, e.offsets, "abacus", 1));
    tg_model_free(new_model(&e, "", INT_MAX));
    tg_model_free(new_model(&e, NULL, -1));
    tg_model_free(NULL);
    tg_pass_free(NULL);
    tg_cache_free(NULL);
    free_example(&e);
}

static void test_bad_spans(void) {
    example e = new_example(*largest, 0);
    tg_model *model = new_model(&e, NULL, 1);
    tg_model *other_model = new_model(&e, NULL, 1);
    tg_pass *pass = new_pass(model);
    tg_cache *cache = new_cache(model);
    tg_cache *foreign = new_cache(other_model);
    const int32_t tokens[] = {0, 1, 2, VOCAB - 1, 4};
    const int32_t below[] = {0, -1};
    const int32_t above[] = {VOCAB};
    const tg_span good = {cache, tokens, 4, POSITIONS - 4, 4};
    const float *logits;

    CHECK(tg_logits(pass, 0, &logits) == TG_BAD_ARGUMENT);
    CHECK(tg_forward(pass, NULL, 0) == TG_BAD_ARGUMENT);
    forward(pass, &good, 1);
    const tg_span bad[] = {
        {cache, tokens, 0, 0, 0},          {cache, tokens, -1, 0, 0},
        {cache, tokens, INT_MIN, 0, 0},    {cache, tokens, INT_MAX, 0, 0},
        {cache, tokens, 1, -1, 0},         {cache, tokens, 1, INT_MIN, 0},
        {cache, tokens, 4, POSITIONS - 3, 0}, {cache, tokens, 1, POSITIONS, 0},
        {cache, tokens, 1, INT_MAX, 0},    {cache, tokens, 1, 0, -1},
        {cache, tokens, 1, 0, 2},          {cache, tokens, 1, 0, INT_MAX},
        {cache, below, 2, 0, 0},           {cache, above, 1, 0, 0},
        {NULL, tokens, 1, 0, 0},           {foreign, tokens, 1, 0, 0},
    };
    for (int i = 0; i < COUNT(bad); i++) {
        CHECK(tg_forward(pass, &bad[i], 1) == TG_BAD_ARGUMENT);
        CHECK(tg_forward(pass, (tg_span[]){good, bad[i]}, 2) == TG_BAD_ARGUMENT);
    }
    CHECK(tg_forward(pass, (tg_span[]){good, good}, 2) == TG_BAD_ARGUMENT); /* one cache twice */
    CHECK(tg_forward(pass, &good, -1) == TG_BAD_ARGUMENT);
    CHECK(tg_forward(pass, &good, INT_MAX) == TG_BAD_ARGUMENT);
    const int bad_rows[] = {-1, 4, INT_MIN, INT_MAX};
    for (int i = 0; i < COUNT(bad_rows); i++)
        CHECK(tg_logits(pass, bad_rows[i], &logits) == TG_BAD_ARGUMENT);
    CHECK(tg_logits(pass, 3, &logits) == TG_DONE); /* all that has harmed nothing */
    forward(pass, &(tg_span){cache, tokens, 4, 0, 0}, 1);
    CHECK(tg_logits(pass, 0, &logits) == TG_BAD_ARGUMENT); /* no row is wanted */

    tg_cache_free(cache);
    tg_cache_free(foreign);
    tg_pass_free(pass);
    tg_model_free(model);
    tg_model_free(other_model);
    free_example(&e);
}

static void test_bad_choices(void) {
    static const int32_t bad[] = {-1, VOCAB, INT_MIN, INT_MAX};
    static float row[VOCAB];
    static int32_t tokens[VOCAB];
    static double numbers[VOCAB];
    example e = new_example(*largest, 0);
    tg_model *model = new_model(&e, NULL, 1);
    tg_pass *pass = new_pass(model);
    for (int i = 0; i < COUNT(bad); i++) {
        const double bias = 1;
        tg_options with_bias = {.repetition_penalty = 1, .bias = &bias, .bias_tokens = &bad[i],
                                .n_bias = 1};
        tg_options with_seen = {.repetition_penalty = 1, .seen = &bad[i], .n_seen = 1};
        CHECK(tg_choose(pass, row, &with_bias, tokens) == TG_BAD_ARGUMENT);
        CHECK(tg_choose(pass, row, &with_seen, tokens) == TG_BAD_ARGUMENT);
        CHECK(tg_log_probability(pass, row, bad[i], numbers) == TG_BAD_ARGUMENT);
        int n = bad[i] == VOCAB ? VOCAB + 1 : bad[i];
        CHECK(tg_top(pass, row, n, tokens, numbers) == TG_BAD_ARGUMENT);
    }
    CHECK(tg_top(pass, row, 0, tokens, numbers) == TG_BAD_ARGUMENT);
    CHECK(tg_top(pass, row, VOCAB, tokens, numbers) == TG_DONE);
    for (int i = 0; i < VOCAB; i++) CHECK(tokens[i] == i); /* equals: the lower token first */
    tg_pass_free(pass);
    tg_model_free(model);
    free_example(&e);
}

/* What the four functions say to one row of logits; they must agree. */
static int status_of(tg_pass *pass, const float *logits) {
    tg_options greedy = {.repetition_penalty = 1};
    tg_options warm = {.temperature = 1, .top_p = 1, .repetition_penalty = 1};
    int32_t token;
    double number;
    int status = tg_choose(pass, logits, &greedy, &token);
    CHECK(tg_choose(pass, logits, &warm, &token) == status);
    CHECK(tg_log_probability(pass, logits, 0, &number) == status);
    CHECK(tg_top(pass, logits, 2, &(int32_t[2]){0}[0], &(double[2]){0}[0]) == status);
    return status;
}

/* In the weights of any logit, and in one row only. */
static void test_numbers_that_are_not_finite(void) {
    static const float bad[] = {NAN, INFINITY, -INFINITY};
    example e = new_example(shapes[2], 0); /* its head is not its embedding */
    tg_model *model = new_model(&e, NULL, 1);
    tg_pass *pass = new_pass(model);
    tg_cache *cache = new_cache(model);
    const int32_t tokens[] = {5, 6};
    float *wpe = e.file + e.offsets[1] / 4;
    float *head = e.file + e.offsets[e.n_tensors - 1] / 4;
    int n_embd = e.config.n_embd;
    int last = VOCAB - 1;
    for (int i = 0; i < COUNT(bad); i++) {
        float *place = head + last / LANES * n_embd * LANES + last % LANES;
        float right = *place;
        *place = bad[i];
        forward_one(pass, cache, tokens, 2, 0);
        CHECK(status_of(pass, logits_of(pass, 0)) == TG_NOT_FINITE);
        CHECK(status_of(pass, logits_of(pass, 1)) == TG_NOT_FINITE);
        *place = right;

        place = wpe + whole_lanes(n_embd) + 3;
        right = *place;
        *place = bad[i];
        forward_one(pass, cache, tokens, 2, 0);
        CHECK(status_of(pass, logits_of(pass, 1)) == TG_NOT_FINITE);
        CHECK(status_of(pass, logits_of(pass, 0)) == TG_DONE);
        *place = right;
    }
    tg_cache_free(cache);
    tg_pass_free(pass);
    tg_model_free(model);
    free_example(&e);
}

/* -------------------------------------------------------------------------------------------------
 * The program
 * ---------------------------------------------------------------------------------------------- */

/* expected: the answers of all shapes. */
static void test_each_isa_alone(effort how, const answer *expected) {
    for (int i = 0; i < COUNT(isas); i++) {
        if (!tg_isa_name(isas[i])) continue;
        test_texts_in_one_pass(largest, isas[i], 1, how == ALL ? ROUNDS : ROUNDS / 6);
        test_texts_in_one_pass(&shapes[1], isas[i], 3, how == ALL ? ROUNDS : ROUNDS / 6);
        for (int j = 1; j < COUNT(shapes); j++) {
            test_nan_behind_the_end(&shapes[j], isas[i], &expected[j]);
            test_nan_in_a_later_row(&shapes[j], isas[i], &expected[j]);
        }
    }
}

static void test_the_rest(effort how, int forks, const answer *answers) {
    const answer *expected = &answers[COUNT(shapes) - 1]; /* of the largest */
    test_logits_depend_on_the_text(expected);
    test_each_isa_alone(how, answers);
    for (int i = 0; i < COUNT(shapes); i++) test_cache(&shapes[i], &answers[i]);
    test_dump_order();
    test_floating_point_environment(expected);
    test_negative_nan();
    test_two_passes_in_two_threads(expected);
    if (forks) test_fork(expected);
    test_one_pass_in_two_threads();
    test_giving_up();
    test_bad_models();
    test_bad_spans();
    test_bad_choices();
    test_numbers_that_are_not_finite();
}

int main(int argc, char **argv) {
    static answer expected[COUNT(shapes)];
    uint64_t logits = 0xcbf29ce484222325;
    uint64_t choices = logits;
    effort how = ALL;
    int forks = 1;
    for (int i = 1; i < argc; i++) {
        if (!strcmp(argv[i], "nofork")) forks = 0;
        if (!strcmp(argv[i], "brief")) how = BRIEF;
        if (!strcmp(argv[i], "hash")) how = HASH;
    }
    for (int i = 0; i < COUNT(shapes); i++) {
        const answer *a = &expected[i];
        test_every_isa(&shapes[i], how, &expected[i]);
        logits = hash(logits, a->logits, sizeof a->logits);
        choices = hash(choices, a->choices, sizeof *a - sizeof a->logits);
    }
    if (how != HASH) test_the_rest(how, forks, expected);
    printf("logits %016llx\n", (unsigned long long)logits);
    printf("choices %016llx\n", (unsigned long long)choices);
    return 0;
}
