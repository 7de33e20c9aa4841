"""Safetensors files as containers: one, or several with an index.

The package ``safetensors`` copies tensors, and with NumPy, which has no bfloat16, cannot give all.
Nothing in a file is trusted: each number is checked against the file before it is used.

The format: https://github.com/huggingface/safetensors#format
"""

import json
import math
import mmap
import os
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from legacy1bit.system.errors import one_line
from legacy1bit.system.files import mistaken_file, open_regular, read_regular

WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"

_MOST_HEADER_BYTES = 100_000_000
_SIZES = {
    **{"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2},
    **{"BF16": 2, "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8},
}
# Those that NumPy has, and that our own files are made of.
_DTYPES = {"U8": "u1", "I8": "i1", "F16": "<f2", "F32": "<f4"}
# What holds weights only as a program that would have to be run.
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class Tensor(NamedTuple):
    """A tensor.

    Attributes
    ----------
    dtype : str
        In the format's terms, such as "BF16".
    shape : tuple of int
    data : uint8[N]
        Mapped into memory.
    """

    dtype: str
    shape: tuple[int, ...]
    data: npt.NDArray[np.uint8]

    def array(self) -> npt.NDArray[Any]:
        """Return the tensor as an array, mapped; not of types that NumPy has not."""
        return self.data.view(_DTYPES[self.dtype]).reshape(self.shape)


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of a folder, of one file or of those in its index.

    Raises
    ------
    ValueError
        If a file is damaged or missing, or there are no such files.
    OSError
        If a file cannot be read.
    """
    if (folder / WEIGHTS_FILE).exists():
        return read_file(folder / WEIGHTS_FILE)[0]
    if (folder / INDEX_FILE).exists():
        return _read_all(folder)
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
    if pickles:
        raise ValueError(
            f"{pickles[0]} is a pickle, which is not read because it could run any code: expected "
            f"weights in {WEIGHTS_FILE}"
        )
    raise ValueError(f"it has neither {WEIGHTS_FILE} nor {INDEX_FILE}")


def _read_all(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of the files that an index names."""
    try:
        index = json.loads(read_regular(folder / INDEX_FILE), object_pairs_hook=_once)
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{INDEX_FILE} is not JSON: {error}") from None
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict) or not places:
        raise ValueError(f"{INDEX_FILE} has no weight_map")
    names = set()
    for file in places.values():
        if not isinstance(file, str) or not _is_plain(file):
            raise ValueError(
                f"{INDEX_FILE} names {str(file)[:100]!r}, expected a file in the same folder, not "
                "outside"
            )
        names.add(file)
    tensors: dict[str, Tensor] = {}
    for file in sorted(names):
        if not (folder / file).exists():
            raise ValueError(f"{INDEX_FILE} names {file}, which is missing")
        for name, tensor in read_file(folder / file)[0].items():
            if places.get(name) != file:
                raise ValueError(f"{file} has {name}, which {INDEX_FILE} places elsewhere")
            tensors[name] = tensor
    missing = sorted(places.keys() - tensors.keys())
    if missing:
        raise ValueError(f"{INDEX_FILE} places {missing[0]} in a file where it is missing")
    return tensors


def _is_plain(name: str) -> bool:
    """Whether a name is that of a safetensors file, without a folder."""
    return name.endswith(".safetensors") and not set(name) & {"/", "\\", "\0"}


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object, in which no key may be there twice."""
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a key is there twice")
    return content


def read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a file, by name, and its metadata.

    Raises
    ------
    ValueError
        If it is damaged.
    OSError
        If it cannot be read.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size < 8:
            raise ValueError(f"{path.name} has {size} bytes, too few for a header")
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    (length,) = struct.unpack_from("<Q", data)
    if length > min(size - 8, _MOST_HEADER_BYTES):
        known = mistaken_file(path)
        raise ValueError(
            f"{path.name} is not a safetensors file: {known or f'its header has {length} bytes'}"
        )
    try:
        header = json.loads(data[8 : 8 + length], object_pairs_hook=_once)
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{path.name} has a damaged header: {one_line(error)}") from None
    if not isinstance(header, dict):
        raise ValueError(f"{path.name} has a header that is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError(f"{path.name} has metadata that are not texts")
    content = np.frombuffer(data, np.uint8)[8 + length :]
    entries = {name: _entry(name, entry, content.size) for name, entry in header.items()}
    end, before = 0, ""
    for name, (_, _, begin, stop) in sorted(entries.items(), key=lambda item: item[1][2:]):
        if begin < end:
            raise ValueError(f"{name} has offset {begin}, and overlaps {before}")
        if begin > end:
            raise ValueError(f"{name} has offset {begin}, and the tensors before it end at {end}")
        end, before = stop, name
    if end < content.size:
        raise ValueError(f"{path.name} has {content.size - end} bytes after its last tensor")
    tensors = {
        name: Tensor(dtype, shape, content[begin:stop])
        for name, (dtype, shape, begin, stop) in entries.items()
    }
    return tensors, metadata


def _entry(name: str, entry: Any, size: int) -> tuple[str, tuple[int, ...], int, int]:
    """Return dtype, shape, begin and end of a tensor, which fit each other and the file."""
    fields = {"dtype", "shape", "data_offsets"}
    if not isinstance(entry, dict) or entry.keys() != fields:
        raise ValueError(f"{name} has not {', '.join(sorted(fields))} in the header")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _SIZES:
        raise ValueError(f"{name} has the unknown dtype {str(dtype)[:100]!r}")
    if not _are_sizes(shape) or len(shape) > 8 or 0 in shape:
        raise ValueError(f"{name} has a shape that is not a list of positive numbers")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{name} has offsets that are not a begin and an end")
    begin, stop = offsets
    if stop > size:
        raise ValueError(
            f"{name} ends at offset {stop}, and the file's data has a size of {size}: it is "
            "truncated or damaged"
        )
    if math.prod(shape) * _SIZES[dtype] != stop - begin:
        raise ValueError(f"{name} has shape {shape} of {dtype} in {stop - begin} bytes")
    return dtype, tuple(shape), begin, stop


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(
        type(value) is int and 0 <= value < 1 << 63 for value in values
    )
