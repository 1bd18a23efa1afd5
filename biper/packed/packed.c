/* Packed binary networks on the CPU: a small machine that runs a network's instructions, image by image.
 *
 * Weights and activations are bits (1 is +1, 0 is -1). A convolution's sum is `offset - 2 * mismatches`, where mismatches
 * are the ones of `activations ^ weights`. Activations outside of the image are 0 there; the offset is the number of terms
 * inside, and makes good what the ones of the weights outside were counted for: zero padding adds nothing. Real values are
 * float, pixels in rows, channels last. What follows a convolution (alpha, bias, batch norm, skip, activation, the next
 * one's signs) is done while its sums are in registers. Every operation rounds as torch's does.
 *
 * Bits of an activation: for each pixel ceil(channels / 8) bytes. Bits of a weight: for each tap ceil(channels of a group
 * / 8) bytes; each row of taps with zeros up to whole words of 32; words[block][word][16]: sixteen output channels side by
 * side.
 *
 * Instead of words w0, w1, w2, ... both lie in memory as w0, w0 ^ w1, w0 ^ w1 ^ w2, ...: where activations and weights so
 * written differ is the last bit of how many of the words up to there do. From three of those follows the carry of two
 * words, of which alone the ones are counted, twice: half as many counts (`pair`, in packed_instructions.h).
 *
 * AVX2 has no instruction that counts ones, but one that looks up 32 numbers of four bits at once. There weights are nibbles,
 * [block][word][byte][half of a byte][16], and a byte of activations chooses the row of DIFFERENCES in which those are looked
 * up. Neither side is XORed with the words before.
 *
 * The instructions stand in packed_instructions.h, which is compiled once for each kind of processor. */
#include <math.h>
#include <omp.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define LANES 16
#define WORD 32   /* bits */
#define TILE 4   /* pixels that are worked on together */
#define IN_PLACE 16 /* words of a window at most, if it is not gathered first */
#define GROUP 8  /* tiles whose activations are gathered before any of them is worked on */
#define INLINE static inline __attribute__((always_inline))

typedef uint32_t octet __attribute__((vector_size(32)));

/* One thread's view of the run of one image: `share` of the `shares` into which an instruction is divided. */
typedef struct {
    char *scratch;
    uint32_t *gathered; /* patches of activations */
    void *const *tensors;
    const int64_t (*values)[2];
    int64_t gathered_bytes, image, share, shares;
    int fused; /* whether batch norm's product is rounded together with its sum */
} Run;

/* The fields of a program, in their order: a header, the values, and the instructions, each a head and its own fields,
 * in rows of WIDTH numbers. Structs and what biper_fields() says are made of them; fields.py has them too, and
 * runtime.py refuses a library with others.
 * values: {-1, offset into scratch} or {number of a tensor, bytes of an image in it}; tensors: by number, -1 if absent;
 * pool: 2x2 windows follow; conv_height: before them; kinds: of pixels, by what of a window lies in the image;
 * offsets[2][kind][block][16]: see `words_seen`.
 * turns[block]: where there are any, bits are all that is wanted of a convolution, and what follows its sum has become a
 * comparison: a bit is 1 where at most so many bits differ as `offsets` says then (biper_limits makes these limits of
 * them), turned over where the lower half of `turns` says; of a window those are joined by or, and turned over where the
 * upper half says.
 * weights of a real convolution: floats [block][product][16], products in the order in which they are added up. That is
 * by channel and then by tap if channels_first; otherwise a tap's channels come one after the other. chunk: so many are
 * added up by themselves, and then the sums of these chunks.
 * The activation of x is hardtanh if clamp, or, with a slope, prelu(x - before) + after; a bit is 1 where the result is
 * at least the threshold. slope, before, after, threshold: a number for each channel. */
#define WIDTH 40
#define HEADER_FIELDS(F) F(instructions) F(values) F(scratch) F(gathered)
#define HEAD_FIELDS(F)                                                                                                   \
    F(code) F(in) F(out) F(out_bits) F(skip) F(clamp) F(gain) F(shift)                                                   \
    F(slope) F(before) F(after) F(threshold)                                                                             \
    F(height) F(width) F(channels) F(out_height) F(out_width)
#define CONV_FIELDS(F)                                                                                                   \
    F(weights) F(alpha) F(bias) F(masks) F(offsets) F(classes) F(kernel_h) F(kernel_w) F(stride_h) F(stride_w)           \
    F(pad_h) F(pad_w) F(dilation_h) F(dilation_w) F(out_channels) F(groups) F(words) F(pool) F(conv_height) F(kinds)     \
    F(turns)
#define TAIL_FIELDS(F) F(kernel) F(stride) F(pad)
#define AVERAGE_FIELDS(F) F(window) F(front) F(copies) F(out_channels)
#define REAL_FIELDS(F)                                                                                                   \
    F(weights) F(kernel_h) F(kernel_w) F(stride_h) F(stride_w) F(pad_h) F(pad_w) F(out_channels) F(channels_first)     \
    F(chunk)
#define INSTRUCTIONS(I) I(CONV, Conv) I(TAIL, Tail) I(AVERAGE, Average) I(REAL, Real)

#define MEMBER(field) int64_t field;
typedef struct { HEADER_FIELDS(MEMBER) } Header;
typedef struct { HEAD_FIELDS(MEMBER) } Head;
#define STRUCT(name, type)                                                                                               \
    typedef struct { Head head; name##_FIELDS(MEMBER) } type;                                                            \
    _Static_assert(sizeof(type) <= 8 * WIDTH, "the fields of " #name " do not fit into a row");
INSTRUCTIONS(STRUCT)
#define CODE(name, type) name,
enum { NONE, INSTRUCTIONS(CODE) };

/* What an instruction does with its result: each is compiled by itself for the sets that occur most. */
enum {
    WHOLE = 1, /* sixteen channels at a time */
    NORM = 2, SKIP = 4, CLAMP = 8, OUT = 16, BITS = 32, BIAS = 64, PRELU = 128,
    SHIFTED = 256, /* before and after the prelu */
    THRESHOLD = 512,
    LIMITS = 1024, /* bits by comparison: see turns */
    ANY = 2048 /* what the program says */
};
/* What happens to an instruction's result, and where it goes: pointers of a Head. */
typedef struct {
    const float *bias, *gain, *shift, *skip, *slope, *before, *after, *threshold;
    float *out;
    uint8_t *bits;
    int64_t channels, fused;
    int has; /* a set of the flags above */
} After;

#define PLAIN 0
#define AVX2 1
#define AVX512 2
#define NEON 3

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

static void *value(const Run *r, int64_t number) {
    if (number < 0) return NULL;
    const int64_t *v = r->values[number];
    return v[0] < 0 ? r->scratch + v[1] : (char *)r->tensors[v[0]] + r->image * v[1];
}

static void *tensor(const Run *r, int64_t number) { return number < 0 ? NULL : r->tensors[number]; }

static After after(const Run *r, const Head *h, int64_t bias, int64_t channels, int whole) {
    After a = {.bias = tensor(r, bias), .gain = tensor(r, h->gain), .shift = tensor(r, h->shift), .channels = channels};
    a.skip = value(r, h->skip), a.out = value(r, h->out), a.bits = value(r, h->out_bits), a.fused = r->fused;
    a.slope = tensor(r, h->slope), a.before = tensor(r, h->before), a.after = tensor(r, h->after);
    a.threshold = tensor(r, h->threshold);
    a.has = (whole ? WHOLE : 0) | (a.bias ? BIAS : 0) | (a.gain ? NORM : 0) | (a.skip ? SKIP : 0) |
            (h->clamp ? CLAMP : 0) | (a.slope ? PRELU : 0) | (a.before ? SHIFTED : 0) | (a.out ? OUT : 0) |
            (a.bits ? BITS : 0) | (a.threshold ? THRESHOLD : 0);
    return a;
}

/* This share's part of `count` pieces of work. */
static void own(const Run *r, int64_t count, int64_t *first, int64_t *last) {
    *first = count * r->share / r->shares;
    *last = count * (r->share + 1) / r->shares;
}

/* Copies in steps: up to COPY - 1 bytes more are read and written. */
#define COPY 32
INLINE void copy(uint8_t *to, const uint8_t *from, int64_t count) {
    int64_t i = 0;
    do memcpy(to + i, from + i, COPY);
    while ((i += COPY) < count);
}

/* One pixel after the other of a convolution's result. */
typedef struct {
    int64_t row, column, width;
} Pixel;

INLINE Pixel pixel_at(const Head *h, int64_t place) {
    int64_t row = place / h->out_width;
    return (Pixel){row, place - row * h->out_width, h->out_width};
}

INLINE void advance(Pixel *p) {
    if (++p->column < p->width) return;
    p->column = 0;
    p->row++;
}

/* How many taps of a window's axis lie nearer than `distance` to its first one. */
INLINE int64_t taps(int64_t distance, int64_t dilation) {
    return dilation == 1 ? most(0, distance) : (most(0, distance) + dilation - 1) / dilation;
}

/* Bytes of a pixel's bits. */
INLINE int64_t bytes_of(const Conv *c) { return (c->head.channels + 7) / 8; }

/* Words of a row of a window. */
INLINE int64_t row_words_of(const Conv *c) { return (c->kernel_w * ((c->head.channels / c->groups + 7) / 8) + 3) / 4; }

/* The words from `first` to `last` in which a window meets the image, or all of them. A tile whose pixels all see the same
 * rows skips the words of the others: offsets[1] is for such tiles, offsets[0] for the rest. */
typedef struct {
    int64_t first, last;
} Words;

INLINE Words words_seen(const Conv *c, int64_t row_words, int64_t y, int64_t dilation) {
    int64_t start = y * c->stride_h - c->pad_h;
    int64_t top = least(c->kernel_h, taps(-start, dilation));
    int64_t bottom = least(c->kernel_h, taps(c->head.height - start, dilation));
    return top < bottom ? (Words){top * row_words, bottom * row_words} : (Words){0, 0};
}

/* Some pixels of a convolution's result that are worked on together: `count` of them from `place` on, mixed if they see other
 * rows, and for each of them its row and column before pooling, the mask of its kind and its offset for the first output
 * channel. */
typedef struct {
    int64_t place, count, mixed, y[TILE], x[TILE];
    Words seen;
    const uint8_t *from[TILE]; /* where their windows begin, if they are read in place */
    const uint32_t *masks[TILE];
    const int32_t *offsets[TILE];
} Tile;

/* Whether a pixel's activations are whole words, and windows leave nothing out: then rows are summed up before windows
 * are cut out of them. */
INLINE int has_whole_words(const Conv *c) {
    return c->groups == 1 && c->dilation_h == 1 && c->dilation_w == 1 && c->head.channels % WORD == 0;
}

/* Words from one row of the image to the next, with a zero, and the padding on both sides. */
INLINE int64_t line_of(const Conv *c) { return 1 + (c->head.width + 2 * c->pad_w) * (c->head.channels / WORD); }

/* The rows from `first` to `last` of a padded image: of each word the parity with all before it in its row. */
static void sum_rows(const Conv *c, const uint8_t *bits, int64_t first, int64_t last, uint32_t *to) {
    int64_t pixel = c->head.channels / WORD, line = line_of(c), width = c->head.width * pixel, pad = c->pad_w * pixel;
    for (int64_t y = first; y < last; y++) {
        uint32_t *row = to + y * line, sum = 0, word;
        memset(row, 0, line * sizeof(uint32_t));
        if (y < c->pad_h || y >= c->pad_h + c->head.height) continue;
        const uint8_t *from = bits + (y - c->pad_h) * width * sizeof(word);
        row += 1 + pad;
        for (int64_t i = 0; i < width; i++) {
            memcpy(&word, from + i * sizeof(word), sizeof(word));
            row[i] = sum ^= word;
        }
        for (int64_t i = 0; i < pad; i++) row[width + i] = sum;
    }
}

/* Words from one patch to the next: copies may write a little more, and two bytes are made of each one that is looked up. */
INLINE int64_t patch_of(const Conv *c, int looked_up) {
    return ((looked_up ? 2 : 1) * c->words + COPY / 4 + 15) / 16 * 16;
}

/* The activations that group g sees around the pixel y, x of the result, tap by tap, in the order of the weights' bits;
 * bit by bit if the group begins within a byte. What lies outside of the image is left as it was: it is masked. */
static void gather_taps(const Conv *c, const uint8_t *bits, int64_t g, int64_t y, int64_t x, uint8_t *to) {
    int64_t row = sizeof(uint32_t) * row_words_of(c);
    int64_t bytes = (c->head.channels + 7) / 8, channels = c->head.channels / c->groups, tap = (channels + 7) / 8;
    int64_t y0 = y * c->stride_h - c->pad_h, last_row = least(c->kernel_h, taps(c->head.height - y0, c->dilation_h));
    int64_t x0 = x * c->stride_w - c->pad_w, last = least(c->kernel_w, taps(c->head.width - x0, c->dilation_w));
    for (int64_t i = taps(-y0, c->dilation_h); i < last_row; i++)
        for (int64_t j = taps(-x0, c->dilation_w); j < last; j++) {
            const uint8_t *from = bits + ((y0 + i * c->dilation_h) * c->head.width + x0 + j * c->dilation_w) * bytes;
            uint8_t *target = to + i * row + j * tap;
            if (g * channels % 8 == 0) { /* what follows its last channel in a byte is masked */
                copy(target, from + g * channels / 8, tap);
                continue;
            }
            memset(target, 0, tap);
            for (int64_t n = 0, k = g * channels; n < channels; n++, k++)
                target[n / 8] |= (from[k / 8] >> k % 8 & 1) << n % 8;
        }
}

/* What all tiles and blocks of a binary convolution share. classes, turns: see above; channels: of the output, of a group,
 * and lanes: of all of it, in whole blocks; patch, next: words from one patch, and from one block's weights, to the next
 * one's. */
typedef struct {
    const uint32_t *weights, *masks, *turns;
    const float *alpha;
    const int32_t *rows, *columns, *offsets;
    int64_t channels, lanes, patch, next, row_words, pool, line, pixel;
    const uint8_t *bits; /* of an image whose windows are read in place: IN_PLACE words at most, from `places` on */
    int32_t places[IN_PLACE];
} Kernel;

static Kernel kernel_of(const Run *r, const Conv *c, int in_place, int looked_up) {
    Kernel k = {.weights = tensor(r, c->weights), .masks = tensor(r, c->masks), .turns = tensor(r, c->turns)};
    k.alpha = tensor(r, c->alpha), k.offsets = tensor(r, c->offsets);
    k.rows = tensor(r, c->classes), k.columns = k.rows + c->conv_height;
    k.channels = c->out_channels / c->groups, k.lanes = c->groups * ((k.channels + LANES - 1) / LANES) * LANES;
    k.patch = patch_of(c, looked_up), k.next = c->words * (looked_up ? 2 : 1) * LANES, k.row_words = row_words_of(c), k.pool = c->pool;
    if (in_place && c->words <= IN_PLACE && c->groups == 1 && c->dilation_h == 1 && c->dilation_w == 1) {
        k.bits = value(r, c->head.in), k.pixel = bytes_of(c), k.line = c->head.width * k.pixel;
        for (int64_t i = 0; i < c->words; i++)
            k.places[i] = i / k.row_words * k.line + i % k.row_words * sizeof(uint32_t);
    }
    return k;
}

/* What a tile's pixel p sees, of the kind of its row and of its column. */
INLINE void see(const Kernel *k, const Conv *c, Tile *t, int p, int64_t kind) {
    t->masks[p] = k->masks + kind * c->words;
    t->offsets[p] = k->offsets + ((t->mixed ? 0 : c->kinds) + kind) * k->lanes;
    if (!k->bits) return;
    int64_t row = t->y[p] * c->stride_h - c->pad_h, column = t->x[p] * c->stride_w - c->pad_w;
    t->from[p] = k->bits + row * k->line + column * k->pixel;
}

/* The tile that begins with the pixel `next`, which becomes the one behind it. */
static void next_tile(const Conv *c, const Kernel *k, int64_t number, Pixel *next, Tile *t) {
    int64_t pool = k->pool, size = pool ? 1 : TILE, left = c->head.out_height * c->head.out_width - size * number;
    t->place = size * number, t->count = least(size, left), t->mixed = 0;
    int in_a_row = !pool && next->column + TILE <= next->width;
    for (int p = 0; p < TILE; p++) {
        t->y[p] = pool ? 2 * next->row + p / 2 : next->row;
        t->x[p] = pool ? 2 * next->column + p % 2 : next->column + (in_a_row ? p : 0);
        t->mixed |= k->rows[t->y[p]] ^ k->rows[t->y[0]];
        if (!in_a_row && (pool ? p == TILE - 1 : p < t->count - 1 || left >= TILE)) advance(next); /* else the last again */
    }
    if (in_a_row && (next->column += TILE) == next->width) next->column = 0, next->row++;
    t->seen = t->mixed ? (Words){0, c->words} : words_seen(c, k->row_words, t->y[0], c->dilation_h);
    for (int p = 0; p < TILE; p++) see(k, c, t, p, k->rows[t->y[p]] + k->columns[t->x[p]]);
}

/* What a real convolution sees: rows of its image with their padding, from `first` on, `line` floats each. */
typedef struct {
    int64_t first, line;
    const float *rows;
} Padded;

/* Rows and columns of an image in which a window lies. */
typedef struct {
    int64_t top, bottom, left, right;
} Window;

/* The padded rows that windows at output rows `top` to `bottom`, and those between, see: where they lie, or copied. */
static Padded pad_rows(const Real *c, const float *in, int64_t top, int64_t bottom, float *to) {
    const Head *h = &c->head;
    int64_t own = h->width * h->channels, before = c->pad_w * h->channels;
    Padded p = {top * c->stride_h, own + 2 * before, to};
    if (!c->pad_h && !c->pad_w) return (Padded){p.first, own, in + p.first * own};
    for (int64_t y = p.first; y < bottom * c->stride_h + c->kernel_h; y++, to += p.line) {
        memset(to, 0, p.line * sizeof(float));
        int64_t row = y - c->pad_h;
        if (row >= 0 && row < h->height) memcpy(to + before, in + row * own, own * sizeof(float));
    }
    return p;
}

/* Where the products of a window's sum find their activations, counted from the window's first one, in their order. */
static void order_activations(const Real *c, int64_t line, int32_t *to) {
    int64_t area = c->kernel_h * c->kernel_w, channels = c->head.channels;
    for (int64_t tap = 0; tap < area; tap++)
        for (int64_t n = 0; n < channels; n++)
            to[c->channels_first ? n * area + tap : tap * channels + n] =
                tap / c->kernel_w * line + tap % c->kernel_w * channels + n;
}

#define NAME(x) x##_plain
#define TARGET
#define PATH PLAIN
#include "packed_instructions.h"
#undef NAME
#undef TARGET
#undef PATH

#if defined(__x86_64__)
/* DIFFERENCES[a][w]: in how many bits nibble w differs from the lower half of byte a; [a][16 + w]: from its upper half. */
#define BITS_OF(a, w) __builtin_popcount((a) ^ (w))
#define FOUR(a, w) BITS_OF(a, w), BITS_OF(a, w + 1), BITS_OF(a, w + 2), BITS_OF(a, w + 3)
#define ALL(a) FOUR(a, 0), FOUR(a, 4), FOUR(a, 8), FOUR(a, 12)
#define ROW(a) {ALL((a) % 16), ALL((a) / 16)}
#define ROWS(a) ROW(a), ROW(a + 1), ROW(a + 2), ROW(a + 3), ROW(a + 4), ROW(a + 5), ROW(a + 6), ROW(a + 7)
#define EIGHT(a) ROWS(a), ROWS(a + 8), ROWS(a + 16), ROWS(a + 24), ROWS(a + 32), ROWS(a + 40), ROWS(a + 48), ROWS(a + 56)
static const _Alignas(32) uint8_t DIFFERENCES[256][32] = {EIGHT(0), EIGHT(64), EIGHT(128), EIGHT(192)};

#define NAME(x) x##_avx2
#define TARGET __attribute__((target("avx2,fma,popcnt")))
#define PATH AVX2
#include "packed_instructions.h"
#undef NAME
#undef TARGET
#undef PATH

#define NAME(x) x##_avx512
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vpopcntdq,avx2,fma,popcnt")))
#define PATH AVX512
#include "packed_instructions.h"
#undef NAME
#undef TARGET
#undef PATH
#elif defined(__aarch64__)
#define NAME(x) x##_neon
#define TARGET
#define PATH NEON
#include "packed_instructions.h"
#undef NAME
#undef TARGET
#undef PATH
#endif

/* The fields of the programs that this library reads, a line for each kind of them. */
#define NAMED(field) " " #field
#define LINE(name, type) "\n" #name name##_FIELDS(NAMED)
#define TEXT(number) #number
#define NUMBER(number) TEXT(number)
const char *biper_fields(void) {
    return "WIDTH " NUMBER(WIDTH) " TILE " NUMBER(TILE) " GROUP " NUMBER(GROUP) " LANES " NUMBER(LANES)
           " WORD " NUMBER(WORD) " COPY " NUMBER(COPY) " LOOKED_UP avx2" LINE(HEADER, Header) LINE(HEAD, Head) INSTRUCTIONS(LINE);
}

/* Whether this processor can take a path. */
int biper_supports(int path) {
    switch (path) {
    case PLAIN: return 1;
#if defined(__x86_64__)
    case AVX2: return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    case AVX512:
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
               __builtin_cpu_supports("avx512vpopcntdq") && __builtin_cpu_supports("fma");
#elif defined(__aarch64__)
    case NEON: return 1;
#endif
    default: return 0;
    }
}

/* The offsets of a convolution's instruction, int32 [2][kind][block][16]. masks, terms, rows: as Border in bits.py. Where
 * nibbles are looked up there is no parity of skipped words to begin with. */
void biper_offsets(const int64_t *instruction, const uint32_t *weights, const uint32_t *masks, const int32_t *terms,
                   const int32_t *rows, int looked_up, int32_t *offsets) {
    const Conv *c = (const Conv *)instruction;
    int64_t blocks = c->groups * ((c->out_channels / c->groups + LANES - 1) / LANES), words = c->words;
    for (int64_t kind = 0; kind < 2 * c->kinds; kind++) {
        int64_t own = kind % c->kinds;
        Words seen = kind < c->kinds ? (Words){0, words} : words_seen(c, row_words_of(c), rows[own], c->dilation_h);
        for (int64_t n = 0; n < blocks * LANES; n++) {
            const uint32_t *w = weights + n / LANES * words * LANES + n % LANES, *mask = masks + own * words;
            uint32_t before = seen.first ? w[(seen.first - 1) * LANES] : 0;
            int32_t outside = looked_up ? 0 : __builtin_popcount(before);
            for (int64_t i = seen.first; i < seen.last; before = w[i++ * LANES])
                outside += __builtin_popcount((w[i * LANES] ^ before) & ~mask[i]);
            *offsets++ = terms[own] + 2 * outside;
        }
    }
}

/* What follows a convolution's sum where bits alone are wanted; pointers may be NULL. */
typedef struct {
    const float *alpha, *bias, *gain, *shift, *threshold;
    int64_t clamp, fused;
} Signs;

/* The bit of output channel n whose sum, or the maximum of whose sums, is that. */
static int bit_of(const Signs *s, int64_t n, int64_t sum) {
    float x = (float)sum * s->alpha[n];
    if (s->bias) x += s->bias[n];
    if (s->gain) x = s->fused ? fmaf(x, s->gain[n], s->shift[n]) : x * s->gain[n] + s->shift[n];
    if (s->clamp) x = x > 1 ? 1 : x < -1 ? -1 : x;
    return x >= (s->threshold ? s->threshold[n] : 0);
}

/* Make limits of a convolution's offsets, in place, and its turns. Each step from a sum to its bit is monotone, rounding
 * too, so a sum from which on the bit is another one is all there is to know; bisection finds it. */
void biper_limits(const int64_t *instruction, const float *alpha, const float *bias, const float *gain,
                  const float *shift, const float *threshold, int fused, int32_t *offsets, uint32_t *turns) {
    const Conv *c = (const Conv *)instruction;
    const Signs s = {alpha, bias, gain, shift, threshold, c->head.clamp, fused};
    int64_t channels = c->out_channels / c->groups, blocks = (channels + LANES - 1) / LANES, all = c->groups * blocks;
    int64_t most_of = c->head.channels / c->groups * c->kernel_h * c->kernel_w;
    memset(turns, 0, all * sizeof(*turns));
    for (int64_t lane = 0; lane < all * LANES; lane++) {
        int64_t block = lane / LANES, within = block % blocks * LANES + lane % LANES, n = block / blocks * channels + within;
        if (within >= channels) continue;
        int first = bit_of(&s, n, -most_of), falls = first && !bit_of(&s, n, most_of);
        int64_t low = -most_of, high = most_of + 1; /* the bit is `first` at low, and another one at high */
        if (first && !falls) high = low;
        while (high - low > 1) {
            int64_t middle = low + (high - low) / 2;
            *(bit_of(&s, n, middle) == first ? &low : &high) = middle;
        }
        for (int64_t kind = 0; kind < 2 * c->kinds; kind++) { /* offset - 2 * mismatches >= high */
            int32_t *offset = offsets + kind * all * LANES + lane;
            *offset = (*offset - high) >> 1;
        }
        int all_of = falls ^ (alpha[n] < 0); /* the bit of the maximum is 1 where all are, not where any is */
        turns[block] |= (uint32_t)(falls ^ all_of) << lane % LANES | (uint32_t)all_of << (LANES + lane % LANES);
    }
}

/* A program that runs: its instructions, and what every thread's Run begins with. */
typedef struct {
    const Header *header;
    const int64_t *rows;
    Run run;
    int64_t images;
    int path;
} Job;

static const Head *instruction_of(const Job *job, int64_t number) { return (const Head *)(job->rows + WIDTH * number); }

/* Run an instruction, or a share of it, for the image that r says. */
static void step(const Job *job, const Run *r, int64_t number) {
    const Head *instruction = instruction_of(job, number);
    switch (job->path) {
#if defined(__x86_64__)
    case AVX512: step_avx512(r, instruction); break;
    case AVX2: step_avx2(r, instruction); break;
#elif defined(__aarch64__)
    case NEON: step_neon(r, instruction); break;
#endif
    default: step_plain(r, instruction);
    }
}

/* Into how many shares an instruction is worth dividing, at most four a thread: a share takes some microseconds. */
#ifndef WORTH
#define WORTH 4096 /* sixteen channels of a pixel's result, or of a word of a convolution's bits */
#endif
static int64_t shares_of(const Head *h, int64_t threads) {
    const Conv *c = (const Conv *)h;
    const Real *real = (const Real *)h;
    int64_t channels = h->code == CONV ? c->out_channels : h->code == REAL ? real->out_channels : h->channels;
    int64_t work = h->out_height * h->out_width * ((channels + LANES - 1) / LANES);
    if (h->code == CONV) work *= (c->words + 1) / 2 * (c->pool ? 4 : 1);
    if (h->code == REAL) work *= h->channels * real->kernel_h * real->kernel_w / 2;
    return most(1, least(4 * threads, work / WORTH));
}

/* What threads know of each other that work on one image. They claim shares of the instruction that is under way, and
 * none waits for one that has not begun: where another process has its core, the others do its work. */
typedef struct {
    _Alignas(64) _Atomic uint64_t claim; /* which instruction of which image, counted from 1, and its next share */
    _Alignas(64) _Atomic int64_t done;   /* its shares that are finished */
} Board;
#define SHARE_BITS 16
#define OVER (UINT64_MAX >> SHARE_BITS)

/* A moment for somebody else: at first of this core, which may be of one with another thread, then of the system. */
static void give_way(int64_t turn) {
    if (turn % 1024 == 1023) sched_yield();
#if defined(__x86_64__)
    else _mm_pause();
#endif
}

/* Claim one share of what is under way, and run it. 0 if there was none left. */
static int take_share(const Job *job, Board *board, const int64_t *shares, Run *r) {
    uint64_t claim = atomic_fetch_add_explicit(&board->claim, 1, memory_order_acq_rel);
    uint64_t turn = claim >> SHARE_BITS, share = claim & ((1 << SHARE_BITS) - 1);
    if (turn == OVER) return 0;
    int64_t number = (turn - 1) % job->header->instructions;
    if ((int64_t)share >= shares[number]) return 0;
    r->image = (turn - 1) / job->header->instructions, r->share = share, r->shares = shares[number];
    step(job, r, number);
    atomic_fetch_add_explicit(&board->done, 1, memory_order_release);
    return 1;
}

/* One instruction after the other, image by image. */
static void lead(const Job *job, Board *board, const int64_t *shares, Run *r) {
    int64_t count = job->header->instructions;
    for (int64_t turn = 0; turn < job->images * count; turn++) {
        int64_t number = turn % count;
        if (shares[number] == 1) {
            r->image = turn / count, r->share = 0, r->shares = 1;
            step(job, r, number);
            continue;
        }
        atomic_store_explicit(&board->done, 0, memory_order_relaxed);
        atomic_store_explicit(&board->claim, (uint64_t)(turn + 1) << SHARE_BITS, memory_order_release);
        while (take_share(job, board, shares, r));
        for (int64_t i = 0; atomic_load_explicit(&board->done, memory_order_acquire) < shares[number]; i++) give_way(i);
    }
    atomic_store_explicit(&board->claim, OVER << SHARE_BITS, memory_order_release);
}

/* Shares of whatever is under way, until nothing is. */
static void help(const Job *job, Board *board, const int64_t *shares, Run *r) {
    for (int64_t i = 0;; i++) {
        uint64_t claim = atomic_load_explicit(&board->claim, memory_order_acquire), turn = claim >> SHARE_BITS;
        if (turn == OVER) return;
        int64_t share = claim & ((1 << SHARE_BITS) - 1);
        if (turn && share < shares[(turn - 1) % job->header->instructions] && take_share(job, board, shares, r))
            i = 0;
        else
            give_way(i);
    }
}

static double seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec + 1e-9 * now.tv_nsec;
}

/* A thread whose core another process has comes late, and the run ends with the last thread. After such a run the next
 * ones go without help, twice as many each time, up to MOST. */
#define MOST 64
static _Atomic int64_t alone, late;

static int64_t helpers(int64_t threads) {
    if (atomic_load(&alone) <= 0) return threads - 1;
    atomic_fetch_sub(&alone, 1);
    return 0;
}

static void note_wait(double worked, double waited) {
    int64_t more = waited > 3e-5 && waited > worked / 4 ? least(MOST, 2 * atomic_load(&late) + 1) : 0;
    atomic_store(&late, more);
    atomic_store(&alone, more);
}

/* Fewer images than threads: all work on one, if it has enough shares that another thread, which takes some tens of
 * microseconds to start, still finds work. 0, or -1 if there is no memory. */
#ifndef ENOUGH_SHARES
#define ENOUGH_SHARES 16
#endif
static int run_together(const Job *job, int64_t threads) {
    int64_t count = job->header->instructions, gathered_bytes = job->run.gathered_bytes, divided = 0;
    int64_t *shares = malloc(count * sizeof(int64_t));
    char *memory = aligned_alloc(64, job->header->scratch + threads * gathered_bytes);
    double begun = seconds(), finished = begun;
    Board board = {0};
    if (shares && memory) {
        for (int64_t i = 0; i < count; i++) {
            shares[i] = shares_of(instruction_of(job, i), threads);
            if (shares[i] > 1) divided += shares_of(instruction_of(job, i), ENOUGH_SHARES);
        }
        threads = divided >= ENOUGH_SHARES ? 1 + helpers(threads) : 1;
        if (threads == 1)
            for (int64_t i = 0; i < count; i++) shares[i] = 1;
#pragma omp parallel num_threads(threads) if (threads > 1)
        {
            Run r = job->run;
            int64_t me = omp_get_thread_num();
            r.scratch = memory;
            r.gathered = (uint32_t *)(memory + job->header->scratch + me * gathered_bytes);
            if (me) {
                help(job, &board, shares, &r);
            } else {
                lead(job, &board, shares, &r);
                finished = seconds();
            }
        }
        if (threads > 1) note_wait(finished - begun, seconds() - finished);
    }
    int failed = shares && memory ? 0 : -1;
    free(memory);
    free(shares);
    return failed;
}

/* At least as many images as threads, which take whole ones. 0, or -1 if there is no memory. */
static int run_apart(const Job *job, int64_t threads) {
    int failed = 0;
#pragma omp parallel num_threads(threads)
    {
        Run r = job->run;
        r.scratch = aligned_alloc(64, job->header->scratch), r.gathered = aligned_alloc(64, r.gathered_bytes);
        if (!r.scratch || !r.gathered) {
#pragma omp atomic write
            failed = -1;
        }
#pragma omp barrier
        if (!failed) {
#pragma omp for schedule(dynamic)
            for (int64_t image = 0; image < job->images; image++) {
                r.image = image;
                for (int64_t i = 0; i < job->header->instructions; i++) step(job, &r, i);
            }
        }
        free(r.gathered);
        free(r.scratch);
    }
    return failed;
}

/* Run a program on images: see its fields. Threads take whole images, or share one where there are fewer images than
 * threads. 0, or -1 if there is no memory. */
int biper_run(const int64_t *program, void *const *tensors, int64_t images, int64_t threads, int path, int fused) {
    const Header *header = (const Header *)program;
    const int64_t(*values)[2] = (const int64_t(*)[2])(header + 1);
    Run run = {NULL, NULL, tensors, values, header->gathered, 0, 0, 1, fused};
    Job job = {header, (const int64_t *)(values + header->values), run, images, path};
    return images < threads ? run_together(&job, threads) : run_apart(&job, threads);
}
