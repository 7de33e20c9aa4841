# cython: wraparound=False
"""All numerical kernels, written once with the vector operations of ``include/simd.h``.

This file is not a module of its own: ``setup.py`` compiles it once for each instruction set, as
``_kernels_scalar``, ``_kernels_sse2`` and so on, each with its own flags. All arrays are float32
and row-major unless a comment says otherwise; the callers in ``math_ops``, ``forward`` and
``backward`` have checked every size. Loops process whole vectors first and then the remaining
lanes once. They are written ``for i from 0 <= i < n by step`` because Cython turns ``range`` into a
C loop only if the sign of the step is known at compile time.
"""

from cpython.pycapsule cimport PyCapsule_New
from libc.math cimport INFINITY, fabsf, isnan, log, sqrtf
from libc.string cimport memcpy, memset

from legacy1bit.cpu import cache_sizes
from legacy1bit.kernels cimport (
    ACTIVATION_COLUMNS, CACHED_QUERIES, CODES_PER_BYTE, KEY_TILE, RELU, RELU2, SILU, STRIP_ROWS,
    TILE_BYTES, TILE_CODES, TILE_ROW_BYTES, TILE_TRITS, Attention, CachedHead, Int8Rows,
    KernelTable, Matrix, Operand, PackedMatrix, Rotary, Scheme, Update, strided,
)

cdef extern from "simd.h" nogil:
    ctypedef struct vf32:
        pass
    enum:
        VF32_LANES
        TILE_ROWS
        TILE_VECTORS
        TILE_COLUMNS
        PACK_RIGHT
        PACK_LEFT
    const char *TIER_NAME
    vf32 vf32_zero()
    vf32 vf32_splat(float x)
    vf32 vf32_load(const float *p)
    vf32 vf32_load_first(const float *p, long n)
    vf32 vf32_load_i8(const signed char *p)
    vf32 vf32_load_i8_first(const signed char *p, long n)
    void vf32_store(float *p, vf32 v)
    void vf32_store_first(float *p, long n, vf32 v)
    vf32 vf32_add(vf32 a, vf32 b)
    vf32 vf32_sub(vf32 a, vf32 b)
    vf32 vf32_mul(vf32 a, vf32 b)
    vf32 vf32_div(vf32 a, vf32 b)
    vf32 vf32_sqrt(vf32 v)
    vf32 vf32_fmadd(vf32 a, vf32 b, vf32 c)
    vf32 vf32_max(vf32 a, vf32 b)
    vf32 vf32_min(vf32 a, vf32 b)
    vf32 vf32_round(vf32 v)
    vf32 vf32_scale_pow2(vf32 v, vf32 n)
    vf32 vf32_where_positive(vf32 x, vf32 y)
    float vf32_sum(vf32 v)
    float vf32_largest(vf32 v)
    void vf32_transpose(vf32 *square)
    void i8_round(signed char *p, vf32 v)
    void i8_round4(signed char *p, const vf32 *v)
    void i16_round(short *p, vf32 v)
    ctypedef struct vi32:
        pass
    vi32 vi32_zero()
    vi32 vi32_splat(int x)
    vi32 vi32_load(const int *p)
    vi32 vi32_add(vi32 a, vi32 b)
    vf32 vi32_float(vi32 v)
    int vi32_sum(vi32 v)
    void i16_pairs(int *p, vf32 a, vf32 b)
    ctypedef struct vpair:
        pass
    vpair vpair_load(const int *p)
    void vpair_add_dot(vi32 *s, vi32 x, vpair v)
    enum:
        VI8_LANES
    ctypedef struct vi8:
        pass
    vi8 vi8_load(const signed char *p)
    void vi8_add_dot(vi32 *s, vi8 a, vi8 b)
    void simd_prepare()
    enum:
        VSUM_ROWS
        VSUM_TILES
        VSUM_AT_ONCE
        VPART_TILES
    ctypedef struct vsum:
        pass
    ctypedef struct vpart:
        pass
    ctypedef struct vact:
        pass
    ctypedef struct vact3:
        pass
    vsum vsum_zero()
    void vsum_store(int *p, vsum s)
    void vsum3_store(int *p, vsum s)
    vact vact_load(const signed char *x)
    vact3 vact3_load(const signed char *x)
    vpart vpart_zero()
    vsum vsum_add(vsum s, vpart part)
    vpart vpart_tile(vpart part, const unsigned char *w, vact x)
    vpart vpart_tile3(vpart part, const unsigned char *w, vact3 x)
    void vpart_rows(vpart *part, const unsigned char *w, const signed char *x, long stride)
    void vpart_rows3(vpart *part, const unsigned char *w, const signed char *x, long stride)
    void vpart_sort(vpart *part)
    void prefetch(const void *p)
    void prefetch_tile(const unsigned char *tile)
    ctypedef struct bf16_operand:
        const float *dense
        long line_stride
        long depth_stride
        const signed char *codes
        const float *scale
        long scale_row
        long group
        int transposed
    enum:
        BF16_PRODUCTS
        BF16_WORKSPACE
        MATRIX_UNIT
        AMX_MIN_ROWS
    void bf16_product(long m, long n, long k, const bf16_operand *a, const bf16_operand *b,
                      float factor, const float *bias, int accumulate, float *c, long c_row,
                      float *workspace)
    void amx_begin()
    void amx_end()
    void amx_packed_sums(const unsigned char *strip, long tiles, int trits, const signed char *x,
                         long stride, long rows, int *totals, float *workspace)

cdef extern from "elementwise.h" nogil:
    ctypedef vf32 (*unary_lanes)(vf32 x) noexcept
    ctypedef vf32 (*binary_lanes)(vf32 x, vf32 y) noexcept
    void elementwise_unary(float *out, const float *x, long n, unary_lanes f)
    void elementwise_scalar(float *out, const float *x, float scalar, long n, binary_lanes f)
    void elementwise_binary(float *out, const float *x, const float *y, long n, binary_lanes f)
    void elementwise_gate(float *out, const float *gate, const float *x, long n, unary_lanes f)
    void elementwise_gate_backward(float *d_gate, float *d_x, const float *gate, const float *x,
                                   const float *d_out, long n, unary_lanes f,
                                   binary_lanes backward)

cdef extern from "sums.h" nogil:
    vf32 load_within(const float *p, long left)
    float ordered_sum(const float *x, long n)
    float ordered_squares(const float *x, float center, long n)
    void layer_norm_float64(const float *x, const float *gamma, const float *beta, float epsilon,
                            float *out, float *mean, float *inv_std, long n)

cdef extern from "cache.h" nogil:
    enum:
        MOST_SUM
        MOST_LEVELS
    ctypedef struct cached_pairs:
        const signed char *data
        long pair, block
    void cached_product(const cached_pairs *m, const short *a, long a_row, long pairs,
                        long columns, float *out, long out_row, long queries)

cdef extern from "peak.h" nogil:
    enum:
        PEAK_SUMS
        PEAK_PRODUCTS
    void peak_of_dots(long rounds)

cdef extern from "measure.h" nogil:
    ctypedef struct timer_counter:
        unsigned long long calls
        unsigned long long nanoseconds
    enum:
        MEASURING
        TIMER_COUNT
        TIMER_MATMUL
        TIMER_MATRIX_VECTOR
        TIMER_PACKED
        TIMER_ATTENTION_FORWARD
        TIMER_ATTENTION_BACKWARD
        TIMER_LAYER_NORM_FORWARD
        TIMER_LAYER_NORM_BACKWARD
        TIMER_ROTARY
        TIMER_ACTIVATION
        TIMER_SOFTMAX
        TIMER_CROSS_ENTROPY
        TIMER_QUANTIZE
        TIMER_OPTIMIZER
        TIMER_VECTOR
    void START_TIMER(int timer)
    void STOP_TIMER(int timer)
    timer_counter timer_read(int timer)
    const char *timer_label "timer_name"(int timer)

ctypedef fused weight:
    float
    signed char


# ---------------------------------------------------------------------------------------------
# Elements and vectors

cdef inline vf32 load_weights(const weight *p) noexcept nogil:
    if weight is float:
        return vf32_load(p)
    else:
        return vf32_load_i8(p)


cdef inline vf32 load_first_weights(const weight *p, Py_ssize_t n) noexcept nogil:
    if weight is float:
        return vf32_load_first(p, n)
    else:
        return vf32_load_i8_first(p, n)


cdef inline vf32 exp_lanes(vf32 x) noexcept nogil:
    # exp(x) = 2^n exp(r), n = round(x / ln 2), |r| <= ln(2) / 2. ln 2 is subtracted in two parts,
    # the first short enough that n times it is exact. The Taylor series stops after r^7: its
    # truncation error is below 0.35^8 / 8! = 6e-9 of the result, a tenth of a float32 rounding.
    # Below -104 the result rounds to 0, above 89 to infinity; NaN passes through the comparisons.
    # There is no fused multiply-add, so that all instruction sets agree.
    cdef vf32 n, r, p
    x = vf32_min(vf32_splat(89.0), vf32_max(vf32_splat(-104.0), x))
    n = vf32_round(vf32_mul(x, vf32_splat(1.44269504)))
    r = vf32_add(vf32_mul(n, vf32_splat(-0.693359375)), x)
    r = vf32_add(vf32_mul(n, vf32_splat(2.12194440e-4)), r)
    p = vf32_splat(1.0 / 5040)
    p = vf32_add(vf32_mul(p, r), vf32_splat(1.0 / 720))
    p = vf32_add(vf32_mul(p, r), vf32_splat(1.0 / 120))
    p = vf32_add(vf32_mul(p, r), vf32_splat(1.0 / 24))
    p = vf32_add(vf32_mul(p, r), vf32_splat(1.0 / 6))
    p = vf32_add(vf32_mul(p, r), vf32_splat(0.5))
    p = vf32_add(vf32_mul(p, r), vf32_splat(1.0))
    p = vf32_add(vf32_mul(p, r), vf32_splat(1.0))
    return vf32_scale_pow2(p, n)


cdef inline void store_within(float *p, Py_ssize_t n, vf32 v) noexcept nogil:
    # The lanes of v that are among n floats at p; load_within reads them.
    if n >= VF32_LANES:
        vf32_store(p, v)
    elif n > 0:
        vf32_store_first(p, n, v)


cdef void add(float *x, const float *y, Py_ssize_t n) noexcept nogil:
    START_TIMER(TIMER_VECTOR)
    elementwise_binary(x, x, y, n, vf32_add)
    STOP_TIMER(TIMER_VECTOR)


cdef void add_scaled(float *x, float scale, const float *y, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i, whole = n - n % VF32_LANES
    cdef vf32 s = vf32_splat(scale)
    for i from 0 <= i < whole by VF32_LANES:
        vf32_store(x + i, vf32_fmadd(s, vf32_load(y + i), vf32_load(x + i)))
    if whole < n:
        vf32_store_first(x + whole, n - whole,
                         vf32_fmadd(s, vf32_load_first(y + whole, n - whole),
                                    vf32_load_first(x + whole, n - whole)))


cdef void multiply(float *x, const float *y, Py_ssize_t n) noexcept nogil:
    elementwise_binary(x, x, y, n, vf32_mul)


cdef void scale(float *x, float factor, Py_ssize_t n) noexcept nogil:
    elementwise_scalar(x, x, factor, n, vf32_mul)


cdef void shift(float *x, float offset, Py_ssize_t n) noexcept nogil:
    elementwise_scalar(x, x, offset, n, vf32_add)


cdef void divide(float *x, float divisor, Py_ssize_t n) noexcept nogil:
    elementwise_scalar(x, x, divisor, n, vf32_div)


cdef void exponential(float *x, Py_ssize_t n) noexcept nogil:
    elementwise_unary(x, x, n, exp_lanes)


cdef float sum(const float *x, Py_ssize_t n) noexcept nogil:
    return ordered_sum(x, n)


cdef inline float weighted_sum(const weight *w, const float *x, Py_ssize_t n) noexcept nogil:
    # Two accumulators, so that additions do not wait for each other.
    cdef Py_ssize_t i = 0, whole = n - n % VF32_LANES
    cdef vf32 even = vf32_zero(), odd = vf32_zero()
    while i + 2 * VF32_LANES <= n:
        even = vf32_fmadd(load_weights(w + i), vf32_load(x + i), even)
        odd = vf32_fmadd(load_weights(w + i + VF32_LANES), vf32_load(x + i + VF32_LANES), odd)
        i += 2 * VF32_LANES
    if i < whole:
        even = vf32_fmadd(load_weights(w + i), vf32_load(x + i), even)
    if whole < n:
        odd = vf32_fmadd(load_first_weights(w + whole, n - whole),
                         vf32_load_first(x + whole, n - whole), odd)
    return vf32_sum(vf32_add(even, odd))


cdef float dot(const float *x, const float *y, Py_ssize_t n) noexcept nogil:
    return weighted_sum(x, y, n)


cdef double sum_of_squares(const float *x, Py_ssize_t n) noexcept nogil:
    # Blocks of 1,024 elements are summed in float64: gradients have millions of elements.
    cdef Py_ssize_t start
    cdef double total = 0.0
    for start from 0 <= start < n by 1024:
        total += weighted_sum(x + start, x + start, min(n - start, 1024))
    return total


cdef void column_sums(const float *x, Py_ssize_t rows, Py_ssize_t cols,
                      float *sums) noexcept nogil:
    # sums[j] += x[0, j] + ... + x[rows - 1, j]
    cdef Py_ssize_t i
    for i in range(rows):
        add(sums, x + i * cols, cols)


# ---------------------------------------------------------------------------------------------
# Activations

# SiLU: Elfwing et al., arXiv 1702.03118, equation 4. GELU in its form with tanh: Hendrycks and
# Gimpel, arXiv 1606.08415, section 2. Gates: Shazeer, arXiv 2002.05202. All instruction sets agree
# in the forward pass.

cdef inline vf32 relu_lanes(vf32 x) noexcept nogil:
    return vf32_where_positive(x, x)


cdef inline vf32 relu2_lanes(vf32 x) noexcept nogil:
    return vf32_where_positive(x, vf32_mul(x, x))


cdef inline vf32 relu2_backward_lanes(vf32 x, vf32 d_out) noexcept nogil:
    return vf32_where_positive(x, vf32_mul(vf32_add(x, x), d_out))


cdef inline vf32 sigmoid_times(vf32 x, vf32 y) noexcept nogil:
    # y / (1 + exp(-x)); the exponential is that of -|x|, which cannot overflow.
    cdef vf32 minus = vf32_sub(vf32_zero(), x)
    cdef vf32 e = exp_lanes(vf32_min(minus, x))
    cdef vf32 below = vf32_sub(vf32_splat(1.0), vf32_where_positive(x, vf32_splat(1.0)))
    # 1 where x is positive, else e; NaN is in e.
    cdef vf32 weight = vf32_add(vf32_where_positive(x, vf32_splat(1.0)), vf32_mul(below, e))
    return vf32_div(vf32_mul(y, weight), vf32_add(vf32_splat(1.0), e))


cdef inline vf32 silu_lanes(vf32 x) noexcept nogil:
    return sigmoid_times(x, x)


cdef inline vf32 silu_backward_lanes(vf32 x, vf32 d_out) noexcept nogil:
    # With s = sigmoid(x): s (1 + x (1 - s)) = s + silu(x) sigmoid(-x).
    cdef vf32 s = sigmoid_times(x, vf32_splat(1.0))
    cdef vf32 rest = sigmoid_times(vf32_sub(vf32_zero(), x), sigmoid_times(x, x))
    return vf32_mul(d_out, vf32_add(s, rest))


cdef inline vf32 gelu_slope(vf32 x) noexcept nogil:
    # u = 2 sqrt(2 / pi) (x + 0.044715 x^3), of which tanh(u / 2) = 2 sigmoid(u) - 1. Beyond 13,
    # where u is 177, sigmoid(u) is 0 or 1 in float32, whatever it is multiplied by.
    cdef vf32 near = vf32_min(vf32_splat(13.0), vf32_max(vf32_splat(-13.0), x))
    cdef vf32 cube = vf32_mul(vf32_mul(near, near), vf32_mul(near, vf32_splat(0.044715)))
    return vf32_mul(vf32_splat(1.5957691216057308), vf32_add(near, cube))


cdef inline vf32 gelu_lanes(vf32 x) noexcept nogil:
    return sigmoid_times(gelu_slope(x), x)


cdef inline vf32 gelu_backward_lanes(vf32 x, vf32 d_out) noexcept nogil:
    # With s = sigmoid(u): s + x s (1 - s) du / dx.
    cdef vf32 near = vf32_min(vf32_splat(13.0), vf32_max(vf32_splat(-13.0), x))
    cdef vf32 u = gelu_slope(x)
    cdef vf32 s = sigmoid_times(u, vf32_splat(1.0))
    cdef vf32 rise = vf32_mul(vf32_mul(near, near), vf32_splat(0.134145))
    rise = vf32_mul(vf32_splat(1.5957691216057308), vf32_add(vf32_splat(1.0), rise))
    rise = vf32_mul(vf32_mul(near, rise), sigmoid_times(vf32_sub(vf32_zero(), u), s))
    return vf32_mul(d_out, vf32_add(s, rise))


cdef void activate(int activation, const float *x, float *out, Py_ssize_t n) noexcept nogil:
    START_TIMER(TIMER_ACTIVATION)
    if activation == RELU2:
        elementwise_unary(out, x, n, relu2_lanes)
    elif activation == RELU:
        elementwise_unary(out, x, n, relu_lanes)
    elif activation == SILU:
        elementwise_unary(out, x, n, silu_lanes)
    else:
        elementwise_unary(out, x, n, gelu_lanes)
    STOP_TIMER(TIMER_ACTIVATION)


cdef void activate_backward(int activation, const float *x, const float *d_out, float *d_x,
                            Py_ssize_t n) noexcept nogil:
    START_TIMER(TIMER_ACTIVATION)
    if activation == RELU2:
        elementwise_binary(d_x, x, d_out, n, relu2_backward_lanes)
    elif activation == RELU:
        elementwise_binary(d_x, x, d_out, n, vf32_where_positive)
    elif activation == SILU:
        elementwise_binary(d_x, x, d_out, n, silu_backward_lanes)
    else:
        elementwise_binary(d_x, x, d_out, n, gelu_backward_lanes)
    STOP_TIMER(TIMER_ACTIVATION)


cdef void gate(int activation, const float *gate, const float *x, float *out,
               Py_ssize_t n) noexcept nogil:
    # out = act(gate) * x; out may be either.
    START_TIMER(TIMER_ACTIVATION)
    if activation == RELU2:
        elementwise_gate(out, gate, x, n, relu2_lanes)
    elif activation == RELU:
        elementwise_gate(out, gate, x, n, relu_lanes)
    elif activation == SILU:
        elementwise_gate(out, gate, x, n, silu_lanes)
    else:
        elementwise_gate(out, gate, x, n, gelu_lanes)
    STOP_TIMER(TIMER_ACTIVATION)


cdef void gate_backward(int activation, const float *gate, const float *x, const float *d_out,
                        float *d_gate, float *d_x, Py_ssize_t n) noexcept nogil:
    # d_gate = d_out * x * act'(gate); d_x = d_out * act(gate). Either may be d_out.
    START_TIMER(TIMER_ACTIVATION)
    if activation == RELU2:
        elementwise_gate_backward(d_gate, d_x, gate, x, d_out, n, relu2_lanes,
                                  relu2_backward_lanes)
    elif activation == RELU:
        elementwise_gate_backward(d_gate, d_x, gate, x, d_out, n, relu_lanes, vf32_where_positive)
    elif activation == SILU:
        elementwise_gate_backward(d_gate, d_x, gate, x, d_out, n, silu_lanes, silu_backward_lanes)
    else:
        elementwise_gate_backward(d_gate, d_x, gate, x, d_out, n, gelu_lanes, gelu_backward_lanes)
    STOP_TIMER(TIMER_ACTIVATION)


# ---------------------------------------------------------------------------------------------
# Softmax and cross entropy

cdef float largest(const float *x, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i, whole = n - n % VF32_LANES
    cdef vf32 best = vf32_splat(-INFINITY)
    cdef float top
    for i from 0 <= i < whole by VF32_LANES:
        best = vf32_max(best, vf32_load(x + i))
    top = vf32_largest(best)
    for i in range(whole, n):
        top = x[i] if x[i] > top else top
    return top


cdef Py_ssize_t select(const float *x, Py_ssize_t n, float bound, int *indices) noexcept nogil:
    # Writes the indices of the elements that are not below the bound, and returns their number.
    # Fast if there are few: blocks without any are skipped at once.
    cdef Py_ssize_t start, i, count = 0
    for start from 0 <= start < n by 64:
        if largest(x + start, min(n - start, 64)) < bound:
            continue
        for i in range(start, min(start + 64, n)):
            if x[i] >= bound:
                indices[count] = <int>i
                count += 1
    return count


cdef inline float exponentials(float *x, Py_ssize_t n, float top, float factor) noexcept nogil:
    # x[i] = exp(factor * (x[i] - top)); returns their sum.
    cdef Py_ssize_t i, whole = n - n % VF32_LANES
    cdef vf32 e, t = vf32_splat(top), f = vf32_splat(factor)
    for i from 0 <= i < whole by VF32_LANES:
        e = exp_lanes(vf32_mul(f, vf32_sub(vf32_load(x + i), t)))
        vf32_store(x + i, e)
    if whole < n:
        e = exp_lanes(vf32_mul(f, vf32_sub(vf32_load_first(x + whole, n - whole), t)))
        vf32_store_first(x + whole, n - whole, e)
    return ordered_sum(x, n)


cdef inline void softmax_row(float *x, Py_ssize_t n, float factor) noexcept nogil:
    # softmax(factor * x), factor > 0. A row of only -infinity has no distribution: zeros.
    cdef float top = largest(x, n), total
    cdef Py_ssize_t i
    if top == -INFINITY:
        total = sum(x, n)
        for i in range(n):
            x[i] = total if isnan(total) else 0.0
    else:
        scale(x, 1.0 / exponentials(x, n, top, factor), n)


cdef void softmax(float *x, Py_ssize_t rows, Py_ssize_t cols) noexcept nogil:
    cdef Py_ssize_t i
    START_TIMER(TIMER_SOFTMAX)
    for i in range(rows):
        softmax_row(x + i * cols, cols, 1.0)
    STOP_TIMER(TIMER_SOFTMAX)


cdef double cross_entropy(float *logits, const int *targets, Py_ssize_t rows, Py_ssize_t cols,
                          float gradient_scale) noexcept nogil:
    # The sum of -log softmax(logits)[target] over the rows whose target is >= 0; each row becomes
    # gradient_scale * (softmax - one_hot(target)), or zeros where the target is negative.
    cdef Py_ssize_t i
    cdef float *row
    cdef float top, total, goal
    cdef double loss = 0.0
    START_TIMER(TIMER_CROSS_ENTROPY)
    for i in range(rows):
        row = logits + i * cols
        if targets[i] < 0:
            memset(row, 0, cols * sizeof(float))
            continue
        goal = row[targets[i]]
        top = largest(row, cols)
        total = exponentials(row, cols, top, 1.0)
        loss += log(<double>total) + (<double>top - <double>goal)
        scale(row, gradient_scale / total, cols)
        row[targets[i]] -= gradient_scale
    STOP_TIMER(TIMER_CROSS_ENTROPY)
    return loss


# ---------------------------------------------------------------------------------------------
# Layer norm (Ba, Kiros & Hinton, arXiv 1607.06450, equation 4), and, where `mean` is NULL, RMS norm
# (Zhang & Sennrich, arXiv 1910.07467, equation 4), whose mean is 0. `beta` may be NULL.

cdef void layer_norm(const float *x, const float *gamma, const float *beta, float epsilon,
                     float *out, float *mean, float *inv_std,
                     Py_ssize_t rows, Py_ssize_t cols) noexcept nogil:
    # out = gamma * (x - mean) * inv_std + beta by rows; out may be x. All instruction sets agree.
    cdef Py_ssize_t i, j, whole = cols - cols % VF32_LANES, left = cols - whole
    cdef const float *row
    cdef float *to
    cdef vf32 center, factor, d
    cdef float row_mean, deviation, spread
    START_TIMER(TIMER_LAYER_NORM_FORWARD)
    for i in range(rows):
        row = x + i * cols
        to = out + i * cols
        row_mean = sum(row, cols) / cols if mean else 0.0
        deviation = sqrtf(ordered_squares(row, row_mean, cols) / cols + epsilon)
        # A mean of up to 1,000 standard deviations is exact enough. NaN fails the comparisons.
        if not (fabsf(row_mean) <= <float>1e3 * deviation and deviation < INFINITY):
            layer_norm_float64(row, gamma, beta, epsilon, to, mean + i if mean else NULL,
                               inv_std + i, cols)
            continue
        center = vf32_splat(row_mean)
        spread = 1.0 / deviation
        if mean:
            mean[i] = row_mean
        inv_std[i] = spread
        factor = vf32_splat(spread)
        for j from 0 <= j < whole by VF32_LANES:
            d = vf32_mul(vf32_sub(vf32_load(row + j), center), factor)
            d = vf32_mul(d, vf32_load(gamma + j))
            vf32_store(to + j, vf32_add(d, vf32_load(beta + j)) if beta else d)
        if left:
            d = vf32_mul(vf32_sub(vf32_load_first(row + whole, left), center), factor)
            d = vf32_mul(d, vf32_load_first(gamma + whole, left))
            if beta:
                d = vf32_add(d, vf32_load_first(beta + whole, left))
            vf32_store_first(to + whole, left, d)
    STOP_TIMER(TIMER_LAYER_NORM_FORWARD)


cdef void layer_norm_backward(const float *d_out, const float *x, const float *gamma,
                              const float *mean, const float *inv_std,
                              float *d_x, float *d_gamma, float *d_beta,
                              Py_ssize_t rows, Py_ssize_t cols) noexcept nogil:
    # With x^ = (x - mean) * inv_std and g = d_out * gamma:
    #   d_x     += inv_std * (g - mean(g) - x^ * mean(g * x^))
    #   d_gamma += d_out * x^,  d_beta += d_out, unless it is NULL
    # RMS norm has x^ = x * inv_std, and no mean(g).
    # x^ is computed as (x / 2 - mean / 2) * (2 inv_std): half a difference cannot overflow.
    cdef Py_ssize_t i, j, whole = cols - cols % VF32_LANES, left = cols - whole
    cdef const float *dy
    cdef const float *row
    cdef float *dx
    cdef float last[VF32_LANES]
    cdef vf32 half = vf32_splat(0.5), center, last_center = vf32_zero(), factor, wide, hat
    cdef vf32 d, g, sum_g, sum_gx, mean_g, mean_gx
    START_TIMER(TIMER_LAYER_NORM_BACKWARD)
    for i in range(rows):
        dy = d_out + i * cols
        row = x + i * cols
        dx = d_x + i * cols
        center = vf32_splat(<float>-0.5 * mean[i] if mean else <float>0.0)
        factor = vf32_splat(inv_std[i])
        wide = vf32_add(factor, factor)
        if left:
            vf32_store(last, center)
            last_center = vf32_load_first(last, left)
        sum_g = vf32_zero()
        sum_gx = vf32_zero()
        for j from 0 <= j < whole by VF32_LANES:
            hat = vf32_mul(vf32_fmadd(half, vf32_load(row + j), center), wide)
            d = vf32_load(dy + j)
            vf32_store(d_gamma + j, vf32_fmadd(d, hat, vf32_load(d_gamma + j)))
            if d_beta:
                vf32_store(d_beta + j, vf32_add(d, vf32_load(d_beta + j)))
            g = vf32_mul(d, vf32_load(gamma + j))
            sum_g = vf32_add(sum_g, g)
            sum_gx = vf32_fmadd(g, hat, sum_gx)
        if left:
            # Lanes that are not loaded have d = 0 and x^ = 0, so they add nothing to either sum.
            hat = vf32_mul(vf32_fmadd(half, vf32_load_first(row + whole, left), last_center), wide)
            d = vf32_load_first(dy + whole, left)
            vf32_store_first(d_gamma + whole, left,
                             vf32_fmadd(d, hat, vf32_load_first(d_gamma + whole, left)))
            if d_beta:
                vf32_store_first(d_beta + whole, left,
                                 vf32_add(d, vf32_load_first(d_beta + whole, left)))
            g = vf32_mul(d, vf32_load_first(gamma + whole, left))
            sum_g = vf32_add(sum_g, g)
            sum_gx = vf32_fmadd(g, hat, sum_gx)
        mean_g = vf32_splat(vf32_sum(sum_g) / cols if mean else <float>0.0)
        mean_gx = vf32_splat(vf32_sum(sum_gx) / cols)
        for j from 0 <= j < whole by VF32_LANES:
            hat = vf32_mul(vf32_fmadd(half, vf32_load(row + j), center), wide)
            g = vf32_sub(vf32_mul(vf32_load(dy + j), vf32_load(gamma + j)), mean_g)
            g = vf32_sub(g, vf32_mul(hat, mean_gx))
            vf32_store(dx + j, vf32_fmadd(g, factor, vf32_load(dx + j)))
        if left:
            hat = vf32_mul(vf32_fmadd(half, vf32_load_first(row + whole, left), last_center), wide)
            g = vf32_sub(vf32_mul(vf32_load_first(dy + whole, left),
                                  vf32_load_first(gamma + whole, left)), mean_g)
            g = vf32_sub(g, vf32_mul(hat, mean_gx))
            vf32_store_first(dx + whole, left,
                             vf32_fmadd(g, factor, vf32_load_first(dx + whole, left)))
    STOP_TIMER(TIMER_LAYER_NORM_BACKWARD)


# ---------------------------------------------------------------------------------------------
# Rotary positions (Su et al., arXiv 2104.09864, equation 34)

cdef void rotary(const Rotary *table, Py_ssize_t position, float direction, float *x,
                 Py_ssize_t rows, Py_ssize_t stride, Py_ssize_t heads,
                 Py_ssize_t head_dim) noexcept nogil:
    # Rotates the pairs of row t by direction * (the angle of position + t); direction is 1 in the
    # forward pass and -1 in the backward pass.
    cdef Py_ssize_t t, h, half = table.dim // 2
    cdef const float *cosines = table.cosines + position * half
    cdef const float *sines = table.sines + position * half
    START_TIMER(TIMER_ROTARY)
    for t in range(rows):
        for h in range(heads):
            if table.adjacent:
                rotate_adjacent(x + t * stride + h * head_dim, cosines + t * half,
                                sines + t * half, direction, half)
            else:
                rotate_halves(x + t * stride + h * head_dim, cosines + t * half, sines + t * half,
                              direction, half)
    STOP_TIMER(TIMER_ROTARY)


cdef inline void rotate_halves(float *low, const float *cosines, const float *sines,
                               float direction, Py_ssize_t half) noexcept nogil:
    cdef Py_ssize_t i, whole = half - half % VF32_LANES, left = half - whole
    cdef float *high = low + half
    cdef vf32 a, b, c, s, sign = vf32_splat(direction)
    for i from 0 <= i < whole by VF32_LANES:
        a = vf32_load(low + i)
        b = vf32_load(high + i)
        c = vf32_load(cosines + i)
        s = vf32_mul(sign, vf32_load(sines + i))
        vf32_store(low + i, vf32_sub(vf32_mul(a, c), vf32_mul(b, s)))
        vf32_store(high + i, vf32_add(vf32_mul(a, s), vf32_mul(b, c)))
    if left:
        a = vf32_load_first(low + whole, left)
        b = vf32_load_first(high + whole, left)
        c = vf32_load_first(cosines + whole, left)
        s = vf32_mul(sign, vf32_load_first(sines + whole, left))
        vf32_store_first(low + whole, left, vf32_sub(vf32_mul(a, c), vf32_mul(b, s)))
        vf32_store_first(high + whole, left, vf32_add(vf32_mul(a, s), vf32_mul(b, c)))


cdef inline void rotate_adjacent(float *x, const float *cosines, const float *sines,
                                 float direction, Py_ssize_t half) noexcept nogil:
    cdef Py_ssize_t i
    cdef float a, b, s
    for i in range(half):
        a = x[2 * i]
        b = x[2 * i + 1]
        s = direction * sines[i]
        x[2 * i] = a * cosines[i] - b * s
        x[2 * i + 1] = a * s + b * cosines[i]


# ---------------------------------------------------------------------------------------------
# Matrix times vector

cdef inline float scale_at(const Matrix *matrix, Py_ssize_t row, Py_ssize_t col) noexcept nogil:
    if matrix.codes == NULL:
        return 1.0
    if matrix.scale_row <= 1:
        return matrix.scale[row * matrix.scale_row]
    return matrix.scale[row * matrix.scale_row + col // matrix.group]


cdef inline void rows_times_vector(const weight *w, const Matrix *matrix, Py_ssize_t first,
                                   Py_ssize_t count, const float *x, float *out) noexcept nogil:
    # out[rows] += matrix[:, first:first + count] x[first:first + count], columns with the same
    # scales. Four rows share every load of x.
    cdef Py_ssize_t i = 0, j, cols = matrix.cols, whole = count - count % VF32_LANES
    cdef Py_ssize_t left = count - whole
    cdef const weight *r
    cdef vf32 v, s0, s1, s2, s3
    x += first
    w += first
    while i + 4 <= matrix.rows:
        r = w + i * cols
        s0 = s1 = s2 = s3 = vf32_zero()
        for j from 0 <= j < whole by VF32_LANES:
            v = vf32_load(x + j)
            s0 = vf32_fmadd(load_weights(r + j), v, s0)
            s1 = vf32_fmadd(load_weights(r + cols + j), v, s1)
            s2 = vf32_fmadd(load_weights(r + 2 * cols + j), v, s2)
            s3 = vf32_fmadd(load_weights(r + 3 * cols + j), v, s3)
        if left:
            v = vf32_load_first(x + whole, left)
            s0 = vf32_fmadd(load_first_weights(r + whole, left), v, s0)
            s1 = vf32_fmadd(load_first_weights(r + cols + whole, left), v, s1)
            s2 = vf32_fmadd(load_first_weights(r + 2 * cols + whole, left), v, s2)
            s3 = vf32_fmadd(load_first_weights(r + 3 * cols + whole, left), v, s3)
        out[i] += scale_at(matrix, i, first) * vf32_sum(s0)
        out[i + 1] += scale_at(matrix, i + 1, first) * vf32_sum(s1)
        out[i + 2] += scale_at(matrix, i + 2, first) * vf32_sum(s2)
        out[i + 3] += scale_at(matrix, i + 3, first) * vf32_sum(s3)
        i += 4
    while i < matrix.rows:
        out[i] += scale_at(matrix, i, first) * weighted_sum(w + i * cols, x, count)
        i += 1


cdef void matrix_vector(const Matrix *matrix, const float *x, float *out) noexcept nogil:
    # out[rows] = matrix[rows, cols] x[cols]
    cdef Py_ssize_t first
    START_TIMER(TIMER_MATRIX_VECTOR)
    memset(out, 0, matrix.rows * sizeof(float))
    if matrix.codes:
        for first from 0 <= first < matrix.cols by matrix.group:
            rows_times_vector(matrix.codes, matrix, first, min(matrix.group, matrix.cols - first),
                              x, out)
    else:
        rows_times_vector(matrix.dense, matrix, 0, matrix.cols, x, out)
    STOP_TIMER(TIMER_MATRIX_VECTOR)


cdef inline void add_row(const signed char *w, Py_ssize_t cols, float factor,
                         float *out) noexcept nogil:
    # out += factor * w
    cdef Py_ssize_t j, whole = cols - cols % VF32_LANES
    cdef vf32 v = vf32_splat(factor)
    for j from 0 <= j < whole by VF32_LANES:
        vf32_store(out + j, vf32_fmadd(vf32_load_i8(w + j), v, vf32_load(out + j)))
    if whole < cols:
        vf32_store_first(out + whole, cols - whole,
                         vf32_fmadd(vf32_load_i8_first(w + whole, cols - whole), v,
                                    vf32_load_first(out + whole, cols - whole)))


cdef void matrix_transpose_vector(const Matrix *matrix, const float *x,
                                  float *out) noexcept nogil:
    # out[cols] = matrix[rows, cols]^T x[rows], for a matrix of codes.
    cdef Py_ssize_t i, first
    START_TIMER(TIMER_MATRIX_VECTOR)
    memset(out, 0, matrix.cols * sizeof(float))
    for i in range(matrix.rows):
        for first from 0 <= first < matrix.cols by matrix.group:
            add_row(matrix.codes + i * matrix.cols + first,
                    min(matrix.group, matrix.cols - first), x[i] * scale_at(matrix, i, first),
                    out + first)
    STOP_TIMER(TIMER_MATRIX_VECTOR)


# ---------------------------------------------------------------------------------------------
# Matrix times matrix
#
# The algorithm of Goto & van de Geijn (ACM TOMS 34(3), 2008): panels of both matrices are packed so
# that the inner loop reads memory sequentially, and a tile of the result stays in registers.

cdef enum:
    TILE_GROUPS = (TILE_ROWS + 2) / 3       # groups of three rows
    TRANSPOSED_ROWS = 16                    # packed together, to stay in the L1 cache


cdef struct Panels:
    # The sizes of what is packed: depth x columns of the right-hand matrix, rows x depth of the
    # left-hand one. They are multiples of a tile's and do not change a bit of the product.
    Py_ssize_t depth
    Py_ssize_t rows
    Py_ssize_t columns


cdef Panels panels_for(Py_ssize_t l1_bytes, Py_ssize_t l2_bytes) noexcept:
    # A tile's columns of the right-hand panel take half of the L1 cache, the left-hand panel a
    # quarter of the L2 cache, which the right-hand panel shares where it is large enough (Low et
    # al., "Analytical modeling is enough for high-performance BLIS", ACM TOMS 43(2), 2016).
    cdef Panels p
    p.depth = l1_bytes // (2 * <Py_ssize_t>sizeof(float) * TILE_COLUMNS) // 64 * 64
    p.depth = max(256, min(p.depth, 384))
    p.rows = min(l2_bytes // (4 * <Py_ssize_t>sizeof(float)), <Py_ssize_t>PACK_LEFT) // p.depth
    p.rows = max(p.rows // TILE_ROWS, 1) * TILE_ROWS
    p.columns = PACK_RIGHT // p.depth // TILE_COLUMNS * TILE_COLUMNS
    return p


cdef Py_ssize_t l1_bytes, l2_bytes
l1_bytes, l2_bytes = cache_sizes()
cdef Panels panels = panels_for(l1_bytes, l2_bytes)


cdef inline void multiply_tile(Py_ssize_t depth, const float *a, const float *b,
                               const float *start, float *c, Py_ssize_t c_row) noexcept nogil:
    # c[TILE_ROWS, TILE_COLUMNS] = start + a b, where every row starts from `start`, or from c
    # itself if start is NULL. a is packed [depth, TILE_ROWS], b [depth, TILE_COLUMNS]. The trip
    # counts are constants: the compiler unrolls the tile and keeps it in registers.
    cdef vf32 total[TILE_ROWS][TILE_VECTORS]
    cdef vf32 right[TILE_VECTORS]
    cdef vf32 left
    cdef Py_ssize_t i, j, _k
    if start:
        for i in range(TILE_ROWS):
            for j in range(TILE_VECTORS):
                total[i][j] = vf32_load(start + j * VF32_LANES)
    else:
        for i in range(TILE_ROWS):
            for j in range(TILE_VECTORS):
                total[i][j] = vf32_load(c + i * c_row + j * VF32_LANES)
    for _k in range(depth):
        for j in range(TILE_VECTORS):
            right[j] = vf32_load(b + j * VF32_LANES)
        for i in range(TILE_ROWS):
            left = vf32_splat(a[i])
            for j in range(TILE_VECTORS):
                total[i][j] = vf32_fmadd(left, right[j], total[i][j])
        a += TILE_ROWS
        b += TILE_COLUMNS
    for i in range(TILE_ROWS):
        for j in range(TILE_VECTORS):
            vf32_store(c + i * c_row + j * VF32_LANES, total[i][j])


cdef inline void multiply_rows(Py_ssize_t depth, const float *a, Py_ssize_t a_row, const float *b,
                               const float *start, float *c, Py_ssize_t c_row) noexcept nogil:
    # As multiply_tile, with rows of a that are a_row apart. One address for three rows: x86 adds
    # once or twice the distance to it for free.
    cdef vf32 total[TILE_ROWS][TILE_VECTORS]
    cdef vf32 right[TILE_VECTORS]
    cdef vf32 left
    cdef const float *rows[TILE_GROUPS]
    cdef Py_ssize_t i, j, _k
    if start:
        for i in range(TILE_ROWS):
            for j in range(TILE_VECTORS):
                total[i][j] = vf32_load(start + j * VF32_LANES)
    else:
        for i in range(TILE_ROWS):
            for j in range(TILE_VECTORS):
                total[i][j] = vf32_load(c + i * c_row + j * VF32_LANES)
    for i in range(TILE_GROUPS):
        rows[i] = a + 3 * i * a_row
    for _k in range(depth):
        for j in range(TILE_VECTORS):
            right[j] = vf32_load(b + j * VF32_LANES)
        for i in range(TILE_ROWS):
            left = vf32_splat(rows[i // 3][i % 3 * a_row])
            for j in range(TILE_VECTORS):
                total[i][j] = vf32_fmadd(left, right[j], total[i][j])
        for i in range(TILE_GROUPS):
            rows[i] += 1
        b += TILE_COLUMNS
    for i in range(TILE_ROWS):
        for j in range(TILE_VECTORS):
            vf32_store(c + i * c_row + j * VF32_LANES, total[i][j])


cdef inline void copy_block(const float *source, Py_ssize_t source_row, float *target,
                            Py_ssize_t target_row, Py_ssize_t rows,
                            Py_ssize_t cols) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(rows):
        memcpy(target + i * target_row, source + i * source_row, cols * sizeof(float))


cdef inline void multiply_block(Py_ssize_t rows, Py_ssize_t cols, Py_ssize_t depth,
                                const float *a, Py_ssize_t a_row, const float *b,
                                const float *start, float *c, Py_ssize_t c_row) noexcept nogil:
    # A tile, of which rows x cols are in c. a is packed if a_row is 0. What extends past the edge
    # of c is computed in a buffer and copied without the excess.
    cdef float buffer[TILE_ROWS * TILE_COLUMNS]
    cdef bint whole = rows == TILE_ROWS and cols == TILE_COLUMNS
    cdef float *out = c if whole else buffer
    cdef Py_ssize_t out_row = c_row if whole else TILE_COLUMNS
    if not whole:
        memset(buffer, 0, sizeof(buffer))
        if not start:
            copy_block(c, c_row, buffer, TILE_COLUMNS, rows, cols)
    if a_row:
        multiply_rows(depth, a, a_row, b, start, out, out_row)
    else:
        multiply_tile(depth, a, b, start, out, out_row)
    if not whole:
        copy_block(buffer, TILE_COLUMNS, c, c_row, rows, cols)


cdef inline void pack_columns(const float *a, Py_ssize_t a_col, Py_ssize_t tiles,
                              Py_ssize_t depth, float *packed) noexcept nogil:
    # Whole tiles of a matrix whose columns are contiguous. A few of its columns at a time, which
    # are in as many pages: they are prefetched.
    cdef Py_ssize_t k, block, tile
    cdef const float *source
    cdef float *target
    for block from 0 <= block < depth by TRANSPOSED_ROWS:
        for tile in range(tiles):
            for k in range(block, min(block + TRANSPOSED_ROWS, depth)):
                source = a + tile * TILE_ROWS + k * a_col
                target = packed + tile * depth * TILE_ROWS + k * TILE_ROWS
                prefetch(source + TRANSPOSED_ROWS * a_col)
                if TILE_ROWS < VF32_LANES and tile + 1 < tiles and k + 1 < depth:
                    # The excess is overwritten by the next column.
                    vf32_store(target, vf32_load(source))
                else:
                    memcpy(target, source, TILE_ROWS * sizeof(float))


cdef inline void pack_left(const float *a, Py_ssize_t a_row, Py_ssize_t a_col, Py_ssize_t rows,
                           Py_ssize_t depth, float *packed) noexcept nogil:
    # Tiles of TILE_ROWS rows, each [depth, TILE_ROWS]; rows past the last are zeros. Except in the
    # scalar tier, TILE_ROWS <= VF32_LANES.
    cdef Py_ssize_t i, k, tile = 0, here, whole = depth - depth % VF32_LANES
    cdef vf32 square[VF32_LANES]
    if a_row == 1:
        pack_columns(a, a_col, rows // TILE_ROWS, depth, packed)
        tile = rows - rows % TILE_ROWS
        packed += tile * depth
    for tile from tile <= tile < rows by TILE_ROWS:
        here = min(rows - tile, TILE_ROWS)
        if here < TILE_ROWS:
            memset(packed, 0, depth * TILE_ROWS * sizeof(float))
        if a_col == 1 and VF32_LANES > 1:
            for k from 0 <= k < whole by VF32_LANES:
                for i in range(VF32_LANES):
                    square[i] = vf32_zero()
                    if i < here:
                        square[i] = vf32_load(a + (tile + i) * a_row + k)
                vf32_transpose(square)
                # In this order a vector's excess is overwritten by the next one, and that of the
                # last by the next tile; behind the last tile there is space.
                for i in range(VF32_LANES):
                    vf32_store(packed + (k + i) * TILE_ROWS, square[i])
            for i in range(TILE_ROWS):
                for k in range(whole, depth):
                    packed[k * TILE_ROWS + i] = a[(tile + i) * a_row + k] if i < here else 0.0
        else:
            for i in range(here):
                for k in range(depth):
                    packed[k * TILE_ROWS + i] = a[(tile + i) * a_row + k * a_col]
        packed += depth * TILE_ROWS


cdef inline void pack_right(const float *b, Py_ssize_t b_row, Py_ssize_t b_col,
                            Py_ssize_t depth, Py_ssize_t cols, float *packed) noexcept nogil:
    # Panels of TILE_COLUMNS columns, each [depth, TILE_COLUMNS]; columns past the last are zeros.
    cdef Py_ssize_t i, j, k, panel, here, block, whole = depth - depth % VF32_LANES
    cdef vf32 square[VF32_LANES]
    for panel from 0 <= panel < cols by TILE_COLUMNS:
        here = min(cols - panel, TILE_COLUMNS)
        if here < TILE_COLUMNS:
            memset(packed, 0, depth * TILE_COLUMNS * sizeof(float))
        if b_col == 1 and here == TILE_COLUMNS:
            for k in range(depth):
                memcpy(packed + k * TILE_COLUMNS, b + k * b_row + panel,
                       TILE_COLUMNS * sizeof(float))
        elif b_row == 1 and here == TILE_COLUMNS and VF32_LANES > 1:
            for k from 0 <= k < whole by VF32_LANES:
                for j from 0 <= j < TILE_COLUMNS by VF32_LANES:
                    for i in range(VF32_LANES):
                        square[i] = vf32_load(b + (panel + j + i) * b_col + k)
                    vf32_transpose(square)
                    for i in range(VF32_LANES):
                        vf32_store(packed + (k + i) * TILE_COLUMNS + j, square[i])
            for j in range(here):
                for k in range(whole, depth):
                    packed[k * TILE_COLUMNS + j] = b[(panel + j) * b_col + k]
        elif b_row == 1:
            # Transposes a few rows of the panel at a time, which stay in the L1 cache.
            for block from 0 <= block < depth by TRANSPOSED_ROWS:
                for j in range(here):
                    for k in range(block, min(block + TRANSPOSED_ROWS, depth)):
                        packed[k * TILE_COLUMNS + j] = b[(panel + j) * b_col + k]
        else:
            for k in range(depth):
                for j in range(here):
                    packed[k * TILE_COLUMNS + j] = b[(panel + j) * b_col + k * b_row]
        packed += depth * TILE_COLUMNS


cdef void pack_codes(const Matrix *matrix, Py_ssize_t row, Py_ssize_t col, Py_ssize_t depth,
                     Py_ssize_t cols, float *packed) noexcept nogil:
    # As pack_right, for the weights from (row, col) on, dequantized. Panels start at multiples of
    # the vector length, so that a vector has a single scale.
    cdef const signed char *codes = matrix.codes + row * matrix.cols + col
    cdef Py_ssize_t j, k, panel, here
    cdef vf32 factor
    for panel from 0 <= panel < cols by TILE_COLUMNS:
        here = min(cols - panel, TILE_COLUMNS)
        if here < TILE_COLUMNS:
            memset(packed, 0, depth * TILE_COLUMNS * sizeof(float))
        for k in range(depth):
            if here == TILE_COLUMNS:
                factor = vf32_splat(scale_at(matrix, row + k, col + panel))
                for j in range(TILE_VECTORS):
                    if j and matrix.scale_row > 1:
                        factor = vf32_splat(scale_at(matrix, row + k,
                                                     col + panel + j * VF32_LANES))
                    vf32_store(packed + k * TILE_COLUMNS + j * VF32_LANES,
                               vf32_mul(factor, vf32_load_i8(codes + k * matrix.cols + panel
                                                             + j * VF32_LANES)))
            else:
                for j in range(here):
                    packed[k * TILE_COLUMNS + j] = \
                        scale_at(matrix, row + k, col + panel + j) \
                        * <float>codes[k * matrix.cols + panel + j]
        packed += depth * TILE_COLUMNS


cdef void pack_codes_transposed(const Matrix *matrix, Py_ssize_t row, Py_ssize_t col,
                                Py_ssize_t depth, Py_ssize_t cols, float *packed) noexcept nogil:
    # The same for the transposed matrix: its column j is row `row + j` of the matrix. Blocks start
    # at multiples of TRANSPOSED_ROWS, so that each has a single scale.
    cdef const signed char *codes
    cdef Py_ssize_t i, j, k, panel, here, block
    cdef float factor
    cdef vf32 square[VF32_LANES]
    for panel from 0 <= panel < cols by TILE_COLUMNS:
        here = min(cols - panel, TILE_COLUMNS)
        if here < TILE_COLUMNS:
            memset(packed, 0, depth * TILE_COLUMNS * sizeof(float))
        elif VF32_LANES > 1 and depth % VF32_LANES == 0:
            for k from 0 <= k < depth by VF32_LANES:
                for j from 0 <= j < TILE_COLUMNS by VF32_LANES:
                    for i in range(VF32_LANES):
                        codes = matrix.codes + (row + panel + j + i) * matrix.cols + col + k
                        factor = scale_at(matrix, row + panel + j + i, col + k)
                        square[i] = vf32_mul(vf32_splat(factor), vf32_load_i8(codes))
                    vf32_transpose(square)
                    for i in range(VF32_LANES):
                        vf32_store(packed + (k + i) * TILE_COLUMNS + j, square[i])
            packed += depth * TILE_COLUMNS
            continue
        for block from 0 <= block < depth by TRANSPOSED_ROWS:
            for j in range(here):
                codes = matrix.codes + (row + panel + j) * matrix.cols + col
                factor = scale_at(matrix, row + panel + j, col + block)
                for k in range(block, min(block + TRANSPOSED_ROWS, depth)):
                    packed[k * TILE_COLUMNS + j] = factor * <float>codes[k]
        packed += depth * TILE_COLUMNS


cdef inline Operand weights_of(const Matrix *matrix, bint transposed) noexcept nogil:
    # A linear map's matrix, or its transpose.
    cdef Operand operand = strided(matrix.dense, matrix.cols, 1)
    if transposed:
        operand = strided(matrix.dense, 1, matrix.cols)
    if matrix.codes:
        operand.codes = matrix
    operand.transposed = transposed
    return operand


cdef inline void product_in_bf16(Py_ssize_t m, Py_ssize_t n, Py_ssize_t k, Operand a, Operand b,
                                 const float *bias, bint accumulate, float *c, Py_ssize_t c_row,
                                 float *workspace) noexcept nogil:
    # As product, in bfloat16. A single scale is applied after the product, without rounding.
    cdef bf16_operand left, right
    cdef float factor = 1.0
    memset(&left, 0, sizeof(left))
    memset(&right, 0, sizeof(right))
    left.dense, left.line_stride, left.depth_stride = a.data, a.row, a.col
    right.dense, right.line_stride, right.depth_stride = b.data, b.col, b.row
    if b.codes:
        right.codes, right.scale = b.codes.codes, b.codes.scale
        right.scale_row, right.group = b.codes.scale_row, b.codes.group
        right.transposed = not b.transposed
        factor = b.codes.scale[0] if b.codes.scale_row == 0 else 1.0
    bf16_product(m, n, k, &left, &right, factor, bias, accumulate, c, c_row, workspace)


cdef void product(Py_ssize_t m, Py_ssize_t n, Py_ssize_t k, Operand a, Operand b,
                  const float *bias, bint accumulate, float *c, Py_ssize_t c_row,
                  float *workspace) noexcept nogil:
    # c[m, n] = a[m, k] b[k, n] + bias[n], or c += ... if accumulate is set. a holds floats; rows of
    # c are c_row apart.
    cdef float *right = workspace
    cdef float *left = right + PACK_RIGHT
    cdef float *start = left + PACK_LEFT + VF32_LANES
    cdef const float *a_block
    cdef const float *begin
    cdef float *corner
    cdef Py_ssize_t jc, pc, ic, jr, ir, i, columns, depth, rows, tile_rows, tile_columns, unpacked
    if BF16_PRODUCTS:
        product_in_bf16(m, n, k, a, b, bias, accumulate, c, c_row, workspace)
        return
    for jc from 0 <= jc < n by panels.columns:
        columns = min(n - jc, panels.columns)
        if not accumulate:
            memset(start, 0, (columns + TILE_COLUMNS) * sizeof(float))
            if bias:
                memcpy(start, bias + jc, columns * sizeof(float))
        for pc from 0 <= pc < k by panels.depth:
            depth = min(k - pc, panels.depth)
            if b.codes == NULL:
                pack_right(b.data + pc * b.row + jc * b.col, b.row, b.col, depth, columns, right)
            elif b.transposed:
                pack_codes_transposed(b.codes, jc, pc, depth, columns, right)
            else:
                pack_codes(b.codes, pc, jc, depth, columns, right)
            for ic from 0 <= ic < m by panels.rows:
                rows = min(m - ic, panels.rows)
                a_block = a.data + ic * a.row + pc * a.col
                # Contiguous rows are read where they are; only the last ones, which fill no tile,
                # are packed.
                unpacked = rows - rows % TILE_ROWS if a.col == 1 else 0
                pack_left(a_block + unpacked * a.row, a.row, a.col, rows - unpacked, depth, left)
                for jr from 0 <= jr < columns by TILE_COLUMNS:
                    tile_columns = min(columns - jr, TILE_COLUMNS)
                    begin = NULL if accumulate or pc else start + jr
                    for ir from 0 <= ir < rows by TILE_ROWS:
                        tile_rows = min(rows - ir, TILE_ROWS)
                        corner = c + (ic + ir) * c_row + jc + jr
                        # What the next tile adds to is on its way while this one is computed.
                        for i in range(TILE_ROWS):
                            prefetch(corner + (TILE_ROWS + i) * c_row)
                            prefetch(corner + (TILE_ROWS + i) * c_row + TILE_COLUMNS - 1)
                        if ir < unpacked:
                            multiply_block(TILE_ROWS, tile_columns, depth, a_block + ir * a.row,
                                           a.row, right + jr * depth, begin, corner, c_row)
                        else:
                            multiply_block(tile_rows, tile_columns, depth,
                                           left + (ir - unpacked) * depth, 0, right + jr * depth,
                                           begin, corner, c_row)


cdef void matmul(Py_ssize_t m, Py_ssize_t n, Py_ssize_t k, Operand a, Operand b,
                 const float *bias, bint accumulate, float *c, Py_ssize_t c_row,
                 float *workspace) noexcept nogil:
    START_TIMER(TIMER_MATMUL)
    product(m, n, k, a, b, bias, accumulate, c, c_row, workspace)
    STOP_TIMER(TIMER_MATMUL)


cdef void linear(const Matrix *matrix, const float *bias, const float *x, Py_ssize_t rows,
                 float *out, float *workspace) noexcept nogil:
    # out[rows, matrix.rows] = x[rows, matrix.cols] matrix^T + bias. Packing the matrix pays only if
    # enough rows of x use it.
    cdef Py_ssize_t i
    if rows < TILE_ROWS:
        for i in range(rows):
            matrix_vector(matrix, x + i * matrix.cols, out + i * matrix.rows)
            if bias:
                add(out + i * matrix.rows, bias, matrix.rows)
        return
    START_TIMER(TIMER_MATMUL)
    product(rows, matrix.rows, matrix.cols, strided(x, matrix.cols, 1), weights_of(matrix, True),
            bias, False, out, matrix.rows, workspace)
    STOP_TIMER(TIMER_MATMUL)


cdef void linear_backward(const Matrix *matrix, const float *d_out, Py_ssize_t rows,
                          bint accumulate, float *d_x, float *workspace) noexcept nogil:
    # d_x[rows, matrix.cols] = d_out[rows, matrix.rows] matrix, or += if accumulate is set.
    START_TIMER(TIMER_MATMUL)
    product(rows, matrix.cols, matrix.rows, strided(d_out, matrix.rows, 1),
            weights_of(matrix, False), NULL, accumulate, d_x, matrix.cols, workspace)
    STOP_TIMER(TIMER_MATMUL)


cdef void weight_gradient(const Matrix *matrix, const float *d_out, const float *x,
                          Py_ssize_t rows, float *d_weight, float *workspace) noexcept nogil:
    # d_weight[matrix.rows, matrix.cols] += d_out[rows, matrix.rows]^T x[rows, matrix.cols].
    START_TIMER(TIMER_MATMUL)
    product(matrix.rows, matrix.cols, rows, strided(d_out, 1, matrix.rows),
            strided(x, matrix.cols, 1), NULL, True, d_weight, matrix.cols, workspace)
    STOP_TIMER(TIMER_MATMUL)


# ---------------------------------------------------------------------------------------------
# Packed codes times int8 activations: integers, the same in every instruction set. The float
# arithmetic around them is the same, too: multiplications and additions, never fused.

cdef enum:
    STRIP_PARTS = STRIP_ROWS / VSUM_ROWS
    PART_BYTES = TILE_BYTES / STRIP_PARTS
    VSUM_BLOCK = 128        # rows of activations per block of sums


cdef inline float largest_magnitude(const float *x, Py_ssize_t n, float *nonfinite) noexcept nogil:
    # The largest |x|; nonfinite is 0 if every x is finite, else NaN: 0 x is 0 for finite x only.
    # Two of each, so that a vector does not wait for the previous one.
    cdef Py_ssize_t i = 0
    cdef vf32 v, zero = vf32_zero()
    cdef vf32 most = zero, least = zero, total = zero, most2 = zero, least2 = zero, total2 = zero
    while i + 2 * VF32_LANES <= n:
        v = vf32_load(x + i)
        most = vf32_max(most, v)
        least = vf32_min(least, v)
        total = vf32_fmadd(v, zero, total)
        v = vf32_load(x + i + VF32_LANES)
        most2 = vf32_max(most2, v)
        least2 = vf32_min(least2, v)
        total2 = vf32_fmadd(v, zero, total2)
        i += 2 * VF32_LANES
    while i < n:
        v = vf32_load_first(x + i, n - i) if n - i < VF32_LANES else vf32_load(x + i)
        most = vf32_max(most, v)
        least = vf32_min(least, v)
        total = vf32_fmadd(v, zero, total)
        i += VF32_LANES
    nonfinite[0] = vf32_sum(vf32_add(total, total2))
    return vf32_largest(vf32_max(vf32_max(most, most2), vf32_sub(zero, vf32_min(least, least2))))


cdef inline int sum_of_codes(const signed char *x, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    cdef int total = 0
    for i in range(n):
        total += x[i]
    return total


cdef inline float step_for(float top, float nonfinite, float levels, float *inverse) noexcept nogil:
    # The step between codes, of which the largest is `levels`, for numbers up to `top`; NaN unless
    # all of them are finite. The inverse is 0 where all codes are: without a finite step, and for
    # numbers that are 0 or too small to have an inverse.
    cdef float step = top / levels + nonfinite
    inverse[0] = levels / top
    if not (step > 0.0 and inverse[0] < INFINITY):
        inverse[0] = 0.0
    return step


cdef void quantize_rows(const float *x, Py_ssize_t rows, Py_ssize_t cols,
                        const Int8Rows *out) noexcept nogil:
    # Quantizes each row to int8 codes, -127 to 127, with its own scale max |x| / 127 (BitNet b1.58,
    # arXiv 2402.17764, section 2). The scale of a row that is not finite is NaN.
    cdef Py_ssize_t i, j, k, whole = cols - cols % VF32_LANES, left = cols - whole
    cdef const float *row
    cdef signed char *codes
    cdef signed char last[VF32_LANES]
    cdef float top, inverse, nonfinite
    cdef vf32 up
    cdef vf32 four[4]
    START_TIMER(TIMER_QUANTIZE)
    for i in range(rows):
        row = x + i * cols
        codes = out.codes + i * out.stride
        top = largest_magnitude(row, cols, &nonfinite)
        out.scales[i] = step_for(top, nonfinite, 127.0, &inverse)
        if inverse == 0.0:
            memset(codes, 0, out.stride)
            out.sums[i] = 0
            continue
        up = vf32_splat(inverse)
        j = 0
        while j + 4 * VF32_LANES <= cols:
            for k in range(4):
                four[k] = vf32_mul(up, vf32_load(row + j + k * VF32_LANES))
            i8_round4(codes + j, four)
            j += 4 * VF32_LANES
        while j < whole:
            i8_round(codes + j, vf32_mul(up, vf32_load(row + j)))
            j += VF32_LANES
        if left:
            i8_round(last, vf32_mul(up, vf32_load_first(row + whole, left)))
            memcpy(codes + whole, last, left)
        memset(codes + cols, 0, out.stride - cols)
        out.sums[i] = sum_of_codes(codes, cols)
    STOP_TIMER(TIMER_QUANTIZE)


cdef inline void strip_sums(const unsigned char *strip, Py_ssize_t tiles, bint trits,
                            const signed char *x, int *totals) noexcept nogil:
    # totals[STRIP_ROWS] for one row of activations; all parts of the strip share each load of it.
    cdef vsum s[STRIP_PARTS]
    cdef vpart part[STRIP_PARTS]
    cdef vact a
    cdef vact3 a3
    cdef Py_ssize_t i, j, begin, end
    for j in range(STRIP_PARTS):
        s[j] = vsum_zero()
    for begin from 0 <= begin < tiles by VPART_TILES:
        for j in range(STRIP_PARTS):
            part[j] = vpart_zero()
        end = min(begin + VPART_TILES, tiles)
        if trits:
            for i in range(begin, end):
                prefetch_tile(strip)
                a3 = vact3_load(x + i * TILE_TRITS)
                for j in range(STRIP_PARTS):
                    part[j] = vpart_tile3(part[j], strip + j * PART_BYTES, a3)
                strip += TILE_BYTES
        else:
            for i in range(begin, end):
                prefetch_tile(strip)
                a = vact_load(x + i * TILE_CODES)
                for j in range(STRIP_PARTS):
                    part[j] = vpart_tile(part[j], strip + j * PART_BYTES, a)
                strip += TILE_BYTES
        for j in range(STRIP_PARTS):
            s[j] = vsum_add(s[j], part[j])
    for j in range(STRIP_PARTS):
        if trits:
            vsum3_store(totals + j * VSUM_ROWS, s[j])
        else:
            vsum_store(totals + j * VSUM_ROWS, s[j])


cdef inline void block_sums(const unsigned char *strip, Py_ssize_t tiles, bint trits,
                            const signed char *x, Py_ssize_t stride,
                            int *totals) noexcept nogil:
    # totals[VSUM_AT_ONCE][STRIP_ROWS] for rows of activations that share the unpacking of codes.
    cdef vsum s[VSUM_AT_ONCE]
    cdef vpart part[VSUM_AT_ONCE]
    cdef const unsigned char *w
    cdef Py_ssize_t i, j, t, begin, end
    for j in range(STRIP_PARTS):
        w = strip + j * PART_BYTES
        for t in range(VSUM_AT_ONCE):
            s[t] = vsum_zero()
        for begin from 0 <= begin < tiles by VPART_TILES:
            for t in range(VSUM_AT_ONCE):
                part[t] = vpart_zero()
            end = min(begin + VPART_TILES, tiles)
            if trits:
                for i in range(begin, end):
                    vpart_rows3(part, w + i * TILE_BYTES, x + i * TILE_TRITS, stride)
            else:
                for i in range(begin, end):
                    vpart_rows(part, w + i * TILE_BYTES, x + i * TILE_CODES, stride)
            vpart_sort(part)
            for t in range(VSUM_AT_ONCE):
                s[t] = vsum_add(s[t], part[t])
        for t in range(VSUM_AT_ONCE):
            if trits:
                vsum3_store(totals + t * STRIP_ROWS + j * VSUM_ROWS, s[t])
            else:
                vsum_store(totals + t * STRIP_ROWS + j * VSUM_ROWS, s[t])


cdef inline void tile_sums(const unsigned char *strip, Py_ssize_t tiles, bint trits,
                           const signed char *x, Py_ssize_t stride, Py_ssize_t rows,
                           int *totals) noexcept nogil:
    # totals[rows][STRIP_ROWS] for at most VSUM_TILES tiles.
    cdef Py_ssize_t t = 0
    if VSUM_AT_ONCE > 1:
        while t + VSUM_AT_ONCE <= rows:
            block_sums(strip, tiles, trits, x + t * stride, stride, totals + t * STRIP_ROWS)
            t += VSUM_AT_ONCE
    while t < rows:
        strip_sums(strip, tiles, trits, x + t * stride, totals + t * STRIP_ROWS)
        t += 1


cdef void packed_sums(const unsigned char *strip, Py_ssize_t tiles, bint trits,
                      const signed char *x, Py_ssize_t stride, Py_ssize_t rows, bint unit,
                      int *totals, float *workspace) noexcept nogil:
    # totals[rows][STRIP_ROWS], rows <= VSUM_BLOCK: sums of unsigned codes times activations, on the
    # matrix unit or in vectors.
    cdef int part[VSUM_BLOCK * STRIP_ROWS]
    cdef Py_ssize_t i, done, width = TILE_TRITS if trits else TILE_CODES
    if unit:
        amx_packed_sums(strip, tiles, trits, x, stride, rows, totals, workspace)
        return
    tile_sums(strip, min(tiles, VSUM_TILES), trits, x, stride, rows, totals)
    for done from VSUM_TILES <= done < tiles by VSUM_TILES:
        tile_sums(strip + done * TILE_BYTES, min(tiles - done, VSUM_TILES), trits,
                  x + done * width, stride, rows, part)
        for i in range(rows * STRIP_ROWS):
            totals[i] += part[i]


cdef inline void scale_sums(const int *sums, Py_ssize_t n, int factor, int shift,
                            const float *scales, float x_scale, bint accumulate,
                            const float *bias, float *out) noexcept nogil:
    # out[n] (+)= (factor * sums + shift) * (scales * x_scale) + bias, n <= STRIP_ROWS, of
    # sums[STRIP_ROWS] and scales[STRIP_ROWS].
    cdef vi32 total, once, offset = vi32_splat(shift)
    cdef vf32 value, up = vf32_splat(x_scale)
    cdef Py_ssize_t i
    cdef int _again
    for i from 0 <= i < n by VF32_LANES:
        once = vi32_load(sums + i)
        total = vi32_add(once, offset)
        # Multiplications of integers are slow in many CPUs; factors are 1, or small.
        for _again in range(factor - 1):
            total = vi32_add(total, once)
        value = vf32_mul(vi32_float(total), vf32_mul(vf32_load(scales + i), up))
        if accumulate:
            value = vf32_add(load_within(out + i, n - i), value)
        if bias:
            value = vf32_add(value, load_within(bias + i, n - i))
        store_within(out + i, n - i, value)


cdef void packed_product(const PackedMatrix *matrix, Py_ssize_t first, Py_ssize_t last,
                         const Int8Rows *x, Py_ssize_t rows, const float *bias, bint accumulate,
                         float *out, Py_ssize_t out_row, float *workspace) noexcept nogil:
    # out[rows, matrix.rows] (+)= x matrix^T + bias, for the strips first to last - 1.
    cdef int totals[VSUM_BLOCK * STRIP_ROWS]
    cdef Py_ssize_t width = TILE_TRITS if matrix.trits else TILE_CODES
    cdef Py_ssize_t tiles = (matrix.cols + width - 1) // width
    cdef Py_ssize_t groups = 1, group, strip, begin, t, i, row, here, count, low, inside
    cdef const unsigned char *w
    cdef const float *bias_row
    cdef float scales[STRIP_ROWS]
    cdef float *to
    cdef int x_sum
    cdef bint unit = MATRIX_UNIT and rows >= AMX_MIN_ROWS
    START_TIMER(TIMER_PACKED)
    if unit:
        amx_begin()
    for i in range(STRIP_ROWS):
        scales[i] = matrix.scale[0]
    if matrix.scale_row > 1:
        groups = matrix.scale_row
    count = tiles if groups == 1 else matrix.group // width
    for strip in range(first, last):
        row = strip * STRIP_ROWS
        inside = min(matrix.rows - row, STRIP_ROWS)
        for begin from 0 <= begin < rows by VSUM_BLOCK:
            here = min(rows - begin, VSUM_BLOCK)
            for group in range(groups):
                low = group * count
                bias_row = bias + row if bias and group == 0 else NULL
                w = matrix.tiles + (strip * tiles + low) * TILE_BYTES
                packed_sums(w, min(tiles - low, count), matrix.trits,
                            x.codes + begin * x.stride + low * width, x.stride, here, unit,
                            totals, workspace)
                if matrix.scale_row:
                    for i in range(inside):
                        scales[i] = matrix.scale[(row + i) * matrix.scale_row + group]
                for t in range(here):
                    x_sum = x.sums[begin + t]
                    if groups > 1:
                        x_sum = sum_of_codes(x.codes + (begin + t) * x.stride + low * width,
                                             min(tiles - low, count) * width)
                    to = out + (begin + t) * out_row + row
                    # With a constant number there are no tests for its end.
                    if inside == STRIP_ROWS:
                        scale_sums(totals + t * STRIP_ROWS, STRIP_ROWS, matrix.factor,
                                   matrix.offset * x_sum, scales, x.scales[begin + t],
                                   accumulate or group, bias_row, to)
                    else:
                        scale_sums(totals + t * STRIP_ROWS, inside, matrix.factor,
                                   matrix.offset * x_sum, scales, x.scales[begin + t],
                                   accumulate or group, bias_row, to)
    if unit:
        amx_end()
    STOP_TIMER(TIMER_PACKED)


cdef inline void int8_sums(const Int8Rows *matrix, Py_ssize_t first, Py_ssize_t count,
                           Py_ssize_t cols, const signed char *x, int *totals) noexcept nogil:
    # totals[STRIP_ROWS] of rows of weights with one row of activations, four at a time; those past
    # `count` are not used. The next four rows are prefetched: each is shorter than a page.
    cdef Py_ssize_t i, j, k, stride = matrix.stride
    cdef const signed char *w
    cdef const signed char *w1
    cdef const signed char *w2
    cdef const signed char *w3
    cdef vi8 a
    cdef vi32 s0, s1, s2, s3
    for i from 0 <= i < count by 4:
        w = matrix.codes + (first + i) * stride
        w1 = w + min(count - 1 - i, 1) * stride
        w2 = w + min(count - 1 - i, 2) * stride
        w3 = w + min(count - 1 - i, 3) * stride
        s0 = s1 = s2 = s3 = vi32_zero()
        for j from 0 <= j < cols by VI8_LANES:
            for k from 0 <= k < 4 * VI8_LANES by 64:
                prefetch(w + 4 * (stride + j) + k)
            a = vi8_load(x + j)
            vi8_add_dot(&s0, vi8_load(w + j), a)
            vi8_add_dot(&s1, vi8_load(w1 + j), a)
            vi8_add_dot(&s2, vi8_load(w2 + j), a)
            vi8_add_dot(&s3, vi8_load(w3 + j), a)
        totals[i] = vi32_sum(s0)
        totals[i + 1] = vi32_sum(s1)
        totals[i + 2] = vi32_sum(s2)
        totals[i + 3] = vi32_sum(s3)


cdef void int8_rows_product(const Int8Rows *matrix, Py_ssize_t first, Py_ssize_t last,
                            Py_ssize_t cols, const Int8Rows *x, Py_ssize_t rows,
                            const float *bias, float *out, Py_ssize_t out_row) noexcept nogil:
    # out[rows, first:last] = x matrix^T + bias, for rows first to last - 1 of a matrix of int8.
    cdef int totals[STRIP_ROWS]
    cdef float scales[STRIP_ROWS]
    cdef Py_ssize_t row, count, t
    START_TIMER(TIMER_PACKED)
    memset(totals, 0, sizeof(totals))
    memset(scales, 0, sizeof(scales))
    for row from first <= row < last by STRIP_ROWS:
        count = min(last - row, STRIP_ROWS)
        memcpy(scales, matrix.scales + row, count * sizeof(float))
        for t in range(rows):
            int8_sums(matrix, row, count, cols, x.codes + t * x.stride, totals)
            scale_sums(totals, count, 1, 0, scales, x.scales[t], False,
                       bias + row if bias else NULL, out + t * out_row + row)
    STOP_TIMER(TIMER_PACKED)


# ---------------------------------------------------------------------------------------------
# Linear maps of codes in int8, for training: as above, with codes that are packed where they are
# used. A row of activations is one factor, quantized; the codes are the other one, as they are.

cdef enum:
    INT8_MIN_ROWS = 16      # with fewer, packing and quantizing cost more than they save
    INT8_BLOCK = 512        # rows that are quantized at a time
    INT8_COLUMNS = 12288    # columns of the widest matrix whose strips and rows fit the workspace


cdef inline unsigned long long code_bits(unsigned long long codes, int reach) noexcept nogil:
    # Eight codes, a byte each, as the numbers 0 to 3: code + 1, or (code + 3) / 2. A code's lowest
    # bits, two or three, tell it from the others, and the sum with them stays in its byte.
    if reach == 1:
        codes = (codes & 0x0303030303030303ULL) + 0x0101010101010101ULL
    else:
        codes = ((codes & 0x0707070707070707ULL) + 0x0303030303030303ULL) >> 1
    return codes & 0x0303030303030303ULL


cdef void pack_strip(const Matrix *matrix, Py_ssize_t first, unsigned char *out) noexcept nogil:
    # Packs STRIP_ROWS rows, of which the last may be missing, in tiles.
    cdef Py_ssize_t rows = min(matrix.rows - first, STRIP_ROWS), whole = matrix.cols // TILE_CODES
    cdef Py_ssize_t i, j, left = matrix.cols - whole * TILE_CODES
    cdef const signed char *codes
    cdef signed char last[TILE_CODES]
    cdef unsigned long long low, high
    cdef unsigned int halves[2]
    for i in range(rows):
        codes = matrix.codes + (first + i) * matrix.cols
        for j in range(whole + (left > 0)):
            if j == whole:
                memset(last, 0, TILE_CODES)
                memcpy(last, codes, left)
                codes = last
            memcpy(&low, codes, 8)
            memcpy(&high, codes + 8, 8)
            low = code_bits(low, matrix.reach) | code_bits(high, matrix.reach) << 4
            memcpy(halves, &low, 8)
            halves[0] |= halves[1] << 2
            memcpy(out + j * TILE_BYTES + i * TILE_ROW_BYTES, halves, TILE_ROW_BYTES)
            codes += TILE_CODES


cdef void pack_strip_transposed(const Matrix *matrix, Py_ssize_t first,
                                unsigned char *out) noexcept nogil:
    # The same for columns: STRIP_ROWS rows of the transposed matrix.
    cdef Py_ssize_t cols = min(matrix.cols - first, STRIP_ROWS), start, here, i, j
    cdef signed char codes[TILE_CODES * STRIP_ROWS]
    cdef unsigned char fields[TILE_ROW_BYTES * STRIP_ROWS]
    cdef unsigned long long part[CODES_PER_BYTE]
    memset(codes, 0, TILE_CODES * STRIP_ROWS)
    for start from 0 <= start < matrix.rows by TILE_CODES:
        here = min(matrix.rows - start, TILE_CODES)
        if cols == STRIP_ROWS:
            for i in range(here):
                memcpy(codes + i * STRIP_ROWS, matrix.codes + (start + i) * matrix.cols + first,
                       STRIP_ROWS)
        else:
            for i in range(here):
                memcpy(codes + i * STRIP_ROWS, matrix.codes + (start + i) * matrix.cols + first,
                       cols)
        # Byte j of a row holds codes j, 4 + j, 8 + j and 12 + j.
        for i from 0 <= i < TILE_ROW_BYTES * STRIP_ROWS by 8:
            for j in range(CODES_PER_BYTE):
                memcpy(&part[j], codes + j * TILE_ROW_BYTES * STRIP_ROWS + i, 8)
                part[j] = code_bits(part[j], matrix.reach)
            part[0] |= part[1] << 2 | part[2] << 4 | part[3] << 6
            memcpy(fields + i, &part[0], 8)
        for i in range(STRIP_ROWS):
            for j in range(TILE_ROW_BYTES):
                out[i * TILE_ROW_BYTES + j] = fields[j * STRIP_ROWS + i]
        out += TILE_BYTES


cdef inline bint fits_int8(const Matrix *matrix, Py_ssize_t rows) noexcept nogil:
    return (matrix.codes != NULL and matrix.reach > 0 and matrix.scale_row <= 1
            and rows >= INT8_MIN_ROWS and max(matrix.rows, matrix.cols) <= INT8_COLUMNS)


cdef inline void int8_product(const Matrix *matrix, bint backward, const float *x,
                              Py_ssize_t rows, const float *bias, bint accumulate, float *out,
                              float *workspace) noexcept nogil:
    # out = x matrix^T + bias, or out (+)= x matrix in the backward pass. There the scale of a row
    # of the matrix multiplies a column of x before it is quantized.
    cdef float one = 1.0
    cdef float row_scales[INT8_BLOCK]
    cdef int sums[INT8_BLOCK]
    cdef Py_ssize_t cols = matrix.rows if backward else matrix.cols
    cdef Py_ssize_t out_cols = matrix.cols if backward else matrix.rows
    cdef Py_ssize_t begin = 0, here, first, i
    cdef float *scaled = workspace + PACK_RIGHT
    cdef unsigned char *tiles = <unsigned char *>(scaled + INT8_COLUMNS)
    cdef bint scaled_first = backward and matrix.scale_row
    cdef Int8Rows block, line
    cdef PackedMatrix strip
    block.stride = ((cols + TILE_TRITS - 2 + ACTIVATION_COLUMNS)
                    // ACTIVATION_COLUMNS * ACTIVATION_COLUMNS)
    block.codes = <signed char *>workspace
    block.scales = row_scales
    block.sums = sums
    line.stride = block.stride
    strip.cols = strip.group = cols
    strip.tiles = tiles
    strip.trits = False
    strip.factor = 1 if matrix.reach == 1 else 2
    strip.offset = -matrix.reach
    strip.scale = matrix.scale
    if scaled_first:
        strip.scale = &one
    strip.scale_row = 0 if backward else matrix.scale_row
    while begin < rows:
        here = min(rows - begin, INT8_BLOCK,
                   PACK_RIGHT * <Py_ssize_t>sizeof(float) // block.stride)
        if scaled_first:
            for i in range(here):
                line.codes = block.codes + i * block.stride
                line.scales = row_scales + i
                line.sums = sums + i
                elementwise_binary(scaled, x + (begin + i) * cols, matrix.scale, cols, vf32_mul)
                quantize_rows(scaled, 1, cols, &line)
        else:
            quantize_rows(x + begin * cols, here, cols, &block)
        for first from 0 <= first < out_cols by STRIP_ROWS:
            strip.rows = min(out_cols - first, STRIP_ROWS)
            if backward:
                pack_strip_transposed(matrix, first, tiles)
            else:
                pack_strip(matrix, first, tiles)
                strip.scale = matrix.scale + first * matrix.scale_row
            packed_product(&strip, 0, 1, &block, here, bias + first if bias else NULL, accumulate,
                           out + begin * out_cols + first, out_cols, NULL)
        begin += here


cdef void int8_linear(const Matrix *matrix, const float *bias, const float *x, Py_ssize_t rows,
                      float *out, float *workspace) noexcept nogil:
    if fits_int8(matrix, rows):
        int8_product(matrix, False, x, rows, bias, False, out, workspace)
    else:
        linear(matrix, bias, x, rows, out, workspace)


cdef void int8_linear_backward(const Matrix *matrix, const float *d_out, Py_ssize_t rows,
                               bint accumulate, float *d_x, float *workspace) noexcept nogil:
    if fits_int8(matrix, rows):
        int8_product(matrix, True, d_out, rows, NULL, accumulate, d_x, workspace)
    else:
        linear_backward(matrix, d_out, rows, accumulate, d_x, workspace)


# Gradients of weights: activations in int8, as the forward product has them, times gradients of
# outputs in int16. An instruction multiplies pairs of int16 and adds both products, so that two
# tokens are packed together; otherwise it is the algorithm of the product of floats. A token's
# scale multiplies its gradients before they are rounded, with a step for each feature: then the
# sums over tokens have a single scale, and are exact.

cdef enum:
    PAIR_TOKENS = 512       # in a sum: 127 * 32767 * 512 < 2^31
    PAIR_FEATURES = PACK_LEFT / 256     # rows of weights that are packed at a time, at most


cdef inline void feature_steps(const float *x, Py_ssize_t x_row, Py_ssize_t tokens,
                               Py_ssize_t cols, const float *factors, float *steps,
                               float *inverses) noexcept nogil:
    # The steps of the columns of x in int16; factors multiply the rows.
    cdef vf32 most[4]
    cdef vf32 least[4]
    cdef vf32 total[4]
    cdef vf32 v, factor, zero = vf32_zero()
    cdef float tops[4 * VF32_LANES]
    cdef float nonfinite[4 * VF32_LANES]
    cdef Py_ssize_t i, j, k, here
    for j from 0 <= j < cols by 4 * VF32_LANES:
        here = min(cols - j, 4 * VF32_LANES)
        for i in range(4):
            most[i] = least[i] = total[i] = zero
        for k in range(tokens):
            factor = vf32_splat(factors[k])
            for i in range(4):
                v = vf32_mul(load_within(x + k * x_row + j + i * VF32_LANES,
                                         here - i * VF32_LANES), factor)
                most[i] = vf32_max(most[i], v)
                least[i] = vf32_min(least[i], v)
                total[i] = vf32_fmadd(v, zero, total[i])
        for i in range(4):
            vf32_store(tops + i * VF32_LANES, vf32_max(most[i], vf32_sub(zero, least[i])))
            vf32_store(nonfinite + i * VF32_LANES, total[i])
        for i in range(here):
            steps[j + i] = step_for(tops[i], nonfinite[i], 32767.0, inverses + j + i)


cdef inline void pack_pairs(const float *x, Py_ssize_t x_row, Py_ssize_t tokens, Py_ssize_t cols,
                            const float *factors, const float *column_factors, Py_ssize_t width,
                            int *packed, Py_ssize_t panel_size) noexcept nogil:
    # Panels of `width` columns, each [(tokens + 1) / 2, width], of x times the factors of rows and,
    # unless NULL, of columns. What a vector has in excess is overwritten by the next one, or lies
    # behind the panel.
    cdef Py_ssize_t block, panel, j, k
    cdef const float *row
    cdef int *target
    cdef vf32 first, second, factor
    for block from 0 <= block < tokens by TRANSPOSED_ROWS:
        for panel from 0 <= panel < cols by width:
            target = packed + panel // width * panel_size + block // 2 * width
            for k from block <= k < min(block + TRANSPOSED_ROWS, tokens) by 2:
                row = x + k * x_row + panel
                for j from 0 <= j < width by VF32_LANES:
                    first = vf32_mul(load_within(row + j, cols - panel - j),
                                     vf32_splat(factors[k]))
                    second = vf32_zero()
                    if k + 1 < tokens:
                        second = vf32_mul(load_within(row + x_row + j, cols - panel - j),
                                          vf32_splat(factors[k + 1]))
                    if column_factors:
                        factor = load_within(column_factors + panel + j, cols - panel - j)
                        first = vf32_mul(first, factor)
                        second = vf32_mul(second, factor)
                    i16_pairs(target + j, first, second)
                target += width


cdef inline void multiply_pairs(Py_ssize_t rows, Py_ssize_t cols, Py_ssize_t depth, const int *a,
                                const int *b, const float *steps, float *c,
                                Py_ssize_t c_row) noexcept nogil:
    # Of a tile, rows x cols are in c: c += steps[rows] * (a b). a is packed [depth, TILE_ROWS],
    # b [depth, TILE_COLUMNS].
    cdef vi32 total[TILE_ROWS][TILE_VECTORS]
    cdef vpair right[TILE_VECTORS]
    cdef vi32 left
    cdef vf32 step, more
    cdef float sums[TILE_ROWS * TILE_COLUMNS]
    cdef float *to
    cdef Py_ssize_t i, j, _k
    for i in range(TILE_ROWS):
        for j in range(TILE_VECTORS):
            total[i][j] = vi32_zero()
    for _k in range(depth):
        for j in range(TILE_VECTORS):
            right[j] = vpair_load(b + j * VF32_LANES)
        for i in range(TILE_ROWS):
            left = vi32_splat(a[i])
            for j in range(TILE_VECTORS):
                vpair_add_dot(&total[i][j], left, right[j])
        a += TILE_ROWS
        b += TILE_COLUMNS
    for i in range(TILE_ROWS):
        for j in range(TILE_VECTORS):
            vf32_store(sums + i * TILE_COLUMNS + j * VF32_LANES, vi32_float(total[i][j]))
    for i in range(rows):
        step = vf32_splat(steps[i])
        for j from 0 <= j < cols by VF32_LANES:
            to = c + i * c_row + j
            more = vf32_mul(step, vf32_load(sums + i * TILE_COLUMNS + j))
            store_within(to, cols - j, vf32_add(load_within(to, cols - j), more))


cdef void int8_weight_gradient(const Matrix *matrix, const float *d_out, const float *x,
                               Py_ssize_t rows, float *d_weight, float *workspace) noexcept nogil:
    # As weight_gradient, for up to PAIR_TOKENS tokens at a time.
    cdef Py_ssize_t out_cols = matrix.rows, cols = matrix.cols
    cdef Py_ssize_t blocks = (rows + PAIR_TOKENS - 1) // PAIR_TOKENS
    cdef Py_ssize_t block, first, tokens, pairs, panel, width, height, i, ic, jc, ir, jr
    cdef Py_ssize_t columns, features
    cdef const float *x_block
    cdef const float *d_block
    cdef float steps[PAIR_TOKENS]
    cdef float inverses[PAIR_TOKENS]
    cdef float d_steps[PAIR_FEATURES]
    cdef float d_inverses[PAIR_FEATURES]
    cdef float top, nonfinite
    cdef int *right = <int *>workspace
    cdef int *left = right + PACK_RIGHT
    if not fits_int8(matrix, rows):
        weight_gradient(matrix, d_out, x, rows, d_weight, workspace)
        return
    START_TIMER(TIMER_MATMUL)
    for block in range(blocks):
        first = rows * block // blocks
        tokens = rows * (block + 1) // blocks - first
        pairs = (tokens + 1) // 2
        panel = pairs * TILE_ROWS + VF32_LANES
        height = min(panels.rows, PACK_LEFT // panel * TILE_ROWS)
        width = PACK_RIGHT // pairs // TILE_COLUMNS * TILE_COLUMNS
        x_block, d_block = x + first * cols, d_out + first * out_cols
        for i in range(tokens):
            top = largest_magnitude(x_block + i * cols, cols, &nonfinite)
            steps[i] = step_for(top, nonfinite, 127.0, inverses + i)
        for jc from 0 <= jc < cols by width:
            columns = min(cols - jc, width)
            pack_pairs(x_block + jc, cols, tokens, columns, inverses, NULL, TILE_COLUMNS, right,
                       pairs * TILE_COLUMNS)
            for ic from 0 <= ic < out_cols by height:
                features = min(out_cols - ic, height)
                feature_steps(d_block + ic, out_cols, tokens, features, steps, d_steps, d_inverses)
                pack_pairs(d_block + ic, out_cols, tokens, features, steps, d_inverses, TILE_ROWS,
                           left, panel)
                for jr from 0 <= jr < columns by TILE_COLUMNS:
                    for ir from 0 <= ir < features by TILE_ROWS:
                        multiply_pairs(min(features - ir, TILE_ROWS),
                                       min(columns - jr, TILE_COLUMNS), pairs,
                                       left + ir // TILE_ROWS * panel, right + jr * pairs,
                                       d_steps + ir, d_weight + (ic + ir) * cols + jc + jr, cols)
    STOP_TIMER(TIMER_MATMUL)


# ---------------------------------------------------------------------------------------------
# Attention: one head of one sequence (Vaswani et al., arXiv 1706.03762, equation 1)
#
# Queries are processed in blocks. A block skips the keys after its last query, so that the masked
# half of causal attention is never computed, and the keys before its window or its document.

# Few queries, so that little of the masked half is computed, in whole tiles of 4 or 6 rows; the
# matrix unit prefers larger products.
cdef Py_ssize_t query_block = 64 if MATRIX_UNIT else 24


cdef inline Py_ssize_t first_key(const Attention *head, Py_ssize_t query) noexcept nogil:
    # Nondecreasing in the query, so that the first key of a block is that of its first query.
    cdef Py_ssize_t position = head.keys - head.queries + query, first = 0
    if head.window and position >= head.window:
        first = position - head.window + 1
    if head.starts and head.starts[query] > first:
        first = head.starts[query]
    return first


cdef inline void round_to_int16(const float *x, Py_ssize_t n, float factor, short *codes,
                                Py_ssize_t size) noexcept nogil:
    # codes[size] = factor * x[n], rounded, and zeros; only zeros for a factor of 0. Writes up to
    # KEY_TILE further ones.
    cdef Py_ssize_t i, rounded = 0
    cdef vf32 up = vf32_splat(factor)
    if factor != 0.0:
        for i from 0 <= i < n by VF32_LANES:
            i16_round(codes + i, vf32_mul(up, load_within(x + i, n - i)))
        rounded = n
    if rounded < size:
        memset(codes + rounded, 0, (size - rounded) * sizeof(short))


cdef void cached_attention(const CachedHead *head) noexcept nogil:
    # out = softmax(q k^T / sqrt(D)) v, with queries and weights of values in int16: their products
    # with the cached int8 are exact, so all instruction sets agree. A query has as many levels, and
    # the weights are scaled so, that no sum leaves int32.
    cdef Py_ssize_t queries = head.queries, dim = head.head_dim, skipped = head.skipped, i, count
    cdef Py_ssize_t most = skipped + head.keys + (queries - 1) * head.step
    cdef Py_ssize_t tiles = (most + KEY_TILE - 1) // KEY_TILE, even = dim + dim % 2
    cdef float factor = 1.0 / sqrtf(head.head_dim), inverse, nonfinite, total, mass
    cdef float most_levels = MOST_LEVELS, most_mass = MOST_SUM // 2
    cdef float levels = min(MOST_LEVELS, MOST_SUM // dim)
    cdef float top
    cdef float steps[CACHED_QUERIES]
    cdef cached_pairs keys, values
    cdef const float *q
    cdef float *row
    cdef short *codes
    START_TIMER(TIMER_ATTENTION_FORWARD)
    for i in range(queries):
        q = head.q + i * head.stride
        top = largest_magnitude(q, dim, &nonfinite)
        steps[i] = step_for(top, nonfinite, levels, &inverse)
        round_to_int16(q, dim, inverse, head.codes + i * head.codes_stride, even)
    keys.data = head.k
    keys.pair = 2 * KEY_TILE
    keys.block = even * KEY_TILE
    cached_product(&keys, head.codes, head.codes_stride, even // 2, tiles * KEY_TILE, head.probs,
                   head.probs_stride, queries)
    for i in range(queries):
        row = head.probs + i * head.probs_stride + skipped
        codes = head.codes + i * head.codes_stride
        count = head.keys + i * head.step
        multiply(row, head.k_scales, count)
        total = exponentials(row, count, largest(row, count), steps[i] * factor)
        multiply(row, head.v_scales, count)
        mass = ordered_sum(row, count)
        inverse = min(most_levels / largest(row, count), most_mass / mass)
        if mass < INFINITY and inverse < INFINITY:
            steps[i] = 1.0 / (inverse * total)
        else:
            # The values are zeros, or not finite.
            steps[i] = mass - mass
            inverse = 0.0
        # Keys that this query does not see have weight 0.
        memset(codes, 0, skipped * sizeof(short))
        round_to_int16(row, count, inverse, codes + skipped, most + most % 2 - skipped)
    values.data = head.v
    values.pair = 2 * dim
    values.block = 2 * KEY_TILE
    cached_product(&values, head.codes, head.codes_stride, (most + 1) // 2, dim, head.out,
                   head.stride, queries)
    for i in range(queries):
        scale(head.out + i * head.stride, steps[i], dim)
    STOP_TIMER(TIMER_ATTENTION_FORWARD)


cdef void attention(const Attention *head, float *workspace) noexcept nogil:
    # probs = softmax(q k^T / sqrt(D)) over the keys that a query sees, 0 for the others;
    # out = probs v.
    cdef Py_ssize_t past = head.keys - head.queries, keys = head.keys, stride = head.stride
    cdef Py_ssize_t block, rows, i, j, low, first, last
    cdef float factor = 1.0 / sqrtf(head.head_dim)
    cdef float *row
    START_TIMER(TIMER_ATTENTION_FORWARD)
    for block from 0 <= block < head.queries by query_block:
        rows = min(head.queries - block, query_block)
        low = first_key(head, block)
        last = past + block + rows
        product(rows, last - low, head.head_dim, strided(head.q + block * stride, stride, 1),
                strided(head.k + low * head.k_key, head.k_dim, head.k_key), NULL, False,
                head.probs + block * keys + low, keys, workspace)
        for i in range(block, block + rows):
            row = head.probs + i * keys
            first = first_key(head, i)
            memset(row + low, 0, (first - low) * sizeof(float))
            if head.allowed:
                for j in range(first, past + i + 1):
                    if not head.allowed[j]:
                        row[j] = -INFINITY
            softmax_row(row + first, past + i + 1 - first, factor)
            memset(row + past + i + 1, 0, (last - past - i - 1) * sizeof(float))
        product(rows, head.head_dim, last - low,
                strided(head.probs + block * keys + low, keys, 1),
                strided(head.v + low * head.kv_stride, head.kv_stride, 1), NULL, False,
                head.out + block * stride, stride, workspace)
    STOP_TIMER(TIMER_ATTENTION_FORWARD)


cdef void attention_backward(const Attention *head, float *workspace) noexcept nogil:
    # With p = probs and dp = d_out v^T:
    #   ds = p * (dp - sum(dp * p)) / sqrt(D);  d_q = ds k;  d_k = ds^T q;  d_v = p^T d_out
    cdef Py_ssize_t keys = head.keys, stride = head.stride, past = keys - head.queries
    cdef Py_ssize_t kv_stride = head.kv_stride, block, rows, i, low, last
    cdef float factor = 1.0 / sqrtf(head.head_dim), spread
    cdef float *d_row
    cdef const float *row
    START_TIMER(TIMER_ATTENTION_BACKWARD)
    for i in range(0 if head.accumulate_kv else keys):
        memset(head.d_k + i * kv_stride, 0, head.head_dim * sizeof(float))
        memset(head.d_v + i * kv_stride, 0, head.head_dim * sizeof(float))
    for block from 0 <= block < head.queries by query_block:
        rows = min(head.queries - block, query_block)
        low = first_key(head, block)
        last = past + block + rows
        product(rows, last - low, head.head_dim, strided(head.d_out + block * stride, stride, 1),
                strided(head.v + low * kv_stride, 1, kv_stride), NULL, False,
                head.d_probs + block * keys + low, keys, workspace)
        for i in range(block, block + rows):
            row = head.probs + i * keys + low
            d_row = head.d_probs + i * keys + low
            spread = weighted_sum(d_row, row, last - low)
            shift(d_row, -spread, last - low)
            multiply(d_row, row, last - low)
            scale(d_row, factor, last - low)
        product(rows, head.head_dim, last - low,
                strided(head.d_probs + block * keys + low, keys, 1),
                strided(head.k + low * kv_stride, kv_stride, 1), NULL, False,
                head.d_q + block * stride, stride, workspace)
        product(last - low, head.head_dim, rows,
                strided(head.d_probs + block * keys + low, 1, keys),
                strided(head.q + block * stride, stride, 1), NULL, True,
                head.d_k + low * kv_stride, kv_stride, workspace)
        product(last - low, head.head_dim, rows,
                strided(head.probs + block * keys + low, 1, keys),
                strided(head.d_out + block * stride, stride, 1), NULL, True,
                head.d_v + low * kv_stride, kv_stride, workspace)
    STOP_TIMER(TIMER_ATTENTION_BACKWARD)


# ---------------------------------------------------------------------------------------------
# Training

cdef inline float round_to_float16(float x) noexcept nogil:
    # For x >= 0: the nearest finite float16, ties to even. Normal numbers lose the 13 low bits of
    # the mantissa; subnormal ones, below 2^-14, are multiples of 2^-24.
    cdef unsigned int bits
    cdef float multiple = x * <float>16777216.0
    if x > <float>65504.0:
        return 65504.0
    if x < <float>6.103515625e-05:
        multiple = multiple + <float>12582912.0     # 1.5 * 2^23: float32 has no fraction bits here
        return (multiple - <float>12582912.0) / <float>16777216.0
    memcpy(&bits, &x, 4)
    bits += 0x0FFF + ((bits >> 13) & 1)
    bits &= <unsigned int>0xFFFFE000
    memcpy(&x, &bits, 4)
    return x


cdef float quantize(const float *weights, Py_ssize_t n, const Scheme *scheme, float fixed,
                    signed char *codes, float *scratch) noexcept nogil:
    # Quantizes n weights that share a scale and returns the scale: `fixed`, or, if that is 0, the
    # scheme's. Comparing |w| with threshold * scale needs no division and is exact. scratch holds n
    # floats; only a median uses it.
    cdef Py_ssize_t i, start
    cdef double total = 0.0
    cdef float weight_scale = fixed, bound, part
    cdef signed char code
    START_TIMER(TIMER_QUANTIZE)
    if fixed == 0.0:
        if scheme.median:
            weight_scale = absolute_median(weights, n, scratch)
        else:
            for start from 0 <= start < n by 1024:
                part = absolute_sum(weights + start, min(n - start, 1024))
                total += part
            weight_scale = <float>(total / n)
        weight_scale = round_to_float16(scheme.factor * weight_scale)
    # With a scale that rounds to 0 every code is the inner one.
    bound = scheme.threshold * weight_scale if weight_scale > 0.0 else <float>INFINITY
    for i in range(n):
        code = scheme.outer if fabsf(weights[i]) > bound else scheme.inner
        codes[i] = -code if weights[i] < 0.0 else code
    STOP_TIMER(TIMER_QUANTIZE)
    return weight_scale


cdef float absolute_median(const float *x, Py_ssize_t n, float *scratch) noexcept nogil:
    # The median of |x|: Hoare's selection (CACM 4(7), 1961, algorithm 65) of the upper median and,
    # if n is even, the mean of it and the largest element below it.
    cdef Py_ssize_t i, j, low = 0, high = n - 1, middle = n // 2
    cdef float pivot, swap, below
    for i in range(n):
        scratch[i] = fabsf(x[i])
    while low < high:
        pivot = scratch[(low + high) // 2]
        i = low
        j = high
        while i <= j:
            while scratch[i] < pivot:
                i += 1
            while pivot < scratch[j]:
                j -= 1
            if i <= j:
                swap = scratch[i]
                scratch[i] = scratch[j]
                scratch[j] = swap
                i += 1
                j -= 1
        if j < middle:
            low = i
        if middle < i:
            high = j
    if n % 2:
        return scratch[middle]
    below = scratch[0]
    for i in range(1, middle):
        below = scratch[i] if scratch[i] > below else below
    return <float>(0.5 * (<double>below + <double>scratch[middle]))


cdef void fake_quantize_rows(float *x, Py_ssize_t rows, Py_ssize_t cols) noexcept nogil:
    # Replaces each row by its int8 quantization, dequantized: multiples, -127 to 127, of its own
    # scale max |x| / 127 (BitNet b1.58, arXiv 2402.17764, section 2). A row whose scale float32
    # cannot represent is left unchanged, and so is a row that is not finite.
    cdef Py_ssize_t i, j, whole = cols - cols % VF32_LANES, left = cols - whole
    cdef float *row
    cdef float top, row_scale, inverse, nonfinite
    cdef vf32 v, up, down
    START_TIMER(TIMER_QUANTIZE)
    for i in range(rows):
        row = x + i * cols
        top = largest_magnitude(row, cols, &nonfinite)
        row_scale = top / <float>127.0
        inverse = <float>127.0 / top
        if not (nonfinite == 0.0 and inverse < INFINITY
                and <float>127.0 * row_scale < INFINITY):
            continue
        up = vf32_splat(inverse)
        down = vf32_splat(row_scale)
        for j from 0 <= j < whole by VF32_LANES:
            vf32_store(row + j, vf32_mul(down, vf32_round(vf32_mul(up, vf32_load(row + j)))))
        if left:
            v = vf32_load_first(row + whole, left)
            vf32_store_first(row + whole, left, vf32_mul(down, vf32_round(vf32_mul(up, v))))
    STOP_TIMER(TIMER_QUANTIZE)


cdef inline float absolute_sum(const float *x, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i, whole = n - n % VF32_LANES
    cdef vf32 v, total = vf32_zero()
    cdef float rest = 0.0
    for i from 0 <= i < whole by VF32_LANES:
        v = vf32_load(x + i)
        total = vf32_add(total, vf32_max(v, vf32_sub(vf32_zero(), v)))
    for i in range(whole, n):
        rest += fabsf(x[i])
    return vf32_sum(total) + rest


cdef inline vf32 adamw_lanes(vf32 w, vf32 m, vf32 v, const Update *s) noexcept nogil:
    # w (1 - rate decay) - rate (m / c1) / (sqrt(v / c2) + epsilon)
    cdef vf32 bottom = vf32_add(vf32_sqrt(vf32_mul(v, vf32_splat(1.0 / s.correction2))),
                                vf32_splat(s.epsilon))
    cdef vf32 stride = vf32_div(vf32_mul(m, vf32_splat(s.learning_rate / s.correction1)), bottom)
    return vf32_sub(vf32_mul(w, vf32_splat(1.0 - s.learning_rate * s.weight_decay)), stride)


cdef void adamw(float *weights, float *first, float *second, const float *gradient,
                Py_ssize_t n, const Update *s) noexcept nogil:
    # One step of AdamW (Loshchilov & Hutter, arXiv 1711.05101, algorithm 2), in place.
    cdef Py_ssize_t i, left
    cdef vf32 g, m, v
    cdef vf32 b1 = vf32_splat(s.beta1), a1 = vf32_splat(1.0 - s.beta1)
    cdef vf32 b2 = vf32_splat(s.beta2), a2 = vf32_splat(1.0 - s.beta2)
    cdef vf32 factor = vf32_splat(s.gradient_scale)
    START_TIMER(TIMER_OPTIMIZER)
    for i from 0 <= i < n - n % VF32_LANES by VF32_LANES:
        g = vf32_mul(factor, vf32_load(gradient + i))
        m = vf32_fmadd(a1, g, vf32_mul(b1, vf32_load(first + i)))
        v = vf32_fmadd(a2, vf32_mul(g, g), vf32_mul(b2, vf32_load(second + i)))
        vf32_store(first + i, m)
        vf32_store(second + i, v)
        vf32_store(weights + i, adamw_lanes(vf32_load(weights + i), m, v, s))
    left = n % VF32_LANES
    if left:
        i = n - left
        g = vf32_mul(factor, vf32_load_first(gradient + i, left))
        m = vf32_fmadd(a1, g, vf32_mul(b1, vf32_load_first(first + i, left)))
        v = vf32_fmadd(a2, vf32_mul(g, g), vf32_mul(b2, vf32_load_first(second + i, left)))
        vf32_store_first(first + i, left, m)
        vf32_store_first(second + i, left, v)
        vf32_store_first(weights + i, left,
                         adamw_lanes(vf32_load_first(weights + i, left), m, v, s))
    STOP_TIMER(TIMER_OPTIMIZER)


cdef void sgd(float *weights, float *momentum, const float *gradient, Py_ssize_t n,
              const Update *s) noexcept nogil:
    # momentum <- mu momentum + g;  w <- (1 - rate decay) w - rate momentum (Sutskever et al. 2013,
    # equations 1 and 2, with the rate outside the sum)
    cdef Py_ssize_t i, whole = n - n % VF32_LANES, left = n - whole
    cdef vf32 m, mu = vf32_splat(s.momentum), factor = vf32_splat(s.gradient_scale)
    cdef vf32 keep = vf32_splat(1.0 - s.learning_rate * s.weight_decay)
    cdef vf32 rate = vf32_splat(-s.learning_rate)
    START_TIMER(TIMER_OPTIMIZER)
    for i from 0 <= i < whole by VF32_LANES:
        m = vf32_fmadd(mu, vf32_load(momentum + i), vf32_mul(factor, vf32_load(gradient + i)))
        vf32_store(momentum + i, m)
        vf32_store(weights + i, vf32_fmadd(rate, m, vf32_mul(keep, vf32_load(weights + i))))
    if left:
        i = whole
        m = vf32_fmadd(mu, vf32_load_first(momentum + i, left),
                       vf32_mul(factor, vf32_load_first(gradient + i, left)))
        vf32_store_first(momentum + i, left, m)
        vf32_store_first(weights + i, left,
                         vf32_fmadd(rate, m, vf32_mul(keep, vf32_load_first(weights + i, left))))
    STOP_TIMER(TIMER_OPTIMIZER)


# ---------------------------------------------------------------------------------------------
# The peak performance of the CPU, to compare kernels with

cdef enum:
    CHAINS = 12             # independent chains of additions


cdef float peak_fused(Py_ssize_t rounds) noexcept nogil:
    # rounds * CHAINS fused multiply-adds of vectors, in registers only.
    cdef vf32 total[CHAINS]
    cdef vf32 a = vf32_splat(0.999), b = vf32_splat(1e-3)
    cdef Py_ssize_t _round, i
    for i in range(CHAINS):
        total[i] = vf32_splat(<float>i)
    for _round in range(rounds):
        for i in range(CHAINS):
            total[i] = vf32_fmadd(total[i], a, b)
    for i in range(1, CHAINS):
        total[0] = vf32_add(total[0], total[i])
    return vf32_sum(total[0])


cdef void peak_dot(Py_ssize_t rounds) noexcept nogil:
    peak_of_dots(rounds)


cdef float peak_read(const float *x, Py_ssize_t n) noexcept nogil:
    # Reads n floats once.
    cdef vf32 total[CHAINS]
    cdef Py_ssize_t i, j, whole = n - n % (CHAINS * VF32_LANES)
    for j in range(CHAINS):
        total[j] = vf32_zero()
    for i from 0 <= i < whole by CHAINS * VF32_LANES:
        for j in range(CHAINS):
            total[j] = vf32_add(total[j], vf32_load(x + i + j * VF32_LANES))
    for j in range(1, CHAINS):
        total[0] = vf32_add(total[0], total[j])
    return vf32_sum(total[0]) + sum(x + whole, n - whole)


# ---------------------------------------------------------------------------------------------
# The table

cdef int measuring() noexcept nogil:
    return MEASURING


cdef const char *timer_name(int timer) noexcept nogil:
    return timer_label(timer)


cdef unsigned long long timer_calls(int timer) noexcept nogil:
    return timer_read(timer).calls


cdef unsigned long long timer_nanoseconds(int timer) noexcept nogil:
    return timer_read(timer).nanoseconds


cdef KernelTable kernels

simd_prepare()
kernels.name = TIER_NAME
kernels.peak_floats = CHAINS * VF32_LANES
kernels.peak_products = PEAK_SUMS * PEAK_PRODUCTS
kernels.workspace_floats = (PACK_RIGHT + PACK_LEFT + VF32_LANES
                            + panels.columns + TILE_COLUMNS)
kernels.workspace_floats = max(kernels.workspace_floats, BF16_WORKSPACE)
kernels.add = add
kernels.add_scaled = add_scaled
kernels.multiply = multiply
kernels.scale = scale
kernels.shift = shift
kernels.divide = divide
kernels.exp = exponential
kernels.sum = sum
kernels.largest = largest
kernels.select = select
kernels.dot = dot
kernels.sum_of_squares = sum_of_squares
kernels.column_sums = column_sums
kernels.activate = activate
kernels.activate_backward = activate_backward
kernels.gate = gate
kernels.gate_backward = gate_backward
kernels.softmax = softmax
kernels.cross_entropy = cross_entropy
kernels.layer_norm = layer_norm
kernels.layer_norm_backward = layer_norm_backward
kernels.rotary = rotary
kernels.matrix_vector = matrix_vector
kernels.matrix_transpose_vector = matrix_transpose_vector
kernels.matmul = matmul
kernels.linear = linear
kernels.linear_backward = linear_backward
kernels.weight_gradient = weight_gradient
kernels.attention = attention
kernels.cached_attention = cached_attention
kernels.attention_backward = attention_backward
kernels.quantize = quantize
kernels.fake_quantize_rows = fake_quantize_rows
kernels.quantize_rows = quantize_rows
kernels.packed_product = packed_product
kernels.int8_rows_product = int8_rows_product
kernels.adamw = adamw
kernels.sgd = sgd
kernels.peak_fused = peak_fused
kernels.peak_dot = peak_dot
kernels.peak_read = peak_read
kernels.measuring = measuring
kernels.timer_name = timer_name
kernels.timer_calls = timer_calls
kernels.timer_nanoseconds = timer_nanoseconds
kernels.timers = TIMER_COUNT

table = PyCapsule_New(&kernels, "legacy1bit.kernels", NULL)

# The same with linear maps of codes in int8.
cdef KernelTable int8_kernels = kernels

int8_kernels.linear = int8_linear
int8_kernels.linear_backward = int8_linear_backward
int8_kernels.weight_gradient = int8_weight_gradient

int8_table = PyCapsule_New(&int8_kernels, "legacy1bit.kernels", NULL)
