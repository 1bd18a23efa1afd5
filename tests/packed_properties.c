/* The packed networks' instructions on random cases, against sums and maxima that are taken one by one.
 *
 * Arguments: how many cases, the first one's seed; `1 SEED` repeats a case that was printed. Buffers are as long as
 * program.py makes them and no longer, so that AddressSanitizer sees each byte too far; all of them begin as noise. */
#include "../biper/native/packed.c"

#include <stdio.h>

#define WORK 300000 /* products of a case, at most */

/* Numbers of the tensors; the first ones are the values too. */
enum { IN, SIGNS, ADDED, RESULT, RESULT_BITS, VALUES, GAIN = VALUES, SHIFT, WEIGHTS, ALPHA, MASKS, TERMS, KINDS, TENSORS };

typedef union {
    Head head;
    Conv conv;
    Tail tail;
    Average average;
    int64_t numbers[WIDTH];
} Instruction;

typedef struct {
    Instruction own, signs; /* signs: what makes the activations' bits in scratch, if its code is not 0 */
    int64_t images, threads, fused, channels, places, columns; /* the result's channels and pixels; before the pooling */
    int64_t bytes[VALUES], offset, scratch;                    /* bytes of an image; offset: of the bits in scratch */
    void *tensors[TENSORS], *expected[2];                      /* expected: floats, bits */
} Case;

static uint64_t noise;
static void *owned[32];
static int owners;

static int64_t between(int64_t low, int64_t high) {
    noise ^= noise << 13;
    noise ^= noise >> 7;
    noise ^= noise << 17;
    return low + (int64_t)((noise >> 8) % (uint64_t)(high - low + 1));
}

static int chance(int64_t of) { return between(1, of) == 1; }
static int64_t up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }
static int within(int64_t n, int64_t size) { return n >= 0 && n < size; }

static void *room(int64_t bytes) {
    uint8_t *result = owned[owners++] = malloc(bytes);
    for (int64_t i = 0; i < bytes; i++) result[i] = between(0, 255);
    return result;
}

/* odd: whether to mix in zeros, infinities and what is no number; none of the others is 0. */
static float *numbers(int64_t count, int odd) {
    float *result = room(4 * count), odds[] = {0, -0.0f, INFINITY, -INFINITY, NAN};
    for (int64_t i = 0; i < count; i++)
        result[i] = odd && chance(50) ? odds[between(0, 4)] : (between(0, 1 << 22) - (1 << 21) + 0.5f) / (1 << 20);
    return result;
}

/* A number of channels up to `limit`; often full bytes, lanes or words. */
static int64_t some(int64_t limit) {
    int64_t step = (int64_t[]){1, 1, 8, 16, 64}[between(0, 4)];
    return step > limit ? between(1, limit) : step * between(1, limit / step);
}

static int64_t output_size(int64_t kernel, int64_t stride, int64_t pad, int64_t size) {
    return size + 2 * pad < kernel ? 0 : (size + 2 * pad - kernel) / stride + 1;
}

static void draw_conv(Case *k) {
    static const int64_t kernels[] = {1, 2, 3, 5};
    Conv *c = &k->own.conv;
    Head *h = &c->head;
    do {
        c->groups = chance(2) ? 1 : between(2, 4), c->pool = chance(3);
        h->channels = c->groups * some(130 / c->groups), k->channels = c->groups * some(66 / c->groups);
        h->height = between(1, 9), c->kernel_h = kernels[between(0, 3)];
        h->width = between(1, 9), c->kernel_w = kernels[between(0, 3)];
        c->stride_h = between(1, 3), c->pad_h = between(0, 2);
        c->stride_w = between(1, 3), c->pad_w = between(0, 2);
        c->conv_height = output_size(c->kernel_h, c->stride_h, c->pad_h, h->height);
        k->columns = output_size(c->kernel_w, c->stride_w, c->pad_w, h->width);
        h->out_height = c->conv_height >> c->pool, h->out_width = k->columns >> c->pool;
        k->places = h->out_height * h->out_width;
    } while (!k->places || k->images * k->places * c->kernel_h * c->kernel_w * h->channels * k->channels > WORK);
    c->words = up(up(h->channels / c->groups, 8) * c->kernel_h * c->kernel_w, 64) / 64;
    c->out_channels = k->channels;
    h->code = CONV, h->in = SIGNS;
}

static void draw_other(Case *k) {
    Head *h = &k->own.head;
    Tail *t = &k->own.tail;
    int64_t window = between(1, 3), cut = between(0, window - 1); /* whether windows are cut off at the end */
    k->channels = h->channels = some(130);
    h->height = between(window, 9), h->width = between(window, 9), h->in = IN, h->code = TAIL;
    if (chance(3)) {
        int64_t front = between(0, 40), back = between(0, 40);
        k->channels += front + back, h->code = AVERAGE;
        k->own.average = (Average){*h, window, front, k->channels};
        h->out_height = (h->height + cut) / window, h->out_width = (h->width + cut) / window;
    } else {
        t->kernel = window, t->stride = between(1, window), t->pad = between(0, window / 2);
        h->out_height = output_size(window, t->stride, t->pad, h->height);
        h->out_width = output_size(window, t->stride, t->pad, h->width);
    }
    k->places = h->out_height * h->out_width;
}

/* Which taps of the window at a place of an axis lie in the image. */
static uint64_t taps(int64_t place, int64_t kernel, int64_t stride, int64_t pad, int64_t size) {
    uint64_t result = 0;
    for (int64_t i = 0; i < kernel; i++) result |= (uint64_t)within(place * stride - pad + i, size) << i;
    return result;
}

static void tables(Case *k) {
    Conv *c = &k->own.conv;
    int64_t channels = c->head.channels / c->groups, count = c->conv_height * k->columns;
    uint64_t *masks = k->tensors[MASKS] = room(count * c->words * 8), rows[99], columns[99];
    int32_t *terms = k->tensors[TERMS] = room(count * 4);
    int32_t *kinds = k->tensors[KINDS] = room((c->conv_height + k->columns) * 4), *right = kinds + c->conv_height;
    memset(masks, 0, count * c->words * 8);
    c->inside = -1;
    for (int64_t place = 0; place < count; place++) { /* each has a mask, but places that are alike share the first's */
        int64_t y = place / k->columns, x = place % k->columns, full = 0;
        rows[y] = taps(y, c->kernel_h, c->stride_h, c->pad_h, c->head.height);
        columns[x] = taps(x, c->kernel_w, c->stride_w, c->pad_w, c->head.width);
        for (kinds[y] = 0; rows[kinds[y] / k->columns] != rows[y];) kinds[y] += k->columns;
        for (right[x] = 0; columns[right[x]] != columns[x];) right[x]++;
        for (int64_t i = 0; i < c->kernel_h * c->kernel_w * channels; i++) {
            int64_t tap = i / channels, bit = place * c->words * 64 + tap * up(channels, 8) + i % channels;
            if (rows[y] >> tap / c->kernel_w & columns[x] >> tap % c->kernel_w & 1) masks[bit / 64] |= 1ull << bit % 64;
        }
        terms[place] = channels * __builtin_popcountll(rows[y]) * __builtin_popcountll(columns[x]);
        for (int64_t i = 0; i < c->words; i++) full += masks[place * c->words + i] == ~0ull;
        if (full == c->words && c->inside < 0) c->inside = place;
    }
}

/* The activations' bits with the slack of Program.conv, or their place in scratch, at one end of it. */
static void place_signs(Case *k) {
    const Head *h = &k->own.head;
    int64_t bytes = up(h->channels, 8) / 8, size = h->height * h->width * bytes, slack = k->own.conv.pad_w * bytes + 32;
    const float *in = k->tensors[IN];
    k->bytes[SIGNS] = size;
    if (chance(2)) {
        k->scratch = up(size + 2 * slack, 64);
        k->offset = chance(2) ? slack : k->scratch - slack - size;
        k->signs.tail = (Tail){{TAIL, IN, -1, SIGNS, -1, 0, -1, -1, h->height, h->width, h->channels, h->height, h->width},
                               1, 1, 0};
        return;
    }
    uint8_t *signs = room(k->images * size + 2 * slack); /* noise stays behind a pixel's last channel too */
    k->tensors[SIGNS] = signs += slack;
    for (int64_t i = 0; i < k->images * h->height * h->width * h->channels; i++) {
        uint8_t *byte = signs + i / h->channels * bytes + i % h->channels / 8, bit = 1 << i % h->channels % 8;
        *byte = in[i] >= 0 ? *byte | bit : *byte & ~bit;
    }
}

static void draw_case(Case *k) {
    Conv *c = &k->own.conv;
    Head *h = &k->own.head;
    *k = (Case){.images = between(1, 5), .threads = between(1, 4), .fused = chance(2), .scratch = 64};
    (chance(3) ? draw_other : draw_conv)(k);
    int free = h->code != AVERAGE, bits = h->code != CONV || c->groups == 1 || k->channels / c->groups % 8 == 0;
    h->clamp = free && !chance(4);
    h->out_bits = free && bits && chance(2) ? RESULT_BITS : -1;
    h->out = h->out_bits < 0 || chance(2) ? RESULT : -1;
    h->skip = free && (h->code == CONV || k->own.tail.kernel == 1) && chance(2) ? ADDED : -1;
    h->gain = free && !chance(4) ? GAIN : -1, h->shift = h->gain < 0 ? -1 : SHIFT;
    int64_t pixels = k->images * h->height * h->width, results = k->images * k->places;
    k->bytes[IN] = 4 * h->height * h->width * h->channels, k->tensors[IN] = numbers(pixels * h->channels, 1);
    k->bytes[ADDED] = k->bytes[RESULT] = 4 * k->places * k->channels;
    k->bytes[RESULT_BITS] = k->places * (up(k->channels, 8) / 8);
    if (h->skip >= 0) k->tensors[ADDED] = numbers(results * k->channels, 1);
    if (h->gain >= 0) k->tensors[GAIN] = numbers(k->channels, 0), k->tensors[SHIFT] = numbers(k->channels, 0);
    for (int i = 0; i < 2; i++) {
        k->expected[i] = room(k->images * k->bytes[RESULT + i]);
        if ((i ? h->out_bits : h->out) >= 0) k->tensors[RESULT + i] = room(k->images * k->bytes[RESULT + i]);
    }
    if (h->code != CONV) return;
    c->bits = WEIGHTS, c->alpha = ALPHA, c->masks = MASKS, c->terms = TERMS, c->classes = KINDS;
    k->tensors[WEIGHTS] = room(c->groups * up(c->out_channels / c->groups, LANES) * c->words * 8);
    k->tensors[ALPHA] = numbers(k->channels, 0);
    tables(k);
    place_signs(k);
}

/* From here on the reference: one sum of a convolution, weight by weight. */
static float sum(const Case *k, const float *in, int64_t y, int64_t x, int64_t o) {
    const Conv *c = &k->own.conv;
    int64_t channels = c->head.channels / c->groups, each = c->out_channels / c->groups, g = o / each, total = 0;
    const uint64_t *w = (uint64_t *)k->tensors[WEIGHTS] + (g * up(each, LANES) + (o % each - o % each % LANES)) * c->words;
    for (int64_t tap = 0; tap < c->kernel_h * c->kernel_w; tap++) {
        int64_t row = y * c->stride_h - c->pad_h + tap / c->kernel_w, column = x * c->stride_w - c->pad_w + tap % c->kernel_w;
        if (!within(row, c->head.height) || !within(column, c->head.width)) continue;
        const float *pixel = in + (row * c->head.width + column) * c->head.channels + g * channels;
        for (int64_t n = 0, bit = tap * up(channels, 8); n < channels; n++, bit++)
            total += (pixel[n] >= 0) == (w[bit / 64 * LANES + o % each % LANES] >> bit % 64 & 1) ? 1 : -1;
    }
    return total * ((float *)k->tensors[ALPHA])[o];
}

static float normed(const Case *k, float x, int64_t channel) {
    const float *gain = k->tensors[GAIN], *shift = k->tensors[SHIFT];
    if (!gain) return x;
    return k->fused ? fmaf(x, gain[channel], shift[channel]) : x * gain[channel] + shift[channel];
}

static float clamped(const Case *k, float x) { return !k->own.head.clamp ? x : x > 1 ? 1 : x < -1 ? -1 : x; }
