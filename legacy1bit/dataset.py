"""Batches of token sequences out of a text (C: ``dataset.c``).

Batches are a function of seed and step alone, so that training can stop and go on anywhere
without a state to keep.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from legacy1bit import stories
from legacy1bit.data_utils import Tokens, create_padded_sequence, tokenize_text

# One part in so many of a text, its end, is kept from training.
VALIDATION_PART = 10


@dataclass(frozen=True)
class TokenDataset:
    """Tokens to learn from, cut into sequences of a fixed length.

    Attributes
    ----------
    tokens : int32[N]
    sequence_length : int
        T, the number of tokens a sequence predicts.
    pad_token : int
        What fills a sequence that reaches past the end.
    starts : int64[S] or None
        Where sequences may begin; anywhere that leaves them whole when None.
    stops : int64[S] or None
        For each start, where its sequence ends at the latest. What follows is padding.
    """

    tokens: Tokens
    sequence_length: int
    pad_token: int
    starts: np.ndarray | None = None
    stops: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.starts is None and self.tokens.size <= self.sequence_length:
            raise ValueError(
                f"{self.tokens.size} tokens are too few: a sequence of {self.sequence_length} "
                f"needs {self.sequence_length + 1}"
            )

    def batch(self, step: int, batch_size: int, seed: int) -> tuple[Tokens, Tokens]:
        """Return the batch of one training step.

        Returns
        -------
        (int32[B, T], int32[B, T])
            Tokens, and for each the one that follows it.
        """
        rng = np.random.Generator(np.random.Philox(key=[seed, step]))
        if self.starts is None:
            starts = rng.integers(0, self.tokens.size - self.sequence_length, batch_size)
        else:
            starts = self.starts[rng.integers(0, self.starts.size, batch_size)]
        return self._sequences(starts, np.full(batch_size, self.tokens.size))

    def sweep(self, batch_size: int, limit: int | None = None) -> Iterator[tuple[Tokens, Tokens]]:
        """Go through all tokens once, or through all that lie between starts and stops.

        Parameters
        ----------
        batch_size : int
        limit : int, optional
            Leave out whole sequences, evenly, until about so many tokens are left.

        Yields
        ------
        (int32[B, T], int32[B, T])
            The last batch may have fewer rows.
        """
        if self.starts is None:
            starts = np.arange(0, self.tokens.size - 1, self.sequence_length)
            stops = np.full(starts.size, self.tokens.size)
        else:
            starts = self.starts
            stops = np.full(starts.size, self.tokens.size) if self.stops is None else self.stops
        if limit is not None:
            stride = max(starts.size * self.sequence_length // max(limit, 1), 1)
            starts, stops = starts[::stride], stops[::stride]
        for first in range(0, starts.size, batch_size):
            rows = slice(first, first + batch_size)
            yield self._sequences(starts[rows], stops[rows])

    def _sequences(self, starts: np.ndarray, stops: np.ndarray) -> tuple[Tokens, Tokens]:
        rows = np.empty((starts.size, self.sequence_length + 1), np.int32)
        for row, start, stop in zip(rows, starts, stops, strict=True):
            row[:] = create_padded_sequence(self.tokens[:stop], start, row.size, self.pad_token)
        return rows[:, :-1], rows[:, 1:]


@dataclass(frozen=True)
class Corpus:
    """What a run learns from and is measured on.

    Attributes
    ----------
    name : str
    training, validation : TokenDataset
    floor : float or None
        The lowest loss any model can reach on the validation set, in nats a token, where that is
        known.
    stories : list of str
        The stories of the validation set, where it is made of the bundled ones.
    sha256 : str
        Of the text of both sets, in hexadecimal digits.
    """

    name: str
    training: TokenDataset
    validation: TokenDataset
    floor: float | None = None
    stories: tuple[str, ...] = ()
    sha256: str = ""


def text_corpus(text: bytes, name: str, sequence_length: int, pad_token: int) -> Corpus:
    """Return a corpus of any text: its first nine tenths to learn, the rest to validate.

    Raises
    ------
    ValueError
        If the text is too short for one sequence of each.
    """
    tokens = tokenize_text(text)
    held_out = tokens.size // VALIDATION_PART
    if held_out <= sequence_length:
        needed = (sequence_length + 1) * VALIDATION_PART
        raise ValueError(
            f"{name} has {tokens.size} bytes, too few for sequences of {sequence_length}: "
            f"expected at least {needed}"
        )
    training, validation = tokens[: tokens.size - held_out], tokens[tokens.size - held_out :]
    return Corpus(
        name,
        TokenDataset(training, sequence_length, pad_token),
        TokenDataset(validation, sequence_length, pad_token),
        sha256=hashlib.sha256(text).hexdigest(),
    )


def story_corpus(
    count: int, held_out: int, seed: int, sequence_length: int, pad_token: int
) -> Corpus:
    """Return a corpus of bundled stories.

    A sequence begins with the line break before a story, so that a model sees each story from its
    start; in training it runs on into the next ones, in validation it ends with its own.

    Parameters
    ----------
    count, held_out : int
        How many stories to learn from, and how many more to validate on.
    seed : int
    sequence_length : int
        T; a story of more characters is cut.
    pad_token : int
    """
    told = stories.generate_stories(count + held_out, seed)
    learned, kept = told[:count], told[count:]
    tokens, starts, _ = _lines(learned)
    training = TokenDataset(tokens, sequence_length, pad_token, starts)
    tokens, starts, stops = _lines(kept)
    validation = TokenDataset(tokens, sequence_length, pad_token, starts, stops)
    return Corpus(
        f"{count:,} stories",
        training,
        validation,
        stories.entropy_per_character(),
        tuple(kept),
        hashlib.sha256(stories.corpus(told).encode()).hexdigest(),
    )


def _lines(told: list[str]) -> tuple[Tokens, np.ndarray, np.ndarray]:
    """Return stories as tokens, and where each begins and ends, line breaks on both sides."""
    tokens = tokenize_text("\n" + stories.corpus(told))
    sizes = np.array([len(story) + 1 for story in told])
    stops = np.cumsum(sizes) + 1
    return tokens, stops - sizes - 1, stops
