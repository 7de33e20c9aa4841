"""What the commands share that train: settings of files and options, and how they are stopped."""

import argparse
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from legacy1bit.commands.options import given, path_of, threads_of
from legacy1bit.commands.progress import progress_of_bytes
from legacy1bit.commands.texts import origin_of
from legacy1bit.config_files import TABLES, Records, read_config, records_of
from legacy1bit.data.corpus import Corpus, open_corpus
from legacy1bit.data.origin import DataOrigin
from legacy1bit.data.tokenizer import TOKENIZER_FILE, Tokenizer, load_tokenizer, tokenizer_of
from legacy1bit.hyperparams import DataConfig, ModelConfig, TrainingConfig
from legacy1bit.system.errors import SettingError


def add_config(command: argparse.ArgumentParser) -> None:
    """Give a command the option that names a file of settings."""
    command.add_argument(
        "--config",
        metavar="PATH",
        type=path_of,
        help="a file of settings, or a run to train again, on its text; options go before it",
    )


def told_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what the config file says, and over it the command line; see ``read_config``."""
    told = {} if arguments.config is None else read_config(arguments.config)
    options = {table: given(arguments, record) for table, record in TABLES.items()}
    named = (arguments.data, arguments.stories, arguments.validation)
    other_text = any(name is not None for name in named)
    other_tokens = {"tokenizer", "vocabulary"} & options["data"].keys()
    if arguments.tokenizer_from is not None:
        if other_tokens:
            raise ValueError("--tokenizer-from excludes --tokenizer and --vocab-size")
        other_tokens = {"tokenizer", "vocabulary"}
        for name in other_tokens:
            told.get("data", {}).pop(name, None)
    if "run" in told and (other_text or other_tokens):
        # How many tokens there are is no longer what the run says.
        del told["model"]["vocab_size"]
    if other_text:
        told.pop("source", None)
    return told | {table: told.get(table, {}) | options[table] for table in TABLES}


def _configs(arguments: argparse.Namespace, told: dict[str, Any]) -> Records:
    """Return all settings of a run that begins here."""
    if arguments.threads is not None or "threads" not in told["training"]:
        told["training"]["threads"] = threads_of(arguments)
    return records_of(told, arguments.config)


def _tokenizer_of(arguments: argparse.Namespace, told: dict[str, Any]) -> Tokenizer | None:
    """Return the tokenizer of the folder that is named, or of the run that is trained again."""
    if arguments.tokenizer_from is not None:
        return load_tokenizer(arguments.tokenizer_from)
    tokens = told["model"].get("vocab_size")
    if "run" in told and tokens is not None and (told["run"] / TOKENIZER_FILE).exists():
        return tokenizer_of(told["run"], tokens)
    return None


@dataclass(frozen=True)
class Beginning:
    """What a run begins with.

    Attributes
    ----------
    model, training, data : records of settings
        The model has as many tokens as the corpus.
    corpus : Corpus
    run : Path or None
        An earlier run, where the settings are its own.
    """

    model: ModelConfig
    training: TrainingConfig
    data: DataConfig
    corpus: Corpus
    run: Path | None = None


def beginning_of(arguments: argparse.Namespace) -> Beginning:
    """Return what the command line, and a file of settings that it names, tell a run.

    Raises
    ------
    ValueError
        If they do not go together, or the text cannot be read.
    OSError
        If a file cannot be read or written.
    """
    told = told_settings(arguments)
    model, training, data = _configs(arguments, told)
    if "source" in told:
        origin = DataOrigin.from_dict(told["source"])
        origin.check_there("--data says where the text lies")
    else:
        origin = origin_of(arguments, training.seed)
    tokenizer = _tokenizer_of(arguments, told)
    try:
        corpus = open_corpus(
            origin, data, model.sequence_length, arguments.cache, tokenizer, progress_of_bytes
        )
    except SettingError as error:
        error.place = None if arguments.config is None else str(arguments.config)
        raise
    for remark in corpus.remarks:
        print(remark, file=sys.stderr)
    tokens = told["model"].get("vocab_size")
    if tokens is not None and tokens != corpus.tokenizer.vocab_size:
        raise ValueError(
            f"{arguments.config}: vocab_size is {tokens}, expected "
            f"{corpus.tokenizer.vocab_size}, the tokenizer's: leave it out, or set vocabulary"
        )
    model = replace(model, vocab_size=corpus.vocab_size)
    return Beginning(model, training, data, corpus, told.get("run"))


class Interrupts:
    """Turns the first Ctrl-C, SIGTERM or SIGHUP into a request to stop; the second acts at once.

    Outside the main thread, where Python handles no signals, nothing is installed.

    Parameters
    ----------
    answer : callable, optional
        Called when the first comes, from a thread of its own: the main one may be in a kernel, and
        learns of it only afterwards. Where the system gives no more threads, it has to do.
    """

    def __init__(self, answer: Callable[[], None] = lambda: None) -> None:
        self.requested = False
        self._answer = answer
        self._watcher: threading.Thread | None = None

    def __enter__(self) -> "Interrupts":
        self._installed = threading.current_thread() is threading.main_thread()
        if not self._installed:
            return self
        # None: a handler that another language has installed, and Python cannot put back.
        self._before = {
            number: signal.signal(number, self._request)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
            if signal.getsignal(number) not in (signal.SIG_IGN, None)
        }
        # The system's own handler writes a byte there for every signal, whatever Python does.
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._earlier = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        watcher = threading.Thread(target=self._watch, name="signals", daemon=True)
        with contextlib.suppress(RuntimeError):
            watcher.start()
            self._watcher = watcher
        return self

    def __exit__(self, *_: object) -> None:
        if not self._installed:
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._earlier)
        os.close(self._write)
        if self._watcher is not None:
            self._watcher.join()
        os.close(self._read)

    def _watch(self) -> None:
        answered = False
        while number := os.read(self._read, 1):
            if number[0] in self._before and not answered:
                answered = True
                self._answer()

    def _request(self, *_: object) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        if self._watcher is None:
            # What is being written to the same file at this moment does not let it in.
            with contextlib.suppress(RuntimeError):
                self._answer()
