"""The numbers in tensors of published models: ternary matrices, and floats.

A matrix is read some rows at a time, and the pages of its file that were read are given back, so
that only what is made of them stays in memory. ``packing`` decodes codes, and names the sources.

Blocks of floats: ``ggml/src/ggml-common.h`` and ``ggml-quants.c`` of llama.cpp.
"""

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from legacy1bit.packing import Tiles, Values, block_scales, merge_scales, read_floats
from legacy1bit.system.files import release

_Floats = npt.NDArray[np.float32]
_Bytes = npt.NDArray[np.uint8]
_Places = npt.NDArray[np.intp]

# Floats and codes that are decoded at once: each thread gets some rows of them.
_AT_ONCE = 1 << 20
_CODES_AT_ONCE = 1 << 24

# The units that share a scale, from coarse to fine, as ``ModelConfig.scale`` names them. A matrix
# that has one scale for a unit has one for each finer unit, too.
UNITS = ("tensor", "row", "256", "128", "64")
# The smallest group in which floats are looked at.
_SMALLEST = 32


@dataclass(frozen=True)
class TensorType:
    """How a tensor is stored.

    Attributes
    ----------
    name : str
    block, bytes : int
        The weights of a block, and its bytes.
    layout : str
        Of codes of -1, 0 and 1: their layout in ``packing``.
    """

    name: str
    block: int = 1
    bytes: int = 1
    layout: str = ""

    @property
    def is_ternary(self) -> bool:
        """Whether it holds codes of -1, 0 and 1."""
        return bool(self.layout)

    def size(self, shape: tuple[int, ...]) -> int:
        """Return the bytes of a tensor.

        Raises
        ------
        ValueError
            If it is not a whole number of blocks.
        """
        count = math.prod(shape)
        if self is I2_S:
            if count % self.block:
                raise ValueError(f"has {count} weights, expected a multiple of {self.block}")
            # Blocks go on over the ends of rows; the scale follows, and 28 other bytes.
            return count // 4 + 32
        if not shape or shape[-1] % self.block:
            raise ValueError(f"has shape {list(shape)}, expected rows of whole {self.name} blocks")
        return count // self.block * self.bytes


F32 = TensorType("F32", bytes=4)
F16 = TensorType("F16", bytes=2)
BF16 = TensorType("BF16", bytes=2)
U8 = TensorType("U8")
I2_S = TensorType("I2_S", 128, 32, "I2_S")
Q2_0 = TensorType("Q2_0", 64, 18, "Q2_0")
# Early files have blocks of 128 under the same number.
Q2_0_OF_128 = TensorType("Q2_0", 128, 34, "Q2_0 of 128")

# By their numbers in GGUF files. 36 is bitnet.cpp's, 142 and 143 are PrismML's.
TYPES = {
    0: F32,
    1: F16,
    2: TensorType("Q4_0", 32, 18),
    8: TensorType("Q8_0", 32, 34),
    12: TensorType("Q4_K", 256, 144),
    14: TensorType("Q6_K", 256, 210),
    30: BF16,
    34: TensorType("TQ1_0", 256, 54, "TQ1_0"),
    35: TensorType("TQ2_0", 256, 66, "TQ2_0"),
    36: I2_S,
    42: Q2_0,
    142: TensorType("PQ2_0", 128, 34, "Q2_0 of 128"),
    143: TensorType("PTQ1_0", 128, 28, "PTQ1_0"),
}

# Types that cannot be read, and why where there is more to say.
UNREADABLE = {
    **{3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 13: "Q5_K", 15: "Q8_K"},
    **{16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S"},
    **{22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64"},
    **{29: "IQ1_M", 37: "I8_S", 40: "NVFP4", 41: "Q1_0"},
    38: "TL1 of bitnet.cpp, whose tiles depend on a file of its build",
    39: "TL2 of bitnet.cpp, whose tiles depend on a file of its build, or MXFP4 of llama.cpp",
}


class Codes(Protocol):
    """A ternary matrix in a file."""

    @property
    def shape(self) -> tuple[int, int]:
        """(R, C)."""

    def scales(self) -> tuple[_Floats, int] | None:
        """Return float32[1, 1] or float32[R, G], and the columns that share one.

        The scale of a group of zeros may be 0, whatever its unit has. None: it is not ternary.
        """

    def write(self, target: Tiles | Values, places: _Places) -> None:
        """Write the codes.

        Parameters
        ----------
        target : Tiles or Values
        places : intp[R]
            Which row of the target each row becomes.

        Raises
        ------
        ValueError
            If they are not ternary.
        """


def _strips(rows: int, cols: int, at_once: int) -> Iterator[slice]:
    """Yield consecutive rows, some at a time."""
    step = max(at_once // max(cols, 1), 1)
    for first in range(0, rows, step):
        yield slice(first, min(first + step, rows))


# --- Ternary types --------------------------------------------------------------------------------


class Blocks:
    """A matrix in blocks, each with its scale.

    Parameters
    ----------
    kind : TensorType
    data : uint8[N]
    shape : (int, int)
    """

    def __init__(self, kind: TensorType, data: _Bytes, shape: tuple[int, int]) -> None:
        self.shape = shape
        self._kind, self._data = kind, data
        self._rows = data.reshape(shape[0], -1)

    def scales(self) -> tuple[_Floats, int]:
        """See ``Codes``."""
        rows, cols = self.shape
        result = np.empty((rows, cols // self._kind.block), np.float32)
        for strip in _strips(rows, cols, _CODES_AT_ONCE):
            here = self._rows[strip]
            result[strip] = block_scales(self._kind.layout, here.reshape(-1)).reshape(len(here), -1)
            release(here)
        return result, self._kind.block

    def write(self, target: Tiles | Values, places: _Places) -> None:
        """See ``Codes``. Blocks of scale 0 are zeros."""
        rows, cols = self.shape
        for strip in _strips(rows, cols, _CODES_AT_ONCE):
            target.write(self._kind.layout, self._data, rows, places[strip], strip.start)
            release(self._rows[strip])


class RunsOf128:
    """A matrix of the type I2_S: runs of 128 weights over the ends of rows, and one scale.

    Parameters
    ----------
    data : uint8[R C / 4 + 32]
    shape : (int, int)
    """

    def __init__(self, data: _Bytes, shape: tuple[int, int]) -> None:
        self.shape = shape
        self._data = data

    def scales(self) -> tuple[_Floats, int]:
        """See ``Codes``."""
        scale = self._data[-32:-28].copy().view("<f4").astype(np.float32)
        return scale.reshape(1, 1), self.shape[1]

    def write(self, target: Tiles | Values, places: _Places) -> None:
        """See ``Codes``."""
        rows, cols = self.shape
        for strip in _strips(rows, cols, _CODES_AT_ONCE):
            target.write("I2_S", self._data[:-32], rows, places[strip], strip.start)
            release(self._data[strip.start * cols // 4 : strip.stop * cols // 4])


class Quarters:
    """A packed matrix of transformers: row r + i R / 4 is in bits 2 i of row r.

    Parameters
    ----------
    weight : uint8[R / 4, C]
    scale : float
    """

    def __init__(self, weight: _Bytes, scale: float) -> None:
        self.shape = 4 * weight.shape[0], weight.shape[1]
        self._weight, self._scale = weight, scale

    def scales(self) -> tuple[_Floats, int]:
        """See ``Codes``."""
        return np.array([[self._scale]], np.float32), self.shape[1]

    def write(self, target: Tiles | Values, places: _Places) -> None:
        """See ``Codes``."""
        rows, cols = self.shape
        data, quarters = self._weight.reshape(-1), places.reshape(4, -1)
        for strip in _strips(rows // 4, cols, _CODES_AT_ONCE // 4):
            for i, quarter in enumerate(quarters):
                first = i * len(quarter) + strip.start
                target.write("quarters", data, rows, quarter[strip], first)
            release(self._weight[strip])


# --- Floats ---------------------------------------------------------------------------------------


class Floats:
    """A tensor of floats, some of its rows at a time.

    Parameters
    ----------
    kind : TensorType
    data : uint8[N]
    shape : tuple of int
        A vector is one row.
    """

    def __init__(self, kind: TensorType, data: _Bytes, shape: tuple[int, ...]) -> None:
        self.shape = shape
        self._kind = kind
        self._rows = data.reshape(math.prod(shape[:-1]), -1)

    def rows(self, strip: slice) -> _Floats:
        """Return some rows, float32[R, C].

        Raises
        ------
        ValueError
            If a number is not finite.
        """
        stored, decode = self._rows[strip], _DECODE.get(self._kind.name)
        if decode is None:
            return read_floats(self._kind.name, stored.reshape(-1)).reshape(len(stored), -1)
        with np.errstate(all="ignore"):
            values: _Floats = decode(stored)
        if not np.isfinite(values).all():
            raise ValueError("holds a number that is not finite")
        return values

    def strips(self) -> Iterator[tuple[slice, _Floats]]:
        """Yield rows and their numbers, some at a time."""
        for strip in _strips(len(self._rows), self.shape[-1], _AT_ONCE):
            yield strip, self.rows(strip)
            release(self._rows[strip])

    def each(self, use: Callable[[slice, _Floats], None], threads: int) -> None:
        """Call a function with rows and their numbers, some at a time, in several threads."""

        def take(strip: slice) -> None:
            use(strip, self.rows(strip))
            release(self._rows[strip])

        strips = _strips(len(self._rows), self.shape[-1], _AT_ONCE)
        if threads == 1:
            for strip in strips:
                take(strip)
            return
        with ThreadPoolExecutor(threads) as pool:
            for _ in pool.map(take, strips):
                pass

    def all(self) -> _Floats:
        """Return the whole tensor."""
        result = np.empty((len(self._rows), self.shape[-1]), np.float32)
        for strip, values in self.strips():
            result[strip] = values
        return result.reshape(self.shape)


class Masters:
    """A matrix that is ternary only after quantization (arXiv 2402.17764, equations 1 to 3).

    The scale is the mean magnitude of the whole matrix.

    Attributes
    ----------
    floats : Floats
        The weights before it.
    """

    def __init__(self, weights: Floats) -> None:
        rows, cols = weights.shape
        self.shape = rows, cols
        self.floats = weights
        self._scale: np.float32 | None = None

    def _mean(self) -> np.float32:
        if self._scale is None:
            total = sum(float(np.abs(v).sum(dtype=np.float64)) for _, v in self.floats.strips())
            self._scale = np.float32(max(total / math.prod(self.shape), 1e-5))
        return self._scale

    def scales(self) -> tuple[_Floats, int]:
        """See ``Codes``."""
        return self._mean().reshape(1, 1), self.shape[1]

    def write(self, target: Tiles | Values, places: _Places) -> None:
        """See ``Codes``."""
        factor = np.float32(1.0) / self._mean()
        for strip, values in self.floats.strips():
            with np.errstate(over="ignore"):
                codes = np.clip(np.rint(values * factor), -1.0, 1.0)
            _write_codes(target, codes, places[strip])


class TernaryFloats:
    """A matrix of floats that hold a magnitude, its negative, and zeros, if they do."""

    def __init__(self, weights: Floats) -> None:
        rows, cols = weights.shape
        self.shape = rows, cols
        self._weights = weights

    def scales(self) -> tuple[_Floats, int] | None:
        """See ``Codes``."""
        rows, cols = self.shape
        groups = -(-cols // _SMALLEST)
        result = np.empty((rows, groups), np.float32)
        for strip, values in self._weights.strips():
            sizes = np.abs(values)
            if cols % _SMALLEST:
                sizes = np.pad(sizes, ((0, 0), (0, -cols % _SMALLEST)))
            sizes = sizes.reshape(-1, _SMALLEST)
            largest = sizes.max(axis=1)
            if not ((sizes == largest[:, None]) | (sizes == 0.0)).all():
                return None
            result[strip] = largest.reshape(-1, groups)
        return result, _SMALLEST

    def write(self, target: Tiles | Values, places: _Places) -> None:
        """See ``Codes``."""
        for strip, values in self._weights.strips():
            _write_codes(target, np.sign(values), places[strip])


def _write_codes(target: Tiles | Values, codes: _Floats, places: _Places) -> None:
    """Write rows of codes."""
    target.write("int8", codes.astype(np.int8).view(np.uint8).reshape(-1), len(codes), places)


def _halves(data: _Bytes) -> _Floats:
    """Return numbers of two bytes in the last axis as float32[..., 1]."""
    return np.ascontiguousarray(data).view("<f2").astype(np.float32)


def _of_q8_0(rows: _Bytes) -> _Floats:
    blocks = rows.reshape(len(rows), -1, 34)
    return (blocks[..., 2:].view(np.int8) * _halves(blocks[..., :2])).reshape(len(rows), -1)


def _of_q4_0(rows: _Bytes) -> _Floats:
    blocks = rows.reshape(len(rows), -1, 18)
    codes = np.concatenate([blocks[..., 2:] & 15, blocks[..., 2:] >> 4], axis=2)
    return ((codes.astype(np.float32) - 8.0) * _halves(blocks[..., :2])).reshape(len(rows), -1)


def _of_q4_k(rows: _Bytes) -> _Floats:
    blocks = rows.reshape(len(rows), -1, 144)
    packed = blocks[..., 4:16]
    # Six bits each: eight scales, eight minima, the higher bits of the last four of each apart.
    first, second, third = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    scales = np.concatenate([first & 63, third & 15 | first >> 6 << 4], axis=2)
    minima = np.concatenate([second & 63, third >> 4 | second >> 6 << 4], axis=2)
    # 32 weights in the lower halves of bytes, then 32 in the higher ones, four times.
    quads = blocks[..., 16:].reshape(*blocks.shape[:2], 4, 1, 32)
    codes = np.concatenate([quads & 15, quads >> 4], axis=3).reshape(*blocks.shape[:2], 8, 32)
    factor = (_halves(blocks[..., :2]) * scales)[..., None]
    offset = (_halves(blocks[..., 2:4]) * minima)[..., None]
    values: _Floats = factor * codes - offset
    return values.reshape(len(rows), -1)


def _of_q6_k(rows: _Bytes) -> _Floats:
    blocks = rows.reshape(len(rows), -1, 210)
    halves = blocks[..., :128].reshape(*blocks.shape[:2], 2, 1, 2, 32)
    low = np.concatenate([halves & 15, halves >> 4], axis=3).reshape(*blocks.shape[:2], 2, 4, 32)
    quarters = blocks[..., 128:192].reshape(*blocks.shape[:2], 2, 1, 32)
    high = (quarters >> np.array([[0], [2], [4], [6]], np.uint8) & 3) << 4
    codes = (low | high).astype(np.int8) - np.int8(32)
    scales = blocks[..., 192:208].view(np.int8) * _halves(blocks[..., 208:])
    values: _Floats = codes.reshape(*blocks.shape[:2], 16, 16) * scales[..., None]
    return values.reshape(len(rows), -1)


# Other types are numbers that packing reads.
_DECODE: dict[str, Any] = {
    "Q8_0": _of_q8_0,
    "Q4_0": _of_q4_0,
    "Q4_K": _of_q4_k,
    "Q6_K": _of_q6_k,
}


# --- Units of scales ------------------------------------------------------------------------------


class Scales(NamedTuple):
    """The scales of a matrix.

    Attributes
    ----------
    unit : str
        One of ``UNITS``.
    values : float32[1, 1] or float32[R, G]
    group : int
        The columns that share one.
    """

    unit: str
    values: _Floats
    group: int


def scales_in(unit: str, scales: _Floats, group: int, cols: int) -> _Floats | None:
    """Return the scales of a matrix in a unit, float32[1, 1] or float32[R, G].

    Parameters
    ----------
    unit : str
        One of ``UNITS``.
    scales : float32[1, 1] or float32[R, G]
        Finite numbers; 0 stands for any.
    group : int
        The columns that share one.
    cols : int

    Returns
    -------
    float32[1, 1] or float32[R, G] or None
        None if a unit has several. A single scale stays one.
    """
    if unit == "tensor":
        return merge_scales(scales.reshape(1, -1), scales.size)
    if unit == "row":
        return merge_scales(scales, scales.shape[1])
    wanted = int(unit)
    if group == wanted:
        return scales
    if group > wanted:
        groups = -(-cols // wanted)
        return np.ascontiguousarray(np.repeat(scales, -(-group // wanted), axis=1)[:, :groups])
    return merge_scales(scales, wanted // group)


def in_coarsest_unit(scales: _Floats, group: int, cols: int) -> Scales | None:
    """Return scales in the first of ``UNITS`` that holds them; None if none does."""
    for unit in UNITS:
        merged = scales_in(unit, scales, group, cols)
        if merged is not None:
            return Scales(unit, merged, int(unit) if unit.isdecimal() else cols)
    return None
