/* The instructions of packed.c for one kind of processor: NAME, TARGET and PATH say which. */

/* Sixteen channels, a block, are worked on in PARTS of as many as its vectors hold. */
#if PATH == AVX512
#define VECTOR LANES
#else
#define VECTOR (LANES / 2)
#endif
#define PARTS (LANES / VECTOR)
#define BLOCKS (PATH == AVX2 ? 2 : 1) /* that are counted together */
#define lanes NAME(lanes)
#define ints NAME(ints)
typedef float lanes __attribute__((vector_size(4 * VECTOR), aligned(4), may_alias));
typedef int32_t ints __attribute__((vector_size(4 * VECTOR), aligned(4), may_alias));

TARGET INLINE lanes NAME(load)(const float *x, int64_t valid) {
    if (valid == VECTOR) return *(const lanes *)x;
    lanes result = {0};
    for (int64_t i = 0; i < valid; i++) result[i] = x[i];
    return result;
}

TARGET INLINE void NAME(store)(float *x, lanes value, int64_t valid) {
    if (valid == VECTOR) {
        *(lanes *)x = value;
        return;
    }
    for (int64_t i = 0; i < valid; i++) x[i] = value[i];
}

INLINE void NAME(store_bits)(uint8_t *x, uint32_t signs, int64_t valid) {
    if (valid < VECTOR) signs &= (1u << valid) - 1;
    x[0] = signs;
    if (valid > 8) x[1] = signs >> 8;
}

#if PATH == AVX512
TARGET INLINE __m512i NAME(differ)(const uint32_t *w, uint32_t a) {
    return _mm512_xor_si512(_mm512_loadu_si512(w), _mm512_set1_epi32(a));
}

/* The activations up to a word, from those before it: before ^ (word & mask). */
TARGET INLINE __m512i NAME(seen_up_to)(__m512i before, const uint8_t *from, uint32_t mask) {
    int32_t word;
    memcpy(&word, from, sizeof(word));
    return _mm512_ternarylogic_epi32(before, _mm512_set1_epi32(word), _mm512_set1_epi32(mask), 0x78);
}

/* Two words of a pixel: the ones of their carry, `two ? ~next : sum`, are added to `carries`; the parity up to them becomes
 * `next`, and that up to the words before, `sum`, is used up. In assembly, as compilers copy what is used up first. */
TARGET INLINE void NAME(pair)(const uint32_t *w, const uint32_t *a, __m512i *sum, __m512i *carries, __m512i *next) {
    __m512i first = _mm512_loadu_si512(w), second = _mm512_loadu_si512(w + LANES), two;
    __asm__("vpxord %[x]%{1to16%}, %[first], %[two]\n\t"
            "vpxord %[y]%{1to16%}, %[second], %[next]\n\t"
            "vpternlogd $0x74, %[next], %[two], %[sum]\n\t"
            "vpopcntd %[sum], %[sum]\n\t"
            "vpaddd %[sum], %[carries], %[carries]"
            : [sum] "+v"(*sum), [carries] "+v"(*carries), [two] "=&v"(two), [next] "=&v"(*next)
            : [first] "v"(first), [second] "v"(second), [x] "m"(a[0]), [y] "m"(a[1]));
}

/* For each pixel of a tile and sixteen output channels: the ones of a ^ w over the words from `first` to `last`. */
TARGET INLINE void NAME(mismatches)(const uint32_t *a, const uint32_t *w, Words seen, int64_t patch, ints out[TILE][PARTS]) {
    __m512i sum[TILE], carries[TILE], next[TILE];
    int64_t i = seen.first, odd = i == 0 && seen.last % 2;
    for (int p = 0; p < TILE; p++) {
        carries[p] = _mm512_setzero_si512();
        sum[p] = odd ? NAME(differ)(w, a[p * patch]) : i ? _mm512_loadu_si512(w + LANES * (i - 1)) : carries[p];
    }
    i += odd;
    for (; i + 3 < seen.last; i += 4) {
        const uint32_t *weights = w + LANES * i, *pixels = a + i;
        for (int p = 0; p < TILE; p++) NAME(pair)(weights, pixels + p * patch, &sum[p], &carries[p], &next[p]);
        weights += 2 * LANES, pixels += 2;
        for (int p = 0; p < TILE; p++) NAME(pair)(weights, pixels + p * patch, &next[p], &carries[p], &sum[p]);
    }
    if (i + 1 < seen.last) {
        for (int p = 0; p < TILE; p++) NAME(pair)(w + LANES * i, a + p * patch + i, &sum[p], &carries[p], &next[p]);
        for (int p = 0; p < TILE; p++) sum[p] = next[p];
        i += 2;
    }
    for (int p = 0; p < TILE && i < seen.last; p++) { /* a last word that is alone: its carry needs no third one */
        __m512i two = NAME(differ)(w + LANES * i, a[p * patch + i]);
        __m512i carry = _mm512_andnot_si512(two, sum[p]);
        carries[p] = _mm512_add_epi32(carries[p], _mm512_popcnt_epi32(carry));
        sum[p] = two;
    }
    for (int p = 0; p < TILE; p++)
        out[p][0] = (ints)_mm512_add_epi32(_mm512_add_epi32(carries[p], carries[p]), _mm512_popcnt_epi32(sum[p]));
}

/* The same of windows in place, whose activations are not yet masked and XORed with those before. */
TARGET INLINE void NAME(mismatches_in_place)(const Kernel *k, const Tile *t, const uint32_t *w, ints out[TILE][PARTS]) {
    __m512i sum[TILE], carries[TILE], a[TILE];
    int64_t i = t->seen.first;
    for (int p = 0; p < TILE; p++) {
        a[p] = carries[p] = _mm512_setzero_si512();
        sum[p] = i ? _mm512_loadu_si512(w + LANES * (i - 1)) : carries[p];
    }
    for (; i + 1 < t->seen.last; i += 2) {
        __m512i first = _mm512_loadu_si512(w + LANES * i), second = _mm512_loadu_si512(w + LANES * (i + 1));
        for (int p = 0; p < TILE; p++) {
            a[p] = NAME(seen_up_to)(a[p], t->from[p] + k->places[i], t->masks[p][i]);
            __m512i two = _mm512_xor_si512(first, a[p]);
            a[p] = NAME(seen_up_to)(a[p], t->from[p] + k->places[i + 1], t->masks[p][i + 1]);
            __m512i next = _mm512_xor_si512(second, a[p]);
            __m512i carry = _mm512_ternarylogic_epi32(sum[p], two, next, 0x74); /* two ? ~next : sum */
            carries[p] = _mm512_add_epi32(carries[p], _mm512_popcnt_epi32(carry));
            sum[p] = next;
        }
    }
    for (int p = 0; p < TILE && i < t->seen.last; p++) {
        a[p] = NAME(seen_up_to)(a[p], t->from[p] + k->places[i], t->masks[p][i]);
        __m512i two = _mm512_xor_si512(_mm512_loadu_si512(w + LANES * i), a[p]);
        carries[p] = _mm512_add_epi32(carries[p], _mm512_popcnt_epi32(_mm512_andnot_si512(two, sum[p])));
        sum[p] = two;
    }
    for (int p = 0; p < TILE; p++)
        out[p][0] = (ints)_mm512_add_epi32(_mm512_add_epi32(carries[p], carries[p]), _mm512_popcnt_epi32(sum[p]));
}

static TARGET inline lanes NAME(fma)(lanes x, lanes y, lanes z) {
    return (lanes)_mm512_fmadd_ps((__m512)x, (__m512)y, (__m512)z);
}

/* z and a number times y, rounded once. */
static TARGET inline lanes NAME(add_product)(const float *x, lanes y, lanes z) {
    return (lanes)_mm512_fmadd_ps(_mm512_set1_ps(*x), (__m512)y, (__m512)z);
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

static TARGET inline uint32_t NAME(at_most)(ints x, const int32_t *limits) {
    return _mm512_cmple_epi32_mask((__m512i)x, _mm512_loadu_si512(limits));
}

#elif PATH == AVX2
/* Where each byte of gathered activations is looked up: the offset of its row of DIFFERENCES, of 16 bits, takes its place;
 * from the end, so that each word is read before its place is written to. */
static TARGET __attribute__((noinline)) void NAME(rows_of)(uint32_t *a, const uint32_t *masks, Words seen) {
    int64_t i = seen.last;
    for (; i % 4 && i > seen.first; i--) {
        __m128i bytes = _mm_cvtsi32_si128(a[i - 1] & masks[i - 1]);
        _mm_storel_epi64((__m128i *)(a + 2 * (i - 1)), _mm_slli_epi16(_mm_cvtepu8_epi16(bytes), 5));
    }
    for (i -= 4; i >= 0 && i + 4 > seen.first; i -= 4) { /* may begin before the first one, with words that nobody reads */
        __m128i bytes = _mm_and_si128(_mm_loadu_si128((__m128i *)(a + i)), _mm_loadu_si128((__m128i *)(masks + i)));
        _mm256_storeu_si256((__m256i *)(a + 2 * i), _mm256_slli_epi16(_mm256_cvtepu8_epi16(bytes), 5));
    }
}

/* For each pixel of a tile and one block or two: in how many bits the activations from `i` to `end` differ from weights, in
 * lower nibbles and in upper ones by themselves. Sixteen weights' nibbles are looked up by one instruction, in the row that
 * a byte of activations says. */
TARGET INLINE void NAME(look_up)(const uint16_t *a, int64_t patch, const uint8_t *nibbles, int64_t next, int64_t i,
                                 int64_t end, int blocks, __m256i sums[BLOCKS * TILE]) {
    const uint16_t *b = a + patch, *c = b + patch, *d = c + patch;
    __m256i s0 = _mm256_setzero_si256(), s1 = s0, s2 = s0, s3 = s0, t0 = s0, t1 = s0, t2 = s0, t3 = s0;
    for (; i < end; i++) {
#define ROW_OF(x) _mm256_load_si256((const __m256i *)(DIFFERENCES[0] + x[i]))
        __m256i r0 = ROW_OF(a), r1 = ROW_OF(b), r2 = ROW_OF(c), r3 = ROW_OF(d);
#undef ROW_OF
        __m256i w = _mm256_loadu_si256((const __m256i *)(nibbles + 32 * i));
        s0 = _mm256_add_epi8(s0, _mm256_shuffle_epi8(r0, w));
        s1 = _mm256_add_epi8(s1, _mm256_shuffle_epi8(r1, w));
        s2 = _mm256_add_epi8(s2, _mm256_shuffle_epi8(r2, w));
        s3 = _mm256_add_epi8(s3, _mm256_shuffle_epi8(r3, w));
        if (blocks == 1) continue;
        w = _mm256_loadu_si256((const __m256i *)(nibbles + next + 32 * i));
        t0 = _mm256_add_epi8(t0, _mm256_shuffle_epi8(r0, w));
        t1 = _mm256_add_epi8(t1, _mm256_shuffle_epi8(r1, w));
        t2 = _mm256_add_epi8(t2, _mm256_shuffle_epi8(r2, w));
        t3 = _mm256_add_epi8(t3, _mm256_shuffle_epi8(r3, w));
    }
    sums[0] = s0, sums[1] = s1, sums[2] = s2, sums[3] = s3;
    if (blocks > 1) sums[4] = t0, sums[5] = t1, sums[6] = t2, sums[7] = t3;
}

/* For each pixel of a tile and one block or two: the ones of a ^ w over the words from `first` to `last`. a: offsets, see
 * `rows_of`; patch: of them from one pixel to the next; next: bytes from one block's nibbles to the next one's. A function of
 * its own for the sake of the registers. */
static TARGET __attribute__((noinline)) void NAME(looked_up)(const uint16_t *a, const uint8_t *nibbles, Words seen,
                                                             int64_t patch, int64_t next, int64_t blocks,
                                                             ints out[BLOCKS][TILE][PARTS]) {
#define EACH(q) _Pragma("GCC unroll 8") for (int q = 0; q < BLOCKS * TILE; q++)
    __m256i sums[BLOCKS * TILE], wide[BLOCKS * TILE];
    int64_t i = 4 * seen.first, last = 4 * seen.last;
    EACH(q) out[q / TILE][q % TILE][0] = out[q / TILE][q % TILE][1] = (ints){0};
    while (i < last) { /* 8160 bytes have 65,280 ones at most, which 16 bits hold */
        int64_t limit = least(last, i + 8160);
        EACH(q) wide[q] = _mm256_setzero_si256();
        for (int64_t end; i < limit; i = end) {
            end = least(i + 60, limit); /* 60 times 4 ones fit a byte */
            if (blocks == 1)
                NAME(look_up)(a, patch, nibbles, next, i, end, 1, sums);
            else
                NAME(look_up)(a, patch, nibbles, next, i, end, 2, sums);
            for (int64_t q = 0; q < blocks * TILE; q++) {
                __m256i low = _mm256_cvtepu8_epi16(_mm256_castsi256_si128(sums[q]));
                __m256i high = _mm256_cvtepu8_epi16(_mm256_extracti128_si256(sums[q], 1));
                wide[q] = _mm256_add_epi16(wide[q], _mm256_add_epi16(low, high));
            }
        }
        EACH(q) {
            ints *total = out[q / TILE][q % TILE];
            total[0] += (ints)_mm256_cvtepu16_epi32(_mm256_castsi256_si128(wide[q]));
            total[1] += (ints)_mm256_cvtepu16_epi32(_mm256_extracti128_si256(wide[q], 1));
        }
    }
#undef EACH
}

static TARGET inline lanes NAME(fma)(lanes x, lanes y, lanes z) {
    return (lanes)_mm256_fmadd_ps((__m256)x, (__m256)y, (__m256)z);
}

static TARGET inline lanes NAME(add_product)(const float *x, lanes y, lanes z) {
    return (lanes)_mm256_fmadd_ps(_mm256_broadcast_ss(x), (__m256)y, (__m256)z);
}

static TARGET inline lanes NAME(hardtanh)(lanes x) {
    return (lanes)_mm256_max_ps(_mm256_set1_ps(-1), _mm256_min_ps(_mm256_set1_ps(1), (__m256)x));
}

static TARGET inline lanes NAME(prelu)(lanes x, lanes slope) {
    __m256 above = _mm256_cmp_ps((__m256)x, _mm256_setzero_ps(), _CMP_GT_OQ);
    return (lanes)_mm256_blendv_ps(_mm256_mul_ps((__m256)x, (__m256)slope), (__m256)x, above);
}

static TARGET inline uint32_t NAME(signs)(lanes x, lanes threshold) {
    return _mm256_movemask_ps(_mm256_cmp_ps((__m256)x, (__m256)threshold, _CMP_GE_OQ));
}

static TARGET inline uint32_t NAME(at_most)(ints x, const int32_t *limits) {
    __m256i above = _mm256_cmpgt_epi32((__m256i)x, _mm256_loadu_si256((const __m256i *)limits));
    return ~_mm256_movemask_ps(_mm256_castsi256_ps(above)) & 0xff;
}

#else
#if PATH == NEON
INLINE uint32x4_t NAME(differ)(const uint32_t *w, uint32_t a) { return veorq_u32(vld1q_u32(w), vdupq_n_u32(a)); }

INLINE uint8x16_t NAME(ones)(uint32x4_t x) { return vcntq_u8(vreinterpretq_u8_u32(x)); }

INLINE uint32x4_t NAME(added)(uint8x16_t bytes) { return vpaddlq_u16(vpaddlq_u8(bytes)); }

INLINE void NAME(mismatches)(const uint32_t *a, const uint32_t *w, Words seen, int64_t patch, ints out[TILE][PARTS]) {
    for (int p = 0; p < TILE; p++, a += patch)
        for (int v = 0; v < LANES; v += 4) {
            uint32x4_t total = vdupq_n_u32(0), sum = seen.first ? vld1q_u32(w + LANES * (seen.first - 1) + v) : total;
            for (int64_t first = seen.first; first < seen.last; first += 62) { /* 31 times 8 ones still fit a byte */
                uint8x16_t count = vdupq_n_u8(0);
                for (int64_t i = first; i < least(seen.last, first + 62); i += 2) {
                    int64_t j = least(i + 1, seen.last - 1); /* a last word that is alone has no third one */
                    uint32x4_t two = NAME(differ)(w + LANES * i + v, a[i]), three = NAME(differ)(w + LANES * j + v, a[j]);
                    uint32x4_t carry = veorq_u32(sum, vbicq_u32(two, veorq_u32(sum, three)));
                    count = vaddq_u8(count, NAME(ones)(carry));
                    sum = three;
                }
                total = vaddq_u32(total, NAME(added)(count));
            }
            total = vaddq_u32(vaddq_u32(total, total), NAME(added)(NAME(ones)(sum)));
            vst1q_s32((int32_t *)out[p] + v, vreinterpretq_s32_u32(total));
        }
}
#else
INLINE int32_t NAME(ones)(uint32_t x) { /* without any instruction for it */
    x -= x >> 1 & 0x55555555;
    x = (x & 0x33333333) + (x >> 2 & 0x33333333);
    return ((x + (x >> 4)) & 0x0f0f0f0f) * 0x01010101 >> 24;
}

INLINE void NAME(mismatches)(const uint32_t *a, const uint32_t *w, Words seen, int64_t patch, ints out[TILE][PARTS]) {
    for (int p = 0; p < TILE; p++, a += patch)
        for (int v = 0; v < LANES; v++) {
            uint32_t sum = seen.first ? w[LANES * (seen.first - 1) + v] : 0;
            int32_t total = 0;
            for (int64_t i = seen.first; i < seen.last; i += 2) {
                int64_t j = least(i + 1, seen.last - 1); /* a last word that is alone has no third one */
                uint32_t two = w[LANES * i + v] ^ a[i], three = w[LANES * j + v] ^ a[j];
                total += NAME(ones)((sum & ~two) | (~three & two));
                sum = three;
            }
            out[p][v / VECTOR][v % VECTOR] = 2 * total + NAME(ones)(sum);
        }
}
#endif

static inline lanes NAME(fma)(lanes x, lanes y, lanes z) {
    for (int i = 0; i < VECTOR; i++) z[i] = fmaf(x[i], y[i], z[i]);
    return z;
}

static inline lanes NAME(add_product)(const float *x, lanes y, lanes z) {
    for (int i = 0; i < VECTOR; i++) z[i] = fmaf(*x, y[i], z[i]);
    return z;
}

static inline lanes NAME(hardtanh)(lanes x) {
    for (int i = 0; i < VECTOR; i++) x[i] = x[i] > 1 ? 1 : x[i] < -1 ? -1 : x[i];
    return x;
}

static inline lanes NAME(prelu)(lanes x, lanes slope) {
    for (int i = 0; i < VECTOR; i++) x[i] = x[i] > 0 ? x[i] : x[i] * slope[i];
    return x;
}

static inline uint32_t NAME(signs)(lanes x, lanes threshold) {
    uint32_t result = 0;
    for (int i = 0; i < VECTOR; i++) result |= (uint32_t)(x[i] >= threshold[i]) << i;
    return result;
}

static inline uint32_t NAME(at_most)(ints x, const int32_t *limits) {
    uint32_t result = 0;
    for (int i = 0; i < VECTOR; i++) result |= (uint32_t)(x[i] <= limits[i]) << i;
    return result;
}
#endif

static TARGET inline lanes NAME(normalized)(int64_t fused, lanes x, lanes gain, lanes shift) {
    if (fused) return NAME(fma)(x, gain, shift);
    return x * gain + shift;
}

/* What an instruction's end needs to know of the channels of a vector. */
typedef struct {
    lanes bias, gain, shift, slope, before, after, threshold;
} NAME(Own);

TARGET INLINE NAME(Own) NAME(own_of)(const After *a, int has, int64_t channel, int64_t valid) {
    NAME(Own) own = {{0}};
    if (has & BIAS) own.bias = NAME(load)(a->bias + channel, valid);
    if (has & NORM) own.gain = NAME(load)(a->gain + channel, valid), own.shift = NAME(load)(a->shift + channel, valid);
    if (has & PRELU) own.slope = NAME(load)(a->slope + channel, valid);
    if (has & SHIFTED) own.before = NAME(load)(a->before + channel, valid), own.after = NAME(load)(a->after + channel, valid);
    if (has & THRESHOLD) own.threshold = NAME(load)(a->threshold + channel, valid);
    return own;
}

TARGET INLINE lanes NAME(activated)(int has, const NAME(Own) *own, lanes x) {
    if (has & CLAMP) x = NAME(hardtanh)(x);
    if (has & SHIFTED) x -= own->before;
    if (has & PRELU) x = NAME(prelu)(x, own->slope);
    if (has & SHIFTED) x += own->after;
    return x;
}

/* Bias, batch norm, skip and activation of `valid` channels from `channel` on of the pixel at a place, and where they go. */
TARGET INLINE void NAME(finish)(const After *a, int has, const NAME(Own) *own, lanes x, int64_t place, int64_t channel,
                                int64_t valid) {
    int64_t at = place * a->channels + channel;
    if (has & BIAS) x += own->bias;
    if (has & NORM) x = NAME(normalized)(a->fused, x, own->gain, own->shift);
    if (has & SKIP) x += NAME(load)(a->skip + at, valid);
    x = NAME(activated)(has, own, x);
    if (has & OUT) NAME(store)(a->out + at, x, valid);
    if (has & BITS)
        NAME(store_bits)(a->bits + place * ((a->channels + 7) / 8) + channel / 8, NAME(signs)(x, own->threshold), valid);
}

/* The same of the first `count` pixels from `place` on that are worked on together. */
TARGET INLINE void NAME(finish_tile)(const After *a, int has, const lanes results[TILE], int64_t place, int64_t count,
                                     int64_t channel, int64_t valid) {
    const NAME(Own) own = NAME(own_of)(a, has, channel, valid);
    if (count >= TILE) /* unrolled */
        for (int p = 0; p < TILE; p++) NAME(finish)(a, has, &own, results[p], place + p, channel, valid);
    else
        for (int p = 0; p < count; p++) NAME(finish)(a, has, &own, results[p], place + p, channel, valid);
}

/* The sums of a tile and a vector of channels: of each pixel, or the maximum of alpha times them in the first. */
static TARGET inline void NAME(sums)(int64_t pool, const ints mismatches[TILE], const int32_t *const offsets[TILE],
                                     lanes alpha, lanes out[TILE]) {
    ints sum[TILE];
    for (int p = 0; p < TILE; p++) sum[p] = *(const ints *)offsets[p] - 2 * mismatches[p];
    if (pool) {
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
static TARGET __attribute__((noinline)) void NAME(gather_rows)(const Conv *c, const uint8_t *bits, const Tile *t,
                                                               uint32_t *to, int64_t patch) {
    int64_t bytes = bytes_of(c), line = c->head.width * bytes, row = c->kernel_w * bytes;
    int64_t words = row_words_of(c);
    for (int p = 0; p < TILE; p++, to += patch) {
        int64_t y0 = t->y[p] * c->stride_h - c->pad_h, last = least(c->kernel_h, c->head.height - y0);
        const uint8_t *from = bits + y0 * line + (t->x[p] * c->stride_w - c->pad_w) * bytes;
        if (row <= COPY) /* one step a row, and no loop around it */
            for (int64_t i = most(0, -y0); i < last; i++) memcpy(to + i * words, from + i * line, COPY);
        else
            for (int64_t i = most(0, -y0); i < last; i++) copy((uint8_t *)(to + i * words), from + i * line, row);
    }
}

/* The activations of a tile's pixels, each word XORed with all before it: cut out of rows that sum_rows made. */
static TARGET __attribute__((noinline)) void NAME(gather_sums)(const Conv *c, const uint32_t *rows, const Tile *t,
                                                               uint32_t *to, int64_t patch) {
    int64_t pixel = c->head.channels / WORD, line = line_of(c), row = c->kernel_w * pixel;
    for (int p = 0; p < TILE; p++, to += patch) {
        const uint32_t *from = rows + t->y[p] * c->stride_h * line + t->x[p] * c->stride_w * pixel;
        uint32_t *target = to;
        octet sum = {0}; /* in all of its words */
        for (int64_t i = 0; i < c->kernel_h; i++, from += line, target += row) {
            sum ^= from[0];
            for (int64_t k = 0; k < row; k += 8) {
                octet words;
                memcpy(&words, from + 1 + k, sizeof(words));
                words ^= sum;
                memcpy(target + k, &words, sizeof(words));
            }
            sum ^= from[row];
        }
    }
}

#if PATH != AVX2
/* What was gathered as it lies in the image: masked, and XORed in place with all words before. */
static TARGET __attribute__((noinline)) void NAME(accumulate)(const Tile *t, uint32_t *a, int64_t patch) {
    uint32_t sum[TILE] = {0};
    for (int64_t i = t->seen.first; i < t->seen.last; i++)
        for (int p = 0; p < TILE; p++) a[p * patch + i] = sum[p] ^= a[p * patch + i] & t->masks[p][i];
}
#endif

/* What group g sees around the pixels of a tile. rows: of sum_rows, if there are any. */
TARGET INLINE void NAME(gather)(const Conv *c, int has, const uint8_t *in, const uint32_t *rows, const Tile *t, int64_t g,
                                uint32_t *to, int64_t patch) {
    if (rows) {
        NAME(gather_sums)(c, rows, t, to, patch);
        return;
    }
    if (c->groups == 1 && (!(has & ANY) || (c->dilation_h == 1 && c->dilation_w == 1)))
        NAME(gather_rows)(c, in, t, to, patch);
    else
        for (int p = 0; p < TILE; p++) gather_taps(c, in, g, t->y[p], t->x[p], (uint8_t *)(to + p * patch));
#if PATH == AVX2
    for (int p = 0; p < TILE; p++) NAME(rows_of)(to + p * patch, t->masks[p], t->seen);
#else
    NAME(accumulate)(t, to, patch);
#endif
}

/* The bits of a tile and a vector of channels by their limits. */
TARGET INLINE void NAME(limited)(const Kernel *k, const After *a, const Tile *t, const ints mismatches[TILE],
                                 const int32_t *const limits[TILE], uint32_t turns, int64_t channel, int64_t valid) {
    int64_t bytes = (a->channels + 7) / 8;
    uint8_t *to = a->bits + t->place * bytes + channel / 8;
    uint32_t found[TILE];
    for (int p = 0; p < TILE; p++) found[p] = NAME(at_most)(mismatches[p], limits[p]) ^ turns;
    if (k->pool) found[0] |= found[1] | found[2] | found[3];
    for (int64_t p = 0; p < t->count; p++) NAME(store_bits)(to + p * bytes, found[p] ^ turns >> LANES, valid);
}

/* What is made of the mismatches of a tile: of the channels of a block, of all of which it is number `block`, from `first`
 * of `count` on. has: what is done with the result. */
TARGET INLINE void NAME(block)(const Kernel *k, const After *a, int has, const Tile *t, ints counts[TILE][PARTS],
                               int64_t block, int64_t first, int64_t count) {
    if (has & ANY) has = a->has;
    for (int v = 0; v < PARTS; v++) {
        int64_t valid = has & WHOLE ? VECTOR : least(VECTOR, count - VECTOR * v), channel = first + VECTOR * v;
        if (valid <= 0) return;
        const int32_t *offsets[TILE];
        ints mismatches[TILE];
        lanes results[TILE];
        for (int p = 0; p < TILE; p++) offsets[p] = t->offsets[p] + block * LANES + VECTOR * v, mismatches[p] = counts[p][v];
        if (has & LIMITS) {
            NAME(limited)(k, a, t, mismatches, offsets, k->turns[block] >> VECTOR * v, channel, valid);
            continue;
        }
        NAME(sums)(k->pool, mismatches, offsets, NAME(load)(k->alpha + channel, valid), results);
        NAME(finish_tile)(a, has, results, t->place, t->count, channel, valid);
    }
}

/* The mismatches of a tile with blocks of weights, `number` of them from `block` on, and what is made of them. */
TARGET INLINE void NAME(blocks)(const Kernel *k, const After *a, int has, const Tile *t, const uint32_t *seen, int64_t g,
                                int64_t b, int64_t number) {
    int64_t channels = k->channels, block = g * ((channels + LANES - 1) / LANES) + b;
    ints counts[BLOCKS][TILE][PARTS];
#if PATH == AVX2
    const uint8_t *nibbles = (const uint8_t *)(k->weights + block * k->next);
    NAME(looked_up)((const uint16_t *)seen, nibbles, t->seen, 2 * k->patch, sizeof(uint32_t) * k->next, number, counts);
#elif PATH == AVX512
    if (k->bits && !t->mixed)
        NAME(mismatches_in_place)(k, t, k->weights + block * k->next, counts[0]);
    else
        NAME(mismatches)(seen, k->weights + block * k->next, t->seen, k->patch, counts[0]);
#else
    NAME(mismatches)(seen, k->weights + block * k->next, t->seen, k->patch, counts[0]);
#endif
    for (int64_t n = 0; n < number; n++)
        NAME(block)(k, a, has, t, counts[n], block + n, g * channels + LANES * (b + n), channels - LANES * (b + n));
}

/* The tiles from `first` to `last`; part of `parts` parts of the output channels. Some tiles are gathered, then all of them
 * take some output channels after the other, whose weights stay near. */
TARGET INLINE void NAME(tiles)(const Run *r, const Conv *c, const After *a, int has, int64_t first, int64_t last,
                               int64_t part, int64_t parts) {
    const uint8_t *in = value(r, c->head.in);
    const Kernel kernel = kernel_of(r, c, PATH == AVX512 && !has_whole_words(c), PATH == AVX2), *k = &kernel;
    int64_t patch = k->patch, blocks = (k->channels + LANES - 1) / LANES;
    Pixel next = pixel_at(&c->head, (c->pool ? 1 : TILE) * first);
    Tile tiles[GROUP];
    uint32_t *rows = PATH != AVX2 && has_whole_words(c) ? r->gathered + GROUP * TILE * patch : NULL;
    if (rows && first < last) {
        int64_t end = pixel_at(&c->head, least((c->pool ? 1 : TILE) * last, c->head.out_height * c->head.out_width) - 1).row;
        int64_t stride = (c->pool ? 2 : 1) * c->stride_h, more = c->pool ? c->stride_h : 0;
        sum_rows(c, in, next.row * stride, end * stride + more + c->kernel_h, rows);
    }
    for (int64_t from = first; from < last; from += GROUP) {
        int64_t count = least(GROUP, last - from);
        for (int64_t i = 0; i < count; i++) next_tile(c, k, from + i, &next, tiles + i);
        for (int64_t g = 0; g < c->groups; g++) {
            for (int64_t i = 0; i < count; i++) {
                if (k->bits && !tiles[i].mixed) continue;
                NAME(gather)(c, has, in, rows, tiles + i, g, r->gathered + i * TILE * patch, patch);
            }
            for (int64_t b = blocks * part / parts, end = blocks * (part + 1) / parts; b < end; b += BLOCKS) {
                int64_t number = least(BLOCKS, end - b);
                for (int64_t i = 0; i < count; i++)
                    NAME(blocks)(k, a, has, tiles + i, r->gathered + i * TILE * patch, g, b, number);
            }
        }
    }
}

/* This share's tiles; where there are fewer tiles than shares, its part of the output channels of all of them. */
static TARGET void NAME(conv)(const Run *r, const Conv *c) {
    int64_t pixels = c->head.out_height * c->head.out_width, tiles = c->pool ? pixels : (pixels + TILE - 1) / TILE;
    int64_t channels = c->out_channels / c->groups, first = 0, last = tiles, part = 0, parts = 1;
    After a = after(r, &c->head, c->bias, c->out_channels, channels % LANES == 0);
    if (c->turns >= 0) a.has = (a.has & WHOLE) | BITS | LIMITS;
    if (tiles < r->shares && c->groups == 1) {
        part = r->share;
        parts = r->shares;
    } else {
        own(r, tiles, &first, &last);
    }
    /* here and below the plain path has one set for all, as it is not worth the time that compiling others takes */
    switch (PATH != PLAIN && c->dilation_h == 1 && c->dilation_w == 1 ? a.has : ANY) {
#define WITH(set) case set: NAME(tiles)(r, c, &a, set, first, last, part, parts); break;
        WITH(WHOLE | BITS | LIMITS)
        WITH(WHOLE | NORM | CLAMP | OUT)
        WITH(WHOLE | NORM | CLAMP | OUT | BITS)
        WITH(WHOLE | NORM | SKIP | CLAMP | OUT)
        WITH(WHOLE | NORM | SKIP | CLAMP | OUT | BITS)
        WITH(WHOLE | NORM | SKIP | CLAMP | OUT | BITS | THRESHOLD)
        WITH(WHOLE | NORM | PRELU | SHIFTED | BITS | THRESHOLD)
        WITH(WHOLE | NORM | SKIP | PRELU | SHIFTED | OUT)
        WITH(WHOLE | NORM | SKIP | PRELU | SHIFTED | OUT | BITS | THRESHOLD)
    default: NAME(tiles)(r, c, &a, ANY, first, last, part, parts);
#undef WITH
    }
}

/* The larger one, x if both are equal; what is no number stays. */
TARGET INLINE lanes NAME(larger)(lanes x, lanes y) {
#if PATH == AVX512
    __mmask16 number = _mm512_cmp_ps_mask((__m512)x, (__m512)x, _CMP_ORD_Q);
    __mmask16 take = _mm512_mask_cmp_ps_mask(number, (__m512)y, (__m512)x, _CMP_NLE_UQ);
    return (lanes)_mm512_mask_mov_ps((__m512)x, take, (__m512)y);
#else
    ints keep = (ints)(y <= x) | (ints)(x != x);
    return (lanes)((keep & (ints)x) | (~keep & (ints)y));
#endif
}

/* The maximum over a window of what batch norm and activation make of real values; bare: nothing. */
TARGET INLINE lanes NAME(largest)(const Tail *t, const After *a, const float *in, Window seen, int bare,
                                  int64_t channel, int64_t valid) {
    const Head *h = &t->head;
    NAME(Own) own;
    lanes result = {0};
    if (!bare) own = NAME(own_of)(a, a->has, channel, valid);
    for (int64_t y = seen.top; y < seen.bottom; y++)
        for (int64_t x = seen.left; x < seen.right; x++) {
            lanes v = NAME(load)(in + (y * h->width + x) * h->channels + channel, valid);
            if (!bare && a->gain) v = NAME(normalized)(a->fused, v, own.gain, own.shift);
            if (!bare) v = NAME(activated)(a->has, &own, v);
            result = y == seen.top && x == seen.left ? v : NAME(larger)(result, v);
        }
    return result;
}

/* The maxima of the result's rows from `first` to `last`, and what is done with them: `behind`. bare: channels are whole
 * blocks, too. */
TARGET INLINE void NAME(windows)(const Tail *t, const After *a, const After *behind, const float *in, int bare,
                                 int64_t first, int64_t last) {
    const Head *h = &t->head;
    for (int64_t row = first, place = first * h->out_width; row < last; row++)
        for (int64_t column = 0; column < h->out_width; column++, place++) {
            int64_t y = row * t->stride - t->pad, x = column * t->stride - t->pad;
            Window seen = {most(0, y), least(h->height, y + t->kernel), most(0, x), least(h->width, x + t->kernel)};
            for (int64_t channel = 0; channel < h->channels; channel += VECTOR) {
                int64_t valid = bare ? VECTOR : least(VECTOR, h->channels - channel);
                lanes result = NAME(largest)(t, a, in, seen, bare, channel, valid);
                const NAME(Own) own = NAME(own_of)(behind, behind->has, channel, valid);
                NAME(finish)(behind, behind->has, &own, result, place, channel, valid);
            }
        }
}

TARGET INLINE void NAME(pixels)(const After *a, int has, const float *in, int64_t first, int64_t last) {
    if (has & ANY) has = a->has;
    for (int64_t place = first; place < last; place++)
        for (int64_t channel = 0; channel < a->channels; channel += VECTOR) {
            int64_t valid = has & WHOLE ? VECTOR : least(VECTOR, a->channels - channel);
            const NAME(Own) own = NAME(own_of)(a, has, channel, valid);
            NAME(finish)(a, has, &own, NAME(load)(in + place * a->channels + channel, valid), place, channel, valid);
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
        const int within = NORM | CLAMP | PRELU | SHIFTED; /* what is done before the maximum is taken */
        behind.has &= ~within;
        if (!(a.has & within) && (a.has & WHOLE))
            NAME(windows)(t, &a, &behind, in, 1, first, last);
        else
            NAME(windows)(t, &a, &behind, in, 0, first, last);
        return;
    }
    switch (PATH != PLAIN ? a.has : ANY) {
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
        for (int64_t channel = 0; channel < h->channels; channel += VECTOR) {
            int64_t valid = least(VECTOR, h->channels - channel);
            lanes sum = {0};
            for (int64_t y = y0; y < y1; y++)
                for (int64_t x = x0; x < x1; x++) sum += NAME(load)(in + (y * h->width + x) * h->channels + channel, valid);
            for (int64_t i = 0; i < a->copies; i++)
                NAME(store)(pixel + a->front + i * h->channels + channel, sum / count, valid);
        }
    }
}

/* The sums of a tile, whose windows begin at `seen`, and of one vector of channels or two: of two blocks, whose weights lie
 * `next` from each other, or of one. They begin with 0 and take one product after the other, each rounded together with the
 * sum, as torch's do. */
TARGET INLINE void NAME(products_of)(const float *const *seen, const int32_t *places, const float *weights, int64_t next,
                                     int64_t count, int vectors, lanes out[2][TILE]) {
    lanes sums[2 * TILE];
#define EACH(q) _Pragma("GCC unroll 8") for (int q = 0; q < vectors * TILE; q++)
    EACH(q) sums[q] = (lanes){0};
    for (int64_t i = 0; i < count; i++)
        EACH(q) {
            int v = q / TILE;
            lanes w = *(const lanes *)(weights + v / PARTS * next + v % PARTS * VECTOR + i * LANES);
            sums[q] = NAME(add_product)(seen[q % TILE] + places[i], w, sums[q]);
        }
    EACH(q) out[q / TILE][q % TILE] = sums[q];
#undef EACH
}

/* The same of two vectors, or of one: a function of its own for the sake of the registers. */
static TARGET __attribute__((noinline)) void NAME(products)(const float *const *seen, const int32_t *places,
                                                            const float *weights, int64_t next, int64_t count,
                                                            int64_t vectors, lanes out[2][TILE]) {
    const float *windows[TILE];
    for (int p = 0; p < TILE; p++) windows[p] = seen[p];
    if (vectors == 2)
        NAME(products_of)(windows, places, weights, next, count, 2, out);
    else
        NAME(products_of)(windows, places, weights, next, count, 1, out);
}

/* The pixels from `first` to `last` of a real convolution. has: what is done with the result. */
TARGET INLINE void NAME(real_pixels)(const Run *r, const Real *c, const After *a, int has, int64_t first, int64_t last) {
    int64_t count = c->kernel_h * c->kernel_w * c->head.channels, width = c->head.out_width;
    if (has & ANY) has = a->has;
    const float *weights = tensor(r, c->weights);
    int32_t *places = (int32_t *)r->gathered;
    const Padded image = pad_rows(c, value(r, c->head.in), first / width, (last - 1) / width, (float *)(places + count));
    order_activations(c, image.line, places);
    Pixel next = pixel_at(&c->head, first);
    for (int64_t place = first; place < last; place += TILE) {
        const float *seen[TILE];
        for (int p = 0; p < TILE; p++) {
            const float *row = image.rows + (next.row * c->stride_h - image.first) * image.line;
            seen[p] = row + next.column * c->stride_w * c->head.channels;
            if (place + p + 1 < last) advance(&next); /* else the last one again */
        }
        for (int64_t from = 0; from < c->out_channels; from += 2 * VECTOR) {
            lanes sums[2][TILE], more[2][TILE];
            const float *w = weights + from * count;
            int64_t next = count * LANES, end = least(count, c->chunk);
            int64_t vectors = from + VECTOR < c->out_channels ? 2 : 1;
            NAME(products)(seen, places, w, next, end, vectors, sums);
            for (int64_t i = end; i < count; i += c->chunk) {
                NAME(products)(seen, places + i, w + i * LANES, next, least(count - i, c->chunk), vectors, more);
                for (int q = 0; q < vectors * TILE; q++) sums[q / TILE][q % TILE] += more[q / TILE][q % TILE];
            }
            for (int64_t v = 0; v < vectors; v++) {
                int64_t channel = from + v * VECTOR;
                int64_t valid = has & WHOLE ? VECTOR : least(VECTOR, c->out_channels - channel);
                NAME(finish_tile)(a, has, sums[v], place, last - place, channel, valid);
            }
        }
    }
}

/* A convolution of real values, and what follows it. */
static TARGET void NAME(real)(const Run *r, const Real *c) {
    int64_t first, last;
    const After a = after(r, &c->head, -1, c->out_channels, c->out_channels % LANES == 0);
    own(r, c->head.out_height * c->head.out_width, &first, &last);
    if (first == last) return;
    switch (PATH != PLAIN ? a.has : ANY) {
#define WITH(set) case set: NAME(real_pixels)(r, c, &a, set, first, last); break;
        WITH(WHOLE | NORM | OUT)
        WITH(WHOLE | NORM | OUT | BITS)
        WITH(WHOLE | NORM | CLAMP | OUT)
        WITH(WHOLE | NORM | CLAMP | BITS)
        WITH(WHOLE | NORM | CLAMP | OUT | BITS)
        WITH(WHOLE | NORM | CLAMP | OUT | BITS | THRESHOLD)
        WITH(WHOLE | NORM | PRELU | SHIFTED | OUT | BITS | THRESHOLD)
    default: NAME(real_pixels)(r, c, &a, ANY, first, last);
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

#undef VECTOR
#undef PARTS
#undef BLOCKS
#undef lanes
#undef ints
