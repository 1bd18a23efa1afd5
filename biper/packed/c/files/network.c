/* Written by `biper export --c`: the numbers of a network, and the calls that compute it. See network.h. */
#include "network.h"

#include <stddef.h>
#include <stdint.h>

#include "kernels.h"
CONSTANTS

void name_run(const float image[NAME_PIXELS], float logits[NAME_CLASSES], void *memory) {
    unsigned char *arena = memory;
BODY
}

void name_run_pixels(const uint8_t pixels[NAME_PIXELS], float logits[NAME_CLASSES], void *memory) {
    static const float mean[3] = {MEAN_}, std[3] = {STD_};
    float *image = (float *)(void *)((unsigned char *)memory + OFFSET_);
    biper_normalize(pixels, NAME_HEIGHT * NAME_WIDTH, mean, std, image);
    name_run(image, logits, memory);
}
