"""``evaluate``: how well a model predicts a text."""

import argparse
import functools
from typing import NamedTuple

from legacy1bit.commands.options import (
    ALL_CORES,
    add_model,
    add_settings,
    given,
    latest_run,
    read_model,
    threads_of,
)
from legacy1bit.commands.progress import STANDARD_ERROR, Output
from legacy1bit.commands.texts import TextsAction, add_cache, moved, paths_named
from legacy1bit.data.corpus import open_chats, open_corpus, open_text
from legacy1bit.data.origin import DataOrigin
from legacy1bit.dataset import TokenDataset
from legacy1bit.formats.adapters import resolve
from legacy1bit.formats.chat_tokens import chat_encoder
from legacy1bit.formats.published import read_tokenizer
from legacy1bit.hyperparams import DataConfig
from legacy1bit.training.evaluation import Metrics, evaluate, recall_of_heroes
from legacy1bit.training.run import Run

# Sequences that are cut at their ends leave some tokens out, which is not worth a line.
_NEARLY_ALL = 0.9


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the command's arguments to its parser."""
    add_model(command)
    add_cache(command)
    command.add_argument(
        "--data",
        metavar="PATH",
        nargs="+",
        action="extend",
        help="any text, as for train (default: the run's validation set)",
    )
    for option, action, text in (
        ("--run-data", TextsAction, "text"),
        ("--run-validation", "extend", "validation text"),
    ):
        command.add_argument(
            option,
            metavar="PATH",
            nargs="+",
            action=action,
            help=f"where the run's own {text} has moved to, to measure on its validation set",
        )
    add_settings(command, "the data", DataConfig, ("field", "encoding", "separator"))
    command.add_argument("--threads", type=int, metavar="N", help=f"default: {ALL_CORES}")


class Measured(NamedTuple):
    """How well a model predicts a text.

    Attributes
    ----------
    metrics : Metrics
    kind : str
        The kind of its tokens.
    tokens : int
        How many tokens a validation set has; 0: those of the metrics.
    recall : float or None
        How often a model remembers whom a story is about, if there are stories.
    """

    metrics: Metrics
    kind: str
    tokens: int = 0
    recall: float | None = None


def run(arguments: argparse.Namespace) -> int:
    """Print how well a model predicts a text."""
    measured = measure(arguments)
    print_metrics(measured.metrics, measured.kind, measured.tokens)
    if measured.recall is not None:
        print_recall(measured.recall)
    return 0


def measure(arguments: argparse.Namespace, output: Output = STANDARD_ERROR) -> Measured:
    """Measure how well a model predicts a text.

    Parameters
    ----------
    arguments : Namespace
        The options of the command.
    output : Output

    Raises
    ------
    ValueError, OSError
        If the model or the text cannot be read, or options do not fit.
    """
    threads = threads_of(arguments)
    folder = arguments.model or latest_run()
    place, adapters = resolve(folder, arguments.adapter)
    model = read_model(place, adapters)
    config = model.config
    tokenizer = read_tokenizer(place, config.vocab_size)
    places = (arguments.run_data, arguments.run_validation)
    encoder_of = functools.partial(chat_encoder, place)
    if arguments.data is None:
        settings = Run(folder).settings()
        origin = settings.origin
        origin = moved(origin, folder, *places, arguments.cache, prefix="run-")
        # An adapter may have been trained in shorter sequences than its model, or longer ones.
        length = min(settings.model.sequence_length, config.sequence_length)
        corpus = open_corpus(
            *(origin, settings.data, length, arguments.cache, tokenizer, output.progress),
            encoder_of,
        )
        limit = settings.training.validation_tokens
        metrics = evaluate(model, corpus.validation, threads, limit, tokenizer)
        recall = recall_of_heroes(model, corpus.stories, threads) if corpus.stories else None
        return Measured(metrics, tokenizer.kind, corpus.validation.target_count, recall)
    given_data = DataConfig(**given(arguments, DataConfig))
    if any(places):
        raise ValueError("--run-data and --run-validation exclude --data")
    origin = DataOrigin.of_texts(paths_named(arguments.data, "data", arguments.cache))
    read = (arguments.cache, output.progress)
    length = config.sequence_length
    chats = open_chats(origin, given_data, tokenizer, length, encoder_of, *read)
    if chats is not None:
        dataset, remarks = chats
    else:
        tokens, remarks = open_text(origin, given_data, tokenizer, *read)
        if tokens.size < 2:
            raise ValueError(f"{' '.join(arguments.data)} has one byte, expected at least two")
        dataset = TokenDataset(tokens, min(length, tokens.size - 1), config.pad_token)
    for remark in remarks:
        output.say(remark)
    return Measured(evaluate(model, dataset, threads, 0, tokenizer), tokenizer.kind)


def print_recall(fraction: float) -> None:
    """Print how often a model remembers whom a story is about."""
    print(f"{'right hero':<18}{fraction:.1%} of endings")


def print_metrics(metrics: Metrics, kind: str = "bytes", tokens: int = 0) -> None:
    """Print how well a model predicts tokens of a kind, and on how many of them."""
    unit = "character" if kind in ("bytes", "chars") else "token"
    print(f"{'validation loss':<18}{metrics.loss:.4f} nats per {unit}")
    print(f"{'perplexity':<18}{metrics.perplexity:.4f}")
    if metrics.bytes:
        print(f"{'bits per byte':<18}{metrics.bits_per_byte:.4f}")
    print(f"{'top 1 / 3 / 5':<18}{metrics.top1:.1%} / {metrics.top3:.1%} / {metrics.top5:.1%}")
    if metrics.tokens < _NEARLY_ALL * tokens:
        print(f"{'measured on':<18}{metrics.tokens:,} of {tokens:,} tokens")
    for name, share, part in metrics.parts:
        print(f"{f'loss {part.loss:.4f}':<18}of {name}, {share:.1%} of the training")
