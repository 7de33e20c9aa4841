"""``train``: train a model on a text, or on the bundled stories."""

import argparse
import contextlib
import functools
import json
import shlex
import statistics
import sys
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from legacy1bit.commands.evaluate import print_metrics, print_recall
from legacy1bit.commands.interrupts import Interrupts
from legacy1bit.commands.options import (
    RUNS,
    add_model_settings,
    add_settings,
    check_above_zero,
    given,
    new_folder,
    option_of,
    path_of,
    threads_of,
)
from legacy1bit.commands.progress import (
    SILENT,
    STANDARD_ERROR,
    Bar,
    Output,
    progress_of_training,
)
from legacy1bit.commands.run_settings import (
    FIRST_RUN_SECONDS,
    add_config,
    fit_first_run,
    is_first_run,
    merged_settings,
    plan_run,
)
from legacy1bit.commands.texts import add_data, moved
from legacy1bit.config_files import config_text, records_of
from legacy1bit.data import stories
from legacy1bit.data.corpus import open_corpus
from legacy1bit.data.tokenizer_files import tokenizer_of
from legacy1bit.dataset import TokenDataset
from legacy1bit.distributed.ranks import ALONE, Ranks, joined
from legacy1bit.formats.chat_tokens import chat_encoder
from legacy1bit.generator import Generator
from legacy1bit.hyperparams import CHANGEABLE, DataConfig, ModelConfig, TrainingConfig
from legacy1bit.logger import Log, MetricsLogger, NoLog, StepLog, check_tensorboard
from legacy1bit.math_ops import simd_level, simd_levels
from legacy1bit.system.errors import INTERRUPTED, describe
from legacy1bit.threads import available_cores
from legacy1bit.training.checkpoint import best_is_missing, make_newest, newest_checkpoint
from legacy1bit.training.evaluation import recall_of_heroes
from legacy1bit.training.memory import told_bytes
from legacy1bit.training.run import START_HASH, START_PATH, TEACHER_HASH, TEACHER_PATH, Run
from legacy1bit.training.start import Start
from legacy1bit.training.teacher import Teacher
from legacy1bit.training.trainer import Trainer, TrainingCallback, steps_within
from legacy1bit.version import __version__

# Stories that a finished run generates.
_SAMPLES = 20

# More epochs than these make most models memorize a text.
_MANY_EPOCHS = 20

# A rank is slow that computes so many times as long as others, and so many seconds longer.
_SLOW, _SLOW_SECONDS = 1.25, 0.01

# Tokens of the sample at every evaluation, from the same seed, so that only the model differs.
_SAMPLE_TOKENS = 120


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    command.description = (
        "Train a model on a text, or on the bundled stories. Without options it takes about a "
        "minute, and on a slow CPU fewer steps."
    )
    add_data(command)
    add_config(command)
    command.add_argument(
        "--print-config", action="store_true", help="print all settings as such a file, and exit"
    )
    command.add_argument(
        "--out", metavar="DIR", type=new_folder, help="folder of the run (default: new)"
    )
    command.add_argument(
        "--from",
        dest="start",
        metavar="MODEL",
        type=path_of,
        help="go on from a model on another text, with a tenth of the learning rate: a run's "
        "folder, a GGUF file, or a folder of Hugging Face",
    )
    command.add_argument(
        "--teacher",
        metavar="MODEL",
        type=path_of,
        help="learn the predictions of a model with the same tokens, too (knowledge distillation); "
        "with --resume: where the run's teacher has moved to",
    )
    command.add_argument("--resume", metavar="DIR", type=path_of, help="resume an earlier run")
    command.add_argument(
        "--minutes",
        metavar="X",
        type=float,
        help="training time, from which the number of steps follows",
    )
    command.add_argument(
        "--tensorboard", action="store_true", help="write TensorBoard's events, too"
    )
    add_model_settings(command)
    add_settings(command, "the training", TrainingConfig)


def _make_folder(wanted: Path | None) -> tuple[Path, list[Path]]:
    """Create the folder of a new run: the one wanted, or one named by the time.

    Returns the folder, and the folders that were created: it and its parents, innermost first.
    """
    if wanted is not None:
        missing = _missing(wanted)
        wanted.mkdir(parents=True, exist_ok=True)
        return wanted, missing
    name, number = time.strftime("%Y%m%d-%H%M%S"), 1
    while True:
        path = RUNS / (name if number == 1 else f"{name}-{number}")
        missing = _missing(path)
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            number += 1
        else:
            return path, missing


def _missing(folder: Path) -> list[Path]:
    """Return which of a folder and its parents do not exist, innermost first."""
    return [path for path in (folder, *folder.parents) if not path.exists()]


def _print_config(arguments: argparse.Namespace) -> None:
    """Print all settings; those of the machine only where they are given."""
    if arguments.resume is not None:
        raise ValueError("--print-config goes with --config, and not with --resume")
    if arguments.minutes is not None:
        raise ValueError(
            "--print-config excludes --minutes: only training shows how many steps fit"
        )
    settings = merged_settings(arguments)
    unset = () if "threads" in settings["training"] else ("threads",)
    print(config_text(*records_of(settings, arguments.config), unset), end="")


def start(
    arguments: argparse.Namespace,
    ends: contextlib.ExitStack,
    output: Output = STANDARD_ERROR,
    ranks: Ranks = ALONE,
) -> tuple[Trainer, Log]:
    """Return a new run, or one restored from its checkpoint, and lock it.

    Parameters
    ----------
    arguments : Namespace
        The options of the command.
    ends : ExitStack
        Its end unlocks the run, and removes a folder in which nothing was recorded.
    output : Output
    ranks : Ranks
        The processes that train together.

    Raises
    ------
    ValueError, TypeError, OSError, MemoryError
        If options do not fit, a text cannot be read, or the folder is in use or not empty.
    """
    if ranks.size > 1:
        if arguments.threads is None:
            arguments.threads = ranks.threads(available_cores())
        if not ranks.is_first:
            output = SILENT
    if arguments.resume is not None:
        run = Run(arguments.resume)
        run.settings()
        with ranks.first_alone():
            if ranks.is_first:
                ends.enter_context(run.lock())
        trainer = _resume(arguments, output, ranks)
        return trainer, _log_of(trainer, arguments)
    if arguments.tensorboard:
        check_tensorboard()
    check_above_zero(arguments, "minutes")
    if arguments.minutes is not None and arguments.steps is not None:
        raise ValueError("--minutes and --steps exclude each other")
    # The first rank fills the cache, from which others on its machine read.
    with ranks.first_alone():
        if arguments.out is not None and ranks.is_first:
            Run(arguments.out).check_new()
        new = plan_run(arguments, output)
    training = new.training
    if new.run is not None:
        output.say(
            f"new weights, with the settings of {new.run}; to train its own further, on its own "
            f"text: --resume {shlex.quote(str(new.run))}"
        )
    if arguments.minutes is not None:
        seconds = 60 * arguments.minutes
        steps = steps_within(
            seconds, new.model, training, new.corpus, new.data, new.start, new.teacher, ranks
        )
        training = replace(training, steps=steps)
        output.say(f"{steps:,} steps in {arguments.minutes:g} minutes")
    if is_first_run(arguments):
        within = steps_within(
            FIRST_RUN_SECONDS, new.model, training, new.corpus, new.data, ranks=ranks
        )
        training = fit_first_run(training, within, output)
    # The folder last: errors before leave nothing behind.
    trainer = Trainer(
        RUNS,
        new.model,
        training,
        new.corpus,
        new.corpus.origin.to_dict(),
        new.data,
        new.start,
        new.teacher,
        ranks,
    )
    _check_ranks(trainer)
    with ranks.first_alone():
        if ranks.is_first:
            folder, created = _make_folder(arguments.out)
            trainer.run = Run(folder)
            ends.enter_context(trainer.run.lock())
            if arguments.out is not None:
                # Another process may have been faster.
                trainer.run.check_new()
            ends.callback(trainer.run.remove_unstarted, created)
    trainer.run = ranks.broadcast(trainer.run)
    return trainer, _log_of(trainer, arguments)


def _log_of(trainer: Trainer, arguments: argparse.Namespace) -> Log:
    """Return the log of a run that has ``trainer.step`` steps, of which the first rank has one."""
    if not trainer.ranks.is_first:
        return NoLog()
    return MetricsLogger(trainer.folder, trainer.step, arguments.tensorboard)


def _resume(arguments: argparse.Namespace, output: Output, ranks: Ranks) -> Trainer:
    """Restore a run with its own settings, of which only ``CHANGEABLE`` ones may change."""
    folder = arguments.resume
    run = Run(folder)
    settings = run.settings()
    config, origin = settings.training, settings.origin
    origin.check_path()
    new_only = ("config", "out", "minutes", "stories", "tokenizer_from", "architecture")
    named = [name for name in new_only if getattr(arguments, name) is not None]
    # A text that has moved may be named.
    named += [
        name
        for name, paths in (
            ("data", origin.paths or origin.texts),
            ("validation", origin.validation_paths),
        )
        if getattr(arguments, name) is not None and not paths
    ]
    # So may another model that the run still needs.
    named += [
        name
        for name, sha256 in (("teacher", TEACHER_HASH), ("start", START_HASH))
        if getattr(arguments, name) is not None and sha256 not in settings.source
    ]
    for record in (ModelConfig, TrainingConfig, DataConfig):
        named += given(arguments, record)
    refused = [option_of(name) for name in named if name not in CHANGEABLE]
    if refused:
        raise ValueError(
            f"--{refused[0]} cannot change in a run that goes on: only --steps, --threads, "
            "--precision and --patience can"
        )
    changes = {name: getattr(arguments, name) for name in named}
    if "threads" in changes:
        changes["threads"] = threads_of(arguments)
    config = replace(config, **changes)
    fixed = settings.fixed()
    checkpoint, errors = newest_checkpoint(run, fixed)
    for error in errors:
        output.say(f"{describe(error)}; going on with {checkpoint.path}")
    done, best_step = checkpoint.step, checkpoint.best[1]
    waited = config.patience_ends(done, best_step)
    if waited or done >= config.steps:
        # A crash may have come between its last checkpoint and the steps after that.
        make_newest(run, checkpoint)
        if best_is_missing(run, fixed, checkpoint.best, done):
            run.keep_best()
        if waited and done < config.steps:
            raise ValueError(
                f"{folder} has had its best step at {best_step} and ended at {done}, by its "
                f"--patience of {config.patience}: give a higher one, or 0, to go on"
            )
        raise ValueError(f"{folder} has had its {done} steps: give more with --steps to go on")
    tokenizer = tokenizer_of(folder, settings.model.vocab_size)
    origin = moved(origin, folder, arguments.data, arguments.validation, arguments.cache)
    length = settings.model.sequence_length
    with ranks.first_alone():
        corpus = open_corpus(
            *(origin, settings.data, length, arguments.cache, tokenizer, output.progress),
            functools.partial(chat_encoder, folder),
        )
    for remark in corpus.remarks:
        output.say(remark)
    source = settings.source | corpus.origin.to_dict()
    teacher = _model_of(settings.source, "teacher", arguments.teacher)
    start = _model_of(settings.source, "from", arguments.start)
    trainer = Trainer(
        folder,
        settings.model,
        config,
        corpus,
        source,
        settings.data,
        None if start is None else Start.read(start),
        None if teacher is None else Teacher.read(teacher),
        ranks,
    )
    trainer.restore(checkpoint)
    _check_ranks(trainer)
    output.say(f"going on with {folder} at step {trainer.step}")
    return trainer


def _model_of(source: Mapping[str, Any], option: str, moved_to: Path | None) -> Path | None:
    """Return where another model is that a run needs to go on, or None."""
    path, sha256 = {
        "teacher": (TEACHER_PATH, TEACHER_HASH),
        "from": (START_PATH, START_HASH),
    }[option]
    if sha256 not in source:
        return None
    place = Path(str(source.get(path))) if moved_to is None else moved_to
    if not place.exists():
        raise ValueError(
            f"{place} is not there, which the run needs: --{option} says where it has moved to"
        )
    return place


def run(arguments: argparse.Namespace) -> int:
    """Train, with a progress bar, and report."""
    if arguments.print_config:
        _print_config(arguments)
        return 0
    with joined() as ranks, contextlib.ExitStack() as ends:
        trainer, logger = start(arguments, ends, ranks=ranks)
        _say_ranks(trainer)
        status = _train(trainer, logger)
    steps = TrainingConfig().steps
    if status == 0 and ranks.is_first and is_first_run(arguments) and trainer.config.steps < steps:
        print(
            f"to train it for all {steps:,} steps:\n  legacy1bit train --resume "
            f"{shlex.quote(str(trainer.folder))} --steps {steps}"
        )
    return status


def _check_ranks(trainer: Trainer) -> None:
    """Raise ``ValueError`` where a rank would train something else than the first."""
    own = {
        "version": __version__,
        "settings": json.dumps(trainer.fixed_settings, sort_keys=True),
        "precision": trainer.config.precision,
        "step": trainer.step,
        "text": trainer.corpus.sha256,
    }
    every = trainer.ranks.collect((trainer.ranks.host, own))
    for rank, (host, found) in enumerate(every):
        for name, value in every[0][1].items():
            if found[name] != value:
                values = "" if name == "settings" else f" ({found[name]}, not {value})"
                raise ValueError(
                    f"rank {rank} on {host} differs from rank 0 in its {name}{values}: expected "
                    "the same"
                )


def _say_ranks(trainer: Trainer) -> None:
    """Say who trains, and what to do when one of them is lost."""
    ranks = trainer.ranks
    every = ranks.collect((ranks.host, simd_level(), trainer.config.threads))
    known = ranks.collect(simd_levels())
    if ranks.size == 1 or not ranks.is_first:
        return
    lines = [
        f"{ranks.size} ranks, each with its part of every batch: "
        + ", ".join(
            f"{count} on {host} ({simd}, {threads} threads)"
            for (host, simd, threads), count in Counter(every).items()
        )
    ]
    if len({simd for _, simd, _ in every}) > 1:
        *_, best = (level for level in known[0] if all(level in levels for levels in known))
        lines.append(
            "their instruction sets differ, so that other CPUs will not repeat this run to the "
            f"bit: LEGACY1BIT_SIMD={best} makes them equal"
        )
    lines.append(f"if a rank is lost, go on with: {_resuming(trainer)}")
    STANDARD_ERROR.say("\n".join(lines))


def _resuming(trainer: Trainer) -> str:
    """Return the command that resumes a run."""
    launcher = "" if trainer.ranks.size == 1 else f"mpirun -n {trainer.ranks.size} "
    return f"{launcher}legacy1bit train --resume {shlex.quote(str(trainer.folder))}"


def _train(trainer: Trainer, logger: Log) -> int:
    """Train to the end, or until interrupted."""
    if not trainer.ranks.is_first:
        with Interrupts() as interrupts:
            done = trainer.train(logger, _Waiting(interrupts))
        return 0 if done else INTERRUPTED
    say_what_is_trained(trainer, STANDARD_ERROR)
    progress = progress_of_training()

    def answer() -> None:
        progress.console.print("stopping after this step; once more: at once, without saving")

    with Interrupts(answer) as interrupts, progress, contextlib.closing(logger):
        done = trainer.train(logger, _Display(trainer, progress, interrupts))
    if not done:
        print(
            f"stopped at step {trainer.step} of {trainer.config.steps}; go on with:\n"
            f"  {_resuming(trainer)}",
            file=sys.stderr,
        )
        return INTERRUPTED
    _report(trainer)
    return 0


def say_what_is_trained(trainer: Trainer, output: Output) -> None:
    """Say how large the model is and on what it is trained, and whether it may overfit."""
    model = trainer.model
    config, adapter = model.config, model.adapter
    what = f"{model.num_parameters:,} parameters"
    if adapter is not None:
        what = (
            f"an adapter of rank {adapter.rank}, {model.num_trainable:,} parameters, on a model of "
            f"{what}"
        )
    lines = [
        f"training {what} ({config.scheme}, {config.num_blocks} blocks of {config.model_dim}) on "
        f"{trainer.corpus.name}, {trainer.config.threads} threads, {simd_level()}, "
        f"{trainer.config.precision}, "
        + ", ".join(f"{epochs:.1f} epochs{of}" for of, epochs in _epochs(trainer).items())
    ]
    if trainer.teacher is not None:
        lines.append(
            f"learning from {trainer.teacher.path} ({trainer.teacher.model.num_parameters:,} "
            f"parameters): weight {trainer.config.distillation_weight:g}, temperature "
            f"{trainer.config.teacher_temperature:g}"
        )
    lines.append(f"memory: {told_bytes(trainer.memory)}")
    most = max(_epochs(trainer).values())
    if most > _MANY_EPOCHS and not trainer.config.patience:
        lines.append(
            f"{most:.0f} epochs may overfit: use more text or fewer --steps, or stop "
            "early with --patience 3"
        )
    # At once: who reads the first line only may be gone after it.
    output.say("\n".join(lines))


class SampleLog:
    """Writes what the model generates at each evaluation, always from the same seed.

    Models of the tokens of another program, and of texts without boundaries, have no samples.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer, self._log = trainer, None
        if trainer.tokenizer.bos_token is not None:
            self._log = StepLog(trainer.run.samples_file, trainer.step)

    def write(self, step: int) -> str | None:
        """Generate the sample of a step, write and return it; None where there are none."""
        if self._log is None:
            return None
        generator = Generator(self._trainer.model, self._trainer.tokenizer)
        sample = generator.complete("", _SAMPLE_TOKENS, seed=0)
        self._log.log({"step": step, "prompt": "", "text": sample.text})
        return sample.text


def evaluation_line(record: Mapping[str, Any]) -> str:
    """Return the record of an evaluation as a line for people."""
    return (
        f"step {record['step']:>6}  train loss {record['train_loss']:.4f}  "
        f"validation loss {record['val_loss']:.4f}{_losses_of(record)}  "
        f"{record['tokens_per_second']:,.0f} tokens/s"
    )


def slow_ranks(record: Mapping[str, Any]) -> str:
    """Return a remark on the ranks for which others wait, where there are any."""
    ranks = record.get("ranks", [])
    usual = statistics.median_low(one["computing"] for one in ranks) if ranks else 0.0
    slow = [
        f"rank {number} on {one['host']} takes {one['computing']:.3g} s"
        for number, one in enumerate(ranks)
        if one["computing"] > max(_SLOW * usual, usual + _SLOW_SECONDS)
    ]
    return f"slow: {', '.join(slow)} for a step, others {usual:.3g} s" if slow else ""


def _losses_of(record: Mapping[str, Any]) -> str:
    """Return the loss of each text, where several are mixed."""
    losses = [f"{name} {loss:.4f}" for name, loss in record.get("val_losses", {}).items()]
    return f" ({', '.join(losses)})" if losses else ""


class _Waiting(TrainingCallback):
    """Stops a training when interrupted."""

    def __init__(self, interrupts: Interrupts) -> None:
        self._interrupts = interrupts

    def should_stop(self) -> bool:
        return self._interrupts.requested


class _Display(_Waiting):
    """Shows the progress of a training, writes its samples, and stops it when interrupted."""

    def __init__(self, trainer: Trainer, progress: Bar, interrupts: Interrupts) -> None:
        super().__init__(interrupts)
        self._trainer, self._progress = trainer, progress
        self._samples = SampleLog(trainer)
        self._task = progress.add_task(
            "",
            total=trainer.config.steps,
            completed=trainer.step,
            first=trainer.step,
            loss=float("nan"),
            speed=0.0,
        )

    def on_step(self, loss: float, tokens_per_second: float) -> None:
        self._progress.update(
            self._task, completed=self._trainer.step, loss=loss, speed=tokens_per_second
        )

    def on_evaluation(self, record: dict[str, Any]) -> None:
        self._samples.write(record["step"])

    def on_save(self, record: dict[str, Any]) -> None:
        self._progress.write(evaluation_line(record))
        if remark := slow_ranks(record):
            self._progress.write(remark)


def _epochs(trainer: Trainer) -> dict[str, float]:
    """Return the number of epochs of a run; of each of several texts, by " of " and its name."""
    config, dataset = trainer.config, trainer.corpus.training
    a_step = config.batch_size * config.gradient_accumulation * dataset.sequence_length
    if isinstance(dataset, TokenDataset):
        return {"": config.steps * a_step / dataset.token_count}
    return {
        f" of {part.name}": config.steps * a_step * part.share / part.dataset.token_count
        for part in dataset.parts
    }


def _report(trainer: Trainer) -> None:
    """Print the results of a run that has ended."""
    corpus, threads, tokenizer = trainer.corpus, trainer.config.threads, trainer.tokenizer
    model, metrics = trainer.best_model()
    if trainer.step < trainer.config.steps:
        print(
            f"ended at step {trainer.step} of {trainer.config.steps}: {trainer.config.patience} "
            "evaluations without a lower validation loss",
            file=sys.stderr,
        )
    if model is not trainer.model and trainer.metrics is not None:
        print(
            f"{'best at step':<18}{model.provenance.steps} of {trainer.step}; the last step's "
            f"validation loss was {trainer.metrics.loss:.4f}"
        )
    print_metrics(metrics, tokenizer.kind, corpus.validation.target_count)
    if corpus.floor is not None:
        print(
            f"{'entropy floor':<18}{corpus.floor:.4f} nats per character "
            f"(the loss is {metrics.loss / corpus.floor - 1:.1%} above)"
        )
    generator = Generator(model, tokenizer)
    if corpus.stories:
        print_recall(recall_of_heroes(model, corpus.stories, threads))
        longest = model.config.sequence_length
        texts = generator.batch([""] * _SAMPLES, longest, seed=0, stop=["\n"])
        written = [story.text for story in texts]
        whole = sum(stories.is_story(story) for story in written)
        print(f"{'whole stories':<18}{whole} of {_SAMPLES} that it wrote obey the grammar")
        print("\nsample:\n  " + "\n  ".join(written[:3]))
    elif tokenizer.bos_token is not None:
        print("\nsample:\n" + generator.complete("", 300, seed=0).text)
    folder, prompt = shlex.quote(str(trainer.folder)), "Kim was a" if corpus.stories else "The"
    size = trainer.model.stored_bytes()
    ending = f"\nthe run is in {trainer.folder} ({size:,} bytes of weights)"
    if tokenizer.kind == "unknown":
        print(ending)
    else:
        print(f"{ending}; next:")
        command = "chat" if corpus.template is not None else "generate"
        ending = "" if command == "chat" else f' --prompt "{prompt}"'
        print(f"  legacy1bit {command} --model {folder}{ending}")
