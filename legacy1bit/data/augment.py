"""Sequences changed a little each time they are learned from, so that a short text lasts longer."""

import re
from collections.abc import Callable

import numpy as np

from legacy1bit.data.tokenizer import SubwordTokenizer, Tokenizer
from legacy1bit.data_utils import Tokens
from legacy1bit.dataset import Batch
from legacy1bit.hyperparams import DataConfig
from legacy1bit.system.errors import SettingError

# So many tokens in a row are hidden together.
_SPAN = 3

_WORD = re.compile(rb"[A-Za-z]+")


class Augmentation:
    """What becomes of a batch on its way to training.

    Subword splitting, case and space noise change what is read and what is predicted alike; token
    dropout and span masking change only what is read.

    Parameters
    ----------
    config : DataConfig
    tokenizer : Tokenizer
    pad_token : int
    seed : int

    Attributes
    ----------
    active : bool
        Whether anything is changed at all.

    Raises
    ------
    ValueError
        If sequences would change their length that share rows with others, or if words of tokens
        would change that nobody can read.
    """

    def __init__(self, config: DataConfig, tokenizer: Tokenizer, pad_token: int, seed: int) -> None:
        self._config, self._tokenizer = config, tokenizer
        self._pad_token, self._seed = pad_token, seed
        self._changes: list[Callable[[Tokens, np.random.Generator], Tokens]] = []
        if config.case_noise or config.space_noise:
            self._changes.append(self._noisy)
        if config.subword_splitting:
            self._changes.append(self._split)
        if self._changes and (config.order == "packed" or config.document_mask):
            raise SettingError(
                "case_noise, space_noise and subword_splitting change the lengths of documents: "
                "expected 0 where they are packed or have a document mask",
                *("case_noise", "space_noise", "subword_splitting"),
            )
        if tokenizer.kind == "unknown" and (config.case_noise or config.space_noise):
            raise SettingError(
                "case_noise and space_noise change text, and what the tokens stand for is not "
                "known: expected 0",
                *("case_noise", "space_noise"),
            )
        self.active = bool(self._changes or config.token_dropout or config.span_masking)
        self._specials = [token for token in (tokenizer.eos_token,) if token is not None]
        # What stands for no text hides best; where there is none, the byte that no text has.
        self._hidden, self._text_tokens = 0, tokenizer.vocab_size
        if isinstance(tokenizer, SubwordTokenizer):
            self._hidden, self._text_tokens = tokenizer.padding_token, tokenizer.vocab_size - 2

    def __call__(self, batch: Batch, position: tuple[int, ...]) -> Batch:
        """Return a changed copy of a batch; seed and position alone decide how."""
        rng = np.random.default_rng([self._seed, *position])
        tokens, targets = batch.tokens.copy(), batch.targets.copy()
        if self._changes:
            for row, goal in zip(tokens, targets, strict=True):
                self._change(row, goal, rng)
        text = tokens != self._pad_token
        config = self._config
        if config.span_masking:
            # Spans overlap, and begin before the row, too: each place is hidden as often as asked.
            rows, width = tokens.shape
            share = 1.0 - (1.0 - config.span_masking) ** (1.0 / _SPAN)
            begins = rng.random((rows, width + _SPAN - 1)) < share
            hidden = np.logical_or.reduce([begins[:, i : i + width] for i in range(_SPAN)])
            tokens[hidden & text] = self._hidden
        if config.token_dropout:
            dropped = (rng.random(tokens.shape) < config.token_dropout) & text
            tokens[dropped] = rng.integers(0, self._text_tokens, int(dropped.sum()))
        return Batch(tokens, targets, batch.starts)

    def _change(self, row: Tokens, goal: Tokens, rng: np.random.Generator) -> None:
        """Change the text of a row and its targets, in place; what is too long is cut."""
        size = int((goal != self._pad_token).sum())
        if not size:
            return
        text = np.concatenate([row[:size], goal[size - 1 : size]])
        for change in self._changes:
            text = change(text, rng)
        text = text[: row.size + 1]
        row[:], goal[:] = self._pad_token, self._pad_token
        row[: max(text.size - 1, 0)] = text[:-1]
        goal[: max(text.size - 1, 0)] = text[1:]

    def _split(self, text: Tokens, rng: np.random.Generator) -> Tokens:
        """Take merges back, and merges of what is left of them."""
        parents = self._tokenizer.parents
        fresh = np.ones(text.size, bool)
        while True:
            split = fresh & (parents[text, 0] >= 0)
            split &= rng.random(text.size) < self._config.subword_splitting
            if not split.any():
                return text
            sizes = 1 + split
            places = np.cumsum(sizes) - sizes
            longer = np.empty(int(sizes.sum()), np.int32)
            longer[places] = np.where(split, parents[text, 0], text)
            longer[places[split] + 1] = parents[text[split], 1]
            # What has stayed is not asked again.
            fresh = np.repeat(split, sizes)
            text = longer

    def _noisy(self, text: Tokens, rng: np.random.Generator) -> Tokens:
        """Change words and spaces, and tokenize them again."""
        if not self._specials:
            return self._tokenizer.encode(self._noise(self._tokenizer.decode(text), rng))
        special = np.isin(text, self._specials)
        return np.concatenate(
            [
                piece
                if special_run
                else self._tokenizer.encode(self._noise(self._tokenizer.decode(piece), rng))
                for special_run, piece in _runs(text, special)
            ]
        )

    def _noise(self, text: bytes, rng: np.random.Generator) -> bytes:
        config = self._config

        def change_case(word: re.Match[bytes]) -> bytes:
            if rng.random() >= config.case_noise:
                return word[0]
            ways = [word[0].lower(), word[0].upper(), word[0].capitalize()]
            others = [way for way in ways if way != word[0]]
            return others[rng.integers(len(others))]

        def change_space(space: re.Match[bytes]) -> bytes:
            if rng.random() >= config.space_noise:
                return space[0]
            return (b"  ", b"\n")[rng.integers(2)]

        if config.case_noise:
            text = _WORD.sub(change_case, text)
        if config.space_noise:
            text = re.sub(rb" ", change_space, text)
        return text


def _runs(text: Tokens, flags: np.ndarray) -> list[tuple[bool, Tokens]]:
    """Cut a text into runs of equal flags."""
    edges = np.flatnonzero(np.diff(flags)) + 1
    starts = [0, *edges.tolist()]
    return [
        (bool(flags[start]), piece)
        for start, piece in zip(starts, np.split(text, edges), strict=True)
    ]
