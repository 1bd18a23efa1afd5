/* The packed networks' instructions on random cases, against sums and maxima that are taken one by one.
 *
 * Arguments: how many cases, the first one's seed; `1 SEED` repeats a case that was printed. Buffers are as long as
 * program.py makes them and no longer, so that AddressSanitizer sees each byte too far; all of them begin as noise. */
#define WORTH 1 /* the smallest instruction is divided, */
#define ENOUGH_SHARES 2 /* and alone is enough for all threads */
#include "../biper/packed/packed.c"
#include <stdio.h>

#define WORK 500000 /* products of a case, at most */
/* Numbers of the tensors; the first ones are the values too. */
enum {
    IN, SIGNS, ADDED, REALS, BITS_OUT, VALUES,
    GAIN = VALUES, SHIFT, SLOPE, MINUS, PLUS, BOUND, WEIGHTS, ALPHA, BIAS_OF, MASKS, KINDS, ACCUMULATED, OFFSETS, TURNS, NIBBLES, OF_NIBBLES,
    TENSORS
};

typedef struct {
    int64_t own[WIDTH], signs[WIDTH];        /* instructions; signs: makes the bits in scratch, if its code is not 0 */
    int64_t images, threads, fused, columns; /* columns: before the pooling */
    int64_t channels, places;                /* the result's; places: pixels of an image */
    int64_t bytes[VALUES], offset, scratch;  /* bytes of an image; offset: of the bits in scratch */
    void *tensors[TENSORS], *expected[2];    /* expected: floats, bits */
} Case;

static uint64_t noise;
static void *owned[32];
static int owners;
static int64_t between(int64_t low, int64_t high) {
    noise ^= noise << 13, noise ^= noise >> 7, noise ^= noise << 17;
    return low + (int64_t)((noise >> 8) % (uint64_t)(high - low + 1));
}

static int chance(int64_t of) { return between(1, of) == 1; }
static int64_t up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }
static int within(int64_t n, int64_t size) { return n >= 0 && n < size; }
static int64_t fits(int64_t size, int64_t step, int64_t all) { return all < size ? 0 : (all - size) / step + 1; }

static void *room(int64_t bytes) {
    uint8_t *result = owned[owners++] = malloc(bytes);
    for (int64_t i = 0; i < bytes; i++) result[i] = between(0, 255);
    return result;
}

/* From `low` to 2, never 0; odd: zeros, infinities and what is no number among them. */
static float *numbers(int64_t count, int64_t low, int odd) {
    float *result = room(4 * count), odds[] = {0, -0.0f, INFINITY, -INFINITY, NAN};
    for (int64_t i = 0; i < count; i++)
        result[i] = odd && chance(50) ? odds[between(0, 4)] : (between(low * (1 << 20), 1 << 21) + 0.5f) / (1 << 20);
    return result;
}

/* A number of channels up to `limit`; often full bytes, lanes or words. */
static int64_t some(int64_t limit) {
    int64_t step = (int64_t[]){1, 1, 8, 16, 64}[between(0, 4)];
    return step > limit ? between(1, limit) : step * between(1, limit / step);
}

static void draw_conv(Case *k, Conv *c, Head *h) {
    static const int64_t kernels[] = {1, 2, 3, 5};
    c->groups = chance(2) ? 1 : chance(3) ? between(5, 40) : between(2, 4); /* many groups are often depth-wise */
    h->channels = c->groups * (c->groups > 4 && chance(2) ? 1 : some(130 / c->groups));
    c->kernel_h = kernels[between(0, 3)], c->kernel_w = kernels[between(0, 3)];
    do {
        k->channels = c->groups * (c->groups > 4 && chance(2) ? 1 : some(most(1, 66 / c->groups))), c->pool = chance(3);
        c->dilation_h = chance(2) ? 1 : between(1, 4), c->dilation_w = chance(2) ? 1 : between(1, 4);
        int64_t high = c->dilation_h * (c->kernel_h - 1) + 1, wide = c->dilation_w * (c->kernel_w - 1) + 1;
        h->height = between(1, 9), c->stride_h = between(1, 3), c->pad_h = between(0, chance(3) ? high : 2);
        h->width = between(1, 9), c->stride_w = between(1, 3), c->pad_w = between(0, chance(3) ? wide : 2);
        c->conv_height = fits(high, c->stride_h, h->height + 2 * c->pad_h);
        k->columns = fits(wide, c->stride_w, h->width + 2 * c->pad_w);
        h->out_height = c->conv_height >> c->pool, h->out_width = k->columns >> c->pool;
        k->places = h->out_height * h->out_width;
    } while (!k->places || k->images * k->places * c->kernel_h * c->kernel_w * h->channels / c->groups * k->channels > WORK);
    c->words = c->kernel_h * row_words_of(c);
    c->weights = ACCUMULATED, c->offsets = OFFSETS, c->masks = MASKS, c->classes = KINDS;
    c->alpha = ALPHA, c->bias = chance(2) ? BIAS_OF : -1, c->turns = -1;
    h->code = CONV, h->in = SIGNS, c->out_channels = k->channels;
}

static void draw_other(Case *k, Tail *t, Average *a, Head *h) {
    int64_t window = between(1, 3), cut = between(0, window - 1); /* cut: whether the windows at the end are cut off */
    *h = (Head){.code = chance(3) ? AVERAGE : TAIL, .in = IN, .channels = some(130)};
    h->height = between(window, 9), h->width = between(window, 9);
    if (h->code == AVERAGE) {
        a->window = window, a->front = between(0, 40), a->copies = chance(2) ? 1 : between(1, 3);
        a->out_channels = a->front + a->copies * h->channels + between(0, 40);
        h->out_height = (h->height + cut) / window, h->out_width = (h->width + cut) / window;
    } else {
        t->kernel = window, t->stride = between(1, 3), t->pad = between(0, window / 2);
        h->out_height = fits(window, t->stride, h->height + 2 * t->pad);
        h->out_width = fits(window, t->stride, h->width + 2 * t->pad);
    }
    k->channels = h->code == AVERAGE ? a->out_channels : h->channels, k->places = h->out_height * h->out_width;
}

static void draw_real(Case *k, Real *c, Head *h) {
    do {
        h->channels = some(20), k->channels = some(66);
        c->kernel_h = between(1, 5), c->stride_h = between(1, 3), c->pad_h = between(0, c->kernel_h);
        c->kernel_w = between(1, 5), c->stride_w = between(1, 3), c->pad_w = between(0, c->kernel_w);
        h->height = between(1, 9), h->width = between(1, 9);
        h->out_height = fits(c->kernel_h, c->stride_h, h->height + 2 * c->pad_h);
        h->out_width = fits(c->kernel_w, c->stride_w, h->width + 2 * c->pad_w);
        k->places = h->out_height * h->out_width;
    } while (!k->places || k->images * k->places * c->kernel_h * c->kernel_w * h->channels * k->channels > WORK);
    h->code = REAL, h->in = IN, c->weights = ACCUMULATED, c->out_channels = k->channels, c->channels_first = chance(2);
    c->chunk = between(1, 2 * h->channels * c->kernel_h * c->kernel_w);
    int64_t area = c->kernel_h * c->kernel_w, products = area * h->channels, all = products * up(k->channels, LANES);
    const float *weights = k->tensors[WEIGHTS] = numbers(k->channels * products, -2, 0);
    float *ordered = k->tensors[ACCUMULATED] = room(4 * all);
    for (int64_t i = 0; i < all; i++) {
        int64_t product = i / LANES % products, n = i / LANES / products * LANES + i % LANES;
        int64_t from = c->channels_first ? product : product % h->channels * area + product / h->channels;
        ordered[i] = n < k->channels ? weights[n * products + from] : 0;
    }
}

/* A kind for each set of a window's rows, and of its columns, that lie in the image. */
static void draw_tables(Case *k, Conv *c, const Head *h) {
    int64_t channels = h->channels / c->groups, taps = c->kernel_h * c->kernel_w;
    int64_t count = 1 << (c->kernel_h + c->kernel_w), places = c->conv_height + k->columns;
    uint32_t *masks = k->tensors[MASKS] = memset(room(count * c->words * 4), 0, count * c->words * 4);
    int32_t *terms = memset(room(count * 4), 0, count * 4);
    int32_t *kinds = k->tensors[KINDS] = memset(room(places * 4), 0, places * 4), *right = kinds + c->conv_height;
    for (int64_t i = 0; i < count * taps; i++) {
        int64_t kind = i / taps, tap = i % taps, row = tap / c->kernel_w;
        int64_t bit = WORD * (kind * c->words + row * row_words_of(c)) + tap % c->kernel_w * up(channels, 8);
        if (!(kind >> c->kernel_w >> tap / c->kernel_w & kind >> tap % c->kernel_w & 1)) continue;
        terms[kind] += channels;
        for (int64_t end = bit + channels; bit < end; bit++) masks[bit / WORD] |= 1u << bit % WORD;
    }
    for (int64_t y = 0; y < c->conv_height; y++)
        for (int64_t tap = 0; tap < c->kernel_h; tap++)
            kinds[y] |= within(y * c->stride_h - c->pad_h + tap * c->dilation_h, h->height) << (c->kernel_w + tap);
    for (int64_t x = 0; x < k->columns; x++)
        for (int64_t tap = 0; tap < c->kernel_w; tap++)
            right[x] |= within(x * c->stride_w - c->pad_w + tap * c->dilation_w, h->width) << tap;
    int64_t blocks = c->groups * up(k->channels / c->groups, LANES) / LANES, block = c->words * LANES, all = blocks * block;
    const uint32_t *weights = k->tensors[WEIGHTS];
    uint32_t *accumulated = k->tensors[ACCUMULATED] = room(4 * all);
    for (int64_t i = 0; i < all; i++) accumulated[i] = weights[i] ^ (i % block < LANES ? 0 : accumulated[i - LANES]);
    c->kinds = count;
    uint8_t *nibbles = k->tensors[NIBBLES] = room(8 * all); /* [block][word][byte][half][16] */
    for (int64_t i = 0; i < 8 * all; i++)
        nibbles[i] = weights[i / 128 * LANES + i % LANES] >> (i / 32 % 4 * 8 + i / 16 % 2 * 4) & 15;
    k->tensors[OFFSETS] = room(4 * 2 * count * blocks * LANES);
    k->tensors[OF_NIBBLES] = room(4 * 2 * count * blocks * LANES);
    int32_t *rows = memset(room(count * 4), 0, count * 4); /* the first one for kinds that no row has */
    for (int64_t kind = 0; kind < count; kind++)
        for (int64_t y = 0; y < c->conv_height; y++)
            if (kinds[y] >> c->kernel_w == kind >> c->kernel_w) rows[kind] = y;
    biper_offsets(k->own, accumulated, masks, terms, rows, 0, k->tensors[OFFSETS]);
    biper_offsets(k->own, accumulated, masks, terms, rows, 1, k->tensors[OF_NIBBLES]);
}

/* The activations' bits with the slack of Program.conv around them, or their place in scratch, at one end of it. */
static void draw_signs(Case *k, const Conv *c, const Head *h) {
    int64_t bytes = up(h->channels, 8) / 8, size = h->height * h->width * bytes, slack = c->pad_w * bytes + 32;
    const float *in = k->tensors[IN];
    k->bytes[SIGNS] = size;
    if (chance(2)) {
        k->scratch = up(size + 2 * slack, 64), k->offset = chance(2) ? slack : k->scratch - slack - size;
        int64_t y = h->height, x = h->width;
        Head head = {.code = TAIL, .in = IN, .out = -1, .out_bits = SIGNS, .skip = -1, .gain = -1, .shift = -1};
        head.slope = head.before = head.after = head.threshold = -1;
        head.channels = h->channels, head.height = head.out_height = y, head.width = head.out_width = x;
        *(Tail *)k->signs = (Tail){.head = head, .kernel = 1, .stride = 1};
        return;
    }
    uint8_t *signs = k->tensors[SIGNS] = (uint8_t *)room(k->images * size + 2 * slack) + slack;
    for (int64_t i = 0; i < k->images * h->height * h->width * h->channels; i++) { /* noise stays behind the channels */
        uint8_t *byte = signs + i / h->channels * bytes + i % h->channels / 8, bit = 1 << i % h->channels % 8;
        *byte = in[i] >= 0 ? *byte | bit : *byte & ~bit;
    }
}

static void draw(Case *k) {
    Conv *c = (Conv *)k->own;
    Head *h = &c->head;
    *k = (Case){.images = between(1, 5), .threads = between(1, 4), .fused = chance(2), .scratch = 64};
    if (chance(3))
        draw_other(k, (Tail *)c, (Average *)c, h);
    else if (chance(4))
        draw_real(k, (Real *)c, h);
    else
        draw_conv(k, c, h);
    int conv = h->code == CONV, sums = conv || h->code == REAL, more = h->code != AVERAGE; /* bits end with a byte, so groups have to as well */
    int bits = conv ? c->groups == 1 || k->channels / c->groups % 8 == 0 : more;
    int activation = more ? between(0, 3) : 0; /* none, hardtanh, prelu, one between two shifts */
    h->clamp = activation == 1, h->slope = activation > 1 ? SLOPE : -1;
    h->before = activation > 2 ? MINUS : -1, h->after = activation > 2 ? PLUS : -1;
    h->out_bits = bits && chance(2) ? BITS_OUT : -1, h->out = h->out_bits < 0 || chance(2) ? REALS : -1;
    h->threshold = h->out_bits >= 0 && chance(2) ? BOUND : -1;
    h->skip = more && (sums || ((Tail *)c)->kernel * ((Tail *)c)->stride == 1) && chance(2) ? ADDED : -1;
    h->gain = more && !chance(4) ? GAIN : -1, h->shift = h->gain < 0 ? -1 : SHIFT;
    int64_t pixels = h->height * h->width * h->channels, results = k->places * k->channels, extreme = chance(5);
    k->bytes[IN] = 4 * pixels, k->bytes[ADDED] = k->bytes[REALS] = 4 * results;
    k->bytes[BITS_OUT] = k->places * (up(k->channels, 8) / 8);
    k->tensors[IN] = numbers(k->images * pixels, extreme ? 0 : -2, !extreme);
    if (h->skip >= 0) k->tensors[ADDED] = numbers(k->images * results, -2, 1);
    if (h->gain >= 0) k->tensors[GAIN] = numbers(k->channels, -2, 0), k->tensors[SHIFT] = numbers(k->channels, -2, 0);
    if (h->slope >= 0) k->tensors[SLOPE] = numbers(k->channels, -2, 0);
    if (h->before >= 0) k->tensors[MINUS] = numbers(k->channels, -2, 0), k->tensors[PLUS] = numbers(k->channels, -2, 0);
    if (h->threshold >= 0) k->tensors[BOUND] = numbers(k->channels, -2, 1);
    for (int i = 0; i < 2; i++) {
        k->expected[i] = room(k->images * k->bytes[REALS + i]);
        if ((i ? h->out_bits : h->out) >= 0) k->tensors[REALS + i] = room(k->images * k->bytes[REALS + i]);
    }
    if (!conv) return;
    int64_t weights = c->groups * up(k->channels / c->groups, LANES) * c->words * 4;
    k->tensors[WEIGHTS] = memset(room(weights), 0, extreme ? weights : 0); /* so that every term is a mismatch */
    k->tensors[ALPHA] = numbers(k->channels, -2, 0);
    if (c->bias >= 0) k->tensors[BIAS_OF] = numbers(k->channels, -2, 0);
    if (h->out < 0 && h->skip < 0 && h->slope < 0 && !chance(3))
        k->tensors[c->turns = TURNS] = room(weights / c->words / LANES);
    draw_tables(k, c, h);
    draw_signs(k, c, h);
}

/* What a convolution gives in one place, weight by weight. */
static float sum(const Case *k, const Conv *c, const float *in, int64_t y, int64_t x, int64_t o) {
    int64_t channels = c->head.channels / c->groups, each = c->out_channels / c->groups, g = o / each, total = 0;
    int64_t lane = o % each % LANES, block = g * up(each, LANES) + o % each - lane;
    const uint32_t *w = (uint32_t *)k->tensors[WEIGHTS] + block * c->words + lane;
    for (int64_t tap = 0; tap < c->kernel_h * c->kernel_w; tap++) {
        int64_t row = y * c->stride_h - c->pad_h + tap / c->kernel_w * c->dilation_h;
        int64_t column = x * c->stride_w - c->pad_w + tap % c->kernel_w * c->dilation_w;
        if (!within(row, c->head.height) || !within(column, c->head.width)) continue;
        const float *pixel = in + (row * c->head.width + column) * c->head.channels + g * channels;
        int64_t bit = WORD * (tap / c->kernel_w * row_words_of(c)) + tap % c->kernel_w * up(channels, 8);
        for (int64_t n = 0; n < channels; n++, bit++)
            total += (w[bit / WORD * LANES] >> bit % WORD & 1) == (uint32_t)(pixel[n] >= 0) ? 1 : -1;
    }
    const float *bias = k->tensors[BIAS_OF];
    float scaled = total * ((float *)k->tensors[ALPHA])[o];
    return bias ? scaled + bias[o] : scaled;
}

/* What a convolution of real values gives in one place, product by product in their order. */
static float real_sum(const Case *k, const Real *c, const float *in, int64_t y, int64_t x, int64_t o) {
    int64_t area = c->kernel_h * c->kernel_w, channels = c->head.channels;
    const float *w = (float *)k->tensors[WEIGHTS] + o * area * channels;
    float total = 0, before = 0; /* before: of whole chunks */
    for (int64_t i = 0; i < area * channels; i++) {
        if (i && i % c->chunk == 0) before = i == c->chunk ? total : before + total, total = 0;
        int64_t n = c->channels_first ? i / area : i % channels, tap = c->channels_first ? i % area : i / channels;
        int64_t row = y * c->stride_h - c->pad_h + tap / c->kernel_w, column = x * c->stride_w - c->pad_w + tap % c->kernel_w;
        if (within(row, c->head.height) && within(column, c->head.width))
            total = fmaf(in[(row * c->head.width + column) * channels + n], w[n * area + tap], total);
    }
    return area * channels > c->chunk ? before + total : total;
}

static float normed(const Case *k, float x, int64_t channel) {
    const float *gain = k->tensors[GAIN], *shift = k->tensors[SHIFT];
    return !gain ? x : k->fused ? fmaf(x, gain[channel], shift[channel]) : x * gain[channel] + shift[channel];
}

static float activated(const Case *k, float x, int64_t channel) {
    const float *slope = k->tensors[SLOPE], *minus = k->tensors[MINUS], *plus = k->tensors[PLUS];
    if (((Head *)k->own)->clamp) return x > 1 ? 1 : x < -1 ? -1 : x;
    if (minus) x -= minus[channel];
    if (slope) x = x > 0 ? x : x * slope[channel];
    return plus ? x + plus[channel] : x;
}

/* A mean, or the maximum of what follows; of a window of one place what lies there. */
static float window(const Case *k, const Tail *t, const float *in, int64_t y, int64_t x, int64_t channel) {
    int mean = t->head.code == AVERAGE;
    int64_t stride = mean ? t->kernel : t->stride, pad = mean ? 0 : t->pad, count = 0;
    float result = 0;
    for (int64_t i = 0; i < t->kernel * t->kernel; i++) {
        int64_t row = y * stride - pad + i / t->kernel, column = x * stride - pad + i % t->kernel;
        if (!within(row, t->head.height) || !within(column, t->head.width)) continue;
        float v = in[(row * t->head.width + column) * t->head.channels + channel];
        if (!mean && t->kernel > 1) v = activated(k, normed(k, v, channel), channel);
        result = mean ? result + v : !count || v > result || v != v ? v : result;
        count++;
    }
    return mean ? result / count : result;
}

static void expect(Case *k, const Conv *c, const Head *h) {
    uint8_t *bits = memset(k->expected[1], 0, k->images * k->bytes[BITS_OUT]);
    for (int64_t i = 0; i < k->images * k->places * k->channels; i++) {
        int64_t o = i % k->channels, place = i / k->channels, y = place % k->places / h->out_width;
        int64_t x = place % k->places % h->out_width;
        const float *in = (float *)k->tensors[IN] + place / k->places * (k->bytes[IN] / 4), *skip = k->tensors[ADDED];
        float *bound = k->tensors[BOUND];
        int64_t channel = h->code == AVERAGE ? o - ((Average *)h)->front : o;
        float v = h->code == CONV ? sum(k, c, in, y << c->pool, x << c->pool, o) : 0;
        for (int p = 1; h->code == CONV && c->pool && p < 4; p++)
            v = fmaxf(v, sum(k, c, in, 2 * y + p / 2, 2 * x + p % 2, o));
        if (h->code == REAL) v = real_sum(k, (Real *)h, in, y, x, o);
        int64_t copies = h->code == AVERAGE ? ((Average *)h)->copies : 1;
        if (h->code != CONV && h->code != REAL && within(channel, copies * h->channels))
            v = window(k, (Tail *)h, in, y, x, channel % h->channels);
        if (h->code != TAIL || ((Tail *)h)->kernel == 1) { /* else it is done within the window */
            v = normed(k, v, o);
            v = activated(k, skip ? v + skip[i] : v, o);
        }
        ((float *)k->expected[0])[i] = v;
        if (bound && !place && chance(2)) bound[o] = v; /* what lies on the threshold counts */
        bits[place * (up(k->channels, 8) / 8) + o / 8] |= (v >= (bound ? bound[o] : 0)) << o % 8;
    }
}

/* Bytes of what an instruction gathers, as Program.conv and Program.real have them. */
static int64_t gathered(const Head *h) {
    const Conv *c = (const Conv *)h;
    const Real *real = (const Real *)h;
    if (h->code == REAL) {
        int64_t products = h->channels * real->kernel_h * real->kernel_w;
        int64_t padded = h->channels * (h->height + 2 * real->pad_h) * (h->width + 2 * real->pad_w);
        return up(4 * (products + padded), 64);
    }
    if (h->code != CONV) return 64;
    int64_t rows = has_whole_words(c) ? 4 * (h->height + 2 * c->pad_h) * line_of(c) : 0;
    return up(GROUP * TILE * up(8 * c->words + COPY, 64) + rows + COPY, 64);
}

/* Whether a path gives what is expected. */
static int right(const Case *k, const Conv *c, int path) {
    int64_t scratch = k->signs[0] != 0, bytes_in_all = sizeof(Header) + 16 * VALUES + (1 + scratch) * 8 * WIDTH;
    Header *program = room(bytes_in_all);
    *program = (Header){.instructions = 1 + scratch, .values = VALUES, .scratch = k->scratch, .gathered = gathered(&c->head)};
    int64_t(*values)[2] = (int64_t(*)[2])(program + 1), *rows = values[VALUES];
    for (int64_t i = 0; i < VALUES; i++) values[i][0] = i, values[i][1] = k->bytes[i];
    if (scratch) values[SIGNS][0] = -1, values[SIGNS][1] = k->offset;
    memcpy(rows, k->signs, 8 * WIDTH);
    memcpy(rows + scratch * WIDTH, k->own, 8 * WIDTH);
    Conv *conv = (Conv *)(rows + scratch * WIDTH);
    if (conv->head.code == CONV && path == AVX2) conv->weights = NIBBLES, conv->offsets = OF_NIBBLES;
    const float *out = k->tensors[REALS], *want = k->expected[0];
    int64_t count = out ? k->images * k->places * k->channels : 0, bytes = k->images * k->bytes[BITS_OUT];
    for (int i = REALS; i <= BITS_OUT; i++)
        if (k->tensors[i]) memset(k->tensors[i], 0x5a, k->images * k->bytes[i]);
    if (biper_run((int64_t *)program, k->tensors, k->images, k->threads, path, k->fused)) return 0;
    for (int64_t i = 0; i < count; i++)
        if (memcmp(out + i, want + i, 4) && (out[i] == out[i] || want[i] == want[i])) return 0;
    return !k->tensors[BITS_OUT] || !memcmp(k->tensors[BITS_OUT], k->expected[1], bytes);
}

int main(int argc, char **argv) {
    static const char *names[] = {"plain", "avx2", "avx512", "neon"};
    int64_t cases = argc > 1 ? atoll(argv[1]) : 100, seed = argc > 2 ? atoll(argv[2]) : 1, wrong = 0;
    for (int64_t n = 0; n < cases && !wrong; n++) {
        Case k;
        noise = (uint64_t)(seed + n + 1) * 0x9e3779b97f4a7c15; /* neighbours' first draws do not look alike */
        draw(&k);
        expect(&k, (Conv *)k.own, (Head *)k.own);
        for (int form = OFFSETS; k.tensors[TURNS] && form; form = form == OFFSETS ? OF_NIBBLES : 0)
            biper_limits(k.own, k.tensors[ALPHA], k.tensors[BIAS_OF], k.tensors[GAIN], k.tensors[SHIFT], k.tensors[BOUND],
                         k.fused, k.tensors[form], k.tensors[TURNS]);
        for (int path = PLAIN; path <= NEON && !wrong; path++) {
            if (!biper_supports(path) || right(&k, (Conv *)k.own, path)) continue;
            wrong = printf("path %s, seed %ld: images, threads, fused %ld %ld %ld, instruction", names[path],
                           (long)(seed + n), (long)k.images, (long)k.threads, (long)k.fused);
            for (int i = 0; i < WIDTH; i++) printf(" %ld%s", (long)k.own[i], i < WIDTH - 1 ? "" : "\n");
        }
        while (owners) free(owned[--owners]);
    }
    for (int path = PLAIN; path <= NEON && !wrong; path++)
        if (biper_supports(path)) printf("path %s: %ld cases\n", names[path], (long)cases);
    return wrong != 0;
}
