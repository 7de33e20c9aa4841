"""Bars on standard error, for what takes a while, and lines where it is not a terminal."""

import contextlib
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

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

from legacy1bit.system.cgroups import can_start_threads

console = Console(stderr=True, highlight=False)


clock = time.monotonic

# Seconds without a line, in place of a bar, before the first one; before each further one they are
# twice as many, up to the last number.
_FIRST_PAUSE, _LONGEST_PAUSE = 5.0, 600.0


def _bars_show() -> bool:
    """Whether a bar can be shown: it needs a terminal, and a thread of its own.

    FORCE_COLOR and the like have the library take any file for a terminal; a bar is not a color.
    """
    return console.is_interactive and console.file.isatty() and can_start_threads()


class Bar(Progress):
    """A bar; without a terminal, a line in its place when none has come for a while."""

    def __init__(self, *columns: ProgressColumn) -> None:
        super().__init__(
            *columns,
            console=console,
            transient=True,
            disable=not _bars_show(),
            get_time=lambda: clock(),
        )
        self._last_line, self._pause = clock(), _FIRST_PAUSE

    def write(self, line: str) -> None:
        """Print a line; beside a bar, above it."""
        self.console.print(line, soft_wrap=True, markup=False)
        self._last_line = clock()

    def update(self, task_id: TaskID, **changes: Any) -> None:
        super().update(task_id, **changes)
        if self.disable and clock() - self._last_line >= self._pause:
            self.write(self._line(next(task for task in self.tasks if task.id == task_id)))
            self._pause = min(2 * self._pause, _LONGEST_PAUSE)

    def _line(self, task: Task) -> str:
        """Return what the columns of the bar say; what remains is reckoned from the first step."""
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
        # Before version 15 the library ends what was not shown with an empty line.
        if not self.disable:
            super().stop()


def progress_of_training() -> Bar:
    """Return a bar with the fields ``loss``, ``speed``, and ``first``, the step it begins at."""
    step = TextColumn("step {task.completed:>6}")
    return Bar(
        *([] if _bars_show() else [step]),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TextColumn("{task.fields[speed]:,.0f} tokens/s"),
        TimeRemainingColumn(),
    )


@contextlib.contextmanager
def progress_of_bytes(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show how much of a text has been dealt with, where that takes a moment."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Bar(*columns) as progress:
        task = progress.add_task(what, total=total or None)
        yield lambda done: progress.update(task, completed=done)


def progress_of_tuning() -> Bar:
    """Return a bar of one trial, with the fields ``trial``, ``loss`` and ``best``."""
    return Bar(
        TextColumn("{task.fields[trial]}"),
        BarColumn(),
        TextColumn("loss {task.fields[loss]:.4f}  {task.fields[best]}"),
    )
