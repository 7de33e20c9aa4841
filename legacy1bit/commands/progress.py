"""Bars on standard error, for what takes a while."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from legacy1bit.control_groups import can_start_threads

console = Console(stderr=True, highlight=False)


class _Bar(Progress):
    """A bar of which nothing is seen where there is no terminal."""

    def stop(self) -> None:
        # Before version 15 the library ends what was not shown with an empty line.
        if not self.disable:
            super().stop()


def _shown() -> dict[str, Any]:
    """Return where a bar is, and that it goes when it is done; it needs a terminal and a thread.

    FORCE_COLOR and the like have the library take any file for a terminal; a bar is not a color.
    """
    seen = console.is_interactive and console.file.isatty() and can_start_threads()
    return {"console": console, "transient": True, "disable": not seen}


def progress_of_training() -> Progress:
    """Return a bar with the fields ``loss`` and ``speed``."""
    return _Bar(
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TextColumn("{task.fields[speed]:,.0f} tokens/s"),
        TimeRemainingColumn(),
        **_shown(),
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
    with _Bar(*columns, **_shown()) as progress:
        task = progress.add_task(what, total=total or None)
        yield lambda done: progress.update(task, completed=done)


def progress_of_tuning() -> Progress:
    """Return a bar of one trial, with the fields ``trial``, ``loss`` and ``best``."""
    return _Bar(
        TextColumn("{task.fields[trial]}"),
        BarColumn(),
        TextColumn("loss {task.fields[loss]:.4f}  {task.fields[best]}"),
        **_shown(),
    )
