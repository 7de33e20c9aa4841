"""Training from Python: the command line's bits, events, cancellation, threads."""

import itertools
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import FrozenInstanceError, fields, replace

import pytest

import legacy1bit
from helpers.cases import together
from helpers.paths import ROOT
from helpers.runs import TEXT, assert_same_files, contents, measured
from legacy1bit.api import progress
from legacy1bit.api.events import CheckpointEvent, EndEvent, EvaluationEvent, StepEvent
from legacy1bit.api.progress import ProgressLine
from legacy1bit.formats.native import CHECKPOINT_FILE
from legacy1bit.logger import SAMPLES_FILE, read_metrics
from legacy1bit.training.run import Run as Folder

SIZES = {"steps": 6, "evaluate_every": 2, "model_dim": 8, "blocks": 2, "heads": 2}
SIZES |= {"sequence_length": 32, "batch_size": 2, "threads": 1, "stories": 20}
STEPS = SIZES["steps"]


def words_of(settings):
    """The command line with these settings."""
    return [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]


def train(folder, callback=None, cancel=None, **changes):
    settings = {name: value for name, value in (SIZES | changes).items() if value is not None}
    return legacy1bit.train(out=folder, callback=callback, cancel=cancel, **settings)


def assert_same_run(one, other):
    """Two folders hold the same of a run, its records included, but for what the clock decides."""
    assert_same_files(one, other)
    records = [Folder(folder).metrics() for folder in (one, other)]
    assert measured(records[0]) == measured(records[1])
    samples = [folder / SAMPLES_FILE for folder in (one, other)]
    assert samples[0].exists() == samples[1].exists()
    if samples[0].exists():
        assert read_metrics(samples[0]) == read_metrics(samples[1])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that was not interrupted, and its events."""
    folder, events = tmp_path_factory.mktemp("whole") / "run", []
    run = train(folder, events.append)
    return run, events


def named(events):
    return [(type(event).__name__, event.step) for event in events]


# --- The same as the command line -----------------------------------------------------------------


def test_training_gives_the_bits_of_the_command_line(whole, say, tmp_path):
    say("train", *words_of(SIZES), f"--out={tmp_path / 'run'}")
    assert_same_run(whole[0].folder, tmp_path / "run")


@pytest.mark.parametrize("form", [dict, list])
def test_texts_are_mixed_as_on_the_command_line(say, tmp_path, form):
    for name, text in (("a.txt", TEXT), ("b.txt", TEXT.upper())):
        (tmp_path / name).write_bytes(text)
    mix = {tmp_path / "a.txt": 1, str(tmp_path / "b.txt"): 0.3}
    words = words_of(SIZES)[:-1]
    say("train", *words, "--data", tmp_path / "a.txt:1", "--data", tmp_path / "b.txt:0.3",
        f"--out={tmp_path / 'run'}")  # fmt: skip
    run = train(tmp_path / "mine", stories=None, data=mix if form is dict else [*mix.items()])
    assert_same_run(run.folder, tmp_path / "run")
    assert run.metrics.parts[1][0] == "b.txt"


def test_a_model_of_conversations_talks(tmp_path):
    lines = [json.dumps({"prompt": f"say {i}", "completion": f"{i}"}) for i in range(40)]
    (tmp_path / "chats.jsonl").write_text("\n".join(lines))
    run = train(tmp_path / "run", stories=None, data=tmp_path / "chats.jsonl")
    model = run.load()
    assert model.evaluate().loss == run.metrics.loss
    assert model.evaluate(tmp_path / "chats.jsonl").tokens > run.metrics.tokens
    model.save(tmp_path / "copy")
    said = []
    for folder, template in ((run.folder, None), (run.folder, "plain"), (tmp_path / "copy", None)):
        with legacy1bit.load(folder).chat(template=template, seed=1, max_tokens=5) as chat:
            said.append(chat.answer("say 3"))
    assert said[0] == said[1] == said[2]


@pytest.mark.parametrize(
    "settings",
    [
        {"tokenizer": "chars", "optimizer": "adamw", "scheme": "binary", "patience": 1},
        {"order": "epochs", "learning_rate": 1, "batch_size": 3, "architecture": "llama"},
        {"learning_rate": 0.001, "validation_fraction": 0.3, "seed": 7},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_training_on_a_text_gives_the_bits_of_the_command_line(settings, say, tmp_path):
    text = tmp_path / "text.txt"
    text.write_bytes(TEXT * 4)
    run = train(tmp_path / "ours", data=text, stories=None, **settings)
    words = words_of({**SIZES, **settings, "data": text, "out": tmp_path / "theirs"})
    say("train", *(word for word in words if not word.startswith("--stories")))
    assert_same_run(run.folder, tmp_path / "theirs")


def test_a_file_of_settings_gives_the_bits_of_the_command_line(say, tmp_path):
    file = tmp_path / "settings.toml"
    file.write_text(
        "[model]\nmodel_dim = 12\nnum_heads = 3\nnum_blocks = 1\nsequence_length = 32\n"
        "[training]\nsteps = 2\nbatch_size = 2\n"
    )
    run = legacy1bit.train(config=file, stories=20, threads=1, out=tmp_path / "ours")
    say("train", "--config", file, "--stories=20", "--threads=1", "--out", tmp_path / "theirs")
    assert_same_run(run.folder, tmp_path / "theirs")
    assert run.steps == 2
    assert run.settings().model.num_heads == 3


def test_the_result_is_that_of_the_report(whole, say):
    run, _ = whole
    assert run.done
    assert (run.step, run.steps, run.reason) == (STEPS, STEPS, "steps")
    said = say("evaluate", "--model", run.folder, "--threads=1").out.decode()
    assert f"validation loss   {run.metrics.loss:.4f} nats" in said
    assert [record["step"] for record in run.records()] == [2, 4, 6]
    assert [sample["step"] for sample in run.samples()] == [2, 4, 6]
    with run.load() as model:
        assert model.config == run.settings().model


def test_a_run_without_a_folder_is_in_the_usual_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = train(None, steps=1)
    assert [run.folder.resolve()] == [*(tmp_path / "runs").iterdir()]


# --- Events ---------------------------------------------------------------------------------------


def test_events_come_in_order(whole):
    steps = [("StepEvent", step) for step in range(1, STEPS + 1)]
    saved = [("EvaluationEvent", "CheckpointEvent") if step % 2 == 0 else () for step in range(7)]
    expected = [
        event
        for name, step in steps
        for event in [(name, step), *((one, step) for one in saved[step])]
    ]
    run, events = whole
    assert named(events) == [*expected, ("EndEvent", STEPS)]
    assert events[-1] == EndEvent(STEPS, STEPS, "steps", run.folder)


def test_events_have_the_numbers_of_the_records(whole):
    run, events = whole
    records, samples = run.records(), run.samples()
    evaluations = [event for event in events if isinstance(event, EvaluationEvent)]
    best = float("inf")
    for event, record, sample in zip(evaluations, records, samples, strict=True):
        assert json.loads(json.dumps(event.record)) == record
        assert (event.step, event.steps) == (record["step"], STEPS)
        assert (event.train_loss, event.validation_loss) == (
            record["train_loss"],
            record["val_loss"],
        )
        assert event.sample == sample["text"]
        assert event.is_best == (event.validation_loss < best)
        best = min(best, event.validation_loss)
    steps = [event for event in events if isinstance(event, StepEvent)]
    losses = [event.loss for event in steps]
    assert [sum(losses[i : i + 2]) / 2 for i in (0, 2, 4)] == [r["train_loss"] for r in records]
    rates = [run.settings().training.learning_rate_at(step) for step in range(STEPS)]
    assert [event.learning_rate for event in steps] == rates
    assert {event.steps for event in steps} == {STEPS}
    seconds = [event.seconds for event in steps]
    assert seconds == sorted(seconds)
    assert all(event.tokens_per_second > 0 for event in steps)


def test_a_checkpoint_event_comes_when_the_run_is_saved(tmp_path):
    saved = []

    def callback(event):
        if isinstance(event, CheckpointEvent):
            saved.append((event.step, Folder(event.folder).is_saved))
        elif not saved:
            assert not (tmp_path / "run" / CHECKPOINT_FILE).exists()

    train(tmp_path / "run", callback)
    assert saved == [(2, True), (4, True), (6, True)]


@together("kind", legacy1bit.api.events.TrainingEvent.__args__)
def test_events_are_frozen_and_documented(kind):
    names = [field.name for field in fields(kind)]
    event = kind(*names)
    with pytest.raises(FrozenInstanceError):
        event.step = 3
    for name in names:
        assert name in kind.__doc__


def test_patience_is_the_reason(tmp_path):
    events = []
    run = train(
        tmp_path / "run", events.append, steps=60, evaluate_every=1, patience=1, learning_rate=1.0
    )
    assert (run.reason, run.done) == ("patience", True)
    assert run.step < run.steps
    assert events[-1] == EndEvent(run.step, 60, "patience", run.folder)


# --- Cancellation ---------------------------------------------------------------------------------


def cancelling(event, at):
    """A callback that has another thread set an event after a step."""

    def callback(one):
        if isinstance(one, StepEvent) and one.step == at:
            other = threading.Thread(target=event.set)
            other.start()
            other.join()

    return callback


@pytest.mark.parametrize("points", [(3,), (1, 2, 3, 4, 5)], ids=str)
def test_a_cancelled_run_ends_like_an_uninterrupted_one(points, whole, tmp_path):
    run = None
    for point in points:
        cancel = threading.Event()
        callback = cancelling(cancel, point)
        if run is None:
            run = train(tmp_path / "run", callback, cancel)
        else:
            run = run.resume(callback=callback, cancel=cancel)
        assert (run.step, run.steps, run.reason, run.done) == (point, STEPS, "cancelled", False)
        # It is saved: its model can be used.
        assert legacy1bit.load(run.folder).generate("Kim", 3, seed=1).tokens <= 3
        assert run.records()[-1]["step"] == point
        assert run.metrics.loss == run.records()[-1]["val_loss"]
    run = run.resume()
    assert run.done
    assert run.metrics == whole[0].metrics
    assert_same_files(run.folder, whole[0].folder)


def test_cancellation_comes_after_the_step(tmp_path):
    cancel, events = threading.Event(), []

    def callback(event):
        events.append(event)
        if event.step == 3:
            cancel.set()

    run = train(tmp_path / "run", callback, cancel)
    assert named(events)[-4:] == [
        *(("StepEvent", 3), ("EvaluationEvent", 3), ("CheckpointEvent", 3), ("EndEvent", 3)),
    ]
    assert events[-1] == EndEvent(3, STEPS, "cancelled", run.folder)


def test_a_training_cancelled_before_its_first_step_leaves_nothing(whole, tmp_path):
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(legacy1bit.Cancelled, match="before its first step"):
        train(tmp_path / "new" / "run", cancel=cancel)
    assert not [*tmp_path.iterdir()]
    before = contents(whole[0].folder)
    with pytest.raises(legacy1bit.Cancelled):
        whole[0].resume(steps=9, cancel=cancel)
    assert contents(whole[0].folder) == before


class Later(threading.Event):
    """Set from the second question on."""

    asked = 0

    def is_set(self):
        self.asked += 1
        return self.asked > 1


def test_reading_a_text_is_cancelled(tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_bytes(TEXT * 40)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(legacy1bit.Cancelled):
        train(tmp_path / "run", cancel=Later(), data=text, stories=None)
    assert not (tmp_path / "run").exists()
    # Nothing wrong stays in the cache.
    run = train(tmp_path / "run", data=text, stories=None)
    other = tmp_path / "other"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
    assert_same_run(run.folder, train(other, data=text, stories=None).folder)


def test_ctrl_c_saves_the_last_step(whole, tmp_path):
    def callback(event):
        if isinstance(event, StepEvent) and event.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", callback)
    run = legacy1bit.train(resume=tmp_path / "run")
    assert run.step == STEPS
    assert_same_files(run.folder, whole[0].folder)


def test_more_steps(whole, tmp_path):
    longer = train(tmp_path / "run").resume(steps=9)
    assert (longer.step, longer.steps, longer.reason) == (9, 9, "steps")
    assert [record["step"] for record in longer.records()] == [2, 4, 6, 8, 9]


# --- Errors ---------------------------------------------------------------------------------------


def test_an_error_of_the_callback_ends_the_training_as_it_is(whole, tmp_path):
    raised = ValueError("--steps")

    def callback(event):
        if isinstance(event, StepEvent) and event.step == 5:
            raise raised

    with pytest.raises(ValueError, match=r"^--steps$") as told:
        train(tmp_path / "run", callback)
    assert told.value is raised
    # The run is as its last checkpoint, and unlocked.
    run = legacy1bit.train(resume=tmp_path / "run")
    assert_same_files(run.folder, whole[0].folder)


def refused(kind, message, **settings):
    with pytest.raises(kind, match=message) as told:
        legacy1bit.train(**settings)
    assert "--" not in str(told.value)
    assert "\n" not in str(told.value)


def test_what_cannot_be_is_refused_in_one_line(whole, tmp_path):
    folder = whole[0].folder
    before = contents(folder)
    refused(TypeError, "unknown argument step: the nearest is steps", step=3)
    refused(TypeError, "steps is '3', expected a whole number", steps="3")
    refused(TypeError, "callback is 3, expected a function", callback=3)
    refused(TypeError, "cancel is True, expected a threading.Event", cancel=True)
    refused(ValueError, "blocks is 0, expected 1 to", blocks=0)
    refused(ValueError, "model_dim is 9, expected a multiple of heads", model_dim=9, heads=2)
    refused(ValueError, "minutes and steps exclude each other", minutes=1, steps=2)
    refused(ValueError, "threads is 0, expected 1 to", threads=0)
    refused(ValueError, "stories and data exclude each other", data="a", stories=3)
    refused(ValueError, "holds a run already: name another folder, or resume it", out=folder)
    refused(ValueError, "has had its 6 steps: give more with steps", resume=folder)
    refused(ValueError, "blocks cannot change in a run that goes on", resume=folder, blocks=3)
    refused(FileNotFoundError, "nowhere", data=tmp_path / "nowhere")
    refused(legacy1bit.ModelFileError, "is not a training run", resume=tmp_path)
    with open(folder / CHECKPOINT_FILE, "rb") as file:
        damaged = bytearray(file.read())
    assert contents(folder) == before
    broken = tmp_path / "broken"
    broken.mkdir()
    for name in ("training.json", "config.json", "model.safetensors", "tokenizer.json"):
        (broken / name).write_bytes((folder / name).read_bytes())
    damaged[-3] ^= 1
    (broken / CHECKPOINT_FILE).write_bytes(damaged)
    refused(legacy1bit.ModelFileError, "is not a checkpoint", resume=broken, steps=9)
    assert issubclass(legacy1bit.ModelFileError, ValueError)


def test_a_training_that_diverges_says_so(tmp_path):
    with pytest.raises(legacy1bit.TrainingDiverged, match="a lower learning_rate than") as told:
        train(
            tmp_path / "run", learning_rate=1e3, clip=0, scheme="float", optimizer="sgd", steps=99
        )
    assert "--" not in str(told.value)
    assert issubclass(legacy1bit.TrainingDiverged, ValueError)


def test_a_training_that_needs_too_much_memory_is_refused():
    refused(
        MemoryError, "lower batch_size, sequence_length", stories=20,
        model_dim=16384, blocks=1000, heads=16,
    )  # fmt: skip


# --- Threads --------------------------------------------------------------------------------------


def test_trainings_and_a_generation_side_by_side(whole, tmp_path):
    model = whole[0].load()
    expected = model.generate("Kim was a", 100, seed=3)
    both = threading.Barrier(2, timeout=60)

    def meet(event):
        # Both are in the midst of it.
        if isinstance(event, StepEvent) and event.step in (1, 4):
            both.wait()

    others = {"seed": 3, "model_dim": 12, "threads": 2, "scheme": "binary"}
    with ThreadPoolExecutor(3) as pool:
        one = pool.submit(train, tmp_path / "one", meet)
        other = pool.submit(train, tmp_path / "other", meet, **others)
        texts = []
        while not (one.done() and other.done()):
            texts.append(pool.submit(model.generate, "Kim was a", 100, seed=3).result())
        assert one.result().metrics == whole[0].metrics
    assert texts
    assert {text.text for text in texts} == {expected.text}
    assert_same_run(tmp_path / "one", whole[0].folder)
    assert_same_run(tmp_path / "other", train(tmp_path / "alone", **others).folder)


def test_two_trainings_in_one_folder_are_refused(tmp_path):
    errors = []

    def callback(event):
        if isinstance(event, CheckpointEvent) and event.step == 2:
            with pytest.raises(ValueError, match="is in use") as told:
                legacy1bit.train(resume=tmp_path / "run")
            errors.append(told.value)

    assert train(tmp_path / "run", callback).done
    assert len(errors) == 1


def test_signals_are_left_alone(tmp_path):
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    seen = []
    train(tmp_path / "a", lambda event: seen.append([signal.getsignal(n) for n in numbers]))
    assert all(handlers == before for handlers in seen)
    assert len(seen) > STEPS


# --- What is said ---------------------------------------------------------------------------------


def test_it_is_silent_and_logs(tmp_path, capfd, caplog):
    caplog.set_level(logging.INFO, "legacy1bit")
    run = train(tmp_path / "run")
    assert capfd.readouterr() == ("", "")
    messages = [record.getMessage() for record in caplog.records]
    assert {record.name for record in caplog.records} == {"legacy1bit"}
    assert messages[0].startswith("training ")
    assert "\nmemory: about " in messages[0]
    assert [message[:11] for message in messages[1:4]] == [f"step      {n}" for n in (2, 4, 6)]
    assert messages[4] == "ended at step 6 of 6: steps"
    caplog.clear()
    run.resume(steps=7)
    assert caplog.records[0].getMessage() == f"going on with {run.folder} at step 6"


def test_the_logger_is_silent_by_default():
    script = (
        "import logging, legacy1bit.api.output\n"
        "legacy1bit.api.output.logger.warning('not to be seen')\n"
        "print([type(one).__name__ for one in logging.getLogger('legacy1bit').handlers])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, check=True,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == (b"['NullHandler']\n", b"")


def test_importing_the_package_loads_nothing_of_the_library():
    script = (
        "import sys, legacy1bit\n"
        "names = dir(legacy1bit)\n"
        "heavy = ['numpy', 'rich', 'safetensors', 'logging', 'argparse', 'legacy1bit.api']\n"
        "print([name for name in heavy if name in sys.modules])\n"
        "print({*legacy1bit.__all__} <= {*names})\n"
        "print(all(hasattr(legacy1bit, name) for name in names))\n"
        "print('matplotlib' in sys.modules, hasattr(legacy1bit, 'trian'))\n"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", script],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        capture_output=True, check=True,
    )  # fmt: skip
    assert done.stdout.split(b"\n")[:-1] == [b"[]", b"True", b"True", b"False False"]


class Screen:
    """Standard output that keeps what is written."""

    def __init__(self, terminal):
        self.text, self.terminal = "", terminal

    def write(self, text):
        self.text += text

    def flush(self):
        pass

    def isatty(self):
        return self.terminal


class Cell(Screen):
    """That of a notebook, which is no terminal."""

    __module__ = "ipykernel.iostream"


@pytest.fixture
def clock(monkeypatch):
    """Half a second passes whenever it is asked."""
    ticks = itertools.count()
    monkeypatch.setattr(progress, "clock", lambda: next(ticks) / 2)


def events_of(whole, *reasons):
    return [*whole[1][:-1], *(replace(whole[1][-1], reason=reason) for reason in reasons)]


@pytest.mark.parametrize("screen", [Screen(True), Cell(False)], ids=["terminal", "notebook"])
def test_progress_is_a_line_that_is_written_over(screen, whole, clock, monkeypatch):
    monkeypatch.setattr(sys, "stdout", screen)
    line = ProgressLine()
    for event in events_of(whole, "steps"):
        line(event)
    shown = [part for part in screen.text.split("\n") if part]
    assert len(shown) == 4
    for step, part in zip((2, 4, 6), shown, strict=False):
        before, *_, last = part.split("\r")
        assert before.startswith(f"step      {step - 1} of 6  loss ") or before == ""
        assert last.startswith(f"step      {step}  train loss ")
        assert "validation loss" in last
    assert "tokens/s  0:00:0" in screen.text
    assert shown[3] == "done at step 6 of 6"
    # A shorter line covers the whole of a longer one.
    for before, after in itertools.pairwise(shown[0].split("\r")):
        assert len(after) >= len(before)


def test_progress_is_a_line_for_each_evaluation_elsewhere(whole, monkeypatch):
    screen = Screen(False)
    monkeypatch.setattr(sys, "stdout", screen)
    line = ProgressLine()
    for event in events_of(whole, "cancelled"):
        line(event)
    shown = screen.text.split("\n")
    assert [part[:11] for part in shown[:3]] == [f"step      {n}" for n in (2, 4, 6)]
    assert shown[3:] == ["cancelled at step 6 of 6", ""]
    assert "\r" not in screen.text


def test_progress_does_without_standard_output(whole, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    line = ProgressLine()
    for event in whole[1]:
        line(event)


def test_train_prints_its_progress_if_asked(tmp_path, capfd):
    legacy1bit.train(out=tmp_path / "run", progress=True, **SIZES)
    output, errors = capfd.readouterr()
    assert output.count("validation loss") == 3
    assert output.endswith("done at step 6 of 6\n")
    assert errors == ""
