"""The records of a run as columns of numbers, for figures and pages."""

import json
import math
import re
from dataclasses import dataclass
from typing import Any

from legacy1bit.data.origin import is_stories
from legacy1bit.data.stories import entropy_per_character
from legacy1bit.training.run import Run


def printable(text: str) -> str:
    """Return a text with a visible stand-in for each character that XML cannot hold."""
    return "".join(map(_visible, text))


def _visible(character: str) -> str:
    code = ord(character)
    if character == "\n":
        return "\u23ce"
    if code < 0x20 or 0x7F <= code < 0xA0 or 0xD800 <= code < 0xE000 or code & 0xFFFE == 0xFFFE:
        return "\ufffd"
    return character


@dataclass(frozen=True)
class RunRecords:
    """The records of a run.

    Attributes
    ----------
    run : Run
    records : list of dict
        The lines of ``metrics.jsonl``, oldest first.
    floor : float or None
        The entropy of the text, which no loss can be below, where it is known.
    """

    run: Run
    records: list[dict[str, Any]]
    floor: float | None = None

    @property
    def name(self) -> str:
        """The folder's own name."""
        folder = self.run.folder
        return printable(folder.name or folder.resolve().name)

    @property
    def unit(self) -> str:
        """The unit that losses are per: a character, where each token is one byte, or a token."""
        last = self.records[-1] if self.records else {}
        size = last.get("val_bytes")
        same = size is not None and size == last.get("val_tokens")
        return "character" if same or self.floor is not None else "token"

    def steps(self) -> list[float]:
        """Return the steps of the records."""
        return self.column("step")

    def index_of(self, step: int) -> int:
        """Return the index of the record of a step; of the last record, where there is none."""
        steps = [record.get("step") for record in self.records]
        return steps.index(step) if step in steps else len(steps) - 1

    def column(self, key: str) -> list[float]:
        """Return a number of every record, NaN where it is missing or was not finite.

        Raises
        ------
        ValueError
            If a value is not a number.
        """
        return [self._number(record.get(key), key, record) for record in self.records]

    def ranks(self) -> list[tuple[str, float, float]]:
        """Return each rank's machine and its mean seconds of a step: computing, and exchanging.

        They are those of the last record, and of all before with as many ranks.

        Raises
        ------
        ValueError
            If a value is not a number.
        """
        rows = [self._ranks(record) for record in self.records]
        every = [row for row in rows if len(row) == len(rows[-1])]
        return [
            (one[-1][0], *(sum(column) / len(one) for column in list(zip(*one, strict=True))[1:]))
            for one in zip(*every, strict=True)
        ]

    def _ranks(self, record: dict[str, Any]) -> list[tuple[str, float, float]]:
        ranks = record.get("ranks") or []
        if not (isinstance(ranks, list) and all(isinstance(one, dict) for one in ranks)):
            raise self._damaged("ranks", ranks, "a list of objects", record)
        return [
            (
                printable(str(one.get("host"))),
                self._number(one.get("computing"), "computing", record),
                self._number(one.get("exchanging"), "exchanging", record),
            )
            for one in ranks
        ]

    def train_losses(self) -> tuple[list[float], list[float]]:
        """Return the steps and values of the training loss.

        Records of earlier versions have one value, the mean since the record before; those of
        today have one of every few steps.

        Raises
        ------
        ValueError
            If a value is not a number.
        """
        steps: list[float] = []
        losses: list[float] = []
        for record in self.records:
            points = record.get("train_losses", [[record["step"], record.get("train_loss")]])
            if not isinstance(points, list):
                raise self._damaged("train_losses", points, "pairs of step and loss", record)
            for point in points:
                if not (isinstance(point, list) and len(point) == 2):
                    raise self._damaged("train_losses", point, "a pair of step and loss", record)
                steps.append(self._number(point[0], "a step of train_losses", record))
                losses.append(self._number(point[1], "a loss of train_losses", record))
        return steps, losses

    def losses(self) -> dict[str, list[float]]:
        """Return the losses of each text that is mixed, by its name; NaN as in ``column``.

        Raises
        ------
        ValueError
            If a value is not a number.
        """
        parts = [record.get("val_losses", {}) for record in self.records]
        for record, losses in zip(self.records, parts, strict=True):
            if not isinstance(losses, dict):
                raise self._damaged("val_losses", losses, "a loss for each text", record)
        names = dict.fromkeys(name for losses in parts for name in losses)
        return {
            name: [
                self._number(losses.get(name), f"the loss of {name}", record)
                for record, losses in zip(self.records, parts, strict=True)
            ]
            for name in names
        }

    def matrices(self) -> list[str]:
        """Return the names of the quantized matrices, in the model's order."""
        return list(
            dict.fromkeys(name for record in self.records for name in self._weights(record))
        )

    def fraction(self, matrix: str, code: str) -> list[float]:
        """Return the fraction of a matrix's code, or of ``flipped``, in every record, or NaN.

        Raises
        ------
        ValueError
            If a value is not a number.
        """
        column = []
        for record in self.records:
            fractions = self._weights(record).get(matrix, {})
            if not isinstance(fractions, dict):
                raise self._damaged(f"weights of {matrix}", fractions, "fractions", record)
            column.append(self._number(fractions.get(code), f"{code} of {matrix}", record))
        return column

    def codes(self) -> list[str]:
        """Return the codes of the quantized matrices, in ascending order."""
        codes = {
            code
            for record in self.records
            for fractions in self._weights(record).values()
            if isinstance(fractions, dict)
            for code in fractions
            if re.fullmatch(r"-?\d{1,3}", code)
        }
        return sorted(codes, key=int)

    def _weights(self, record: dict[str, Any]) -> dict[str, Any]:
        weights = record.get("weights")
        if weights is None:
            return {}
        if not isinstance(weights, dict):
            raise self._damaged("weights", weights, "fractions by matrix", record)
        return weights

    def _number(self, value: Any, key: str, record: dict[str, Any]) -> float:
        if value is None:
            return math.nan
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self._damaged(key, value, "a number", record)
        try:
            number = float(value)
        except OverflowError:
            return math.nan
        # An axis cannot hold a larger one.
        return number if abs(number) < 1e300 else math.nan

    def _damaged(self, key: str, value: Any, wanted: str, record: dict[str, Any]) -> ValueError:
        return ValueError(
            f"{self.run.metrics_file}: {key} of step {str(record['step'])[:20]} is "
            f"{json.dumps(value)[:40]}, expected {wanted}"
        )


def read_records(run: Run) -> RunRecords:
    """Read the records of a run; one that ended before it was saved has no settings.

    Raises
    ------
    OSError
        If a file cannot be read.
    ValueError
        If the folder is not a run, or its metrics or settings are damaged.
    """
    records = run.metrics()
    floor = None
    if run.is_saved:
        source = run.settings().source
        if is_stories(source):
            floor = entropy_per_character()
    return RunRecords(run, records, floor)
