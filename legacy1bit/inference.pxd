"""Decoding without the GIL."""

from legacy1bit.kernels cimport Int8Rows
from legacy1bit.packed cimport Int8Matrix, PackedModel, PackedModelView
from legacy1bit.threads cimport thread_team

cdef struct ThreadBuffers:
    # The buffers of one thread.
    float *normed           # [width], the input of a product of one token, also in int8
    Int8Rows quantized
    float *probs            # [CACHED_QUERIES, cache_rows]
    short *codes            # [CACHED_QUERIES, codes_stride], for attention
    signed char *head       # [D], a head's key or value on its way into the cache
    float *token_probs      # [2, V], for sampling, with scratch
    int *candidates         # [V], token ids

cdef struct Sampling:
    double temperature
    double top_p
    double min_p
    float penalty           # of repetition, for tokens among the last `window`; 0: all
    Py_ssize_t top_k
    Py_ssize_t window
    const float *bias       # [V], added to the logits; NULL for none

cdef struct Position:
    # The position of a token: its sequence, and the number of tokens before it.
    Py_ssize_t sequence
    Py_ssize_t past

cdef enum Output:
    NO_OUTPUT
    LAST_LOGITS             # after the last token
    ALL_LOGITS              # after every token
    HIDDEN_STATES           # after the final norm

cdef struct DecoderView:
    const PackedModelView *model
    bint float_activations  # else products with codes round their inputs to int8
    Py_ssize_t capacity
    Py_ssize_t dim, wide, vocab     # C, F, V
    Py_ssize_t query_dim, kv_dim    # H D, G D
    Py_ssize_t width        # of the widest input of a product
    Py_ssize_t cache_rows   # the capacity, rounded up to tiles of 16 keys
    Py_ssize_t even_dim     # the head's dimension, rounded up to pairs
    Py_ssize_t codes_stride
    signed char *keys       # [sequences, blocks, G, cache_rows / 16, even_dim / 2, 16, 2] in int8
    signed char *values     # [sequences, blocks, G, cache_rows / 2, D, 2]
    float *key_scales       # [sequences, blocks, G, cache_rows]
    float *value_scales
    int *history            # [sequences, capacity], the token ids
    float *stream           # [rows, C], the residual stream
    float *normed           # [rows, width]
    Int8Rows quantized
    float *q                # [rows, H D]
    float *k                # [rows, G D]
    float *v
    float *heads            # [rows, H D]
    float *gate             # [rows, F]; NULL without a gate
    float *hidden           # [rows, F]
    float *logits           # [rows or 1, V]
    ThreadBuffers *threads
    thread_team team
    # The job:
    int *tokens             # [rows], the input
    Position *positions     # [rows]
    Py_ssize_t rows
    bint single_sequence    # rows are consecutive tokens of one, else each row has its own
    Output output
    int *sampled            # [rows or 1, to_sample], the sampled tokens
    Py_ssize_t to_sample
    const double *uniforms  # [rows or 1, to_sample], a random number for each
    Sampling *samplings     # [rows or 1]
    bint out_of_memory
    bint nonfinite          # a logit is not finite


cdef class Decoder:
    cdef readonly PackedModel model
    cdef readonly Py_ssize_t capacity, sequences
    cdef readonly int threads
    cdef Py_ssize_t max_rows
    cdef object lengths, tokens, logits
    cdef list arrays        # what the view points at
    cdef bint busy
    cdef DecoderView view
    cdef float *_floats(self, size) except NULL
    cdef int *_ints(self, size) except NULL
    cdef signed char *_int8(self, size) except NULL
    cdef int _allocate_cache(self) except -1
    cdef int _allocate_rows(self) except -1
    cdef int _allocate_thread(self, ThreadBuffers *own) except -1
    cdef int _fill_samplings(self, sampling, bias, Py_ssize_t rows) except -1
    cdef int _run(self, Output output, int[:, ::1] sampled,
                  const double[:, ::1] uniforms) except -1
