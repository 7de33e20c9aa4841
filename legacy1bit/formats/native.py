"""The package's own model files, and that of the C original (C: ``model.c``).

A model folder has the weights in ``model.safetensors``, a tensor for each vector and float matrix,
two for each matrix of codes, and the settings in ``config.json``. The C original's file (version 1)
has five integers, then matrices (rows, columns, codes) and arrays (size, floats).

Nothing here needs a model: parameters come and go as arrays. ``model.load_model`` and
``model.save_model`` are the functions to call.
"""

import json
import math
import struct
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from legacy1bit.formats.provenance import Provenance
from legacy1bit.formats.safetensors_file import Tensor, read_file
from legacy1bit.hyperparams import ModelConfig
from legacy1bit.layout import parameter_layout
from legacy1bit.packing import Tiles, Values
from legacy1bit.schemes import SCHEMES
from legacy1bit.system.errors import describe, one_line
from legacy1bit.system.files import (
    atomic_write_all,
    check_regular,
    mistaken_file,
    open_regular,
    read_regular,
    release,
    serialize_tensors,
)

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
# PEFT's files of an adapter, which a run may have in place of a model.
ADAPTER_FILE, ADAPTER_CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"
# Of a run: the state it resumes from, and the folder of its best model.
CHECKPOINT_FILE = "checkpoint.safetensors"
BEST_FOLDER = "best"

_BYTES_OF = {"U8": 1, "F16": 2, "F32": 4}

_FORMAT = "legacy1bit"
_FORMAT_VERSION = 2

_V1_MAGIC = 0x1B1B1
_V1_VERSION = 1
_V1_HEADER = struct.Struct("<IIiii")

_Floats = npt.NDArray[np.float32]
_Codes = npt.NDArray[np.int8]


class ModelFileError(ValueError):
    """A file that is not a complete, valid model of a known format."""


class CodeMatrix(Protocol):
    """A matrix of codes times scales, such as ``TernaryMatrix``."""

    @property
    def values(self) -> _Codes:
        """The codes, int8[R, C]."""

    @property
    def scales(self) -> _Floats:
        """The scales, float32[1, 1] or float32[R, G]."""


# The parameters of a model, by name.
Parameters = Mapping[str, _Floats | CodeMatrix]


class FloatRows(Protocol):
    """A float matrix that is decoded some rows at a time, such as ``tensor_types.Floats``."""

    def each(self, use: Callable[[slice, _Floats], None], threads: int) -> None:
        """Call a function with rows and their numbers, some at a time, in several threads."""

    def all(self) -> _Floats:
        """Return the whole matrix."""


class StoredParameter(NamedTuple):
    """A parameter as stored in a file.

    Attributes
    ----------
    name : str
    shape : tuple of int
    values : float32 array or FloatRows
        Numbers; none of a matrix of codes.
    scales : float32[1, 1] or float32[R, G] or None
        The scales of codes.
    group : int
        The number of columns that share a scale.
    write : callable or None
        Decodes the codes into ``packing.Tiles`` or ``packing.Values``. Raises ``ModelFileError`` if
        they are not the scheme's.
    masters : callable or None
        Returns the float weights, float32[R, C], of which the codes are the quantization; errors
        are those of ``write``.
    """

    name: str
    shape: tuple[int, ...]
    values: npt.NDArray[Any] | FloatRows = np.empty(0, np.float32)
    scales: _Floats | None = None
    group: int = 0
    write: Callable[[Tiles | Values], None] | None = None
    masters: Callable[[], _Floats] | None = None

    def array(self) -> npt.NDArray[Any]:
        """Return the values as one array."""
        return self.values if isinstance(self.values, np.ndarray) else self.values.all()

    def each(self, use: Callable[[slice, npt.NDArray[Any]], None], threads: int) -> None:
        """Call a function with rows and their values, some at a time where they are decoded."""
        if isinstance(self.values, np.ndarray):
            use(slice(0, len(self.values)), self.values)
        else:
            self.values.each(use, threads)


def stored_codes(
    name: str,
    layout: str,
    data: npt.NDArray[np.uint8],
    shape: tuple[int, ...],
    scales: _Floats,
    group: int,
) -> StoredParameter:
    """Return a matrix whose codes are in a layout of ``packing``."""

    def write(target: Tiles | Values) -> None:
        target.write(layout, data.reshape(-1), shape[0], np.arange(shape[0]))
        release(data)

    return StoredParameter(name, shape, scales=scales, group=group, write=write)


def check_finite(name: str, values: _Floats, error: type[ValueError] = ValueError) -> None:
    """Raise an error if a number is not finite."""
    if not np.isfinite(values).all():
        raise error(f"{name} holds a number that is not finite")


def _check_all_finite(parameters: Parameters) -> None:
    for name, value in parameters.items():
        check_finite(name, value if isinstance(value, np.ndarray) else value.scales)


# --- Model folders --------------------------------------------------------------------------------


def _tensor_types(config: ModelConfig) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return the dtype and the shape of each tensor in a file, by name."""
    types: dict[str, tuple[str, tuple[int, ...]]] = {}
    for part in parameter_layout(config):
        if part.kind == "quantized":
            rows, cols = part.shape
            packed = rows, -(-cols * SCHEMES[config.scheme].bits // 8)
            types[f"{part.name}.codes"] = "U8", packed
            types[f"{part.name}.scale"] = "F16", part.scale_shape
        else:
            types[part.name] = "F32", part.shape
    return types


def stored_bytes(config: ModelConfig) -> int:
    """Return the size of the weights in a file, without its header."""
    types = _tensor_types(config).values()
    return sum(_BYTES_OF[dtype] * math.prod(shape) for dtype, shape in types)


def write_folder(
    path: Path, config: ModelConfig, provenance: Provenance, parameters: Parameters
) -> None:
    """Write a model folder atomically.

    Raises
    ------
    ValueError
        If a weight is not finite, or float16 does not hold a scale.
    OSError
        If a file cannot be written; existing files are untouched.
    """
    _check_all_finite(parameters)
    tensors: dict[str, npt.NDArray[Any]] = {}
    for name, value in parameters.items():
        if isinstance(value, np.ndarray):
            tensors[name] = value
        else:
            tensors[f"{name}.codes"] = SCHEMES[config.scheme].pack(value.values)
            tensors[f"{name}.scale"] = _as_float16(name, value.scales)
    settings = {"format": _FORMAT, "format_version": _FORMAT_VERSION, **config.to_dict()}
    # The weights file has the settings, too: a crash between the two files cannot pair the weights
    # of one model with the settings of another.
    header = {"config": json.dumps(settings), "provenance": json.dumps(provenance.to_dict())}
    path.mkdir(parents=True, exist_ok=True)
    atomic_write_all(
        {
            path / WEIGHTS_FILE: serialize_tensors(tensors, header),
            path / CONFIG_FILE: json.dumps(settings, indent=2) + "\n",
        }
    )


def _as_float16(name: str, scales: _Floats) -> npt.NDArray[np.float16]:
    """Return scales as float16; those that ``quantize`` computes are exact."""
    with np.errstate(over="ignore"):
        halves = scales.astype(np.float16)
    if (halves != scales).any():
        raise ValueError(f"{name} has a scale that float16 does not hold: {scales.max()}")
    return halves


def model_folder(run: Path) -> Path:
    """Return the folder of a run's model: the folder ``best`` in it, or the run's own.

    A run's model is its best one, if it can be read as a whole; if not, a line on standard error
    says so.

    Parameters
    ----------
    run : Path
        A folder. One that is not a run's, or whose last model is the best, is returned as it is.
    """
    best = run / BEST_FOLDER
    files = [name for name in (WEIGHTS_FILE, ADAPTER_FILE) if (run / name).is_file()]
    if not files:
        return run
    last, best_step = _steps_of(run)
    copied = _steps_of(best)[0]
    if not last:
        # Without the run's checkpoint only the best model itself knows its step.
        best_step = copied
    if best_step in (0, last):
        return run
    try:
        # Its checkpoint is copied last.
        if copied != best_step:
            raise ModelFileError(f"{best} does not hold the model of step {best_step}")
        if files[0] == ADAPTER_FILE:
            read_file(best / ADAPTER_FILE)
        else:
            for _ in read_folder(best)[2]:
                pass
    except (ModelFileError, OSError) as error:
        print(f"{describe(error)}: using the last model instead of the best", file=sys.stderr)
        return run
    return best


def _steps_of(folder: Path) -> tuple[int, int]:
    """Return the step of a folder's checkpoint and that of the best before it; 0 if unknown."""
    file = folder / CHECKPOINT_FILE
    try:
        check_regular(file)
        opened: Any = safe_open(file, framework="numpy")
        header = opened.metadata() or {}
        _, best_step = json.loads(header["best"])
        return int(header["step"]), int(best_step)
    except (
        SafetensorError, OSError, KeyError, OverflowError, TypeError, ValueError, RecursionError,
    ):  # fmt: skip
        return 0, 0


def read_folder(path: Path) -> tuple[ModelConfig, Provenance, Iterator[StoredParameter]]:
    """Read a model folder one parameter at a time, without creating a model.

    Parameters
    ----------
    path : Path

    Returns
    -------
    config : ModelConfig
    provenance : Provenance
    stored : iterator of StoredParameter
        Each parameter, in the order of ``parameter_layout``.

    Raises
    ------
    ModelFileError
        If a file is damaged or the two do not belong together; errors in the content of a tensor
        are raised when it is reached.
    OSError
        If a file cannot be read.
    """
    if (path / ADAPTER_CONFIG_FILE).is_file() and not (path / WEIGHTS_FILE).exists():
        raise ModelFileError(
            f"{path} is an adapter and not a model: name its model, and this with the option "
            "--adapter of generate, chat, evaluate, info or export"
        )
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (path / name).is_file():
            others = sorted(path.glob("*.gguf"))
            instead = f" (--model takes {others[0]})" if others else ""
            raise ModelFileError(f"{path} is not a model folder: it has no {name}{instead}")
    settings = _read_json(path / CONFIG_FILE)
    if "model_type" in settings:
        raise ModelFileError(
            f"{path} is a model of transformers, which cannot be read: name a folder that "
            "legacy1bit has trained or imported"
        )
    file = path / WEIGHTS_FILE
    tensors, header = open_tensors(file)
    if "config" in header and _parsed(header["config"]) != settings:
        raise ModelFileError(
            f"{path / CONFIG_FILE} is not the one that {file.name} was saved with; the latter's "
            "own settings are in its metadata"
        )
    config = _config_of(settings, path / CONFIG_FILE)
    try:
        provenance = Provenance.from_json(header.get("provenance", "{}"))
    except ValueError as error:
        raise ModelFileError(f"{file}: {error}") from None
    _check_types(config, tensors, file)
    return config, provenance, _stored(config, tensors, file)


def open_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a safetensors file, mapped into memory, and its metadata.

    Raises
    ------
    ModelFileError
        If it is not such a file.
    OSError
        If it cannot be read.
    """
    try:
        return read_file(file)
    except ValueError as error:
        reason = one_line(error).removeprefix(f"{file.name} is not a safetensors file: ")
        raise ModelFileError(f"{file} is not a safetensors file: {reason}") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(read_regular(path))
    except (ValueError, RecursionError) as error:
        known = mistaken_file(path)
        raise ModelFileError(f"{path} is not JSON: {known or error}") from None
    if not isinstance(content, dict):
        raise ModelFileError(f"{path} holds no JSON object")
    return content


def _parsed(text: str) -> Any:
    """Return the value of a JSON text, or None if it is invalid."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _config_of(settings: dict[str, Any], file: Path) -> ModelConfig:
    """Return the settings of a model folder's ``config.json``, which must be complete."""
    kind, version = settings.pop("format", None), settings.pop("format_version", None)
    if kind != _FORMAT or type(version) is not int or version != _FORMAT_VERSION:
        raise ModelFileError(
            f"{file} has format {kind!r} version {version!r}, expected {_FORMAT!r} version "
            f"{_FORMAT_VERSION}"
        )
    missing = sorted(set(ModelConfig().to_dict()) - set(settings))
    if missing:
        raise ModelFileError(f"{file} has no setting {missing[0]!r}")
    try:
        return ModelConfig.from_dict(settings)
    except (TypeError, ValueError) as error:
        raise ModelFileError(f"{file}: {error}") from None


def _check_types(config: ModelConfig, tensors: Mapping[str, Tensor], file: Path) -> None:
    """Compare the dtypes and shapes in a file with those of a model of these settings.

    The settings may declare more than fits memory, so this comes before any allocation.
    """
    expected = _tensor_types(config)
    for name, (dtype, shape) in expected.items():
        if name not in tensors:
            raise ModelFileError(f"{file} has no tensor {name}")
        found = tensors[name]
        if found.shape != shape:
            raise ModelFileError(
                f"{file}: {name} has shape {list(found.shape)}, expected {list(shape)}"
            )
        if found.dtype != dtype:
            raise ModelFileError(f"{file}: {name} is {found.dtype}, expected {dtype}")
    unknown = sorted(set(tensors) - set(expected))
    if unknown:
        raise ModelFileError(f"{file} has an unknown tensor {unknown[0]!r}")


def _stored(
    config: ModelConfig, tensors: Mapping[str, Tensor], file: Path
) -> Iterator[StoredParameter]:
    """Yield the parameters for ``read_folder``."""
    for part in parameter_layout(config):
        name, shape = part.name, part.shape
        if part.kind != "quantized":
            values = tensors[name].array()
            check_finite(f"{file}: {name}", values, ModelFileError)
            yield StoredParameter(name, shape, values)
            release(values)
            continue
        codes = tensors[f"{name}.codes"].array()
        scales = tensors[f"{name}.scale"].array().astype(np.float32)
        check_finite(f"{file}: {name}", scales, ModelFileError)
        if config.scale == "one" and (scales != 1.0).any():
            raise ModelFileError(f"{file}: {name} has scale {scales.ravel()[0]}, expected 1")
        try:
            SCHEMES[config.scheme].check(codes, shape[1])
        except ValueError as error:
            raise ModelFileError(f"{file}: {name}: {error}") from None
        layout = {1: "1 bit", 2: "2 bits"}[SCHEMES[config.scheme].bits]
        yield stored_codes(name, layout, codes, shape, scales, part.group)


# --- The C original's file ------------------------------------------------------------------------


def _v1_order(config: ModelConfig) -> list[str]:
    """Return the parameters of a C model in the order of its file."""
    names = ["embedding.weight"]
    for i in range(config.num_blocks):
        names += [f"blocks.{i}.attention.{part}{which}" for part in "wb" for which in "qkvo"]
        names += [f"blocks.{i}.ffn.{part}" for part in ("wi", "wo", "bi", "bo")]
        names += [
            f"blocks.{i}.{norm}.{part}" for norm in ("norm1", "norm2") for part in ("gamma", "beta")
        ]
    return [*names, "output.weight", "output.bias"]


def serialize_c_v1(config: ModelConfig, parameters: Parameters) -> bytes:
    """Return the content of a C original's file.

    Raises
    ------
    ValueError
        If a weight is not finite, or the C original has no such model.
    """
    _check_all_finite(parameters)
    if not config.is_c_original:
        raise ValueError(
            "the C original has no such models: train with --model-dim 256 --ffn-multiplier 4 "
            "--ternary-embedding --scale one --activation relu --positions none --no-final-norm "
            "--attention-window 1 --output-bias (in Python: ModelConfig.c_original)"
        )
    if config.vocab_size != config.model_dim:
        raise ValueError(
            f"vocab_size is {config.vocab_size} and model_dim {config.model_dim}: the C original's "
            "file is defined only where they are equal"
        )
    parts = [
        _V1_HEADER.pack(
            _V1_MAGIC, _V1_VERSION, config.vocab_size, config.model_dim, config.num_blocks
        )
    ]
    for name in _v1_order(config):
        value = parameters[name]
        if isinstance(value, np.ndarray):
            parts += [struct.pack("<i", value.size), value.astype("<f4").tobytes()]
            continue
        scale = float(value.scales.mean(dtype=np.float64))
        if scale != 1.0:
            raise ValueError(f"{name} has scale {scale}, and the C original knows only 1")
        parts += [struct.pack("<ii", *value.values.shape), value.values.tobytes()]
    return b"".join(parts)


def read_c_v1(path: Path) -> tuple[ModelConfig, dict[str, _Floats | _Codes]]:
    """Read a file of the C original.

    Returns
    -------
    config : ModelConfig
    parameters : dict of str to int8[R, C] or float32[C]
        Codes, whose scale is 1, and vectors, by name.

    Raises
    ------
    ModelFileError
        If it is not a complete, valid model. Every size is checked before it is used.
    OSError
        If it cannot be read.
    """
    size = path.stat().st_size
    with open_regular(path) as file:
        config = _v1_config(path, file.read(_V1_HEADER.size), size)
        content = memoryview(file.read(size - _V1_HEADER.size))
    shapes = {part.name: part.shape for part in parameter_layout(config)}
    parameters: dict[str, _Floats | _Codes] = {}
    for name in _v1_order(config):
        shape = shapes[name]
        axes = f"<{len(shape)}i"
        stored = struct.unpack_from(axes, content)
        if stored != shape:
            raise ModelFileError(f"{path}: {name} has shape {list(stored)}, expected {list(shape)}")
        content = content[struct.calcsize(axes) :]
        values: npt.NDArray[Any] = np.frombuffer(
            content, "<f4" if len(shape) == 1 else np.int8, math.prod(shape)
        )
        content = content[values.nbytes :]
        if len(shape) == 1:
            check_finite(f"{path}: {name}", values, ModelFileError)
        elif values.min() < -1 or values.max() > 1:
            raise ModelFileError(f"{path}: {name} holds a number other than -1, 0 and 1")
        parameters[name] = values.reshape(shape)
    return config, parameters


def _v1_config(path: Path, header: bytes, size: int) -> ModelConfig:
    """Return the settings of a C original's file of this size."""
    known = mistaken_file(path)
    if known is not None:
        raise ModelFileError(
            f"{path} is neither a model folder nor a file of the C original: {known}"
        )
    if len(header) < _V1_HEADER.size:
        raise ModelFileError(f"{path} has {size} bytes, too few for a model file")
    magic, version, vocab, dim, blocks = _V1_HEADER.unpack(header)
    if magic != _V1_MAGIC:
        raise ModelFileError(
            f"{path} is neither a model folder nor a file of the C original: it starts with "
            f"{magic:#x}, expected {_V1_MAGIC:#x}"
        )
    if version != _V1_VERSION:
        raise ModelFileError(f"{path} has version {version}, expected {_V1_VERSION}")
    if vocab != dim:
        raise ModelFileError(
            f"{path} has {vocab} tokens and dimension {dim}: the format is defined only where they "
            "are equal"
        )
    try:
        heads = 4 if dim % 4 == 0 else 1
        config = ModelConfig.c_original(vocab, dim, blocks, num_heads=heads)
    except ValueError as error:
        raise ModelFileError(f"{path}: {error}") from None
    expected = _V1_HEADER.size + sum(
        8 + part.size if len(part.shape) == 2 else 4 + 4 * part.size
        for part in parameter_layout(config)
    )
    if size != expected:
        raise ModelFileError(
            f"{path} has {size} bytes, expected {expected} for {blocks} blocks of dimension {dim}"
        )
    return config
