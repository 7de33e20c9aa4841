"""The training loop: what it measures, that it repeats to the bit, that no crash loses a run."""

import errno
import json
import math
import os
import stat
import struct
from types import SimpleNamespace

import numpy as np
import pytest
from compare import assert_close, assert_same_bits
from safetensors.numpy import load_file, save_file

from legacy1bit import stories, trainer
from legacy1bit.dataset import TokenDataset, story_corpus, text_corpus
from legacy1bit.forward import forward_llm_batch
from legacy1bit.hyperparams import ModelConfig, TrainingConfig
from legacy1bit.logger import METRICS_FILE, MetricsLogger, read_metrics
from legacy1bit.model import ModelFileError, create_legacy_llm, load_model
from legacy1bit.trainer import (
    CHECKPOINT_FILE,
    SETTINGS_FILE,
    Metrics,
    Trainer,
    TrainingDiverged,
    evaluate,
    read_settings,
    recall_of_heroes,
)

PAD = 256
TEXT = b"the cat sat on the mat and the dog lay by the log. " * 20
STEPS, EVERY = 12, 5

MODEL_KEYS = {"scheme", "model_dim", "num_heads", "sequence_length", "positions"}


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch):
    """These files need not outlive a power cut."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def make(folder, text=TEXT, **changes):
    """A trainer of a tiny model; changes go to the settings that know them."""
    model = {"model_dim": 8, "num_blocks": 1, "num_heads": 2, "sequence_length": 8}
    training = {"steps": STEPS, "batch_size": 3, "warmup_steps": 4, "evaluate_every": EVERY}
    for key, value in changes.items():
        (model if key in MODEL_KEYS else training)[key] = value
    config = ModelConfig(**model)
    corpus = text_corpus(text, "text", config.sequence_length, PAD)
    return Trainer(folder, config, TrainingConfig(**training), corpus, {"name": "text"})


def train(run, stop_at=None):
    """Train a run, from where it is, until its end or until a step; return losses and records."""
    run.folder.mkdir(exist_ok=True)
    logger = MetricsLogger(run.folder, run.step)
    losses, records = [], []
    done = run.train(
        logger,
        lambda loss, speed: losses.append(loss),
        records.append,
        lambda: run.step == stop_at,
    )
    return done, losses, records


def state_of(run):
    return {
        **{name: weights.copy() for name, weights in run.model.latent.items()},
        "first": run.optimizer.first.copy(),
        "second": run.optimizer.second.copy(),
    }


def assert_same_state(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert_same_bits(one[name], other[name], name)


def measured(records):
    """Records without what the clock decides."""
    return [
        {k: v for k, v in record.items() if k not in ("tokens_per_second", "elapsed_seconds")}
        for record in records
    ]


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
    for tokens, targets in batches:
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
    "text": lambda: TokenDataset(np.frombuffer(TEXT[:500], np.uint8).astype(np.int32), 16, PAD),
    "ragged": lambda: TokenDataset(np.frombuffer(TEXT[:50], np.uint8).astype(np.int32), 16, PAD),
    "stories": lambda: story_corpus(2, 40, 3, 16, PAD).validation,
    "noise": lambda: TokenDataset(
        np.random.default_rng(0).integers(0, 256, 700).astype(np.int32), 16, PAD
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
    assert any((tokens == PAD).any() for tokens, _ in dataset.sweep(32))
    tokens = np.concatenate([dataset.tokens, np.full(100, PAD, np.int32)])
    longer = TokenDataset(tokens, dataset.sequence_length, PAD)
    one, other = evaluate(model, dataset), evaluate(model, longer)
    assert one.tokens == other.tokens
    assert_close(one.loss, other.loss, rtol=1e-12, atol=0)
    assert (one.top1, one.top3, one.top5) == (other.top1, other.top3, other.top5)


def test_evaluate_refuses_a_dataset_of_padding(model):
    with pytest.raises(ValueError, match="nothing to measure"):
        evaluate(model, TokenDataset(np.full(40, PAD, np.int32), 8, PAD))


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

    def forward(model, rows, threads=1, logits=False):
        assert logits
        return logits_of(rows).astype(np.float32)

    monkeypatch.setattr(trainer, "forward_llm_batch", forward)


def following(rows):
    """The token behind each, 0 behind the last."""
    return np.concatenate([rows[:, 1:], np.zeros_like(rows[:, :1])], axis=1) % 256


def one_hot(tokens, height=20.0):
    return height * (np.arange(256) == tokens[..., None])


def test_evaluate_of_a_perfect_model(monkeypatch, model):
    with_logits(monkeypatch, lambda rows: one_hot(following(rows), 40.0))
    metrics = evaluate(model, TokenDataset(np.arange(1, 18, dtype=np.int32), 16, PAD))
    # What follows the last token of a row is not in the row: only there the model is wrong.
    assert metrics.tokens == 16
    assert metrics.top1 == 15 / 16
    assert_close(metrics.loss, 40.0 / 16, rtol=1e-6, atol=0)


@pytest.mark.parametrize("rank", range(7))
def test_evaluate_counts_ranks(monkeypatch, model, rank):
    """The true token comes behind ``rank`` others."""
    shares = [float(rank < k) for k in (1, 3, 5)]
    order = -np.arange(256.0)
    dataset = TokenDataset(np.full(17, rank, np.int32), 16, PAD)
    with_logits(monkeypatch, lambda rows: np.broadcast_to(order, (*rows.shape, 256)))
    metrics = evaluate(model, dataset)
    assert [metrics.top1, metrics.top3, metrics.top5] == shares
    assert_close(metrics.loss, rank + np.log(np.exp(order).sum()), rtol=1e-6, atol=0)


def test_evaluate_gives_no_more_than_k_tokens_the_first_k_ranks(monkeypatch, model):
    """Every token in turn is the true one, and to the model all are alike.

    However a tie is broken, at most k of 256 tokens are among the k likeliest.
    """
    with_logits(monkeypatch, lambda rows: np.zeros((*rows.shape, 256)))
    dataset = TokenDataset(np.arange(257, dtype=np.int32) % 256, 16, PAD)
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
    metrics = Metrics(math.log(8.0), 0.25, 0.5, 0.75, 100)
    assert metrics.perplexity == pytest.approx(8.0)
    assert metrics.bits_per_byte == pytest.approx(3.0)
    assert metrics.record() == {
        "val_loss": metrics.loss,
        "perplexity": metrics.perplexity,
        "bits_per_byte": metrics.bits_per_byte,
        "top1": 0.25,
        "top3": 0.5,
        "top5": 0.75,
    }
    assert Metrics(1e5, 0.0, 0.0, 0.0, 1).perplexity == math.inf


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


@pytest.mark.usefixtures("tier")
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


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("scheme", ["ternary", "float"])
def test_training_learns(tmp_path, optimizer, scheme):
    text = b"abcdefgh" * 60
    run = make(
        tmp_path / "run",
        text,
        optimizer=optimizer,
        scheme=scheme,
        steps=150,
        learning_rate=1e-2,
        evaluate_every=150,
    )
    _, losses, records = train(run)
    assert losses[0] == pytest.approx(math.log(256), abs=0.1)
    assert records[-1]["val_loss"] < 0.5
    assert records[-1]["top1"] > 0.9


def test_train_records_what_it_measures(tmp_path):
    run = make(tmp_path / "run")
    done, losses, records = train(run)
    assert done
    assert run.step == len(losses) == STEPS
    assert [record["step"] for record in records] == [5, 10, 12]
    assert read_metrics(run.folder / METRICS_FILE) == records
    before = 0
    for record in records:
        assert list(record) == [
            "step",
            "train_loss",
            "val_loss",
            "perplexity",
            "bits_per_byte",
            "top1",
            "top3",
            "top5",
            "learning_rate",
            "tokens_per_second",
            "elapsed_seconds",
        ]
        part = losses[before : record["step"]]
        assert record["train_loss"] == pytest.approx(sum(part) / len(part))
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


def test_train_measures_everything_at_the_end_only(tmp_path, monkeypatch):
    limits = []

    def measure(model, dataset, threads, limit):
        limits.append(limit)
        return evaluate(model, dataset, threads, limit)

    monkeypatch.setattr(trainer, "evaluate", measure)
    train(make(tmp_path / "run"))
    assert limits == [16384, 16384, None]


@pytest.mark.parametrize("step", [1, 5, 7, 11])
def test_train_stops_when_told_and_saves(tmp_path, step):
    run = make(tmp_path / "run")
    done, losses, records = train(run, stop_at=step)
    assert not done
    assert len(losses) == run.step == step
    assert records[-1]["step"] == step
    again = make(tmp_path / "run")
    again.restore()
    assert again.step == step
    assert_same_state(state_of(again), state_of(run))


def test_train_told_to_stop_at_the_last_step_is_done(tmp_path):
    done, _, records = train(make(tmp_path / "run"), stop_at=STEPS)
    assert done
    assert [record["step"] for record in records] == [5, 10, 12]


# --- Going on -------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("scheme", ["ternary", "float"])
@pytest.mark.parametrize("threads", [1, 2])
def test_restored_run_ends_like_an_unbroken_one(tmp_path, optimizer, scheme, threads):
    settings = {"optimizer": optimizer, "scheme": scheme, "threads": threads}
    whole = make(tmp_path / "whole", **settings)
    _, losses, records = train(whole)
    parts, stops = [], (1, 4, 9, None)
    for stop in stops:
        run = make(tmp_path / "parts", **settings)
        if parts:
            run.restore()
        parts += train(run, stop)[1]
    assert parts == losses
    assert_same_state(state_of(run), state_of(whole))
    assert run.metrics == whole.metrics
    kept = read_metrics(run.folder / METRICS_FILE)
    assert [record["step"] for record in kept] == [1, 4, 5, 9, 10, 12]
    for key in ("val_loss", "top1", "learning_rate"):
        assert kept[-1][key] == records[-1][key]
    assert_same_state(*(load_file(r.folder / "model.safetensors") for r in (run, whole)))


def test_restored_run_forgets_what_came_after_its_checkpoint(tmp_path):
    """As after a crash between two checkpoints, when the file of metrics is ahead."""
    run = make(tmp_path / "run")
    train(run, stop_at=5)
    MetricsLogger(run.folder, 5).log({"step": 9, "val_loss": 0.0})
    again = make(tmp_path / "run")
    again.restore()
    train(again)
    assert [r["step"] for r in read_metrics(run.folder / METRICS_FILE)] == [5, 10, 12]


def test_restored_run_goes_on_counting_seconds(tmp_path):
    run = make(tmp_path / "run")
    train(run, stop_at=5)
    again = make(tmp_path / "run")
    again.restore()
    assert again.seconds == run.seconds > 0
    _, _, records = train(again)
    assert records[0]["elapsed_seconds"] > run.seconds


def test_saved_run_holds_all_that_it_needs(tmp_path):
    run = make(tmp_path / "deep" / "run", seed=7)
    run.save()
    names = {path.name for path in run.folder.iterdir()}
    assert names == {
        SETTINGS_FILE,
        CHECKPOINT_FILE,
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    }
    assert read_settings(run.folder) == (run.model.config, run.config, run.source)
    loaded = load_model(run.folder)
    tokens = np.arange(8, dtype=np.int32)[None]
    assert_same_bits(forward_llm_batch(loaded, tokens), forward_llm_batch(run.model, tokens))


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


FILES_OF_A_SAVE = 5


@pytest.mark.parametrize("writes", range(FILES_OF_A_SAVE))
def test_full_disk_leaves_the_earlier_checkpoint(tmp_path, monkeypatch, writes):
    whole = make(tmp_path / "whole")
    train(whole)
    run = make(tmp_path / "run")
    with monkeypatch.context() as patch:
        # The logger's new file, the save at step 5, and a part of that at step 10.
        fill_disk(patch, 1 + FILES_OF_A_SAVE + writes)
        with pytest.raises(OSError, match="No space left"):
            train(run)
    assert run.step == 10
    assert not list(run.folder.glob(".*"))
    assert load_model(run.folder).config == run.model.config
    assert read_settings(run.folder)[1] == run.config
    again = make(tmp_path / "run")
    again.restore()
    # The settings alone come after the checkpoint; what is recorded comes after both.
    kept = 10 if writes == FILES_OF_A_SAVE - 1 else 5
    assert again.step == kept
    train(again)
    assert_same_state(state_of(again), state_of(whole))
    recorded = [5, 12] if kept == 10 else [5, 10, 12]
    assert [r["step"] for r in read_metrics(run.folder / METRICS_FILE)] == recorded


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
        assert len(list(run.folder.iterdir())) == FILES_OF_A_SAVE


class Sick:
    """A backward pass that goes wrong after some steps."""

    def __init__(self, passes, healthy, loss, gradient):
        self.passes, self.healthy, self.loss, self.gradient = passes, healthy, loss, gradient

    def run(self, tokens, targets, gradients):
        total, count = self.passes.run(tokens, targets, gradients)
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
    with pytest.raises(TrainingDiverged, match=f"the {where}.* at step 8: try a lower"):
        train(run)
    assert run.step == 7
    again = make(tmp_path / "run")
    again.restore()
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
    with pytest.raises(TrainingDiverged, match=r"after step 10: .*not finite.*try a lower"):
        train(run)
    assert [contents(run.folder)] == at_five
    assert [r["step"] for r in read_metrics(run.folder / METRICS_FILE)] == [5]
    again = make(tmp_path / "run")
    again.restore()
    assert again.step == 5


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


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
    try:
        run.restore()
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


@pytest.mark.parametrize("name", ["weights", "first", "second"])
def test_restore_refuses_missing_tensors(saved, name):
    rewrite(saved, lambda tensors, header: tensors.pop(name))
    with pytest.raises(ModelFileError, match=f"{name} is missing"):
        restored(saved)


HEADERS = {
    "no model": {"model": None},
    "no step": {"step": None},
    "no seconds": {"seconds": None},
    "empty": {"model": ""},
    "list": {"model": "[]"},
    "deep": {"model": "[" * 100_000},
    "word": {"step": "five"},
    "fraction": {"step": "5.5"},
    "negative": {"step": "-5"},
    "huge": {"step": str(10**30)},
    "long": {"step": "9" * 5000},
    "time": {"seconds": "a while"},
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
    with pytest.raises(ModelFileError, match="a model with other settings"):
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
def test_read_settings_refuses_damage(saved, name):
    path = saved / SETTINGS_FILE
    path.write_bytes(SETTINGS[name](json.loads(path.read_bytes())))
    with pytest.raises(ModelFileError, match=SETTINGS_FILE):
        read_settings(saved)


def test_read_settings_needs_a_run(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ModelFileError, match="is not a training run"):
            read_settings(folder)
    (tmp_path / SETTINGS_FILE).mkdir()
    with pytest.raises(ModelFileError, match="is not a training run"):
        read_settings(tmp_path)
