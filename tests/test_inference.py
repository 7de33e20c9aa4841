"""Decoding against the oracle, sampling against its distribution, and texts against both.

A decoder rounds to int8 before every product with codes, and what lies half way between two steps
may go either way. As in the tests of the forward pass, `without_ties` finds data that has no such
number anywhere in the oracle's answer, keys and values included: there float32 may only be off by
its own roundings, whatever the instruction set, and the bounds are `rounding_effect`'s.
"""

import contextlib
import signal
import threading
import tracemalloc
import warnings
from types import SimpleNamespace

import numpy as np
import pytest

from helpers import oracle
from helpers.arrays import assert_same_bits
from helpers.models import (
    CODED,
    MODELS,
    assert_near,
    decoder_weights,
    every_tier,
    in_every_tier,
    make_config,
    model_of,
    oracle_config,
    oracle_weights,
    outer_tiers,
    random_model,
    rounding_effect,
    wild_model,
    without_ties,
)
from helpers.sampling import always, sample_token
from legacy1bit import inference
from legacy1bit.forward import forward_llm_batch
from legacy1bit.generator import Generator
from legacy1bit.hyperparams import ModelConfig, SamplingConfig
from legacy1bit.inference import Decoder
from legacy1bit.model import TernaryMatrix, create_legacy_llm
from legacy1bit.packed import FORMS, HEADS, Int8Matrix, PackedModel

CONTEXT = 16
LOGITS = np.array([0.5, -1.0, 2.0, 0.0, 1.5, -3.0, 1.0, 0.25], np.float32)


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.fixture(scope="module")
def model():
    return wild_model()


def probabilities(logits, temperature=1.0, top_k=0, top_p=1.0):
    """The distribution of a draw, in float64."""
    order = np.argsort(-logits, kind="stable")
    p = np.exp((logits.astype(np.float64) - logits.max()) / temperature)[order]
    p[top_k or p.size :] = 0.0
    p /= p.sum()
    # The shortest run of likeliest tokens that reaches top_p.
    p[np.concatenate([[0.0], np.cumsum(p)[:-1]]) >= top_p] = 0.0
    result = np.zeros(p.size)
    result[order] = p / p.sum()
    return result


# --- One token ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({}, 8),
        ({"temperature": 0.5}, 8),
        ({"temperature": 3.0}, 8),
        ({"top_k": 3}, 3),
        ({"top_k": 8}, 8),
        ({"top_k": 1 << 31}, 8),
        ({"top_p": 0.5}, 2),
        ({"top_p": 0.9}, 5),
        ({"top_p": 0.6, "temperature": 2.0}, 3),
        ({"top_p": 0.7, "top_k": 3}, 2),
        ({"top_p": 0.85, "top_k": 4, "temperature": 2.0}, 4),
        ({"top_p": 0.5, "top_k": 7, "temperature": 5.0}, 3),
        ({"top_p": 1.0, "top_k": 5, "temperature": 0.3}, 5),
    ],
)
def test_sample_token_draws_from_the_distribution(settings, kept):
    expected = probabilities(LOGITS, **settings)
    assert np.count_nonzero(expected) == kept
    random, draws = rng(11), 6000
    counts = np.bincount(
        [sample_token(LOGITS, random, **settings) for _ in range(draws)], minlength=LOGITS.size
    )
    assert (counts[expected == 0] == 0).all()
    goal = draws * expected[expected > 0]
    squares = ((counts[expected > 0] - goal) ** 2 / goal).sum()
    # Chi-square: mean k, variance 2k, and 1 over each expected count more for a finite sample.
    k = kept - 1
    assert squares <= k + 5 * np.sqrt(2 * k + (1 / goal).sum())


@pytest.mark.parametrize("temperature", [0.0, -0.0, 0])
@pytest.mark.parametrize("others", [{}, {"top_k": 3}, {"top_p": 0.01}])
def test_sample_token_at_temperature_0_is_the_likeliest(temperature, others):
    for logits in (LOGITS, -LOGITS, np.roll(LOGITS, 3), LOGITS * 1e30):
        assert sample_token(logits, None, temperature, **others) == np.argmax(logits)


def test_sample_token_at_temperature_0_takes_the_first_of_several():
    logits = np.array([0, 3, -1, 3, 3], np.float32)
    assert sample_token(logits, None, 0.0) == 1
    assert sample_token(np.zeros(5, np.float32), None, 0.0) == 0


def test_sample_token_heeds_no_number_behind_the_logits():
    """NumPy gives a block of memory out again as it was: here with NaN and small numbers in it."""
    for place in range(80):
        logits = np.full(80, -1.0, np.float32)
        logits[place] = 1.0
        before = np.full(160, np.nan, np.float32)
        before[96:] = -1e30
        del before
        assert sample_token(logits, None, 0.0) == place


@pytest.mark.parametrize("settings", [{"top_k": 1}, {"top_p": 1e-9}])
@pytest.mark.parametrize("temperature", [1e-3, 1.0, 100.0, 1e9, 1e30])
def test_sample_token_without_a_choice_is_the_likeliest(settings, temperature):
    for seed in range(5):
        assert sample_token(LOGITS, rng(seed), temperature, **settings) == 2


def test_sample_token_top_k_keeps_the_first_of_equals():
    logits = np.array([1, 2, 2, 2, 1], np.float32)
    draws = {sample_token(logits, rng(seed), 1.0, 2) for seed in range(40)}
    assert draws == {1, 2}


@pytest.mark.parametrize("temperature", [1e-4, 1e-30, 1e-300, 1e-320, 5e-324])
def test_sample_token_near_temperature_0_is_the_likeliest(temperature):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in range(5):
            assert sample_token(LOGITS, rng(seed), temperature) == 2


@pytest.mark.parametrize("temperature", [1e6, 1e30])
def test_sample_token_at_a_high_temperature_is_nearly_uniform(temperature):
    counts = np.bincount([sample_token(LOGITS, rng(seed), temperature) for seed in range(800)])
    assert abs(counts - 100).max() < 5 * 10


@pytest.mark.parametrize("settings", [{}, {"top_k": 2}, {"top_p": 0.5}, {"temperature": 0.0}])
@pytest.mark.parametrize("place", [0, 3, 7])
def test_sample_token_refuses_nan(settings, place):
    logits = LOGITS.copy()
    logits[place] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        sample_token(logits, rng(), **settings)


@pytest.mark.parametrize(
    "settings",
    [{}, {"top_k": 5}, {"top_p": 0.999}, {"temperature": 50.0}, {"temperature": 1e30},
     {"top_k": 5, "top_p": 0.999}, {"top_k": 8}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("number", [0.0, 0.5, np.nextafter(1.0, 0.0)])
def test_sample_token_never_draws_minus_infinity(settings, number):
    logits = np.where(np.arange(8) % 3 == 1, LOGITS, -np.inf).astype(np.float32)
    assert sample_token(logits, always(number), **settings) in (1, 4, 7)
    logits[[1, 4]] = -np.inf
    assert sample_token(logits, always(number), **settings) == 7


@pytest.mark.parametrize("settings", [{}, {"top_k": 3}, {"top_p": 0.99}], ids=str)
@pytest.mark.parametrize("temperature", [1e6, 1e30])
def test_sample_token_at_a_high_temperature_draws_all_but_minus_infinity(temperature, settings):
    logits = np.array([0, -np.inf, 1, 0], np.float32)
    numbers = np.arange(0.01, 1.0, 0.02)
    drawn = {sample_token(logits, always(u), temperature, **settings) for u in numbers}
    assert drawn == {0, 2, 3}


@pytest.mark.parametrize("number", [0.0, np.nextafter(1.0, 0.0)])
def test_sample_token_draws_no_token_of_probability_0(number):
    logits = np.array([-200, 0, -200, 0, -200, -90000], np.float32)
    assert sample_token(logits, always(number), 0.2) == (1 if number == 0 else 3)


def places(settings):
    """The tokens in the order in which a draw goes through them, and where each begins."""
    p = probabilities(LOGITS, **settings)
    order = np.argsort(-LOGITS, kind="stable") if len(settings) else np.arange(LOGITS.size)
    order = order[p[order] > 0]
    return order, np.concatenate([[0.0], np.cumsum(p[order])])


@pytest.mark.parametrize(
    "settings", [{}, {"top_k": 3}, {"top_p": 0.9}, {"top_k": 5, "top_p": 0.8}], ids=str
)
def test_sample_token_takes_the_token_where_the_number_falls(settings):
    """By index where all may be drawn, and else from the likeliest on."""
    order, starts = places(settings)
    assert starts[-1] == pytest.approx(1.0)
    for token, start, end in zip(order, starts[:-1], starts[1:], strict=True):
        # Probabilities are float32: a number this near to an end may belong to a neighbour.
        for number in (start + 1e-6, (start + end) / 2, end - 1e-6):
            assert sample_token(LOGITS, always(number), **settings) == token
    assert sample_token(LOGITS, always(0.0), **settings) == order[0]
    assert sample_token(LOGITS, always(np.nextafter(1.0, 0.0)), **settings) == order[-1]


def test_sample_token_asks_for_one_number():
    asked = []
    random = SimpleNamespace(random=lambda: asked.append(1) or 0.5)
    for settings in ({}, {"top_k": 3}, {"top_p": 0.5}, {"top_k": 3, "top_p": 0.5}):
        sample_token(LOGITS, random, **settings)
        assert asked == [1]
        asked.clear()


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"top_p": 0.4}, {1, 2}),
        ({"top_p": 0.55}, {1, 2, 4}),
        ({"top_k": 2}, {1, 2}),
        ({"top_k": 3}, {1, 2, 4}),
        ({"top_k": 4, "top_p": 0.6}, {1, 2, 4}),
    ],
    ids=str,
)
def test_sample_token_keeps_the_first_of_equals(settings, kept):
    logits = np.array([0, 5, 5, 0, 5, 5, 0], np.float32)
    drawn = {sample_token(logits, always(number), **settings) for number in np.arange(0, 1, 0.01)}
    assert drawn == kept


def test_sample_token_draws_from_many_tokens():
    """As many as a vocabulary has, in no order, and no more than are asked for."""
    logits = rng(8).normal(size=5000).astype(np.float32)
    order = np.argsort(-logits, kind="stable")
    for kept in (1, 2, 3, 100, 4999):
        last = sample_token(logits, always(np.nextafter(1.0, 0.0)), top_k=kept)
        assert last == order[kept - 1]
        assert sample_token(logits, always(0.0), top_k=kept) == order[0]
    p = probabilities(logits, top_p=0.3)
    last = sample_token(logits, always(np.nextafter(1.0, 0.0)), top_p=0.3)
    assert p[last] == p[p > 0].min()


@every_tier
@pytest.mark.parametrize(
    "settings",
    [{}, {"top_k": 1}, {"top_k": 7}, {"top_k": 40}, {"top_p": 0.5}, {"top_p": 0.97},
     {"min_p": 0.3}, {"min_p": 1.0}, {"top_k": 40, "top_p": 0.6}, {"top_k": 50, "min_p": 0.2},
     {"top_p": 0.9, "min_p": 0.05}],
    ids=str,
)  # fmt: skip
def test_sample_token_of_any_vocabulary_draws_what_the_filters_leave(settings):
    for size in (1, 63, 64, 65, 1000, 1024, 1025, 9001):
        logits = rng(size).normal(0.0, 2.0, size).astype(np.float32)
        min_p = settings.get("min_p", 0.0)
        p = probabilities(logits, 1.0, *(settings.get(name, d) for name, d in
                                         (("top_k", 0), ("top_p", 1.0))))  # fmt: skip
        p[p < min_p * p.max() * (1 - 1e-6)] = 0.0
        p /= p.sum()
        drawn = [sample_token(logits, always(u), **settings) for u in np.arange(0.01, 1, 0.02)]
        assert (p[drawn] > 0).all(), size
        # 50 numbers, evenly: a token has as many as its probability says, give or take two.
        counts = np.bincount(drawn, minlength=size)
        assert np.abs(counts - 50 * p).max() < 2.01, size


def penalised(logits, history, penalty, window):
    logits, seen = logits.copy(), set(history[-window:] if window else history)
    for token in seen:
        logits[token] *= penalty if logits[token] <= 0 else 1 / penalty
    return logits


@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.3, 100.0])
@pytest.mark.parametrize("window", [0, 1, 3, 64])
def test_sample_token_minds_repetition(penalty, window):
    history = [2, 2, 4, 1, 2, 0, 5]
    more = {"repetition_penalty": penalty, "repetition_window": window}
    changed = penalised(LOGITS, history, penalty, window)
    numbers = np.arange(0.005, 1, 0.01)
    found = [sample_token(LOGITS, always(u), history=history, **more) for u in numbers]
    assert found == [sample_token(changed, always(u)) for u in numbers]
    greedy = sample_token(LOGITS, None, 0.0, history=history, **more)
    assert greedy == np.argmax(changed)
    assert sample_token(LOGITS, None, 0.0, **more) == 2


def test_sample_token_refuses_a_history_of_no_tokens():
    for history in ([8], [-1], [0, 1 << 20]):
        with pytest.raises(IndexError, match=r"history\[\d\] is .*, expected 0 to 7"):
            sample_token(LOGITS, rng(), history=history)


def test_sample_token_refuses_what_are_no_logits():
    with pytest.raises(ValueError, match="logits is empty"):
        sample_token(np.zeros(0, np.float32), rng())
    for bad in ([-np.inf] * 3, [0.0, np.inf, 0.0], [np.nan] * 3, [-np.inf, np.nan, -np.inf]):
        for temperature in (0.0, 1.0):
            with pytest.raises(ValueError, match="not finite"):
                sample_token(np.array(bad, np.float32), rng(), temperature)
    with pytest.raises(ValueError, match="dtype"):
        sample_token(LOGITS.astype(np.float64), rng())
    with pytest.raises(ValueError, match="dimensions"):
        sample_token(LOGITS[None], rng())


def test_sample_token_repeats_by_seed_and_keeps_the_logits():
    logits = LOGITS.copy()
    draws = [[sample_token(logits, random) for _ in range(50)] for random in (rng(5), rng(5))]
    assert draws[0] == draws[1]
    assert len(set(draws[0])) > 3
    assert_same_bits(logits, LOGITS)


BAD_SETTINGS = [
    *({"temperature": number} for number in (-1.0, -1e-9, np.nan, np.inf, -np.inf)),
    {"temperature": 1e31},
    *({"top_k": number} for number in (-1, -(1 << 70), 1 << 70)),
    *({"top_p": number} for number in (0.0, -0.5, 1.0000001, 2.0, np.nan, np.inf)),
    *({"min_p": number} for number in (-0.1, 1.1, np.nan)),
    *({"repetition_penalty": number} for number in (0.0, -1.0, np.nan, np.inf)),
    {"repetition_window": -1},
]


@pytest.mark.parametrize("settings", BAD_SETTINGS, ids=str)
def test_sampling_refuses_settings_out_of_range(settings):
    (name,) = settings
    with pytest.raises(ValueError, match=f"{name} is .*, expected"):
        SamplingConfig(**settings)


def test_sampling_refuses_what_are_no_settings(model):
    for call in (
        lambda: inference.sample_token(LOGITS, rng(), 0.5),
        lambda: Decoder(PackedModel(model)).generate([1], [0.5], 0.5),
        lambda: next(Generator(model).tokens([1], 5, 0.5)),
    ):
        with pytest.raises(TypeError, match=r"sampling is 0\.5, expected a SamplingConfig"):
            call()


# --- A text ---------------------------------------------------------------------------------------


def generate(model, prompt, count, seed=0, threads=1, **settings):
    return Generator(model, threads=threads).tokens(prompt, count, SamplingConfig(**settings), seed)


def continuation(model, prompt, count, **settings):
    return list(generate(model, prompt, count, **settings))


def assert_greedy(model, prompt, written, context=CONTEXT):
    """Each token is the likeliest after what a generator promises to see, by the oracle.

    A tie that goes another way than the oracle's moves logits by some hundredths, so that one as
    near to the largest may be drawn as well.
    """
    weights, config = decoder_weights(model), oracle_config(model.config)
    text, seen = list(prompt), list(prompt)[-context:]
    for token in written:
        if len(seen) > context:
            seen = text[-max(context // 2, 1) :]
        logits = oracle.decode(weights, config, seen)[-1]
        assert logits[token] > logits.max() - 0.03 * np.ptp(logits)
        text.append(token)
        seen.append(token)


@pytest.mark.parametrize("prompt", [[10], [84, 104, 101], [0, 255, 128, 7], list(range(65, 75))])
def test_generate_greedily_is_the_argmax_of_the_oracle(model, prompt):
    written = continuation(model, prompt, CONTEXT - len(prompt) + 1, temperature=0.0)
    assert_greedy(model, prompt, written)


@pytest.mark.parametrize("scheme", ["ternary", "float"])
@pytest.mark.parametrize("length", [1, 2, 3, 16])
def test_generate_goes_on_past_the_context_from_its_newer_half(scheme, length):
    model = wild_model(scheme=scheme, sequence_length=length)
    for prompt in ([65], [1, 2, 3], list(range(40))):
        written = continuation(model, prompt, 5 * length + 3, temperature=0.0)
        assert len(written) == 5 * length + 3
        assert_greedy(model, prompt, written, length)


def test_generate_does_what_a_decoder_does_token_by_token(model):
    """Until the context is full, and from its newer half again."""
    decoder, text, random = Decoder(PackedModel(model)), [72, 105], rng(7)
    settings = {"temperature": 0.8, "top_k": 30, "top_p": 0.95, "min_p": 0.01,
                "repetition_penalty": 1.2, "repetition_window": 3}  # fmt: skip
    logits = decoder.prefill(text)
    for token in continuation(model, text, 50, seed=7, **settings):
        assert token == sample_token(logits, random, history=text, **settings)
        text.append(token)
        if decoder.length == CONTEXT:
            decoder.clear()
            logits = decoder.prefill(text[-CONTEXT // 2 :])
        else:
            logits = decoder.prefill([token])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_generate_takes_packed_models_and_threads(form, threads):
    model = wild_model(ternary_embedding=True)
    expected = continuation(model, [72, 105], 40, seed=3)
    packed = PackedModel(model, form)
    assert continuation(packed, [72, 105], 40, seed=3, threads=threads) == expected


def test_generate_of_a_prompt_of_several_blocks():
    model = wild_model(sequence_length=400)
    prompt = rng(1).integers(0, 256, 390).tolist()
    assert_greedy(model, prompt, continuation(model, prompt, 10, temperature=0.0), 400)


def test_generate_uses_the_whole_prompt(model):
    """Of two prompts that differ in their first token alone, the continuations differ."""
    tail = list(b"o cat sat on")
    texts = {tuple(continuation(model, [first, *tail], 3, temperature=0.0)) for first in range(30)}
    assert len(texts) > 5


def test_generate_of_a_prompt_beyond_the_context_takes_its_newest_part(model):
    prompt = rng(1).integers(0, 256, 50).tolist()
    for settings in ({"temperature": 0.0}, {"seed": 4}):
        whole = continuation(model, prompt, 20, **settings)
        assert whole == continuation(model, prompt[-CONTEXT:], 20, **settings)
        assert whole != continuation(model, prompt[1 - CONTEXT :], 20, **settings)


def test_generate_repeats_by_seed(model):
    texts = [continuation(model, [72], 60, seed=seed) for seed in (1, 1, 2, 3)]
    assert texts[0] == texts[1]
    assert len(set(map(tuple, texts))) == 3
    assert all(len(text) == 60 and 0 <= min(text) <= max(text) < 256 for text in texts)
    assert all(type(token) is int for token in texts[0])


def test_generate_takes_any_integers_and_changes_nothing(model):
    before = model.parameters["embedding.weight"].copy()
    expected = continuation(model, [72, 105], 20, seed=5)
    for kind in (np.int32, np.int64, np.uint8):
        prompt = np.array([72, 105], kind)
        prompt.flags.writeable = False
        assert continuation(model, prompt, 20, seed=5) == expected
    prompt = [72, 105]
    continuation(model, prompt, 20)
    assert prompt == [72, 105]
    assert_same_bits(model.parameters["embedding.weight"], before)


def test_generate_writes_one_token_at_a_time(model):
    """Two interleaved texts do not disturb each other."""
    pair = [generate(model, [72], 30, seed=seed) for seed in (1, 2)]
    texts = list(zip(*pair, strict=True))
    for column, seed in enumerate((1, 2)):
        expected = continuation(model, [72], 30, seed=seed)
        assert [tokens[column] for tokens in texts] == expected


def test_generate_of_nothing_is_empty(model):
    assert continuation(model, [72], 0) == []


def test_generate_refuses_what_it_cannot_continue(model):
    with pytest.raises(ValueError, match="prompt is empty"):
        continuation(model, [], 3)
    with pytest.raises(ValueError, match="max_tokens is -1"):
        continuation(model, [72], -1)
    for prompt in ([256], [257], [-1], [72, 1 << 20]):
        with pytest.raises(IndexError, match="expected 0 to 255"):
            continuation(model, prompt, 3)
    for prompt in ([0.5], ["a"], [[72]], [None]):
        with pytest.raises((TypeError, ValueError)):
            continuation(model, prompt, 3)
    for threads in (0, -1, 257):
        with pytest.raises(ValueError, match=f"threads is {threads}, expected 1 to 256"):
            continuation(model, [72], 3, threads=threads)
    with pytest.raises(TypeError, match="model"):
        continuation(None, [72], 3)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 3e38])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_generate_refuses_a_damaged_model(bad, temperature):
    model = wild_model()
    model.parameters["final_norm.gamma"][...] = bad
    with pytest.raises(ValueError, match="not finite"):
        continuation(model, [72], 3, temperature=temperature)


@pytest.mark.usefixtures("tier")
def test_generate_in_every_instruction_set(model):
    expected = continuation(model, [72, 105], 40, seed=2)
    assert continuation(model, [72, 105], 40, seed=2) == expected
    assert_greedy(model, [72], continuation(model, [72], 40, temperature=0.0))


# --- A decoder ------------------------------------------------------------------------------------


@without_ties
def decode_case(config, time, draw):
    tokens = np.random.default_rng((6, draw)).integers(0, config.vocab_size, time, np.int32)

    def exact(weights):
        return {"logits": oracle.decode(weights, oracle_config(config), tokens)}

    return tokens, rounding_effect(exact, decoder_weights(model_of(config)))


def assert_near_token(logits, expected, token):
    """Compare the logits after a token with the oracle's."""
    exact, effects = expected
    assert_near({"logits": logits}, ({"logits": exact["logits"][token]}, effects))


def check_pieces(config, time, pieces, threads=1, form="2bit", **kwargs):
    """The logits after each piece of a sequence against the oracle's."""
    tokens, expected = decode_case(config, time)
    decoder, start = Decoder(PackedModel(model_of(config), form), threads, **kwargs), 0
    found = []
    for piece in pieces:
        found.append(decoder.prefill(tokens[start : start + piece]))
        start += piece
        assert decoder.length == start
        assert_near_token(found[-1], expected, start - 1)
    return found


DECODED = MODELS | {
    "int8, float": {"int8_activations": True, "scheme": "float"},
    "2bit, row": {"scheme": "2bit", "scale": "row", "ternary_embedding": True},
    "median, groups": {"scheme": "ternary-median", "scale": "128", "model_dim": 132,
                       "num_blocks": 1, "ffn_multiplier": 1, "ternary_embedding": True},
    "sign, span, sub norm": {"scheme": "sign", "sub_norm": True, "attention_window": 2},
    "one head": {"num_heads": 1, "ternary_embedding": True},
    "heads of one": {"num_heads": 12, "positions": "none"},
    "wide heads": {"model_dim": 66, "num_heads": 1, "ffn_multiplier": 1, "num_blocks": 1,
                   "ternary_embedding": True},
}  # fmt: skip
decoded = pytest.mark.parametrize("changes", DECODED.values(), ids=DECODED)
PIECES = ((7,), (1,) * 7, (3, 1, 2, 1), (1, 6), (6, 1))


def has_trits(config):
    groups = config.scale.isdigit() and config.ffn_dim > int(config.scale)
    return config.scheme != "2bit" and not groups


@every_tier
@decoded
def test_decoder_answers_as_the_oracle(changes):
    config = make_config(**changes)
    for pieces in PIECES:
        found = check_pieces(config, 7, pieces)
        if has_trits(config):
            # The same codes in another form: not a bit differs.
            for logits, other in zip(
                check_pieces(config, 7, pieces, form="trits"), found, strict=True
            ):
                assert_same_bits(logits, other)


@without_ties
def float_case(config, head, draw):
    """What a decoder of float activations answers, with a float matrix of these numbers."""
    tokens = np.random.default_rng((7, draw)).integers(0, config.vocab_size, 7, np.int32)
    weights = (decoder_weights if head == "float" else int8_weights)(model_of(config))
    settings = {**oracle_config(config), "int8_activations": False, "int8_cache": True}

    def exact(values):
        return {"logits": oracle.forward(values, settings, tokens[None])[0][0]}

    return tokens, rounding_effect(exact, weights)


@without_ties
def int8_case(config, draw):
    """What a decoder with its head in int8 answers."""
    tokens = np.random.default_rng((8, draw)).integers(0, config.vocab_size, 7, np.int32)
    settings = {**oracle_config(config), "int8_activations": True, "int8_cache": True,
                "ternary_embedding": True}  # fmt: skip

    def exact(values):
        return {"logits": oracle.forward(values, settings, tokens[None])[0][0]}

    return tokens, rounding_effect(exact, int8_weights(model_of(config)))


def int8_weights(model):
    """The weights where rows of float matrices are rounded to int8."""
    coded = {name for name, value in model.parameters.items() if isinstance(value, TernaryMatrix)}
    return {
        name: oracle.quantize_activations(value) if value.ndim == 2 and name not in coded else value
        for name, value in oracle_weights(model).items()
    }


# Of the other tests' models, those with something of their own on the way.
FLOATS = {
    name: DECODED[name]
    for name in ("2bit, row", "median, groups", "int8", "b158", "one head", "wide", "span 3")
}


@every_tier
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("changes", FLOATS.values(), ids=FLOATS)
def test_decoder_of_float_activations_answers_as_the_oracle(changes, head):
    config = make_config(**changes)
    tokens, expected = float_case(config, head)
    for form in FORMS if has_trits(config) else FORMS[:1]:
        for threads in (1, 3):
            packed = PackedModel(model_of(config), form, head)
            decoder = Decoder(packed, threads, activations="float32")
            assert_near_token(decoder.prefill(tokens[:5]), expected, 4)
            assert_near_token(decoder.prefill(tokens[5:6]), expected, 5)
            assert_near_token(decoder.prefill(tokens[6:]), expected, 6)


INT8_HEADS = {
    "": {},
    "tied": {"tied_embeddings": True},
    "bias": {"output_bias": True, "vocab_size": 75, "model_dim": 36},
    "no final norm": {"final_norm": False, "vocab_size": 33},
}


@every_tier
@pytest.mark.parametrize("changes", INT8_HEADS.values(), ids=INT8_HEADS)
def test_decoder_of_an_int8_head_answers_as_the_oracle(changes):
    config = make_config(**changes)
    tokens, expected = int8_case(config)
    for threads in (1, 2, 5):
        decoder = Decoder(PackedModel(model_of(config), head="int8"), threads)
        for token, row in enumerate(decoder.prefill_logits(tokens[:6])):
            assert_near_token(row, expected, token)
        assert_near_token(decoder.prefill(tokens[6:]), expected, 6)


def test_an_int8_head_has_the_same_bits_everywhere():
    config = make_config(vocab_size=130, tied_embeddings=True)
    packed = PackedModel(model_of(config), head="int8")

    def logits(threads):
        return Decoder(packed, threads).prefill_logits([1, 2, 3, 100, 129])

    for threads in (1, 2, 5):
        for found in in_every_tier(logits, threads):
            assert_same_bits(found, logits(1))


def test_an_int8_head_takes_a_quarter_of_the_bytes():
    model = model_of(make_config(vocab_size=600, model_dim=512, num_heads=4, num_blocks=1))
    whole, quarter = (PackedModel(model, head=head) for head in HEADS)
    for name in ("embedding.weight", "output.weight"):
        assert isinstance(quarter.parameters[name], Int8Matrix)
        assert quarter.parameters[name].nbytes < 0.29 * whole.parameters[name].nbytes
    # Small ones are not worth it.
    default = PackedModel(model).parameters["output.weight"]
    assert_same_bits(default, whole.parameters["output.weight"])


def test_decoder_and_model_refuse_unknown_storage():
    model = model_of(make_config())
    with pytest.raises(ValueError, match="head is 'int4', expected float or int8"):
        PackedModel(model, head="int4")
    with pytest.raises(ValueError, match="activations is 'bf16', expected int8 or float32"):
        Decoder(PackedModel(model), activations="bf16")


@outer_tiers
@decoded
def test_decoder_of_a_full_context_answers_as_the_oracle(changes):
    config = make_config(**changes)
    for pieces in ((16,), (1,) * 16, (2, 13, 1)):
        check_pieces(config, 16, pieces)


@every_tier
@pytest.mark.parametrize(
    ("changes", "span"),
    [({}, 0), ({}, 5), ({}, 70), ({}, 129), ({"scheme": "float"}, 0), ({"scheme": "float"}, 70)],
    ids=str,
)
def test_decoder_takes_long_prompts_in_blocks(changes, span):
    """A block is 128 tokens; what came before it is in the cache."""
    config = make_config(model_dim=8, num_heads=2, num_blocks=1, ffn_multiplier=1,
                         sequence_length=260, attention_window=span, **changes)  # fmt: skip
    for pieces in ((260,), (1, 127, 132), (129, 130, 1)):
        check_pieces(config, 260, pieces)
    check_pieces(config, 260, (259, 1), threads=3)


@every_tier
def test_decoder_makes_nothing_of_nothing():
    """Embeddings of 0: so are the logits of a long prompt, which is taken in blocks."""
    config = make_config(scheme="float", num_blocks=1, sequence_length=300)
    model = create_legacy_llm(config, 1)
    model.parameters["embedding.weight"][...] = 0.0
    for length in (10, 300):
        logits = Decoder(PackedModel(model)).prefill([1] * length)
        assert (logits == 0.0).all()


@every_tier
def test_decoder_rounds_what_is_too_small_for_int8_to_nothing():
    """Also where the token before has left its codes: only it itself is in its span."""
    config = make_config(num_blocks=1, attention_window=1, activation="relu")
    model = create_legacy_llm(config, 1)
    model.parameters["embedding.weight"][2] = 0.0
    model.parameters["blocks.0.norm2.beta"][...] = 1e-37
    decoder = Decoder(PackedModel(model))
    assert decoder.prefill([1]).all()
    assert (decoder.prefill([2]) == 0.0).all()


@every_tier
def test_decoder_answers_token_by_token_as_block_by_block():
    """In a sequence of some hundreds, through two blocks: a cache that is off by one shows."""
    config = make_config(model_dim=8, num_heads=2, ffn_multiplier=1, sequence_length=140,
                         scheme="float")  # fmt: skip
    check_pieces(config, 140, (1,) * 140)
    check_pieces(config, 140, (140,))


@outer_tiers
@pytest.mark.parametrize(
    "changes",
    [{}, {"ternary_embedding": True}, {"scheme": "float"}, {"sub_norm": True, "model_dim": 66},
     {"vocab_size": 130, "model_dim": 80, "num_heads": 5, "ternary_embedding": True}],
    ids=str,
)  # fmt: skip
def test_decoder_answers_alike_with_any_number_of_threads(changes):
    """More than there are heads, tokens or strips of 32 rows, too."""
    config = make_config(**changes)
    for pieces in ((7,), (2, 4, 1)):
        alone = check_pieces(config, 7, pieces)
        for threads in (2, 3, 5):
            found = check_pieces(config, 7, pieces, threads)
            if config.ternary_embedding:
                # All products are of whole numbers.
                for logits, first in zip(found, alone, strict=True):
                    assert_same_bits(logits, first, f"{threads} threads")


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("changes", [{}, {"scheme": "float"}], ids=str)
def test_decoder_repeats_to_the_bit_with_the_same_number_of_threads(changes, threads):
    config = make_config(model_dim=66, vocab_size=70, **changes)
    first = check_pieces(config, 7, (5, 1, 1), threads)
    for _ in range(5):
        for logits, other in zip(check_pieces(config, 7, (5, 1, 1), threads), first, strict=True):
            assert_same_bits(logits, other)


def test_decoder_takes_far_more_threads_than_there_is_work():
    found = check_pieces(make_config(ternary_embedding=True), 7, (6, 1), 40)
    alone = check_pieces(make_config(ternary_embedding=True), 7, (6, 1))
    for logits, other in zip(found, alone, strict=True):
        assert_same_bits(logits, other)


def packed_model(**changes):
    return PackedModel(model_of(make_config(**changes)))


@every_tier
def test_decoder_is_near_the_forward_pass():
    """Rounding to int8 costs some hundredths; with the activations trained so, the cache alone."""
    tokens = [3, 1, 4, 1, 5, 9, 2, 6]
    for changes in ({}, {"int8_activations": True}, {"scheme": "float"}, {"sub_norm": True}):
        model = model_of(make_config(**changes))
        exact = forward_llm_batch(model, [tokens], logits=True)[0, -1]
        error = np.abs(Decoder(PackedModel(model)).prefill(tokens) - exact).max()
        assert 0 < error < 0.05 * np.ptp(exact)


@every_tier
def test_decoder_nbytes_grows_by_the_cache_of_a_sequence():
    """int8 keys and values with their scales, in whole tiles of 16 keys; tokens; logits."""
    model = PackedModel(wild_model(sequence_length=20))
    config = model.config
    cache = config.num_blocks * config.num_heads * 32 * (2 * config.head_dim + 2 * 4)
    sizes = [Decoder(model, sequences=count).nbytes for count in (1, 2, 4)]
    assert sizes[1] - sizes[0] == cache + 4 * 20 + 4 * config.vocab_size
    assert sizes[2] - sizes[1] == 2 * (sizes[1] - sizes[0])


def test_decoder_starts_over_after_clear():
    decoder = Decoder(packed_model(), 2)
    first = decoder.prefill([1, 2, 3])
    decoder.prefill([4, 5])
    decoder.clear()
    assert decoder.length == 0
    assert_same_bits(decoder.prefill([1, 2, 3]), first)
    decoder.clear()
    assert_same_bits(decoder.prefill(range(10)), Decoder(packed_model(), 2).prefill(range(10)))


def test_decoder_keeps_its_answers():
    decoder = Decoder(packed_model())
    first = decoder.prefill([1])
    before = first.copy()
    assert first.shape == (11,)
    assert first.dtype == np.float32
    decoder.prefill([2])
    drawn = decoder.generate([3], [0.5, 0.1])
    kept = drawn.copy()
    decoder.generate([3], [0.9, 0.3])
    assert_same_bits(first, before)
    assert_same_bits(drawn, kept)


def test_decoder_says_what_it_is():
    packed = packed_model()
    decoder = Decoder(packed, 3, 7)
    assert decoder.model is packed
    assert (decoder.threads, decoder.capacity, decoder.length) == (3, 7, 0)
    assert Decoder(packed).capacity == 16
    for name in ("model", "threads", "capacity", "length"):
        with pytest.raises(AttributeError):
            setattr(decoder, name, 1)


def test_decoder_takes_any_whole_numbers():
    decoder = Decoder(packed_model())
    expected = decoder.prefill([3, 1, 4])
    for tokens in (
        (3, 1, 4),
        np.array([3, 1, 4], np.uint8),
        np.array([3, 1, 4], np.int64),
        np.array([3, 0, 1, 0, 4, 0])[::2],
        np.array([3, 1, 4], ">i4"),
    ):
        decoder.clear()
        assert_same_bits(decoder.prefill(tokens), expected)


@pytest.mark.parametrize("capacity", [1, 6, 15])
def test_decoder_has_a_capacity(capacity):
    config = make_config()
    tokens, expected = decode_case(config, 16)
    decoder = Decoder(packed_model(), 1, capacity)
    message = f"0 tokens and {capacity + 1} more do not fit a sequence of {capacity}"
    with pytest.raises(ValueError, match=message):
        decoder.prefill(tokens[: capacity + 1])
    with pytest.raises(ValueError, match=message):
        decoder.generate(tokens[:1], np.full(capacity + 1, 0.5))
    assert decoder.length == 0
    # Those that are drawn last need no room.
    assert decoder.generate(tokens[:1], np.full(capacity, 0.5)).shape == (capacity,)
    assert decoder.length == capacity
    decoder.clear()
    assert_near_token(decoder.prefill(tokens[:capacity]), expected, capacity - 1)
    with pytest.raises(ValueError, match=f"{capacity} tokens and 1 more do not fit"):
        decoder.prefill([1])
    assert decoder.length == capacity


@pytest.mark.parametrize("capacity", [0, -1, 17, 1 << 70])
def test_decoder_rejects_other_capacities(capacity):
    with pytest.raises(ValueError, match=f"capacity is {capacity}, expected 1 to 16"):
        Decoder(packed_model(), 1, capacity)


@pytest.mark.parametrize("threads", [0, -1, 257, 1 << 70])
def test_decoder_rejects_other_numbers_of_threads(threads):
    with pytest.raises(ValueError, match=f"threads is {threads}, expected 1 to 256"):
        Decoder(packed_model(), threads)


def test_decoder_rejects_other_types():
    packed = packed_model()
    for call in (
        lambda: Decoder(None),
        lambda: Decoder(model_of(make_config())),
        lambda: Decoder(packed, 1.5),
        lambda: Decoder(packed, "2"),
        lambda: Decoder(packed, None),
        lambda: Decoder(packed, 1, 2.5),
        lambda: Decoder(packed, 1, "2"),
    ):
        with pytest.raises(TypeError):
            call()


NO_TOKENS = {
    "-1": ([3, -1], IndexError, r"tokens\[1\] is -1, expected 0 to 10"),
    "the vocabulary": ([11], IndexError, r"tokens\[0\] is 11, expected 0 to 10"),
    "padding": ([1, 11, 2], IndexError, r"tokens\[1\] is 11, expected 0 to 10"),
    "beyond int32": ([1 << 32], IndexError, r"tokens\[0\] is 4294967296, expected 0 to 10"),
    "uint64": (np.array([1 << 63], np.uint64), IndexError, "expected 0 to 10"),
    "beyond int64": ([1 << 70], TypeError, "expected whole numbers"),
    "floats": ([1.0], TypeError, r"tokens is float64\[1\], expected whole numbers, \[T\]"),
    "truth": ([True], TypeError, "tokens is bool"),
    "none": (None, TypeError, "expected whole numbers"),
    "ragged": ([[1], [2, 3]], ValueError, r"sequences of several lengths, expected \[T\]"),
    "text": ("ab", TypeError, "expected whole numbers"),
    "bytes": (b"ab", TypeError, "expected whole numbers"),
    "one token": (3, TypeError, r"tokens is int64\[\], expected whole numbers, \[T\]"),
    "sequences": ([[1, 2]], TypeError, r"tokens is int64\[1, 2\], expected whole numbers, \[T\]"),
    "nothing": (np.zeros(0, np.int32), ValueError, "tokens is empty"),
    "an empty list": ([], ValueError, "tokens is empty, expected at least one token"),
    "an empty sequence": ([[]], ValueError, "tokens is empty, expected at least one token"),
    "too much": ([1] * 15, ValueError, "2 tokens and 15 more do not fit a sequence of 16"),
}


@pytest.mark.parametrize("case", NO_TOKENS)
def test_decoder_is_unchanged_by_what_it_rejects(case):
    tokens, error, message = NO_TOKENS[case]
    decoder, fresh = (Decoder(packed_model()) for _ in range(2))
    for one in (decoder, fresh):
        one.prefill([1, 2])
    with pytest.raises(error, match=message):
        decoder.prefill(tokens)
    with pytest.raises(error, match=message):
        decoder.generate(tokens, [0.5])
    assert decoder.length == 2
    assert_same_bits(decoder.prefill([3]), fresh.prefill([3]))


def test_decoder_of_the_c_original_answers_each_token_alone():
    config = ModelConfig.c_original(8, 8, sequence_length=8)
    packed = PackedModel(model_of(config))
    decoder = Decoder(packed)
    for token in range(8):
        assert_same_bits(decoder.prefill([token]), Decoder(packed).prefill([token]))
    check_pieces(config, 8, (3, 1, 4))


def test_decoder_that_is_closed_says_so():
    model = packed_model()
    decoder = Decoder(model)
    with decoder as same:
        assert same is decoder
        decoder.prefill([1, 2])
    decoder.close()
    assert decoder.model is None
    for call in (
        lambda: decoder.length,
        lambda: decoder.length_of(0),
        decoder.clear,
        lambda: decoder.truncate(0),
        lambda: decoder.prefill([1]),
        lambda: decoder.prefill_logits([1]),
        lambda: decoder.prefill_states([1]),
        lambda: decoder.generate([1], [0.5]),
        lambda: decoder.generate_batch([1], [[0.5]]),
        decoder.__enter__,
    ):
        with pytest.raises(ValueError, match="the decoder is closed"):
            call()


def test_decoder_lets_go_of_its_memory_when_closed():
    model, decoders = packed_model(), []
    tracemalloc.start()
    for _ in range(3):
        decoders.append(Decoder(model, sequences=64))
        size, _ = tracemalloc.get_traced_memory()
        decoders[-1].close()
        left, _ = tracemalloc.get_traced_memory()
        assert left < size / 2
    tracemalloc.stop()


# --- Writing --------------------------------------------------------------------------------------


def draws_of(packed, prompt, uniforms, **settings):
    """What ``generate`` should sample, a step at a time, and the number of tokens taken in."""
    decoder, drawn = Decoder(packed), []
    logits = decoder.prefill(prompt)
    for number in uniforms:
        if drawn:
            logits = decoder.prefill(drawn[-1:])
        sampling = SamplingConfig(**settings)
        drawn.append(inference.sample_token(logits, always(number), sampling, [*prompt, *drawn]))
    return drawn, decoder.length


@outer_tiers
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.0},
        {},
        {"temperature": 0.5, "top_k": 9},
        {"top_p": 0.8, "top_k": 20},
        {"min_p": 0.05},
        {"repetition_penalty": 2.0},
        {"repetition_penalty": 3.0, "temperature": 0.0, "repetition_window": 2},
    ],
    ids=str,
)
def test_generate_samples_what_prefill_and_sample_token_do(settings, threads):
    packed = PackedModel(wild_model(ternary_embedding=True))
    uniforms = rng(4).random(12)
    for prompt in ([72], [72, 105, 33, 9]):
        expected, length = draws_of(packed, prompt, uniforms, **settings)
        decoder = Decoder(packed, threads)
        drawn = decoder.generate(prompt, uniforms, SamplingConfig(**settings))
        assert drawn.dtype == np.int32
        assert drawn.tolist() == expected
        assert decoder.length == length == len(prompt) + 11
        # The last one drawn is not taken in: it is what goes on.
        longer, _ = draws_of(packed, prompt, [*uniforms, 0.3], **settings)
        assert (
            decoder.generate(drawn[-1:], [0.3], SamplingConfig(**settings)).tolist() == longer[-1:]
        )


def test_greedy_generate_is_prefill_and_argmax(model):
    packed = PackedModel(model)
    decoder = Decoder(packed)
    written = decoder.generate([72, 105], np.zeros(CONTEXT - 1), SamplingConfig(0.0))
    assert decoder.length == CONTEXT
    other, token = Decoder(packed), [72, 105]
    for expected in written:
        token = [int(np.argmax(other.prefill(token)))]
        assert token == [expected]


def test_write_goes_on_from_where_it_was(model):
    """One call for all is the same as one for each."""
    packed, uniforms = PackedModel(model), rng(3).random(14)
    whole = Decoder(packed).generate([72, 105], uniforms)
    decoder, text = Decoder(packed), [72, 105]
    for count in (1, 3, 1, 9):
        drawn = decoder.generate(text[decoder.length :], uniforms[len(text) - 2 :][:count])
        text += drawn.tolist()
        assert decoder.length == len(text) - 1
    assert text[2:] == whole.tolist()


def test_write_takes_long_prompts():
    packed = PackedModel(wild_model(sequence_length=300, ternary_embedding=True))
    prompt = rng(2).integers(0, 256, 280)
    expected, length = draws_of(packed, prompt, rng(5).random(21))
    for threads in (1, 2, 3):
        decoder = Decoder(packed, threads)
        assert decoder.generate(prompt, rng(5).random(21)).tolist() == expected
        assert decoder.length == length == 300


@pytest.mark.parametrize("settings", [{}, {"top_k": 3}, {"top_p": 0.5}], ids=str)
@pytest.mark.parametrize("number", [0.0, np.nextafter(1.0, 0.0)])
def test_write_takes_numbers_at_either_end(settings, number):
    packed = packed_model()
    drawn = Decoder(packed).generate([1, 4], np.full(10, number), SamplingConfig(**settings))
    assert drawn.tolist() == draws_of(packed, [1, 4], [number] * 10, **settings)[0]
    p = probabilities(Decoder(packed).prefill([1, 4]), 0.8, **settings)
    if number:
        last = np.flatnonzero(p)[-1] if not settings else np.where(p > 0, p, 2).argmin()
    else:
        last = 0 if not settings else p.argmax()
    assert drawn[0] == last


def test_write_takes_numbers_of_any_kind():
    packed, numbers = packed_model(), np.array([0.25, 0.5, 0.75])
    expected = Decoder(packed).generate([1], numbers)
    frozen = numbers.copy()
    frozen.flags.writeable = False
    for given in (numbers.tolist(), numbers.astype(np.float32), np.repeat(numbers, 2)[::2], frozen):
        assert_same_bits(Decoder(packed).generate([1], given), expected)


def test_write_refuses_what_it_cannot_draw():
    decoder = Decoder(packed_model())
    decoder.prefill([1])
    for call, error, message in (
        (lambda: decoder.generate([1], []), ValueError, "uniforms is empty, expected a number"),
        (lambda: decoder.generate([1], [[0.5]]), ValueError, "uniforms has 2 axes, expected 1"),
        (lambda: decoder.generate([1], ["a"]), ValueError, "could not convert"),
        (lambda: decoder.generate([1], [0.5] * 16), ValueError, "1 tokens and 16 more do not fit"),
        (lambda: decoder.generate([1] * 15, [0.5] * 2), ValueError, "1 tokens and 16 more do not"),
        (lambda: decoder.generate([], [0.5]), (TypeError, ValueError), "tokens is"),
    ):
        with pytest.raises(error, match=message):
            call()
        assert decoder.length == 1
    assert decoder.generate([1] * 14, [0.5, 0.5]).shape == (2,)


def test_write_allows_all_tokens_where_top_k_is_more():
    packed, numbers = packed_model(), rng(1).random(8)
    expected = Decoder(packed).generate([1], numbers).tolist()
    for top_k in (11, 12, 1 << 31):
        assert (
            Decoder(packed).generate([1], numbers, SamplingConfig(top_k=top_k)).tolist() == expected
        )


# --- Several sequences ----------------------------------------------------------------------------


@outer_tiers
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("settings", [{}, {"top_k": 9, "repetition_penalty": 1.5}], ids=str)
def test_generate_batch_samples_what_each_would_alone(settings, threads):
    packed = PackedModel(wild_model(ternary_embedding=True))
    prompts = [[72], [1, 2, 3], [9, 8], [200, 100, 50, 25, 12], [0]]
    uniforms, sampling = rng(6).random((5, 11)), SamplingConfig(**settings)
    decoder = Decoder(packed, threads, sequences=6)
    for i, prompt in enumerate(prompts):
        if len(prompt) > 1:
            decoder.prefill(prompt[:-1], i + 1)
    newest = [prompt[-1] for prompt in prompts]
    # In pieces, and in another order than they are numbered.
    first = decoder.generate_batch(newest, uniforms[:, :4], sampling, range(1, 6))
    order = [3, 0, 4, 1, 2]
    second = decoder.generate_batch(
        first[order, -1], uniforms[order, 4:], sampling, [i + 1 for i in order]
    )
    for i, prompt in enumerate(prompts):
        alone = Decoder(packed).generate(prompt, uniforms[i], sampling).tolist()
        assert [*first[i], *second[order.index(i)]] == alone
        assert decoder.length_of(i + 1) == len(prompt) + 10
    assert decoder.length == 0


SEVERAL = (
    SamplingConfig(),
    SamplingConfig(temperature=0.0),
    SamplingConfig(top_k=5),
    SamplingConfig(top_p=0.7, min_p=0.02),
    SamplingConfig(1.3, 40, 0.9, 0.01, 1.7, 5),
)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_generate_batch_samples_each_sequence_in_its_own_way(threads):
    packed = PackedModel(wild_model(ternary_embedding=True))
    prompts = [[72, 1], [1, 2, 3], [9, 8], [200, 100, 50, 25, 12], [0, 4]]
    uniforms = rng(6).random((5, 9))
    biases = [None, *rng(7).normal(0.0, 3.0, (3, 256)).astype(np.float32), None]
    alone = [
        Decoder(packed).generate(prompt, uniforms[i], SEVERAL[i], bias=biases[i])
        for i, prompt in enumerate(prompts)
    ]
    assert any(
        (Decoder(packed).generate(prompt, uniforms[i]) != alone[i]).any()
        for i, prompt in enumerate(prompts)
    )
    decoder = Decoder(packed, threads, sequences=5)
    for i, prompt in enumerate(prompts):
        decoder.prefill(prompt[:-1], i)
    newest = [prompt[-1] for prompt in prompts]
    assert_same_bits(decoder.generate_batch(newest, uniforms, SEVERAL, bias=biases), alone)


def test_bias_is_added_to_the_logits():
    packed, bias = packed_model(), rng(3).normal(0.0, 2.0, 11).astype(np.float32)
    bias[[0, 7]] = -np.inf
    sampling = SamplingConfig(20.0, repetition_penalty=1.5)
    decoder, drawn = Decoder(packed), set()
    for number in np.arange(0.02, 1.0, 0.04):
        decoder.clear()
        (token,) = decoder.generate([1, 2], [number], sampling, bias=bias)
        penalized = penalised(decoder.last_logits(), [1, 2], np.float32(1.5), 64)
        assert token == sample_token(penalized + bias, always(number), 20.0)
        drawn.add(token)
    assert len(drawn) > 2
    assert not drawn & {0, 7}


def test_last_logits_are_those_that_were_sampled_from():
    packed = PackedModel(wild_model(ternary_embedding=True))
    decoder = Decoder(packed, 2, sequences=3)
    decoder.generate_batch([1, 2], [[0.1] * 3, [0.7] * 3], sequences=[2, 0])
    assert_same_bits(decoder.last_logits(0), Decoder(packed).prefill(tokens_of(decoder, 1, 0.1)))
    assert_same_bits(decoder.last_logits(1), Decoder(packed).prefill(tokens_of(decoder, 2, 0.7)))
    decoder.generate([5, 6], [0.5], sequence=1, bias=np.ones(256, np.float32))
    assert_same_bits(decoder.last_logits(), Decoder(packed).prefill([5, 6]))
    for row in (-1, 3):
        with pytest.raises(IndexError, match=f"row is {row}, expected 0 to 2"):
            decoder.last_logits(row)


def tokens_of(decoder, first, number):
    """The tokens in a sequence of three sampled with one number."""
    return [first, *Decoder(decoder.model).generate([first], [number] * 2)]


def test_nonfinite_logits_name_the_sequences():
    """And leave all of them as they were, so that the others can be sampled."""
    packed = PackedModel(wild_model(ternary_embedding=True))
    decoder, nothing = Decoder(packed, 2, sequences=4), np.full(256, -np.inf, np.float32)
    for i in range(4):
        decoder.prefill([i, i + 1], i)
    bias = [None, nothing, None, nothing]
    with pytest.raises(inference.NonfiniteLogits, match="not finite") as caught:
        decoder.generate_batch([9] * 4, [[0.5]] * 4, bias=bias)
    assert caught.value.rows == (1, 3)
    assert [decoder.length_of(i) for i in range(4)] == [2] * 4
    drawn = decoder.generate_batch([9] * 2, [[0.5]] * 2, sequences=[0, 2])
    for token, i in zip(drawn[:, 0], (0, 2), strict=True):
        assert token == Decoder(packed).generate([i, i + 1, 9], [0.5])
    with pytest.raises(inference.NonfiniteLogits) as caught:
        decoder.generate([1], [0.5], sequence=3, bias=nothing)
    assert caught.value.rows == (0,)


@every_tier
def test_sequences_with_an_adapter_are_rounded_as_alone_and_in_any_blocks():
    config = make_config(vocab_size=256, ternary_embedding=True, model_dim=60, sequence_length=200)
    model = model_of(config)
    shapes = {
        name: value.shape for name, value in model.parameters.items() if "attention.w" in name
    }
    draw = rng(5)
    adapter = {
        name: (draw.normal(0, 1, (3, cols)).astype(np.float32),
               draw.normal(0, 1, (rows, 3)).astype(np.float32))
        for name, (rows, cols) in shapes.items()
    }  # fmt: skip
    packed = PackedModel(model).with_adapter(adapter)
    decoder, uniforms = Decoder(packed, 2, sequences=7), draw.random((7, 5))
    decoder.generate_batch(range(7), uniforms)
    for i in range(7):
        alone = Decoder(packed)
        alone.generate([i], uniforms[i])
        assert_same_bits(decoder.last_logits(i), alone.last_logits())
    text = draw.integers(0, 256, 190)
    for cuts in ([1], [64, 65], [120, 150]):
        alone = Decoder(packed)
        parts = [alone.prefill_logits(part) for part in np.split(text, cuts)]
        assert_same_bits(np.concatenate(parts), Decoder(packed).prefill_logits(text))


def test_copy_continues_as_the_original():
    sizes = {"num_blocks": 3, "num_heads": 4, "num_kv_heads": 2, "sequence_length": 100}
    packed = PackedModel(wild_model(ternary_embedding=True, **sizes))
    text = rng(4).integers(0, 256, 70)
    decoder, sampling = Decoder(packed, sequences=3), SamplingConfig(repetition_penalty=1.5)
    decoder.prefill(text, 1)
    for length in (0, 1, 15, 16, 17, 64, 70):
        decoder.truncate(0, 2)
        decoder.prefill([7] * 90, 2)
        decoder.copy(1, 2, length)
        assert [decoder.length_of(i) for i in range(3)] == [0, 70, length]
        expected = Decoder(packed).generate([*text[:length], 3], [0.3] * 9, sampling)
        assert_same_bits(decoder.generate([3], [0.3] * 9, sampling, 2), expected)
    decoder.copy(1, 1, 20)
    expected = Decoder(packed).generate([*text[:20], 3], [0.3] * 9)
    assert_same_bits(decoder.generate([3], [0.3] * 9, sequence=1), expected)


def test_generate_batch_of_many_samples_all():
    packed = PackedModel(wild_model(sequence_length=200, ternary_embedding=True))
    decoder, uniforms = Decoder(packed, 2, sequences=128), rng(2).random((128, 3))
    drawn = decoder.generate_batch(np.arange(128), uniforms)
    for i in (0, 63, 127):
        assert drawn[i].tolist() == Decoder(packed).generate([i], uniforms[i]).tolist()


def test_generate_batch_refuses_what_does_not_fit(model):
    decoder = Decoder(PackedModel(model), sequences=2)
    decoder.prefill(range(14), 1)
    for call, error, message in (
        (lambda: decoder.generate_batch([1], [[0.5]]), ValueError, "2 sequences, 1 tokens and 1"),
        (lambda: decoder.generate_batch([1, 2], [[0.5]]), ValueError, "2 tokens and 1 rows"),
        (lambda: decoder.generate_batch([1, 2], [0.5, 0.5]), ValueError, "1 axes, expected 2"),
        (lambda: decoder.generate_batch([1, 2], [[], []]), ValueError, "uniforms is empty"),
        (lambda: decoder.generate_batch([1, 2], [[0.5] * 3] * 2), ValueError, "14 tokens and 3"),
        (lambda: decoder.generate_batch([1, 256], [[0.5]] * 2), IndexError, r"tokens\[1\] is 256"),
        (lambda: decoder.generate_batch([1, 2], [[0.5]] * 2, sequences=[0, 0]), ValueError,
         "named twice"),
        (lambda: decoder.generate_batch([1, 2], [[0.5]] * 2, sequences=[0, 2]), IndexError,
         "sequence is 2, expected 0 to 1"),
        (lambda: decoder.generate_batch([1, 2], [[0.5]] * 2, SEVERAL), ValueError,
         "2 sequences, 5 settings of sampling and 2 of bias"),
        (lambda: decoder.generate_batch([1, 2], [[0.5]] * 2, [None] * 2), TypeError, "is None"),
        (lambda: decoder.generate_batch([1, 2], [[0.5]] * 2, bias=[None]), ValueError,
         "2 sequences, 2 settings of sampling and 1 of bias"),
        (lambda: decoder.generate([1], [0.5], bias=np.zeros(9, np.float32)), ValueError,
         "bias has 9 numbers, expected 256"),
        (lambda: decoder.generate([1], [0.5], bias=np.zeros(256)), ValueError, "mismatch"),
        (lambda: decoder.copy(1, 0, 15), ValueError, "length is 15, expected 0 to 14"),
        (lambda: decoder.copy(0, 2, 0), IndexError, "sequence is 2"),
        (lambda: decoder.copy(-1, 0, 0), IndexError, "sequence is -1"),
        (lambda: decoder.prefill([1], 2), IndexError, "sequence is 2, expected 0 to 1"),
        (lambda: decoder.prefill([1], -1), IndexError, "sequence is -1, expected 0 to 1"),
        (lambda: decoder.length_of(2), IndexError, "sequence is 2"),
        (lambda: decoder.truncate(15, 1), ValueError, "length is 15, expected 0 to 14"),
        (lambda: decoder.truncate(-1, 1), ValueError, "length is -1, expected 0 to 14"),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            call()
        assert (decoder.length, decoder.length_of(1)) == (0, 14)
    for sequences in (0, -1, 129):
        with pytest.raises(ValueError, match=f"sequences is {sequences}, expected 1 to 128"):
            Decoder(PackedModel(model), sequences=sequences)


def test_truncate_forgets_the_newest(model):
    decoder, other = (Decoder(PackedModel(model), sequences=2) for _ in range(2))
    decoder.prefill(range(9), 1)
    decoder.truncate(4, 1)
    other.prefill(range(4), 1)
    assert decoder.length_of(1) == 4
    assert_same_bits(decoder.prefill([50], 1), other.prefill([50], 1))


# --- All of a sequence ----------------------------------------------------------------------------


@every_tier
@pytest.mark.parametrize("changes", [{}, {"ternary_embedding": True}, {"scheme": "float"},
                                     {"final_norm": False}], ids=str)  # fmt: skip
def test_prefill_logits_gives_the_logits_after_each_token(changes):
    packed = PackedModel(wild_model(sequence_length=300, **changes))
    tokens = rng(1).integers(0, 256, 290)
    decoder, other = Decoder(packed, 2), Decoder(packed)
    found = [decoder.prefill_logits(tokens[:1]), decoder.prefill_logits(tokens[1:])]
    assert [one.shape for one in found] == [(1, 256), (289, 256)]
    assert decoder.length == 290
    found = np.concatenate(found)
    for i in (0, 1, 127, 128, 200, 289):
        other.clear()
        alone = other.prefill(tokens[: i + 1])
        # In another order of sums, which now and then moves a number to the next int8.
        assert np.abs(found[i] - alone).max() < 0.05 * np.ptp(alone)


@outer_tiers
@pytest.mark.parametrize("changes", [{}, {"scheme": "float"}, {"final_norm": False}], ids=str)
@pytest.mark.parametrize("threads", [1, 3])
def test_prefill_states_gives_what_the_output_layer_gets(changes, threads):
    config = make_config(**changes)
    decoder = Decoder(PackedModel(model_of(config)), threads)
    tokens = [1, 2, 3, 4, 5, 6, 7]
    states = np.concatenate(
        [decoder.prefill_states(tokens[:1]), decoder.prefill_states(tokens[1:])]
    )
    assert states.shape == (7, config.model_dim)
    assert decoder.length == 7
    weights = decoder_weights(model_of(config))
    decoder.clear()
    logits = decoder.prefill_logits(tokens)
    expected = states.astype(np.float64) @ weights["output.weight"].T + weights["output.bias"]
    assert np.abs(logits - expected).max() < 0.05 * np.ptp(expected)


# --- Damaged weights ------------------------------------------------------------------------------


@outer_tiers
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_decoder_of_damaged_weights_says_so_and_can_be_used_again(bad, threads):
    model = random_model(make_config())
    model.parameters["embedding.weight"][5, 2] = bad
    # After any good token the damaged one is drawn.
    model.parameters["output.bias"][5] = 1e6
    decoder, good = Decoder(PackedModel(model), threads), [1, 2, 3]
    expected = decoder.prefill(good)
    assert np.isfinite(expected).all()
    decoder.clear()
    for prompt, count in (([5], 1), ([1, 2, 5], 3), (good, 2), ([1], 9)):
        for temperature in (0.0, 1.0):
            with pytest.raises(ValueError, match="not finite: its weights are damaged"):
                decoder.generate(prompt, np.full(count, 0.5), SamplingConfig(temperature))
            assert decoder.length == 0
    assert decoder.generate(good, [0.5]).tolist() == [5]
    assert not np.isfinite(decoder.prefill([5])).all()
    decoder.clear()
    assert_same_bits(decoder.prefill(good), expected)
    # And what was not taken in, has not happened.
    with pytest.raises(ValueError, match="not finite"):
        decoder.generate([1], [0.5, 0.5])
    assert decoder.length == 3
    fresh = Decoder(PackedModel(model), threads)
    fresh.prefill(good)
    assert_same_bits(decoder.prefill([4]), fresh.prefill([4]))


@pytest.mark.parametrize("name", ["output.bias", "blocks.0.attention.bk", "blocks.1.ffn.bo",
                                  "blocks.0.norm1.gamma", "output.weight"])  # fmt: skip
@pytest.mark.parametrize("prompt", [[1], [1, 2, 3]])
def test_decoder_finds_damage_anywhere(name, prompt):
    model = random_model(make_config())
    model.parameters[name].flat[3] = np.nan
    decoder = Decoder(PackedModel(model))
    with pytest.raises(ValueError, match="not finite"):
        decoder.generate(prompt, [0.5])
    assert np.isnan(decoder.prefill(prompt)).any()


# --- At the same time -----------------------------------------------------------------------------


def test_decoder_is_for_one_thread_at_a_time():
    config = ModelConfig(model_dim=256, num_blocks=4, sequence_length=2048)
    decoder = Decoder(PackedModel(create_legacy_llm(config, 1)))
    done, refused = threading.Event(), []

    def disturb():
        while not done.is_set() and not refused:
            try:
                decoder.clear()
            except RuntimeError as error:
                refused.append(str(error))

    other = threading.Thread(target=disturb)
    other.start()
    for _ in range(50):
        # Cleared between two of its pieces, it can run out of room no earlier.
        with contextlib.suppress(RuntimeError, ValueError):
            decoder.generate([1], np.full(2000, 0.5))
        if refused:
            break
        decoder.clear()
    done.set()
    other.join()
    assert "each needs its own" in refused[0]


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs a timer")
def test_ctrl_c_ends_a_long_text():
    config = ModelConfig(model_dim=256, num_blocks=4, sequence_length=1 << 15)
    decoder = Decoder(PackedModel(create_legacy_llm(config, 1, trainable=False)))
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(KeyboardInterrupt):
            decoder.generate([1], np.full(1 << 15, 0.5))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert 0 <= decoder.length < 1 << 15
    decoder.clear()
    assert np.isfinite(decoder.prefill([1])).all()


@outer_tiers
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_decoders_of_one_model_work_at_the_same_time(threads):
    packed = PackedModel(wild_model(ternary_embedding=True, num_blocks=2))
    prompts = [rng(seed).integers(0, 256, 5) for seed in range(4)]
    expected = [Decoder(packed).generate(prompt, rng(8).random(12)).tolist() for prompt in prompts]
    found, start = [[] for _ in prompts], threading.Barrier(len(prompts))

    def work(i):
        decoder = Decoder(packed, threads)
        start.wait()
        for _ in range(4):
            decoder.clear()
            found[i].append(decoder.generate(prompts[i], rng(8).random(12)).tolist())

    workers = [threading.Thread(target=work, args=(i,)) for i in range(len(prompts))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for written, once in zip(found, expected, strict=True):
        assert written == [once] * 4


def test_decoders_of_one_model_do_not_disturb_each_other():
    packed, texts = packed_model(), ([1, 2, 3, 4, 5], [9, 8, 7, 6, 5])
    alone = []
    for text in texts:
        decoder = Decoder(packed)
        alone.append([decoder.prefill([token]) for token in text])
    pair = [Decoder(packed) for _ in texts]
    for i in range(5):
        for decoder, text, logits in zip(pair, texts, alone, strict=True):
            assert_same_bits(decoder.prefill([text[i]]), logits[i])


# --- The same everywhere --------------------------------------------------------------------------


@pytest.mark.parametrize("changes", CODED.values(), ids=CODED)
def test_decoder_computes_the_same_bits_everywhere(changes):
    """Whatever the instruction set, the threads, and the pieces a text comes in."""
    config = make_config(**{**changes, "sequence_length": 70})
    packed = PackedModel(model_of(config))
    tokens = rng(3).integers(0, config.vocab_size, 65)
    expected = Decoder(packed).prefill_states(tokens)

    def found():
        yield Decoder(packed, 2).prefill_states(tokens)
        decoder = Decoder(packed, sequences=2)
        parts = np.split(tokens, [1, 2, 3, 30, 31, 60])
        yield np.concatenate([decoder.prefill_states(part, 1) for part in parts])

    for states in in_every_tier(lambda: list(found())):
        for one in states:
            assert_same_bits(one, expected)


@pytest.mark.parametrize(
    "settings", [{"temperature": 0.0}, {}, {"top_k": 5, "min_p": 0.1}], ids=str
)
def test_text_is_the_same_everywhere(settings):
    packed = PackedModel(wild_model(ternary_embedding=True))
    for prompt, count, threads in (([72], 60, 1), ([72, 105, 33], 15, 2), (list(range(30)), 60, 1)):
        expected = continuation(packed, prompt, count, **settings)
        found = in_every_tier(continuation, packed, prompt, count, threads=threads, **settings)
        assert all(one == expected for one in found)
