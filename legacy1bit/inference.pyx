"""Letting a model write (C: ``inference.c``).

A ``Decoder`` holds the keys and values of a sequence. Its tokens pass through a packed model
without returning to Python, the drawing of the next one included. Threads do it side by side: each
has some rows of every matrix and some of the heads, and they meet where one needs what others have
written. A prompt goes through in blocks of tokens.
"""

import numpy as np

from cpython.exc cimport PyErr_CheckSignals
from libc.math cimport INFINITY
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

from legacy1bit.kernels cimport Attention, CachedHead, KernelTable, Matrix, Rounded
from legacy1bit.math_ops cimport kernels, packed_kernels
from legacy1bit.model cimport NormView, float_pointer
from legacy1bit.packed cimport (
    PackedBlock, PackedModel, PackedModelView, Projection, RoundedRows, unpack_row,
)
from legacy1bit.threads cimport meet, run_team, scratch

from legacy1bit.model import LAYER_NORM_EPSILON as _EPSILON

cdef float EPSILON = _EPSILON

cdef enum:
    PROMPT_BLOCK = 128
    DRAWN_AT_ONCE = 64      # tokens, between two looks whether the user has pressed Ctrl-C
    STRIP = 32


# ---------------------------------------------------------------------------------------------
# What the members of a team do

cdef inline Py_ssize_t share(Py_ssize_t count, Py_ssize_t member,
                             Py_ssize_t members) noexcept nogil:
    # Where the member's share of so many things begins; the next one's share begins at its end.
    return count * member // members


cdef const Rounded *prepare(DecoderView *d, Py_ssize_t index, const float *source, Py_ssize_t cols,
                            Py_ssize_t rows, const NormView *norm, const Projection *reader,
                            const float **dense) noexcept nogil:
    # The input of the next products: normalised where there is a norm, and in the form they read.
    # One token every member prepares for itself; of more, each prepares some, and they meet.
    cdef const KernelTable *kernel = kernels()
    cdef Member *member = &d.members[index]
    cdef Rounded rounded = member.rounded if rows == 1 else d.rounded
    cdef float *normed = member.normed if rows == 1 else d.normed
    cdef float mean[PROMPT_BLOCK]
    cdef float inv_std[PROMPT_BLOCK]
    cdef Py_ssize_t first = 0, count = rows
    if rows > 1:
        first = share(rows, index, d.team.members)
        count = share(rows, index + 1, d.team.members) - first
    if norm.gamma:
        kernel.layer_norm(source + first * cols, norm.gamma, norm.beta, EPSILON,
                          normed + first * cols, mean, inv_std, count, cols)
        source = normed
    if reader.packed.tiles:
        rounded.codes += first * rounded.stride
        rounded.steps += first
        rounded.sums += first
        kernel.round_to_int8(source + first * cols, count, cols, &rounded)
    if rows > 1:
        meet(&d.team)
    dense[0] = source
    return &member.rounded if rows == 1 else &d.rounded


cdef void project(DecoderView *d, Py_ssize_t index, const Projection *projection,
                  const Rounded *rounded, const float *dense, Py_ssize_t rows, bint accumulate,
                  float *out, float *workspace) noexcept nogil:
    # This member's strips of out[rows, projection.rows] (+)= the product + bias.
    cdef Py_ssize_t strips = (projection.rows + STRIP - 1) // STRIP
    cdef Py_ssize_t first = share(strips, index, d.team.members)
    cdef Py_ssize_t last = share(strips, index + 1, d.team.members)
    cdef Py_ssize_t low = first * STRIP, count = min(projection.rows, last * STRIP) - low, t
    cdef const float *bias = projection.bias
    cdef const float *start = NULL
    cdef Matrix part
    if count <= 0:
        return
    if projection.packed.tiles:
        packed_kernels().packed_product(&projection.packed, first, last, rounded, rows, bias,
                                        accumulate, out, projection.rows, workspace)
        return
    if rows == 1:
        part = projection.dense
        part.dense += low * part.cols
        part.rows = count
        if accumulate:
            kernels().matrix_vector(&part, dense, workspace)
            kernels().add(out + low, workspace, count)
        else:
            kernels().matrix_vector(&part, dense, out + low)
        if bias:
            kernels().add(out + low, bias + low, count)
        return
    if bias and not accumulate:
        start = bias + low
    kernels().matmul(rows, count, projection.cols, dense, projection.cols, 1,
                     projection.dense.dense + low * projection.cols, 1, projection.cols,
                     start, accumulate, out + low, projection.rows, workspace)
    if accumulate and bias:
        for t in range(rows):
            kernels().add(out + t * projection.rows + low, bias + low, count)


cdef void attend(DecoderView *d, Py_ssize_t index, Py_ssize_t layer, Py_ssize_t past,
                 Py_ssize_t rows, float *workspace) noexcept nogil:
    # This member's heads: keys and values go into the cache, and out come the heads' outputs.
    cdef const KernelTable *kernel = kernels()
    cdef const PackedModelView *model = d.model
    cdef Py_ssize_t heads = model.num_heads, dim = d.dim // heads, half = dim // 2, head, at
    cdef Py_ssize_t first = share(heads, index, d.team.members)
    cdef Py_ssize_t last = share(heads, index + 1, d.team.members)
    if model.cosines and last > first:
        kernel.rotary(d.q + first * dim, model.cosines + past * half, model.sines + past * half,
                      1.0, rows, d.dim, last - first, dim)
        kernel.rotary(d.k + first * dim, model.cosines + past * half, model.sines + past * half,
                      1.0, rows, d.dim, last - first, dim)
    for head in range(first, last):
        at = (layer * heads + head) * d.capacity
        store(d.k + head * dim, d.dim, rows, dim, d.keys + (at + past) * dim,
              d.key_steps + at + past)
        store(d.v + head * dim, d.dim, rows, dim, d.values + (at + past) * dim,
              d.value_steps + at + past)
        if rows == 1:
            attend_alone(d, index, head, at, past + 1)
        else:
            attend_together(d, index, head, at, past, rows, workspace)


cdef void store(const float *x, Py_ssize_t stride, Py_ssize_t rows, Py_ssize_t dim,
                signed char *codes, float *steps) noexcept nogil:
    # Rows of keys or values into the cache.
    cdef Rounded rounded
    cdef int total
    cdef Py_ssize_t t
    rounded.stride = dim
    rounded.sums = &total
    for t in range(rows):
        rounded.codes = codes + t * dim
        rounded.steps = steps + t
        kernels().round_to_int8(x + t * stride, 1, dim, &rounded)


cdef void attend_alone(DecoderView *d, Py_ssize_t index, Py_ssize_t head, Py_ssize_t at,
                       Py_ssize_t keys) noexcept nogil:
    # The last token of `keys`, whose cache begins at row `at`.
    cdef CachedHead view
    cdef Py_ssize_t dim = d.dim // d.model.num_heads, span = d.model.span
    if span and span < keys:
        at += keys - span
        keys = span
    view.keys = keys
    view.head_dim = dim
    view.q = d.q + head * dim
    view.k = d.keys + at * dim
    view.v = d.values + at * dim
    view.k_steps = d.key_steps + at
    view.v_steps = d.value_steps + at
    view.probs = d.members[index].probs
    view.out = d.heads + head * dim
    kernels().cached_attention(&view)


cdef void attend_together(DecoderView *d, Py_ssize_t index, Py_ssize_t head, Py_ssize_t at,
                          Py_ssize_t past, Py_ssize_t rows, float *workspace) noexcept nogil:
    # A block of tokens, as training does it, with what the cache has kept of their keys.
    cdef Member *member = &d.members[index]
    cdef Py_ssize_t dim = d.dim // d.model.num_heads, t
    cdef Attention view
    memset(&view, 0, sizeof(view))
    view.queries = rows
    view.keys = past + rows
    view.head_dim = dim
    view.stride = dim
    view.span = d.model.span
    view.probs = member.probs
    view.q = member.head
    view.k = member.head + d.capacity * dim
    view.v = member.head + 2 * d.capacity * dim
    view.out = member.head + 3 * d.capacity * dim
    for t in range(rows):
        memcpy(member.head + t * dim, d.q + t * d.dim + head * dim, dim * sizeof(float))
    kernels().widen(d.keys + at * dim, d.key_steps + at, view.keys, dim,
                    member.head + d.capacity * dim)
    kernels().widen(d.values + at * dim, d.value_steps + at, view.keys, dim,
                    member.head + 2 * d.capacity * dim)
    kernels().attention(&view, workspace)
    for t in range(rows):
        memcpy(d.heads + t * d.dim + head * dim, view.out + t * dim, dim * sizeof(float))


cdef void activate(DecoderView *d, Py_ssize_t index, Py_ssize_t rows) noexcept nogil:
    # The activation of this member's strips of the hidden layer, in place.
    cdef Py_ssize_t strips = (d.wide + STRIP - 1) // STRIP, t
    cdef Py_ssize_t low = share(strips, index, d.team.members) * STRIP
    cdef Py_ssize_t count = min(d.wide, share(strips, index + 1, d.team.members) * STRIP) - low
    cdef float *row
    if count <= 0:
        return
    for t in range(rows):
        row = d.hidden + t * d.wide + low
        if d.model.squared:
            kernels().relu2(row, row, count)
        else:
            kernels().relu(row, row, count)


cdef void transform(DecoderView *d, Py_ssize_t index, Py_ssize_t layer, Py_ssize_t past,
                    Py_ssize_t rows, float *workspace) noexcept nogil:
    # One block: stream += attention(norm1(stream)); stream += ffn(norm2(stream)).
    cdef const PackedBlock *block = &d.model.blocks[layer]
    cdef const float *dense = NULL
    cdef const Rounded *rounded = prepare(d, index, d.stream, d.dim, rows, &block.norm1,
                                          &block.wq, &dense)
    project(d, index, &block.wq, rounded, dense, rows, False, d.q, workspace)
    project(d, index, &block.wk, rounded, dense, rows, False, d.k, workspace)
    project(d, index, &block.wv, rounded, dense, rows, False, d.v, workspace)
    meet(&d.team)
    attend(d, index, layer, past, rows, workspace)
    meet(&d.team)
    rounded = prepare(d, index, d.heads, d.dim, rows, &block.heads_norm, &block.wo, &dense)
    project(d, index, &block.wo, rounded, dense, rows, True, d.stream, workspace)
    meet(&d.team)
    rounded = prepare(d, index, d.stream, d.dim, rows, &block.norm2, &block.wi, &dense)
    project(d, index, &block.wi, rounded, dense, rows, False, d.hidden, workspace)
    activate(d, index, rows)
    meet(&d.team)
    rounded = prepare(d, index, d.hidden, d.wide, rows, &block.hidden_norm, &block.wo_ffn, &dense)
    project(d, index, &block.wo_ffn, rounded, dense, rows, True, d.stream, workspace)
    meet(&d.team)


cdef void pass_through(DecoderView *d, Py_ssize_t index, const int *tokens, Py_ssize_t past,
                       Py_ssize_t rows, bint wanted, float *workspace) noexcept nogil:
    # At most a block of tokens; the logits after the last of them where they are wanted.
    cdef const Projection *embedding = &d.model.embedding
    cdef const float *dense = NULL
    cdef const Rounded *rounded
    cdef Py_ssize_t t, layer
    if index == 0:
        for t in range(rows):
            if embedding.packed.tiles:
                unpack_row(&embedding.packed, tokens[t], d.stream + t * d.dim)
            else:
                memcpy(d.stream + t * d.dim, embedding.dense.dense + tokens[t] * d.dim,
                       d.dim * sizeof(float))
    meet(&d.team)
    for layer in range(d.model.num_blocks):
        transform(d, index, layer, past, rows, workspace)
    if wanted:
        rounded = prepare(d, index, d.stream + (rows - 1) * d.dim, d.dim, 1, &d.model.final_norm,
                          &d.model.output, &dense)
        project(d, index, &d.model.output, rounded, dense, 1, False, d.logits, workspace)
        meet(&d.team)


cdef void decode(void *context, long index) noexcept nogil:
    # The whole of a job: the prompt, and then token after token.
    cdef DecoderView *d = <DecoderView *>context
    cdef Py_ssize_t past = d.past + d.prompt_size, i
    cdef float *workspace = scratch(packed_kernels().workspace_floats)
    if workspace == NULL:
        d.out_of_memory = True
    meet(&d.team)
    if d.out_of_memory:
        return
    pass_through(d, index, d.prompt, d.past, d.prompt_size, d.wanted, workspace)
    for i in range(d.to_draw):
        if index == 0:
            d.token = draw(d.logits, d.vocab, &d.sampling, d.uniforms[i], d.chances, d.order)
            d.damaged = d.token < 0
            d.drawn[i] = d.token
        meet(&d.team)
        if d.damaged:
            return
        # The last one's place in the cache stays open: nobody has asked what follows it.
        if i + 1 < d.to_draw:
            pass_through(d, index, &d.token, past, 1, True, workspace)
            past += 1


# ---------------------------------------------------------------------------------------------
# Sampling

cdef inline bint comes_before(const float *logits, int a, int b) noexcept nogil:
    return logits[a] > logits[b] or (logits[a] == logits[b] and a < b)


cdef inline void sift(const float *logits, int *heap, Py_ssize_t size,
                      Py_ssize_t at) noexcept nogil:
    cdef Py_ssize_t child
    cdef int moved = heap[at]
    while 2 * at + 1 < size:
        child = 2 * at + 1
        if child + 1 < size and comes_before(logits, heap[child + 1], heap[child]):
            child += 1
        if not comes_before(logits, heap[child], moved):
            break
        heap[at] = heap[child]
        at = child
    heap[at] = moved


cdef int draw(const float *logits, Py_ssize_t n, const Sampling *sampling, double uniform,
              float *weights, int *order) noexcept nogil:
    # A token, or -1 where logits are not finite. weights and order have room for n.
    cdef const KernelTable *kernel = kernels()
    cdef Py_ssize_t i, best = 0, kept
    cdef int taken
    cdef double total = 0.0, bound, passed = 0.0
    cdef float temperature = <float>min(sampling.temperature, 3e38)
    for i in range(n):
        # What is no number is not within infinity either.
        if not -INFINITY <= logits[i] < INFINITY:
            return -1
        if logits[i] > logits[best]:
            best = i
    if logits[best] == -INFINITY:
        return -1
    if temperature < 1e-30:
        return best
    memcpy(weights, logits, n * sizeof(float))
    kernel.shift(weights, -logits[best], n)
    kernel.divide(weights, temperature, n)
    kernel.exp(weights, n)
    for i in range(n):
        total += weights[i]
    kept = n
    if sampling.top_k or sampling.top_p < 1.0:
        # The likeliest come off a heap, as many as may be drawn.
        for i in range(n):
            order[i] = i
        for i in range(n // 2 - 1, -1, -1):
            sift(logits, order, n, i)
        kept = min(n, sampling.top_k) if sampling.top_k else n
        bound = INFINITY if sampling.top_k else sampling.top_p * total
        for i in range(kept):
            taken = order[0]
            order[0] = order[n - 1 - i]
            order[n - 1 - i] = taken
            sift(logits, order, n - 1 - i, 0)
            passed += weights[taken]
            if passed >= bound:
                kept = i + 1
                break
        if sampling.top_k and sampling.top_p < 1.0:
            bound = sampling.top_p * passed
            passed = 0.0
            for i in range(kept):
                passed += weights[order[n - 1 - i]]
                if passed >= bound:
                    kept = i + 1
                    break
        total = passed
    passed = 0.0
    bound = uniform * total
    for i in range(kept):
        taken = order[n - 1 - i] if kept < n else i
        passed += weights[taken]
        if passed > bound:
            return taken
    return best


def sample_token(logits, rng, temperature=1.0, top_k=0, top_p=1.0) -> int:
    """Draw a token.

    Parameters
    ----------
    logits : float32[V]
    rng : numpy.random.Generator
        Gives one number between 0 and 1.
    temperature : float
        Divides the logits: below 1 likely tokens become likelier. 0 takes the likeliest, the
        first of several.
    top_k : int
        Only the k likeliest tokens can be drawn; 0 means all.
    top_p : float
        Only the likeliest tokens that together have this probability can be drawn (Holtzman et
        al., arXiv 1904.09751, section 3.1); of those that top_k leaves.

    Returns
    -------
    int

    Raises
    ------
    ValueError
        If a logit is NaN or infinity, or a setting is out of range.

    Notes
    -----
    C: ``inference.c``, whose strategies are greedy, temperature and top-k.
    """
    cdef const float[::1] given = logits
    cdef float[::1] weights
    cdef int[::1] order
    cdef Sampling sampling
    check_sampling(temperature, top_k, top_p)
    if given.shape[0] == 0:
        raise ValueError("logits is empty")
    weights = np.empty(given.shape[0], np.float32)
    order = np.empty(given.shape[0], np.int32)
    sampling.temperature, sampling.top_p = temperature, top_p
    sampling.top_k = min(top_k, given.shape[0])
    # The likeliest is no matter of chance.
    uniform = rng.random() if temperature else 0.0
    token = draw(&given[0], given.shape[0], &sampling, uniform, &weights[0], &order[0])
    if token < 0:
        raise ValueError("the model's logits are not finite: its weights are damaged")
    return token


def check_sampling(temperature, top_k, top_p) -> None:
    """Raise ``ValueError`` for settings that ``sample_token`` cannot follow."""
    if isinstance(temperature, int) and temperature > 1 << 64:
        raise ValueError("temperature is beyond any number that divides logits")
    if not 0.0 <= temperature < np.inf:
        raise ValueError(f"temperature is {temperature}, expected 0 or more")
    if top_k < 0:
        raise ValueError(f"top_k is {top_k}, expected 0 or more")
    if not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p is {top_p}, expected more than 0 and at most 1")


# ---------------------------------------------------------------------------------------------
# From Python

cdef class Decoder:
    """A sequence that a model reads and writes, with the keys and values of its tokens so far.

    Parameters
    ----------
    model : PackedModel
    threads : int
        How many threads may share the work. Packed products give the same bits with any number,
        others may round differently.
    capacity : int, optional
        The longest sequence; the model's ``sequence_length`` when not given.

    Attributes
    ----------
    length : int
        The number of tokens so far.

    Notes
    -----
    A decoder is for one thread of Python at a time; several can share a model.

    Activations are rounded to int8 before every product with codes, whether or not the model was
    trained so (``int8_activations``), and so are keys and values, with one scale a token and head:
    logits are near those of ``forward_llm``, not the same.
    """

    def __cinit__(self):
        memset(&self.view, 0, sizeof(self.view))

    def __init__(self, PackedModel model not None, threads=1, capacity=None):
        cdef DecoderView *view = &self.view
        cdef RoundedRows rows
        cdef Py_ssize_t i
        cdef int[::1] order
        cdef signed char[::1] keys, values
        config = model.config
        capacity = config.sequence_length if capacity is None else capacity
        if not 1 <= capacity <= config.sequence_length:
            raise ValueError(f"capacity is {capacity}, expected 1 to {config.sequence_length}")
        if not 1 <= threads <= 256:
            raise ValueError(f"threads is {threads}, expected 1 to 256")
        self.model, self.threads, self.capacity, self.length = model, threads, capacity, 0
        self.kept = []
        view.model = &model.view
        view.capacity = capacity
        view.block = min(capacity, PROMPT_BLOCK)
        view.dim, view.wide, view.vocab = config.model_dim, config.ffn_dim, config.vocab_size
        widest = max(view.dim, view.wide)
        cached = config.num_blocks * config.num_heads * capacity
        keys = np.empty(cached * config.head_dim, np.int8)
        values = np.empty(cached * config.head_dim, np.int8)
        view.keys, view.values = &keys[0], &values[0]
        view.key_steps = self._room(cached)
        view.value_steps = self._room(cached)
        view.stream = self._room(view.block * view.dim)
        view.q = self._room(view.block * view.dim)
        view.k = self._room(view.block * view.dim)
        view.v = self._room(view.block * view.dim)
        view.heads = self._room(view.block * view.dim)
        view.hidden = self._room(view.block * view.wide)
        view.normed = self._room(view.block * widest)
        view.logits = self._room(view.vocab)
        view.chances = self._room(view.vocab)
        order = np.empty(view.vocab, np.int32)
        view.order = &order[0]
        rows = RoundedRows(view.block, widest)
        view.rounded = rows.view
        self.kept += [keys, values, order, rows]
        view.members = <Member *>calloc(threads, sizeof(Member))
        if view.members == NULL:
            raise MemoryError("no memory for the threads' buffers")
        for i in range(threads):
            rows = RoundedRows(1, widest)
            view.members[i].rounded = rows.view
            view.members[i].normed = self._room(widest)
            view.members[i].probs = self._room(view.block * capacity)
            view.members[i].head = self._room(4 * capacity * config.head_dim)
            self.kept.append(rows)

    def __dealloc__(self):
        free(self.view.members)

    cdef float *_room(self, size) except NULL:
        self.kept.append(np.empty(size, np.float32))
        return float_pointer(self.kept[-1])

    def clear(self) -> None:
        """Forget all tokens."""
        self._check_idle()
        self.length = 0

    def _check_idle(self):
        if self.busy:
            raise RuntimeError("the decoder is at work in another thread: each needs its own")

    def extend(self, tokens):
        """Take in more tokens of the sequence and return the logits after the last of them.

        Parameters
        ----------
        tokens : int[T]

        Returns
        -------
        float32[V]

        Raises
        ------
        ValueError
            If there is no room for them.
        IndexError
            If an id is no token's.
        """
        cdef int[::1] nothing = None
        cdef const double[::1] no_numbers = None
        prompt = self._checked(tokens)
        self._check_room(prompt.size)
        self._run(self._begin(prompt), True, nothing, no_numbers)
        return np.asarray(<float[:self.view.vocab]>self.view.logits).copy()

    def write(self, tokens, uniforms, temperature=1.0, top_k=0, top_p=1.0):
        """Take in more tokens and draw those that follow, one after the other.

        Parameters
        ----------
        tokens : int[T]
        uniforms : float64[N]
            Numbers in [0, 1), each of which decides what is drawn.
        temperature, top_k, top_p
            See ``sample_token``.

        Returns
        -------
        int32[N]
            The last of them is not taken in: ``length`` grows by T + N - 1.

        Raises
        ------
        ValueError
            If there is no room for them, a setting is out of range, or logits are not finite.
        IndexError
            If an id is no token's.
        """
        cdef const double[::1] numbers = np.ascontiguousarray(uniforms, np.float64)
        check_sampling(temperature, top_k, top_p)
        if numbers.shape[0] == 0:
            raise ValueError("uniforms is empty: no token is to be drawn")
        if not (np.min(numbers) >= 0.0 and np.max(numbers) < 1.0):
            raise ValueError("uniforms holds a number that is not in [0, 1)")
        self.view.sampling.temperature = temperature
        self.view.sampling.top_k = min(top_k, self.view.vocab)
        self.view.sampling.top_p = top_p
        drawn = np.empty(numbers.shape[0], np.int32)
        prompt = self._checked(tokens)
        self._check_room(prompt.size + drawn.size - 1)
        prompt = self._begin(prompt)
        for start in range(0, drawn.size, DRAWN_AT_ONCE):
            here = drawn[start:start + DRAWN_AT_ONCE]
            self._run(prompt, True, here, numbers[start:start + DRAWN_AT_ONCE])
            prompt = here[-1:]
        return drawn

    def _begin(self, prompt):
        """Take in a prompt but for its last block, and return that."""
        cdef int[::1] nothing = None
        cdef const double[::1] no_numbers = None
        last = (prompt.size - 1) // PROMPT_BLOCK * PROMPT_BLOCK
        for start in range(0, last, PROMPT_BLOCK):
            self._run(prompt[start:start + PROMPT_BLOCK], False, nothing, no_numbers)
        return prompt[last:]

    def _check_room(self, more):
        self._check_idle()
        if self.length + more > self.capacity:
            raise ValueError(f"{self.length} tokens and {more} more do not fit a sequence of "
                             f"{self.capacity}")

    def _checked(self, tokens):
        array = np.asarray(tokens)
        if array.ndim == 1 and array.size == 0:
            raise ValueError("tokens is empty")
        if array.dtype.kind not in "iu" or array.ndim != 1:
            raise TypeError(f"tokens is {array.dtype}{list(array.shape)}, expected whole numbers, "
                            "[T]")
        wrong = np.flatnonzero((array < 0) | (array >= self.view.vocab))
        if wrong.size:
            raise IndexError(f"tokens[{wrong[0]}] is {array[wrong[0]]}, expected 0 to "
                             f"{self.view.vocab - 1}")
        return np.ascontiguousarray(array, np.int32)

    cdef int _run(self, const int[::1] prompt, bint wanted, int[::1] drawn,
                  const double[::1] uniforms) except -1:
        cdef DecoderView *view = &self.view
        cdef int threads = self.threads
        more = prompt.shape[0] + (drawn.shape[0] - 1 if drawn is not None else 0)
        PyErr_CheckSignals()
        self._check_room(more)
        view.prompt = &prompt[0]
        view.prompt_size = prompt.shape[0]
        view.wanted = wanted
        view.past = self.length
        view.to_draw = 0
        if drawn is not None:
            view.drawn = &drawn[0]
            view.uniforms = &uniforms[0]
            view.to_draw = drawn.shape[0]
        view.out_of_memory = view.damaged = False
        self.busy = True
        with nogil:
            run_team(decode, view, &view.team, threads)
        self.busy = False
        if view.out_of_memory:
            raise MemoryError("no memory for the kernels' packing buffers")
        if view.damaged:
            raise ValueError("the model's logits are not finite: its weights are damaged")
        self.length += more
        return 0


def generate(model, prompt, max_tokens, seed=0, temperature=1.0, top_k=0, top_p=1.0, threads=1):
    """Continue a prompt, a token at a time.

    The whole prompt is context, as far as the model's reaches; in C it is the last character alone
    (departure 7). A text that grows past the context goes on from its newer half.

    Parameters
    ----------
    model : PackedModel or LegacyLLM
        A ``LegacyLLM`` is packed first.
    prompt : int[T]
        At least one token.
    max_tokens : int
    seed : int
        The same seed, instruction set and number of threads give the same text.
    temperature, top_k, top_p
        See ``sample_token``.
    threads : int
        How many threads may share the work.

    Yields
    ------
    int
        The tokens of the continuation.

    Raises
    ------
    ValueError
        If a setting is out of range or the prompt is empty.
    IndexError
        If the prompt holds what is no token.
    """
    check_sampling(temperature, top_k, top_p)
    if max_tokens < 0:
        raise ValueError(f"max_tokens is {max_tokens}, expected 0 or more")
    rng = np.random.default_rng(seed)
    decoder = Decoder(model if isinstance(model, PackedModel) else PackedModel(model), threads)
    text = list(np.asarray(prompt)[-decoder.capacity:])
    if not text:
        raise ValueError("the prompt is empty, expected at least one token")
    fresh = text
    for _ in range(max_tokens):
        if decoder.length + len(fresh) > decoder.capacity:
            decoder.clear()
            fresh = text[-max(decoder.capacity // 2, 1):]
        token = int(decoder.write(fresh, rng.random(1), temperature, top_k, top_p)[0])
        yield token
        text.append(token)
        fresh = [token]
