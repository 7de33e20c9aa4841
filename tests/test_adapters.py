"""Low-rank adapters: forward and backward pass, dropout, decoding.

The reference is the oracle with the matrices ``W + scale B A``: of its gradient dW follow
``dA = scale B^T dW`` and ``dB = scale dW A^T``.
"""

import numpy as np
import pytest

from helpers import oracle
from helpers.arrays import UNIT_ROUNDOFF, assert_close, assert_same_bits
from helpers.models import (
    LAYERS,
    SHORT_ROWS,
    assert_near,
    decoder_weights,
    make_config,
    model_of,
    oracle_config,
    oracle_weights,
    outer_tiers,
    random_tokens,
    rounding_effect,
    starts_of,
    without_ties,
)
from helpers.torch_model import torch_loss
from legacy1bit.backward import BackwardPass
from legacy1bit.forward import forward_llm_batch
from legacy1bit.hyperparams import ARCHITECTURES
from legacy1bit.inference import Decoder
from legacy1bit.layout import AdapterConfig, adapter_layout
from legacy1bit.model import create_adapted_llm, create_legacy_llm, create_legacy_llm_gradients
from legacy1bit.optimizer import AdamW
from legacy1bit.packed import PackedModel

# Families that have adapters elsewhere, and what layers have besides.
CASES = {
    **{name: ARCHITECTURES[name] for name in ("nemotron", "llama", "qwen3", "bitnet")},
    **{name: LAYERS[name] for name in ("int8, sub norm", "2bit, groups", "binary, groups")},
    "float": {"scheme": "float"},
    "shared keys": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 6, "gated": True},
}
cases = pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
ADAPTER = AdapterConfig(3, 4.5)
SCALE = ADAPTER.alpha / ADAPTER.rank


def parameters_of(model, form):
    """The weights of a model, as they are or packed."""
    return model.parameters if form == "as they are" else PackedModel(model, form).parameters


def adapted_model(config, form="2bit", adapter=ADAPTER, seed=2):
    """A model with an adapter that changes it as much as its weights do."""
    model = create_adapted_llm(config, parameters_of(model_of(config), form), adapter, seed)
    rng = np.random.default_rng(seed)
    for values in model.latent.values():
        values[...] = rng.normal(0.0, 0.4 / np.sqrt(min(values.shape)), values.shape)
    return model


def effective(weights, scale=SCALE):
    """The weights of which the oracle computes the model with its adapter."""
    result = {name: value for name, value in weights.items() if not name.endswith((".a", ".b"))}
    for name in weights:
        if name.endswith(".a"):
            matrix = name.removesuffix(".a")
            result[matrix] = result[matrix] + scale * weights[f"{matrix}.b"] @ weights[name]
    return result


def adapter_gradients(weights, gradients):
    """The gradients of A and B from those of the matrices."""
    result = {}
    for name in weights:
        if name.endswith(".a"):
            matrix = name.removesuffix(".a")
            result[name] = SCALE * weights[f"{matrix}.b"].T @ gradients[matrix]
            result[f"{matrix}.b"] = SCALE * gradients[matrix] @ weights[name].T
    return result


@without_ties
def training_case(config, form, batch, time, padding, documents, *, draw):
    """Tokens and targets; the exact logits, loss and gradients."""
    tokens = random_tokens(config, batch, time, padding, seed=(6, draw))
    targets = random_tokens(config, batch, time, seed=(10, draw))
    settings, starts = oracle_config(config), starts_of(documents)
    model = adapted_model(config, form)
    base = (oracle_weights if form == "as they are" else decoder_weights)(model_of(config))

    def exact(weights):
        logits, _ = oracle.forward(effective(weights), settings, tokens, starts)
        loss, gradients = oracle.loss_and_gradients(
            effective(weights), settings, tokens, targets, starts
        )
        return {
            "logits": logits,
            "loss": np.array(loss),
            **adapter_gradients(weights, gradients),
        }

    weights = base | {name: value.astype(np.float64) for name, value in model.latent.items()}
    return tokens, targets, rounding_effect(exact, weights)


def check_training(config, form, batch, time, padding="none", documents=None):
    tokens, targets, (exact, effects) = training_case(config, form, batch, time, padding, documents)
    model, starts = adapted_model(config, form), starts_of(documents)
    logits = forward_llm_batch(model, tokens, logits=True, starts=starts)
    # A and B round their product once more.
    assert_near({"logits": logits}, ({"logits": exact["logits"]}, effects), roundings=16)
    for threads, recompute in ((1, False), (2, True)):
        gradients = create_legacy_llm_gradients(config, ADAPTER)
        loss, count = BackwardPass(model, batch, time, threads, recompute).run(
            tokens, targets, gradients, starts=starts
        )
        atol = 16 * (effects["loss"] + UNIT_ROUNDOFF * abs(float(exact["loss"])))
        assert_close(loss / max(count, 1), exact["loss"], rtol=0, atol=atol, what="loss")
        expected = {name: exact[name] for name in gradients.parameters}
        assert_near(gradients.parameters, (expected, effects), roundings=16)


@outer_tiers
@cases
@pytest.mark.parametrize("form", ["as they are", "2bit"])
def test_logits_and_gradients_are_the_oracles(changes, form):
    config = make_config(**changes)
    check_training(config, form, 1, 1)
    check_training(config, form, 3, 7, "middle")
    check_training(config, form, 3, 16, "none", SHORT_ROWS)


def test_trits_and_matrices_of_several_strips_are_the_oracles():
    """More rows than are unpacked at once, and widths that fill no tile."""
    config = make_config(model_dim=36, ffn_dim=150, vocab_size=300, num_blocks=1)
    for form in ("trits", "2bit"):
        check_training(config, form, 2, 9)


@pytest.mark.parametrize("scheme", ["ternary", "binary", "2bit"])
def test_packed_weights_give_the_same_bits(scheme):
    config = make_config(
        scheme=scheme, model_dim=36, ffn_dim=150, ternary_embedding=True, vocab_size=300
    )
    tokens = random_tokens(config, 2, 16)
    plain = forward_llm_batch(adapted_model(config, "as they are"), tokens, logits=True)
    packed = forward_llm_batch(adapted_model(config, "2bit"), tokens, logits=True)
    assert_same_bits(packed, plain)


def test_a_head_in_int8_is_read_for_the_embedding_and_multiplied():
    config = make_config(**ARCHITECTURES["bitnet"] | {"vocab_size": 300})
    packed = PackedModel(model_of(config), head="int8")
    model = create_adapted_llm(config, packed.parameters, ADAPTER, 1)
    head = packed.parameters["embedding.weight"]
    rounded = oracle_weights(model_of(config)) | {"embedding.weight": head.values}
    tokens = random_tokens(config, 2, 5)
    expected, _ = oracle.forward(rounded, oracle_config(config) | {"int8_activations": False},
                                 tokens)  # fmt: skip
    plain = create_adapted_llm(
        config.with_settings(int8_activations=False), packed.parameters, ADAPTER, 1
    )
    actual = forward_llm_batch(plain, tokens, logits=True)
    assert_close(actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert forward_llm_batch(model, tokens).shape == (2, 5, 300)


@cases
def test_gradients_agree_with_torch(changes):
    torch = pytest.importorskip("torch")
    config = make_config(**changes)
    tokens, targets, (_, effects) = training_case(config, "as they are", 2, 5, "middle", None)
    model = adapted_model(config, "as they are")
    leaves = {
        name: torch.tensor(value.astype(np.float64), requires_grad=True)
        for name, value in model.latent.items()
    }
    base = {name: torch.tensor(value) for name, value in oracle_weights(model_of(config)).items()}
    _, loss = torch_loss(
        torch, effective(base | leaves), oracle_config(config), torch.tensor(tokens).long(),
        torch.tensor(targets).long(),
    )  # fmt: skip
    loss.backward()
    gradients = create_legacy_llm_gradients(config, ADAPTER)
    BackwardPass(model, 2, 5).run(tokens, targets, gradients)
    largest = max(leaf.grad.abs().max().item() for leaf in leaves.values())
    for name, leaf in leaves.items():
        atol = 16 * (effects[name] + UNIT_ROUNDOFF * largest)
        found = gradients.parameters[name]
        assert_close(found, leaf.grad.numpy(), rtol=0, atol=atol, what=name)
        assert np.abs(found - leaf.grad.numpy()).max() <= 1e-4 * largest


# --- What an adapter is ---------------------------------------------------------------------------


def test_it_adds_nothing_at_first_and_only_it_learns():
    config = make_config()
    model = create_adapted_llm(config, model_of(config).parameters, ADAPTER, 1)
    tokens = random_tokens(config, 2, 8)
    before = forward_llm_batch(model, tokens, logits=True)
    assert_same_bits(before, forward_llm_batch(model_of(config), tokens, logits=True))
    optimizer = AdamW(model)
    assert optimizer.first.size == model.num_trainable == adapter_layout(config, ADAPTER)[-1].stop
    for _ in range(20):
        gradients = create_legacy_llm_gradients(config, ADAPTER)
        BackwardPass(model, 2, 8).run(tokens, np.roll(tokens, -1, axis=1), gradients)
        optimizer.step(gradients, 0.01)
    after = forward_llm_batch(model, tokens)
    targets = np.roll(tokens, -1, axis=1)[..., None]
    assert (
        np.take_along_axis(after, targets, 2).mean()
        > 1.5 * np.take_along_axis(forward_llm_batch(model_of(config), tokens), targets, 2).mean()
    )


@pytest.mark.parametrize(
    ("layers", "matrices"),
    [
        ("all", {"attention.wq", "attention.wk", "attention.wv", "attention.wo", "ffn.wg",
                 "ffn.wi", "ffn.wo"}),
        ("attention", {"attention.wq", "attention.wk", "attention.wv", "attention.wo"}),
        ("ffn", {"ffn.wg", "ffn.wi", "ffn.wo"}),
    ],
)  # fmt: skip
def test_layers_are_chosen(layers, matrices):
    config = make_config(**ARCHITECTURES["llama"])
    adapter = AdapterConfig(2, 2.0, layers)
    model = adapted_model(config, adapter=adapter)
    names = {name.split(".", 2)[2][:-2] for name in model.latent}
    assert names == matrices
    tokens, gradients = random_tokens(config, 1, 8), create_legacy_llm_gradients(config, adapter)
    BackwardPass(model, 1, 8).run(tokens, tokens, gradients)
    assert all(gradient.any() for gradient in gradients.parameters.values())


def test_gradients_of_something_else_are_refused():
    config = make_config()
    model, tokens = adapted_model(config), random_tokens(config, 1, 4)
    for other in (None, ADAPTER._replace(rank=2), ADAPTER._replace(alpha=1.0)):
        with pytest.raises(ValueError, match="those of a model with other settings"):
            BackwardPass(model, 1, 4).run(
                tokens, tokens, create_legacy_llm_gradients(config, other)
            )
        with pytest.raises(ValueError, match="those of a model with other settings"):
            AdamW(model).step(create_legacy_llm_gradients(config, other), 0.1)


# --- Dropout --------------------------------------------------------------------------------------


def with_dropout(model, tokens, targets, seed, rate=0.25, threads=1, recompute=False):
    gradients = create_legacy_llm_gradients(model.config, ADAPTER)
    backward_pass = BackwardPass(model, *tokens.shape, threads, recompute)
    loss, count = backward_pass.run(tokens, targets, gradients, dropout=rate, seed=seed)
    return loss / count, gradients


def test_dropout_depends_on_the_seed_alone():
    config = make_config(**ARCHITECTURES["llama"])
    model, tokens = adapted_model(config), random_tokens(config, 4, 9)
    targets = np.roll(tokens, -1, axis=1)
    first = with_dropout(model, tokens, targets, 1)
    assert first[0] != with_dropout(model, tokens, targets, 2)[0]
    assert first[0] != with_dropout(model, tokens, targets, 1, rate=0.0)[0]
    for threads, recompute in ((1, True), (2, False), (4, True)):
        again = with_dropout(model, tokens, targets, 1, threads=threads, recompute=recompute)
        assert again[0] == pytest.approx(first[0], rel=1e-6)
        assert_close(again[1].flat, first[1].flat, rtol=0, atol=5e-6 * np.abs(first[1].flat).max())


def test_dropout_is_that_of_the_whole_batch_in_its_parts():
    config = make_config()
    model = adapted_model(config)
    tokens, targets = random_tokens(config, 5, 7), random_tokens(config, 5, 7, seed=4)
    whole, gradients = with_dropout(model, tokens, targets, 1)
    parts = create_legacy_llm_gradients(config, model.adapter)
    loss = 0.0
    for first, stop in ((0, 2), (2, 5)):
        own = slice(first, stop)
        backward_pass = BackwardPass(model, stop - first, 7)
        loss += backward_pass.run(
            *(tokens[own], targets[own], parts, int((targets != config.pad_token).sum())),
            dropout=0.25,
            seed=1,
            first_row=first,
        )[0]
    assert_close(loss, whole * tokens.size, rtol=1e-6, atol=0)
    assert_close(parts.flat, gradients.flat, rtol=0, atol=1e-5 * np.abs(gradients.flat).max())


def test_gradients_under_dropout_are_those_of_finite_differences():
    config = make_config(**ARCHITECTURES["qwen3"], num_blocks=1)
    model, tokens = adapted_model(config), random_tokens(config, 2, 9)
    targets = np.roll(tokens, -1, axis=1)
    _, gradients = with_dropout(model, tokens, targets, 3)
    rng = np.random.default_rng(0)
    for name, values in model.latent.items():
        kept, step = values.copy(), 3e-3
        direction = rng.normal(size=values.shape).astype(np.float32)
        losses = []
        for sign in (1.0, -1.0):
            values[...] = kept + np.float32(sign * step) * direction
            losses.append(with_dropout(model, tokens, targets, 3)[0])
        values[...] = kept
        expected = float((gradients.parameters[name] * direction).sum())
        size = float(np.abs(gradients.parameters[name]).max())
        found = (losses[0] - losses[1]) / (2.0 * step)
        assert abs(found - expected) < 0.02 * abs(expected) + 0.05 * size, name


def test_dropout_leaves_out_its_share_and_keeps_the_mean():
    """With A = 1 and B = 1 an output of wo tells how much of its input is left."""
    config = make_config(num_blocks=1, positions="none", vocab_size=11, model_dim=256, num_heads=1)
    zero = create_legacy_llm(config, 1)
    adapter = AdapterConfig(1, 1.0, "ffn")
    kept = []
    for rate in (0.1, 0.5):
        model = create_adapted_llm(config, zero.parameters, adapter, 1)
        for name, values in model.latent.items():
            values[...] = 1.0 if name == "blocks.0.ffn.wi.a" else 0.0
        tokens = random_tokens(config, 8, 16)
        gradients = create_legacy_llm_gradients(config, adapter)
        model.latent["blocks.0.ffn.wi.b"][...] = 1e-4
        BackwardPass(model, 8, 16).run(tokens, tokens, gradients, dropout=rate, seed=1)
        # dA is a sum over positions of what is kept of x: of a single position it shows the mask.
        single = create_legacy_llm_gradients(config, adapter)
        BackwardPass(model, 1, 1).run(tokens[:1, :1], tokens[:1, 1:2], single, dropout=rate, seed=2)
        kept.append(np.mean(single.parameters["blocks.0.ffn.wi.a"] != 0.0))
    assert kept == pytest.approx([0.9, 0.5], abs=0.1)


def test_a_rate_of_one_is_refused():
    config = make_config()
    model, tokens = adapted_model(config), random_tokens(config, 1, 4)
    for rate in (1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match="dropout is"):
            with_dropout(model, tokens, tokens, 1, rate=rate)


# --- Decoding -------------------------------------------------------------------------------------


def pairs_of(model):
    return {
        name[:-2]: (model.latent[name].copy(), np.float32(SCALE) * model.latent[f"{name[:-2]}.b"])
        for name in model.latent
        if name.endswith(".a")
    }


@without_ties
def decoding_case(config, time, *, draw):
    tokens = random_tokens(config, 1, time, seed=(3, draw))[0]
    settings = oracle_config(config) | {"int8_activations": False, "int8_cache": True}
    weights = decoder_weights(model_of(config))
    weights |= {n: v.astype(np.float64) for n, v in adapted_model(config).latent.items()}

    def exact(weights):
        return {"logits": oracle.forward(effective(weights), settings, tokens[None])[0][0]}

    return tokens, rounding_effect(exact, weights)


@outer_tiers
@cases
def test_float_decoding_is_the_oracles(changes):
    config = make_config(**changes)
    tokens, expected = decoding_case(config, 9)
    for threads in (1, 2, 3):
        packed = PackedModel(adapted_model(config))
        decoder = Decoder(packed, threads, activations="float32")
        assert_near({"logits": decoder.prefill_logits(tokens)}, expected, roundings=16)
        # The same token by token.
        decoder.clear()
        single = np.stack([decoder.prefill(tokens[i : i + 1]) for i in range(len(tokens))])
        assert_near({"logits": single}, expected, roundings=16)


@cases
def test_int8_decoding_is_near_it_and_an_empty_adapter_changes_no_bit(changes):
    config = make_config(**changes)
    tokens = random_tokens(config, 1, 12)[0]
    packed = PackedModel(model_of(config))
    plain = Decoder(packed).prefill_logits(tokens)
    pairs = pairs_of(adapted_model(config))
    nothing = {name: (a, np.zeros_like(b)) for name, (a, b) in pairs.items()}
    assert_same_bits(Decoder(packed.with_adapter(nothing)).prefill_logits(tokens), plain)
    adapted = packed.with_adapter(pairs)
    logits = Decoder(adapted).prefill_logits(tokens)
    exact = Decoder(adapted, activations="float32").prefill_logits(tokens)
    error = np.sqrt(np.mean((logits - exact) ** 2) / np.mean(exact**2))
    assert error < 0.1
    assert np.abs(logits - plain).max() > 3 * np.abs(logits - exact).max()


@outer_tiers
@cases
def test_threads_decode_the_same_bits(changes):
    config = make_config(**changes | {"vocab_size": 70, "ffn_dim": 200, "model_dim": 48})
    adapted = PackedModel(adapted_model(config), head="int8")
    tokens = random_tokens(config, 1, 12)[0]
    logits = [Decoder(adapted, threads).prefill_logits(tokens) for threads in (1, 2, 3, 7)]
    for other in logits[1:]:
        assert_same_bits(other, logits[0])


def test_a_model_that_trains_is_packed_with_its_adapter():
    config = make_config()
    for form in ("as they are", "2bit"):
        model, tokens = adapted_model(config, form), random_tokens(config, 1, 8)[0]
        found = Decoder(PackedModel(model)).prefill_logits(tokens)
        expected = PackedModel(model_of(config)).with_adapter(pairs_of(model))
        assert_same_bits(found, Decoder(expected).prefill_logits(tokens))
        # What is packed stays, whatever is learned later.
        packed = PackedModel(model)
        for values in model.latent.values():
            values[...] = 0.0
        assert_same_bits(Decoder(packed).prefill_logits(tokens), found)


def test_a_model_of_codes_takes_an_adapter():
    config = make_config()
    model = adapted_model(config, "as they are")
    other, tokens = model_of(config).with_adapter(pairs_of(model)), random_tokens(config, 2, 8)
    assert not other.trainable
    found = forward_llm_batch(other, tokens, logits=True)
    expected = forward_llm_batch(model, tokens, logits=True)
    assert_close(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("blocks.0.attention.wx", (2, 12, 12), "which is no matrix of the blocks"),
        ("blocks.9.attention.wq", (2, 12, 12), "which is no matrix of the blocks"),
        ("embedding.weight", (2, 12, 11), "which is no matrix of the blocks"),
        ("blocks.0.norm1.gamma", (2, 12, 12), "which is no matrix of the blocks"),
        ("blocks.0.attention.wq", (2, 11, 12), r"expected \(r, 12\) and \(12, r\)"),
        ("blocks.0.attention.wq", (2, 12, 11), r"expected \(r, 12\) and \(12, r\)"),
        ("blocks.0.attention.wq", (0, 12, 12), r"expected \(r, 12\) and \(12, r\)"),
    ],
)
def test_an_adapter_of_another_model_is_refused(name, shape, message):
    rank, cols, rows = shape
    pair = np.zeros((rank, cols), np.float32), np.zeros((rows, rank), np.float32)
    for model in (model_of(make_config()), PackedModel(model_of(make_config()))):
        with pytest.raises(ValueError, match=message):
            model.with_adapter({name: pair})
