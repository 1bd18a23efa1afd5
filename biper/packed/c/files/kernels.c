#include "kernels.h"

#include <stddef.h>
#if defined __AVX512VPOPCNTDQ__
#include <immintrin.h>
#elif defined __wasm_simd128__
#include <wasm_simd128.h>
#endif

#if defined __AVX__ || defined __wasm_simd128__
typedef float sixteen __attribute__((vector_size(64))); /* an extension that the compilers for both have */
#endif

#define LANES BIPER_LANES

typedef struct { /* up to sixteen output channels of a pixel, and the part of its window that lies in the image */
    int32_t row, column, pixel, group, channel, count;
    int32_t y, x;               /* where the window begins, perhaps outside of the image */
    int32_t top, bottom, left, right; /* the taps from and to which it lies inside */
} place;

static int32_t least(int32_t a, int32_t b) { return a < b ? a : b; }
static int32_t most(int32_t a, int32_t b) { return a > b ? a : b; }
static int32_t words_of(int32_t channels) { return (channels + 31) / 32; }

/* How many taps of an axis lie nearer than `distance` to its first one. */
static int32_t taps(int32_t distance, int32_t dilation) {
    if (distance <= 0) return 0;
    return dilation == 1 ? distance : (distance + dilation - 1) / dilation;
}

static void look_at(const biper_layer *layer, place *p, int32_t y, int32_t x) {
    p->y = y;
    p->x = x;
    p->top = least(layer->kernel_h, taps(-y, layer->dilation_h));
    p->left = least(layer->kernel_w, taps(-x, layer->dilation_w));
    p->bottom = least(layer->kernel_h, taps(layer->height - y, layer->dilation_h));
    p->right = least(layer->kernel_w, taps(layer->width - x, layer->dilation_w));
}

/* The number of a pixel in the input. */
static int32_t seen_at(const biper_layer *layer, place p, int32_t i, int32_t j) {
    return (p.y + i * layer->dilation_h) * layer->width + p.x + j * layer->dilation_w;
}

static int32_t within(const biper_layer *layer, place *p) { /* a block of the group's channels, if there is one left */
    int32_t channels = layer->groups == 1 ? layer->out_channels : layer->out_channels / layer->groups;
    p->count = least(LANES, (p->group + 1) * channels - p->channel);
    return p->count > 0;
}

static place start(const biper_layer *layer) {
    place p = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0};
    look_at(layer, &p, -layer->pad_h, -layer->pad_w);
    within(layer, &p);
    return p;
}

/* The next block of channels, then the next group, then the next pixel. */
static void advance(const biper_layer *layer, place *p) {
    int32_t step = layer->pool ? 2 : 1;
    p->channel += p->count;
    if (within(layer, p)) return;
    if (++p->group == layer->groups) {
        p->group = p->channel = 0;
        p->pixel++;
        if (++p->column == layer->out_width) {
            p->column = 0;
            p->row++;
        }
        look_at(layer, p, step * p->row * layer->stride_h - layer->pad_h, step * p->column * layer->stride_w - layer->pad_w);
    }
    within(layer, p);
}

static float load(biper_map map, int32_t i) {
    if (map.type == BIPER_FLOAT32) return ((const float *)map.data)[i];
    if (map.type == BIPER_INT16) return (float)((const int16_t *)map.data)[i] * map.step;
    return (float)((const int8_t *)map.data)[i] * map.step;
}

static int32_t nearest(float x, float limit) { /* halves away from zero; what is no number becomes 0 */
    if (!(x < limit)) return x >= limit ? (int32_t)limit : 0;
    if (x < -limit) return -(int32_t)limit;
    return (int32_t)(x < 0 ? x - 0.5f : x + 0.5f);
}

static void store(biper_map map, int32_t i, float x) {
    if (map.type == BIPER_FLOAT32)
        ((float *)map.data)[i] = x;
    else if (map.type == BIPER_INT16)
        ((int16_t *)map.data)[i] = (int16_t)nearest(x / map.step, 32767);
    else
        ((int8_t *)map.data)[i] = (int8_t)nearest(x / map.step, 127);
}

/* Bits of a pixel's channels, which come in order: the first of a word clears it. Groups may end within a word. */
static void store_bits(const biper_layer *layer, place p, uint32_t *bits, uint32_t signs) {
    uint32_t *word = bits + p.pixel * words_of(layer->out_channels) + p.channel / 32;
    int32_t done = p.channel % 32;
    *word = done ? *word | signs << done : signs;
    if (done + p.count > 32) word[1] = signs >> (32 - done);
}

static inline void normalize(const biper_tail *t, float *x, int32_t channel, int32_t count) {
    int32_t i;
    if (t->bias)
        for (i = 0; i < count; i++) x[i] += t->bias[channel + i];
    if (t->gain)
        for (i = 0; i < count; i++) x[i] = x[i] * t->gain[channel + i] + t->shift[channel + i];
}

static inline void activate(const biper_tail *t, float *x, int32_t channel, int32_t count) {
    int32_t i;
    switch (t->activation) {
    case BIPER_HARDTANH:
        for (i = 0; i < count; i++) x[i] = x[i] > 1 ? 1 : x[i] < -1 ? -1 : x[i];
        break;
    case BIPER_RELU:
        for (i = 0; i < count; i++) x[i] = x[i] < 0 ? 0 : x[i];
        break;
    case BIPER_PRELU:
        if (t->before)
            for (i = 0; i < count; i++) x[i] -= t->before[channel + i];
        for (i = 0; i < count; i++) x[i] = x[i] > 0 ? x[i] : x[i] * t->slope[channel + i];
        if (t->after)
            for (i = 0; i < count; i++) x[i] += t->after[channel + i];
        break;
    default: break;
    }
}

static inline void give(const biper_layer *layer, const float *x, place p, int32_t count, biper_map out, uint32_t *bits) {
    const float *threshold = layer->tail.threshold;
    int32_t at = p.pixel * layer->out_channels + p.channel, i;
    uint32_t signs = 0;
    if (out.data && out.type == BIPER_FLOAT32)
        for (i = 0; i < count; i++) ((float *)out.data)[at + i] = x[i];
    else if (out.data)
        for (i = 0; i < count; i++) store(out, at + i, x[i]);
    if (!bits) return;
    if (threshold)
        for (i = 0; i < count; i++) signs |= (uint32_t)(x[i] >= threshold[p.channel + i]) << i;
    else
        for (i = 0; i < count; i++) signs |= (uint32_t)(x[i] >= 0) << i;
    store_bits(layer, p, bits, signs);
}

static inline void tail(const biper_layer *layer, float *x, place p, int32_t count, biper_map skip, biper_map out,
                        uint32_t *bits) {
    int32_t at = p.pixel * layer->out_channels + p.channel, i;
    normalize(&layer->tail, x, p.channel, count);
    if (skip.data && skip.type == BIPER_FLOAT32)
        for (i = 0; i < count; i++) x[i] += ((const float *)skip.data)[at + i];
    else if (skip.data)
        for (i = 0; i < count; i++) x[i] += load(skip, at + i);
    activate(&layer->tail, x, p.channel, count);
    give(layer, x, p, count, out, bits);
}

static void finish(const biper_layer *layer, float *x, place p, biper_map skip, biper_map out, uint32_t *bits) {
    if (p.count == LANES) /* a number that is known when this is compiled: loops without a counter */
        tail(layer, x, p, LANES, skip, out, bits);
    else
        tail(layer, x, p, p.count, skip, out, bits);
}

/* From sums of signs to bits, by comparing integers. */
static void compare(const biper_layer *layer, const int32_t *sums, place p, uint32_t *bits) {
    const int16_t *least_sums = layer->tail.integers + p.channel;
    uint32_t signs = 0, turned = layer->tail.turned[p.channel / 32] >> p.channel % 32;
    int32_t i;
    for (i = 0; i < p.count; i++) signs |= (uint32_t)(sums[i] >= least_sums[i]) << i;
    store_bits(layer, p, bits, (signs ^ turned) & (((uint32_t)1 << p.count) - 1));
}

static inline int32_t ones(uint32_t x) {
#if defined __POPCNT__ || defined __wasm__ || defined __aarch64__ || defined __riscv_zbb
    return __builtin_popcount(x);
#else
    x -= x >> 1 & 0x55555555u;
    x = (x & 0x33333333u) + (x >> 2 & 0x33333333u);
    x = (x + (x >> 4)) & 0x0f0f0f0fu;
    return (int32_t)(x * 0x01010101u >> 24);
#endif
}

/* Adds to `wrong`, for sixteen output channels, in how many bits some words differ from their weights. */
static void count_sixteen(const uint32_t *seen, const uint32_t *w, int32_t words, int32_t *wrong) {
    int32_t k;
#if defined __AVX512VPOPCNTDQ__
    __m512i total = _mm512_loadu_si512(wrong);
    for (k = 0; k < words; k++, w += LANES) {
        __m512i differ = _mm512_xor_si512(_mm512_set1_epi32((int)seen[k]), _mm512_loadu_si512(w));
        total = _mm512_add_epi32(total, _mm512_popcnt_epi32(differ));
    }
    _mm512_storeu_si512(wrong, total);
#elif defined __wasm_simd128__
    int32_t n;
    for (n = 0; n < LANES; n += 4) {
        v128_t total = wasm_v128_load(wrong + n);
        for (k = 0; k < words; k++) {
            v128_t differ = wasm_v128_xor(wasm_v128_load32_splat(seen + k), wasm_v128_load(w + LANES * k + n));
            v128_t pairs = wasm_u16x8_extadd_pairwise_u8x16(wasm_i8x16_popcnt(differ));
            total = wasm_i32x4_add(total, wasm_u32x4_extadd_pairwise_u16x8(pairs));
        }
        wasm_v128_store(wrong + n, total);
    }
#else
    int32_t n;
    for (n = 0; n < LANES; n += 4) { /* as many as even a small processor has registers for */
        int32_t a = wrong[n], b = wrong[n + 1], c = wrong[n + 2], d = wrong[n + 3];
        const uint32_t *four = w + n;
        for (k = 0; k < words; k++, four += LANES) {
            a += ones(seen[k] ^ four[0]);
            b += ones(seen[k] ^ four[1]);
            c += ones(seen[k] ^ four[2]);
            d += ones(seen[k] ^ four[3]);
        }
        wrong[n] = a;
        wrong[n + 1] = b;
        wrong[n + 2] = c;
        wrong[n + 3] = d;
    }
#endif
}

/* Word `word` of a group's channels in a pixel's words: a group may begin within one. */
static uint32_t word_at(const biper_layer *layer, const uint32_t *pixel, int32_t group, int32_t word) {
    int32_t channels = layer->channels / layer->groups, first = group * channels + 32 * word;
    int32_t left = channels - 32 * word;
    uint32_t bits = pixel[first / 32] >> first % 32;
    if (first % 32 && first / 32 + 1 < words_of(layer->channels)) bits |= pixel[first / 32 + 1] << (32 - first % 32);
    return left < 32 ? bits & (((uint32_t)1 << left) - 1) : bits;
}

/* The sums of signs; weights: the block's. Without groups and dilation a row of a window is words side by side. */
static void sums_of_signs(const biper_layer *layer, const uint32_t *weights, const uint32_t *in, place p, int32_t *sums) {
    int32_t words = words_of(layer->channels), channels = layer->channels, own = words, i, j, k, n;
    int32_t wrong[LANES] = {0};
    if (layer->groups > 1) channels /= layer->groups, own = words_of(channels);
    for (i = p.top; i < p.bottom; i++) {
        const uint32_t *w = weights + (i * layer->kernel_w + p.left) * own * p.count;
        if (p.count == LANES && layer->groups == 1 && layer->dilation_w == 1) {
            count_sixteen(in + seen_at(layer, p, i, p.left) * words, w, (p.right - p.left) * words, wrong);
            continue;
        }
        for (j = p.left; j < p.right; j++) {
            const uint32_t *pixel = in + seen_at(layer, p, i, j) * words;
            for (k = 0; k < own; k++, w += p.count) {
                uint32_t seen = layer->groups == 1 ? pixel[k] : word_at(layer, pixel, p.group, k);
                for (n = 0; n < p.count; n++) wrong[n] += ones(seen ^ w[n]);
            }
        }
    }
    channels *= (p.bottom - p.top) * (p.right - p.left);
    for (n = 0; n < LANES; n++) sums[n] = channels - 2 * wrong[n];
}

void biper_binary(const biper_layer *layer, const uint32_t *weights, const uint32_t *in, biper_map skip, biper_map out,
                  uint32_t *bits) {
    int32_t each = layer->kernel_h * layer->kernel_w * words_of(layer->channels / layer->groups);
    int32_t sums[LANES], others[LANES], i, n;
    float x[LANES];
    place p;
    for (p = start(layer); p.row < layer->out_height; advance(layer, &p)) {
        const uint32_t *w = weights + (size_t)p.channel * (size_t)each;
        sums_of_signs(layer, w, in, p, sums);
        for (n = 1; layer->pool && n < 4; n++) {
            place q = p;
            look_at(layer, &q, p.y + n / 2 * layer->stride_h, p.x + n % 2 * layer->stride_w);
            sums_of_signs(layer, w, in, q, others);
            for (i = 0; i < LANES; i++) sums[i] = most(sums[i], others[i]);
        }
        if (layer->tail.integers) {
            compare(layer, sums, p, bits);
            continue;
        }
        if (p.count == LANES)
            for (i = 0; i < LANES; i++) x[i] = (float)sums[i] * layer->tail.alpha[p.channel + i];
        else
            for (i = 0; i < p.count; i++) x[i] = (float)sums[i] * layer->tail.alpha[p.channel + i];
        finish(layer, x, p, skip, out, bits);
    }
}

/* Adds to sums, for some output channels, the products of numbers and their weights. */
static void add_products(biper_map in, int32_t at, const float *w, int32_t numbers, int32_t lanes, float *sums) {
    int32_t k, n;
    for (k = 0; k < numbers; k++, w += lanes) {
        float value = load(in, at + k);
        for (n = 0; n < lanes; n++) sums[n] += value * w[n];
    }
}

/* The same, in the same order, for sixteen. */
static void add_sixteen(const float *in, const float *w, int32_t numbers, float *sums) {
    int32_t k;
#if defined __AVX__ || defined __wasm_simd128__
    sixteen total, weights;
    __builtin_memcpy(&total, sums, sizeof total);
    for (k = 0; k < numbers; k++, w += LANES) {
        __builtin_memcpy(&weights, w, sizeof weights);
        total += in[k] * weights;
    }
    __builtin_memcpy(sums, &total, sizeof total);
#else
    int32_t n;
    for (k = 0; k < numbers; k++, w += LANES)
        for (n = 0; n < LANES; n++) sums[n] += in[k] * w[n];
#endif
}

void biper_real(const biper_layer *layer, const float *weights, biper_map in, biper_map skip, biper_map out,
                uint32_t *bits) {
    int32_t own = layer->channels / layer->groups, each = layer->kernel_h * layer->kernel_w * own, i, j;
    int32_t rows = layer->groups == 1 && layer->dilation_w == 1; /* then a row of a window is numbers side by side */
    place p;
    for (p = start(layer); p.row < layer->out_height; advance(layer, &p)) {
        float sums[LANES] = {0};
        for (i = p.top; i < p.bottom; i++)
            for (j = p.left; j < p.right; j += rows ? p.right - p.left : 1) {
                const float *w = weights + (size_t)p.channel * (size_t)each + (i * layer->kernel_w + j) * own * p.count;
                int32_t at = seen_at(layer, p, i, j) * layer->channels + p.group * own;
                int32_t numbers = rows ? (p.right - p.left) * own : own;
                if (p.count == LANES && in.type == BIPER_FLOAT32)
                    add_sixteen((const float *)in.data + at, w, numbers, sums);
                else
                    add_products(in, at, w, numbers, p.count, sums);
            }
        finish(layer, sums, p, skip, out, bits);
    }
}

void biper_mixed(const biper_layer *layer, const uint16_t *weights, biper_map in, biper_map skip, biper_map out,
                 uint32_t *bits) {
    int32_t own = layer->channels / layer->groups, each = layer->kernel_h * layer->kernel_w * own, block = 0, i, j, k, n;
    int32_t blocks = layer->groups * ((layer->out_channels / layer->groups + LANES - 1) / LANES);
    place p;
    for (p = start(layer); p.row < layer->out_height; advance(layer, &p), block = (block + 1) % blocks) {
        float sums[LANES] = {0};
        for (i = p.top; i < p.bottom; i++)
            for (j = p.left; j < p.right; j++)
                for (k = 0; k < own; k++) {
                    float value = load(in, seen_at(layer, p, i, j) * layer->channels + p.group * own + k);
                    uint32_t w = weights[block * each + (i * layer->kernel_w + j) * own + k];
                    for (n = 0; n < LANES; n++) sums[n] += w >> n & 1 ? value : -value;
                }
        for (n = 0; n < p.count; n++) sums[n] *= layer->tail.alpha[p.channel + n];
        finish(layer, sums, p, skip, out, bits);
    }
}

void biper_pointwise(const biper_layer *layer, biper_map in, biper_map skip, biper_map out, uint32_t *bits) {
    float x[LANES];
    int32_t n;
    place p;
    for (p = start(layer); p.row < layer->out_height; advance(layer, &p)) {
        for (n = 0; n < p.count; n++) x[n] = load(in, p.pixel * layer->channels + p.channel + n);
        finish(layer, x, p, skip, out, bits);
    }
}

void biper_maximum(const biper_layer *layer, biper_map in, biper_map out, uint32_t *bits) {
    float x[LANES], largest[LANES] = {0};
    int32_t i, j, n;
    place p;
    for (p = start(layer); p.row < layer->out_height; advance(layer, &p)) {
        for (i = p.top; i < p.bottom; i++)
            for (j = p.left; j < p.right; j++) {
                int32_t begun = i > p.top || j > p.left;
                for (n = 0; n < p.count; n++) x[n] = load(in, seen_at(layer, p, i, j) * layer->channels + p.channel + n);
                normalize(&layer->tail, x, p.channel, p.count);
                activate(&layer->tail, x, p.channel, p.count);
                for (n = 0; n < p.count; n++) largest[n] = begun && x[n] <= largest[n] ? largest[n] : x[n];
            }
        give(layer, largest, p, p.count, out, bits);
    }
}

void biper_average(const biper_layer *layer, int32_t front, int32_t copies, biper_map in, biper_map out) {
    int32_t row, column, channel, n, y, x, pixel = 0;
    for (row = 0; row < layer->out_height; row++)
        for (column = 0; column < layer->out_width; column++, pixel++) {
            int32_t y0 = row * layer->kernel_h, x0 = column * layer->kernel_w, at = pixel * layer->out_channels;
            int32_t y1 = least(layer->height, y0 + layer->kernel_h), x1 = least(layer->width, x0 + layer->kernel_w);
            for (n = 0; n < layer->out_channels; n++) store(out, at + n, 0);
            for (channel = 0; channel < layer->channels; channel++) {
                float sum = 0;
                for (y = y0; y < y1; y++)
                    for (x = x0; x < x1; x++) sum += load(in, (y * layer->width + x) * layer->channels + channel);
                sum /= (float)((y1 - y0) * (x1 - x0));
                for (n = 0; n < copies; n++) store(out, at + front + n * layer->channels + channel, sum);
            }
        }
}

void biper_flatten(const biper_layer *layer, biper_map in, biper_map out) {
    int32_t pixels = layer->height * layer->width, pixel, channel;
    for (pixel = 0; pixel < pixels; pixel++)
        for (channel = 0; channel < layer->channels; channel++)
            store(out, channel * pixels + pixel, load(in, pixel * layer->channels + channel));
}

void biper_normalize(const uint8_t *pixels, int32_t count, const float mean[3], const float std[3], float *image) {
    int32_t i;
    for (i = 0; i < 3 * count; i++) image[i] = ((float)pixels[i] - mean[i % 3]) / std[i % 3];
}

biper_map biper_map_at(void *memory, int32_t offset, float step, int32_t type) {
    biper_map map;
    map.data = (unsigned char *)memory + offset;
    map.step = step;
    map.type = type;
    return map;
}

biper_map biper_numbers(const float *numbers) {
    union { /* kernels write to what they give alone, but have one type for what they take and give */
        const float *given;
        void *data;
    } either;
    either.given = numbers;
    return biper_map_at(either.data, 0, 1, BIPER_FLOAT32);
}

biper_map biper_nothing(void) {
    biper_map map = {NULL, 1, BIPER_FLOAT32};
    return map;
}

uint32_t *biper_bits(void *memory, int32_t offset) { return (uint32_t *)(void *)((unsigned char *)memory + offset); }
