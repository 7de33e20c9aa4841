"""``data``: what is counted, the tokens and tokenizers that are written, what is refused."""

import gzip
import io
import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest

from helpers.models import assert_same_model
from legacy1bit.commands import data
from legacy1bit.commands.data import inspect
from legacy1bit.data.corpus import tokenize_source
from legacy1bit.data.shards import open_store, read_index
from legacy1bit.data.sources import open_source
from legacy1bit.data.tokenizer import ByteTokenizer
from legacy1bit.data.tokenizer_files import load_tokenizer
from legacy1bit.hyperparams import DataConfig
from legacy1bit.main import main
from legacy1bit.model import load_model

DOCUMENTS = ["", "a", "größer\nals das", "a", "x" * 700, "a", "größer\nals das"]
TINY = ("--model-dim", "8", "--blocks", "1", "--heads", "2", "--sequence-length", "16",
        "--batch-size", "2", "--steps", "3")  # fmt: skip


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def lines():
    """A file of JSON lines."""
    Path("lines.jsonl").write_text("".join(json.dumps({"text": one}) + "\n" for one in DOCUMENTS))
    return "lines.jsonl"


@pytest.fixture
def text():
    """A text file of some size."""
    words = np.random.default_rng(0).integers(0, 300, 6000)
    Path("text.txt").write_text(" ".join(f"word{word}" for word in words.tolist()))
    return "text.txt"


def test_inspect_counts_what_is_there(lines):
    found = inspect(open_source(lines), ByteTokenizer(), Path("cache"))
    texts = [one.encode() for one in DOCUMENTS]
    assert found.files == 1
    assert found.file_bytes == Path(lines).stat().st_size
    assert found.documents == len(texts)
    assert found.duplicates == 3
    assert found.bytes == found.tokens == sum(map(len, texts))
    assert found.bytes_per_token == 1.0
    assert found.characters == sum(map(len, DOCUMENTS))
    assert found.lines == 2
    assert found.lengths == {"shortest": 0, "median": 1, "mean": 105, "longest": 700}
    # "" is below 1, "a" below 2, 16 bytes below 32, 700 below 1,024.
    assert [pair for pair in found.histogram if pair[1]] == [(1, 1), (2, 3), (32, 2), (1024, 1)]
    assert found.most_frequent[0] == ("x", 700)
    assert sum(count for _, count in found.most_frequent) <= found.tokens


def test_inspect_prints_what_it_found(say, lines):
    found = json.loads(say("data", "inspect", lines, "--json").out)
    assert found["documents"] == len(DOCUMENTS)
    assert found["most_frequent"][0] == ["x", 700]
    output = say("data", "inspect", lines).out.decode()
    assert f"{'documents':<18}7, 3 of them copies" in output
    assert f"{'longest':<18}700 bytes" in output
    assert '"x"' in output


def test_inspect_counts_tokens_of_bpe(say, text):
    found = json.loads(
        say("data", "inspect", text, "--tokenizer", "bpe", "--vocab-size", "400", "--json").out
    )
    assert found["bytes"] == Path(text).stat().st_size
    assert found["bytes_per_token"] == pytest.approx(found["bytes"] / found["tokens"])
    assert found["bytes_per_token"] > 2


@pytest.mark.parametrize("tokenizer", ["bytes", "chars", "bpe"])
def test_tokens_in_a_folder_are_what_train_makes_of_the_text(say, text, tokenizer):
    output = say("data", "tokenize", text, "--tokenizer", tokenizer, "--out", "tokens").out
    index = read_index(Path("tokens"))
    store = open_store(Path("tokens"), index, "text")
    assert f"{store.size:,} tokens of 1 documents".encode() in output
    found = load_tokenizer("tokens")
    assert found.decode(store.read(1, store.size - 1)) == Path(text).read_bytes()
    say("train", "--data", "tokens", *TINY, "--out", "one")
    say("train", "--data", text, "--tokenizer", tokenizer, *TINY, "--out", "other")
    assert_same_model(load_model("one"), load_model("other"))


def test_a_tokenizer_of_its_own_is_taken(say, text):
    say("data", "train-tokenizer", text, "--tokenizer=bpe", "--vocab-size=300", "--out=words")
    assert load_tokenizer("words").vocab_size == 300
    say("train", "--data", text, "--tokenizer-from", "words", *TINY, "--out", "run")
    assert Path("run/tokenizer.json").read_bytes() == Path("words/tokenizer.json").read_bytes()
    assert load_model("run").config.vocab_size == 300


def test_tokenizing_that_is_ended_leaves_nothing(text, monkeypatch):
    monkeypatch.setattr(
        ByteTokenizer, "encode_batch", lambda *_: signal.raise_signal(signal.SIGTERM)
    )
    handler = signal.getsignal(signal.SIGTERM)
    before = {*Path().rglob("*")}
    for arguments in (("data", "tokenize", text), ("train", "--data", text)):
        with pytest.raises(SystemExit) as stop:
            main([*arguments, "--out", "new", "--cache", "cache"])
        assert stop.value.code == 128 + signal.SIGTERM
        left = [path for path in {*Path().rglob("*")} - before if path.name != "cache"]
        assert left == []
    assert signal.getsignal(signal.SIGTERM) == handler


def test_data_says_what_is_wrong(fail, text):
    Path("full").mkdir()
    Path("full/old").write_text("old")
    Path("empty").mkdir()
    Path("wrong.txt").write_bytes(b"abc\xffdef")
    Path("cut.txt.gz").write_bytes(gzip.compress(b"abc" * 5000)[:-9])
    for arguments, reason in (
        (("inspect", "nowhere"), "nowhere: No such file"),
        (("inspect", "empty"), "empty: No file with text in it"),
        (("inspect", "wrong.txt"), "byte 0xff at offset 3 is not UTF-8"),
        (("inspect", "cut.txt.gz"), "cut.txt.gz ends too early"),
        (("tokenize", text, "--out", "full"), "full is not an empty folder"),
        (("tokenize", "wrong.txt", "--out", "new"), "offset 3"),
        (("train-tokenizer", text, "--out", "new"), "bytes need no training"),
        (("train-tokenizer", text, "--out", "full", "--tokenizer=bpe"), "not an empty folder"),
        (("inspect", text, "--tokenizer=bpe", "--vocab-size=258"), "258 tokens, expected 259"),
        (("inspect", text, "--encoding", "klingon"), "encoding is 'klingon'"),
        (("tokenize", text), "--out"),
        (("inspect", text, "--cache", ""), "--cache: is empty, expected a path"),
        (("shred", text), "invalid choice: 'shred'"),
        ((), "ACTION"),
    ):
        assert reason in fail("data", *arguments)
    assert not Path("new").exists()


def test_tokenize_leaves_what_is_not_its_own(say, text):
    Path(".notes.tmp").write_text("mine")
    os.utime(".notes.tmp", (0, 0))
    say("data", "tokenize", text, "--out", "tokens")
    assert Path(".notes.tmp").read_text() == "mine"


def test_tokenize_takes_any_name_and_keeps_permissions(say, text):
    folder = Path("\u8a9e" * 85)
    folder.mkdir()
    folder.chmod(0o700)
    say("data", "tokenize", text, "--out", folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert read_index(folder).parts["text"].bytes == Path(text).stat().st_size
    say("data", "train-tokenizer", text, "--tokenizer", "bpe", "--out", "\u8a5e" * 85)
    assert Path("\u8a5e" * 85, "tokenizer.json").is_file()


def test_tokenize_does_not_replace_what_came_meanwhile(fail, text, monkeypatch):
    def appear(*arguments, **options):
        Path("tokens").mkdir()
        Path("tokens/precious").write_text("mine")
        return tokenize_source(*arguments, **options)

    monkeypatch.setattr(data, "tokenize_source", appear)
    assert "tokens has come to hold something else" in fail(
        "data", "tokenize", text, "--out", "tokens"
    )
    assert Path("tokens/precious").read_text() == "mine"
    assert [path.name for path in Path().iterdir() if path.name.endswith(".tmp")] == []


def test_a_folder_of_texts_may_have_an_index(say, text):
    Path("texts").mkdir()
    Path(text).rename("texts/a.txt")
    Path("texts/index.json").write_text("{}")
    say("train", "--data", "texts", *TINY, "--out", "run")


def test_evaluate_reads_what_train_does(say, lines, text):
    Path("more.jsonl").write_text(json.dumps({"words": Path(text).read_text()}) + "\n")
    Path("more.txt.gz").write_bytes(gzip.compress(Path(text).read_bytes()))
    say("train", "--data", text, "--tokenizer", "bpe", "--vocab-size", "300", *TINY, "--out", "run")
    reports = {
        say("evaluate", "--model", "run", "--data", path, *more).out
        for path, *more in ((text,), ("more.jsonl", "--field", "words"), ("more.txt.gz",))
    }
    assert len(reports) == 1


def test_words_that_are_none_do_not_hold_a_vocabulary_up(say):
    Path("long.txt").write_text("x" * 300_000 + "\n" * 2000)
    found = say("data", "inspect", "long.txt", "--tokenizer=bpe", "--vocab-size=300", "--json").out
    assert json.loads(found)["bytes"] == 302_000


def test_inspect_parts_a_text_of_windows_at_its_empty_lines(say):
    Path("text.txt").write_bytes(b"\r\n\r\n".join(b"line %d\r\nmore" % i for i in range(400)))
    for separator in (r"\n\n", r"\r\n\r\n", "\n\n"):
        output, errors = say("data", "inspect", "text.txt", "--json", "--separator", separator)
        assert json.loads(output)["documents"] == 400
        assert errors == b""


def test_commands_warn_of_a_separator_that_separates_nothing(say, text):
    commands = (
        ("train", "--data", text, *TINY, "--out", "run"),
        ("data", "inspect", text),
        ("data", "tokenize", text, "--out", "tokens"),
        ("data", "train-tokenizer", text, "--tokenizer", "bpe", "--out", "tokenizer"),
        ("evaluate", "--model", "run", "--data", text),
    )
    warning = b"warning: the separator '<|end|>' separates nothing in text.txt: 1 document\n"
    for command in commands:
        assert warning in say(*command, "--separator", "<|end|>").err
    # Tokens that are in the cache give it, too.
    say("train", "--data", text, *TINY, "--out", "more", "--separator", "<|end|>")
    assert warning in say(*commands[0][:-1], "third", "--separator", "<|end|>").err
    assert b"warning" not in say("data", "inspect", text, "--separator", "word1 ").err
    words = ("data", "train-tokenizer", text, "--tokenizer", "bpe", "--separator", "word1 ")
    assert b"warning" not in say(*words, "--out", "other").err
    assert warning in say("train", "--resume", "run", "--steps", 9).err


def test_standard_input_is_inspected_with_bpe(say, text, monkeypatch):
    with io.TextIOWrapper(open(text, "rb")) as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stdin", stream)
        found = json.loads(say("data", "inspect", "-", "--tokenizer", "bpe", "--json").out)
    assert found["bytes"] == Path(text).stat().st_size


def test_settings_that_would_be_ignored_are_refused(fail, say, text):
    say("data", "tokenize", text, "--out", "tokens")
    np.arange(2000, dtype=np.uint16).tofile("tokens.bin")
    np.array([20240801, 7, 2000, *[0] * 253, *[3_000_000_000] * 2000], np.uint32).tofile("high.bin")
    for name, option, reason in (
        ("tokens", "--tokenizer=chars", "--tokenizer goes with --data of text"),
        ("tokens", "--field=x", "not with a folder of tokens"),
        ("tokens.bin", "--split=documents", "not with a file of tokens"),
        ("tokens.bin", "--tokenizer=bpe", "not with a file of tokens"),
        ("tokens.bin", "--vocab-size=500", "has token 1999, expected 0 to 499"),
        ("high.bin", "--seed=1", "high.bin has token 3000000000, expected 0 to 1048575"),
        (text, "--subword-splitting=0.1", "--subword-splitting splits merged tokens"),
    ):
        assert reason in fail("train", "--data", name, *TINY, option)
    say("train", "--data", "tokens.bin", *TINY, "--vocab-size=2100", "--out", "run")
    assert load_model("run").config.vocab_size == 2100
    assert "holds tokens already" in fail("data", "inspect", "tokens.bin")


def test_tokens_of_another_program_are_never_taken_for_bytes(fail, say):
    """A vocabulary of characters has fewer of them than there are bytes."""
    (np.arange(3000, dtype=np.uint16) % 65).tofile("tokens.bin")
    trained = say("train", "--data", "tokens.bin", *TINY, "--out", "run").out
    measured = say("evaluate", "--model", "run").out
    for output in (trained, measured):
        assert b"nats per token" in output
        assert b"bits per byte" not in output
    # What would fail is not what to do next.
    assert b"generate" not in trained
    for model in ("run", "run/best"):
        assert "stand for is not known" in fail("generate", "--model", model, "--prompt", "a")
    say("train", "--resume", "run", "--steps", 4)


def test_train_says_what_is_wrong_with_tokenizers(fail, text):
    for more, reason in (
        (("--tokenizer-from", "nowhere"), "nowhere/tokenizer.json: No such file"),
        (("--tokenizer-from", "x", "--tokenizer=bpe"), "--tokenizer-from excludes"),
        (("--vocab-size", "300"), "--vocab-size is 300, expected 256 for bytes"),
        (("--tokenizer=bpe", "--vocab-size=100"), "--vocab-size is 100, expected 256"),
        (("--order=packed", "--case-noise=0.1"), "--case-noise, --space-noise and --subword"),
    ):
        assert reason in fail("train", "--data", text, *TINY, *more)
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    "option",
    ["--tokenizer=bpe", "--order=packed", "--document-mask", "--split=tail", "--separator=x"],
)
def test_the_stories_have_no_settings_of_texts(fail, option):
    message = fail("train", "--stories", 50, *TINY, option)
    assert f"{option.partition('=')[0]} goes with --data" in message
    assert not Path("runs").exists()


def test_settings_of_data_start_as_they_always_were():
    assert DataConfig() == DataConfig(tokenizer="bytes", order="windows", document_mask=False)
