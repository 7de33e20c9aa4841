"""Which lines the tests ran, and which branches of the kernels: ``make test-coverage`` in the end.

Python's lines come from coverage.py. Those of Cython and of the headers come from gcov: the kernels
run without the GIL and on threads of C, where no tracer of Python's sees them. A line counts when
one instruction set has run it; the branches of the kernels are counted for each of them.
"""

import json
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

from coverage import Coverage

LEAST = 95

# What Cython writes above the C code of a line of its source; at a function's end it holds no more.
MARK = re.compile(r'\s*/\* "(.+)":(\d+)$')


def lines_of_python():
    """Return, of each file, its lines, and those that did not run."""
    coverage = Coverage()
    coverage.load()
    found = {}
    for path in sorted(Path("legacy1bit").rglob("*.py")):
        _, lines, _, missed, _ = coverage.analysis2(str(path))
        found[str(path)] = lines, missed
    return found


def places_in_cython(source):
    """Return where in Cython's sources each line of a C file comes from, None where nowhere."""
    places, place = [None], None
    for line in source.read_text().splitlines():
        if mark := MARK.match(line):
            # The first line stands for what makes a module of all the others.
            ours = mark[1].endswith(".pyx") and mark[2] != "1"
            place = (mark[1], int(mark[2])) if ours else None
        elif line.startswith("}"):
            place = None
        # Errors of Python's own are no branches of a kernel.
        places.append(None if "__PYX_ERR" in line and "kernels" in source.name else place)
    return places


def counts_of_c():
    """Return, of each module, how often each place ran, and of its branches each."""
    found = {}
    for notes in sorted(Path().rglob("*.gcno")):
        done = subprocess.run(
            ["gcov", "--json-format", "--branch-probabilities", "--stdout", notes],
            capture_output=True, check=True,
        )  # fmt: skip
        ran, branches = defaultdict(int), defaultdict(list)
        report = json.loads(done.stdout)
        for file in report["files"]:
            path = Path(report["current_working_directory"], file["file"])
            if path.name == notes.with_suffix(".c").name:
                places = places_in_cython(path)
            elif file["file"].startswith("include/"):
                places = None
            else:
                continue
            for line in file["lines"]:
                number = line["line_number"]
                if place := places[number] if places else (file["file"], number):
                    ran[place] += line["count"]
                    branches[place] += [branch["count"] for branch in line["branches"]]
        found[notes.parents[1].name] = ran, branches
    return found


def lines_of_c(counts, folder):
    """Return, of each file, its lines, and those that no module ran."""
    total = defaultdict(lambda: defaultdict(int))
    for ran, _ in counts.values():
        for (path, line), count in ran.items():
            if path.startswith(folder):
                total[path][line] += count
    return {
        path: (sorted(ran), sorted(line for line in ran if not ran[line]))
        for path, ran in sorted(total.items())
    }


def ranges(numbers, lines):
    """Write line numbers as ranges, over lines that hold no code."""
    texts, first, previous = [], None, None
    for line in [*lines, None]:
        if line in numbers:
            first, previous = first or line, line
        elif first:
            texts.append(f"{first}" if first == previous else f"{first}-{previous}")
            first = None
    return ", ".join(texts)


def share(lines, missed):
    return 100 * (1 - missed / max(lines, 1))


def print_lines(kind, found):
    """Print what did not run; return the share that did."""
    for path, (lines, missed) in found.items():
        if missed:
            percent = share(len(lines), len(missed))
            print(f"{percent:6.1f} %  {path}: {ranges(set(missed), lines)}")
    lines, missed = (sum(len(pair[i]) for pair in found.values()) for i in (0, 1))
    print(f"{kind}: {lines - missed} of {lines} lines, {share(lines, missed):.1f} %\n")
    return share(lines, missed)


def print_branches(tier, branches):
    """Print the lines of an instruction set's kernels with branches that did not run."""
    whole = sum(map(len, branches.values()))
    missed = defaultdict(list)
    for (path, line), counts in sorted(branches.items()):
        if 0 in counts:
            missed[path].append((line, counts.count(0)))
    count = sum(many for lines in missed.values() for _, many in lines)
    print(f"{tier}: {whole - count} of {whole} branches, {share(whole, count):.1f} %")
    for path, lines in missed.items():
        print(f"    {path}: {', '.join(f'{line} ({many})' for line, many in lines)}")


def main():
    counts = counts_of_c()
    kinds = {
        "Python": lines_of_python(),
        "Cython": lines_of_c(counts, "legacy1bit/"),
        "C": lines_of_c(counts, "include/"),
    }
    shares = [print_lines(kind, found) for kind, found in kinds.items()]
    for module, (_, branches) in counts.items():
        if "_kernels_" in module:
            print_branches(module.split("_kernels_")[1], branches)
    return 0 if min(shares) >= LEAST else 1


if __name__ == "__main__":
    sys.exit(main())
