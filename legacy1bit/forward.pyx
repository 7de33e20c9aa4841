"""The forward pass (C: ``forward.c``).

Each layer comes twice: as a ``cdef`` function that trusts its arguments, runs without the GIL and
writes to given pointers, and as the function of the C original's name, which checks, allocates and
returns arrays. Weight matrices are [out, in]; activations are rows, ``y = x W^T + b``.
"""

import numpy as np

from libc.stdlib cimport calloc, free
from libc.string cimport memset

from legacy1bit.kernels cimport Attention, KernelTable
from legacy1bit.math_ops cimport kernels
from legacy1bit.model cimport (
    AttentionView, BlockContext, BlockView, FeedForward, FeedForwardContext, FeedForwardView,
    LegacyLLM, ModelView, MultiHeadAttention, TransformerBlock, TransformerBlockContext, allocate,
    allocated_bytes, block_fields, check_context, context_for, context_of, fill_projection,
    float_pointer, normalize, offset, reserve_for, vector_pointer,
)
from legacy1bit.projection cimport (
    Projection, Workspace, linear, read_row, reserve, reserve_one,
)
from legacy1bit.threads cimport parallel_for

from legacy1bit.layout import block_options, dimensions


# ---------------------------------------------------------------------------------------------
# Without the GIL

cdef void embed(const Projection *embedding, const int *tokens, Py_ssize_t rows, float *out,
                const Workspace *workspace) noexcept nogil:
    # Only padding has an id outside the table; its row is zeros.
    cdef Py_ssize_t i, dim = embedding.cols
    for i in range(rows):
        if tokens[i] >= embedding.rows:
            memset(out + i * dim, 0, dim * sizeof(float))
        else:
            read_row(embedding, tokens[i], out + i * dim, workspace.codes)


cdef void fill_head(const AttentionView *layer, const BatchShape *dims,
                    const BlockContext *context, Py_ssize_t sequence, Py_ssize_t index,
                    Attention *head) noexcept nogil:
    # Consecutive heads share their keys and values.
    cdef Py_ssize_t dim = layer.wq.rows, kv_dim = layer.wk.rows
    cdef Py_ssize_t row = sequence * dims.time * dim + index * layer.head_dim
    cdef Py_ssize_t kv_row = (sequence * dims.time * kv_dim
                              + index * layer.num_kv_heads // layer.num_heads * layer.head_dim)
    head.queries = dims.time
    head.keys = dims.time
    head.head_dim = layer.head_dim
    head.stride = dim
    head.kv_stride = head.k_key = kv_dim
    head.k_dim = 1
    head.window = layer.window
    head.allowed = NULL
    if dims.allowed:
        head.allowed = dims.allowed + sequence * head.keys
    head.starts = NULL
    if dims.starts:
        head.starts = dims.starts + sequence * head.queries
    head.q = context.q + row
    head.k = context.k + kv_row
    head.v = context.v + kv_row
    head.out = context.heads + row
    head.probs = context.probs + (sequence * layer.num_heads + index) * head.queries * head.keys


cdef void rotate(const AttentionView *layer, const BatchShape *dims, float direction, float *q,
                 float *k) noexcept nogil:
    # Queries and keys, or their gradients back.
    cdef Py_ssize_t i
    if layer.rotary.cosines == NULL:
        return
    for i in range(dims.batch):
        kernels().rotary(&layer.rotary, 0, direction, q + i * dims.time * layer.wq.rows, dims.time,
                         layer.wq.rows, layer.num_heads, layer.head_dim)
        kernels().rotary(&layer.rotary, 0, direction, k + i * dims.time * layer.wk.rows, dims.time,
                         layer.wk.rows, layer.num_kv_heads, layer.head_dim)


cdef void attend(const AttentionView *layer, const BatchShape *dims, float *x,
                 BlockContext *context, float *out, const Workspace *workspace) noexcept nogil:
    # out = wo norm(heads) + bo; q, k, v, probs and heads stay in the context. With int8 activations
    # x is quantized in place.
    cdef const KernelTable *kernel = kernels()
    cdef Py_ssize_t dim = layer.wq.rows, head_dim = layer.head_dim
    cdef Py_ssize_t i, j, rows = dims.batch * dims.time
    cdef Attention head
    if layer.int8_activations:
        kernel.fake_quantize_rows(x, rows, layer.wq.cols)
    linear(&layer.wq, x, rows, context.q_linear, workspace)
    linear(&layer.wk, x, rows, context.k_linear, workspace)
    linear(&layer.wv, x, rows, context.v, workspace)
    if layer.q_norm.gamma:
        normalize(&layer.q_norm, context.q_linear, context.q, NULL, context.q_inv_std,
                  rows * layer.num_heads, head_dim)
        normalize(&layer.k_norm, context.k_linear, context.k, NULL, context.k_inv_std,
                  rows * layer.num_kv_heads, head_dim)
    rotate(layer, dims, 1.0, context.q, context.k)
    for i in range(dims.batch):
        for j in range(layer.num_heads):
            fill_head(layer, dims, context, i, j, &head)
            kernel.attention(&head, workspace.packing)
    if layer.norm.gamma:
        normalize(&layer.norm, context.heads, context.heads_normed, context.heads_mean,
                  context.heads_inv_std, rows, dim)
    if layer.int8_activations:
        kernel.fake_quantize_rows(context.heads_normed, rows, dim)
    linear(&layer.wo, context.heads_normed, rows, out, workspace)


cdef void activate(const FeedForwardView *layer, Py_ssize_t rows,
                   FeedForwardContext *context) noexcept nogil:
    # From the outputs of wg and wi to the input of wo.
    cdef const KernelTable *kernel = kernels()
    cdef Py_ssize_t wide = layer.wi.rows
    if layer.wg.rows:
        kernel.gate(layer.activation, context.gate, context.hidden, context.activated, rows * wide)
    else:
        kernel.activate(layer.activation, context.hidden, context.activated, rows * wide)
    if layer.norm.gamma:
        normalize(&layer.norm, context.activated, context.normed, context.mean, context.inv_std,
                  rows, wide)
    if layer.int8_activations:
        kernel.fake_quantize_rows(context.normed, rows, wide)


cdef void feed_forward(const FeedForwardView *layer, Py_ssize_t rows, float *x,
                       FeedForwardContext *context, float *out,
                       const Workspace *workspace) noexcept nogil:
    # hidden = wi x + bi; out = wo norm(act(hidden)) + bo, or with a gate wg x + bg, which stays in
    # the context, norm(act(gate) * hidden). With int8 activations x is quantized in place.
    if layer.int8_activations:
        kernels().fake_quantize_rows(x, rows, layer.wi.cols)
    if layer.wg.rows:
        linear(&layer.wg, x, rows, context.gate, workspace)
    linear(&layer.wi, x, rows, context.hidden, workspace)
    activate(layer, rows, context)
    linear(&layer.wo, context.normed, rows, out, workspace)


cdef void transform(const BlockView *block, const BatchShape *dims, BlockContext *context,
                    const Workspace *workspace) noexcept nogil:
    # residual = input + attention(norm1(input)); output = residual + ffn(norm2(residual)). Input
    # and output may be the same memory.
    cdef const KernelTable *kernel = kernels()
    cdef Py_ssize_t dim = block.attention.wq.cols, rows = dims.batch * dims.time
    normalize(&block.norm1, context.input, context.norm1, context.mean1, context.inv_std1, rows,
              dim)
    attend(&block.attention, dims, context.norm1, context, context.residual, workspace)
    kernel.add(context.residual, context.input, rows * dim)
    normalize(&block.norm2, context.residual, context.norm2, context.mean2, context.inv_std2,
              rows, dim)
    feed_forward(&block.ffn, rows, context.norm2, &context.ffn, context.output, workspace)
    kernel.add(context.output, context.residual, rows * dim)


cdef void run_model(const ModelView *model, const BatchShape *dims, const int *tokens,
                    ModelContext *context, const Workspace *workspace) noexcept nogil:
    # Tokens to logits. Each block's output is the next one's input.
    cdef const KernelTable *kernel = kernels()
    cdef Py_ssize_t i, rows = dims.batch * dims.time, dim = model.embedding.cols
    embed(&model.embedding, tokens, rows, context.blocks[0].input, workspace)
    for i in range(model.num_blocks):
        transform(&model.blocks[i], dims, &context.blocks[i], workspace)
    if model.final_norm.gamma:
        normalize(&model.final_norm, context.blocks[model.num_blocks - 1].output, context.normed,
                  context.mean, context.inv_std, rows, dim)
    if model.int8_activations:
        kernel.fake_quantize_rows(context.normed, rows, dim)
    linear(&model.output, context.normed, rows, context.logits, workspace)


# ---------------------------------------------------------------------------------------------
# The activations of a pass over a whole model

cdef class ForwardContext:
    """The activations of a whole model over [B, T] tokens.

    Parameters
    ----------
    config : ModelConfig
    batch_size, time : int
        B and T.
    keep : {"all", "inputs", "none"}
        Which activations of the blocks are kept: all, as the backward pass needs, or the inputs,
        from which it can recompute the rest (gradient checkpointing; Chen et al., arXiv
        1604.06174). With "none" all blocks use the buffers of one.

    Attributes
    ----------
    blocks : list of TransformerBlockContext
    normed : float32[B, T, C]
    logits : float32[B, T, V]
    """

    def __cinit__(self):
        memset(&self.view, 0, sizeof(self.view))

    def __init__(self, config, batch_size, time, keep="all"):
        cdef TransformerBlockContext block
        cdef Py_ssize_t i
        count = config.num_blocks
        if keep not in ("all", "inputs", "none"):
            raise ValueError(f"keep is {keep!r}, expected all, inputs or none")
        self.config = config
        self.batch_size, self.time = batch_size, time
        self.blocks = [context_of(config, batch_size, time)
                       for _ in range(count if keep == "all" else 1)]
        self.inputs = [
            np.empty((batch_size, time, config.model_dim), np.float32)
            for _ in range(count - 1 if keep == "inputs" else 0)
        ]
        self.view.recomputed = keep == "inputs"
        self.view.blocks = <BlockContext *>calloc(count, sizeof(BlockContext))
        if self.view.blocks == NULL:
            raise MemoryError("no memory for the model's activations")
        for i in range(count):
            block = self.blocks[i if keep == "all" else 0]
            self.view.blocks[i] = block.view
            if i:
                self.view.blocks[i].input = self.view.blocks[i - 1].output
            if keep == "none":
                self.view.blocks[i].output = self.view.blocks[0].input
            elif keep == "inputs" and i < count - 1:
                self.view.blocks[i].output = float_pointer(self.inputs[i])
        arrays = allocate(&self.view, _OUTPUTS, _axes(config, batch_size, time))
        self.normed, self.mean = arrays["normed"], arrays["mean"]
        self.inv_std, self.logits = arrays["inv_std"], arrays["logits"]
        if not config.final_norm:
            self.view.normed = self.view.blocks[count - 1].output

    def __dealloc__(self):
        free(self.view.blocks)

    def __reduce__(self):
        raise TypeError("a ForwardContext cannot be copied or pickled: make another one")

    @property
    def nbytes(self) -> int:
        """The bytes of all arrays."""
        own = [*self.blocks, *self.inputs, self.normed, self.mean, self.inv_std, self.logits]
        return sum(array.nbytes for array in own)


cdef ModelContext _context

# The activations after the last block, as `allocate` takes them.
cdef list _OUTPUTS = [
    ("normed", "BTC", offset(&_context, &_context.normed)),
    ("mean", "BT", offset(&_context, &_context.mean)),
    ("inv_std", "BT", offset(&_context, &_context.inv_std)),
    ("logits", "BTV", offset(&_context, &_context.logits)),
]


cdef dict _axes(config, batch_size, time):
    return {"B": batch_size, "T": time, **dimensions(config)}


def forward_bytes(config, batch_size, time, keep="all") -> int:
    """Return the bytes that a ``ForwardContext`` of these parameters would allocate."""
    axes = _axes(config, batch_size, time)
    block = allocated_bytes(block_fields(block_options(config)), axes)
    total = allocated_bytes(_OUTPUTS, axes) + block
    if keep == "all":
        total += (config.num_blocks - 1) * block
    elif keep == "inputs":
        total += (config.num_blocks - 1) * 4 * batch_size * time * config.model_dim
    return total


cdef int check_tokens(LegacyLLM model, const int[:, ::1] tokens, str name) except -1:
    # Token ids and padding only, in sequences no longer than the rotary table.
    cdef Py_ssize_t i, j
    cdef int pad = model.config.pad_token
    cdef const AttentionView *attention = &model.view.blocks[0].attention
    if attention.rotary.cosines and tokens.shape[1] > attention.rotary.length:
        raise ValueError(f"{name} has {tokens.shape[1]} tokens in a sequence, expected at most "
                         f"{attention.rotary.length}")
    # The blocks share one table.
    (<TransformerBlock?>model.blocks[0]).attention.fill_rotary(tokens.shape[1])
    for i in range(tokens.shape[0]):
        for j in range(tokens.shape[1]):
            if tokens[i, j] < 0 or tokens[i, j] > pad:
                raise IndexError(f"{name}[{i}, {j}] is {tokens[i, j]}, expected 0 to {pad - 1}, or "
                                 f"{pad} for padding")
    return 0


def as_token_rows(tokens, str name="tokens"):
    """Return token ids as int32[B, T]: an int or [B] becomes sequences of one.

    Raises
    ------
    ValueError
        If there are none, or the sequences have several lengths.
    TypeError
        For anything but integers.
    IndexError
        If a number is too large for a token id.
    """
    try:
        array = np.asarray(tokens)
    except ValueError:
        raise ValueError(f"{name} has sequences of several lengths, expected [B] or [B, T]"
                         ) from None
    if array.size == 0:
        raise ValueError(f"{name} is empty, expected at least one token")
    if array.dtype.kind not in "iu" or array.ndim > 2:
        raise TypeError(f"{name} is {array.dtype}{list(array.shape)}, expected whole numbers, "
                        "[B] or [B, T]")
    if array.min() < -(1 << 31) or array.max() >= 1 << 31:
        raise IndexError(f"{name} holds a number that is not a token id")
    rows = array.reshape(-1, 1) if array.ndim < 2 else array
    return np.ascontiguousarray(rows, np.int32)


def padding_mask(tokens, pad_token):
    """Return uint8[B, T] with 0 at padding, or None without padding."""
    allowed = tokens != pad_token
    return None if allowed.all() else allowed.astype(np.uint8)


def document_starts(starts, batch, time):
    """Check the document mask of packed rows: the first position that each sees, int32[B, T].

    Where a row holds several documents, that is where the document of the position starts: then
    documents do not attend to each other, and each gives the results that it gives alone. The
    attention window and padding apply as well.

    Parameters
    ----------
    starts : int[B, T]
        0 to the position itself, nondecreasing along a row.
    batch, time : int
        B and T.

    Raises
    ------
    TypeError
        For anything but whole numbers.
    ValueError
        If the shape differs, or a start is negative, after its position or less than the start of
        the previous position.
    """
    array = np.asarray(starts)
    if array.dtype.kind not in "iu":
        raise TypeError(f"starts is {array.dtype}{list(array.shape)}, expected whole numbers, "
                        "[B, T]")
    if array.shape != (batch, time):
        raise ValueError(f"starts has shape {array.shape}, expected {(batch, time)}")
    outside = (array < 0) | (array > np.arange(time))
    if outside.any():
        row, position = np.argwhere(outside)[0].tolist()
        raise ValueError(f"starts[{row}, {position}] is {array[row, position]}, expected 0 to "
                         f"{position}")
    array = np.ascontiguousarray(array, np.int32)
    falls = array[:, 1:] < array[:, :-1]
    if falls.any():
        row, position = np.argwhere(falls)[0].tolist()
        raise ValueError(f"starts[{row}, {position + 1}] is {array[row, position + 1]}, expected "
                         f"at least {array[row, position]} as before it")
    return array


# ---------------------------------------------------------------------------------------------
# The C original's functions

cdef tuple _as_sequences(object x, Py_ssize_t dim, str name):
    """Return x as [B, T, C]: [C] is one sequence of one token, and [B, C] B of them."""
    if not isinstance(x, np.ndarray) or x.dtype != np.float32:
        raise TypeError(f"{name} is not a float32 array")
    if not 1 <= x.ndim <= 3 or x.shape[-1] != dim or x.size == 0:
        raise ValueError(f"{name} has shape {x.shape}, expected [{dim}], [B, {dim}] or "
                         f"[B, T, {dim}]")
    if not x.flags.c_contiguous:
        raise ValueError(f"{name} is not C-contiguous")
    if x.ndim == 3:
        return x, x.shape
    return x.reshape(-1, 1, dim), x.shape


cdef const float *_read_pointer(object array) except NULL:
    cdef const float[::1] view = array.reshape(-1)
    return &view[0]


cdef tuple _fill_batch_shape(BatchShape *dims, tuple shape, object allowed, object starts):
    """Fill a batch shape for [B, T] positions; returns the arrays that it points into."""
    cdef const unsigned char[:, ::1] mask
    cdef const int[:, ::1] start_rows
    dims.batch, dims.time = shape[0], shape[1]
    dims.allowed = NULL
    if allowed is not None:
        mask = allowed = np.ascontiguousarray(allowed, np.uint8)
        if mask.shape[0] != shape[0] or mask.shape[1] != shape[1]:
            raise ValueError(f"allowed has shape {allowed.shape}, expected {tuple(shape[:2])}")
        dims.allowed = &mask[0, 0]
    dims.starts = NULL
    if starts is not None:
        start_rows = starts = document_starts(starts, shape[0], shape[1])
        dims.starts = &start_rows[0, 0]
    return allowed, starts


def forward_embedding(embedding, int token_id):
    """Return the embedding of one token: float32[C].

    Parameters
    ----------
    embedding : TernaryMatrix or float32[V, C]
    token_id : int
        0 to V - 1, or V for padding, whose embedding is zeros.

    Raises
    ------
    IndexError
        If the id is not a token.

    Notes
    -----
    C: ``forward.c``, ``forward_embedding``.
    """
    return forward_embedding_batch(embedding, [token_id])[0]


def forward_embedding_batch(embedding, tokens):
    """Return the embeddings of tokens [B] or [B, T]: float32[B, C] or [B, T, C].

    C: ``forward.c``, ``forward_embedding_batch``.
    """
    cdef Projection view
    cdef Workspace workspace
    cdef const int[:, ::1] rows = as_token_rows(tokens)
    cdef Py_ssize_t i, j
    fill_projection(&view, embedding, "embedding")
    for i in range(rows.shape[0]):
        for j in range(rows.shape[1]):
            if rows[i, j] < 0 or rows[i, j] > view.rows:
                raise IndexError(f"token id {rows[i, j]}, expected 0 to {view.rows - 1}, or "
                                 f"{view.rows} for padding")
    out = np.empty((*np.shape(tokens), view.cols), np.float32)
    reserve_one(&workspace, &view, 1)
    embed(&view, &rows[0, 0], rows.shape[0] * rows.shape[1], float_pointer(out), &workspace)
    return out


def forward_multi_head_attention(MultiHeadAttention attention not None, x):
    """Return the attention's output for one sequence of one token: float32[C] for float32[C].

    C: ``forward.c``, ``forward_multi_head_attention``. Over one token attention is a copy of the
    values, and C computes nothing else (departure 6).
    """
    return forward_multi_head_attention_batch(attention, x)


def forward_multi_head_attention_batch(MultiHeadAttention attention not None, x, allowed=None,
                                       TransformerBlockContext context=None, starts=None):
    """Causal multi-head attention (Vaswani et al., arXiv 1706.03762, section 3.2).

    Parameters
    ----------
    attention : MultiHeadAttention
    x : float32[B, T, C], or [B, C] for sequences of one token
    allowed : uint8[B, T], optional
        0 at padding, which queries do not see.
    context : TransformerBlockContext, optional
        Receives q, k, v, probs and heads for the backward pass.
    starts : int[B, T], optional
        For each position the first of its row that it sees; see ``document_starts``.

    Returns
    -------
    float32
        Of the shape of ``x``.

    Raises
    ------
    ValueError
        If a shape or a start does not fit, or a sequence is longer than the rotary table.

    Notes
    -----
    C: ``forward.c``, ``forward_multi_head_attention_batch``, where no token sees another
    (departure 6).
    """
    cdef AttentionView *view = &attention.view
    cdef BatchShape dims
    sequences, shape = _as_sequences(x, view.wq.cols, "x")
    batch, time, _ = sequences.shape
    attention.fill_rotary(time)
    allowed, starts = _fill_batch_shape(&dims, sequences.shape, allowed, starts)
    context = _context_for(context, attention, None, batch, time, starts)
    out = np.empty(shape, np.float32)
    sequences = sequences.copy()
    cdef float *rows = float_pointer(sequences)
    cdef float *to = float_pointer(out)
    cdef Workspace workspace
    reserve_for(&workspace, view, NULL, batch * time)
    with nogil:
        attend(view, &dims, rows, &context.view, to, &workspace)
    return out


cdef TransformerBlockContext _context_for(TransformerBlockContext context,
                                          MultiHeadAttention attention, FeedForward ffn, batch,
                                          time, starts):
    if context is None:
        return context_for(attention, ffn, batch, time)
    check_context(context, attention, ffn, batch, time)
    if starts is not None:
        # Attention does not write the probabilities of earlier documents. The backward pass of a
        # single layer, which gets no starts, needs zeros there.
        context.probs.fill(0.0)
    return context


cdef class FeedForwardWorkspace:
    """Buffers for the activations of one feed-forward layer over a number of positions."""

    def __init__(self, FeedForward ffn, Py_ssize_t rows):
        wide = rows * ffn.view.wi.rows
        self.arrays = [np.empty(wide, np.float32) for _ in range(2)]
        self.arrays += [np.empty(rows, np.float32) for _ in range(2)]
        self.view.activated = self.view.normed = float_pointer(self.arrays[0])
        if ffn.norm is not None:
            self.view.normed = float_pointer(self.arrays[1])
        self.view.mean = float_pointer(self.arrays[2])
        self.view.inv_std = float_pointer(self.arrays[3])
        self.view.gate = NULL

    def __reduce__(self):
        raise TypeError("a FeedForwardWorkspace cannot be copied or pickled: make another one")


def forward_feed_forward(FeedForward ffn not None, x):
    """Return ``wo act(wi x + bi) + bo`` of one token: float32[C] for float32[C].

    C: ``forward.c``, ``forward_feed_forward``.
    """
    return forward_feed_forward_batch(ffn, x)


def forward_feed_forward_batch(FeedForward ffn not None, x, hidden=None, gate=None):
    """Return ``wo act(wi x + bi) + bo`` by rows, or ``wo (act(wg x + bg) * (wi x + bi)) + bo``.

    Parameters
    ----------
    ffn : FeedForward
    x : float32[B, C] or float32[B, T, C]
    hidden : float32[B, F] or float32[B, T, F], optional
        Receives ``wi x + bi`` for the backward pass.
    gate : float32[B, F] or float32[B, T, F], optional
        Receives ``wg x + bg``; of a layer without a gate None.

    Returns
    -------
    float32
        Of the shape of ``x``.

    Notes
    -----
    C: ``forward.c``, ``forward_feed_forward_batch``.
    """
    cdef FeedForwardWorkspace buffers
    sequences, shape = _as_sequences(x, ffn.view.wi.cols, "x")
    cdef Py_ssize_t rows = sequences.shape[0] * sequences.shape[1]
    wide = (*shape[:-1], ffn.view.wi.rows)
    if gate is not None and ffn.wg is None:
        raise ValueError("gate is an array, expected None: the layer has no gate")
    hidden = _buffer("hidden", hidden, wide)
    gate = _buffer("gate", gate, wide if ffn.wg is not None else (1,))
    sequences = sequences.copy()
    buffers = FeedForwardWorkspace(ffn, rows)
    out = np.empty(shape, np.float32)
    cdef FeedForwardContext context = buffers.view
    cdef float *source = float_pointer(sequences)
    cdef float *to = float_pointer(out)
    cdef Workspace workspace
    context.hidden = float_pointer(hidden)
    context.gate = float_pointer(gate)
    reserve_for(&workspace, NULL, &ffn.view, rows)
    with nogil:
        feed_forward(&ffn.view, rows, source, &context, to, &workspace)
    return out


cdef object _buffer(str name, object array, tuple shape):
    """Return an array to write to: the given one after a check, or another one."""
    if array is None:
        return np.empty(shape, np.float32)
    if array.shape != shape:
        raise ValueError(f"{name} has shape {array.shape}, expected {shape}")
    return array


def forward_transformer_block(TransformerBlock block not None, x):
    """Return a block's output for one sequence of one token: float32[C] for float32[C].

    C: ``forward.c``, ``forward_transformer_block``.
    """
    return forward_transformer_block_batch_with_context(block, x, None)


def forward_transformer_block_with_context(TransformerBlock block not None, x,
                                           TransformerBlockContext context not None):
    """As ``forward_transformer_block``, and keep the activations in ``context``.

    C: ``forward.c``, ``forward_transformer_block_with_context``.
    """
    return forward_transformer_block_batch_with_context(block, x, context)


def forward_transformer_block_batch(TransformerBlock block not None, x, allowed=None, starts=None):
    """As ``forward_transformer_block_batch_with_context``, and keep nothing."""
    return forward_transformer_block_batch_with_context(block, x, None, allowed, starts)


def forward_transformer_block_batch_with_context(TransformerBlock block not None, x,
                                                 TransformerBlockContext context, allowed=None,
                                                 starts=None):
    """Return ``y + ffn(norm2(y))`` with ``y = x + attention(norm1(x))``.

    Parameters
    ----------
    block : TransformerBlock
    x : float32[B, T, C], or [B, C] for sequences of one token
    context : TransformerBlockContext or None
        Receives the activations for the backward pass.
    allowed : uint8[B, T], optional
        0 at padding, which queries do not see.
    starts : int[B, T], optional
        For each position the first of its row that it sees; see ``document_starts``.

    Returns
    -------
    float32
        Of the shape of ``x``.

    Notes
    -----
    C: ``forward.c``, ``forward_transformer_block_batch_with_context``.
    """
    cdef BatchShape dims
    cdef AttentionView *view = &block.view.attention
    sequences, shape = _as_sequences(x, view.wq.cols, "x")
    batch, time, _ = sequences.shape
    block.attention.fill_rotary(time)
    allowed, starts = _fill_batch_shape(&dims, sequences.shape, allowed, starts)
    context = _context_for(context, block.attention, block.ffn, batch, time, starts)
    context.input[...] = sequences
    cdef Workspace workspace
    reserve_for(&workspace, view, &block.view.ffn, batch * time)
    with nogil:
        transform(&block.view, &dims, &context.view, &workspace)
    return context.output.reshape(shape).copy()


def forward_output_layer_batch(output, bias, hidden):
    """Return the logits ``hidden @ output.T + bias``.

    Parameters
    ----------
    output : TernaryMatrix or float32[V, C]
    bias : float32[V]
    hidden : float32[B, C] or float32[B, T, C]

    Returns
    -------
    float32[B, V] or float32[B, T, V]

    Notes
    -----
    C: ``forward.c``, ``forward_output_layer_batch``, for the hidden states of the whole batch; in C
    only the first item's are kept (departure 8).
    """
    cdef Projection view
    cdef Workspace workspace
    fill_projection(&view, output, "output")
    view.bias = vector_pointer(bias, view.rows, "bias")
    sequences, shape = _as_sequences(hidden, view.cols, "hidden")
    cdef Py_ssize_t rows = sequences.shape[0] * sequences.shape[1]
    out = np.empty((*shape[:-1], view.rows), np.float32)
    cdef const float *source = _read_pointer(sequences)
    cdef float *to = float_pointer(out)
    reserve_one(&workspace, &view, rows)
    with nogil:
        linear(&view, source, rows, to, &workspace)
    return out


def forward_llm(LegacyLLM model not None, token_id, threads=1):
    """Return the probabilities of the token that follows.

    Parameters
    ----------
    model : LegacyLLM
    token_id : int, int[B] or int[B, T]
        One token, or the argument of ``forward_llm_batch``.

    Returns
    -------
    float32[V], float32[B, V] or float32[B, T, V]

    Notes
    -----
    C: ``forward.c``, ``forward_llm``, where no token sees another (departures 6 and 7).
    """
    probabilities = forward_llm_batch(model, token_id, threads)
    return probabilities[0] if np.ndim(token_id) == 0 else probabilities


def forward_llm_batch(LegacyLLM model not None, tokens, threads=1, logits=False, starts=None,
                      ForwardContext context=None):
    """Return the probabilities of the token that follows each token, given those before it.

    Parameters
    ----------
    model : LegacyLLM
    tokens : int[B] or int[B, T]
        [B] are B sequences of one token. The id V is padding: no token sees it, and the output at
        its position has no meaning.
    threads : int
        The number of threads, which split the batch. The same number gives the same bits; another
        may round differently, because few rows use another product than many.
    logits : bool
        Return logits instead of probabilities.
    starts : int[B, T], optional
        For each position the first of its row that it sees; see ``document_starts``.
    context : ForwardContext, optional
        Where the activations are kept, all but the logits, which are returned. One thread computes
        them.

    Returns
    -------
    float32[B, V] or float32[B, T, V]

    Raises
    ------
    IndexError
        If an id is not a token.
    ValueError
        If a sequence is longer than the model's positions, or a start or the context does not fit.

    Notes
    -----
    C: ``forward.c``, ``forward_llm_batch``, which takes at most 8 tokens and computes the output
    of the first (departure 8).
    """
    cdef ForwardJob job
    cdef const int[:, ::1] rows
    cdef const unsigned char[:, ::1] mask
    cdef const int[:, ::1] start_rows
    cdef ForwardContext part
    cdef float[:, :, ::1] out
    cdef long i
    if threads < 1:
        raise ValueError(f"threads is {threads}, expected at least 1")
    job.model = model.alive()
    token_rows = as_token_rows(tokens)
    rows = token_rows
    check_tokens(model, rows, "tokens")
    allowed = padding_mask(token_rows, model.config.pad_token)
    job.starts = NULL
    if starts is not None:
        start_rows = document_starts(starts, rows.shape[0], rows.shape[1])
        job.starts = &start_rows[0, 0]
    if context is not None:
        if context.config != model.config or (context.batch_size, context.time) != token_rows.shape:
            raise ValueError(f"the context is for {context.batch_size} x {context.time} tokens, "
                             f"expected {rows.shape[0]} x {rows.shape[1]}, of the same model")
        threads = 1
    job.tasks = min(threads, rows.shape[0])
    contexts = []
    result = np.empty((rows.shape[0], rows.shape[1], model.config.vocab_size), np.float32)
    out = result
    job.contexts = <ModelContext *>calloc(job.tasks, sizeof(ModelContext))
    if job.contexts == NULL:
        raise MemoryError("no memory for the pass")
    try:
        largest = (rows.shape[0] + job.tasks - 1) // job.tasks
        for i in range(job.tasks):
            part = context
            if part is None:
                part = ForwardContext(model.config, largest, rows.shape[1], keep="none")
            contexts.append(part)
            job.contexts[i] = part.view
            job.contexts[i].logits = &out[rows.shape[0] * i // job.tasks, 0, 0]
        job.batch, job.time = rows.shape[0], rows.shape[1]
        job.tokens = &rows[0, 0]
        job.allowed = NULL
        if allowed is not None:
            mask = allowed
            job.allowed = &mask[0, 0]
        job.probabilities = not logits
        job.out_of_memory = False
        with nogil:
            parallel_for(forward_task, &job, job.tasks, job.tasks)
        if job.out_of_memory:
            raise MemoryError("no memory for the kernels' packing buffers")
    finally:
        free(job.contexts)
    return result if np.ndim(tokens) == 2 else result[:, 0]


cdef struct ForwardJob:
    const ModelView *model
    ModelContext *contexts
    const int *tokens
    const unsigned char *allowed
    const int *starts
    Py_ssize_t batch, time
    Py_ssize_t tasks
    bint probabilities
    bint out_of_memory


cdef void forward_task(void *context, long index) noexcept nogil:
    # One slice of the batch.
    cdef ForwardJob *job = <ForwardJob *>context
    cdef Py_ssize_t first = job.batch * index // job.tasks
    cdef Py_ssize_t last = job.batch * (index + 1) // job.tasks
    cdef Workspace workspace
    cdef BatchShape dims
    if not reserve(&workspace, &job.model.demand, (last - first) * job.time):
        job.out_of_memory = True
        return
    dims.batch = last - first
    dims.time = job.time
    dims.allowed = NULL
    if job.allowed:
        dims.allowed = job.allowed + first * job.time
    dims.starts = NULL
    if job.starts:
        dims.starts = job.starts + first * job.time
    run_model(job.model, &dims, job.tokens + first * job.time, &job.contexts[index], &workspace)
    if job.probabilities:
        kernels().softmax(job.contexts[index].logits, dims.batch * job.time,
                          job.model.output.rows)
