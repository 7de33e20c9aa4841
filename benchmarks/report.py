"""The report of a run: JSON with everything in it, and a table to read."""

import datetime
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import legacy1bit
from benchmarks.measure import Benchmark, Rates
from legacy1bit.system.files import atomic_write_all
from legacy1bit.system.hardware import cpu_name

FORMAT = 2


@dataclass
class Result:
    """What came of a benchmark.

    Attributes
    ----------
    unit : str
    rates : dict of str to list of float
        By column what was measured.
    known : dict of str to float
        What was measured elsewhere.
    missing : dict of str to str
        Why a column has none.
    lower_is_better : bool
    share_of : str, optional
        The name of the peak that it is a share of.
    per_unit : float
        How much of the peak one unit takes.
    """

    unit: str
    rates: dict[str, list[float]]
    known: dict[str, float] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    lower_is_better: bool = False
    share_of: str | None = None
    per_unit: float = 1.0


def results_of(benchmarks: Sequence[Benchmark], rates: Rates) -> dict[str, Result]:
    """Return what came of benchmarks that were measured."""
    return {
        one.name: Result(
            one.unit,
            rates[one.name],
            known=dict(one.known),
            share_of=one.share_of,
            per_unit=one.per_unit,
        )
        for one in benchmarks
    }


def median(values: Sequence[float]) -> float:
    """Return the median."""
    return float(np.median(values))


def shares(result: Result, results: Mapping[str, Result], widest: str) -> dict[str, float]:
    """Return by column which part of the peak was reached.

    The peak is that of the same instruction set, for others than us of the widest. Products in
    bfloat16 have none: other instructions do them.
    """
    peak = results.get(result.share_of or "")
    if peak is None:
        return {}
    reached = {}
    for column, values in result.rates.items():
        best = peak.rates.get(widest if column == "numpy" else column)
        if best:
            reached[column] = median(values) * result.per_unit / median(best)
    return reached


def content(
    results: Mapping[str, Result],
    levels: Sequence[str],
    threads: Sequence[int],
    rounds: int,
    load: float,
) -> dict[str, Any]:
    """Return the report as plain data.

    Parameters
    ----------
    results : mapping of str to Result
    levels : sequence of str
        The instruction sets, the widest last.
    threads : sequence of int
    rounds : int
    load : float
        How many other programs ran before.
    """
    return {
        "format": FORMAT,
        "version": legacy1bit.__version__,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cpu": cpu_name(),
        "load": load,
        "system": platform.platform(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "tiers": list(levels),
        "threads": list(threads),
        "rounds": rounds,
        "results": {
            name: {
                "unit": result.unit,
                "better": "lower" if result.lower_is_better else "higher",
                "rates": result.rates,
                "medians": {column: median(values) for column, values in result.rates.items()},
                "known": result.known,
                "missing": result.missing,
                "share_of": result.share_of,
                "shares": shares(result, results, levels[-1]),
            }
            for name, result in results.items()
        },
    }


def number(value: float) -> str:
    """Return a number with four digits, or all before the point."""
    digits = 0 if value >= 1000 else 1 if value >= 100 else 2 if value >= 10 else 3
    return f"{value:,.{digits}f}"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]], texts: int = 2) -> list[str]:
    """Return the lines of a table, aligned so that it reads well as it is.

    Parameters
    ----------
    head : sequence of str
    rows : sequence of sequence of str
    texts : int
        How many of the columns, from the left, hold no numbers.
    """
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if index < texts else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = [
        "-" * width if index < texts else "-" * (width - 1) + ":"
        for index, width in enumerate(widths)
    ]
    return [line(head), f"| {' | '.join(rule)} |", *map(line, rows)]


def table(report: Mapping[str, Any]) -> list[str]:
    """Return the lines of the table of a report: medians, quartiles and ratios."""
    rows = []
    for name, result in report["results"].items():
        scalar = result["medians"].get("scalar")
        for column, values in result["rates"].items():
            low, middle, high = np.percentile(values, [25, 50, 75])
            share = result["shares"].get(column)
            rows.append(
                (
                    name,
                    column,
                    number(middle),
                    f"{number(low)} to {number(high)}",
                    result["unit"],
                    f"{middle / scalar:.2f}" if scalar else "",
                    f"{share:.0%}" if share is not None else "",
                )
            )
        for column, value in result["known"].items():
            ratio = f"{value / scalar:.4f}" if scalar else ""
            rows.append((name, column, number(value), "as known", result["unit"], ratio, ""))
        rows += [(name, column, why, "", "", "", "") for column, why in result["missing"].items()]
    head = ("what", "in", "median", "quartiles", "unit", "x scalar", "of its peak")
    return markdown(head, rows)


def heading(report: Mapping[str, Any]) -> str:
    """Return a line that tells of what machine a report is."""
    threads = ", ".join(map(str, report["threads"]))
    return (
        f"legacy1bit {report['version']}, {report['date']}, {report['cpu']}: "
        f"{report['rounds']} rounds, threads: {threads}, widest: {report['tiers'][-1]}, "
        f"load before: {report['load']:.1f}"
    )


def prepare(file: Path) -> None:
    """Make the folder of a report, before anything is measured for it.

    Raises
    ------
    ValueError, OSError
        If the name is not that of a JSON file, or nothing can be written there.
    """
    if file.suffix != ".json" or file.is_dir():
        raise ValueError(f"{file}: expected the name of a .json file")
    file.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(file.parent, os.W_OK):
        raise OSError(f"{file.parent}: nothing can be written there")


def publish(report: Mapping[str, Any], lines: Sequence[str], file: Path) -> None:
    """Print a table, and write it and the report side by side.

    Parameters
    ----------
    report : mapping
    lines : sequence of str
        The table.
    file : Path
        Where the report goes; the table's name ends with ``.md``.
    """
    text = "\n".join([heading(report), "", *lines]) + "\n"
    print(text, end="", flush=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_all({file: json.dumps(report, indent=1) + "\n", file.with_suffix(".md"): text})
