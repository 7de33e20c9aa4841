"""The optimizers against float64, and the C original's rule for updates (departure 1)."""

import dataclasses
import itertools
import math

import numpy as np
import pytest

from helpers import oracle
from helpers.arrays import UNIT_ROUNDOFF, assert_close, assert_same_bits, gamma
from helpers.cases import together
from helpers.models import (
    assert_quantized,
    every_tier,
    make_config,
    oracle_config,
    oracle_weights,
    outer_tiers,
    random_model,
    random_tokens,
)
from helpers.optimizers import OPTIMIZERS, exact_step, flat, float32, rules
from legacy1bit.backward import backward_llm_batch
from legacy1bit.hyperparams import ModelConfig
from legacy1bit.layout import parameter_layout
from legacy1bit.model import (
    TernaryMatrix,
    apply_ternary_weight_updates,
    create_legacy_llm,
    create_legacy_llm_gradients,
)
from legacy1bit.optimizer import SGD, AdamW, Muon, Optimizer, moment_bytes
from legacy1bit.schemes import SCHEMES

optimizers = pytest.mark.parametrize("make", OPTIMIZERS)

# Threads share the weights in spans of 16,384 at most: below one, and several with a remainder.
CONFIGS = {
    "small": make_config(num_blocks=1),
    "float": make_config(num_blocks=1, scheme="float"),
    "large": make_config(vocab_size=101, model_dim=42, ffn_multiplier=4, ternary_embedding=True),
    "sign": make_config(num_blocks=1, scheme="sign", sub_norm=True),
    "2bit": make_config(num_blocks=1, scheme="2bit", scale="row", int8_activations=True),
}
configs = together("config", CONFIGS.values())
# One below a span and one of several, with codes that follow the gradient's sign in the first.
two_configs = together("config", [CONFIGS["sign"], CONFIGS["large"]])


def random_gradients(config, seed=1, std=0.1):
    gradients = create_legacy_llm_gradients(config)
    rng = np.random.default_rng(seed)
    # Large ones, small ones and zeros.
    sizes = 10.0 ** rng.integers(-3, 1, gradients.flat.size) * std
    gradients.flat[...] = rng.normal(size=gradients.flat.size) * sizes
    gradients.flat[::7] = 0.0
    return gradients


def decays(config):
    """bool[N]: whether the weight is a matrix's."""
    return np.concatenate(
        [np.full(part.size, part.kind != "vector") for part in parameter_layout(config)]
    )


def state(optimizer):
    model = optimizer.model
    codes = [value.values.ravel() for value in model.parameters.values()
             if isinstance(value, TernaryMatrix)]  # fmt: skip
    scales = [value.scales for value in model.parameters.values()
              if isinstance(value, TernaryMatrix)]  # fmt: skip
    arrays = [flat(model), optimizer.first.copy(), optimizer.second.copy()]
    if codes:
        arrays += [np.concatenate(codes), np.concatenate([value.ravel() for value in scales])]
    return arrays


def assert_same_state(actual, expected):
    for array, other in zip(actual, expected, strict=True):
        assert_same_bits(array, other)


def check_step(optimizer, gradients, learning_rate, factor=1.0, given=None, **kwargs):
    """One step, against the exact one from the very same state.

    ``given`` are the settings that the optimizer was made with, but for the weight decay.
    """
    gradient, before = gradients.flat.copy(), optimizer.steps
    exact, bounds = exact_step(optimizer, gradient, float32(learning_rate), factor, given or {})
    norm = optimizer.step(gradients, learning_rate, **kwargs)
    assert optimizer.steps == before + 1
    assert_same_bits(gradients.flat, gradient, "the gradient")
    # The squares are summed in float32 by two sums of 512 at most, and then in float64.
    exact_norm = math.sqrt(math.fsum(gradient.astype(float) ** 2))
    assert_close(norm, exact_norm, rtol=gamma(514) / 2, atol=0)
    actual = flat(optimizer.model), optimizer.first, optimizer.second
    for name, value, expected, bound in zip(
        ("weights", "first", "second"), actual, exact, bounds, strict=True
    ):
        assert_close(value, expected, rtol=0, atol=bound, what=name, dtype=np.float32)
    assert_quantized(optimizer.model)
    return norm


# --- AdamW, Muon and SGD --------------------------------------------------------------------------


@every_tier
@optimizers
@configs
def test_step_is_exact_but_for_rounding(config, make):
    optimizer = make(random_model(config))
    for step in range(3):
        check_step(optimizer, random_gradients(config, seed=step), 0.01 / (step + 1))


@every_tier
@pytest.mark.parametrize("config", ["small", "sign"])
@pytest.mark.parametrize(
    ("make", "settings"),
    [
        *[(make, {"weight_decay": 0.0}) for make in OPTIMIZERS],
        *[(make, {"sign_direction": "ascend"}) for make in OPTIMIZERS],
        (AdamW, {"beta1": 0.0, "beta2": 0.999}),
        (AdamW, {"epsilon": 0.01}),
        (Muon, {"beta1": 0.0, "beta2": 0.999, "momentum": 0.0}),
        (Muon, {"epsilon": 0.01, "muon_lr_ratio": 0.5}),
        (SGD, {"momentum": 0.0}),
        (SGD, {"momentum": 0.999, "weight_decay": 3.0}),
    ],
)
def test_step_heeds_its_settings(make, settings, config):
    optimizer = make(random_model(CONFIGS[config]), **settings)
    assert optimizer.weight_decay == float32(settings.get("weight_decay", 0.1))
    for step in range(2):
        gradients = random_gradients(CONFIGS[config], seed=step)
        check_step(optimizer, gradients, 0.01 / (step + 1), given=settings)


@every_tier
def test_step_of_muon_is_exact_but_for_rounding_where_matrices_are_wide():
    """More columns than the matrix product packs at once."""
    config = make_config(num_blocks=1, ffn_multiplier=44)
    check_step(Muon(random_model(config)), random_gradients(config), 0.01)


@every_tier
@optimizers
def test_step_is_exact_but_for_rounding_after_many_steps(make):
    # The corrections approach 1 and the moments what they would be for ever.
    config = CONFIGS["small"]
    optimizer = make(random_model(config))
    check_step(optimizer, random_gradients(config), 0.01)
    optimizer.steps = 100_000
    check_step(optimizer, random_gradients(config, seed=2), 0.01)


@every_tier
@optimizers
@configs
def test_step_decays_matrices_only(make, config):
    optimizer = make(random_model(config), weight_decay=0.5)
    before, matrices = flat(optimizer.model), decays(config)
    check_step(optimizer, create_legacy_llm_gradients(config), 0.25)
    after = flat(optimizer.model)
    assert_same_bits(after[~matrices], before[~matrices])
    # A gradient of 0 moves nothing. Both factors are exact, and signs have no size to lose.
    factor = np.full(before.size, 1 - 0.25 * 0.5, np.float32)
    for start, stop, _, rule in rules(optimizer):
        if rule in ("muon", "sign"):
            factor[start:stop] = {"muon": 1 - 0.25 * 3.3 * 0.5, "sign": 1.0}[rule]
    assert_same_bits(after[matrices], (before * factor)[matrices])


@every_tier
@optimizers
def test_weight_decay_may_change_between_steps(make):
    config = CONFIGS["small"]
    optimizer = make(random_model(config), weight_decay=0.5)
    for step, decay in enumerate((0.5, 0.0, 0.25)):
        optimizer.weight_decay = decay
        check_step(optimizer, random_gradients(config, seed=step), 0.01)
    before = flat(optimizer.model)
    optimizer.weight_decay = 0.0
    optimizer.first[...] = 0.0
    optimizer.step(create_legacy_llm_gradients(config), 0.01)
    assert_same_bits(flat(optimizer.model), before)


@every_tier
@optimizers
@two_configs
def test_step_clips_the_whole_gradient(make, config):
    gradients = random_gradients(config)
    norm = check_step(make(random_model(config)), gradients, 0.01, clip=0.0)
    for clip in (norm / 3, norm * 0.999):
        optimizer = make(random_model(config))
        for _ in range(2):
            assert check_step(optimizer, gradients, 0.01, clip / norm, clip=clip) == norm


@every_tier
def test_the_norm_counts_every_element_once():
    # Squares are summed by 1,024, and these stand around where one sum ends and the next begins.
    config = make_config(model_dim=12, vocab_size=256)
    optimizer = SGD(create_legacy_llm(config, 1))
    for place in (0, 1022, 1023, 1024, 1025, 2047, 2048, 256 * 12 - 1):
        gradients = create_legacy_llm_gradients(config)
        gradients.parameters["embedding.weight"].reshape(-1)[place] = 3.0
        assert optimizer.step(gradients, 0.0) == 3.0


@every_tier
@optimizers
def test_step_leaves_a_gradient_within_the_limit(make):
    config = CONFIGS["small"]
    gradients = random_gradients(config)
    optimizer = make(random_model(config))
    norm = optimizer.step(gradients, 0.01)
    for clip in (0.0, norm, norm * 1.001, 1e9):
        other = make(random_model(config))
        assert other.step(gradients, 0.01, clip) == norm
        assert_same_state(state(other), state(optimizer))


@every_tier
@optimizers
@two_configs
def test_step_changes_nothing_for_a_gradient_that_is_not_finite(make, config):
    optimizer = make(random_model(config))
    optimizer.step(random_gradients(config), 0.01)
    before, gradients = state(optimizer), random_gradients(config, seed=2)
    cases = itertools.product((math.nan, math.inf, -math.inf), ((0, 1), (17, 2), (-1, 2)))
    for value, (position, threads) in cases:
        former, gradients.flat[position] = gradients.flat[position], value
        assert not math.isfinite(optimizer.step(gradients, 0.01, 1.0, threads))
        assert optimizer.steps == 1
        assert_same_state(state(optimizer), before)
        gradients.flat[position] = former
    check_step(optimizer, gradients, 0.01)


@outer_tiers
@optimizers
@configs
def test_step_has_the_same_bits_with_any_number_of_threads(make, config):
    answers = []
    for threads in (1, 2, 3, 300):
        optimizer = make(random_model(config))
        norms = [optimizer.step(random_gradients(config, seed), 0.01, 1.0, threads)
                 for seed in range(2)]  # fmt: skip
        answers.append((norms, state(optimizer)))
    for norms, arrays in answers[1:]:
        assert norms == answers[0][0]
        assert_same_state(arrays, answers[0][1])


@optimizers
def test_optimizer_nbytes_counts_both_moments(make):
    optimizer = make(random_model(CONFIGS["large"]))
    assert optimizer.nbytes == 8 * optimizer.model.num_parameters


@optimizers
def test_optimizers_go_on_from_their_moments(make):
    config = CONFIGS["large"]
    one = make(random_model(config))
    one.step(random_gradients(config), 0.01)
    other = make(random_model(config, seed=2))
    for name, values in other.model.latent.items():
        values[...] = one.model.latent[name]
    other.first[...], other.second[...], other.steps = one.first, one.second, one.steps
    for optimizer in (one, other):
        optimizer.step(random_gradients(config, seed=2), 0.01)
    assert_same_state(state(one), state(other))


@outer_tiers
@optimizers
@pytest.mark.parametrize("scheme", [*SCHEMES, "float"])
def test_optimizers_lower_the_loss(make, scheme):
    config = make_config(scheme=scheme)
    model, tokens = random_model(config), random_tokens(config, 3, 9)
    targets = random_tokens(config, 3, 9, seed=7)
    optimizer, losses = make(model), []
    for _ in range(30):
        gradients = create_legacy_llm_gradients(config)
        losses.append(backward_llm_batch(model, tokens, targets, gradients))
        optimizer.step(gradients, 0.05 if make is SGD else 0.01, 1.0)
    assert losses[-1] < 0.7 * losses[0]


@every_tier
def test_muon_moves_every_direction_of_a_matrix_alike():
    config = make_config(num_blocks=1, model_dim=18, ffn_multiplier=2)
    optimizer, gradients = Muon(random_model(config), weight_decay=0.0), random_gradients(config)
    # Singular values from 1 down to a fiftieth, in both shapes of matrix and in squares.
    rng = np.random.default_rng(3)
    for gradient in gradients.parameters.values():
        if gradient.ndim == 2:
            u, _, vt = np.linalg.svd(rng.normal(size=gradient.shape), full_matrices=False)
            gradient[...] = (u * np.geomspace(1.0, 0.02, len(vt))) @ vt
    before = flat(optimizer.model)
    optimizer.step(gradients, 0.01)
    moved = (before.astype(float) - flat(optimizer.model)) / (0.01 * 3.3)
    for start, stop, shape, rule in rules(optimizer):
        if rule != "muon":
            continue
        height, width = shape
        step = moved[start:stop].reshape(height, width) / math.sqrt(max(1.0, height / width))
        u, s, vt = np.linalg.svd(gradients.flat[start:stop].reshape(height, width), False)
        # The same directions, and in each about the same length: the coefficients of Jordan et
        # al. bring singular values to within about 0.3 of 1, no nearer.
        along = u.T @ step @ vt.T
        assert_close(along - np.diag(np.diag(along)), np.zeros_like(along), rtol=0, atol=5e-6)
        assert np.ptp(s) > 0.9
        assert (np.abs(np.diag(along) - 1.0) < 0.35).all()


@optimizers
def test_optimizers_reject_what_does_not_fit(make):
    config = CONFIGS["small"]
    optimizer = make(random_model(config))
    before = state(optimizer)
    with pytest.raises(ValueError, match="other settings"):
        optimizer.step(create_legacy_llm_gradients(make_config()), 0.01)
    with pytest.raises(TypeError):
        optimizer.step(None, 0.01)
    with pytest.raises(ValueError, match="no latent weights"):
        make(create_legacy_llm(config, 1, trainable=False))
    with pytest.raises(TypeError):
        make(None)
    for direction in ("up", None, 1, "Ascend"):
        with pytest.raises(ValueError, match=r"sign_direction is .*expected descend or ascend"):
            make(random_model(config), sign_direction=direction)
    with pytest.raises(TypeError):
        optimizer.weight_decay = None
    assert optimizer.steps == 0
    assert_same_state(state(optimizer), before)


@optimizers
@pytest.mark.parametrize("threads", [0, -1])
def test_step_rejects_fewer_than_one_thread(make, threads):
    config = CONFIGS["small"]
    with pytest.raises(ValueError, match=f"threads is {threads}, expected at least 1"):
        make(random_model(config)).step(random_gradients(config), 0.01, 1.0, threads)


def test_optimizer_has_no_rule_of_its_own():
    with pytest.raises(TypeError, match="make an AdamW, a Muon or an SGD"):
        Optimizer(random_model(CONFIGS["small"]), 0.1, "descend")
    assert all(issubclass(make, Optimizer) for make in OPTIMIZERS)


@every_tier
def test_sgd_by_hand():
    config = CONFIGS["float"]
    optimizer, gradients = SGD(random_model(config), 0.5, 0.25), create_legacy_llm_gradients(config)
    matrix, bias = optimizer.model.latent["output.weight"], optimizer.model.latent["output.bias"]
    matrix[...], bias[...] = 2.0, 2.0
    for name in ("output.weight", "output.bias"):
        gradients.parameters[name][...] = 1.0
    # Momenta 1, 1.5, 1.75; the decay takes a sixteenth of the matrix. All of it is exact.
    for expected in (
        (2.0 * 15 / 16 - 0.25, 1.75),
        ((2.0 * 15 / 16 - 0.25) * 15 / 16 - 0.375, 1.375),
        (((2.0 * 15 / 16 - 0.25) * 15 / 16 - 0.375) * 15 / 16 - 0.4375, 0.9375),
    ):
        optimizer.step(gradients, 0.25)
        assert_same_bits(matrix, np.full(matrix.shape, expected[0], np.float32))
        assert_same_bits(bias, np.full(bias.shape, expected[1], np.float32))
    assert not optimizer.second.any()


# --- The scheme sign ------------------------------------------------------------------------------

SIGN_CONFIGS = {
    "tensor": make_config(scheme="sign", num_blocks=1),
    "rows, all": make_config(scheme="sign", scale="row", ternary_embedding=True),
    "one": make_config(scheme="sign", scale="one", num_blocks=1, sub_norm=True),
    # Spans of 16,384 and less.
    "large": make_config(scheme="sign", model_dim=42, num_blocks=1, scale="128"),
}


@outer_tiers
@optimizers
@pytest.mark.parametrize("direction", ["descend", "ascend"])
@pytest.mark.parametrize("config", SIGN_CONFIGS.values(), ids=SIGN_CONFIGS)
def test_codes_of_sign_become_the_signs_of_their_gradients(config, direction, make):
    """Departure 1: C's weight becomes the gradient's own sign, and that is "ascend"."""
    optimizer = make(random_model(config), sign_direction=direction)
    before = {name: (value.values.copy(), value.scales.copy())
              for name, value in optimizer.model.parameters.items()
              if isinstance(value, TernaryMatrix)}  # fmt: skip
    gradients = random_gradients(config)
    gradients.flat[1::7] = -0.0
    gradients.flat[2::7] *= np.float32(1e-38)
    gradients.flat[3::7] = np.float32(-1e-45)
    gradients.flat[4::7] = 1e18
    # Clipping changes no sign, not even of what it makes vanish.
    optimizer.step(gradients, 0.01, 1.0)
    for name, (codes, scales) in before.items():
        value, gradient = optimizer.model.parameters[name], gradients.parameters[name]
        expected = oracle.sign_step(codes, gradient, direction).astype(np.int8)
        assert {-1.0, 0.0, 1.0} == set(np.sign(gradient).ravel())
        assert_same_bits(value.values, expected, name)
        assert_same_bits(value.scales, scales, name)
        assert_same_bits(optimizer.model.latent[name], expected.astype(np.float32), name)


@outer_tiers
@optimizers
@pytest.mark.parametrize("config", SIGN_CONFIGS.values(), ids=SIGN_CONFIGS)
def test_floats_of_sign_follow_the_optimizer(config, make):
    steps = {}
    for scheme, direction in (("sign", "descend"), ("sign", "ascend"), ("ternary", "descend")):
        changed = dataclasses.replace(config, scheme=scheme)
        optimizer = make(random_model(changed), sign_direction=direction)
        gradients = random_gradients(changed)
        # The same vectors in all three, and the same gradients: they have the same norm.
        for name, values in optimizer.model.latent.items():
            if values.ndim == 1 or not isinstance(optimizer.model.parameters[name], TernaryMatrix):
                values[...] = np.linspace(-1.0, 1.0, values.size).reshape(values.shape)
        for _ in range(2):
            optimizer.step(gradients, 0.01, 1.0)
        floats = np.concatenate([
            values.ravel() for name, values in optimizer.model.latent.items()
            if not isinstance(optimizer.model.parameters[name], TernaryMatrix)
        ])  # fmt: skip
        steps[scheme, direction] = floats
        if scheme == "sign":
            size = optimizer.model.num_parameters - floats.size
            # What has no moments keeps none.
            assert not optimizer.first[:size].any()
            assert not optimizer.second[:size].any()
            assert optimizer.first[size:].any()
    for floats in steps.values():
        assert_same_bits(floats, steps["sign", "descend"])


@every_tier
@pytest.mark.parametrize("direction", ["descend", "ascend"])
def test_sign_is_what_apply_ternary_weight_updates_does(direction):
    config = make_config(scheme="sign", num_blocks=1)
    gradients, model = random_gradients(config), random_model(config)
    apply_ternary_weight_updates(model, gradients, 0.01, direction)
    for make in OPTIMIZERS:
        optimizer = make(random_model(config), sign_direction=direction)
        optimizer.step(gradients, 0.01)
        for name, value in optimizer.model.parameters.items():
            if isinstance(value, TernaryMatrix):
                assert_same_bits(value.values, model.parameters[name].values, name)


def test_sign_descends_where_c_climbs():
    config = make_config(scheme="sign", scale="one", model_dim=24)
    gradients, slopes = random_gradients(config), {}
    for direction in ("descend", "ascend"):
        optimizer = SGD(random_model(config), sign_direction=direction)
        before = oracle_weights(optimizer.model)
        optimizer.step(gradients, 0.0)
        after = oracle_weights(optimizer.model)
        slopes[direction] = sum(
            float((gradient * (after[name] - before[name])).sum())
            for name, gradient in gradients.parameters.items()
        )
    assert slopes["descend"] < 0.0 < slopes["ascend"]


# --- The C original's rule ------------------------------------------------------------------------

C_CONFIG = ModelConfig.c_original(9, 8, 1)


def c_update(direction="descend", learning_rate=0.5):
    """A model before and after an update, and the gradients: of both signs, and zeros."""
    gradients = random_gradients(C_CONFIG)
    gradients.flat[1::7] = -0.0
    gradients.flat[2::7] = np.float32(1e-45)
    gradients.flat[3::7] = -1e30
    model = random_model(C_CONFIG)
    apply_ternary_weight_updates(model, gradients, learning_rate, direction)
    return random_model(C_CONFIG), model, gradients


def test_apply_ternary_weight_updates_steps_against_the_sign():
    before, after, gradients = c_update()
    for name, gradient in gradients.parameters.items():
        old, new = before.parameters[name], after.parameters[name]
        if isinstance(new, TernaryMatrix):
            assert {-1.0, 0.0, 1.0} == set(np.sign(gradient).ravel())
            assert_same_bits(new.values[gradient > 0], np.full((gradient > 0).sum(), -1, np.int8))
            assert_same_bits(new.values[gradient < 0], np.full((gradient < 0).sum(), 1, np.int8))
            assert_same_bits(new.values[gradient == 0], old.values[gradient == 0])
            assert new.scale == old.scale
        else:
            expected = old - 0.5 * gradient.astype(float)
            assert_close(new, expected, rtol=UNIT_ROUNDOFF, atol=0, what=name, dtype=np.float32)


def test_apply_ternary_weight_updates_rounds_no_more_than_it_must():
    before, after, gradients = c_update(learning_rate=0.1)
    for name, gradient in gradients.parameters.items():
        if not isinstance(after.parameters[name], TernaryMatrix):
            change = float(np.float32(0.1)) * gradient.astype(float)
            expected = before.parameters[name] - change
            bound = gamma(2) * np.abs(change)
            assert_close(after.parameters[name], expected, rtol=UNIT_ROUNDOFF, atol=bound)


def test_apply_ternary_weight_updates_leaves_the_latent_weights():
    before, after, _ = c_update()
    for name, value in after.parameters.items():
        if isinstance(value, TernaryMatrix):
            assert_same_bits(after.latent[name], before.latent[name])


def test_apply_ternary_weight_updates_descends_where_c_climbs():
    """Departure 1: C's weight becomes the gradient's own sign."""
    before, ours, gradients = c_update()
    _, of_c, _ = c_update("ascend")
    slopes = {"ours": 0.0, "c": 0.0}
    for name, gradient in gradients.parameters.items():
        old = before.parameters[name]
        if not isinstance(old, TernaryMatrix):
            # The other parameters take the same step either way.
            assert_same_bits(of_c.parameters[name], ours.parameters[name])
            continue
        expected = oracle.fault1_weight_update(old.values, gradient)
        assert_same_bits(of_c.parameters[name].values, expected.astype(np.int8))
        for who, model in (("ours", ours), ("c", of_c)):
            moved = model.parameters[name].values.astype(float) - old.values
            slopes[who] += float((gradient * moved).sum())
    assert slopes["ours"] < 0.0 < slopes["c"]


def test_apply_ternary_weight_updates_changes_the_loss_as_its_direction_says():
    """Departure 1, seen in the loss: the first bit of the way, one matrix at a time."""
    config = ModelConfig.c_original(16, 16, 1)
    tokens, targets = random_tokens(config, 4, 8), random_tokens(config, 4, 8, seed=9)
    gradients = create_legacy_llm_gradients(config)
    backward_llm_batch(random_model(config), tokens, targets, gradients)

    def loss(weights):
        return oracle.loss_and_gradients(weights, oracle_config(config), tokens, targets)[0]

    before = oracle_weights(random_model(config))
    for direction, sign in (("descend", -1), ("ascend", 1)):
        model = random_model(config)
        apply_ternary_weight_updates(model, gradients, 0.0, direction)
        after = oracle_weights(model)
        for name in ("output.weight", "blocks.0.ffn.wo", "blocks.0.attention.wo"):
            part = before[name] + 0.001 * (after[name] - before[name])
            assert sign * (loss({**before, name: part}) - loss(before)) > 0.0, name


def test_apply_ternary_weight_updates_rejects_what_does_not_fit():
    model, gradients = random_model(C_CONFIG), random_gradients(C_CONFIG)
    before = {name: np.copy(getattr(value, "values", value))
              for name, value in model.parameters.items()}  # fmt: skip
    with pytest.raises(ValueError, match="direction is 'up', expected descend or ascend"):
        apply_ternary_weight_updates(model, gradients, 0.1, "up")
    with pytest.raises(ValueError, match="other settings"):
        apply_ternary_weight_updates(model, random_gradients(CONFIGS["small"]), 0.1)
    with pytest.raises(TypeError):
        apply_ternary_weight_updates(None, gradients, 0.1)
    with pytest.raises(TypeError):
        apply_ternary_weight_updates(model, None, 0.1)
    for name, value in model.parameters.items():
        assert_same_bits(getattr(value, "values", value), before[name])


@pytest.mark.parametrize(
    ("make", "settings"),
    [(AdamW, {"beta1": 1.0}), (AdamW, {"beta2": -0.1}), (AdamW, {"epsilon": -1e-8}),
     (AdamW, {"weight_decay": math.nan}), (Muon, {"momentum": 1.0}), (SGD, {"momentum": 5.0}),
     (SGD, {"weight_decay": -1.0})],
)  # fmt: skip
def test_optimizers_reject_settings_that_make_no_sense(make, settings):
    with pytest.raises(ValueError, match=rf"{next(iter(settings))} is .*expected 0 or more"):
        make(random_model(make_config()), **settings)


@pytest.mark.parametrize("rate", [math.nan, math.inf, -math.inf])
def test_step_rejects_rates_that_are_not_finite(rate):
    config = make_config()
    with pytest.raises(ValueError, match=r"learning_rate is .*finite"):
        AdamW(random_model(config)).step(random_gradients(config), rate)


# --- Moments in eight bits ------------------------------------------------------------------------

# Blocks of 256: below one, and spans of several with a remainder.
EIGHT_BIT_CONFIGS = together("config", [CONFIGS["small"], CONFIGS["sign"], CONFIGS["large"]])
MOMENTS = {"first": True, "second": False}


def starts_of_parameters(config):
    return [part.start for part in parameter_layout(config)]


def decoded(optimizer, name):
    return oracle.from_eight_bits(
        optimizer.moments[name],
        optimizer.moments[f"{name}_scales"],
        starts_of_parameters(optimizer.model.config),
        MOMENTS[name],
    )


@every_tier
@optimizers
@EIGHT_BIT_CONFIGS
def test_step_in_eight_bits_is_that_of_floats_between_codes(make, config):
    """Decoded moments, the same step to the bit, and the oracle's codes of its moments."""
    small, whole = make(random_model(config), bits=8), make(random_model(config))
    for step in range(3):
        gradients = random_gradients(config, seed=step)
        for name in MOMENTS:
            whole.moments[name][...] = decoded(small, name)
        norms = [each.step(gradients, 0.01, 1.0) for each in (small, whole)]
        assert norms[0] == norms[1]
        assert_same_bits(flat(small.model), flat(whole.model), "weights")
        for name, signed in MOMENTS.items():
            codes, scales = oracle.to_eight_bits(
                whole.moments[name], starts_of_parameters(config), signed
            )
            assert_same_bits(small.moments[f"{name}_scales"], scales, f"scales of {name}")
            assert_same_bits(small.moments[name], codes, name)
    assert np.abs(decoded(small, "first")).max() > 0.0


@outer_tiers
@optimizers
@EIGHT_BIT_CONFIGS
def test_step_in_eight_bits_has_the_same_bits_with_any_number_of_threads(make, config):
    answers = []
    for threads in (1, 2, 300):
        optimizer = make(random_model(config), bits=8)
        for step in range(2):
            optimizer.step(random_gradients(config, seed=step), 0.01, 1.0, threads)
        answers.append([flat(optimizer.model), *optimizer.moments.values()])
    for answer in answers[1:]:
        assert_same_state(answer, answers[0])


def of_first_moments(values):
    """The decoded first moments of a float model after a step of SGD with these gradients."""
    config = make_config(scheme="float", vocab_size=512, model_dim=6, num_blocks=1)
    optimizer = SGD(create_legacy_llm(config, 1), bits=8)
    gradients = create_legacy_llm_gradients(config)
    place = gradients.parameters["embedding.weight"].reshape(-1)
    place[: values.size] = values
    optimizer.step(gradients, 0.0)
    start = next(p.start for p in parameter_layout(config) if p.name == "embedding.weight")
    return decoded(optimizer, "first")[start : start + values.size]


@every_tier
def test_eight_bits_hold_every_value_and_every_size():
    """Each of the 256 values comes back, and a number is off by at most half a step."""
    values = oracle.eight_bit_values(signed=True)
    assert values.size == 256
    assert np.unique(values).size == 256
    for scale in (1.0, 2.0**-130, 2.0**100 * 1e-14):
        values = (oracle.eight_bit_values(signed=True) * np.float32(scale)).astype(np.float32)
        if scale == 1.0:
            assert_same_bits(of_first_moments(values), values)
        # Of the smallest scale a value may be a few times the smallest denormal.
        assert_close(of_first_moments(values), values, rtol=2.0**-22, atol=2.0**-149)
    rng = np.random.default_rng(3)
    values = (rng.uniform(-1, 1, 1024) * 10.0 ** rng.uniform(-5, 0, 1024)).astype(np.float32)
    values[::256] = 1.0
    # Half of the way to the next value; the worst is at the lower end of a decade of few values.
    bound = np.maximum(0.5 * np.abs(values), 1.4e-6)
    assert (np.abs(of_first_moments(values) - values) <= bound).all()
    near_one = np.abs(values) > 0.1
    assert (np.abs(of_first_moments(values) - values)[near_one] <= 0.0071).all()


def beside_middles(signed):
    """The middles between neighboring values, and the numbers next to them."""
    values = oracle.eight_bit_values(signed).astype(np.float64)
    middles = ((values[:-1] + values[1:]) / 2).astype(np.float32)
    return np.sort(
        np.concatenate([np.nextafter(middles, np.float32(way)) for way in (-2.0, 2.0)] + [middles])
    )


@every_tier
def test_numbers_beside_the_middle_of_two_values_have_the_nearest():
    values = beside_middles(signed=True)
    # Each block has its largest magnitude.
    blocks = [np.append(part, np.float32(1.0)) for part in np.array_split(values, 4)]
    for block in blocks:
        codes, scales = oracle.to_eight_bits(block, [0], signed=True)
        expected = oracle.from_eight_bits(codes, scales, [0], signed=True)
        assert_same_bits(of_first_moments(block), expected)


@every_tier
def test_second_moments_beside_the_middle_of_two_values_have_the_nearest():
    config = make_config(scheme="float", vocab_size=512, model_dim=6, num_blocks=1)
    roots = np.sqrt(beside_middles(signed=False))
    for part in np.array_split(roots, 4):
        optimizers = [AdamW(create_legacy_llm(config, 1), beta2=0.0, bits=bits) for bits in (8, 32)]
        gradients = create_legacy_llm_gradients(config)
        place = gradients.parameters["embedding.weight"].reshape(-1)
        place[: part.size + 1] = np.append(part, np.float32(1.0))
        for optimizer in optimizers:
            optimizer.step(gradients, 0.0)
        codes, _ = oracle.to_eight_bits(
            optimizers[1].second, starts_of_parameters(config), signed=False
        )
        assert_same_bits(optimizers[0].second, codes)


@every_tier
def test_second_moment_in_eight_bits_does_not_vanish():
    """Where it did, a step after it would be a moment over epsilon."""
    config = make_config(scheme="float")
    optimizer = AdamW(create_legacy_llm(config, 1), weight_decay=0.0, bits=8)
    before, gradients = flat(optimizer.model), create_legacy_llm_gradients(config)
    gradients.flat[::2], gradients.flat[::4] = 1e-4, 1.0
    optimizer.step(gradients, 0.001)
    gradients.flat[...] = 0.0
    for _ in range(5):
        optimizer.step(gradients, 0.001)
    assert np.abs(flat(optimizer.model) - before).max() < 0.01
    assert (decoded(optimizer, "second")[2::4] > 0.0).all()


@EIGHT_BIT_CONFIGS
def test_moments_in_eight_bits_take_a_quarter_of_the_bytes(config):
    for bits in (8, 32):
        optimizer = AdamW(random_model(config), bits=bits)
        assert optimizer.nbytes == moment_bytes(parameter_layout(config), bits)
        assert optimizer.nbytes == sum(array.nbytes for array in optimizer.moments.values())
    large = ModelConfig(model_dim=512, num_blocks=2)
    assert moment_bytes(parameter_layout(large), 8) < 0.26 * moment_bytes(parameter_layout(large))


def test_optimizer_refuses_other_bits():
    for make in OPTIMIZERS:
        with pytest.raises(ValueError, match="bits is 16, expected 8 or 32"):
            make(random_model(CONFIGS["small"]), bits=16)
