"""Sampling against its distribution, and generation against the full forward pass."""

import warnings
from types import SimpleNamespace

import numpy as np
import pytest
from compare import assert_same_bits

from legacy1bit.forward import forward_llm_batch
from legacy1bit.hyperparams import ModelConfig
from legacy1bit.inference import check_sampling, generate, sample_token
from legacy1bit.model import create_legacy_llm

CONTEXT = 16
LOGITS = np.array([0.5, -1.0, 2.0, 0.0, 1.5, -3.0, 1.0, 0.25], np.float32)


def rng(seed=0):
    return np.random.default_rng(seed)


def always(number):
    """A generator whose uniform numbers are all the same."""
    return SimpleNamespace(random=lambda: number)


def wild_model(seed=3, **settings):
    """A model whose matrices are large, so that each token of the context changes its mind."""
    sizes = {"model_dim": 16, "num_blocks": 1, "num_heads": 2, "sequence_length": CONTEXT}
    model = create_legacy_llm(ModelConfig(**{**sizes, **settings}), seed)
    random = rng(seed)
    for weights in model.latent.values():
        if weights.ndim == 2:
            weights[...] = random.standard_normal(weights.shape, np.float32)
    model.quantize()
    return model


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
        ({"top_k": 1 << 70}, 8),
        ({"top_p": 0.5}, 2),
        ({"top_p": 0.9}, 5),
        ({"top_p": 0.6, "temperature": 2.0}, 3),
        ({"top_p": 0.7, "top_k": 3}, 2),
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


@pytest.mark.parametrize("settings", [{"top_k": 1}, {"top_p": 1e-9}, {"top_p": 5e-324}])
@pytest.mark.parametrize("temperature", [1e-3, 1.0, 100.0, 1e308])
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


@pytest.mark.parametrize("temperature", [1e6, 1e308])
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


@pytest.mark.parametrize("settings", [{}, {"top_k": 5}, {"top_p": 0.999}, {"temperature": 50.0}])
@pytest.mark.parametrize("number", [0.0, 0.5, np.nextafter(1.0, 0.0)])
def test_sample_token_never_draws_minus_infinity(settings, number):
    logits = np.where(np.arange(8) % 3 == 1, LOGITS, -np.inf).astype(np.float32)
    assert sample_token(logits, always(number), **settings) in (1, 4, 7)
    logits[[1, 4]] = -np.inf
    assert sample_token(logits, always(number), **settings) == 7


@pytest.mark.parametrize("number", [0.0, np.nextafter(1.0, 0.0)])
def test_sample_token_draws_no_token_of_probability_0(number):
    logits = np.array([-200, 0, -200, 0, -200, -90000], np.float32)
    assert sample_token(logits, always(number), 0.2) == (1 if number == 0 else 3)


def test_sample_token_repeats_by_seed_and_keeps_the_logits():
    logits = LOGITS.copy()
    draws = [[sample_token(logits, random) for _ in range(50)] for random in (rng(5), rng(5))]
    assert draws[0] == draws[1]
    assert len(set(draws[0])) > 3
    assert_same_bits(logits, LOGITS)


BAD_SETTINGS = [
    *({"temperature": number} for number in (-1.0, -1e-9, np.nan, np.inf, -np.inf)),
    *({"top_k": number} for number in (-1, -(1 << 70))),
    *({"top_p": number} for number in (0.0, -0.5, 1.0000001, 2.0, np.nan, np.inf)),
]


@pytest.mark.parametrize("settings", BAD_SETTINGS, ids=str)
def test_sampling_refuses_settings_out_of_range(settings, model):
    (name,) = settings
    defaults = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
    with pytest.raises(ValueError, match=f"{name} is .*, expected"):
        check_sampling(**(defaults | settings))
    with pytest.raises(ValueError, match=f"{name} is"):
        sample_token(LOGITS, rng(), **settings)
    with pytest.raises(ValueError, match=f"{name} is"):
        next(generate(model, [1], 5, **settings))


# --- A text ---------------------------------------------------------------------------------------


def continuation(model, prompt, count, **settings):
    return list(generate(model, prompt, count, **settings))


def greedy_reference(model, prompt, count, context=CONTEXT):
    """Greedy generation by the full forward pass, which sees what ``generate`` promises."""
    text, seen, written = list(prompt), list(prompt)[-context:], []
    for _ in range(count):
        if len(seen) > context:
            seen = text[-max(context // 2, 1) :]
        row = np.array([seen], np.int32)
        token = int(np.argmax(forward_llm_batch(model, row, logits=True)[0, -1]))
        for part in (text, seen, written):
            part.append(token)
    return written


@pytest.mark.parametrize("prompt", [[10], [84, 104, 101], [0, 255, 128, 7], list(range(65, 75))])
def test_generate_greedily_is_the_argmax_of_the_full_forward_pass(model, prompt):
    text = list(prompt)
    written = continuation(model, prompt, CONTEXT - len(prompt) + 1, temperature=0.0)
    for token in written:
        logits = forward_llm_batch(model, np.array([text], np.int32), logits=True)[0, -1]
        assert token == np.argmax(logits)
        text.append(token)


@pytest.mark.parametrize("scheme", ["ternary", "float"])
@pytest.mark.parametrize("length", [1, 2, 3, 16])
def test_generate_goes_on_past_the_context_from_its_newer_half(scheme, length):
    model = wild_model(scheme=scheme, sequence_length=length)
    for prompt in ([65], [1, 2, 3], list(range(40))):
        written = continuation(model, prompt, 5 * length + 3, temperature=0.0)
        assert written == greedy_reference(model, prompt, 5 * length + 3, length)


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


def test_generate_draws_as_sample_token_does(model):
    random, text = rng(9), [72, 105]
    settings = {"temperature": 0.7, "top_k": 20, "top_p": 0.9}
    for token in continuation(model, text, CONTEXT - 2, seed=9, **settings):
        logits = forward_llm_batch(model, np.array([text], np.int32), logits=True)[0, -1]
        assert token == sample_token(logits, random, **settings)
        text.append(token)


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
    for prompt in ([257], [-1], [72, 1 << 20]):
        with pytest.raises(IndexError):
            continuation(model, prompt, 3)


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
    assert continuation(model, [72], 40, temperature=0.0) == greedy_reference(model, [72], 40)
