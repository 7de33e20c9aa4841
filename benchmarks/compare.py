"""Two commits side by side: ``make bench-compare A=<commit> B=<commit>``.

Each is checked out and built in a folder of its own, and their benchmarks take turns, A B A B, so
that a machine whose speed drifts slows both alike.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.measure import Rates
from benchmarks.report import markdown, median, number, prepare
from legacy1bit.system.files import atomic_write_all

# Of a commit that is built.
_BUILT = ".built"


@dataclass(frozen=True)
class Ratio:
    """How B does beside A.

    Attributes
    ----------
    name, column : str
        The benchmark, and the instruction set or whatever else it was measured in.
    a, b : float
        The medians.
    low, high : float
        The lowest and the highest ratio of two turns that followed each other.
    """

    name: str
    column: str
    a: float
    b: float
    low: float
    high: float

    @property
    def ratio(self) -> float:
        """B's median over A's."""
        return self.b / self.a


def rates_of(report: Mapping[str, Any]) -> Rates:
    """Return the rates of a report of this format, or of the one before, which was nothing else.

    Raises
    ------
    ValueError
        If it is neither.
    """
    if report.get("format") == 2:
        return {name: dict(result["rates"]) for name, result in report["results"].items()}
    told = all(
        isinstance(columns, dict) and all(isinstance(values, list) for values in columns.values())
        for columns in report.values()
    )
    if not told:
        raise ValueError("this is no report of a benchmark: expected rates by name and column")
    return {name: dict(columns) for name, columns in report.items()}


def joined(reports: Sequence[Mapping[str, Any]]) -> Rates:
    """Return the rates of several reports, each joined to one number: its median."""
    rates: Rates = {}
    for report in reports:
        for name, columns in rates_of(report).items():
            for column, values in columns.items():
                rates.setdefault(name, {}).setdefault(column, []).append(median(values))
    return rates


def ratios(a: Sequence[Mapping[str, Any]], b: Sequence[Mapping[str, Any]]) -> list[Ratio]:
    """Return the ratios of all that both have measured.

    Parameters
    ----------
    a, b : sequence of mapping
        The reports of each, in the order they were made, as many of one as of the other.
    """
    first, second = joined(a), joined(b)
    found = []
    for name, columns in first.items():
        for column, ours in columns.items():
            theirs = second.get(name, {}).get(column, [])
            if not theirs:
                continue
            # A report may lack a row; what is left is paired in order.
            each = [after / before for before, after in zip(ours, theirs, strict=False)]
            found.append(Ratio(name, column, median(ours), median(theirs), min(each), max(each)))
    return found


def only_in_one(
    a: Sequence[Mapping[str, Any]], b: Sequence[Mapping[str, Any]]
) -> tuple[list[str], list[str]]:
    """Return the names of what A alone has measured, and B alone."""
    first, second = joined(a), joined(b)
    return [name for name in first if name not in second], [
        name for name in second if name not in first
    ]


def table(found: Sequence[Ratio]) -> list[str]:
    """Return the lines of the table of ratios."""
    rows = [
        (
            one.name,
            one.column,
            number(one.a),
            number(one.b),
            f"{one.ratio:.3f}",
            f"{one.low:.3f} to {one.high:.3f}",
        )
        for one in found
    ]
    return markdown(("what", "in", "A", "B", "B / A", "from turn to turn"), rows)


def check_out(commit: str, folder: Path) -> Path:
    """Return a folder that has a commit, built in place.

    Raises
    ------
    ValueError
        If there is no such commit.
    subprocess.CalledProcessError
        If it cannot be built.
    """
    told = subprocess.run(
        ["git", "rev-parse", "--verify", "--quiet", f"{commit}^{{commit}}"],
        capture_output=True,
        text=True,
    )
    if told.returncode:
        raise ValueError(f"{commit!r} is no commit of this repository")
    place = folder.resolve() / told.stdout.strip()[:12]
    if (place / _BUILT).exists():
        return place
    if not place.exists():
        # `make clean` removes such folders without telling git.
        subprocess.run(["git", "worktree", "prune"], check=True)
        subprocess.run(
            ["git", "worktree", "add", "--quiet", "--detach", str(place), told.stdout.strip()],
            check=True,
        )
    print(f"building {commit} in {place}", file=sys.stderr, flush=True)
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=place,
        check=True,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "MEASURE_PERFORMANCE": "0"},
    )
    (place / _BUILT).touch()
    return place


def run_once(place: Path, arguments: Sequence[str]) -> dict[str, Any]:
    """Return the report of one turn of the benchmark in a folder.

    Only options that the first of all benchmarks had are used unasked.
    """
    file = place / "build" / "turn.json"
    file.parent.mkdir(exist_ok=True)
    file.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks", "--rounds", "1", "--json", str(file)]
    subprocess.run(
        [*command, *arguments],
        cwd=place,
        check=True,
        stdout=subprocess.DEVNULL,
        # The folder itself comes before what is installed.
        env={**os.environ, "PYTHONPATH": str(place)},
    )
    report: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return report


def take_turns(
    turns: int, run_a: Callable[[], dict[str, Any]], run_b: Callable[[], dict[str, Any]]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the reports of A and of B, which were made in turns."""
    a, b = [], []
    for turn in range(turns):
        print(f"turn {turn + 1} of {turns}", file=sys.stderr, flush=True)
        a.append(run_a())
        b.append(run_b())
    return a, b


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare",
        description=__doc__,
        epilog="Further options go to both benchmarks: --only, say, where both know it.",
    )
    parser.add_argument("a", metavar="A", help="a commit")
    parser.add_argument("b", metavar="B", help="another")
    parser.add_argument("--turns", type=int, default=5, metavar="N", help="default: 5")
    parser.add_argument("--sse", choices=("0", "1"), default="1")
    parser.add_argument("--threads", default="1", metavar="N", help="default: 1")
    parser.add_argument("--folder", type=Path, default=Path("build/compare"), metavar="DIR")
    parser.add_argument(
        "--json",
        type=Path,
        default=Path("build/compare.json"),
        metavar="FILE",
        help="write all reports there, and the table beside it (default: build/compare.json)",
    )
    arguments, more = parser.parse_known_args(argv)
    if arguments.turns < 1:
        parser.error(f"expected at least 1 turn, not {arguments.turns}")
    options = ["--sse", arguments.sse, "--threads", arguments.threads, *more]
    try:
        prepare(arguments.json)
        places = [check_out(commit, arguments.folder) for commit in (arguments.a, arguments.b)]
        a, b = take_turns(
            arguments.turns,
            lambda: run_once(places[0], options),
            lambda: run_once(places[1], options),
        )
    except (OSError, ValueError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    except subprocess.CalledProcessError as error:
        command = " ".join(map(str, error.cmd))
        parser.exit(2, f"{parser.prog}: error: {command}: status {error.returncode}\n")
    found = ratios(a, b)
    lines = [f"A is {arguments.a}, B is {arguments.b}; medians of {arguments.turns} turns", ""]
    lines += table(found)
    for which, names in zip("AB", only_in_one(a, b), strict=True):
        if names:
            lines += ["", f"Only in {which}: {', '.join(names)}"]
    text = "\n".join(lines) + "\n"
    print(text, end="")
    report = {
        "commits": {"A": arguments.a, "B": arguments.b},
        "ratios": [{**asdict(one), "ratio": one.ratio} for one in found],
        "reports": {"A": a, "B": b},
    }
    atomic_write_all(
        {
            arguments.json: json.dumps(report, indent=1) + "\n",
            arguments.json.with_suffix(".md"): text,
        }
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
