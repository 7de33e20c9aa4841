"""LoRA adapters: there and back, several at once, merged, what PEFT and llama.cpp make of them, and
what is refused."""

import contextlib
import json
import random
import re
import struct
from dataclasses import replace

import numpy as np
import pytest

from helpers import gguf_file
from helpers.arrays import assert_close, assert_same_bits
from helpers.cases import together
from helpers.models import exact_dense, make_config, random_model
from helpers.published import damaged
from legacy1bit.formats import adapters
from legacy1bit.formats.adapters import LoraPair, LoraWeights
from legacy1bit.formats.gguf import export_gguf
from legacy1bit.formats.hugging_face import export_hugging_face
from legacy1bit.formats.provenance import Provenance
from legacy1bit.forward import forward_llm, forward_llm_batch
from legacy1bit.hyperparams import ARCHITECTURES
from legacy1bit.model import ModelFileError, TernaryMatrix

MODELS = {
    "nemotron": ("nemotron", {"rope_fraction": 0.5, "num_kv_heads": 1}),
    "llama": ("llama", {"num_kv_heads": 1, "head_dim": 6}),
    "llama, adjacent": ("llama", {"rope_pairs": "adjacent", "biases": "all", "scale": "row"}),
    "qwen3": ("qwen3", {"head_dim": 10, "rope_pairs": "adjacent"}),
    "bitnet": ("bitnet", {"activation": "silu"}),
}
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
every_model = pytest.mark.parametrize("name", MODELS)
PROVENANCE = Provenance("a text", "0123abcd", 7, 1.25, "CC0-1.0")


def config_of(name, **more):
    architecture, changes = MODELS[name]
    return make_config(
        **{**ARCHITECTURES[architecture], "output_bias": False, "ffn_dim": 20, **changes, **more}
    )


def adapter_of(config, seed=1, only="", ranks=(3,), alphas=(16.0,)):
    """An adapter with random numbers; ranks and alphas take turns."""
    rng = np.random.default_rng(seed)
    pairs = {}
    for i, (name, (rows, cols)) in enumerate(adapters.adaptable(config).items()):
        rank, alpha = ranks[i % len(ranks)], alphas[i % len(alphas)]
        a = (0.3 * rng.normal(size=(rank, cols))).astype(np.float32)
        b = (0.3 * rng.normal(size=(rows, rank))).astype(np.float32)
        if re.search(only, name):
            pairs[name] = LoraPair(a, b, alpha / rank)
    return LoraWeights(pairs, "someone/some-model", 0.05, PROVENANCE)


def assert_same_adapter(actual, expected):
    assert list(actual.pairs) == list(expected.pairs)
    for name, pair in expected.pairs.items():
        assert_same_bits(actual.pairs[name].a, pair.a, name)
        assert_same_bits(actual.pairs[name].b, pair.b, name)
        assert actual.pairs[name].scaling == pair.scaling
    assert (actual.base_model, actual.provenance) == (expected.base_model, expected.provenance)


def exact_sum(pair):
    """What a pair adds, float64[R, C]."""
    return pair.scaling * (pair.b.astype(np.float64) @ pair.a.astype(np.float64))


def exact_merged(model, *weighted):
    """The parameters of a model with adapters, in float64."""
    merged = {}
    for name, value in model.parameters.items():
        dense = exact_dense(value) if isinstance(value, TernaryMatrix) else value
        merged[name] = dense.astype(np.float64)
        for adapter, factor in weighted:
            if name in adapter.pairs:
                merged[name] = merged[name] + factor * exact_sum(adapter.pairs[name])
    return merged


# --- There and back -------------------------------------------------------------------------------

PARTS = {
    "all": {},
    "one matrix": {"only": r"1\.attention\.wv"},
    "some of each block": {"only": r"w[qo]$"},
    "other ranks and alphas": {"ranks": (2, 4, 1), "alphas": (8.0, 0.5)},
    "alpha of zero": {"alphas": (0.0,)},
    "negative alpha": {"alphas": (-4.0,), "ranks": (4,)},
}


@every_model
@pytest.mark.parametrize("part", PARTS)
def test_peft_folders_come_back(tmp_path, name, part):
    config = config_of(name)
    adapter = adapter_of(config, **PARTS[part])
    adapters.write_peft(adapter, config, tmp_path / "new" / "adapter")
    found = adapters.read_adapter(tmp_path / "new" / "adapter", config)
    assert_same_adapter(found, adapter)
    assert found.dropout == adapter.dropout
    assert found.rank == max(pair.rank for pair in adapter.pairs.values())


def test_target_modules_are_short_where_every_block_has_them(tmp_path):
    config = config_of("llama")
    for only, expected in (
        (r"w[qg]$", ["q_proj", "gate_proj"]),
        (r"1\.attention\.wv", ["model.layers.1.self_attn.v_proj"]),
        # All but one.
        (
            r"w[qkvo]$|ffn\.wi$|1.*w[go]$",
            [
                *(f"model.layers.0.self_attn.{name}" for name in MODULES[:4]),
                "model.layers.0.mlp.up_proj",
                "model.layers.0.mlp.down_proj",
                *(f"model.layers.1.self_attn.{name}" for name in MODULES[:4]),
                *(f"model.layers.1.mlp.{name}" for name in MODULES[4:]),
            ],
        ),
    ):
        adapter = adapter_of(config, only=only)
        adapters.write_peft(adapter, config, tmp_path)
        content = json.loads((tmp_path / "adapter_config.json").read_bytes())
        assert content["target_modules"] == expected
    assert adapter_of(config, only="wv$").targets == ("attention.wv",)


@every_model
def test_gguf_files_come_back(tmp_path, name):
    pytest.importorskip("gguf", reason="gguf is not installed")
    config = config_of(name)
    for part, changes in PARTS.items():
        adapter = adapter_of(config, **changes)
        adapters.write_gguf(adapter, config, tmp_path / "a.gguf")
        found = adapters.read_adapter(tmp_path / "a.gguf", config)
        if part in ("other ranks and alphas", "alpha of zero"):
            # A file has one alpha that is not 0: the scaling is in B.
            for matrix, pair in adapter.pairs.items():
                assert found.pairs[matrix].scaling == 1.0
                expected = np.float32(pair.scaling) * pair.b
                assert_same_bits(found.pairs[matrix].b, expected, matrix)
        else:
            assert_same_adapter(found, adapter)


def test_scaling_of_use_rslora_and_of_patterns(tmp_path):
    config = config_of("llama")
    adapter = adapter_of(config, ranks=(4,), alphas=(8.0,))
    adapters.write_peft(adapter, config, tmp_path)
    file = tmp_path / "adapter_config.json"
    content = json.loads(file.read_bytes())

    def scalings(**changes):
        file.write_text(json.dumps({**content, **changes}))
        pairs = adapters.read_adapter(tmp_path, config).pairs
        return {name.removeprefix("blocks."): pair.scaling for name, pair in pairs.items()}

    assert set(scalings().values()) == {2.0}
    assert set(scalings(use_rslora=True).values()) == {4.0}
    # The end of a module's name, or with ^ the whole of it; of several the first.
    patterns = {
        "^model.layers.0.self_attn.v_proj": 12,
        "1.self_attn.v_proj": 16,
        "v_proj$": 20,
        "^self_attn.k_proj": 24,
        "proj": 28,
    }
    for rslora in (False, True):
        found = scalings(alpha_pattern=patterns, use_rslora=rslora)
        root = 2 if rslora else 4
        assert found.pop("0.attention.wv") == 12 / root
        assert found.pop("1.attention.wv") == 16 / root
        assert set(found.values()) == {8 / root}
    # The rank is the file's, and must be that of the settings.
    assert set(scalings(r=5, rank_pattern={"proj": 3, **dict.fromkeys(MODULES, 4)}).values()) == {2}


FLOATS = {
    "F32": lambda x: x.astype("<f4"),
    "F16": lambda x: x.astype("<f2"),
    "BF16": lambda x: (x.astype("<f4").view("<u4") >> 16).astype("<u2"),
}


def write_tensors(path, tensors):
    """A safetensors file of (dtype, array) by name."""
    header, data = {}, b""
    for name, (dtype, values) in tensors.items():
        content = np.ascontiguousarray(values).tobytes()
        header[name] = {
            "dtype": dtype,
            "shape": list(values.shape),
            "data_offsets": [len(data), len(data) + len(content)],
        }
        data += content
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def tensors_of(adapter, config, dtype="F32"):
    """The tensors of PEFT's file, for models whose pairs of rows are halves."""
    modules = {
        **{f"attention.w{letter}": f"self_attn.{letter}_proj" for letter in "qkvo"},
        **{"ffn.wg": "mlp.gate_proj", "ffn.wi": "mlp.up_proj", "ffn.wo": "mlp.down_proj"},
    }
    found = {}
    for name, pair in adapter.pairs.items():
        _, block, ours = name.split(".", 2)
        theirs = f"base_model.model.model.layers.{block}.{modules[ours]}"
        found[f"{theirs}.lora_A.weight"] = dtype, FLOATS[dtype](pair.a)
        found[f"{theirs}.lora_B.weight"] = dtype, FLOATS[dtype](pair.b)
    return found


@pytest.mark.parametrize("dtype", FLOATS)
def test_floats_of_each_width_are_read(tmp_path, dtype):
    config = config_of("qwen3", rope_pairs="halves")
    adapter = adapter_of(config)
    # Numbers that eight significant bits hold.
    for pair in adapter.pairs.values():
        for values in (pair.a, pair.b):
            values[...] = np.round(values * 64) / 64
    adapters.write_peft(adapter, config, tmp_path)
    ours = (tmp_path / "adapter_model.safetensors").read_bytes()
    write_tensors(tmp_path / "adapter_model.safetensors", tensors_of(adapter, config, dtype))
    assert (tmp_path / "adapter_model.safetensors").read_bytes() != ours
    found = adapters.read_adapter(tmp_path, config)
    assert_same_adapter(found, replace(adapter, provenance=Provenance()))


# --- Several, and merged --------------------------------------------------------------------------


def test_combine_is_the_sum():
    config = config_of("llama")
    weighted = [
        (adapter_of(config, 1, "w[qv]$"), 0.5),
        (adapter_of(config, 2, "w[qo]$", ranks=(2, 5)), -1.25),
        (adapter_of(config, 3, "0.*wq$"), 0.0),
    ]
    one = adapters.combine(weighted)
    adapters.check_adapter(config, one)
    assert one.pairs["blocks.0.attention.wq"].rank == 3 + 2 + 3
    for name, pair in one.pairs.items():
        expected = sum(
            f * exact_sum(each.pairs[name]) for each, f in weighted if name in each.pairs
        )
        assert pair.scaling == 1.0
        assert_close(pair.b.astype(np.float64) @ pair.a, expected, rtol=1e-5, atol=1e-6)
    assert set(one.pairs) == {name for each, _ in weighted for name in each.pairs}


@every_model
def test_merged_parameters_are_the_sum(name):
    model = random_model(config_of(name))
    weighted = [(adapter_of(model.config, 1), 0.5), (adapter_of(model.config, 2, "wq$"), 2.0)]
    merged = adapters.merge(model.config, model.parameters, weighted)
    expected = exact_merged(model, *weighted)
    assert list(merged) == list(model.parameters)
    for parameter, value in merged.items():
        assert_close(value, expected[parameter], rtol=1e-5, atol=1e-5, what=parameter)
    whole = adapters.merged_model(model, weighted)
    assert whole.config == replace(model.config, scheme="float")
    for parameter, value in whole.parameters.items():
        assert_same_bits(value, merged[parameter], parameter)


def test_adapters_of_other_models_are_not_merged():
    model = random_model(config_of("llama"))
    wider = adapter_of(config_of("llama", ffn_dim=24))
    with pytest.raises(ValueError, match="it is an adapter of another model"):
        adapters.merge(model.config, model.parameters, [(wider, 1.0)])


def test_the_largest_scaling_is_that_of_float32():
    config = config_of("llama")
    adapter, largest = adapter_of(config, only="0.*wq$"), float(np.finfo(np.float32).max)
    for scaling, fits in ((largest, True), (-largest, True), (2.0 * largest, False)):
        pairs = {name: pair._replace(scaling=scaling) for name, pair in adapter.pairs.items()}
        with contextlib.nullcontext() if fits else pytest.raises(ValueError, match="the scaling"):
            adapters.check_adapter(config, replace(adapter, pairs=pairs))


def test_sums_beyond_float32_are_refused():
    model = random_model(config_of("llama"))
    config, adapter = model.config, adapter_of(model.config)
    with pytest.raises(ValueError, match=r"wq \(B, scaled\) holds a number that is not finite"):
        adapters.merge(config, model.parameters, [(adapter, 3e38)])
    with pytest.raises(ValueError, match=r"blocks\.0\.attention\.wq holds .* not finite"):
        adapters.merge(config, model.parameters, [(adapter, 3e37), (adapter, 3e37)] * 9)


@together(
    ("text", "path", "scale"),
    [
        ("a", "a", 1.0),
        ("a:0.5", "a", 0.5),
        ("a:-2", "a", -2.0),
        ("a:b:1e-3", "a:b", 1e-3),
        ("a:b", "a:b", 1.0),
        ("C:\\a", "C:\\a", 1.0),
        ("0.5", "0.5", 1.0),
        (":0.5", ":0.5", 1.0),
        ("a:", "a:", 1.0),
    ],
)
def test_split_scale(text, path, scale):
    assert adapters.split_scale(text) == (path, scale)


def test_split_scale_takes_what_exists_as_a_path(tmp_path):
    (tmp_path / "ä:2").mkdir()
    assert adapters.split_scale(f"{tmp_path}/ä:2") == (f"{tmp_path}/ä:2", 1.0)
    assert adapters.split_scale(f"{tmp_path}/ä:2:0.5") == (f"{tmp_path}/ä:2", 0.5)
    with pytest.raises(ValueError, match="--adapter is empty, expected a path"):
        adapters.split_scale("")


@pytest.mark.parametrize("scale", ["nan", "inf", "-inf"])
def test_split_scale_refuses_what_is_not_finite(scale):
    with pytest.raises(ValueError, match=f"is {scale}, expected a finite number"):
        adapters.split_scale(f"a:{scale}")


# --- In other programs ----------------------------------------------------------------------------


@every_model
def test_logits_of_llama_cpp_are_those_of_the_merged_model(tmp_path, name):
    """In float64, by the rules of its graphs: the rows of B are in the order of the file."""
    pytest.importorskip("gguf", reason="gguf is not installed")
    model = random_model(config_of(name))
    adapter = adapter_of(model.config)
    export_gguf(model, tmp_path / "m.gguf", "f32")
    adapters.write_gguf(adapter, model.config, tmp_path / "a.gguf")
    keys, tensors = gguf_file.read(tmp_path / "m.gguf")
    about, parts = gguf_file.read(tmp_path / "a.gguf")
    assert about["general.architecture"] == keys["general.architecture"]
    assert (about["general.type"], about["adapter.type"]) == ("adapter", "lora")
    assert about["general.base_model.0.name"] == "someone/some-model"
    for matrix in {part.rpartition(".")[0] for part in parts}:
        a, b = parts[f"{matrix}.lora_a"][1], parts[f"{matrix}.lora_b"][1]
        kind, weights = tensors[matrix]
        # What get_scale of llama-adapter.h gives.
        tensors[matrix] = kind, weights + about["adapter.lora.alpha"] / len(a) * (b @ a)
    assert len(parts) == 2 * len(adapter.pairs)
    tokens = [3, 1, 4, 1, 5]
    theirs = gguf_file.logits(keys, tensors, tokens)
    whole = adapters.merged_model(model, [(adapter, 1.0)])
    ours = forward_llm(whole, np.array([tokens], np.int32))[0]
    theirs = np.exp(theirs - theirs.max(-1, keepdims=True))
    assert_close(ours, theirs / theirs.sum(-1, keepdims=True), rtol=1e-3, atol=1e-6)


PEFT_MODELS = {**MODELS, "bitnet": ("bitnet", {})}


# PEFT calls what transformers is about to remove.
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("part", ["all", "one matrix", "other ranks and alphas"])
@pytest.mark.parametrize("name", PEFT_MODELS)
def test_peft_has_the_logits_of_the_merged_model(tmp_path, name, part):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    peft = pytest.importorskip("peft", reason="peft is not installed")
    architecture, changes = PEFT_MODELS[name]
    model = random_model(
        make_config(
            **{**ARCHITECTURES[architecture], "output_bias": False, "ffn_dim": 20, **changes,
               "int8_activations": False}
        )
    )  # fmt: skip
    adapter = adapter_of(model.config, **PARTS[part])
    # PEFT looks elsewhere for models that are not on disk.
    adapter = replace(adapter, base_model=str(tmp_path / "model"))
    export_hugging_face(model, tmp_path / "model")
    adapters.write_peft(adapter, model.config, tmp_path / "adapter")
    twin = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokens = np.random.default_rng(3).integers(0, model.config.vocab_size, (2, 9), np.int32)
    numbers = torch.tensor(tokens, dtype=torch.int64)
    with torch.no_grad():
        before = twin(numbers).logits
        twin = peft.PeftModel.from_pretrained(twin, tmp_path / "adapter").eval()
        logits = twin(numbers).logits
        assert (logits - before).abs().max() > 0.01
        theirs = torch.softmax(logits, -1).numpy()
    whole = adapters.merged_model(model, [(adapter, 1.0)])
    assert_close(forward_llm(whole, tokens), theirs, rtol=2e-3, atol=1e-6)
    pairs = adapters.read_adapters([(tmp_path / "adapter", 1.0)], model.config)
    beside = forward_llm_batch(model.with_adapter(pairs), tokens, logits=True)
    assert_close(beside, logits.numpy(), rtol=0, atol=1e-4)
    # And what PEFT writes is read.
    twin.save_pretrained(tmp_path / "again")
    found = adapters.read_adapter(tmp_path / "again", model.config)
    for matrix, pair in adapter.pairs.items():
        assert_close(found.pairs[matrix].dense(), exact_sum(pair), rtol=1e-5, atol=1e-5)


# --- What is refused ------------------------------------------------------------------------------

WRONG_SETTINGS = {
    "peft_type": ({"peft_type": "LOHA"}, "its peft_type is 'LOHA', expected LORA"),
    "no peft_type": ({"peft_type": None}, "its setting peft_type is missing"),
    "dora": ({"use_dora": True}, "it is a DoRA adapter"),
    "bias": ({"bias": "lora_only"}, "its setting bias is 'lora_only', expected 'none'"),
    "modules": ({"modules_to_save": ["lm_head"]}, 'its setting modules_to_save is ["lm_head"]'),
    "fan_in": ({"fan_in_fan_out": True}, "its setting fan_in_fan_out is true, expected none"),
    "lora_bias": ({"lora_bias": True}, "its setting lora_bias"),
    "tokens": ({"trainable_token_indices": [1]}, "its setting trainable_token_indices"),
    "alora": ({"alora_invocation_tokens": [1]}, "its setting alora_invocation_tokens"),
    "later": ({"of_tomorrow": 1}, "its setting of_tomorrow is 1, expected none: it could change"),
    "pissa": ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4', which changes the weights"),
    "rslora": ({"use_rslora": "yes"}, "its setting use_rslora is 'yes', expected True or False"),
    "r": ({"r": 0}, "its setting r is '0', expected a whole number above 0"),
    "other r": ({"r": 4}, "has rank 3, expected 4 by its settings"),
    "no alpha": ({"lora_alpha": None}, "its setting lora_alpha is missing"),
    "alpha": ({"lora_alpha": "16"}, "its setting lora_alpha is '16', expected a number"),
    "infinite": ({"lora_alpha": float("inf")}, "its setting lora_alpha is 'inf'"),
    "large": ({"lora_alpha": 1e300}, "has the scaling 3.3333333333333335e+299, expected"),
    "huge": ({"lora_alpha": 10**400}, "too large"),
    "pattern": ({"alpha_pattern": {"(a+)+$": 2}}, "its alpha_pattern has '(a+)+$', expected names"),
    "no pattern": ({"rank_pattern": [1]}, "its setting rank_pattern is not an object"),
    "rank pattern": ({"rank_pattern": {"k_proj": 5}}, "k_proj has rank 3, expected 5"),
    "base": ({"base_model_name_or_path": 3}, "its setting base_model_name_or_path is '3'"),
}  # fmt: skip


@pytest.fixture
def peft_folder(tmp_path):
    config = config_of("qwen3", rope_pairs="halves")
    adapters.write_peft(adapter_of(config), config, tmp_path)
    return config, tmp_path


def refusal(path, config):
    """The line with which a file or folder is refused, without its path."""
    with pytest.raises(ModelFileError) as caught:
        adapters.read_adapter(path, config)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{path} cannot be read: ")
    return message.removeprefix(f"{path} cannot be read: ")


def test_settings_that_change_what_is_computed_are_refused(peft_folder):
    config, folder = peft_folder
    file = folder / "adapter_config.json"
    content = json.loads(file.read_bytes())
    for changes, told in WRONG_SETTINGS.values():
        file.write_text(json.dumps({**content, **changes}))
        assert told in refusal(folder, config)
    empty = dict.fromkeys(("use_dora", "lora_bias", "modules_to_save", "of_tomorrow"))
    allowed = {"init_lora_weights": "gaussian", "task_type": None, "layers_to_transform": [0]}
    file.write_text(json.dumps({**content, **empty, **allowed}))
    assert_same_adapter(adapters.read_adapter(folder, config), adapter_of(config))


@together(
    ("text", "told"),
    [
        (b"\xff{", "codec can't decode"),
        (b"{", "Expecting property name"),
        (b"[" * 50_000, "recursion"),
        (b"[1]", "holds no JSON object"),
        (b"{}", "its setting peft_type is missing"),
    ],
)
def test_other_json_is_refused(tmp_path_factory, text, told):
    folder = tmp_path_factory.mktemp("adapter")
    (folder / "adapter_config.json").write_bytes(text)
    assert told in refusal(folder, config_of("qwen3"))


MATRIX = "base_model.model.model.layers.1.mlp.up_proj"
A, B = f"{MATRIX}.lora_A.weight", f"{MATRIX}.lora_B.weight"


def moved(name, other):
    def change(tensors):
        tensors[other] = tensors.pop(name)

    return change


def changed(name, *tensor):
    return lambda tensors: tensors.update({name: tensor})


def with_number(value):
    def change(tensors):
        tensors[A][1][0, 0] = value

    return change


WRONG_TENSORS = {
    "no A": (lambda tensors: tensors.pop(A), "blocks.1.ffn.wi has no A"),
    "no B": (lambda tensors: tensors.pop(B), "blocks.1.ffn.wi has no B"),
    "none": (lambda tensors: tensors.clear(), "it has no matrices, expected at least one"),
    "block": (moved(A, A.replace(".1.", ".2.")), "layers.2.mlp.up_proj.lora_A.weight, expected"),
    "prefix": (moved(A, A.removeprefix("base_model.")), "it has the tensor model.model.layers.1"),
    "norm": (moved(A, A.replace("mlp.up_proj", "input_layernorm")), "matrices in the model's blo"),
    "output": (moved(A, "base_model.model.lm_head.lora_A.weight"), "it has the tensor base_model"),
    "embedding": (
        moved(A, "base_model.model.model.embed_tokens.lora_embedding_A"),
        "embed_tokens.lora_embedding_A, expected lora_A and lora_B of matrices in the model's bl",
    ),
    "dora": (
        changed(f"{MATRIX}.lora_magnitude_vector", "F32", np.ones(20, "<f4")),
        "up_proj.lora_magnitude_vector, expected lora_A and lora_B",
    ),
    "integers": (changed(A, "I32", np.ones((3, 20), "<i4")), "is I32, expected F32, F16 or BF16"),
    "vector": (changed(A, "F32", np.ones(3, "<f4")), "blocks.1.ffn.wi has A of shape [3]"),
    "ranks": (changed(A, "F32", np.ones((2, 20), "<f4")), "has rank 2, expected 3"),
    "columns": (changed(A, "F32", np.ones((3, 7), "<f4")), "blocks.1.ffn.wi has A of shape [3, 7]"),
    "rows": (changed(B, "F32", np.ones((7, 3), "<f4")), "and B of shape [7, 3], expected [r, "),
    "B's rank": (changed(B, "F32", np.ones((20, 2), "<f4")), "and B of shape [20, 2], expected"),
    "rows of queries": (
        changed(
            "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight",
            *("F32", np.ones((7, 3), "<f4")),
        ),
        "blocks.1.attention.wq has A of shape",
    ),
    "NaN": (with_number(np.nan), "blocks.1.ffn.wi holds a number that is not finite"),
    "infinity": (with_number(-np.inf), "blocks.1.ffn.wi holds a number that is not finite"),
}


@pytest.mark.parametrize("pairs", ["halves", "adjacent"])
def test_tensors_of_something_else_are_refused(peft_folder, pairs):
    config, folder = peft_folder
    config = replace(config, rope_pairs=pairs)
    for change, told in WRONG_TENSORS.values():
        tensors = tensors_of(adapter_of(config), config)
        change(tensors)
        write_tensors(folder / "adapter_model.safetensors", tensors)
        assert told in refusal(folder, config)


def test_other_folders_are_refused(tmp_path, peft_folder):
    config, folder = peft_folder
    weights = folder / "adapter_model.safetensors"
    weights.rename(folder / "adapter_model.bin")
    assert "adapter_model.bin is a pickle, which is not read" in refusal(folder, config)
    (folder / "adapter_model.bin").unlink()
    assert refusal(folder, config) == "it has no adapter_model.safetensors"
    (folder / "adapter_config.json").unlink()
    assert refusal(folder, config) == "it is no adapter: it has no adapter_config.json"


def test_other_folders_are_not_overwritten(tmp_path):
    config = config_of("llama")
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(ValueError, match="holds something else than an adapter: choose another"):
        adapters.write_peft(adapter_of(config), config, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


@pytest.mark.parametrize("write", [adapters.write_peft, adapters.write_gguf])
def test_adapters_of_other_models_are_not_written(tmp_path, write):
    if write is adapters.write_gguf:
        pytest.importorskip("gguf", reason="gguf is not installed")
    config = config_of("llama")
    adapter = adapter_of(config)
    bad = adapter.pairs["blocks.0.ffn.wi"]._replace(scaling=float("nan"))
    for wrong, told in (
        (replace(adapter, pairs={}), "it has no matrices"),
        (adapter_of(config_of("llama", num_blocks=3)), "has the matrix blocks.2.attention.wq, whi"),
        (adapter_of(config_of("llama", ffn_dim=24)), "it is an adapter of another model"),
        (replace(adapter, pairs={"blocks.0.ffn.wi": bad}), "has the scaling nan"),
        (replace(adapter, pairs={"embedding.weight": bad}), "it has the matrix embedding.weight"),
    ):
        with pytest.raises(ValueError, match=re.escape(told)):
            write(wrong, config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- GGUF files -----------------------------------------------------------------------------------


def write_gguf_file(path, keys, tensors):
    """A GGUF file of keys, and of (type, array) by name."""

    def text(value):
        return struct.pack("<Q", len(value.encode())) + value.encode()

    def key(name, value):
        if isinstance(value, str):
            return text(name) + struct.pack("<I", 8) + text(value)
        if isinstance(value, list):
            return text(name) + struct.pack(f"<IIQ{len(value)}I", 9, 4, len(value), *value)
        return text(name) + struct.pack("<If", 6, value)

    content = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys))
    content += b"".join(key(*item) for item in keys.items())
    data = b""
    for name, (kind, values) in tensors.items():
        data += bytes(-len(data) % 32)
        axes = values.shape[::-1]
        content += text(name) + struct.pack(f"<I{len(axes)}QIQ", len(axes), *axes, kind, len(data))
        data += np.ascontiguousarray(values).tobytes()
    path.write_bytes(content + bytes(-len(content) % 32) + data)


KEYS = {
    "general.architecture": "qwen3",
    "general.type": "adapter",
    "adapter.type": "lora",
    "adapter.lora.alpha": 6.0,
}
WI_A, WI_B = (f"blk.1.ffn_up.weight.lora_{part}" for part in "ab")


def gguf_tensors(config):
    rows, cols = adapters.adaptable(config)["blocks.1.ffn.wi"]
    rng = np.random.default_rng(5)
    return {
        WI_A: (0, rng.normal(size=(3, cols)).astype("<f4")),
        WI_B: (0, rng.normal(size=(rows, 3)).astype("<f4")),
    }


def test_gguf_files_of_others_are_read(tmp_path):
    config, path = config_of("qwen3"), tmp_path / "a.gguf"
    tensors = gguf_tensors(config)
    for changes, scaling in (({}, 2.0), ({"adapter.lora.alpha": 0.0}, 1.0)):
        keys = {**KEYS, "adapter.lora.task_name": "to rhyme", **changes}
        write_gguf_file(path, keys, tensors)
        ((name, pair),) = adapters.read_adapter(path, config).pairs.items()
        assert (name, pair.scaling) == ("blocks.1.ffn.wi", scaling)
        assert_same_bits(pair.a, tensors[WI_A][1])
        assert_same_bits(pair.b, tensors[WI_B][1])
    halves = {name: (1, values.astype("<f2")) for name, (_, values) in tensors.items()}
    write_gguf_file(path, KEYS, halves)
    pair = adapters.read_adapter(path, config).pairs["blocks.1.ffn.wi"]
    assert_same_bits(pair.b, halves[WI_B][1].astype(np.float32))


def test_gguf_files_of_other_names_of_an_architecture_are_read(tmp_path):
    config, path = config_of("bitnet", activation="relu2"), tmp_path / "a.gguf"
    for name in ("bitnet", "bitnet-b1.58", "bitnet-25"):
        write_gguf_file(path, {**KEYS, "general.architecture": name}, gguf_tensors(config))
        assert list(adapters.read_adapter(path, config).pairs) == ["blocks.1.ffn.wi"]


def test_gguf_files_of_something_else_are_refused(tmp_path):
    config, path = config_of("qwen3"), tmp_path / "a.gguf"
    for changes, told in (
        ({"general.type": "model"}, "its key general.type is 'model', not adapter"),
        ({"general.type": None}, "its key general.type is 'model', not adapter"),
        ({"adapter.type": "control_vector"}, "its key adapter.type is 'control_vector', not lora"),
        ({"adapter.alora.invocation_tokens": [1]}, "it is an aLoRA adapter"),
        ({"general.architecture": "llama"}, "it is an adapter of 'llama', and the model is anoth"),
        ({"general.architecture": "gpt2"}, "it is an adapter of 'gpt2', and the model is another"),
        ({"general.architecture": None}, "its setting general.architecture is missing"),
        ({"adapter.lora.alpha": "6"}, "its setting adapter.lora.alpha is '6', expected a number"),
        ({"adapter.lora.alpha": float("nan")}, "its setting adapter.lora.alpha is 'nan'"),
    ):
        keys = {name: value for name, value in {**KEYS, **changes}.items() if value is not None}
        write_gguf_file(path, keys, gguf_tensors(config))
        assert told in refusal(path, config)
    for change, told in (
        (lambda tensors: tensors.pop(WI_A), "blocks.1.ffn.wi has no A"),
        (
            moved(WI_A, "token_embd.weight.lora_a"),
            "it has the tensor token_embd.weight.lora_a, exp",
        ),
        (moved(WI_A, "output.weight.lora_a"), "it has the tensor output.weight.lora_a, expected"),
        (moved(WI_A, "blk.1.attn_norm.weight"), "it has the tensor blk.1.attn_norm.weight, expec"),
        (moved(WI_A, "blk.7.ffn_up.weight.lora_a"), "it has the tensor blk.7.ffn_up.weight.lora_a"),
        (changed(WI_A, 0, np.ones((3, 7), "<f4")), "blocks.1.ffn.wi has A of shape [3, 7]"),
        (changed(WI_A, 0, np.full((3, 20), np.nan, "<f4")), "holds a number that is not finite"),
        (changed(WI_A, 24, np.ones((3, 20), "<i1")), "has type 24, which is I8"),
    ):
        tensors = gguf_tensors(config)
        change(tensors)
        write_gguf_file(path, KEYS, tensors)
        assert told in refusal(path, config)


def test_a_file_that_is_no_gguf_is_no_adapter(tmp_path):
    config = config_of("llama")
    adapters.write_peft(adapter_of(config), config, tmp_path)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        told = refusal(tmp_path / name, config)
        assert "it is neither a folder of PEFT nor a GGUF file" in told


def test_models_are_no_adapters_and_adapters_no_models(tmp_path):
    pytest.importorskip("gguf", reason="gguf is not installed")
    from legacy1bit.model import load_model

    model = random_model(config_of("llama"))
    export_gguf(model, tmp_path / "m.gguf")
    assert "general.type is 'model', not adapter" in refusal(tmp_path / "m.gguf", model.config)
    adapters.write_gguf(adapter_of(model.config), model.config, tmp_path / "a.gguf")
    with pytest.raises(ModelFileError, match=r"general\.type is 'adapter', expected 'model'"):
        load_model(tmp_path / "a.gguf")


def test_damaged_files_are_read_or_refused_in_one_line(tmp_path):
    pytest.importorskip("gguf", reason="gguf is not installed")
    config, refused = config_of("llama"), 0
    adapter = adapter_of(config, only="wq$")
    adapters.write_peft(adapter, config, tmp_path / "folder")
    adapters.write_gguf(adapter, config, tmp_path / "a.gguf")
    for path in (tmp_path / "folder", tmp_path / "a.gguf"):
        for _ in damaged(path, random.Random(1), 30, 100):
            try:
                adapters.check_adapter(config, adapters.read_adapter(path, config))
            except ModelFileError:
                assert refusal(path, config)
                refused += 1
        adapters.read_adapter(path, config)
    assert refused > 150
