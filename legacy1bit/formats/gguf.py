"""GGUF files: an unmodified llama.cpp runs them, and they come back as the models they were.

The matrices of codes have one of llama.cpp's types; all other weights are float32. Keys of our own
have the rest: settings, provenance and scales. The tokenizer is written as a byte-level BPE.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import contextlib
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from legacy1bit.data.tokenizer import (
    SPECIAL_TOKENS,
    ByteTokenizer,
    SubwordTokenizer,
    Tokenizer,
    fit_tokenizer,
    visible_bytes,
)
from legacy1bit.formats.families import check_model, family_of, tensor_names
from legacy1bit.formats.gguf_file import GgufReader, Texts
from legacy1bit.formats.provenance import Provenance
from legacy1bit.hyperparams import ModelConfig
from legacy1bit.layout import parameter_layout
from legacy1bit.model import LAYER_NORM_EPSILON, LegacyLLM, ModelFileError, TernaryMatrix
from legacy1bit.schemes import FLOAT, SCHEMES
from legacy1bit.system.files import atomic_path, open_regular
from legacy1bit.system.optional import load_extra

_Array = npt.NDArray[Any]


@dataclass(frozen=True)
class _Kind:
    """A type of tensors.

    Attributes
    ----------
    number : int
        Its number in a file.
    file_type : int
        The number of a file with mostly this type.
    bytes, block : int
        The bytes of a block, and its weights.
    """

    number: int
    file_type: int
    bytes: int
    block: int

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape in bytes of a tensor of whole blocks."""
        return (*shape[:-1], shape[-1] // self.block * self.bytes)


# The types of matrices of codes. A block of the ternary ones ends with its scale.
KINDS = {
    "tq2_0": _Kind(35, 37, 66, 256),
    "tq1_0": _Kind(34, 36, 54, 256),
    "f16": _Kind(1, 1, 2, 1),
    "f32": _Kind(0, 0, 4, 1),
}
_FLOATS = {"f16": "<f2", "f32": "<f4"}

_ARCHITECTURE = "nemotron"
_CONFIG, _PROVENANCE, _SCALES = "legacy1bit.config", "legacy1bit.provenance", "legacy1bit.scales"

_ALIGNMENT = 32

# Types of tokens.
_NORMAL, _CONTROL, _UNUSED = 1, 3, 5

# llama.cpp needs at least one merge. This one never applies: its character is not a byte's.
_NO_MERGE = "\u2581 \u2581"

_TOKENIZER = "tokenizer.ggml."


def load_gguf() -> Any:
    """Return the package that writes GGUF files.

    Raises
    ------
    ValueError
        If it is not installed.
    """
    return load_extra("GGUF files need", "gguf", "quants")


# ---------------------------------------------------------------------------------------------
# Codes in llama.cpp's types


def check_kind(config: ModelConfig, kind: str) -> None:
    """Raise ``ValueError``, with a remedy, if a type cannot hold the codes of such models."""
    if kind not in KINDS:
        raise ValueError(f"type is {kind!r}, expected one of {', '.join(KINDS)}")
    if config.scheme == FLOAT and kind != "f32":
        raise ValueError(f"{kind} does not hold weights of scheme float: --type f32")
    if kind in _FLOATS:
        return
    if config.scheme == "2bit":
        raise ValueError(
            f"{kind} holds three values and scheme 2bit has four: --type f32, or train with "
            "--scheme ternary"
        )
    if config.model_dim % 256:
        raise ValueError(
            f"model_dim is {config.model_dim}, expected a multiple of 256 for {kind}: --type f16, "
            "or train with --model-dim 256"
        )
    if config.scale == "128":
        raise ValueError(
            f"{kind} has one scale for 256 weights, and scale is 128: --type f16, or train with "
            "--scale 256"
        )


def _encode(matrix: TernaryMatrix, kind: str) -> _Array:
    """Return a matrix in a type: float16 or float32[R, C], or the bytes of blocks, uint8[R, B]."""
    if kind in _FLOATS:
        with np.errstate(over="ignore"):
            return matrix.dense().astype(_FLOATS[kind])
    gguf = load_gguf()
    codes = matrix.values.astype(np.float32)
    packed: _Array = gguf.quants.quantize(codes, gguf.GGMLQuantizationType(KINDS[kind].number))
    # Our own scales: the package gives a block of zeros none.
    with np.errstate(over="ignore"):
        scales = matrix.scales.astype("<f2")[..., None].view(np.uint8)
    packed.reshape(len(codes), -1, KINDS[kind].bytes)[..., -2:] = scales
    return packed


def _decode(stored: _Array, kind: str, matrix: TernaryMatrix, levels: tuple[int, ...]) -> _Array:
    """Undo ``_encode``: return the codes, int8[R, C].

    Parameters
    ----------
    stored : array
    kind : str
    matrix : TernaryMatrix
        Of the same shape, with the scales.
    levels : tuple of int
        The scheme's codes.

    Raises
    ------
    ValueError
        If ``stored`` is not the result of ``_encode``.
    """
    rows, cols = matrix.shape
    # Not a code.
    codes = np.full((rows, cols), -128, np.int8)
    if kind in _FLOATS:
        scales = np.repeat(matrix.scales, matrix.group, axis=1)[:, :cols]
        # With a scale of 0 all codes give the same; the smallest, which comes last, is taken.
        for level in sorted(levels, key=abs, reverse=True):
            with np.errstate(over="ignore"):
                codes[stored == np.float32(level) * scales] = level
    else:
        gguf = load_gguf()
        packed = stored.copy()
        own = packed.reshape(rows, -1, KINDS[kind].bytes)[..., -2:]
        if not (own.copy().view("<f2")[..., 0] == matrix.scales).all():
            raise ValueError(f"its blocks have other scales than {_SCALES}")
        own[...] = np.array([1.0], "<f2").view(np.uint8)
        number = gguf.GGMLQuantizationType(KINDS[kind].number)
        codes[...] = gguf.quants.dequantize(packed, number)
    if not np.isin(codes, levels).all():
        raise ValueError("it holds a number that is not a code of its scheme")
    return codes


# ---------------------------------------------------------------------------------------------
# Writing


def export_gguf(
    model: LegacyLLM,
    path: str | os.PathLike[str],
    kind: str | None = None,
    tokenizer: Tokenizer | None = None,
) -> None:
    """Write a model for llama.cpp, as a whole or not at all.

    Parameters
    ----------
    model : LegacyLLM
    path : path-like
        The file; an existing one is replaced.
    kind : {"tq2_0", "tq1_0", "f16", "f32"}, optional
        The type of the matrices of codes; all other weights are float32. By default it is the
        first of tq2_0, f16 and f32 that holds the codes exactly. (tq1_0 is smaller than tq2_0, and
        slower.)
    tokenizer : Tokenizer, optional
        The model's; by default tokens are bytes.

    Raises
    ------
    ValueError
        If llama.cpp does not have such models, the type does not hold the codes exactly, a weight
        is nonfinite, the tokenizer is of another model, or gguf is not installed.
    OSError
        If the file cannot be written; an earlier one is untouched.
    """
    gguf = load_gguf()
    check_model(model, "llama_cpp")
    tokenizer = fit_tokenizer(tokenizer, model.config.vocab_size)
    kind, tensors = _first_fit(model) if kind is None else (kind, _encode_all(model, kind))
    with (
        atomic_path(path) as temporary,
        contextlib.closing(gguf.GGUFWriter(temporary, _ARCHITECTURE)) as writer,
    ):
        _add_keys(writer, model, tokenizer)
        writer.add_file_type(KINDS[kind].file_type)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        number = gguf.GGMLQuantizationType(KINDS[kind].number)
        for name, tensor in tensors.items():
            writer.add_tensor(name, tensor, raw_dtype=number if tensor.dtype == np.uint8 else None)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()


def _first_fit(model: LegacyLLM) -> tuple[str, dict[str, _Array]]:
    for kind in ("tq2_0", "f16"):
        with contextlib.suppress(ValueError):
            return kind, _encode_all(model, kind)
    return "f32", _encode_all(model, "f32")


def _encode_all(model: LegacyLLM, kind: str) -> dict[str, _Array]:
    """Return a model's tensors by llama.cpp's names."""
    config, tensors = model.config, {}
    check_kind(config, kind)
    for ours, names in tensor_names(config).items():
        value = model.parameters[ours]
        if not isinstance(value, TernaryMatrix):
            tensors[names.llama_cpp] = value
            continue
        stored = _encode(value, kind)
        try:
            same = np.array_equal(
                _decode(stored, kind, value, SCHEMES[config.scheme].levels), value.values
            )
        except ValueError:
            same = False
        if not same:
            instead = "" if kind == "f32" else ": --type f32"
            raise ValueError(f"{kind} does not hold {ours} exactly{instead}")
        tensors[names.llama_cpp] = stored
    return tensors


def _add_keys(writer: Any, model: LegacyLLM, tokenizer: Tokenizer) -> None:
    config, provenance = model.config, model.provenance
    writer.add_name(_unicode(f"legacy1bit, trained on {provenance.data or 'unknown data'}"))
    if provenance.license:
        writer.add_license(_unicode(provenance.license))
    for name, value in _shape_keys(config).items():
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        add(name, value)
    for name, value in _tokenizer_keys(tokenizer, config.vocab_size).items():
        if isinstance(value, list):
            writer.add_array(name, value)
        elif isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        else:
            writer.add_string(name, value)
    writer.add_string(_CONFIG, json.dumps(config.to_dict()))
    writer.add_string(_PROVENANCE, json.dumps(provenance.to_dict()))
    scales = [value.scales.ravel() for value in _matrices(model).values()]
    if scales:
        writer.add_array(_SCALES, np.concatenate(scales).tolist())


def _unicode(text: str) -> str:
    """Return a text with question marks for surrogates, which are bytes that were not UTF-8."""
    return text.encode(errors="replace").decode()


def _shape_keys(config: ModelConfig) -> dict[str, int | float]:
    """Return llama.cpp's keys of a model's shape."""
    keys = {
        "context_length": config.sequence_length,
        "embedding_length": config.model_dim,
        "block_count": config.num_blocks,
        "feed_forward_length": config.ffn_dim,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_heads,
        "attention.layer_norm_epsilon": LAYER_NORM_EPSILON,
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": float(config.rope_base),
        "vocab_size": config.vocab_size,
    }
    return {f"{_ARCHITECTURE}.{name}": value for name, value in keys.items()}


def _matrices(model: LegacyLLM) -> dict[str, TernaryMatrix]:
    """Return the matrices of codes by name, in the order of the layout."""
    return {
        name: value
        for name, *_ in parameter_layout(model.config)
        if isinstance(value := model.parameters[name], TernaryMatrix)
    }


def _tokenizer_keys(tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any]:
    """Return the keys of a tokenizer, as a byte-level BPE."""
    special: tuple[str, ...] = ()
    merges = []
    if isinstance(tokenizer, SubwordTokenizer):
        special, characters = SPECIAL_TOKENS, tokenizer.spelled_tokens()[: -len(SPECIAL_TOKENS)]
        merges = [" ".join(merge) for merge in tokenizer.spelled_merges()]
    else:
        characters = visible_bytes()[: tokenizer.vocab_size]
    # Tokens that are not bytes never come from text.
    others = [f"<{token}>" for token in range(tokenizer.vocab_size, vocab_size)]
    kinds = [_NORMAL] * len(characters) + [_CONTROL] * len(special) + [_UNUSED] * len(others)
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    keys = {
        "model": "gpt2",
        # The pre-tokenization of GPT-2. Without merges it does not matter.
        "pre": "gpt-2",
        "tokens": [*characters, *special, *others],
        "token_type": kinds,
        "merges": merges or [_NO_MERGE],
        "add_space_prefix": False,
        "add_bos_token": bos is not None,
        "add_eos_token": False,
        "bos_token_id": bos,
        # Texts of bytes have no end-of-text token; llama.cpp would take token 11. Byte 0 is the
        # rarest in texts.
        "eos_token_id": 0 if eos is None else eos,
        "padding_token_id": tokenizer.vocab_size - 1 if special else None,
    }
    return {_TOKENIZER + name: value for name, value in keys.items() if value is not None}


# ---------------------------------------------------------------------------------------------
# Reading


def import_gguf(path: str | os.PathLike[str]) -> LegacyLLM:
    """Read a model from a file that ``export_gguf`` wrote.

    The reader of the gguf package trusts the sizes in a file; here each is checked first.

    Parameters
    ----------
    path : path-like

    Returns
    -------
    LegacyLLM
        The model as it was, to the bit; it has no latent weights.

    Raises
    ------
    ModelFileError
        If it is not such a file, or damaged, or the gguf package is needed and not installed.
    OSError
        If it cannot be read.
    """
    with open_regular(path) as file:
        try:
            return _read(GgufReader(file))
        except (RecursionError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise ModelFileError(f"{Path(path)} cannot be read: {reason}") from None


def import_gguf_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Read the tokenizer of a file that ``export_gguf`` wrote.

    Raises
    ------
    ModelFileError
        If it is not such a file, or damaged, or ``tokenizers`` is needed and not installed.
    OSError
        If it cannot be read.
    """
    with open_regular(path) as file:
        try:
            keys, _ = GgufReader(file).head()
            return _tokenizer_of(keys)
        except (RecursionError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise ModelFileError(f"{Path(path)} cannot be read: {reason}") from None


def _tokenizer_of(keys: dict[str, Any]) -> Tokenizer:
    vocab_size = _config_of(keys).vocab_size
    stored = [keys.get(f"{_TOKENIZER}{name}") for name in ("tokens", "merges")]
    lists = [texts.tolist() for texts in stored if isinstance(texts, Texts)]
    if len(lists) < len(stored):
        raise ValueError("it has no tokenizer")
    tokens, merges = lists
    tokenizer: Tokenizer
    if tuple(tokens[-len(SPECIAL_TOKENS) :]) == SPECIAL_TOKENS:
        pairs = (merge.split(" ") for merge in merges if merge != _NO_MERGE)
        tokenizer = fit_tokenizer(SubwordTokenizer.of_spelled(pairs), vocab_size)
    else:
        tokenizer = ByteTokenizer(min(vocab_size, 256))
    for name, value in _tokenizer_keys(tokenizer, vocab_size).items():
        found = keys.get(name)
        if (found.tolist() if isinstance(found, np.ndarray | Texts) else found) != value:
            raise ValueError(f"its key {name} is not as legacy1bit writes it")
    return tokenizer


def _read(reader: GgufReader) -> LegacyLLM:
    keys, tensor_count = reader.head()
    config = _config_of(keys)
    stored = _check_tensors(config, reader.tensors(tensor_count), reader)
    model = LegacyLLM(config)
    model.provenance = Provenance.from_json(_text(keys, _PROVENANCE))
    _fill_scales(model, keys.get(_SCALES))
    for name, kind, shape in stored:
        reader.align()
        tensor = np.frombuffer(reader.take(math.prod(shape)), np.uint8).reshape(shape)
        if kind in _FLOATS:
            tensor = tensor.view(_FLOATS[kind])
        value = model.parameters[name]
        if isinstance(value, TernaryMatrix):
            try:
                value.values[...] = _decode(tensor, kind, value, SCHEMES[config.scheme].levels)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        else:
            value[...] = tensor
    check_model(model, "llama_cpp")
    return model


def _text(keys: dict[str, Any], name: str) -> str:
    value = keys.get(name)
    if not isinstance(value, str):
        raise ValueError(f"its key {name} is not a text")
    return value


def _config_of(keys: dict[str, Any]) -> ModelConfig:
    """Return a model's settings, with which llama.cpp's keys must agree."""
    if _CONFIG not in keys:
        raise ValueError(
            f"it is a model of {keys.get('general.architecture')!r} without the key {_CONFIG}; "
            "only files that legacy1bit wrote can be read"
        )
    settings = json.loads(_text(keys, _CONFIG))
    config = ModelConfig.from_dict(settings)
    missing = sorted(config.to_dict().keys() - settings.keys())
    if missing:
        raise ValueError(f"it has no setting {missing[0]!r}")
    family_of(config, "llama_cpp")
    for name, value in _shape_keys(config).items():
        # The file's numbers have single precision.
        expected = float(np.float32(value)) if isinstance(value, float) else value
        stored = keys.get(name)
        if type(stored) is not type(expected) or stored != expected:
            raise ValueError(f"its key {name} is {stored}, expected {expected}")
    return config


def _check_tensors(
    config: ModelConfig, tensors: dict[str, tuple[tuple[int, ...], int, int]], reader: GgufReader
) -> list[tuple[str, str, tuple[int, ...]]]:
    """Return our name, type and shape in bytes of each tensor, in the order they are stored.

    Raises
    ------
    ValueError
        If they are not those of such a model, one after the other, or the file is too small.
    """
    layout = {part.name: part for part in parameter_layout(config)}
    ours = {names.llama_cpp: name for name, names in tensor_names(config).items()}
    if tensors.keys() != ours.keys():
        odd = sorted(tensors.keys() ^ ours.keys())[0]
        raise ValueError(f"it has {'an unknown' if odd in tensors else 'no'} tensor {odd!r}")
    kinds = {kind.number: name for name, kind in KINDS.items()}
    stored, coded, end = [], set(), 0
    for name, (shape, number, start) in tensors.items():
        part = layout[ours[name]]
        if shape != part.shape:
            raise ValueError(f"{name} has shape {list(shape)}, expected {list(part.shape)}")
        kind = kinds.get(number)
        if kind is None or (part.kind != "quantized" and kind != "f32"):
            raise ValueError(f"{name} has type {number}, expected one of its own")
        if part.kind == "quantized":
            check_kind(config, kind)
            coded.add(kind)
        if start != -(-end // _ALIGNMENT) * _ALIGNMENT:
            raise ValueError(f"{name} is stored at {start}, where another tensor is, or none")
        stored.append((ours[name], kind, KINDS[kind].shape(shape)))
        end = start + math.prod(stored[-1][2])
    if len(coded) > 1:
        raise ValueError(f"its matrices have different types: {', '.join(sorted(coded))}")
    reader.align()
    reader.check(end)
    return stored


def _fill_scales(model: LegacyLLM, scales: Any) -> None:
    matrices = _matrices(model)
    count = sum(matrix.scales.size for matrix in matrices.values())
    if count and not (
        isinstance(scales, np.ndarray) and scales.dtype == np.float32 and scales.size == count
    ):
        raise ValueError(f"its key {_SCALES} is not a list of {count} numbers in float32")
    if count and not np.isfinite(scales).all():
        raise ValueError("a scale is not a finite number")
    start = 0
    for matrix in matrices.values():
        matrix.scales.reshape(-1)[...] = scales[start : start + matrix.scales.size]
        start += matrix.scales.size
    if model.config.scale == "one" and any((one.scales != 1.0).any() for one in matrices.values()):
        raise ValueError("a scale is not 1")
