"""Vector and matrix operations (C: ``math_ops.c``), and the choice of instruction set.

The numerical loops are in ``kernels.pyx``, compiled once for each instruction set. On import this
module detects the CPU and selects the widest set; the environment variable ``LEGACY1BIT_SIMD``
selects another. Public functions here check their arguments, release the GIL and call the kernel;
Cython code calls ``kernels()`` directly.

Arrays are NumPy arrays or anything else with the buffer protocol: float32 (int8 for ternary
matrices), C-contiguous. Another dtype is a ``ValueError``, never a silent copy.

Elementwise results are correctly rounded, including subnormal numbers. Sums and products of vectors
and matrices are accumulated in float32: they are valid if the sum of the terms' magnitudes is below
3.4e38, and otherwise may be infinite or NaN. Softmax and layer norm are valid for every finite
input.
"""

import atexit
import contextlib
import importlib.util
import os
import sys

import numpy as np

from cpython.pycapsule cimport PyCapsule_GetPointer
from libc.math cimport powf

from legacy1bit.kernels cimport GELU, RELU, RELU2, SILU, KernelTable, Matrix, Operand, strided
from legacy1bit.threads cimport parallel_for, scratch, set_thread_override, thread_override

cdef extern from "cpu.h" nogil:
    const char *CPU_TIERS
    int cpu_widest_tier()
    bint cpu_has_avx_vnni()

_TIERS = tuple(CPU_TIERS.decode().split())
# Those whose kernels multiply matrices in bfloat16; products in float32 are those of avx512vnni.
_BF16_TIERS = ("avx512bf16", "amx")

cdef const KernelTable *active = NULL
cdef const KernelTable *packed = NULL


cdef const KernelTable *kernels() noexcept nogil:
    # A thread can override the table, for products in bfloat16.
    cdef const KernelTable *own = <const KernelTable *>thread_override()
    return active if own == NULL else own


cdef const KernelTable *packed_kernels() noexcept nogil:
    return packed


cdef float *pack_buffer() except NULL:
    cdef float *buffer = scratch(packed.workspace_floats)
    if buffer == NULL:
        raise MemoryError("no memory for the kernels' packing buffers")
    return buffer


# ---------------------------------------------------------------------------------------------
# The instruction set

def simd_levels() -> list:
    """Return the names of the instruction sets this CPU and this build can run, narrowest first.

    The last of them is the default.
    """
    levels = []
    for name in _TIERS[:cpu_widest_tier() + 1]:
        if name == "avxvnni" and not cpu_has_avx_vnni():
            continue
        if importlib.util.find_spec(f"legacy1bit._kernels_{name}") is not None:
            levels.append(name)
    return levels


def simd_level() -> str:
    """Return the name of the instruction set in use, one of ``simd_levels()``."""
    return packed.name.decode()


def set_simd_level(str name not None) -> None:
    """Use the instruction set ``name`` from now on, in every thread.

    Raises
    ------
    ValueError
        If there is no instruction set of that name, or this CPU cannot run it.
    """
    if name not in _TIERS:
        raise ValueError(f"unknown instruction set {name!r}: expected one of {', '.join(_TIERS)}")
    levels = simd_levels()
    if name not in levels:
        raise ValueError(f"this CPU or build cannot run {name!r}: it has {', '.join(levels)}")
    _use(name)


# The loaded kernels by instruction set.
_loaded = {}


cdef const KernelTable *_table(str name, bint int8=False) except NULL:
    if name not in _loaded:
        _loaded[name] = importlib.import_module(f"legacy1bit._kernels_{name}")
    capsule = _loaded[name].int8_table if int8 else _loaded[name].table
    return <const KernelTable *>PyCapsule_GetPointer(capsule, "legacy1bit.kernels")


def _use(str name):
    global active, packed
    packed = _table(name)
    active = _table("avx512vnni") if name in _BF16_TIERS else packed


def product_precisions() -> list:
    """Return the precisions of matrix products: float32, int8 and possibly bf16.

    bf16 needs avx512bf16 or amx as the instruction set in use.
    """
    return ["float32", "int8", "bf16"] if simd_level() in _BF16_TIERS else ["float32", "int8"]


def fastest_precision(bint codes=True) -> str:
    """Return the precision of the fastest matrix products of the instruction set in use.

    Parameters
    ----------
    codes : bool
        Whether the matrices are codes that int8 products can use.

    Returns
    -------
    str
        One of ``product_precisions()``: bf16 with AMX, and otherwise int8 from SSE2 on, for codes.
        Not bf16 in vectors: on a Xeon that is slower than float32 (docs/SPEED.md).
    """
    if simd_level() == "amx":
        return "bf16"
    return "int8" if codes and simd_level() not in ("scalar", "sse") else "float32"


@contextlib.contextmanager
def product_precision(str name not None):
    """Context manager that sets the precision of matrix products in the calling thread.

    With ``bf16`` both factors are rounded to bfloat16 (8 bits), denormals to 0, and their products
    summed in float32: with ``amx`` on the CPU's matrix unit, with ``avx512bf16`` in vectors, in
    another order and so with other last bits. Everything else is as with ``avx512vnni``.

    With ``int8`` linear maps of codes, and their gradients of inputs, round the float factor to
    int8 with one scale per row, as a ``PackedMatrix`` does. The codes are exact, and the sums are
    integers: such a product has the same bits in every instruction set. So have the gradients of
    the codes' weights: those of outputs, times the scales of the inputs' rows, are rounded to int16
    with one scale per feature. Everything else remains float32: float matrices, codes in groups of
    a row or of other values than a scheme's, products of fewer than 16 rows, and matrices of more
    than 12,288 rows or columns.

    The error bounds of float32 no longer hold in either of them.

    Raises
    ------
    ValueError
        If this CPU, this build or the instruction set in use does not support the precision.
    """
    cdef const void *before = thread_override()
    if name not in ("float32", "int8", "bf16"):
        raise ValueError(f"unknown precision {name!r}: expected float32, int8 or bf16")
    if name not in product_precisions():
        raise ValueError("precision is bf16, expected float32 or int8: bf16 products need "
                         "avx512bf16 or amx as the instruction set")
    if name == "float32":
        set_thread_override(NULL)
    elif name == "int8":
        set_thread_override(_table(active.name.decode(), int8=True))
    else:
        set_thread_override(packed)
    try:
        yield
    finally:
        set_thread_override(before)


def timings() -> dict:
    """Return the counters of the kernels' timers.

    Returns
    -------
    dict of str to (int, float)
        For each kernel its calls and seconds; empty unless built with MEASURE_PERFORMANCE=1.
    """
    cdef const KernelTable *table
    cdef int i
    counted = {}
    for name in _loaded if active.measuring() else ():
        table = _table(name)
        for i in range(table.timers):
            label = table.timer_name(i).decode()
            calls, seconds = counted.get(label, (0, 0.0))
            counted[label] = (calls + table.timer_calls(i),
                              seconds + table.timer_nanoseconds(i) * 1e-9)
    return counted


def _print_timings():
    rows = sorted(((name, calls, seconds) for name, (calls, seconds) in timings().items() if calls),
                  key=lambda row: -row[2])
    if not rows:
        return
    total = sum(seconds for _, _, seconds in rows)
    print(f"\n{'kernel':<20} {'calls':>12} {'milliseconds':>14} {'share':>7}", file=sys.stderr)
    for name, calls, seconds in rows:
        print(f"{name:<20} {calls:>12,} {seconds * 1e3:>14,.1f} {seconds / total:>7.1%}",
              file=sys.stderr)


def _choose():
    wanted = os.environ.get("LEGACY1BIT_SIMD", "")
    try:
        set_simd_level(wanted or simd_levels()[-1])
    except ValueError as error:
        raise ImportError(f"LEGACY1BIT_SIMD: {error}") from None
    if active.measuring():
        atexit.register(_print_timings)


_choose()


# ---------------------------------------------------------------------------------------------
# The peak performance of the CPU

def peak_fused(Py_ssize_t rounds) -> int:
    """Multiply and add floats in registers only, with the instruction set in use.

    Returns
    -------
    int
        The number of multiplications and additions, to divide by the time they took.
    """
    with nogil:
        active.peak_fused(rounds)
    return 2 * rounds * active.peak_floats


def peak_dot(Py_ssize_t rounds) -> int:
    """Multiply and add small integers in registers, with the best instructions for it.

    Returns
    -------
    int
        The number of multiplications.
    """
    with nogil:
        active.peak_dot(rounds)
    return rounds * active.peak_products


def peak_read(const float[::1] x not None) -> int:
    """Read float32[N] once, and return the number of bytes."""
    check_not_empty("x", x.shape[0])
    with nogil:
        active.peak_read(&x[0], x.shape[0])
    return 4 * x.shape[0]


# ---------------------------------------------------------------------------------------------
# Checks

cdef object check_not_none(str name, object value):
    if value is None:
        raise TypeError(f"{name} is None")
    return value


cdef int check_size(str name, Py_ssize_t came, Py_ssize_t expected) except -1:
    if came != expected:
        raise ValueError(f"{name} has {came} elements, expected {expected}")
    return 0


cdef int check_not_empty(str name, Py_ssize_t size) except -1:
    if size == 0:
        raise ValueError(f"{name} is empty")
    return 0


cdef int check_shape(str name, Py_ssize_t rows, Py_ssize_t cols,
                     Py_ssize_t expected_rows, Py_ssize_t expected_cols) except -1:
    if rows != expected_rows or cols != expected_cols:
        raise ValueError(f"{name} has shape ({rows}, {cols}), expected "
                         f"({expected_rows}, {expected_cols})")
    return 0


# ---------------------------------------------------------------------------------------------
# Ternary matrix times vector

cdef object ternary_product(object matrix, object vector, object output, object scale,
                            bint transpose):
    cdef const signed char[:, ::1] codes = check_not_none(
        "matrix", getattr(matrix, "values", matrix))
    cdef const float[::1] x = check_not_none("vector", vector)
    cdef const float[:, ::1] scales
    cdef Py_ssize_t rows = codes.shape[0], cols = codes.shape[1]
    cdef Matrix view
    cdef float[::1] out
    check_not_empty("matrix", rows * cols)
    check_size("vector", x.shape[0], rows if transpose else cols)
    if output is None:
        output = np.empty(cols if transpose else rows, np.float32)
    out = output
    check_size("output", out.shape[0], cols if transpose else rows)
    view.rows = rows
    view.cols = cols
    view.codes = &codes[0, 0]
    # A TernaryMatrix has its own scales.
    if scale is None and hasattr(matrix, "scales"):
        scales, view.group = matrix.scales, matrix.group
    else:
        scales = np.array([[1.0 if scale is None else scale]], np.float32)
        view.group = cols
    view.scale = &scales[0, 0]
    view.scale_row = 0 if scales.shape[0] * scales.shape[1] == 1 else scales.shape[1]
    view.dense = NULL
    view.reach = 0
    with nogil:
        if transpose:
            active.matrix_transpose_vector(&view, &x[0], &out[0])
        else:
            active.matrix_vector(&view, &x[0], &out[0])
    return output


def ternary_matrix_vector_mul(matrix, vector, output=None, scale=None):
    """Multiply a ternary matrix by a vector: ``scale * matrix @ vector``.

    Parameters
    ----------
    matrix : int8[R, C] or TernaryMatrix
        The weights -1, 0 and 1. A ``TernaryMatrix`` has its own scale.
    vector : float32[C]
    output : float32[R], optional
        Receives the result; allocated by default.
    scale : float, optional
        Multiplies the product; by default the matrix's own scale, or 1.

    Returns
    -------
    float32[R]
        ``output``.

    Raises
    ------
    ValueError
        If a shape or dtype does not fit.

    Notes
    -----
    C: ``math_ops.c``, ``ternary_matrix_vector_mul``, whose weights have no scale (departure 10).
    """
    return ternary_product(matrix, vector, output, scale, False)


def matrix_transpose_vector_mul(matrix, vector, output=None, scale=None):
    """Multiply a transposed ternary matrix by a vector: ``scale * matrix.T @ vector``.

    Parameters
    ----------
    matrix : int8[R, C] or TernaryMatrix
    vector : float32[R]
    output : float32[C], optional
    scale : float, optional
        By default the matrix's own scale, or 1.

    Returns
    -------
    float32[C]
        ``output``.

    Raises
    ------
    ValueError
        If a shape or dtype does not fit.

    Notes
    -----
    C: ``math_ops.c``, ``matrix_transpose_vector_mul``.
    """
    return ternary_product(matrix, vector, output, scale, True)


# ---------------------------------------------------------------------------------------------
# Vectors

def add_vector_inplace(float[::1] x not None, const float[::1] y not None) -> None:
    """Add ``y`` to ``x``, both float32[N], in place. C: ``add_vector_inplace``."""
    check_not_empty("x", x.shape[0])
    check_size("y", y.shape[0], x.shape[0])
    with nogil:
        active.add(&x[0], &y[0], x.shape[0])


def add_scalar_mul_vector_inplace(float[::1] x not None, float scalar,
                                  const float[::1] y not None) -> None:
    """Add ``scalar * y`` to ``x``, both float32[N]. C: ``add_scalar_mul_vector_inplace``."""
    check_not_empty("x", x.shape[0])
    check_size("y", y.shape[0], x.shape[0])
    with nogil:
        active.add_scaled(&x[0], scalar, &y[0], x.shape[0])


def multiply_vector_inplace(float[::1] x not None, const float[::1] y not None) -> None:
    """Multiply ``x`` by ``y``, both float32[N], element by element.

    C: ``multiply_vector_inplace``.
    """
    check_not_empty("x", x.shape[0])
    check_size("y", y.shape[0], x.shape[0])
    with nogil:
        active.multiply(&x[0], &y[0], x.shape[0])


def scalar_mul_vector_inplace(float[::1] x not None, float scalar) -> None:
    """Multiply every element of ``x``, float32[N], by ``scalar``.

    C: ``scalar_mul_vector_inplace``.
    """
    check_not_empty("x", x.shape[0])
    with nogil:
        active.scale(&x[0], scalar, x.shape[0])


def vector_sub_scalar_inplace(float[::1] x not None, float scalar) -> None:
    """Subtract ``scalar`` from every element of ``x``, float32[N].

    C: ``vector_sub_scalar_inplace``.
    """
    check_not_empty("x", x.shape[0])
    with nogil:
        active.shift(&x[0], -scalar, x.shape[0])


def vector_div_scalar_inplace(float[::1] x not None, float scalar) -> None:
    """Divide every element of ``x``, float32[N], by ``scalar``.

    Raises ``ZeroDivisionError`` for 0, which C only reports on stderr.
    C: ``vector_div_scalar_inplace``.
    """
    check_not_empty("x", x.shape[0])
    if scalar == 0.0:
        raise ZeroDivisionError("scalar is 0")
    with nogil:
        active.divide(&x[0], scalar, x.shape[0])


def vector_pow_scalar_inplace(float[::1] x not None, float scalar) -> None:
    """Raise every element of ``x``, float32[N], to the power ``scalar``, as ``powf`` does.

    C: ``vector_pow_scalar_inplace``.
    """
    cdef Py_ssize_t i
    check_not_empty("x", x.shape[0])
    with nogil:
        for i in range(x.shape[0]):
            x[i] = powf(x[i], scalar)


def vector_sum(const float[::1] x not None) -> float:
    """Return the sum of ``x``, float32[N], added in float32. C: ``vector_sum``."""
    check_not_empty("x", x.shape[0])
    with nogil:
        total = active.sum(&x[0], x.shape[0])
    return total


def dot_product(const float[::1] x not None, const float[::1] y not None) -> float:
    """Return the dot product of ``x`` and ``y``, both float32[N]. C: ``dot_product``."""
    check_not_empty("x", x.shape[0])
    check_size("y", y.shape[0], x.shape[0])
    with nogil:
        total = active.dot(&x[0], &y[0], x.shape[0])
    return total


def outer_product_add_inplace(float[:, ::1] matrix not None, const float[::1] x not None,
                              const float[::1] y not None) -> None:
    """Add the outer product of two vectors to a matrix: ``matrix += x[:, None] * y``.

    Parameters
    ----------
    matrix : float32[R, C]
    x : float32[R]
    y : float32[C]

    Notes
    -----
    C: ``outer_product_add_inplace``, which accumulates the gradient of a linear map.
    """
    cdef Py_ssize_t i
    check_not_empty("matrix", matrix.shape[0] * matrix.shape[1])
    check_size("x", x.shape[0], matrix.shape[0])
    check_size("y", y.shape[0], matrix.shape[1])
    with nogil:
        for i in range(matrix.shape[0]):
            active.add_scaled(&matrix[i, 0], x[i], &y[0], matrix.shape[1])


def exp_inplace(float[::1] x not None) -> None:
    """Replace every element of ``x``, float32[N], by its exponential.

    The error is below 2 units in the last place; below -104 the result is 0, and above
    88.8 infinity.
    """
    check_not_empty("x", x.shape[0])
    with nogil:
        active.exp(&x[0], x.shape[0])


def relu(float[::1] x not None) -> None:
    """Replace every element of ``x``, float32[N], by ``max(x, 0)``. C: ``relu``."""
    check_not_empty("x", x.shape[0])
    with nogil:
        active.activate(RELU, &x[0], &x[0], x.shape[0])


def relu2(float[::1] x not None) -> None:
    """Replace every element of ``x``, float32[N], by ``max(x, 0) ** 2``.

    The squared ReLU of So et al., arXiv 2109.08668. The C original has only ``relu``.
    """
    check_not_empty("x", x.shape[0])
    with nogil:
        active.activate(RELU2, &x[0], &x[0], x.shape[0])


def silu(float[::1] x not None) -> None:
    """Replace every element of ``x``, float32[N], by ``x / (1 + exp(-x))``.

    Elfwing et al., arXiv 1702.03118, equation 4. Minus infinity becomes NaN.
    """
    check_not_empty("x", x.shape[0])
    with nogil:
        active.activate(SILU, &x[0], &x[0], x.shape[0])


def gelu(float[::1] x not None) -> None:
    """Replace every element of ``x``, float32[N], by its GELU in the form with tanh.

    ``x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))``: Hendrycks & Gimpel, arXiv 1606.08415,
    section 2. Minus infinity becomes NaN.
    """
    check_not_empty("x", x.shape[0])
    with nogil:
        active.activate(GELU, &x[0], &x[0], x.shape[0])


def softmax(x) -> None:
    """Replace ``x``, float32[N] or the rows of float32[R, N], by its softmax.

    The largest element is subtracted first, so that no exponential overflows. A row of only minus
    infinity becomes zeros. C: ``softmax``.
    """
    cdef float[:, ::1] rows = _rows_of(x)
    with nogil:
        active.softmax(&rows[0, 0], rows.shape[0], rows.shape[1])


def quantize_activations(x) -> None:
    """Fake-quantize ``x``, float32[N] or the rows of float32[R, N], to int8 with one scale per row.

    A row becomes multiples, -127 to 127, of its scale max |x| / 127 (BitNet b1.58, arXiv
    2402.17764, section 2). A row whose scale float32 cannot represent (such as one of zeros) is
    left unchanged, and so is a row that is not finite. The C original has float activations only.
    """
    cdef float[:, ::1] rows = _rows_of(x)
    with nogil:
        active.fake_quantize_rows(&rows[0, 0], rows.shape[0], rows.shape[1])


cdef float[:, ::1] _rows_of(x):
    """Return float32[R, N] unchanged, and float32[N] as a matrix of one row."""
    cdef float[::1] row
    cdef float[:, ::1] rows
    if getattr(check_not_none("x", x), "ndim", 1) == 1:
        row = x
        check_not_empty("x", row.shape[0])
        return <float[:1, :row.shape[0]:1]>&row[0]
    rows = x
    check_not_empty("x", rows.shape[0] * rows.shape[1])
    return rows


def layer_norm_forward(float[::1] x not None, const float[::1] gamma not None,
                       const float[::1] beta not None, float epsilon=1e-5):
    """Normalize a vector in place: ``gamma * (x - mean) / sqrt(variance + epsilon) + beta``.

    Parameters
    ----------
    x, gamma, beta : float32[C]
    epsilon : float

    Returns
    -------
    (float, float)
        The mean and 1 / sqrt(variance + epsilon), which the backward pass needs.

    Raises
    ------
    ValueError
        If a shape or dtype does not fit.

    Notes
    -----
    Valid for every finite input: if the squares overflow, or the mean exceeds 1,000 standard
    deviations, the row is computed in float64.
    C: ``layer_norm_forward``. Its SSE form estimates the second value to 12 bits; this one is
    exact in every instruction set (departure 9).
    """
    cdef float mean, inv_std
    check_not_empty("x", x.shape[0])
    check_size("gamma", gamma.shape[0], x.shape[0])
    check_size("beta", beta.shape[0], x.shape[0])
    with nogil:
        active.layer_norm(&x[0], &gamma[0], &beta[0], epsilon, &x[0], &mean, &inv_std,
                          1, x.shape[0])
    return mean, inv_std


def layer_norm(float[::1] x not None, const float[::1] gamma not None,
               const float[::1] beta not None, float epsilon=1e-5) -> None:
    """As ``layer_norm_forward``, without a return value. C: ``layer_norm``."""
    layer_norm_forward(x, gamma, beta, epsilon)


# ---------------------------------------------------------------------------------------------
# The float matrix product

cdef struct MatmulJob:
    Py_ssize_t m, n, k
    Operand a, b
    bint accumulate
    float *c
    Py_ssize_t tasks
    bint out_of_memory


cdef void matmul_task(void *context, long index) noexcept nogil:
    # One slice of the rows, or of the columns if there are more of them.
    cdef MatmulJob *job = <MatmulJob *>context
    cdef const KernelTable *kernel = kernels()
    cdef float *workspace = scratch(kernel.workspace_floats)
    cdef Py_ssize_t size = job.m if job.m >= job.n else job.n
    cdef Py_ssize_t start = size * index // job.tasks, stop = size * (index + 1) // job.tasks
    cdef Operand a = job.a, b = job.b
    if workspace == NULL:
        job.out_of_memory = True
    elif job.m >= job.n:
        a.data += start * a.row
        kernel.matmul(stop - start, job.n, job.k, a, b, NULL, job.accumulate,
                      job.c + start * job.n, job.n, workspace)
    else:
        b.data += start * b.col
        kernel.matmul(job.m, stop - start, job.k, a, b, NULL, job.accumulate, job.c + start,
                      job.n, workspace)


def matmul(const float[:, ::1] a not None, const float[:, ::1] b not None, output=None,
           bint transpose_a=False, bint transpose_b=False, bint accumulate=False,
           int threads=1):
    """Multiply two float matrices.

    Parameters
    ----------
    a : float32[M, K]
        Or float32[K, M] with ``transpose_a``.
    b : float32[K, N]
        Or float32[N, K] with ``transpose_b``.
    output : float32[M, N], optional
        Receives the product; allocated by default. It must not overlap ``a`` or ``b``.
    accumulate : bool
        Add to ``output`` instead of overwriting it.
    threads : int
        The maximum number of threads. The result has the same bits for any number.

    Returns
    -------
    float32[M, N]
        ``output``.

    Raises
    ------
    ValueError
        If a shape or dtype does not fit, or ``threads`` is below 1, or ``accumulate`` is set
        without an ``output``.
    MemoryError
        If there is no memory for the packing buffers.
    """
    cdef MatmulJob job
    cdef float[:, ::1] c
    check_not_empty("a", a.shape[0] * a.shape[1])
    check_not_empty("b", b.shape[0] * b.shape[1])
    if threads < 1:
        raise ValueError(f"threads is {threads}, expected at least 1")
    job.m = a.shape[1] if transpose_a else a.shape[0]
    job.k = a.shape[0] if transpose_a else a.shape[1]
    job.n = b.shape[0] if transpose_b else b.shape[1]
    if (b.shape[1] if transpose_b else b.shape[0]) != job.k:
        raise ValueError(f"a and b do not fit: {job.m} x {job.k} times "
                         f"{b.shape[1] if transpose_b else b.shape[0]} x {job.n}")
    if output is None:
        if accumulate:
            raise ValueError("accumulate needs an output to add to")
        output = np.empty((job.m, job.n), np.float32)
    c = output
    check_shape("output", c.shape[0], c.shape[1], job.m, job.n)
    job.a = strided(&a[0, 0], 1 if transpose_a else a.shape[1], a.shape[1] if transpose_a else 1)
    job.b = strided(&b[0, 0], 1 if transpose_b else b.shape[1], b.shape[1] if transpose_b else 1)
    job.accumulate = accumulate
    job.c = &c[0, 0]
    job.tasks = min(threads, max(job.m, job.n))
    job.out_of_memory = False
    with nogil:
        parallel_for(matmul_task, &job, job.tasks, threads)
    if job.out_of_memory:
        raise MemoryError("no memory for the matrix product's packing buffers")
    return output
