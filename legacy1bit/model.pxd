"""The structures a model is made of, for code that runs without the GIL.

The structs hold borrowed pointers; the classes own the arrays behind them. Every weight struct has
a gradient struct of the same shape.
"""

from legacy1bit.kernels cimport Matrix

cdef struct NormView:
    const float *gamma      # [C]; NULL without a norm
    const float *beta       # [C]

cdef struct AttentionView:
    Matrix wq, wk, wv, wo   # [C, C]
    const float *bq         # [C]
    const float *bk
    const float *bv
    const float *bo
    Py_ssize_t num_heads
    Py_ssize_t window       # how many tokens back a token sees, itself included; 0: all
    const float *cosines    # [length, D / 2]; NULL without rotary positions
    const float *sines
    Py_ssize_t length       # rows of those tables
    NormView norm           # before wo
    bint int8_activations   # inputs of its matrices are quantized to int8

cdef struct FeedForwardView:
    Matrix wi               # [F, C]
    Matrix wo               # [C, F]
    const float *bi         # [F]
    const float *bo         # [C]
    int activation          # RELU or RELU2
    NormView norm           # before wo
    bint int8_activations   # inputs of its matrices are quantized to int8

cdef struct BlockView:
    AttentionView attention
    FeedForwardView ffn
    NormView norm1, norm2

cdef struct ModelView:
    Matrix embedding        # [V, C]
    BlockView *blocks
    Py_ssize_t num_blocks
    NormView final_norm
    Matrix output           # [V, C]
    const float *output_bias    # [V]; NULL without a bias
    bint int8_activations   # inputs of the output matrix are quantized to int8

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
    NormGradient norm

cdef struct FeedForwardGradient:
    float *wi
    float *wo
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
    float *hidden           # [M, F] before the activation
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
    float *q
    float *k
    float *v
    float *probs            # [B, H, T, keys]
    float *heads
    float *heads_normed     # [M, C], the input of wo; `heads` itself without a norm
    float *heads_mean
    float *heads_inv_std
    float *residual
    float *norm2
    float *mean2
    float *inv_std2
    FeedForwardContext ffn


cdef class TernaryMatrix:
    cdef object codes
    cdef readonly object scales
    cdef readonly Py_ssize_t group
    cdef bint freed
    cdef int reach
    cdef int fill(self, Matrix *view) except -1


cdef class LayerNorm:
    cdef readonly object gamma, beta
    cdef NormView view


cdef class MultiHeadAttention:
    cdef readonly object wq, wk, wv, wo, bq, bk, bv, bo, rotary
    cdef readonly Py_ssize_t num_heads, window
    cdef readonly LayerNorm norm
    cdef AttentionView view
    cdef int fill_rotary(self, Py_ssize_t length) except -1


cdef class FeedForward:
    cdef readonly object wi, bi, wo, bo
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
    cdef public object provenance
    cdef object codes, scales, weights, quantized_parts
    cdef Py_ssize_t quantized_size, total_size
    cdef ModelView view
    cdef ModelView *alive(self) except NULL


cdef class LegacyLLMGradients:
    cdef readonly object config
    cdef readonly dict parameters
    cdef readonly object flat
    cdef ModelGradient view
    cdef float *_pointer(self, str name) except NULL
    cdef ModelGradient *alive(self) except NULL


cdef class TransformerBlockContext:
    cdef readonly dict arrays
    cdef BlockContext view

cdef Py_ssize_t offset(const void *start, const void *field) noexcept nogil
cdef dict allocate(void *view, list fields, dict axes)
cdef object allocated_bytes(list fields, dict axes)
cdef list block_fields(bint sub_norm)
cdef int point_gradients(BlockGradient *block, dict arrays) except -1
cdef int check_context(TransformerBlockContext context, batch, time, dim, ffn, heads,
                       sub_norm) except -1
cdef float *float_pointer(object array) except NULL
cdef int fill_matrix(Matrix *view, object weights, str name) except -1
cdef const float *vector_pointer(object array, Py_ssize_t size, str name) except NULL
cdef float *gradient_pointer(object array, tuple shape, str name) except NULL
