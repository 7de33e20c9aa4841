"""Models and data to test the passes with, and how close to the oracle is close enough.

With int8 activations an answer jumps where a number lies half way between two steps, so that the
smallest error decides. There is no tolerance for that; there is data without such numbers, which
`without_ties` looks for and `rounding_effect` makes sure of.
"""

import contextlib
import functools
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest

from helpers import oracle
from helpers.arrays import UNIT_ROUNDOFF, assert_close, assert_same_bits, gamma
from helpers.cases import together
from legacy1bit import math_ops
from legacy1bit.hyperparams import ARCHITECTURES, SCALES, ModelConfig
from legacy1bit.model import (
    TernaryMatrix,
    create_legacy_llm,
)
from legacy1bit.packed import (
    FORMS,
)
from legacy1bit.schemes import SCHEMES

every_tier = pytest.mark.usefixtures("tier")
# For the order of work around the kernels, where these have tests of their own in every tier.
outer_tiers = pytest.mark.usefixtures("outer_tier")
schemes = pytest.mark.parametrize("scheme", ["ternary", "float"])


def in_every_tier(function, *args, **kwargs):
    """Yield what a function gives in one instruction set after the other."""
    former = math_ops.simd_level()
    try:
        for level in math_ops.simd_levels():
            math_ops.set_simd_level(level)
            yield function(*args, **kwargs)
    finally:
        math_ops.set_simd_level(former)


# --- Models ---------------------------------------------------------------------------------------

SMALL = {
    "vocab_size": 11,
    "model_dim": 12,
    "num_blocks": 2,
    "num_heads": 3,
    "ffn_multiplier": 3,
    "sequence_length": 16,
    "output_bias": True,
}


def make_config(**changes):
    return ModelConfig(**{**SMALL, **changes})


def attention_cases(changes):
    """Settings, batch and time of attention layers; odder widths where the scales differ."""
    shapes = ((2, 1, 1, 1), (6, 3, 2, 5), (34, 1, 2, 9), (96, 3, 1, 3))
    if "scale" in changes:
        shapes += ((1, 1, 1, 3), (300, 3, 1, 2), (130, 5, 2, 8))
    for dim, heads, batch, time in shapes:
        config = make_config(model_dim=dim, num_heads=heads, sequence_length=32, num_blocks=1,
                             positions="none" if dim in (1, 300) else "rope", ffn_multiplier=1,
                             **changes)  # fmt: skip
        yield config, batch, time


def random_model(config, seed=1):
    """A model without a trivial value: no gamma is 1, no bias 0 and no code certain."""
    model, rng = create_legacy_llm(config, seed), np.random.default_rng(seed)
    for name, values in model.latent.items():
        if values.ndim == 1:
            values[...] = rng.normal(1.0 if name.endswith("gamma") else 0.0, 0.3, values.shape)
        elif config.scheme == "sign" and isinstance(model.parameters[name], TernaryMatrix):
            values[...] = rng.integers(-1, 2, values.shape)
        else:
            # With scale 1 a fifth of ternary codes is not 0, and of 2-bit ones 3 or -3; else the
            # layers keep the size of x.
            std = values.shape[1] ** -0.5
            if config.scale == "one":
                std = 1.6 if config.scheme == "2bit" else 0.4
            values[...] = rng.normal(0.0, std, values.shape)
    model.quantize()
    return model


# The models are made once; the tests leave them as they are.
model_of = functools.cache(random_model)


def exact_dense(matrix):
    """The weights of a matrix of codes in float64, which holds them exactly."""
    wide = np.repeat(matrix.scales.astype(np.float64), matrix.group, axis=1)
    return matrix.values * wide[:, : matrix.shape[1]]


def oracle_weights(model, prefix=""):
    """The effective weights in float64, as the oracle takes them, under a prefix."""
    weights = {
        name: exact_dense(value) if isinstance(value, TernaryMatrix) else value
        for name, value in model.parameters.items()
    }
    return {
        name.removeprefix(prefix): np.asarray(value, np.float64)
        for name, value in weights.items()
        if name.startswith(prefix)
    }


def decoder_weights(model):
    """The same as a decoder has them: what was not quantized is a matrix in bfloat16."""
    coded = {name for name, value in model.parameters.items() if isinstance(value, TernaryMatrix)}
    return {
        name: oracle.bfloat16(value) if value.ndim == 2 and name not in coded else value
        for name, value in oracle_weights(model).items()
    }


def oracle_config(config):
    names = ("vocab_size", "model_dim", "num_blocks", "num_heads", "head_dim", "activation",
             "positions", "rope_base", "rope_pairs", "rope_fraction", "rope_factor",
             "rope_original_length", "final_norm", "attention_window", "windows", "scheme",
             "ternary_embedding", "tied_embeddings", "int8_activations", "norm", "norm_epsilon",
             "sub_norm", "qk_norm", "gated")  # fmt: skip
    settings = {name: getattr(config, name) for name in names}
    # What is not quantized gets its inputs as they are.
    settings["int8_activations"] &= config.scheme != "float"
    return settings


# Groups with a tail and without, one and more than a panel of the packed product, rows fewer and
# more than its tile, columns that are whole vectors.
SCALED_SHAPES = ((1, 1), (3, 3), (70, 48), (5, 129), (33, 257), (17, 300), (40, 600), (530, 260),
                 (1, 300), (19, 32))  # fmt: skip
scaled_matrices = together(
    ("scheme", "shape", "group"),
    [(scheme, shape, group) for scheme in SCHEMES for shape in SCALED_SHAPES
     for group in (0, 16, 128, 256, "tensor")
     if scheme == "ternary" or shape[1] == 300 or (scheme == "2bit" and group == 128)],
)  # fmt: skip


def random_matrix(scheme, shape, group):
    """Random codes of a scheme, and for scales powers of two: products of integers are exact."""
    rng, levels = np.random.default_rng(1), SCHEMES[scheme].levels
    codes = rng.choice(np.array(levels, np.int8), shape)
    if group == "tensor":
        return TernaryMatrix(codes, 0.25, levels=levels)
    groups = -(-shape[1] // group) if group else 1
    scales = 2.0 ** rng.integers(-3, 4, (shape[0], groups)).astype(np.float32)
    return TernaryMatrix(codes, scales, group, levels)


MODELS = {
    "defaults": {},
    "float": {"scheme": "float"},
    "ternary embedding": {"ternary_embedding": True},
    "scale one": {"scale": "one", "ternary_embedding": True},
    "plain": {"activation": "relu", "positions": "none", "final_norm": False},
    "span 1": {"attention_window": 1},
    "span 3": {"attention_window": 3, "positions": "none"},
    "one block": {"num_blocks": 1, "final_norm": False},
    "no output bias": {"output_bias": False},
    "odd": {"vocab_size": 7, "model_dim": 15, "num_heads": 5, "positions": "none"},
    "wide": {"vocab_size": 67, "model_dim": 66, "num_heads": 3, "ffn_multiplier": 1},
    "median, a row": {"scheme": "ternary-median", "scale": "row", "ternary_embedding": True},
    "binary, groups": {"scheme": "binary", "scale": "128", "ternary_embedding": True,
                       "model_dim": 130, "num_heads": 5, "ffn_multiplier": 1, "num_blocks": 1},
    "2bit, groups": {"scheme": "2bit", "scale": "256", "model_dim": 90, "num_heads": 3,
                     "num_blocks": 1},
    "sign": {"scheme": "sign", "scale": "row", "attention_window": 3},
    "sub norm": {"sub_norm": True},
    "sub norm, plain": {"sub_norm": True, "scheme": "float", "activation": "relu",
                        "positions": "none", "final_norm": False},
    "int8": {"int8_activations": True},
    "int8, last": {"int8_activations": True, "ternary_embedding": True, "scale": "row"},
    "int8, no final norm": {"int8_activations": True, "ternary_embedding": True,
                            "final_norm": False, "scheme": "2bit", "model_dim": 6},
    "b158": {"int8_activations": True, "sub_norm": True, "ternary_embedding": True,
             "scheme": "binary", "activation": "relu"},
}  # fmt: skip
models = pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
CODED = {name: changes for name, changes in MODELS.items() if changes.get("scheme") != "float"}

# What the architectures of other programs have, one option at a time; nothing of odd sizes is a
# multiple of a vector.
ONE_KV = {"model_dim": 10, "num_heads": 2, "num_kv_heads": 1, "head_dim": 6}
GATED = {"gated": True, "ffn_dim": 17}
YARN = {"head_dim": 20, "rope_base": 100.0, "rope_factor": 4.0, "rope_original_length": 64}
OPTION_MODELS = {
    "wide heads": {"head_dim": 10},
    "narrow heads": {"model_dim": 30, "head_dim": 6, "num_heads": 2},
    "kv heads": {"num_heads": 6, "num_kv_heads": 3, "head_dim": 6, "model_dim": 7},
    "kv heads, int8": {"num_heads": 6, "num_kv_heads": 2, "head_dim": 10,
                       "int8_activations": True},
    "kv heads, float": {**ONE_KV, "scheme": "float", "attention_window": 3},
    "ffn_dim": {"ffn_dim": 7},
    "rms": {"norm": "rms"},
    "rms, sub norm": {"norm": "rms", "sub_norm": True, "norm_epsilon": 1e-3, "scheme": "float"},
    "rms, int8": {"norm": "rms", "sub_norm": True, "int8_activations": True,
                  "ternary_embedding": True},
    "rms, no final norm": {"norm": "rms", "final_norm": False},
    "layer norm without bias": {"norm_bias": False, "norm_epsilon": 0.05, "sub_norm": True},
    "qk_norm": {"qk_norm": True, "norm_epsilon": 1e-3},
    "qk_norm, kv heads": {**ONE_KV, "qk_norm": True, "positions": "none", "scheme": "float"},
    "qkv biases": {"biases": "qkv"},
    "no biases": {"biases": "none", "output_bias": False},
    "gated relu2": GATED,
    "gated relu": {**GATED, "activation": "relu", "sub_norm": True},
    "gated silu": {**GATED, "activation": "silu", "biases": "none"},
    "gated gelu": {**GATED, "activation": "gelu", "int8_activations": True},
    "gated, float": {"gated": True, "ffn_dim": 50, "activation": "silu", "scheme": "float"},
    "silu": {"activation": "silu", "ffn_dim": 19},
    "gelu": {"activation": "gelu", "scheme": "float"},
    "tied": {"tied_embeddings": True},
    "tied, ternary": {"tied_embeddings": True, "ternary_embedding": True,
                      "int8_activations": True},
    "tied, float": {"tied_embeddings": True, "scheme": "float", "output_bias": False,
                    "final_norm": False},
    "adjacent": {"rope_pairs": "adjacent", "head_dim": 10},
    "fraction": {"rope_fraction": 0.4, "head_dim": 10},
    "fraction, adjacent": {"rope_fraction": 0.6, "head_dim": 20, "rope_pairs": "adjacent"},
    "yarn": YARN,
    "yarn, adjacent, fraction": {**YARN, "rope_pairs": "adjacent", "rope_fraction": 0.5},
    "windows": {"window_pattern": "3,0", "num_blocks": 3},
    "groups of 64": {"scale": "64", "model_dim": 66, "num_heads": 1, "ffn_multiplier": 1},
    "shards": {"scale_shards": 3, "ffn_dim": 7, "ternary_embedding": True},
    "shards, 2bit": {"scale_shards": 2, "scheme": "2bit", "int8_activations": True},
    **{name: {"model_dim": 20, "num_heads": 4, "num_kv_heads": 2, "head_dim": 6, "ffn_dim": 33,
              "output_bias": False, **ARCHITECTURES[name]}
       for name in ("nemotron", "llama", "qwen3", "bitnet")},
}  # fmt: skip


def random_architecture(seed):
    """Settings for `make_config`: a value of every option, at random."""
    rng = np.random.default_rng(seed)

    def one_of(*choices):
        return choices[rng.integers(len(choices))]

    kv_heads, head_dim = one_of(1, 1, 2, 3), one_of(6, 10, 20)
    rope = {"rope_pairs": one_of("halves", "adjacent"), "rope_base": one_of(100.0, 10000.0)}
    if head_dim > 6 and one_of(False, True):
        rope["rope_fraction"] = one_of(0.4, 0.6) if head_dim == 10 else one_of(0.3, 0.5, 0.7)
    if one_of(False, True):
        rope |= {"rope_factor": one_of(2.0, 4.0), "rope_original_length": one_of(8, 64, 512)}
    reach = one_of({}, {"attention_window": 3}, {"window_pattern": one_of("3,0", "0,1,5")})
    scale = one_of({"scale": one_of(*SCALES)}, {"scale_shards": one_of(2, 3, 7)})
    flags = ("ternary_embedding", "tied_embeddings", "int8_activations", "norm_bias", "sub_norm",
             "qk_norm", "gated", "final_norm", "output_bias")  # fmt: skip
    return {
        "model_dim": int(rng.integers(5, 25)),
        "num_heads": kv_heads * one_of(1, 2, 3),
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "ffn_dim": int(rng.integers(7, 51)),
        "num_blocks": one_of(1, 2, 3),
        "scheme": one_of("ternary", *SCHEMES, "float"),
        "norm": one_of("rms", "layer"),
        "norm_epsilon": one_of(1e-6, 1e-5, 1e-2),
        "biases": one_of("all", "qkv", "none"),
        "activation": one_of("relu2", "relu", "silu", "gelu"),
        **{flag: one_of(False, True) for flag in flags},
        **one_of(rope, rope, rope, {"positions": "none"}),
        **reach,
        **scale,
    }


# What the layers can have besides; every scheme, and scales of every granularity.
LAYERS = {
    "sub norm": {"sub_norm": True},
    "sub norm, float": {"sub_norm": True, "scheme": "float"},
    "int8": {"int8_activations": True, "scale": "row"},
    "int8, float": {"int8_activations": True, "scheme": "float"},
    "int8, sub norm": {"int8_activations": True, "sub_norm": True, "scheme": "binary"},
    "median, a row": {"scheme": "ternary-median", "scale": "row"},
    "binary, groups": {"scheme": "binary", "scale": "128"},
    "2bit, groups": {"scheme": "2bit", "scale": "256"},
    "sign, a row": {"scheme": "sign", "scale": "row"},
    "2bit, one": {"scheme": "2bit", "scale": "one"},
}
layers = pytest.mark.parametrize("changes", LAYERS.values(), ids=LAYERS)


def float_twin(model, **changes):
    """The model that has for weights what another has for latent ones."""
    # A model of floats has no scales.
    of_floats = {"scheme": "float", "scale_shards": 1}
    twin = create_legacy_llm(model.config.with_settings(**of_floats, **changes), 2)
    for name, values in model.latent.items():
        twin.latent[name][...] = values
    return twin


def wild_model(seed=3, **settings):
    """A model whose matrices are large, so that each token of the context changes its mind."""
    sizes = {"model_dim": 16, "num_blocks": 1, "num_heads": 2, "ffn_multiplier": 4}
    sizes |= {"sequence_length": 16}
    model = create_legacy_llm(ModelConfig(**{**sizes, **settings}), seed)
    random = np.random.default_rng(seed)
    for weights in model.latent.values():
        if weights.ndim == 2:
            weights[...] = random.standard_normal(weights.shape, np.float32)
    model.quantize()
    return model


LEVELS = ((-1, 0, 1), (-1, 1), (-3, -1, 1, 3))
# What can be packed: levels and form.
KINDS = [(levels, form) for levels in LEVELS for form in FORMS if len(levels) < 4 or form == "2bit"]


def has_trits(config):
    groups = config.scale in ("128", "256") and config.model_dim > int(config.scale)
    return config.scheme != "2bit" and not groups


# --- Data -----------------------------------------------------------------------------------------


def rows(*shape, seed=5):
    x = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    x.flags.writeable = False
    return x


def random_tokens(config, batch, time, padding="none", seed=6):
    """int32[B, T] with padding at one side, in the middle, in a whole row or everywhere."""
    tokens = np.random.default_rng(seed).integers(0, config.vocab_size, (batch, time), np.int32)
    some = max(time // 3, 1)
    place = {
        "none": np.s_[:0],
        "left": np.s_[0, :some],
        "right": np.s_[-1, time - some :],
        "middle": np.s_[:, time // 2 : time // 2 + some],
        "row": np.s_[-1],
        "all": np.s_[:],
    }[padding]
    tokens[place] = config.pad_token
    return tokens


PADDINGS = ("none", "left", "right", "middle", "row", "all")
paddings = pytest.mark.parametrize("padding", PADDINGS)


# Lengths of the documents in each row. Of the short ones some are padding alone: the first with
# padding at the left, the middle one of the last row with padding in the middle. Queries go in
# blocks of 24, on whose bounds, and beside them, the long ones begin.
SHORT_ROWS = ((5, 1, 10), (16,), (9, 3, 4))
LONG_ROWS = ((72, 58), (71, 2, 57), (73, 55, 2), (1, 126, 3), (130,), (1,) * 130)


def starts_of(documents):
    """int32[B, T]: where the document of each position begins; None for None."""
    if documents is None:
        return None
    return np.array(
        [np.repeat(np.cumsum((0, *lengths[:-1])), lengths) for lengths in documents], np.int32
    )


def places_of(documents):
    """Where each document lies in its batch: slices of one row."""
    for row, lengths in enumerate(documents):
        ends = np.cumsum(lengths).tolist()
        for length, end in zip(lengths, ends, strict=True):
            yield np.s_[row : row + 1, end - length : end]


# What are no starts of two rows of five positions, and what is said of them.
BAD_STARTS = (
    (np.zeros((2, 4), int), ValueError, r"has shape \(2, 4\), expected \(2, 5\)"),
    (np.zeros((3, 5), int), ValueError, "has shape"),
    (np.zeros(5, int), ValueError, "has shape"),
    (np.zeros((2, 5, 1), int), ValueError, "has shape"),
    (np.zeros((2, 5)), TypeError, r"float64\[2, 5\], expected whole numbers"),
    (np.zeros((2, 5), bool), TypeError, "expected whole numbers"),
    ("starts", TypeError, "expected whole numbers"),
    ([[0] * 5, [0, 1, 2, 4, 4]], ValueError, r"\[1, 3\] is 4, expected 0 to 3"),
    ([[0, 0, 0, -1, 0], [0] * 5], ValueError, r"\[0, 3\] is -1, expected 0 to 3"),
    ([[0] * 5, [0, 0, 0, 1 << 32, 0]], ValueError, "expected 0 to 3"),
    (np.full((2, 5), (1 << 64) - 1, np.uint64), ValueError, "expected 0 to 0"),
    ([[0, 1, 2, 1, 2], [0] * 5], ValueError, r"\[0, 3\] is 1, expected at least 2"),
    (np.array([[0] * 5, [0, 1, 0, 1, 1]], np.uint8), ValueError, r"\[1, 2\] is 0, expected at"),
)
bad_starts = pytest.mark.parametrize(("starts", "error", "message"), BAD_STARTS)


def as_float64(arrays):
    return {name: value.astype(np.float64) for name, value in arrays.items()}


# --- How close is close enough --------------------------------------------------------------------


class NearTieError(Exception):
    """A number lies so close to half way between two int8 steps that float32 may go either way."""


def without_ties(case):
    """Let ``case(*args, draw=n)`` try one draw of its data after the other; keep the first good.

    The cases are kept: otherwise each tier would work out the same answers again.
    """

    @functools.cache
    def first_good(*args):
        for draw in range(200):
            with contextlib.suppress(NearTieError):
                return case(*args, draw=draw)
        raise AssertionError(f"no data without a tie for {args}")

    return first_good


def run_watched(function, arrays):
    """The function's answer, and all that the oracle rounded to int8 for it, counted in steps."""
    original, seen = oracle.quantize_activations, []

    def watched(x):
        step = oracle.activation_step(x)
        seen.append(x / np.where(step > 0.0, step, 1.0))
        return original(x)

    with mock.patch.object(oracle, "quantize_activations", watched):
        return function(arrays), seen


def rounding_effect(function, arrays, draws=4):
    """How far one float32 rounding of every input moves the exact answer.

    ``function`` takes a dict of float64 arrays and gives one. Returns its answer and, for each
    entry, the largest change of any element among some random perturbations. It is what float32
    arithmetic without any error of its own would be excused for, so a small multiple of it bounds
    an arithmetic whose operations round. Raises `NearTieError` where a number that is rounded to
    int8 lies within such a multiple of a tie.

    There is no data without a number near a tie of int16: what is near one may go to either side,
    where that changes no int8, and other perturbations are seen without that rounding.
    """

    def unsure(x):
        return np.rint(x + rng.uniform(-0.1, 0.1, x.shape))

    exact, steps = run_watched(function, arrays)
    # Counting in steps rounds a number of up to 127 twice.
    movements = [2 * 127 * UNIT_ROUNDOFF] * len(steps)
    check_ties(steps, movements)
    with mock.patch.object(oracle, "nearest_int16", lambda x: x):
        (plain, plain_steps), rng = run_watched(function, arrays), np.random.default_rng(0)
        effects = dict.fromkeys(plain, 0.0)
        for _ in range(draws):
            moved, moved_steps = run_watched(
                function,
                {
                    name: value * (1.0 + UNIT_ROUNDOFF * rng.uniform(-1.0, 1.0, np.shape(value)))
                    for name, value in arrays.items()
                },
            )
            for name, value in moved.items():
                effects[name] = max(effects[name], float(np.abs(value - plain[name]).max()))
            for i, (before, after) in enumerate(zip(plain_steps, moved_steps, strict=True)):
                movements[i] = max(movements[i], float(np.abs(after - before).max()))
    check_ties(steps, movements)
    with mock.patch.object(oracle, "nearest_int16", unsure):
        for _ in range(draws):
            moved, moved_steps = run_watched(function, arrays)
            if all(
                (np.rint(a) == np.rint(b)).all() for a, b in zip(steps, moved_steps, strict=True)
            ):
                for name, value in moved.items():
                    change = float(np.abs(value - exact[name]).max())
                    effects[name] = max(effects[name], change)
    return exact, effects


def check_ties(steps, movements):
    for values, movement in zip(steps, movements, strict=True):
        if np.abs(np.abs(values - np.rint(values)) - 0.5).min() < 8 * movement:
            raise NearTieError


def assert_near(actual, expected, roundings=8):
    """Compare dicts of arrays with what `rounding_effect` returned.

    Each array may be off by so many times the effect on it, and so many roundings of the largest
    number of all: what cancels exactly in one of them, does so among numbers of that size.
    """
    exact, effects = expected
    assert actual.keys() == exact.keys()
    largest = max(float(np.abs(value).max()) for value in exact.values())
    for name, value in exact.items():
        atol = roundings * (effects[name] + UNIT_ROUNDOFF * largest)
        assert_close(actual[name], value, rtol=0, atol=atol, what=name, dtype=np.float32)


def assert_quantized(model, exact=False):
    """Codes and scales are the oracle's, of the latent weights as they are.

    Sums of arbitrary weights are rounded, up to 1,024 of them in float32, and so a scale may be
    either float16 number where its sum lies that near to the middle of two. With ``exact`` the
    sums are said to be exact, and the scales have to be.
    """
    config = model.config
    for name, value in model.parameters.items():
        if not isinstance(value, TernaryMatrix):
            continue
        latent = model.latent[name]
        fixed = oracle.first_scale(name, config.num_blocks) if config.scheme == "sign" else None
        if exact or config.scale == "one" or fixed is not None:
            codes, scales = oracle.quantize(
                latent, config.scheme, config.scale, fixed, config.scale_shards
            )
        else:
            wanted = oracle.scales_before_rounding(
                latent, config.scheme, config.scale, config.scale_shards
            )
            error = gamma(1024 + 4)
            low, high = (oracle.to_float16(wanted * (1 + sign * error)) for sign in (-1, 1))
            # What is in between is one of the two.
            scales = np.clip(value.scales.astype(np.float64), low, high)
            assert_same_bits(oracle.to_float16(scales), scales, name)
            codes = oracle.codes_of(latent, scales, config.scheme, config.scale)
        assert_same_bits(value.scales, scales.astype(np.float32), f"the scales of {name}")
        assert_same_bits(value.values, codes, name)


def assert_same_model(actual, expected):
    assert actual.config == expected.config
    assert actual.parameters.keys() == expected.parameters.keys()
    for name, value in expected.parameters.items():
        if isinstance(value, TernaryMatrix):
            assert_same_bits(actual.parameters[name].values, value.values, name)
            assert_same_bits(actual.parameters[name].scales, value.scales, name)
        else:
            assert_same_bits(actual.parameters[name], value, name)


# --- Calls that may crash -------------------------------------------------------------------------


def run_child(code):
    """What a script prints in a process of its own, where it may crash."""
    done = subprocess.run(
        [sys.executable, "-c", "import numpy as np\nfrom legacy1bit.model import *\n" + code],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stderr[-2000:]}"
    return done.stdout.strip()


# For `run_child`: takes so many more bytes at most from then on; all but half a megabyte, which is
# less than a packing buffer.
LIMIT = (
    "import resource\n"
    "def limit(more):\n"
    "    size = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
    "    resource.setrlimit(resource.RLIMIT_AS, (size + more, resource.RLIM_INFINITY))\n"
)
TAKE_ALL = (
    "kept = []\n"
    "limit(8 << 20)\n"
    "try:\n"
    "    while True:\n"
    "        kept.append(bytearray(1 << 19))\n"
    "except MemoryError:\n"
    "    pass\n"
)


def rejection(call):
    """Code for `run_child` that makes a call and prints the exception that is raised."""
    return f"try:\n    {call}\nexcept Exception as error:\n    print(type(error).__name__, error)\n"
