"""Decoding and sampling (C: ``inference.c``).

A ``Decoder`` has a cache of the keys and values of sequences. Their tokens pass through a packed
model without returning to Python, sampling included. The threads of a team share the work: each
computes some rows of every product and some of the heads, and barriers separate the stages. A
prompt passes in blocks of tokens, several sequences in blocks of one token each.
"""

from operator import index

import numpy as np

from cpython.exc cimport PyErr_CheckSignals
from libc.math cimport INFINITY
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

from legacy1bit.kernels cimport (
    CACHED_QUERIES, KEY_TILE, STRIP_ROWS, CachedHead, Int8Rows, KernelTable, Matrix,
    strided,
)
from legacy1bit.math_ops cimport kernels, packed_kernels
from legacy1bit.model cimport NormView, float_pointer, normalize
from legacy1bit.packed cimport Int8Matrix, PackedBlock, PackedModel, PackedModelView
from legacy1bit.projection cimport Projection, Workspace, adapt, read_row, reserve, unpack_rows
from legacy1bit.threads cimport barrier, parallel_region

from legacy1bit.hyperparams import SamplingConfig

cdef double GREEDY = 1e-30      # the temperature below which the likeliest token is taken

_SAMPLING = SamplingConfig()

ACTIVATIONS = ("int8", "float32")

cdef enum:
    PROMPT_BLOCK = 128
    TOKENS_PER_CALL = 64    # between two checks for Ctrl-C
    SUM_BLOCK = 1024        # probabilities whose sum is in float32
    MAX_BLOCK = 64          # probabilities of which the largest bounds the others


# ---------------------------------------------------------------------------------------------
# The stages of a pass, each as one thread of the team does its part

cdef inline Py_ssize_t slice_start(Py_ssize_t count, Py_ssize_t thread,
                                   Py_ssize_t threads) noexcept nogil:
    # The start of the thread's slice of `count` items; its stop is the start of the next one.
    return count * thread // threads


cdef inline bint multiplies_integers(const DecoderView *d,
                                     const Projection *projection) noexcept nogil:
    # Whether a product rounds its input to int8.
    return not d.float_activations and (projection.packed.tiles != NULL
                                        or projection.int8.codes != NULL)


cdef const Int8Rows *prepare(DecoderView *d, Py_ssize_t thread, const float *source,
                             Py_ssize_t cols, Py_ssize_t rows, const NormView *norm,
                             const Projection *reader, const float **dense) noexcept nogil:
    # The input of the next products: normalized if there is a norm, and quantized if they multiply
    # integers. Every thread prepares a single token for itself, of several tokens its slice.
    cdef const KernelTable *kernel = kernels()
    cdef ThreadBuffers *own = &d.threads[thread]
    cdef Int8Rows quantized = own.quantized if rows == 1 else d.quantized
    cdef float *normed = own.normed if rows == 1 else d.normed
    cdef float mean[PROMPT_BLOCK]
    cdef float inv_std[PROMPT_BLOCK]
    cdef Py_ssize_t first = 0, count = rows
    if rows > 1:
        first = slice_start(rows, thread, d.team.size)
        count = slice_start(rows, thread + 1, d.team.size) - first
    if norm.gamma:
        normalize(norm, source + first * cols, normed + first * cols, mean, inv_std, count, cols)
        source = normed
    if multiplies_integers(d, reader):
        quantized.codes += first * quantized.stride
        quantized.scales += first
        quantized.sums += first
        kernel.quantize_rows(source + first * cols, count, cols, &quantized)
    if rows > 1:
        barrier(&d.team)
    dense[0] = source
    return &own.quantized if rows == 1 else &d.quantized


cdef void project(DecoderView *d, Py_ssize_t thread, const Projection *projection,
                  const Int8Rows *quantized, const float *dense, Py_ssize_t rows, bint accumulate,
                  float *out, const Workspace *workspace) noexcept nogil:
    # This thread's strips of out[rows, projection.rows] (+)= the product + bias.
    cdef Py_ssize_t strips = (projection.rows + STRIP_ROWS - 1) // STRIP_ROWS
    cdef Py_ssize_t first = slice_start(strips, thread, d.team.size)
    cdef Py_ssize_t last = slice_start(strips, thread + 1, d.team.size)
    cdef Py_ssize_t low = first * STRIP_ROWS
    cdef Py_ssize_t count = min(projection.rows, last * STRIP_ROWS) - low
    if count <= 0:
        return
    if projection.matrix.dense:
        project_dense(projection, dense, rows, low, count, accumulate, out, workspace)
    elif d.float_activations:
        project_floats(projection, dense, rows, low, count, accumulate, out, workspace)
    elif projection.packed.tiles:
        packed_kernels().packed_product(&projection.packed, first, last, quantized, rows,
                                        projection.bias, accumulate, out, projection.rows,
                                        workspace.packing)
    else:
        # No sum is ever added to the logits.
        kernels().int8_rows_product(&projection.int8, low, low + count, projection.cols, quantized,
                                    rows, projection.bias, out, projection.rows)
    if projection.adapter.rank:
        adapt(projection, dense, rows, low, count, out, workspace)


cdef void project_dense(const Projection *projection, const float *dense, Py_ssize_t rows,
                        Py_ssize_t low, Py_ssize_t count, bint accumulate, float *out,
                        const Workspace *workspace) noexcept nogil:
    # The same product of floats.
    cdef const float *bias = projection.bias
    cdef const float *start = NULL
    cdef Py_ssize_t t
    cdef Matrix part
    if rows == 1:
        part = projection.matrix
        part.dense += low * part.cols
        part.rows = count
        if accumulate:
            kernels().matrix_vector(&part, dense, workspace.packing)
            kernels().add(out + low, workspace.packing, count)
        else:
            kernels().matrix_vector(&part, dense, out + low)
        if bias:
            kernels().add(out + low, bias + low, count)
        return
    if bias and not accumulate:
        start = bias + low
    kernels().matmul(rows, count, projection.cols, strided(dense, projection.cols, 1),
                     strided(projection.matrix.dense + low * projection.cols, 1, projection.cols),
                     start, accumulate, out + low, projection.rows, workspace.packing)
    if accumulate and bias:
        for t in range(rows):
            kernels().add(out + t * projection.rows + low, bias + low, count)


cdef void project_floats(const Projection *projection, const float *dense, Py_ssize_t rows,
                         Py_ssize_t low, Py_ssize_t count, bint accumulate, float *out,
                         const Workspace *workspace) noexcept nogil:
    # The same product of codes, which are unpacked strip by strip, with float activations.
    cdef const float *bias = projection.bias
    cdef Py_ssize_t first, t
    cdef float *to
    cdef Matrix part
    for first from low <= first < low + count by STRIP_ROWS:
        unpack_rows(projection, first, min(low + count - first, STRIP_ROWS), workspace.codes, &part)
        kernels().linear(&part, NULL, dense, rows, workspace.products, workspace.packing)
        for t in range(rows):
            to = out + t * projection.rows + first
            if accumulate:
                kernels().add(to, workspace.products + t * part.rows, part.rows)
            else:
                memcpy(to, workspace.products + t * part.rows, part.rows * sizeof(float))
            if bias:
                kernels().add(to, bias + first, part.rows)


cdef void attend(DecoderView *d, Py_ssize_t thread, Py_ssize_t layer, const Position *positions,
                 Py_ssize_t rows, Py_ssize_t step) noexcept nogil:
    # This thread's heads: appends their keys and values to the cache, and computes their outputs.
    cdef Py_ssize_t row
    if rows > 1 and d.single_sequence:
        attend_sequence(d, thread, layer, positions.sequence, positions.past, 0, rows)
        return
    for row in range(rows):
        attend_sequence(d, thread, layer, positions[row].sequence, positions[row].past + step, row,
                        1)


cdef void attend_sequence(DecoderView *d, Py_ssize_t thread, Py_ssize_t layer,
                          Py_ssize_t sequence, Py_ssize_t past, Py_ssize_t row,
                          Py_ssize_t rows) noexcept nogil:
    # The same for consecutive tokens of one sequence, from a row on.
    cdef const KernelTable *kernel = kernels()
    cdef const PackedModelView *model = d.model
    cdef const PackedBlock *block = &model.blocks[layer]
    cdef Py_ssize_t dim = model.head_dim, group = model.num_heads // model.num_kv_heads
    cdef Py_ssize_t head, at, t
    cdef Py_ssize_t first = slice_start(model.num_kv_heads, thread, d.team.size)
    cdef Py_ssize_t last = slice_start(model.num_kv_heads, thread + 1, d.team.size)
    cdef float *q = d.q + row * d.query_dim + first * group * dim
    cdef float *k = d.k + row * d.kv_dim
    cdef float *v = d.v + row * d.kv_dim
    if block.q_norm.gamma:
        normalize_heads(&block.q_norm, q, rows, d.query_dim, (last - first) * group, dim)
        normalize_heads(&block.k_norm, k + first * dim, rows, d.kv_dim, last - first, dim)
    if model.rotary.cosines:
        kernel.rotary(&model.rotary, past, 1.0, q, rows, d.query_dim, (last - first) * group, dim)
        kernel.rotary(&model.rotary, past, 1.0, k + first * dim, rows, d.kv_dim, last - first, dim)
    for head in range(first, last):
        at = ((sequence * model.num_blocks + layer) * model.num_kv_heads + head) * d.cache_rows
        for t in range(rows):
            append(d, at, past + t, k + t * d.kv_dim + head * dim, v + t * d.kv_dim + head * dim,
                   d.threads[thread].head)
        attend_rows(d, thread, head, at, block.window, past, row, rows)


cdef void normalize_heads(const NormView *norm, float *x, Py_ssize_t rows, Py_ssize_t stride,
                          Py_ssize_t heads, Py_ssize_t dim) noexcept nogil:
    # RMS norms of the heads in each row, in place.
    cdef Py_ssize_t t, h
    cdef float inv_std
    for t in range(rows):
        for h in range(heads):
            normalize(norm, x + t * stride + h * dim, x + t * stride + h * dim, NULL, &inv_std, 1,
                      dim)


cdef void append(DecoderView *d, Py_ssize_t at, Py_ssize_t past, const float *k, const float *v,
                 signed char *codes) noexcept nogil:
    # A head's key and value of a token into the cache; codes is int8[dim] of scratch.
    cdef Py_ssize_t dim = d.model.head_dim, i
    cdef signed char *to = d.keys + (at + past // KEY_TILE * KEY_TILE) * d.even_dim \
        + past % KEY_TILE * 2
    d.key_scales[at + past] = quantize_head(k, dim, codes)
    for i in range(dim):
        to[i // 2 * 2 * KEY_TILE + i % 2] = codes[i]
    to = d.values + (at + past // 2 * 2) * dim + past % 2
    d.value_scales[at + past] = quantize_head(v, dim, codes)
    for i in range(dim):
        to[2 * i] = codes[i]


cdef float quantize_head(const float *x, Py_ssize_t dim, signed char *codes) noexcept nogil:
    # Returns the scale.
    cdef Int8Rows quantized
    cdef float scale
    cdef int total
    quantized.stride = dim
    quantized.codes = codes
    quantized.scales = &scale
    quantized.sums = &total
    kernels().quantize_rows(x, 1, dim, &quantized)
    return scale


cdef void attend_rows(DecoderView *d, Py_ssize_t thread, Py_ssize_t kv_head, Py_ssize_t at,
                      Py_ssize_t window, Py_ssize_t past, Py_ssize_t row,
                      Py_ssize_t rows) noexcept nogil:
    # Rows of consecutive tokens, with the same bits on every CPU, for the heads that share
    # keys and values; `at` is the first row of their cache. Several queries share each load: the
    # heads of a single token, else several tokens of each head.
    cdef CachedHead view
    cdef Py_ssize_t group = d.model.num_heads // d.model.num_kv_heads, dim = d.model.head_dim
    cdef Py_ssize_t t, i, low, column = kv_head * group * dim
    view.head_dim = dim
    view.probs_stride = d.cache_rows
    view.probs = d.threads[thread].probs
    view.codes = d.threads[thread].codes
    view.codes_stride = d.codes_stride
    view.step = 1 if rows > 1 else 0
    view.stride = d.query_dim if rows > 1 else dim
    t = i = 0
    while i < group:
        view.queries = min(group - i, CACHED_QUERIES)
        if rows > 1:
            # With an attention window each token has another first key.
            view.queries = 1 if window else min(rows - t, CACHED_QUERIES)
        low = past + t + 1 - window if window and window < past + t + 1 else 0
        view.keys = past + t + 1 - low
        view.skipped = low % KEY_TILE
        view.q = d.q + (row + t) * d.query_dim + column + i * dim
        view.k = d.keys + (at + low - view.skipped) * d.even_dim
        view.v = d.values + (at + low - view.skipped) * dim
        view.k_scales = d.key_scales + at + low
        view.v_scales = d.value_scales + at + low
        view.out = d.heads + (row + t) * d.query_dim + column + i * dim
        kernels().cached_attention(&view)
        if rows == 1:
            i += view.queries
            continue
        t += view.queries
        if t == rows:
            t = 0
            i += 1


cdef void activate(DecoderView *d, Py_ssize_t thread, Py_ssize_t rows) noexcept nogil:
    # The activation or gate of this thread's strips of the hidden layer, in place.
    cdef Py_ssize_t strips = (d.wide + STRIP_ROWS - 1) // STRIP_ROWS, t
    cdef Py_ssize_t low = slice_start(strips, thread, d.team.size) * STRIP_ROWS
    cdef Py_ssize_t next = slice_start(strips, thread + 1, d.team.size) * STRIP_ROWS
    cdef Py_ssize_t count = min(d.wide, next) - low
    cdef float *row
    if count <= 0:
        return
    for t in range(rows):
        row = d.hidden + t * d.wide + low
        if d.gate:
            kernels().gate(d.model.activation, d.gate + t * d.wide + low, row, row, count)
        else:
            kernels().activate(d.model.activation, row, row, count)


cdef void transform(DecoderView *d, Py_ssize_t thread, Py_ssize_t layer, const Position *positions,
                    Py_ssize_t rows, Py_ssize_t step, const Workspace *workspace) noexcept nogil:
    # One block: stream += attention(norm1(stream)); stream += ffn(norm2(stream)).
    cdef const PackedBlock *block = &d.model.blocks[layer]
    cdef const float *dense = NULL
    cdef const Int8Rows *quantized = prepare(d, thread, d.stream, d.dim, rows, &block.norm1,
                                             &block.wq, &dense)
    project(d, thread, &block.wq, quantized, dense, rows, False, d.q, workspace)
    project(d, thread, &block.wk, quantized, dense, rows, False, d.k, workspace)
    project(d, thread, &block.wv, quantized, dense, rows, False, d.v, workspace)
    barrier(&d.team)
    attend(d, thread, layer, positions, rows, step)
    barrier(&d.team)
    quantized = prepare(d, thread, d.heads, d.query_dim, rows, &block.heads_norm, &block.wo,
                        &dense)
    project(d, thread, &block.wo, quantized, dense, rows, True, d.stream, workspace)
    barrier(&d.team)
    quantized = prepare(d, thread, d.stream, d.dim, rows, &block.norm2, &block.wi, &dense)
    if d.gate:
        project(d, thread, &block.wg, quantized, dense, rows, False, d.gate, workspace)
    project(d, thread, &block.wi, quantized, dense, rows, False, d.hidden, workspace)
    activate(d, thread, rows)
    barrier(&d.team)
    quantized = prepare(d, thread, d.hidden, d.wide, rows, &block.hidden_norm, &block.wo_ffn,
                        &dense)
    project(d, thread, &block.wo_ffn, quantized, dense, rows, True, d.stream, workspace)
    barrier(&d.team)


cdef void forward_tokens(DecoderView *d, Py_ssize_t thread, const Position *positions,
                         Py_ssize_t rows, Py_ssize_t step, Output output,
                         const Workspace *workspace) noexcept nogil:
    # The forward pass of one token for each row, `step` tokens behind its position.
    cdef const Projection *embedding = &d.model.embedding
    cdef const NormView *norm = &d.model.final_norm
    cdef const float *dense = NULL
    cdef const Int8Rows *quantized
    cdef float mean[PROMPT_BLOCK]
    cdef float inv_std[PROMPT_BLOCK]
    cdef Py_ssize_t t, layer, first = slice_start(rows, thread, d.team.size)
    cdef Py_ssize_t last = slice_start(rows, thread + 1, d.team.size)
    cdef float *stream = d.stream
    for t in range(first, last):
        d.history[positions[t].sequence * d.capacity + positions[t].past + step] = d.tokens[t]
        read_row(embedding, d.tokens[t], d.stream + t * d.dim, workspace.codes)
    barrier(&d.team)
    for layer in range(d.model.num_blocks):
        transform(d, thread, layer, positions, rows, step, workspace)
    if output == HIDDEN_STATES:
        if norm.gamma:
            normalize(norm, stream + first * d.dim, d.normed + first * d.dim, mean, inv_std,
                      last - first, d.dim)
        else:
            memcpy(d.normed + first * d.dim, stream + first * d.dim,
                   (last - first) * d.dim * sizeof(float))
    elif output != NO_OUTPUT:
        if output == LAST_LOGITS:
            stream += (rows - 1) * d.dim
            rows = 1
        quantized = prepare(d, thread, stream, d.dim, rows, norm, &d.model.output, &dense)
        project(d, thread, &d.model.output, quantized, dense, rows, False, d.logits, workspace)
        barrier(&d.team)


cdef void decode(void *context, long thread) noexcept nogil:
    # A job: the forward pass of the input tokens, then sampling and a pass for each new token.
    cdef DecoderView *d = <DecoderView *>context
    cdef const Position *positions = d.positions
    cdef Py_ssize_t rows = d.rows, i, row, length
    cdef const int *history
    cdef ThreadBuffers *own = &d.threads[thread]
    cdef Workspace workspace
    if not reserve(&workspace, &d.model.demand, rows):
        d.out_of_memory = True
    barrier(&d.team)
    if d.out_of_memory:
        return
    forward_tokens(d, thread, positions, rows, 0, d.output, &workspace)
    if d.single_sequence:
        positions += rows - 1
        rows = 1
    for i in range(d.to_sample):
        for row in range(slice_start(rows, thread, d.team.size),
                         slice_start(rows, thread + 1, d.team.size)):
            history = d.history + positions[row].sequence * d.capacity
            length = positions[row].past + i + 1
            d.tokens[row] = sample(d.logits + row * d.vocab, d.vocab, d.samplings + row, history,
                                   length, d.uniforms[row * d.to_sample + i],
                                   own.token_probs, own.candidates)
            d.sampled[row * d.to_sample + i] = d.tokens[row]
            if d.tokens[row] < 0:
                d.nonfinite = True
        barrier(&d.team)
        if d.nonfinite:
            return
        # The last token has no pass: nothing follows it in this job.
        if i + 1 < d.to_sample:
            forward_tokens(d, thread, positions, rows, i + 1, ALL_LOGITS, &workspace)


# ---------------------------------------------------------------------------------------------
# Sampling

cdef inline bint is_likelier(const float *probs, const float *logits, int a,
                             int b) noexcept nogil:
    # A high temperature makes probabilities equal: then the logits decide, then the token ids.
    if probs[a] != probs[b]:
        return probs[a] > probs[b]
    return logits[a] > logits[b] or (logits[a] == logits[b] and a < b)


cdef inline void sift_down(const float *probs, const float *logits, int *heap, Py_ssize_t size,
                           Py_ssize_t at) noexcept nogil:
    # Restores the heap below one of its elements; the likeliest token is on top.
    cdef Py_ssize_t child
    cdef int moved = heap[at]
    while 2 * at + 1 < size:
        child = 2 * at + 1
        if child + 1 < size and is_likelier(probs, logits, heap[child + 1], heap[child]):
            child += 1
        if not is_likelier(probs, logits, heap[child], moved):
            break
        heap[at] = heap[child]
        at = child
    heap[at] = moved


cdef double sum_of(const float *probs, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t start
    cdef double total = 0.0
    for start from 0 <= start < n by SUM_BLOCK:
        total += kernels().sum(probs + start, min(n - start, SUM_BLOCK))
    return total


cdef Py_ssize_t inverse_cdf(const float *probs, Py_ssize_t n, double mass) noexcept nogil:
    # The first token at which the cumulative sum exceeds the mass, or -1.
    cdef Py_ssize_t start, i
    cdef double passed = 0.0, here
    for start from 0 <= start < n by SUM_BLOCK:
        here = kernels().sum(probs + start, min(n - start, SUM_BLOCK))
        if passed + here > mass:
            for i in range(start, min(start + SUM_BLOCK, n)):
                passed += probs[i]
                if passed > mass:
                    return i
        else:
            passed += here
    return -1


cdef float top_k_bound(const float *probs, Py_ssize_t n, Py_ssize_t top_k,
                       float *heap) noexcept nogil:
    # A lower bound of the top_k largest: of the maxima of blocks, number top_k. 0 if there are few
    # blocks. heap holds top_k floats.
    cdef Py_ssize_t blocks = (n + MAX_BLOCK - 1) // MAX_BLOCK, i, child, at
    cdef float largest
    if blocks < 2 * top_k:
        return 0.0
    # The heap has the top_k largest maxima so far, the least of them on top.
    for i in range(blocks):
        largest = kernels().largest(probs + i * MAX_BLOCK, min(n - i * MAX_BLOCK, MAX_BLOCK))
        if i < top_k:
            at = i
            while at and heap[(at - 1) // 2] > largest:
                heap[at] = heap[(at - 1) // 2]
                at = (at - 1) // 2
            heap[at] = largest
        elif largest > heap[0]:
            at = 0
            while 2 * at + 1 < top_k:
                child = 2 * at + 1
                if child + 1 < top_k and heap[child + 1] < heap[child]:
                    child += 1
                if heap[child] >= largest:
                    break
                heap[at] = heap[child]
                at = child
            heap[at] = largest
    return heap[0]


cdef void penalize_repetition(const Sampling *sampling, const float *logits, const int *history,
                              Py_ssize_t length, float *out) noexcept nogil:
    # The repetition penalty: lowers the logits of tokens that the window of the history has.
    cdef Py_ssize_t i = 0 if sampling.window == 0 else max(length - sampling.window, 0)
    cdef int token
    for i in range(i, length):
        token = history[i]
        if logits[token] > 0.0:
            out[token] = logits[token] / sampling.penalty
        else:
            out[token] = logits[token] * sampling.penalty


cdef int softmax(float *probs, Py_ssize_t n, float temperature, int *candidates,
                 double *total) noexcept nogil:
    # Logits to probabilities times their sum, `total`; the largest is 1. Returns the likeliest
    # token, the first of several, or -1 if a logit is not finite. candidates is scratch.
    cdef const KernelTable *kernel = kernels()
    cdef float largest = kernel.largest(probs, n)
    cdef int likeliest
    if kernel.select(probs, n, largest, candidates) == 0:
        return -1
    likeliest = candidates[0]
    kernel.shift(probs, -largest, n)
    if temperature >= GREEDY:
        kernel.divide(probs, temperature, n)
    kernel.exp(probs, n)
    total[0] = sum_of(probs, n)
    # A NaN makes the sum NaN, and so does infinity less infinity.
    return likeliest if total[0] > 0.0 else -1


cdef Py_ssize_t select_candidates(float *probs, Py_ssize_t n, const Sampling *sampling,
                                  double total, int *candidates) noexcept nogil:
    # Collects the tokens that the filters may keep, and leaves out most of the others.
    cdef float bound
    if sampling.top_k:
        bound = top_k_bound(probs, n, sampling.top_k, probs + n)
    elif sampling.top_p < 1.0:
        # All tokens below it together have less than the mass that top_p may leave out.
        bound = 0.99 * (1.0 - sampling.top_p) * total / n
    else:
        bound = sampling.min_p
    return kernels().select(probs, n, bound, candidates)


cdef Py_ssize_t rank(const float *probs, const float *logits, int *candidates, Py_ssize_t count,
                     Py_ssize_t most, double mass) noexcept nogil:
    # Heapsort that stops at `most` tokens or at this mass: the likeliest is the last candidate, the
    # second before it, and so on. Returns the number of ranked tokens.
    cdef Py_ssize_t i
    cdef double passed = 0.0
    cdef int token
    for i in range(count // 2 - 1, -1, -1):
        sift_down(probs, logits, candidates, count, i)
    for i in range(most):
        token = candidates[0]
        candidates[0] = candidates[count - 1 - i]
        candidates[count - 1 - i] = token
        sift_down(probs, logits, candidates, count - 1 - i, 0)
        passed += probs[token]
        if passed >= mass:
            return i + 1
    return most


cdef Py_ssize_t filter_top_p(const float *probs, const int *likeliest, Py_ssize_t count,
                             double top_p) noexcept nogil:
    # How many of the ranked tokens, which end at `likeliest`, have the fraction top_p of the mass.
    cdef Py_ssize_t i
    cdef double total = 0.0, passed = 0.0
    for i in range(count):
        total += probs[likeliest[-i]]
    for i in range(count):
        passed += probs[likeliest[-i]]
        if passed >= top_p * total:
            return i + 1
    return count


cdef int sample_min_p(const float *probs, const int *last, Py_ssize_t count, double min_p,
                      double uniform) noexcept nogil:
    # Samples from the candidates, which end at `last`, that have min_p times the largest
    # probability; -1 if the sum is not reached. min_p is 0 without this filter.
    cdef Py_ssize_t i
    cdef double total = 0.0, passed = 0.0
    cdef int token
    for i in range(count):
        if probs[last[-i]] >= min_p:
            total += probs[last[-i]]
    for i in range(count):
        token = last[-i]
        if probs[token] >= min_p:
            passed += probs[token]
            if passed > uniform * total:
                return token
    return -1


cdef int sample(const float *logits, Py_ssize_t n, const Sampling *sampling, const int *history,
                Py_ssize_t length, double uniform, float *probs, int *candidates) noexcept nogil:
    # A token, or -1 if a logit is not finite. probs holds 2 n floats, candidates n.
    cdef float temperature = <float>min(sampling.temperature, 3e38)
    cdef Py_ssize_t count, ranked
    cdef double total = 0.0
    cdef int likeliest, token
    memcpy(probs, logits, n * sizeof(float))
    if sampling.penalty != 1.0:
        penalize_repetition(sampling, logits, history, length, probs)
    if sampling.bias:
        kernels().add(probs, sampling.bias, n)
    likeliest = softmax(probs, n, temperature, candidates, &total)
    if likeliest < 0 or temperature < GREEDY:
        return likeliest
    if not sampling.top_k and sampling.top_p >= 1.0 and sampling.min_p <= 0.0:
        token = <int>inverse_cdf(probs, n, uniform * total)
        return token if token >= 0 else likeliest
    count = ranked = select_candidates(probs, n, sampling, total, candidates)
    if sampling.top_k:
        ranked = rank(probs, logits, candidates, count, min(count, sampling.top_k), INFINITY)
        if sampling.top_p < 1.0:
            ranked = filter_top_p(probs, candidates + count - 1, ranked, sampling.top_p)
    elif sampling.top_p < 1.0:
        ranked = rank(probs, logits, candidates, count, count, sampling.top_p * total)
    token = sample_min_p(probs, candidates + count - 1, ranked, sampling.min_p, uniform)
    return token if token >= 0 else likeliest


def sample_token(logits, rng, sampling=_SAMPLING, history=()) -> int:
    """Sample a token.

    Parameters
    ----------
    logits : float32[V]
    rng : numpy.random.Generator
        Of which one number is taken, unless the temperature is 0.
    sampling : SamplingConfig
    history : int[T]
        The tokens before it, for the repetition penalty.

    Returns
    -------
    int
        At temperature 0 the likeliest token, the first of several.

    Raises
    ------
    ValueError
        If a logit is NaN or infinity.
    IndexError
        If ``history`` holds an id that is not a token's.

    Notes
    -----
    C: ``inference.c``, whose strategies are greedy, temperature and top-k.
    """
    cdef const float[::1] given = logits
    cdef float[::1] probs
    cdef int[::1] candidates
    cdef const int[::1] before
    cdef Sampling view
    if given.shape[0] == 0:
        raise ValueError("logits is empty")
    probs = np.empty(2 * given.shape[0], np.float32)
    candidates = np.empty(given.shape[0], np.int32)
    before = check_tokens(history if len(history) else [0], given.shape[0], "history")
    fill_sampling(&view, sampling, None, given.shape[0])
    uniform = rng.random() if view.temperature else 0.0
    token = sample(&given[0], given.shape[0], &view, &before[0], len(history), uniform,
                   &probs[0], &candidates[0])
    if token < 0:
        raise NonfiniteLogits((0,))
    return token


class NonfiniteLogits(ValueError):
    """A logit is not finite.

    Attributes
    ----------
    rows : tuple of int
        Of the call's sequences, those that are concerned.
    """

    def __init__(self, rows):
        super().__init__("the model's logits are not finite: its weights are damaged")
        self.rows = rows


cdef int fill_sampling(Sampling *view, settings, bias, Py_ssize_t vocab) except -1:
    cdef const float[::1] added
    if not isinstance(settings, SamplingConfig):
        raise TypeError(f"sampling is {settings!r}, expected a SamplingConfig")
    view.temperature = settings.temperature
    view.top_p = settings.top_p
    view.min_p = settings.min_p
    view.top_k = settings.top_k if settings.top_k < vocab else 0
    view.penalty = settings.repetition_penalty
    view.window = settings.repetition_window
    view.bias = NULL
    if bias is not None:
        added = bias
        if added.shape[0] != vocab:
            raise ValueError(f"bias has {added.shape[0]} numbers, expected {vocab}")
        view.bias = &added[0]
    return 0


def check_tokens(tokens, vocab, name):
    """Return token ids as int32[T].

    Parameters
    ----------
    tokens : int[T]
    vocab : int
    name : str
        The name in error messages.

    Raises
    ------
    ValueError, TypeError, IndexError
        If there are no tokens, they are not whole numbers, or an id is not in the vocabulary.
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
# The decoder

cdef class Decoder:
    """Sequences of tokens, with a cache of their keys and values.

    Parameters
    ----------
    model : PackedModel
    threads : int
        The number of threads. Products of packed codes have the same bits for any number, others
        may be rounded differently.
    capacity : int, optional
        The maximum length of a sequence; by default the model's ``sequence_length``.
    sequences : int
        The number of sequences, at most 128. ``generate_batch`` reads the weights once for all.
    activations : {"int8", "float32"}
        The inputs of products with codes.

    Notes
    -----
    Only one Python thread at a time may use a decoder; several decoders can share a model. Its
    memory is freed with the last reference to it, at ``close``, or at the end of a ``with``.

    Activations are quantized to int8 before every product with codes, whether or not the model was
    trained so (``int8_activations``), and so are keys and values, with one scale per token and
    head: logits are near those of ``forward_llm``, not equal. Float activations take several times
    as long; keys and values stay int8.
    """

    def __cinit__(self):
        memset(&self.view, 0, sizeof(self.view))

    def __init__(self, PackedModel model not None, threads=1, capacity=None, sequences=1,
                 activations="int8"):
        cdef DecoderView *view = &self.view
        cdef int i
        config = model.config
        threads, sequences = index(threads), index(sequences)
        capacity = config.sequence_length if capacity is None else index(capacity)
        if not 1 <= capacity <= config.sequence_length:
            raise ValueError(f"capacity is {capacity}, expected 1 to {config.sequence_length}")
        if not 1 <= threads <= 256:
            raise ValueError(f"threads is {threads}, expected 1 to 256")
        if not 1 <= sequences <= PROMPT_BLOCK:
            raise ValueError(f"sequences is {sequences}, expected 1 to {PROMPT_BLOCK}")
        if activations not in ACTIVATIONS:
            raise ValueError(f"activations is {activations!r}, expected {' or '.join(ACTIVATIONS)}")
        self.model, self.threads = model, threads
        view.float_activations = activations == "float32"
        self.capacity, self.sequences = capacity, sequences
        self.max_rows = max(min(capacity, PROMPT_BLOCK), sequences)
        self.lengths = [0] * sequences
        self.arrays = []
        view.model = &model.view
        view.capacity = capacity
        view.dim, view.wide, view.vocab = config.model_dim, config.ffn_dim, config.vocab_size
        view.query_dim, view.kv_dim = config.query_dim, config.kv_dim
        view.width = max(config.model_dim, config.ffn_dim, config.query_dim)
        view.cache_rows = (capacity + KEY_TILE - 1) // KEY_TILE * KEY_TILE
        view.even_dim = config.head_dim + config.head_dim % 2
        view.codes_stride = max(view.cache_rows, view.even_dim) + KEY_TILE
        self._allocate_cache()
        self._allocate_rows()
        view.threads = <ThreadBuffers *>calloc(threads, sizeof(ThreadBuffers))
        if view.threads == NULL:
            raise MemoryError("no memory for the threads' buffers")
        for i in range(self.threads):
            self._allocate_thread(&view.threads[i])

    cdef int _allocate_cache(self) except -1:
        # Keys and values of all sequences, and their tokens.
        cdef DecoderView *view = &self.view
        config = self.model.config
        cached = self.sequences * config.num_blocks * config.num_kv_heads * view.cache_rows
        view.keys = self._int8(cached * view.even_dim)
        # Kernels read whole blocks of columns.
        view.values = self._int8(cached * config.head_dim + 2 * KEY_TILE)
        self.arrays.append(np.zeros(cached, np.float32))
        view.key_scales = float_pointer(self.arrays[-1])
        view.value_scales = self._floats(cached)
        view.history = self._ints(self.sequences * self.capacity)
        return 0

    cdef int _allocate_rows(self) except -1:
        # The activations of the tokens of one pass, which all threads share.
        cdef DecoderView *view = &self.view
        cdef Int8Matrix quantized = Int8Matrix(self.max_rows, view.width)
        cdef int[::1] tokens
        self.tokens = tokens = np.empty(self.max_rows, np.int32)
        view.tokens = &tokens[0]
        view.positions = <Position *>calloc(self.max_rows, sizeof(Position))
        if view.positions == NULL:
            raise MemoryError("no memory for the tokens' positions")
        view.stream = self._floats(self.max_rows * view.dim)
        view.q = self._floats(self.max_rows * view.query_dim)
        view.k = self._floats(self.max_rows * view.kv_dim)
        view.v = self._floats(self.max_rows * view.kv_dim)
        view.heads = self._floats(self.max_rows * view.query_dim)
        if self.model.config.gated:
            view.gate = self._floats(self.max_rows * view.wide)
        view.hidden = self._floats(self.max_rows * view.wide)
        view.normed = self._floats(self.max_rows * view.width)
        self.arrays.append(quantized)
        view.quantized = quantized.view
        view.samplings = <Sampling *>calloc(self.sequences, sizeof(Sampling))
        if view.samplings == NULL:
            raise MemoryError("no memory for the settings of sampling")
        self.logits = np.empty(self.sequences * view.vocab, np.float32)
        view.logits = float_pointer(self.logits)
        return 0

    cdef int _allocate_thread(self, ThreadBuffers *own) except -1:
        cdef DecoderView *view = &self.view
        cdef Int8Matrix quantized = Int8Matrix(1, view.width)
        cdef short[::1] codes = np.empty(CACHED_QUERIES * view.codes_stride, np.int16)
        self.arrays.append(np.asarray(codes))
        own.codes = &codes[0]
        own.normed = self._floats(view.width)
        self.arrays.append(quantized)
        own.quantized = quantized.view
        own.probs = self._floats(CACHED_QUERIES * view.cache_rows)
        own.head = self._int8(view.even_dim)
        own.token_probs = self._floats(2 * view.vocab)
        own.candidates = self._ints(view.vocab)
        return 0

    cdef float *_floats(self, size) except NULL:
        self.arrays.append(np.empty(size, np.float32))
        return float_pointer(self.arrays[-1])

    cdef int *_ints(self, size) except NULL:
        cdef int[::1] array = np.empty(size, np.int32)
        self.arrays.append(array.base)
        return &array[0]

    cdef signed char *_int8(self, size) except NULL:
        # Zeros: the kernel reads a tile of keys as a whole, before it is full. Those of a large
        # cache take no memory before they are written.
        cdef signed char[::1] array = np.zeros(size, np.int8)
        self.arrays.append(array.base)
        return &array[0]

    def __dealloc__(self):
        free(self.view.threads)
        free(self.view.positions)
        free(self.view.samplings)

    def __reduce__(self):
        raise TypeError("a decoder cannot be copied or pickled: make another one of its model")

    def close(self) -> None:
        """Release the model and the cache; using the decoder afterwards raises ``ValueError``."""
        self._check_busy()
        self.model = self.arrays = self.lengths = self.tokens = self.logits = None

    def __enter__(self):
        self._check_open()
        return self

    def __exit__(self, *error):
        self.close()

    @property
    def nbytes(self) -> int:
        """The bytes of the cache and of the threads' buffers."""
        return sum(buffer.nbytes for buffer in (*self.arrays, self.tokens, self.logits))

    @property
    def length(self) -> int:
        """The number of tokens in the first sequence."""
        self._check_open()
        return self.lengths[0]

    def length_of(self, sequence) -> int:
        """Return the number of tokens in a sequence."""
        self._check_sequence(sequence)
        return self.lengths[sequence]

    def clear(self) -> None:
        """Remove all tokens of all sequences."""
        self._check_idle()
        self.lengths = [0] * self.sequences

    def truncate(self, length, sequence=0) -> None:
        """Remove the tokens of a sequence from ``length`` on.

        Raises
        ------
        ValueError
            If the sequence is shorter.
        """
        self._check_idle()
        self._check_sequence(sequence)
        if not 0 <= length <= self.lengths[sequence]:
            raise ValueError(f"length is {length}, expected 0 to {self.lengths[sequence]}")
        self.lengths[sequence] = length

    def copy(self, source, target, length) -> None:
        """Make the first tokens of a sequence those of another, with their keys and values.

        Parameters
        ----------
        source, target : int
            Sequences. What the target had is removed.
        length : int
            The number of tokens.

        Raises
        ------
        ValueError
            If the source is shorter.
        """
        cdef DecoderView *view = &self.view
        cdef Py_ssize_t dim = view.model.head_dim, i, of, to, rows, size
        cdef Py_ssize_t heads = view.model.num_blocks * view.model.num_kv_heads
        self._check_idle()
        self._check_sequence(source)
        self._check_sequence(target)
        if not 0 <= length <= self.lengths[source]:
            raise ValueError(f"length is {length}, expected 0 to {self.lengths[source]}")
        if source == target:
            self.lengths[target] = length
            return
        size = length
        rows = (size + KEY_TILE - 1) // KEY_TILE * KEY_TILE
        for i in range(heads):
            of = (<Py_ssize_t>source * heads + i) * view.cache_rows
            to = (<Py_ssize_t>target * heads + i) * view.cache_rows
            memcpy(view.keys + to * view.even_dim, view.keys + of * view.even_dim,
                   rows * view.even_dim)
            memcpy(view.values + to * dim, view.values + of * dim, rows * dim)
            memcpy(view.key_scales + to, view.key_scales + of, size * sizeof(float))
            memcpy(view.value_scales + to, view.value_scales + of, size * sizeof(float))
        memcpy(view.history + <Py_ssize_t>target * view.capacity,
               view.history + <Py_ssize_t>source * view.capacity, size * sizeof(int))
        self.lengths[target] = length

    def last_logits(self, row=0):
        """Return the logits from which the last call sampled the last token of a row: float32[V].

        They are the model's own, before penalties and bias. Rows are those of ``generate_batch``;
        ``generate`` and ``prefill`` have one.

        Raises
        ------
        IndexError
            If there is no such row.
        """
        self._check_idle()
        if not 0 <= row < self.sequences:
            raise IndexError(f"row is {row}, expected 0 to {self.sequences - 1}")
        return self.logits[row * self.view.vocab:(row + 1) * self.view.vocab].copy()

    def _check_open(self):
        if self.arrays is None:
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

    def prefill(self, tokens, sequence=0):
        """Append tokens to a sequence and return the logits after the last of them.

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
            If the sequence would exceed its capacity.
        IndexError
            If an id is not a token's.
        """
        prompt = self._check_prompt(tokens, sequence)
        self._run_prompt(self._prefill_blocks(prompt, sequence), sequence, LAST_LOGITS)
        return self.logits[:self.view.vocab].copy()

    def prefill_logits(self, tokens, sequence=0):
        """Append tokens to a sequence and return the logits after each: float32[T, V].

        Parameters and errors are those of ``prefill``.
        """
        prompt = self._check_prompt(tokens, sequence)
        block = min(prompt.size, PROMPT_BLOCK)
        if self.logits.size < block * self.view.vocab:
            self.logits = np.empty(block * self.view.vocab, np.float32)
            self.view.logits = float_pointer(self.logits)
        result = np.empty((prompt.size, self.view.vocab), np.float32)
        for start in range(0, prompt.size, PROMPT_BLOCK):
            part = result[start:start + PROMPT_BLOCK]
            self._run_prompt(prompt[start:start + PROMPT_BLOCK], sequence, ALL_LOGITS)
            part[...] = self.logits[:part.size].reshape(part.shape)
        return result

    def prefill_states(self, tokens, sequence=0):
        """Append tokens to a sequence and return the last hidden state of each: float32[T, C].

        That is the input of the output layer: the residual stream after the last block and, if
        there is one, the final norm. Parameters and errors are those of ``prefill``.
        """
        prompt = self._check_prompt(tokens, sequence)
        result = np.empty((prompt.size, self.view.dim), np.float32)
        for start in range(0, prompt.size, PROMPT_BLOCK):
            part = result[start:start + PROMPT_BLOCK]
            self._run_prompt(prompt[start:start + PROMPT_BLOCK], sequence, HIDDEN_STATES)
            part[...] = np.asarray(<float[:part.size]>self.view.normed).reshape(part.shape)
        return result

    def generate(self, tokens, uniforms, sampling=_SAMPLING, sequence=0, bias=None):
        """Append tokens to a sequence and sample those that follow.

        Parameters
        ----------
        tokens : int[T]
        uniforms : float64[N]
            Random numbers in [0, 1), one for each token to sample.
        sampling : SamplingConfig
        sequence : int
        bias : float32[V], optional
            Added to the logits, after the repetition penalty; minus infinity excludes a token.

        Returns
        -------
        int32[N]
            The sampled tokens. All but the last are appended: the sequence grows by T + N - 1.

        Raises
        ------
        ValueError
            If the sequence would exceed its capacity, or a logit is not finite.
        IndexError
            If an id is not a token's.
        """
        numbers = _check_uniforms(uniforms, 1)
        self._check_idle()
        self._fill_samplings(sampling, [bias], 1)
        sampled = np.empty(numbers.size, np.int32)
        prompt = self._check_prompt(tokens, sequence, sampled.size - 1)
        prompt = self._prefill_blocks(prompt, sequence)
        for start in range(0, sampled.size, TOKENS_PER_CALL):
            part = sampled[start:start + TOKENS_PER_CALL]
            self._run_prompt(prompt, sequence, LAST_LOGITS, part[None],
                             numbers[None, start:start + TOKENS_PER_CALL])
            prompt = part[-1:]
        return sampled

    def generate_batch(self, tokens, uniforms, sampling=_SAMPLING, sequences=None, bias=None):
        """Append a token to each of several sequences and sample those that follow, side by side.

        Parameters
        ----------
        tokens : int[S]
        uniforms : float64[S, N]
            Random numbers in [0, 1), one for each token to sample.
        sampling : SamplingConfig or sequence of SamplingConfig
            For all sequences, or one for each.
        sequences : int[S], optional
            Different sequences; by default all.
        bias : sequence of float32[V] or None, optional
            For each sequence, as of ``generate``.

        Returns
        -------
        int32[S, N]
            The sampled tokens. All but the last of each are appended: every sequence grows by N.

        Raises
        ------
        ValueError
            If a sequence would exceed its capacity.
        NonfiniteLogits
            If a logit is not finite; of the call's first tokens none has then been appended.
        IndexError
            If an id is not a token's, or a sequence does not exist.
        """
        cdef Position *positions = self.view.positions
        self._check_open()
        numbers = _check_uniforms(uniforms, 2)
        selected = list(range(self.sequences) if sequences is None else sequences)
        newest = check_tokens(tokens, self.view.vocab, "tokens")
        self._check_idle()
        if len(set(selected)) != len(selected):
            raise ValueError("a sequence is named twice")
        if not len(selected) == newest.size == len(numbers):
            raise ValueError(f"there are {len(selected)} sequences, {newest.size} tokens and "
                             f"{len(numbers)} rows of uniforms, expected as many of each")
        for sequence in selected:
            self._check_capacity(sequence, numbers.shape[1])
        self._fill_samplings(sampling, bias, len(selected))
        sampled = np.empty(numbers.shape, np.int32)
        steps = max(TOKENS_PER_CALL // len(selected), 1)
        for start in range(0, sampled.shape[1], steps):
            part = np.empty((len(selected), min(steps, sampled.shape[1] - start)), np.int32)
            self.tokens[:newest.size] = newest
            for i, sequence in enumerate(selected):
                positions[i].sequence, positions[i].past = sequence, self.lengths[sequence]
            self.view.rows, self.view.single_sequence = len(selected), False
            self._run(ALL_LOGITS, part, np.ascontiguousarray(numbers[:, start:start + steps]))
            for sequence in selected:
                self.lengths[sequence] += part.shape[1]
            sampled[:, start:start + steps] = part
            newest = part[:, -1]
        return sampled

    cdef int _fill_samplings(self, sampling, bias, Py_ssize_t rows) except -1:
        cdef Py_ssize_t row
        samplings = [sampling] * rows if isinstance(sampling, SamplingConfig) else sampling
        biases = [None] * rows if bias is None else bias
        if not isinstance(samplings, (list, tuple)):
            raise TypeError(f"sampling is {sampling!r}, expected a SamplingConfig")
        if not len(samplings) == len(biases) == rows:
            raise ValueError(f"there are {rows} sequences, {len(samplings)} settings of sampling "
                             f"and {len(biases)} of bias, expected as many of each")
        for row in range(rows):
            fill_sampling(&self.view.samplings[row], samplings[row], biases[row],
                          self.view.vocab)
        return 0

    def _check_prompt(self, tokens, sequence, more=0):
        """Return tokens as int32[T] that fit a sequence, with a number of others after them."""
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

    def _prefill_blocks(self, prompt, sequence):
        """Append all of a prompt but its last block, and return that."""
        last = (prompt.size - 1) // PROMPT_BLOCK * PROMPT_BLOCK
        for start in range(0, last, PROMPT_BLOCK):
            self._run_prompt(prompt[start:start + PROMPT_BLOCK], sequence, NO_OUTPUT)
        return prompt[last:]

    def _run_prompt(self, prompt, sequence, output, sampled=None, uniforms=None):
        """Append a block of one sequence's tokens, and sample those that follow."""
        cdef Position *positions = self.view.positions
        cdef Py_ssize_t i, past = self.lengths[sequence], number = sequence
        self._check_idle()
        for i in range(prompt.size):
            positions[i].sequence, positions[i].past = number, past + i
        self.tokens[:prompt.size] = prompt
        self.view.rows, self.view.single_sequence = prompt.size, True
        self._run(output, sampled, uniforms)
        self.lengths[sequence] += prompt.size + (0 if sampled is None else sampled.shape[1] - 1)

    cdef int _run(self, Output output, int[:, ::1] sampled,
                  const double[:, ::1] uniforms) except -1:
        cdef DecoderView *view = &self.view
        cdef int threads = self.threads
        PyErr_CheckSignals()
        self._check_idle()
        view.output = output
        view.to_sample = 0
        if sampled is not None:
            view.sampled = &sampled[0, 0]
            view.uniforms = &uniforms[0, 0]
            view.to_sample = sampled.shape[1]
        view.out_of_memory = view.nonfinite = False
        self.busy = True
        with nogil:
            parallel_region(decode, view, &view.team, threads)
        self.busy = False
        if view.out_of_memory:
            raise MemoryError("no memory for the kernels' packing buffers")
        if view.nonfinite:
            rows = 1 if view.single_sequence else view.rows
            raise NonfiniteLogits(tuple(row for row in range(rows) if view.tokens[row] < 0))
        return 0


def _check_uniforms(uniforms, axes):
    numbers = np.ascontiguousarray(uniforms, np.float64)
    if numbers.ndim != axes:
        raise ValueError(f"uniforms has {numbers.ndim} axes, expected {axes}")
    if numbers.size == 0:
        raise ValueError("uniforms is empty, expected a number for each token to sample")
    if not (np.min(numbers) >= 0.0 and np.max(numbers) < 1.0):
        raise ValueError("uniforms holds a number that is not in [0, 1)")
    return numbers
