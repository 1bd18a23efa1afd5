/* The instructions of packed.c for one kind of processor: NAME, TARGET and PATH say which. */

#if PATH == AVX512
/* For each pixel of a tile and sixteen output channels: the ones of (a ^ w) & m over all words, or of a ^ w. */
TARGET INLINE void NAME(mismatches)(const uint64_t *a, const uint64_t *const *m, const uint64_t *w, int64_t words,
                                    int64_t patch, int masked, ints out[TILE]) {
    __m512i low[TILE], high[TILE];
    for (int p = 0; p < TILE; p++) low[p] = high[p] = _mm512_setzero_si512();
    for (int64_t i = 0; i < words; i++) {
        __m512i w0 = _mm512_loadu_si512(w + LANES * i), w1 = _mm512_loadu_si512(w + LANES * i + 8);
        for (int p = 0; p < TILE; p++) {
            __m512i x = _mm512_set1_epi64(a[p * patch + i]), mask = _mm512_set1_epi64(masked ? m[p][i] : 0);
            __m512i d0 = masked ? _mm512_ternarylogic_epi64(w0, x, mask, 0x28) : _mm512_xor_si512(w0, x);
            __m512i d1 = masked ? _mm512_ternarylogic_epi64(w1, x, mask, 0x28) : _mm512_xor_si512(w1, x);
            low[p] = _mm512_add_epi64(low[p], _mm512_popcnt_epi64(d0));
            high[p] = _mm512_add_epi64(high[p], _mm512_popcnt_epi64(d1));
        }
    }
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    for (int p = 0; p < TILE; p++) out[p] = (ints)_mm512_permutex2var_epi32(low[p], even, high[p]);
}

static TARGET inline lanes NAME(fma)(lanes x, lanes y, lanes z) {
    return (lanes)_mm512_fmadd_ps((__m512)x, (__m512)y, (__m512)z);
}

/* What is no number stays none. */
static TARGET inline lanes NAME(hardtanh)(lanes x) {
    __m512 below = _mm512_min_ps(_mm512_set1_ps(1), (__m512)x);
    return (lanes)_mm512_max_ps(_mm512_set1_ps(-1), below);
}

static TARGET inline lanes NAME(prelu)(lanes x, lanes slope) {
    __mmask16 above = _mm512_cmp_ps_mask((__m512)x, _mm512_setzero_ps(), _CMP_GT_OQ);
    return (lanes)_mm512_mask_blend_ps(above, _mm512_mul_ps((__m512)x, (__m512)slope), (__m512)x);
}

static TARGET inline uint32_t NAME(signs)(lanes x, lanes threshold) {
    return _mm512_cmp_ps_mask((__m512)x, (__m512)threshold, _CMP_GE_OQ);
}

#elif PATH == AVX2
TARGET INLINE void NAME(mismatches)(const uint64_t *a, const uint64_t *const *m, const uint64_t *w, int64_t words,
                                    int64_t patch, int masked, ints out[TILE]) {
    const __m256i table = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
    const __m256i nibble = _mm256_set1_epi8(15), zero = _mm256_setzero_si256();
    for (int p = 0; p < TILE; p++) {
        __m256i total[4] = {zero, zero, zero, zero};
        for (int64_t first = 0; first < words; first += 31) { /* 31 times 8 ones still fit a byte */
            __m256i count[4] = {zero, zero, zero, zero};
            for (int64_t i = first; i < least(words, first + 31); i++) {
                __m256i x = _mm256_set1_epi64x(a[p * patch + i]), mask = _mm256_set1_epi64x(masked ? m[p][i] : ~0ull);
                for (int v = 0; v < 4; v++) {
                    __m256i bits = _mm256_loadu_si256((const __m256i *)(w + LANES * i + 4 * v));
                    bits = _mm256_and_si256(_mm256_xor_si256(bits, x), mask);
                    __m256i low = _mm256_shuffle_epi8(table, _mm256_and_si256(bits, nibble));
                    __m256i high = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(bits, 4), nibble));
                    count[v] = _mm256_add_epi8(count[v], _mm256_add_epi8(low, high));
                }
            }
            for (int v = 0; v < 4; v++) total[v] = _mm256_add_epi64(total[v], _mm256_sad_epu8(count[v], zero));
        }
        for (int v = 0; v < 4; v++)
            for (int i = 0; i < 4; i++) out[p][4 * v + i] = ((int64_t *)&total[v])[i];
    }
}

static TARGET inline lanes NAME(fma)(lanes x, lanes y, lanes z) {
    lanes result;
    for (int i = 0; i < LANES; i += 8) {
        float *px = (float *)&x + i, *py = (float *)&y + i, *pz = (float *)&z + i;
        __m256 sum = _mm256_fmadd_ps(_mm256_loadu_ps(px), _mm256_loadu_ps(py), _mm256_loadu_ps(pz));
        _mm256_storeu_ps((float *)&result + i, sum);
    }
    return result;
}

static TARGET inline lanes NAME(hardtanh)(lanes x) {
    for (int i = 0; i < LANES; i += 8) {
        __m256 below = _mm256_min_ps(_mm256_set1_ps(1), _mm256_loadu_ps((float *)&x + i));
        _mm256_storeu_ps((float *)&x + i, _mm256_max_ps(_mm256_set1_ps(-1), below));
    }
    return x;
}

static TARGET inline lanes NAME(prelu)(lanes x, lanes slope) {
    for (int i = 0; i < LANES; i += 8) {
        __m256 value = _mm256_loadu_ps((float *)&x + i), below = _mm256_mul_ps(value, _mm256_loadu_ps((float *)&slope + i));
        __m256 above = _mm256_cmp_ps(value, _mm256_setzero_ps(), _CMP_GT_OQ);
        _mm256_storeu_ps((float *)&x + i, _mm256_blendv_ps(below, value, above));
    }
    return x;
}

static TARGET inline uint32_t NAME(signs)(lanes x, lanes threshold) {
    uint32_t result = 0;
    for (int i = 0; i < LANES; i += 8) {
        __m256 value = _mm256_loadu_ps((float *)&x + i), bound = _mm256_loadu_ps((float *)&threshold + i);
        __m256 at_least = _mm256_cmp_ps(value, bound, _CMP_GE_OQ);
        result |= (uint32_t)_mm256_movemask_ps(at_least) << i;
    }
    return result;
}

#else
#if PATH == NEON
INLINE void NAME(mismatches)(const uint64_t *a, const uint64_t *const *m, const uint64_t *w, int64_t words, int64_t patch,
                             int masked, ints out[TILE]) {
    for (int p = 0; p < TILE; p++)
        for (int v = 0; v < LANES; v += 2) {
            uint64x2_t total = vdupq_n_u64(0);
            for (int64_t first = 0; first < words; first += 31) { /* 31 times 8 ones still fit a byte */
                uint8x16_t count = vdupq_n_u8(0);
                for (int64_t i = first; i < least(words, first + 31); i++) {
                    uint64x2_t bits = veorq_u64(vld1q_u64(w + LANES * i + v), vdupq_n_u64(a[p * patch + i]));
                    bits = vandq_u64(bits, vdupq_n_u64(masked ? m[p][i] : ~0ull));
                    count = vaddq_u8(count, vcntq_u8(vreinterpretq_u8_u64(bits)));
                }
                total = vaddq_u64(total, vpaddlq_u32(vpaddlq_u16(vpaddlq_u8(count))));
            }
            out[p][v] = vgetq_lane_u64(total, 0);
            out[p][v + 1] = vgetq_lane_u64(total, 1);
        }
}
#else
INLINE int32_t NAME(ones)(uint64_t x) { /* without any instruction for it */
    x -= x >> 1 & 0x5555555555555555;
    x = (x & 0x3333333333333333) + (x >> 2 & 0x3333333333333333);
    return ((x + (x >> 4)) & 0x0f0f0f0f0f0f0f0f) * 0x0101010101010101 >> 56;
}

INLINE void NAME(mismatches)(const uint64_t *a, const uint64_t *const *m, const uint64_t *w, int64_t words, int64_t patch,
                             int masked, ints out[TILE]) {
    for (int p = 0; p < TILE; p++) {
        int32_t total[LANES] = {0};
        for (int64_t i = 0; i < words; i++) {
            uint64_t mask = masked ? m[p][i] : ~0ull;
            for (int v = 0; v < LANES; v++) total[v] += NAME(ones)((w[LANES * i + v] ^ a[p * patch + i]) & mask);
        }
        for (int v = 0; v < LANES; v++) out[p][v] = total[v];
    }
}
#endif

static inline lanes NAME(fma)(lanes x, lanes y, lanes z) {
    for (int i = 0; i < LANES; i++) z[i] = fmaf(x[i], y[i], z[i]);
    return z;
}

static inline lanes NAME(hardtanh)(lanes x) {
    for (int i = 0; i < LANES; i++) x[i] = x[i] > 1 ? 1 : x[i] < -1 ? -1 : x[i];
    return x;
}

static inline lanes NAME(prelu)(lanes x, lanes slope) {
    for (int i = 0; i < LANES; i++) x[i] = x[i] > 0 ? x[i] : x[i] * slope[i];
    return x;
}

static inline uint32_t NAME(signs)(lanes x, lanes threshold) {
    uint32_t result = 0;
    for (int i = 0; i < LANES; i++) result |= (uint32_t)(x[i] >= threshold[i]) << i;
    return result;
}
#endif

static TARGET inline lanes NAME(normalized)(int64_t fused, lanes x, lanes gain, lanes shift) {
    if (fused) return NAME(fma)(x, gain, shift);
    return x * gain + shift;
}

/* The activation of `valid` channels from `channel` on. */
TARGET INLINE lanes NAME(activated)(const After *a, int has, lanes x, int64_t channel, int64_t valid) {
    if (has & CLAMP) x = NAME(hardtanh)(x);
    if (has & SHIFTED) x -= load(a->before + channel, valid);
    if (has & PRELU) x = NAME(prelu)(x, load(a->slope + channel, valid));
    if (has & SHIFTED) x += load(a->after + channel, valid);
    return x;
}

/* The bits of `valid` channels from `channel` on of the pixel at a place. */
TARGET INLINE void NAME(give_bits)(const After *a, int has, lanes x, int64_t place, int64_t channel, int64_t valid) {
    lanes threshold = {0};
    if (has & THRESHOLD) threshold = load(a->threshold + channel, valid);
    store_bits(a->bits + place * ((a->channels + 7) / 8) + channel / 8, NAME(signs)(x, threshold), valid);
}

/* Bias, batch norm, skip and activation of `valid` channels from `channel` on of the pixel at a place, and where they go. */
TARGET INLINE void NAME(finish)(const After *a, int has, lanes x, int64_t place, int64_t channel, int64_t valid) {
    int64_t at = place * a->channels + channel;
    if (has & ANY) has = a->has;
    if (has & WHOLE) valid = LANES;
    if (has & BIAS) x += load(a->bias + channel, valid);
    if (has & NORM) x = NAME(normalized)(a->fused, x, load(a->gain + channel, valid), load(a->shift + channel, valid));
    if (has & SKIP) x += load(a->skip + at, valid);
    x = NAME(activated)(a, has, x, channel, valid);
    if (has & OUT) store(a->out + at, x, valid);
    if (has & BITS) NAME(give_bits)(a, has, x, place, channel, valid);
}

/* The sums of a tile and sixteen channels: of each pixel, or the maximum of alpha times them in the first. */
static TARGET inline void NAME(sums)(const Conv *c, const ints mismatches[TILE], const int32_t terms[TILE], lanes alpha,
                                     lanes out[TILE]) {
    ints sum[TILE];
    for (int p = 0; p < TILE; p++) sum[p] = terms[p] - 2 * mismatches[p];
    if (c->pool) {
        ints turned = (ints)(alpha < 0);
        for (int p = 0; p < TILE; p++) sum[p] = (sum[p] ^ turned) - turned;
        for (int p = 1; p < TILE; p++) {
            ints more = sum[p] > sum[0];
            sum[0] = (more & sum[p]) | (~more & sum[0]);
        }
        sum[0] = (sum[0] ^ turned) - turned;
    }
    for (int p = 0; p < TILE; p++) out[p] = __builtin_convertvector(sum[p], lanes) * alpha;
}

/* What gather_taps does, for all pixels of a tile, row by row: for one group whose windows leave nothing out. Rows are read
 * on over their ends, into the slack around them. It is a function of its own for the sake of the registers. */
static TARGET __attribute__((noinline)) void NAME(gather_rows)(const Conv *c, const uint8_t *bits, const int64_t y[TILE],
                                                               const int64_t x[TILE], uint64_t *to, int64_t patch) {
    int64_t bytes = (c->head.channels + 7) / 8, line = c->head.width * bytes, row = c->kernel_w * bytes;
    for (int p = 0; p < TILE; p++, to += patch) {
        int64_t y0 = y[p] * c->stride_h - c->pad_h, last = least(c->kernel_h, c->head.height - y0);
        const uint8_t *from = bits + y0 * line + (x[p] * c->stride_w - c->pad_w) * bytes;
        if (row <= COPY) /* one step a row, and no loop around it */
            for (int64_t i = most(0, -y0); i < last; i++) memcpy((uint8_t *)to + i * row, from + i * line, COPY);
        else
            for (int64_t i = most(0, -y0); i < last; i++) copy((uint8_t *)to + i * row, from + i * line, row);
    }
}

/* The tiles from `first` to `last`; part of `parts` parts of the output channels. has: what is done with the result. */
TARGET INLINE void NAME(tiles)(const Run *r, const Conv *c, const After *a, int has, int64_t first, int64_t last,
                               int64_t part, int64_t parts) {
    const uint8_t *in = value(r, c->head.in);
    const uint64_t *weights = tensor(r, c->bits), *masks = tensor(r, c->masks);
    const int32_t *terms = tensor(r, c->terms), *rows = tensor(r, c->classes), *columns = rows + c->conv_height;
    const float *alpha = tensor(r, c->alpha);
    int64_t pixels = c->head.out_height * c->head.out_width, size = c->pool ? 1 : TILE, patch = r->gather_words;
    int64_t channels = c->out_channels / c->groups, blocks = (channels + LANES - 1) / LANES, words = c->words;
    int64_t row_bits = c->kernel_w * 8 * ((c->head.channels / c->groups + 7) / 8);
    int64_t dilation = has & ANY ? c->dilation_h : 1; /* of the rows; the other sets are for none at all */
    Pixel next = pixel_at(c, size * first);
    for (int64_t tile = first; tile < last; tile++) {
        int64_t place = size * tile, count = least(size, pixels - place), y[TILE], x[TILE], masked = 0;
        int64_t top = c->kernel_h, bottom = 0; /* the rows of the kernel that meet the image at all */
        const uint64_t *m[TILE];
        int32_t t[TILE];
        for (int p = 0; p < TILE; p++) {
            y[p] = c->pool ? 2 * next.row + p / 2 : next.row;
            x[p] = c->pool ? 2 * next.column + p % 2 : next.column;
            int64_t kind = rows[y[p]] + columns[x[p]];
            m[p] = masks + kind * words;
            t[p] = terms[kind];
            masked |= kind != c->inside;
            int64_t start = y[p] * c->stride_h - c->pad_h;
            top = least(top, taps(-start, dilation));
            bottom = most(bottom, least(c->kernel_h, taps(c->head.height - start, dilation)));
            if (c->pool ? p == TILE - 1 : p < count - 1 || count == TILE) advance(&next); /* else the last one again */
        }
        int64_t begin = top * row_bits / 64, end = (bottom * row_bits + 63) / 64;
        for (int p = 0; p < TILE; p++) m[p] += begin;
        for (int64_t g = 0; g < c->groups; g++) {
            if (c->groups == 1 && (!(has & ANY) || (c->dilation_h == 1 && c->dilation_w == 1)))
                NAME(gather_rows)(c, in, y, x, r->gathered, patch);
            else
                for (int p = 0; p < TILE; p++) gather_taps(c, in, g, y[p], x[p], (uint8_t *)(r->gathered + p * patch));
            for (int64_t b = blocks * part / parts; b < blocks * (part + 1) / parts; b++) {
                int64_t valid = has & WHOLE ? LANES : least(LANES, channels - LANES * b), channel = g * channels + LANES * b;
                const uint64_t *w = weights + ((g * blocks + b) * words + begin) * LANES, *seen = r->gathered + begin;
                ints counts[TILE];
                lanes results[TILE];
                if (masked)
                    NAME(mismatches)(seen, m, w, end - begin, patch, 1, counts);
                else
                    NAME(mismatches)(seen, m, w, end - begin, patch, 0, counts);
                NAME(sums)(c, counts, t, load(alpha + channel, valid), results);
                if (count == TILE) /* unrolled */
                    for (int p = 0; p < TILE; p++) NAME(finish)(a, has, results[p], place + p, channel, valid);
                else
                    for (int p = 0; p < count; p++) NAME(finish)(a, has, results[p], place + p, channel, valid);
            }
        }
    }
}

/* This share's tiles; where there are fewer tiles than shares, its part of the output channels of all of them. */
static TARGET void NAME(conv)(const Run *r, const Conv *c) {
    int64_t pixels = c->head.out_height * c->head.out_width, tiles = c->pool ? pixels : (pixels + TILE - 1) / TILE;
    int64_t channels = c->out_channels / c->groups, first = 0, last = tiles, part = 0, parts = 1;
    const After a = after(r, &c->head, c->bias, c->out_channels, channels % LANES == 0);
    if (tiles < r->shares && c->groups == 1) {
        part = r->share;
        parts = r->shares;
    } else {
        own(r, tiles, &first, &last);
    }
    switch (c->dilation_h == 1 && c->dilation_w == 1 ? a.has : ANY) {
#define WITH(set) case set: NAME(tiles)(r, c, &a, set, first, last, part, parts); break;
        WITH(WHOLE | NORM | CLAMP | BITS)
        WITH(WHOLE | NORM | CLAMP | OUT)
        WITH(WHOLE | NORM | CLAMP | OUT | BITS)
        WITH(WHOLE | NORM | SKIP | CLAMP | OUT)
        WITH(WHOLE | NORM | SKIP | CLAMP | OUT | BITS)
        WITH(WHOLE | NORM | CLAMP | BITS | THRESHOLD)
        WITH(WHOLE | NORM | SKIP | CLAMP | OUT | BITS | THRESHOLD)
        WITH(WHOLE | NORM | PRELU | SHIFTED | BITS | THRESHOLD)
        WITH(WHOLE | NORM | SKIP | PRELU | SHIFTED | OUT)
        WITH(WHOLE | NORM | SKIP | PRELU | SHIFTED | OUT | BITS | THRESHOLD)
    default: NAME(tiles)(r, c, &a, ANY, first, last, part, parts);
#undef WITH
    }
}

/* The maximum over a window of what batch norm and activation make of real values. */
TARGET INLINE lanes NAME(largest)(const Tail *t, const After *a, const float *in, int64_t row, int64_t column,
                                  int64_t channel, int64_t valid) {
    const Head *h = &t->head;
    int64_t y0 = row * t->stride - t->pad, x0 = column * t->stride - t->pad;
    lanes result = {0}, gain = a->gain ? load(a->gain + channel, valid) : result;
    lanes shift = a->gain ? load(a->shift + channel, valid) : result;
    int begun = 0;
    for (int64_t y = most(0, y0); y < least(h->height, y0 + t->kernel); y++)
        for (int64_t x = most(0, x0); x < least(h->width, x0 + t->kernel); x++) {
            lanes v = load(in + (y * h->width + x) * h->channels + channel, valid);
            if (a->gain) v = NAME(normalized)(a->fused, v, gain, shift);
            v = NAME(activated)(a, a->has, v, channel, valid);
            ints keep = (ints)(v <= result) | (ints)(result != result); /* what is no number stays */
            result = begun ? (lanes)((keep & (ints)result) | (~keep & (ints)v)) : v;
            begun = 1;
        }
    return result;
}

TARGET INLINE void NAME(pixels)(const After *a, int has, const float *in, int64_t first, int64_t last) {
    for (int64_t place = first; place < last; place++)
        for (int64_t channel = 0; channel < a->channels; channel += LANES) {
            int64_t valid = has & WHOLE ? LANES : least(LANES, a->channels - channel);
            NAME(finish)(a, has, load(in + place * a->channels + channel, valid), place, channel, valid);
        }
}

/* Batch norm, skip and activation of real values, or the maximum over windows of batch norm and activation. */
static TARGET void NAME(tail)(const Run *r, const Tail *t) {
    const Head *h = &t->head;
    const float *in = value(r, h->in);
    int64_t first, last, width = h->out_width;
    After a = after(r, h, -1, h->channels, h->channels % LANES == 0), behind = a;
    own(r, h->out_height, &first, &last);
    if (t->kernel > 1 || t->stride > 1) {
        behind.has &= ~(NORM | CLAMP | PRELU | SHIFTED); /* they are done before the maximum */
        for (int64_t place = first * width; place < last * width; place++)
            for (int64_t channel = 0; channel < h->channels; channel += LANES) {
                int64_t valid = least(LANES, h->channels - channel);
                lanes x = NAME(largest)(t, &a, in, place / width, place % width, channel, valid);
                NAME(finish)(&behind, ANY, x, place, channel, valid);
            }
        return;
    }
    switch (a.has) {
#define WITH(set) case set: NAME(pixels)(&a, set, in, first * width, last * width); break;
        WITH(WHOLE | BITS)
        WITH(WHOLE | BITS | THRESHOLD)
        WITH(WHOLE | NORM | OUT)
        WITH(WHOLE | NORM | OUT | BITS)
        WITH(WHOLE | NORM | CLAMP | BITS)
        WITH(WHOLE | NORM | CLAMP | OUT | BITS)
        WITH(WHOLE | NORM | CLAMP | OUT | BITS | THRESHOLD)
        WITH(WHOLE | NORM | PRELU | SHIFTED | OUT | BITS | THRESHOLD)
    default: NAME(pixels)(&a, ANY, in, first * width, last * width);
#undef WITH
    }
}

/* The mean over square windows, those at the end cut off, some times side by side, between channels of zeros. */
static TARGET void NAME(average)(const Run *r, const Average *a) {
    const Head *h = &a->head;
    const float *in = value(r, h->in);
    float *out = value(r, h->out);
    int64_t first, last;
    own(r, h->out_height * h->out_width, &first, &last);
    for (int64_t at = first; at < last; at++) {
        int64_t row = at / h->out_width, y0 = row * a->window, x0 = (at - row * h->out_width) * a->window;
        int64_t y1 = least(h->height, y0 + a->window), x1 = least(h->width, x0 + a->window);
        float *pixel = out + at * a->out_channels, count = (y1 - y0) * (x1 - x0);
        memset(pixel, 0, a->out_channels * sizeof(float));
        for (int64_t channel = 0; channel < h->channels; channel += LANES) {
            int64_t valid = least(LANES, h->channels - channel);
            lanes sum = {0};
            for (int64_t y = y0; y < y1; y++)
                for (int64_t x = x0; x < x1; x++) sum += load(in + (y * h->width + x) * h->channels + channel, valid);
            for (int64_t i = 0; i < a->copies; i++)
                store(pixel + a->front + i * h->channels + channel, sum / count, valid);
        }
    }
}

/* The sums of a tile and of as many blocks of sixteen channels. They begin with 0 and take one product after the other,
 * each rounded together with the sum, as torch's do. */
TARGET INLINE void NAME(products)(const float *seen, const float *weights, int64_t count, int blocks, lanes sums[2][TILE]) {
    for (int p = 0; p < TILE; p++) sums[0][p] = sums[1][p] = (lanes){0};
    for (int64_t i = 0; i < count; i++)
        for (int p = 0; p < TILE; p++) {
            lanes x = (lanes){0} + seen[p * count + i];
            for (int b = 0; b < blocks; b++)
                sums[b][p] = NAME(fma)(x, *(const lanes *)(weights + (b * count + i) * LANES), sums[b][p]);
        }
}

/* The tiles from `first` to `last` of a real convolution. has: what is done with the result. */
TARGET INLINE void NAME(real_tiles)(const Run *r, const Real *c, const After *a, int has, int64_t first, int64_t last) {
    const float *in = value(r, c->head.in);
    int64_t count = c->kernel_h * c->kernel_w * c->head.channels, pixels = c->head.out_height * c->head.out_width;
    int64_t all = (c->out_channels + LANES - 1) / LANES;
    float *seen = (float *)r->gathered, *weights = seen + count * TILE;
    order_weights(c, tensor(r, c->weights), weights);
    for (int64_t place = first * TILE; place < least(last * TILE, pixels); place += TILE) {
        gather_reals(c, in, place, seen);
        for (int64_t block = 0; block < all; block += 2) {
            lanes sums[2][TILE];
            const float *w = weights + block * count * LANES;
            if (block + 1 < all)
                NAME(products)(seen, w, count, 2, sums);
            else
                NAME(products)(seen, w, count, 1, sums);
            for (int64_t b = block; b < least(block + 2, all); b++)
                for (int p = 0; p < least(TILE, pixels - place); p++) {
                    int64_t valid = has & WHOLE ? LANES : least(LANES, c->out_channels - b * LANES);
                    NAME(finish)(a, has, sums[b - block][p], place + p, b * LANES, valid);
                }
        }
    }
}

/* A convolution of real values, and what follows it. */
static TARGET void NAME(real)(const Run *r, const Real *c) {
    int64_t first, last;
    const After a = after(r, &c->head, -1, c->out_channels, c->out_channels % LANES == 0);
    own(r, (c->head.out_height * c->head.out_width + TILE - 1) / TILE, &first, &last);
    switch (a.has) {
#define WITH(set) case set: NAME(real_tiles)(r, c, &a, set, first, last); break;
        WITH(WHOLE | OUT)
        WITH(WHOLE | NORM | CLAMP | OUT)
        WITH(WHOLE | NORM | CLAMP | OUT | BITS)
        WITH(WHOLE | NORM | CLAMP | OUT | BITS | THRESHOLD)
        WITH(WHOLE | NORM | PRELU | SHIFTED | OUT | BITS | THRESHOLD)
    default: NAME(real_tiles)(r, c, &a, ANY, first, last);
#undef WITH
    }
}

static TARGET void NAME(step)(const Run *r, const Head *instruction) {
    switch (instruction->code) {
    case CONV: NAME(conv)(r, (const Conv *)instruction); break;
    case TAIL: NAME(tail)(r, (const Tail *)instruction); break;
    case AVERAGE: NAME(average)(r, (const Average *)instruction); break;
    case REAL: NAME(real)(r, (const Real *)instruction);
    }
}
