"""Decoding without the GIL."""

from legacy1bit.kernels cimport Rounded
from legacy1bit.packed cimport PackedModel, PackedModelView, RoundedRows
from legacy1bit.threads cimport thread_team

cdef struct Member:
    # What a thread of a team has to itself.
    float *normed           # [max(C, F)], the input of a product of one token, and the same in int8
    Rounded rounded
    float *probs            # [block, T]
    float *head             # [4, T, D], queries, keys, values and outputs of a head, for a prompt

cdef struct Sampling:
    double temperature
    double top_p
    Py_ssize_t top_k

cdef struct DecoderView:
    const PackedModelView *model
    Py_ssize_t capacity
    Py_ssize_t block        # the most tokens at once
    Py_ssize_t dim, wide, vocab
    signed char *keys       # [blocks, H, capacity, D] in int8
    signed char *values
    float *key_steps        # [blocks, H, capacity], a scale for each of their rows
    float *value_steps
    float *stream           # [block, C], the residual stream
    float *normed           # [block, max(C, F)]
    Rounded rounded
    float *q                # [block, C]
    float *k
    float *v
    float *heads
    float *hidden           # [block, F]
    float *logits           # [V]
    float *chances          # [V], and the order of the likeliest, for sampling
    int *order
    Member *members
    thread_team team
    # What there is to do:
    const int *prompt       # at most a block of tokens
    Py_ssize_t prompt_size
    bint wanted             # the logits after them
    Py_ssize_t past         # tokens in the cache before
    int *drawn              # where drawn tokens go
    Py_ssize_t to_draw
    const double *uniforms  # [to_draw], what decides each draw
    Sampling sampling
    int token               # the token that was just drawn
    bint out_of_memory
    bint damaged            # logits that are not finite


cdef class Decoder:
    cdef readonly PackedModel model
    cdef readonly Py_ssize_t capacity, length
    cdef readonly int threads
    cdef list kept
    cdef bint busy
    cdef DecoderView view
    cdef float *_room(self, size) except NULL
    cdef int _run(self, const int[::1] prompt, bint wanted, int[::1] drawn,
                  const double[::1] uniforms) except -1
