"""What is asked of an engine, and what it answers: records without any I/O."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from legacy1bit.hyperparams import SamplingConfig

_SAMPLING = SamplingConfig()


class Constraint(Protocol):
    """What a text may be, token by token: a grammar or a JSON schema."""

    def allowed(self) -> npt.NDArray[np.bool_]:
        """Return which tokens may be next: bool[V]."""

    def advance(self, token: int) -> bool:
        """Note the sampled token; return whether the text is complete with it."""


@dataclass(frozen=True)
class GenerationRequest:
    """A prompt to continue.

    Attributes
    ----------
    tokens : int32[T]
        The prompt, at least one token.
    max_tokens : int
        The most to sample, at least one; fewer where the context is full before.
    sampling : SamplingConfig
    seed : int
        Equal requests of one seed get equal texts.
    stop : tuple of str
        The text ends before the first of these.
    logprobs : int, optional
        How many alternatives to report for each token, beside its own log-probability; None: no
        log-probabilities.
    frequency_penalty, presence_penalty : float
        Subtracted from a logit for each time its token was sampled, and once if it was at all
        (OpenAI's definition: tokens of the prompt do not count).
    logit_bias : mapping of int to float
        Added to the logits of these tokens.
    constraint : Constraint, optional
        Of this request alone, as it follows the text.
    """

    tokens: npt.NDArray[np.int32]
    max_tokens: int = 250
    sampling: SamplingConfig = _SAMPLING
    seed: int = 0
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    constraint: Constraint | None = None


@dataclass(frozen=True)
class Piece:
    """A sampled token.

    Attributes
    ----------
    text : str
        The text that is certain with it: "" while a character or a stop string is incomplete.
    token : int
    logprob : float, optional
        Its log-probability by the model's own logits, before temperature, filters and penalties.
    top : tuple of (int, float)
        The likeliest tokens and their log-probabilities, in descending order.
    """

    text: str
    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


Reason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True)
class Finished:
    """The end of a request: the last event of each.

    Attributes
    ----------
    reason : {"stop", "length", "cancelled", "error"}
    prompt_tokens : int
    cached_tokens : int
        Tokens of the prompt that were in the cache.
    completion_tokens : int
    message : str
        What was wrong, after an error.
    """

    reason: Reason
    prompt_tokens: int
    cached_tokens: int = 0
    completion_tokens: int = 0
    message: str = ""


@dataclass(frozen=True)
class Embedding:
    """The last hidden state of each token: float32[T, C]."""

    states: npt.NDArray[np.float32]


Event = Piece | Embedding | Finished


class QueueFull(Exception):
    """No more requests can wait.

    Attributes
    ----------
    seconds : float
        After about this time there is room again.
    """

    def __init__(self, seconds: float) -> None:
        super().__init__(f"too many requests are waiting: try again in {seconds:.0f} s")
        self.seconds = seconds


class Closed(Exception):
    """The engine ends, and takes no new requests."""
