/* The layers of a binary network in plain C99.
 *
 * A map is an image's activations: pixels in rows, channels last, as float, int16_t or int8_t (times `step`). Its signs
 * are bits, 1 for +1 and 0 for -1: for each pixel ceil(channels / 32) words, channel c in bit c % 32 of word c / 32, and
 * zeros above the last one. No function keeps anything, and none needs memory of its own beyond a few words of stack. */
#ifndef BIPER_KERNELS_H
#define BIPER_KERNELS_H

#include <stdint.h>

#define BIPER_LANES 16 /* output channels whose weights lie side by side */

enum { BIPER_FLOAT32, BIPER_INT16, BIPER_INT8 };
enum { BIPER_NONE, BIPER_HARDTANH, BIPER_RELU, BIPER_PRELU };

typedef struct { /* data may be NULL: no such map */
    void *data;
    float step;
    int32_t type;
} biper_map;

/* What becomes of a sum, in this order: times alpha, plus bias, times gain, plus shift, plus the skip, activation (PReLU:
 * of x - before, plus after), and its sign, +1 from threshold on. A number for each channel; NULL: left out, 0 for
 * threshold. Where nothing but a sign is wanted, `integers` are the least sums whose sign is +1, or, for channels whose
 * bit in `turned` is 1, the least ones whose sign is -1; then all the others are not used. */
typedef struct {
    const float *alpha, *bias, *gain, *shift, *before, *slope, *after, *threshold;
    const int16_t *integers;
    const uint32_t *turned;
    int32_t activation;
} biper_tail;

/* Padding adds nothing to a sum. pool: the maximum over 2x2 places of the sums is taken before anything else. */
typedef struct {
    int32_t height, width, channels, out_height, out_width, out_channels;
    int32_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, groups, pool;
    biper_tail tail;
} biper_layer;

/* Weights are in blocks of BIPER_LANES output channels of a group, the last one narrower; in a block tap by tap (rows
 * first), in a tap word by word, or channel by channel, and there output channel by output channel. */

/* Signs times binary weights: XOR and popcount. weights: words of 32 channels, zeros above a group's last one. */
void biper_binary(const biper_layer *layer, const uint32_t *weights, const uint32_t *in, biper_map skip, biper_map out,
                  uint32_t *bits);

/* Numbers times real weights. */
void biper_real(const biper_layer *layer, const float *weights, biper_map in, biper_map skip, biper_map out,
                uint32_t *bits);

/* Numbers times binary weights. weights: for each channel one number, whose bits are its output channels. */
void biper_mixed(const biper_layer *layer, const uint16_t *weights, biper_map in, biper_map skip, biper_map out,
                 uint32_t *bits);

/* The tail alone. Of this and the next, out_channels are channels. */
void biper_pointwise(const biper_layer *layer, biper_map in, biper_map skip, biper_map out, uint32_t *bits);

/* The maximum over windows of what the tail, without a skip, makes of numbers. */
void biper_maximum(const biper_layer *layer, biper_map in, biper_map out, uint32_t *bits);

/* The mean over windows of kernel, side by side, those at the end cut off; `copies` of it side by side as channels,
 * behind `front` zeros, and zeros up to out_channels. */
void biper_average(const biper_layer *layer, int32_t front, int32_t copies, biper_map in, biper_map out);

/* From channels last to channels first, as what flattens a map wants it. */
void biper_flatten(const biper_layer *layer, biper_map in, biper_map out);

/* Where maps and bits lie: in a block of memory, or at numbers that are given. */
biper_map biper_map_at(void *memory, int32_t offset, float step, int32_t type);
biper_map biper_numbers(const float *numbers);
biper_map biper_nothing(void);
uint32_t *biper_bits(void *memory, int32_t offset);

/* Bytes, three to a pixel, to normalized numbers: (p - mean) / std. */
void biper_normalize(const uint8_t *pixels, int32_t count, const float mean[3], const float std[3], float *image);

#endif
