"""The training loop: what it measures, that it repeats to the bit, that no crash loses a run."""

import copy
import errno
import gc
import itertools
import json
import math
import os
import pickle
import re
import shutil
import signal
import stat
import struct
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from helpers.arrays import UNIT_ROUNDOFF, assert_close, assert_same_bits, gamma
from helpers.runs import (
    PAD,
    RECORD_KEYS,
    RUN_FILES,
    STEPS,
    TEXT,
    assert_same_files,
    assert_same_state,
    callback_of,
    contents,
    documents_corpus,
    header_of,
    make,
    measured,
    newest,
    resumed,
    state_of,
    train,
    with_losses,
)
from legacy1bit import logger
from legacy1bit.backward import ignore_padding
from legacy1bit.data import stories
from legacy1bit.data.corpus import Corpus, story_corpus
from legacy1bit.data.shards import TokenStore
from legacy1bit.data.tokenizer import UnknownTokenizer
from legacy1bit.dataset import TokenDataset
from legacy1bit.formats.native import BEST_FOLDER, CHECKPOINT_FILE, WEIGHTS_FILE
from legacy1bit.forward import forward_llm_batch
from legacy1bit.generator import Generator
from legacy1bit.hyperparams import OPTIMIZERS, SETTINGS_FILE, DataConfig, ModelConfig
from legacy1bit.logger import METRICS_FILE, MetricsLogger, read_metrics
from legacy1bit.math_ops import fastest_precision, product_precisions, simd_level
from legacy1bit.model import (
    ModelFileError,
    create_legacy_llm,
    load_model,
)
from legacy1bit.schemes import FLOAT, SCHEMES
from legacy1bit.training import evaluation, trainer
from legacy1bit.training import run as training_run
from legacy1bit.training.checkpoint import (
    best_is_missing,
    newest_checkpoint,
)
from legacy1bit.training.divergence import TrainingDiverged
from legacy1bit.training.evaluation import Metrics, code_fractions, evaluate, recall_of_heroes
from legacy1bit.training.run import EARLIER_FILE, Run
from legacy1bit.training.trainer import Trainer

# --- Measuring ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    config = ModelConfig(model_dim=16, num_blocks=1, num_heads=2, sequence_length=16)
    model = create_legacy_llm(config, 1)
    rng = np.random.default_rng(2)
    for weights in model.latent.values():
        if weights.ndim == 2:
            weights[...] = rng.normal(0, 0.3, weights.shape)
    model.quantize()
    return model


def reference(model, batches):
    """Loss and shares of a sweep, one token at a time in float64."""
    surprises, ranks = [], []
    for tokens, targets, *_ in batches:
        probabilities = forward_llm_batch(model, tokens).astype(np.float64)
        for row in range(tokens.shape[0]):
            for time in range(tokens.shape[1]):
                token, target = tokens[row, time], targets[row, time]
                if PAD in (token, target):
                    continue
                p = probabilities[row, time]
                surprises.append(-math.log(p[target] / p.sum()))
                ranks.append(int((p > p[target]).sum()))
    shares = [sum(rank < k for rank in ranks) / len(ranks) for k in (1, 3, 5)]
    return math.fsum(surprises) / len(surprises), shares, len(surprises)


DATASETS = {
    "text": lambda: TokenDataset(
        TokenStore([np.frombuffer(TEXT[:500], np.uint8).astype(np.int32)]), 16, PAD
    ),
    "ragged": lambda: TokenDataset(
        TokenStore([np.frombuffer(TEXT[:50], np.uint8).astype(np.int32)]), 16, PAD
    ),
    "stories": lambda: story_corpus(2, 40, 3, 16, PAD).validation,
    "noise": lambda: TokenDataset(
        TokenStore([np.random.default_rng(0).integers(0, 256, 700).astype(np.int32)]), 16, PAD
    ),
}


@pytest.mark.parametrize("name", DATASETS)
def test_evaluate_agrees_with_float64(model, name):
    dataset = DATASETS[name]()
    metrics = evaluate(model, dataset)
    loss, shares, count = reference(model, dataset.sweep(32))
    # A probability is within a few hundred roundings of a sum over 256 tokens, and so its log.
    assert_close(metrics.loss, loss, rtol=0, atol=2e-5)
    assert (metrics.top1, metrics.top3, metrics.top5) == tuple(shares)
    assert metrics.tokens == count


def test_evaluate_measures_each_token_once(model):
    dataset = DATASETS["text"]()
    assert evaluate(model, dataset).tokens == dataset.tokens.size - 1


def test_evaluate_does_not_see_padding(model):
    """A model whose probability of what stands in the padding changes is as good as before."""
    dataset = DATASETS["ragged"]()
    assert any((tokens == PAD).any() for tokens, *_ in dataset.sweep(32))
    tokens = np.concatenate([dataset.tokens.read(0, 1 << 20), np.full(100, PAD, np.int32)])
    longer = TokenDataset(TokenStore([tokens]), dataset.sequence_length, PAD)
    one, other = evaluate(model, dataset), evaluate(model, longer)
    assert one.tokens == other.tokens
    assert_close(one.loss, other.loss, rtol=1e-12, atol=0)
    assert (one.top1, one.top3, one.top5) == (other.top1, other.top3, other.top5)


def test_evaluate_refuses_a_dataset_of_padding(model):
    with pytest.raises(ValueError, match="nothing to measure"):
        evaluate(model, TokenDataset(TokenStore([np.full(40, PAD, np.int32)]), 8, PAD))


def test_evaluate_has_the_same_bits_for_any_number_of_threads(model):
    dataset = DATASETS["noise"]()
    assert evaluate(model, dataset, 1) == evaluate(model, dataset, 2) == evaluate(model, dataset, 7)


@pytest.mark.parametrize("limit", [1, 16, 100, 250])
def test_evaluate_limit_measures_about_so_many_tokens(model, limit):
    dataset = DATASETS["noise"]()
    metrics = evaluate(model, dataset, limit=limit)
    loss, shares, count = reference(model, dataset.sweep(32, limit))
    assert limit / 2 <= metrics.tokens <= 2 * limit + 16
    assert metrics.tokens == count
    assert_close(metrics.loss, loss, rtol=0, atol=2e-5)
    assert (metrics.top1, metrics.top3, metrics.top5) == tuple(shares)


def with_logits(monkeypatch, logits_of):
    """Let every model give the logits of ``logits_of(rows)``."""

    def forward(model, rows, threads=1, logits=False, starts=None):
        assert logits
        return logits_of(rows).astype(np.float32)

    monkeypatch.setattr(evaluation, "forward_llm_batch", forward)


def following(rows):
    """The token behind each, 0 behind the last."""
    return np.concatenate([rows[:, 1:], np.zeros_like(rows[:, :1])], axis=1) % 256


def one_hot(tokens, height=20.0):
    return height * (np.arange(256) == tokens[..., None])


def test_evaluate_of_a_perfect_model(monkeypatch, model):
    with_logits(monkeypatch, lambda rows: one_hot(following(rows), 40.0))
    metrics = evaluate(model, TokenDataset(TokenStore([np.arange(1, 18, dtype=np.int32)]), 16, PAD))
    # What follows the last token of a row is not in the row: only there the model is wrong.
    assert metrics.tokens == 16
    assert metrics.top1 == 15 / 16
    assert_close(metrics.loss, 40.0 / 16, rtol=1e-6, atol=0)


@pytest.mark.parametrize("rank", range(7))
def test_evaluate_counts_ranks(monkeypatch, model, rank):
    """The true token comes behind ``rank`` others."""
    shares = [float(rank < k) for k in (1, 3, 5)]
    order = -np.arange(256.0)
    dataset = TokenDataset(TokenStore([np.full(17, rank, np.int32)]), 16, PAD)
    with_logits(monkeypatch, lambda rows: np.broadcast_to(order, (*rows.shape, 256)))
    metrics = evaluate(model, dataset)
    assert [metrics.top1, metrics.top3, metrics.top5] == shares
    assert_close(metrics.loss, rank + np.log(np.exp(order).sum()), rtol=1e-6, atol=0)


def test_evaluate_gives_no_more_than_k_tokens_the_first_k_ranks(monkeypatch, model):
    """Every token in turn is the true one, and to the model all are alike.

    However a tie is broken, at most k of 256 tokens are among the k likeliest.
    """
    with_logits(monkeypatch, lambda rows: np.zeros((*rows.shape, 256)))
    dataset = TokenDataset(TokenStore([np.arange(257, dtype=np.int32) % 256]), 16, PAD)
    metrics = evaluate(model, dataset)
    assert metrics.tokens == 256
    assert_close(metrics.loss, math.log(256), rtol=1e-6, atol=0)
    assert metrics.top1 <= 1 / 256
    assert metrics.top3 <= 3 / 256
    assert metrics.top5 <= 5 / 256


def test_evaluate_does_not_praise_a_model_without_numbers(monkeypatch, model):
    """Logits of NaN are refused, or at least no token is found among them."""
    with_logits(monkeypatch, lambda rows: np.full((*rows.shape, 256), np.nan))
    try:
        with np.errstate(all="ignore"):
            metrics = evaluate(model, DATASETS["text"]())
    except ValueError:
        return
    assert (metrics.top1, metrics.top3, metrics.top5) == (0.0, 0.0, 0.0)


def test_metrics_derive_from_the_loss():
    metrics = Metrics(math.log(8.0), 0.25, 0.5, 0.75, 100, 100)
    assert metrics.perplexity == pytest.approx(8.0)
    assert metrics.bits_per_byte == pytest.approx(3.0)
    assert metrics.record() == {
        "val_loss": metrics.loss,
        "val_tokens": 100,
        "val_bytes": 100,
        "perplexity": metrics.perplexity,
        "bits_per_byte": metrics.bits_per_byte,
        "top1": 0.25,
        "top3": 0.5,
        "top5": 0.75,
    }
    assert Metrics(1e5, 0.0, 0.0, 0.0, 1, 1).perplexity == math.inf


# --- Heroes ---------------------------------------------------------------------------------------

TOLD = tuple(stories.generate_stories(50, 4))


def hero_spans(rows):
    """For each row of tokens, the columns at which its last sentence's hero is predicted."""
    result = []
    for row in rows:
        text = bytes(row[row != PAD].astype(np.uint8)).decode()[1:]
        story = next(story for story in TOLD if story.startswith(text))
        result.append([range(e.start, e.stop) for e in stories.endings(story) if e.kind == "hero"])
    return result


def ask(monkeypatch, change=lambda guess, rows: None, told=TOLD, length=256):
    """The recall of a model that knows what follows, but for what ``change`` makes of it."""

    def logits_of(rows):
        guess = following(rows)
        change(guess, rows)
        return one_hot(guess)

    with_logits(monkeypatch, logits_of)
    model = SimpleNamespace(config=ModelConfig(sequence_length=length))
    return recall_of_heroes(model, told)


def miss_all(guess, rows):
    guess[...] = (guess + 1) % 256


def miss_all_but_heroes(guess, rows):
    right = guess.copy()
    miss_all(guess, rows)
    for row, spans in enumerate(hero_spans(rows)):
        for span in spans:
            guess[row, span] = right[row, span]


def miss_letter(place):
    def change(guess, rows):
        for row, spans in enumerate(hero_spans(rows)):
            for span in spans:
                guess[row, span[place]] = ord("?")

    return change


def test_recall_of_a_perfect_model(monkeypatch):
    assert ask(monkeypatch) == 1.0
    assert ask(monkeypatch, miss_all_but_heroes) == 1.0


@pytest.mark.parametrize("change", [miss_all, miss_letter(0), miss_letter(1), miss_letter(-1)])
def test_recall_of_a_model_that_misses_a_letter(monkeypatch, change):
    assert ask(monkeypatch, change) == 0.0


def test_recall_is_the_share_of_right_endings(monkeypatch):
    """A model that believes in one hero is right about his stories."""
    names = [stories.parse(story).words["hero"] for story in TOLD]
    favourite = max(set(names), key=names.count)

    def change(guess, rows):
        for row, spans in enumerate(hero_spans(rows)):
            for span in spans:
                if bytes(guess[row, span].astype(np.uint8)).decode() != favourite:
                    guess[row, span[0]] = ord(favourite[0])
                    guess[row, span[-1]] = ord("?")

    heroes = [
        stories.parse(story).words["hero"]
        for story in TOLD
        for ending in stories.endings(story)
        if ending.kind == "hero"
    ]
    expected = heroes.count(favourite) / len(heroes)
    assert 0 < expected < 1
    assert ask(monkeypatch, change) == pytest.approx(expected)


def test_recall_asks_nothing_beyond_the_context(monkeypatch):
    assert ask(monkeypatch, length=8) == 0.0
    assert ask(monkeypatch, told=()) == 0.0
    (story,) = TOLD[:1]
    stop = max(ending.stop for ending in stories.endings(story) if ending.kind == "hero")
    # The name's last letter must be in the context to be compared with.
    assert ask(monkeypatch, told=(story,), length=stop + 1) == 1.0


def test_recall_of_an_untrained_model_is_low():
    config = ModelConfig(model_dim=8, num_blocks=1, num_heads=1)
    assert recall_of_heroes(create_legacy_llm(config, 0), TOLD) < 0.1


# --- Training -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("outer_tier")
@pytest.mark.parametrize("threads", [1, 2])
def test_training_repeats_to_the_bit(tmp_path, threads):
    first, second = (make(tmp_path / name, threads=threads) for name in "ab")
    (_, losses, records), (_, again, copies) = train(first), train(second)
    assert losses == again
    assert measured(records) == measured(copies)
    assert_same_state(state_of(first), state_of(second))


def test_training_differs_by_seed(tmp_path):
    runs = [train(make(tmp_path / str(seed), seed=seed)) for seed in (1, 2, 3)]
    for step in range(STEPS):
        assert len({losses[step] for _, losses, _ in runs}) == 3


def test_training_does_not_depend_on_when_it_measures(tmp_path):
    often, seldom = (make(tmp_path / str(every), evaluate_every=every) for every in (1, 100))
    assert train(often)[1] == train(seldom)[1]
    assert_same_state(state_of(often), state_of(seldom))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("scheme", [*SCHEMES, FLOAT])
def test_training_learns(tmp_path, optimizer, scheme):
    rates = {"muon": 1e-2, "adamw": 1e-2, "sgd": 0.1}
    run = make(
        tmp_path / "run",
        b"abcdefgh" * 60,
        optimizer=optimizer,
        scheme=scheme,
        steps=150,
        learning_rate=rates[optimizer],
        evaluate_every=150,
    )
    _, losses, records = train(run)
    assert losses[0] == pytest.approx(math.log(256), abs=0.1)
    assert records[-1]["val_loss"] < 0.5
    assert records[-1]["top1"] > 0.9


def recording_norms(run):
    """A list that gets the norm of every step's gradient."""
    norms, take = [], run.train_step

    def train_step():
        loss, norm = take()
        norms.append(norm)
        return loss, norm

    run.train_step = train_step
    return norms


def test_train_records_what_it_measures(tmp_path):
    run = make(tmp_path / "run")
    norms = recording_norms(run)
    done, losses, records = train(run)
    assert done
    assert run.step == len(losses) == STEPS
    assert [record["step"] for record in records] == [5, 10, 12]
    assert read_metrics(run.folder / METRICS_FILE) == records
    before = 0
    for record in records:
        assert tuple(record) == RECORD_KEYS
        part = losses[before : record["step"]]
        assert record["train_loss"] == pytest.approx(sum(part) / len(part))
        part = norms[before : record["step"]]
        assert record["gradient_norm"] == pytest.approx(sum(part) / len(part))
        assert record["full_precision"] is False
        assert record["perplexity"] == pytest.approx(math.exp(record["val_loss"]))
        assert record["bits_per_byte"] == pytest.approx(record["val_loss"] / math.log(2))
        assert record["learning_rate"] == run.config.learning_rate_at(record["step"] - 1)
        assert record["tokens_per_second"] > 0
        before = record["step"]
    seconds = [record["elapsed_seconds"] for record in records]
    assert 0 < seconds[0] < seconds[1] < seconds[2]
    final = evaluate(load_model(run.folder), run.corpus.validation)
    assert run.metrics == final
    assert records[-1]["val_loss"] == final.loss
    assert records[-1]["val_tokens"] == final.tokens == run.corpus.validation.tokens.size - 1


def test_training_loss_is_recorded_every_few_steps(tmp_path):
    run = make(tmp_path / "run", steps=38, evaluate_every=25)
    _, losses, _ = train(run, stop_at=31)
    run = resumed(run.folder, steps=38, evaluate_every=25)
    losses += train(run)[1]
    records = read_metrics(run.folder / METRICS_FILE)
    points = [record["train_losses"] for record in records]
    assert [[step for step, _ in part] for part in points] == [[10, 20, 25], [30, 31], [38]]
    begin = 0
    for end, loss in itertools.chain(*points):
        assert loss == pytest.approx(math.fsum(losses[begin:end]) / (end - begin), rel=1e-14)
        begin = end
    assert begin == len(losses)


@pytest.mark.parametrize(
    ("step", "count", "every", "steps"),
    [
        (1, 1, 250, [1]),
        (9, 2, 250, [9]),
        (10, 10, 250, [10]),
        (250, 250, 250, [*range(10, 251, 10)]),
        (5000, 2500, 2500, [*range(2550, 5001, 50)]),
        (2600, 100, 2501, [2550, 2600]),
        (4, 2, 2, [4]),
    ],
)
def test_points_of_the_training_loss_are_few_enough(step, count, every, steps):
    losses = [float(n) for n in range(step - count + 1, step + 1)]
    points = trainer._Statistics(losses).train_losses(step, every)
    assert len(points) <= 51
    assert [at for at, _ in points] == steps
    begin = step - count
    for end, loss in points:
        assert loss == (begin + 1 + end) / 2
        begin = end
    assert begin == step


def test_step_gives_the_norm_of_its_gradient(tmp_path):
    """The whole gradient's, before clipping."""
    run = make(tmp_path / "run", clip=1e-3)
    for _ in range(3):
        _, norm = run.train_step()
        gradient = run.gradients.flat.astype(np.float64)
        # Squares are added up in float32, up to 1,024 of them.
        assert_close(norm, math.sqrt(math.fsum(gradient**2)), rtol=gamma(1024), atol=0)


def test_train_measures_as_much_as_it_is_told_at_the_end_only(tmp_path, monkeypatch):
    """And at the end the sample, too, by which the best model is found."""
    limits = []

    def measure(model, dataset, threads, limit, tokenizer, stop, ranks):
        limits.append(limit)
        return evaluate(model, dataset, threads, limit)

    monkeypatch.setattr(trainer, "evaluate", measure)
    train(make(tmp_path / "run"))
    assert limits == [16384, 16384, 16384, 1 << 20]


def test_measuring_ends_when_told(model):
    dataset = TokenDataset(TokenStore([np.arange(40_000, dtype=np.int32) % 256]), 16, PAD)
    asked = []

    def stop():
        asked.append(None)
        return len(asked) == 2

    some = evaluate(model, dataset, stop=stop)
    assert len(asked) == 2
    first = TokenDataset(dataset.tokens.window(0, some.tokens + 1), 16, PAD)
    assert evaluate(model, first) == some
    assert evaluate(model, dataset).tokens > 5 * some.tokens


@pytest.mark.parametrize("step", [1, 5, 7, 11])
def test_train_stops_when_told_and_saves(tmp_path, step):
    run = make(tmp_path / "run")
    done, losses, records = train(run, stop_at=step)
    assert not done
    assert len(losses) == run.step == step
    assert records[-1]["step"] == step
    again = make(tmp_path / "run")
    again.restore(newest(again))
    assert again.step == step
    assert_same_state(state_of(again), state_of(run))


def test_train_told_to_stop_at_the_last_step_is_done(tmp_path):
    done, _, records = train(make(tmp_path / "run"), stop_at=STEPS)
    assert done
    assert [record["step"] for record in records] == [5, 10, 12]


# --- Going on -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheme", "optimizer", "threads"),
    [
        *zip((*SCHEMES, FLOAT), itertools.cycle(OPTIMIZERS), itertools.repeat(1)),
        *(("ternary", "muon", 2), (FLOAT, "adamw", 2), ("sign", "sgd", 2)),
    ],
)
def test_restored_run_ends_like_an_unbroken_one(tmp_path, optimizer, scheme, threads):
    settings = {"optimizer": optimizer, "scheme": scheme, "threads": threads}
    whole = make(tmp_path / "whole", **settings)
    _, losses, records = train(whole)
    parts, stops = [], (1, 4, 9, None)
    for stop in stops:
        run = make(tmp_path / "parts", **settings)
        if parts:
            run.restore(newest(run))
        parts += train(run, stop)[1]
    assert parts == losses
    assert_same_state(state_of(run), state_of(whole))
    assert run.metrics == whole.metrics
    kept = read_metrics(run.folder / METRICS_FILE)
    assert [record["step"] for record in kept] == [1, 4, 5, 9, 10, 12]
    for key in ("val_loss", "top1", "learning_rate"):
        assert kept[-1][key] == records[-1][key]
    assert_same_state(*(load_file(r.folder / "model.safetensors") for r in (run, whole)))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_restored_run_of_eight_bits_ends_like_an_unbroken_one(tmp_path, optimizer, threads):
    settings = {"optimizer": optimizer, "optimizer_bits": 8, "threads": threads}
    settings |= {"gradient_checkpointing": True}
    whole = make(tmp_path / "whole", **settings)
    losses = train(whole)[1]
    run = make(tmp_path / "run", **settings)
    parts = train(run, stop_at=5)[1]
    stored = load_file(run.run.checkpoint_file)
    assert {name: str(values.dtype) for name, values in stored.items()} == {
        **dict.fromkeys(("weights", "first_scales", "second_scales"), "float32"),
        **dict.fromkeys(("first", "second"), "uint8"),
    }
    for name, values in run.optimizer.moments.items():
        assert_same_bits(stored[name], values, name)
    run = resumed(tmp_path / "run", **settings)
    parts += train(run)[1]
    assert parts == losses
    assert_same_state(state_of(run), state_of(whole))
    assert_same_files(tmp_path / "run", tmp_path / "whole")
    assert losses != train(make(tmp_path / "other", **settings | {"optimizer_bits": 32}))[1]


def test_restored_run_forgets_what_came_after_its_checkpoint(tmp_path):
    """As after a crash between two checkpoints, when the file of metrics is ahead."""
    run = make(tmp_path / "run")
    train(run, stop_at=5)
    MetricsLogger(run.folder, 5).log({"step": 9, "val_loss": 0.0})
    again = make(tmp_path / "run")
    again.restore(newest(again))
    train(again)
    assert [r["step"] for r in read_metrics(run.folder / METRICS_FILE)] == [5, 10, 12]


def test_restored_run_goes_on_counting_seconds(tmp_path):
    run = make(tmp_path / "run")
    train(run, stop_at=5)
    again = make(tmp_path / "run")
    again.restore(newest(again))
    assert again.seconds == run.seconds > 0
    _, _, records = train(again)
    assert records[0]["elapsed_seconds"] > run.seconds


class Other:
    """An object, some of whose methods are others."""

    def __init__(self, whole, **methods):
        self.__dict__.update(methods, _whole=whole)

    def __getattr__(self, name):
        return getattr(self._whole, name)

    def __setattr__(self, name, value):
        setattr(self._whole, name, value)


def interrupt(run, monkeypatch, where):
    """Have a training on its way to step 8, or at its look after step 5 or 12, interrupted once."""
    left = [1]

    def strike():
        if left:
            left.pop()
            if where == "the signal":
                os.kill(os.getpid(), signal.SIGINT)
            else:
                raise KeyboardInterrupt

    def at(step, call, first=True):
        def run_it(*arguments, **options):
            if first and run.step == step:
                strike()
            done = call(*arguments, **options)
            if not first and run.step == step:
                strike()
            return done

        return run_it

    if where in ("the pass", "the signal"):
        run.passes = Other(run.passes, run=at(7, run.passes.run))
    elif where in ("before the update", "behind the update"):
        first = where == "before the update"
        run.optimizer = Other(run.optimizer, step=at(7, run.optimizer.step, first))
    elif where == "the batch":
        monkeypatch.setattr(run, "_next_batch", at(7, run._next_batch, False))
    elif where == "the step":
        monkeypatch.setattr(run, "train_step", at(7, run.train_step))
    elif where in ("the look", "the last look"):
        step = STEPS if where == "the last look" else 5
        monkeypatch.setattr(trainer, "evaluate", at(step, evaluate))
    else:
        monkeypatch.setattr(trainer, "write_checkpoint", at(5, trainer.write_checkpoint))


@pytest.mark.parametrize(
    ("where", "step", "order"),
    [
        ("the step", 7, "windows"),
        ("the batch", 7, "epochs"),
        ("the pass", 7, "windows"),
        ("the signal", 7, "epochs"),
        ("before the update", 7, "windows"),
        ("behind the update", 8, "epochs"),
        ("the look", 5, "windows"),
        ("the save", 5, "epochs"),
        ("the last look", 12, "windows"),
    ],
)
def test_interrupted_training_saves_its_last_whole_step(tmp_path, monkeypatch, order, where, step):
    """As in a notebook; and it can go on from there, in the same process or in another."""
    data = DataConfig(order=order, case_noise=0.5)
    whole = make(tmp_path / "whole", data=data)
    train(whole)
    runs = [make(tmp_path / name, data=data) for name in ("here", "there")]
    for run in runs:
        with monkeypatch.context() as patch:
            interrupt(run, patch, where)
            with pytest.raises(KeyboardInterrupt):
                train(run)
        saved = newest(run)
        assert saved.step == run.step == step
        assert saved.position == run.position
        assert Run(run.folder).settings().training == run.config
        assert not list(run.folder.glob(".*"))
    again = make(tmp_path / "there", data=data)
    again.restore(newest(again))
    for run in (runs[0], again):
        train(run)
        assert_same_state(state_of(run), state_of(whole))
        assert run.position == whole.position


def test_training_that_is_interrupted_when_it_stops_already_ends_at_once(tmp_path, monkeypatch):
    """As by a second Ctrl-C where the first was taken for a request."""
    run, requested = make(tmp_path / "run"), []

    def train_step():
        if run.step == 7:
            requested.append(True)
            raise KeyboardInterrupt
        return step()

    step = run.train_step
    monkeypatch.setattr(run, "train_step", train_step)
    run.folder.mkdir()
    with pytest.raises(KeyboardInterrupt):
        run.train(MetricsLogger(run.folder), callback_of(should_stop=lambda: bool(requested)))
    assert newest(run).step == 5


def test_training_that_is_interrupted_before_its_first_step_saves_nothing(tmp_path, monkeypatch):
    run = make(tmp_path / "run")

    def train_step():
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "train_step", train_step)
    with pytest.raises(KeyboardInterrupt):
        train(run)
    assert {path.name for path in run.folder.iterdir()} == {METRICS_FILE}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({}, "the source's name is None, expected a text, as in {'name': 'my text'}"),
        ({"name": 3}, "the source's name is 3, expected"),
        ({"name": "x", "path": Path("x")}, "cannot be stored as JSON: .*PosixPath"),
        ({"name": "x", "parts": (1, 2)}, r"would be read back as .*\[1, 2\]"),
        ({"name": "x", 1: 2}, "would be read back as"),
        ({"name": "x", "share": math.nan}, "would be read back as"),
    ],
)
def test_trainer_refuses_a_source_that_it_could_not_save(tmp_path, source, message):
    run = make(tmp_path / "run")
    with pytest.raises(ValueError, match=message):
        Trainer(run.folder, run.model.config, run.config, run.corpus, source)


def test_trainer_takes_a_folder_as_text(tmp_path):
    run = make(tmp_path / "run")
    again = Trainer(str(run.folder), run.model.config, run.config, run.corpus, run.source)
    assert train(again)[0]
    assert newest(again).step == STEPS


@pytest.mark.parametrize("which", ["training", "validation"])
def test_trainer_refuses_a_corpus_of_other_tokens_than_the_models(tmp_path, which):
    """The validation set would fail at the first look only."""
    run = make(tmp_path / "run")
    dataset = replace(getattr(run.corpus, which), pad_token=300)
    corpus = replace(run.corpus, **{which: dataset})
    with pytest.raises(ValueError, match="has 300 tokens, and the model 256"):
        Trainer(run.folder, run.model.config, run.config, corpus, run.source)


@pytest.mark.parametrize("what", ["tokenizer", "file", "small", "unknown size", "goes on"])
def test_train_tries_whether_it_can_save_before_it_begins(tmp_path, monkeypatch, what):
    run = make(tmp_path / "run")
    monkeypatch.setattr(run, "_train", lambda *_: "it begins")
    sizes = (0, 0, 0) if what == "unknown size" else (10**6, 10**6, 10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: sizes)
    expected = None
    if what == "goes on":
        run.save()
    elif what == "tokenizer":
        run.tokenizer = UnknownTokenizer(PAD)
        monkeypatch.setattr(run.tokenizer, "save", run.tokenizer.encode, raising=False)
        expected = ValueError
    elif what == "file":
        run.folder.write_text("not a folder")
        expected = NotADirectoryError
    elif what == "small":
        expected = OSError
    arguments = (None,)
    if expected is None:
        assert run.train(*arguments) == "it begins"
    else:
        with pytest.raises(expected) as failure:
            run.train(*arguments)
        if what != "tokenizer":
            assert failure.value.filename == str(run.folder)
        if what == "small":
            least = 12 * run.model.num_parameters
            assert failure.value.errno == errno.ENOSPC
            assert (
                int(re.search("takes ([0-9,]+) bytes", str(failure.value))[1].replace(",", ""))
                > least
            )
    if what != "file":
        assert not list(run.folder.glob(".*"))


def test_saved_run_holds_all_that_it_needs(tmp_path):
    run = make(tmp_path / "deep" / "run", seed=7)
    run.save()
    names = {path.name for path in run.folder.iterdir() if path.is_file()}
    assert names == RUN_FILES
    run.save()
    names = {path.name for path in run.folder.iterdir() if path.is_file()}
    assert names == {*RUN_FILES, EARLIER_FILE}
    assert Run(run.folder).settings() == run.settings
    loaded = load_model(run.folder)
    tokens = np.arange(8, dtype=np.int32)[None]
    assert_same_bits(forward_llm_batch(loaded, tokens), forward_llm_batch(run.model, tokens))


# --- Where in the data ----------------------------------------------------------------------------

ALL_CHANGES = {
    "token_dropout": 0.1,
    "span_masking": 0.1,
    "subword_splitting": 0.2,
    "case_noise": 0.2,
    "space_noise": 0.2,
}

DATA = {
    "windows": {},
    "windows apart": {"document_mask": True},
    "epochs": {"order": "epochs"},
    "epochs apart": {"order": "epochs", "document_mask": True},
    "packed": {"order": "packed"},
    "packed apart": {"order": "packed", "document_mask": True},
    "packed, less read": {"order": "packed", "document_mask": True, "token_dropout": 0.2},
    **{name: {"order": "epochs", "tokenizer": "bpe", name: 0.3} for name in ALL_CHANGES},
    "all changes": {"order": "windows", "tokenizer": "bpe", **ALL_CHANGES},
    "all changes of bytes": {"order": "epochs", **ALL_CHANGES},
}
every_data = pytest.mark.parametrize("name", DATA)


def recording_batches(run):
    """A list that gets every batch that a run learns from."""
    batches, take = [], run._next_batch

    def next_batch():
        batches.append(take())
        return batches[-1]

    run._next_batch = next_batch
    return batches


def assert_same_batches(one, other):
    assert len(one) == len(other)
    for first, second in zip(one, other, strict=True):
        for part, expected in zip(first, second, strict=True):
            assert (part is None) == (expected is None)
            if part is not None:
                assert_same_bits(part, expected)


@every_data
def test_run_goes_on_where_it_was_in_the_data(tmp_path, name):
    """Passes end on the way: 12 steps of 6 rows are more than the documents have."""
    settings = {"data": DataConfig(**DATA[name]), "gradient_accumulation": 2}
    whole = make(tmp_path / "whole", **settings)
    expected = recording_batches(whole)
    losses = train(whole)[1]
    parts, found = [], []
    for stop in (1, 4, 10, None):
        run = make(tmp_path / "parts", **settings)
        if parts:
            run.restore(newest(run))
        batches = recording_batches(run)
        parts += train(run, stop)[1]
        found += batches
    assert_same_batches(found, expected)
    assert parts == losses
    assert_same_state(state_of(run), state_of(whole))
    assert run.position == whole.position == run.reader.position
    assert run.metrics == whole.metrics
    assert run.best == whole.best


def test_trainer_keeps_the_warm_up_that_it_began_with(tmp_path):
    run = make(tmp_path / "run", steps=20, warmup_steps=None)
    assert run.config.warmup_steps == 2
    run.save()
    training = Run(run.folder).settings().training
    assert training.warmup_steps == 2
    assert replace(training, steps=2000).learning_rate_at(1) == training.learning_rate


@every_data
def test_record_tells_how_much_is_padding(tmp_path, name):
    run = make(tmp_path / "run", data=DataConfig(**DATA[name]), gradient_accumulation=2)
    batches = recording_batches(run)
    _, _, records = train(run)
    for record, (begin, end) in zip(records, [(0, 5), (5, 10), (10, 12)], strict=True):
        lost = [
            (ignore_padding(b.tokens, b.targets, run.model.config.pad_token) < 0).mean()
            for b in batches[begin:end]
        ]
        assert record["padding"] == pytest.approx(sum(lost) / len(lost), rel=1e-12)
    if name.startswith("windows"):
        assert all(record["padding"] == 0 for record in records)
    if name.startswith("packed"):
        assert any(record["padding"] > 0 for record in records)


def test_record_of_padding_begins_anew_with_a_restored_run(tmp_path):
    settings = {"data": DataConfig(order="packed"), "batch_size": 11}
    _, _, records = train(make(tmp_path / "whole", **settings))
    assert len({record["padding"] for record in records}) == 3
    run = make(tmp_path / "run", **settings)
    train(run, stop_at=5)
    for _ in range(3):
        run.train_step()
    run.restore(newest(run))
    assert [r["padding"] for r in train(run)[2]] == [r["padding"] for r in records[1:]]


@pytest.mark.parametrize("name", ["windows", "epochs apart", "packed apart", "all changes"])
def test_batches_do_not_depend_on_the_threads(tmp_path, name):
    runs = [
        make(tmp_path / str(threads), data=DataConfig(**DATA[name]), threads=threads)
        for threads in (1, 2)
    ]
    one, other = map(recording_batches, runs)
    for run in runs:
        train(run)
    assert_same_batches(one, other)


@every_data
def test_validation_is_never_changed(tmp_path, name):
    data = DataConfig(**DATA[name])
    run = make(tmp_path / "run", data=data)
    _, _, records = train(run)
    untouched = documents_corpus(data, 8).validation
    metrics = evaluate(run.model, untouched, tokenizer=run.tokenizer)
    assert run.metrics == metrics
    assert records[-1]["val_loss"] == metrics.loss


POSITIONS = {
    "none": "[]",
    "null": "null",
    "word": '"5"',
    "number": "5",
    "names": '{"5": 5}',
    "no JSON": "[5",
    "fraction": "[5.5]",
    "true": "[true]",
    "text": '["5"]',
    "negative": "[-5]",
    "huge": "[" + "9" * 40 + "]",
    "not finite": "[NaN]",
    "deep": "[" * 100_000,
    "lists": "[[5]]",
    "three of one": "[0, 0, 0]",
    "two": "[0, 0]",
}
BAD_POSITIONS = [
    *((order, name) for order in ("windows", "epochs") for name in POSITIONS),
    *(("packed", name) for name in POSITIONS if name != "three of one"),
]
PACKED_POSITIONS = {
    "one": "[5]",
    "gone": None,
    "no pool": "[0, 1, 0]",
    "no row": "[0, 0, 1000]",
    "negative turn": "[-1, 0, 0]",
    "huge turn": f"[{1 << 62}, 0, 0]",
    "fraction of a row": "[0, 0, 1.0]",
}


def with_position(folder, value):
    path = folder / CHECKPOINT_FILE
    header = header_of(path)
    assert "position" in header
    del header["position"]
    if value is not None:
        header["position"] = value
    del header["crc32"]
    save_file(load_file(path), path, header)


@pytest.fixture(scope="module")
def runs_to_damage(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for order in ("windows", "epochs", "packed"):
        train(make(folder / order, data=DataConfig(order=order)), stop_at=5)
    return folder


@pytest.mark.parametrize(
    ("order", "value"),
    [
        *((order, POSITIONS[name]) for order, name in BAD_POSITIONS),
        *(("packed", value) for value in PACKED_POSITIONS.values()),
    ],
    ids=[*map("-".join, BAD_POSITIONS), *PACKED_POSITIONS],
)
def test_restore_refuses_positions_that_are_none(runs_to_damage, tmp_path, order, value):
    shutil.copytree(runs_to_damage / order, tmp_path / "run")
    with_position(tmp_path / "run", value)
    before = set(threading.enumerate())
    with pytest.raises(ModelFileError, match="is not a checkpoint"):
        restored(tmp_path / "run", data=DataConfig(order=order))
    assert set(threading.enumerate()) == before


def test_checkpoint_that_tells_no_position_goes_on(tmp_path):
    """As those that were written when there were windows only."""
    whole = make(tmp_path / "whole")
    _, losses, _ = train(whole)
    run = make(tmp_path / "run")
    train(run, stop_at=5)
    with_position(run.folder, None)
    again = resumed(run.folder)
    assert again.position == (5,)
    assert train(again)[1] == losses[5:]
    assert_same_state(state_of(again), state_of(whole))


def test_checkpoint_position_is_after_what_was_learned(tmp_path):
    run = make(tmp_path / "run", data=DataConfig(order="epochs"), gradient_accumulation=2)
    assert run.position == (0,)
    train(run, stop_at=5)
    assert json.loads(header_of(run.folder / CHECKPOINT_FILE)["position"]) == [5 * 6]
    assert run.position == (30,)


def batch_threads():
    return {thread for thread in threading.enumerate() if thread.name == "batches"}


class Interrupted(Exception):
    """What ends a run from outside."""


@pytest.mark.parametrize("how", ["ends", "stops", "interrupted", "diverges", "full", "data gone"])
def test_no_thread_outlives_its_training(tmp_path, monkeypatch, how):
    before, during = batch_threads(), []
    run = make(tmp_path / "run", data=DataConfig(order="epochs"))
    expected = ()
    if how == "diverges":
        run.model.latent[next(iter(run.model.latent))][...] = np.nan
        expected = TrainingDiverged
    elif how == "full":

        def save():
            raise OSError(errno.ENOSPC, "No space left")

        monkeypatch.setattr(run, "save", save)
        expected = OSError
    elif how == "data gone":
        take = run.reader.next_batch

        def next_batch():
            if run.reader.position == (9,):
                raise OSError("the disk is gone")
            return take()

        monkeypatch.setattr(run.reader, "next_batch", next_batch)
        expected = OSError

    def stop():
        during.extend(batch_threads() - before)
        if how == "interrupted" and run.step == 3:
            raise Interrupted
        return how == "stops" and run.step == 3

    if how == "interrupted":
        expected = Interrupted
    run.folder.mkdir()
    arguments = (MetricsLogger(run.folder), callback_of(should_stop=stop))
    if expected:
        with pytest.raises(expected):
            run.train(*arguments)
    else:
        assert run.train(*arguments) == (how == "ends")
    assert batch_threads() == before
    # A thread whose data is gone has ended before.
    assert during or how == "data gone"
    # What was made ahead and not learned from is not lost.
    assert run.position == run.reader.position
    if how not in ("diverges", "full", "data gone"):
        assert run.position == (3 * run.step,)
    if how == "data gone":
        assert run.step == 3


def test_changes_that_do_not_go_with_packed_rows_are_refused_before_training(tmp_path):
    before = batch_threads()
    with pytest.raises(ValueError, match="change the lengths of documents"):
        make(tmp_path / "run", data=DataConfig(order="packed", case_noise=0.1))
    assert batch_threads() == before
    assert not (tmp_path / "run").exists()


# --- Parts of a step ------------------------------------------------------------------------------


def half_padding(rows=12):
    """A corpus of sequences of 8 tokens that hold padding: some much, some nothing else."""
    rng = np.random.default_rng(5)
    tokens = rng.integers(97, 123, 9 * rows).astype(np.int32)
    for row in range(rows):
        tokens[9 * row + 9 - row % 10 : 9 * row + 9] = PAD
    starts = np.arange(0, tokens.size, 9)
    training = TokenDataset(TokenStore([tokens]), 8, PAD, starts)
    assert (training.sequences(starts, starts + 9)[0] == PAD).all(axis=1).any()
    return Corpus("padding", training, training)


def in_parts(folder, parts, corpus, **changes):
    """A run that works at its 12 sequences per step in so many parts, within float32's bounds."""
    changes["precision"] = "float32"
    run = make(folder, batch_size=12 // parts, gradient_accumulation=parts, **changes)
    run.corpus = corpus or run.corpus
    return run


@pytest.mark.usefixtures("tier")
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("parts", [2, 3, 12])
def test_parts_of_a_step_give_the_gradient_of_the_whole(tmp_path, parts, padded):
    corpus = half_padding() if padded else None
    whole, split, single = (in_parts(tmp_path / "run", n, corpus) for n in (1, parts, 12))
    tokens, targets, _ = whole.corpus.training.batch(0, 12, 1)
    asked = int(((tokens != PAD) & (targets != PAD)).sum())
    terms = np.zeros_like(single.gradients.flat)
    for row in range(12):
        single.gradients.flat[...] = 0
        single.passes.run(tokens[[row]], targets[[row]], single.gradients, asked)
        terms += np.abs(single.gradients.flat)
    (loss, norm), (same_loss, same_norm) = whole.train_step(), split.train_step()
    # Sums over the tokens of a batch, whose order alone differs.
    bound = gamma(2 * tokens.size) * terms.max()
    assert_close(split.gradients.flat, whole.gradients.flat, rtol=0, atol=bound)
    assert_close(same_norm, norm, rtol=0, atol=bound * math.sqrt(terms.size))
    assert_close(same_loss, loss, rtol=gamma(2 * tokens.size), atol=0)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("parts", [2, 3, 12])
def test_run_in_parts_ends_like_one_of_whole_batches(tmp_path, parts, padded):
    """By SGD on float weights, which makes no leaps: rate x (error of a gradient) a step."""
    settings = {"scheme": FLOAT, "optimizer": "sgd", "warmup_steps": 0, "decay_fraction": 0.0}
    corpus = half_padding() if padded else None
    whole = in_parts(tmp_path / "whole", 1, corpus, **settings)
    split = in_parts(tmp_path / "split", parts, corpus, **settings)
    start = state_of(whole)
    (_, losses, records), (_, others, copies) = train(whole), train(split)
    ends, again = state_of(whole), state_of(split)
    for name in ends:
        # A gradient has less than 2 n roundings of its n tokens, clipped to a norm of 1; momentum
        # adds up 20 of them.
        bound = STEPS * 0.1 * 20 * gamma(2 * 12 * 8)
        assert_close(again[name], ends[name], rtol=4 * UNIT_ROUNDOFF, atol=bound, what=name)
    moved = max(np.abs(ends[name] - start[name]).max() for name in whole.model.latent)
    assert moved > 100 * bound
    assert_close(others, losses, rtol=1e-4, atol=0)
    assert [r["val_tokens"] for r in records] == [r["val_tokens"] for r in copies]
    assert [r["learning_rate"] for r in records] == [r["learning_rate"] for r in copies]


@pytest.mark.parametrize("threads", [1, 2])
def test_run_in_parts_goes_on_to_the_bit(tmp_path, threads):
    settings = {"batch_size": 2, "gradient_accumulation": 3, "threads": threads}
    whole = make(tmp_path / "whole", **settings)
    _, losses, records = train(whole)
    run = make(tmp_path / "run", **settings)
    parts = train(run, stop_at=5)[1]
    run = resumed(tmp_path / "run", **settings)
    parts += train(run)[1]
    assert parts == losses
    assert_same_state(state_of(run), state_of(whole))
    assert measured(read_metrics(run.folder / METRICS_FILE)) == measured(records)


def test_speed_counts_every_part(tmp_path, monkeypatch):
    """Tokens per second: of all sequences of a step."""
    run = make(tmp_path / "run", batch_size=2, gradient_accumulation=3, steps=1)
    ticks = iter(range(1000))
    monkeypatch.setattr(trainer, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    _, _, records = train(run)
    # The clock is read inside a step, too.
    seconds = records[0]["elapsed_seconds"]
    assert seconds == 3.0
    assert records[0]["tokens_per_second"] == 2 * 3 * 8 / seconds


@pytest.mark.usefixtures("outer_tier")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("scheme", ["ternary", FLOAT])
def test_gradient_checkpointing_changes_no_bit(tmp_path, monkeypatch, threads, scheme):
    told = []

    def passes(model, batch_size, time, threads, checkpointing):
        told.append(checkpointing)
        return backward(model, batch_size, time, threads, checkpointing)

    backward = trainer.BackwardPass
    monkeypatch.setattr(trainer, "BackwardPass", passes)
    settings = {"scheme": scheme, "num_blocks": 3, "threads": threads, "gradient_accumulation": 2}
    runs = [
        make(tmp_path / str(twice), gradient_checkpointing=twice, **settings)
        for twice in (False, True)
    ]
    (_, losses, records), (_, others, copies) = map(train, runs)
    assert told == [False, True]
    assert others == losses
    assert measured(copies) == measured(records)
    assert_same_state(state_of(runs[1]), state_of(runs[0]))


# --- Precision ------------------------------------------------------------------------------------

rough = pytest.mark.parametrize("rough", product_precisions()[1:])


@pytest.mark.usefixtures("tier")
def test_precision_is_the_fastest_there_is_unless_told(tmp_path):
    assert make(tmp_path / "run").config.precision == fastest_precision()
    assert make(tmp_path / "run", precision="float32").config.precision == "float32"
    for changes in ({"scheme": "float"}, {"scale": "128"}):
        assert make(tmp_path / "run", **changes).config.precision == fastest_precision(codes=False)


@rough
def test_precision_is_that_of_training_alone(tmp_path, rough):
    """What is measured is what will run anywhere."""
    runs = [make(tmp_path / name, precision=name) for name in ("float32", rough)]
    level = simd_level()
    (_, losses, _), (_, others, records) = map(train, runs)
    assert simd_level() == level
    assert others != losses
    assert others == pytest.approx(losses, rel=0.02)
    model = load_model(runs[1].folder)
    assert records[-1]["val_loss"] == evaluate(model, runs[1].corpus.validation).loss


@rough
def test_run_resumes_in_its_precision_or_in_another(tmp_path, rough):
    whole = train(make(tmp_path / "whole", precision=rough))[1]
    run = make(tmp_path / "run", precision=rough)
    begun = train(run, stop_at=6)[1]
    assert Run(run.folder).settings().training.precision == rough
    shutil.copytree(run.folder, tmp_path / "copy")
    same = train(resumed(tmp_path / "run", precision=rough))[1]
    assert begun + same == whole
    other = train(resumed(tmp_path / "copy", precision="float32"))[1]
    assert len(other) == len(same)
    assert other != same
    assert other == pytest.approx(same, rel=0.02)


@pytest.mark.usefixtures("tier")
def test_precision_that_is_not_there_is_refused_before_anything_is_made(tmp_path):
    if "bf16" in product_precisions():
        return
    with pytest.raises(ValueError, match=r"precision is bf16, expected float32 or int8"):
        make(tmp_path / "run", precision="bf16")
    assert not (tmp_path / "run").exists()


# --- A warm start ---------------------------------------------------------------------------------

# Half of the 12 steps.
FLOAT_STEPS = 6
WARM = {"float_steps": FLOAT_STEPS, "evaluate_every": 3}


LEARNING = [name for name, scheme in SCHEMES.items() if scheme.learns]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("scheme", LEARNING)
def test_warm_start_trains_in_full_precision_and_then_with_codes(tmp_path, scheme, optimizer):
    settings = {"optimizer": optimizer, "ternary_embedding": True}
    warm = make(tmp_path / "warm", scheme=scheme, **settings, **WARM)
    precise = make(tmp_path / "float", scheme=FLOAT, evaluate_every=3, **settings)
    assert_same_state(state_of(warm), state_of(precise))
    (_, losses, records), (_, others, copies) = train(warm), train(precise)
    assert losses[:FLOAT_STEPS] == others[:FLOAT_STEPS]
    assert losses[FLOAT_STEPS] != others[FLOAT_STEPS]
    assert [r["full_precision"] for r in records] == [True, False, False, False]
    for key in ("train_loss", "val_loss", "top5", "gradient_norm"):
        assert records[0][key] == copies[0][key]
    # What is measured when the phase is over is what it leads to, the codes.
    assert records[1]["train_loss"] == copies[1]["train_loss"]
    assert records[1]["val_loss"] != copies[1]["val_loss"]
    assert not warm.model.full_precision


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("scheme", LEARNING)
def test_warm_start_beside_float_embeddings(tmp_path, scheme, optimizer):
    """The weights lie in another order then; without clipping nothing depends on it."""
    warm = make(tmp_path / "warm", scheme=scheme, optimizer=optimizer, clip=0.0, **WARM)
    precise = make(tmp_path / "float", scheme=FLOAT, optimizer=optimizer, clip=0.0)
    for name, weights in precise.model.latent.items():
        weights[...] = warm.model.latent[name]
    losses, others = train(warm)[1], train(precise)[1]
    assert losses[:FLOAT_STEPS] == others[:FLOAT_STEPS]
    assert losses[FLOAT_STEPS] != others[FLOAT_STEPS]


def test_codes_are_used_after_a_warm_start(tmp_path):
    """From there on it is as if the weights had come from elsewhere."""
    run = make(tmp_path / "run", **WARM)
    train(run, stop_at=FLOAT_STEPS)
    shutil.copytree(run.folder, tmp_path / "copy")
    _, losses, records = train(resumed(tmp_path / "run", **WARM))
    other = make(tmp_path / "copy", **WARM | {"float_steps": 0})
    other.restore(newest_checkpoint(other.run, run.fixed_settings)[0])
    _, others, copies = train(other)
    assert others == losses
    assert measured(copies) == measured(records)


def test_codes_follow_the_weights_of_a_warm_start(tmp_path):
    """They are what is saved, and what a record tells of."""
    run = make(tmp_path / "run", learning_rate=0.1, **WARM)
    _, _, (record,) = train(run, stop_at=3)
    assert record["full_precision"]
    loaded = load_model(run.folder)
    again = create_legacy_llm(run.model.config, 9)
    for name, weights in again.latent.items():
        weights[...] = run.model.latent[name]
    again.quantize()
    for name, matrix in codes_of(again).items():
        assert_same_bits(codes_of(loaded)[name], matrix, name)
    assert any(shares["flipped"] > 0 for shares in record["weights"].values())
    assert evaluate(loaded, run.corpus.validation).loss != record["val_loss"]


@pytest.mark.parametrize("stop", [1, 3, 5, 6, 7, 9])
def test_warm_start_goes_on_to_the_bit(tmp_path, stop):
    whole = make(tmp_path / "whole", **WARM)
    _, losses, records = train(whole)
    run = make(tmp_path / "run", **WARM)
    parts = train(run, stop_at=stop)[1]
    run = resumed(tmp_path / "run", **WARM)
    parts += train(run)[1]
    assert parts == losses
    assert_same_state(state_of(run), state_of(whole))
    kept = measured(read_metrics(run.folder / METRICS_FILE))
    if stop % 3 == 0:
        assert kept == measured(records)
    assert kept[-1]["val_loss"] == records[-1]["val_loss"]
    assert [r["full_precision"] for r in kept] == [r["step"] < FLOAT_STEPS for r in kept]


# --- Quantization that sets in --------------------------------------------------------------------

GRADUAL = {"quantization_warmup": 6, "evaluate_every": 3}


class Watching:
    """A backward pass that notes what the model computes for its tokens."""

    def __init__(self, run):
        self.passes, self.model, self.seen = run.passes, run.model, []

    def run(self, tokens, *arguments):
        dense = {name: self.model.parameters[name].dense() for name in codes_of(self.model)}
        latent = {name: value.copy() for name, value in self.model.latent.items()}
        found = forward_llm_batch(self.model, tokens, logits=True)
        self.seen.append((tokens, dense, latent, found))
        return self.passes.run(tokens, *arguments)


@pytest.mark.parametrize("float_steps", [0, 2])
@pytest.mark.parametrize("scheme", ["ternary", "2bit"])
def test_quantization_sets_in_by_equal_shares(tmp_path, scheme, float_steps):
    settings = {"float_steps": float_steps, "precision": "float32", **GRADUAL}
    run = make(tmp_path / "run", scheme=scheme, **settings)
    run.passes = Watching(run)
    train(run)
    twin = create_legacy_llm(replace(run.model.config, scheme=FLOAT), 1)
    assert len(run.passes.seen) == STEPS
    for step, (tokens, dense, latent, found) in enumerate(run.passes.seen):
        share = np.float32(min(max((step - float_steps) / 6, 0.0), 1.0))
        for name, weights in latent.items():
            twin.latent[name][...] = weights + share * (dense.get(name, weights) - weights)
        expected = forward_llm_batch(twin, tokens, logits=True)
        # Codes have another product than floats.
        if share in (0.0, 1.0):
            assert_close(found, expected, rtol=0, atol=1e-5, what=str(step))
        else:
            assert_same_bits(found, expected, str(step))


def test_models_are_measured_by_their_codes_while_quantization_sets_in(tmp_path):
    run = make(tmp_path / "run", learning_rate=0.05, **GRADUAL)
    _, _, (record,) = train(run, stop_at=3)
    assert not record["full_precision"]
    assert run.best == (record["val_loss"], 3)
    assert evaluate(load_model(run.folder), run.corpus.validation).loss == record["val_loss"]


@pytest.mark.parametrize("stop", [1, 3, 5, 6, 7])
def test_quantization_that_sets_in_goes_on_to_the_bit(tmp_path, stop):
    settings = {"float_steps": 1, "optimizer_bits": 8, "threads": 2, **GRADUAL}
    whole = make(tmp_path / "whole", **settings)
    losses = train(whole)[1]
    run = make(tmp_path / "run", **settings)
    parts = train(run, stop_at=stop)[1]
    run = resumed(tmp_path / "run", **settings)
    parts += train(run)[1]
    assert parts == losses
    assert_same_state(state_of(run), state_of(whole))


def test_no_model_of_a_warm_start_is_the_best(tmp_path, monkeypatch):
    with_losses(monkeypatch, {3: 1.0, 6: 5.0, 9: 4.0, 12: 6.0})
    run = make(tmp_path / "run", **WARM)
    train(run, stop_at=3)
    assert run.best == (math.inf, 0)
    assert not (run.folder / BEST_FOLDER).exists()
    run = resumed(tmp_path / "run", **WARM)
    assert run.best == (math.inf, 0)
    train(run)
    assert run.best == (4.0, 9)
    assert step_of(run.folder / BEST_FOLDER) == 9


def test_warm_start_to_the_end_still_ends_with_codes(tmp_path):
    run = make(tmp_path / "run", float_steps=STEPS)
    _, _, records = train(run)
    assert [r["full_precision"] for r in records] == [True, True, False]
    assert records[-1]["val_loss"] == evaluate(load_model(run.folder), run.corpus.validation).loss
    assert run.best[1] == STEPS


# --- Weight decay ---------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_weight_decay_ends_when_it_is_told_to(tmp_path, optimizer):
    settings = {"optimizer": optimizer, "weight_decay": 3.0, "scheme": FLOAT}
    until = make(tmp_path / "until", weight_decay_until=0.5, **settings)
    always = make(tmp_path / "always", **settings)
    never = make(tmp_path / "never", **settings | {"weight_decay": 0.0})
    states = {}
    for run in (until, always, never):
        for _ in range(6):
            run.train_step()
        states[run] = state_of(run)
    assert_same_state(states[until], states[always])
    assert any((states[until][name] != states[never][name]).any() for name in states[until])
    # From there on as a run without, which begins with the same state.
    for name, weights in never.model.latent.items():
        weights[...] = states[until][name]
    never.model.quantize()
    never.optimizer.first[...], never.optimizer.second[...] = (
        states[until]["first"],
        states[until]["second"],
    )
    for run in (until, always, never):
        for _ in range(6):
            run.train_step()
    assert_same_state(state_of(until), state_of(never))
    assert any((state_of(always)[name] != state_of(until)[name]).any() for name in states[until])


@pytest.mark.parametrize("stop", [3, 6, 8])
def test_weight_decay_that_ends_goes_on_to_the_bit(tmp_path, stop):
    settings = {"weight_decay": 3.0, "weight_decay_until": 0.5}
    whole = make(tmp_path / "whole", **settings)
    _, losses, _ = train(whole)
    run = make(tmp_path / "run", **settings)
    parts = train(run, stop_at=stop)[1]
    run = resumed(tmp_path / "run", **settings)
    assert parts + train(run)[1] == losses
    assert_same_state(state_of(run), state_of(whole))


# --- Codes in the record --------------------------------------------------------------------------


def codes_of(model):
    """The codes of each quantized matrix, by its name."""
    return {
        name: matrix.values.copy()
        for name, matrix in model.parameters.items()
        if not isinstance(matrix, np.ndarray)
    }


def counted(codes, levels, before=None):
    """Shares of codes, one weight at a time."""
    shares = {}
    for name, matrix in codes.items():
        values = matrix.reshape(-1).tolist()
        shares[name] = {str(level): values.count(level) / len(values) for level in levels}
        if before is not None:
            pairs = zip(values, before[name].reshape(-1).tolist(), strict=True)
            shares[name]["flipped"] = sum(one != other for one, other in pairs) / len(values)
    return shares


def assert_same_shares(found, expected):
    assert list(found) == list(expected)
    for name in found:
        assert list(found[name]) == list(expected[name])
        for key, share in expected[name].items():
            assert abs(found[name][key] - share) <= 5.1e-7, (name, key)


LEVELS = {
    "ternary": (-1, 0, 1),
    "ternary-median": (-1, 0, 1),
    "binary": (-1, 1),
    "2bit": (-3, -1, 1, 3),
    "sign": (-1, 0, 1),
}


@pytest.mark.parametrize("embedding", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_weight_shares_are_those_of_a_count(scheme, embedding):
    config = ModelConfig(
        model_dim=12,
        num_blocks=2,
        num_heads=2,
        ffn_multiplier=2,
        scheme=scheme,
        ternary_embedding=embedding,
    )
    one, other = (create_legacy_llm(config, seed) for seed in (1, 2))
    codes, before = codes_of(one), codes_of(other)
    assert len(codes) == 2 * 6 + 2 * embedding
    assert_same_shares(code_fractions(one), counted(codes, LEVELS[scheme]))
    assert_same_shares(code_fractions(one, before), counted(codes, LEVELS[scheme], before))
    for shares in code_fractions(one, codes).values():
        assert shares.pop("flipped") == 0.0
        assert sum(shares.values()) == pytest.approx(1.0, abs=3e-6)


def test_weight_shares_of_floats_are_none():
    config = ModelConfig(model_dim=8, num_blocks=1, num_heads=1, scheme=FLOAT)
    assert code_fractions(create_legacy_llm(config, 1), {}) == {}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_records_tell_of_the_codes(tmp_path, scheme):
    """And what became of them since the last record, or since the start."""
    run = make(tmp_path / "run", scheme=scheme, learning_rate=0.05)
    codes, expected = [codes_of(run.model)], []

    def on_report(record):
        codes.append(codes_of(run.model))
        expected.append(counted(codes[-1], LEVELS[scheme], codes[-2]))

    _, _, records = train(run, on_report=on_report)
    assert len(records) == 3
    for record, shares in zip(records, expected, strict=True):
        assert_same_shares(record["weights"], shares)
        assert any(0 < share["flipped"] < 1 for share in shares.values())


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("stop", [5, 10])
def test_records_of_a_run_that_goes_on_are_the_same(tmp_path, scheme, stop):
    settings = {"scheme": scheme, "learning_rate": 0.05}
    _, _, records = train(make(tmp_path / "whole", **settings))
    train(make(tmp_path / "run", **settings), stop_at=stop)
    train(resumed(tmp_path / "run", **settings))
    assert measured(read_metrics(tmp_path / "run" / METRICS_FILE)) == measured(records)


# --- The best model -------------------------------------------------------------------------------


def step_of(folder):
    """The step that a run's files are of; every one must be of the same."""
    steps = json.loads(header_of(folder / WEIGHTS_FILE)["provenance"])["steps"]
    assert header_of(folder / CHECKPOINT_FILE)["step"] == str(steps)
    return steps


RISES_AND_FALLS = {
    "falls": ({5: 3.0, 10: 2.0, 12: 1.0}, 12),
    "rises": ({5: 1.0, 10: 2.0, 12: 3.0}, 5),
    "falls and rises": ({5: 3.0, 10: 1.0, 12: 2.0}, 10),
    "rises and falls": ({5: 2.0, 10: 3.0, 12: 1.0}, 12),
    "stays": ({5: 1.0, 10: 1.0, 12: 1.0}, 5),
}


@pytest.mark.parametrize("name", RISES_AND_FALLS)
def test_best_folder_holds_the_run_as_it_was_at_its_best(tmp_path, monkeypatch, name):
    losses, best = RISES_AND_FALLS[name]
    with_losses(monkeypatch, losses)
    run, then = make(tmp_path / "run"), {}

    def on_report(record):
        if record["step"] == best:
            then.update({name: (run.folder / name).read_bytes() for name in RUN_FILES})

    train(run, on_report=on_report)
    assert run.best == (losses[best], best)
    assert contents(run.folder / BEST_FOLDER) == then
    assert step_of(run.folder / BEST_FOLDER) == best
    assert step_of(run.folder) == STEPS


@pytest.mark.parametrize("name", RISES_AND_FALLS)
def test_best_model_is_that_of_the_run(tmp_path, monkeypatch, name):
    losses, best = RISES_AND_FALLS[name]
    with_losses(monkeypatch, losses)
    run = make(tmp_path / "run", learning_rate=0.05)
    train(run)
    model, metrics = run.best_model()
    assert model.provenance.steps == best
    if best == STEPS:
        assert model is run.model
        assert metrics is run.metrics
        return
    assert_same_state(
        {name: _numbers(value) for name, value in model.parameters.items()},
        {
            name: _numbers(value)
            for name, value in load_model(run.folder / BEST_FOLDER).parameters.items()
        },
    )
    assert metrics == evaluate(model, run.corpus.validation)
    # Without what was kept, the last one is what there is.
    shutil.rmtree(run.folder / BEST_FOLDER)
    assert run.best_model() == (run.model, run.metrics)


def _numbers(value):
    return getattr(value, "values", value)


PATIENCE = {
    "ends": ({2: 3.0, 4: 1.0, 6: 2.0, 8: 1.0, 10: 0.5}, 2, 8),
    "begins anew": ({2: 1.0, 4: 3.0, 6: 0.5, 8: 3.0, 10: 2.0}, 2, 10),
    "lasts": ({2: 1.0, 4: 3.0, 6: 3.0, 8: 3.0, 10: 0.5, 12: 2.0}, 4, 12),
    "none": ({2: 1.0, 4: 2.0, 6: 2.0, 8: 2.0, 10: 2.0, 12: 2.0}, 0, 12),
}


@pytest.mark.parametrize("name", PATIENCE)
def test_train_ends_after_its_patience(tmp_path, monkeypatch, name):
    losses, patience, end = PATIENCE[name]
    with_losses(monkeypatch, losses, whole=7.0)
    run = make(tmp_path / "run", evaluate_every=2, patience=patience)
    done, _, records = train(run)
    assert done
    assert run.step == records[-1]["step"] == newest(run).step == end
    # The end is measured as any other.
    assert records[-1]["val_loss"] == run.metrics.loss == 7.0


@pytest.mark.parametrize("stop", [2, 4, 5, 6, 7])
def test_patience_counts_what_came_before_a_run_went_on(tmp_path, monkeypatch, stop):
    with_losses(monkeypatch, {2: 3.0, 4: 1.0, 5: 2.0, 6: 2.0, 7: 2.0, 8: 1.0, 10: 0.5})
    settings = {"evaluate_every": 2, "patience": 2}
    assert train(make(tmp_path / "run", **settings), stop_at=stop)[0] is False
    run = resumed(tmp_path / "run", **settings)
    assert train(run)[0] is True
    assert run.step == 8


@pytest.mark.parametrize("stop", [3, 5, 7])
def test_stop_between_two_looks_changes_neither_best_nor_patience(tmp_path, monkeypatch, stop):
    """Even where the model was never better than there."""
    losses = {2: 3.0, 4: 2.0, 6: 2.5, 8: 1.0, 10: 2.0, 12: 2.0}
    with_losses(monkeypatch, {**losses, stop: 0.5})
    settings = {"evaluate_every": 2, "patience": 2}
    assert train(make(tmp_path / "run", **settings), stop_at=stop)[0] is False
    run = resumed(tmp_path / "run", **settings)
    assert train(run)[0] is True
    assert (run.best, run.step) == ((1.0, 8), 12)
    assert step_of(run.folder / BEST_FOLDER) == 8


def test_patience_begins_with_the_end_of_a_warm_start(tmp_path, monkeypatch):
    with_losses(monkeypatch, dict.fromkeys(range(13), 1.0))
    run = make(tmp_path / "run", evaluate_every=2, patience=2, float_steps=5)
    train(run)
    assert run.best[1] == 6
    assert run.step == 10


def test_best_is_found_by_what_every_look_is_at(tmp_path, monkeypatch):
    """The last look is at the whole validation set, whose loss is no measure for a part's."""
    with_losses(monkeypatch, {5: 3.0, 10: 1.0, 12: 2.0}, whole=0.5)
    run = make(tmp_path / "run")
    _, _, records = train(run)
    assert run.best == (1.0, 10)
    assert [record["val_loss"] for record in records] == [3.0, 1.0, 0.5]
    assert run.metrics.loss == 0.5


def test_best_is_the_one_measured(tmp_path):
    """The lowest loss of the record, without a helping hand."""
    run = make(tmp_path / "run", learning_rate=0.05, evaluate_every=1)
    _, _, records = train(run)
    losses = [record["val_loss"] for record in records]
    assert run.best == (min(losses), losses.index(min(losses)) + 1)
    model = load_model(run.folder / BEST_FOLDER)
    assert evaluate(model, run.corpus.validation).loss == min(losses)


@pytest.mark.parametrize("stop", [5, 7, 10])
def test_best_is_remembered_by_a_run_that_goes_on(tmp_path, monkeypatch, stop):
    with_losses(monkeypatch, {5: 1.0, 7: 3.0, 10: 2.0, 12: 1.5})
    train(make(tmp_path / "run"), stop_at=stop)
    shutil.copytree(tmp_path / "run" / BEST_FOLDER, tmp_path / "kept")
    run = resumed(tmp_path / "run")
    assert run.best == (1.0, 5)
    train(run)
    assert run.best == (1.0, 5)
    assert_same_files(run.folder / BEST_FOLDER, tmp_path / "kept")
    assert step_of(run.folder / BEST_FOLDER) == 5


def test_best_folder_is_a_run_that_can_go_on(tmp_path, monkeypatch):
    with_losses(monkeypatch, {5: 1.0, 10: 2.0, 12: 3.0})
    run = make(tmp_path / "run")
    _, losses, _ = train(run)
    before = contents(run.folder / BEST_FOLDER)
    assert Run(run.folder).best.settings() == run.settings
    shutil.copytree(run.folder / BEST_FOLDER, tmp_path / "best")
    best = resumed(tmp_path / "best")
    assert best.step == 5
    assert train(best)[1] == losses[5:]
    assert_same_state(state_of(best), state_of(run))
    # In its own place, too: what it writes there is not written into the run.
    files_of_the_run = {name: (run.folder / name).read_bytes() for name in RUN_FILES}
    best = resumed(run.folder / BEST_FOLDER)
    assert train(best)[1] == losses[5:]
    assert {name: (run.folder / name).read_bytes() for name in RUN_FILES} == files_of_the_run
    assert contents(run.folder / BEST_FOLDER) != before


def test_run_that_was_never_measured_has_no_best(tmp_path):
    run = make(tmp_path / "run")
    run.save()
    assert not (run.folder / BEST_FOLDER).exists()
    resumed(tmp_path / "run")
    assert not (run.folder / BEST_FOLDER).exists()


def test_best_is_kept_when_a_crash_came_before(tmp_path, monkeypatch):
    def crash(*arguments):
        raise KeyboardInterrupt

    with_losses(monkeypatch, {5: 2.0, 10: 1.0, 12: 3.0})
    run = make(tmp_path / "run")
    train(run, stop_at=5)
    with monkeypatch.context() as patch:
        patch.setattr(training_run, "atomic_copies", crash)
        run = resumed(run.folder)
        with pytest.raises(KeyboardInterrupt):
            train(run)
    assert step_of(run.folder) == 10
    assert step_of(run.folder / BEST_FOLDER) == 5
    run = resumed(tmp_path / "run")
    train(run)
    assert run.best == (1.0, 10)
    assert step_of(run.folder / BEST_FOLDER) == 10


def test_best_is_not_mixed_when_a_crash_came_between_model_and_checkpoint(tmp_path, monkeypatch):
    """The newer model lies beside the older checkpoint then, and the best is the older one."""
    with_losses(monkeypatch, {5: 1.0, 10: 2.0, 12: 3.0})
    run = make(tmp_path / "run")
    train(run, stop_at=5)
    shutil.copytree(run.folder / BEST_FOLDER, tmp_path / "kept")
    with monkeypatch.context() as patch:
        # The logger's new file, tokenizer and model.
        fill_disk(patch, 4)
        run = resumed(tmp_path / "run")
        with pytest.raises(OSError, match="No space left"):
            train(run)
    run = resumed(tmp_path / "run")
    assert_same_files(run.folder / BEST_FOLDER, tmp_path / "kept")


class Killed(BaseException):
    """The end of a process, as seen from within."""


def kill_at(patch, moment):
    """Let the process end before its so many-th change of a folder: nothing it does counts then.

    Returns the list of all changes.
    """
    changes = []

    def dying(real):
        def call(*arguments, **options):
            if len(changes) > moment:
                raise Killed
            changes.append(real.__name__)
            if len(changes) > moment:
                raise Killed
            return real(*arguments, **options)

        return call

    for name in ("link", "mkdir", "replace"):
        patch.setattr(os, name, dying(getattr(os, name)))
    patch.setattr(logger, "open", dying(open), raising=False)

    # What a process would clean up when it fails, it leaves behind when it is killed.
    def unlink(*arguments, real=os.unlink, **options):
        if len(changes) > moment:
            raise Killed
        real(*arguments, **options)

    patch.setattr(os, "unlink", unlink)
    return changes


CRASHES = {"falls": {2: 2.0, 4: 1.0}, "rises": {2: 1.0, 4: 2.0}}


@pytest.mark.parametrize("name", CRASHES)
def test_run_that_is_killed_anywhere_ends_like_an_unbroken_one(tmp_path, monkeypatch, name):
    """At every single change of a folder: the record and every file come out the same."""
    settings = {"steps": 4, "evaluate_every": 2, "warmup_steps": 2}
    with_losses(monkeypatch, CRASHES[name])
    whole = make(tmp_path / "whole", **settings)
    then = {step: tmp_path / f"step {step}" for step in CRASHES[name]}
    with monkeypatch.context() as patch:
        changes = kill_at(patch, 10**6)
        records = train(whole)[2]
    for step, folder in then.items():
        train(make(folder, **settings), stop_at=step)
    assert {*changes} == {"link", "mkdir", "open", "replace"}
    for moment in range(len(changes)):
        folder = tmp_path / str(moment)
        best = folder / BEST_FOLDER
        run = make(folder, **settings)
        with monkeypatch.context() as patch:
            kill_at(patch, moment)
            with pytest.raises(Killed):
                train(run)
        if (best / SETTINGS_FILE).exists():
            # Even half renewed, it can be used.
            load_model(best)
            Run(best).settings()
        saved = (folder / SETTINGS_FILE).exists()
        run = (resumed if saved else make)(folder, **settings)
        if best_is_missing(run.run, run.fixed_settings, run.best, run.step):
            run.save()
        if best.exists():
            assert_same_files(best, then[run.best[1]])
        train(run)
        assert measured(read_metrics(folder / METRICS_FILE)) == measured(records), moment
        assert run.best == whole.best
        assert_same_files(folder, whole.folder)
        assert_same_files(best, whole.folder / BEST_FOLDER)
        shutil.rmtree(folder)


# --- A disk that is full, a loss that is no number ------------------------------------------------


def fill_disk(monkeypatch, writes):
    """Let the disk be full after so many more files."""
    left = [writes]

    def fsync(handle):
        if stat.S_ISREG(os.fstat(handle).st_mode):
            if left[0] == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            left[0] -= 1

    monkeypatch.setattr(os, "fsync", fsync)


FILES_OF_A_SAVE = len(RUN_FILES)


@pytest.mark.parametrize("writes", range(FILES_OF_A_SAVE))
def test_full_disk_leaves_the_earlier_checkpoint(tmp_path, monkeypatch, writes):
    whole = make(tmp_path / "whole")
    train(whole)
    run = make(tmp_path / "run")
    with monkeypatch.context() as patch:
        # The logger's new file, the trial of the folder, the record and the save at step 5, and a
        # part of those at step 10.
        fill_disk(patch, 1 + 1 + 1 + FILES_OF_A_SAVE + 1 + writes)
        with pytest.raises(OSError, match="No space left"):
            train(run)
    assert run.step == 10
    assert not list(run.folder.glob(".*"))
    assert load_model(run.folder).config == run.model.config
    assert Run(run.folder).settings().training == run.config
    again = make(tmp_path / "run")
    again.restore(newest(again))
    # The settings alone come after the checkpoint.
    assert again.step == (10 if writes == FILES_OF_A_SAVE - 1 else 5)
    train(again)
    assert_same_state(state_of(again), state_of(whole))
    assert [r["step"] for r in read_metrics(run.folder / METRICS_FILE)] == [5, 10, 12]


def test_full_disk_at_the_first_save_leaves_no_half_file(tmp_path, monkeypatch):
    for writes in range(FILES_OF_A_SAVE):
        run = make(tmp_path / str(writes))
        with monkeypatch.context() as patch:
            fill_disk(patch, writes)
            with pytest.raises(OSError, match="No space left"):
                run.save()
        assert not list(run.folder.glob(".*"))
        assert len(list(run.folder.iterdir())) <= writes
        assert not (run.folder / SETTINGS_FILE).exists()
        run.save()
        found = {path.name for path in run.folder.iterdir() if path.is_file()}
        assert found - {EARLIER_FILE} == RUN_FILES


class Sick:
    """A backward pass that goes wrong after some steps."""

    def __init__(self, passes, healthy, loss, gradient):
        self.passes, self.healthy, self.loss, self.gradient = passes, healthy, loss, gradient

    def run(self, tokens, targets, gradients, *arguments):
        total, count = self.passes.run(tokens, targets, gradients, *arguments)
        self.healthy -= 1
        if self.healthy >= 0:
            return total, count
        gradients.flat[0] += self.gradient
        return total + self.loss, count


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_diverging_run_keeps_its_checkpoint(tmp_path, bad, where):
    run = make(tmp_path / "run")
    run.passes = Sick(run.passes, 7, **{"loss": 0.0, "gradient": 0.0, where: bad})
    with pytest.raises(TrainingDiverged, match=f"the {where}.* at step 8.*; .*try a lower"):
        train(run)
    assert run.step == 7
    again = make(tmp_path / "run")
    again.restore(newest(again))
    assert again.step == 5
    assert all(np.isfinite(values).all() for values in state_of(again).values())


@pytest.mark.parametrize("weight", [math.nan, math.inf, -math.inf, 3e38])
def test_run_that_diverged_between_steps_keeps_its_checkpoint(tmp_path, monkeypatch, weight):
    """The validation set can meet an overflow before the next batch does."""
    run = make(tmp_path / "run")
    at_five = []

    def measure(model, *arguments):
        if run.step == 10:
            at_five.append(contents(run.folder))
            model.parameters["final_norm.gamma"][...] = weight
            model.parameters["output.weight"][...] = 1e3
        return evaluate(model, *arguments)

    monkeypatch.setattr(trainer, "evaluate", measure)
    with pytest.raises(TrainingDiverged, match=r"after step 10 .*not finite.*try a lower"):
        train(run)
    assert [contents(run.folder)] == at_five
    assert [r["step"] for r in read_metrics(run.folder / METRICS_FILE)] == [5]
    again = make(tmp_path / "run")
    again.restore(newest(again))
    assert again.step == 5


def test_diverging_step_changes_no_weight(tmp_path):
    run = make(tmp_path / "run")
    run.train_step()
    before = state_of(run)
    run.passes = Sick(run.passes, 0, 0.0, math.inf)
    with pytest.raises(TrainingDiverged):
        run.train_step()
    assert_same_state(state_of(run), before)


# --- Damaged runs ---------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    """The folder of a run at step 5."""
    run = make(tmp_path / "run")
    train(run, stop_at=5)
    return run.folder


def restored(folder, **changes):
    run = make(folder, **changes)
    before = state_of(run)
    # The newest checkpoint is all there is.
    (folder / EARLIER_FILE).unlink(missing_ok=True)
    shutil.rmtree(folder / BEST_FOLDER, ignore_errors=True)
    try:
        run.restore(newest(run))
    except ModelFileError:
        # A run that cannot be restored is as new, not half of each.
        assert_same_state(state_of(run), before)
        assert run.step == 0
        raise
    return run


@pytest.mark.parametrize("size", [0, 1, 7, 8, 100, 1000, -1])
def test_restore_refuses_a_checkpoint_cut_short(saved, size):
    path = saved / CHECKPOINT_FILE
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ModelFileError, match=CHECKPOINT_FILE):
        restored(saved)


@pytest.mark.parametrize(
    "content", [b"hello", b"\0" * 100, b"\xff" * 100, b"{}" * 50, struct.pack("<Q", 2) + b"{}"]
)
def test_restore_refuses_other_files(saved, content):
    (saved / CHECKPOINT_FILE).write_bytes(content)
    with pytest.raises(ModelFileError, match=CHECKPOINT_FILE):
        restored(saved)


def rewrite(saved, change):
    """Store the checkpoint again with other tensors or another header."""
    path = saved / CHECKPOINT_FILE
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])["__metadata__"]
    del header["crc32"]
    tensors = load_file(path)
    change(tensors, header)
    save_file(tensors, path, header)


def bad_tensor(name, make_bad):
    def change(tensors, header):
        tensors[name] = make_bad(tensors[name])

    return change


def with_number(number):
    def make_bad(values):
        values = values.copy()
        values[-1] = number
        return values

    return make_bad


@pytest.mark.parametrize("name", ["weights", "first", "second"])
@pytest.mark.parametrize(
    "make_bad",
    [
        with_number(np.nan),
        with_number(np.inf),
        lambda values: values[:-1],
        lambda values: np.concatenate([values, values]),
        lambda values: values.reshape(2, -1),
        lambda values: values.astype(np.float64),
        lambda values: values.astype(np.float16),
    ],
    ids=["nan", "inf", "short", "long", "matrix", "float64", "float16"],
)
def test_restore_refuses_bad_tensors(saved, name, make_bad):
    rewrite(saved, bad_tensor(name, make_bad))
    with pytest.raises(ModelFileError, match=f"{name}"):
        restored(saved)


EIGHT_BITS = {
    "a scale is nan": ("first_scales", with_number(np.nan)),
    "a scale is negative": ("second_scales", with_number(-1.0)),
    "fewer scales": ("second_scales", lambda values: values[:-1]),
    "a matrix of scales": ("first_scales", lambda values: values[None]),
    "scales of float64": ("second_scales", lambda values: values.astype(np.float64)),
    "fewer codes": ("second", lambda values: values[:-1]),
    "signed codes": ("second", lambda values: values.view(np.int8)),
    "floats beside codes": ("second", lambda values: values.astype(np.float32)),
    "weights of codes": ("weights", lambda values: values.astype(np.uint8)),
}


@pytest.fixture(scope="module")
def eight_bits(tmp_path_factory):
    run = make(tmp_path_factory.mktemp("eight") / "run", optimizer_bits=8)
    train(run, stop_at=5)
    return run.folder


@pytest.mark.parametrize("name", EIGHT_BITS)
def test_restore_refuses_bad_moments_of_eight_bits(eight_bits, tmp_path, name):
    folder = Path(shutil.copytree(eight_bits, tmp_path / "run"))
    tensor, make_bad = EIGHT_BITS[name]
    rewrite(folder, bad_tensor(tensor, make_bad))
    with pytest.raises(ModelFileError, match=tensor):
        restored(folder, optimizer_bits=8)


def test_restore_refuses_moments_of_other_bits_or_of_fewer_blocks(eight_bits, saved, tmp_path):
    folder = Path(shutil.copytree(eight_bits, tmp_path / "eight"))

    def shorten(tensors, header):
        for name in ("first_scales", "second_scales"):
            tensors[name] = tensors[name][:-1]

    with pytest.raises(ModelFileError, match=r"first is missing, or not float32\["):
        restored(Path(shutil.copytree(folder, tmp_path / "copy")))
    with pytest.raises(ModelFileError, match=r"optimizer_bits|first is missing, or not uint8\["):
        restored(saved, optimizer_bits=8)
    for name in ("first_scales", "second_scales"):
        copied = Path(shutil.copytree(folder, tmp_path / name))
        rewrite(copied, lambda tensors, header, name=name: tensors.pop(name))
        with pytest.raises(ModelFileError, match=f"{name} is missing"):
            restored(copied, optimizer_bits=8)
    rewrite(folder, shorten)
    with pytest.raises(ModelFileError, match=r"first_scales is missing, or not float32\["):
        restored(folder, optimizer_bits=8)


@pytest.mark.parametrize("name", ["weights", "first", "second"])
def test_restore_refuses_missing_tensors(saved, name):
    rewrite(saved, lambda tensors, header: tensors.pop(name))
    with pytest.raises(ModelFileError, match=f"{name} is missing"):
        restored(saved)


HEADERS = {
    "no model": {"model": None},
    "no step": {"step": None},
    "no seconds": {"seconds": None},
    "no best": {"best": None},
    "empty": {"model": ""},
    "list": {"model": "[]"},
    "deep": {"model": "[" * 100_000},
    "word": {"step": "five"},
    "fraction": {"step": "5.5"},
    "negative": {"step": "-5"},
    "huge": {"step": str(10**30)},
    "long": {"step": "9" * 5000},
    "time": {"seconds": "a while"},
    "time without end": {"seconds": "inf"},
    "time of nothing": {"seconds": "nan"},
    "best empty": {"best": ""},
    "best number": {"best": "5"},
    "best of one": {"best": "[1.5]"},
    "best of three": {"best": "[1.5, 5, 5]"},
    "best words": {"best": '["low", "five"]'},
    "best null": {"best": "[null, 5]"},
    "best endless": {"best": "[1.5, Infinity]"},
    "best deep": {"best": "[" * 100_000},
}


@pytest.mark.parametrize("name", HEADERS)
def test_restore_refuses_bad_headers(saved, name):
    def change(tensors, header):
        for key, value in HEADERS[name].items():
            header.pop(key)
            if value is not None:
                header[key] = value

    rewrite(saved, change)
    with pytest.raises(ModelFileError, match=CHECKPOINT_FILE):
        restored(saved)


@pytest.mark.parametrize("dtype", ["BF16", "F8_E4M3", "BOOL", "I64"])
def test_restore_refuses_other_types(saved, dtype):
    """Also those that NumPy has no name for."""
    size = {"BF16": 2, "F8_E4M3": 1, "BOOL": 1, "I64": 8}[dtype]
    tensor = {"dtype": dtype, "shape": [2], "data_offsets": [0, 2 * size]}
    header = {"__metadata__": {"step": "5", "seconds": "1.0", "model": "{}"}, "weights": tensor}
    encoded = json.dumps(header).encode()
    content = struct.pack("<Q", len(encoded)) + encoded + bytes(2 * size)
    (saved / CHECKPOINT_FILE).write_bytes(content)
    with pytest.raises(ModelFileError, match=CHECKPOINT_FILE):
        restored(saved)


@pytest.mark.parametrize("changes", [{"model_dim": 16}, {"scheme": "float"}, {"num_heads": 1}])
def test_restore_refuses_another_model(saved, changes):
    with pytest.raises(ModelFileError, match=f"of another run: its {next(iter(changes))} is"):
        restored(saved, **changes)


def test_restore_needs_a_checkpoint(saved):
    path = saved / CHECKPOINT_FILE
    path.unlink()
    with pytest.raises(FileNotFoundError, match=CHECKPOINT_FILE):
        restored(saved)
    path.mkdir()
    with pytest.raises(IsADirectoryError, match=CHECKPOINT_FILE):
        restored(saved)


def edited(change):
    """The content of a run's settings after a change."""

    def content(settings):
        change(settings)
        return json.dumps(settings).encode()

    return content


SETTINGS = {
    "empty": lambda settings: b"",
    "cut": lambda settings: json.dumps(settings).encode()[:-9],
    "bytes": lambda settings: b"\xff\xfe\x00",
    "list": lambda settings: b"[]",
    "null": lambda settings: b"null",
    "object": lambda settings: b"{}",
    "deep": lambda settings: b"[" * 100_000,
    "no model": edited(lambda settings: settings.pop("model")),
    "no training": edited(lambda settings: settings.pop("training")),
    "no source": edited(lambda settings: settings.pop("source")),
    "model list": edited(lambda settings: settings.update(model=[])),
    "source text": edited(lambda settings: settings.update(source="stories")),
    "source null": edited(lambda settings: settings.update(source=None)),
    "unknown": edited(lambda settings: settings["model"].update(colour="red")),
    "dim": edited(lambda settings: settings["model"].update(model_dim=7)),
    "dim text": edited(lambda settings: settings["model"].update(model_dim="8")),
    "huge": edited(lambda settings: settings["model"].update(model_dim=10**30)),
    "steps": edited(lambda settings: settings["training"].update(steps=0)),
    "nan": edited(lambda settings: settings["training"].update(learning_rate=math.nan)),
    "flag": edited(lambda settings: settings["training"].update(seed=True)),
    "optimizer": edited(lambda settings: settings["training"].update(optimizer=["muon"])),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_refuse_damage(saved, name):
    path = saved / SETTINGS_FILE
    path.write_bytes(SETTINGS[name](json.loads(path.read_bytes())))
    with pytest.raises(ModelFileError, match=SETTINGS_FILE):
        Run(saved).settings()


def test_settings_need_a_run(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ModelFileError, match="is not a training run"):
            Run(folder).settings()
    (tmp_path / SETTINGS_FILE).mkdir()
    with pytest.raises(ModelFileError, match="is not a training run"):
        Run(tmp_path).settings()


# --- Refusals that keep what there is -------------------------------------------------------------


@pytest.mark.parametrize("where", ["weights", "first", "second", "first_scales", "second_scales"])
def test_run_with_weights_that_overflowed_keeps_its_checkpoint(tmp_path, where):
    """Codes hide an infinite latent weight: the loss stays finite."""
    settings = {"optimizer_bits": 8 if where.endswith("scales") else 32}
    run = make(tmp_path / "run", **settings)
    train(run, stop_at=5)
    kept = {path.name: path.read_bytes() for path in run.folder.glob("*.*")}
    run = resumed(tmp_path / "run", **settings)
    weights = {"weights": run.model.latent["blocks.0.ffn.wi"]}
    array = {**weights, **run.optimizer.moments}[where]
    array.flat[3] = np.inf
    with pytest.raises(TrainingDiverged, match=r"no longer finite.*: try a lower --learning-rate"):
        run._evaluate(False)
    assert {path.name: path.read_bytes() for path in run.folder.glob("*.*")} == kept
    assert run.best[1] == 5


def test_best_that_somebody_went_on_from_stays_ahead(tmp_path):
    run = make(tmp_path / "run", steps=10)
    train(run)
    assert run.best[1] == 10
    ahead = resumed(run.folder / BEST_FOLDER, steps=15)
    train(ahead)
    train(resumed(tmp_path / "run", steps=10))
    assert step_of(run.folder / BEST_FOLDER) == 15


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_resume_needs_the_checkpoint_and_the_settings_alone(tmp_path, name):
    run = make(tmp_path / "run")
    train(run, stop_at=5)
    (run.folder / name).unlink()
    _, losses, _ = train(resumed(tmp_path / "run"))
    assert losses == train(make(tmp_path / "whole"))[1][5:]
    assert (run.folder / name).exists()


def test_run_that_ends_in_full_precision_is_measured_by_its_codes(tmp_path):
    """They are what is saved, and what anybody will run."""
    run = make(tmp_path / "run", float_steps=STEPS + 100)
    _, _, records = train(run)
    assert [record["full_precision"] for record in records] == [True, True, False]
    assert records[-1]["val_loss"] == evaluate(load_model(run.folder), run.corpus.validation).loss
    assert run.best[1] == STEPS


@pytest.mark.parametrize("scheme", ["sign", FLOAT])
def test_warm_start_needs_codes_that_follow_float_weights(tmp_path, scheme):
    for name in ("float_steps", "quantization_warmup"):
        with pytest.raises(ValueError, match=rf"{name} is 3, expected 0: the scheme "):
            make(tmp_path / "run", scheme=scheme, **{name: 3})


def test_int8_activations_are_those_of_quantized_layers(tmp_path):
    plain, rounded = (
        train(make(tmp_path / str(on), scheme=FLOAT, int8_activations=on))[1]
        for on in (False, True)
    )
    assert rounded == plain


@pytest.mark.parametrize(
    ("key", "value"),
    [("seconds", "nan"), ("seconds", "-5"), ("best", "[-Infinity, 3]"), ("best", "[1.0, 9]"),
     ("best", "[NaN, 3]"), ("step", "-1")],
)  # fmt: skip
def test_checkpoint_header_is_checked(tmp_path, key, value):
    run = make(tmp_path / "run")
    train(run, stop_at=5)
    path = run.folder / CHECKPOINT_FILE
    header = {**header_of(path), key: value}
    del header["crc32"]
    save_file(load_file(path), path, header)
    with pytest.raises(ModelFileError, match=r"not a checkpoint: its .* expected 0 to"):
        restored(tmp_path / "run")


def test_trainer_refuses_to_be_copied(tmp_path):
    run = make(tmp_path / "run")
    for copied in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="a trainer cannot be copied or pickled: save the run"):
            copied(run)


NATIVE = {
    "AdamW", "BackwardContext", "BackwardPass", "Decoder", "ForwardContext", "LegacyLLM",
    "LegacyLLMGradients", "Muon", "PackedModel", "SGD", "Trainer",
}  # fmt: skip


@pytest.mark.parametrize("ended", [False, True])
def test_training_leaves_no_native_memory_to_the_collector(tmp_path, ended):
    """What a trainer and its models hold goes with the last reference to them."""

    def native():
        return sorted(type(one).__name__ for one in gc.get_objects()
                      if type(one).__name__ in NATIVE)  # fmt: skip

    gc.collect()
    gc.disable()
    try:
        before = native()
        run = make(tmp_path / "run")
        if ended:
            train(run)
        else:
            run.train_step()
            # The thread that makes batches holds none of it.
        assert len(native()) > len(before) + 4
        del run
        assert native() == before
        generator = Generator.load(tmp_path / "run") if ended else None
        if generator is not None:
            generator.complete("a", 5)
            generator.embed("a")
            generator.log_probabilities("ab")
        del generator
        assert native() == before
    finally:
        gc.enable()
