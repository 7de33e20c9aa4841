"""The backward pass (C: ``backward.c``).

The gradient of x is named d_x. Gradients of weights accumulate, as in C, so that a batch can be
processed in parts. As in ``forward``, each layer comes as a ``cdef`` function that trusts its
arguments and as the checked function of the C original's name.
"""

import numpy as np

from libc.math cimport log
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

from legacy1bit.forward cimport (
    BatchShape, FeedForwardWorkspace, ForwardContext, ModelContext, activate, check_tokens,
    fill_head, rotate, run_model, transform,
)
from legacy1bit.kernels cimport Attention, KernelTable
from legacy1bit.math_ops cimport kernels
from legacy1bit.model cimport (
    AttentionGradient, AttentionView, BlockContext, BlockGradient, BlockView, FeedForward,
    FeedForwardContext, FeedForwardGradient, FeedForwardView, LegacyLLM, LegacyLLMGradients,
    ModelGradient, ModelView, MultiHeadAttention, NormGradient, NormView, TransformerBlock,
    TransformerBlockContext, allocate, allocated_bytes, check_context, chosen_fields,
    fill_projection, float_pointer, gradient_pointer, normalize_backward, offset, point_gradients,
    reserve_for, vector_pointer,
)
from legacy1bit.projection cimport (
    Demand, Projection, Workspace, linear_backward, reserve, reserve_one, weight_gradient,
)
from legacy1bit.threads cimport parallel_for

from legacy1bit.forward import as_token_rows, document_starts, padding_mask
from legacy1bit.layout import block_options, dimensions

# C clamps the probability of the target to this before it takes the logarithm.
_SMALLEST_PROBABILITY = 1e-9


# ---------------------------------------------------------------------------------------------
# Without the GIL

cdef struct OutputProjection:
    # What the backward pass of out = wo norm(x) + bias reads and adds to; the norm is optional.
    const Projection *wo
    const NormView *norm
    const float *x
    const float *normed
    const float *mean
    const float *inv_std
    float *d_weight
    float *d_bias
    const NormGradient *d_norm


cdef inline void backward_wo(const OutputProjection *layer, Py_ssize_t rows, const float *d_out,
                             float *d_normed, float *d_x,
                             const Workspace *workspace) noexcept nogil:
    # d_normed is scratch for the gradient of the norm's output. Quantization to int8 has a
    # straight-through gradient.
    cdef Py_ssize_t cols = layer.wo.cols
    weight_gradient(layer.wo, d_out, layer.normed, rows, layer.d_weight, layer.d_bias, workspace)
    if layer.norm.gamma == NULL:
        linear_backward(layer.wo, d_out, rows, False, d_x, workspace)
        return
    linear_backward(layer.wo, d_out, rows, False, d_normed, workspace)
    memset(d_x, 0, rows * cols * sizeof(float))
    normalize_backward(layer.norm, d_normed, layer.x, layer.mean, layer.inv_std, d_x,
                       layer.d_norm, rows, cols)


cdef void backward_ffn(const FeedForwardView *layer, Py_ssize_t rows, const float *d_out,
                       const float *x, const FeedForwardContext *context,
                       FeedForwardGradient *gradient, const BackwardWorkspace *buffers, float *d_x,
                       const Workspace *workspace) noexcept nogil:
    cdef const KernelTable *kernel = kernels()
    cdef Py_ssize_t wide = layer.wi.rows
    cdef OutputProjection out
    out.wo, out.norm = &layer.wo, &layer.norm
    out.x, out.normed = context.activated, context.normed
    out.mean, out.inv_std = context.mean, context.inv_std
    out.d_weight, out.d_bias, out.d_norm = gradient.wo, gradient.bo, &gradient.norm
    backward_wo(&out, rows, d_out, buffers.d_hidden_normed, buffers.d_hidden, workspace)
    if layer.wg.rows:
        kernel.gate_backward(layer.activation, context.gate, context.hidden, buffers.d_hidden,
                             buffers.d_gate, buffers.d_hidden, rows * wide)
    else:
        kernel.activate_backward(layer.activation, context.hidden, buffers.d_hidden,
                                 buffers.d_hidden, rows * wide)
    weight_gradient(&layer.wi, buffers.d_hidden, x, rows, gradient.wi, gradient.bi, workspace)
    linear_backward(&layer.wi, buffers.d_hidden, rows, False, d_x, workspace)
    if layer.wg.rows:
        weight_gradient(&layer.wg, buffers.d_gate, x, rows, gradient.wg, gradient.bg, workspace)
        linear_backward(&layer.wg, buffers.d_gate, rows, True, d_x, workspace)


cdef void backward_attend(const AttentionView *layer, const BatchShape *dims, const float *d_out,
                          const float *x, const BlockContext *context,
                          AttentionGradient *gradient, const BackwardWorkspace *buffers,
                          float *d_x, const Workspace *workspace) noexcept nogil:
    cdef const KernelTable *kernel = kernels()
    cdef Py_ssize_t wide = layer.wq.rows, narrow = layer.wk.rows
    cdef Py_ssize_t i, j, row, kv_row, rows = dims.batch * dims.time
    cdef Py_ssize_t group = layer.num_heads // layer.num_kv_heads
    cdef const float *d_q = buffers.d_q
    cdef const float *d_k = buffers.d_k
    cdef Attention head
    cdef OutputProjection out
    out.wo, out.norm = &layer.wo, &layer.norm
    out.x, out.normed = context.heads, context.heads_normed
    out.mean, out.inv_std = context.heads_mean, context.heads_inv_std
    out.d_weight, out.d_bias, out.d_norm = gradient.wo, gradient.bo, &gradient.norm
    # d_q is not used yet, so it serves as scratch of the same shape.
    backward_wo(&out, rows, d_out, buffers.d_q, buffers.d_heads, workspace)
    head.d_probs = buffers.d_probs
    for i in range(dims.batch):
        for j in range(layer.num_heads):
            fill_head(layer, dims, context, i, j, &head)
            row = i * dims.time * wide + j * layer.head_dim
            kv_row = i * dims.time * narrow + j // group * layer.head_dim
            head.d_out = buffers.d_heads + row
            head.d_q = buffers.d_q + row
            head.d_k = buffers.d_k + kv_row
            head.d_v = buffers.d_v + kv_row
            head.accumulate_kv = j % group != 0
            kernel.attention_backward(&head, workspace.packing)
    rotate(layer, dims, -1.0, buffers.d_q, buffers.d_k)
    if layer.q_norm.gamma:
        # d_heads has been used, so it takes the gradient of the queries before their norm.
        memset(buffers.d_heads, 0, rows * wide * sizeof(float))
        memset(buffers.d_k_linear, 0, rows * narrow * sizeof(float))
        normalize_backward(&layer.q_norm, d_q, context.q_linear, NULL, context.q_inv_std,
                           buffers.d_heads, &gradient.q_norm, rows * layer.num_heads,
                           layer.head_dim)
        normalize_backward(&layer.k_norm, d_k, context.k_linear, NULL, context.k_inv_std,
                           buffers.d_k_linear, &gradient.k_norm, rows * layer.num_kv_heads,
                           layer.head_dim)
        d_q, d_k = buffers.d_heads, buffers.d_k_linear
    weight_gradient(&layer.wq, d_q, x, rows, gradient.wq, gradient.bq, workspace)
    weight_gradient(&layer.wk, d_k, x, rows, gradient.wk, gradient.bk, workspace)
    weight_gradient(&layer.wv, buffers.d_v, x, rows, gradient.wv, gradient.bv, workspace)
    linear_backward(&layer.wq, d_q, rows, False, d_x, workspace)
    linear_backward(&layer.wk, d_k, rows, True, d_x, workspace)
    linear_backward(&layer.wv, buffers.d_v, rows, True, d_x, workspace)


cdef void backward_transform(const BlockView *block, const BatchShape *dims,
                             const BlockContext *context, BlockGradient *gradient,
                             const BackwardWorkspace *buffers,
                             const Workspace *workspace) noexcept nogil:
    # buffers.d_x holds the gradient of the block's output on entry and of its input on return. The
    # residual path bypasses both norms, so their gradients add to it.
    cdef Py_ssize_t dim = block.attention.wq.cols, rows = dims.batch * dims.time
    backward_ffn(&block.ffn, rows, buffers.d_x, context.norm2, &context.ffn, &gradient.ffn,
                 buffers, buffers.d_norm, workspace)
    normalize_backward(&block.norm2, buffers.d_norm, context.residual, context.mean2,
                       context.inv_std2, buffers.d_x, &gradient.norm2, rows, dim)
    backward_attend(&block.attention, dims, buffers.d_x, context.norm1, context,
                    &gradient.attention, buffers, buffers.d_norm, workspace)
    normalize_backward(&block.norm1, buffers.d_norm, context.input, context.mean1,
                       context.inv_std1, buffers.d_x, &gradient.norm1, rows, dim)


cdef void backward_embed(const int *tokens, Py_ssize_t rows, Py_ssize_t vocab, Py_ssize_t dim,
                         const float *d_out, float *d_embedding) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(rows):
        if tokens[i] < vocab:
            kernels().add(d_embedding + tokens[i] * dim, d_out + i * dim, dim)


cdef inline void soften(float *logits, Py_ssize_t cols, float temperature) noexcept nogil:
    # softmax(logits / T). Their largest is subtracted first: what is left is small, and divides
    # without a large error.
    cdef const KernelTable *kernel = kernels()
    kernel.shift(logits, -kernel.largest(logits, cols), cols)
    kernel.divide(logits, temperature, cols)
    kernel.softmax(logits, 1, cols)


cdef double distill(float *logits, const Distillation *teacher, const int *targets,
                    Py_ssize_t rows, Py_ssize_t cols, float gradient_scale,
                    float *buffer) noexcept nogil:
    # The loss (1 - w) CE(targets) + w T^2 KL(softmax(teacher / T) || softmax(logits / T)), summed
    # over the rows whose target is >= 0 (Hinton, Vinyals & Dean, arXiv 1503.02531, section 2).
    # Returns the sum of CE alone. Logits become gradients, the teacher's become probabilities;
    # buffer holds `cols` floats.
    cdef const KernelTable *kernel = kernels()
    cdef float of_text = gradient_scale * (<float>1.0 - teacher.weight)
    cdef float of_teacher = gradient_scale * teacher.weight * teacher.temperature
    cdef float *row
    cdef float *goal
    cdef Py_ssize_t i
    cdef double loss = 0.0
    for i in range(rows):
        row = logits + i * cols
        goal = teacher.logits + i * cols
        if targets[i] < 0:
            memset(row, 0, cols * sizeof(float))
            continue
        memcpy(buffer, row, cols * sizeof(float))
        soften(buffer, cols, teacher.temperature)
        soften(goal, cols, teacher.temperature)
        loss += kernel.cross_entropy(row, targets + i, 1, cols, of_text)
        kernel.add_scaled(row, of_teacher, buffer, cols)
        kernel.add_scaled(row, -of_teacher, goal, cols)
    return loss


cdef double backward_model(const ModelView *model, const BatchShape *dims, const int *tokens,
                           const int *targets, float gradient_scale, const Distillation *teacher,
                           ModelContext *context, ModelGradient *gradient,
                           const BackwardWorkspace *buffers,
                           const Workspace *workspace) noexcept nogil:
    # Forward and backward. Returns the sum of -log p over the targets >= 0; gradients are those of
    # this sum times gradient_scale, or with a teacher's logits those of `distill`.
    cdef const KernelTable *kernel = kernels()
    cdef Py_ssize_t i, rows = dims.batch * dims.time
    cdef Py_ssize_t dim = model.embedding.cols, vocab = model.output.rows
    cdef double loss
    run_model(model, dims, tokens, context, workspace)
    if teacher.logits:
        loss = distill(context.logits, teacher, targets, rows, vocab, gradient_scale,
                       workspace.row)
    else:
        loss = kernel.cross_entropy(context.logits, targets, rows, vocab, gradient_scale)
    weight_gradient(&model.output, context.logits, context.normed, rows, gradient.output,
                    gradient.output_bias, workspace)
    if model.final_norm.gamma:
        linear_backward(&model.output, context.logits, rows, False, buffers.d_norm, workspace)
        memset(buffers.d_x, 0, rows * dim * sizeof(float))
        normalize_backward(&model.final_norm, buffers.d_norm,
                           context.blocks[model.num_blocks - 1].output, context.mean,
                           context.inv_std, buffers.d_x, &gradient.final_norm, rows, dim)
    else:
        linear_backward(&model.output, context.logits, rows, False, buffers.d_x, workspace)
    for i in range(model.num_blocks - 1, -1, -1):
        if context.recomputed and i < model.num_blocks - 1:
            transform(&model.blocks[i], dims, &context.blocks[i], workspace)
        backward_transform(&model.blocks[i], dims, &context.blocks[i], &gradient.blocks[i],
                           buffers, workspace)
    if gradient.embedding:
        backward_embed(tokens, rows, vocab, dim, buffers.d_x, gradient.embedding)
    return loss


cdef BackwardWorkspace _workspace

# The gradients of activations: name, axes with M = B T, the option that it belongs to (as in
# layout.py), and the offset of the pointer in a BackwardWorkspace.
cdef list _GRADIENTS = [
    ("d_x", "MC", "", offset(&_workspace, &_workspace.d_x)),
    ("d_norm", "MC", "", offset(&_workspace, &_workspace.d_norm)),
    ("d_heads", "MQ", "", offset(&_workspace, &_workspace.d_heads)),
    ("d_q", "MQ", "", offset(&_workspace, &_workspace.d_q)),
    ("d_k", "MK", "", offset(&_workspace, &_workspace.d_k)),
    ("d_v", "MK", "", offset(&_workspace, &_workspace.d_v)),
    ("d_k_linear", "MK", "qk_norm", offset(&_workspace, &_workspace.d_k_linear)),
    ("d_hidden", "MF", "", offset(&_workspace, &_workspace.d_hidden)),
    ("d_gate", "MF", "gated", offset(&_workspace, &_workspace.d_gate)),
    ("d_probs", "TT", "", offset(&_workspace, &_workspace.d_probs)),
    ("d_hidden_normed", "MF", "sub_norm", offset(&_workspace, &_workspace.d_hidden_normed)),
]


cdef class BackwardContext:
    """Buffers for the gradients of activations, with axes and options of ``layout``."""

    cdef dict arrays
    cdef BackwardWorkspace view

    def __cinit__(self):
        memset(&self.view, 0, sizeof(self.view))

    def __init__(self, axes, options, batch_size, time):
        self.arrays = allocate(&self.view, chosen_fields(_GRADIENTS, options),
                               {**axes, "M": batch_size * time, "T": time})

    def __reduce__(self):
        raise TypeError("a BackwardContext cannot be copied or pickled: make another one")

    @property
    def nbytes(self) -> int:
        """The bytes of all arrays."""
        return sum(array.nbytes for array in self.arrays.values())


def backward_bytes(config, batch_size, time) -> int:
    """Return the bytes that a ``BackwardContext`` for a model would allocate."""
    axes = {**dimensions(config), "M": batch_size * time, "T": time}
    return allocated_bytes(chosen_fields(_GRADIENTS, block_options(config)), axes)


# ---------------------------------------------------------------------------------------------
# Loss

def cross_entropy_loss(probabilities, int target) -> float:
    """Return -log of the probability of the target, in nats.

    Parameters
    ----------
    probabilities : float32[V]
    target : int

    Returns
    -------
    float
        The probability is clamped to at least 1e-9, so the loss is at most 20.72.

    Raises
    ------
    IndexError
        If ``target`` is not a token.

    Notes
    -----
    C: ``backward.c``, ``cross_entropy_loss``. Training itself computes the log-softmax from the
    logits, where no probability underflows.
    """
    cdef const float[::1] p = probabilities
    if not 0 <= target < p.shape[0]:
        raise IndexError(f"target is {target}, expected 0 to {p.shape[0] - 1}")
    return -log(max(p[target], _SMALLEST_PROBABILITY))


def d_loss_d_logits(probabilities, int target):
    """Return the gradient of the loss with respect to the logits: ``probabilities - one_hot``.

    Parameters
    ----------
    probabilities : float32[V]
    target : int

    Returns
    -------
    float32[V]

    Raises
    ------
    IndexError
        If ``target`` is not a token.

    Notes
    -----
    C: ``backward.c``, ``d_loss_d_logits``.
    """
    cdef const float[::1] p = probabilities
    if not 0 <= target < p.shape[0]:
        raise IndexError(f"target is {target}, expected 0 to {p.shape[0] - 1}")
    d_logits = np.array(p, np.float32)
    d_logits[target] -= np.float32(1.0)
    return d_logits


# ---------------------------------------------------------------------------------------------
# The C original's functions

cdef object _rows(object array, tuple shape, str name):
    """Return a float32 array flattened, after checking its shape."""
    if not isinstance(array, np.ndarray) or array.dtype != np.float32:
        raise TypeError(f"{name} is not a float32 array")
    if array.shape != shape:
        raise ValueError(f"{name} has shape {array.shape}, expected {shape}")
    if not array.flags.c_contiguous or array.size == 0:
        raise ValueError(f"{name} is empty or not C-contiguous")
    return array.reshape(-1)


cdef tuple _shape_of(object array, Py_ssize_t dim, str name):
    """Return the shape of an array whose last axis has ``dim`` elements."""
    shape = np.shape(array)
    if not 1 <= len(shape) <= 3 or shape[-1] != dim:
        raise ValueError(f"{name} has shape {shape}, expected [{dim}], [B, {dim}] or "
                         f"[B, T, {dim}]")
    return shape


def backward_output_layer(output, d_logits, hidden, gradients):
    """As ``backward_output_layer_batch``, for one position: d_logits [V], hidden [C].

    C: ``backward.c``, ``backward_output_layer``.
    """
    return backward_output_layer_batch(output, d_logits, hidden, gradients)


def backward_output_layer_batch(output, d_logits, hidden, gradients):
    """Backward pass of ``logits = hidden @ output.T + bias``.

    Parameters
    ----------
    output : TernaryMatrix or float32[V, C]
    d_logits : float32[..., V]
    hidden : float32[..., C]
    gradients : dict
        ``weight`` float32[V, C] and ``bias`` float32[V], added to: ``gradients.layer("output")``.

    Returns
    -------
    float32[..., C]
        The gradient of ``hidden``.

    Notes
    -----
    C: ``backward.c``, ``backward_output_layer_batch``, which stores the matrix's gradient as
    [C, V] (departure 5).
    """
    cdef Projection view
    cdef Workspace workspace
    fill_projection(&view, output, "output")
    shape = _shape_of(hidden, view.cols, "hidden")
    cdef const float[::1] d_out = _rows(d_logits, (*shape[:-1], view.rows), "d_logits")
    cdef const float[::1] x = _rows(hidden, shape, "hidden")
    cdef float *d_weight = gradient_pointer(gradients["weight"], (view.rows, view.cols), "weight")
    cdef float *d_bias = gradient_pointer(gradients["bias"], (view.rows,), "bias")
    cdef Py_ssize_t rows = x.shape[0] // view.cols
    d_x = np.empty(shape, np.float32)
    cdef float *to = float_pointer(d_x)
    reserve_one(&workspace, &view, rows)
    with nogil:
        weight_gradient(&view, &d_out[0], &x[0], rows, d_weight, d_bias, &workspace)
        linear_backward(&view, &d_out[0], rows, False, to, &workspace)
    return d_x


def backward_feed_forward(FeedForward ffn not None, d_output, x, hidden, gradients, gate=None):
    """As ``backward_feed_forward_batch``, for one position: d_output and x are [C].

    C: ``backward.c``, ``backward_feed_forward``.
    """
    return backward_feed_forward_batch(ffn, d_output, x, hidden, gradients, gate)


def backward_feed_forward_batch(FeedForward ffn not None, d_output, x, hidden, gradients,
                                gate=None):
    """Backward pass of ``wo act(wi x + bi) + bo``, or ``wo (act(wg x + bg) * (wi x + bi)) + bo``.

    Parameters
    ----------
    ffn : FeedForward
    d_output : float32[..., C]
    x : float32[..., C]
        The layer's input.
    hidden : float32[..., F]
        ``wi x + bi``, before the activation.
    gradients : dict
        ``wi``, ``wo`` and the layer's other parameters, added to:
        ``gradients.layer("blocks.0.ffn")``.
    gate : float32[..., F], optional
        ``wg x + bg`` of a layer with a gate.

    Returns
    -------
    float32[..., C]
        The gradient of ``x``.

    Notes
    -----
    C: ``backward.c``, ``backward_feed_forward_batch``, which computes the gradient of ``wo`` from
    the values before the activation (departure 3).
    """
    cdef BlockGradient gradient
    cdef FeedForwardWorkspace forward_workspace
    cdef FeedForwardContext context
    cdef Py_ssize_t dim = ffn.view.wi.cols, wide = ffn.view.wi.rows
    shape = _shape_of(x, dim, "x")
    cdef const float[::1] d_out = _rows(d_output, shape, "d_output")
    inputs = _rows(x, shape, "x").copy()
    before = _rows(hidden, (*shape[:-1], wide), "hidden").copy()
    if (gate is None) != (ffn.wg is None):
        raise ValueError("gate is None, expected an array: the layer has a gate" if gate is None
                         else "gate is an array, expected None: the layer has no gate")
    gates = before if gate is None else _rows(gate, (*shape[:-1], wide), "gate").copy()
    cdef float *source = float_pointer(inputs)
    cdef Py_ssize_t rows = inputs.size // dim
    cdef Workspace workspace
    reserve_for(&workspace, NULL, &ffn.view, rows)
    cdef BackwardContext buffers = BackwardContext(
        {"C": dim, "F": wide, "Q": 1, "K": 1}, {"sub_norm", "gated"}, rows, 1)
    forward_workspace = FeedForwardWorkspace(ffn, rows)
    context = forward_workspace.view
    context.hidden = float_pointer(before)
    context.gate = float_pointer(gates)
    _fill_gradients(&gradient, gradients, {"ffn": ffn}, "ffn.")
    d_x = np.empty(shape, np.float32)
    cdef float *to = float_pointer(d_x)
    with nogil:
        if ffn.view.int8_activations:
            kernels().fake_quantize_rows(source, rows, dim)
        activate(&ffn.view, rows, &context)
        backward_ffn(&ffn.view, rows, &d_out[0], source, &context, &gradient.ffn, &buffers.view,
                     to, &workspace)
    return d_x


# The parameters of layers, by the name of the layer in a block.
_LAYERS = {
    "attention": ("wq", "wk", "wv", "wo", "bq", "bk", "bv", "bo", "q_gamma", "k_gamma"),
    "ffn": ("wg", "wi", "bg", "bi", "wo", "bo"),
}


cdef int _fill_gradients(BlockGradient *block, object gradients, dict layers,
                         str prefix="") except -1:
    # Checks the gradients of some layers by name, and points at them; `prefix` is a layer's, if
    # they are named without it.
    memset(block, 0, sizeof(BlockGradient))
    arrays = {}
    for name, layer in layers.items():
        parameters = {part: getattr(layer, part) for part in _LAYERS.get(name, ())}
        norm = layer if name.startswith("norm") else layer.norm
        if norm is not None:
            parameters |= {"gamma": norm.gamma, "beta": norm.beta}
        for part, parameter in parameters.items():
            if parameter is not None:
                key = f"{name}.{part}".removeprefix(prefix)
                arrays[f"{name}.{part}"] = gradients[key]
                gradient_pointer(gradients[key], parameter.shape, key)
    return point_gradients(block, arrays)


def backward_layer_norm(d_output, x, gamma, float mean, float inv_std, d_gamma, d_beta):
    """Backward pass of the layer norm of one vector.

    Parameters
    ----------
    d_output, x, gamma : float32[C]
    mean, inv_std : float
        As returned by ``layer_norm_forward``.
    d_gamma, d_beta : float32[C]
        Added to.

    Returns
    -------
    float32[C]
        The gradient of ``x``.

    Notes
    -----
    C: ``backward.c``, ``backward_layer_norm``, which adds the sum of ``d_output`` to every element
    of ``d_beta`` (departure 2).
    """
    return backward_layer_norm_batch(d_output, x, gamma, np.array([mean], np.float32),
                                     np.array([inv_std], np.float32), d_gamma, d_beta)


def backward_layer_norm_batch(d_output, x, gamma, mean, inv_std, d_gamma, d_beta):
    """Backward pass of the layer norm of rows.

    Parameters
    ----------
    d_output, x : float32[..., C]
    gamma : float32[C]
    mean, inv_std : float32[...]
        One number per row.
    d_gamma, d_beta : float32[C]
        Added to.

    Returns
    -------
    float32[..., C]
        The gradient of ``x``.

    Notes
    -----
    C: ``backward.c``, ``backward_layer_norm_batch`` (departure 2).
    """
    cdef Py_ssize_t dim = len(gamma)
    cdef const float *factor = vector_pointer(gamma, dim, "gamma")
    shape = _shape_of(x, dim, "x")
    cdef const float[::1] d_out = _rows(d_output, shape, "d_output")
    cdef const float[::1] source = _rows(x, shape, "x")
    cdef Py_ssize_t rows = source.shape[0] // dim
    cdef const float *centers = vector_pointer(mean.reshape(-1), rows, "mean")
    cdef const float *spreads = vector_pointer(inv_std.reshape(-1), rows, "inv_std")
    cdef float *to_gamma = gradient_pointer(d_gamma, (dim,), "d_gamma")
    cdef float *to_beta = gradient_pointer(d_beta, (dim,), "d_beta")
    d_x = np.zeros(shape, np.float32)
    cdef float *to = float_pointer(d_x)
    with nogil:
        kernels().layer_norm_backward(&d_out[0], &source[0], factor, centers, spreads, to,
                                      to_gamma, to_beta, rows, dim)
    return d_x


cdef tuple _fill_batch_shape(BatchShape *dims, object x, MultiHeadAttention attention,
                             FeedForward ffn, TransformerBlockContext context):
    """Fill a batch shape for [B, T, C], [B, C] or [C] activations; returns their shape."""
    cdef const AttentionView *layer = &attention.view
    shape = _shape_of(x, layer.wq.cols, "x")
    dims.batch = shape[0] if len(shape) > 1 else 1
    dims.time = shape[1] if len(shape) > 2 else 1
    # The forward pass has left probability 0 at padding and before documents.
    dims.allowed = NULL
    dims.starts = NULL
    check_context(context, attention, ffn, dims.batch, dims.time)
    attention.fill_rotary(dims.time)
    return shape


def backward_multi_head_attention(MultiHeadAttention attention not None, d_output, x,
                                  TransformerBlockContext context not None, gradients):
    """As ``backward_multi_head_attention_batch``, for one token: d_output and x are [C].

    C: ``backward.c``, ``backward_multi_head_attention``.
    """
    return backward_multi_head_attention_batch(attention, d_output, x, context, gradients)


def backward_multi_head_attention_batch(MultiHeadAttention attention not None, d_output, x,
                                        TransformerBlockContext context not None, gradients):
    """Backward pass of causal multi-head attention.

    Parameters
    ----------
    attention : MultiHeadAttention
    d_output, x : float32[B, T, C], [B, C] or [C]
        The gradient of the layer's output, and its input.
    context : TransformerBlockContext
        As filled by the forward pass of the same ``x``.
    gradients : dict
        ``wq``, ``wk``, ``wv``, ``wo`` and the layer's other parameters, added to:
        ``gradients.layer("blocks.0.attention")``.

    Returns
    -------
    float32
        The gradient of ``x``, of its shape.

    Notes
    -----
    C: ``backward.c``, ``backward_multi_head_attention_batch``, which has no attention to
    differentiate (departure 6).
    """
    cdef BatchShape dims
    cdef BlockGradient gradient
    cdef Py_ssize_t dim = attention.view.wq.cols
    shape = _fill_batch_shape(&dims, x, attention, None, context)
    _fill_gradients(&gradient, gradients, {"attention": attention}, "attention.")
    cdef const float[::1] d_out = _rows(d_output, shape, "d_output")
    inputs = _rows(x, shape, "x").copy()
    cdef float *source = float_pointer(inputs)
    cdef BackwardContext buffers = BackwardContext({**context.axes, "F": 1}, context.options,
                                                   dims.batch, dims.time)
    cdef Workspace workspace
    reserve_for(&workspace, &attention.view, NULL, dims.batch * dims.time)
    d_x = np.empty(shape, np.float32)
    cdef float *to = float_pointer(d_x)
    with nogil:
        if attention.view.int8_activations:
            kernels().fake_quantize_rows(source, dims.batch * dims.time, dim)
        backward_attend(&attention.view, &dims, &d_out[0], source, &context.view,
                        &gradient.attention, &buffers.view, to, &workspace)
    return d_x


def backward_transformer_block(TransformerBlock block not None, d_output,
                               TransformerBlockContext context not None, gradients):
    """As ``backward_transformer_block_batch``, for one token: d_output is [C].

    C: ``backward.c``, ``backward_transformer_block``.
    """
    return backward_transformer_block_batch(block, d_output, context, gradients)


def backward_transformer_block_batch(TransformerBlock block not None, d_output,
                                     TransformerBlockContext context not None, gradients):
    """Backward pass of a block.

    Parameters
    ----------
    block : TransformerBlock
    d_output : float32[B, T, C], [B, C] or [C]
    context : TransformerBlockContext
        As filled by the block's forward pass.
    gradients : dict
        ``attention.wq`` and so on, added to: ``gradients.layer("blocks.0")``.

    Returns
    -------
    float32
        The gradient of the block's input, of the shape of ``d_output``.

    Notes
    -----
    C: ``backward.c``, ``backward_transformer_block_batch``, which also passes the residual's
    gradient through the layer norms (departure 4).
    """
    cdef BatchShape dims
    cdef BlockGradient gradient
    shape = _fill_batch_shape(&dims, d_output, block.attention, block.ffn, context)
    _fill_gradients(&gradient, gradients, {"attention": block.attention, "ffn": block.ffn,
                                           "norm1": block.norm1, "norm2": block.norm2})
    rows = _rows(d_output, shape, "d_output")
    cdef BackwardContext buffers = BackwardContext(context.axes, context.options, dims.batch,
                                                   dims.time)
    cdef Workspace workspace
    reserve_for(&workspace, &block.view.attention, &block.view.ffn, dims.batch * dims.time)
    d_x = buffers.arrays["d_x"].reshape(-1)
    d_x[...] = rows
    with nogil:
        backward_transform(&block.view, &dims, &context.view, &gradient, &buffers.view, &workspace)
    return d_x.reshape(shape)


def backward_embedding(token_id, d_output, d_embedding) -> None:
    """Add one token's gradient, float32[C], to its row of ``d_embedding``, float32[V, C].

    C: ``backward.c``, ``backward_embedding``.
    """
    backward_embedding_batch([token_id], np.reshape(d_output, (1, -1)), d_embedding)


def backward_embedding_batch(tokens, d_output, d_embedding) -> None:
    """Add the gradients of embedded tokens to the table's rows.

    Parameters
    ----------
    tokens : int[B] or int[B, T]
        Padding has no row, and is skipped.
    d_output : float32[B, C] or float32[B, T, C]
    d_embedding : float32[V, C]
        Added to.

    Raises
    ------
    IndexError
        If an id is not a token.

    Notes
    -----
    C: ``backward.c``, ``backward_embedding_batch``.
    """
    vocab, dim = d_embedding.shape
    cdef const int[:, ::1] rows = as_token_rows(tokens)
    cdef float *to = gradient_pointer(d_embedding, (vocab, dim), "d_embedding")
    cdef const float[::1] d_out = _rows(d_output, (*np.shape(tokens), dim), "d_output")
    cdef Py_ssize_t i, j, size = vocab, width = dim
    for i in range(rows.shape[0]):
        for j in range(rows.shape[1]):
            if rows[i, j] < 0 or rows[i, j] > size:
                raise IndexError(f"token id {rows[i, j]}, expected 0 to {size - 1}, or {size} for "
                                 "padding")
    with nogil:
        backward_embed(&rows[0, 0], rows.shape[0] * rows.shape[1], size, width, &d_out[0], to)


# ---------------------------------------------------------------------------------------------
# The whole model

def ignore_padding(tokens, targets, pad_token):
    """Return the targets as int32[B, T] with -1 wherever token or target is padding."""
    ignored = (tokens == pad_token) | (targets == pad_token)
    return np.where(ignored, np.int32(-1), targets)


cdef struct BackwardJob:
    const ModelView *model
    ModelContext *contexts
    ModelGradient *gradients
    BackwardWorkspace *workspaces
    double *losses
    float **flat_gradients      # the same gradients, each as one array of `size` floats
    Py_ssize_t size
    const int *tokens
    const int *targets
    const unsigned char *allowed
    const int *starts
    Py_ssize_t batch, time
    Py_ssize_t tasks
    float gradient_scale
    Distillation teacher
    float dropout               # of adapters, and the seed of this batch
    unsigned long long seed
    Py_ssize_t first_row
    bint out_of_memory


cdef Py_ssize_t SUM_BLOCK = 16384


cdef void backward_task(void *context, long index) noexcept nogil:
    # One slice of the batch. The first adds to the caller's gradients, the others to their own,
    # which start from 0.
    cdef BackwardJob *job = <BackwardJob *>context
    cdef Py_ssize_t first = job.batch * index // job.tasks
    cdef Py_ssize_t last = job.batch * (index + 1) // job.tasks
    cdef Workspace workspace
    cdef Demand demand = job.model.demand
    cdef Distillation teacher = job.teacher
    cdef BatchShape dims
    if teacher.logits:
        demand.row = job.model.output.rows
        teacher.logits += first * job.time * demand.row
    if not reserve(&workspace, &demand, (last - first) * job.time):
        job.out_of_memory = True
        return
    workspace.dropout, workspace.seed = job.dropout, job.seed
    workspace.first_row = (job.first_row + first) * job.time
    if index:
        memset(job.flat_gradients[index], 0, job.size * sizeof(float))
    dims.batch = last - first
    dims.time = job.time
    dims.allowed = NULL
    if job.allowed:
        dims.allowed = job.allowed + first * job.time
    dims.starts = NULL
    if job.starts:
        dims.starts = job.starts + first * job.time
    job.losses[index] = backward_model(
        job.model, &dims, job.tokens + first * job.time, job.targets + first * job.time,
        job.gradient_scale, &teacher, &job.contexts[index], &job.gradients[index],
        &job.workspaces[index], &workspace)


cdef void sum_task(void *context, long index) noexcept nogil:
    # Sums the gradients of the slices, in order, over one block of floats.
    cdef BackwardJob *job = <BackwardJob *>context
    cdef Py_ssize_t i, start = index * SUM_BLOCK, count = min(job.size - start, SUM_BLOCK)
    for i in range(1, job.tasks):
        kernels().add(job.flat_gradients[0] + start, job.flat_gradients[i] + start, count)


cdef class BackwardPass:
    """Forward and backward over batches, with the buffers for both allocated once.

    Parameters
    ----------
    model : LegacyLLM
    batch_size, time : int
        B and T of the largest batch. Others may have fewer sequences, or proportionally more
        shorter ones.
    threads : int
        The number of threads, each of which takes a slice of the batch. Gradients are summed slice
        by slice, so that their last bits depend on this number, and on nothing else.
    recompute : bool
        Gradient checkpointing: keep only the blocks' inputs, and recompute their other activations
        in the backward pass. The results have the same bits.
    """

    cdef readonly LegacyLLM model
    cdef readonly Py_ssize_t batch_size, time, threads
    cdef Py_ssize_t slices
    cdef list contexts, workspaces, gradients
    cdef BackwardJob job

    def __cinit__(self):
        memset(&self.job, 0, sizeof(self.job))

    def __init__(self, LegacyLLM model not None, batch_size, time, threads=1, recompute=False):
        cdef ForwardContext context
        cdef BackwardContext buffers
        cdef LegacyLLMGradients gradients
        cdef BackwardJob *job = &self.job
        for name, size in (("batch_size", batch_size), ("time", time), ("threads", threads)):
            if size < 1:
                raise ValueError(f"{name} is {size}, expected at least 1")
        model.alive()
        config = model.config
        tasks = min(threads, batch_size)
        largest = (batch_size + tasks - 1) // tasks
        self.model = model
        self.batch_size, self.time, self.threads = batch_size, time, threads
        self.slices = tasks
        job.contexts = <ModelContext *>calloc(tasks, sizeof(ModelContext))
        job.workspaces = <BackwardWorkspace *>calloc(tasks, sizeof(BackwardWorkspace))
        job.gradients = <ModelGradient *>calloc(tasks, sizeof(ModelGradient))
        job.losses = <double *>calloc(tasks, sizeof(double))
        job.flat_gradients = <float **>calloc(tasks, sizeof(float *))
        if not (job.contexts and job.workspaces and job.gradients and job.losses
                and job.flat_gradients):
            raise MemoryError("no memory for the pass")
        self.contexts, self.workspaces, self.gradients = [], [], []
        for i in range(tasks):
            context = ForwardContext(config, largest, time, "inputs" if recompute else "all")
            buffers = BackwardContext(dimensions(config), block_options(config), largest, time)
            self.contexts.append(context)
            self.workspaces.append(buffers)
            job.contexts[i] = context.view
            job.workspaces[i] = buffers.view
            if i:
                gradients = LegacyLLMGradients(config, model.adapter)
                self.gradients.append(gradients)
                job.gradients[i] = gradients.view
                job.flat_gradients[i] = float_pointer(gradients.flat)

    def __dealloc__(self):
        free(self.job.contexts)
        free(self.job.workspaces)
        free(self.job.gradients)
        free(self.job.losses)
        free(self.job.flat_gradients)

    def __reduce__(self):
        raise TypeError("a BackwardPass cannot be copied or pickled: make another one of its model")

    @property
    def nbytes(self) -> int:
        """The bytes of the activations, their gradients, and the gradients of all but one slice."""
        return sum(part.nbytes for part in (*self.contexts, *self.workspaces, *self.gradients))

    def run(self, tokens, targets, LegacyLLMGradients gradients not None, total=None,
            starts=None, teacher=None, float distillation_weight=0.5,
            float teacher_temperature=1.0, dropout=0.0, seed=0, first_row=0):
        """Add the gradient of a batch's mean loss to ``gradients``.

        With a teacher's logits t the loss of a position, whose own logits are z, is
        ``(1 - w) CE(z, target) + w T^2 KL(softmax(t / T) || softmax(z / T))`` (Hinton, Vinyals &
        Dean, arXiv 1503.02531, section 2).

        Parameters
        ----------
        tokens, targets : int[B', T']
            Positions where either is padding are ignored.
        gradients : LegacyLLMGradients
        total : int, optional
            The number of positions to divide by, if the batch is a part of a larger one; by
            default its own.
        starts : int[B, T], optional
            For each position the first of its row that it sees; see ``forward.document_starts``.
        teacher : float32[B', T', V], optional
            The logits of another model, which are overwritten.
        distillation_weight : float
            w, 0 to 1.
        teacher_temperature : float
            T, above 0.
        dropout : float
            The probability that an element of an adapter's input is left out.
        seed : int
            What is left out depends on it, and on a sequence's number in the batch.
        first_row : int
            The number of the first sequence, if the batch is a part of a larger one.

        Returns
        -------
        (float, int)
            The sum of -log p of the targets in nats, also where there is a teacher, and their
            number.

        Raises
        ------
        IndexError
            If an id is not a token.
        ValueError
            If a shape or a start does not fit.
        """
        cdef BackwardJob *job = &self.job
        cdef const int[:, ::1] token_rows, target_rows
        cdef const unsigned char[:, ::1] mask
        cdef const int[:, ::1] start_rows
        cdef Py_ssize_t i
        config = self.model.config
        if (gradients.config, gradients.adapter) != (config, self.model.adapter):
            raise ValueError("the gradients are those of a model with other settings")
        if total is not None and (not isinstance(total, (int, np.integer)) or total < 0):
            raise ValueError(f"total is {total}, expected a whole number of positions")
        tokens, targets = as_token_rows(tokens), as_token_rows(targets, "targets")
        self._set_shape(tokens.shape)
        if targets.shape != tokens.shape:
            raise ValueError(f"targets has shape {targets.shape}, expected {tokens.shape}")
        job.model = self.model.alive()
        check_tokens(self.model, tokens, "tokens")
        check_tokens(self.model, targets, "targets")
        targets = ignore_padding(tokens, targets, config.pad_token)
        count = int((targets >= 0).sum())
        allowed = padding_mask(tokens, config.pad_token)
        token_rows, target_rows = tokens, targets
        job.tokens, job.targets = &token_rows[0, 0], &target_rows[0, 0]
        job.allowed = NULL
        if allowed is not None:
            mask = allowed
            job.allowed = &mask[0, 0]
        job.starts = NULL
        if starts is not None:
            start_rows = document_starts(starts, job.batch, job.time)
            job.starts = &start_rows[0, 0]
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout is {dropout}, expected 0 or more and less than 1")
        job.dropout, job.seed, job.first_row = dropout, seed, first_row
        job.teacher.logits = NULL
        if teacher is not None:
            if not 0.0 <= distillation_weight <= 1.0:
                raise ValueError(f"distillation_weight is {distillation_weight}, expected 0 to 1")
            if not 0.0 < teacher_temperature < np.inf:
                raise ValueError(f"teacher_temperature is {teacher_temperature}, expected a finite "
                                 "number above 0")
            logits = _rows(teacher, (*tokens.shape, config.vocab_size), "teacher")
            job.teacher.logits = float_pointer(logits)
            job.teacher.weight = distillation_weight
            job.teacher.temperature = teacher_temperature
        job.gradient_scale = 1.0 / max(count if total is None else total, 1)
        job.gradients[0] = gradients.alive()[0]
        job.flat_gradients[0] = float_pointer(gradients.flat)
        job.size = gradients.flat.size
        job.out_of_memory = False
        with nogil:
            parallel_for(backward_task, job, job.tasks, job.tasks)
            if job.tasks > 1 and not job.out_of_memory:
                parallel_for(sum_task, job, (job.size + SUM_BLOCK - 1) // SUM_BLOCK, job.tasks)
        if job.out_of_memory:
            raise MemoryError("no memory for the kernels' packing buffers")
        loss = 0.0
        for i in range(job.tasks):
            loss += job.losses[i]
        return loss, count

    cdef _set_shape(self, tuple shape):
        # Every slice of the batch has to fit the buffers for one.
        batch, time = shape
        tasks = min(self.slices, max(batch, 1))
        fits = (self.batch_size + self.slices - 1) // self.slices * self.time
        if not 1 <= time <= self.time or (batch + tasks - 1) // tasks * time > fits or batch < 1:
            raise ValueError(f"tokens has shape {shape}, expected {(self.batch_size, self.time)}, "
                             "or no more tokens in shorter sequences")
        self.job.tasks = tasks
        self.job.batch, self.job.time = batch, time


def backward_llm(LegacyLLM model not None, token_id, target,
                 LegacyLLMGradients gradients not None) -> float:
    """As ``backward_llm_batch``, for one token and its successor.

    C: ``backward.c``, ``backward_llm``.
    """
    return backward_llm_batch(model, [token_id], [target], gradients)


def backward_llm_batch(LegacyLLM model not None, tokens, targets,
                       LegacyLLMGradients gradients not None, threads=1, starts=None) -> float:
    """Add the gradient of a batch's loss to ``gradients``, and return the loss.

    Parameters
    ----------
    model : LegacyLLM
    tokens, targets : int[B] or int[B, T]
        Positions where either is padding are ignored.
    gradients : LegacyLLMGradients
    threads : int
    starts : int[B, T], optional
        For each position the first of its row that it sees; see ``forward.document_starts``.

    Returns
    -------
    float
        The mean of -log p of the targets, in nats; 0 if all are padding.

    Notes
    -----
    C: ``backward.c``, ``backward_llm_batch``. It repeats the forward pass and returns nothing;
    here one pass does both.
    """
    rows = as_token_rows(tokens)
    backward_pass = BackwardPass(model, *rows.shape, threads)
    loss, count = backward_pass.run(rows, targets, gradients, starts=starts)
    return loss / max(count, 1)
