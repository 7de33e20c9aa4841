"""The vector and matrix operations, in every instruction set, against the oracle.

Tolerances are error bounds of float32 arithmetic that hold for any order of summation, with or
without fused multiply-add. An operation of a single rounding must be correctly rounded: float64
holds the exact sum or product of two float32 numbers closely enough that rounding its result to
float32 is the correct rounding (Figueroa 1995), which is the value demanded.
"""

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from helpers import oracle
from helpers.arrays import (
    EXP_ATOL,
    EXP_RTOL,
    UNIT_ROUNDOFF,
    assert_close,
    assert_same_bits,
    dot_bound,
    gamma,
    softmax_rtol,
)
from helpers.cases import together
from helpers.models import (
    LIMIT,
    TAKE_ALL,
    exact_dense,
    in_every_tier,
    random_matrix,
    run_child,
    scaled_matrices,
)
from legacy1bit import cpu, math_ops
from legacy1bit.model import TernaryMatrix

SIZES = (1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 97)
SHAPES = ((1, 1), (1, 97), (97, 1), (3, 5), (8, 16), (7, 9), (15, 17), (33, 31), (64, 65))


sizes = together("n", SIZES)
shapes = together("shape", SHAPES)
every_tier = pytest.mark.usefixtures("tier")


# --- Inputs and calls -----------------------------------------------------------------------------

# An odd number of elements of frame: no operand is aligned to a vector.
FRAME = 35


def framed(values):
    """A copy of ``values`` inside a larger buffer of NaN (of 1 for integers).

    Reading past either end spoils the result, and writing past it shows in `assert_frame_intact`.
    """
    buffer = np.full(values.size + 2 * FRAME, frame_value(values.dtype), dtype=values.dtype)
    view = buffer[FRAME : FRAME + values.size].reshape(values.shape)
    view[...] = values
    return view


def frame_value(dtype):
    return np.nan if np.issubdtype(dtype, np.floating) else 1


def assert_frame_intact(view):
    frame = np.concatenate([view.base[:FRAME], view.base[-FRAME:]])
    assert_same_bits(frame, np.full(2 * FRAME, frame_value(view.dtype), view.dtype), "the frame")


def call(function, *args, writes=(), **kwargs):
    """Call with unaligned, framed arrays, read-only but for the positions in ``writes``.

    Checks that the frames and the arrays that are not written are as they were. Returns what the
    function gave and the written arrays.
    """
    views = [framed(arg) if isinstance(arg, np.ndarray) else arg for arg in args]
    read = [i for i, arg in enumerate(args) if isinstance(arg, np.ndarray) and i not in writes]
    for i in read:
        views[i].flags.writeable = False
    result = function(*views, **kwargs)
    for i in read:
        assert_same_bits(views[i], args[i], f"argument {i}")
    for i in (*read, *writes):
        assert_frame_intact(views[i])
    return result, *(views[i] for i in writes)


def in_place(function, *args, **kwargs):
    """`call` for a function that writes its first argument: what it wrote."""
    return call(function, *args, writes=(0,), **kwargs)[1]


def assert_rounded(actual, expected):
    """``actual`` is the float64 array ``expected`` correctly rounded to float32."""
    assert_close(actual, expected.astype(np.float32), rtol=0, atol=0, dtype=np.float32)


def normal(*shape, seed=0, mean=0.0, std=1.0):
    return np.random.default_rng(seed).normal(mean, std, shape).astype(np.float32)


def ternary(*shape, seed=0):
    return np.random.default_rng(seed).integers(-1, 2, size=shape, dtype=np.int8)


def integers(*shape, seed=0, limit=100):
    values = np.random.default_rng(seed).integers(-limit, limit + 1, size=shape)
    return values.astype(np.float32)


def large_and_one(n):
    """1e8 and -1e8 by turns with ones between: the large ones cancel, the ones get lost."""
    return np.resize(np.array([1e8, 1, 1, -1e8, 1], dtype=np.float32), n)


VECTORS = {
    "normal": normal,
    "wide": lambda n: (normal(n) * 10.0 ** np.resize([-8, 0, 8], n)).astype(np.float32),
    "large_and_one": large_and_one,
    "ones": lambda n: np.ones(n, dtype=np.float32),
    "zeros": lambda n: np.zeros(n, dtype=np.float32),
}
kinds = together("kind", VECTORS)


# --- Instruction sets -----------------------------------------------------------------------------


def test_simd_levels_are_distinct_and_hold_the_one_in_use():
    levels = math_ops.simd_levels()
    assert levels
    assert all(type(level) is str for level in levels)
    assert len(set(levels)) == len(levels)
    assert math_ops.simd_level() in levels


@pytest.mark.skipif("LEGACY1BIT_TEST_TIERS" not in os.environ, reason="no sets are chosen")
def test_the_widest_level_is_the_widest_one_chosen():
    assert math_ops.simd_level() == os.environ["LEGACY1BIT_TEST_TIERS"].split(",")[-1]


def test_set_simd_level_is_reported_by_simd_level(tier):
    assert math_ops.simd_level() == tier


@pytest.mark.parametrize("name", ["no-such-level", "AVX9000", "scalar "])
def test_set_simd_level_rejects_unknown_names(name):
    before = math_ops.simd_level()
    with pytest.raises(ValueError, match=re.escape(name)):
        math_ops.set_simd_level(name)
    assert math_ops.simd_level() == before


@pytest.mark.parametrize("name", [None, 2, b"scalar"])
def test_set_simd_level_rejects_other_types(name):
    with pytest.raises(TypeError):
        math_ops.set_simd_level(name)


IMPORT = """
try:
    from legacy1bit import math_ops
except ImportError as error:
    print("ImportError:", error)
else:
    print(math_ops.simd_level())
"""


def import_with_simd_level(name):
    done = subprocess.run(
        [sys.executable, "-c", IMPORT],
        env={**os.environ, "LEGACY1BIT_SIMD": name},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


@pytest.mark.parametrize("level", math_ops.simd_levels())
def test_import_takes_the_level_from_the_environment(level):
    assert import_with_simd_level(level) == level


def test_import_takes_the_widest_level_by_itself():
    assert import_with_simd_level("") == math_ops.simd_levels()[-1]


def test_import_with_an_unknown_level_is_one_clear_line():
    message = import_with_simd_level("no-such-level")
    assert message.startswith("ImportError:")
    assert "no-such-level" in message
    assert "\n" not in message


# --- Ternary products -----------------------------------------------------------------------------

TERNARY = {
    "ternary_matrix_vector_mul": (1, oracle.ternary_matrix_vector_mul),
    "matrix_transpose_vector_mul": (0, oracle.matrix_transpose_vector_mul),
}
products = pytest.mark.parametrize("name", TERNARY)


def product_of(name, matrix, vector, scale=1.0, **kwargs):
    """The function, its expected value and its error bound (the scale and its own rounding)."""
    axis, reference = TERNARY[name]
    absolute = abs(scale) * reference(np.abs(matrix), np.abs(vector))
    bound = dot_bound(absolute, matrix.shape[axis] + 2)
    return getattr(math_ops, name), reference(matrix, vector, scale), bound


@every_tier
@shapes
@products
def test_ternary_products_are_exact_for_integers(name, shape):
    matrix = ternary(*shape)
    vector = integers(shape[TERNARY[name][0]], seed=1, limit=10_000)
    function, expected, _ = product_of(name, matrix, vector, 0.25)
    # Sums stay below 2^24 and a power of two scales them exactly.
    result, output = call(
        function, matrix, vector, np.full(expected.shape, np.nan, np.float32), 0.25, writes=(2,)
    )
    assert result is output
    assert_rounded(output, expected)


@every_tier
@sizes
@products
def test_ternary_products_are_exact_for_integers_at_every_size(name, n):
    for shape in ((n, 4), (4, n)):
        vector = integers(shape[TERNARY[name][0]], seed=1)
        function, expected, _ = product_of(name, ternary(*shape), vector)
        assert_rounded(call(function, ternary(*shape), vector)[0], expected)


@every_tier
@kinds
@shapes
@products
def test_ternary_products_are_within_the_bound(name, shape, kind):
    vector = VECTORS[kind](shape[TERNARY[name][0]])
    for matrix in (ternary(*shape), np.ones(shape, np.int8), -np.ones(shape, np.int8)):
        function, expected, bound = product_of(name, matrix, vector, 0.3)
        (result,) = call(function, matrix, vector, scale=0.3)
        assert_close(result, expected, rtol=0, atol=bound, dtype=np.float32)


@every_tier
@products
def test_ternary_products_of_a_zero_matrix_are_zero(name):
    function = getattr(math_ops, name)
    (result,) = call(function, np.zeros((17, 17), np.int8), normal(17))
    assert_rounded(result, np.zeros(17))


@every_tier
@products
def test_ternary_products_accept_a_ternary_matrix(name):
    matrix, vector = ternary(9, 9), integers(9, seed=1)
    function, expected, _ = product_of(name, matrix, vector, 0.5)
    one = np.array([[0.5]], np.float32)
    for given in (TernaryMatrix(matrix, 0.5), SimpleNamespace(values=matrix, scales=one, group=9)):
        assert_rounded(function(given, vector), expected)
        # A scale that is told goes before the matrix's own.
        assert_rounded(function(given, vector, scale=0.25), expected / 2)


@every_tier
@scaled_matrices
@products
def test_ternary_products_of_scaled_codes_are_exact(name, scheme, shape, group):
    matrix = random_matrix(scheme, shape, group)
    axis, reference = TERNARY[name]
    # Sums of at most 600 3 * 8 * 9 in eighths: float32 holds them.
    vector = integers(shape[axis], seed=1, limit=9)
    output = np.full(shape[1 - axis], np.nan, np.float32)
    result, output = call(
        lambda *arrays: getattr(math_ops, name)(matrix, *arrays), vector, output, writes=(1,)
    )
    assert result is output
    assert_rounded(output, reference(exact_dense(matrix), vector))
    codes = matrix.values.astype(np.float64)
    whole = getattr(math_ops, name)(matrix, vector, scale=0.5)
    assert_rounded(whole, reference(codes, vector, 0.5))


# --- Element by element ---------------------------------------------------------------------------


@every_tier
@kinds
@sizes
def test_add_vector_inplace_is_correctly_rounded(n, kind):
    x, y = VECTORS[kind](n), normal(n, seed=1)
    assert_rounded(in_place(math_ops.add_vector_inplace, x, y), oracle.add_vector(x, y))


@every_tier
@kinds
@sizes
def test_multiply_vector_inplace_is_correctly_rounded(n, kind):
    x, y = VECTORS[kind](n), normal(n, seed=1)
    assert_rounded(in_place(math_ops.multiply_vector_inplace, x, y), oracle.multiply_vector(x, y))


# Float32 numbers, so that handing them over rounds nothing.
SCALARS = (0.0, 1.0, -1.0, 0.375, -3.0, 12345.0, float(np.float32(0.1)))
scalars = together("scalar", SCALARS)


@every_tier
@scalars
@sizes
def test_add_scalar_mul_vector_inplace_is_within_the_bound(n, scalar):
    # The second y all but cancels x, so that the product's rounding is what is left.
    x = normal(n)
    for y in (normal(n, seed=1), (-x / scalar if scalar else x).astype(np.float32)):
        expected = oracle.add_scalar_mul_vector(x, scalar, y)
        actual = in_place(math_ops.add_scalar_mul_vector_inplace, x, scalar, y)
        product = np.abs(oracle.scalar_mul_vector(y, scalar))
        # The product's rounding, itself rounded once more with the sum.
        bound = gamma(2) * product
        assert_close(actual, expected, rtol=UNIT_ROUNDOFF, atol=bound, dtype=np.float32)


@every_tier
@sizes
def test_add_scalar_mul_vector_inplace_is_exact_for_integers(n):
    x, y = integers(n), integers(n, seed=1)
    actual = in_place(math_ops.add_scalar_mul_vector_inplace, x, -3.0, y)
    assert_rounded(actual, oracle.add_scalar_mul_vector(x, -3.0, y))


@every_tier
@scalars
@sizes
def test_scalar_mul_vector_inplace_is_correctly_rounded(n, scalar):
    actual = in_place(math_ops.scalar_mul_vector_inplace, normal(n), scalar)
    assert_rounded(actual, oracle.scalar_mul_vector(normal(n), scalar))


@every_tier
@scalars
@sizes
def test_vector_sub_scalar_inplace_is_correctly_rounded(n, scalar):
    actual = in_place(math_ops.vector_sub_scalar_inplace, normal(n), scalar)
    assert_rounded(actual, oracle.vector_sub_scalar(normal(n), scalar))


@every_tier
@pytest.mark.parametrize("scalar", SCALARS[1:])
@sizes
def test_vector_div_scalar_inplace_is_within_two_roundings(n, scalar):
    # The second is that of a reciprocal.
    actual = in_place(math_ops.vector_div_scalar_inplace, normal(n), scalar)
    expected = oracle.vector_div_scalar(normal(n), scalar)
    assert_close(actual, expected, rtol=gamma(2), atol=0, dtype=np.float32)


@every_tier
@pytest.mark.parametrize("zero", [0.0, -0.0, 0])
def test_vector_div_scalar_inplace_rejects_zero(zero):
    x = normal(5)
    with pytest.raises(ZeroDivisionError):
        math_ops.vector_div_scalar_inplace(x, zero)
    assert_same_bits(x, normal(5))


@every_tier
@pytest.mark.parametrize("power", [0.0, 1.0, 2.0, 3.0, 0.5, -1.0, -0.5, 2.5])
@sizes
def test_vector_pow_scalar_inplace_is_within_two_ulp(n, power):
    # Negative and zero bases too; a fractional power of a negative base is NaN.
    for x in (np.abs(normal(n)), normal(n), np.zeros(n, np.float32)):
        actual = in_place(math_ops.vector_pow_scalar_inplace, x, power)
        expected = oracle.vector_pow_scalar(x, power)
        assert_close(actual, expected, rtol=4 * UNIT_ROUNDOFF, atol=0, dtype=np.float32)


@every_tier
@kinds
@sizes
def test_relu_is_exact(n, kind):
    x = VECTORS[kind](n)
    assert_rounded(in_place(math_ops.relu, x), oracle.relu(x))


@every_tier
@kinds
@sizes
def test_relu2_is_correctly_rounded(n, kind):
    x = VECTORS[kind](n)
    assert_rounded(in_place(math_ops.relu2, x), oracle.relu2(x))


@every_tier
@pytest.mark.parametrize("name", ["relu", "relu2"])
def test_relu_of_special_values(name):
    x = np.array([-np.inf, -1e30, -0.0, 0.0, 1e-20, np.inf], dtype=np.float32)
    assert_rounded(in_place(getattr(math_ops, name), x), getattr(oracle, name)(x))


# --- Sums -----------------------------------------------------------------------------------------


@every_tier
@kinds
@sizes
def test_vector_sum_is_within_the_bound(n, kind):
    x = VECTORS[kind](n)
    (result,) = call(math_ops.vector_sum, x)
    assert isinstance(result, float)
    bound = dot_bound(np.abs(x, dtype=np.float64).sum(), n)
    assert_close(result, oracle.vector_sum(x), rtol=0, atol=bound)


@every_tier
@sizes
def test_vector_sum_is_exact_for_integers(n):
    x = integers(n, limit=10_000)
    assert call(math_ops.vector_sum, x) == (oracle.vector_sum(x),)


@every_tier
@kinds
@sizes
def test_dot_product_is_within_the_bound(n, kind):
    x = VECTORS[kind](n)
    for y in (normal(n, seed=1), np.ones(n, np.float32), x):
        (result,) = call(math_ops.dot_product, x, y)
        assert isinstance(result, float)
        bound = dot_bound(np.abs(x.astype(np.float64) * y).sum(), n)
        assert_close(result, oracle.dot_product(x, y), rtol=0, atol=bound)


@every_tier
@sizes
def test_dot_product_is_exact_for_integers(n):
    x, y = integers(n), integers(n, seed=1)
    assert call(math_ops.dot_product, x, y) == (oracle.dot_product(x, y),)


@every_tier
@shapes
def test_outer_product_add_inplace_is_within_the_bound(shape):
    matrix, x, y = normal(*shape), normal(shape[0], seed=1), normal(shape[1], seed=2)
    for start in (matrix, np.zeros_like(matrix), -np.outer(x, y)):
        actual = in_place(math_ops.outer_product_add_inplace, start, x, y)
        expected = oracle.outer_product_add(start, x, y)
        bound = gamma(2) * np.abs(np.outer(x.astype(np.float64), y))
        assert_close(actual, expected, rtol=UNIT_ROUNDOFF, atol=bound, dtype=np.float32)


@every_tier
@sizes
def test_outer_product_add_inplace_is_exact_for_integers(n):
    for rows, columns in ((n, 3), (3, n)):
        args = integers(rows, columns), integers(rows, seed=1), integers(columns, seed=2)
        actual = in_place(math_ops.outer_product_add_inplace, *args)
        assert_rounded(actual, oracle.outer_product_add(*args))


# --- Exponential and softmax ----------------------------------------------------------------------


@every_tier
def test_exp_inplace_is_within_two_ulp():
    # Down to where the result rounds to 0, and up to just below the largest float32.
    x = np.linspace(-104.0, 88.0, 19_997).astype(np.float32)
    actual = in_place(math_ops.exp_inplace, x)
    assert_close(actual, oracle.exp(x), rtol=EXP_RTOL, atol=EXP_ATOL, dtype=np.float32)


@every_tier
@sizes
def test_exp_inplace_is_within_two_ulp_at_every_size(n):
    x = normal(n, std=10.0)
    actual = in_place(math_ops.exp_inplace, x)
    assert_close(actual, oracle.exp(x), rtol=EXP_RTOL, atol=EXP_ATOL, dtype=np.float32)


@every_tier
def test_exp_inplace_of_special_values():
    x = np.array([0.0, -0.0, -np.inf, -1e4, -3e38, 89.0, 1e4, np.inf, np.nan], dtype=np.float32)
    expected = np.array([1.0, 1.0, 0.0, 0.0, 0.0, np.inf, np.inf, np.inf, np.nan])
    assert_rounded(in_place(math_ops.exp_inplace, x), expected)


@every_tier
def test_exp_inplace_keeps_what_is_not_a_number_where_it_is():
    x = normal(37)
    expected = in_place(math_ops.exp_inplace, x)
    for place in range(x.size):
        damaged = x.copy()
        damaged[place] = np.nan
        actual = in_place(math_ops.exp_inplace, damaged)
        assert np.isnan(actual[place])
        assert_same_bits(np.delete(actual, place), np.delete(expected, place))


def assert_softmax(actual, x):
    expected = oracle.softmax(x)
    assert_close(actual, expected, rtol=softmax_rtol(x), atol=2 * EXP_ATOL, dtype=np.float32)


@every_tier
@pytest.mark.parametrize("std", [1.0, 30.0])
@sizes
def test_softmax_is_within_the_bound(n, std):
    x = normal(n, std=std)
    assert_softmax(in_place(math_ops.softmax, x), x)


@every_tier
@shapes
def test_softmax_works_by_rows(shape):
    # Rows far apart: one maximum for all would give rows of 0 / 0.
    x = normal(*shape) + np.linspace(-1e3, 1e3, shape[0], dtype=np.float32)[:, None]
    assert_softmax(in_place(math_ops.softmax, x), x)


@every_tier
@pytest.mark.parametrize("value", [0.0, 1e4, -1e4, 3e38, -3e38])
@sizes
def test_softmax_of_equal_values_is_uniform(n, value):
    x = np.full(n, value, dtype=np.float32)
    assert_softmax(in_place(math_ops.softmax, x), x)


@every_tier
@sizes
def test_softmax_of_large_values_is_one_and_zeros(n):
    x = np.full(n, -1e4, dtype=np.float32)
    x[n // 2] = 1e4
    assert_rounded(in_place(math_ops.softmax, x), np.eye(n)[n // 2])


@every_tier
@sizes
def test_softmax_gives_exact_zeros_where_masked(n):
    x = normal(n)
    x[np.arange(n) % 3 != 0] = -np.inf
    actual = in_place(math_ops.softmax, x)
    assert_softmax(actual, x)
    assert not actual[np.isneginf(x)].any()


@every_tier
@sizes
def test_softmax_of_nothing_but_minus_infinity_is_zeros(n):
    x = np.full((3, n), -np.inf, np.float32)
    x[1] = normal(n)
    actual = in_place(math_ops.softmax, x)
    assert not actual[[0, 2]].any()
    assert_softmax(actual[1], x[1])


@every_tier
@sizes
@pytest.mark.parametrize("others", [0.5, -np.inf])
def test_softmax_of_what_is_not_a_number_is_not_a_number(n, others):
    for place in {0, n // 2, n - 1}:
        x = np.full(n, others, np.float32)
        x[place] = np.nan
        assert np.isnan(in_place(math_ops.softmax, x)).all()


# --- Activations in int8 --------------------------------------------------------------------------

FLOAT32 = np.finfo(np.float32)
# Where the largest of a row is smaller, 127 over it is not finite.
SMALLEST_TOP = np.float32(127.0 / float(FLOAT32.max))


def steps_of(x):
    """The steps of rows, and the number of each element, by the kernel's own float32 rounding.

    Multiplying by 127 / max |x| decides ties, and rounds twice; a float64 quotient would not.
    """
    top = np.abs(x).max(axis=-1, keepdims=True).astype(np.float64)
    inverse, step = ((127.0 / top).astype(np.float32), (top / 127.0).astype(np.float32))
    return step, np.rint(inverse * x)


@every_tier
@pytest.mark.parametrize("kind", ["normal", "wide", "large_and_one", "ones"])
@sizes
def test_quantize_activations_is_exact(n, kind):
    x = VECTORS[kind](n)
    step, multiples = steps_of(x)
    assert np.abs(multiples).max() == 127.0
    actual = in_place(math_ops.quantize_activations, x)
    assert_rounded(actual, step.astype(np.float64) * multiples)
    # Half a step at most, but for the roundings on the way to 127 steps.
    bound = oracle.activation_step(x) * (0.5 + 127 * gamma(4))
    assert_close(actual, x, rtol=0, atol=bound)


@every_tier
@shapes
def test_quantize_activations_works_by_rows(shape):
    # Rows far apart: one step for all would leave zeros.
    x = normal(*shape) * (10.0 ** np.linspace(-20, 20, shape[0])).astype(np.float32)[:, None]
    actual = in_place(math_ops.quantize_activations, x)
    for row, expected in zip(actual, x, strict=True):
        assert_same_bits(row, in_place(math_ops.quantize_activations, expected))
    multiples = actual / oracle.activation_step(x)
    assert_close(multiples, steps_of(x)[1], rtol=gamma(3), atol=0)


@every_tier
@pytest.mark.parametrize("scale", [2.0**-60, 0.5, 2.0**60])
@sizes
def test_quantize_activations_takes_the_even_one_of_a_tie(n, scale):
    # A step that is a power of two: every half is a tie, and nothing is rounded on the way.
    x = np.resize(np.arange(-126.5, 127.0), n) * scale
    x[n // 2] = 127.0 * scale
    expected = np.rint(x / scale) * scale
    assert_rounded(in_place(math_ops.quantize_activations, x.astype(np.float32)), expected)
    # What is rounded stays.
    again = in_place(math_ops.quantize_activations, expected.astype(np.float32))
    assert_rounded(again, expected)


@every_tier
@sizes
def test_quantize_activations_leaves_what_has_no_127_steps(n):
    for value in (0.0, -0.0, 1e-45, -1e-40, np.nextafter(SMALLEST_TOP, np.float32(0))):
        x = np.full(n, value, np.float32)
        x[::2] = -x[::2] / 3
        assert_same_bits(in_place(math_ops.quantize_activations, x), x)
    # A row of zeros between others.
    x = np.stack([normal(n), np.zeros(n, np.float32), normal(n, seed=1)])
    actual = in_place(math_ops.quantize_activations, x)
    assert_same_bits(actual[1], x[1])
    assert_same_bits(actual[2], in_place(math_ops.quantize_activations, x[2]))


@every_tier
@pytest.mark.parametrize("top", [1e-36, 1e-30, 1e30, 3e38, -3e38])
def test_quantize_activations_of_extreme_numbers(top):
    for n in SIZES:
        x = (normal(n) / 8).clip(-1, 1).astype(np.float32) * np.float32(top)
        x[n // 2] = top
        expected = oracle.activation_step(x) * steps_of(x)[1]
        actual = in_place(math_ops.quantize_activations, x)
        assert np.isfinite(actual).all()
        # A step below 2^-126 has fewer bits than others: the smallest here 23 of them.
        assert_close(actual, expected, rtol=2.0**-22, atol=0, dtype=np.float32)


@every_tier
def test_quantize_activations_leaves_a_row_that_would_overflow():
    # 127 times the nearest float32 to max / 127 is more than max.
    for n in SIZES:
        x = np.full(n, FLOAT32.max, np.float32)
        assert_same_bits(in_place(math_ops.quantize_activations, x), x)


@every_tier
@pytest.mark.parametrize("value", [1.5, -1.5, 3e38, 1e-30, -7.0])
def test_quantize_activations_of_one_element_is_the_element(value):
    x = np.array([value], np.float32)
    assert_close(in_place(math_ops.quantize_activations, x), x, rtol=gamma(2), atol=0)


@every_tier
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_quantize_activations_does_not_hide_what_is_not_finite(value):
    # At many places of a vector and after the last whole one.
    for n, place in itertools.product(SIZES, (0, 1, 4, 20, -1)):
        if place >= n:
            continue
        x = np.stack([normal(n), normal(n, seed=1)])
        x[0, place] = value
        actual = in_place(math_ops.quantize_activations, x)
        assert not np.isfinite(actual[0, place])
        assert_same_bits(actual[1], in_place(math_ops.quantize_activations, x[1]))
        # The others are what they were, or not finite any more, or whole steps of the finite ones.
        others = np.delete(actual[0], place)
        largest = np.abs(np.delete(x[0], place)).max(initial=0.0)
        assert not (np.abs(others[np.isfinite(others)]) > largest * (1 + gamma(3))).any()


# --- Layer norm -----------------------------------------------------------------------------------

LAYER_NORM_ROWS = {
    "normal": normal,
    "small": lambda n: normal(n, std=1e-4),
    "wide": lambda n: normal(n, mean=3.0, std=100.0),
    # Multiples of 1/8 whose partial sums stay below 2^21: float32 adds them without error.
    "mean_1e4": lambda n: (1e4 + integers(n, limit=16) / 8).astype(np.float32),
}


def layer_norm_bounds(x, gain, bias, sum_is_exact):
    """Absolute error bounds for the mean, 1/std and the output of a two-pass float32 layer norm.

    An error m of the mean shifts every centred value, and adds m^2 to the variance and nothing
    more, for the centred values add up to 0. A variance from E[x^2] - E[x]^2 does not keep this.
    """
    u, n = UNIT_ROUNDOFF, len(x)
    output, mean, inv_std = oracle.layer_norm_forward(x, gain, bias)
    centred = np.abs(x - mean)
    # The division may be a reciprocal and a product.
    mean_error = (
        gamma(2) * abs(mean) if sum_is_exact else gamma(n + 2) * np.abs(x).mean(dtype=float)
    )
    variance = inv_std**-2
    variance_error = (mean_error**2 + gamma(n + 6) * (variance + mean_error**2)) / variance
    assert variance_error < 0.5
    inv_std_error = inv_std * ((1 - variance_error) ** -0.5 - 1 + gamma(4))
    scaled = np.abs(gain) * (
        (inv_std + inv_std_error) * (mean_error + u * centred)
        + centred * (inv_std_error + gamma(3) * inv_std)
    )
    return mean_error, inv_std_error, 1.01 * scaled + 2 * u * np.abs(output)


@every_tier
@pytest.mark.parametrize("kind", LAYER_NORM_ROWS)
@sizes
def test_layer_norm_forward_is_within_the_bound(n, kind):
    x, gain, bias = LAYER_NORM_ROWS[kind](n), normal(n, seed=1, mean=1.0), normal(n, seed=2)
    (mean, inv_std), actual = call(math_ops.layer_norm_forward, x, gain, bias, writes=(0,))
    expected, expected_mean, expected_inv_std = oracle.layer_norm_forward(x, gain, bias)
    bounds = layer_norm_bounds(x, gain, bias, sum_is_exact=kind == "mean_1e4")
    assert_close(mean, expected_mean, rtol=0, atol=bounds[0], what="mean")
    assert_close(inv_std, expected_inv_std, rtol=0, atol=bounds[1], what="inv_std")
    assert_close(actual, expected, rtol=0, atol=bounds[2], what="output", dtype=np.float32)


@every_tier
@pytest.mark.parametrize("n", [2, 3, 5, 17, 100])
def test_layer_norm_forward_of_a_mean_of_many_deviations_is_off_by_a_rounding(n):
    """Neighbours among the float32 numbers: squares of the mean would hide what they differ by."""
    x, one, zero = np.full(n, 2.0**24, np.float32), np.ones(n, np.float32), np.zeros(n, np.float32)
    x[-1] += 2.0
    expected, expected_mean, expected_inv_std = oracle.layer_norm_forward(x, one, zero)
    (mean, inv_std), actual = call(math_ops.layer_norm_forward, x, one, zero, writes=(0,))
    assert (mean, inv_std) == (np.float32(expected_mean), np.float32(expected_inv_std))
    assert_close(actual, expected, rtol=gamma(1), atol=0, dtype=np.float32)


@every_tier
@sizes
def test_layer_norm_is_layer_norm_forward(n):
    args = normal(n), normal(n, seed=1), normal(n, seed=2)
    assert_same_bits(
        in_place(math_ops.layer_norm, *args), in_place(math_ops.layer_norm_forward, *args)
    )


@every_tier
@pytest.mark.parametrize("value", [0.0, 3.0, -1e4])
@sizes
def test_layer_norm_forward_of_equal_values_is_beta(n, value):
    # Integers whose sum is exact, so the mean is the value itself and nothing is left to scale.
    x, bias = np.full(n, value, np.float32), normal(n, seed=2)
    (mean, inv_std), actual = call(
        math_ops.layer_norm_forward, x, normal(n, seed=1), bias, writes=(0,)
    )
    assert mean == value
    assert_close(inv_std, 1e-5**-0.5, rtol=gamma(4), atol=0)
    assert_rounded(actual, bias.astype(np.float64))


@every_tier
@pytest.mark.parametrize("name", ["layer_norm", "layer_norm_forward"])
def test_layer_norm_uses_epsilon(name):
    x, one, zero = np.array([-1, 1], np.float32), np.ones(2, np.float32), np.zeros(2, np.float32)
    # Variance 1 and epsilon 3 give a standard deviation of 2.
    assert_rounded(in_place(getattr(math_ops, name), x, one, zero, 3.0), np.array([-0.5, 0.5]))
    assert_rounded(
        in_place(getattr(math_ops, name), x, one, zero, epsilon=3.0), np.array([-0.5, 0.5])
    )


@every_tier
@pytest.mark.parametrize("name", ["layer_norm", "layer_norm_forward"])
@pytest.mark.parametrize("n", [3, 17, 64])
def test_layer_norm_is_exact_where_c_has_12_bits(name, n):
    """Departure 9: the C original's SSE layer norm multiplies by an approximate 1/std."""
    x, one, zero = normal(n), np.ones(n, np.float32), np.zeros(n, np.float32)
    exact = oracle.layer_norm(x, one, zero)
    bound = layer_norm_bounds(x, one, zero, sum_is_exact=False)[2]
    assert_close(in_place(getattr(math_ops, name), x, one, zero), exact, rtol=0, atol=bound)

    of_c = oracle.fault9_layer_norm(x, one, zero)
    assert_close(of_c, exact, rtol=2.0**-12, atol=0)
    assert (np.abs(of_c - exact) > 5 * bound).any()


# --- Matrix product -------------------------------------------------------------------------------

# Rows, inner, columns: one off either side of the tiles (rows of 4, 6, 14, columns of 8, 16, 32),
# several tiles with a remainder, and an inner size beyond a block.
MATMUL_SHAPES = (
    (1, 1, 1),
    (1, 97, 33),
    (3, 5, 7),
    (4, 8, 8),
    (5, 9, 9),
    (6, 16, 16),
    (7, 17, 15),
    (13, 3, 31),
    (14, 64, 32),
    (15, 33, 65),
    (29, 7, 97),
    (97, 31, 17),
    (65, 1, 1),
    (9, 1030, 35),
)
matmul_shapes = together("shape", MATMUL_SHAPES)
transposes = pytest.mark.parametrize(
    ("transpose_a", "transpose_b"), [(False, False), (False, True), (True, False), (True, True)]
)


def operands(shape, transpose_a, transpose_b, make=normal):
    m, k, n = shape
    a = make(*((k, m) if transpose_a else (m, k)))
    return a, make(*((n, k) if transpose_b else (k, n)), seed=1), make(m, n, seed=2)


def check_matmul(a, b, start, transpose_a, transpose_b, exact=False):
    """All ways to call: into a new array, into one of NaN, added to ``start``; 1 and 2 threads."""
    flags = {"transpose_a": transpose_a, "transpose_b": transpose_b}
    terms = a.shape[0 if transpose_a else 1]
    for into in (None, start):
        expected = oracle.matmul(a, b, into, **flags)
        absolute = oracle.matmul(
            np.abs(a), np.abs(b), None if into is None else np.abs(into), **flags
        )
        bound = 0.0 if exact else dot_bound(absolute, terms + (into is not None))
        output = np.full_like(start, np.nan) if into is None else into
        for threads in (1, 2):
            result, written = call(
                math_ops.matmul, a, b, output,
                accumulate=into is not None, threads=threads, writes=(2,), **flags,
            )  # fmt: skip
            assert result is written
            assert_close(written, expected, rtol=0, atol=bound, dtype=np.float32)
            if threads == 1:
                one_thread = written
        assert_same_bits(written, one_thread, "two threads")
        if into is None:
            (new,) = call(math_ops.matmul, a, b, **flags)
            assert_same_bits(new, one_thread, "a new output")


@every_tier
@transposes
@matmul_shapes
def test_matmul_is_within_the_bound(shape, transpose_a, transpose_b):
    check_matmul(*operands(shape, transpose_a, transpose_b), transpose_a, transpose_b)


@every_tier
@transposes
@matmul_shapes
def test_matmul_is_exact_for_integers(shape, transpose_a, transpose_b):
    # 1030 products of at most 100^2 stay below 2^24.
    args = operands(shape, transpose_a, transpose_b, integers)
    check_matmul(*args, transpose_a, transpose_b, exact=True)


@every_tier
@sizes
def test_matmul_is_exact_for_integers_at_every_size(n):
    for shape in ((n, 5, 3), (5, n, 3), (3, 5, n)):
        check_matmul(*operands(shape, False, False, integers), False, False, exact=True)


@every_tier
@transposes
def test_matmul_of_ones_against_large_values_is_within_the_bound(transpose_a, transpose_b):
    a = np.ones((33, 33), np.float32)
    b = large_and_one(33 * 33).reshape(33, 33)
    check_matmul(a, b, -b, transpose_a, transpose_b)


@every_tier
def test_matmul_with_more_threads_than_rows():
    a, b = normal(1, 9), normal(9, 5, seed=1)
    assert_same_bits(math_ops.matmul(a, b, threads=4), math_ops.matmul(a, b))


@pytest.mark.parametrize("threads", [0, -1])
def test_matmul_rejects_fewer_than_one_thread(threads):
    with pytest.raises(ValueError, match="threads"):
        math_ops.matmul(normal(3, 3), normal(3, 3), threads=threads)


# The products of every instruction set, whose panels have edges at any size of the caches.
PANELS = """
import hashlib
import numpy as np
from legacy1bit import math_ops

rng = np.random.default_rng(0)
normal = lambda *shape: rng.standard_normal(shape, np.float32)
operands = [(normal(m, k), normal(k, n)) for m, k, n in ((70, 520, 385), (241, 300, 37), (7, 5, 3))]
for name in math_ops.simd_levels():
    math_ops.set_simd_level(name)
    digest = hashlib.sha256()
    for a, b in operands:
        for left, right in ((a, b), (a.T.copy(), b), (a, b.T.copy())):
            flags = left is not a, right is not b
            digest.update(math_ops.matmul(left, right, None, *flags))
    print(name, digest.hexdigest())
"""


def run_with_caches(program, sizes):
    return subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "LEGACY1BIT_CACHES": sizes},
        capture_output=True,
        text=True,
    )


def test_matmul_has_the_same_bits_for_caches_of_any_size():
    by_sizes = {sizes: run_with_caches(PANELS, sizes) for sizes in ("", "4,4", "32,512", "64,8192")}
    outputs = {sizes: done.stdout for sizes, done in by_sizes.items()}
    assert all(done.returncode == 0 for done in by_sizes.values())
    assert outputs[""].count("\n") == len(math_ops.simd_levels())
    assert len(set(outputs.values())) == 1


@pytest.mark.parametrize("sizes", ["32", "32,512,1", "0,512", "32,-1", "x,512", "32,9999999"])
def test_import_with_wrong_sizes_of_caches_is_one_clear_line(sizes):
    done = run_with_caches(IMPORT, sizes)
    assert done.stdout.startswith("ImportError: LEGACY1BIT_CACHES is ")
    assert "32,512" in done.stdout
    assert done.stdout.count("\n") == 1


def test_cache_sizes_are_those_of_the_environment(monkeypatch):
    monkeypatch.setenv("LEGACY1BIT_CACHES", "48,2048")
    assert cpu.cache_sizes() == (48 << 10, 2048 << 10)


def test_cache_sizes_are_those_of_the_system(monkeypatch):
    monkeypatch.delenv("LEGACY1BIT_CACHES", raising=False)
    folder = Path("/sys/devices/system/cpu/cpu0/cache")
    sizes = {}
    for cache in folder.glob("index*"):
        if (cache / "type").read_text().strip() != "Instruction":
            kib = (cache / "size").read_text().strip().removesuffix("K")
            sizes[int((cache / "level").read_text())] = int(kib) << 10
    if not {1, 2} <= set(sizes):
        pytest.skip("the system does not list the caches")
    assert cpu.cache_sizes() == (sizes[1], sizes[2])


def test_peaks_say_how_much_they_did(tier):
    assert math_ops.peak_fused(6) == 2 * math_ops.peak_fused(3) > 0
    assert math_ops.peak_dot(6) == 2 * math_ops.peak_dot(3) > 0
    assert math_ops.peak_read(np.ones(1001, np.float32)) == 4004


# --- What every function rejects ------------------------------------------------------------------

# The arguments of a valid call, sizes all different so that each can be told from a message, and
# the names of the arrays it writes.
CALLS = {
    "ternary_matrix_vector_mul": (
        {"matrix": ternary(19, 23), "vector": normal(23), "output": normal(19)},
        {"output"},
    ),
    "matrix_transpose_vector_mul": (
        {"matrix": ternary(19, 23), "vector": normal(19), "output": normal(23)},
        {"output"},
    ),
    "add_vector_inplace": ({"x": normal(19), "y": normal(19)}, {"x"}),
    "add_scalar_mul_vector_inplace": ({"x": normal(19), "scalar": 2.0, "y": normal(19)}, {"x"}),
    "multiply_vector_inplace": ({"x": normal(19), "y": normal(19)}, {"x"}),
    "scalar_mul_vector_inplace": ({"x": normal(19), "scalar": 2.0}, {"x"}),
    "vector_sub_scalar_inplace": ({"x": normal(19), "scalar": 2.0}, {"x"}),
    "vector_div_scalar_inplace": ({"x": normal(19), "scalar": 2.0}, {"x"}),
    "vector_pow_scalar_inplace": ({"x": normal(19), "scalar": 2.0}, {"x"}),
    "vector_sum": ({"x": normal(19)}, set()),
    "dot_product": ({"x": normal(19), "y": normal(19)}, set()),
    "outer_product_add_inplace": (
        {"matrix": normal(19, 23), "x": normal(19), "y": normal(23)},
        {"matrix"},
    ),
    "relu": ({"x": normal(19)}, {"x"}),
    "relu2": ({"x": normal(19)}, {"x"}),
    "silu": ({"x": normal(19)}, {"x"}),
    "gelu": ({"x": normal(19)}, {"x"}),
    "softmax": ({"x": normal(19)}, {"x"}),
    "quantize_activations": ({"x": normal(19)}, {"x"}),
    "exp_inplace": ({"x": normal(19)}, {"x"}),
    "layer_norm_forward": (
        {"x": normal(19), "gamma": normal(19), "beta": normal(19), "epsilon": 1e-5},
        {"x"},
    ),
    "layer_norm": (
        {"x": normal(19), "gamma": normal(19), "beta": normal(19), "epsilon": 1e-5},
        {"x"},
    ),
    "matmul": ({"a": normal(19, 23), "b": normal(23, 29), "output": normal(19, 29)}, {"output"}),
}
every_function = pytest.mark.parametrize("name", CALLS)
every_array = together(
    ("name", "argument"),
    [
        (name, argument)
        for name, (arguments, _) in CALLS.items()
        for argument, value in arguments.items()
        if isinstance(value, np.ndarray)
    ],
)


def arguments_of(name):
    """Fresh copies of a valid call's arguments, and the names of the arrays it writes."""
    arguments, written = CALLS[name]
    copies = {key: v.copy() if isinstance(v, np.ndarray) else v for key, v in arguments.items()}
    return copies, written


def rejection(name, arguments, *errors):
    """The message of the error; nothing may have been written before it is raised."""
    before = {key: v.copy() for key, v in arguments.items() if isinstance(v, np.ndarray)}
    with pytest.raises(errors) as info:
        getattr(math_ops, name)(**arguments)
    for key, value in before.items():
        assert_same_bits(arguments[key], value, key)
    return str(info.value)


@every_function
def test_every_function_accepts_read_only_inputs_and_named_arguments(name):
    arguments, written = arguments_of(name)
    for key, value in arguments.items():
        if isinstance(value, np.ndarray) and key not in written:
            value.flags.writeable = False
    getattr(math_ops, name)(**arguments)
    for key, value in arguments.items():
        if key not in written:
            assert np.array_equal(value, CALLS[name][0][key])


@every_function
def test_every_function_rejects_a_read_only_target(name):
    arguments, written = arguments_of(name)
    for key in written:
        arguments[key].flags.writeable = False
        rejection(name, arguments, ValueError)


@every_array
@pytest.mark.parametrize("dtype", [np.float64, np.int32, np.float16])
def test_every_function_rejects_other_dtypes(name, argument, dtype):
    arguments, _ = arguments_of(name)
    arguments[argument] = arguments[argument].astype(dtype)
    # The buffer protocol says ValueError.
    assert rejection(name, arguments, TypeError, ValueError)


@every_array
@pytest.mark.parametrize("value", [[1.0, 2.0], 1.0, "text"])
def test_every_function_rejects_what_is_not_an_array(name, argument, value):
    arguments, _ = arguments_of(name)
    arguments[argument] = value
    assert rejection(name, arguments, TypeError)


@every_array
def test_every_function_rejects_none_but_for_the_output(name, argument):
    arguments, _ = arguments_of(name)
    arguments[argument] = None
    if argument == "output":
        getattr(math_ops, name)(**arguments)
    else:
        assert argument in rejection(name, arguments, TypeError)


@every_array
def test_every_function_rejects_strided_arrays(name, argument):
    arguments, _ = arguments_of(name)
    arguments[argument] = np.repeat(arguments[argument], 2, axis=-1)[..., ::2]
    assert rejection(name, arguments, ValueError)


@every_array
def test_every_function_rejects_other_numbers_of_axes(name, argument):
    arguments, _ = arguments_of(name)
    # Softmax takes one axis or two.
    arguments[argument] = arguments[argument][None, None]
    assert rejection(name, arguments, ValueError)


@every_function
def test_every_function_rejects_empty_arrays(name):
    arguments, _ = arguments_of(name)
    arrays = [key for key, value in arguments.items() if isinstance(value, np.ndarray)]
    for key in arrays:
        arguments[key] = arguments[key][tuple(slice(0) for _ in arguments[key].shape)]
    message = rejection(name, arguments, ValueError)
    assert any(re.search(rf"\b{key}\b", message) for key in arrays), message


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
def test_outer_product_add_inplace_rejects_a_matrix_without_rows_or_columns(shape):
    arrays = [np.ones(size, np.float32) for size in (shape, *shape)]
    arguments = dict(zip(("matrix", "x", "y"), arrays, strict=True))
    assert rejection("outer_product_add_inplace", arguments, ValueError) == "matrix is empty"


# The first array is taken as it comes; those after it must fit, and are the ones to name.
@pytest.mark.parametrize(
    ("name", "argument", "axis"),
    [
        ("ternary_matrix_vector_mul", "vector", 0),
        ("ternary_matrix_vector_mul", "output", 0),
        ("matrix_transpose_vector_mul", "vector", 0),
        ("matrix_transpose_vector_mul", "output", 0),
        ("add_vector_inplace", "y", 0),
        ("add_scalar_mul_vector_inplace", "y", 0),
        ("multiply_vector_inplace", "y", 0),
        ("dot_product", "y", 0),
        ("outer_product_add_inplace", "x", 0),
        ("outer_product_add_inplace", "y", 0),
        ("layer_norm_forward", "gamma", 0),
        ("layer_norm_forward", "beta", 0),
        ("layer_norm", "gamma", 0),
        ("layer_norm", "beta", 0),
        ("matmul", "b", 0),
        ("matmul", "output", 0),
        ("matmul", "output", 1),
    ],
)
@pytest.mark.parametrize("change", [-1, 1])
def test_every_function_rejects_shape_mismatches(name, argument, axis, change):
    arguments, _ = arguments_of(name)
    shape = list(arguments[argument].shape)
    expected = shape[axis]
    shape[axis] += change
    arguments[argument] = np.ones(shape, np.float32)
    message = rejection(name, arguments, ValueError)
    for part in (argument, expected, expected + change):
        assert re.search(rf"\b{part}\b", message), message
    _, _, wanted = message.partition("expected")
    assert not wanted or re.search(rf"\b{expected}\b", wanted), message


@pytest.mark.parametrize(("transpose_a", "transpose_b"), [(False, True), (True, False)])
def test_matmul_rejects_shapes_that_fit_only_untransposed(transpose_a, transpose_b):
    arguments, _ = arguments_of("matmul")
    arguments |= {"transpose_a": transpose_a, "transpose_b": transpose_b}
    assert re.search(r"\bb\b", rejection("matmul", arguments, ValueError))


# --- One order of sums ----------------------------------------------------------------------------


def in_places(x):
    """The sum of float32 numbers in the order that all instruction sets keep to."""
    places = np.zeros(16, np.float32)
    for start in range(0, x.size, 16):
        part = x[start : start + 16]
        places[: part.size] += part
    while places.size > 1:
        places = places[: places.size // 2] + places[places.size // 2 :]
    return places[0]


@pytest.mark.parametrize("n", [1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 64, 100, 257, 1000])
def test_sums_and_what_is_made_of_them_have_the_same_bits_everywhere(n):
    x, gain = normal(n, seed=n), normal(n, seed=n + 1)

    def softmax():
        y = x * np.float32(3.0)
        math_ops.softmax(y)
        return y

    def layer_norm():
        y = x.copy()
        math_ops.layer_norm(y, gain, x)
        return y

    total = in_places(x)
    for found in in_every_tier(math_ops.vector_sum, x):
        assert found == total
    for function in (softmax, layer_norm):
        first, *others = in_every_tier(function)
        for other in others:
            np.testing.assert_array_equal(other, first)


def test_layer_norm_has_the_same_bits_everywhere_where_float64_begins():
    """The mean is 1,000 standard deviations to the bit, the most that float32 is trusted with."""
    for a, b, deviation in ((7, 1, 5), (17, 7, 13), (23, 7, 17), (31, 17, 25), (49, 31, 41)):
        x = 1024 * (np.array([a, -a, b, -b] * 5, np.float32) + np.float32(1000 * deviation))
        gain, bias = normal(20), normal(20, seed=1)
        first, *others = in_every_tier(in_place, math_ops.layer_norm, x, gain, bias)
        for other in others:
            assert_same_bits(other, first)


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc")
def test_matmul_without_memory_raises_memory_error():
    printed = run_child(
        "from legacy1bit.math_ops import matmul\n"
        "a = np.ones((9, 9), np.float32)\n"
        f"{LIMIT}{TAKE_ALL}"
        "try:\n    matmul(a, a, a.copy())\nexcept MemoryError as error:\n    print(error)\n"
    )
    assert printed == "no memory for the matrix product's packing buffers"
