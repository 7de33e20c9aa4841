"""Letting a model write (C: ``inference.c``)."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from legacy1bit.forward import KeyValueCache
from legacy1bit.model import LegacyLLM


def sample_token(
    logits: npt.NDArray[np.float32],
    rng: np.random.Generator,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> int:
    """Draw a token.

    Parameters
    ----------
    logits : float32[V]
    rng : numpy.random.Generator
    temperature : float
        Divides the logits: below 1 likely tokens become likelier. 0 takes the likeliest, the
        first of several.
    top_k : int
        Only the k likeliest tokens can be drawn; 0 means all.
    top_p : float
        Only the likeliest tokens that together have this probability can be drawn (Holtzman et
        al., arXiv 1904.09751, section 3.1).

    Returns
    -------
    int

    Raises
    ------
    ValueError
        If a logit is NaN, or a setting is out of range.

    Notes
    -----
    C: ``inference.c``, whose strategies are greedy, temperature and top-k.
    """
    check_sampling(temperature, top_k, top_p)
    if not np.isfinite(np.max(logits)):
        raise ValueError("the model's logits are not finite: its weights are damaged")
    if temperature == 0.0:
        return int(np.argmax(logits))
    # The largest becomes 0, and what a tiny temperature sends to -infinity is never drawn.
    with np.errstate(over="ignore"):
        scaled = (logits.astype(np.float64) - np.max(logits)) / temperature
    order = np.argsort(-scaled, kind="stable")
    if top_k:
        order = order[:top_k]
    weights = np.exp(scaled[order])
    cumulative = np.cumsum(weights)
    if top_p < 1.0:
        kept = int(np.searchsorted(cumulative, top_p * cumulative[-1])) + 1
        cumulative = cumulative[:kept]
    drawn = np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right")
    return int(order[min(drawn, cumulative.size - 1)])


def check_sampling(temperature: float, top_k: int, top_p: float) -> None:
    """Raise ``ValueError`` for settings that ``sample_token`` cannot follow."""
    if not 0.0 <= temperature < np.inf:
        raise ValueError(f"temperature is {temperature}, expected 0 or more")
    if top_k < 0:
        raise ValueError(f"top_k is {top_k}, expected 0 or more")
    if not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p is {top_p}, expected more than 0 and at most 1")


def generate(
    model: LegacyLLM,
    prompt: npt.ArrayLike,
    max_tokens: int,
    seed: int = 0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Iterator[int]:
    """Continue a prompt, a token at a time.

    The whole prompt is context, as far as the model's reaches; in C it is the last character alone
    (departure 7). A text that grows past the context goes on from its newer half.

    Parameters
    ----------
    model : LegacyLLM
    prompt : int[T]
        At least one token.
    max_tokens : int
    seed : int
        The same seed and instruction set give the same text.
    temperature, top_k, top_p
        See ``sample_token``.

    Yields
    ------
    int
        The tokens of the continuation.

    Raises
    ------
    ValueError
        If a setting is out of range or the prompt is empty.
    IndexError
        If the prompt holds what is no token.
    """
    check_sampling(temperature, top_k, top_p)
    if max_tokens < 0:
        raise ValueError(f"max_tokens is {max_tokens}, expected 0 or more")
    rng = np.random.default_rng(seed)
    cache = KeyValueCache(model)
    text = list(np.asarray(prompt)[-cache.capacity :])
    if not text:
        raise ValueError("the prompt is empty, expected at least one token")
    fresh = text
    for _ in range(max_tokens):
        if cache.length + len(fresh) > cache.capacity:
            cache.clear()
            fresh = text[-max(cache.capacity // 2, 1) :]
        token = sample_token(cache.extend(model, fresh), rng, temperature, top_k, top_p)
        yield token
        text.append(token)
        fresh = [token]
