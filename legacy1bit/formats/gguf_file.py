"""GGUF files as containers: keys, and tensors with their types and bytes.

Nothing in a file is trusted: each number is checked against the file before it is used.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import mmap
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from legacy1bit.formats.tensor_types import Q2_0, Q2_0_OF_128, TYPES, UNREADABLE, TensorType
from legacy1bit.system.files import open_regular

Keys = dict[str, Any]
# Shape, number of the type, and offset of each tensor, by name.
Entries = dict[str, tuple[tuple[int, ...], int, int]]

MAGIC = b"GGUF"
# What changed from one to the other is that numbers may be big-endian, which is refused.
_VERSIONS = (2, 3)
_ALIGNMENT_KEY, _ALIGNMENT, _MOST_ALIGNMENT = "general.alignment", 32, 1 << 20
_MOST_AXES = 4

# The types of keys, by their numbers in a file.
_NUMBERS = {
    **{0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?"},
    **{10: "<u8", 11: "<i8", 12: "<f8"},
}
_TEXT, _LIST = 8, 9

# The least bytes of a key and of a tensor's entry.
_KEY_BYTES, _ENTRY_BYTES = 13, 24


class Texts:
    """A list of texts in a file, decoded when they are asked for."""

    def __init__(self, data: "mmap.mmap | bytes", start: int, count: int) -> None:
        self._data, self._start, self._count = data, start, count

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[str]:
        at = self._start
        for _ in range(self._count):
            (size,) = struct.unpack_from("<Q", self._data, at)
            yield self._data[at + 8 : at + 8 + size].decode()
            at += 8 + size

    def tolist(self) -> list[str]:
        """Return the texts."""
        return list(self)


class Tensor(NamedTuple):
    """A tensor.

    Attributes
    ----------
    shape : tuple of int
        The slowest axis first, as in NumPy.
    kind : TensorType
    data : uint8[N]
        Mapped into memory.
    """

    shape: tuple[int, ...]
    kind: TensorType
    data: npt.NDArray[np.uint8]


class GgufReader:
    """A GGUF file, read from its beginning to its end.

    Parameters
    ----------
    file : file
        It is mapped into memory, and may be closed.

    Raises
    ------
    ValueError
        If the file is not such a file, or ends too early; of all methods.
    """

    def __init__(self, file: BinaryIO) -> None:
        if os.fstat(file.fileno()).st_size == 0:
            raise ValueError("it ends too early: it is empty")
        self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._at = 0

    def check(self, count: int) -> None:
        """Raise ``ValueError`` if fewer than ``count`` bytes remain."""
        if count > len(self._data) - self._at:
            raise ValueError("it ends too early: it is truncated, or not what it says")

    def head(self) -> tuple[Keys, int]:
        """Return the keys, which come first, and the number of tensors after them."""
        magic = self.take(4)
        if magic != MAGIC:
            raise ValueError(f"it starts with {magic!r}, expected {MAGIC!r}")
        version = self.number(4)
        if version in [known << 24 for known in _VERSIONS]:
            raise ValueError(
                "its numbers are big-endian, expected little-endian ones, as "
                "gguf-convert-endian of the package gguf writes them"
            )
        if version not in _VERSIONS:
            raise ValueError(f"it has version {version}, expected 2 or 3")
        tensors, keys = self.number(8), self.number(8)
        for name, count, size in (
            ("tensors", tensors, _ENTRY_BYTES),
            ("metadata keys", keys, _KEY_BYTES),
        ):
            if count * size > len(self._data):
                raise ValueError(f"it ends too early for {count} {name}")
        return self.keys(keys), tensors

    def take(self, count: int) -> bytes:
        """Return the next bytes."""
        self.check(count)
        self._at += count
        return self._data[self._at - count : self._at]

    def align(self, alignment: int = _ALIGNMENT) -> None:
        """Continue at the next multiple of the alignment."""
        self._at = -(-self._at // alignment) * alignment

    def rest(self) -> npt.NDArray[np.uint8]:
        """Return what remains, mapped."""
        self.check(0)
        return np.frombuffer(self._data, np.uint8)[self._at :]

    def number(self, size: int) -> int:
        """Return an unsigned number of so many bytes."""
        return int.from_bytes(self.take(size), "little")

    def text(self) -> str:
        """Return a text with its length before it."""
        return self.take(self._length()).decode()

    def _length(self) -> int:
        length = self.number(8)
        if length > len(self._data) - self._at:
            raise ValueError(f"it ends too early for a text of length {length}: it is truncated")
        return length

    def value(self) -> Any:
        """Return the value of a key: a number, a text, an array of numbers, or ``Texts``."""
        kind = self.number(4)
        if kind == _TEXT:
            return self.text()
        if kind != _LIST:
            return self._numbers(kind, 1)[0].item()
        kind, count = self.number(4), self.number(8)
        if kind != _TEXT:
            return self._numbers(kind, count)
        start = self._at
        self.check(8 * count)
        for _ in range(count):
            # The loop of 400,000 tokens and merges: as short as it can be.
            size = self._length()
            self._at += size
        return Texts(self._data, start, count)

    def _numbers(self, kind: int, count: int) -> npt.NDArray[Any]:
        if kind not in _NUMBERS:
            raise ValueError(f"a key has the unknown type {kind}")
        dtype = np.dtype(_NUMBERS[kind])
        return np.frombuffer(self.take(count * dtype.itemsize), dtype)

    def keys(self, count: int) -> Keys:
        """Return keys by name."""
        result: Keys = {}
        for _ in range(count):
            name = self.text()
            if name in result:
                raise ValueError(f"its key {name} is there twice")
            result[name] = self.value()
        return result

    def tensors(self, count: int) -> Entries:
        """Return shape, number of the type, and offset of each tensor."""
        result: Entries = {}
        for _ in range(count):
            name, axes = self.text(), self.number(4)
            if name in result:
                raise ValueError(f"its tensor {name} is there twice")
            if not 0 < axes <= _MOST_AXES:
                raise ValueError(f"{name} has {axes} dimensions, expected 1 to {_MOST_AXES}")
            # The fastest axis comes first there.
            shape = tuple(self.number(8) for _ in range(axes))[::-1]
            result[name] = shape, self.number(4), self.number(8)
        return result


def is_gguf(path: str | os.PathLike[str]) -> bool:
    """Return whether a file is named or begins as a GGUF file does.

    Raises
    ------
    OSError
        If it cannot be read.
    """
    with open_regular(path) as file:
        return file.read(len(MAGIC)) == MAGIC or Path(path).suffix == ".gguf"


def read_keys(path: str | os.PathLike[str]) -> Keys:
    """Return the keys of a GGUF file; errors are those of ``read_container``."""
    with open_regular(path) as file:
        return GgufReader(file).head()[0]


def read_container(path: str | os.PathLike[str]) -> tuple[Keys, dict[str, Tensor]]:
    """Return the keys and the tensors of a GGUF file.

    Raises
    ------
    ValueError
        If it is damaged, or a tensor has a type that cannot be read.
    OSError
        If it cannot be read.
    """
    with open_regular(path) as file:
        reader = GgufReader(file)
    keys, count = reader.head()
    entries = reader.tensors(count)
    alignment = keys.get(_ALIGNMENT_KEY, _ALIGNMENT)
    if type(alignment) is not int or not 0 < alignment <= _MOST_ALIGNMENT or alignment % 8:
        raise ValueError(f"its key {_ALIGNMENT_KEY} is {alignment}, expected a multiple of 8")
    reader.align(alignment)
    return keys, _placed(entries, reader.rest(), alignment)


def _placed(entries: Entries, data: npt.NDArray[np.uint8], alignment: int) -> dict[str, Tensor]:
    """Return tensors whose sizes, offsets and the file agree."""
    kinds = {}
    for name, (shape, number, _) in entries.items():
        if number not in TYPES:
            what = UNREADABLE.get(number)
            known = "is unknown" if what is None else f"is {what}, and cannot be read"
            raise ValueError(f"{name} has type {number}, which {known}")
        if 0 in shape:
            raise ValueError(f"{name} has shape {list(shape)}, without a weight")
        kinds[name] = TYPES[number]
    order = sorted(entries, key=lambda name: entries[name][2])
    if _fault(entries, kinds, order, data.size, alignment) is not None:
        # The two forms of a type differ in the places of the tensors alone.
        other = {name: Q2_0_OF_128 if kind is Q2_0 else kind for name, kind in kinds.items()}
        if _fault(entries, other, order, data.size, alignment) is None:
            kinds = other
    if fault := _fault(entries, kinds, order, data.size, alignment):
        raise ValueError(fault)
    placed = {}
    for name, (shape, _, offset) in entries.items():
        kind = kinds[name]
        placed[name] = Tensor(shape, kind, data[offset : offset + kind.size(shape)])
    return placed


def _fault(
    entries: Entries, kinds: dict[str, TensorType], order: list[str], size: int, alignment: int
) -> str | None:
    """Return what is wrong with the places of tensors, which lie one after the other; else None."""
    ends = {}
    for name, (shape, _, offset) in entries.items():
        try:
            own = kinds[name].size(shape)
        except ValueError as error:
            return f"{name} {error}"
        if offset % alignment:
            return f"{name} has offset {offset}, expected a multiple of the alignment {alignment}"
        ends[name] = offset + own
        if ends[name] > size:
            return (
                f"{name} has offset {offset} and a size of {own} bytes, beyond the end of file: it "
                "is truncated or damaged"
            )
    end = 0
    for name in order:
        offset = entries[name][2]
        if offset != -(-end // alignment) * alignment:
            return (
                f"{name} has offset {offset}, and by their sizes the tensors before it end at {end}"
            )
        end = ends[name]
    return None
