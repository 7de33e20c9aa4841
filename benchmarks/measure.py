"""What a benchmark is, and how many of them take turns."""

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from legacy1bit import math_ops

LEAST_SECONDS = 0.02
BUSY = 0.5

_BLAS_THREADS = "OPENBLAS_NUM_THREADS"

Call = Callable[[], object]
# By benchmark and column (an instruction set, "int8", "bf16", "numpy", ...) the rates of all turns.
Rates = dict[str, dict[str, list[float]]]


@dataclass(frozen=True)
class Benchmark:
    """Something to measure.

    Attributes
    ----------
    name, unit : str
        The unit is one of rates: an amount per second.
    work : float
        How much of it one call does.
    call : callable
    counted : bool
        Whether the call returns a number that ``work`` is to be multiplied by.
    precisions : tuple of str
        The precisions of products, besides float32, that change it.
    others : mapping of str to callable
        Who else does the same work.
    known : mapping of str to float
        Rates that were measured elsewhere, to be shown beside.
    share_of : str, optional
        The name of the peak that it is a share of.
    per_unit : float
        How much of the peak one unit takes.
    """

    name: str
    unit: str
    work: float
    call: Call
    counted: bool = False
    precisions: tuple[str, ...] = ()
    others: Mapping[str, Call] = field(default_factory=dict)
    known: Mapping[str, float] = field(default_factory=dict)
    share_of: str | None = None
    per_unit: float = 1.0


def rate(work: float, call: Call, counted: bool = False, least: float = LEAST_SECONDS) -> float:
    """Return the work of a second, from as many calls as take ``least`` seconds."""
    done, begin = 0.0, time.perf_counter()
    while True:
        outcome = call()
        done += float(outcome) if counted else 1.0  # type: ignore[arg-type]
        passed = time.perf_counter() - begin
        if passed > least:
            return work * done / passed


def measure(
    benchmarks: Sequence[Benchmark],
    levels: Sequence[str],
    rounds: int,
    least: float = LEAST_SECONDS,
    pause: float = 0.2,
) -> Rates:
    """Run every benchmark in every column, in turns.

    The instruction sets of one benchmark follow each other at once, so that a machine whose speed
    drifts slows all alike. Where there is more than one, other precisions of products and others
    take their turns, too.

    Parameters
    ----------
    benchmarks : sequence of Benchmark
    levels : sequence of str
        Instruction sets.
    rounds : int
        Turns that count; one more before them warms up.
    least : float
        What a measurement takes at least, in seconds.
    pause : float
        Seconds before each turn.
    """
    before = math_ops.simd_level()
    # Before any other is chosen: only the widest ones have products in bfloat16.
    everything = len(levels) > 1
    math_ops.set_simd_level(levels[-1])
    precisions = math_ops.product_precisions()
    runs: list[tuple[Benchmark, str, Call]] = []
    for one in benchmarks:
        runs += [(one, level, one.call) for level in levels]
        if everything:
            runs += [(one, name, one.call) for name in one.precisions if name in precisions]
    # A BLAS keeps its threads spinning for a while after a product. They would take the cores from
    # whoever comes next: so it comes last, and they get time to fall asleep.
    if everything:
        runs += [(one, who, call) for one in benchmarks for who, call in one.others.items()]
    rates: Rates = {one.name: {} for one in benchmarks}
    try:
        for turn in range(rounds + 1):
            time.sleep(pause)
            for one, column, call in runs:
                math_ops.set_simd_level(column if column in levels else levels[-1])
                with math_ops.product_precision(column if column in precisions else "float32"):
                    value = rate(one.work, call, one.counted, least)
                if turn:
                    rates[one.name].setdefault(column, []).append(value)
    finally:
        math_ops.set_simd_level(before)
    return rates


def hold_blas(threads: int, module: str) -> None:
    """Start this program again where NumPy's BLAS may use another number of threads.

    It reads that number once, when NumPy is imported.
    """
    if os.environ.get(_BLAS_THREADS) != str(threads):
        os.environ[_BLAS_THREADS] = str(threads)
        os.execv(sys.executable, [sys.executable, "-m", module, *sys.argv[1:]])


def machine_load() -> float:
    """Return how many programs ran just now, and warn where they would be in the way."""
    load = os.getloadavg()[0]
    if load > BUSY:
        print(
            f"other programs are running (load {load:.1f}): rates will be too low, those of "
            "several threads by far",
            file=sys.stderr,
            flush=True,
        )
    return load


def package_environment(**more: str) -> dict[str, str]:
    """Return the environment in which a child imports this very package."""
    home = str(Path(math_ops.__file__).resolve().parents[1])
    path = os.pathsep.join(part for part in (home, os.environ.get("PYTHONPATH", "")) if part)
    return {**os.environ, "PYTHONPATH": path, **more}
