"""The layout of a model's parameters: names, shapes, kinds, and their places in flat arrays.

This is the only list of them. Weights, gradients, moments, packed weights and files follow it.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy.typing as npt

from legacy1bit.hyperparams import ADAPTED, ModelConfig
from legacy1bit.schemes import FLOAT

Kind = Literal["quantized", "matrix", "vector"]

# The kinds in their order in memory.
_KINDS: tuple[Kind, ...] = ("quantized", "matrix", "vector")

# The parameters of a block by name, with their axes and the option that they belong to. The axes
# are those of ``dimensions``; a block without the option has no such parameter.
_BLOCK = (
    ("attention.wq", "QC", ""),
    ("attention.wk", "KC", ""),
    ("attention.wv", "KC", ""),
    ("attention.wo", "CQ", ""),
    ("attention.bq", "Q", "qkv_bias"),
    ("attention.bk", "K", "qkv_bias"),
    ("attention.bv", "K", "qkv_bias"),
    ("attention.bo", "C", "bias"),
    ("attention.q_gamma", "D", "qk_norm"),
    ("attention.k_gamma", "D", "qk_norm"),
    ("ffn.wg", "FC", "gated"),
    ("ffn.wi", "FC", ""),
    ("ffn.bg", "F", "gated_bias"),
    ("ffn.bi", "F", "bias"),
    ("ffn.wo", "CF", ""),
    ("ffn.bo", "C", "bias"),
    ("norm1.gamma", "C", ""),
    ("norm1.beta", "C", "norm_bias"),
    ("norm2.gamma", "C", ""),
    ("norm2.beta", "C", "norm_bias"),
    ("attention.gamma", "Q", "sub_norm"),
    ("attention.beta", "Q", "sub_norm_bias"),
    ("ffn.gamma", "F", "sub_norm"),
    ("ffn.beta", "F", "sub_norm_bias"),
)


class AdapterConfig(NamedTuple):
    """A low-rank adapter (LoRA: Hu et al., arXiv 2106.09685): ``y = W x + alpha / rank B A x``.

    Attributes
    ----------
    rank : int
    alpha : float
    layers : {"all", "attention", "ffn"}
        The layers whose matrices have one.
    """

    rank: int
    alpha: float
    layers: str = "all"

    @property
    def scale(self) -> float:
        """What ``B A x`` is multiplied by."""
        return self.alpha / self.rank


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
        (1, 1), or (R, G) with G groups of columns; (0, 0) of a parameter without codes. Shards
        have a scale for each row, too, so that all readers of scales know these two only.
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


def dimensions(config: ModelConfig) -> dict[str, int]:
    """Return the sizes of the axes that tables of parameters and activations name by a letter."""
    return {
        "C": config.model_dim,
        "F": config.ffn_dim,
        "V": config.vocab_size,
        "H": config.num_heads,
        "G": config.num_kv_heads,
        "D": config.head_dim,
        "Q": config.query_dim,
        "K": config.kv_dim,
    }


def block_options(config: ModelConfig) -> set[str]:
    """Return the options of a block, as tables of parameters and activations name them."""
    norm_bias = config.norm == "layer" and config.norm_bias
    chosen = {
        "": True,
        "qkv_bias": config.biases != "none",
        "bias": config.biases == "all",
        "gated_bias": config.gated and config.biases == "all",
        "gated": config.gated,
        "qk_norm": config.qk_norm,
        "norm_bias": norm_bias,
        "sub_norm": config.sub_norm,
        "sub_norm_bias": config.sub_norm and norm_bias,
    }
    return {name for name, is_chosen in chosen.items() if is_chosen}


def block_layout(config: ModelConfig) -> list[tuple[str, tuple[int, ...]]]:
    """Return the parameters of a block: a list of (name, shape)."""
    sizes, chosen = dimensions(config), block_options(config)
    return [
        (name, tuple(sizes[axis] for axis in axes))
        for name, axes, option in _BLOCK
        if option in chosen
    ]


def parameter_layout(config: ModelConfig) -> list[Parameter]:
    """Return the parameters of a model of these settings, in their order in memory.

    Quantized matrices come first, then float matrices, then vectors.
    """
    dim, vocab = config.model_dim, config.vocab_size
    inner: Kind = "matrix" if config.scheme == FLOAT else "quantized"
    outer: Kind = inner if config.ternary_embedding else "matrix"
    entries: list[tuple[str, tuple[int, ...], Kind]] = [("embedding.weight", (vocab, dim), outer)]
    block = block_layout(config)
    for i in range(config.num_blocks):
        entries += [
            (f"blocks.{i}.{name}", shape, inner if len(shape) == 2 else "vector")
            for name, shape in block
        ]
    if config.final_norm:
        entries.append(("final_norm.gamma", (dim,), "vector"))
        if "norm_bias" in block_options(config):
            entries.append(("final_norm.beta", (dim,), "vector"))
    if not config.tied_embeddings:
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


def adapter_layout(config: ModelConfig, adapter: AdapterConfig) -> list[Parameter]:
    """Return the parameters of an adapter, in their order in memory.

    They have the names of the matrices, and ``.a`` (rank, columns) or ``.b`` (rows, rank) behind
    them; a matrix's b follows its a.
    """
    layout: list[Parameter] = []
    start = 0
    for i in range(config.num_blocks):
        for name, shape in block_layout(config):
            if len(shape) != 2 or not name.startswith(ADAPTED[adapter.layers]):
                continue
            rows, cols = shape
            for end, size in (("a", (adapter.rank, cols)), ("b", (rows, adapter.rank))):
                at = f"blocks.{i}.{name}.{end}"
                layout.append(Parameter(at, size, "matrix", start, (0, 0), 0, 0))
                start = layout[-1].stop
    return layout


def _scales(config: ModelConfig, shape: tuple[int, ...]) -> tuple[tuple[int, int], int]:
    """Return the shape of a quantized matrix's scales, and the columns that share one."""
    rows, cols = shape
    if config.scale in ("tensor", "one") and config.scale_shards == 1:
        return (1, 1), cols
    group = cols if config.scale in ("row", "tensor") else int(config.scale)
    return (rows, -(-cols // group)), group


def views(flat: npt.NDArray[Any], layout: Sequence[Parameter]) -> dict[str, npt.NDArray[Any]]:
    """Return consecutive parameters by name, as views into an array that holds them alone."""
    origin = layout[0].start
    return {
        part.name: flat[part.start - origin : part.stop - origin].reshape(part.shape)
        for part in layout
    }
