"""Linear maps of codes in int8, forward, back to the input and to the weights, against integers."""

import functools

import numpy as np
import pytest

from helpers import oracle
from helpers.arrays import assert_close, assert_same_bits, gamma
from helpers.cases import together
from helpers.models import every_tier, make_config, random_matrix, random_model
from legacy1bit import math_ops
from legacy1bit.backward import BackwardPass, backward_output_layer_batch
from legacy1bit.forward import forward_output_layer_batch
from legacy1bit.math_ops import product_precision
from legacy1bit.model import LegacyLLMGradients, TernaryMatrix
from legacy1bit.schemes import SCHEMES

# Rows around strips of 32 and tiles of 16, on either side: each is the depth of one of the two.
SHAPES = ((1, 1), (2, 15), (31, 16), (32, 17), (33, 19), (64, 48), (70, 63), (5, 130), (129, 65))
SCALES = ("tensor", 0)
# The fewest that are multiplied so, and around what is quantized and summed at a time.
ROWS = (16, 17, 40, 129, 515)

schemes = pytest.mark.parametrize("scheme", ["ternary", "binary", "2bit"])


def both_ways(matrix, x, d_out, bias=None, precision="int8"):
    """The products of a matrix, forward and back to the input, and its weights' gradient."""
    bias = np.zeros(matrix.shape[0], np.float32) if bias is None else bias
    gradients = {"weight": np.zeros(matrix.shape, np.float32), "bias": np.zeros_like(bias)}
    with product_precision(precision):
        out = forward_output_layer_batch(matrix, bias, x)
        d_x = backward_output_layer_batch(matrix, d_out, x, gradients)
    return out, d_x, gradients["weight"]


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def whole_numbers(rows, cols, scales=1.0):
    """Numbers whose rows, times these scales, rounding to int8 leaves as they are."""
    x = np.random.default_rng(rows).integers(-127, 128, (rows, cols))
    x[:, 0] = np.where(np.arange(rows) % 2, 127, -127)
    return (x / scales).astype(np.float32)


def row_scales(matrix):
    """What the columns of an output's gradient are multiplied by before they are rounded."""
    return 1.0 if matrix.scales.size == 1 else matrix.scales[:, 0]


@every_tier
@schemes
@together("shape", SHAPES)
@together("scale", SCALES)
def test_products_of_whole_numbers_are_exact(scheme, shape, scale):
    matrix = random_matrix(scheme, shape, scale)
    dense, bias = matrix.dense().astype(np.float64), np.arange(shape[0], dtype=np.float32)
    for rows in ROWS:
        x = whole_numbers(rows, shape[1])
        d_out = whole_numbers(rows, shape[0], row_scales(matrix))
        out, d_x, _ = both_ways(matrix, x, d_out, bias)
        assert_same_bits(out + 0, (x @ dense.T + bias).astype(np.float32) + 0)
        assert_same_bits(d_x + 0, (d_out @ dense).astype(np.float32) + 0)


@functools.cache
def without_ties(rows, cols, scales):
    """Random numbers, none of them near half way between two steps."""
    for seed in range(200):
        x = normal(rows, cols, seed=seed) * np.float32(10.0) ** np.arange(rows)[:, None] / 1e9
        x = x.astype(np.float32)
        # As the product does, in float32.
        scaled = x * np.float32(scales)
        steps = scaled / oracle.activation_step(scaled)
        if np.abs(np.abs(steps - np.rint(steps)) - 0.5).min() > 127 * gamma(4):
            return x, scaled
    raise AssertionError("no data without a tie")


@every_tier
@schemes
def test_products_round_each_row_to_int8(scheme):
    codes = random_matrix(scheme, (45, 77), "tensor").values
    scales = np.abs(normal(45, 1)) + np.float32(0.1)
    matrix = TernaryMatrix(codes, scales, levels=SCHEMES[scheme].levels)
    x, _ = without_ties(16, 77, 1.0)
    d_out, folded = without_ties(16, 45, tuple(scales[:, 0].tolist()))
    out, d_x, _ = both_ways(matrix, x, d_out)
    one = np.ones((1, 1))
    for actual, arguments in (
        (out, (codes, scales, 77, x)),
        (d_x, (codes.T, one, 45, folded)),
    ):
        sizes = np.abs(arguments[0]), np.abs(arguments[1]), arguments[2], np.abs(arguments[3])
        room = gamma(7) * oracle.packed_product(*sizes)
        assert_close(actual, oracle.packed_product(*arguments), rtol=0, atol=room)


@every_tier
@pytest.mark.parametrize("scale", SCALES)
@schemes
def test_the_largest_sums_do_not_overflow(scheme, scale):
    levels = SCHEMES[scheme].levels
    for shape in ((3, 12288), (12288, 3)):
        scales = np.float32([[0.5]]) if scale else np.full((shape[0], 1), 0.5, np.float32)
        for code in (levels[0], levels[-1]):
            matrix = TernaryMatrix(np.full(shape, code, np.int8), scales, levels=levels)
            for number in (127.0, -127.0):
                x, d_out = (np.full((45, size), number, np.float32) for size in shape[::-1])
                out, d_x, _ = both_ways(matrix, x, d_out)
                assert (out == 0.5 * code * number * shape[1]).all()
                assert (d_x == 0.5 * code * number * shape[0]).all()


def away_from_ties(rows, cols):
    """Random numbers, of which those near half way between two steps of their row are made 0."""
    x = normal(rows, cols)
    steps = x / oracle.activation_step(x)
    x[np.abs(np.abs(steps - np.rint(steps)) - 0.5) < 127 * gamma(4)] = 0.0
    return x


def weights_gradient(x, d_out, into=None):
    """The gradient of weights, of which only the shape is used, plus what it is added to."""
    shape = d_out.shape[1], x.shape[1]
    gradients = {
        "weight": np.zeros(shape, np.float32) if into is None else into.copy(),
        "bias": np.zeros(shape[0], np.float32),
    }
    with product_precision("int8"):
        backward_output_layer_batch(TernaryMatrix(np.ones(shape, np.int8)), d_out, x, gradients)
    return gradients["weight"]


# Around a tile's rows (4, 6, 14) and columns (2, 8, 16 and 32), what is packed at a time (240 rows)
# and the tokens of a sum (512); odd numbers of tokens fill half of a pair.
GRADIENTS = (
    (1, 1, 16),
    (4, 2, 17),
    (6, 16, 31),
    (7, 17, 40),
    (13, 15, 129),
    (15, 33, 511),
    (33, 32, 512),
    (29, 31, 513),
    (241, 70, 515),
    (250, 19, 1025),
)


@every_tier
@together("size", GRADIENTS)
def test_gradients_of_weights_are_those_of_the_rounded_activations(size):
    """Each gradient of an output is off by half of its feature's step at most."""
    rows, cols, tokens = size
    x = away_from_ties(tokens, cols)
    d_out, into = normal(tokens, rows, seed=1), normal(rows, cols, seed=2)
    codes, steps = oracle.round_to_int8(x)
    folded = np.abs(steps * d_out)
    d_steps = folded.max(axis=0) / 32767
    room = 0.501 * np.outer(d_steps, np.abs(codes).sum(axis=0))
    room += gamma(8) * (folded.T @ np.abs(codes) + np.abs(into))
    expected = into + d_out.T.astype(np.float64) @ (codes * steps)
    assert_close(weights_gradient(x, d_out, into), expected, rtol=0, atol=room)


@every_tier
@together("size", GRADIENTS)
def test_gradients_of_weights_are_exact_for_whole_numbers(size):
    rows, cols, tokens = size
    x, rng = whole_numbers(tokens, cols), np.random.default_rng(tokens)
    d_out = rng.integers(-32767, 32768, (tokens, rows)).astype(np.float32)
    # Every sum has a largest number: no step is rounded.
    d_out[::16] = rng.choice(np.float32([-32767, 32767]), d_out[::16].shape)
    expected = np.zeros((rows, cols), np.float32)
    count = -(-tokens // 512)
    for i in range(count):
        part = slice(tokens * i // count, tokens * (i + 1) // count)
        sums = d_out[part].astype(np.int64).T @ x[part].astype(np.int64)
        expected += sums.astype(np.float32)
    assert_same_bits(weights_gradient(x, d_out) + 0, expected + 0)


@every_tier
def test_the_largest_sums_of_gradients_do_not_overflow():
    for tokens in (512, 1024):
        for x_sign, d_sign in ((1, 1), (1, -1), (-1, -1)):
            x = np.full((tokens, 19), x_sign * 127.0, np.float32)
            d_out = np.full((tokens, 21), d_sign * 32767.0, np.float32)
            exact = float(x_sign * d_sign * 127 * 32767 * tokens)
            assert (weights_gradient(x, d_out) == np.float32(exact)).all()


@every_tier
def test_gradients_of_weights_tell_what_is_not_finite():
    x, d_out, into = normal(530, 37), normal(530, 27), normal(27, 37)
    x[5], d_out[:, 4] = 0.0, 0.0
    usual = weights_gradient(x, d_out, into)
    assert_same_bits(usual[4], into[4])
    for bad in (np.nan, np.inf, -np.inf):
        for token, feature in ((0, 0), (529, 26), (300, 8)):
            changed = d_out.copy()
            changed[token, feature] = bad
            found = weights_gradient(x, changed, into)
            assert np.isnan(found[feature]).all()
            others = np.arange(27) != feature
            assert_same_bits(found[others], usual[others])
        changed = x.copy()
        changed[7, 3] = bad
        assert np.isnan(weights_gradient(changed, d_out, into)).all()


def test_gradients_of_weights_have_the_same_bits_in_every_instruction_set():
    former, rng = math_ops.simd_level(), np.random.default_rng(5)
    factors = 10.0 ** rng.integers(-12, 12, (1030, 1)).astype(np.float32)
    x, d_out, into = normal(1030, 131) * factors, normal(1030, 70) * factors, normal(70, 131)
    answers = []
    try:
        for level in math_ops.simd_levels():
            math_ops.set_simd_level(level)
            answers.append(weights_gradient(x, d_out, into))
    finally:
        math_ops.set_simd_level(former)
    for found in answers:
        assert_same_bits(found, answers[0])


@every_tier
@pytest.mark.parametrize("scale", SCALES)
def test_rows_of_zeros_and_rows_that_are_not_finite(scale):
    matrix = random_matrix("ternary", (40, 67), scale)
    x, d_out, bias = normal(33, 67), normal(33, 40), normal(40)
    x[5] = d_out[6] = 0.0
    usual = both_ways(matrix, x, d_out, bias)[:2]
    assert_same_bits(usual[0][5], bias)
    assert (usual[1][6] == 0.0).all()
    for bad in (np.nan, np.inf, -np.inf):
        for place in (0, 39):
            one, other = x.copy(), d_out.copy()
            one[3, place] = other[32, place] = bad
            changed = both_ways(matrix, one, other, bias)[:2]
            for before, after, row in zip(usual, changed, (3, 32), strict=True):
                assert np.isnan(after[row]).all()
                others = np.arange(33) != row
                assert_same_bits(after[others], before[others])


@schemes
@pytest.mark.parametrize("scale", SCALES)
def test_products_have_the_same_bits_everywhere(scheme, scale):
    """In every instruction set, and however many rows there are around a row."""
    codes = random_matrix(scheme, (70, 131), "tensor").values
    scales = normal(1, 1) if scale else normal(70, 1)
    matrix = TernaryMatrix(codes, scales, levels=SCHEMES[scheme].levels)
    rng, former = np.random.default_rng(6), math_ops.simd_level()
    factors = 10.0 ** rng.integers(-30, 30, (600, 1)).astype(np.float32)
    x, d_out, bias = normal(600, 131) * factors, normal(600, 70) * factors, normal(70)
    answers = []
    try:
        for level in math_ops.simd_levels():
            math_ops.set_simd_level(level)
            answers += [
                [part[:16] for part in both_ways(matrix, x[:rows], d_out[:rows], bias)[:2]]
                for rows in (16, 77, 600)
            ]
    finally:
        math_ops.set_simd_level(former)
    for out, d_x in answers:
        assert_same_bits(out, answers[0][0])
        assert_same_bits(d_x, answers[0][1])


@every_tier
@pytest.mark.parametrize(
    ("matrix", "rows"),
    [
        (random_matrix("ternary", (40, 50), "tensor"), 15),
        (random_matrix("ternary", (40, 50), 16), 30),
        (random_matrix("2bit", (40, 300), 128), 30),
        (TernaryMatrix(np.full((20, 30), 2, np.int8), levels=(-2, 0, 2)), 30),
        (TernaryMatrix(np.ones((2, 12289), np.int8)), 20),
        (TernaryMatrix(np.ones((12289, 2), np.int8)), 20),
        (normal(40, 50), 30),
    ],
    ids=["few rows", "groups", "groups of four levels", "other codes", "wide", "high", "floats"],
)
def test_the_other_products_stay_those_of_float32(matrix, rows):
    x, d_out = normal(rows, matrix.shape[1]), normal(rows, matrix.shape[0])
    expected = both_ways(matrix, x, d_out, precision="float32")
    for one, other in zip(both_ways(matrix, x, d_out), expected, strict=True):
        assert_same_bits(one, other)


@every_tier
@pytest.mark.parametrize(
    "changes",
    [{}, {"scale": "row"}, {"scheme": "2bit"}, {"sub_norm": True, "ternary_embedding": True}],
    ids=str,
)
def test_gradients_are_near_those_of_float32(changes):
    config = make_config(vocab_size=60, model_dim=48, num_heads=4, sequence_length=40, **changes)
    model, rng = random_model(config), np.random.default_rng(3)
    tokens, targets = rng.integers(0, 60, (2, 6, 40))
    results = {}
    for precision in ("float32", "int8"):
        gradients = [LegacyLLMGradients(config) for _ in range(2)]
        with product_precision(precision):
            losses = [BackwardPass(model, 6, 40, 2).run(tokens, targets, one) for one in gradients]
        assert losses[0] == losses[1]
        assert_same_bits(gradients[0].flat, gradients[1].flat)
        results[precision] = losses[0][0], gradients[0].flat.astype(np.float64)
    (loss, gradient), (other, near) = results.values()
    assert other != loss
    assert other == pytest.approx(loss, rel=2.0**-8)
    assert np.linalg.norm(near - gradient) < 0.06 * np.linalg.norm(gradient)


@every_tier
def test_precision_lasts_as_long_as_its_context():
    matrix, x, d_out = random_matrix("ternary", (40, 50), 0), normal(20, 50), normal(20, 40)
    level = math_ops.simd_level()
    exact = both_ways(matrix, x, d_out, precision="float32")[0]
    with product_precision("int8"):
        assert math_ops.simd_level() == level
        rough = forward_output_layer_batch(matrix, np.zeros(40, np.float32), x)
        assert_same_bits(both_ways(matrix, x, d_out, precision="float32")[0], exact)
        assert_same_bits(forward_output_layer_batch(matrix, np.zeros(40, np.float32), x), rough)
    assert (rough != exact).any()
    with pytest.raises(KeyError), product_precision("int8"):
        raise KeyError
    assert_same_bits(forward_output_layer_batch(matrix, np.zeros(40, np.float32), x), exact)
