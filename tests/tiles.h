/* Emulates the matrix unit in C, for checked builds: sanitizers and gcov see all memory accesses,
 * and a CPU with AVX-512, VNNI and bfloat16 suffices. Follows TILECONFIG, TILELOADD, TDPBF16PS and
 * TDPBSUD in Intel's manual (volume 2), except that bfloat16 products are summed in the order of
 * VDPBF16PS. */
#ifndef LEGACY1BIT_TESTS_TILES_H
#define LEGACY1BIT_TESTS_TILES_H

#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

static __thread struct {
    int ready;
    uint16_t row_bytes[16];
    uint8_t rows[16];
    uint8_t data[8][16][64];
} tiles;

static inline void tiles_need(int sound)
{
    if (!sound)
        abort();        /* the unit would raise an exception */
}

static inline void tiles_begin(const void *layout)
{
    const uint8_t *bytes = layout;
    int i;
    memset(&tiles, 0, sizeof tiles);
    tiles_need(bytes[0] == 1);
    /* Reserved bytes must be zeros. */
    for (i = 1; i < 64; i++)
        tiles_need(bytes[i] == 0 || (i >= 16 && i < 32) || (i >= 48 && i < 56));
    memcpy(tiles.row_bytes, bytes + 16, sizeof tiles.row_bytes);
    memcpy(tiles.rows, bytes + 48, sizeof tiles.rows);
    for (i = 0; i < 8; i++)
        tiles_need(tiles.row_bytes[i] <= 64 && tiles.rows[i] <= 16);
    tiles.ready = 1;
}

static inline void tiles_end(void) { memset(&tiles, 0, sizeof tiles); }

static inline void tiles_known(int tile)
{
    tiles_need(tiles.ready && tiles.rows[tile] && tiles.row_bytes[tile]);
}

static inline void tiles_zero(int tile)
{
    tiles_known(tile);
    memset(tiles.data[tile], 0, sizeof tiles.data[tile]);
}

static inline void tiles_load(int tile, const void *from, long stride)
{
    int i;
    tiles_zero(tile);
    for (i = 0; i < tiles.rows[tile]; i++)
        memcpy(tiles.data[tile][i], (const char *)from + i * stride, tiles.row_bytes[tile]);
}

static inline void tiles_store(int tile, void *to, long stride)
{
    int i;
    tiles_known(tile);
    for (i = 0; i < tiles.rows[tile]; i++)
        memcpy((char *)to + i * stride, tiles.data[tile][i], tiles.row_bytes[tile]);
}

/* Checks shapes: the rows of the sums and the left tile, the columns of the sums and the right
 * tile, and the pairs or fours along the depth. */
static inline void tiles_fit(int sums, int left, int right)
{
    tiles_need(sums != left && sums != right && left != right);
    tiles_known(sums);
    tiles_need(tiles.rows[left] == tiles.rows[sums]);
    tiles_need(tiles.row_bytes[right] == tiles.row_bytes[sums]);
    tiles_need(tiles.row_bytes[left] == 4 * tiles.rows[right]);
}

/* Data outside a tile's rows and columns is zeros. */
static inline void tiles_multiply(int sums, int left, int right, int bf16)
{
    int i, k;
    tiles_fit(sums, left, right);
    for (i = 0; i < tiles.rows[sums]; i++) {
        __m512i sum = _mm512_loadu_si512(tiles.data[sums][i]);
        for (k = 0; k < tiles.rows[right]; k++) {
            const __m512i columns = _mm512_loadu_si512(tiles.data[right][k]);
            int32_t bits;
            __m512i row;
            memcpy(&bits, tiles.data[left][i] + 4 * k, sizeof bits);
            row = _mm512_set1_epi32(bits);
            sum = bf16 ? _mm512_castps_si512(_mm512_dpbf16_ps(_mm512_castsi512_ps(sum),
                                                              (__m512bh)row, (__m512bh)columns))
                       : _mm512_dpbusd_epi32(sum, columns, row);
        }
        _mm512_storeu_si512(tiles.data[sums][i], sum);
    }
}

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#undef _tile_dpbsud
#define _tile_loadconfig tiles_begin
#define _tile_release tiles_end
#define _tile_zero tiles_zero
#define _tile_loadd tiles_load
#define _tile_stored tiles_store
#define _tile_dpbf16ps(sums, left, right) tiles_multiply(sums, left, right, 1)
#define _tile_dpbsud(sums, left, right) tiles_multiply(sums, left, right, 0)

#endif
