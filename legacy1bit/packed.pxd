"""Models for decoding, for code that runs without the GIL."""

from legacy1bit.kernels cimport Int8Rows, PackedMatrix as PackedView, Rotary
from legacy1bit.model cimport NormView, WeightMatrix
from legacy1bit.projection cimport Demand, Projection

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
    Demand demand           # of a pass with float activations or an adapter, on its scratch


cdef class PackedMatrix(WeightMatrix):
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
    cdef readonly object adapter
    cdef PackedModelView view
    cdef int _connect(self) except -1
    cdef int _projection(self, str name, str bias, Projection *view) except -1
    cdef int _norm(self, str gamma, str beta, NormView *view) except -1


cdef class Int8Matrix(WeightMatrix):
    cdef object sums
    cdef readonly object codes, scales
    cdef readonly tuple shape
    cdef Int8Rows view
