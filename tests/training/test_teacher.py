"""Trainings with a teacher: what is learned, what is refused, and how a run goes on."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import legacy1bit
from helpers import oracle
from helpers.arrays import assert_same_bits
from helpers.models import random_model
from helpers.runs import (
    TEXT,
    assert_same_files,
    assert_same_state,
    documents_corpus,
    make,
    newest,
    state_of,
    tiny,
    train,
)
from legacy1bit.data.tokenizer import ByteTokenizer, UnknownTokenizer, train_bpe
from legacy1bit.formats.hugging_face import export_hugging_face
from legacy1bit.forward import forward_llm_batch
from legacy1bit.hyperparams import ARCHITECTURES, DataConfig, ModelConfig
from legacy1bit.main import main
from legacy1bit.model import save_model
from legacy1bit.system.errors import SettingError
from legacy1bit.training.run import TEACHER_HASH, TEACHER_PATH
from legacy1bit.training.teacher import Teacher
from legacy1bit.training.trainer import steps_within

SMALL = {"model_dim": 8, "num_blocks": 1, "num_heads": 2, "sequence_length": 8}
LARGER = {"vocab_size": 256, "model_dim": 20, "num_blocks": 2, "num_heads": 2}


def teacher_in(folder, tokenizer=None, **changes):
    """A random model of its own settings, saved in a folder."""
    settings = {**LARGER, "sequence_length": 16, **changes}
    model = random_model(ModelConfig(**settings))
    # Its predictions are far from equal.
    model.latent["output.weight"][...] *= 3.0
    save_model(model, folder)
    tokenizer = ByteTokenizer() if tokenizer is None else tokenizer
    tokenizer.save(folder)
    return Teacher.read(folder)


def taught(folder, teacher, **changes):
    """A trainer of a tiny model with a teacher."""
    return make(folder, teacher=teacher, **changes)


def test_teacher_without_weight_changes_no_bit(tmp_path):
    teacher = teacher_in(tmp_path / "teacher")
    run = taught(tmp_path / "run", teacher, distillation_weight=0.0)
    plain = make(tmp_path / "plain")
    assert train(run)[1] == train(plain)[1]
    assert_same_state(state_of(run), state_of(plain))


def test_loss_that_is_told_is_that_of_the_text(tmp_path):
    teacher = teacher_in(tmp_path / "teacher")
    run = taught(tmp_path / "run", teacher, distillation_weight=1.0)
    losses, plain = train(run)[1], train(make(tmp_path / "plain"))[1]
    assert losses[0] == plain[0]
    assert losses[1:] != plain[1:]


@pytest.mark.parametrize("scheme", ["float", "ternary"])
def test_model_learns_what_the_teacher_predicts(tmp_path, scheme):
    teacher = teacher_in(tmp_path / "teacher")
    settings = {"steps": 150, "distillation_weight": 1.0, "scheme": scheme, "batch_size": 8}
    run = taught(tmp_path / "run", teacher, learning_rate=0.02, **settings)
    batch = run.corpus.validation.sweep(16, 0).__next__()
    tokens, counted = batch.tokens[:4], np.ones((4, 8), bool)
    goal = teacher.logits(tokens, None, 1)

    def distance():
        logits = forward_llm_batch(run.model, tokens, logits=True)
        return oracle.distillation(logits, tokens, counted, goal, 1.0, 1.0)

    before = distance()
    train(run)
    assert distance() < 0.7 * before


KINDS = {
    "parts": {"gradient_accumulation": 2, "gradient_checkpointing": True},
    "threads": {"threads": 2, "optimizer": "adamw", "optimizer_bits": 8},
    "buckets": {"data": DataConfig(order="buckets", document_mask=True)},
    "packed": {"data": DataConfig(order="packed", document_mask=True), "quantization_warmup": 8},
    "int8": {"precision": "int8", "distillation_weight": 0.9, "teacher_temperature": 1.0},
}


@pytest.mark.parametrize("name", KINDS)
def test_run_with_a_teacher_goes_on_to_the_bit(tmp_path, name):
    data = KINDS[name].get("data")
    vocab_size = documents_corpus(data, 8).training.pad_token if data else 256
    tokenizer = ByteTokenizer(vocab_size)
    teacher = teacher_in(tmp_path / "teacher", tokenizer, vocab_size=vocab_size)
    whole = taught(tmp_path / "whole", teacher, **KINDS[name])
    losses = train(whole)[1]
    run = taught(tmp_path / "run", teacher, **KINDS[name])
    parts = train(run, stop_at=5)[1]
    run = taught(tmp_path / "run", Teacher.read(teacher.path), **KINDS[name])
    run.restore(newest(run))
    parts += train(run)[1]
    assert parts == losses
    assert_same_state(state_of(run), state_of(whole))
    assert_same_files(tmp_path / "run", tmp_path / "whole")


def test_gradient_checkpointing_changes_no_bit_of_a_run_with_a_teacher(tmp_path):
    teacher = teacher_in(tmp_path / "teacher")
    runs = [taught(tmp_path / str(n), teacher, gradient_checkpointing=n == 1) for n in (0, 1)]
    assert train(runs[0])[1] == train(runs[1])[1]
    assert_same_state(state_of(runs[0]), state_of(runs[1]))


def test_hash_of_a_teacher_is_that_of_its_weights_in_any_format(tmp_path):
    teacher = teacher_in(tmp_path / "own", **ARCHITECTURES["llama"])
    export_hugging_face(teacher.model, tmp_path / "hf")
    assert Teacher.read(tmp_path / "hf").sha256 == teacher.sha256
    teacher.model.parameters["blocks.0.norm1.gamma"][3] += 1.0
    assert Teacher(teacher.path, teacher.config, teacher.tokenizer).sha256 == teacher.sha256
    save_model(teacher.model, tmp_path / "changed")
    assert Teacher.read(tmp_path / "changed").sha256 != teacher.sha256


def test_tokens_have_to_be_the_same(tmp_path):
    config = ModelConfig(**{**SMALL, "vocab_size": 280})
    merges = train_bpe([TEXT], 280)
    teacher = teacher_in(tmp_path / "a", merges, vocab_size=280)
    teacher.check(config, merges)
    teacher.check(config, UnknownTokenizer(280))
    # Another object of the same tokens, as of another program.
    teacher.check(config, train_bpe([TEXT], 280))
    others = train_bpe([b"other words than these are here " * 20], 280)
    with pytest.raises(ValueError, match=r"the teacher .* has other tokens \(bpe, 280\) than"):
        teacher.check(config, others)
    with pytest.raises(ValueError, match=r"other tokens \(bpe, 280\) than the model \(bytes, 256"):
        teacher.check(ModelConfig(**SMALL), ByteTokenizer())


def test_teacher_needs_a_context_as_long(tmp_path):
    teacher = teacher_in(tmp_path / "teacher", sequence_length=7)
    with pytest.raises(ValueError, match=r"sequence_length is 8, expected at most 7, that of the"):
        taught(tmp_path / "run", teacher)
    # Without positions there is no longest context.
    free = teacher_in(tmp_path / "free", sequence_length=7, positions="none")
    taught(tmp_path / "run", free).train_step()


@pytest.mark.parametrize("name", ["distillation_weight", "teacher_temperature"])
def test_settings_of_a_teacher_need_one(tmp_path, name):
    with pytest.raises(SettingError, match=f"{name} is 0.3, and there is no --teacher"):
        make(tmp_path, **{name: 0.3})


def test_teacher_whose_numbers_are_not_finite_is_named(tmp_path):
    teacher = teacher_in(tmp_path / "teacher", scheme="float")
    teacher.model.parameters["output.weight"][...] = 3e38
    run = taught(tmp_path / "run", teacher)
    before = state_of(run)
    with pytest.raises(ValueError, match=r"the logits of the teacher .* are not finite at step 1"):
        run.train_step()
    assert_same_state(state_of(run), before)


def test_run_remembers_its_teacher(tmp_path):
    teacher, other = teacher_in(tmp_path / "a"), teacher_in(tmp_path / "b", num_blocks=1)
    run = taught(tmp_path / "run", teacher)
    assert run.source[TEACHER_PATH] == str(tmp_path / "a")
    assert run.source[TEACHER_HASH] == teacher.sha256
    assert TEACHER_PATH not in run.fixed_settings["source"]
    assert run.fixed_settings["source"][TEACHER_HASH] == teacher.sha256
    with pytest.raises(ValueError, match=r"b is not the teacher that the run began with"):
        taught(tmp_path / "run", other, source=run.source)
    with pytest.raises(ValueError, match="the run has a teacher"):
        taught(tmp_path / "run", None, source=run.source)


def test_speed_is_measured_with_the_teacher(tmp_path, monkeypatch):
    teacher, seen = teacher_in(tmp_path / "teacher"), []
    run = taught(tmp_path / "run", teacher)
    found = Teacher.logits
    monkeypatch.setattr(Teacher, "logits", lambda *args: seen.append(1) or found(*args))
    steps_within(0.01, run.model.config, run.config, run.corpus, teacher=teacher)
    assert seen


# --- The command line and Python ------------------------------------------------------------------


def ran(*words):
    assert main(list(map(str, words))) == 0


@pytest.fixture
def folder(tmp_path):
    ran(*tiny(out=tmp_path / "teacher", scheme="float", steps=2))
    return tmp_path


def test_resume_finds_the_teacher_or_says_what_to_do(folder, fail):
    taught_by = ("--teacher", folder / "teacher", "--warmup-steps", 1)
    ran(*tiny(*taught_by, out=folder / "whole", steps=4))
    ran(*tiny(*taught_by, out=folder / "half", steps=2))
    ran(*tiny(out=folder / "plain"))
    shutil.move(folder / "teacher", folder / "moved")
    resume = ("train", "--resume", folder / "half", "--steps", 4)
    assert "--teacher says where it has moved to" in fail(*resume)
    told = fail(*resume, "--teacher", folder / "plain")
    assert "is not the teacher that the run began with" in told
    told = fail("train", "--resume", folder / "plain", "--steps", 9, "--teacher", folder / "moved")
    assert "--teacher cannot change in a run that goes on" in told
    ran(*resume, "--teacher", folder / "moved")
    source = json.loads((folder / "half" / "training.json").read_text())["source"]
    assert source[TEACHER_PATH] == str(folder / "moved")
    for name in ("whole", "half"):
        path = folder / name / "training.json"
        tables = json.loads(path.read_text())
        del tables["source"][TEACHER_PATH]
        path.write_text(json.dumps(tables))
    assert_same_files(folder / "half", folder / "whole")


def test_teacher_is_found_where_it_has_moved_together_with_the_run(folder):
    (folder / "old").mkdir()
    shutil.move(folder / "teacher", folder / "old" / "teacher")
    ran(*tiny("--teacher", folder / "old" / "teacher", out=folder / "old" / "run", steps=2))
    shutil.move(folder / "old", folder / "new")
    ran("train", "--resume", folder / "new" / "run", "--steps", 3)
    source = json.loads((folder / "new" / "run" / "training.json").read_text())["source"]
    assert source[TEACHER_PATH] == str(folder / "new" / "teacher")


def test_run_is_trained_again_with_its_teacher(folder, fail):
    ran(*tiny("--teacher", folder / "teacher", out=folder / "first"))
    ran("train", "--config", folder / "first", "--out", folder / "again")
    assert_same_files(folder / "again", folder / "first")
    assert "No such file" in fail("train", "--teacher", folder / "nothing")


def test_trials_of_a_study_have_no_teacher(folder, fail):
    pytest.importorskip("optuna")
    ran(*tiny("--teacher", folder / "teacher", out=folder / "first"))
    told = fail("tune", "--config", folder / "first", "--trials", 1)
    assert told.endswith("first has a teacher, and trials of a study have none")


def test_model_takes_the_tokens_of_its_teacher(folder, fail):
    (folder / "text").write_bytes(TEXT * 20)
    text = ("--data", folder / "text", "--cache", folder / "cache")
    ran(*tiny(*text, "--tokenizer", "bpe", "--vocab-size", 280, stories=None, out=folder / "bpe"))
    ran(*tiny(*text, "--teacher", folder / "bpe", stories=None, out=folder / "taught"))
    tokens = [(folder / name / "tokenizer.json").read_bytes() for name in ("bpe", "taught")]
    assert tokens[0] == tokens[1]
    told = fail(*tiny(*text, "--teacher", folder / "bpe", "--tokenizer", "bytes", stories=None))
    assert "has other tokens (bpe, 280) than the model (bytes, 256): expected the same" in told
    assert fail(*tiny("--teacher", folder / "bpe"))


def test_teacher_goes_together_with_from(folder):
    ran(*tiny(out=folder / "first"))
    ran("train", "--from", folder / "first", "--teacher", folder / "teacher", "--stories", 20,
        "--steps", 1, "--out", folder / "second", "--threads", 1)  # fmt: skip
    source = json.loads((folder / "second" / "training.json").read_text())["source"]
    assert source["from"] == str(folder / "first")
    assert source[TEACHER_PATH] == str(folder / "teacher")


def test_python_trains_with_a_teacher(folder):
    settings = {"steps": 3, "model_dim": 8, "blocks": 1, "heads": 1, "sequence_length": 16,
                "batch_size": 2, "threads": 1, "stories": 20}  # fmt: skip
    run = legacy1bit.train(teacher=folder / "teacher", out=folder / "python", **settings)
    ran(*tiny("--teacher", folder / "teacher", out=folder / "words"))
    assert_same_files(folder / "python", folder / "words")
    assert run.settings().source[TEACHER_PATH] == str(Path(folder / "teacher"))


def test_teacher_is_only_read(tmp_path):
    teacher = teacher_in(tmp_path / "teacher")
    before = {name: np.array(getattr(value, "values", value))
              for name, value in teacher.model.parameters.items()}  # fmt: skip
    train(taught(tmp_path / "run", teacher))
    for name, value in teacher.model.parameters.items():
        assert_same_bits(getattr(value, "values", value), before[name], name)
