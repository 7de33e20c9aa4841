"""Batches and sweeps: which windows of a text they hold, and that nothing but the seed decides."""

import re

import numpy as np
import pytest
from compare import assert_same_bits

from legacy1bit import stories
from legacy1bit.dataset import TokenDataset, story_corpus, text_corpus

PAD = 256


def counting(size, length):
    """A dataset whose tokens tell where they stand."""
    return TokenDataset(np.arange(size, dtype=np.int32), length, 1 << 20)


def text_of(row):
    """The text of a row of tokens, which may end in padding but hold none before."""
    kept = row[row != PAD]
    assert (row[: kept.size] != PAD).all()
    return bytes(kept.astype(np.uint8)).decode()


def swept(dataset, batch_size, limit=None):
    """All rows of a sweep: tokens, targets."""
    batches = list(dataset.sweep(batch_size, limit))
    assert all(1 <= len(tokens) <= batch_size for tokens, _ in batches)
    assert all(len(tokens) == batch_size for tokens, _ in batches[:-1])
    return tuple(np.concatenate(part) for part in zip(*batches, strict=True))


# --- Batches of a text ----------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 7, 16])
@pytest.mark.parametrize("batch_size", [1, 5])
def test_batch_holds_whole_windows_and_what_follows(length, batch_size):
    dataset = counting(100, length)
    for step in range(20):
        tokens, targets = dataset.batch(step, batch_size, seed=3)
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
        for one, other in zip(forwards[step], again.batch(step, 4, seed=9), strict=True):
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
    tokens, _ = counting(50, 8).batch(step, 3, seed)
    assert tokens.shape == (3, 8)


def test_batch_does_not_change_the_text():
    dataset = counting(50, 8)
    for part in dataset.batch(0, 4, 0):
        part[...] = -1
    assert_same_bits(dataset.tokens, np.arange(50, dtype=np.int32))


@pytest.mark.parametrize("size", [0, 1, 8])
def test_dataset_refuses_fewer_tokens_than_a_sequence_needs(size):
    with pytest.raises(ValueError, match=f"{size} tokens are too few.* needs 9"):
        counting(size, 8)


def test_dataset_of_one_sequence_gives_it_always():
    tokens, targets = counting(9, 8).batch(5, 3, 1)
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


@pytest.mark.parametrize("limit", [0, 1, 7, 50, 99, 100, 101, 250, 399, 400, 401, 10_000])
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
    for limit in (None, 100):
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
    joined = np.concatenate([corpus.training.tokens, corpus.validation.tokens])
    assert bytes(joined.astype(np.uint8)) == text
    for part in (corpus.training, corpus.validation):
        assert (part.sequence_length, part.pad_token) == (16, PAD)


def test_text_corpus_trains_on_nothing_that_it_validates_on():
    text = b"a" * 900 + b"b" * 100
    corpus = text_corpus(text, "text", 16, PAD)
    batches = [corpus.training.batch(step, 8, 0) for step in range(50)]
    assert {int(token) for batch in batches for part in batch for token in part.flat} == {ord("a")}
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
    assert text_of(corpus.training.tokens) == "\n" + stories.corpus(told[:60])
    assert text_of(corpus.validation.tokens) == "\n" + stories.corpus(told[60:])
    assert corpus.stories == tuple(told[60:])
    assert corpus.floor == stories.entropy_per_character()
    assert corpus.name == "60 stories"
    assert story_corpus(12345, 1, 0, 8, PAD).name == "12,345 stories"


def test_story_corpus_windows_begin_with_a_story(corpus):
    learned = stories.generate_stories(60, 5)
    begun, ended = set(), 0
    for step in range(100):
        tokens, targets = corpus.training.batch(step, 16, seed=1)
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
    assert any((row[:size] == corpus.training.tokens[last:][: row.size]).all() for row in padded)


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
    tokens, targets = corpus.training.batch(0, 50, 0)
    assert (tokens[:, 0] == ord("\n")).all()
    assert_same_bits(tokens[:, 1:], targets[:, :-1])


def test_story_corpus_limit_takes_whole_stories(corpus):
    tokens, _ = swept(corpus.validation, 7, limit=5 * 256)
    assert len(tokens) == 5
    assert [text_of(row)[1:-1] for row in tokens] == list(corpus.stories[::4])


def test_story_corpus_repeats_by_seed(corpus):
    again = story_corpus(60, 20, 5, 256, PAD)
    other = story_corpus(60, 20, 6, 256, PAD)
    assert_same_bits(again.training.tokens, corpus.training.tokens)
    assert not set(other.stories) & set(corpus.stories)
