/* The vector operations of simd.h for AVX-512 (F, BW, DQ, VL; Skylake server and later), and with
 * VNNI (Cascade Lake, Ice Lake, Zen 4 and later), which those with BF16 or AMX have, too: sixteen
 * lanes, masked tails. */
#ifndef LEGACY1BIT_SIMD_AVX512_H
#define LEGACY1BIT_SIMD_AVX512_H

#include <immintrin.h>

#if defined(LEGACY1BIT_TIER_AMX)
#define TIER_NAME "amx"
#elif defined(LEGACY1BIT_TIER_AVX512BF16)
#define TIER_NAME "avx512bf16"
#elif defined(LEGACY1BIT_TIER_AVX512VNNI)
#define TIER_NAME "avx512vnni"
#else
#define TIER_NAME "avx512"
#endif

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

/* square[16][16] of 32-bit elements becomes its transpose. */
static inline void avx512_transpose(__m512i *square)
{
    __m512i t[16];
    int i;
    for (i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(square[i], square[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(square[i], square[i + 1]);
    }
    for (i = 0; i < 16; i += 4) {
        square[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        square[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        square[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        square[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(square[i], square[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(square[i], square[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(square[i + 8], square[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(square[i + 8], square[i + 12], 0xdd);
    }
    for (i = 0; i < 4; i++) {
        square[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        square[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        square[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        square[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
}

static inline void vf32_transpose(vf32 *square) { avx512_transpose((__m512i *)square); }

/* The integers nearest to v, all within -127 to 127, as bytes. */
static inline void i8_round(signed char *p, vf32 v)
{
    _mm_storeu_si128((__m128i *)p, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v)));
}

static inline void i16_round(short *p, vf32 v)
{
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(v)));
}

/* Packing works within quarters of a vector; fours of bytes are sorted at the end. */
#define I8_ROUND4
static inline void i8_round4(signed char *p, const vf32 *v)
{
    const __m512i low = _mm512_packs_epi32(_mm512_cvtps_epi32(v[0]), _mm512_cvtps_epi32(v[1]));
    const __m512i high = _mm512_packs_epi32(_mm512_cvtps_epi32(v[2]), _mm512_cvtps_epi32(v[3]));
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    _mm512_storeu_si512(p, _mm512_permutexvar_epi32(order, _mm512_packs_epi16(low, high)));
}

#define VI32
typedef __m512i vi32;

static inline vi32 vi32_zero(void) { return _mm512_setzero_si512(); }
static inline vi32 vi32_splat(int x) { return _mm512_set1_epi32(x); }
static inline vi32 vi32_load(const int *p) { return _mm512_loadu_si512(p); }
static inline int vi32_sum(vi32 v) { return _mm512_reduce_add_epi32(v); }

static inline vi32 vi32_load_i8(const signed char *p)
{
    return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)p));
}

static inline vi32 vi32_add(vi32 a, vi32 b) { return _mm512_add_epi32(a, b); }
static inline vf32 vi32_float(vi32 v) { return _mm512_cvtepi32_ps(v); }

/* In place, and in order: a tile of sums leaves no registers for copies, or for loads ahead. */
static inline void vi32_add_dot(vi32 *s, vi32 a, vi32 b)
{
#ifdef __AVX512VNNI__
    *s = _mm512_dpwssd_epi32(*s, a, b);
    KEEP_ORDER(*s);
#else
    __asm__("vpaddd %1, %0, %0" : "+v"(*s) : "v"(_mm512_madd_epi16(a, b)));
#endif
}

static inline void i16_pairs(int *p, vf32 a, vf32 b)
{
    const __m512i high = _mm512_slli_epi32(_mm512_cvtps_epi32(b), 16);
    _mm512_storeu_si512(p, _mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_cvtps_epi32(a), high));
}

enum { VSUM_ROWS = 16 };
typedef struct { __m512i field[4]; } vact;
typedef struct { __m512i field[5]; } vact3;

static inline __m512i avx512_four(const signed char *x)
{
    int four;
    memcpy(&four, x, 4);
    return _mm512_set1_epi32(four);
}

static inline vact vact_load(const signed char *x)
{
    vact a = {{avx512_four(x), avx512_four(x + 4), avx512_four(x + 8), avx512_four(x + 12)}};
    return a;
}

static inline vact3 vact3_load(const signed char *x)
{
    vact3 a = {{avx512_four(x), avx512_four(x + 4), avx512_four(x + 8), avx512_four(x + 12),
                avx512_four(x + 16)}};
    return a;
}

/* The next trit of every byte: two averages give 3/4 of the byte, whose top two bits are the trit.
 * Averages round up; subtracting 1 first makes them round down. */
static inline __m512i avx512_trit(__m512i *v)
{
    const __m512i less = _mm512_subs_epu8(*v, _mm512_set1_epi8(1));
    const __m512i top = _mm512_avg_epu8(less, _mm512_avg_epu8(less, _mm512_setzero_si512()));
    *v = _mm512_add_epi8(*v, _mm512_add_epi8(*v, *v));
    return _mm512_and_si512(_mm512_srli_epi16(top, 6), _mm512_set1_epi8(3));
}

#ifdef __AVX512VNNI__

enum { VSUM_AT_ONCE = 4 };

/* Fields are masked in place, and each has its own sums, weighted 1, 4, 16 and 64: no shifts, and
 * four independent chains of additions. */
typedef struct { __m512i field[4]; } vsum;

static inline vsum vsum_zero(void)
{
    const __m512i zero = _mm512_setzero_si512();
    vsum s = {{zero, zero, zero, zero}};
    return s;
}

VPART_IS_VSUM

static inline void vsum_store(int *p, vsum s)
{
    __m512i total = s.field[0];
    total = _mm512_add_epi32(total, _mm512_srai_epi32(s.field[1], 2));
    total = _mm512_add_epi32(total, _mm512_srai_epi32(s.field[2], 4));
    total = _mm512_add_epi32(total, _mm512_srai_epi32(s.field[3], 6));
    _mm512_storeu_si512(p, total);
}

static inline vpart vpart_tile(vpart s, const unsigned char *w, vact x)
{
    const __m512i v = _mm512_loadu_si512(w);
    for (int i = 0; i < 4; i++)
        s.field[i] = _mm512_dpbusd_epi32(
            s.field[i], _mm512_and_si512(v, _mm512_set1_epi8((char)(3 << 2 * i))), x.field[i]);
    return s;
}

/* A fraction f in 256ths has the trit t = (3 f - g) / 256, where g, the fraction of the other
 * trits, is 3 f modulo 256. So trits need not be extracted: fractions are multiplied instead, and
 * 256 times the sum of t x is 3 sum(f x) - sum(g x), even if intermediate sums wrap around. */
static inline vpart vpart_tile3(vpart s, const unsigned char *w, vact3 x)
{
    __m512i f = _mm512_loadu_si512(w);
    for (int i = 0; i < 5; i++) {
        const __m512i g = _mm512_add_epi8(f, _mm512_add_epi8(f, f));
        s.field[i % 2] = _mm512_dpbusd_epi32(s.field[i % 2], f, x.field[i]);
        s.field[2 + i % 2] = _mm512_dpbusd_epi32(s.field[2 + i % 2], g, x.field[i]);
        f = g;
    }
    return s;
}

static inline void vsum3_store(int *p, vsum s)
{
    const __m512i f = _mm512_add_epi32(s.field[0], s.field[1]);
    const __m512i g = _mm512_add_epi32(s.field[2], s.field[3]);
    const __m512i total = _mm512_sub_epi32(_mm512_add_epi32(f, _mm512_add_epi32(f, f)), g);
    _mm512_storeu_si512(p, _mm512_srai_epi32(total, 8));
}

#else

/* Unsigned codes times signed activations, in pairs of 16 bits: at most 2 * 3 * 127 = 762 a field,
 * and 30,480 for the five fields of eight tiles. */
enum { VSUM_AT_ONCE = 8, VPART_TILES = 8 };
typedef __m512i vsum, vpart;

static inline vsum vsum_zero(void) { return _mm512_setzero_si512(); }
static inline vpart vpart_zero(void) { return _mm512_setzero_si512(); }
static inline void vsum_store(int *p, vsum s) { _mm512_storeu_si512(p, s); }
static inline void vsum3_store(int *p, vsum s) { vsum_store(p, s); }

static inline vsum vsum_add(vsum s, vpart part)
{
    return _mm512_add_epi32(s, _mm512_madd_epi16(part, _mm512_set1_epi16(1)));
}

static inline vpart vpart_tile(vpart part, const unsigned char *w, vact x)
{
    const __m512i three = _mm512_set1_epi8(3), v = _mm512_loadu_si512(w);
    for (int i = 0; i < 4; i++)
        part = _mm512_add_epi16(part, _mm512_maddubs_epi16(
            _mm512_and_si512(_mm512_srli_epi16(v, 2 * i), three), x.field[i]));
    return part;
}

/* All rows use a field before the next one is unpacked: so the sums stay in registers. */
#define VPART_ROWS
static inline void avx512_rows(vpart *part, __m512i field, const signed char *x, long stride)
{
    for (int t = 0; t < VSUM_AT_ONCE; t++) {
        part[t] = _mm512_add_epi16(part[t],
                                   _mm512_maddubs_epi16(field, avx512_four(x + t * stride)));
        KEEP_ORDER(part[t]);
    }
}

static inline void vpart_rows(vpart *part, const unsigned char *w, const signed char *x, long stride)
{
    const __m512i three = _mm512_set1_epi8(3), v = _mm512_loadu_si512(w);
    for (int i = 0; i < 4; i++)
        avx512_rows(part, _mm512_and_si512(_mm512_srli_epi16(v, 2 * i), three), x + 4 * i, stride);
}

static inline void vpart_rows3(vpart *part, const unsigned char *w, const signed char *x,
                               long stride)
{
    __m512i v = _mm512_loadu_si512(w);
    for (int i = 0; i < 5; i++)
        avx512_rows(part, avx512_trit(&v), x + 4 * i, stride);
}

static inline vpart vpart_tile3(vpart part, const unsigned char *w, vact3 x)
{
    __m512i v = _mm512_loadu_si512(w);
    for (int i = 0; i < 5; i++)
        part = _mm512_add_epi16(part, _mm512_maddubs_epi16(avx512_trit(&v), x.field[i]));
    return part;
}

#endif

static inline void simd_prepare(void) {}

#endif
