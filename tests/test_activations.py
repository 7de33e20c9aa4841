"""Activations, gates and RMS norms over all of float32, in every instruction set.

A feed-forward layer of width 1 is its activation; one of two inputs, of which the first is the gate
and the second is multiplied, is a gated activation; and one whose gate is 1, between unit matrices,
is its norm. So are their gradients. Bounds are in units of the roundoff u = 2^-24, half a unit in
the last place of a number just above a power of two.
"""

import itertools

import numpy as np
import pytest

from helpers import oracle
from helpers.arrays import UNIT_ROUNDOFF, assert_close, assert_same_bits, gamma
from helpers.models import every_tier, in_every_tier
from legacy1bit import math_ops
from legacy1bit.backward import backward_feed_forward_batch
from legacy1bit.forward import forward_feed_forward_batch
from legacy1bit.model import FeedForward

LARGEST = float(np.finfo(np.float32).max)
# The smallest number, and so twice the largest error of what underflows.
LOST = 2.0**-149
ONE = np.ones((1, 1), np.float32)
FIRST, SECOND = np.eye(2, dtype=np.float32)[:, None]
activations = pytest.mark.parametrize("activation", oracle.ACTIVATIONS)

MAGNITUDES = [
    *(0.0, LOST, 2.0**-140, 2.0**-126, 1e-30, 1e-10, 1e-3, 0.25, 1.278, 2.5, 5.5, 9.99, 10.01),
    *(11.5, 87.3, 88.7, 103.9, 104.1, 1e3, 1e10, 1e19, 1e30, 1e38, LARGEST),
]


def every_size():
    """float32[N], N odd: all sizes, dense where the functions bend."""
    extremes = np.float32([*MAGNITUDES, *(-np.array(MAGNITUDES))])
    rng = np.random.default_rng(1)
    exponents = 10.0 ** rng.uniform(-44, 38, 400) * rng.choice([-1.0, 1.0], 400)
    return np.concatenate(
        [extremes, np.linspace(-12, 12, 2001), np.linspace(-110, 110, 401), exponents]
    ).astype(np.float32)


def rounding_of(x, activation):
    """The relative error of the activation's factor of x, and of its slope, in roundoffs.

    SiLU and GELU are x / (1 + e) or x e / (1 + e), e = exp(-|v|): e is off by 4, and by what v is
    off; the sums, products and quotients by 5 more. Of SiLU v is x. Of GELU it is a polynomial of
    five operations and two rounded constants, off by 7 v.
    """
    if activation in ("relu", "relu2"):
        return 2.0
    v = np.abs(oracle._gelu_argument(x)[0]) if activation == "gelu" else 0.0
    # Where e is below every float32, an error of it has no meaning.
    return 9.0 + 7.0 * np.minimum(v, 110.0)


def activation_bound(x, activation):
    """The absolute error of ``act(x)``; where e is a denormal it is off by 2^-148."""
    exact = np.abs(oracle.activate(x, activation))
    underflow = LOST
    if activation in ("silu", "gelu"):
        underflow = LOST * (1.0 + 2.0 * np.minimum(np.abs(x), 110.0))
    return rounding_of(x, activation) * UNIT_ROUNDOFF * exact + underflow


def slope_bound(x, activation):
    """The absolute error of the slope, s + x s (1 - s) v' of SiLU and GELU, s = sigmoid(v)."""
    rounding = rounding_of(x, activation) * UNIT_ROUNDOFF
    if activation in ("relu", "relu2"):
        return rounding * np.abs(oracle.activate_backward(1.0, x, activation)) + LOST
    v, rise = oracle._gelu_argument(x) if activation == "gelu" else (x, np.ones_like(x))
    s, rest = oracle.sigmoid(v), oracle.sigmoid(-v)
    second = np.abs(x) * s * rest * rise
    size = np.minimum(np.abs(x), 110.0) * np.minimum(rise, 1e4)
    return (
        (rounding + UNIT_ROUNDOFF) * s
        + (2 * rounding + 12 * UNIT_ROUNDOFF) * second
        + (1.0 + size) * 8 * LOST
    )


def assert_within(actual, exact, bound, what):
    """Within the bound, where neither bound nor answer is out of float32's range."""
    in_range = np.abs(exact) + bound < LARGEST
    assert_close(actual[in_range], exact[in_range], rtol=0, atol=bound[in_range], what=what)
    beyond = np.abs(exact) - bound > LARGEST * (1 + UNIT_ROUNDOFF)
    assert_same_bits(actual[beyond], np.copysign(np.inf, exact[beyond]).astype(np.float32), what)


def layer_of_one(activation):
    zero = np.zeros(1, np.float32)
    return FeedForward(ONE, zero, ONE, zero, activation)


@every_tier
@activations
def test_activations_are_within_their_bounds(activation):
    values = every_size()
    x = values.astype(float)
    with np.errstate(over="ignore"):
        exact, bound = oracle.activate(x, activation), activation_bound(x, activation)
    for count in (1, 3, 16, 17, values.size):
        found = forward_feed_forward_batch(layer_of_one(activation), values[:count, None])[:, 0]
        assert_within(found, exact[:count], bound[:count], f"{activation} of {count}")


@every_tier
@activations
def test_activations_of_vectors_are_those_of_the_layer(activation):
    for count in (1, 3, 16, 17, 97, 2850):
        values = every_size()[:count]
        expected = forward_feed_forward_batch(layer_of_one(activation), values[:, None])[:, 0]
        getattr(math_ops, activation)(values)
        # The layer adds 0, and leaves no -0.
        assert_same_bits(values + np.float32(0.0), expected)


@activations
def test_activations_have_the_same_bits_in_every_instruction_set(activation):
    """Text is the same on every CPU."""
    values = every_size()[:, None]
    layer = layer_of_one(activation)
    found = list(in_every_tier(forward_feed_forward_batch, layer, values))
    for other in found[1:]:
        assert_same_bits(other, found[0])


@every_tier
@activations
def test_slopes_are_within_their_bounds(activation):
    values, layer = every_size(), layer_of_one(activation)
    # What has no activation in float32 needs no slope.
    with np.errstate(over="ignore"):
        values = values[oracle.activate(values.astype(float), activation) < LARGEST]
    x = values.astype(float)
    for scale in (1.0, -3.0, 1e-30, 1e30):
        d = np.full((values.size, 1), scale, np.float32)
        with np.errstate(over="ignore"):
            exact = oracle.activate_backward(float(d[0, 0]), x, activation)
            bound = slope_bound(x, activation) * abs(float(d[0, 0])) * 1.01 + 2 * LOST
        gradients = {name: np.zeros((1,) * (1 + (name[0] == "w")), np.float32)
                     for name in ("wi", "bi", "wo", "bo")}  # fmt: skip
        found = backward_feed_forward_batch(layer, d, values[:, None], values[:, None], gradients)
        assert_within(found[:, 0], exact, bound, f"{activation}, times {scale}")


@every_tier
@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_activations_of_what_is_not_finite(activation):
    """x / (1 + exp(-x)) of minus infinity has no value, though its limit is 0."""
    values = np.float32([np.nan, np.inf, -np.inf, 1.0])
    found = forward_feed_forward_batch(layer_of_one(activation), values[:, None])[:, 0]
    assert np.isnan(found[[0, 2]]).all()
    assert found[1] == np.inf
    assert np.isfinite(found[3])


@every_tier
@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_activations_of_the_most_negative_numbers_are_0(activation):
    """A sigmoid that is merely small would leave something of 1e38, and of a gradient of 1e38."""
    values = np.float32([-104.0, -200.0, -1e3, -1e10, -1e30, -1e38, -LARGEST])[:, None]
    layer = layer_of_one(activation)
    found = forward_feed_forward_batch(layer, values)
    assert (np.abs(found) < 1e-40).all()
    gradients = {name: np.zeros((1,) * (1 + (name[0] == "w")), np.float32)
                 for name in ("wi", "bi", "wo", "bo")}  # fmt: skip
    d = np.full_like(values, 1e30)
    d_x = backward_feed_forward_batch(layer, d, values, values, gradients)
    assert (np.abs(d_x) < 1e-10).all()


def gated_layer(activation):
    """Of an input (gate, x): act(gate) x, and 0."""
    return FeedForward(SECOND, None, np.ascontiguousarray(FIRST.T), None, activation, wg=FIRST)


def gated_pairs():
    """float32[N, 2] of all sizes."""
    gates = every_size()
    x = np.random.default_rng(2).permutation(every_size())
    few = np.float32(list(itertools.product((-1e38, -5.0, 0.0, 0.3, 9.0, 1e38), repeat=2)))
    return np.concatenate([np.stack([gates, x], axis=1), few])


@every_tier
@activations
def test_gated_activations_are_within_their_bounds(activation):
    pairs = gated_pairs()
    gate, x = pairs.astype(float).T
    with np.errstate(over="ignore", invalid="ignore"):
        act, bound = oracle.activate(gate, activation), activation_bound(gate, activation)
        exact = act * x
        # What of the factor is out of float32's range, is so of the product.
        fits = np.abs(act) + bound < LARGEST
        bound = bound * np.abs(x) + 2 * UNIT_ROUNDOFF * np.abs(exact) + LOST
    hidden, gates = np.empty((2, len(pairs), 1), np.float32)
    found = forward_feed_forward_batch(gated_layer(activation), pairs, hidden, gates)
    assert_same_bits(hidden[:, 0], pairs[:, 1] + np.float32(0.0))
    assert_same_bits(gates[:, 0], pairs[:, 0] + np.float32(0.0))
    assert not found[:, 1][fits & (np.abs(exact) + bound < LARGEST)].any()
    assert_within(found[:, 0][fits], exact[fits], bound[fits], activation)


@activations
def test_gated_activations_have_the_same_bits_in_every_instruction_set(activation):
    pairs, layer = gated_pairs(), gated_layer(activation)
    found = list(in_every_tier(forward_feed_forward_batch, layer, pairs))
    for other in found[1:]:
        assert_same_bits(other, found[0])


@every_tier
@activations
def test_gradients_of_gated_activations_are_within_their_bounds(activation):
    pairs = gated_pairs()
    # Products of three numbers: smaller ones, so that few are out of range.
    pairs = pairs[(np.abs(pairs) < 1e15).all(axis=1)]
    gate, x = pairs.astype(float).T
    layer = gated_layer(activation)
    for scale in (1.0, -2.5, 1e-3):
        d = np.zeros_like(pairs)
        d[:, 0] = scale
        gradients = {name: np.zeros(shape, np.float32) for name, shape in
                     (("wg", (1, 2)), ("wi", (1, 2)), ("wo", (2, 1)))}  # fmt: skip
        found = backward_feed_forward_batch(
            layer, d, pairs, np.ascontiguousarray(pairs[:, 1:]), gradients,
            np.ascontiguousarray(pairs[:, :1]),
        )  # fmt: skip
        times = float(np.float32(scale))
        act, slope = (
            oracle.activate(gate, activation),
            oracle.activate_backward(1, gate, activation),
        )
        for column, exact, bound, other in (
            (0, slope, slope_bound(gate, activation), x),
            (1, act, activation_bound(gate, activation), np.ones_like(x)),
        ):
            exact = times * other * exact
            # The product of d and x may underflow before it meets the slope.
            lost = (2.0 + np.abs(slope)) * 2 * LOST
            bound = 1.01 * np.abs(times * other) * bound + 3 * UNIT_ROUNDOFF * np.abs(exact) + lost
            assert_within(found[:, column], exact, bound, f"{activation}, column {column}")


# --- RMS norm -------------------------------------------------------------------------------------


def norm_layer(gain, epsilon):
    """A layer that is the RMS norm of its input: its gate is relu(1)."""
    n = gain.size
    unit, zero, one = np.eye(n, dtype=np.float32), np.zeros((n, n), "f4"), np.ones(n, "f4")
    return FeedForward(unit, None, unit, None, "relu", gain, wg=zero, bg=one, epsilon=epsilon,
                       rms=True)  # fmt: skip


def norm_rows(n):
    """float32[M, N] of every size: equal, mixed, with one number that outweighs all others."""
    rng = np.random.default_rng(n)
    scales = np.float32([LOST, 1e-40, 1e-30, 1e-20, 1e-10, 1e-3, 1.0, 1e3, 1e10, 1e18, 1e19, 1e25,
                         1e37, 1e38])[:, None]  # fmt: skip
    with np.errstate(under="ignore"):
        normal = np.clip(rng.normal(size=(len(scales), n)), -3, 3).astype(np.float32) * scales
        equal = np.ones((len(scales), n), np.float32) * scales
        lone = rng.normal(size=(len(scales), n)).astype(np.float32)
    lone[:, n // 2] = scales[:, 0]
    return np.concatenate([normal, equal, lone, np.zeros((1, n), np.float32)])


norm_sizes = pytest.mark.parametrize("n", [1, 2, 3, 6, 10, 17, 33, 64, 100])


@every_tier
@norm_sizes
@pytest.mark.parametrize("epsilon", [1e-12, 1e-6, 0.1])
def test_rms_norm_is_within_its_bound(n, epsilon):
    """All squares have a sign: their sum is off by n u at most, its root by half of that."""
    x, gain = norm_rows(n), np.random.default_rng(n).normal(1.0, 0.5, n).astype(np.float32)
    exact = oracle.rms_norm(x, gain, float(np.float32(epsilon)))
    found = forward_feed_forward_batch(norm_layer(gain, epsilon), x)
    tolerance = gamma(n // 2 + 8) * np.abs(exact) + (1.0 + np.abs(gain)) * LOST
    # Squares below 2^-126 lose digits: each is off by 2^-149 beside epsilon.
    lost = LOST / epsilon * np.abs(exact)
    assert_close(found, exact, rtol=0, atol=tolerance + lost, dtype=np.float32)


@norm_sizes
def test_rms_norm_has_the_same_bits_in_every_instruction_set(n):
    x, gain = norm_rows(n), np.random.default_rng(n).normal(1.0, 0.5, n).astype(np.float32)
    found = list(in_every_tier(forward_feed_forward_batch, norm_layer(gain, 1e-6), x))
    for other in found[1:]:
        assert_same_bits(other, found[0])


@every_tier
@norm_sizes
def test_gradients_of_rms_norm_are_within_their_bounds(n):
    rng, epsilon = np.random.default_rng(n), float(np.float32(1e-6))
    x, gain = norm_rows(n), rng.normal(1.0, 0.5, n).astype(np.float32)
    layer, one = norm_layer(gain, epsilon), np.ones((1, n), np.float32)
    for row in x:
        row, d = row[None], rng.normal(size=(1, n)).astype(np.float32)
        gradients = {name: np.zeros((n, n) if name[0] == "w" else n, np.float32)
                     for name in ("wg", "bg", "wi", "wo", "gamma")}  # fmt: skip
        d_x = backward_feed_forward_batch(layer, d, row, row, gradients, one)
        exact, d_gain = oracle.rms_norm_backward(d.astype(float), row, gain, epsilon)
        inverse = oracle._inverse_rms(row.astype(float), epsilon)[0, 0]
        hat = np.abs(row) * inverse
        g = np.abs(gain * d.astype(float))
        # The numbers x / rms are off by what the norm is; half of a denormal by half of LOST.
        rounding = gamma(n + 20)
        tiny = 8 * LOST * inverse * np.abs(d).max()
        assert_close(gradients["gamma"], d_gain, rtol=0,
                     atol=(rounding * hat * np.abs(d))[0] + tiny + 2 * LOST)  # fmt: skip
        size = g + hat * (g * hat).mean()
        tiny = inverse * 9 * tiny * (1 + g.max()) * (1 + hat.max()) + 2 * LOST
        assert_close(d_x, exact, rtol=0, atol=2 * rounding * inverse * size + tiny, what=f"{row}")


@every_tier
def test_rms_norm_of_what_is_not_finite_is_not():
    layer = norm_layer(np.ones(1, np.float32), 1e-6)
    x = np.float32([[np.nan], [np.inf], [-np.inf], [2.0]])
    found = forward_feed_forward_batch(layer, x)[:, 0]
    assert np.isnan(found[:3]).all()
    assert_close(found[3], 1.0, rtol=1e-6, atol=0)
