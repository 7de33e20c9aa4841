"""Optimizers.

An optimizer updates a model's latent weights in place, in spans that are distributed over threads.
Each span has its rule and is processed by one thread, so that the result has the same bits for any
number of threads. Where several processes train one model, each updates a contiguous part of the
weights, whole spans, and has the moments of that part only (Rajbhandari et al., arXiv 1910.02054,
section 5).

Moments are float32, or have eight bits (Dettmers et al., arXiv 2110.02861): 256 consecutive ones
share a scale, their largest magnitude, and each is the nearest of 256 values times it. These values
are the paper's dynamic tree (section 1.3): for each of seven decades the middles of equal steps,
more of them the higher it is; with a sign for the first moment, and twice as many without one for
the second. Unlike there, a second moment above 0 does not become 0: the quotient by its root would
be arbitrarily large where the next gradient is 0.
"""

import numpy as np

from libc.math cimport fabsf, fmax, isfinite, pow, sqrt
from libc.string cimport memcpy, memset

from legacy1bit.kernels cimport KernelTable, Update, strided
from legacy1bit.math_ops cimport kernels
from legacy1bit.model cimport LegacyLLM, LegacyLLMGradients
from legacy1bit.threads cimport parallel_for, scratch

from legacy1bit.distributed.ranks import ALONE
from legacy1bit.schemes import SCHEMES

cdef enum:
    # Panels of rows of a symmetric product, and the fewest rows of one.
    PANELS = 4
    LEAST_PANEL = 24

cdef enum:
    # Consecutive moments that share a scale, in eight bits.
    BLOCK = 256
    # The nearest of their values is found by the upper 16 bits of a float32: these of 2^-23, and
    # their number up to those of 1. No two middles between values agree in them.
    FIRST_CELL = 104 << 7
    CELLS = (23 << 7) + 1

# The longest span, short enough to balance the load of threads.
_LONGEST = 16384

# How many weights of a matrix for each row or column, whichever are fewer, Muon updates in the time
# in which another rule updates one more.
_MUON_ROWS = 64

cdef enum Rule:
    BY_ADAMW
    BY_SGD
    BY_SIGN
    BY_MUON         # its spans are whole matrices


cdef struct Span:
    Py_ssize_t start, stop
    Py_ssize_t at               # of its first moment
    Py_ssize_t block            # the first of its blocks of moments
    Py_ssize_t rows, cols       # for Muon
    int rule
    bint decays


cdef struct Code:
    # The values of eight bits, -1 to 1: magnitude k has the code zero + k, its negative zero - k.
    const float *values             # [256]
    const float *middles            # between each magnitude and the next; the last is infinite
    const unsigned char *cells      # [CELLS], the least magnitude of numbers with these bits
    int zero, largest
    bint has_sign


cdef struct Moments:
    float *floats                   # [N]; NULL: codes
    unsigned char *codes            # [N]
    float *scales                   # of each block
    Code code


cdef struct UpdateJob:
    float *weights
    Moments first, second
    const float *gradient
    double *squares
    const Span *spans
    Update decay, plain, matrix
    float direction
    bint out_of_memory


cdef void decode(const Moments *moments, Py_ssize_t start, Py_ssize_t block, Py_ssize_t n,
                 float *out) noexcept nogil:
    # The moments from `start` on, which is where a block begins.
    cdef Py_ssize_t i, j
    cdef float scale
    for i from 0 <= i < n by BLOCK:
        scale = moments.scales[block + i // BLOCK]
        for j in range(i, min(i + BLOCK, n)):
            out[j] = scale * moments.code.values[moments.codes[start + j]]


cdef void encode(const Moments *moments, Py_ssize_t start, Py_ssize_t block, Py_ssize_t n,
                 const float *x) noexcept nogil:
    cdef const Code *code = &moments.code
    cdef unsigned char *codes = moments.codes + start
    cdef float[BLOCK] ratios
    cdef Py_ssize_t i, j, count
    cdef float top
    cdef unsigned int bits, number
    cdef int cell, k, negative
    for i from 0 <= i < n by BLOCK:
        count = min(n - i, BLOCK)
        for j in range(count):
            ratios[j] = fabsf(x[i + j])
        top = kernels().largest(ratios, count)
        moments.scales[block + i // BLOCK] = top
        if top == 0.0:
            memset(codes + i, code.zero, count)
            continue
        kernels().divide(ratios, top, count)
        # Without branches, because signs are random. The bounds hold for NaN, too.
        for j in range(count):
            memcpy(&bits, &ratios[j], sizeof(float))
            cell = <int>(bits >> 16) - FIRST_CELL
            cell = cell if cell > 0 else 0
            k = code.cells[cell if cell < CELLS else CELLS - 1]
            k += ratios[j] > code.middles[k]
            if code.has_sign:
                memcpy(&number, &x[i + j], sizeof(float))
                negative = number >> 31
                # There is no -1.
                k -= negative & (k == code.largest)
                codes[i + j] = code.zero + (k ^ -negative) + negative
            else:
                codes[i + j] = k + ((k == 0) & (bits != 0))


cdef void squares_task(void *context, long index) noexcept nogil:
    cdef UpdateJob *job = <UpdateJob *>context
    cdef const Span *span = &job.spans[index]
    job.squares[index] = kernels().sum_of_squares(job.gradient + span.start,
                                                  span.stop - span.start)


cdef void update_task(void *context, long index) noexcept nogil:
    cdef UpdateJob *job = <UpdateJob *>context
    cdef const Span *span = &job.spans[index]
    cdef Py_ssize_t i, size = span.stop - span.start
    cdef const Update *update = &job.decay if span.decays else &job.plain
    cdef float *weights = job.weights + span.start
    cdef const float *gradient = job.gradient + span.start
    if span.rule == BY_MUON:
        muon(job, span)
    elif span.rule != BY_SIGN and job.first.codes:
        update_blocks(job, span, update)
    elif span.rule == BY_SIGN:
        # The C program's rule: a weight is the sign of its gradient times a direction.
        for i in range(size):
            if gradient[i] != 0.0:
                weights[i] = job.direction if gradient[i] > 0.0 else -job.direction
    elif span.rule == BY_SGD:
        kernels().sgd(weights, job.first.floats + span.at, gradient, size, update)
    else:
        kernels().adamw(weights, job.first.floats + span.at, job.second.floats + span.at,
                        gradient, size, update)


cdef void update_blocks(UpdateJob *job, const Span *span, const Update *update) noexcept nogil:
    # AdamW or SGD with moments in eight bits, a block after the other.
    cdef float[BLOCK] first, second
    cdef Py_ssize_t start, at, n, block = span.block
    for start from span.start <= start < span.stop by BLOCK:
        at = span.at + start - span.start
        n = min(span.stop - start, BLOCK)
        decode(&job.first, at, block, n, first)
        if span.rule == BY_SGD:
            kernels().sgd(job.weights + start, first, job.gradient + start, n, update)
        else:
            decode(&job.second, at, block, n, second)
            kernels().adamw(job.weights + start, first, second, job.gradient + start, n, update)
            encode(&job.second, at, block, n, second)
        encode(&job.first, at, block, n, first)
        block += 1


cdef void symmetric_product(const float *x, const float *y, Py_ssize_t rows, Py_ssize_t depth,
                            Py_ssize_t y_depth, Py_ssize_t y_row, float *out,
                            float *workspace) noexcept nogil:
    # out[rows, rows] = x[rows, depth] y, a product that is symmetric: some rows at a time, up to
    # the diagonal, and their mirror image. Element (i, j) of y is y[i y_depth + j y_row].
    cdef Py_ssize_t step = max((rows + PANELS - 1) // PANELS, LEAST_PANEL), first, last, i, j
    for first from 0 <= first < rows by step:
        last = min(first + step, rows)
        kernels().matmul(last - first, last, depth, strided(x + first * depth, depth, 1),
                         strided(y, y_depth, y_row), NULL, False, out + first * rows, rows,
                         workspace)
        for i in range(first):
            for j in range(first, last):
                out[i * rows + j] = out[j * rows + i]


cdef void orthogonalize(float *x, Py_ssize_t rows, Py_ssize_t cols, float *buffer,
                        float *workspace) noexcept nogil:
    # Replaces x[rows, cols], rows <= cols, by about U V^T of its singular value decomposition
    # U S V^T. Five Newton-Schulz iterations X <- a X + (b A + c A^2) X with A = X X^T bring every
    # singular value near 1 (Jordan et al. 2024, "Muon: an optimizer for hidden layers", with their
    # a, b and c). buffer holds rows * (2 rows + cols) floats.
    cdef const KernelTable *kernel = kernels()
    cdef Py_ssize_t square = rows * rows, size = rows * cols
    cdef float *a = buffer
    cdef float *b = a + square
    cdef float *y = b + square
    cdef double norm = sqrt(kernel.sum_of_squares(x, size))
    cdef int _round
    kernel.scale(x, 1.0 / (norm + 1e-7), size)
    for _round in range(5):
        symmetric_product(x, x, rows, cols, 1, cols, a, workspace)
        symmetric_product(a, a, rows, rows, rows, 1, b, workspace)
        kernel.scale(b, 2.0315, square)
        kernel.add_scaled(b, -4.7750, a, square)
        kernel.matmul(rows, cols, rows, strided(b, rows, 1), strided(x, cols, 1), NULL, False, y,
                      cols, workspace)
        kernel.scale(x, 3.4445, size)
        kernel.add(x, y, size)


cdef void transpose(const float *x, Py_ssize_t rows, Py_ssize_t cols, float *out) noexcept nogil:
    cdef Py_ssize_t i, j
    for i in range(rows):
        for j in range(cols):
            out[j * rows + i] = x[i * cols + j]


cdef void muon(UpdateJob *job, const Span *span) noexcept nogil:
    # momentum <- mu momentum + g;  w <- (1 - rate decay) w
    #                                    - rate sqrt(max(1, rows / cols)) orth(g + mu momentum)
    cdef const KernelTable *kernel = kernels()
    cdef const Update *settings = &job.matrix
    cdef Py_ssize_t rows = span.rows, cols = span.cols, size = rows * cols
    cdef Py_ssize_t low = min(rows, cols), high = max(rows, cols)
    cdef float *workspace = scratch(kernel.workspace_floats + 2 * size + low * (2 * low + high))
    cdef float *update = workspace + kernel.workspace_floats
    cdef float *transposed = update + size
    cdef float *buffer = transposed + size
    cdef float *weights = job.weights + span.start
    cdef float *momentum = job.first.floats + span.at
    if workspace == NULL:
        job.out_of_memory = True
        return
    if job.first.codes:
        # Until it is encoded it takes the place of what is transposed.
        momentum = transposed
        decode(&job.first, span.at, span.block, size, momentum)
    kernel.scale(momentum, settings.momentum, size)
    kernel.add(momentum, job.gradient + span.start, size)
    memcpy(update, job.gradient + span.start, size * sizeof(float))
    kernel.add_scaled(update, settings.momentum, momentum, size)
    if job.first.codes:
        encode(&job.first, span.at, span.block, size, momentum)
    if rows <= cols:
        orthogonalize(update, rows, cols, buffer, workspace)
    else:
        transpose(update, rows, cols, transposed)
        orthogonalize(transposed, cols, rows, buffer, workspace)
        transpose(transposed, cols, rows, update)
    kernel.scale(weights, 1.0 - settings.learning_rate * settings.weight_decay, size)
    kernel.add_scaled(weights, -settings.learning_rate * sqrt(fmax(1.0, <double>rows / cols)),
                      update, size)


def _check(**settings):
    """Raise ``ValueError`` for settings out of range."""
    for name, value in settings.items():
        if not 0.0 <= value < (np.inf if name == "weight_decay" else 1.0):
            raise ValueError(f"{name} is {value}, expected 0 or more"
                             + ("" if name == "weight_decay" else " and less than 1"))


def _spans(layout, rule_of):
    """Return the spans of parameters, whole matrices first, as they take longest."""
    whole, cut, block = [], [], 0
    for part in layout:
        rule, decays = rule_of(part.name, part.kind), part.kind != "vector"
        if rule == BY_MUON:
            whole.append((part.start, part.stop, part.start, block, *part.shape, rule, decays))
        else:
            cut += [(start, min(start + _LONGEST, part.stop), start,
                     block + (start - part.start) // BLOCK, 0, 0, rule, decays)
                    for start in range(part.start, part.stop, _LONGEST)]
        block += _blocks(part.size)
    return np.array(whole + cut, _SPAN)


def _shares(spans, ranks):
    """Return where the shares of ranks begin, and the last one ends, in spans by their place.

    They take about the same time: a matrix of Muon's has products, other spans have none.
    """
    costs = (spans["stop"] - spans["start"]) * (
        1.0 + (spans["rule"] == BY_MUON) * np.minimum(spans["rows"], spans["cols"]) / _MUON_ROWS)
    middles = np.cumsum(costs) - costs / 2.0
    return np.searchsorted(middles, costs.sum() * np.arange(ranks + 1) / ranks)


def _blocks(size):
    """Return the number of blocks of so many moments."""
    return -(-size // BLOCK)


def moment_bytes(layout, bits=32) -> int:
    """Return the bytes of an optimizer's moments for these parameters."""
    if bits == 32:
        return 8 * layout[-1].stop
    return 2 * layout[-1].stop + 8 * sum(_blocks(part.size) for part in layout)


def _magnitudes(steps):
    """Return the magnitudes of the dynamic tree, ascending: 0, seven decades, 1.

    The decade below 10^-n has ``steps / 2^n`` equal steps; their middles are the values.
    """
    values = []
    for n in range(6, -1, -1):
        edges = np.linspace(0.1, 1.0, (steps >> n) + 1)
        values.append((edges[:-1] + edges[1:]) / 2.0 * 10.0 ** -n)
    return np.concatenate([[0.0], *values, [1.0]]).astype(np.float32)


def _tables(steps, has_sign):
    """Return values, middles and cells of a ``Code``."""
    magnitudes = _magnitudes(steps)
    values = np.concatenate([-magnitudes[-2:0:-1], magnitudes]) if has_sign else magnitudes
    exact = (magnitudes[:-1].astype(np.float64) + magnitudes[1:]) / 2.0
    # Rounded down: a float32 is above this if and only if it is above the exact middle.
    middles = exact.astype(np.float32)
    middles[middles > exact] = np.nextafter(middles[middles > exact], np.float32(0.0))
    begins = ((np.arange(CELLS, dtype=np.uint32) + FIRST_CELL) << 16).view(np.float32)
    cells = np.searchsorted(middles, begins, "left").astype(np.uint8)
    return values, np.append(middles, np.float32(np.inf)), cells


_SIGNED, _UNSIGNED = _tables(64, True), _tables(128, False)


cdef int point_moments(Moments *moments, object values, object scales, bint has_sign) except -1:
    # Points at arrays of moments, and at what their codes mean.
    cdef float[::1] floats
    cdef unsigned char[::1] codes
    cdef const float[::1] numbers
    cdef const unsigned char[::1] cells
    memset(moments, 0, sizeof(Moments))
    if scales is None:
        floats = values
        moments.floats = &floats[0]
        return 0
    codes, floats = values, scales
    moments.codes, moments.scales = &codes[0], &floats[0]
    tables = _SIGNED if has_sign else _UNSIGNED
    numbers = tables[0]
    moments.code.values = &numbers[0]
    numbers = tables[1]
    moments.code.middles = &numbers[0]
    moments.code.largest = numbers.shape[0] - 1
    moments.code.zero = 255 - moments.code.largest
    moments.code.has_sign = has_sign
    cells = tables[2]
    moments.code.cells = &cells[0]
    return 0


cdef class Optimizer:
    """The base class: moments, clipping and the scheme ``sign``.

    Parameters
    ----------
    model : LegacyLLM
        With latent weights. If its scheme is ``sign``, the quantized matrices follow the C
        program's rule in every optimizer.
    weight_decay : float
        Decoupled; applies to matrices, not to biases and norms.
    sign_direction : {"descend", "ascend"}
        "ascend" sets the weights of the scheme ``sign`` to their gradient's own sign, as C does:
        that increases the loss (departure 1).
    bits : {32, 8}
        Of a moment.
    ranks : Ranks
        The processes that share the work; all call the same methods.

    Attributes
    ----------
    steps : int
        Steps taken.
    moments : dict of str to array
        ``first`` and ``second``, float32[N] in the order of ``parameter_layout``; momentum is a
        first moment. With eight bits they are uint8[N], and ``first_scales`` and ``second_scales``
        float32[K] have a number for each block of 256 moments, of which every parameter begins one.
        Of several ranks each has those of its share.
    bounds : int64[ranks + 1]
        Where the shares of the ranks begin in the weights, and where the last one ends.
    weight_decay : float
        May change between steps.
    """

    cdef readonly LegacyLLM model
    cdef dict arrays
    cdef public float weight_decay
    cdef public long steps
    cdef Update settings
    cdef float muon_lr_ratio, direction
    cdef object ranks, squares, spans, order, places, span_bounds, block_bounds
    cdef readonly object bounds

    def __init__(self, LegacyLLM model not None, weight_decay, sign_direction, bits=32,
                 ranks=ALONE):
        if not model.trainable:
            raise ValueError("the model has no latent weights: it was made for inference")
        if sign_direction not in ("descend", "ascend"):
            raise ValueError(f"sign_direction is {sign_direction!r}, expected descend or ascend")
        if bits not in (8, 32):
            raise ValueError(f"bits is {bits}, expected 8 or 32")
        _check(weight_decay=weight_decay)
        scheme = SCHEMES.get(model.config.scheme)
        self.model = model
        self.weight_decay = weight_decay
        self.muon_lr_ratio = 1.0
        self.direction = -1.0 if sign_direction == "descend" else 1.0
        spans = _spans(
            model.learned,
            lambda name, kind: BY_SIGN if kind == "quantized" and not scheme.learns
            else self._rule(name, kind))
        # The spans by their place in the weights, and the place of each.
        places = np.argsort(spans["start"])
        self.order = np.argsort(places)
        blocks = sum(_blocks(part.size) for part in model.learned)
        shares = _shares(spans[places], ranks.size)
        self.ranks, self.span_bounds = ranks, shares
        self.bounds, self.block_bounds = (
            np.append(spans[name][places], end)[shares].astype(np.int64)
            for name, end in (("start", model.num_trainable), ("block", blocks)))
        self.places = np.flatnonzero((self.order >= shares[ranks.rank])
                                     & (self.order < shares[ranks.rank + 1]))
        self.spans = spans[self.places]
        self.spans["at"] -= self.bounds[ranks.rank]
        self.spans["block"] -= self.block_bounds[ranks.rank]
        self.squares = np.zeros(spans.size, np.float64)
        self.arrays = {}
        own, blocks = (int(bounds[ranks.rank + 1] - bounds[ranks.rank])
                       for bounds in (self.bounds, self.block_bounds))
        for name, (values, *_) in (("first", _SIGNED), ("second", _UNSIGNED)):
            if bits == 32:
                self.arrays[name] = np.zeros(own, np.float32)
            else:
                zero = np.flatnonzero(values == 0.0)[0]
                self.arrays[name] = np.full(own, zero, np.uint8)
                self.arrays[f"{name}_scales"] = np.zeros(blocks, np.float32)
        self.steps = 0

    @property
    def weights(self):
        """float32[N], all weights that learn; the model's own array."""
        return self.model.weights

    @property
    def nbytes(self) -> int:
        """The bytes of the moments."""
        return sum(values.nbytes for values in self.arrays.values())

    @property
    def moments(self) -> dict:
        """The arrays of moments by name; see ``Optimizer``."""
        return dict(self.arrays)

    @property
    def first(self):
        """``moments["first"]``."""
        return self.arrays["first"]

    @property
    def second(self):
        """``moments["second"]``."""
        return self.arrays["second"]

    def gather_moments(self):
        """Return the moments of all weights at the first rank, elsewhere None."""
        whole = {name: self.ranks.gather_first(values, self._bounds_of(name))
                 for name, values in self.arrays.items()}
        return whole if self.ranks.is_first else None

    def load_moments(self, moments) -> None:
        """Take the moments of all weights, as ``gather_moments`` returns them.

        Raises ``ValueError`` if some are missing, or those of another model.
        """
        for name, values in self.arrays.items():
            found, size = moments.get(name), self._bounds_of(name)[-1]
            if found is None or (found.dtype, found.shape) != (values.dtype, (size,)):
                raise ValueError(f"{name} is missing, or not {values.dtype}[{size}]")
        for name, values in self.arrays.items():
            bounds = self._bounds_of(name)
            values[...] = moments[name][bounds[self.ranks.rank]:bounds[self.ranks.rank + 1]]

    def _bounds_of(self, name):
        return self.block_bounds if name.endswith("_scales") else self.bounds

    def _rule(self, name, kind):
        raise TypeError("make an AdamW, a Muon or an SGD")

    def __reduce__(self):
        raise TypeError("an optimizer cannot be copied or pickled: copy its moments into another "
                        "one")

    def step(self, LegacyLLMGradients gradients not None, float learning_rate, float clip=0.0,
             int threads=1) -> float:
        """Take one step, and quantize the model.

        Parameters
        ----------
        gradients : LegacyLLMGradients
            Those of several ranks are added first; then each has the sum of its share.
        learning_rate : float
        clip : float
            Gradients whose norm is above this are scaled down to it; 0 means no limit.
        threads : int
            The result has the same bits for any number.

        Returns
        -------
        float
            The norm of all gradients before clipping. If it is not finite, nothing was changed. It
            is also infinite if squares overflow, possibly from 5e17 on; gradients below 1e-23 have
            squares that underflow to 0.
        """
        cdef UpdateJob job
        cdef float[::1] weights = self.model.weights
        cdef const float[::1] gradient
        cdef const Span[::1] spans = self.spans
        cdef double[::1] squares = np.zeros(spans.shape[0] + 1)
        cdef double[::1] every
        cdef double norm = 0.0
        cdef Py_ssize_t i
        self.model.alive()
        gradients.alive()
        if threads < 1:
            raise ValueError(f"threads is {threads}, expected at least 1")
        if not isfinite(learning_rate):
            raise ValueError(f"learning_rate is {learning_rate}, expected a finite number")
        if (gradients.config, gradients.adapter) != (self.model.config, self.model.adapter):
            raise ValueError("the gradients are those of a model with other settings")
        self.ranks.reduce(gradients.flat, self.bounds)
        gradient = gradients.flat
        job.weights = &weights[0]
        for has_sign, name in ((False, "second"), (True, "first")) if spans.shape[0] else ():
            point_moments(&job.first if has_sign else &job.second, self.arrays[name],
                          self.arrays.get(f"{name}_scales"), has_sign)
        job.gradient = &gradient[0]
        job.squares = &squares[0]
        job.spans = &spans[0] if spans.shape[0] else NULL
        job.direction = self.direction
        job.out_of_memory = False
        with nogil:
            parallel_for(squares_task, &job, spans.shape[0], threads)
        self.squares[self.order[self.places]] = squares[:spans.shape[0]]
        self.ranks.gather(self.squares, self.span_bounds)
        every = self.squares[self.order]
        for i in range(every.shape[0]):
            norm += every[i]
        norm = sqrt(norm)
        if not isfinite(norm):
            return norm
        self.steps += 1
        job.plain = self.settings
        job.plain.learning_rate = learning_rate
        job.plain.weight_decay = 0.0
        job.plain.correction1 = 1.0 - pow(job.plain.beta1, self.steps)
        job.plain.correction2 = 1.0 - pow(job.plain.beta2, self.steps)
        job.plain.gradient_scale = clip / norm if clip > 0.0 and norm > clip else 1.0
        job.decay = job.plain
        job.decay.weight_decay = self.weight_decay
        job.matrix = job.decay
        job.matrix.learning_rate = learning_rate * self.muon_lr_ratio
        with self.ranks.sharing(self.model.weights, self.bounds):
            with nogil:
                parallel_for(update_task, &job, spans.shape[0], threads)
        if job.out_of_memory:
            raise MemoryError("no memory to make updates orthogonal")
        self.model.quantize(threads)
        return norm


cdef class AdamW(Optimizer):
    """AdamW over all weights of a model (Loshchilov & Hutter, arXiv 1711.05101, algorithm 2).

    Parameters
    ----------
    model : LegacyLLM
    beta1, beta2 : float
        Decay rates of the first and the second moment.
    epsilon : float
        Below 1e-20 it no longer compensates for gradients whose squares underflow in float32.
    weight_decay, sign_direction, bits, ranks
        See ``Optimizer``.
    """

    def __init__(self, LegacyLLM model not None, beta1=0.9, beta2=0.99, epsilon=1e-8,
                 weight_decay=0.1, sign_direction="descend", bits=32, ranks=ALONE):
        super().__init__(model, weight_decay, sign_direction, bits, ranks)
        _check(beta1=beta1, beta2=beta2, epsilon=epsilon)
        self.settings.beta1, self.settings.beta2 = beta1, beta2
        self.settings.epsilon = epsilon

    def _rule(self, name, kind):
        return BY_ADAMW


cdef class Muon(AdamW):
    """Muon on the matrices of the blocks, AdamW on everything else.

    Muon replaces the momentum of a matrix's gradient by the nearest orthogonal matrix, so that
    every direction moves by the same amount (Jordan et al. 2024, "Muon: an optimizer for hidden
    layers in neural networks"). Clipping has no effect on it, because the norm of a gradient does
    not matter.

    Parameters
    ----------
    model, beta1, beta2, epsilon, weight_decay, sign_direction, bits, ranks
        As for ``AdamW``.
    muon_lr_ratio : float
        Muon's learning rate over that of AdamW.
    momentum : float
        Decay rate of the momentum.
    """

    def __init__(self, LegacyLLM model not None, beta1=0.9, beta2=0.99, epsilon=1e-8,
                 weight_decay=0.1, sign_direction="descend", muon_lr_ratio=3.3, momentum=0.95,
                 bits=32, ranks=ALONE):
        super().__init__(model, beta1, beta2, epsilon, weight_decay, sign_direction, bits, ranks)
        _check(momentum=momentum)
        self.muon_lr_ratio = muon_lr_ratio
        self.settings.momentum = momentum

    def _rule(self, name, kind):
        return BY_MUON if kind != "vector" and name.startswith("blocks.") else BY_ADAMW


cdef class SGD(Optimizer):
    """Stochastic gradient descent with momentum (Sutskever et al. 2013, section 2).

    Parameters
    ----------
    model : LegacyLLM
    momentum : float
        Decay rate of the momentum.
    weight_decay, sign_direction, bits, ranks
        See ``Optimizer``.
    """

    def __init__(self, LegacyLLM model not None, momentum=0.9, weight_decay=0.1,
                 sign_direction="descend", bits=32, ranks=ALONE):
        super().__init__(model, weight_decay, sign_direction, bits, ranks)
        _check(momentum=momentum)
        self.settings.momentum = momentum

    def _rule(self, name, kind):
        return BY_SGD


_SPAN = np.dtype([("start", np.intp), ("stop", np.intp), ("at", np.intp), ("block", np.intp),
                  ("rows", np.intp), ("cols", np.intp), ("rule", np.intc), ("decays", np.intc)],
                 align=True)
