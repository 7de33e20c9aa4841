"""The kernels: matrix products in float and of packed codes, and what is between them."""

import functools
from collections.abc import Callable, Iterator

import numpy as np

from benchmarks.measure import Benchmark
from benchmarks.peaks import FUSED, PACKED, peak_name
from legacy1bit import math_ops
from legacy1bit.forward import forward_multi_head_attention_batch
from legacy1bit.hyperparams import ModelConfig
from legacy1bit.model import create_legacy_llm
from legacy1bit.packed import PackedMatrix

# The products of a training step at 4 blocks of 128, sequences of 64 in batches of 12: name, M, N,
# K and which operand is transposed.
PRODUCTS = (
    ("matmul 768x128x128", 768, 128, 128, False, True),
    ("matmul 768x512x128", 768, 512, 128, False, True),
    ("matmul 768x128x512", 768, 128, 512, False, True),
    ("matmul 512x128x768", 512, 128, 768, True, False),
)
FORMS = ("2bit", "trits")


def float_products(threads: int) -> Iterator[Benchmark]:
    """Yield the matrix products of a training step."""
    rng = np.random.default_rng(0)
    for name, m, n, k, transpose_a, transpose_b in PRODUCTS:
        a = rng.standard_normal((k, m) if transpose_a else (m, k), np.float32)
        b = rng.standard_normal((n, k) if transpose_b else (k, n), np.float32)
        out = np.empty((m, n), np.float32)
        ours = functools.partial(
            math_ops.matmul,
            a,
            b,
            out,
            transpose_a=transpose_a,
            transpose_b=transpose_b,
            threads=threads,
        )
        left, right = (a.T if transpose_a else a), (b.T if transpose_b else b)
        yield Benchmark(
            name,
            "GFLOP/s",
            2e-9 * m * n * k,
            ours,
            precisions=("bf16",),
            others={"numpy": functools.partial(np.matmul, left, right, out=out)},
            share_of=peak_name(FUSED, threads),
        )


def packed_products(size: int = 2048, rows: int = 128) -> Iterator[Benchmark]:
    """Yield packed ternary matrices times int8 activations, on one thread."""
    rng = np.random.default_rng(0)
    codes = rng.integers(-1, 2, (size, size), np.int8)
    for form in FORMS:
        matrix = PackedMatrix(codes, form=form)
        for count in (1, rows):
            x = rng.standard_normal((count, size), np.float32)
            yield Benchmark(
                f"{form} {size}x{size} x {count}",
                "GMAC/s",
                1e-9 * codes.size * count,
                functools.partial(matrix.multiply, x),
                share_of=peak_name(PACKED, 1),
            )


def others(
    size: int = 4096, config: ModelConfig | None = None, batch: int = 12
) -> Iterator[Benchmark]:
    """Yield what takes time between the products, on one thread."""
    rng = np.random.default_rng(0)
    gamma, beta = np.ones(size, np.float32), np.zeros(size, np.float32)
    in_place: dict[str, Callable[[np.ndarray], None]] = {
        "softmax": math_ops.softmax,
        "layer norm": functools.partial(math_ops.layer_norm, gamma=gamma, beta=beta),
        "round to int8": math_ops.quantize_activations,
    }
    for name, kernel in in_place.items():
        # What comes out goes in again: each of these settles within a few calls.
        x = rng.standard_normal(size, np.float32)
        yield Benchmark(f"{name} {size}", "G/s", 1e-9 * size, functools.partial(kernel, x))
    config = config or ModelConfig(
        model_dim=128, num_blocks=1, num_heads=4, ffn_multiplier=4, sequence_length=64
    )
    time, dim = config.sequence_length, config.model_dim
    attention = create_legacy_llm(config, 0).blocks[0].attention
    rows = rng.standard_normal((batch, time, dim), np.float32)
    yield Benchmark(
        f"attention layer {batch}x{time}x{dim}",
        "tokens/s",
        float(batch * time),
        functools.partial(forward_multi_head_attention_batch, attention, rows),
    )
