/* What stands between the convolutions of a training step on the CPU: scale, batch norm, skip, hardtanh, standardized
 * sign, and their gradients, each in as few passes over memory as its sums allow.
 *
 * Tensors are channels-last: n images of p = H*W pixels of c channels, c a multiple of 16. A convolution's sums u and
 * their gradient are float, or bfloat16 where `half` is 1; so are the signs s of the next one, where `half_s` is 1.
 * Activations a and their gradients are float, or bfloat16 where `narrow` is 1: where no skip adds to them. Threads share
 * out whole images, and the images' sums are added up in order, in double: the number of threads changes no result. */
#include <math.h>
#include <stdint.h>

#define LANES 16
#define TILE 64 /* pixels that stay in the first cache */
#define INLINE static inline __attribute__((always_inline))

typedef float lanes __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t bits __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t words __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint16_t halves __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

INLINE lanes all(float x) { return (lanes){0} + x; }
INLINE lanes choose(bits mask, lanes yes, lanes no) { return (lanes)((mask & (bits)yes) | (~mask & (bits)no)); }
INLINE lanes magnitude(lanes x) { return (lanes)((bits)x & 0x7fffffff); }
INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

INLINE float sum_of(lanes x) {
    float sum = 0;
    for (int i = 0; i < LANES; i++) sum += x[i];
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

static void added_up(const float *sums, int64_t n, int64_t c, int64_t ch, double *first, double *second) {
    *first = *second = 0;
    for (int64_t image = 0; image < n; image++) {
        *first += sums[2 * image * c + ch];
        *second += sums[(2 * image + 1) * c + ch];
    }
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
        double sum, square, scale = alpha ? alpha[ch] : 1;
        added_up(scratch, n, c, ch, &sum, &square);
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

INLINE void forward_image(const void *u, const float *scale, const float *kept, const float *bias, const float *skip, void *a, void *s,
                          float *moments, int clamp, int narrow, int64_t start, int64_t p, int64_t c, int half,
                          int half_s) {
    lanes sum = {0}, square = {0};
    for (int64_t first = 0; first < p; first += TILE)
        for (int64_t ch = 0; ch < c; ch += LANES) {
            lanes mean = {0}, gain = {0}, b = {0}, factor = all(1);
            if (u && scale) factor = load(scale, ch, 0);
            if (u) mean = load(kept, ch, 0), gain = load(kept, 2 * c + ch, 0), b = load(bias, ch, 0);
            for (int64_t q = first; q < least(p, first + TILE); q++) {
                int64_t i = start + q * c + ch;
                lanes x = {0};
                if (u) x = gain * (load(u, i, half) * factor - mean) + b;
                if (skip) x += load(skip, i, 0);
                if (clamp) x = hardtanh(x);
                if (a) store_below(a, i, x, narrow);
                if (s) store(s, i, choose(x >= 0, all(1), all(-1)), half_s);
                sum += x;
                square += x * x;
            }
        }
    if (!s) return;
    double count = (double)p * c, total = sum_of(sum), centre = total / count;
    double variance = ((double)sum_of(square) - total * centre) / (count - 1);
    moments[0] = centre;
    moments[1] = 1 / sqrt((variance < 0 ? 0 : variance) + 1e-5);
}

/* a = hardtanh(gain*(scale*u - mean) + bias + skip), s = sign(a), and per image mean and 1/std of a: moments (n, 2).
 * u, skip, a and s may be NULL: a sum has the terms that are there, and what is not wanted is not written. scale is
 * alpha in evaluation, where everything rounds as torch's operations do one by one; NULL, for 1, in training. */
void biper_forward(const void *u, const float *scale, const float *kept, const float *bias, const float *skip, void *a, void *s,
                   float *moments, int clamp, int half_s, int narrow, int64_t n, int64_t p, int64_t c, int half) {
#pragma omp parallel for schedule(static)
    for (int64_t image = 0; image < n; image++) {
        float *own = moments + 2 * image;
        int64_t start = image * p * c;
        if (half && narrow) /* a copy of the loops for each, without the choice in them */
            forward_image(u, scale, kept, bias, skip, a, s, own, clamp, 1, start, p, c, 1, 1);
        else if (half)
            forward_image(u, scale, kept, bias, skip, a, s, own, clamp, 0, start, p, c, 1, 1);
        else if (half_s)
            forward_image(u, scale, kept, bias, skip, a, s, own, clamp, narrow, start, p, c, 0, 1);
        else
            forward_image(u, scale, kept, bias, skip, a, s, own, clamp, 0, start, p, c, 0, 0);
    }
}

INLINE void backward_image(const void *grad_s, const float *grad_a, const void *a, const float *moments, const void *u,
                           const float *kept, void *grad, float *sums, int clamp, int narrow, int64_t start, int64_t p,
                           int64_t c, int half, int half_s) {
    float mean = moments[0], inverse = moments[1], pull = 0;
    if (grad_s) { /* through the standard deviation: one number for the whole image */
        lanes dot = {0};
        for (int64_t i = start; i < start + p * c; i += LANES) {
            lanes x = load(a, i, narrow);
            dot += window(x * inverse) * load(grad_s, i, half_s) * x;
        }
        pull = (double)sum_of(dot) * inverse * inverse * inverse / (p * c - 1);
    }
    for (int64_t first = 0; first < p; first += TILE)
        for (int64_t ch = 0; ch < c; ch += LANES) {
            lanes add = {0}, add_product = {0}, centre = {0};
            if (u) centre = load(kept, ch, 0);
            for (int64_t q = first; q < least(p, first + TILE); q++) {
                int64_t i = start + q * c + ch;
                lanes x = load(a, i, narrow), g = {0};
                if (grad_a) g = load(grad_a, i, 0);
                if (grad_s) g += inverse * window(x * inverse) * load(grad_s, i, half_s) - pull * (x - mean);
                if (clamp) g = choose(magnitude(x) >= 1, all(0), g);
                store(grad, i, g, narrow);
                if (u) {
                    add += g;
                    add_product += g * (load(u, i, half) - centre);
                }
            }
            if (u) {
                *(lanes *)(sums + ch) += add;
                *(lanes *)(sums + c + ch) += add_product;
            }
        }
}

/* The gradient of forward's sum before the hardtanh, which is skip's as well; and, if u is there, per image and channel
 * the sums of it and of its product with u - mean: sums (n, 2, c). grad_s or grad_a may be NULL. */
void biper_backward(const void *grad_s, const float *grad_a, const void *a, const float *moments, const void *u,
                    const float *kept, void *grad, float *sums, int clamp, int half_s, int narrow, int64_t n,
                    int64_t p, int64_t c, int half) {
#pragma omp parallel for schedule(static)
    for (int64_t image = 0; image < n; image++) {
        float *own = u ? sums + 2 * image * c : 0;
        for (int64_t ch = 0; u && ch < 2 * c; ch++) own[ch] = 0;
        const float *m = moments + 2 * image;
        int64_t start = image * p * c;
        if (half && narrow)
            backward_image(grad_s, grad_a, a, m, u, kept, grad, own, clamp, 1, start, p, c, 1, 1);
        else if (half)
            backward_image(grad_s, grad_a, a, m, u, kept, grad, own, clamp, 0, start, p, c, 1, 1);
        else if (half_s)
            backward_image(grad_s, grad_a, a, m, u, kept, grad, own, clamp, narrow, start, p, c, 0, 1);
        else
            backward_image(grad_s, grad_a, a, m, u, kept, grad, own, clamp, 0, start, p, c, 0, 0);
    }
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
        double sum, centred, mean = kept[ch], inverse = kept[c + ch], scale = alpha ? alpha[ch] : 1;
        added_up(sums, n, c, ch, &sum, &centred);
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
        lanes sum = {0}, s, c;
        for (int64_t i = block * BLOCK; i < least(size, (block + 1) * BLOCK); i += LANES) {
            sine_cosine(freq * load(w, i, 0), &s, &c);
            sum += s * s;
        }
        blocks[block] = sum_of(sum);
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
