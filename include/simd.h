/* The vector vocabulary that the kernels are written in.
 *
 * legacy1bit/kernels.pyx is compiled once for each instruction set. Each time, exactly one of
 * the macros LEGACY1BIT_TIER_* is defined, and this header takes the definitions that go with
 * it. Every tier header defines the same names:
 *
 *   vf32                      a vector of VF32_LANES floats
 *   vf32_zero()               all lanes 0
 *   vf32_splat(x)             all lanes x
 *   vf32_load(p)              VF32_LANES floats from p (no alignment asked)
 *   vf32_load_first(p, n)     the first n < VF32_LANES floats from p, the other lanes 0;
 *                             memory behind p[n - 1] is not touched
 *   vf32_load_i8(p)           VF32_LANES int8 from p, widened to float
 *   vf32_load_i8_first(p, n)  the first n of them
 *   vf32_store(p, v), vf32_store_first(p, n, v)
 *   vf32_add, _sub, _mul, _div, _sqrt
 *   vf32_fmadd(a, b, c)       a * b + c; one rounding where the CPU fuses, two where it cannot
 *   vf32_max(a, b), _min      b where a lane is not a number
 *   vf32_round(v)             to the nearest integer, ties to even; |v| < 2^22
 *   vf32_scale_pow2(v, n)     v * 2^n for integer-valued n in [-250, 250], denormals included
 *   vf32_where_positive(x, y) y where x > 0, else 0
 *   vf32_sum(v), vf32_largest(v)   across the lanes
 *
 * and the register tile of the matrix product: TILE_ROWS rows by TILE_VECTORS vectors of
 * accumulators, chosen so that they, TILE_VECTORS vectors of the right-hand matrix and one
 * broadcast fit the register file.
 *
 * To add a tier: one header like these, one row in TIERS of setup.py and one step in cpu.h.
 */
#ifndef LEGACY1BIT_SIMD_H
#define LEGACY1BIT_SIMD_H

#include <math.h>
#include <string.h>

#if defined(LEGACY1BIT_TIER_AMX)
#include "simd_avx512.h"
#undef TIER_NAME
#define TIER_NAME "amx"
#elif defined(LEGACY1BIT_TIER_AVX512)
#include "simd_avx512.h"
#elif defined(LEGACY1BIT_TIER_AVX2)
#include "simd_avx2.h"
#elif defined(LEGACY1BIT_TIER_SSE2)
#include "simd_sse2.h"
#else
#include "simd_scalar.h"
#endif

#include "amx.h"

/* The matrix product packs PACK_DEPTH x PACK_COLUMNS of the right-hand matrix (half a megabyte,
 * for the second-level cache) and PACK_ROWS x PACK_DEPTH of the left-hand one. */
enum {
    TILE_COLUMNS = TILE_VECTORS * VF32_LANES,
    PACK_DEPTH = 256,
    PACK_COLUMNS = 512,
    PACK_ROWS = 112 / TILE_ROWS * TILE_ROWS
};

#endif
