"""Families of other programs: which models are of which, and what is refused with what remedy."""

import numpy as np
import pytest

from helpers.arrays import assert_same_bits
from helpers.models import make_config, random_model
from legacy1bit.formats.families import (
    FAMILIES,
    check_model,
    family_of,
    reordered,
    row_order,
    tensor_names,
)
from legacy1bit.hyperparams import ARCHITECTURES
from legacy1bit.layout import parameter_layout
from legacy1bit.model import TernaryMatrix, free_legacy_llm

PROGRAMS = ("llama_cpp", "transformers")
OURS = [family.model_type for family in FAMILIES]


def config_of(family, **changes):
    return make_config(**{**ARCHITECTURES[family], "output_bias": False, **changes})


@pytest.mark.parametrize("name", OURS)
def test_architectures_are_of_the_family_of_their_name(name):
    assert family_of(config_of(name), "transformers").model_type == name
    changes = {"activation": "silu"} if name == "bitnet" else {}
    assert family_of(config_of(name, **changes), "llama_cpp").architecture == name


FREE = {
    "scheme": {"scheme": "2bit", "scale": "128", "ternary_embedding": True},
    "int8": {"int8_activations": True},
    "grouped": {"num_kv_heads": 1},
    "widths": {"ffn_dim": 7, "model_dim": 18},
    "numbers": {"norm_epsilon": 1e-3, "rope_base": 77.0},
    "yarn": {"rope_factor": 4.0, "rope_original_length": 8},
    "adjacent": {"rope_pairs": "adjacent"},
    "shards": {"scale_shards": 3},
    "no window": {"window_pattern": "0,0"},
}


@pytest.mark.parametrize("changes", FREE.values(), ids=FREE)
@pytest.mark.parametrize("name", OURS)
def test_other_settings_are_free(name, changes):
    assert family_of(config_of(name, **changes), "transformers").model_type == name
    if name == "bitnet":
        changes = {**changes, "activation": "silu"}
    assert family_of(config_of(name, **changes), "llama_cpp").model_type == name


@pytest.mark.parametrize("name", OURS)
def test_the_output_may_be_the_embedding(name):
    for tied in (False, True):
        config = config_of(name, tied_embeddings=tied)
        assert family_of(config, "transformers").model_type == name


REFUSED = {
    "windows": ("llama", {"attention_window": 3}, "no attention window: .*--attention-window 0"),
    "pattern": ("qwen3", {"window_pattern": "0,3"}, "no attention window: .*--window-pattern 0"),
    "partial": ("llama", {"rope_fraction": 0.5}, "no partial rotation: .*--rope-fraction 1.0"),
    "partial, qwen3": ("qwen3", {"rope_fraction": 0.5}, "Qwen3, .*--rope-fraction 1.0"),
    "partial, bitnet": ("bitnet", {"rope_fraction": 0.5}, "BitNet, .*--rope-fraction 1.0"),
    "biases": ("qwen3", {"biases": "all"}, "Qwen3, have no biases: .*--biases none"),
    "some biases": ("llama", {"biases": "qkv"}, "Llama, have no biases of queries.*--biases none"),
    "nemotron biases": ("nemotron", {"biases": "qkv"}, "Nemotron, have no .*--biases all"),
    "norm bias": ("nemotron", {"norm_bias": False}, "norms without bias: .*--norm-bias"),
    "activation": ("llama", {"activation": "gelu"}, "Llama, have no GELU: .*--activation silu"),
    "bitnet activation": ("bitnet", {"activation": "gelu"}, "no GELU: .*--activation relu2"),
    "gate": ("llama", {"gated": False}, "Llama, have no .*without a gate: .*--gated"),
    "nemotron gate": ("nemotron", {"gated": True}, "Nemotron, have no gate: .*--no-gated"),
    "norm": ("llama", {"norm": "layer"}, "Llama, have no layer norms: .*--norm rms"),
    "nemotron norm": ("nemotron", {"norm": "rms"}, "have no RMS norms: .*--norm layer"),
    "nemotron qk": ("nemotron", {"qk_norm": True}, "have no QK-norm: .*--no-qk-norm"),
    "both norms": ("bitnet", {"qk_norm": True}, "BitNet, have no QK-norm: .*--no-qk-norm"),
    "heads": ("bitnet", {"head_dim": 6}, "BitNet, have no heads that together .*--head-dim 4"),
    "positions": ("llama", {"positions": "none"}, "without positions: .*--positions rope"),
    "final norm": ("qwen3", {"final_norm": False}, "output without a norm.*: .*--final-norm"),
    "output bias": ("bitnet", {"output_bias": True}, "BitNet, .* output bias: .*--no-output-bias"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "changes", "reason"), REFUSED.values(), ids=REFUSED)
def test_models_of_no_family_are_refused(name, changes, reason):
    config = config_of(name, **changes)
    for program in PROGRAMS:
        if program == "llama_cpp" and name == "bitnet":
            # There its activation is another one.
            continue
        with pytest.raises(ValueError, match=reason) as caught:
            family_of(config, program)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("bitnet", {}, r"llama\.cpp .* squared ReLU: train with --activation silu"),
        ("bitnet", {"activation": "silu", "tied_embeddings": False}, "--tied-embeddings"),
        ("nemotron", {"head_dim": 6}, "--head-dim 4"),
    ],
)
def test_llama_cpp_lacks_some_that_transformers_has(name, changes, reason):
    with pytest.raises(ValueError, match=f"{reason}$"):
        family_of(config_of(name, **changes), "llama_cpp")
    assert family_of(config_of(name, **changes), "transformers").model_type == name


@pytest.mark.parametrize("name", OURS)
def test_every_parameter_has_a_name_of_its_own(name):
    changes = {"biases": "all"} if name in ("nemotron", "llama") else {}
    for tied in (False, True):
        config = config_of(name, tied_embeddings=tied, **changes)
        names = tensor_names(config)
        assert sorted(names) == sorted(part.name for part in parameter_layout(config))
        for program in PROGRAMS:
            assert len({getattr(theirs, program) for theirs in names.values()}) == len(names)


def test_freed_and_nonfinite_models_are_refused():
    model = random_model(config_of("llama"))
    model.parameters["final_norm.gamma"][0] = np.inf
    with pytest.raises(ValueError, match=r"final_norm\.gamma holds a number that is not finite"):
        check_model(model, "transformers")
    free_legacy_llm(model)
    with pytest.raises(ValueError, match="freed"):
        check_model(model, "transformers")


# --- Pairs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fraction", [1.0, 0.5])
@pytest.mark.parametrize("scale", ["tensor", "row", "64"])
def test_the_same_pairs_rotate_in_another_order(fraction, scale):
    config = config_of("qwen3", head_dim=8, num_kv_heads=1, rope_fraction=fraction, scale=scale)
    model = random_model(config)
    half = config.rotary_dim // 2
    for name, heads in (("wq", 3), ("wk", 1), ("q_gamma", 1), ("k_gamma", 1)):
        value = model.parameters[f"blocks.1.attention.{name}"]
        found = reordered(model, f"blocks.1.attention.{name}", "adjacent")
        if isinstance(value, TernaryMatrix):
            assert found.scales.shape == value.scales.shape
            value, found = value.dense(), found.dense()
        for head in range(heads):
            start = head * config.head_dim
            for i in range(half):
                assert_same_bits(found[start + 2 * i], value[start + i])
                assert_same_bits(found[start + 2 * i + 1], value[start + half + i])
            rest = slice(start + 2 * half, start + config.head_dim)
            assert_same_bits(found[rest], value[rest])


def test_orders_undo_each_other():
    halves = config_of("llama", head_dim=10, biases="all")
    adjacent = config_of("llama", head_dim=10, biases="all", rope_pairs="adjacent")
    for name in ("wq", "wk", "bq", "bk"):
        there = row_order(halves, f"blocks.0.attention.{name}", "adjacent")
        back = row_order(adjacent, f"blocks.0.attention.{name}", "halves")
        assert_same_bits(there[back], np.arange(30))
    for config, pairs in ((halves, "halves"), (adjacent, "adjacent")):
        assert row_order(config, "blocks.0.attention.wq", pairs) is None
    for name in ("blocks.0.attention.wv", "blocks.0.attention.bo", "blocks.0.ffn.wi"):
        assert row_order(halves, name, "adjacent") is None
    model = random_model(halves)
    assert reordered(model, "blocks.0.ffn.wi", "adjacent") is model.parameters["blocks.0.ffn.wi"]
