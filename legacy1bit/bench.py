"""How fast the kernels are: ``make bench SSE=0`` and ``make bench SSE=1``.

SSE=0 measures the scalar instruction set, SSE=1 that and every other the CPU has, products in
bfloat16 where it has them, and NumPy, with as many threads, for the matrix product. All of them
take turns in one run, so that a machine whose speed drifts slows all alike; medians are printed,
with the first and the third quartile.
"""

import argparse
import functools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from legacy1bit import math_ops
from legacy1bit.backward import BackwardPass
from legacy1bit.dataset import TokenDataset
from legacy1bit.files import atomic_write
from legacy1bit.forward import KeyValueCache
from legacy1bit.hyperparams import ModelConfig
from legacy1bit.model import (
    create_legacy_llm,
    create_legacy_llm_gradients,
    zero_legacy_llm_gradients,
)
from legacy1bit.optimizer import AdamW
from legacy1bit.threads import available_cores

# The products of a training step at 4 blocks of 128, sequences of 64 in batches of 12: name, M, N,
# K and which operand is transposed.
PRODUCTS = (
    ("matmul 768x128x128", 768, 128, 128, False, True),
    ("matmul 768x512x128", 768, 512, 128, False, True),
    ("matmul 768x128x512", 768, 128, 512, False, True),
    ("matmul 512x128x768", 512, 128, 768, True, False),
)
TRAINING = ModelConfig(model_dim=128, num_blocks=4, sequence_length=64)
BATCH = 12
DECODED = 32

_BLAS_THREADS = "OPENBLAS_NUM_THREADS"

# A benchmark: its unit, how much of it one call does, and the call.
Benchmark = tuple[str, float, Callable[[], object]]


def benchmarks(threads: int) -> Iterator[tuple[str, Benchmark]]:
    """Yield the name and the benchmark of everything that is measured.

    Parameters
    ----------
    threads : int
        How many threads training and the matrix product may use.
    """
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32)

    for name, m, n, k, transpose_a, transpose_b in PRODUCTS:
        a = normal(k, m) if transpose_a else normal(m, k)
        b = normal(n, k) if transpose_b else normal(k, n)
        out = np.empty((m, n), np.float32)

        product = functools.partial(
            math_ops.matmul,
            a,
            b,
            out,
            transpose_a=transpose_a,
            transpose_b=transpose_b,
            threads=threads,
        )
        yield name, ("GFLOP/s", 2e-9 * m * n * k, product)

    codes, vector = rng.integers(-1, 2, (512, 512), np.int8), normal(512)
    yield (
        "ternary 512x512",
        (
            "GMAC/s",
            1e-9 * codes.size,
            lambda: math_ops.ternary_matrix_vector_mul(codes, vector),
        ),
    )

    model = create_legacy_llm(TRAINING, 0)
    gradients = create_legacy_llm_gradients(TRAINING)
    passes = BackwardPass(model, BATCH, TRAINING.sequence_length, threads)
    optimizer = AdamW(model)
    data = TokenDataset(
        rng.integers(0, 256, 100_000, np.int32), TRAINING.sequence_length, TRAINING.pad_token
    )

    def train() -> None:
        zero_legacy_llm_gradients(gradients)
        passes.run(*data.batch(optimizer.steps, BATCH, 0), gradients)
        optimizer.step(gradients, 1e-4, 1.0, threads)

    yield "training", ("tokens/s", float(BATCH * TRAINING.sequence_length), train)

    cache = KeyValueCache(model)

    def decode() -> None:
        cache.clear()
        for token in range(DECODED):
            cache.extend(model, [token])

    yield "decoding", ("tokens/s", float(DECODED), decode)


def numpy_products() -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield NumPy's share of the matrix products, by the same names."""
    rng = np.random.default_rng(0)
    for name, m, n, k, transpose_a, transpose_b in PRODUCTS:
        a = rng.standard_normal((k, m) if transpose_a else (m, k), np.float32)
        b = rng.standard_normal((n, k) if transpose_b else (k, n), np.float32)
        left, right = (a.T if transpose_a else a), (b.T if transpose_b else b)
        out = np.empty((m, n), np.float32)
        yield name, functools.partial(np.matmul, left, right, out=out)


def measure(levels: list[str], rounds: int, threads: int) -> dict[str, dict[str, list[float]]]:
    """Run every benchmark in every instruction set, in turns.

    Returns
    -------
    dict
        By benchmark and instruction set (or "bf16" or "numpy") the rates of all rounds.
    """
    table = dict(benchmarks(threads))
    peers = dict(numpy_products()) if len(levels) > 1 else {}
    rates: dict[str, dict[str, list[float]]] = {name: {} for name in table}
    runs = [(name, level, table[name][2]) for name in table for level in levels]
    if len(levels) > 1 and "bf16" in math_ops.product_precisions():
        runs += [(name, "bf16", table[name][2]) for name in (*peers, "training")]
    runs += [(name, "numpy", call) for name, call in peers.items()]
    for turn in range(rounds + 1):
        # A BLAS keeps its threads spinning for a while after a product. They would take the cores
        # from whoever comes next: so it comes last, and they get time to fall asleep.
        time.sleep(0.2)
        for name, level, call in runs:
            if level in levels:
                math_ops.set_simd_level(level)
            with math_ops.product_precision("bf16" if level == "bf16" else "float32"):
                rate = table[name][1] / _seconds(call)
            if turn:  # the first turn warms up
                rates[name].setdefault(level, []).append(rate)
    return rates


def _seconds(run: Callable[[], object]) -> float:
    """Return the time of one call, from as many calls as take 20 ms."""
    calls, begin = 0, time.perf_counter()
    while True:
        run()
        calls += 1
        passed = time.perf_counter() - begin
        if passed > 0.02:
            return passed / calls


def report(rates: dict[str, dict[str, list[float]]], units: dict[str, str]) -> None:
    """Print a table: medians, spread, and the ratio to the scalar instruction set."""
    print(f"{'':<20} {'':<8} {'median':>10} {'quartiles':>21} {'':<9} {'x scalar':>8}")
    for name, by_level in rates.items():
        scalar = float(np.median(by_level["scalar"]))
        for level, values in by_level.items():
            low, median, high = np.percentile(values, [25, 50, 75])
            print(
                f"{name:<20} {level:<8} {median:>10,.1f} {low:>10,.1f}-{high:<10,.1f} "
                f"{units[name]:<9} {median / scalar:>7.2f}x"
            )


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m legacy1bit.bench", description=__doc__)
    parser.add_argument("--sse", type=int, choices=(0, 1), default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all rates there")
    arguments = parser.parse_args()
    if arguments.rounds < 1 or not 1 <= arguments.threads <= available_cores():
        parser.error(f"expected at least 1 round, and 1 to {available_cores()} threads")
    if os.environ.get(_BLAS_THREADS) != str(arguments.threads):
        # NumPy reads this once, when it is imported: start again, so that it has no more threads.
        os.environ[_BLAS_THREADS] = str(arguments.threads)
        os.execv(sys.executable, [sys.executable, "-m", "legacy1bit.bench", *sys.argv[1:]])
    levels = math_ops.simd_levels() if arguments.sse else ["scalar"]
    before = math_ops.simd_level()
    rates = measure(levels, arguments.rounds, arguments.threads)
    math_ops.set_simd_level(before)
    units = {name: unit for name, (unit, _, _) in benchmarks(arguments.threads)}
    print(f"{arguments.rounds} rounds, {arguments.threads} thread(s); this CPU's best: {before}")
    report(rates, units)
    if arguments.json:
        atomic_write(arguments.json, json.dumps(rates, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
