/* What the machine can do at most: `limits read THREADS [FILE]` prints the bandwidth of reading
 * memory (or the mapped file) in GB/s, `limits peak THREADS` the float32 multiply-add peak in
 * GFLOP/s, `limits latency` how many nanoseconds a cache line takes from one processor to another.
 * The kernels are written once on vector types and compiled for each instruction set. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>

enum { MAX_THREADS = 64, PASSES = 5, ROUNDS = 20000000, PINGS = 50000 };
static const size_t ANONYMOUS = (size_t)500 << 20;

typedef float (*sum_function)(const char *data, size_t size);
typedef float (*chains_function)(long rounds);

static volatile float tiny = 1e-9f; /* volatile: the compiler must not know what comes out */

/* As many chains of multiply-adds as keep every unit of a core busy (2 units with a latency of 4 or
 * 5 on x86, up to 4 units on Arm), and as registers hold. */
#ifdef __aarch64__
enum { CHAINS = 24 };
#else
enum { CHAINS = 12 };
#endif

/* sum reads `size` bytes, a multiple of 1,024; vectors are `bytes` wide. */
#define KERNELS(name, bytes, target)                                                               \
    target static float sum_##name(const char *data, size_t size) {                                \
        typedef float vector __attribute__((vector_size(bytes)));                                  \
        vector sums[8] = {{0}};                                                                    \
        for (const vector *p = (const vector *)data; (const char *)p < data + size; p += 8)        \
            for (int i = 0; i < 8; i++) sums[i] += p[i];                                           \
        for (int i = 1; i < 8; i++) sums[0] += sums[i];                                            \
        return sums[0][0];                                                                         \
    }                                                                                              \
    target static float chains_##name(long rounds) {                                               \
        typedef float vector __attribute__((vector_size(bytes)));                                  \
        vector chains[CHAINS], factor = (vector){0} + tiny;                                        \
        for (int i = 0; i < CHAINS; i++) chains[i] = factor * (float)i; /* equal ones: one */      \
        for (; rounds; rounds--)                                                                   \
            for (int i = 0; i < CHAINS; i++) chains[i] += chains[i] * factor;                      \
        for (int i = 1; i < CHAINS; i++) chains[0] += chains[i];                                   \
        return chains[0][0];                                                                       \
    }

KERNELS(plain, 16, )
#ifdef __x86_64__
KERNELS(avx2, 32, __attribute__((target("avx2,fma"))))
KERNELS(avx512, 64, __attribute__((target("avx512f"))))
#endif

static sum_function sum = sum_plain;
static chains_function chains = chains_plain;
static int width = 16;

static void choose_kernels(void) {
#ifdef __x86_64__
    if (__builtin_cpu_supports("avx512f")) {
        sum = sum_avx512, chains = chains_avx512, width = 64;
    } else if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        sum = sum_avx2, chains = chains_avx2, width = 32;
    }
#endif
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

#ifdef __linux__
static cpu_set_t allowed;
#endif

/* Learns which processors this process may use: each thread narrows this down for itself later. */
static void find_processors(void) {
#ifdef __linux__
    sched_getaffinity(0, sizeof allowed, &allowed);
#endif
}

/* Puts the calling thread on the index-th of them, if there are that many. */
static void pin(int index) {
#ifdef __linux__
    for (int cpu = 0; cpu < CPU_SETSIZE; cpu++)
        if (CPU_ISSET(cpu, &allowed) && index-- == 0) {
            cpu_set_t one;
            CPU_ZERO(&one);
            CPU_SET(cpu, &one);
            pthread_setaffinity_np(pthread_self(), sizeof one, &one);
        }
#else
    (void)index;
#endif
}

/* One measurement: what every thread does in a pass, and what it works on. */
typedef struct {
    void (*work)(int part, int parts);
    const char *data;
    size_t size;
} job;
static job current;
static int n_threads;
static volatile float sink; /* what is computed must be used, or the compiler drops it */

static void read_part(int part, int parts) {
    size_t share = current.size / parts / 1024 * 1024;
    sink = sum(current.data + part * share, share);
}

static void chain_part(int part, int parts) {
    (void)part, (void)parts;
    sink = chains(ROUNDS);
}

static void *thread_main(void *argument) {
    int part = (int)(intptr_t)argument;
    pin(part);
    current.work(part, n_threads);
    return NULL;
}

/* The seconds of one pass: starting a thread costs some 50 us, a pass 10,000 and more. */
static double pass(void) {
    pthread_t threads[MAX_THREADS];
    double start = now();
    for (int i = 0; i < n_threads; i++)
        if (pthread_create(&threads[i], NULL, thread_main, (void *)(intptr_t)i)) exit(1);
    for (int i = 0; i < n_threads; i++) pthread_join(threads[i], NULL);
    return now() - start;
}

static double fastest_pass(void) {
    double best = pass();
    for (int i = 1; i < PASSES; i++) {
        double seconds = pass();
        if (seconds < best) best = seconds;
    }
    return best;
}

static void *map(const char *path, size_t *size) {
    int protection = path ? PROT_READ : PROT_READ | PROT_WRITE, file = -1;
    if (path) {
        struct stat status;
        if ((file = open(path, O_RDONLY)) < 0 || fstat(file, &status)) return MAP_FAILED;
        *size = status.st_size;
    }
    return mmap(NULL, *size, protection, MAP_PRIVATE | (path ? 0 : MAP_ANONYMOUS), file, 0);
}

static double measure_read(const char *path) {
    size_t size = ANONYMOUS;
    char *data = map(path, &size);
    if (data == MAP_FAILED) {
        perror(path ? path : "mmap");
        exit(1);
    }
    if (!path) {
#ifdef MADV_HUGEPAGE
        madvise(data, size, MADV_HUGEPAGE);
#endif
        memset(data, 1, size);
    }
    current = (job){read_part, data, size};
    return size / fastest_pass() / 1e9;
}

static double measure_peak(void) {
    current = (job){chain_part, NULL, 0};
    return 2.0 * CHAINS * (width / 4) * ROUNDS * n_threads / fastest_pass() / 1e9;
}

static _Alignas(64) atomic_int ball;

static void ping_part(int part, int parts) {
    for (int i = part; i < 2 * PINGS; i += parts) {
        while (atomic_load_explicit(&ball, memory_order_acquire) != i) {}
        atomic_store_explicit(&ball, i + 1, memory_order_release);
    }
}

static double measure_latency(void) {
    n_threads = 2;
    current = (job){ping_part, NULL, 0};
    return pass() / (2 * PINGS) * 1e9;
}

int main(int argc, char **argv) {
    const char *what = argc > 1 ? argv[1] : "";
    n_threads = argc > 2 ? atoi(argv[2]) : 1;
    choose_kernels();
    find_processors();
    if (n_threads < 1 || n_threads > MAX_THREADS) return 2;
    if (!strcmp(what, "read")) printf("%f\n", measure_read(argc > 3 ? argv[3] : NULL));
    else if (!strcmp(what, "peak")) printf("%f\n", measure_peak());
    else if (!strcmp(what, "latency")) printf("%f\n", measure_latency());
    else return 2;
    return 0;
}
