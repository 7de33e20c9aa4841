"""What a run goes on from when its newest checkpoint is damaged, and whom a run belongs to."""

import contextlib
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.paths import ROOT
from helpers.runs import (
    EVERY,
    STEPS,
    assert_same_files,
    assert_same_state,
    contents,
    make,
    measured,
    resumed,
    state_of,
    train,
)
from legacy1bit.formats.native import BEST_FOLDER, CHECKPOINT_FILE, ModelFileError
from legacy1bit.hyperparams import CHANGEABLE, SETTINGS_FILE
from legacy1bit.logger import METRICS_FILE, read_metrics
from legacy1bit.system import files
from legacy1bit.system.files import held
from legacy1bit.training.checkpoint import (
    newest_checkpoint,
    read_checkpoint,
)
from legacy1bit.training.run import EARLIER_FILE, Run, RunSettings

# Options of a training that takes no time.
SMALL = (
    *("--stories", 20, "--blocks", 1, "--model-dim", 8, "--heads", 2),
    *("--sequence-length", 8, "--threads", 1),
)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run after its second look, the first of which found the best."""
    run = make(tmp_path_factory.mktemp("runs") / "run")
    train(run, stop_at=2 * EVERY)
    run.best = (0.5, EVERY)
    run.save()
    return run


@pytest.fixture
def folder(stopped, tmp_path):
    return Path(shutil.copytree(stopped.folder, tmp_path / "run"))


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    run = make(tmp_path_factory.mktemp("runs") / "run")
    records = train(run)[2]
    return run, records


def replaced(path, content):
    """Give a file other content; other names of the old one keep that."""
    path.unlink()
    path.write_bytes(content)


# --- Damage ---------------------------------------------------------------------------------------


def values_of(checkpoint):
    """What a checkpoint tells, the moments one by one."""
    values = {name: value for name, value in vars(checkpoint).items() if name != "path"}
    return values | values.pop("moments")


@pytest.mark.parametrize("bits", [32, 8])
def test_every_changed_byte_is_found(stopped, tmp_path, bits):
    if bits == 8:
        stopped = make(tmp_path / "run", optimizer_bits=8)
        train(stopped, stop_at=2 * EVERY)
    whole = (stopped.folder / CHECKPOINT_FILE).read_bytes()
    expected = read_checkpoint(stopped.folder / CHECKPOINT_FILE, stopped.fixed_settings)
    path = tmp_path / CHECKPOINT_FILE
    places = random.Random(0).sample(range(len(whole)), 600)
    (length,) = struct.unpack_from("<Q", whole)
    for place in [*range(8), *range(8, 8 + length, 3), *places]:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        try:
            found = read_checkpoint(path, stopped.fixed_settings)
        except (ModelFileError, MemoryError):
            continue
        # A blank that has become another one changes nothing.
        now, before = values_of(found), values_of(expected)
        assert now.keys() == before.keys()
        for name, value in now.items():
            assert (value == before[name]) is True or (value.tobytes() == before[name].tobytes()), (
                place,
                name,
            )


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_bytes_are_a_checkpoint_or_an_error(stopped, tmp_path_factory, data):
    whole = (stopped.folder / CHECKPOINT_FILE).read_bytes()
    begin = data.draw(st.integers(0, len(whole)))
    end = data.draw(st.integers(begin, len(whole)))
    path = tmp_path_factory.getbasetemp() / "any"
    path.write_bytes(whole[:begin] + data.draw(st.binary(max_size=40)) + whole[end:])
    found = None
    with contextlib.suppress(ModelFileError):
        found = read_checkpoint(path, stopped.fixed_settings)
    assert found is None or found.step == stopped.step


@pytest.mark.parametrize("gone", [("crc32",), ("crc32", "training", "data", "source")])
def test_checkpoint_that_tells_less_is_read(folder, stopped, gone):
    """As earlier versions wrote it."""
    path = folder / CHECKPOINT_FILE
    raw = path.read_bytes()
    (length,) = struct.unpack_from("<Q", raw)
    header = json.loads(raw[8 : 8 + length])
    for name in gone:
        del header["__metadata__"][name]
    text = json.dumps(header).encode()
    replaced(path, struct.pack("<Q", len(text)) + text + raw[8 + length :])
    assert_same_state(state_of(resumed(folder)), state_of(stopped))


DAMAGE = {
    "empty": lambda path: replaced(path, b""),
    "cut": lambda path: replaced(path, path.read_bytes()[:-4]),
    "a bit": lambda path: replaced(path, bytes([*path.read_bytes()[:-1], 255])),
    "zeros": lambda path: replaced(path, bytes(path.stat().st_size)),
    "gone": lambda path: path.unlink(),
    "folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_run_goes_on_from_the_checkpoint_before(folder, unbroken, name):
    whole, records = unbroken
    DAMAGE[name](folder / CHECKPOINT_FILE)
    found, wrong = newest_checkpoint(Run(folder), whole.fixed_settings)
    assert found.path == folder / EARLIER_FILE
    [error] = wrong
    assert CHECKPOINT_FILE in str(error)
    if name == "folder":
        (folder / CHECKPOINT_FILE).rmdir()
    run = resumed(folder)
    # Whatever happens to the next, there is one to go on from.
    assert newest_checkpoint(Run(folder), whole.fixed_settings)[1] == []
    train(run)
    assert_same_state(state_of(run), state_of(whole))
    assert measured(read_metrics(folder / METRICS_FILE)) == measured(records)
    assert_same_files(folder, whole.folder)


def test_run_goes_on_from_its_best_where_nothing_else_is_left(folder, stopped):
    for name in (CHECKPOINT_FILE, EARLIER_FILE):
        replaced(folder / name, b"nothing")
    found, wrong = newest_checkpoint(Run(folder), stopped.fixed_settings)
    assert found.path == folder / BEST_FOLDER / CHECKPOINT_FILE
    assert [
        name in str(error)
        for name, error in zip((CHECKPOINT_FILE, EARLIER_FILE), wrong, strict=True)
    ] == [
        True,
        True,
    ]
    assert resumed(folder).step == found.step > 0


def test_run_without_a_whole_checkpoint_says_what_is_wrong_with_the_newest(folder, stopped):
    for path in (folder / CHECKPOINT_FILE, folder / EARLIER_FILE):
        replaced(path, b"nothing")
    shutil.rmtree(folder / BEST_FOLDER)
    with pytest.raises(ModelFileError, match=f"{CHECKPOINT_FILE} is not a checkpoint"):
        newest_checkpoint(Run(folder), stopped.fixed_settings)


CHANGES = {
    "model": {"positions": "none"},
    "training": {"learning_rate": 0.25},
    "data": {"token_dropout": 0.5},
    "source": {"name": "another"},
}


@pytest.mark.parametrize("table", CHANGES)
def test_checkpoint_of_a_run_with_other_settings_is_refused(folder, stopped, table):
    before = contents(folder)
    [(name, value)] = CHANGES[table].items()
    settings = stopped.fixed_settings
    others = settings | {table: settings[table] | CHANGES[table]}
    told = f"{CHECKPOINT_FILE} is of another run: its {name} is .*, expected {value!r}"
    with pytest.raises(ModelFileError, match=told):
        newest_checkpoint(Run(folder), others)
    assert contents(folder) == before


def test_checkpoint_of_another_run_is_not_gone_on_with(tmp_path, monkeypatch, say, fail):
    """Neither one with another's settings, nor one that another's checkpoint was put into."""
    monkeypatch.chdir(tmp_path)
    options = (*SMALL, "--steps", 4, "--evaluate-every", 2)
    say("train", *options, "--out", "run")
    say("train", *options, "--momentum", 0.5, "--out", "other")
    shutil.copytree("run", "mixed")
    shutil.copy(Path("other", SETTINGS_FILE), "mixed")
    before = contents(Path("mixed"))
    told = fail("train", "--resume", "mixed", "--steps", 6)
    assert "its momentum is 0.95, expected 0.5" in told
    assert contents(Path("mixed")) == before
    # Even where there is one that could be gone on with.
    replaced(Path("other", CHECKPOINT_FILE), b"damaged")
    replaced(Path("other", EARLIER_FILE), Path("run", CHECKPOINT_FILE).read_bytes())
    before = contents(Path("other"))
    told = fail("train", "--resume", "other", "--steps", 6)
    assert "its momentum is 0.95, expected 0.5" in told
    assert contents(Path("other")) == before


def test_checkpoint_tells_all_that_a_run_that_goes_on_cannot_change(stopped):
    run = RunSettings(
        stopped.model.config, stopped.config, stopped.data, {"path": "x", "a": 1}
    ).fixed()
    assert set(run["training"]) == set(stopped.config.to_dict()) - set(CHANGEABLE)
    assert run["model"] == stopped.model.config.to_dict()
    assert run["data"] == stopped.data.to_dict()
    assert run["source"] == {"a": 1}


def test_text_that_has_moved_is_gone_on_with(tmp_path, monkeypatch, say):
    """The hash of the text tells that it is the same."""
    monkeypatch.chdir(tmp_path)
    Path("text").write_text("a text that moves. " * 40)
    options = ("--steps", 4, "--evaluate-every", 2, "--blocks", 1, "--threads", 1)
    options += ("--model-dim", 8, "--heads", 2, "--sequence-length", 8, "--cache", "cache")
    say("train", "--data", "text", *options, "--out", "run")
    Path("text").rename("moved")
    settings_file = Path("run", SETTINGS_FILE)
    settings_file.write_text(settings_file.read_text().replace("/text", "/moved"))
    _, errors = say("train", "--resume", "run", "--steps", 6, "--cache", "cache")
    assert b"going on with run at step 4" in errors


def test_damage_is_told_in_one_line(tmp_path):
    """Another library's error quotes what it found, line breaks included; older ones do not."""
    header = b'{"first": {"dtype": "a\\nb", "shape": [0], "data_offsets": [0, 0]}}'
    (tmp_path / "x").write_bytes(struct.pack("<Q", len(header)) + header)
    told = r"x is not a checkpoint: .*(`a b`|InvalidHeaderDeserialization$)"
    with pytest.raises(ModelFileError, match=told) as caught:
        read_checkpoint(tmp_path / "x", {"model": {}})
    assert "\n" not in str(caught.value)


def test_resume_says_which_checkpoint_it_takes(tmp_path, monkeypatch, say):
    monkeypatch.chdir(tmp_path)
    options = (*SMALL, "--steps", 6, "--evaluate-every", 2)
    say("train", *options, "--out", "run")
    say("train", *options, "--out", "whole")
    replaced(Path("run", CHECKPOINT_FILE), b"damaged")
    shutil.rmtree(Path("run", BEST_FOLDER))
    before = [record["val_loss"] for record in read_metrics("whole/metrics.jsonl")]
    _, errors = say("train", "--resume", "run")
    told = errors.decode()
    assert f"run/{CHECKPOINT_FILE} is not a checkpoint" in told
    assert f"going on with run/{EARLIER_FILE}" in told
    assert "going on with run at step 4" in told
    assert [record["val_loss"] for record in read_metrics("run/metrics.jsonl")] == before
    assert_same_files(Path("run"), Path("whole"))


def test_newest_of_those_that_are_whole_is_taken(tmp_path, monkeypatch, say, fail):
    """Wherever it lies: the best has the step of the one that is gone, the earlier has not."""
    monkeypatch.chdir(tmp_path)
    options = (*SMALL, "--steps", 6, "--evaluate-every", 2)
    say("train", *options, "--out", "run")
    whole = contents(Path("run"))
    for name in DAMAGE:
        if name == "folder":
            continue
        DAMAGE[name](Path("run", CHECKPOINT_FILE))
        assert "has had its 6 steps" in fail("train", "--resume", "run")
        assert contents(Path("run")) == whole


def test_best_that_was_not_kept_leaves_the_checkpoint_before(tmp_path):
    run = make(tmp_path / "run", steps=2 * EVERY)
    train(run)
    assert run.best[1] == run.step
    whole = contents(run.folder)
    shutil.rmtree(run.folder / BEST_FOLDER)
    train(resumed(run.folder, steps=2 * EVERY))
    assert contents(run.folder) == whole


def test_best_is_kept_where_the_last_checkpoint_was_the_end(tmp_path, monkeypatch, say, fail):
    monkeypatch.chdir(tmp_path)
    options = (*SMALL, "--steps", 8, "--evaluate-every", 4)
    say("train", *options, "--out", "run")
    whole = contents(Path("run"))
    found, _ = newest_checkpoint(Run(Path("run")), Run(Path("run")).settings().fixed())
    assert found.best[1] == found.step == 8
    shutil.rmtree(Path("run", BEST_FOLDER))
    assert "has had its 8 steps" in fail("train", "--resume", "run")
    assert contents(Path("run")) == whole


def test_earlier_checkpoint_is_the_one_before(tmp_path):
    run = make(tmp_path / "run")
    steps = []

    def look(_):
        path = run.folder / EARLIER_FILE
        steps.append(read_checkpoint(path, run.fixed_settings).step if path.exists() else None)

    train(run, on_report=look)
    assert steps == [None, EVERY, 2 * EVERY]


def test_folder_that_was_removed_is_made_again(tmp_path, unbroken):
    """What was there is gone; what is to come is not."""
    whole, records = unbroken
    run = make(tmp_path / "run")
    train(run, on_report=lambda record: record["step"] == EVERY and shutil.rmtree(run.folder))
    assert_same_state(state_of(run), state_of(whole))
    assert measured(read_metrics(run.folder / METRICS_FILE)) == measured(records)[1:]
    assert resumed(run.folder, steps=STEPS + 5).step == STEPS


# --- Whom a run belongs to ------------------------------------------------------------------------


def test_folder_is_held_by_one_at_a_time(tmp_path):
    with held(tmp_path):
        with pytest.raises(ValueError, match="another process is training there"), held(tmp_path):
            pass
        (tmp_path / "other").mkdir()
        with held(tmp_path / "other"):
            pass
    with held(tmp_path):
        pass
    with pytest.raises(FileNotFoundError, match="nowhere"), held(tmp_path / "nowhere"):
        pass


def test_folder_of_a_file_system_without_locks_is_held_by_anybody(tmp_path, monkeypatch):
    def flock(handle, operation):
        raise OSError(25, "Inappropriate ioctl for device")

    monkeypatch.setattr(files.fcntl, "flock", flock)
    with held(tmp_path), held(tmp_path):
        pass


BUSY = """
import sys, time
from legacy1bit import main
from legacy1bit.training import trainer
def train(self, *arguments):
    print("it begins", file=sys.stderr, flush=True)
    time.sleep(60)
trainer.Trainer.train = train
sys.exit(main.main(sys.argv[1:]))
"""


def test_second_training_in_a_folder_is_refused(tmp_path, monkeypatch, say, fail):
    monkeypatch.chdir(tmp_path)
    options = (*SMALL, "--steps", 4, "--out", "run")
    say("train", *options)
    before = contents(Path("run"))
    process = subprocess.Popen(
        [sys.executable, "-c", BUSY, "train", "--resume", "run", "--steps", "9"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
    )
    alarm = threading.Timer(60, process.kill)
    alarm.start()
    with process:
        assert any(b"it begins" in line for line in process.stderr)
        told = fail("train", "--resume", "run", "--steps", 8)
        assert "run is in use: another process is training there" in told
        process.send_signal(signal.SIGKILL)
    alarm.cancel()
    # The first has dropped nothing of the record, and done nothing yet.
    assert contents(Path("run")) == before
    # A dead process holds nothing.
    say("train", "--resume", "run", "--steps", 8)
