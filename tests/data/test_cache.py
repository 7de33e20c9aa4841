"""The cache: what it shows, what is cleared and what stays, and that it stays within its limit."""

import io
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from helpers.paths import ROOT
from legacy1bit.data import cache as caches
from legacy1bit.data.cache import LIMIT_VARIABLE, clear, entries, limit_of, text_of, trim
from legacy1bit.data.corpus import tokens_of
from legacy1bit.data.shards import ShardWriter, open_store
from legacy1bit.data.sources import open_source
from legacy1bit.data.tokenizer import ByteTokenizer
from legacy1bit.main import main
from legacy1bit.system.files import shared

TINY = ("--model-dim", 8, "--blocks", 1, "--heads", 1, "--sequence-length", 8,
        "--batch-size", 2, "--steps", 2, "--threads", 1, "--cache", "cache")  # fmt: skip
DAY = 24 * 3600


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(LIMIT_VARIABLE, raising=False)


def put(name, size=2000):
    """A text of that size, unlike any other."""
    letters = np.random.default_rng(list(name.encode())).integers(97, 123, size, np.uint8)
    Path(name).write_bytes(letters.tobytes())
    return name


def tokens(name, cache=Path("cache")):
    return tokens_of(open_source(name), ByteTokenizer(), cache)


def age(path, days):
    then = time.time() - days * DAY
    os.utime(path, (then, then))


def kinds(cache=Path("cache")):
    return sorted((one.kind, one.text) for one in entries(cache))


def typed(monkeypatch, content):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


# --- What is shown --------------------------------------------------------------------------------


def test_cache_shows_what_there_is_and_of_which_text(say, monkeypatch):
    for number, name in enumerate((put("a.txt"), put("b.txt"))):
        say("train", "--data", name, *TINY, "--tokenizer", ("chars", "bytes")[number])
    say("train", "--data", "a.txt", "b.txt", *TINY)
    typed(monkeypatch, Path(put("c.txt")).read_bytes())
    say("train", "--data", "-", *TINY)
    (stream,) = Path("cache/standard-input").iterdir()
    here = os.path.realpath(".")
    shown = kinds()
    assert sorted(set(shown)) == [
        ("text", f"standard input, {stream.stem}"),
        ("tokenizer", f"{here}/a.txt"),
        ("tokens", f"{here} (2 files)"),
        ("tokens", f"{here}/a.txt"),
        ("tokens", f"{here}/b.txt"),
        ("tokens", f"standard input, {stream.stem}"),
    ]
    total = sum(path.stat().st_size for path in Path("cache").rglob("*") if path.is_file())
    output = say("cache", "--cache", "cache").out.decode()
    assert f"folder            {Path('cache')}\n" in output
    assert f"total             {len(shown)} entries, {total:,} bytes\n" in output
    today = re.escape(time.strftime("%Y-%m-"))
    line = rf"^{today}\d\d \d\d:\d\d  tokens +[\d,]+  {re.escape(here)}/b\.txt$"
    assert re.search(line, output, re.MULTILINE)
    assert say("cache", "show", "--cache", "cache").out.decode() == output


def test_cache_shows_the_users_own_and_none(say, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    output = say("cache").out.decode()
    assert f"folder            {tmp_path}/user/legacy1bit\n" in output
    assert "total             0 entries, 0 bytes\n" in output
    assert "removed           0 entries" in say("cache", "clear").out.decode()
    assert not Path("user").exists()


def test_entries_come_by_their_last_use():
    for name in "abc":
        folder, _ = tokens(put(name))
        age(folder, 10)
    folder, _ = tokens("b")
    assert entries(Path("cache"))[0].path == folder
    assert abs(entries(Path("cache"))[0].used - time.time()) < 60
    assert entries(Path("cache"))[1].used < time.time() - 9 * DAY


@pytest.mark.parametrize("note", [None, b"", b"[]", b'{"text": 5}', b"{" * 99999])
def test_entries_of_earlier_versions_and_damaged_ones_are_of_a_text_unknown(note):
    folder, index = tokens(put("a.txt"))
    Path(folder, caches.NOTE_FILE).unlink()
    if note is not None:
        Path(folder, caches.NOTE_FILE).write_bytes(note)
    assert kinds() == [("tokens", "unknown")]
    # They are used all the same, and known from then on.
    assert tokens("a.txt") == (folder, index)
    if note is None:
        assert kinds() == [("tokens", os.path.realpath("a.txt"))]


def test_names_of_texts_do_not_reach_the_terminal_as_they_are(say):
    put("a\x1b[2J\n.txt")
    tokens("a\x1b[2J\n.txt")
    output = say("cache", "--cache", "cache").out
    assert b"\x1b" not in output
    assert rb"a\x1b[2J\n.txt'" in output


def test_text_of_tells_where_it_lies(tmp_path):
    assert text_of([]) == "standard input"
    assert text_of([Path("/a/b.txt")]) == "/a/b.txt"
    assert text_of([Path("/a/b.txt"), Path("/a/c/d.txt")]) == "/a (2 files)"


# --- What is cleared ------------------------------------------------------------------------------


def test_clear_removes_all_and_nothing_else(say, monkeypatch):
    say("train", "--data", put("a.txt"), *TINY, "--tokenizer", "chars", "--out", "run")
    typed(monkeypatch, Path(put("c.txt")).read_bytes())
    say("train", "--data", "-", *TINY, "--out", "piped")
    half = Path("cache", f".{'0' * 24}.{'0123456789abcdef' * 2}.tmp")
    half.mkdir()
    others = ["notes.txt", "mine/data", f"{'a' * 31}g/data", ".notes.tmp", "standard-input/.mine"]
    for name in others:
        Path("cache", name).parent.mkdir(exist_ok=True)
        Path("cache", name).write_text("mine")
    Path("cache", "b" * 32).symlink_to("mine")
    assert len(entries(Path("cache"))) == 5
    output = say("cache", "clear", "--cache", "cache").out.decode()
    assert "removed           5 entries" in output
    left = {str(path.relative_to("cache")) for path in Path("cache").rglob("*") if path.is_file()}
    assert left == {*others, f"{'b' * 32}/data"} or left == set(others)
    assert Path("cache", "b" * 32).is_symlink()
    # Only the cache is gone: runs go on, of a text that came once only where it is named.
    say("train", "--resume", "run", "--steps", 3, "--cache", "cache")
    typed(monkeypatch, Path("c.txt").read_bytes())
    say("train", "--resume", "piped", "--steps", 3, "--cache", "cache", "--data", "-")


def test_run_of_a_cleared_stream_says_what_to_type(say, fail, monkeypatch):
    typed(monkeypatch, Path(put("c.txt")).read_bytes())
    say("train", "--data", "-", *TINY, "--out", "piped")
    say("cache", "clear", "--cache", "cache")
    message = fail("train", "--resume", "piped", "--steps", 3, "--cache", "cache")
    assert "No such file or directory (--data" in message


def test_clear_removes_what_the_clock_says_is_of_tomorrow(say):
    folder, _ = tokens(put("a.txt"))
    age(folder, -1)
    say("cache", "clear", "--cache", "cache")
    assert not folder.exists()


def test_clear_may_spare_what_was_used_lately(say, fail):
    old, new = (tokens(put(name))[0] for name in ("old.txt", "new.txt"))
    age(old, 8)
    age(new, 6)
    output = say("cache", "clear", "--older-than", 7, "--cache", "cache").out.decode()
    assert "removed           1 entries" in output
    assert (old.exists(), new.exists()) == (False, True)
    for days in ("0", "-1", "nan", "x"):
        assert "older-than" in fail("cache", "clear", f"--older-than={days}", "--cache", "cache")
    assert "goes with clear" in fail("cache", "--older-than", 7)
    assert "invalid choice: 'shred'" in fail("cache", "shred")
    assert new.exists()


HOLDS = """
import sys, time
from pathlib import Path
from legacy1bit.data.corpus import tokens_of
from legacy1bit.data.shards import open_store
from legacy1bit.data.sources import open_source
from legacy1bit.data.tokenizer import ByteTokenizer
folder, index = tokens_of(open_source("busy.txt"), ByteTokenizer(), Path("cache"))
store = open_store(folder, index, "text").window(3, 900)
print(folder, flush=True)
sys.stdin.read()
"""


def test_clear_leaves_what_another_process_uses(say):
    put("busy.txt")
    idle, _ = tokens(put("idle.txt"))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", HOLDS],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
    ) as process:
        busy = Path(process.stdout.readline().decode().strip())
        assert busy.exists()
        output = say("cache", "clear", "--cache", "cache").out.decode()
        assert "removed           1 entries" in output
        assert f"in use            tokens of {os.path.realpath('busy.txt')}" in output
        assert (idle.exists(), busy.exists()) == (False, True)
        process.communicate()
    assert "removed           1 entries" in say("cache", "clear", "--cache", "cache").out.decode()
    assert not busy.exists()


def test_clear_leaves_what_this_process_uses_or_writes():
    folder, index = tokens(put("a.txt"))
    store = open_store(folder, index, "text").window(10, 500)
    expected = store.read(0, 490)
    with ShardWriter(Path("cache", "c" * 32), ("text",), 256) as writer:
        writer.begin_document("text")
        writer.write("text", np.arange(9))
        removed, kept = clear(Path("cache"), time.time() + 1)
        assert removed == []
        assert sorted(one.kind for one in kept) == ["tokens", "unfinished"]
        writer.finish("source", "tokenizer", "0" * 64)
        assert len(clear(Path("cache"), time.time() + 1)[1]) == 2
    assert np.array_equal(store.read(0, 490), expected)
    del store
    removed, kept = clear(Path("cache"), time.time() + 1)
    assert (len(removed), kept) == (2, [])
    assert list(Path("cache").iterdir()) == []


def test_clear_leaves_the_stream_that_a_run_learns(say, monkeypatch):
    from legacy1bit.training.trainer import Trainer

    seen = []

    def train(self, *arguments, **options):
        seen.extend(clear(Path("cache"), time.time() + 1)[1])
        return real(self, *arguments, **options)

    real = Trainer.train
    monkeypatch.setattr(Trainer, "train", train)
    typed(monkeypatch, Path(put("c.txt")).read_bytes())
    say("train", "--data", "-", *TINY, "--out", "piped")
    assert sorted(one.kind for one in seen) == ["text", "tokens"]


def test_clear_does_without_locks(monkeypatch):
    """Some file systems have none; then nothing counts as used."""
    import fcntl

    def refuse(handle, how):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    folder, _ = tokens(put("a.txt"))
    os.close(shared(folder))
    assert len(clear(Path("cache"), time.time() + 1)[0]) == 1
    assert not folder.exists()


# --- How much there is ----------------------------------------------------------------------------


def test_cache_stays_within_its_limit(monkeypatch):
    first = [tokens(put(f"{number}.txt"))[0] for number in range(4)]
    size = entries(Path("cache"))[0].bytes
    monkeypatch.setenv(LIMIT_VARIABLE, str(4.5 * size / 1e9))
    for days, folder in zip((4, 9, 2, 3), first, strict=True):
        age(folder, days)
    # The next one takes the place of what was used longest ago, even if it was made last.
    tokens("0.txt")
    tokens(put("4.txt"))
    assert [folder.exists() for folder in first] == [True, False, True, True]
    tokens(put("5.txt"))
    assert [folder.exists() for folder in first] == [True, False, True, False]
    assert sum(one.bytes for one in entries(Path("cache"))) <= 4.5 * size


def test_trim_spares_what_is_used_and_what_came_once(monkeypatch):
    monkeypatch.setenv(LIMIT_VARIABLE, "0")
    Path("cache/standard-input").mkdir(parents=True)
    Path("cache/standard-input/0123.txt").write_text("text")
    busy, index = tokens(put("busy.txt"))
    store = open_store(busy, index, "text")
    # What has just been written is about to be used.
    latest, _ = tokens(put("latest.txt"))
    assert sorted(one.path.name for one in entries(Path("cache"))) == sorted(
        [busy.name, latest.name, "0123.txt"]
    )
    del store
    another, _ = tokens(put("another.txt"))
    assert [one.path for one in entries(Path("cache")) if one.kind == "tokens"] == [another]


def test_training_works_whatever_the_limit(say, monkeypatch):
    monkeypatch.setenv(LIMIT_VARIABLE, "0")
    for options in (("--tokenizer", "bytes"), ("--tokenizer", "chars")):
        say("train", "--data", put("a.txt"), "--validation", put("b.txt"), *TINY, *options)
    assert len(entries(Path("cache"))) <= 2


def test_trim_is_no_reason_to_fail(monkeypatch):
    folder, _ = tokens(put("a.txt"))
    monkeypatch.setenv(LIMIT_VARIABLE, "0")

    def refuse(*names):
        raise OSError(30, "Read-only file system", *map(str, names))

    monkeypatch.setattr(os, "rename", refuse)
    trim(Path("cache"), Path("cache/none"))
    assert folder.exists()


@pytest.mark.parametrize("size", ["x", "-1", "nan", "inf", "1e99", "20 GB"])
def test_limit_that_is_no_number_is_refused(fail, monkeypatch, size):
    monkeypatch.setenv(LIMIT_VARIABLE, size)
    assert f"{LIMIT_VARIABLE} is '{size}', expected gigabytes" in fail("cache")


def test_limit_is_a_tenth_of_the_disk_or_what_is_said(monkeypatch, tmp_path):
    disk = os.statvfs(tmp_path)
    expected = disk.f_blocks * disk.f_frsize / 10
    assert limit_of(tmp_path / "not" / "there") == pytest.approx(expected, rel=1e-6)
    monkeypatch.setenv(LIMIT_VARIABLE, "2.5")
    assert limit_of(tmp_path) == 2_500_000_000


def test_cache_that_can_only_be_read_is_shown_and_used(monkeypatch):
    folder, index = tokens(put("a.txt"))

    def refuse(*names, **options):
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(os, "utime", refuse)
    Path(folder, caches.NOTE_FILE).unlink()
    monkeypatch.setattr(caches, "atomic_write", refuse)
    assert tokens("a.txt") == (folder, index)
    assert kinds() == [("tokens", "unknown")]


def test_note_is_no_part_of_the_index():
    """Who reads an entry does not look at it."""
    folder, index = tokens(put("a.txt"))
    assert json.loads(Path(folder, caches.NOTE_FILE).read_text()) == {
        "text": os.path.realpath("a.txt")
    }
    assert "a.txt" not in Path(folder, "index.json").read_text()
    Path(folder, caches.NOTE_FILE).write_text("anything")
    assert tokens("a.txt") == (folder, index)


def test_help_of_cache_is_printed(capsys):
    with pytest.raises(SystemExit):
        main(["cache", "--help"])
    assert "--older-than DAYS" in capsys.readouterr().out
