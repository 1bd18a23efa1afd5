/* What stands between the convolutions of a training step on the CPU: scale, batch norm, skip, activation, the signs of
 * the next one, and their gradients, each in as few passes over memory as its sums allow.
 *
 * Tensors are channels-last: n images of p = H*W pixels of c channels, c a multiple of 16. A convolution's sums u and
 * their gradient are float, or bfloat16 where `half` is 1; so are the signs s of the next one, where `half_s` is 1.
 * Activations a and their gradients are float, or bfloat16 where `narrow` is 1: where no skip adds to them. Threads
 * share out whole images, and the images' sums are added up in order, in double: their number changes no result. */
#include <math.h>
#include <stdint.h>

#if defined __AVX512F__ /* as wide as the processor's vectors: wider ones are compared number by number */
#define LANES 16
#elif defined __AVX__
#define LANES 8
#else
#define LANES 4
#endif
#define PARTS (16 / LANES) /* sums over channels are kept in sixteen parts, whatever the processor: so they are equal */
#define TILE 64 /* pixels that stay in the first cache */
#define SUMS 5  /* rows of backward's sums: gradient, its product with u - mean, and those of threshold, after, slope */
#define INLINE static inline __attribute__((always_inline))
#define COPY static __attribute__((noinline)) /* a copy of a loop: all in one function keep the compiler busy */

enum { NO_ACTIVATION, HARDTANH, PRELU };           /* the numbers of Activation, */
enum { STANDARDIZED, POLYNOMIAL, CLIPPED, DECAY }; /* and those of Signs, in functions.py */

typedef float lanes __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t bits __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t words __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint16_t halves __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

INLINE lanes all(float x) { return (lanes){0} + x; }
INLINE lanes choose(bits mask, lanes yes, lanes no) { return (lanes)((mask & (bits)yes) | (~mask & (bits)no)); }
INLINE lanes magnitude(lanes x) { return (lanes)((bits)x & 0x7fffffff); }
INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

INLINE float sum_of(const lanes *parts) {
    float sum = 0;
    for (int i = 0; i < 16; i++) sum += parts[i / LANES][i % LANES];
    return sum;
}

INLINE lanes load(const void *x, int64_t i, int half) {
    if (!half) return *(const lanes *)((const float *)x + i);
    return (lanes)(__builtin_convertvector(*(const halves *)((const uint16_t *)x + i), words) << 16);
}

INLINE void store(void *x, int64_t i, lanes value, int half) {
    if (!half) {
        *(lanes *)((float *)x + i) = value;
        return;
    }
    words w = (words)value, rounded = (w + 0x7fff + ((w >> 16) & 1)) >> 16; /* to nearest, ties to even */
    bits number = value == value;
    rounded = ((words)number & rounded) | (~(words)number & 0x7fc0);
    *(halves *)((uint16_t *)x + i) = __builtin_convertvector(rounded, halves);
}

INLINE void store_below(void *x, int64_t i, lanes value, int half) { /* rounds towards zero: what is below 1 stays so */
    store(x, i, half ? (lanes)((words)value & 0xffff0000) : value, half);
}

INLINE lanes hardtanh(lanes x) { /* what is no number stays none */
    x = choose(x > 1, all(1), x);
    return choose(x < -1, all(-1), x);
}

INLINE lanes window(lanes x) { /* the sign's surrogate gradient, max(0, 2 - 2*|x|) */
    lanes w = 2 - 2 * magnitude(x);
    return choose(w < 0, all(0), w);
}

/* exp(x) for -87 < x <= 0, to about one unit in the last place, and what is no number stays none: 2**k * exp(r) with
 * |r| <= ln(2)/2, by Taylor's series. */
INLINE lanes exponential(lanes x) {
    lanes shifted = x * 1.44269504f + 12582912.0f; /* rounds: 1.5 * 2**23 leaves no room for a fraction */
    lanes k = shifted - 12582912.0f, r = (x - k * 6.93359375e-1f) + k * 2.12194440e-4f;
    lanes power = (lanes)(((words)shifted << 23) + 0x3f800000);
    lanes series = 8.3333333e-3f + r * (1.3888889e-3f + r * 1.9841270e-4f);
    return power * (1 + r * (1 + r * (0.5f + r * (1.6666667e-1f + r * (4.1666667e-2f + r * series)))));
}

INLINE lanes hump(lanes x) { /* 1 - tanh(x)**2, to about 1e-6 of itself where that is more than at 40, 7e-35 */
    lanes y = magnitude(x);
    lanes e = exponential(-2 * choose(y > 40, all(40), y));
    return 4 * e / ((1 + e) * (1 + e));
}

/* The gradient of the sign in its stead. Of POLYNOMIAL and CLIPPED it is height - fall*|x| where |x| <= 1, else 0. */
INLINE lanes surrogate(lanes x, int decay, float height, float fall, float t) {
    if (decay) return height * hump(t * x);
    return choose(magnitude(x) > 1, all(0), height - fall * magnitude(x));
}

/* Per image and channel: the sums of x and of x*x for x = u - pivot, where the pivot is the channel's first value: it
 * keeps the difference of large numbers out of the variance. sums: (n, 2, c). */
INLINE void image_moments(const void *u, float *sums, int64_t n, int64_t p, int64_t c, int half) {
#pragma omp parallel for schedule(static)
    for (int64_t image = 0; image < n; image++) {
        float *sum = sums + 2 * image * c, *square = sum + c;
        for (int64_t ch = 0; ch < 2 * c; ch++) sum[ch] = 0;
        for (int64_t first = 0; first < p; first += TILE)
            for (int64_t ch = 0; ch < c; ch += LANES) {
                lanes add = {0}, add_square = {0}, pivot = load(u, ch, half);
                for (int64_t q = first; q < least(p, first + TILE); q++) {
                    lanes x = load(u, (image * p + q) * c + ch, half) - pivot;
                    add += x;
                    add_square += x * x;
                }
                *(lanes *)(sum + ch) += add;
                *(lanes *)(square + ch) += add_square;
            }
    }
}

/* A row of sums (n, rows, c), over the images. */
static double added_up(const float *sums, int64_t n, int64_t rows, int64_t row, int64_t c, int64_t ch) {
    double sum = 0;
    for (int64_t image = 0; image < n; image++) sum += sums[(rows * image + row) * c + ch];
    return sum;
}

/* Batch norm's statistics of alpha*u. Writes kept (3, c): the mean of u, 1/std of alpha*u, and the gain with which
 * gain*(u - mean) + bias is the normalized value; updates the running statistics. alpha may be NULL. */
void biper_statistics(const void *u, const float *alpha, const float *weight, float *running_mean, float *running_var,
                      double momentum, double epsilon, float *kept, float *scratch, int64_t n, int64_t p, int64_t c,
                      int half) {
    if (half)
        image_moments(u, scratch, n, p, c, 1);
    else
        image_moments(u, scratch, n, p, c, 0);
    double count = (double)n * p;
    for (int64_t ch = 0; ch < c; ch++) {
        double scale = alpha ? alpha[ch] : 1;
        double sum = added_up(scratch, n, 2, 0, c, ch), square = added_up(scratch, n, 2, 1, c, ch);
        double mean = sum / count, variance = square / count - mean * mean;
        lanes pivot = load(u, ch / LANES * LANES, half);
        mean += pivot[ch % LANES];
        variance = scale * scale * (variance < 0 ? 0 : variance); /* what is no number stays none */
        double inverse = 1 / sqrt(variance + epsilon);
        kept[ch] = mean;
        kept[c + ch] = inverse;
        kept[2 * c + ch] = weight[ch] * inverse * scale;
        running_mean[ch] = (1 - momentum) * running_mean[ch] + momentum * scale * mean;
        running_var[ch] = (1 - momentum) * running_var[ch] + momentum * variance * count / (count - 1);
    }
}

typedef struct { /* a unit up to its activation: see biper_forward */
    const void *u;
    const float *scale, *kept, *bias, *skip, *slope, *before, *after;
    int64_t p, c;
    int clamp, half, half_s, narrow;
} Unit;

typedef struct { /* of as many channels as there are lanes */
    lanes scale, mean, gain, bias, slope, before, after;
} Channels;

INLINE Channels channels_of(Unit unit, int64_t ch, int prelu) {
    Channels k = {.scale = all(1)};
    if (unit.u && unit.scale) k.scale = load(unit.scale, ch, 0);
    if (unit.u) {
        k.mean = load(unit.kept, ch, 0);
        k.gain = load(unit.kept, 2 * unit.c + ch, 0);
        k.bias = load(unit.bias, ch, 0);
    }
    if (prelu) {
        k.slope = load(unit.slope, ch, 0);
        k.before = unit.before ? load(unit.before, ch, 0) : all(0); /* x - 0 is x, to the last bit, */
        k.after = unit.after ? load(unit.after, ch, 0) : -all(0);   /* and so is x + -0 */
    }
    return k;
}

INLINE lanes total(Unit unit, Channels k, int64_t i, int half) { /* the sum before the activation */
    lanes x = {0};
    if (unit.u) x = k.gain * (load(unit.u, i, half) * k.scale - k.mean) + k.bias;
    if (unit.skip) x += load(unit.skip, i, 0);
    return x;
}

INLINE lanes prelu_of(lanes x, Channels k) { /* with the shift after it */
    return choose(x > 0, x, k.slope * x) + k.after;
}

typedef struct {
    Unit unit;
    const float *threshold;
    void *a, *s;
    float *moments;
} Forward;

INLINE void forward_image(Forward f, int64_t image, int prelu, int standardized, int narrow, int half, int half_s) {
    int64_t p = f.unit.p, c = f.unit.c, start = image * p * c;
    lanes sums[PARTS] = {0}, squares[PARTS] = {0};
    for (int64_t first = 0; first < p; first += TILE)
        for (int64_t ch = 0; ch < c; ch += LANES) {
            Channels k = channels_of(f.unit, ch, prelu);
            lanes threshold = f.threshold ? load(f.threshold, ch, 0) : all(0);
            int part = ch / LANES % PARTS;
            lanes sum = sums[part], square = squares[part];
            for (int64_t q = first; q < least(p, first + TILE); q++) {
                int64_t i = start + q * c + ch;
                lanes x = total(f.unit, k, i, half);
                if (f.unit.clamp) x = hardtanh(x);
                if (prelu) x = prelu_of(x - k.before, k);
                if (f.a) store_below(f.a, i, x, narrow);
                if (f.s) store(f.s, i, choose(x >= threshold, all(1), all(-1)), half_s);
                if (standardized) sum += x, square += x * x;
            }
            sums[part] = sum, squares[part] = square;
        }
    if (!standardized) return;
    double count = (double)p * c, whole = sum_of(sums), centre = whole / count;
    double variance = ((double)sum_of(squares) - whole * centre) / (count - 1);
    f.moments[2 * image] = centre;
    f.moments[2 * image + 1] = 1 / sqrt((variance < 0 ? 0 : variance) + 1e-5);
}

INLINE void forward_types(Forward f, int64_t image, int prelu, int standardized) {
    int half = f.unit.half, half_s = f.unit.half_s, narrow = f.unit.narrow;
    if (half && narrow) /* a copy of the loops for each, without the choice in them */
        forward_image(f, image, prelu, standardized, 1, 1, 1);
    else if (half)
        forward_image(f, image, prelu, standardized, 0, 1, 1);
    else if (half_s)
        forward_image(f, image, prelu, standardized, narrow, 0, 1);
    else
        forward_image(f, image, prelu, standardized, 0, 0, 0);
}

COPY void forward_plain(Forward f, int64_t image) { forward_types(f, image, 0, 0); }
COPY void forward_standardized(Forward f, int64_t image) { forward_types(f, image, 0, 1); }
COPY void forward_prelu(Forward f, int64_t image) { forward_types(f, image, 1, 0); }
COPY void forward_prelu_standardized(Forward f, int64_t image) { forward_types(f, image, 1, 1); }

/* a = activation(gain*(scale*u - mean) + bias + skip), s = sign(a), and for standardized signs per image mean and 1/std
 * of a: moments (n, 2). PReLU is x > 0 ? x : slope*x of the sum less `before`, plus `after`. Signs are +1 from
 * `threshold` on. u, skip, before, after, threshold, a and s may be NULL: a sum has the terms that are there, and what
 * is not wanted is not written. scale is alpha in evaluation, where everything rounds as torch's operations do one by
 * one; NULL, for 1, in training. */
void biper_forward(const void *u, const float *scale, const float *kept, const float *bias, const float *skip,
                   const float *slope, const float *before, const float *after, const float *threshold, void *a,
                   void *s, float *moments, int activation, int kind, int half_s, int narrow, int64_t n, int64_t p,
                   int64_t c, int half) {
    Unit unit = {u, scale, kept, bias, skip, slope, before, after, p, c, activation == HARDTANH, half, half_s, narrow};
    Forward f = {unit, threshold, a, s, moments};
    int standardized = s && kind == STANDARDIZED;
#pragma omp parallel for schedule(static)
    for (int64_t image = 0; image < n; image++)
        if (activation == PRELU)
            (standardized ? forward_prelu_standardized : forward_prelu)(f, image);
        else
            (standardized ? forward_standardized : forward_plain)(f, image);
}

typedef struct {
    Unit unit;
    const void *grad_s, *a;
    const float *grad_a, *threshold, *moments;
    void *grad;
    float *sums, height, fall, t; /* of the surrogate gradient */
} Backward;

/* What a standardized sign's gradient gets through the standard deviation: one number for the whole image. */
INLINE float pull_of(Backward b, int64_t start, float inverse, int prelu, int narrow, int half, int half_s) {
    int64_t p = b.unit.p, c = b.unit.c;
    lanes dots[PARTS] = {0};
    for (int64_t first = start; !prelu && first < start + p * c; first += 16)
        for (int part = 0; part < PARTS; part++) {
            int64_t i = first + part * LANES;
            lanes x = load(b.a, i, narrow);
            dots[part] += window(x * inverse) * load(b.grad_s, i, half_s) * x;
        }
    for (int64_t first = 0; prelu && first < p; first += TILE)
        for (int64_t ch = 0; ch < c; ch += LANES) {
            Channels k = channels_of(b.unit, ch, prelu);
            lanes dot = dots[ch / LANES % PARTS];
            for (int64_t q = first; q < least(p, first + TILE); q++) {
                int64_t i = start + q * c + ch;
                lanes x = prelu_of(total(b.unit, k, i, half) - k.before, k);
                dot += window(x * inverse) * load(b.grad_s, i, half_s) * x;
            }
            dots[ch / LANES % PARTS] = dot;
        }
    return (double)sum_of(dots) * inverse * inverse * inverse / (p * c - 1);
}

INLINE void backward_image(Backward b, int64_t image, int prelu, int kind, int narrow, int half, int half_s) {
    int64_t p = b.unit.p, c = b.unit.c, start = image * p * c;
    float mean = 0, inverse = 1, pull = 0, *sums = b.sums ? b.sums + SUMS * image * c : 0;
    if (b.grad_s && kind == STANDARDIZED) {
        mean = b.moments[2 * image], inverse = b.moments[2 * image + 1];
        pull = pull_of(b, start, inverse, prelu, narrow, half, half_s);
    }
    for (int64_t ch = 0; sums && ch < SUMS * c; ch++) sums[ch] = 0;
    for (int64_t first = 0; first < p; first += TILE)
        for (int64_t ch = 0; ch < c; ch += LANES) {
            lanes add = {0}, add_product = {0}, add_threshold = {0}, add_after = {0}, add_slope = {0};
            lanes threshold = b.threshold ? load(b.threshold, ch, 0) : all(0);
            Channels k = channels_of(b.unit, ch, prelu);
            for (int64_t q = first; q < least(p, first + TILE); q++) {
                int64_t i = start + q * c + ch;
                lanes x, y = {0}, g = {0};
                if (prelu)
                    y = total(b.unit, k, i, half) - k.before, x = prelu_of(y, k);
                else
                    x = load(b.a, i, narrow);
                if (b.grad_a) g = load(b.grad_a, i, 0);
                if (b.grad_s && kind == STANDARDIZED)
                    g += inverse * window(x * inverse) * load(b.grad_s, i, half_s) - pull * (x - mean);
                else if (b.grad_s) {
                    lanes through = surrogate(x - threshold, kind == DECAY, b.height, b.fall, b.t);
                    through *= load(b.grad_s, i, half_s);
                    g += through;
                    add_threshold -= through;
                }
                if (b.unit.clamp) g = choose(magnitude(x) >= 1, all(0), g);
                if (prelu) {
                    add_after += g;
                    add_slope += choose(y > 0, all(0), g * y);
                    g = choose(y > 0, g, g * k.slope);
                }
                store(b.grad, i, g, narrow);
                if (b.unit.u) {
                    add += g;
                    add_product += g * (load(b.unit.u, i, half) - k.mean);
                }
            }
            lanes added[SUMS] = {add, add_product, add_threshold, add_after, add_slope};
            for (int row = 0; sums && row < SUMS; row++) *(lanes *)(sums + row * c + ch) += added[row];
        }
}

INLINE void backward_types(Backward b, int64_t image, int prelu, int kind) {
    int half = b.unit.half, half_s = b.unit.half_s, narrow = b.unit.narrow;
    if (half && narrow)
        backward_image(b, image, prelu, kind, 1, 1, 1);
    else if (half)
        backward_image(b, image, prelu, kind, 0, 1, 1);
    else if (half_s)
        backward_image(b, image, prelu, kind, narrow, 0, 1);
    else
        backward_image(b, image, prelu, kind, 0, 0, 0);
}

COPY void backward_standardized(Backward b, int64_t image) { backward_types(b, image, 0, STANDARDIZED); }
COPY void backward_pieces(Backward b, int64_t image) { backward_types(b, image, 0, POLYNOMIAL); }
COPY void backward_decay(Backward b, int64_t image) { backward_types(b, image, 0, DECAY); }
COPY void backward_prelu_standardized(Backward b, int64_t image) { backward_types(b, image, 1, STANDARDIZED); }
COPY void backward_prelu_pieces(Backward b, int64_t image) { backward_types(b, image, 1, POLYNOMIAL); }
COPY void backward_prelu_decay(Backward b, int64_t image) { backward_types(b, image, 1, DECAY); }

static void (*const BACKWARD[2][4])(Backward, int64_t) = {
    {backward_standardized, backward_pieces, backward_pieces, backward_decay}, /* by kind */
    {backward_prelu_standardized, backward_prelu_pieces, backward_prelu_pieces, backward_prelu_decay},
};

/* The gradient of forward's sum before the activation, which is skip's as well; and per image and channel the sums (n,
 * SUMS, c), which are NULL where there is neither u nor a threshold. grad_s or grad_a may be NULL. A PReLU's input is
 * computed anew, as forward did, and needs no a; all others need a, but no skip. t is DECAY's. */
void biper_backward(const void *grad_s, const float *grad_a, const void *a, const void *u, const float *kept,
                    const float *bias, const float *skip, const float *slope, const float *before, const float *after,
                    const float *threshold, float t, const float *moments, void *grad, float *sums, int activation,
                    int kind, int half_s, int narrow, int64_t n, int64_t p, int64_t c, int half) {
    Unit unit = {u, 0, kept, bias, skip, slope, before, after, p, c, activation == HARDTANH, half, half_s, narrow};
    float height = kind == DECAY ? (t > 1 ? t : 1) : kind == CLIPPED ? 1 : 2, fall = kind == CLIPPED ? 0 : 2;
    Backward b = {unit, grad_s, a, grad_a, threshold, moments, grad, sums, height, fall, t};
#pragma omp parallel for schedule(static)
    for (int64_t image = 0; image < n; image++) BACKWARD[activation == PRELU][kind](b, image);
}

/* From backward's sums to the gradients of threshold, after and slope: gradients (3, c). */
void biper_channel_gradients(const float *sums, float *gradients, int64_t n, int64_t c) {
    for (int64_t row = 0; row < 3; row++)
        for (int64_t ch = 0; ch < c; ch++) gradients[row * c + ch] = added_up(sums, n, SUMS, 2 + row, c, ch);
}

INLINE void norm_image(const void *grad, const void *u, const float *k, void *grad_u, int narrow, int64_t start,
                       int64_t p, int64_t c, int half) {
    for (int64_t first = 0; first < p; first += TILE)
        for (int64_t ch = 0; ch < c; ch += LANES) {
            lanes kg = load(k, ch, 0), ku = load(k, c + ch, 0), k1 = load(k, 2 * c + ch, 0);
            for (int64_t q = first; q < least(p, first + TILE); q++) {
                int64_t i = start + q * c + ch;
                store(grad_u, i, kg * load(grad, i, narrow) + ku * load(u, i, half) + k1, half);
            }
        }
}

/* From backward's gradient and sums to the gradients of u, alpha, weight and bias: parameters (3, c), in this order.
 * coefficients: scratch of (3, c). */
void biper_norm_backward(const void *grad, const void *u, const float *sums, const float *kept, const float *alpha,
                         const float *weight, double epsilon, void *grad_u, float *parameters, float *coefficients,
                         int narrow, int64_t n, int64_t p, int64_t c, int half) {
    double count = (double)n * p;
    for (int64_t ch = 0; ch < c; ch++) {
        double mean = kept[ch], inverse = kept[c + ch], scale = alpha ? alpha[ch] : 1;
        double sum = added_up(sums, n, SUMS, 0, c, ch), centred = added_up(sums, n, SUMS, 1, c, ch);
        double gain = scale * weight[ch] * inverse;
        double ku = -gain * (scale * inverse) * (scale * inverse) * centred / count;
        /* batch norm takes alpha out again, all but epsilon's share */
        parameters[ch] = weight[ch] * inverse * inverse * inverse * epsilon * centred;
        parameters[c + ch] = inverse * scale * centred;
        parameters[2 * c + ch] = sum;
        coefficients[ch] = gain;
        coefficients[c + ch] = ku;
        coefficients[2 * c + ch] = -gain * sum / count - ku * mean;
    }
#pragma omp parallel for schedule(static)
    for (int64_t image = 0; image < n; image++) {
        if (half && narrow)
            norm_image(grad, u, coefficients, grad_u, 1, image * p * c, p, c, 1);
        else if (half)
            norm_image(grad, u, coefficients, grad_u, 0, image * p * c, p, c, 1);
        else
            norm_image(grad, u, coefficients, grad_u, narrow, image * p * c, p, c, 0);
    }
}

/* sin(x) and cos(x) to about one unit in the last place for |x| < 10000: x less the nearest multiple k of pi, in three
 * steps, then Taylor's series on [-pi/2, pi/2], whose sign is that of (-1)**k. */
INLINE void sine_cosine(lanes x, lanes *sine, lanes *cosine) {
    lanes shifted = x * 0.318309886f + 12582912.0f; /* rounds: 1.5 * 2**23 leaves no room for a fraction */
    words odd = (words)shifted << 31;
    lanes k = shifted - 12582912.0f;
    lanes r = ((x - k * 3.140625f) - k * 9.67502593994140625e-4f) - k * 1.509957990978376e-7f, q = r * r;
    lanes s = 2.7557319e-6f - q * 2.5052108e-8f, c = -2.7557319e-7f + q * 2.0876757e-9f;
    s = r + r * q * (-1.6666667e-1f + q * (8.3333333e-3f + q * (-1.9841270e-4f + q * s)));
    c = 1 + q * (-0.5f + q * (4.1666667e-2f + q * (-1.3888889e-3f + q * (2.4801587e-5f + q * c))));
    *sine = (lanes)((words)s ^ odd);
    *cosine = (lanes)((words)c ^ odd);
}

/* sin(freq*w), or its sign where `binary` is 1. The number of weights, here and below, is a multiple of 16. */
void biper_weights(const float *w, float freq, int binary, void *out, int64_t size, int half) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < size; i += LANES) {
        lanes s, c;
        sine_cosine(freq * load(w, i, 0), &s, &c);
        store(out, i, binary ? choose(s >= 0, all(1), all(-1)) : s, half);
    }
}

/* grad * freq*cos(freq*w), the gradient of both. */
void biper_weights_backward(const void *grad, const float *w, float freq, float *grad_w, int64_t size, int half) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < size; i += LANES) {
        lanes s, c;
        sine_cosine(freq * load(w, i, 0), &s, &c);
        store(grad_w, i, freq * c * load(grad, i, half), 0);
    }
}

#define BLOCK 4096

/* The sum of sin(freq*w)**2; blocks: scratch, one number for every 4096 weights begun. */
double biper_regularizer(const float *w, float freq, float *blocks, int64_t size) {
#pragma omp parallel for schedule(static)
    for (int64_t block = 0; block < (size + BLOCK - 1) / BLOCK; block++) {
        lanes sums[PARTS] = {0}, s, c;
        for (int64_t i = block * BLOCK; i < least(size, (block + 1) * BLOCK); i += 16)
            for (int part = 0; part < PARTS; part++) {
                sine_cosine(freq * load(w, i + part * LANES, 0), &s, &c);
                sums[part] += s * s;
            }
        blocks[block] = sum_of(sums);
    }
    double sum = 0;
    for (int64_t block = 0; block < (size + BLOCK - 1) / BLOCK; block++) sum += blocks[block];
    return sum;
}

/* scale * d/dw sin(freq*w)**2 = scale * freq * 2*sin*cos. */
void biper_regularizer_backward(const float *w, float freq, float scale, float *grad_w, int64_t size) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < size; i += LANES) {
        lanes s, c;
        sine_cosine(freq * load(w, i, 0), &s, &c);
        store(grad_w, i, 2 * scale * freq * s * c, 0);
    }
}
