"""Sampling with numbers that are not random."""

from types import SimpleNamespace

from legacy1bit import inference
from legacy1bit.hyperparams import SamplingConfig


def always(number):
    """A generator whose uniform numbers are all the same."""
    return SimpleNamespace(random=lambda: number)


def sample_token(logits, random, temperature=1.0, top_k=0, top_p=1.0, history=(), **more):
    settings = SamplingConfig(temperature, top_k, top_p, **more)
    return inference.sample_token(logits, random, settings, history)
