"""Steps that each rank takes by itself, with an outer optimizer for what they change together."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from legacy1bit.distributed.ranks import Ranks
from legacy1bit.training.checkpoint import OUTER

# Of the outer optimizer. The paper's section 3 has a momentum of 0.9, for more meetings than short
# trainings have: of 40 it costs ten times the loss of this one (docs/CLUSTERS.md).
_LEARNING_RATE, _MOMENTUM = np.float32(0.7), np.float32(0.5)


class LocalSteps:
    """The outer optimizer of DiLoCo (Douillard et al., arXiv 2311.08105, algorithm 1).

    Between two meetings every rank trains by itself, with its own optimizer on its own part of
    every batch. When they meet, SGD with Nesterov momentum takes the mean of what they have changed
    as its gradient: ``v <- mu v + g``, ``w <- w - rate (g + mu v)``. Each rank computes its part.

    Parameters
    ----------
    weights : float32[N]
        The model's, which the ranks change.
    ranks : Ranks
    """

    def __init__(self, weights: npt.NDArray[np.float32], ranks: Ranks) -> None:
        self._weights, self._ranks = weights, ranks
        self._bounds = np.array(
            [weights.size * rank // ranks.size for rank in range(ranks.size + 1)], np.int64
        )
        self._own = slice(*self._bounds[ranks.rank : ranks.rank + 2].tolist())
        self._start = weights.copy()
        self._velocity = np.zeros(self._own.stop - self._own.start, np.float32)

    def begin(self) -> None:
        """Take the weights as they are for those of the last meeting, the same at every rank."""
        self._start[...] = self._weights

    def synchronize(self) -> None:
        """Meet: give every rank the same weights."""
        change = self._start - self._weights
        self._ranks.reduce(change, self._bounds)
        gradient = change[self._own] / np.float32(self._ranks.size)
        self._velocity *= _MOMENTUM
        self._velocity += gradient
        self._weights[...] = self._start
        with self._ranks.sharing(self._weights, self._bounds):
            self._weights[self._own] -= _LEARNING_RATE * (gradient + _MOMENTUM * self._velocity)
        self.begin()

    def gather_moments(
        self, moments: Mapping[str, npt.NDArray[Any]]
    ) -> dict[str, npt.NDArray[Any]] | None:
        """Let all ranks go on with the first one's moments; return these and the outer ones there.

        Parameters
        ----------
        moments : mapping of str to array
            This rank's own, which are overwritten.
        """
        for values in moments.values():
            self._ranks.broadcast_array(values)
        outer = self._ranks.gather_first(self._velocity, self._bounds)
        return None if outer is None else {**moments, OUTER: outer}

    def load_moments(self, moments: Mapping[str, npt.NDArray[Any]]) -> None:
        """Take the outer moments of a checkpoint, or raise ``ValueError``."""
        outer = moments.get(OUTER)
        if outer is None or outer.size != self._weights.size:
            raise ValueError(f"{OUTER} is missing, or not float32[{self._weights.size}]")
        self._velocity[...] = outer[self._own]
