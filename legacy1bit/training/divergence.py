"""The error of a training that diverged: the first layer that is not finite, and a remedy."""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from legacy1bit.dataset import Batch
from legacy1bit.forward import ForwardContext, forward_llm_batch
from legacy1bit.hyperparams import TrainingConfig
from legacy1bit.model import LegacyLLM, LegacyLLMGradients


class TrainingDiverged(ValueError):
    """The loss, a gradient or a weight is no longer a finite number."""


# A gradient's norm is the root of a sum of squares, 1,024 of them in float32.
_LARGEST_SQUARED = float(np.sqrt(np.finfo(np.float32).max / 1024))

# The activations of a block in their order, and their names in messages.
_ACTIVATIONS = {
    "norm1": "its first norm",
    "q": "queries",
    "k": "keys",
    "v": "values",
    "heads": "attention",
    "residual": "attention's output",
    "norm2": "its second norm",
    "hidden": "the feed-forward layer",
    "activated": "the feed-forward layer's activation",
    "output": "its output",
}


def bad_weights(values: Mapping[str, npt.NDArray[np.float32]]) -> str | None:
    """Return the first of some arrays that is not finite, in words, or None."""
    for name, array in values.items():
        count = int(array.size - np.isfinite(array).sum())
        if count:
            return f"{name}: {count:,} of {array.size:,} values"
    return None


def bad_activation(model: LegacyLLM, batch: Batch) -> str | None:
    """Return the first activation of a forward pass that is not finite, in words, or None.

    Parameters
    ----------
    model : LegacyLLM
        With latent weights. It runs as it is: with its codes, or in full precision.
    batch : Batch
    """
    with np.errstate(all="ignore"):
        for row in range(len(batch.tokens)):
            one = slice(row, row + 1)
            tokens = batch.tokens[one]
            context = ForwardContext(model.config, *tokens.shape)
            starts = None if batch.starts is None else batch.starts[one]
            logits = forward_llm_batch(model, tokens, logits=True, starts=starts, context=context)
            where = _bad_layer(context, logits, tokens != model.config.pad_token)
            if where is not None:
                return where
    return None


def _bad_layer(
    context: ForwardContext, logits: npt.NDArray[np.float32], used: npt.NDArray[np.bool_]
) -> str | None:
    """Return the first of a pass's activations that is not finite; padding is not ``used``."""
    x = context.blocks[0].input
    if not np.isfinite(x).all():
        return "the embedding"
    for number, block in enumerate(context.blocks):
        for name, words in _ACTIVATIONS.items():
            if not np.isfinite(getattr(block, name)[used]).all():
                return f"block {number}: {words}, of an input of up to {_largest(x)}"
        x = block.output
    if context.config.final_norm:
        if not np.isfinite(context.normed[used]).all():
            return f"the final norm, of an input of up to {_largest(x[used])}"
        x = context.normed
    if not np.isfinite(logits[used]).all():
        return f"the logits, of an input of up to {_largest(x[used])}"
    return None


def bad_gradient(gradients: LegacyLLMGradients) -> str | None:
    """Return the first gradient of a backward pass whose square is not finite, or None."""
    for name in sorted(gradients.parameters, key=_depth, reverse=True):
        values, what = gradients.parameters[name], f"the gradient of {name}"
        bad = bad_weights({what: values})
        if bad is None and np.abs(values).max() > _LARGEST_SQUARED:
            bad = f"{what}: up to {_largest(values)}"
        if bad is not None:
            return bad
    return None


def _depth(name: str) -> tuple[int, int]:
    """Return the position of a parameter in the forward pass."""
    if name.startswith("blocks."):
        _, number, part = name.split(".", 2)
        return 1, 2 * int(number) + (part.startswith(("ffn", "norm2")))
    return (0, 0) if name.startswith("embedding") else (2, name.startswith("output"))


def _largest(values: npt.NDArray[np.float32]) -> str:
    finite = values[np.isfinite(values)]
    return f"{np.abs(finite).max():.2g}" if finite.size else "nan"


def remedy(model: LegacyLLM, config: TrainingConfig) -> str:
    """Return the largest weight of a model that diverged, and settings to change."""
    largest = {name: float(np.abs(values).max()) for name, values in model.latent.items()}
    name = max(largest, key=lambda each: float(np.nan_to_num(largest[each], nan=np.inf)))
    rate = config.learning_rate or 0.0
    hints = [f"a lower --learning-rate than {rate:g}, such as {rate / 3:.2g}"]
    if config.clip == 0 or config.clip > 10:
        hints.append("a --clip of 1")
    if config.warmup < 10:
        hints.append("more --warmup-steps")
    if config.weight_decay > 1:
        hints.append("a lower --weight-decay")
    return f"the largest weight is {largest[name]:.2g}, in {name}: try {', '.join(hints)}"


def diverged(
    what: str,
    model: LegacyLLM,
    config: TrainingConfig,
    batch: Batch | None = None,
    gradients: LegacyLLMGradients | None = None,
) -> TrainingDiverged:
    """Return an error that says what diverged, in which layer, and what to change.

    Parameters
    ----------
    what : str
        The quantity that is not finite, and its step.
    model : LegacyLLM
    config : TrainingConfig
    batch : Batch, optional
        The batch of the last step.
    gradients : LegacyLLMGradients, optional
        The gradients of the last step.
    """
    where = bad_weights(model.latent)
    if where is None and batch is not None:
        where = bad_activation(model, batch)
    if where is None and gradients is not None:
        where = bad_gradient(gradients)
    first = "" if where is None else f" (first in {where})"
    return TrainingDiverged(f"{what}{first}; {remedy(model, config)}")
