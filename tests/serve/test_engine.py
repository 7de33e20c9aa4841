"""Texts of an engine, which are those of a generator whatever runs beside them.

The models' matrices are all ternary or in int8: every product is one of whole numbers, and texts
are compared exactly.
"""

import functools
import gc
import itertools
import threading
import time
import tracemalloc

import numpy as np
import pytest

from helpers.arrays import assert_same_bits
from helpers.models import wild_model
from legacy1bit.generator import Generator
from legacy1bit.hyperparams import SamplingConfig
from legacy1bit.inference import sample_token
from legacy1bit.packed import PackedModel
from legacy1bit.serve.engine import Engine
from legacy1bit.serve.requests import (
    Closed,
    Embedding,
    Finished,
    GenerationRequest,
    Piece,
    QueueFull,
)
from legacy1bit.serve.slots import BLOCK

CONTEXT = 700
SAMPLINGS = (
    SamplingConfig(),
    SamplingConfig(temperature=0.0),
    SamplingConfig(temperature=3.0),
    SamplingConfig(top_k=5),
    SamplingConfig(top_p=0.7, min_p=0.02),
    SamplingConfig(1.3, 40, 0.9, 0.01, 1.7, 5),
    SamplingConfig(repetition_penalty=1.7, repetition_window=0),
)


@functools.cache
def packed_model(**changes):
    return PackedModel(wild_model(sequence_length=CONTEXT, **changes), head="int8")


@pytest.fixture
def generator():
    return Generator(packed_model(), threads=2)


def random_text(size, seed=1):
    return np.random.default_rng(seed).integers(0, 256, size, np.uint8).tobytes()


def request_of(generator, prompt, max_tokens=20, **settings):
    return GenerationRequest(generator.encode(prompt), max_tokens, **settings)


def text_of(events):
    return "".join(event.text for event in events if isinstance(event, Piece))


def tokens_of(events):
    return [event.token for event in events if isinstance(event, Piece)]


def result(ticket):
    """The text of a request, and its end."""
    events = list(ticket)
    return text_of(events), events[-1]


class Nothing:
    """A constraint that allows no token."""

    def allowed(self):
        return np.zeros(256, bool)

    def advance(self, token):
        return False


# --- The same text as alone -----------------------------------------------------------------------

SIZES = (1, 2, 50, 127, 128, 129, 255, 256, 257, 300, 383, 384, 385, 640)


@pytest.mark.parametrize("slots", [1, 3, 8])
def test_each_text_is_that_of_a_generator(generator, slots):
    cases = list(itertools.product(SAMPLINGS, SIZES))
    with Engine(generator, slots, queue=len(cases)) as engine:
        tickets = [
            engine.submit(request_of(generator, random_text(size, i), sampling=sampling, seed=i))
            for i, (sampling, size) in enumerate(cases)
        ]
        for i, (sampling, size) in enumerate(cases):
            text, end = result(tickets[i])
            alone = generator.complete(random_text(size, i), 20, sampling, i)
            assert (text, end.completion_tokens) == (alone.text, alone.tokens), (size, sampling)
            assert end.reason == "length"
        assert engine.stats().cached_tokens < 0.1 * engine.stats().prompt_tokens


@pytest.mark.parametrize("seed", range(4))
def test_a_text_is_the_same_whatever_comes_and_goes_beside_it(generator, seed):
    """Neighbours share some of its prompt, join at any token, leave and are cancelled."""
    rng = np.random.default_rng(seed)
    shared, cases, tickets, reasons = random_text(500, seed), [], [], []
    with Engine(generator, 4, queue=1000) as engine:
        for i in range(60):
            prompt = shared[: rng.integers(0, 450)] + random_text(
                rng.integers(1, 40), 60 * seed + i
            )
            count, stop = int(rng.integers(1, 40)), tuple("etaoinshrdlu"[: 6 * rng.integers(0, 3)])
            sampling = SAMPLINGS[rng.integers(len(SAMPLINGS))]
            request = request_of(generator, prompt, count, sampling=sampling, seed=i, stop=stop)
            cases.append((prompt, count, sampling, i, stop))
            tickets.append(engine.submit(request))
            if rng.random() < 0.3:
                threading.Timer(rng.random() / 100, tickets[i].cancel).start()
            if rng.random() < 0.1:
                time.sleep(0.005)
        for ticket, case in zip(tickets, cases, strict=True):
            text, end = result(ticket)
            alone = generator.complete(*case)
            reasons.append(end.reason)
            if end.reason == "cancelled":
                assert alone.text.startswith(text)
            else:
                assert (text, end.completion_tokens) == (alone.text, alone.tokens)
                assert end.reason == ("stop" if alone.stopped else "length")
        assert set(reasons) == {"stop", "length", "cancelled"}
        assert engine.stats().cached_tokens > 1000


def adapted_model():
    """A model with an adapter, whose products are of floats."""
    draw, adapter = np.random.default_rng(5), {}
    model = packed_model()
    for name, weights in model.parameters.items():
        if "attention.w" in name:
            down, up = (3, weights.shape[1]), (weights.shape[0], 3)
            adapter[name] = [draw.normal(size=size).astype(np.float32) for size in (down, up)]
    return model.with_adapter(adapter)


@pytest.mark.parametrize("threads", [1, 3])
def test_texts_of_a_model_with_an_adapter_are_those_of_a_generator(generator, threads):
    adapted, text = Generator(adapted_model(), threads=threads), random_text(600)
    prompts = [text[:size] for size in (2, 40, 140, 290, 291, 420, 600, 599)]
    with Engine(adapted, 3) as engine:
        tickets = [engine.submit(request_of(adapted, prompt, seed=7)) for prompt in prompts]
        for prompt, ticket in zip(prompts, tickets, strict=True):
            expected = adapted.complete(prompt, 20, seed=7).text
            assert result(ticket)[0] == expected != generator.complete(prompt, 20, seed=7).text
        assert engine.stats().cached_tokens > 300


# --- The cache ------------------------------------------------------------------------------------


def test_a_conversation_that_returns_is_read_on_from_where_it_was(generator):
    """And its answers are those of a generator that reads all of it anew."""
    with Engine(generator, 3) as engine:
        conversations = [random_text(60, i) for i in range(3)]
        had = [len(generator.encode(b""))] * 3
        for turn in range(6):
            for i, prompt in enumerate(conversations):
                tokens = generator.encode(prompt)
                events = list(engine.submit(GenerationRequest(tokens, 25, seed=turn)))
                assert text_of(events) == generator.complete(prompt, 25, seed=turn).text
                if turn:
                    # The last token of an answer has not passed.
                    assert events[-1].cached_tokens == had[i] + 24
                had[i] = tokens.size
                answer = generator.tokenizer.decode(tokens_of(events))
                conversations[i] = prompt + answer + random_text(50, 100 * turn + i)
        assert had[0] > 400


def test_a_prompt_takes_what_any_slot_has_of_it(generator):
    system = random_text(420, 9)
    with Engine(generator, 3) as engine:

        def cached(prompt, **settings):
            text, end = result(engine.submit(request_of(generator, prompt, **settings)))
            assert text == generator.complete(prompt, 20, seed=settings.get("seed", 0)).text
            assert end.prompt_tokens == len(generator.encode(prompt))
            return end.cached_tokens

        begin = len(generator.encode(b""))
        assert cached(system) == 0
        assert cached(system[:100] + b"other") == 100 + begin
        assert cached(system[:300] + b"other") == 300 + begin
        assert cached(system[:400] + b"other") == 400 + begin
        # Not the last token, whose logits are needed.
        assert cached(system[:200]) == 199 + begin
        assert cached(system, seed=1) == 400 + begin
        assert cached(b"other") == begin
        # Those taken had been free longest, so that the first is still there.
        assert cached(system[:400]) == 399 + begin


def test_float_products_are_taken_in_whole_blocks_alone():
    """Elsewhere their bits depend on how a text is cut."""
    generator = Generator(PackedModel(wild_model(sequence_length=CONTEXT), head="float"))
    text, begin = random_text(300), len(generator.encode(b""))
    with Engine(generator, 2) as engine:
        for size, cached in ((300, 0), (128 - begin, 0), (129 - begin, 128), (290, 256)):
            end = result(engine.submit(request_of(generator, text[:size], 1)))[1]
            assert end.cached_tokens == cached


def test_a_prompt_is_shared_while_it_passes(generator):
    """Several answers to one prompt cost little more than one."""
    prompt = random_text(600, 4)
    with Engine(generator, 5) as engine:
        tickets = [engine.submit(request_of(generator, prompt, seed=i)) for i in range(5)]
        for i, ticket in enumerate(tickets):
            assert result(ticket)[0] == generator.complete(prompt, 20, seed=i).text
        # The last block of each, as its logits are its own.
        assert engine.stats().prompt_tokens <= 601 + 4 * BLOCK


# --- Beside one another ---------------------------------------------------------------------------


class Gate:
    """Holds an engine up in a call of its own thread."""

    def __init__(self):
        self.reached, self.open = threading.Event(), threading.Event()

    def __call__(self, event):
        self.reached.set()
        assert self.open.wait(20)


def log_into(order, name, after=lambda event: None):
    def on_event(event):
        order.append((name, event))
        after(event)

    return on_event


def test_nobody_waits_for_more_than_a_block_of_a_prompt(generator):
    gate, order = Gate(), []
    with Engine(generator, 4) as engine:
        engine.submit(request_of(generator, b"a", 1), gate)
        gate.reached.wait(20)
        engine.submit(request_of(generator, b"runs", 40), log_into(order, "runs"))
        engine.submit(request_of(generator, random_text(640), 1), log_into(order, "long"))
        last = engine.submit(request_of(generator, b"short", 1), log_into(order, "short"))
        gate.open.set()
        assert engine.drain(20)
    del last
    names = [name for name, event in order if isinstance(event, Piece)]
    # 21 short blocks of the long prompt, in turns with that of the short one.
    assert names.index("long") - names.index("short") == 21
    assert names[: names.index("long")].count("runs") == 23
    assert names.count("runs") == 40


def test_a_request_that_is_cancelled_stops_at_the_next_token(generator):
    order, tickets = [], []

    def cancel(event):
        if isinstance(event, Piece) and [name for name, _ in order].count("one") == 3:
            tickets[0].cancel()

    with Engine(generator, 2) as engine:
        gate = Gate()
        engine.submit(request_of(generator, b"a", 1), gate)
        gate.reached.wait(20)
        one = request_of(generator, b"one", 100)
        tickets.append(engine.submit(one, log_into(order, "one", cancel)))
        other = engine.submit(request_of(generator, b"other", 50))
        gate.open.set()
        assert result(other)[0] == generator.complete(b"other", 50, seed=0).text
        assert engine.drain(20)
    assert order[-1] == ("one", Finished("cancelled", 4, 1, 3))
    assert len(order) == 4


def test_a_receiver_that_has_gone_cancels_its_request(generator):
    order = []

    def fail(event):
        raise RuntimeError("the loop is closed")

    with Engine(generator, 2) as engine:
        engine.submit(request_of(generator, b"gone", 600), log_into(order, "gone", fail))
        text, _ = result(engine.submit(request_of(generator, b"other")))
        assert text == generator.complete(b"other", 20, seed=0).text
        assert engine.drain(20)
    assert [type(event) for _, event in order] == [Piece, Finished]


def test_a_full_queue_says_when_to_come_back(generator):
    gate = Gate()
    with Engine(generator, 1, queue=2) as engine:
        engine.submit(request_of(generator, b"a", 1), gate)
        gate.reached.wait(20)
        waiting = [engine.submit(request_of(generator, b"b", 2)) for _ in range(2)]
        with pytest.raises(QueueFull, match="try again in") as caught:
            engine.submit(request_of(generator, b"c"))
        assert 1 <= caught.value.seconds < 60
        stats = engine.stats()
        assert (stats.running, stats.waiting, stats.slots, stats.requests) == (1, 2, 1, 3)
        # One that gives up makes room.
        waiting[0].cancel()
        gate.open.set()
        assert result(waiting[0]) == ("", Finished("cancelled", 2))
        assert result(waiting[1])[1].reason == "length"
        assert result(engine.submit(request_of(generator, b"c", 3)))[1].completion_tokens == 3


def test_a_drained_engine_ends_what_it_has_and_takes_no_more(generator):
    gate = Gate()
    engine = Engine(generator, 1)
    engine.submit(request_of(generator, b"a", 1), gate)
    gate.reached.wait(20)
    waiting = engine.submit(request_of(generator, b"b", 30))
    assert not engine.drain(0.01)
    with pytest.raises(Closed, match="no new requests"):
        engine.submit(request_of(generator, b"c"))
    gate.open.set()
    assert engine.drain(20)
    assert result(waiting)[0] == generator.complete(b"b", 30, seed=0).text
    engine.close()
    engine.close()
    with pytest.raises(Closed):
        engine.embed([1])


def test_an_engine_that_is_closed_cancels_what_it_has(generator):
    gate = Gate()
    engine = Engine(generator, 1)
    engine.submit(request_of(generator, b"a", 600), gate)
    gate.reached.wait(20)
    waiting = engine.submit(request_of(generator, b"b"))
    closing = threading.Thread(target=engine.close)
    closing.start()
    gate.open.set()
    assert result(waiting)[1].reason == "cancelled"
    closing.join(20)
    assert not closing.is_alive()
    # The model is open still.
    assert generator.complete(b"b", 3).tokens == 3


def test_an_error_of_one_request_ends_no_other(generator):
    class Broken(Nothing):
        def allowed(self):
            raise ValueError("a broken grammar")

    class BrokenLater(Nothing):
        def allowed(self):
            return np.ones(256, bool)

        def advance(self, token):
            raise ValueError("a token too much")

    class NothingLater(Nothing):
        left = 3

        def allowed(self):
            self.left -= 1
            return np.full(256, self.left >= 0)

    wrong = {Nothing: "not finite", Broken: "grammar", BrokenLater: "too much",
             NothingLater: "not finite"}  # fmt: skip
    with Engine(generator, 9) as engine:
        good = [engine.submit(request_of(generator, b"good", 60, seed=i)) for i in range(4)]
        bad = [
            engine.submit(request_of(generator, b"bad", 60, constraint=kind())) for kind in wrong
        ]
        for ticket, message in zip(bad, wrong.values(), strict=True):
            end = result(ticket)[1]
            assert end.reason == "error"
            assert message in end.message
        for i, ticket in enumerate(good):
            assert result(ticket)[0] == generator.complete(b"good", 60, seed=i).text


def test_many_threads_may_submit(generator):
    found = {}

    def work(number):
        for i in range(6):
            prompt = random_text(10 * i + 1, number)
            text, _ = result(engine.submit(request_of(generator, prompt, 10, seed=number)))
            found[number, i] = text == generator.complete(prompt, 10, seed=number).text
            engine.stats()

    with Engine(generator, 5) as engine:
        threads = [threading.Thread(target=work, args=(number,)) for number in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert len(found) == 120
    assert all(found.values())


def test_memory_is_flat(generator):
    def work(count):
        for start in range(0, count, 50):
            tickets = [
                engine.submit(
                    request_of(generator, random_text(40, i), 4, seed=i, logprobs=2,
                               presence_penalty=1.0)
                )
                for i in range(start, start + 50)
            ]  # fmt: skip
            for ticket in tickets[::7]:
                ticket.cancel()
            for ticket in tickets:
                result(ticket)

    with Engine(generator, 8) as engine:
        work(50)
        tracemalloc.start()
        try:
            work(50)
            gc.collect()
            before, _ = tracemalloc.get_traced_memory()
            work(1500)
            gc.collect()
            after, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert after < before + 20_000


# --- What a request asks for ----------------------------------------------------------------------


@pytest.mark.parametrize("stop", [("e",), ("\ufffd",), ("ab", "\n", "\ufffd\ufffd\ufffd")])
def test_stop_strings_and_characters_of_several_bytes(generator, stop):
    with Engine(generator, 4) as engine:
        for seed in range(10):
            text, end = result(
                engine.submit(request_of(generator, b"ab", 60, seed=seed, stop=stop))
            )
            alone = generator.complete(b"ab", 60, seed=seed, stop=stop)
            assert (text, end.completion_tokens) == (alone.text, alone.tokens)
            assert end.reason == ("stop" if alone.stopped else "length")


def test_the_context_ends_a_text(generator):
    with Engine(generator, 2, context=30) as engine:
        assert engine.context == 30
        for size in (1, 10, 28, 29):
            prompt = random_text(size)
            text, end = result(engine.submit(request_of(generator, prompt, 100)))
            count = 30 - len(generator.encode(prompt)) + 1
            assert end == Finished("length", 31 - count, end.cached_tokens, count)
            assert text == generator.complete(prompt, count, seed=0).text
        with pytest.raises(ValueError, match="prompt has 31 tokens, expected at most 30"):
            engine.submit(request_of(generator, random_text(30)))


def test_log_probabilities_are_those_of_the_raw_logits(generator):
    sampling = SamplingConfig(temperature=3.0, top_k=5)
    with Engine(generator, 3) as engine:
        tickets = [
            engine.submit(
                request_of(generator, b"ab", 12, sampling=sampling, logprobs=count, seed=i)
            )
            for i, count in enumerate((0, 1, 256))
        ]
        for ticket, count in zip(tickets, (0, 1, 256), strict=True):
            pieces = [event for event in ticket if isinstance(event, Piece)]
            decoder, new = generator.decoder(), generator.encode(b"ab")
            for piece in pieces:
                logits = decoder.prefill(new).astype(np.float64)
                exact = logits - np.logaddexp.reduce(logits)
                new = [piece.token]
                assert piece.logprob == pytest.approx(exact[piece.token], abs=1e-9)
                order = np.argsort(-exact, kind="stable")[:count]
                assert [token for token, _ in piece.top] == order.tolist()
                assert [value for _, value in piece.top] == pytest.approx(exact[order], abs=1e-9)
        (piece, _) = engine.submit(request_of(generator, b"ab", 1))
        assert (piece.logprob, piece.top) == (None, ())


def test_penalties_and_bias_are_openais(generator):
    """mu[j] - c[j] frequency - (c[j] > 0) presence, c the tokens sampled so far."""
    bias, frequency, presence = {3: 4.0, 9: -50.0}, 1.5, -2.0
    given = {"frequency_penalty": frequency, "presence_penalty": presence, "logit_bias": bias}
    sampling = SamplingConfig(repetition_penalty=1.3)
    prompt = generator.encode(b"abc")
    with Engine(generator, 2) as engine:
        other = engine.submit(request_of(generator, b"other", 40))
        found = tokens_of(engine.submit(GenerationRequest(prompt, 40, sampling, 5, **given)))
        assert result(other)[0] == generator.complete(b"other", 40, seed=0).text
    rng, decoder, new, history = np.random.default_rng(5), generator.decoder(), prompt, [*prompt]
    added, expected = np.zeros(256, np.float32), []
    for token, value in bias.items():
        added[token] = value
    for _ in range(40):
        logits = decoder.prefill(new)
        for token in set(history[-64:]):
            logits[token] *= np.float32(1.3) if logits[token] <= 0 else 1 / np.float32(1.3)
        counts = np.bincount(expected, minlength=256)
        penalties = counts * frequency + (counts > 0) * presence
        token = sample_token(logits + (added - penalties).astype(np.float32), rng, SamplingConfig())
        expected.append(token)
        history.append(token)
        new = [token]
    assert found == expected


def test_a_constraint_says_which_tokens_may_come_and_when_the_text_ends(generator):
    class Digits:
        def __init__(self):
            self.left = 7

        def allowed(self):
            allowed = np.zeros(256, bool)
            allowed[48:58] = True
            return allowed

        def advance(self, token):
            self.left -= 1
            return self.left == 0

    with Engine(generator, 2) as engine:
        other = engine.submit(request_of(generator, b"other", 40))
        request = request_of(generator, b"ab", 40, constraint=Digits(), frequency_penalty=2.0)
        text, end = result(engine.submit(request))
        assert result(other)[0] == generator.complete(b"other", 40, seed=0).text
    assert (len(text), text.isdecimal(), end.reason) == (7, True, "stop")


def test_embeddings_are_the_generators(generator):
    with Engine(generator, 2) as engine:
        runs = engine.submit(request_of(generator, b"runs", 200))
        for size in (1, 5, 128, 300):
            tokens = generator.encode(random_text(size))
            begins = generator.tokenizer.bos_token is not None
            expected = generator.embed(random_text(size))
            assert_same_bits(engine.embed(tokens)[int(begins) :], expected)
        events = list(engine.submit_embedding([1, 2, 3]))
        assert [type(event) for event in events] == [Embedding, Finished]
        assert events[-1] == Finished("stop", 3)
        assert result(runs)[0] == generator.complete(b"runs", 200, seed=0).text


def test_a_request_that_does_not_fit_is_refused(generator):
    good = {"tokens": [1], "max_tokens": 1}
    with Engine(generator, 2) as engine:
        for changes, error, message in (
            ({"tokens": []}, ValueError, "the prompt is empty"),
            ({"tokens": [256]}, IndexError, r"the prompt\[0\] is 256, expected 0 to 255"),
            ({"tokens": [0.5]}, TypeError, "expected whole numbers"),
            ({"tokens": [1] * 701}, ValueError, "has 701 tokens, expected at most 700"),
            ({"max_tokens": 0}, ValueError, "max_tokens is 0, expected 1 or more"),
            ({"max_tokens": 1.5}, TypeError, "float"),
            ({"seed": -1}, ValueError, "seed is -1, expected 0 or more"),
            ({"sampling": 0.5}, TypeError, "expected a SamplingConfig"),
            ({"stop": ("",)}, ValueError, "expected strings, none of them empty"),
            ({"logprobs": -1}, ValueError, "logprobs is -1, expected 0 to 256"),
            ({"logprobs": 257}, ValueError, "logprobs is 257, expected 0 to 256"),
            ({"presence_penalty": np.nan}, ValueError, "presence_penalty is nan, expected a fin"),
            ({"frequency_penalty": np.inf}, ValueError, "frequency_penalty is inf, expected a fin"),
            ({"logit_bias": {256: 1.0}}, IndexError, "token 256, expected 0 to 255"),
            ({"logit_bias": {1: np.inf}}, ValueError, "token 1 is inf, expected less"),
        ):
            with pytest.raises(error, match=message):
                engine.submit(GenerationRequest(**good | changes))
        with pytest.raises(IndexError, match="expected 0 to 255"):
            engine.embed([999])
        for sizes in ({"slots": 0}, {"slots": 129}, {"queue": -1}):
            with pytest.raises(ValueError, match=f"{next(iter(sizes))} is .*, expected"):
                Engine(generator, **sizes)
        assert result(engine.submit(GenerationRequest(**good)))[1].reason == "length"


def test_tokens_and_text(generator):
    with Engine(generator, 1) as engine:
        text = "caf\u00e9\n"
        assert engine.detokenize(engine.tokenize(text)) == text
        assert engine.detokenize([0xC3]) == "\ufffd"
        assert engine.detokenize([]) == ""
        with pytest.raises(IndexError, match="expected 0 to 255"):
            engine.detokenize([256])


def test_a_ticket_waits_no_longer_than_it_is_told_to(generator):
    gate = Gate()
    with Engine(generator, 1) as engine:
        engine.submit(request_of(generator, b"a", 1), gate)
        ticket = engine.submit(request_of(generator, b"b", 1))
        with pytest.raises(TimeoutError, match=r"no event in 0\.01 s"):
            ticket.get(0.01)
        gate.open.set()
        assert isinstance(ticket.get(20), Piece)
