/* The matrix unit of a CPU (Intel's AMX): its tiles, and products of packed codes with int8
 * activations, summed in int32. Products of bfloat16 numbers are in bf16.h. */
#ifndef LEGACY1BIT_AMX_H
#define LEGACY1BIT_AMX_H

#if defined(LEGACY1BIT_TIER_AMX)

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#ifdef EMULATED_TILES
#include "tiles.h"
#endif

enum {
    MATRIX_UNIT = 1,
    AMX_SIDE = 16,              /* rows of a tile */
    AMX_MIN_ROWS = 6            /* fewer rows of activations are faster without the unit */
};

static inline void amx_begin(void)
{
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } layout;
    int i;
    memset(&layout, 0, sizeof layout);
    layout.palette = 1;
    for (i = 0; i < 8; i++) {
        layout.row_bytes[i] = 64;
        layout.rows[i] = AMX_SIDE;
    }
    /* Compilers may assume that the instruction reads only the pointer. */
    __asm__ volatile("" : : "r"(&layout) : "memory");
    _tile_loadconfig(&layout);
}

static inline void amx_end(void) { _tile_release(); }

/* Unpacks `tiles` tiles of a strip of packed codes to bytes, in groups of four columns, the upper
 * 16 rows separately from the lower 16: one right tile of each for every 64 columns, the last
 * padded with zeros. Returns the number of right tiles. */
static long amx_unpack(const unsigned char *w, long tiles, int trits, unsigned char *upper,
                       unsigned char *lower)
{
    const int fields = trits ? TRITS_PER_BYTE : CODES_PER_BYTE;
    long groups = tiles * fields, i;
    int field;
    for (i = 0; i < tiles; i++, w += TILE_BYTES) {
        __m512i u = _mm512_loadu_si512(w), v = _mm512_loadu_si512(w + 64);
        prefetch_tile(w);
        for (field = 0; field < fields; field++, upper += 64, lower += 64) {
            const __m512i three = _mm512_set1_epi8(3);
            if (trits) {
                _mm512_store_si512((void *)upper, avx512_trit(&u));
                _mm512_store_si512((void *)lower, avx512_trit(&v));
            } else {
                _mm512_store_si512((void *)upper, _mm512_and_si512(u, three));
                _mm512_store_si512((void *)lower, _mm512_and_si512(v, three));
                u = _mm512_srli_epi16(u, 2);
                v = _mm512_srli_epi16(v, 2);
            }
        }
    }
    for (; groups % 16; groups++, upper += 64, lower += 64) {
        _mm512_store_si512((void *)upper, _mm512_setzero_si512());
        _mm512_store_si512((void *)lower, _mm512_setzero_si512());
    }
    return groups / 16;
}

/* Adds to the sums in tiles 0 to 3 the products of 16 rows of activations, or of 32 if there are
 * more, with `blocks` right tiles. */
FORCE_INLINE void amx_multiply(const signed char *x, long stride, const unsigned char *upper,
                               const unsigned char *lower, long blocks, const int more)
{
    for (long j = 0; j < blocks; j++) {
        _tile_loadd(4, x + 64 * j, stride);
        _tile_loadd(6, upper + 1024 * j, 64);
        _tile_dpbsud(0, 4, 6);
        _tile_loadd(7, lower + 1024 * j, 64);
        _tile_dpbsud(1, 4, 7);
        if (more) {
            _tile_loadd(5, x + AMX_SIDE * stride + 64 * j, stride);
            _tile_dpbsud(2, 5, 6);
            _tile_dpbsud(3, 5, 7);
        }
    }
}

/* totals[rows][32] of a strip and rows of int8 activations, after amx_begin. Reads blocks of 16 rows
 * and of 64 columns, so the activations must be padded to multiples of both. The codes are unpacked
 * a few tiles at a time, which stay in the L1 cache; the sums of up to 32 rows stay in the unit. */
static void amx_packed_sums(const unsigned char *strip, long tiles, int trits,
                            const signed char *x, long stride, long rows, int *totals,
                            float *workspace)
{
    enum {
        TILES = 16,
        BYTES = TILES * TRITS_PER_BYTE * 64 + 1024,
        ROW = STRIP_ROWS * 4    /* bytes of a row of totals */
    };
    unsigned char *upper = (unsigned char *)(((uintptr_t)workspace + 63) & ~(uintptr_t)63);
    unsigned char *lower = upper + BYTES;
    const int keep = rows <= 2 * AMX_SIDE;
    long done, i;
    for (done = 0; done < tiles; done += TILES) {
        const long here = tiles - done < TILES ? tiles - done : TILES;
        const long blocks = amx_unpack(strip + TILE_BYTES * done, here, trits, upper, lower);
        const signed char *from = x + done * (trits ? TILE_TRITS : TILE_CODES);
        for (i = 0; i < rows; i += 2 * AMX_SIDE) {
            int *to = totals + i * STRIP_ROWS, *next = to + AMX_SIDE * STRIP_ROWS;
            const int more = i + AMX_SIDE < rows;
            if (!done) {
                _tile_zero(0);
                _tile_zero(1);
                _tile_zero(2);
                _tile_zero(3);
            } else if (!keep) {
                _tile_loadd(0, to, ROW);
                _tile_loadd(1, to + 16, ROW);
                if (more) {
                    _tile_loadd(2, next, ROW);
                    _tile_loadd(3, next + 16, ROW);
                }
            }
            if (more)
                amx_multiply(from + i * stride, stride, upper, lower, blocks, 1);
            else
                amx_multiply(from + i * stride, stride, upper, lower, blocks, 0);
            if (keep && done + here < tiles)
                continue;
            _tile_stored(0, to, ROW);
            _tile_stored(1, to + 16, ROW);
            if (more) {
                _tile_stored(2, next, ROW);
                _tile_stored(3, next + 16, ROW);
            }
        }
    }
}

#else

/* Never called, but referenced by the kernels' source. */
enum { MATRIX_UNIT = 0, AMX_MIN_ROWS = 0 };

static inline void amx_begin(void) {}
static inline void amx_end(void) {}

static inline void amx_packed_sums(const unsigned char *strip, long tiles, int trits,
                                   const signed char *x, long stride, long rows, int *totals,
                                   float *workspace)
{
    (void)strip, (void)tiles, (void)trits, (void)x, (void)stride, (void)rows, (void)totals;
    (void)workspace;
}

#endif
#endif
