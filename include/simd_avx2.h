/* The vector operations of simd.h for AVX2 with FMA (Haswell and later), and for AVX-VNNI (Alder
 * Lake, Zen 5 and later), which has a dot product of bytes: eight lanes. */
#ifndef LEGACY1BIT_SIMD_AVX2_H
#define LEGACY1BIT_SIMD_AVX2_H

#include <immintrin.h>

#ifdef __AVXVNNI__
#define TIER_NAME "avxvnni"
#else
#define TIER_NAME "avx2"
#endif

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

/* In three steps: pairs of rows, pairs of pairs, halves. */
static inline void vf32_transpose(vf32 *square)
{
    __m256 t[8];
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_ps(square[i], square[i + 1]);
        t[i + 1] = _mm256_unpackhi_ps(square[i], square[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        square[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
        square[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
        square[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
        square[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm256_permute2f128_ps(square[i], square[i + 4], 0x20);
        t[i + 4] = _mm256_permute2f128_ps(square[i], square[i + 4], 0x31);
    }
    for (int i = 0; i < 8; i++)
        square[i] = t[i];
}

/* The integers nearest to v, all within -127 to 127, as bytes. */
static inline void i8_round(signed char *p, vf32 v)
{
    const __m256i whole = _mm256_cvtps_epi32(v);
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(whole),
                                          _mm256_extracti128_si256(whole, 1));
    _mm_storel_epi64((__m128i *)p, _mm_packs_epi16(words, words));
}

static inline void i16_round(short *p, vf32 v)
{
    const __m256i whole = _mm256_cvtps_epi32(v);
    _mm_storeu_si128((__m128i *)p, _mm_packs_epi32(_mm256_castsi256_si128(whole),
                                                   _mm256_extracti128_si256(whole, 1)));
}

/* Packing works within halves of a vector; fours of bytes are sorted at the end. */
#define I8_ROUND4
static inline void i8_round4(signed char *p, const vf32 *v)
{
    const __m256i low = _mm256_packs_epi32(_mm256_cvtps_epi32(v[0]), _mm256_cvtps_epi32(v[1]));
    const __m256i high = _mm256_packs_epi32(_mm256_cvtps_epi32(v[2]), _mm256_cvtps_epi32(v[3]));
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    _mm256_storeu_si256((__m256i *)p, _mm256_permutevar8x32_epi32(
        _mm256_packs_epi16(low, high), order));
}

#define VI32
typedef __m256i vi32;

static inline vi32 vi32_zero(void) { return _mm256_setzero_si256(); }
static inline vi32 vi32_splat(int x) { return _mm256_set1_epi32(x); }
static inline vi32 vi32_load(const int *p) { return _mm256_loadu_si256((const __m256i *)p); }

static inline vi32 vi32_load_i8(const signed char *p)
{
    return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)p));
}

static inline int vi32_sum(vi32 v)
{
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}

static inline vi32 vi32_add(vi32 a, vi32 b) { return _mm256_add_epi32(a, b); }
static inline vf32 vi32_float(vi32 v) { return _mm256_cvtepi32_ps(v); }

/* In place, and in order: a tile of sums leaves no registers for copies, or for loads ahead. */
static inline void vi32_add_dot(vi32 *s, vi32 a, vi32 b)
{
#ifdef __AVXVNNI__
    *s = _mm256_dpwssd_avx_epi32(*s, a, b);
    KEEP_ORDER(*s);
#else
    __asm__("vpaddd %1, %0, %0" : "+x"(*s) : "x"(_mm256_madd_epi16(a, b)));
#endif
}

static inline void i16_pairs(int *p, vf32 a, vf32 b)
{
    const __m256i high = _mm256_slli_epi32(_mm256_cvtps_epi32(b), 16);
    _mm256_storeu_si256((__m256i *)p, _mm256_blend_epi16(_mm256_cvtps_epi32(a), high, 0xaa));
}

enum { VSUM_ROWS = 8, VSUM_AT_ONCE = 8 };
typedef __m256i vsum;
typedef struct { __m256i field[4]; } vact;
typedef struct { __m256i field[5]; } vact3;

static inline vsum vsum_zero(void) { return _mm256_setzero_si256(); }
static inline void vsum_store(int *p, vsum s) { _mm256_storeu_si256((__m256i *)p, s); }
static inline void vsum3_store(int *p, vsum s) { vsum_store(p, s); }

static inline __m256i avx2_four(const signed char *x)
{
    int four;
    memcpy(&four, x, 4);
    return _mm256_set1_epi32(four);
}

static inline vact vact_load(const signed char *x)
{
    vact a = {{avx2_four(x), avx2_four(x + 4), avx2_four(x + 8), avx2_four(x + 12)}};
    return a;
}

static inline vact3 vact3_load(const signed char *x)
{
    vact3 a = {{avx2_four(x), avx2_four(x + 4), avx2_four(x + 8), avx2_four(x + 12),
                avx2_four(x + 16)}};
    return a;
}

#ifdef __AVXVNNI__

VPART_IS_VSUM

/* part plus the products of unsigned and signed bytes. */
static inline vpart vpart_dot(vpart part, __m256i codes, __m256i x)
{
    return _mm256_dpbusd_avx_epi32(part, codes, x);
}

#else

/* Unsigned codes times signed activations, in pairs of 16 bits: at most 2 * 3 * 127 = 762 a field,
 * and 30,480 for the five fields of eight tiles. */
enum { VPART_TILES = 8 };
typedef __m256i vpart;

static inline vpart vpart_zero(void) { return _mm256_setzero_si256(); }

static inline vsum vsum_add(vsum s, vpart part)
{
    return _mm256_add_epi32(s, _mm256_madd_epi16(part, _mm256_set1_epi16(1)));
}

static inline vpart vpart_dot(vpart part, __m256i codes, __m256i x)
{
    return _mm256_add_epi16(part, _mm256_maddubs_epi16(codes, x));
}

#endif

static inline vpart vpart_tile(vpart part, const unsigned char *w, vact x)
{
    const __m256i three = _mm256_set1_epi8(3), v = _mm256_loadu_si256((const __m256i *)w);
    for (int i = 0; i < 4; i++)
        part = vpart_dot(part, _mm256_and_si256(_mm256_srli_epi16(v, 2 * i), three), x.field[i]);
    return part;
}

/* All rows use a field before the next one is unpacked: so the sums stay in registers. */
#define VPART_ROWS
static inline void avx2_rows(vpart *part, __m256i field, const signed char *x, long stride)
{
    for (int t = 0; t < VSUM_AT_ONCE; t++) {
        part[t] = vpart_dot(part[t], field, avx2_four(x + t * stride));
        KEEP_ORDER(part[t]);
    }
}

static inline void vpart_rows(vpart *part, const unsigned char *w, const signed char *x, long stride)
{
    const __m256i three = _mm256_set1_epi8(3), v = _mm256_loadu_si256((const __m256i *)w);
    for (int i = 0; i < 4; i++)
        avx2_rows(part, _mm256_and_si256(_mm256_srli_epi16(v, 2 * i), three), x + 4 * i, stride);
}

/* The next trit of every byte: two averages give 3/4 of the byte, whose top two bits are the trit.
 * Averages round up; subtracting 1 first makes them round down. */
static inline __m256i avx2_trit(__m256i *v)
{
    const __m256i less = _mm256_subs_epu8(*v, _mm256_set1_epi8(1));
    const __m256i top = _mm256_avg_epu8(less, _mm256_avg_epu8(less, _mm256_setzero_si256()));
    *v = _mm256_add_epi8(*v, _mm256_add_epi8(*v, *v));
    return _mm256_and_si256(_mm256_srli_epi16(top, 6), _mm256_set1_epi8(3));
}

static inline vpart vpart_tile3(vpart part, const unsigned char *w, vact3 x)
{
    __m256i v = _mm256_loadu_si256((const __m256i *)w);
    for (int i = 0; i < 5; i++)
        part = vpart_dot(part, avx2_trit(&v), x.field[i]);
    return part;
}

static inline void vpart_rows3(vpart *part, const unsigned char *w, const signed char *x,
                               long stride)
{
    __m256i v = _mm256_loadu_si256((const __m256i *)w);
    for (int i = 0; i < 5; i++)
        avx2_rows(part, avx2_trit(&v), x + 4 * i, stride);
}

static inline void simd_prepare(void) {}

#endif
