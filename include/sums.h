/* Sums with a fixed order, so that every instruction set gives the same bits: element i is added to
 * partial sum i % 16, and the 16 partial sums are reduced pairwise, the upper half to the lower,
 * without fused multiply-add. One vector of 16 lanes or several shorter ones hold the partial
 * sums. */
#ifndef LEGACY1BIT_SUMS_H
#define LEGACY1BIT_SUMS_H

#include "simd.h"

enum { PARTIALS = 16, PARTIAL_VECTORS = PARTIALS / VF32_LANES };

typedef struct {
    vf32 v[PARTIAL_VECTORS];
} partials;

static inline partials partials_zero(void)
{
    partials p;
    for (int i = 0; i < PARTIAL_VECTORS; i++)
        p.v[i] = vf32_zero();
    return p;
}

static inline float partials_sum(partials p)
{
    for (int half = PARTIAL_VECTORS / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++)
            p.v[i] = vf32_add(p.v[i], p.v[i + half]);
    return vf32_sum(p.v[0]);
}

/* The vector at p, of which `left` elements exist; the others are 0. */
static inline vf32 load_within(const float *p, long left)
{
    return left >= VF32_LANES ? vf32_load(p) : left > 0 ? vf32_load_first(p, left) : vf32_zero();
}

static inline float ordered_sum(const float *x, long n)
{
    partials p = partials_zero();
    long i = 0;
    for (; i + PARTIALS <= n; i += PARTIALS)
        for (int j = 0; j < PARTIAL_VECTORS; j++)
            p.v[j] = vf32_add(p.v[j], vf32_load(x + i + j * VF32_LANES));
    for (int j = 0; j < PARTIAL_VECTORS; j++, i += VF32_LANES)
        p.v[j] = vf32_add(p.v[j], load_within(x + i, n - i));
    return partials_sum(p);
}

/* The sum of (x[i] - center)^2. */
static inline float ordered_squares(const float *x, float center, long n)
{
    const vf32 c = vf32_splat(center);
    partials p = partials_zero();
    long i = 0;
    for (; i + PARTIALS <= n; i += PARTIALS)
        for (int j = 0; j < PARTIAL_VECTORS; j++) {
            const vf32 d = vf32_sub(vf32_load(x + i + j * VF32_LANES), c);
            p.v[j] = vf32_add(p.v[j], vf32_mul(d, d));
        }
    for (; i < n; i++) {
        /* One at a time: a missing element must add 0, not center^2. */
        float lanes[VF32_LANES] = {0};
        const float d = x[i] - center;
        lanes[i % VF32_LANES] = d * d;
        p.v[i % PARTIALS / VF32_LANES] =
            vf32_add(p.v[i % PARTIALS / VF32_LANES], vf32_load(lanes));
    }
    return partials_sum(p);
}

/* The layer norm of a row in float64, where float32 fails: squares that overflow, or a mean whose
 * rounding error is not small compared to the standard deviation. RMS norm if mean is NULL; without
 * a bias if beta is. */
static inline void layer_norm_float64(const float *x, const float *gamma, const float *beta,
                                      float epsilon, float *out, float *mean, float *inv_std,
                                      long n)
{
    double center = 0.0, squares = 0.0, spread;
    for (long i = 0; mean && i < n; i++)
        center += x[i];
    center /= n;
    for (long i = 0; i < n; i++)
        squares += (x[i] - center) * (x[i] - center);
    spread = 1.0 / sqrt(squares / n + epsilon);
    for (long i = 0; i < n; i++)
        out[i] = gamma[i] * (float)((x[i] - center) * spread) + (beta ? beta[i] : 0.0f);
    if (mean)
        *mean = (float)center;
    *inv_std = (float)spread;
}

#endif
