/* Products of bfloat16 numbers on the matrix unit of a CPU (Intel's AMX): sums of float32.
 *
 * Both matrices are rounded to bfloat16 while they are packed into tiles of a kilobyte. A left tile
 * is 16 rows of 32 numbers; a right one holds 32 rows of 16 columns, two rows beside each other:
 * 16 rows of 16 pairs. So either is a 16 x 16 square of pairs that lie beside each other along the
 * depth, and what comes turned over is transposed as such. */
#ifndef LEGACY1BIT_AMX_H
#define LEGACY1BIT_AMX_H

/* One operand, by the element at (line, depth): floats, or codes with scales. A line is a row of
 * the left matrix, or a column of the right one. */
typedef struct {
    const float *dense;
    long line_stride, depth_stride;
    const signed char *codes;       /* instead of dense, with the same strides */
    const float *scale;
    long scale_row, group;          /* as in a Matrix, whose rows are lines unless turned */
    int turned;
} amx_operand;

#if defined(LEGACY1BIT_TIER_AMX)

#include <immintrin.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

enum {
    MATRIX_UNIT = 1,
    AMX_SIDE = 16,              /* rows of a tile, and columns of a result's */
    AMX_PAIRS = 2 * AMX_SIDE,   /* numbers along the depth of a tile */
    AMX_TILE = AMX_SIDE * AMX_PAIRS,
    AMX_DEPTH = 1024,           /* what is packed of the right matrix: a megabyte, for the */
    AMX_COLUMNS = 512,          /* second-level cache */
    AMX_ROWS = 2 * AMX_SIDE,    /* and of the left one */
    AMX_WORKSPACE = (AMX_DEPTH * (AMX_COLUMNS + AMX_ROWS)) / 2 + AMX_ROWS * AMX_ROWS + 16
};

/* Ask the system for the unit; it is granted to all threads or to none. */
static inline int amx_request(void)
{
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
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
    _tile_loadconfig(&layout);
}

static inline __mmask16 amx_first(long n)
{
    return n >= AMX_SIDE ? (__mmask16)0xffff : n <= 0 ? (__mmask16)0 : (__mmask16)((1u << n) - 1u);
}

/* The factor of the code at a line and a depth: scales of a row or of a group of it. One scale for
 * all is left to the end, so that codes stay exact. */
static inline float amx_scale(const amx_operand *x, long line, long depth)
{
    const long row = x->turned ? depth : line, column = x->turned ? line : depth;
    if (x->scale_row == 0)
        return 1.0f;
    return x->scale[row * x->scale_row + (x->scale_row == 1 ? 0 : column / x->group)];
}

/* Up to 16 neighbours in memory, beginning at (line, depth). */
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

/* square[16][16] of 32-bit elements becomes its transpose. */
static inline void amx_transpose(__m512i *square)
{
    __m512i t[16];
    int i;
    for (i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(square[i], square[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(square[i], square[i + 1]);
    }
    for (i = 0; i < 16; i += 4) {
        square[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        square[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        square[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        square[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(square[i], square[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(square[i], square[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(square[i + 8], square[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(square[i + 8], square[i + 12], 0xdd);
    }
    for (i = 0; i < 4; i++) {
        square[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        square[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        square[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        square[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
}

/* One tile of an operand: `lines` lines of `depth` numbers from (line, first), zeros beyond. As
 * lines of pairs, [16 lines][16 pairs], or else as pairs of lines, [16 pairs][16 lines]. */
static inline void amx_pack_tile(const amx_operand *x, long line, long first, long lines,
                                 long depth, int as_lines, uint16_t *tile)
{
    __m512i square[16];
    int i, in_lines;
    if (x->depth_stride == 1) {
        for (i = 0; i < 16; i++) {
            const long low = i < lines ? depth : 0, high = i < lines ? depth - 16 : 0;
            square[i] = (__m512i)_mm512_cvtne2ps_pbh(amx_load(x, line + i, first + 16, high),
                                                     amx_load(x, line + i, first, low));
        }
        in_lines = 1;
    } else if (x->line_stride == 1) {
        for (i = 0; i < 16; i++) {
            const long even = 2 * i < depth ? lines : 0, odd = 2 * i + 1 < depth ? lines : 0;
            const __m512i low = _mm512_cvtepu16_epi32(
                (__m256i)_mm512_cvtneps_pbh(amx_load(x, line, first + 2 * i, even)));
            const __m512i high = _mm512_cvtepu16_epi32(
                (__m256i)_mm512_cvtneps_pbh(amx_load(x, line, first + 2 * i + 1, odd)));
            square[i] = _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
        }
        in_lines = 0;
    } else {
        for (i = 0; i < 16; i++) {
            float row[32];
            long j;
            for (j = 0; j < 32; j++)
                row[j] = i < lines && j < depth ? x->dense[(line + i) * x->line_stride
                                                           + (first + j) * x->depth_stride]
                                                : 0.0f;
            square[i] = (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(row + 16),
                                                     _mm512_loadu_ps(row));
        }
        in_lines = 1;
    }
    if (in_lines != as_lines)
        amx_transpose(square);
    for (i = 0; i < 16; i++)
        _mm512_store_si512((void *)(tile + i * 32), square[i]);
}

/* Panels of 32 lines: of each 32 numbers of depth, two tiles. */
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

/* sums[32][32] = the product of a left and a right panel; only what both have of it. */
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

#else

/* Nobody calls these, but the kernels' source names them. */
enum { MATRIX_UNIT = 0, AMX_WORKSPACE = 0 };

static inline int amx_request(void) { return 0; }

static inline void amx_product(long m, long n, long k, const amx_operand *a, const amx_operand *b,
                               float factor, const float *bias, int accumulate, float *c,
                               long c_row, float *workspace)
{
    (void)m, (void)n, (void)k, (void)a, (void)b, (void)factor, (void)bias, (void)accumulate;
    (void)c, (void)c_row, (void)workspace;
}

#endif
#endif
