/* The most products of small integers that a core can add up, on registers alone: the yardstick for
 * the products of packed codes, and none of their code. */
#ifndef LEGACY1BIT_PEAK_H
#define LEGACY1BIT_PEAK_H

#include "simd.h"

/* peak_bytes: a vector of operands; peak_step(s, a, b): s plus the products of a and b, with the
 * instructions of this set that multiply most; PEAK_PRODUCTS of them. PEAK_SUMS hide the time that
 * one step takes. Where a step is two instructions, each sum has a factor of its own: the same
 * product would be computed once. Sums and factors have names, for they have to be in registers. */
#define PEAK_6(do) do(0) do(1) do(2) do(3) do(4) do(5)
#define PEAK_12(do) PEAK_6(do) do(6) do(7) do(8) do(9) do(10) do(11)
#define PEAK_OWN_FACTOR(i) a##i
#define PEAK_ONE_FACTOR(i) b
#if defined(__AVX512VNNI__)
enum { PEAK_SUMS = 12, PEAK_PRODUCTS = 64 };
typedef __m512i peak_bytes;
#define peak_step(s, a, b) _mm512_dpbusd_epi32(s, a, b)
#define PEAK_EACH PEAK_12
#define PEAK_FACTOR PEAK_ONE_FACTOR
#define PEAK_REGISTER "+v"
#elif defined(__AVX512BW__)
enum { PEAK_SUMS = 12, PEAK_PRODUCTS = 64 };
typedef __m512i peak_bytes;
#define peak_step(s, a, b) _mm512_add_epi16(s, _mm512_maddubs_epi16(a, b))
#define PEAK_EACH PEAK_12
#define PEAK_FACTOR PEAK_OWN_FACTOR
#define PEAK_REGISTER "+v"
#elif defined(__AVXVNNI__)
enum { PEAK_SUMS = 12, PEAK_PRODUCTS = 32 };
typedef __m256i peak_bytes;
#define peak_step(s, a, b) _mm256_dpbusd_avx_epi32(s, a, b)
#define PEAK_EACH PEAK_12
#define PEAK_FACTOR PEAK_ONE_FACTOR
#define PEAK_REGISTER "+x"
#elif defined(__AVX2__)
enum { PEAK_SUMS = 6, PEAK_PRODUCTS = 32 };
typedef __m256i peak_bytes;
#define peak_step(s, a, b) _mm256_add_epi16(s, _mm256_maddubs_epi16(a, b))
#define PEAK_EACH PEAK_6
#define PEAK_FACTOR PEAK_OWN_FACTOR
#define PEAK_REGISTER "+x"
#elif defined(__SSSE3__)
enum { PEAK_SUMS = 6, PEAK_PRODUCTS = 16 };
typedef __m128i peak_bytes;
#define peak_step(s, a, b) _mm_add_epi16(s, _mm_maddubs_epi16(a, b))
#define PEAK_EACH PEAK_6
#define PEAK_FACTOR PEAK_OWN_FACTOR
#define PEAK_REGISTER "+x"
#elif defined(LEGACY1BIT_TIER_SSE2)
enum { PEAK_SUMS = 6, PEAK_PRODUCTS = 8 };
typedef __m128i peak_bytes;
#define peak_step(s, a, b) _mm_add_epi32(s, _mm_madd_epi16(a, b))
#define PEAK_EACH PEAK_6
#define PEAK_FACTOR PEAK_OWN_FACTOR
#define PEAK_REGISTER "+x"
#elif defined(LEGACY1BIT_TIER_SSE)
enum { PEAK_SUMS = 6, PEAK_PRODUCTS = 4 };
typedef __m128 peak_bytes;
#define peak_step(s, a, b) _mm_add_ps(s, _mm_mul_ps(a, b))
#define PEAK_EACH PEAK_6
#define PEAK_FACTOR PEAK_OWN_FACTOR
#define PEAK_REGISTER "+x"
#elif defined(LEGACY1BIT_TIER_I8MM)
enum { PEAK_SUMS = 12, PEAK_PRODUCTS = 32 };
typedef int8x16_t peak_bytes;
#define peak_step(s, a, b) vreinterpretq_s8_s32(vmmlaq_s32(vreinterpretq_s32_s8(s), a, b))
#define PEAK_EACH PEAK_12
#define PEAK_FACTOR PEAK_ONE_FACTOR
#define PEAK_REGISTER "+w"
#elif defined(LEGACY1BIT_TIER_NEONDOT)
enum { PEAK_SUMS = 12, PEAK_PRODUCTS = 16 };
typedef int8x16_t peak_bytes;
#define peak_step(s, a, b) vreinterpretq_s8_s32(vdotq_s32(vreinterpretq_s32_s8(s), a, b))
#define PEAK_EACH PEAK_12
#define PEAK_FACTOR PEAK_ONE_FACTOR
#define PEAK_REGISTER "+w"
#elif defined(LEGACY1BIT_TIER_NEON)
enum { PEAK_SUMS = 12, PEAK_PRODUCTS = 8 };
typedef int8x16_t peak_bytes;
#define peak_step(s, a, b)                                                                         \
    vreinterpretq_s8_s16(vmlal_high_s8(vreinterpretq_s16_s8(s), a, b))
#define PEAK_EACH PEAK_12
#define PEAK_FACTOR PEAK_ONE_FACTOR
#define PEAK_REGISTER "+w"
#else
enum { PEAK_SUMS = 6, PEAK_PRODUCTS = 1 };
typedef int peak_bytes;
#define peak_step(s, a, b) ((s) + (a) * (b))
#define PEAK_EACH PEAK_6
#define PEAK_FACTOR PEAK_OWN_FACTOR
#define PEAK_REGISTER "+r"
#endif

/* rounds * PEAK_SUMS steps. The compiler has to assume that the factors change, and so cannot move
 * products out of the loop, and that the sums are used. */
static void peak_of_dots(long rounds)
{
    peak_bytes b = (peak_bytes){0};
    __asm__("" : PEAK_REGISTER(b));
#define PEAK_DECLARE(i) peak_bytes s##i = b, a##i = b; (void)a##i;
    PEAK_EACH(PEAK_DECLARE)
    for (long round = 0; round < rounds; round++) {
#define PEAK_STEP(i)                                                                               \
        __asm__("" : PEAK_REGISTER(PEAK_FACTOR(i)));                                               \
        s##i = peak_step(s##i, PEAK_FACTOR(i), b);
        PEAK_EACH(PEAK_STEP)
    }
#define PEAK_USE(i) __asm__ volatile("" : PEAK_REGISTER(s##i));
    PEAK_EACH(PEAK_USE)
}

#endif
