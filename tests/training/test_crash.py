"""Trainings that are killed, or whose disk fails, at random moments: all that was saved stays.

A run that is interrupted and resumed until its end has to be the one that never was.
``make test-crash`` interrupts more of them.
"""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from helpers.paths import ROOT
from helpers.runs import assert_same_files, measured, tiny
from legacy1bit.formats.native import BEST_FOLDER, CHECKPOINT_FILE
from legacy1bit.hyperparams import SETTINGS_FILE
from legacy1bit.logger import METRICS_FILE, SAMPLES_FILE, read_metrics
from legacy1bit.main import main
from legacy1bit.training.checkpoint import (
    newest_checkpoint,
)
from legacy1bit.training.run import EARLIER_FILE, Run

# A training to be interrupted. It counts what it does to files of its run: opens them to write,
# has them written onto the disk, renames, links, removes them. From a count on, which may not be
# reached, this is the end; what a file has got since it was last put onto the disk is cut before
# it, as by a loss of power.
VICTIM = """
import errno, os, re, signal, sys, time
from legacy1bit import main
from legacy1bit.training import trainer

how, left, share, *arguments = sys.argv[1:]
left, share = 1 << 30 if how == "time" else int(left), float(share)
on_disk = {}

def file_event(event, arguments):
    if event == "open":
        path, _, flags = arguments
        if not flags & (os.O_WRONLY | os.O_RDWR):
            return
        if flags & os.O_APPEND and os.path.exists(path):
            on_disk[os.path.realpath(path)] = os.path.getsize(path)
    elif event in ("os.rename", "os.link", "os.remove", "os.truncate", "sync"):
        path = arguments[-1 if event == "sync" else 0]
    else:
        return
    if "parts" in str(path):
        interrupt(event, path)

def interrupt(event, path):
    global left
    left -= 1
    if left > 0:
        return
    if how == "kill":
        name = re.sub(r"[.][0-9a-f]{32}|[0-9]+$", "", os.path.basename(path))
        print("killed before", event, name, file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    if event != "os.remove":
        number = getattr(errno, how)
        raise OSError(number, os.strerror(number), path)

def fsync(handle):
    path = os.readlink(f"/proc/self/fd/{handle}")
    if left == 1 and os.path.isfile(path):
        kept = on_disk.get(path, 0)
        os.ftruncate(handle, kept + int(share * (os.fstat(handle).st_size - kept)))
    file_event("sync", (path,))

take, train = trainer.Trainer.train_step, trainer.Trainer.train
def train_step(self):
    time.sleep(0.002)
    return take(self)
def begin(self, *arguments):
    print("it begins", file=sys.stderr, flush=True)
    return train(self, *arguments)
trainer.Trainer.train_step, trainer.Trainer.train = train_step, begin

os.fsync = fsync
sys.addaudithook(file_event)
sys.exit(main.main(arguments))
"""

# What a run can be like, besides the number of its seed.
KINDS = (
    {"quantization_warmup": 30, "optimizer_bits": 8, "teacher": "teacher"},
    {"from": "teacher", "adapter": 2, "adapter_dropout": 0.2},
    {"float_steps": 20},
    {"threads": 2, "optimizer": "adamw"},
    {"optimizer": "sgd", "batch_size": 3},
)
STEPS, EVERY = 240, 10

# How a training is interrupted, and how often so among ten times.
INTERRUPTS = ("time",) * 3 + ("kill",) * 5 + ("ENOSPC", "EROFS")
INTERRUPTED = {
    "time": "killed at some time",
    "ENOSPC": "the disk was full",
    "EROFS": "the disk could not be written to any more",
}
KILLED = ("time", "kill")

# `make test-crash` asks for 500.
KILLS = int(os.environ.get("LEGACY1BIT_KILLS", 25))

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="there is no /proc here")


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(tiny(out="teacher", scheme="float", steps=1)) == 0


def interrupted(arguments, choice, how, left):
    """Run a training in a process of its own until it is interrupted, or has ended.

    Returns whether it was interrupted, and what it has told.
    """
    share = choice.choice((0.0, 1.0, choice.random()))
    process = subprocess.Popen(
        [sys.executable, "-c", VICTIM, how, str(left), str(share), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    alarm = threading.Timer(120, process.kill)
    alarm.start()
    told = b""
    with process:
        if how == "time":
            for line in process.stderr:
                told += line
                if b"it begins" in line:
                    break
            time.sleep(choice.uniform(0.0, 0.15))
            process.kill()
        told += process.communicate()[1]
    in_time = alarm.is_alive()
    alarm.cancel()
    assert in_time, told
    expected = (0, -signal.SIGKILL if how in KILLED else 2)
    assert process.returncode in expected or b"has had its" in told, told
    assert b"Traceback" not in told
    if process.returncode == 2:
        assert told.splitlines()[-1].startswith(b"legacy1bit: error: ")
    # Killed after its last checkpoint, a run goes on to no other end.
    ended = process.returncode == 0 or b"has had its" in told
    return not ended, told.decode()


def damage(path, choice):
    """Change a file as a disk would: a part of it is lost, or is something else."""
    content = bytearray(path.read_bytes())
    place = choice.randrange(len(content))
    if choice.random() < 0.5:
        del content[place:]
    else:
        content[place] ^= 1 << choice.randrange(8)
    path.unlink()
    path.write_bytes(content)


def train_interrupted(seed, most, seen):
    """Train until the end, whatever comes between, and until ``most`` kills have.

    Whenever it was interrupted, the newest whole checkpoint is not older than the one before.
    Returns how often it was killed, and the options of a run that is not.
    """
    choice, run = random.Random(seed), Path(f"parts{seed}")
    options = {"seed": seed, "steps": STEPS, "evaluate_every": EVERY, "sequence_length": 4}
    options |= KINDS[seed % len(KINDS)]
    killed = newest = 0
    while True:
        # A run that was not saved yet has nothing to go on from.
        saved = (run / SETTINGS_FILE).exists()
        damaged = saved and (run / EARLIER_FILE).exists() and choice.random() < 0.1
        if damaged:
            damage(run / CHECKPOINT_FILE, choice)
            taken = newest_checkpoint(Run(run), Run(run).settings().fixed())[0]
            newest = taken.step
            seen["the newest checkpoint was damaged"] += 1
        how, left = choice.choice(INTERRUPTS), choice.randint(1, 120)
        if killed == most:
            how, left = "kill", 1 << 30
        arguments = ["train", "--resume", run] if saved else tiny(out=run, **options)
        going, told = interrupted(arguments, choice, how, left)
        if damaged:
            assert f"going on with {taken.path}" in told
        if not going:
            return killed, options
        killed += how in KILLED
        seen[told.splitlines()[-1] if how == "kill" else INTERRUPTED[how]] += 1
        if (run / SETTINGS_FILE).exists():
            found, wrong = newest_checkpoint(Run(run), Run(run).settings().fixed())
            assert damaged or not wrong
            assert found.step >= newest
            newest = found.step


@pytest.mark.parametrize("kills", [4, pytest.param(KILLS, marks=pytest.mark.slow)])
def test_interrupted_run_ends_like_an_unbroken_one(say, kills):
    """The record, the last model and the best come out the same."""
    seen, killed, seed = Counter(), 0, 0
    while killed < kills:
        # Of every kind of run some are killed.
        most = min(kills - killed, max(kills // len(KINDS), 4))
        new, options = train_interrupted(seed, most, seen)
        killed += new
        whole, parts = Path(f"whole{seed}"), Path(f"parts{seed}")
        say(*tiny(out=whole, **options))
        expected, found = (measured(read_metrics(run / METRICS_FILE)) for run in (whole, parts))
        assert len(expected) == STEPS // EVERY
        assert found == expected
        told = [(run / SAMPLES_FILE).read_bytes() for run in (whole, parts)]
        assert told[0] == told[1]
        assert len(told[0].splitlines()) == len(expected)
        assert not list(parts.rglob("*.tmp"))
        for place in (".", BEST_FOLDER):
            assert_same_files(parts / place, whole / place)
        seed += 1
    print(f"{killed} kills in {seed} runs, {killed} resumed:")
    for name, count in sorted(seen.items()):
        print(f"{count:5} {name}")
