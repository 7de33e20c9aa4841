"""The forward pass against the oracle, in every instruction set (departures 6, 7 and 8).

How close is close enough, `test_model.assert_near` works out from the oracle itself.
"""

import functools

import numpy as np
import oracle
import pytest
from compare import assert_close, assert_same_bits
from test_model import (
    assert_near,
    make_config,
    oracle_config,
    oracle_weights,
    random_model,
    rejection,
    rounding_effect,
    run_child,
)

from legacy1bit.forward import (
    KeyValueCache,
    forward_embedding,
    forward_embedding_batch,
    forward_feed_forward,
    forward_feed_forward_batch,
    forward_llm,
    forward_llm_batch,
    forward_multi_head_attention,
    forward_multi_head_attention_batch,
    forward_output_layer_batch,
    forward_transformer_block,
    forward_transformer_block_batch,
    forward_transformer_block_batch_with_context,
    forward_transformer_block_with_context,
)
from legacy1bit.hyperparams import ModelConfig
from legacy1bit.model import TernaryMatrix, create_transformer_block_context

every_tier = pytest.mark.usefixtures("tier")
schemes = pytest.mark.parametrize("scheme", ["ternary", "float"])

# The models are made once; the tests leave them as they are.
model_of = functools.cache(random_model)


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


# --- Embedding ------------------------------------------------------------------------------------


@every_tier
@pytest.mark.parametrize("kind", ["float", "ternary"])
@pytest.mark.parametrize("dim", [1, 6, 33])
def test_forward_embedding_copies_rows(kind, dim):
    config = make_config(model_dim=dim, num_heads=1, positions="none", scheme=kind,
                         ternary_embedding=True)  # fmt: skip
    model = model_of(config)
    embedding = model.parameters["embedding.weight"]
    assert isinstance(embedding, TernaryMatrix) == (kind == "ternary")
    weight = oracle_weights(model)["embedding.weight"]
    tokens = random_tokens(config, 3, 7, "middle")
    expected = oracle.embedding(tokens, weight).astype(np.float32)
    assert_close(forward_embedding_batch(embedding, tokens), expected, rtol=0, atol=0)
    column = forward_embedding_batch(embedding, tokens[:, 3])
    assert_close(column, expected[:, 3], rtol=0, atol=0, dtype=np.float32)
    for token in (0, config.pad_token - 1, config.pad_token):
        expected = oracle.embedding(np.array(token), weight)
        assert_close(forward_embedding(embedding, token), expected, rtol=0, atol=0)


@pytest.mark.parametrize("token", [-1, 12, 1000, -(1 << 31)])
def test_forward_embedding_rejects_other_ids(token):
    embedding = model_of(make_config()).parameters["embedding.weight"]
    for call in (
        lambda: forward_embedding(embedding, token),
        lambda: forward_embedding_batch(embedding, [0, token]),
        lambda: forward_embedding_batch(embedding, [[0, 1], [token, 0]]),
    ):
        with pytest.raises(IndexError, match=f"{token}, expected 0 to 10"):
            call()


# --- Attention ------------------------------------------------------------------------------------


def attention_case(config, batch, time, padding):
    """x, tokens and `allowed`, the exact intermediate values and how far rounding moves them."""
    weights = oracle_weights(model_of(config), "blocks.0.attention.")
    tokens, x = random_tokens(config, batch, time, padding), rows(batch, time, config.model_dim)

    def exact(arrays):
        q, k, v, probs, heads = oracle._attend(arrays["x"], tokens, arrays, oracle_config(config))
        flat = {name: value.reshape(x.shape) for name, value in (("q", q), ("k", k), ("v", v))}
        out = oracle.linear(heads, arrays["wo"], arrays["bo"])
        return {"out": out, "probs": probs, "heads": heads, **flat}

    return x, tokens, rounding_effect(exact, {"x": x.astype(np.float64), **weights})


# Otherwise each tier would work out the same answers again.
attention_case = functools.cache(attention_case)

# C, heads, B, T: heads of one element, of odd sizes, of several vectors and a remainder.
ATTENTION_SHAPES = ((2, 1, 1, 1), (6, 3, 2, 5), (12, 2, 3, 7), (66, 3, 1, 9), (40, 1, 1, 17))
ODD_HEADS = ((3, 3, 2, 4), (35, 5, 1, 18))


def check_attention(config, batch, time, padding):
    x, tokens, expected = attention_case(config, batch, time, padding)
    allowed = (tokens != config.pad_token).astype(np.uint8)
    attention = model_of(config).blocks[0].attention
    context = create_transformer_block_context(config.model_dim, 1, config.num_heads, batch, time)
    out = forward_multi_head_attention_batch(attention, x, allowed, context)
    # Probabilities that no query asked for are not written; the oracle has 0 there.
    in_reach = oracle.allowed_keys(np.zeros((1, time)), 1, config.attention_span)
    actual = {name: getattr(context, name) for name in ("q", "k", "v", "heads")}
    actual |= {"out": out, "probs": np.where(in_reach, context.probs, np.float32(0.0))}
    assert_near(actual, expected)
    # What may not be seen is exactly 0.
    seen = oracle.allowed_keys(tokens, config.pad_token, config.attention_span)[:, None]
    assert not np.where(seen, np.float32(0.0), actual["probs"]).any()
    assert_same_bits(forward_multi_head_attention_batch(attention, x, allowed), out)
    if padding == "none":
        assert_same_bits(forward_multi_head_attention_batch(attention, x), out)


@every_tier
@schemes
@pytest.mark.parametrize("span", [0, 1, 3])
@pytest.mark.parametrize("positions", ["rope", "none"])
def test_forward_multi_head_attention_is_the_oracles(scheme, positions, span):
    for dim, heads, batch, time in ATTENTION_SHAPES + (ODD_HEADS if positions == "none" else ()):
        config = make_config(model_dim=dim, num_heads=heads, scheme=scheme, positions=positions,
                             attention_span=span, sequence_length=32, num_blocks=1)  # fmt: skip
        for padding in PADDINGS:
            check_attention(config, batch, time, padding)


@every_tier
@pytest.mark.parametrize("span", [0, 1, 3, 64, 70])
@pytest.mark.parametrize("time", [63, 64, 65, 128, 130])
def test_forward_multi_head_attention_of_long_sequences_is_the_oracles(time, span):
    # Queries go in blocks of 64.
    config = make_config(model_dim=8, num_heads=2, attention_span=span, sequence_length=130,
                         num_blocks=1)  # fmt: skip
    for padding in ("none", "left", "middle"):
        check_attention(config, 1 if time > 65 else 2, time, padding)


@every_tier
def test_forward_multi_head_attention_writes_zeros_for_keys_a_query_may_not_see():
    config = make_config(num_blocks=1, attention_span=3)
    context = create_transformer_block_context(12, 1, 3, 1, 16)
    context.probs.fill(np.nan)
    attention = model_of(config).blocks[0].attention
    forward_multi_head_attention_batch(attention, rows(1, 16, 12), None, context)
    seen = oracle.allowed_keys(np.zeros((1, 16)), 1, 3)
    assert not np.where(seen, np.float32(0.0), context.probs).any()


@every_tier
def test_forward_multi_head_attention_over_one_token_copies_the_values_as_c_does():
    """Departure 6: in C no token sees another; over one token, or a span of one, that is right."""
    for span, time, equal in ((0, 1, True), (1, 9, True), (0, 9, False), (2, 9, False)):
        config = make_config(num_blocks=1, attention_span=span)
        weights = oracle_weights(model_of(config), "blocks.0.attention.")
        x = rows(2, time, 12)
        of_c = rounding_effect(
            lambda w: {"out": oracle.fault6_attention(w["x"], w)}, {"x": x.astype(float), **weights}
        )
        ours = forward_multi_head_attention_batch(model_of(config).blocks[0].attention, x)
        if equal:
            assert_near({"out": ours}, of_c)
        else:
            # The first token has none before it; the others differ by far more than a rounding.
            assert_near({"out": ours[:, 0]}, ({"out": of_c[0]["out"][:, 0]}, of_c[1]))
            assert (np.abs(ours - of_c[0]["out"])[:, 1:].max(axis=-1) > 0.01).all()


# --- Feed forward, block, output layer ------------------------------------------------------------


def ffn_case(config, shape):
    weights, x = oracle_weights(model_of(config), "blocks.0.ffn."), rows(*shape, config.model_dim)

    def exact(arrays):
        hidden = oracle.linear(arrays["x"], arrays["wi"], arrays["bi"])
        return {
            "hidden": hidden,
            "out": oracle.feed_forward(arrays["x"], arrays, oracle_config(config)),
        }

    return x, rounding_effect(exact, {"x": x.astype(np.float64), **weights})


ffn_case = functools.cache(ffn_case)


@every_tier
@schemes
@pytest.mark.parametrize("activation", ["relu2", "relu"])
@pytest.mark.parametrize("dim", [1, 6, 17, 33])
def test_forward_feed_forward_is_the_oracles(scheme, activation, dim):
    config = make_config(model_dim=dim, num_heads=1, positions="none", scheme=scheme,
                         activation=activation, num_blocks=1)  # fmt: skip
    ffn = model_of(config).blocks[0].ffn
    for shape in ((), (1,), (3,), (15,), (2, 5), (4, 9)):
        x, expected = ffn_case(config, shape)
        hidden = np.full((*shape, config.ffn_dim), np.nan, np.float32)
        out = forward_feed_forward_batch(ffn, x, hidden)
        assert_near({"hidden": hidden, "out": out}, expected)
        assert_same_bits(forward_feed_forward_batch(ffn, x), out)
        if shape == ():
            assert_same_bits(forward_feed_forward(ffn, x), out)


BLOCK_NAMES = ("input", "norm1", "mean1", "inv_std1", "q", "k", "v", "heads", "residual", "norm2",
               "mean2", "inv_std2", "hidden", "activated", "output")  # fmt: skip


def block_case(config, batch, time, padding):
    weights = oracle_weights(model_of(config), "blocks.0.")
    tokens, x = random_tokens(config, batch, time, padding), rows(batch, time, config.model_dim)
    attention_names = ("wq", "wk", "wv", "wo", "bq", "bk", "bv", "bo")

    def norm(x, w, name):
        return oracle.layer_norm_forward(x, w[f"{name}.gamma"], w[f"{name}.beta"])

    def exact(w):
        values = {"input": w["x"]}
        values["norm1"], values["mean1"], values["inv_std1"] = norm(w["x"], w, "norm1")
        attention = {name: w[f"attention.{name}"] for name in attention_names}
        q, k, v, _, values["heads"] = oracle._attend(
            values["norm1"], tokens, attention, oracle_config(config)
        )
        values |= {n: part.reshape(x.shape) for n, part in (("q", q), ("k", k), ("v", v))}
        mixed = oracle.linear(values["heads"], attention["wo"], attention["bo"])
        values["residual"] = w["x"] + mixed
        values["norm2"], values["mean2"], values["inv_std2"] = norm(values["residual"], w, "norm2")
        values["hidden"] = oracle.linear(values["norm2"], w["ffn.wi"], w["ffn.bi"])
        values["activated"] = oracle.activate(values["hidden"], config.activation)
        values["output"] = oracle.block(w["x"], tokens, w, oracle_config(config))
        return values

    return x, tokens, rounding_effect(exact, {"x": x.astype(np.float64), **weights})


block_case = functools.cache(block_case)


@every_tier
@schemes
@pytest.mark.parametrize("options", [{}, {"activation": "relu", "positions": "none"},
                                     {"attention_span": 2}], ids=str)  # fmt: skip
@pytest.mark.parametrize(("dim", "heads", "batch", "time"), [(6, 3, 2, 5), (34, 1, 3, 16),
                                                             (8, 2, 1, 70)])  # fmt: skip
def test_forward_transformer_block_is_the_oracles(scheme, options, dim, heads, batch, time):
    config = make_config(model_dim=dim, num_heads=heads, scheme=scheme, num_blocks=1,
                         sequence_length=70, **options)  # fmt: skip
    block = model_of(config).blocks[0]
    for padding in PADDINGS:
        x, tokens, expected = block_case(config, batch, time, padding)
        allowed = tokens != config.pad_token
        context = create_transformer_block_context(dim, config.ffn_dim, heads, batch, time)
        out = forward_transformer_block_batch_with_context(block, x, context, allowed)
        assert_near({name: getattr(context, name) for name in BLOCK_NAMES}, expected)
        assert_same_bits(out, context.output)
        assert not np.shares_memory(out, context.output)
        assert_same_bits(forward_transformer_block_batch(block, x, allowed), out)


@every_tier
@schemes
def test_single_forms_are_the_batch_forms(scheme):
    config = make_config(scheme=scheme, num_blocks=1)
    block, x = model_of(config).blocks[0], rows(5, 12)
    for single, batch, layer in (
        (forward_multi_head_attention, forward_multi_head_attention_batch, block.attention),
        (forward_feed_forward, forward_feed_forward_batch, block.ffn),
        (forward_transformer_block, forward_transformer_block_batch, block),
    ):
        # [B, C] are sequences of one token, as [B, 1, C] are.
        together = batch(layer, x)
        assert together.shape == (5, 12)
        assert_same_bits(batch(layer, x[:, None])[:, 0], together)
        for one, of_batch in zip(x, together, strict=True):
            assert_same_bits(single(layer, one), batch(layer, one[None])[0])
            assert_close(single(layer, one), of_batch, rtol=1e-6, atol=1e-6, dtype=np.float32)
    context = create_transformer_block_context(12, 36, 3, 1, 1)
    out = forward_transformer_block_with_context(block, x[0], context)
    assert_same_bits(out, forward_transformer_block(block, x[0]))
    assert_same_bits(context.input[0, 0], x[0])
    assert_same_bits(context.output[0, 0], out)


@every_tier
@pytest.mark.parametrize("kind", ["float", "ternary"])
@pytest.mark.parametrize(("vocab", "dim"), [(1, 1), (11, 6), (67, 33), (5, 130)])
def test_forward_output_layer_batch_is_the_oracles(kind, vocab, dim):
    config = make_config(vocab_size=vocab, model_dim=dim, num_heads=1, positions="none",
                         scheme=kind, ternary_embedding=True, num_blocks=1)  # fmt: skip
    model = model_of(config)
    weights = oracle_weights(model, "output.")
    for shape in ((), (3,), (20,), (2, 9)):
        x = rows(*shape, dim)
        expected = rounding_effect(
            lambda w: {"logits": oracle.linear(w["x"], w["weight"], w["bias"])},
            {"x": x.astype(np.float64), **weights},
        )
        logits = forward_output_layer_batch(
            model.parameters["output.weight"], model.parameters["output.bias"], x
        )
        assert_near({"logits": logits}, expected)


# --- What the layers reject -----------------------------------------------------------------------


def layer_calls(block, x):
    return (
        lambda: forward_multi_head_attention_batch(block.attention, x),
        lambda: forward_feed_forward_batch(block.ffn, x),
        lambda: forward_transformer_block_batch(block, x),
        lambda: forward_output_layer_batch(np.ones((11, 12), "f4"), np.ones(11, "f4"), x),
    )


@pytest.mark.parametrize(
    "x",
    [None, [1.0] * 12, rows(3, 12).astype(np.float64), rows(3, 12).astype(np.float16),
     rows(3, 12).astype(">f4")],
    ids=["None", "list", "float64", "float16", "swapped"],
)  # fmt: skip
def test_layers_reject_other_kinds_of_activations(x):
    for call in layer_calls(model_of(make_config()).blocks[0], x):
        with pytest.raises(TypeError, match="not a float32 array"):
            call()


@pytest.mark.parametrize(
    "shape", [(11,), (3, 13), (2, 3, 11), (12, 3), (0, 12), (2, 0, 12), (1, 2, 3, 12), ()]
)
def test_layers_reject_other_shapes(shape):
    for call in layer_calls(model_of(make_config()).blocks[0], np.zeros(shape, np.float32)):
        with pytest.raises(ValueError, match=r"has shape .*expected"):
            call()


def test_layers_reject_strided_activations():
    for x in (rows(3, 24)[:, ::2], rows(12, 3).T, rows(2, 5, 12)[:, ::2]):
        for call in layer_calls(model_of(make_config()).blocks[0], x):
            with pytest.raises(ValueError, match="contiguous"):
                call()


def test_layers_reject_sequences_beyond_the_rotary_table():
    block = model_of(make_config()).blocks[0]
    for call in layer_calls(block, rows(1, 17, 12))[::2]:
        with pytest.raises(ValueError, match="17 positions, expected at most 16"):
            call()


@pytest.mark.parametrize("shape", [(2, 4), (3, 5), (2, 5, 1), (10,)])
def test_layers_reject_other_shapes_of_allowed(shape):
    block, allowed = model_of(make_config()).blocks[0], np.ones(shape, np.uint8)
    with pytest.raises(ValueError, match=r"allowed|dimensions"):
        forward_multi_head_attention_batch(block.attention, rows(2, 5, 12), allowed)
    with pytest.raises(ValueError, match=r"allowed|dimensions"):
        forward_transformer_block_batch(block, rows(2, 5, 12), allowed)


# A context and a buffer that are too small: written to all the same, they crash the process.
SMALL_ROOM = {
    "context of another ffn_dim": (
        "context = TransformerBlockContext(256, 1, 2, 3, 5)",
        "forward_transformer_block_batch_with_context(block, x, context)",
    ),
    "context of fewer keys": (
        "context = TransformerBlockContext(256, 1024, 2, 3, 5, 1)",
        "forward_transformer_block_batch_with_context(block, x, context)",
    ),
    "context of fewer keys, attention": (
        "context = TransformerBlockContext(256, 1, 2, 3, 5, 1)",
        "forward_multi_head_attention_batch(block.attention, x, None, context)",
    ),
    "context of fewer heads": (
        "context = TransformerBlockContext(256, 1024, 1, 3, 5)",
        "forward_transformer_block_batch_with_context(block, x, context)",
    ),
    "context of fewer tokens": (
        "context = TransformerBlockContext(256, 1024, 2, 3, 4)",
        "forward_transformer_block_batch_with_context(block, x, context)",
    ),
    "strided hidden": (
        "hidden = np.zeros((1024, 5, 3), np.float32).T",
        "forward_feed_forward_batch(block.ffn, x, hidden)",
    ),
    "hidden of another shape": (
        "hidden = np.zeros((3, 5, 1), np.float32)",
        "forward_feed_forward_batch(block.ffn, x, hidden)",
    ),
    "hidden of float64": (
        "hidden = np.zeros((3, 5, 1024))",
        "forward_feed_forward_batch(block.ffn, x, hidden)",
    ),
}


@pytest.mark.parametrize("case", SMALL_ROOM)
def test_layers_reject_room_that_does_not_fit(case):
    setup, call = SMALL_ROOM[case]
    printed = run_child(
        "from legacy1bit.forward import *\n"
        "from legacy1bit.hyperparams import ModelConfig\n"
        "model = create_legacy_llm(ModelConfig(model_dim=256, num_blocks=1, num_heads=2), 1)\n"
        "block, x = model.blocks[0], np.ones((3, 5, 256), np.float32)\n"
        f"{setup}\n" + rejection(f"{call}; print('no error')")
    )
    assert printed.startswith("ValueError")


# --- The whole model ------------------------------------------------------------------------------

MODELS = {
    "defaults": {},
    "float": {"scheme": "float"},
    "ternary embedding": {"ternary_embedding": True},
    "scale one": {"scale": "one", "ternary_embedding": True},
    "plain": {"activation": "relu", "positions": "none", "final_norm": False},
    "span 1": {"attention_span": 1},
    "span 3": {"attention_span": 3, "positions": "none"},
    "one block": {"num_blocks": 1, "final_norm": False},
    "odd": {"vocab_size": 7, "model_dim": 15, "num_heads": 5, "positions": "none"},
    "wide": {"vocab_size": 67, "model_dim": 66, "num_heads": 3, "ffn_multiplier": 1},
}
models = pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)


def model_case(config, batch, time, padding):
    model, tokens = model_of(config), random_tokens(config, batch, time, padding)

    def exact(weights):
        logits, probabilities = oracle.forward(weights, oracle_config(config), tokens)
        return {"logits": logits, "probabilities": probabilities}

    return tokens, rounding_effect(exact, oracle_weights(model))


model_case = functools.cache(model_case)


def assert_model_near(model, tokens, expected, threads=1):
    """Logits and probabilities are numbers of different size: each has a bound of its own."""
    exact, effects = expected
    for name, logits in (("logits", True), ("probabilities", False)):
        actual = forward_llm_batch(model, tokens, threads, logits=logits)
        assert_near({name: actual}, ({name: exact[name]}, effects))


@every_tier
@models
@paddings
def test_forward_llm_batch_is_the_oracles(changes, padding):
    config = make_config(**changes)
    for batch, time in ((1, 1), (3, 7), (2, 16)):
        tokens, expected = model_case(config, batch, time, padding)
        assert_model_near(model_of(config), tokens, expected)


@every_tier
@pytest.mark.parametrize("span", [0, 1, 65])
@pytest.mark.parametrize("time", [65, 130])
def test_forward_llm_batch_of_long_sequences_is_the_oracles(time, span):
    config = make_config(model_dim=8, num_heads=2, sequence_length=130, attention_span=span)
    tokens, expected = model_case(config, 2, time, "left")
    assert_model_near(model_of(config), tokens, expected, threads=2)


@every_tier
def test_forward_llm_batch_answers_every_item_of_any_batch():
    """Departure 8: C answers for the first item only, and writes past its buffers beyond 8."""
    config = make_config()
    model = model_of(config)
    tokens, expected = model_case(config, 20, 5, "none")
    assert_model_near(model, tokens, expected)
    single, expected = model_case(config, 20, 1, "none")
    assert_model_near(model, single, expected)
    assert_same_bits(forward_llm_batch(model, single[:, 0]), forward_llm_batch(model, single)[:, 0])
    # C's answer for all: the first one's.
    answers = forward_llm_batch(model, np.arange(11))
    assert all(not np.allclose(answers[0], answer, atol=1e-3) for answer in answers[1:])


@every_tier
@schemes
@pytest.mark.parametrize("padding", ["none", "left", "row"])
@pytest.mark.parametrize(("batch", "time"), [(5, 7), (7, 1), (20, 1), (3, 16), (1, 9)])
def test_forward_llm_batch_has_the_same_bits_with_the_same_number_of_threads(
    scheme, padding, batch, time
):
    """Another number rounds differently, as few rows are multiplied in another way than many."""
    config = make_config(model_dim=66, scheme=scheme)
    tokens, expected = model_case(config, batch, time, padding)
    numbers, model = (1, 2, 3, 7, 300), model_of(config)
    answers = {threads: forward_llm_batch(model, tokens, threads) for threads in numbers}
    for threads in reversed(numbers):
        again = forward_llm_batch(model, tokens, threads)
        assert_same_bits(again, answers[threads], f"{threads}")
        assert_model_near(model, tokens, expected, threads)
    # No more threads than sequences have work.
    assert_same_bits(forward_llm_batch(model, tokens, batch), answers[300])


@every_tier
def test_forward_llm_takes_a_token_a_batch_or_sequences():
    model = model_of(make_config())
    one = forward_llm(model, 3)
    assert one.shape == (11,)
    assert_same_bits(forward_llm_batch(model, [3])[0], one)
    assert_same_bits(forward_llm(model, np.int64(3)), one)
    for tokens in ([3, 4], [[3, 4], [5, 6]]):
        for given in (tokens, np.array(tokens, np.uint8), np.array(tokens, np.int64)):
            assert_same_bits(forward_llm(model, given), forward_llm_batch(model, tokens))
    strided = np.array([[3, 0, 4, 0], [5, 0, 6, 0]])[:, ::2]
    assert_same_bits(forward_llm_batch(model, strided), forward_llm_batch(model, [[3, 4], [5, 6]]))
    assert_close(one.sum(), 1.0, rtol=1e-6, atol=0)


# --- Who sees whom --------------------------------------------------------------------------------


@every_tier
@pytest.mark.parametrize("span", [0, 3])
def test_forward_llm_batch_looks_back_and_never_ahead(span):
    """Departures 6 and 7: in C a prompt's last character alone decides what follows."""
    config = make_config(sequence_length=100, attention_span=span)
    model, tokens = model_of(config), random_tokens(make_config(), 1, 100)
    before = forward_llm_batch(model, tokens, logits=True)[0]
    for changed in (0, 1, 63, 64, 99):
        other = tokens.copy()
        other[0, changed] = (other[0, changed] + 1) % 11
        after = forward_llm_batch(model, other, logits=True)[0]
        assert_same_bits(after[:changed], before[:changed], "before the change")
        moved = np.abs(after - before).max(axis=1)
        # Two blocks, each of which reaches span - 1 tokens back.
        reach = 100 if span == 0 else changed + 2 * (span - 1) + 1
        assert (moved[changed:reach] > 1e-5).all()
        assert not moved[reach:].any()


@every_tier
def test_forward_llm_batch_with_a_span_of_one_answers_each_token_alone():
    # As the C original does: what stands before makes no difference.
    config = make_config(attention_span=1, positions="none")
    model, tokens = model_of(config), random_tokens(config, 2, 9)
    _, expected = model_case(config, 2, 9, "none")
    alone = np.stack([forward_llm(model, int(token)) for token in tokens.ravel()])
    exact, effects = expected
    assert_near(
        {"probabilities": alone.reshape(2, 9, -1)},
        ({"probabilities": exact["probabilities"]}, effects),
    )


@every_tier
def test_padding_changes_nothing_elsewhere():
    config = make_config(positions="none")
    model, pad = model_of(config), config.pad_token
    tokens = random_tokens(config, 1, 8)
    alone = forward_llm_batch(model, tokens, logits=True)[0]
    _, (exact, effects) = model_case(config, 1, 8, "none")
    for places in ((8, 9, 10), (0, 1, 2), (0, 4, 9), (2, 3, 5)):
        padded = np.full((1, 11), pad, np.int32)
        others = [place for place in range(11) if place not in places]
        padded[0, others] = tokens[0]
        logits = forward_llm_batch(model, padded, logits=True)[0, others]
        # Without positions a token has no way to tell that padding stands before it.
        assert_near({"logits": logits[None]}, ({"logits": exact["logits"]}, effects))
        if places == (8, 9, 10):
            assert_same_bits(logits, alone)


@every_tier
def test_padding_at_the_end_changes_no_bit_elsewhere():
    config = make_config()
    model, tokens = model_of(config), random_tokens(config, 3, 16)
    before = forward_llm_batch(model, tokens)
    padded = tokens.copy()
    padded[1, 10:] = config.pad_token
    padded[2] = config.pad_token
    after = forward_llm_batch(model, padded)
    assert_same_bits(after[0], before[0])
    assert_same_bits(after[1, :10], before[1, :10])
    assert np.isfinite(after).all()


# --- What the model rejects -----------------------------------------------------------------------


@pytest.mark.parametrize("token", [-1, 12, 1 << 31, -(1 << 40), (1 << 63) - 1])
def test_forward_llm_rejects_other_ids(token):
    model = model_of(make_config())
    for call in (
        lambda: forward_llm(model, token),
        lambda: forward_llm_batch(model, [1, token]),
        lambda: forward_llm_batch(model, [[1, 2], [3, token]]),
        lambda: KeyValueCache(model).extend(model, [1, token]),
    ):
        with pytest.raises(IndexError, match=r"expected 0 to 10|no token id"):
            call()


@pytest.mark.parametrize("tokens", [None, 1.0, "a", [1.0, 2.0], True, [[[1]]], [None], b"ab"])
def test_forward_llm_rejects_other_kinds_of_tokens(tokens):
    model = model_of(make_config())
    for call in (
        lambda: forward_llm(model, tokens),
        lambda: forward_llm_batch(model, tokens),
        lambda: KeyValueCache(model).extend(model, tokens),
    ):
        with pytest.raises(TypeError, match="expected whole numbers"):
            call()


@pytest.mark.parametrize("tokens", [[[1]], [[1, 2]], [[1], [2]], np.ones((2, 3), np.int32)])
def test_extend_rejects_more_than_one_sequence(tokens):
    model = model_of(make_config())
    cache = KeyValueCache(model)
    with pytest.raises(ValueError, match="tokens has 2 axes, expected one sequence"):
        cache.extend(model, tokens)
    assert cache.length == 0


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)])
def test_forward_llm_batch_rejects_empty_batches(shape):
    with pytest.raises(ValueError, match="tokens is empty"):
        forward_llm_batch(model_of(make_config()), np.zeros(shape, np.int32))


def test_forward_llm_batch_rejects_sequences_beyond_its_positions():
    tokens = np.zeros((1, 17), np.int32)
    with pytest.raises(ValueError, match="17 tokens in a sequence, expected at most 16"):
        forward_llm_batch(model_of(make_config()), tokens)
    # Without positions there is nothing that ends.
    assert forward_llm_batch(model_of(make_config(positions="none")), tokens).shape == (1, 17, 11)


@pytest.mark.parametrize("threads", [0, -1])
def test_forward_llm_batch_rejects_fewer_than_one_thread(threads):
    with pytest.raises(ValueError, match=f"threads is {threads}, expected at least 1"):
        forward_llm_batch(model_of(make_config()), [[1]], threads)


# --- A piece at a time ----------------------------------------------------------------------------


def check_cache(config, tokens, pieces, expected, **kwargs):
    """The logits after each piece, against the exact ones of the whole sequence."""
    exact, effects = expected
    model = model_of(config)
    cache, start = KeyValueCache(model, **kwargs), 0
    for piece in pieces:
        logits = cache.extend(model, tokens[0, start : start + piece])
        start += piece
        assert cache.length == start
        last = exact["logits"][0, start - 1]
        assert_near({"logits": logits}, ({"logits": last}, effects))
    return cache


PIECES = ((16,), (1,) * 16, (3, 1, 5, 7), (1, 15), (15, 1), (7, 7, 2))


@every_tier
@models
def test_key_value_cache_answers_as_the_whole_sequence(changes):
    config = make_config(**changes)
    tokens, expected = model_case(config, 1, 16, "none")
    for pieces in PIECES:
        check_cache(config, tokens, pieces, expected)


@every_tier
@pytest.mark.parametrize("span", [0, 5, 70])
@pytest.mark.parametrize("pieces", [(130,), (1, 64, 65), (64, 1, 1, 64), (100, 30), (65, 65)])
def test_key_value_cache_of_long_sequences_answers_as_the_whole_sequence(pieces, span):
    config = make_config(model_dim=8, num_heads=2, sequence_length=130, attention_span=span)
    tokens, expected = model_case(config, 1, 130, "none")
    check_cache(config, tokens, pieces, expected)


def test_key_value_cache_starts_over_after_clear():
    config = make_config()
    model = model_of(config)
    cache = KeyValueCache(model)
    first = cache.extend(model, [1, 2, 3])
    cache.extend(model, [4, 5])
    cache.clear()
    assert cache.length == 0
    assert_same_bits(cache.extend(model, [1, 2, 3]), first)


def test_key_value_cache_keeps_its_answers():
    model = model_of(make_config())
    cache = KeyValueCache(model)
    first = cache.extend(model, [1])
    before = first.copy()
    cache.extend(model, [2])
    assert_same_bits(first, before)


def test_key_value_cache_has_a_capacity():
    config = make_config()
    tokens, expected = model_case(config, 1, 16, "none")
    model = model_of(config)
    assert KeyValueCache(model).capacity == 16
    cache = check_cache(config, tokens, (3, 2), expected, capacity=6)
    with pytest.raises(ValueError, match="5 tokens and 2 more do not fit a cache of 6"):
        cache.extend(model, tokens[0, 5:7])
    # What it refuses, it has not taken in.
    assert cache.length == 5
    exact, effects = expected
    logits = cache.extend(model, tokens[0, 5:6])
    assert_near({"logits": logits}, ({"logits": exact["logits"][0, 5]}, effects))
    with pytest.raises(ValueError, match="do not fit"):
        cache.extend(model, [1])
    for capacity in (0, -1, 17):
        with pytest.raises(ValueError, match=f"capacity is {capacity}, expected 1 to 16"):
            KeyValueCache(model, capacity)


def test_key_value_cache_is_unchanged_by_what_it_rejects():
    model = model_of(make_config())
    cache = KeyValueCache(model)
    cache.extend(model, [1, 2])
    other = random_model(make_config(final_norm=False))
    for call, error in (
        (lambda: cache.extend(model, [3, -1]), IndexError),
        (lambda: cache.extend(model, [1.5]), TypeError),
        (lambda: cache.extend(model, np.zeros(0, np.int32)), ValueError),
        (lambda: cache.extend(other, [3]), ValueError),
    ):
        with pytest.raises(error):
            call()
        assert cache.length == 2
    fresh = KeyValueCache(model)
    fresh.extend(model, [1, 2])
    assert_same_bits(cache.extend(model, [3]), fresh.extend(model, [3]))


def test_key_value_cache_hides_padding_or_rejects_it():
    model = model_of(make_config())
    cache = KeyValueCache(model)
    whole = forward_llm_batch(model, [[1, 11, 2]], logits=True)[0, -1]
    try:
        logits = cache.extend(model, [1, 11, 2])
    except (IndexError, ValueError):
        assert cache.length == 0
    else:
        assert_close(logits, whole, rtol=1e-5, atol=1e-5)


def test_key_value_cache_rejects_more_than_one_sequence():
    model = model_of(make_config())
    with pytest.raises((TypeError, ValueError)):
        KeyValueCache(model).extend(model, [[1, 2], [3, 4]])


def test_c_original_has_a_cache_too():
    config = ModelConfig.c_original(8, 8, sequence_length=8)
    model = model_of(config)
    cache = KeyValueCache(model)
    for token in range(8):
        expected = forward_llm_batch(model, [token], logits=True)[0]
        assert_same_bits(cache.extend(model, [token]), expected)
