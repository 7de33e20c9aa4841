"""The model's parts: making and freeing them, quantization, and the files (departures 10 to 14)."""

import contextlib
import copy
import dataclasses
import errno
import functools
import itertools
import json
import math
import os
import pickle
import shutil
import stat
import struct
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from helpers import oracle
from helpers.arrays import UNIT_ROUNDOFF, assert_close, assert_same_bits, dot_bound
from helpers.cases import together
from helpers.models import (
    MODELS,
    OPTION_MODELS,
    assert_near,
    assert_quantized,
    assert_same_model,
    every_tier,
    exact_dense,
    float_twin,
    make_config,
    oracle_config,
    oracle_weights,
    outer_tiers,
    random_model,
    rejection,
    rounding_effect,
    run_child,
)
from helpers.paths import GOLDEN
from legacy1bit import math_ops
from legacy1bit.backward import (
    BackwardContext,
    BackwardPass,
    backward_llm,
    backward_llm_batch,
)
from legacy1bit.formats.native import model_folder
from legacy1bit.formats.provenance import Provenance
from legacy1bit.forward import (
    ForwardContext,
    forward_embedding,
    forward_llm,
    forward_llm_batch,
)
from legacy1bit.hyperparams import ALIASES, SCALES, ModelConfig
from legacy1bit.inference import Decoder
from legacy1bit.layout import block_options, dimensions, parameter_layout
from legacy1bit.model import (
    ACTIVATIONS,
    FeedForward,
    LayerNorm,
    LegacyLLM,
    ModelFileError,
    MultiHeadAttention,
    RotaryTable,
    TernaryMatrix,
    TransformerBlock,
    apply_ternary_weight_updates,
    create_float_array,
    create_legacy_llm,
    create_legacy_llm_gradients,
    create_ternary_matrix,
    create_transformer_block_context,
    free_float_array,
    free_legacy_llm,
    free_legacy_llm_gradients,
    free_ternary_matrix,
    free_transformer_block_context,
    load_model,
    save_model,
    zero_legacy_llm_gradients,
)
from legacy1bit.optimizer import SGD, AdamW, Muon
from legacy1bit.packed import Int8Matrix, PackedMatrix, PackedModel
from legacy1bit.schemes import SCHEMES

# --- Matrices and arrays --------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (64, 33)])
def test_create_ternary_matrix_has_codes_and_scale_one(shape):
    matrix = create_ternary_matrix(*shape, 1)
    assert matrix.shape == matrix.values.shape == shape
    assert matrix.values.dtype == np.int8
    assert matrix.scale == 1.0
    assert np.isin(matrix.values, (-1, 0, 1)).all()


def test_create_ternary_matrix_takes_each_code_a_third_of_the_time():
    values = create_ternary_matrix(100, 100, 1).values
    # Five standard deviations of a binomial count.
    assert_close(np.bincount(values.ravel() + 1), np.full(3, 1e4 / 3), rtol=0, atol=5 * 47.2)


@pytest.mark.parametrize(
    "create",
    [
        lambda seed: create_ternary_matrix(9, 9, seed).values,
        lambda seed: create_float_array(9, seed),
        lambda seed: np.concatenate(
            [a.ravel() for a in create_legacy_llm(make_config(), seed).latent.values()]
        ),
    ],
    ids=["create_ternary_matrix", "create_float_array", "create_legacy_llm"],
)
def test_create_functions_depend_on_the_seed_alone(create):
    """Departure 14: C seeds from the clock, so that no run can be repeated."""
    assert_same_bits(create(7), create(7))
    assert_same_bits(create(np.random.default_rng(7)), create(7))
    assert not np.array_equal(create(7), create(8))
    generator = np.random.default_rng(7)
    assert not np.array_equal(create(generator), create(generator))


def test_create_float_array_is_uniform_and_small():
    array = create_float_array(10_000, 1)
    assert array.dtype == np.float32
    assert array.shape == (10_000,)
    assert np.abs(array).max() <= 0.01
    # Five standard errors of the mean and of the mean square of a uniform distribution.
    assert abs(array.mean(dtype=float)) < 5 * 0.01 / math.sqrt(3e4)
    assert_close((array.astype(float) ** 2).mean() * 3e4, 1.0, rtol=5 * 0.9 / 100, atol=0)


@pytest.mark.parametrize("size", [0, -1])
def test_create_functions_reject_sizes_below_one(size):
    for create in (
        lambda: create_ternary_matrix(size, 3, 1),
        lambda: create_ternary_matrix(3, size, 1),
        lambda: create_float_array(size, 1),
        lambda: create_transformer_block_context(4, 8, 2, size, 3),
        lambda: create_transformer_block_context(4, 8, 2, 3, size),
    ):
        with pytest.raises(ValueError, match=f"is {size}, expected at least 1"):
            create()


@pytest.mark.parametrize("size", [None, 2.0, "3", True])
def test_create_functions_reject_other_kinds_of_size(size):
    with pytest.raises(TypeError, match="rows is"):
        create_ternary_matrix(size, 3, 1)
    with pytest.raises(TypeError, match="size is"):
        create_float_array(size, 1)


CODES = np.array([[-1, 0, 1], [1, 1, 0]], np.int8)


@pytest.mark.parametrize(
    "values",
    [
        pytest.param(None, id="None"),
        pytest.param([[0, 1]], id="list"),
        pytest.param(CODES.astype(np.float32), id="float32"),
        pytest.param(CODES.astype(np.int64), id="int64"),
        pytest.param(CODES.astype(np.uint8), id="uint8"),
        pytest.param(CODES[0], id="one axis"),
        pytest.param(CODES[None], id="three axes"),
        pytest.param(CODES[:, ::2], id="strided"),
        pytest.param(CODES.T, id="transposed"),
        pytest.param(CODES[:0], id="no rows"),
        pytest.param(CODES[:, :0], id="no columns"),
        pytest.param(CODES * 2, id="2"),
        pytest.param(np.full((2, 2), -128, np.int8), id="-128"),
    ],
)
def test_ternary_matrix_rejects_other_values(values):
    with pytest.raises((TypeError, ValueError)):
        TernaryMatrix(values)


@pytest.mark.parametrize(
    "scale",
    [
        math.nan,
        math.inf,
        -math.inf,
        "x",
        None,
        np.ones((1, 1)),
        np.array([[np.nan]], "f4"),
        np.array([[1], [np.inf]], "f4"),
        np.ones(1, np.float32),
        np.ones(2, np.float32),
        np.ones((1, 2), np.float32),
        np.ones((2, 2), np.float32),
        np.ones((3, 1), np.float32),
        np.ones((2, 3), np.float32),
        np.ones((0, 1), np.float32),
        np.ones((2, 1, 1), np.float32),
        np.ones((4, 1), np.float32)[::2],
        np.ones((2, 1), np.float16),
    ],
)
def test_ternary_matrix_rejects_other_scales(scale):
    with pytest.raises((TypeError, ValueError)):
        TernaryMatrix(CODES, scale)


@pytest.mark.parametrize("columns", [1, 2])
@pytest.mark.parametrize("rows", [1, 3])
def test_ternary_matrix_demands_as_many_scales_as_groups(rows, columns):
    codes = np.ones((2, 129), np.int8)
    TernaryMatrix(codes, np.ones((2, 2), np.float32), 128)
    if (rows, columns) != (1, 1):
        with pytest.raises(ValueError, match=r"scale has shape .*groups of 128"):
            TernaryMatrix(codes, np.ones((rows, columns), np.float32), 128)


@pytest.mark.parametrize("group", [-1, -16, True, 2.0, "16", None])
def test_ternary_matrix_rejects_other_groups(group):
    with pytest.raises((TypeError, ValueError), match="group is"):
        TernaryMatrix(CODES, 1.0, group)


@pytest.mark.parametrize("group", [1, 3, 8, 17, 24, 128 + 8])
def test_ternary_matrix_rejects_groups_that_kernels_cannot_multiply_by(group):
    """They take 16 neighbours at a time, which must have one scale."""
    codes = np.ones((2, 257), np.int8)
    scales = np.ones((2, -(-257 // group)), np.float32)
    with pytest.raises(ValueError, match=f"group is {group}"):
        TernaryMatrix(codes, scales, group)


@pytest.mark.parametrize("levels", [(-1, 1), (-3, -1, 1, 3), (0,), (-128, 127)])
def test_ternary_matrix_takes_the_codes_of_its_levels_alone(levels):
    for code in range(-128, 128):
        codes = np.full((2, 3), levels[0], np.int8)
        codes[1, 2] = code
        if code in levels:
            assert TernaryMatrix(codes, levels=levels).values is codes
        else:
            with pytest.raises(ValueError, match=f"number other than .*{levels[-1]}"):
                TernaryMatrix(codes, levels=levels)


def test_ternary_matrix_without_levels_is_an_error():
    # In a process of its own: nothing may be read from in front of an empty tuple.
    printed = run_child(rejection("TernaryMatrix(np.ones((2, 5), np.int8), levels=())"))
    assert printed.startswith("ValueError")


def test_ternary_matrix_is_codes_times_scale():
    matrix = TernaryMatrix(CODES, 0.375)
    assert (matrix.shape, matrix.scale, matrix.group) == ((2, 3), 0.375, 3)
    assert matrix.values is CODES
    assert_same_bits(matrix.scales, np.array([[0.375]], np.float32))
    assert_same_bits(matrix.dense(), (CODES * 0.375).astype(np.float32))


def test_ternary_matrix_shares_an_array_of_its_scales():
    for scales in (np.array([[2.0]], np.float32), np.array([[2.0], [2.0]], np.float32)):
        matrix = TernaryMatrix(CODES, scales)
        assert matrix.scales is scales
        scales[...] = 0.5
        assert matrix.scale == 0.5
        assert_same_bits(matrix.dense(), (CODES * 0.5).astype(np.float32))


def test_ternary_matrix_scale_is_the_mean_of_several():
    matrix = TernaryMatrix(CODES, np.array([[0.25], [1.0]], np.float32))
    assert matrix.scale == 0.625
    assert "scale=0.625" in repr(matrix)


def test_ternary_matrix_has_one_scale_for_all_groups():
    codes = create_ternary_matrix(3, 40, 1).values
    matrix = TernaryMatrix(codes, 0.5, 16)
    assert_same_bits(matrix.dense(), (codes * 0.5).astype(np.float32))


# A row, groups with and without a shorter one at the end, one longer than the row.
SCALED_SHAPES = ((1, 1), (3, 17), (17, 3), (2, 129), (129, 2), (5, 257), (4, 128), (6, 256))
scaled = pytest.mark.parametrize("group", [0, 16, 128, 256])
scaled_shapes = together("shape", SCALED_SHAPES)


def scaled_matrix(shape, group, scales):
    """Random codes of two bits, and a scale for each group drawn from ``scales``."""
    rng = np.random.default_rng(5)
    codes = rng.choice(np.array([-3, -1, 1, 3], np.int8), shape)
    count = shape[0], -(-shape[1] // (group or shape[1]))
    return TernaryMatrix(codes, rng.choice(np.array(scales, "f4"), count), group, (-3, -1, 1, 3))


@scaled
@scaled_shapes
def test_ternary_matrix_dense_is_codes_times_scales(shape, group):
    matrix = scaled_matrix(shape, group, [0.3, -1.7, 0.0, 1e-3])
    assert matrix.group == (group or shape[1])
    assert_same_bits(matrix.dense(), exact_dense(matrix).astype(np.float32))


SCALED_PRODUCTS = {
    "ternary_matrix_vector_mul": (1, oracle.ternary_matrix_vector_mul),
    "matrix_transpose_vector_mul": (0, oracle.matrix_transpose_vector_mul),
}


@every_tier
@pytest.mark.parametrize("name", SCALED_PRODUCTS)
@scaled
@scaled_shapes
def test_products_with_scales_are_those_of_the_dense_matrix(shape, group, name):
    axis, reference = SCALED_PRODUCTS[name]
    product, rng = getattr(math_ops, name), np.random.default_rng(6)
    # Powers of two and whole numbers: sums stay below 2^24 quarters, whatever their order.
    matrix = scaled_matrix(shape, group, [0.25, 0.5, 1.0, -2.0, 4.0])
    vector = rng.integers(-100, 101, shape[axis]).astype(np.float32)
    expected = reference(exact_dense(matrix), vector)
    assert_same_bits(product(matrix, vector) + np.float32(0), expected.astype(np.float32) + 0)
    # Another factor takes their place.
    expected = reference(matrix.values, vector, 0.5).astype(np.float32)
    assert_same_bits(product(matrix, vector, scale=0.5) + np.float32(0), expected + 0)

    matrix = scaled_matrix(shape, group, [0.3, -1.7, 1e-3, 70.0])
    vector = rng.normal(size=shape[axis]).astype(np.float32)
    exact = exact_dense(matrix)
    # The terms of a sum, a sum for each group, a scale and the product with it.
    bound = dot_bound(reference(np.abs(exact), np.abs(vector)), shape[axis] + shape[1] // 16 + 3)
    assert_close(product(matrix, vector), reference(exact, vector), rtol=0, atol=bound,
                 dtype=np.float32)  # fmt: skip


# --- Freeing --------------------------------------------------------------------------------------

FREED_MATRIX = {
    "dense": lambda m: m.dense(),
    "shape": lambda m: m.shape,
    "forward_embedding": lambda m: forward_embedding(m, 0),
    "a product": lambda m: math_ops.ternary_matrix_vector_mul(m, np.ones(4, np.float32)),
    "a layer": lambda m: FeedForward(
        m, np.zeros(3, np.float32), np.zeros((4, 3), np.float32), np.zeros(4, np.float32)
    ),
}


@pytest.mark.parametrize("use", FREED_MATRIX)
def test_free_ternary_matrix_makes_later_use_an_error(use):
    matrix = create_ternary_matrix(3, 4, 1)
    FREED_MATRIX[use](matrix)
    free_ternary_matrix(matrix)
    assert "freed" in repr(matrix)
    with pytest.raises(ValueError, match="freed"):
        FREED_MATRIX[use](matrix)


def test_free_ternary_matrix_of_a_layer_leaves_no_dangling_pointer():
    # Large enough that its memory goes back to the system, where reading it is a crash.
    printed = run_child(
        "from legacy1bit.forward import forward_embedding, forward_feed_forward\n"
        "n = 2048\n"
        "matrix = create_ternary_matrix(n, n, 1)\n"
        "zeros = np.zeros(n, np.float32)\n"
        "ffn = FeedForward(matrix, zeros, TernaryMatrix(np.zeros((n, n), np.int8)), zeros)\n"
        "free_ternary_matrix(matrix)\n"
        + rejection("forward_feed_forward(ffn, np.ones(n, np.float32)); print('computed')")
    )
    assert printed == "computed" or printed.startswith("ValueError")


def test_free_float_array_leaves_the_array():
    array = create_float_array(5, 1)
    free_float_array(array)
    assert_same_bits(array, create_float_array(5, 1))
    with pytest.raises((TypeError, ValueError)):
        free_float_array(None)


FREED_MODEL = {
    "trainable": lambda m: m.trainable,
    "latent": lambda m: m.latent,
    "quantize": lambda m: m.quantize(),
    "use_full_precision": lambda m: m.use_full_precision(True),
    "use_full_precision again": lambda m: m.use_full_precision(False),
    "use_blend": lambda m: m.use_blend(0.5),
    "stored_bytes": lambda m: m.stored_bytes(),
    "save_model": lambda m: save_model(m, "/nonexistent/model"),
    "save_model c-v1": lambda m: save_model(m, "/nonexistent/model", "c-v1"),
    "forward_llm": lambda m: forward_llm(m, 1),
    "forward_llm_batch": lambda m: forward_llm_batch(m, [[1, 2]]),
    "PackedModel": lambda m: PackedModel(m),
    "BackwardPass": lambda m: BackwardPass(m, 1, 1),
    "backward_llm": lambda m: backward_llm(m, 1, 2, create_legacy_llm_gradients(m.config)),
    "AdamW": lambda m: AdamW(m),
    "apply_ternary_weight_updates": lambda m: apply_ternary_weight_updates(
        m, create_legacy_llm_gradients(m.config), 0.1
    ),
}


@pytest.mark.parametrize("use", FREED_MODEL)
def test_free_legacy_llm_makes_later_use_an_error(use):
    model = create_legacy_llm(make_config(), 1)
    free_legacy_llm(model)
    free_legacy_llm(model)
    assert "freed" in repr(model)
    with pytest.raises(ValueError, match="freed"):
        FREED_MODEL[use](model)


def test_free_legacy_llm_in_full_precision_makes_later_use_an_error():
    model = create_legacy_llm(make_config(), 1)
    model.use_full_precision(True)
    free_legacy_llm(model)
    for wanted in (False, True):
        with pytest.raises(ValueError, match="freed"):
            model.use_full_precision(wanted)


def test_free_legacy_llm_stops_what_was_made_for_the_model():
    model = create_legacy_llm(make_config(), 1)
    gradients = create_legacy_llm_gradients(model.config)
    backward_pass, optimizer = BackwardPass(model, 1, 2), AdamW(model)
    free_legacy_llm(model)
    for use in (
        lambda: backward_pass.run([[1, 2]], [[2, 3]], gradients),
        lambda: optimizer.step(gradients, 0.1),
    ):
        with pytest.raises(ValueError, match="freed"):
            use()


def test_free_legacy_llm_leaves_the_arrays_others_hold():
    model = random_model(make_config())
    bias, block = model.parameters["output.bias"], model.blocks[0]
    before, norm = bias.copy(), block.norm1.gamma.copy()
    free_legacy_llm(model)
    assert_same_bits(bias, before)
    assert_same_bits(block.norm1.gamma, norm)


FREED_GRADIENTS = {
    "zero": lambda m, g: zero_legacy_llm_gradients(g),
    "layer": lambda m, g: g.layer("output"),
    "backward_llm_batch": lambda m, g: backward_llm_batch(m, [[1]], [[2]], g),
    "AdamW.step": lambda m, g: AdamW(m).step(g, 0.1),
    "apply": lambda m, g: apply_ternary_weight_updates(m, g, 0.1),
}


@pytest.mark.parametrize("use", FREED_GRADIENTS)
def test_free_legacy_llm_gradients_makes_later_use_an_error(use):
    model = create_legacy_llm(make_config(), 1)
    gradients = create_legacy_llm_gradients(model.config)
    free_legacy_llm_gradients(gradients)
    with pytest.raises(ValueError, match="freed"):
        FREED_GRADIENTS[use](model, gradients)


@pytest.mark.parametrize(
    "function",
    [free_ternary_matrix, free_legacy_llm, free_legacy_llm_gradients,
     free_transformer_block_context, zero_legacy_llm_gradients],
)  # fmt: skip
def test_free_functions_reject_other_kinds(function):
    for value in (None, 3, np.zeros(3, np.float32)):
        with pytest.raises(TypeError):
            function(value)


# --- Layers ---------------------------------------------------------------------------------------


def floats(*shape):
    return np.ones(shape, np.float32)


ATTENTION = {
    **{f"w{which}": floats(6, 6) for which in "qkvo"},
    **{f"b{which}": floats(6) for which in "qkvo"},
    "num_heads": 3,
}
FFN = {"wi": floats(9, 6), "bi": floats(9), "wo": floats(6, 9), "bo": floats(6)}
NORM = {"gamma": floats(6), "beta": floats(6)}
NORMED_ATTENTION = {**ATTENTION, **NORM}
NORMED_FFN = {**FFN, "gamma": floats(9), "beta": floats(9)}

LAYER_ERRORS = [
    *[(MultiHeadAttention, ATTENTION, {f"w{which}": value}, f"w{which}|expected")
      for which in "qkvo" for value in (floats(6, 5), floats(5, 6), floats(7, 7))],
    *[(MultiHeadAttention, ATTENTION, {f"b{which}": floats(5)}, f"b{which} has 5")
      for which in "qkvo"],
    *[(MultiHeadAttention, ATTENTION, {"num_heads": value}, "num_heads")
      for value in (0, -1, 4, 5, 12)],
    (MultiHeadAttention, ATTENTION, {"window": -1}, "window"),
    (MultiHeadAttention, ATTENTION, {"rotary": RotaryTable(4, 8)}, "rotary"),
    (FeedForward, FFN, {"wi": floats(9, 5)}, "wo"),
    (FeedForward, FFN, {"wo": floats(9, 6)}, "wo"),
    (FeedForward, FFN, {"bi": floats(6)}, "bi has 6"),
    (FeedForward, FFN, {"bo": floats(9)}, "bo has 9"),
    (FeedForward, FFN, {"activation": "swish"}, "activation is 'swish'"),
    *[(MultiHeadAttention, NORMED_ATTENTION, {part: floats(size)}, f"{part} has {size}")
      for part in ("gamma", "beta") for size in (5, 9)],
    *[(FeedForward, NORMED_FFN, {part: floats(size)}, f"{part} has {size}")
      for part in ("gamma", "beta") for size in (6, 8)],
    *[(layer, good, {"gamma": None}, "gamma")
      for layer, good in ((MultiHeadAttention, NORMED_ATTENTION), (FeedForward, NORMED_FFN))],
    (LayerNorm, NORM, {"beta": floats(5)}, "beta has 5"),
    (LayerNorm, NORM, {"gamma": floats(0), "beta": floats(0)}, "gamma is empty"),
]  # fmt: skip


def test_every_activation_is_known_everywhere():
    (setting,) = (one for one in dataclasses.fields(ModelConfig) if one.name == "activation")
    places = {
        "ModelConfig.activation": setting.metadata["choices"],
        "ACTIVATIONS of model.pyx": ACTIVATIONS,
        "ACTIVATIONS of oracle.py": oracle.ACTIVATIONS,
        "MODELS and OPTION_MODELS of helpers/models.py": {
            make_config(**one).activation for one in (MODELS | OPTION_MODELS).values()
        },
    }
    every = set().union(*places.values())
    lacking = {place: every - set(names) for place, names in places.items() if every - set(names)}
    assert not lacking, f"{lacking}: 'Add an activation' in CONTRIBUTING.md lists the places"


@pytest.mark.parametrize(("layer", "good", "change", "message"), LAYER_ERRORS)
def test_layers_reject_shapes_that_do_not_fit(layer, good, change, message):
    layer(**good)
    with pytest.raises(ValueError, match=message):
        layer(**{**good, **change})


@pytest.mark.parametrize(
    ("layer", "good"),
    [(MultiHeadAttention, NORMED_ATTENTION), (FeedForward, NORMED_FFN), (LayerNorm, NORM)],
)
def test_layers_reject_other_kinds_of_array(layer, good):
    for name, value in good.items():
        if not isinstance(value, np.ndarray):
            continue
        strided = np.repeat(value, 2, axis=-1)[..., ::2]
        # A layer may have no bias.
        none = () if name[0] == "b" else (None,)
        for bad in (*none, value.astype(np.float64), value.tolist(), strided):
            with pytest.raises((TypeError, ValueError)):
                layer(**{**good, name: bad})


def test_layers_have_a_norm_where_they_get_one():
    for layer, plain, normed in (
        (MultiHeadAttention, ATTENTION, NORMED_ATTENTION),
        (FeedForward, FFN, NORMED_FFN),
    ):
        assert layer(**plain).norm is None
        assert layer(**normed).norm.gamma is normed["gamma"]
        assert layer(**normed).norm.beta is normed["beta"]


def test_transformer_block_rejects_layers_of_other_widths():
    attention, ffn, norm = MultiHeadAttention(**ATTENTION), FeedForward(**FFN), LayerNorm(**NORM)
    TransformerBlock(attention, ffn, norm, norm)
    other = LayerNorm(floats(5), floats(5))
    wide = FeedForward(floats(9, 5), floats(9), floats(5, 9), floats(5))
    for parts, message in (
        ((attention, wide, norm, norm), "ffn.wi"),
        ((attention, ffn, other, norm), "norm1"),
        ((attention, ffn, norm, other), "norm2"),
    ):
        with pytest.raises(ValueError, match=message):
            TransformerBlock(*parts)
    for parts in ((None, ffn, norm, norm), (attention, attention, norm, norm)):
        with pytest.raises(TypeError):
            TransformerBlock(*parts)


@pytest.mark.parametrize(("head_dim", "base"), [(2, 10000.0), (8, 10000.0), (6, 7.0)])
def test_rotary_table_turns_as_the_oracle_does(head_dim, base):
    table = RotaryTable(head_dim, 9, base)
    table.fill(9)
    assert table.cosines.shape == table.sines.shape == (9, head_dim // 2)
    # Of the unit vectors (1, 0), rotation gives the cosines and the sines themselves.
    x = np.zeros((1, 9, 1, head_dim))
    x[..., : head_dim // 2] = 1.0
    turned = oracle.rotary(x, base)[0, :, 0]
    actual = np.concatenate([table.cosines, table.sines], axis=1)
    assert_close(actual, turned, rtol=0, atol=UNIT_ROUNDOFF, dtype=np.float32)


def test_rotary_table_is_the_same_however_it_grows():
    table, whole = RotaryTable(8, 100), RotaryTable(8, 100)
    for length in (1, 2, 3, 7, 30, 10, 100, 100):
        table.fill(length)
    whole.fill(100)
    np.testing.assert_array_equal(table.cosines, whole.cosines, strict=True)
    np.testing.assert_array_equal(table.sines, whole.sines, strict=True)
    assert (whole.cosines[:, 0] != 0.0).all()


@pytest.mark.memory
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux tells what is in memory")
def test_rotary_table_takes_memory_for_the_positions_that_are_used():
    """A file of some kilobytes may promise 131,072 positions, which were 134 MB here."""
    before = resident_bytes()
    table = RotaryTable(256, 1 << 17)
    table.fill(100)
    assert table.cosines.shape == (1 << 17, 128)
    assert resident_bytes() - before < 1 << 24


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_rotary_table_rejects_odd_heads():
    with pytest.raises(ValueError, match="rotary_dim is 3, expected an even"):
        RotaryTable(3, 8)


CONTEXT_SHAPES = {
    **dict.fromkeys(("input", "output", "norm1", "norm2", "q", "k", "v", "heads", "residual"),
                    (3, 5, 6)),
    **dict.fromkeys(("mean1", "inv_std1", "mean2", "inv_std2"), (3, 5)),
    **dict.fromkeys(("hidden", "activated"), (3, 5, 24)),
    "probs": (3, 2, 5, 5),
}  # fmt: skip
SUB_NORM_SHAPES = {
    "heads_normed": (3, 5, 6),
    "activated_normed": (3, 5, 24),
    **dict.fromkeys(("heads_mean", "heads_inv_std", "activated_mean", "activated_inv_std"), (3, 5)),
}


def test_create_transformer_block_context_has_room_for_every_activation():
    context = create_transformer_block_context(6, 24, 2, 3, 5)
    for name, shape in CONTEXT_SHAPES.items():
        array = getattr(context, name)
        assert (array.shape, array.dtype) == (shape, np.float32), name
    assert all(getattr(context, name) is None for name in SUB_NORM_SHAPES)
    free_transformer_block_context(context)


def test_create_transformer_block_context_has_room_for_the_inner_norms():
    context = create_transformer_block_context(6, 24, 2, 3, 5, sub_norm=True)
    for name, shape in (CONTEXT_SHAPES | SUB_NORM_SHAPES).items():
        array = getattr(context, name)
        assert (array.shape, array.dtype) == (shape, np.float32), name


# --- The layout of a model ------------------------------------------------------------------------

KINDS = ("quantized", "matrix", "vector")
LAYOUTS = {
    "defaults": {},
    "ternary embedding": {"ternary_embedding": True},
    "float": {"scheme": "float"},
    "float, ternary embedding": {"scheme": "float", "ternary_embedding": True},
    "no final norm": {"final_norm": False},
    "no output bias": {"output_bias": False},
    "inner norms": {"sub_norm": True},
    "inner norms, float": {"sub_norm": True, "scheme": "float", "int8_activations": True},
    "binary rows": {"scheme": "binary", "scale": "row", "ternary_embedding": True},
    "2bit groups": {"scheme": "2bit", "scale": "128", "int8_activations": True},
    "median groups": {"scheme": "ternary-median", "scale": "256"},
    "signs": {"scheme": "sign", "ternary_embedding": True},
}
layouts = pytest.mark.parametrize("changes", LAYOUTS.values(), ids=LAYOUTS)


@layouts
def test_parameter_layout_names_every_parameter(changes):
    config = make_config(**changes)
    dim, hidden, vocab = 12, 36, 11
    expected = {"embedding.weight": (vocab, dim), "output.weight": (vocab, dim)}
    if config.output_bias:
        expected["output.bias"] = (vocab,)
    for i in range(2):
        expected |= {f"blocks.{i}.attention.w{w}": (dim, dim) for w in "qkvo"}
        expected |= {f"blocks.{i}.attention.b{w}": (dim,) for w in "qkvo"}
        expected |= {f"blocks.{i}.ffn.wi": (hidden, dim), f"blocks.{i}.ffn.bi": (hidden,)}
        expected |= {f"blocks.{i}.ffn.wo": (dim, hidden), f"blocks.{i}.ffn.bo": (dim,)}
        expected |= {f"blocks.{i}.norm{n}.{p}": (dim,) for n in (1, 2) for p in ("gamma", "beta")}
        if config.sub_norm:
            expected |= {f"blocks.{i}.attention.{p}": (dim,) for p in ("gamma", "beta")}
            expected |= {f"blocks.{i}.ffn.{p}": (hidden,) for p in ("gamma", "beta")}
    if config.final_norm:
        expected |= {"final_norm.gamma": (dim,), "final_norm.beta": (dim,)}
    layout = parameter_layout(config)
    assert {part.name: part.shape for part in layout} == expected
    assert len(layout) == len(expected)
    kinds = {part.name: part.kind for part in layout}
    for name, shape in expected.items():
        edge = name in ("embedding.weight", "output.weight")
        quantized = config.scheme != "float" and (config.ternary_embedding or not edge)
        kind = "vector" if len(shape) == 1 else "quantized" if quantized else "matrix"
        assert kinds[name] == kind, name
    order = [KINDS.index(part.kind) for part in layout]
    assert order == sorted(order)


@layouts
def test_parameters_and_gradients_follow_the_layout(changes):
    config = make_config(**changes)
    model, gradients = random_model(config), create_legacy_llm_gradients(config)
    layout = parameter_layout(config)
    names = [part.name for part in layout]
    assert model.num_parameters == gradients.flat.size
    assert list(model.latent) == list(gradients.parameters) == names
    assert sorted(model.parameters) == sorted(names)
    gradients.flat[...] = np.arange(gradients.flat.size)
    flat = np.concatenate([array.ravel() for array in gradients.parameters.values()])
    assert_same_bits(flat, gradients.flat)
    for name, shape, kind, *_ in layout:
        assert gradients.parameters[name].shape == model.latent[name].shape == shape
        value = model.parameters[name]
        assert isinstance(value, TernaryMatrix) == (kind == "quantized")
        assert value.shape == shape
        if kind != "quantized":
            assert np.shares_memory(value, model.latent[name])
    # Layers are made of the very arrays.
    assert model.blocks[1].ffn.wi is model.parameters["blocks.1.ffn.wi"]
    assert model.blocks[0].norm2.beta is model.parameters["blocks.0.norm2.beta"]
    assert (model.final_norm is not None) == config.final_norm
    for layer, name in ((model.blocks[1].attention, "attention"), (model.blocks[1].ffn, "ffn")):
        assert (layer.norm is not None) == config.sub_norm
        if config.sub_norm:
            assert layer.norm.gamma is model.parameters[f"blocks.1.{name}.gamma"]
            assert layer.norm.beta is model.parameters[f"blocks.1.{name}.beta"]


def test_gradients_layer_names_one_layers_arrays():
    gradients = create_legacy_llm_gradients(make_config())
    assert set(gradients.layer("blocks.1.ffn")) == {"wi", "bi", "wo", "bo"}
    assert set(gradients.layer("output")) == {"weight", "bias"}
    inner = create_legacy_llm_gradients(make_config(sub_norm=True))
    assert set(inner.layer("blocks.1.ffn")) == {"wi", "bi", "wo", "bo", "gamma", "beta"}
    gradients.layer("output")["bias"][...] = 1.0
    assert gradients.flat.sum() == 11.0


def test_zero_legacy_llm_gradients_zeroes_all():
    gradients = create_legacy_llm_gradients(make_config())
    assert not gradients.flat.any()
    gradients.flat[...] = np.nan
    zero_legacy_llm_gradients(gradients)
    assert_same_bits(gradients.flat, np.zeros_like(gradients.flat))


def native_objects():
    """One of everything that points into arrays of its own."""
    config = make_config()
    model = random_model(config)
    packed, block = PackedModel(model), model.blocks[0]
    return [
        model, create_legacy_llm_gradients(config), block, block.attention, block.ffn, block.norm1,
        create_transformer_block_context(8, 8, 2, 1, 4), ForwardContext(config, 1, 4),
        BackwardContext(dimensions(config), block_options(config), 1, 4),
        BackwardPass(model, 1, 4), packed, Decoder(packed),
        PackedMatrix(model.parameters["blocks.0.ffn.wi"]), Int8Matrix(1, 4),
        *(make(model) for make in (AdamW, Muon, SGD)),
    ]  # fmt: skip


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_native_objects_refuse_to_be_copied_in_one_line(copied):
    for one in native_objects():
        with pytest.raises(TypeError, match=r"^[^\n]+ cannot be copied or pickled: [^\n]+$"):
            copied(one)


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))]
)
def test_ternary_matrix_copies_hold_the_same(copied):
    matrix = TernaryMatrix(np.eye(3, 32, dtype=np.int8), np.full((3, 2), 0.5, np.float32), 16)
    twin = copied(matrix)
    assert_same_bits(twin.values, matrix.values)
    assert_same_bits(twin.scales, matrix.scales)
    assert_same_bits(twin.dense(), matrix.dense())
    assert twin.group == 16


# --- Fresh models ---------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [1, 4])
@pytest.mark.parametrize(
    "changes",
    [{}, {"scale": "one"}, {"scheme": "float"}, {"scheme": "float", "scale": "one"},
     {"scheme": "2bit", "scale": "row"}],
    ids=str,
)  # fmt: skip
def test_create_legacy_llm_spreads_its_weights(changes, blocks):
    config = make_config(model_dim=64, num_heads=4, num_blocks=blocks, vocab_size=64, **changes)
    for name, values in create_legacy_llm(config, 1).latent.items():
        if values.ndim == 1:
            continue
        unit = config.scale == "one" and config.scheme != "float"
        std = 0.6 if unit else 0.02
        if name.endswith(".wo") and not unit:
            std /= math.sqrt(2 * blocks)
        # Five standard errors of the standard deviation and of the mean of at least 4096 numbers.
        assert_close(values.std(), std, rtol=5 / math.sqrt(2 * 4096), atol=0, what=name)
        assert abs(values.mean(dtype=float)) < 5 * std / math.sqrt(4096), name


@pytest.mark.parametrize("scale", SCALES)
def test_create_legacy_llm_takes_each_sign_a_third_of_the_time(scale):
    config = make_config(scheme="sign", scale=scale, model_dim=64, num_heads=4, num_blocks=4)
    model = create_legacy_llm(config, 1)
    counts = np.zeros(3)
    for name, value in model.parameters.items():
        if isinstance(value, TernaryMatrix):
            counts += np.bincount(value.values.ravel() + 1, minlength=3)
            expected = 1.0 if scale == "one" else oracle.first_scale(name, 4)
            assert_same_bits(value.scales, np.full_like(value.scales, expected), name)
            assert_same_bits(value.values, model.latent[name].astype(np.int8), name)
    size = counts.sum()
    # Five standard deviations of a binomial count.
    assert_close(counts, np.full(3, size / 3), rtol=0, atol=5 * math.sqrt(size * 2 / 9))


def test_legacy_llm_is_blank_until_it_is_filled():
    for scheme, inner in zip(SCHEMES, (0, 0, 1, 1, 0), strict=True):
        model = LegacyLLM(make_config(scheme=scheme, scale="row"))
        for value in model.parameters.values():
            if isinstance(value, TernaryMatrix):
                assert_same_bits(value.values, np.full(value.shape, inner, np.int8))
                assert_same_bits(value.scales, np.ones((value.shape[0], 1), np.float32))
            else:
                assert not value.any()
        assert np.isfinite(forward_llm(model, 1)).all()


def test_create_legacy_llm_starts_norms_at_gamma_one_and_beta_zero():
    """Departure 10: in C gamma starts near 0, like a float array, and with it every layer."""
    model = create_legacy_llm(make_config(sub_norm=True), 1)
    for name, values in model.parameters.items():
        if len(values.shape) != 1:
            continue
        assert_same_bits(values, np.full(values.shape, name.endswith("gamma"), np.float32), name)
    assert np.abs(create_float_array(12, 1)).max() <= 0.01


def test_create_legacy_llm_starts_as_an_even_guess():
    """Departure 10: without a scale, C's softmax is saturated before it has learned anything."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, 64, (2, 9))
    targets = rng.integers(0, 64, (2, 9))
    losses = {}
    for name, config in {
        "ours": make_config(vocab_size=64, model_dim=64, num_heads=4),
        "c": ModelConfig.c_original(64, 64),
    }.items():
        model = create_legacy_llm(config, 1)
        weights = oracle_weights(model)
        if name == "c":
            weights = {
                key: create_ternary_matrix(*value.shape, rng).values.astype(np.float64)
                if value.ndim == 2
                else create_float_array(value.size, rng).astype(np.float64)
                for key, value in weights.items()
            }
        losses[name] = oracle.loss_and_gradients(weights, oracle_config(config), tokens, targets)[0]
    # Our logits have a standard deviation of 0.02 sqrt(64); five standard errors of 18 of them.
    even = math.log(64)
    assert abs(losses["ours"] - even) < 5 * 0.16 / math.sqrt(18)
    assert losses["c"] > 1.5 * even


@layouts
def test_create_legacy_llm_without_latent_weights_computes_the_same(changes):
    config = make_config(**changes)
    model, small = create_legacy_llm(config, 3), create_legacy_llm(config, 3, trainable=False)
    for name, value in model.parameters.items():
        if isinstance(value, TernaryMatrix):
            assert_same_bits(small.parameters[name].values, value.values)
            assert_same_bits(small.parameters[name].scales, value.scales)
        else:
            assert_same_bits(small.parameters[name], value)
    tokens = np.array([[1, 2, 3]])
    assert_same_bits(forward_llm_batch(small, tokens), forward_llm_batch(model, tokens))
    assert small.num_parameters == model.num_parameters
    if config.scheme != "float":
        assert not small.trainable
        for use in (
            lambda: small.latent,
            small.quantize,
            lambda: small.use_full_precision(True),
            lambda: AdamW(small),
        ):
            with pytest.raises(ValueError, match="no latent weights"):
                use()


# --- Memory ---------------------------------------------------------------------------------------


def test_allocations_that_fail_raise_memory_error(tmp_path, monkeypatch):
    """Departure 13: C looks at another pointer than the one it has just allocated."""
    save_model(create_legacy_llm(make_config(), 1), tmp_path / "model")
    model = create_legacy_llm(make_config(), 1)
    for use in (
        lambda: create_legacy_llm(make_config(), 1),
        lambda: create_legacy_llm_gradients(make_config()),
        lambda: create_transformer_block_context(6, 24, 2, 3, 5),
        lambda: load_model(tmp_path / "model"),
        lambda: forward_llm_batch(model, [[1, 2]]),
        lambda: BackwardPass(model, 2, 3, 2),
        lambda: Decoder(PackedModel(model), 2).prefill([1]),
        lambda: AdamW(model),
    ):
        count = fails_at(use, monkeypatch, None)
        assert count > 0
        for failing in range(count):
            with pytest.raises(MemoryError):
                fails_at(use, monkeypatch, failing)


def fails_at(use, monkeypatch, failing):
    """Call with the allocation of that index failing; how many there were."""
    calls = itertools.count()

    def watch(function):
        def allocate(*args, **kwargs):
            if next(calls) == failing:
                raise MemoryError("no memory")
            return function(*args, **kwargs)

        return allocate

    with monkeypatch.context() as patch:
        for name in ("zeros", "ones", "empty", "full"):
            patch.setattr(np, name, watch(getattr(np, name)))
        use()
    return next(calls)


@pytest.mark.memory
def test_create_legacy_llm_of_a_size_beyond_memory_raises_memory_error():
    pytest.importorskip("resource")
    printed = run_child(
        "import resource\n"
        "from legacy1bit.hyperparams import ModelConfig\n"
        "resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))\n"
        "config = ModelConfig(vocab_size=1 << 20, model_dim=1 << 14)\n"
        + rejection("create_legacy_llm(config, 1)")
        + rejection("create_legacy_llm_gradients(config)")
        + rejection("create_transformer_block_context(1 << 14, 1 << 16, 4, 1 << 10, 1 << 17)")
    )
    assert [line.split()[0] for line in printed.splitlines()] == ["MemoryError"] * 3


# --- Quantization ---------------------------------------------------------------------------------


every_scheme = pytest.mark.parametrize("scheme", SCHEMES)
every_scale = together("scale", SCALES)


@functools.cache
def quantizable(size, scheme, scale, columns=3):
    """A model whose matrices are all quantized; those of ffn are as wide as the two numbers say."""
    dim, multiplier = size
    return LegacyLLM(
        ModelConfig(vocab_size=columns, model_dim=dim, num_blocks=1, num_heads=1,
                    ffn_multiplier=multiplier, positions="none", ternary_embedding=True,
                    scheme=scheme, scale=scale),
        trainable=True,
    )  # fmt: skip


@functools.cache
def expected_quantization(size, scheme, scale, case, chosen):
    """Latent weights of such a model, by name, and the oracle's codes and scales for them."""
    weights, expected = {}, {}
    for name, value in quantizable(size, scheme, scale).parameters.items():
        if isinstance(value, TernaryMatrix) and name.endswith(chosen):
            fixed = oracle.first_scale(name, 1) if scheme == "sign" else None
            weights[name] = np.asarray(WEIGHTS[case](value.shape), np.float32)
            expected[name] = oracle.quantize(weights[name], scheme, scale, fixed)
    return weights, expected


def check_quantization(size, scheme, scale, case, chosen=""):
    """Quantize the matrices whose names end so, and compare them with the oracle's."""
    model = quantizable(size, scheme, scale)
    weights, expected = expected_quantization(size, scheme, scale, case, chosen)
    for name, values in weights.items():
        model.latent[name][...] = values
        # Whatever was there before has no say.
        model.parameters[name].values.fill(9)
        model.parameters[name].scales.fill(9.0)
    model.quantize()
    for name, (codes, scales) in expected.items():
        value, what = model.parameters[name], f"{case}: {name}"
        assert_same_bits(value.scales, scales.astype(np.float32), f"{what}, scales")
        assert_same_bits(value.values, codes, what)
        assert_same_bits(model.latent[name], weights[name], f"{what}, latent")


def whole_numbers(deviation):
    """Normal weights that are multiples, up to 2^13, of one power of two: sums are exact."""
    unit = 2.0 ** math.floor(math.log2(deviation / 1000))

    def draw(shape):
        numbers = np.random.default_rng(3).normal(0.0, deviation / unit, shape)
        return np.clip(np.rint(numbers), -(2**13), 2**13) * unit

    return draw


def repeated(*values):
    return lambda shape: np.resize(np.asarray(values, np.float64), shape)


def one_among(large, small, at=0):
    def draw(shape):
        weights = np.full(shape, small)
        weights.reshape(-1)[at] = large
        return weights

    return draw


SMALLEST, LARGEST = 2.0**-149, float(np.finfo(np.float32).max)
# The neighbours of a number in float32.
ABOVE, BELOW = (
    lambda value, to=to: float(np.nextafter(np.float32(value), np.float32(to)))
    for to in (math.inf, -math.inf)
)
WEIGHTS = {
    **{f"deviation {deviation}": whole_numbers(deviation) for deviation in (0.02, 0.6, 1e3)},
    "0": repeated(0.0),
    "-0": repeated(-0.0),
    "both zeros": repeated(0.0, -0.0, -0.0, 0.0, 0.0),
    "all equal": repeated(0.75),
    "all equal, negative": repeated(-0.75),
    "equal but for the sign": repeated(0.375, -0.375),
    # Their mean and median are 1 or nearly so: w / scale is the tie, or next to it.
    "half": repeated(0.5, 1.5, -0.5, -1.5, ABOVE(0.5), -1.5, -ABOVE(0.5), 1.5, BELOW(0.5), -1.5),
    "half of the median": repeated(1.0, 0.5, -1.0, -0.5, ABOVE(0.5), BELOW(0.5), 1.0, 1.0, -1.0),
    "five quarters": repeated(1.25, 0.75, -1.25, -0.75, ABOVE(1.25), 0.75, BELOW(1.25), -0.75),
    "two": repeated(0.5, -0.5, 2.0, -2.0, ABOVE(2), -ABOVE(2), BELOW(2), -BELOW(2)),
    # What float16 does with the scale: ties to even, nothing beyond its largest number.
    **{f"tie {value}": repeated(value)
       for value in (1 + 2.0**-11, 1 + 3 * 2.0**-11, 1 + 2.0**-11 + 2.0**-14)},
    **{f"{value:g}": repeated(value, -value)
       for value in (65504.0, 65519.0, 65520.0, 104_806.0, 104_832.0, 1e5, 1e30, LARGEST)},
    # Below 2^-14 it counts in steps of 2^-24.
    **{f"{steps} steps": repeated(steps * 2.0**-24)
       for steps in (0.25, 0.5, 0.75, 0.8125, 1, 1.5, 2.375, 2.5, 100.25, 1000.5, 1022.75, 1024)},
    "smallest": repeated(SMALLEST, -SMALLEST, 0.0),
    "denormals": repeated(*(SMALLEST * np.arange(-50, 2**13, 7))),
    "one large": one_among(-(2.0**12), 2.0**-11),
    "one huge": one_among(LARGEST, 0.0),
    "one huge, negative, last": one_among(-LARGEST, 2.0**-20, at=-1),
    "one smallest": one_among(-SMALLEST, 0.0),
    "mostly zeros": repeated(0.0, 0.0, -0.0, 1.0, -0.5),
    "two values": repeated(0.25, 0.25, 1.0),
    "rising": lambda shape: np.arange(math.prod(shape)).reshape(shape) * 2.0**-10,
    "falling": lambda shape: -np.arange(math.prod(shape))[::-1].reshape(shape) * 2.0**-10,
}  # fmt: skip
# Odd widths, and rows of 129 and 259: groups of 128 and 256 with one or three left over.
QUANTIZED_SIZES = ((1, 1), (3, 5), (17, 2), (3, 43), (7, 37))


@every_tier
@every_scheme
@every_scale
def test_quantize_is_the_oracles(scale, scheme):
    deviations = itertools.cycle((0.02, 0.6, 1e3))
    for size, deviation in zip(QUANTIZED_SIZES, deviations, strict=False):
        check_quantization(size, scheme, scale, f"deviation {deviation}")


@every_tier
@every_scheme
@every_scale
def test_quantize_is_the_oracles_for_awkward_weights(scale, scheme):
    for case, size in zip(WEIGHTS, itertools.cycle(((3, 43), (1, 3))), strict=False):
        check_quantization(size, scheme, scale, case, "ffn.wo")


@every_tier
@every_scheme
@every_scale
def test_quantize_is_the_oracles_for_arbitrary_weights(scale, scheme):
    model = quantizable((7, 37), scheme, scale)
    for latent in model.latent.values():
        latent[...] = np.random.default_rng(4).normal(0.0, 0.1, latent.shape)
    model.quantize()
    assert_quantized(model)


def of_one_row(values, scheme, scale="row"):
    """The codes and the scale of a few weights, as plain numbers."""
    model = quantizable((len(values), 1), scheme, scale, 1)
    model.latent["embedding.weight"][...] = values
    model.quantize()
    matrix = model.parameters["embedding.weight"]
    return matrix.values[0].tolist(), matrix.scale


@every_tier
@pytest.mark.parametrize(
    ("scheme", "weights", "codes", "scale"),
    [
        ("ternary", [0.5, -1.5, 1.5, -0.5], [0, -1, 1, 0], 1.0),
        ("ternary", [ABOVE(0.5), 1.5, -1.5, -ABOVE(0.5)], [1, 1, -1, -1], 1.0),
        ("ternary-median", [-0.5, 1.0, 0.5, 9.0, -1.0], [0, 1, 0, 1, -1], 1.0),
        # Of an even number the mean of the two in the middle.
        ("ternary-median", [-0.5, 7.0, -0.5, 1.5], [0, 1, 0, 1], 1.0),
        ("binary", [0.0, -0.0, 3.0, -1.0], [1, 1, 1, -1], 1.0),
        ("2bit", [1.25, -0.75, -1.25, 0.75], [1, -1, -1, 1], 0.625),
        ("2bit", [ABOVE(1.25), -0.75, -ABOVE(1.25), 0.0], [3, -1, -3, 1], 0.5078125),
        ("2bit", [3.0, -3.0, 1.0, -1.0], [3, -3, 1, -1], 1.25),
        ("sign", [3.0, -SMALLEST, -0.0, 0.0], [1, -1, 0, 0], float(np.float16(0.0159577))),
        # Where the scale is rounded to nothing, no code has a weight: the least one stays.
        ("ternary", [2.0**-26, 0.0, -(2.0**-26), 0.0], [0, 0, 0, 0], 0.0),
        ("binary", [2.0**-26, 0.0, -(2.0**-26), 0.0], [1, 1, -1, 1], 0.0),
        ("2bit", [2.0**-26, 0.0, -(2.0**-26), 0.0], [1, 1, -1, 1], 0.0),
        ("ternary", [3e38, 3e38, -3e38, 1.0], [1, 1, -1, 0], 65504.0),
        ("2bit", [3e38, 1e5, -3e38, 1.0], [3, 1, -3, 1], 65504.0),
        # The mean is that one's, the median that of the others.
        ("ternary", [0.25, -0.25, 0.25, 99.25], [0, 0, 0, 1], 25.0),
        ("ternary-median", [0.25, -0.25, 0.25, 99.25], [1, -1, 1, 1], 0.25),
    ],
)
def test_quantize_by_hand(scheme, weights, codes, scale):
    assert of_one_row(weights, scheme) == (codes, scale)


@every_tier
@pytest.mark.parametrize("scheme", ["ternary", "ternary-median", "binary"])
@pytest.mark.parametrize("value", [1.0, 1 + 2.0**-11, 65504.0, 2.0**-14, 1022.75 * 2.0**-24])
def test_quantize_rounds_the_scale_to_float16(value, scheme):
    # Halfway between two float16 numbers the even one is due. All sums are exact.
    assert of_one_row([value] * 9, scheme)[1] == float(np.float16(value))


MEDIAN_ORDERS = {
    "rising": np.sort,
    "falling": lambda x: np.sort(x)[::-1],
    "up and down": lambda x: np.concatenate([np.sort(x[::2]), np.sort(x[1::2])[::-1]]),
    "shuffled": np.random.default_rng(7).permutation,
    "all equal": lambda x: np.full_like(x, 3.0),
    "two values": lambda x: np.where(x > np.median(x), 5.0, 2.0),
    "few values": lambda x: x % 4,
    "one huge": lambda x: np.where(x == x.max(), 1e38, x),
    "one smallest": lambda x: np.where(x == x.min(), SMALLEST, x + 1),
}


@every_tier
@pytest.mark.parametrize("order", MEDIAN_ORDERS)
def test_quantize_finds_every_median(order):
    rng = np.random.default_rng(8)
    for count in (*range(1, 12), 31, 32, 97, 100, 257, 1000):
        values = MEDIAN_ORDERS[order](rng.permutation(2 * count)[:count].astype(np.float64))
        signs = rng.choice([-1.0, 1.0], count)
        model = quantizable((1, 1), "ternary-median", "tensor", count)
        model.latent["embedding.weight"][:, 0] = values * signs
        model.quantize()
        matrix = model.parameters["embedding.weight"]
        # Halves of whole numbers below 2,048, which float16 holds, and what it does not.
        assert matrix.scale == float(oracle.to_float16(np.median(values))), count


@every_tier
def test_quantize_of_weights_that_are_not_finite_ends():
    for scheme, scale in itertools.product(SCHEMES, SCALES):
        for values in ([math.nan] * 5, [1.0, math.nan, -1.0, math.nan, 2.0], [math.inf, 1.0, -2.0]):
            codes, _ = of_one_row(values, scheme, scale)
            assert set(codes) <= set(SCHEMES[scheme].levels)


@outer_tiers
@every_scheme
@pytest.mark.parametrize("scale", ["tensor", "row", "one"])
def test_quantize_has_the_same_bits_with_any_number_of_threads(scale, scheme):
    config = make_config(ternary_embedding=True, scheme=scheme, scale=scale)
    model, answers = random_model(config), []
    for threads in (1, 2, 3, 50):
        for value in model.parameters.values():
            if isinstance(value, TernaryMatrix):
                value.values.fill(0)
                value.scales.fill(7.0)
        model.quantize(threads)
        assert_quantized(model)
        answers.append([value.scales.copy() for value in model.parameters.values()
                        if isinstance(value, TernaryMatrix)])  # fmt: skip
    for answer in answers[1:]:
        for actual, expected in zip(answer, answers[0], strict=True):
            assert_same_bits(actual, expected)


@pytest.mark.parametrize("threads", [0, -1])
def test_quantize_rejects_fewer_than_one_thread(threads):
    with pytest.raises(ValueError, match=f"threads is {threads}, expected at least 1"):
        create_legacy_llm(make_config(), 1).quantize(threads)


@every_scheme
@every_scale
def test_quantized_matrices_share_their_scales_as_the_settings_say(scale, scheme):
    model = random_model(make_config(scheme=scheme, scale=scale, model_dim=132, ffn_multiplier=2))
    for name, value in model.parameters.items():
        if isinstance(value, TernaryMatrix):
            rows, columns = value.shape
            group = int(scale) if scale.isdigit() else columns
            count = (1, 1) if scale in ("tensor", "one") else (rows, -(-columns // group))
            assert (value.scales.shape, value.group) == (count, group), name
            assert_same_bits(value.dense(), exact_dense(value).astype(np.float32), name)


# --- Full precision -------------------------------------------------------------------------------


@every_tier
@pytest.mark.parametrize(
    "changes",
    [{}, {"scheme": "binary", "ternary_embedding": True, "scale": "row"}, {"scheme": "float"},
     {"scheme": "2bit", "sub_norm": True, "final_norm": False}, {"scheme": "sign"}],
    ids=str,
)  # fmt: skip
def test_use_full_precision_computes_with_the_latent_weights(changes):
    config = make_config(**changes)
    model, tokens = random_model(config), np.array([[1, 2, 3, 4], [5, 6, 7, 11]])
    before = forward_llm_batch(model, tokens)
    assert not model.full_precision
    model.use_full_precision(True)
    model.use_full_precision(True)
    assert model.full_precision
    twin = float_twin(model)
    assert_same_bits(forward_llm_batch(model, tokens), forward_llm_batch(twin, tokens))
    # Weights that change count at once, and the codes follow them when they are told to.
    for each in (model, twin):
        each.latent["blocks.0.ffn.wi"][...] *= -1.0
    assert_same_bits(forward_llm_batch(model, tokens), forward_llm_batch(twin, tokens))
    model.latent["blocks.0.ffn.wi"][...] *= -1.0
    model.quantize()
    model.use_full_precision(False)
    assert not model.full_precision
    assert_same_bits(forward_llm_batch(model, tokens), before)


def test_use_full_precision_leaves_codes_and_scales():
    model = random_model(make_config(scheme="2bit", scale="row"))
    other = random_model(model.config)
    model.use_full_precision(True)
    assert_same_model(model, other)
    assert model.stored_bytes() == other.stored_bytes()
    assert isinstance(model.blocks[0].ffn.wi, np.ndarray)
    assert np.shares_memory(model.blocks[0].ffn.wi, model.latent["blocks.0.ffn.wi"])
    model.use_full_precision(False)
    assert model.blocks[0].ffn.wi is model.parameters["blocks.0.ffn.wi"]


@pytest.mark.parametrize("changes", [{}, {"scheme": "sign"}], ids=str)
def test_use_full_precision_needs_latent_weights(changes):
    model = create_legacy_llm(make_config(**changes), 1, trainable=False)
    with pytest.raises(ValueError, match="no latent weights"):
        model.use_full_precision(True)
    model.use_full_precision(False)
    assert not model.full_precision
    assert np.isfinite(forward_llm(model, 1)).all()


# --- Model folders --------------------------------------------------------------------------------


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


SWITCHES = ("ternary_embedding", "activation", "positions", "final_norm", "attention_window",
            "int8_activations", "sub_norm")  # fmt: skip
SWITCHED = list(itertools.product((False, True), ("relu2", "relu"), ("rope", "none"),
                                  (True, False), (0, 3), (False, True), (False, True)))  # fmt: skip
# Every set of switches, and every scheme with every scale.
OPTIONS = [
    {"scheme": scheme, "scale": scale, **dict(zip(SWITCHES, values, strict=True))}
    for (scheme, scale), values in zip(
        itertools.cycle(itertools.product((*SCHEMES, "float"), SCALES)), SWITCHED, strict=False
    )
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
def test_save_model_and_load_model_are_exact(tmp_path, options):
    # Rows of 14 and 42 codes do not fill their last byte.
    config = make_config(model_dim=14, num_heads=1, rope_base=500.0, **options)
    check_saved(random_model(config), tmp_path / "model")


@pytest.mark.parametrize("scale", ["row", "64", "128", "256"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_save_model_and_load_model_are_exact_for_long_rows(tmp_path, scheme, scale):
    # Four groups of 64 and one of 3; 128, 128 and 3; 256 and 3.
    model, count = long_model(scheme, scale), {"row": 1, "64": 5, "128": 3, "256": 2}[scale]
    assert model.parameters["blocks.0.ffn.wo"].scales.shape == (7, count)
    check_saved(model, tmp_path / "model")


def check_saved(model, path):
    """Save and load a model, and look into its file."""
    save_model(model, path)
    assert names(path) == ["config.json", "model.safetensors"]
    loaded = load_model(path)
    assert_same_model(loaded, model)
    assert loaded.trainable == (model.config.scheme == "float")
    tokens = np.array([[1, 2, 3, 4], [5, 6, 7, 11]])
    assert_same_bits(forward_llm_batch(loaded, tokens), forward_llm_batch(model, tokens))

    data = (path / "model.safetensors").read_bytes()
    assert model.stored_bytes() == len(data) - 8 - int.from_bytes(data[:8], "little")
    tensors = safetensors.numpy.load(data)
    for name, value in model.parameters.items():
        if isinstance(value, TernaryMatrix):
            packed = oracle.pack(value.values, model.config.scheme)
            assert_same_bits(tensors.pop(f"{name}.codes"), packed, name)
            assert_same_bits(tensors.pop(f"{name}.scale"), value.scales.astype(np.float16), name)
        else:
            assert_same_bits(tensors.pop(name), value, name)
    assert not tensors


def test_stored_bytes_by_hand():
    # Four matrices of 12 x 12 and two of 12 x 36: codes in rows of whole bytes, and scales.
    floats = 4 * (2 * 11 * 12 + 11 + 4 * 12 + 36 + 12 + 4 * 12 + 2 * 12)
    codes = {1: 4 * 12 * 2 + 36 * 2 + 12 * 5, 2: 4 * 12 * 3 + 36 * 3 + 12 * 9}
    scales = {"tensor": 6, "row": 4 * 12 + 36 + 12, "one": 6}
    for scheme, bits in (("binary", 1), ("ternary", 2), ("2bit", 2), ("sign", 2)):
        for scale, count in scales.items():
            config = make_config(num_blocks=1, scheme=scheme, scale=scale)
            expected = floats + codes[bits] + 2 * count
            assert create_legacy_llm(config, 1).stored_bytes() == expected
    config = make_config(num_blocks=1, scheme="float")
    assert create_legacy_llm(config, 1).stored_bytes() == floats + 4 * (4 * 144 + 2 * 432)


def test_save_model_saves_the_codes_in_full_precision(tmp_path):
    model = random_model(make_config())
    model.use_full_precision(True)
    save_model(model, tmp_path / "model")
    loaded = load_model(tmp_path / "model")
    assert_same_model(loaded, model)
    model.use_full_precision(False)
    assert_same_bits(forward_llm(loaded, 1), forward_llm(model, 1))


@pytest.mark.parametrize("scale", [1.0 + 2.0**-11, 65520.0, 1e6, 2.0**-25])
def test_save_model_refuses_a_scale_that_float16_does_not_hold(tmp_path, scale):
    model = random_model(make_config(scale="row"))
    save_model(model, tmp_path / "model")
    before = contents(tmp_path)
    model.parameters["blocks.1.ffn.wi"].scales[35, 0] = scale
    with pytest.raises(ValueError, match=r"blocks\.1\.ffn\.wi has a scale that float16"):
        save_model(model, tmp_path / "model")
    assert contents(tmp_path) == before


def test_save_model_makes_folders_and_keeps_provenance(tmp_path):
    model = random_model(make_config())
    path = tmp_path / "a" / "b"
    save_model(model, path)
    assert load_model(path).provenance == Provenance()
    model.provenance = Provenance("tales", "1f" * 32, 7, 1.25, "CC0-1.0")
    save_model(model, str(path))
    assert_same_model(load_model(str(path)), model)
    assert load_model(path).provenance == model.provenance


# --- The model of a run


def save_at(model, folder, step, best):
    """A model as a run has it after a step."""
    save_model(model, folder)
    header = {"step": str(step), "best": json.dumps([1.0, best])}
    empty = {"weights": np.zeros(1, np.float32)}
    safetensors.numpy.save_file(empty, folder / "checkpoint.safetensors", header)


@pytest.fixture
def models_of_run(tmp_path):
    """A run whose best model was that of step 6 of 9, and both models."""
    best, last = (random_model(make_config(), seed) for seed in (1, 2))
    save_at(last, tmp_path / "run", 9, 6)
    save_at(best, tmp_path / "run/best", 6, 6)
    return tmp_path / "run", best, last


def loaded_from(folder, capsys):
    """The model that is read, and what standard error says about it."""
    capsys.readouterr()
    model = load_model(folder)
    lines = capsys.readouterr().err.splitlines()
    packed = PackedModel.load(folder)
    assert capsys.readouterr().err.splitlines() == lines
    tokens, logits = [1, 2, 3], [Decoder(each, 4) for each in (packed, PackedModel(model))]
    assert_same_bits(*(np.array(each.prefill(tokens)) for each in logits))
    return model, lines


def test_load_model_reads_the_best_of_a_run(models_of_run, capsys):
    run, best, last = models_of_run
    for folder in (run, str(run), run / "best"):
        model, lines = loaded_from(folder, capsys)
        assert_same_model(model, best)
        assert lines == []
    assert model_folder(run) == model_folder(run / "best") == run / "best"
    # The last one is the best, or none was measured, or the best was not copied yet.
    for step, its_best in ((9, 9), (9, 0)):
        save_at(last, run, step, its_best)
        model, lines = loaded_from(run, capsys)
        assert_same_model(model, last)
        assert lines == []
    # Numbers that no step has say nothing.
    empty = {"weights": np.zeros(1, np.float32)}
    for its_best in ("[1, Infinity]", "[]", "5", "x", "[" * 100_000):
        header = {"step": "9", "best": its_best}
        safetensors.numpy.save_file(empty, run / "checkpoint.safetensors", header)
        assert_same_model(loaded_from(run, capsys)[0], best)
    # What the run goes on from has been lost, or was removed to save space.
    (run / "checkpoint.safetensors").write_bytes(b"damaged")
    assert_same_model(loaded_from(run, capsys)[0], best)
    (run / "checkpoint.safetensors").unlink()
    assert_same_model(loaded_from(run, capsys)[0], best)
    (run / "best/checkpoint.safetensors").unlink()
    assert_same_model(loaded_from(run, capsys)[0], last)


def cut(name, count):
    def change(best):
        data = (best / name).read_bytes()
        (best / name).write_bytes(data[:count])

    return change


HALF_WRITTEN = {
    "no folder": (shutil.rmtree, "best does not hold the model of step 6"),
    "no checkpoint": (
        lambda best: (best / "checkpoint.safetensors").unlink(),
        "best does not hold the model of step 6",
    ),
    "half a checkpoint": (cut("checkpoint.safetensors", 20), "does not hold the model of step 6"),
    "an older one": (
        lambda best: save_at(random_model(make_config()), best, 3, 3),
        "best does not hold the model of step 6",
    ),
    "no settings": (lambda best: (best / "config.json").unlink(), "it has no config.json"),
    "half the settings": (cut("config.json", 20), "config.json is not JSON"),
    "half the weights": (cut("model.safetensors", -9), "model.safetensors is not a safetensors"),
    "other settings": (
        lambda best: (
            save_model(random_model(make_config(num_blocks=1)), best.parent / "other")
            or shutil.copy(best.parent / "other/config.json", best)
        ),
        "config.json is not the one that model.safetensors was saved with",
    ),
    "a folder": (
        lambda best: (best / "config.json").unlink() or (best / "config.json").mkdir(),
        "it has no config.json",
    ),
    "not finite": (
        lambda best: _spoil(best / "model.safetensors"),
        "holds a number that is not finite",
    ),
}


def _spoil(path):
    tensors = safetensors.numpy.load_file(path)
    with safetensors.safe_open(path, "np") as file:
        header = file.metadata()
    tensors["final_norm.gamma"][0] = np.nan
    safetensors.numpy.save_file(tensors, path, header)


@pytest.mark.parametrize("damage", HALF_WRITTEN)
def test_load_model_reads_the_last_where_the_best_is_damaged(models_of_run, capsys, damage):
    run, _, last = models_of_run
    change, message = HALF_WRITTEN[damage]
    change(run / "best")
    model, lines = loaded_from(run, capsys)
    assert_same_model(model, last)
    assert len(lines) == 1
    assert message in lines[0]
    assert lines[0].endswith(": using the last model instead of the best")
    assert model_folder(run) == run


def test_model_folder_is_that_of_anything_but_a_run(folder, tmp_path):
    """A folder of runs, one of which is called best, is not a run."""
    assert model_folder(folder) == folder
    assert model_folder(tmp_path / "nowhere") == tmp_path / "nowhere"
    save_at(random_model(make_config()), tmp_path / "runs/best", 6, 6)
    assert model_folder(tmp_path / "runs") == tmp_path / "runs"


@pytest.mark.parametrize(
    "text", ["", "[]", "nonsense", '{"steps": -1}', '{"steps": 1.5}', '{"data": null}',
             '{"validation_loss": NaN}', '{"validation_loss": "low"}', "[" * 100000],
    ids=lambda text: text[:20],
)  # fmt: skip
def test_load_model_rejects_damaged_provenance(tmp_path, text):
    save_model(random_model(make_config()), tmp_path)
    edit_header(tmp_path, provenance=text)
    with pytest.raises(ModelFileError, match=r"provenance|Expecting"):
        load_model(tmp_path)


def test_load_model_passes_over_what_it_does_not_know_of_provenance(tmp_path):
    save_model(random_model(make_config()), tmp_path)
    edit_header(tmp_path, provenance='{"steps": 3, "colour": "blue"}')
    assert load_model(tmp_path).provenance == Provenance(steps=3)


def edit_header(folder, **changes):
    with safetensors.safe_open(folder / "model.safetensors", "np") as file:
        header = file.metadata()
    edit_tensors(folder, lambda tensors: None, {**header, **changes})


def test_save_model_puts_the_settings_into_both_files(tmp_path):
    model = random_model(make_config())
    save_model(model, tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    assert settings.items() >= model.config.to_dict().items()
    with safetensors.safe_open(tmp_path / "model.safetensors", "np") as file:
        assert json.loads(file.metadata()["config"]) == settings
    assert_same_model(load_model(tmp_path), model)


def test_save_model_rejects_unknown_formats(tmp_path):
    with pytest.raises(ValueError, match="format is 'gguf', expected legacy1bit or c-v1"):
        save_model(random_model(make_config()), tmp_path / "model", "gguf")
    assert names(tmp_path) == []


def test_save_model_cannot_put_a_folder_over_a_file_or_a_file_over_a_folder(tmp_path):
    model = random_model(ModelConfig.c_original(8, 8))
    (tmp_path / "file").write_bytes(b"keep")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="file"):
        save_model(model, tmp_path / "file")
    with pytest.raises(OSError, match="folder"):
        save_model(model, tmp_path / "folder", "c-v1")
    assert (tmp_path / "file").read_bytes() == b"keep"
    assert names(tmp_path) == ["file", "folder"]
    assert names(tmp_path / "folder") == []


@pytest.mark.parametrize("file_format", ["legacy1bit", "c-v1"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["output.bias", "blocks.0.norm1.gamma", "blocks.1.ffn.wi"])
def test_save_model_refuses_weights_that_are_not_finite(tmp_path, file_format, name, value):
    model = random_model(ModelConfig.c_original(8, 8))
    save_model(model, tmp_path / "model", file_format)
    array = model.parameters[name]
    (array.scales if isinstance(array, TernaryMatrix) else array)[0] = value
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=f"{name} holds a number that is not finite"):
        save_model(model, tmp_path / "model", file_format)
    assert contents(tmp_path) == before


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


SAVE_FAILURES = [
    (function, call, file_format)
    for file_format, calls in (("legacy1bit", (0, 1)), ("c-v1", (0,)))
    for call in calls
    for function in ("replace", "fsync")
]


@pytest.mark.parametrize(("function", "call", "file_format"), SAVE_FAILURES)
def test_save_model_that_fails_leaves_a_whole_model(
    tmp_path, monkeypatch, function, call, file_format
):
    """Departure 12: C writes over the only copy.

    Only where the second file cannot take its place can the first not be taken back. Then both
    models' files make one model, or the folder is refused: there is no mixture.
    """
    old = random_model(ModelConfig.c_original(8, 8), seed=1)
    save_model(old, tmp_path / "model", file_format)
    before = contents(tmp_path)
    others = [random_model(old.config, seed=2)]
    if file_format == "legacy1bit":
        # Of the same shapes but another arithmetic, and of other shapes.
        others.append(random_model(dataclasses.replace(old.config, activation="relu2"), seed=2))
        others.append(random_model(ModelConfig.c_original(12, 12), seed=2))
    for new in others:
        with monkeypatch.context() as patch:
            patch.setattr(os, function, fail_at(call, getattr(os, function)))
            with pytest.raises(OSError, match="No space"):
                save_model(new, tmp_path / "model", file_format)
        after = contents(tmp_path)
        assert after.keys() == before.keys()
        if (function, call) != ("replace", 1):
            assert after == before
            assert_same_model(load_model(tmp_path / "model"), old)
            continue
        assert after != before
        if new.config == old.config:
            assert_same_model(load_model(tmp_path / "model"), new)
        else:
            assert_refused(tmp_path / "model", tmp_path / "model" / "config.json", MISMATCH)
        for model in (new, old):
            save_model(model, tmp_path / "model", file_format)
            assert_same_model(load_model(tmp_path / "model"), model)
        assert contents(tmp_path) == before


MISMATCH = r"is not the one that model\.safetensors was saved with"


def fail_at(failing, function):
    """Fails at the call of that index among those for files; the synced folders do not count."""
    calls = itertools.count()

    def call(*args):
        is_folder = isinstance(args[0], int) and stat.S_ISDIR(os.fstat(args[0]).st_mode)
        if not is_folder and next(calls) == failing:
            raise OSError(errno.ENOSPC, "No space left on device")
        return function(*args)

    return call


# --- Damaged model folders (departure 11) ---------------------------------------------------------


def assert_refused(path, file=None, match=None):
    """`load_model` refuses at once, in one line that names the file."""
    start = time.perf_counter()
    with pytest.raises(ModelFileError, match=match) as caught:
        load_model(path)
    assert time.perf_counter() - start < 5.0
    assert "\n" not in str(caught.value)
    assert str(file or path) in str(caught.value)


@pytest.fixture
def little_memory():
    """Fails a test that allocates as much as a file promises and does not have."""
    tracemalloc.start()
    yield
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 << 20


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "model"
    save_model(create_legacy_llm(make_config(num_blocks=1), 1), path)
    return path


# Whether the weights carry their settings, as those that `save_model` wrote; else those of
# config.json alone count.
carrying = pytest.mark.parametrize("carried", [True, False], ids=["carried", "alone"])


def read_config(folder):
    return json.loads((folder / "config.json").read_text())


def write_config(folder, settings, carried=True):
    """Give both files the same settings, whatever they are."""
    (folder / "config.json").write_text(json.dumps(settings))
    edit_tensors(folder, lambda tensors: None, {"config": json.dumps(settings)} if carried else {})


def edit_tensors(folder, edit, metadata=None):
    path = folder / "model.safetensors"
    with safetensors.safe_open(path, "np") as file:
        metadata = file.metadata() if metadata is None else metadata
    tensors = {name: array.copy() for name, array in safetensors.numpy.load_file(path).items()}
    edit(tensors)
    path.write_bytes(safetensors.numpy.save(tensors, metadata))


@carrying
def test_load_model_takes_settings_with_and_without_those_of_the_weights(folder, carried):
    model, settings = load_model(folder), read_config(folder)
    write_config(folder, settings, carried)
    assert_same_model(load_model(folder), model)
    # The tests below rewrite both files: what they change must count.
    write_config(folder, {**settings, "activation": "relu"}, carried)
    assert load_model(folder).config == dataclasses.replace(model.config, activation="relu")


@pytest.mark.parametrize(
    "changes",
    [{"activation": "relu"}, {"attention_window": 3}, {"rope_base": 500.0}, {"sequence_length": 17},
     {"positions": "none"}, {"num_heads": 1}, {"vocab_size": 12}, {"format_version": 1},
     {"scheme": "2bit"}, {"int8_activations": True}, {"scale": "row"}, {"sub_norm": True},
     {"model_dim": "x"}, {"unknown": 1}, {}],
    ids=str,
)  # fmt: skip
def test_load_model_rejects_settings_other_than_those_of_the_weights(folder, changes):
    """Most of them fit the weights, which would answer in another arithmetic than their own."""
    path, settings = folder / "config.json", read_config(folder)
    text = json.dumps(settings)
    other = json.dumps({**settings, **changes} if changes else dict(list(settings.items())[:-1]))
    path.write_text(other)
    assert_refused(folder, path, match=MISMATCH)
    path.write_text(text)
    load_model(folder)
    edit_tensors(folder, lambda tensors: None, {"config": other})
    assert_refused(folder, path, match=MISMATCH)


@pytest.mark.parametrize("text", ["", "{}", "null", "{", "x\ny", "[" * 100_000], ids=len)
def test_load_model_rejects_weights_that_carry_no_settings_under_that_name(folder, text):
    edit_tensors(folder, lambda tensors: None, {"config": text})
    assert_refused(folder, folder / "config.json", match=MISMATCH)


def test_load_model_rejects_one_file_of_each_of_two_models(folder, tmp_path):
    other = tmp_path / "other"
    save_model(create_legacy_llm(make_config(num_blocks=1, activation="relu"), 1), other)
    for name in names(folder):
        ours, theirs = (folder / name).read_bytes(), (other / name).read_bytes()
        (folder / name).write_bytes(theirs)
        assert_refused(folder, folder / "config.json", match=MISMATCH)
        (folder / name).write_bytes(ours)
        load_model(folder)


CONFIG_KEYS = ("format", "format_version", *ModelConfig().to_dict())
# Except where a setting's default, or a flag, is as good.
WRONG_VALUES = (None, -1, 1 << 70, "x", [], {}, math.nan, math.inf)


@pytest.mark.usefixtures("little_memory")
@carrying
@pytest.mark.parametrize("key", CONFIG_KEYS)
def test_load_model_rejects_wrong_settings(folder, key, carried):
    settings = read_config(folder)
    name = ALIASES.get(key, key)
    reason = "has format .* expected" if key.startswith("format") else f"{name} is .* expected"
    for value in WRONG_VALUES:
        write_config(folder, {**settings, key: value}, carried)
        assert_refused(folder, folder / "config.json", match=reason)


@carrying
@pytest.mark.parametrize("version", [0, 1, 3, 2.0, True, "2"])
def test_load_model_rejects_other_versions_of_the_format(folder, version, carried):
    write_config(folder, {**read_config(folder), "format_version": version}, carried)
    reason = f"version {version!r}, expected 'legacy1bit' version 2"
    assert_refused(folder, folder / "config.json", match=reason)


@carrying
@pytest.mark.parametrize("key", CONFIG_KEYS)
def test_load_model_rejects_missing_settings(folder, key, carried):
    # The default would be another model than the one whose weights these are.
    settings = read_config(folder)
    del settings[key]
    write_config(folder, settings, carried)
    reason = "has format .* expected" if key.startswith("format") else f"has no setting '{key}'"
    assert_refused(folder, folder / "config.json", match=reason)


@carrying
@pytest.mark.parametrize("key", ["unknown", "a\nb", ""])
def test_load_model_rejects_unknown_settings(folder, key, carried):
    write_config(folder, {**read_config(folder), key: 1}, carried)
    assert_refused(folder, folder / "config.json", match="unknown setting .* expected")


@pytest.mark.parametrize(
    "text",
    [b"", b"null", b"3", b'"x"', b"[]", b"[{}]", b"{", b"{'a': 1}", b"\xff\xfe\x00", b"\x00" * 9,
     b"[" * 100_000, b'{"a":' * 100_000, b"9" * 5000, b'{"vocab_size": ' + b"9" * 5000 + b"}"],
    ids=lambda text: repr(text[:8]),
)  # fmt: skip
def test_load_model_rejects_a_config_that_is_no_json_object(folder, text):
    (folder / "config.json").write_bytes(text)
    assert_refused(folder, folder / "config.json", match="JSON")


def test_load_model_rejects_every_truncated_config(folder):
    path = folder / "config.json"
    text = path.read_bytes()
    for size in range(len(text.rstrip())):
        path.write_bytes(text[:size])
        assert_refused(folder, path, match="is not JSON")


def test_load_model_rejects_truncated_weights(folder):
    path = folder / "model.safetensors"
    data = path.read_bytes()
    for size in sorted({*range(0, len(data), 7), *range(40), *range(len(data) - 40, len(data))}):
        path.write_bytes(data[:size])
        assert_refused(folder, path)
    path.write_bytes(data + b"\0")
    assert_refused(folder, path)


def test_load_model_takes_or_refuses_weights_with_a_damaged_byte(folder):
    path, rng = folder / "model.safetensors", np.random.default_rng(1)
    data = bytearray(path.read_bytes())
    for position in rng.integers(0, len(data), 300):
        former, data[position] = data[position], data[position] ^ (1 << int(rng.integers(8)))
        path.write_bytes(data)
        # Anything but this one error fails the test.
        with contextlib.suppress(ModelFileError):
            assert np.isfinite(forward_llm(load_model(folder), 1)).all()
        data[position] = former


TENSORS = ("embedding.weight", "output.bias", "blocks.0.attention.wq.codes",
           "blocks.0.ffn.wo.scale", "final_norm.beta")  # fmt: skip


def rename(tensors, name):
    tensors[name + "2"] = tensors.pop(name)


TENSOR_EDITS = {
    "missing": lambda tensors, name: tensors.pop(name),
    "renamed": rename,
    "float64": lambda tensors, name: tensors.update({name: tensors[name].astype(np.float64)}),
    # The other one of those that a file has.
    "float16 or float32": lambda tensors, name: tensors.update(
        {name: tensors[name].astype({"f4": "f2"}.get(tensors[name].dtype.str[1:], "f4"))}
    ),
    "int8": lambda tensors, name: tensors.update({name: tensors[name].astype(np.int8)}),
    "one axis more": lambda tensors, name: tensors.update({name: tensors[name][None]}),
    "one axis less": lambda tensors, name: tensors.update({name: np.array(tensors[name][0])}),
    "one row more": lambda tensors, name: tensors.update(
        {name: np.concatenate([tensors[name], tensors[name][:1]])}
    ),
    "one row less": lambda tensors, name: tensors.update({name: tensors[name][1:]}),
    "one column more": lambda tensors, name: tensors.update(
        {name: np.concatenate([tensors[name], tensors[name][..., :1]], axis=-1)}
    ),
    "empty": lambda tensors, name: tensors.update({name: tensors[name][:0]}),
}


@pytest.mark.parametrize("edit", TENSOR_EDITS)
@pytest.mark.parametrize("name", TENSORS)
def test_load_model_rejects_other_tensors(folder, name, edit):
    edit_tensors(folder, lambda tensors: TENSOR_EDITS[edit](tensors, name))
    assert_refused(folder, folder / "model.safetensors", match=name)


@pytest.mark.parametrize("name", ["extra", "blocks.1.norm1.gamma", "a\nb", ""])
def test_load_model_rejects_an_unknown_tensor(folder, name):
    edit_tensors(folder, lambda tensors: tensors.update({name: floats(1)}))
    assert_refused(folder, folder / "model.safetensors", match="unknown tensor")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", [name for name in TENSORS if not name.endswith("codes")])
def test_load_model_rejects_weights_that_are_not_finite(folder, name, value):
    edit_tensors(folder, lambda tensors: tensors[name].reshape(-1).__setitem__(-1, value))
    assert_refused(folder, folder / "model.safetensors", match="not finite")


@pytest.mark.parametrize("scheme", ["ternary", "ternary-median", "sign"])
@pytest.mark.parametrize("position", [0, -1])
def test_load_model_rejects_the_code_three(tmp_path, position, scheme):
    save_model(random_model(make_config(scheme=scheme)), tmp_path)
    name = "blocks.0.attention.wq.codes"
    edit_tensors(tmp_path, lambda tensors: tensors[name].reshape(-1).__setitem__(position, 0xFF))
    assert_refused(tmp_path, tmp_path / "model.safetensors", match=f"{name[:-6]}: .*code 3, exp")


@pytest.mark.parametrize("stored", SCALES)
@pytest.mark.parametrize("shape", [(1, 1), (7, 1), (7, 2), (7, 3), (7, 4), (1, 3), (3, 7), (7,)])
def test_load_model_rejects_scales_of_another_shape(tmp_path, shape, stored):
    name, expected = "blocks.0.ffn.wo.scale", {
        "tensor": (1, 1), "row": (7, 1), "64": (7, 5), "128": (7, 3), "256": (7, 2), "one": (1, 1)
    }[stored]  # fmt: skip
    save_model(long_model("2bit", stored), tmp_path)
    edit_tensors(tmp_path, lambda tensors: tensors.update({name: np.ones(shape, np.float16)}))
    if shape == expected:
        load_model(tmp_path)
    else:
        reason = rf"{name} has shape \[.*\], expected \[{expected[0]}, {expected[1]}\]"
        assert_refused(tmp_path, tmp_path / "model.safetensors", match=reason)


@functools.cache
def long_model(scheme, scale):
    """A model whose ``ffn.wo`` has 7 rows of 259 weights."""
    config = make_config(model_dim=7, num_heads=1, ffn_multiplier=37, positions="none",
                         num_blocks=1, scheme=scheme, scale=scale)  # fmt: skip
    return random_model(config)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_load_model_rejects_a_scale_other_than_one_where_it_is_one(tmp_path, scheme):
    save_model(random_model(make_config(scheme=scheme, scale="one")), tmp_path)
    load_model(tmp_path)
    name = "blocks.1.ffn.wi.scale"
    edit_tensors(tmp_path, lambda tensors: tensors[name].fill(0.5))
    assert_refused(tmp_path, tmp_path / "model.safetensors", match=r"has scale 0\.5, expected 1")


def header_edits(entry, end):
    """Headers of a safetensors file whose entry of one tensor is wrong."""
    for dtype in ("BF16", "F8_E4M3", "F4", "C64", "F64", "no\nsuch", 3, None):
        yield {**entry, "dtype": dtype}
    for shape in ([-1], [1 << 63], [1 << 40, 1 << 40], ["11"], None, 11, [], [12]):
        yield {**entry, "shape": shape}
    for offsets in ([0, 0], [-4, 40], [4, 0], [0, 1 << 62], [end, end + 44], None, [0], ["a", 1]):
        yield {**entry, "data_offsets": offsets}
    yield {}
    yield []


@pytest.mark.usefixtures("little_memory")
def test_load_model_rejects_other_headers_of_the_weights(folder):
    path = folder / "model.safetensors"
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    for entry in header_edits(header["output.bias"], len(body)):
        text = json.dumps({**header, "output.bias": entry}).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + body)
        assert_refused(folder, path)
    for size, text in ((1 << 63, b"{}"), (2, b"[]"), (2, b"{}"), (100_000, b"[" * 100_000)):
        path.write_bytes(struct.pack("<Q", size) + text)
        assert_refused(folder, path)


@pytest.mark.usefixtures("little_memory")
@carrying
@pytest.mark.parametrize(
    "changes",
    [
        {"vocab_size": 1 << 20, "model_dim": 1 << 14, "num_heads": 1},
        {"model_dim": 1 << 14, "ffn_multiplier": 64},
        {"num_blocks": 1 << 10},
        {"num_blocks": 1 << 10, "vocab_size": 1 << 20, "model_dim": 12 << 10},
        {"scheme": "float", "vocab_size": 1 << 20},
    ],
    ids=str,
)
def test_load_model_rejects_a_promise_that_the_file_does_not_keep(folder, changes, carried):
    write_config(folder, {**read_config(folder), "num_heads": 1, **changes}, carried)
    assert_refused(folder, folder / "model.safetensors", match="expected|no tensor")


@pytest.mark.parametrize("missing", [("config.json",), ("model.safetensors",),
                                     ("config.json", "model.safetensors")])  # fmt: skip
def test_load_model_rejects_a_folder_that_is_no_model(folder, missing):
    for name in missing:
        (folder / name).unlink()
    assert_refused(folder, match=f"no {missing[0]}")
    (folder / missing[0]).mkdir()
    assert_refused(folder, match=f"no {missing[0]}")


def test_load_model_of_a_missing_path_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="no-such-model"):
        load_model(tmp_path / "no-such-model")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_load_model_of_an_unreadable_file_is_an_os_error(folder, name):
    (folder / name).chmod(0)
    with pytest.raises(PermissionError):
        load_model(folder)


# --- The C original's file ------------------------------------------------------------------------


def c_parameters(dim, blocks, seed=1):
    """Random parameters of a C model, and its file's parts in their order."""
    rng = np.random.default_rng(seed)
    order = [("embedding.weight", (dim, dim))]
    for i in range(blocks):
        order += [(f"blocks.{i}.attention.w{which}", (dim, dim)) for which in "qkvo"]
        order += [(f"blocks.{i}.attention.b{which}", (dim,)) for which in "qkvo"]
        order += [(f"blocks.{i}.ffn.wi", (4 * dim, dim)), (f"blocks.{i}.ffn.wo", (dim, 4 * dim))]
        order += [(f"blocks.{i}.ffn.bi", (4 * dim,)), (f"blocks.{i}.ffn.bo", (dim,))]
        order += [(f"blocks.{i}.norm{n}.{p}", (dim,)) for n in (1, 2) for p in ("gamma", "beta")]
    order += [("output.weight", (dim, dim)), ("output.bias", (dim,))]
    return {
        name: rng.integers(-1, 2, shape, np.int8)
        if len(shape) == 2
        else rng.normal(0.0, 0.5, shape).astype(np.float32)
        for name, shape in order
    }


def write_c_v1(parameters, dim, blocks):
    """The file's bytes, and where each of its numbers and contents begins."""
    data = bytearray(struct.pack("<IIiii", 0x1B1B1, 1, dim, dim, blocks))
    header = ("magic", "version", "vocab_size", "model_dim", "num_blocks")
    numbers = {(name,): 4 * i for i, name in enumerate(header)}
    begins = {}
    for name, value in parameters.items():
        for axis, size in enumerate(value.shape):
            numbers[name, axis] = len(data)
            data += struct.pack("<i", size)
        begins[name] = len(data)
        data += value.astype("<f4" if value.ndim == 1 else "i1").tobytes()
    return bytes(data), numbers, begins


@pytest.mark.parametrize(("dim", "blocks"), [(1, 1), (4, 1), (5, 2), (8, 3), (20, 1)])
def test_load_model_reads_c_files(tmp_path, dim, blocks):
    parameters = c_parameters(dim, blocks)
    path = tmp_path / "llm_model.bin"
    path.write_bytes(write_c_v1(parameters, dim, blocks)[0])
    model = load_model(path)
    assert model.config.is_c_original
    assert not model.trainable
    sizes = model.config.vocab_size, model.config.model_dim, model.config.num_blocks
    assert sizes == (dim, dim, blocks)
    assert model.parameters.keys() == parameters.keys()
    for name, value in parameters.items():
        loaded = model.parameters[name]
        assert_same_bits(loaded.values if value.ndim == 2 else loaded, value, name)
        assert value.ndim == 1 or loaded.scale == 1.0
    read, config = oracle.read_c_v1(path, num_heads=4 if dim % 4 == 0 else 1)
    tokens = np.arange(dim)[:, None]
    expected = rounding_effect(lambda w: {"logits": oracle.forward(w, config, tokens)[0]}, read)
    assert_near({"logits": forward_llm_batch(model, tokens, logits=True)}, expected)


@pytest.mark.parametrize(("dim", "blocks"), [(4, 1), (5, 2), (8, 3)])
def test_save_model_writes_c_files_byte_for_byte(tmp_path, dim, blocks):
    data = write_c_v1(c_parameters(dim, blocks), dim, blocks)[0]
    (tmp_path / "old").write_bytes(data)
    save_model(load_model(tmp_path / "old"), tmp_path / "new", "c-v1")
    assert (tmp_path / "new").read_bytes() == data
    assert names(tmp_path) == ["new", "old"]


def test_c_files_and_folders_hold_the_same_model(tmp_path):
    model = random_model(ModelConfig.c_original(8, 8, sequence_length=128))
    save_model(model, tmp_path / "file", "c-v1")
    save_model(load_model(tmp_path / "file"), tmp_path / "folder")
    assert_same_model(load_model(tmp_path / "folder"), model)


@every_tier
@pytest.mark.parametrize("name", ["c_v1_d32_l1", "c_v1_d64_l2"])
def test_c_files_give_the_probabilities_of_c(name, tmp_path):
    path = GOLDEN / f"{name}.bin"
    if not path.exists():
        pytest.skip(f"no golden file {path}: it was written by the C original")
    model = load_model(path)
    vocab = model.config.vocab_size
    expected = np.fromfile(GOLDEN / f"{name}.probs.f32", "<f4").reshape(vocab, vocab)
    actual = np.stack([forward_llm(model, token) for token in range(vocab)])
    # Both computed in float32, from logits of the order of 100.
    assert_close(actual, expected, rtol=0, atol=1e-4)
    assert_close(forward_llm_batch(model, np.arange(vocab)), expected, rtol=0, atol=1e-4)
    # A token of a C model sees itself only, wherever it stands.
    together = forward_llm_batch(model, np.arange(vocab)[None])[0]
    assert_close(together, expected, rtol=0, atol=1e-4)
    save_model(model, tmp_path / "again", "c-v1")
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    "changes",
    [{"scheme": "float"}, {"scheme": "binary"}, {"scale": "tensor"}, {"scale": "row"},
     {"int8_activations": True}, {"sub_norm": True}, {"ternary_embedding": False},
     {"activation": "relu2"}, {"positions": "rope"}, {"final_norm": True}, {"attention_window": 0},
     {"ffn_multiplier": 2}, {"vocab_size": 9}],
    ids=lambda changes: next(iter(changes)),
)  # fmt: skip
def test_save_model_refuses_what_c_has_no_format_for(tmp_path, changes):
    config = dataclasses.replace(ModelConfig.c_original(8, 8), **changes)
    with pytest.raises(ValueError, match="C original"):
        save_model(create_legacy_llm(config, 1), tmp_path / "model", "c-v1")
    assert names(tmp_path) == []


def test_save_model_refuses_a_scale_that_c_does_not_know(tmp_path):
    model = random_model(ModelConfig.c_original(8, 8))
    model.parameters["blocks.0.ffn.wi"].scales[0] = 0.5
    with pytest.raises(ValueError, match=r"blocks\.0\.ffn\.wi has scale 0\.5"):
        save_model(model, tmp_path / "model", "c-v1")
    assert names(tmp_path) == []


@pytest.fixture
def c_file(tmp_path):
    """A small C file, and a function that writes a changed one and expects its refusal."""
    data, numbers, begins = write_c_v1(c_parameters(4, 1), 4, 1)
    path = tmp_path / "llm_model.bin"

    def refuse(changed, match=None):
        path.write_bytes(changed)
        assert_refused(path, match=match)

    refuse.data, refuse.numbers, refuse.begins = data, numbers, begins
    return refuse


def patched(data, offset, piece):
    return data[:offset] + piece + data[offset + len(piece) :]


def test_load_model_rejects_every_truncated_c_file(c_file):
    for size in range(len(c_file.data)):
        c_file(c_file.data[:size])
    c_file(c_file.data + b"\0", match="expected")


@pytest.mark.usefixtures("little_memory")
def test_load_model_rejects_every_wrong_number_of_a_c_file(c_file):
    """Departure 11: C believes each of them."""
    for (name, *_), offset in c_file.numbers.items():
        former = struct.unpack_from("<i", c_file.data, offset)[0]
        for number in {-(1 << 31), -1, 0, 1, 3, 4, 5, 16, 1 << 14, 1 << 20, (1 << 31) - 1}:
            if number != former:
                changed = patched(c_file.data, offset, struct.pack("<i", number))
                c_file(changed, match="expected|are equal" if offset < 20 else f"{name}.*expected")


@pytest.mark.usefixtures("little_memory")
def test_load_model_rejects_sizes_that_agree_with_each_other_only(c_file):
    dims, counts = (-4, 0, 1, 4, 5, 1 << 14, 1 << 30), (-1, 0, 1, 2, 1 << 10)
    for dim, blocks in itertools.product(dims, counts):
        if (dim, blocks) != (4, 1):
            c_file(patched(c_file.data, 8, struct.pack("<iii", dim, dim, blocks)), match="expected")


@pytest.mark.parametrize("code", [2, -2, 127, -128])
def test_load_model_rejects_other_codes_in_a_c_file(c_file, code):
    for name, offset in c_file.begins.items():
        if "w" in name.rpartition(".")[2]:
            for position in (0, 15):
                changed = patched(c_file.data, offset + position, struct.pack("b", code))
                c_file(changed, match=f"{name} holds a number other")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_load_model_rejects_floats_that_are_not_finite_in_a_c_file(c_file, value):
    for name, offset in c_file.begins.items():
        if "w" not in name.rpartition(".")[2]:
            for position in (0, 3):
                changed = patched(c_file.data, offset + 4 * position, struct.pack("<f", value))
                c_file(changed, match=f"{name} holds a number that is not finite")


@pytest.mark.parametrize("data", [b"", b"GGUF", b"hello, this is no model at all\n", bytes(100)])
def test_load_model_rejects_other_files(tmp_path, data):
    path = tmp_path / "file"
    path.write_bytes(data)
    assert_refused(path)
