"""How much memory a training is said to take, beside what it takes."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.paths import ROOT
from helpers.runs import make
from legacy1bit.hyperparams import ModelConfig, TrainingConfig
from legacy1bit.training import memory
from legacy1bit.training.memory import check_memory, free_bytes, training_bytes

GIB = 1 << 30

# Trains two steps and tells by how much the peak has grown since all was loaded.
MEASURE = """
import sys
from pathlib import Path
import numpy as np
from legacy1bit.data.corpus import text_corpus
from legacy1bit.hyperparams import ModelConfig, TrainingConfig
from legacy1bit.logger import MetricsLogger
from legacy1bit.training.trainer import Trainer
def peak():
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
model, training = eval(sys.argv[1]), eval(sys.argv[2])
corpus = text_corpus(b"the cat sat on the mat. " * 1000, "text", model.sequence_length, 256)
before = peak()
folder = Path(sys.argv[3])
folder.mkdir()
Trainer(folder, model, training, corpus, {"name": "text"}).train(MetricsLogger(folder))
print(peak() - before)
"""

CASES = {
    "activations": ("ModelConfig(model_dim=128, num_blocks=6, sequence_length=256)",
                    "TrainingConfig(steps=2, batch_size=12)"),
    "threads": ("ModelConfig(model_dim=128, num_blocks=6, sequence_length=256)",
                "TrainingConfig(steps=2, batch_size=15, threads=2)"),
    "checkpointed": ("ModelConfig(model_dim=192, num_blocks=8, sequence_length=256)",
                     "TrainingConfig(steps=2, batch_size=8, gradient_checkpointing=True)"),
    "weights": ("ModelConfig(model_dim=512, num_blocks=6, sequence_length=16, num_heads=8)",
                "TrainingConfig(steps=2, batch_size=1, optimizer='adamw')"),
    "norms": ("ModelConfig(model_dim=128, num_blocks=6, sequence_length=256, sub_norm=True)",
              "TrainingConfig(steps=2, batch_size=16, optimizer='adamw')"),
}  # fmt: skip


@pytest.mark.memory
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc tells the peak here")
@pytest.mark.parametrize("name", CASES)
def test_training_takes_about_what_is_said(name, tmp_path):
    model, training = CASES[name]
    ran = subprocess.run(
        [sys.executable, "-c", MEASURE, model, training, tmp_path / "run"],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    said = sum(training_bytes(eval(model), eval(training)).values())
    # Not all is there at the same time; packed copies of matrices, batches and libraries come on
    # top.
    assert 0.6 * int(ran.stdout) - (16 << 20) < said < 1.6 * int(ran.stdout) + (16 << 20)


def test_parts_grow_with_what_they_are_for():
    model, training = ModelConfig(), TrainingConfig()
    base = training_bytes(model, training)
    assert all(size > 0 for size in base.values())
    batch = training_bytes(model, TrainingConfig(batch_size=64))
    assert batch["activations"] == 8 * base["activations"]
    assert {**batch, "activations": 0} == {**base, "activations": 0}
    twice = training_bytes(model, TrainingConfig(threads=2))
    assert twice["gradients"] == 2 * base["gradients"]
    less = training_bytes(model, TrainingConfig(gradient_checkpointing=True))
    assert less["activations"] < 0.7 * base["activations"]


def test_training_that_does_not_fit_is_refused_with_the_sum(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda: GIB)
    config = ModelConfig(model_dim=1024, num_blocks=24, num_heads=8)
    with pytest.raises(
        MemoryError, match=r"needs about .* GiB \(weights .* GiB, gradients"
    ) as error:
        check_memory(training_bytes(config, TrainingConfig()), TrainingConfig())
    assert "and 1.0 GiB are free" in str(error.value)
    assert "--gradient-checkpointing" in str(error.value)
    check_memory(training_bytes(ModelConfig(), TrainingConfig()), TrainingConfig())
    with pytest.raises(MemoryError, match="activations"):
        make(tmp_path, batch_size=1 << 20)
    monkeypatch.setattr(memory, "free_bytes", lambda: None)
    check_memory(training_bytes(config, TrainingConfig()), TrainingConfig())


def test_refusal_takes_one_line_and_leaves_nothing(tmp_path, monkeypatch, fail):
    monkeypatch.chdir(tmp_path)
    shape = ("--model-dim", 16384, "--blocks", 1000, "--heads", 128)
    assert "not enough memory: training needs about" in fail("train", "--stories", 20, *shape)
    assert not Path("runs").exists()


def test_least_of_all_limits_counts(monkeypatch):
    free = free_bytes()
    assert free is None or free > 0
    monkeypatch.setattr(memory.resource, "getrlimit", lambda _: (0, 0))
    if Path("/proc/self/statm").exists():
        assert free_bytes() == 0
    monkeypatch.setattr(memory.resource, "getrlimit", lambda _: (resource.RLIM_INFINITY,) * 2)
    monkeypatch.setattr(memory, "free_memory", lambda: [5, 3])
    assert free_bytes() == 3
    monkeypatch.setattr(memory, "free_memory", list)
    monkeypatch.setattr(memory, "Path", lambda name: Path("/nowhere", name.strip("/")))
    assert free_bytes() is None
