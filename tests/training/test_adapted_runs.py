"""Trainings of adapters: what learns, what is saved, and how a run goes on."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import legacy1bit
from helpers.arrays import assert_close, assert_same_bits
from helpers.models import make_config, random_model
from helpers.runs import TEXT, measured
from legacy1bit.data.tokenizer import ByteTokenizer
from legacy1bit.formats.adapters import read_adapter, read_adapters
from legacy1bit.formats.native import BEST_FOLDER
from legacy1bit.forward import forward_llm_batch
from legacy1bit.generator import Generator
from legacy1bit.hyperparams import ARCHITECTURES, ModelConfig, TrainingConfig
from legacy1bit.logger import METRICS_FILE, read_metrics
from legacy1bit.main import main
from legacy1bit.model import load_model, save_model
from legacy1bit.packed import PackedModel, packed_bytes
from legacy1bit.training.adapters import adapter_config, best_adapted, weights_hash
from legacy1bit.training.memory import training_bytes


@pytest.fixture(autouse=True)
def base(tmp_path, monkeypatch):
    """A model to learn more, and a text."""
    monkeypatch.chdir(tmp_path)
    settings = ARCHITECTURES["llama"] | {"vocab_size": 256, "model_dim": 16, "num_heads": 2}
    settings |= {"sequence_length": 32, "output_bias": False}
    save_model(random_model(make_config(**settings)), tmp_path / "base")
    (tmp_path / "text.txt").write_bytes(4 * TEXT)


def arguments(out="run", **changes):
    settings = {"from": "base", "adapter": 3, "steps": 12, "evaluate_every": 4, "batch_size": 2}
    options = settings | changes
    pairs = [(f"--{name.replace('_', '-')}", str(value)) for name, value in options.items()]
    return ["train", "--data", "text.txt", "--out", out, *(part for pair in pairs for part in pair)]


def error_of(capsys, command):
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(command)
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    return line


def test_what_it_learns_is_read_back_and_the_model_stays(tmp_path, capsys):
    before = {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()}
    assert main(arguments(steps=60, evaluate_every=20, learning_rate=0.01)) == 0
    told = capsys.readouterr().err
    assert "training an adapter of rank 3" in told
    assert {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()} == before
    records = read_metrics(tmp_path / "run" / METRICS_FILE)
    assert records[-1]["val_loss"] < records[0]["val_loss"] - 0.1
    # The text it writes is the same in all ways to name the two.
    texts = [
        Generator.load(*model).complete("the", 20, seed=1).text
        for model in (("run",), ("base", None, "2bit", None, "int8", None, ["run"]))
    ]
    assert texts[0] == texts[1]
    half = Generator.load("base", adapters=["run:0.5"]).complete("the", 20, seed=1).text
    none = Generator.load("base", adapters=["run:0"]).complete("the", 20, seed=1).text
    assert none == Generator.load("base").complete("the", 20, seed=1).text
    assert len({texts[0], half, none}) == 3
    # Evaluated, it has the loss of its record.
    assert main(["evaluate", "--model", "run"]) == 0
    loss = float(capsys.readouterr().out.split()[2])
    best = min(record["val_loss"] for record in records)
    assert loss == pytest.approx(best, abs=0.02)


def test_its_folder_is_an_adapter_of_peft(tmp_path):
    assert main(arguments(adapter_alpha=5.0, adapter_dropout=0.25, adapter_layers="attention")) == 0
    config = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (3, 5, 0.25)
    assert config["target_modules"] == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert config["base_model_name_or_path"] == str(tmp_path / "base")
    model = load_model("base")
    adapter = read_adapter("run", model.config)
    assert adapter.provenance.steps == 12
    assert all(np.abs(pair.b).max() > 0 for pair in adapter.pairs.values())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"adapter_dropout": 0.3, "gradient_accumulation": 2},
        {"optimizer_bits": 8, "gradient_checkpointing": None},
        {"optimizer": "muon"},
    ],
)
def test_a_run_that_goes_on_ends_like_an_unbroken_one(tmp_path, changes):
    def options(out, **more):
        flags = [f"--{k.replace('_', '-')}" for k, v in changes.items() if v is None]
        return arguments(out, **{k: v for k, v in changes.items() if v is not None}, **more) + flags

    assert main(options("whole")) == 0
    assert main(options("parts", steps=4, warmup_steps=1, decay_fraction=0.0)) == 0
    # The same schedule as the unbroken run: it has no decay and a warm-up of one step, too.
    assert main(options("flat", warmup_steps=1, decay_fraction=0.0)) == 0
    assert main(["train", "--resume", "parts", "--steps", "12"]) == 0
    found, expected = (
        measured(read_metrics(tmp_path / run / METRICS_FILE)) for run in ("parts", "flat")
    )
    assert found[-1] == expected[-1]
    adapters = [read_adapters([(run, 1.0)], load_model("base").config) for run in ("parts", "flat")]
    for name in adapters[0]:
        for one, other in zip(*(pairs[name] for pairs in adapters), strict=True):
            assert_same_bits(one, other, name)


def test_its_model_may_move_but_not_change(tmp_path, capsys):
    assert main(arguments(steps=4)) == 0
    shutil.move("base", "moved")
    line = error_of(capsys, ["train", "--resume", "run", "--steps", "8"])
    assert "base is not there, which the run needs: --from says where it has moved to" in line
    assert main(["train", "--resume", "run", "--steps", "8", "--from", "moved"]) == 0
    other = load_model("moved")
    other.parameters["blocks.0.attention.wq"].values[0, 0] ^= 1
    save_model(other, tmp_path / "other")
    line = error_of(capsys, ["train", "--resume", "run", "--steps", "9", "--from", "other"])
    assert "other is not the model that the adapter is on: its weights are others" in line


def test_bad_options_give_one_line(capsys):
    data = ["--data", "text.txt"]
    line = error_of(capsys, ["train", "--adapter", "4", *data])
    assert "--adapter is 4, and there is no --from" in line
    line = error_of(capsys, ["train", "--from", "base", "--adapter-alpha", "4", *data])
    assert "--adapter-alpha is 4.0, and there is no --adapter" in line
    assert main(arguments(steps=2)) == 0
    line = error_of(capsys, ["train", "--from", "run", *data])
    assert "run is an adapter and not a model" in line
    line = error_of(capsys, ["generate", "--model", "base", "--adapter", "base"])
    assert "it is no adapter" in line
    line = error_of(capsys, ["generate", "--model", "base", "--adapter", "run:nan"])
    assert "expected a finite number" in line
    shutil.copytree("run", "foreign")
    Path("foreign/training.json").unlink()
    line = error_of(capsys, ["generate", "--model", "foreign"])
    assert "foreign is an adapter: name its model with --model, and this with --adapter" in line


def test_exports_have_the_adapter(tmp_path, capsys):
    pytest.importorskip("gguf")
    assert main(arguments(steps=8, learning_rate=0.02)) == 0
    model = load_model("base")
    exact = model.with_adapter(read_adapters([("run", 1.0)], model.config))
    tokens = np.arange(40, 60, dtype=np.int32)[None]
    expected = forward_llm_batch(exact, tokens, logits=True)
    for kind in ("peft", "gguf-adapter"):
        assert main(["export", "--model", "run", "--format", kind, "--out", kind]) == 0
        again = model.with_adapter(read_adapters([(kind, 1.0)], model.config))
        found = forward_llm_batch(again, tokens, logits=True)
        assert_close(found, expected, rtol=0, atol=1e-6 * np.abs(expected).max(), what=kind)
    for kind, out in (("safetensors", "hf"), ("gguf", "model.gguf"), ("c", "model.c")):
        assert main(["export", "--model", "run", "--format", kind, "--out", out]) == 0
    # A model of floats, with which a training may begin.
    merged = load_model("hf", floats=True)
    assert merged.config.scheme == "float"
    found = forward_llm_batch(merged, tokens, logits=True)
    assert_close(found, expected, rtol=0, atol=2e-2 * np.abs(expected).max())
    line = error_of(capsys, ["export", "--model", "base", "--format", "peft", "--out", "x"])
    assert "--format peft needs an --adapter" in line


def test_the_best_adapter_is_that_of_the_best_step(tmp_path):
    """What it learns is of no use for another text."""
    noise = np.random.default_rng(0).integers(128, 256, 4000).astype(np.uint8)
    (tmp_path / "noise.txt").write_text(noise.tobytes().decode("latin-1"))
    other = {"validation": "noise.txt", "learning_rate": 0.03, "steps": 40}
    assert main(arguments(**other)) == 0
    records = read_metrics(tmp_path / "run" / METRICS_FILE)
    losses = [record["val_loss"] for record in records]
    assert losses.index(min(losses)) < len(losses) - 1, "the last step is the best"
    model = load_model("base")
    best = read_adapter("run", model.config)
    assert best.provenance.steps == records[losses.index(min(losses))]["step"]
    assert (tmp_path / "run" / BEST_FOLDER / "adapter_model.safetensors").exists()
    # A run that is resumed does not lose it.
    again = best_adapted(model, tmp_path / "run")
    assert again.pairs.keys() == best.pairs.keys()


def test_a_damaged_adapter_gives_one_line(tmp_path, capsys):
    assert main(arguments(steps=4)) == 0
    path = tmp_path / "run" / "adapter_model.safetensors"
    content = path.read_bytes()
    for damaged in (content[:50], content[:-8], b"", content[:8] + b"x" + content[9:]):
        path.write_bytes(damaged)
        line = error_of(capsys, ["generate", "--model", "run"])
        assert line.startswith("legacy1bit: error: ")
        assert "run" in line


@pytest.mark.parametrize("name", ["float_steps", "quantization_warmup"])
def test_steps_of_float_weights_exclude_an_adapter(tmp_path, capsys, name):
    line = error_of(capsys, arguments(**{name: 2}))
    assert f"{name} is 2, expected 0 with an adapter" in line.replace("--", "").replace("-", "_")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("context", [16, 1 << 17])
def test_a_run_is_measured_in_sequences_of_its_own(tmp_path, capsys, context):
    # The text has fewer tokens than the context of the larger model.
    settings = ARCHITECTURES["llama"] | {"vocab_size": 256, "sequence_length": context}
    save_model(random_model(make_config(**settings | {"output_bias": False})), tmp_path / "base")
    assert main(arguments(sequence_length=32, steps=4)) == 0
    best = min(record["val_loss"] for record in read_metrics(tmp_path / "run" / METRICS_FILE))
    capsys.readouterr()
    assert main(["evaluate", "--model", "run"]) == 0
    assert float(capsys.readouterr().out.split()[2]) == pytest.approx(best, abs=0.1)


def test_an_adapter_is_talked_with_as_it_was_trained(tmp_path, capsys, monkeypatch):
    pytest.importorskip("jinja2", reason="jinja2 is not installed")
    # The model has no template of its own.
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    (tmp_path / "chats.jsonl").write_text(40 * (json.dumps(chat) + "\n"))
    words = ["chats.jsonl" if word == "text.txt" else word for word in arguments(steps=2)]
    assert main([*words, "--sequence-length", "64"]) == 0
    assert "legacy1bit chat --model run" in capsys.readouterr().out
    tokens = ["--max-tokens", "1", "--seed", "1", "--context", "64"]
    for model in (["run"], ["base", "--adapter", "run"]):
        monkeypatch.setattr("sys.stdin", io.StringIO("a\n"))
        assert main(["chat", "--model", *model, *tokens]) == 0
        with legacy1bit.load(model[0], adapters=model[2:]) as loaded, loaded.chat(seed=1) as talk:
            assert isinstance(talk.answer("a"), str)
    assert "has no chat template" in error_of(capsys, ["chat", "--model", "base", *tokens])


def test_a_model_of_floats_does_not_become_ternary_beside_an_adapter(tmp_path, capsys):
    settings = ARCHITECTURES["llama"] | {"vocab_size": 256, "output_bias": False}
    save_model(random_model(make_config(**settings, scheme="float")), tmp_path / "base")
    line = error_of(capsys, arguments(scheme="ternary"))
    assert "scheme is ternary, expected float, that of base: with an adapter" in line
    assert not (tmp_path / "run").exists()
    assert main(arguments(steps=2)) == 0


def test_errors_say_where_the_model_of_an_adapter_is_named(tmp_path, capsys):
    assert main(arguments(steps=2)) == 0
    line = error_of(capsys, ["train", "--config", "run", "--data", "text.txt"])
    assert "run has adapter 3, and --config excludes --from, which an adapter needs" in line
    line = error_of(capsys, arguments("next", **{"from": "run"}))
    assert "run is an adapter and not a model" in line
    save_model(random_model(make_config(vocab_size=256)), tmp_path / "other")
    assert main(["train", "--stories", "20", "--steps", "1", "--batch-size", "2", "--model-dim",
                 "8", "--heads", "2", "--out", "plain"]) == 0  # fmt: skip
    line = error_of(capsys, ["train", "--resume", "plain", "--from", "base"])
    assert "--from cannot change in a run that goes on" in line
    line = error_of(capsys, ["train", "--resume", "run", "--steps", "4", "--from", "other"])
    assert line.endswith(", that of other")
    (tmp_path / "base").rename(tmp_path / "moved")
    line = error_of(capsys, ["generate", "--model", "run"])
    assert f"{tmp_path / 'base'} is not there, the model of the adapter run" in line
    assert main(["info", "--model", "moved", "--adapter", "run"]) == 0


def test_a_model_without_a_first_token_is_trained_to_the_end(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        ByteTokenizer, "bos_token", property(lambda self: None, lambda *_: None), raising=False
    )
    assert main(arguments(steps=2)) == 0
    told = capsys.readouterr().out
    assert "sample:" not in told
    assert "legacy1bit generate --model run" in told


def test_memory_is_that_of_the_packed_model():
    model = ModelConfig(
        **ARCHITECTURES["bitnet"], vocab_size=128256, model_dim=2560, num_blocks=30,
        num_heads=20, num_kv_heads=5, ffn_dim=6912, sequence_length=256,
    )  # fmt: skip
    training = TrainingConfig(
        adapter=8, batch_size=1, gradient_checkpointing=True, optimizer="adamw"
    )
    needed = training_bytes(model, training)
    assert packed_bytes(model) < 0.9e9
    assert sum(needed.values()) < 3e9
    assert needed["weights"] == needed["gradients"] < 100e6
    whole = training_bytes(model, TrainingConfig(batch_size=1, gradient_checkpointing=True))
    assert sum(whole.values()) > 10 * sum(needed.values())


def test_bytes_of_a_packed_model_are_what_it_has():
    for changes in ({}, {"scale": "64", "model_dim": 36}, {"scheme": "float"}):
        model = random_model(make_config(**changes))
        assert PackedModel(model).nbytes == packed_bytes(model.config)


def test_hashes_tell_weights_apart():
    model = random_model(make_config())
    packed = PackedModel(model, head="int8")
    assert weights_hash(packed.parameters) == weights_hash(
        PackedModel(model, head="int8").parameters
    )
    hashes = {weights_hash(one.parameters) for one in (model, packed, PackedModel(model))}
    model.parameters["blocks.1.ffn.wo"].values[3, 2] ^= 1
    assert len(hashes | {weights_hash(model.parameters)}) == 4


def test_settings_name_the_adapter():
    assert adapter_config(TrainingConfig()) is None
    assert adapter_config(TrainingConfig(adapter=4)) == (4, 8.0, "all")
    assert adapter_config(TrainingConfig(adapter=4, adapter_alpha=1.0, adapter_layers="ffn")) == (
        4,
        1.0,
        "ffn",
    )
