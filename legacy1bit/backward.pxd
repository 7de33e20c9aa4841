"""The backward pass without the GIL. Gradients of weights accumulate; gradients of activations
are overwritten unless a comment says otherwise."""

from legacy1bit.forward cimport BatchShape, ModelContext
from legacy1bit.model cimport (
    AttentionGradient, AttentionView, BlockContext, BlockGradient, BlockView, FeedForwardContext,
    FeedForwardGradient, FeedForwardView, ModelGradient, ModelView,
)

from legacy1bit.projection cimport Workspace

cdef struct BackwardWorkspace:
    # Gradients of activations, which all blocks reuse; M = B T rows.
    float *d_x              # [M, C], the gradient on its way down the residual stream
    float *d_norm           # [M, C]
    float *d_heads          # [M, H D]
    float *d_q              # [M, H D]
    float *d_k              # [M, G D]
    float *d_v              # [M, G D]
    float *d_k_linear       # [M, G D], before the keys' norm; NULL without one
    float *d_hidden         # [M, F]
    float *d_gate           # [M, F]; NULL without a gate
    float *d_hidden_normed  # [M, F] if layers have a norm before wo, else NULL
    float *d_probs          # [T, T]

cdef struct Distillation:
    # A teacher, from which a model learns beside the text.
    float *logits           # [B, T, V]; NULL without a teacher
    float weight            # of its term in the loss, 0 to 1
    float temperature

cdef void backward_attend(const AttentionView *layer, const BatchShape *dims, const float *d_out,
                          const float *x, const BlockContext *context,
                          AttentionGradient *gradient, const BackwardWorkspace *buffers,
                          float *d_x, const Workspace *workspace) noexcept nogil
cdef void backward_ffn(const FeedForwardView *layer, Py_ssize_t rows, const float *d_out,
                       const float *x, const FeedForwardContext *context,
                       FeedForwardGradient *gradient, const BackwardWorkspace *buffers, float *d_x,
                       const Workspace *workspace) noexcept nogil
cdef void backward_transform(const BlockView *block, const BatchShape *dims,
                             const BlockContext *context, BlockGradient *gradient,
                             const BackwardWorkspace *buffers,
                             const Workspace *workspace) noexcept nogil
cdef double backward_model(const ModelView *model, const BatchShape *dims, const int *tokens,
                           const int *targets, float gradient_scale, const Distillation *teacher,
                           ModelContext *context, ModelGradient *gradient,
                           const BackwardWorkspace *buffers,
                           const Workspace *workspace) noexcept nogil
