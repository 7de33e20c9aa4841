/* Loops over the elements of vectors: out[i] = f(x[i]), f(x[i], s) or f(x[i], y[i]), whole vectors
 * first and then the remaining lanes. out may be x or y. f is a constant after inlining, so that the
 * compiler inlines it, too. */
#ifndef LEGACY1BIT_ELEMENTWISE_H
#define LEGACY1BIT_ELEMENTWISE_H

#include "simd.h"

typedef vf32 (*unary_lanes)(vf32 x);
typedef vf32 (*binary_lanes)(vf32 x, vf32 y);

FORCE_INLINE void elementwise_unary(float *out, const float *x, long n, const unary_lanes f)
{
    const long whole = n - n % VF32_LANES;
    for (long i = 0; i < whole; i += VF32_LANES)
        vf32_store(out + i, f(vf32_load(x + i)));
    if (whole < n)
        vf32_store_first(out + whole, n - whole, f(vf32_load_first(x + whole, n - whole)));
}

FORCE_INLINE void elementwise_scalar(float *out, const float *x, float scalar, long n,
                                     const binary_lanes f)
{
    const long whole = n - n % VF32_LANES;
    const vf32 s = vf32_splat(scalar);
    for (long i = 0; i < whole; i += VF32_LANES)
        vf32_store(out + i, f(vf32_load(x + i), s));
    if (whole < n)
        vf32_store_first(out + whole, n - whole, f(vf32_load_first(x + whole, n - whole), s));
}

FORCE_INLINE void elementwise_binary(float *out, const float *x, const float *y, long n,
                                     const binary_lanes f)
{
    const long whole = n - n % VF32_LANES;
    for (long i = 0; i < whole; i += VF32_LANES)
        vf32_store(out + i, f(vf32_load(x + i), vf32_load(y + i)));
    if (whole < n)
        vf32_store_first(out + whole, n - whole, f(vf32_load_first(x + whole, n - whole),
                                                   vf32_load_first(y + whole, n - whole)));
}

#endif
