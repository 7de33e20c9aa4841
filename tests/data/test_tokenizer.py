"""Tokenizers: their tokens, their files, and Hugging Face's library as a witness."""

import copy
import functools
import hashlib
import json
import math
import os
import pickle
import random
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.arrays import assert_same_bits
from helpers.models import make_config, random_model
from helpers.texts import EVERY_BYTE, TEXTS, texts
from legacy1bit.data import tokenizer as module
from legacy1bit.data.corpus import Corpus
from legacy1bit.data.shards import TokenStore
from legacy1bit.data.stories import corpus, generate_stories
from legacy1bit.data.tokenizer import (
    TOKENIZER_FILE,
    ByteTokenizer,
    SubwordTokenizer,
    UnknownTokenizer,
    character_tokenizer,
    fit_tokenizer,
    load_tokenizers,
    train_bpe,
)
from legacy1bit.data.tokenizer_files import load_tokenizer, tokenizer_of
from legacy1bit.dataset import TokenDataset
from legacy1bit.generator import Generator, TextStream
from legacy1bit.hyperparams import TrainingConfig
from legacy1bit.model import ModelFileError, save_model
from legacy1bit.training.evaluation import Metrics, evaluate
from legacy1bit.training.trainer import Trainer

# --- Bytes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 10, 11, 128, 256])
def test_tokenizer_of_fewer_bytes(size, tmp_path):
    tokenizer = ByteTokenizer(size)
    assert tokenizer.bos_token == (10 if size > 10 else None)
    assert tokenizer.encode(bytes(range(size))).tolist() == list(range(size))
    if size < 256:
        with pytest.raises(IndexError, match=f"byte {size} at offset 0 is outside"):
            tokenizer.encode(bytes([size]))
        with pytest.raises(IndexError, match=f"outside 0 to {size - 1}"):
            tokenizer.decode([size])
    tokenizer.save(tmp_path)
    assert load_tokenizer(tmp_path).vocab_size == size


@pytest.mark.parametrize("size", [0, -1, 257])
def test_tokenizer_of_no_bytes(size):
    with pytest.raises(ValueError, match=f"the vocabulary has {size} tokens, expected 1 to 256"):
        ByteTokenizer(size)


@texts
def test_tokenizer_brings_a_text_back(text):
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == text.encode()


def test_tokenizer_decodes_every_id():
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(range(256)) == EVERY_BYTE
    assert tokenizer.decode(np.arange(256)[::-1]) == EVERY_BYTE[::-1]
    assert tokenizer.decode([]) == b""


@pytest.mark.parametrize("ids", [[-1], [256], [65, 1 << 40], [0, -256]])
def test_tokenizer_refuses_ids_that_are_no_bytes(ids):
    with pytest.raises(IndexError, match="outside 0 to 255"):
        ByteTokenizer().decode(ids)


def test_tokenizer_file_can_be_loaded(tmp_path):
    ByteTokenizer().save(tmp_path)
    ByteTokenizer().save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [TOKENIZER_FILE]
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode(EVERY_BYTE)) == EVERY_BYTE


def test_tokenizer_needs_a_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing"):
        ByteTokenizer().save(tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match="missing"):
        load_tokenizer(tmp_path / "missing")


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"[]", b"3", b'"BPE"', b"{}", b'{"model": 1}'],
)
def test_tokenizer_load_refuses_other_files(tmp_path, content):
    (tmp_path / TOKENIZER_FILE).write_bytes(content)
    with pytest.raises(ValueError, match=TOKENIZER_FILE):
        load_tokenizer(tmp_path)


def swap_two_bytes(content):
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]


def add_a_word(content):
    content["model"]["vocab"]["the"] = 256
    content["model"]["merges"] = [["t", "h"], ["th", "e"]]


def lower_case(content):
    content["normalizer"] = {"type": "Lowercase"}


def add_a_space(content):
    content["pre_tokenizer"]["add_prefix_space"] = True


def add_a_token(content):
    content["added_tokens"] = [
        {
            "id": 256,
            "content": "<end>",
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
    ]


def drop_bytes_at_random(content):
    content["model"]["dropout"] = 0.5


@pytest.mark.parametrize(
    "change",
    [swap_two_bytes, add_a_word, drop_bytes_at_random, lower_case, add_a_space, add_a_token],
)
def test_tokenizer_load_refuses_tokenizers_that_give_other_ids(tmp_path, change):
    ByteTokenizer().save(tmp_path)
    path = tmp_path / TOKENIZER_FILE
    content = json.loads(path.read_bytes())
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match="is not a tokenizer that legacy1bit wrote"):
        load_tokenizer(tmp_path)


# --- The same file in Hugging Face's tokenizers ---------------------------------------------------


def read_by_library(folder):
    tokenizers = pytest.importorskip("tokenizers")
    return tokenizers.Tokenizer.from_file(str(folder / TOKENIZER_FILE))


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    ByteTokenizer().save(folder)
    return read_by_library(folder)


@texts
def test_tokenizers_library_gives_the_same_ids(foreign, text):
    ids = foreign.encode(text).ids
    assert ids == ByteTokenizer().encode(text).tolist()
    assert foreign.decode(ids, skip_special_tokens=False) == text


def test_tokenizers_library_gives_the_same_ids_for_every_byte_of_utf8(foreign):
    """The bytes C0, C1 and F5 to FF occur in no valid text; all others do in this one."""
    codes = [*range(0x800), *range(0x800, 0xD800, 97), *range(0xE000, 0x110000, 97)]
    text = "".join(map(chr, codes))
    assert set(EVERY_BYTE) - set(text.encode()) == {0xC0, 0xC1, *range(0xF5, 0x100)}
    assert foreign.encode(text).ids == list(text.encode())


def test_tokenizers_library_has_a_token_for_each_byte(foreign):
    assert foreign.get_vocab_size() == 256
    assert sorted(foreign.get_vocab().values()) == list(range(256))
    for byte in EVERY_BYTE:
        expected = bytes([byte]).decode("utf-8", "replace")
        assert foreign.decode([byte], skip_special_tokens=False) == expected


# --- Every kind -----------------------------------------------------------------------------------

SAMPLE = corpus(generate_stories(60, 3)).encode() + "\n".join(TEXTS.values()).encode() * 3
KINDS = ("bytes", "chars", "bpe")
SUBWORDS = KINDS[1:]


@functools.cache
def tokenizer_of_kind(kind):
    if kind == "bytes":
        return ByteTokenizer()
    return character_tokenizer([SAMPLE]) if kind == "chars" else train_bpe([SAMPLE], 600)


@pytest.fixture(params=KINDS)
def tokenizer(request):
    return tokenizer_of_kind(request.param)


# What is cut up in special ways, or spelled like something else.
FRAGMENTS = [" ", "\n", "  \t", "'s", "'ll ", "Kim", " was a", "42", "\0", "e\u0301", "\u00e9",
             "\u65e5\u672c", "\U0001f600", "\u00a0", "\u2003", "\ud7ff",
             "<|endoftext|>", "<|padding|>"]  # fmt: skip
BROKEN = [b"\xff", b"\xc3", b"\xe6\x97", b"\xf0\x9f\x98", b"\x80", b"\xed\xa0\x80", b"\xc0\x80"]
valid = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=5), max_size=8).map("".join)
anything = st.lists(
    st.sampled_from([*BROKEN, *(text.encode() for text in FRAGMENTS)]) | st.binary(max_size=5),
    max_size=8,
).map(b"".join)
few = settings(max_examples=150, deadline=None)


@few
@given(text=anything)
def test_any_bytes_come_back(text):
    for kind in KINDS:
        tokenizer = tokenizer_of_kind(kind)
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int32
        assert tokenizer.decode(ids) == text
        assert tokenizer.byte_lengths[ids].sum() == len(text)
        assert not np.isin(ids, tokenizer.eos_token).any()


@few
@given(text=valid)
def test_text_has_the_same_tokens_as_str_and_bytes_and_in_the_library(text):
    for kind in KINDS:
        tokenizer = tokenizer_of_kind(kind)
        ids = tokenizer.encode(text)
        assert_same_bits(tokenizer.encode(text.encode()), ids)
        assert library_of(kind).encode(text).ids == ids.tolist()


@functools.cache
def library_of(kind):
    """What the library makes of the file; without this switch it looks for special tokens."""
    tokenizers = pytest.importorskip("tokenizers")
    content = json.dumps(tokenizer_of_kind(kind).description())
    library = tokenizers.Tokenizer.from_str(content)
    library.encode_special_tokens = True
    return library


@few
@given(texts=st.lists(anything, max_size=5), part=st.integers(1, 20), cores=st.integers(1, 3))
def test_texts_have_the_same_tokens_in_batches_and_parts(texts, part, cores):
    for kind in KINDS:
        tokenizer = tokenizer_of_kind(kind)
        expected = [tokenizer.encode(text) for text in texts]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "_PART", part)
            patch.setattr(module, "available_cores", lambda: cores)
            found = tokenizer.encode_batch(texts)
        assert len(found) == len(texts)
        for one, other in zip(found, expected, strict=True):
            assert one.dtype == (np.uint8 if kind == "bytes" else np.int32)
            assert_same_bits(one.astype(np.int32), other)


@few
@given(
    head=anything,
    last=st.integers(0x21, 0x7E),
    blank=st.sampled_from([b" ", b"\n"]),
    tail=anything,
)
def test_tokens_do_not_reach_over_a_blank_behind_a_printable_character(head, last, blank, tail):
    first, second = head + bytes([last]), blank + tail
    for kind in KINDS:
        encode = tokenizer_of_kind(kind).encode
        assert encode(first + second).tolist() == [*encode(first), *encode(second)]


def test_encode_gives_the_library_no_more_than_it_has_done_soon(monkeypatch):
    """It hears no signal meanwhile."""
    tokenizer = train_bpe([SAMPLE], 300)
    library, sizes = tokenizer._library, []

    def encode_batch_fast(texts, **options):
        sizes.append(sum(len(text.encode()) for text in texts))
        return library.encode_batch_fast(texts, **options)

    monkeypatch.setattr(tokenizer, "_library", SimpleNamespace(encode_batch_fast=encode_batch_fast))
    monkeypatch.setattr(module, "available_cores", lambda: 2)
    text = b"the cat sat. " * 80_000
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    assert sum(sizes) == len(text)
    assert max(sizes) < 300_000


def test_long_texts_have_the_tokens_that_the_library_gives_them(tokenizer):
    text = SAMPLE.decode() * 8
    assert len(text) > 3 * module._PART
    assert tokenizer.encode(text).tolist() == library_of(tokenizer.kind).encode(text).ids


def test_no_text_has_no_tokens(tokenizer):
    assert_same_bits(tokenizer.encode(""), np.zeros(0, np.int32))
    assert tokenizer.encode_batch([]) == []
    assert [ids.tolist() for ids in tokenizer.encode_batch([b"", b"a", b""])] == [[], [97], []]


def test_lone_surrogates_are_refused(tokenizer):
    with pytest.raises(UnicodeEncodeError):
        tokenizer.encode("a\udcff")


def test_ids_that_are_no_tokens_are_refused(tokenizer):
    for ids in ([-1], [tokenizer.vocab_size], [0, 1 << 40]):
        with pytest.raises(IndexError, match=f"outside 0 to {tokenizer.vocab_size - 1}"):
            tokenizer.decode(ids)


def test_the_vocabulary_begins_with_the_bytes_and_ends_with_special_tokens(tokenizer):
    alone = tokenizer.encode_batch([bytes([byte]) for byte in range(256)])
    assert [ids.tolist() for ids in alone] == [[byte] for byte in range(256)]
    assert tokenizer.decode(range(256)) == EVERY_BYTE
    if tokenizer.kind == "bytes":
        assert (tokenizer.bos_token, tokenizer.eos_token) == (10, None)
        return
    end = tokenizer.vocab_size - 2
    assert tokenizer.bos_token == tokenizer.eos_token == end
    assert tokenizer.decode([97, end, end + 1, 98]) == b"ab"
    assert tokenizer.byte_lengths[end:].tolist() == [0, 0]


def test_what_is_known_of_tokens_fits_together(tokenizer):
    lengths, parents = tokenizer.byte_lengths, tokenizer.parents
    assert (lengths.shape, parents.shape) == ((tokenizer.vocab_size,), (tokenizer.vocab_size, 2))
    assert lengths.dtype == parents.dtype == np.int32
    texts = [tokenizer.decode([token]) for token in range(tokenizer.vocab_size)]
    assert lengths.tolist() == [len(text) for text in texts]
    merged = texts[256 : tokenizer.eos_token]
    assert len(set(texts[: tokenizer.eos_token])) == len(texts[: tokenizer.eos_token])
    for token, (left, right) in enumerate(parents.tolist()):
        if 256 <= token < 256 + len(merged):
            assert 0 <= min(left, right) <= max(left, right) < token
            assert texts[left] + texts[right] == texts[token]
        else:
            assert left == right == -1
    for array in (lengths, parents):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 7


# --- Files ----------------------------------------------------------------------------------------


def test_a_tokenizer_comes_back_exactly(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    content = (tmp_path / TOKENIZER_FILE).read_bytes()
    assert tokenizer.sha256 == hashlib.sha256(content).hexdigest()
    back = load_tokenizer(tmp_path)
    assert type(back) is type(tokenizer)
    assert back.description() == tokenizer.description()
    assert (back.kind, back.vocab_size, back.sha256) == (
        tokenizer.kind, tokenizer.vocab_size, tokenizer.sha256
    )  # fmt: skip
    assert_same_bits(back.parents, tokenizer.parents)
    back.save(tmp_path)
    assert (tmp_path / TOKENIZER_FILE).read_bytes() == content


@pytest.mark.parametrize("kind", SUBWORDS)
def test_the_library_knows_the_special_tokens(kind, tmp_path):
    tokenizer = tokenizer_of_kind(kind)
    tokenizer.save(tmp_path)
    library = read_by_library(tmp_path)
    assert library.get_vocab_size() == tokenizer.vocab_size
    for name, token in (("<|endoftext|>", -2), ("<|padding|>", -1)):
        assert library.token_to_id(name) == tokenizer.vocab_size + token
    ids = tokenizer.encode("Kim was a \u00e9l\u00e8ve.").tolist()
    assert library.decode([*ids, tokenizer.eos_token]) == "Kim was a \u00e9l\u00e8ve."


@pytest.mark.parametrize("kind", SUBWORDS)
def test_damaged_files_are_refused(kind, tmp_path):
    tokenizer_of_kind(kind).save(tmp_path)
    path = tmp_path / TOKENIZER_FILE
    content, rng = path.read_bytes(), random.Random(5)
    for _ in range(60):
        damaged, place = bytearray(content), rng.randrange(len(content))
        damaged[place] ^= 1 << rng.randrange(8)
        for data in (damaged, content[:place]):
            path.write_bytes(data)
            with pytest.raises(ValueError, match=TOKENIZER_FILE):
                load_tokenizer(tmp_path)


def other_merges(model):
    model["merges"].reverse()


def a_merge_of_nothing(model):
    model["merges"][0] = ["zz", "a"]


def a_merge_of_three(model):
    model["merges"][0] = ["a", "b", "c"]


def merges_as_text(model):
    model["merges"] = [" ".join(merge) for merge in model["merges"]]


def a_merge_twice(model):
    model["merges"].append(model["merges"][0])


def no_merges(model):
    del model["merges"]


def a_character_that_is_no_byte(model):
    model["merges"][0] = ["\u65e5", "a"]


def numbers_for_merges(model):
    model["merges"][0] = 3


def other_ids(model):
    model["vocab"]["a"], model["vocab"]["b"] = model["vocab"]["b"], model["vocab"]["a"]


def a_token_more(model):
    model["vocab"]["zz"] = len(model["vocab"])


def a_special_token_of_text(model):
    """The merges are right, but a token would have the name of another."""
    text = ""
    for character in "<|endoftext|>":
        if text:
            model["merges"].append([text, character])
        text += character


@pytest.mark.parametrize(
    "change",
    [other_merges, a_merge_of_nothing, a_merge_of_three, merges_as_text, a_merge_twice, no_merges,
     a_character_that_is_no_byte, numbers_for_merges, other_ids, a_token_more,
     a_special_token_of_text],
)  # fmt: skip
def test_files_that_others_wrote_are_refused(change, tmp_path):
    content = tokenizer_of_kind("bpe").description()
    change(content["model"])
    (tmp_path / TOKENIZER_FILE).write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match="is not a tokenizer that legacy1bit wrote"):
        load_tokenizer(tmp_path)


def test_only_bytes_do_without_the_library(monkeypatch, tmp_path):
    folders = {kind: tmp_path / kind for kind in KINDS}
    for kind, folder in folders.items():
        folder.mkdir()
        tokenizer_of_kind(kind).save(folder)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert load_tokenizer(folders["bytes"]).encode("abc").tolist() == [97, 98, 99]
    for call in (
        lambda: load_tokenizer(folders["chars"]),
        lambda: load_tokenizer(folders["bpe"]),
        lambda: train_bpe([b"text"], 300),
        lambda: character_tokenizer([b"text"]),
    ):
        with pytest.raises(
            ValueError,
            match=r"^tokenizers other than bytes need tokenizers, which is not installed: "
            r"pip install tokenizers",
        ) as failure:
            call()
        assert "\n" not in str(failure.value)


@pytest.mark.parametrize("threads", [True, False])
def test_load_tokenizers_does_without_threads_where_there_are_none(request, monkeypatch, threads):
    if not threads:
        request.getfixturevalue("no_threads")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    load_tokenizers()
    assert os.environ["TOKENIZERS_PARALLELISM"] == ("true" if threads else "false")


# --- Made from a text -----------------------------------------------------------------------------


def test_training_reads_a_stream():
    events = []

    def pieces():
        for number in range(1000):
            events.append("given")
            yield b"the cat %d sat\n" % number

    tokenizer = train_bpe(pieces(), 300, events.append)
    assert tokenizer.vocab_size == 300
    told = [event for event in events if event != "given"]
    assert told == np.cumsum([len(b"the cat %d sat\n" % n) for n in range(1000)]).tolist()
    # What was given is told before the next is asked for.
    assert events[:4] == ["given", told[0], "given", told[1]]


def test_what_goes_wrong_with_the_text_comes_through():
    def pieces():
        yield b"text"
        raise OSError("the disk is gone")

    for make in (lambda: train_bpe(pieces(), 300), lambda: character_tokenizer(pieces())):
        with pytest.raises(OSError, match="the disk is gone"):
            make()


def test_training_repeats_itself_however_the_text_is_cut():
    cuts = [match.end() for match in module._SAFE.finditer(SAMPLE)][::7]
    pieces = [SAMPLE[a:b] for a, b in zip([0, *cuts], [*cuts, len(SAMPLE)], strict=True)]
    assert len(pieces) > 100
    assert train_bpe(pieces, 600).sha256 == tokenizer_of_kind("bpe").sha256


def test_frequent_words_become_tokens():
    tokenizer = train_bpe([b"the cat and the dog and the log "] * 9, 300)
    assert tokenizer.kind == "bpe"
    assert tokenizer.encode(" the").size == tokenizer.encode(" and").size == 1
    assert tokenizer.encode(b" the\xff the").tolist()[1] == 255


def test_bytes_that_are_no_text_teach_nothing():
    broken = b"\xff\xfe".join([b"ab"] * 50)
    expected = train_bpe([b"ab"] * 50, 300)
    assert train_bpe([broken], 300).merges == expected.merges == ((b"a", b"b"),)
    assert character_tokenizer([b"\xc3", b"\xa9\xff\xe6\x97"]).merges == ()


def test_a_vocabulary_is_as_large_as_the_text_makes_it():
    tokenizer = train_bpe([b"ab ab"], 5000)
    assert tokenizer.vocab_size == 256 + len(tokenizer.merges) + 2 < 270
    assert train_bpe([], 5000).vocab_size == 258
    assert train_bpe([SAMPLE], 259).vocab_size == 259


@pytest.mark.parametrize("size", [258, 0, -1])
def test_a_vocabulary_without_room_is_refused(size):
    for make in (train_bpe, character_tokenizer):
        with pytest.raises(ValueError, match=f"has {size} tokens, expected 259 or more"):
            make([b"text"], size)


def test_every_character_of_the_text_is_a_token():
    tokenizer = tokenizer_of_kind("chars")
    for character in sorted(set(SAMPLE.decode())):
        assert tokenizer.encode(character).size == 1
    assert tokenizer.encode("\u0416\u4e00").size == 2 + 3


def test_the_most_frequent_characters_come_first():
    text = ("\u00e9" * 5 + "\u65e5" * 9 + "\U0001f600" * 7 + "\u00e8" * 5).encode()
    whole = character_tokenizer([text, text])
    made = [whole.decode([token]) for token in range(256, whole.eos_token)]
    day, smile = "\u65e5".encode(), "\U0001f600".encode()
    assert made == [
        day[:2], day, smile[:2], smile[:3], smile, "\u00e8".encode(), "\u00e9".encode()
    ]  # fmt: skip
    # There is no room for the second, but for the one behind it.
    assert character_tokenizer([text], 261).merges == (*whole.merges[:2], whole.merges[5])
    assert character_tokenizer([text], 10_000).merges == whole.merges
    # Beginnings are shared.
    assert len(character_tokenizer(["\u65e5\u65e6".encode()]).merges) == 3


def test_kinds_are_told_by_the_tokens():
    assert SubwordTokenizer([]).kind == "chars"
    assert SubwordTokenizer([(b"\xc3", b"\xa9")]).kind == "chars"
    assert SubwordTokenizer([(b"\xa9", b"\xc3")]).kind == "bpe"
    assert SubwordTokenizer([(b"\xe6", b"\x97"), (b"\xe6\x97", b"\xa5")]).kind == "chars"
    assert SubwordTokenizer([(b"\xc0", b"\x80")]).kind == "bpe"
    assert SubwordTokenizer([(b"a", b"b")]).kind == "bpe"


def test_two_merges_may_make_the_same_token(tmp_path):
    merges = ((b"b", b"c"), (b"a", b"bc"), (b"a", b"b"), (b"ab", b"c"))
    tokenizer = SubwordTokenizer(merges)
    assert tokenizer.vocab_size == 256 + 3 + 2
    assert tokenizer.parents[257].tolist() == [97, 256]
    tokenizer.save(tmp_path)
    assert load_tokenizer(tmp_path).merges == merges
    assert read_by_library(tmp_path).encode("abc ab").ids == tokenizer.encode("abc ab").tolist()


# --- Models ---------------------------------------------------------------------------------------


def model_of(tokenizer, **changes):
    settings = {"vocab_size": tokenizer.vocab_size, "num_blocks": 1, "output_bias": False}
    return random_model(make_config(**{**settings, **changes}))


def test_a_prompt_begins_behind_the_token_for_it(tokenizer):
    generator = Generator(model_of(tokenizer), tokenizer)
    expected = [tokenizer.bos_token, *tokenizer.encode("Kim was")]
    assert generator.encode("Kim was").tolist() == expected
    assert generator.encode("").tolist() == [tokenizer.bos_token]
    assert generator.log_probabilities("Kim was").shape == (len(expected) - 1,)


@pytest.mark.parametrize("kind", SUBWORDS)
def test_the_token_for_the_end_ends_a_text(kind):
    tokenizer = SubwordTokenizer(tokenizer_of_kind(kind).merges)
    generator = Generator(model_of(tokenizer), tokenizer)
    whole = generator.complete("Kim", 40, seed=3)
    assert (whole.tokens, whole.stopped) == (40, False)
    drawn = list(generator.tokens(generator.encode("Kim"), 40, seed=3))
    # As if the twentieth that is drawn were that token.
    tokenizer.stop_tokens = (drawn[20],)
    end = drawn.index(drawn[20])
    expected = tokenizer.decode(drawn[:end]).decode("utf-8", "replace")
    found = generator.complete("Kim", 40, seed=3)
    assert (found.text, found.tokens, found.stopped) == (expected, end + 1, True)
    stream = generator.stream("Kim", 40, seed=3)
    assert "".join(stream) == expected
    assert (stream.tokens, stream.stopped) == (end + 1, True)


def test_the_end_gives_back_what_was_held():
    tokenizer = tokenizer_of_kind("bpe")
    end, padding = tokenizer.eos_token, tokenizer.eos_token + 1
    stream = TextStream(tokenizer, stop=["xyz"])
    assert [stream.feed(token) for token in (97, padding, 120, 0xC3)] == ["a", "", "", ""]
    assert not stream.stopped
    assert stream.feed(end) == "x\ufffd"
    assert stream.stopped
    assert stream.finish() == ""
    stream = TextStream(tokenizer)
    assert [stream.feed(end), stream.finish(), stream.stopped] == ["", "", True]


def test_measurements_count_bytes(tokenizer):
    tokens = np.concatenate([[tokenizer.bos_token], tokenizer.encode(SAMPLE[:300])])
    model = model_of(tokenizer)
    dataset = TokenDataset(TokenStore([tokens.astype(np.int32)]), 8, model.config.pad_token)
    metrics = evaluate(model, dataset, tokenizer=tokenizer)
    assert (metrics.tokens, metrics.bytes) == (tokens.size - 1, 300)
    bits = metrics.loss * metrics.tokens / math.log(2)
    assert metrics.bits_per_byte == pytest.approx(bits / 300)
    assert metrics.record()["val_bytes"] == 300


def test_of_no_bytes_there_are_no_bits_for_each():
    assert Metrics(1.0, 0.0, 0.0, 0.0, 1, 0).bits_per_byte == math.inf


def test_a_tokenizer_must_be_of_the_model(tmp_path):
    tokenizer = tokenizer_of_kind("bpe")
    assert fit_tokenizer(tokenizer, tokenizer.vocab_size) is tokenizer
    for size in (tokenizer.vocab_size - 1, tokenizer.vocab_size + 1, 256):
        with pytest.raises(ValueError, match=f"has {size} tokens, and its tokenizer 600"):
            fit_tokenizer(tokenizer, size)
    sizes = [fit_tokenizer(ByteTokenizer(), size).vocab_size for size in (1, 64, 256, 300)]
    assert sizes == [1, 64, 256, 256]
    assert fit_tokenizer(None, 300).vocab_size == 256
    assert tokenizer_of(tmp_path, 64).vocab_size == 64
    tokenizer.save(tmp_path)
    assert tokenizer_of(tmp_path, 600).sha256 == tokenizer.sha256
    for size in (599, 601):
        with pytest.raises(ValueError, match=f"{size} tokens, and its"):
            tokenizer_of(tmp_path, size)


def test_a_run_keeps_the_tokenizer_of_its_corpus(tmp_path):
    tokenizer = tokenizer_of_kind("bpe")
    config = make_config(vocab_size=tokenizer.vocab_size, sequence_length=8, num_blocks=1)
    data = TokenDataset(TokenStore([tokenizer.encode(SAMPLE[:2000])]), 8, config.pad_token)
    held = Corpus("a text", data, data, tokenizer=tokenizer)
    trainer = Trainer(tmp_path, config, TrainingConfig(steps=1, batch_size=2), held, {"name": "x"})
    trainer._evaluate(True)
    assert trainer.metrics.bytes > trainer.metrics.tokens
    trainer.save()
    assert load_tokenizer(tmp_path).sha256 == tokenizer.sha256
    assert Generator.load(tmp_path).tokenizer.sha256 == tokenizer.sha256
    with pytest.raises(ValueError, match="has 256 tokens, and its tokenizer 600"):
        Trainer(tmp_path, make_config(vocab_size=256), TrainingConfig(), held, {"name": "x"})


# --- Commands -------------------------------------------------------------------------------------

needs_gguf = pytest.mark.skipif(find_spec("gguf") is None, reason="gguf is not installed")


@pytest.fixture
def saved(tmp_path, monkeypatch, tokenizer):
    """A model of such tokens in the folder "model"."""
    monkeypatch.chdir(tmp_path)
    model = model_of(tokenizer)
    save_model(model, "model")
    tokenizer.save("model")
    return tokenizer


def test_generate_writes_text(saved, say):
    output, _ = say(
        "generate", "--model", "model", "--prompt", "Kim was", "--max-tokens=20", "--seed=0"
    )
    generator = Generator.load("model")
    assert generator.tokenizer.sha256 == saved.sha256
    text = generator.complete("Kim was", 20, seed=0, errors="surrogateescape").text
    assert output == b"Kim was" + text.encode("utf-8", "surrogateescape")


def test_evaluate_measures_bytes(saved, say):
    text = SAMPLE[:200]
    Path("text").write_bytes(text)
    output, _ = say("evaluate", "--model", "model", "--data", "text")
    found = dict(line.split("  ", 1) for line in output.decode().splitlines())
    assert ("nats per token" in found["validation loss"]) == (saved.kind == "bpe")
    assert ("nats per character" in found["validation loss"]) == (saved.kind != "bpe")
    loss, bits = (float(found[name].split()[0]) for name in ("validation loss", "bits per byte"))
    # Of a document every token is predicted; a text of bytes begins nowhere.
    bytes_there = len(text) - (saved.kind == "bytes")
    count = saved.encode(text).size - (saved.kind == "bytes")
    assert bits == pytest.approx(loss * count / bytes_there / math.log(2), abs=2e-4)


@needs_gguf
def test_gguf_files_bring_the_tokenizer_back(saved, say):
    say("export", "--model", "model", "--format", "gguf", "--out", "it.gguf")
    say("import", "--model", "it.gguf", "--out", "back")
    written = [Path(folder, TOKENIZER_FILE).read_bytes() for folder in ("model", "back")]
    assert written[0] == written[1]


@needs_gguf
def test_damaged_tokenizers_in_gguf_are_refused(tmp_path):
    from legacy1bit.formats.gguf import export_gguf, import_gguf_tokenizer

    tokenizer, path, rng = tokenizer_of_kind("bpe"), tmp_path / "it.gguf", random.Random(6)
    export_gguf(model_of(tokenizer), path, None, tokenizer)
    content = path.read_bytes()
    first, last = content.index(b"tokenizer.ggml.model"), content.index(b"legacy1bit.config")
    refused = 0
    for _ in range(100):
        damaged = bytearray(content)
        damaged[rng.randrange(first, last)] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            assert import_gguf_tokenizer(path).sha256 == tokenizer.sha256
        except ModelFileError:
            refused += 1
    assert refused > 90


@needs_gguf
def test_gguf_files_tell_llama_cpp_of_the_tokens(saved, say):
    import gguf

    say("export", "--model", "model", "--format", "gguf", "--out", "it.gguf")
    reader = gguf.GGUFReader("it.gguf")
    keys = {
        name.removeprefix("tokenizer.ggml."): field.contents()
        for name, field in reader.fields.items()
        if name.startswith("tokenizer.ggml.")
    }
    assert (keys["model"], keys["pre"], keys["add_bos_token"]) == ("gpt2", "gpt-2", True)
    assert keys["bos_token_id"] == saved.bos_token
    assert len(keys["tokens"]) == len(keys["token_type"]) == saved.vocab_size
    if saved.kind == "bytes":
        assert "padding_token_id" not in keys
        return
    content = saved.description()
    merged = [*content["model"]["vocab"]]
    assert keys["tokens"] == [*merged, "<|endoftext|>", "<|padding|>"]
    assert keys["token_type"] == [1] * len(merged) + [3, 3]
    assert [merge.split(" ") for merge in keys["merges"]] == content["model"]["merges"]
    ids = [keys["eos_token_id"], keys["padding_token_id"]]
    assert ids == [saved.vocab_size - 2, saved.vocab_size - 1]


def test_hugging_face_folders_have_the_tokenizer(saved, say):
    say("export", "--model", "model", "--format", "safetensors", "--out", "it")
    library = read_by_library(Path("it"))
    expected = saved.encode("Kim was a \u00e9l\u00e8ve.").tolist()
    assert library.encode("Kim was a \u00e9l\u00e8ve.").ids == [saved.bos_token, *expected]
    config = json.loads(Path("it/config.json").read_bytes())
    special = json.loads(Path("it/tokenizer_config.json").read_bytes())
    padding = None if saved.kind == "bytes" else saved.vocab_size - 1
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (
        saved.bos_token, saved.eos_token, padding
    )  # fmt: skip
    if saved.kind == "bytes":
        assert "eos_token" not in special
    else:
        assert library.token_to_id(special["bos_token"]) == saved.bos_token
        assert library.token_to_id(special["eos_token"]) == saved.eos_token
        assert library.token_to_id(special["pad_token"]) == padding


@pytest.mark.parametrize("name", ["c", "c-v1"])
def test_c_programs_know_bytes_only(saved, name, fail, say):
    command = ("export", "--model", "model", "--format", name, "--out", "it")
    if saved.kind == "bytes":
        if name == "c":
            say(*command)
        return
    assert fail(*command) == (
        f"a C program reads and writes bytes, and the model's tokens are {saved.kind}: "
        "train with --tokenizer bytes"
    )
    assert not Path("it").exists()


def test_models_and_tokenizers_that_do_not_fit_are_refused(saved, fail):
    save_model(random_model(make_config(vocab_size=300, output_bias=False)), "model")
    for command in (("generate",), ("evaluate", "--data", f"model/{TOKENIZER_FILE}")):
        assert "300 tokens" in fail(*command, "--model", "model")


NAMED = "a <|endoftext|> b <|padding|> \u00e9"


@pytest.mark.parametrize("kind", ["bytes", "chars", "bpe", "unknown"])
@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))]
)
def test_tokenizer_copies_encode_alike(kind, copied):
    """The name of a special token in a text is text, for a copy, too."""
    tokenizer = {
        "bytes": ByteTokenizer,
        "chars": lambda: character_tokenizer(["\u00e9\u20ac".encode()]),
        "bpe": lambda: train_bpe([NAMED.encode() * 9], 270),
        "unknown": lambda: UnknownTokenizer(300),
    }[kind]()
    twin = copied(tokenizer)
    assert type(twin) is type(tokenizer)
    assert (twin.kind, twin.vocab_size, twin.bos_token) == (
        kind,
        tokenizer.vocab_size,
        tokenizer.bos_token,
    )
    assert_same_bits(twin.byte_lengths, tokenizer.byte_lengths)
    assert_same_bits(twin.parents, tokenizer.parents)
    assert twin.sha256 == tokenizer.sha256
    if kind != "unknown":
        expected = tokenizer.encode(NAMED)
        assert tokenizer.eos_token not in expected
        assert_same_bits(twin.encode(NAMED), expected)
        assert twin.decode(expected) == NAMED.encode()
