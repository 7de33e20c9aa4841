"""Models for decoding, for code that runs without the GIL."""

from legacy1bit.kernels cimport Int8Rows, Matrix, PackedMatrix as PackedView, Rotary
from legacy1bit.model cimport NormView

cdef struct Projection:
    # One linear map: packed codes, int8, or, if packed.tiles and int8.codes are NULL, dense floats.
    PackedView packed
    Int8Rows int8
    Matrix dense
    Py_ssize_t rows
    Py_ssize_t cols
    const float *bias

cdef struct PackedBlock:
    Projection wq, wk, wv, wo, wg, wi, wo_ffn   # wg has no rows where there is no gate
    NormView norm1, norm2, q_norm, k_norm, heads_norm, hidden_norm
    Py_ssize_t window       # attention window: tokens that a token sees, itself included; 0: all

cdef struct PackedModelView:
    Projection embedding    # [V, C]; its bias is NULL
    PackedBlock *blocks
    Py_ssize_t num_blocks
    Py_ssize_t num_heads    # of queries
    Py_ssize_t num_kv_heads
    Py_ssize_t head_dim
    int activation          # RELU and so on
    Rotary rotary
    NormView final_norm
    Projection output       # [V, C]


cdef class PackedMatrix:
    cdef readonly object tiles, scales
    cdef readonly tuple shape, levels
    cdef readonly Py_ssize_t group
    cdef readonly bint trits
    cdef PackedView view
    cdef int _pack(self, write, buffer, threads) except -1
    cdef int _point(self) except -1


cdef class PackedModel:
    cdef readonly object config
    cdef readonly object parameters
    cdef readonly object rotary
    cdef PackedModelView view
    cdef int _projection(self, str name, str bias, Projection *view) except -1
    cdef int _norm(self, str gamma, str beta, NormView *view) except -1


cdef class Int8Matrix:
    cdef object codes, sums
    cdef readonly object scales
    cdef readonly tuple shape
    cdef Int8Rows view

cdef void unpack_codes(const PackedView *matrix, Py_ssize_t row, signed char *codes) noexcept nogil
cdef void unpack_row(const PackedView *matrix, Py_ssize_t row, float *out,
                     signed char *codes) noexcept nogil
