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

/* out = f(gate) * x; out may be either. */
FORCE_INLINE void elementwise_gate(float *out, const float *gate, const float *x, long n,
                                   const unary_lanes f)
{
    const long whole = n - n % VF32_LANES, left = n - whole;
    for (long i = 0; i < whole; i += VF32_LANES)
        vf32_store(out + i, vf32_mul(f(vf32_load(gate + i)), vf32_load(x + i)));
    if (left)
        vf32_store_first(out + whole, left, vf32_mul(f(vf32_load_first(gate + whole, left)),
                                                     vf32_load_first(x + whole, left)));
}

/* Its gradients: d_gate = backward(gate, d_out * x) and d_x = d_out * f(gate). */
FORCE_INLINE void elementwise_gate_backward(float *d_gate, float *d_x, const float *gate,
                                            const float *x, const float *d_out, long n,
                                            const unary_lanes f, const binary_lanes backward)
{
    const long whole = n - n % VF32_LANES, left = n - whole;
    for (long i = 0; i < whole; i += VF32_LANES) {
        const vf32 g = vf32_load(gate + i), d = vf32_load(d_out + i), y = vf32_load(x + i);
        vf32_store(d_gate + i, backward(g, vf32_mul(d, y)));
        vf32_store(d_x + i, vf32_mul(d, f(g)));
    }
    if (left) {
        const vf32 g = vf32_load_first(gate + whole, left);
        const vf32 d = vf32_load_first(d_out + whole, left);
        const vf32 y = vf32_load_first(x + whole, left);
        vf32_store_first(d_gate + whole, left, backward(g, vf32_mul(d, y)));
        vf32_store_first(d_x + whole, left, vf32_mul(d, f(g)));
    }
}

#endif
