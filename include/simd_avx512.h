/* The vector vocabulary for AVX-512 (F, BW, DQ, VL; Skylake server and later): sixteen lanes,
 * tails by mask. See simd.h for the meanings. */
#ifndef LEGACY1BIT_SIMD_AVX512_H
#define LEGACY1BIT_SIMD_AVX512_H

#include <immintrin.h>

#define TIER_NAME "avx512"

typedef __m512 vf32;

enum { VF32_LANES = 16, TILE_ROWS = 14, TILE_VECTORS = 2 };

static inline __mmask16 avx512_first(long n) { return (__mmask16)((1u << n) - 1u); }

static inline vf32 vf32_zero(void) { return _mm512_setzero_ps(); }
static inline vf32 vf32_splat(float x) { return _mm512_set1_ps(x); }
static inline vf32 vf32_load(const float *p) { return _mm512_loadu_ps(p); }
static inline vf32 vf32_load_first(const float *p, long n) { return _mm512_maskz_loadu_ps(avx512_first(n), p); }
static inline void vf32_store(float *p, vf32 v) { _mm512_storeu_ps(p, v); }
static inline void vf32_store_first(float *p, long n, vf32 v) { _mm512_mask_storeu_ps(p, avx512_first(n), v); }

static inline vf32 vf32_load_i8(const signed char *p)
{
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
}

static inline vf32 vf32_load_i8_first(const signed char *p, long n)
{
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(avx512_first(n), p)));
}

static inline vf32 vf32_add(vf32 a, vf32 b) { return _mm512_add_ps(a, b); }
static inline vf32 vf32_sub(vf32 a, vf32 b) { return _mm512_sub_ps(a, b); }
static inline vf32 vf32_mul(vf32 a, vf32 b) { return _mm512_mul_ps(a, b); }
static inline vf32 vf32_div(vf32 a, vf32 b) { return _mm512_div_ps(a, b); }
static inline vf32 vf32_sqrt(vf32 v) { return _mm512_sqrt_ps(v); }
static inline vf32 vf32_fmadd(vf32 a, vf32 b, vf32 c) { return _mm512_fmadd_ps(a, b, c); }
static inline vf32 vf32_max(vf32 a, vf32 b) { return _mm512_max_ps(a, b); }
static inline vf32 vf32_min(vf32 a, vf32 b) { return _mm512_min_ps(a, b); }

static inline vf32 vf32_round(vf32 v)
{
    return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

static inline vf32 vf32_scale_pow2(vf32 v, vf32 n) { return _mm512_scalef_ps(v, n); }

static inline vf32 vf32_where_positive(vf32 x, vf32 y)
{
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GT_OQ), y);
}

static inline float vf32_sum(vf32 v) { return _mm512_reduce_add_ps(v); }
static inline float vf32_largest(vf32 v) { return _mm512_reduce_max_ps(v); }

#endif
