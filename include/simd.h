/* The portable vector operations that the kernels are written in.
 *
 * legacy1bit/kernels.pyx is compiled once for each instruction set. Each time, exactly one of
 * the macros LEGACY1BIT_TIER_* is defined, and this header includes the definitions for it.
 * Every tier header defines the same names:
 *
 *   vf32                      a vector of VF32_LANES floats
 *   vf32_zero()               all lanes 0
 *   vf32_splat(x)             all lanes x
 *   vf32_load(p)              VF32_LANES floats from p (unaligned)
 *   vf32_load_first(p, n)     the first n < VF32_LANES floats from p, the other lanes 0;
 *                             memory after p[n - 1] is not touched
 *   vf32_load_i8(p)           VF32_LANES int8 from p, widened to float
 *   vf32_load_i8_first(p, n)  the first n of them
 *   vf32_store(p, v), vf32_store_first(p, n, v)
 *   vf32_add, _sub, _mul, _div, _sqrt
 *   vf32_fmadd(a, b, c)       a * b + c; one rounding where the CPU fuses, two where it cannot
 *   vf32_max(a, b), _min      b where a lane is NaN
 *   vf32_round(v)             to the nearest integer, ties to even; |v| < 2^22
 *   vf32_scale_pow2(v, n)     v * 2^n for integer-valued n in [-250, 250], denormals included;
 *                             v where it is NaN, for any n
 *   vf32_where_positive(x, y) y where x > 0, else 0
 *   vf32_sum(v), vf32_largest(v)   across the lanes
 *   vf32_transpose(square)    VF32_LANES vectors, the rows of a square, become its columns
 *   i8_round(p, v)            VF32_LANES integers nearest to v, within -127 to 127, as int8
 *   i8_round4(p, v)           the same for four vectors
 *   i16_round(p, v)           VF32_LANES integers nearest to v, within -32767 to 32767, as int16
 *
 *   vi32                      a vector of VF32_LANES integers
 *   vi32_zero(), vi32_splat(x), vi32_load(p), vi32_add(a, b)
 *   vi32_float(v)             the integers as floats
 *   vi32_sum(v)               across the lanes
 *   i16_pairs(p, a, b)        pairs of the integers nearest to a and b, within -32767 to 32767;
 *                             any integers where a or b is NaN
 *   vpair, vpair_load(p)      VF32_LANES pairs of int16 from p, in any order
 *   vpair_load_i8(p)          the same from pairs of int8
 *   vpair_add_dot(s, x, v)    adds x[0] * v[0] + x[1] * v[1] of each pair to the integers *s, where
 *                             all lanes of the vi32 x are the same pair
 *   vi8, vi8_load(p)          VI8_LANES int8 from p
 *   vi8_add_dot(s, a, b)      adds the products of a and b, neither of them -128 * -128, to the
 *                             integers *s, in any lanes
 *
 *   simd_prepare()            called once, before anything else
 *
 * the register tile of the matrix product: TILE_ROWS rows by TILE_VECTORS vectors of accumulators,
 * chosen so that they, TILE_VECTORS vectors of the right-hand matrix and one broadcast fit the
 * register file; and the products of packed codes with int8 activations, in integers:
 *
 *   vsum                      sums of VSUM_ROWS rows; vsum_zero(), vsum_store(int *p, s)
 *   vpart, vpart_zero()       sums of up to VPART_TILES tiles, perhaps in fewer bits
 *   vsum_add(s, part)         s plus such a part
 *   vact, vact_load(x)        the 16 activations for a tile of codes
 *   vpart_tile(part, w, x)    part plus, for each row, the product of its 16 codes at w with x
 *   vact3, vact3_load(x), vpart_tile3(part, w, x), vsum3_store(int *p, s)
 *                             the same for a tile of trits: 20 columns
 *   vpart_rows(part, w, x, stride), vpart_rows3(part, w, x, stride)
 *                             the same for VSUM_AT_ONCE rows of activations, stride apart
 *   vpart_sort(part)          after them and before vsum_add: each row's sums in its own part
 *
 * A tile is two cache lines, 32 rows of four bytes. Byte j of a row holds columns j, 4 + j, 8 + j
 * and 12 + j of the tile's 16 in its bits 0-1, 2-3, 4-5 and 6-7, as unsigned numbers; or columns
 * j, 4 + j ... 16 + j of 20 as five trits t, the fraction (81 t0 + 27 t1 + 9 t2 + 3 t3 + t4) / 243
 * in 256ths, rounded up: three times the fraction is t0 plus the fraction of the others. So in
 * every field the four bytes of a row multiply four consecutive activations, for any vector width.
 * A sum does not overflow within VSUM_TILES tiles; longer rows are summed in parts. VSUM_AT_ONCE
 * rows of activations share the unpacking of a tile where vectors are wide enough for it to pay.
 *
 * To add a tier: one header like these, one row in TIERS of setup.py and one step in cpu.h.
 */
#ifndef LEGACY1BIT_SIMD_H
#define LEGACY1BIT_SIMD_H

#include <math.h>
#include <string.h>

#include "layout.h"

#ifndef FORCE_INLINE
#define FORCE_INLINE static inline __attribute__((always_inline))
#endif

/* Each tile of packed codes prefetches the memory PREFETCH_BYTES ahead: the hardware prefetcher
 * stops at pages of 4096 bytes, and a strip is often shorter. */
enum {
    VSUM_TILES = 1024,
    PREFETCH_BYTES = 2048
};

/* Keeps the compiler from reordering additions, which may need more registers than there are. */
#define KEEP_ORDER(v) __asm__("" : "+v"(v))

/* Where sums are added up in all their bits at once, they are their only part. */
#define VPART_IS_VSUM                                                                              \
    enum { VPART_TILES = VSUM_TILES };                                                             \
    typedef vsum vpart;                                                                            \
    static inline vpart vpart_zero(void) { return vsum_zero(); }                                   \
    static inline vsum vsum_add(vsum s, vpart part) { (void)s; return part; }

#if defined(LEGACY1BIT_TIER_AMX) || defined(LEGACY1BIT_TIER_AVX512BF16) || \
    defined(LEGACY1BIT_TIER_AVX512VNNI) || defined(LEGACY1BIT_TIER_AVX512)
#include "simd_avx512.h"
#elif defined(LEGACY1BIT_TIER_AVX2) || defined(LEGACY1BIT_TIER_AVXVNNI)
#include "simd_avx2.h"
#elif defined(LEGACY1BIT_TIER_SSE41) || defined(LEGACY1BIT_TIER_SSSE3) || \
    defined(LEGACY1BIT_TIER_SSE2)
#include "simd_sse2.h"
#elif defined(LEGACY1BIT_TIER_SSE)
#include "simd_sse.h"
#elif defined(LEGACY1BIT_TIER_NEON) || defined(LEGACY1BIT_TIER_NEONDOT) || \
    defined(LEGACY1BIT_TIER_I8MM)
#include "simd_neon.h"
#else
#include "simd_scalar.h"
#endif

/* The matrix product packs up to PACK_RIGHT floats of the right-hand matrix and PACK_LEFT of the
 * left-hand one: in panels whose sizes follow from the caches of the CPU. */
enum {
    TILE_COLUMNS = TILE_VECTORS * VF32_LANES,
    PACK_RIGHT = 512 * 256,
    PACK_LEFT = 240 * 256
};

#ifndef I8_ROUND4
static inline void i8_round4(signed char *p, const vf32 *v)
{
    for (int i = 0; i < 4; i++)
        i8_round(p + i * VF32_LANES, v[i]);
}
#endif

#ifndef VI32
typedef struct { int lane[VF32_LANES]; } vi32;

static inline vi32 vi32_splat(int x)
{
    vi32 v;
    for (int i = 0; i < VF32_LANES; i++)
        v.lane[i] = x;
    return v;
}

static inline vi32 vi32_zero(void) { return vi32_splat(0); }

static inline vi32 vi32_load(const int *p)
{
    vi32 v;
    memcpy(&v, p, sizeof v);
    return v;
}

static inline vi32 vi32_load_i8(const signed char *p)
{
    vi32 v;
    for (int i = 0; i < VF32_LANES; i++)
        v.lane[i] = (int)(((unsigned int)p[2 * i] & 0xffff) | (unsigned int)p[2 * i + 1] << 16);
    return v;
}

static inline int vi32_sum(vi32 v)
{
    int sum = 0;
    for (int i = 0; i < VF32_LANES; i++)
        sum += v.lane[i];
    return sum;
}

static inline vi32 vi32_add(vi32 a, vi32 b)
{
    for (int i = 0; i < VF32_LANES; i++)
        a.lane[i] += b.lane[i];
    return a;
}

static inline vf32 vi32_float(vi32 v)
{
    float lanes[VF32_LANES];
    for (int i = 0; i < VF32_LANES; i++)
        lanes[i] = (float)v.lane[i];
    return vf32_load(lanes);
}

static inline void vi32_add_dot(vi32 *s, vi32 a, vi32 b)
{
    for (int i = 0; i < VF32_LANES; i++)
        s->lane[i] += (short)a.lane[i] * (short)b.lane[i] + (a.lane[i] >> 16) * (b.lane[i] >> 16);
}

/* NaN, whose conversion is undefined in C, becomes 0. */
static inline void i16_pairs(int *p, vf32 a, vf32 b)
{
    float low[VF32_LANES], high[VF32_LANES];
    vf32_store(low, vf32_round(a));
    vf32_store(high, vf32_round(b));
    for (int i = 0; i < VF32_LANES; i++) {
        const int first = low[i] == low[i] ? (int)low[i] : 0;
        const int second = high[i] == high[i] ? (int)high[i] : 0;
        p[i] = (int)(((unsigned int)first & 0xffff) | (unsigned int)second << 16);
    }
}
#endif

/* Where a vi32 holds pairs of int16, too: vi32_load_i8(p) widens 2 VF32_LANES int8 to pairs, and
 * vi32_add_dot(s, a, b) adds a[0] * b[0] + a[1] * b[1] of each pair to the integers *s. */
#ifndef VPAIR
typedef vi32 vpair;

static inline vpair vpair_load(const int *p) { return vi32_load(p); }
static inline vpair vpair_load_i8(const signed char *p) { return vi32_load_i8(p); }
static inline void vpair_add_dot(vi32 *s, vi32 x, vpair v) { vi32_add_dot(s, x, v); }
#endif

#ifndef VI8
enum { VI8_LANES = 2 * VF32_LANES };
typedef vi32 vi8;

static inline vi8 vi8_load(const signed char *p) { return vi32_load_i8(p); }
static inline void vi8_add_dot(vi32 *s, vi8 a, vi8 b) { vi32_add_dot(s, a, b); }
#endif

#ifndef VPART_ROWS
static inline void vpart_rows(vpart *part, const unsigned char *w, const signed char *x, long stride)
{
    for (int t = 0; t < VSUM_AT_ONCE; t++)
        part[t] = vpart_tile(part[t], w, vact_load(x + t * stride));
}

static inline void vpart_rows3(vpart *part, const unsigned char *w, const signed char *x,
                               long stride)
{
    for (int t = 0; t < VSUM_AT_ONCE; t++)
        part[t] = vpart_tile3(part[t], w, vact3_load(x + t * stride));
}
#endif

#ifndef VPART_SORT
static inline void vpart_sort(vpart *part) { (void)part; }
#endif

static inline void prefetch_tile(const unsigned char *tile)
{
    __builtin_prefetch(tile + PREFETCH_BYTES);
    __builtin_prefetch(tile + PREFETCH_BYTES + 64);
}

static inline void prefetch(const void *p)
{
    __builtin_prefetch(p);
}

#include "amx.h"
#include "bf16.h"

#endif
