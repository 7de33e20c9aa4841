/* The vector vocabulary for AVX2 with FMA (Haswell and later): eight lanes. See simd.h for
 * the meanings. */
#ifndef LEGACY1BIT_SIMD_AVX2_H
#define LEGACY1BIT_SIMD_AVX2_H

#include <immintrin.h>

#define TIER_NAME "avx2"

typedef __m256 vf32;

enum { VF32_LANES = 8, TILE_ROWS = 6, TILE_VECTORS = 2 };

static inline __m256i avx2_first(long n)
{
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)n), lane);
}

static inline vf32 vf32_zero(void) { return _mm256_setzero_ps(); }
static inline vf32 vf32_splat(float x) { return _mm256_set1_ps(x); }
static inline vf32 vf32_load(const float *p) { return _mm256_loadu_ps(p); }
static inline vf32 vf32_load_first(const float *p, long n) { return _mm256_maskload_ps(p, avx2_first(n)); }
static inline void vf32_store(float *p, vf32 v) { _mm256_storeu_ps(p, v); }
static inline void vf32_store_first(float *p, long n, vf32 v) { _mm256_maskstore_ps(p, avx2_first(n), v); }

static inline vf32 vf32_load_i8(const signed char *p)
{
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
}

static inline vf32 vf32_load_i8_first(const signed char *p, long n)
{
    signed char lanes[8] = {0, 0, 0, 0, 0, 0, 0, 0};
    for (long i = 0; i < n; i++)
        lanes[i] = p[i];
    return vf32_load_i8(lanes);
}

static inline vf32 vf32_add(vf32 a, vf32 b) { return _mm256_add_ps(a, b); }
static inline vf32 vf32_sub(vf32 a, vf32 b) { return _mm256_sub_ps(a, b); }
static inline vf32 vf32_mul(vf32 a, vf32 b) { return _mm256_mul_ps(a, b); }
static inline vf32 vf32_div(vf32 a, vf32 b) { return _mm256_div_ps(a, b); }
static inline vf32 vf32_sqrt(vf32 v) { return _mm256_sqrt_ps(v); }
static inline vf32 vf32_fmadd(vf32 a, vf32 b, vf32 c) { return _mm256_fmadd_ps(a, b, c); }
static inline vf32 vf32_max(vf32 a, vf32 b) { return _mm256_max_ps(a, b); }
static inline vf32 vf32_min(vf32 a, vf32 b) { return _mm256_min_ps(a, b); }

static inline vf32 vf32_round(vf32 v)
{
    return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

static inline vf32 avx2_pow2(__m256i n)
{
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
}

static inline vf32 vf32_scale_pow2(vf32 v, vf32 n)
{
    __m256i whole = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(whole, 1);
    return _mm256_mul_ps(_mm256_mul_ps(v, avx2_pow2(half)),
                         avx2_pow2(_mm256_sub_epi32(whole, half)));
}

static inline vf32 vf32_where_positive(vf32 x, vf32 y)
{
    return _mm256_and_ps(_mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_GT_OQ), y);
}

static inline float vf32_sum(vf32 v)
{
    __m128 h = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    h = _mm_add_ps(h, _mm_movehl_ps(h, h));
    return _mm_cvtss_f32(_mm_add_ss(h, _mm_shuffle_ps(h, h, 1)));
}

static inline float vf32_largest(vf32 v)
{
    __m128 h = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    h = _mm_max_ps(h, _mm_movehl_ps(h, h));
    return _mm_cvtss_f32(_mm_max_ss(h, _mm_shuffle_ps(h, h, 1)));
}

#endif
