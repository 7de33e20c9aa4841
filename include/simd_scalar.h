/* The vector operations of simd.h in plain C: one lane. It is the reference for the other tiers,
 * and the fallback where there is no vector unit. */
#ifndef LEGACY1BIT_SIMD_SCALAR_H
#define LEGACY1BIT_SIMD_SCALAR_H

#define TIER_NAME "scalar"

typedef float vf32;

enum { VF32_LANES = 1, TILE_ROWS = 4, TILE_VECTORS = 2 };

static inline vf32 vf32_zero(void) { return 0.0f; }
static inline vf32 vf32_splat(float x) { return x; }
static inline vf32 vf32_load(const float *p) { return *p; }
static inline vf32 vf32_load_first(const float *p, long n) { return n > 0 ? *p : 0.0f; }
static inline vf32 vf32_load_i8(const signed char *p) { return (float)*p; }
static inline vf32 vf32_load_i8_first(const signed char *p, long n) { return n > 0 ? (float)*p : 0.0f; }
static inline void vf32_store(float *p, vf32 v) { *p = v; }
static inline void vf32_store_first(float *p, long n, vf32 v) { if (n > 0) *p = v; }

static inline vf32 vf32_add(vf32 a, vf32 b) { return a + b; }
static inline vf32 vf32_sub(vf32 a, vf32 b) { return a - b; }
static inline vf32 vf32_mul(vf32 a, vf32 b) { return a * b; }
static inline vf32 vf32_div(vf32 a, vf32 b) { return a / b; }
static inline vf32 vf32_sqrt(vf32 v) { return sqrtf(v); }
static inline vf32 vf32_fmadd(vf32 a, vf32 b, vf32 c) { return a * b + c; }
static inline vf32 vf32_max(vf32 a, vf32 b) { return a > b ? a : b; }
static inline vf32 vf32_min(vf32 a, vf32 b) { return a < b ? a : b; }

static inline vf32 vf32_round(vf32 v)
{
    /* Adding 1.5 * 2^23 pushes the fraction out of the mantissa, rounding to nearest. */
    return (v + 12582912.0f) - 12582912.0f;
}

static inline float scalar_pow2(int n)
{
    unsigned int bits = (unsigned int)(n + 127) << 23;
    float power;
    memcpy(&power, &bits, sizeof power);
    return power;
}

/* NaN, whose conversion is undefined in C, becomes 0. */
static inline int scalar_int(float v) { return v == v ? (int)v : 0; }

static inline vf32 vf32_scale_pow2(vf32 v, vf32 n)
{
    /* Two steps, because 2^n alone may lie outside the normal range. */
    int whole = scalar_int(n), half = whole / 2;
    return v * scalar_pow2(half) * scalar_pow2(whole - half);
}

static inline vf32 vf32_where_positive(vf32 x, vf32 y) { return x > 0.0f ? y : 0.0f; }
static inline float vf32_sum(vf32 v) { return v; }
static inline float vf32_largest(vf32 v) { return v; }

static inline void vf32_transpose(vf32 *square) { (void)square; }
static inline void i8_round(signed char *p, vf32 v) { *p = (signed char)vf32_round(v); }
static inline void i16_round(short *p, vf32 v) { *p = (short)vf32_round(v); }

enum { VSUM_ROWS = 1, VSUM_AT_ONCE = 1 };
typedef int vsum;
typedef const signed char *vact;
typedef const signed char *vact3;

static inline vsum vsum_zero(void) { return 0; }
VPART_IS_VSUM
static inline void vsum_store(int *p, vsum s) { *p = s; }
static inline void vsum3_store(int *p, vsum s) { vsum_store(p, s); }
static inline vact vact_load(const signed char *x) { return x; }
static inline vact3 vact3_load(const signed char *x) { return x; }

static inline vpart vpart_tile(vpart s, const unsigned char *w, vact x)
{
    for (int byte = 0; byte < 4; byte++)
        for (int field = 0; field < 4; field++)
            s += (w[byte] >> 2 * field & 3) * x[4 * field + byte];
    return s;
}

static inline vpart vpart_tile3(vpart s, const unsigned char *w, vact3 x)
{
    for (int byte = 0; byte < 4; byte++) {
        unsigned int rest = w[byte];
        for (int field = 0; field < 5; field++) {
            rest = 3 * (rest & 255);
            s += (int)(rest >> 8) * x[4 * field + byte];
        }
    }
    return s;
}

static inline void simd_prepare(void) {}

#endif
