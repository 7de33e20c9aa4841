"""The oracle and the comparison helper, tested on themselves.

Every hand-written gradient is held against finite differences of its forward pass, and the whole
model against PyTorch, which shares no line with it.
"""

import itertools
import math

import numpy as np
import pytest

from helpers import oracle
from helpers.arrays import assert_close, assert_same_bits, dot_bound, gamma
from helpers.paths import GOLDEN
from helpers.torch_model import torch_loss

# Finite differences in float64 at step 1e-4: the truncation error is about 1e-16 times a fifth
# derivative, and rounding gives 1e-16 |f| / 1e-4. Both leave 1e-9 ample for values of order 10.
FINITE = {"rtol": 1e-8, "atol": 1e-9}
# Two float64 evaluations in different order.
FLOAT64 = {"rtol": 1e-10, "atol": 1e-13}

VOCAB, TIME = 7, 5
PAD = VOCAB
PADDED_ROWS = {
    "none": [[3, 1, 6, 3, 0], [2, 0, 5, 5, 4]],
    "left": [[PAD, PAD, 6, 3, 0], [2, 0, 5, 5, 4]],
    "right": [[3, 1, 6, PAD, PAD], [PAD, 0, 5, 5, PAD]],
    "middle": [[3, PAD, 6, PAD, 0], [2, 0, PAD, PAD, 4]],
    "row": [[PAD] * TIME, [2, 0, 5, 5, 4]],
    "all": [[PAD] * TIME, [PAD] * TIME],
}
# Two documents in the first row, the first of which is padding where that stands at the left, and
# three in the second.
STARTS = np.array([[0, 0, 2, 2, 2], [0, 1, 1, 1, 4]], dtype=np.int32)
TARGETS = np.array([[1, 6, 3, 0, PAD], [0, 5, PAD, 4, 1]], dtype=np.int32)


def tokens_with(padding):
    return np.array(PADDED_ROWS[padding], dtype=np.int32)


def make_config(
    activation="relu2", positions="rope", span=0, final_norm=True, num_blocks=1, **changes
):
    return {
        "vocab_size": VOCAB,
        "model_dim": 6,
        "num_blocks": num_blocks,
        "num_heads": 3,
        "activation": activation,
        "positions": positions,
        "rope_base": 10000.0,
        "final_norm": final_norm,
        "attention_window": span,
        **changes,
    }


OPTIONS = list(itertools.product(("relu", "relu2"), ("none", "rope"), (0, 1, 3), (False, True)))
# Each with two kinds of padding, and each span and norm with all of them.
with_options = pytest.mark.parametrize(
    ("activation", "positions", "span", "final_norm", "padding"),
    [
        (*one, padding)
        for i, one in enumerate(OPTIONS)
        for padding in [*PADDED_ROWS][(i + i // 6) % 3 :: 3]
    ],
)


def parameter_shapes(config):
    """The parameters of a model, as the oracle's docstring lists them."""
    v, c, heads = config["vocab_size"], config["model_dim"], config["num_heads"]
    d = config.get("head_dim", c // heads)
    q, k = heads * d, config.get("num_kv_heads", heads) * d
    f = config.get("ffn_dim", 3 * c)
    norm_bias = config.get("norm") != "rms" and config.get("norm_bias", True)
    layers = {
        "attention.wq": (q, c), "attention.wk": (k, c), "attention.wv": (k, c),
        "attention.wo": (c, q), "attention.bq": (q,), "attention.bk": (k,), "attention.bv": (k,),
        "attention.bo": (c,), "ffn.wi": (f, c), "ffn.bi": (f,), "ffn.wo": (c, f), "ffn.bo": (c,),
    }  # fmt: skip
    if config.get("gated"):
        layers |= {"ffn.wg": (f, c), "ffn.bg": (f,)}
    biased = {"all": "qkvoig", "qkv": "qkv", "none": ""}[config.get("biases", "all")]
    layers = {
        name: shape for name, shape in layers.items() if len(shape) == 2 or name[-1] in biased
    }
    if config.get("qk_norm"):
        layers |= {"attention.q_gamma": (d,), "attention.k_gamma": (d,)}
    norms = {"norm1": c, "norm2": c}
    if config.get("sub_norm"):
        norms |= {"attention": q, "ffn": f}
    shapes = {"embedding.weight": (v, c), "output.weight": (v, c), "output.bias": (v,)}
    if config.get("tied_embeddings"):
        del shapes["output.weight"]
    for i in range(config["num_blocks"]):
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in layers.items()}
        for name, size in norms.items():
            shapes |= {f"blocks.{i}.{name}.{n}": (size,) for n in ("gamma", "beta")}
    if config["final_norm"]:
        shapes |= {"final_norm.gamma": (c,), "final_norm.beta": (c,)}
    return {
        name: shape for name, shape in shapes.items() if norm_bias or not name.endswith(".beta")
    }


def make_params(config, seed=1):
    """Random values everywhere, gamma and the biases included, so that no gradient is trivial."""
    rng = np.random.default_rng(seed)
    return {
        name: rng.normal(1.0 if name.endswith("gamma") else 0.0, 0.5, shape)
        for name, shape in parameter_shapes(config).items()
    }


def part(params, prefix):
    return {n.removeprefix(prefix): v for n, v in params.items() if n.startswith(prefix)}


# What the architectures of other programs have, each alone and then together.
YARN = {"rope_factor": 4.0, "rope_original_length": 64, "rope_base": 100.0, "head_dim": 10}
ARCHITECTURES = {
    "kv heads": {"num_heads": 6, "num_kv_heads": 2, "head_dim": 4},
    "one kv head": {"num_kv_heads": 1, "head_dim": 10},
    "ffn_dim": {"ffn_dim": 7},
    "rms": {"norm": "rms"},
    "rms, epsilon": {"norm": "rms", "norm_epsilon": 0.05, "sub_norm": True},
    "layer norm, epsilon, no bias": {"norm_bias": False, "norm_epsilon": 0.05, "sub_norm": True},
    "qk_norm": {"qk_norm": True},
    "qk_norm, kv heads": {"qk_norm": True, "num_kv_heads": 1, "norm_epsilon": 0.05},
    "qkv biases": {"biases": "qkv"},
    "no biases": {"biases": "none", "gated": True},
    "gated relu2": {"gated": True},
    "gated relu": {"gated": True, "activation": "relu", "sub_norm": True},
    "silu": {"activation": "silu"},
    "gated silu": {"gated": True, "activation": "silu", "ffn_dim": 5},
    "gelu": {"activation": "gelu", "gated": True},
    "tied": {"tied_embeddings": True},
    "tied, no final norm": {"tied_embeddings": True, "final_norm": False},
    "adjacent": {"rope_pairs": "adjacent", "head_dim": 6},
    "fraction": {"rope_fraction": 0.4, "head_dim": 10},
    "fraction, adjacent": {"rope_fraction": 0.5, "head_dim": 8, "rope_pairs": "adjacent"},
    "yarn": YARN,
    "yarn, adjacent": {**YARN, "rope_pairs": "adjacent", "rope_fraction": 0.6},
    "windows": {"windows": (2, 0)},
    "qwen3": {"norm": "rms", "biases": "none", "gated": True, "activation": "silu",
              "qk_norm": True, "num_kv_heads": 1, "tied_embeddings": True, **YARN},
    "bitnet": {"norm": "rms", "biases": "none", "gated": True, "sub_norm": True,
               "tied_embeddings": True, "num_kv_heads": 1, "head_dim": 6, "rope_base": 50.0},
}  # fmt: skip
architectures = pytest.mark.parametrize("changes", ARCHITECTURES.values(), ids=ARCHITECTURES)


# --- Gradients against finite differences ---------------------------------------------------------


def check_gradients(forward, backward, arguments):
    """Every gradient of ``sum(d_output * forward(**arguments))``, element by element.

    ``backward(d_output, **arguments)`` gives a dict with the gradient of every argument.
    """
    output = forward(**arguments)
    d_output = np.random.default_rng(2).normal(size=np.shape(output))
    gradients = backward(d_output, **arguments)
    assert gradients.keys() == arguments.keys()
    for name, value in arguments.items():
        numeric = oracle.finite_difference(
            lambda changed, name=name: np.sum(d_output * forward(**{**arguments, name: changed})),
            value,
        )
        assert_close(gradients[name], numeric, what=name, **FINITE)


def normal(*shape, seed=3):
    return np.random.default_rng(seed).normal(size=shape)


def test_finite_difference_is_exact_for_quartics():
    x = np.array([[0.5, -1.5], [2.0, 0.0]])
    # The fifth derivative is zero, so only rounding is left.
    assert_close(
        oracle.finite_difference(lambda a: np.sum(a**4), x), 4 * x**3, rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize("rows", [1, 3])
def test_linear_gradients(rows):
    check_gradients(
        oracle.linear,
        lambda d, x, weight, bias: dict(
            zip(("x", "weight", "bias"), oracle.linear_backward(d, x, weight), strict=True)
        ),
        {"x": normal(2, rows, 5), "weight": normal(7, 5, seed=4), "bias": normal(7)},
    )


@pytest.mark.parametrize("size", [2, 3, 9])
def test_layer_norm_gradients(size):
    check_gradients(
        oracle.layer_norm,
        lambda d, x, gamma, beta: dict(
            zip(("x", "gamma", "beta"), oracle.layer_norm_backward(d, x, gamma), strict=True)
        ),
        {"x": normal(2, 3, size), "gamma": normal(size, seed=4), "beta": normal(size, seed=5)},
    )


@pytest.mark.parametrize("size", [1, 2, 9])
@pytest.mark.parametrize("epsilon", [1e-5, 0.5])
def test_rms_norm_gradients(size, epsilon):
    check_gradients(
        lambda x, gamma: oracle.rms_norm(x, gamma, epsilon),
        lambda d, x, gamma: dict(
            zip(("x", "gamma"), oracle.rms_norm_backward(d, x, gamma, epsilon), strict=True)
        ),
        {"x": normal(2, 3, size), "gamma": normal(size, seed=4)},
    )


@pytest.mark.parametrize("activation", oracle.ACTIVATIONS)
def test_activate_gradients(activation):
    check_gradients(
        lambda x: oracle.activate(x, activation),
        lambda d, x: {"x": oracle.activate_backward(d, x, activation)},
        {"x": normal(3, 9)},
    )


def test_softmax_gradients():
    check_gradients(
        oracle.softmax,
        lambda d, x: {"x": oracle.softmax_backward(d, oracle.softmax(x))},
        {"x": normal(3, 7)},
    )


@pytest.mark.parametrize(
    ("head_dim", "settings"),
    [
        (2, {}),
        (6, {}),
        (6, {"pairs": "adjacent"}),
        (10, {"fraction": 0.4, "base": 50.0}),
        (10, {"pairs": "adjacent", "factor": 4.0, "original_length": 64, "base": 100.0}),
    ],
)
def test_rotary_gradients(head_dim, settings):
    check_gradients(
        lambda x: oracle.rotary(x, **settings),
        lambda d, x: {"x": oracle.rotary_backward(d, **settings)},
        {"x": normal(2, 5, 3, head_dim)},
    )


@pytest.mark.parametrize("padding", PADDED_ROWS)
def test_embedding_gradients(padding):
    tokens = tokens_with(padding)
    check_gradients(
        lambda weight: oracle.embedding(tokens, weight),
        lambda d, weight: {"weight": oracle.embedding_backward(d, tokens, VOCAB)},
        {"weight": normal(VOCAB, 3)},
    )


@pytest.mark.parametrize("padding", PADDED_ROWS)
def test_cross_entropy_gradients(padding):
    counted = oracle.counted_positions(tokens_with(padding), TARGETS, VOCAB)
    check_gradients(
        lambda logits: oracle.cross_entropy(logits, TARGETS, counted),
        lambda d, logits: {"logits": d * oracle.cross_entropy_backward(logits, TARGETS, counted)},
        {"logits": 3 * normal(2, TIME, VOCAB)},
    )


@pytest.mark.parametrize(("weight", "temperature"), [(0.0, 2.0), (0.3, 1.0), (1.0, 4.0)])
@pytest.mark.parametrize("padding", PADDED_ROWS)
def test_distillation_gradients(padding, weight, temperature):
    counted = oracle.counted_positions(tokens_with(padding), TARGETS, VOCAB)
    teacher = 3 * np.random.default_rng(8).normal(size=(2, TIME, VOCAB))
    settings = (TARGETS, counted, teacher, weight, temperature)
    check_gradients(
        lambda logits: oracle.distillation(logits, *settings),
        lambda d, logits: {"logits": d * oracle.distillation_backward(logits, *settings)},
        {"logits": 3 * normal(2, TIME, VOCAB)},
    )


def test_distillation_is_none_of_an_equal_teacher():
    logits = 3 * normal(2, TIME, VOCAB)
    counted = oracle.counted_positions(tokens_with("none"), TARGETS, VOCAB)
    loss = oracle.distillation(logits, TARGETS, counted, logits + 5.0, 0.5, 2.0)
    assert loss == pytest.approx(0.5 * oracle.cross_entropy(logits, TARGETS, counted), rel=1e-12)


sub_norms = pytest.mark.parametrize("sub_norm", [False, True])


@sub_norms
@pytest.mark.parametrize(
    ("positions", "span", "padding"),
    [
        ("none", 0, "none"),
        ("rope", 0, "left"),
        ("none", 1, "right"),
        ("rope", 3, "middle"),
        ("none", 3, "row"),
        ("rope", 1, "all"),
    ],
)
def test_attention_gradients(positions, span, padding, sub_norm):
    config = make_config(positions=positions, span=span, sub_norm=sub_norm)
    tokens, starts = tokens_with(padding), STARTS if span != 1 else None

    def backward(d, x, **weights):
        d_x, gradients = oracle.attention_backward(d, x, tokens, weights, config, starts)
        return {"x": d_x, **gradients}

    check_gradients(
        lambda x, **weights: oracle.attention(x, tokens, weights, config, starts),
        backward,
        {"x": normal(2, TIME, 6), **part(make_params(config), "blocks.0.attention.")},
    )


@sub_norms
@pytest.mark.parametrize("activation", oracle.ACTIVATIONS)
def test_feed_forward_gradients(activation, sub_norm):
    config = make_config(activation=activation, sub_norm=sub_norm)

    def backward(d, x, **weights):
        d_x, gradients = oracle.feed_forward_backward(d, x, weights, config)
        return {"x": d_x, **gradients}

    check_gradients(
        lambda x, **weights: oracle.feed_forward(x, weights, config),
        backward,
        {"x": normal(2, 3, 6), **part(make_params(config), "blocks.0.ffn.")},
    )


@pytest.mark.parametrize(
    ("activation", "padding", "sub_norm"),
    [
        ("relu", "none", False),
        ("relu2", "middle", False),
        ("relu", "middle", True),
        ("relu2", "none", True),
    ],
)
def test_block_gradients(activation, padding, sub_norm):
    config = make_config(activation=activation, span=3, sub_norm=sub_norm)
    tokens = tokens_with(padding)

    def backward(d, x, **weights):
        d_x, gradients = oracle.block_backward(d, x, tokens, weights, config)
        return {"x": d_x, **gradients}

    check_gradients(
        lambda x, **weights: oracle.block(x, tokens, weights, config),
        backward,
        {"x": normal(2, TIME, 6), **part(make_params(config), "blocks.0.")},
    )


@with_options
def test_loss_and_gradients_along_random_directions(
    activation, positions, span, final_norm, padding
):
    # Both kinds of norm before the last matrices, along with all the other options.
    config = make_config(activation, positions, span, final_norm, sub_norm=span == 3)
    check_directions(config, padding)


@architectures
def test_gradients_of_architectures_along_random_directions(changes):
    # Where nothing else is asked for, an activation without a kink that the step could cross.
    for padding in ("none", "middle"):
        check_directions({**make_config("silu", num_blocks=2), **changes}, padding)


def check_directions(config, padding):
    params, tokens = make_params(config), tokens_with(padding)
    loss, gradients = oracle.loss_and_gradients(params, config, tokens, TARGETS)
    assert gradients.keys() == params.keys()
    rng = np.random.default_rng(6)
    for name, value in params.items():
        direction = rng.normal(size=value.shape)
        numeric = oracle.directional_difference(
            lambda changed, name=name: oracle.cross_entropy(
                oracle.forward({**params, name: changed}, config, tokens)[0],
                TARGETS,
                oracle.counted_positions(tokens, TARGETS, VOCAB),
            ),
            value,
            direction,
            step=5e-5,
        )
        assert_close(np.sum(gradients[name] * direction), numeric, what=name, **FINITE)
    if padding == "all":
        assert loss == 0.0
        assert not any(gradient.any() for gradient in gradients.values())


# --- The whole model against PyTorch --------------------------------------------------------------


@with_options
def test_loss_and_gradients_agree_with_torch(activation, positions, span, final_norm, padding):
    check_against_torch(make_config(activation, positions, span, final_norm, 2), padding)


@sub_norms
@pytest.mark.parametrize("padding", ["none", "middle", "all"])
@pytest.mark.parametrize("int8", [(True, True), (True, False), (False, True)])
def test_norms_and_int8_agree_with_torch(int8, padding, sub_norm):
    int8, ternary_embedding = int8
    config = make_config(final_norm=padding != "middle", num_blocks=2, sub_norm=sub_norm)
    config |= {"int8_activations": int8, "ternary_embedding": ternary_embedding}
    check_against_torch(config, padding)


@architectures
@pytest.mark.parametrize("int8", [False, True])
def test_architectures_agree_with_torch(changes, int8):
    config = {**make_config(num_blocks=2), "int8_activations": int8, **changes}
    check_against_torch({**config, "ternary_embedding": int8}, "middle" if int8 else "right")


def check_against_torch(config, padding):
    torch = pytest.importorskip("torch")
    params, tokens = make_params(config), tokens_with(padding)
    leaves = {name: torch.tensor(value, requires_grad=True) for name, value in params.items()}
    logits, loss = torch_loss(
        torch, leaves, config, torch.tensor(tokens).long(), torch.tensor(TARGETS).long()
    )
    loss.backward()

    ours, gradients = oracle.loss_and_gradients(params, config, tokens, TARGETS)
    assert_close(oracle.forward(params, config, tokens)[0], logits.detach().numpy(), **FLOAT64)
    assert_close(ours, loss.item(), **FLOAT64)
    for name, gradient in gradients.items():
        expected = leaves[name].grad
        expected = np.zeros_like(gradient) if expected is None else expected.numpy()
        assert_close(gradient, expected, what=name, **FLOAT64)


# --- Activations in int8 --------------------------------------------------------------------------


def test_quantize_activations_by_hand():
    # The step is 0.5; 0.25 and 0.75 are ties, and 0.3 is nearer to the first multiple.
    x = np.array([[63.5, 0.25, -0.75, 0.3], [0.0, 0.0, 0.0, 0.0], [-2.0, 1.0, 0.0, 2.0]])
    third = [-2.0, 2.0 / 127 * 64, 0.0, 2.0]
    expected = [[63.5, 0.0, -1.0, 0.5], [0.0] * 4, third]
    assert_close(oracle.quantize_activations(x), expected, **FLOAT64)
    assert_close(oracle.activation_step(x), [[0.5], [0.0], [2.0 / 127]], **FLOAT64)


@pytest.mark.parametrize("size", [1, 2, 9, 64])
def test_quantize_activations_moves_by_half_a_step_at_most(size):
    x = normal(20, size)
    rounded, step = oracle.quantize_activations(x), oracle.activation_step(x)
    multiples = rounded / step
    assert_close(multiples, np.rint(multiples), rtol=0, atol=1e-12)
    assert_close(np.abs(multiples).max(axis=1), np.full(20, 127.0), **FLOAT64)
    assert (np.abs(rounded - x) <= step / 2 * (1 + 1e-12)).all()


def test_round_to_int8_by_hand():
    x = np.array([[63.5, 0.25, -0.75, 0.3], [0.0, 0.0, 0.0, 0.0], [-2.0, 1.0, 0.0, 2.0]])
    codes, step = oracle.round_to_int8(x)
    assert codes.dtype == np.int64
    assert codes.tolist() == [[127, 0, -2, 1], [0] * 4, [-127, 64, 0, 127]]
    assert_close(codes * step, oracle.quantize_activations(x), **FLOAT64)


def test_packed_product_is_that_of_the_rounded_activations():
    rng, x, bias = np.random.default_rng(8), normal(5, 40), normal(3, seed=9)
    codes, scales = rng.integers(-1, 2, (3, 40)), rng.uniform(0.5, 2.0, (3, 3))
    weights = codes * np.repeat(scales, 16, axis=1)[:, :40]
    expected = oracle.linear(oracle.quantize_activations(x), weights, bias)
    assert_close(oracle.packed_product(codes, scales, 16, x, bias), expected, **FLOAT64)
    one = oracle.packed_product(codes, np.array([[0.5]]), 40, x)
    assert_close(one, oracle.quantize_activations(x) @ codes.T / 2, **FLOAT64)


def test_cache_keeps_keys_and_values_as_int8_after_the_rotation():
    config = {**make_config(), "int8_cache": True}
    weights, x = part(make_params(config), "blocks.0.attention."), normal(1, 5, 6)
    tokens = np.zeros((1, 5), int)
    plain = oracle._attend(x, tokens, weights, {**config, "int8_cache": False})
    q, k, v, probabilities, heads = oracle._attend(x, tokens, weights, config)
    for kept, exact, levels in ((q, plain[0], 32767), (k, plain[1], 127), (v, plain[2], 127)):
        # A step for each token and head.
        step = np.abs(exact).max(axis=3, keepdims=True) / levels
        assert_close(kept, np.rint(exact / step) * step, **FLOAT64)
    # The first token sees its own value alone.
    assert_close(heads[0, 0], v[0, 0].ravel(), **FLOAT64)
    scores = np.einsum("hd,jhd->hj", q[0, 4], k[0]) / math.sqrt(q.shape[3])
    # The weights of the values' codes are whole numbers, the largest of them 32767.
    steps = np.abs(v[0]).max(axis=2).T / 127
    exact = oracle.softmax(scores) * steps
    unit = exact.max(axis=1, keepdims=True) / 32767
    assert_close(probabilities[0, :, 4], np.rint(exact / unit) * unit / steps, **FLOAT64)
    mixed = np.einsum("hj,jhd->hd", probabilities[0, :, 4], v[0])
    assert_close(heads[0, 4], mixed.ravel(), **FLOAT64)


def test_weights_of_codes_add_up_to_less_than_32_bits_hold():
    weights = np.full((1, 1, 1, 1000), 0.001)
    assert_close(oracle._weights_of_codes(weights) * 8450000, np.full((1, 1, 1, 1000), 8450.0),
                 **FLOAT64)  # fmt: skip
    assert not oracle._weights_of_codes(np.zeros((1, 1, 1, 3))).any()


@pytest.mark.parametrize("scheme", ["ternary", "float"])
@pytest.mark.parametrize("ternary_embedding", [False, True])
def test_decode_rounds_what_packed_matrices_get(scheme, ternary_embedding):
    """And never looks ahead."""
    config = make_config(scheme=scheme, ternary_embedding=ternary_embedding, int8_activations=True)
    params, tokens = make_params(config), [3, 1, 6, 3, 0]
    logits = oracle.decode(params, config, tokens)
    for count in (1, 3):
        assert_close(oracle.decode(params, config, tokens[:count]), logits[:count], **FLOAT64)
    settings = {**config, "int8_activations": scheme != "float", "int8_cache": True}
    assert_close(oracle.forward(params, settings, [tokens])[0][0], logits, **FLOAT64)
    settings["int8_activations"] ^= True
    assert np.abs(oracle.forward(params, settings, [tokens])[0][0] - logits).max() > 1e-4


def test_int8_gradients_go_straight_through_the_rounding():
    """Those of the weights meet rounded inputs; those of the inputs are those of plain layers."""
    config = make_config("relu", sub_norm=True)
    weights = part(make_params(config), "blocks.0.ffn.")
    x, d_output = normal(2, 3, 6), normal(2, 3, 6, seed=4)
    int8 = {**config, "int8_activations": True}
    d_x, gradients = oracle.feed_forward_backward(d_output, x, weights, int8)

    inputs = oracle.quantize_activations(x).reshape(6, 6)
    hidden = np.maximum(inputs @ weights["wi"].T + weights["bi"], 0.0)
    normed = oracle.layer_norm(hidden, weights["gamma"], weights["beta"])
    d_rows = d_output.reshape(6, 6)
    assert_close(gradients["wo"], d_rows.T @ oracle.quantize_activations(normed), **FLOAT64)
    d_hidden, d_gamma, d_beta = oracle.layer_norm_backward(
        d_rows @ weights["wo"], hidden, weights["gamma"]
    )
    d_hidden = d_hidden * (hidden > 0)
    assert_close(gradients["gamma"], d_gamma, **FLOAT64)
    assert_close(gradients["beta"], d_beta, **FLOAT64)
    assert_close(gradients["wi"], d_hidden.T @ inputs, **FLOAT64)
    assert_close(gradients["bi"], d_hidden.sum(axis=0), **FLOAT64)
    assert_close(d_x.reshape(6, 6), d_hidden @ weights["wi"], **FLOAT64)
    # And it is not what a layer without rounding has.
    plain = oracle.feed_forward_backward(d_output, x, weights, config)[1]
    assert np.abs(gradients["wi"] - plain["wi"]).max() > 1e-3


# --- What must hold for the model -----------------------------------------------------------------


def test_forward_gives_probabilities_and_the_loss_their_logarithm():
    config = make_config()
    params, tokens = make_params(config), tokens_with("middle")
    _, probabilities = oracle.forward(params, config, tokens)
    assert_close(probabilities.sum(axis=-1), np.ones((2, TIME)), **FLOAT64)
    loss, _ = oracle.loss_and_gradients(params, config, tokens, TARGETS)
    counted = [(0, 0), (0, 2), (1, 0), (1, 1), (1, 4)]
    expected = -np.mean([math.log(probabilities[at][TARGETS[at]]) for at in counted])
    assert_close(loss, expected, **FLOAT64)


@pytest.mark.parametrize("span", [0, 1, 3])
def test_forward_sees_only_the_keys_in_reach(span):
    config = make_config(span=span)
    params = make_params(config)
    tokens = np.array([[0, 1, 2, 3, 4, 5, 6]])
    before, _ = oracle.forward(params, config, tokens)
    changed_tokens = tokens.copy()
    changed_tokens[0, 2] = 6
    after, _ = oracle.forward(params, config, changed_tokens)
    changed = (before != after).any(axis=-1)[0]
    last = {0: 6, 1: 2, 3: 4}[span]
    assert changed.tolist() == [2 <= i <= last for i in range(7)]


def test_forward_of_a_padded_sequence_is_that_of_the_sequence_alone():
    config = make_config(positions="none")
    params = make_params(config)
    alone, _ = oracle.forward(params, config, np.array([[4, 2, 6]]))
    padded, _ = oracle.forward(params, config, np.array([[PAD, 4, 2, PAD, 6, PAD]]))
    assert_close(padded[:, [1, 2, 4]], alone, **FLOAT64)


@pytest.mark.parametrize("span", [0, 2])
@pytest.mark.parametrize("padding", ["none", "left", "middle"])
def test_documents_in_a_row_are_what_they_are_alone(span, padding):
    config = make_config(span=span, num_blocks=2)
    params, tokens = make_params(config), tokens_with(padding)
    logits, _ = oracle.forward(params, config, tokens, STARTS)
    loss, gradients = oracle.loss_and_gradients(params, config, tokens, TARGETS, STARTS)
    sums, total = dict.fromkeys(gradients, 0.0), 0.0
    count = oracle.counted_positions(tokens, TARGETS, VOCAB).sum()
    for row, first, last in ((0, 0, 2), (0, 2, 5), (1, 0, 1), (1, 1, 4), (1, 4, 5)):
        place = np.s_[row : row + 1, first:last]
        alone, _ = oracle.forward(params, config, tokens[place])
        assert_close(logits[place], alone, **FLOAT64)
        part_loss, part_gradients = oracle.loss_and_gradients(
            params, config, tokens[place], TARGETS[place]
        )
        share = oracle.counted_positions(tokens[place], TARGETS[place], VOCAB).sum() / count
        total += share * part_loss
        for name, value in part_gradients.items():
            sums[name] = sums[name] + share * value
    assert_close(loss, total, **FLOAT64)
    for name, value in gradients.items():
        assert_close(value, sums[name], what=name, **FLOAT64)
    # Without the starts they see each other.
    assert np.abs(oracle.forward(params, config, tokens)[0] - logits).max() > 1e-4
    none = oracle.forward(params, config, tokens, np.zeros_like(STARTS))[0]
    assert_same_bits(none, oracle.forward(params, config, tokens)[0])


def test_attention_without_a_key_is_the_output_bias():
    config = make_config()
    weights = part(make_params(config), "blocks.0.attention.")
    output = oracle.attention(normal(1, 2, 6), np.array([[PAD, 0]]), weights, config)
    assert_close(output[0, 0], weights["bo"], rtol=0, atol=0)


def test_rotary_keeps_lengths_and_depends_on_distance_only():
    q, k = (np.repeat(normal(1, 1, 1, 6, seed=seed), TIME, axis=1) for seed in (3, 4))
    turned_q, turned_k = oracle.rotary(q)[0, :, 0], oracle.rotary(k)[0, :, 0]
    assert_close((turned_q**2).sum(axis=-1), (q[0, :, 0] ** 2).sum(axis=-1), **FLOAT64)
    scores = turned_q @ turned_k.T
    for distance in range(TIME):
        diagonal = np.diagonal(scores, -distance)
        assert_close(diagonal, np.full_like(diagonal, diagonal[0]), **FLOAT64)
    # By hand: at t = 1 the pair (0, 2) of four turns by 1 radian, the pair (1, 3) by 1/100.
    turned = oracle.rotary(np.array([[0.0, 0, 0, 0], [1, 1, 0, 0]]).reshape(1, 2, 1, 4))[0, 1, 0]
    expected = [math.cos(1), math.cos(0.01), math.sin(1), math.sin(0.01)]
    assert_close(turned, expected, **FLOAT64)


def test_rotary_of_a_fraction_and_of_adjacent_elements_by_hand():
    x = np.array([[[[0.0] * 6]], [[[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]]]]).reshape(1, 2, 1, 6)
    one, other = math.cos(1), math.sin(1)
    few, more = math.cos(0.1), math.sin(0.1)
    # Of the first four of six elements, with base 100: the frequencies are 1 and 1 / 10.
    turned = oracle.rotary(x, 100.0, fraction=4 / 6)[0, 1, 0]
    expected = [one - 3 * other, 2 * few - 4 * more, other + 3 * one, 2 * more + 4 * few, 5, 6]
    assert_close(turned, expected, **FLOAT64)
    turned = oracle.rotary(x, 100.0, "adjacent", 4 / 6)[0, 1, 0]
    expected = [one - 2 * other, other + 2 * one, 3 * few - 4 * more, 3 * more + 4 * few, 5, 6]
    assert_close(turned, expected, **FLOAT64)


def test_yarn_by_hand():
    # Of eight pairs with base 10,000 and a length of 2,048: pair 16 ln(2048 / 64 pi) / 2 ln 10000 =
    # 2.02 turns 32 times, and 5.03 once, so that 0 to 2 stay and from 6 on a quarter is left.
    plain = 10000.0 ** (-np.arange(8) / 8)
    yarn = oracle.rotary_frequencies(16, 10000.0, 4.0, 2048)
    kept = [1, 1, 1, 1 - 0.75 / 4, 1 - 0.75 * 2 / 4, 1 - 0.75 * 3 / 4, 0.25, 0.25]
    assert_close(yarn, plain * kept, **FLOAT64)
    # What turns is longer, and at the first position nothing turns.
    x = normal(1, 3, 2, 16)
    turned = oracle.rotary(x, factor=4.0, original_length=2048)
    assert_close(turned[:, 0], x[:, 0] * (1 + 0.1 * math.log(4)), **FLOAT64)
    assert_close(
        (turned**2).sum(axis=-1), (x**2).sum(axis=-1) * (1 + 0.1 * math.log(4)) ** 2, **FLOAT64
    )


def test_heads_of_queries_share_keys_in_their_order():
    """It is attention with as many heads of keys, of which neighbors are the same."""
    config = {**make_config(), "num_heads": 6, "num_kv_heads": 2, "head_dim": 4}
    weights, x, tokens = part(make_params(config), "blocks.0.attention."), normal(2, 5, 6), None
    tokens = tokens_with("middle")
    wide = dict(weights)
    for name in ("wk", "wv", "bk", "bv"):
        heads = weights[name].reshape(2, 4, -1)
        wide[name] = np.repeat(heads, 3, axis=0).reshape(24, *weights[name].shape[1:])
    expected = oracle.attention(x, tokens, wide, {**config, "num_kv_heads": 6})
    assert_close(oracle.attention(x, tokens, weights, config), expected, **FLOAT64)


def test_windows_are_of_the_blocks():
    config = make_config(num_blocks=2)
    params, tokens = make_params(config), np.array([[0, 1, 2, 3, 4, 5, 6]])
    changed = np.array([[6, 1, 2, 3, 4, 5, 6]])

    def reach(**settings):
        logits = [oracle.forward(params, {**config, **settings}, t)[0] for t in (tokens, changed)]
        return int((logits[0] != logits[1]).any(axis=-1).sum())

    assert [reach(attention_window=3), reach(windows=(3, 3)), reach(windows=(3, 2))] == [5, 5, 4]
    assert [reach(windows=(1, 1)), reach(windows=(1, 2)), reach(windows=(0, 1))] == [1, 2, 7]


@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_silu_and_gelu_agree_with_torch(activation):
    torch = pytest.importorskip("torch")
    x = np.concatenate([np.linspace(-6, 6, 301), [-1e-30, 1e-30, 0.0, 1e20]])
    leaf = torch.tensor(x, requires_grad=True)
    functional = torch.nn.functional
    one = (
        functional.silu(leaf) if activation == "silu" else functional.gelu(leaf, approximate="tanh")
    )
    one.sum().backward()
    assert_close(oracle.activate(x, activation), one.detach().numpy(), rtol=1e-10, atol=1e-14)
    slope = oracle.activate_backward(np.ones_like(x), x, activation)
    assert_close(slope, leaf.grad.numpy(), rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize(("activation", "formula"), [
    ("silu", lambda x: x / (1.0 + math.exp(-x))),
    ("gelu", lambda x: x / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))),
])  # fmt: skip
def test_silu_and_gelu_are_their_formulas_and_have_limits(activation, formula):
    x = np.linspace(-3.0, 3.0, 61)
    assert_close(oracle.activate(x, activation), [formula(value) for value in x], **FLOAT64)
    ends = np.array([-1e38, 1e38, np.inf])
    assert oracle.activate(ends, activation).tolist() == [0.0, 1e38, np.inf]
    assert oracle.activate_backward(np.ones(2), ends[:2], activation).tolist() == [0.0, 1.0]
    assert np.isnan(oracle.activate(np.array([np.nan, -np.inf]), activation)).all()


# --- Golden files of the C original ---------------------------------------------------------------


@pytest.mark.parametrize("name", ["c_v1_d32_l1", "c_v1_d64_l2"])
def test_read_c_v1_reproduces_the_c_original_at_length_1(name):
    if not GOLDEN.is_dir():
        pytest.skip("the golden files of the C original are not at ../shared/golden")
    params, config = oracle.read_c_v1(GOLDEN / f"{name}.bin")
    vocab = config["vocab_size"]
    expected = np.fromfile(GOLDEN / f"{name}.probs.f32", dtype="<f4").reshape(vocab, vocab)
    _, probabilities = oracle.forward(params, config, np.arange(vocab)[:, None])
    # C computes in float32, with logits of up to 44.
    assert_close(probabilities[:, 0], expected, rtol=0, atol=1e-5)


def test_read_c_v1_rejects_other_files(tmp_path):
    path = tmp_path / "model.bin"
    for data in (b"", b"GGUF" + bytes(100), (0x1B1B1).to_bytes(4, "little") + bytes([1, 0, 0, 0])):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"not a version 1 file|the file ends before"):
            oracle.read_c_v1(path)


# --- The faults of the C original -----------------------------------------------------------------


def test_fault1_weight_update_climbs_the_loss():
    weight, gradient = np.array([1.0, -1, 0, 1, -1]), np.array([2.0, 0.5, -3, 0, 0])
    updated = oracle.fault1_weight_update(weight, gradient)
    assert updated.tolist() == [1, 1, -1, 1, -1]
    assert np.sum((updated - weight) * gradient) > 0


def test_fault2_to_5_differ_from_the_gradient():
    config = make_config()
    weights = part(make_params(config), "blocks.0.")
    ffn = part(weights, "ffn.")
    x, d_output = normal(2, 3, 6), normal(2, 3, 6, seed=4)

    _, _, d_beta = oracle.layer_norm_backward(d_output, x, weights["norm1.gamma"])
    faulty = oracle.fault2_layer_norm_d_beta(d_output)
    assert_close(faulty, np.full(6, d_beta.sum()), **FLOAT64)
    assert not np.allclose(faulty, d_beta)

    d_x, gradients = oracle.feed_forward_backward(d_output, x, ffn, config)
    faulty = oracle.fault3_feed_forward_d_wo(d_output, x, ffn)
    assert faulty.shape == gradients["wo"].shape
    assert not np.allclose(faulty, gradients["wo"])

    gain = weights["norm1.gamma"]
    right = d_output + oracle.layer_norm_backward(d_x, x, gain)[0]
    faulty = oracle.fault4_residual_backward(d_output, d_x, x, gain)
    # The norm takes a constant away from its gradient: the residual path's share is lost.
    assert_close(faulty.sum(axis=-1), np.zeros((2, 3)), rtol=0, atol=1e-12)
    assert abs(right.sum(axis=-1)).min() > 1e-3

    d_logits = normal(2, 3, 5)
    _, right, _ = oracle.linear_backward(d_logits, x, normal(5, 6))
    assert_close(oracle.fault5_output_weight_gradient(d_logits, x), right.T, **FLOAT64)


def test_fault6_attention_is_attention_with_a_span_of_1():
    weights = part(make_params(make_config()), "blocks.0.attention.")
    tokens, x = tokens_with("none"), normal(2, TIME, 6)
    faulty = oracle.fault6_attention(x, weights)
    only_itself = oracle.attention(x, tokens, weights, make_config(span=1))
    causal = oracle.attention(x, tokens, weights, make_config())
    assert_close(faulty, only_itself, **FLOAT64)
    assert_close(faulty[:, 0], causal[:, 0], **FLOAT64)
    assert not np.allclose(faulty[:, 1:], causal[:, 1:])


@pytest.mark.parametrize("size", [3, 17, 64])
def test_fault9_layer_norm_has_12_bits(size):
    x, one = normal(size), np.ones(size)
    right = oracle.layer_norm(x, one, 0 * one)
    faulty = oracle.fault9_layer_norm(x, one, 0 * one)
    assert 2**-20 < np.abs(faulty / right - 1).max() <= 2**-12


# --- Optimizers, quantized weights ----------------------------------------------------------------


def test_adamw_step_by_hand():
    options = {"beta1": 0.9, "beta2": 0.99, "epsilon": 0.0, "weight_decay": 0.1}
    # The first step's bias correction leaves the gradient's sign.
    weight, m, v = oracle.adamw_step(
        [2.0, -4.0], [0.5, -3.0], 0.0, 0.0, 1, learning_rate=0.01, **options
    )
    assert_close(weight, [2.0 - 0.01 * (1 + 0.2), -4.0 - 0.01 * (-1 - 0.4)], **FLOAT64)
    assert_close(m, [0.05, -0.3], **FLOAT64)
    assert_close(v, [0.0025, 0.09], **FLOAT64)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_step_agrees_with_torch(weight_decay):
    torch = pytest.importorskip("torch")
    weight, gradients = normal(3, 5), normal(4, 3, 5)
    parameter = torch.tensor(weight, requires_grad=True)
    optimizer = torch.optim.AdamW(
        [parameter], lr=0.01, betas=(0.9, 0.99), eps=1e-8, weight_decay=weight_decay
    )
    m = v = np.zeros_like(weight)
    for step, gradient in enumerate(gradients, start=1):
        parameter.grad = torch.tensor(gradient)
        optimizer.step()
        weight, m, v = oracle.adamw_step(
            weight, gradient, m, v, step,
            learning_rate=0.01, beta1=0.9, beta2=0.99, epsilon=1e-8, weight_decay=weight_decay,
        )  # fmt: skip
    assert_close(weight, parameter.detach().numpy(), **FLOAT64)


def test_sgd_step_by_hand():
    weight, momentum = oracle.sgd_step(
        [2.0, -4.0], [0.5, -3.0], [1.0, 0.0], learning_rate=0.1, mu=0.5, weight_decay=0.25
    )
    assert_close(momentum, [1.0, -3.0], **FLOAT64)
    assert_close(weight, [2.0 - 0.1 * (1.0 + 0.5), -4.0 + 0.1 * (3.0 + 1.0)], **FLOAT64)


@pytest.mark.parametrize("mu", [0.0, 0.9])
def test_sgd_step_agrees_with_torch(mu):
    # PyTorch's decay is not decoupled: left out.
    torch = pytest.importorskip("torch")
    weight, gradients = normal(3, 5), normal(4, 3, 5)
    parameter = torch.tensor(weight, requires_grad=True)
    optimizer = torch.optim.SGD([parameter], lr=0.01, momentum=mu)
    momentum = np.zeros_like(weight)
    for gradient in gradients:
        parameter.grad = torch.tensor(gradient)
        optimizer.step()
        weight, momentum = oracle.sgd_step(
            weight, gradient, momentum, learning_rate=0.01, mu=mu, weight_decay=0.0
        )
    assert_close(weight, parameter.detach().numpy(), **FLOAT64)


def test_sign_step_by_hand():
    weight, gradient = np.array([1, 0, -1, -1, 1]), np.array([2.0, -1e-40, -0.0, 0.0, -3.0])
    assert oracle.sign_step(weight, gradient).tolist() == [-1, 1, -1, -1, 1]
    assert oracle.sign_step(weight, gradient, "ascend").tolist() == [1, -1, -1, -1, -1]


LATE_FALL = {"peak": 2.0, "warmup_steps": 4, "total_steps": 10, "falling_steps": 4}


@pytest.mark.parametrize(
    ("options", "rates"),
    [
        ({"schedule": "cosine", "final_fraction": 0.1}, [2.0, 1.1, 0.2, 0.2]),
        ({"schedule": "linear", "final_fraction": 0.1}, [2.0, 1.1, 0.2, 0.2]),
        ({"schedule": "linear"}, [2.0, 1.0, 0.0, 0.0]),
        ({"schedule": "step", "factor": 0.1, "stair": 2}, [2.0, 0.2, 0.02, 0.002]),
        ({"schedule": "step", "factor": 0.5, "stair": 4}, [2.0, 2.0, 1.0, 1.0]),
        ({"schedule": "constant"}, [2.0, 2.0, 2.0, 2.0]),
    ],
    ids=str,
)
def test_learning_rate_by_hand(options, rates):
    early = [oracle.learning_rate(step, **LATE_FALL, **options) for step in (0, 1, 3, 4, 5)]
    late = [oracle.learning_rate(step, **LATE_FALL, **options) for step in (6, 8, 10, 12)]
    assert_close(early, [0.5, 1.0, 2.0, 2.0, 2.0], **FLOAT64)
    assert_close(late, rates, **FLOAT64)


@pytest.mark.parametrize(
    ("options", "name", "settings"),
    [
        ({"schedule": "cosine", "final_fraction": 0.25}, "CosineAnnealingLR",
         {"T_max": 12, "eta_min": 0.5}),
        ({"schedule": "linear", "final_fraction": 0.25}, "LinearLR",
         {"start_factor": 1.0, "end_factor": 0.25, "total_iters": 12}),
        ({"schedule": "step", "factor": 0.5, "stair": 5}, "StepLR",
         {"gamma": 0.5, "step_size": 5}),
        ({"schedule": "constant"}, "ConstantLR", {"factor": 1.0}),
    ],
    ids=["cosine", "linear", "step", "constant"],
)  # fmt: skip
def test_learning_rate_agrees_with_torch(options, name, settings):
    torch = pytest.importorskip("torch")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    scheduler = getattr(torch.optim.lr_scheduler, name)(optimizer, **settings)
    for step in range(13):
        rate = oracle.learning_rate(
            step, peak=2.0, warmup_steps=0, total_steps=12, falling_steps=12, **options
        )
        assert_close(rate, optimizer.param_groups[0]["lr"], **FLOAT64)
        optimizer.step()
        scheduler.step()


def test_quantize_by_hand():
    # mean |w| = 0.5; 0.25 and -0.75 are the ties 0.5 and -1.5 (clipped to -1) of w / scale.
    weight = np.array([[0.25, -0.75, 0.0], [0.26, 1.24, -0.5]])
    codes, scales = oracle.quantize(weight)
    assert (codes.tolist(), scales.tolist()) == ([[0, -1, 0], [1, 1, -1]], [[0.5]])
    assert codes.dtype == np.int8
    # Sorted magnitudes: 0, 0.25, 0.26, 0.5, 0.75, 1.24.
    codes, scales = oracle.quantize(weight, "ternary-median")
    assert scales.tolist() == [[float(np.float16(0.38))]]
    assert codes.tolist() == [[1, -1, 0], [1, 1, -1]]
    codes, scales = oracle.quantize(weight, "binary")
    assert (codes.tolist(), scales.tolist()) == ([[1, -1, 1], [1, 1, -1]], [[0.5]])
    # 5 / 8 of 0.5: the bound between 1 and 3 is at 0.625.
    codes, scales = oracle.quantize(weight, "2bit")
    assert (codes.tolist(), scales.tolist()) == ([[1, -3, 1], [1, 3, -1]], [[0.3125]])
    codes, scales = oracle.quantize(weight, "sign", fixed=0.25)
    assert (codes.tolist(), scales.tolist()) == ([[1, -1, 0], [1, 1, -1]], [[0.25]])


@pytest.mark.parametrize(
    ("scheme", "codes"),
    [("ternary", [0, 0, -1, 1, -1, 1]), ("ternary-median", [0, 0, -1, 1, -1, 1]),
     ("binary", [1, -1, -1, 1, -1, 1]), ("2bit", [1, -1, -1, 1, -1, 3]),
     ("sign", [1, -1, -1, 1, -1, 1])],
)  # fmt: skip
def test_quantize_with_scale_one_by_hand(scheme, codes):
    weight = np.array([[0.5, -0.5, -0.6, 2.0, -2.0, 1e38]])
    answer, scales = oracle.quantize(weight, scheme, "one")
    assert (answer.tolist(), scales.tolist()) == ([codes], [[1.0]])


@pytest.mark.parametrize(
    ("scheme", "codes"),
    [("ternary", [0, 0, 0, 0]), ("ternary-median", [0, 0, 0, 0]), ("binary", [1, 1, 1, -1]),
     ("2bit", [1, 1, 1, -1])],
)  # fmt: skip
def test_quantize_with_a_scale_of_zero_by_hand(scheme, codes):
    answer, scales = oracle.quantize(np.array([[0.0, -0.0, 1e-45, -1e-45]]), scheme)
    assert (answer.tolist(), scales.tolist()) == ([codes], [[0.0]])


def test_quantize_by_groups_by_hand():
    weight = np.array([[1.0] * 128 + [3.0] * 128 + [5.0], [-0.25] * 256 + [1.0]])
    for scale, expected in (
        ("tensor", [[(4 * 128 + 5 + 64 + 1) / 514]]),
        ("row", [[517 / 257], [65 / 257]]),
        ("128", [[1.0, 3.0, 5.0], [0.25, 0.25, 1.0]]),
        ("256", [[2.0, 5.0], [0.25, 1.0]]),
    ):
        codes, scales = oracle.quantize(weight, "ternary", scale)
        assert_close(scales, oracle.to_float16(expected), rtol=0, atol=0)
        wide = np.repeat(scales, 257 if scale in ("tensor", "row") else int(scale), axis=1)
        assert_same_bits(codes, (np.sign(weight) * (abs(weight) > wide[:, :257] / 2)).astype("i1"))


def test_quantize_by_shards_by_hand():
    # Rows 0 and 1 of five are the first of three shards, 2 and 3 the second: 0, 0, 1, 1, 2.
    weight = np.array([[1.0, -3.0], [2.0, 2.0], [8.0, 8.0], [0.0, 4.0], [0.5, 0.5]])
    codes, scales = oracle.quantize(weight, shards=3)
    assert scales.tolist() == [[2.0], [2.0], [5.0], [5.0], [0.5]]
    assert codes.tolist() == [[0, -1], [1, 1], [1, 1], [0, 1], [1, 1]]
    codes, scales = oracle.quantize(weight, "sign", fixed=0.25, shards=2)
    assert scales.tolist() == [[0.25]] * 5


def test_to_float16_is_the_nearest_finite_number():
    values = [0.1, 1 + 2.0**-11, 1 + 3 * 2.0**-11, 2.0**-25, 1.5 * 2.0**-24, 7e4, 1e300]
    expected = [1638 / 2**14, 1.0, 1 + 2.0**-9, 0.0, 2.0**-23, 65504.0, 65504.0]
    assert_close(oracle.to_float16(values), expected, rtol=0, atol=0)


def test_first_scale_is_that_of_normal_numbers():
    for name, deviation in (("output.weight", 0.02), ("blocks.0.ffn.wo", 0.01)):
        magnitude = np.abs(normal(100_000)).mean() * deviation
        # Four standard errors of the mean magnitude.
        assert_close(oracle.first_scale(name, 2), magnitude, rtol=4 * 0.76 / 316, atol=0)


def test_pack_by_hand():
    codes = np.array([[-1, 0, 1, -1, 1], [0, 0, 0, 0, -1]], dtype=np.int8)
    for scheme in ("ternary", "ternary-median", "sign"):
        packed = oracle.pack(codes, scheme)
        assert packed.tolist() == [[0b00_10_01_00, 0b10], [0b01_01_01_01, 0b00]]
        assert packed.dtype == np.uint8
    codes = np.array([[-3, -1, 1, 3, 3]], dtype=np.int8)
    assert oracle.pack(codes, "2bit").tolist() == [[0b11_10_01_00, 0b11]]
    codes = np.array([[1, -1, -1, 1, 1, -1, -1, -1, 1]], dtype=np.int8)
    assert oracle.pack(codes, "binary").tolist() == [[0b00011001, 0b1]]


@pytest.mark.parametrize("scheme", oracle.CODES)
@pytest.mark.parametrize("columns", [1, 2, 3, 4, 5, 8, 9, 17])
def test_pack_is_undone_by_unpack(columns, scheme):
    codes = np.random.default_rng(7).choice(oracle.CODES[scheme], (3, columns)).astype(np.int8)
    assert_same_bits(oracle.unpack(oracle.pack(codes, scheme), scheme, columns), codes)


def test_tiles_by_hand():
    places = np.zeros((33, 17), int)
    places[0, :9] = [1, 2, 0, 3, 3, 0, 0, 0, 2]
    places[2, 15], places[32, 16] = 3, 1
    tiles = oracle.tiles(places, "2bit")
    assert tiles.shape == (2, 2, 128)
    assert tiles.dtype == np.uint8
    # Columns 0, 4, 8 and 12 share the first byte, the first of them in its lowest bits.
    assert tiles[0, 0, :4].tolist() == [0b00_10_11_01, 0b10, 0, 0b11]
    assert tiles[0, 0, 11] == 0b11_00_00_00
    assert tiles[1, 1, 0] == 1
    assert np.count_nonzero(tiles) == 5
    places = np.array([[1, 0, 2, 2, 2, 0, 0, 2, 0, 0, 0, 2, 1, 0, 0, 2, 2, 0, 0, 2, 1]])
    tiles = oracle.tiles(places, "trits")
    assert tiles.shape == (1, 2, 128)
    # 1 2 0 1 2 to base 3 is 140, and 256 times that by 243 is 147.5.
    assert tiles[0, 0, :4].tolist() == [148, 0, math.ceil(162 * 256 / 243), 255]
    assert tiles[0, 1, 0] == math.ceil(81 * 256 / 243)


# --- The comparison helper ------------------------------------------------------------------------


def test_assert_close_names_the_worst_element():
    expected = np.arange(6.0).reshape(2, 3)
    actual = expected.copy()
    actual[0, 1] += 0.02
    actual[1, 2] += 0.05
    with pytest.raises(AssertionError, match=r"sums: 2 of 6 .* \(1, 2\): 5\.05.*5\.0.* 5 x the"):
        assert_close(actual, expected, rtol=0, atol=0.01, what="sums")
    assert_close(actual, expected, rtol=0, atol=0.0501)
    # 0.05 away from 5 is within one part in 99, and 0.02 away from 1 within one in 49.
    assert_close(actual, expected, rtol=np.array([0, 1 / 49, 1 / 99]), atol=0)


@pytest.mark.parametrize(
    ("actual", "expected", "message"),
    [
        ([1.0, np.nan], [1.0, 2.0], "nan, expected 2.0"),
        ([1.0, 2.0], [1.0, np.nan], "2.0, expected nan"),
        ([np.inf], [1e300], "inf, expected"),
        ([np.inf], [-np.inf], "inf, expected -inf"),
        ([1.0, 1.0], 1.0, r"shape \(2,\), expected \(\)"),
        ([[1.0]], [1.0], r"shape \(1, 1\), expected \(1,\)"),
    ],
)
def test_assert_close_rejects_mismatches(actual, expected, message):
    with pytest.raises(AssertionError, match=message):
        assert_close(actual, expected, rtol=10, atol=10)


def test_assert_close_accepts_equal_nan_and_infinities_and_checks_the_dtype():
    values = np.array([np.nan, np.inf, -np.inf, 0.0], dtype=np.float32)
    assert_close(values, values.astype(np.float64), rtol=0, atol=0, dtype=np.float32)
    with pytest.raises(AssertionError, match="dtype float32, expected float64"):
        assert_close(values, values, rtol=0, atol=0, dtype=np.float64)


def test_assert_same_bits_tells_zeros_and_nans_apart():
    values = np.array([0.0, np.nan, 1.0], dtype=np.float32)
    assert_same_bits(values, values.copy())
    with pytest.raises(AssertionError, match=r"1 of 3 .* \(0,\): .*0x80000000.*0x00000000"):
        assert_same_bits(np.array([-0.0, np.nan, 1.0], dtype=np.float32), values)
    with pytest.raises(AssertionError, match="dtype float64, expected float32"):
        assert_same_bits(values.astype(np.float64), values)
    with pytest.raises(AssertionError, match="shape"):
        assert_same_bits(values[:2], values)


def test_dot_bound_covers_float32_sums_in_any_order():
    rng = np.random.default_rng(8)
    for n in (1, 7, 97):
        x, y = rng.normal(size=(2, n)).astype(np.float32)
        products = x.astype(np.float64) * y
        one_by_one = np.float32(0)
        for a, b in zip(x, y, strict=True):
            one_by_one = np.float32(one_by_one + a * b)
        bound = dot_bound(np.abs(products).sum(), n)
        assert_close(one_by_one, math.fsum(products), rtol=0, atol=bound)
        assert bound < 1.01 * n * 2.0**-24 * np.abs(products).sum()
    assert gamma(1) > 2.0**-24
