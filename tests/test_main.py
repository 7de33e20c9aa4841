"""The command line as its user meets it: what it prints, where, and what bad input is told."""

import argparse
import concurrent.futures
import contextlib
import errno
import io
import json
import math
import os
import pickle
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from dataclasses import asdict, fields, replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file, save_file

from helpers.arrays import assert_same_bits
from helpers.cases import together
from helpers.events import expected_events, set_apart, shown, without_tensorboardx
from helpers.models import make_config, random_model
from helpers.paths import ROOT
from helpers.runs import RECORD_KEYS, TINY, assert_same_files, tiny, with_losses
from legacy1bit import main as program
from legacy1bit.commands import lines, progress, run_settings, texts, train
from legacy1bit.commands import options as command_options
from legacy1bit.commands.interrupts import Interrupts
from legacy1bit.data import corpus as corpora
from legacy1bit.data import stories
from legacy1bit.forward import forward_llm_batch
from legacy1bit.generator import Generator
from legacy1bit.hyperparams import (
    ALIASES,
    DEFAULT_RATES,
    OPTIMIZERS,
    SCALES,
    SCHEDULES,
    DataConfig,
    ModelConfig,
    SamplingConfig,
    TrainingConfig,
)
from legacy1bit.logger import read_metrics
from legacy1bit.main import main
from legacy1bit.model import create_legacy_llm, load_model, save_model
from legacy1bit.schemes import FLOAT, SCHEMES
from legacy1bit.threads import available_cores
from legacy1bit.training import trainer
from legacy1bit.training.divergence import TrainingDiverged
from legacy1bit.training.run import Run
from legacy1bit.version import __version__

TEXT = "The cat sat on the m\u00e4t.\r\nThe dog lay by the log.\n" * 20


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def generate(model, prompt, count, seed=0, **settings):
    return Generator(model).tokens(prompt, count, SamplingConfig(**settings), seed)


def content_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run on stories that has ended."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    assert main(tiny(out=folder)) == 0
    return folder


@pytest.fixture
def run(finished, tmp_path):
    """A copy of it, to damage."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture(scope="module")
def wild(tmp_path_factory):
    """A model whose every token depends on all before it."""
    folder = tmp_path_factory.mktemp("models") / "wild"
    config = ModelConfig(model_dim=16, num_blocks=1, num_heads=2, sequence_length=16)
    model = create_legacy_llm(config, 0)
    rng = np.random.default_rng(0)
    for weights in model.latent.values():
        if weights.ndim == 2:
            weights[...] = rng.standard_normal(weights.shape, np.float32)
    model.quantize()
    save_model(model, folder)
    return folder


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(TEXT.encode())
    return path


def shell(*arguments, check=True, **options):
    """Run the program as a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **options.pop("env", {})}
    environment.pop("PYTHONUNBUFFERED", None)
    command = [sys.executable, "-m", "legacy1bit.main", *arguments]
    if "stdout" not in options:
        options["capture_output"] = True
    done = subprocess.run(command, env=environment, timeout=60, check=False, **options)
    assert not check or done.returncode == 0, done.stderr
    return done


# --- train ----------------------------------------------------------------------------------------


def report_of(output):
    """The report's numbers by their names."""
    lines = output.decode().splitlines()
    rows = (re.fullmatch(r"(\S+(?: \S+)*) {2,}(.*)", line) for line in lines)
    return dict(row.groups() for row in rows if row)


def test_train_reports(say):
    output, errors = say(*tiny(out="here"))
    report = report_of(output)
    (record,) = read_metrics("here/metrics.jsonl")
    assert report["validation loss"].startswith(f"{record['val_loss']:.4f} ")
    assert report["perplexity"] == f"{math.exp(record['val_loss']):.4f}"
    assert report["bits per byte"] == f"{record['val_loss'] / math.log(2):.4f}"
    shares = [f"{record[name]:.1%}" for name in ("top1", "top3", "top5")]
    assert report["top 1 / 3 / 5"] == " / ".join(shares)
    assert report["entropy floor"].startswith(f"{stories.entropy_per_character():.4f} ")
    assert re.search(rb"\nsample:\n.+", output)
    assert b"\nthe run is in here " in output
    assert b"  legacy1bit generate" in output
    assert b"step      3  train loss " in errors
    assert b"step" not in output


def test_train_writes_metrics(say):
    say(*tiny(out="here", steps=520))
    records = read_metrics("here/metrics.jsonl")
    assert [record["step"] for record in records] == [250, 500, 520]
    for record in records:
        assert tuple(record) == RECORD_KEYS
        shares = [share for matrix in record["weights"].values() for share in matrix.values()]
        assert all(0.0 <= share <= 1.0 for share in shares)
        curve = [loss for _, loss in record["train_losses"]]
        numbers = [value for key, value in record.items() if key not in ("weights", "train_losses")]
        assert all(math.isfinite(number) for number in numbers + curve)
        assert record["perplexity"] == pytest.approx(math.exp(record["val_loss"]))
        assert 0 <= record["top1"] <= record["top3"] <= record["top5"] <= 1
    assert records[-1]["val_loss"] < records[0]["val_loss"] < math.log(256)


def test_train_without_a_folder_makes_one_in_runs(say):
    for _ in range(3):
        say(*tiny())
    folders = sorted(Path("runs").iterdir())
    assert len(folders) == 3
    assert all((folder / "metrics.jsonl").exists() for folder in folders)


def test_train_takes_no_folder_that_another_is_about_to_use(say, monkeypatch):
    """Two runs begun in the same second, the second while the first still makes its stories."""
    monkeypatch.setattr(train, "time", SimpleNamespace(strftime=lambda form: "now"))
    make, others = corpora.story_corpus, [tiny(seed=2)]

    def make_slowly(*arguments):
        if others:
            assert main(others.pop()) == 0
        return make(*arguments)

    monkeypatch.setattr(corpora, "story_corpus", make_slowly)
    say(*tiny(seed=1))
    seeds = [Run(folder).settings().training.seed for folder in Path("runs").iterdir()]
    assert sorted(seeds) == [1, 2]


@pytest.mark.parametrize("out", ["a/b/c", "here/", "./here", "link"])
def test_train_makes_the_folder_it_is_given(say, out):
    Path("real").mkdir()
    Path("link").symlink_to("real")
    say(*tiny(out=out))
    assert load_model(out).config.model_dim == 8
    say("train", "--resume", out, "--steps", 5)
    assert Path("link").is_symlink()


def test_train_on_a_text(say, text):
    output, errors = say(*tiny(data=text, out="here", stories=None))
    report = report_of(output)
    assert {"validation loss", "perplexity", "top 1 / 3 / 5"} <= report.keys()
    assert "entropy floor" not in report
    assert b"\nsample:\n" in output
    assert b" on text.txt, " in errors


def test_train_is_what_happens_without_a_command(say):
    arguments = tiny(out="here")[1:]
    output, _ = say(*arguments)
    assert b"\nthe run is in here " in output


def test_train_takes_its_defaults_from_the_settings(monkeypatch):
    """Without arguments: the bundled stories and the default sizes, in a new folder."""
    made = []

    class Stop(Exception):
        pass

    def made_with(folder, model_config, config, corpus, source, data, start, teacher, ranks):
        made.append((folder, model_config, config, corpus, source))
        assert data == DataConfig()
        assert start is None
        assert teacher is None
        raise Stop

    assert texts.DEFAULT_STORIES >= 10_000
    monkeypatch.setattr(texts, "DEFAULT_STORIES", 20)
    monkeypatch.setattr(train, "Trainer", made_with)
    # As many as take 75 seconds.
    monkeypatch.setattr(train, "steps_within", lambda *arguments, **more: 1200)
    with pytest.raises(Stop):
        main([])
    ((_, model_config, config, corpus, source),) = made
    assert model_config == ModelConfig()
    assert config == TrainingConfig(threads=config.threads)
    assert config.threads == available_cores()
    assert (source["name"], source["stories"]) == ("stories", 20)
    assert corpus.training.sequence_length == model_config.sequence_length


FIRST_RUNS = [
    (1199, 1199, "this CPU trains 20 steps/s: 1,199 of 1,500 steps, about a minute"),
    (330, 330, "this CPU trains 5.5 steps/s: 330 of 1,500 steps, about a minute"),
    (150, 300, "this CPU trains 2.5 steps/s: 300 of 1,500 steps, about 2 minutes"),
    (1, 300, "this CPU trains 0.017 steps/s: 300 of 1,500 steps, about 300 minutes"),
]


@pytest.mark.parametrize(("within", "steps", "line"), FIRST_RUNS)
def test_fit_first_run_takes_the_steps_of_a_minute(capsys, within, steps, line):
    assert run_settings.fit_first_run(TrainingConfig(), within) == TrainingConfig(steps=steps)
    assert capsys.readouterr() == ("", f"{line}\n")


@pytest.mark.parametrize("within", [1200, 1500, 100_000])
def test_fit_first_run_keeps_all_steps_of_a_fast_cpu(capsys, within):
    assert run_settings.fit_first_run(TrainingConfig(), within) == TrainingConfig()
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    "options",
    ["--steps 3", "--minutes 1", "--config mine.toml", "--data text.txt", "--stories 20",
     "--model-dim 8", "--seed 2", "--threads 1", "--tokenizer bytes", "--resume run"],
)  # fmt: skip
def test_is_first_run_takes_no_settings(options):
    def parsed(words):
        return program.parser_of("train").parse_args(["train", *words.split()])

    assert run_settings.is_first_run(parsed(""))
    assert run_settings.is_first_run(parsed("--out run --tensorboard --cache cache"))
    assert not run_settings.is_first_run(parsed(f"--out run {options}"))


def test_first_run_offers_the_command_that_goes_on(monkeypatch, say):
    """The run records its number of steps, and goes on to all of them."""
    monkeypatch.setattr(texts, "DEFAULT_STORIES", 20)
    monkeypatch.setattr(train, "steps_within", lambda *arguments, **more: 2)
    monkeypatch.setattr(run_settings, "_LEAST_STEPS", 2)
    small = {"model_dim": 8, "num_blocks": 1, "num_heads": 1, "sequence_length": 16}
    records_of = run_settings.records_of

    def small_records(settings, path):
        model, training, data = records_of(settings, path)
        return model.with_settings(**small), replace(training, batch_size=2), data

    monkeypatch.setattr(run_settings, "records_of", small_records)
    output, errors = say("--out", "a run")
    assert b" 2 of 1,500 steps, about" in errors
    assert stored_settings("a run")["steps"] == 2
    assert output.endswith(
        b"to train it for all 1,500 steps:\n  legacy1bit train --resume 'a run' --steps 1500\n"
    )
    output, errors = say("train", "--resume", "a run", "--steps", 3)
    assert b"to train it for all" not in output
    assert b"steps/s:" not in errors
    assert stored_settings("a run")["steps"] == 3


# A value for every setting that has an option, none of them its default.
SETTINGS = {
    "model_dim": 12,
    "num_blocks": 3,
    "num_heads": 6,
    "num_kv_heads": 2,
    "head_dim": 10,
    "ffn_multiplier": 5,
    "ffn_dim": 17,
    "sequence_length": 9,
    "scheme": "2bit",
    "scale": "row",
    "ternary_embedding": True,
    "tied_embeddings": True,
    "int8_activations": True,
    "norm": "rms",
    "norm_bias": False,
    "norm_epsilon": 1e-4,
    "sub_norm": True,
    "qk_norm": True,
    "biases": "qkv",
    "gated": True,
    "activation": "relu",
    "positions": "none",
    "rope_base": 500.5,
    "rope_pairs": "adjacent",
    "final_norm": False,
    "attention_window": 7,
    "output_bias": True,
    "steps": 6,
    "batch_size": 4,
    "gradient_accumulation": 2,
    "optimizer": "sgd",
    "learning_rate": 0.125,
    "muon_lr_ratio": 3.5,
    "momentum": 0.75,
    "beta1": 0.8,
    "beta2": 0.98,
    "epsilon": 1e-7,
    "weight_decay": 0.5,
    "weight_decay_until": 0.625,
    "clip": 2.5,
    "schedule": "step",
    "warmup_steps": 1,
    "decay_fraction": 0.55,
    "final_learning_rate": 0.25,
    "decay_factor": 0.9,
    "decay_every": 8,
    "float_steps": 3,
    "quantization_warmup": 2,
    "distillation_weight": 0.25,
    "teacher_temperature": 3.0,
    "optimizer_bits": 8,
    "sign_direction": "ascend",
    "precision": "float32",
    "gradient_checkpointing": True,
    "gradient_compression": "8bit",
    "local_steps": 2,
    "seed": 77,
    "threads": 2,
    "evaluate_every": 3,
    "patience": 5,
    "validation_tokens": 500,
}
# The same of settings that do not go along with some of these.
CONTRARY = {
    "scale_shards": 2,
    "rope_fraction": 0.6,
    "rope_factor": 4.0,
    "rope_original_length": 64,
    "window_pattern": "3,0",
}
OTHERS = {name: value for name, value in SETTINGS.items()
          if name not in ("scale", "positions", "attention_window")} | CONTRARY  # fmt: skip
# Those of an adapter, which is on a model that has settings.
ADAPTER = {
    "adapter": 2,
    "adapter_alpha": 3.0,
    "adapter_dropout": 0.125,
    "adapter_layers": "ffn",
}
SETTABLE = SETTINGS | CONTRARY | ADAPTER
CHANGEABLE = ("steps", "threads", "precision", "patience")
RENAMED = {"num_blocks": "blocks", "num_heads": "heads"}
BOTH = [*fields(ModelConfig), *fields(TrainingConfig)]
FLAGS = [setting.name for setting in BOTH if setting.metadata["kind"] is bool]


def option_of(name, value):
    """A setting as the command line has it."""
    option = RENAMED.get(name, name).replace("_", "-")
    if isinstance(value, bool):
        return [f"--{option}" if value else f"--no-{option}"]
    return [f"--{option}", str(value)]


def stored_settings(folder):
    """What a run was started with; no setting is in both of its parts."""
    settings = json.loads(Path(folder, "training.json").read_bytes())
    assert not settings["model"].keys() & settings["training"].keys()
    return asdict(ModelConfig.from_dict(settings["model"])) | settings["training"]


def test_every_setting_has_an_option(say):
    """But the vocabulary: tokens are bytes. All at once, so that none sets another's."""
    assert SETTABLE.keys() == {setting.name for setting in BOTH} - {"vocab_size"}
    assert all(SETTABLE[s.name] != s.default for s in BOTH if s.name in SETTABLE)
    say(*tiny(out="teacher"))
    for name, settings in (("here", SETTINGS), ("there", OTHERS)):
        options = [text for name, value in settings.items() for text in option_of(name, value)]
        say("train", "--out", name, "--stories", 20, "--teacher", "teacher", *options)
        of_model = {s.name: settings[s.name] for s in fields(ModelConfig) if s.name in settings}
        expected = ModelConfig(**of_model)
        assert stored_settings(name) == asdict(expected) | {
            s.name: settings[s.name] for s in fields(TrainingConfig) if s.name in settings
        }
        config = json.loads(Path(name, "config.json").read_bytes())
        assert config.items() >= expected.to_dict().items()
    options = [text for name, value in ADAPTER.items() for text in option_of(name, value)]
    say(*tiny(*options, out="adapted", **{"from": "teacher"}))
    assert stored_settings("adapted").items() >= ADAPTER.items()


@pytest.mark.parametrize("setting", [s for s in BOTH if s.name in SETTABLE], ids=lambda s: s.name)
def test_an_option_sets_its_setting_alone(setting):
    parsed = program.parser_of("train").parse_args(
        ["train", *option_of(setting.name, SETTABLE[setting.name])]
    )
    changed = {setting.name: SETTABLE[setting.name]}
    found = {}
    for record in (ModelConfig, TrainingConfig):
        found |= command_options.given(parsed, record)
    assert found == changed


@pytest.mark.parametrize("name", FLAGS)
def test_a_flag_can_be_set_and_unset(say, fail, name):
    for value in (True, False):
        say(*tiny(*option_of(name, value), out=str(value)))
        assert stored_settings(str(value))[name] is value
        (option,) = option_of(name, value)
        assert option in fail(*tiny(), f"{option}=yes")


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_learning_rate_is_the_optimizers_own_where_none_is_given(say, optimizer):
    say(*tiny(out="here", optimizer=optimizer))
    assert stored_settings("here")["learning_rate"] == DEFAULT_RATES[optimizer]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("scheme", ["2bit", FLOAT])
def test_train_takes_every_scale(say, scheme, scale):
    say(*tiny(out="here", scheme=scheme, scale=scale))
    assert stored_settings("here")["scale"] == scale
    (record,) = read_metrics("here/metrics.jsonl")
    assert len(record["weights"]) == (0 if scheme == FLOAT else 6)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_train_follows_its_schedule(say, schedule):
    options = {"steps": 6, "evaluate_every": 1, "warmup_steps": 2, "decay_fraction": 0.5}
    say(*tiny(out="here", schedule=schedule, decay_every=2, **options))
    config = Run(Path("here")).settings().training
    rates = [record["learning_rate"] for record in read_metrics("here/metrics.jsonl")]
    assert rates == [config.learning_rate_at(step) for step in range(6)]
    assert (rates[-1] < rates[2]) == (schedule != "constant")


def test_train_repeats_by_seed(say):
    for name, options in {
        "a": {"seed": 5, "threads": 2},
        "b": {"seed": 5, "threads": 2},
        "c": {"seed": 6, "threads": 2},
    }.items():
        say(*tiny(out=name, steps=6, **options))
    losses = [
        [(r["train_loss"], r["val_loss"], r["top1"]) for r in read_metrics(f"{name}/metrics.jsonl")]
        for name in "abc"
    ]
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]
    weights = [load_file(f"{name}/checkpoint.safetensors")["weights"] for name in "abc"]
    assert_same_bits(weights[0], weights[1])
    assert (weights[0] != weights[2]).any()


def test_train_refuses_a_folder_with_a_run(fail, run):
    before = content_of(run)
    assert "holds a run already" in fail(*tiny(out=run))
    assert content_of(run) == before


def test_train_does_not_overwrite_a_model(finished):
    """A model that was copied without its run is no less worth keeping."""
    Path("mine").mkdir()
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        shutil.copy(finished / name, "mine")
    before = content_of(Path("mine"))
    with contextlib.suppress(SystemExit):
        main(tiny(out="mine", seed=9))
    after = content_of(Path("mine"))
    assert {name: after[name] for name in before} == before


@pytest.mark.parametrize("out", [None, "there", "with space", "it's"])
def test_train_says_what_to_type_next(say, out):
    """The line that it prints can be pasted into a shell, and writes with this run's model."""
    output, _ = say(*tiny(), *([] if out is None else [f"--out={out}"]))
    line = output.decode().strip().splitlines()[-1]
    command, *arguments = shlex.split(line)
    assert command == "legacy1bit"
    folder = Path(out) if out else next(Path("runs").iterdir())
    expected, _ = say("generate", f"--model={folder}", "--prompt", "Kim was a", "--seed", 0)
    assert say(*arguments, "--seed=0").out == expected


# --- Stopping and going on ------------------------------------------------------------------------


def with_signals(monkeypatch, step, number, count=1):
    """Let a run get signals during one of its steps."""
    take = trainer.Trainer.train_step

    def train_step(self):
        if self.step == step:
            for _ in range(count):
                os.kill(os.getpid(), number)
        return take(self)

    monkeypatch.setattr(trainer.Trainer, "train_step", train_step)


def assert_same_run(one, other):
    for name in ("checkpoint.safetensors", "model.safetensors"):
        expected = load_file(Path(other, name))
        found = load_file(Path(one, name))
        assert found.keys() == expected.keys()
        for tensor in found:
            assert_same_bits(found[tensor], expected[tensor], tensor)
    last, wanted = (read_metrics(Path(run, "metrics.jsonl"))[-1] for run in (one, other))
    for key in ("step", "val_loss", "perplexity", "top1", "top3", "top5", "learning_rate"):
        assert last[key] == wanted[key]


def last_command(errors):
    """The arguments of the command that a stopped run says to type."""
    line = errors.decode().strip().splitlines()[-1]
    command, *arguments = shlex.split(line)
    assert command == "legacy1bit"
    return arguments


@pytest.mark.parametrize(("number", "threads"), [(signal.SIGINT, 2), (signal.SIGTERM, 1)])
def test_stopped_run_goes_on_as_if_nothing_had_been(say, monkeypatch, number, threads):
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    say(*tiny(out="whole", steps=20, threads=threads))
    with monkeypatch.context() as patch:
        with_signals(patch, 7, number)
        output, errors = say(*tiny(out="parts", steps=20, threads=threads), status=130)
    assert output == b""
    assert b"stopped at step 8 of 20" in errors
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    output, errors = say(*last_command(errors))
    assert b"going on with parts at step 8" in errors
    assert b"\nthe run is in parts " in output
    assert_same_run("parts", "whole")
    assert [record["step"] for record in read_metrics("parts/metrics.jsonl")] == [8, 20]


@pytest.mark.parametrize("out", ["with space", "it's", "$HOME", "\u00fcber"])
def test_stopped_run_says_what_to_type(say, monkeypatch, out):
    with monkeypatch.context() as patch:
        with_signals(patch, 3, signal.SIGINT)
        _, errors = say(*tiny(out=out, steps=6), status=130)
    say(*last_command(errors))
    assert read_metrics(Path(out, "metrics.jsonl"))[-1]["step"] == 6


def test_run_stopped_twice_ends_at_once(say, monkeypatch):
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    say(*tiny(out="whole", steps=600))
    with monkeypatch.context() as patch:
        with_signals(patch, 300, signal.SIGINT, count=2)
        output, _ = say(*tiny(out="parts", steps=600), status=130)
    assert output == b""
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert [record["step"] for record in read_metrics("parts/metrics.jsonl")] == [250]
    say("train", "--resume", "parts")
    assert_same_run("parts", "whole")


def test_signal_at_the_last_step_ends_as_usual(say, monkeypatch):
    with monkeypatch.context() as patch:
        with_signals(patch, 2, signal.SIGINT)
        output, _ = say(*tiny(out="here"))
    assert b"\nthe run is in here " in output


def in_a_thread(arguments):
    """What the command line returns, or raises, in another thread than the main one."""
    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        return threads.submit(main, list(map(str, arguments))).result()


def test_train_works_in_any_thread(say):
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    say(*tiny(out="whole", steps=20))
    assert in_a_thread(tiny(out="here", steps=20)) == 0
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == handlers
    assert_same_run("here", "whole")


def test_interrupts_leave_handlers_that_cannot_be_put_back(say, monkeypatch):
    """Those of other languages, of which Python knows only that they are there."""
    installed = []
    monkeypatch.setattr(signal, "getsignal", lambda number: None)
    monkeypatch.setattr(signal, "signal", lambda *those: installed.append(those))
    say(*tiny(out="here"))
    assert installed == []


@pytest.mark.parametrize("before", [None, "empty", "unbegun"])
@pytest.mark.parametrize("more", [(), ("--tensorboard",)])
def test_train_that_does_not_begin_leaves_nothing(fail, monkeypatch, more, before):
    if more:
        pytest.importorskip("tensorboardX")

    def begin(self):
        raise OSError(errno.ENOMEM, "Cannot begin")

    if before is not None:
        Path("those/here").mkdir(parents=True)
    if before == "unbegun":
        Path("those/here/metrics.jsonl").touch()
    monkeypatch.setattr(trainer.Trainer, "train_step", begin)
    assert "Cannot begin" in fail(*tiny(*more, out="those/here"))
    if before is None:
        assert not Path("those").exists()
    else:
        left = {path.name for path in Path("those/here").iterdir()}
        assert left == ({"tensorboard"} if more else set())
    assert "Cannot begin" in fail(*tiny(*more))
    assert not Path("runs").exists()


def test_train_that_ends_after_its_first_record_keeps_it(fail, monkeypatch):
    def save(self):
        raise OSError(errno.ENOSPC, "No space left")

    monkeypatch.setattr(trainer.Trainer, "save", save)
    assert "No space left" in fail(*tiny(out="here"))
    assert len(read_metrics("here/metrics.jsonl")) == 1


SLOW = """
import sys, time
from legacy1bit import main
from legacy1bit.training import evaluation, trainer
take = trainer.Trainer.train_step
def train_step(self):
    if self.step == 3:
        print("in the middle", file=sys.stderr, flush=True)
    time.sleep(0.02)
    return take(self)
trainer.Trainer.train_step = train_step
sys.exit(main.main(sys.argv[1:]))
"""


def test_process_saves_when_it_is_told_to_stop(say):
    arguments = tiny(out="parts", steps=150)
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    alarm = threading.Timer(30, process.kill)
    alarm.start()
    with process:
        for line in process.stderr:
            if b"in the middle" in line:
                break
        process.send_signal(signal.SIGTERM)
        output, errors = process.communicate()
    alarm.cancel()
    assert process.returncode == 130
    assert output == b""
    assert b"Traceback" not in errors
    (record,) = read_metrics("parts/metrics.jsonl")
    assert 3 < record["step"] < 150
    say(*last_command(errors))
    say(*tiny(out="whole", steps=150))
    assert_same_run("parts", "whole")


LONG = """
import sys
from legacy1bit import main
from legacy1bit.training import evaluation, trainer
take = trainer.Trainer.train_step
def train_step(self):
    print("the step begins", file=sys.stderr, flush=True)
    taken = take(self)
    print("the step is done", file=sys.stderr, flush=True)
    return taken
trainer.Trainer.train_step = train_step
sys.exit(main.main(sys.argv[1:]))
"""


def stopped_in_a_step(number, out):
    """Seconds from a signal to the answer, in a step that takes much longer than that."""
    sizes = {"model-dim": 96, "blocks": 2, "sequence-length": 128, "batch-size": 16, "threads": 2}
    process = subprocess.Popen(
        [sys.executable, "-c", LONG, *tiny(out=out, steps=9, **sizes)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "LEGACY1BIT_SIMD": "scalar"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    alarm = threading.Timer(60, process.kill)
    alarm.start()
    with process:
        while b"the step begins" not in (line := process.stderr.readline()):
            assert line
        # It is in a kernel by now, and stays there.
        time.sleep(0.1)
        begin = time.monotonic()
        process.send_signal(number)
        assert b"stopping after this step" in process.stderr.readline()
        taken = time.monotonic() - begin
        assert b"the step is done" in process.stderr.readline()
        process.communicate()
    alarm.cancel()
    assert process.returncode == 130
    assert [record["step"] for record in read_metrics(Path(out, "metrics.jsonl"))] == [1]
    return taken


def test_signal_in_a_long_step_is_answered_before_its_end():
    stopped_in_a_step(signal.SIGINT, "parts")


@pytest.mark.usefixtures("no_threads")
def test_train_without_threads_learns_the_same(say, finished):
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    say(*tiny(out="run"))
    assert_same_files(Path("run"), finished)
    assert before == {number: signal.getsignal(number) for number in before}


@pytest.mark.usefixtures("no_threads")
def test_interrupts_without_a_thread_are_answered(monkeypatch):
    answers = []
    with Interrupts(lambda: answers.append("stopping")) as interrupts:
        signal.raise_signal(signal.SIGTERM)
        assert (interrupts.requested, answers) == (True, ["stopping"])
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
    assert answers == ["stopping"]


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="needs /proc")
def test_program_starts_no_threads_that_it_does_not_use():
    script = (
        "import atexit, os, sys\n"
        "from legacy1bit.main import program\n"
        "sys.argv = ['legacy1bit', 'info', '--help']\n"
        "atexit.register(lambda: print(len(os.listdir('/proc/self/task')), file=sys.stderr))\n"
        "program()"
    )
    environment = {name: value for name, value in os.environ.items() if "_THREADS" not in name}
    command = [sys.executable, "-c", script]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ran.stderr.split() == ["1"]


def test_train_draws_no_bar_in_a_file(text):
    """Whatever asks for colors."""
    options = {"FORCE_COLOR": "1", "TTY_COMPATIBLE": "1", "TTY_INTERACTIVE": "1", "TERM": "xterm"}
    ran = shell(*tiny(out="run", stories=None, data=text), env=options)
    assert b"training " in ran.stderr
    assert b"\x1b" not in ran.stderr


@pytest.mark.parametrize("threads", [True, False])
def test_bars_need_a_terminal_and_a_thread(request, monkeypatch, threads):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    if not threads:
        request.getfixturevalue("no_threads")
    for file, seen in ((Terminal(), threads), (io.StringIO(), False)):
        console = Console(file=file, force_terminal=True, force_interactive=True)
        monkeypatch.setattr(progress, "console", console)
        with progress.progress_of_bytes("text", 10) as on_progress:
            on_progress(5)
        assert ("\x1b" in file.getvalue()) == seen


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_in_a_long_step_is_answered_within_200_milliseconds(number):
    """On a machine that has something else to do, too: one of three."""
    for attempt in range(3):
        if stopped_in_a_step(number, f"parts {attempt}") < 0.2:
            return
    raise AssertionError("no signal was answered within 200 milliseconds")


def test_resume_takes_more_steps(say, run):
    say("train", "--resume", run, "--steps", 5)
    assert [record["step"] for record in read_metrics(run / "metrics.jsonl")] == [3, 5]
    say("train", "--resume", run, "--steps", 7, "--threads", 2)
    assert [record["step"] for record in read_metrics(run / "metrics.jsonl")] == [3, 5, 7]
    assert Run(run).settings().training.steps == 7


def test_resume_drops_metrics_after_the_checkpoint(say, run):
    with open(run / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 4, "val_loss": 0.0}\n{"step": 5, "val_l')
    say("train", "--resume", run, "--steps", 5)
    records = read_metrics(run / "metrics.jsonl")
    assert [record["step"] for record in records] == [3, 5]
    assert tuple(records[1]) == RECORD_KEYS


def test_resume_finds_a_text_from_anywhere(say, text, monkeypatch, tmp_path):
    say(*tiny(data=text.name, out=tmp_path / "run", stories=None))
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    say("train", "--resume", tmp_path / "run", "--steps", 5)
    say("evaluate", "--model", tmp_path / "run")


def test_resume_refuses_a_text_that_changed(fail, say, text):
    say(*tiny(data=text, out="run", stories=None))
    before = content_of(Path("run"))
    for change in (TEXT + "x", TEXT.upper(), TEXT[:-1]):
        text.write_bytes(change.encode())
        assert "has changed, or is" in fail("train", "--resume", "run", "--steps", 5)
        assert "has changed, or is" in fail("evaluate", "--model", "run")
    text.unlink()
    assert "text.txt" in fail("train", "--resume", "run", "--steps", 5)
    text.mkdir()
    assert "text.txt" in fail("train", "--resume", "run", "--steps", 5)
    assert content_of(Path("run")) == before


def test_resume_refuses_a_finished_run(fail, run):
    before = content_of(run)
    for more in ((), ("--steps", 3), ("--steps", 2)):
        assert "has had its 3 steps" in fail("train", "--resume", run, *more)
    assert content_of(run) == before


FIXED = [
    ["--data", "text.txt"],
    ["--out", "other"],
    ["--stories", "10"],
    *(option_of(name, SETTABLE[name]) for name in SETTABLE if name not in CHANGEABLE),
    *(option_of(name, False) for name in FLAGS),
    # Not even to what they are.
    ["--seed", "1"],
    ["--blocks", "1"],
]


@pytest.mark.parametrize("option", FIXED, ids=" ".join)
def test_resume_refuses_options_that_cannot_change(fail, run, option):
    before = content_of(run)
    message = fail("train", "--resume", run, "--steps", 9, *option)
    assert f"{option[0].replace('--no-', '--')} cannot change" in message
    assert content_of(run) == before


def test_train_takes_about_its_time(say, text):
    shape = ("--blocks", 1, "--model-dim", 16, "--sequence-length", 16, "--batch-size", 1)
    errors = say("train", "--data", text, *shape, "--minutes", 0.005, "--out", "timed").err
    steps = json.loads(Path("timed/training.json").read_text())["training"]["steps"]
    assert steps > 5
    assert f"{steps:,} steps in 0.005 minutes" in errors.decode()
    last = read_metrics(Path("timed/metrics.jsonl"))[-1]
    assert last["step"] == steps
    # A busy machine may take far longer than it seemed.
    assert 0.03 < last["elapsed_seconds"] < 10


def test_train_warms_up_for_a_share_of_the_run(say, monkeypatch):
    """However its length is given; one that goes on with more steps keeps its number."""

    def warmup_of(folder):
        training = Run(Path(folder)).settings().training
        rates = [record["learning_rate"] for record in read_metrics(f"{folder}/metrics.jsonl")]
        assert rates == [training.learning_rate_at(step) for step in range(training.steps)]
        return training.warmup_steps

    short = {"evaluate_every": 1, "schedule": "constant"}
    say(*tiny(out="steps", **short | {"steps": 10}))
    assert warmup_of("steps") == 1
    with monkeypatch.context() as patch:
        patch.setattr(train, "steps_within", lambda *arguments, **more: 20)
        say(*tiny("--minutes", 1, out="minutes", **short | {"steps": None}))
    assert warmup_of("minutes") == 2
    say("train", "--config", "steps", "--steps", 20, "--out", "again")
    assert warmup_of("again") == 2
    say("train", "--resume", "steps", "--steps", 20)
    assert warmup_of("steps") == 1
    Path("mine.toml").write_text("[training]\nwarmup_steps = 12\n")
    say(*tiny("--config", "mine.toml", out="file", **short))
    assert warmup_of("file") == 12
    say(*tiny("--config", "mine.toml", out="named", **short | {"steps": 10, "warmup_steps": 0}))
    assert warmup_of("named") == 0
    assert b"\n#warmup_steps =\n" in say("train", "--print-config", "--steps", 60).out
    say("train", "--config", "named", "--steps", 20, "--out", "kept")
    assert warmup_of("kept") == 0


def test_train_refuses_bad_minutes(fail, run, text):
    train = ("train", "--data", text)
    for minutes in ("0", "-1", "nan", "inf"):
        assert "expected it above 0" in fail(*train, f"--minutes={minutes}")
    assert "is 1e+308, expected it above 0, up to 1e+15" in fail(*train, "--minutes=1e308")
    assert "exclude each other" in fail(*train, "--minutes", 1, "--steps", 10)
    assert "excludes --minutes" in fail("train", "--print-config", "--minutes", 1)
    assert "--minutes cannot change" in fail("train", "--resume", run, "--minutes", 1)
    assert not Path("runs").exists()


@pytest.mark.parametrize("name", ["nowhere", "empty", "text.txt", "."])
def test_resume_refuses_what_is_no_run(fail, text, name):
    Path("empty").mkdir()
    assert "is not a training run" in fail("train", "--resume", name)


@pytest.mark.parametrize("steps", ["0", "-1", "nan", "1.5", str(10**30)])
def test_resume_refuses_bad_steps(fail, run, steps):
    fail("train", "--resume", run, f"--steps={steps}")


def settings_with(**changes):
    def damage(folder):
        path = folder / "training.json"
        settings = json.loads(path.read_bytes())
        for part, values in changes.items():
            if isinstance(values, dict):
                settings[part] |= values
            else:
                settings[part] = values
        path.write_text(json.dumps(settings), encoding="utf-8")

    return damage


def with_content(name, content):
    def damage(folder):
        path = folder / name
        path.unlink()
        path.write_bytes(content)

    return damage


def without(name):
    return lambda folder: (folder / name).unlink()


def with_folder(name):
    def damage(folder):
        (folder / name).unlink()
        (folder / name).mkdir()

    return damage


def cut(name, size):
    def damage(folder):
        path = folder / name
        path.write_bytes(path.read_bytes()[:size])

    return damage


def header_of(path):
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]).get("__metadata__", {})


def tensors_with(name, change):
    """Damage the tensors of a safetensors file, or its metadata, and leave it well-formed."""

    def damage(folder):
        path = folder / name
        header, tensors = header_of(path), load_file(path)
        change(tensors, header)
        save_file(tensors, path, header)

    return damage


def number_in(tensor, number):
    def change(tensors, header):
        tensors[tensor] = tensors[tensor].copy()
        tensors[tensor].flat[0] = number

    return change


CHECKPOINT = "checkpoint.safetensors"

DAMAGED_RUNS = {
    "no settings": without("training.json"),
    "settings empty": with_content("training.json", b""),
    "settings no json": with_content("training.json", b"steps = 5"),
    "settings list": with_content("training.json", b"[]"),
    "settings bytes": with_content("training.json", b"\xff\xfe"),
    "settings deep": with_content("training.json", b"[" * 100_000),
    "settings folder": with_folder("training.json"),
    "other model": settings_with(model={"model_dim": 16}),
    "other heads": settings_with(model={"num_heads": 2}),
    "odd model": settings_with(model={"model_dim": 7}),
    "unknown setting": settings_with(training={"colour": "red"}),
    "source empty": settings_with(source=[]),
    "source text": settings_with(source="stories"),
    "source without seed": settings_with(source=[["name", "stories"], ["stories", 20]]),
    "source without path": settings_with(source={"name": "text.txt"}),
    "source without hash": settings_with(source={"name": "text.txt", "path": "text.txt"}),
    "source other kinds": settings_with(source={"stories": "many"}),
    "source negative": settings_with(source={"stories": -500}),
    "source seed": settings_with(source={"seed": -1}),
    "source path number": settings_with(source={"path": 5, "sha256": 3}),
    "source path folder": settings_with(source={"path": "/", "sha256": ""}),
    "no checkpoint": without(CHECKPOINT),
    "checkpoint empty": with_content(CHECKPOINT, b""),
    "checkpoint text": with_content(CHECKPOINT, b"hello, world"),
    "checkpoint cut": cut(CHECKPOINT, -1),
    "checkpoint head": cut(CHECKPOINT, 20),
    "checkpoint folder": with_folder(CHECKPOINT),
    "checkpoint nan": tensors_with(CHECKPOINT, number_in("weights", np.nan)),
    "checkpoint inf": tensors_with(CHECKPOINT, number_in("second", np.inf)),
    "checkpoint other": lambda folder: shutil.copy(
        folder / "model.safetensors", folder / CHECKPOINT
    ),
    "checkpoint no step": tensors_with(CHECKPOINT, lambda t, header: header.pop("step")),
    "checkpoint word": tensors_with(CHECKPOINT, lambda t, header: header.update(step="x")),
    "checkpoint back": tensors_with(CHECKPOINT, lambda t, header: header.update(step="-2")),
    "checkpoint far": tensors_with(CHECKPOINT, lambda t, header: header.update(step="9" * 30)),
    "checkpoint deep": tensors_with(
        CHECKPOINT, lambda t, header: header.update(model="[" * 100_000)
    ),
    "metrics bytes": with_content("metrics.jsonl", b"\xff\xfe\n{}\n"),
    "metrics words": with_content("metrics.jsonl", b"loss 5\nloss 4\n"),
    "metrics number": with_content("metrics.jsonl", b"5\n6\n"),
    "metrics list": with_content("metrics.jsonl", b"[]\n[]\n"),
    "metrics no step": with_content("metrics.jsonl", b"{}\n{}\n"),
    "metrics text step": with_content("metrics.jsonl", b'{"step": "3"}\n'),
    "metrics folder": with_folder("metrics.jsonl"),
}


@pytest.mark.parametrize("name", DAMAGED_RUNS)
def test_resume_refuses_a_damaged_run(fail, run, name):
    # Nothing else is there to go on with.
    shutil.rmtree(run / "best")
    (run / "earlier.safetensors").unlink(missing_ok=True)
    DAMAGED_RUNS[name](run)
    before = content_of(run)
    message = fail("train", "--resume", run, "--steps", 6)
    # A message of Python's own, about the program and not about the run, helps nobody.
    assert not re.search(
        r"^'\w+'$|not supported between|unsupported operand|subscriptable|numpy", message
    )
    assert content_of(run) == before


@pytest.mark.parametrize(
    "damage",
    [
        without("model.safetensors"),
        with_content("model.safetensors", b"not a model at all"),
        with_folder("model.safetensors"),
        without("tokenizer.json"),
        lambda folder: shutil.rmtree(folder / "best"),
    ],
    ids=["no model", "other model", "folder", "no tokenizer", "no best"],
)
def test_resume_of_a_run_whose_model_is_damaged_goes_on_or_says_why(run, damage, capsys):
    """The checkpoint has all that it takes; what is kept as the best lies beside it."""
    damage(run)
    status = 2
    with contextlib.suppress(SystemExit):
        status = main(["train", "--resume", str(run), "--steps", "6"])
    assert (status == 2) == ("legacy1bit: error: " in capsys.readouterr().err)
    if status == 0:
        assert load_model(run).config == load_model(run / "best").config


@pytest.fixture
def impatient():
    """What waits for ten seconds fails."""

    def late(number, frame):
        raise TimeoutError("still waiting")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(10)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
@pytest.mark.parametrize(
    "name",
    [
        "metrics.jsonl",
        "samples.jsonl",
        "tokenizer.json",
        "config.json",
        "model.safetensors",
        "training.json",
        "checkpoint.safetensors",
        "best/checkpoint.safetensors",
    ],
)
def test_pipe_in_a_run_is_not_waited_for(run, capsysbinary, impatient, name):
    """Nobody may ever write to it; other files that the command needs are there."""
    (run / name).unlink()
    os.mkfifo(run / name)
    commands = [
        ["train", "--resume", str(run), "--steps", "9"],
        ["generate", "--model", str(run), "--prompt", "a"],
        ["info", "--model", str(run)],
        ["report", str(run)],
    ]
    for command in commands:
        status = None
        with contextlib.suppress(SystemExit):
            status = main(command)
        told = capsysbinary.readouterr().err
        assert (status is None) == (b"legacy1bit: error: " in told)
        assert status in (None, 0)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
@pytest.mark.parametrize("key", ["path", "validation"])
@pytest.mark.parametrize("place", ["pipe", "/dev/zero", "/dev/stdin", "-", "", "a\0b"])
def test_text_of_a_run_is_where_it_can_be_read_again(fail, impatient, key, place):
    """Whoever made the run may have named anything that never ends."""
    Path("text").write_text("a text that is one. " * 40)
    main(tiny("--cache", "cache", data="text", stories=None, out="run"))
    os.mkfifo("pipe")
    settings = json.loads(Path("run/training.json").read_text())
    settings["source"][key] = place
    Path("run/training.json").write_text(json.dumps(settings))
    for command in (
        ("train", "--resume", "run", "--steps", 9),
        ("train", "--config", "run", "--out", "again"),
        ("evaluate", "--model", "run"),
    ):
        told = fail(*command, "--cache", "cache")
        assert told == f"the recorded source has {key} {place!r}, expected a file or a folder"
    assert not Path("again").exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
@pytest.mark.parametrize("command", ["generate --model", "info --model", "import --out x --model"])
def test_pipe_is_no_model(fail, impatient, command):
    os.mkfifo("pipe")
    assert fail(*command.split(), "pipe") == "pipe: Is not a regular file"


def test_resume_does_not_read_the_whole_world(fail, run, monkeypatch):
    """Settings that promise more stories than memory holds are refused before they are told."""

    def told(count, seed):
        raise AssertionError(f"{count} stories")

    settings_with(source={"stories": 10**15})(run)
    monkeypatch.setattr(stories, "generate_stories", told)
    fail("train", "--resume", run, "--steps", 6)


# --- The best model -------------------------------------------------------------------------------


@pytest.fixture
def worse(say, monkeypatch):
    """A run whose best step was 4 of 6, and the losses of a run on from there."""
    with monkeypatch.context() as patch:
        with_losses(patch, {2: 2.0, 4: 1.0, 6: 3.0})
        say(*tiny(out="run", steps=6, evaluate_every=2, learning_rate=0.05))
    say(*tiny(out="four", steps=6, evaluate_every=2, learning_rate=0.05))
    return Path("run")


def test_best_model_can_be_used_like_any_other(say, worse):
    best = worse / "best"
    say("generate", "--model", best, "--prompt", "Kim")
    outputs = {}
    for command in (["generate", "--prompt", "Kim", "--temperature", 0], ["evaluate"], ["info"]):
        outputs[command[0]] = [say(*command, "--model", folder).out for folder in (worse, best)]
    # The run's folder stands for its best model.
    assert outputs["generate"][0] == outputs["generate"][1]
    assert outputs["evaluate"][0] == outputs["evaluate"][1]
    assert re.match(rb"model +run/best\n", outputs["info"][1])
    assert outputs["info"][0] == outputs["info"][1].replace(b"run/best", b"run", 1)
    model = load_model(best)
    expected = b"Kim" + bytes(generate(model, list(b"\nKim"), 250, temperature=0.0))
    assert outputs["generate"][1] == expected
    loss = read_metrics("four/metrics.jsonl")[1]["val_loss"]
    report = report_of(outputs["evaluate"][1])
    assert report["validation loss"].startswith(f"{loss:.4f} ")


def test_best_model_is_what_others_get_of_a_run(say, worse):
    for kind in ("gguf", "c", "safetensors"):
        say("export", "--model", worse, "--format", kind, "--out", f"run.{kind}")
        say("export", "--model", worse / "best", "--format", kind, "--out", f"best.{kind}")
        if kind == "safetensors":
            assert content_of(Path("run.safetensors")) == content_of(Path("best.safetensors"))
        else:
            assert Path(f"run.{kind}").read_bytes() == Path(f"best.{kind}").read_bytes()
    best = Generator.load(worse / "best").complete("Kim", seed=0)
    assert Generator.load(worse).complete("Kim", seed=0) == best
    (worse / "best/config.json").unlink()
    output, errors = say("info", "--model", worse)
    assert report_of(output)["steps"] == "6"
    assert errors.count(b"\n") == 1
    assert errors.endswith(b"it has no config.json: using the last model instead of the best\n")


def test_train_ends_with_what_the_best_model_is(say, monkeypatch):
    with monkeypatch.context() as patch:
        with_losses(patch, {2: 2.0, 4: 1.0, 6: 3.0})
        options = {"out": "run", "steps": 6, "evaluate_every": 2, "learning_rate": 0.05}
        output = say(*tiny(**options)).out
        report = report_of(output)
        assert report["best at step"] == "4 of 6; the last step's validation loss was 3.0000"
    again = report_of(say("evaluate", "--model", "run/best").out)
    assert {name: report[name] for name in again} == again
    assert report_of(say("info", "--model", "run").out)["steps"] == "4"
    longest = Generator.load("run/best").complete("", 16, seed=0, stop=["\n"]).text
    assert output.decode().split("\nsample:\n  ")[1].startswith(longest)
    assert b"best at step" not in say(*tiny(out="other")).out


def test_train_ends_after_its_patience_and_goes_on_with_more(say, fail, monkeypatch):
    losses = {step: 1.0 + step for step in range(2, 21, 2)}
    with_losses(monkeypatch, losses)
    output, errors = say(*tiny(out="run", steps=20, evaluate_every=2, patience=2))
    assert b"ended at step 6 of 20: 2 evaluations without a lower validation loss" in errors
    assert b"2 of 6; the last step's validation loss was 7.0000" in output
    assert json.loads(Path("run/training.json").read_text())["training"]["patience"] == 2
    for more in ((), ("--patience", 1), ("--steps", 30)):
        message = fail("train", "--resume", "run", *more)
        assert "best step at 2 and ended at 6" in message
        assert "give a higher one, or 0, to go on" in message
    errors = say("train", "--resume", "run", "--patience", 4).err
    assert b"ended at step 10 of 20: 4 evaluations" in errors
    say("train", "--resume", "run", "--patience", 0)
    assert read_metrics("run/metrics.jsonl")[-1]["step"] == 20
    assert Run(Path("run")).settings().training.patience == 0


def test_train_says_how_often_it_goes_through_the_text(say, text):
    shape = {"stories": None, "data": text, "sequence_length": 16, "batch_size": 2}
    for steps in (3, 600):
        # Nine tenths are learned from, as far as the whole of documents or sequences allows.
        epochs = steps * 32 / (0.9 * len(TEXT.encode()))
        _, errors = say(*tiny(out=f"run{steps}", steps=steps, **shape))
        (shown,) = re.findall(r", (\d+\.\d) epochs\n", errors.decode())
        assert float(shown) == pytest.approx(epochs, rel=0.01, abs=0.05)
        hint = f"{epochs:.0f} epochs may overfit: use more text"
        assert (hint in errors.decode()) == (steps == 600)
    errors = say(*tiny(out="patient", steps=600, **shape | {"patience": 1})).err
    assert b"may be too often" not in errors


def test_best_model_can_be_trained_on(say, worse):
    _, errors = say("train", "--resume", worse / "best")
    assert b"going on with run/best at step 4" in errors
    assert_same_run(worse / "best", worse.parent / "four")
    assert [record["step"] for record in read_metrics(worse / "best/metrics.jsonl")] == [6]


def test_best_model_is_not_the_latest_run(say):
    say(*tiny(out="runs/one"))
    assert Path("runs/one/best/training.json").exists()
    os.utime("runs/one/training.json", (1, 1))
    assert say("info").out == say("info", "--model", "runs/one").out


# --- Progress -------------------------------------------------------------------------------------


@pytest.fixture
def slow_steps(monkeypatch):
    """Each step takes two seconds of a clock that nothing else moves."""
    step, now = trainer.Trainer.train_step, [100.0]

    def train_step(self):
        now[0] += 2.0
        return step(self)

    monkeypatch.setattr(trainer.Trainer, "train_step", train_step)
    monkeypatch.setattr(progress, "clock", lambda: now[0])
    return now


def lines_of_progress(errors):
    return [line for line in errors.decode().splitlines() if line.endswith(" left")]


def test_train_tells_how_far_it_is_where_no_bar_is_seen(say, slow_steps):
    """The first line comes after five seconds, each further one after twice as many."""
    lines = lines_of_progress(say(*tiny(out="run", steps=40, evaluate_every=40)).err)
    assert [line.split()[:2] for line in lines] == [
        ["step", "3"],
        ["step", "8"],
        ["step", "18"],
        ["step", "38"],
    ]
    pattern = r"step +3 +8%  loss \d\.\d{3}  [\d,]+ tokens/s  0:01:14 left"
    assert re.fullmatch(pattern, lines[0])
    # What remains of a run that goes on is reckoned from where it does.
    lines = lines_of_progress(say("train", "--resume", "run", "--steps", 60).err)
    assert lines[0].startswith("step     43 ")
    assert lines[0].endswith("  0:00:34 left")


def test_train_has_no_further_lines_beside_those_of_evaluations(say, slow_steps):
    errors = say(*tiny(out="run", steps=20, evaluate_every=2)).err
    assert not lines_of_progress(errors)
    assert errors.count(b"validation loss") == 10


def test_progress_of_bytes_tells_how_far_it_is_where_no_bar_is_seen(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress, "clock", lambda: now[0])
    with progress.progress_of_bytes("tokens", 8_000_000) as on_progress:
        for second in range(1, 8):
            now[0] += 1.0
            on_progress(second * 1_000_000)
    assert capsys.readouterr().err == "tokens  5.0/8.0 MB  1.0 MB/s  0:00:03 left\n"


# --- TensorBoard ----------------------------------------------------------------------------------


def test_tensorboard_shows_what_the_metrics_hold(say, monkeypatch):
    arguments = tiny("--tensorboard", out="run", steps=8, evaluate_every=2)
    with monkeypatch.context() as patch:
        with_signals(patch, 4, signal.SIGINT)
        say(*arguments, status=130)
    records = read_metrics("run/metrics.jsonl")
    assert [record["step"] for record in records] == [2, 4, 5]
    assert shown(Path("run")) == expected_events(records)
    set_apart(Path("run"), "0")
    say("train", "--resume", "run", "--tensorboard")
    records = read_metrics("run/metrics.jsonl")
    assert [record["step"] for record in records] == [2, 4, 5, 6, 8]
    numbers = shown(Path("run"))
    assert numbers == expected_events(records)
    names = {name for name, _ in numbers}
    assert {"val_loss", "gradient_norm", "weights/blocks.0.ffn.wi/flipped"} <= names


def test_tensorboard_is_off_unless_asked_for(say, run):
    assert not (run / "tensorboard").exists()
    say("train", "--resume", run, "--steps", 5, "--tensorboard")
    assert {step for _, step in shown(run)} == {5}
    say("train", "--resume", run, "--steps", 7)
    assert {step for _, step in shown(run)} == {5}


def test_tensorboard_of_a_run_that_fails_holds_what_came_before(capsysbinary, monkeypatch):
    take = trainer.Trainer.train_step

    def train_step(self):
        if self.step == 4:
            raise TrainingDiverged("the loss is nan at step 5")
        return take(self)

    monkeypatch.setattr(trainer.Trainer, "train_step", train_step)
    with pytest.raises(SystemExit):
        main(tiny("--tensorboard", out="run", steps=8, evaluate_every=2))
    assert b"legacy1bit: error: the loss is nan" in capsysbinary.readouterr().err
    records = read_metrics("run/metrics.jsonl")
    assert [record["step"] for record in records] == [2, 4]
    assert shown(Path("run")) == expected_events(records)


@pytest.mark.parametrize("out", [None, "here"])
def test_tensorboard_that_is_not_installed_is_named(say, fail, run, monkeypatch, out):
    without_tensorboardx(monkeypatch)
    message = fail(*tiny("--tensorboard", out=out))
    assert "tensorboardX, which is not installed: pip install" in message
    before = content_of(run)
    assert "not installed" in fail("train", "--resume", run, "--steps", 5, "--tensorboard")
    assert content_of(run) == before
    say("train", "--resume", run, "--steps", 5)
    # Nothing was begun that cannot be done.
    assert not Path("runs").exists()
    assert not Path("here").exists()


def test_what_takes_long_to_load_is_loaded_where_ctrl_c_is_answered():
    script = "import sys, legacy1bit.main; print('numpy' in sys.modules)"
    ran = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, check=True,
    )  # fmt: skip
    assert ran.stdout == b"False\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ("train", "--out="),
        ("train", "--config="),
        ("generate", "--model="),
        ("data", "tokenize", "--out="),
        ("plot", "--out="),
        ("export", "--out="),
        ("tune", "--space="),
    ],
    ids=" ".join,
)
def test_empty_paths_are_refused(fail, arguments):
    """And not taken for the folder one is in."""
    told = fail(*arguments)
    assert told.startswith(f"argument {arguments[-1][:-1]}: is empty, expected a path")


@pytest.mark.parametrize(
    "command",
    [
        "train",
        "tune --data text.txt",
        "data tokenize text.txt",
        "data train-tokenizer text.txt --tokenizer bpe",
        "import --model model.gguf",
    ],
)
def test_link_to_nothing_is_no_folder_to_write(fail, command):
    os.symlink("nowhere/at/all", "link")
    message = fail(*command.split(), "--out", "link")
    assert "argument --out: link is a link to nowhere/at/all, which does not exist" in message
    assert os.readlink("link") == "nowhere/at/all"


# --- A full disk ----------------------------------------------------------------------------------


# No file can grow beyond so many bytes, as if the disk were full.
LIMITED = """
import resource, sys
size = int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
from legacy1bit.main import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.memory
def test_full_disk_leaves_the_earlier_checkpoint(run, say):
    """A real write that fails in the middle of the largest file."""
    size = (run / CHECKPOINT).stat().st_size
    before = content_of(run)
    arguments = ["train", "--resume", str(run), "--steps", "6"]
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(size - 1000), *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == b""
    *_, line = done.stderr.decode().splitlines()
    assert line.startswith("legacy1bit: error: ")
    assert not list(run.glob(".*"))
    after = content_of(run)
    assert after[CHECKPOINT] == before[CHECKPOINT]
    # What was recorded of the step that could not be saved is dropped by the run that goes on.
    assert after["metrics.jsonl"].startswith(before["metrics.jsonl"])
    assert say("info", "--model", run).out
    say(*arguments)
    say(*tiny(out="whole"))
    say("train", "--resume", "whole", "--steps", "6")
    assert_same_run(run, "whole")
    assert [record["step"] for record in read_metrics(run / "metrics.jsonl")] == [3, 6]


@pytest.fixture
def stillborn(say, fail, monkeypatch):
    """A folder under runs/ in which the disk was full when a run was saved for the first time."""

    def save(*arguments, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    say(*tiny(out="runs/good", seed=1))
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "save_model", save)
        assert "No space left" in fail(*tiny(out="runs/bad", seed=2))
    return Path("runs/bad")


def test_run_that_was_never_saved_is_not_the_latest(say, stillborn):
    output = say("generate", "--seed=1").out
    assert output == say("generate", "--seed=1", "--model", "runs/good").out


def test_run_that_was_never_saved_can_be_started_again(say, stillborn):
    """Nothing in its folder is worth keeping, and there is nothing to go on from."""
    say(*tiny(out=stillborn, seed=2))


def test_train_refuses_folders_it_cannot_write(fail, text):
    for out in ("/proc/legacy1bit", "/dev/null", "text.txt", "text.txt/run"):
        assert out in fail(*tiny(out=out))
    Path("closed").mkdir(mode=0o500)
    if not os.access("closed", os.W_OK):  # which root may
        assert "closed" in fail(*tiny(out="closed"))
        assert "closed" in fail(*tiny(out="closed/run"))


# --- generate -------------------------------------------------------------------------------------

# What is told at the end.
SPEED = rb"[\d,]+ tokens in \d+\.\d\d s: [\d,]+ tokens/s\n"


def test_generate_writes_the_prompt_and_its_continuation(say, wild):
    for prompt in ("Once ", "\u00e9t\u00e9 \U0001f600", "line\nline\r\n\t", "-", "a" * 16):
        arguments = ("generate", "--model", wild, f"--prompt={prompt}", "--max-tokens", 20)
        output, errors = say(*arguments, "--seed=0")
        expected = prompt.encode()
        tokens = generate(load_model(wild), [10, *expected], 20, temperature=0.8)
        assert output == expected + bytes(tokens)
        assert re.fullmatch(SPEED, errors)


def test_generate_takes_bytes_that_are_no_text(say, wild):
    prompt = b"\xff\xfe\x80 caf\xe9 \xc3\xa9"
    arguments = ("generate", "--model", wild, "--max-tokens", 5, "--seed", 0, "--prompt")
    output, _ = say(*arguments, os.fsdecode(prompt))
    assert output == prompt + bytes(generate(load_model(wild), [10, *prompt], 5, temperature=0.8))
    done = shell(*(os.fsencode(str(one)) for one in arguments), prompt)
    assert done.stdout == output
    assert re.fullmatch(SPEED, done.stderr)


@pytest.mark.parametrize("encoding", ["ascii", "utf-16"])
def test_generate_writes_bytes_whatever_the_terminal_speaks(wild, encoding):
    done = shell(
        "generate",
        "--model",
        str(wild),
        "--prompt",
        "\u00e9",
        "--max-tokens",
        "30",
        "--seed=0",
        env={"PYTHONIOENCODING": encoding},
    )
    prompt = "\u00e9".encode()
    assert done.stdout == prompt + bytes(
        generate(load_model(wild), [10, *prompt], 30, temperature=0.8)
    )
    if "16" not in encoding:
        assert re.fullmatch(SPEED, done.stderr)


def test_generate_writes_just_the_prompt_where_nothing_is_asked(say, wild):
    for prompt in ("", "Once ", "a longer prompt than the context holds"):
        assert say("generate", "--model", wild, "--prompt", prompt, "--max-tokens", 0).out == (
            prompt.encode()
        )


def test_generate_at_temperature_0_is_greedy(say, wild):
    arguments = ("generate", "--model", wild, "--prompt", "The ", "--max-tokens", 40)
    outputs = {
        say(*arguments, "--temperature", 0, "--seed", seed, *more).out
        for seed in (0, 1)
        for more in ((), ("--top-k", 5), ("--top-p", 0.1))
    }
    greedy = generate(load_model(wild), list(b"\nThe "), 40, temperature=0.0)
    assert outputs == {b"The " + bytes(greedy)}
    assert say(*arguments, "--top-k", 1).out in outputs


def test_generate_takes_its_options(say, wild):
    options = {"temperature": 1.5, "top-k": 7, "top-p": 0.9, "seed": 3}
    pairs = [text for name, value in options.items() for text in (f"--{name}", value)]
    arguments = ("generate", "--model", wild, "--prompt", "The ", "--max-tokens", 40, *pairs)
    expected = generate(
        load_model(wild), list(b"\nThe "), 40, 3, temperature=1.5, top_k=7, top_p=0.9
    )
    assert say(*arguments).out == say(*arguments).out == b"The " + bytes(expected)
    assert say(*arguments, "--seed", 4).out != say(*arguments).out


def test_generate_without_a_seed_writes_another_text_and_tells_its_seed(say, wild):
    arguments = ("generate", "--model", wild, "--prompt", "The ", "--max-tokens", 60)
    for more in ((), ("--json",), ("--count", 3)):
        texts = set()
        for _ in range(4):
            output, errors = say(*arguments, *more)
            line = re.search(rb"^seed (\d+) \(--seed \1 repeats it\)$", errors, re.M)
            assert errors.count(b"repeats it") == 1
            again = say(*arguments, *more, "--seed", int(line[1]))
            assert again.out == output
            assert b"repeats it" not in again.err
            if more == ("--json",):
                assert json.loads(output)["seed"] == int(line[1])
            texts.add(output)
        assert len(texts) == 4
    # Where nothing is left to chance there is nothing to repeat.
    assert b"seed" not in say(*arguments, "--temperature", 0).err


def test_generate_uses_the_whole_prompt(say, wild):
    tails = set()
    for first in "ABCDEFGH":
        prompt = f"{first} cat on a"
        output = say("generate", "--model", wild, "--prompt", prompt, "--temperature", 0).out
        tails.add(output.removeprefix(prompt.encode())[:8])
    assert len(tails) > 2


def test_generate_says_that_a_prompt_is_longer_than_the_context(say, wild):
    prompt = "0123456789" * 5
    output, errors = say("generate", "--model", wild, "--prompt", prompt, "--temperature", 0)
    newest = say("generate", "--model", wild, "--prompt", prompt[-16:], "--temperature", 0)
    assert output == prompt[:-16].encode() + newest.out
    assert b"50" in errors
    assert b"16" in errors
    assert len(errors.splitlines()) == 2
    assert re.fullmatch(SPEED, newest.err)


def test_generate_without_a_prompt_begins_as_after_a_line_break(say, wild):
    expected = bytes(generate(load_model(wild), [10], 30, temperature=0.8))
    assert say("generate", "--model", wild, "--max-tokens", 30, "--seed", 0).out == expected


def test_generate_takes_prompts_from_files(say, wild, monkeypatch):
    for prompt, rest in (
        (b"", b""),
        (b"Once ", b""),
        (b"a\nb", b"\n"),
        (b"a", b"\r\n"),
        (b"\n", b"\n"),
    ):
        Path("prompt").write_bytes(prompt + rest)
        arguments = ("generate", "--model", wild, "--max-tokens", 9, "--seed", 0)
        expected = say(*arguments, "--prompt", prompt.decode()).out
        assert say(*arguments, "--prompt-file", "prompt").out == expected
        with monkeypatch.context() as patch, open("prompt", "rb") as file:
            patch.setattr(sys, "stdin", io.TextIOWrapper(file))
            assert say(*arguments, "--prompt-file=-").out == expected


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16-le", "utf-16-be", "utf-32-le"])
def test_generate_drops_the_mark_of_a_prompts_file(say, fail, wild, monkeypatch, encoding):
    """As Notepad and PowerShell write it, or send it through a pipe."""
    marked = "\ufeffd\u00e9j\u00e0 ".removeprefix("\ufeff" * (encoding == "utf-8-sig"))
    Path("prompt").write_bytes((marked + "\r\n").encode(encoding))
    arguments = ("generate", "--model", wild, "--max-tokens", 9, "--seed", 0)
    expected = say(*arguments, "--prompt", "d\u00e9j\u00e0 ").out
    assert say(*arguments, "--prompt-file", "prompt").out == expected
    with open("prompt", "rb") as file:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(file))
        assert say(*arguments, "--prompt-file=-").out == expected
    Path("prompt").write_bytes(b"\xff\xfea\0\0\xd8")
    message = "--prompt-file prompt: byte 0x00 at offset 4 is not utf-16"
    assert message in fail(*arguments, "--prompt-file", "prompt")


def test_generate_writes_text_where_standard_output_is_no_file(wild, monkeypatch):
    """A notebook's output, or contextlib.redirect_stdout's, takes text alone."""
    arguments = ["generate", "--model", str(wild), "--max-tokens=30", "--seed=0"]

    def written(*more):
        shown = io.StringIO()
        with contextlib.redirect_stdout(shown):
            assert main([*arguments, *more]) == 0
        return shown.getvalue()

    text = generate(load_model(wild), [10, *"d\u00e9".encode()], 30, temperature=0.8)
    expected = "d\u00e9" + bytes(text).decode("utf-8", "replace")
    assert written("--prompt", "d\u00e9") == expected
    assert written("--prompt", "d\u00e9", "--count=2").startswith(expected + "\nd\u00e9")
    assert json.loads(written("--prompt", "d\u00e9", "--json"))["text"] == expected[2:]
    # And where input comes from may be no file, either.
    monkeypatch.setattr(sys, "stdin", io.StringIO("d\u00e9\n"))
    assert written("--prompt-file=-") == expected
    monkeypatch.setattr(sys, "stdin", io.StringIO("d\u00e9\n"))
    assert written("--interactive") == expected + "\n"


def test_generate_refuses_a_prompt_without_end(fail, wild, monkeypatch):
    with open("large", "wb") as file:
        file.truncate((1 << 26) + 1)
    for path in ("large", "/dev/zero"):
        told = f"--prompt-file {path} has more than 67108864 bytes, expected a prompt"
        assert told in fail("generate", "--model", wild, "--prompt-file", path)
    with monkeypatch.context() as patch, open("large", "rb") as file:
        patch.setattr(sys, "stdin", io.TextIOWrapper(file))
        assert "--prompt-file - has more" in fail("generate", "--model", wild, "--prompt-file=-")


def test_generate_refuses_two_prompts(fail, wild):
    Path("prompt").write_text("a")
    for pair in (
        ("--prompt=a", "--prompt-file=prompt"),
        ("--prompt=a", "--interactive"),
        ("--interactive", "--json"),
        ("--interactive", "--count=2"),
    ):
        message = fail("generate", "--model", wild, *pair)
        assert "not allowed with" in message or "excludes" in message
    assert "nowhere" in fail("generate", "--model", wild, "--prompt-file=nowhere")


def test_generate_writes_several_texts(say, wild):
    arguments = ("generate", "--model", wild, "--prompt", "The ", "--max-tokens", 30)
    output, errors = say(*arguments, "--count", 3, "--seed", 5)
    alone = [say(*arguments, "--seed", seed).out + b"\n" for seed in (5, 6, 7)]
    assert output == b"".join(alone)
    lines = errors.splitlines()
    assert lines[:3] == [b"text %d of 3, seed %d:" % (i, 4 + i) for i in (1, 2, 3)]
    assert lines[3].startswith(b"90 tokens in ")


def test_generate_prints_json(say, wild):
    arguments = ("generate", "--model", wild, "--prompt", "d\u00e9", "--max-tokens", 30, "--json")
    for count in (1, 35):
        lines = say(*arguments, "--count", count, "--seed", 2).out.splitlines()
        assert len(lines) == count
        for i, line in enumerate(lines):
            found = json.loads(line)
            text = Generator.load(wild).complete("d\u00e9", 30, seed=2 + i)
            assert found == {"prompt": "d\u00e9", "text": text.text, "tokens": 30, "seed": 2 + i,
                             "stopped": False}  # fmt: skip


def test_generate_stops(say, wild):
    arguments = ("generate", "--model", wild, "--prompt", "The ", "--max-tokens", 200, "--seed", 4)
    whole = say(*arguments).out.decode("utf-8", "surrogateescape")[4:]
    stop = next(c for c in whole[60:] if c.isascii() and c.isprintable())
    output = say(*arguments, "--stop", "nothing like this", "--stop", stop).out
    assert output.decode("utf-8", "surrogateescape") == "The " + whole[: whole.index(stop)]
    found = json.loads(say(*arguments, "--json", "--stop", stop).out)
    assert found["stopped"] is True
    assert found["tokens"] < 200


def test_generate_stops_at_line_breaks_in_letters():
    arguments = program.parser_of("generate").parse_args(
        ["generate", "--stop", r"a\n", r"--stop=\r\n"]
    )
    assert arguments.stop == ["a\n", "\r\n"]


def test_generate_asks_for_prompts(wild):
    def interact(typed):
        arguments = ("generate", "--model", str(wild), "--interactive", "--max-tokens", "8")
        return shell(*arguments, "--seed", "0", input=typed)

    done = interact(b"The \nOnce\n\n")
    first, second, third = (
        bytes(generate(load_model(wild), [10, *text], 8, seed))
        for seed, text in enumerate((b"The ", b"Once", b""))
    )
    third = bytes(generate(load_model(wild), [10, *b"Once", *second], 8, 2))
    expected = b"The " + first + b"\nOnce" + second + b"\nOnce" + second + third + b"\n"
    assert done.stdout == expected
    assert done.stderr.count(b"tokens/s") == 3
    # An empty line at the start has nothing to go on from; that is a text of its own.
    assert interact(b"\n").stdout == bytes(generate(load_model(wild), [10], 8)) + b"\n"
    assert interact(b"").stdout == b""
    # What is no text is a prompt like any other.
    assert interact(b"a\xff\n").stdout.startswith(b"a\xff")


def test_generate_drops_the_mark_of_prompts_through_a_pipe(wild):
    arguments = ("generate", "--model", str(wild), "--interactive", "--max-tokens=8", "--seed=0")
    typed = "d\u00e9\r\nOnce\n"
    expected = shell(*arguments, input=typed.encode()).stdout
    assert expected.startswith("d\u00e9".encode())
    for encoding in ("utf-8", "utf-16-le", "utf-16-be"):
        assert shell(*arguments, input=("\ufeff" + typed).encode(encoding)).stdout == expected


def test_generate_goes_on_asking_after_a_prompt_it_cannot_read(tmp_path):
    save_model(random_model(make_config(vocab_size=8)), tmp_path / "tiny")
    arguments = ("generate", "--model", str(tmp_path / "tiny"), "--interactive", "--max-tokens=3")
    done = shell(*arguments, input=b"\nabc\n\1\n")
    assert done.returncode == 0
    assert b"the prompt is empty" in done.stderr
    assert b"outside the vocabulary" in done.stderr
    assert done.stdout.startswith(b"\1")
    assert len(done.stdout) == 5


@pytest.mark.skipif(os.name != "posix", reason="asks a shell")
@pytest.mark.parametrize(
    ("more", "status", "output", "error"),
    [
        ("--interactive <&-", 2, b"", b"standard input is closed"),
        ("2>&-", 0, None, b""),
        ("2>/dev/full", 0, None, b""),
        ("--temperature nan 2>&-", 2, b"", b""),
        ("--temperature nan 2>/dev/full", 2, b"", b""),
    ],
)
def test_generate_without_one_of_the_streams(wild, more, status, output, error):
    if "/dev/full" in more and not Path("/dev/full").exists():
        pytest.skip("this system has no full device")
    command = f"{shlex.quote(sys.executable)} -m legacy1bit.main generate --max-tokens 3 --model "
    done = subprocess.run(
        ["sh", "-c", f"{command} {shlex.quote(str(wild))} {more}"],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == status
    if output is not None:
        assert done.stdout == output
    else:
        assert len(done.stdout) == 3
    assert error in done.stderr
    assert b"Traceback" not in done.stderr


def test_generate_keeps_no_history_without_a_home(monkeypatch, capsys):
    """Of a user that the system does not know."""
    readline = pytest.importorskip("readline", reason="this Python has no readline")
    pwd = pytest.importorskip("pwd", reason="this system has no users")

    def unknown(number):
        raise KeyError(number)

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr(readline, "write_history_file", lambda file: pytest.fail("it is kept"))
    with lines.history("history"):
        assert capsys.readouterr().err == "there is no home folder to keep a history in\n"
    assert capsys.readouterr().err == ""
    assert list(Path().iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a terminal of its own")
def test_generate_remembers_prompts(wild, tmp_path):
    """In a terminal, an earlier prompt comes back by the arrow key, in a later session, too."""
    pytest.importorskip("readline", reason="this Python has no readline")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_STATE_HOME": str(tmp_path),
                   "TERM": "xterm"}  # fmt: skip
    command = [sys.executable, "-m", "legacy1bit.main", "generate", "--model", str(wild),
               "--interactive", "--max-tokens", "3"]  # fmt: skip

    def session(*typed):
        """What the terminal shows, each piece being typed at a prompt of its own; and the rest."""
        ours, theirs = os.openpty()
        with subprocess.Popen(
            command, env=environment, stdin=theirs, stdout=theirs, stderr=subprocess.PIPE
        ) as process:
            os.close(theirs)
            alarm = threading.Timer(30, process.kill)
            alarm.start()
            seen = b""
            with contextlib.suppress(OSError):
                for number, piece in enumerate(typed, 1):
                    while seen.count(b"> ") < number:
                        seen += os.read(ours, 4096)
                    os.write(ours, piece)
                while piece := os.read(ours, 4096):
                    seen += piece
            os.close(ours)
            errors = process.stderr.read()
            alarm.cancel()
            assert process.wait(30) == 0, errors
        return seen, errors

    session(b"Unlikely words\n", b"\x04")
    assert "Unlikely words" in (tmp_path / "legacy1bit" / "history").read_text()
    seen, errors = session(b"\x1b[A\n", b"\x04")
    assert seen.count(b"Unlikely words") >= 2
    assert errors.count(b"tokens/s") == 1


ENDLESS = """
import sys
from legacy1bit import main
options = ["--model", sys.argv[1], "--prompt", "The ", "--seed", "0", *sys.argv[2:]]
sys.exit(main.main(["generate", *options]))
"""


@pytest.mark.parametrize("more", [(), ("--count", "3"), ("--json",)], ids=str)
def test_ctrl_c_ends_a_text(wild, more):
    process = subprocess.Popen(
        [sys.executable, "-c", ENDLESS, str(wild), "--max-tokens", str(10**9), *more],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    alarm = threading.Timer(30, process.kill)
    alarm.start()
    with process:
        if more:
            time.sleep(1.5)
        else:
            assert process.stdout.read(50)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate()
    alarm.cancel()
    assert process.returncode == 130
    assert b"Traceback" not in errors
    assert more or re.fullmatch(SPEED, errors)


def test_generate_writes_with_a_file_of_the_c_original(say, fail, tmp_path):
    model = create_legacy_llm(ModelConfig.c_original(256, 256, 1), 1)
    save_model(model, tmp_path / "model.bin", format="c-v1")
    arguments = ("generate", "--model", "model.bin", "--prompt", "ab", "--max-tokens=5", "--seed=0")
    expected = bytes(generate(model, list(b"\nab"), 5, temperature=0.8))
    assert say(*arguments).out == b"ab" + expected
    assert f"{model.num_parameters:,}".encode() in say("info", "--model", "model.bin").out
    assert "training.json" in fail("evaluate", "--model", "model.bin")
    Path("data").write_bytes(b"some text")
    assert b"validation loss" in say("evaluate", "--model", "model.bin", "--data", "data").out


def test_generate_refuses_bytes_outside_the_vocabulary(fail, tmp_path):
    config = ModelConfig(vocab_size=64, model_dim=8, num_blocks=1, num_heads=1, sequence_length=8)
    save_model(create_legacy_llm(config, 1), tmp_path / "small")
    assert "outside the vocabulary of 64" in fail("generate", "--model", "small", "--prompt", "a")
    Path("text").write_bytes(b"abc")
    assert "outside the vocabulary" in fail("evaluate", "--model", "small", "--data", "text")


def test_latest_run_is_the_one_saved_last(say, fail):
    assert "no run in runs/ yet" in fail("generate")
    assert "no run in runs/ yet" in fail("info")
    Path("runs/empty").mkdir(parents=True)
    Path("runs/file").touch()
    assert "no run in runs/ yet" in fail("evaluate")
    for name, seed in (("b", 1), ("a", 2), ("c", 3)):
        say(*tiny(out=f"runs/{name}", seed=seed))
    for now, name in enumerate("cab", 2_000_000_000):
        os.utime(f"runs/{name}/training.json", (now, now))
        assert say("info").out == say("info", "--model", f"runs/{name}").out
        output = say("generate", "--seed=1").out
        assert output == say("generate", "--seed=1", "--model", f"runs/{name}").out
        assert say("evaluate").out == say("evaluate", "--model", f"runs/{name}").out


# --- evaluate, info -------------------------------------------------------------------------------


def test_evaluate_repeats_what_training_found(say, finished):
    record = read_metrics(finished / "metrics.jsonl")[-1]
    output, errors = say("evaluate", "--model", finished)
    report = report_of(output)
    assert report["validation loss"].startswith(f"{record['val_loss']:.4f} ")
    assert report["perplexity"] == f"{record['perplexity']:.4f}"
    assert errors == b""
    for threads in (1, 2, 256):
        assert say("evaluate", "--model", finished, "--threads", threads).out == output


@pytest.mark.parametrize("size", [2, 16, 17, 18, 300])
def test_evaluate_measures_a_text(say, wild, size):
    content = TEXT.encode()[:size]
    Path("data").write_bytes(content)
    report = report_of(say("evaluate", "--model", wild, "--data", "data").out)
    model, surprises = load_model(wild), []
    for start in range(0, size - 1, min(16, size - 1)):
        part = content[start : start + min(16, size - 1) + 1]
        row = np.frombuffer(part[:-1], np.uint8).astype(np.int32)[None]
        p = forward_llm_batch(model, row)[0].astype(np.float64)
        surprises += [-math.log(p[time, token]) for time, token in enumerate(part[1:])]
    assert len(surprises) == size - 1
    assert float(report["validation loss"].split()[0]) == pytest.approx(
        math.fsum(surprises) / len(surprises), abs=1e-4
    )


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_data_that_is_no_text_is_refused(fail, finished, command):
    arguments = tiny(stories=None) if command == "train" else ["evaluate", "--model", finished]
    Path("empty").touch()
    Path("one").write_bytes(b"x")
    Path("folder").mkdir()
    assert "missing" in fail(*arguments, "--data", "missing")
    assert "empty" in fail(*arguments, "--data", "empty")
    assert "one" in fail(*arguments, "--data", "one")
    assert "folder" in fail(*arguments, "--data", "folder")
    assert "one/below" in fail(*arguments, "--data", "one/below")
    fail(*arguments, "--data", "")
    fail(*arguments, "--data", "x" * 5000)
    fail(*arguments, "--data", "a\0b")
    fail(*arguments, "--data", "two\nlines")
    Path("secret").write_bytes(TEXT.encode())
    Path("secret").chmod(0)
    if not os.access("secret", os.R_OK):  # which root may
        assert "secret" in fail(*arguments, "--data", "secret")
    assert not Path("runs").exists()


def test_train_says_how_much_text_it_needs(fail, say):
    Path("data").write_bytes(b"x" * 162)
    message = fail(*tiny(data="data", stories=None))
    assert "data has 164 tokens, too few for sequences of 16" in message
    needed = int(re.search(r"at least (\d+)", message)[1])
    Path("data").write_bytes(b"x" * (needed - 2))
    say(*tiny(data="data", stories=None))


@pytest.mark.parametrize("scheme", [*SCHEMES, FLOAT])
@pytest.mark.parametrize("scale", ["tensor", "row"])
def test_info_tells_what_a_model_is_made_of(say, scheme, scale):
    say(*tiny("--ternary-embedding", out="run", scheme=scheme, scale=scale))
    output, errors = say("info", "--model", "run")
    model = load_model("run")
    report = report_of(output)
    assert errors == b""
    assert report["model"] == "run"
    for name, value in asdict(model.config).items():
        assert report[name] == ("" if value is None else str(value))
    assert report["parameters"] == f"{model.num_parameters:,}"
    assert report["stored"] == f"{model.stored_bytes():,} bytes of weights"
    _, _, table = output.decode().partition("\n\n")
    if scheme == FLOAT:
        assert table == ""
        return
    head, *rows = (line.split() for line in table.splitlines())
    levels = SCHEMES[scheme].levels
    assert head == ["matrix", "shape", "scale", *map(str, levels)]
    assert len(rows) == 8
    for name, shape, _, *shares in rows:
        codes = model.parameters[name].values
        assert shape == "x".join(map(str, codes.shape))
        assert shares == [f"{np.mean(codes == level):.1%}" for level in levels]


# --- Models that cannot be used -------------------------------------------------------------------

WEIGHTS = "model.safetensors"


def config_with(**changes):
    def damage(folder):
        path = folder / "config.json"
        config = json.loads(path.read_bytes()) | changes
        path.write_text(json.dumps(config), encoding="utf-8")

    return damage


def foreign(folder):
    save_file({"weight": np.ones((3, 3), np.float32)}, folder / WEIGHTS)


def unknown_dtype(folder):
    header = {"final_norm.beta": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}
    encoded = json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(encoded)) + encoded + bytes(4))


DAMAGED_MODELS = {
    "no config": without("config.json"),
    "no weights": without(WEIGHTS),
    "config folder": with_folder("config.json"),
    "weights folder": with_folder(WEIGHTS),
    "config empty": with_content("config.json", b""),
    "config bytes": with_content("config.json", b"\xff\xfe\x00"),
    "config list": with_content("config.json", b"[]"),
    "config deep": with_content("config.json", b"[" * 100_000),
    "config of another": with_content("config.json", b'{"model_type": "llama"}'),
    "config version": config_with(format_version=1),
    "config later": config_with(format_version=3),
    "config unknown": config_with(colour="red"),
    "config dim": config_with(model_dim=16),
    "config dim odd": config_with(model_dim=9),
    "config dim text": config_with(model_dim="8"),
    "config huge": config_with(model_dim=16384, num_blocks=1024),
    "config beyond": config_with(model_dim=10**30),
    "config blocks": config_with(num_blocks=2),
    "config zero": config_with(num_heads=0),
    "config nan": config_with(rope_base=math.nan),
    "config scheme": config_with(scheme="float"),
    "weights empty": with_content(WEIGHTS, b""),
    "weights text": with_content(WEIGHTS, b"not a model at all"),
    "weights zeros": with_content(WEIGHTS, bytes(1000)),
    "weights header": with_content(WEIGHTS, struct.pack("<Q", 1 << 60) + b"{}"),
    "weights cut 8": cut(WEIGHTS, 8),
    "weights cut half": cut(WEIGHTS, 5000),
    "weights cut end": cut(WEIGHTS, -1),
    "weights foreign": foreign,
    "weights float8": unknown_dtype,
    "weights nan": tensors_with(WEIGHTS, number_in("embedding.weight", np.nan)),
    "weights inf": tensors_with(WEIGHTS, number_in("final_norm.beta", np.inf)),
    "scale nan": tensors_with(WEIGHTS, number_in("blocks.0.ffn.wi.scale", np.nan)),
    "code 3": tensors_with(WEIGHTS, number_in("blocks.0.ffn.wi.codes", 255)),
    "one more": tensors_with(WEIGHTS, lambda t, h: t.update(more=np.ones(1, np.float32))),
    "one less": tensors_with(WEIGHTS, lambda t, h: t.pop("final_norm.beta")),
    "float64": tensors_with(
        WEIGHTS, lambda t, h: t.update({"final_norm.beta": t["final_norm.beta"].astype(np.float64)})
    ),
}


@pytest.mark.parametrize("name", DAMAGED_MODELS)
def test_commands_refuse_a_damaged_model(fail, run, name):
    DAMAGED_MODELS[name](run)
    before = content_of(run)
    for command in ("generate", "evaluate", "info"):
        message = fail(command, "--model", run)
        assert "run" in message
    assert content_of(run) == before


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", ""])
def test_commands_refuse_a_run_they_cannot_read(fail, run, name):
    path = run / name
    mode = path.stat().st_mode
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("root reads everything")
    for command in ("generate", "evaluate", "info"):
        assert "run" in fail(command, "--model", run)
    path.chmod(mode)


@pytest.mark.parametrize("command", ["generate", "evaluate", "info"])
def test_commands_refuse_what_is_no_model(fail, text, command):
    Path("folder").mkdir()
    assert "missing" in fail(command, "--model", "missing")
    assert "folder" in fail(command, "--model", "folder")
    assert "text.txt" in fail(command, "--model", text)
    assert "text.txt" in fail(command, "--model", "text.txt/model")
    fail(command, "--model", "/dev/null")
    fail(command, "--model", "a\0b")
    fail(command, "--model", "x" * 5000)


@pytest.mark.parametrize("command", ["generate", "evaluate"])
def test_commands_refuse_a_model_whose_numbers_overflow(fail, run, command):
    """Every weight is finite, but what they give is not."""
    tensors_with(WEIGHTS, lambda t, h: t["final_norm.gamma"].fill(3e38))(run)
    message = fail(command, "--model", run, *(["--prompt="] if command == "generate" else []))
    assert "number" in message or "finite" in message


# --- Options --------------------------------------------------------------------------------------

NO_INTEGERS = ("", "x", "1.5", "1e3", "nan", "inf", "0x10", "1,000")
HUGE = str(10**30)

BAD_OPTIONS = {
    "train": {
        "steps": (*NO_INTEGERS, "0", "-1", HUGE),
        "batch-size": (*NO_INTEGERS, "0", "-1", str(2**20 + 1), HUGE),
        "sequence-length": (*NO_INTEGERS, "0", "-1", str(2**17 + 1), HUGE),
        "model-dim": (*NO_INTEGERS, "0", "-8", "7", str(2**14 + 2), HUGE),
        "blocks": (*NO_INTEGERS, "0", "-1", "1025", HUGE),
        "heads": (*NO_INTEGERS, "0", "-1", "3", "8", "16", "1025", HUGE),
        "learning-rate": ("", "x", "nan", "inf", "-inf", "0", "-1", "1e-13", "1001", "1e400"),
        "weight-decay": ("x", "nan", "inf", "-1", "1001"),
        "seed": (*NO_INTEGERS, "-1", str(2**63), HUGE),
        "threads": (*NO_INTEGERS, "0", "-1", "257", HUGE),
        "stories": (*NO_INTEGERS, "0", "-1", "-256", "-300", str(10**15)),
        "scheme": ("", "x", "Ternary", "ternary,float", "1"),
        "optimizer": ("", "SGD", "momentum"),
    },
    "generate": {
        "max-tokens": (*NO_INTEGERS, "-1", f"-{HUGE}"),
        "temperature": ("", "x", "-1", "-1e-9", "nan", "inf", "-inf", "1e400"),
        "top-k": (*NO_INTEGERS, "-1", f"-{HUGE}"),
        "top-p": ("", "x", "0", "-1", "1.0001", "2", "nan", "inf"),
        "min-p": ("", "x", "-1", "1.0001", "nan", "inf"),
        "repetition-penalty": ("", "x", "0", "-1", "nan", "inf"),
        "repetition-window": (*NO_INTEGERS, "-1"),
        "stop": ("",),
        "count": (*NO_INTEGERS, "0", "-1", HUGE),
        "seed": (*NO_INTEGERS, "-1"),
    },
    "evaluate": {"threads": (*NO_INTEGERS, "0", "-1", "257", HUGE)},
}


@together(
    ("command", "option", "value"),
    [
        (command, option, value)
        for command, options in BAD_OPTIONS.items()
        for option, values in options.items()
        for value in values
    ],
)
def test_options_refuse_bad_values(fail, finished, monkeypatch, command, option, value):
    tell = stories.generate_stories

    def told(count, seed):
        assert count < 10**6, "that many stories do not fit into memory"
        return tell(count, seed)

    monkeypatch.setattr(stories, "generate_stories", told)
    arguments = tiny() if command == "train" else [command, "--model", finished]
    if command == "generate":
        arguments += ["--prompt", "abc"]
    message = fail(*arguments, f"--{option}={value}")
    assert f"--{option}" in message
    assert not Path("runs").exists()


def wrong_values(setting):
    """Values just outside what a setting takes, and what is no such value at all."""
    meta = setting.metadata
    if meta["kind"] is str and "choices" not in meta:
        return ["", "x", "3,", "1.5"]
    if meta["kind"] is str:
        return ["", "x", meta["choices"][0].upper(), ",".join(meta["choices"][:2])]
    if meta["kind"] is int and "choices" in meta:
        return ["", "x", f"{meta['choices'][0]}.0", "0", "9"]
    if meta["kind"] is int:
        return ["", "x", "1.5", str(meta["low"] - 1), str(meta["high"] + 1)]
    below, above = np.nextafter(meta["low"], -math.inf), np.nextafter(meta["high"], math.inf)
    return ["", "x", "nan", str(float(below)), str(float(above))]


@pytest.mark.parametrize(
    "setting",
    [s for s in BOTH if s.name in SETTABLE and s.name not in FLAGS],
    ids=lambda setting: setting.name,
)
def test_options_refuse_values_just_out_of_range(fail, setting):
    option = RENAMED.get(setting.name, setting.name).replace("_", "-")
    for value in wrong_values(setting):
        message = fail(*tiny(), f"--{option}={value}")
        assert f"--{option}" in message, value
        assert not Path("runs").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--bogus"],
        ["train", "--bogus", "1"],
        ["train", "extra"],
        ["train", "--steps"],
        ["train", "--steps", "3", "--data"],
        ["generate", "--steps", "3"],
        ["generate", "text"],
        ["evaluate", "--prompt", "x"],
        ["info", "--data", "x"],
        ["--bogus"],
        ["bogus"],
        [""],
        ["Train"],
        ["\udcff"],
        ["bo\ngus"],
        ["--model", "x"],
    ],
    ids=repr,
)
def test_arguments_that_mean_nothing_are_refused(fail, arguments):
    fail(*arguments)
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("words", "meant"),
    {
        "train --dta x": "--data",
        "train --lr 1": "--learning-rate",
        "train --lr=1": "--learning-rate",
        "--learning_rate 1": "--learning-rate",
        "train --Steps 1": "--steps",
        "train --epochs 3 --batch 2": "--steps, --batch-size",
        "train --dim 8 --layers 1": "--model-dim, --blocks",
        "train --num-heads 1 --ctx 8": "--heads, --sequence-length",
        "train -o x": "--out",
        "tune --trails 3": "--trials",
        "generate --temp 1 --n-predict 3": "--temperature, --max-tokens",
        "data inspect x --tokeniser bpe": "--tokenizer",
        "train --bogus 1": None,
        "train extra": "--data extra",
        "train text.txt more.txt": "--data text.txt more.txt",
        "train --steps 1 text.txt": "--data text.txt",
        "tune text.txt --bogus 1": "--data text.txt",
        "train run": "--resume run",
        "evaluate run": "--model run",
        "evaluate text.txt": "--data text.txt",
        "info run": "--model run",
        "info runs/missing": "--model runs/missing",
        "generate Once upon": "--prompt 'Once upon'",
        "generate text.txt": "--prompt-file text.txt",
        "generate run": "--model run",
        "info --lr 1": None,
        **{
            f"train --{earlier.replace('_', '-')} 1": f"--{name.replace('_', '-')}"
            for earlier, name in ALIASES.items()
        },
    }.items(),
    ids=str,
)
def test_unknown_options_are_reported_with_what_may_have_been_meant(fail, words, meant):
    Path("text.txt").touch()
    Path("run").mkdir()
    Path("run/training.json").touch()
    message = fail(*words.split())
    assert "unrecognized arguments: " in message
    guess = re.search(
        r"; did you mean (.*)\? \(see legacy1bit ([a-z ]+) --help\)",
        message,
    )
    assert (guess and guess[1]) == meant


def test_errors_name_options_as_typed_and_settings_of_files_by_their_keys(fail):
    Path("mine.toml").write_text("[model]\nmodel_dim = 12\n[data]\norder = 'packed'\n")
    config = ("--config", "mine.toml")
    for more, message in (
        (("--heads", 5), "--model-dim is 192, expected a multiple of --heads (5)"),
        ((*config, "--heads", 5), "mine.toml: model_dim is 12, expected a multiple of --heads (5)"),
        (config, "mine.toml: model_dim / num_heads is 3, expected an even number"),
        ((*config, "--model-dim", 9, "--heads", 3), "--model-dim / --heads is 3, expected"),
        ((*config, "--model-dim", 8), "mine.toml: order goes with --data of text, and not with"),
        (("--order", "packed"), "--order goes with --data of text, and not with the stories"),
        ((*config, "--model-dim", 8, "--steps", 0), "--steps is 0, expected 1 to"),
        (("--config", "x.toml"), "x.toml, line 2: training.steps is 0, expected 1 to"),
    ):
        Path("x.toml").write_text("[training]\nsteps = 0")
        assert fail("train", *more).startswith(message)


def test_options_are_not_guessed_from_their_beginnings(fail):
    """An option that only one command has must not be taken for another of a second command."""
    assert "--model" in fail(*tiny(model_dim=None), "--model", "16")
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["-h"], *([c, "--help"] for c in ("train", "generate", "evaluate", "info"))],
    ids=" ".join,
)
def test_help_is_printed(capsysbinary, arguments):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    output, errors = capsysbinary.readouterr()
    assert stop.value.code == 0
    assert output.startswith(b"usage: ")
    assert errors == b""
    if arguments[0] == "train":
        for option in ("data", "out", "resume", "tensorboard", *TINY):
            assert f"--{option} ".encode() in output
        for name in SETTABLE:
            option = option_of(name, SETTABLE[name] or True)[0]
            assert re.search(rf"\n  {option}\b".encode(), output), option


@pytest.mark.parametrize("command", program.COMMANDS)
def test_help_has_every_default_and_examples(command):
    parser = program.parser_of(command)._subparsers._group_actions[0].choices[command]
    for action in parser._actions:
        if action.default not in (None, False, [], argparse.SUPPRESS):
            assert "default: " in action.help, action.option_strings
    lines = parser.epilog.splitlines()
    assert lines.pop(0) == "examples:"
    for line in lines:
        name, *words = shlex.split(line)
        assert (name, words[0]) == ("legacy1bit", command)
        program.parser_of(command).parse_args(words)


@pytest.mark.parametrize("command", ["train", "tune"])
def test_help_has_basic_options_first_and_experimental_ones_last(command):
    text = program.parser_of(command)._subparsers._group_actions[0].choices[command].format_help()
    basic, _, experimental = text.partition("\nexperimental options:\n")
    assert "(experimental)" not in basic
    assert experimental.count("(experimental)") == len(re.findall("^  --", experimental, re.M))
    assert re.split(r"\n\n(?=\S)", experimental)[1].startswith("examples:")
    for option in ("data", "tokenizer", "model-dim", "steps", "seed", "threads"):
        assert f"\n  --{option} " in basic[: basic.index("\nthe data:")]


def test_version_is_printed(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"legacy1bit {__version__}\n"


def test_full_parser_has_the_options_of_every_command():
    choices = program.full_parser()._subparsers._group_actions[0].choices
    assert choices.keys() == program.COMMANDS.keys()
    assert all(parser.description or parser._actions[1:] for parser in choices.values())


# --- Standard streams -----------------------------------------------------------------------------


def test_program_is_a_module_and_a_package():
    done = shell(*tiny(out="run"))
    assert b"\nthe run is in run " in done.stdout
    assert b"Warning" not in done.stderr
    command = [sys.executable, "-m", "legacy1bit", "info", "--model", "run"]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, check=True
    )
    assert done.stdout.startswith(b"model ")


def test_error_of_a_process_is_one_line():
    done = shell("generate", "--model", "nowhere", check=False)
    assert done.returncode == 2
    assert done.stdout == b""
    assert done.stderr.decode() == "legacy1bit: error: nowhere: No such file or directory\n"


@pytest.mark.parametrize("command", ["generate", "info"])
def test_reader_that_leaves_early_is_no_error(finished, command):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as pipe:
        done = shell(
            command, "--model", str(finished), check=False, stdout=pipe, stderr=subprocess.PIPE
        )
    assert done.stderr == b""
    assert done.returncode == 0


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
@pytest.mark.parametrize("command", ["generate", "info"])
def test_output_that_cannot_be_written_is_an_error(finished, command):
    with open("/dev/full", "wb") as full:
        done = shell(
            command, "--model", str(finished), check=False, stdout=full, stderr=subprocess.PIPE
        )
    assert done.returncode == 2
    assert done.stderr.decode() == "legacy1bit: error: No space left on device\n"


@pytest.mark.parametrize("command", ["generate", "info"])
def test_closed_output_is_no_traceback(finished, command):
    arguments = [sys.executable, "-m", "legacy1bit.main", command, "--model", str(finished)]
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" >&-', "sh", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        check=False,
    )
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize("encoding", ["ascii", "utf-8:strict"])
def test_report_is_printed_whatever_the_terminal_speaks(encoding):
    """An untrained model writes any bytes, and a folder's name may be any bytes."""
    arguments = [os.fsencode(text) for text in tiny()] + [b"--out", b"run \xff"]
    done = shell(*arguments, check=False, env={"PYTHONIOENCODING": encoding})
    assert b"error" not in done.stderr
    assert done.returncode == 0
    assert b"\nthe run is in run " in done.stdout


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
@pytest.mark.parametrize("command", ["train", "tune"])
def test_errors_that_cannot_be_written_do_not_end_a_run(command):
    words, out = tiny("--data", "text.txt", out="run", stories=None), "run/metrics.jsonl"
    if command == "tune":
        pytest.importorskip("optuna")
        words = ["tune", *words[1:], "--trials", "2", "--jobs", "2", "--threads", "2"]
        out = "run/best.toml"
    Path("text.txt").write_text(TEXT)
    with open("/dev/full", "wb") as full:
        done = shell(*words, check=False, stdout=subprocess.PIPE, stderr=full)
    assert done.returncode == 0
    assert b"; next:\n  legacy1bit " in done.stdout
    assert Path(out).exists()


def unread(arguments, lines):
    """Start a training whose standard error is closed after some lines; return its exit status."""
    reader, writer = os.pipe()
    with os.fdopen(writer, "wb") as pipe:
        process = subprocess.Popen(
            [sys.executable, "-m", "legacy1bit.main", *arguments],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.DEVNULL,
            stderr=pipe,
        )
    with os.fdopen(reader, "rb") as pipe:
        for _ in range(lines):
            pipe.readline()
    return process.wait(60)


def test_training_that_nobody_watches_does_not_pretend_to_be_done():
    """As in ``train 2>&1 | true``."""
    status = unread(tiny(out="run"), 0)
    assert (status == 0) == Path("run/metrics.jsonl").exists()


def test_training_whose_watcher_leaves_is_not_lost(say):
    """As in ``train 2>&1 | head -1``."""
    status = unread(tiny(out="run", steps=600), 1)
    last = read_metrics("run/metrics.jsonl")[-1]["step"]
    assert last >= 250
    if status == 0:
        assert last == 600
    else:
        say("train", "--resume", "run")


# --- What is taken for a model -------------------------------------------------------------------

LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
NO_MODELS = {
    "run/model.safetensors": (
        b'\x40\0\0\0\0\0\0\0{"a":' + bytes(32),
        "it is a safetensors file of weights (--model takes run)",
    ),
    "pointer.bin": (LFS_POINTER, "it is a Git LFS pointer"),
    "page.bin": (b"<!doctype html>\n<html>" + bytes(32), "it is an HTML page"),
    "x.pt": (pickle.dumps({"a": [1.0] * 9}), "it is a PyTorch checkpoint or another pickle"),
}


@pytest.mark.parametrize("name", NO_MODELS)
def test_commands_say_what_is_taken_for_a_model(fail, name):
    content, message = NO_MODELS[name]
    Path("run").mkdir()
    Path(name).write_bytes(content)
    for command in (
        ("generate", "--model", name),
        ("evaluate", "--model", name),
        ("info", "--model", name),
        ("export", "--format", "c", "--out", "model.c", "--model", name),
        ("train", "--resume", name),
        ("import", "--out", "new", "--model", name),
    ):
        assert message in fail(*command)
    if find_spec("matplotlib"):
        assert message in fail("plot", "--out", "a.png", name)
        assert message in fail("plot", "--kind", "weights", "--out", "a.png", name)
        assert message in fail("report", "--out", "a.html", name)


def test_gguf_files_are_models_and_no_runs(fail):
    Path("x.gguf").write_bytes(b"GGUF\3\0\0\0" + bytes(32))
    for command in ("generate", "evaluate", "info"):
        assert "setting general.architecture is missing" in fail(command, "--model", "x.gguf")
    message = "it is a GGUF model (legacy1bit generate --model x.gguf runs it)"
    assert message in fail("train", "--resume", "x.gguf")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_commands_say_which_file_of_a_model_is_a_pointer(fail, run, name):
    (run / name).write_bytes(LFS_POINTER)
    for command in ("generate", "evaluate"):
        message = fail(command, "--model", run)
        assert f"{name} is not " in message
        assert "it is a Git LFS pointer" in message
    (run / "training.json").write_bytes(LFS_POINTER)
    message = fail("train", "--resume", run)
    assert "training.json is not a run's settings: it is a Git LFS pointer" in message


# --- Programs that call this one ------------------------------------------------------------------


CALLER = """
import contextlib, os, sys, threading
from legacy1bit.main import main
path = sys.argv[1]
def kept(*arguments):
    before = sys.stdout, sys.stderr, sys.stdout.errors, os.fstat(1).st_ino, os.fstat(2).st_ino
    with contextlib.suppress(SystemExit):
        main([*arguments])
    after = sys.stdout, sys.stderr, sys.stdout.errors, os.fstat(1).st_ino, os.fstat(2).st_ino
    assert before == after, (arguments, before, after)
kept("info", "--model", path)
kept("info", "--model", "nowhere")
kept("--help")
sys.stderr, held = None, sys.stderr
main(["info", "--model", path])
assert sys.stderr is None
sys.stderr = held
# Two commands at a time, of which the first to begin is the first to end.
begun, over = threading.Event(), threading.Event()
def later():
    begun.set()
    assert over.wait(20)
    yield from ["info", "--model", path]
def sooner():
    other.start()
    assert begun.wait(20)
    yield from ["info", "--model", path]
other = threading.Thread(target=main, args=[later()])
main(sooner())
assert sys.stdout.errors == "backslashreplace"
over.set()
other.join()
assert sys.stdout.errors == "strict"
print("still heard")
"""


def test_main_leaves_the_streams_of_its_caller_as_they_were(wild):
    done = subprocess.run(
        [sys.executable, "-c", CALLER, str(wild)], capture_output=True, text=True, timeout=60,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii:strict"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("still heard\n")


# --- Refusals that keep what there is -------------------------------------------------------------


STRUCK = """
import atexit, os, signal, sys
from legacy1bit import main
when, number = sys.argv.pop(1), int(sys.argv.pop(1))
if sys.argv.pop(1) == "ignored":
    signal.signal(number, signal.SIG_IGN)
def strike(*_):
    os.kill(os.getpid(), number)
loading = main.parser_of
if when == "before":
    main.parser_of = lambda command: strike() or loading(command)
elif when == "after":
    atexit.register(strike)
else:
    from legacy1bit.commands import info
    info.run = strike
main.program()
"""


@pytest.mark.parametrize(
    ("when", "number"),
    [("before", signal.SIGINT), ("within", signal.SIGINT), ("after", signal.SIGINT),
     ("within", signal.SIGTERM), ("within", signal.SIGHUP), ("after", signal.SIGTERM)],
)  # fmt: skip
def test_signals_end_the_program_without_a_traceback(wild, when, number):
    def ended(ignored):
        options = [when, str(int(number)), ignored, "info", "--model", str(wild)]
        command = [sys.executable, "-c", STRUCK, *options]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    found = ended("no")
    assert found.returncode == (128 + number if when == "within" else -number)
    assert found.stderr == ""
    found = ended("ignored")
    assert (found.returncode, found.stderr) == (0, "")


def test_resume_compares_settings_before_it_makes_a_model(say, fail, monkeypatch):
    """Edited settings may promise more than memory holds."""
    say(*tiny(out="run"))
    path = Path("run/training.json")
    settings = json.loads(path.read_text())
    settings["model"]["model_dim"] *= 2
    path.write_text(json.dumps(settings))
    monkeypatch.setattr(trainer, "create_legacy_llm", lambda *_: pytest.fail("it made a model"))
    told = fail("train", "--resume", "run", "--steps", 100)
    assert "is of another run: its model_dim is 8, expected 16" in told


def test_resume_that_is_refused_leaves_the_best_alone(say, fail):
    say(*tiny(out="run", steps=4, **{"evaluate-every": 2}))
    say("train", "--resume", "run/best", "--steps", 8)
    before = {path.name: path.read_bytes() for path in Path("run/best").glob("*.*")}
    assert "has had its 4 steps" in fail("train", "--resume", "run")
    assert {path.name: path.read_bytes() for path in Path("run/best").glob("*.*")} == before


def test_resume_refuses_metrics_that_are_no_json(say, fail):
    say(*tiny(out="run"))
    for damage in (b"[" * 200_000 + b"\n{}\n", b'{"step": 1, "\xff": 2}\n{}\n'):
        Path("run/metrics.jsonl").write_bytes(damage)
        message = fail("train", "--resume", "run", "--steps", 100)
        assert "metrics.jsonl, line 1: expected a JSON object" in message


@pytest.mark.parametrize(
    ("name", "record"), [("best", True), ("notes.txt", True), ("config.json", False)]
)
def test_train_refuses_a_folder_with_anything_of_worth(fail, name, record):
    Path("mine").mkdir()
    if record:
        Path("mine/metrics.jsonl").write_text("")
    Path("mine", name).write_text("mine")
    assert "mine is not an empty folder" in fail(*tiny(out="mine"))
    assert Path("mine", name).read_text() == "mine"


def test_train_refuses_a_folder_with_a_record_of_something_else(fail):
    Path("mine").mkdir()
    for name in ("metrics.jsonl", "config.json"):
        Path("mine", name).write_text('{"step": 1, "speed": 3}')
    assert "mine is not an empty folder" in fail(*tiny(out="mine"))
    assert Path("mine/config.json").read_text() == '{"step": 1, "speed": 3}'


def test_run_that_was_killed_at_its_first_save_can_be_started_again(say):
    """Some of its files may be there, but not the one that makes it a run."""
    say(*tiny(out="whole"))
    for present in (
        (),
        ("tokenizer.json",),
        ("tokenizer.json", "config.json", "model.safetensors"),
    ):
        folder = Path(f"broken-{len(present)}")
        folder.mkdir()
        for name in ("metrics.jsonl", *present):
            shutil.copy(f"whole/{name}", folder)
        half = Path(folder, f".checkpoint.safetensors.{'0123456789abcdef' * 2}.tmp")
        half.write_text("half")
        say(*tiny(out=folder))
        assert_same_files(folder, Path("whole"))
        assert not half.exists()


def test_what_a_killed_run_had_not_written_whole_is_removed(say):
    """And nothing else."""
    say(*tiny(out="run"))
    begun = "." + "{}." + "0123456789abcdef" * 2 + ".tmp"
    ours = ("checkpoint.safetensors", "metrics.jsonl", "best/model.safetensors")
    others = ("mine.png", "best/mine.txt")
    for name in (*ours, *others):
        path = Path("run", name)
        path.with_name(begun.format(path.name)).write_text("half")
    say("train", "--resume", "run", "--steps", 9)
    left = {path.name for path in Path("run").rglob("*.tmp")}
    assert left == {begun.format("mine.png"), begun.format("mine.txt")}


def test_train_that_is_refused_leaves_no_folder(fail):
    assert "--float-steps is 1, expected 0" in fail(
        *tiny("--float-steps", 1, out="r", scheme="sign")
    )
    assert not Path("r").exists()
