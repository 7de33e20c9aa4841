/* Products on the matrix unit of a CPU (Intel's AMX): of bfloat16 numbers, summed in float32, and
 * of packed codes with int8 activations, summed in int32.
 *
 * For the bfloat16 product both matrices are rounded while they are packed into tiles of one
 * kilobyte. A tile of the left matrix is 16 rows of 32 numbers. A tile of the right matrix is 32
 * rows of 16 columns with two rows interleaved: 16 rows of 16 pairs. Either is a 16 x 16 square of
 * pairs of neighbors along the depth, and an operand in the other orientation is transposed as such
 * a square. */
#ifndef LEGACY1BIT_AMX_H
#define LEGACY1BIT_AMX_H

/* One operand, addressed by (line, depth): floats, or codes with scales. A line is a row of the
 * left matrix or a column of the right one. One of the two strides is 1. */
typedef struct {
    const float *dense;
    long line_stride, depth_stride;
    const signed char *codes;       /* instead of dense, with the same strides */
    const float *scale;
    long scale_row, group;          /* as in a Matrix, whose rows are lines unless transposed */
    int transposed;
} amx_operand;

#if defined(LEGACY1BIT_TIER_AMX)

#include <immintrin.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifdef EMULATED_TILES
#include "tiles.h"
#endif

enum {
    MATRIX_UNIT = 1,
    AMX_SIDE = 16,              /* rows of a tile, and columns of a result tile */
    AMX_PAIRS = 2 * AMX_SIDE,   /* numbers along the depth of a tile */
    AMX_TILE = AMX_SIDE * AMX_PAIRS,
    AMX_DEPTH = 1024,           /* block of the right matrix packed at a time: one megabyte, */
    AMX_COLUMNS = 512,          /* sized for the L2 cache */
    AMX_ROWS = 2 * AMX_SIDE,    /* rows of the left matrix packed at a time */
    AMX_WORKSPACE = (AMX_DEPTH * (AMX_COLUMNS + AMX_ROWS)) / 2 + AMX_ROWS * AMX_ROWS + 16,
    AMX_MIN_ROWS = 8            /* fewer rows of activations are faster without the unit */
};

/* Asks the operating system for the unit; the permission holds for all threads. */
static inline int amx_request(void)
{
#ifdef EMULATED_TILES
    return 1;
#else
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#endif
}

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

static inline __mmask16 amx_first(long n)
{
    return n >= AMX_SIDE ? (__mmask16)0xffff : n <= 0 ? (__mmask16)0 : (__mmask16)((1u << n) - 1u);
}

/* The scale of the code at (line, depth): one per row or per group. A single scale for the whole
 * matrix is applied after the product instead, so that codes stay exact. */
static inline float amx_scale(const amx_operand *x, long line, long depth)
{
    const long row = x->transposed ? depth : line, column = x->transposed ? line : depth;
    if (x->scale_row == 0)
        return 1.0f;
    return x->scale[row * x->scale_row + (x->scale_row == 1 ? 0 : column / x->group)];
}

/* Up to 16 contiguous elements, starting at (line, depth). */
static inline __m512 amx_load(const amx_operand *x, long line, long depth, long count)
{
    const long at = line * x->line_stride + depth * x->depth_stride;
    const __mmask16 mask = amx_first(count);
    if (!x->codes)
        return _mm512_maskz_loadu_ps(mask, x->dense + at);
    return _mm512_mul_ps(
        _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(mask, x->codes + at))),
        _mm512_set1_ps(count > 0 ? amx_scale(x, line, depth) : 0.0f));
}

/* Packs one tile of an operand: `lines` lines of `depth` numbers from (line, first), padded with
 * zeros, as [16 lines][16 pairs] with as_lines, else as [16 pairs][16 lines]. */
static inline void amx_pack_tile(const amx_operand *x, long line, long first, long lines,
                                 long depth, int as_lines, uint16_t *tile)
{
    __m512i square[16];
    const int in_lines = x->depth_stride == 1;
    int i;
    if (in_lines) {
        for (i = 0; i < 16; i++) {
            const long low = i < lines ? depth : 0, high = i < lines ? depth - 16 : 0;
            square[i] = (__m512i)_mm512_cvtne2ps_pbh(amx_load(x, line + i, first + 16, high),
                                                     amx_load(x, line + i, first, low));
        }
    } else {
        for (i = 0; i < 16; i++) {
            const long even = 2 * i < depth ? lines : 0, odd = 2 * i + 1 < depth ? lines : 0;
            const __m512i low = _mm512_cvtepu16_epi32(
                (__m256i)_mm512_cvtneps_pbh(amx_load(x, line, first + 2 * i, even)));
            const __m512i high = _mm512_cvtepu16_epi32(
                (__m256i)_mm512_cvtneps_pbh(amx_load(x, line, first + 2 * i + 1, odd)));
            square[i] = _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
        }
    }
    if (in_lines != as_lines)
        avx512_transpose(square);
    for (i = 0; i < 16; i++)
        _mm512_store_si512((void *)(tile + i * 32), square[i]);
}

/* Packs panels of 32 lines; every 32 numbers along the depth become two tiles. */
static inline void amx_pack(const amx_operand *x, long line, long first, long lines, long depth,
                            int as_lines, uint16_t *packed)
{
    long panel, block;
    for (panel = 0; panel < lines; panel += 32)
        for (block = 0; block < depth; block += 32) {
            amx_pack_tile(x, line + panel, first + block, lines - panel, depth - block, as_lines,
                          packed);
            if (lines - panel > 16)
                amx_pack_tile(x, line + panel + 16, first + block, lines - panel - 16,
                              depth - block, as_lines, packed + AMX_TILE);
            packed += 2 * AMX_TILE;
        }
}

/* sums[32][32] = the product of a left and a right panel, only the tiles that both have. */
static inline void amx_multiply(long blocks, const uint16_t *a, const uint16_t *b, int two_rows,
                                int two_columns, float *sums)
{
    long i;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (i = 0; i < blocks; i++, a += 2 * AMX_TILE, b += 2 * AMX_TILE) {
        _tile_loadd(4, a, 64);
        _tile_loadd(6, b, 64);
        _tile_dpbf16ps(0, 4, 6);
        if (two_columns) {
            _tile_loadd(7, b + AMX_TILE, 64);
            _tile_dpbf16ps(1, 4, 7);
        }
        if (two_rows) {
            _tile_loadd(5, a + AMX_TILE, 64);
            _tile_dpbf16ps(2, 5, 6);
            if (two_columns)
                _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, sums, 128);
    _tile_stored(1, sums + 16, 128);
    _tile_stored(2, sums + 16 * 32, 128);
    _tile_stored(3, sums + 16 * 32 + 16, 128);
}

/* c[m, n] = factor a b + bias, or c += factor a b where accumulate is set. */
static void amx_product(long m, long n, long k, const amx_operand *a, const amx_operand *b,
                        float factor, const float *bias, int accumulate, float *c, long c_row,
                        float *workspace)
{
    uint16_t *right = (uint16_t *)(((uintptr_t)workspace + 63) & ~(uintptr_t)63);
    uint16_t *left = right + AMX_DEPTH * AMX_COLUMNS;
    float *sums = (float *)(left + AMX_DEPTH * AMX_ROWS);
    const __m512 times = _mm512_set1_ps(factor);
    long jc, pc, ir, jr, i, j;
    amx_begin();
    for (jc = 0; jc < n; jc += AMX_COLUMNS) {
        const long columns = n - jc < AMX_COLUMNS ? n - jc : AMX_COLUMNS;
        for (pc = 0; pc < k; pc += AMX_DEPTH) {
            const long depth = k - pc < AMX_DEPTH ? k - pc : AMX_DEPTH;
            const long blocks = (depth + AMX_PAIRS - 1) / AMX_PAIRS;
            amx_pack(b, jc, pc, columns, depth, 0, right);
            for (ir = 0; ir < m; ir += AMX_ROWS) {
                const long rows = m - ir < AMX_ROWS ? m - ir : AMX_ROWS;
                amx_pack(a, ir, pc, rows, depth, 1, left);
                for (jr = 0; jr < columns; jr += 32) {
                    const long here = columns - jr < 32 ? columns - jr : 32;
                    amx_multiply(blocks, left, right + jr * blocks * AMX_PAIRS, rows > 16,
                                 here > 16, sums);
                    for (i = 0; i < rows; i++)
                        for (j = 0; j < here; j += 16) {
                            const __mmask16 mask = amx_first(here - j);
                            float *to = c + (ir + i) * c_row + jc + jr + j;
                            __m512 start = _mm512_setzero_ps();
                            if (accumulate || pc)
                                start = _mm512_maskz_loadu_ps(mask, to);
                            else if (bias)
                                start = _mm512_maskz_loadu_ps(mask, bias + jc + jr + j);
                            _mm512_mask_storeu_ps(
                                to, mask,
                                _mm512_fmadd_ps(times, _mm512_load_ps(sums + i * 32 + j), start));
                        }
                }
            }
        }
    }
    _tile_release();
}

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

/* totals[rows][32] of a strip and rows of int8 activations. Reads blocks of 16 rows and of 64
 * columns, so the activations must be padded to multiples of both. */
static void amx_packed_sums(const unsigned char *strip, long tiles, int trits,
                            const signed char *x, long stride, long rows, int *totals,
                            float *workspace)
{
    enum {
        TILES = 256,
        BYTES = TILES * TRITS_PER_BYTE * 64 + 1024,
        ROW = STRIP_ROWS * 4    /* bytes of a row of totals */
    };
    unsigned char *upper = (unsigned char *)(((uintptr_t)workspace + 63) & ~(uintptr_t)63);
    unsigned char *lower = upper + BYTES;
    long done, i, j;
    amx_begin();
    for (done = 0; done < tiles; done += TILES) {
        const long here = tiles - done < TILES ? tiles - done : TILES;
        const long blocks = amx_unpack(strip + TILE_BYTES * done, here, trits, upper, lower);
        const signed char *from = x + done * (trits ? TILE_TRITS : TILE_CODES);
        for (i = 0; i < rows; i += AMX_ROWS) {
            int *to = totals + i * STRIP_ROWS;
            const int more = i + 16 < rows;
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
            if (done) {
                _tile_loadd(0, to, ROW);
                _tile_loadd(1, to + 16, ROW);
                _tile_loadd(2, to + 16 * STRIP_ROWS, ROW);
                _tile_loadd(3, to + 16 * STRIP_ROWS + 16, ROW);
            }
            for (j = 0; j < blocks; j++) {
                _tile_loadd(4, from + i * stride + 64 * j, stride);
                _tile_loadd(6, upper + 1024 * j, 64);
                _tile_dpbsud(0, 4, 6);
                _tile_loadd(7, lower + 1024 * j, 64);
                _tile_dpbsud(1, 4, 7);
                if (more) {
                    _tile_loadd(5, from + (i + 16) * stride + 64 * j, stride);
                    _tile_dpbsud(2, 5, 6);
                    _tile_dpbsud(3, 5, 7);
                }
            }
            _tile_stored(0, to, ROW);
            _tile_stored(1, to + 16, ROW);
            _tile_stored(2, to + 16 * STRIP_ROWS, ROW);
            _tile_stored(3, to + 16 * STRIP_ROWS + 16, ROW);
        }
    }
    _tile_release();
}

#else

/* Never called, but referenced by the kernels' source. */
enum { MATRIX_UNIT = 0, AMX_WORKSPACE = 0, AMX_MIN_ROWS = 0 };

static inline int amx_request(void) { return 0; }

static inline void amx_product(long m, long n, long k, const amx_operand *a, const amx_operand *b,
                               float factor, const float *bias, int accumulate, float *c,
                               long c_row, float *workspace)
{
    (void)m, (void)n, (void)k, (void)a, (void)b, (void)factor, (void)bias, (void)accumulate;
    (void)c, (void)c_row, (void)workspace;
}

static inline void amx_packed_sums(const unsigned char *strip, long tiles, int trits,
                                   const signed char *x, long stride, long rows, int *totals,
                                   float *workspace)
{
    (void)strip, (void)tiles, (void)trits, (void)x, (void)stride, (void)rows, (void)totals;
    (void)workspace;
}

#endif
#endif
