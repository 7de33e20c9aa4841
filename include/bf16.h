/* Products in bfloat16, summed in float32: on the matrix unit of a CPU (Intel's AMX), or with the
 * dot products of pairs in AVX-512 (BF16; Cooper Lake, Zen 4 and later).
 *
 * Both matrices are rounded while they are packed into tiles of one kilobyte. A tile of the left
 * matrix is 16 rows of 32 numbers. A tile of the right matrix is 32 rows of 16 columns with two
 * rows interleaved: 16 rows of 16 pairs. Either is a 16 x 16 square of pairs of neighbors along the
 * depth, and an operand in the other orientation is transposed as such a square.
 *
 * Both ways round to nearest, ties to even, and take denormals for 0. The unit adds up the first
 * and the second numbers of a tile's pairs before it adds these sums to the total (TDPBF16PS); the
 * vectors add the second number's product and then the first's, pair by pair (VDPBF16PS). So their
 * sums differ in the last bits. */
#ifndef LEGACY1BIT_BF16_H
#define LEGACY1BIT_BF16_H

/* One operand, addressed by (line, depth): floats, or codes with scales. A line is a row of the
 * left matrix or a column of the right one. One of the two strides is 1. */
typedef struct {
    const float *dense;
    long line_stride, depth_stride;
    const signed char *codes;       /* instead of dense, with the same strides */
    const float *scale;
    long scale_row, group;          /* as in a Matrix, whose rows are lines unless transposed */
    int transposed;
} bf16_operand;

#if defined(LEGACY1BIT_TIER_AMX) || defined(LEGACY1BIT_TIER_AVX512BF16)

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

enum {
    BF16_PRODUCTS = 1,
    BF16_SIDE = 16,             /* rows of a left tile, and columns of a right one */
    BF16_PAIRS = 2 * BF16_SIDE, /* numbers along the depth of a tile */
    BF16_TILE = BF16_SIDE * BF16_PAIRS,
    BF16_DEPTH = 1024,          /* block of the right matrix packed at a time: half of the */
    BF16_COLUMNS = MATRIX_UNIT ? 512 : 256,     /* second-level cache, 2 MiB with AMX, else 1 */
    BF16_ROWS = 2 * BF16_SIDE,  /* rows of the left matrix packed at a time */
    BF16_WORKSPACE = (BF16_DEPTH * (BF16_COLUMNS + BF16_ROWS)) / 2 + BF16_ROWS * BF16_ROWS + 16
};

static inline __mmask16 bf16_first(long n)
{
    return n >= BF16_SIDE ? (__mmask16)0xffff : n <= 0 ? (__mmask16)0 : (__mmask16)((1u << n) - 1u);
}

/* The scale of the code at (line, depth): one per row or per group. A single scale for the whole
 * matrix is applied after the product instead, so that codes stay exact. */
static inline float bf16_scale(const bf16_operand *x, long line, long depth)
{
    const long row = x->transposed ? depth : line, column = x->transposed ? line : depth;
    if (x->scale_row == 0)
        return 1.0f;
    return x->scale[row * x->scale_row + (x->scale_row == 1 ? 0 : column / x->group)];
}

/* Up to 16 contiguous elements, starting at (line, depth). */
static inline __m512 bf16_load(const bf16_operand *x, long line, long depth, long count)
{
    const long at = line * x->line_stride + depth * x->depth_stride;
    const __mmask16 mask = bf16_first(count);
    if (!x->codes)
        return _mm512_maskz_loadu_ps(mask, x->dense + at);
    return _mm512_mul_ps(
        _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(mask, x->codes + at))),
        _mm512_set1_ps(count > 0 ? bf16_scale(x, line, depth) : 0.0f));
}

/* Packs one tile of an operand: `lines` lines of `depth` numbers from (line, first), padded with
 * zeros, as [16 lines][16 pairs] with as_lines, else as [16 pairs][16 lines]. */
static inline void bf16_pack_tile(const bf16_operand *x, long line, long first, long lines,
                                  long depth, int as_lines, uint16_t *tile)
{
    __m512i square[16];
    const int in_lines = x->depth_stride == 1;
    int i;
    if (in_lines) {
        for (i = 0; i < 16; i++) {
            const long low = i < lines ? depth : 0, high = i < lines ? depth - 16 : 0;
            square[i] = (__m512i)_mm512_cvtne2ps_pbh(bf16_load(x, line + i, first + 16, high),
                                                     bf16_load(x, line + i, first, low));
        }
    } else {
        for (i = 0; i < 16; i++) {
            const long even = 2 * i < depth ? lines : 0, odd = 2 * i + 1 < depth ? lines : 0;
            const __m512i low = _mm512_cvtepu16_epi32(
                (__m256i)_mm512_cvtneps_pbh(bf16_load(x, line, first + 2 * i, even)));
            const __m512i high = _mm512_cvtepu16_epi32(
                (__m256i)_mm512_cvtneps_pbh(bf16_load(x, line, first + 2 * i + 1, odd)));
            square[i] = _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
        }
    }
    if (in_lines != as_lines)
        avx512_transpose(square);
    for (i = 0; i < 16; i++)
        _mm512_store_si512((void *)(tile + i * 32), square[i]);
}

/* Packs panels of 32 lines; every 32 numbers along the depth become two tiles. */
static inline void bf16_pack(const bf16_operand *x, long line, long first, long lines, long depth,
                             int as_lines, uint16_t *packed)
{
    long panel, block;
    for (panel = 0; panel < lines; panel += 32)
        for (block = 0; block < depth; block += 32) {
            bf16_pack_tile(x, line + panel, first + block, lines - panel, depth - block, as_lines,
                           packed);
            if (lines - panel > 16)
                bf16_pack_tile(x, line + panel + 16, first + block, lines - panel - 16,
                               depth - block, as_lines, packed + BF16_TILE);
            packed += 2 * BF16_TILE;
        }
}

#if defined(LEGACY1BIT_TIER_AMX)

static inline void bf16_begin(void) { amx_begin(); }
static inline void bf16_end(void) { amx_end(); }

/* sums[32][32] = the product of a left and a right panel, only the tiles that both have. */
static inline void bf16_multiply(long blocks, const uint16_t *a, const uint16_t *b, long rows,
                                 long columns, float *sums)
{
    const int two_rows = rows > 16, two_columns = columns > 16;
    long i;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (i = 0; i < blocks; i++, a += 2 * BF16_TILE, b += 2 * BF16_TILE) {
        _tile_loadd(4, a, 64);
        _tile_loadd(6, b, 64);
        _tile_dpbf16ps(0, 4, 6);
        if (two_columns) {
            _tile_loadd(7, b + BF16_TILE, 64);
            _tile_dpbf16ps(1, 4, 7);
        }
        if (two_rows) {
            _tile_loadd(5, a + BF16_TILE, 64);
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

#else

static inline void bf16_begin(void) {}
static inline void bf16_end(void) {}

/* The same with vectors: eight rows by two vectors of sums, enough to hide the time that a dot
 * product takes. One vector of columns is multiplied twice. */
static inline void bf16_multiply(long blocks, const uint16_t *a, const uint16_t *b, long rows,
                                 long columns, float *sums)
{
    enum { AT_ONCE = 8 };
    const long second = columns > 16 ? BF16_TILE : 0;
    long i, row;
    int pair, r;
    for (row = 0; row < rows; row += AT_ONCE) {
        const uint16_t *left = a + row * BF16_PAIRS, *right = b;
        __m512 sum[AT_ONCE][2];
        if (row >= BF16_SIDE)
            left = a + BF16_TILE + (row - BF16_SIDE) * BF16_PAIRS;
        for (r = 0; r < AT_ONCE; r++)
            sum[r][0] = sum[r][1] = _mm512_setzero_ps();
        for (i = 0; i < blocks; i++, left += 2 * BF16_TILE, right += 2 * BF16_TILE)
            for (pair = 0; pair < BF16_PAIRS; pair += 2) {
                const uint16_t *at = right + pair * BF16_SIDE;
                const __m512bh low = (__m512bh)_mm512_load_si512((const void *)at);
                const __m512bh high = (__m512bh)_mm512_load_si512((const void *)(at + second));
                for (r = 0; r < AT_ONCE; r++) {
                    int two;
                    memcpy(&two, left + r * BF16_PAIRS + pair, sizeof two);
                    sum[r][0] = _mm512_dpbf16_ps(sum[r][0], (__m512bh)_mm512_set1_epi32(two), low);
                    sum[r][1] = _mm512_dpbf16_ps(sum[r][1], (__m512bh)_mm512_set1_epi32(two), high);
                }
            }
        for (r = 0; r < AT_ONCE; r++) {
            _mm512_store_ps(sums + (row + r) * 32, sum[r][0]);
            _mm512_store_ps(sums + (row + r) * 32 + 16, sum[r][1]);
        }
    }
}

#endif

/* c[m, n] = factor a b + bias, or c += factor a b where accumulate is set. */
static void bf16_product(long m, long n, long k, const bf16_operand *a, const bf16_operand *b,
                         float factor, const float *bias, int accumulate, float *c, long c_row,
                         float *workspace)
{
    uint16_t *right = (uint16_t *)(((uintptr_t)workspace + 63) & ~(uintptr_t)63);
    uint16_t *left = right + BF16_DEPTH * BF16_COLUMNS;
    float *sums = (float *)(left + BF16_DEPTH * BF16_ROWS);
    const __m512 times = _mm512_set1_ps(factor);
    long jc, pc, ir, jr, i, j;
    bf16_begin();
    for (jc = 0; jc < n; jc += BF16_COLUMNS) {
        const long columns = n - jc < BF16_COLUMNS ? n - jc : BF16_COLUMNS;
        for (pc = 0; pc < k; pc += BF16_DEPTH) {
            const long depth = k - pc < BF16_DEPTH ? k - pc : BF16_DEPTH;
            const long blocks = (depth + BF16_PAIRS - 1) / BF16_PAIRS;
            bf16_pack(b, jc, pc, columns, depth, 0, right);
            for (ir = 0; ir < m; ir += BF16_ROWS) {
                const long rows = m - ir < BF16_ROWS ? m - ir : BF16_ROWS;
                bf16_pack(a, ir, pc, rows, depth, 1, left);
                for (jr = 0; jr < columns; jr += 32) {
                    const long here = columns - jr < 32 ? columns - jr : 32;
                    bf16_multiply(blocks, left, right + jr * blocks * BF16_PAIRS, rows, here, sums);
                    for (i = 0; i < rows; i++)
                        for (j = 0; j < here; j += 16) {
                            const __mmask16 mask = bf16_first(here - j);
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
    bf16_end();
}

#else

/* Never called, but referenced by the kernels' source. */
enum { BF16_PRODUCTS = 0, BF16_WORKSPACE = 0 };

static inline void bf16_product(long m, long n, long k, const bf16_operand *a,
                                const bf16_operand *b, float factor, const float *bias,
                                int accumulate, float *c, long c_row, float *workspace)
{
    (void)m, (void)n, (void)k, (void)a, (void)b, (void)factor, (void)bias, (void)accumulate;
    (void)c, (void)c_row, (void)workspace;
}

#endif
#endif
