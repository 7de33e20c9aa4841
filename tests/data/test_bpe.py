"""Merges that are learned in a process of their own."""

import json
import os
import signal
import subprocess
import sys

import pytest

from helpers.paths import ROOT
from legacy1bit.data import bpe
from legacy1bit.data.bpe import learn_merges
from legacy1bit.data.tokenizer import train_bpe

pytest.importorskip("tokenizers")

# More than what is learned without a process, in parts.
TEXTS = [f"the cat {n} sat, \u00e9t\u00e9 \u65e5\u672c {n * n}\n" * 20 for n in range(200)]
EXPECTED = bpe._learn(TEXTS, 400)


@pytest.fixture
def started(monkeypatch):
    """The processes that are started."""
    processes = []

    class Recorded(subprocess.Popen):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            processes.append(self)

    monkeypatch.setattr(subprocess, "Popen", Recorded)
    return processes


@pytest.fixture
def instead(tmp_path, monkeypatch):
    """Have a shell's commands run in place of the process that learns."""

    def replace(commands, name="python"):
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\n{commands}\n")
        path.chmod(0o700)
        monkeypatch.setattr(sys, "executable", str(path))

    return replace


def test_learn_merges_in_a_process_gives_the_same(started, tmp_path, monkeypatch):
    # What lies in the current folder is not loaded.
    tmp_path.joinpath("json.py").write_text("raise OSError")
    monkeypatch.chdir(tmp_path)
    assert sum(map(len, TEXTS)) > bpe._SHORT
    assert learn_merges(TEXTS, 400) == EXPECTED
    (process,) = started
    assert process.returncode is not None


def test_learn_merges_of_a_short_text_starts_no_process(started):
    assert learn_merges(["ab ab"], 300) == [["a", "b"], ["\u0120", "ab"]]
    assert started == []


@pytest.mark.parametrize("how", ["unknown", "missing", "another", "ends", "speaks", "no process"])
def test_learn_merges_without_a_process_learns_here(instead, monkeypatch, started, how):
    if how == "unknown":
        monkeypatch.setattr(sys, "executable", None)
    elif how == "missing":
        monkeypatch.setattr(sys, "executable", "/nowhere/python")
    elif how == "another":
        instead("echo legacy1bit.data.bpe: ready", name="server")
    elif how == "ends":
        instead("exit 0")
    elif how == "speaks":
        instead("echo hello")
    else:

        def refuse(*_, **__):
            raise BlockingIOError

        monkeypatch.setattr(subprocess, "Popen", refuse)
    assert learn_merges(TEXTS, 400) == EXPECTED
    assert len(started) == (how in ("ends", "speaks"))


@pytest.mark.parametrize("when", ["before it begins", "while it learns"])
def test_interrupt_ends_the_process_that_learns(instead, started, when):
    """It would learn for ever."""
    ready = "" if when == "before it begins" else "echo legacy1bit.data.bpe: ready; "
    instead(f"{ready}sleep 0.1; kill -INT $PPID; exec sleep 1000")
    with pytest.raises(KeyboardInterrupt):
        train_bpe([text.encode() for text in TEXTS], 400)
    (process,) = started
    assert process.returncode == -signal.SIGKILL


def test_what_goes_wrong_with_the_text_ends_the_process(started):
    def texts():
        yield from TEXTS
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        learn_merges(texts(), 400)
    (process,) = started
    assert process.returncode is not None


@pytest.mark.parametrize(
    ("commands", "message"),
    [
        ("kill -9 $$", "its process was ended by SIGKILL, as where memory is short"),
        ("exit 3", "its process ended with status 3"),
        ("""echo '{"error": "a panic"}'""", "a panic"),
    ],
)
def test_learn_merges_that_fails_says_why(instead, commands, message):
    instead(f"echo legacy1bit.data.bpe: ready; {commands}")
    with pytest.raises(ValueError, match="the vocabulary could not be learned: ") as failure:
        learn_merges(TEXTS * 5, 400)
    assert str(failure.value).endswith(f": {message}")


def test_process_gets_the_path_that_modules_are_looked_for_on(instead, monkeypatch, tmp_path):
    instead(f'echo "$PYTHONPATH" > {tmp_path}/path')
    monkeypatch.setattr(sys, "path", ["", "/some where", *sys.path])
    learn_merges(TEXTS, 400)
    entries = tmp_path.joinpath("path").read_text().strip().split(os.pathsep)
    assert entries == [".", *sys.path[1:]]


def test_process_outlives_a_terminals_interrupt_and_ends_with_its_parent():
    def begun():
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "legacy1bit.data.bpe", "300"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        assert process.stdout.readline() == b"legacy1bit.data.bpe: ready\n"
        process.send_signal(signal.SIGINT)
        return process

    with begun() as process:
        process.stdin.write(b"\0\0\0\5ab ab" + bpe._END)
        process.stdin.flush()
        answer = process.stdout.read()
        assert json.loads(answer) == {"merges": [["a", "b"], ["\u0120", "ab"]]}
        assert process.stderr.read() == b""
    assert process.returncode == 0
    with begun() as process:
        process.stdin.write(b"\0\0\0\5ab")
        process.stdin.close()
        process.stdout.read()
        assert process.stderr.read() == b""
    assert process.returncode in (0, 1)
