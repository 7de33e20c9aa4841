/* The vector operations of simd.h for SSE (Pentium III and later): four lanes of floats, and no
 * integer vectors. simd_sse2.h includes this file for the operations that are the same in SSE2. */
#ifndef LEGACY1BIT_SIMD_SSE_H
#define LEGACY1BIT_SIMD_SSE_H

#include <xmmintrin.h>

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

static inline vf32 vf32_add(vf32 a, vf32 b) { return _mm_add_ps(a, b); }
static inline vf32 vf32_sub(vf32 a, vf32 b) { return _mm_sub_ps(a, b); }
static inline vf32 vf32_mul(vf32 a, vf32 b) { return _mm_mul_ps(a, b); }
static inline vf32 vf32_div(vf32 a, vf32 b) { return _mm_div_ps(a, b); }
static inline vf32 vf32_sqrt(vf32 v) { return _mm_sqrt_ps(v); }
static inline vf32 vf32_fmadd(vf32 a, vf32 b, vf32 c) { return _mm_add_ps(_mm_mul_ps(a, b), c); }
static inline vf32 vf32_max(vf32 a, vf32 b) { return _mm_max_ps(a, b); }
static inline vf32 vf32_min(vf32 a, vf32 b) { return _mm_min_ps(a, b); }

static inline vf32 vf32_where_positive(vf32 x, vf32 y)
{
    return _mm_and_ps(_mm_cmpgt_ps(x, _mm_setzero_ps()), y);
}

static inline void vf32_transpose(vf32 *square)
{
    _MM_TRANSPOSE4_PS(square[0], square[1], square[2], square[3]);
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

#if defined(LEGACY1BIT_TIER_SSE)

#define TIER_NAME "sse"

/* Without integer vectors, conversions use tables: one float for each byte, and four floats for the
 * four codes, or the first four of the five trits, in a byte. */
static float sse_of_i8[256], sse_fifth[256];
static _Alignas(16) float sse_codes[256][4], sse_trits[256][4];

static inline void simd_prepare(void)
{
    for (int byte = 0; byte < 256; byte++) {
        int rest = byte;
        sse_of_i8[byte] = (float)(signed char)byte;
        for (int i = 0; i < 4; i++) {
            sse_codes[byte][i] = (float)(byte >> 2 * i & 3);
            sse_trits[byte][i] = (float)(3 * rest >> 8);
            rest = 3 * rest & 255;
        }
        sse_fifth[byte] = (float)(3 * rest >> 8);
    }
}

static inline vf32 vf32_load_i8(const signed char *p)
{
    const unsigned char *byte = (const unsigned char *)p;
    return _mm_setr_ps(sse_of_i8[byte[0]], sse_of_i8[byte[1]], sse_of_i8[byte[2]],
                       sse_of_i8[byte[3]]);
}

/* At 1.5 * 2^23 float32 has no fraction bits, so adding it rounds, and subtracting it is exact. */
static inline vf32 vf32_round(vf32 v)
{
    const vf32 magic = _mm_set1_ps(12582912.0f);
    return _mm_sub_ps(_mm_add_ps(v, magic), magic);
}

/* NaN, whose conversion is undefined in C, becomes 0. */
static inline int sse_int(float v) { return v == v ? (int)v : 0; }

/* 2^n for integer n from -126 to 127, by its exponent bits. */
static inline vf32 sse_pow2(vf32 n)
{
    float lanes[4];
    _mm_storeu_ps(lanes, n);
    for (int i = 0; i < 4; i++) {
        const unsigned int bits = (unsigned int)(sse_int(lanes[i]) + 127) << 23;
        memcpy(&lanes[i], &bits, 4);
    }
    return _mm_loadu_ps(lanes);
}

static inline vf32 vf32_scale_pow2(vf32 v, vf32 n)
{
    /* Half of an odd number rounds to an adjacent integer; the rest makes up for it. */
    vf32 half = vf32_round(_mm_mul_ps(n, _mm_set1_ps(0.5f)));
    return _mm_mul_ps(_mm_mul_ps(v, sse_pow2(half)), sse_pow2(_mm_sub_ps(n, half)));
}

static inline void i8_round(signed char *p, vf32 v)
{
    float lanes[4];
    _mm_storeu_ps(lanes, vf32_round(v));
    for (int i = 0; i < 4; i++)
        p[i] = (signed char)lanes[i];
}

static inline void i16_round(short *p, vf32 v)
{
    float lanes[4];
    _mm_storeu_ps(lanes, vf32_round(v));
    for (int i = 0; i < 4; i++)
        p[i] = (short)lanes[i];
}

/* Sums are exact integers in floats: no lane exceeds 2^24 below 176,000 columns. */
enum { VSUM_ROWS = 1, VSUM_AT_ONCE = 1 };
typedef __m128 vsum;
typedef struct { vf32 byte[4]; } vact;
typedef struct { vf32 byte[4], fifth; } vact3;

static inline vsum vsum_zero(void) { return _mm_setzero_ps(); }
VPART_IS_VSUM

static inline void vsum_store(int *p, vsum s)
{
    float lanes[4];
    _mm_storeu_ps(lanes, s);
    *p = (int)lanes[0] + (int)lanes[1] + (int)lanes[2] + (int)lanes[3];
}

static inline void vsum3_store(int *p, vsum s) { vsum_store(p, s); }

static inline vact vact_load(const signed char *x)
{
    vact a;
    for (int i = 0; i < 4; i++)
        a.byte[i] = vf32_load_i8(x + 4 * i);
    _MM_TRANSPOSE4_PS(a.byte[0], a.byte[1], a.byte[2], a.byte[3]);
    return a;
}

static inline vpart vpart_tile(vpart s, const unsigned char *w, vact x)
{
    for (int i = 0; i < 4; i++)
        s = _mm_add_ps(s, _mm_mul_ps(_mm_load_ps(sse_codes[w[i]]), x.byte[i]));
    return s;
}

static inline vact3 vact3_load(const signed char *x)
{
    const vact first = vact_load(x);
    vact3 a = {{first.byte[0], first.byte[1], first.byte[2], first.byte[3]},
               vf32_load_i8(x + 16)};
    return a;
}

static inline vpart vpart_tile3(vpart s, const unsigned char *w, vact3 x)
{
    for (int i = 0; i < 4; i++)
        s = _mm_add_ps(s, _mm_mul_ps(_mm_load_ps(sse_trits[w[i]]), x.byte[i]));
    return _mm_add_ps(s, _mm_mul_ps(_mm_setr_ps(sse_fifth[w[0]], sse_fifth[w[1]], sse_fifth[w[2]],
                                                sse_fifth[w[3]]), x.fifth));
}

#endif

static inline vf32 vf32_load_i8(const signed char *p);

static inline vf32 vf32_load_i8_first(const signed char *p, long n)
{
    signed char lanes[4] = {0, 0, 0, 0};
    for (long i = 0; i < n; i++)
        lanes[i] = p[i];
    return vf32_load_i8(lanes);
}

#endif
