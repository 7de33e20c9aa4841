"""The layout of a model's parameters: names, shapes, kinds, and their places in flat arrays.

This is the only list of them. Weights, gradients, moments, packed weights and files follow it.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy.typing as npt

from legacy1bit.hyperparams import ModelConfig
from legacy1bit.schemes import FLOAT

Kind = Literal["quantized", "matrix", "vector"]

# The kinds in their order in memory.
_KINDS: tuple[Kind, ...] = ("quantized", "matrix", "vector")

# The parameters of a block by name, with their axes: C is the model's dimension, F that of the
# hidden layer of the feed-forward network.
_BLOCK = {
    "attention.wq": "CC",
    "attention.wk": "CC",
    "attention.wv": "CC",
    "attention.wo": "CC",
    "attention.bq": "C",
    "attention.bk": "C",
    "attention.bv": "C",
    "attention.bo": "C",
    "ffn.wi": "FC",
    "ffn.bi": "F",
    "ffn.wo": "CF",
    "ffn.bo": "C",
    "norm1.gamma": "C",
    "norm1.beta": "C",
    "norm2.gamma": "C",
    "norm2.beta": "C",
}
# Those of blocks with sub_norm besides.
_SUB_NORM = {
    "attention.gamma": "C",
    "attention.beta": "C",
    "ffn.gamma": "F",
    "ffn.beta": "F",
}


class Parameter(NamedTuple):
    """A parameter and its place.

    Attributes
    ----------
    name : str
    shape : tuple of int
        (R, C) of a matrix, (C,) of a vector.
    kind : {"quantized", "matrix", "vector"}
        Latent weights with codes; float32 with weight decay; float32 without.
    start : int
        The offset of its first element among all parameters.
    scale_shape : tuple of int
        (1, 1), or (R, G) with G groups of columns; (0, 0) of a parameter without codes.
    group : int
        The number of columns that share a scale; 0 without codes.
    scale_start : int
        The offset of its first scale among all scales.
    """

    name: str
    shape: tuple[int, ...]
    kind: Kind
    start: int
    scale_shape: tuple[int, int]
    group: int
    scale_start: int

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def stop(self) -> int:
        """The offset behind its last element."""
        return self.start + self.size

    @property
    def scale_stop(self) -> int:
        """The offset behind its last scale."""
        return self.scale_start + math.prod(self.scale_shape)


def block_layout(
    model_dim: int, ffn_dim: int, sub_norm: bool = False
) -> list[tuple[str, tuple[int, ...]]]:
    """Return the parameters of a block: a list of (name, shape)."""
    sizes = {"C": model_dim, "F": ffn_dim}
    tables = _BLOCK | _SUB_NORM if sub_norm else _BLOCK
    return [(name, tuple(sizes[axis] for axis in axes)) for name, axes in tables.items()]


def parameter_layout(config: ModelConfig) -> list[Parameter]:
    """Return the parameters of a model of these settings, in their order in memory.

    Quantized matrices come first, then float matrices, then vectors.
    """
    dim, vocab = config.model_dim, config.vocab_size
    inner: Kind = "matrix" if config.scheme == FLOAT else "quantized"
    outer: Kind = inner if config.ternary_embedding else "matrix"
    entries: list[tuple[str, tuple[int, ...], Kind]] = [("embedding.weight", (vocab, dim), outer)]
    block = block_layout(dim, config.ffn_dim, config.sub_norm)
    for i in range(config.num_blocks):
        entries += [
            (f"blocks.{i}.{name}", shape, inner if len(shape) == 2 else "vector")
            for name, shape in block
        ]
    if config.final_norm:
        entries += [(f"final_norm.{name}", (dim,), "vector") for name in ("gamma", "beta")]
    entries.append(("output.weight", (vocab, dim), outer))
    if config.output_bias:
        entries.append(("output.bias", (vocab,), "vector"))
    entries.sort(key=lambda entry: _KINDS.index(entry[2]))
    layout: list[Parameter] = []
    start = scale_start = 0
    for name, shape, kind in entries:
        scale_shape, group = _scales(config, shape) if kind == "quantized" else ((0, 0), 0)
        layout.append(Parameter(name, shape, kind, start, scale_shape, group, scale_start))
        start, scale_start = layout[-1].stop, layout[-1].scale_stop
    return layout


def _scales(config: ModelConfig, shape: tuple[int, ...]) -> tuple[tuple[int, int], int]:
    """Return the shape of a quantized matrix's scales, and the columns that share one."""
    rows, cols = shape
    if config.scale in ("tensor", "one"):
        return (1, 1), cols
    group = cols if config.scale == "row" else int(config.scale)
    return (rows, -(-cols // group)), group


def views(flat: npt.NDArray[Any], layout: Sequence[Parameter]) -> dict[str, npt.NDArray[Any]]:
    """Return consecutive parameters by name, as views into an array that holds them alone."""
    origin = layout[0].start
    return {
        part.name: flat[part.start - origin : part.stop - origin].reshape(part.shape)
        for part in layout
    }
