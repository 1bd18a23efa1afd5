/* What a Cortex-M4F or M7 needs before main: a vector table, and its floating-point unit switched on. */
#include <stdint.h>

extern char stack_top[];
extern void _start(void); /* of the C library: clears .bss, opens the standard output, calls main and exits */

static void stop(void) {
    for (;;) {
    }
}

static void reset(void) {
    volatile uint32_t *access = (volatile uint32_t *)0xE000ED88u; /* CPACR: full access to coprocessors 10 and 11 */
    *access |= 0xFu << 20;
    __asm volatile("dsb\n isb");
    _start();
}

typedef struct {
    const char *stack;
    void (*exceptions[15])(void);
} vectors;

__attribute__((section(".vectors"), used)) static const vectors table = {stack_top, {reset, stop, stop}};
