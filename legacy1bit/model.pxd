"""The structures a model is made of, for code that runs without the GIL.

The structs hold borrowed pointers; the classes own the arrays behind them. Every weight struct has
a gradient struct of the same shape.
"""

from legacy1bit.kernels cimport Rotary
from legacy1bit.math_ops cimport kernels
from legacy1bit.projection cimport Demand, Projection, Workspace

cdef struct NormView:
    const float *gamma      # [C]; NULL without a norm
    const float *beta       # [C]; NULL without a bias
    float epsilon
    bint rms                # RMS norm, else layer norm

cdef struct AttentionView:
    Projection wq, wk, wv, wo   # [H D, C], [G D, C], [G D, C], [C, H D]
    Py_ssize_t num_heads    # H, of queries
    Py_ssize_t num_kv_heads     # G, of keys and values
    Py_ssize_t head_dim     # D
    Py_ssize_t window       # how many tokens back a token sees, itself included; 0: all
    Rotary rotary
    NormView q_norm, k_norm     # of each head, [D]
    NormView norm           # before wo
    bint int8_activations   # inputs of its matrices are quantized to int8

cdef struct FeedForwardView:
    Projection wg, wi       # [F, C]; the gate has no rows where there is none
    Projection wo           # [C, F]
    int activation          # RELU and so on
    NormView norm           # before wo
    bint int8_activations   # inputs of its matrices are quantized to int8

cdef struct BlockView:
    AttentionView attention
    FeedForwardView ffn
    NormView norm1, norm2

cdef struct ModelView:
    Projection embedding    # [V, C]; its bias is NULL
    BlockView *blocks
    Py_ssize_t num_blocks
    NormView final_norm
    Projection output       # [V, C]
    bint int8_activations   # inputs of the output matrix are quantized to int8
    Demand demand           # of a pass, on its scratch

cdef struct NormGradient:
    float *gamma
    float *beta

cdef struct AttentionGradient:
    float *wq
    float *wk
    float *wv
    float *wo
    float *bq
    float *bk
    float *bv
    float *bo
    NormGradient q_norm, k_norm, norm

cdef struct FeedForwardGradient:
    float *wg
    float *wi
    float *wo
    float *bg
    float *bi
    float *bo
    NormGradient norm

cdef struct BlockGradient:
    AttentionGradient attention
    FeedForwardGradient ffn
    NormGradient norm1, norm2

cdef struct ModelGradient:
    float *embedding
    BlockGradient *blocks
    NormGradient final_norm
    float *output
    float *output_bias

cdef struct FeedForwardContext:
    # The activations of a feed-forward layer, M = B T rows each.
    float *gate             # [M, F], wg x + bg; NULL without a gate
    float *hidden           # [M, F] before the activation, or what the gate multiplies
    float *activated        # [M, F] after it
    float *normed           # [M, F], the input of wo; `activated` itself without a norm
    float *mean
    float *inv_std

cdef struct BlockContext:
    # The activations of one block, M = B T rows each; see TransformerBlockContext.
    float *input
    float *output
    float *norm1
    float *mean1
    float *inv_std1
    float *q                # [M, H D]
    float *k                # [M, G D]
    float *v                # [M, G D]
    float *q_linear         # q before its norm; q itself without one
    float *k_linear
    float *q_inv_std        # [M, H]
    float *k_inv_std        # [M, G]
    float *probs            # [B, H, T, keys]
    float *heads            # [M, H D]
    float *heads_normed     # [M, H D], the input of wo; `heads` itself without a norm
    float *heads_mean
    float *heads_inv_std
    float *residual
    float *norm2
    float *mean2
    float *inv_std2
    FeedForwardContext ffn


cdef class WeightMatrix:
    # A matrix in another form than an array of floats.
    cdef int fill(self, Projection *view) except -1


cdef class TernaryMatrix(WeightMatrix):
    cdef object codes
    cdef readonly object scales
    cdef readonly Py_ssize_t group
    cdef bint freed
    cdef int reach


cdef class LayerNorm:
    cdef readonly object gamma, beta
    cdef NormView view


cdef inline void normalize(const NormView *norm, const float *x, float *out, float *mean,
                           float *inv_std, Py_ssize_t rows, Py_ssize_t cols) noexcept nogil:
    if norm.rms:
        mean = NULL
    kernels().layer_norm(x, norm.gamma, norm.beta, norm.epsilon, out, mean, inv_std, rows, cols)


cdef inline void normalize_backward(const NormView *norm, const float *d_out, const float *x,
                                    const float *mean, const float *inv_std, float *d_x,
                                    const NormGradient *gradient, Py_ssize_t rows,
                                    Py_ssize_t cols) noexcept nogil:
    # Adds to d_x.
    if norm.rms:
        mean = NULL
    kernels().layer_norm_backward(d_out, x, norm.gamma, mean, inv_std, d_x, gradient.gamma,
                                  gradient.beta, rows, cols)


cdef class MultiHeadAttention:
    cdef readonly object wq, wk, wv, wo, bq, bk, bv, bo, rotary
    cdef readonly Py_ssize_t num_heads, num_kv_heads, head_dim, window
    cdef readonly LayerNorm q_norm, k_norm, norm
    cdef AttentionView view
    cdef int fill_rotary(self, Py_ssize_t length) except -1


cdef class FeedForward:
    cdef readonly object wg, bg, wi, bi, wo, bo
    cdef readonly str activation
    cdef readonly LayerNorm norm
    cdef FeedForwardView view


cdef class TransformerBlock:
    cdef readonly MultiHeadAttention attention
    cdef readonly FeedForward ffn
    cdef readonly LayerNorm norm1, norm2
    cdef BlockView view


cdef class LegacyLLM:
    cdef readonly object config
    cdef readonly dict parameters
    cdef readonly list blocks
    cdef readonly LayerNorm final_norm
    cdef readonly bint full_precision
    cdef readonly object adapter        # AdapterConfig or None
    cdef readonly object learned        # list of Parameter, or None
    cdef readonly object pairs          # dict of (A, B) of an adapter by matrix, or None
    cdef public object provenance
    cdef object codes, scales, weights, quantized_parts, blended
    cdef bint blends
    cdef Py_ssize_t quantized_size, total_size
    cdef ModelView view
    cdef int _point_demand(self) except -1
    cdef int _point_adapter(self, str prefix, MultiHeadAttention attention,
                            FeedForward ffn) except -1
    cdef ModelView *alive(self) except NULL


cdef class LegacyLLMGradients:
    cdef readonly object config, adapter
    cdef readonly dict parameters
    cdef readonly object flat
    cdef object unused      # receives the gradients of norms that do not learn
    cdef ModelGradient view
    cdef float *_pointer(self, str name) except NULL
    cdef ModelGradient *alive(self) except NULL


cdef class TransformerBlockContext:
    cdef readonly dict arrays, axes
    cdef readonly set options
    cdef BlockContext view

cdef Py_ssize_t offset(const void *start, const void *field) noexcept nogil
cdef dict allocate(void *view, list fields, dict axes)
cdef object allocated_bytes(list fields, dict axes)
cdef list chosen_fields(list table, options)
cdef list block_fields(options)
cdef TransformerBlockContext context_of(config, batch_size, time)
cdef TransformerBlockContext context_for(MultiHeadAttention attention, FeedForward ffn, batch,
                                         time)
cdef int check_context(TransformerBlockContext context, MultiHeadAttention attention,
                       FeedForward ffn, batch, time) except -1
cdef int fill_rotary_view(Rotary *view, object table, Py_ssize_t head_dim) except -1
cdef int point_adapter(Projection *projection, str name, a, b, float scale,
                       unsigned int stream) except -1
cdef int point_gradients(BlockGradient *block, dict arrays) except -1
cdef float *float_pointer(object array) except NULL
cdef int fill_projection(Projection *view, object weights, str name) except -1
cdef const float *optional_vector(object array, Py_ssize_t size, str name) except? NULL
cdef int reserve_for(Workspace *workspace, const AttentionView *attention,
                     const FeedForwardView *ffn, Py_ssize_t rows) except -1
cdef const float *vector_pointer(object array, Py_ssize_t size, str name) except NULL
cdef float *gradient_pointer(object array, tuple shape, str name) except NULL
