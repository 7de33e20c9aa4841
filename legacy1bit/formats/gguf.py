"""GGUF files: an unmodified llama.cpp runs them, and they come back as the models they were.

The matrices of codes have one of llama.cpp's types, embedding and output matrix one by choice; all
other weights are float32. Keys of our own have the rest: settings, provenance and scales. The
tokenizer is written as a byte-level BPE.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import contextlib
import json
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from legacy1bit.data.published_tokenizer import NO_MERGE, PublishedTokenizer
from legacy1bit.data.tokenizer import (
    SPECIAL_TOKENS,
    ByteTokenizer,
    SubwordTokenizer,
    Tokenizer,
    fit_tokenizer,
    visible_bytes,
)
from legacy1bit.formats.families import (
    check_model,
    family_of,
    reordered,
    row_order,
    stored_config,
    tensor_names,
)
from legacy1bit.formats.ggml import (
    CODE_KINDS,
    FLOAT_KINDS,
    KINDS,
    as_type,
    check_embedding_kind,
    check_kind,
    decode,
    decode_floats,
    encode,
    encode_floats,
    load_gguf,
)
from legacy1bit.formats.gguf_file import GgufReader, Texts
from legacy1bit.formats.provenance import Provenance
from legacy1bit.hyperparams import ModelConfig
from legacy1bit.layout import parameter_layout
from legacy1bit.model import LegacyLLM, ModelFileError, TernaryMatrix
from legacy1bit.system.files import atomic_path, open_regular

_Array = npt.NDArray[Any]


_EMBEDDINGS = ("embedding.weight", "output.weight")
_CONFIG, _PROVENANCE, _SCALES = "legacy1bit.config", "legacy1bit.provenance", "legacy1bit.scales"
# Whether the tokenizer is one that others published.
_PUBLISHED = "legacy1bit.published_tokenizer"

_ALIGNMENT = 32

# Types of tokens.
_NORMAL, _CONTROL, _UNUSED = 1, 3, 5

_TOKENIZER = "tokenizer.ggml."


# ---------------------------------------------------------------------------------------------
# Writing


class _Stored(NamedTuple):
    """A tensor of a file: its type, its shape, and its numbers or the bytes of its blocks."""

    kind: str
    shape: tuple[int, ...]
    data: _Array


def export_gguf(
    model: LegacyLLM,
    path: str | os.PathLike[str],
    kind: str | None = None,
    tokenizer: Tokenizer | None = None,
    embedding_kind: str | None = None,
) -> None:
    """Write a model for llama.cpp, as a whole or not at all.

    Parameters
    ----------
    model : LegacyLLM
    path : path-like
        The file; an existing one is replaced.
    kind : {"tq2_0", "tq1_0", "q2_0", "f16", "f32"}, optional
        The type of the matrices of codes. By default it is the first of tq2_0, f16 and f32 that
        holds the codes exactly. (tq1_0 is smaller than tq2_0, and slower.)
    tokenizer : Tokenizer, optional
        The model's; by default tokens are bytes.
    embedding_kind : {"f32", "f16", "q8_0"} or one of the above, optional
        The type of embedding and output matrix: without codes f32 by default, and rounded to f16
        and q8_0 by choice; with codes one that holds them exactly, by default ``kind``.

    Raises
    ------
    ValueError
        If llama.cpp does not have such models, a type does not hold the codes exactly, a weight
        is nonfinite, the tokenizer is of another model, or gguf is not installed.
    OSError
        If the file cannot be written; an earlier one is untouched.
    """
    gguf = load_gguf()
    family = check_model(model, "llama_cpp")
    tokenizer = fit_tokenizer(tokenizer, model.config.vocab_size)
    kind, tensors = _first_fit(model, kind, embedding_kind)
    with (
        atomic_path(path) as temporary,
        contextlib.closing(gguf.GGUFWriter(temporary, family.architecture)) as writer,
    ):
        _add_keys(writer, model, tokenizer)
        writer.add_file_type(KINDS[kind].file_type)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for name, (stored_as, shape, data) in tensors.items():
            # The package does not know each of the types, and takes bytes for blocks of one.
            writer.add_tensor(
                name,
                data.view(np.int8) if data.dtype == np.uint8 else data,
                raw_shape=shape,
                raw_dtype=KINDS[stored_as].number,
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()


def _first_fit(
    model: LegacyLLM, kind: str | None, embedding_kind: str | None
) -> tuple[str, dict[str, _Stored]]:
    if kind is not None:
        return kind, _encode_all(model, kind, embedding_kind)
    for one in ("tq2_0", "f16"):
        with contextlib.suppress(ValueError):
            return one, _encode_all(model, one, embedding_kind)
    return "f32", _encode_all(model, "f32", embedding_kind)


def _encode_all(model: LegacyLLM, kind: str, embedding_kind: str | None) -> dict[str, _Stored]:
    """Return a model's tensors by llama.cpp's names."""
    config, tensors = model.config, {}
    pairs = family_of(config, "llama_cpp").llama_cpp_pairs
    check_kind(config, kind)
    if embedding_kind is None:
        embedding_kind = kind if config.ternary_embedding else "f32"
    check_embedding_kind(config, embedding_kind)
    for name, ours in _names(config).items():
        value = reordered(model, ours, pairs)
        chosen = embedding_kind if ours in _EMBEDDINGS else kind
        if isinstance(value, TernaryMatrix):
            data = encode(value, chosen)
            try:
                same = np.array_equal(decode(data, chosen, value, config.scheme), value.values)
            except ValueError:
                same = False
            if not same:
                option = "--type" if chosen == kind else "--embedding-type"
                instead = "" if chosen == "f32" else f": {option} f32"
                raise ValueError(f"{chosen} does not hold {ours} exactly{instead}")
        elif ours in _EMBEDDINGS:
            try:
                data = encode_floats(value, chosen)
            except ValueError as error:
                raise ValueError(f"{ours}: {error}") from None
        else:
            chosen, data = "f32", value
        tensors[name] = _Stored(chosen, value.shape, data)
    return tensors


def _names(config: ModelConfig) -> dict[str, str]:
    """Return our names of a model's parameters by llama.cpp's.

    Where its architecture demands an output matrix, that of tied embeddings is the embedding.
    """
    names = {names.llama_cpp: ours for ours, names in tensor_names(config).items()}
    if config.tied_embeddings and family_of(config, "llama_cpp").architecture == "nemotron":
        names["output.weight"] = "embedding.weight"
    return names


def _add_keys(writer: Any, model: LegacyLLM, tokenizer: Tokenizer) -> None:
    config, provenance = model.config, model.provenance
    writer.add_name(_unicode(f"legacy1bit, trained on {provenance.data or 'unknown data'}"))
    if provenance.license:
        writer.add_license(_unicode(provenance.license))
    keys = shape_keys(config) | _tokenizer_keys(tokenizer, config.vocab_size)
    for name, value in keys.items():
        add = {
            list: writer.add_array,
            bool: writer.add_bool,
            int: writer.add_uint32,
            float: writer.add_float32,
            str: writer.add_string,
        }[type(value)]
        add(name, value)
    writer.add_string(_CONFIG, json.dumps(config.to_dict()))
    writer.add_string(_PROVENANCE, json.dumps(provenance.to_dict()))
    scales = [value.scales.ravel() for value in _matrices(model).values()]
    if scales:
        writer.add_array(_SCALES, np.concatenate(scales).tolist())


def _unicode(text: str) -> str:
    """Return a text with question marks for surrogates, which are bytes that were not UTF-8."""
    return text.encode(errors="replace").decode()


def shape_keys(config: ModelConfig) -> dict[str, int | float | str]:
    """Return llama.cpp's keys of a model's shape."""
    epsilon = {"layer": "layer_norm_epsilon", "rms": "layer_norm_rms_epsilon"}[config.norm]
    keys: dict[str, int | float | str] = {
        "context_length": config.sequence_length,
        "embedding_length": config.model_dim,
        "block_count": config.num_blocks,
        "feed_forward_length": config.ffn_dim,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        f"attention.{epsilon}": config.norm_epsilon,
        "rope.dimension_count": config.rotary_dim,
        "rope.freq_base": float(config.rope_base),
        "vocab_size": config.vocab_size,
    }
    if config.query_dim != config.model_dim:
        keys["attention.key_length"] = keys["attention.value_length"] = config.head_dim
    if config.rope_factor > 1.0:
        keys["rope.scaling.type"] = "yarn"
        keys["rope.scaling.factor"] = float(config.rope_factor)
        keys["rope.scaling.original_context_length"] = config.rope_original_length
    architecture = family_of(config, "llama_cpp").architecture
    return {f"{architecture}.{name}": value for name, value in keys.items()}


def _matrices(model: LegacyLLM) -> dict[str, TernaryMatrix]:
    """Return the matrices of codes by name, in the order of the layout."""
    return {
        name: value
        for name, *_ in parameter_layout(model.config)
        if isinstance(value := model.parameters[name], TernaryMatrix)
    }


def _tokenizer_keys(tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any]:
    """Return the keys of a tokenizer, of our own as a byte-level BPE."""
    if isinstance(tokenizer, PublishedTokenizer):
        return {_PUBLISHED: True, **tokenizer.gguf_keys()}
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
        "merges": merges or [NO_MERGE],
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
    if keys.get(_PUBLISHED) is True:
        return PublishedTokenizer.of_gguf(keys, vocab_size)
    stored = [keys.get(f"{_TOKENIZER}{name}") for name in ("tokens", "merges")]
    lists = [texts.tolist() for texts in stored if isinstance(texts, Texts)]
    if len(lists) < len(stored):
        raise ValueError("it has no tokenizer")
    tokens, merges = lists
    tokenizer: Tokenizer
    if tuple(tokens[-len(SPECIAL_TOKENS) :]) == SPECIAL_TOKENS:
        pairs = (merge.split(" ") for merge in merges if merge != NO_MERGE)
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
    pairs = family_of(config, "llama_cpp").llama_cpp_pairs
    done = set()
    for name, kind, shape in stored:
        reader.align()
        content = np.frombuffer(reader.take(math.prod(shape)), np.uint8)
        tensor = as_type(content.reshape(shape), kind)
        ours, theirs = model.parameters[name], reordered(model, name, pairs)
        if isinstance(theirs, TernaryMatrix):
            try:
                found = decode(tensor, kind, theirs, config.scheme)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        else:
            found = decode_floats(tensor, kind)
        values = ours.values if isinstance(ours, TernaryMatrix) else ours
        if name in done and not np.array_equal(found, values):
            raise ValueError("its output matrix is not its embedding, and these are tied")
        done.add(name)
        order = row_order(config, name, pairs)
        values[... if order is None else order] = found
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
            "only files that legacy1bit wrote can be read (generate, chat and export take those of "
            "others as they are)"
        )
    config = stored_config(json.loads(_text(keys, _CONFIG)))
    family_of(config, "llama_cpp")
    for name, value in shape_keys(config).items():
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
    ours = _names(config)
    if tensors.keys() != ours.keys():
        odd = sorted(tensors.keys() ^ ours.keys())[0]
        raise ValueError(f"it has {'an unknown' if odd in tensors else 'no'} tensor {odd!r}")
    kinds = {kind.number: name for name, kind in KINDS.items()}
    stored, end = [], 0
    # The types of embedding and output matrix, and those of the other matrices.
    outer: set[str] = set()
    inner: set[str] = set()
    for name, (shape, number, start) in tensors.items():
        part = layout[ours[name]]
        if shape != part.shape:
            raise ValueError(f"{name} has shape {list(shape)}, expected {list(part.shape)}")
        kind = kinds.get(number, "")
        is_outer = part.name in _EMBEDDINGS
        floats = FLOAT_KINDS if is_outer else ("f32",)
        if kind not in (CODE_KINDS if part.kind == "quantized" else floats):
            raise ValueError(f"{name} has type {number}, expected one of its own")
        if is_outer:
            check_embedding_kind(config, kind)
            outer.add(kind)
        elif part.kind == "quantized":
            check_kind(config, kind)
            inner.add(kind)
        if start != -(-end // _ALIGNMENT) * _ALIGNMENT:
            raise ValueError(f"{name} is stored at {start}, where another tensor is, or none")
        stored.append((ours[name], kind, KINDS[kind].shape(shape)))
        end = start + math.prod(stored[-1][2])
    for chosen in (outer, inner):
        if len(chosen) > 1:
            raise ValueError(f"its matrices have different types: {', '.join(sorted(chosen))}")
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
