"""Text from a model: streaming, in batches, and what a model thinks of a text it is given."""

import codecs
import os
import secrets
import time
from collections import abc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NoReturn, Self

import numpy as np
import numpy.typing as npt

from legacy1bit.data.tokenizer import ByteTokenizer, Tokenizer, tokenizer_of
from legacy1bit.hyperparams import SamplingConfig
from legacy1bit.inference import Decoder, check_tokens
from legacy1bit.model import LegacyLLM
from legacy1bit.packed import PackedModel
from legacy1bit.threads import default_threads

# Below so many bytes of weights a token is written faster than a second thread wakes up.
_SMALL = 1 << 20

# Tokens are drawn several at a time, as many as come within so many seconds: a reader sees no
# difference, and the call that draws them costs less than they do.
_MOST_AT_ONCE = 64
_AT_ONCE_SECONDS = 0.01

# Sequences that are written side by side.
_TOGETHER = 32

_SAMPLING = SamplingConfig()

# Tokens that are drawn when they are asked for.
_Drawn = abc.Generator[int, None, None]


@dataclass(frozen=True)
class Completion:
    """A text that a model has written.

    Attributes
    ----------
    prompt : str or bytes
    text : str
        What follows the prompt, without the stop string.
    tokens : int
        How many were drawn.
    seed : int
        What it was drawn with.
    stopped : bool
        Whether a stop string or the token for the end of texts ended it, rather than the number
        of tokens.
    """

    prompt: str | bytes
    text: str
    tokens: int
    seed: int
    stopped: bool


class TextStream:
    """Tokens into text, piece by piece.

    A character of several bytes comes when it is whole, and what may be the beginning of a stop
    string when it turns out not to be one. The token that ends texts ends this one; like the other
    special ones it has no text.

    Parameters
    ----------
    tokenizer : Tokenizer
    stop : sequence of str
        A line break in one is that of Windows, too.
    errors : str
        What becomes of bytes that are no UTF-8, as in ``bytes.decode``.
    """

    def __init__(
        self, tokenizer: Tokenizer, stop: Sequence[str] = (), errors: str = "replace"
    ) -> None:
        if isinstance(stop, str) or not all(isinstance(one, str) and one for one in stop):
            raise ValueError(f"stop is {stop!r}, expected strings, none of them empty")
        self._tokenizer = tokenizer
        # A model of a text from Windows writes line breaks of two characters.
        self._stop = (*stop, *(one.replace("\n", "\r\n") for one in stop if "\n" in one))
        self._decode = codecs.getincrementaldecoder("utf-8")(errors).decode
        self._held = ""
        self.stopped = False

    def feed(self, token: int) -> str:
        """Take a token and return the text that is certain now."""
        if token == self._tokenizer.eos_token:
            text = self.finish()
            self.stopped = True
            return text
        return self._take(self._decode(self._tokenizer.decode([token])))

    def finish(self) -> str:
        """Return what was held back, when no token follows."""
        text = "" if self.stopped else self._take(self._decode(b"", True)) + self._held
        self._held = ""
        return text

    def _take(self, piece: str) -> str:
        text = self._held + piece
        found = [text.index(one) for one in self._stop if one in text]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        held = max((_overlap(text, one) for one in self._stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """Return how long an end of the text is a beginning of the stop string."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)


class Stream:
    """A text while it is written: an iterator of its pieces.

    What it needs to write goes when the text ends, with the last reference to it, at ``close``, or
    at the end of a ``with``.

    Attributes
    ----------
    tokens : int
        How many were drawn so far.
    seed : int
        What the text is drawn with.
    """

    def __init__(self, text: TextStream, drawn: _Drawn, seed: int) -> None:
        self.tokens = 0
        self.seed = seed
        self._text = text
        self._drawn = drawn
        self._closed = False

    def __reduce__(self) -> NoReturn:
        raise TypeError("a text cannot be copied or pickled while it is written")

    def close(self) -> None:
        """Write no more."""
        self._closed = True
        self._drawn.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def stopped(self) -> bool:
        """Whether a stop string, or the token for the end of texts, has ended it."""
        return self._text.stopped

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        # A generator here would hold this object as this object holds it, and the model's cache
        # with both, until cycles are collected.
        if self._closed:
            raise ValueError("the stream is closed")
        while not self.stopped and (token := next(self._drawn, None)) is not None:
            self.tokens += 1
            if piece := self._text.feed(token):
                return piece
        self._drawn.close()
        if rest := self._text.finish():
            return rest
        raise StopIteration


class Generator:
    """A model that writes.

    Parameters
    ----------
    model : PackedModel or LegacyLLM
        A ``LegacyLLM`` is packed first.
    tokenizer : Tokenizer, optional
        Bytes, as many as the model knows, when not given.
    threads : int, optional
        How many threads may share the work; as many as pay for a model of this size when not given.

    Notes
    -----
    The same seed, instruction set and number of threads give the same text. A text that grows past
    the model's context goes on from its newer half, and of a prompt longer than that the newest
    tokens count.

    The whole prompt is context; in C it is the last character alone (departure 7).

    ``close``, or the end of a ``with``, lets go of the model; texts that are being written keep it
    until they end.
    """

    def __init__(
        self,
        model: PackedModel | LegacyLLM,
        tokenizer: Tokenizer | None = None,
        threads: int | None = None,
    ) -> None:
        self._model: PackedModel | None = (
            model if isinstance(model, PackedModel) else PackedModel(model)
        )
        vocab_size = self.model.config.vocab_size
        self.tokenizer: Tokenizer = ByteTokenizer(vocab_size) if tokenizer is None else tokenizer
        if threads is None:
            threads = 1 if self.model.nbytes < _SMALL else default_threads()
        self.threads = threads

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], threads: int | None = None, form: str = "2bit"
    ) -> Self:
        """Read a model folder, or a file of the C original, and nothing that only training needs.

        The tokenizer is the folder's; bytes where there is none.

        Parameters
        ----------
        path : path-like
        threads : int, optional
        form : {"2bit", "trits"}
            How weights are packed; see ``PackedModel``.

        Raises
        ------
        ModelFileError, OSError, ValueError
            As ``PackedModel.load`` and ``tokenizer_of``.
        """
        model = PackedModel.load(path, form)
        return cls(model, tokenizer_of(path, model.config.vocab_size), threads)

    @property
    def model(self) -> PackedModel:
        """What writes. Raises ``ValueError`` once the generator was closed."""
        if self._model is None:
            raise ValueError("the generator is closed")
        return self._model

    def close(self) -> None:
        """Let go of the model."""
        self._model = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # What a model is given

    def encode(self, prompt: str | bytes) -> npt.NDArray[np.int32]:
        """Return a prompt's tokens, int32[T], behind the one that texts begin with.

        Raises
        ------
        ValueError
            If there is none.
        IndexError
            If a byte of the prompt is no token of the model's.
        """
        begin = self.tokenizer.bos_token
        tokens = self.tokenizer.encode(prompt)
        if begin is not None:
            tokens = np.concatenate([np.array([begin], np.int32), tokens])
        if not tokens.size:
            raise ValueError("the prompt is empty, expected at least one token")
        return tokens

    # Writing

    def tokens(
        self,
        prompt: npt.ArrayLike,
        max_tokens: int = 250,
        sampling: SamplingConfig = _SAMPLING,
        seed: int | None = None,
    ) -> _Drawn:
        """Continue tokens with tokens.

        Parameters
        ----------
        prompt : int[T]
            At least one token.
        max_tokens : int
        sampling : SamplingConfig
        seed : int, optional
            Another one each time when not given.

        Yields
        ------
        int

        Raises
        ------
        ValueError
            If the prompt is empty, a number is out of range, or the model's weights are damaged.
        IndexError
            If the prompt holds what is no token.
        """
        max_tokens, seed = _check_count("max_tokens", max_tokens), _check_seed(seed)
        given = check_tokens(prompt, self.model.config.vocab_size, "the prompt")
        rng = np.random.default_rng(seed)
        decoder = Decoder(self.model, self.threads)
        text = given[-decoder.capacity :].tolist()
        return self._draw(decoder, text, max_tokens, sampling, rng)

    @staticmethod
    def _draw(
        decoder: Decoder,
        text: list[int],
        left: int,
        sampling: SamplingConfig,
        rng: np.random.Generator,
    ) -> _Drawn:
        fresh, at_once = text[:], 1
        while left:
            if decoder.length + len(fresh) > decoder.capacity:
                decoder.clear()
                text = text[-max(decoder.capacity // 2, 1) :]
                fresh = text
            room = decoder.capacity - decoder.length - len(fresh) + 1
            count = min(at_once, left, room)
            begin = time.perf_counter()
            drawn = decoder.write(fresh, rng.random(count), sampling).tolist()
            if time.perf_counter() - begin < _AT_ONCE_SECONDS:
                at_once = min(2 * at_once, _MOST_AT_ONCE)
            text += drawn
            fresh, left = drawn[-1:], left - count
            yield from drawn

    def stream(
        self,
        prompt: str | bytes,
        max_tokens: int = 250,
        sampling: SamplingConfig = _SAMPLING,
        seed: int | None = None,
        stop: Sequence[str] = (),
        errors: str = "replace",
    ) -> "Stream":
        """Continue a text, piece by piece, without the prompt.

        Parameters
        ----------
        prompt : str or bytes
        max_tokens : int
        sampling : SamplingConfig
        seed : int, optional
            Another one each time when not given.
        stop : sequence of str
            The text ends before the first of these.
        errors : str
            What becomes of bytes that are no UTF-8, as in ``bytes.decode``.

        Returns
        -------
        Stream
            An iterator of str, in whole characters.

        Raises
        ------
        ValueError
            If the model has no token to begin with and the prompt is empty, or as ``tokens``.
        IndexError
            If a byte of the prompt is no token of the model's.
        """
        text, seed = TextStream(self.tokenizer, stop, errors), _check_seed(seed)
        drawn = self.tokens(self.encode(prompt), max_tokens, sampling, seed)
        return Stream(text, drawn, seed)

    def complete(
        self,
        prompt: str | bytes,
        max_tokens: int = 250,
        sampling: SamplingConfig = _SAMPLING,
        seed: int | None = None,
        stop: Sequence[str] = (),
        errors: str = "replace",
    ) -> Completion:
        """Continue a text and return it whole; parameters and errors are those of ``stream``."""
        return self.batch([prompt], max_tokens, sampling, seed, stop, errors)[0]

    def batch(
        self,
        prompts: Sequence[str | bytes],
        max_tokens: int = 250,
        sampling: SamplingConfig = _SAMPLING,
        seed: int | None = None,
        stop: Sequence[str] = (),
        errors: str = "replace",
    ) -> list[Completion]:
        """Continue several texts side by side, so that the weights are read once for all of them.

        The text of prompt i has the seed ``seed + i``, and hardly ever differs from what that
        prompt gives alone: sums may be rounded differently. The other parameters and the errors
        are those of ``stream``.
        """
        max_tokens, seed = _check_count("max_tokens", max_tokens), _check_seed(seed)
        if isinstance(prompts, (str, bytes)):
            raise TypeError("prompts is one text, expected several")
        encoded = [self.encode(prompt) for prompt in prompts]
        texts = [TextStream(self.tokenizer, stop, errors) for _ in prompts]
        done: list[Completion] = []
        for first in range(0, len(prompts), _TOGETHER):
            part = slice(first, first + _TOGETHER)
            sizes, pieces = self._write_together(
                encoded[part], texts[part], max_tokens, sampling, seed + first
            )
            done += [
                Completion(prompt, piece, size, seed + first + i, text.stopped)
                for i, (prompt, piece, size, text) in enumerate(
                    zip(prompts[part], pieces, sizes, texts[part], strict=True)
                )
            ]
        return done

    def _write_together(
        self,
        prompts: list[npt.NDArray[np.int32]],
        texts: list[TextStream],
        max_tokens: int,
        sampling: SamplingConfig,
        seed: int,
    ) -> tuple[list[int], list[str]]:
        """Return for each prompt how many tokens were drawn and the text they are."""
        decoder = Decoder(self.model, self.threads, sequences=len(prompts))
        capacity = decoder.capacity
        history = [prompt[-capacity:].tolist() for prompt in prompts]
        rngs = [np.random.default_rng(seed + i) for i in range(len(prompts))]
        sizes, pieces = [0] * len(prompts), [""] * len(prompts)
        active = list(range(len(prompts))) if max_tokens else []
        for i in active:
            if len(history[i]) > 1:
                decoder.extend(history[i][:-1], i)
        while active:
            for i in active:
                if decoder.length_of(i) == capacity:
                    decoder.truncate(0, i)
                    history[i] = history[i][-max(capacity // 2, 1) :]
                    if len(history[i]) > 1:
                        decoder.extend(history[i][:-1], i)
            room = min(capacity - decoder.length_of(i) for i in active)
            count = min([room, _MOST_AT_ONCE // 4, *(max_tokens - sizes[i] for i in active)])
            uniforms = np.stack([rngs[i].random(count) for i in active])
            newest = [history[i][-1] for i in active]
            drawn = decoder.write_together(newest, uniforms, sampling, active).tolist()
            for i, tokens in zip(active, drawn, strict=True):
                history[i] += tokens
                for token in tokens:
                    if not texts[i].stopped:
                        pieces[i] += texts[i].feed(token)
                        sizes[i] += 1
            active = [i for i in active if not texts[i].stopped and sizes[i] < max_tokens]
        return sizes, [piece + text.finish() for piece, text in zip(pieces, texts, strict=True)]

    # Reading

    def log_probabilities(self, text: str | bytes) -> npt.NDArray[np.float64]:
        """Return log p of each token of a text, given those before it: float64[T], in nats.

        A token sees at least half of the model's context where there is as much. That of the first
        is NaN where the model has no token for texts to begin with.

        Raises
        ------
        ValueError
            If the text is empty.
        IndexError
            If a byte of it is no token of the model's.
        """
        tokens = self.encode(text)
        given = self.tokenizer.bos_token is not None
        if tokens.size == given:
            raise ValueError("the text is empty, expected at least one token")
        decoder = Decoder(self.model, self.threads)
        found = np.full(tokens.size, np.nan)
        at = 0
        while at < tokens.size - 1:
            # A block at a time: all logits of a long text would be much.
            block = min(tokens.size - 1 - at, 128, decoder.capacity - decoder.length)
            if block == 0:
                decoder.clear()
                back = min(decoder.capacity // 2, at)
                if back:
                    decoder.extend(tokens[at - back : at])
                continue
            logits = decoder.extend_all(tokens[at : at + block]).astype(np.float64)
            logits -= logits.max(axis=1, keepdims=True)
            truth = np.take_along_axis(logits, tokens[at + 1 : at + block + 1, None], axis=1)
            sums = np.log(np.exp(logits).sum(axis=1))
            found[at + 1 : at + block + 1] = truth[:, 0] - sums
            at += block
        return found[1:] if given else found

    def embed(self, text: str | bytes) -> npt.NDArray[np.float32]:
        """Return what the model makes of each token of a text: float32[T, C].

        It is the hidden state that the output layer gets; its mean over the tokens, or the last
        one, stands for the whole text.

        Raises
        ------
        ValueError
            If the text is empty, or does not fit the model's context.
        IndexError
            If a byte of it is no token of the model's.
        """
        tokens = self.encode(text)
        given = self.tokenizer.bos_token is not None
        decoder = Decoder(self.model, self.threads)
        if tokens.size == given:
            raise ValueError("the text is empty, expected at least one token")
        if tokens.size > decoder.capacity:
            raise ValueError(
                f"the text has {tokens.size} tokens, expected at most {decoder.capacity}"
            )
        return decoder.extend_states(tokens)[int(given) :]


def new_seed() -> int:
    """Return a seed like no other: what is drawn with it is another text each time."""
    return secrets.randbits(32)


def _check_seed(seed: int | None) -> int:
    return new_seed() if seed is None else _check_count("seed", seed)


def _check_count(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} is {value!r}, expected a whole number")
    if value < 0:
        raise ValueError(f"{name} is {value}, expected 0 or more")
    return int(value)
