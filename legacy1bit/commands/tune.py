"""``tune``: search for the best settings within a budget of time and bytes."""

import argparse
import functools
import multiprocessing
import shlex
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

from legacy1bit.commands.interrupts import Interrupts
from legacy1bit.commands.options import (
    add_model_settings,
    add_settings,
    check_above_zero,
    given,
    new_folder,
    option_of,
    path_of,
    size_of,
    threads_of,
)
from legacy1bit.commands.progress import progress_of_bytes, progress_of_tuning
from legacy1bit.commands.run_settings import add_config, plan_run
from legacy1bit.commands.streams import unfailing
from legacy1bit.commands.texts import add_data, moved, words_of
from legacy1bit.config_files import write_config
from legacy1bit.data.corpus import Corpus, open_corpus
from legacy1bit.data.origin import DataOrigin, Kind
from legacy1bit.data.tokenizer import TOKENIZER_FILE, Tokenizer
from legacy1bit.data.tokenizer_files import load_tokenizer
from legacy1bit.formats.chat_tokens import chat_encoder
from legacy1bit.hyperparams import DataConfig, ModelConfig, TrainingConfig
from legacy1bit.search.space import Dimension, default_space, read_space
from legacy1bit.search.study import (
    DEAD_SECONDS,
    OBJECTIVES,
    SAMPLERS,
    STATES,
    STUDY_FILE,
    STUDY_NAME,
    Budget,
    StudyConfig,
    StudyRecord,
    TrialResult,
    Tuner,
    best_of,
    hide_password,
    open_storage,
    open_study,
    own_database,
    results_of,
    study_at_hand,
)
from legacy1bit.system.cgroups import can_start_threads
from legacy1bit.system.errors import INTERRUPTED, describe
from legacy1bit.system.files import remove
from legacy1bit.system.hardware import machine

STUDIES = Path("studies")
# The best settings.
BEST_FILE = "best.toml"

# Options that a resumed study cannot change, beside the settings of model, training and data.
_FIXED = (
    *("out", "space", "seconds", "sampler", "max_bytes", "min_speed", "objectives"),
    *("study", "config", "stories", "tokenizer_from"),
)

_ABOVE_ZERO = ("minutes", "trials", "trial_patience", "seconds", "min_speed", "jobs", "max_bytes")

_SECONDS = 60.0
_MOST_JOBS = 256
_MOST_PRINTED = 5


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    command.description = (
        "Search for the settings that give the best model within a given training time, and "
        "optionally a given size. All other settings are those of train: a setting on the "
        "command line is fixed, one in a --config is where the search starts."
    )
    add_data(command)
    add_config(command)
    command.set_defaults(start=None, teacher=None)
    group = command.add_argument_group("the search")
    option = group.add_argument
    option("--out", metavar="DIR", type=new_folder, help="the study's folder (default: new)")
    option("--resume", metavar="DIR", type=path_of, help="resume a study, or join it")
    option("--space", metavar="FILE", type=path_of, help="the settings to search, and their ranges")
    option("--print-space", action="store_true", help="print the default --space, and exit")
    option("--minutes", metavar="X", type=float, help="duration of the search (default: 20)")
    option("--trials", metavar="N", type=int, help="number of models to train")
    option(
        "--patience",
        metavar="N",
        type=int,
        dest="trial_patience",
        help="stop after N trials without a gain",
    )
    option(
        "--seconds", metavar="X", type=float, help=f"training time of a model (default: {_SECONDS})"
    )
    option("--sampler", choices=SAMPLERS, help="proposes the trials (default: tpe)")
    option(
        "--max-bytes",
        metavar="N",
        type=size_of,
        help="largest file of a model; 500kB is 500000",
    )
    option("--min-speed", metavar="X", type=float, help="slowest generation, in tokens per second")
    option(
        "--objectives",
        metavar="A,B",
        type=_objectives,
        help="loss, bytes, speed; of several, the Pareto front (default: loss)",
    )
    option("--no-prune", action="store_true", help="do not end bad trials early")
    option(
        "--jobs",
        metavar="N",
        type=int,
        default=1,
        help="processes to share the cores (default: 1)",
    )
    option("--storage", metavar="URL", help="the study's database (default: SQLite, in its folder)")
    option("--study", metavar="NAME", help=f"its name there (default: {STUDY_NAME})")
    add_model_settings(command)
    # --patience is the study's; that of a training is set in a file.
    names = [setting.name for setting in fields(TrainingConfig) if setting.name != "patience"]
    add_settings(command, "the training", TrainingConfig, names)


def _objectives(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if not set(names) <= OBJECTIVES.keys() or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(
            f"it is {text!r}, expected some of {', '.join(OBJECTIVES)}, with commas between"
        )
    return names


def run(arguments: argparse.Namespace) -> int:
    """Search, report every trial, and write the best settings."""
    if arguments.print_space:
        print(default_space().read_text(encoding="utf-8"), end="")
        return 0
    with study_at_hand():
        return _search(arguments)


def _search(arguments: argparse.Namespace) -> int:
    """Run trials until the budget is used up, or the user interrupts."""
    check_above_zero(arguments, *_ABOVE_ZERO)
    budget = Budget(arguments.minutes, arguments.trials, arguments.trial_patience)
    if budget == Budget():
        budget = Budget(minutes=20.0)
    if arguments.jobs > _MOST_JOBS:
        raise ValueError(f"--jobs is {arguments.jobs}, expected 1 to {_MOST_JOBS}")
    # A trial has a thread for its heartbeat; the processes share one more process.
    needed = 1 if arguments.jobs == 1 else 2 * arguments.jobs + 1
    if not can_start_threads(needed):
        raise ValueError(
            f"the system does not allow the {needed} threads or processes more that tune needs: "
            "lower --jobs, or raise the limit (ulimit -u)"
        )
    threads = max(threads_of(arguments) // arguments.jobs, 1)
    work = _begin(arguments, threads, budget)
    # Errors in the text come before anything else.
    corpus, _ = work.corpus_of(work.config.model)
    if arguments.resume is not None:
        for remark in corpus.remarks:
            print(remark, file=sys.stderr)
    print(
        f"searching {len(work.config.space)} settings, trials of {work.config.length} on {threads} "
        f"threads each, {arguments.jobs} at a time: {work.folder}",
        file=sys.stderr,
    )
    with Interrupts() as interrupts:
        if arguments.jobs > 1:
            _run_jobs(work, budget, arguments.jobs, interrupts)
        else:
            work.run(budget, lambda: interrupts.requested)
        stopped = interrupts.requested
    has_best = work.report()
    if stopped:
        print(
            f"stopped; go on with:\n  legacy1bit tune --resume {shlex.quote(str(work.folder))}",
            file=sys.stderr,
        )
        return INTERRUPTED
    return 0 if has_best else 1


class _Work:
    """A study on this machine.

    Parameters
    ----------
    folder : Path
    url, name : str
        The address of the database, and the name of the study in it.
    origin : DataOrigin
        Where the text comes from.
    config : StudyConfig or None
        None: that of the existing study.
    threads : int
    cache : Path or None
    tokenizer : Tokenizer or None
    """

    def __init__(
        self,
        folder: Path,
        url: str,
        name: str,
        origin: DataOrigin,
        config: StudyConfig | None,
        threads: int,
        cache: Path | None,
        tokenizer: Tokenizer | None,
    ) -> None:
        self.folder, self._origin = folder, origin
        self._cache, self._tokenizer = cache, tokenizer
        self._corpora: dict[int, Corpus] = {}
        self.study, self.config = open_study(open_storage(url), name, config, threads)
        self._again = (folder, url, name, origin, None, threads, cache, tokenizer)

    def corpus_of(self, model: ModelConfig) -> tuple[Corpus, ModelConfig]:
        """Return a corpus of a model's sequence length, and the model with its vocabulary size."""
        length = model.sequence_length
        if length not in self._corpora:
            self._corpora[length] = open_corpus(
                self._origin,
                self.config.data,
                length,
                self._cache,
                self._tokenizer,
                progress_of_bytes,
                functools.partial(chat_encoder, None),
            )
            if self._corpora[length].sha256 != self.config.sha256:
                raise ValueError("the text is not that of the study's other trials")
        corpus = self._corpora[length]
        return corpus, replace(model, vocab_size=corpus.vocab_size)

    def run(self, budget: Budget, stop: Callable[[], bool]) -> None:
        """Run trials here."""
        with progress_of_tuning() as progress:
            task = progress.add_task("", total=1.0, trial="", loss=float("nan"), best="")

            def on_evaluation(number: int, done: float, loss: float) -> None:
                progress.update(task, completed=done, trial=f"trial {number}", loss=loss)

            def on_end(result: TrialResult) -> None:
                if result.state == "refused":
                    return
                best = best_of(results_of(self.study), self.config.objectives)
                progress.write(_line(result, result in best))
                if best:
                    progress.update(task, best=f"best {best[0].loss:.4f}")
                    if result in best:
                        self._write_best(best[0])

            tuner = Tuner(
                self.study,
                self.config,
                self.corpus_of,
                self._origin.to_dict(),
                self.folder,
                on_evaluation,
                on_end,
            )
            tuner.run(budget, stop)

    def _write_best(self, best: TrialResult) -> None:
        write_config(
            self.folder / BEST_FILE,
            ModelConfig.from_dict(best.model),
            TrainingConfig.from_dict(best.training),
            self.config.data,
        )

    def report(self) -> bool:
        """Print the best trials; return whether there is one."""
        results = results_of(self.study)
        front = best_of(results, self.config.objectives)
        if not front:
            print(
                f"none of {len(results)} trials is complete; the trial of a killed process is "
                f"repeated {DEAD_SECONDS:g} s later",
                file=sys.stderr,
            )
            return False
        self._write_best(front[0])
        printed = front
        if len(self.config.objectives) == 1:
            complete = [result for result in results if result.state == "complete"]
            printed = sorted(complete, key=lambda result: result.loss or 0.0)[:_MOST_PRINTED]
        states = [result.state for result in results]
        print(
            f"{len(results)} trials: "
            + ", ".join(
                f"{states.count(state)} {words}"
                for state, words in STATES.items()
                if state in states
            )
        )
        for result in printed:
            print(_line(result, False))
        words = [] if self._origin.kind is Kind.STORIES else words_of(self._origin)
        text = f" {shlex.join(words)}" if words else ""
        config = shlex.quote(str(self.folder / BEST_FILE))
        print(f"\nthe best settings are in {config}; next:")
        print(f"  legacy1bit train --config {config}{text}")
        return True


def _line(result: TrialResult, best: bool) -> str:
    """Return a trial in one line."""
    loss = "" if result.loss is None else f"loss {result.loss:.4f}"
    parts = [f"trial {result.number:>4}", f"{loss:<11}"]
    if result.bytes is not None:
        parts.append(f"{result.bytes:>11,} bytes")
    if result.speed is not None:
        parts.append(f"{result.speed:,.0f} tokens/s")
    parts.append(f"{result.seconds:4.0f} s")
    parts.append(
        ", ".join(
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
            for name, value in result.params.items()
        )
    )
    if result.state == "pruned":
        parts.append(f"(ended early{': ' + result.reason if result.reason else ''})")
    elif result.state == "failed":
        parts.append("(lost)")
    elif best:
        parts.append("(the best so far)")
    return "  ".join(parts)


def _begin(arguments: argparse.Namespace, threads: int, budget: Budget) -> _Work:
    """Return a new study, or an existing one."""
    name = arguments.study or STUDY_NAME
    if arguments.resume is not None:
        work = _resume(arguments, threads)
        _check_time(work.config, budget)
        return work
    steps = "steps" in given(arguments, TrainingConfig)
    if steps and arguments.seconds is not None:
        raise ValueError("--seconds and --steps exclude each other")
    space, fixed = _space(arguments)
    _check_out(arguments.out)
    if arguments.storage is None and arguments.out is not None:
        own_database(arguments.out)
    elif arguments.storage == "":
        raise ValueError("--storage is empty, expected a database's address")
    elif arguments.storage in ("sqlite://", "sqlite:///:memory:"):
        raise ValueError(
            f"--storage {arguments.storage} is gone with the process, expected a file's: "
            "sqlite:///study.db"
        )
    new = plan_run(arguments)
    if new.teacher is not None:
        raise ValueError(f"{arguments.config} has a teacher, and trials of a study have none")
    config = StudyConfig(
        space,
        new.model,
        replace(new.training, threads=threads),
        new.data,
        new.corpus.sha256,
        None if steps else arguments.seconds or _SECONDS,
        arguments.sampler or "tpe",
        arguments.objectives or ("loss",),
        arguments.max_bytes,
        arguments.min_speed,
        not arguments.no_prune,
    )
    if config.sampler == "grid":
        for dimension in space:
            dimension.values()
    _check_time(config, budget)
    folder, made = _make_folder(arguments.out)
    try:
        work = _Work(
            folder,
            arguments.storage or own_database(folder),
            name,
            new.corpus.origin,
            config,
            threads,
            arguments.cache,
            new.corpus.tokenizer,
        )
        new.corpus.tokenizer.save(folder)
        words = shlex.join([hide_password(word) for word in arguments.words])
        command = f"legacy1bit {words}"
        StudyRecord(
            name, new.corpus.origin.to_dict(), arguments.storage is None, command, machine()
        ).save(folder)
    except BaseException:
        # The folder can be used again. One that existed before stays.
        if made:
            remove(folder)
        raise
    if fixed:
        print(f"not searched, as the command line sets it: {_options(fixed)}", file=sys.stderr)
    return work


def _check_time(config: StudyConfig, budget: Budget) -> None:
    """Raise ``ValueError`` if no trial fits into the budget."""
    minutes, seconds = budget.minutes, config.seconds
    if minutes is not None and seconds is not None and seconds > 60 * minutes:
        raise ValueError(f"a trial of {seconds:g} s does not fit into {minutes:g} minutes")


def _space(arguments: argparse.Namespace) -> tuple[tuple[Dimension, ...], list[str]]:
    """Return the space without the settings that the command line fixes, and those settings."""
    path = arguments.space or default_space()
    sized = arguments.max_bytes is not None or "bytes" in (arguments.objectives or ())
    space = tuple(one for one in read_space(path) if sized or not one.for_bytes)
    if not space:
        raise ValueError(f"{path} has nothing to search without --max-bytes")
    named = given(arguments, ModelConfig) | given(arguments, TrainingConfig)
    fixed = [one.name for one in space if one.name in named]
    space = tuple(one for one in space if one.name not in fixed)
    if not space:
        raise ValueError(
            f"{path} has nothing to search besides what the command line sets: leave out one of "
            f"{_options(fixed)}"
        )
    return space, fixed


def _options(names: Sequence[str]) -> str:
    return ", ".join(f"--{option_of(name)}" for name in names)


def _resume(arguments: argparse.Namespace, threads: int) -> _Work:
    folder = arguments.resume
    named: Sequence[str] = [name for name in _FIXED if getattr(arguments, name) is not None]
    for record in (ModelConfig, TrainingConfig, DataConfig):
        named = [*named, *(key for key in given(arguments, record) if key != "threads")]
    if named or arguments.no_prune:
        option = option_of((named or ["no_prune"])[0])
        raise ValueError(f"--{option} cannot be changed when a study goes on")
    study = StudyRecord.read(folder)
    url = study.url(folder, arguments.storage)
    tokenizer = load_tokenizer(folder) if (folder / TOKENIZER_FILE).exists() else None
    origin = moved(
        DataOrigin.from_dict(study.source),
        folder,
        arguments.data,
        arguments.validation,
        arguments.cache,
    )
    return _Work(folder, url, study.study, origin, None, threads, arguments.cache, tokenizer)


def _check_out(wanted: Path | None) -> None:
    if wanted is not None and wanted.exists() and (not wanted.is_dir() or any(wanted.iterdir())):
        if (wanted / STUDY_FILE).exists():
            raise ValueError(f"{wanted} holds a study already: --resume it, or name another folder")
        raise ValueError(f"{wanted} is not an empty folder: name another")


def _make_folder(wanted: Path | None) -> tuple[Path, bool]:
    """Return the folder of a study, and whether it was created."""
    path = wanted or STUDIES / time.strftime("%Y%m%d-%H%M%S")
    try:
        path.mkdir(parents=True)
    except FileExistsError:
        if wanted is None or not path.is_dir():
            raise
        return path, False
    return path, True


def _run_jobs(work: _Work, budget: Budget, jobs: int, interrupts: Interrupts) -> None:
    """Run trials in several processes, and wait for them."""
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_job, args=(work._again, budget)) for _ in range(jobs)]
    # A terminal's signals reach all of its processes. Only the first handles them and ends the
    # others, which start with these blocked, because they cannot handle them yet.
    of_terminals = {signal.SIGINT, signal.SIGHUP}
    # Started here, or the first process would start it with the signals blocked.
    resource_tracker.ensure_running()
    try:
        for process in processes:
            before = signal.pthread_sigmask(signal.SIG_BLOCK, of_terminals)
            try:
                process.start()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
        stopping = False
        while any(process.is_alive() for process in processes):
            if interrupts.requested and not stopping:
                stopping = True
                for process in processes:
                    process.terminate()
            for process in processes:
                process.join(0.1)
    except BaseException:
        for process in processes:
            if process.pid is not None:
                process.kill()
        raise
    failed = [process.exitcode for process in processes if process.exitcode]
    if failed and len(failed) == len(processes) and not interrupts.requested:
        raise ValueError("no process could work on the study: see above")


def _job(again: tuple[Any, ...], budget: Budget) -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None

    def stop() -> bool:
        # Without the first process nothing would end the others.
        return interrupts.requested or not parent.is_alive()

    # To the end of the process, which writes what is left.
    sys.stderr = unfailing(sys.stderr)
    try:
        with Interrupts() as interrupts, study_at_hand():
            _Work(*again).run(budget, stop)
    except (ValueError, OSError, MemoryError) as error:
        print(f"legacy1bit: error: {describe(error)}", file=sys.stderr)
        sys.exit(2)
