"""Trainings that go on from a model: its codes come back, and what its weights learn."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from helpers import oracle
from helpers.arrays import assert_close, assert_same_bits
from helpers.models import make_config, random_model
from helpers.runs import assert_same_files, make, newest, tiny, train
from legacy1bit.formats.hugging_face import export_hugging_face
from legacy1bit.hyperparams import ARCHITECTURES, ModelConfig
from legacy1bit.layout import parameter_layout, views
from legacy1bit.main import main
from legacy1bit.model import TernaryMatrix, create_legacy_llm, load_model, save_model
from legacy1bit.training.start import Start, started

SCHEMES = ("ternary", "ternary-median", "binary", "float")
SCALES = ("tensor", "row", "64")


def model_of(folder, **changes):
    """A random model, saved in a folder."""
    model = random_model(make_config(vocab_size=256, **changes))
    save_model(model, folder)
    return model


def filled(path, **changes):
    """A model that begins with the weights of another one."""
    start = Start.read(path)
    model = create_legacy_llm(started(start, changes), 7)
    start.fill(model)
    return model


def assert_same_model(found, expected):
    """Codes and floats are the same, scales to a rounding of float16."""
    for name, value in expected.parameters.items():
        other = found.parameters[name]
        if isinstance(value, TernaryMatrix):
            assert_same_bits(other.values, value.values, name)
            assert_close(other.scales, value.scales, rtol=2**-10, atol=0, dtype=np.float32)
        else:
            assert_same_bits(other, value, name)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_codes_and_scales_come_back(tmp_path, scheme, scale):
    expected = model_of(tmp_path, scheme=scheme, scale=scale, model_dim=132, num_blocks=1)
    assert_same_model(filled(tmp_path), expected)


def test_latent_weights_of_a_run_come_back(tmp_path):
    run = make(tmp_path)
    train(run)
    expected = newest(run).weights
    assert run.best[1] in (0, run.step), "the best model is the last one"
    start = Start(tmp_path, run.model.config, run.tokenizer)
    model = create_legacy_llm(run.model.config, 9)
    start.fill(model)
    for name, value in views(expected, parameter_layout(run.model.config)).items():
        assert_same_bits(model.latent[name], value, name)
    assert_same_model(model, load_model(tmp_path))


def test_a_model_of_hugging_face_can_go_on(tmp_path):
    config = ModelConfig(vocab_size=256, model_dim=64, num_heads=2, num_blocks=1)
    model = create_legacy_llm(config, 3)
    export_hugging_face(model, tmp_path / "hf")
    assert_same_model(filled(tmp_path / "hf"), model)


def online_model(folder, border=False):
    """A folder of Hugging Face whose matrices are bfloat16, to be quantized when it is loaded."""
    settings = {**ARCHITECTURES["bitnet"], "vocab_size": 300, "model_dim": 64, "num_blocks": 1}
    settings |= {"num_heads": 2, "num_kv_heads": 1, "ffn_dim": 96}
    model = create_legacy_llm(ModelConfig(**settings), 3)
    export_hugging_face(model, folder)
    path = folder / "model.safetensors"
    tensors, rng = {}, np.random.default_rng(4)
    for name, values in load_file(path).items():
        if values.dtype == np.uint8:
            shape = 4 * values.shape[0], values.shape[1]
            values = oracle.bfloat16(rng.normal(0.0, 0.05, shape)).astype(np.float32)
            # None lies on the border of two codes, or one between their scale and ours.
            sizes = np.abs(np.abs(values) / np.abs(values).mean() - 0.5)
            values[sizes < 0.005] = 0.0
            if border and "up_proj" in name:
                # A scale that float16 rounds down, and a weight between the halves of both.
                values[0, 0] = np.abs(values).mean() / 2
                scale = float(np.float16(np.abs(values).mean()))
                values *= np.float32(scale * (1 + 2e-4) / np.abs(values).mean(dtype=np.float64))
                values[0, 0] = scale * (1 + 1e-4) / 2
        elif name.endswith("_scale"):
            continue
        tensors[name] = values
    save_file(tensors, path, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["quantization_mode"] = "online"
    (folder / "config.json").write_text(json.dumps(config))
    return tensors


@pytest.mark.parametrize("border", [False, True])
def test_a_model_begins_with_the_floats_behind_its_codes(tmp_path, border):
    tensors = online_model(tmp_path / "hf", border)
    expected, model = load_model(tmp_path / "hf"), filled(tmp_path / "hf")
    assert_same_model(model, expected)
    names = {"attention.wq": "self_attn.q_proj", "ffn.wi": "mlp.up_proj", "ffn.wo": "mlp.down_proj"}
    for ours, theirs in names.items():
        latent = model.latent[f"blocks.0.{ours}"]
        found = np.array_equal(latent, tensors[f"model.layers.0.{theirs}.weight"])
        # Where ours would be another code, all weights are codes times scales.
        assert found == (not border or ours != "ffn.wi"), ours


def test_a_model_of_floats_becomes_ternary(tmp_path):
    given = model_of(tmp_path, scheme="float")
    model = filled(tmp_path, scheme="ternary")
    for name, value in given.parameters.items():
        assert_same_bits(model.latent[name], value, name)
    assert isinstance(model.parameters["blocks.0.ffn.wi"], TernaryMatrix)


def test_settings_of_the_model_hold(tmp_path):
    model_of(tmp_path)
    start = Start.read(tmp_path)
    assert started(start, {"sequence_length": 8}).sequence_length == 8
    with pytest.raises(ValueError, match=r"model_dim is 20, expected 12, that of "):
        started(start, {"model_dim": 20})
    with pytest.raises(ValueError, match="scheme is binary, expected ternary"):
        started(start, {"scheme": "binary"})


def test_codes_without_float_weights_are_refused(tmp_path):
    model_of(tmp_path, scheme="sign")
    with pytest.raises(ValueError, match="has the scheme sign, whose codes have no float weights"):
        filled(tmp_path)


# --- The command line -----------------------------------------------------------------------------


def ran(*words):
    assert main(list(map(str, words))) == 0


def begun(folder, *words):
    """Train a tiny model, and go on from it."""
    ran(*tiny(out=folder / "first"))
    ran("train", "--from", folder / "first", *words, "--out", folder / "second")
    return json.loads((folder / "second" / "training.json").read_text())


def test_train_goes_on_from_a_run(tmp_path):
    settings = begun(tmp_path, "--stories", 20, "--steps", 2, "--batch-size", 2, "--threads", 1)
    first = json.loads((tmp_path / "first" / "training.json").read_text())
    assert settings["model"] == first["model"]
    rate = first["training"]["learning_rate"]
    assert settings["training"]["learning_rate"] == pytest.approx(rate / 10)
    assert settings["source"]["from"] == str(tmp_path / "first")


def test_a_run_from_a_model_resumes_to_the_bit(tmp_path):
    common = ("--stories", 20, "--batch-size", 2, "--threads", 1, "--evaluate-every", 2)
    begun(tmp_path, *common, "--steps", 4, "--learning-rate", 0.01)
    ran("train", "--from", tmp_path / "first", *common, "--steps", 2, "--learning-rate", 0.01,
        "--warmup-steps", 1, "--out", tmp_path / "half")  # fmt: skip
    ran("train", "--from", tmp_path / "first", *common, "--steps", 4, "--learning-rate", 0.01,
        "--warmup-steps", 1, "--out", tmp_path / "whole")  # fmt: skip
    ran("train", "--resume", tmp_path / "half", "--steps", 4)
    assert_same_files(tmp_path / "half", tmp_path / "whole")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--config", "x"], "--from excludes --config"),
        (["--architecture", "llama"], "--from excludes --architecture"),
        (["--tokenizer", "chars"], "--from excludes --tokenizer"),
        (["--vocab-size", "300"], "--from excludes --vocab-size"),
        (["--model-dim", "16"], "model_dim is 16, expected 8"),
    ],
    ids=str,
)
def test_train_refuses_what_the_model_has(fail, tmp_path, words, told):
    ran(*tiny(out=tmp_path / "first"))
    assert told in fail("train", "--from", tmp_path / "first", *words)


def test_train_refuses_what_is_no_model(fail, tmp_path):
    assert "No such file" in fail("train", "--from", tmp_path / "missing")
    (tmp_path / "text").write_text("no model")
    assert "too few for a model file" in fail("train", "--from", tmp_path / "text")
    assert not Path(tmp_path / "out").exists()
