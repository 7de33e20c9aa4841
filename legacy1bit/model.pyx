"""The model: its weights, their gradients, and model files (C: ``model.c``).

A model stores its weights in three flat arrays: the int8 codes of all quantized matrices, their
scales, and the float32 parameters. A trainable model also has latent float weights for the
quantized matrices, before the other floats, so that one array holds all trainable values; gradients
and optimizer states have the same layout. All parameters are views into these:

    [ latent weights of quantized matrices | float matrices | vectors ]

Weight decay applies to the first two parts; the third is small. ``layout.py`` has the names, shapes
and offsets, and ``formats/native.py`` reads and writes the files.
"""

import math
from pathlib import Path

import numpy as np

from legacy1bit.formats import native, published
from legacy1bit.formats.provenance import Provenance
from legacy1bit.layout import (
    AdapterConfig, adapter_layout, block_layout, block_options, parameter_layout, views,
)
from legacy1bit.packing import Values
from legacy1bit.schemes import FLOAT, SCHEMES
from legacy1bit.system.files import atomic_write

from libc.stdlib cimport calloc, free
from libc.string cimport memset

from legacy1bit.kernels cimport GELU, RELU, RELU2, SILU, Rotary, Scheme
from legacy1bit.math_ops cimport kernels
from legacy1bit.projection cimport (
    Demand, Projection, Workspace, add_demand, reserve_or_raise,
)
from legacy1bit.threads cimport parallel_for, scratch

LAYER_NORM_EPSILON = 1e-5

# The activations of the feed-forward layer, and their numbers in the kernels.
ACTIVATIONS = {"relu2": RELU2, "relu": RELU, "silu": SILU, "gelu": GELU}

ModelFileError = native.ModelFileError


# ---------------------------------------------------------------------------------------------
# Pointers into arrays

cdef const float *vector_pointer(object array, Py_ssize_t size, str name) except NULL:
    cdef const float[::1] view
    if array is None:
        raise ValueError(f"{name} is None, expected {size} elements")
    view = array
    if view.shape[0] != size:
        raise ValueError(f"{name} has {view.shape[0]} elements, expected {size}")
    if size == 0:
        raise ValueError(f"{name} is empty")
    return &view[0]


cdef float *gradient_pointer(object array, tuple shape, str name) except NULL:
    if array.shape != shape:
        raise ValueError(f"{name} has shape {array.shape}, expected {shape}")
    if not array.flags.c_contiguous:
        raise ValueError(f"{name} is not C-contiguous")
    return float_pointer(array)


cdef float *float_pointer(object array) except NULL:
    # Into a C-contiguous, writable float32 array with any number of axes.
    cdef float[::1] view
    if not array.flags.c_contiguous:
        raise ValueError("an array to write to is not C-contiguous")
    view = array.reshape(-1)
    return &view[0]


cdef int fill_projection(Projection *view, object weights, str name) except -1:
    # Points at the weights of a linear map; it has no bias yet.
    cdef const float[:, ::1] dense
    memset(view, 0, sizeof(view[0]))
    if isinstance(weights, WeightMatrix):
        (<WeightMatrix>weights).fill(view)
    elif weights is None:
        raise ValueError(f"{name} is None, expected a matrix")
    else:
        dense = weights
        if dense.shape[0] * dense.shape[1] == 0:
            raise ValueError(f"{name} is empty")
        view.rows = view.matrix.rows = dense.shape[0]
        view.cols = view.matrix.cols = view.matrix.group = dense.shape[1]
        view.matrix.dense = &dense[0, 0]
    return 0


cdef const float *optional_vector(object array, Py_ssize_t size, str name) except? NULL:
    # NULL for None.
    if array is None:
        return NULL
    return vector_pointer(array, size, name)


cdef int check_shape(const Projection *view, Py_ssize_t rows, Py_ssize_t cols, str name) except -1:
    if view.rows != rows or view.cols != cols:
        raise ValueError(f"{name} has shape ({view.rows}, {view.cols}), expected ({rows}, {cols})")
    return 0


# ---------------------------------------------------------------------------------------------
# Matrices and vectors

cdef class WeightMatrix:
    """The base class of matrices that are not arrays of floats."""

    cdef int fill(self, Projection *view) except -1:
        raise TypeError(f"{type(self).__name__} has no weights")


cdef class TernaryMatrix(WeightMatrix):
    """A matrix of -1, 0 and 1 times scales (C: ``TernaryMatrix``), or of another scheme's codes.

    Parameters
    ----------
    values : int8[R, C]
        The codes, which are not copied.
    scale : float, float32[1, 1] or float32[R, G]
        One scale for all codes, or one for each of G groups of consecutive columns in every row.
        An array is not copied. The C original has no scale (departure 10).
    group : int
        The number of consecutive columns that share a scale, a multiple of 16; 0 means the row.
    levels : tuple of int
        The codes that are allowed.

    Raises
    ------
    ValueError
        If ``values`` is empty, not two-dimensional or of another dtype, or holds another number,
        or a scale is not finite, or the shape of the scales does not fit the groups.
    """

    def __init__(self, values, scale=1.0, group=0, levels=(-1, 0, 1)):
        cdef const signed char[:, ::1] codes = values
        if codes is None or codes.shape[0] * codes.shape[1] == 0:
            raise ValueError("values is empty")
        if len(levels) == 0:
            raise ValueError("levels is empty")
        if not np.isin(values, levels).all():
            raise ValueError("values holds a number other than "
                             f"{', '.join(map(str, levels[:-1]))} and {levels[-1]}")
        self.codes = values
        self.freed = False
        # Codes that have a product in int8.
        self.reach = 0
        if set(levels) <= {-1, 0, 1}:
            self.reach = 1
        elif set(levels) <= {-3, -1, 1, 3}:
            self.reach = 3
        self.group = codes.shape[1] if group == 0 else _size("group", group)
        if self.group < codes.shape[1] and self.group % 16:
            raise ValueError(f"group is {self.group}, expected a multiple of 16: no vector may "
                             "have two scales")
        self.scales = scale
        if scale is None:
            raise TypeError("scale is None")
        if not isinstance(scale, np.ndarray):
            self.scales = np.array([[scale]], np.float32)
        elif scale.dtype != np.float32 or not scale.flags.c_contiguous:
            raise ValueError(f"scale is {scale.dtype}, expected float32 and C-contiguous")
        if self.scales.shape == (1, 1):
            self.group = max(self.group, codes.shape[1])
        groups = (codes.shape[1] + self.group - 1) // self.group
        if self.scales.shape not in ((1, 1), (codes.shape[0], groups)):
            raise ValueError(f"scale has shape {self.scales.shape}, which is none for codes of "
                             f"shape {values.shape} in groups of {self.group}")
        if not np.isfinite(self.scales).all():
            raise ValueError(f"scale is {self.scales.ravel()[0]}, expected finite numbers"
                             if self.scales.size == 1 else "a scale is not a finite number")

    @property
    def values(self):
        """The codes, int8[R, C]. Raises ``ValueError`` once the matrix was freed."""
        if self.freed:
            raise ValueError("the matrix was freed")
        return self.codes

    @property
    def scale(self) -> float:
        """The scale of every code; the mean if there are several."""
        return float(self.scales.mean(dtype=np.float64))

    @property
    def shape(self) -> tuple:
        """(R, C)."""
        return self.values.shape

    def dense(self):
        """Return the matrix as float32[R, C]: codes times scales."""
        cols = self.shape[1]
        wide = np.repeat(self.scales, self.group, axis=1)[:, :cols]
        return self.values.astype(np.float32) * wide

    cdef int fill(self, Projection *view) except -1:
        cdef const signed char[:, ::1] codes = self.values
        cdef const float[:, ::1] scales = self.scales
        view.rows = view.matrix.rows = codes.shape[0]
        view.cols = view.matrix.cols = codes.shape[1]
        view.matrix.codes = &codes[0, 0]
        view.matrix.scale = &scales[0, 0]
        view.matrix.scale_row = 0 if self.scales.shape == (1, 1) else scales.shape[1]
        view.matrix.group = self.group
        view.matrix.reach = self.reach
        return 0

    def __repr__(self):
        if self.freed:
            return "TernaryMatrix(freed)"
        return f"TernaryMatrix({self.shape[0]} x {self.shape[1]}, scale={self.scale:.6g})"


def _size(name, value):
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} is {value!r}, expected a whole number")
    if value < 1:
        raise ValueError(f"{name} is {value}, expected at least 1")
    return value


def create_ternary_matrix(rows, cols, seed) -> TernaryMatrix:
    """Return a matrix of random codes, each of -1, 0 and 1 equally likely, with scale 1.

    Parameters
    ----------
    rows, cols : int
    seed : int or numpy.random.Generator
        C seeds once from the clock (departure 14).

    Notes
    -----
    C: ``model.c``, ``create_ternary_matrix``.
    """
    rng = np.random.default_rng(seed)
    shape = (_size("rows", rows), _size("cols", cols))
    return TernaryMatrix(rng.integers(-1, 2, shape, dtype=np.int8))


def free_ternary_matrix(TernaryMatrix matrix not None) -> None:
    """Mark a matrix as freed; using it afterwards raises ``ValueError``.

    Its memory is released with the last layer that refers to it, so this is never needed.
    C: ``free_ternary_matrix``.
    """
    matrix.freed = True


def create_float_array(size, seed):
    """Return float32[size] of uniform random numbers between -0.01 and 0.01.

    C: ``model.c``, ``create_float_array``, which also initializes the gamma of layer norms in C
    (departure 10: here gamma starts at 1 and beta at 0).
    """
    rng = np.random.default_rng(seed)
    return rng.uniform(-0.01, 0.01, _size("size", size)).astype(np.float32)


def free_float_array(array) -> None:
    """Do nothing: Python frees an array with the last reference to it. C: ``free_float_array``."""
    vector_pointer(array, len(array), "array")


# ---------------------------------------------------------------------------------------------
# Layers

class RotaryTable:
    """The cosines and sines of rotary positions (Su et al., arXiv 2104.09864, equation 15).

    Parameters
    ----------
    rotary_dim : int
        D, the number of elements of a head that rotate, an even number.
    length : int
        T, the number of positions.
    base : float
    factor : float
        Above 1: YaRN (Peng et al., arXiv 2309.00071, section 3.4). Wavelengths that are long
        compared with ``original_length`` become ``factor`` times as long, short ones stay, and both
        tables are multiplied by ``1 + 0.1 ln(factor)`` (equation 22), at every position.
    original_length : int
        The context length before YaRN.
    adjacent : bool
        Whether pairs are elements 2 i and 2 i + 1 of a head, instead of i and i + D / 2.

    Attributes
    ----------
    cosines, sines : float32[T, D / 2]
        Of the angle ``t * base ** (-2 i / D)`` by which position t rotates pair i; rows beyond
        those that ``fill`` has computed are 0.
    """

    def __init__(self, rotary_dim, length, base=10000.0, factor=1.0, original_length=0,
                 adjacent=False):
        if rotary_dim % 2:
            raise ValueError(f"rotary_dim is {rotary_dim}, expected an even number")
        self.adjacent = adjacent
        self._rates = float(base) ** (-np.arange(rotary_dim // 2) * 2.0 / rotary_dim)
        self._amplitude = 1.0
        if factor > 1.0:
            self._rates *= _yarn_shares(rotary_dim, base, factor, original_length)
            self._amplitude += 0.1 * math.log(factor)
        # A small file may declare a long context. Zeros take no memory before they are written.
        self.cosines = np.zeros((length, rotary_dim // 2), np.float32)
        self.sines = np.zeros((length, rotary_dim // 2), np.float32)
        self._filled = 0

    def fill(self, length) -> None:
        """Compute the first ``length`` rows, unless they are there already.

        Concurrent threads write the same numbers.
        """
        start = self._filled
        # At least twice as many as before, so that growing row by row has amortized constant cost.
        stop = min(max(length, 2 * start), len(self.cosines))
        if length > start and stop > start:
            angles = np.arange(start, stop)[:, None] * self._rates
            self.cosines[start:stop] = self._amplitude * np.cos(angles)
            self.sines[start:stop] = self._amplitude * np.sin(angles)
            self._filled = max(self._filled, stop)


def _yarn_shares(rotary_dim, base, factor, original_length):
    """Return by what YaRN multiplies the rate of each pair: float64[D / 2], 1 / factor to 1."""
    # The pair that turns `turns` times in the original length, equation 17 solved for the pair.
    low, high = (rotary_dim * math.log(original_length / (2.0 * math.pi * turns))
                 / (2.0 * math.log(base)) for turns in (32.0, 1.0))
    low, high = max(math.floor(low), 0), min(math.ceil(high), rotary_dim - 1)
    ramp = (np.arange(rotary_dim // 2) - low) / max(high - low, 0.001)
    slow = np.clip(ramp, 0.0, 1.0)
    return slow / factor + (1.0 - slow)


def rotary_table(config) -> RotaryTable | None:
    """Return the rotary table of a model of these settings, or None without rotary positions."""
    if config.positions == "none":
        return None
    return RotaryTable(config.rotary_dim, config.sequence_length, config.rope_base,
                       config.rope_factor, config.rope_original_length,
                       config.rope_pairs == "adjacent")


cdef int fill_rotary_view(Rotary *view, object table, Py_ssize_t head_dim) except -1:
    # Points at a rotary table for heads of this size; None: no rotary positions.
    cdef const float[:, ::1] values
    view.cosines = view.sines = NULL
    view.length = view.dim = 0
    if table is None:
        return 0
    values = table.cosines
    if values.shape[1] * 2 > head_dim:
        raise ValueError(f"the rotary table is for heads of {values.shape[1] * 2}, expected "
                         f"{head_dim}")
    view.cosines = &values[0, 0]
    view.length, view.dim = values.shape[0], 2 * values.shape[1]
    view.adjacent = table.adjacent
    values = table.sines
    view.sines = &values[0, 0]
    return 0


cdef class LayerNorm:
    """The weights of one layer norm or RMS norm.

    Parameters
    ----------
    gamma : float32[C]
    beta : float32[C], optional
        Not of an RMS norm.
    epsilon : float
        Added to the variance, or to the mean square.
    rms : bool
        RMS norm (Zhang & Sennrich, arXiv 1910.07467) instead of layer norm.
    """

    def __init__(self, gamma, beta=None, epsilon=LAYER_NORM_EPSILON, rms=False):
        self.view.gamma = vector_pointer(gamma, len(gamma), "gamma")
        self.view.beta = optional_vector(beta, len(gamma), "beta")
        if rms and beta is not None:
            raise ValueError("an RMS norm has no beta")
        self.view.epsilon, self.view.rms = epsilon, rms
        self.gamma, self.beta = gamma, beta

    def __reduce__(self):
        raise TypeError("a layer cannot be copied or pickled: use save_model and load_model")


cdef LayerNorm _inner_norm(gamma, beta, Py_ssize_t size, epsilon, rms, name="gamma"):
    """Return the norm inside a layer, or None if it has none."""
    if gamma is None and beta is None:
        return None
    vector_pointer(gamma, size, name)
    return LayerNorm(gamma, beta, epsilon, rms)


cdef class MultiHeadAttention:
    """The weights of one attention layer (C: ``MultiHeadAttentionLayer``).

    Parameters
    ----------
    wq : TernaryMatrix or float32[H D, C]
        Each matrix maps rows x to ``x @ w.T + b``.
    wk, wv : TernaryMatrix or float32[G D, C]
    wo : TernaryMatrix or float32[C, H D]
    bq, bk, bv, bo : float32, optional
        Of as many elements as the matrix has rows.
    num_heads : int
        H, heads of queries; divides the rows of ``wq``.
    rotary : RotaryTable, optional
        Rotates queries and keys by their positions; without it attention ignores positions.
    window : int
        The number of tokens that a token sees, itself included; 0 means all.
    gamma, beta : float32[H D], optional
        Of a norm before ``wo`` (SubLN).
    int8_activations : bool
        Whether the inputs of the matrices are quantized to int8, with one scale per token.
    num_kv_heads : int, optional
        G, heads of keys and values, each for H / G heads of queries (grouped-query attention:
        Ainslie et al., arXiv 2305.13245); by default H.
    q_gamma, k_gamma : float32[D], optional
        Of RMS norms of each head's queries and keys, before their rotation (QK-norm: Henry et al.,
        arXiv 2010.04245).
    epsilon : float
        Of all norms.
    rms : bool
        Whether the norm before ``wo`` is an RMS norm.
    """

    def __init__(self, wq, wk, wv, wo, bq=None, bk=None, bv=None, bo=None, num_heads=1,
                 rotary=None, window=0, gamma=None, beta=None, int8_activations=False, *,
                 num_kv_heads=None, q_gamma=None, k_gamma=None, epsilon=LAYER_NORM_EPSILON,
                 rms=False):
        cdef Py_ssize_t dim, wide, narrow
        cdef AttentionView *view = &self.view
        fill_projection(&view.wq, wq, "wq")
        fill_projection(&view.wk, wk, "wk")
        fill_projection(&view.wv, wv, "wv")
        fill_projection(&view.wo, wo, "wo")
        dim, wide = view.wq.cols, view.wq.rows
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if _size("num_heads", num_heads) > wide or wide % num_heads:
            raise ValueError(f"num_heads is {num_heads}, expected a divisor of {wide}")
        if _size("num_kv_heads", num_kv_heads) > num_heads or num_heads % num_kv_heads:
            raise ValueError(f"num_kv_heads is {num_kv_heads}, expected a divisor of {num_heads}")
        view.num_heads, view.num_kv_heads = num_heads, num_kv_heads
        view.head_dim = wide // view.num_heads
        narrow = view.num_kv_heads * view.head_dim
        check_shape(&view.wk, narrow, dim, "wk")
        check_shape(&view.wv, narrow, dim, "wv")
        check_shape(&view.wo, dim, wide, "wo")
        view.wq.bias = optional_vector(bq, wide, "bq")
        view.wk.bias = optional_vector(bk, narrow, "bk")
        view.wv.bias = optional_vector(bv, narrow, "bv")
        view.wo.bias = optional_vector(bo, dim, "bo")
        if window < 0:
            raise ValueError(f"window is {window}, expected 0 or more")
        if (q_gamma is None) != (k_gamma is None):
            raise ValueError("one of q_gamma and k_gamma is None, expected both or neither")
        view.window = window
        fill_rotary_view(&view.rotary, rotary, view.head_dim)
        self.wq, self.wk, self.wv, self.wo = wq, wk, wv, wo
        self.bq, self.bk, self.bv, self.bo = bq, bk, bv, bo
        self.num_heads, self.num_kv_heads = view.num_heads, view.num_kv_heads
        self.head_dim = view.head_dim
        self.window = window
        self.rotary = rotary
        self.q_norm = _inner_norm(q_gamma, None, view.head_dim, epsilon, True, "q_gamma")
        self.k_norm = _inner_norm(k_gamma, None, view.head_dim, epsilon, True, "k_gamma")
        if self.q_norm is not None:
            view.q_norm, view.k_norm = self.q_norm.view, self.k_norm.view
        self.norm = _inner_norm(gamma, beta, wide, epsilon, rms)
        if self.norm is not None:
            view.norm = self.norm.view
        view.int8_activations = int8_activations

    @property
    def q_gamma(self):
        """The gamma of the queries' norm, float32[D], or None."""
        return None if self.q_norm is None else self.q_norm.gamma

    @property
    def k_gamma(self):
        """The gamma of the keys' norm, float32[D], or None."""
        return None if self.k_norm is None else self.k_norm.gamma

    cdef int fill_rotary(self, Py_ssize_t length) except -1:
        # Call this before a pass over `length` positions.
        if self.rotary is None:
            return 0
        if length > self.view.rotary.length:
            raise ValueError(f"x has {length} positions, expected at most "
                             f"{self.view.rotary.length}")
        self.rotary.fill(length)
        return 0

    def __reduce__(self):
        raise TypeError("a layer cannot be copied or pickled: use save_model and load_model")


cdef class FeedForward:
    """The weights of one feed-forward layer, ``wo act(wi x + bi) + bo`` (C: ``FeedForwardLayer``).

    Parameters
    ----------
    wi : TernaryMatrix or float32[F, C]
    bi : float32[F], optional
    wo : TernaryMatrix or float32[C, F]
    bo : float32[C], optional
    activation : str
        One of ``ACTIVATIONS``.
    gamma, beta : float32[F], optional
        Of a norm before ``wo`` (SubLN).
    int8_activations : bool
        Whether the inputs of the matrices are quantized to int8, with one scale per token.
    wg : TernaryMatrix or float32[F, C], optional
        A gate: then the layer is ``wo (act(wg x + bg) * (wi x + bi)) + bo`` (Shazeer, arXiv
        2002.05202, equation 6, with biases).
    bg : float32[F], optional
    epsilon, rms
        As in a ``MultiHeadAttention``.
    """

    def __init__(self, wi, bi=None, wo=None, bo=None, activation="relu2", gamma=None, beta=None,
                 int8_activations=False, *, wg=None, bg=None, epsilon=LAYER_NORM_EPSILON,
                 rms=False):
        cdef FeedForwardView *view = &self.view
        if activation not in list(ACTIVATIONS):
            raise ValueError(f"activation is {activation!r}, expected one of "
                             f"{', '.join(ACTIVATIONS)}")
        fill_projection(&view.wi, wi, "wi")
        fill_projection(&view.wo, wo, "wo")
        check_shape(&view.wo, view.wi.cols, view.wi.rows, "wo")
        view.wi.bias = optional_vector(bi, view.wi.rows, "bi")
        view.wo.bias = optional_vector(bo, view.wo.rows, "bo")
        if wg is not None:
            fill_projection(&view.wg, wg, "wg")
            check_shape(&view.wg, view.wi.rows, view.wi.cols, "wg")
        elif bg is not None:
            raise ValueError("bg is an array without wg")
        view.wg.bias = optional_vector(bg, view.wi.rows, "bg")
        view.activation = ACTIVATIONS[activation]
        self.wi, self.bi, self.wo, self.bo = wi, bi, wo, bo
        self.wg, self.bg = wg, bg
        self.activation = activation
        self.norm = _inner_norm(gamma, beta, view.wi.rows, epsilon, rms)
        if self.norm is not None:
            view.norm = self.norm.view
        view.int8_activations = int8_activations

    def __reduce__(self):
        raise TypeError("a layer cannot be copied or pickled: use save_model and load_model")


cdef class TransformerBlock:
    """One pre-norm block, ``x + attention(norm1(x))`` and then ``x + ffn(norm2(x))``."""

    def __init__(self, MultiHeadAttention attention not None, FeedForward ffn not None,
                 LayerNorm norm1 not None, LayerNorm norm2 not None):
        cdef Py_ssize_t dim = attention.view.wq.cols
        check_shape(&ffn.view.wi, ffn.view.wi.rows, dim, "ffn.wi")
        for name, norm in (("norm1", norm1), ("norm2", norm2)):
            vector_pointer(norm.gamma, dim, f"{name}.gamma")
        if (attention.norm is None) != (ffn.norm is None):
            raise ValueError("one of attention and ffn has a norm before wo, expected both or "
                             "neither")
        self.attention, self.ffn = attention, ffn
        self.norm1, self.norm2 = norm1, norm2
        self.view.attention = attention.view
        self.view.ffn = ffn.view
        self.view.norm1 = norm1.view
        self.view.norm2 = norm2.view

    def __reduce__(self):
        raise TypeError("a layer cannot be copied or pickled: use save_model and load_model")


cdef void add_demands(Demand *demand, const AttentionView *attention,
                      const FeedForwardView *ffn) noexcept nogil:
    # Of a pass through one layer or two; NULL: not through this one.
    if attention:
        add_demand(demand, &attention.wq)
        add_demand(demand, &attention.wk)
        add_demand(demand, &attention.wv)
        add_demand(demand, &attention.wo)
    if ffn:
        add_demand(demand, &ffn.wg)
        add_demand(demand, &ffn.wi)
        add_demand(demand, &ffn.wo)


cdef int reserve_for(Workspace *workspace, const AttentionView *attention,
                     const FeedForwardView *ffn, Py_ssize_t rows) except -1:
    cdef Demand demand
    memset(&demand, 0, sizeof(demand))
    add_demands(&demand, attention, ffn)
    return reserve_or_raise(workspace, &demand, rows)


# ---------------------------------------------------------------------------------------------
# The model

def _layer(parameters, prefix):
    """Return the parameters whose name starts with ``prefix``, by the rest of their names."""
    return {name[len(prefix):]: value for name, value in parameters.items()
            if name.startswith(prefix)}


cdef int point_adapter(Projection *projection, str name, a, b, float scale,
                       unsigned int stream) except -1:
    # Points a map at its adapter.
    if (len(a) == 0 or a.shape != (len(a), projection.cols)
            or b.shape != (projection.rows, len(a))):
        raise ValueError(f"the adapter's {name} is {a.shape} and {b.shape}, expected "
                         f"(r, {projection.cols}) and ({projection.rows}, r)")
    projection.adapter.rank = len(a)
    projection.adapter.a, projection.adapter.b = float_pointer(a), float_pointer(b)
    projection.adapter.scale, projection.adapter.stream = scale, stream
    return 0


def check_adapted(parameters, adapter) -> None:
    """Raise ``ValueError`` for an adapter of a matrix that is not in the blocks."""
    for name in adapter:
        weights = parameters.get(name)
        if not name.startswith("blocks.") or len(getattr(weights, "shape", ())) != 2:
            raise ValueError(f"the adapter is for {name}, which is no matrix of the blocks")


cdef Projection *projection_of(MultiHeadAttention attention, FeedForward ffn, name) except NULL:
    # A matrix of a block by its name.
    if name == "attention.wq":
        return &attention.view.wq
    if name == "attention.wk":
        return &attention.view.wk
    if name == "attention.wv":
        return &attention.view.wv
    if name == "attention.wo":
        return &attention.view.wo
    if name == "ffn.wg":
        return &ffn.view.wg
    if name == "ffn.wi":
        return &ffn.view.wi
    if name == "ffn.wo":
        return &ffn.view.wo
    raise ValueError(f"there is no matrix {name} in a block")


cdef class LegacyLLM:
    """A decoder-only transformer with ternary weights (C: ``LegacyLLM``).

    Make one with ``create_legacy_llm`` or ``load_model``.

    Attributes
    ----------
    config : ModelConfig
    parameters : dict of str to TernaryMatrix or float32 array
        The weights by name; views, so that writing to an array changes the model.
    blocks : list of TransformerBlock
    final_norm : LayerNorm or None
    full_precision : bool
        Whether the forward pass uses the latent weights in place of the codes.
    adapter : AdapterConfig or None
        Of a model whose weights stay as they are while an adapter learns.
    learned : list of Parameter or None
        What learns, as one array has it: all weights, or those of an adapter; None: nothing.
    provenance : Provenance
        Where the weights come from; model files record it.
    """

    def __cinit__(self):
        memset(&self.view, 0, sizeof(self.view))

    def __init__(self, config, trainable=False, parameters=None, adapter=None):
        layout = parameter_layout(config)
        if parameters is not None:
            self._freeze(config, parameters, adapter)
            return
        quantized = [part for part in layout if part.kind == "quantized"]
        self.config = config
        self.provenance = Provenance()
        self.quantized_parts = _quantized_parts(config, quantized)
        self.quantized_size = sum(part.size for part in quantized)
        self.total_size = layout[-1].stop
        levels, inner = (), 0
        if quantized:
            levels, inner = SCHEMES[config.scheme].levels, SCHEMES[config.scheme].inner
        self.codes = np.full(self.quantized_size, inner, np.int8)
        self.scales = np.ones(layout[-1].scale_stop, np.float32)
        self.weights = np.zeros(self.total_size - (0 if trainable else self.quantized_size),
                                np.float32)
        # Weights of floats are their own latent weights.
        self.learned = layout if trainable or not quantized else None
        floats = self.weights[self.quantized_size:] if trainable else self.weights
        self.parameters = views(floats, layout[len(quantized):])
        for part in quantized:
            scales = self.scales[part.scale_start:part.scale_stop].reshape(part.scale_shape)
            self.parameters[part.name] = TernaryMatrix(
                self.codes[part.start:part.stop].reshape(part.shape), scales, part.group, levels)
        self._connect(self.parameters)

    def _freeze(self, config, parameters, adapter):
        """Take weights of any kind, which do not change, and an adapter."""
        self.config = config
        self.provenance = Provenance()
        self.parameters = dict(parameters)
        self.total_size = parameter_layout(config)[-1].stop
        if isinstance(adapter, AdapterConfig):
            # One that learns.
            self.adapter = adapter
            self.learned = adapter_layout(config, adapter)
            self.weights = np.zeros(self.learned[-1].stop, np.float32)
            latent = self.latent
            adapter = {name.removesuffix(".a"): (latent[name], latent[f"{name[:-2]}.b"])
                       for name in latent if name.endswith(".a")}
        self.pairs = adapter
        self._connect(self.parameters)

    def _connect(self, parameters):
        """Create the layers of these parameters, and the structs that point at them."""
        cdef ModelView *view = &self.view
        cdef TransformerBlock block
        config = self.config
        rotary = rotary_table(config)
        norms = {"epsilon": config.norm_epsilon, "rms": config.norm == "rms"}
        # Matrices that are not quantized get float inputs.
        int8_activations = config.int8_activations and isinstance(
            parameters["blocks.0.attention.wq"], WeightMatrix)
        view.num_blocks = config.num_blocks
        if view.blocks == NULL:
            view.blocks = <BlockView *>calloc(config.num_blocks, sizeof(BlockView))
        if view.blocks == NULL:
            raise MemoryError("no memory for the model's blocks")
        self.blocks = []
        for i in range(config.num_blocks):
            attention = MultiHeadAttention(
                **_layer(parameters, f"blocks.{i}.attention."), rotary=rotary,
                num_heads=config.num_heads, num_kv_heads=config.num_kv_heads,
                window=config.windows[i], int8_activations=int8_activations, **norms)
            ffn = FeedForward(
                **_layer(parameters, f"blocks.{i}.ffn."), activation=config.activation,
                int8_activations=int8_activations, **norms)
            if self.pairs:
                self._point_adapter(f"blocks.{i}.", attention, ffn)
            block = TransformerBlock(
                attention, ffn, LayerNorm(**_layer(parameters, f"blocks.{i}.norm1."), **norms),
                LayerNorm(**_layer(parameters, f"blocks.{i}.norm2."), **norms))
            self.blocks.append(block)
            view.blocks[i] = block.view
        if config.final_norm:
            self.final_norm = LayerNorm(**_layer(parameters, "final_norm."), **norms)
            view.final_norm = self.final_norm.view
        output = "embedding.weight" if config.tied_embeddings else "output.weight"
        fill_projection(&view.embedding, parameters["embedding.weight"], "embedding.weight")
        fill_projection(&view.output, parameters[output], output)
        view.output.bias = optional_vector(parameters.get("output.bias"), config.vocab_size,
                                           "output.bias")
        view.int8_activations = int8_activations and config.ternary_embedding
        self._point_demand()

    cdef int _point_adapter(self, str prefix, MultiHeadAttention attention,
                            FeedForward ffn) except -1:
        # Points the adapters of a block's matrices at this model's.
        scale = 1.0 if self.adapter is None else self.adapter.scale
        for number, (name, (a, b)) in enumerate(self.pairs.items()):
            if name.startswith(prefix):
                point_adapter(projection_of(attention, ffn, name.removeprefix(prefix)), name, a, b,
                              scale, number)
        return 0

    cdef int _point_demand(self) except -1:
        # What a pass needs: the most of any block.
        cdef ModelView *view = &self.view
        cdef Py_ssize_t i
        memset(&view.demand, 0, sizeof(Demand))
        add_demand(&view.demand, &view.embedding)
        add_demand(&view.demand, &view.output)
        for i in range(view.num_blocks):
            add_demands(&view.demand, &view.blocks[i].attention, &view.blocks[i].ffn)
        return 0

    def __dealloc__(self):
        free(self.view.blocks)

    cdef ModelView *alive(self) except NULL:
        if self.parameters is None:
            raise ValueError("the model was freed")
        return &self.view

    def __reduce__(self):
        raise TypeError("a model cannot be copied or pickled: use save_model and load_model")

    @property
    def trainable(self) -> bool:
        """Whether the model has latent weights, or an adapter, to learn with."""
        self.alive()
        return self.learned is not None

    @property
    def num_parameters(self) -> int:
        """The number of weights of all kinds."""
        return self.total_size

    @property
    def num_trainable(self) -> int:
        """The number of weights that learn."""
        return self.weights.size if self.trainable else 0

    @property
    def latent(self) -> dict:
        """The trainable arrays by name: float32 views, latent weights for quantized matrices.

        Raises ``ValueError`` if the model was created or loaded without latent weights.
        """
        if not self.trainable:
            raise ValueError("the model has no latent weights: it was made for inference")
        return views(self.weights, self.learned)

    def with_adapter(self, adapter) -> LegacyLLM:
        """Return the model with a low-rank adapter (LoRA), for inference; both share all weights.

        Parameters
        ----------
        adapter : dict of str to (float32[r, C], float32[R, r])
            A and B of matrices of the blocks, by their names: ``y = W x + B A x``. They are not
            copied.

        Raises
        ------
        ValueError
            If a matrix is not in the blocks, or a shape does not fit.
        """
        self.alive()
        check_adapted(self.parameters, adapter)
        model = LegacyLLM(self.config, False, self.parameters, dict(adapter))
        model.provenance = self.provenance
        return model

    def use_full_precision(self, wanted) -> None:
        """Let the forward pass use the latent weights instead of the codes, or the codes again.

        Either way codes and scales follow the latent weights, and files contain the codes.
        """
        self.alive()
        if bool(wanted) != self.full_precision or self.blends:
            self._connect(self.latent if wanted else self.parameters)
            self.full_precision, self.blends = wanted, False

    def use_blend(self, float share, threads=1) -> None:
        """Let the forward pass use ``w + share (q - w)`` of latent weights w and their values q.

        q are codes times scales. A share of 0 is full precision, and 1 the codes again. As in full
        precision, inputs of matrices are not rounded. Call it again when the weights have changed.

        Parameters
        ----------
        share : float
            0 to 1.
        threads : int
        """
        cdef QuantizeJob job
        cdef float[::1] blended
        cdef Py_ssize_t parts
        cdef int workers = _size("threads", threads)
        if not 0.0 <= share <= 1.0:
            raise ValueError(f"share is {share}, expected 0 to 1")
        latent = self.latent
        if share in (0.0, 1.0) or self.quantized_size == 0:
            self.use_full_precision(share == 0.0)
            self.blended = None
            return
        if self.blended is None:
            self.blended = np.empty(self.quantized_size, np.float32)
        blended = self.blended
        parts = fill_job(self, &job)
        job.blended, job.share = &blended[0], share
        with nogil:
            parallel_for(blend_task, &job, parts, workers)
        if not self.blends:
            layout = [part for part in parameter_layout(self.config) if part.kind == "quantized"]
            self._connect({**latent, **views(self.blended, layout)})
            self.full_precision, self.blends = False, True

    def quantize(self, threads=1) -> None:
        """Compute codes and scales from the latent weights, by the rule of ``schemes``.

        Scales are 1 if the settings say so. In the scheme ``sign`` latent weights are codes, and
        the scale is fixed: the mean |w| of the initial weights of other schemes.
        """
        cdef QuantizeJob job
        cdef Py_ssize_t parts
        cdef int workers = _size("threads", threads)
        if not self.trainable:
            raise ValueError("the model has no latent weights: it was made for inference")
        if self.quantized_size == 0:
            return
        scheme = SCHEMES[self.config.scheme]
        parts = fill_job(self, &job)
        job.scheme.median = scheme.median
        job.scheme.factor = scheme.factor
        job.scheme.threshold = scheme.threshold
        job.scheme.inner = scheme.inner
        job.scheme.outer = scheme.outer
        job.out_of_memory = False
        with nogil:
            parallel_for(quantize_task, &job, parts, workers)
        if job.out_of_memory:
            raise MemoryError("no memory to find the median of a matrix")

    def stored_bytes(self) -> int:
        """Return the size of the weights, or of the adapter, as files have them."""
        self.alive()
        if self.adapter is not None:
            return self.weights.nbytes
        return native.stored_bytes(self.config)

    def __repr__(self):
        if self.parameters is None:
            return "LegacyLLM(freed)"
        return (f"LegacyLLM({self.num_parameters:,} parameters, {self.config.num_blocks} blocks of "
                f"{self.config.model_dim})")


def _spread(config, name):
    """Return the standard deviation of a matrix's initial weights."""
    if config.scale == "one" and config.scheme != FLOAT:
        return 0.6
    return 0.02 / np.sqrt(2.0 * config.num_blocks) if name.endswith(".wo") else 0.02


cdef struct QuantizedPart:
    # A quantized matrix, or a shard of one: the offsets of its weights and scales, its shape, the
    # number of columns that share a scale, how often each scale is stored, and the scale if it is
    # fixed, else 0.
    Py_ssize_t start, scale, rows, cols, group, copies
    float fixed


_QUANTIZED_PART = np.dtype(
    [("start", np.intp), ("scale", np.intp), ("rows", np.intp), ("cols", np.intp),
     ("group", np.intp), ("copies", np.intp), ("fixed", np.float32)], align=True)


def _quantized_parts(config, layout):
    """Return the quantized matrices of a layout as ``_QUANTIZED_PART`` records."""
    records = []
    for part in layout:
        fixed = 1.0 if config.scale == "one" else 0.0
        if not SCHEMES[config.scheme].learns and not fixed:
            fixed = float(np.float16(_spread(config, part.name) * np.sqrt(2.0 / np.pi)))
        if part.scale_shape == (1, 1):
            records.append((part.start, part.scale_start, 1, part.size, part.size, 1, fixed))
        elif config.scale_shards > 1:
            rows, cols = part.shape
            bounds = [-(-rows * i // config.scale_shards) for i in range(config.scale_shards + 1)]
            for first, stop in zip(bounds, bounds[1:]):
                size = (stop - first) * cols
                if size:
                    records.append((part.start + first * cols, part.scale_start + first, 1, size,
                                    size, stop - first, fixed))
        else:
            records.append((part.start, part.scale_start, *part.shape, part.group, 1, fixed))
    return np.array(records, _QUANTIZED_PART)


cdef struct QuantizeJob:
    const float *weights
    signed char *codes
    float *scales
    const QuantizedPart *quantized_parts
    Scheme scheme
    float *blended              # of the weights, for `blend_task`
    float share
    bint out_of_memory


cdef Py_ssize_t fill_job(LegacyLLM model, QuantizeJob *job) except -1:
    # Points at weights, codes and scales, and returns the number of quantized parts.
    cdef float[::1] weights = model.weights, scales = model.scales
    cdef signed char[::1] codes = model.codes
    cdef const QuantizedPart[::1] quantized_parts = model.quantized_parts
    job.weights = &weights[0]
    job.codes = &codes[0]
    job.scales = &scales[0]
    job.quantized_parts = &quantized_parts[0]
    return quantized_parts.shape[0]


cdef void quantize_task(void *context, long index) noexcept nogil:
    cdef QuantizeJob *job = <QuantizeJob *>context
    cdef const QuantizedPart *part = &job.quantized_parts[index]
    cdef Py_ssize_t _row, first, count, i, start = part.start
    cdef float *scale = job.scales + part.scale
    cdef float *median_scratch = NULL
    if job.scheme.median:
        median_scratch = scratch(part.group)
        if median_scratch == NULL:
            job.out_of_memory = True
            return
    for _row in range(part.rows):
        for first from 0 <= first < part.cols by part.group:
            count = min(part.group, part.cols - first)
            scale[0] = kernels().quantize(job.weights + start, count, &job.scheme, part.fixed,
                                          job.codes + start, median_scratch)
            for i in range(1, part.copies):
                scale[i] = scale[0]
            scale += part.copies
            start += count


cdef void blend_task(void *context, long index) noexcept nogil:
    cdef QuantizeJob *job = <QuantizeJob *>context
    cdef const QuantizedPart *part = &job.quantized_parts[index]
    cdef Py_ssize_t _row, first, i, start = part.start
    cdef const float *scale = job.scales + part.scale
    cdef float weight
    for _row in range(part.rows):
        for first from 0 <= first < part.cols by part.group:
            for i in range(start, start + min(part.group, part.cols - first)):
                weight = job.weights[i]
                job.blended[i] = weight + job.share * (scale[0] * job.codes[i] - weight)
            scale += part.copies
            start += min(part.group, part.cols - first)


def create_legacy_llm(config, seed, trainable=True) -> LegacyLLM:
    """Return a model with random initial weights.

    Matrices are initialized from N(0, 0.02), those that write into the residual stream divided by
    sqrt(2 blocks) (Radford et al. 2019, section 2.3); with scale 1 from N(0, 0.6), so that three
    codes in five are 0; with the scheme ``sign`` from equally likely codes, as in C. Biases and
    beta start at 0, gamma at 1.

    Parameters
    ----------
    config : ModelConfig
    seed : int or numpy.random.Generator
        The same seed gives the same weights; C seeds from the clock (departure 14).
    trainable : bool
        Whether to keep the latent weights, which training needs.

    Raises
    ------
    MemoryError
        If there is no memory for the weights (departure 13).

    Notes
    -----
    C: ``model.c``, ``create_legacy_llm``, where gamma starts near 0 and ternary matrices have no
    scale (departure 10).
    """
    rng = np.random.default_rng(seed)
    model = LegacyLLM(config, trainable=True)
    latent = model.latent
    for part in parameter_layout(config):
        weights = latent[part.name]
        if part.kind == "quantized" and not SCHEMES[config.scheme].learns:
            weights[...] = rng.integers(-1, 2, part.shape)
        elif part.kind != "vector":
            values = rng.standard_normal(part.shape, np.float32)
            weights[...] = values * np.float32(_spread(config, part.name))
        elif part.name.endswith("gamma"):
            weights[...] = 1.0
    model.quantize()
    return model if trainable else _without_latent(model)


def create_adapted_llm(config, parameters, adapter, seed) -> LegacyLLM:
    """Return a model that learns by a low-rank adapter; its weights stay as they are.

    Parameters
    ----------
    config : ModelConfig
    parameters : dict of str to float32 array, TernaryMatrix, PackedMatrix or Int8Matrix
        The weights by name, such as those of a ``PackedModel``; they are not copied.
    adapter : AdapterConfig
        A begins uniform within 1 / sqrt(columns), B with zeros, so that the adapter adds nothing
        at first (arXiv 2106.09685, section 4.1).
    seed : int or numpy.random.Generator
    """
    rng = np.random.default_rng(seed)
    model = LegacyLLM(config, False, parameters, adapter)
    for name, values in model.latent.items():
        if name.endswith(".a"):
            bound = 1.0 / math.sqrt(values.shape[1])
            values[...] = rng.uniform(-bound, bound, values.shape)
    return model


def _without_latent(LegacyLLM model):
    """Return a copy of a model without latent weights."""
    cdef LegacyLLM copy = LegacyLLM(model.config)
    copy.provenance = model.provenance
    copy.codes[...] = model.codes
    copy.scales[...] = model.scales
    copy.weights[...] = model.weights[model.weights.size - copy.weights.size:]
    return copy


def free_legacy_llm(LegacyLLM model not None) -> None:
    """Release a model's weights; using it afterwards raises ``ValueError``.

    Python frees unreferenced objects, so this is rarely needed. C: ``free_legacy_llm``.
    """
    model.parameters = None
    model.blocks = None
    model.final_norm = None
    model.codes = model.scales = model.weights = model.blended = None


# ---------------------------------------------------------------------------------------------
# Gradients

cdef Py_ssize_t offset(const void *start, const void *field) noexcept nogil:
    return <const char *>field - <const char *>start


cdef BlockGradient _gradient

# The parameters of a block, and the offsets of their gradients in a BlockGradient.
cdef dict _GRADIENT_OFFSETS = {
    "attention.wq": offset(&_gradient, &_gradient.attention.wq),
    "attention.wk": offset(&_gradient, &_gradient.attention.wk),
    "attention.wv": offset(&_gradient, &_gradient.attention.wv),
    "attention.wo": offset(&_gradient, &_gradient.attention.wo),
    "attention.bq": offset(&_gradient, &_gradient.attention.bq),
    "attention.bk": offset(&_gradient, &_gradient.attention.bk),
    "attention.bv": offset(&_gradient, &_gradient.attention.bv),
    "attention.bo": offset(&_gradient, &_gradient.attention.bo),
    "attention.q_gamma": offset(&_gradient, &_gradient.attention.q_norm.gamma),
    "attention.k_gamma": offset(&_gradient, &_gradient.attention.k_norm.gamma),
    "attention.gamma": offset(&_gradient, &_gradient.attention.norm.gamma),
    "attention.beta": offset(&_gradient, &_gradient.attention.norm.beta),
    "ffn.wg": offset(&_gradient, &_gradient.ffn.wg),
    "ffn.bg": offset(&_gradient, &_gradient.ffn.bg),
    "ffn.wi": offset(&_gradient, &_gradient.ffn.wi),
    "ffn.bi": offset(&_gradient, &_gradient.ffn.bi),
    "ffn.wo": offset(&_gradient, &_gradient.ffn.wo),
    "ffn.bo": offset(&_gradient, &_gradient.ffn.bo),
    "ffn.gamma": offset(&_gradient, &_gradient.ffn.norm.gamma),
    "ffn.beta": offset(&_gradient, &_gradient.ffn.norm.beta),
    "norm1.gamma": offset(&_gradient, &_gradient.norm1.gamma),
    "norm1.beta": offset(&_gradient, &_gradient.norm1.beta),
    "norm2.gamma": offset(&_gradient, &_gradient.norm2.gamma),
    "norm2.beta": offset(&_gradient, &_gradient.norm2.beta),
}


cdef int point_gradients(BlockGradient *block, dict arrays) except -1:
    # Points the gradients of some of a block's parameters at arrays.
    cdef Py_ssize_t at
    for name, array in arrays.items():
        at = _GRADIENT_OFFSETS[name]
        (<float **>(<char *>block + at))[0] = float_pointer(array)
    return 0


cdef class LegacyLLMGradients:
    """The gradient of every parameter of a model (C: ``LegacyLLM_Gradients``).

    Attributes
    ----------
    flat : float32[N]
        All of them, in the order of ``parameter_layout``.
    parameters : dict of str to float32 array
        Views into ``flat``, by name; for quantized matrices the gradient of the effective weight,
        which is the straight-through gradient of the latent weight.
    """

    def __cinit__(self):
        memset(&self.view, 0, sizeof(self.view))

    def __init__(self, config, adapter=None):
        cdef ModelGradient *view = &self.view
        layout = parameter_layout(config) if adapter is None else adapter_layout(config, adapter)
        self.config, self.adapter = config, adapter
        self.flat = np.zeros(layout[-1].stop, np.float32)
        self.parameters = views(self.flat, layout)
        view.blocks = <BlockGradient *>calloc(config.num_blocks, sizeof(BlockGradient))
        if view.blocks == NULL:
            raise MemoryError("no memory for the model's gradients")
        if adapter is not None:
            self._point_adapter()
            return
        view.embedding = self._pointer("embedding.weight")
        view.output = view.embedding
        if not config.tied_embeddings:
            view.output = self._pointer("output.weight")
        if config.output_bias:
            view.output_bias = self._pointer("output.bias")
        if config.final_norm:
            view.final_norm.gamma = self._pointer("final_norm.gamma")
            if "norm_bias" in block_options(config):
                view.final_norm.beta = self._pointer("final_norm.beta")
        for i in range(config.num_blocks):
            point_gradients(&view.blocks[i], self.layer(f"blocks.{i}"))

    cdef float *_pointer(self, str name) except NULL:
        return float_pointer(self.parameters[name])

    def _point_adapter(self):
        """Point at the gradients of an adapter's A, which those of B follow."""
        config = self.config
        widest = max(config.model_dim, config.ffn_dim, config.query_dim)
        self.unused = np.zeros(widest, np.float32)
        self.view.final_norm.gamma = self.view.final_norm.beta = float_pointer(self.unused)
        norms = [name for name, _ in block_layout(config)
                 if name.endswith((".gamma", "_gamma", ".beta"))]
        for i in range(config.num_blocks):
            arrays = dict.fromkeys(norms, self.unused)
            arrays |= {name.removesuffix(".a"): array
                       for name, array in self.layer(f"blocks.{i}").items() if name.endswith(".a")}
            point_gradients(&self.view.blocks[i], arrays)

    def __dealloc__(self):
        free(self.view.blocks)

    cdef ModelGradient *alive(self) except NULL:
        if self.flat is None:
            raise ValueError("the gradients were freed")
        return &self.view

    @property
    def nbytes(self) -> int:
        """The bytes of all gradients."""
        self.alive()
        return self.flat.nbytes

    def layer(self, prefix) -> dict:
        """Return the gradients of one layer, such as ``"blocks.0.ffn"``, named as in the layer."""
        self.alive()
        return _layer(self.parameters, f"{prefix}.")

    def __reduce__(self):
        raise TypeError("gradients cannot be copied or pickled: copy their flat array")


def create_legacy_llm_gradients(config, adapter=None) -> LegacyLLMGradients:
    """Return gradients for a model of these settings, all 0. C: ``create_legacy_llm_gradients``.

    With an ``AdapterConfig`` they are those of such an adapter's A and B.
    """
    return LegacyLLMGradients(config, adapter)


def free_legacy_llm_gradients(LegacyLLMGradients gradients not None) -> None:
    """Release the gradients' memory; using them afterwards raises ``ValueError``.

    C: ``free_legacy_llm_gradients``.
    """
    gradients.flat = None
    gradients.parameters = None


def zero_legacy_llm_gradients(LegacyLLMGradients gradients not None) -> None:
    """Set every gradient to 0. C: ``zero_legacy_llm_gradients``."""
    gradients.alive()
    gradients.flat.fill(0.0)


def apply_ternary_weight_updates(LegacyLLM model not None, LegacyLLMGradients gradients not None,
                                 learning_rate, direction="descend") -> None:
    """Update a model by the C original's rule: signs for ternary matrices, SGD for the rest.

    Wherever its gradient is not 0, a ternary weight becomes minus the gradient's sign; float
    parameters change by ``-learning_rate * gradient``. This rule has no latent weights; the
    optimizers have a better one.

    Parameters
    ----------
    model : LegacyLLM
        Changed in place, except for its latent weights, if any.
    gradients : LegacyLLMGradients
    learning_rate : float
    direction : {"descend", "ascend"}
        "ascend" sets ternary weights to the gradient's own sign, as C does: that increases the
        loss (departure 1).

    Notes
    -----
    C: ``model.c``, ``apply_ternary_weight_updates``.
    """
    if direction not in ("descend", "ascend"):
        raise ValueError(f"direction is {direction!r}, expected descend or ascend")
    model.alive()
    gradients.alive()
    if gradients.config != model.config:
        raise ValueError("the gradients are those of a model with other settings")
    sign = 1 if direction == "ascend" else -1
    for name, gradient in gradients.parameters.items():
        weights = model.parameters[name]
        native.check_finite(f"the gradient of {name}", gradient)
        if isinstance(weights, TernaryMatrix):
            moved = gradient != 0.0
            weights.values[moved] = sign * np.sign(gradient[moved]).astype(np.int8)
        else:
            weights -= np.float32(learning_rate) * gradient


# ---------------------------------------------------------------------------------------------
# The activations of a block's forward pass

cdef dict allocate(void *view, list fields, dict axes):
    # float32 arrays by name, for fields (name, axes, offset) of a struct, which points at them.
    cdef Py_ssize_t at
    arrays = {}
    for name, letters, at in fields:
        arrays[name] = np.empty([axes[axis] for axis in letters], np.float32)
        (<float **>(<char *>view + at))[0] = float_pointer(arrays[name])
    return arrays


cdef object allocated_bytes(list fields, dict axes):
    # The bytes that these fields would take.
    return 4 * sum(math.prod(axes[axis] for axis in letters) for _, letters, _ in fields)


cdef BlockContext _context

# The activations of a block: name, axes, the option that it belongs to (as in layout.py), and the
# offset of the pointer in a BlockContext.
cdef list _ACTIVATIONS = [
    ("input", "BTC", "", offset(&_context, &_context.input)),
    ("output", "BTC", "", offset(&_context, &_context.output)),
    ("norm1", "BTC", "", offset(&_context, &_context.norm1)),
    ("mean1", "BT", "", offset(&_context, &_context.mean1)),
    ("inv_std1", "BT", "", offset(&_context, &_context.inv_std1)),
    ("q", "BTQ", "", offset(&_context, &_context.q)),
    ("k", "BTK", "", offset(&_context, &_context.k)),
    ("v", "BTK", "", offset(&_context, &_context.v)),
    ("q_linear", "BTQ", "qk_norm", offset(&_context, &_context.q_linear)),
    ("k_linear", "BTK", "qk_norm", offset(&_context, &_context.k_linear)),
    ("q_inv_std", "BTH", "qk_norm", offset(&_context, &_context.q_inv_std)),
    ("k_inv_std", "BTG", "qk_norm", offset(&_context, &_context.k_inv_std)),
    ("probs", "BHTT", "", offset(&_context, &_context.probs)),
    ("heads", "BTQ", "", offset(&_context, &_context.heads)),
    ("residual", "BTC", "", offset(&_context, &_context.residual)),
    ("norm2", "BTC", "", offset(&_context, &_context.norm2)),
    ("mean2", "BT", "", offset(&_context, &_context.mean2)),
    ("inv_std2", "BT", "", offset(&_context, &_context.inv_std2)),
    ("gate", "BTF", "gated", offset(&_context, &_context.ffn.gate)),
    ("hidden", "BTF", "", offset(&_context, &_context.ffn.hidden)),
    ("activated", "BTF", "", offset(&_context, &_context.ffn.activated)),
    ("heads_normed", "BTQ", "sub_norm", offset(&_context, &_context.heads_normed)),
    ("heads_mean", "BT", "sub_norm", offset(&_context, &_context.heads_mean)),
    ("heads_inv_std", "BT", "sub_norm", offset(&_context, &_context.heads_inv_std)),
    ("activated_normed", "BTF", "sub_norm", offset(&_context, &_context.ffn.normed)),
    ("activated_mean", "BT", "sub_norm", offset(&_context, &_context.ffn.mean)),
    ("activated_inv_std", "BT", "sub_norm", offset(&_context, &_context.ffn.inv_std)),
]
cdef set _ACTIVATION_NAMES = {name for name, _, _, _ in _ACTIVATIONS}


cdef list chosen_fields(list table, options):
    # The fields of such a table with these options, as `allocate` takes them.
    return [(name, axes, at) for name, axes, option, at in table
            if not option or option in options]


cdef list block_fields(options):
    # The activations of a block with these options.
    return chosen_fields(_ACTIVATIONS, options)


cdef class TransformerBlockContext:
    """The activations of one block that its backward pass needs (C: ``TransformerBlockContext``).

    The C original keeps the block's input and the statistics of its norms, and recomputes the
    rest; here all activations are stored. Attributes are float32 arrays, None where the block has
    no such activation. H are the heads of queries, G those of keys and values, D is their width.

    Attributes
    ----------
    input, output : [B, T, C]
    norm1, norm2 : [B, T, C]
        The normalized inputs of attention and feed-forward layer.
    mean1, inv_std1, mean2, inv_std2 : [B, T]
        RMS norms leave the means as they are.
    q : [B, T, H D]
    k, v : [B, T, G D]
        Queries and keys after their rotation.
    q_linear, k_linear, q_inv_std, k_inv_std : [B, T, H D], [B, T, G D], [B, T, H], [B, T, G]
        Queries and keys before their norm.
    probs : [B, H, T, T]
    heads : [B, T, H D]
        The heads' outputs, concatenated.
    heads_normed, heads_mean, heads_inv_std : [B, T, H D], [B, T], [B, T]
        After the norm before ``wo``.
    residual : [B, T, C]
        The input plus the attention's output.
    gate : [B, T, F]
        The gate before its activation.
    hidden, activated : [B, T, F]
        The feed-forward network's hidden layer before and after its activation or gate.
    activated_normed, activated_mean, activated_inv_std : [B, T, F], [B, T], [B, T]
        After the norm before ``wo``.
    """

    def __init__(self, model_dim, ffn_dim, num_heads, batch_size, time, sub_norm=False, *,
                 num_kv_heads=None, head_dim=None, gated=False, qk_norm=False):
        cdef BlockContext *view = &self.view
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        for name, value in (("model_dim", model_dim), ("ffn_dim", ffn_dim),
                            ("num_heads", num_heads), ("batch_size", batch_size),
                            ("time", time), ("num_kv_heads", num_kv_heads)):
            _size(name, value)
        head_dim = _size("head_dim", max(model_dim // num_heads, 1) if head_dim is None
                         else head_dim)
        self.options = {name for name, chosen in (("sub_norm", sub_norm), ("gated", gated),
                                                  ("qk_norm", qk_norm)) if chosen}
        self.axes = {"B": batch_size, "T": time, "C": model_dim, "F": ffn_dim, "H": num_heads,
                     "G": num_kv_heads, "D": head_dim, "Q": num_heads * head_dim,
                     "K": num_kv_heads * head_dim}
        self.arrays = allocate(view, block_fields(self.options), self.axes)
        if not sub_norm:
            view.heads_normed, view.ffn.normed = view.heads, view.ffn.activated
        if not qk_norm:
            view.q_linear, view.k_linear = view.q, view.k

    def __getattr__(self, name):
        if name in _ACTIVATION_NAMES:
            return self.arrays.get(name)
        raise AttributeError(f"a TransformerBlockContext has no attribute {name!r}")

    @property
    def nbytes(self) -> int:
        """The bytes of all arrays."""
        return sum(array.nbytes for array in self.arrays.values())

    def __reduce__(self):
        raise TypeError("a TransformerBlockContext cannot be copied or pickled: make another one")


cdef TransformerBlockContext context_of(config, batch_size, time):
    # For a block of a model of these settings.
    return TransformerBlockContext(
        config.model_dim, config.ffn_dim, config.num_heads, batch_size, time, config.sub_norm,
        num_kv_heads=config.num_kv_heads, head_dim=config.head_dim, gated=config.gated,
        qk_norm=config.qk_norm)


cdef TransformerBlockContext context_for(MultiHeadAttention attention, FeedForward ffn, batch,
                                         time):
    # For a block of these layers; ffn is None for attention alone.
    return TransformerBlockContext(
        attention.view.wq.cols, 1 if ffn is None else ffn.view.wi.rows, attention.num_heads, batch,
        time, attention.norm is not None, num_kv_heads=attention.num_kv_heads,
        head_dim=attention.head_dim, gated=ffn is not None and ffn.wg is not None,
        qk_norm=attention.q_norm is not None)


cdef int check_context(TransformerBlockContext context, MultiHeadAttention attention,
                       FeedForward ffn, batch, time) except -1:
    # Checks that a context fits these layers; ffn is None for attention alone.
    for option in sorted(context.options ^ _options_of(attention, ffn)):
        if option != "gated" or ffn is not None:
            made = "with" if option in context.options else "without"
            raise ValueError(f"the context was made {made} {option}, unlike the layer")
    letters = "BTCHGD" if ffn is None else "BTCHGDF"
    expected = {"B": batch, "T": time, "C": attention.view.wq.cols, "H": attention.num_heads,
                "G": attention.num_kv_heads, "D": attention.head_dim,
                "F": None if ffn is None else ffn.view.wi.rows}
    if any(context.axes[letter] != expected[letter] for letter in letters):
        raise ValueError(f"the context is for ({', '.join(letters)}) = "
                         f"{tuple(context.axes[letter] for letter in letters)}, expected "
                         f"{tuple(expected[letter] for letter in letters)}")
    return 0


cdef set _options_of(MultiHeadAttention attention, FeedForward ffn):
    return {name for name, chosen in (
        ("sub_norm", attention.norm is not None), ("qk_norm", attention.q_norm is not None),
        ("gated", ffn is not None and ffn.wg is not None)) if chosen}


def create_transformer_block_context(model_dim, ffn_dim, num_heads, batch_size, time,
                                     sub_norm=False, **options):
    """Return buffers for one block's activations. C: ``create_transformer_block_context``.

    Parameters are those of ``TransformerBlockContext``.
    """
    return TransformerBlockContext(model_dim, ffn_dim, num_heads, batch_size, time,
                                   sub_norm=sub_norm, **options)


def free_transformer_block_context(TransformerBlockContext context not None) -> None:
    """Do nothing: Python frees a context with the last reference to it.

    C: ``free_transformer_block_context``.
    """


# ---------------------------------------------------------------------------------------------
# Files

def save_model(LegacyLLM model not None, path, format="legacy1bit") -> None:
    """Save a model atomically.

    Parameters
    ----------
    model : LegacyLLM
    path : path-like
        A folder, created if necessary, for ``model.safetensors`` and ``config.json``; or with
        ``format="c-v1"`` the single file of the C original, which cannot store provenance.
    format : {"legacy1bit", "c-v1"}

    Raises
    ------
    ValueError
        If the format is unknown, a weight is not finite, or the C original has no such model.
    OSError
        If a file cannot be written; existing files are untouched (departure 12).

    Notes
    -----
    C: ``model.c``, ``save_model``.
    """
    if format == "c-v1":
        atomic_write(path, serialize_c_v1(model))
    elif format == "legacy1bit":
        model.alive()
        native.write_folder(Path(path), model.config, model.provenance, model.parameters)
    else:
        raise ValueError(f"format is {format!r}, expected legacy1bit or c-v1")


def serialize_c_v1(LegacyLLM model not None) -> bytes:
    """Return the content of a C original's file; errors are those of ``save_model``."""
    model.alive()
    return native.serialize_c_v1(model.config, model.parameters)


def load_model(path, floats=False) -> LegacyLLM:
    """Load a model: a folder that ``save_model`` wrote, or one of those that others have published.

    Parameters
    ----------
    path : path-like
        A folder, of this program or of Hugging Face; a GGUF file; or a file of the C original. Of
        a run, its best model is read. See ``published.read_model``.
    floats : bool
        Whether a published model may have floats in place of ternary matrices.

    Returns
    -------
    LegacyLLM
        Ready for the forward pass, without latent weights.

    Raises
    ------
    ModelFileError
        If the files are not a complete, valid model, or one that would not be computed right. Every
        size is checked before it is used (departure 11).
    OSError
        If it cannot be read.

    Notes
    -----
    C: ``model.c``, ``load_model``. A C file does not store the number of heads, which does not
    matter because its tokens see only themselves.
    """
    config, provenance, stored = published.read_model(Path(path), floats)
    model = LegacyLLM(config)
    model.provenance = provenance
    for part in stored:
        weights = model.parameters[part.name]
        if part.write is None:
            weights[...] = part.array()
        else:
            part.write(Values(weights.values, SCHEMES[config.scheme].levels))
            weights.scales[...] = part.scales
    return model
