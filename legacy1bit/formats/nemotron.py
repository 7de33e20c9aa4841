"""Nemotron, the one architecture of llama.cpp and transformers that computes the same as ours.

It has layer norms with biases before attention and feed-forward layer and before the output, biases
in all linear layers but the last, rotary positions of pairs half a head apart, and the squared
ReLU. It does not have the other options of our models.
"""

from typing import NamedTuple

import numpy as np

from legacy1bit.hyperparams import ModelConfig
from legacy1bit.model import LegacyLLM, TernaryMatrix


class Names(NamedTuple):
    """The names of a parameter in other programs."""

    llama_cpp: str
    transformers: str


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
    "ffn.wi": Names("ffn_up.weight", "mlp.up_proj.weight"),
    "ffn.bi": Names("ffn_up.bias", "mlp.up_proj.bias"),
    "ffn.wo": Names("ffn_down.weight", "mlp.down_proj.weight"),
    "ffn.bo": Names("ffn_down.bias", "mlp.down_proj.bias"),
    "norm1.gamma": Names("attn_norm.weight", "input_layernorm.weight"),
    "norm1.beta": Names("attn_norm.bias", "input_layernorm.bias"),
    "norm2.gamma": Names("ffn_norm.weight", "post_attention_layernorm.weight"),
    "norm2.beta": Names("ffn_norm.bias", "post_attention_layernorm.bias"),
}


def check_nemotron(config: ModelConfig) -> None:
    """Raise ``ValueError``, with a remedy, if Nemotron cannot compute such a model."""
    activation = {"relu": "plain ReLU"}.get(config.activation, config.activation)
    lacking = (
        (config.activation != "relu2", activation, "--activation relu2"),
        (config.positions == "none", "attention without positions", "--positions rope"),
        (config.attention_window > 0, "attention window", "--attention-window 0"),
        (config.sub_norm, "norms inside their layers", "--no-sub-norm"),
        (not config.final_norm, "output without a norm before it", "--final-norm"),
        (config.output_bias, "output bias", "--no-output-bias"),
    )
    for lacks, option, instead in lacking:
        if lacks:
            raise ValueError(
                f"models are exported as Nemotrons, which have no {option}: train with {instead}"
            )


def check_model(model: LegacyLLM) -> None:
    """Raise ``ValueError`` if a model is freed, not a Nemotron, or has a nonfinite weight."""
    model.stored_bytes()
    check_nemotron(model.config)
    for name, value in model.parameters.items():
        numbers = value.scales if isinstance(value, TernaryMatrix) else value
        if not np.isfinite(numbers).all():
            raise ValueError(f"{name} holds a number that is not finite")


def tensor_names(config: ModelConfig) -> dict[str, Names]:
    """Return the names of a model's parameters by our own."""
    return _EDGES | {
        f"blocks.{i}.{ours}": Names(f"blk.{i}.{llama_cpp}", f"model.layers.{i}.{transformers}")
        for i in range(config.num_blocks)
        for ours, (llama_cpp, transformers) in _BLOCK.items()
    }
