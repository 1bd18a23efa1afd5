/* DESCRIPTION
 *
 * An image is HEIGHT x WIDTH pixels in rows, red, green and blue of a pixel side by side. `memory` is NAME_ARENA bytes,
 * aligned as a float is; nothing in it is needed before a call or after it. Nothing else is written to. */
#ifndef NAME_NETWORK_H
#define NAME_NETWORK_H

#include <stdint.h>

#define NAME_HEIGHT HEIGHT_
#define NAME_WIDTH WIDTH_
#define NAME_PIXELS (3 * NAME_HEIGHT * NAME_WIDTH)
#define NAME_CLASSES CLASSES_
#define NAME_ARENA ARENA_

/* The logits of an image whose numbers are normalized. */
void name_run(const float image[NAME_PIXELS], float logits[NAME_CLASSES], void *memory);

/* The logits of an image of bytes p, of which it makes (p - mean) / std; mean: MEAN_; std: STD_. */
void name_run_pixels(const uint8_t pixels[NAME_PIXELS], float logits[NAME_CLASSES], void *memory);

#endif
