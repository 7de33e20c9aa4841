"""What a training tells its callback while it runs.

Events are frozen dataclasses. Their names and fields are stable: later versions may add fields
behind the ones that are here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

# Why a training ended: its last step, its patience, or a cancellation.
Reason = Literal["steps", "patience", "cancelled"]


@dataclass(frozen=True)
class StepEvent:
    """A step is done. It comes after every step, so a callback should be quick.

    Attributes
    ----------
    step : int
        The number of the step; the first is 1.
    steps : int
        The number of the last step that is planned.
    loss : float
        The training loss of the step's batch, in nats per token.
    learning_rate : float
    tokens_per_second : float
        The mean speed of this training so far, without evaluations.
    seconds : float
        The time spent on steps so far, earlier parts of a resumed run included.
    """

    step: int
    steps: int
    loss: float
    learning_rate: float
    tokens_per_second: float
    seconds: float


@dataclass(frozen=True)
class EvaluationEvent:
    """The model was evaluated. It comes before the checkpoint of the same step is written.

    Attributes
    ----------
    step, steps : int
        As in ``StepEvent``.
    train_loss : float
        The mean training loss since the evaluation before, in nats per token.
    validation_loss : float
        The loss on the validation set, in nats per token.
    is_best : bool
        Whether it is the lowest validation loss so far.
    sample : str or None
        A text that the model generated, always from the same seed; None for models whose tokens
        have no text, or whose texts have no beginning.
    record : mapping of str to Any
        The whole line of ``metrics.jsonl``: perplexity, accuracies, gradient norm, codes.
    """

    step: int
    steps: int
    train_loss: float
    validation_loss: float
    is_best: bool
    sample: str | None
    record: Mapping[str, Any]


@dataclass(frozen=True)
class CheckpointEvent:
    """The run was saved: from here it can be resumed, and its model can be loaded.

    Attributes
    ----------
    step : int
    folder : Path
        The folder of the run.
    """

    step: int
    folder: Path


@dataclass(frozen=True)
class EndEvent:
    """The training has ended, and is saved. It does not come when an exception ends a training.

    Attributes
    ----------
    step, steps : int
        As in ``StepEvent``.
    reason : {"steps", "patience", "cancelled"}
        "cancelled": the run can be resumed.
    folder : Path
        The folder of the run.
    """

    step: int
    steps: int
    reason: Reason
    folder: Path


TrainingEvent = StepEvent | EvaluationEvent | CheckpointEvent | EndEvent
