"""Folders for transformers: what is in them, and where it is installed, what it makes of them."""

import errno
import json
import os

import numpy as np
import pytest
from safetensors import safe_open

from helpers.arrays import assert_close, assert_same_bits
from helpers.models import exact_dense, make_config, random_model
from helpers.texts import TEXTS
from legacy1bit.data.tokenizer import ByteTokenizer, load_tokenizer, train_bpe
from legacy1bit.data_utils import tokenize_text
from legacy1bit.formats.hugging_face import export_hugging_face
from legacy1bit.formats.provenance import Provenance
from legacy1bit.forward import forward_llm, forward_llm_batch
from legacy1bit.generator import Generator
from legacy1bit.model import (
    LAYER_NORM_EPSILON,
    TernaryMatrix,
    load_model,
    save_model,
)

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
