"""Extreme numbers and extreme shapes, in every instruction set, against float64.

What may be asked of float32, and is asked here, is this. A number that one operation makes is the
exact one, correctly rounded: infinite where float32 does not reach, and a denormal where it is one.
Sums and products of vectors and matrices are within their error bound wherever the magnitudes of
what is added up have a sum that float32 holds; beyond that they may be infinite or no number, and
a training that gets there ends with an error that says so. Softmax and layer norm need no sum of
that kind: they are right for every finite input. Denormals are never flushed to 0.

Hypothesis makes the numbers. `EXTREMES` in the environment is how many examples a test tries.
"""

import math
import os

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from helpers import oracle
from helpers.arrays import (
    EXP_ATOL,
    EXP_RTOL,
    UNIT_ROUNDOFF,
    assert_close,
    assert_same_bits,
    gamma,
    softmax_rtol,
)
from helpers.models import (
    KINDS,
    NearTieError,
    assert_quantized,
    decoder_weights,
    in_every_tier,
    make_config,
    oracle_config,
    oracle_weights,
    random_model,
    random_tokens,
    rounding_effect,
)
from helpers.optimizers import OPTIMIZERS, exact_step, flat
from helpers.runs import make, train
from helpers.sampling import always, sample_token
from legacy1bit import math_ops
from legacy1bit.backward import (
    BackwardPass,
    backward_feed_forward_batch,
    backward_layer_norm,
    cross_entropy_loss,
    d_loss_d_logits,
)
from legacy1bit.data.corpus import Corpus
from legacy1bit.data.shards import TokenStore
from legacy1bit.data.tokenizer import ByteTokenizer
from legacy1bit.dataset import TokenDataset
from legacy1bit.forward import forward_feed_forward_batch, forward_llm_batch
from legacy1bit.hyperparams import ModelConfig, TrainingConfig
from legacy1bit.inference import Decoder
from legacy1bit.model import (
    FeedForward,
    create_legacy_llm,
    create_legacy_llm_gradients,
    load_model,
)
from legacy1bit.packed import PackedMatrix, PackedModel
from legacy1bit.schemes import SCHEMES
from legacy1bit.training.divergence import TrainingDiverged
from legacy1bit.training.trainer import Trainer

EXAMPLES = int(os.environ.get("EXTREMES", "25"))
LARGEST, SMALLEST = float(np.finfo(np.float32).max), 2.0**-149
# Half of the smallest number: what a rounding among the denormals may be off by.
LOST = SMALLEST / 2

EDGES = [
    *(0.0, -0.0, SMALLEST, -SMALLEST, 1e-40, -3e-39, 2.0**-126, 1e-23, 1e-19, 1.0, -1.0),
    *(1.0 + 2.0**-23, 65504.0, 2.0**24 + 2, 1.8e19, -1.9e19, 3e38, -3e38, LARGEST, -LARGEST),
]


def floats(low, high):
    return st.floats(float(np.float32(low)), float(np.float32(high)), width=32)


numbers = st.sampled_from([float(np.float32(edge)) for edge in EDGES]) | floats(-LARGEST, LARGEST)
moderate = floats(-1e3, 1e3)
dims = st.integers(1, 97)


def few(share=1.0):
    """How many examples, where one takes longer than others."""
    return settings(max_examples=max(1, round(share * EXAMPLES)), deadline=None)


def vectors(count=1, elements=numbers):
    """So many arrays of one size; most of an array has one value, and often all of it has."""
    return dims.flatmap(
        lambda n: st.tuples(*[arrays(np.float32, n, elements=elements) for _ in range(count)])
    )


def products(elements=numbers):
    """Two matrices that fit, [M, K] and [K, N], and a third, [M, N]."""
    return st.tuples(dims, dims, dims).flatmap(
        lambda size: st.tuples(
            arrays(np.float32, (size[0], size[1]), elements=elements),
            arrays(np.float32, (size[1], size[2]), elements=elements),
            arrays(np.float32, (size[0], size[2]), elements=elements),
        )
    )


def wide(x):
    return np.asarray(x, np.float64)


def to_float32(exact):
    with np.errstate(over="ignore"):
        return np.asarray(exact, np.float64).astype(np.float32)


def changed(function, x, *args):
    """What a function that works in place makes of a copy of x."""
    x = x.copy()
    function(x, *args)
    return x


def assert_each(function, expected, *args):
    """In place in every instruction set: the exact result, correctly rounded."""
    for found in in_every_tier(changed, function, *args):
        assert_close(found, to_float32(expected), rtol=0, atol=0, dtype=np.float32)


def assert_summed(found, exact, magnitudes, terms):
    """A sum of so many products: within the bound where the sum of magnitudes is in float32."""
    found, exact, magnitudes = np.atleast_1d(found), np.atleast_1d(exact), np.atleast_1d(magnitudes)
    held = magnitudes * (1.0 + gamma(terms)) < LARGEST
    bound = gamma(terms) * magnitudes + terms * LOST
    assert_close(found[held], exact[held], rtol=0, atol=bound[held])
    # A result that float32 does not reach is not made up.
    assert not np.isfinite(found[np.abs(exact) - bound > 2 * LARGEST]).any()


# --- One operation an element ---------------------------------------------------------------------


@few()
@given(vectors(2), numbers)
def test_element_by_element_operations_are_correctly_rounded(xy, scalar):
    x, y = xy
    assert_each(math_ops.add_vector_inplace, wide(x) + y, x, y)
    assert_each(math_ops.multiply_vector_inplace, wide(x) * y, x, y)
    assert_each(math_ops.scalar_mul_vector_inplace, wide(x) * scalar, x, scalar)
    assert_each(math_ops.vector_sub_scalar_inplace, wide(x) - scalar, x, scalar)
    if scalar:
        assert_each(math_ops.vector_div_scalar_inplace, wide(x) / scalar, x, scalar)
    assert_each(math_ops.relu, oracle.relu(x), x)
    assert_each(math_ops.relu2, oracle.relu2(x), x)


@few()
@given(vectors(2), numbers)
def test_a_scaled_vector_is_added_within_the_bound(xy, scalar):
    x, y = xy
    size = np.abs(wide(x)) + np.abs(scalar * wide(y))
    for found in in_every_tier(changed, math_ops.add_scalar_mul_vector_inplace, x, scalar, y):
        assert_summed(found, oracle.add_scalar_mul_vector(x, scalar, y), size, 2)


@few()
@given(vectors(), st.sampled_from([-2.0, -1.0, 0.0, 0.5, 1.0, 2.0, 3.0]))
def test_powers_are_within_two_ulp(x, power):
    (x,) = x
    with np.errstate(over="ignore", divide="ignore"):
        exact = oracle.vector_pow_scalar(x, power)
    # Just above the largest float32 either answer is near.
    exact[np.abs(exact) > LARGEST] = np.copysign(np.inf, exact[np.abs(exact) > LARGEST])
    found = changed(math_ops.vector_pow_scalar_inplace, x, power)
    assert_close(found, exact, rtol=4 * UNIT_ROUNDOFF, atol=2 * LOST)


@few()
@given(vectors(elements=numbers | floats(-110.0, 90.0)))
def test_exponentials_are_within_two_ulp(x):
    (x,) = x
    with np.errstate(over="ignore"):
        exact = oracle.exp(x)
    beyond = exact > LARGEST
    for found in in_every_tier(changed, math_ops.exp_inplace, x):
        assert_close(found[~beyond], exact[~beyond], rtol=EXP_RTOL, atol=EXP_ATOL)
        assert (found[beyond] >= LARGEST * (1.0 - EXP_RTOL)).all()


# --- Sums and products ----------------------------------------------------------------------------


@few()
@given(vectors(2))
def test_sums_are_within_the_bound(xy):
    x, y = xy
    for found in in_every_tier(math_ops.vector_sum, x):
        assert_summed(found, math.fsum(wide(x)), np.abs(wide(x)).sum(), x.size)
    exact, size = math.fsum(wide(x) * y), np.abs(wide(x) * y).sum()
    for found in in_every_tier(math_ops.dot_product, x, y):
        assert_summed(found, exact, size, x.size + 1)


@few()
@given(products())
def test_products_of_matrices_are_within_the_bound(abc):
    a, b, c = abc
    (rows, depth), columns = a.shape, b.shape[1]
    product, size = wide(a) @ b, np.abs(wide(a)) @ np.abs(wide(b))
    calls = (
        ((a, b), {}),
        ((np.ascontiguousarray(a.T), b), {"transpose_a": True}),
        ((a, np.ascontiguousarray(b.T)), {"transpose_b": True, "threads": 3}),
    )
    for args, kwargs in calls:
        for found in in_every_tier(math_ops.matmul, *args, **kwargs):
            assert_summed(found, product, size, depth + 1)
    for found in in_every_tier(lambda: math_ops.matmul(a, b, c.copy(), accumulate=True, threads=2)):
        assert_summed(found, c + product, np.abs(wide(c)) + size, depth + 2)
    x, y = c[:, 0].copy(), c[0].copy()
    for found in in_every_tier(changed, math_ops.outer_product_add_inplace, c, x, y):
        outer = np.outer(wide(x), wide(y))
        assert_summed(found, c + outer, np.abs(wide(c)) + np.abs(outer), 2)
    assert (rows, columns) == found.shape


def product_in_bfloat16(a, b):
    if "bf16" not in math_ops.product_precisions():
        return None
    with math_ops.product_precision("bf16"):
        return math_ops.matmul(a, b)


@few(0.5)
@given(products(floats(-3e38, 3e38) | moderate))
def test_products_in_bfloat16_are_within_the_bound(abc):
    a, b, _ = abc
    answers = list(in_every_tier(product_in_bfloat16, a, b))
    a, b = (oracle.bfloat16(x) for x in (a, b))
    # Denormals count as 0.
    a, b = (np.where(np.abs(x) < 2.0**-126, 0.0, x) for x in (a, b))
    exact, size = a @ b, np.abs(a) @ np.abs(b)
    held = size < LARGEST / 2
    terms = a.shape[1] + 2
    for found in answers:
        if found is not None:
            assert_close(
                found[held],
                exact[held],
                rtol=0,
                atol=(gamma(terms) * size + terms * 2.0**-126)[held],
            )


@few()
@given(products(), st.integers(0, 1 << 30), floats(0.0, 65504.0))
def test_products_of_codes_are_within_the_bound(abc, seed, scale):
    a, b, _ = abc
    codes = np.random.default_rng(seed).integers(-1, 2, (a.shape[1], b.shape[1]), np.int8)
    for name, x in (
        ("matrix_transpose_vector_mul", a[0].copy()),
        ("ternary_matrix_vector_mul", b[0].copy()),
    ):
        exact = getattr(oracle, name)(codes, x, scale)
        # Each number is multiplied by the scale before it meets a code, or a sum of them after.
        size = getattr(oracle, name)(np.ones_like(codes), np.abs(x), max(scale, 1.0))
        for found in in_every_tier(getattr(math_ops, name), codes, x, scale=scale):
            assert_summed(found, exact, size, x.size + 2)


@few()
@given(
    st.sampled_from(KINDS),
    dims,
    vectors(2),
    st.integers(0, 1 << 30),
    floats(2.0**-24, 65504.0),
)
def test_packed_products_are_those_of_numbers_rounded_to_int8(kind, rows, xy, seed, scale):
    (levels, form), x = kind, np.stack(xy)
    codes = np.random.default_rng(seed).choice(np.array(levels, np.int8), (rows, x.shape[1]))
    matrix = PackedMatrix(codes, np.full((1, 1), scale, np.float32), levels=levels, form=form)
    step = oracle.activation_step(x)
    exact = scale * (wide(x) @ codes.T)
    # Half a step for each number, or all of it where a row is too small to have steps.
    lost = np.where(127.0 * step < 2.0**-120, 127.0, 0.5 + 127 * gamma(4)) * step
    size = scale * np.abs(codes).sum(axis=1) * (np.abs(x).max(axis=1, keepdims=True) + lost)
    bound = scale * np.abs(codes).sum(axis=1) * lost + gamma(8) * size + codes.shape[1] * 127 * LOST
    held = (size < LARGEST) & (scale * step < LARGEST)
    first = None
    for found in in_every_tier(matrix.multiply, x):
        assert_close(found[held], exact[held], rtol=0, atol=bound[held])
        first = found if first is None else first
        assert_same_bits(found, first)


@few()
@given(vectors())
def test_activations_are_rounded_to_half_a_step(x):
    (x,) = x
    top = np.abs(wide(x)).max()
    step = top / 127.0
    first = None
    for found in in_every_tier(changed, math_ops.quantize_activations, x):
        assert np.isfinite(found).all()
        assert_close(found, x, rtol=0, atol=step * (0.5 + 127 * gamma(4)) + LOST)
        first = found if first is None else first
        # But for the sign of a zero.
        assert_same_bits(found + 0, first + 0)
        if 2.0**-120 <= top < 3.3e38:
            assert_close(found / step, np.rint(found / step), rtol=0, atol=127 * gamma(4))
        elif top < 2.0**-122:
            # Steps too small for float32.
            assert_same_bits(found, x)


@few(0.5)
@given(
    st.sampled_from([*SCHEMES]),
    st.sampled_from(["tensor", "row", "one"]),
    st.integers(0, 1 << 30),
    numbers,
    numbers,
)
def test_weights_of_any_size_have_the_codes_of_the_scheme(scheme, scale, seed, one, other):
    config = make_config(scheme=scheme, scale=scale, num_blocks=1)
    model, rng = create_legacy_llm(config, 1), np.random.default_rng(seed)
    for values in model.latent.values():
        if values.ndim == 2:
            values[...] = rng.choice(np.float32([one, other, -one, 0.0]), values.shape)
    if scheme == "sign":
        for values in model.latent.values():
            np.sign(values, out=values)
    # The mean of magnitudes may lie above float16, and even above float32 before it is one.
    for _ in in_every_tier(model.quantize):
        assert_quantized(model)


# --- Softmax and losses ---------------------------------------------------------------------------


@few()
@given(vectors(2))
def test_softmax_is_right_for_every_finite_input(xy):
    x = np.stack(xy)
    for found in in_every_tier(changed, math_ops.softmax, x):
        assert_close(found, oracle.softmax(x), rtol=softmax_rtol(x), atol=2 * EXP_ATOL)
        assert_close(wide(found).sum(axis=1), np.ones(2), rtol=0, atol=1e-3)


@few()
@given(vectors(), st.integers(0, 96))
def test_losses_are_right_for_every_distribution(x, target):
    p = to_float32(oracle.softmax(x[0]))
    target %= p.size
    exact = wide(p)
    exact[target] -= 1.0
    for found in in_every_tier(d_loss_d_logits, p, target):
        assert_close(found, to_float32(exact), rtol=0, atol=0)
        assert cross_entropy_loss(p, target) == pytest.approx(-math.log(max(p[target], 1e-9)))


@few()
@given(
    st.integers(1, 97).flatmap(lambda n: arrays(np.float32, n, elements=numbers)),
    st.integers(0, 1 << 30),
)
def test_loss_and_gradient_of_every_finite_logits(logits, seed):
    """A model whose logits are its biases; the loss may be beyond float32."""
    config = make_config(vocab_size=logits.size, model_dim=2, num_heads=1, num_blocks=1)
    model = random_model(config)
    model.latent["output.weight"][...] = 0.0
    model.latent["output.bias"][...] = logits
    model.quantize()
    tokens = random_tokens(config, 2, 3, seed=seed)
    targets = random_tokens(config, 2, 3, seed=seed + 1)
    chosen = targets.ravel()
    p = oracle.softmax(logits)
    log_p = wide(logits) - wide(logits).max() + np.log(p.max())
    expected = p - np.bincount(chosen, minlength=logits.size) / chosen.size
    for _ in in_every_tier(lambda: None):
        gradients = create_legacy_llm_gradients(config)
        loss, count = BackwardPass(model, 2, 3).run(tokens, targets, gradients)
        assert count == 6
        assert_close(loss, -log_p[chosen].sum(), rtol=gamma(200), atol=gamma(200))
        assert all(np.isfinite(value).all() for value in gradients.parameters.values())
        # A difference of logits is rounded: the softmax's bound, six times.
        bound = p * softmax_rtol(logits) + gamma(12) * (1.0 + p)
        assert_close(gradients.parameters["output.bias"], expected, rtol=0, atol=bound)


@pytest.mark.parametrize(
    "options", [{}, {"top_k": 3}, {"top_p": 0.9}, {"temperature": 0.0}], ids=str
)
@few()
@given(vectors(), st.floats(0.0, 1.0, exclude_max=True))
def test_tokens_are_drawn_from_every_finite_logits(options, x, number):
    (x,) = x
    for token in in_every_tier(sample_token, x, always(number), **options):
        assert 0 <= token < x.size
        assert wide(x).max() - x[token] < 200.0


# --- Layer norm -----------------------------------------------------------------------------------


def norm_bounds(x, gain, exact):
    """How far off a norm's output may be.

    Where the mean is beyond 1,000 standard deviations, or the squares overflow, it is worked out in
    float64. Else the mean's rounding counts, so many deviations as it has.
    """
    output, mean, inv_std = exact
    normed = np.abs((wide(x) - mean) * inv_std)
    mean_size = np.abs(wide(x)).mean() * inv_std
    relative = gamma(8) * normed
    if mean_size < 1100.0 and 1.0 / inv_std < 2e19:
        relative = gamma(x.size + 9) * (normed + mean_size)
    return np.abs(gain) * relative * 1.01 + 3 * UNIT_ROUNDOFF * np.abs(output) + 4 * LOST


def layer_norm(x, gain, bias):
    output = x.copy()
    moments = math_ops.layer_norm_forward(output, gain, bias)
    return output, moments


around = st.tuples(dims, numbers, st.integers(0, 1 << 30), st.integers(0, 30)).map(
    lambda drawn: to_float32(
        np.clip(
            drawn[1]
            * (
                1
                + UNIT_ROUNDOFF
                * np.random.default_rng(drawn[2]).integers(
                    -(2 ** drawn[3]), 2 ** drawn[3], drawn[0], endpoint=True
                )
            ),
            -LARGEST,
            LARGEST,
        )
    )
)


@few(2)
@given(vectors().map(lambda one: one[0]) | around, st.integers(0, 1 << 30))
def test_layer_norm_is_right_for_every_finite_input(x, seed):
    gain, bias = np.random.default_rng(seed).normal(size=(2, x.size)).astype(np.float32)
    exact = oracle.layer_norm_forward(x, gain, bias)
    first = None
    for found, (mean, inv_std) in in_every_tier(layer_norm, x, gain, bias):
        assert_close(found, exact[0], rtol=0, atol=norm_bounds(x, gain, exact), dtype=np.float32)
        assert_close(mean, exact[1], rtol=0, atol=gamma(x.size + 2) * np.abs(wide(x)).mean() + LOST)
        assert_close(inv_std, exact[2], rtol=1e-2, atol=LOST)
        first = found if first is None else first
        assert_same_bits(found, first)


@few()
@given(dims, numbers, st.integers(0, 1 << 30))
def test_layer_norm_of_equal_numbers_is_beta(n, value, seed):
    gain, bias = np.random.default_rng(seed).normal(size=(2, n)).astype(np.float32)
    x = np.full(n, value, np.float32)
    for found, (mean, inv_std) in in_every_tier(layer_norm, x, gain, bias):
        # Up to 3.2 the mean is a float32 sum's.
        slack = 0.0 if abs(value) > 3.2 else gamma(n + 2) * abs(value) / math.sqrt(1e-5)
        assert_close(found, bias, rtol=0, atol=np.abs(gain) * slack + UNIT_ROUNDOFF * np.abs(bias))
        assert_close(mean, value, rtol=gamma(n + 2), atol=LOST)
        assert_close(inv_std, 1e-5**-0.5, rtol=1e-4, atol=0)


@few(2)
@given(vectors().map(lambda one: one[0]) | around, st.integers(0, 1 << 30))
def test_backward_layer_norm_is_right_for_every_finite_input(x, seed):
    gain, d, bias = np.random.default_rng(seed).normal(size=(3, x.size)).astype(np.float32)
    for _, (mean, inv_std) in in_every_tier(layer_norm, x, gain, bias):
        d_gamma, d_beta = np.zeros((2, x.size), np.float32)
        d_x = backward_layer_norm(d, x, gain, mean, inv_std, d_gamma, d_beta)
        # From the moments that it got, as they are.
        hat = (wide(x) - mean) * inv_std
        g = wide(gain) * d
        of_g, of_gx = g.mean(), (g * hat).mean()
        slack, hats = gamma(x.size + 9), np.abs(hat).max()
        size = np.abs(g).max() * (1.0 + hats * (1.0 + hats))
        assert_close(d_beta, d, rtol=0, atol=0)
        # Halves of denormals are rounded.
        tiny = 8 * LOST * inv_std * np.abs(d).max()
        assert_close(d_gamma, d * hat, rtol=gamma(4), atol=tiny + 2 * LOST)
        expected = inv_std * (g - of_g - hat * of_gx)
        assert_close(d_x, expected, rtol=0, atol=inv_std * (slack * size + 9 * tiny) + 2 * LOST)


# --- The feed-forward layer -----------------------------------------------------------------------


@few()
@given(vectors(3, numbers | moderate), st.sampled_from(["relu", "relu2"]))
def test_activations_and_their_gradients(xyz, activation):
    """A layer of unit matrices is its activation."""
    (x, d, _), n = xyz, xyz[0].size
    one, zero = np.eye(n, dtype=np.float32), np.zeros(n, np.float32)
    layer = FeedForward(one, zero, one, zero, activation)
    # What overflows spoils its neighbours in a product with 0.
    fits = np.abs(x) < (1e19 if activation == "relu2" else LARGEST / 2)
    x = np.where(fits, x, np.float32(1.0))
    d = np.clip(d, -LARGEST / 2, LARGEST / 2)
    exact = to_float32(oracle.activate(wide(x), activation))
    slope = oracle.activate_backward(wide(d), wide(x), activation)
    fits = np.abs(slope) < LARGEST / 2
    d[~fits], slope[~fits] = 0.0, 0.0
    for _ in in_every_tier(lambda: None):
        hidden = np.empty((1, n), np.float32)
        found = forward_feed_forward_batch(layer, x[None], hidden)
        assert_close(found[0], exact, rtol=0, atol=0)
        gradients = {name: np.zeros_like(value) for name, value in
                     {"wi": one, "bi": zero, "wo": one, "bo": zero}.items()}  # fmt: skip
        d_x = backward_feed_forward_batch(layer, d[None], x[None], hidden, gradients)
        assert_close(gradients["bi"], slope, rtol=2 * UNIT_ROUNDOFF, atol=2 * LOST)
        assert_close(d_x[0], slope, rtol=2 * UNIT_ROUNDOFF, atol=2 * LOST)


# --- Optimizers -----------------------------------------------------------------------------------

STEPPED = make_config(vocab_size=5, model_dim=6, num_blocks=1, num_heads=1, ffn_multiplier=1)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@few()
@given(
    st.lists(floats(-1e15, 1e15) | st.sampled_from(EDGES[:13]), min_size=1, max_size=9),
    st.integers(0, 1 << 30),
    st.sampled_from([0.0, 1.0]),
)
def test_steps_of_every_gradient_are_right(kind, values, seed, clip):
    gradients, rng = create_legacy_llm_gradients(STEPPED), np.random.default_rng(seed)
    gradients.flat[...] = rng.choice(np.float32(values), gradients.flat.size)
    norm = math.sqrt(math.fsum(wide(gradients.flat) ** 2))
    model = random_model(STEPPED)
    optimizer = kind(model)
    optimizers = iter([kind(random_model(STEPPED)) for _ in math_ops.simd_levels()])
    with np.errstate(under="ignore"):
        exact, bounds = exact_step(
            optimizer,
            gradients.flat,
            float(np.float32(0.01)),
            clip / norm if 0 < clip < norm else 1.0,
            {},
        )
    for optimizer in in_every_tier(lambda: next(optimizers)):
        found_norm = optimizer.step(gradients, 0.01, clip)
        # The square of what is below 1e-22 is 0.
        assert_close(found_norm, norm, rtol=gamma(600), atol=1e-22 * math.sqrt(gradients.flat.size))
        moments = flat(optimizer.model), optimizer.first, optimizer.second
        for value, wanted, bound in zip(moments, exact, bounds, strict=True):
            assert_close(value, wanted, rtol=0, atol=bound + 1e-20 * np.abs(wanted) + 1e-30)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@few()
@given(floats(2e19, LARGEST), st.integers(0, 1 << 30), st.booleans())
def test_a_gradient_whose_square_overflows_changes_nothing(kind, value, place, negative):
    gradients = create_legacy_llm_gradients(STEPPED)
    gradients.flat[place % gradients.flat.size] = -value if negative else value
    optimizer = kind(random_model(STEPPED))
    before = flat(optimizer.model)
    for norm in in_every_tier(optimizer.step, gradients, 0.01, 1.0):
        assert norm == math.inf
        assert optimizer.steps == 0
        assert_same_bits(flat(optimizer.model), before)


# --- Whole models ---------------------------------------------------------------------------------


@st.composite
def model_configs(draw, **fixed):
    """Models of 1 to 97 numbers and any number of heads that divides them."""
    dim = draw(dims)
    heads = draw(st.sampled_from([n for n in range(1, dim + 1) if dim % n == 0]))
    rotary = dim // heads % 2 == 0 and draw(st.booleans())
    chosen = {
        "vocab_size": draw(st.sampled_from([1, 2, 3, 17])),
        "model_dim": dim,
        "num_heads": heads,
        "num_blocks": draw(st.integers(1, 2)),
        "ffn_multiplier": draw(st.integers(1, 2)),
        "sequence_length": 16,
        "positions": "rope" if rotary else "none",
        "scheme": draw(st.sampled_from([*SCHEMES, "float"])),
        "scale": draw(st.sampled_from(["tensor", "row"])),
        "activation": draw(st.sampled_from(["relu", "relu2"])),
        "sub_norm": draw(st.booleans()),
        "final_norm": draw(st.booleans()),
        "output_bias": draw(st.booleans()),
        "ternary_embedding": draw(st.booleans()),
    }
    return ModelConfig(**{**chosen, **fixed})


shapes = st.sampled_from([(1, 1), (1, 7), (3, 1), (2, 5)])


def near(found, exact, effect, what, roundings=32, floor=0.0):
    size = UNIT_ROUNDOFF * max(float(np.abs(exact).max()), floor)
    assert_close(found, exact, rtol=0, atol=roundings * (effect + size) + 64 * LOST, what=what)


@few()
@given(model_configs(), shapes, st.integers(0, 99))
def test_models_of_every_shape_have_the_oracles_loss_and_gradients(config, shape, seed):
    model = random_model(config, seed)
    tokens, targets = (random_tokens(config, *shape, seed=seed + i) for i in range(2))

    def exact(weights):
        loss, gradients = oracle.loss_and_gradients(weights, oracle_config(config), tokens, targets)
        return {"loss": np.array(loss), **gradients}

    answer, effects = rounding_effect(exact, oracle_weights(model))
    _, p = oracle.forward(oracle_weights(model), oracle_config(config), tokens)
    # What cancels does so among numbers of this size.
    floor = max(float(np.abs(value).max()) for value in answer.values())
    if config.model_dim == 2:
        # Of a norm of two numbers nothing but epsilon's part comes back: all else cancels.
        floor *= 1e-5**-0.5
    for found in in_every_tier(forward_llm_batch, model, tokens):
        near(found, p, effects["loss"] + 1e-5, "probabilities")
        gradients = create_legacy_llm_gradients(config)
        loss, count = BackwardPass(model, *shape).run(tokens, targets, gradients)
        near(loss / count, answer["loss"], effects["loss"], "loss", floor=1.0)
        for name, value in gradients.parameters.items():
            near(value, answer[name], effects[name], name, floor=floor)
    if config.vocab_size == 1:
        assert loss == 0.0
        assert not gradients.flat.any()


WEIGHTS = {
    "the largest embedding": {"embedding": 1e38},
    "a large stream": {"embedding": 1e25},
    "denormals": {"": 1e-40},
    "nothing": {"": 0.0},
    "a tiny embedding": {"embedding": 1e-42},
    "tiny matrices": {"blocks": 1e-38},
    "large matrices": {"wi": 1e8, "wv": 1e12, "wo": 1e-8},
    "large logits": {"output": 1e25},
}


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("equal", [False, True])
@few(0.2)
@given(
    model_configs(scheme="float", final_norm=True, ternary_embedding=False),
    shapes,
    st.integers(0, 99),
)
def test_models_of_extreme_weights_have_the_oracles_probabilities(kind, equal, config, shape, seed):
    model = random_model(config, seed)
    for name, values in model.latent.items():
        for part, factor in WEIGHTS[kind].items():
            if part in name and values.ndim == 2:
                values[...] = factor if equal else factor * np.clip(values, -3, 3)
    model.quantize()
    tokens, targets = (random_tokens(config, *shape, seed=seed + i) for i in range(2))

    def exact(weights):
        logits, p = oracle.forward(weights, oracle_config(config), tokens)
        return {"p": p, "logits": logits}

    answer, effects = rounding_effect(exact, oracle_weights(model))
    for found in in_every_tier(forward_llm_batch, model, tokens):
        logits = forward_llm_batch(model, tokens, logits=True)
        # A norm of numbers that are all but equal makes much of their rounding.
        near(logits, answer["logits"], effects["logits"], "logits", roundings=256 if equal else 32)
        assert_close(found, oracle.softmax(logits), rtol=softmax_rtol(logits), atol=2 * EXP_ATOL)
        gradients = create_legacy_llm_gradients(config)
        loss, _ = BackwardPass(model, *shape).run(tokens, targets, gradients)
        assert math.isfinite(loss)
        assert np.isfinite(gradients.flat).all()


@few(0.5)
@given(model_configs(), st.integers(1, 9), st.integers(0, 9), st.sampled_from([1, 3]))
def test_decoders_of_every_shape_answer_as_the_oracle(config, time, seed, threads):
    model = random_model(config, seed)
    tokens = random_tokens(config, 1, time, seed=seed)[0]

    def exact(weights):
        return {"logits": oracle.decode(weights, oracle_config(config), tokens)}

    try:
        answer, effects = rounding_effect(exact, decoder_weights(model))
    except NearTieError:
        assume(False)
    packed, first = PackedModel(model), None
    for decoder in in_every_tier(lambda: Decoder(packed, threads)):
        found = decoder.prefill_logits(tokens)
        near(found, answer["logits"], effects["logits"], "logits")
        first = found if first is None else first
        if config.ternary_embedding and config.scheme != "float":
            assert_same_bits(found, first)


# --- Whole trainings ------------------------------------------------------------------------------


def few_tokens(folder, vocab, training=None, **model):
    """A training on tokens of which there are only so many."""
    config = ModelConfig(**{"vocab_size": vocab, "num_blocks": 1, **model})
    ids = np.arange(40 * config.sequence_length) % vocab
    store = TokenStore([ids.astype(np.uint16)], np.array([0]), ids.size)
    tokens = TokenDataset(store, config.sequence_length, vocab)
    corpus = Corpus("tokens", tokens, tokens, tokenizer=ByteTokenizer())
    chosen = TrainingConfig(**{"steps": 1, "batch_size": 1, "warmup_steps": 0, **(training or {})})
    return Trainer(folder, config, chosen, corpus, {"name": "tokens"})


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "sgd"])
@pytest.mark.parametrize("vocab", [1, 2])
@pytest.mark.parametrize("length", [1, 4])
@pytest.mark.parametrize("batch", [1, 3])
def test_trainings_of_the_smallest_sizes(tmp_path, optimizer, vocab, length, batch):
    run = few_tokens(
        tmp_path / "run",
        vocab,
        {"steps": 3, "batch_size": batch, "optimizer": optimizer},
        model_dim=1,
        num_heads=1,
        positions="none",
        sequence_length=length,
    )
    done, losses, records = train(run)
    assert done
    assert run.step == 3
    assert np.isfinite(losses).all()
    if vocab == 1:
        assert losses == [0.0] * len(losses)
        assert records[-1]["val_loss"] == 0.0
    assert load_model(run.folder).config == run.model.config


def test_a_step_of_every_width_and_number_of_heads(tmp_path):
    for dim in range(1, 98):
        for heads in [n for n in range(1, dim + 1) if dim % n == 0]:
            run = few_tokens(
                tmp_path / "run",
                1 + dim % 4,
                {"threads": 1 + heads % 2, "batch_size": 1 + dim % 2, "steps": 1},
                model_dim=dim,
                num_heads=heads,
                ffn_multiplier=1,
                positions="none" if dim // heads % 2 else "rope",
                sequence_length=1 + heads % 3,
            )
            loss, norm = run.train_step()
            run.close()
            assert 0.0 <= loss < 10.0, (dim, heads)
            if dim % 4 == 0:
                assert loss == norm == 0.0, (dim, heads)
            else:
                assert norm > 0.0 or dim == 1, (dim, heads)
            assert np.isfinite(flat(run.model)).all(), (dim, heads)


# --- What float32 does not hold -------------------------------------------------------------------


def test_training_stops_at_a_gradient_whose_square_overflows(tmp_path):
    run = make(tmp_path / "run", float_steps=100)
    # Each logit is beyond 1e20, and so is what the norm's output gets back.
    run.model.latent["output.weight"][...] *= 1e25
    before = flat(run.model)
    with pytest.raises(
        TrainingDiverged,
        match=r"the gradient's norm is inf at step 1 \(first in the gradient of .*: up to .*; "
        r"the largest weight is .*, in output\.weight: try a lower --learning-rate",
    ):
        run.train_step()
    run.close()
    assert_same_bits(flat(run.model), before)
