"""Weights packed for decoding, two bits each or five trits to a byte.

A packed matrix is stored for the kernels, in the tiles that ``include/simd.h`` describes: 32 rows
by 16 columns in 128 bytes, or 32 by 20 in base 3. So a product reads its weights once,
sequentially, and every instruction set uses the same layout. The other factor are activations
quantized to int8, with one scale per token (BitNet b1.58, arXiv 2402.17764, section 2), and sums
are integers.
"""

import math
from operator import index
from pathlib import Path
from types import MappingProxyType

import numpy as np

from libc.stdlib cimport calloc, free
from libc.string cimport memset

from legacy1bit.kernels cimport (
    ACTIVATION_COLUMNS, ACTIVATION_ROWS, CODES_PER_BYTE, STRIP_ROWS, TILE_BYTES, TILE_CODES,
    TILE_ROW_BYTES, TILE_TRITS, TRITS_PER_BYTE, Int8Rows,
)
from legacy1bit.math_ops cimport kernels, pack_buffer, packed_kernels
from legacy1bit.model cimport (
    LegacyLLM, WeightMatrix, fill_projection, fill_rotary_view, optional_vector,
    point_adapter, vector_pointer,
)
from legacy1bit.projection cimport Projection, add_demand

from legacy1bit.formats.native import StoredParameter, stored_codes
from legacy1bit.formats.published import read_model
from legacy1bit.layout import parameter_layout
from legacy1bit.model import (
    ACTIVATIONS as _ACTIVATIONS, TernaryMatrix as _TernaryMatrix, check_adapted, rotary_table,
)
from legacy1bit.packing import Tiles
from legacy1bit.schemes import SCHEMES
from legacy1bit.threads import default_threads

FORMS = ("2bit", "trits")
HEADS = ("float", "int8")

_LARGE = 1 << 25    # weights of a float matrix, from which on it is stored in int8


cdef Py_ssize_t _ceil_div(Py_ssize_t size, Py_ssize_t divisor) noexcept nogil:
    return (size + divisor - 1) // divisor


def _aligned(size):
    """Return zeros, uint8[size], aligned to two cache lines."""
    buffer = np.zeros(size + TILE_BYTES, np.uint8)
    start = -buffer.ctypes.data % TILE_BYTES
    return buffer[start:start + size]


def packed_size(shape, form="2bit") -> int:
    """Return the number of bytes of a packed matrix of this shape, without its scales."""
    width = TILE_TRITS if form == "trits" else TILE_CODES
    strips = (shape[0] + STRIP_ROWS - 1) // STRIP_ROWS
    return strips * ((shape[1] + width - 1) // width) * TILE_BYTES


cdef class PackedMatrix(WeightMatrix):
    """A matrix of few-valued codes times scales, packed for products with int8 activations.

    Parameters
    ----------
    values : int8[R, C] or TernaryMatrix
        The codes; a ``TernaryMatrix`` has its own scales.
    scale : float32[1, 1] or float32[R, G], optional
        As in a ``TernaryMatrix``; 1 when not given.
    group : int
        The number of consecutive columns that share a scale, a multiple of 16; 0 means the row.
    levels : tuple of int
        The possible codes, evenly spaced and increasing, at most four; three for ``"trits"``.
    form : {"2bit", "trits"}
        Two bits per weight, or five weights per byte.
    buffer : uint8[N], optional
        Receives the tiles, 64-byte aligned; allocated by default.

    Attributes
    ----------
    tiles : uint8[R / 32, C / 16, 128] or uint8[R / 32, C / 20, 128]
        Both quotients rounded up.

    Raises
    ------
    ValueError
        If a code is not one of the levels, or shapes do not fit, or trits have several scales per
        row.
    """

    def __init__(self, values, scale=None, group=0, levels=(-1, 0, 1), form="2bit", buffer=None):
        if form not in FORMS:
            raise ValueError(f"form is {form!r}, expected {' or '.join(FORMS)}")
        if not isinstance(values, _TernaryMatrix):
            # Checks codes and scales.
            values = _TernaryMatrix(values, 1.0 if scale is None else scale, group, levels)
        self._describe(values.shape, values.scales, values.group, levels, form)
        codes = stored_codes("", "int8", values.values.view(np.uint8), self.shape, self.scales,
                             self.group)
        self._pack(codes.write, buffer, 1)

    def _describe(self, shape, scales, group, levels, form):
        """Check and set everything but the codes."""
        steps = set(np.diff(levels))
        if not 2 <= len(levels) <= 4 or len(steps) != 1 or min(steps) < 1:
            raise ValueError(f"levels is {levels}, expected two to four that rise evenly")
        # Sums and their terms must fit 32 bits.
        reach = max(abs(levels[0]), abs(levels[-1]), levels[-1] - levels[0])
        if 127 * int(reach) * shape[1] >= 1 << 31:
            raise ValueError(f"{shape[1]} columns of levels {levels} are too many for sums of 32 "
                             "bits")
        self.trits = form == "trits"
        self.shape, self.scales, self.group = shape, scales, group
        self.levels = tuple(int(level) for level in levels)
        if self.trits and (len(levels) > 3 or self.scales.shape[1] > 1):
            raise ValueError("trits are three levels at most and one scale per row at most, not "
                             f"{len(levels)} and {self.scales.shape[1]}")

    cdef int _pack(self, write, buffer, threads) except -1:
        """Make the tiles of codes that are written into ``packing.Tiles``."""
        self.tiles = _tiles_in(self.shape, self.trits, buffer)
        write(Tiles(self.tiles, self.shape, self.levels, self.trits, threads))
        return self._point()

    cdef int _point(self) except -1:
        """Point the struct for the kernels at the arrays."""
        cdef const unsigned char[:, :, ::1] tiles = self.tiles
        cdef const float[:, ::1] scales = self.scales
        self.view.rows, self.view.cols = self.shape
        self.view.tiles = &tiles[0, 0, 0]
        self.view.trits = self.trits
        self.view.factor = self.levels[1] - self.levels[0]
        self.view.offset = self.levels[0]
        self.view.scale = &scales[0, 0]
        self.view.scale_row = 0 if self.scales.shape == (1, 1) else scales.shape[1]
        self.view.group = self.group
        return 0

    cdef int fill(self, Projection *view) except -1:
        view.rows, view.cols = self.shape
        view.packed = self.view
        return 0

    @property
    def values(self):
        """The codes, int8[R, C], unpacked."""
        indices = _unpack(self.tiles, self.trits)[:self.shape[0], :self.shape[1]]
        return np.array(self.levels, np.int8)[indices]

    @property
    def nbytes(self) -> int:
        """The bytes of the packed codes."""
        return self.tiles.nbytes

    def multiply(self, x, bias=None):
        """Return ``x @ matrix.T + bias``, with each row of ``x`` quantized to int8.

        Parameters
        ----------
        x : float32[B, C]
        bias : float32[R], optional

        Returns
        -------
        float32[B, R]
            Integer sums of codes times int8 activations, times scales: the same bits in every
            instruction set. A row that is not finite gives NaN.

        Raises
        ------
        ValueError
            If a shape or dtype does not fit.
        """
        cdef Int8Matrix quantized = _quantized_rows(x, self.view.cols)
        cdef float[:, ::1] out
        cdef const float *bias_pointer = NULL
        cdef float *workspace
        if bias is not None:
            bias_pointer = vector_pointer(bias, self.view.rows, "bias")
        result = np.empty((len(x), self.view.rows), np.float32)
        out = result
        workspace = pack_buffer()
        with nogil:
            packed_kernels().packed_product(&self.view, 0, _ceil_div(self.view.rows, STRIP_ROWS),
                                            &quantized.view, out.shape[0], bias_pointer, False,
                                            &out[0, 0], self.view.rows, workspace)
        return result

    def __reduce__(self):
        raise TypeError("a PackedMatrix cannot be copied or pickled: pack its values and scales")

    def __repr__(self):
        return (f"PackedMatrix({self.shape[0]} x {self.shape[1]}, "
                f"{'trits' if self.trits else '2 bits'})")


cdef class Int8Matrix(WeightMatrix):
    """Rows of int8 codes, each with its scale: activations, or a float matrix in a quarter of its
    bytes.

    Parameters
    ----------
    rows, cols : int
        The maximum sizes.

    Attributes
    ----------
    shape : (int, int)
    codes : uint8[N]
        The int8 codes as bytes, with padding.
    scales : float32[rows]
        Those of the rows: the largest magnitude of each is 127 times its scale.
    """

    def __init__(self, Py_ssize_t rows, Py_ssize_t cols):
        cdef unsigned char[::1] codes
        cdef float[::1] scales
        cdef int[::1] sums
        self.shape = rows, cols
        # Kernels read whole tiles, and blocks of rows and of columns.
        blocks = _ceil_div(rows, ACTIVATION_ROWS)
        self.view.stride = _ceil_div(cols + TILE_TRITS - 1, ACTIVATION_COLUMNS) * ACTIVATION_COLUMNS
        self.codes = _aligned((blocks * ACTIVATION_ROWS + 1) * self.view.stride)
        self.scales = np.empty(rows, np.float32)
        self.sums = np.empty(rows, np.int32)
        codes, scales, sums = self.codes, self.scales, self.sums
        self.view.codes = <signed char *>&codes[0]
        self.view.scales = &scales[0]
        self.view.sums = &sums[0]

    def quantize(self, first, values):
        """Set rows from ``first`` on.

        Parameters
        ----------
        first : int
        values : float32[R, C]
            The scale of a row that is not finite is NaN.

        Raises
        ------
        ValueError
            If the shape or the dtype does not fit.
        """
        cdef const float[:, ::1] rows = values
        cdef Int8Rows to = self.view
        if rows is None:
            raise ValueError("values is None")
        if not 0 <= first < first + rows.shape[0] <= self.shape[0]:
            raise ValueError(f"values has {rows.shape[0]} rows from {first} on, expected some of "
                             f"{self.shape[0]}")
        if rows.shape[1] != self.shape[1]:
            raise ValueError(f"values has {rows.shape[1]} columns, expected {self.shape[1]}")
        to.codes += <Py_ssize_t>first * to.stride
        to.scales += <Py_ssize_t>first
        to.sums += <Py_ssize_t>first
        with nogil:
            kernels().quantize_rows(&rows[0, 0], rows.shape[0], rows.shape[1], &to)

    cdef int fill(self, Projection *view) except -1:
        view.rows, view.cols = self.shape
        view.int8 = self.view
        return 0

    @property
    def values(self):
        """Codes times scales, float32[R, C]."""
        stored = self.codes.view(np.int8)[:self.shape[0] * self.view.stride]
        codes = stored.reshape(self.shape[0], -1)[:, :self.shape[1]]
        return codes * self.scales[:, None]

    def multiply(self, x, bias=None):
        """Return ``x @ matrix.T + bias``, with each row of ``x`` quantized to int8.

        Parameters, result and errors are those of ``PackedMatrix.multiply``.
        """
        cdef Int8Matrix quantized = _quantized_rows(x, self.shape[1])
        cdef const float *bias_pointer = NULL
        cdef float[:, ::1] out
        cdef Py_ssize_t rows, cols
        rows, cols = self.shape
        if bias is not None:
            bias_pointer = vector_pointer(bias, rows, "bias")
        result = np.empty((len(x), rows), np.float32)
        out = result
        with nogil:
            kernels().int8_rows_product(&self.view, 0, rows, cols, &quantized.view, out.shape[0],
                                        bias_pointer, &out[0, 0], rows)
        return result

    def __reduce__(self):
        raise TypeError("Int8Matrix cannot be copied or pickled: make others")

    @property
    def nbytes(self) -> int:
        """The bytes of codes, scales and sums."""
        return self.codes.nbytes + self.scales.nbytes + self.sums.nbytes


def _quantized_rows(x, cols):
    """Return activations, float32[B, C], in int8."""
    cdef const float[:, ::1] rows = x
    if rows is None:
        raise ValueError(f"x is None, expected (B, {cols})")
    if rows.shape[0] == 0 or rows.shape[1] != cols:
        raise ValueError(f"x has shape ({rows.shape[0]}, {rows.shape[1]}), expected (B, {cols})")
    quantized = Int8Matrix(rows.shape[0], cols)
    quantized.quantize(0, x)
    return quantized


def _tiles_in(shape, trits, buffer):
    """Return room for tiles, in a buffer if there is one."""
    size = packed_size(shape, FORMS[trits])
    buffer = _aligned(size) if buffer is None else buffer
    return buffer.reshape(_ceil_div(shape[0], STRIP_ROWS), -1, TILE_BYTES)


def _unpack(tiles, trits):
    """Return the level indices of tiles, uint8[R, C] with the padding."""
    strips, count, _ = tiles.shape
    rest = tiles.reshape(strips, count, STRIP_ROWS, TILE_ROW_BYTES).astype(np.uint16)
    parts = []
    for _ in range(TRITS_PER_BYTE if trits else CODES_PER_BYTE):
        rest = 3 * (rest & 255) if trits else rest
        parts.append(rest >> 8 if trits else rest & 3)
        rest = rest if trits else rest >> 2
    indices = np.stack(parts, axis=3).astype(np.uint8)
    return indices.transpose(0, 2, 1, 3, 4).reshape(STRIP_ROWS * strips, -1)


cdef PackedMatrix _matrix_of(part, scheme, form, buffer, threads):
    """Return a matrix from a ``StoredParameter``."""
    cdef PackedMatrix matrix = PackedMatrix.__new__(PackedMatrix)
    matrix._describe(part.shape, part.scales, part.group, scheme.levels, form)
    matrix._pack(part.write, buffer, threads)
    return matrix


# ---------------------------------------------------------------------------------------------
# Whole models

def round_to_bfloat16(values):
    """Return float32 numbers rounded to the nearest bfloat16, ties to even.

    The largest are rounded toward zero, so that none becomes infinite.
    """
    bits = values.view(np.uint32)
    rounded = (bits + (0x7FFF + (bits >> 16 & 1))) & np.uint32(0xFFFF0000)
    beyond = (rounded & 0x7FFFFFFF) == 0x7F800000
    return np.where(beyond, bits & np.uint32(0xFFFF0000), rounded).view(np.float32)


def _float_matrix(part, head, threads):
    """Return a float matrix of a ``StoredParameter`` as it is stored for decoding."""
    if head is None:
        head = "int8" if part.shape[0] * part.shape[1] >= _LARGE else "float"
    if head == "int8":
        matrix = Int8Matrix(*part.shape)

        def store(strip, rows):
            matrix.quantize(strip.start, rows)
    else:
        matrix = np.empty(part.shape, np.float32)

        def store(strip, rows):
            matrix[strip] = round_to_bfloat16(rows)
    part.each(store, threads)
    return matrix


def _parameters_of(model):
    """Yield the parameters of a LegacyLLM as a file's; scales are copied."""
    for name, weights in model.parameters.items():
        if isinstance(weights, _TernaryMatrix):
            yield stored_codes(name, "int8", weights.values.view(np.uint8), weights.shape,
                               weights.scales.copy(), weights.group)
        else:
            yield StoredParameter(name, weights.shape, weights)


def packed_bytes(config) -> int:
    """Return the bytes of the weights of a model of these settings, packed by default."""
    total = 0
    for part in parameter_layout(config):
        size = part.size
        if part.kind == "quantized":
            total += packed_size(part.shape) + 4 * math.prod(part.scale_shape)
        else:
            total += size if size >= _LARGE else 4 * size
    return total


cdef class PackedModel:
    """The weights of a model for decoding: packed codes, no latent weights.

    Float matrices, embedding and output matrix, are rounded to bfloat16, as in exports, or to int8;
    vectors stay float32.

    Parameters
    ----------
    model : LegacyLLM
        Its codes are used, even while it is trained in full precision. They are copied, so that
        the model can be freed; weights that are packed are shared. An adapter is copied.
    form : {"2bit", "trits"}
        How codes are packed. Two bits are faster if the model fits the cache, trits are smaller.
        Trits cannot store schemes of four levels or with several scales per row.
    head : {"float", "int8"}, optional
        How float matrices are stored. In int8 each row has its scale, and products are whole
        numbers, a quarter of the bytes. By default int8 for matrices from 32 million weights on.

    Attributes
    ----------
    config : ModelConfig
    parameters : dict of str to PackedMatrix, Int8Matrix or float32 array
        By the names of ``LegacyLLM.parameters``.

    Raises
    ------
    ValueError
        If the form cannot store the model's codes.
    """

    def __cinit__(self):
        memset(&self.view, 0, sizeof(self.view))

    def __init__(self, LegacyLLM model not None, form="2bit", head=None):
        model.alive()
        adapter = {}
        if model.pairs:
            scale = 1.0 if model.adapter is None else model.adapter.scale
            adapter = {name: (a.copy(), np.float32(scale) * b)
                       for name, (a, b) in model.pairs.items()}
        packed = (PackedMatrix, Int8Matrix)
        if any(isinstance(value, packed) for value in model.parameters.values()):
            self._share(model.config, model.parameters, adapter)
            return
        self._fill(model.config, _parameters_of(model), form, head, 1, adapter)

    def _fill(self, config, stored, form, head, threads, adapter=MappingProxyType({})):
        """Pack parameters."""
        if form not in FORMS:
            raise ValueError(f"form is {form!r}, expected {' or '.join(FORMS)}")
        if head not in (None, *HEADS):
            raise ValueError(f"head is {head!r}, expected {' or '.join(HEADS)}")
        scheme = SCHEMES.get(config.scheme)
        sizes = {part.name: packed_size(part.shape, form) for part in parameter_layout(config)
                 if part.kind == "quantized"}
        # One contiguous buffer, read in order: large enough for huge pages.
        buffer = _aligned(sum(sizes.values()))
        parameters = {}
        for part in stored:
            size = sizes.get(part.name, 0)
            if size:
                packed = _matrix_of(part, scheme, form, buffer[:size], threads)
            elif len(part.shape) == 2:
                packed = _float_matrix(part, head, threads)
            else:
                packed = part.array().copy()
            parameters[part.name] = packed
            buffer = buffer[size:]
        self._share(config, parameters, adapter)

    def _share(self, config, parameters, adapter):
        """Take packed parameters, which another model may have, too, and an adapter."""
        self.config, self.parameters = config, MappingProxyType(dict(parameters))
        self.adapter = MappingProxyType(dict(adapter))
        self._connect()

    cdef int _connect(self) except -1:
        """Point the structs for the kernels at the parameters and the adapter."""
        cdef PackedBlock *block
        config = self.config
        self._projection("embedding.weight", None, &self.view.embedding)
        self._projection("embedding.weight" if config.tied_embeddings else "output.weight",
                         "output.bias", &self.view.output)
        self._norm("final_norm.gamma", "final_norm.beta", &self.view.final_norm)
        self.view.num_blocks = config.num_blocks
        self.view.num_heads = config.num_heads
        self.view.num_kv_heads = config.num_kv_heads
        self.view.head_dim = config.head_dim
        self.view.activation = _ACTIVATIONS[config.activation]
        self.rotary = rotary_table(config)
        fill_rotary_view(&self.view.rotary, self.rotary, config.head_dim)
        self.view.blocks = <PackedBlock *>calloc(config.num_blocks, sizeof(PackedBlock))
        if self.view.blocks == NULL:
            raise MemoryError("no memory for the model")
        for i in range(config.num_blocks):
            block = &self.view.blocks[i]
            at = f"blocks.{i}"
            block.window = config.windows[i]
            self._projection(f"{at}.attention.wq", f"{at}.attention.bq", &block.wq)
            self._projection(f"{at}.attention.wk", f"{at}.attention.bk", &block.wk)
            self._projection(f"{at}.attention.wv", f"{at}.attention.bv", &block.wv)
            self._projection(f"{at}.attention.wo", f"{at}.attention.bo", &block.wo)
            if config.gated:
                self._projection(f"{at}.ffn.wg", f"{at}.ffn.bg", &block.wg)
            self._projection(f"{at}.ffn.wi", f"{at}.ffn.bi", &block.wi)
            self._projection(f"{at}.ffn.wo", f"{at}.ffn.bo", &block.wo_ffn)
            self._norm(f"{at}.norm1.gamma", f"{at}.norm1.beta", &block.norm1)
            self._norm(f"{at}.norm2.gamma", f"{at}.norm2.beta", &block.norm2)
            self._norm(f"{at}.attention.q_gamma", None, &block.q_norm)
            self._norm(f"{at}.attention.k_gamma", None, &block.k_norm)
            self._norm(f"{at}.attention.gamma", f"{at}.attention.beta", &block.heads_norm)
            self._norm(f"{at}.ffn.gamma", f"{at}.ffn.beta", &block.hidden_norm)
        return 0

    def with_adapter(self, adapter):
        """Return the model with a low-rank adapter; as ``LegacyLLM.with_adapter``."""
        cdef PackedModel model = PackedModel.__new__(PackedModel)
        check_adapted(self.parameters, adapter)
        model._share(self.config, self.parameters, adapter)
        return model

    def __dealloc__(self):
        free(self.view.blocks)

    @staticmethod
    def load(path, form="2bit", head=None, threads=None):
        """Load a model, directly in packed form.

        The file is mapped into memory and packed matrix by matrix, without float weights. It is
        copied, not used in place, because kernels read tiles, and only private memory gets huge
        pages. What was read leaves memory at once.

        Parameters
        ----------
        path : path-like
            As for ``load_model``.
        form : {"2bit", "trits"}
        head : {"float", "int8"}, optional
        threads : int, optional
            By default ``default_threads()``.

        Returns
        -------
        PackedModel

        Raises
        ------
        ModelFileError
            If the files are not a complete, valid model, or one that would not be computed right.
        OSError
            If it cannot be read.
        ValueError
            If the form cannot store the model's codes.
        """
        cdef PackedModel model = PackedModel.__new__(PackedModel)
        config, _, stored = read_model(Path(path))
        threads = default_threads() if threads is None else index(threads)
        model._fill(config, stored, form, head, threads)
        return model

    @property
    def nbytes(self) -> int:
        """The bytes of all weights and scales."""
        return sum(weights.nbytes for weights in self.parameters.values()) + sum(
            weights.scales.nbytes for weights in self.parameters.values()
            if isinstance(weights, PackedMatrix))

    cdef int _projection(self, str name, str bias, Projection *view) except -1:
        fill_projection(view, self.parameters[name], name)
        view.bias = optional_vector(self.parameters.get(bias), view.rows, bias)
        if name in self.adapter:
            a, b = self.adapter[name]
            point_adapter(view, name, a, b, 1.0, 0)
        add_demand(&self.view.demand, view)
        return 0

    cdef int _norm(self, str gamma, str beta, NormView *view) except -1:
        # Where there are no such parameters, there is no norm, or no bias.
        if gamma in self.parameters:
            size = len(self.parameters[gamma])
            view.gamma = vector_pointer(self.parameters[gamma], size, gamma)
            if beta in self.parameters:
                view.beta = vector_pointer(self.parameters[beta], size, beta)
            view.epsilon = self.config.norm_epsilon
            # The norms of queries and keys always are.
            view.rms = self.config.norm == "rms" or beta is None
        return 0

    def __reduce__(self):
        raise TypeError("a model cannot be copied or pickled: use save_model and load_model")

    def __repr__(self):
        return (f"PackedModel({self.config.num_blocks} blocks of {self.config.model_dim}, "
                f"{self.nbytes:,} bytes)")
