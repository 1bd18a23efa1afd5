/* Prints how many instructions a bare machine takes for an image: qemu with `-icount shift=0` lets one take a nanosecond. */
#include <stdint.h>
#include <stdio.h>

#include "network.h"
#include "images.h"

#if defined __arm__ /* SysTick counts down at the boards' 25 MHz */
#define PER_TICK 40
static volatile uint32_t *const systick = (volatile uint32_t *)0xE000E010u;
static void begin(void) {
    systick[1] = 0xFFFFFFu, systick[2] = 0, systick[0] = 5;
    while (!systick[2]) { /* it takes up the value that it counts down from at its first tick */
    }
}
static uint32_t ticks(void) { return 0xFFFFFFu - systick[2]; }
#else
#define PER_TICK 1
static void begin(void) {}
static uint32_t ticks(void) {
    unsigned long count;
    __asm volatile("rdinstret %0" : "=r"(count));
    return (uint32_t)count;
}
#endif

static float arena[ARENA / sizeof(float)], logits[CLASSES];

int main(void) {
    uint32_t start;
    begin();
    start = ticks();
    RUN(images[0], logits, arena);
    printf("%lu\n", (unsigned long)(ticks() - start) * PER_TICK);
    return 0;
}
