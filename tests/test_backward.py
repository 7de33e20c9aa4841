"""The backward pass against the oracle's gradients, in every instruction set (departures 2 to 5).

The oracle is held against finite differences and PyTorch by its own tests; the compiled model's
gradients are once more here. Tolerances are those of `models.assert_near`.
"""

import functools
import itertools
import math
import os

import numpy as np
import pytest

from helpers import oracle
from helpers.arrays import UNIT_ROUNDOFF, assert_close, assert_same_bits, gamma
from helpers.models import (
    CODED,
    LIMIT,
    LONG_ROWS,
    MODELS,
    PADDINGS,
    SHORT_ROWS,
    TAKE_ALL,
    as_float64,
    assert_near,
    attention_cases,
    bad_starts,
    every_tier,
    exact_dense,
    float_twin,
    layers,
    make_config,
    model_of,
    models,
    oracle_config,
    oracle_weights,
    outer_tiers,
    places_of,
    random_matrix,
    random_model,
    random_tokens,
    rejection,
    rounding_effect,
    rows,
    run_child,
    scaled_matrices,
    schemes,
    starts_of,
    without_ties,
)
from helpers.torch_model import torch_loss
from legacy1bit.backward import (
    BackwardPass,
    backward_bytes,
    backward_embedding,
    backward_embedding_batch,
    backward_feed_forward,
    backward_feed_forward_batch,
    backward_layer_norm,
    backward_layer_norm_batch,
    backward_llm,
    backward_llm_batch,
    backward_multi_head_attention,
    backward_multi_head_attention_batch,
    backward_output_layer,
    backward_output_layer_batch,
    backward_transformer_block,
    backward_transformer_block_batch,
    cross_entropy_loss,
    d_loss_d_logits,
    ignore_padding,
)
from legacy1bit.forward import (
    forward_bytes,
    forward_feed_forward_batch,
    forward_llm,
    forward_multi_head_attention_batch,
    forward_transformer_block_batch_with_context,
)
from legacy1bit.math_ops import quantize_activations
from legacy1bit.model import create_legacy_llm_gradients, create_transformer_block_context


def empty_gradients(weights):
    return {name: np.zeros(value.shape, np.float32) for name, value in weights.items()}


def check_backward(run, expected, weights):
    """``run(gradients)`` gives d_x and adds to the gradients: from 0, and then once more."""
    gradients = empty_gradients(weights)
    d_x = run(gradients)
    assert_near({"x": d_x, **gradients}, expected)
    again = run(gradients)
    assert_same_bits(again, d_x, "the second time")
    exact, effects = expected
    twice = {name: value * (1.0 + (name != "x")) for name, value in exact.items()}
    effects = {name: value * 2.0 for name, value in effects.items()}
    assert_near({"x": again, **gradients}, (twice, effects))


# --- Loss -----------------------------------------------------------------------------------------


@every_tier
@pytest.mark.parametrize("n", [1, 3, 17, 256])
def test_cross_entropy_loss_is_minus_the_logarithm(n):
    p = oracle.softmax(rows(n)).astype(np.float32)
    for target in (0, n // 2, n - 1):
        assert cross_entropy_loss(p, target) == pytest.approx(-math.log(p[target]), rel=1e-15)


@pytest.mark.parametrize("p", [0.0, 1e-30, 9.9e-10])
def test_cross_entropy_loss_is_clamped(p):
    loss = cross_entropy_loss(np.array([1.0, p], np.float32), 1)
    assert loss == pytest.approx(-math.log(1e-9), rel=1e-15)
    above = np.float32(1.1e-9)
    loss = cross_entropy_loss(np.array([1.0, above], np.float32), 1)
    assert loss == pytest.approx(-math.log(float(above)), rel=1e-15)


@every_tier
@pytest.mark.parametrize("n", [1, 3, 17, 256])
def test_d_loss_d_logits_is_probabilities_less_one_hot(n):
    p = oracle.softmax(rows(n)).astype(np.float32)
    before = p.copy()
    for target in (0, n // 2, n - 1):
        expected = p.astype(np.float64)
        expected[target] -= 1.0
        actual = d_loss_d_logits(p, target)
        assert_close(actual, expected.astype(np.float32), rtol=0, atol=0, dtype=np.float32)
    assert_same_bits(p, before)


@pytest.mark.parametrize("function", [cross_entropy_loss, d_loss_d_logits])
def test_losses_reject_other_targets_and_kinds(function):
    p = np.full(4, 0.25, np.float32)
    for target in (-1, 4, 1000):
        with pytest.raises(IndexError, match=f"target is {target}, expected 0 to 3"):
            function(p, target)
    for bad in (p.astype(np.float64), p[None], [0.25] * 4):
        with pytest.raises((TypeError, ValueError)):
            function(bad, 0)


# --- Layer norm -----------------------------------------------------------------------------------


def norm_case(dim, shape):
    arrays = {"d": rows(*shape, dim, seed=8), "x": rows(*shape, dim), "gamma": rows(dim, seed=9)}
    _, mean, inv_std = oracle.layer_norm_forward(arrays["x"], arrays["gamma"], 0.0)
    arrays |= {"mean": mean.astype(np.float32), "inv_std": inv_std.astype(np.float32)}

    def exact(w):
        # The oracle works out the statistics itself; here they are what rounding has left of them.
        inv_std = w["inv_std"][..., None]
        normalised = (w["x"] - w["mean"][..., None]) * inv_std
        g = w["gamma"] * w["d"]
        of_g, of_gn = (part.mean(axis=-1, keepdims=True) for part in (g, g * normalised))
        d_gamma, d_beta = (
            part.reshape(-1, dim).sum(axis=0) for part in (w["d"] * normalised, w["d"])
        )
        return {"x": inv_std * (g - of_g - normalised * of_gn), "gamma": d_gamma, "beta": d_beta}

    exact_arrays = {**as_float64(arrays), "mean": mean, "inv_std": inv_std}
    expected = oracle.layer_norm_backward(arrays["d"].astype(float), arrays["x"], arrays["gamma"])
    for value, name in zip(expected, ("x", "gamma", "beta"), strict=True):
        assert_close(exact(exact_arrays)[name], value, rtol=1e-12, atol=1e-12, what=name)
    return arrays, rounding_effect(exact, as_float64(arrays))


@every_tier
@pytest.mark.parametrize("shape", [(), (1,), (9,), (2, 5)])
@pytest.mark.parametrize("dim", [1, 2, 7, 16, 33, 97])
def test_backward_layer_norm_is_the_oracles(dim, shape):
    arrays, expected = norm_case(dim, shape)
    d, x, gain, mean, inv_std = arrays.values()
    weights = {"gamma": gain, "beta": gain}
    calls = [
        lambda g: backward_layer_norm_batch(
            d, x, gain, np.atleast_1d(mean), np.atleast_1d(inv_std), g["gamma"], g["beta"]
        )
    ]
    if shape == ():
        calls.append(
            lambda g: backward_layer_norm(
                d, x, gain, float(mean), float(inv_std), g["gamma"], g["beta"]
            )
        )
    for call in calls:
        check_backward(call, expected, weights)


@every_tier
def test_backward_layer_norm_gives_beta_the_gradient_of_its_own_element():
    """Departure 2: C adds the sum of the gradient to every element."""
    d, x, gain, mean, inv_std = norm_case(9, ())[0].values()
    d_gamma, d_beta = np.zeros(9, np.float32), np.zeros(9, np.float32)
    backward_layer_norm(d, x, gain, float(mean), float(inv_std), d_gamma, d_beta)
    assert_same_bits(d_beta, d)
    of_c = oracle.fault2_layer_norm_d_beta(d)
    assert np.ptp(of_c) == 0.0
    assert (np.abs(d_beta - of_c) > 0.01).any()


# --- Output layer and embedding -------------------------------------------------------------------


@every_tier
@pytest.mark.parametrize("kind", ["float", "ternary"])
@pytest.mark.parametrize(("vocab", "dim"), [(1, 1), (11, 6), (67, 33), (5, 130)])
def test_backward_output_layer_is_the_oracles(kind, vocab, dim):
    config = make_config(vocab_size=vocab, model_dim=dim, num_heads=1, positions="none",
                         scheme=kind, ternary_embedding=True, num_blocks=1)  # fmt: skip
    model = model_of(config)
    output, weights = model.parameters["output.weight"], oracle_weights(model, "output.")
    for shape in ((), (3,), (20,), (2, 9)):
        x, d_logits = rows(*shape, dim), rows(*shape, vocab, seed=8)

        def exact(w):
            values = oracle.linear_backward(w["d"], w["x"], w["weight"])
            return dict(zip(("x", "weight", "bias"), values, strict=True))

        expected = rounding_effect(exact, {**as_float64({"d": d_logits, "x": x}), **weights})
        names = (backward_output_layer_batch, *((backward_output_layer,) if shape == () else ()))
        for function in names:
            check_backward(
                lambda g, f=function, d=d_logits, x=x: f(output, d, x, g), expected, weights
            )


@every_tier
@scaled_matrices
def test_backward_output_layer_of_scaled_codes_is_exact(scheme, shape, group):
    matrix, rng = random_matrix(scheme, shape, group), np.random.default_rng(3)
    for count in (1, 29):
        # Sums of at most 600 3 * 8 * 9 in eighths: float32 holds them.
        x = rng.integers(-9, 10, (count, shape[1])).astype(np.float32)
        d_logits = rng.integers(-9, 10, (count, shape[0])).astype(np.float32)
        gradients = {"weight": np.ones(shape, np.float32), "bias": np.ones(shape[0], np.float32)}
        d_x = backward_output_layer_batch(matrix, d_logits, x, gradients)
        expected = oracle.linear_backward(d_logits.astype(float), x, exact_dense(matrix))
        start = (0.0, 1.0, 1.0)
        for actual, value, more in zip((d_x, *gradients.values()), expected, start, strict=True):
            assert_close(actual, value + more, rtol=0, atol=0, dtype=np.float32)


@every_tier
def test_backward_output_layer_gives_the_matrix_a_gradient_of_its_own_shape():
    """Departure 5: C's is transposed, which only shows where vocabulary and dimension differ."""
    for vocab, dim in ((11, 6), (8, 8)):
        x, d_logits = rows(5, dim), rows(5, vocab, seed=8)
        weight = np.ones((vocab, dim), np.float32)
        gradients = empty_gradients({"weight": weight, "bias": weight[:, 0]})
        backward_output_layer_batch(weight, d_logits, x, gradients)
        of_c = oracle.fault5_output_weight_gradient(d_logits, x)
        assert of_c.shape == (dim, vocab)
        bound = gamma(5) * (np.abs(d_logits).astype(float).T @ np.abs(x))
        assert_close(gradients["weight"], of_c.T, rtol=0, atol=bound, dtype=np.float32)
        if vocab == dim:
            assert np.abs(gradients["weight"] - of_c).max() > 0.1


@every_tier
@pytest.mark.parametrize("dim", [1, 6, 33])
@pytest.mark.parametrize("padding", ["none", "middle", "all"])
def test_backward_embedding_is_the_oracles(padding, dim):
    config = make_config(vocab_size=5)
    tokens = random_tokens(config, 3, 7, padding)
    d_output = rows(3, 7, dim)
    start = rows(5, dim, seed=9)
    expected = start + oracle.embedding_backward(d_output.astype(np.float64), tokens, 5)
    absolute = np.abs(start) + oracle.embedding_backward(np.abs(d_output).astype(float), tokens, 5)
    bound = gamma(21) * absolute
    together, column, one_by_one = start.copy(), start.copy(), start.copy()
    backward_embedding_batch(tokens, d_output, together)
    assert_close(together, expected, rtol=0, atol=bound, dtype=np.float32)
    backward_embedding_batch(tokens.reshape(-1), d_output.reshape(-1, dim), column)
    assert_same_bits(column, together)
    for token, d_row in zip(tokens.reshape(-1), d_output.reshape(-1, dim), strict=True):
        backward_embedding(int(token), d_row, one_by_one)
    assert_same_bits(one_by_one, together)


def test_backward_embedding_rejects_other_ids_and_shapes():
    d_embedding = np.zeros((5, 3), np.float32)
    for token in (-1, 6, 1 << 20):
        with pytest.raises(IndexError, match=f"{token}, expected 0 to 4"):
            backward_embedding(token, rows(3), d_embedding)
        with pytest.raises(IndexError, match=f"{token}, expected 0 to 4"):
            backward_embedding_batch([[0, token]], rows(1, 2, 3), d_embedding)
    for tokens, d_output in (([0, 1], rows(3, 3)), ([0], rows(1, 4)), ([[0]], rows(1, 3))):
        with pytest.raises(ValueError, match="d_output has shape"):
            backward_embedding_batch(tokens, d_output, d_embedding)
    with pytest.raises(ValueError, match="empty"):
        backward_embedding_batch(np.zeros(0, np.int32), np.zeros((0, 3), "f4"), d_embedding)
    assert not d_embedding.any()


# --- Feed forward ---------------------------------------------------------------------------------


@without_ties
def ffn_case(config, shape, draw):
    weights = oracle_weights(model_of(config), "blocks.0.ffn.")
    x, d_output = (rows(*shape, config.model_dim, seed=(seed, draw)) for seed in (5, 8))

    def exact(w):
        d_x, gradients = oracle.feed_forward_backward(w["d"], w["x"], w, oracle_config(config))
        return {"x": d_x, **gradients}

    arrays = {**as_float64({"d": d_output, "x": x}), **weights}
    return x, d_output, weights, rounding_effect(exact, arrays)


def check_feed_forward(config, shapes):
    ffn = model_of(config).blocks[0].ffn
    for shape in shapes:
        x, d_output, weights, expected = ffn_case(config, shape)
        hidden = np.empty((*shape, config.ffn_dim), np.float32)
        forward_feed_forward_batch(ffn, x, hidden)
        before = [array.copy() for array in (x, d_output, hidden)]
        functions = [backward_feed_forward_batch] + [backward_feed_forward] * (shape == ())
        for function in functions:
            check_backward(
                lambda g, f=function, d=d_output, x=x, h=hidden: f(ffn, d, x, h, g),
                expected,
                weights,
            )
        for array, value in zip((x, d_output, hidden), before, strict=True):
            assert_same_bits(array, value, "the input")


@every_tier
@schemes
@pytest.mark.parametrize("activation", oracle.ACTIVATIONS)
@pytest.mark.parametrize("dim", [1, 6, 17, 33])
def test_backward_feed_forward_is_the_oracles(scheme, activation, dim):
    config = make_config(model_dim=dim, num_heads=1, positions="none", scheme=scheme,
                         activation=activation, num_blocks=1)  # fmt: skip
    check_feed_forward(config, ((), (1,), (3,), (15,), (2, 5)))


@every_tier
@layers
def test_backward_feed_forward_with_other_settings_is_the_oracles(changes):
    dims = (1, 6, 33) + ((129, 257) if "scale" in changes else ())
    for dim, activation in zip(dims, itertools.cycle(oracle.ACTIVATIONS), strict=False):
        config = make_config(model_dim=dim, num_heads=1, positions="none", activation=activation,
                             num_blocks=1, ffn_multiplier=3 if dim < 99 else 1,
                             **changes)  # fmt: skip
        check_feed_forward(config, ((), (3,), (15,)))


@every_tier
def test_backward_feed_forward_takes_the_values_after_the_activation():
    """Departure 3: C takes those from before it for the gradient of Wo."""
    config = make_config(activation="relu", num_blocks=1, scheme="float")
    ffn = model_of(config).blocks[0].ffn
    x, d_output, weights, expected = ffn_case(config, (3,))
    hidden = np.empty((3, 36), np.float32)
    forward_feed_forward_batch(ffn, x, hidden)
    gradients = empty_gradients(weights)
    backward_feed_forward_batch(ffn, d_output, x, hidden, gradients)
    of_c = oracle.fault3_feed_forward_d_wo(d_output.astype(float), x.astype(float), weights)
    negative = (hidden < 0).all(axis=0)
    assert negative.any()
    # Where nothing came through, Wo has no say; C gives it a gradient all the same.
    assert not gradients["wo"][:, negative].any()
    assert (np.abs(of_c[:, negative]) > 0.01).any()
    positive = (hidden > 0).all(axis=0)
    atol = 8 * (expected[1]["wo"] + UNIT_ROUNDOFF * np.abs(of_c).max())
    assert_close(gradients["wo"][:, positive], of_c[:, positive], rtol=0, atol=atol)


# --- Attention and block --------------------------------------------------------------------------


@without_ties
def layer_case(config, batch, time, padding, layer, documents=None, *, draw):
    """x, tokens, d_output, weights and the exact gradients of an attention layer or a block."""
    weights = oracle_weights(model_of(config), f"blocks.0.{layer}")
    tokens = random_tokens(config, batch, time, padding)
    x, d_output = (rows(batch, time, config.model_dim, seed=(seed, draw)) for seed in (5, 8))
    backward = oracle.attention_backward if layer else oracle.block_backward

    def exact(w):
        d_x, gradients = backward(
            w["d"], w["x"], tokens, w, oracle_config(config), starts_of(documents)
        )
        return {"x": d_x, **gradients}

    arrays = {**as_float64({"d": d_output, "x": x}), **weights}
    return x, tokens, d_output, weights, rounding_effect(exact, arrays)


def room_for(config, batch, time):
    return create_transformer_block_context(
        config.model_dim, config.ffn_dim, config.num_heads, batch, time, config.sub_norm
    )


def check_attention(config, batch, time, padding, documents=None):
    x, tokens, d_output, weights, expected = layer_case(
        config, batch, time, padding, "attention.", documents
    )
    attention, context = model_of(config).blocks[0].attention, room_for(config, batch, time)
    allowed, starts = tokens != config.pad_token, starts_of(documents)
    # What is left in a context from before makes no difference.
    context.probs.fill(np.nan)
    forward_multi_head_attention_batch(attention, x, allowed, context, starts)
    before = x.copy(), d_output.copy()
    check_backward(
        lambda g: backward_multi_head_attention_batch(attention, d_output, x, context, g),
        expected,
        weights,
    )
    assert_same_bits(x, before[0], "the input")
    assert_same_bits(d_output, before[1], "the output's gradient")


@every_tier
@schemes
@pytest.mark.parametrize("span", [0, 1, 3])
@pytest.mark.parametrize("positions", ["rope", "none"])
def test_backward_multi_head_attention_is_the_oracles(scheme, positions, span):
    odd = ((3, 3, 2, 4), (35, 5, 1, 18)) if positions == "none" else ()
    for dim, heads, batch, time in ((2, 1, 1, 1), (6, 3, 2, 5), (34, 1, 3, 9), *odd):
        config = make_config(model_dim=dim, num_heads=heads, scheme=scheme, positions=positions,
                             attention_window=span, sequence_length=32, num_blocks=1)  # fmt: skip
        for padding in PADDINGS:
            check_attention(config, batch, time, padding)


@outer_tiers
@layers
def test_backward_multi_head_attention_with_other_settings_is_the_oracles(changes):
    paddings = itertools.cycle(("none", "left", "row"))
    for (config, batch, time), padding in zip(attention_cases(changes), paddings, strict=False):
        check_attention(config, batch, time, padding)


@every_tier
@pytest.mark.parametrize("span", [0, 1, 3, 24, 70])
@pytest.mark.parametrize("time", [24, 25, 130])
def test_backward_multi_head_attention_of_long_sequences_is_the_oracles(time, span):
    config = make_config(model_dim=8, num_heads=2, attention_window=span, sequence_length=130,
                         num_blocks=1)  # fmt: skip
    for padding in ("none", "left", "middle"):
        check_attention(config, 1 if time > 65 else 2, time, padding)


@every_tier
@pytest.mark.parametrize("span", [0, 3, 65])
def test_backward_multi_head_attention_of_documents_in_a_row_is_the_oracles(span):
    config = make_config(model_dim=8, num_heads=2, attention_window=span, sequence_length=130,
                         num_blocks=1)  # fmt: skip
    # One row at a time: the bound allows for few roundings, and sums over rows have one for each.
    for documents in LONG_ROWS:
        check_attention(config, 1, 130, "none", (documents,))
    check_attention(config, 1, 130, "left", LONG_ROWS[:1])
    check_attention(config, 3, 16, "middle", SHORT_ROWS)


def run_block(config, x, tokens, documents=None):
    context = room_for(config, *x.shape[:2])
    block, allowed = model_of(config).blocks[0], tokens != config.pad_token
    forward_transformer_block_batch_with_context(block, x, context, allowed, starts_of(documents))
    return block, context


@outer_tiers
@schemes
@pytest.mark.parametrize("options", [{}, {"activation": "relu", "positions": "none"},
                                     {"attention_window": 2}], ids=str)  # fmt: skip
@pytest.mark.parametrize(("dim", "heads", "batch", "time"), [(6, 3, 2, 5), (34, 1, 3, 16),
                                                             (8, 2, 1, 70)])  # fmt: skip
def test_backward_transformer_block_is_the_oracles(scheme, options, dim, heads, batch, time):
    config = make_config(model_dim=dim, num_heads=heads, scheme=scheme, num_blocks=1,
                         sequence_length=70, **options)  # fmt: skip
    for padding in PADDINGS:
        check_block(config, batch, time, padding)


def check_block(config, batch, time, padding, documents=None):
    x, tokens, d_output, weights, expected = layer_case(config, batch, time, padding, "", documents)
    block, context = run_block(config, x, tokens, documents)
    before = d_output.copy()
    check_backward(
        lambda g: backward_transformer_block_batch(block, d_output, context, g), expected, weights
    )
    assert_same_bits(d_output, before, "the output's gradient")


@outer_tiers
@layers
def test_backward_transformer_block_with_other_settings_is_the_oracles(changes):
    for dim, heads, batch, time in ((6, 3, 2, 5), (34, 1, 3, 7)):
        config = make_config(model_dim=dim, num_heads=heads, num_blocks=1, **changes)
        for padding in ("none", "left", "row"):
            check_block(config, batch, time, padding)


@every_tier
def test_backward_transformer_block_of_documents_in_a_row_is_the_oracles():
    config = make_config(num_blocks=1, attention_window=7, sub_norm=True)
    for padding in ("none", "left", "middle"):
        check_block(config, 3, 16, padding, SHORT_ROWS)


@every_tier
@pytest.mark.parametrize("documents", [(64, 66), (63, 2, 65), (40, 40, 50)], ids=str)
def test_backward_transformer_block_gives_other_documents_no_gradient(documents):
    config = make_config(num_blocks=1, sub_norm=True, sequence_length=130)
    x, weights = rows(1, 130, 12), oracle_weights(model_of(config), "blocks.0.")
    block, context = run_block(config, x, np.zeros((1, 130)), [documents])
    for place in places_of([documents]):
        d_output = np.zeros_like(x)
        d_output[place] = rows(1, 130, 12, seed=8)[place]
        d_x = backward_transformer_block_batch(block, d_output, context, empty_gradients(weights))
        assert d_x[place].all()
        d_x[place] = 0.0
        assert not d_x.any()


def test_layers_work_positions_out_that_they_have_not_seen():
    """The forward pass is another model's, of the same weights."""
    config = make_config(num_blocks=1)
    x, tokens, d_output, weights, _ = layer_case(config, 2, 5, "none", "")
    seen, context = run_block(config, x, tokens)
    part = {name.removeprefix("attention."): value for name, value in weights.items()
            if name.startswith("attention.")}  # fmt: skip

    def attention(block, gradients):
        return backward_multi_head_attention_batch(block.attention, d_output, x, context, gradients)

    def whole(block, gradients):
        return backward_transformer_block_batch(block, d_output, context, gradients)

    for function, names in ((attention, part), (whole, weights)):
        expected = function(seen, empty_gradients(names))
        block = random_model(config).blocks[0]
        assert_same_bits(function(block, empty_gradients(names)), expected, function.__name__)


@every_tier
def test_backward_goes_straight_through_int8():
    """The gradients are those of plain layers whose inputs happen to be what int8 keeps."""
    config = make_config(num_blocks=1, int8_activations=True)
    ffn = model_of(config).blocks[0].ffn
    plain = model_of(make_config(num_blocks=1)).blocks[0].ffn
    x, d_output, weights, _ = ffn_case(config, (15,))
    hidden, answers = np.empty((15, 36), np.float32), []
    forward_feed_forward_batch(ffn, x, hidden)
    rounded = x.copy()
    quantize_activations(rounded)
    for layer, inputs in ((ffn, x), (plain, rounded)):
        gradients = empty_gradients(weights)
        d_x = backward_feed_forward_batch(layer, d_output, inputs, hidden, gradients)
        answers.append({"x": d_x, **gradients})
    for name, value in answers[0].items():
        if name == "wo":
            # Its own input is rounded here alone.
            assert np.abs(value - answers[1][name]).max() > 1e-3
        else:
            assert_same_bits(value, answers[1][name], name)


@every_tier
@schemes
def test_single_forms_are_the_batch_forms(scheme):
    config = make_config(scheme=scheme, num_blocks=1)
    x, tokens, d_output, weights, _ = layer_case(config, 1, 1, "none", "")
    block, context = run_block(config, x, tokens)
    answers = []
    for function, d in (
        (backward_transformer_block, d_output[0, 0]),
        (backward_transformer_block_batch, d_output[0]),
        (backward_transformer_block_batch, d_output),
    ):
        gradients = empty_gradients(weights)
        d_x = function(block, d, context, gradients)
        assert d_x.shape == d.shape
        answers.append({"x": d_x.ravel(), **gradients})
    attention = {name.removeprefix("attention."): value for name, value in weights.items()
                 if name.startswith("attention.")}  # fmt: skip
    for function, shape in (
        (backward_multi_head_attention, (12,)),
        (backward_multi_head_attention_batch, (1, 12)),
        (backward_multi_head_attention_batch, (1, 1, 12)),
    ):
        gradients = empty_gradients(attention)
        d_x = function(
            block.attention, d_output.reshape(shape), x.reshape(shape), context, gradients
        )
        assert d_x.shape == shape
        answers.append({"x": d_x.ravel(), **gradients})
    for first in (0, 3):
        for answer in answers[first + 1 : first + 3]:
            for name, value in answers[first].items():
                assert_same_bits(answer[name], value, name)


@every_tier
def test_backward_transformer_block_leads_the_residual_path_around_the_norms():
    """Departure 4: C adds the sub-layer's gradient first and sends both through the norm."""
    config = make_config(num_blocks=1)
    x, tokens, d_output, weights, expected = layer_case(config, 2, 5, "none", "")
    block, context = run_block(config, x, tokens)
    d_x = backward_transformer_block_batch(block, d_output, context, empty_gradients(weights))

    def part(prefix):
        return {n.removeprefix(prefix): v for n, v in weights.items() if n.startswith(prefix)}

    norm1, norm2 = part("norm1."), part("norm2.")
    inside1 = oracle.layer_norm(x, norm1["gamma"], norm1["beta"])
    middle = x + oracle.attention(inside1, tokens, part("attention."), oracle_config(config))
    inside2 = oracle.layer_norm(middle, norm2["gamma"], norm2["beta"])
    d_inside2, _ = oracle.feed_forward_backward(
        d_output, inside2, part("ffn."), oracle_config(config)
    )
    d_middle = oracle.fault4_residual_backward(d_output, d_inside2, middle, norm2["gamma"])
    d_inside1, _ = oracle.attention_backward(
        d_middle, inside1, tokens, part("attention."), oracle_config(config)
    )
    of_c = oracle.fault4_residual_backward(d_middle, d_inside1, x, norm1["gamma"])

    assert_near({"x": d_x}, ({"x": expected[0]["x"]}, expected[1]))
    assert np.abs(d_x - of_c).max() > 0.1
    # The measure of both: how the output moves along a step of x.
    direction = rows(*x.shape, seed=11).astype(float)
    slope = oracle.directional_difference(
        lambda at: np.sum(d_output * oracle.block(at, tokens, weights, oracle_config(config))),
        x.astype(float),
        direction,
    )
    atol = 8 * (expected[1]["x"] + UNIT_ROUNDOFF * np.abs(d_x).max()) * np.abs(direction).sum()
    assert_close(np.sum(d_x * direction), slope, rtol=1e-8, atol=atol)
    assert abs(np.sum(of_c * direction) - slope) > 0.1


# --- What the layers reject -----------------------------------------------------------------------


def test_layers_reject_gradients_that_do_not_fit():
    config = make_config(num_blocks=1)
    x, tokens, d_output, weights, _ = layer_case(config, 2, 5, "none", "")
    block, context = run_block(config, x, tokens)
    for name, value in weights.items():
        right = np.zeros(value.shape, np.float32)
        for bad in (
            np.zeros((*value.shape[:-1], value.shape[-1] + 1), np.float32),
            np.zeros(value.shape),
            np.repeat(right, 2, axis=-1)[..., ::2],
            rows(*value.shape),
        ):
            gradients = {**empty_gradients(weights), name: bad}
            with pytest.raises((TypeError, ValueError)):
                backward_transformer_block_batch(block, d_output, context, gradients)
        gradients = empty_gradients(weights)
        del gradients[name]
        with pytest.raises(KeyError):
            backward_transformer_block_batch(block, d_output, context, gradients)


@pytest.mark.parametrize("d_output", [rows(2, 5, 11), rows(2, 4, 12), rows(10, 12), rows(12),
                                      rows(2, 5, 12).astype(float), None])  # fmt: skip
def test_layers_reject_activations_that_do_not_fit(d_output):
    config = make_config(num_blocks=1)
    x, tokens, _, weights, _ = layer_case(config, 2, 5, "none", "")
    block, context = run_block(config, x, tokens)
    gradients = empty_gradients(weights)
    part = {name.partition(".")[2]: value for name, value in gradients.items()}
    hidden = np.zeros((2, 5, 36), np.float32)
    for call in (
        lambda: backward_transformer_block_batch(block, d_output, context, gradients),
        lambda: backward_multi_head_attention_batch(block.attention, d_output, x, context, part),
        lambda: backward_multi_head_attention_batch(block.attention, x, d_output, context, part),
        lambda: backward_feed_forward_batch(block.ffn, d_output, x, hidden, part),
        lambda: backward_feed_forward_batch(block.ffn, x, d_output, hidden, part),
        lambda: backward_feed_forward_batch(block.ffn, x, x, hidden[..., :35], part),
    ):
        with pytest.raises((TypeError, ValueError)):
            call()


def test_layers_say_which_activations_are_no_array():
    config = make_config(num_blocks=1)
    x, hidden = rows(2, 5, 12), np.zeros((2, 5, 36), np.float32)
    ffn, attention = model_of(config).blocks[0].ffn, model_of(config).blocks[0].attention
    context = create_transformer_block_context(12, 36, 3, 2, 5)
    part = empty_gradients(oracle_weights(model_of(config), "blocks.0.attention."))
    with pytest.raises(TypeError, match=r"^x is not a float32 array"):
        backward_multi_head_attention_batch(attention, x, x.tolist(), context, part)
    part = empty_gradients(oracle_weights(model_of(config), "blocks.0.ffn."))
    with pytest.raises(TypeError, match=r"^x is not a float32 array"):
        backward_feed_forward_batch(ffn, x, x.tolist(), hidden, part)


def test_layers_with_norms_reject_a_context_without_room_for_them():
    config = make_config(num_blocks=1, sub_norm=True)
    x, _, d_output, weights, _ = layer_case(config, 2, 5, "none", "")
    block, gradients = model_of(config).blocks[0], empty_gradients(weights)
    part = {name.removeprefix("attention."): value for name, value in gradients.items()
            if name.startswith("attention.")}  # fmt: skip
    context = create_transformer_block_context(12, 36, 3, 2, 5)
    for call in (
        lambda: backward_transformer_block_batch(block, d_output, context, gradients),
        lambda: backward_multi_head_attention_batch(block.attention, d_output, x, context, part),
    ):
        with pytest.raises(ValueError, match="sub_norm"):
            call()


# A context of other sizes, read and written past its end.
OTHER_CONTEXTS = {
    "block, fewer hidden": ("TransformerBlockContext(256, 1, 2, 3, 5)", "block"),
    "block, fewer heads": ("TransformerBlockContext(256, 1024, 1, 3, 5)", "block"),
    "block, fewer keys": ("TransformerBlockContext(256, 1024, 2, 3, 5, 1)", "block"),
    "attention, fewer heads": ("TransformerBlockContext(256, 1, 1, 3, 5)", "attention"),
    "attention, fewer keys": ("TransformerBlockContext(256, 1, 2, 3, 5, 1)", "attention"),
    "attention, more tokens than positions": (
        "TransformerBlockContext(256, 1, 2, 1, 5000)",
        "long",
    ),
}
BACKWARD_CALLS = {
    "block": "backward_transformer_block_batch(block, x, context, gradients)",
    "attention": "backward_multi_head_attention_batch(block.attention, x, x, context, part)",
    "long": "backward_multi_head_attention_batch(block.attention, y, y, context, part)",
}


def test_layers_reject_a_context_of_other_sizes():
    printed = run_child(
        "from legacy1bit.backward import *\n"
        "from legacy1bit.hyperparams import ModelConfig\n"
        "config = ModelConfig(model_dim=256, num_blocks=1, num_heads=2, sequence_length=16)\n"
        "block = create_legacy_llm(config, 1).blocks[0]\n"
        "gradients = create_legacy_llm_gradients(config)\n"
        "part, gradients = (gradients.layer(n) for n in ('blocks.0.attention', 'blocks.0'))\n"
        "x, y = np.ones((3, 5, 256), np.float32), np.ones((1, 5000, 256), np.float32)\n"
        + "".join(
            f"context = {context}\n" + rejection(f"{BACKWARD_CALLS[call]}; print('no error')")
            for context, call in OTHER_CONTEXTS.values()
        )
    )
    for case, line in zip(OTHER_CONTEXTS, printed.splitlines(), strict=True):
        assert line.startswith("ValueError"), case


# --- The whole model ------------------------------------------------------------------------------


def exact_gradients(config, tokens, targets, starts=None):
    def exact(weights):
        loss, gradients = oracle.loss_and_gradients(
            weights, oracle_config(config), tokens, targets, starts
        )
        return {"loss": np.array(loss), **gradients}

    return rounding_effect(exact, oracle_weights(model_of(config)))


@without_ties
def model_case(config, batch, time, padding, documents=None, *, draw):
    """Tokens, targets of which some are padding, the exact loss and the exact gradients."""
    tokens = random_tokens(config, batch, time, padding, seed=(6, draw))
    targets = random_tokens(config, batch, time, seed=(10, draw))
    targets[0, 0] = config.pad_token if tokens.size > 1 else targets[0, 0]
    return tokens, targets, exact_gradients(config, tokens, targets, starts_of(documents))


def assert_gradients_near(gradients, loss, expected, times=1):
    """The gradients, each of which may be of another size than the loss, and the loss."""
    exact, effects = expected
    exact = {name: times * value for name, value in exact.items() if name != "loss"}
    effects = {name: times * value for name, value in effects.items()}
    assert_near(gradients.parameters, (exact, effects))
    atol = 8 * (expected[1]["loss"] + UNIT_ROUNDOFF * abs(float(expected[0]["loss"])))
    assert_close(loss, expected[0]["loss"], rtol=0, atol=atol, what="loss")


@outer_tiers
@models
def test_backward_llm_batch_is_the_oracles(changes):
    config = make_config(**changes)
    # Each model has two kinds of padding, and each kind seven models: the oracle takes most of the
    # time, and layers are tested with all kinds.
    first = list(MODELS.values()).index(changes) % 3
    cases = [(1, 1, "none"), *((3, 7, padding) for padding in PADDINGS[first::3]), (2, 16, "left")]
    for batch, time, padding in cases:
        tokens, targets, expected = model_case(config, batch, time, padding)
        gradients = create_legacy_llm_gradients(config)
        loss = backward_llm_batch(model_of(config), tokens, targets, gradients)
        assert_gradients_near(gradients, loss, expected)
        again = backward_llm_batch(model_of(config), tokens, targets, gradients, 2)
        assert_gradients_near(gradients, again, expected, times=2)


@every_tier
@pytest.mark.parametrize("span", [0, 1, 65])
@pytest.mark.parametrize("time", [65, 130])
def test_backward_llm_batch_of_long_sequences_is_the_oracles(time, span):
    config = make_config(model_dim=8, num_heads=2, sequence_length=130, attention_window=span)
    tokens, targets, expected = model_case(config, 2, time, "left")
    gradients = create_legacy_llm_gradients(config)
    loss = backward_llm_batch(model_of(config), tokens, targets, gradients)
    assert_gradients_near(gradients, loss, expected)


@functools.cache
def slopes(config):
    """The slopes of the oracle's loss along random directions, two of each parameter."""
    tokens, targets, _ = model_case(config, 2, 5, "middle")
    counted = oracle.counted_positions(tokens, targets, config.vocab_size)
    weights, rng = oracle_weights(model_of(config)), np.random.default_rng(12)

    def loss_with(name, value):
        logits, _ = oracle.forward({**weights, name: value}, oracle_config(config), tokens)
        return oracle.cross_entropy(logits, targets, counted)

    return [
        (name, direction, oracle.directional_difference(
            lambda value, name=name: loss_with(name, value), weight, direction, 1e-5))
        for name, weight in weights.items()
        for direction in (rng.normal(size=weight.shape) for _ in range(2))
    ]  # fmt: skip


@outer_tiers
@pytest.mark.parametrize("changes", [{}, {"scheme": "float", "activation": "relu"},
                                     {"positions": "none", "final_norm": False,
                                      "ternary_embedding": True},
                                     {"sub_norm": True, "scale": "row"}], ids=str)  # fmt: skip
def test_backward_llm_batch_is_the_slope_of_the_loss(changes):
    # Past the oracle's own gradients: its loss, along random directions of every parameter.
    config = make_config(model_dim=6, **changes)
    tokens, targets, (_, effects) = model_case(config, 2, 5, "middle")
    gradients = create_legacy_llm_gradients(config)
    backward_llm_batch(model_of(config), tokens, targets, gradients)
    largest = np.abs(gradients.flat).max()
    assert {name for name, *_ in slopes(config)} == set(gradients.parameters)
    for name, direction, slope in slopes(config):
        gradient = gradients.parameters[name]
        atol = 8 * (effects[name] + UNIT_ROUNDOFF * largest) * np.abs(direction).sum()
        # The difference itself: 1e-16 of a loss of about 3, divided by the step.
        assert_close(np.sum(gradient * direction), slope, rtol=0, atol=atol + 1e-9, what=name)


@every_tier
@pytest.mark.parametrize("changes", [{}, {"scheme": "float", "activation": "relu",
                                          "attention_window": 3}, MODELS["int8, last"],
                                     MODELS["b158"]], ids=str)  # fmt: skip
def test_backward_llm_batch_agrees_with_torch(changes):
    torch = pytest.importorskip("torch")
    config = make_config(**changes)
    tokens, targets, (exact, effects) = model_case(config, 3, 7, "middle")
    leaves = {
        name: torch.tensor(value, requires_grad=True)
        for name, value in oracle_weights(model_of(config)).items()
    }
    _, loss = torch_loss(
        torch, leaves, oracle_config(config), torch.tensor(tokens).long(),
        torch.tensor(targets).long(),
    )  # fmt: skip
    loss.backward()
    gradients = create_legacy_llm_gradients(config)
    ours = backward_llm_batch(model_of(config), tokens, targets, gradients)
    of_torch = {name: leaf.grad.numpy() for name, leaf in leaves.items()}
    of_torch["loss"] = loss.item()
    assert_gradients_near(gradients, ours, (of_torch, effects))
    assert exact.keys() == of_torch.keys()


@every_tier
def test_backward_llm_is_a_batch_of_one_token():
    config = make_config()
    model, one, batch = model_of(config), *(create_legacy_llm_gradients(config) for _ in "ab")
    loss = backward_llm(model, 3, 4, one)
    assert loss == backward_llm_batch(model, [[3]], [[4]], batch)
    assert_same_bits(one.flat, batch.flat)
    assert backward_llm_batch(model, [3], [4], batch) == loss
    assert loss == pytest.approx(cross_entropy_loss(forward_llm(model, 3), 4), rel=1e-6)


@every_tier
def test_backward_llm_batch_is_the_mean_of_its_positions():
    # Sequences of one token each, so that they can be taken apart.
    config = make_config()
    model = model_of(config)
    tokens, targets, (exact, effects) = model_case(config, 5, 1, "none")
    losses, parts = [], create_legacy_llm_gradients(config)
    for token, target in zip(tokens[:, 0], targets[:, 0], strict=True):
        if target != config.pad_token:
            losses.append(backward_llm(model, int(token), int(target), parts))
    parts.flat[...] /= len(losses)
    assert_gradients_near(parts, np.mean(losses), (exact, effects))


# --- Padding --------------------------------------------------------------------------------------


@every_tier
@pytest.mark.parametrize("where", [("tokens", "targets"), ("tokens",), ("targets",)])
def test_padding_gives_no_gradient(where):
    config = make_config()
    tokens, targets, _ = model_case(config, 3, 9, "none")
    expected = exact_gradients(config, tokens[:, :5], targets[:, :5])
    # The end of every sequence, and one more sequence, are padding.
    padded = {"tokens": np.concatenate([tokens, tokens[:1]])}
    padded["targets"] = np.concatenate([targets, targets[:1]])
    for name in where:
        padded[name][:, 5:] = padded[name][3] = config.pad_token
    for threads in (1, 2):
        gradients = create_legacy_llm_gradients(config)
        loss = backward_llm_batch(model_of(config), *padded.values(), gradients, threads)
        assert_gradients_near(gradients, loss, expected)


@every_tier
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("which", ["tokens", "targets", "both", "alternating"])
def test_a_batch_of_padding_has_no_loss_and_no_gradient(which, threads):
    config = make_config()
    pad = np.full((3, 5), config.pad_token, np.int32)
    tokens, targets = random_tokens(config, 3, 5), random_tokens(config, 3, 5, seed=7)
    if which == "alternating":
        tokens[:, ::2], targets[:, 1::2] = config.pad_token, config.pad_token
    else:
        tokens = tokens if which == "targets" else pad
        targets = targets if which == "tokens" else pad
    gradients = create_legacy_llm_gradients(config)
    assert backward_llm_batch(model_of(config), tokens, targets, gradients, threads) == 0.0
    assert not gradients.flat.any()
    backward_pass = BackwardPass(model_of(config), 3, 5, threads)
    assert backward_pass.run(tokens, targets, gradients) == (0.0, 0)


# --- Several documents in a row -------------------------------------------------------------------


def check_documents(config, documents, padding):
    """Together they have the oracle's gradient, which is the sum of what each has alone."""
    model, starts = model_of(config), starts_of(documents)
    tokens, targets, expected = model_case(config, *starts.shape, padding, documents)
    for threads in (1, 2):
        runs = []
        for recompute in (True, False):
            backward_pass = BackwardPass(model, *starts.shape, threads, recompute)
            gradients = create_legacy_llm_gradients(config)
            if recompute:
                # Another batch before leaves nothing behind.
                backward_pass.run(targets, tokens, gradients)
                gradients.flat[...] = 0.0
            loss, count = backward_pass.run(tokens, targets, gradients, starts=starts)
            runs.append((loss, gradients.flat))
        assert runs[1][0] == runs[0][0]
        assert_same_bits(runs[1][1], runs[0][1], f"{threads} threads")
        assert_gradients_near(gradients, loss / max(count, 1), expected)
    alone, total = create_legacy_llm_gradients(config), 0.0
    for place in places_of(documents):
        backward_pass = BackwardPass(model, 1, tokens[place].size)
        total += backward_pass.run(tokens[place], targets[place], alone, count)[0]
    assert_gradients_near(alone, total / max(count, 1), expected)


@outer_tiers
@models
def test_backward_pass_of_documents_in_a_row_is_that_of_each_alone(changes):
    check_documents(make_config(**changes), SHORT_ROWS, "none")


@every_tier
@pytest.mark.parametrize("padding", ["left", "middle", "all"])
def test_backward_pass_of_documents_with_padding_is_that_of_each_alone(padding):
    check_documents(make_config(), SHORT_ROWS, padding)


@every_tier
@pytest.mark.parametrize("span", [0, 65])
def test_backward_pass_of_long_documents_in_a_row_is_that_of_each_alone(span):
    config = make_config(model_dim=8, num_heads=2, sequence_length=130, attention_window=span)
    check_documents(config, LONG_ROWS[:3], "none")


@every_tier
@pytest.mark.parametrize("recompute", [False, True])
def test_backward_pass_gives_the_tokens_of_other_documents_no_gradient(recompute):
    config = make_config(sequence_length=130, vocab_size=30)
    documents = (63, 2, 65)
    starts, rng = starts_of([documents]), np.random.default_rng(6)
    # Each document has ten tokens to itself.
    tokens = np.repeat([0, 10, 20], documents)[None] + rng.integers(0, 10, (1, 130))
    backward_pass = BackwardPass(model_of(config), 1, 130, recompute=recompute)
    for number, place in enumerate(places_of([documents])):
        targets = np.full((1, 130), config.pad_token)
        targets[place] = tokens[place]
        gradients = create_legacy_llm_gradients(config)
        backward_pass.run(tokens, targets, gradients, starts=starts)
        d_embedding = gradients.parameters["embedding.weight"]
        own = np.zeros(30, bool)
        own[10 * number : 10 * number + 10] = True
        assert not d_embedding[~own].any()
        assert d_embedding[np.unique(tokens[place])].any(axis=1).all()


@every_tier
@pytest.mark.parametrize("recompute", [False, True])
def test_backward_pass_with_one_document_to_a_row_has_the_bits_of_none(recompute):
    config, flats = make_config(sequence_length=70), []
    tokens, targets = (random_tokens(config, 2, 70, "left", seed=seed) for seed in (6, 7))
    backward_pass = BackwardPass(model_of(config), 2, 70, 2, recompute)
    for starts in (None, np.zeros((2, 70), np.int64), starts_of([(5, 65), (66, 4)]), None):
        gradients = create_legacy_llm_gradients(config)
        loss = backward_pass.run(tokens, targets, gradients, starts=starts)[0]
        flats.append(np.append(gradients.flat, np.float32(loss)))
    assert_same_bits(flats[1], flats[0])
    assert np.abs(flats[2] - flats[0]).max() > 1e-3
    assert_same_bits(flats[3], flats[0], "documents are forgotten")


@every_tier
def test_backward_llm_batch_takes_documents():
    config, starts = make_config(), starts_of(SHORT_ROWS)
    tokens, targets, expected = model_case(config, 3, 16, "none", SHORT_ROWS)
    gradients = create_legacy_llm_gradients(config)
    loss = backward_llm_batch(model_of(config), tokens, targets, gradients, 2, starts)
    assert_gradients_near(gradients, loss, expected)


@bad_starts
def test_backward_pass_rejects_starts_that_do_not_fit(starts, error, message):
    config, tokens = make_config(), np.zeros((2, 5), int)
    model, gradients = model_of(config), create_legacy_llm_gradients(config)
    for call in (
        lambda: BackwardPass(model, 2, 5).run(tokens, tokens, gradients, starts=starts),
        lambda: backward_llm_batch(model, tokens, tokens, gradients, starts=starts),
    ):
        with pytest.raises(error, match=f"starts.*{message}"):
            call()
    assert not gradients.flat.any()


# --- A teacher ------------------------------------------------------------------------------------


@without_ties
def taught_case(config, documents, padding, weight, temperature, *, draw):
    """Tokens, targets, starts, a teacher's logits, the exact loss and the exact gradients."""
    starts = starts_of(documents)
    tokens = random_tokens(config, *starts.shape, padding, seed=(6, draw))
    targets = random_tokens(config, *starts.shape, seed=(10, draw))
    targets[0, 0] = config.pad_token
    teacher = (2 * rows(*starts.shape, config.vocab_size, seed=draw)).astype(np.float32)

    def exact(arrays):
        weights = dict(arrays)
        settings = (weights.pop("teacher"), weight, temperature)
        loss, gradients = oracle.loss_and_gradients(
            weights, oracle_config(config), tokens, targets, starts, settings
        )
        return {"loss": np.array(loss), **gradients}

    arrays = {**oracle_weights(model_of(config)), "teacher": teacher.astype(np.float64)}
    return tokens, targets, starts, teacher, rounding_effect(exact, arrays)


@every_tier
@pytest.mark.parametrize(
    ("changes", "padding", "weight", "temperature"),
    [
        ({}, "middle", 0.5, 2.0),
        ({"vocab_size": 67, "scheme": "float"}, "none", 1.0, 1.0),
        ({"vocab_size": 1, "ternary_embedding": True}, "left", 0.3, 4.0),
        ({"vocab_size": 130, "tied_embeddings": True, "norm": "rms"}, "row", 0.9, 0.5),
        ({}, "all", 0.5, 2.0),
    ],
    ids=str,
)
def test_backward_pass_with_a_teacher_is_the_oracles(changes, padding, weight, temperature):
    config = make_config(**changes)
    case = taught_case(config, SHORT_ROWS, padding, weight, temperature)
    tokens, targets, starts, teacher, expected = case
    for threads, recompute in ((1, False), (2, False), (3, True)):
        backward_pass = BackwardPass(model_of(config), *tokens.shape, threads, recompute)
        gradients = create_legacy_llm_gradients(config)
        loss, count = backward_pass.run(
            tokens, targets, gradients, starts=starts, teacher=teacher.copy(),
            distillation_weight=weight, teacher_temperature=temperature,
        )  # fmt: skip
        assert_gradients_near(gradients, loss / max(count, 1), expected)
        # Without one again: the teacher is forgotten.
        plain = [create_legacy_llm_gradients(config) for _ in range(2)]
        backward_pass.run(tokens, targets, plain[0], starts=starts)
        BackwardPass(model_of(config), *tokens.shape, threads, recompute).run(
            tokens, targets, plain[1], starts=starts
        )
        assert_same_bits(plain[0].flat, plain[1].flat)


EXTREME_LOGITS = {
    "equal": lambda n: np.zeros(n),
    "one-hot": lambda n: np.eye(n)[n // 2] * 1e4,
    "large": lambda n: np.linspace(-1e4, 1e4, n),
    "near each other": lambda n: 1e4 + np.linspace(-2.0, 2.0, n),
    "largest": lambda n: np.where(np.arange(n) % 2, 3.4e38, -3.4e38),
    "small": lambda n: np.linspace(-1e-30, 1e-30, n),
}


@every_tier
@pytest.mark.parametrize("vocab", [1, 2, 17, 97])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_gradient_of_extreme_logits_is_the_oracles(vocab, temperature):
    """A model whose logits are its bias: the gradient of the bias is that of the logits."""
    config = make_config(vocab_size=vocab, scheme="float", num_blocks=1)
    model, weight, target = random_model(config), 0.25, np.array([[vocab // 3]])
    model.latent["output.weight"][...] = 0.0
    backward_pass, counted = BackwardPass(model, 1, 1), np.ones((1, 1), bool)
    for (name, own), (of, theirs) in itertools.product(EXTREME_LOGITS.items(), repeat=2):
        logits, teacher = (make(vocab).astype(np.float32)[None, None] for make in (own, theirs))
        model.latent["output.bias"][...] = logits[0, 0]
        gradients = create_legacy_llm_gradients(config)
        backward_pass.run(
            [[0]], target, gradients, teacher=teacher.copy(),
            distillation_weight=weight, teacher_temperature=temperature,
        )  # fmt: skip
        exact = oracle.distillation_backward(
            logits.astype(np.float64), target, counted, teacher, weight, temperature
        )
        # Probabilities of exponents that are rounded, each once and again by the division.
        atol = 40 * UNIT_ROUNDOFF * (1.0 + weight * temperature)
        found = gradients.parameters["output.bias"]
        assert_close(found, exact[0, 0], rtol=0, atol=atol, what=f"{name}, {of}", dtype=np.float32)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"teacher": np.zeros((2, 5, 10), np.float32)}, ValueError, r"teacher has shape"),
        ({"teacher": np.zeros((2, 4, 11), np.float32)}, ValueError, r"teacher has shape"),
        ({"teacher": np.zeros((2, 5, 11))}, TypeError, "teacher is not a float32 array"),
        ({"teacher": np.zeros((2, 5, 22), np.float32)[..., ::2]}, ValueError, "not C-contiguous"),
        ({"distillation_weight": 1.5}, ValueError, r"distillation_weight is 1.5, expected 0 to 1"),
        ({"distillation_weight": math.nan}, ValueError, "distillation_weight is nan"),
        ({"teacher_temperature": 0.0}, ValueError, r"teacher_temperature is 0.0, expected"),
        ({"teacher_temperature": math.inf}, ValueError, "teacher_temperature is inf"),
    ],
    ids=str,
)
def test_backward_pass_rejects_teachers_that_do_not_fit(changes, error, message):
    config, tokens = make_config(), np.zeros((2, 5), int)
    gradients = create_legacy_llm_gradients(config)
    teacher = {"teacher": np.zeros((2, 5, 11), np.float32), **changes}
    with pytest.raises(error, match=message):
        BackwardPass(model_of(config), 2, 5).run(tokens, tokens, gradients, **teacher)
    assert not gradients.flat.any()


# --- BackwardPass ---------------------------------------------------------------------------------


@pytest.mark.parametrize("sub_norm", [False, True])
def test_backward_pass_nbytes_counts_what_each_slice_has(sub_norm):
    config = make_config(num_blocks=2, sub_norm=sub_norm)
    model = model_of(config)
    wide = config.ffn_dim * (2 if sub_norm else 1)
    gradients = 4 * (3 * 5 * (6 * config.model_dim + wide) + 5 * 5)
    assert backward_bytes(config, 3, 5) == gradients
    each = forward_bytes(config, 3, 5) + gradients
    assert BackwardPass(model, 3, 5).nbytes == each
    assert BackwardPass(model, 5, 5, 2).nbytes == 2 * each + 4 * model.num_parameters


@every_tier
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_backward_pass_agrees_for_any_number_of_threads(batch):
    config = make_config()
    tokens, targets, expected = model_case(config, batch, 9, "left")
    for threads in (1, 2, 3, 300):
        backward_pass = BackwardPass(model_of(config), batch, 9, threads)
        runs = []
        for _ in range(3):
            gradients = create_legacy_llm_gradients(config)
            loss, count = backward_pass.run(tokens, targets, gradients)
            assert count == oracle.counted_positions(tokens, targets, 11).sum()
            assert_gradients_near(gradients, loss / count, expected)
            runs.append((loss, gradients.flat))
        for loss, flat in runs[1:]:
            assert loss == runs[0][0]
            assert_same_bits(flat, runs[0][1], f"{threads} threads")


@every_tier
def test_backward_pass_of_fewer_sequences_than_threads_has_the_bits_of_so_many_threads():
    config = make_config()
    tokens, targets, _ = model_case(config, 2, 9, "left")
    for batch in (1, 2):
        flats = []
        for threads in (batch, 3):
            # To gradients that are there another share of 0 would be a sum of its own.
            gradients = create_legacy_llm_gradients(config)
            gradients.flat[...] = rows(gradients.flat.size)
            BackwardPass(model_of(config), 3, 9, threads).run(
                tokens[:batch], targets[:batch], gradients
            )
            flats.append(gradients.flat)
        assert_same_bits(flats[1], flats[0], f"{batch} sequences")


def test_ignore_padding_gives_minus_one_for_padding_and_the_targets_else():
    tokens, targets = np.array([[0, 1, 11, 3]], np.int32), np.array([[1, 11, 2, 4]], np.int32)
    assert ignore_padding(tokens, targets, 11).tolist() == [[1, -1, -1, 4]]


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc")
def test_backward_pass_without_memory_raises_memory_error():
    start = (
        "from legacy1bit.backward import BackwardPass\n"
        "from legacy1bit.hyperparams import ModelConfig\n"
        "config = ModelConfig(vocab_size=11, model_dim=8, num_heads=2, sequence_length=4)\n"
        "model, gradients = create_legacy_llm(config, 1), create_legacy_llm_gradients(config)\n"
        + LIMIT
    )
    printed = run_child(
        start
        + "backward_pass = BackwardPass(model, 2, 4, 2)\n"
        + TAKE_ALL
        + rejection("backward_pass.run([[1] * 4] * 2, [[1] * 4] * 2, gradients)")
    )
    assert printed == "MemoryError no memory for the kernels' packing buffers"
    # Of the tables with a place for each of a million threads some fit and some do not.
    for more in (32, 64, 96, 128):
        printed = run_child(
            start + f"limit({more} << 20)\n" + rejection("BackwardPass(model, *[1 << 20] * 3)")
        )
        assert printed == "MemoryError no memory for the pass"


@every_tier
def test_backward_pass_follows_the_model_and_forgets_the_last_batch():
    config = make_config()
    model = random_model(config)
    backward_pass, gradients = BackwardPass(model, 2, 5, 2), create_legacy_llm_gradients(config)
    tokens, targets, expected = model_case(config, 2, 5, "middle")
    others = random_tokens(config, 2, 5, "left", seed=20)
    backward_pass.run(others, others, gradients)
    for values in model.latent.values():
        values *= 2.0
    model.quantize()
    backward_pass.run(others, others, gradients)
    for values in model.latent.values():
        values *= 0.5
    model.quantize()
    gradients.flat[...] = 0.0
    loss, count = backward_pass.run(tokens, targets, gradients)
    assert_gradients_near(gradients, loss / count, expected)


@outer_tiers
@models
def test_backward_pass_has_the_same_bits_when_it_works_activations_out_once_more(changes):
    config = make_config(**{"num_blocks": 3, **changes})
    model, tokens = model_of(config), random_tokens(config, 3, 7, "middle")
    targets = random_tokens(config, 3, 7, "right", seed=10)
    for threads in (1, 2):
        runs = []
        for recompute in (False, True):
            backward_pass = BackwardPass(model, 3, 7, threads, recompute)
            gradients = create_legacy_llm_gradients(config)
            # Another batch before leaves nothing behind.
            backward_pass.run(targets, tokens, gradients)
            gradients.flat[...] = 0.0
            runs.append((backward_pass.run(tokens, targets, gradients), gradients.flat))
        assert runs[0][0] == runs[1][0]
        assert_same_bits(runs[1][1], runs[0][1], f"{threads} threads")
        assert runs[0][1].any()


@models
def test_backward_pass_takes_shorter_sequences_and_more_of_them(changes):
    config = make_config(**changes)
    model = model_of(config)
    for threads in (1, 2, 3):
        whole = BackwardPass(model, 5, 8, threads)
        for batch, time in ((10, 4), (5, 8), (20, 2), (40, 1), (1, 8), (2, 3), (7, 4)):
            tokens = random_tokens(config, batch, time, "middle", seed=batch)
            targets = random_tokens(config, batch, time, "right", seed=time)
            starts = np.minimum(np.arange(time), time // 2) * np.ones((batch, 1), np.int32)
            results = []
            for backward_pass in (whole, BackwardPass(model, batch, time, threads)):
                gradients = create_legacy_llm_gradients(config)
                done = backward_pass.run(tokens, targets, gradients, starts=starts.astype(np.int32))
                results.append((done, gradients.flat))
            assert results[0][0] == results[1][0]
            assert_same_bits(results[0][1], results[1][1])


@pytest.mark.parametrize("shape", [(6, 8), (5, 9), (1, 9), (11, 4), (41, 1), (0, 8), (5, 0)])
@pytest.mark.parametrize("threads", [1, 5])
def test_backward_pass_refuses_more_than_it_has_room_for(shape, threads):
    config = make_config()
    tokens = np.zeros(shape, np.int32)
    with pytest.raises(ValueError, match=r"tokens has shape|tokens is empty, expected at least"):
        BackwardPass(model_of(config), 5, 8, threads).run(
            tokens, tokens, create_legacy_llm_gradients(config)
        )


@every_tier
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("changes", [{}, {"sub_norm": True, "int8_activations": True}], ids=str)
def test_backward_pass_over_the_parts_of_a_batch_is_that_of_the_whole(changes, recompute):
    config = make_config(**changes)
    tokens, targets, expected = model_case(config, 6, 7, "left")
    # The parts count differently many positions: each one's own mean would weigh them wrongly.
    counts = oracle.counted_positions(tokens, targets, 11).reshape(3, -1).sum(axis=1)
    assert len(set(counts)) > 1
    gradients, losses = create_legacy_llm_gradients(config), []
    backward_pass = BackwardPass(model_of(config), 2, 7, 1, recompute)
    for part, expected_count in zip(range(0, 6, 2), counts, strict=True):
        chosen = slice(part, part + 2)
        loss, count = backward_pass.run(
            tokens[chosen], targets[chosen], gradients, total=int(counts.sum())
        )
        assert count == expected_count
        losses.append(loss)
    assert_gradients_near(gradients, sum(losses) / counts.sum(), expected)


@every_tier
def test_backward_pass_divides_the_gradient_and_not_the_loss_by_the_total():
    config = make_config()
    tokens, targets, _ = model_case(config, 3, 7, "none")
    backward_pass, answers = BackwardPass(model_of(config), 3, 7), []
    # A power of two is divided by without an error.
    count = int(oracle.counted_positions(tokens, targets, 11).sum())
    for total in (None, count, 4 * count):
        gradients = create_legacy_llm_gradients(config)
        answers.append((backward_pass.run(tokens, targets, gradients, total), gradients.flat))
    assert answers[0][0] == answers[1][0] == answers[2][0]
    assert_same_bits(answers[1][1], answers[0][1])
    assert_same_bits(answers[2][1] * np.float32(4.0), answers[0][1])


@outer_tiers
@pytest.mark.parametrize("changes", CODED.values(), ids=CODED)
def test_full_precision_has_the_gradients_of_the_float_twin(changes):
    model = random_model(make_config(**changes))
    twin, config = float_twin(model), model.config
    tokens, targets = random_tokens(config, 3, 7, "middle"), random_tokens(config, 3, 7, seed=7)
    # Passes that were there before follow the model.
    passes = [BackwardPass(one, 3, 7) for one in (model, twin)]
    ours, theirs, coded = (create_legacy_llm_gradients(c) for c in (config, twin.config, config))
    coded_loss = passes[0].run(tokens, targets, coded)
    model.use_full_precision(True)
    assert passes[0].run(tokens, targets, ours) == passes[1].run(tokens, targets, theirs)
    for name, value in theirs.parameters.items():
        assert_same_bits(ours.parameters[name], value, name)
    assert np.abs(ours.flat - coded.flat).max() > 1e-4
    model.use_full_precision(False)
    again = create_legacy_llm_gradients(config)
    assert passes[0].run(tokens, targets, again) == coded_loss
    assert_same_bits(again.flat, coded.flat)


@outer_tiers
@pytest.mark.parametrize("changes", [{}, {"ternary_embedding": True, "scale": "row"}], ids=str)
def test_blend_has_the_gradients_of_the_float_twin(changes):
    """They go straight through to the latent weights."""
    model = random_model(make_config(**changes))
    twin, config = float_twin(model), model.config
    tokens, targets = random_tokens(config, 3, 7, "middle"), random_tokens(config, 3, 7, seed=7)
    passes = [BackwardPass(one, 3, 7) for one in (model, twin)]
    ours, theirs = (create_legacy_llm_gradients(each) for each in (config, twin.config))
    model.use_blend(0.5)
    for name, value in model.parameters.items():
        if hasattr(value, "dense"):
            latent = model.latent[name]
            twin.latent[name][...] = latent + np.float32(0.5) * (value.dense() - latent)
    assert passes[0].run(tokens, targets, ours) == passes[1].run(tokens, targets, theirs)
    for name, value in theirs.parameters.items():
        assert_same_bits(ours.parameters[name], value, name)


@every_tier
def test_backward_pass_adds_to_what_is_there():
    config = make_config()
    tokens, targets, (exact, effects) = model_case(config, 3, 7, "none")
    start = rows(create_legacy_llm_gradients(config).flat.size)
    for threads in (1, 2):
        gradients = create_legacy_llm_gradients(config)
        gradients.flat[...] = start
        BackwardPass(model_of(config), 3, 7, threads).run(tokens, targets, gradients)
        added = create_legacy_llm_gradients(config)
        added.flat[...] = start
        sums = {name: exact[name] + value for name, value in added.parameters.items()}
        assert_near(gradients.parameters, (sums, effects))


def test_backward_pass_leaves_its_input():
    config = make_config()
    tokens, targets, _ = model_case(config, 3, 7, "middle")
    tokens, targets = tokens.copy(), targets.copy()
    before = tokens.copy(), targets.copy()
    tokens.flags.writeable = targets.flags.writeable = False
    gradients = create_legacy_llm_gradients(config)
    BackwardPass(model_of(config), 3, 7).run(tokens, targets, gradients)
    assert_same_bits(tokens, before[0])
    assert_same_bits(targets, before[1])


def test_backward_pass_rejects_what_does_not_fit():
    config = make_config()
    model, gradients = model_of(config), create_legacy_llm_gradients(config)
    backward_pass = BackwardPass(model, 2, 3)
    tokens = np.zeros((2, 3), np.int32)
    for bad, error in (
        (np.zeros((3, 2), np.int32), ValueError),
        (np.zeros(6, np.int32), ValueError),
        (np.zeros((2, 3)), TypeError),
        (tokens - 1, IndexError),
        (tokens + 12, IndexError),
    ):
        with pytest.raises(error):
            backward_pass.run(bad, tokens, gradients)
        with pytest.raises(error):
            backward_pass.run(tokens, bad, gradients)
    with pytest.raises(ValueError, match="other settings"):
        backward_pass.run(
            tokens, tokens, create_legacy_llm_gradients(make_config(final_norm=False))
        )
    with pytest.raises(ValueError, match="17 tokens in a sequence, expected at most 16"):
        backward_llm_batch(model, np.zeros((1, 17), int), np.zeros((1, 17), int), gradients)
    with pytest.raises(TypeError):
        backward_pass.run(tokens, tokens, None)
    assert not gradients.flat.any()


@pytest.mark.parametrize("sizes", [(0, 3), (3, 0), (-1, 3), (3, -1), (2, 3, 0), (2, 3, -1)])
def test_backward_pass_rejects_sizes_below_one(sizes):
    with pytest.raises(ValueError, match="expected at least 1"):
        BackwardPass(model_of(make_config()), *sizes)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)])
def test_backward_llm_batch_rejects_empty_batches(shape):
    empty, gradients = np.zeros(shape, np.int32), create_legacy_llm_gradients(make_config())
    with pytest.raises(ValueError, match=r"empty|at least 1"):
        backward_llm_batch(model_of(make_config()), empty, empty, gradients)


@pytest.mark.parametrize("total", [-1, 0.5, math.nan, math.inf, "3"])
def test_backward_pass_rejects_totals_that_are_no_number_of_positions(total):
    config = make_config()
    gradients = create_legacy_llm_gradients(config)
    tokens = np.zeros((1, 4), np.int32)
    with pytest.raises(ValueError, match=r"total is .*whole number"):
        BackwardPass(random_model(config), 1, 4).run(tokens, tokens, gradients, total)
