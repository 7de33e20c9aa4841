"""GGUF files: what is in them, that they come back to the bit, that damaged ones are refused."""

import errno
import json
import struct
import sys
import tracemalloc
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from helpers import gguf_file, oracle
from helpers.arrays import assert_same_bits
from helpers.models import (
    exact_dense,
    make_config,
    oracle_config,
    oracle_weights,
    random_model,
    random_tokens,
)
from legacy1bit.data.tokenizer import visible_bytes
from legacy1bit.formats.families import family_of
from legacy1bit.formats.ggml import CODE_KINDS, FLOAT_KINDS, KINDS, load_gguf
from legacy1bit.formats.gguf import export_gguf, import_gguf
from legacy1bit.formats.provenance import Provenance
from legacy1bit.hyperparams import ARCHITECTURES, ModelConfig
from legacy1bit.model import (
    LAYER_NORM_EPSILON,
    LegacyLLM,
    ModelFileError,
    TernaryMatrix,
    create_legacy_llm,
    free_legacy_llm,
    save_model,
)

gguf = pytest.importorskip("gguf", reason="gguf is not installed")

TERNARY = ("tq2_0", "tq1_0", "q2_0")
PROVENANCE = Provenance("a text", "0123abcd", 7, 1.25, "CC0-1.0")

# Settings that blocks of 256 weights need.
WIDE = {"model_dim": 256, "num_heads": 4, "num_blocks": 1, "ffn_multiplier": 1}

# Settings of other architectures: heads wider than the model, and as wide.
LLAMA, QWEN3 = ARCHITECTURES["llama"], ARCHITECTURES["qwen3"]
BITNET = {**ARCHITECTURES["bitnet"], "activation": "silu"}
HEADS = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 6}
YARN = {"rope_factor": 4.0, "rope_original_length": 64, "rope_base": 100.0}

# By name: settings, and the types that hold such models.
MODELS = {
    "ternary": ({}, ("f16", "f32")),
    "float": ({"scheme": "float"}, ("f32",)),
    "median, a row": ({"scheme": "ternary-median", "scale": "row"}, ("f16", "f32")),
    "binary, ternary embedding": (
        {"scheme": "binary", "scale": "128", "ternary_embedding": True, "model_dim": 130,
         "num_heads": 5, "ffn_multiplier": 1, "num_blocks": 1},
        ("f16", "f32"),
    ),
    "sign, int8": ({"scheme": "sign", "int8_activations": True}, ("f16", "f32")),
    "2bit": ({"scheme": "2bit"}, ("f32",)),
    "2bit, one": ({"scheme": "2bit", "scale": "one"}, ("f16", "f32")),
    "no line break": ({"vocab_size": 10, "rope_base": 12345.678}, ("f16", "f32")),
    "more than bytes": ({"vocab_size": 300}, ("f16", "f32")),
    "wide": (WIDE, CODE_KINDS),
    "wide, a row": ({**WIDE, "scale": "row", "ternary_embedding": True}, CODE_KINDS),
    "wide, 256": ({**WIDE, "scale": "256", "ffn_multiplier": 2}, CODE_KINDS),
    "wide, 128": ({**WIDE, "scale": "128"}, ("q2_0", "f16", "f32")),
    "groups of 64": (
        {"scale": "64", "model_dim": 192, "num_blocks": 1, "ffn_multiplier": 1},
        ("q2_0", "f16", "f32"),
    ),
    "narrow, q2_0": ({"model_dim": 192, "num_blocks": 1, "ffn_dim": 64}, ("q2_0", "f16", "f32")),
    "wide, one": ({**WIDE, "scale": "one"}, CODE_KINDS),
    "wide, binary": ({**WIDE, "scheme": "binary", "scale": "row"}, CODE_KINDS),
    "wide, sign": ({**WIDE, "scheme": "sign"}, CODE_KINDS),
    "nemotron, tied": ({"num_kv_heads": 1, "tied_embeddings": True, "biases": "none"},
                       ("f16", "f32")),
    "nemotron, fraction": ({"model_dim": 24, "rope_fraction": 0.5, "norm_epsilon": 1e-3},
                           ("f16", "f32")),
    "nemotron, adjacent": ({"model_dim": 24, "rope_fraction": 0.5, "rope_pairs": "adjacent",
                            "scale": "row"}, ("f16", "f32")),
    "llama": ({**LLAMA, "num_kv_heads": 1, "scale_shards": 5}, ("f16", "f32")),
    "llama, float": ({**LLAMA, **HEADS, "scheme": "float"}, ("f32",)),
    "llama, adjacent": ({**LLAMA, "rope_pairs": "adjacent", "tied_embeddings": True},
                        ("f16", "f32")),
    "llama, biases": ({**LLAMA, **HEADS, **YARN, "biases": "all", "scale": "row"},
                      ("f16", "f32")),
    "llama, wide": ({**LLAMA, **WIDE, "num_kv_heads": 2, "scale": "row"}, CODE_KINDS),
    "qwen3": ({**QWEN3, **HEADS, **YARN}, ("f16", "f32")),
    "qwen3, adjacent": ({**QWEN3, **HEADS, "rope_pairs": "adjacent", "tied_embeddings": True},
                        ("f16", "f32")),
    "qwen3, 64": ({**QWEN3, **HEADS, "model_dim": 64, "head_dim": 32, "ffn_dim": 192,
                   "scale": "64", "ternary_embedding": True}, ("q2_0", "f16", "f32")),
    "bitnet": ({**BITNET, "model_dim": 24, "num_heads": 4, "num_kv_heads": 2}, ("f16", "f32")),
    "bitnet, wide": ({**BITNET, **WIDE, "ternary_embedding": True}, CODE_KINDS),
}  # fmt: skip
HELD = {
    f"{name}, {kind}": (changes, kind)
    for name, (changes, kinds) in MODELS.items()
    for kind in kinds
}


def exportable(**changes):
    model = random_model(make_config(**{"output_bias": False, **changes}))
    model.provenance = PROVENANCE
    return model


@pytest.fixture
def file(tmp_path):
    return tmp_path / "model.gguf"


class Exported(NamedTuple):
    """A model, the type of its matrices, its file, and what is in it."""

    model: LegacyLLM
    kind: str
    path: Path
    keys: dict[str, Any]
    tensors: dict[str, tuple[int, np.ndarray]]


@pytest.fixture(scope="module", params=HELD.values(), ids=HELD)
def exported(request, tmp_path_factory):
    changes, kind = request.param
    model, path = exportable(**changes), tmp_path_factory.mktemp("gguf") / "model.gguf"
    export_gguf(model, path, kind)
    return Exported(model, kind, path, *gguf_file.read(path))


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    """The bytes of a file with every kind of tensor."""
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    export_gguf(exportable(**WIDE), path, "tq2_0")
    return path.read_bytes()


def assert_same_model(actual, expected):
    assert actual.config == expected.config
    assert actual.provenance == expected.provenance
    assert actual.parameters.keys() == expected.parameters.keys()
    for name, value in expected.parameters.items():
        other = actual.parameters[name]
        if isinstance(value, TernaryMatrix):
            assert_same_bits(other.values, value.values, name)
            assert_same_bits(other.scales, value.scales, name)
            assert other.group == value.group
        else:
            assert_same_bits(other, value, name)


def keys_of(reader):
    return {name: field.contents() for name, field in reader.fields.items()}


# --- There and back -------------------------------------------------------------------------------


def test_a_model_comes_back_to_the_bit(exported):
    assert_same_model(import_gguf(exported.path), exported.model)
    assert [path.name for path in exported.path.parent.iterdir()] == [exported.path.name]


@pytest.mark.parametrize(("changes", "kinds"), MODELS.values(), ids=MODELS)
def test_the_default_type_is_the_first_that_is_exact(file, changes, kinds):
    kind = next(one for one in ("tq2_0", "f16", "f32") if one in kinds)
    model = exportable(**changes)
    export_gguf(model, file)
    chosen = file.read_bytes()
    export_gguf(model, file, kind)
    assert chosen == file.read_bytes()
    assert gguf.LlamaFileType(int(keys_of(gguf.GGUFReader(file))["general.file_type"])).name in (
        f"MOSTLY_{kind.upper()}",
        f"ALL_{kind.upper()}",
    )


@pytest.mark.parametrize(("changes", "kinds"), MODELS.values(), ids=MODELS)
def test_other_types_are_refused(file, changes, kinds):
    for kind in CODE_KINDS:
        if kind not in kinds:
            with pytest.raises(ValueError, match=rf"{kind}.*: --type [fq]"):
                export_gguf(exportable(**changes), file, kind)
    assert not file.exists()


@pytest.mark.parametrize("kind", TERNARY)
def test_scales_of_blocks_without_codes_come_back(file, kind):
    model = exportable(**WIDE, scale="row")
    matrix = model.parameters["blocks.0.attention.wk"]
    matrix.values[:3] = 0
    matrix.scales[1] = 0.0
    matrix.scales[2:5] *= -1.0
    export_gguf(model, file, kind)
    assert_same_model(import_gguf(file), model)


def test_a_scale_of_0_loses_codes_in_products(file):
    model = exportable(scale="row")
    matrix = model.parameters["blocks.0.attention.wk"]
    matrix.scales[1] = 0.0
    matrix.values[1] = 1
    for kind in ("f16", "f32", None):
        with pytest.raises(ValueError, match=r"f(16|32) does not hold blocks\.0\.attention\.wk ex"):
            export_gguf(model, file, kind)
    matrix.values[1] = 0
    export_gguf(model, file)
    assert_same_model(import_gguf(file), model)


@pytest.mark.parametrize("scale", [1.0 / 3.0, 1e-9, 7e4])
def test_scales_that_float16_lacks_need_float32(file, scale):
    model = exportable(**WIDE)
    model.parameters["blocks.0.ffn.wi"].scales[...] = scale
    for kind in (*TERNARY, "f16"):
        with pytest.raises(ValueError, match=rf"{kind} does not hold blocks\.0\.ffn\.wi exactly: "
                           "--type f32"):  # fmt: skip
            export_gguf(model, file, kind)
    export_gguf(model, file)
    assert_same_model(import_gguf(file), model)


def test_codes_go_out_whatever_the_forward_pass_uses(file):
    model = exportable()
    export_gguf(model, file)
    expected = file.read_bytes()
    model.use_full_precision(True)
    export_gguf(model, file)
    assert file.read_bytes() == expected


def test_a_model_without_latent_weights_goes_out(file):
    model = create_legacy_llm(make_config(output_bias=False), 1, trainable=False)
    export_gguf(model, file)
    assert_same_model(import_gguf(file), model)


# --- What llama.cpp finds -------------------------------------------------------------------------


NAMES = {
    "embedding.weight": "token_embd.weight", "output.weight": "output.weight",
    "final_norm.gamma": "output_norm.weight", "final_norm.beta": "output_norm.bias",
    "norm1.gamma": "attn_norm.weight", "norm1.beta": "attn_norm.bias",
    "norm2.gamma": "ffn_norm.weight", "norm2.beta": "ffn_norm.bias",
    "attention.q_gamma": "attn_q_norm.weight", "attention.k_gamma": "attn_k_norm.weight",
    "attention.gamma": "attn_sub_norm.weight", "ffn.gamma": "ffn_sub_norm.weight",
    **{f"{ours}{kind}{letter}": f"{theirs}.{name}"
       for kind, name in (("w", "weight"), ("b", "bias"))
       for ours, letter, theirs in (
           ("attention.", "q", "attn_q"), ("attention.", "k", "attn_k"),
           ("attention.", "v", "attn_v"), ("attention.", "o", "attn_output"),
           ("ffn.", "g", "ffn_gate"), ("ffn.", "i", "ffn_up"), ("ffn.", "o", "ffn_down"))},
}  # fmt: skip


def name_of(ours):
    """llama.cpp's name of a parameter."""
    if not ours.startswith("blocks."):
        return NAMES[ours]
    _, block, rest = ours.split(".", 2)
    return f"blk.{block}.{NAMES[rest]}"


def rows_of(ours, config, architecture):
    """The rows of a parameter in llama.cpp's order, by our numbers; ... where that is ours."""
    last = ours.rpartition(".")[2]
    heads = {"wq": config.num_heads, "bq": config.num_heads, "q_gamma": 1,
             "wk": config.num_kv_heads, "bk": config.num_kv_heads, "k_gamma": 1}  # fmt: skip
    if last not in heads or (config.rope_pairs == "adjacent") == (architecture == "llama"):
        return ...
    half = config.rotary_dim // 2
    # Where an element of a head lies here: the halves of a pair are side by side, or half apart.
    if architecture == "llama":
        head = [place // 2 + place % 2 * half for place in range(2 * half)]
    else:
        head = [2 * (place % half) + place // half for place in range(2 * half)]
    head += range(2 * half, config.head_dim)
    return [config.head_dim * i + place for i in range(heads[last]) for place in head]


def test_the_file_has_the_weights(exported):
    model, keys, tensors = exported.model, exported.keys, {**exported.tensors}
    if keys["general.architecture"] == "nemotron" and model.config.tied_embeddings:
        assert np.array_equal(tensors.pop("output.weight")[1], tensors["token_embd.weight"][1])
    assert sorted(map(name_of, model.parameters)) == sorted(tensors)
    for ours, value in model.parameters.items():
        number_of_kind, found = tensors[name_of(ours)]
        coded = isinstance(value, TernaryMatrix)
        assert number_of_kind == KINDS[exported.kind if coded else "f32"].number
        rows = rows_of(ours, model.config, keys["general.architecture"])
        assert np.array_equal(found, (exact_dense(value) if coded else value)[rows]), ours


def test_the_reader_of_the_package_finds_the_same(exported):
    if not hasattr(gguf.GGMLQuantizationType, exported.kind.upper()):
        pytest.skip(f"this version of gguf does not know {exported.kind}")
    tensors = {**exported.tensors}
    for tensor in gguf.GGUFReader(exported.path).tensors:
        number_of_kind, found = tensors.pop(tensor.name)
        assert tensor.tensor_type == number_of_kind
        # The fastest axis comes first there.
        assert tensor.shape.tolist() == list(found.shape)[::-1]
        theirs = gguf.quants.dequantize(np.ascontiguousarray(tensor.data), tensor.tensor_type)
        assert np.array_equal(theirs.reshape(found.shape), found), tensor.name
    assert not tensors


def test_the_file_gives_the_oracles_logits(exported):
    """llama.cpp's graphs, in float64, of what is in the file; the keys have single precision."""
    model = exported.model
    tokens = random_tokens(model.config, 1, 16)
    config = {**oracle_config(model.config), "int8_activations": False}
    expected, _ = oracle.forward(oracle_weights(model), config, tokens)
    found = gguf_file.logits(exported.keys, exported.tensors, tokens[0])
    assert np.linalg.norm(found - expected[0]) < 1e-6 * np.linalg.norm(expected)


def test_the_keys_tell_the_shape(file):
    export_gguf(exportable(rope_base=12345.678), file)
    keys = keys_of(gguf.GGUFReader(file))
    expected = {
        "general.architecture": "nemotron",
        "general.name": "legacy1bit, trained on a text",
        "general.license": "CC0-1.0",
        "nemotron.context_length": 16,
        "nemotron.embedding_length": 12,
        "nemotron.block_count": 2,
        "nemotron.feed_forward_length": 36,
        "nemotron.attention.head_count": 3,
        "nemotron.attention.head_count_kv": 3,
        "nemotron.attention.layer_norm_epsilon": np.float32(LAYER_NORM_EPSILON),
        "nemotron.rope.dimension_count": 4,
        "nemotron.rope.freq_base": np.float32(12345.678),
        "nemotron.vocab_size": 11,
    }
    assert {name: keys[name] for name in expected} == expected


def test_the_keys_of_other_architectures(file):
    sizes = {**HEADS, **YARN, "ffn_dim": 20}
    export_gguf(exportable(**QWEN3, **sizes), file)
    keys, _ = gguf_file.read(file)
    expected = {
        "general.architecture": "qwen3",
        "qwen3.context_length": 16,
        "qwen3.embedding_length": 12,
        "qwen3.block_count": 2,
        "qwen3.feed_forward_length": 20,
        "qwen3.attention.head_count": 4,
        "qwen3.attention.head_count_kv": 2,
        "qwen3.attention.key_length": 6,
        "qwen3.attention.value_length": 6,
        "qwen3.attention.layer_norm_rms_epsilon": np.float32(1e-6),
        "qwen3.rope.dimension_count": 6,
        "qwen3.rope.freq_base": 100.0,
        "qwen3.rope.scaling.type": "yarn",
        "qwen3.rope.scaling.factor": 4.0,
        "qwen3.rope.scaling.original_context_length": 64,
        "qwen3.vocab_size": 11,
    }
    assert {name: value for name, value in keys.items() if name.startswith("qwen3.")} | {
        "general.architecture": keys["general.architecture"]
    } == expected
    for name, changes in (("llama", LLAMA), ("bitnet", BITNET)):
        export_gguf(exportable(**changes), file)
        keys, _ = gguf_file.read(file)
        assert keys["general.architecture"] == name
        assert f"{name}.attention.layer_norm_epsilon" not in keys
        # As wide as the model, and not scaled.
        assert not [key for key in keys if "key_length" in key or "scaling" in key]


def test_our_keys_tell_the_rest(file):
    model = exportable(scale="row")
    export_gguf(model, file)
    keys = keys_of(gguf.GGUFReader(file))
    assert json.loads(keys["legacy1bit.config"]) == model.config.to_dict()
    assert json.loads(keys["legacy1bit.provenance"]) == PROVENANCE.to_dict()
    matrices = [one for one in model.parameters.values() if isinstance(one, TernaryMatrix)]
    scales = np.concatenate([one.scales.ravel() for one in matrices])
    assert_same_bits(np.array(keys["legacy1bit.scales"], np.float32), scales)


def test_nothing_is_said_of_what_is_not_known(file):
    model = exportable(scheme="float")
    model.provenance = Provenance()
    export_gguf(model, file)
    keys = keys_of(gguf.GGUFReader(file))
    assert keys["general.name"] == "legacy1bit, trained on unknown data"
    assert "general.license" not in keys
    assert "legacy1bit.scales" not in keys


def test_a_file_name_that_is_no_unicode_goes_out_and_comes_back(file):
    model = exportable()
    # What Python makes of the byte 0xff in a file's name.
    model.provenance = Provenance("a\udcffz", license="\udcff")
    export_gguf(model, file)
    assert keys_of(gguf.GGUFReader(file))["general.name"] == "legacy1bit, trained on a?z"
    assert_same_model(import_gguf(file), model)


@pytest.mark.parametrize("vocab_size", [1, 10, 11, 200, 256, 300])
def test_the_tokenizer_is_of_bytes(file, vocab_size):
    export_gguf(exportable(vocab_size=vocab_size), file)
    keys = {name.removeprefix("tokenizer.ggml."): value
            for name, value in keys_of(gguf.GGUFReader(file)).items()}  # fmt: skip
    bytes_there = min(vocab_size, 256)
    assert keys["model"] == "gpt2"
    assert keys["pre"] == "gpt-2"
    assert keys["tokens"][:bytes_there] == visible_bytes()[:vocab_size]
    assert len(set(keys["tokens"])) == vocab_size
    assert keys["token_type"] == [1] * bytes_there + [5] * (vocab_size - bytes_there)
    assert keys["add_space_prefix"] is False
    assert keys["add_bos_token"] is (vocab_size > 10)
    assert keys.get("bos_token_id") == (10 if vocab_size > 10 else None)
    assert keys["add_eos_token"] is False
    assert keys["eos_token_id"] == 0


def test_no_merge_can_apply(file):
    export_gguf(exportable(vocab_size=256), file)
    [merge] = keys_of(gguf.GGUFReader(file))["tokenizer.ggml.merges"]
    assert len(merge.split(" ")) == 2
    assert not set(merge.replace(" ", "")) & set(visible_bytes())


# --- Embedding and output matrix ------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, LLAMA, BITNET], ids=["nemotron", "llama", "bitnet"])
@pytest.mark.parametrize("kind", FLOAT_KINDS)
def test_an_embedding_is_rounded_by_choice(file, kind, changes):
    model = exportable(**WIDE, **changes)
    export_gguf(model, file, "tq2_0", embedding_kind=kind)
    _, tensors = gguf_file.read(file)
    found = import_gguf(file)
    outer = {"embedding.weight", "output.weight"} & model.parameters.keys()
    for name, value in model.parameters.items():
        if name not in outer:
            continue
        number_of_kind, stored = tensors[name_of(name)]
        assert number_of_kind == KINDS[kind].number
        assert_same_bits(found.parameters[name].astype(np.float64), stored, name)
        largest = np.abs(value.reshape(-1, 32)).max(axis=1, keepdims=True)
        # Half a step, and the float16 of the scale.
        step = {"f32": 0.0, "f16": 2**-11 * np.abs(value.reshape(-1, 32)) + 2**-25,
                "q8_0": largest * (0.5 / 127 + 2**-11)}[kind]  # fmt: skip
        assert (np.abs((stored - value).reshape(-1, 32)) <= step * 1.001).all()
        found.parameters[name][...] = value
    assert_same_model(found, model)


def test_embeddings_of_no_embedding_type_are_as_ever(file):
    export_gguf(exportable(), file, "f16")
    expected = file.read_bytes()
    export_gguf(exportable(), file, "f16", embedding_kind="f32")
    assert file.read_bytes() == expected


@pytest.mark.parametrize("kind", CODE_KINDS)
def test_a_ternary_embedding_has_a_type_of_its_own(file, kind):
    model = exportable(**WIDE, **BITNET, ternary_embedding=True)
    export_gguf(model, file, "tq1_0", embedding_kind=kind)
    _, tensors = gguf_file.read(file)
    assert tensors["token_embd.weight"][0] == KINDS[kind].number
    assert tensors["blk.0.attn_q.weight"][0] == KINDS["tq1_0"].number
    assert_same_model(import_gguf(file), model)


EMBEDDING_REFUSED = {
    "codes": ({}, "q8_0", {"ternary_embedding": True},
              "q8_0 does not hold the codes of a ternary embedding exactly: --embedding-type f16"),
    "no codes": ({}, "tq2_0", {}, "tq2_0 holds codes, and the embedding has none: "
                 "--embedding-type q8_0, or train with --ternary-embedding"),
    "width": ({"model_dim": 12, "num_heads": 3}, "q8_0", {},
              "model_dim is 12, expected a multiple of 32 for q8_0: --embedding-type f16"),
    "scale": ({"scale": "64"}, "tq1_0", {"ternary_embedding": True}, "one scale for 256 weights"),
    "unknown": ({}, "q4_0", {}, "embedding type is 'q4_0', expected one of f32, f16, q8_0"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("sizes", "kind", "changes", "reason"), EMBEDDING_REFUSED.values(), ids=EMBEDDING_REFUSED
)
def test_embedding_types_that_do_not_fit_say_what_does(file, sizes, kind, changes, reason):
    with pytest.raises(ValueError, match=reason):
        export_gguf(exportable(**{**WIDE, **sizes}, **changes), file, "f32", embedding_kind=kind)
    assert not file.exists()


@pytest.mark.parametrize("kind", ["f16", "q8_0"])
def test_an_embedding_too_large_for_its_type_is_refused(file, kind):
    model = exportable(**WIDE)
    model.parameters["output.weight"][3, 5] = 1e9
    with pytest.raises(ValueError, match=rf"output\.weight: .* too large for {kind}: --emb.* f32"):
        export_gguf(model, file, embedding_kind=kind)


# --- What cannot go out ---------------------------------------------------------------------------

REFUSED = {
    "activation": ({"activation": "relu"}, "no plain ReLU: train with --activation relu2"),
    "positions": ({"positions": "none"}, "without positions: train with --positions rope"),
    "span": ({"attention_window": 3}, "no attention window: train with --attention-window 0"),
    "sub norm": ({"sub_norm": True}, "no norms inside.*: train with --no-sub-norm"),
    "final norm": ({"final_norm": False}, "output without a norm.*: train with --final-norm"),
    "output bias": ({"output_bias": True}, "no output bias: train with --no-output-bias"),
    "bitnet of today": (
        {**BITNET, "activation": "relu2"},
        "BitNet, have no squared ReLU: train with --activation s",
    ),
    "bitnet, untied": ({**BITNET, "tied_embeddings": False}, "train with --tied-embeddings"),
    "bitnet, wide heads": ({**BITNET, "head_dim": 8}, "train with --head-dim 4"),
    "nemotron, wide heads": ({"head_dim": 8}, "train with --head-dim 4"),
    "llama, fraction": ({**LLAMA, "head_dim": 8, "rope_fraction": 0.5}, "--rope-fraction 1"),
    "qwen3, gelu": ({**QWEN3, "activation": "gelu"}, "Qwen3, have no GELU: .* --activation silu"),
}


@pytest.mark.parametrize(("changes", "reason"), REFUSED.values(), ids=REFUSED)
def test_models_that_no_architecture_computes_are_refused(file, changes, reason):
    model = exportable(**changes)
    with pytest.raises(ValueError, match=reason):
        family_of(model.config, "llama_cpp")
    with pytest.raises(ValueError, match=reason):
        export_gguf(model, file)
    assert not file.exists()


KIND_REFUSED = {
    "float": ({"scheme": "float"}, "f16", "f16 does not hold weights of scheme float: --type f32"),
    "float, wide": ({**WIDE, "scheme": "float"}, "tq2_0", "of scheme float: --type f32"),
    "2bit": ({**WIDE, "scheme": "2bit"}, "tq2_0", "--type f32, or train with --scheme ternary"),
    "2bit, f16": ({"scheme": "2bit"}, "f16", "does not hold blocks.*exactly: --type f32"),
    "width": ({}, "tq1_0", "model_dim is 12, expected a multiple of 256 for tq1_0: --type f16, or "
                           "train with --model-dim 256"),
    "128": ({**WIDE, "scale": "128"}, "tq2_0", "scale is 128: --type q2_0, or train with "
                                               "--scale 256"),
    "ffn": ({**WIDE, "ffn_dim": 300}, "tq2_0", "ffn_dim is 300, expected a multiple of 256 for "
                                               "tq2_0: --type f16, or train with --ffn-dim 512"),
    "heads": ({**LLAMA, **WIDE, "head_dim": 8}, "q2_0",
              "num_heads times head_dim is 32, expected a multiple of 64 for q2_0: --type f16"),
    "unknown": ({}, "q8_0", "type is 'q8_0', expected one of tq2_0, tq1_0, q2_0, f16, f32"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "kind", "reason"), KIND_REFUSED.values(), ids=KIND_REFUSED)
def test_types_that_do_not_fit_say_what_does(file, changes, kind, reason):
    with pytest.raises(ValueError, match=reason):
        export_gguf(exportable(**changes), file, kind)
    assert not file.exists()


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["output.weight", "blocks.1.ffn.bi", "blocks.0.attention.wq"])
def test_numbers_that_are_not_finite_are_refused(file, name, value):
    model = exportable()
    weights = model.parameters[name]
    (weights.scales if isinstance(weights, TernaryMatrix) else weights).flat[0] = value
    with pytest.raises(ValueError, match=f"{name} holds a number that is not finite"):
        export_gguf(model, file)


def test_a_model_that_was_freed_is_refused(file):
    model = exportable()
    free_legacy_llm(model)
    with pytest.raises(ValueError, match="the model was freed"):
        export_gguf(model, file)


def test_a_package_that_is_missing_is_one_line(monkeypatch, file):
    monkeypatch.setitem(sys.modules, "gguf", None)
    for call in (load_gguf, lambda: export_gguf(exportable(), file)):
        with pytest.raises(
            ValueError, match=r"^GGUF files need gguf, which is not installed: pip install gguf"
        ):
            call()


# --- Whole or not at all --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=repr
)
@pytest.mark.parametrize("function", ["write_header_to_file", "write_tensors_to_file"])
def test_an_export_that_fails_leaves_the_old_file(file, monkeypatch, function, error):
    file.write_bytes(b"old")

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(gguf.GGUFWriter, function, fail)
    with pytest.raises(type(error)):
        export_gguf(exportable(), file)
    assert file.read_bytes() == b"old"
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_an_export_replaces_an_old_file(file):
    file.write_bytes(b"old")
    export_gguf(exportable(), file)
    assert_same_model(import_gguf(file), exportable())


def test_an_export_demands_a_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"missing/model\.gguf"):
        export_gguf(exportable(), tmp_path / "missing" / "model.gguf")


# --- Files that are not ours ----------------------------------------------------------------------


def refusal(path, content):
    """The one line that says why a file is refused."""
    path.write_bytes(content)
    with pytest.raises(ModelFileError) as caught:
        import_gguf(path)
    told = str(caught.value)
    assert told.startswith(f"{path} cannot be read: ")
    assert "\n" not in told
    return told


def number(value, size=8):
    return value.to_bytes(size, "little")


def text(string):
    return number(len(string.encode())) + string.encode()


def header(*keys, tensors=(), tensor_count=None, key_count=None):
    return b"".join([
        b"GGUF", number(3, 4), number(len(tensors) if tensor_count is None else tensor_count),
        number(len(keys) if key_count is None else key_count), *keys, *tensors,
    ])  # fmt: skip


def text_key(name, value):
    return text(name) + number(8, 4) + text(value)


def test_what_is_no_gguf_file_is_refused(file, tmp_path):
    save_model(exportable(), tmp_path / "run")
    other = (tmp_path / "run" / "model.safetensors").read_bytes()
    for content in (b"\x93NUMPY", b"gguf" + bytes(100), other):
        assert "expected b'GGUF'" in refusal(file, content)
    assert "it ends too early" in refusal(file, b"")
    assert "it has version 1, expected 2 or 3" in refusal(file, b"GGUF" + number(1, 4) + bytes(16))
    reason = "its numbers are big-endian, expected little-endian ones, as gguf-convert-endian"
    assert reason in refusal(file, b"GGUF" + (3).to_bytes(4, "big") + bytes(16))


def test_what_cannot_be_opened_is_an_oserror(tmp_path):
    for error, path in ((IsADirectoryError, tmp_path), (FileNotFoundError, tmp_path / "missing")):
        with pytest.raises(error):
            import_gguf(path)


def test_a_model_of_others_is_refused(file):
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(2)
    writer.add_token_list(["a", "b"])
    writer.add_array("some.scores", [0.5, 1.5])
    writer.add_float64("some.number", 1.5)
    writer.add_tensor("token_embd.weight", np.zeros((2, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    told = refusal(file, file.read_bytes())
    assert "it is a model of 'llama' without the key legacy1bit.config" in told
    assert "only files that legacy1bit wrote can be read" in told


HUGE = 1 << 60
PROMISES = {
    "tensors": header(tensor_count=HUGE),
    "keys": header(key_count=HUGE),
    "text": header(number(HUGE), key_count=1),
    "value": header(text("k") + number(8, 4) + number(HUGE)),
    "list": header(text("k") + number(9, 4) + number(6, 4) + number(HUGE)),
    "list of texts": header(text("k") + number(9, 4) + number(8, 4) + number(HUGE)),
    "list of lists": header(text("k") + number(9, 4) + number(9, 4) + number(HUGE)),
    "type": header(text("k") + number(77, 4)),
}


def limited(call, most=64 << 20):
    """Run a call that must not take more memory than that."""
    tracemalloc.start()
    try:
        return call()
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < most


@pytest.mark.parametrize("content", PROMISES.values(), ids=PROMISES)
def test_promises_of_a_header_take_no_memory(file, content):
    limited(lambda: refusal(file, content + bytes(1000)))


def ours(config, tensors=(), **changes):
    """The header of a file of ours, with settings of its own."""
    settings = {**config.to_dict(), **changes}
    arch = "nemotron."
    keys = [text_key("legacy1bit.config", json.dumps(settings))]
    for name, value in (
        ("context_length", config.sequence_length), ("embedding_length", config.model_dim),
        ("block_count", config.num_blocks), ("feed_forward_length", config.ffn_dim),
        ("attention.head_count", config.num_heads), ("attention.head_count_kv", config.num_heads),
        ("rope.dimension_count", config.head_dim), ("vocab_size", config.vocab_size),
    ):  # fmt: skip
        keys.append(text(arch + name) + number(4, 4) + number(value, 4))
    for name, value in (("attention.layer_norm_epsilon", 1e-5), ("rope.freq_base", 1e4)):
        keys.append(text(arch + name) + number(6, 4) + struct.pack("<f", value))
    return header(*keys, tensors=tensors)


def test_a_model_larger_than_its_file_takes_no_memory(file):
    config = ModelConfig(model_dim=1 << 14, num_blocks=1, num_heads=1 << 7, ffn_multiplier=1)
    export_gguf(exportable(num_blocks=1), file, "f16")
    tensors, start = [], 0
    for tensor in gguf.GGUFReader(file).tensors:
        shape = [256 if n == 11 else config.model_dim for n in tensor.shape.tolist()]
        kind = tensor.tensor_type
        tensors.append(text(tensor.name) + number(len(shape), 4) + b"".join(map(number, shape))
                       + number(int(kind), 4) + number(start))  # fmt: skip
        start += int(np.prod(shape)) * (2 if kind.name == "F16" else 4)
    told = limited(lambda: refusal(file, ours(config, tensors) + bytes(10_000)))
    assert "it ends too early" in told


CONFIGS = {
    "not json": ("{", "cannot be read"),
    "no object": ("[1]", "expected a dictionary of settings"),
    "deep": ("[" * 100_000, "cannot be read"),
    "long number": ('{"model_dim": ' + "9" * 10_000 + "}", "cannot be read"),
    "unknown": ('{"colour": 1}', "unknown setting 'colour'"),
    "wrong": ('{"model_dim": "x"}', "model_dim is 'x', expected a whole number"),
    "too large": ('{"model_dim": 100000000}', "model_dim is 100000000, expected 1 to"),
    "nan": ('{"rope_base": NaN}', "rope_base is nan"),
    "missing": ("{}", "it has no setting 'activation'"),
}


@pytest.mark.parametrize(("settings", "reason"), CONFIGS.values(), ids=CONFIGS)
def test_settings_that_are_none_are_refused(file, settings, reason):
    assert reason in refusal(file, header(text_key("legacy1bit.config", settings)))


@pytest.mark.parametrize(("changes", "reason"), REFUSED.values(), ids=REFUSED)
def test_settings_that_no_architecture_has_are_refused(file, changes, reason):
    settings = json.dumps(make_config(**{"output_bias": False, **changes}).to_dict())
    told = refusal(file, header(text_key("legacy1bit.config", settings)))
    assert "llama.cpp has no such models: those of the nearest family" in told


def test_keys_that_disagree_are_refused(file):
    told = refusal(file, ours(make_config(output_bias=False), num_heads=2))
    assert "its key nemotron.attention.head_count is 3, expected 2" in told
    told = refusal(file, ours(make_config(output_bias=False), rope_base=5.0))
    assert "its key nemotron.rope.freq_base is 10000.0, expected 5.0" in told
    content = ours(make_config(output_bias=False))
    place = place_of(content, "nemotron.context_length")
    for listed in ([], [16], [16, 16]):
        value = number(9, 4) + number(4, 4) + number(len(listed))
        value += b"".join(number(one, 4) for one in listed)
        told = refusal(file, content[:place] + value + content[place + 8 :])
        assert "its key nemotron.context_length is [" in told
    told = refusal(file, header(text("legacy1bit.config") + number(4, 4) + number(1, 4)))
    assert "its key legacy1bit.config is not a text" in told


def test_tied_embeddings_that_differ_are_refused(file):
    export_gguf(exportable(tied_embeddings=True), file)
    content = bytearray(file.read_bytes())
    content[int(offset_of(content, file, "output.weight"))] ^= 1
    assert "its output matrix is not its embedding" in refusal(file, content)


def test_a_file_of_another_architecture_is_refused(file):
    export_gguf(exportable(**LLAMA), file)
    content = file.read_bytes()
    told = refusal(file, content.replace(b"llama.context_length", b"qwen3.context_length"))
    assert "its key llama.context_length is None, expected 16" in told


# --- Damage ---------------------------------------------------------------------------------------


def replaced(content, old, new):
    assert len(old) == len(new)
    assert content.count(old) == 1
    return content.replace(old, new)


def place_of(content, name):
    """Where a tensor's description goes on behind its name."""
    return content.index(text(name)) + len(text(name))


DAMAGE = {
    "name": (lambda c: replaced(c, b"blk.0.ffn_up.bias", b"blk.0.ffn_up.bios"),
             "tensor 'blk.0.ffn_up.bias'"),
    "scales": (lambda c: replaced(c, b"legacy1bit.scales", b"legacy1bit.scalez"),
               "its key legacy1bit.scales is not a list of 6 numbers in float32"),
    "provenance": (lambda c: replaced(c, b"legacy1bit.provenance", b"legacy1bit.provenanse"),
                   "its key legacy1bit.provenance is not a text"),
    "steps": (lambda c: replaced(c, b'"steps": 7', b'"steps":-7'), "provenance: steps is -7"),
    "utf-8": (lambda c: replaced(c, b'"a text"', b'"a t\xffxt"'), "utf-8"),
    "rows": (lambda c: c[: place_of(c, "blk.0.attn_q.weight") + 4] + number(512)
             + c[place_of(c, "blk.0.attn_q.weight") + 12 :],
             "blk.0.attn_q.weight has shape [256, 512], expected [256, 256]"),
    "type": (lambda c: c[: place_of(c, "output_norm.bias") + 12] + number(1, 4)
             + c[place_of(c, "output_norm.bias") + 16 :], "output_norm.bias has type 1"),
    "no type": (lambda c: c[: place_of(c, "blk.0.attn_q.weight") + 20] + number(99, 4)
                + c[place_of(c, "blk.0.attn_q.weight") + 24 :],
                "blk.0.attn_q.weight has type 99"),
    "types": (lambda c: c[: place_of(c, "blk.0.attn_q.weight") + 20] + number(34, 4)
              + c[place_of(c, "blk.0.attn_q.weight") + 24 :], "stored at|different types"),
    "offset": (lambda c: c[: place_of(c, "output_norm.bias") + 16] + number(0)
               + c[place_of(c, "output_norm.bias") + 24 :], "output_norm.bias is stored at 0"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "reason"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_named(file, content, damage, reason):
    told = refusal(file, damage(content))
    assert any(one in told for one in reason.split("|"))


def offset_of(content, path, name):
    path.write_bytes(content)
    return next(one.data_offset for one in gguf.GGUFReader(path).tensors if one.name == name)


def test_blocks_that_hold_something_else_are_refused(file, content):
    start = int(offset_of(content, file, "blk.0.attn_q.weight"))
    # A code of 2, and another scale.
    told = refusal(file, content[:start] + b"\xff" + content[start + 1 :])
    assert "blocks.0.attention.wq: it holds a number that is not a code of its scheme" in told
    told = refusal(file, content[: start + 64] + b"\1\2" + content[start + 66 :])
    assert "blocks.0.attention.wq: its blocks have other scales" in told


def test_products_that_no_code_makes_are_refused(file):
    export_gguf(exportable(), file, "f32")
    content = file.read_bytes()
    start = int(offset_of(content, file, "blk.1.ffn_up.weight"))
    for value in (123.0, np.nan):
        told = refusal(file, content[:start] + struct.pack("<f", value) + content[start + 4 :])
        assert "blocks.1.ffn.wi: it holds a number that is not a code of its scheme" in told


def test_weights_that_are_not_finite_are_refused(file, content):
    start = int(offset_of(content, file, "output.weight"))
    told = refusal(file, content[:start] + struct.pack("<f", np.inf) + content[start + 4 :])
    assert "output.weight holds a number that is not finite" in told


@pytest.mark.parametrize(
    ("value", "reason"), [(2.0, "a scale is not 1"), (np.nan, "a scale is not a finite number")]
)
def test_scales_that_cannot_be_are_refused(file, value, reason):
    export_gguf(exportable(scale="one"), file)
    content = file.read_bytes()
    start = place_of(content, "legacy1bit.scales") + 16
    told = refusal(file, content[:start] + struct.pack("<f", value) + content[start + 4 :])
    assert reason in told


def test_files_that_end_early_are_refused(file, content):
    places = [*range(0, 8000, 37), *range(8000, len(content), 9973), len(content) - 40_000]
    for place in places:
        refusal(file, content[:place])


def test_flipped_bytes_are_refused_or_make_no_difference_to_the_shape(file, content):
    """Most of the file is weights, which can have any value: most places are in the header."""
    rng = np.random.default_rng(1)
    refused = 0
    config = make_config(output_bias=False, **WIDE)
    header_size = content.index(b"output_norm.bias") + 1000
    for draw in range(400):
        place = int(rng.integers(header_size if draw % 10 else len(content)))
        flipped = bytearray(content)
        flipped[place] ^= int(rng.integers(1, 256))
        file.write_bytes(flipped)
        try:
            found = import_gguf(file)
        except ModelFileError:
            refused += 1
        else:
            assert found.config.model_dim == config.model_dim
    assert refused > 40
