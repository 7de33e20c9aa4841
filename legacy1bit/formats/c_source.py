"""A model as one C source file, which needs only a C99 compiler and its libraries.

The code is the template ``model.c``: Python keeps the parts that the model's architecture needs,
fills in the constants and appends the weights. It computes the same as ``inference.Decoder``.
"""

import os
import re
import textwrap
from dataclasses import asdict
from importlib.resources import files
from string import Template

import numpy as np
import numpy.typing as npt

from legacy1bit.data.tokenizer import Tokenizer, check_bytes
from legacy1bit.formats.provenance import Provenance
from legacy1bit.hyperparams import ModelConfig
from legacy1bit.model import LegacyLLM
from legacy1bit.packed import Int8Matrix, PackedMatrix, PackedModel
from legacy1bit.schemes import FLOAT, SCHEMES
from legacy1bit.system.files import atomic_write

_BYTES = 256

# Codes in a word of memory, two bits each.
_CODES = 16

# Codes in a word of the file, by the number of levels: the digits of a number below 2^32.
_PACKED = {2: 32, 3: 20, 4: 16}

# More columns than a matrix can have: the group is the whole row.
_WHOLE_ROW = 1 << 20

# The members of the template's structs, and their parameters; of a norm, its layer.
_NORMS = {
    "norm1": "norm1",
    "heads_norm": "attention",
    "norm2": "norm2",
    "hidden_norm": "ffn",
}
_MATRICES = {
    **{f"w{which}": f"attention.w{which}" for which in "qkvo"},
    "wg": "ffn.wg",
    "wi": "ffn.wi",
    "wo_ffn": "ffn.wo",
}
_VECTORS = {"q_gamma": "attention.q_gamma", "k_gamma": "attention.k_gamma"}


def export_c(
    model: LegacyLLM, path: str | os.PathLike[str], tokenizer: Tokenizer | None = None
) -> None:
    """Write a model as one C99 source file, its weights inside.

    The program continues a prompt as ``inference.generate`` does. The file says how to compile it.

    Parameters
    ----------
    model : LegacyLLM
    path : path-like
        The file to write; an existing one is replaced.
    tokenizer : Tokenizer, optional
        The model's; it must be of bytes.

    Raises
    ------
    ValueError
        If the model's tokens are not bytes, or more than 256, if it has YaRN or heads that rotate
        partially, or if a weight is not finite.
    OSError
        If the file cannot be written.
    """
    config = model.config
    check_bytes(tokenizer)
    if config.vocab_size > _BYTES:
        raise ValueError(
            f"the model has {config.vocab_size} tokens, expected at most {_BYTES}: a C program "
            "reads and writes bytes"
        )
    lacking = (
        (config.rope_factor > 1.0, "YaRN", "--rope-factor 1 --rope-original-length 0"),
        (config.rope_fraction < 1.0, "rotary positions of a part of a head", "--rope-fraction 1"),
    )
    for lacks, option, instead in lacking:
        if lacks:
            raise ValueError(f"models as C source have no {option}: train with {instead}")
    packed = PackedModel(model, head="float")
    code = files("legacy1bit.formats").joinpath("model.c").read_text("ascii")
    places = _places(packed)
    code = _select(code, _parts(config))
    parts = [Template(code).substitute(_constants(config, model.provenance, places))]
    for name, values in packed.parameters.items():
        assert not isinstance(values, Int8Matrix)
        parts += _tables(name, values)
    parts += _structs(packed, places)
    atomic_write(path, "".join(parts).encode("ascii"))


def _places(model: PackedModel) -> dict[str, int]:
    """Return the first word of each matrix of codes in memory, and as "" the end of all."""
    places, end = {}, 0
    for name, values in model.parameters.items():
        if isinstance(values, PackedMatrix):
            places[name] = end
            end += values.shape[0] * -(-values.shape[1] // _CODES)
    return {**places, "": end}


def _select(template: str, chosen: set[str]) -> str:
    """Return a template with those of its parts that are chosen.

    A line ``$if a b`` begins what is there if a or b is chosen, ``$else`` what is there otherwise,
    and ``$end`` ends both.
    """
    lines, kept = [], [True]
    for line in template.splitlines(keepends=True):
        word, *names = line.split() or [""]
        if word == "$if":
            kept.append(not chosen.isdisjoint(names))
        elif word == "$else":
            kept[-1] = not kept[-1]
        elif word == "$end":
            kept.pop()
        elif all(kept):
            lines.append(line)
    return "".join(lines)


def _parts(config: ModelConfig) -> set[str]:
    """Return the parts of the template that a model of these settings has."""
    # Without the part "heads" all heads together are as wide as the residual stream.
    chosen = {
        "heads": (config.query_dim, config.kv_dim) != (config.model_dim, config.model_dim),
        "spans": len(set(config.windows)) > 1,
        config.norm: True,
        "norm_bias": config.norm_bias,
        "qk_norm": config.qk_norm,
        "gated": config.gated,
        config.activation: True,
    }
    return {name for name, is_chosen in chosen.items() if is_chosen}


def _constants(
    config: ModelConfig, provenance: Provenance, places: dict[str, int]
) -> dict[str, object]:
    """Return the values of the template's placeholders."""
    levels = (0, 1) if config.scheme == FLOAT else SCHEMES[config.scheme].levels
    settings = ", ".join(f"{name}={value}" for name, value in config.to_dict().items())
    lines = [
        f"generator: {provenance.to_dict()['generator']}",
        *provenance.lines(),
        *textwrap.wrap(f"settings: {settings}", 90),
    ]
    heads = "heads" in _parts(config)
    # The widest input of a matrix; most often that of the feed-forward layer.
    widths = {"FFN": config.ffn_dim, "DIM": config.model_dim, "QUERY_DIM": config.query_dim}
    adjacent = config.rope_pairs == "adjacent"
    return {
        **asdict(config),
        "description": "\n".join(f" * {_comment(line)}" for line in lines),
        "span": config.windows[0],
        "query_dim": "QUERY_DIM" if heads else "DIM",
        "kv_dim": "KV_DIM" if heads else "DIM",
        "kv_heads": "KV_HEADS" if heads else "HEADS",
        "kv_head": "kv_head" if heads else "head",
        "at": "at" if heads else "head * HEAD_DIM",
        "wide": max(widths, key=lambda name: widths[name]),
        "low": "2 * i" if adjacent else "i",
        "high": "2 * i + 1" if adjacent else "i + HEAD_DIM / 2",
        "norms": "layer norms" if config.norm == "layer" else "RMS norms",
        "epsilon": _epsilon(config),
        "rope": int(config.positions == "rope"),
        "rope_base": repr(float(config.rope_base)),
        "squared": int(config.activation == "relu2"),
        "lowest": levels[0],
        "step": levels[1] - levels[0],
        "base": len(levels),
        "packed": _PACKED[len(levels)],
        # An array of C99 is not empty.
        "words": max(places[""], 1),
        "one_scale": int(config.scale in ("tensor", "one") and config.scale_shards == 1),
        "group": int(config.scale) if config.scale.isdigit() else _WHOLE_ROW,
    }


def _epsilon(config: ModelConfig) -> str:
    """Return the epsilon of the norms as an expression of C."""
    digits = np.format_float_scientific(np.float32(config.norm_epsilon), trim="-", exp_digits=1)
    if config.norm == "layer" and digits == "1e-5":
        # As in the files of earlier versions.
        return "1e-5f"
    # Where an x87 calculates, a constant has more digits than a float, until it is cast.
    return f"((float){digits}f)"


def _comment(text: str) -> str:
    """Return a text in ASCII, without beginnings or ends of comments, and without trigraphs."""
    plain = text.encode("unicode_escape").decode("ascii")
    return re.sub(r"\*(?=/)|/(?=\*)|\?(?=\?)", r"\g<0> ", plain)


def _tables(name: str, values: PackedMatrix | npt.NDArray[np.float32]) -> list[str]:
    """Return the C arrays of a parameter."""
    numbers = values.scales if isinstance(values, PackedMatrix) else values
    if not np.isfinite(numbers).all():
        raise ValueError(f"{name} holds a number that is not finite")
    table = _table_name(name)
    if isinstance(values, PackedMatrix):
        return [
            *_array("uint32_t", table, _hex_lines(_code_words(values))),
            *_array("float", f"{table}_scales", _float_lines(values.scales)),
        ]
    if values.ndim == 2:
        upper = (values.view(np.uint32) >> 16).astype(">u2")
        return _array("uint16_t", table, _hex_lines(upper))
    return _array("float", table, _float_lines(values))


def _table_name(name: str) -> str:
    return name.replace(".", "_")


def _array(kind: str, name: str, lines: list[str]) -> list[str]:
    return [f"static const {kind} {name}[] = {{\n", *lines, "};\n\n"]


def _code_words(matrix: PackedMatrix) -> npt.NDArray[np.uint32]:
    """Return a matrix's codes, row by row, as digits of numbers: big-endian uint32[W].

    A digit is the index of a code among the levels, the first code the lowest digit.
    """
    base, lowest = len(matrix.levels), matrix.levels[0]
    step, count = matrix.levels[1] - lowest, _PACKED[len(matrix.levels)]
    codes = matrix.values.ravel()
    places = np.zeros((-(-codes.size // count), count), np.uint8)
    places.reshape(-1)[: codes.size] = (codes - np.int8(lowest)) // np.int8(step)
    words = np.zeros(len(places), np.uint32)
    for digit in reversed(range(count)):
        words = words * np.uint32(base) + places[:, digit]
    return words.astype(">u4")


def _hex_lines(numbers: npt.NDArray[np.uint16] | npt.NDArray[np.uint32]) -> list[str]:
    """Return big-endian numbers as lines of a C array, in hexadecimal digits."""
    size = numbers.itemsize
    raw, line = numbers.tobytes(), 32 if size == 4 else 24
    return [
        "    0x" + raw[i : i + line].hex(",", -size).replace(",", ", 0x") + ",\n"
        for i in range(0, len(raw), line)
    ]


def _float_lines(numbers: npt.NDArray[np.float32]) -> list[str]:
    """Return floats as lines of a C array, with the nine digits that distinguish any two."""
    words = [f"{number:.8e}f" for number in numbers.ravel().tolist()]
    return [f"    {', '.join(words[i : i + 5])},\n" for i in range(0, len(words), 5)]


def _structs(model: PackedModel, places: dict[str, int]) -> list[str]:
    """Return the structs that point at the arrays."""
    parts = [f"const struct block blocks[{model.config.num_blocks}] = {{\n"]
    for i in range(model.config.num_blocks):
        parts.append("    {\n")
        for member, layer in _NORMS.items():
            if norm := _norm(model, f"blocks.{i}.{layer}"):
                parts.append(f"        .{member} = {norm},\n")
        for member, layer in _MATRICES.items():
            name = f"blocks.{i}.{layer}"
            if name in model.parameters:
                # The name of a bias has a b for the w of its matrix.
                bias = f"blocks.{i}.{layer.replace('w', 'b')}"
                parts.append(f"        .{member} = {_matrix(model, name, bias, places)},\n")
        for member, layer in _VECTORS.items():
            name = f"blocks.{i}.{layer}"
            if name in model.parameters:
                parts.append(f"        .{member} = {_table_name(name)},\n")
        if len(set(model.config.windows)) > 1:
            parts.append(f"        .span = {model.config.windows[i]},\n")
        parts.append("    },\n")
    parts.append("};\n\n")
    output = "embedding" if model.config.tied_embeddings else "output"
    for member, name in (("embedding", "embedding"), ("output", output)):
        value = _matrix(model, f"{name}.weight", f"{member}.bias", places)
        parts.append(f"const struct matrix {member} = {value};\n")
    # An initializer of C99 is not empty.
    parts.append(
        f"const struct norm final_norm = {_norm(model, 'final_norm') or '{NULL, NULL}'};\n"
    )
    return parts


def _norm(model: PackedModel, name: str) -> str:
    """Return the initializer of a norm; empty if the model does not have it."""
    if f"{name}.gamma" not in model.parameters:
        return ""
    table = _table_name(name)
    beta = f"{table}_beta" if f"{name}.beta" in model.parameters else "NULL"
    return f"{{{table}_gamma, {beta}}}"


def _matrix(model: PackedModel, name: str, bias: str, places: dict[str, int]) -> str:
    """Return the initializer of a matrix, with its bias if the model has it."""
    weights, table = model.parameters[name], _table_name(name)
    rows, cols = weights.shape
    members = [f".rows = {rows}, .cols = {cols}"]
    if isinstance(weights, PackedMatrix):
        members.append(f".packed = {table}, .scales = {table}_scales, .first = {places[name]}")
    else:
        members.append(f".upper = {table}")
    if bias in model.parameters:
        members.append(f".bias = {_table_name(bias)}")
    return "{" + ",\n            ".join(members) + "}"
