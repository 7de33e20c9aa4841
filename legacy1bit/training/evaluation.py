"""How well a model predicts a text, and how its codes are distributed."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from legacy1bit.backward import ignore_padding
from legacy1bit.data import stories
from legacy1bit.data.tokenizer import Tokenizer
from legacy1bit.data_utils import create_padded_sequence, tokenize_text
from legacy1bit.dataset import Batch, MixedDataset, TokenDataset
from legacy1bit.distributed.ranks import ALONE, Ranks
from legacy1bit.forward import forward_llm_batch
from legacy1bit.hyperparams import ModelConfig
from legacy1bit.model import LegacyLLM, TernaryMatrix
from legacy1bit.schemes import SCHEMES

# Tokens of one forward pass of an evaluation.
EVALUATION_TOKENS = 1024

# Logits of one forward pass, at most, unless those of one sequence are more.
_MOST_LOGITS = 1 << 25


@dataclass(frozen=True)
class Metrics:
    """How well a model predicts a set of sequences.

    Attributes
    ----------
    loss : float
        The mean of -log p of the true token, in nats.
    top1, top3, top5 : float
        The fraction of tokens that are among the model's 1, 3 and 5 most likely.
    tokens : int
        The number of predicted tokens.
    bytes : int
        The number of bytes that these tokens stand for.
    parts : tuple of (str, float, Metrics)
        Where several texts are mixed, the name of each, its share, and its own metrics: those of
        the mix are the means of these, by the shares.
    """

    loss: float
    top1: float
    top3: float
    top5: float
    tokens: int
    bytes: int
    parts: tuple[tuple[str, float, "Metrics"], ...] = ()

    @classmethod
    def of_mix(cls, parts: Sequence[tuple[str, float, "Metrics"]]) -> "Metrics":
        """Return the metrics of several texts that are mixed; for ``parts`` see the class."""
        loss, top1, top3, top5 = (
            sum(share * getattr(one, name) for _, share, one in parts)
            for name in ("loss", "top1", "top3", "top5")
        )
        tokens, size = (sum(getattr(one, key) for *_, one in parts) for key in ("tokens", "bytes"))
        return cls(loss, top1, top3, top5, tokens, size, tuple(parts))

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """The loss in bits per byte, which compares models with different tokenizers."""
        nats, size = self.loss * self.tokens, float(self.bytes)
        if self.parts:
            # Of a token of the mix.
            nats = self.loss
            size = sum(share * one.bytes / one.tokens for _, share, one in self.parts)
        return nats / size / math.log(2.0) if size else math.inf

    def record(self) -> dict[str, Any]:
        """Return the entries of a record in ``metrics.jsonl``."""
        return {
            "val_loss": self.loss,
            "val_tokens": self.tokens,
            "val_bytes": self.bytes,
            "perplexity": self.perplexity,
            **({"bits_per_byte": self.bits_per_byte} if self.bytes else {}),
            "top1": self.top1,
            "top3": self.top3,
            "top5": self.top5,
            **({"val_losses": self.losses} if self.parts else {}),
        }

    @property
    def losses(self) -> dict[str, float]:
        """The loss of each text, where several are mixed."""
        return {name: metrics.loss for name, _, metrics in self.parts}


class NotFiniteError(ValueError):
    """The logits of a model are not finite.

    Attributes
    ----------
    batch : Batch
        The batch that they were computed for.
    """

    def __init__(self, batch: Batch) -> None:
        super().__init__("the model's logits are not finite: its weights are damaged")
        self.batch = batch


def evaluate(
    model: LegacyLLM,
    dataset: TokenDataset | MixedDataset,
    threads: int = 1,
    limit: int = 0,
    tokenizer: Tokenizer | None = None,
    stop: Callable[[], bool] = lambda: False,
    ranks: Ranks = ALONE,
) -> Metrics:
    """Measure a model on a dataset.

    Parameters
    ----------
    model : LegacyLLM
    dataset : TokenDataset or MixedDataset
    threads : int
    limit : int
        About how many tokens to measure, spread evenly over the dataset, and as many of each of
        several texts; 0: all.
    tokenizer : Tokenizer, optional
        That of the dataset; bytes when not given.
    stop : callable, optional
        Called after every batch; if it returns true, the metrics are those of the batches so far.
    ranks : Ranks, optional
        The processes that measure together: each takes some of the batches.

    Raises
    ------
    NotFiniteError
        If the model's logits are not finite.
    ValueError
        If every token is padding.
    """
    if isinstance(dataset, MixedDataset):
        each = -(-limit // len(dataset.parts))
        return Metrics.of_mix(
            [
                (
                    part.name,
                    part.share,
                    evaluate(model, part.dataset, threads, each, tokenizer, stop, ranks),
                )
                for part in dataset.parts
            ]
        )
    counts: list[tuple[float, ...]] = []
    batches = dataset.sweep(_batch_of(model.config, dataset.sequence_length), limit)
    for batch in itertools.islice(batches, ranks.rank, None, ranks.size):
        counts.append(_count(model, batch, threads, tokenizer))
        if counts[-1][-2] and stop():
            break
    # In the order of one process, which adds up the same floats.
    rounds = itertools.zip_longest(*ranks.collect(counts))
    every = [one for together in rounds for one in together if one is not None]
    loss, *within, tokens, size = (sum(column) for column in zip(*every, strict=True))
    if tokens == 0:
        raise ValueError("there is nothing to measure: every token is padding")
    top1, top3, top5 = (count / tokens for count in within)
    return Metrics(loss / tokens, top1, top3, top5, int(tokens), int(size))


def _count(
    model: LegacyLLM, batch: Batch, threads: int, tokenizer: Tokenizer | None
) -> tuple[float, ...]:
    """Return the loss of a batch, in how many tokens the true one is among 1, 3, 5; tokens; bytes.

    Raises
    ------
    NotFiniteError
        If the model's logits are not finite.
    """
    logits = forward_llm_batch(
        model, batch.tokens, threads=threads, logits=True, starts=batch.starts
    )
    targets = ignore_padding(batch.tokens, batch.targets, model.config.pad_token)
    scored = logits[targets >= 0]
    if not np.isfinite(scored).all():
        raise NotFiniteError(batch)
    truth = targets[targets >= 0]
    expected = np.take_along_axis(scored, truth[:, None], axis=1)
    top = scored.max(axis=1, keepdims=True)
    exponentials = np.exp(scored - top)
    log_sums = np.log(exponentials.sum(axis=1, dtype=np.float64)) + top[:, 0]
    # Of equal tokens the first ranks first, as argmax would have it.
    before = np.arange(scored.shape[1]) < truth[:, None]
    ranks = ((scored > expected) | ((scored == expected) & before)).sum(axis=1)
    size = truth.size if tokenizer is None else int(tokenizer.byte_lengths[truth].sum())
    return (
        float((log_sums - expected[:, 0]).sum()),
        *(int((ranks < k).sum()) for k in (1, 3, 5)),
        truth.size,
        size,
    )


def evaluation_tokens(config: ModelConfig, sequence_length: int) -> int:
    """Return the tokens of one forward pass of an evaluation."""
    return _batch_of(config, sequence_length) * sequence_length


def _batch_of(config: ModelConfig, sequence_length: int) -> int:
    most = min(EVALUATION_TOKENS, _MOST_LOGITS // config.vocab_size)
    return max(most // sequence_length, 1)


def code_fractions(
    model: LegacyLLM, before: dict[str, npt.NDArray[np.int8]] | None = None
) -> dict[str, dict[str, float]]:
    """Return the distribution of the codes in each quantized matrix.

    Parameters
    ----------
    model : LegacyLLM
    before : dict of str to int8 array, optional
        The codes at an earlier time.

    Returns
    -------
    dict of str to dict of str to float
        By matrix, the fraction of each code, such as ``"-1"``, and as ``"flipped"`` the fraction
        of those that have changed since.
    """
    fractions = {}
    for name, codes in model_codes(model).items():
        levels = SCHEMES[model.config.scheme].levels
        fractions[name] = {str(level): _fraction(codes == level) for level in levels}
        if before is not None:
            fractions[name]["flipped"] = _fraction(codes != before[name])
    return fractions


def _fraction(mask: npt.NDArray[np.bool_]) -> float:
    return round(float(np.mean(mask)), 6)


def model_codes(model: LegacyLLM, copy: bool = False) -> dict[str, npt.NDArray[np.int8]]:
    """Return the codes of each quantized matrix: int8[out, in], of the model or copied."""
    return {
        name: value.values.copy() if copy else value.values
        for name, value in model.parameters.items()
        if isinstance(value, TernaryMatrix)
    }


def recall_of_heroes(model: LegacyLLM, texts: tuple[str, ...], threads: int = 1) -> float:
    """Return the fraction of endings in which the model names the right hero.

    The model reads each story up to the hero's name in its last sentence. It is right if every
    letter of the name is the most likely token.
    """
    pad_token = model.config.pad_token
    right = total = 0
    batch = _batch_of(model.config, model.config.sequence_length)
    for first in range(0, len(texts), batch):
        part = texts[first : first + batch]
        length = min(max(len(story) for story in part) + 1, model.config.sequence_length)
        rows = np.stack(
            [
                create_padded_sequence(tokenize_text("\n" + story), 0, length, pad_token)
                for story in part
            ]
        )
        predicted = forward_llm_batch(model, rows, threads=threads, logits=True).argmax(axis=2)
        for story, row, guess in zip(part, rows, predicted, strict=True):
            for ending in stories.endings(story):
                if ending.kind == "hero" and ending.stop < length:
                    name = slice(ending.start + 1, ending.stop + 1)
                    total += 1
                    right += bool((guess[ending.start : ending.stop] == row[name]).all())
    return right / max(total, 1)
