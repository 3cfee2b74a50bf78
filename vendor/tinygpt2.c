/* tinygpt2.c: the command `tinygpt2`, which runs GPT-2 without Python.
 *
 *     tinygpt2 --model FILE.tg2 --ids "15496 995" --max-tokens 50 --text
 *
 * It reads a .tg2 file, continues token ids with the kernels of kernels.c, and prints the new ids
 * or their text. For the same file, options and seed it prints the same bytes as
 * `python tinygpt2.py` does with the C backend. It does not encode text: that needs the Unicode
 * tables that Python has.
 *
 * Nothing in a file is trusted. The header is checked completely before a byte of the data is
 * used: JSON, names, sizes, and that the tensors are exactly those of a GPT-2 and cover the data.
 * What is wrong is one line on standard error: `tinygpt2: error: PATH: FIELD: expected X, found Y`.
 * The memory that is used is in proportion to the size of the file.
 *
 * `python build.py --standalone` compiles this file and, for each instruction set, kernels.c.
 *
 * SPDX-License-Identifier: MIT */
#include "../kernels.c"

#include <errno.h>
#include <fcntl.h>
#include <float.h>
#include <inttypes.h>
#include <sched.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "a .tg2 file is little-endian: its numbers are used where they lie"
#endif

enum { FAILED = 1, WRONG_USAGE = 2, INTERRUPTED = 130 }; /* exit codes */
enum { PANEL = 16, ALIGNMENT = 64 };                     /* see `layout` in tinygpt2.py */
#define MAX_HEADER 100000000                             /* bytes */

/* ---- 1. Errors --------------------------------------------------------------------------------*/

/* A short text that functions can return. */
typedef struct {
    char text[320];
} line;

/* Bytes inside a longer text; text is NULL for a value that is absent. */
typedef struct {
    const char *text;
    size_t n;
} slice;

/* What printf would print, cut off where a line is full. */
__attribute__((format(printf, 1, 2))) static line format(const char *pattern, ...) {
    line result;
    va_list values;

    va_start(values, pattern);
    vsnprintf(result.text, sizeof result.text, pattern, values);
    va_end(values);
    return result;
}

/* Text for an error message: in quotes, special bytes as \xNN, at most 60 bytes of it. */
static line quote(slice s) {
    static const char digits[] = "0123456789abcdef";
    char shown[4 * 60 + 1];
    char *out = shown;

    for (size_t i = 0; i < s.n && i < 60; i++) {
        unsigned char byte = (unsigned char)s.text[i];
        bool plain = byte >= ' ' && byte < 0x7F && byte != '\\' && byte != '\'';
        if (!plain) {
            *out++ = '\\';
            *out++ = 'x';
            *out++ = digits[byte / 16];
            byte = (unsigned char)digits[byte % 16];
        }
        *out++ = (char)byte;
    }
    *out = 0;
    if (s.n > 60) return format("'%s'... (%zu bytes)", shown, s.n);
    return format("'%s'", shown);
}

static slice slice_of(const char *text) {
    return (slice){text, strlen(text)};
}

static bool equal(slice s, const char *text) {
    return s.text && s.n == strlen(text) && memcmp(s.text, text, s.n) == 0;
}

/* Print one line to standard error and exit with `code`. */
__attribute__((format(printf, 2, 3))) _Noreturn static void fail(int code, const char *pattern,
                                                                 ...) {
    va_list values;

    va_start(values, pattern);
    fputs("tinygpt2: error: ", stderr);
    vfprintf(stderr, pattern, values);
    fputc('\n', stderr);
    va_end(values);
    exit(code);
}

static bool is_control(char c) {
    return (unsigned char)c < ' ' || c == 0x7F;
}

/* A path as it is, but control characters as \xNN: the message must remain one line. */
static void print_path(const char *path) {
    for (; *path; path++) {
        if (is_control(*path)) fprintf(stderr, "\\x%02x", *path);
        else fputc(*path, stderr);
    }
}

/* Print one line about a file and exit with `code`. */
_Noreturn static void fail_for_file(int code, const char *path, const char *message) {
    fputs("tinygpt2: error: ", stderr);
    print_path(path);
    fprintf(stderr, ": %s\n", message);
    exit(code);
}

/* Say which field of a file is wrong, and exit. */
_Noreturn static void refuse(const char *path, const char *field, const char *expected,
                             const char *found) {
    fputs("tinygpt2: error: ", stderr);
    print_path(path);
    fprintf(stderr, ": %s: expected %s, found %s\n", field, expected, found);
    exit(FAILED);
}

/* `block` if there is one; a request for memory that failed ends the program. */
static void *need(void *block) {
    if (!block) fail(FAILED, "out of memory");
    return block;
}

/* Make room for one more than n elements of `size` bytes in an array that grows by doubling. */
static void *grow(void *array, size_t n, size_t size) {
    bool is_power_of_two = (n & (n - 1)) == 0;
    if (!is_power_of_two) return array;
    return need(realloc(array, (n ? 2 * n : 1) * size));
}

/* ---- 2. UTF-8 ---------------------------------------------------------------------------------*/

/* The bytes of a character whose end is to come. */
typedef struct {
    unsigned char bytes[4];
    int held;
} utf8;

#define REPLACEMENT "\xEF\xBF\xBD" /* U+FFFD, in place of bytes that are not UTF-8 */

/* How many bytes a character has that begins with `lead`; 0 if none does. */
static int character_length(unsigned char lead) {
    if (lead < 0x80) return 1;
    if (lead < 0xC2) return 0;
    if (lead < 0xE0) return 2;
    if (lead < 0xF0) return 3;
    return lead < 0xF5 ? 4 : 0;
}

/* Whether `byte` may follow the bytes held. The second byte of some characters has a narrower
 * range, which leaves out long forms, surrogates, and what is above U+10FFFF. */
static bool continues(const utf8 *u, unsigned char byte) {
    unsigned char lead = u->held == 1 ? u->bytes[0] : 0;
    unsigned char low = lead == 0xE0 ? 0xA0 : lead == 0xF0 ? 0x90 : 0x80;
    unsigned char high = lead == 0xED ? 0x9F : lead == 0xF4 ? 0x8F : 0xBF;
    return byte >= low && byte <= high;
}

/* Add a byte, and write the text that it completes to `out`: a character, a U+FFFD for each
 * sequence that breaks off, both, or nothing. Returns how many bytes that is, at most 7. */
static size_t push_byte(utf8 *u, unsigned char byte, char *out) {
    char *end = out;

    if (u->held && !continues(u, byte)) {
        end = (char *)memcpy(end, REPLACEMENT, 3) + 3;
        u->held = 0;
    }
    u->bytes[u->held++] = byte;
    int length = character_length(u->bytes[0]);
    if (length == 0) {
        end = (char *)memcpy(end, REPLACEMENT, 3) + 3;
        u->held = 0;
    } else if (u->held == length) {
        end = (char *)memcpy(end, u->bytes, (size_t)length) + length;
        u->held = 0;
    }
    return (size_t)(end - out);
}

static bool is_utf8(slice s) {
    utf8 u = {.held = 0};

    for (size_t i = 0; i < s.n; i++) {
        unsigned char byte = (unsigned char)s.text[i];
        if (u.held && !continues(&u, byte)) return false;
        u.bytes[u.held++] = byte;
        int length = character_length(u.bytes[0]);
        if (length == 0) return false;
        if (u.held == length) u.held = 0;
    }
    return u.held == 0;
}

/* Write a code point below 0x110000 as UTF-8; returns the end. Half a surrogate pair is written
 * as three bytes, which is_utf8 refuses. */
static char *put_code_point(char *out, uint32_t code) {
    if (code < 0x80) {
        *out++ = (char)code;
        return out;
    }
    int more = code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;
    static const unsigned char leads[] = {0, 0xC0, 0xE0, 0xF0};
    *out++ = (char)(leads[more] | code >> 6 * more);
    while (more--) *out++ = (char)(0x80 | (code >> 6 * more & 0x3F));
    return out;
}

/* ---- 3. JSON ----------------------------------------------------------------------------------
 * A reader that is told what must come next. Every value of a .tg2 file's header has one type, so
 * there is no tree of values and no recursion. Whatever is not as it must be ends the program. */

typedef struct {
    char *at;          /* what is to be read next; strings are decoded in place */
    char *end;
    const char *path;  /* for error messages */
    const char *field;
} json;

/* The text that is next, up to the end of a value, for an error message. */
static line upcoming(const json *j) {
    size_t n = 0;
    size_t left = (size_t)(j->end - j->at);

    if (left == 0) return format("its end");
    while (n < left && !strchr(",]}", j->at[n])) n++;
    return quote((slice){j->at, n ? n : 1});
}

_Noreturn static void refuse_json(const json *j, const char *expected) {
    refuse(j->path, j->field, format("JSON in UTF-8 with %s", expected).text, upcoming(j).text);
}

/* Start to read a text, which must be UTF-8. */
static json open_json(char *text, size_t n, const char *path, const char *field) {
    json j = {text, text + n, path, field};
    if (!is_utf8((slice){text, n})) refuse(path, field, "JSON in UTF-8", "other bytes");
    return j;
}

/* Read one of these characters, if one is next. */
static bool skip_one_of(json *j, const char *characters) {
    if (j->at == j->end || !*j->at || !strchr(characters, *j->at)) return false;
    j->at++;
    return true;
}

static void skip_blanks(json *j) {
    while (skip_one_of(j, " \t\n\r")) continue;
}

/* Whether a certain character is next, which is then read. */
static bool accept(json *j, char wanted) {
    skip_blanks(j);
    if (j->at == j->end || *j->at != wanted) return false;
    j->at++;
    return true;
}

/* Read a certain character. */
static void expect(json *j, char wanted) {
    if (!accept(j, wanted)) refuse_json(j, format("'%c' here", wanted).text);
}

/* Whether a certain word is next, as true or null, which is then read. */
static bool accept_word(json *j, const char *word) {
    size_t n = strlen(word);

    skip_blanks(j);
    if ((size_t)(j->end - j->at) < n || memcmp(j->at, word, n) != 0) return false;
    j->at += n;
    return true;
}

/* Nothing but blanks may follow. */
static void expect_end(json *j) {
    skip_blanks(j);
    if (j->at < j->end) refuse_json(j, "nothing after the object");
}

/* Whether an object or list, whose opening bracket has been read, has another item. `*first` must
 * be true at the first call. */
static bool next_item(json *j, char close, bool *first) {
    if (accept(j, close)) return false;
    if (!*first) expect(j, ',');
    *first = false;
    return true;
}

/* The four hexadecimal digits of \uXXXX. */
static uint32_t read_hex(json *j) {
    uint32_t value = 0;

    for (int i = 0; i < 4; i++) {
        char c = j->at < j->end ? *j->at : 0;
        if (c >= '0' && c <= '9') value = value * 16 + (uint32_t)(c - '0');
        else if (c >= 'a' && c <= 'f') value = value * 16 + (uint32_t)(c - 'a' + 10);
        else if (c >= 'A' && c <= 'F') value = value * 16 + (uint32_t)(c - 'A' + 10);
        else refuse_json(j, "four digits after \\u");
        j->at++;
    }
    return value;
}

/* The code point of \uXXXX, or of two of them that are a surrogate pair. */
static uint32_t read_unicode_escape(json *j) {
    uint32_t high = read_hex(j);
    bool is_high = high >= 0xD800 && high < 0xDC00;
    bool more = j->end - j->at >= 6 && j->at[0] == '\\' && j->at[1] == 'u';

    if (!is_high || !more) return high;
    char *before = j->at;
    j->at += 2;
    uint32_t low = read_hex(j);
    if (low >= 0xDC00 && low < 0xE000) return 0x10000 + ((high - 0xD800) << 10) + (low - 0xDC00);
    j->at = before;
    return high;
}

/* What follows a backslash, as UTF-8 to `out`; returns the end. */
static char *read_escape(json *j, char *out) {
    static const char names[] = "\"\\/bfnrt";
    static const char values[] = "\"\\/\b\f\n\r\t";
    char c = j->at < j->end ? *j->at : 0;
    const char *found = c ? strchr(names, c) : NULL;

    if (found) {
        j->at++;
        *out++ = values[found - names];
        return out;
    }
    if (c != 'u') refuse_json(j, "an escape of JSON after \\");
    j->at++;
    return put_code_point(out, read_unicode_escape(j));
}

/* A string, decoded: it takes the place of its text, which is never shorter. */
static slice read_string(json *j) {
    expect(j, '"');
    char *start = j->at;
    char *out = start;

    for (;;) {
        if (j->at == j->end || (unsigned char)*j->at < ' ') refuse_json(j, "an end of each string");
        char c = *j->at++;
        if (c == '"') return (slice){start, (size_t)(out - start)};
        if (c == '\\') out = read_escape(j, out);
        else *out++ = c;
    }
}

/* The next name of an object, whose '{' has been read, up to its value; false at the end. */
static bool next_name(json *j, bool *first, slice *name) {
    if (!next_item(j, '}', first)) return false;
    *name = read_string(j);
    expect(j, ':');
    return true;
}

/* Read digits; returns how many. */
static size_t skip_digits(json *j) {
    char *start = j->at;

    while (j->at < j->end && *j->at >= '0' && *j->at <= '9') j->at++;
    return (size_t)(j->at - start);
}

/* A number in JSON's spelling, as text; one without a text if what is next is no number. */
static slice read_number(json *j) {
    skip_blanks(j);
    char *start = j->at;
    const slice none = {NULL, 0};

    skip_one_of(j, "-");
    bool zero = j->at < j->end && *j->at == '0';
    size_t whole = skip_digits(j);
    bool good = whole == 1 || (whole > 1 && !zero);
    if (skip_one_of(j, ".")) good = skip_digits(j) && good;
    if (skip_one_of(j, "eE")) {
        skip_one_of(j, "+-");
        good = skip_digits(j) && good;
    }
    if (good) return (slice){start, (size_t)(j->at - start)};
    j->at = start;
    return none;
}

/* The value of a number that is whole, not negative, and at most `most`; false for all others. */
static bool parse_count(slice number, uint64_t most, uint64_t *value) {
    *value = 0;
    for (size_t i = 0; i < number.n; i++) {
        uint64_t digit = (uint64_t)(number.text[i] - '0');
        if (digit > 9 || *value > (most - digit) / 10) return false;
        *value = *value * 10 + digit;
    }
    return number.n > 0;
}

/* A whole number from 0 to `most`; `expected` says so if it is anything else. */
static uint64_t read_count(json *j, const char *field, uint64_t most, const char *expected) {
    uint64_t value;

    skip_blanks(j);
    char *start = j->at;
    if (!parse_count(read_number(j), most, &value)) {
        j->at = start;
        refuse(j->path, field, expected, upcoming(j).text);
    }
    return value;
}

/* ---- 4. The header of a safetensors file ------------------------------------------------------*/

/* One entry of the header. */
typedef struct {
    slice name;
    slice dtype;
    uint64_t shape[3];
    int rank;
    uint64_t start; /* bytes from the beginning of the data */
    uint64_t stop;
    bool used;
} tensor;

/* The texts of __metadata__ that matter here. */
typedef struct {
    slice format;
    slice version;
    slice config;
    slice header_crc32;
} metadata;

/* A file, mapped, and its header. */
typedef struct {
    const char *path;
    const char *map;
    uint64_t size;
    uint64_t data; /* where the data begins */
    metadata metadata;
    tensor *tensors;
    size_t n_tensors;
} tensor_file;

/* Open a regular file; returns its descriptor and its size. */
static int open_regular(const char *path, uint64_t *size) {
    struct stat status;
    int file = open(path, O_RDONLY | O_NONBLOCK); /* opening a pipe would wait for its writer */

    if (file < 0 || fstat(file, &status)) {
        refuse(path, "file", "a readable file", strerror(errno));
    }
    if (!S_ISREG(status.st_mode)) {
        const char *kind = S_ISDIR(status.st_mode) ? "a directory" : "a device, pipe or socket";
        refuse(path, "file", "a regular file", kind);
    }
    if (status.st_size == 0) refuse(path, "file", "some content", "an empty file");
    *size = (uint64_t)status.st_size;
    return file;
}

static void map_file(tensor_file *f, const char *path) {
    int file = open_regular(path, &f->size);
    void *map = mmap(NULL, f->size, PROT_READ, MAP_PRIVATE, file, 0);

    if (map == MAP_FAILED) refuse(path, "file", "a readable file", strerror(errno));
    close(file);
    f->path = path;
    f->map = map;
}

/* Read the length of the header; afterwards the header lies from byte 8 to f->data. */
static void find_header(tensor_file *f) {
    uint64_t length;
    const char *field = "header length";

    if (f->size < 8) {
        refuse(f->path, field, "8 bytes", format("a file of %" PRIu64 " bytes", f->size).text);
    }
    memcpy(&length, f->map, 8);
    line found = format("%" PRIu64, length);
    if (length > MAX_HEADER) {
        refuse(f->path, field, format("at most %d", MAX_HEADER).text, found.text);
    }
    if (length > f->size - 8) {
        line expected = format("at most %" PRIu64 " (the file's end)", f->size - 8);
        refuse(f->path, field, expected.text, found.text);
    }
    f->data = 8 + length;
}

/* Read __metadata__, an object of strings. Other names than ours may have any text. */
static void read_metadata(json *j, metadata *m) {
    const char *const names[] = {"format", "format_version", "config", "header_crc32"};
    slice *const values[] = {&m->format, &m->version, &m->config, &m->header_crc32};
    bool first = true;
    slice name;

    j->field = "__metadata__";
    expect(j, '{');
    while (next_name(j, &first, &name)) {
        slice value = read_string(j);
        for (int i = 0; i < 4; i++) {
            if (!equal(name, names[i])) continue;
            if (values[i]->text) refuse_json(j, format("%s only once", names[i]).text);
            *values[i] = value;
        }
    }
    j->field = "header";
}

/* Read the sizes of a tensor, at most three. */
static void read_shape(json *j, tensor *t, const char *field) {
    bool first = true;

    expect(j, '[');
    for (t->rank = 0; next_item(j, ']', &first); t->rank++) {
        if (t->rank == 3) refuse(j->path, field, "at most 3 sizes in shape", "more");
        t->shape[t->rank] = read_count(j, field, INT64_MAX, "whole numbers in shape");
    }
}

/* Read where a tensor begins and ends. */
static void read_offsets(json *j, tensor *t, const char *field) {
    const char *expected = "two byte offsets in data_offsets";

    expect(j, '[');
    t->start = read_count(j, field, INT64_MAX, expected);
    expect(j, ',');
    t->stop = read_count(j, field, INT64_MAX, expected);
    expect(j, ']');
    if (t->stop < t->start) refuse(j->path, field, "data_offsets that rise", "others");
}

/* Read the entry of a tensor: dtype, shape and data_offsets, each once, in any order. */
static void read_tensor(json *j, tensor *t) {
    enum { DTYPE = 1, SHAPE = 2, OFFSETS = 4, ALL = 7 };
    line field = format("tensor %s", quote(t->name).text);
    const char *expected = "dtype, shape and data_offsets, each once";
    int seen = 0;
    bool first = true;
    slice name;

    j->field = field.text;
    expect(j, '{');
    while (next_name(j, &first, &name)) {
        int part = equal(name, "dtype")          ? DTYPE
                   : equal(name, "shape")        ? SHAPE
                   : equal(name, "data_offsets") ? OFFSETS
                                                 : 0;
        if (!part || seen & part) refuse(j->path, field.text, expected, quote(name).text);
        seen |= part;
        if (part == DTYPE) t->dtype = read_string(j);
        if (part == SHAPE) read_shape(j, t, field.text);
        if (part == OFFSETS) read_offsets(j, t, field.text);
    }
    if (seen != ALL) refuse(j->path, field.text, expected, "less");
    j->field = "header";
}

/* Read the whole header from a copy of it, which must stay: names and texts point into it. */
static void read_header(tensor_file *f, char *copy) {
    json j = open_json(copy, f->data - 8, f->path, "header");
    bool first = true;
    bool has_metadata = false;
    slice name;

    expect(&j, '{');
    while (next_name(&j, &first, &name)) {
        if (equal(name, "__metadata__")) {
            if (has_metadata) refuse_json(&j, "__metadata__ only once");
            has_metadata = true;
            read_metadata(&j, &f->metadata);
            continue;
        }
        f->tensors = grow(f->tensors, f->n_tensors, sizeof *f->tensors);
        tensor *t = &f->tensors[f->n_tensors++];
        *t = (tensor){.name = name};
        read_tensor(&j, t);
    }
    expect_end(&j);
}

static int compare_places(const void *left, const void *right) {
    const tensor *a = left;
    const tensor *b = right;

    if (a->start != b->start) return a->start < b->start ? -1 : 1;
    return (a->stop > b->stop) - (a->stop < b->stop);
}

static int compare_slices(slice a, slice b) {
    int order = memcmp(a.text, b.text, a.n < b.n ? a.n : b.n);

    return order ? order : (a.n > b.n) - (a.n < b.n);
}

static int compare_names(const void *left, const void *right) {
    return compare_slices(((const tensor *)left)->name, ((const tensor *)right)->name);
}

/* The tensors must cover the data from its beginning to its end, without a gap or an overlap. So
 * each of them lies in the file. */
static void check_coverage(tensor_file *f) {
    uint64_t place = 0;

    if (f->n_tensors) qsort(f->tensors, f->n_tensors, sizeof *f->tensors, compare_places);
    for (size_t i = 0; i < f->n_tensors; i++) {
        const tensor *t = &f->tensors[i];
        if (t->start != place) {
            line field = format("tensor %s", quote(t->name).text);
            line expected = format("a start at byte %" PRIu64 " of the data", place);
            const char *kind = t->start > place ? "a gap" : "an overlap";
            line found = format("%s: %" PRIu64, kind, t->start);
            refuse(f->path, field.text, expected.text, found.text);
        }
        place = t->stop;
    }
    if (place != f->size - f->data) {
        line expected = format("%" PRIu64 " bytes, as the header says", f->data + place);
        line found = format("%" PRIu64 " bytes", f->size);
        refuse(f->path, "file size", expected.text, found.text);
    }
}

/* Put the tensors in the order of their names, of which none may appear twice. */
static void sort_by_name(tensor_file *f) {
    if (f->n_tensors) qsort(f->tensors, f->n_tensors, sizeof *f->tensors, compare_names);
    for (size_t i = 1; i < f->n_tensors; i++) {
        if (compare_names(&f->tensors[i - 1], &f->tensors[i]) == 0) {
            line found = format("%s twice", quote(f->tensors[i].name).text);
            refuse(f->path, "header", "names that appear once", found.text);
        }
    }
}

/* ---- 5. The format of a .tg2 file: its name, its version, the checksum of its header ----------*/

/* Continue a CRC-32 (as in zlib and PNG, bits reversed) with n bytes. It starts with all ones, and
 * its result is inverted. */
static uint32_t add_to_crc(uint32_t crc, const char *bytes, size_t n) {
    for (size_t i = 0; i < n; i++) {
        crc ^= (unsigned char)bytes[i];
        for (int bit = 0; bit < 8; bit++) crc = crc >> 1 ^ (crc & 1 ? 0xEDB88320 : 0);
    }
    return crc;
}

/* Where the eight digits of the header's checksum are in the file. Their name stands once. */
static const char *find_checksum(const tensor_file *f) {
    static const char name[] = "\"header_crc32\":\"";
    const size_t n = sizeof name - 1;
    const char *found = NULL;

    for (const char *p = f->map + 8; p + n + 9 <= f->map + f->data; p++) {
        if (memcmp(p, name, n) != 0) continue;
        if (found) refuse(f->path, "header", "one header_crc32", "more");
        found = p + n;
    }
    if (!found) refuse(f->path, "__metadata__ header_crc32", "eight digits", "none");
    return found;
}

/* Check the header and its length against the checksum in it, whose digits count as zeros. */
static void check_checksum(const tensor_file *f) {
    const char *digits = find_checksum(f);
    uint32_t crc = add_to_crc(0xFFFFFFFF, f->map, (size_t)(digits - f->map));

    crc = add_to_crc(crc, "00000000", 8);
    crc = ~add_to_crc(crc, digits + 8, (size_t)(f->map + f->data - (digits + 8)));
    line expected = format("%08" PRIx32, crc);
    slice found = {digits, 8};
    if (!equal(found, expected.text) || !equal(f->metadata.header_crc32, expected.text)) {
        line text = format("the CRC-32 %s", expected.text);
        refuse(f->path, "__metadata__ header_crc32", text.text, quote(found).text);
    }
}

/* Check that this is a .tg2 file; returns its version, 1 or 2. */
static int check_version(const tensor_file *f) {
    const metadata *m = &f->metadata;

    if (!equal(m->format, "tinygpt2")) {
        line found = m->format.text ? quote(m->format) : format("none");
        refuse(f->path, "__metadata__ format", "'tinygpt2'", found.text);
    }
    if (equal(m->version, "2")) {
        check_checksum(f);
        return 2;
    }
    if (!equal(m->version, "1")) {
        line found = m->version.text ? quote(m->version) : format("none");
        refuse(f->path, "__metadata__ format_version", "'1' or '2'", found.text);
    }
    if (m->header_crc32.text) {
        refuse(f->path, "__metadata__ header_crc32", "none in version 1", "one");
    }
    return 1;
}

/* ---- 6. Options that say how tokens are chosen and when to stop -------------------------------
 * Each has a value on the command line, or else in the file, or else one of this program. */

enum { /* in the order of the table */
    MAX_TOKENS,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    MIN_P,
    REPETITION_PENALTY,
    MAX_LENGTH, /* of the prompt and the answer together; only files have it */
    N_CHOICES
};

/* What is known of an option. */
typedef struct {
    const char *name; /* in a file */
    bool is_whole;
    double least;
    double most;      /* larger whole numbers count as this */
    double usual;     /* the value if there is no other */
    const char *expected;
} choice;

static const choice choices[N_CHOICES] = {
    {"max_new_tokens", true, 0, INT32_MAX, 200, "a whole number from 0"},
    {"temperature", false, 0, 1e6, 0.8, "a number from 0 to 1e6"},
    {"top_k", true, 0, INT32_MAX, 40, "a whole number from 0 (0: all tokens)"},
    {"top_p", false, DBL_TRUE_MIN, 1, 1, "above 0, at most 1"}, /* the least number above 0 */
    {"min_p", false, 0, 1, 0, "a number from 0 to 1"},
    {"repetition_penalty", false, 1e-6, 1e6, 1, "a number from 1e-6 to 1e6"},
    {"max_length", true, 0, INT32_MAX, INT32_MAX, "a whole number from 0"},
};

/* Where a name is in the table; N_CHOICES if it is not. */
static int find_choice(slice name) {
    int which = 0;

    while (which < N_CHOICES && !equal(name, choices[which].name)) which++;
    return which;
}

/* All names, for an error message. */
static line choice_names(void) {
    line text = format("one of %s", choices[0].name);

    for (int i = 1; i < N_CHOICES; i++) text = format("%s, %s", text.text, choices[i].name);
    return text;
}

/* The values of some options. */
typedef struct {
    bool is_set[N_CHOICES];
    double values[N_CHOICES];
} chosen;

/* A whole number in decimal, with or without a sign. Values beyond 10^17 count as 10^17, so that
 * one more digit never overflows. */
static bool parse_whole(slice s, int64_t *value) {
    const int64_t most = INT64_C(100000000000000000);
    bool negative = s.n && s.text[0] == '-';
    size_t first = s.n && (s.text[0] == '-' || s.text[0] == '+');

    *value = 0;
    for (size_t i = first; i < s.n; i++) {
        if (s.text[i] < '0' || s.text[i] > '9') return false;
        *value = *value * 10 + (s.text[i] - '0');
        if (*value > most) *value = most;
    }
    if (negative) *value = -*value;
    return s.n > first;
}

/* A number in decimal: not nan, inf or 0x10. The bytes after the text must end somewhere with a
 * zero, which ends strtod. */
static bool parse_real(slice s, double *value) {
    char *end;

    for (size_t i = 0; i < s.n; i++) {
        if (!strchr("0123456789+-.eE", s.text[i])) return false;
    }
    if (s.n == 0) return false;
    *value = strtod(s.text, &end);
    return end == s.text + s.n;
}

/* Set an option to the value in a text; false if it does not take this value. */
static bool set_choice(chosen *c, int which, slice text) {
    const choice *option = &choices[which];
    double value;
    int64_t whole;

    if (option->is_whole) {
        if (!parse_whole(text, &whole)) return false;
        value = whole < option->most ? (double)whole : option->most;
    } else if (!parse_real(text, &value)) {
        return false;
    }
    c->is_set[which] = true;
    c->values[which] = value;
    return value >= option->least && value <= option->most;
}

/* Take the values that are set in `more`, but not in `c`. */
static void add_choices(chosen *c, const chosen *more) {
    for (int i = 0; i < N_CHOICES; i++) {
        if (c->is_set[i] || !more->is_set[i]) continue;
        c->is_set[i] = true;
        c->values[i] = more->values[i];
    }
}

/* The value of an option, or the usual one. */
static double value_of(const chosen *c, int which) {
    return c->is_set[which] ? c->values[which] : choices[which].usual;
}

/* ---- 7. The configuration ---------------------------------------------------------------------*/

enum { /* its names, in the order of the table */
    VOCAB_SIZE,
    N_POSITIONS,
    N_EMBD,
    N_LAYER,
    N_HEAD,
    N_INNER,
    N_SIZES,
    ACTIVATION = N_SIZES,
    EPSILON,
    SCALE_WEIGHTS,
    SCALE_BY_LAYER,
    TIED,
    PREFIX_SPACE,
    BOS,
    N_MERGES,
    N_TOKEN_BYTES,
    PRE_TOKENIZER,
    EOS,            /* in version 1 only, and the next one */
    SPECIAL_TOKENS,
    EOS_LIST,       /* in version 2 only, and all that follow */
    ADDED_TOKENS,
    TOKENS_BEFORE,
    TOKENS_AFTER,
    GENERATION,
    N_NAMES
};

static const char *const config_names[N_NAMES] = {
    "vocab_size",
    "n_positions",
    "n_embd",
    "n_layer",
    "n_head",
    "n_inner",
    "activation_function",
    "layer_norm_epsilon",
    "scale_attn_weights",
    "scale_attn_by_inverse_layer_idx",
    "tie_word_embeddings",
    "add_prefix_space",
    "bos_token_id",
    "n_merges",
    "n_token_bytes",
    "pre_tokenizer",
    "eos_token_id",
    "special_tokens",
    "eos_token_ids",
    "added_tokens",
    "tokens_before",
    "tokens_after",
    "generation",
};

static const uint64_t size_limits[N_SIZES] = {1 << 24, 1 << 24, 1 << 17, 1 << 12, 1 << 12, 1 << 20};

enum { NO_ID = -1 };
enum { MAX_ADDED = 256 }; /* characters of an added token's text */

/* Token ids in an array that grows. */
typedef struct {
    int64_t *ids; /* [n] */
    size_t n;
} id_list;

static void add_id(id_list *list, int64_t id) {
    list->ids = grow(list->ids, list->n, sizeof *list->ids);
    list->ids[list->n++] = id;
}

/* A token whose text an encoder looks for in a text. It is only checked here. */
typedef struct {
    slice text;
    int64_t id;
} added_token;

typedef struct {
    uint64_t sizes[N_SIZES];
    int activation;
    double epsilon;
    bool scale_weights;
    bool scale_by_layer;
    bool tied;
    int64_t bos;        /* NO_ID: none */
    id_list ends;       /* the tokens that end a text; the first is end-of-text */
    id_list before;     /* what an encoder puts before every text */
    id_list after;      /* and behind it */
    added_token *added; /* [n_added] */
    size_t n_added;
    int64_t highest_id; /* of all tokens above */
    bool has_tokenizer;
    uint64_t n_merges;
    uint64_t n_token_bytes;
    chosen choices; /* the model's own */
} config;

/* What an error message calls a value of the configuration. */
static line field_of(int which) {
    return format("config %s", config_names[which]);
}

/* One of the sizes of the model. */
static uint64_t read_size(json *j, int which) {
    line expected = format("a whole number from 1 to %" PRIu64, size_limits[which]);
    line field = field_of(which);
    uint64_t value = read_count(j, field.text, size_limits[which], expected.text);

    if (value == 0) refuse(j->path, field.text, expected.text, "0");
    return value;
}

static int read_activation(json *j) {
    slice name = read_string(j);

    if (equal(name, "gelu_new")) return TG_GELU_NEW;
    if (equal(name, "gelu")) return TG_GELU;
    if (equal(name, "relu")) return TG_RELU;
    refuse(j->path, field_of(ACTIVATION).text, "gelu_new, gelu or relu", quote(name).text);
}

/* Whether a number is written as a real one: 1.0 or 1e0, but not 1. */
static bool is_real(slice number) {
    for (size_t i = 0; i < number.n; i++) {
        if (strchr(".eE", number.text[i])) return true;
    }
    return false;
}

static double read_epsilon(json *j) {
    slice number = read_number(j);
    /* The header's copy ends with a zero byte. strtod stops where the number does. */
    double value = is_real(number) ? strtod(number.text, NULL) : -1;

    if (!(value >= 0 && value < 1)) {
        line found = number.text ? quote(number) : upcoming(j);
        refuse(j->path, field_of(EPSILON).text, "0.0 <= epsilon < 1.0", found.text);
    }
    return value;
}

static bool read_switch(json *j, int which) {
    if (accept_word(j, "true")) return true;
    if (accept_word(j, "false")) return false;
    refuse(j->path, field_of(which).text, "true or false", upcoming(j).text);
}

/* A count below 2^31. */
static uint64_t read_small_count(json *j, int which) {
    return read_count(j, field_of(which).text, INT32_MAX, "a count below 2147483648");
}

/* A token id. That it is in the vocabulary can only be checked when the vocabulary's size is known,
 * so the highest one is remembered. */
static int64_t read_id(json *j, config *c, int which) {
    int64_t id = (int64_t)read_count(j, field_of(which).text, INT32_MAX, "a token id");

    if (id > c->highest_id) c->highest_id = id;
    return id;
}

static int64_t read_optional_id(json *j, config *c, int which) {
    return accept_word(j, "null") ? NO_ID : read_id(j, c, which);
}

/* Read the end token of version 1, which may be null. */
static void read_end(json *j, config *c) {
    int64_t id = read_optional_id(j, c, EOS);

    if (id != NO_ID) add_id(&c->ends, id);
}

/* Read a list of token ids. */
static void read_ids(json *j, config *c, id_list *list, int which) {
    bool first = true;

    expect(j, '[');
    while (next_item(j, ']', &first)) add_id(list, read_id(j, c, which));
}

/* How many characters a text has in which no character is cut off. */
static size_t count_characters(slice text) {
    size_t n = 0;

    for (size_t i = 0; i < text.n; i++) n += ((unsigned char)text.text[i] & 0xC0) != 0x80;
    return n;
}

/* Remember an added token, whose text must be neither empty nor long. */
static void add_token(const json *j, config *c, int which, added_token token) {
    size_t n = count_characters(token.text);

    if (n == 0 || n > MAX_ADDED) {
        line expected = format("texts of 1 to %d characters", MAX_ADDED);
        refuse(j->path, field_of(which).text, expected.text, format("one of %zu", n).text);
    }
    c->added = grow(c->added, c->n_added, sizeof *c->added);
    c->added[c->n_added++] = token;
}

/* Read the special tokens of version 1, an object of texts and their ids. */
static void read_special_tokens(json *j, config *c) {
    added_token token;
    bool first = true;

    expect(j, '{');
    while (next_name(j, &first, &token.text)) {
        token.id = read_id(j, c, SPECIAL_TOKENS);
        add_token(j, c, SPECIAL_TOKENS, token);
    }
}

/* Read an added token of version 2: text, id, and how an encoder looks for it. */
static void read_added_token(json *j, config *c) {
    enum { TEXT, ID, N_PARTS = 7 }; /* all others are true or false */
    static const char *const names[N_PARTS] = {
        "text", "id", "special", "lstrip", "rstrip", "single_word", "normalized",
    };
    line field = field_of(ADDED_TOKENS);
    const char *expected = "text, id and five switches, each once";
    added_token token = {.id = NO_ID};
    bool seen[N_PARTS] = {false};
    int n_seen = 0;
    bool first = true;
    slice name;

    expect(j, '{');
    for (; next_name(j, &first, &name); n_seen++) {
        int part = 0;
        while (part < N_PARTS && !equal(name, names[part])) part++;
        if (part == N_PARTS || seen[part]) refuse(j->path, field.text, expected, quote(name).text);
        seen[part] = true;
        if (part == TEXT) token.text = read_string(j);
        else if (part == ID) token.id = read_id(j, c, ADDED_TOKENS);
        else read_switch(j, ADDED_TOKENS);
    }
    if (n_seen != N_PARTS) refuse(j->path, field.text, expected, "less");
    add_token(j, c, ADDED_TOKENS, token);
}

static void read_added_tokens(json *j, config *c) {
    bool first = true;

    expect(j, '[');
    while (next_item(j, ']', &first)) read_added_token(j, c);
}

/* Read how an encoder cuts a text. All kinds are decoded in the same way. */
static void read_pre_tokenizer(json *j) {
    slice name = read_string(j);

    if (equal(name, "gpt2") || equal(name, "characters")) return;
    refuse(j->path, field_of(PRE_TOKENIZER).text, "'gpt2' or 'characters'", quote(name).text);
}

static void read_merges(json *j, config *c) {
    c->has_tokenizer = !accept_word(j, "null");
    if (c->has_tokenizer) c->n_merges = read_small_count(j, N_MERGES);
}

/* Read the model's own value of an option. */
static void read_choice(json *j, chosen *c, int which) {
    line field = format("config generation %s", choices[which].name);

    if (c->is_set[which]) refuse(j->path, field.text, "one value", "two");
    skip_blanks(j);
    char *start = j->at;
    if (!set_choice(c, which, read_number(j))) {
        j->at = start;
        refuse(j->path, field.text, choices[which].expected, upcoming(j).text);
    }
}

/* Read the model's own values of options. */
static void read_choices(json *j, config *c) {
    bool first = true;
    slice name;

    expect(j, '{');
    while (next_name(j, &first, &name)) {
        int which = find_choice(name);
        if (which == N_CHOICES) {
            line field = field_of(GENERATION);
            refuse(j->path, field.text, choice_names().text, quote(name).text);
        }
        read_choice(j, &c->choices, which);
    }
}

/* Read the value of one name. */
static void read_value(json *j, config *c, int which) {
    switch (which) {
        case ACTIVATION:
            c->activation = read_activation(j);
            break;
        case EPSILON:
            c->epsilon = read_epsilon(j);
            break;
        case SCALE_WEIGHTS:
            c->scale_weights = read_switch(j, which);
            break;
        case SCALE_BY_LAYER:
            c->scale_by_layer = read_switch(j, which);
            break;
        case TIED:
            c->tied = read_switch(j, which);
            break;
        case PREFIX_SPACE:
            read_switch(j, which);
            break;
        case BOS:
            c->bos = read_optional_id(j, c, which);
            break;
        case EOS:
            read_end(j, c);
            break;
        case EOS_LIST:
            read_ids(j, c, &c->ends, which);
            break;
        case ADDED_TOKENS:
            read_added_tokens(j, c);
            break;
        case TOKENS_BEFORE:
            read_ids(j, c, &c->before, which);
            break;
        case TOKENS_AFTER:
            read_ids(j, c, &c->after, which);
            break;
        case N_MERGES:
            read_merges(j, c);
            break;
        case N_TOKEN_BYTES:
            c->n_token_bytes = read_small_count(j, which);
            break;
        case SPECIAL_TOKENS:
            read_special_tokens(j, c);
            break;
        case PRE_TOKENIZER:
            read_pre_tokenizer(j);
            break;
        case GENERATION:
            read_choices(j, c);
            break;
        default:
            c->sizes[which] = read_size(j, which);
    }
}

/* The index of a name; N_NAMES if it is unknown. */
static int find_config_name(slice name) {
    int which = 0;

    while (which < N_NAMES && !equal(name, config_names[which])) which++;
    return which;
}

/* Whether a version of the format has a name. */
static bool has_name(int version, int which) {
    if (which < EOS) return true;
    return version == (which < EOS_LIST ? 1 : 2);
}

/* Which values have been read must be all of the version's. */
static void check_names(const char *path, const bool *seen, int version) {
    for (int i = 0; i < N_NAMES; i++) {
        if (seen[i] == has_name(version, i)) continue;
        line found = format("%s %s", seen[i] ? "unknown" : "missing", config_names[i]);
        refuse(path, "config", "exactly the known names", found.text);
    }
}

static int compare_texts(const void *left, const void *right) {
    return compare_slices(((const added_token *)left)->text, ((const added_token *)right)->text);
}

static int compare_ids(const void *left, const void *right) {
    int64_t a = ((const added_token *)left)->id;
    int64_t b = ((const added_token *)right)->id;

    return (a > b) - (a < b);
}

/* Sort the added tokens; no two of them may compare as equal. */
static void sort_added(const char *path, const config *c,
                       int (*compare)(const void *, const void *)) {
    if (c->n_added) qsort(c->added, c->n_added, sizeof *c->added, compare);
    for (size_t i = 1; i < c->n_added; i++) {
        const added_token *token = &c->added[i];
        if (compare(token - 1, token)) continue;
        line found = format("%s with id %" PRId64 " again", quote(token->text).text, token->id);
        refuse(path, field_of(ADDED_TOKENS).text, "each text and each id once", found.text);
    }
}

/* The tokens around a text must fit into the positions. */
static void check_length(const char *path, const config *c, const id_list *list, int which) {
    if (list->n <= c->sizes[N_POSITIONS]) return;
    line found = format("%zu", list->n);
    refuse(path, field_of(which).text, "at most n_positions tokens", found.text);
}

/* Check values against each other. */
static void check_config(const char *path, const config *c) {
    if (c->sizes[N_EMBD] % c->sizes[N_HEAD]) {
        line found = format("%" PRIu64, c->sizes[N_HEAD]);
        refuse(path, field_of(N_HEAD).text, "a divisor of n_embd", found.text);
    }
    if (c->highest_id >= (int64_t)c->sizes[VOCAB_SIZE]) {
        line expected = format("token ids below %" PRIu64, c->sizes[VOCAB_SIZE]);
        refuse(path, "config", expected.text, format("%" PRId64, c->highest_id).text);
    }
    check_length(path, c, &c->before, TOKENS_BEFORE);
    check_length(path, c, &c->after, TOKENS_AFTER);
    sort_added(path, c, compare_texts);
    sort_added(path, c, compare_ids);
}

/* Read the configuration from the text in the metadata. */
static config read_config(const tensor_file *f, int version) {
    slice text = f->metadata.config;
    config c = {.bos = NO_ID, .highest_id = NO_ID};
    bool seen[N_NAMES] = {false};
    bool first = true;
    slice name;

    if (!text.text) refuse(f->path, "__metadata__ config", "JSON in UTF-8", "none");
    json j = open_json((char *)text.text, text.n, f->path, "__metadata__ config");
    expect(&j, '{');
    while (next_name(&j, &first, &name)) {
        int which = find_config_name(name);
        if (which == N_NAMES || seen[which]) {
            line found = format("%s %s", which == N_NAMES ? "unknown" : "twice", quote(name).text);
            refuse(f->path, "config", "exactly the known names", found.text);
        }
        seen[which] = true;
        read_value(&j, &c, which);
    }
    expect_end(&j);
    check_names(f->path, seen, version);
    check_config(f->path, &c);
    return c;
}

static void free_config(config *c) {
    free(c->ends.ids);
    free(c->before.ids);
    free(c->after.ids);
    free(c->added);
}

/* ---- 8. The model's tensors -------------------------------------------------------------------*/

/* Finds the tensors one after the other, in the order of tinygpt2.py's `layout`. */
typedef struct {
    tensor_file *file;
    char prefix[32];  /* of the names, as "h.3." */
    int64_t *offsets; /* of the weights, where they begin in the file */
    size_t n;         /* how many offsets there are */
    size_t n_found;   /* how many tensors have been found */
} finder;

static uint64_t round_up(uint64_t count, uint64_t multiple) {
    return (count + multiple - 1) / multiple * multiple;
}

/* A dtype and a shape for an error message, as F32 [19, 6, 16]; other names of dtypes quoted. */
static line describe(slice dtype, int rank, const uint64_t *shape) {
    line name = quote(dtype);
    bool known = equal(dtype, "F32") || equal(dtype, "U8") || equal(dtype, "U32");
    line text = known ? format("%.*s [", (int)dtype.n, dtype.text) : format("%s [", name.text);

    for (int i = 0; i < rank; i++) {
        text = format(i ? "%s, %" PRIu64 : "%s%" PRIu64, text.text, shape[i]);
    }
    return format("%s]", text.text);
}

static uint64_t dtype_size(const char *dtype) {
    return strcmp(dtype, "U8") == 0 ? 1 : strcmp(dtype, "U64") == 0 ? 8 : 4;
}

/* Where a tensor begins in the file. It must exist, be of this dtype and shape, have the bytes for
 * it, and start on 64 bytes. */
static uint64_t find_tensor(finder *s, const char *name, const char *dtype, int rank,
                            const uint64_t *shape) {
    tensor_file *f = s->file;
    line full = format("%s%s", s->prefix, name);
    line field = format("tensor %s", full.text);
    line expected = describe(slice_of(dtype), rank, shape);
    tensor key = {.name = slice_of(full.text)};
    tensor *t = NULL;

    if (f->n_tensors) t = bsearch(&key, f->tensors, f->n_tensors, sizeof *t, compare_names);
    if (!t) refuse(f->path, field.text, expected.text, "no such tensor");
    bool same = equal(t->dtype, dtype) && t->rank == rank;
    uint64_t bytes = dtype_size(dtype);
    for (int i = 0; i < rank && same; i++) {
        same = t->shape[i] == shape[i];
        bytes *= shape[i];
    }
    if (!same) {
        refuse(f->path, field.text, expected.text, describe(t->dtype, t->rank, t->shape).text);
    }
    if (t->stop - t->start != bytes) {
        expected = format("%" PRIu64 " bytes", bytes);
        line found = format("data_offsets of %" PRIu64 " bytes", t->stop - t->start);
        refuse(f->path, field.text, expected.text, found.text);
    }
    uint64_t place = f->data + t->start;
    if (place % ALIGNMENT) {
        refuse(f->path, field.text, "a start on 64 bytes", format("byte %" PRIu64, place).text);
    }
    s->n_found++;
    t->used = true;
    return place;
}

/* A matrix in panels: [ceil(outputs / 16), inputs, 16] */
static void find_panels(finder *s, const char *name, uint64_t inputs, uint64_t outputs) {
    const uint64_t shape[] = {round_up(outputs, PANEL) / PANEL, inputs, PANEL};

    s->offsets[s->n++] = (int64_t)find_tensor(s, name, "F32", 3, shape);
}

/* A vector that is padded to whole panels: [16 ceil(n / 16)] */
static void find_vector(finder *s, const char *name, uint64_t n) {
    const uint64_t shape[] = {round_up(n, PANEL)};

    s->offsets[s->n++] = (int64_t)find_tensor(s, name, "F32", 1, shape);
}

/* One table of the vocabulary, padded to 64 bytes. Returns where it begins in the file. */
static uint64_t find_table(finder *s, const char *name, const char *dtype, uint64_t n) {
    const uint64_t shape[] = {round_up(n, ALIGNMENT / dtype_size(dtype))};

    return find_tensor(s, name, dtype, 1, shape);
}

static void find_layer(finder *s, uint64_t n_embd, uint64_t n_inner) {
    find_vector(s, "ln_1.weight", n_embd);
    find_vector(s, "ln_1.bias", n_embd);
    find_panels(s, "attn.c_attn.weight", n_embd, 3 * n_embd);
    find_vector(s, "attn.c_attn.bias", 3 * n_embd);
    find_panels(s, "attn.c_proj.weight", n_embd, n_embd);
    find_vector(s, "attn.c_proj.bias", n_embd);
    find_vector(s, "ln_2.weight", n_embd);
    find_vector(s, "ln_2.bias", n_embd);
    find_panels(s, "mlp.c_fc.weight", n_embd, n_inner);
    find_vector(s, "mlp.c_fc.bias", n_inner);
    find_panels(s, "mlp.c_proj.weight", n_inner, n_embd);
    find_vector(s, "mlp.c_proj.bias", n_embd);
}

static void find_weights(finder *s, const config *c) {
    uint64_t n_embd = c->sizes[N_EMBD];
    const uint64_t positions[] = {c->sizes[N_POSITIONS], round_up(n_embd, PANEL)};

    find_panels(s, "wte.weight", n_embd, c->sizes[VOCAB_SIZE]);
    s->offsets[s->n++] = (int64_t)find_tensor(s, "wpe.weight", "F32", 2, positions);
    for (uint64_t i = 0; i < c->sizes[N_LAYER]; i++) {
        snprintf(s->prefix, sizeof s->prefix, "h.%" PRIu64 ".", i);
        find_layer(s, n_embd, c->sizes[N_INNER]);
    }
    s->prefix[0] = 0;
    find_vector(s, "ln_f.weight", n_embd);
    find_vector(s, "ln_f.bias", n_embd);
    if (!c->tied) find_panels(s, "lm_head.weight", n_embd, c->sizes[VOCAB_SIZE]);
}

/* There must be no tensor besides those that have been found. */
static void check_surplus(const finder *s) {
    const tensor_file *f = s->file;

    for (size_t i = 0; i < f->n_tensors && s->n_found < f->n_tensors; i++) {
        if (f->tensors[i].used) continue;
        refuse(f->path, "tensors", "only those of a GPT-2", quote(f->tensors[i].name).text);
    }
}

/* The bytes of tokens, in the file. */
typedef struct {
    const char *bytes;       /* of all tokens, one after the other */
    const uint32_t *offsets; /* [vocab_size + 1]: where each token's begin; NULL: no tokenizer */
} vocabulary;

/* The offsets must rise from 0 to the end of the bytes. */
static void check_offsets(const char *path, const uint32_t *offsets, const config *c) {
    uint64_t n = c->sizes[VOCAB_SIZE];
    bool good = offsets[0] == 0 && offsets[n] == c->n_token_bytes;

    for (uint64_t i = 0; i < n && good; i++) good = offsets[i] <= offsets[i + 1];
    if (!good) {
        line expected = format("offsets rising from 0 to %" PRIu64, c->n_token_bytes);
        refuse(path, "tensor vocab.offsets", expected.text, "others");
    }
}

/* Find all tables of the vocabulary, also those for encoding, which are not used here. */
static vocabulary find_vocabulary(finder *s, const config *c) {
    const char *map = s->file->map;
    vocabulary v = {NULL, NULL};

    if (!c->has_tokenizer) return v;
    v.bytes = map + find_table(s, "vocab.bytes", "U8", c->n_token_bytes);
    uint64_t offsets = find_table(s, "vocab.offsets", "U32", c->sizes[VOCAB_SIZE] + 1);
    v.offsets = (const uint32_t *)(const void *)(map + offsets);
    find_table(s, "vocab.byte_ids", "U32", 256);
    find_table(s, "merges.pairs", "U64", c->n_merges);
    find_table(s, "merges.ranks", "U32", c->n_merges);
    find_table(s, "merges.results", "U32", c->n_merges);
    check_offsets(s->file->path, v.offsets, c);
    return v;
}

/* ---- 9. The model -----------------------------------------------------------------------------*/

/* All that is needed of a file. */
typedef struct {
    const char *path;
    const char *map;
    uint64_t size;
    int64_t *offsets; /* of the weights in the map */
    tg_config config;
    vocabulary vocabulary;
    bool *ends;     /* [vocab_size]: whether a token ends a text */
    id_list start;  /* the tokens that an empty text begins with */
    chosen choices; /* the model's own values of options */
} weight_file;

/* The configuration as kernels.c wants it. The limits of the sizes are below 2^31. */
static tg_config kernel_config(const config *c) {
    return (tg_config){
        .vocab_size = (int32_t)c->sizes[VOCAB_SIZE],
        .n_positions = (int32_t)c->sizes[N_POSITIONS],
        .n_embd = (int32_t)c->sizes[N_EMBD],
        .n_layer = (int32_t)c->sizes[N_LAYER],
        .n_head = (int32_t)c->sizes[N_HEAD],
        .n_inner = (int32_t)c->sizes[N_INNER],
        .activation = c->activation,
        .scale_attn_weights = c->scale_weights,
        .scale_attn_by_inverse_layer_idx = c->scale_by_layer,
        .tied = c->tied,
        .layer_norm_epsilon = (float)c->epsilon,
    };
}

/* A table of the tokens that end a text, of which none may be named twice. */
static bool *mark_ends(const char *path, const config *c) {
    bool *ends = need(calloc(c->sizes[VOCAB_SIZE], sizeof *ends));

    for (size_t i = 0; i < c->ends.n; i++) {
        int64_t id = c->ends.ids[i];
        if (ends[id]) {
            line found = format("%" PRId64 " twice", id);
            refuse(path, field_of(EOS_LIST).text, "different tokens", found.text);
        }
        ends[id] = true;
    }
    return ends;
}

/* The tokens that an empty text begins with: those before every text, or else begin-of-text, or
 * else end-of-text, or none. */
static id_list start_tokens(const config *c) {
    id_list start = {NULL, 0};

    for (size_t i = 0; i < c->before.n; i++) add_id(&start, c->before.ids[i]);
    if (start.n == 0 && c->bos != NO_ID) add_id(&start, c->bos);
    if (start.n == 0 && c->ends.n) add_id(&start, c->ends.ids[0]);
    return start;
}

/* Map a .tg2 file and check all of its header. */
static weight_file open_weights(const char *path) {
    tensor_file f = {.path = path};

    map_file(&f, path);
    find_header(&f);
    char *copy = need(malloc(f.data)); /* never of no size */
    memcpy(copy, f.map + 8, f.data - 8);
    copy[f.data - 8] = 0;
    read_header(&f, copy);
    check_coverage(&f);
    sort_by_name(&f);

    config c = read_config(&f, check_version(&f));
    finder s = {.file = &f};
    s.offsets = need(calloc(5 + 12 * c.sizes[N_LAYER], sizeof *s.offsets));
    find_weights(&s, &c);
    vocabulary v = find_vocabulary(&s, &c);
    check_surplus(&s);

    weight_file w = {
        .path = path,
        .map = f.map,
        .size = f.size,
        .offsets = s.offsets,
        .config = kernel_config(&c),
        .vocabulary = v,
        .ends = mark_ends(path, &c),
        .start = start_tokens(&c),
        .choices = c.choices,
    };
    free_config(&c);
    free(f.tensors);
    free(copy);
    return w;
}

static void close_weights(weight_file *w) {
    munmap((void *)w->map, w->size);
    free(w->offsets);
    free(w->ends);
    free(w->start.ids);
}

/* The names of the instruction sets that can be used here, for an error message. */
static line usable_isas(void) {
    static const char *const names[] = {"avx512", "avx2", "neon", "portable"};
    line text = format("%s", "");

    for (int i = 0; i < 4; i++) {
        if (!tg_isa_name(names[i])) continue;
        text = format("%s%s%s", text.text, *text.text ? " or " : "", names[i]);
    }
    return text;
}

static tg_model *new_model(const weight_file *w, int threads) {
    if (!tg_isa_name(NULL)) {
        const char *wanted = getenv("TINYGPT2_ISA");
        line found = quote(slice_of(wanted ? wanted : ""));
        fail(WRONG_USAGE, "TINYGPT2_ISA: expected %s, found %s", usable_isas().text, found.text);
    }
    return need(tg_model_new(&w->config, w->map, w->offsets, NULL, threads));
}

/* ---- 10. The command line ---------------------------------------------------------------------*/

typedef struct {
    const char *model;
    slice ids; /* token ids in decimal, separated by blanks or commas */
    bool text; /* print text, not ids */
    uint64_t seed;
    int threads; /* 0: the default */
    chosen choices;
} settings;

static const char help[] =
    "usage: tinygpt2 --model FILE.tg2 --ids IDS [options]\n"
    "\n"
    "GPT-2 without Python: prints the tokens that follow a prompt of token ids.\n"
    "\n"
    "  --model FILE            a .tg2 file\n"
    "  --ids IDS               the prompt as token ids: \"15496 995\"; - reads standard input\n"
    "  --text                  print the text of the new tokens, not their ids\n"
    "  --max-tokens N          tokens to generate at most (default: the model's own, or 200)\n"
    "  --temperature N         0 always takes the most probable token"
    " (default: the model's own, or 0.8)\n"
    "  --top-k N               choose among the k most probable tokens; 0: all"
    " (default: the model's own, or 40)\n"
    "  --top-p N               choose among the fewest that hold this much probability"
    " (default: the model's own, or 1.0)\n"
    "  --min-p N               leave out tokens below this fraction of the best one"
    " (default: the model's own, or 0.0)\n"
    "  --repetition-penalty N  above 1 avoids what was said"
    " (default: the model's own, or 1.0)\n"
    "  --seed N                the same seed gives the same text (default: a fresh one)\n"
    "  --threads N             processors to use (default: all, or $TINYGPT2_THREADS)\n"
    "  --help, --version       print this, or the version, and exit\n"
    "\n"
    "TINYGPT2_ISA names the instruction set: avx512, avx2, neon or portable.\n"
    "Exit codes: 0 done, 1 failed, 2 wrong usage, 130 stopped by Ctrl-C.\n";

_Noreturn static void bad_option(const char *name, const char *expected, const char *value) {
    fail(WRONG_USAGE, "%s: expected %s, found %s", name, expected, quote(slice_of(value)).text);
}

/* A seed: any whole number, modulo 2^64. */
static uint64_t seed_option(const char *name, const char *value) {
    int64_t checked;
    uint64_t seed = 0;

    if (!parse_whole(slice_of(value), &checked)) bad_option(name, "a whole number", value);
    for (const char *p = value; *p; p++) {
        if (*p >= '0' && *p <= '9') seed = seed * 10 + (uint64_t)(*p - '0');
    }
    return *value == '-' ? 0 - seed : seed;
}

/* The number of threads. */
static int threads_option(const char *name, const char *value) {
    int64_t count;

    if (!parse_whole(slice_of(value), &count) || count < 1 || count > MAX_THREADS) {
        bad_option(name, "a number from 1 to 256", value);
    }
    return (int)count;
}

/* The options that have a value, in the order of the table, after those above. */
enum { MODEL = N_CHOICES, IDS, SEED, THREADS, N_OPTIONS };

static const char *const option_names[N_OPTIONS] = {
    [MAX_TOKENS] = "--max-tokens",
    [TEMPERATURE] = "--temperature",
    [TOP_K] = "--top-k",
    [TOP_P] = "--top-p",
    [MIN_P] = "--min-p",
    [REPETITION_PENALTY] = "--repetition-penalty",
    [MAX_LENGTH] = NULL,
    [MODEL] = "--model",
    [IDS] = "--ids",
    [SEED] = "--seed",
    [THREADS] = "--threads",
};

/* Where a name is in the table; N_OPTIONS if it is not. */
static int find_option(const char *name) {
    int which = 0;

    for (; which < N_OPTIONS; which++) {
        if (option_names[which] && !strcmp(name, option_names[which])) break;
    }
    return which;
}

/* Set an option. A wrong value ends the program. */
static void set_option(settings *s, int which, const char *value) {
    const char *name = option_names[which];

    switch (which) {
        case MODEL:
            s->model = value;
            break;
        case IDS:
            s->ids = slice_of(value);
            break;
        case SEED:
            s->seed = seed_option(name, value);
            break;
        case THREADS:
            s->threads = threads_option(name, value);
            break;
        default:
            if (set_choice(&s->choices, which, slice_of(value))) break;
            bad_option(name, choices[which].expected, value);
    }
}

/* Write what is printed, and exit if that fails. A reader that has had enough is no error. */
static void flush_output(void) {
    if (!fflush(stdout) && !ferror(stdout)) return;
    if (errno == EPIPE) exit(0);
    fail(FAILED, "standard output: %s", strerror(errno));
}

/* Print a text and exit. */
_Noreturn static void print_and_exit(const char *text) {
    fputs(text, stdout);
    flush_output();
    exit(0);
}

/* Handle an option without a value; false if it is none. */
static bool set_flag(settings *s, const char *name) {
    if (!strcmp(name, "--help") || !strcmp(name, "-h")) print_and_exit(help);
    if (!strcmp(name, "--version")) print_and_exit(format("tinygpt2 %s\n", tg_version()).text);
    if (strcmp(name, "--text")) return false;
    s->text = true;
    return true;
}

/* Handle the option words[0]. Its value is the next word, or follows a `=`. Returns how many words
 * that were. */
static int read_option(settings *s, char **words) {
    char *equals = strchr(words[0], '=');
    const char *value = equals ? equals + 1 : words[1];
    line shown = quote(slice_of(words[0]));

    if (set_flag(s, words[0])) return 1;
    if (equals) *equals = 0;
    int which = find_option(words[0]);
    if (which == N_OPTIONS) {
        fail(WRONG_USAGE, "unrecognized argument: %s (--help lists the options)", shown.text);
    }
    if (!value || (!equals && strncmp(value, "--", 2) == 0)) {
        fail(WRONG_USAGE, "argument %s: expected one argument", words[0]);
    }
    set_option(s, which, value);
    return equals ? 1 : 2;
}

/* A seed that nobody can guess. */
static uint64_t fresh_seed(void) {
    uint32_t seed;

    if (getentropy(&seed, sizeof seed)) fail(FAILED, "no random seed: %s", strerror(errno));
    return seed;
}

static settings read_arguments(int count, char **words) {
    settings s = {.seed = fresh_seed()};

    for (int i = 1; i < count;) i += read_option(&s, words + i);
    if (!s.model) fail(WRONG_USAGE, "no model: pass --model FILE.tg2");
    if (!s.ids.text) {
        fail(WRONG_USAGE, "no prompt: pass --ids \"15496 995\", or --ids - to read standard input");
    }
    return s;
}

/* How many processors this process may use. */
static int available_processors(void) {
    long count = sysconf(_SC_NPROCESSORS_ONLN);
#ifdef CPU_COUNT
    cpu_set_t set;

    if (!sched_getaffinity(0, sizeof set, &set)) count = CPU_COUNT(&set);
#endif
    if (count < 1) return 1;
    return count < MAX_THREADS ? (int)count : MAX_THREADS;
}

/* --threads, or $TINYGPT2_THREADS, or the number of processors. */
static int count_threads(const settings *s) {
    const char *wanted = getenv("TINYGPT2_THREADS");
    uint64_t count;

    if (s->threads) return s->threads;
    if (!wanted || !*wanted) return available_processors();
    if (!parse_count(slice_of(wanted), MAX_THREADS, &count) || count < 1) {
        bad_option("TINYGPT2_THREADS", "a whole number from 1 to 256", wanted);
    }
    return (int)count;
}

/* All of standard input. */
static slice read_input(void) {
    char *text = NULL;
    size_t n = 0;

    for (;;) {
        char block[4096];
        ssize_t count = read(STDIN_FILENO, block, sizeof block);
        if (count < 0 && errno == EBADF) fail(WRONG_USAGE, "standard input is closed");
        if (count < 0) fail(FAILED, "standard input: %s", strerror(errno));
        if (count == 0) return (slice){text ? text : "", n};
        text = need(realloc(text, n + (size_t)count));
        memcpy(text + n, block, (size_t)count);
        n += (size_t)count;
    }
}

/* ---- 11. Token ids ----------------------------------------------------------------------------*/

static bool is_separator(char c) {
    return c == ' ' || c == ',' || (c >= '\t' && c <= '\r');
}

/* Take the next word from the beginning of `rest`; false if there is none. */
static bool next_word(slice *rest, slice *word) {
    size_t first = 0;

    while (first < rest->n && is_separator(rest->text[first])) first++;
    size_t end = first;
    while (end < rest->n && !is_separator(rest->text[end])) end++;
    *word = (slice){rest->text + first, end - first};
    *rest = (slice){rest->text + end, rest->n - end};
    return word->n > 0;
}

/* A text without the byte order mark that some editors write before UTF-8. */
static slice without_mark(slice text) {
    size_t n = text.n >= 3 && memcmp(text.text, "\xEF\xBB\xBF", 3) == 0 ? 3 : 0;
    return (slice){text.text + n, text.n - n};
}

/* How many whole numbers a text has; anything else in it is wrong usage. */
static size_t count_ids(slice text) {
    slice rest = text;
    slice word;
    size_t n = 0;
    int64_t value;

    for (; next_word(&rest, &word); n++) {
        if (parse_whole(word, &value)) continue;
        fail(WRONG_USAGE, "--ids: expected whole numbers, found %s", quote(text).text);
    }
    return n;
}

/* Read token ids, which must be in the vocabulary; those beyond the positions of the model are only
 * checked. Returns memory for as many tokens as a text can have, which is one more. */
static int32_t *read_prompt(slice text, const tg_config *c) {
    size_t room = (size_t)c->n_positions;
    int32_t *tokens = need(malloc((room + 1) * sizeof *tokens));
    slice rest = text;
    slice word;

    for (size_t i = 0; next_word(&rest, &word); i++) {
        int64_t id;
        if (!parse_whole(word, &id) || id < 0 || id >= c->vocab_size) {
            fail(WRONG_USAGE,
                 "token ids: expected whole numbers from 0 to %d, found %.*s at position %zu",
                 c->vocab_size - 1, (int)(word.n < 60 ? word.n : 60), word.text, i);
        }
        if (i < room) tokens[i] = (int32_t)id;
    }
    return tokens;
}

/* The prompt must not have more tokens than the model has positions. */
static void check_room(size_t n_prompt, const tg_config *c) {
    if (n_prompt <= (size_t)c->n_positions) return;
    fail(WRONG_USAGE, "context: expected at most %d tokens, the positions of the model, found %zu",
         c->n_positions, n_prompt);
}

/* ---- 12. Text that grows ----------------------------------------------------------------------*/

typedef struct {
    const weight_file *file;
    tg_model *model;
    tg_cache *cache;
    tg_pass *pass;
    tg_options options;
    int64_t most;      /* how many tokens to generate at most */
    int32_t *tokens;   /* [n_positions + 1] */
    int32_t n;         /* how many tokens there are */
    int32_t n_cached;  /* of how many the cache holds keys and values */
    int32_t *seen;     /* [n_seen]: the different tokens among them */
    int32_t n_seen;
    bool *is_seen;     /* [vocab_size] */
    bool print_text;   /* not ids */
    utf8 unfinished;   /* the character that the printed text ends inside */
} generation;

static void append_token(generation *g, int32_t token) {
    g->tokens[g->n++] = token;
    if (g->is_seen[token]) return;
    g->is_seen[token] = true;
    g->seen[g->n_seen++] = token;
}

/* Print the bytes of a token up to its last whole character; unless `print`, only remember the
 * character that it ends inside. */
static void add_text(generation *g, int32_t token, bool print) {
    const vocabulary *v = &g->file->vocabulary;

    for (uint32_t i = v->offsets[token]; i < v->offsets[token + 1]; i++) {
        char piece[8];
        size_t n = push_byte(&g->unfinished, (unsigned char)v->bytes[i], piece);
        if (print) fwrite(piece, 1, n, stdout);
    }
}

static void print_token(generation *g, int32_t token) {
    if (g->print_text) add_text(g, token, true);
    else printf("%" PRId32 " ", token);
    flush_output();
}

/* Begin with the start tokens of the model. */
static void append_start(generation *g) {
    const id_list *start = &g->file->start;

    for (size_t i = 0; i < start->n; i++) append_token(g, (int32_t)start->ids[i]);
}

/* Begin with the tokens of the prompt, or with the start tokens if there are none. */
static void begin(generation *g, size_t n_prompt) {
    for (size_t i = 0; i < n_prompt; i++) append_token(g, g->tokens[i]);
    if (n_prompt == 0) append_start(g);
    if (!g->print_text) return;
    /* The prompt may end inside a character, which has at most four bytes. */
    for (int32_t i = g->n < 4 ? 0 : g->n - 4; i < g->n; i++) add_text(g, g->tokens[i], false);
}

/* How the kernels are to choose tokens. */
static tg_options kernel_options(const chosen *c, uint64_t seed) {
    return (tg_options){
        .temperature = value_of(c, TEMPERATURE),
        .top_k = (int32_t)value_of(c, TOP_K),
        .top_p = value_of(c, TOP_P),
        .min_p = value_of(c, MIN_P),
        .repetition_penalty = value_of(c, REPETITION_PENALTY),
        .seed = seed,
    };
}

/* How many tokens the text has at first: those of the prompt, or else the start tokens. */
static size_t count_first(const weight_file *w, size_t n_prompt) {
    if (n_prompt) return n_prompt;
    if (w->start.n) return w->start.n;
    fail(WRONG_USAGE, "prompt: it is empty, and the model has no end-of-text to start from");
}

/* How many tokens to generate at most: max_new_tokens if there is one, or else up to max_length,
 * which counts the n tokens that the text has at first. */
static int64_t count_wanted(const chosen *c, size_t n) {
    int64_t limit = (int64_t)value_of(c, MAX_LENGTH);

    if (c->is_set[MAX_TOKENS] || !c->is_set[MAX_LENGTH]) return (int64_t)value_of(c, MAX_TOKENS);
    if ((int64_t)n >= limit) {
        fail(WRONG_USAGE,
             "max_length: the model's own limit is %" PRId64 " tokens, prompt included; "
             "found %zu in the prompt; pass max_new_tokens",
             limit, n);
    }
    return limit - (int64_t)n;
}

/* Check the prompt against the model, and make all that generating needs. */
static generation new_generation(const weight_file *w, const settings *o, slice ids,
                                 size_t n_prompt) {
    size_t vocab_size = (size_t)w->config.vocab_size;
    generation g = {.file = w, .print_text = o->text};
    chosen c = o->choices;

    add_choices(&c, &w->choices);
    g.options = kernel_options(&c, o->seed);

    if (o->text && !w->vocabulary.offsets) {
        fail_for_file(WRONG_USAGE, w->path, "no tokenizer inside: leave out --text to print ids");
    }
    g.tokens = read_prompt(ids, &w->config);
    g.most = count_wanted(&c, count_first(w, n_prompt));
    check_room(n_prompt, &w->config);
    g.seen = need(malloc(vocab_size * sizeof *g.seen));
    g.is_seen = need(calloc(vocab_size, sizeof *g.is_seen));
    begin(&g, n_prompt);
    g.model = new_model(w, count_threads(o));
    g.cache = need(tg_cache_new(g.model));
    g.pass = need(tg_pass_new(g.model));
    return g;
}

static void free_generation(generation *g) {
    tg_pass_free(g->pass);
    tg_cache_free(g->cache);
    tg_model_free(g->model);
    free(g->is_seen);
    free(g->seen);
    free(g->tokens);
}

static void check_status(const generation *g, int status) {
    if (status == TG_DONE) return;
    if (status != TG_NOT_FINITE) fail(FAILED, "kernels: refused with status %d", status);
    line what = format("NaN or infinite logits by position %" PRId32, g->n_cached - 1);
    line why = format("%s: the weights are damaged or out of float32's range", what.text);
    fail_for_file(FAILED, g->file->path, why.text);
}

/* Compute the next tokens that the cache lacks, as many as one pass takes. The logits after the
 * last one are wanted if it is the text's. */
static void compute_chunk(generation *g) {
    int32_t left = g->n - g->n_cached;
    int32_t n = left < tg_chunk(g->model) ? left : tg_chunk(g->model);
    tg_span span = {
        .cache = g->cache,
        .tokens = g->tokens + g->n_cached,
        .n = n,
        .start = g->n_cached,
        .wanted = n == left,
    };
    int status = tg_forward(g->pass, &span, 1);

    while (status == TG_MORE) status = tg_forward(g->pass, NULL, 0);
    g->n_cached += n;
    check_status(g, status);
}

/* Compute the tokens that the cache lacks, and choose the one that follows. */
static int32_t choose_next(generation *g) {
    const float *logits;
    int32_t token;

    while (g->n_cached < g->n) compute_chunk(g);
    check_status(g, tg_logits(g->pass, 0, &logits));
    g->options.position = g->n;
    g->options.seen = g->seen;
    g->options.n_seen = g->n_seen;
    check_status(g, tg_choose(g->pass, logits, &g->options, &token));
    return token;
}

/* Whether the last token is the one that the last position predicted. */
static bool is_full(const generation *g) {
    return g->n > g->file->config.n_positions;
}

/* Print new tokens, as many as are wanted, until one ends the text or all positions are used.
 * Returns how many. */
static int64_t generate(generation *g) {
    int64_t count = 0;

    while (count < g->most && !is_full(g)) {
        int32_t token = choose_next(g);
        if (g->file->ends[token]) break;
        append_token(g, token);
        print_token(g, token);
        count++;
    }
    return count;
}

/* End the output: a character that never ends is not UTF-8. */
static void finish(const generation *g, int64_t count) {
    if (count && g->unfinished.held) fputs(REPLACEMENT, stdout);
    putchar('\n');
    flush_output();
    if (count == g->most || !is_full(g)) return;
    fprintf(stderr, "tinygpt2: stopped: all %d positions of the context are used\n",
            g->file->config.n_positions);
}

/* Ctrl-C. What was printed has been written. */
static void interrupted(int signal) {
    (void)signal;
    _exit(INTERRUPTED);
}

/* Ctrl-C ends the program, unless it was started to ignore it. A closed pipe is an error to see
 * when writing. */
static void prepare_signals(void) {
    struct sigaction action = {.sa_handler = interrupted};
    struct sigaction old;

    signal(SIGPIPE, SIG_IGN);
    if (!sigaction(SIGINT, NULL, &old) && old.sa_handler != SIG_IGN) {
        sigaction(SIGINT, &action, NULL);
    }
}

int main(int count, char **words) {
    prepare_signals();
    settings options = read_arguments(count, words);
    slice ids = without_mark(equal(options.ids, "-") ? read_input() : options.ids);
    size_t n_prompt = count_ids(ids);

    weight_file file = open_weights(options.model);
    generation g = new_generation(&file, &options, ids, n_prompt);
    finish(&g, generate(&g));
    free_generation(&g);
    close_weights(&file);
    return 0;
}
