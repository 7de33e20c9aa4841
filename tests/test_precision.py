"""Products in bfloat16, on the matrix unit and in vectors, against float64 and exact integers."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from helpers import oracle
from helpers.arrays import assert_close, assert_same_bits, dot_bound
from helpers.models import make_config, random_model
from helpers.paths import ROOT
from legacy1bit import math_ops
from legacy1bit.backward import BackwardPass, backward_output_layer_batch
from legacy1bit.forward import forward_output_layer_batch
from legacy1bit.inference import Decoder
from legacy1bit.math_ops import fastest_precision, product_precision, product_precisions
from legacy1bit.model import LegacyLLMGradients, TernaryMatrix
from legacy1bit.optimizer import SGD, AdamW
from legacy1bit.packed import PackedModel
from legacy1bit.schemes import SCHEMES

every_bf16_tier = pytest.mark.usefixtures("bf16_tier")
# The matrix unit itself; builds that look for mistakes have one in C.
try:
    HAS_UNIT = "amx_bf16" in Path("/proc/cpuinfo").read_text()
except OSError:
    HAS_UNIT = False

# Around the sides of a tile (16, 32) and the 8 rows of a vector product, and past what is packed at
# a time (256 or 512 columns, 1024 deep).
SIZES = (
    (1, 1, 1),
    (16, 16, 32),
    (17, 33, 31),
    (9, 17, 3),
    (25, 290, 7),
    (15, 48, 65),
    (64, 64, 96),
    (40, 530, 33),
    (33, 20, 2070),
)


PROGRAM = """
#include "cpu.h"
#include "simd.h"
static __attribute__((noinline)) void fill_the_stack(void)
{
    volatile unsigned char room[4096];
    for (int i = 0; i < 4096; i++)
        room[i] = 0xa5;
}
static __attribute__((noinline)) void begin(void) { amx_begin(); }
int main(void)
{
    unsigned char layout[64], expected[64] = {1};
    for (int i = 0; i < 8; i++) {
        expected[16 + 2 * i] = 64;
        expected[48 + i] = AMX_SIDE;
    }
    if (cpu_widest_tier() != CPU_AMX)
        return 2;
    fill_the_stack();
    begin();
    _tile_storeconfig(layout);
    return memcmp(layout, expected, sizeof layout) != 0;
}
"""
UNIT = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mavx512vnni -mavx512bf16 -mamx-tile"
UNIT += " -mamx-bf16 -mamx-int8 -std=c99 -D_GNU_SOURCE -DLEGACY1BIT_TIER_AMX"


@pytest.mark.skipif(not HAS_UNIT, reason="this CPU has no matrix unit")
@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
@pytest.mark.parametrize("level", ["-O1", "-O3"])
def test_the_unit_gets_its_whole_layout_however_much_is_optimised(level, tmp_path):
    headers = ROOT / "include"
    if not headers.exists():
        pytest.skip("the headers are not here")
    (tmp_path / "begin.c").write_text(PROGRAM)
    command = ["cc", level, *UNIT.split(), f"-I{headers}", "begin.c", "-o", "begin", "-lm"]
    subprocess.run(command, cwd=tmp_path, check=True)
    assert subprocess.run([tmp_path / "begin"]).returncode == 0


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@every_bf16_tier
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("transpose_b", [False, True])
@pytest.mark.parametrize("transpose_a", [False, True])
@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
def test_matmul_multiplies_the_rounded_factors(size, transpose_a, transpose_b, accumulate):
    m, n, k = size
    a = normal(k, m) if transpose_a else normal(m, k)
    b = normal(n, k, seed=1) if transpose_b else normal(k, n, seed=1)
    into = normal(m, n, seed=2) if accumulate else None
    rounded = [oracle.bfloat16(a), oracle.bfloat16(b)]
    flags = {"transpose_a": transpose_a, "transpose_b": transpose_b}
    expected = oracle.matmul(*rounded, into=into, **flags)
    room = oracle.matmul(
        *map(np.abs, rounded), into=None if into is None else np.abs(into), **flags
    )
    with product_precision("bf16"):
        actual = math_ops.matmul(a, b, into, accumulate=accumulate, **flags)
    assert_close(actual, expected, rtol=0, atol=dot_bound(room, k + 1))


@every_bf16_tier
@pytest.mark.parametrize("size", [(20, 50, 70), (5, 300, 1100)])
def test_denormal_factors_are_zeros(size):
    m, n, k = size
    a, b = np.full((m, k), 2.0**-127, np.float32), np.full((k, n), 2.0**127, np.float32)
    a[0, 0], b[1, 1] = 2.0**-126, 2.0**-140
    with product_precision("bf16"):
        actual = math_ops.matmul(a, b)
    expected = np.zeros((m, n), np.float32)
    expected[0] = 2.0
    assert_same_bits(actual, expected)


@every_bf16_tier
def test_matmul_passes_on_what_is_not_finite():
    a, b = normal(20, 40), normal(40, 50, seed=1)
    a[3, 7], a[5, 0], b[8, 49] = np.nan, np.inf, -np.inf
    with product_precision("bf16"):
        actual = math_ops.matmul(a, b)
    expected = np.ones((20, 50), bool)
    expected[[3, 5]] = False
    expected[:, 49] = False
    np.testing.assert_array_equal(np.isfinite(actual), expected)


def scaled(scheme, rows, cols, group, seed=0):
    """A matrix of a scheme's codes whose scales are powers of two."""
    rng = np.random.default_rng(seed)
    levels = SCHEMES[scheme].levels
    values = rng.choice(np.array(levels, np.int8), (rows, cols))
    if group is None:
        return TernaryMatrix(values, 0.25, levels=levels)
    shape = (rows, -(-cols // (group or cols)))
    scales = rng.choice(np.array([0.25, 0.5, 2.0], np.float32), shape)
    return TernaryMatrix(values, scales, group, levels)


@every_bf16_tier
@pytest.mark.parametrize("rows", [3, 16, 37])
@pytest.mark.parametrize("group", [None, 0, 16, 128])
@pytest.mark.parametrize("scheme", ["ternary", "binary", "2bit"])
@pytest.mark.parametrize("shape", [(1, 1), (17, 33), (40, 300), (530, 70)])
def test_products_of_codes_and_whole_numbers_are_exact(shape, scheme, group, rows):
    """Nothing is rounded: forward, back to the input, and to the weights."""
    matrix, rng = scaled(scheme, *shape, group), np.random.default_rng(1)
    x = rng.integers(-9, 10, (rows, shape[1])).astype(np.float32)
    bias = rng.integers(-9, 10, shape[0]).astype(np.float32)
    d_out = rng.integers(-9, 10, (rows, shape[0])).astype(np.float32)
    gradients = {"weight": np.ones(shape, np.float32), "bias": np.zeros(shape[0], np.float32)}
    with product_precision("bf16"):
        out = forward_output_layer_batch(matrix, bias, x)
        d_x = backward_output_layer_batch(matrix, d_out, x, gradients)
    dense = matrix.dense()
    assert_same_bits(out + 0, x @ dense.T + bias)
    assert_same_bits(d_x + 0, d_out @ dense + 0)
    assert_same_bits(gradients["weight"], d_out.T @ x + 1)


@every_bf16_tier
def test_one_scale_for_all_is_not_rounded():
    matrix = scaled("ternary", 30, 60, None)
    x = np.random.default_rng(2).integers(-9, 10, (20, 60)).astype(np.float32)
    exact = TernaryMatrix(matrix.values, float(np.float16(0.3)))
    with product_precision("bf16"):
        out = forward_output_layer_batch(exact, np.zeros(30, np.float32), x)
    sums = x.astype(np.float64) @ matrix.values.T
    assert_same_bits(out + 0, (sums * float(np.float16(0.3))).astype(np.float32) + 0)


@every_bf16_tier
@pytest.mark.parametrize("changes", [{}, {"scale": "row"}, {"scheme": "2bit"}, {"scheme": "float"}])
def test_gradients_are_near_those_of_float32(changes):
    config = make_config(vocab_size=60, model_dim=48, num_heads=4, sequence_length=40, **changes)
    model, rng = random_model(config), np.random.default_rng(3)
    tokens, targets = rng.integers(0, 60, (2, 6, 40))
    found = {}
    for precision in ("float32", "bf16"):
        gradients = [LegacyLLMGradients(config) for _ in range(2)]
        with product_precision(precision):
            losses = [BackwardPass(model, 6, 40, 2).run(tokens, targets, one) for one in gradients]
        assert losses[0] == losses[1]
        assert_same_bits(gradients[0].flat, gradients[1].flat)
        found[precision] = losses[0][0], gradients[0].flat.astype(np.float64)
    (loss, gradient), (other, near) = found.values()
    assert other != loss
    # A factor's rounding is 2^-9 at most; what is measured is half of that and 2 per cent.
    assert other == pytest.approx(loss, rel=2.0**-9)
    assert np.linalg.norm(near - gradient) < 0.06 * np.linalg.norm(gradient)


@every_bf16_tier
def test_precision_lasts_as_long_as_its_context():
    level, a, b = math_ops.simd_level(), normal(30, 30), normal(30, 30, seed=1)
    exact = math_ops.matmul(a, b)
    with product_precision("bf16"):
        rough = math_ops.matmul(a, b)
        with product_precision("float32"):
            assert_same_bits(math_ops.matmul(a, b), exact)
        assert_same_bits(math_ops.matmul(a, b), rough)
    assert math_ops.simd_level() == level
    with pytest.raises(KeyError), product_precision("bf16"):
        raise KeyError
    assert_same_bits(math_ops.matmul(a, b), exact)
    assert (rough != exact).any()


def test_precision_rejects_other_names():
    with (
        pytest.raises(ValueError, match=r"unknown precision 'fp8'.*float32, int8 or bf16"),
        product_precision("fp8"),
    ):
        pass


def test_instruction_sets_have_their_precisions(tier):
    if tier in ("avx512bf16", "amx"):
        assert product_precisions() == ["float32", "int8", "bf16"]
        assert fastest_precision() == ("bf16" if tier == "amx" else "int8")
        assert fastest_precision(codes=False) == ("bf16" if tier == "amx" else "float32")
        return
    assert product_precisions() == ["float32", "int8"]
    assert fastest_precision() == ("float32" if tier in ("scalar", "sse") else "int8")
    assert fastest_precision(codes=False) == "float32"
    with (
        pytest.raises(ValueError, match=r"bf16, expected float32 or int8: .*amx"),
        product_precision("bf16"),
    ):
        pass
    with product_precision("float32"):
        assert math_ops.simd_level() == tier


def written_and_changed(heads, span):
    """Yield what a model writes, and what optimizers make of one."""
    config = make_config(
        vocab_size=60, model_dim=18 * heads, num_heads=heads, num_blocks=1, sequence_length=90,
        attention_window=span,
    )  # fmt: skip
    rng = np.random.default_rng(heads)
    decoder = Decoder(PackedModel(random_model(config)), 1)
    for count in (1, 2, 5, 6, 7, 1, 3, 7, 7, 7, 7, 7, 7, 7, 7):
        yield np.array(decoder.prefill(rng.integers(0, 60, count)))
    for kind in (AdamW, SGD):
        model, gradients = random_model(config), LegacyLLMGradients(config)
        gradients.flat[...] = rng.standard_normal(gradients.flat.size)
        kind(model).step(gradients, 0.01, 1.0)
        yield from model.latent.values()


@every_bf16_tier
@pytest.mark.parametrize(("heads", "span"), [(1, 0), (2, 0), (5, 20)])
def test_a_model_writes_and_its_optimizers_move_it_with_the_same_bits(heads, span):
    expected = list(written_and_changed(heads, span))
    with product_precision("bf16"):
        for one, other in zip(written_and_changed(heads, span), expected, strict=True):
            assert_same_bits(one, other)
