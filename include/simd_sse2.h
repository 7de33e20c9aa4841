/* The vector vocabulary for SSE2, which every x86-64 CPU has: four lanes, no fused
 * multiply-add. See simd.h for the meanings. */
#ifndef LEGACY1BIT_SIMD_SSE2_H
#define LEGACY1BIT_SIMD_SSE2_H

#include <emmintrin.h>

#define TIER_NAME "sse2"

typedef __m128 vf32;

enum { VF32_LANES = 4, TILE_ROWS = 4, TILE_VECTORS = 2 };

static inline vf32 vf32_zero(void) { return _mm_setzero_ps(); }
static inline vf32 vf32_splat(float x) { return _mm_set1_ps(x); }
static inline vf32 vf32_load(const float *p) { return _mm_loadu_ps(p); }
static inline void vf32_store(float *p, vf32 v) { _mm_storeu_ps(p, v); }

static inline vf32 vf32_load_first(const float *p, long n)
{
    float lanes[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    for (long i = 0; i < n; i++)
        lanes[i] = p[i];
    return _mm_loadu_ps(lanes);
}

static inline void vf32_store_first(float *p, long n, vf32 v)
{
    float lanes[4];
    _mm_storeu_ps(lanes, v);
    for (long i = 0; i < n; i++)
        p[i] = lanes[i];
}

static inline vf32 sse2_widen_i8(int four)
{
    /* Bytes doubled to 16 and then to 32 bits leave each in the top byte of its lane; the
     * arithmetic shift brings it down with its sign. */
    __m128i v = _mm_cvtsi32_si128(four);
    v = _mm_unpacklo_epi8(v, v);
    v = _mm_unpacklo_epi16(v, v);
    return _mm_cvtepi32_ps(_mm_srai_epi32(v, 24));
}

static inline vf32 vf32_load_i8(const signed char *p)
{
    int four;
    memcpy(&four, p, 4);
    return sse2_widen_i8(four);
}

static inline vf32 vf32_load_i8_first(const signed char *p, long n)
{
    signed char lanes[4] = {0, 0, 0, 0};
    for (long i = 0; i < n; i++)
        lanes[i] = p[i];
    return vf32_load_i8(lanes);
}

static inline vf32 vf32_add(vf32 a, vf32 b) { return _mm_add_ps(a, b); }
static inline vf32 vf32_sub(vf32 a, vf32 b) { return _mm_sub_ps(a, b); }
static inline vf32 vf32_mul(vf32 a, vf32 b) { return _mm_mul_ps(a, b); }
static inline vf32 vf32_div(vf32 a, vf32 b) { return _mm_div_ps(a, b); }
static inline vf32 vf32_sqrt(vf32 v) { return _mm_sqrt_ps(v); }
static inline vf32 vf32_fmadd(vf32 a, vf32 b, vf32 c) { return _mm_add_ps(_mm_mul_ps(a, b), c); }
static inline vf32 vf32_max(vf32 a, vf32 b) { return _mm_max_ps(a, b); }
static inline vf32 vf32_min(vf32 a, vf32 b) { return _mm_min_ps(a, b); }
static inline vf32 vf32_round(vf32 v) { return _mm_cvtepi32_ps(_mm_cvtps_epi32(v)); }

static inline vf32 sse2_pow2(__m128i n)
{
    return _mm_castsi128_ps(_mm_slli_epi32(_mm_add_epi32(n, _mm_set1_epi32(127)), 23));
}

static inline vf32 vf32_scale_pow2(vf32 v, vf32 n)
{
    __m128i whole = _mm_cvtps_epi32(n), half = _mm_srai_epi32(whole, 1);
    return _mm_mul_ps(_mm_mul_ps(v, sse2_pow2(half)), sse2_pow2(_mm_sub_epi32(whole, half)));
}

static inline vf32 vf32_where_positive(vf32 x, vf32 y)
{
    return _mm_and_ps(_mm_cmpgt_ps(x, _mm_setzero_ps()), y);
}

static inline float vf32_sum(vf32 v)
{
    v = _mm_add_ps(v, _mm_movehl_ps(v, v));
    return _mm_cvtss_f32(_mm_add_ss(v, _mm_shuffle_ps(v, v, 1)));
}

static inline float vf32_largest(vf32 v)
{
    v = _mm_max_ps(v, _mm_movehl_ps(v, v));
    return _mm_cvtss_f32(_mm_max_ss(v, _mm_shuffle_ps(v, v, 1)));
}

#endif
