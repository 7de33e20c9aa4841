"""Folders for transformers: what is in them and comes back, and what transformers makes of them."""

import errno
import functools
import json
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from helpers.arrays import assert_close, assert_same_bits
from helpers.models import assert_same_model, exact_dense, make_config, random_model
from helpers.texts import TEXTS
from legacy1bit.data.corpus import text_corpus
from legacy1bit.data.tokenizer import ByteTokenizer, train_bpe
from legacy1bit.data.tokenizer_files import load_tokenizer
from legacy1bit.data_utils import tokenize_text
from legacy1bit.formats.hugging_face import export_hugging_face, import_hugging_face
from legacy1bit.formats.provenance import Provenance
from legacy1bit.forward import forward_llm, forward_llm_batch
from legacy1bit.generator import Generator
from legacy1bit.hyperparams import ARCHITECTURES, TrainingConfig
from legacy1bit.logger import MetricsLogger
from legacy1bit.model import (
    LAYER_NORM_EPSILON,
    ModelFileError,
    TernaryMatrix,
    load_model,
    save_model,
)
from legacy1bit.training.trainer import Trainer

PROVENANCE = Provenance("a text", "0123abcd", 7, 1.25, "CC0-1.0")
FILES = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]

MODELS = {
    "ternary": {},
    "float": {"scheme": "float"},
    "2bit, a row, embedding": {"scheme": "2bit", "scale": "row", "ternary_embedding": True},
    "binary, 128": {"scheme": "binary", "scale": "128", "model_dim": 130, "num_heads": 5},
    "bytes": {"vocab_size": 256, "sequence_length": 64, "rope_base": 500.0},
    "no line break": {"vocab_size": 10},
    "more than bytes": {"vocab_size": 300},
}
models = pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)


def exportable(**changes):
    model = random_model(make_config(**{"output_bias": False, **changes}))
    model.provenance = PROVENANCE
    return model


YARN = {"rope_factor": 4.0, "rope_original_length": 1000}
# An architecture, changes of it, and the layer that transformers makes of its linear layers.
IN_FAMILIES = {
    "nemotron": ("nemotron", {}, "Linear"),
    "nemotron, grouped": ("nemotron", {"num_kv_heads": 1, "head_dim": 6, "tied_embeddings": True,
                                       "rope_pairs": "adjacent"}, "Linear"),
    "nemotron, partial": ("nemotron", {"rope_fraction": 0.5, "head_dim": 8, "biases": "none"},
                          "Linear"),
    "nemotron, yarn": ("nemotron", {**YARN, "norm_epsilon": 1e-3}, "Linear"),
    "llama": ("llama", {}, "Linear"),
    "llama, adjacent": ("llama", {"num_kv_heads": 1, "head_dim": 6, "rope_pairs": "adjacent",
                                  "biases": "all", "scale": "row", "scheme": "2bit"}, "Linear"),
    "llama, yarn": ("llama", {**YARN, "head_dim": 32, "tied_embeddings": True}, "Linear"),
    "llama, shards": ("llama", {"scale_shards": 2, "scheme": "ternary-median"}, "Linear"),
    "llama, one": ("llama", {"scale": "one", "scheme": "2bit"}, "Linear"),
    "llama, int8": ("llama", {"int8_activations": True, "num_kv_heads": 1}, "BitLinear"),
    "llama, int8, biases": ("llama", {"int8_activations": True, "biases": "all",
                                      "scheme": "binary"}, "BitLinear"),
    "qwen3": ("qwen3", {"head_dim": 10, "num_kv_heads": 1, "rope_pairs": "adjacent"}, "Linear"),
    "qwen3, yarn": ("qwen3", {**YARN, "head_dim": 32, "scale": "64", "ternary_embedding": True,
                              "tied_embeddings": True}, "Linear"),
    "qwen3, int8": ("qwen3", {"head_dim": 8, "int8_activations": True, "rope_pairs": "adjacent"},
                    "BitLinear"),
    "bitnet": ("bitnet", {"num_kv_heads": 1}, "AutoBitLinear"),
    "bitnet, silu": ("bitnet", {"activation": "silu", "tied_embeddings": False,
                                "scheme": "binary", **YARN}, "AutoBitLinear"),
    "bitnet, one": ("bitnet", {"scale": "one", "rope_pairs": "adjacent"}, "AutoBitLinear"),
    "bitnet, float": ("bitnet", {"int8_activations": False, "scheme": "float"}, "Linear"),
    "bitnet, row": ("bitnet", {"int8_activations": False, "scale": "row"}, "Linear"),
}  # fmt: skip
in_families = pytest.mark.parametrize("name", IN_FAMILIES)


def settings_of(name):
    architecture, changes, _ = IN_FAMILIES[name]
    return {**ARCHITECTURES[architecture], "ffn_dim": 20, **changes}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def read(folder, name):
    return json.loads((folder / name).read_bytes())


@models
def test_the_weights_are_those_that_count(tmp_path, changes):
    model = exportable(**changes)
    export_hugging_face(model, tmp_path)
    assert names(tmp_path) == FILES
    ours = {
        "embedding.weight": "model.embed_tokens.weight",
        "output.weight": "lm_head.weight",
        "final_norm.gamma": "model.norm.weight",
        "final_norm.beta": "model.norm.bias",
    }
    for i in range(model.config.num_blocks):
        for name, theirs in (("attention.{}q", "self_attn.q_proj"),
                             ("attention.{}k", "self_attn.k_proj"),
                             ("attention.{}v", "self_attn.v_proj"),
                             ("attention.{}o", "self_attn.o_proj"),
                             ("ffn.{}i", "mlp.up_proj"), ("ffn.{}o", "mlp.down_proj"),
                             ("norm1.{}", "input_layernorm"),
                             ("norm2.{}", "post_attention_layernorm")):  # fmt: skip
            parts = ("gamma", "beta") if "norm" in name else "wb"
            for part, kind in zip(parts, ("weight", "bias"), strict=True):
                ours[f"blocks.{i}.{name.format(part)}"] = f"model.layers.{i}.{theirs}.{kind}"
    assert sorted(ours) == sorted(model.parameters)
    with safe_open(tmp_path / "model.safetensors", framework="numpy") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert sorted(tensors) == sorted(ours.values())
    for name, value in model.parameters.items():
        found = tensors[ours[name]]
        if name.endswith("gamma"):
            # Their norms multiply by 1 more than the weight.
            assert_close(found + np.float32(1.0), value, rtol=2e-7, atol=1e-7, what=name)
        elif isinstance(value, TernaryMatrix):
            assert_same_bits(found, exact_dense(value).astype(np.float32), name)
        else:
            assert_same_bits(found, value, name)


def test_the_config_is_a_nemotrons(tmp_path):
    export_hugging_face(exportable(rope_base=500.0), tmp_path)
    config = read(tmp_path, "config.json")
    del config["legacy1bit"]
    assert config == {
        "architectures": ["NemotronForCausalLM"],
        "model_type": "nemotron",
        "vocab_size": 11,
        "hidden_size": 12,
        "intermediate_size": 36,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "head_dim": 4,
        "max_position_embeddings": 16,
        "hidden_act": "relu2",
        "norm_eps": LAYER_NORM_EPSILON,
        "rope_theta": 500.0,
        "partial_rotary_factor": 1.0,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "bos_token_id": 10,
        "eos_token_id": None,
        "pad_token_id": None,
    }


def test_settings_and_provenance_travel_along(tmp_path):
    model = exportable(scale="row")
    for name, value in model.parameters.items():
        if name.endswith("gamma"):
            np.maximum(value, 0.5, out=value)
    export_hugging_face(model, tmp_path)
    known = {"config": model.config.to_dict(), "provenance": PROVENANCE.to_dict()}
    assert read(tmp_path, "config.json")["legacy1bit"] == known
    with safe_open(tmp_path / "model.safetensors", framework="numpy") as file:
        header = file.metadata()
    assert header.pop("format") == "pt"
    assert {name: json.loads(value) for name, value in header.items()} == known


def test_a_file_name_that_is_no_unicode_goes_out(tmp_path):
    model = exportable()
    # What Python makes of the byte 0xff in a file's name.
    model.provenance = Provenance("a\udcffz")
    export_hugging_face(model, tmp_path)
    found = read(tmp_path, "config.json")["legacy1bit"]["provenance"]["data"]
    assert found == "a\udcffz"


def test_an_export_repeats_to_the_byte(tmp_path):
    for name in "ab":
        export_hugging_face(exportable(), tmp_path / name)
    for name in FILES:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


# --- Families -------------------------------------------------------------------------------------


def tensors_of(folder):
    with safe_open(folder / "model.safetensors", framework="numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def test_the_config_is_that_of_the_family(tmp_path):
    export_hugging_face(exportable(**settings_of("llama, yarn")), tmp_path)
    config = read(tmp_path, "config.json")
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["model_type"] == "llama"
    assert config["rms_norm_eps"] == 1e-5
    assert "norm_eps" not in config
    assert config["hidden_act"] == "silu"
    assert config["head_dim"] == 32
    assert config["tie_word_embeddings"]
    assert not config["attention_bias"]
    assert config["rope_scaling"] == {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1000
    }  # fmt: skip
    assert "quantization_config" not in config
    export_hugging_face(exportable(**settings_of("llama, adjacent")), tmp_path)
    config = read(tmp_path, "config.json")
    assert config["num_key_value_heads"] == 1
    assert config["mlp_bias"]
    assert "rope_scaling" not in config
    export_hugging_face(exportable(**settings_of("bitnet")), tmp_path)
    config = read(tmp_path, "config.json")
    assert config["architectures"] == ["BitNetForCausalLM"]
    assert config["quantization_config"] == {
        "quant_method": "bitnet",
        "linear_class": "autobitlinear",
        "quantization_mode": "offline",
        "modules_to_not_convert": ["lm_head"],
    }


def test_the_fraction_that_rotates_gives_its_elements(tmp_path):
    """transformers multiplies and rounds down: 0.58 of 100 elements would be 57."""
    for width, rotating in ((100, 58), (50, 14), (8, 4), (10, 6), (200, 58)):
        changes = {"head_dim": width, "rope_fraction": rotating / width}
        export_hugging_face(exportable(**changes), tmp_path)
        assert int(width * read(tmp_path, "config.json")["partial_rotary_factor"]) == rotating
        assert_same_model(import_hugging_face(tmp_path), exportable(**changes))


@pytest.mark.parametrize("name", ["bitnet", "llama, int8"])
def test_four_rows_share_a_byte(tmp_path, name):
    model = exportable(**settings_of(name))
    export_hugging_face(model, tmp_path)
    tensors = tensors_of(tmp_path)
    matrix = model.parameters["blocks.1.ffn.wi"]
    packed = tensors["model.layers.1.mlp.up_proj.weight"]
    assert packed.dtype == np.uint8
    assert packed.shape == (5, 12)
    for row in range(20):
        codes = (packed[row % 5] >> np.uint8(2 * (row // 5))).astype(np.int8) & 3
        assert_same_bits(codes - np.int8(1), matrix.values[row])
    scale = matrix.scales[0]
    stored = tensors["model.layers.1.mlp.up_proj.weight_scale"]
    # BitLinear divides by the scale, AutoBitLinear multiplies.
    assert_same_bits(stored, scale if name == "bitnet" else np.float32(1.0) / scale)
    assert tensors["model.embed_tokens.weight"].dtype == np.float32


@pytest.mark.parametrize(
    "changes", [{"scale": "row"}, {"scale_shards": 2}, {"ternary_embedding": True}, {"ffn_dim": 21},
                {"scheme": "2bit"}, {"scheme": "float"}, {"int8_activations": False}], ids=str,
)  # fmt: skip
def test_what_cannot_be_packed_is_float(tmp_path, changes):
    model = exportable(**{**settings_of("bitnet"), **changes})
    export_hugging_face(model, tmp_path)
    assert "quantization_config" not in read(tmp_path, "config.json")
    assert {tensor.dtype for tensor in tensors_of(tmp_path).values()} == {np.dtype("float32")}
    assert_same_model(import_hugging_face(tmp_path), model)


# --- There and back -------------------------------------------------------------------------------


@models
def test_nemotrons_come_back_to_the_bit(tmp_path, changes):
    model = exportable(**changes)
    export_hugging_face(model, tmp_path)
    back = import_hugging_face(tmp_path)
    assert_same_model(back, model)
    assert back.provenance == PROVENANCE


@in_families
def test_families_come_back_to_the_bit(tmp_path, name):
    model = exportable(**settings_of(name))
    export_hugging_face(model, tmp_path / "it")
    back = import_hugging_face(tmp_path / "it")
    assert_same_model(back, model)
    export_hugging_face(back, tmp_path / "again")
    for file in FILES:
        assert (tmp_path / "it" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()


def header_of(folder):
    with safe_open(folder / "model.safetensors", framework="numpy") as file:
        return file.metadata()


def test_the_header_has_what_the_tensors_hold_only_roughly(tmp_path):
    model = exportable()
    for name, value in model.parameters.items():
        if name.endswith("gamma"):
            np.maximum(value, 0.5, out=value)
    export_hugging_face(model, tmp_path)
    assert "exact" not in header_of(tmp_path)
    model.parameters["final_norm.gamma"][3] = 1e-3
    wo = model.parameters["blocks.0.ffn.wo"]
    wo.values[...] = 0
    model.parameters["blocks.1.ffn.wo"].scales[...] = 0.0
    model.parameters["blocks.1.ffn.wo"].values[...] = 0
    export_hugging_face(model, tmp_path)
    exact = json.loads(header_of(tmp_path)["exact"])
    assert sorted(exact) == ["blocks.0.ffn.wo", "final_norm.gamma"]
    assert exact["blocks.0.ffn.wo"] == wo.scales.ravel().tolist()
    assert_same_model(import_hugging_face(tmp_path), model)


def test_scales_of_every_size_come_back_from_packed_ones(tmp_path):
    """Also those whose reciprocal is not exact, and zero."""
    model = exportable(**settings_of("llama, int8"))
    rng = np.random.default_rng(1)
    for draw in range(20):
        for value in model.parameters.values():
            if isinstance(value, TernaryMatrix):
                value.scales[...] = np.float16(2.0 ** rng.uniform(-24, 15)) if draw else 0.0
        export_hugging_face(model, tmp_path)
        assert "exact" not in header_of(tmp_path)
        assert_same_model(import_hugging_face(tmp_path), model)


def rewritten(folder, change=lambda tensors: None, header=None):
    """Change a folder's tensors; by default without a header, as ``save_pretrained`` leaves it."""
    tensors = tensors_of(folder)
    change(tensors)
    save_file(tensors, folder / "model.safetensors", header)


UP = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("llama", lambda tensors: tensors[UP].__setitem__((0, 0), 0.12345), "0.ffn.wi holds"),
        ("llama", lambda tensors: tensors[UP].__setitem__((0, 0), np.nan), "not finite"),
        ("llama", lambda tensors: tensors["model.norm.weight"].__setitem__(0, np.inf),
         "final_norm.gamma holds a number that is not finite"),
        ("bitnet", lambda tensors: tensors[UP].__setitem__((0, 0), 255), "has the code 3"),
        ("bitnet, silu", lambda tensors: tensors[UP].__setitem__((0, 0), 0x55), "ffn.wi holds"),
        ("llama", lambda tensors: tensors.pop(UP), "weight is absent, expected F32[20, 12]"),
        ("llama", lambda tensors: tensors.update(x=tensors[UP]),
         "tensor x is F32[20, 12], expected absent"),
        ("llama", lambda tensors: tensors.update({UP: tensors[UP][:8].copy()}),
         "is F32[8, 12], expected F32[20, 12]"),
        ("bitnet", lambda tensors: tensors.update({UP: tensors[UP].astype(np.float32)}),
         "is F32[5, 12], expected U8[5, 12]"),
    ],
)  # fmt: skip
def test_other_tensors_are_refused(tmp_path, name, change, reason):
    export_hugging_face(exportable(**settings_of(name)), tmp_path)
    rewritten(tmp_path, change)
    with pytest.raises(ModelFileError) as caught:
        import_hugging_face(tmp_path)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_float_model_comes_back_after_further_training_elsewhere(tmp_path):
    model = exportable(**settings_of("bitnet, float"))
    export_hugging_face(model, tmp_path)
    rewritten(tmp_path, lambda tensors: tensors[UP].__imul__(np.float32(1.5)))
    model.parameters["blocks.0.ffn.wi"] *= np.float32(1.5)
    assert_same_model(import_hugging_face(tmp_path), model)


def other_config(folder, change):
    content = read(folder, "config.json")
    change(content)
    (folder / "config.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda content: content.pop("legacy1bit"), "only folders that legacy1bit wrote"),
        (lambda content: content.update(legacy1bit=[1]), "only folders that legacy1bit wrote"),
        (lambda content: content["legacy1bit"]["config"].update(rope_base=5.0),
         "is not the one that model.safetensors was saved with"),
    ],
)  # fmt: skip
def test_other_settings_are_refused(tmp_path, change, reason):
    export_hugging_face(exportable(**settings_of("llama")), tmp_path)
    other_config(tmp_path, change)
    with pytest.raises(ModelFileError, match=reason):
        import_hugging_face(tmp_path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda config: config.update(final_norm=False), "Llama, have no output without a norm"),
        (lambda config: config.pop("scheme"), "it has no setting 'scheme'"),
        (lambda config: config.update(colour=1), "unknown setting 'colour'"),
        # The types of the tensors are checked before memory is taken.
        (lambda config: config.update(model_dim=12288, num_blocks=1024), "expected F32"),
    ],
)
def test_settings_of_no_such_model_are_refused(tmp_path, change, reason):
    export_hugging_face(exportable(**settings_of("llama")), tmp_path)
    rewritten(tmp_path)
    other_config(tmp_path, lambda content: change(content["legacy1bit"]["config"]))
    with pytest.raises(ModelFileError, match=reason):
        import_hugging_face(tmp_path)


@pytest.mark.parametrize(
    ("exact", "reason"),
    [
        ("[1]", "exact is not a JSON object"),
        ("[" * 100_000, "recursion"),
        ('{"final_norm.gamma": [1.0]}', "cannot reshape"),
        ('{"final_norm.gamma": ["x"]}', "could not convert"),
        ('{"final_norm.gamma": [' + "1" * 400 + "]}", "too large"),
        (json.dumps({"final_norm.gamma": [1e39] * 12}), "not finite"),
        (json.dumps({"final_norm.gamma": [5.0] * 12}), "final_norm.gamma holds"),
        (json.dumps({"blocks.0.ffn.wi": [5.0]}), "0.ffn.wi holds"),
        (json.dumps({"blocks.0.ffn.wi": [1e39]}), "not finite"),
        (json.dumps({"blocks.0.ffn.wi": [3e38]}), "0.ffn.wi holds"),
    ],
    ids=lambda text: text[:30],
)
def test_exact_numbers_that_are_not_the_tensors_are_refused(tmp_path, exact, reason):
    export_hugging_face(exportable(), tmp_path)
    rewritten(tmp_path, header={"exact": exact})
    with pytest.raises(ModelFileError) as caught:
        import_hugging_face(tmp_path)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_folders_without_a_model_are_refused(tmp_path):
    with pytest.raises(ModelFileError, match=r"it has no config\.json"):
        import_hugging_face(tmp_path)
    export_hugging_face(exportable(), tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no")
    with pytest.raises(ModelFileError, match="is not a safetensors file"):
        import_hugging_face(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelFileError, match=r"it has no model\.safetensors"):
        import_hugging_face(tmp_path)
    export_hugging_face(exportable(), tmp_path)
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(ModelFileError, match="cannot be read"):
        import_hugging_face(tmp_path)


# --- The tokenizer --------------------------------------------------------------------------------


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_the_tokenizer_puts_the_line_break_before_our_tokens(tmp_path, text):
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    export_hugging_face(exportable(vocab_size=256), tmp_path)
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    expected = tokenize_text(text).tolist()
    assert tokenizer.encode(text).ids == [10, *expected]
    assert tokenizer.encode(text, add_special_tokens=False).ids == expected
    assert tokenizer.encode(text, text).ids == [10, *expected, *expected]
    assert tokenizer.decode(expected) == text


@pytest.mark.parametrize("vocab_size", [10, 11, 300])
def test_the_tokenizer_has_a_line_break_where_the_model_has(tmp_path, vocab_size):
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    export_hugging_face(exportable(vocab_size=vocab_size), tmp_path)
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    first = [10] if vocab_size > 10 else []
    assert tokenizer.encode("\x01\x02").ids == [*first, 1, 2]
    assert tokenizer.get_vocab_size() == min(vocab_size, 256)
    assert read(tmp_path, "config.json")["bos_token_id"] == (first[0] if first else None)


# --- Folders --------------------------------------------------------------------------------------


def test_an_earlier_export_is_replaced(tmp_path):
    export_hugging_face(exportable(), tmp_path)
    (tmp_path / "README.md").write_text("mine")
    export_hugging_face(exportable(vocab_size=7), tmp_path)
    assert read(tmp_path, "config.json")["vocab_size"] == 7
    assert names(tmp_path) == sorted(["README.md", *FILES])


def test_a_folder_is_made(tmp_path):
    export_hugging_face(exportable(), tmp_path / "a" / "b")
    assert names(tmp_path / "a" / "b") == FILES


OTHERS = {
    "file": lambda folder: (folder / "letter.txt").write_text("Dear Sir"),
    "run": lambda folder: save_model(exportable(), folder),
    "other model": lambda folder: (folder / "config.json").write_text('{"model_type": "llama"}'),
    "list": lambda folder: (folder / "config.json").write_text('["legacy1bit"]'),
    "text": lambda folder: (folder / "config.json").write_text('"legacy1bit"'),
    "key": lambda folder: (folder / "config.json").write_text('{"legacy1bit": 1}'),
    "damaged": lambda folder: (folder / "config.json").write_bytes(b"\xff{"),
    "folder": lambda folder: (folder / "config.json").mkdir(),
}


@pytest.mark.parametrize("fill", OTHERS.values(), ids=OTHERS)
def test_a_folder_of_something_else_is_left_alone(tmp_path, fill):
    fill(tmp_path)
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="holds something else than an earlier export"):
        export_hugging_face(exportable(), tmp_path)
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError):
        export_hugging_face(exportable(), tmp_path / "file")


def test_an_export_that_fails_leaves_the_old_one(tmp_path, monkeypatch):
    export_hugging_face(exportable(), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left on device"):
        export_hugging_face(exportable(vocab_size=7), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"activation": "relu"}, "--activation relu2"),
        ({"positions": "none"}, "--positions rope"),
        ({"attention_window": 3}, "--attention-window 0"),
        ({"sub_norm": True}, "--no-sub-norm"),
        ({"final_norm": False}, "--final-norm"),
        ({"output_bias": True}, "--no-output-bias"),
    ],
)
def test_models_that_are_no_nemotrons_are_refused(tmp_path, changes, reason):
    with pytest.raises(ValueError, match=f"train with {reason}$"):
        export_hugging_face(exportable(**changes), tmp_path / "new")
    assert names(tmp_path) == []


def test_numbers_that_are_not_finite_are_refused(tmp_path):
    model = exportable()
    model.parameters["output.weight"][0, 0] = np.nan
    with pytest.raises(ValueError, match=r"output\.weight holds a number that is not finite"):
        export_hugging_face(model, tmp_path)


# --- In transformers ------------------------------------------------------------------------------


@pytest.fixture
def transformers():
    pytest.importorskip("torch", reason="PyTorch is not installed")
    return pytest.importorskip("transformers", reason="transformers is not installed")


@models
def test_transformers_has_our_probabilities(transformers, tmp_path, changes):
    import torch

    model = exportable(**changes)
    export_hugging_face(model, tmp_path)
    twin, told = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert type(twin).__name__ == "NemotronForCausalLM"
    assert not any(told[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    config = model.config
    tokens = np.random.default_rng(3).integers(
        0, config.vocab_size, (2, config.sequence_length), np.int32
    )
    with torch.no_grad():
        theirs = torch.softmax(twin(torch.tensor(tokens, dtype=torch.int64)).logits, -1).numpy()
    assert_close(theirs, forward_llm(model, tokens), rtol=1e-3, atol=1e-6)


@functools.cache
def trained(name):
    """A model of a family that has learned a little, in a folder that is gone."""
    text = b"The cat sat on the mat. The dog ran to the cat. A hen saw the dog run.\n" * 40
    config = make_config(**{"output_bias": False, **settings_of(name), "vocab_size": 256})
    training = TrainingConfig(steps=100, warmup_steps=10, batch_size=4, precision="float32")
    length = config.sequence_length
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            Path(folder), config, training, text_corpus(text, "text", length, 256), {"name": "text"}
        )
        trainer.train(MetricsLogger(Path(folder)))
    return trainer.model


# PyTorch itself calls what it has deprecated.
@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated:DeprecationWarning")
@in_families
def test_transformers_has_the_log_probabilities_of_each_family(
    transformers, tmp_path, monkeypatch, name
):
    import torch

    if name == "nemotron, yarn" and int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip("its Nemotrons have no YaRN")
    linear = IN_FAMILIES[name][2]
    if linear != "Linear":
        pytest.importorskip("accelerate", reason="accelerate is not installed")
        # What packed layers call is compiled at its first call, which takes a C++ compiler.
        monkeypatch.setattr(torch._dynamo.config, "disable", True)
    model = trained(name)
    export_hugging_face(model, tmp_path)
    twin, told = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(told[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert [type(twin).__name__] == read(tmp_path, "config.json")["architectures"]
    assert twin.dtype == torch.float32
    assert type(twin.model.layers[1].mlp.down_proj).__name__ == linear
    text = np.frombuffer(b"The dog sat on the cat. A mat ran to the dog. A hen saw. " * 3, np.uint8)
    tokens = text[: 10 * 16].reshape(10, 16).astype(np.int32)
    with torch.no_grad():
        logits = twin(torch.tensor(tokens, dtype=torch.int64)).logits
        theirs = torch.log_softmax(logits.double(), -1).numpy()
    apart = np.abs(theirs - np.log(forward_llm(model, tokens).astype(np.float64))).max(axis=-1)
    # Both round activations to int8 by the same rule. Where the last bits of one lie on different
    # sides of a half, it moves by a whole step, and that row's later tokens with it.
    flipped = apart > 1e-4
    assert flipped.mean() <= (0.0 if linear == "Linear" else 0.05), apart.max()
    assert apart.max() < 0.1


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_transformers_has_our_tokens(transformers, tmp_path, text):
    export_hugging_face(exportable(vocab_size=256, sequence_length=1024), tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    expected = tokenize_text(text).tolist()
    assert tokenizer(text)["input_ids"] == [10, *expected]
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == expected
    assert tokenizer.decode(expected) == text


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_training_takes_the_tokenizer_of_an_export(tmp_path, say, fail, kind):
    """It is the model's own: the same tokens, the same hash, the same training to the bit."""
    text = tmp_path / "text.txt"
    text.write_text("the cat <|endoftext|> sat on the m\u00e4t\n" * 40, encoding="utf-8")
    if kind == "bytes":
        tokenizer = ByteTokenizer()
    else:
        pytest.importorskip("tokenizers", reason="tokenizers is not installed")
        tokenizer = train_bpe([text.read_bytes()], 270)
    model, export = tmp_path / "model", tmp_path / "export"
    save_model(exportable(vocab_size=tokenizer.vocab_size), model)
    tokenizer.save(model)
    say("export", "--model", model, "--format", "safetensors", "--out", export)
    taken = load_tokenizer(export)
    assert (taken.kind, taken.sha256) == (kind, tokenizer.sha256)
    assert_same_bits(taken.encode(text.read_bytes()), tokenizer.encode(text.read_bytes()))
    for folder in (model, export):
        say("train", "--data", text, "--tokenizer-from", folder, "--steps=2", "--model-dim=8",
            "--blocks=1", "--heads=1", "--sequence-length=8", "--batch-size=2", "--threads=1",
            "--cache", tmp_path / "cache", "--out", tmp_path / f"run-{folder.name}")  # fmt: skip
    runs = [tmp_path / f"run-{folder.name}" for folder in (model, export)]
    for name in ("model.safetensors", "tokenizer.json"):
        assert (runs[0] / name).read_bytes() == (runs[1] / name).read_bytes()
    # What puts another token before a text is another program's.
    content = read(export, "tokenizer.json")
    content["post_processor"]["single"].reverse()
    (export / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="not a tokenizer that legacy1bit wrote, or it is damaged"):
        load_tokenizer(export)


def test_export_is_read_as_a_model(tmp_path):
    model = exportable()
    export_hugging_face(model, tmp_path)
    tokens = np.arange(12)[None]
    np.testing.assert_allclose(
        forward_llm_batch(load_model(tmp_path), tokens),
        forward_llm_batch(model, tokens),
        rtol=1e-4,
        atol=1e-7,
    )
    assert Generator.load(tmp_path).complete("a", 3).tokens == 3
