"""The records of a training run, a JSON object a line: its metrics (C: ``logger.c``) and what the
model wrote on the way. And TensorBoard's events, for those who want them.
"""

import json
import math
import os
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from legacy1bit.hyperparams import SETTINGS_FILE
from legacy1bit.system.files import atomic_write, open_regular
from legacy1bit.system.optional import load_extra

METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.jsonl"
EVENTS_FOLDER = "tensorboard"

# A line that is longer is no record: those of the largest models have some hundred kilobytes.
_LONGEST_LINE = 1 << 24


def is_run(names: Collection[str]) -> bool:
    """Return whether a folder with files of these names is a run, perhaps one not saved yet."""
    unsaved = {METRICS_FILE, SAMPLES_FILE} >= set(names)
    return METRICS_FILE in names and (SETTINGS_FILE in names or unsaved)


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Return the objects of a file of metrics or of samples, oldest first.

    A last line that a crash left incomplete is passed over.

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
    """A file of records, each of which has its step.

    The C original keeps one JSON array a session, which is not JSON until the session has ended; a
    line that is written is complete.

    Parameters
    ----------
    path : path-like
    resume_at : int
        What was recorded after this step is dropped: it is about to happen again.
    """

    def __init__(self, path: str | os.PathLike[str], resume_at: int = 0) -> None:
        self.path = Path(path)
        kept = []
        if resume_at and self.path.exists():
            kept = [record for record in read_metrics(self.path) if record["step"] <= resume_at]
        try:
            lines = [_line(record) for record in kept]
        except RecursionError:
            raise ValueError(f"{path}: a record has too many others within it") from None
        atomic_write(self.path, "".join(lines))

    def log(self, record: Mapping[str, Any]) -> None:
        """Put one record onto the disk. Numbers that are not finite become null: JSON has none."""
        try:
            # Somebody may have removed the folder: what is to come is not lost for that.
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(_line(record))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            error.filename = str(self.path)
            raise


class MetricsLogger(StepLog):
    """Appends to a run's ``metrics.jsonl``.

    Parameters
    ----------
    folder : path-like
        The run.
    resume_at : int
        As for ``StepLog``.
    tensorboard : bool
        Whether every number goes to TensorBoard event files in ``tensorboard/``, too.

    Raises
    ------
    ValueError
        If those are wanted and tensorboardX is not installed.
    """

    def __init__(
        self, folder: str | os.PathLike[str], resume_at: int = 0, tensorboard: bool = False
    ) -> None:
        if tensorboard:
            check_tensorboard()
        super().__init__(Path(folder) / METRICS_FILE, resume_at)
        self._events = _Events(Path(folder) / EVENTS_FOLDER, resume_at) if tensorboard else None

    def log(self, record: Mapping[str, Any]) -> None:
        """Add one record. Numbers that are not finite become null: JSON has none."""
        super().log(record)
        if self._events is not None:
            self._events.add(record["step"], dict(_numbers(record)))

    def close(self) -> None:
        """Finish TensorBoard's file; a run without one has nothing to finish."""
        if self._events is not None:
            self._events.close()


def check_tensorboard() -> None:
    """Raise ``ValueError`` if what writes TensorBoard's events is not installed."""
    load_extra("TensorBoard's events need", "tensorboardX", "event_file_writer", "proto")


class _Events:
    """A file of TensorBoard's events: one for each record, on the disk when it was added.

    Parameters
    ----------
    folder : Path
    resume_at : int
        Events of earlier files after this step are no longer shown.
    """

    def __init__(self, folder: Path, resume_at: int) -> None:
        from tensorboardX.event_file_writer import EventsWriter  # type: ignore[import-untyped]
        from tensorboardX.proto.event_pb2 import SessionLog  # type: ignore[import-untyped]

        folder.mkdir(parents=True, exist_ok=True)
        # The name has the second in it, and the step, so that two attempts do not share one.
        self._file = EventsWriter(str(folder / "events"), f".{resume_at}")
        self._write(resume_at + 1, session_log=SessionLog(status=SessionLog.START))

    def add(self, step: int, numbers: Mapping[str, float]) -> None:
        """Write the numbers of one step."""
        from tensorboardX.proto.summary_pb2 import Summary  # type: ignore[import-untyped]

        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in numbers.items()]
        self._write(step, summary=Summary(value=values))

    def _write(self, step: int, **content: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._file.write_event(Event(step=step, wall_time=time.time(), **content))
        self._file.flush()

    def close(self) -> None:
        """Finish the file."""
        self._file.close()


def _numbers(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yield the numbers of a record and of the records within it, by their paths."""
    for key, value in record.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{key}/")
        elif value is not None and f"{prefix}{key}" != "step":
            yield f"{prefix}{key}", float(value)


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(_finite(record), allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
