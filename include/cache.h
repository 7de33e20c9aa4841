/* Attention over an int8 cache of keys and values, for one query or a few consecutive ones, with a
 * fixed order of summation: a score is summed over the head's dimensions and an output over the
 * keys, one at a time, without fused multiply-add. So all instruction sets give the same bits.
 *
 * Keys are stored in tiles of KEY_TILE, [dimension][key], so that a vector holds one dimension of
 * several keys. Values are stored in rows. Up to CACHED_QUERIES queries share each load. */
#ifndef LEGACY1BIT_CACHE_H
#define LEGACY1BIT_CACHE_H

#include "simd.h"

enum {
    KEY_VECTORS = KEY_TILE / VF32_LANES,
    /* Tiles of scores that fit the register file. */
    SCORE_TILES = VF32_LANES == 16 ? 8 : VF32_LANES == 8 ? 4 : VF32_LANES == 4 ? 2 : 1,
    VALUE_VECTORS = VF32_LANES == 16 ? 4 : 2
};

/* Scores of `tiles` tiles of keys for `queries` queries. Both are constants after inlining, so that
 * the sums stay in registers. */
FORCE_INLINE void score_tiles(const signed char *k, const float *q, long q_row, long dim, float *out,
                              long out_row, const int queries, const int tiles)
{
    vf32 sums[SCORE_TILES * KEY_VECTORS];
    for (int i = 0; i < queries * tiles * KEY_VECTORS; i++)
        sums[i] = vf32_zero();
    for (long d = 0; d < dim; d++)
        for (int t = 0; t < tiles; t++)
            for (int j = 0; j < KEY_VECTORS; j++) {
                const vf32 w = vf32_load_i8(k + (t * dim + d) * KEY_TILE + j * VF32_LANES);
                for (int i = 0; i < queries; i++) {
                    vf32 *sum = &sums[(i * tiles + t) * KEY_VECTORS + j];
                    *sum = vf32_add(*sum, vf32_mul(vf32_splat(q[i * q_row + d]), w));
                }
            }
    for (int i = 0; i < queries; i++)
        for (int t = 0; t < tiles * KEY_VECTORS; t++)
            vf32_store(out + i * out_row + t * VF32_LANES, sums[i * tiles * KEY_VECTORS + t]);
}

/* out[KEY_TILE * tiles]: the scores of all tiles of keys for one query. */
static inline void score_one_query(const signed char *k, const float *q, long dim, long tiles,
                                   float *out)
{
    long t = 0;
    for (; t + SCORE_TILES <= tiles; t += SCORE_TILES)
        score_tiles(k + t * dim * KEY_TILE, q, 0, dim, out + t * KEY_TILE, 0, 1, SCORE_TILES);
    for (; t < tiles; t++)
        score_tiles(k + t * dim * KEY_TILE, q, 0, dim, out + t * KEY_TILE, 0, 1, 1);
}

/* The same for several queries, as many at a time as fit the registers. */
static inline void score_queries(const signed char *k, const float *q, long q_row, long dim,
                                 long tiles, float *out, long out_row, long queries)
{
    enum { FEW = (int)SCORE_TILES < (int)CACHED_QUERIES ? SCORE_TILES : (int)CACHED_QUERIES,
           AT_ONCE = SCORE_TILES / FEW };
    long i = 0;
    for (; i + FEW <= queries; i += FEW) {
        long t = 0;
        for (; t + AT_ONCE <= tiles; t += AT_ONCE)
            score_tiles(k + t * dim * KEY_TILE, q + i * q_row, q_row, dim,
                        out + i * out_row + t * KEY_TILE, out_row, FEW, AT_ONCE);
        for (; t < tiles; t++)
            score_tiles(k + t * dim * KEY_TILE, q + i * q_row, q_row, dim,
                        out + i * out_row + t * KEY_TILE, out_row, FEW, 1);
    }
    for (; i < queries; i++)
        score_one_query(k, q + i * q_row, dim, tiles, out + i * out_row);
}

/* `vectors` vectors of the weighted sums of values; `left` is the number of valid lanes. */
FORCE_INLINE void mix_vectors(const signed char *v, long dim, const float *p, long p_row, long keys,
                              float *out, long out_row, long left, const int queries,
                              const int vectors)
{
    vf32 sums[CACHED_QUERIES * VALUE_VECTORS];
    for (int i = 0; i < queries * vectors; i++)
        sums[i] = vf32_zero();
    for (long j = 0; j < keys; j++)
        for (int t = 0; t < vectors; t++) {
            const signed char *at = v + j * dim + t * VF32_LANES;
            const vf32 w = left == VF32_LANES ? vf32_load_i8(at) : vf32_load_i8_first(at, left);
            for (int i = 0; i < queries; i++)
                sums[i * vectors + t] = vf32_add(sums[i * vectors + t],
                                                 vf32_mul(vf32_splat(p[i * p_row + j]), w));
        }
    for (int i = 0; i < queries; i++)
        for (int t = 0; t < vectors; t++) {
            float *to = out + i * out_row + t * VF32_LANES;
            if (left == VF32_LANES)
                vf32_store(to, sums[i * vectors + t]);
            else
                vf32_store_first(to, left, sums[i * vectors + t]);
        }
}

FORCE_INLINE void mix_rows(const signed char *v, long dim, const float *p, long p_row, long keys,
                           float *out, long out_row, const int queries)
{
    long i = 0;
    for (; i + VALUE_VECTORS * VF32_LANES <= dim; i += VALUE_VECTORS * VF32_LANES)
        mix_vectors(v + i, dim, p, p_row, keys, out + i, out_row, VF32_LANES, queries,
                    VALUE_VECTORS);
    for (; i + VF32_LANES <= dim; i += VF32_LANES)
        mix_vectors(v + i, dim, p, p_row, keys, out + i, out_row, VF32_LANES, queries, 1);
    if (i < dim)
        mix_vectors(v + i, dim, p, p_row, keys, out + i, out_row, dim - i, queries, 1);
}

/* out[i, dim] = p[i, keys] v[keys, dim] for up to CACHED_QUERIES queries i. */
static inline void mix_values(const signed char *v, long dim, const float *p, long p_row, long keys,
                              float *out, long out_row, long queries)
{
    switch (queries) {
    case 1: mix_rows(v, dim, p, p_row, keys, out, out_row, 1); break;
    case 2: mix_rows(v, dim, p, p_row, keys, out, out_row, 2); break;
    case 3: mix_rows(v, dim, p, p_row, keys, out, out_row, 3); break;
    default: mix_rows(v, dim, p, p_row, keys, out, out_row, 4); break;
    }
}

/* Dequantizes tiles of keys to out[dimension][row]: codes times scales. */
static inline void dequantize_keys(const signed char *k, const float *scales, long dim, long tiles,
                                   float *out, long row)
{
    for (long t = 0; t < tiles; t++)
        for (long d = 0; d < dim; d++)
            for (int j = 0; j < KEY_VECTORS; j++)
                vf32_store(out + d * row + t * KEY_TILE + j * VF32_LANES,
                           vf32_mul(vf32_load(scales + t * KEY_TILE + j * VF32_LANES),
                                    vf32_load_i8(k + (t * dim + d) * KEY_TILE + j * VF32_LANES)));
}

#endif
