"""Decoding without the GIL."""

from legacy1bit.kernels cimport Int8Rows
from legacy1bit.packed cimport Int8Buffer, PackedModel, PackedModelView
from legacy1bit.threads cimport thread_team

cdef struct Member:
    # What a thread of a team has to itself.
    float *normed           # [max(C, F)], the input of a product of one token, and the same in int8
    Int8Rows quantized
    float *probs            # [rows, room]
    float *head             # [4, room, D], a head's queries, keys, values and outputs, for a prompt
    float *token_probs      # [V], and the order of the likeliest, for sampling
    int *candidates

cdef struct Sampling:
    double temperature
    double top_p
    double min_p
    float penalty           # of what is among the last `window` tokens; 0: all
    Py_ssize_t top_k
    Py_ssize_t window

cdef struct Place:
    # Where a token goes: which sequence, and behind how many others.
    Py_ssize_t sequence
    Py_ssize_t past

cdef enum Wanted:
    NOTHING
    LAST                    # the logits after the last token
    EVERY                   # the logits after every token
    STATES                  # what the output layer would get for every token

cdef struct DecoderView:
    const PackedModelView *model
    Py_ssize_t capacity
    Py_ssize_t dim, wide, vocab
    Py_ssize_t cache_rows   # the capacity in whole tiles of 16 keys
    signed char *keys       # [sequences, blocks, H, room / 16, D, 16] in int8
    signed char *values     # [sequences, blocks, H, room, D]
    float *key_scales       # [sequences, blocks, H, room], a scale for each of them
    float *value_scales
    int *history            # [sequences, capacity], the tokens themselves
    float *stream           # [rows, C], the residual stream
    float *normed           # [rows, max(C, F)]
    Int8Rows quantized
    float *q                # [rows, C]
    float *k
    float *v
    float *heads
    float *hidden           # [rows, F]
    float *logits           # [rows or 1, V]
    Member *members
    thread_team team
    # What there is to do:
    int *tokens             # [rows], those that pass through
    Place *places           # [rows]
    Py_ssize_t rows
    bint together           # whether they are neighbours in one sequence, else one each of several
    Wanted wanted
    int *sampled            # [rows or 1, to_draw], where drawn tokens go
    Py_ssize_t to_sample
    const double *uniforms  # [rows or 1, to_draw], what decides each draw
    Sampling sampling
    bint out_of_memory
    bint damaged            # logits that are not finite


cdef class Decoder:
    cdef readonly PackedModel model
    cdef readonly Py_ssize_t capacity, sequences
    cdef readonly int threads
    cdef Py_ssize_t most
    cdef object lengths, tokens, logits
    cdef list kept
    cdef bint busy
    cdef DecoderView view
    cdef float *_buffer(self, size) except NULL
    cdef int _run(self, Wanted wanted, int[:, ::1] drawn,
                  const double[:, ::1] uniforms) except -1
