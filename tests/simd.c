/* Checks every vector operation against its definition in include/simd.h, and products in bfloat16
 * and on the matrix unit, in one instruction set. tests/test_simd.py compiles this for each;
 * undefined behavior traps. Arrays end at an inaccessible page. */
#include "simd.h"

#include <stdio.h>
#include <stdlib.h>
#ifdef _WIN32
#define WIN32_LEAN_AND_MEAN
#include <windows.h>
#else
#include <sys/mman.h>
#endif

static int wrong;

static void need(int right, const char *what, int line)
{
    if (!right && wrong++ < 20)
        printf("%s, line %d: %s\n", TIER_NAME, line, what);
}

#define NEED(what) need(what, #what, __LINE__)

/* Fills the stack, so that uninitialized variables are not zeros by chance. */
static __attribute__((noinline)) void fill_the_stack(void)
{
    unsigned char bytes[4096];
    memset(bytes, 0xa5, sizeof bytes);
    __asm__ volatile("" : : "r"(bytes) : "memory");
}

/* Memory that ends at an inaccessible page. */
static void *guarded(size_t bytes)
{
    enum { PAGE = 65536 };
    const size_t pages = (bytes + PAGE - 1) / PAGE * PAGE;
#ifdef _WIN32
    DWORD before;
    char *memory = VirtualAlloc(NULL, pages + PAGE, MEM_RESERVE | MEM_COMMIT, PAGE_READWRITE);
    if (memory == NULL || !VirtualProtect(memory + pages, PAGE, PAGE_NOACCESS, &before))
        exit(2);
#else
    char *memory = mmap(NULL, pages + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANON, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory + pages, PAGE, PROT_NONE) != 0)
        exit(2);
#endif
    return memory + pages - bytes;
}

static unsigned int state = 1;

static int below(int n)
{
    state = state * 1664525u + 1013904223u;
    return (int)(state >> 8) % n;
}

static int same(float a, float b) { return a == b || (a != a && b != b); }

/* --- Floats ---------------------------------------------------------------------------------- */

enum { N = VF32_LANES };

static float numbers[] = {
    0.0f, -0.0f, 1.0f, -1.0f, 0.5f, 2.5f, -3.5f, 1e-40f, -3e38f, 3e38f, INFINITY, -INFINITY, NAN,
    127.0f, -88.75f, 16777216.0f,
};

enum { NUMBERS = sizeof numbers / sizeof *numbers };

#define LANES(vector, lanes) vf32_store(lanes, vector)

static void loads_and_stores(void)
{
    float *p = guarded(N * sizeof *p), *out = guarded(N * sizeof *out);
    signed char *bytes = guarded(N);
    LANES(vf32_zero(), out);
    for (int i = 0; i < N; i++)
        NEED(out[i] == 0.0f);
    LANES(vf32_splat(-2.5f), out);
    for (int i = 0; i < N; i++)
        NEED(out[i] == -2.5f);
    for (int i = 0; i < N; i++)
        p[i] = (float)(i + 1);
    LANES(vf32_load(p), out);
    NEED(memcmp(p, out, N * sizeof *p) == 0);
    LANES(vf32_load(p - 1), out - 1);
    NEED(memcmp(p - 1, out - 1, N * sizeof *p) == 0);
    for (long n = 0; n < N; n++) {
        float *end = p + N - n, *to = out + N - n;
        fill_the_stack();
        const vf32 first = vf32_load_first(end, n);
        LANES(first, out);
        for (int i = 0; i < N; i++)
            NEED(out[i] == (i < n ? end[i] : 0.0f));
        for (int i = 0; i < N; i++)
            out[i] = -7.0f;
        fill_the_stack();
        vf32_store_first(to, n, vf32_load(p));
        for (int i = 0; i < N; i++)
            NEED(out[i] == (i < N - n ? -7.0f : p[i - (N - n)]));
    }
    for (int start = -128; start < 128; start += N) {
        for (int i = 0; i < N; i++)
            bytes[i] = (signed char)(start + i);
        LANES(vf32_load_i8(bytes), out);
        for (int i = 0; i < N; i++)
            NEED(out[i] == (float)(start + i));
        for (long n = 0; n < N; n++) {
            fill_the_stack();
            const vf32 first = vf32_load_i8_first(bytes + N - n, n);
            LANES(first, out);
            for (int i = 0; i < N; i++)
                NEED(out[i] == (i < n ? (float)bytes[N - n + i] : 0.0f));
        }
    }
}

/* Every pair of numbers, in every lane. */
static void arithmetic(void)
{
    for (int r = 0; r < NUMBERS; r++)
        for (int s = 0; s < NUMBERS; s++) {
            float a[N], b[N], out[N];
            for (int i = 0; i < N; i++) {
                a[i] = numbers[(r + i) % NUMBERS];
                b[i] = numbers[(s + i) % NUMBERS];
            }
            const vf32 x = vf32_load(a), y = vf32_load(b);
#define EACH(vector, expected)                   \
    do {                                         \
        LANES(vector, out);                      \
        for (int i = 0; i < N; i++)              \
            NEED(same(out[i], expected));        \
    } while (0)
            EACH(vf32_add(x, y), a[i] + b[i]);
            EACH(vf32_sub(x, y), a[i] - b[i]);
            EACH(vf32_mul(x, y), a[i] * b[i]);
            EACH(vf32_max(x, y), a[i] > b[i] ? a[i] : b[i]);
            EACH(vf32_min(x, y), a[i] < b[i] ? a[i] : b[i]);
            EACH(vf32_where_positive(x, y), a[i] > 0.0f ? b[i] : 0.0f);
            EACH(vf32_sqrt(x), sqrtf(a[i]));
            LANES(vf32_fmadd(x, y, x), out);
            for (int i = 0; i < N; i++)
                NEED(same(out[i], a[i] * b[i] + a[i]) || same(out[i], fmaf(a[i], b[i], a[i])));
            for (int i = 0; i < N; i++)
                b[i] = b[i] == 0.0f ? 3.0f : b[i];
            EACH(vf32_div(x, vf32_load(b)), a[i] / b[i]);
        }
}

static void rounding(void)
{
    static const float whole[] = {0.0f, 1.0f, 2.0f, 100.0f, 127.0f, 131071.0f, 2800001.0f,
                                  4194302.0f};
    float v[N], out[N];
    signed char *bytes = guarded(N);
    short *words = guarded(N * sizeof *words);
    for (int k = 0; k < 8 * 5 * 2; k++) {
        for (int i = 0; i < N; i++) {
            const int j = (k + i) % 80;
            v[i] = (whole[j % 8] + 0.25f * (float)(j / 8 % 5)) * (j < 40 ? 1.0f : -1.0f);
        }
        EACH(vf32_round(vf32_load(v)), rintf(v[i]));
        for (int i = 0; i < N; i++)
            v[i] = fminf(fmaxf(v[i], -32767.0f), 32767.0f);
        i16_round(words, vf32_load(v));
        for (int i = 0; i < N; i++)
            NEED((float)words[i] == rintf(v[i]));
        for (int i = 0; i < N; i++)
            v[i] = fminf(fmaxf(v[i], -127.0f), 127.0f);
        i8_round(bytes, vf32_load(v));
        for (int i = 0; i < N; i++)
            NEED((float)bytes[i] == rintf(v[i]));
    }
}

static void pairs(void)
{
    static const int ends[] = {0, 1, -1, 127, -127, 32767, -32767};
    int *a = guarded(N * sizeof *a), *b = guarded(N * sizeof *b), *s = guarded(N * sizeof *s);
    signed char *bytes = guarded(2 * N);
    float v[4][N], out[N];
    for (int k = 0; k < 7 * 7 * 10; k++) {
        for (int i = 0; i < N; i++) {
            for (int j = 0; j < 4; j++) {
                v[j][i] = (float)(below(2 * 32767 + 1) - 32767);
                if (k < 7 * 7)
                    v[j][i] = (float)ends[((j % 2 ? k / 7 : k) + i) % 7];
                if (fabsf(v[j][i]) < 32767.0f)
                    v[j][i] += 0.25f * (float)(below(5) - 2);
            }
            s[i] = below(2000) - 1000;
        }
        i16_pairs(a, vf32_load(v[0]), vf32_load(v[1]));
        i16_pairs(b, vf32_load(v[2]), vf32_load(v[3]));
        for (int i = 0; i < N; i++) {
            NEED((float)(short)a[i] == rintf(v[0][i]) && (float)(a[i] >> 16) == rintf(v[1][i]));
            for (int j = 0; j < 4; j++)
                v[j][i] = rintf(v[j][i]);
        }
        vi32 sum = vi32_load(s);
        vpair_add_dot(&sum, vi32_splat(a[N - 1]), vpair_load(b));
        LANES(vi32_float(sum), out);
        for (int i = 0; i < N; i++) {
            const double sum = s[i] + (double)v[0][N - 1] * v[2][i] + (double)v[1][N - 1] * v[3][i];
            NEED(out[i] == (float)sum);
        }
        for (int i = 0; i < 2 * N; i++)
            bytes[i] = (signed char)(below(256) - 128);
        sum = vi32_load(s);
        vpair_add_dot(&sum, vi32_splat(a[0]), vpair_load_i8(bytes));
        LANES(vi32_float(sum), out);
        for (int i = 0; i < N; i++)
            NEED(out[i] == (float)(s[i] + (short)a[0] * bytes[2 * i]
                                   + (a[0] >> 16) * bytes[2 * i + 1]));
        sum = vi32_add(vi32_load(s), vi32_zero());
        LANES(vi32_float(vi32_add(sum, vi32_splat(a[0] >> 16))), out);
        for (int i = 0; i < N; i++)
            NEED(out[i] == (float)(s[i] + (a[0] >> 16)));
    }
    for (int i = 0; i < N; i++)
        v[0][i] = NAN;
    i16_pairs(a, vf32_load(v[0]), vf32_load(v[0]));
}

static void dots_of_bytes(void)
{
    signed char *a = guarded(VI8_LANES), *b = guarded(VI8_LANES);
    for (int k = 0; k < 200; k++) {
        vi32 sum = vi32_splat(k);
        int expected = k * N;
        for (int again = 0; again < 3; again++) {
            for (int i = 0; i < VI8_LANES; i++) {
                a[i] = (signed char)(k == 0 ? -128 : below(256) - 128);
                b[i] = (signed char)(k < 2 ? 127 : k == 2 ? -127 : below(255) - 127);
                expected += a[i] * b[i];
            }
            vi8_add_dot(&sum, vi8_load(a), vi8_load(b));
        }
        NEED(vi32_sum(sum) == expected);
    }
}

static void powers_of_two(void)
{
    static const float small[] = {0x1p-149f, -0x1.8p-126f, 0x1p-100f, 0.0f};
    static const float large[] = {1.0f, -1.5f, 0x1.555556p+5f, 3e38f, -INFINITY, NAN};
    float v[N], n[N], out[N];
    for (int power = -250; power <= 250; power++)
        for (int k = 0; k < 10; k++) {
            for (int i = 0; i < N; i++) {
                /* Adjacent lanes have other powers. Small numbers are not made smaller. */
                const int here = power + 3 * i > 250 ? power - 3 * i : power + 3 * i;
                n[i] = (float)here;
                v[i] = here >= 0 && k < 4 ? small[k] : large[k % 6];
            }
            EACH(vf32_scale_pow2(vf32_load(v), vf32_load(n)), (float)ldexp(v[i], (int)n[i]));
        }
    EACH(vf32_scale_pow2(vf32_splat(NAN), vf32_splat(NAN)), NAN);
}

static void across_lanes(void)
{
    float v[N], out[N];
    vf32 square[N];
    for (int place = 0; place < N; place++)
        for (int sign = -1; sign <= 1; sign += 2) {
            float sum = 0.0f;
            for (int i = 0; i < N; i++)
                sum += v[i] = (float)(i == place ? 40 * sign : 2 * i - 35);
            NEED(vf32_sum(vf32_load(v)) == sum);
            float largest = v[0];
            for (int i = 0; i < N; i++)
                largest = v[i] > largest ? v[i] : largest;
            NEED(vf32_largest(vf32_load(v)) == largest);
        }
    for (int i = 0; i < N; i++) {
        for (int j = 0; j < N; j++)
            v[j] = (float)(N * i + j);
        square[i] = vf32_load(v);
    }
    vf32_transpose(square);
    for (int j = 0; j < N; j++)
        EACH(square[j], (float)(N * i + j));
}

/* --- Integers -------------------------------------------------------------------------------- */

static int code_at(const unsigned char *row, int column)
{
    return row[column % 4] >> 2 * (column / 4) & 3;
}

static int trit_at(const unsigned char *row, int column)
{
    int number = 243 * row[column % 4] / 256;
    for (int i = column / 4; i < 4; i++)
        number /= 3;
    return number % 3;
}

/* The byte of five trits. */
static unsigned char trits(int number) { return (unsigned char)((256 * number + 242) / 243); }

static void packed_products(void)
{
    unsigned char *w = guarded(4 * VSUM_ROWS);
    signed char *x16 = guarded(16), *x20 = guarded(20);
    int *out = guarded(VSUM_ROWS * sizeof *out);
    for (int round = 0; round < 300; round++) {
        int expected[VSUM_ROWS] = {0};
        vpart part = vpart_zero();
        for (int tile = 0; tile < 8; tile++) {
            for (int i = 0; i < 4 * VSUM_ROWS; i++)
                w[i] = round % 4 == 0 ? 255 : (unsigned char)below(256);
            for (int i = 0; i < 16; i++)
                x16[i] = (signed char)(round == 0 ? 127 : round == 4 ? -127 : below(255) - 127);
            /* Four times -1 is a word of ones. */
            if (round % 2)
                memset(x16 + 4 * below(4), -1, 4);
            part = vpart_tile(part, w, vact_load(x16));
            for (int row = 0; row < VSUM_ROWS; row++)
                for (int i = 0; i < 16; i++)
                    expected[row] += code_at(w + 4 * row, i) * x16[i];
        }
        vsum_store(out, vsum_add(vsum_zero(), part));
        NEED(memcmp(out, expected, sizeof expected) == 0);
    }
    for (int round = 0; round < 300; round++) {
        int expected[VSUM_ROWS] = {0};
        vpart part = vpart_zero();
        for (int tile = 0; tile < 8; tile++) {
            for (int i = 0; i < 4 * VSUM_ROWS; i++)
                w[i] = trits(round % 4 == 0 ? 242 : round < 243 ? (round + i) % 243 : below(243));
            for (int i = 0; i < 20; i++)
                x20[i] = (signed char)(round == 0 ? 127 : round == 4 ? -127 : below(255) - 127);
            if (round % 2)
                memset(x20 + 4 * below(5), -1, 4);
            part = vpart_tile3(part, w, vact3_load(x20));
            for (int row = 0; row < VSUM_ROWS; row++)
                for (int i = 0; i < 20; i++)
                    expected[row] += trit_at(w + 4 * row, i) * x20[i];
        }
        vsum3_store(out, vsum_add(vsum_zero(), part));
        NEED(memcmp(out, expected, sizeof expected) == 0);
    }
}

/* --- Products in bfloat16 -------------------------------------------------------------------- */

#ifdef __AVX512BF16__

static float at(const bf16_operand *x, long line, long depth)
{
    const long place = line * x->line_stride + depth * x->depth_stride;
    const long row = x->transposed ? depth : line, column = x->transposed ? line : depth;
    if (!x->codes)
        return x->dense[place];
    return (float)x->codes[place] * x->scale[row * x->scale_row + column / x->group];
}

static bf16_operand floats(long lines, long depth, long line_stride, long depth_stride)
{
    bf16_operand x = {0};
    const long count = (lines - 1) * line_stride + (depth - 1) * depth_stride + 1;
    float *p = guarded(count * sizeof *p);
    for (long i = 0; i < count; i++)
        p[i] = (float)(below(9) - 4);
    x.dense = p;
    x.line_stride = line_stride;
    x.depth_stride = depth_stride;
    return x;
}

/* Codes whose rows run along the depth, or transposed, with `scales` scales per row. */
static bf16_operand codes(long lines, long depth, int transposed, int scales, long group)
{
    bf16_operand x = {0};
    const long rows = transposed ? depth : lines, cols = transposed ? lines : depth;
    signed char *p = guarded(rows * cols);
    float *scale = guarded(rows * scales * sizeof *scale);
    for (long i = 0; i < rows * cols; i++)
        p[i] = (signed char)(below(3) - 1);
    for (long i = 0; i < rows * scales; i++)
        scale[i] = (float)(1 << below(3));
    x.codes = p;
    x.scale = scale;
    x.scale_row = scales;
    x.group = group;
    x.transposed = transposed;
    x.line_stride = transposed ? 1 : cols;
    x.depth_stride = transposed ? cols : 1;
    return x;
}

/* Integers, so that nothing is rounded. */
static void one_product(long m, long n, long k, const bf16_operand *a, const bf16_operand *b,
                        int accumulate, float *workspace)
{
    float *c = guarded(m * n * sizeof *c), *bias = guarded(n * sizeof *bias);
    for (long j = 0; j < n; j++)
        bias[j] = (float)below(100);
    for (long i = 0; i < m * n; i++)
        c[i] = (float)(i % 7);
    bf16_product(m, n, k, a, b, 2.0f, bias, accumulate, c, n, workspace);
    for (long i = 0; i < m; i++)
        for (long j = 0; j < n; j++) {
            float sum = accumulate ? (float)((i * n + j) % 7) : bias[j];
            for (long d = 0; d < k; d++)
                sum += 2.0f * at(a, i, d) * at(b, j, d);
            NEED(c[i * n + j] == sum);
        }
}

static void bf16_products(void)
{
    static const long sizes[][3] = {{1, 1, 1}, {5, 18, 3}, {18, 5, 37}, {32, 32, 1024},
                                    {17, 40, 1100}};
    float *workspace = guarded(BF16_WORKSPACE * sizeof *workspace);
    memset(workspace, 0xa5, BF16_WORKSPACE * sizeof *workspace);
    for (int i = 0; i < 5; i++) {
        const long m = sizes[i][0], n = sizes[i][1], k = sizes[i][2];
        const bf16_operand rows = floats(m, k, k, 1), columns = floats(m, k, 1, m);
        const bf16_operand right = floats(n, k, k, 1), right_columns = floats(n, k, 1, n);
        one_product(m, n, k, &rows, &right_columns, 0, workspace);
        one_product(m, n, k, &columns, &right, 1, workspace);
        for (int transposed = 0; transposed < 2; transposed++) {
            const long cols = transposed ? n : k, group = (cols / 2 + 15) / 16 * 16;
            const bf16_operand one = codes(n, k, transposed, 1, cols);
            one_product(m, n, k, &rows, &one, transposed, workspace);
            if (group > 0 && group < cols) {
                const bf16_operand two = codes(n, k, transposed, 2, group);
                one_product(m, n, k, &rows, &two, transposed, workspace);
            }
        }
    }
}

#else

static void bf16_products(void) {}

#endif

/* --- The matrix unit ------------------------------------------------------------------------- */

#ifdef EMULATED_TILES

/* The padding of tiles and the contents of the workspace must have no effect. Rows are padded to a
 * multiple of 16. */
static void unit_sums(long rows, int form, long count, float *workspace)
{
    enum { STRIDE = (300 * TILE_TRITS + 64 + 63) / 64 * 64 };
    const int width = form ? TILE_TRITS : TILE_CODES;
    const long padded = (rows + 15) / 16 * 16 * STRIDE;
    unsigned char *strip = guarded(count * TILE_BYTES);
    signed char *x = guarded(padded);
    int *totals = guarded((rows + 31) / 32 * 32 * STRIP_ROWS * sizeof *totals);
    for (long i = 0; i < padded; i++)
        x[i] = (signed char)(below(255) - 127);
    for (long i = 0; i < count * TILE_BYTES; i++)
        strip[i] = form ? trits(below(243)) : (unsigned char)below(256);
    memset(workspace, 0xa5, BF16_WORKSPACE * sizeof *workspace);
    amx_packed_sums(strip, count, form, x, STRIDE, rows, totals, workspace);
    for (long t = 0; t < rows; t++)
        for (int row = 0; row < STRIP_ROWS; row++) {
            int sum = 0;
            for (long tile = 0; tile < count; tile++) {
                const unsigned char *w = strip + tile * TILE_BYTES + 4 * row;
                const signed char *here = x + t * STRIDE + tile * width;
                for (int i = 0; i < width; i++)
                    sum += here[i] * (form ? trit_at(w, i) : code_at(w, i));
            }
            NEED(totals[t * STRIP_ROWS + row] == sum);
        }
}

static void matrix_unit(void)
{
    static const long counts[] = {1, 3, 60, 256, 300};
    float *workspace = guarded(BF16_WORKSPACE * sizeof *workspace);
    fill_the_stack();
    amx_begin();
    for (int i = 0; i < 8; i++)
        NEED(tiles.rows[i] == AMX_SIDE && tiles.row_bytes[i] == 64);
    for (int form = 0; form < 2; form++)
        for (int i = 0; i < 5; i++) {
            unit_sums(16, form, counts[i], workspace);
            unit_sums(37, form, counts[i], workspace);
        }
}

#else

static void matrix_unit(void) {}

#endif

int main(void)
{
    simd_prepare();
    loads_and_stores();
    arithmetic();
    rounding();
    pairs();
    dots_of_bytes();
    powers_of_two();
    across_lanes();
    packed_products();
    bf16_products();
    matrix_unit();
    return wrong != 0;
}
