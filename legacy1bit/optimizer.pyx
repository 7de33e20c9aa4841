"""What turns gradients into better weights."""

import numpy as np

from libc.math cimport isfinite, pow, sqrt

from legacy1bit.kernels cimport AdamW as AdamWStep
from legacy1bit.math_ops cimport kernels
from legacy1bit.model cimport LegacyLLM, LegacyLLMGradients
from legacy1bit.threads cimport parallel_for

# Threads share the weights in stretches of this many, whatever their number, so that sums have
# the same bits for any of them.
cdef enum:
    BLOCK = 16384


cdef struct UpdateJob:
    float *weights
    float *first
    float *second
    const float *gradient
    double *squares
    Py_ssize_t size
    Py_ssize_t decaying         # the first so many weights decay
    AdamWStep decay, plain


cdef void squares_task(void *context, long index) noexcept nogil:
    cdef UpdateJob *job = <UpdateJob *>context
    cdef Py_ssize_t start = index * BLOCK
    job.squares[index] = kernels().sum_of_squares(job.gradient + start,
                                                  min(job.size - start, BLOCK))


cdef void update_task(void *context, long index) noexcept nogil:
    cdef UpdateJob *job = <UpdateJob *>context
    cdef Py_ssize_t start = index * BLOCK, stop = min(start + BLOCK, job.size)
    cdef Py_ssize_t middle = min(max(job.decaying, start), stop)
    kernels().adamw(job.weights + start, job.first + start, job.second + start,
                    job.gradient + start, middle - start, &job.decay)
    kernels().adamw(job.weights + middle, job.first + middle, job.second + middle,
                    job.gradient + middle, stop - middle, &job.plain)


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
    cdef object squares
    cdef readonly float beta1, beta2, epsilon, weight_decay
    cdef public long steps

    def __init__(self, LegacyLLM model not None, beta1=0.9, beta2=0.99, epsilon=1e-8,
                 weight_decay=0.1):
        if not model.trainable:
            raise ValueError("the model has no latent weights: it was made for inference")
        self.model = model
        self.beta1, self.beta2 = beta1, beta2
        self.epsilon, self.weight_decay = epsilon, weight_decay
        self.first = np.zeros(model.num_parameters, np.float32)
        self.second = np.zeros(model.num_parameters, np.float32)
        self.squares = np.zeros((model.num_parameters + BLOCK - 1) // BLOCK, np.float64)
        self.steps = 0

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
        cdef const float[::1] gradient = gradients.flat
        cdef double[::1] squares = self.squares
        cdef Py_ssize_t i, blocks = squares.shape[0]
        cdef double norm = 0.0
        self.model.alive()
        gradients.alive()
        if gradients.config != self.model.config:
            raise ValueError("the gradients are those of a model with other settings")
        job.weights, job.first, job.second = &weights[0], &first[0], &second[0]
        job.gradient = &gradient[0]
        job.squares = &squares[0]
        job.size = weights.shape[0]
        job.decaying = self.model.matrix_size
        with nogil:
            parallel_for(squares_task, &job, blocks, threads)
        for i in range(blocks):
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
        with nogil:
            parallel_for(update_task, &job, blocks, threads)
        self.model.quantize(threads)
        return norm
