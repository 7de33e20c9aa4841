"""A teacher: a model whose predictions another one learns beside the text (knowledge distillation).

The loss is that of Hinton, Vinyals & Dean, arXiv 1503.02531, section 2; ``backward.BackwardPass``
computes it. The teacher's logits are computed beside the training, for the sequences of one pass at
a time: storing those of a text takes more room than the text, by the size of the vocabulary.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from legacy1bit.data.tokenizer import Tokenizer
from legacy1bit.forward import forward_llm_batch
from legacy1bit.hyperparams import ModelConfig
from legacy1bit.model import LegacyLLM, load_model
from legacy1bit.training.adapters import weights_hash
from legacy1bit.training.run import TEACHER_HASH, TEACHER_PATH
from legacy1bit.training.start import StoredModel


@dataclass(frozen=True)
class Teacher(StoredModel):
    """A model to learn from."""

    @cached_property
    def model(self) -> LegacyLLM:
        """The model, without latent weights; read when it is first needed."""
        return load_model(self.path, floats=True)

    @cached_property
    def sha256(self) -> str:
        """The hash of its weights, the same in whichever format they are stored."""
        return weights_hash(self.model.parameters)

    def recorded_in(self, source: dict[str, Any]) -> dict[str, Any]:
        """Return a run's source with this teacher.

        Raises
        ------
        ValueError
            If the run began with another one.
        """
        if source.get(TEACHER_HASH, self.sha256) != self.sha256:
            raise ValueError(
                f"{self.path} is not the teacher that the run began with: its weights are others; "
                "--teacher says where that is"
            )
        return source | {TEACHER_PATH: str(self.path.absolute()), TEACHER_HASH: self.sha256}

    def check(self, student: ModelConfig, tokenizer: Tokenizer) -> None:
        """Raise ``ValueError`` unless a model of these settings and tokens can learn from it."""
        own = self.config
        if own.vocab_size != student.vocab_size or not _same_tokens(self.tokenizer, tokenizer):
            raise ValueError(
                f"the teacher {self.path} has other tokens ({self.tokenizer.kind}, "
                f"{own.vocab_size:,}) than the model ({tokenizer.kind}, {student.vocab_size:,}): "
                "expected the same tokenizer, which a model without --tokenizer takes"
            )
        if own.positions == "rope" and own.sequence_length < student.sequence_length:
            raise ValueError(
                f"sequence_length is {student.sequence_length}, expected at most "
                f"{own.sequence_length}, that of the teacher {self.path}"
            )

    def logits(
        self, tokens: npt.NDArray[Any], starts: npt.NDArray[Any] | None, threads: int
    ) -> npt.NDArray[np.float32]:
        """Return the logits after each token.

        Parameters
        ----------
        tokens : int[B, T]
        starts : int[B, T] or None
            See ``forward.document_starts``.
        threads : int

        Returns
        -------
        float32[B, T, V]
        """
        return forward_llm_batch(self.model, tokens, threads, logits=True, starts=starts)


def _same_tokens(one: Tokenizer, other: Tokenizer) -> bool:
    """Whether each token of one tokenizer is the same text in the other."""
    if one.sha256 == other.sha256 or "unknown" in (one.kind, other.kind):
        return one.vocab_size == other.vocab_size
    return one.vocab_size == other.vocab_size and all(
        one.decode([token]) == other.decode([token]) for token in range(one.vocab_size)
    )
