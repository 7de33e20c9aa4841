"""Which lines of Python and Cython the tests ran: what ``make test-coverage`` prints in the end.

Python's come from coverage.py. Cython's come from gcov: the kernels run without the GIL and on
threads of C, where no tracer of Python's sees them. A line counts when one instruction set has run
it.
"""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

from coverage import Coverage

LEAST = 95


def lines_of_python():
    """Return for each file its lines, and those that did not run."""
    coverage = Coverage()
    coverage.load()
    found = {}
    for path in sorted(Path("legacy1bit").rglob("*.py")):
        _, lines, _, missed, _ = coverage.analysis2(str(path))
        found[str(path)] = lines, missed
    return found


def lines_of_cython():
    counts = {}
    for notes in Path().rglob("*.gcda"):
        done = subprocess.run(
            ["gcov", "--json-format", "--stdout", notes], capture_output=True, check=True
        )
        for file in json.loads(done.stdout)["files"]:
            if file["file"].endswith(".pyx"):
                ran = counts.setdefault(file["file"], Counter())
                for line in file["lines"]:
                    ran[line["line_number"]] += line["count"]
    return {
        path: (sorted(ran), sorted(line for line in ran if not ran[line]))
        for path, ran in sorted(counts.items())
    }


def ranges(numbers, lines):
    """Write line numbers as ranges, over lines that hold no code."""
    texts, first, previous = [], None, None
    for line in lines:
        if line in numbers:
            first, previous = first or line, line
        elif first:
            texts.append(f"{first}" if first == previous else f"{first}-{previous}")
            first = None
    if first:
        texts.append(f"{first}" if first == previous else f"{first}-{previous}")
    return ", ".join(texts)


def share(lines, missed):
    return 100 * (1 - missed / max(lines, 1))


def main():
    total = {}
    for kind, found in {"Python": lines_of_python(), "Cython": lines_of_cython()}.items():
        for path, (lines, missed) in found.items():
            if missed:
                percent = share(len(lines), len(missed))
                print(f"{percent:6.1f} %  {path}: {ranges(set(missed), lines)}")
        total[kind] = (
            sum(len(lines) for lines, _ in found.values()),
            sum(len(missed) for _, missed in found.values()),
        )
    total["all"] = tuple(map(sum, zip(*total.values(), strict=True)))
    for kind, (lines, missed) in total.items():
        print(f"{kind}: {lines - missed} of {lines} lines, {share(lines, missed):.1f} %")
    return 0 if share(*total["all"]) >= LEAST else 1


if __name__ == "__main__":
    sys.exit(main())
