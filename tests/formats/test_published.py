"""Models of others: golden ones, fabricated ones, and those that must be refused."""

import json
import random
import re
import shutil
import struct
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest

from helpers import fabricated, oracle
from helpers.cases import together
from helpers.fabricated import fabricate, runs_of
from helpers.models import assert_same_model, random_model
from helpers.published import GOLDEN, damaged, golden, golden_logits, with_golden_models
from legacy1bit.formats import published, tensor_types
from legacy1bit.formats.c_v1 import export_c_v1
from legacy1bit.forward import forward_llm_batch
from legacy1bit.hyperparams import ModelConfig
from legacy1bit.inference import Decoder
from legacy1bit.main import main
from legacy1bit.model import LegacyLLM, ModelFileError, TernaryMatrix, load_model
from legacy1bit.packed import PackedMatrix, PackedModel
from legacy1bit.packing import Values


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


# --- Damaged files --------------------------------------------------------------------------------


def status_of(capfd, *arguments):
    """What a command ends with; where that is not 0, it says why in one line."""
    try:
        status = main([str(argument) for argument in arguments])
    except SystemExit as error:
        status = error.code
    _, errors = capfd.readouterr()
    if status:
        assert status == 2
        assert re.fullmatch(r"legacy1bit: error: [^\n]+\n", errors), errors
    return status


def check_damages(path, folder, capfd, cuts, flips):
    """Have a command read a model with each damage; return how many were refused."""
    rng = random.Random(path.name)
    copy = folder / path.name
    (shutil.copytree if path.is_dir() else shutil.copyfile)(path, copy)
    refused = 0
    for _ in damaged(copy, rng, cuts, flips):
        # A tokenizer may have lost the token of a letter, too.
        refused += bool(status_of(capfd, "generate", "--model", copy, "--max-tokens", "2",
                                  "--prompt", "a b", "--threads", "1"))  # fmt: skip
    return refused


@with_golden_models
def test_damaged_golden_models_are_read_or_refused_in_one_line(tmp_path, capfd):
    for path, _ in golden():
        assert check_damages(path, tmp_path, capfd, 3, 3) >= 3


@pytest.mark.slow
@pytest.mark.parametrize("name", [path.name for path, _ in golden()])
def test_damaged_golden_models_in_many_ways(name, tmp_path, capfd):
    assert check_damages(GOLDEN / name, tmp_path, capfd, 20, 200) >= 20


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


@together("seed", [0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11])
def test_matrices_are_the_same_however_many_rows_are_decoded_at_once(
    seed, tmp_path_factory, monkeypatch
):
    path, *_ = fabricate(seed, tmp_path_factory.mktemp("model"))
    whole = load_model(path)
    with monkeypatch.context() as patch:
        patch.setattr(tensor_types, "_AT_ONCE", 700)
        patch.setattr(tensor_types, "_CODES_AT_ONCE", 700)
        parts = load_model(path)
    assert parts.config == whole.config
    for name, value in whole.parameters.items():
        other = parts.parameters[name]
        if isinstance(value, TernaryMatrix):
            np.testing.assert_array_equal(other.values, value.values)
            np.testing.assert_array_equal(other.scales, value.scales)
        else:
            np.testing.assert_array_equal(other, value)


def test_runs_of_codes_go_on_over_the_ends_of_rows(monkeypatch):
    """Rows of 8,640 columns, as in 1bitLLM's 3B, are no whole runs of 128."""
    codes = np.random.default_rng(1).integers(-1, 2, (16, 8640)).astype(np.int8)
    data = np.frombuffer(runs_of(codes, 0.5), np.uint8)
    for at_once in (1, 20_000, 1 << 20):
        monkeypatch.setattr(tensor_types, "_CODES_AT_ONCE", at_once)
        matrix = tensor_types.RunsOf128(data, codes.shape)
        values = np.empty_like(codes)
        matrix.write(Values(values, (-1, 0, 1)), np.arange(16))
        np.testing.assert_array_equal(values, codes)
        assert matrix.scales()[0] == 0.5


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "Q4_K", "Q6_K", "TQ1_0", "TQ2_0", "BF16"])
def test_types_are_decoded_as_by_the_package_gguf(kind):
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    number = gguf.GGMLQuantizationType[kind]
    ours = tensor_types.TYPES[int(number)]
    data = np.random.default_rng(2).integers(0, 256, (6, 2048 // ours.block * ours.bytes), np.uint8)
    if kind == "TQ2_0":
        # No code is 3.
        data &= ~(data >> 1 & 0x55)
    if kind == "BF16":
        data[:, 1::2] &= 0x3F
    else:
        # Scales that are finite.
        data.reshape(6, -1, ours.bytes)[..., (1, 3, -1)] &= 0x3B
    expected = gguf.quants.dequantize(data, number)
    source = published._of_type(ours, data.reshape(-1), expected.shape)
    actual = source.dense() if source.floats is None else source.floats.all()
    np.testing.assert_array_equal(actual, expected)


def written(folder, **more):
    """A GGUF file of fabricated seed 0, with further keys."""
    with mock.patch.object(fabricated, "write_gguf", side_effect=fabricated.write_gguf) as write:
        fabricate(0, folder)
    path, keys, tensors, _ = write.call_args.args
    fabricated.write_gguf(path, keys | more, tensors, keys["general.alignment"])
    return path, keys, tensors


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("split.count", 3, "split.count is '3'"),
        ("general.alignment", 12, "expected a multiple of 8"),
        ("llama.attention.scale", 0.1, "its key llama.attention.scale is not known"),
        ("llama.expert_count", 8, "llama.expert_count is '8', expected 0"),
        ("llama.rope.scaling.yarn_beta_fast", 16.0, "yarn_beta_fast is '16.0', expected 32.0"),
        ("llama.attention.head_count_kv", 0, "head_count_kv is '0', expected a whole number above"),
        ("llama.rope.freq_base", 1.0, "its base of rotary positions is 1.0"),
        ("llama.vocab_size", 7, "llama.vocab_size is '7'"),
    ],
)
def test_keys_that_change_what_is_computed_are_refused(tmp_path, key, value, message):
    path, *_ = written(tmp_path, **{key: value})
    with pytest.raises(ModelFileError, match=re.escape(message)):
        load_model(path)


def test_any_base_above_1_is_read(tmp_path):
    path, *_ = written(tmp_path, **{"llama.rope.freq_base": 1.0625})
    assert load_model(path).config.rope_base == 1.0625


@together(
    ("numbers", "number"), [([3], 3), ([3, 3], 3), ([3, 4], None), ([3, 3, 4], None), ([], None)]
)
def test_numbers_of_blocks_are_read_where_they_are_the_same(numbers, number):
    settings = published.Settings({"a.b": np.array(numbers, np.int32)}, "a.")
    if number is not None:
        assert settings.integer("b") == number
        return
    with pytest.raises(
        ValueError, match=r"its setting a\.b is .*, expected a whole number above 0"
    ):
        settings.integer("b")


@together(
    ("bits", "is_first"),
    [
        ({"weight_bits": 1, "input_bits": 8}, True),
        ({"weight_bits": 1, "input_bits": 16}, False),
        ({"weight_bits": 2, "input_bits": 8}, False),
        ({"weight_bits": 1}, False),
        ({"input_bits": 8}, False),
        ({}, False),
    ],
)
def test_the_first_bitnets_state_the_bits_of_weights_and_inputs(bits, is_first):
    packing = published._Packing.of(published.Settings(bits), "llama")
    assert packing == (is_first, is_first, False, is_first)


def test_keys_without_effect_are_not(tmp_path):
    path, *_ = written(
        tmp_path,
        **{"general.name": "x", "llama.expert_count": 0, "llama.rope.scaling.finetuned": True},
        # llama.cpp's converter of BitNet says that.
        **{"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 1.0},
    )
    load_model(path)


@pytest.mark.parametrize("size", [0, 4, 23, 24, 100, 1000, -1000, -1])
def test_files_that_end_early_are_refused(tmp_path, size):
    path, *_ = written(tmp_path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ModelFileError, match=re.escape(str(path))):
        load_model(path)


@pytest.mark.parametrize("factor", [0.25, 1.125])
def test_scales_beside_matrices_multiply_them(tmp_path, factor):
    """llama.cpp's converter of BitNet writes them."""
    path, keys, tensors = written(tmp_path)
    plain = load_model(path).parameters["blocks.0.attention.wq"].dense()
    extra = ("blk.0.attn_q.scale", (1,), 0, struct.pack("<f", factor))
    fabricated.write_gguf(path, keys, [*tensors, extra], keys["general.alignment"])
    scaled = load_model(path).parameters["blocks.0.attention.wq"].dense()
    np.testing.assert_array_equal(scaled, plain * np.float32(factor))


def test_output_that_repeats_the_embedding_is_dropped(tmp_path):
    path, keys, tensors = written(tmp_path)
    named = {name: tensor for name, *tensor in tensors}
    rest = [tensor for tensor in tensors if tensor[0] != "output.weight"]
    both = [*rest, ("output.weight", *named["token_embd.weight"])]
    fabricated.write_gguf(path, keys, both, keys["general.alignment"])
    assert load_model(path).config.tied_embeddings


def test_floats_that_are_not_ternary_are_refused(tmp_path):
    path, *_ = fabricate(153, tmp_path)
    file = tmp_path / "model.safetensors"
    raw = bytearray(file.read_bytes())
    (length,) = struct.unpack_from("<Q", raw)
    entry = json.loads(raw[8 : 8 + length])["model.layers.0.mlp.up_proj.weight"]
    start = 8 + length + entry["data_offsets"][0]
    raw[start : start + 8] = np.array([1.0, 2.0], "<f4").tobytes()
    file.write_bytes(raw)
    with pytest.raises(ModelFileError, match=r"up_proj\.weight is not ternary"):
        load_model(path)


def test_a_folder_that_has_a_file_names_it(tmp_path):
    path, *_ = written(tmp_path)
    for load in (load_model, PackedModel.load):
        with pytest.raises(ModelFileError, match=re.escape(f"(--model takes {path})")):
            load(path.parent)


def test_ternary_embeddings_have_a_say_in_the_unit_where_both_are(tmp_path):
    path, keys, tensors = written(tmp_path)
    named = {name: tensor for name, *tensor in tensors}
    assert load_model(path).config.scale == "row"
    # A byte 0x19 has codes 1, 2, 1 and 0, which stand for 0, 1, 0 and -1.
    finer = {
        name: ((25, 256), 142, b"".join(struct.pack("<e", begin + block) + b"\x19" * 32
                                        for block in range(50)))
        for name, begin in (("token_embd.weight", 0.5), ("output.weight", 0.25))
    }  # fmt: skip
    for names, unit in ((["token_embd.weight"], "row"), (["output.weight"], "row"), (finer, "128")):
        changed = named | {name: finer[name] for name in names}
        tensors = [(name, *tensor) for name, tensor in changed.items()]
        fabricated.write_gguf(path, keys, tensors, keys["general.alignment"])
        model = load_model(path)
        assert (model.config.scale, model.config.ternary_embedding) == (unit, unit == "128")
        for theirs, ours, begin in (
            ("token_embd.weight", "embedding.weight", 0.5),
            ("output.weight", "output.weight", 0.25),
        ):
            if theirs in names:
                value = model.parameters[ours]
                dense = value.dense() if isinstance(value, TernaryMatrix) else value
                expected = [begin + block for block in (2, 2, 3, 3)]
                np.testing.assert_array_equal(dense[1, 1::64], expected)


def test_files_of_the_c_original_are_read(tmp_path):
    model = random_model(ModelConfig.c_original(64, 64, 1))
    export_c_v1(model, tmp_path / "model.bin")
    assert_same_model(load_model(tmp_path / "model.bin"), model)
    packed = PackedModel.load(tmp_path / "model.bin")
    for name, value in packed.parameters.items():
        expected = model.parameters[name]
        if isinstance(value, PackedMatrix):
            np.testing.assert_array_equal(value.values, expected.values)
        else:
            np.testing.assert_array_equal(value, expected)


def test_version_2_is_read_as_3(tmp_path):
    path, *_ = written(tmp_path)
    three = load_model(path)
    raw = bytearray(path.read_bytes())
    raw[4] = 2
    path.write_bytes(raw)
    two = load_model(path)
    assert two.config == three.config
    assert_same_model(two, three)


@pytest.mark.parametrize(
    ("version", "told"),
    [
        (1, "it has version 1, expected 2 or 3"),
        (4, "it has version 4, expected 2 or 3"),
        (2 << 24, "its numbers are big-endian"),
        (3 << 24, "its numbers are big-endian"),
    ],
)
def test_other_versions_are_refused(tmp_path, version, told):
    path, *_ = written(tmp_path)
    raw = bytearray(path.read_bytes())
    raw[4:8] = struct.pack("<I", version)
    path.write_bytes(raw)
    with pytest.raises(ModelFileError, match=told):
        load_model(path)


@pytest.mark.parametrize(("scales", "told"), [((1, 1), None), ((1, 2), "has scales of 32 weights")])
def test_blocks_of_32_are_read_where_64_share_a_scale(tmp_path, scales, told):
    path, keys, tensors = written(tmp_path)
    named = {name: tensor for name, *tensor in tensors}
    shape = named["blk.0.attn_q.weight"][0]
    rows, blocks = shape[0], shape[1] // 64
    signs = np.random.default_rng(3).integers(-1, 2, (rows, blocks, 2, 32)).astype(np.int8)
    content = b"".join(
        struct.pack("<e", scales[half] / 256) + (127 * signs[row, block, half]).tobytes()
        for row in range(rows) for block in range(blocks) for half in range(2)
    )  # fmt: skip
    changed = [(name, *tensor) for name, tensor in named.items() if name != "blk.0.attn_q.weight"]
    changed.append(("blk.0.attn_q.weight", shape, 8, content))
    fabricated.write_gguf(path, keys, changed, keys["general.alignment"])
    if told is not None:
        with pytest.raises(ModelFileError, match=rf"blk\.0\.attn_q\.weight {told}"):
            load_model(path)
        return
    found = np.sort(np.abs(load_model(path).parameters["blocks.0.attention.wq"].dense()), axis=None)
    np.testing.assert_array_equal(found, np.sort(np.abs(signs), axis=None) * np.float32(127 / 256))


def test_context_is_at_most_what_a_model_may_have(tmp_path):
    path, *_ = written(tmp_path, **{"llama.context_length": 1 << 20})
    assert load_model(path).config.sequence_length == 1 << 17


@pytest.mark.parametrize(
    ("earlier", "today"),
    [
        ("self_attn.inner_attn_ln.weight", "self_attn.attn_sub_norm.weight"),
        ("mlp.ffn_layernorm.weight", "mlp.ffn_sub_norm.weight"),
        ("mlp.up_proj.weight", "mlp.up_proj.weight"),
    ],
)
def test_norms_of_the_first_bitnets_have_other_names(earlier, today):
    assert published._name_today(f"model.layers.3.{earlier}") == f"model.layers.3.{today}"
