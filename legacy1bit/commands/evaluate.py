"""``evaluate``: how well a model predicts a text."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from legacy1bit.commands.options import (
    ALL_CORES,
    add_model,
    add_settings,
    given,
    latest_run,
    threads_of,
)
from legacy1bit.commands.texts import add_cache, corpus_of, is_token_folder, kept, moved
from legacy1bit.data.corpus import TEXT
from legacy1bit.data.shards import TokenStore, open_store, read_index
from legacy1bit.data.sources import is_token_file, open_source, read_token_file
from legacy1bit.data.tokenizer import Tokenizer, tokenizer_of
from legacy1bit.dataset import TokenDataset
from legacy1bit.hyperparams import DataConfig
from legacy1bit.model import load_model
from legacy1bit.training.evaluation import Metrics, evaluate, recall_of_heroes
from legacy1bit.training.run import Run

# Sequences that are cut at their ends leave some tokens out, which need not be told.
_NEARLY_ALL = 0.9


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Tell the parser what the command takes."""
    add_model(command)
    add_cache(command)
    command.add_argument(
        "--data",
        metavar="PATH",
        nargs="+",
        action="extend",
        help="any text, as for train (default: the run's validation set)",
    )
    for option, text in (("--run-data", "text"), ("--run-validation", "validation text")):
        command.add_argument(
            option,
            metavar="PATH",
            nargs="+",
            action="extend",
            help=f"where the run's own {text} has moved to, to measure its validation set",
        )
    add_settings(command, "the data", DataConfig, ("field", "encoding", "separator"))
    command.add_argument("--threads", type=int, metavar="N", help=f"default: {ALL_CORES}")


def run(arguments: argparse.Namespace) -> int:
    """Print how well a model predicts a text."""
    threads = threads_of(arguments)
    folder = arguments.model or latest_run()
    model = load_model(folder)
    config = model.config
    tokenizer = tokenizer_of(folder, config.vocab_size)
    places = {"run-data": arguments.run_data, "run-validation": arguments.run_validation}
    if arguments.data is None:
        settings = Run(folder).settings()
        source = moved(settings.source, folder, places, arguments.cache)
        corpus, _ = corpus_of(source, settings.data, config, arguments.cache, tokenizer)
        limit = settings.training.validation_tokens
        metrics = evaluate(model, corpus.validation, threads, limit, tokenizer)
        print_metrics(metrics, tokenizer.kind, corpus.validation.tokens.size)
        if corpus.stories:
            print_recall(recall_of_heroes(model, corpus.stories, threads))
        return 0
    given_data = DataConfig(**given(arguments, DataConfig))
    if any(places.values()):
        raise ValueError("--run-data and --run-validation exclude --data")
    if "" in arguments.data:
        raise ValueError("--data is empty, expected a path")
    tokens = _tokens_of(kept(arguments.data, arguments.cache), given_data, tokenizer)
    if tokens.size < 2:
        raise ValueError(f"{' '.join(arguments.data)} has one byte, expected at least two")
    length = min(config.sequence_length, tokens.size - 1)
    dataset = TokenDataset(tokens, length, config.pad_token)
    print_metrics(evaluate(model, dataset, threads, 0, tokenizer), tokenizer.kind)
    return 0


def _tokens_of(paths: Sequence[str], data: DataConfig, tokenizer: Tokenizer) -> TokenStore:
    """Return the tokens of a text, of as many documents as it has."""
    if len(paths) == 1 and is_token_file(paths[0]):
        return TokenStore([read_token_file(paths[0])])
    if len(paths) == 1 and is_token_folder(paths[0]):
        return _shards_of(Path(paths[0]), tokenizer)
    begin = np.array([tokenizer.bos_token or 0], np.int32)
    found: list[npt.NDArray[Any]] = []
    source, documents = open_source(paths, data.field, data.encoding, data.separator), 0
    for piece in source.pieces():
        documents += piece.begins
        # What stands before a text of bytes is not known; any other begins as a document does.
        if piece.begins and (found or tokenizer.eos_token is not None):
            found.append(begin)
        found += tokenizer.encode_batch([piece.text])
    if warning := source.warning(documents):
        print(warning, file=sys.stderr)
    return TokenStore([np.concatenate(found)])


def _shards_of(folder: Path, tokenizer: Tokenizer) -> TokenStore:
    """Return the tokens of a folder that ``data tokenize`` has written."""
    index = read_index(folder)
    if index.tokenizer != tokenizer.sha256:
        raise ValueError(f"{folder} has tokens of another tokenizer than the model's")
    return open_store(folder, index, TEXT)


def print_recall(share: float) -> None:
    """Print how often a model remembers whom a story is about."""
    print(f"{'right hero':<18}{share:.1%} of endings")


def print_metrics(metrics: Metrics, kind: str = "bytes", tokens: int = 0) -> None:
    """Print how well a model predicts tokens of a kind, and of so many how few were measured."""
    unit = "character" if kind in ("bytes", "chars") else "token"
    print(f"{'validation loss':<18}{metrics.loss:.4f} nats a {unit}")
    print(f"{'perplexity':<18}{metrics.perplexity:.4f}")
    if metrics.bytes:
        print(f"{'bits per byte':<18}{metrics.bits_per_byte:.4f}")
    print(f"{'top 1 / 3 / 5':<18}{metrics.top1:.1%} / {metrics.top3:.1%} / {metrics.top5:.1%}")
    if metrics.tokens < _NEARLY_ALL * tokens:
        print(f"{'measured on':<18}{metrics.tokens:,} of {tokens:,} tokens")
