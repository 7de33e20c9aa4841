"""Batches and sweeps: which tokens they hold, and that nothing but seed and position decides."""

import copy
import gc
import math
import pickle
import re
import threading
import time
from collections import Counter
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from helpers.arrays import assert_close, assert_same_bits
from helpers.models import make_config, random_model
from legacy1bit import dataset as module
from legacy1bit.backward import BackwardPass
from legacy1bit.data import stories
from legacy1bit.data.corpus import story_corpus, text_corpus
from legacy1bit.data.shards import TokenStore
from legacy1bit.dataset import MixedDataset, Prefetcher, TokenDataset, pack, shuffled
from legacy1bit.forward import document_starts
from legacy1bit.model import create_legacy_llm_gradients

PAD = 256


def counting(size, length):
    """A dataset whose tokens tell where they stand."""
    return TokenDataset(TokenStore([np.arange(size, dtype=np.int32)]), length, 1 << 20)


def all_of(dataset):
    """All tokens of a dataset."""
    return dataset.tokens.read(0, dataset.tokens.size)


def text_of(row):
    """The text of a row of tokens, which may end in padding but hold none before."""
    kept = row[row != PAD]
    assert (row[: kept.size] != PAD).all()
    return bytes(kept.astype(np.uint8)).decode()


def swept(dataset, batch_size, limit=0):
    """All rows of a sweep: tokens, targets."""
    batches = list(dataset.sweep(batch_size, limit))
    assert all(1 <= len(tokens) <= batch_size for tokens, *_ in batches)
    assert all(len(tokens) == batch_size for tokens, *_ in batches[:-1])
    return tuple(
        np.concatenate(part) for part in zip(*((b.tokens, b.targets) for b in batches), strict=True)
    )


# --- Batches of a text ----------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 7, 16])
@pytest.mark.parametrize("batch_size", [1, 5])
def test_batch_holds_whole_windows_and_what_follows(length, batch_size):
    dataset = counting(100, length)
    for step in range(20):
        tokens, targets, _ = dataset.batch(step, batch_size, seed=3)
        for part in (tokens, targets):
            assert part.dtype == np.int32
            assert part.shape == (batch_size, length)
        assert (targets == tokens + 1).all()
        assert (tokens == tokens[:, :1] + np.arange(length)).all()
        assert targets.max() < 100


def test_batch_draws_every_window():
    dataset = counting(12, 4)
    starts = np.concatenate([dataset.batch(step, 64, 0)[0][:, 0] for step in range(8)])
    assert set(starts) == set(range(8))
    counts = np.bincount(starts)
    # Eight equally likely windows: a standard deviation of about 7.5 around 64.
    assert abs(counts - 64).max() < 5 * 7.5


def test_batch_is_a_function_of_seed_and_step():
    dataset, again = counting(5000, 8), counting(5000, 8)
    forwards = [dataset.batch(step, 4, seed=9) for step in range(6)]
    for step in reversed(range(6)):
        for one, other in zip(forwards[step][:2], again.batch(step, 4, seed=9)[:2], strict=True):
            assert_same_bits(one, other)


def test_batch_differs_by_seed_and_step():
    dataset = counting(100_000, 8)
    firsts = {
        (seed, step): tuple(dataset.batch(step, 4, seed)[0][:, 0])
        for seed in range(8)
        for step in range(8)
    }
    assert len(set(firsts.values())) == len(firsts)


@pytest.mark.parametrize("seed", [0, (1 << 63) - 1])
@pytest.mark.parametrize("step", [0, (1 << 40) - 1])
def test_batch_takes_the_largest_numbers(seed, step):
    tokens, *_ = counting(50, 8).batch(step, 3, seed)
    assert tokens.shape == (3, 8)


def test_batch_does_not_change_the_text():
    dataset = counting(50, 8)
    for part in dataset.batch(0, 4, 0)[:2]:
        part[...] = -1
    assert_same_bits(dataset.tokens.read(0, 50), np.arange(50, dtype=np.int32))


@pytest.mark.parametrize("size", [0, 1, 8])
def test_dataset_refuses_fewer_tokens_than_a_sequence_needs(size):
    with pytest.raises(ValueError, match=f"{size} tokens are too few.* needs 9"):
        counting(size, 8)


def test_dataset_of_one_sequence_gives_it_always():
    tokens, targets, _ = counting(9, 8).batch(5, 3, 1)
    assert (tokens == np.arange(8)).all()
    assert (targets == np.arange(1, 9)).all()


# --- Sweeps of a text -----------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "length"), [(2, 1), (9, 1), (5, 4), (8, 4), (9, 4), (10, 4)])
@pytest.mark.parametrize("more", [0, 1, 20, 101])
@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_sweep_covers_every_token_once(size, length, more, batch_size):
    size += more
    dataset = counting(size, length)
    tokens, targets = swept(dataset, batch_size)
    pad = dataset.pad_token
    assert tokens.dtype == targets.dtype == np.int32
    counted = (tokens != pad) & (targets != pad)
    # The last token is a target only.
    assert (targets[counted] == np.arange(1, size)).all()
    assert (tokens[counted] == np.arange(size - 1)).all()
    assert (targets[targets != pad] == np.arange(1, size)).all()


@pytest.mark.parametrize("limit", [1, 7, 50, 99, 100, 101, 250, 399, 400, 401, 10_000])
def test_sweep_limit_leaves_out_whole_sequences_evenly(limit):
    dataset = counting(401, 4)
    whole, _ = swept(dataset, 16)
    tokens, targets = swept(dataset, 16, limit)
    starts = tokens[:, 0]
    assert set(starts) <= set(whole[:, 0])
    assert starts[0] == 0
    assert len(set(np.diff(starts))) <= 1
    assert (targets == tokens + 1).all()
    # About: a stride is a whole number, so that up to twice as many are left.
    assert min(limit, 400) <= tokens.size <= max(2 * limit, 4)


def test_sweep_does_not_depend_on_the_batch_size():
    dataset = counting(333, 8)
    for limit in (0, 100):
        expected = swept(dataset, 1, limit)
        for batch_size in (2, 7, 1000):
            for one, other in zip(swept(dataset, batch_size, limit), expected, strict=True):
                assert_same_bits(one, other)


# --- Any text -------------------------------------------------------------------------------------


def test_text_corpus_keeps_the_last_tenth():
    text = bytes(range(256)) * 4
    corpus = text_corpus(text, "bytes.bin", 16, PAD)
    assert corpus.name == "bytes.bin"
    assert corpus.floor is None
    assert corpus.stories == ()
    assert corpus.validation.tokens.size == len(text) // 10
    joined = np.concatenate([all_of(corpus.training), all_of(corpus.validation)])
    assert bytes(joined.astype(np.uint8)) == text
    for part in (corpus.training, corpus.validation):
        assert (part.sequence_length, part.pad_token) == (16, PAD)


def test_text_corpus_trains_on_nothing_that_it_validates_on():
    text = b"a" * 900 + b"b" * 100
    corpus = text_corpus(text, "text", 16, PAD)
    batches = [corpus.training.batch(step, 8, 0) for step in range(50)]
    assert {int(token) for batch in batches for part in batch[:2] for token in part.flat} == {
        ord("a")
    }
    tokens, targets = swept(corpus.validation, 8)
    assert set(tokens.flat) | set(targets.flat) == {ord("b"), PAD}


@pytest.mark.parametrize("length", [1, 2, 8, 15, 100, 255, 256])
def test_text_corpus_says_how_much_text_it_needs(length):
    with pytest.raises(ValueError, match=f"tiny has 1 bytes, too few .* {length}") as error:
        text_corpus(b"a", "tiny", length, PAD)
    needed = int(re.search(r"at least (\d+)", str(error.value))[1])
    corpus = text_corpus(b"a" * needed, "tiny", length, PAD)
    assert corpus.validation.tokens.size > length
    with pytest.raises(ValueError, match="too few"):
        text_corpus(b"a" * (needed - 1), "tiny", length, PAD)


# --- The bundled stories --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def corpus():
    return story_corpus(60, 20, seed=5, sequence_length=256, pad_token=PAD)


def test_story_corpus_is_the_stories_of_its_seed(corpus):
    told = stories.generate_stories(80, 5)
    assert text_of(all_of(corpus.training)) == "\n" + stories.corpus(told[:60])
    assert text_of(all_of(corpus.validation)) == "\n" + stories.corpus(told[60:])
    assert corpus.stories == tuple(told[60:])
    assert corpus.floor == stories.entropy_per_character()
    assert corpus.name == "60 stories"
    assert story_corpus(12345, 1, 0, 8, PAD).name == "12,345 stories"


def test_story_corpus_windows_begin_with_a_story(corpus):
    learned = stories.generate_stories(60, 5)
    begun, ended = set(), 0
    for step in range(100):
        tokens, targets, _ = corpus.training.batch(step, 16, seed=1)
        for row, following in zip(tokens, targets, strict=True):
            text = text_of(row)
            assert text.startswith("\n")
            first, *rest = text[1:].split("\n")
            begun.add(first)
            # The window runs on into the stories that come next, in their order.
            index = learned.index(first)
            for story, after in zip(rest, [*learned[index + 1 :], ""], strict=False):
                assert after.startswith(story)
            ended += PAD in row
            assert_same_bits(following[:-1], row[1:])
    assert begun == set(learned)
    # Only behind the last story there is padding.
    assert ended


def test_story_corpus_window_of_the_last_story_ends_in_padding(corpus):
    last = int(corpus.training.starts[-1])
    size = corpus.training.tokens.size - last
    rows = [corpus.training.batch(step, 8, seed=1)[0] for step in range(30)]
    padded = [row for batch in rows for row in batch if PAD in row]
    for row in padded:
        assert (row[: row.tolist().index(PAD)] != PAD).all()
    assert any((row[:size] == all_of(corpus.training)[last:][: row.size]).all() for row in padded)


def test_story_corpus_validates_each_story_alone(corpus):
    tokens, targets = swept(corpus.validation, 7)
    assert [text_of(row) for row in targets] == [story + "\n" for story in corpus.stories]
    # The last line break is a token too, but what follows it is not asked.
    assert [text_of(row) for row in tokens] == [f"\n{story}\n" for story in corpus.stories]
    counted = (tokens != PAD) & (targets != PAD)
    assert counted.sum() == sum(len(story) + 1 for story in corpus.stories)


@pytest.mark.parametrize("length", [1, 8, 100, 160])
def test_story_corpus_cuts_stories_to_the_sequence(length):
    corpus = story_corpus(10, 6, 5, length, PAD)
    tokens, targets = swept(corpus.validation, 4)
    assert [text_of(row) for row in targets] == [(s + "\n")[:length] for s in corpus.stories]
    assert [text_of(row) for row in tokens] == [f"\n{s}"[:length] for s in corpus.stories]
    tokens, targets, _ = corpus.training.batch(0, 50, 0)
    assert (tokens[:, 0] == ord("\n")).all()
    assert_same_bits(tokens[:, 1:], targets[:, :-1])


def test_story_corpus_limit_takes_whole_stories(corpus):
    tokens, _ = swept(corpus.validation, 7, limit=5 * 256)
    assert len(tokens) == 5
    assert [text_of(row)[1:-1] for row in tokens] == list(corpus.stories[::4])


def test_story_corpus_repeats_by_seed(corpus):
    again = story_corpus(60, 20, 5, 256, PAD)
    other = story_corpus(60, 20, 6, 256, PAD)
    assert_same_bits(all_of(again.training), all_of(corpus.training))
    assert not set(other.stories) & set(corpus.stories)


# --- Orders ---------------------------------------------------------------------------------------

POWERS = {2**k + d for k in range(1, 13) for d in (-1, 0, 1)}


def order_of(size, seed=1, epoch=0):
    return shuffled(np.arange(size), size, seed, epoch)


def test_shuffled_is_a_permutation():
    for size in {*range(1, 1025), *range(1025, 5000, 61), 5000, *POWERS}:
        found = order_of(size, seed=size)
        assert found.dtype == np.int64
        assert np.array_equal(np.sort(found), np.arange(size)), size


@pytest.mark.parametrize("size", [10**9 + 7, (1 << 40) + 1, (1 << 62) - 1])
def test_shuffled_of_many_gives_some_places(size):
    places = np.unique(np.random.default_rng(0).integers(0, size, 20_000))
    found = shuffled(places, size, 3, 4)
    assert found.min() >= 0
    assert found.max() < size
    assert np.unique(found).size == places.size
    # Uniform numbers: a standard deviation of 0.289 over the root of how many there are.
    assert abs(found.mean() / size - 0.5) < 5 * 0.289 / math.sqrt(places.size)


def test_shuffled_places_do_not_depend_on_each_other():
    whole = order_of(1000, 5, 6)
    places = np.array([999, 0, 17, 17, 500])
    assert np.array_equal(shuffled(places, 1000, 5, 6), whole[places])
    assert shuffled(np.zeros(0, np.int64), 1000, 5, 6).size == 0


def test_shuffled_differs_by_seed_and_turn():
    keys = [*range(12), (1 << 63) - 1]
    found = {tuple(order_of(50, seed, turn).tolist()) for seed in keys for turn in keys}
    assert len(found) == len(keys) ** 2


@pytest.mark.parametrize("size", [2, 3, 5, 16, 61])
def test_shuffled_looks_random(size):
    """Over many orders every number is equally often at every place, and follows every other."""
    count = 1200
    found = np.array([order_of(size, 7, turn) for turn in range(count)])
    # Each mean is one of `size` uniform numbers; six standard deviations for each place.
    spread = math.sqrt((size**2 - 1) / 12 / count)
    assert np.abs(found.mean(axis=0) - (size - 1) / 2).max() < 6 * spread
    expected = count / size
    for place in range(0, size, max(size // 5, 1)):
        counts = np.bincount(found[:, place], minlength=size)
        assert np.abs(counts - expected).max() < 6 * math.sqrt(expected)
    # What comes next is any other number: differences, modulo the size, are uniform.
    steps = np.bincount(np.diff(found, axis=1).ravel() % size, minlength=size)[1:]
    assert np.abs(steps / steps.sum() - 1 / (size - 1)).max() < 6 * math.sqrt(1 / steps.sum())


def test_shuffled_small_orders_are_all_there():
    """Of 4 numbers there are 24 orders, each as frequent as the others."""
    orders = Counter(tuple(order_of(4, 2, turn).tolist()) for turn in range(4800))
    assert len(orders) == 24
    assert abs(np.array([*orders.values()]) - 200).max() < 6 * math.sqrt(200)


rooms = st.integers(1, 40)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_pack_wastes_little_and_loses_nothing(data):
    room = data.draw(rooms)
    sizes = np.array(data.draw(st.lists(st.integers(1, room), max_size=60)), np.int64)
    rows = pack(sizes, room)
    assert sorted(piece for row in rows for piece in row) == list(range(sizes.size))
    filled = [int(sizes[row].sum()) for row in rows]
    assert all(1 <= fill <= room for fill in filled)
    # No two rows would fit into one, so that all but one are more than half full.
    assert sum(sorted(filled)[:2]) > room or len(rows) < 2
    assert sum(2 * fill <= room for fill in filled) <= 1


def test_pack_takes_the_row_that_fits_best():
    assert pack(np.array([3, 8, 5, 7, 2]), 10) == [[1, 4], [3, 0], [2]]
    assert pack(np.array([4, 4, 4]), 4) == [[0], [1], [2]]
    assert pack(np.zeros(0, np.int64), 4) == []


# --- Readers --------------------------------------------------------------------------------------

BLANK = 1 << 30


def told(lengths, length, order, document_mask=False, followed=True):
    """A dataset of documents of such lengths, whose tokens tell where they stand."""
    ends = np.cumsum(lengths)
    tokens = np.arange(ends[-1] + followed, dtype=np.int32)
    store = TokenStore([tokens], ends - np.array(lengths), int(ends[-1]))
    return TokenDataset(store, length, BLANK, order=order, document_mask=document_mask)


def read(reader, count):
    return [reader.next_batch() for _ in range(count)]


def assert_same_batches(one, other):
    for first, second in zip(one, other, strict=True):
        for name, value in first._asdict().items():
            if value is None:
                assert getattr(second, name) is None
            else:
                assert_same_bits(value, getattr(second, name), name)


def passes_of(reader, total, count):
    """The tokens that are learned from in each of some passes, and their targets."""
    batches = iter(reader.next_batch, None)
    rows = (row for batch in batches for row in zip(*batch[:2], strict=True))
    found = []
    for _ in range(count):
        tokens, targets = [], []
        while sum(map(len, tokens)) < total:
            row, goal = next(rows)
            kept = row != BLANK
            assert kept.any()
            tokens.append(row[kept])
            targets.append(goal[kept])
            assert (goal[~kept] == BLANK).all()
        found.append((np.concatenate(tokens), np.concatenate(targets)))
    return found


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 60), st.integers(1, 17), st.integers(1, 9), st.integers(0, 5))
def test_passes_show_every_token_once(size, length, batch_size, seed):
    dataset = told([size], length, "epochs", followed=False)
    reader = dataset.reader(batch_size, seed)
    count = -(-(size - 1) // length)
    batches = read(reader, -(-3 * count // batch_size))
    assert reader.position == (len(batches) * batch_size,)
    tokens = np.concatenate([batch.tokens for batch in batches])
    targets = np.concatenate([batch.targets for batch in batches])
    assert tokens.shape == targets.shape == (len(batches) * batch_size, length)
    for turn in range(3):
        rows = slice(turn * count, (turn + 1) * count)
        counted = targets[rows] != BLANK
        # All but the last, which has nothing to be followed by.
        assert sorted(tokens[rows][counted].tolist()) == list(range(size - 1))
        assert (targets[rows][counted] == tokens[rows][counted] + 1).all()


LENGTHS = [[1], [2], [8], [9], [16], [17], [50], [8, 8], [9, 1], [1] * 9, [1, 8, 9, 100, 7, 7, 2]]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("batch_size", [1, 3, 40])
@pytest.mark.parametrize("followed", [True, False])
def test_packed_rows_show_every_token_once(lengths, batch_size, followed):
    if sum(lengths) + followed == 1:
        with pytest.raises(ValueError, match="1 tokens are too few"):
            told(lengths, 8, "packed", followed=followed)
    else:
        check_packed(lengths, 8, batch_size, 1, followed)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=25),
    st.integers(1, 12),
    st.integers(1, 9),
    st.integers(0, 5),
    st.integers(1, 30),
)
def test_packed_rows_show_every_token_once_in_any_pools(lengths, length, batch_size, seed, pool):
    with mock.patch.object(module, "_POOL", pool):
        check_packed(lengths, length, batch_size, seed)


def check_packed(lengths, length, batch_size, seed, followed=True):
    total = sum(lengths)
    dataset = told(lengths, length, "packed", followed=followed)
    reader = dataset.reader(batch_size, seed)
    for tokens, targets in passes_of(reader, total, 3):
        assert sorted(tokens.tolist()) == list(range(total))
        last = tokens == total - 1
        assert (targets == np.where(last & (not followed), BLANK, tokens + 1)).all()
    # A document is cut only where it is longer than a row.
    document = np.repeat(np.arange(len(lengths)), lengths)
    rows = dataset.reader(1, seed)
    pieces, seen = Counter(), 0
    while seen < total:
        row = rows.next_batch().tokens[0]
        row = row[row != BLANK]
        seen += row.size
        pieces.update(np.unique(document[row]).tolist())
    assert pieces == {i: -(-size // length) for i, size in enumerate(lengths)}


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=25),
    st.sampled_from([1, 2, 7, 8, 12, 16]),
    st.integers(1, 9),
    st.integers(1, 30),
)
@example([1], 8, 1, 2048)
@example([8, 16, 17], 8, 3, 2048)
def test_buckets_show_every_token_once_in_rows_as_wide_as_they_need(lengths, length, batch, pool):
    total = sum(lengths)
    with mock.patch.object(module, "_POOL", pool):
        dataset = told(lengths, length, "buckets")
        reader = dataset.reader(batch, 1)
        for turn in range(2):
            seen = []
            while reader.position[0] == turn:
                tokens, targets, starts = reader.next_batch()
                rows, width = tokens.shape
                assert starts is None
                assert length % width == 0
                assert rows <= batch * (length // width)
                kept = tokens != BLANK
                sizes = kept.sum(axis=1)
                # Padding is behind a row's one piece, which no narrower row would have held.
                assert (kept == (np.arange(width) < sizes[:, None])).all()
                assert (np.diff(tokens, axis=1)[kept[:, 1:]] == 1).all()
                if width % 2 == 0:
                    assert (2 * sizes > width).all()
                assert (targets[kept] == tokens[kept] + 1).all()
                seen += tokens[kept].tolist()
            assert sorted(seen) == list(range(total))


@pytest.mark.parametrize("order", ["epochs", "packed"])
def test_passes_have_other_orders(order):
    dataset = told([5] * 60 + [23] * 10, 8, order)
    total = 530
    orders = {
        tuple(tokens.tolist())
        for seed in (0, 1)
        for tokens, _ in passes_of(dataset.reader(4, seed), total, 3)
    }
    assert len(orders) == 6
    assert tuple(range(total)) not in orders


def test_packed_rows_have_another_order_than_documents():
    """The one order is no hint at the other, as if documents were shuffled once more by it."""
    dataset = told([8] * 50, 8, "packed")
    found = [tokens[::8] // 8 for tokens, _ in passes_of(dataset.reader(5, 1), 400, 3)]
    for turn in range(6):
        order = order_of(50, 1, turn)
        assert all((order[order] != documents).any() for documents in found)


@pytest.mark.parametrize("length", [256, 512])
def test_packed_rows_waste_little(length, capsys):
    rng = np.random.default_rng(length)
    lengths = rng.integers(10, 2001, 2400)
    dataset = told(lengths.tolist(), length, "packed")
    total, reader, rows, seen = int(lengths.sum()), dataset.reader(32, 3), 0, 0
    while seen < total:
        for kept in (reader.next_batch().tokens != BLANK).sum(axis=1).tolist():
            if seen < total:
                rows, seen = rows + 1, seen + kept
    assert seen == total
    packed = 1 - total / (rows * length)
    # One document a row, cut to the context and padded to the longest of eight; and not cut.
    cut, whole = (
        1 - sizes.sum() / (8 * sizes.reshape(-1, 8).max(axis=1)).sum()
        for sizes in (np.minimum(lengths, length), lengths)
    )
    with capsys.disabled():
        print(f"\nT {length}: padding packed {packed:.2%}, naive {whole:.1%}, cut {cut:.1%}")
    assert packed < 0.02
    assert packed < whole / 10


ORDERS = ("windows", "epochs", "packed", "buckets")
orders = pytest.mark.parametrize("order", ORDERS)
MIXED = [1, 8, 9, 40, 7, 7, 2, 3, 5, 16, 30, 1, 1]


def mixed(order, document_mask=True):
    return told(MIXED, 8, order, document_mask)


@orders
@pytest.mark.parametrize("batch_size", [1, 3, 30])
def test_reader_goes_on_from_every_position(order, batch_size, monkeypatch):
    monkeypatch.setattr(module, "_POOL", 4)
    reader = mixed(order).reader(batch_size, 2)
    positions, batches = [], []
    for _ in range(30):
        positions.append(reader.position)
        batches.append(reader.next_batch())
    for i in (0, 9, 29):
        for another in (mixed(order).reader(batch_size, 2), reader):
            another.check(positions[i])
            another.position = positions[i]
            assert_same_batches(read(another, 30 - i), batches[i:])


@orders
def test_reader_is_a_function_of_the_seed(order):
    one, same, other = (read(mixed(order).reader(3, seed), 12) for seed in (4, 4, 5))
    assert_same_batches(one, same)
    assert any((a.tokens != b.tokens).any() for a, b in zip(one, other, strict=True))


BAD_POSITIONS = {
    "windows": [(), (1, 0), (0, 0, 0), (1 << 62,), (-1,)],
    "epochs": [(), (1, 0), (0, 0, 0), (1 << 62,), (-1,)],
    "packed": [(), (0,), (0, 0), (0, 0, 0, 0), (0, 1, 0), (0, 0, 99), (1 << 62, 0, 0), (0, 0, -1)],
    "buckets": [(), (0,), (0, 0), (0, 1, 0), (0, 0, 99), (1 << 62, 0, 0), (0, 0, -1)],
}


@pytest.mark.parametrize(("order", "position"), [(o, p) for o in ORDERS for p in BAD_POSITIONS[o]])
def test_reader_knows_what_is_no_position(order, position):
    with pytest.raises(ValueError, match=r"its position is .* expected"):
        mixed(order).reader(3, 1).check(position)


@pytest.mark.parametrize(
    ("order", "last"), [("epochs", ((1 << 62) - 1,)), ("packed", (2**61 - 1, 0, 0))]
)
def test_reader_takes_the_largest_position(order, last):
    reader = mixed(order).reader(3, (1 << 63) - 1)
    reader.check(last)
    reader.position = last
    assert reader.next_batch().tokens.shape == (3, 8)


def test_passes_over_stories_take_each_one_once(corpus):
    dataset = replace(corpus.training, order="epochs")
    begins = [
        row[:40].tobytes() for batch in read(dataset.reader(7, 1), 20) for row in batch.tokens
    ]
    assert len(begins) == 140
    assert len(set(begins[:60])) == len(set(begins[60:120])) == 60
    assert begins[:60] != begins[60:120]


# --- Several texts --------------------------------------------------------------------------------


def texts_of(orders, masks=(True, False, True)):
    """Texts of which each has tokens of its own: the first 1000, the next 1000, ..."""
    texts = []
    for number, (order, mask) in enumerate(zip(orders, masks, strict=False)):
        ends = np.cumsum(MIXED)
        tokens = np.arange(ends[-1] + 1) + 1000 * number
        store = TokenStore([tokens.astype(np.int32)], ends - MIXED, int(ends[-1]))
        texts.append(TokenDataset(store, 8, BLANK, order=order, document_mask=mask))
    return texts


def mix_of(weights, orders, masks=(True, False, True)):
    texts = zip("abc", weights, texts_of(orders, masks), strict=False)
    return MixedDataset(list(texts))


def text_numbers(batch):
    """The text that each row is of."""
    return batch.tokens[:, 0] // 1000


THREE = ("windows", "packed", "epochs")


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=3),
    st.permutations(THREE),
    st.integers(1, 9),
    st.integers(0, 20),
    st.sampled_from([0, 5, (1 << 63) - 1]),
)
def test_mix_goes_on_from_every_step(weights, orders, batch_size, step, seed):
    reader = mix_of(weights, orders).reader(batch_size, seed)
    positions, batches = [], []
    for _ in range(24):
        positions.append(reader.position)
        batches.append(reader.next_batch())
    again = mix_of(weights, orders).reader(batch_size, seed)
    for another in (again, reader):
        another.check(positions[step])
        another.position = positions[step]
        assert another.position == positions[step]
        assert_same_batches(read(another, 24 - step), batches[step:])


@pytest.mark.parametrize("weights", [(1.0, 0.3), (5, 1, 2), (1e-6, 1.0), (0.25, 0.25, 0.5)])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_mix_has_the_share_of_each_text_in_every_batch(weights, batch_size):
    dataset = mix_of(weights, THREE)
    shares = np.array(weights) / sum(weights)
    np.testing.assert_allclose([part.share for part in dataset.parts], shares)
    reader = dataset.reader(batch_size, 3)
    counts = np.array([np.bincount(text_numbers(batch), minlength=len(weights))
                       for batch in read(reader, 400)])  # fmt: skip
    assert (counts.sum(axis=1) == batch_size).all()
    assert (abs(counts - batch_size * shares) < 1).all()
    # Rounded at random: within half a row of the share, in each batch independently.
    assert (abs(counts.sum(axis=0) - 400 * batch_size * shares) < 5 * 0.5 * math.sqrt(400)).all()


def test_mix_depends_on_the_seed():
    drawn = [
        [text_numbers(batch).tolist() for batch in read(mix_of((1, 1), THREE).reader(3, seed), 20)]
        for seed in (0, 1)
    ]
    assert drawn[0] != drawn[1]


@pytest.mark.parametrize("orders", [THREE, ("packed",) * 3])
def test_rows_of_each_text_come_in_its_own_order(orders):
    batches = read(mix_of((3, 2, 1), orders).reader(6, 4), 40)
    for number, text in enumerate(texts_of(orders)):
        reader, seen = text.reader(1, 4 + number), 0
        for batch in batches:
            for row in np.flatnonzero(text_numbers(batch) == number):
                alone, seen = reader.next_batch(), seen + 1
                assert (batch.tokens[row] == alone.tokens[0]).all()
                assert (batch.targets[row] == alone.targets[0]).all()
                # Without a mask of its own, all of a row is seen.
                own = np.zeros(8) if alone.starts is None else alone.starts[0]
                assert (batch.starts[row] == own).all()
        assert seen >= 35


def test_mix_without_masks_has_no_starts():
    assert mix_of((1, 1), THREE, (False, False)).reader(4, 1).next_batch().starts is None


BAD_OF_MIX = [
    *((), (0,), (0, 0, 0, 0), (0, 0, 0, 0, 0, 0)),
    *((-1, 0, 0, 0, 0), (1 << 62, 0, 0, 0, 0), (0, -1, 0, 0, 0), (0, 0, 0, 1, 0), (0, 0, 0, 0, 99)),
]


@pytest.mark.parametrize("position", BAD_OF_MIX, ids=str)
def test_mix_knows_what_is_no_position(position):
    with pytest.raises(ValueError, match=r"its position is .* expected"):
        mix_of((1, 1), THREE).reader(3, 1).check(position)


def test_mix_refuses_rows_of_several_lengths():
    with pytest.raises(ValueError, match=r"order is buckets.* expected another one"):
        mix_of((1, 1), ("windows", "buckets"))


def test_mix_has_the_tokens_of_all_texts():
    dataset = mix_of((1, 2), THREE)
    assert dataset.token_count == 2 * (sum(MIXED) + 1)
    assert (dataset.sequence_length, dataset.pad_token) == (8, BLANK)


# --- The document mask ----------------------------------------------------------------------------


def expected_starts(dataset, tokens):
    """Where the document of each token begins in its row; None where there is padding."""
    documents, _ = dataset.tokens.document_bounds(np.arange(dataset.tokens.document_count))
    owner = np.searchsorted(documents, tokens, side="right")
    first = owner[:, None, :] == owner[:, :, None]
    return first.argmax(axis=2)


@orders
@pytest.mark.parametrize("length", [1, 2, 8, 13, 50])
def test_masked_rows_tell_where_documents_begin(order, length):
    dataset = told(MIXED, length, order, document_mask=True)
    inside = 0
    for tokens, _, starts in read(dataset.reader(5, 1), 40):
        assert starts.dtype == np.int32
        assert_same_bits(document_starts(starts, *tokens.shape), starts)
        kept = tokens != BLANK
        assert (starts == expected_starts(dataset, tokens))[kept].all()
        inside += int((starts[kept] > 0).sum())
    # Buckets have documents in rows of their own.
    assert bool(inside) == (length > 1 and order != "buckets")


def test_masked_sweep_tells_where_documents_begin():
    dataset = mixed("windows")
    for tokens, _, starts in dataset.sweep(4):
        document_starts(starts, *tokens.shape)
        assert (starts == expected_starts(dataset, tokens))[tokens != BLANK].all()


def test_packed_rows_are_learned_as_if_each_document_were_alone():
    config = make_config()
    model, pad = random_model(config), config.pad_token
    lengths = [5, 1, 9, 16, 3, 40, 2, 7]
    ends = np.cumsum(lengths)
    tokens = np.random.default_rng(3).integers(0, config.vocab_size, ends[-1] + 1, np.int32)
    store = TokenStore([tokens], ends - lengths, int(ends[-1]))
    dataset = TokenDataset(store, 16, pad, order="packed", document_mask=True)

    def loss(rows, targets, starts=None):
        gradients = create_legacy_llm_gradients(config)
        return BackwardPass(model, *rows.shape).run(rows, targets, gradients, None, starts)

    reader, together, mingled, count = dataset.reader(1, 4), 0.0, 0.0, 0
    while count < ends[-1]:
        batch = reader.next_batch()
        assert reader.position[0] == 0 or count + (batch.tokens != pad).sum() == ends[-1]
        together += loss(*batch)[0]
        more, places = loss(*batch[:2])
        mingled, count = mingled + more, count + places
    alone = 0.0
    for begin, end in zip(ends - lengths, ends, strict=True):
        for at in range(begin, end, 16):
            piece = tokens[at : min(at + 16, end) + 1]
            alone += loss(piece[None, :-1], piece[None, 1:])[0]
    # As the trainer's: some hundred roundings per token.
    assert_close(together / count, alone / count, rtol=0, atol=2e-5)
    assert abs(mingled - alone) / count > 1e-3


# --- Batches ahead --------------------------------------------------------------------------------


@pytest.fixture
def prefetched():
    """Makes prefetchers, and ends them."""
    made = []

    def make(*arguments):
        made.append(Prefetcher(*arguments))
        return made[-1]

    yield make
    for prefetcher in made:
        prefetcher.close()


@orders
@pytest.mark.usefixtures("no_threads")
def test_prefetcher_without_a_thread_gives_what_the_reader_does(order, prefetched):
    reader, ahead = mixed(order).reader(3, 1), prefetched(mixed(order).reader(3, 1))
    for _ in range(20):
        assert ahead.position == reader.position
        assert_same_batches([ahead.next_batch()], [reader.next_batch()])
    assert ahead.position == reader.position


@orders
def test_prefetcher_gives_what_the_reader_does(order, prefetched):
    reader, ahead = mixed(order).reader(3, 1), prefetched(mixed(order).reader(3, 1))
    for _ in range(20):
        assert ahead.position == reader.position
        assert_same_batches([ahead.next_batch()], [reader.next_batch()])
    assert ahead.position == reader.position


def test_prefetcher_position_counts_what_was_taken(prefetched):
    reader = mixed("epochs").reader(3, 1)
    ahead = prefetched(reader)
    ahead.next_batch()
    wait_for(lambda: reader.position > (9,))
    assert ahead.position == (3,)
    ahead.close()
    assert ahead.position == (3,)


def wait_for(condition):
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.002)
    raise AssertionError("it has not come to that in two seconds")


def test_prefetcher_changes_batches_by_the_position_before_them(prefetched):
    seen = []

    def change(batch, position):
        seen.append(position)
        return batch._replace(tokens=batch.tokens + 1)

    reader = mixed("epochs", document_mask=False).reader(3, 1)
    ahead = prefetched(mixed("epochs", document_mask=False).reader(3, 1), change)
    for _ in range(5):
        assert_same_bits(ahead.next_batch().tokens, reader.next_batch().tokens + 1)
    assert seen[:5] == [(0,), (3,), (6,), (9,), (12,)]


class Failing:
    """A reader that fails after some batches."""

    def __init__(self, reader, batches):
        self.reader, self.left = reader, batches
        self.position = reader.position

    def next_batch(self):
        if not self.left:
            raise OSError("the disk is gone")
        self.left -= 1
        batch = self.reader.next_batch()
        self.position = self.reader.position
        return batch


@pytest.mark.usefixtures("no_threads")
def test_prefetcher_without_a_thread_changes_batches_and_raises(prefetched):
    def change(batch, position):
        if position == (6,):
            raise ValueError(f"no change at {position}")
        return batch._replace(tokens=batch.tokens + 1)

    reader = mixed("epochs", document_mask=False).reader(3, 1)
    ahead = prefetched(mixed("epochs", document_mask=False).reader(3, 1), change)
    for _ in range(2):
        assert_same_bits(ahead.next_batch().tokens, reader.next_batch().tokens + 1)
    with pytest.raises(ValueError, match=r"no change at \(6,\)"):
        ahead.next_batch()
    assert ahead.position == (6,)


@pytest.mark.parametrize("batches", [0, 1, 3, 4, 5, 9])
def test_prefetcher_raises_what_the_reader_raises(batches, prefetched):
    ahead = prefetched(Failing(mixed("epochs").reader(2, 1), batches))
    read(ahead, batches)
    for _ in range(3):
        with pytest.raises(OSError, match="the disk is gone"):
            ahead.next_batch()
    assert ahead.position == (2 * batches,)
    ahead.close()
    assert not ahead._thread.is_alive()


def test_prefetcher_raises_what_a_change_raises(prefetched):
    def change(batch, position):
        raise ValueError(f"no change at {position}")

    ahead = prefetched(mixed("epochs").reader(2, 1), change)
    with pytest.raises(ValueError, match=r"no change at \(0,\)"):
        ahead.next_batch()


@pytest.mark.parametrize("full", [True, False])
def test_prefetcher_closes_at_once(full):
    begun = time.perf_counter()
    for _ in range(50):
        ahead = Prefetcher(mixed("windows").reader(1, 1))
        if full:
            wait_for(ahead._ready.full)
        ahead.close()
        assert not ahead._thread.is_alive()
        ahead.close()
    # A tenth of a second each would be noticed.
    assert time.perf_counter() - begun < 2.5


COPIES = [copy.copy, copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))]


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("order", ["windows", "epochs", "packed", "buckets"])
def test_reader_copies_go_on_alike(order, copied):
    store = TokenStore([np.arange(200, dtype=np.int32)], np.arange(0, 200, 9), 199)
    reader = TokenDataset(store, 8, 256, order=order).reader(3, 5)
    reader.next_batch()
    twin = copied(reader)
    for _ in range(40):
        for one, other in zip(reader.next_batch()[:2], twin.next_batch()[:2], strict=True):
            assert_same_bits(one, other)
    assert twin.position == reader.position


def test_prefetcher_refuses_to_be_copied():
    prefetcher = Prefetcher(counting(50, 8).reader(2, 0))
    for copied in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="Prefetcher cannot be copied or pickled"):
            copied(prefetcher)
    prefetcher.close()


def test_prefetcher_that_is_dropped_ends_its_thread():
    gc.disable()
    try:
        before = set(threading.enumerate())
        prefetcher = Prefetcher(counting(50, 8).reader(2, 0))
        prefetcher.next_batch()
        (thread,) = set(threading.enumerate()) - before
        del prefetcher
        thread.join(20)
        assert not thread.is_alive()
    finally:
        gc.enable()
