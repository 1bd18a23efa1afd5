/* What a Cortex-M4F or M7 needs before main: a vector table, its floating-point unit switched on, .data in place. */
#include <stdint.h>

extern char stack_top[];
extern uint32_t data_start[], data_end[], data_kept[];
extern void _start(void); /* of the C library: clears .bss, opens the standard output, calls main and exits */

static void stop(void) {
    for (;;) {
    }
}

static void reset(void) {
    volatile uint32_t *access = (volatile uint32_t *)0xE000ED88u; /* CPACR: full access to coprocessors 10 and 11 */
    *access |= 0xFu << 20;
    __asm volatile("dsb\n isb");
    for (uint32_t *to = data_start, *from = data_kept; to < data_end;) *to++ = *from++;
    _start();
}

typedef struct {
    const char *stack;
    void (*exceptions[15])(void);
} vectors;

__attribute__((section(".vectors"), used)) static const vectors table = {stack_top, {reset, stop, stop}};
