"""The forward pass against the oracle, in every instruction set (departures 6, 7 and 8).

How close is close enough, `models.assert_near` works out from the oracle itself.
"""

import itertools

import numpy as np
import pytest

from helpers import oracle
from helpers.arrays import assert_close, assert_same_bits
from helpers.models import (
    CODED,
    LONG_ROWS,
    PADDINGS,
    SHORT_ROWS,
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
from legacy1bit.forward import (
    ForwardContext,
    document_starts,
    forward_bytes,
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
from legacy1bit.model import (
    FeedForward,
    MultiHeadAttention,
    TernaryMatrix,
    create_legacy_llm,
    create_transformer_block_context,
)

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


@every_tier
@scaled_matrices
def test_forward_embedding_of_scaled_codes_is_exact(scheme, shape, group):
    matrix = random_matrix(scheme, shape, group)
    tokens = np.arange(shape[0] + 1)
    expected = oracle.embedding(tokens, exact_dense(matrix)).astype(np.float32)
    assert_close(
        forward_embedding_batch(matrix, tokens), expected, rtol=0, atol=0, dtype=np.float32
    )


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


def attention_values(x, tokens, weights, config, starts=None):
    """What attention leaves in its context, and its output, for an input that is rounded."""
    options = oracle_config(config)
    q, k, v, probs, heads = oracle._attend(x, tokens, weights, options, starts)
    flat = {name: value.reshape(x.shape) for name, value in (("q", q), ("k", k), ("v", v))}
    values = {"probs": probs, "heads": heads, **flat}
    values |= norm_values("heads", heads, weights, config)
    last = oracle._before_wo(heads, weights, options)
    return {**values, "out": oracle.linear(last, weights["wo"], weights["bo"])}


def norm_values(name, x, weights, config):
    """What a layer leaves of x and of the norm before its last matrix, rounding included."""
    rounded = oracle._before_wo(x, weights, oracle_config(config))
    if not config.sub_norm:
        return {name: rounded}
    _, mean, inv_std = oracle.layer_norm_forward(x, weights["gamma"], weights["beta"])
    norm = {f"{name}_normed": rounded, f"{name}_mean": mean, f"{name}_inv_std": inv_std}
    return {name: x, **norm}


def assert_context_near(actual, expected):
    """1 / std, which epsilon lets grow to 316, gives a bound to itself alone."""
    exact, effects = expected
    alone = [name for name in exact if "inv_std" in name]
    assert actual.keys() == exact.keys()
    for names in ([name for name in exact if name not in alone], *([name] for name in alone)):
        assert_near(
            {name: actual[name] for name in names}, ({name: exact[name] for name in names}, effects)
        )


@without_ties
def attention_case(config, batch, time, padding, documents, draw):
    """x, tokens and `allowed`, the exact intermediate values and how far rounding moves them."""
    weights = oracle_weights(model_of(config), "blocks.0.attention.")
    tokens = random_tokens(config, batch, time, padding)
    x = rows(batch, time, config.model_dim, seed=(5, draw))

    def exact(arrays):
        rounded = oracle._rounded(arrays["x"], oracle_config(config))
        return attention_values(rounded, tokens, arrays, config, starts_of(documents))

    return x, tokens, rounding_effect(exact, {"x": x.astype(np.float64), **weights})


# C, heads, B, T: heads of one element, of odd sizes, of several vectors and a remainder.
ATTENTION_SHAPES = ((2, 1, 1, 1), (6, 3, 2, 5), (12, 2, 3, 7), (66, 3, 1, 9), (40, 1, 1, 17))
ODD_HEADS = ((3, 3, 2, 4), (35, 5, 1, 18))


def check_attention(config, batch, time, padding, documents=None):
    x, tokens, expected = attention_case(config, batch, time, padding, documents)
    starts = starts_of(documents)
    allowed = (tokens != config.pad_token).astype(np.uint8)
    attention, before = model_of(config).blocks[0].attention, x.copy()
    context = create_transformer_block_context(
        config.model_dim, 1, config.num_heads, batch, time, config.sub_norm
    )
    out = forward_multi_head_attention_batch(attention, x, allowed, context, starts)
    assert_same_bits(x, before, "the input")
    # Probabilities that no query asked for are not written; the oracle has 0 there.
    in_reach = oracle.allowed_keys(np.zeros((1, time)), 1, config.attention_window)
    probs = np.where(in_reach, context.probs, np.float32(0.0))
    actual = {name: getattr(context, name, None) for name in expected[0]}
    actual |= {"out": out, "probs": probs}
    assert_context_near(actual, expected)
    # What may not be seen is exactly 0.
    seen = oracle.allowed_keys(tokens, config.pad_token, config.attention_window, starts)[:, None]
    assert not np.where(seen, np.float32(0.0), actual["probs"]).any()
    again = forward_multi_head_attention_batch(attention, x, allowed, starts=starts)
    assert_same_bits(again, out)
    if padding == "none":
        assert_same_bits(forward_multi_head_attention_batch(attention, x, starts=starts), out)


@every_tier
@schemes
@pytest.mark.parametrize("span", [0, 1, 3])
@pytest.mark.parametrize("positions", ["rope", "none"])
def test_forward_multi_head_attention_is_the_oracles(scheme, positions, span):
    for dim, heads, batch, time in ATTENTION_SHAPES + (ODD_HEADS if positions == "none" else ()):
        config = make_config(model_dim=dim, num_heads=heads, scheme=scheme, positions=positions,
                             attention_window=span, sequence_length=32, num_blocks=1)  # fmt: skip
        for padding in PADDINGS:
            check_attention(config, batch, time, padding)


@outer_tiers
@layers
def test_forward_multi_head_attention_with_other_settings_is_the_oracles(changes):
    for config, batch, time in attention_cases(changes):
        for padding in ("none", "left", "row"):
            check_attention(config, batch, time, padding)


@every_tier
@pytest.mark.parametrize("span", [0, 1, 3, 24, 70])
@pytest.mark.parametrize("time", [23, 24, 25, 65, 130])
def test_forward_multi_head_attention_of_long_sequences_is_the_oracles(time, span):
    # Queries go in blocks of 24.
    config = make_config(model_dim=8, num_heads=2, attention_window=span, sequence_length=130,
                         num_blocks=1)  # fmt: skip
    for padding in ("none", "left", "middle"):
        check_attention(config, 1 if time > 65 else 2, time, padding)


@every_tier
@pytest.mark.parametrize("span", [0, 3, 65])
def test_forward_multi_head_attention_of_documents_in_a_row_is_the_oracles(span):
    config = make_config(model_dim=8, num_heads=2, attention_window=span, sequence_length=130,
                         num_blocks=1)  # fmt: skip
    check_attention(config, 6, 130, "left", LONG_ROWS)
    for padding in ("none", "middle"):
        check_attention(config, 3, 16, padding, SHORT_ROWS)


@every_tier
def test_forward_multi_head_attention_never_reads_what_stands_in_front_of_a_block():
    """A product with 0 would be NaN: blocks of queries leave the documents before theirs out."""
    attention = model_of(make_config(positions="none")).blocks[0].attention
    for begin in (24, 120):
        x, starts = rows(1, 130, 12).copy(), starts_of([(begin, 130 - begin)])
        expected = forward_multi_head_attention_batch(attention, x, starts=starts)
        x[:, :begin] = np.nan
        out = forward_multi_head_attention_batch(attention, x, starts=starts)
        assert_same_bits(out[:, begin:], expected[:, begin:])


@every_tier
@pytest.mark.parametrize("span", [0, 65])
def test_forward_multi_head_attention_leaves_zeros_outside_of_documents(span):
    """Everywhere, for a backward pass that is not told of them."""
    config = make_config(num_blocks=1, attention_window=span, positions="none")
    context = create_transformer_block_context(12, 1, 3, 6, 130)
    context.probs.fill(np.nan)
    attention, starts = model_of(config).blocks[0].attention, starts_of(LONG_ROWS)
    forward_multi_head_attention_batch(attention, rows(6, 130, 12), None, context, starts)
    seen = oracle.allowed_keys(np.zeros((6, 130)), 1, span, starts)[:, None]
    assert not np.where(seen, np.float32(0.0), context.probs).any()


@every_tier
def test_forward_multi_head_attention_writes_zeros_for_keys_a_query_may_not_see():
    config = make_config(num_blocks=1, attention_window=3)
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
        config = make_config(num_blocks=1, attention_window=span)
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


@without_ties
def ffn_case(config, shape, draw):
    weights = oracle_weights(model_of(config), "blocks.0.ffn.")
    x = rows(*shape, config.model_dim, seed=(5, draw))

    def exact(arrays):
        rounded = oracle._rounded(arrays["x"], oracle_config(config))
        return {
            "hidden": oracle.linear(rounded, arrays["wi"], arrays["bi"]),
            "out": oracle.feed_forward(arrays["x"], arrays, oracle_config(config)),
        }

    return x, rounding_effect(exact, {"x": x.astype(np.float64), **weights})


def check_feed_forward(config, shapes):
    ffn = model_of(config).blocks[0].ffn
    for shape in shapes:
        x, expected = ffn_case(config, shape)
        before = x.copy()
        hidden = np.full((*shape, config.ffn_dim), np.nan, np.float32)
        out = forward_feed_forward_batch(ffn, x, hidden)
        assert_near({"hidden": hidden, "out": out}, expected)
        assert_same_bits(x, before, "the input")
        assert_same_bits(forward_feed_forward_batch(ffn, x), out)
        if shape == ():
            assert_same_bits(forward_feed_forward(ffn, x), out)


@every_tier
@schemes
@pytest.mark.parametrize("activation", oracle.ACTIVATIONS)
@pytest.mark.parametrize("dim", [1, 6, 17, 33])
def test_forward_feed_forward_is_the_oracles(scheme, activation, dim):
    config = make_config(model_dim=dim, num_heads=1, positions="none", scheme=scheme,
                         activation=activation, num_blocks=1)  # fmt: skip
    check_feed_forward(config, ((), (1,), (3,), (15,), (2, 5), (4, 9)))


@every_tier
@layers
def test_forward_feed_forward_with_other_settings_is_the_oracles(changes):
    dims = (1, 6, 33) + ((129, 257) if "scale" in changes else ())
    for dim, activation in zip(dims, itertools.cycle(oracle.ACTIVATIONS), strict=False):
        config = make_config(model_dim=dim, num_heads=1, positions="none", activation=activation,
                             num_blocks=1, ffn_multiplier=3 if dim < 99 else 1,
                             **changes)  # fmt: skip
        check_feed_forward(config, ((), (3,), (15,)))


@without_ties
def block_case(config, batch, time, padding, documents, draw):
    weights = oracle_weights(model_of(config), "blocks.0.")
    tokens = random_tokens(config, batch, time, padding)
    x, options = rows(batch, time, config.model_dim, seed=(5, draw)), oracle_config(config)
    starts = starts_of(documents)

    def norm(x, w, name):
        return oracle.layer_norm_forward(x, w[f"{name}.gamma"], w[f"{name}.beta"])

    def exact(w):
        attention, ffn = oracle._part(w, "attention."), oracle._part(w, "ffn.")
        values = {"input": w["x"]}
        values["norm1"], values["mean1"], values["inv_std1"] = norm(w["x"], w, "norm1")
        values["norm1"] = oracle._rounded(values["norm1"], options)
        values |= attention_values(values["norm1"], tokens, attention, config, starts)
        values["residual"] = w["x"] + values.pop("out")
        del values["probs"]
        values["norm2"], values["mean2"], values["inv_std2"] = norm(values["residual"], w, "norm2")
        values["norm2"] = oracle._rounded(values["norm2"], options)
        values["hidden"] = oracle.linear(values["norm2"], ffn["wi"], ffn["bi"])
        activated = oracle.activate(values["hidden"], config.activation)
        values |= norm_values("activated", activated, ffn, config)
        values["output"] = oracle.block(w["x"], tokens, w, options, starts)
        return values

    return x, tokens, rounding_effect(exact, {"x": x.astype(np.float64), **weights})


def check_block(config, batch, time, padding, documents=None):
    block, starts = model_of(config).blocks[0], starts_of(documents)
    x, tokens, expected = block_case(config, batch, time, padding, documents)
    allowed, before = tokens != config.pad_token, x.copy()
    context = create_transformer_block_context(
        config.model_dim, config.ffn_dim, config.num_heads, batch, time, config.sub_norm
    )
    out = forward_transformer_block_batch_with_context(block, x, context, allowed, starts)
    assert_context_near({name: getattr(context, name) for name in expected[0]}, expected)
    assert_same_bits(x, before, "the input")
    assert_same_bits(out, context.output)
    assert not np.shares_memory(out, context.output)
    assert_same_bits(forward_transformer_block_batch(block, x, allowed, starts), out)


@outer_tiers
@schemes
@pytest.mark.parametrize("options", [{}, {"activation": "relu", "positions": "none"},
                                     {"attention_window": 2}], ids=str)  # fmt: skip
@pytest.mark.parametrize(("dim", "heads", "batch", "time"), [(6, 3, 2, 5), (34, 1, 3, 16),
                                                             (8, 2, 1, 70)])  # fmt: skip
def test_forward_transformer_block_is_the_oracles(scheme, options, dim, heads, batch, time):
    config = make_config(model_dim=dim, num_heads=heads, scheme=scheme, num_blocks=1,
                         sequence_length=70, **options)  # fmt: skip
    for padding in PADDINGS:
        check_block(config, batch, time, padding)


@outer_tiers
@layers
def test_forward_transformer_block_with_other_settings_is_the_oracles(changes):
    for dim, heads, batch, time in ((6, 3, 2, 5), (34, 1, 3, 7)):
        config = make_config(model_dim=dim, num_heads=heads, num_blocks=1, **changes)
        for padding in ("none", "left", "row"):
            check_block(config, batch, time, padding)


@every_tier
def test_forward_transformer_block_of_documents_in_a_row_is_the_oracles():
    config = make_config(num_blocks=1, attention_window=7, sub_norm=True)
    for padding in ("none", "left", "middle"):
        check_block(config, 3, 16, padding, SHORT_ROWS)


@every_tier
def test_layers_round_their_matrices_inputs_to_int8():
    """Each of them is whole multiples of a step; what is not a matrix's input, is not."""
    for sub_norm in (False, True):
        config = make_config(num_blocks=1, int8_activations=True, sub_norm=sub_norm)
        block, context = model_of(config).blocks[0], create_transformer_block_context(
            12, 36, 3, 3, 5, sub_norm
        )  # fmt: skip
        forward_transformer_block_batch_with_context(block, rows(3, 5, 12), context)
        suffix = "_normed" if sub_norm else ""
        whole = {"norm1", "norm2", "heads" + suffix, "activated" + suffix}
        for name in whole | {"input", "residual", "hidden", "q", "heads", "activated", "output"}:
            x = getattr(context, name)
            away = np.abs(x - oracle.quantize_activations(x)) / oracle.activation_step(x)
            # A step and a multiple of it are rounded: twice 127 half units in the last place.
            assert (away.max() < 2.5e-5) == (name in whole), name


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


@every_tier
@scaled_matrices
def test_forward_output_layer_batch_of_scaled_codes_is_exact(scheme, shape, group):
    """One position at a time multiplies the codes as they are, and many the weights packed."""
    matrix, rng = random_matrix(scheme, shape, group), np.random.default_rng(3)
    weight, bias = exact_dense(matrix), rng.integers(-9, 9, shape[0]).astype(np.float32)
    for count in (1, 3, 29):
        # Sums of at most 600 3 * 8 * 9 in eighths: float32 holds them.
        x = rng.integers(-9, 10, (count, shape[1])).astype(np.float32)
        logits = forward_output_layer_batch(matrix, bias, x)
        expected = oracle.linear(x.astype(np.float64), weight, bias)
        assert_close(logits, expected, rtol=0, atol=0, dtype=np.float32)


@every_tier
@pytest.mark.parametrize("group", [1, 5, 16, 48, 100, 1000])
@pytest.mark.parametrize("scales", ["one", "several"])
def test_scales_of_other_groups_are_rejected_or_right(group, scales):
    codes = np.random.default_rng(3).integers(-1, 2, (19, 100), np.int8)
    shape = (1, 1) if scales == "one" else (19, -(-100 // group))
    values = 2.0 ** np.random.default_rng(4).integers(-3, 4, shape).astype(np.float32)
    try:
        matrix = TernaryMatrix(codes, values, group)
    except ValueError:
        return
    wide = values if scales == "one" else np.repeat(values, group, axis=1)[:, :100]
    weight = codes * wide.astype(np.float64)
    x = np.random.default_rng(5).integers(-9, 10, (29, 100)).astype(np.float32)
    for count in (1, 29):
        logits = forward_output_layer_batch(matrix, np.zeros(19, np.float32), x[:count])
        assert_close(logits, x[:count] @ weight.T, rtol=0, atol=0, dtype=np.float32)
    table = forward_embedding_batch(matrix, np.arange(19))
    assert_close(table, weight, rtol=0, atol=0, dtype=np.float32)
    assert_close(matrix.dense(), weight, rtol=0, atol=0, dtype=np.float32)


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


@bad_starts
def test_layers_reject_starts_that_do_not_fit(starts, error, message):
    block, x = model_of(make_config()).blocks[0], rows(2, 5, 12)
    for call in (
        lambda: document_starts(starts, 2, 5),
        lambda: forward_multi_head_attention_batch(block.attention, x, starts=starts),
        lambda: forward_transformer_block_batch(block, x, starts=starts),
        lambda: forward_transformer_block_batch_with_context(block, x, None, None, starts),
        lambda: forward_llm_batch(model_of(make_config()), np.zeros((2, 5), int), starts=starts),
    ):
        with pytest.raises(error, match=f"starts.*{message}"):
            call()


def test_layers_with_norms_reject_a_context_without_room_for_them():
    config = make_config(num_blocks=1, sub_norm=True)
    block, x = model_of(config).blocks[0], rows(2, 5, 12)
    context = create_transformer_block_context(12, 36, 3, 2, 5)
    for call in (
        lambda: forward_multi_head_attention_batch(block.attention, x, None, context),
        lambda: forward_transformer_block_batch_with_context(block, x, context),
    ):
        with pytest.raises(ValueError, match="sub_norm"):
            call()


@every_tier
def test_layers_without_norms_reject_a_context_with_them_or_leave_its_room_alone():
    block, x = model_of(make_config(num_blocks=1)).blocks[0], rows(2, 5, 12)
    context = create_transformer_block_context(12, 36, 3, 2, 5, True)
    for array in (context.heads_normed, context.activated_normed):
        array.fill(np.nan)
    for run, expected in (
        (
            lambda: forward_multi_head_attention_batch(block.attention, x, None, context),
            forward_multi_head_attention_batch(block.attention, x),
        ),
        (
            lambda: forward_transformer_block_batch_with_context(block, x, context),
            forward_transformer_block_batch(block, x),
        ),
    ):
        try:
            out = run()
        except ValueError:
            continue
        assert_same_bits(out, expected)


def test_layers_take_both_parts_of_a_norm_and_of_the_right_size():
    attention, ffn = (getattr(model_of(make_config()).blocks[0], n) for n in ("attention", "ffn"))
    matrices = [getattr(attention, "w" + n) for n in "qkvo"]
    biases = [getattr(attention, "b" + n) for n in "qkvo"]
    for size, make in (
        (12, lambda **norm: MultiHeadAttention(*matrices, *biases, 3, **norm)),
        (36, lambda **norm: FeedForward(ffn.wi, ffn.bi, ffn.wo, ffn.bo, **norm)),
    ):
        right, wrong = rows(size), rows(size - 1)
        assert make(gamma=right, beta=right).norm.gamma is right
        assert make().norm is None
        assert make(gamma=right).norm.beta is None
        for norm in ({"gamma": wrong, "beta": right}, {"gamma": right, "beta": wrong},
                     {"gamma": wrong}, {"beta": right},
                     {"gamma": right, "beta": right.astype(float)}):  # fmt: skip
            with pytest.raises((TypeError, ValueError)):
                make(**norm)


@pytest.mark.parametrize("without", [0, 1])
def test_a_block_with_one_norm_before_a_last_matrix_is_rejected_or_right(without):
    printed = run_child(
        "from legacy1bit.forward import *\n"
        "from legacy1bit.hyperparams import ModelConfig\n"
        "from legacy1bit.math_ops import layer_norm\n"
        "config = ModelConfig(model_dim=64, num_blocks=1, num_heads=2, sub_norm=True)\n"
        "block = create_legacy_llm(config, 1).blocks[0]\n"
        "a, f = block.attention, block.ffn\n"
        "norms = [{'gamma': n.norm.gamma, 'beta': n.norm.beta} for n in (a, f)]\n"
        f"norms[{without}] = {{}}\n"
        "a = MultiHeadAttention(a.wq, a.wk, a.wv, a.wo, a.bq, a.bk, a.bv, a.bo, 2, **norms[0])\n"
        "f = FeedForward(f.wi, f.bi, f.wo, f.bo, **norms[1])\n"
        "x = np.random.default_rng(1).normal(size=(3, 50, 64)).astype(np.float32)\n"
        "def normed(x, norm):\n"
        "    x = x.copy()\n"
        "    for row in x.reshape(-1, 64):\n"
        "        layer_norm(row, norm.gamma, norm.beta)\n"
        "    return x\n"
        "def check():\n"
        "    out = forward_transformer_block_batch(TransformerBlock(a, f, *norms), x)\n"
        "    y = forward_multi_head_attention_batch(a, normed(x, norms[0])) + x\n"
        "    y = forward_feed_forward_batch(f, normed(y, norms[1])) + y\n"
        "    print('right' if np.array_equal(out, y) else 'wrong')\n"
        "norms = [block.norm1, block.norm2]\n" + rejection("check()")
    )
    assert printed.startswith(("ValueError", "right"))


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


def test_layers_reject_room_that_does_not_fit():
    printed = run_child(
        "from legacy1bit.forward import *\n"
        "from legacy1bit.hyperparams import ModelConfig\n"
        "model = create_legacy_llm(ModelConfig(model_dim=256, num_blocks=1, num_heads=2), 1)\n"
        "block, x = model.blocks[0], np.ones((3, 5, 256), np.float32)\n"
        + "".join(
            f"{setup}\n" + rejection(f"{call}; print('no error')")
            for setup, call in SMALL_ROOM.values()
        )
    )
    for case, line in zip(SMALL_ROOM, printed.splitlines(), strict=True):
        assert line.startswith("ValueError"), case


# --- The whole model ------------------------------------------------------------------------------


@without_ties
def model_case(config, batch, time, padding, documents=None, *, draw):
    model = model_of(config)
    tokens = random_tokens(config, batch, time, padding, seed=(6, draw))

    def exact(weights):
        logits, probabilities = oracle.forward(
            weights, oracle_config(config), tokens, starts_of(documents)
        )
        return {"logits": logits, "probabilities": probabilities}

    return tokens, rounding_effect(exact, oracle_weights(model))


def assert_model_near(model, tokens, expected, threads=1, starts=None):
    """Logits and probabilities are numbers of different size: each has a bound of its own."""
    exact, effects = expected
    for name, logits in (("logits", True), ("probabilities", False)):
        actual = forward_llm_batch(model, tokens, threads, logits=logits, starts=starts)
        assert_near({name: actual}, ({name: exact[name]}, effects))


@outer_tiers
@models
def test_forward_llm_batch_is_the_oracles(changes):
    config = make_config(**changes)
    sizes = ((1, 1), (3, 7), (2, 16))
    for (batch, time), padding in itertools.product(sizes, PADDINGS):
        tokens, expected = model_case(config, batch, time, padding)
        assert_model_near(model_of(config), tokens, expected)


@every_tier
@pytest.mark.parametrize("span", [0, 1, 65])
@pytest.mark.parametrize("time", [65, 130])
def test_forward_llm_batch_of_long_sequences_is_the_oracles(time, span):
    config = make_config(model_dim=8, num_heads=2, sequence_length=130, attention_window=span)
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


@outer_tiers
@schemes
@pytest.mark.parametrize(
    ("batch", "time", "padding"),
    [(5, 7, "none"), (5, 7, "left"), (5, 7, "row"), (7, 1, "none"), (20, 1, "row"),
     (3, 16, "left"), (1, 9, "none"), (1, 9, "left")],
)  # fmt: skip
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


# --- Full precision -------------------------------------------------------------------------------


@outer_tiers
@pytest.mark.parametrize("changes", CODED.values(), ids=CODED)
def test_full_precision_is_the_float_twin_of_the_same_latent_weights(changes):
    model = random_model(make_config(**changes))
    twin = float_twin(model)
    tokens = random_tokens(model.config, 3, 7, "middle")
    coded = forward_llm_batch(model, tokens, logits=True)
    model.use_full_precision(True)
    assert model.full_precision is True
    full = forward_llm_batch(model, tokens, logits=True)
    assert_same_bits(full, forward_llm_batch(twin, tokens, logits=True))
    assert np.abs(full - coded).max() > 1e-3
    model.use_full_precision(False)
    assert model.full_precision is False
    assert_same_bits(forward_llm_batch(model, tokens, logits=True), coded)


def blended_twin(model, share):
    """The float model of the weights w + share (q - w), in float32."""
    twin = float_twin(model)
    for name, value in model.parameters.items():
        if isinstance(value, TernaryMatrix):
            weights = model.latent[name]
            twin.latent[name][...] = weights + np.float32(share) * (value.dense() - weights)
    return twin


@outer_tiers
@pytest.mark.parametrize("changes", CODED.values(), ids=CODED)
def test_blend_is_the_float_twin_of_blended_weights(changes):
    model = random_model(make_config(**changes))
    tokens = random_tokens(model.config, 3, 7, "middle")
    coded, seen = forward_llm_batch(model, tokens, logits=True), []
    for share, threads in ((0.25, 1), (0.75, 3), (0.0, 1), (1.0, 1), (0.75, 1)):
        model.use_blend(share, threads)
        assert model.full_precision is (share == 0.0)
        seen.append(forward_llm_batch(model, tokens, logits=True))
        if share < 1.0:
            twin = blended_twin(model, share)
            assert_same_bits(seen[-1], forward_llm_batch(twin, tokens, logits=True))
    assert_same_bits(seen[3], coded)
    assert_same_bits(seen[4], seen[1])
    assert np.abs(seen[0] - seen[1]).max() > 1e-3
    # Codes and full precision are found again from a blend.
    model.use_full_precision(True)
    assert_same_bits(forward_llm_batch(model, tokens, logits=True), seen[2])
    model.use_blend(0.25)
    model.use_full_precision(False)
    assert_same_bits(forward_llm_batch(model, tokens, logits=True), coded)


@every_tier
def test_blend_follows_the_weights_when_it_is_called_again():
    model, tokens = random_model(make_config()), [[1, 2, 3]]
    model.use_blend(0.5)
    before = forward_llm_batch(model, tokens, logits=True)
    model.latent["blocks.0.ffn.wi"][...] *= -1.1
    model.quantize()
    assert_same_bits(forward_llm_batch(model, tokens, logits=True), before)
    model.use_blend(0.5)
    expected = forward_llm_batch(blended_twin(model, 0.5), tokens, logits=True)
    assert_same_bits(forward_llm_batch(model, tokens, logits=True), expected)


def test_blend_needs_a_share_and_latent_weights():
    model = random_model(make_config())
    for share in (-0.1, 1.1, np.nan):
        with pytest.raises(ValueError, match=r"share is .*, expected 0 to 1"):
            model.use_blend(share)
    with pytest.raises(ValueError, match="threads is 0"):
        model.use_blend(0.5, 0)
    with pytest.raises(ValueError, match="no latent weights"):
        create_legacy_llm(make_config(), 1, trainable=False).use_blend(0.5)
    floats = random_model(make_config(scheme="float"))
    before = forward_llm_batch(floats, [[1, 2]])
    floats.use_blend(0.5)
    assert_same_bits(forward_llm_batch(floats, [[1, 2]]), before)


@every_tier
def test_full_precision_follows_the_latent_weights_before_they_are_quantized():
    model = random_model(make_config())
    model.use_full_precision(True)
    before = forward_llm_batch(model, [[1, 2, 3]], logits=True)
    model.latent["blocks.0.ffn.wi"][...] *= 1.1
    after = forward_llm_batch(model, [[1, 2, 3]], logits=True)
    assert np.abs(after - before).max() > 1e-3
    assert_same_bits(after, forward_llm_batch(float_twin(model), [[1, 2, 3]], logits=True))
    model.use_full_precision(True)
    assert_same_bits(forward_llm_batch(model, [[1, 2, 3]], logits=True), after)


def test_full_precision_needs_latent_weights():
    model = create_legacy_llm(make_config(), 1, trainable=False)
    before = forward_llm_batch(model, [[1, 2, 3]])
    with pytest.raises(ValueError, match="no latent weights"):
        model.use_full_precision(True)
    assert model.full_precision is False
    assert_same_bits(forward_llm_batch(model, [[1, 2, 3]]), before)


# --- Room for a pass ------------------------------------------------------------------------------


def test_forward_context_keeps_what_it_is_told_to():
    config = make_config(num_blocks=3, sub_norm=True)
    for keep, blocks in (("all", 3), ("inputs", 1), ("none", 1)):
        context = ForwardContext(config, 2, 5, keep)
        assert len(context.blocks) == blocks
        assert context.blocks[0].heads_normed.shape == (2, 5, 12)
        assert context.logits.shape == (2, 5, 11)
    assert ForwardContext(make_config(), 2, 5).blocks[0].heads_normed is None
    for keep in (True, False, "input", None, 1):
        with pytest.raises(ValueError, match=r"keep is .*, expected all, inputs or none"):
            ForwardContext(config, 2, 5, keep)


@pytest.mark.parametrize("sub_norm", [False, True])
@pytest.mark.parametrize(
    ("keep", "blocks", "inputs"), [("all", 3, 0), ("inputs", 1, 2), ("none", 1, 0)]
)
def test_forward_context_nbytes_counts_every_array(keep, blocks, inputs, sub_norm):
    config = make_config(num_blocks=3, sub_norm=sub_norm)
    dim, ffn, heads, vocab = config.model_dim, config.ffn_dim, config.num_heads, config.vocab_size
    block = 9 * dim + 2 * ffn + 5 * heads + 4
    if sub_norm:
        block += dim + ffn + 4
    expected = 4 * 2 * 5 * (blocks * block + inputs * dim + dim + 2 + vocab)
    assert ForwardContext(config, 2, 5, keep).nbytes == expected
    assert forward_bytes(config, 2, 5, keep) == expected


# --- Several documents in a row -------------------------------------------------------------------


def check_documents(config, documents, padding):
    """Together they are what the oracle says, and what each of them is alone."""
    model, starts = model_of(config), starts_of(documents)
    tokens, (exact, effects) = model_case(config, *starts.shape, padding, documents)
    assert_model_near(model, tokens, (exact, effects), starts=starts)
    for place in places_of(documents):
        alone = forward_llm_batch(model, tokens[place], logits=True)
        assert_near({"logits": alone}, ({"logits": exact["logits"][place]}, effects))


@outer_tiers
@models
def test_forward_llm_batch_answers_documents_in_a_row_as_alone(changes):
    for padding in ("none", "left", "middle"):
        check_documents(make_config(**changes), SHORT_ROWS, padding)


@every_tier
@pytest.mark.parametrize("span", [0, 65])
def test_forward_llm_batch_answers_long_documents_in_a_row_as_alone(span):
    config = make_config(model_dim=8, num_heads=2, sequence_length=130, attention_window=span)
    check_documents(config, LONG_ROWS[:3], "none")


@every_tier
@pytest.mark.parametrize("documents", [(72, 58), (71, 2, 57), (73, 55, 2), (40, 40, 50)], ids=str)
def test_forward_llm_batch_hides_documents_in_a_row_from_each_other(documents):
    config = make_config(sequence_length=130)
    model, starts = model_of(config), starts_of([documents])
    tokens = random_tokens(config, 1, 130)
    before = forward_llm_batch(model, tokens, logits=True, starts=starts)
    for place in places_of([documents]):
        other = tokens.copy()
        other[place] = (other[place] + 1) % 11
        after = forward_llm_batch(model, other, logits=True, starts=starts)
        assert (np.abs(after - before)[place].max(axis=-1) > 1e-5).all()
        after[place] = before[place]
        assert_same_bits(after, before)


@every_tier
def test_forward_llm_batch_with_documents_has_the_same_bits_with_the_same_number_of_threads():
    config = make_config()
    model, starts = model_of(config), starts_of(SHORT_ROWS)
    tokens, expected = model_case(config, 3, 16, "left", SHORT_ROWS)
    for threads in (1, 2, 3, 300):
        first, again = (forward_llm_batch(model, tokens, threads, starts=starts) for _ in "ab")
        assert_same_bits(again, first, f"{threads} threads")
        assert_model_near(model, tokens, expected, threads, starts)


@outer_tiers
@models
def test_forward_llm_batch_with_one_document_to_a_row_has_the_bits_of_none(changes):
    config = make_config(**changes)
    tokens = random_tokens(config, 3, 16, "middle")
    expected = forward_llm_batch(model_of(config), tokens)
    for starts in (np.zeros((3, 16), np.int32), np.zeros((16, 3), np.uint8).T, [[0] * 16] * 3):
        assert_same_bits(forward_llm_batch(model_of(config), tokens, starts=starts), expected)


@every_tier
def test_forward_llm_batch_with_documents_of_one_token_answers_each_alone():
    config = make_config()
    tokens, starts = random_tokens(config, 2, 9), np.tile(np.arange(9), (2, 1))
    together = forward_llm_batch(model_of(config), tokens, starts=starts)
    alone = forward_llm_batch(model_of(config), tokens.ravel()).reshape(together.shape)
    assert_close(together, alone, rtol=1e-5, atol=1e-6)
    # Tokens [B] are rows of one position.
    of_column = forward_llm_batch(model_of(config), tokens[:, 0], starts=[[0], [0]])
    assert_same_bits(of_column, forward_llm_batch(model_of(config), tokens[:, 0]))


# --- Who sees whom --------------------------------------------------------------------------------


@every_tier
@pytest.mark.parametrize("span", [0, 3])
def test_forward_llm_batch_looks_back_and_never_ahead(span):
    """Departures 6 and 7: in C a prompt's last character alone decides what follows."""
    config = make_config(sequence_length=100, attention_window=span)
    model, tokens = model_of(config), random_tokens(make_config(), 1, 100)
    before = forward_llm_batch(model, tokens, logits=True)[0]
    for changed in (0, 1, 47, 48, 99):
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
    config = make_config(attention_window=1, positions="none")
    model = model_of(config)
    tokens, expected = model_case(config, 2, 9, "none")
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
    tokens, (exact, effects) = model_case(config, 1, 8, "none")
    alone = forward_llm_batch(model, tokens, logits=True)[0]
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
    ):
        with pytest.raises(IndexError, match=r"expected 0 to 10|not a token id"):
            call()


@pytest.mark.parametrize("tokens", [None, 1.0, "a", [1.0, 2.0], True, [[[1]]], [None], b"ab"])
def test_forward_llm_rejects_other_kinds_of_tokens(tokens):
    model = model_of(make_config())
    for call in (
        lambda: forward_llm(model, tokens),
        lambda: forward_llm_batch(model, tokens),
    ):
        with pytest.raises(TypeError, match="expected whole numbers"):
            call()


def test_forward_llm_rejects_sequences_of_several_lengths():
    model = model_of(make_config())
    for call in (forward_llm, forward_llm_batch):
        with pytest.raises(ValueError, match=r"^tokens has sequences of several lengths, expected"):
            call(model, [[1], [2, 3]])


@pytest.mark.parametrize(
    "tokens", [[], [[]], (), *(np.zeros(shape, np.int32) for shape in ((0,), (0, 3), (3, 0)))]
)
def test_forward_llm_rejects_empty_batches(tokens):
    model = model_of(make_config())
    for call in (
        lambda: forward_llm(model, tokens),
        lambda: forward_llm_batch(model, tokens),
        lambda: forward_embedding_batch(model.parameters["embedding.weight"], tokens),
    ):
        with pytest.raises(ValueError, match="tokens is empty, expected at least one token"):
            call()


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
