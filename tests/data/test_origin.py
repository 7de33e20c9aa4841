"""Where a corpus comes from: what runs record, which kind it is, and what is tokenized once."""

import dataclasses
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

from legacy1bit.commands import data as data_command
from legacy1bit.data import corpus as corpora
from legacy1bit.data.corpus import open_corpus, open_text
from legacy1bit.data.origin import DataOrigin, Kind
from legacy1bit.data.shards import ShardWriter, open_store
from legacy1bit.data.tokenizer import ByteTokenizer
from legacy1bit.hyperparams import DataConfig

TEXT = "".join(f"{number} of some sentences. " for number in range(200))


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(TEXT)
    Path("tokens.bin").write_bytes(np.arange(99, dtype="<u2").tobytes())
    Path("lines.jsonl").write_text(
        "".join(json.dumps({"text": f"{i} {TEXT[:200]}"}) + "\n" for i in range(60))
    )


# As runs of earlier versions have recorded them.
RECORDS = {
    "stories": {"name": "stories", "stories": 20000, "seed": 7},
    "text": {"name": "a.txt", "path": "/a.txt", "validation": None, "sha256": "0" * 64},
    "validated": {"name": "a.txt", "path": "/a.txt", "validation": "/b.txt", "sha256": "0" * 64},
    "several": {
        "name": "a.txt + b.txt",
        "path": ["/a.txt", "/b.txt"],
        "validation": ["/c.txt", "/d.txt"],
        "sha256": "0" * 64,
    },
    "mixed": {
        "name": "a.txt:1 + b.txt + c.txt:0.3",
        "texts": [
            {
                "name": "a.txt",
                "path": "/a.txt",
                "validation": None,
                "sha256": "0" * 64,
                "weight": 1.0,
            },
            {
                "name": "b.txt + c.txt",
                "path": ["/b.txt", "/c.txt"],
                "validation": None,
                "sha256": "1" * 64,
                "weight": 0.3,
            },
        ],
        "sha256": "2" * 64,
    },
    "not read": {"name": "stories", "path": "stories", "validation": None},
    "a program's": {"name": "mine"},
}


@pytest.mark.parametrize("name", RECORDS)
def test_record_of_a_run_comes_back_byte_by_byte(name):
    record = RECORDS[name]
    assert json.dumps(DataOrigin.from_dict(record).to_dict()) == json.dumps(record)


def test_origin_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        DataOrigin("x").name = "y"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({}, "has name None, which is damaged"),
        ({"name": 3, "path": "x"}, "has name 3"),
        ({"name": "stories"}, "has stories None"),
        ({"name": "stories", "stories": True, "seed": 0}, "has stories True"),
        ({"name": "stories", "stories": 9, "seed": "0"}, "has seed '0'"),
        ({"name": "x", "path": 5}, "has path 5"),
        ({"name": "x", "path": []}, r"has path \[\]"),
        ({"name": "x", "texts": 5}, "has texts that are damaged"),
        ({"name": "x", "texts": [5]}, "has texts that are damaged"),
        ({"name": "x", "texts": [{"name": "y"}]}, "has texts that are damaged"),
        ({"name": "x", "texts": [{"name": "y", "path": 5, "weight": 1}]}, "has path 5"),
        (
            {"name": "x", "texts": [{"name": "y", "path": "y", "texts": []}]},
            "has texts that are damaged",
        ),
        ({"name": "x", "path": "x", "validation": ["y", None]}, r"has validation \['y', None\]"),
    ],
)
def test_damaged_record_is_refused(record, message):
    with pytest.raises(ValueError, match=message):
        DataOrigin.from_dict(record)


def test_kind_follows_from_the_paths():
    source = corpora.text_source(["text.txt"], DataConfig())
    corpora.tokenize_source(source, ByteTokenizer(), Path("tokens"))
    assert DataOrigin.of_stories(5, 1).kind is Kind.STORIES
    assert DataOrigin.of_texts(["stories"]).kind is Kind.TEXT
    assert DataOrigin.of_texts(["tokens"]).kind is Kind.TOKEN_FOLDER
    assert DataOrigin.of_texts(["tokens.bin"]).kind is Kind.TOKEN_FILE
    assert DataOrigin.of_texts(["tokens.bin", "more.bin"]).kind is Kind.TEXT
    assert DataOrigin("mine").kind is Kind.UNKNOWN


@pytest.mark.parametrize("weight", [None, 0, -1.0, True, "1", float("nan"), 1e10])
def test_texts_of_a_mix_have_weights(weight):
    texts = [{"name": name, "path": f"/{name}", "weight": 1.0} for name in "ab"]
    texts[1]["weight"] = weight
    record = {"name": "a + b", "texts": texts}
    with pytest.raises(ValueError, match=r"the weight of a text is .*, expected a number above 0"):
        DataOrigin.from_dict(record)
    texts[1]["weight"] = 0.5
    assert DataOrigin.from_dict(record).kind is Kind.MIX


@pytest.mark.parametrize("count", [0, -1, 10**15])
def test_stories_have_a_range(count):
    with pytest.raises(ValueError, match=f"stories is {count}, expected 1 to 10000000"):
        DataOrigin.of_stories(count, 1).check()


def test_name_is_that_of_few_texts():
    assert DataOrigin.of_texts(["/a/b.txt"]).name == "b.txt"
    assert DataOrigin.of_texts([f"/{letter}" for letter in "abcd"]).name == "a + b + c + ..."


@pytest.fixture
def tokenized(monkeypatch):
    """The names of texts that were tokenized."""
    names = []
    tokenize = corpora.tokenize_source

    def count(source, *arguments):
        names.append(source.name)
        return tokenize(source, *arguments)

    for module in (corpora, data_command):
        monkeypatch.setattr(module, "tokenize_source", count)
    return names


def test_text_is_tokenized_once_whatever_the_split_and_the_command(tokenized, say):
    lines, cache = DataOrigin.of_texts([os.path.abspath("lines.jsonl")]), Path("cache")
    hashes = set()
    for split in ("auto", "documents", "tail"):
        for share in (0.2, 0.5):
            data = DataConfig(split=split, validation_fraction=share)
            corpus = open_corpus(lines, data, 8, cache)
            assert corpus.origin == dataclasses.replace(lines, sha256=corpus.sha256)
            hashes.add(corpus.sha256)
    open_text(lines, DataConfig(), ByteTokenizer(), cache)
    assert len(hashes) == 1
    small = ("--model-dim", 8, "--blocks", 1, "--heads", 1, "--sequence-length", 8, "--steps", 2)
    common = ("--cache", "cache", "--threads", 1)
    say("train", "--data", "lines.jsonl", *small, "--out", "run", *common)
    say("evaluate", "--model", "run", *common)
    say("evaluate", "--model", "run", "--data", "lines.jsonl", *common)
    say("train", "--resume", "run", "--steps", 3, *common)
    say("data", "inspect", "lines.jsonl", "--cache", "cache")
    assert tokenized == ["lines.jsonl"]


def test_changed_text_is_refused():
    origin = DataOrigin.of_texts([os.path.abspath("text.txt")])
    origin = open_corpus(origin, DataConfig(), 8, Path("cache")).origin
    Path("text.txt").write_text(TEXT.upper())
    with pytest.raises(ValueError, match=r"text\.txt has changed, or is another text") as error:
        open_corpus(origin, DataConfig(), 8, Path("cache"))
    assert re.search(f"[0-9a-f]{{64}}, expected {origin.sha256}", str(error.value))


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_text_as_a_whole_is_what_was_once_in_memory(kind):
    """Every document after a boundary, but the first of bytes: nothing is known before it."""
    origin = DataOrigin.of_texts([os.path.abspath("lines.jsonl")])
    data, cache = DataConfig(tokenizer=kind), Path("cache")
    tokenizer = open_corpus(origin, data, 8, cache).tokenizer
    store, remarks = open_text(origin, data, tokenizer, cache)
    expected = []
    for line in Path("lines.jsonl").read_text().splitlines():
        if expected or kind == "bpe":
            expected.append(tokenizer.bos_token)
        expected += tokenizer.encode(json.loads(line)["text"].encode()).tolist()
    assert store.read(0, store.size).tolist() == expected
    assert remarks == ()


def test_tokens_of_another_tokenizer_are_no_text_of_a_model():
    with ShardWriter(Path("tokens"), ("text",), 256) as writer:
        writer.put_beside(ByteTokenizer().save)
        index = writer.finish("source", "another", "0" * 64)
    assert open_store(Path("tokens"), index, "text").size == 0
    with pytest.raises(ValueError, match="has tokens of another tokenizer than the model's"):
        open_text(DataOrigin.of_texts(["tokens"]), DataConfig(), ByteTokenizer())
