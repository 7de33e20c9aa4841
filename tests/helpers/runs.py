"""Runs of tiny models, and what the tests compare of them."""

import json
import struct
from dataclasses import fields, replace

import numpy as np
from safetensors.numpy import load_file

from helpers.arrays import assert_same_bits
from legacy1bit.data.corpus import Corpus, text_corpus
from legacy1bit.data.shards import TokenStore
from legacy1bit.data.tokenizer import ByteTokenizer, train_bpe
from legacy1bit.dataset import TokenDataset
from legacy1bit.formats.native import CHECKPOINT_FILE
from legacy1bit.hyperparams import SETTINGS_FILE, ModelConfig, TrainingConfig
from legacy1bit.logger import MetricsLogger
from legacy1bit.training.checkpoint import newest_checkpoint
from legacy1bit.training.evaluation import Metrics
from legacy1bit.training.trainer import Trainer, TrainingCallback

PAD = 256
TEXT = b"the cat sat on the mat and the dog lay by the log. " * 20
STEPS, EVERY = 12, 5

MODEL_KEYS = {setting.name for setting in fields(ModelConfig)}

# What a line of metrics.jsonl holds, in this order.
RECORD_KEYS = (
    "step",
    "train_loss",
    "train_losses",
    "val_loss",
    "val_tokens",
    "val_bytes",
    "perplexity",
    "bits_per_byte",
    "top1",
    "top3",
    "top5",
    "learning_rate",
    "gradient_norm",
    "tokens_per_second",
    "elapsed_seconds",
    "padding",
    "full_precision",
    "weights",
)

# Of those, the ones that the clock decides.
TIMES = ("tokens_per_second", "elapsed_seconds")


def make(folder, text=TEXT, data=None, teacher=None, source=None, **changes):
    """A trainer of a tiny model; changes go to the settings that know them.

    With settings of data it learns from documents.
    """
    model = {"model_dim": 8, "num_blocks": 1, "num_heads": 2, "sequence_length": 8}
    training = {"steps": STEPS, "batch_size": 3, "warmup_steps": 4, "evaluate_every": EVERY}
    for key, value in changes.items():
        (model if key in MODEL_KEYS else training)[key] = value
    config = ModelConfig(**model)
    if data is None:
        corpus = text_corpus(text, "text", config.sequence_length, PAD)
    else:
        corpus = documents_corpus(data, config.sequence_length)
        config = replace(config, vocab_size=corpus.training.pad_token)
    source = {"name": "text"} if source is None else source
    training = TrainingConfig(**training)
    return Trainer(folder, config, training, corpus, source, data, teacher=teacher)


DOCUMENTS = [TEXT[3 * i : 3 * i + 1 + i * 7 % 23] for i in range(40)]


def documents_corpus(data, length):
    """Documents that each end in a line break, and the beginning of one more."""
    tokenizer = train_bpe([TEXT], 280) if data.tokenizer == "bpe" else ByteTokenizer()
    encoded = [tokenizer.encode(document + b"\n") for document in DOCUMENTS]
    ends = np.cumsum([tokens.size for tokens in encoded])
    begins = np.concatenate([[0], ends[:-1]])
    store = TokenStore([np.concatenate([*encoded, encoded[0][:1]])], begins, int(ends[-1]))
    pad = tokenizer.vocab_size
    training = TokenDataset(store, length, pad, order=data.order, document_mask=data.document_mask)
    validation = TokenDataset(store, length, pad, document_mask=data.document_mask)
    return Corpus("documents", training, validation, tokenizer=tokenizer)


def callback_of(**methods):
    """A callback with these methods."""
    callback = TrainingCallback()
    for name, method in methods.items():
        assert hasattr(callback, name)
        setattr(callback, name, method)
    return callback


def train(run, stop_at=None, on_report=lambda record: None):
    """Train a run, from where it is, until its end or until a step; return losses and records."""
    run.folder.mkdir(exist_ok=True)
    losses, records = [], []

    def report(record):
        records.append(record)
        on_report(record)

    callback = callback_of(
        on_step=lambda loss, speed: losses.append(loss),
        on_save=report,
        should_stop=lambda: run.step == stop_at,
    )
    done = run.train(MetricsLogger(run.folder, run.step), callback)
    return done, losses, records


def newest(run):
    return newest_checkpoint(run.run, run.fixed_settings)[0]


def resumed(folder, **changes):
    """A run as it goes on from its checkpoint."""
    run = make(folder, **changes)
    run.restore(newest(run))
    return run


def state_of(run):
    return {
        **{name: weights.copy() for name, weights in run.model.latent.items()},
        **{name: values.copy() for name, values in run.optimizer.moments.items()},
    }


def assert_same_state(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert_same_bits(one[name], other[name], name)


def measured(records):
    """Records without what the clock decides."""
    return [{key: value for key, value in record.items() if key not in TIMES} for record in records]


RUN_FILES = {
    SETTINGS_FILE,
    CHECKPOINT_FILE,
    "config.json",
    "model.safetensors",
    "tokenizer.json",
}


def with_losses(monkeypatch, losses, whole=None):
    """Let the validation set have a loss by step; and at the end, another on the whole of it."""

    def measure(self, limit, stop=None):
        loss = losses[self.step] if limit == 16384 or whole is None else whole
        return Metrics(loss, 0.25, 0.5, 0.75, 100, 100)

    monkeypatch.setattr(Trainer, "_measure", measure)


def header_of(path):
    """The words in the head of a safetensors file, whose order is left to chance."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length])["__metadata__"]


def assert_same_files(one, other):
    """Two folders hold the same of a run, but for the seconds it took."""
    there = [{name for name in RUN_FILES if (run / name).exists()} for run in (one, other)]
    assert there[0] == there[1]
    for name in sorted(there[0]):
        if name.endswith(".safetensors"):
            headers = [header_of(folder / name) for folder in (one, other)]
            for header in headers:
                header.pop("seconds", None)
                header.pop("crc32", None)
            assert headers[0] == headers[1]
            assert_same_state(*(load_file(folder / name) for folder in (one, other)))
        else:
            assert (one / name).read_bytes() == (other / name).read_bytes(), name


def contents(folder):
    """Every file in a folder and below it."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


TINY = {
    "steps": 3,
    "model-dim": 8,
    "blocks": 1,
    "heads": 1,
    "sequence-length": 16,
    "batch-size": 2,
    "threads": 1,
    "stories": 20,
}


def tiny(*more, **options):
    """The arguments of a short training; None leaves an option out."""
    options = TINY | {name.replace("_", "-"): value for name, value in options.items()}
    pairs = [(f"--{name}", str(value)) for name, value in options.items() if value is not None]
    return ["train", *(text for pair in pairs for text in pair), *map(str, more)]


SIZES = {"steps": 6, "evaluate-every": 2, "model-dim": 8, "blocks": 2, "heads": 2}
SIZES |= {"sequence-length": 32, "batch-size": 2, "threads": 1, "stories": 20}
SHORT = ["train", *(word for name, n in SIZES.items() for word in (f"--{name}", str(n)))]


def with_metrics(folder, records):
    lines = (json.dumps(record) + "\n" for record in records)
    (folder / "metrics.jsonl").write_text("".join(lines), encoding="utf-8")


STRANGE = {
    "empty": [],
    "one point": [{"step": 5, "val_loss": 1.5, "train_loss": 2.5}],
    "null": [{"step": 1, "val_loss": None, "train_loss": 1.0}, {"step": 2, "perplexity": None}],
    "all null": [{"step": n, "val_loss": None, "perplexity": None} for n in range(3)],
    "diverged": [
        {"step": 1, "val_loss": 5.5, "perplexity": 244.7, "gradient_norm": 1e200},
        {"step": 2, "val_loss": 900.0, "perplexity": None, "gradient_norm": 1e299},
    ],
    "no weights": [{"step": 1, "weights": {}}, {"step": 2, "weights": None}],
    "matrices come and go": [
        {"step": 1, "weights": {"blocks.0.a": {"-1": 0.5, "1": 0.5}}},
        {"step": 2, "weights": {"b": {"0": None, "flipped": 0.25}, "blocks.0.a": {}}},
    ],
    "too large for a float": [{"step": 10**400, "val_loss": 10**400}],
}
