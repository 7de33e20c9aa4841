"""Progress bars on standard error, or lines where it is not a terminal."""

import contextlib
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from legacy1bit.commands.streams import say
from legacy1bit.data.corpus import Progress as ProgressOfBytes
from legacy1bit.system.cgroups import can_start_threads

console = Console(stderr=True, highlight=False)


clock = time.monotonic

# Seconds before the first line that replaces a bar; they double before each further one, up to the
# second number.
_FIRST_PAUSE, _LONGEST_PAUSE = 5.0, 600.0


def _has_bars() -> bool:
    """Whether a bar is possible: it needs a terminal, and a thread of its own.

    With FORCE_COLOR and the like the library takes any file for a terminal; a bar is not a color.
    """
    return console.is_interactive and console.file.isatty() and can_start_threads()


class Bar(Progress):
    """A progress bar; without a terminal, a line from time to time."""

    def __init__(self, *columns: ProgressColumn) -> None:
        super().__init__(
            *columns,
            console=console,
            transient=True,
            disable=not _has_bars(),
            get_time=lambda: clock(),
        )
        self._last_line, self._pause = clock(), _FIRST_PAUSE

    def write(self, line: str) -> None:
        """Print a line, above the bar."""
        self.console.print(line, soft_wrap=True, markup=False)
        self._last_line = clock()

    def update(self, task_id: TaskID, **changes: Any) -> None:
        super().update(task_id, **changes)
        if self.disable and clock() - self._last_line >= self._pause:
            self.write(self._line(next(task for task in self.tasks if task.id == task_id)))
            self._pause = min(2 * self._pause, _LONGEST_PAUSE)

    def _line(self, task: Task) -> str:
        """Return the columns of the bar as text; the time left is estimated from the first step."""
        parts = []
        for column in self.columns:
            if isinstance(column, TimeRemainingColumn):
                done = task.completed - task.fields.get("first", 0)
                if task.total is not None and task.elapsed is not None and done > 0:
                    left = task.elapsed / done * (task.total - task.completed)
                    parts.append(f"{timedelta(seconds=round(left))} left")
            elif isinstance(column, ProgressColumn) and not isinstance(column, BarColumn):
                parts.append(str(column.render(task)))
        return "  ".join(parts)

    def stop(self) -> None:
        # Before version 15 the library prints an empty line at the end of a disabled bar.
        if not self.disable:
            super().stop()


def progress_of_training() -> Bar:
    """Return a bar with the fields ``loss``, ``speed``, and ``first``, its first step."""
    step = TextColumn("step {task.completed:>6}")
    return Bar(
        *([] if _has_bars() else [step]),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TextColumn("{task.fields[speed]:,.0f} tokens/s"),
        TimeRemainingColumn(),
    )


@contextlib.contextmanager
def progress_of_bytes(description: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show the progress through a text, in bytes."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Bar(*columns) as progress:
        task = progress.add_task(description, total=total or None)
        yield lambda done: progress.update(task, completed=done)


class Output(NamedTuple):
    """Where the preparation of a training tells what it does.

    Attributes
    ----------
    say : callable
        Takes a line.
    progress : callable
        Shows the progress through a text, as ``progress_of_bytes``.
    """

    say: Callable[[str], None]
    progress: ProgressOfBytes


STANDARD_ERROR = Output(say, progress_of_bytes)


@contextlib.contextmanager
def _no_progress(_: str, __: int) -> Iterator[Callable[[int], None]]:
    yield lambda done: None


# Of ranks that are not the first.
SILENT = Output(lambda line: None, _no_progress)


def progress_of_tuning() -> Bar:
    """Return a bar of one trial, with the fields ``trial``, ``loss`` and ``best``."""
    return Bar(
        TextColumn("{task.fields[trial]}"),
        BarColumn(),
        TextColumn("loss {task.fields[loss]:.4f}  {task.fields[best]}"),
    )
