"""Texts from a generator: piece by piece, whole and side by side; and what it makes of a text.

Where the embedding is ternary, too, every product is one of whole numbers: up to 256 tokens, such
models answer with the same bits in every instruction set, with any number of threads and however a
text is cut up. Most tests have such models, and compare exactly.
"""

import codecs
import copy
import functools
import gc
import json
import os
import pickle
import tracemalloc
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from helpers.arrays import assert_close, assert_same_bits
from helpers.models import MODELS, has_trits, make_config, models, random_model, wild_model
from legacy1bit import generator as module
from legacy1bit.data.tokenizer import ByteTokenizer
from legacy1bit.generator import Generator, Stream, TextStream
from legacy1bit.hyperparams import ModelConfig, SamplingConfig
from legacy1bit.inference import Decoder, sample_token
from legacy1bit.model import ModelFileError, create_legacy_llm, load_model, save_model
from legacy1bit.packed import FORMS, PackedMatrix, PackedModel

CONTEXT = 16
SAMPLING = SamplingConfig()
SAMPLINGS = {
    "default": SAMPLING,
    "greedy": SamplingConfig(temperature=0.0),
    "hot": SamplingConfig(temperature=3.0),
    "top k": SamplingConfig(top_k=5),
    "top p": SamplingConfig(top_p=0.7),
    "min p": SamplingConfig(min_p=0.2),
    "short memory": SamplingConfig(repetition_penalty=1.7, repetition_window=3),
    "whole memory": SamplingConfig(repetition_penalty=1.7, repetition_window=0),
    "all": SamplingConfig(1.3, 40, 0.9, 0.01, 0.8, 5),
}
samplings = pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)


@functools.cache
def exact_model(**changes):
    """A model whose answers have the same bits however they are worked out."""
    return PackedModel(wild_model(**{"ternary_embedding": True, **changes}))


@pytest.fixture
def generator():
    return Generator(exact_model())


def random_bytes(size, seed=1):
    return np.random.default_rng(seed).integers(0, 256, size, np.uint8).tobytes()


# Of no length, shorter than the context, as long, and longer.
PROMPTS = [random_bytes(size, size) for size in (0, 1, 3, 14, 15, 16, 17, 31, 40, 2, 8)]


# --- Tokens into text -----------------------------------------------------------------------------


def feed(data, stop=(), errors="replace"):
    """The pieces that tokens become, up to a stop, with that of the end; and the stream."""
    stream, pieces = TextStream(ByteTokenizer(), stop, errors), []
    for token in data:
        pieces.append(stream.feed(token))
        if stream.stopped:
            break
    return [*pieces, stream.finish()], stream


def cut(data, stop=(), errors="replace"):
    """The text that ends before the first stop, whether there is one, and how many tokens it took.

    After each token all is decoded anew, without an incomplete character at the end.
    """
    for size in range(len(data) + 1):
        text, _ = codecs.utf_8_decode(data[:size], errors, False)
        found = [text.index(one) for one in stop if one in text]
        if found:
            return text[: min(found)], True, size
    text = data.decode("utf-8", errors)
    found = [text.index(one) for one in stop if one in text]
    return text[: min(found)] if found else text, bool(found), len(data)


@pytest.mark.parametrize("errors", ["replace", "strict", "surrogateescape"])
def test_text_stream_gives_a_character_when_it_is_whole(errors):
    text = "a\u00e9\u20ac\U0001d11e\x00\x7f\u0080\u07ff\u0800\uffff\U00010000\U0010ffff\n\r\n"
    pieces, stream = feed(text.encode(), errors=errors)
    assert [piece for piece in pieces if piece] == list(text)
    ends = np.cumsum([len(one.encode()) for one in text]) - 1
    assert [i for i, piece in enumerate(pieces) if piece] == ends.tolist()
    assert not stream.stopped


@pytest.mark.parametrize("errors", ["replace", "surrogateescape", "ignore", "backslashreplace"])
def test_text_stream_decodes_bytes_that_are_no_text_as_python_does(errors):
    rng = np.random.default_rng(1)
    # Much of it is nearly UTF-8: first and further bytes of characters.
    likely = np.array([*range(0x7E, 0x84), 0xBF, 0xC2, 0xC3, 0xE0, 0xE2, 0xED, 0xF0, 0xF4, 0xFF])
    texts = [bytes([byte]) for byte in range(256)]
    texts += [rng.choice(likely, 12).astype(np.uint8).tobytes() for _ in range(300)]
    texts.append(random_bytes(2000))
    for data in texts:
        pieces, _ = feed(data, errors=errors)
        assert "".join(pieces) == data.decode("utf-8", errors)
        if errors == "surrogateescape":
            assert "".join(pieces).encode("utf-8", errors) == data


def test_text_stream_raises_where_it_is_told_to():
    with pytest.raises(UnicodeDecodeError, match="0xff"):
        feed(b"ab\xff", errors="strict")
    with pytest.raises(UnicodeDecodeError, match="unexpected end of data"):
        feed(b"ab\xe2\x82", errors="strict")


@pytest.mark.parametrize(
    "data", [b"\xc3", b"\xe2", b"\xe2\x82", b"\xf0", b"\xf0\x9d\x84"], ids=repr
)
@pytest.mark.parametrize("errors", ["replace", "surrogateescape", "ignore"])
def test_text_stream_holds_an_incomplete_character_to_the_end(data, errors):
    pieces, stream = feed(b"a" + data, errors=errors)
    assert pieces == ["a", *[""] * len(data), data.decode("utf-8", errors)]
    assert stream.finish() == ""


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("aaab", ["aab"], "a"),
        ("aaaab", ["aab"], "aa"),
        ("abababc", ["ababc"], "ab"),
        ("abcabd", ["abd"], "abc"),
        ("abcab", ["abd"], None),
        ("aab", ["b"], "aa"),
        ("b", ["b"], ""),
        ("xyz", ["yz", "z"], "x"),
        ("xyz", ["z", "yz"], "x"),
        ("xyz", ["xyz", "yz", "z"], ""),
        # Of two, the first that is complete ends the text.
        ("wxyz", ["wxyz", "x"], "w"),
        ("wxyz", ["zz", "xy", "y"], "w"),
        ("a\nb\n\nc", ["\n\n"], "a\nb"),
        ("a\r\nb\r\n\r\nc", ["\n\n"], "a\r\nb"),
        ("a\rb\r\n", ["\n"], "a\rb"),
        ("a\n", ["\r\n"], None),
        ("d\u00e9j\u00e0 vu", ["\u00e0"], "d\u00e9j"),
        ("d\u00e9j\u00e0 vu", ["\u00e9j\u00e0 "], "d"),
        # The same first byte, another character.
        ("d\u00e8j", ["\u00e9"], None),
        ("\U0001d11e\U0001d11f", ["\U0001d11f"], "\U0001d11e"),
        ("abc", ["abcd"], None),
        ("ab", ["abc", "b"], "a"),
        ("abab", ["c"], None),
        ("", ["a"], None),
    ],
)
def test_text_stream_ends_before_a_stop(text, stop, expected):
    pieces, stream = feed(text.encode(), stop)
    assert "".join(pieces) == (text if expected is None else expected)
    assert stream.stopped == (expected is not None)


def test_text_stream_ends_before_bytes_that_are_no_text():
    pieces, stream = feed(b"ab\xffcd", ["\udcff"], "surrogateescape")
    assert ("".join(pieces), stream.stopped) == ("ab", True)
    pieces, stream = feed(b"ab\xffcd", ["\ufffdc"])
    assert ("".join(pieces), stream.stopped) == ("ab", True)
    # It is known to be none at the end alone.
    pieces, stream = feed(b"ab\xe2", ["\ufffd"])
    assert (pieces, stream.stopped) == (["a", "b", "", ""], True)


def test_text_stream_gives_what_it_held_when_it_is_no_stop():
    assert feed(b"aabaac", ["aac"])[0] == ["", "", "aab", "", "", "", ""]
    assert feed(b"xaab", ["aac", "b!"])[0] == ["x", "", "", "aa", "b"]
    assert feed(b"ab", ["abc"])[0] == ["", "", "ab"]
    assert feed(b"ab", ["abc", "bc"])[0] == ["", "", "ab"]
    assert feed("\u20ac\u20ad".encode(), ["\u20ac!"])[0] == [*[""] * 5, "\u20ac\u20ad", ""]
    assert feed(b"a\xe2", ["ab"])[0] == ["", "", "a\ufffd"]


ALPHABETS = {
    "letters": (["a", "b"], [b"a", b"b"]),
    "characters": (
        ["a", "\u00e9", "\u00e8", "\u20ac"],
        [b"a", "\u00e9".encode(), "\u00e8".encode(), "\u20ac".encode()],
    ),
    "bytes": (["a", "\ufffd", "\u00e9"], [b"a", b"\xc3", b"\xa9", b"\xff", b"\xe2\x82"]),
    "escaped": (
        ["a", "\udcff", "\udcc3", "\udca9", "\u00e9"],
        [b"a", b"\xc3", b"\xa9", b"\xff", b"\xe2"],
    ),
}


@pytest.mark.parametrize("alphabet", ALPHABETS)
def test_text_stream_is_all_text_up_to_the_first_stop(alphabet):
    """What has been given is never taken back, holds no stop, and is not held for nothing."""
    characters, units = ALPHABETS[alphabet]
    errors = "surrogateescape" if alphabet == "escaped" else "replace"
    rng, stops = np.random.default_rng(1), 0
    for _ in range(1500):
        data = b"".join(units[i] for i in rng.integers(0, len(units), rng.integers(0, 12)))
        stop = [
            "".join(rng.choice(characters, rng.integers(1, 5))) for _ in range(rng.integers(0, 4))
        ]
        expected, stopped, size = cut(data, stop, errors)
        stream, given = TextStream(ByteTokenizer(), stop, errors), ""
        for i, token in enumerate(data[:size], 1):
            given += stream.feed(token)
            assert expected.startswith(given)
            assert not any(one in given for one in stop)
            # The end itself may be what ends the text.
            assert stream.stopped == (i == size and stopped and size < len(data)) or i == len(data)
            held = codecs.utf_8_decode(data[:i], errors, False)[0][len(given) :]
            assert stream.stopped or not held or any(one.startswith(held) for one in stop)
        given += stream.finish()
        assert (given, stream.stopped) == (expected, stopped)
        stops += stopped
    assert 200 < stops < 1300


@pytest.mark.parametrize("stop", ["a", "", "abc", [""], ["a", ""], [b"a"], [97], [None]], ids=repr)
def test_text_stream_refuses_stops_that_are_no_texts(generator, stop):
    for call in (
        lambda: TextStream(ByteTokenizer(), stop),
        lambda: generator.stream("a", 1, stop=stop),
        lambda: generator.complete("a", 1, stop=stop),
        lambda: generator.batch(["a"], 1, stop=stop),
    ):
        with pytest.raises(ValueError, match=r"stop is .* expected strings, none of them empty"):
            call()


def test_text_stream_refuses_what_is_no_token():
    for token in (-1, 256, 1 << 40):
        with pytest.raises(IndexError, match="outside 0 to 255"):
            TextStream(ByteTokenizer()).feed(token)
    with pytest.raises(IndexError, match="outside 0 to 63"):
        TextStream(ByteTokenizer(64)).feed(64)


# --- Tokens ---------------------------------------------------------------------------------------


def step_by_step(packed, prompt, count, sampling=SAMPLING, seed=0):
    """Tokens one by one, from a decoder that starts over with the newer half when it is full."""
    decoder, rng = Decoder(packed), np.random.default_rng(seed)
    seen = list(prompt)[-decoder.capacity :]
    fresh, written = seen, []
    for _ in range(count):
        if decoder.length + len(fresh) > decoder.capacity:
            decoder.clear()
            fresh = seen = seen[-max(decoder.capacity // 2, 1) :]
        written.append(sample_token(decoder.prefill(fresh), rng, sampling, seen))
        fresh = written[-1:]
        seen = seen + fresh
    return written


@samplings
@pytest.mark.parametrize("context", [1, 2, 3, 16])
def test_tokens_are_those_of_a_decoder_step_by_step(context, sampling):
    packed = exact_model(sequence_length=context)
    for prompt in (b"\n", b"abc", random_bytes(16), random_bytes(70)):
        found = list(Generator(packed).tokens(list(prompt), 5 * context + 7, sampling, 3))
        assert found == step_by_step(packed, prompt, 5 * context + 7, sampling, 3)


def test_tokens_of_contexts_of_several_blocks():
    packed = exact_model(sequence_length=300)
    for size in (127, 128, 129, 257, 299, 300, 301, 700):
        prompt = random_bytes(size)
        found = list(Generator(packed).tokens(list(prompt), 60, seed=5))
        assert found == step_by_step(packed, prompt, 60, seed=5)


@pytest.mark.parametrize("seconds", [0.0, float("inf")])
@pytest.mark.parametrize("most", [1, 2, 7, 64, 1000])
@pytest.mark.parametrize("context", [1, 3, 16, 100])
def test_tokens_are_the_same_however_many_come_at_once(monkeypatch, context, most, seconds):
    counts = []

    class Watched(Decoder):
        def generate(self, tokens, uniforms, *more):
            counts.append(len(uniforms))
            return super().generate(tokens, uniforms, *more)

    packed = exact_model(sequence_length=context)
    expected = step_by_step(packed, b"abc", 150, SAMPLINGS["all"], 4)
    monkeypatch.setattr(module, "Decoder", Watched)
    monkeypatch.setattr(module, "_MOST_AT_ONCE", most)
    monkeypatch.setattr(module, "_AT_ONCE_SECONDS", seconds)
    assert list(Generator(packed).tokens(list(b"abc"), 150, SAMPLINGS["all"], 4)) == expected
    assert sum(counts) == 150
    # One token at a time, or more as soon as that turned out to be quick.
    assert max(counts) <= min(most, context)
    assert (max(counts) > 1) == (seconds > 0.0 and most > 1 and context > 1)


def test_tokens_come_before_all_are_drawn(monkeypatch, generator):
    monkeypatch.setattr(module, "_MOST_AT_ONCE", 4)
    found = generator.tokens([1, 2], 1 << 60, seed=0)
    expected = step_by_step(generator.model, [1, 2], 40)
    assert [next(found) for _ in range(40)] == expected


def test_tokens_repeat_by_seed(generator):
    texts = [tuple(generator.tokens([72], 50, seed=seed)) for seed in (1, 1, 0, 2, 1 << 70)]
    assert texts[0] == texts[1]
    assert len(set(texts)) == 4
    # A shorter text is the beginning of a longer one.
    assert texts[0][:21] == tuple(generator.tokens([72], 21, seed=1))


def test_texts_without_a_seed_are_others_and_tell_theirs(generator):
    drawn = {tuple(generator.tokens([72], 40)) for _ in range(8)}
    assert len(drawn) == 8
    for many in ([generator.complete("a", 40) for _ in range(8)], generator.batch(["a"] * 8, 40)):
        assert len({one.text for one in many}) == 8
        for one in many:
            assert generator.complete("a", 40, seed=one.seed) == one
    streams = [generator.stream("a", 40) for _ in range(8)]
    texts = ["".join(stream) for stream in streams]
    assert len(set(texts)) == 8
    assert texts == [generator.complete("a", 40, seed=stream.seed).text for stream in streams]


def test_tokens_of_nothing(generator):
    assert list(generator.tokens([72], 0)) == []
    assert list(generator.tokens(np.arange(40), np.int64(0))) == []


@pytest.mark.parametrize(
    "kind", [np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64]
)
def test_tokens_takes_whole_numbers_of_any_kind(generator, kind):
    """A text that slides holds both the prompt's and its own."""
    prompt = np.array([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12], kind)
    found = list(generator.tokens(prompt, 40, seed=kind(2)))
    assert found == step_by_step(generator.model, prompt.tolist(), 40, seed=2)
    assert all(type(token) is int for token in found)


@pytest.mark.parametrize(
    ("value", "error"),
    [(-1, ValueError), (np.int64(-1), ValueError), (-(1 << 70), ValueError), (True, TypeError),
     (np.True_, TypeError), (1.0, TypeError), ("1", TypeError)],
    ids=repr,
)  # fmt: skip
@pytest.mark.parametrize("name", ["max_tokens", "seed"])
def test_counts_are_checked_at_the_call(generator, name, value, error):
    for call, given in (
        (generator.tokens, [1]),
        (generator.stream, "a"),
        (generator.complete, "a"),
        (generator.batch, ["a"]),
        (generator.batch, []),
    ):
        with pytest.raises(error, match=rf"{name} is .* expected (0 or more|a whole number)"):
            call(given, **{name: value})
    with pytest.raises(TypeError, match="max_tokens is None, expected a whole number"):
        generator.tokens([1], None)


@pytest.mark.parametrize("prompt", [[], (), np.zeros(0, np.int32), range(0)], ids=repr)
def test_tokens_refuses_an_empty_prompt_at_the_call(generator, prompt):
    for count in (0, 3):
        with pytest.raises(ValueError, match="the prompt is empty, expected at least one token"):
            generator.tokens(prompt, count)


@pytest.mark.parametrize("prompt", [[256], [-1], [1, 2, 1 << 31], [1 << 40], [1, -(1 << 62)]])
def test_tokens_refuses_what_is_no_token(generator, prompt):
    with pytest.raises(IndexError, match=r"is -?\d+, expected 0 to 255"):
        next(generator.tokens(prompt, 3))


@pytest.mark.parametrize(
    ("prompt", "count"), [([999] + [1] * CONTEXT, 3), ([-1] * 2 + [1] * CONTEXT, 3), ([999], 0)]
)
def test_tokens_refuses_what_is_no_token_even_if_it_is_not_looked_at(generator, prompt, count):
    with pytest.raises(IndexError, match="expected 0 to 255"):
        list(generator.tokens(prompt, count))


@pytest.mark.parametrize("prompt", [[0.5], [True], ["a"], [None], [[1, 2]], [b"a"]], ids=repr)
def test_tokens_refuses_what_are_no_whole_numbers(generator, prompt):
    with pytest.raises(TypeError, match="expected whole numbers"):
        next(generator.tokens(prompt, 3))


@pytest.mark.parametrize("prompt", ["abc", b"abc", 3, None, {1, 2}], ids=repr)
def test_tokens_refuses_what_is_no_list_of_tokens(generator, prompt):
    """A text above all, which the other functions take."""
    with pytest.raises(TypeError):
        list(generator.tokens(prompt, 3))


def test_tokens_refuses_what_are_no_settings(generator):
    with pytest.raises(TypeError, match="sampling"):
        list(generator.tokens([1], 3, {"temperature": 1.0}))


# --- Texts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("errors", ["replace", "surrogateescape"])
@pytest.mark.parametrize("prompt", PROMPTS, ids=len)
def test_stream_and_complete_are_the_text_of_the_tokens(generator, prompt, errors):
    tokens = bytes(step_by_step(generator.model, b"\n" + prompt, 60, seed=6))
    stream = generator.stream(prompt, 60, seed=6, errors=errors)
    assert isinstance(stream, Stream)
    assert iter(stream) is stream
    pieces = list(stream)
    assert all(pieces)
    assert "".join(pieces) == tokens.decode("utf-8", errors)
    assert (stream.tokens, stream.stopped) == (60, False)
    assert list(stream) == []
    whole = generator.complete(prompt, 60, seed=6, errors=errors)
    assert (whole.text, whole.tokens, whole.stopped) == ("".join(pieces), 60, False)
    assert (whole.prompt, whole.seed) == (prompt, 6)


def test_a_prompt_of_characters_is_its_bytes(generator):
    for prompt in ("", "d\u00e9j\u00e0 \U0001d11e", "a\r\nb"):
        found = generator.complete(prompt, 30, seed=1)
        assert found.prompt == prompt
        assert found.text == generator.complete(prompt.encode(), 30, seed=1).text
        assert "".join(generator.stream(prompt, 30, seed=1)) == found.text
    assert generator.encode("d\u00e9").tolist() == [10, 100, 0xC3, 0xA9]
    assert generator.encode(b"").tolist() == [10]


def test_stream_comes_in_pieces(generator):
    """The count grows with them, and there is no piece without text."""
    stream, seen = generator.stream("a", 40, seed=1, errors="surrogateescape"), b""
    tokens = bytes(step_by_step(generator.model, b"\na", 40, seed=1))
    for piece in stream:
        seen += piece.encode("utf-8", "surrogateescape")
        # Of a character that is not whole, up to three bytes are held.
        assert tokens.startswith(seen)
        assert len(seen) <= stream.tokens <= len(seen) + 3
    assert seen == tokens


def test_complete_is_the_join_of_stream(generator, monkeypatch):
    text = "".join(generator.stream("ab", 60, seed=6))
    # There is one loop for one text.
    monkeypatch.delattr(Generator, "batch")
    assert generator.complete("ab", 60, seed=6).text == text


@samplings
def test_stream_and_complete_end_before_a_stop(generator, sampling):
    for seed in range(4):
        tokens = bytes(step_by_step(generator.model, b"\nab", 60, sampling, seed))
        text = tokens.decode("utf-8", "replace")
        for stop in ([text[5]], [text[7:9], text[20]], ["none such", text[-1]], ["none such"]):
            expected, stopped, count = cut(tokens, stop)
            stream = generator.stream("ab", 60, sampling, seed, stop)
            assert "".join(stream) == expected
            assert (stream.stopped, stream.tokens) == (stopped, count)
            assert list(stream) == []
            found = generator.complete("ab", 60, sampling, seed, stop)
            assert (found.text, found.stopped, found.tokens) == (expected, stopped, count)


def test_texts_of_no_tokens(generator):
    assert list(generator.stream("ab", 0)) == []
    for found in generator.batch(["ab", ""], 0, seed=3):
        assert (found.text, found.tokens, found.stopped) == ("", 0, False)


def singles(generator, prompts, count, sampling=SAMPLING, seed=0, stop=()):
    """What each prompt gives alone: text, whether it was stopped, and how many tokens it took."""
    found = []
    for i, prompt in enumerate(prompts):
        tokens = generator.tokens(generator.encode(prompt), count, sampling, seed + i)
        found.append(cut(bytes(tokens), stop))
    return found


def assert_batch(generator, prompts, count, sampling=SAMPLING, seed=0, stop=()):
    found = generator.batch(prompts, count, sampling, seed, stop)
    expected = singles(generator, prompts, count, sampling, seed, stop)
    assert [(one.text, one.stopped, one.tokens) for one in found] == expected
    assert [one.seed for one in found] == list(range(seed, seed + len(prompts)))
    assert all(one.prompt is prompt for one, prompt in zip(found, prompts, strict=True))
    return found


@pytest.mark.parametrize("count", [1, 2, 5, 31, 32, 33, 70])
def test_batch_is_as_many_texts_alone(generator, count):
    """Of prompts of all lengths, so that the texts slide at different times."""
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(count)]
    assert_batch(generator, prompts, 40, seed=100)


@samplings
def test_batch_takes_every_sampling(generator, sampling):
    assert_batch(generator, PROMPTS, 40, sampling, seed=7)


@pytest.mark.parametrize("context", [1, 2, 3, 5, 40])
def test_batch_of_any_context(context):
    assert_batch(Generator(exact_model(sequence_length=context)), PROMPTS, 3 * context + 5, seed=1)


@pytest.mark.parametrize("most", [4, 8, 1000])
def test_batch_is_the_same_however_many_come_at_once(monkeypatch, generator, most):
    expected = singles(generator, PROMPTS, 40)
    monkeypatch.setattr(module, "_MOST_AT_ONCE", most)
    found = generator.batch(PROMPTS, 40, seed=0)
    assert [(one.text, one.stopped, one.tokens) for one in found] == expected


@pytest.mark.parametrize("together", [1, 2, 7, 128])
def test_batch_is_the_same_however_many_are_written_together(monkeypatch, generator, together):
    monkeypatch.setattr(module, "_BATCH", together)
    assert_batch(generator, PROMPTS, 30, seed=2)


EXACT = {
    "a row": {"scale": "row"},
    "2bit": {"scheme": "2bit"},
    "binary, groups": {"scheme": "binary", "scale": "128", "model_dim": 136},
    "median, two blocks": {"scheme": "ternary-median", "num_blocks": 2},
    "sub norm": {"sub_norm": True},
    "plain": {"activation": "relu", "positions": "none", "final_norm": False, "output_bias": True},
    "span": {"attention_window": 3},
}


@pytest.mark.parametrize("changes", EXACT.values(), ids=EXACT)
def test_batch_of_models_with_a_ternary_embedding(changes):
    generator = Generator(exact_model(**changes))
    assert len({one.text for one in assert_batch(generator, PROMPTS, 40)}) == len(PROMPTS)


@pytest.mark.parametrize("changes", [{}, {"scheme": "float"}], ids=str)
def test_batch_of_models_with_float_matrices(changes):
    """Their sums may be rounded differently; no number drawn here falls where that matters."""
    assert_batch(Generator(PackedModel(wild_model(**changes))), PROMPTS, 40, SAMPLINGS["top k"])


def test_batch_ends_each_text_before_its_stop(generator):
    """Some at once, some later, some never; those that go on are not disturbed."""
    texts = [text for text, _, _ in singles(generator, PROMPTS * 4, 60, seed=3)]
    stop = [texts[0][:2], texts[3][20:22], texts[5][30:33], texts[8][-2:], texts[40][10:14]]
    found = assert_batch(generator, PROMPTS * 4, 60, SAMPLING, 3, stop)
    counts = {one.tokens for one in found if one.stopped}
    assert len(counts) > 4
    assert min(counts) < 5
    assert any(not one.stopped and one.tokens == 60 for one in found)


def test_batch_that_stops_at_its_first_tokens(generator):
    stop = [chr(code) for code in range(128)] + ["\ufffd"]
    found = assert_batch(generator, PROMPTS, 60, stop=stop)
    assert all(one.text == "" and one.stopped for one in found)
    assert {one.tokens for one in found} <= {1, 2, 3, 4}


def test_batch_of_nothing_is_empty(generator):
    assert generator.batch([]) == []
    assert generator.batch((), 0) == []


@pytest.mark.parametrize("prompts", ["", "abc", b"", b"abc"], ids=repr)
def test_batch_refuses_a_single_text(generator, prompts):
    with pytest.raises(TypeError, match="prompts is one text, expected several"):
        generator.batch(prompts)


@pytest.mark.parametrize("prompts", [[1], [None], ["a", 1], [["a"]]], ids=repr)
def test_batch_refuses_what_are_no_texts(generator, prompts):
    with pytest.raises(TypeError):
        generator.batch(prompts, 3)


@pytest.mark.parametrize("kind", [np.uint8, np.int64], ids=lambda kind: kind.__name__)
def test_batch_counts_seeds_beyond_their_kind(generator, kind):
    last = np.iinfo(kind).max
    found = generator.batch(["a", "b"], 5, seed=kind(last))
    assert [one.seed for one in found] == [int(last), int(last) + 1]
    assert found[1].text == generator.complete("b", 5, seed=int(last) + 1).text
    # And what tells of them can be written down.
    assert json.dumps(found[0].seed) == str(last)


def test_completion_is_frozen(generator):
    found = generator.complete("a", 1, seed=0)
    with pytest.raises(FrozenInstanceError):
        found.text = "b"
    assert found == generator.complete("a", 1, seed=0)


# --- Memory ---------------------------------------------------------------------------------------


def decoders():
    """How many decoders there are."""
    return sum(type(one) is Decoder for one in gc.get_objects())


@pytest.fixture
def _no_collector():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("_no_collector")
@pytest.mark.parametrize("end", ["drop", "close", "with", "stop", "exhaust"])
def test_stream_lets_go_of_its_decoder_at_once(generator, end):
    before = decoders()
    text = generator.complete("a", 30, SAMPLINGS["greedy"]).text
    stream = generator.stream(
        "a", 30, SAMPLINGS["greedy"], stop=[text[9:12] if end == "stop" else "nowhere in it"]
    )
    assert isinstance(next(stream), str)
    assert decoders() == before + 1
    if end == "drop":
        del stream
    elif end == "close":
        stream.close()
    elif end == "with":
        with stream as same:
            assert same is stream
    else:
        assert "".join(stream)
        assert stream.stopped == (end == "stop")
    assert decoders() == before


@pytest.mark.usefixtures("_no_collector")
def test_tokens_let_go_of_their_decoder_at_once(generator):
    before = decoders()
    for end in (lambda drawn: None, lambda drawn: drawn.close(), list):
        drawn = generator.tokens([72], 30)
        next(drawn)
        assert decoders() == before + 1
        end(drawn)
        del drawn
        assert decoders() == before


def test_stream_that_is_closed_says_so(generator):
    stream = generator.stream("a", 30)
    next(stream)
    stream.close()
    stream.close()
    with pytest.raises(ValueError, match="the stream is closed"):
        next(stream)


def test_generator_that_is_closed_says_so():
    generator = Generator(exact_model())
    stream = generator.stream("a", 30, seed=1)
    with generator as same:
        assert same is generator
        expected = generator.complete("a", 30, seed=1).text
    generator.close()
    for call in (lambda: generator.tokens([1]), lambda: generator.stream("a"),
                 lambda: generator.complete("a"), lambda: generator.batch(["a"]),
                 lambda: generator.log_probabilities("a"), lambda: generator.embed("a"),
                 lambda: generator.model):  # fmt: skip
        with pytest.raises(ValueError, match="the generator is closed"):
            call()
    # What is being written ends.
    assert "".join(stream) == expected


def test_generator_copies_write_alike_and_streams_have_none(generator):
    twin = copy.copy(generator)
    assert twin.complete("a", 30, seed=1) == generator.complete("a", 30, seed=1)
    for one in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="a model cannot be copied or pickled: use save_model"):
            one(generator)
    for one in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="a text cannot be copied or pickled while it is"):
            one(generator.stream("a", 30))


# --- Models that know few bytes -------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 10])
def test_models_without_a_line_break_begin_with_the_prompt(size):
    generator = Generator(exact_model(vocab_size=size))
    assert generator.tokenizer.bos_token is None
    for call in (generator.encode, generator.stream, generator.complete,
                 generator.log_probabilities, generator.embed):  # fmt: skip
        for prompt in ("", b""):
            with pytest.raises(ValueError, match=r"(prompt|text) is empty, expected at least one"):
                call(prompt)
    with pytest.raises(ValueError, match="prompt is empty"):
        generator.batch([b"\0", b""])
    prompt = bytes([0, size - 1, 0])
    assert generator.encode(prompt).tolist() == [0, size - 1, 0]
    tokens = bytes(step_by_step(generator.model, prompt, 40, seed=2))
    assert "".join(generator.stream(prompt, 40, seed=2)) == tokens.decode()
    assert_batch(generator, [prompt, prompt * 9, b"\0"], 40)


def test_models_with_just_the_line_break_begin_with_it():
    generator = Generator(exact_model(vocab_size=11))
    assert generator.encode(b"\1").tolist() == [10, 1]
    assert generator.complete("", 20).tokens == 20


def test_bytes_outside_a_small_vocabulary_are_refused():
    generator = Generator(exact_model(vocab_size=64))
    assert generator.complete("0123", 5).tokens == 5
    for prompt in ("@", "0@", "\u00e9", b"\xff"):
        for call in (generator.encode, generator.stream, generator.complete,
                     generator.log_probabilities, generator.embed,
                     lambda text: generator.batch(["0", text])):  # fmt: skip
            with pytest.raises(IndexError, match="outside the vocabulary of 64 tokens"):
                call(prompt)


def test_models_of_more_tokens_than_bytes_need_a_tokenizer():
    packed = exact_model(vocab_size=300)
    with pytest.raises(ValueError, match="300 tokens, expected 1 to 256"):
        Generator(packed)
    generator = Generator(packed, ByteTokenizer())
    found = list(generator.tokens([1, 299], 40, seed=0))
    assert found == step_by_step(packed, [1, 299], 40)
    assert max(found) > 255


# --- Models and threads ---------------------------------------------------------------------------


def test_generator_packs_a_model():
    model = wild_model(ternary_embedding=True)
    generator = Generator(model)
    assert isinstance(generator.model, PackedModel)
    expected = list(Generator(exact_model()).tokens([1], 30, seed=0))
    assert list(generator.tokens([1], 30, seed=0)) == expected
    packed = exact_model()
    assert Generator(packed).model is packed


def test_generator_takes_as_many_threads_as_it_is_given(monkeypatch):
    assert Generator(exact_model()).threads == 1
    assert Generator(exact_model(), threads=3).threads == 3
    monkeypatch.setattr(module, "_SMALL", 1)
    monkeypatch.setattr(module, "default_threads", lambda: 7)
    assert Generator(exact_model()).threads == 7
    assert Generator(exact_model(), threads=1).threads == 1


@pytest.mark.parametrize("threads", [0, -1, 257])
def test_generator_refuses_other_numbers_of_threads(threads):
    generator = Generator(exact_model(), threads=threads)
    for call in (lambda: generator.tokens([1]), lambda: generator.stream("a"),
                 lambda: generator.batch(["a"]), lambda: generator.log_probabilities("a"),
                 lambda: generator.embed("a")):  # fmt: skip
        with pytest.raises(ValueError, match=f"threads is {threads}, expected 1 to 256"):
            call()


@functools.cache
def answers(name):
    """What a model answers in the instruction set in use when it is first asked."""
    return answers_of(Generator(exact_model(**WIDER[name])))


def answers_of(generator):
    return (
        [one.text for one in generator.batch(PROMPTS[:9:2], 12, seed=0, errors="surrogateescape")],
        list(generator.tokens([1, 2, 3], 30, SAMPLINGS["all"], seed=0)),
        "".join(generator.stream("The cat", 20, SAMPLINGS["greedy"])),
        generator.log_probabilities(PROMPTS[8]).tobytes(),
        generator.embed(PROMPTS[3]).tobytes(),
    )


WIDER = {
    "small": {},
    "2bit": {"model_dim": 66, "num_heads": 3, "scheme": "2bit", "sub_norm": True},
    "binary": {"model_dim": 130, "num_heads": 5, "scheme": "binary", "scale": "128"},
}


@pytest.mark.usefixtures("tier")
@pytest.mark.parametrize(("name", "threads"), list(zip(WIDER, (1, 3, 2), strict=True)))
def test_a_ternary_embedding_makes_every_instruction_set_write_the_same(name, threads):
    assert answers_of(Generator(exact_model(**WIDER[name]), threads=threads)) == answers(name)


# --- What a model makes of a text -----------------------------------------------------------------


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def log_p(packed, seen, token):
    """Log p of a token after those that are seen."""
    return log_softmax(Decoder(packed).prefill(seen))[token]


@pytest.mark.parametrize("size", [1, 2, 7, 15, 16])
def test_log_probabilities_are_the_decoders(generator, size):
    text = random_bytes(size)
    tokens = [10, *text]
    expected = log_softmax(Decoder(generator.model).prefill_logits(tokens[:-1]))
    expected = expected[np.arange(size), tokens[1:]]
    found = generator.log_probabilities(text)
    assert_close(found, expected, rtol=1e-12, atol=0, dtype=np.float64)
    assert (found < 0.0).all()


@pytest.mark.parametrize("context", [1, 2, 3, 4, 5, 16])
def test_log_probabilities_of_a_long_text_see_half_a_context(context):
    """Each is that after some number of tokens before it: half a context, if not all there are."""
    packed = exact_model(sequence_length=context)
    text = random_bytes(3 * context + 5)
    found, tokens = Generator(packed).log_probabilities(text), [10, *text]
    assert found.shape == (len(text),)
    seen = []
    for i in range(1, len(tokens)):
        sizes = range(1, min(i, context) + 1)
        near = [n for n in sizes if abs(log_p(packed, tokens[i - n : i], tokens[i]) - found[i - 1])
                < 1e-9]  # fmt: skip
        # A number that fits two of them would prove nothing.
        assert len(near) == 1
        assert near[0] >= min(i, (context + 1) // 2)
        seen += near
    assert max(seen) == context


def test_log_probabilities_of_texts_of_several_blocks():
    packed, text = exact_model(sequence_length=300), random_bytes(700)
    found, tokens = Generator(packed).log_probabilities(text), [10, *text]
    # After a full context it goes on with the newer half, up to a full one again.
    for begin, first, last in ((0, 1, 301), (150, 301, 451), (300, 451, 601), (450, 601, 701)):
        logits = log_softmax(Decoder(packed).prefill_logits(tokens[begin : last - 1]))
        expected = logits[np.arange(first - 1, last - 1) - begin, tokens[first:last]]
        # So long a text may be rounded differently where it is cut otherwise.
        assert_close(found[first - 1 : last - 1], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("changes", [{}, {"ternary_embedding": True}, {"scheme": "float"}], ids=str)
def test_log_probabilities_of_all_tokens_add_up(changes):
    generator = Generator(wild_model(vocab_size=11, **changes))
    for text in (b"", b"\1\2\3", bytes(range(10)) * 4):
        found = [generator.log_probabilities(text + bytes([last]))[-1] for last in range(11)]
        assert np.exp(found).sum() == pytest.approx(1.0, abs=1e-6 if changes == {} else 1e-5)


@pytest.mark.parametrize("size", [1, 2, 5, 40])
def test_log_probabilities_without_a_line_break_know_nothing_of_the_first(size):
    generator = Generator(exact_model(vocab_size=10))
    text = (np.arange(size) * 7 % 10).astype(np.uint8).tobytes()
    found = generator.log_probabilities(text)
    assert found.shape == (size,)
    assert np.isnan(found[0])
    assert (found[1:] < 0.0).all()
    if size > 1:
        assert found[1] == pytest.approx(log_p(generator.model, [text[0]], text[1]), rel=1e-12)


def test_log_probabilities_are_those_that_tokens_are_drawn_from(generator):
    """The likeliest continuation has the largest one."""
    text = b"The cat"
    (token,) = generator.tokens(generator.encode(text), 1, SAMPLINGS["greedy"])
    found = [generator.log_probabilities(text + bytes([last]))[-1] for last in range(256)]
    assert np.argmax(found) == token


def test_the_empty_text_has_no_probabilities_and_no_states(generator):
    for call in (generator.log_probabilities, generator.embed):
        for text in ("", b""):
            with pytest.raises(ValueError, match="text is empty, expected at least one token"):
                call(text)


@pytest.mark.parametrize("size", [1, 2, 15])
@pytest.mark.parametrize("changes", [{}, {"final_norm": False}, {"scheme": "float"}], ids=str)
def test_embed_is_what_the_output_layer_gets(changes, size):
    packed, text = PackedModel(wild_model(**changes)), random_bytes(size)
    found = Generator(packed).embed(text)
    assert found.shape == (size, 16)
    assert_same_bits(found, Decoder(packed).prefill_states([10, *text])[1:])
    assert np.isfinite(found).all()


def test_embed_takes_characters(generator):
    assert_same_bits(generator.embed("d\u00e9"), generator.embed("d\u00e9".encode()))


def test_embed_without_a_line_break():
    generator = Generator(exact_model(vocab_size=10))
    text = bytes(range(10)) + bytes(6)
    found = generator.embed(text)
    assert found.shape == (CONTEXT, 16)
    assert_same_bits(found, Decoder(generator.model).prefill_states(list(text)))
    with pytest.raises(ValueError, match="17 tokens, expected at most 16"):
        generator.embed(text + b"\0")


@pytest.mark.parametrize("size", [16, 17, 500])
def test_embed_refuses_a_text_that_does_not_fit(generator, size):
    with pytest.raises(ValueError, match=r"tokens, expected at most 1[56]$"):
        generator.embed(b"a" * size)


# --- Models out of files --------------------------------------------------------------------------


def assert_same_packed(actual, expected):
    assert actual.config == expected.config
    assert actual.parameters.keys() == expected.parameters.keys()
    for name, weights in expected.parameters.items():
        found = actual.parameters[name]
        assert type(found) is type(weights)
        if not isinstance(weights, PackedMatrix):
            assert_same_bits(found, weights, name)
            continue
        assert_same_bits(found.tiles, weights.tiles, name)
        assert_same_bits(found.scales, weights.scales, name)
        assert_same_bits(found.values, weights.values, name)
        for attribute in ("shape", "group", "levels", "trits", "nbytes"):
            assert getattr(found, attribute) == getattr(weights, attribute)
        assert found.tiles.ctypes.data % 64 == 0
    assert actual.nbytes == expected.nbytes
    assert (actual.rotary is None) == (expected.rotary is None)


def check_loaded(model, path, form, file_format="legacy1bit"):
    save_model(model, path, file_format)
    if form == "trits" and not has_trits(model.config):
        for call in (PackedModel.load, Generator.load):
            with pytest.raises(ValueError, match="trits are three levels at most and one scale"):
                call(path, form=form)
        return
    expected, loaded = PackedModel(load_model(path), form), PackedModel.load(path, form)
    assert_same_packed(loaded, expected)
    if model.config.vocab_size <= 256:
        generator = Generator.load(os.fspath(path), 2, form)
        assert_same_packed(generator.model, expected)
        assert generator.threads == 2
    # What the kernels read, too.
    prompt = [0, 1, model.config.vocab_size - 1]
    assert_same_bits(Decoder(loaded).prefill(prompt), Decoder(expected).prefill(prompt))


@models
@pytest.mark.parametrize("form", FORMS)
def test_load_packs_what_load_model_reads(tmp_path, changes, form):
    check_loaded(random_model(make_config(**changes)), tmp_path / "model", form)


# Columns around tiles of 16 and 20 and around bytes, rows around a strip of 32 and around the 64
# strips that are packed at once.
SHAPES = [(3, 1), (31, 3), (32, 15), (33, 16), (34, 17), (63, 19), (64, 20), (65, 21), (2047, 5),
          (2048, 6), (2049, 7), (4100, 2), (11, 127), (12, 130)]  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scheme", ["ternary", "binary", "2bit"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_load_packs_odd_shapes(tmp_path, shape, scheme, form):
    config = make_config(vocab_size=shape[0], model_dim=shape[1], num_heads=1, num_blocks=1,
                         ffn_multiplier=1, positions="none", scheme=scheme, scale="row",
                         ternary_embedding=True)  # fmt: skip
    check_loaded(random_model(config), tmp_path / "model", form)


@pytest.mark.parametrize("form", FORMS)
def test_load_reads_a_file_of_the_c_original(tmp_path, form):
    check_loaded(random_model(ModelConfig.c_original(12, 12)), tmp_path / "c.bin", form, "c-v1")


def test_load_leaves_the_folder_and_forgets_it(tmp_path):
    """A mapped file that stays open could not be replaced everywhere."""
    save_model(random_model(make_config()), tmp_path / "model")
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    packed = PackedModel.load(tmp_path / "model")
    expected = Decoder(packed).prefill([1, 2, 3])
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before
    (tmp_path / "model" / "model.safetensors").write_bytes(b"")
    assert_same_bits(Decoder(packed).prefill([1, 2, 3]), expected)


def test_load_refuses_other_forms(tmp_path):
    save_model(random_model(make_config()), tmp_path / "model")
    for form in ("3bit", "", None):
        with pytest.raises(ValueError, match=r"form is .* expected 2bit or trits"):
            PackedModel.load(tmp_path / "model", form)


def test_load_of_what_is_not_there_is_an_os_error(tmp_path):
    for call in (PackedModel.load, Generator.load):
        with pytest.raises(FileNotFoundError, match="no-such-model"):
            call(tmp_path / "no-such-model")


def outcome(call, path):
    """What a call gives, or the text of its refusal; any other error fails the test."""
    try:
        return call(path)
    except ModelFileError as error:
        return str(error)


def assert_as_load_model(path):
    """Refused in the same words, or read as the same model; return whether it was refused."""
    expected, found = outcome(load_model, path), outcome(PackedModel.load, path)
    if isinstance(expected, str):
        assert found == expected
        with pytest.raises(ModelFileError):
            Generator.load(path)
        return True
    assert_same_packed(found, PackedModel(expected))
    return False


def edit_tensors(folder, edit):
    path, tensors = folder / "model.safetensors", {}
    with safe_open(path, "np") as file:
        metadata = file.metadata()
        # A handle is no dictionary.
        for name in file.keys():  # noqa: SIM118
            tensors[name] = file.get_tensor(name).copy()
    edit(tensors)
    save_file(tensors, path, metadata)


def put(name, place, value):
    return lambda tensors: tensors[name].reshape(-1).__setitem__(place, value)


CODES, SCALE = "blocks.0.attention.wq.codes", "blocks.1.ffn.wo.scale"
EDITS = {
    "code three": put(CODES, 0, 3),
    "code three at the end": put("output.weight.codes", -1, 0x0C),
    # Rows of 14 codes leave half of their last byte open.
    "bits a row leaves open": put(CODES, 3, 0x10),
    "infinite scale": put(SCALE, 0, np.inf),
    "scale that is no number": put(SCALE, 0, np.nan),
    "float that is no number": put("blocks.1.norm2.beta", -1, np.nan),
    "infinite bias": put("output.bias", 0, -np.inf),
    "missing codes": lambda tensors: tensors.pop(CODES),
    "missing scale": lambda tensors: tensors.pop(SCALE),
    "extra": lambda tensors: tensors.update({"extra": np.ones(1, np.float32)}),
    "wide": lambda tensors: tensors.update({CODES: np.zeros((14, 5), np.uint8)}),
    "float32 scale": lambda tensors: tensors.update({SCALE: np.ones((1, 1), np.float32)}),
    "float codes": lambda tensors: tensors.update({CODES: np.zeros((14, 14), np.float32)}),
}


@pytest.fixture
def folder(tmp_path):
    config = make_config(model_dim=14, num_heads=1, ternary_embedding=True)
    save_model(random_model(config), tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("edit", EDITS)
def test_load_refuses_what_load_model_refuses(folder, edit):
    assert not assert_as_load_model(folder)
    edit_tensors(folder, EDITS[edit])
    assert assert_as_load_model(folder)


def test_load_refuses_a_scale_other_than_one_where_it_is_one(tmp_path):
    save_model(random_model(make_config(scale="one")), tmp_path)
    edit_tensors(tmp_path, put(SCALE, 0, 2.0))
    assert assert_as_load_model(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_load_refuses_files_that_are_cut_off_or_missing(folder, name):
    data = (folder / name).read_bytes()
    for size in {0, 1, 8, len(data) // 2, len(data) - 3}:
        (folder / name).write_bytes(data[:size])
        assert assert_as_load_model(folder)
    (folder / name).unlink()
    assert assert_as_load_model(folder)


@pytest.mark.parametrize("changes", [{}, {"scheme": "binary"}, {"scheme": "2bit"}], ids=str)
def test_load_takes_or_refuses_a_damaged_byte_as_load_model_does(tmp_path, changes):
    config = make_config(model_dim=14, num_heads=1, ternary_embedding=True, **changes)
    save_model(random_model(config), tmp_path / "model")
    path, rng, refused = tmp_path / "model" / "model.safetensors", np.random.default_rng(1), 0
    data = bytearray(path.read_bytes())
    for position in rng.integers(0, len(data), 60):
        former, data[position] = data[position], data[position] ^ (1 << int(rng.integers(8)))
        path.write_bytes(data)
        refused += assert_as_load_model(tmp_path / "model")
        data[position] = former
    assert 0 < refused < 60


def test_load_refuses_a_damaged_file_of_the_c_original(tmp_path):
    path = tmp_path / "c.bin"
    save_model(random_model(ModelConfig.c_original(8, 8)), path, "c-v1")
    data = path.read_bytes()
    for damaged in (b"", b"text", data[:-1], data + b"\0", data[:28] + b"\5" + data[29:]):
        path.write_bytes(damaged)
        assert assert_as_load_model(path)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scheme", ["ternary", "binary"])
def test_load_takes_little_more_memory_than_it_keeps(tmp_path, scheme, form):
    """Beside what is packed, room for some copies of one matrix; never a float for a weight."""
    config = ModelConfig(model_dim=256, num_blocks=8, sequence_length=32, scheme=scheme)
    save_model(create_legacy_llm(config, 1, trainable=False), tmp_path / "model")
    tracemalloc.start()
    try:
        packed = PackedModel.load(tmp_path / "model", form)
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # The largest: a feed-forward layer's codes, or a matrix of floats.
    largest = max(256 * 1024 // 4, 4 * 256 * 256)
    assert packed.nbytes <= kept < packed.nbytes + 2 * largest
    assert peak < packed.nbytes + 5 * largest
    # Smaller than a byte for each weight of the blocks alone.
    assert packed.nbytes + 5 * largest < 8 * 12 * 256 * 256


def test_every_set_of_options_is_loaded():
    """Those of the tests above hold matrices of each kind, in both forms."""
    configs = [make_config(**changes) for changes in MODELS.values()]
    assert {config.scheme for config in configs} >= {"ternary", "binary", "2bit", "float"}
    assert {has_trits(config) for config in configs} == {True, False}
