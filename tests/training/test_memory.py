"""How much memory a training is said to take, beside what it takes."""

import re
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from helpers.paths import ROOT
from helpers.runs import make, tiny, train
from legacy1bit.backward import BackwardPass
from legacy1bit.forward import forward_bytes
from legacy1bit.hyperparams import ModelConfig, TrainingConfig
from legacy1bit.model import (
    TernaryMatrix,
    create_legacy_llm,
    create_legacy_llm_gradients,
    save_model,
)
from legacy1bit.optimizer import AdamW
from legacy1bit.training import memory
from legacy1bit.training.memory import check_memory, free_bytes, model_bytes, training_bytes
from legacy1bit.training.start import Start

GIB = 1 << 30

# Trains two steps and tells by how much the peak has grown since all was loaded.
MEASURE = """
import sys
from pathlib import Path
import numpy as np
from legacy1bit.data.corpus import text_corpus
from legacy1bit.data.tokenizer import ByteTokenizer
from legacy1bit.hyperparams import ModelConfig, TrainingConfig
from legacy1bit.logger import MetricsLogger
from legacy1bit.training.teacher import Teacher
from legacy1bit.training.trainer import Trainer
def peak():
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
model, training = eval(sys.argv[1]), eval(sys.argv[2])
corpus = text_corpus(b"the cat sat on the mat. " * 1000, "text", model.sequence_length, 256)
before = peak()
folder = Path(sys.argv[3])
folder.mkdir()
teacher = None
if len(sys.argv) > 4:
    teacher = Teacher(Path(sys.argv[4]), eval(sys.argv[5]), ByteTokenizer())
trainer = Trainer(folder, model, training, corpus, {"name": "text"}, teacher=teacher)
trainer.train(MetricsLogger(folder))
print(peak() - before, sum(trainer.memory.values()))
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
    "eight bits": ("ModelConfig(model_dim=512, num_blocks=6, sequence_length=16, num_heads=8)",
                   "TrainingConfig(steps=2, batch_size=1, optimizer_bits=8)"),
    "blended": ("ModelConfig(model_dim=512, num_blocks=6, sequence_length=16, num_heads=8)",
                "TrainingConfig(steps=2, batch_size=1, optimizer_bits=8, quantization_warmup=2)"),
    "taught": ("ModelConfig(model_dim=32, num_blocks=1, sequence_length=256, num_heads=2)",
               "TrainingConfig(steps=2, batch_size=8, threads=2)",
               "ModelConfig(model_dim=512, num_blocks=6, num_heads=8, sequence_length=256)"),
    "norms": ("ModelConfig(model_dim=128, num_blocks=6, sequence_length=256, sub_norm=True)",
              "TrainingConfig(steps=2, batch_size=16, optimizer='adamw')"),
}  # fmt: skip


@pytest.mark.memory
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc tells the peak here")
@pytest.mark.parametrize("name", CASES)
def test_training_takes_about_what_is_said(name, tmp_path):
    model, training, *teacher = CASES[name]
    if teacher:
        save_model(create_legacy_llm(eval(teacher[0]), 1, trainable=False), tmp_path / "teacher")
        teacher.insert(0, tmp_path / "teacher")
    ran = subprocess.run(
        [sys.executable, "-c", MEASURE, model, training, tmp_path / "run", *teacher],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    taken, said = map(int, ran.stdout.split())
    # Not all is there at the same time; packed copies of matrices, batches and libraries come on
    # top.
    assert 0.6 * taken - (16 << 20) < said < 1.6 * taken + (16 << 20)


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
    # A part of the moments, and a matrix more.
    four = training_bytes(model, TrainingConfig(optimizer="adamw"), ranks=4)
    assert four["activations"] == base["activations"] / 4
    assert four["the optimizer"] < base["the optimizer"]
    compressed = TrainingConfig(gradient_compression="8bit")
    assert training_bytes(model, compressed, ranks=4)["exchanges"] > four["exchanges"]
    assert training_bytes(model, compressed) == base
    local = training_bytes(model, TrainingConfig(local_steps=8), ranks=4)
    assert local["the optimizer"] > base["the optimizer"]
    assert local["the outer optimizer"] > 0


SHAPES = {
    "default": {},
    "ternary embedding": {"ternary_embedding": True, "scale": "row", "model_dim": 96},
    "float": {"scheme": "float", "tied_embeddings": True},
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("bits", [8, 32])
def test_parts_are_the_bytes_of_what_is_made(name, bits, tmp_path):
    config = ModelConfig(sequence_length=32, **SHAPES[name])
    training = TrainingConfig(batch_size=3, optimizer="adamw", optimizer_bits=bits)
    needed = training_bytes(config, training)
    model = create_legacy_llm(config, 1)
    matrices = [value.size for value in model.latent.values() if value.ndim == 2]
    moments = needed["the optimizer"] - 3 * 4 * max(matrices)
    assert AdamW(model, bits=bits).nbytes == moments
    # The gradients of one head's probabilities are counted for each sequence.
    extra = 2 * 4 * 32 * 32
    assert BackwardPass(model, 3, 32).nbytes == needed["activations"] - extra
    assert create_legacy_llm_gradients(config).nbytes == needed["gradients"]
    codes = [value for value in model.parameters.values() if isinstance(value, TernaryMatrix)]
    sizes = sum(value.values.nbytes for value in codes)
    latent = sum(value.nbytes for value in model.latent.values())
    assert needed["weights"] == latent + sizes
    if sizes:
        gradual = training_bytes(config, replace(training, quantization_warmup=1))
        assert gradual["weights"] - needed["weights"] == 4 * sizes
    made = create_legacy_llm(config, 1, trainable=False).parameters.values()
    own = sum(getattr(value, "values", value).nbytes for value in made)
    assert model_bytes(config) == own
    taught = training_bytes(config, training, config)
    logits = 4 * 3 * 32 * config.vocab_size
    assert taught.keys() - needed.keys() == {"the teacher"}
    assert taught["the teacher"] == own + logits + forward_bytes(config, 3, 32, "none")


def test_start_counts_until_its_weights_are_copied(tmp_path):
    run = make(tmp_path / "run", optimizer_bits=8)
    train(run)
    size = run.model.num_parameters
    assert Start(tmp_path / "run", run.model.config, run.tokenizer).nbytes() == (
        4 * size + run.optimizer.nbytes
    )
    save_model(run.model, tmp_path / "model")
    assert Start(tmp_path / "model", run.model.config, run.tokenizer).nbytes() == model_bytes(
        run.model.config
    )
    config, training = ModelConfig(), TrainingConfig()
    base = training_bytes(config, training)
    assert training_bytes(config, training, start=1) == base
    large = training_bytes(config, training, start=GIB)
    assert {**large, "evaluation and checkpoints": 0} == {**base, "evaluation and checkpoints": 0}
    assert large["evaluation and checkpoints"] == GIB


def test_training_that_does_not_fit_is_refused_with_the_sum(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda: GIB)
    config = ModelConfig(model_dim=1024, num_blocks=24, num_heads=8)
    with pytest.raises(
        MemoryError, match=r"needs about .* GiB \(weights .* GiB, gradients"
    ) as error:
        check_memory(training_bytes(config, TrainingConfig()), TrainingConfig())
    assert "and 1.0 GiB are free" in str(error.value)
    assert str(error.value).endswith("--gradient-checkpointing or --optimizer-bits 8")
    small = TrainingConfig(optimizer_bits=8)
    with pytest.raises(MemoryError, match=r"--gradient-checkpointing$"):
        check_memory(training_bytes(config, small), small)
    check_memory(training_bytes(ModelConfig(), TrainingConfig()), TrainingConfig())
    with pytest.raises(MemoryError, match="activations"):
        make(tmp_path, batch_size=1 << 20)
    monkeypatch.setattr(memory, "free_bytes", lambda: None)
    check_memory(training_bytes(config, TrainingConfig()), TrainingConfig())


def test_train_says_what_it_will_need(say, tmp_path):
    _, errors = say(*tiny(out=tmp_path / "run"))
    (line,) = [line for line in errors.decode().splitlines() if line.startswith("memory: ")]
    number = r"[\d.,]+ MiB"
    assert re.fullmatch(
        rf"memory: about {number} \(weights {number}, gradients {number}, the optimizer {number}, "
        rf"activations {number}, evaluation and checkpoints {number}\)",
        line,
    )


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
