"""The mutation check: does the suite fail for every seeded fault?

Builds a copy of the package in ``build/mutants`` in which all faults are compiled in (``seed.py``),
runs the suite in it once to learn which test enters which function, and then, for each fault, the
tests that enter its function, in a process of its own, until one fails. ``make test-mutants`` runs
it; faults that change nothing are listed with their reasons in ``equivalent.toml``.
"""

import argparse
import contextlib
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import tomllib
import warnings
from collections import Counter
from pathlib import Path

import seed

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
TREE = ROOT / "build" / "mutants"
# The part of the suite that is about numbers.
TESTS = [
    f"tests/test_{name}.py"
    for name in (
        "bounds",
        "simd",
        "math_ops",
        "optimizer",
        "backward",
        "forward",
        "packed",
        "precision",
        "int8_products",
        "inference",
        "model",
        "schemes",
        "threads",
    )
]
# For a function; ten must remain besides those that change nothing.
FAULTS = 12
# Each copy has a frame of its own, and knows when it writes beyond one of its arrays.
FLAGS = ["-w", "-fno-inline", "-fstack-protector-all"]
HEADERS = ["sums", "cache", "elementwise", "amx", "bf16"]
VOCABULARIES = ["scalar", "sse", "sse2", "avx2", "avx512"]
PATHS = [f"include/{name}.h" for name in HEADERS]
PATHS += [f"include/simd_{name}.h" for name in VOCABULARIES]
PATHS += [
    f"legacy1bit/{name}.pyx"
    for name in ("kernels", "math_ops", "forward", "backward", "optimizer", "packed")
]
# The faults of kernels.pyx are in the widest instruction set without bfloat16, whose products in
# float32 the wider ones have, and in that with the matrix unit. There, they are harder to notice
# than in all of them.
FAULTY = b'"faulty" if tier in ("avx512vnni", "amx") else "kernels", ['
# Has run when a test begins: its faults are tried by a program of its own, with these tests.
AT_IMPORT, OF_IMPORT = ":simd_prepare+", "tests/test_packed.py"
# What measures speed computes nothing that anybody reads; and one lane leaves no rest.
NOT_KERNELS = {
    "peak_fused",
    "peak_packed",
    "peak_read",
    "measuring",
    "timer_name",
    "timer_calls",
    "timer_nanoseconds",
    "__cinit__",
    "__dealloc__",
    "__repr__",
    "__reduce__",
}


def kernels(path, source):
    """The functions of a source file that count.

    All of the headers, of ``kernels.pyx`` and of ``backward.pyx``; elsewhere those that run
    without the GIL, or have a loop that does.
    """
    functions_of = seed.c_functions if path.endswith(".h") else seed.cython_functions
    found = [
        function
        for function in functions_of(path, source)
        if function.name not in NOT_KERNELS
        and not (path.endswith("simd_scalar.h") and function.name.endswith("_first"))
    ]
    if path.endswith(".h"):
        return found
    if path.endswith(("/kernels.pyx", "/backward.pyx")):
        return found
    loop = re.compile(r"with nogil:\n +for ")
    return [
        function for function in found if "nogil" in function.head or loop.search(function.text)
    ]


def equivalents():
    with open(HERE / "equivalent.toml", "rb") as file:
        return {fault["fault"]: fault["why"] for fault in tomllib.load(file)["equivalent"]}


def sow(unfit):
    """Write the sources with their faults to the tree; returns the functions."""
    functions = []
    for path in PATHS:
        source = (ROOT / path).read_text()
        here = kernels(path, source)
        for index, function in enumerate(here, len(functions) + 1):
            function.faults = seed.choose(function, FAULTS, unfit)
            for place, fault in enumerate(function.faults):
                fault.number = 100 * index + place
        functions += here
        numbers = {function.key: index for index, function in enumerate(functions)}
        assert len(numbers) == len(functions)
        text = seed.seeded(path, source, here, numbers)
        if path.endswith("/kernels.pyx"):
            replace(TREE / path, source)
            path = path.replace("kernels", "faulty")
        replace(TREE / path, text)
    return functions


def replace(path, text):
    """Write a file, unless it has that text already: nothing is to be compiled again."""
    if not path.exists() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def copy_project():
    listed = subprocess.run(
        ["git", "-C", ROOT, "ls-files"], check=True, capture_output=True, text=True
    ).stdout.splitlines()
    for name in listed:
        if name in PATHS or not (ROOT / name).is_file():
            continue
        text = (ROOT / name).read_bytes()
        if name == "setup.py":
            # Less to optimise: there are a dozen copies of everything.
            text = text.replace(b'"-O3"', b'"-O1"').replace(b'"-O2"', b'"-O0"')
            text = text.replace(b'"kernels", [', FAULTY)
            # A matrix unit in C, so that its kernels can be tried where the CPU has none.
            text = text.replace(b"if CHECKED:", b"if True:")
            # What did compile need not be compiled again after what did not.
            text = text.replace(b"not note.exists() or note.read_text() != flags", b"False")
        to = TREE / name
        if not to.exists() or to.read_bytes() != text:
            to.parent.mkdir(parents=True, exist_ok=True)
            to.write_bytes(text)
    shutil.copy(HERE / "mutants.h", TREE / "include")


def digest():
    """Return what stands for the sources and the tests: results are about these."""
    tests = sorted(
        path for folder in ("tests", "tests/helpers") for path in (ROOT / folder).glob("*.py")
    )
    paths = [*(ROOT / path for path in PATHS), *tests]
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()


def tiers():
    """The instruction sets' names and flags, as setup.py has them."""
    source = (ROOT / "setup.py").read_text()
    start = source.index("TIERS = {")
    names = {"sys": sys, "platform": __import__("platform")}
    exec(source[start : source.index("# These check and call")], names)
    return names["TIERS"]


def misfits(output, faults):
    """The faults that a compiler's messages are about."""
    numbers = set()
    for path, line in re.findall(r"^(\S+?\.(?:h|pyx)):(\d+)(?::\d+)?: (?!.*warning)", output, re.M):
        file = TREE / path if (TREE / path).exists() else TREE / "legacy1bit" / path
        lines = file.read_text().split("\n")[: int(line)]
        for text in reversed(lines):
            if re.match(r" *(cdef|def) [^=]*\(|(static|FORCE_INLINE|__attribute__)\b.*\(", text):
                copy = re.match(r" *(?:cdef |def |__attribute__)[^;]*?\bmutant(\d+)_", text)
                numbers.update([int(copy[1])] if copy else [])
                break
    numbers.update(map(int, re.findall(r"In function .*?mutant(\d+)_.*\n.*error:", output)))
    return {faults[number].name for number in numbers}


def compile_headers():
    """Try the headers in each instruction set; returns the compiler's errors."""
    trial = TREE / "trial.c"
    trial.write_text('#include "sums.h"\n#include "cache.h"\n#include "elementwise.h"\n')
    output = ""
    for tier, flags in tiers().items():
        command = [
            "cc",
            "-std=c99",
            "-D_GNU_SOURCE",
            "-Iinclude",
            "-Itests",
            "-DEMULATED_TILES",
            f"-DLEGACY1BIT_TIER_{tier.upper()}",
            "-Werror=implicit-function-declaration",
            "-O0",
            "-fkeep-static-functions",
            *flags,
            "-c",
            "trial.c",
            "-o",
            os.devnull,
        ]
        ran = subprocess.run(command, cwd=TREE, capture_output=True, text=True)
        if ran.returncode:
            output += "\n".join(line for line in ran.stderr.splitlines() if "error" in line) + "\n"
    return output


def newer(one, other):
    return one.exists() and one.stat().st_mtime > other.stat().st_mtime


def compile_cython():
    """Try the modules; returns Cython's errors."""
    output = ""
    for path in [path.replace("kernels", "faulty") for path in PATHS]:
        trial = TREE / f"trial-{Path(path).stem}.c"
        if not path.endswith(".pyx") or newer(trial, TREE / path):
            continue
        command = [
            sys.executable,
            "-m",
            "cython",
            "-3",
            "-X",
            "boundscheck=False,cdivision=True,initializedcheck=False",
            path,
            "-o",
            trial,
        ]
        ran = subprocess.run(command, cwd=TREE, capture_output=True, text=True)
        if ran.returncode:
            trial.unlink(missing_ok=True)
            output += ran.stderr
    return output


def build():
    """Sow faults until all that are left compile; returns the functions."""
    copy_project()
    known = TREE / "unfit.json"
    unfit = set(json.loads(known.read_text())) if known.exists() else set()
    for attempt in (compile_headers, compile_cython, compile_all):
        while True:
            functions = sow(unfit | set(equivalents()))
            faults = {fault.number: fault for function in functions for fault in function.faults}
            output = attempt()
            new = misfits(output, faults)
            if not new:
                if output:
                    sys.exit(output[-5000:])
                break
            print(f"{len(new)} faults do not compile", file=sys.stderr)
            unfit |= new
            known.write_text(json.dumps(sorted(unfit), indent=0))
    return functions


def compile_all():
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    ran = subprocess.run(
        command,
        cwd=TREE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "CFLAGS": " ".join(FLAGS)},
    )
    (TREE / "build.log").write_text(ran.stdout)
    return ran.stdout if ran.returncode else ""


# --- Inside pytest --------------------------------------------------------------------------------


class Plugin:
    """Instead of running the tests once: once to see what they enter, then for each fault."""

    def __init__(self, faults, count, options):
        self.faults, self.count, self.options = faults, count, options
        self.failed = None

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.failed = report.nodeid

    def pytest_runtestloop(self, session):
        if session.testsfailed:
            raise SystemExit("the tests could not be collected")
        items = [
            item
            for place, item in enumerate(session.items)
            if place % self.options.part == 0 or "test_bounds" in item.nodeid
        ]
        self.attack(items, self.survey(items))
        return True

    def run(self, items, seconds_of, after):
        """Run tests in this process until one fails."""
        for item, following in zip(items, [*items[1:], None], strict=True):
            # An endless loop takes time of the CPU; threads that wait for each other do not.
            for timer, limit in ((signal.ITIMER_PROF, 5), (signal.ITIMER_REAL, 60)):
                signal.setitimer(timer, limit * (1 + seconds_of(item)))
            began = time.monotonic()
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            after(item, time.monotonic() - began)

    def survey(self, items):
        """Which functions each test enters, and how long it takes; only of those that pass."""
        known = Path("reached.jsonl")
        known.touch()
        found = dict(read_lines(known))
        rest = [item for item in items if item.nodeid not in found]
        marks = Path("reached.bin")
        marks.write_bytes(bytes(self.count))

        def after(item, seconds):
            # Written in place: other processes have the file mapped.
            with open(marks, "r+b") as file:
                entered = [index for index, mark in enumerate(file.read()) if mark]
                file.seek(0)
                file.write(bytes(self.count))
            if self.failed:
                print("fails without a fault:", self.failed, file=sys.stderr)
                entered = []
            self.failed = None
            with known.open("a") as file:
                print(json.dumps([item.nodeid, [round(seconds, 4), entered]]), file=file)

        def work():
            os.environ["LEGACY1BIT_REACHED"] = str(marks.resolve())
            self.run(rest, lambda item: 600, after)

        if rest and forked(work, "survey.log") != 0:
            sys.exit("the suite cannot be surveyed: see survey.log")
        return dict(read_lines(known))

    def control(self, items, reached):
        """What is called noticed must be the fault: without one, the same tests pass."""

        def after(item, seconds):
            if self.failed:
                print(self.failed)
                os._exit(1)

        def work():
            self.run(items, lambda item: reached[item.nodeid][0], after)

        if forked(work, "control.log"):
            sys.exit("tests fail without a fault: see control.log")

    def attack(self, items, reached):
        results, by_name = Path("results.jsonl"), {item.nodeid: item for item in items}
        done = {}
        if results.exists():
            done = {line["fault"]: line for line in read_lines(results)}
        entering = {}
        for name, (_, entered) in reached.items():
            if name in by_name:
                for index in entered:
                    entering.setdefault(index, []).append(name)
        cheapest = {min(names, key=lambda name: reached[name][0]) for names in entering.values()}
        self.control([by_name[name] for name in sorted(cheapest)], reached)
        killers = {}
        for number, fault in self.faults.items():
            index, name = fault["function"], fault["name"]
            if not re.search(self.options.only, name):
                continue
            if name in done and (done[name]["outcome"] != "survived" or not self.options.again):
                continue
            first = killers.setdefault(index, Counter())
            names = in_turns(sorted(entering.get(index, []), key=lambda name: reached[name][0]))
            names = sorted(names, key=lambda name: -first[name])[: self.options.limit]
            chosen = [by_name[name] for name in names]
            began = time.monotonic()
            killer = Path(f"killer-{os.getpid()}")
            killer.unlink(missing_ok=True)

            def work(number=number, name=name, chosen=chosen, killer=killer):
                os.environ["LEGACY1BIT_MUTANT"] = str(number)
                if AT_IMPORT in name:
                    killer.write_text(OF_IMPORT)
                    signal.alarm(600)
                    os.execv(sys.executable, [sys.executable, "-m", "pytest", "-qx", OF_IMPORT])

                def after(item, seconds):
                    if self.failed:
                        os._exit(1)

                def allowed(item):
                    killer.write_text(item.nodeid)
                    return reached[item.nodeid][0]

                self.run(chosen, allowed, after)

            status = forked(work) if chosen else 0
            line = {"fault": name, "outcome": "survived", "tests": len(chosen)}
            if status:
                late = status in (-signal.SIGALRM, -signal.SIGPROF)
                line["outcome"] = "failed" if status == 1 else "endless" if late else "crashed"
                line["test"] = killer.read_text()
                first[line["test"]] += 1
            line["seconds"] = round(time.monotonic() - began, 2)
            with results.open("a") as file:
                print(json.dumps(line), file=file)
            print(
                f"{number:5} {line['outcome']:8} {line['seconds']:6.2f} s  {name}", file=sys.stderr
            )


def in_turns(names):
    """Of each test the cheapest case, then of each the next."""
    turn = Counter()
    order = {}
    for place, name in enumerate(names):
        test = name.split("[")[0]
        order[name] = (turn[test], place)
        turn[test] += 1
    return sorted(names, key=order.get)


def read_lines(path):
    return list(map(json.loads, path.read_text().splitlines()))


def forked(work, log=os.devnull):
    """Run in a child; returns its status, or minus the signal that ended it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        child = os.fork()
    if not child:
        status = 3
        try:
            os.setpgid(0, 0)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            # Tests may set another limit: the hard one stays.
            _, hard = resource.getrlimit(resource.RLIMIT_AS)
            resource.setrlimit(resource.RLIMIT_AS, (16 << 30, hard))
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            work()
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(status)


def attack(options):
    """Run pytest with the plugin, inside the tree."""
    import pytest

    table = json.loads(Path("faults.json").read_text())
    plugin = Plugin(
        {int(number): fault for number, fault in table["faults"].items()}, table["count"], options
    )
    sys.exit(
        pytest.main(
            [
                "-q",
                "-s",
                "-p",
                "no:cacheprovider",
                "-p",
                "no:faulthandler",
                f"--basetemp={TREE}/tmp-{os.getpid()}",
                *options.tests,
            ],
            plugins=[plugin],
        )
    )


def report(functions):
    """Print a table of functions; returns whether every fault was noticed."""
    results = {line["fault"]: line for line in read_lines(TREE / "results.jsonl")}
    nothing = Counter(name.split("+")[0] for name in equivalents())
    total, survivors = Counter(), []
    print("| function | faults | noticed | change nothing |\n| --- | ---: | ---: | ---: |")
    for function in functions:
        lines = [results[fault.name] for fault in function.faults if fault.name in results]
        if not lines and not nothing[function.key]:
            continue
        survivors += [line["fault"] for line in lines if line["outcome"] == "survived"]
        noticed = sum(line["outcome"] != "survived" for line in lines)
        print(f"| `{function.key}` | {len(lines)} | {noticed} | {nothing[function.key] or ''} |")
        total.update(line["outcome"] for line in lines)
        total.update(faults=len(lines), nothing=nothing[function.key], functions=1)
    print("\n" + ", ".join(f"{name}: {count}" for name, count in total.items()))
    if survivors:
        print("\nNobody noticed:\n" + "\n".join(survivors))
    return not survivors


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="faults whose names match")
    parser.add_argument("--limit", type=int, help="at most so many tests for each fault")
    parser.add_argument("--part", type=int, default=1, help="of the tests, only every N-th")
    parser.add_argument(
        "--again",
        action="store_true",
        help="try those that survived; for the others, what is known holds, whatever has changed",
    )
    parser.add_argument("--build", action="store_true", help="only build")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument(
        "tests", nargs="*", default=TESTS, help="files of tests; by default those about numbers"
    )
    options = parser.parse_args()
    if options.inside:
        attack(options)
    TREE.mkdir(parents=True, exist_ok=True)
    functions = build()
    table = {
        "digest": digest(),
        "count": len(functions),
        "faults": {
            fault.number: {"name": fault.name, "function": index}
            for index, function in enumerate(functions)
            for fault in function.faults
        },
    }
    text = json.dumps(table, indent=0)
    if not (TREE / "faults.json").exists() or (TREE / "faults.json").read_text() != text:
        (TREE / "reached.jsonl").unlink(missing_ok=True)
        if not options.again:
            (TREE / "results.jsonl").unlink(missing_ok=True)
        (TREE / "faults.json").write_text(text)
    print(f"{len(table['faults'])} faults in {len(functions)} functions", file=sys.stderr)
    if options.build:
        return
    environment = {**os.environ, "PYTHONPATH": str(TREE), "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, HERE / "check.py", "--inside", *sys.argv[1:]]
    status = subprocess.run(command, env=environment).returncode
    sys.exit(status or not report(functions))


if __name__ == "__main__":
    if "--inside" in sys.argv:
        os.chdir(TREE)
    main()
