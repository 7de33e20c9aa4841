"""How fast the package is: ``make bench SSE=0`` and ``make bench SSE=1``.

SSE=0 measures the scalar instruction set, SSE=1 that and every other the CPU has, products in
bfloat16 where it has them, and NumPy, with as many threads, for the matrix product. All of them
take turns in one run, so that a machine whose speed drifts slows all alike; medians are printed,
with the first and the third quartile, and what that is of the peak measured in the same run.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import instructions, kernels, models
from benchmarks.measure import Benchmark, hold_blas, machine_load, measure
from benchmarks.peaks import peaks
from benchmarks.report import Result, content, prepare, publish, results_of, table
from legacy1bit import math_ops
from legacy1bit.threads import available_cores

PARTS = ("peaks", "kernels", "training", "decoding", "memory")


def benchmarks(parts: Sequence[str], threads: int, large: bool) -> list[Benchmark]:
    """Return what is to be measured in turns.

    Parameters
    ----------
    parts : sequence of str
        Some of ``PARTS``.
    threads : int
        How many threads training, decoding and the float products may use.
    large : bool
        Whether a model that no cache holds is among it.
    """
    chosen: list[Benchmark] = []
    if "peaks" in parts:
        chosen += peaks(threads)
    if "kernels" in parts:
        chosen += kernels.float_products(threads)
        chosen += kernels.packed_products()
        chosen += kernels.others()
    if "training" in parts:
        chosen += models.training(threads)
    if "decoding" in parts:
        chosen += models.decoding(threads)
        if large:
            # Few tokens and no prompt: without vector instructions they take seconds as it is.
            chosen += models.decoding(
                threads, models.LARGE, "400 M", decoded=8, prompt=0, from_memory=True
            )
    return chosen


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--sse", type=int, choices=(0, 1), default=1)
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="default: 7")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="default: 1")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="some parts")
    parser.add_argument(
        "--large", action="store_true", help="decode a model that no cache holds, too"
    )
    parser.add_argument(
        "--instructions", action="store_true", help="count a token's instructions with valgrind"
    )
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        default=Path("build/bench.json"),
        help="write all rates there, and the table beside it (default: build/bench.json)",
    )
    arguments = parser.parse_args(argv)
    try:
        prepare(arguments.json)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if arguments.rounds < 1 or not 1 <= arguments.threads <= available_cores():
        parser.error(f"expected at least 1 round, and 1 to {available_cores()} threads")
    if argv is None:
        hold_blas(arguments.threads, "benchmarks")
    load = machine_load()
    levels = math_ops.simd_levels() if arguments.sse else ["scalar"]
    chosen = benchmarks(arguments.only, arguments.threads, arguments.large)
    results = results_of(chosen, measure(chosen, levels, arguments.rounds))
    if "memory" in arguments.only:
        for name, peak in models.memory():
            results[name] = Result("MiB", {levels[-1]: [peak / 2**20]}, lower_is_better=True)
    if arguments.instructions:
        counts, missing = instructions.count_all(levels, min(arguments.rounds, 2))
        results[instructions.NAME] = Result(
            instructions.UNIT, counts, missing=missing, lower_is_better=True
        )
    report = content(results, levels, [arguments.threads], arguments.rounds, load)
    publish(report, table(report), arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
