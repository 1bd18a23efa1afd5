/* What one thread of this processor does at most: ones counted in registers, with nothing else to do, or with all that a
 * packed convolution does for two words beside it: two XORs, their carry, and the addition of its count. */
#include <stdint.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define CHAINS 8 /* counts that do not wait for each other */
#define EACH(i) _Pragma("GCC unroll 8") for (int i = 0; i < CHAINS; i++)

#if defined(__x86_64__)
__attribute__((target("avx512f,avx512vpopcntdq"))) static int64_t count_vectors(int64_t rounds) {
    __m512i x[CHAINS];
    EACH(i) x[i] = _mm512_set1_epi32(i);
    for (int64_t n = 0; n < rounds; n++)
        EACH(i) __asm__ volatile("vpopcntd %0, %0" : "+v"(x[i]));
    return 512 * CHAINS * rounds;
}

__attribute__((target("avx512f,avx512vpopcntdq"))) static int64_t count_carries(int64_t rounds) {
    __m512i sum[CHAINS], counts[CHAINS], a = _mm512_set1_epi32(1), b = _mm512_set1_epi32(2);
    EACH(i) sum[i] = counts[i] = _mm512_set1_epi32(i);
    for (int64_t n = 0; n < rounds; n++)
        EACH(i) {
            __m512i two, three;
            __asm__ volatile("vpxord %5, %4, %2\n\tvpxord %4, %5, %3\n\tvpternlogd $0x74, %3, %2, %0\n\t"
                             "vpopcntd %0, %0\n\tvpaddd %0, %1, %1"
                             : "+v"(sum[i]), "+v"(counts[i]), "=&v"(two), "=&v"(three)
                             : "v"(a), "v"(b));
            sum[i] = three;
        }
    return 1024 * CHAINS * rounds;
}

__attribute__((target("popcnt"))) static int64_t count_words(int64_t rounds) {
    uint64_t x[CHAINS];
    EACH(i) x[i] = i;
    for (int64_t n = 0; n < rounds; n++)
        EACH(i) __asm__ volatile("popcnt %0, %0" : "+r"(x[i]));
    return 64 * CHAINS * rounds;
}
#endif

/* Bits whose mismatches were counted, as packed.c does it with AVX-512; 0 where it does it in other ways. */
int64_t count_mismatches(int64_t rounds) {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512vpopcntdq")) return count_carries(rounds);
#endif
    return 0 * rounds;
}

/* Bits whose ones were counted; 0 where this is not known how to do fast. */
int64_t count(int64_t rounds) {
#if defined(__x86_64__)
    return __builtin_cpu_supports("avx512vpopcntdq") ? count_vectors(rounds) : count_words(rounds);
#else
    return 0 * rounds;
#endif
}
