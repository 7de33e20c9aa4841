"""Training from Python."""

import contextlib
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from legacy1bit.api.arguments import arguments_of, naming_arguments
from legacy1bit.api.events import (
    CheckpointEvent,
    EndEvent,
    EvaluationEvent,
    Reason,
    StepEvent,
    TrainingEvent,
)
from legacy1bit.api.models import Model, load
from legacy1bit.api.output import logger, output_of
from legacy1bit.api.progress import ProgressLine
from legacy1bit.commands import train as command
from legacy1bit.training import run as training_run
from legacy1bit.training.divergence import TrainingDiverged
from legacy1bit.training.evaluation import Metrics
from legacy1bit.training.run import RunSettings
from legacy1bit.training.trainer import Trainer, TrainingCallback

_StrPath = str | os.PathLike[str]
Paths = _StrPath | Iterable[_StrPath]
Texts = Paths | Mapping[_StrPath, float] | Iterable[tuple[Paths, float]]
Callback = Callable[[TrainingEvent], object]

# What only a terminal needs.
_OPTIONS_WITHOUT_ARGUMENT = ("print_config",)


class Cancelled(Exception):
    """A training was cancelled before its first step. A new one leaves no files behind."""


@dataclass(frozen=True)
class Run:
    """A training that has ended, or that can be resumed.

    Attributes
    ----------
    folder : Path
        The folder of the run, as ``legacy1bit generate --model`` takes it.
    step : int
        The steps that are done.
    steps : int
        The steps that are planned.
    reason : {"steps", "patience", "cancelled"}
        Why the training ended.
    metrics : Metrics
        Of the run's best model, on the validation set: of a run that is done as its report says,
        else of the last evaluation.
    """

    folder: Path
    step: int
    steps: int
    reason: Reason
    metrics: Metrics

    @property
    def done(self) -> bool:
        """Whether the training has ended by its steps or its patience."""
        return self.reason != "cancelled"

    def settings(self) -> RunSettings:
        """Return the settings of the run. Raises ``ModelFileError`` or ``OSError``."""
        return training_run.Run(self.folder).settings()

    def records(self) -> list[dict[str, Any]]:
        """Return the records of all evaluations, oldest first; see docs/REPORTS.md.

        Raises
        ------
        ValueError, OSError
            If they are damaged, or cannot be read.
        """
        return training_run.Run(self.folder).metrics()

    def samples(self) -> list[dict[str, Any]]:
        """Return the generated texts of all evaluations; errors are those of ``records``."""
        return training_run.Run(self.folder).samples()

    def load(self, **options: Any) -> Model:
        """Load the best model of the run; see ``legacy1bit.load``."""
        return load(self.folder, **options)

    def resume(
        self,
        *,
        callback: Callback | None = None,
        cancel: threading.Event | None = None,
        progress: bool = False,
        **settings: Any,
    ) -> "Run":
        """Train on, with the weights of an uninterrupted run.

        ``steps``, ``threads``, ``precision`` and ``patience`` may change. The other parameters and
        the errors are those of ``legacy1bit.train``; a run that is done needs more ``steps``.
        """
        return train(
            resume=self.folder, callback=callback, cancel=cancel, progress=progress, **settings
        )


def train(
    data: Texts | None = None,
    *,
    callback: Callback | None = None,
    cancel: threading.Event | None = None,
    progress: bool = False,
    **settings: Any,
) -> Run:
    """Train a model, and return when that has ended.

    The same settings, instruction set and number of threads give the same weights, to the bit, as
    ``legacy1bit train``.

    Parameters
    ----------
    data : path-like, sequence of path-like, mapping or sequence of pairs, optional
        The text: what ``--data`` takes. By default the bundled stories. Texts that are mixed by
        weights: ``{"a.txt": 1.0, "b.txt": 0.3}`` or ``[("a.txt", 1.0), ("b.txt", 0.3)]``.
    callback : callable, optional
        Called with each event (``legacy1bit.api.events``), in the thread that trains. An exception
        that it raises ends the training; the run stays as its last checkpoint then.
    cancel : Event, optional
        When it is set, by any thread, the training ends after its step: the model is evaluated and
        saved as after Ctrl-C, and the run can be resumed.
    progress : bool
        Whether to print the progress to standard output, as notebooks and terminals show it.
    **settings
        The options of ``legacy1bit train`` by their names with underscores: ``steps=500``,
        ``model_dim=64``, ``out="runs/mine"``, ``resume="runs/mine"``, ``config="settings.toml"``.
        None is an option that is not given.

    Returns
    -------
    Run

    Raises
    ------
    TypeError
        If an argument is unknown, with the nearest name, or a value is of another kind.
    ValueError
        If a value does not fit, alone or with another; if the text cannot be read; if the folder is
        not empty, or another training uses it.
    TrainingDiverged
        If the loss, a gradient or a weight is no longer finite. It is a ``ValueError``. The run
        stays as its last checkpoint.
    ModelFileError
        If the run that is to be resumed is damaged. It is a ``ValueError``.
    OSError
        If a file cannot be read or written.
    MemoryError
        If the training does not fit into memory; the message has the parts.
    Cancelled
        If ``cancel`` is set before the first step. Nothing is written then.
    KeyboardInterrupt
        After Ctrl-C, in the main thread. The last step is saved before, without an evaluation, and
        the run can be resumed.

    Notes
    -----
    Thread-safe: any thread may train, and several may side by side, each in a folder of its own. No
    signal handlers are installed. What the command line would print goes to the logger
    ``legacy1bit``, at the level INFO.
    """
    named = settings | {"data": data}
    arguments = arguments_of(command, named, _OPTIONS_WITHOUT_ARGUMENT)
    if not (callback is None or callable(callback)):
        raise TypeError(f"callback is {callback!r}, expected a function")
    if not (cancel is None or hasattr(cancel, "is_set")):
        raise TypeError(f"cancel is {cancel!r}, expected a threading.Event")
    callbacks: list[Callback] = [] if callback is None else [callback]
    if progress:
        callbacks.append(ProgressLine())
    cancel = threading.Event() if cancel is None else cancel

    def tell(event: TrainingEvent) -> None:
        for each in callbacks:
            each(event)

    def check() -> None:
        if cancel.is_set():
            raise Cancelled("the training was cancelled before its first step")

    output = output_of(check)
    with contextlib.ExitStack() as ends:
        check()
        with naming_arguments(arguments):
            trainer, records = command.start(arguments, ends, output)
        ends.enter_context(contextlib.closing(records))
        check()
        command.say_what_is_trained(trainer, output)
        # What a callback raises stays as it is.
        with naming_arguments(kinds=(TrainingDiverged,)):
            done = trainer.train(records, _Events(trainer, tell, cancel))
        return _end(trainer, done, tell)


def _end(trainer: Trainer, done: bool, tell: Callable[[TrainingEvent], None]) -> Run:
    step, steps, metrics = trainer.step, trainer.config.steps, trainer.metrics
    reason: Reason = "cancelled"
    if done:
        reason = "steps" if step == steps else "patience"
        _, metrics = trainer.best_model()
    assert metrics is not None
    logger.info("ended at step %d of %d: %s", step, steps, reason)
    tell(EndEvent(step, steps, reason, trainer.folder))
    return Run(trainer.folder, step, steps, reason, metrics)


class _Events(TrainingCallback):
    """Turns what a trainer calls into events."""

    def __init__(
        self, trainer: Trainer, tell: Callable[[TrainingEvent], None], cancel: threading.Event
    ) -> None:
        self._trainer, self._tell, self._cancel = trainer, tell, cancel
        self._samples = command.SampleLog(trainer)

    def on_step(self, loss: float, tokens_per_second: float) -> None:
        trainer = self._trainer
        config, step = trainer.config, trainer.step
        rate = config.learning_rate_at(step - 1)
        self._tell(StepEvent(step, config.steps, loss, rate, tokens_per_second, trainer.seconds))

    def on_evaluation(self, record: Mapping[str, Any]) -> None:
        step = self._trainer.step
        event = EvaluationEvent(
            step,
            self._trainer.config.steps,
            record["train_loss"],
            record["val_loss"],
            self._trainer.best[1] == step,
            self._samples.write(step),
            record,
        )
        self._tell(event)

    def on_save(self, record: Mapping[str, Any]) -> None:
        logger.info("%s", command.evaluation_line(record))
        self._tell(CheckpointEvent(self._trainer.step, self._trainer.folder))

    def should_stop(self) -> bool:
        return self._cancel.is_set()
