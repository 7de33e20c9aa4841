"""Batches of token sequences out of a text (C: ``dataset.c``).

A batch is a function of the seed and a position in the data: training stops and resumes anywhere,
and only that position has to be saved.
"""

import bisect
import contextlib
import queue
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, NoReturn, Protocol

import numpy as np
import numpy.typing as npt

from legacy1bit.data.shards import TokenStore
from legacy1bit.data_utils import Tokens
from legacy1bit.hyperparams import BATCH_ORDERS
from legacy1bit.system.errors import SettingError

# Documents that are packed together: with more, rows are fuller; with fewer, memory is smaller and
# a resumed run has less to pack again.
_POOL = 2048

# Places of a random order that are computed together, which is faster.
_KNOWN = 4096

# Batches that lie ready.
_AHEAD = 4

# Where random numbers begin that say which texts are mixed: others with the same key begin at 0.
_OF_MIXES = 1 << 128

# No run comes as far in its data; what is counted stays a 64-bit number.
_MOST_PLACES = 1 << 62

_Integers = npt.NDArray[np.int64]


class Batch(NamedTuple):
    """Token sequences and their targets.

    Attributes
    ----------
    tokens, targets : int32[B, T]
        Each token's target is the one that follows it. Where either is padding, it does not count.
    starts : int32[B, T] or None
        The first position of its row that each one sees; None: all see their row's beginning.
    """

    tokens: Tokens
    targets: Tokens
    starts: npt.NDArray[np.int32] | None = None


# --- Orders ---------------------------------------------------------------------------------------


def shuffled(places: _Integers, size: int, seed: int, epoch: int) -> _Integers:
    """Return what a random order of 0 ... size - 1 has at some places, without making all of it.

    A Feistel network permutes the numbers of an even number of bits; what falls outside goes
    through it again until it falls inside (Black & Rogaway, "Ciphers with Arbitrary Finite
    Domains", 2002, section 3).

    Parameters
    ----------
    places : int64[K]
        0 to size - 1.
    size : int
    seed, epoch : int
        The order is another one for each pair.

    Returns
    -------
    int64[K]
    """
    half = max((int(size - 1).bit_length() + 1) // 2, 1)
    mask = np.uint64((1 << half) - 1)
    rng = np.random.Generator(np.random.Philox(key=[seed, epoch]))
    keys = rng.integers(0, 1 << 64, 6, np.uint64)
    numbers = places.astype(np.uint64)
    outside = np.ones(numbers.size, bool)
    while outside.any():
        left, right = numbers[outside] >> np.uint64(half), numbers[outside] & mask
        for key in keys:
            left, right = right, left ^ (_scattered(right ^ key) & mask)
        numbers[outside] = (left << np.uint64(half)) | right
        outside = numbers >= size
    return numbers.astype(np.int64)


def _scattered(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Return numbers whose bits all depend on all of x's: MurmurHash3's finalizer (Appleby)."""
    x = (x ^ (x >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    x = (x ^ (x >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return x ^ (x >> np.uint64(33))


class _Shuffle:
    """Random orders, read from place to place: many places are worked out together."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._known, self._order = (0, 0, -1), np.zeros(0, np.int64)

    def between(self, first: int, stop: int, size: int, epoch: int) -> _Integers:
        """Return what an order of 0 ... size - 1 has from one place up to another."""
        runs = [np.zeros(0, np.int64)]
        while first < stop:
            known = size, epoch, first // _KNOWN
            if known != self._known:
                begin = known[2] * _KNOWN
                places = np.arange(begin, min(begin + _KNOWN, size))
                self._known, self._order = known, shuffled(places, size, self._seed, epoch)
            runs.append(self._order[first % _KNOWN :][: stop - first])
            first += runs[-1].size
        return np.concatenate(runs)


def pack(sizes: _Integers, width: int) -> list[list[int]]:
    """Pack pieces into few rows of a width: best fit, the largest first.

    Parameters
    ----------
    sizes : int64[K]
        1 to ``width`` each.
    width : int

    Returns
    -------
    list of list of int
        For each row the numbers of its pieces; every piece is in one row.
    """
    rows: list[list[int]] = []
    # Rows by their free width, and the widths that are free somewhere, in order.
    left: list[list[int]] = [[] for _ in range(width + 1)]
    amounts: list[int] = []
    for piece in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[piece])
        at = bisect.bisect_left(amounts, size)
        if at == len(amounts):
            row, rest = len(rows), width - size
            rows.append([])
        else:
            amount = amounts[at]
            row, rest = left[amount].pop(), amount - size
            if not left[amount]:
                del amounts[at]
        rows[row].append(piece)
        if rest:
            if not left[rest]:
                bisect.insort(amounts, rest)
            left[rest].append(row)
    return rows


# --- Sequences ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenDataset:
    """Tokens, cut into sequences of a fixed length.

    Attributes
    ----------
    tokens : TokenStore
    sequence_length : int
        T, the number of tokens per sequence predicts.
    pad_token : int
        What fills a sequence that reaches past the end.
    starts : int64[S] or None
        Where sequences may begin; anywhere that leaves them whole when None.
    stops : int64[S] or None
        For each start, where its sequence ends at the latest. What follows is padding.
    order : {"windows", "epochs", "packed", "buckets"}
        Which sequences a batch has: random ones; all of a text, one behind the other, in an order
        that is another one in every epoch; whole documents, packed into rows, or in rows of their
        own, by length.
    document_mask : bool
        Whether a token sees its own document only.
    predicted : TokenStore or None
        For each token 1 if it is predicted, 0 if it is only read; None: all are predicted. The
        documents are conversations then, of which none goes on in another row: a longer one is cut.
    """

    tokens: TokenStore
    sequence_length: int
    pad_token: int
    starts: _Integers | None = None
    stops: _Integers | None = None
    order: str = "windows"
    document_mask: bool = False
    predicted: TokenStore | None = None

    def __post_init__(self) -> None:
        if self.order not in BATCH_ORDERS:
            raise ValueError(f"order is {self.order!r}, expected one of {', '.join(BATCH_ORDERS)}")
        if self.predicted is not None and self.order not in ("packed", "buckets"):
            raise ValueError(f"order is {self.order!r}, expected packed or buckets for chats")
        least = self.sequence_length if self.order == "windows" else 1
        if self.starts is None and self.tokens.size <= least:
            raise ValueError(
                f"{self.tokens.size} tokens are too few: a sequence of {least} needs {least + 1}"
            )

    def batch(self, step: int, batch_size: int, seed: int) -> Batch:
        """Return a batch of random sequences.

        Parameters
        ----------
        step, batch_size, seed : int
            All that it depends on.
        """
        rng = np.random.Generator(np.random.Philox(key=[seed, step]))
        if self.starts is None:
            starts = rng.integers(0, self.tokens.size - self.sequence_length, batch_size)
        else:
            starts = self.starts[rng.integers(0, self.starts.size, batch_size)]
        return self.sequences(starts, np.full(batch_size, self.tokens.size))

    def reader(self, batch_size: int, seed: int) -> "Reader":
        """Return what gives one batch after the other."""
        if self.order == "packed":
            return PackedReader(self, batch_size, seed)
        if self.order == "buckets":
            return BucketReader(self, batch_size, seed)
        kind = EpochReader if self.order == "epochs" else WindowReader
        return kind(self, batch_size, seed)

    @property
    def token_count(self) -> int:
        """How many tokens there are."""
        return self.tokens.size

    @property
    def target_count(self) -> int:
        """How many tokens are predicted, about; 0 where that is not known."""
        return self.tokens.size if self.predicted is None else 0

    @property
    def block_count(self) -> int:
        """How many sequences hold all tokens once, or all that lie between starts and stops."""
        if self.starts is None:
            return -(-(self.tokens.size - 1) // self.sequence_length)
        return self.starts.size

    def blocks(self, numbers: _Integers) -> Batch:
        """Return some of the sequences that hold all tokens once."""
        starts, stops = numbers * self.sequence_length, np.full(numbers.size, self.tokens.size)
        if self.starts is not None:
            starts = self.starts[numbers]
        if self.stops is not None:
            stops = self.stops[numbers]
        return self.sequences(starts, stops)

    def sweep(self, batch_size: int, limit: int = 0) -> Iterator[Batch]:
        """Go through all tokens once, or through all that lie between starts and stops.

        Conversations are packed.

        Parameters
        ----------
        batch_size : int
        limit : int
            Leave out whole sequences, evenly, until about this number of tokens is left; 0: none.

        Yields
        ------
        Batch
            The last one may have fewer rows.
        """
        if self.predicted is not None:
            yield from PackedReader(self, batch_size, 0).sweep(limit)
            return
        tokens = self.block_count * self.sequence_length
        stride = max(tokens // limit, 1) if limit else 1
        blocks = range(0, self.block_count, stride)
        for first in range(0, len(blocks), batch_size):
            yield self.blocks(np.array(blocks[first : first + batch_size], np.int64))

    def sequences(self, starts: _Integers, stops: _Integers) -> Batch:
        """Return sequences from their starts, up to their stops at most."""
        width = self.sequence_length
        rows = self.tokens.rows(starts, stops, width + 1, self.pad_token)
        seen = None
        if self.document_mask:
            begins = self.tokens.document_begins(starts, width)
            seen = np.maximum(begins - starts[:, None], 0).astype(np.int32)
        return Batch(rows[:, :-1], rows[:, 1:], seen)


class MixedPart(NamedTuple):
    """A text of several that are mixed.

    Attributes
    ----------
    name : str
    share : float
        The fraction of the sequences that come from it.
    dataset : TokenDataset
    """

    name: str
    share: float
    dataset: TokenDataset


class MixedDataset:
    """The sequences of several texts, each of which has its share of them.

    Parameters
    ----------
    parts : sequence of (str, float, TokenDataset)
        For each text its name, its weight above 0, and its sequences, all of one length.

    Attributes
    ----------
    parts : tuple of MixedPart
        The shares are the weights over their sum.
    """

    def __init__(self, parts: Sequence[tuple[str, float, TokenDataset]]) -> None:
        total = sum(weight for _, weight, _ in parts)
        self.parts = tuple(
            MixedPart(name, weight / total, dataset) for name, weight, dataset in parts
        )
        if any(part.dataset.order == "buckets" for part in self.parts):
            raise SettingError(
                "order is buckets, whose rows differ in length: expected another one where texts "
                "are mixed",
                "order",
            )

    @property
    def sequence_length(self) -> int:
        """T, the number of tokens per sequence predicts."""
        return self.parts[0].dataset.sequence_length

    @property
    def pad_token(self) -> int:
        """What fills a sequence that reaches past the end."""
        return self.parts[0].dataset.pad_token

    @property
    def token_count(self) -> int:
        """How many tokens there are, in all texts."""
        return sum(part.dataset.token_count for part in self.parts)

    @property
    def target_count(self) -> int:
        """How many tokens are predicted, about; 0 where that is not known."""
        counts = [part.dataset.target_count for part in self.parts]
        return sum(counts) if all(counts) else 0

    def reader(self, batch_size: int, seed: int) -> "MixedReader":
        """Return what gives one batch after the other."""
        return MixedReader(self, batch_size, seed)


# --- Readers --------------------------------------------------------------------------------------


class Reader(Protocol):
    """Gives one batch after the other.

    Attributes
    ----------
    position : tuple of int
        Where in the data the next batch begins. A reader of the same data and seed that is set to
        it goes on from there.
    """

    position: tuple[int, ...]

    def check(self, position: tuple[int, ...]) -> None:
        """Raise ``ValueError`` unless it is a position in this order of this data."""

    def next_batch(self) -> Batch:
        """Return a batch and move on."""


def _check_position(position: tuple[int, ...], ends: tuple[int, ...]) -> None:
    fits = len(position) == len(ends)
    if not fits or not all(0 <= n < end for n, end in zip(position, ends, strict=True)):
        raise ValueError(f"its position is {list(position)}, expected numbers below {list(ends)}")


class WindowReader:
    """Random sequences; the position is the number of batches so far."""

    def __init__(self, dataset: TokenDataset, batch_size: int, seed: int) -> None:
        self.position: tuple[int, ...] = (0,)
        self._dataset, self._batch_size, self._seed = dataset, batch_size, seed

    def check(self, position: tuple[int, ...]) -> None:
        """Raise ``ValueError`` unless it is a position in this order of this data."""
        _check_position(position, (_MOST_PLACES,))

    def next_batch(self) -> Batch:
        """Return a batch and move on."""
        (step,) = self.position
        batch = self._dataset.batch(step, self._batch_size, self._seed)
        self.position = (step + 1,)
        return batch


class EpochReader:
    """Every sequence once an epoch, in another order each; the position counts sequences."""

    def __init__(self, dataset: TokenDataset, batch_size: int, seed: int) -> None:
        self.position: tuple[int, ...] = (0,)
        self._dataset, self._batch_size = dataset, batch_size
        self._count, self._shuffle = dataset.block_count, _Shuffle(seed)

    def check(self, position: tuple[int, ...]) -> None:
        """Raise ``ValueError`` unless it is a position in this order of this data."""
        _check_position(position, (_MOST_PLACES,))

    def next_batch(self) -> Batch:
        """Return a batch and move on; it may be of two epochs."""
        (first,) = self.position
        numbers = np.concatenate(list(self._chosen(first, first + self._batch_size)))
        self.position = (first + self._batch_size,)
        return self._dataset.blocks(numbers)

    def _chosen(self, first: int, last: int) -> Iterator[_Integers]:
        """Yield which sequences come from one place up to another, in runs."""
        while first < last:
            epoch, place = divmod(first, self._count)
            stop = min(place + last - first, self._count)
            yield self._shuffle.between(place, stop, self._count, epoch)
            first += stop - place


@dataclass(frozen=True)
class _Pool:
    """Some documents as rows: pieces that fill a row, and others that share rows.

    Attributes
    ----------
    begins : int64[K]
        Where documents begin.
    whole : int64[K]
        How many rows those before and each one itself fill.
    rests : list of list of (int, int)
        For each shared row, where its pieces begin and what they measure.
    """

    begins: _Integers
    whole: _Integers
    rests: list[list[tuple[int, int]]]

    @property
    def size(self) -> int:
        return int(self.whole[-1]) + len(self.rests)

    def rows(self, numbers: _Integers, width: int) -> list[list[tuple[int, int]]]:
        """Return some of the rows, those that one piece fills first."""
        shared = numbers >= self.whole[-1]
        rests = (numbers[shared] - self.whole[-1]).tolist()
        return [*self.filled(numbers[~shared], width), *(self.rests[place] for place in rests)]

    def filled(self, rows: _Integers, width: int) -> list[list[tuple[int, int]]]:
        """Return rows that one piece fills."""
        documents = np.searchsorted(self.whole, rows, side="right")
        before = np.where(documents > 0, self.whole[documents - 1], 0)
        places = self.begins[documents] + (rows - before) * width
        return [[(place, width)] for place in places.tolist()]


class PackedReader:
    """Whole documents packed into rows, in epochs; a document longer than a row is cut.

    The position is the epoch, the pool of documents in it, and the row in that.
    """

    def __init__(self, dataset: TokenDataset, batch_size: int, seed: int) -> None:
        self.position: tuple[int, ...] = (0, 0, 0)
        self._dataset, self._batch_size, self._seed = dataset, batch_size, seed
        self._rows, self._batches = _Shuffle(seed), _Shuffle(seed)
        self._made: tuple[tuple[int, int], _Pool] | None = None
        self._pools = -(-dataset.tokens.document_count // _POOL)

    def check(self, position: tuple[int, ...]) -> None:
        """Raise ``ValueError`` unless it is a position in this order of this data."""
        _check_position(position, (_MOST_PLACES // (self._pools + 1), self._pools, _MOST_PLACES))
        epoch, number, row = position
        size = self._pool(epoch, number).size
        if row > size:
            raise ValueError(f"its position is row {row}, expected 0 to {size}")

    def next_batch(self) -> Batch:
        """Return a batch and move on."""
        epoch, number, row = self.position
        width = self._dataset.sequence_length
        rows: list[list[tuple[int, int]]] = []
        while len(rows) < self._batch_size:
            pool = self._pool(epoch, number)
            stop = min(row + self._batch_size - len(rows), pool.size)
            numbers = self._rows.between(row, stop, pool.size, self._order(epoch, number))
            rows += pool.rows(numbers, width)
            row = stop
            if row == pool.size:
                number, row = number + 1, 0
            if number == self._pools:
                epoch, number = epoch + 1, 0
        self.position = (epoch, number, row)
        return self._compose(rows, width)

    def sweep(self, limit: int) -> Iterator[Batch]:
        """Yield the rows of one epoch, or some of them; see ``TokenDataset.sweep``."""
        width = self._dataset.sequence_length
        stride = max(self._dataset.tokens.size // limit, 1) if limit else 1
        for number in range(self._pools):
            pool = self._pool(0, number)
            rows = pool.rows(np.arange(0, pool.size, stride), width)
            for first in range(0, len(rows), self._batch_size):
                yield self._compose(rows[first : first + self._batch_size], width)

    def _order(self, epoch: int, number: int) -> int:
        """Return the order of an epoch for the rows of a pool; the last is for its documents."""
        return epoch * (self._pools + 1) + number

    def _pool(self, epoch: int, number: int) -> _Pool:
        """Return a pool, made again unless it is the last one that was asked for."""
        if self._made is not None and self._made[0] == (epoch, number):
            return self._made[1]
        store, width = self._dataset.tokens, self._dataset.sequence_length
        count = store.document_count
        places = np.arange(number * _POOL, min((number + 1) * _POOL, count))
        order = self._order(epoch, self._pools)
        begins, ends = store.document_bounds(shuffled(places, count, self._seed, order))
        if self._dataset.predicted is not None:
            ends = np.minimum(ends, begins + width)
        whole, rests = np.divmod(ends - begins, width)
        shared = np.flatnonzero(rests)
        pieces = list(
            zip((begins + whole * width)[shared].tolist(), rests[shared].tolist(), strict=True)
        )
        together = [[pieces[piece] for piece in row] for row in self._group(rests[shared])]
        pool = _Pool(begins, np.cumsum(whole), together)
        self._made = ((epoch, number), pool)
        return pool

    def _group(self, sizes: _Integers) -> list[list[int]]:
        """Return which pieces share a row."""
        return pack(sizes, self._dataset.sequence_length)

    def _compose(self, rows: list[list[tuple[int, int]]], width: int) -> Batch:
        pad = self._dataset.pad_token
        tokens = np.full((len(rows), width), pad, np.int32)
        targets = tokens.copy()
        starts = np.zeros((len(rows), width), np.int32) if self._dataset.document_mask else None
        for i, row in enumerate(rows):
            at = 0
            for begin, size in row:
                piece = self._dataset.tokens.read(begin, begin + size + 1)
                tokens[i, at : at + size] = piece[:size]
                targets[i, at : at + piece.size - 1] = self._targets(begin, piece[1:])
                if starts is not None:
                    starts[i, at:] = at
                at += size
            if starts is not None:
                starts[i, at:] = min(at, width - 1)
        return Batch(tokens, targets, starts)

    def _targets(self, begin: int, following: Tokens) -> Tokens:
        """Return the targets of the tokens from a place on: padding where they do not count."""
        predicted = self._dataset.predicted
        if predicted is None:
            return following
        counted = predicted.read(begin + 1, begin + 1 + following.size)
        return np.where(counted == 1, following, np.int32(self._dataset.pad_token))


class BucketReader(PackedReader):
    """Documents in rows of their own, as many as the tokens of a batch allow, in epochs.

    Rows are as wide as the sequence length, or half of it, or a quarter; a batch has rows of one
    width, and the shorter they are, the more of them. A document longer than a row is cut.

    The position is the epoch, the pool of documents in it, and the batch in that.
    """

    def check(self, position: tuple[int, ...]) -> None:
        """Raise ``ValueError`` unless it is a position in this order of this data."""
        _check_position(position, (_MOST_PLACES // (self._pools + 1), self._pools, _MOST_PLACES))
        epoch, number, batch = position
        count = self._count(self._pool(epoch, number))
        if batch > count:
            raise ValueError(f"its position is batch {batch}, expected 0 to {count}")

    def next_batch(self) -> Batch:
        """Return a batch and move on; the last ones of a pool have fewer tokens."""
        epoch, number, batch = self.position
        pool, order = self._pool(epoch, number), self._order(epoch, number)
        count = self._count(pool)
        (place,) = self._batches.between(batch, batch + 1, count, order).tolist()
        self.position = epoch, number, batch + 1
        if batch + 1 == count:
            self.position = (
                (epoch, number + 1, 0) if number + 1 < self._pools else (epoch + 1, 0, 0)
            )
        width, whole = self._dataset.sequence_length, int(pool.whole[-1])
        filled = -(-whole // self._batch_size)
        if place < filled:
            first = place * self._batch_size
            last = min(first + self._batch_size, whole)
            numbers = self._rows.between(first, last, whole, order)
            return self._compose(pool.filled(numbers, width), width)
        pieces = pool.rests[place - filled]
        width = self._width(max(size for _, size in pieces))
        return self._compose([[piece] for piece in pieces], width)

    def _count(self, pool: _Pool) -> int:
        """Return how many batches a pool has."""
        return -(-int(pool.whole[-1]) // self._batch_size) + len(pool.rests)

    def _width(self, size: int) -> int:
        """Return the narrowest width that holds a piece."""
        width = self._dataset.sequence_length
        while width % 2 == 0 and width // 2 >= size:
            width //= 2
        return width

    def _group(self, sizes: _Integers) -> list[list[int]]:
        """Return which pieces share a batch."""
        buckets: dict[int, list[int]] = {}
        for piece, size in enumerate(sizes.tolist()):
            buckets.setdefault(self._width(size), []).append(piece)
        batches = []
        for width, pieces in buckets.items():
            rows = self._batch_size * (self._dataset.sequence_length // width)
            batches += [pieces[first : first + rows] for first in range(0, len(pieces), rows)]
        return batches


class MixedReader:
    """Batches of rows of several texts, each of which comes in an order of its own.

    Of B points that lie 1/B apart, from a random one on, each falls into the share of a text: so
    every batch has as many rows of a text as it should, up to less than one, and all batches
    together exactly as many (systematic sampling; Madow and Madow, "On the Theory of Systematic
    Sampling", 1944).

    The position is the number of batches so far, and the positions of all texts behind each other.
    """

    def __init__(self, dataset: MixedDataset, batch_size: int, seed: int) -> None:
        self._batch_size, self._seed, self._step = batch_size, seed, 0
        self._readers = [
            part.dataset.reader(1, seed + number) for number, part in enumerate(dataset.parts)
        ]
        self._bounds = np.cumsum([part.share for part in dataset.parts])[:-1]

    @property
    def position(self) -> tuple[int, ...]:
        """Where in the data the next batch begins."""
        return (self._step, *(n for reader in self._readers for n in reader.position))

    @position.setter
    def position(self, position: tuple[int, ...]) -> None:
        self._step, *_ = position
        for reader, part in zip(self._readers, self._parted(position), strict=True):
            reader.position = part

    def _parted(self, position: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        """Yield the position of each text."""
        at = 1
        for reader in self._readers:
            size = len(reader.position)
            yield position[at : at + size]
            at += size

    def check(self, position: tuple[int, ...]) -> None:
        """Raise ``ValueError`` unless it is a position in this order of this data."""
        _check_position(position[:1], (_MOST_PLACES,))
        if len(position) != len(self.position):
            raise ValueError(
                f"its position is {list(position)}, expected {len(self.position)} numbers"
            )
        for reader, part in zip(self._readers, self._parted(position), strict=True):
            reader.check(part)

    def counts(self) -> _Integers:
        """Return how many rows of the next batch are of each text."""
        # The readers of the texts draw from the same keys, and count from 0.
        rng = np.random.Generator(np.random.Philox(key=[self._seed, self._step], counter=_OF_MIXES))
        points = (np.arange(self._batch_size) + rng.random()) / self._batch_size
        texts = np.searchsorted(self._bounds, points, side="right")
        return np.bincount(texts, minlength=len(self._readers))

    def next_batch(self) -> Batch:
        """Return a batch and move on."""
        rows = [
            reader.next_batch()
            for reader, count in zip(self._readers, self.counts().tolist(), strict=True)
            for _ in range(count)
        ]
        self._step += 1
        starts = None
        if any(row.starts is not None for row in rows):
            whole = np.zeros_like(rows[0].tokens)
            starts = np.concatenate([whole if row.starts is None else row.starts for row in rows])
        return Batch(
            np.concatenate([row.tokens for row in rows]),
            np.concatenate([row.targets for row in rows]),
            starts,
        )


_Change = Callable[[Batch, tuple[int, ...]], Batch]
_Ready = queue.Queue[tuple[Batch, tuple[int, ...]] | BaseException]


class Prefetcher:
    """Has a reader's next batches made while the last one is learned from.

    Where the system gives no more threads, a batch is made when it is asked for.

    Attributes
    ----------
    position : tuple of int
        That of the reader after the batches that were taken.
    """

    def __init__(self, reader: Reader, change: _Change | None = None) -> None:
        self.position = reader.position
        self._ready: _Ready = queue.Queue(_AHEAD)
        self._ended = threading.Event()
        # The thread does not hold this object: one that is dropped without an end has its own.
        self._thread: threading.Thread | None = threading.Thread(
            target=_read_ahead,
            args=(reader, change, self._ready, self._ended),
            name="batches",
            daemon=True,
        )
        try:
            self._thread.start()
        except RuntimeError:
            self._thread = None
        self._reader, self._change = reader, change
        weakref.finalize(self, _end, self._ready, self._ended)

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Prefetcher cannot be copied or pickled: copy its reader")

    def next_batch(self) -> Batch:
        """Return a batch and move on; raise what the reader has raised."""
        if self._thread is None:
            batch, self.position = _make_batch(self._reader, self._change)
            return batch
        item = self._ready.get()
        if isinstance(item, BaseException):
            self._ready.put(item)
            raise item
        batch, self.position = item
        return batch

    def close(self) -> None:
        """End the thread."""
        _end(self._ready, self._ended)
        if self._thread is not None:
            self._thread.join()


def _make_batch(reader: Reader, change: _Change | None) -> tuple[Batch, tuple[int, ...]]:
    """Return the next batch and where the reader is after it."""
    before = reader.position
    batch = reader.next_batch()
    return batch if change is None else change(batch, before), reader.position


def _read_ahead(
    reader: Reader, change: _Change | None, ready: _Ready, ended: threading.Event
) -> None:
    try:
        while not ended.is_set():
            ready.put(_make_batch(reader, change))
    except BaseException as error:  # it is raised where the batch is asked for
        ready.put(error)


def _end(ready: _Ready, ended: threading.Event) -> None:
    """Have the thread that fills a queue end with what it is at."""
    ended.set()
    # It may wait for a free place; it puts one more at most.
    with contextlib.suppress(queue.Empty):
        while True:
            ready.get_nowait()
