"""Continuous batching: many requests side by side, each in a slot of one decoder.

Between two tokens of the texts that run, new requests join, and one block of one prompt passes: so
nobody waits for a long prompt. Each text has its own sampling and random numbers, and is the same
whatever runs beside it: to the bit where products are whole numbers, which they are in models of
codes whose float matrices are stored in int8 (``head="int8"``).
"""

import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import index
from typing import Self

import numpy as np
import numpy.typing as npt

from legacy1bit.generator import Generator, TextStream
from legacy1bit.hyperparams import SamplingConfig
from legacy1bit.inference import NonfiniteLogits, check_tokens
from legacy1bit.serve.requests import (
    Closed,
    Embedding,
    Event,
    Finished,
    GenerationRequest,
    Piece,
    QueueFull,
    Reason,
)
from legacy1bit.serve.slots import MOST_SLOTS, Slot, Slots

_OnEvent = Callable[[Event], None]


class Ticket:
    """A request on its way; every method may be called from any thread."""

    def __init__(self, on_event: _OnEvent | None = None) -> None:
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._on_event = on_event or self._events.put
        self.cancelled = False

    def get(self, timeout: float | None = None) -> Event:
        """Return the next event; the last one is ``Finished``.

        Raises
        ------
        TimeoutError
            If there is none after so many seconds.
        """
        try:
            return self._events.get(timeout=timeout)
        except queue.Empty:
            raise TimeoutError(f"no event in {timeout} s") from None

    def __iter__(self) -> Iterator[Event]:
        """Yield the events up to ``Finished``."""
        event: Event | None = None
        while not isinstance(event, Finished):
            yield (event := self.get())

    def cancel(self) -> None:
        """End the request before its next token; ``Finished`` ("cancelled") still comes."""
        self.cancelled = True

    def deliver(self, event: Event) -> None:
        """Hand an event over; a receiver that raises has gone, and its request is cancelled."""
        try:
            self._on_event(event)
        except Exception:
            self.cancelled = True


@dataclass(frozen=True)
class Stats:
    """Numbers of an engine: those of now, and totals since its start."""

    running: int
    waiting: int
    slots: int
    requests: int
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    prompt_seconds: float
    generation_seconds: float


class _Task:
    """A request, and how far it is.

    Attributes
    ----------
    passed : int
        The tokens of the prompt that have passed through the model.
    cached : int
        Of these, the ones that were in the cache.
    """

    def __init__(self, ticket: Ticket, tokens: npt.NDArray[np.int32]) -> None:
        self.ticket, self.tokens = ticket, tokens
        self.passed = self.cached = self.sampled = 0
        self.start = 0.0
        self.slot: Slot

    def finish(self, reason: Reason, message: str = "") -> None:
        """Deliver the last event."""
        end = Finished(reason, self.tokens.size, self.cached, self.sampled, message)
        self.ticket.deliver(end)


class _Embed(_Task):
    """A text to embed."""

    def __init__(self, ticket: Ticket, tokens: npt.NDArray[np.int32]) -> None:
        super().__init__(ticket, tokens)
        self.states: list[npt.NDArray[np.float32]] = []


class _Text(_Task):
    """A text to generate."""

    def __init__(
        self,
        ticket: Ticket,
        tokens: npt.NDArray[np.int32],
        request: GenerationRequest,
        text: TextStream,
        limit: int,
        vocab: int,
    ) -> None:
        super().__init__(ticket, tokens)
        self.request, self.text, self.limit = request, text, limit
        self.newest = 0
        self._rng = np.random.default_rng(request.seed)
        self._bias: npt.NDArray[np.float32] | None = None
        self._seen: set[int] = set()
        if request.logit_bias or request.frequency_penalty or request.presence_penalty:
            self._bias = np.zeros(vocab, np.float32)
            for token, value in request.logit_bias.items():
                self._bias[token] = value

    def draw(self) -> float:
        """Return the random number of the next token."""
        return self._rng.random()

    def bias(self) -> npt.NDArray[np.float32] | None:
        """Return what is added to the logits of the next token: float32[V]."""
        if self.request.constraint is None:
            return self._bias
        base = np.float32(0) if self._bias is None else self._bias
        return np.where(self.request.constraint.allowed(), base, np.float32(-np.inf))

    def take(self, token: int, logits: npt.NDArray[np.float32] | None) -> Reason | None:
        """Deliver a sampled token; return why it is the last, or None."""
        self.sampled, self.newest = self.sampled + 1, token
        if self._bias is not None:
            self._bias[token] -= self.request.frequency_penalty
            if token not in self._seen:
                self._seen.add(token)
                self._bias[token] -= self.request.presence_penalty
        text = self.text.feed(token)
        reason: Reason | None = None
        constraint = self.request.constraint
        if self.text.stopped or (constraint is not None and constraint.advance(token)):
            reason = "stop"
        elif self.sampled == self.limit:
            reason = "length"
        if reason:
            text += self.text.finish()
        if logits is None:
            self.ticket.deliver(Piece(text, token))
        else:
            logprobs, top = _log_probabilities(logits, self.request.logprobs or 0)
            self.ticket.deliver(Piece(text, token, float(logprobs[token]), top))
        return reason


def _log_probabilities(
    logits: npt.NDArray[np.float32], count: int
) -> tuple[npt.NDArray[np.float64], tuple[tuple[int, float], ...]]:
    """Return the log-probability of each token, and the likeliest tokens, the first of equals."""
    values = logits.astype(np.float64)
    values -= values.max()
    values -= math.log(np.exp(values).sum())
    # All that are as likely as the last of them, so that of equals the first are taken.
    least = np.partition(values, -count)[-count] if count else np.inf
    likely = np.flatnonzero(values >= least)
    likely = likely[np.argsort(-values[likely], kind="stable")][:count]
    return values, tuple((int(token), float(values[token])) for token in likely)


class Engine:
    """Generate texts of a model for many requests side by side.

    Parameters
    ----------
    generator : Generator
        Its model, threads and tokenizer are used; it stays open at ``close``.
    slots : int
        How many requests run at once.
    context : int, optional
        The most tokens of a prompt and its text; by default the generator's context.
    queue : int
        How many requests may wait for a slot.

    Notes
    -----
    Every method may be called from any thread. Equal requests of one seed get equal texts, those of
    ``Generator.complete``; only where the context is full ``complete`` goes on, and a request ends
    ("length").
    """

    def __init__(
        self, generator: Generator, slots: int = 4, context: int | None = None, queue: int = 64
    ) -> None:
        if not 1 <= slots <= MOST_SLOTS:
            raise ValueError(f"slots is {slots}, expected 1 to {MOST_SLOTS}")
        if queue < 0:
            raise ValueError(f"queue is {queue}, expected 0 or more")
        self.generator = generator
        self._slots = Slots(generator, slots, context)
        self._decoder = self._slots.decoder
        self._vocab, self._queue = generator.model.config.vocab_size, queue
        self._changed = threading.Condition()
        self._waiting: deque[_Task] = deque()
        self._prompts: deque[_Task] = deque()
        self._texts: list[_Text] = []
        self._closed = self._ending = False
        self._requests = self._prompt_tokens = self._cached_tokens = self._generated_tokens = 0
        self._prompt_seconds = self._generation_seconds = 0.0
        self._mean_seconds = 1.0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def context(self) -> int:
        """The most tokens of a prompt and its text."""
        return self._decoder.capacity

    # --- Requests, from any thread

    def submit(self, request: GenerationRequest, on_event: _OnEvent | None = None) -> Ticket:
        """Queue a request.

        Parameters
        ----------
        request : GenerationRequest
        on_event : callable, optional
            Is called with each event, from the engine's thread, which waits for it; else they are
            got from the ticket.

        Raises
        ------
        QueueFull
            If too many requests wait.
        Closed
            If the engine ends.
        ValueError, TypeError, IndexError
            If the request does not fit the model or the context.
        """
        tokens = self._check_prompt(request.tokens)
        if index(request.max_tokens) < 1:
            raise ValueError(f"max_tokens is {request.max_tokens}, expected 1 or more")
        if index(request.seed) < 0:
            raise ValueError(f"seed is {request.seed}, expected 0 or more")
        if request.logprobs is not None and not 0 <= index(request.logprobs) <= self._vocab:
            raise ValueError(f"logprobs is {request.logprobs}, expected 0 to {self._vocab}")
        if not isinstance(request.sampling, SamplingConfig):
            raise TypeError(f"sampling is {request.sampling!r}, expected a SamplingConfig")
        for name in ("frequency_penalty", "presence_penalty"):
            if not math.isfinite(value := getattr(request, name)):
                raise ValueError(f"{name} is {value}, expected a finite number")
        for token, value in request.logit_bias.items():
            if not 0 <= index(token) < self._vocab:
                raise IndexError(f"logit_bias has token {token}, expected 0 to {self._vocab - 1}")
            if not abs(value) < 1e30:
                raise ValueError(f"logit_bias of token {token} is {value}, expected less than 1e30")
        ticket = Ticket(on_event)
        limit = min(request.max_tokens, self.context - tokens.size + 1)
        text = TextStream(self.generator.tokenizer, request.stop)
        return self._enqueue(_Text(ticket, tokens, request, text, limit, self._vocab))

    def submit_embedding(self, tokens: npt.ArrayLike, on_event: _OnEvent | None = None) -> Ticket:
        """Queue a text to embed: its events are an ``Embedding`` and ``Finished`` ("stop").

        Parameters and errors are those of ``submit``.
        """
        return self._enqueue(_Embed(Ticket(on_event), self._check_prompt(tokens)))

    def embed(self, tokens: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """Return the last hidden state of each token: float32[T, C].

        Raises ``RuntimeError`` if the engine ends before; other errors are those of ``submit``.
        """
        for event in self.submit_embedding(tokens):
            if isinstance(event, Embedding):
                return event.states
        assert isinstance(event, Finished)
        raise RuntimeError(f"no embedding: {event.message or event.reason}")

    def tokenize(self, text: str | bytes) -> npt.NDArray[np.int32]:
        """Return the tokens of a text, int32[T], without a beginning-of-text token."""
        return self.generator.tokenizer.encode(text)

    def detokenize(self, tokens: npt.ArrayLike) -> str:
        """Return the text of tokens."""
        given = np.asarray(tokens)
        if given.size:
            check_tokens(given, self._vocab, "tokens")
        return self.generator.tokenizer.decode(given).decode("utf-8", "replace")

    def stats(self) -> Stats:
        """Return numbers for metrics."""
        with self._changed:
            return Stats(
                len(self._slots.all) - len(self._slots.free),
                len(self._waiting),
                len(self._slots.all),
                self._requests,
                self._prompt_tokens,
                self._cached_tokens,
                self._generated_tokens,
                self._prompt_seconds,
                self._generation_seconds,
            )

    def drain(self, timeout: float | None = None) -> bool:
        """Refuse new requests, and wait until the others have ended; return whether they have."""
        with self._changed:
            self._ending = True
            return self._changed.wait_for(self._is_idle, timeout)

    def close(self) -> None:
        """Cancel the requests that are left, end the thread and free the cache."""
        with self._changed:
            self._ending = self._closed = True
            self._changed.notify_all()
        self._thread.join()
        self._decoder.close()

    def _check_prompt(self, tokens: npt.ArrayLike) -> npt.NDArray[np.int32]:
        given = check_tokens(tokens, self._vocab, "the prompt")
        if given.size > self.context:
            raise ValueError(
                f"the prompt has {given.size} tokens, expected at most {self.context}, the context"
            )
        return given

    def _enqueue(self, task: _Task) -> Ticket:
        with self._changed:
            if self._ending:
                raise Closed("the engine ends, and takes no new requests")
            if len(self._waiting) >= self._queue + len(self._slots.free):
                raise QueueFull(max(1.0, self._mean_seconds / len(self._slots.all)))
            self._requests += 1
            self._waiting.append(task)
            self._changed.notify_all()
        return task.ticket

    def _is_idle(self) -> bool:
        return not self._waiting and len(self._slots.free) == len(self._slots.all)

    # --- The engine's thread

    def _run(self) -> None:
        while self._admit():
            self._drop_cancelled()
            if self._prompts:
                self._pass_block()
            if self._texts:
                self._pass_tokens()

    def _admit(self) -> bool:
        """Give free slots to requests that wait; return False when closed and idle."""
        with self._changed:
            while self._is_idle():
                if self._closed:
                    return False
                self._changed.wait()
            while self._waiting and self._slots.free:
                task = self._waiting.popleft()
                task.slot = self._slots.take(task.tokens)
                task.start = time.perf_counter()
                self._prompts.append(task)
        return True

    def _drop_cancelled(self) -> None:
        with self._changed:
            gone = [task for task in self._waiting if self._closed or task.ticket.cancelled]
            for task in gone:
                self._waiting.remove(task)
            self._changed.notify_all()
        for task in gone:
            task.finish("cancelled")
        for task in [*self._prompts, *self._texts]:
            if self._closed or task.ticket.cancelled:
                self._finish(task, "cancelled")

    def _pass_block(self) -> None:
        """Pass a block of the prompt whose turn it is; the last samples the first token."""
        task = self._prompts.popleft()
        start = time.perf_counter()
        try:
            self._pass_block_of(task)
        except Exception as error:
            self._finish(task, "error", str(error))
        self._prompt_seconds += time.perf_counter() - start

    def _pass_block_of(self, task: _Task) -> None:
        number = task.slot.number
        if isinstance(task, _Text):
            passed = self._slots.reuse(task.slot, task.tokens, task.passed)
            self._cached_tokens += passed - task.passed
            task.cached += passed - task.passed
            task.passed = passed
        elif not task.passed:
            self._slots.clear(task.slot)
        block = self._slots.next_block(task.tokens, task.passed, short=bool(self._texts))
        end, token = task.passed + block.size, -1
        if isinstance(task, _Embed):
            task.states.append(self._decoder.prefill_states(block, number))
        elif isinstance(task, _Text) and end == task.tokens.size:
            uniform, bias = task.draw(), task.bias()
            token = int(
                self._decoder.generate(block, [uniform], task.request.sampling, number, bias)[0]
            )
        else:
            self._decoder.prefill(block, number)
        self._slots.append_prompt(task.slot, block)
        self._prompt_tokens += block.size
        task.passed = end
        if end < task.tokens.size:
            self._prompts.append(task)
        elif isinstance(task, _Embed):
            task.ticket.deliver(Embedding(np.concatenate(task.states)))
            self._finish(task, "stop")
        elif isinstance(task, _Text):
            self._texts.append(task)
            self._take(task, token, 0)

    def _pass_tokens(self) -> None:
        """Pass the newest token of each text, and sample the next."""
        start = time.perf_counter()
        rows: list[tuple[_Text, float, npt.NDArray[np.float32] | None]] = []
        for task in list(self._texts):
            try:
                rows.append((task, task.draw(), task.bias()))
            except Exception as error:
                self._finish(task, "error", str(error))
        while rows:
            texts = [task for task, _, _ in rows]
            try:
                sampled = self._decoder.generate_batch(
                    [task.newest for task in texts],
                    [[uniform] for _, uniform, _ in rows],
                    [task.request.sampling for task in texts],
                    [task.slot.number for task in texts],
                    [bias for _, _, bias in rows],
                )
            except Exception as error:
                # Those whose logits are not finite end, and the others try again; with another
                # error all end.
                wrong = error.rows if isinstance(error, NonfiniteLogits) else range(len(rows))
                for row in wrong:
                    self._finish(texts[row], "error", str(error))
                rows = [row for i, row in enumerate(rows) if i not in wrong]
                continue
            for row, (task, token) in enumerate(zip(texts, sampled[:, 0].tolist(), strict=True)):
                self._slots.append(task.slot, task.newest)
                self._take(task, token, row)
            break
        self._generation_seconds += time.perf_counter() - start

    def _take(self, task: _Text, token: int, row: int) -> None:
        """Deliver a sampled token; end its text if it is the last."""
        self._generated_tokens += 1
        wanted = task.request.logprobs is not None
        try:
            reason = task.take(token, self._decoder.last_logits(row) if wanted else None)
        except Exception as error:
            self._finish(task, "error", str(error))
            return
        if reason is None and task.ticket.cancelled:
            reason = "cancelled"
        if reason:
            self._finish(task, reason)

    def _finish(self, task: _Task, reason: Reason, message: str = "") -> None:
        """End a request that has a slot."""
        if task in self._prompts:
            self._prompts.remove(task)
        if isinstance(task, _Text) and task in self._texts:
            self._texts.remove(task)
        seconds = time.perf_counter() - task.start
        with self._changed:
            self._slots.release(task.slot)
            self._mean_seconds += 0.1 * (seconds - self._mean_seconds)
            self._changed.notify_all()
        task.finish(reason, message)
