/* What JavaScript sees of a network: where its image and its answer lie, and functions of numbers alone.
 *
 * The compiler gets RUN, PIXELS, CLASSES and ARENA, which are the network's names and sizes (see network.h). Its layers
 * of signs are called through a macro, so that a run can end in front of one of them, whose signs then lie in memory. */
#include <stddef.h>
#include <stdint.h>

#include "kernels.h"

#define EXPORTED(name) __attribute__((export_name(name)))

static int32_t until = -1; /* how many layers of signs still run; never any end if it begins negative */
static struct {
    const biper_layer *layer;
    const uint32_t *weights, *in;
} seen;

#define biper_binary(layer_, weights_, in_, skip, out, bits) \
    do { \
        if (until-- == 0) { \
            seen.layer = layer_, seen.weights = weights_, seen.in = in_; \
            return; \
        } \
        biper_binary(layer_, weights_, in_, skip, out, bits); \
    } while (0)
#include "network.c"

static uint8_t pixels[PIXELS];
static float logits[CLASSES];
static union {
    float aligned;
    unsigned char bytes[ARENA];
} arena;

EXPORTED("pixels") uint8_t *address_of_pixels(void) { return pixels; }
EXPORTED("logits") float *address_of_logits(void) { return logits; }

EXPORTED("simd") int32_t has_simd(void) {
#if defined __wasm_simd128__
    return 1;
#else
    return 0;
#endif
}

/* From the pixels to the logits. */
EXPORTED("run") void run(void) {
    until = -1;
    RUN(pixels, logits, arena.bytes);
}

/* What a layer of signs sees of the pixels: where its biper_layer, its weights and its input's bits lie. 0: no such
 * layer. */
EXPORTED("look") const void *look(int32_t layer) {
    seen.layer = NULL;
    until = layer;
    if (layer >= 0) RUN(pixels, logits, arena.bytes);
    return seen.layer ? &seen : NULL;
}

/* A compiler may call these though nobody else does. */
void *memset(void *to, int value, size_t count) {
    unsigned char *bytes = to;
    while (count--) *bytes++ = (unsigned char)value;
    return to;
}

void *memcpy(void *restrict to, const void *restrict from, size_t count) {
    unsigned char *bytes = to;
    const unsigned char *others = from;
    while (count--) *bytes++ = *others++;
    return to;
}
