"""The architectures of other programs: every option alone, and many of them together.

Forward and backward pass, the optimizers' steps and the decoder are compared with the oracle, and
with each other where they must agree to the bit.
"""

import itertools
import json
import tracemalloc
from unittest import mock

import numpy as np
import pytest

from helpers import oracle
from helpers.arrays import UNIT_ROUNDOFF, assert_close, assert_same_bits
from helpers.models import (
    OPTION_MODELS,
    SHORT_ROWS,
    NearTieError,
    as_float64,
    assert_near,
    assert_quantized,
    assert_same_model,
    decoder_weights,
    float_twin,
    in_every_tier,
    make_config,
    model_of,
    oracle_config,
    oracle_weights,
    outer_tiers,
    random_architecture,
    random_model,
    random_tokens,
    rounding_effect,
    starts_of,
    without_ties,
)
from helpers.optimizers import exact_step, flat, float32
from helpers.torch_model import torch_loss
from legacy1bit.backward import BackwardPass, backward_bytes
from legacy1bit.forward import (
    ForwardContext,
    forward_bytes,
    forward_llm_batch,
    forward_transformer_block_batch_with_context,
)
from legacy1bit.hyperparams import ModelConfig
from legacy1bit.inference import Decoder
from legacy1bit.layout import parameter_layout
from legacy1bit.model import (
    FeedForward,
    MultiHeadAttention,
    TernaryMatrix,
    create_legacy_llm,
    create_legacy_llm_gradients,
    create_transformer_block_context,
    load_model,
    save_model,
)
from legacy1bit.optimizer import SGD, AdamW, Muon
from legacy1bit.packed import PackedModel

TOGETHER = {f"random {seed}": random_architecture(seed) for seed in range(50)}
options = pytest.mark.parametrize("changes", OPTION_MODELS.values(), ids=OPTION_MODELS)
# Most of the combinations run with the slow tests.
combinations = [
    pytest.param(changes, id=name, marks=pytest.mark.slow if i % 4 else ())
    for i, (name, changes) in enumerate(TOGETHER.items())
]
both = pytest.mark.parametrize(
    "changes",
    [*(pytest.param(changes, id=name) for name, changes in OPTION_MODELS.items()), *combinations],
)
# A sixth of the combinations, where all of them would take long and say little.
some = pytest.mark.parametrize(
    "changes",
    (OPTION_MODELS | dict(itertools.islice(TOGETHER.items(), 0, None, 6))).values(),
    ids=[*OPTION_MODELS, *itertools.islice(TOGETHER, 0, None, 6)],
)


# --- Parameters -----------------------------------------------------------------------------------


def shapes_of(**changes):
    return {part.name: part.shape for part in parameter_layout(make_config(**changes))}


def block_shapes(**changes):
    sizes = {"model_dim": 9, "num_heads": 4, "head_dim": 6, "num_kv_heads": 2, "ffn_dim": 7}
    shapes = shapes_of(**sizes, **changes)
    return {
        name.removeprefix("blocks.0."): shape
        for name, shape in shapes.items()
        if name.startswith("blocks.0.")
    }


MATRICES = {
    "attention.wq": (24, 9), "attention.wk": (12, 9), "attention.wv": (12, 9),
    "attention.wo": (9, 24), "ffn.wi": (7, 9), "ffn.wo": (9, 7),
}  # fmt: skip
QKV = {"attention.bq": (24,), "attention.bk": (12,), "attention.bv": (12,)}
BIASES = {**QKV, "attention.bo": (9,), "ffn.bi": (7,), "ffn.bo": (9,)}
GAMMAS = {"norm1.gamma": (9,), "norm2.gamma": (9,)}
NORMS = {**GAMMAS, "norm1.beta": (9,), "norm2.beta": (9,)}
INNER_GAMMAS = {"attention.gamma": (24,), "ffn.gamma": (7,)}
GATE = {"ffn.wg": (7, 9)}


def test_a_block_has_the_parameters_of_its_options():
    qk = {"attention.q_gamma": (6,), "attention.k_gamma": (6,)}
    inner = {**INNER_GAMMAS, "attention.beta": (24,), "ffn.beta": (7,)}
    for changes, expected in (
        ({}, MATRICES | BIASES | NORMS),
        ({"biases": "qkv"}, MATRICES | QKV | NORMS),
        ({"biases": "none"}, MATRICES | NORMS),
        ({"gated": True}, MATRICES | GATE | {"ffn.bg": (7,)} | BIASES | NORMS),
        ({"gated": True, "biases": "qkv"}, MATRICES | GATE | QKV | NORMS),
        ({"norm": "rms"}, MATRICES | BIASES | GAMMAS),
        ({"norm_bias": False}, MATRICES | BIASES | GAMMAS),
        ({"sub_norm": True}, MATRICES | BIASES | NORMS | inner),
        ({"sub_norm": True, "norm": "rms"}, MATRICES | BIASES | GAMMAS | INNER_GAMMAS),
        ({"qk_norm": True}, MATRICES | BIASES | NORMS | qk),
        (
            {"norm": "rms", "qk_norm": True, "sub_norm": True, "gated": True, "biases": "none"},
            MATRICES | GATE | GAMMAS | INNER_GAMMAS | qk,
        ),
    ):
        assert block_shapes(**changes) == expected, changes


def test_a_model_has_the_parameters_of_its_options():
    ends = {"embedding.weight": (11, 12), "output.weight": (11, 12), "output.bias": (11,),
            "final_norm.gamma": (12,), "final_norm.beta": (12,)}  # fmt: skip

    def outside(**changes):
        return {n: s for n, s in shapes_of(**changes).items() if not n.startswith("blocks.")}

    assert outside() == ends
    for changes, missing in (
        ({"tied_embeddings": True}, {"output.weight"}),
        ({"output_bias": False}, {"output.bias"}),
        ({"norm": "rms"}, {"final_norm.beta"}),
        ({"norm_bias": False}, {"final_norm.beta"}),
        ({"final_norm": False}, {"final_norm.gamma", "final_norm.beta"}),
        (
            {"tied_embeddings": True, "ternary_embedding": True, "output_bias": False},
            {"output.weight", "output.bias"},
        ),
    ):
        assert outside(**changes) == {n: s for n, s in ends.items() if n not in missing}, changes


@pytest.mark.parametrize("shards", [2, 3, 7, 50])
@pytest.mark.parametrize("scheme", ["ternary", "ternary-median", "binary", "2bit", "sign"])
def test_shards_have_a_scale_each(scheme, shards):
    """More shards than rows are one for each row."""
    config = make_config(scheme=scheme, scale_shards=shards, ffn_dim=7, ternary_embedding=True)
    model = random_model(config)
    assert_quantized(model)
    for name, value in model.parameters.items():
        if isinstance(value, TernaryMatrix):
            rows = value.shape[0]
            assert value.scales.shape == (rows, 1)
            numbers = len(set(value.scales.ravel().tolist()))
            # Of many float16 numbers some are the same by chance.
            assert numbers == 1 if scheme == "sign" else numbers > min(shards, rows) // 2, name


# --- Training against the oracle ------------------------------------------------------------------


@without_ties
def training_case(config, batch, time, padding, documents, *, draw):
    """Tokens and targets, of which some are padding; the exact logits, loss and gradients."""
    tokens = random_tokens(config, batch, time, padding, seed=(6, draw))
    targets = random_tokens(config, batch, time, seed=(10, draw))
    targets[0, 0] = config.pad_token if tokens.size > 1 else targets[0, 0]
    settings, starts = oracle_config(config), starts_of(documents)

    def exact(weights):
        logits, probabilities = oracle.forward(weights, settings, tokens, starts)
        loss, gradients = oracle.loss_and_gradients(weights, settings, tokens, targets, starts)
        outputs = {"logits": logits, "probabilities": probabilities, "loss": np.array(loss)}
        return {**outputs, **gradients}

    weights = oracle_weights(model_of(config))
    if config.activation == "relu":
        refuse_kinks(lambda: oracle.forward(weights, settings, tokens, starts))
    return tokens, targets, rounding_effect(exact, weights)


def refuse_kinks(forward):
    """The gradient of relu jumps at 0: no number may lie where a rounding decides on its sign."""
    inputs, activate = [], oracle.activate

    def watched(x, activation):
        inputs.append(x)
        return activate(x, activation)

    with mock.patch.object(oracle, "activate", watched):
        forward()
    if min(np.abs(x).min() for x in inputs) < 1e-5:
        raise NearTieError


def check_training(config, batch, time, padding, documents=None):
    """Logits, probabilities, loss and gradients, each of which has a size of its own."""
    tokens, targets, (exact, effects) = training_case(config, batch, time, padding, documents)
    model, starts = model_of(config), starts_of(documents)
    for name in ("logits", "probabilities"):
        actual = forward_llm_batch(model, tokens, logits=name == "logits", starts=starts)
        assert_near({name: actual}, ({name: exact[name]}, effects))
    gradients = create_legacy_llm_gradients(config)
    loss, count = BackwardPass(model, batch, time).run(tokens, targets, gradients, starts=starts)
    assert count == oracle.counted_positions(tokens, targets, config.vocab_size).sum()
    atol = 8 * (effects["loss"] + UNIT_ROUNDOFF * abs(float(exact["loss"])))
    assert_close(loss / max(count, 1), exact["loss"], rtol=0, atol=atol, what="loss")
    expected = {name: exact[name] for name in gradients.parameters}
    assert_near(gradients.parameters, (expected, effects))


@outer_tiers
@options
def test_training_is_the_oracles_with_each_option(changes):
    config = make_config(**changes)
    for batch, time, padding in ((1, 1, "none"), (2, 5, "middle"), (1, 16, "left")):
        check_training(config, batch, time, padding)
    check_training(config, 3, 16, "none", SHORT_ROWS)


@outer_tiers
@pytest.mark.parametrize("changes", combinations)
def test_training_is_the_oracles_with_options_together(changes):
    config = make_config(**changes)
    check_training(config, 2, 5, "right")
    check_training(config, 1, 9, "none", ((4, 1, 4),))


@outer_tiers
@pytest.mark.parametrize("window", ["65,0", "1,70"])
def test_training_of_long_sequences_is_the_oracles(window):
    """Queries go in blocks of 64; heads share their keys."""
    config = make_config(model_dim=8, num_heads=4, num_kv_heads=2, head_dim=6, qk_norm=True,
                         sequence_length=130, window_pattern=window, norm="rms")  # fmt: skip
    for time in (65, 130):
        check_training(config, 2, time, "left")


@options
def test_training_agrees_with_torch(changes):
    torch = pytest.importorskip("torch")
    config = make_config(**changes)
    tokens, targets, (_, effects) = training_case(config, 2, 5, "middle", None)
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
    BackwardPass(model_of(config), 2, 5).run(tokens, targets, gradients)
    of_torch = {name: leaf.grad.numpy() for name, leaf in leaves.items()}
    assert of_torch.keys() == gradients.parameters.keys()
    for name, value in of_torch.items():
        largest = max(np.abs(gradient).max() for gradient in of_torch.values())
        atol = 8 * (effects[name] + UNIT_ROUNDOFF * largest)
        assert_close(gradients.parameters[name], value, rtol=0, atol=atol, what=name)


@outer_tiers
@some
def test_steps_are_the_oracles(changes):
    config = make_config(**changes)
    tokens = random_tokens(config, 2, 7)
    for make in (AdamW, Muon, SGD):
        optimizer = make(random_model(config))
        backward_pass = BackwardPass(optimizer.model, 2, 7)
        for step in range(2):
            gradients = create_legacy_llm_gradients(config)
            backward_pass.run(tokens, np.roll(tokens, -1, axis=1), gradients)
            exact, bounds = exact_step(
                optimizer, gradients.flat, float32(0.01 / (step + 1)), 1.0, {}
            )
            optimizer.step(gradients, 0.01 / (step + 1))
            actual = flat(optimizer.model), optimizer.first, optimizer.second
            for value, expected, bound in zip(actual, exact, bounds, strict=True):
                assert_close(value, expected, rtol=0, atol=bound, dtype=np.float32)
            assert_quantized(optimizer.model)


@outer_tiers
@both
def test_activations_that_are_worked_out_once_more_have_the_same_bits(changes):
    config = make_config(**changes)
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


@outer_tiers
@some
def test_threads_agree_and_repeat(changes):
    config = make_config(**changes)
    tokens, targets, (exact, effects) = training_case(config, 3, 3, "none", None)
    expected = {name: exact[name] for name in create_legacy_llm_gradients(config).parameters}
    for threads in (2, 3, 300):
        flats = []
        for _ in range(2):
            gradients = create_legacy_llm_gradients(config)
            BackwardPass(model_of(config), 3, 3, threads).run(tokens, targets, gradients)
            assert_near(gradients.parameters, (expected, effects))
            flats.append(gradients.flat)
        assert_same_bits(flats[1], flats[0], f"{threads} threads")


@outer_tiers
@both
def test_full_precision_is_the_float_twin(changes):
    model = random_model(make_config(**changes))
    if model.config.scheme == "float":
        return
    twin = float_twin(model)
    tokens = random_tokens(model.config, 2, 7, "middle")
    targets = random_tokens(model.config, 2, 7, seed=7)
    model.use_full_precision(True)
    answers = []
    for one in (model, twin):
        gradients = create_legacy_llm_gradients(one.config)
        loss = BackwardPass(one, 2, 7).run(tokens, targets, gradients)
        answers.append((loss, gradients.parameters, forward_llm_batch(one, tokens)))
    assert answers[0][0] == answers[1][0]
    assert_same_bits(answers[0][2], answers[1][2])
    for name, value in answers[1][1].items():
        assert_same_bits(answers[0][1][name], value, name)


@outer_tiers
@pytest.mark.parametrize("scheme", ["ternary", "float"])
def test_tied_weights_have_one_gradient_and_one_set_of_codes(scheme):
    """The gradient is the sum of both uses; what moves one moves the other."""
    for ternary_embedding in (False, True):
        changes = {"scheme": scheme, "ternary_embedding": ternary_embedding}
        tied = random_model(make_config(tied_embeddings=True, **changes))
        apart = random_model(make_config(**changes))
        for name, values in apart.latent.items():
            of = "embedding.weight" if name == "output.weight" else name
            values[...] = tied.latent[of]
        apart.quantize()
        assert "output.weight" not in tied.parameters
        tokens, targets = (random_tokens(tied.config, 3, 7, seed=seed) for seed in (1, 2))
        same = [forward_llm_batch(model, tokens, logits=True) for model in (tied, apart)]
        assert_same_bits(same[0], same[1])
        found = []
        for model in (tied, apart):
            gradients = create_legacy_llm_gradients(model.config)
            loss = BackwardPass(model, 3, 7).run(tokens, targets, gradients)
            found.append((loss, dict(gradients.parameters)))
        assert found[0][0] == found[1][0]
        parts = [found[1][1].pop(name) for name in ("embedding.weight", "output.weight")]
        total = found[0][1].pop("embedding.weight")
        size = np.abs(parts[0]) + np.abs(parts[1])
        assert_close(total, parts[0].astype(float) + parts[1], rtol=0, atol=1e-6 * size.max())
        assert all(np.abs(total - part).max() > 1e-3 for part in parts)
        for name, value in found[0][1].items():
            assert_same_bits(value, found[1][1][name], name)


# --- What the layers reject -----------------------------------------------------------------------


def rejected(call, message):
    with pytest.raises((TypeError, ValueError), match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def matrix(rows, cols):
    return np.ones((rows, cols), np.float32)


def test_attention_rejects_heads_that_do_not_fit():
    def make(q=24, k=12, v=12, heads=4, **settings):
        return MultiHeadAttention(
            matrix(q, 9), matrix(k, 9), matrix(v, 9), matrix(9, q), num_heads=heads, **settings
        )

    one = np.ones(6, np.float32)
    right = make(num_kv_heads=2, q_gamma=one, k_gamma=one)
    assert (right.num_heads, right.num_kv_heads, right.head_dim) == (4, 2, 6)
    assert right.bq is None
    for call in (
        lambda: make(num_kv_heads=3),
        lambda: make(num_kv_heads=4),
        lambda: make(num_kv_heads=0),
        lambda: make(num_kv_heads=-2),
        lambda: make(heads=5, num_kv_heads=1),
        lambda: make(v=6, num_kv_heads=2),
        lambda: make(q=25, num_kv_heads=2),
        lambda: make(num_kv_heads=2, q_gamma=one),
        lambda: make(num_kv_heads=2, k_gamma=one),
        lambda: make(num_kv_heads=2, q_gamma=one, k_gamma=np.ones(12, np.float32)),
        lambda: make(num_kv_heads=2, q_gamma=one.astype(float), k_gamma=one),
        lambda: make(num_kv_heads=2, gamma=np.ones(9, np.float32)),
    ):
        rejected(call, ".")


def test_feed_forward_rejects_gates_that_do_not_fit():
    def make(**settings):
        return FeedForward(matrix(7, 9), None, matrix(9, 7), None, "silu", **settings)

    assert make(wg=matrix(7, 9)).wg.shape == (7, 9)
    rejected(lambda: make(wg=matrix(7, 8)), r"wg has shape \(7, 8\), expected \(7, 9\)")
    rejected(lambda: make(wg=matrix(8, 9)), r"wg has shape")
    rejected(lambda: make(bg=np.ones(7, np.float32)), "bg .*without wg")
    rejected(lambda: make(wg=matrix(7, 9), bg=np.ones(9, np.float32)), "bg")
    rejected(lambda: make(wg=matrix(7, 9).astype(float)), "float")
    norm = {"gamma": np.ones(7, np.float32), "beta": np.ones(7, np.float32), "rms": True}
    rejected(lambda: make(**norm), "RMS norm has no beta")
    rejected(lambda: FeedForward(matrix(7, 9), None, matrix(9, 7), None, "swish"), "silu, gelu")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qk_norm": True}, "without qk_norm"),
        ({"gated": True}, "without gated"),
        ({"sub_norm": True}, "without sub_norm"),
        ({"num_heads": 6, "num_kv_heads": 3, "head_dim": 4}, "the context is for"),
        ({"head_dim": 6}, "the context is for"),
        ({"ffn_dim": 7}, "the context is for"),
    ],
)
def test_blocks_reject_a_context_of_other_options(changes, message):
    block = model_of(make_config(**changes)).blocks[0]
    x = np.ones((2, 5, 12), np.float32)
    # Of a block without any option.
    context = create_transformer_block_context(12, 36, 3, 2, 5)
    rejected(lambda: forward_transformer_block_batch_with_context(block, x, context, None), message)


# --- Room -----------------------------------------------------------------------------------------


def traced(make):
    """What a call makes, and the bytes that NumPy and Python took for it."""
    tracemalloc.start()
    try:
        result = make()
        return result, tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()


def arrays_of(config, batch, time):
    """How many numbers the activations of one block are."""
    c, f, h, kv = config.model_dim, config.ffn_dim, config.num_heads, config.num_kv_heads
    q, k = h * config.head_dim, kv * config.head_dim
    # Input, output, two norms and the residual; q and the heads; k and v; probabilities; hidden
    # and activated; the statistics of two norms.
    each = 5 * c + 2 * q + 2 * k + h * time + 2 * f + 4
    if config.sub_norm:
        each += q + f + 4
    if config.qk_norm:
        each += q + k + h + kv
    if config.gated:
        each += f
    return batch * time * each


@both
def test_forward_context_has_the_bytes_it_says(changes):
    config, batch, time = make_config(**changes), 7, 16
    block, tokens = arrays_of(config, batch, time), batch * time
    last = tokens * (config.model_dim + 2 + config.vocab_size)
    for keep, blocks, inputs in (
        ("all", config.num_blocks, 0),
        ("inputs", 1, config.num_blocks - 1),
        ("none", 1, 0),
    ):
        expected = 4 * (last + blocks * block + inputs * tokens * config.model_dim)
        context, taken = traced(lambda keep=keep: ForwardContext(config, batch, time, keep))
        assert context.nbytes == forward_bytes(config, batch, time, keep) == expected
        for block_context in context.blocks:
            sizes = [array.nbytes for array in block_context.arrays.values() if array is not None]
            assert sum(sizes) == 4 * block
        # Python's own objects are some hundred bytes for each array.
        assert expected <= taken < expected + 40_000


@both
def test_backward_pass_has_the_bytes_it_says(changes):
    config, batch, time = make_config(**changes), 7, 16
    model = model_of(config)
    each = forward_bytes(config, batch, time) + backward_bytes(config, batch, time)
    backward_pass, taken = traced(lambda: BackwardPass(model, batch, time))
    assert backward_pass.nbytes == each
    assert each <= taken < each + 60_000
    # Two threads: one has four of the sequences, and a gradient of its own.
    halves = forward_bytes(config, 4, time) + backward_bytes(config, 4, time)
    total = 2 * halves + 4 * model.num_parameters
    assert BackwardPass(model, 8, time, 2).nbytes == total


# --- The decoder ----------------------------------------------------------------------------------


@without_ties
def decode_case(config, time, draw):
    tokens = np.random.default_rng((6, draw)).integers(0, config.vocab_size, time, np.int32)

    def exact(weights):
        return {"logits": oracle.decode(weights, oracle_config(config), tokens)}

    return tokens, rounding_effect(exact, decoder_weights(model_of(config)))


def check_pieces(config, time, pieces, threads=1, form="2bit"):
    """The logits after each piece of a sequence against the oracle's."""
    tokens, (exact, effects) = decode_case(config, time)
    decoder, start = Decoder(PackedModel(model_of(config), form), threads), 0
    found = []
    for piece in pieces:
        found.append(decoder.prefill(tokens[start : start + piece]))
        start += piece
        expected = {"logits": exact["logits"][start - 1]}
        assert_near({"logits": found[-1]}, (expected, effects))
    return found


def has_trits(config):
    widest = max(config.model_dim, config.ffn_dim, config.query_dim)
    groups = config.scale.isdigit() and widest > int(config.scale)
    return config.scheme != "2bit" and not groups


@outer_tiers
@both
def test_decoder_answers_as_the_oracle(changes):
    config = make_config(**changes)
    for pieces in ((7,), (1,) * 7, (3, 1, 2, 1)):
        found = check_pieces(config, 7, pieces)
        if has_trits(config):
            again = check_pieces(config, 7, pieces, form="trits")
            for logits, other in zip(again, found, strict=True):
                assert_same_bits(logits, other)
    check_pieces(config, 7, (5, 1, 1), threads=3)


LONG = {
    **{name: {**OPTION_MODELS[name], "num_blocks": 1}
       for name in ("llama", "qwen3", "bitnet", "yarn, adjacent, fraction", "kv heads, float")},
    # What is rounded, the cache alone, is little enough for two blocks without a tie.
    "windows": {"window_pattern": "70,0", "scheme": "float", "head_dim": 6},
}  # fmt: skip


@outer_tiers
@pytest.mark.parametrize("changes", LONG.values(), ids=LONG)
def test_decoder_of_long_prompts_answers_as_the_oracle(changes):
    """A block is 128 tokens; what came before it is in the cache."""
    config = make_config(**{**changes, "sequence_length": 150, "model_dim": 8, "ffn_dim": 9})
    for pieces in ((150,), (1, 127, 22), (129, 1, 20)):
        check_pieces(config, 150, pieces)


@some
def test_decoder_is_near_the_forward_pass(changes):
    """What it rounds to int8 costs some hundredths."""
    config = make_config(**changes)
    tokens = [3, 1, 4, 1, 5, 9, 2, 6]
    exact = forward_llm_batch(model_of(config), [tokens], logits=True)[0, -1]
    found = Decoder(PackedModel(model_of(config))).prefill(tokens)
    assert np.abs(found - exact).max() < 0.15 * np.ptp(exact)


@both
def test_decoder_computes_the_same_bits_everywhere(changes):
    """Whatever the instruction set, the threads, and the pieces a text comes in."""
    config = make_config(**{**changes, "sequence_length": 40})
    if config.scheme == "float":
        return
    packed = PackedModel(model_of(config))
    tokens = np.random.default_rng(3).integers(0, config.vocab_size, 37)
    expected = Decoder(packed).prefill_states(tokens)
    assert np.isfinite(expected).all()

    def found():
        yield Decoder(packed, 2).prefill_states(tokens)
        yield Decoder(packed, 5).prefill_states(tokens)
        decoder = Decoder(packed, sequences=2)
        parts = np.split(tokens, [1, 2, 3, 20, 21])
        yield np.concatenate([decoder.prefill_states(part, 1) for part in parts])

    for states in in_every_tier(lambda: list(found())):
        for one in states:
            assert_same_bits(one, expected)


@both
def test_decoder_has_a_cache_of_the_heads_of_keys(changes):
    """int8 keys and values with their scales, in whole tiles of 16 keys; tokens; logits."""
    config = make_config(**changes)
    model = PackedModel(model_of(config))
    heads = config.num_blocks * config.num_kv_heads
    cache = heads * 16 * (2 * config.head_dim + 2 * 4)
    sizes = [Decoder(model, sequences=count).nbytes for count in (1, 2)]
    assert sizes[1] - sizes[0] == cache + 4 * 16 + 4 * config.vocab_size


# --- Files ----------------------------------------------------------------------------------------


@both
def test_saved_models_come_back_to_the_bit(changes, tmp_path):
    model = random_model(make_config(**changes))
    save_model(model, tmp_path / "model")
    loaded = load_model(tmp_path / "model")
    assert_same_model(loaded, model)
    tokens = np.array([[1, 2, 3, 4], [5, 6, 7, 11]])
    assert_same_bits(forward_llm_batch(loaded, tokens), forward_llm_batch(model, tokens))
    decoders = [Decoder(PackedModel(one)) for one in (model, loaded)]
    assert_same_bits(*(decoder.prefill([1, 2, 3]) for decoder in decoders))
    settings = json.loads((tmp_path / "model" / "config.json").read_text())
    assert ModelConfig.from_dict(loaded.config.to_dict()) == model.config
    assert json.dumps(settings)


@both
def test_new_models_begin_near_a_uniform_distribution(changes):
    """Whatever they are made of, their first loss is that of guessing, and everything can learn."""
    config = make_config(**changes)
    model = create_legacy_llm(config, 1)
    tokens = random_tokens(config, 4, 16)
    gradients = create_legacy_llm_gradients(config)
    loss, count = BackwardPass(model, 4, 16).run(tokens, np.roll(tokens, -1, axis=1), gradients)
    # A scale of 1 makes weights of codes that are not small.
    assert config.scale == "one" or abs(loss / count - np.log(config.vocab_size)) < 0.5
    assert as_float64(gradients.parameters).keys() == model.latent.keys()
    assert np.isfinite(gradients.flat).all()
