"""``data``: what is counted, the tokens and tokenizers that are written, what is refused."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from test_model import assert_same_model

from legacy1bit.commands.data import inspect
from legacy1bit.hyperparams import DataConfig
from legacy1bit.model import load_model
from legacy1bit.shards import open_store, read_index
from legacy1bit.sources import open_source
from legacy1bit.tokenizer import ByteTokenizer, load_tokenizer

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
    found = inspect(open_source(lines), ByteTokenizer())
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
        (("tokenize", text, "--out", "full"), "full is no empty folder"),
        (("tokenize", "wrong.txt", "--out", "new"), "offset 3"),
        (("train-tokenizer", text, "--out", "new"), "bytes need no training"),
        (("train-tokenizer", text, "--out", "full", "--tokenizer=bpe"), "no empty folder"),
        (("inspect", text, "--tokenizer=bpe", "--vocab-size=258"), "258 tokens, expected 259"),
        (("inspect", text, "--encoding", "klingon"), "encoding is 'klingon'"),
        (("tokenize", text), "--out"),
        (("shred", text), "invalid choice: 'shred'"),
        ((), "ACTION"),
    ):
        assert reason in fail("data", *arguments)
    assert not Path("new").exists()


def test_train_says_what_is_wrong_with_tokenizers(fail, text):
    for more, reason in (
        (("--tokenizer-from", "nowhere"), "nowhere/tokenizer.json: No such file"),
        (("--tokenizer-from", "x", "--tokenizer=bpe"), "--tokenizer-from excludes"),
        (("--vocab-size", "300"), "vocabulary is 300, expected 256 for bytes"),
        (("--tokenizer=bpe", "--vocab-size=100"), "vocabulary is 100, expected 256"),
        (("--order=packed", "--case-noise=0.1"), "case_noise, space_noise and subword_splitting"),
    ):
        assert reason in fail("train", "--data", text, *TINY, *more)
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    "option", ["--tokenizer=bpe", "--order=packed", "--apart", "--split=tail", "--separator=x"]
)
def test_the_stories_have_no_settings_of_texts(fail, option):
    message = fail("train", "--stories", 50, *TINY, option)
    assert f"{option.partition('=')[0]} goes with --data" in message
    assert not Path("runs").exists()


def test_settings_of_data_start_as_they_always_were():
    assert DataConfig() == DataConfig(tokenizer="bytes", order="windows", apart=False)
