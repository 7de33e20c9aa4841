"""Models of others: golden ones, fabricated ones, and those that must be refused."""

import json
from dataclasses import replace

import numpy as np
import pytest

from helpers import oracle
from helpers.cases import together
from helpers.fabricated import fabricate
from helpers.published import GOLDEN, golden, golden_logits, with_golden_models
from legacy1bit.forward import forward_llm_batch
from legacy1bit.hyperparams import SamplingConfig
from legacy1bit.inference import Decoder
from legacy1bit.model import LegacyLLM, ModelFileError, TernaryMatrix, load_model
from legacy1bit.packed import PackedMatrix, PackedModel

GREEDY = SamplingConfig(temperature=0)


def logits_of(model, tokens):
    """The logits of a model for each position, up to a constant of each: float64[B, T, V]."""
    return centered(forward_llm_batch(model, tokens, logits=True).astype(np.float64))


def centered(logits):
    return logits - logits.mean(-1, keepdims=True)


def without_rounding(model):
    """The same weights in a model that does not round activations."""
    other = LegacyLLM(replace(model.config, int8_activations=False))
    for name, value in model.parameters.items():
        if isinstance(value, TernaryMatrix):
            other.parameters[name].values[...] = value.values
            other.parameters[name].scales[...] = value.scales
        else:
            other.parameters[name][...] = value
    return other


# --- Golden models --------------------------------------------------------------------------------


@with_golden_models
def test_logits_are_those_of_other_software():
    for path, about in golden():
        expected = centered(golden_logits(about))
        model = load_model(path)
        actual = logits_of(model, np.array(about["tokens"]))
        difference = np.abs(actual - expected).max() / np.abs(expected).max()
        # The tolerance of the golden models' own description.
        assert difference <= 1e-4, path.name
        assert model.config.int8_activations == ("int8" in about["references"][0]["arithmetic"])


@with_golden_models
def test_logits_without_rounding_are_those_of_other_software():
    for path, about in golden():
        for reference in about["references"][1:]:
            expected = centered(golden_logits({**about, "references": [reference]}))
            actual = logits_of(without_rounding(load_model(path)), np.array(about["tokens"]))
            difference = np.abs(actual - expected).max() / np.abs(expected).max()
            assert difference <= 1e-4, path.name


@with_golden_models
def test_decoders_are_close_to_other_software():
    """They round activations, keys and values to int8, of all models."""
    for path, about in golden():
        decoder = Decoder(PackedModel.load(path))
        for tokens, expected in zip(about["tokens"], golden_logits(about), strict=True):
            decoder.clear()
            actual = np.stack([decoder.prefill_logits([token])[-1] for token in tokens])
            difference = centered(actual.astype(np.float64)) - centered(expected)
            # The wide tolerance of their description, and what int8 keys and values add.
            assert np.sqrt((difference**2).mean() / (expected**2).mean()) <= 8e-2, path.name


@with_golden_models
def test_forms_of_one_model_are_the_same_model():
    paths = [path for path, about in golden() if about["name"] == "qwen3-gguf"]
    first, *others = [load_model(path) for path in [*paths, GOLDEN / "qwen3-fp16"]]
    assert len(others) == 4
    for other in others:
        assert other.config == first.config
        for name, value in first.parameters.items():
            same = other.parameters[name]
            if isinstance(value, TernaryMatrix):
                np.testing.assert_array_equal(value.values, same.values)
                np.testing.assert_array_equal(value.scales, same.scales)
            else:
                np.testing.assert_array_equal(value, same)


@with_golden_models
def test_units_of_scales_are_the_coarsest():
    units = {path.name: load_model(path).config.scale for path, _ in golden()}
    # A row of the TQ files is one block, and a shard of TriLM is some rows.
    assert units["bitnet-packed"] == units["bitnet-i2_s-odd-rows.gguf"] == "tensor"
    assert units["llama-tq2_0.gguf"] == units["llama-trilm"] == "row"
    # Also in blocks of 64.
    assert units["qwen3-q2_0.gguf"] == units["qwen3-pq2_0.gguf"] == "128"


REFUSE = GOLDEN / "refuse"


def expectations():
    file = REFUSE / "expect.json"
    return json.loads(file.read_text("utf-8")) if file.exists() else {}


@with_golden_models
@together(("name", "about"), list(expectations().items()))
def test_what_cannot_be_read_right_is_refused(name, about):
    path = REFUSE / name
    if about.get("accept"):
        load_model(path)
        PackedModel.load(path)
        return
    for load in (load_model, PackedModel.load):
        with pytest.raises(ModelFileError) as caught:
            load(path)
        message = str(caught.value)
        assert message.startswith(str(path))
        assert "\n" not in message
        reason = message.removeprefix(str(path)).lower()
        assert any(word.lower() in reason for word in about["message_should_name"]), reason
    assert not list(REFUSE.glob("**/REMOTE_CODE_WAS_RUN"))


@with_golden_models
@pytest.mark.parametrize("name", ["qwen3-q2_0.gguf", "bitnet-packed"])
def test_commands_take_published_models(name, say, fail, tmp_path):
    path = str(GOLDEN / name)
    out, _ = say("generate", "--model", path, "--prompt", "Hello", "--max-tokens", "3")
    assert out.startswith(b"Hello")
    assert b"num_kv_heads" in say("info", "--model", path)[0]
    text = tmp_path / "text.txt"
    text.write_text("Some text that the model reads.")
    assert b"perplexity" in say("evaluate", "--model", path, "--data", str(text))[0]
    line = fail("info", "--model", str(REFUSE / "tl1.gguf"))
    assert "TL1" in line


# --- Fabricated models ----------------------------------------------------------------------------


@together("seed", list(range(50)))
def test_fabricated_models_are_read_as_they_were_written(seed, tmp_path_factory):
    path, config, weights, about = fabricate(seed, tmp_path_factory.mktemp("model"))
    model = load_model(path)
    for name, value in config.items():
        stored = getattr(model.config, name)
        assert stored == (pytest.approx(value, rel=1e-7) if isinstance(value, float) else value)
    assert model.parameters.keys() == weights.keys()
    coded = about["unit"] == model.config.scale
    # Narrow matrices have coarser units than they were written with.
    assert coded or about["unit"] not in ("tensor", "row")
    for name, value in model.parameters.items():
        dense = value.dense() if isinstance(value, TernaryMatrix) else value
        np.testing.assert_allclose(dense, weights[name], rtol=1e-6, atol=1e-9, err_msg=name)

    tokens = np.random.default_rng(seed).integers(0, config["vocab_size"], (2, 9))
    settings = {**config, "int8_activations": False}
    expected = centered(oracle.forward(weights, settings, tokens)[0])
    actual = logits_of(without_rounding(model), tokens)
    assert np.abs(actual - expected).max() <= 1e-4 * np.abs(expected).max()

    packed = PackedModel.load(path)
    assert packed.config == model.config
    for name, value in packed.parameters.items():
        if isinstance(value, PackedMatrix):
            np.testing.assert_array_equal(value.values, model.parameters[name].values)
            np.testing.assert_array_equal(value.scales, model.parameters[name].scales)
