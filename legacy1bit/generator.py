"""Text from a model: streams and batches; log-probabilities and embeddings of a text."""

import codecs
import os
import secrets
import time
from collections import abc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, Self

import numpy as np
import numpy.typing as npt

from legacy1bit.data.tokenizer import ByteTokenizer, Tokenizer
from legacy1bit.formats.adapters import read_adapters, resolve
from legacy1bit.formats.published import read_tokenizer
from legacy1bit.hyperparams import SamplingConfig
from legacy1bit.inference import Decoder, check_tokens
from legacy1bit.model import LegacyLLM
from legacy1bit.packed import PackedModel
from legacy1bit.threads import default_threads

# Bytes of weights below which a token takes less time than waking up a second thread.
_SMALL = 1 << 20

# A call samples several tokens, at most those that take this many seconds: a reader sees no
# difference, and the cost of the call is shared.
_MOST_AT_ONCE = 64
_AT_ONCE_SECONDS = 0.01

# Sequences that are decoded side by side.
_BATCH = 32

# The longest context unless a longer one is asked for: published models promise up to 131,072
# tokens, whose keys and values take gigabytes.
MOST_CONTEXT = 8192

_SAMPLING = SamplingConfig()

# Tokens that are sampled as they are consumed.
_Tokens = abc.Generator[int, None, None]


@dataclass(frozen=True)
class Completion:
    """A prompt and its continuation.

    Attributes
    ----------
    prompt : str or bytes
    text : str
        The continuation, without the stop string.
    tokens : int
        The number of sampled tokens.
    seed : int
        The seed of the sampling.
    stopped : bool
        Whether a stop string or an end-of-text token ended it, rather than the number of tokens.
    """

    prompt: str | bytes
    text: str
    tokens: int
    seed: int
    stopped: bool


class TextStream:
    """Decode tokens into text, piece by piece.

    A character of several bytes is returned when it is complete, and a possible beginning of a stop
    string when it has turned out not to be one. An end-of-text token ends the text; like other
    special tokens it has no text of its own.

    Parameters
    ----------
    tokenizer : Tokenizer
    stop : sequence of str
        A line break in one also matches that of Windows.
    errors : str
        How to treat bytes that are not UTF-8, as in ``bytes.decode``.

    Attributes
    ----------
    stopped : bool
        Whether a stop string or an end-of-text token has ended the text.
    """

    def __init__(
        self, tokenizer: Tokenizer, stop: Sequence[str] = (), errors: str = "replace"
    ) -> None:
        if isinstance(stop, str) or not all(isinstance(one, str) and one for one in stop):
            raise ValueError(f"stop is {stop!r}, expected strings, none of them empty")
        self._tokenizer = tokenizer
        # A model of a text from Windows generates line breaks of two characters.
        self._stop = (*stop, *(one.replace("\n", "\r\n") for one in stop if "\n" in one))
        self._decode = codecs.getincrementaldecoder("utf-8")(errors).decode
        self._held = ""
        self.stopped = False

    def feed(self, token: int) -> str:
        """Add a token, and return the text that is certain now."""
        if token in self._tokenizer.stop_tokens:
            text = self.finish()
            self.stopped = True
            return text
        return self._take(self._decode(self._tokenizer.decode([token])))

    def finish(self) -> str:
        """Return the rest of the text, when no token follows."""
        text = "" if self.stopped else self._take(self._decode(b"", True)) + self._held
        self._held = ""
        return text

    def _take(self, piece: str) -> str:
        text = self._held + piece
        stops = [text.index(one) for one in self._stop if one in text]
        if stops:
            self.stopped, self._held = True, ""
            return text[: min(stops)]
        held = max((_overlap(text, one) for one in self._stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of the text that begins the stop string."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)


class Stream:
    """A text while it is generated: an iterator of its pieces.

    The model's cache is freed when the text ends, with the last reference to the stream, at
    ``close``, or at the end of a ``with``.

    Attributes
    ----------
    tokens : int
        The number of tokens sampled so far.
    seed : int
        The seed of the sampling.
    """

    def __init__(self, text: TextStream, sampled: _Tokens, seed: int) -> None:
        self.tokens = 0
        self.seed = seed
        self._text = text
        self._sampled = sampled
        self._closed = False

    def __reduce__(self) -> NoReturn:
        raise TypeError("a text cannot be copied or pickled while it is generated")

    def close(self) -> None:
        """Stop generating."""
        self._closed = True
        self._sampled.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def stopped(self) -> bool:
        """Whether a stop string or an end-of-text token has ended the text."""
        return self._text.stopped

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        # A Python generator here would be in a reference cycle with this object: the model's cache
        # would stay until cycles are collected.
        if self._closed:
            raise ValueError("the stream is closed")
        while not self.stopped and (token := next(self._sampled, None)) is not None:
            self.tokens += 1
            if piece := self._text.feed(token):
                return piece
        self._sampled.close()
        if rest := self._text.finish():
            return rest
        raise StopIteration


class Generator:
    """Generate text with a model.

    Parameters
    ----------
    model : PackedModel or LegacyLLM
        A ``LegacyLLM`` is packed first.
    tokenizer : Tokenizer, optional
        The model's tokenizer; by default tokens are bytes.
    threads : int, optional
        The number of threads; by default one for a small model, else ``default_threads()``.
    activations : {"int8", "float32"}
        See ``Decoder``.
    context : int, optional
        The tokens that a decoder keeps; by default the model's context, at most 8192.

    Notes
    -----
    The same seed, instruction set and number of threads give the same text. A prompt longer than
    the model's context is truncated to its last tokens. A text that grows past the context
    continues from its newer half.

    The whole prompt is context; in C it is the last character alone (departure 7).

    ``close``, or the end of a ``with``, releases the model; streams keep it until they end.
    """

    def __init__(
        self,
        model: PackedModel | LegacyLLM,
        tokenizer: Tokenizer | None = None,
        threads: int | None = None,
        activations: str = "int8",
        context: int | None = None,
    ) -> None:
        self._model: PackedModel | None = (
            model if isinstance(model, PackedModel) else PackedModel(model)
        )
        vocab_size = self.model.config.vocab_size
        self.tokenizer: Tokenizer = ByteTokenizer(vocab_size) if tokenizer is None else tokenizer
        if threads is None:
            threads = 1 if self.model.nbytes < _SMALL else default_threads()
        self.threads = threads
        self.activations = activations
        self.context = min(
            self.model.config.sequence_length, MOST_CONTEXT if context is None else context
        )

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        threads: int | None = None,
        form: str = "2bit",
        head: str | None = None,
        activations: str = "int8",
        context: int | None = None,
        adapters: Sequence[str] = (),
    ) -> Self:
        """Load a model of any known format, without the modules of training.

        The tokenizer is the file's or the folder's; without one, tokens are bytes.

        Parameters
        ----------
        path : path-like
        threads : int, optional
        form : {"2bit", "trits"}
            How weights are packed; see ``PackedModel``.
        head : {"float", "int8"}, optional
            How float matrices are stored; see ``PackedModel``.
        activations, context
            As above.
        adapters : sequence of str
            LoRA adapters on it, ``PATH[:SCALE]`` each: folders of PEFT or of runs, GGUF files. They
            are added.

        Raises
        ------
        ModelFileError, OSError, ValueError
            As ``PackedModel.load`` and ``read_tokenizer``.
        """
        path, added = resolve(Path(path), adapters)
        model = PackedModel.load(path, form, head, threads)
        tokenizer = read_tokenizer(path, model.config.vocab_size)
        if added:
            model = model.with_adapter(read_adapters(added, model.config))
        return cls(model, tokenizer, threads, activations, context)

    @property
    def model(self) -> PackedModel:
        """The packed model. Raises ``ValueError`` after ``close``."""
        if self._model is None:
            raise ValueError("the generator is closed")
        return self._model

    def close(self) -> None:
        """Release the model."""
        self._model = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def decoder(self, tokens: int | None = None, sequences: int = 1) -> Decoder:
        """Return a decoder of the model.

        Parameters
        ----------
        tokens : int, optional
            The most that a sequence will have; no more than the context are kept.
        sequences : int
        """
        capacity = self.context if tokens is None else max(min(tokens, self.context), 1)
        return Decoder(self.model, self.threads, capacity, sequences, self.activations)

    # Prompts

    def encode(self, prompt: str | bytes) -> npt.NDArray[np.int32]:
        """Return the tokens of a prompt, int32[T], the beginning-of-text token first.

        Raises
        ------
        ValueError
            If there are no tokens.
        IndexError
            If a byte of the prompt is not a token of the model.
        """
        begin = self.tokenizer.bos_token
        tokens = self.tokenizer.encode(prompt)
        if begin is not None:
            tokens = np.concatenate([np.array([begin], np.int32), tokens])
        if not tokens.size:
            raise ValueError("the prompt is empty, expected at least one token")
        return tokens

    # Generating

    def tokens(
        self,
        prompt: npt.ArrayLike,
        max_tokens: int = 250,
        sampling: SamplingConfig = _SAMPLING,
        seed: int | None = None,
    ) -> _Tokens:
        """Generate tokens.

        Parameters
        ----------
        prompt : int[T]
            At least one token.
        max_tokens : int
        sampling : SamplingConfig
        seed : int, optional
            By default another one each time.

        Yields
        ------
        int

        Raises
        ------
        ValueError
            If the prompt is empty, a number is out of range, or the model's weights are damaged.
        IndexError
            If the prompt has a number that is not a token.
        """
        max_tokens, seed = _check_count("max_tokens", max_tokens), _check_seed(seed)
        given = check_tokens(prompt, self.model.config.vocab_size, "the prompt")
        rng = np.random.default_rng(seed)
        decoder = self.decoder(len(given) + max_tokens)
        history = given[-decoder.capacity :].tolist()
        return self._sample(decoder, history, max_tokens, sampling, rng)

    @staticmethod
    def _sample(
        decoder: Decoder,
        history: list[int],
        left: int,
        sampling: SamplingConfig,
        rng: np.random.Generator,
    ) -> _Tokens:
        new, at_once = history[decoder.length :], 1
        while left:
            if decoder.length + len(new) > decoder.capacity:
                decoder.clear()
                new = history = _newer_half(history, decoder.capacity)
            count = min(at_once, left, decoder.capacity - decoder.length - len(new) + 1)
            begin = time.perf_counter()
            sampled = decoder.generate(new, rng.random(count), sampling).tolist()
            if time.perf_counter() - begin < _AT_ONCE_SECONDS:
                at_once = min(2 * at_once, _MOST_AT_ONCE)
            history += sampled
            new, left = sampled[-1:], left - count
            yield from sampled

    def stream(
        self,
        prompt: str | bytes,
        max_tokens: int = 250,
        sampling: SamplingConfig = _SAMPLING,
        seed: int | None = None,
        stop: Sequence[str] = (),
        errors: str = "replace",
    ) -> "Stream":
        """Generate the continuation of a prompt, piece by piece.

        Parameters
        ----------
        prompt : str or bytes
        max_tokens : int
        sampling : SamplingConfig
        seed : int, optional
            By default another one each time.
        stop : sequence of str
            The text ends before the first of these.
        errors : str
            How to treat bytes that are not UTF-8, as in ``bytes.decode``.

        Returns
        -------
        Stream
            An iterator of str, in whole characters.

        Raises
        ------
        ValueError
            If the prompt is empty and the model has no beginning-of-text token, or as ``tokens``.
        IndexError
            If a byte of the prompt is not a token of the model.
        """
        text, seed = TextStream(self.tokenizer, stop, errors), _check_seed(seed)
        sampled = self.tokens(self.encode(prompt), max_tokens, sampling, seed)
        return Stream(text, sampled, seed)

    def resume(
        self,
        decoder: Decoder,
        history: list[int],
        max_tokens: int = 250,
        sampling: SamplingConfig = _SAMPLING,
        seed: int | None = None,
        stop: Sequence[str] = (),
    ) -> "Stream":
        """Continue tokens whose beginning a decoder has in its cache, piece by piece.

        Parameters
        ----------
        decoder : Decoder
            Of this model. It has fewer tokens than ``history``, and the same.
        history : list of int
            What is sampled is appended.

        The other parameters, the result and the errors are those of ``stream``.
        """
        text, seed = TextStream(self.tokenizer, stop), _check_seed(seed)
        max_tokens, rng = _check_count("max_tokens", max_tokens), np.random.default_rng(seed)
        return Stream(text, self._sample(decoder, history, max_tokens, sampling, rng), seed)

    def complete(
        self,
        prompt: str | bytes,
        max_tokens: int = 250,
        sampling: SamplingConfig = _SAMPLING,
        seed: int | None = None,
        stop: Sequence[str] = (),
        errors: str = "replace",
    ) -> Completion:
        """Return the whole text of ``stream``; parameters and errors are the same."""
        with self.stream(prompt, max_tokens, sampling, seed, stop, errors) as stream:
            text = "".join(stream)
        return Completion(prompt, text, stream.tokens, stream.seed, stream.stopped)

    def batch(
        self,
        prompts: Sequence[str | bytes],
        max_tokens: int = 250,
        sampling: SamplingConfig = _SAMPLING,
        seed: int | None = None,
        stop: Sequence[str] = (),
        errors: str = "replace",
    ) -> list[Completion]:
        """Generate several texts side by side, so that the weights are read once for all of them.

        The text of prompt i has the seed ``seed + i``, and very rarely differs from that of
        ``complete``: sums may be rounded differently. The other parameters and the errors are those
        of ``stream``.
        """
        max_tokens, seed = _check_count("max_tokens", max_tokens), _check_seed(seed)
        if isinstance(prompts, (str, bytes)):
            raise TypeError("prompts is one text, expected several")
        encoded = [self.encode(prompt) for prompt in prompts]
        texts = [TextStream(self.tokenizer, stop, errors) for _ in prompts]
        done: list[Completion] = []
        for first in range(0, len(prompts), _BATCH):
            part = slice(first, first + _BATCH)
            sizes, pieces = self._generate_batch(
                encoded[part], texts[part], max_tokens, sampling, seed + first
            )
            done += [
                Completion(prompt, piece, size, seed + first + i, text.stopped)
                for i, (prompt, piece, size, text) in enumerate(
                    zip(prompts[part], pieces, sizes, texts[part], strict=True)
                )
            ]
        return done

    def _generate_batch(
        self,
        prompts: list[npt.NDArray[np.int32]],
        texts: list[TextStream],
        max_tokens: int,
        sampling: SamplingConfig,
        seed: int,
    ) -> tuple[list[int], list[str]]:
        """Return for each prompt the number of sampled tokens, and their text."""
        decoder = self.decoder(max(map(len, prompts)) + max_tokens, len(prompts))
        capacity = decoder.capacity
        history = [prompt[-capacity:].tolist() for prompt in prompts]
        rngs = [np.random.default_rng(seed + i) for i in range(len(prompts))]
        sizes, pieces = [0] * len(prompts), [""] * len(prompts)
        active = list(range(len(prompts))) if max_tokens else []
        for i in active:
            if len(history[i]) > 1:
                decoder.prefill(history[i][:-1], i)
        while active:
            for i in active:
                if decoder.length_of(i) == capacity:
                    decoder.truncate(0, i)
                    history[i] = _newer_half(history[i], capacity)
                    if len(history[i]) > 1:
                        decoder.prefill(history[i][:-1], i)
            free = min(capacity - decoder.length_of(i) for i in active)
            count = min([free, _MOST_AT_ONCE // 4, *(max_tokens - sizes[i] for i in active)])
            uniforms = np.stack([rngs[i].random(count) for i in active])
            newest = [history[i][-1] for i in active]
            sampled = decoder.generate_batch(newest, uniforms, sampling, active).tolist()
            for i, tokens in zip(active, sampled, strict=True):
                history[i] += tokens
                for token in tokens:
                    if not texts[i].stopped:
                        pieces[i] += texts[i].feed(token)
                        sizes[i] += 1
            active = [i for i in active if not texts[i].stopped and sizes[i] < max_tokens]
        return sizes, [piece + text.finish() for piece, text in zip(pieces, texts, strict=True)]

    # Reading

    def log_probabilities(self, text: str | bytes) -> npt.NDArray[np.float64]:
        """Return log p of each token of a text, given the tokens before it: float64[T], in nats.

        A token sees at least half of the model's context if the text is as long. The first value is
        NaN if the model has no beginning-of-text token.

        Raises
        ------
        ValueError
            If the text is empty.
        IndexError
            If a byte of the text is not a token of the model.
        """
        tokens = self.encode(text)
        begins = self.tokenizer.bos_token is not None
        if tokens.size == begins:
            raise ValueError("the text is empty, expected at least one token")
        decoder = self.decoder(tokens.size)
        result = np.full(tokens.size, np.nan)
        at = 0
        while at < tokens.size - 1:
            # A block at a time: the logits of a long text take much memory.
            block = min(tokens.size - 1 - at, 128, decoder.capacity - decoder.length)
            if block == 0:
                decoder.clear()
                back = min(decoder.capacity // 2, at)
                if back:
                    decoder.prefill(tokens[at - back : at])
                continue
            logits = decoder.prefill_logits(tokens[at : at + block]).astype(np.float64)
            logits -= logits.max(axis=1, keepdims=True)
            truth = np.take_along_axis(logits, tokens[at + 1 : at + block + 1, None], axis=1)
            sums = np.log(np.exp(logits).sum(axis=1))
            result[at + 1 : at + block + 1] = truth[:, 0] - sums
            at += block
        return result[1:] if begins else result

    def embed(self, text: str | bytes) -> npt.NDArray[np.float32]:
        """Return the embedding of each token of a text: float32[T, C].

        It is the hidden state before the output layer; its mean over the tokens, or the last one,
        represents the whole text.

        Raises
        ------
        ValueError
            If the text is empty, or longer than the model's context.
        IndexError
            If a byte of the text is not a token of the model.
        """
        tokens = self.encode(text)
        begins = self.tokenizer.bos_token is not None
        decoder = self.decoder(tokens.size)
        if tokens.size == begins:
            raise ValueError("the text is empty, expected at least one token")
        if tokens.size > decoder.capacity:
            raise ValueError(
                f"the text has {tokens.size} tokens, expected at most {decoder.capacity}"
            )
        return decoder.prefill_states(tokens)[int(begins) :]


def new_seed() -> int:
    """Return a random seed."""
    return secrets.randbits(32)


def _newer_half(history: list[int], capacity: int) -> list[int]:
    """Return the tokens from which a text continues that has filled the context."""
    return history[-max(capacity // 2, 1) :]


def _check_seed(seed: int | None) -> int:
    return new_seed() if seed is None else _check_count("seed", seed)


def _check_count(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} is {value!r}, expected a whole number")
    if value < 0:
        raise ValueError(f"{name} is {value}, expected 0 or more")
    return int(value)
