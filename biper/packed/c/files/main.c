/* Reads images from the standard input, HEIGHT x WIDTH pixels of three bytes each (red, green, blue) one behind the other,
 * and prints a line for each: the likeliest class and the logits' bits in hexadecimal. Where there is no such input, give
 * the images when compiling: -DIMAGES='"images.h"', a file with `static const uint8_t images[][NAME_PIXELS] = {...};`. */
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include "network.h"

static union {
    float aligned;
    unsigned char bytes[NAME_ARENA];
} arena;

static void answer(const uint8_t *pixels) {
    float logits[NAME_CLASSES];
    uint32_t bits;
    int i, best = 0;
    name_run_pixels(pixels, logits, arena.bytes);
    for (i = 1; i < NAME_CLASSES; i++)
        if (logits[i] > logits[best]) best = i;
    printf("%d", best);
    for (i = 0; i < NAME_CLASSES; i++) {
        memcpy(&bits, &logits[i], sizeof bits);
        printf(" %08lx", (unsigned long)bits);
    }
    printf("\n");
}

#ifdef IMAGES
#include IMAGES
int main(void) {
    unsigned i;
    for (i = 0; i < sizeof images / sizeof images[0]; i++) answer(images[i]);
    return 0;
}
#else
int main(int count, char **given) {
    static uint8_t pixels[NAME_PIXELS];
    size_t read;
    int images = 0;
    if (count > 1) {
        fprintf(stderr, "error: %s: images of %d bytes come from the standard input, nothing else is taken\n", given[1], NAME_PIXELS);
        return 2;
    }
    for (; (read = fread(pixels, 1, sizeof pixels, stdin)) == sizeof pixels; images++) answer(pixels);
    if (images && read == 0) return 0;
    fprintf(stderr, "error: the input ends %s image: images have %d bytes\n", read ? "within an" : "before the first", NAME_PIXELS);
    return 2;
}
#endif
