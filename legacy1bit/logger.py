"""The record of a training run: one JSON object a line (C: ``logger.c``)."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from legacy1bit.files import atomic_write

METRICS_FILE = "metrics.jsonl"


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Return the objects of a metrics file, oldest first.

    A last line that a crash left incomplete is passed over.

    Raises
    ------
    OSError
        If the file cannot be read.
    ValueError
        If another line is not a JSON object with a step.
    """
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError:
            if number == len(lines):
                break
            raise ValueError(f"{path}, line {number}: expected a JSON object") from None
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            raise ValueError(f"{path}, line {number}: expected a JSON object with its step")
        records.append(record)
    return records


class MetricsLogger:
    """Appends to a run's ``metrics.jsonl``.

    The C original keeps one JSON array a session, which is not JSON until the session has ended; a
    line that is written is complete.

    Parameters
    ----------
    folder : path-like
        The run.
    resume_at : int
        What was recorded after this step is dropped: it is about to happen again.
    """

    def __init__(self, folder: str | os.PathLike[str], resume_at: int = 0) -> None:
        self.path = Path(folder) / METRICS_FILE
        kept = []
        if resume_at and self.path.exists():
            kept = [record for record in read_metrics(self.path) if record["step"] <= resume_at]
        atomic_write(self.path, "".join(_line(record) for record in kept))

    def log(self, record: Mapping[str, Any]) -> None:
        """Add one record. Numbers that are not finite become null: JSON has none."""
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(_line(record))


def _line(record: Mapping[str, Any]) -> str:
    finite = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in record.items()
    }
    return json.dumps(finite, allow_nan=False) + "\n"
