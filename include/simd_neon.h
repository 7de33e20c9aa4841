/* The vector operations of simd.h for NEON, which every 64-bit ARM CPU has, for NEON with the dot
 * product of bytes (Cortex-A76, Neoverse N1, Apple M1 and later), and for that with the product of
 * matrices of bytes (Neoverse V1, Apple M2 and later): four lanes, fused multiply-add. */
#ifndef LEGACY1BIT_SIMD_NEON_H
#define LEGACY1BIT_SIMD_NEON_H

#include <arm_neon.h>

#if defined(LEGACY1BIT_TIER_I8MM)
#define TIER_NAME "i8mm"
#elif defined(LEGACY1BIT_TIER_NEONDOT)
#define TIER_NAME "neondot"
#else
#define TIER_NAME "neon"
#endif

typedef float32x4_t vf32;

enum { VF32_LANES = 4, TILE_ROWS = 4, TILE_VECTORS = 4 };

static inline void simd_prepare(void) {}

static inline vf32 vf32_zero(void) { return vdupq_n_f32(0.0f); }
static inline vf32 vf32_splat(float x) { return vdupq_n_f32(x); }
static inline vf32 vf32_load(const float *p) { return vld1q_f32(p); }
static inline void vf32_store(float *p, vf32 v) { vst1q_f32(p, v); }

static inline vf32 vf32_load_first(const float *p, long n)
{
    vf32 v = vf32_zero();
    if (n > 0)
        v = vld1q_lane_f32(p, v, 0);
    if (n > 1)
        v = vld1q_lane_f32(p + 1, v, 1);
    return n > 2 ? vld1q_lane_f32(p + 2, v, 2) : v;
}

static inline void vf32_store_first(float *p, long n, vf32 v)
{
    if (n > 0)
        vst1q_lane_f32(p, v, 0);
    if (n > 1)
        vst1q_lane_f32(p + 1, v, 1);
    if (n > 2)
        vst1q_lane_f32(p + 2, v, 2);
}

static inline vf32 vf32_load_i8(const signed char *p)
{
    int four;
    memcpy(&four, p, 4);
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vcreate_s8((unsigned int)four)))));
}

static inline vf32 vf32_load_i8_first(const signed char *p, long n)
{
    signed char lanes[4] = {0, 0, 0, 0};
    for (long i = 0; i < n; i++)
        lanes[i] = p[i];
    return vf32_load_i8(lanes);
}

static inline vf32 vf32_add(vf32 a, vf32 b) { return vaddq_f32(a, b); }
static inline vf32 vf32_sub(vf32 a, vf32 b) { return vsubq_f32(a, b); }
static inline vf32 vf32_mul(vf32 a, vf32 b) { return vmulq_f32(a, b); }
static inline vf32 vf32_div(vf32 a, vf32 b) { return vdivq_f32(a, b); }
static inline vf32 vf32_sqrt(vf32 v) { return vsqrtq_f32(v); }
static inline vf32 vf32_fmadd(vf32 a, vf32 b, vf32 c) { return vfmaq_f32(c, a, b); }
static inline vf32 vf32_round(vf32 v) { return vrndnq_f32(v); }

/* The instructions for these give NaN where either is. */
static inline vf32 vf32_max(vf32 a, vf32 b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
static inline vf32 vf32_min(vf32 a, vf32 b) { return vbslq_f32(vcltq_f32(a, b), a, b); }

static inline vf32 neon_pow2(int32x4_t n)
{
    return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(n, vdupq_n_s32(127)), 23));
}

static inline vf32 vf32_scale_pow2(vf32 v, vf32 n)
{
    /* Two steps, because 2^n alone may lie outside the normal range. */
    const int32x4_t whole = vcvtnq_s32_f32(n), half = vshrq_n_s32(whole, 1);
    return vmulq_f32(vmulq_f32(v, neon_pow2(half)), neon_pow2(vsubq_s32(whole, half)));
}

static inline vf32 vf32_where_positive(vf32 x, vf32 y)
{
    return vreinterpretq_f32_u32(vandq_u32(vcgtzq_f32(x), vreinterpretq_u32_f32(y)));
}

/* The upper half is added to the lower one, as in the other instruction sets. */
static inline float vf32_sum(vf32 v)
{
    return vpadds_f32(vadd_f32(vget_low_f32(v), vget_high_f32(v)));
}

static inline float vf32_largest(vf32 v)
{
    v = vf32_max(v, vextq_f32(v, v, 2));
    return vgetq_lane_f32(vf32_max(v, vextq_f32(v, v, 1)), 0);
}

static inline void vf32_transpose(vf32 *square)
{
    const float64x2_t a = vreinterpretq_f64_f32(vtrn1q_f32(square[0], square[1]));
    const float64x2_t b = vreinterpretq_f64_f32(vtrn2q_f32(square[0], square[1]));
    const float64x2_t c = vreinterpretq_f64_f32(vtrn1q_f32(square[2], square[3]));
    const float64x2_t d = vreinterpretq_f64_f32(vtrn2q_f32(square[2], square[3]));
    square[0] = vreinterpretq_f32_f64(vtrn1q_f64(a, c));
    square[1] = vreinterpretq_f32_f64(vtrn1q_f64(b, d));
    square[2] = vreinterpretq_f32_f64(vtrn2q_f64(a, c));
    square[3] = vreinterpretq_f32_f64(vtrn2q_f64(b, d));
}

static inline void i8_round(signed char *p, vf32 v)
{
    const int16x4_t words = vmovn_s32(vcvtnq_s32_f32(v));
    const int8x8_t bytes = vmovn_s16(vcombine_s16(words, words));
    memcpy(p, &bytes, 4);
}

static inline void i16_round(short *p, vf32 v) { vst1_s16(p, vmovn_s32(vcvtnq_s32_f32(v))); }

#define I8_ROUND4
static inline void i8_round4(signed char *p, const vf32 *v)
{
    const int16x8_t low = vuzp1q_s16(vreinterpretq_s16_s32(vcvtnq_s32_f32(v[0])),
                                     vreinterpretq_s16_s32(vcvtnq_s32_f32(v[1])));
    const int16x8_t high = vuzp1q_s16(vreinterpretq_s16_s32(vcvtnq_s32_f32(v[2])),
                                      vreinterpretq_s16_s32(vcvtnq_s32_f32(v[3])));
    vst1q_s8(p, vuzp1q_s8(vreinterpretq_s8_s16(low), vreinterpretq_s8_s16(high)));
}

#define VI32
typedef int32x4_t vi32;

static inline vi32 vi32_zero(void) { return vdupq_n_s32(0); }
static inline vi32 vi32_splat(int x) { return vdupq_n_s32(x); }
static inline vi32 vi32_load(const int *p) { return vld1q_s32(p); }
static inline vi32 vi32_add(vi32 a, vi32 b) { return vaddq_s32(a, b); }
static inline vf32 vi32_float(vi32 v) { return vcvtq_f32_s32(v); }
static inline int vi32_sum(vi32 v) { return vaddvq_s32(v); }

#define VPAIR
typedef int16x4x2_t vpair;      /* the first and the second numbers of pairs */

static inline vpair vpair_load(const int *p) { return vld2_s16((const int16_t *)p); }

static inline vpair vpair_load_i8(const signed char *p)
{
    const int16x8_t both = vmovl_s8(vld1_s8(p));
    return vuzp_s16(vget_low_s16(both), vget_high_s16(both));
}

static inline void vpair_add_dot(vi32 *s, vi32 left, vpair right)
{
    *s = vmlal_laneq_s16(*s, right.val[0], vreinterpretq_s16_s32(left), 0);
    *s = vmlal_laneq_s16(*s, right.val[1], vreinterpretq_s16_s32(left), 1);
}

static inline void i16_pairs(int *p, vf32 a, vf32 b)
{
    vst1q_s32(p, vsliq_n_s32(vcvtnq_s32_f32(a), vcvtnq_s32_f32(b), 16));
}

#define VI8
enum { VI8_LANES = 16 };
typedef int8x16_t vi8;

static inline vi8 vi8_load(const signed char *p) { return vld1q_s8(p); }

/* Without the dot product two products are added in 16 bits: 2 * 128 * 127 fit. */
static inline void vi8_add_dot(vi32 *s, vi8 a, vi8 b)
{
#ifdef __ARM_FEATURE_DOTPROD
    *s = vdotq_s32(*s, a, b);
#else
    *s = vpadalq_s16(*s, vmlal_high_s8(vmull_s8(vget_low_s8(a), vget_low_s8(b)), a, b));
#endif
}

/* The next trit of every byte: three halves of the byte, halved, are 3/4 of it, whose top two bits
 * are the trit. */
static inline uint8x16_t neon_trit(uint8x16_t *v)
{
    const uint8x16_t top = vhaddq_u8(*v, vshrq_n_u8(*v, 1));
    *v = vmulq_u8(*v, vdupq_n_u8(3));
    return vshrq_n_u8(top, 6);
}

enum { VSUM_ROWS = 4 };
typedef int32x4_t vsum;

static inline vsum vsum_zero(void) { return vdupq_n_s32(0); }
static inline void vsum_store(int *p, vsum s) { vst1q_s32(p, s); }
static inline void vsum3_store(int *p, vsum s) { vsum_store(p, s); }

#ifdef __ARM_FEATURE_DOTPROD

/* Fields that are masked in place are 1, 4 and 16 times as large: they have sums of their own. */
enum { VPART_TILES = VSUM_TILES, VSUM_AT_ONCE = 8 };
typedef struct { int32x4_t once, four, sixteen; } vpart;
typedef int8x16_t vact;
typedef struct { int8x16_t first; int8x8_t fifth; } vact3;

static inline vpart vpart_zero(void)
{
    const vpart part = {vdupq_n_s32(0), vdupq_n_s32(0), vdupq_n_s32(0)};
    return part;
}

static inline vsum vsum_add(vsum s, vpart part)
{
    s = vaddq_s32(s, part.once);
    s = vsraq_n_s32(s, part.four, 2);
    return vsraq_n_s32(s, part.sixteen, 4);
}

static inline vact vact_load(const signed char *x) { return vld1q_s8(x); }

static inline vact3 vact3_load(const signed char *x)
{
    int four;
    memcpy(&four, x + 16, 4);
    const vact3 a = {vld1q_s8(x), vcreate_s8((unsigned int)four)};
    return a;
}

static inline int8x16_t neon_masked(uint8x16_t v, int mask)
{
    return vreinterpretq_s8_u8(vandq_u8(v, vdupq_n_u8((uint8_t)mask)));
}

static inline vpart vpart_tile(vpart part, const unsigned char *w, vact x)
{
    const uint8x16_t v = vld1q_u8(w);
    part.once = vdotq_laneq_s32(part.once, neon_masked(v, 3), x, 0);
    part.four = vdotq_laneq_s32(part.four, neon_masked(v, 3 << 2), x, 1);
    part.sixteen = vdotq_laneq_s32(part.sixteen, neon_masked(v, 3 << 4), x, 2);
    part.once = vdotq_laneq_s32(part.once, vreinterpretq_s8_u8(vshrq_n_u8(v, 6)), x, 3);
    return part;
}

static inline vpart vpart_tile3(vpart part, const unsigned char *w, vact3 x)
{
    uint8x16_t v = vld1q_u8(w);
    part.once = vdotq_laneq_s32(part.once, vreinterpretq_s8_u8(neon_trit(&v)), x.first, 0);
    part.once = vdotq_laneq_s32(part.once, vreinterpretq_s8_u8(neon_trit(&v)), x.first, 1);
    part.once = vdotq_laneq_s32(part.once, vreinterpretq_s8_u8(neon_trit(&v)), x.first, 2);
    part.once = vdotq_laneq_s32(part.once, vreinterpretq_s8_u8(neon_trit(&v)), x.first, 3);
    part.once = vdotq_lane_s32(part.once, vreinterpretq_s8_u8(neon_trit(&v)), x.fifth, 0);
    return part;
}

#define VPART_ROWS
#ifdef __ARM_FEATURE_MATMUL_INT8

/* Two rows of codes times two rows of activations, eight columns at a time: fields are interleaved,
 * so that eight columns of a row lie side by side. Until they are sorted, part[t] has sums of the
 * rows of codes 0 and 1 with the rows of activations t and t + 1, part[t + 1] those of 2 and 3. */
static inline void neon_multiply_pairs(vpart *part, uint32x4_t first, uint32x4_t second, int8x16_t x)
{
    const int8x16_t low = vreinterpretq_s8_u32(vzip1q_u32(first, second));
    const int8x16_t high = vreinterpretq_s8_u32(vzip2q_u32(first, second));
    part[0].once = vmmlaq_s32(part[0].once, low, x);
    part[1].once = vmmlaq_s32(part[1].once, high, x);
}

static inline int8x16_t neon_eights(int64x2_t x, int64x2_t next, int second)
{
    return vreinterpretq_s8_s64(second ? vzip2q_s64(x, next) : vzip1q_s64(x, next));
}

static inline void vpart_rows(vpart *part, const unsigned char *w, const signed char *x, long stride)
{
    const uint8x16_t v = vld1q_u8(w), three = vdupq_n_u8(3);
    const uint32x4_t f0 = vreinterpretq_u32_u8(vandq_u8(v, three));
    const uint32x4_t f1 = vreinterpretq_u32_u8(vandq_u8(vshrq_n_u8(v, 2), three));
    const uint32x4_t f2 = vreinterpretq_u32_u8(vandq_u8(vshrq_n_u8(v, 4), three));
    const uint32x4_t f3 = vreinterpretq_u32_u8(vshrq_n_u8(v, 6));
    for (int t = 0; t < VSUM_AT_ONCE; t += 2) {
        const int64x2_t row = vreinterpretq_s64_s8(vld1q_s8(x + t * stride));
        const int64x2_t next = vreinterpretq_s64_s8(vld1q_s8(x + (t + 1) * stride));
        neon_multiply_pairs(part + t, f0, f1, neon_eights(row, next, 0));
        neon_multiply_pairs(part + t, f2, f3, neon_eights(row, next, 1));
    }
}

static inline void vpart_rows3(vpart *part, const unsigned char *w, const signed char *x,
                               long stride)
{
    uint8x16_t v = vld1q_u8(w);
    uint32x4_t field[5];
    for (int i = 0; i < 5; i++)
        field[i] = vreinterpretq_u32_u8(neon_trit(&v));
    for (int t = 0; t < VSUM_AT_ONCE; t += 2) {
        const vact3 row = vact3_load(x + t * stride), next = vact3_load(x + (t + 1) * stride);
        const int64x2_t a = vreinterpretq_s64_s8(row.first), b = vreinterpretq_s64_s8(next.first);
        neon_multiply_pairs(part + t, field[0], field[1], neon_eights(a, b, 0));
        neon_multiply_pairs(part + t, field[2], field[3], neon_eights(a, b, 1));
        neon_multiply_pairs(part + t, field[4], vdupq_n_u32(0),
                            vcombine_s8(row.fifth, next.fifth));
    }
}

#define VPART_SORT
static inline void vpart_sort(vpart *part)
{
    for (int t = 0; t < VSUM_AT_ONCE; t += 2) {
        const int32x4_t low = part[t].once, high = part[t + 1].once;
        part[t].once = vuzp1q_s32(low, high);
        part[t + 1].once = vuzp2q_s32(low, high);
    }
}

#else

/* Two sums for each row of activations, so that dot products need not wait for each other. */
static inline void vpart_rows(vpart *part, const unsigned char *w, const signed char *x, long stride)
{
    const uint8x16_t v = vld1q_u8(w);
    const int8x16_t f0 = neon_masked(v, 3), f1 = neon_masked(v, 3 << 2);
    const int8x16_t f2 = neon_masked(vshrq_n_u8(v, 2), 3 << 2);
    const int8x16_t f3 = vreinterpretq_s8_u8(vshrq_n_u8(v, 6));
    for (int t = 0; t < VSUM_AT_ONCE; t++) {
        const int8x16_t row = vld1q_s8(x + t * stride);
        part[t].once = vdotq_laneq_s32(part[t].once, f0, row, 0);
        part[t].four = vdotq_laneq_s32(part[t].four, f1, row, 1);
        part[t].four = vdotq_laneq_s32(part[t].four, f2, row, 2);
        part[t].once = vdotq_laneq_s32(part[t].once, f3, row, 3);
    }
}

static inline void vpart_rows3(vpart *part, const unsigned char *w, const signed char *x,
                               long stride)
{
    uint8x16_t v = vld1q_u8(w);
    int8x16_t field[5];
    for (int i = 0; i < 5; i++)
        field[i] = vreinterpretq_s8_u8(neon_trit(&v));
    for (int t = 0; t < VSUM_AT_ONCE; t++) {
        const vact3 row = vact3_load(x + t * stride);
        part[t].once = vdotq_laneq_s32(part[t].once, field[0], row.first, 0);
        part[t].once = vdotq_laneq_s32(part[t].once, field[1], row.first, 1);
        part[t].once = vdotq_laneq_s32(part[t].once, field[2], row.first, 2);
        part[t].once = vdotq_laneq_s32(part[t].once, field[3], row.first, 3);
        part[t].once = vdotq_lane_s32(part[t].once, field[4], row.fifth, 0);
    }
}

#endif

#else

/* Sums of 16 bits for each byte of two rows: at most 4 * 3 * 127 = 1524 a tile of codes, and
 * 5 * 2 * 127 = 1270 a tile of trits. */
enum { VPART_TILES = 21, VSUM_AT_ONCE = 1 };
typedef struct { int16x8_t low, high; } vpart;
typedef struct { int8x16_t field[4]; } vact;
typedef struct { int8x16_t field[5]; } vact3;

static inline vpart vpart_zero(void)
{
    const vpart part = {vdupq_n_s16(0), vdupq_n_s16(0)};
    return part;
}

static inline vsum vsum_add(vsum s, vpart part)
{
    return vaddq_s32(s, vpaddq_s32(vpaddlq_s16(part.low), vpaddlq_s16(part.high)));
}

static inline int8x16_t neon_four(const signed char *x)
{
    int four;
    memcpy(&four, x, 4);
    return vreinterpretq_s8_s32(vdupq_n_s32(four));
}

static inline vact vact_load(const signed char *x)
{
    const vact a = {{neon_four(x), neon_four(x + 4), neon_four(x + 8), neon_four(x + 12)}};
    return a;
}

static inline vact3 vact3_load(const signed char *x)
{
    const vact3 a = {{neon_four(x), neon_four(x + 4), neon_four(x + 8), neon_four(x + 12),
                      neon_four(x + 16)}};
    return a;
}

static inline vpart neon_add_products(vpart part, uint8x16_t codes, int8x16_t x)
{
    const int8x16_t signed_codes = vreinterpretq_s8_u8(codes);
    part.low = vmlal_s8(part.low, vget_low_s8(signed_codes), vget_low_s8(x));
    part.high = vmlal_high_s8(part.high, signed_codes, x);
    return part;
}

static inline vpart vpart_tile(vpart part, const unsigned char *w, vact x)
{
    const uint8x16_t v = vld1q_u8(w), three = vdupq_n_u8(3);
    part = neon_add_products(part, vandq_u8(v, three), x.field[0]);
    part = neon_add_products(part, vandq_u8(vshrq_n_u8(v, 2), three), x.field[1]);
    part = neon_add_products(part, vandq_u8(vshrq_n_u8(v, 4), three), x.field[2]);
    return neon_add_products(part, vshrq_n_u8(v, 6), x.field[3]);
}

static inline vpart vpart_tile3(vpart part, const unsigned char *w, vact3 x)
{
    uint8x16_t v = vld1q_u8(w);
    for (int i = 0; i < 5; i++)
        part = neon_add_products(part, neon_trit(&v), x.field[i]);
    return part;
}

#endif
#endif
