/* Sums in one order, so that they are the same to the bit in every instruction set: element i goes
 * to place i % 16, and the places are added up in halves, the upper to the lower, until one is left.
 * Nothing is fused. Vectors of 16 lanes are the places; shorter ones are as many as it takes. */
#ifndef LEGACY1BIT_SUMS_H
#define LEGACY1BIT_SUMS_H

#include "simd.h"

enum { PLACES = 16, PLACE_VECTORS = PLACES / VF32_LANES };

typedef struct {
    vf32 v[PLACE_VECTORS];
} places;

static inline places places_zero(void)
{
    places p;
    for (int i = 0; i < PLACE_VECTORS; i++)
        p.v[i] = vf32_zero();
    return p;
}

static inline float places_sum(places p)
{
    for (int half = PLACE_VECTORS / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++)
            p.v[i] = vf32_add(p.v[i], p.v[i + half]);
    return vf32_sum(p.v[0]);
}

/* The vector of `left` or more elements at p; what is missing is 0. */
static inline vf32 places_load(const float *p, long left)
{
    return left >= VF32_LANES ? vf32_load(p) : left > 0 ? vf32_load_first(p, left) : vf32_zero();
}

static inline float ordered_sum(const float *x, long n)
{
    places p = places_zero();
    long i = 0;
    for (; i + PLACES <= n; i += PLACES)
        for (int j = 0; j < PLACE_VECTORS; j++)
            p.v[j] = vf32_add(p.v[j], vf32_load(x + i + j * VF32_LANES));
    for (int j = 0; j < PLACE_VECTORS; j++, i += VF32_LANES)
        p.v[j] = vf32_add(p.v[j], places_load(x + i, n - i));
    return places_sum(p);
}

/* The sum of (x[i] - centre)^2. */
static inline float ordered_squares(const float *x, float centre, long n)
{
    const vf32 c = vf32_splat(centre);
    places p = places_zero();
    long i = 0;
    for (; i + PLACES <= n; i += PLACES)
        for (int j = 0; j < PLACE_VECTORS; j++) {
            const vf32 d = vf32_sub(vf32_load(x + i + j * VF32_LANES), c);
            p.v[j] = vf32_add(p.v[j], vf32_mul(d, d));
        }
    for (; i < n; i++) {
        /* One at a time: what is missing is not the centre. */
        float room[VF32_LANES] = {0};
        const float d = x[i] - centre;
        room[i % VF32_LANES] = d * d;
        p.v[i % PLACES / VF32_LANES] = vf32_add(p.v[i % PLACES / VF32_LANES], vf32_load(room));
    }
    return places_sum(p);
}

/* The layer norm of a row in float64, for what float32 cannot do: squares that overflow, and a mean
 * so large that its rounding would be no longer small beside the standard deviation. */
static inline void wide_layer_norm(const float *x, const float *gamma, const float *beta,
                                   float epsilon, float *out, float *mean, float *inv_std, long n)
{
    double centre = 0.0, squares = 0.0, spread;
    for (long i = 0; i < n; i++)
        centre += x[i];
    centre /= n;
    for (long i = 0; i < n; i++)
        squares += (x[i] - centre) * (x[i] - centre);
    spread = 1.0 / sqrt(squares / n + epsilon);
    for (long i = 0; i < n; i++)
        out[i] = gamma[i] * (float)((x[i] - centre) * spread) + beta[i];
    *mean = (float)centre;
    *inv_std = (float)spread;
}

#endif
