"""The records of a training run, a JSON object per line: metrics (C: ``logger.c``) and samples;
and the same numbers as TensorBoard events.
"""

import json
import math
import os
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from legacy1bit.hyperparams import SETTINGS_FILE
from legacy1bit.system.files import atomic_write, open_regular
from legacy1bit.system.optional import load_extra

METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.jsonl"
EVENTS_FOLDER = "tensorboard"

# A longer line is not a record: those of the largest models have some hundred kilobytes.
_LONGEST_LINE = 1 << 24


def is_run(names: Collection[str]) -> bool:
    """Return whether a folder with files of these names is a run, perhaps one not saved yet."""
    unsaved = {METRICS_FILE, SAMPLES_FILE} >= set(names)
    return METRICS_FILE in names and (SETTINGS_FILE in names or unsaved)


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Return the objects of a file of metrics or of samples, oldest first.

    A last line that a crash left incomplete is skipped.

    Raises
    ------
    OSError
        If the file cannot be read.
    ValueError
        If another line is not a JSON object with a step.
    """
    records = []
    with open_regular(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(_LONGEST_LINE), b""), 1):
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                if not line.endswith(b"\n") and not file.read(1):
                    break
                raise ValueError(f"{path}, line {number}: expected a JSON object") from None
            if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                raise ValueError(f"{path}, line {number}: expected a JSON object with its step")
            records.append(record)
    return records


class StepLog:
    """A file of records, each with its step.

    The C original writes one JSON array per session, which is not JSON until the session has ended;
    a line is always complete.

    Parameters
    ----------
    path : path-like
    resume_at : int
        Records after this step are dropped: a resumed run writes them again.
    """

    def __init__(self, path: str | os.PathLike[str], resume_at: int = 0) -> None:
        self.path = Path(path)
        records = []
        if resume_at and self.path.exists():
            records = [record for record in read_metrics(self.path) if record["step"] <= resume_at]
        try:
            lines = [_line(record) for record in records]
        except RecursionError:
            raise ValueError(f"{path}: a record is nested too deeply") from None
        atomic_write(self.path, "".join(lines))

    def log(self, record: Mapping[str, Any]) -> None:
        """Append a record, and flush it to the disk. Numbers that are not finite become null."""
        try:
            # The folder may have been removed: the records to come are not lost then.
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(_line(record))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            error.filename = str(self.path)
            raise


class Log(Protocol):
    """Takes the records of a training."""

    def log(self, record: Mapping[str, Any]) -> None:
        """Take a record."""

    def close(self) -> None:
        """End."""


class NoLog:
    """Writes nothing: of several ranks the first alone has a log."""

    def log(self, record: Mapping[str, Any]) -> None:
        """Leave a record."""

    def close(self) -> None:
        """End."""


class MetricsLogger(StepLog):
    """Appends to a run's ``metrics.jsonl``.

    Parameters
    ----------
    folder : path-like
        The folder of the run.
    resume_at : int
        As for ``StepLog``.
    tensorboard : bool
        Whether to write every number to TensorBoard event files in ``tensorboard/``, too.

    Raises
    ------
    ValueError
        If ``tensorboard`` is set and tensorboardX is not installed.
    """

    def __init__(
        self, folder: str | os.PathLike[str], resume_at: int = 0, tensorboard: bool = False
    ) -> None:
        if tensorboard:
            check_tensorboard()
        super().__init__(Path(folder) / METRICS_FILE, resume_at)
        self._events = _Events(Path(folder) / EVENTS_FOLDER, resume_at) if tensorboard else None

    def log(self, record: Mapping[str, Any]) -> None:
        """Append a record, and write its events."""
        super().log(record)
        if self._events is not None:
            for step, loss in record.get("train_losses", ()):
                self._events.add(step, {"train_losses": loss})
            self._events.add(record["step"], dict(_numbers(record)))

    def close(self) -> None:
        """Close the event file, if there is one."""
        if self._events is not None:
            self._events.close()


def check_tensorboard() -> None:
    """Raise ``ValueError`` if the writer of TensorBoard events is not installed."""
    load_extra("TensorBoard's events need", "tensorboardX", "event_file_writer", "proto")


class _Events:
    """A file of TensorBoard events, each flushed when it was added.

    Parameters
    ----------
    folder : Path
    resume_at : int
        TensorBoard hides the events of earlier files after this step.
    """

    def __init__(self, folder: Path, resume_at: int) -> None:
        from tensorboardX.event_file_writer import EventsWriter  # type: ignore[import-untyped]
        from tensorboardX.proto.event_pb2 import SessionLog  # type: ignore[import-untyped]

        folder.mkdir(parents=True, exist_ok=True)
        # The name has the time and the step in it, so that two attempts do not share a file.
        self._file = EventsWriter(str(folder / "events"), f".{resume_at}")
        self._write(resume_at + 1, session_log=SessionLog(status=SessionLog.START))

    def add(self, step: int, numbers: Mapping[str, float]) -> None:
        """Write the numbers of a step."""
        from tensorboardX.proto.summary_pb2 import Summary  # type: ignore[import-untyped]

        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in numbers.items()]
        self._write(step, summary=Summary(value=values))

    def _write(self, step: int, **content: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._file.write_event(Event(step=step, wall_time=time.time(), **content))
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _numbers(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yield the numbers of a record and of those nested in it, by their paths; lists have none."""
    for key, value in record.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{key}/")
        elif not (value is None or isinstance(value, list) or f"{prefix}{key}" == "step"):
            yield f"{prefix}{key}", float(value)


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(_finite(record), allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
