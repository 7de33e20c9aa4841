"""Our models in the terms of other programs: the families of models that compute the same.

A family has a name, settings that a model must have to be one, and an implementation in llama.cpp
and in transformers, which name the same tensors differently. In all of them heads of keys and
values may be fewer, and widths, epsilon, rotary base, YaRN and quantization are free.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from legacy1bit.formats.native import Parameters, check_finite
from legacy1bit.hyperparams import ModelConfig
from legacy1bit.layout import parameter_layout
from legacy1bit.schemes import SCHEMES

Program = Literal["llama_cpp", "transformers"]
Pairs = Literal["halves", "adjacent"]

_PROGRAMS: Mapping[Program, str] = {"llama_cpp": "llama.cpp", "transformers": "transformers"}


class Names(NamedTuple):
    """The names of a parameter in other programs."""

    llama_cpp: str
    transformers: str


@dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes
    ----------
    name : str
    architecture : str
        llama.cpp's ``general.architecture``.
    model_type, class_name : str
        Those of transformers.
    settings : dict of str to tuple
        The values that settings of ``ModelConfig`` may have; the first is the remedy in errors.
    limits : dict of str to dict
        The same for one program, where it has less.
    square : tuple of str
        The programs in which all heads together must be as wide as the model.
    llama_cpp_pairs : {"halves", "adjacent"}
        The elements of a head that rotate together in llama.cpp; in transformers it is halves.
    """

    name: str
    architecture: str
    model_type: str
    class_name: str
    settings: Mapping[str, tuple[Any, ...]]
    limits: Mapping[Program, Mapping[str, tuple[Any, ...]]] = field(default_factory=dict)
    square: tuple[Program, ...] = ()
    llama_cpp_pairs: Pairs = "halves"

    def fits(self, config: ModelConfig) -> bool:
        """Return whether a model has the settings of the family."""
        return not _differences(self, config)


_ALL = {
    "positions": ("rope",),
    "final_norm": (True,),
    "output_bias": (False,),
}
_ROOT_MEAN_SQUARE = {
    "norm": ("rms",),
    "gated": (True,),
    **_ALL,
    "rope_fraction": (1.0,),
}

# No two of them take the same model. Of two that are equally near, errors name the first.
FAMILIES = (
    Family(
        "Nemotron",
        "nemotron",
        "nemotron",
        "NemotronForCausalLM",
        {
            "norm": ("layer",),
            "norm_bias": (True,),
            "gated": (False,),
            "activation": ("relu2",),
            "biases": ("all", "none"),
            "qk_norm": (False,),
            "sub_norm": (False,),
            **_ALL,
        },
        square=("llama_cpp",),
    ),
    Family(
        "Qwen3",
        "qwen3",
        "qwen3",
        "Qwen3ForCausalLM",
        {
            **_ROOT_MEAN_SQUARE,
            "activation": ("silu",),
            "biases": ("none",),
            "qk_norm": (True,),
            "sub_norm": (False,),
        },
    ),
    Family(
        "BitNet",
        "bitnet",
        "bitnet",
        "BitNetForCausalLM",
        {
            **_ROOT_MEAN_SQUARE,
            "activation": ("relu2", "silu"),
            "biases": ("none",),
            "qk_norm": (False,),
            "sub_norm": (True,),
        },
        # Its feed-forward layer is that of the first BitNets, and its output is the embedding.
        limits={"llama_cpp": {"activation": ("silu",), "tied_embeddings": (True,)}},
        square=("llama_cpp", "transformers"),
    ),
    Family(
        "Llama",
        "llama",
        "llama",
        "LlamaForCausalLM",
        {
            **_ROOT_MEAN_SQUARE,
            "activation": ("silu",),
            "biases": ("none", "all"),
            "qk_norm": (False,),
            "sub_norm": (False,),
        },
        llama_cpp_pairs="adjacent",
    ),
)

# What a family does not have, in the words of an error.
_OPTIONS: Mapping[str, Mapping[Any, str]] = {
    "norm": {"layer": "layer norms", "rms": "RMS norms"},
    "norm_bias": {False: "norms without bias"},
    "gated": {True: "gate", False: "feed-forward layers without a gate"},
    "activation": {"relu": "plain ReLU", "relu2": "squared ReLU", "silu": "SiLU", "gelu": "GELU"},
    "biases": {
        "all": "biases",
        "qkv": "biases of queries, keys and values only",
        "none": "layers without biases",
    },
    "qk_norm": {True: "QK-norm", False: "attention without QK-norm"},
    "sub_norm": {True: "norms inside their layers", False: "layers without norms inside"},
    "positions": {"none": "attention without positions"},
    "final_norm": {False: "output without a norm before it"},
    "output_bias": {True: "output bias"},
    "tied_embeddings": {False: "output matrix of its own"},
}

_EDGES = {
    "embedding.weight": Names("token_embd.weight", "model.embed_tokens.weight"),
    "final_norm.gamma": Names("output_norm.weight", "model.norm.weight"),
    "final_norm.beta": Names("output_norm.bias", "model.norm.bias"),
    "output.weight": Names("output.weight", "lm_head.weight"),
}
_BLOCK = {
    "attention.wq": Names("attn_q.weight", "self_attn.q_proj.weight"),
    "attention.wk": Names("attn_k.weight", "self_attn.k_proj.weight"),
    "attention.wv": Names("attn_v.weight", "self_attn.v_proj.weight"),
    "attention.wo": Names("attn_output.weight", "self_attn.o_proj.weight"),
    "attention.bq": Names("attn_q.bias", "self_attn.q_proj.bias"),
    "attention.bk": Names("attn_k.bias", "self_attn.k_proj.bias"),
    "attention.bv": Names("attn_v.bias", "self_attn.v_proj.bias"),
    "attention.bo": Names("attn_output.bias", "self_attn.o_proj.bias"),
    "attention.q_gamma": Names("attn_q_norm.weight", "self_attn.q_norm.weight"),
    "attention.k_gamma": Names("attn_k_norm.weight", "self_attn.k_norm.weight"),
    "attention.gamma": Names("attn_sub_norm.weight", "self_attn.attn_sub_norm.weight"),
    "ffn.wg": Names("ffn_gate.weight", "mlp.gate_proj.weight"),
    "ffn.bg": Names("ffn_gate.bias", "mlp.gate_proj.bias"),
    "ffn.wi": Names("ffn_up.weight", "mlp.up_proj.weight"),
    "ffn.bi": Names("ffn_up.bias", "mlp.up_proj.bias"),
    "ffn.gamma": Names("ffn_sub_norm.weight", "mlp.ffn_sub_norm.weight"),
    "ffn.wo": Names("ffn_down.weight", "mlp.down_proj.weight"),
    "ffn.bo": Names("ffn_down.bias", "mlp.down_proj.bias"),
    "norm1.gamma": Names("attn_norm.weight", "input_layernorm.weight"),
    "norm1.beta": Names("attn_norm.bias", "input_layernorm.bias"),
    "norm2.gamma": Names("ffn_norm.weight", "post_attention_layernorm.weight"),
    "norm2.beta": Names("ffn_norm.bias", "post_attention_layernorm.bias"),
}


def family_of(config: ModelConfig, program: Program) -> Family:
    """Return the family that computes the same as a model of these settings.

    Parameters
    ----------
    config : ModelConfig
    program : {"llama_cpp", "transformers"}
        In which it computes the same.

    Raises
    ------
    ValueError
        If there is none. The message names an option that the nearest family does not have, and
        the remedy.
    """
    # A family that the model is of is the nearest one, though the program may have less of it.
    nearest = min(FAMILIES, key=lambda family: _differences(family, config))
    options = _lacking(nearest, config, program)
    if options:
        option, remedy = options[0]
        raise ValueError(
            f"{_PROGRAMS[program]} has no such models: those of the nearest family, "
            f"{nearest.name}, have no {option}: train with {remedy}"
        )
    return nearest


def _differences(family: Family, config: ModelConfig) -> int:
    """Return the number of a model's settings that a family does not have."""
    return sum(getattr(config, name) not in values for name, values in family.settings.items())


def _lacking(family: Family, config: ModelConfig, program: Program) -> list[tuple[str, str]]:
    """Return the options of a model that a family does not have, each with its remedy."""
    found = []
    for name, values in {**family.settings, **family.limits.get(program, {})}.items():
        value = getattr(config, name)
        if value not in values:
            option = _OPTIONS[name][value] if name in _OPTIONS else "partial rotation"
            found.append((option, _option_of(name, values[0])))
    if any(config.windows):
        name = "attention-window" if config.window_pattern is None else "window-pattern"
        found.append(("attention window", f"--{name} 0"))
    if program in family.square and config.query_dim != config.model_dim:
        remedy = f"--head-dim {config.model_dim / config.num_heads:g}"
        found.append(("heads that together are wider or narrower than the model", remedy))
    return found


def _option_of(name: str, value: Any) -> str:
    """Return the command line's option that gives a setting this value."""
    name = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name} {value}"


def stored_config(settings: dict[str, Any]) -> ModelConfig:
    """Return the settings of a model that its file states.

    Raises
    ------
    TypeError, ValueError
        If they are not those of a model, or not all of them.
    """
    config = ModelConfig.from_dict(settings)
    missing = sorted(config.to_dict().keys() - settings.keys())
    if missing:
        raise ValueError(f"it has no setting {missing[0]!r}")
    return config


class Model(Protocol):
    """A model, such as ``LegacyLLM``."""

    @property
    def config(self) -> ModelConfig:
        """Its settings."""

    @property
    def parameters(self) -> Parameters:
        """Its parameters by name."""

    def stored_bytes(self) -> int:
        """Return the bytes of its file. Raises ``ValueError`` once it was freed."""


def check_model(model: Model, program: Program) -> Family:
    """Return a model's family.

    Raises
    ------
    ValueError
        If the model is freed, has none, or has a nonfinite weight.
    """
    model.stored_bytes()
    family = family_of(model.config, program)
    for name, value in model.parameters.items():
        check_finite(name, value if isinstance(value, np.ndarray) else value.scales)
    return family


def tensor_names(config: ModelConfig) -> dict[str, Names]:
    """Return the names of a model's parameters by our own."""
    names = _EDGES | {
        f"blocks.{i}.{ours}": Names(f"blk.{i}.{llama_cpp}", f"model.layers.{i}.{transformers}")
        for i in range(config.num_blocks)
        for ours, (llama_cpp, transformers) in _BLOCK.items()
    }
    known = {part.name for part in parameter_layout(config)}
    return {ours: theirs for ours, theirs in names.items() if ours in known}


def row_order(config: ModelConfig, name: str, pairs: Pairs) -> npt.NDArray[np.intp] | None:
    """Return the order of a parameter's rows in programs that rotate these pairs.

    Queries and keys can change the order of a head's elements if all of them do: their products
    stay the same. ``theirs = ours[order]``, and back, ``ours[order] = theirs``.

    Parameters
    ----------
    config : ModelConfig
    name : str
        Ours, of a parameter.
    pairs : {"halves", "adjacent"}

    Returns
    -------
    order : intp[R] or None
        None: as they are.
    """
    heads = {
        **{"wq": config.num_heads, "bq": config.num_heads, "q_gamma": 1},
        **{"wk": config.num_kv_heads, "bk": config.num_kv_heads, "k_gamma": 1},
    }.get(name.rpartition(".")[2])
    if heads is None or pairs == config.rope_pairs:
        return None
    head = np.arange(config.head_dim)
    rotating = head[: config.rotary_dim]
    axes = (2, -1) if pairs == "adjacent" else (-1, 2)
    head[: config.rotary_dim] = rotating.reshape(axes).T.ravel()
    return (np.arange(heads)[:, None] * config.head_dim + head).ravel()


def reordered(model: Model, name: str, pairs: Pairs) -> Any:
    """Return a parameter, an array or a matrix of codes, with its rows in ``row_order``."""
    value: Any = model.parameters[name]
    order = row_order(model.config, name, pairs)
    if order is None:
        return value
    if isinstance(value, np.ndarray):
        return np.ascontiguousarray(value[order])
    scales = value.scales if value.scales.shape == (1, 1) else value.scales[order]
    levels = SCHEMES[model.config.scheme].levels
    return type(value)(value.values[order], np.ascontiguousarray(scales), value.group, levels)
