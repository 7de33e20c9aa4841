"""From texts to what a run learns from: nothing lost, nothing twice, nothing done again."""

import contextlib
import gzip
import hashlib
import io
import json
import os
import sys
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.arrays import assert_same_bits
from legacy1bit.data import corpus as corpora
from legacy1bit.data import sources
from legacy1bit.data.corpus import (
    TEXT,
    source_corpus,
    token_corpus,
    tokenize_source,
    tokens_of,
)
from legacy1bit.data.shards import open_store, read_index, split_documents
from legacy1bit.data.sources import Piece, open_source
from legacy1bit.data.tokenizer import (
    ByteTokenizer,
    UnknownTokenizer,
    character_tokenizer,
    train_bpe,
)
from legacy1bit.hyperparams import DataConfig

STORY = "The c\u00e4t sat on the m\u00e4t. The d\u00f6g lay by the l\u00f6g, and it sl\u00e8pt. "
DATA = DataConfig()
TOKENIZERS = {
    "bytes": ByteTokenizer(),
    "chars": character_tokenizer([STORY.encode()]),
    "bpe": train_bpe([STORY.encode() * 4], 280),
}


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def file_of(folder, documents, name="text.txt", separator="|"):
    path = folder / name
    path.write_bytes(separator.join(documents).encode())
    return path


def made(path, cache, data=DATA, tokenizer=TOKENIZERS["bytes"], length=8, validation=None):
    source = open_source(str(path), data.field, data.encoding, data.separator)
    other = None if validation is None else open_source(str(validation))
    return source_corpus(source, tokenizer, data, length, cache, other)


def tokens_in(dataset):
    return dataset.tokens.read(0, dataset.tokens.size)


def begins_in(store):
    return store.document_bounds(np.arange(store.document_count))[0].tolist()


def documents_in(dataset, tokenizer):
    """The texts between a store's boundaries."""
    store = dataset.tokens
    begins, ends = store.document_bounds(np.arange(store.document_count))
    found = []
    for begin, end in zip(begins.tolist(), ends.tolist(), strict=True):
        first, *rest = store.read(begin, end)
        assert first == tokenizer.bos_token
        found.append(tokenizer.decode(rest).decode())
    return found


@pytest.fixture
def counted(monkeypatch):
    """How often a text was turned into tokens."""
    calls = []
    tokenize = corpora.tokenize_source

    def count(*arguments):
        calls.append(arguments[0].name)
        return tokenize(*arguments)

    monkeypatch.setattr(corpora, "tokenize_source", count)
    return calls


# --- Documents ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_documents_go_to_one_side_with_their_copies(tmp_path, cache, kind):
    documents = [f"{number} {STORY}" for number in range(300)] * 2
    path = file_of(tmp_path, documents)
    data = DataConfig(separator="|", validation_fraction=0.2)
    tokenizer = TOKENIZERS[kind]
    corpus = made(path, cache, data, tokenizer)
    assert (corpus.name, corpus.tokenizer) == ("text.txt", tokenizer)
    learned, kept = (documents_in(part, tokenizer) for part in (corpus.training, corpus.validation))
    assert sorted(learned + kept) == sorted(documents)
    assert not set(learned) & set(kept)
    # In their order.
    assert learned == [document for document in documents if document in set(learned)]
    # A standard deviation of 0.023.
    assert abs(len(kept) / len(documents) - 0.2) < 0.1
    for part in (corpus.training, corpus.validation):
        assert part.pad_token == tokenizer.vocab_size
        assert tokens_in(part)[-1] == tokenizer.bos_token
        assert part.tokens.stop == part.tokens.size - 1


def test_share_of_documents_is_about_that(tmp_path, cache):
    path = tmp_path / "text.jsonl"
    path.write_text("".join(f'{{"text": "{number}"}}\n' for number in range(5000)))
    for share in (0.01, 0.1, 0.5, 0.9):
        corpus = made(path, cache, DataConfig(validation_fraction=share), length=2)
        found = corpus.validation.tokens.document_count / 5000
        # Five standard deviations.
        assert abs(found - share) < 5 * (share * (1 - share) / 5000) ** 0.5


def test_copies_of_a_document_without_spaces_are_on_one_side(tmp_path, monkeypatch):
    """Where it is cut depends on what was read before it."""
    rng = np.random.default_rng(1)
    for module in (sources, corpora):
        monkeypatch.setattr(module, "PIECE_BYTES", 64)
    monkeypatch.setattr(sources, "MOST_PIECE_BYTES", 1024)
    monkeypatch.setattr(sources, "BLOCK_BYTES", 50)
    texts = []
    for _ in range(40):
        text = "".join(map(chr, rng.integers(0x4E00, 0x9FFF, 150)))
        texts += [text + "x y" * 30] * 3
    source = open_source(str(file_of(tmp_path, texts)), separator="|")
    index = tokenize_source(source, TOKENIZERS["bytes"], tmp_path / "tokens")
    sides = []
    for store in split_documents(tmp_path / "tokens", index, TEXT, 0.5):
        text = bytes(store.read(0, store.size).astype(np.uint8))
        sides.append(set(text.decode().split("\n")) - {""})
    assert min(map(len, sides)) > 5
    assert not sides[0] & sides[1]
    assert sides[0] | sides[1] == set(texts)


@settings(max_examples=25, deadline=None)
@given(
    documents=st.lists(st.text("ab\u00e4 \n\u4e2d", max_size=60), min_size=1, max_size=20),
    share=st.sampled_from([0.0, 0.3]),
    kind=st.sampled_from(sorted(TOKENIZERS)),
)
def test_every_byte_is_in_one_part(tmp_path_factory, documents, share, kind):
    if not any(documents):
        return
    folder, tokenizer = tmp_path_factory.mktemp("text"), TOKENIZERS[kind]
    path = folder / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    index = tokenize_source(open_source(str(path)), tokenizer, folder / "tokens")
    assert index == read_index(folder / "tokens")
    texts, size = [], 0
    for store in split_documents(folder / "tokens", index, TEXT, share):
        begins, ends = store.document_bounds(np.arange(store.document_count))
        bounds = [*begins.tolist(), store.size - 1]
        assert (
            store.rows(np.array(bounds), np.array(bounds) + 1, 1, 0) == tokenizer.bos_token
        ).all()
        own = [
            tokenizer.decode(store.read(begin + 1, end))
            for begin, end in zip(begins.tolist(), ends.tolist(), strict=True)
        ]
        texts += own
        size += sum(map(len, own))
    assert (index.parts[TEXT].documents, index.parts[TEXT].bytes) == (len(texts), size)
    assert sorted(texts) == sorted(document.encode() for document in documents)
    text = b"\xff".join(document.encode() for document in documents)
    assert index.sha256 == hashlib.sha256(text).hexdigest()


def test_pieces_of_a_document_have_one_boundary(tmp_path, monkeypatch):
    text = STORY.encode() * 30
    monkeypatch.setattr(sources, "PIECE_BYTES", 100)
    path = tmp_path / "text.txt"
    path.write_bytes(text)
    index = tokenize_source(open_source(str(path)), TOKENIZERS["bpe"], tmp_path / "tokens")
    store = open_store(tmp_path / "tokens", index, TEXT)
    tokenizer = TOKENIZERS["bpe"]
    expected = [tokenizer.bos_token, *tokenizer.encode(text), tokenizer.bos_token]
    assert store.read(0, store.size).tolist() == expected
    assert begins_in(store) == [0]
    assert index.parts[TEXT].bytes == len(text)


def test_together_loses_no_piece(monkeypatch):
    monkeypatch.setattr(corpora, "_TOGETHER", 200)
    pieces = [Piece(b"x" * size, size % 3 == 0) for size in range(50)]
    found = list(corpora._together(iter(pieces)))
    assert [piece for some in found for piece in some] == pieces
    assert len(found) > 5


# --- Splits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("size", [200, 333])
def test_tail_is_exact(tmp_path, cache, share, size):
    text = ("abcdefg" * size)[:size]
    path = file_of(tmp_path, [text])
    corpus = made(path, cache, DataConfig(split="tail", validation_fraction=share))
    expected = np.frombuffer(f"\n{text}\n".encode(), np.uint8).astype(np.int32)
    cut = expected.size - round(expected.size * share)
    assert_same_bits(tokens_in(corpus.training), expected[:cut])
    assert_same_bits(tokens_in(corpus.validation), expected[cut:])


@pytest.mark.parametrize("share", [1e-9, 1e-3, 0.1, 0.3, 0.5, 0.7, 0.9])
@pytest.mark.parametrize("length", [1, 2, 7, 64, 1000])
def test_tail_says_how_many_tokens_it_needs(share, length):
    data = DataConfig(split="tail", validation_fraction=share)

    def refused(size):
        with pytest.raises(ValueError, match=f"text has {size} tokens, too few") as error:
            corpora._cut_tail(corpora.TokenStore([np.zeros(size, bool)]), "text", data, length)
        return int(str(error.value).rpartition(" ")[2])

    needed = refused(2)
    if needed < 1 << 22:
        learned, kept = corpora._cut_tail(
            corpora.TokenStore([np.zeros(needed, bool)]), "text", data, length
        )
        assert min(learned.size, kept.size) == length + 1
        assert refused(needed - 1) == needed


def test_auto_takes_documents_where_there_are_several(tmp_path, cache):
    documents = [f"{number} {STORY}" for number in range(60)]
    one = file_of(tmp_path, documents)
    tail = made(one, cache)
    assert begins_in(tail.training.tokens) == [0]
    assert tokens_in(tail.validation).size == round((one.stat().st_size + 2) * 0.1)
    several = made(one, cache, DataConfig(separator="|"))
    count = several.training.tokens.document_count + several.validation.tokens.document_count
    assert count == 60


@pytest.mark.parametrize("count", [1, 2, 3])
def test_auto_takes_the_tail_of_few_documents(tmp_path, cache, count):
    path = tmp_path / "text.jsonl"
    path.write_text(json.dumps({"text": STORY * 9}) + "\n" + '{"text": "few"}\n' * (count - 1))
    corpus = made(path, cache)
    joined = np.concatenate([tokens_in(corpus.training), tokens_in(corpus.validation)])
    text = "".join(f"\n{text}" for text in [STORY * 9] + ["few"] * (count - 1)) + "\n"
    assert bytes(joined.astype(np.uint8)).decode() == text
    with pytest.raises(ValueError, match=r"text\.jsonl.* (no document is for|too few)"):
        made(path, cache, DataConfig(split="documents"))
    assert made(path, cache, DataConfig(split="tail")).sha256 == corpus.sha256


def test_validation_of_its_own(tmp_path, cache):
    path, other = file_of(tmp_path, [STORY * 5]), file_of(tmp_path, ["quite other"], "other.txt")
    corpus = made(path, cache, validation=other)
    assert tokens_in(corpus.training).size == len((STORY * 5).encode()) + 2
    assert bytes(tokens_in(corpus.validation).astype(np.uint8)) == b"\nquite other\n"
    other.write_bytes(b"quite anything")
    assert made(path, cache, validation=other).sha256 != corpus.sha256
    other.write_bytes(b"few")
    with pytest.raises(ValueError, match="has 5 tokens to validate on, too few"):
        made(path, cache, validation=other)
    with pytest.raises(ValueError, match="has 13 tokens to learn from, too few"):
        made(file_of(tmp_path, ["quite other"]), cache, validation=path, length=13)


# --- Kinds of sources -----------------------------------------------------------------------------


def test_sha256_of_a_file_is_its_own(tmp_path, cache):
    text = (STORY * 40).encode()
    digest = hashlib.sha256(text).hexdigest()
    (tmp_path / "text.txt").write_bytes(text)
    (tmp_path / "text.txt.gz").write_bytes(gzip.compress(text))
    (tmp_path / "text.latin1").write_bytes(text.decode().encode("latin-1"))
    assert made(tmp_path / "text.txt", cache).sha256 == digest
    assert made(tmp_path / "text.txt.gz", cache).sha256 == digest
    data = DataConfig(encoding="latin-1")
    assert made(tmp_path / "text.latin1", cache, data).sha256 == digest
    assert made(tmp_path / "text.txt", cache, tokenizer=TOKENIZERS["bpe"]).sha256 == digest
    assert made(tmp_path / "text.txt", cache, DataConfig(separator="no")).sha256 == digest


def test_sha256_knows_where_documents_begin(tmp_path, cache):
    found = set()
    for text in ("one|two three", "one two|three", "onetwo |three", "|one|two three"):
        path = file_of(tmp_path, [text + STORY * 9])
        found.add(made(path, cache, DataConfig(separator="|", split="tail")).sha256)
    assert len(found) == 3


def test_folder_is_read_in_its_order(tmp_path, cache):
    folder = tmp_path / "folder"
    (folder / "b").mkdir(parents=True)
    (folder / "a.txt").write_bytes(STORY.encode())
    (folder / "b" / "c.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    (folder / "d.md.gz").write_bytes(gzip.compress(b"three"))
    (folder / "not.png").write_bytes(b"\xff")
    corpus = made(folder, cache, DataConfig(split="tail", validation_fraction=0.2))
    assert "3 files" in corpus.name
    joined = np.concatenate([tokens_in(corpus.training), tokens_in(corpus.validation)])
    assert bytes(joined.astype(np.uint8)).decode() == f"\n{STORY}\none\ntwo\nthree\n"


def test_stream_is_read_once(cache, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(STORY.encode() * 9)))
    source = open_source("-")
    corpus = source_corpus(source, TOKENIZERS["bytes"], DATA, 8, cache)
    assert corpus.sha256 == hashlib.sha256(STORY.encode() * 9).hexdigest()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_pipe_is_not_said_to_change(tmp_path, cache):
    os.mkfifo(tmp_path / "pipe")
    source = open_source(str(tmp_path / "pipe"))

    def feed():
        (tmp_path / "pipe").write_bytes(STORY.encode() * 9)

    thread = threading.Thread(target=feed, daemon=True)
    thread.start()
    corpus = source_corpus(source, TOKENIZERS["bytes"], DATA, 8, cache)
    thread.join(20)
    assert corpus.sha256 == hashlib.sha256(STORY.encode() * 9).hexdigest()


def test_text_that_changes_while_it_is_read_is_refused(tmp_path, cache, monkeypatch):
    """Even a file that was read to its end before."""
    for name in ("a.txt", "b.txt"):
        file_of(tmp_path, [STORY * 9], name)
    tokenizer = TOKENIZERS["bytes"]
    source = open_source(f"{tmp_path}/?.txt")

    class Changing:
        def __getattr__(self, name):
            return getattr(tokenizer, name)

        def encode_batch(self, texts):
            (tmp_path / "a.txt").write_bytes(b"other")
            return tokenizer.encode_batch(texts)

    with pytest.raises(ValueError, match="has changed while it was read"):
        tokens_of(source, Changing(), cache)
    assert not list(cache.iterdir())


def test_progress_counts_bytes_of_text(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(corpora, "_TOGETHER", 1)
    path, reported = file_of(tmp_path, [STORY] * 5), []
    source = open_source(str(path), separator="|")

    @contextlib.contextmanager
    def progress(name, total):
        assert (name, total) == ("tokens", path.stat().st_size)
        yield reported.append

    tokens_of(source, TOKENIZERS["bpe"], cache, progress)
    assert reported == [len(STORY.encode()) * count for count in range(1, 6)]


# --- The cache ------------------------------------------------------------------------------------


def test_second_time_nothing_is_tokenized(tmp_path, cache, counted):
    path = file_of(tmp_path, [f"{number} {STORY}" for number in range(40)])
    validation = file_of(tmp_path, [STORY], "other.txt")
    for data in (DATA, DataConfig(separator="|"), DataConfig(separator="|", order="packed")):
        for other in (None, validation):
            first = made(path, cache, data, validation=other)
            done = len(counted)
            again = made(path, cache, data, validation=other)
            assert len(counted) == done
            assert again.sha256 == first.sha256
            for name in ("training", "validation"):
                one, two = getattr(first, name), getattr(again, name)
                assert_same_bits(tokens_in(one), tokens_in(two))
                assert begins_in(one.tokens) == begins_in(two.tokens)
    assert len(counted) == 3
    assert len(list(cache.iterdir())) == 3


def test_whatever_changes_is_tokenized_again(tmp_path, cache, counted):
    path = tmp_path / "text.txt"

    def changes(data=DATA, kind="bytes", content=None):
        if content is not None:
            path.write_bytes(content)
        before = len(counted)
        made(path, cache, data, TOKENIZERS[kind])
        return len(counted) - before

    text = "|".join(f"{number} {STORY}" for number in range(40)).encode()
    assert changes(content=text) == 1
    assert changes() == 0
    assert changes(kind="bpe") == 1
    assert changes(kind="chars") == 1
    assert changes(DataConfig(encoding="latin-1")) == 1
    assert changes(DataConfig(separator="|")) == 1
    # The split is made of the tokens.
    assert changes(DataConfig(separator="|", validation_fraction=0.2)) == 0
    assert changes(DataConfig(separator="|", split="tail", validation_fraction=0.2)) == 0
    assert changes(DataConfig(separator="|", order="packed", document_mask=True)) == 0
    assert changes(DataConfig(validation_fraction=0.2)) == 0
    assert changes(content=text + b".") == 1
    os.utime(path, ns=(1, 1))
    assert changes() == 1


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_tokens_of_are_those_of_a_text_that_took_anothers_place(tmp_path, cache, kind):
    """The tar files that both come out of may say the same time."""
    path, new = tmp_path / "text.txt", tmp_path / "new.txt"
    for text in (STORY * 9, (STORY * 9)[::-1]):
        new.write_bytes(text.encode())
        os.utime(new, ns=(1, 1))
        os.replace(new, path)
        folder, index = tokens_of(open_source(str(path)), TOKENIZERS[kind], cache)
        assert index.sha256 == hashlib.sha256(text.encode()).hexdigest()
        tokens = open_store(folder, index, TEXT).read(1, 1 << 20)[:-1]
        assert TOKENIZERS[kind].decode(tokens) == text.encode()


def test_damaged_tokens_are_made_again(tmp_path, cache, counted):
    path = file_of(tmp_path, [STORY * 9])
    before = made(path, cache)
    (entry,) = cache.iterdir()
    shard = entry / "text-00000.tokens"
    shard.write_bytes(shard.read_bytes().replace(b"cat", b"cow").replace(b"d", b"D"))
    after = made(path, cache)
    assert len(counted) == 2
    assert_same_bits(tokens_in(after.training), tokens_in(made(path, cache).training))
    assert len(counted) == 2
    assert after.sha256 == before.sha256


# --- Tokens of other programs ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_tokens_are_cut_at_their_tail(dtype):
    tokens = np.arange(300).astype(dtype)
    corpus = token_corpus(tokens, "x.bin", DATA, 8)
    assert tokens_in(corpus.training).tolist() == list(range(270))
    assert tokens_in(corpus.validation).tolist() == list(range(270, 300))
    assert corpus.training.pad_token == corpus.validation.pad_token == 300
    assert isinstance(corpus.tokenizer, UnknownTokenizer)
    assert corpus.tokenizer.vocab_size == 300
    assert corpus.sha256 == hashlib.sha256(tokens.tobytes()).hexdigest()


def test_tokens_may_have_a_validation_of_their_own():
    tokens, other = np.arange(100, dtype="<u2"), np.arange(500, 520, dtype="<u2")
    corpus = token_corpus(tokens, "x.bin", DATA, 8, other)
    assert tokens_in(corpus.training).size == 100
    assert tokens_in(corpus.validation).tolist() == list(range(500, 520))
    assert corpus.training.pad_token == 520
    assert corpus.sha256 != token_corpus(tokens, "x.bin", DATA, 8, other[1:]).sha256
    with pytest.raises(ValueError, match="20 tokens to validate on, too few"):
        token_corpus(tokens, "x.bin", DATA, 20, other)


def test_tokens_outside_the_vocabulary_are_refused():
    tokens = np.full(300, 299, "<u2")
    assert token_corpus(tokens, "x.bin", DataConfig(tokenizer="bpe", vocabulary=300), 8)
    with pytest.raises(ValueError, match="has token 299, expected 0 to 298: see --vocab-size"):
        token_corpus(tokens, "x.bin", DataConfig(tokenizer="bpe", vocabulary=299), 8)
