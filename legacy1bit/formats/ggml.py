"""The types of tensors in GGUF files: matrices of codes, embeddings and output matrices as bytes.

The layout of the blocks: ``ggml/src/ggml-common.h`` and ``ggml/src/ggml-quants.c`` of llama.cpp.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from legacy1bit.hyperparams import ModelConfig
from legacy1bit.model import TernaryMatrix
from legacy1bit.schemes import FLOAT, SCHEMES
from legacy1bit.system.optional import load_extra

_Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Kind:
    """A type of tensors.

    Attributes
    ----------
    number : int
        Its number in a file.
    bytes, block : int
        The bytes of a block, and its weights.
    file_type : int
        The number of a file with mostly this type.
    scale : int
        Where the block's scale begins, a number in float16; -1 without blocks.
    """

    number: int
    bytes: int
    block: int
    file_type: int = 0
    scale: int = -1

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape in bytes of a tensor of whole blocks."""
        return (*shape[:-1], shape[-1] // self.block * self.bytes)


KINDS = {
    "tq2_0": Kind(35, 66, 256, 37, 64),
    "tq1_0": Kind(34, 54, 256, 36, 52),
    "q2_0": Kind(42, 18, 64, 41, 0),
    "q8_0": Kind(8, 34, 32, 7, 0),
    "f16": Kind(1, 2, 1, 1),
    "f32": Kind(0, 4, 1),
}
# Those of matrices of codes, and those of an embedding and an output matrix without codes.
CODE_KINDS = ("tq2_0", "tq1_0", "q2_0", "f16", "f32")
FLOAT_KINDS = ("f32", "f16", "q8_0")

_FLOATS = {"f16": "<f2", "f32": "<f4"}
# The places of the four codes of q2_0 in a byte, the first one in the lowest bits.
_SHIFTS = np.arange(0, 8, 2, dtype=np.uint8)


def load_gguf() -> Any:
    """Return the package that writes GGUF files.

    Raises
    ------
    ValueError
        If it is not installed.
    """
    return load_extra("GGUF files need", "gguf", "quants")


def check_kind(config: ModelConfig, kind: str) -> None:
    """Raise ``ValueError``, with a remedy, if a type cannot hold the codes of such models."""
    if kind not in CODE_KINDS:
        raise ValueError(f"type is {kind!r}, expected one of {', '.join(CODE_KINDS)}")
    if config.scheme == FLOAT and kind != "f32":
        raise ValueError(f"{kind} does not hold weights of scheme float: --type f32")
    if kind in _FLOATS:
        return
    if config.scheme == "2bit":
        raise ValueError(
            f"{kind} holds three values and scheme 2bit has four: --type f32, or train with "
            "--scheme ternary"
        )
    block = KINDS[kind].block
    widths = {
        "model_dim": (config.model_dim, ", or train with --model-dim {}"),
        "num_heads times head_dim": (config.query_dim, ""),
        "ffn_dim": (config.ffn_dim, ", or train with --ffn-dim {}"),
    }
    for name, (width, instead) in widths.items():
        if width % block:
            nearest = instead.format(-(-width // block) * block)
            raise ValueError(
                f"{name} is {width}, expected a multiple of {block} for {kind}: --type f16{nearest}"
            )
    if config.scale.isdecimal() and int(config.scale) < block:
        raise ValueError(
            f"{kind} has one scale for {block} weights, and scale is {config.scale}: --type q2_0, "
            f"or train with --scale {block}"
        )


def check_embedding_kind(config: ModelConfig, kind: str) -> None:
    """Raise ``ValueError``, with a remedy, if a type is none for embedding and output matrix."""
    if config.ternary_embedding and kind in KINDS:
        if kind == "q8_0":
            raise ValueError(
                f"{kind} does not hold the codes of a ternary embedding exactly: --embedding-type "
                "f16"
            )
        check_kind(config, kind)
        return
    if kind not in KINDS:
        raise ValueError(
            f"embedding type is {kind!r}, expected one of {', '.join(FLOAT_KINDS)}, or, for a "
            f"ternary embedding, of {', '.join(CODE_KINDS)}"
        )
    if kind not in FLOAT_KINDS:
        raise ValueError(
            f"{kind} holds codes, and the embedding has none: --embedding-type q8_0, or train with "
            "--ternary-embedding"
        )
    if config.model_dim % KINDS[kind].block:
        raise ValueError(
            f"model_dim is {config.model_dim}, expected a multiple of {KINDS[kind].block} for "
            f"{kind}: --embedding-type f16"
        )


# ---------------------------------------------------------------------------------------------
# Codes


def encode(matrix: TernaryMatrix, kind: str) -> _Array:
    """Return a matrix in a type: float16 or float32[R, C], or the bytes of blocks, uint8[R, B]."""
    if kind in _FLOATS:
        with np.errstate(over="ignore"):
            return matrix.dense().astype(_FLOATS[kind])
    packed = _pack(matrix.values, kind)
    # Our own scales: where a package wrote the blocks, it gave one of zeros none.
    with np.errstate(over="ignore"):
        scales = _block_scales(matrix, kind).astype("<f2")
    _scales(packed, kind)[...] = scales[..., None].view(np.uint8)
    return packed


def decode(stored: _Array, kind: str, matrix: TernaryMatrix, scheme: str) -> _Array:
    """Undo ``encode``: return the codes, int8[R, C].

    Parameters
    ----------
    stored : array
    kind : str
    matrix : TernaryMatrix
        Of the same shape, with the scales.
    scheme : str

    Raises
    ------
    ValueError
        If ``stored`` is not the result of ``encode``.
    """
    levels = SCHEMES[scheme].levels
    # Not a code.
    codes = np.full(matrix.shape, -128, np.int8)
    if kind in _FLOATS:
        scales = np.repeat(matrix.scales, matrix.group, axis=1)[:, : codes.shape[1]]
        # With a scale of 0 all codes give the same; the smallest, which comes last, is taken.
        for level in sorted(levels, key=abs, reverse=True):
            with np.errstate(over="ignore"):
                codes[stored == np.float32(level) * scales] = level
    else:
        found = _scales(stored, kind).copy().view("<f2")[..., 0]
        if not (found == _block_scales(matrix, kind)).all():
            raise ValueError("its blocks have other scales than legacy1bit.scales")
        codes = _unpack(stored, kind)
    if not np.isin(codes, levels).all():
        raise ValueError("it holds a number that is not a code of its scheme")
    return codes


def _scales(packed: _Array, kind: str) -> _Array:
    """Return the bytes of the blocks' scales, a view uint8[R, B, 2]."""
    start = KINDS[kind].scale
    return packed.reshape(len(packed), -1, KINDS[kind].bytes)[..., start : start + 2]


def _block_scales(matrix: TernaryMatrix, kind: str) -> _Array:
    """Return the scales of a matrix's blocks, float32[R, B] or [1, B]."""
    block = KINDS[kind].block
    spread = np.repeat(matrix.scales, -(-matrix.group // block), axis=1)
    return spread[:, : matrix.shape[1] // block]


def _pack(codes: _Array, kind: str) -> _Array:
    """Return the blocks of codes, uint8[R, B]; of their scales only the place is there."""
    if kind == "q2_0":
        quads = (codes + 1).astype(np.uint8).reshape(len(codes), -1, 16, 4) << _SHIFTS
        blocks = np.zeros((*quads.shape[:2], KINDS[kind].bytes), np.uint8)
        blocks[..., 2:] = np.bitwise_or.reduce(quads, axis=-1)
        return blocks.reshape(len(codes), -1)
    gguf = load_gguf()
    packed: _Array = gguf.quants.quantize(
        codes.astype(np.float32), gguf.GGMLQuantizationType(KINDS[kind].number)
    )
    return packed


def _unpack(packed: _Array, kind: str) -> _Array:
    """Undo ``_pack``: return what blocks hold in units of their scales, int8[R, C]."""
    rows = len(packed)
    if kind == "q2_0":
        quads = packed.reshape(rows, -1, KINDS[kind].bytes)[..., 2:, None] >> _SHIFTS
        return (quads & 3).astype(np.int8).reshape(rows, -1) - np.int8(1)
    gguf = load_gguf()
    packed = packed.copy()
    _scales(packed, kind)[...] = np.array([1.0], "<f2").view(np.uint8)
    codes: _Array = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType(KINDS[kind].number))
    return codes.astype(np.int8)


# ---------------------------------------------------------------------------------------------
# Floats


def encode_floats(weights: _Array, kind: str) -> _Array:
    """Return weights float32[R, C] in a type of ``FLOAT_KINDS``, rounded where it is not f32.

    Raises
    ------
    ValueError
        If the type's range is too small.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        if kind in _FLOATS:
            stored = weights.astype(_FLOATS[kind])
        else:
            gguf = load_gguf()
            stored = gguf.quants.quantize(weights, gguf.GGMLQuantizationType(KINDS[kind].number))
        if not np.isfinite(decode_floats(stored, kind)).all():
            raise ValueError(f"it holds a number too large for {kind}: --embedding-type f32")
    return stored


def decode_floats(stored: _Array, kind: str) -> _Array:
    """Return weights float32[R, C] of a type of ``FLOAT_KINDS``."""
    if kind in _FLOATS:
        return stored.astype(np.float32)
    blocks = stored.reshape(len(stored), -1, KINDS[kind].bytes)
    scales = blocks[..., :2].copy().view("<f2").astype(np.float32)
    return (blocks[..., 2:].view(np.int8) * scales).reshape(len(stored), -1)


def as_type(stored: _Array, kind: str) -> _Array:
    """Return the bytes of a tensor as the numbers of its type; those of blocks are bytes."""
    return stored.view(_FLOATS[kind]) if kind in _FLOATS else stored
