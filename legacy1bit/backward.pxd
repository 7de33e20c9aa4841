"""The backward pass without the GIL. Gradients of weights accumulate; gradients of activations
are overwritten unless a comment says otherwise."""

from legacy1bit.forward cimport Extent, ModelContext
from legacy1bit.model cimport (
    AttentionGradient, AttentionView, BlockContext, BlockGradient, BlockView, FeedForwardContext,
    FeedForwardGradient, FeedForwardView, ModelGradient, ModelView,
)

cdef struct BackwardRoom:
    # What the blocks' backward passes use in turn; M = B T rows.
    float *d_x              # [M, C], the gradient on its way down the residual stream
    float *d_norm           # [M, C]
    float *d_heads          # [M, C]
    float *d_q              # [M, C]
    float *d_k
    float *d_v
    float *d_hidden         # [M, F]
    float *d_wide           # [M, F], where layers have a norm before wo; else NULL
    float *d_probs          # [T, T]

cdef void backward_attend(const AttentionView *layer, const Extent *extent, const float *d_out,
                          const float *x, const BlockContext *context,
                          AttentionGradient *gradient, const BackwardRoom *room, float *d_x,
                          float *workspace) noexcept nogil
cdef void backward_ffn(const FeedForwardView *layer, Py_ssize_t rows, const float *d_out,
                       const float *x, const FeedForwardContext *context,
                       FeedForwardGradient *gradient, const BackwardRoom *room, float *d_x,
                       float *workspace) noexcept nogil
cdef void backward_transform(const BlockView *block, const Extent *extent,
                             const BlockContext *context, BlockGradient *gradient,
                             const BackwardRoom *room, float *workspace) noexcept nogil
cdef double backward_model(const ModelView *model, const Extent *extent, const int *tokens,
                           const int *targets, float gradient_scale, ModelContext *context,
                           ModelGradient *gradient, const BackwardRoom *room,
                           float *workspace) noexcept nogil
