/* kernels_test.c: kernels.c used from C, without Python.
 *
 * Small random models of several shapes must give the same logits and the same choices, bit for
 * bit, on every instruction set that this machine has, with any number of threads, however the
 * tokens are cut. Then what C programs may do with it: sessions in several threads, one session in
 * two threads, fork, giving up, arguments and weights that are wrong.
 *
 * The first thing that does not hold is printed with its line, and the exit code is 1. Else the
 * last line is "hash" and 16 digits: of every logit and choice, the same on every machine.
 *
 * Arguments: `nofork` leaves out fork, which ThreadSanitizer and QEMU do not support beside threads;
 * `brief` tries fewer threads and cuts, where all is slow; `hash` is for the hash alone.
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

enum { POSITIONS = 72, VOCAB = 300, CHOICES = 32, FORKS = 40 };

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
static float draw(example *e) { return (float)(next_random(&e->random) >> 40) / 16777216 - 0.5f; }

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
            panels[(o / LANES * inputs + i) * LANES + o % LANES] = draw(e);
}

static void add_vector(example *e, int n, float mean) {
    float *vector = add_tensor(e, whole_lanes(n));
    for (int i = 0; i < n; i++) vector[i] = mean + draw(e);
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
        for (int i = 0; i < n_embd; i++) wpe[t * whole_lanes(n_embd) + i] = draw(&e);
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

static tg_session *new_session(const tg_model *model, int chunk) {
    tg_session *session = tg_session_new(model, chunk);
    CHECK(session != NULL);
    return session;
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
} answer;

static void forward(tg_session *s, const int32_t *tokens, int n, int start) {
    int status = tg_forward(s, tokens, n, start);
    while (status == TG_MORE) status = tg_forward(s, NULL, 0, 0);
    CHECK(status == TG_DONE);
}

static const float *logits_of(tg_session *s, int first, int count) {
    const float *logits = NULL;
    CHECK(tg_logits(s, first, count, &logits) == TG_DONE);
    return logits;
}

static void text_of(const tg_config *c, uint64_t seed, int32_t *tokens) {
    for (int i = 0; i < c->n_positions; i++)
        tokens[i] = (int32_t)(next_random(&seed) % (uint64_t)c->vocab_size);
}

static void choose_all(tg_session *s, const tg_config *c, int32_t *choices) {
    static const tg_options all[] = {
        {.temperature = 1, .top_p = 1, .repetition_penalty = 1},
        {.temperature = 0.7, .top_p = 1, .repetition_penalty = 1, .top_k = 40},
        {.temperature = 1.5, .top_p = 0.9, .min_p = 0.01, .repetition_penalty = 1},
        {.temperature = 0, .top_p = 1, .repetition_penalty = 1.3},
    };
    const double bias[] = {-2, 1.5};
    const int32_t tokens[] = {0, c->vocab_size - 1}, seen[] = {1, 2};
    for (int i = 0; i < CHOICES; i++) {
        tg_options o = all[i % COUNT(all)];
        if (o.top_k > c->vocab_size) o.top_k = c->vocab_size;
        o.uniform = (double)(i / COUNT(all)) / (CHOICES / COUNT(all));
        if (o.repetition_penalty != 1) o.seen = seen, o.n_seen = 2;
        if (o.min_p > 0) o.bias = bias, o.bias_tokens = tokens, o.n_bias = 2;
        choices[i] = tg_choose(s, &o);
        CHECK(choices[i] >= 0 && choices[i] < c->vocab_size);
    }
}

/* All of it, `chunk` tokens at a time; with `again`, each chunk after another text in its place. */
static void answer_text(tg_session *s, const tg_config *c, int chunk, int again, answer *out) {
    int32_t tokens[POSITIONS], others[POSITIONS];
    memset(out, 0, sizeof *out);
    text_of(c, 1, tokens);
    text_of(c, 2, others);
    for (int start = 0, n; start < c->n_positions; start += n) {
        n = c->n_positions - start < chunk ? c->n_positions - start : chunk;
        if (again) forward(s, others + start, n, start);
        forward(s, tokens + start, n, start);
        for (int i = 0, count; i < n; i += count) {
            count = n - i < LOGIT_ROWS ? n - i : LOGIT_ROWS;
            const float *rows = logits_of(s, i, count);
            for (int j = 0; j < count; j++)
                memcpy(out->logits[start + i + j], rows + j * whole_lanes(c->vocab_size),
                       c->vocab_size * sizeof(float));
        }
        if (start + n == c->n_positions) logits_of(s, n - 1, 1);
    }
    choose_all(s, c, out->choices);
    for (int i = 0; i < c->vocab_size; i++) out->log_probabilities[i] = tg_log_probability(s, 0, i);
}

/* FNV-1a. Logarithms are left out: they are those of the C library. */
static uint64_t hash(uint64_t value, const answer *a) {
    const unsigned char *byte = (const unsigned char *)a;
    for (size_t i = 0; i < offsetof(answer, log_probabilities); i++)
        value = (value ^ byte[i]) * 0x100000001b3;
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

static void test_every_isa(const tg_config *c, effort how, answer *expected) {
    static const int chunks[] = {POSITIONS, 7, 1, 2, 64};
    static const int n_threads[] = {1, 4, 2, 3};
    static answer got;
    example e = new_example(*c, 0);
    int tested = 0;
    for (int i = 0; i < COUNT(isas); i++) {
        if (!tg_isa_name(isas[i])) continue;
        for (int t = 0; t < (how == HASH ? 1 : how == BRIEF ? 2 : 4); t++) {
            tg_model *model = new_model(&e, isas[i], n_threads[t]);
            CHECK(tg_chunk(model) >= 1);
            for (int j = 0; j < (how == HASH ? 1 : how == BRIEF ? 3 : 5); j++) {
                tg_session *s = new_session(model, chunks[j]);
                answer_text(s, c, chunks[j], chunks[j] == 7, &got);
                if (!tested++) *expected = got;
                expect_same(&got, expected, isas[i], n_threads[t], chunks[j], c);
                tg_session_free(s);
            }
            tg_model_free(model);
        }
    }
    CHECK(tested);
    free_example(&e);
}

/* The comparisons mean something: a token changes every later row of logits, and no earlier one. */
static void test_logits_depend_on_the_text(const answer *expected) {
    example e = new_example(*largest, 0);
    tg_model *model = new_model(&e, NULL, 1);
    tg_session *s = new_session(model, POSITIONS);
    int32_t tokens[POSITIONS];
    text_of(largest, 1, tokens);
    tokens[40] = (tokens[40] + 1) % VOCAB;
    forward(s, tokens, POSITIONS, 0);
    for (int i = 0; i < POSITIONS; i++) {
        int differs = !!memcmp(logits_of(s, i, 1), expected->logits[i], VOCAB * sizeof(float));
        CHECK(differs == (i >= 40));
    }
    tg_session_free(s);
    tg_model_free(model);
    free_example(&e);
}

/* -------------------------------------------------------------------------------------------------
 * Threads and processes
 * ---------------------------------------------------------------------------------------------- */

typedef struct {
    tg_session *session;
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
        answer_text(t->session, largest, i % 2 ? 7 : POSITIONS, 0, &t->got);
        CHECK(!memcmp(&t->got, t->expected, sizeof t->got));
    }
    return NULL;
}

static void start_talking(talker *t, const tg_model *model, const answer *expected, int rounds,
                          _Atomic int *stop) {
    t->session = new_session(model, POSITIONS);
    t->expected = expected;
    t->rounds = rounds;
    t->stop = stop;
    CHECK(pthread_create(&t->thread, NULL, talk, t) == 0);
}

static void end_talking(talker *t) {
    CHECK(pthread_join(t->thread, NULL) == 0);
    tg_session_free(t->session);
}

static void test_two_sessions_in_two_threads(const answer *expected) {
    static talker talkers[2];
    example e = new_example(*largest, 0);
    tg_model *model = new_model(&e, NULL, 4);
    for (int i = 0; i < 2; i++) start_talking(&talkers[i], model, expected, 8, NULL);
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
    tg_session *s = new_session(model, POSITIONS);
    answer_text(s, largest, POSITIONS, 0, &got);
    for (int i = 0; i < 2; i++) start_talking(&talkers[i], model, expected, 0, &stop);
    for (int i = 0; i < FORKS; i++) {
        pid_t child = fork();
        CHECK(child >= 0);
        if (!child) {
            alarm(60); /* ends a child that hangs */
            answer_text(s, largest, POSITIONS, 0, &got);
            _exit(memcmp(&got, expected, sizeof got) || count_threads() == 1);
        }
        int status;
        CHECK(waitpid(child, &status, 0) == child);
        CHECK(status == 0);
    }
    atomic_store(&stop, 1);
    for (int i = 0; i < 2; i++) end_talking(&talkers[i]);
    tg_session_free(s);
    tg_model_free(model);
    free_example(&e);
}

/* -------------------------------------------------------------------------------------------------
 * One session in two threads, and giving up
 * ---------------------------------------------------------------------------------------------- */

/* So deep that no machine computes many tokens in one call, yet soon done with one. */
static example deep_example(void) {
    tg_config c = *largest;
    c.n_embd = c.n_inner = 8, c.n_head = 1, c.n_layer = 2000;
    return new_example(c, 1);
}

typedef struct {
    tg_session *session;
    _Atomic int busy, stop;
} intruder;

/* Goes on with what the other thread has begun, whenever that one is outside. */
static void *intrude(void *argument) {
    intruder *in = argument;
    const float *logits;
    while (!atomic_load(&in->stop)) {
        if (tg_forward(in->session, NULL, 0, 0) == TG_BUSY) atomic_fetch_or(&in->busy, 1);
        if (tg_logits(in->session, 0, 1, &logits) == TG_BUSY) atomic_fetch_or(&in->busy, 2);
    }
    return NULL;
}

static void test_one_session_in_two_threads(void) {
    example e = deep_example();
    tg_model *model = new_model(&e, NULL, 2);
    tg_session *s = new_session(model, POSITIONS), *other = new_session(model, POSITIONS);
    intruder in = {.session = s};
    int32_t tokens[POSITIONS];
    pthread_t thread;
    text_of(&e.config, 1, tokens);
    CHECK(pthread_create(&thread, NULL, intrude, &in) == 0);
    time_t until = time(NULL) + 60;
    while (atomic_load(&in.busy) != 3) {
        CHECK(time(NULL) < until);
        int status = tg_forward(s, tokens, 1, 0);
        CHECK(status == TG_DONE || status == TG_MORE || status == TG_BUSY);
    }
    atomic_store(&in.stop, 1);
    CHECK(pthread_join(thread, NULL) == 0);
    forward(s, tokens, 1, 0);
    forward(other, tokens, 1, 0);
    CHECK(!memcmp(logits_of(s, 0, 1), logits_of(other, 0, 1), VOCAB * sizeof(float)));
    tg_session_free(s);
    tg_session_free(other);
    tg_model_free(model);
    free_example(&e);
}

static void test_giving_up(void) {
    example e = deep_example();
    tg_model *model = new_model(&e, NULL, 1);
    tg_session *s = new_session(model, POSITIONS), *other = new_session(model, 1);
    int32_t tokens[POSITIONS];
    const float *logits;
    text_of(&e.config, 1, tokens);
    CHECK(tg_forward(s, tokens, POSITIONS, 0) == TG_MORE);
    CHECK(tg_logits(s, 0, 1, &logits) == TG_BAD_ARGUMENT);
    forward(s, tokens + 9, 1, 0);
    forward(other, tokens + 9, 1, 0);
    CHECK(!memcmp(logits_of(s, 0, 1), logits_of(other, 0, 1), VOCAB * sizeof(float)));
    tg_session_free(s);
    tg_session_free(other);
    tg_model_free(model);
    free_example(&e);
}

/* -------------------------------------------------------------------------------------------------
 * What is wrong
 * ---------------------------------------------------------------------------------------------- */

static void test_bad_arguments(void) {
    example e = new_example(*largest, 0);
    CHECK(tg_version() && *tg_version());
    CHECK(!tg_isa_name("abacus") && !tg_find_kernels("abacus"));
    CHECK(!tg_model_new(&e.config, e.file, e.offsets, "abacus", 1));
    tg_model *model = new_model(&e, "", INT_MAX);
    tg_model_free(model);
    model = new_model(&e, NULL, -1);
    CHECK(!tg_session_new(model, 0) && !tg_session_new(model, -1));
    tg_session *s = new_session(model, 4);
    const int32_t tokens[] = {0, 1, 2, VOCAB - 1, 4}, below[] = {0, -1}, above[] = {VOCAB};
    const float *logits;
    CHECK(tg_logits(s, 0, 1, &logits) == TG_BAD_ARGUMENT);
    CHECK(tg_forward(s, tokens, 0, 0) == TG_BAD_ARGUMENT);
    forward(s, tokens, 4, POSITIONS - 4);
    const struct { const int32_t *tokens; int n, start; } texts[] = {
        {tokens, -1, 0}, {tokens, INT_MIN, 0}, {tokens, 5, 0}, {tokens, INT_MAX, 0},
        {tokens, 1, -1}, {tokens, 1, INT_MIN}, {tokens, 4, POSITIONS - 3},
        {tokens, 1, POSITIONS}, {tokens, 1, INT_MAX}, {below, 2, 0}, {above, 1, 0},
    };
    for (int i = 0; i < COUNT(texts); i++)
        CHECK(tg_forward(s, texts[i].tokens, texts[i].n, texts[i].start) == TG_BAD_ARGUMENT);
    const struct { int first, count; } rows[] = {
        {0, 0}, {0, -1}, {0, INT_MIN}, {0, 5}, {0, INT_MAX}, {3, 2}, {4, 1}, {-1, 1},
        {INT_MIN, 1}, {INT_MAX, 1},
    };
    for (int i = 0; i < COUNT(rows); i++)
        CHECK(tg_logits(s, rows[i].first, rows[i].count, &logits) == TG_BAD_ARGUMENT);
    CHECK(tg_logits(s, 0, 4, &logits) == TG_DONE); /* all that has harmed nothing */
    tg_session_free(s);
    tg_session_free(NULL);
    s = new_session(model, LOGIT_ROWS + 1);
    int32_t many[LOGIT_ROWS + 1] = {0};
    forward(s, many, COUNT(many), 0);
    CHECK(tg_logits(s, 0, LOGIT_ROWS + 1, &logits) == TG_BAD_ARGUMENT);
    CHECK(tg_logits(s, 1, LOGIT_ROWS, &logits) == TG_DONE);
    tg_session_free(s);
    tg_model_free(model);
    tg_model_free(NULL);
    free_example(&e);
}

/* In the weights of any logit, and in any row of those that are asked for. */
static void test_numbers_that_are_not_finite(void) {
    static const float bad[] = {NAN, INFINITY, -INFINITY};
    example e = new_example(shapes[2], 0); /* its head is not its embedding */
    tg_model *model = new_model(&e, NULL, 1);
    tg_session *s = new_session(model, 2);
    const int32_t tokens[] = {5, 6};
    const float *logits;
    float *wpe = e.file + e.offsets[1] / 4, *head = e.file + e.offsets[e.n_tensors - 1] / 4;
    int n_embd = e.config.n_embd, last = VOCAB - 1;
    for (int i = 0; i < COUNT(bad); i++) {
        float *place = head + last / LANES * n_embd * LANES + last % LANES, right = *place;
        *place = bad[i];
        forward(s, tokens, 1, 0);
        CHECK(tg_logits(s, 0, 1, &logits) == TG_NOT_FINITE);
        *place = right;
        CHECK(tg_logits(s, 0, 1, &logits) == TG_DONE);
        place = wpe + whole_lanes(n_embd) + 3, right = *place;
        *place = bad[i];
        forward(s, tokens, 2, 0);
        CHECK(tg_logits(s, 0, 2, &logits) == TG_NOT_FINITE);
        CHECK(tg_logits(s, 1, 1, &logits) == TG_NOT_FINITE);
        *place = right;
    }
    /* A huge weight makes an infinity of the second row alone, if it fits that row. */
    forward(s, tokens, 2, 0);
    int fits = 0;
    for (int i = 0; i < n_embd && !fits; i++) {
        float *place = head + (last / LANES * n_embd + i) * LANES + last % LANES, right = *place;
        *place = 3e38f;
        fits = tg_logits(s, 0, 1, &logits) == TG_DONE &&
               tg_logits(s, 1, 1, &logits) == TG_NOT_FINITE;
        if (fits) CHECK(tg_logits(s, 0, 2, &logits) == TG_NOT_FINITE);
        *place = right;
    }
    CHECK(fits);
    tg_session_free(s);
    tg_model_free(model);
    free_example(&e);
}

static void test_the_rest(int forks, const answer *expected) {
    test_logits_depend_on_the_text(expected);
    test_two_sessions_in_two_threads(expected);
    if (forks) test_fork(expected);
    test_one_session_in_two_threads();
    test_giving_up();
    test_bad_arguments();
    test_numbers_that_are_not_finite();
}

int main(int argc, char **argv) {
    static answer expected; /* at last that of the largest model */
    uint64_t value = 0xcbf29ce484222325;
    effort how = ALL;
    int forks = 1;
    for (int i = 1; i < argc; i++) {
        if (!strcmp(argv[i], "nofork")) forks = 0;
        if (!strcmp(argv[i], "brief")) how = BRIEF;
        if (!strcmp(argv[i], "hash")) how = HASH;
    }
    for (int i = 0; i < COUNT(shapes); i++) {
        test_every_isa(&shapes[i], how, &expected);
        value = hash(value, &expected);
    }
    if (how != HASH) test_the_rest(forks, &expected);
    printf("hash %016llx\n", (unsigned long long)value);
    return 0;
}
