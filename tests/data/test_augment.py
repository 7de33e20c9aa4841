"""Augmentation: what changes, how much of it, and that all else stays as it was."""

import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.arrays import assert_same_bits
from legacy1bit.data.augment import Augmentation
from legacy1bit.data.shards import TokenStore
from legacy1bit.data.stories import corpus, generate_stories
from legacy1bit.data.tokenizer import (
    ByteTokenizer,
    UnknownTokenizer,
    character_tokenizer,
    train_bpe,
)
from legacy1bit.dataset import Batch, TokenDataset
from legacy1bit.hyperparams import DataConfig

TEXT = corpus(generate_stories(120, 3)).replace(".\n", ".\nÄpfel zu 3 €, MIT  Öl\n").encode()

KINDS = {
    "bytes": ByteTokenizer(),
    "chars": character_tokenizer([TEXT]),
    "bpe": train_bpe([TEXT], 400),
}
kinds = pytest.mark.parametrize("kind", KINDS)

INPUTS = ("token_dropout", "span_masking")
TEXTS = ("subword_splitting", "case_noise", "space_noise")


def batch_of(kind, rows=40, length=64, order="epochs"):
    """A batch of a text with specials in it, and what pads it; some rows are padded."""
    tokenizer = KINDS[kind]
    begin = [] if tokenizer.eos_token is None else [np.array([tokenizer.eos_token], np.int32)]
    documents = [
        part for text in TEXT.splitlines(keepends=True) for part in (*begin, tokenizer.encode(text))
    ]
    tokens, pad = np.concatenate(documents), tokenizer.vocab_size
    dataset = TokenDataset(TokenStore([tokens]), length, pad, order=order)
    starts = np.arange(rows) * 50 % (tokens.size - length)
    sizes = np.where(np.arange(rows) % 4, length + 1, 1 + np.arange(rows) % (length + 1))
    return dataset.sequences(starts, starts + sizes), pad


def augmented(kind, batch, position=(3,), seed=1, **settings):
    tokenizer = KINDS[kind]
    change = Augmentation(DataConfig(**settings), tokenizer, tokenizer.vocab_size, seed)
    assert change.active
    return change(batch, position)


def texts_of(kind, batch, pad):
    """For each row its tokens and the last target."""
    for row, goal in zip(batch.tokens, batch.targets, strict=True):
        size = int((goal != pad).sum())
        assert (goal[size:] == pad).all()
        assert (row[: size + 1] != pad).sum() >= size
        yield np.append(row[:size], goal[size - 1 : size])


def assert_rows_in_shape(batch, before, pad):
    for part in batch[:2]:
        assert part.dtype == np.int32
        assert part.shape == before.tokens.shape
        assert part.min() >= 0
        assert part.max() <= pad
    counted = batch.targets != pad
    assert (batch.tokens[counted] != pad).all()
    # Padding is at the end alone, and each target is the next input.
    assert (np.diff(counted.astype(int), axis=1) <= 0).all()
    assert (batch.tokens[:, 1:] == batch.targets[:, :-1])[counted[:, 1:]].all()


def assert_share(count, total, share):
    """A count of ``total`` tries: within five standard deviations."""
    assert abs(count - share * total) <= 5 * math.sqrt(share * (1 - share) * total) + 1e-9


# --- What is the same for all ---------------------------------------------------------------------


@kinds
def test_nothing_is_changed_unless_asked(kind):
    batch, pad = batch_of(kind)
    change = Augmentation(DataConfig(), KINDS[kind], pad, 1)
    assert not change.active
    for one, other in zip(change(batch, (0,))[:2], batch[:2], strict=True):
        assert_same_bits(one, other)


@kinds
@pytest.mark.parametrize("name", [*INPUTS, *TEXTS])
def test_augmentation_is_a_function_of_seed_and_position(kind, name):
    batch, _ = batch_of(kind)
    kept = [part.copy() for part in batch[:2]]
    positions = [(0,), (1,), (1, 0, 2), (1, 2, 0), ((1 << 62) - 1,)]
    found = [augmented(kind, batch, p, s, **{name: 0.4}) for p in positions for s in (1, 2)]
    for one, other in zip(batch[:2], kept, strict=True):
        assert_same_bits(one, other)
    again = [augmented(kind, batch, p, s, **{name: 0.4}) for p in positions for s in (1, 2)]
    for one, other in zip(found, again, strict=True):
        assert_same_bits(one.tokens, other.tokens)
        assert_same_bits(one.targets, other.targets)
    if kind != "bytes" or name != "subword_splitting":
        assert len({one.tokens.tobytes() for one in found}) == len(found)


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from([*KINDS]),
    st.fixed_dictionaries({name: st.sampled_from([0.0, 0.3, 1.0]) for name in TEXTS}),
    st.integers(1, 9),
    st.integers(1, 70),
)
def test_changed_texts_stay_rows(kind, shares, rows, length):
    batch, pad = batch_of(kind, rows, length)
    if any(shares.values()):
        found = augmented(kind, batch, **shares)
        assert_rows_in_shape(found, batch, pad)
        # A row that has something to learn keeps something.
        assert ((found.targets != pad).any(axis=1) == (batch.targets != pad).any(axis=1)).all()


# --- What is read ---------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("share", [0.02, 0.3, 0.9])
def test_inputs_change_as_often_as_asked(kind, name, share):
    batch, pad = batch_of(kind, rows=400)
    found = augmented(kind, batch, **{name: share})
    assert_same_bits(found.targets, batch.targets)
    padding = batch.tokens == pad
    assert padding.any()
    assert ((found.tokens == pad) == padding).all()
    changed = (found.tokens != batch.tokens)[~padding]
    # A random token may be the one that was there; hidden ones come three together, and so spread
    # no more than three times as far.
    if name == "token_dropout":
        assert_share(changed.sum(), changed.size, share * (1 - 1 / 256))
    else:
        assert abs(changed.mean() - share) < 5 * math.sqrt(3 * share * (1 - share) / changed.size)
        # At the beginning of a row as anywhere.
        first = (found.tokens != batch.tokens)[:, 0]
        assert_share(first.sum(), first.size, share)


@kinds
def test_dropped_tokens_may_be_any_of_the_text(kind):
    batch, pad = batch_of(kind, rows=400)
    found = augmented(kind, batch, token_dropout=1.0).tokens
    specials = 0 if kind == "bytes" else 2
    kept = found[batch.tokens != pad]
    assert kept.max() == pad - specials - 1
    assert np.unique(kept).size == pad - specials


@kinds
def test_hidden_tokens_come_in_spans_of_what_no_text_has(kind):
    batch, pad = batch_of(kind, rows=400)
    found = augmented(kind, batch, span_masking=0.05)
    hidden = 0 if kind == "bytes" else KINDS[kind].padding_token
    masked = found.tokens != batch.tokens
    assert set(found.tokens[masked].tolist()) == {hidden}
    # Inside of rows runs are of three, but where two spans meet.
    inner = np.diff(np.pad(masked[:, 3:-3] & (batch.tokens != pad)[:, 3:-3], ((0, 0), (1, 1))) * 1)
    begins, ends = (np.argwhere(inner == sign) for sign in (1, -1))
    runs = (ends - begins)[(begins[:, 1] > 0) & (ends[:, 1] < masked.shape[1] - 6)][:, 1]
    whole = (batch.tokens != pad).all(axis=1)
    runs = runs[whole[begins[(begins[:, 1] > 0) & (ends[:, 1] < masked.shape[1] - 6)][:, 0]]]
    assert runs.min() == 3
    assert (runs == 3).mean() > 0.8


# --- What is read and predicted -------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("share", [0.05, 0.5, 1.0])
def test_splitting_keeps_the_text(kind, share):
    tokenizer = KINDS[kind]
    batch, pad = batch_of(kind)
    found = augmented(kind, batch, subword_splitting=share)
    assert_rows_in_shape(found, batch, pad)
    for old, new in zip(texts_of(kind, batch, pad), texts_of(kind, found, pad), strict=True):
        one, other = tokenizer.decode(old), tokenizer.decode(new)
        assert one.startswith(other)
        assert other == one or new.size == batch.tokens.shape[1] + 1
        # A beginning of fewer specials, where the row is cut; else all of them in their places.
        kept = new[new == tokenizer.eos_token]
        assert kept.size <= (old == tokenizer.eos_token).sum()
        if other == one and new.size <= batch.tokens.shape[1]:
            assert kept.size == (old == tokenizer.eos_token).sum()
        if share == 1.0:
            assert ((new < 256) | (new == tokenizer.eos_token)).all()
    if kind == "bytes":
        assert_same_bits(found.targets, batch.targets)


def test_splitting_takes_merges_back_as_often_as_asked():
    tokenizer = KINDS["bpe"]
    # One token that was merged of two bytes, many times: what is split cannot be split again.
    token = int(np.flatnonzero(tokenizer.byte_lengths == 2)[0])
    row = np.full((200, 64), token, np.int32)
    found = augmented("bpe", Batch(row, row), subword_splitting=0.2).tokens
    whole = int((found == token).sum())
    split = int((found == tokenizer.parents[token, 0]).sum())
    assert_share(split, whole + split, 0.2)
    # Of what is left of a merge, again.
    longest = int(tokenizer.byte_lengths.argmax())
    row[:] = longest
    pieces = augmented("bpe", Batch(row, row), subword_splitting=0.5).tokens
    assert np.unique(pieces).size > 4


@kinds
def test_case_noise_changes_the_case_alone(kind):
    tokenizer = KINDS[kind]
    batch, pad = batch_of(kind, rows=100)
    changed = words = 0
    found = augmented(kind, batch, case_noise=0.3)
    assert_rows_in_shape(found, batch, pad)
    for old, new in zip(texts_of(kind, batch, pad), texts_of(kind, found, pad), strict=True):
        one, other = tokenizer.decode(old), tokenizer.decode(new)
        assert one.lower().startswith(other.lower())
        assert len(one) == len(other) or new.size == batch.tokens.shape[1] + 1
        # ASCII letters are in their places, and nothing else has moved.
        assert re.sub(rb"[A-Za-z]", b"x", one).startswith(re.sub(rb"[A-Za-z]", b"x", other))
        for word in re.finditer(rb"[A-Za-z]+", one[: len(other)]):
            words += 1
            now = other[word.start() : word.end()]
            changed += now != word[0]
            assert now in {word[0], word[0].lower(), word[0].upper(), word[0].capitalize()}
    assert_share(changed, words, 0.3)


@kinds
def test_space_noise_changes_spaces_alone(kind):
    tokenizer = KINDS[kind]
    batch, pad = batch_of(kind, rows=100)
    found = augmented(kind, batch, space_noise=1.0)
    assert_rows_in_shape(found, batch, pad)
    doubled = broken = 0
    for old, new in zip(texts_of(kind, batch, pad), texts_of(kind, found, pad), strict=True):
        one, other = tokenizer.decode(old), tokenizer.decode(new)
        pattern = re.escape(one).replace(rb"\ ", rb"(?:  |\n)")
        # Cut in the middle it is the beginning of such a text.
        if new.size <= batch.tokens.shape[1]:
            assert re.fullmatch(pattern, other)
        at = 0
        for byte in one:
            if at >= len(other):
                break
            if byte != ord(" "):
                assert other[at] == byte
                at += 1
            elif other[at] == ord("\n"):
                at, broken = at + 1, broken + 1
            else:
                assert other[at : at + 2] in (b"  ", b" "[: len(other) - at])
                at, doubled = at + 2, doubled + 1
    assert_share(doubled, doubled + broken, 0.5)


def test_space_noise_is_as_frequent_as_asked():
    tokens = KINDS["bytes"].encode(b"a " * 20_000).reshape(200, 200)
    batch = Batch(tokens[:, :-1].copy(), tokens[:, 1:].copy())
    found = augmented("bytes", batch, space_noise=0.1)
    # Behind every "a" there is a single space, two, or a line break.
    text = b"".join(bytes(row.astype(np.uint8)) for row in found.tokens)
    spaces = re.findall(rb"(?<=a)(  ?|\n)(?=a)", text)
    assert_share(sum(s != b" " for s in spaces), len(spaces), 0.1)


@pytest.mark.parametrize("kind", ["chars", "bpe"])
@pytest.mark.parametrize("name", TEXTS)
def test_special_tokens_survive_changes_of_text(kind, name):
    tokenizer = KINDS[kind]
    text = b"Once upon a time"
    tokens = np.concatenate(
        [part for _ in range(4) for part in ([tokenizer.eos_token] * 2, tokenizer.encode(text))]
    ).astype(np.int32)
    rows = np.full((1, 400), tokenizer.vocab_size, np.int32)
    goals = rows.copy()
    rows[0, : tokens.size - 1], goals[0, : tokens.size - 1] = tokens[:-1], tokens[1:]
    found = augmented(kind, Batch(rows, goals), **{name: 1.0})
    (new,) = texts_of(kind, found, tokenizer.vocab_size)
    pieces = np.split(new, np.flatnonzero(new == tokenizer.eos_token))
    decoded = [tokenizer.decode(piece) for piece in pieces]
    assert len(decoded) == 9
    assert decoded[0:2] == [b"", b""]
    assert {decoded[i] for i in (1, 3, 5, 7)} == {b""}
    for piece in decoded[2::2]:
        assert b"".join(piece.lower().split()) == b"onceuponatime"


# --- What is refused ------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("rows", [{"order": "packed"}, {"document_mask": True}])
def test_changes_of_length_are_refused_where_rows_are_shared(kind, name, rows):
    config = DataConfig(**{name: 0.1}, **rows)
    with pytest.raises(ValueError, match="change the lengths of documents: expected 0") as error:
        Augmentation(config, KINDS[kind], 300, 1)
    assert "\n" not in str(error.value)


@kinds
@pytest.mark.parametrize("name", INPUTS)
def test_inputs_change_in_packed_rows_too(kind, name):
    batch, _ = batch_of(kind)
    starts = np.zeros_like(batch.tokens)
    found = augmented(
        kind, batch._replace(starts=starts), order="packed", document_mask=True, **{name: 0.5}
    )
    assert found.starts is starts
    assert_same_bits(found.targets, batch.targets)


@pytest.mark.parametrize("name", ["case_noise", "space_noise"])
def test_text_that_nobody_can_read_is_not_changed(name):
    with pytest.raises(ValueError, match="is not known: expected 0"):
        Augmentation(DataConfig(**{name: 0.1}), UnknownTokenizer(40), 40, 1)


def test_inputs_of_unknown_tokens_change():
    change = Augmentation(
        DataConfig(token_dropout=1.0, subword_splitting=1.0), UnknownTokenizer(40), 40, 1
    )
    rows = np.full((50, 40), 7, np.int32)
    found = change(Batch(rows, rows), (0,))
    assert_same_bits(found.targets, rows)
    assert np.unique(found.tokens).tolist() == list(range(40))
