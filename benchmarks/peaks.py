"""What the machine can do at best: arithmetic on registers, and reading memory."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from benchmarks.measure import Benchmark
from legacy1bit import math_ops

FUSED, PACKED, MEMORY, CACHE = "fused multiply-add", "int8 dot", "read 256 MiB", "read 4 MiB"

_MEMORY_FLOATS, _CACHE_FLOATS = 256 << 18, 4 << 18


def peak_name(kind: str, threads: int) -> str:
    """Return the name of the benchmark of a peak."""
    return f"peak: {kind}, {threads} thread{'s' if threads > 1 else ''}"


def peaks(
    threads: int,
    rounds: int = 1 << 18,
    memory_floats: int = _MEMORY_FLOATS,
    cache_floats: int = _CACHE_FLOATS,
) -> Iterator[Benchmark]:
    """Yield the benchmarks of the peaks, for one thread and for as many as are asked for.

    Parameters
    ----------
    threads : int
    rounds : int
        How long a call lasts.
    memory_floats, cache_floats : int
        The sizes of the arrays that are read.
    """
    memory, cache = np.ones(memory_floats, np.float32), np.ones(cache_floats, np.float32)
    for count in sorted({1, threads}):
        yield Benchmark(
            peak_name(FUSED, count),
            "GFLOP/s",
            1e-9,
            _together(count, lambda _: math_ops.peak_fused(rounds)),
            counted=True,
        )
        yield Benchmark(
            peak_name(PACKED, count),
            "GMAC/s",
            1e-9,
            _together(count, lambda _: math_ops.peak_dot(rounds)),
            counted=True,
        )
        for kind, array, repeats in ((MEMORY, memory, 1), (CACHE, cache, 8)):
            yield Benchmark(
                peak_name(kind, count),
                "GB/s",
                1e-9,
                _together(count, _reading(np.array_split(array, count), repeats)),
                counted=True,
            )


def _reading(parts: list[np.ndarray], repeats: int) -> Callable[[int], int]:
    """Return what reads one of the parts, several times to drown what a call costs."""
    return lambda index: sum(math_ops.peak_read(parts[index]) for _ in range(repeats))


def _together(count: int, work: Callable[[int], int]) -> Callable[[], int]:
    """Return a call that lets threads do the work side by side, and adds up what they did."""
    if count == 1:
        return lambda: work(0)
    # Its threads stay, and sleep in between. The kernels release the GIL.
    pool = ThreadPoolExecutor(count)
    return lambda: sum(pool.map(work, range(count)))
