"""``train --data``: texts of many kinds on the command line, and what is told where one is bad."""

import bz2
import errno
import gzip
import io
import json
import lzma
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from helpers.paths import ROOT
from helpers.published import golden, with_golden_models
from helpers.runs import assert_same_files
from legacy1bit.commands.report import train_command
from legacy1bit.data import corpus, sources
from legacy1bit.data.shards import read_index
from legacy1bit.formats.chat_template import PLAIN
from legacy1bit.hyperparams import DataConfig, ModelConfig, TrainingConfig
from legacy1bit.logger import MetricsLogger, read_metrics
from legacy1bit.training.checkpoint import read_checkpoint
from legacy1bit.training.run import Run
from legacy1bit.training.trainer import Trainer

TINY = {
    "steps": 2,
    "model-dim": 8,
    "blocks": 1,
    "heads": 1,
    "sequence-length": 8,
    "batch-size": 2,
    "threads": 1,
    "cache": "cache",
}
STORY = "The c\u00e4t sat on the m\u00e4t. The d\u00f6g lay by the l\u00f6g, and it sl\u00e8pt. "
TEXT = (STORY * 20).encode()


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def tiny(data, *more, **options):
    options = TINY | {name.replace("_", "-"): value for name, value in options.items()}
    pairs = [(f"--{name}", str(value)) for name, value in options.items()]
    return ["train", "--data", data, *(word for pair in pairs for word in pair), *more]


@pytest.fixture
def text():
    Path("text.txt").write_bytes(TEXT)
    return "text.txt"


@pytest.fixture
def refuse(fail):
    """Run a command that is refused and leaves nothing half-written behind."""

    def run(*arguments):
        message = fail(*arguments)
        assert not Path("runs").exists()
        assert not list(Path().rglob("*.tmp"))
        return message

    return run


def typed(monkeypatch, content):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


# --- What can be learned from ---------------------------------------------------------------------


def put(name, content):
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_bytes(content)
    return name


def make_lines(folder):
    lines = [json.dumps({"text": f"{number} {STORY}"}) for number in range(30)]
    return put("text.jsonl", "\n".join(lines).encode())


MAKERS = {
    "file": lambda _: put("text.txt", TEXT),
    "gzip": lambda _: put("text.txt.gz", gzip.compress(TEXT)),
    "lines": make_lines,
    "folder": lambda _: str(Path(put("folder/a/b.md", TEXT)).parts[0]),
    "tokens": lambda _: put("text.bin", np.arange(300, dtype="<u2").tobytes()),
}


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("tokenizer", ["bytes", "chars", "bpe"])
def test_train_takes_texts_of_any_kind(say, tmp_path, kind, tokenizer):
    if kind == "tokens" and tokenizer != "bytes":
        return
    data = MAKERS[kind](tmp_path)
    vocabulary = {"vocab-size": 280} if tokenizer == "bpe" else {}
    say(*tiny(data, out="run", tokenizer=tokenizer, **vocabulary))
    assert say("evaluate", "--model", "run", "--cache", "cache").out
    say("train", "--resume", "run", "--steps", 3, "--cache", "cache")
    assert [record["step"] for record in read_metrics("run/metrics.jsonl")] == [2, 3]
    assert not list(Path().rglob("*.tmp"))


def test_train_takes_tokens_with_a_validation_of_their_own(say, refuse, text):
    put("train.bin", np.arange(300, dtype="<u2").tobytes())
    put("val.bin", np.arange(310, 330, dtype="<u2").tobytes())
    assert "holds tokens" in refuse(*tiny("train.bin", validation="text.txt"))
    assert "holds tokens" in refuse(*tiny("text.txt", validation="val.bin"))
    say(*tiny("train.bin", out="run", validation="val.bin"))
    put("val.bin", np.arange(311, 331, dtype="<u2").tobytes())
    with pytest.raises(SystemExit):
        say("train", "--resume", "run", "--steps", 3)


def test_token_file_without_a_header_has_to_look_like_tokens(say, refuse, text):
    noise = np.random.default_rng(0).integers(0, 256, 100_000, np.uint8).tobytes()
    put("noise.bin", noise)
    put("floats.bin", np.random.default_rng(0).normal(size=5000).astype("<f4").tobytes())
    put("llama.bin", np.random.default_rng(0).integers(0, 128_000, 5000, "<u4").tobytes())
    for name in ("noise", "floats", "llama"):
        refused = refuse(*tiny(f"{name}.bin"))
        assert f"{name}.bin has no header and numbers up to 65,5" in refused
        assert "hardly tokens: expected less than 50,257; --vocab-size 655" in refused
    put("text.bin", TEXT[:-1] if len(TEXT) % 2 else TEXT)
    assert "text.bin holds text, expected tokens: let its name" in refuse(*tiny("text.bin"))
    put("model.bin", gzip.compress(b"abc"))
    assert "model.bin holds a gzip file, expected tokens: gzip -d" in refuse(*tiny("model.bin"))
    put("good.bin", np.arange(300, dtype="<u2").tobytes())
    assert "the validation set has no header" in refuse(*tiny("good.bin", validation="noise.bin"))
    # Whoever names the vocabulary knows; and that of a header is known.
    put("high.bin", np.arange(50_000, 50_300, dtype="<u2").tobytes())
    assert "high.bin has no header and numbers up to 50,299, which" in refuse(*tiny("high.bin"))
    told = say(*tiny("high.bin", out="run", vocab_size=50_300)).err
    assert b"high.bin: 300 tokens of a vocabulary of 50,300\n" in told
    say("train", "--resume", "run", "--steps", 3, "--cache", "cache")
    header = np.zeros(256, "<i4")
    header[:3] = 20240801, 7, 300
    put("head.bin", header.tobytes() + np.arange(60_000, 60_300, dtype="<u4").tobytes())
    told = say(*tiny("head.bin", out="headed")).err
    assert b"head.bin: 300 tokens of a vocabulary of 60,300, as the highest token says;" in told


def test_evaluate_refuses_tokens_that_are_not_the_models(say, fail, text):
    put("few.bin", np.arange(100, 200, dtype="<u2").tobytes())
    put("many.bin", np.arange(150, 250, dtype="<u2").tobytes())
    say(*tiny("few.bin", out="tokens"))
    say(*tiny(text, out="bytes"))
    measure = ("evaluate", "--cache", "cache", "--model")
    say(*measure, "tokens", "--data", "few.bin")
    message = fail(*measure, "tokens", "--data", "many.bin")
    assert message.endswith("many.bin has token 249, expected 0 to 199, the model's")
    message = fail(*measure, "bytes", "--data", "few.bin")
    assert "few.bin has tokens of another program, and the model's are bytes" in message


def test_standard_input_is_kept(say, monkeypatch):
    typed(monkeypatch, TEXT)
    say(*tiny("-", out="run", tokenizer="bpe", vocab_size=280))
    (kept,) = Path("cache/standard-input").iterdir()
    assert kept.read_bytes() == TEXT
    before = kept.stat()
    entries = set(Path("cache").iterdir())
    typed(monkeypatch, b"")
    say("train", "--resume", "run", "--steps", 3, "--cache", "cache")
    # The same text keeps its file, and so its tokens.
    typed(monkeypatch, TEXT)
    say(*tiny("-", out="other", tokenizer="bpe", vocab_size=280))
    assert (kept.stat().st_ino, kept.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert set(Path("cache").iterdir()) == entries
    # One that was damaged does not stand for it.
    kept.write_bytes(TEXT.upper())
    typed(monkeypatch, TEXT)
    say(*tiny("-", out="third"))
    assert kept.read_bytes() == TEXT


def test_standard_input_is_not_called_by_its_hash(say, fail, monkeypatch, text):
    typed(monkeypatch, TEXT)
    assert b") on standard input, " in say(*tiny("-", out="run")).err
    assert re.search(rb"\ndata +standard input\n", say("info", "--model", "run").out)
    typed(monkeypatch, TEXT)
    assert b") on standard input + text.txt, " in say(*tiny("-", "--data", text, out="other")).err
    typed(monkeypatch, TEXT[:9])
    assert fail(*tiny("-", out="short")).startswith("standard input has 11 tokens, too few")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_pipe_is_kept_like_standard_input(say):
    read, write = os.pipe()
    os.write(write, TEXT)
    os.close(write)
    say(*tiny(f"/dev/fd/{read}", out="run", tokenizer="bpe", vocab_size=280))
    os.close(read)
    say("train", "--resume", "run", "--steps", 3, "--cache", "cache")


def test_standard_input_that_cannot_be_taken(refuse, text, monkeypatch):
    typed(monkeypatch, b"")
    assert "standard input is empty" in refuse(*tiny("-"))
    assert "--validation is -" in refuse(*tiny("text.txt", validation="-"))
    assert "--validation is -" in refuse(*tiny("-", validation="-"))
    monkeypatch.setattr(sys, "stdin", None)
    assert "standard input is closed" in refuse(*tiny("-"))


def test_standard_input_that_is_interrupted_leaves_nothing(say, monkeypatch):
    class Interrupted:
        def read(self, size):
            raise KeyboardInterrupt

    typed(monkeypatch, b"")
    monkeypatch.setattr(sys, "stdin", type("Stream", (), {"buffer": Interrupted()}))
    say(*tiny("-"), status=130)
    assert not list(Path("cache/standard-input").iterdir())


# --- Bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("text.txt", TEXT + b"\xff", "text.txt: byte 0xff at offset 1340 is not UTF-8"),
        ("text.txt", b"", "text.txt holds no text"),
        ("text.txt", b"few", "text.txt has "),
        ("text.txt.gz", gzip.compress(TEXT, mtime=0)[:-9], "text.txt.gz ends too early"),
        ("a.jsonl", b'{"text": "one"}\n{"story": "two"}\n', "a.jsonl, line 2: no field 'text'"),
        ("a.jsonl", b'{"text": "one"}\nnone', "a.jsonl, line 2: not JSON"),
        ("a.bin", b"\1\2\3", "a.bin has 3 bytes"),
    ],
)
def test_bad_texts_are_refused(refuse, name, content, reason, tokenizer):
    assert reason in refuse(*tiny(put(name, content), tokenizer=tokenizer))


def test_places_without_text_are_refused(refuse, text):
    Path("empty").mkdir()
    for place in ("empty", "nowhere", "none*.txt"):
        assert place in refuse(*tiny(place))
        assert place in refuse(*tiny("text.txt", validation=place))


def test_text_that_changes_while_it_is_read_is_refused(refuse, text, monkeypatch):
    monkeypatch.setattr(sources, "BLOCK_BYTES", 100)
    monkeypatch.setattr(corpus, "_TOGETHER", 100)
    encode = corpus.ByteTokenizer.encode_batch

    def change(self, texts):
        Path("text.txt").write_bytes(TEXT + b"more")
        return encode(self, texts)

    monkeypatch.setattr(corpus.ByteTokenizer, "encode_batch", change)
    assert "text.txt has changed while it was read" in refuse(*tiny(text))
    assert not list(Path("cache").iterdir())


@pytest.mark.parametrize("data", ["text.txt", "-"])
@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_full_cache_is_named(refuse, text, monkeypatch, data, tokenizer, number):
    def sync(handle):
        raise OSError(number, os.strerror(number))

    typed(monkeypatch, TEXT)
    monkeypatch.setattr(os, "fsync", sync)
    message = refuse(*tiny(data, tokenizer=tokenizer))
    assert message.startswith(f"cache: {os.strerror(number)}")
    assert "--cache names another" in message


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
from legacy1bit.main import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.memory
def test_cache_that_ends_in_the_middle_is_named(text):
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, *tiny(text)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        check=False,
    )
    (line,) = done.stderr.decode().strip().splitlines()
    assert done.returncode == 2
    assert line.startswith("legacy1bit: error: cache: File too large")
    assert "--cache names another" in line
    assert not list(Path("cache").iterdir())
    assert not Path("runs").exists()


@pytest.mark.parametrize("cache", ["text.txt", "text.txt/below", "/proc/nowhere"])
@pytest.mark.parametrize("data", ["other.txt", "-"])
@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_cache_that_cannot_be_written_is_named(refuse, text, monkeypatch, cache, data, tokenizer):
    typed(monkeypatch, TEXT)
    put("other.txt", TEXT)
    message = refuse(*tiny(data, cache=cache, tokenizer=tokenizer))
    assert message.startswith(f"{cache}: ")
    assert "--cache names another" in message
    assert Path("text.txt").read_bytes() == TEXT


def test_text_that_cannot_be_read_is_not_blamed_on_the_cache(refuse, text, monkeypatch):
    def deny(path, *arguments):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(sources, "open", deny, raising=False)
    message = refuse(*tiny(text))
    assert message.endswith("text.txt: Permission denied")


def test_cache_that_can_only_be_read_is_used(say, text, monkeypatch):
    arguments = {"tokenizer": "bpe", "vocab_size": 280}
    say(*tiny(text, out="one", **arguments))

    def refuse(*_, **__):
        raise AssertionError("it writes to the cache")

    monkeypatch.setattr(corpus, "ShardWriter", refuse)
    monkeypatch.setattr(corpus, "train_bpe", refuse)
    say(*tiny(text, out="two", **arguments))
    assert_same_run("one", "two")


# --- Going on -------------------------------------------------------------------------------------


def assert_same_run(one, two):
    records = [read_metrics(f"{name}/metrics.jsonl")[-1] for name in (one, two)]
    # Others are means since the last record, and a run that is stopped has one more.
    for key in ("step", "val_loss", "perplexity", "val_bytes", "learning_rate"):
        assert records[0][key] == records[1][key]
    assert_same_files(Path(one), Path(two))


@pytest.mark.parametrize("order", ["windows", "epochs", "packed"])
def test_resume_without_the_cache_goes_on_to_the_same_bits(say, tmp_path, monkeypatch, order):
    options = {"tokenizer": "bpe", "vocab_size": 280, "order": order, "sequence_length": 16}
    data = make_lines(tmp_path)
    say(*tiny(data, out="whole", **options, steps=6))
    take = Trainer.train_step

    def stop(self):
        if self.step == 2:
            signal.raise_signal(signal.SIGINT)
        return take(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", stop)
        say(*tiny(data, out="parts", **options, steps=6), status=130)
    shutil.rmtree("cache")
    say("train", "--resume", "parts", "--cache", "other")
    assert_same_run("parts", "whole")
    # Its tokenizer is its own.
    assert [path for path in Path("other").iterdir() if "tokenizer" in path.name] == []


def test_a_large_validation_set_is_measured_in_part(say, text):
    put("valid.txt", TEXT * 9)
    for count in (0, 100, 10**9):
        report = say(
            *tiny(text, out=f"run{count}", validation="valid.txt", validation_tokens=count)
        )
        told = re.search(rb"measured on +([\d,]+) of ([\d,]+) tokens", report.out)
        if count != 100:
            assert told is None
        else:
            measured, present = (int(number.replace(b",", b"")) for number in told.groups())
            assert present == len(TEXT) * 9 + 2
            assert 100 <= measured <= 200
        loss = re.search(rb"validation loss.*", report.out)[0]
        assert loss in say("evaluate", "--model", f"run{count}").out


def test_processes_may_make_the_same_tokenizer(text, tmp_path):
    source, data = sources.open_source(text), DataConfig(tokenizer="bpe", vocabulary=280)
    for turn in range(8):
        cache = tmp_path / str(turn)
        with ThreadPoolExecutor(6) as pool:
            made = list(
                pool.map(lambda cache: corpus.tokenizer_for(source, data, cache), [cache] * 6)
            )
        assert len({tokenizer.sha256 for tokenizer in made}) == 1


@pytest.mark.parametrize("kind", ["bpe", "chars"])
def test_tokenizer_for_refuses_a_text_that_changes_meanwhile(text, tmp_path, monkeypatch, kind):
    """Before its file is opened, too: the vocabulary would be kept as the earlier text's."""
    source, read = sources.open_source(text), sources.Source.pieces

    def pieces(source):
        Path(text).write_bytes(b"other " * 99)
        return read(source)

    monkeypatch.setattr(sources.Source, "pieces", pieces)
    with pytest.raises(ValueError, match="has changed while it was read"):
        corpus.tokenizer_for(source, DataConfig(tokenizer=kind), tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_train_takes_json_lines_by_their_content(say, monkeypatch):
    """The same documents, and the same split, from a file and from a pipe, packed or not."""
    lines = "".join(json.dumps({"text": f"{i} {STORY}"}) + "\n" for i in range(40)).encode()
    put("named.jsonl", lines)
    put("named.json", lines)
    put("packed.json.xz", lzma.compress(lines))
    hashes = []
    for data in ("named.jsonl", "named.json", "packed.json.xz", lines, bz2.compress(lines)):
        if isinstance(data, bytes):
            typed(monkeypatch, data)
            data = "-"
        say(*tiny(data, out=f"run{len(hashes)}"))
        hashes.append(Run(Path(f"run{len(hashes)}")).settings().source["sha256"])
    assert len(set(hashes)) == 1


def test_streams_may_have_json_lines(say, fail, monkeypatch):
    lines = "".join(
        json.dumps({"text": part, "other": "x" * 9}) + "\n" for part in TEXT.decode().split(".")
    )
    put("lines.jsonl", lines.encode())
    expected = json.loads(say("data", "inspect", "lines.jsonl", "--json").out)
    for options in ((), ("--field", "other")):
        typed(monkeypatch, lines.encode())
        found = json.loads(say("data", "inspect", "-", "--json", *options).out)
        assert found["documents"] == expected["documents"]
        assert (found["bytes"] == expected["bytes"]) == (not options)
    typed(monkeypatch, TEXT)
    assert "has no fields, and no 'other'" in fail("data", "inspect", "-", "--field", "other")
    os.mkfifo("tokens.bin")
    assert "tokens.bin is a stream, expected a file" in fail("train", "--data", "tokens.bin")
    for device in ("/dev/zero", "/dev/urandom"):
        told = f"{device} is a device, expected a file or a pipe"
        assert told in fail("train", "--data", device)
        assert told in fail("data", "inspect", device)


def test_evaluate_reads_a_folder_of_tokens(say, fail, text):
    options = ("--tokenizer", "bpe", "--vocab-size", 280)
    say(*tiny(text, out="run", tokenizer="bpe", vocab_size=280))
    say("data", "tokenize", text, *options, "--out", "tokens")
    say("data", "tokenize", text, "--out", "bytes")
    report = say("evaluate", "--model", "run", "--data", "tokens").out
    # Of one document, whose end is to be guessed here.
    alone = say("evaluate", "--model", "run", "--data", text).out
    one, other = (
        float(re.search(rb"bits per byte +([\d.]+)", told)[1]) for told in (report, alone)
    )
    assert one == pytest.approx(other, rel=0.02)
    assert "tokens of another tokenizer" in fail("evaluate", "--model", "run", "--data", "bytes")
    assert "--data is empty" in fail("evaluate", "--model", "run", "--data", "")


@pytest.mark.parametrize("cache", ["cache", "other"])
def test_resume_refuses_a_text_that_has_changed(say, fail, text, cache):
    put("valid.txt", TEXT[:200])
    say(*tiny(text, out="alone", tokenizer="bpe", vocab_size=280))
    say(*tiny(text, out="both", validation="valid.txt"))
    before = {path: path.read_bytes() for path in Path("both").iterdir() if path.is_file()}
    put("valid.txt", TEXT[:199])
    assert "has changed, or is" in fail("train", "--resume", "both", "--steps", 3, "--cache", cache)
    put("valid.txt", TEXT[:200])
    for changed in (TEXT[:-1], TEXT.upper()):
        put(text, changed)
        for run in ("alone", "both"):
            message = fail("train", "--resume", run, "--steps", 3, "--cache", cache)
            assert "text.txt has changed, or is another text" in message
    assert before == {path: path.read_bytes() for path in before}
    put(text, TEXT)
    say("train", "--resume", "both", "--steps", 3, "--cache", cache)


@pytest.mark.parametrize("value", [5, True, [], ""])
def test_resume_refuses_a_damaged_validation(say, fail, text, value):
    put("valid.txt", TEXT[:200])
    say(*tiny(text, out="run", validation="valid.txt"))
    source = Run(Path("run")).settings().source
    settings = json.loads(Path("run/training.json").read_bytes())
    assert source in settings.values()
    for found in settings.values():
        if found == source:
            found["validation"] = value
    Path("run/training.json").write_text(json.dumps(settings))
    fail("train", "--resume", "run", "--steps", 3)


# --- Where texts lie ------------------------------------------------------------------------------


def test_resume_takes_a_text_that_has_moved(say, fail, text):
    valid = put("valid.txt", TEXT[:200])
    say(*tiny(text, out="run", validation=valid))
    say(*tiny(text, out="whole", validation=valid, steps=4))
    for name, place in ((text, "new/learned.txt"), (valid, "new/kept.txt")):
        Path(place).parent.mkdir(exist_ok=True)
        Path(name).rename(place)
    go_on = ("train", "--resume", "run", "--steps", 4, "--cache", "cache")
    places = ("--data", "new/learned.txt", "--validation", "new/kept.txt")
    message = fail(*go_on)
    assert "text.txt: No such file or directory" in message
    assert "--data or --validation says where the text has moved to" in message
    assert "valid.txt: No such file" in fail(*go_on, *places[:2])
    put("other.txt", TEXT.upper())
    before, settings = Path("run/training.json").read_bytes(), Run(Path("run")).settings()
    wrong = fail(*go_on, "--data", "other.txt", *places[2:])
    assert settings.source["sha256"] in wrong
    swapped = fail(*go_on, "--data", "new/kept.txt", "--validation", "new/learned.txt")
    for message in (wrong, swapped):
        assert re.search(
            "is another text: its SHA-256 .*is [0-9a-f]{64}, expected [0-9a-f]{64}", message
        )
    assert Path("run/training.json").read_bytes() == before
    say(*go_on, *places)
    # It is known from now on.
    source = Run(Path("run")).settings().source
    assert [source["path"], source["validation"]] == [
        os.path.abspath(place) for place in ("new/learned.txt", "new/kept.txt")
    ]
    assert source["name"] == "text.txt"
    say("train", "--resume", "run", "--steps", 5, "--cache", "cache")


def test_resume_refuses_a_place_of_what_a_run_has_not(say, fail, text):
    say(*tiny(text, out="run"))
    go_on = ("train", "--resume", "run", "--steps", 4, "--cache", "cache")
    assert "--validation cannot change" in fail(*go_on, "--validation", text)
    settings = json.loads(Path("run/training.json").read_bytes())
    del settings["source"]["sha256"]
    Path("run/training.json").write_text(json.dumps(settings))
    assert "--data cannot be checked" in fail(*go_on, "--data", text)


@pytest.mark.parametrize("data", ["texts/text.txt", "texts", "texts/*.txt"])
def test_run_that_has_moved_finds_the_text_that_moved_with_it(say, fail, monkeypatch, data):
    Path("old/runs").mkdir(parents=True)
    put("old/texts/text.txt", TEXT)
    put("old/texts/text.md", TEXT[:200])
    cache = os.path.abspath("cache")
    monkeypatch.chdir("old")
    say(*tiny(data, "--evaluate-every", "1", out="runs/mine", cache=cache))
    monkeypatch.chdir("..")
    measured = say("evaluate", "--model", "old/runs/mine", "--cache", cache).out
    Path("old").rename("new")
    for model in ("new/runs/mine", "new/runs/mine/best"):
        again = say("evaluate", "--model", model, "--cache", cache).out
        assert model.endswith("best") or again == measured
    say("train", "--config", "new/runs/mine", "--cache", cache, "--out", "again")
    say("train", "--resume", "new/runs/mine", "--steps", 3, "--cache", cache)
    assert Run(Path("new/runs/mine")).settings().source["path"] == os.path.abspath(f"new/{data}")
    words = shlex.split(train_command(Path("new/runs/mine")))
    assert words[words.index("--data") + 1] == os.path.abspath(f"new/{data}")


def test_run_that_is_trained_again_names_the_options_of_its_texts(say, fail, text):
    valid = put("valid.txt", TEXT[:200])
    say(*tiny(text, out="run", validation=valid))
    say(*tiny(text, out="alone"))
    again = ("train", "--cache", "cache", "--out", "again", "--config")
    alone = "(--data says where the text is)"
    both = "(--data says where the text is, and --validation its validation text)"
    Path(valid).rename("held_out.txt")
    assert f"valid.txt: No such file or directory {both}" in fail(*again, "run")
    put(valid, TEXT[:220])
    assert fail(*again, "run").endswith(both)
    put(text, TEXT.upper())
    message = fail(*again, "alone")
    assert "text.txt has changed" in message
    assert message.endswith(alone)
    Path(text).unlink()
    assert f"text.txt: No such file or directory {alone}" in fail(*again, "alone")
    put("learned.txt", TEXT)
    say(*again, "run", "--data", "learned.txt", "--validation", "held_out.txt")


def test_run_of_a_program_says_that_its_text_has_no_path(say, fail, text):
    """A Trainer takes any source that has a name."""
    config = ModelConfig(256, model_dim=8, num_blocks=1, num_heads=1, sequence_length=8)
    training = TrainingConfig(steps=2, batch_size=2, threads=1)
    data = corpus.text_corpus(TEXT, "mine", 8, 256)
    Path("run").mkdir()
    trainer = Trainer("run", config, training, data, {"name": "mine"})
    trainer.train(MetricsLogger(Path("run")))
    for command in (
        ("train", "--resume", "run", "--steps", 4),
        ("train", "--resume", "run", "--steps", 4, "--data", text),
        ("train", "--config", "run", "--out", "again"),
        ("evaluate", "--model", "run"),
        ("evaluate", "--model", "run", "--run-data", text),
    ):
        message = fail(*command)
        assert "was given by a program, as 'mine'" in message
        assert "evaluate --data PATH and train --config RUN --data PATH" in message
    say("evaluate", "--model", "run", "--data", text)
    say("train", "--config", "run", "--data", text, "--out", "again", "--cache", "cache")


def test_run_finds_the_text_beside_it(say, fail, tmp_path):
    put("deep/down/text.txt", TEXT)
    say(*tiny("deep/down/text.txt", out="runs/mine"))
    Path("there").mkdir()
    Path("runs/mine").rename("there/mine")
    Path("deep/down/text.txt").rename("there/text.txt")
    say("train", "--resume", "there/mine", "--steps", 3, "--cache", "cache")
    # What has its name and is another is not taken.
    put("there/text.txt", TEXT.upper())
    assert "or is another text" in fail("evaluate", "--model", "there/mine", "--cache", "cache")


def test_evaluate_learns_where_the_text_of_a_run_lies(say, fail, text):
    valid = put("valid.txt", TEXT[:200])
    say(*tiny(text, out="run", validation=valid))
    measure = ("evaluate", "--model", "run", "--cache", "cache")
    expected = say(*measure).out
    Path(text).rename("learned.txt")
    Path(valid).rename("kept.txt")
    assert "(--run-data or --run-validation says where the text has moved to)" in fail(*measure)
    places = ("--run-data", "learned.txt", "--run-validation", "kept.txt")
    assert say(*measure, *places).out == expected
    put("other.txt", TEXT.upper())
    assert "is another text" in fail(*measure, "--run-data", "other.txt", *places[2:])
    assert "exclude --data" in fail(*measure, *places, "--data", "other.txt")


def test_report_says_where_a_text_lies_now(say, text):
    say(*tiny(text, out="runs/mine"))
    command = train_command(Path("runs/mine"))
    assert f"--data {os.path.abspath(text)} " in command
    Path("runs/mine").rename("mine")
    Path("mine/text").mkdir()
    Path(text).rename("mine/text.txt")
    assert f"--data {os.path.abspath('mine/text.txt')} " in train_command(Path("mine"))


# --- Several texts --------------------------------------------------------------------------------


def test_train_takes_several_texts(say, fail):
    parts = (STORY * 10).encode(), (STORY * 10).upper().encode()
    for name, content in zip(("a.txt", "b.txt", "c.txt"), (*parts, TEXT[:200]), strict=True):
        put(name, content)
    put("both.jsonl", "\n".join(json.dumps({"text": part.decode()}) for part in parts).encode())
    options = tiny("a.txt", out="run")
    options[3:3] = ["b.txt"]
    say(*options)
    say(*tiny("both.jsonl", out="lines"))
    source, as_lines = (Run(Path(name)).settings().source for name in ("run", "lines"))
    assert source["path"] == [os.path.abspath(name) for name in ("a.txt", "b.txt")]
    assert source["name"] == "a.txt + b.txt"
    assert source["sha256"] == as_lines["sha256"]
    go_on = ("train", "--resume", "run", "--cache", "cache", "--steps")
    say(*go_on, 3)
    say("evaluate", "--model", "run", "--cache", "cache")
    words = shlex.split(train_command(Path("run")))
    assert words[words.index("--data") + 1 :][:2] == source["path"]
    # Twice named is as named together, in that order.
    say(*tiny("a.txt", "--data", "b.txt", "--validation", "a.txt", "c.txt", out="again"))
    again = Run(Path("again")).settings().source
    assert again["path"] == source["path"]
    assert again["validation"] == [os.path.abspath(name) for name in ("a.txt", "c.txt")]
    assert "is another text" in fail(*go_on, 4, "--data", "b.txt", "a.txt")
    assert "is another text" in fail(*go_on, 4, "--data", "a.txt")
    Path("b.txt").rename("moved.txt")
    assert "b.txt: No such file" in fail(*go_on, 4)
    say(*go_on, 4, "--data", "a.txt", "moved.txt")


def test_commands_take_several_texts(say, fail, text):
    put("b.txt", b"more of it")
    inspection = json.loads(say("data", "inspect", text, "b.txt", "--json").out)
    assert (inspection["files"], inspection["bytes"]) == (2, len(TEXT) + 10)
    say("data", "tokenize", text, "b.txt", "--out", "tokens")
    assert read_index(Path("tokens")).parts["text"].documents == 2
    say(*tiny(text, out="run"))
    alone, both = (
        say("evaluate", "--model", "run", "--cache", "cache", "--data", *paths).out
        for paths in ([text], [text, "b.txt"])
    )
    assert alone != both


def test_several_texts_that_cannot_be_taken(refuse, text):
    put("train.bin", np.arange(300, dtype="<u2").tobytes())
    put("val.bin", np.arange(300, dtype="<u2").tobytes())
    for more, reason in (
        (("train.bin",), "train.bin holds tokens"),
        (("none.txt",), "none.txt: No such file"),
        (("",), "--data is empty"),
        (("./text.txt",), "./text.txt is named twice, expected each text once"),
    ):
        assert reason in refuse(*tiny(text, "--data", *more))
    assert "holds tokens" in refuse(*tiny("train.bin", "--data", "val.bin"))
    assert "text.txt is named twice" in refuse("data", "inspect", text, text)
    assert "- is named twice" in refuse(*tiny("-", "--data", "-"))
    assert "holds tokens" in refuse(*tiny("train.bin", "--validation", "val.bin", "train.bin"))


# --- Texts that are mixed -------------------------------------------------------------------------


@pytest.fixture
def texts():
    put("a.txt", TEXT)
    put("b/c.txt", TEXT.upper())
    put("b/a.txt", TEXT.lower())


def mix(*more, **options):
    """A training on two texts, of which one has a weight."""
    return tiny("a.txt", "--data", "b/c.txt:0.3", *more, **options)


@pytest.mark.usefixtures("texts")
@pytest.mark.parametrize("order", ["windows", "epochs", "packed"])
def test_train_mixes_texts_and_goes_on_as_if_it_had_not_stopped(say, order):
    options = ("--order", order, "--evaluate-every", 3)
    say(*mix(*options, steps=7, warmup_steps=0, schedule="constant", out="one"))
    say(*mix(*options, steps=4, warmup_steps=0, schedule="constant", out="two"))
    say("train", "--resume", "two", "--steps", 7, "--cache", "cache")
    one, two = (newest_checkpoint_of(name) for name in ("one", "two"))
    assert one == two
    records = read_metrics("one/metrics.jsonl")
    for record in records:
        losses = record["val_losses"]
        assert list(losses) == ["a.txt", "c.txt"]
        mean = (losses["a.txt"] + 0.3 * losses["c.txt"]) / 1.3
        assert math.isclose(record["val_loss"], mean, rel_tol=1e-12)


def newest_checkpoint_of(name):
    run = Run(Path(name))
    checkpoint = read_checkpoint(run.checkpoint_file, run.settings().fixed())
    return checkpoint.step, checkpoint.position, checkpoint.weights.tobytes()


@pytest.mark.usefixtures("texts")
def test_run_of_a_mix_tells_its_texts(say, tmp_path):
    _, told = say(*mix(out="run"))
    assert b"on a.txt:1 + c.txt:0.3," in told
    assert b"epochs of a.txt" in told
    source = Run(Path("run")).settings().source
    assert source["name"] == "a.txt:1 + c.txt:0.3"
    assert [(text["name"], text["weight"]) for text in source["texts"]] == [
        ("a.txt", 1.0),
        ("c.txt", 0.3),
    ]
    assert source["texts"][1]["path"] == os.path.abspath("b/c.txt")
    assert len({text["sha256"] for text in source["texts"]} | {source["sha256"]}) == 3
    measured = say("evaluate", "--model", "run", "--cache", "cache").out.decode()
    losses = read_metrics("run/metrics.jsonl")[-1]["val_losses"]
    assert f"loss {losses['a.txt']:.4f}" in measured
    assert re.search(rf"loss {losses['c.txt']:.4f} +of c.txt, 23.1% of the training", measured)
    # The command of its report trains it again, and so does --config.
    words = shlex.split(train_command(Path("run")))[1:]
    say(*words, "--out", "again", "--cache", "cache")
    say("train", "--config", "run", "--out", "other", "--cache", "cache")
    for folder in ("again", "other"):
        assert_same_files(Path("run"), Path(folder))


@pytest.mark.usefixtures("texts")
def test_texts_of_a_mix_are_found_where_they_are_now(say, fail):
    say(*mix(out="runs/mine"))
    go_on = ("train", "--resume", "there/mine", "--cache", "cache", "--steps")
    Path("there").mkdir()
    Path("runs/mine").rename("there/mine")
    Path("a.txt").rename("there/a.txt")
    Path("b/c.txt").rename("there/c.txt")
    say(*go_on, 3)
    Path("there/a.txt").rename("x.txt")
    assert "a.txt: No such file" in fail(*go_on, 4)
    places = ("--data", "x.txt", "--data", "there/c.txt")
    say(*go_on, 4, *places)
    assert "once for each text of there/mine" in fail(*go_on, 5, "--data", "x.txt")
    assert "is another text" in fail(*go_on, 5, "--data", "there/c.txt", "--data", "x.txt")
    assert "has the weight 0.5, expected 0.3" in fail(*go_on, 5, *places[:-1], "there/c.txt:0.5")
    measure = ("evaluate", "--model", "there/mine", "--cache", "cache")
    assert "--run-validation names a text that there/mine does not have" in fail(
        *measure, "--run-validation", "x.txt"
    )
    say(*measure, "--run-data", "x.txt", "--run-data", "there/c.txt:0.3")
    Path("there/c.txt").write_bytes(TEXT.swapcase())
    assert "c.txt has changed, or is another text" in fail(*go_on, 5, *places)


@pytest.mark.usefixtures("texts")
def test_texts_with_one_name_are_told_apart(say):
    say(*tiny("a.txt:2", "--data", "b/a.txt", out="run"))
    assert list(read_metrics("run/metrics.jsonl")[0]["val_losses"]) == ["a.txt", "a.txt (2)"]


@pytest.mark.usefixtures("texts")
def test_a_text_of_a_mix_may_have_several_files(say):
    say(*tiny("b/c.txt", "--data", "a.txt", "b/a.txt:2", out="run"))
    texts = Run(Path("run")).settings().source["texts"]
    assert [text["name"] for text in texts] == ["c.txt", "a.txt + a.txt"]
    assert "b/a.txt:2.0" in train_command(Path("run"))


@pytest.mark.usefixtures("texts")
def test_a_file_may_have_the_name_of_a_weight(say):
    put("a.txt:0.5", TEXT)
    say(*tiny("a.txt:0.5", "--data", "b/c.txt", out="one"))
    assert Run(Path("one")).settings().source["name"] == "a.txt:0.5 + c.txt"
    say(*tiny("a.txt:0.5:2", "--data", "b/c.txt", out="two"))
    assert Run(Path("two")).settings().source["name"] == "a.txt:0.5:2 + c.txt:1"


@pytest.mark.usefixtures("texts")
def test_texts_of_a_mix_have_the_tokenizer_of_the_first(say):
    say("data", "tokenize", "b/c.txt", "--tokenizer", "bpe", "--vocab-size", 280, "--out", "tokens")
    say(*tiny("tokens:1", "--data", "a.txt", out="run"))
    assert (Path("run/tokenizer.json")).read_bytes() == Path("tokens/tokenizer.json").read_bytes()
    say(*mix(out="bpe", tokenizer="bpe", vocab_size=280))
    say(*tiny("a.txt", out="alone", tokenizer="bpe", vocab_size=280))
    one, other = (Path(name, "tokenizer.json").read_bytes() for name in ("bpe", "alone"))
    assert one == other
    # Tokens of another program have no tokenizer: only their number has to be one.
    put("x.bin", np.arange(300, dtype="<u2").tobytes())
    put("y.bin", np.arange(100, 310, dtype="<u2").tobytes())
    say(*tiny("x.bin:1", "--data", "y.bin", out="numbers", vocab_size=310))


@pytest.mark.usefixtures("texts")
def test_tune_mixes_texts(say):
    pytest.importorskip("optuna", reason="optuna is not installed")
    small = tiny("a.txt", "--data", "b/c.txt:0.3", steps=3)[1:]
    out = say("tune", *small, "--trials", 1, "--out", "study").out.decode()
    (line,) = (line for line in out.splitlines() if "best.toml --data" in line)
    words = shlex.split(line)[4:]
    assert words == ["--data", f"{os.path.abspath('a.txt')}:1.0", "--data",
                     f"{os.path.abspath('b/c.txt')}:0.3"]  # fmt: skip
    say("tune", "--resume", "study", "--trials", 2, "--threads", 1, "--cache", "cache")


@pytest.mark.usefixtures("texts")
def test_mixes_that_cannot_be_taken(refuse):
    put("x.bin", np.arange(300, dtype="<u2").tobytes())
    put("y.bin", np.arange(310, dtype="<u2").tobytes())
    for more, reason in (
        (("--data", "b/c.txt:0"), "the weight of a text is 0.0, expected a number above 0"),
        (("--data", "b/c.txt:-1"), "the weight of a text is -1.0, expected a number above 0"),
        (("--data", "b/c.txt:1e10"), "expected a number above 0, at most 1,000,000,000"),
        (("--data", "b/c.txt:1", "--data", "none:2"), "none: No such file"),
        (("--data", "b/c.txt:x"), "b/c.txt:x: No such file"),
        (("--data", "b/c.txt:1", "--data", "a.txt"), "a.txt is named twice"),
        (("--data", "b/c.txt:1", "b/a.txt"), "b/c.txt:1 is one of several files of a text"),
        (("--data", "b/c.txt:1", "--validation", "b/a.txt"), "--validation goes with one text"),
        (("--data", "b/c.txt:1", "--order", "buckets"), "--order is buckets, whose rows differ"),
    ):
        assert reason in refuse(*tiny("a.txt", *more))
    assert "a.txt is the only text, and has a weight" in refuse(*tiny("a.txt:2"))
    assert "y.bin has 310 kinds of tokens, expected 300, those of x.bin: --vocab-size" in refuse(
        *tiny("x.bin:1", "--data", "y.bin")
    )


# --- Conversations --------------------------------------------------------------------------------


@pytest.fixture
def chats():
    lines = []
    for number in range(60):
        turns = [("user", f"say {number}"), ("assistant", f"{number} it is"),
                 ("user", "more"), ("assistant", "no")][: 2 + 2 * (number % 2)]  # fmt: skip
        messages = [{"role": role, "content": content} for role, content in turns]
        lines.append(json.dumps({"messages": messages}))
    return put("chats.jsonl", "\n".join(lines).encode())


def measured_tokens(name):
    return read_metrics(f"{name}/metrics.jsonl")[-1]["val_tokens"]


def test_train_learns_answers_and_goes_on_as_if_it_had_not_stopped(say, chats):
    options = {"schedule": "constant", "warmup_steps": 0, "sequence_length": 32}
    say(*tiny(chats, steps=9, out="one", **options))
    say(*tiny(chats, steps=4, out="two", **options))
    say("train", "--resume", "two", "--steps", 9, "--cache", "cache")
    assert newest_checkpoint_of("one") == newest_checkpoint_of("two")
    assert_same_files(Path("one"), Path("two"))
    # Answers of the conversations that validate, and what ends each.
    assert measured_tokens("one") < 60 * len("59 it is\nUser:no\nUser:") // 4
    assert Path("one/chat_template.jinja").read_text() == PLAIN
    assert Path("one/best/chat_template.jinja").read_text() == PLAIN
    out = say("evaluate", "--model", "one", "--cache", "cache").out
    assert b"measured on" not in out
    whole = say("evaluate", "--model", "one", "--data", chats, "--cache", "cache").out
    assert out != whole
    # The command of its report, and --config, train it again.
    say(*shlex.split(train_command(Path("one")))[1:], "--out", "again", "--cache", "cache")
    assert_same_files(Path("one"), Path("again"))


def test_chat_asks_as_a_model_was_trained(say, chats, text, monkeypatch):
    say(*tiny(chats, sequence_length=64, out="run"))
    typed(monkeypatch, b"say 3\n")
    plain = say("chat", "--model", "run", "--seed", 1, "--max-tokens", 9, "--template", "plain").out
    typed(monkeypatch, b"say 3\n")
    assert say("chat", "--model", "run", "--seed", 1, "--max-tokens", 9).out == plain
    # It stays a model of conversations on other texts.
    say("train", "--from", "run", "--data", text, "--steps", 1, "--out", "more", "--cache", "cache")
    assert Path("more/chat_template.jinja").read_text() == PLAIN
    # Another template is the run's own.
    pytest.importorskip("jinja2", reason="jinja2 is not installed")
    own = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}" + (
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    put("run/chat_template.jinja", own.encode())
    say("train", "--from", "run", "--data", chats, "--steps", 1, "--out", "own", "--cache", "cache")
    assert Path("own/chat_template.jinja").read_text() == own
    source, other = (Run(Path(name)).settings().source for name in ("run", "own"))
    assert source["sha256"] != other["sha256"]


def test_conversations_are_mixed_with_texts(say, chats, text):
    say(*tiny(text, "--data", f"{chats}:2", sequence_length=32, steps=3, out="run"))
    losses = read_metrics("run/metrics.jsonl")[-1]["val_losses"]
    assert list(losses) == ["text.txt", "chats.jsonl"]
    assert Path("run/chat_template.jinja").exists()
    say("train", "--resume", "run", "--steps", 4, "--cache", "cache")
    assert b"of chats.jsonl, 66.7%" in say("evaluate", "--model", "run", "--cache", "cache").out


def test_data_looks_at_conversations_and_does_not_tokenize_them(say, fail, chats):
    inspection = json.loads(say("data", "inspect", chats, "--json").out)
    assert inspection["documents"] == 60
    say("data", "train-tokenizer", chats, "--tokenizer", "chars", "--out", "letters")
    refused = fail("data", "tokenize", chats, "--out", "tokens")
    assert "chats.jsonl holds conversations, whose tokens depend on the model's chat" in refused


def test_damaged_conversations_are_one_line(refuse, chats):
    with open(chats, "a") as file:
        file.write('\n{"messages": [{"role": "robot", "content": "x"}]}\n')
    refused = refuse(*tiny(chats))
    assert "chats.jsonl, line 61, message 1: the role is 'robot', expected one of" in refused
    make_chats("b.jsonl")
    short = refuse(*tiny("b.jsonl"))
    assert "b.jsonl: no answer begins within the first 8 tokens of its conversation" in short
    assert "expected a longer --sequence-length" in short
    assert "--order is epochs, which cuts" in refuse(*tiny("b.jsonl", order="epochs"))


def make_chats(name):
    lines = [json.dumps({"prompt": f"{i}?", "completion": f"{i}!"}) for i in range(60)]
    return put(name, "\n".join(lines).encode())


def test_streams_may_have_conversations(say, monkeypatch):
    content = Path(make_chats("b.jsonl")).read_bytes()
    say(*tiny("b.jsonl", sequence_length=32, out="run"))
    typed(monkeypatch, content)
    say(*tiny("-", sequence_length=32, out="piped"))
    one, other = (Run(Path(name)).settings().source["sha256"] for name in ("run", "piped"))
    assert one == other
    say("train", "--resume", "piped", "--steps", 3, "--cache", "cache")


@with_golden_models
def test_published_models_learn_conversations(say, chats):
    """One with a template of its own, and one without."""
    pytest.importorskip("jinja2", reason="jinja2 is not installed")
    with_template = [path for path, about in golden() if (about.get("chat") or {}).get("template")]
    model = next(path for path in with_template if path.suffix == ".gguf")
    options = ("--steps", 2, "--threads", 1, "--batch-size", 2, "--sequence-length", 48)
    say("train", "--from", model, "--data", chats, *options, "--out", "run", "--cache", "cache")
    assert Path("run/chat_template.jinja").read_text() != PLAIN
    say("train", "--resume", "run", "--steps", 3, "--cache", "cache")
    say("evaluate", "--model", "run", "--cache", "cache")
    copy = Path("bare")
    shutil.copytree(next(path for path in with_template if path.is_dir()), copy)
    (copy / "chat_template.jinja").unlink(missing_ok=True)
    about = json.loads((copy / "tokenizer_config.json").read_text())
    about.pop("chat_template", None)
    (copy / "tokenizer_config.json").write_text(json.dumps(about))
    say("train", "--from", copy, "--data", chats, *options, "--out", "own", "--cache", "cache")
    assert Path("own/chat_template.jinja").read_text() == PLAIN
    say("train", "--resume", "own", "--steps", 3, "--cache", "cache")
