"""The forward pass without the GIL."""

from legacy1bit.model cimport (
    AttentionView, BlockContext, BlockView, FeedForwardContext, FeedForwardView, LegacyLLM,
    ModelView,
)
from legacy1bit.kernels cimport Attention
from legacy1bit.projection cimport Projection, Workspace

cdef struct BatchShape:
    # The positions of a pass: `time` tokens of each of `batch` sequences.
    Py_ssize_t batch
    Py_ssize_t time
    const unsigned char *allowed        # uint8[B, T], 0 at padding; NULL: no padding
    const int *starts       # int32[B, T], see document_starts; NULL: a row is one document

cdef struct ModelContext:
    BlockContext *blocks
    bint recomputed         # gradient checkpointing: only the blocks' inputs are kept
    float *normed           # [M, C] after the final norm; the last block's output without one
    float *mean             # [M] of the final norm
    float *inv_std
    float *logits           # [M, V]

cdef void fill_head(const AttentionView *layer, const BatchShape *dims,
                    const BlockContext *context, Py_ssize_t sequence, Py_ssize_t index,
                    Attention *head) noexcept nogil
cdef void rotate(const AttentionView *layer, const BatchShape *dims, float direction, float *q,
                 float *k) noexcept nogil
cdef void embed(const Projection *embedding, const int *tokens, Py_ssize_t rows, float *out,
                const Workspace *workspace) noexcept nogil
cdef void attend(const AttentionView *layer, const BatchShape *dims, float *x,
                 BlockContext *context, float *out, const Workspace *workspace) noexcept nogil
cdef void activate(const FeedForwardView *layer, Py_ssize_t rows,
                   FeedForwardContext *context) noexcept nogil
cdef void feed_forward(const FeedForwardView *layer, Py_ssize_t rows, float *x,
                       FeedForwardContext *context, float *out,
                       const Workspace *workspace) noexcept nogil
cdef void transform(const BlockView *block, const BatchShape *dims, BlockContext *context,
                    const Workspace *workspace) noexcept nogil
cdef void run_model(const ModelView *model, const BatchShape *dims, const int *tokens,
                    ModelContext *context, const Workspace *workspace) noexcept nogil


cdef class ForwardContext:
    cdef readonly object config
    cdef readonly list blocks
    cdef list inputs
    cdef readonly object normed, mean, inv_std, logits
    cdef readonly Py_ssize_t batch_size, time
    cdef ModelContext view


cdef class FeedForwardWorkspace:
    cdef list arrays
    cdef FeedForwardContext view


cdef int check_tokens(LegacyLLM model, const int[:, ::1] tokens, str name) except -1
