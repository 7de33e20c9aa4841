"""Where a training went wrong: which layer is the first that holds what is no number, and why."""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from legacy1bit.dataset import Batch
from legacy1bit.forward import (
    forward_embedding_batch,
    forward_output_layer_batch,
    forward_transformer_block_batch_with_context,
    padding_mask,
)
from legacy1bit.hyperparams import TrainingConfig
from legacy1bit.math_ops import layer_norm
from legacy1bit.model import LegacyLLM, LegacyLLMGradients, TransformerBlockContext


class TrainingDiverged(ValueError):
    """The loss, a gradient or a weight is no longer a finite number."""


# A gradient's norm is the root of a sum of squares, 1,024 of them in float32.
_LARGEST_SQUARED = float(np.sqrt(np.finfo(np.float32).max / 1024))

# What a block works out, in this order, and what that is called.
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
    """Return the first of some arrays that holds what is not finite, in words, or None."""
    for name, array in values.items():
        count = int(array.size - np.isfinite(array).sum())
        if count:
            return f"{name}: {count:,} of {array.size:,} values"
    return None


def bad_activation(model: LegacyLLM, batch: Batch) -> str | None:
    """Return where in the forward pass of a batch the first number is that is not finite, or None.

    Parameters
    ----------
    model : LegacyLLM
        With latent weights; the codes, or these, are used as they were.
    batch : Batch
    """
    latent = model.latent
    parameters = latent if model.full_precision else model.parameters
    config = model.config
    seen = batch.tokens != config.pad_token
    with np.errstate(all="ignore"):
        for row in range(len(batch.tokens)):
            one = slice(row, row + 1)
            allowed = padding_mask(batch.tokens[one], config.pad_token)
            starts = None if batch.starts is None else batch.starts[one]
            x = forward_embedding_batch(parameters["embedding.weight"], batch.tokens[one])
            if not np.isfinite(x).all():
                return "the embedding"
            for number, block in enumerate(model.blocks):
                rows, length = x.shape[:2]
                context = TransformerBlockContext(
                    config.model_dim,
                    config.ffn_dim,
                    config.num_heads,
                    rows,
                    length,
                    config.sub_norm,
                )
                x = forward_transformer_block_batch_with_context(block, x, context, allowed, starts)
                for name, what in _ACTIVATIONS.items():
                    if not np.isfinite(getattr(context, name)[seen[one]]).all():
                        most = _largest(context.input)
                        return f"block {number}: {what}, of an input of up to {most}"
            hidden = x[seen[one]]
            most = _largest(hidden)
            if config.final_norm:
                for vector in hidden:
                    layer_norm(vector, latent["final_norm.gamma"], latent["final_norm.beta"])
                if not np.isfinite(hidden).all():
                    return f"the final norm, of an input of up to {most}"
                most = _largest(hidden)
            bias = latent.get("output.bias", np.zeros(config.vocab_size, np.float32))
            logits = forward_output_layer_batch(parameters["output.weight"], bias, hidden)
            if not np.isfinite(logits).all():
                return f"the logits, of an input of up to {most}"
    return None


def bad_gradient(gradients: LegacyLLMGradients) -> str | None:
    """Return which gradient is the first on the way back that has no finite square, or None."""
    for name in sorted(gradients.parameters, key=_depth, reverse=True):
        values, what = gradients.parameters[name], f"the gradient of {name}"
        found = bad_weights({what: values})
        if found is None and np.abs(values).max() > _LARGEST_SQUARED:
            found = f"{what}: up to {_largest(values)}"
        if found is not None:
            return found
    return None


def _depth(name: str) -> tuple[int, int]:
    """Return where on the way forward a parameter is used."""
    if name.startswith("blocks."):
        _, number, part = name.split(".", 2)
        return 1, 2 * int(number) + (part.startswith(("ffn", "norm2")))
    return (0, 0) if name.startswith("embedding") else (2, name.startswith("output"))


def _largest(values: npt.NDArray[np.float32]) -> str:
    finite = values[np.isfinite(values)]
    return f"{np.abs(finite).max():.2g}" if finite.size else "nan"


def remedy(model: LegacyLLM, config: TrainingConfig) -> str:
    """Return what stands out in a model that diverged, and what to change."""
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
    """Return the error that tells what went wrong, where, why and what to change.

    Parameters
    ----------
    what : str
        What is no finite number, and when.
    model : LegacyLLM
    config : TrainingConfig
    batch : Batch, optional
        What the model had learned from.
    gradients : LegacyLLMGradients, optional
        What came of it.
    """
    where = bad_weights(model.latent)
    if where is None and batch is not None:
        where = bad_activation(model, batch)
    if where is None and gradients is not None:
        where = bad_gradient(gradients)
    first = "" if where is None else f" (first in {where})"
    return TrainingDiverged(f"{what}{first}; {remedy(model, config)}")
