/* Attention over an int8 cache of keys and values, for one query or a few that share it, in whole
 * numbers: queries and the weights of values are rounded to int16, and every sum is exact. So all
 * instruction sets give the same bits, for any number of queries at a time.
 *
 * Keys are stored in tiles of KEY_TILE, as pairs of dimensions, [dimension / 2][key][2]; values as
 * pairs of rows, [row / 2][dimension][2]. So one product of pairs makes scores of keys and weighted
 * sums of values: columns come in blocks of KEY_TILE, and each load serves several queries. */
#ifndef LEGACY1BIT_CACHE_H
#define LEGACY1BIT_CACHE_H

#include <string.h>

#include "simd.h"

enum {
    BLOCK_VECTORS = KEY_TILE / VF32_LANES,
    /* Queries, and blocks of columns for them or for one query, whose sums fit the registers. */
    SUM_QUERIES = VF32_LANES >= 8 ? CACHED_QUERIES : VF32_LANES == 4 ? 2 : 1,
    SUM_BLOCKS = VF32_LANES == 16 ? 4 : 1,
    SUM_BLOCKS_OF_ONE = VF32_LANES == 16 ? 8 : VF32_LANES == 8 ? 4 : VF32_LANES == 4 ? 2 : 1,
    MOST_SUMS = BLOCK_VECTORS * (SUM_QUERIES * SUM_BLOCKS > SUM_BLOCKS_OF_ONE
                                 ? SUM_QUERIES * SUM_BLOCKS : SUM_BLOCKS_OF_ONE),
    /* Sums of products with int8 stay within int32 if the int16 factors add up to no more. */
    MOST_SUM = 16900000,
    MOST_LEVELS = 32767
};

/* A matrix of int8 as pairs of rows: bytes from a pair to the next, and from a block of columns. */
typedef struct {
    const signed char *data;
    long pair, block;
} cached_pairs;

/* out[queries][KEY_TILE * blocks] = a[queries][2 * pairs] m. `queries` and `blocks` are constants
 * after inlining, so that the sums stay in registers. */
FORCE_INLINE void cached_block(const cached_pairs *m, long first, const short *a, long a_row,
                               long pairs, float *out, long out_row, const int queries,
                               const int blocks)
{
    vi32 sums[MOST_SUMS];
    const signed char *at = m->data + first * m->block;
    const int vectors = blocks * BLOCK_VECTORS;
    for (int i = 0; i < queries * vectors; i++)
        sums[i] = vi32_zero();
    for (long r = 0; r < pairs; r++, at += m->pair) {
        vi32 factor[CACHED_QUERIES];
        for (int i = 0; i < queries; i++) {
            int pair;
            memcpy(&pair, a + i * a_row + 2 * r, sizeof pair);
            factor[i] = vi32_splat(pair);
        }
        for (int j = 0; j < vectors; j++) {
            const vpair w = vpair_load_i8(at + j / BLOCK_VECTORS * m->block
                                          + j % BLOCK_VECTORS * 2 * VF32_LANES);
            for (int i = 0; i < queries; i++)
                vpair_add_dot(&sums[i * vectors + j], factor[i], w);
        }
    }
    for (int i = 0; i < queries; i++)
        for (int j = 0; j < vectors; j++)
            vf32_store(out + i * out_row + j * VF32_LANES, vi32_float(sums[i * vectors + j]));
}

FORCE_INLINE void cached_blocks(const cached_pairs *m, const short *a, long a_row, long pairs,
                                long columns, float *out, long out_row, const int queries,
                                const int at_once)
{
    const long whole = columns / KEY_TILE, left = columns % KEY_TILE;
    long b = 0;
    for (; b + at_once <= whole; b += at_once)
        cached_block(m, b, a, a_row, pairs, out + b * KEY_TILE, out_row, queries, at_once);
    /* With few sums each addition waits for the one before it. */
    for (; at_once > 4 && b + 4 <= whole; b += 4)
        cached_block(m, b, a, a_row, pairs, out + b * KEY_TILE, out_row, queries, 4);
    for (; at_once > 2 && b + 2 <= whole; b += 2)
        cached_block(m, b, a, a_row, pairs, out + b * KEY_TILE, out_row, queries, 2);
    for (; b < whole; b++)
        cached_block(m, b, a, a_row, pairs, out + b * KEY_TILE, out_row, queries, 1);
    if (left) {
        float last[CACHED_QUERIES * KEY_TILE];
        cached_block(m, b, a, a_row, pairs, last, KEY_TILE, queries, 1);
        for (int i = 0; i < queries; i++)
            memcpy(out + i * out_row + b * KEY_TILE, last + i * KEY_TILE, left * sizeof *out);
    }
}

/* out[queries][columns] = a[queries][2 * pairs] m, as floats. Whole blocks of columns are read. */
static inline void cached_product(const cached_pairs *m, const short *a, long a_row, long pairs,
                                  long columns, float *out, long out_row, long queries)
{
    long i = 0;
    for (; i + SUM_QUERIES <= queries; i += SUM_QUERIES)
        cached_blocks(m, a + i * a_row, a_row, pairs, columns, out + i * out_row, out_row,
                      SUM_QUERIES, SUM_BLOCKS);
    for (; i < queries; i++)
        cached_blocks(m, a + i * a_row, a_row, pairs, columns, out + i * out_row, out_row, 1,
                      SUM_BLOCKS_OF_ONE);
}

#endif
