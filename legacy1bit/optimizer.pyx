"""What turns gradients into better weights.

An optimizer changes a model's latent weights in place, in spans that threads share; each span
belongs to one thread, so that the result has the same bits for any number of them.
"""

import numpy as np

from libc.math cimport fmax, isfinite, pow, sqrt
from libc.string cimport memcpy

from legacy1bit.kernels cimport AdamW as AdamWStep
from legacy1bit.kernels cimport KernelTable
from legacy1bit.math_ops cimport kernels
from legacy1bit.model cimport LegacyLLM, LegacyLLMGradients
from legacy1bit.threads cimport parallel_for, scratch

from legacy1bit.model import parameter_layout

# The longest span, so that threads have enough of them to share.
_LONGEST = 16384


cdef struct Span:
    Py_ssize_t start, stop
    bint decays


cdef struct Matrices:
    # Where a matrix that Muon updates begins, and its shape.
    Py_ssize_t start, rows, cols


cdef struct UpdateJob:
    float *weights
    float *first
    float *second
    const float *gradient
    double *squares
    const Span *spans
    const Matrices *matrices
    AdamWStep decay, plain
    float matrix_rate, matrix_decay, momentum
    bint out_of_memory


cdef void squares_task(void *context, long index) noexcept nogil:
    cdef UpdateJob *job = <UpdateJob *>context
    cdef const Span *span = &job.spans[index]
    job.squares[index] = kernels().sum_of_squares(job.gradient + span.start,
                                                  span.stop - span.start)


cdef void adamw_task(void *context, long index) noexcept nogil:
    cdef UpdateJob *job = <UpdateJob *>context
    cdef const Span *span = &job.spans[index]
    kernels().adamw(job.weights + span.start, job.first + span.start, job.second + span.start,
                    job.gradient + span.start, span.stop - span.start,
                    &job.decay if span.decays else &job.plain)


cdef void orthogonalize(float *x, Py_ssize_t rows, Py_ssize_t cols, float *room,
                        float *workspace) noexcept nogil:
    # x[rows, cols], rows <= cols, becomes about U V^T of its singular value decomposition U S V^T.
    # Five rounds of X <- a X + (b A + c A^2) X with A = X X^T bring every singular value near 1
    # (Jordan et al. 2024, "Muon: an optimizer for hidden layers", with their a, b and c). room has
    # rows * (2 rows + cols) floats.
    cdef const KernelTable *kernel = kernels()
    cdef Py_ssize_t square = rows * rows, size = rows * cols
    cdef float *a = room
    cdef float *b = a + square
    cdef float *y = b + square
    cdef double norm = sqrt(kernel.sum_of_squares(x, size))
    cdef int _round
    kernel.scale(x, 1.0 / (norm + 1e-7), size)
    for _round in range(5):
        kernel.matmul(rows, rows, cols, x, cols, 1, x, 1, cols, NULL, False, a, rows, workspace)
        kernel.matmul(rows, rows, rows, a, rows, 1, a, rows, 1, NULL, False, b, rows, workspace)
        kernel.scale(b, 2.0315, square)
        kernel.add_scaled(b, -4.7750, a, square)
        kernel.matmul(rows, cols, rows, b, rows, 1, x, cols, 1, NULL, False, y, cols, workspace)
        kernel.scale(x, 3.4445, size)
        kernel.add(x, y, size)


cdef void transpose(const float *x, Py_ssize_t rows, Py_ssize_t cols, float *out) noexcept nogil:
    cdef Py_ssize_t i, j
    for i in range(rows):
        for j in range(cols):
            out[j * rows + i] = x[i * cols + j]


cdef void muon_task(void *context, long index) noexcept nogil:
    # momentum <- mu momentum + g;  w <- (1 - rate decay) w
    #                                    - rate sqrt(max(1, rows / cols)) orth(g + mu momentum)
    cdef UpdateJob *job = <UpdateJob *>context
    cdef const KernelTable *kernel = kernels()
    cdef const Matrices *matrix = &job.matrices[index]
    cdef Py_ssize_t rows = matrix.rows, cols = matrix.cols, size = rows * cols
    cdef Py_ssize_t low = min(rows, cols), high = max(rows, cols)
    cdef float *workspace = scratch(kernel.workspace_floats + 2 * size + low * (2 * low + high))
    cdef float *update = workspace + kernel.workspace_floats
    cdef float *turned = update + size
    cdef float *room = turned + size
    cdef float *weights = job.weights + matrix.start
    cdef float *momentum = job.first + matrix.start
    if workspace == NULL:
        job.out_of_memory = True
        return
    kernel.scale(momentum, job.momentum, size)
    kernel.add(momentum, job.gradient + matrix.start, size)
    memcpy(update, job.gradient + matrix.start, size * sizeof(float))
    kernel.add_scaled(update, job.momentum, momentum, size)
    if rows <= cols:
        orthogonalize(update, rows, cols, room, workspace)
    else:
        transpose(update, rows, cols, turned)
        orthogonalize(turned, cols, rows, room, workspace)
        transpose(turned, cols, rows, update)
    kernel.scale(weights, 1.0 - job.matrix_rate * job.matrix_decay, size)
    kernel.add_scaled(weights, -job.matrix_rate * sqrt(fmax(1.0, <double>rows / cols)), update,
                      size)


def _spans(layout, chosen):
    """Return (start, stop, decays) of the parameters that ``chosen`` accepts, cut to length."""
    spans, start = [], 0
    for name, shape, kind in layout:
        stop = start + int(np.prod(shape))
        if chosen(name, kind):
            spans += [(begin, min(begin + _LONGEST, stop), kind != "vector")
                      for begin in range(start, stop, _LONGEST)]
        start = stop
    return spans


def _is_block_matrix(name, kind):
    return kind != "vector" and name.startswith("blocks.")


cdef class AdamW:
    """AdamW over all weights of a model (Loshchilov & Hutter, arXiv 1711.05101, algorithm 2).

    Parameters
    ----------
    model : LegacyLLM
        Made with latent weights.
    beta1, beta2 : float
        How much of the gradient's mean and mean square a step keeps.
    epsilon : float
    weight_decay : float
        Decoupled; on matrices, not on biases and norms.

    Attributes
    ----------
    steps : int
        Steps taken.
    first, second : float32[N]
        The moments, in the order of ``parameter_layout``.
    """

    cdef readonly LegacyLLM model
    cdef readonly object first, second
    cdef readonly float beta1, beta2, epsilon, weight_decay
    cdef public long steps
    cdef object squares, all_spans, adamw_spans

    def __init__(self, LegacyLLM model not None, beta1=0.9, beta2=0.99, epsilon=1e-8,
                 weight_decay=0.1):
        if not model.trainable:
            raise ValueError("the model has no latent weights: it was made for inference")
        layout = parameter_layout(model.config)
        self.model = model
        self.beta1, self.beta2 = beta1, beta2
        self.epsilon, self.weight_decay = epsilon, weight_decay
        self.first = np.zeros(model.num_parameters, np.float32)
        self.second = np.zeros(model.num_parameters, np.float32)
        self.all_spans = np.array(_spans(layout, lambda name, kind: True), _SPAN)
        self.adamw_spans = np.array(_spans(layout, self._has_adamw), _SPAN)
        self.squares = np.zeros(self.all_spans.size, np.float64)
        self.steps = 0

    def _has_adamw(self, name, kind):
        return True

    def step(self, LegacyLLMGradients gradients not None, float learning_rate, float clip=0.0,
             int threads=1) -> float:
        """Take one step, and quantize the model anew.

        Parameters
        ----------
        gradients : LegacyLLMGradients
        learning_rate : float
        clip : float
            Gradients whose norm is above this are scaled down to it; 0 means no limit.
        threads : int
            The result has the same bits for any number.

        Returns
        -------
        float
            The norm of all gradients before clipping. Where it is not finite, nothing was changed.
        """
        cdef UpdateJob job
        cdef float[::1] weights = self.model.weights, first = self.first, second = self.second
        cdef const float[::1] gradient
        cdef const Span[::1] spans = self.all_spans
        cdef double[::1] squares = self.squares
        cdef Py_ssize_t i
        cdef double norm = 0.0
        self.model.alive()
        gradients.alive()
        if threads < 1:
            raise ValueError(f"threads is {threads}, expected at least 1")
        if gradients.config != self.model.config:
            raise ValueError("the gradients are those of a model with other settings")
        gradient = gradients.flat
        job.weights, job.first, job.second = &weights[0], &first[0], &second[0]
        job.gradient = &gradient[0]
        job.squares = &squares[0]
        job.spans = &spans[0]
        with nogil:
            parallel_for(squares_task, &job, squares.shape[0], threads)
        for i in range(squares.shape[0]):
            norm += squares[i]
        norm = sqrt(norm)
        if not isfinite(norm):
            return norm
        self.steps += 1
        job.plain.learning_rate = learning_rate
        job.plain.beta1, job.plain.beta2 = self.beta1, self.beta2
        job.plain.epsilon = self.epsilon
        job.plain.weight_decay = 0.0
        job.plain.correction1 = 1.0 - pow(self.beta1, self.steps)
        job.plain.correction2 = 1.0 - pow(self.beta2, self.steps)
        job.plain.gradient_scale = clip / norm if clip > 0.0 and norm > clip else 1.0
        job.decay = job.plain
        job.decay.weight_decay = self.weight_decay
        self.update(&job, threads)
        self.model.quantize(threads)
        return norm

    cdef int update(self, UpdateJob *job, int threads) except -1:
        cdef const Span[::1] spans = self.adamw_spans
        job.spans = &spans[0]
        with nogil:
            parallel_for(adamw_task, job, spans.shape[0], threads)
        return 0


cdef class Muon(AdamW):
    """Muon on the matrices of the blocks, AdamW on everything else.

    Muon replaces the momentum of a matrix's gradient by the nearest orthogonal matrix, so that
    every direction moves by the same amount (Jordan et al. 2024, "Muon: an optimizer for hidden
    layers in neural networks"). Clipping has no say in it: the size of a gradient does not matter.

    Parameters
    ----------
    model, beta1, beta2, epsilon, weight_decay
        As for ``AdamW``.
    matrix_ratio : float
        Muon's learning rate over that of AdamW.
    momentum : float
        How much of the gradients' sum a step keeps.
    """

    cdef readonly float matrix_ratio, momentum
    cdef object matrices

    def __init__(self, LegacyLLM model not None, beta1=0.9, beta2=0.99, epsilon=1e-8,
                 weight_decay=0.1, matrix_ratio=7.0, momentum=0.95):
        super().__init__(model, beta1, beta2, epsilon, weight_decay)
        matrices, start = [], 0
        for name, shape, kind in parameter_layout(model.config):
            if _is_block_matrix(name, kind):
                matrices.append((start, *shape))
            start += int(np.prod(shape))
        self.matrix_ratio, self.momentum = matrix_ratio, momentum
        self.matrices = np.array(matrices, _MATRICES)

    def _has_adamw(self, name, kind):
        return not _is_block_matrix(name, kind)

    cdef int update(self, UpdateJob *job, int threads) except -1:
        cdef const Matrices[::1] matrices = self.matrices
        job.matrices = &matrices[0]
        job.matrix_rate = job.plain.learning_rate * self.matrix_ratio
        job.matrix_decay = self.weight_decay
        job.momentum = self.momentum
        job.out_of_memory = False
        with nogil:
            parallel_for(muon_task, job, matrices.shape[0], threads)
        if job.out_of_memory:
            raise MemoryError("no memory to make updates orthogonal")
        return AdamW.update(self, job, threads)


_SPAN = np.dtype([("start", np.intp), ("stop", np.intp), ("decays", np.intc)], align=True)
_MATRICES = np.dtype([("start", np.intp), ("rows", np.intp), ("cols", np.intp)], align=True)
