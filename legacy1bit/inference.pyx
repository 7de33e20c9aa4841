"""Letting a model write (C: ``inference.c``).

A ``Decoder`` holds the keys and values of sequences. Their tokens pass through a packed model
without returning to Python, the drawing of the next one included. Threads do it side by side: each
has some rows of every matrix and some of the heads, and they meet where one needs what others have
written. A prompt goes through in blocks of tokens, several sequences in blocks of one token each.
"""

import numpy as np

from cpython.exc cimport PyErr_CheckSignals
from libc.math cimport INFINITY
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

from legacy1bit.kernels cimport (
    CACHED_QUERIES, KEY_TILE, STRIP_ROWS, Attention, CachedHead, Int8Rows, KernelTable, Matrix,
    strided,
)
from legacy1bit.math_ops cimport kernels, packed_kernels
from legacy1bit.model cimport NormView, float_pointer
from legacy1bit.packed cimport (
    Int8Buffer, PackedBlock, PackedModel, PackedModelView, Projection, unpack_row,
)
from legacy1bit.threads cimport barrier, parallel_region, scratch

from legacy1bit.hyperparams import SamplingConfig
from legacy1bit.model import LAYER_NORM_EPSILON as _EPSILON

cdef float EPSILON = _EPSILON

_SAMPLING = SamplingConfig()

cdef enum:
    PROMPT_BLOCK = 128
    IN_ORDER = 256          # keys, up to which sums of attention have one order
    SAMPLED_AT_ONCE = 64    # tokens, between two looks whether the user has pressed Ctrl-C
    SUMMED = 1024           # weights that are added up in float32
    STRETCH = 64


# ---------------------------------------------------------------------------------------------
# What the members of a team do

cdef inline Py_ssize_t slice_start(Py_ssize_t count, Py_ssize_t member,
                                   Py_ssize_t members) noexcept nogil:
    # Where the member's share of so many things begins; the next one's share begins at its end.
    return count * member // members


cdef const Int8Rows *prepare(DecoderView *d, Py_ssize_t index, const float *source,
                             Py_ssize_t cols, Py_ssize_t rows, const NormView *norm,
                             const Projection *reader, const float **dense) noexcept nogil:
    # The input of the next products: normalised where there is a norm, and in the form they read.
    # One token every member prepares for itself; of more, each prepares some, and they meet.
    cdef const KernelTable *kernel = kernels()
    cdef Member *member = &d.members[index]
    cdef Int8Rows quantized = member.quantized if rows == 1 else d.quantized
    cdef float *normed = member.normed if rows == 1 else d.normed
    cdef float mean[PROMPT_BLOCK]
    cdef float inv_std[PROMPT_BLOCK]
    cdef Py_ssize_t first = 0, count = rows
    if rows > 1:
        first = slice_start(rows, index, d.team.size)
        count = slice_start(rows, index + 1, d.team.size) - first
    if norm.gamma:
        kernel.layer_norm(source + first * cols, norm.gamma, norm.beta, EPSILON,
                          normed + first * cols, mean, inv_std, count, cols)
        source = normed
    if reader.packed.tiles:
        quantized.codes += first * quantized.stride
        quantized.scales += first
        quantized.sums += first
        kernel.quantize_rows(source + first * cols, count, cols, &quantized)
    if rows > 1:
        barrier(&d.team)
    dense[0] = source
    return &member.quantized if rows == 1 else &d.quantized


cdef void project(DecoderView *d, Py_ssize_t index, const Projection *projection,
                  const Int8Rows *quantized, const float *dense, Py_ssize_t rows, bint accumulate,
                  float *out, float *workspace) noexcept nogil:
    # This member's strips of out[rows, projection.rows] (+)= the product + bias.
    cdef Py_ssize_t strips = (projection.rows + STRIP_ROWS - 1) // STRIP_ROWS
    cdef Py_ssize_t first = slice_start(strips, index, d.team.size)
    cdef Py_ssize_t last = slice_start(strips, index + 1, d.team.size)
    cdef Py_ssize_t low = first * STRIP_ROWS, t
    cdef Py_ssize_t count = min(projection.rows, last * STRIP_ROWS) - low
    cdef const float *bias = projection.bias
    cdef const float *start = NULL
    cdef Matrix part
    if count <= 0:
        return
    if projection.packed.tiles:
        packed_kernels().packed_product(&projection.packed, first, last, quantized, rows, bias,
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
    kernels().matmul(rows, count, projection.cols, strided(dense, projection.cols, 1),
                     strided(projection.dense.dense + low * projection.cols, 1, projection.cols),
                     start, accumulate, out + low, projection.rows, workspace)
    if accumulate and bias:
        for t in range(rows):
            kernels().add(out + t * projection.rows + low, bias + low, count)


cdef void attend(DecoderView *d, Py_ssize_t index, Py_ssize_t layer, const Place *places,
                 Py_ssize_t rows, Py_ssize_t step, float *workspace) noexcept nogil:
    # This member's heads: keys and values go into the cache, and out come the heads' outputs.
    cdef Py_ssize_t row
    if rows > 1 and d.together:
        attend_sequence(d, index, layer, places.sequence, places.past, 0, rows, workspace)
        return
    for row in range(rows):
        attend_sequence(d, index, layer, places[row].sequence, places[row].past + step, row, 1,
                        workspace)


cdef void attend_sequence(DecoderView *d, Py_ssize_t index, Py_ssize_t layer,
                          Py_ssize_t sequence, Py_ssize_t past, Py_ssize_t row, Py_ssize_t rows,
                          float *workspace) noexcept nogil:
    # The same for neighbours in one sequence, from a row on.
    cdef const KernelTable *kernel = kernels()
    cdef const PackedModelView *model = d.model
    cdef Py_ssize_t heads = model.num_heads, dim = d.dim // heads, half = dim // 2, head, at
    cdef Py_ssize_t first = slice_start(heads, index, d.team.size)
    cdef Py_ssize_t last = slice_start(heads, index + 1, d.team.size)
    cdef float *q = d.q + row * d.dim
    cdef float *k = d.k + row * d.dim
    cdef float *v = d.v + row * d.dim
    if model.cosines and last > first:
        kernel.rotary(q + first * dim, model.cosines + past * half, model.sines + past * half,
                      1.0, rows, d.dim, last - first, dim)
        kernel.rotary(k + first * dim, model.cosines + past * half, model.sines + past * half,
                      1.0, rows, d.dim, last - first, dim)
    for head in range(first, last):
        at = ((sequence * model.num_blocks + layer) * heads + head) * d.cache_rows
        store_keys(k + head * dim, d.dim, rows, dim, d.keys + at * dim, past, d.key_scales + at,
                   <signed char *>d.members[index].head)
        store(v + head * dim, d.dim, rows, dim, d.values + (at + past) * dim,
              d.value_scales + at + past)
        if past + rows <= IN_ORDER or rows == 1:
            attend_in_order(d, index, head, at, past, row, rows)
        else:
            attend_together(d, index, head, at, past, rows, workspace)


cdef void store(const float *x, Py_ssize_t stride, Py_ssize_t rows, Py_ssize_t dim,
                signed char *codes, float *scales) noexcept nogil:
    # Rows of values into the cache.
    cdef Int8Rows quantized
    cdef int total
    cdef Py_ssize_t t
    quantized.stride = dim
    quantized.sums = &total
    for t in range(rows):
        quantized.codes = codes + t * dim
        quantized.scales = scales + t
        kernels().quantize_rows(x + t * stride, 1, dim, &quantized)


cdef void store_keys(const float *x, Py_ssize_t stride, Py_ssize_t rows, Py_ssize_t dim,
                     signed char *tiles, Py_ssize_t past, float *scales,
                     signed char *codes) noexcept nogil:
    # Rows of keys into their tiles; codes has room for them.
    cdef Py_ssize_t t, i
    cdef signed char *to
    store(x, stride, rows, dim, codes, scales + past)
    for t in range(rows):
        to = tiles + (past + t) // KEY_TILE * KEY_TILE * dim + (past + t) % KEY_TILE
        for i in range(dim):
            to[i * KEY_TILE] = codes[t * dim + i]


cdef void attend_in_order(DecoderView *d, Py_ssize_t index, Py_ssize_t head, Py_ssize_t at,
                          Py_ssize_t past, Py_ssize_t row, Py_ssize_t rows) noexcept nogil:
    # Rows of neighbouring tokens, whose cache begins at `at`.
    cdef CachedHead view
    cdef Py_ssize_t dim = d.dim // d.model.num_heads, window = d.model.window, t = 0, low
    view.head_dim = dim
    view.stride = d.dim
    view.probs_stride = d.cache_rows
    view.probs = d.members[index].probs
    while t < rows:
        # With a span each of them has a first key of its own.
        view.queries = 1 if window else min(rows - t, CACHED_QUERIES)
        low = past + t + 1 - window if window and window < past + t + 1 else 0
        view.keys = past + t + 1 - low
        view.skipped = low % KEY_TILE
        view.q = d.q + (row + t) * d.dim + head * dim
        view.k = d.keys + (at + low - view.skipped) * dim
        view.v = d.values + (at + low) * dim
        view.k_scales = d.key_scales + at + low
        view.v_scales = d.value_scales + at + low
        view.out = d.heads + (row + t) * d.dim + head * dim
        kernels().cached_attention(&view)
        t += view.queries


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
    view.k_key = 1
    view.k_dim = d.cache_rows
    view.window = d.model.window
    view.probs = member.probs
    view.q = member.head
    view.k = member.head + d.cache_rows * dim
    view.v = member.head + 2 * d.cache_rows * dim
    view.out = member.head + 3 * d.cache_rows * dim
    for t in range(rows):
        memcpy(member.head + t * dim, d.q + t * d.dim + head * dim, dim * sizeof(float))
    kernels().dequantize_keys(d.keys + at * dim, d.key_scales + at, dim,
                              (view.keys + KEY_TILE - 1) // KEY_TILE,
                              member.head + d.cache_rows * dim, d.cache_rows)
    kernels().dequantize_rows(d.values + at * dim, d.value_scales + at, view.keys, dim,
                              member.head + 2 * d.cache_rows * dim)
    kernels().attention(&view, workspace)
    for t in range(rows):
        memcpy(d.heads + t * d.dim + head * dim, view.out + t * dim, dim * sizeof(float))


cdef void activate(DecoderView *d, Py_ssize_t index, Py_ssize_t rows) noexcept nogil:
    # The activation of this member's strips of the hidden layer, in place.
    cdef Py_ssize_t strips = (d.wide + STRIP_ROWS - 1) // STRIP_ROWS, t
    cdef Py_ssize_t low = slice_start(strips, index, d.team.size) * STRIP_ROWS
    cdef Py_ssize_t next = slice_start(strips, index + 1, d.team.size) * STRIP_ROWS
    cdef Py_ssize_t count = min(d.wide, next) - low
    cdef float *row
    if count <= 0:
        return
    for t in range(rows):
        row = d.hidden + t * d.wide + low
        if d.model.squared:
            kernels().relu2(row, row, count)
        else:
            kernels().relu(row, row, count)


cdef void transform(DecoderView *d, Py_ssize_t index, Py_ssize_t layer, const Place *places,
                    Py_ssize_t rows, Py_ssize_t step, float *workspace) noexcept nogil:
    # One block: stream += attention(norm1(stream)); stream += ffn(norm2(stream)).
    cdef const PackedBlock *block = &d.model.blocks[layer]
    cdef const float *dense = NULL
    cdef const Int8Rows *quantized = prepare(d, index, d.stream, d.dim, rows, &block.norm1,
                                             &block.wq, &dense)
    project(d, index, &block.wq, quantized, dense, rows, False, d.q, workspace)
    project(d, index, &block.wk, quantized, dense, rows, False, d.k, workspace)
    project(d, index, &block.wv, quantized, dense, rows, False, d.v, workspace)
    barrier(&d.team)
    attend(d, index, layer, places, rows, step, workspace)
    barrier(&d.team)
    quantized = prepare(d, index, d.heads, d.dim, rows, &block.heads_norm, &block.wo, &dense)
    project(d, index, &block.wo, quantized, dense, rows, True, d.stream, workspace)
    barrier(&d.team)
    quantized = prepare(d, index, d.stream, d.dim, rows, &block.norm2, &block.wi, &dense)
    project(d, index, &block.wi, quantized, dense, rows, False, d.hidden, workspace)
    activate(d, index, rows)
    barrier(&d.team)
    quantized = prepare(d, index, d.hidden, d.wide, rows, &block.hidden_norm, &block.wo_ffn,
                        &dense)
    project(d, index, &block.wo_ffn, quantized, dense, rows, True, d.stream, workspace)
    barrier(&d.team)


cdef void pass_through(DecoderView *d, Py_ssize_t index, const Place *places, Py_ssize_t rows,
                       Py_ssize_t step, Wanted wanted, float *workspace) noexcept nogil:
    # Some tokens, each `step` behind its place, and what is wanted of them.
    cdef const Projection *embedding = &d.model.embedding
    cdef const NormView *norm = &d.model.final_norm
    cdef const float *dense = NULL
    cdef const Int8Rows *quantized
    cdef float mean[PROMPT_BLOCK]
    cdef float inv_std[PROMPT_BLOCK]
    cdef Py_ssize_t t, layer, first = slice_start(rows, index, d.team.size)
    cdef Py_ssize_t last = slice_start(rows, index + 1, d.team.size)
    cdef float *stream = d.stream
    for t in range(first, last):
        d.history[places[t].sequence * d.capacity + places[t].past + step] = d.tokens[t]
        if embedding.packed.tiles:
            unpack_row(&embedding.packed, d.tokens[t], d.stream + t * d.dim)
        else:
            memcpy(d.stream + t * d.dim, embedding.dense.dense + d.tokens[t] * d.dim,
                   d.dim * sizeof(float))
    barrier(&d.team)
    for layer in range(d.model.num_blocks):
        transform(d, index, layer, places, rows, step, workspace)
    if wanted == STATES:
        if norm.gamma:
            kernels().layer_norm(stream + first * d.dim, norm.gamma, norm.beta, EPSILON,
                                 d.normed + first * d.dim, mean, inv_std, last - first, d.dim)
        else:
            memcpy(d.normed + first * d.dim, stream + first * d.dim,
                   (last - first) * d.dim * sizeof(float))
    elif wanted != NOTHING:
        if wanted == LAST:
            stream += (rows - 1) * d.dim
            rows = 1
        quantized = prepare(d, index, stream, d.dim, rows, norm, &d.model.output, &dense)
        project(d, index, &d.model.output, quantized, dense, rows, False, d.logits, workspace)
        barrier(&d.team)


cdef void decode(void *context, long index) noexcept nogil:
    # The whole of a job: some tokens, and then those that are drawn, one after the other; of one
    # sequence, or side by side of several.
    cdef DecoderView *d = <DecoderView *>context
    cdef const Place *places = d.places
    cdef Py_ssize_t rows = d.rows, i, row, length
    cdef const int *history
    cdef Member *member = &d.members[index]
    cdef float *workspace = scratch(packed_kernels().workspace_floats)
    if workspace == NULL:
        d.out_of_memory = True
    barrier(&d.team)
    if d.out_of_memory:
        return
    pass_through(d, index, places, rows, 0, d.wanted, workspace)
    if d.together:
        places += rows - 1
        rows = 1
    for i in range(d.to_sample):
        for row in range(slice_start(rows, index, d.team.size),
                         slice_start(rows, index + 1, d.team.size)):
            history = d.history + places[row].sequence * d.capacity
            length = places[row].past + i + 1
            d.tokens[row] = sample(d.logits + row * d.vocab, d.vocab, &d.sampling, history, length,
                                   d.uniforms[row * d.to_sample + i], member.token_probs,
                                   member.candidates)
            d.sampled[row * d.to_sample + i] = d.tokens[row]
            if d.tokens[row] < 0:
                d.damaged = True
        barrier(&d.team)
        if d.damaged:
            return
        # The last one's place in the cache stays open: nobody has asked what follows it.
        if i + 1 < d.to_sample:
            pass_through(d, index, places, rows, i + 1, EVERY, workspace)


# ---------------------------------------------------------------------------------------------
# Sampling

cdef inline bint comes_before(const float *weights, const float *logits, int a,
                              int b) noexcept nogil:
    # Weights of a high temperature are all but the same: then the logits say which is likelier.
    if weights[a] != weights[b]:
        return weights[a] > weights[b]
    return logits[a] > logits[b] or (logits[a] == logits[b] and a < b)


cdef inline void sift(const float *weights, const float *logits, int *heap, Py_ssize_t size,
                      Py_ssize_t at) noexcept nogil:
    # Lets the place at the root of a part of the heap sink; the likeliest come to the top.
    cdef Py_ssize_t child
    cdef int moved = heap[at]
    while 2 * at + 1 < size:
        child = 2 * at + 1
        if child + 1 < size and comes_before(weights, logits, heap[child + 1], heap[child]):
            child += 1
        if not comes_before(weights, logits, heap[child], moved):
            break
        heap[at] = heap[child]
        at = child
    heap[at] = moved


cdef double sum_of(const float *weights, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t start
    cdef double total = 0.0
    for start from 0 <= start < n by SUMMED:
        total += kernels().sum(weights + start, min(n - start, SUMMED))
    return total


cdef Py_ssize_t find(const float *weights, Py_ssize_t n, double bound) noexcept nogil:
    # Where the sum of the weights passes the bound, or -1.
    cdef Py_ssize_t start, i
    cdef double passed = 0.0, here
    for start from 0 <= start < n by SUMMED:
        here = kernels().sum(weights + start, min(n - start, SUMMED))
        if passed + here > bound:
            for i in range(start, min(start + SUMMED, n)):
                passed += weights[i]
                if passed > bound:
                    return i
        else:
            passed += here
    return -1


cdef float least_of_most(const float *weights, Py_ssize_t n, Py_ssize_t count,
                         float *heap) noexcept nogil:
    # A bound that at least `count` weights reach, and hardly more do: of stretches of the weights,
    # the largest one of the stretch that is number `count` by that. 0 where there are too few.
    cdef Py_ssize_t stretches = (n + STRETCH - 1) // STRETCH, i, child, at
    cdef float least
    if stretches < 2 * count:
        return 0.0
    # The `count` largest so far lie in a heap with the least of them on top.
    for i in range(stretches):
        least = kernels().largest(weights + i * STRETCH, min(n - i * STRETCH, STRETCH))
        if i < count:
            at = i
            while at and heap[(at - 1) // 2] > least:
                heap[at] = heap[(at - 1) // 2]
                at = (at - 1) // 2
            heap[at] = least
        elif least > heap[0]:
            at = 0
            while 2 * at + 1 < count:
                child = 2 * at + 1
                if child + 1 < count and heap[child + 1] < heap[child]:
                    child += 1
                if heap[child] >= least:
                    break
                heap[at] = heap[child]
                at = child
            heap[at] = least
    return heap[0]


cdef int sample(const float *logits, Py_ssize_t n, const Sampling *sampling, const int *history,
                Py_ssize_t length, double uniform, float *weights, int *candidates) noexcept nogil:
    # A token, or -1 where logits are not finite. weights holds 2 n floats, candidates n.
    cdef const KernelTable *kernel = kernels()
    cdef Py_ssize_t i, likeliest, count, kept
    cdef int token
    cdef float best, floor = 0.0, temperature = <float>min(sampling.temperature, 3e38)
    cdef double total, bound, passed = 0.0
    memcpy(weights, logits, n * sizeof(float))
    if sampling.penalty != 1.0:
        i = 0 if sampling.window == 0 else max(length - sampling.window, 0)
        for i in range(i, length):
            token = history[i]
            if logits[token] > 0.0:
                weights[token] = logits[token] / sampling.penalty
            else:
                weights[token] = logits[token] * sampling.penalty
    best = kernel.largest(weights, n)
    if kernel.select(weights, n, best, candidates) == 0:
        return -1
    likeliest = candidates[0]
    kernel.shift(weights, -best, n)
    if temperature >= 1e-30:
        kernel.divide(weights, temperature, n)
    kernel.exp(weights, n)
    total = sum_of(weights, n)
    # What is no number makes the sum none, and so does infinity less infinity.
    if not total > 0.0:
        return -1
    if temperature < 1e-30:
        return likeliest
    if not sampling.top_k and sampling.top_p >= 1.0 and sampling.min_p <= 0.0:
        i = find(weights, n, uniform * total)
        return i if i >= 0 else likeliest
    # Few are looked at one by one: those that no filter leaves out for sure.
    if sampling.top_k:
        floor = least_of_most(weights, n, sampling.top_k, weights + n)
    elif sampling.top_p < 1.0:
        # All below it together have less than what top_p may leave out.
        floor = 0.99 * (1.0 - sampling.top_p) * total / n
    else:
        floor = sampling.min_p
    count = kept = kernel.select(weights, n, floor, candidates)
    if sampling.top_k or sampling.top_p < 1.0:
        # They come off a heap, the likeliest first, and end up behind one another from the back.
        for i in range(count // 2 - 1, -1, -1):
            sift(weights, logits, candidates, count, i)
        if sampling.top_k:
            kept = min(kept, sampling.top_k)
        bound = INFINITY if sampling.top_k else sampling.top_p * total
        for i in range(kept):
            token = candidates[0]
            candidates[0] = candidates[count - 1 - i]
            candidates[count - 1 - i] = token
            sift(weights, logits, candidates, count - 1 - i, 0)
            passed += weights[token]
            if passed >= bound:
                kept = i + 1
                break
        if sampling.top_k and sampling.top_p < 1.0:
            bound = sampling.top_p * passed
            passed = 0.0
            for i in range(kept):
                passed += weights[candidates[count - 1 - i]]
                if passed >= bound:
                    kept = i + 1
                    break
    total = 0.0
    for i in range(kept):
        if weights[candidates[count - 1 - i]] >= sampling.min_p:
            total += weights[candidates[count - 1 - i]]
    passed = 0.0
    bound = uniform * total
    for i in range(kept):
        token = candidates[count - 1 - i]
        if weights[token] >= sampling.min_p:
            passed += weights[token]
            if passed > bound:
                return token
    return likeliest


def sample_token(logits, rng, sampling=_SAMPLING, history=()) -> int:
    """Draw a token.

    Parameters
    ----------
    logits : float32[V]
    rng : numpy.random.Generator
        Gives one number between 0 and 1.
    sampling : SamplingConfig
    history : int[T]
        The tokens so far, for the repetition penalty.

    Returns
    -------
    int
        At temperature 0 the likeliest, the first of several.

    Raises
    ------
    ValueError
        If a logit is NaN or infinity.
    IndexError
        If ``history`` holds what is no token.

    Notes
    -----
    C: ``inference.c``, whose strategies are greedy, temperature and top-k.
    """
    cdef const float[::1] given = logits
    cdef float[::1] weights
    cdef int[::1] candidates
    cdef const int[::1] before
    cdef Sampling view
    if given.shape[0] == 0:
        raise ValueError("logits is empty")
    weights = np.empty(2 * given.shape[0], np.float32)
    candidates = np.empty(given.shape[0], np.int32)
    before = check_tokens(history if len(history) else [0], given.shape[0], "history")
    fill_sampling(&view, sampling, given.shape[0])
    # The likeliest is no matter of chance.
    uniform = rng.random() if view.temperature else 0.0
    token = sample(&given[0], given.shape[0], &view, &before[0], len(history), uniform,
                   &weights[0], &candidates[0])
    if token < 0:
        raise ValueError("the model's logits are not finite: its weights are damaged")
    return token


cdef int fill_sampling(Sampling *view, settings, Py_ssize_t vocab) except -1:
    if not isinstance(settings, SamplingConfig):
        raise TypeError(f"sampling is {settings!r}, expected a SamplingConfig")
    view.temperature = settings.temperature
    view.top_p = settings.top_p
    view.min_p = settings.min_p
    view.top_k = settings.top_k if settings.top_k < vocab else 0
    view.penalty = settings.repetition_penalty
    view.window = settings.repetition_window
    return 0


def check_tokens(tokens, vocab, name):
    """Return token ids as int32[T].

    Parameters
    ----------
    tokens : int[T]
    vocab : int
    name : str
        What errors call them.

    Raises
    ------
    ValueError, TypeError, IndexError
        If there is none, one is no whole number, or none of the vocabulary's.
    """
    try:
        array = np.asarray(tokens)
    except ValueError:
        raise ValueError(f"{name} has sequences of several lengths, expected [T]") from None
    if array.size == 0:
        raise ValueError(f"{name} is empty, expected at least one token")
    if array.dtype.kind not in "iu" or array.ndim != 1:
        raise TypeError(f"{name} is {array.dtype}{list(array.shape)}, expected whole numbers, [T]")
    wrong = np.flatnonzero((array < 0) | (array >= vocab))
    if wrong.size:
        raise IndexError(f"{name}[{wrong[0]}] is {array[wrong[0]]}, expected 0 to {vocab - 1}")
    return np.ascontiguousarray(array, np.int32)


# ---------------------------------------------------------------------------------------------
# From Python

cdef class Decoder:
    """Sequences that a model reads and writes, with the keys and values of their tokens so far.

    Parameters
    ----------
    model : PackedModel
    threads : int
        How many threads may share the work. Packed products give the same bits with any number,
        others may round differently.
    capacity : int, optional
        The longest sequence; the model's ``sequence_length`` when not given.
    sequences : int
        How many there are, at most 128. They are written side by side, so that the weights are
        read once for all of them.

    Notes
    -----
    A decoder is for one thread of Python at a time; several can share a model. Its memory goes with
    the last reference to it, or at ``close``, or at the end of a ``with``.

    Activations are rounded to int8 before every product with codes, whether or not the model was
    trained so (``int8_activations``), and so are keys and values, with one scale a token and head:
    logits are near those of ``forward_llm``, not the same.
    """

    def __cinit__(self):
        memset(&self.view, 0, sizeof(self.view))

    def __init__(self, PackedModel model not None, threads=1, capacity=None, sequences=1):
        cdef DecoderView *view = &self.view
        cdef Int8Buffer rows
        cdef Py_ssize_t i
        cdef int[::1] numbers
        cdef signed char[::1] keys, values
        config = model.config
        capacity = config.sequence_length if capacity is None else capacity
        if not 1 <= capacity <= config.sequence_length:
            raise ValueError(f"capacity is {capacity}, expected 1 to {config.sequence_length}")
        if not 1 <= threads <= 256:
            raise ValueError(f"threads is {threads}, expected 1 to 256")
        if not 1 <= sequences <= PROMPT_BLOCK:
            raise ValueError(f"sequences is {sequences}, expected 1 to {PROMPT_BLOCK}")
        self.model, self.threads = model, threads
        self.capacity, self.sequences = capacity, sequences
        self.lengths = [0] * sequences
        self.kept = []
        self.most = max(min(capacity, PROMPT_BLOCK), sequences)
        view.model = &model.view
        view.capacity = capacity
        view.dim, view.wide, view.vocab = config.model_dim, config.ffn_dim, config.vocab_size
        widest = max(view.dim, view.wide)
        view.cache_rows = (capacity + KEY_TILE - 1) // KEY_TILE * KEY_TILE
        cached = sequences * config.num_blocks * config.num_heads * view.cache_rows
        # Tiles are read as a whole, before all their keys are there.
        keys = np.zeros(cached * config.head_dim, np.int8)
        values = np.empty(cached * config.head_dim, np.int8)
        view.keys, view.values = &keys[0], &values[0]
        view.key_scales = self._buffer(cached)
        memset(view.key_scales, 0, cached * sizeof(float))
        view.value_scales = self._buffer(cached)
        numbers = np.empty(sequences * capacity, np.int32)
        view.history = &numbers[0]
        self.kept += [keys, values, numbers]
        self.tokens = np.empty(self.most, np.int32)
        numbers = self.tokens
        view.tokens = &numbers[0]
        view.stream = self._buffer(self.most * view.dim)
        view.q = self._buffer(self.most * view.dim)
        view.k = self._buffer(self.most * view.dim)
        view.v = self._buffer(self.most * view.dim)
        view.heads = self._buffer(self.most * view.dim)
        view.hidden = self._buffer(self.most * view.wide)
        view.normed = self._buffer(self.most * widest)
        self.logits = np.empty(sequences * view.vocab, np.float32)
        view.logits = float_pointer(self.logits)
        rows = Int8Buffer(self.most, widest)
        view.quantized = rows.view
        self.kept.append(rows)
        view.places = <Place *>calloc(self.most, sizeof(Place))
        view.members = <Member *>calloc(threads, sizeof(Member))
        if view.members == NULL or view.places == NULL:
            raise MemoryError("no memory for the threads' buffers")
        for i in range(threads):
            rows = Int8Buffer(1, widest)
            numbers = np.empty(view.vocab, np.int32)
            view.members[i].quantized = rows.view
            view.members[i].normed = self._buffer(widest)
            view.members[i].probs = self._buffer(
                max(min(capacity, PROMPT_BLOCK), CACHED_QUERIES) * view.cache_rows)
            view.members[i].head = self._buffer(4 * view.cache_rows * config.head_dim)
            view.members[i].token_probs = self._buffer(2 * view.vocab)
            view.members[i].candidates = &numbers[0]
            self.kept += [rows, numbers]

    def __dealloc__(self):
        free(self.view.members)
        free(self.view.places)

    def __reduce__(self):
        raise TypeError("a decoder cannot be copied or pickled: make another one of its model")

    def close(self) -> None:
        """Let go of the model, and of all that is remembered; nothing can be asked any more."""
        self._check_busy()
        self.model = self.kept = self.lengths = self.tokens = self.logits = None

    def __enter__(self):
        self._check_open()
        return self

    def __exit__(self, *error):
        self.close()

    cdef float *_buffer(self, size) except NULL:
        self.kept.append(np.empty(size, np.float32))
        return float_pointer(self.kept[-1])

    @property
    def nbytes(self) -> int:
        """The bytes of the cache and of the threads' buffers."""
        return sum(buffer.nbytes for buffer in (*self.kept, self.tokens, self.logits))

    @property
    def length(self) -> int:
        """The number of tokens so far, of the first sequence."""
        self._check_open()
        return self.lengths[0]

    def length_of(self, sequence) -> int:
        """Return the number of tokens so far of one sequence."""
        self._check_sequence(sequence)
        return self.lengths[sequence]

    def clear(self) -> None:
        """Forget all tokens of all sequences."""
        self._check_idle()
        self.lengths = [0] * self.sequences

    def truncate(self, length, sequence=0) -> None:
        """Forget the tokens of a sequence from ``length`` on.

        Raises
        ------
        ValueError
            If there are not so many.
        """
        self._check_idle()
        self._check_sequence(sequence)
        if not 0 <= length <= self.lengths[sequence]:
            raise ValueError(f"length is {length}, expected 0 to {self.lengths[sequence]}")
        self.lengths[sequence] = length

    def _check_open(self):
        if self.kept is None:
            raise ValueError("the decoder is closed")

    def _check_idle(self):
        self._check_open()
        self._check_busy()

    def _check_busy(self):
        if self.busy:
            raise RuntimeError("the decoder is at work in another thread: each needs its own")

    def _check_sequence(self, sequence):
        self._check_open()
        if not 0 <= sequence < self.sequences:
            raise IndexError(f"sequence is {sequence}, expected 0 to {self.sequences - 1}")

    def extend(self, tokens, sequence=0):
        """Take in more tokens of a sequence and return the logits after the last of them.

        Parameters
        ----------
        tokens : int[T]
        sequence : int

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
        prompt = self._checked(tokens, 0, sequence)
        self._run_alone(self._begin(prompt, sequence), sequence, LAST)
        return self.logits[:self.view.vocab].copy()

    def extend_all(self, tokens, sequence=0):
        """Take in more tokens of a sequence and return the logits after each: float32[T, V].

        Parameters and errors are those of ``extend``.
        """
        prompt = self._checked(tokens, 0, sequence)
        block = min(prompt.size, PROMPT_BLOCK)
        if self.logits.size < block * self.view.vocab:
            self.logits = np.empty(block * self.view.vocab, np.float32)
            self.view.logits = float_pointer(self.logits)
        result = np.empty((prompt.size, self.view.vocab), np.float32)
        for start in range(0, prompt.size, PROMPT_BLOCK):
            here = result[start:start + PROMPT_BLOCK]
            self._run_alone(prompt[start:start + PROMPT_BLOCK], sequence, EVERY)
            here[...] = self.logits[:here.size].reshape(here.shape)
        return result

    def extend_states(self, tokens, sequence=0):
        """Take in more tokens and return what the output layer would get for each: float32[T, C].

        That is the residual stream behind the last block, and behind the final norm where there
        is one. Parameters and errors are those of ``extend``.
        """
        prompt = self._checked(tokens, 0, sequence)
        result = np.empty((prompt.size, self.view.dim), np.float32)
        for start in range(0, prompt.size, PROMPT_BLOCK):
            here = result[start:start + PROMPT_BLOCK]
            self._run_alone(prompt[start:start + PROMPT_BLOCK], sequence, STATES)
            here[...] = np.asarray(<float[:here.size]>self.view.normed).reshape(here.shape)
        return result

    def write(self, tokens, uniforms, sampling=_SAMPLING, sequence=0):
        """Take in more tokens of a sequence and draw those that follow, one after the other.

        Parameters
        ----------
        tokens : int[T]
        uniforms : float64[N]
            Numbers in [0, 1), each of which decides what is drawn.
        sampling : SamplingConfig
        sequence : int

        Returns
        -------
        int32[N]
            The last of them is not taken in: the sequence grows by T + N - 1.

        Raises
        ------
        ValueError
            If there is no room for them, or logits are not finite.
        IndexError
            If an id is no token's.
        """
        numbers = _checked_uniforms(uniforms, 1)
        fill_sampling(&self.view.sampling, sampling, self.view.vocab)
        drawn = np.empty(numbers.size, np.int32)
        prompt = self._begin(self._checked(tokens, drawn.size - 1, sequence), sequence)
        for start in range(0, drawn.size, SAMPLED_AT_ONCE):
            here = drawn[start:start + SAMPLED_AT_ONCE]
            self._run_alone(prompt, sequence, LAST, here[None],
                            numbers[None, start:start + SAMPLED_AT_ONCE])
            prompt = here[-1:]
        return drawn

    def write_together(self, tokens, uniforms, sampling=_SAMPLING, sequences=None):
        """Take in a token of each of several sequences and draw those that follow, side by side.

        Parameters
        ----------
        tokens : int[S]
        uniforms : float64[S, N]
            Numbers in [0, 1), each of which decides what is drawn.
        sampling : SamplingConfig
        sequences : int[S], optional
            Which ones, each once; all when not given.

        Returns
        -------
        int32[S, N]
            The last of each is not taken in: every sequence grows by N.

        Raises
        ------
        ValueError
            If there is no room for them, or logits are not finite.
        IndexError
            If an id is no token's, or a sequence is none.
        """
        cdef Place *places = self.view.places
        self._check_open()
        numbers = _checked_uniforms(uniforms, 2)
        selected = list(range(self.sequences) if sequences is None else sequences)
        fill_sampling(&self.view.sampling, sampling, self.view.vocab)
        given = check_tokens(tokens, self.view.vocab, "tokens")
        self._check_idle()
        if len(set(selected)) != len(selected):
            raise ValueError("a sequence is named twice")
        if not len(selected) == given.size == len(numbers):
            raise ValueError(f"there are {len(selected)} sequences, {given.size} tokens and "
                             f"{len(numbers)} rows of uniforms, expected as many of each")
        for sequence in selected:
            self._check_capacity(sequence, numbers.shape[1])
        drawn = np.empty(numbers.shape, np.int32)
        at_once = max(SAMPLED_AT_ONCE // len(selected), 1)
        for start in range(0, drawn.shape[1], at_once):
            here = np.empty((len(selected), min(at_once, drawn.shape[1] - start)), np.int32)
            self.tokens[:given.size] = given
            for i, sequence in enumerate(selected):
                places[i].sequence, places[i].past = sequence, self.lengths[sequence]
            self.view.rows, self.view.together = len(selected), False
            self._run(EVERY, here, np.ascontiguousarray(numbers[:, start:start + at_once]))
            for sequence in selected:
                self.lengths[sequence] += here.shape[1]
            drawn[:, start:start + at_once] = here
            given = here[:, -1]
        return drawn

    def _checked(self, tokens, more, sequence):
        """Return checked tokens of a sequence that has room for them and so many more."""
        self._check_sequence(sequence)
        prompt = check_tokens(tokens, self.view.vocab, "tokens")
        self._check_idle()
        self._check_capacity(sequence, prompt.size + more)
        return prompt

    def _check_capacity(self, sequence, more):
        self._check_sequence(sequence)
        if self.lengths[sequence] + more > self.capacity:
            raise ValueError(f"{self.lengths[sequence]} tokens and {more} more do not fit a "
                             f"sequence of {self.capacity}")
        if self.model.rotary is not None:
            self.model.rotary.fill(self.lengths[sequence] + more)

    def _begin(self, prompt, sequence):
        """Take in a prompt but for its last block, and return that."""
        last = (prompt.size - 1) // PROMPT_BLOCK * PROMPT_BLOCK
        for start in range(0, last, PROMPT_BLOCK):
            self._run_alone(prompt[start:start + PROMPT_BLOCK], sequence, NOTHING)
        return prompt[last:]

    def _run_alone(self, prompt, sequence, wanted, drawn=None, uniforms=None):
        """Let a block of one sequence's tokens through, and draw those that follow."""
        cdef Place *places = self.view.places
        cdef Py_ssize_t i, past = self.lengths[sequence], which = sequence
        self._check_idle()
        for i in range(prompt.size):
            places[i].sequence, places[i].past = which, past + i
        self.tokens[:prompt.size] = prompt
        self.view.rows, self.view.together = prompt.size, True
        self._run(wanted, drawn, uniforms)
        self.lengths[sequence] += prompt.size + (0 if drawn is None else drawn.shape[1] - 1)

    cdef int _run(self, Wanted wanted, int[:, ::1] drawn,
                  const double[:, ::1] uniforms) except -1:
        cdef DecoderView *view = &self.view
        cdef int threads = self.threads
        PyErr_CheckSignals()
        self._check_idle()
        view.wanted = wanted
        view.to_sample = 0
        if drawn is not None:
            view.sampled = &drawn[0, 0]
            view.uniforms = &uniforms[0, 0]
            view.to_sample = drawn.shape[1]
        view.out_of_memory = view.damaged = False
        self.busy = True
        with nogil:
            parallel_region(decode, view, &view.team, threads)
        self.busy = False
        if view.out_of_memory:
            raise MemoryError("no memory for the kernels' packing buffers")
        if view.damaged:
            raise ValueError("the model's logits are not finite: its weights are damaged")
        return 0


def _checked_uniforms(uniforms, axes):
    numbers = np.ascontiguousarray(uniforms, np.float64)
    if numbers.ndim != axes:
        raise ValueError(f"uniforms has {numbers.ndim} axes, expected {axes}")
    if numbers.size == 0:
        raise ValueError("uniforms is empty: no token is to be drawn")
    if not (np.min(numbers) >= 0.0 and np.max(numbers) < 1.0):
        raise ValueError("uniforms holds a number that is not in [0, 1)")
    return numbers
