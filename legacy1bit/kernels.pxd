"""The table of kernels that every instruction set fills in.

``kernels.pyx`` is compiled once for each instruction set; each of those modules exports one
``KernelTable``, and another whose linear maps of codes are products in int8. ``math_ops`` selects
the table at import, and everything above it calls through ``math_ops.kernels()``. Kernels do not
check their arguments and do not need the GIL.
"""

cdef extern from "layout.h":
    enum:
        STRIP_ROWS
        TILE_ROW_BYTES
        TILE_BYTES
        CODES_PER_BYTE
        TRITS_PER_BYTE
        TILE_CODES
        TILE_TRITS
        ACTIVATION_ROWS
        ACTIVATION_COLUMNS
        KEY_TILE
        CACHED_QUERIES

cdef struct Matrix:
    # The weights of one linear map, [rows, cols] row-major: int8 codes times scales, or, where
    # codes is NULL, dense float32. The scale of code (i, j) is scale[i * scale_row + j / group].
    Py_ssize_t rows
    Py_ssize_t cols
    const signed char *codes
    const float *scale
    Py_ssize_t scale_row      # scales per row; 0 with one scale for all rows
    Py_ssize_t group          # consecutive weights of a row that share a scale
    const float *dense
    int reach                 # codes are -1 to 1, or -3, -1, 1 and 3; 0: others

cdef struct Operand:
    # A factor of a matrix product: element (i, j) is data[i * row + j * col], or that weight of a
    # matrix of codes, which may be transposed.
    const float *data
    Py_ssize_t row
    Py_ssize_t col
    const Matrix *codes       # NULL: data
    bint transposed

cdef inline Operand strided(const float *data, Py_ssize_t row, Py_ssize_t col) noexcept nogil:
    cdef Operand operand
    operand.data = data
    operand.row = row
    operand.col = col
    operand.codes = NULL
    operand.transposed = False
    return operand

cdef struct PackedMatrix:
    # The same for decoding: codes in tiles (see simd.h), in consecutive strips of STRIP_ROWS rows.
    # A code u stands for factor * u + offset, times its scale.
    Py_ssize_t rows
    Py_ssize_t cols
    const unsigned char *tiles
    bint trits                # tiles of TILE_TRITS columns, with at most one scale per row
    int factor
    int offset
    const float *scale
    Py_ssize_t scale_row      # as in a Matrix
    Py_ssize_t group

cdef struct Int8Rows:
    # Rows of int8 activations, or of weights: row t is scales[t] times its codes, whose sum is
    # sums[t]. They are padded with zeros to ACTIVATION_ROWS and ACTIVATION_COLUMNS.
    Py_ssize_t stride         # from row to row; at least TILE_TRITS - 1 zeros follow the columns
    signed char *codes
    float *scales
    int *sums

cdef struct Scheme:
    # The rule by which weights become codes; see schemes.py.
    bint median
    float factor
    float threshold
    signed char inner
    signed char outer

cdef struct Rotary:
    # Rotary positions: position t rotates pair i of a head's first `dim` elements by the angle
    # with cosines[t dim / 2 + i]; YaRN scales both tables.
    const float *cosines      # [length, dim / 2]; NULL: none
    const float *sines
    Py_ssize_t length
    Py_ssize_t dim
    bint adjacent             # pairs are elements 2 i and 2 i + 1, else i and i + dim / 2

cdef struct Attention:
    # One head of one sequence. Rows of q and the outputs are `stride` floats apart, those of v
    # and of the gradients of k and v `kv_stride`.
    Py_ssize_t queries        # rows of q
    Py_ssize_t keys           # rows of k and v; the last `queries` of them belong to the queries
    Py_ssize_t head_dim
    Py_ssize_t stride
    Py_ssize_t kv_stride
    Py_ssize_t k_key          # in the forward pass dimension i of key j is k[j k_key + i k_dim]
    Py_ssize_t k_dim
    Py_ssize_t window         # attention window: keys that a query sees, itself included; 0: all
    const unsigned char *allowed    # uint8[keys], 0 at padding; NULL: no padding
    const int *starts         # int32[queries], nondecreasing: the first key of each; NULL: all 0
    const float *q
    const float *k
    const float *v
    float *out
    float *probs              # float32[queries, keys]
    # For the backward pass:
    const float *d_out
    float *d_q
    float *d_k
    float *d_v
    bint accumulate_kv        # add to d_k and d_v: another head has used the same keys
    float *d_probs            # scratch, float32[queries, keys]

cdef struct CachedHead:
    # Queries that share cached int8 keys and values: those of consecutive tokens, or of one token's
    # heads. Rows of q and out are `stride` floats apart.
    Py_ssize_t queries        # at most CACHED_QUERIES
    Py_ssize_t keys           # of the first query
    Py_ssize_t step           # further keys that each query sees: 1 of tokens, 0 of heads
    Py_ssize_t skipped        # keys at the front of the first tile that no query sees
    Py_ssize_t head_dim
    Py_ssize_t stride
    Py_ssize_t probs_stride   # floats in a row of probs, a multiple of the tiles of keys
    const float *q
    const signed char *k      # tiles of keys, [dimension / 2, KEY_TILE, 2]
    const signed char *v      # values of the same keys, [key / 2, dimension, 2]
    const float *k_scales     # from the first visible key on
    const float *v_scales
    float *probs              # float32[queries, probs_stride], scratch
    short *codes              # int16[queries, codes_stride], scratch
    Py_ssize_t codes_stride   # KEY_TILE more than the keys in tiles, or the head's dimension
    float *out

cdef struct Update:
    # One step of an optimizer.
    float learning_rate
    float beta1
    float beta2
    float epsilon
    float weight_decay
    float correction1         # 1 - beta1^step
    float correction2         # 1 - beta2^step
    float gradient_scale      # multiplies every gradient first (clipping)
    float momentum            # for SGD, which uses neither beta

# The activations of the feed-forward layer; ``ACTIVATIONS`` in model.pyx has their names.
cdef enum:
    RELU
    RELU2
    SILU
    GELU

cdef struct KernelTable:
    const char *name
    Py_ssize_t peak_floats          # fused multiply-adds in a round of peak_fused
    Py_ssize_t peak_products        # products of integers in a round of peak_dot
    Py_ssize_t workspace_floats     # scratch that a thread needs for matmul and attention

    void (*add)(float *x, const float *y, Py_ssize_t n) noexcept nogil
    void (*add_scaled)(float *x, float scale, const float *y, Py_ssize_t n) noexcept nogil
    void (*multiply)(float *x, const float *y, Py_ssize_t n) noexcept nogil
    void (*scale)(float *x, float scale, Py_ssize_t n) noexcept nogil
    void (*shift)(float *x, float shift, Py_ssize_t n) noexcept nogil
    void (*divide)(float *x, float divisor, Py_ssize_t n) noexcept nogil
    void (*exp)(float *x, Py_ssize_t n) noexcept nogil
    float (*sum)(const float *x, Py_ssize_t n) noexcept nogil
    float (*largest)(const float *x, Py_ssize_t n) noexcept nogil
    Py_ssize_t (*select)(const float *x, Py_ssize_t n, float bound, int *indices) noexcept nogil
    float (*dot)(const float *x, const float *y, Py_ssize_t n) noexcept nogil
    double (*sum_of_squares)(const float *x, Py_ssize_t n) noexcept nogil
    void (*column_sums)(const float *x, Py_ssize_t rows, Py_ssize_t cols,
                        float *sums) noexcept nogil

    void (*activate)(int activation, const float *x, float *out, Py_ssize_t n) noexcept nogil
    void (*activate_backward)(int activation, const float *x, const float *d_out, float *d_x,
                              Py_ssize_t n) noexcept nogil
    void (*gate)(int activation, const float *gate, const float *x, float *out,
                 Py_ssize_t n) noexcept nogil
    void (*gate_backward)(int activation, const float *gate, const float *x, const float *d_out,
                          float *d_gate, float *d_x, Py_ssize_t n) noexcept nogil

    void (*softmax)(float *x, Py_ssize_t rows, Py_ssize_t cols) noexcept nogil
    double (*cross_entropy)(float *logits, const int *targets, Py_ssize_t rows,
                            Py_ssize_t cols, float gradient_scale) noexcept nogil

    void (*layer_norm)(const float *x, const float *gamma, const float *beta, float epsilon,
                       float *out, float *mean, float *inv_std,
                       Py_ssize_t rows, Py_ssize_t cols) noexcept nogil
    void (*layer_norm_backward)(const float *d_out, const float *x, const float *gamma,
                                const float *mean, const float *inv_std,
                                float *d_x, float *d_gamma, float *d_beta,
                                Py_ssize_t rows, Py_ssize_t cols) noexcept nogil

    void (*rotary)(const Rotary *table, Py_ssize_t position, float direction, float *x,
                   Py_ssize_t rows, Py_ssize_t stride, Py_ssize_t heads,
                   Py_ssize_t head_dim) noexcept nogil

    void (*matrix_vector)(const Matrix *matrix, const float *x, float *out) noexcept nogil
    void (*matrix_transpose_vector)(const Matrix *matrix, const float *x,
                                    float *out) noexcept nogil

    void (*matmul)(Py_ssize_t m, Py_ssize_t n, Py_ssize_t k, Operand a, Operand b,
                   const float *bias, bint accumulate, float *c, Py_ssize_t c_row,
                   float *workspace) noexcept nogil
    void (*linear)(const Matrix *matrix, const float *bias, const float *x, Py_ssize_t rows,
                   float *out, float *workspace) noexcept nogil
    void (*linear_backward)(const Matrix *matrix, const float *d_out, Py_ssize_t rows,
                            bint accumulate, float *d_x, float *workspace) noexcept nogil
    void (*weight_gradient)(const Matrix *matrix, const float *d_out, const float *x,
                            Py_ssize_t rows, float *d_weight, float *workspace) noexcept nogil

    void (*attention)(const Attention *head, float *workspace) noexcept nogil
    void (*cached_attention)(const CachedHead *head) noexcept nogil
    void (*attention_backward)(const Attention *head, float *workspace) noexcept nogil

    float (*quantize)(const float *weights, Py_ssize_t n, const Scheme *scheme, float fixed,
                      signed char *codes, float *scratch) noexcept nogil
    void (*fake_quantize_rows)(float *x, Py_ssize_t rows, Py_ssize_t cols) noexcept nogil
    void (*quantize_rows)(const float *x, Py_ssize_t rows, Py_ssize_t cols,
                          const Int8Rows *out) noexcept nogil
    void (*packed_product)(const PackedMatrix *matrix, Py_ssize_t first, Py_ssize_t last,
                           const Int8Rows *x, Py_ssize_t rows, const float *bias, bint accumulate,
                           float *out, Py_ssize_t out_row, float *workspace) noexcept nogil
    void (*int8_rows_product)(const Int8Rows *matrix, Py_ssize_t first, Py_ssize_t last,
                              Py_ssize_t cols, const Int8Rows *x, Py_ssize_t rows,
                              const float *bias, float *out, Py_ssize_t out_row) noexcept nogil
    void (*adamw)(float *weights, float *first, float *second, const float *gradient,
                  Py_ssize_t n, const Update *settings) noexcept nogil
    void (*sgd)(float *weights, float *momentum, const float *gradient, Py_ssize_t n,
                const Update *settings) noexcept nogil

    float (*peak_fused)(Py_ssize_t rounds) noexcept nogil
    void (*peak_dot)(Py_ssize_t rounds) noexcept nogil
    float (*peak_read)(const float *x, Py_ssize_t n) noexcept nogil

    int (*measuring)() noexcept nogil
    const char *(*timer_name)(int timer) noexcept nogil
    unsigned long long (*timer_calls)(int timer) noexcept nogil
    unsigned long long (*timer_nanoseconds)(int timer) noexcept nogil
    int timers
