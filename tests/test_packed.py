"""Packed matrices: where each code lies, and products that are exact in every instruction set."""

import functools
import gc
import pickle
import warnings

import numpy as np
import pytest

from helpers import oracle
from helpers.arrays import UNIT_ROUNDOFF, assert_close, assert_same_bits, gamma
from helpers.cases import together
from helpers.models import (
    KINDS,
    LEVELS,
    every_tier,
    has_trits,
    in_every_tier,
    make_config,
    model_of,
    random_model,
    rejection,
    run_child,
)
from legacy1bit import math_ops
from legacy1bit.forward import forward_llm_batch
from legacy1bit.hyperparams import ModelConfig
from legacy1bit.inference import Decoder
from legacy1bit.model import (
    TernaryMatrix,
    create_legacy_llm,
    free_legacy_llm,
    load_model,
    save_model,
)
from legacy1bit.packed import (
    FORMS,
    Int8Matrix,
    PackedMatrix,
    PackedModel,
    packed_size,
    round_to_bfloat16,
)
from legacy1bit.schemes import SCHEMES

kinds = pytest.mark.parametrize(("levels", "form"), KINDS, ids=lambda value: str(value))

# Rows around a strip of 32, columns around tiles of 16 and 20 and around vectors of bytes.
SHAPES = ((1, 1), (2, 15), (31, 16), (32, 17), (33, 19), (5, 20), (64, 21), (65, 40), (70, 63),
          (3, 64), (34, 65), (1, 127), (40, 160), (33, 321), (7, 700))  # fmt: skip
BATCHES = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 130)


def random_codes(shape, levels, seed=1):
    return np.random.default_rng(seed).choice(np.array(levels, np.int8), shape)


def int8_rows(batch, cols, seed=2):
    """Whole numbers that rounding to int8 leaves as they are: each row's largest is 127."""
    x = np.random.default_rng(seed).integers(-127, 128, (batch, cols))
    x[:, 0] = np.where(np.arange(batch) % 2, 127, -127)
    return x.astype(np.float32)


def normal(*shape, seed=3):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# --- Where a code lies ----------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tiles_are_laid_out_as_simd_h_says(shape, levels, form):
    codes = random_codes(shape, levels)
    places = np.searchsorted(levels, codes)
    matrix = PackedMatrix(codes, levels=levels, form=form)
    # Levels have places from 0 on, and so has what rows and columns leave open.
    assert_same_bits(matrix.tiles, oracle.tiles(places, form))
    assert matrix.nbytes == matrix.tiles.size == packed_size(shape, form)


@pytest.mark.parametrize("form", FORMS)
def test_each_code_has_its_place(form):
    """One code after the other is moved, and two bits or a trit of one byte move with it."""
    shape, width = (35, 43), {"2bit": 16, "trits": 20}[form]
    codes = np.full(shape, -1, np.int8)
    assert not PackedMatrix(codes, form=form).tiles.any()
    for row, col in (
        (0, 0),
        (0, 1),
        (1, 0),
        (31, 3),
        (32, 4),
        (34, 15),
        (0, 16),
        (33, 42),
        (5, 19),
    ):
        codes[...] = -1
        codes[row, col] = 1
        tiles = PackedMatrix(codes, form=form).tiles
        assert tiles.shape == (2, 3, 128)
        at = row // 32, col // width, row % 32 * 4 + col % 4
        assert np.argwhere(tiles).tolist() == [list(at)]
        field = col % width // 4
        if form == "2bit":
            assert tiles[at] >> 2 * field & 3 == 2
            continue
        # Three times the byte is the trit and, as a byte, the fraction of those that are left.
        byte, trits = int(tiles[at]), []
        for _ in range(5):
            trits.append(3 * byte >> 8)
            byte = 3 * byte & 255
        assert trits == [2 if i == field else 0 for i in range(5)]


def test_every_byte_of_five_trits_is_read_as_it_was_written():
    numbers = np.arange(243)
    digits = numbers[:, None] // 3 ** np.arange(4, -1, -1) % 3
    codes = np.zeros((243, 20), np.int8)
    codes[:, ::4] = digits - 1
    matrix = PackedMatrix(codes, form="trits")
    np.testing.assert_array_equal(matrix.values, codes)
    written = matrix.tiles.reshape(-1, 4)[:243, 0]
    assert len(set(written.tolist())) == 243
    np.testing.assert_array_equal(written, np.ceil(256 * numbers / 243))


@kinds
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_packed_codes_come_back(shape, levels, form):
    codes = random_codes(shape, levels)
    scales = np.abs(normal(shape[0], 1)) + 1
    matrix = PackedMatrix(codes, scales, levels=levels, form=form)
    assert_same_bits(matrix.values, codes)
    assert matrix.shape == shape
    assert matrix.levels == levels
    assert matrix.trits == (form == "trits")
    assert matrix.scales is scales
    assert matrix.tiles.ctypes.data % 64 == 0


def test_packed_matrix_takes_the_scales_of_a_ternary_matrix():
    codes, scales = random_codes((3, 40), (-1, 0, 1)), normal(3, 3)
    matrix = PackedMatrix(TernaryMatrix(codes, scales, 16))
    assert matrix.group == 16
    assert_same_bits(matrix.scales, scales)
    assert_same_bits(matrix.values, codes)
    assert repr(matrix) == "PackedMatrix(3 x 40, 2 bits)"
    assert repr(PackedMatrix(codes, form="trits")) == "PackedMatrix(3 x 40, trits)"


def test_packed_matrix_goes_into_the_buffer_given():
    codes = random_codes((33, 17), (-1, 0, 1))
    whole = np.zeros(packed_size((33, 17)) + 256, np.uint8)
    start = -whole.ctypes.data % 64
    buffer = whole[start : start + packed_size((33, 17))]
    matrix = PackedMatrix(codes, buffer=buffer)
    assert np.shares_memory(matrix.tiles, buffer)
    assert_same_bits(matrix.tiles, oracle.tiles(codes + 1, "2bit"))
    assert_same_bits(matrix.values, codes)


# --- Exact products -------------------------------------------------------------------------------


@functools.cache
def exact_case(shape, levels, batch):
    codes, x = random_codes(shape, levels), int8_rows(batch, shape[1])
    return codes, x, x.astype(np.int64) @ codes.astype(np.int64).T


@functools.cache
def packed_case(shape, levels, form):
    return PackedMatrix(random_codes(shape, levels), levels=levels, form=form)


def check_exact(shape, levels, form, batch):
    _, x, expected = exact_case(shape, levels, batch)
    actual = packed_case(shape, levels, form).multiply(x)
    # All of them are below 2^24, so that float32 holds them.
    assert_same_bits(actual + 0, expected.astype(np.float32), f"{shape}, {batch} rows")


@every_tier
@kinds
@together("shape", SHAPES)
def test_products_of_whole_numbers_are_exact(shape, levels, form):
    for batch in (1, 2, 5, 8, 65):
        check_exact(shape, levels, form, batch)


@every_tier
@kinds
def test_products_are_exact_for_any_number_of_rows(levels, form):
    for batch in BATCHES:
        check_exact((33, 75), levels, form, batch)


@every_tier
@pytest.mark.parametrize("form", FORMS)
def test_products_are_exact_for_any_height(form):
    for rows in range(1, 71):
        for batch in (1, 9):
            check_exact((rows, 37), (-1, 0, 1), form, batch)


@every_tier
@pytest.mark.parametrize("form", FORMS)
def test_products_are_exact_for_any_width(form):
    for cols in range(1, 165):
        for batch in (1, 3, 9):
            check_exact((5, cols), (-1, 0, 1), form, batch)


@every_tier
@kinds
def test_products_of_more_tiles_than_one_sum_holds_are_exact(levels, form):
    """A sum holds 1,024 tiles; so few more than that are a part of their own."""
    check_exact((3, 1026 * (20 if form == "trits" else 16) + 5), levels, form, 40)


@functools.cache
def long_matrix(code, levels, form, cols):
    return PackedMatrix(np.full((33, cols), code, np.int8), levels=levels, form=form)


@every_tier
@kinds
@pytest.mark.parametrize("batch", [1, 9])
def test_the_largest_sums_do_not_overflow(batch, levels, form):
    """Instructions that add up in 16 bits would, within a tile; longer sums, after some tiles."""
    cols = 65536
    for code in (levels[-1], levels[0]):
        matrix = long_matrix(code, levels, form, cols)
        for number in (127.0, -127.0):
            # Each row's sum is another one: what is mixed up shows.
            x = np.full((batch, cols), number, np.float32)
            for i in range(batch):
                x[i, : 100 * i] = 0.0
            expected = number * code * (cols - 100 * np.arange(batch))
            actual = matrix.multiply(x)
            assert_same_bits(actual, np.repeat(expected[:, None].astype(np.float32), 33, axis=1))


@every_tier
@kinds
def test_the_largest_numbers_of_both_signs_do_not_overflow(levels, form):
    """Neighbours whose products have one sign, and all others none: no pair may saturate."""
    cols = 240
    codes = np.resize(np.array([levels[-1], levels[0]], np.int8), (4, cols))
    codes[1:] = [np.roll(codes[0], 1), codes[0], codes[0]]
    codes[2, 1::2] = levels[-1]
    x = np.resize(np.array([127, -127], np.float32), (9, cols))
    actual = PackedMatrix(codes, levels=levels, form=form).multiply(x)
    assert_same_bits(actual + 0, (x @ codes.T.astype(np.float32)) + 0)


@every_tier
@kinds
@together("batch", [1, 4, 9, 65])
def test_bias_and_the_scales_of_rows(batch, levels, form):
    shape = (37, 53)
    codes, x, sums = exact_case(shape, levels, batch)
    scales = 2.0 ** np.random.default_rng(4).integers(-3, 4, (37, 1)).astype(np.float32)
    bias = np.arange(-18, 19, dtype=np.float32)
    for given, scale in (
        (scales, scales[:, 0]),
        (np.float32([[0.25]]), 0.25),
        (-0.5, -0.5),
        (scales * 0, 0.0),
        (None, 1.0),
    ):
        matrix = PackedMatrix(codes, given, levels=levels, form=form)
        expected = (sums * scale).astype(np.float32)
        assert_same_bits(matrix.multiply(x) + 0, expected + 0)
        assert_same_bits(matrix.multiply(x, bias) + 0, expected + bias + 0)


@every_tier
@pytest.mark.parametrize("levels", LEVELS, ids=str)
@together("cols, group", [(300, 128), (300, 16), (257, 256), (128, 64), (33, 32)])
def test_scales_of_groups(cols, group, levels):
    rng = np.random.default_rng(5)
    scales = 2.0 ** rng.integers(-3, 4, (35, -(-cols // group))).astype(np.float32)
    codes = random_codes((35, cols), levels)
    matrix, bias = PackedMatrix(codes, scales, group, levels), np.arange(35, dtype=np.float32)
    assert matrix.group == group
    for batch in (1, 3, 8, 66):
        x = int8_rows(batch, cols)
        expected = oracle.packed_product(codes, scales, group, x)
        assert_same_bits(matrix.multiply(x) + 0, expected.astype(np.float32) + 0)
        assert_same_bits(matrix.multiply(x, bias) + 0, (expected + bias).astype(np.float32) + 0)


@every_tier
def test_a_group_of_the_whole_row_or_more_is_one_scale_a_row():
    codes, scales, x = (
        random_codes((3, 40), (-1, 0, 1)),
        np.float32([[1], [2], [4]]),
        int8_rows(2, 40),
    )
    expected = oracle.packed_product(codes, scales, 40, x).astype(np.float32)
    for group in (0, 40, 48, 1000):
        for form in FORMS:
            assert_same_bits(PackedMatrix(codes, scales, group, form=form).multiply(x), expected)


# --- Matrices of int8 -----------------------------------------------------------------------------


def int8_matrix(values):
    matrix = Int8Matrix(*values.shape)
    matrix.quantize(0, values)
    return matrix


@every_tier
@pytest.mark.parametrize("shape", [*SHAPES, (97, 129), (1, 7000)], ids=str)
def test_int8_products_are_exact(shape):
    """Weights and activations are whole numbers; scales are powers of two."""
    scales = 2.0 ** np.random.default_rng(4).integers(-3, 4, (shape[0], 1)).astype(np.float32)
    codes, bias = int8_rows(*shape, seed=6), np.arange(shape[0], dtype=np.float32)
    matrix = int8_matrix(codes * scales)
    assert_same_bits(matrix.values + 0, codes * scales + 0)
    assert_same_bits(matrix.scales, scales[:, 0])
    for batch in (1, 2, 5, 33):
        x = int8_rows(batch, shape[1])
        expected = x.astype(np.int64) @ codes.astype(np.int64).T * scales[:, 0].astype(np.float64)
        assert_same_bits(matrix.multiply(x) + 0, expected.astype(np.float32) + 0)
        rounded = expected.astype(np.float32) + bias
        assert_same_bits(matrix.multiply(x, bias) + 0, rounded + 0)


@every_tier
def test_int8_products_of_the_largest_codes():
    """Their pairs do not fit 16 bits, nor do their sums fit float32's 24: they are rounded once."""
    codes = np.full((5, 9000), 127, np.float32)
    codes[1], codes[2, 1::2] = -127, -127
    found = int8_matrix(codes).multiply(np.full((1, 9000), 127, np.float32))
    assert_same_bits(found, np.float32([[127 * 127 * n for n in (9000, -9000, 0, 9000, 9000)]]))


def test_int8_products_are_the_same_in_every_instruction_set():
    values, x = normal(70, 130), normal(5, 130, seed=8)
    answers = list(in_every_tier(lambda: int8_matrix(values).multiply(x, values[:, 0].copy())))
    for other in answers[1:]:
        assert_same_bits(other, answers[0])
    expected = oracle.quantize_activations(x) @ oracle.quantize_activations(values).T
    expected += values[:, 0]
    assert_close(answers[0], expected, rtol=1e-5, atol=1e-4, dtype=np.float32)


@every_tier
def test_int8_rows_that_are_not_finite_stay_so():
    values = normal(40, 33)
    values[7, 5] = np.nan
    matrix = Int8Matrix(40, 33)
    for row in range(40):
        matrix.quantize(row, values[row : row + 1])
    found = matrix.multiply(normal(2, 33))
    assert np.isnan(found).any(axis=0).tolist() == [row == 7 for row in range(40)]


@pytest.mark.parametrize(
    ("first", "values", "message"),
    [
        (0, normal(4, 7), "values has 4 rows from 0 on, expected some of 3"),
        (2, normal(2, 7), "values has 2 rows from 2 on"),
        (-1, normal(1, 7), "values has 1 rows from -1 on"),
        (3, normal(0, 7), "values has 0 rows from 3 on"),
        (0, normal(3, 6), "values has 6 columns, expected 7"),
        (0, np.zeros((3, 7)), "dtype"),
        (0, None, "values is None"),
    ],
    ids=str,
)
def test_int8_matrix_rejects(first, values, message):
    with pytest.raises(ValueError, match=message):
        Int8Matrix(3, 7).quantize(first, values)


# --- Rounding to int8 -----------------------------------------------------------------------------


@functools.cache
def float_case(levels, group):
    """Random activations, and the same in float64; no number near half way between two steps."""
    codes = random_codes((45, 333), levels)
    groups = -(-333 // group) if group else 1
    scales = np.abs(normal(45, groups)) + np.float32(0.1)
    for seed in range(200):
        x = (normal(9, 333, seed=seed) * np.float32(10.0) ** np.arange(-4, 5)[:, None]).astype(
            np.float32
        )
        steps = x / oracle.activation_step(x)
        # Two float32 operations turn a number into steps.
        if np.abs(np.abs(steps - np.rint(steps)) - 0.5).min() > 127 * gamma(4):
            expected = oracle.packed_product(codes, scales, group or 333, x)
            size = oracle.packed_product(np.abs(codes), scales, group or 333, np.abs(x))
            return codes, scales, x, expected, size
    raise AssertionError("no data without a tie")


@every_tier
@pytest.mark.parametrize("group", [0, 128])
@kinds
def test_products_round_each_row_to_int8(levels, form, group):
    if form == "trits" and group:
        return
    codes, scales, x, expected, size = float_case(levels, group)
    matrix = PackedMatrix(codes, scales, group, levels, form)
    # The step, its product with the scale, that with the sum, and the groups' additions round.
    assert_close(matrix.multiply(x), expected, rtol=0, atol=gamma(7) * size, dtype=np.float32)


@pytest.mark.parametrize("group", [0, 48])
@kinds
def test_products_have_the_same_bits_in_every_instruction_set(levels, form, group):
    if form == "trits" and group:
        return
    former, codes, rng = (
        math_ops.simd_level(),
        random_codes((70, 331), levels),
        np.random.default_rng(6),
    )
    matrix = PackedMatrix(codes, normal(70, -(-331 // group) if group else 1), group, levels, form)
    x = normal(130, 331) * 10.0 ** rng.integers(-30, 30, (130, 1)).astype(np.float32)
    # Ties, too: numbers half way between two steps go to the even one everywhere.
    x[5] = rng.integers(-254, 255, 331) / np.float32(2.0)
    x[5, 0] = 127.0
    answers = {}
    try:
        for level in math_ops.simd_levels():
            math_ops.set_simd_level(level)
            for batch in (1, 4, 7, 8, 130):
                answers[level, batch] = matrix.multiply(x[:batch].copy(), normal(70, seed=9))
    finally:
        math_ops.set_simd_level(former)
    for (level, batch), answer in answers.items():
        # Nor do they depend on the rows around.
        assert_same_bits(answer, answers["scalar", 130][:batch], f"{level}, {batch} rows")


@every_tier
def test_ties_go_to_the_even_code():
    x = np.float32([[127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, -126.5, 3.4999, 3.5001]])
    identity = PackedMatrix(np.eye(11, dtype=np.int8))
    expected = np.float32([[127, 0, 2, 2, 0, -2, -2, 126, -126, 3, 4]])
    assert_same_bits(identity.multiply(x) + 0, expected)


@every_tier
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cols", [1, 3, 16, 67])
def test_rows_that_are_not_finite_give_nan_and_leave_the_others_alone(cols, form):
    matrix = PackedMatrix(random_codes((40, cols), (-1, 0, 1)), form=form)
    for batch in (1, 5, 17):
        good = normal(batch, cols)
        before = matrix.multiply(good)
        for bad in (np.nan, np.inf, -np.inf):
            for col in {0, cols // 2, cols - 1}:
                x, row = good.copy(), (batch * 2) // 3
                x[row, col] = bad
                after = matrix.multiply(x, np.zeros(40, np.float32))
                assert np.isnan(after[row]).all()
                others = np.arange(batch) != row
                assert_same_bits(after[others] + 0, before[others] + 0)
    both = np.full((1, cols), np.inf, np.float32)
    both[0, ::2] = -np.inf
    assert np.isnan(matrix.multiply(both)).all()


@every_tier
@kinds
def test_rows_of_zeros_give_the_bias_alone(levels, form):
    matrix = PackedMatrix(random_codes((40, 50), levels), levels=levels, form=form)
    x, bias = normal(9, 50), normal(40)
    x[[0, 4, 8]] = 0.0
    x[4, ::2] = -0.0
    assert (matrix.multiply(x)[[0, 4, 8]] == 0.0).all()
    assert_same_bits(matrix.multiply(x, bias)[[0, 4, 8]], np.repeat(bias[None], 3, axis=0))


@every_tier
@kinds
@together("exponent", [-149, -140, -126, -122, -121, -120, -100, 60, 100, 119])
def test_tiny_and_huge_rows(exponent, levels, form):
    """Below 2^-121 a step's inverse is no float32: what is less than that counts as 0."""
    codes = random_codes((5, 30), levels)
    x = np.ldexp(int8_rows(3, 30) / np.float32(127.0), exponent).astype(np.float32)
    x[1] = normal(30)
    actual = PackedMatrix(codes, levels=levels, form=form).multiply(x)
    expected = oracle.packed_product(codes, np.ones((1, 1)), 30, x)
    assert np.isfinite(actual).all()
    if exponent < -100:
        assert np.abs(actual[[0, 2]] - expected[[0, 2]]).max() <= 3 * 30 * 2.0**-121
    else:
        # A number of steps may be a float32 rounding off, and so a tie may be one; here none is.
        np.testing.assert_allclose(actual[[0, 2]], expected[[0, 2]], rtol=1e-6, atol=0)


@every_tier
def test_large_floats_are_not_lost():
    """As long as 127 steps, the step rounded up, are a float32."""
    large = np.float32(2.0**127)
    x = np.float32([[large, large / 2, 0.0, -large / 127]])
    actual = PackedMatrix(np.eye(4, dtype=np.int8)).multiply(x)
    # 63.5 steps are a tie, or within a rounding of it.
    assert_close(actual[0, [0, 2, 3]], x[0, [0, 2, 3]], rtol=4 * UNIT_ROUNDOFF, atol=0)
    assert abs(actual[0, 1] / x[0, 1] - 1.0) < 0.01
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert PackedMatrix(np.ones((1, 2), np.int8)).multiply(np.full((1, 2), large)) == np.inf


@every_tier
def test_products_change_nothing_and_repeat():
    codes, x = random_codes((40, 50), (-1, 0, 1)), normal(9, 50)
    matrix, bias = PackedMatrix(codes), normal(40)
    copies = x.copy(), bias.copy(), matrix.tiles.copy()
    for array in (x, bias):
        array.flags.writeable = False
    first = matrix.multiply(x, bias)
    assert first.shape == (9, 40)
    assert_same_bits(matrix.multiply(x, bias), first)
    for array, copy in zip((x, bias, matrix.tiles), copies, strict=True):
        assert_same_bits(array, copy)


# --- What a matrix rejects ------------------------------------------------------------------------

ONE = np.ones((2, 40), np.int8)
BAD_MATRICES = {
    "form": (lambda: PackedMatrix(ONE, form="3bit"), "form is '3bit', expected 2bit or trits"),
    "no form": (lambda: PackedMatrix(ONE, form=None), "form is None, expected 2bit or trits"),
    "five levels": (
        lambda: PackedMatrix(ONE, levels=(-2, -1, 0, 1, 2)),
        r"levels is \(-2, -1, 0, 1, 2\), expected two to four that rise evenly",
    ),
    "one level": (lambda: PackedMatrix(ONE, levels=(1,)), "levels is .*rise evenly"),
    "falling levels": (lambda: PackedMatrix(ONE, levels=(1, 0, -1)), "levels is .*rise evenly"),
    "uneven levels": (lambda: PackedMatrix(ONE, levels=(-1, 1, 2)), "levels is .*rise evenly"),
    "equal levels": (lambda: PackedMatrix(ONE, levels=(1, 1)), "levels is .*rise evenly"),
    "another code": (
        lambda: PackedMatrix(ONE, levels=(-1, 0)),
        "values holds a number other than -1 and 0",
    ),
    "other codes of a matrix": (
        lambda: PackedMatrix(TernaryMatrix(3 * ONE, levels=(-3, -1, 1, 3))),
        "values holds a number other than -1, 0 and 1",
    ),
    "sums beyond 32 bits": (
        lambda: PackedMatrix(np.zeros((1, 140_000), np.int8), levels=(-127, 0, 127)),
        "140000 columns of levels",
    ),
    "four levels in trits": (
        lambda: PackedMatrix(ONE, levels=(-3, -1, 1, 3), form="trits"),
        "trits are three levels at most and one scale per row at most, not 4 and 1",
    ),
    "groups in trits": (
        lambda: PackedMatrix(ONE, np.ones((2, 3), np.float32), 16, form="trits"),
        "trits are three levels at most and one scale per row at most, not 3 and 3",
    ),
    "group": (lambda: PackedMatrix(ONE, np.ones((2, 3), np.float32), 15), "group is 15, expected"),
    "scales": (lambda: PackedMatrix(ONE, np.ones((2, 2), np.float32)), "scale has shape"),
    "scales of float64": (lambda: PackedMatrix(ONE, np.ones((2, 1))), "scale is float64"),
    "scale": (lambda: PackedMatrix(ONE, np.inf), "scale is inf, expected finite"),
    "nothing": (lambda: PackedMatrix(np.zeros((0, 3), np.int8)), "values is empty"),
    "float codes": (lambda: PackedMatrix(np.ones((2, 3))), "dtype"),
    "a row": (lambda: PackedMatrix(np.ones(3, np.int8)), "dimensions"),
    "buffer": (lambda: PackedMatrix(ONE, buffer=np.zeros(7, np.uint8)), "size 7"),
    "x of another width": (
        lambda: PackedMatrix(ONE).multiply(normal(3, 41)),
        r"x has shape \(3, 41\), expected \(B, 40\)",
    ),
    "no rows of x": (
        lambda: PackedMatrix(ONE).multiply(normal(0, 40)),
        r"x has shape \(0, 40\), expected \(B, 40\)",
    ),
    "no x": (lambda: PackedMatrix(ONE).multiply(None), r"x is None, expected \(B, 40\)"),
    "x of float64": (lambda: PackedMatrix(ONE).multiply(np.ones((1, 40))), "dtype"),
    "a vector for x": (lambda: PackedMatrix(ONE).multiply(normal(40)), "dimensions"),
    "strided x": (lambda: PackedMatrix(ONE).multiply(normal(2, 80)[:, ::2]), "contiguous"),
    "bias": (
        lambda: PackedMatrix(ONE).multiply(normal(2, 40), normal(3)),
        "bias has 3 elements, expected 2",
    ),
    "bias of float64": (lambda: PackedMatrix(ONE).multiply(normal(2, 40), np.ones(2)), "dtype"),
}


@pytest.mark.parametrize("case", BAD_MATRICES)
def test_packed_matrix_rejects(case):
    call, message = BAD_MATRICES[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_packed_matrix_rejects_other_types():
    for call in (
        lambda: PackedMatrix(None),
        lambda: PackedMatrix([[1]]),
        lambda: PackedMatrix(ONE, levels=None),
        lambda: PackedMatrix(ONE).multiply([[1.0] * 40]),
        lambda: pickle.dumps(PackedMatrix(ONE)),
    ):
        with pytest.raises((TypeError, ValueError)):
            call()


def test_packed_matrix_that_was_never_made_does_not_crash():
    printed = run_child(
        "from legacy1bit.packed import PackedMatrix\n"
        + rejection("PackedMatrix.__new__(PackedMatrix).multiply(np.zeros((1, 1), np.float32))")
    )
    assert "Error" in printed


# --- Whole models ---------------------------------------------------------------------------------

SETTINGS = [
    {"scheme": scheme, "scale": scale, "ternary_embedding": ternary, "model_dim": 136,
     "num_heads": 2, "num_blocks": 1, "ffn_multiplier": 1}
    for scheme, scale, ternary in [
        ("ternary", "tensor", False), ("ternary", "row", True), ("ternary", "128", True),
        ("ternary", "one", True), ("ternary-median", "row", True), ("binary", "128", True),
        ("binary", "tensor", True), ("2bit", "256", False), ("2bit", "row", True),
        ("sign", "tensor", True), ("float", "tensor", False),
    ]
]  # fmt: skip
settings = pytest.mark.parametrize(
    "changes", SETTINGS, ids=lambda c: "-".join(map(str, list(c.values())[:3]))
)


@settings
@pytest.mark.parametrize("form", FORMS)
def test_packed_model_keeps_codes_and_scales(changes, form):
    model = random_model(make_config(**changes))
    if form == "trits" and not has_trits(model.config):
        with pytest.raises(ValueError, match="three levels at most and one scale per row"):
            PackedModel(model, form)
        return
    packed = PackedModel(model, form)
    assert packed.config == model.config
    assert packed.parameters.keys() == model.parameters.keys()
    size = 0
    for name, weights in model.parameters.items():
        kept = packed.parameters[name]
        if not isinstance(weights, TernaryMatrix):
            rounded = oracle.bfloat16(weights).astype(np.float32) if weights.ndim == 2 else weights
            assert_same_bits(kept, rounded)
            assert not np.shares_memory(kept, weights)
            size += weights.nbytes
            continue
        assert isinstance(kept, PackedMatrix)
        assert_same_bits(kept.values, weights.values)
        assert_same_bits(kept.scales, weights.scales)
        assert not np.shares_memory(kept.scales, weights.scales)
        assert kept.group == weights.group
        assert kept.levels == SCHEMES[model.config.scheme].levels
        assert kept.trits == (form == "trits")
        rows, cols = weights.shape
        width = 20 if form == "trits" else 16
        assert kept.nbytes == -(-rows // 32) * -(-cols // width) * 128
        assert kept.tiles.ctypes.data % 64 == 0
        size += kept.nbytes + 4 * weights.scales.size
    assert packed.nbytes == size
    assert f"{size:,} bytes" in repr(packed)
    assert (packed.rotary is None) == (model.config.positions == "none")


def test_packed_model_is_as_small_as_it_says():
    config = ModelConfig(model_dim=320, num_heads=4, num_blocks=2, ternary_embedding=True)
    model = create_legacy_llm(config, 1)
    count = sum(w.values.size for w in model.parameters.values() if isinstance(w, TernaryMatrix))
    rest = sum(w.nbytes for w in model.parameters.values() if not isinstance(w, TernaryMatrix))
    scales = sum(w.scales.nbytes for w in model.parameters.values() if isinstance(w, TernaryMatrix))
    # All sides are multiples of 32, of 16 and of 20: two bits per weight, or eight fifths of one.
    assert PackedModel(model).nbytes == count // 4 + rest + scales
    assert PackedModel(model, "trits").nbytes == count // 5 + rest + scales


@pytest.mark.parametrize("changes", [{}, {"scheme": "float"}, {"ternary_embedding": True}], ids=str)
def test_packed_model_lives_on_without_the_model(changes):
    config = make_config(sub_norm=True, **changes)
    model = random_model(config)
    packed, decoder = PackedModel(model), Decoder(PackedModel(model))
    before = Decoder(packed).prefill([1, 2, 3])
    for weights in model.latent.values():
        weights[...] = 9.0
    model.quantize()
    for weights in model.parameters.values():
        if not isinstance(weights, TernaryMatrix):
            weights[...] = np.nan
    assert_same_bits(Decoder(packed).prefill([1, 2, 3]), before)
    free_legacy_llm(model)
    del model
    gc.collect()
    assert_same_bits(Decoder(packed).prefill([1, 2, 3]), before)
    # And the decoder holds on to the packed one.
    del packed
    gc.collect()
    assert_same_bits(decoder.prefill([1, 2, 3]), before)


def test_packed_model_has_the_codes_even_in_full_precision():
    model = random_model(make_config())
    before = Decoder(PackedModel(model)).prefill([1, 2, 3])
    exact = forward_llm_batch(model, [[1, 2, 3]], logits=True)
    model.use_full_precision(True)
    assert np.abs(forward_llm_batch(model, [[1, 2, 3]], logits=True) - exact).max() > 1e-3
    assert_same_bits(Decoder(PackedModel(model)).prefill([1, 2, 3]), before)


def test_packed_model_needs_no_latent_weights(tmp_path):
    model = random_model(make_config())
    save_model(model, tmp_path / "model")
    loaded = load_model(tmp_path / "model")
    expected = Decoder(PackedModel(model)).prefill([1, 2])
    assert_same_bits(Decoder(PackedModel(loaded)).prefill([1, 2]), expected)


def test_packed_model_rejects_what_is_none():
    model = random_model(make_config())
    for other in (None, 3, PackedModel(model)):
        with pytest.raises(TypeError, match="model"):
            PackedModel(other)
    for form in ("", "trit", None, 2):
        with pytest.raises(ValueError, match=r"form is .*, expected 2bit or trits"):
            PackedModel(model, form)
    with pytest.raises(TypeError, match="a model cannot be copied or pickled"):
        pickle.dumps(PackedModel(model))
    free_legacy_llm(model)
    with pytest.raises(ValueError, match="freed"):
        PackedModel(model)


def test_packed_model_that_was_never_made_does_not_crash():
    printed = run_child(
        "from legacy1bit.inference import Decoder\nfrom legacy1bit.packed import PackedModel\n"
        + rejection("Decoder(PackedModel.__new__(PackedModel))")
        + rejection("Decoder.__new__(Decoder).prefill([0])")
        + rejection("Decoder.__new__(Decoder).generate([0], [0.5])")
    )
    assert printed.count("Error") == 3


def test_packed_model_shares_no_memory_with_the_cached_models():
    packed = PackedModel(model_of(make_config()))
    for name, weights in model_of(make_config()).parameters.items():
        if not isinstance(weights, TernaryMatrix):
            assert not np.shares_memory(weights, packed.parameters[name])


def test_round_to_bfloat16():
    rng = np.random.default_rng(4)
    values = (rng.normal(size=4096) * 10.0 ** rng.integers(-30, 30, 4096)).astype(np.float32)
    assert_same_bits(round_to_bfloat16(values), oracle.bfloat16(values).astype(np.float32))
    # Half way between two, and around there.
    ties = np.array([0x3F808000, 0x3F818000, 0x3F807FFF, 0x3F808001], np.uint32)
    expected = np.array([0x3F800000, 0x3F820000, 0x3F800000, 0x3F810000], np.uint32)
    assert_same_bits(round_to_bfloat16(ties.view(np.float32)), expected.view(np.float32))


def test_round_to_bfloat16_leaves_the_largest_finite():
    largest = np.finfo(np.float32).max
    rounded = round_to_bfloat16(np.array([largest, -largest, 0.0, -0.0], np.float32))
    assert np.isfinite(rounded).all()
    assert (np.abs(rounded[:2]) > 0.99 * largest).all()
    assert np.signbit(rounded).tolist() == [False, True, False, True]
