"""The progress of a training as text, for notebooks and terminals."""

import sys
import time
from datetime import timedelta

from legacy1bit.api.events import EndEvent, EvaluationEvent, StepEvent, TrainingEvent
from legacy1bit.commands.train import evaluation_line

# Seconds between two states of the line.
_PAUSE = 0.5

_ENDS = {"steps": "done", "patience": "ended without a better evaluation", "cancelled": "cancelled"}

clock = time.monotonic


def _overwrites() -> bool:
    """Whether standard output is a terminal, or a cell of a notebook."""
    output = sys.stdout
    return output is not None and (
        output.isatty() or type(output).__module__.startswith("ipykernel.")
    )


class ProgressLine:
    """A callback that prints one line, which is written over, and a line for each evaluation.

    It needs no terminal and no widgets: a notebook understands a carriage return. Where standard
    output is neither, only the evaluations are printed.
    """

    def __init__(self) -> None:
        self._shown, self._width = -_PAUSE, 0
        self._first: tuple[int, float] | None = None

    def __call__(self, event: TrainingEvent) -> None:
        """Show an event."""
        match event:
            case StepEvent() if _overwrites():
                now = clock()
                self._first = self._first or (event.step, now)
                if now - self._shown >= _PAUSE:
                    self._shown = now
                    self._write(self._line(event, *self._first, now))
            case EvaluationEvent():
                self._write(evaluation_line(event.record), "\n")
            case EndEvent():
                why = _ENDS[event.reason]
                self._write(f"{why} at step {event.step:,} of {event.steps:,}", "\n")

    def _line(self, event: StepEvent, first: int, begin: float, now: float) -> str:
        line = (
            f"step {event.step:>6,} of {event.steps:,}  loss {event.loss:.3f}  "
            f"{event.tokens_per_second:,.0f} tokens/s"
        )
        if event.step == first:
            return line
        left = (now - begin) / (event.step - first) * (event.steps - event.step)
        return f"{line}  {timedelta(seconds=round(left))} left"

    def _write(self, line: str, end: str = "") -> None:
        """Write a line over the one before."""
        if sys.stdout is None:
            return
        blanks = " " * max(self._width - len(line), 0)
        before = "\r" if self._width else ""
        sys.stdout.write(f"{before}{line}{blanks}{end}")
        sys.stdout.flush()
        self._width = 0 if end else len(line)
