/* The vector operations of simd.h for SSE2, which every x86-64 CPU has, and for SSSE3 (Core 2) and
 * SSE4.1 (Penryn), which need fewer instructions: four lanes, no fused multiply-add. */
#ifndef LEGACY1BIT_SIMD_SSE2_H
#define LEGACY1BIT_SIMD_SSE2_H

#include "simd_sse.h"

#include <emmintrin.h>
#ifdef __SSSE3__
#include <tmmintrin.h>
#endif
#ifdef __SSE4_1__
#include <smmintrin.h>
#endif

#if defined(LEGACY1BIT_TIER_SSE41)
#define TIER_NAME "sse41"
#elif defined(LEGACY1BIT_TIER_SSSE3)
#define TIER_NAME "ssse3"
#else
#define TIER_NAME "sse2"
#endif

static inline void simd_prepare(void) {}

static inline vf32 vf32_load_i8(const signed char *p)
{
    int four;
    __m128i v;
    memcpy(&four, p, 4);
    v = _mm_cvtsi32_si128(four);
#ifdef __SSE4_1__
    return _mm_cvtepi32_ps(_mm_cvtepi8_epi32(v));
#else
    /* Duplicating bytes to 16 and then to 32 bits leaves each in the top byte of its lane; the
     * arithmetic shift moves it down and extends its sign. */
    v = _mm_unpacklo_epi8(v, v);
    v = _mm_unpacklo_epi16(v, v);
    return _mm_cvtepi32_ps(_mm_srai_epi32(v, 24));
#endif
}

static inline vf32 vf32_round(vf32 v)
{
#ifdef __SSE4_1__
    return _mm_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    return _mm_cvtepi32_ps(_mm_cvtps_epi32(v));
#endif
}

static inline vf32 sse2_pow2(__m128i n)
{
    return _mm_castsi128_ps(_mm_slli_epi32(_mm_add_epi32(n, _mm_set1_epi32(127)), 23));
}

static inline vf32 vf32_scale_pow2(vf32 v, vf32 n)
{
    __m128i whole = _mm_cvtps_epi32(n), half = _mm_srai_epi32(whole, 1);
    return _mm_mul_ps(_mm_mul_ps(v, sse2_pow2(half)), sse2_pow2(_mm_sub_epi32(whole, half)));
}

static inline void i8_round(signed char *p, vf32 v)
{
    __m128i words = _mm_packs_epi32(_mm_cvtps_epi32(v), _mm_setzero_si128());
    const int four = _mm_cvtsi128_si32(_mm_packs_epi16(words, words));
    memcpy(p, &four, 4);
}

static inline void i16_round(short *p, vf32 v)
{
    const __m128i whole = _mm_cvtps_epi32(v);
    _mm_storel_epi64((__m128i *)p, _mm_packs_epi32(whole, whole));
}

#define I8_ROUND4
static inline void i8_round4(signed char *p, const vf32 *v)
{
    const __m128i low = _mm_packs_epi32(_mm_cvtps_epi32(v[0]), _mm_cvtps_epi32(v[1]));
    const __m128i high = _mm_packs_epi32(_mm_cvtps_epi32(v[2]), _mm_cvtps_epi32(v[3]));
    _mm_storeu_si128((__m128i *)p, _mm_packs_epi16(low, high));
}

#define VI32
typedef __m128i vi32;

static inline vi32 vi32_zero(void) { return _mm_setzero_si128(); }
static inline vi32 vi32_splat(int x) { return _mm_set1_epi32(x); }
static inline vi32 vi32_load(const int *p) { return _mm_loadu_si128((const __m128i *)p); }

static inline vi32 vi32_load_i8(const signed char *p)
{
    const __m128i v = _mm_loadl_epi64((const __m128i *)p);
#ifdef __SSE4_1__
    return _mm_cvtepi8_epi16(v);
#else
    return _mm_srai_epi16(_mm_unpacklo_epi8(v, v), 8);
#endif
}

static inline int vi32_sum(vi32 v)
{
    v = _mm_add_epi32(v, _mm_shuffle_epi32(v, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(v, _mm_shuffle_epi32(v, 0xb1)));
}

static inline vi32 vi32_add(vi32 a, vi32 b) { return _mm_add_epi32(a, b); }
static inline vf32 vi32_float(vi32 v) { return _mm_cvtepi32_ps(v); }

static inline void vi32_add_dot(vi32 *s, vi32 a, vi32 b)
{
    *s = _mm_add_epi32(*s, _mm_madd_epi16(a, b));
}

static inline void i16_pairs(int *p, vf32 a, vf32 b)
{
    const __m128i low = _mm_and_si128(_mm_cvtps_epi32(a), _mm_set1_epi32(0xffff));
    _mm_storeu_si128((__m128i *)p, _mm_or_si128(low, _mm_slli_epi32(_mm_cvtps_epi32(b), 16)));
}

typedef __m128i vsum;

static inline vsum vsum_zero(void) { return _mm_setzero_si128(); }

#ifdef __SSSE3__

/* Unsigned codes times signed activations, in pairs of 16 bits: at most 2 * 3 * 127 = 762 a field,
 * and 30,480 for the five fields of eight tiles. */
enum { VSUM_ROWS = 4, VSUM_AT_ONCE = 1, VPART_TILES = 8 };
typedef __m128i vpart;
typedef struct { __m128i field[4]; } vact;
typedef struct { __m128i field[5]; } vact3;

static inline vpart vpart_zero(void) { return _mm_setzero_si128(); }
static inline void vsum_store(int *p, vsum s) { _mm_storeu_si128((__m128i *)p, s); }
static inline void vsum3_store(int *p, vsum s) { vsum_store(p, s); }

static inline vact vact_load(const signed char *x)
{
    const __m128i v = _mm_loadu_si128((const __m128i *)x);
    vact a = {{_mm_shuffle_epi32(v, 0x00), _mm_shuffle_epi32(v, 0x55), _mm_shuffle_epi32(v, 0xaa),
               _mm_shuffle_epi32(v, 0xff)}};
    return a;
}

static inline vact3 vact3_load(const signed char *x)
{
    const vact first = vact_load(x);
    vact3 a = {{first.field[0], first.field[1], first.field[2], first.field[3], first.field[0]}};
    int four;
    memcpy(&four, x + 16, 4);
    a.field[4] = _mm_shuffle_epi32(_mm_cvtsi32_si128(four), 0x00);
    return a;
}

static inline vsum vsum_add(vsum s, vpart part)
{
    return _mm_add_epi32(s, _mm_madd_epi16(part, _mm_set1_epi16(1)));
}

static inline vpart vpart_tile(vpart part, const unsigned char *w, vact x)
{
    const __m128i three = _mm_set1_epi8(3), v = _mm_loadu_si128((const __m128i *)w);
    for (int i = 0; i < 4; i++)
        part = _mm_add_epi16(part, _mm_maddubs_epi16(
            _mm_and_si128(_mm_srli_epi16(v, 2 * i), three), x.field[i]));
    return part;
}

static inline vpart vpart_tile3(vpart part, const unsigned char *w, vact3 x)
{
    const __m128i three = _mm_set1_epi8(3);
    __m128i v = _mm_loadu_si128((const __m128i *)w);
    for (int i = 0; i < 5; i++) {
        /* Two averages give 3/4 of the byte, whose top two bits are the trit. Averages round up;
         * subtracting 1 first makes them round down. */
        const __m128i less = _mm_subs_epu8(v, _mm_set1_epi8(1));
        const __m128i top = _mm_avg_epu8(less, _mm_avg_epu8(less, _mm_setzero_si128()));
        part = _mm_add_epi16(part, _mm_maddubs_epi16(
            _mm_and_si128(_mm_srli_epi16(top, 6), three), x.field[i]));
        v = _mm_add_epi8(v, _mm_add_epi8(v, v));
    }
    return part;
}

#else

enum { VSUM_ROWS = 4, VSUM_AT_ONCE = 1 };
VPART_IS_VSUM

/* 16-bit words hold the byte of an even column and above it that of an odd column. Fields are
 * masked in place, so they are weighted 1, 4, 16 and 64, and the activations 64, 16, 4 and 1: every
 * product is scaled by 64, and sums fit 32 bits up to 88,000 columns. */
typedef struct { __m128i even[4], odd[4]; } vact;
typedef struct { __m128i even[5], odd[5]; } vact3;

static inline void vsum_store(int *p, vsum s)
{
    _mm_storeu_si128((__m128i *)p, _mm_srai_epi32(s, 6));
}

static inline void vsum3_store(int *p, vsum s) { vsum_store(p, s); }

static inline vact vact_load(const signed char *x)
{
    const __m128i v = _mm_loadu_si128((const __m128i *)x);
    const __m128i factors = _mm_setr_epi16(64, 64, 16, 16, 4, 4, 1, 1);
    const __m128i even = _mm_mullo_epi16(_mm_srai_epi16(_mm_slli_epi16(v, 8), 8), factors);
    const __m128i odd = _mm_mullo_epi16(_mm_srai_epi16(v, 8), factors);
    vact a = {{_mm_shuffle_epi32(even, 0x00), _mm_shuffle_epi32(even, 0x55),
               _mm_shuffle_epi32(even, 0xaa), _mm_shuffle_epi32(even, 0xff)},
              {_mm_shuffle_epi32(odd, 0x00), _mm_shuffle_epi32(odd, 0x55),
               _mm_shuffle_epi32(odd, 0xaa), _mm_shuffle_epi32(odd, 0xff)}};
    return a;
}

static inline vpart vpart_tile(vpart s, const unsigned char *w, vact x)
{
    const __m128i low = _mm_loadu_si128((const __m128i *)w), high = _mm_srli_epi16(low, 8);
    for (int i = 0; i < 4; i++) {
        const __m128i mask = _mm_set1_epi16((short)(3 << 2 * i));
        s = _mm_add_epi32(s, _mm_add_epi32(_mm_madd_epi16(_mm_and_si128(low, mask), x.even[i]),
                                           _mm_madd_epi16(_mm_and_si128(high, mask), x.odd[i])));
    }
    return s;
}

static inline vact3 vact3_load(const signed char *x)
{
    const __m128i v = _mm_loadu_si128((const __m128i *)x);
    const __m128i even = _mm_slli_epi16(_mm_srai_epi16(_mm_slli_epi16(v, 8), 8), 6);
    const __m128i odd = _mm_slli_epi16(_mm_srai_epi16(v, 8), 6);
    const __m128i last_even = _mm_set1_epi32((64 * x[16] & 0xffff) | 64 * x[18] * 65536);
    const __m128i last_odd = _mm_set1_epi32((64 * x[17] & 0xffff) | 64 * x[19] * 65536);
    vact3 a = {{_mm_shuffle_epi32(even, 0x00), _mm_shuffle_epi32(even, 0x55),
                _mm_shuffle_epi32(even, 0xaa), _mm_shuffle_epi32(even, 0xff), last_even},
               {_mm_shuffle_epi32(odd, 0x00), _mm_shuffle_epi32(odd, 0x55),
                _mm_shuffle_epi32(odd, 0xaa), _mm_shuffle_epi32(odd, 0xff), last_odd}};
    return a;
}

static inline vpart vpart_tile3(vpart s, const unsigned char *w, vact3 x)
{
    const __m128i byte = _mm_set1_epi16(255), v = _mm_loadu_si128((const __m128i *)w);
    __m128i low = _mm_and_si128(v, byte), high = _mm_srli_epi16(v, 8);
    for (int i = 0; i < 5; i++) {
        low = _mm_add_epi16(low, _mm_add_epi16(low, low));
        high = _mm_add_epi16(high, _mm_add_epi16(high, high));
        s = _mm_add_epi32(s, _mm_add_epi32(_mm_madd_epi16(_mm_srli_epi16(low, 8), x.even[i]),
                                           _mm_madd_epi16(_mm_srli_epi16(high, 8), x.odd[i])));
        low = _mm_and_si128(low, byte);
        high = _mm_and_si128(high, byte);
    }
    return s;
}

#endif
#endif
