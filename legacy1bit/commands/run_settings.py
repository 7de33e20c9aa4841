"""The settings of a run: those of a file and of the command line, merged."""

import argparse
import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from legacy1bit.commands.options import given, option_of, path_of, threads_of
from legacy1bit.commands.progress import STANDARD_ERROR, Output
from legacy1bit.commands.texts import origin_of
from legacy1bit.config_files import TABLES, Records, read_config, records_of
from legacy1bit.data.corpus import Corpus, open_corpus
from legacy1bit.data.origin import DataOrigin, TextChanged
from legacy1bit.data.published_tokenizer import template_in
from legacy1bit.data.tokenizer import Tokenizer
from legacy1bit.data.tokenizer_files import load_tokenizer, tokenizer_of
from legacy1bit.formats.chat_tokens import chat_encoder
from legacy1bit.hyperparams import DataConfig, ModelConfig, TrainingConfig, architecture_settings
from legacy1bit.system.errors import SettingError
from legacy1bit.training.run import TEACHER_PATH, Run
from legacy1bit.training.start import Start, started
from legacy1bit.training.teacher import Teacher

# The first run is about a minute of training: all steps if they take at most 75 seconds, else those
# of a minute, but enough for a model that remembers the hero of a story (98 % of endings after 300
# steps, 68 % after 200).
FIRST_RUN_SECONDS, _PATIENT_SECONDS, _LEAST_STEPS = 60.0, 75.0, 300


def add_config(command: argparse.ArgumentParser) -> None:
    """Add the option that names a file of settings."""
    command.add_argument(
        "--config",
        metavar="PATH",
        type=path_of,
        help="a file of settings, or a run to train again, on its text; command-line options take "
        "precedence",
    )


def merged_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the settings of the config file, overridden by the command line.

    The tables are those of ``read_config``.
    """
    if arguments.start is not None:
        for name in ("config", "architecture", "tokenizer_from", "tokenizer", "vocabulary"):
            if getattr(arguments, name) is not None:
                raise ValueError(
                    f"--from excludes --{option_of(name)}: the model has its own settings and "
                    "tokens"
                )
    settings = {} if arguments.config is None else read_config(arguments.config)
    if rank := settings.get("training", {}).get("adapter"):
        raise ValueError(
            f"{arguments.config} has adapter {rank}, and --config excludes --from, which an "
            "adapter needs: give its settings as options"
        )
    options = {table: given(arguments, record) for table, record in TABLES.items()}
    if arguments.architecture is not None:
        options["model"] = architecture_settings(arguments.architecture) | options["model"]
    named = (arguments.data, arguments.stories, arguments.validation)
    other_text = any(name is not None for name in named)
    other_tokens = {"tokenizer", "vocabulary"} & options["data"].keys()
    if arguments.tokenizer_from is not None:
        if other_tokens:
            raise ValueError("--tokenizer-from excludes --tokenizer and --vocab-size")
        other_tokens = {"tokenizer", "vocabulary"}
        for name in other_tokens:
            settings.get("data", {}).pop(name, None)
    if "run" in settings and (other_text or other_tokens):
        # The run's vocabulary does not hold any more.
        del settings["model"]["vocab_size"]
    if arguments.teacher is None and TEACHER_PATH in settings.get("source", {}):
        settings["teacher"] = Path(str(settings["source"][TEACHER_PATH]))
    if other_text:
        settings.pop("source", None)
    merged = settings | {table: settings.get(table, {}) | options[table] for table in TABLES}
    if merged["training"].get("adapter"):
        # Adapters are small matrices: what is right for whole models is not for them.
        merged["training"] = {"optimizer": "adamw", "weight_decay": 0.0} | merged["training"]
    return merged


def _records(arguments: argparse.Namespace, settings: dict[str, Any]) -> Records:
    """Return the records of merged settings, with the threads of this machine."""
    if arguments.threads is not None or "threads" not in settings["training"]:
        settings["training"]["threads"] = threads_of(arguments)
    return records_of(settings, arguments.config)


def _tokenizer_of(arguments: argparse.Namespace, settings: dict[str, Any]) -> Tokenizer | None:
    """Return the tokenizer of --tokenizer-from, or of the run that is trained again."""
    if arguments.tokenizer_from is not None:
        return load_tokenizer(arguments.tokenizer_from)
    tokens = settings["model"].get("vocab_size")
    if "run" in settings and tokens is not None and Run(settings["run"]).tokenizer_file.exists():
        return tokenizer_of(settings["run"], tokens)
    return None


def _names_tokens(settings: Mapping[str, Any]) -> bool:
    """Whether merged settings say what a token is."""
    return bool({"tokenizer", "vocabulary"} & settings["data"].keys())


def is_first_run(arguments: argparse.Namespace) -> bool:
    """Whether the command line leaves text, settings and length of a new run to the defaults."""
    named = (
        "data",
        "validation",
        "stories",
        "tokenizer_from",
        "config",
        "resume",
        "start",
        "teacher",
        "minutes",
        "architecture",
    )
    return all(getattr(arguments, name) is None for name in named) and not any(
        given(arguments, record) for record in TABLES.values()
    )


def fit_first_run(
    training: TrainingConfig, within: int, output: Output = STANDARD_ERROR
) -> TrainingConfig:
    """Return the settings of a first run, with fewer steps where the CPU is slow; say why.

    Parameters
    ----------
    training : TrainingConfig
    within : int
        The number of steps in ``FIRST_RUN_SECONDS``.
    output : Output
    """
    rate = within / FIRST_RUN_SECONDS
    if training.steps <= rate * _PATIENT_SECONDS:
        return training
    steps = min(max(within, _LEAST_STEPS), training.steps)
    minutes = f"{steps / rate / 60:.1f}".removesuffix(".0")
    output.say(
        f"this CPU trains {rate:.2g} steps/s: {steps:,} of {training.steps:,} steps, about "
        + ("a minute" if minutes in ("1", "1.1", "1.2") else f"{minutes} minutes")
    )
    return replace(training, steps=steps)


# What the learning rate of a training that goes on from a model is multiplied by.
FROM_A_MODEL = 0.1


@dataclass(frozen=True)
class RunPlan:
    """The settings and the text of a new run.

    Attributes
    ----------
    model, training, data : records of settings
        The model has the vocabulary of the corpus.
    corpus : Corpus
    run : Path or None
        The earlier run that is trained again.
    start : Start or None
        The model that the training goes on from.
    teacher : Teacher or None
        The model whose predictions are learned beside the text.
    """

    model: ModelConfig
    training: TrainingConfig
    data: DataConfig
    corpus: Corpus
    run: Path | None = None
    start: Start | None = None
    teacher: Teacher | None = None


def plan_run(arguments: argparse.Namespace, output: Output = STANDARD_ERROR) -> RunPlan:
    """Return the plan of the run that the command line, and its --config, describe.

    Raises
    ------
    ValueError
        If settings contradict each other, or the text cannot be read.
    OSError
        If a file cannot be read or written.
    """
    settings = merged_settings(arguments)
    start = None if arguments.start is None else Start.read(arguments.start)
    if start is not None:
        settings["model"] = started(start, settings["model"]).to_dict()
    model, training, data = _records(arguments, settings)
    if start is not None and arguments.learning_rate is None:
        rate = training.learning_rate or 0.0
        training = replace(training, learning_rate=rate * FROM_A_MODEL)
    if "source" in settings:
        origin = DataOrigin.from_dict(settings["source"])
        also = ", and --validation its validation text" if origin.validation_paths else ""
        remedy = f"--data says where the text is{also}"
        origin.check_there(remedy)
    else:
        origin, remedy = origin_of(arguments, training.seed), ""
    teacher_path = arguments.teacher or settings.get("teacher")
    teacher = None if teacher_path is None else Teacher.read(teacher_path)
    tokenizer = _tokenizer_of(arguments, settings) if start is None else start.tokenizer
    if tokenizer is None and teacher is not None and not _names_tokens(settings):
        tokenizer = teacher.tokenizer
    path = settings.get("run") if start is None else start.path
    encoder_of = functools.partial(chat_encoder, path)
    length, progress = model.sequence_length, output.progress
    try:
        corpus = open_corpus(origin, data, length, arguments.cache, tokenizer, progress, encoder_of)
    except SettingError as error:
        error.place = None if arguments.config is None else str(arguments.config)
        raise
    except TextChanged as error:
        raise ValueError(f"{error} ({remedy})") from None
    if path is not None and path.is_dir() and corpus.template is None:
        # A model of conversations stays one on other texts.
        corpus = replace(corpus, template=template_in(path))
    for remark in corpus.remarks:
        output.say(remark)
    tokens = settings["model"].get("vocab_size")
    if tokens is not None and tokens != corpus.tokenizer.vocab_size:
        raise ValueError(
            f"{arguments.config}: vocab_size is {tokens}, expected "
            f"{corpus.tokenizer.vocab_size}, the tokenizer's: leave it out, or set vocabulary"
        )
    model = replace(model, vocab_size=corpus.vocab_size)
    return RunPlan(model, training, data, corpus, settings.get("run"), start, teacher)
