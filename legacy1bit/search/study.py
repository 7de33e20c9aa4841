"""The search for the best settings within a budget of time and bytes.

A study is a list of trials in a database; each trial trains one model for a given time and is
measured. Optuna proposes what to try next and ends bad trials early; any number of processes, on
one machine or on several, can work on one study.
"""

import contextlib
import hashlib
import importlib
import json
import math
import os
import shutil
import time
import traceback
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from legacy1bit.data.corpus import Corpus
from legacy1bit.data.origin import located
from legacy1bit.generator import Generator
from legacy1bit.hyperparams import (
    ALIASES,
    DataConfig,
    ModelConfig,
    TrainingConfig,
    renamed,
)
from legacy1bit.logger import MetricsLogger
from legacy1bit.model import create_legacy_llm, save_model
from legacy1bit.search.space import Dimension, GridSearch, apply
from legacy1bit.system.files import atomic_write, read_regular
from legacy1bit.system.optional import load_extra
from legacy1bit.training.divergence import TrainingDiverged
from legacy1bit.training.run import Run
from legacy1bit.training.trainer import Trainer, TrainingCallback, steps_within

SAMPLERS = ("tpe", "random", "grid")
# The objectives of trials, and their directions.
OBJECTIVES = {"loss": "minimize", "bytes": "minimize", "speed": "maximize"}

# The states of ended trials, in words.
STATES = {
    "complete": "to their end",
    "pruned": "ended early",
    "refused": "not begun, beyond a limit",
    "failed": "lost",
}

# The default name of a study in its database, its own database, and the record of its folder.
STUDY_NAME, DATABASE_FILE, STUDY_FILE = "study", "study.db", "tune.json"

# Evaluations of a trial; each may prune it.
_EVALUATIONS = 8
# Complete trials before the pruner compares others with them, and before the sampler learns from
# them.
_COMPARED, _STARTING = 4, 8

# Prune a trial worse than this percentile of the others. The median is too strict: while the
# learning rate is high, the best of all may well lie in the worse half.
_PRUNED_PERCENTILE = 75.0

# The interval of heartbeats, and the age of the last one at which a process counts as dead: its
# trial is repeated.
_HEARTBEAT_SECONDS, DEAD_SECONDS = 20, 90

# Bytes of the provenance in the file of a trained model.
_PROVENANCE_BYTES = 400

# Attempts to open a database.
_ATTEMPTS = 10

# Tokens that are generated to measure the speed.
_PROBE_TOKENS = 100


# --- What a study is ------------------------------------------------------------------------------


@dataclass(frozen=True)
class StudyConfig:
    """The settings of a study, the same for all its trials.

    Attributes
    ----------
    space : tuple of Dimension
    model, training, data : records
        The settings that are not searched, and the first trial's values of those that are.
    sha256 : str
        The hash of the text.
    seconds : float or None
        The training time of a trial, from which its steps follow; None: ``training.steps``.
    sampler : {"tpe", "random", "grid"}
    objectives : tuple of {"loss", "bytes", "speed"}
        The validation loss in nats per token, the size of the model's file, and the tokens per
        second that it generates. Of several, the best trials are the Pareto front.
    most_bytes : int or None
        Larger models are not trained.
    least_speed : float or None
        Nor are those that generate fewer tokens per second.
    prune : bool
        Whether bad trials are pruned.
    """

    space: tuple[Dimension, ...]
    model: ModelConfig
    training: TrainingConfig
    data: DataConfig
    sha256: str
    seconds: float | None = 60.0
    sampler: str = "tpe"
    objectives: tuple[str, ...] = ("loss",)
    most_bytes: int | None = None
    least_speed: float | None = None
    prune: bool = True

    @property
    def length(self) -> str:
        """The length of a trial, in words."""
        if self.seconds is None:
            return f"{self.training.steps:,} steps"
        return f"{self.seconds:g} seconds"

    def to_dict(self) -> dict[str, Any]:
        """Return the settings that all processes share; threads depend on the machine."""
        training = {**self.training.to_dict(), "threads": 1}
        return {
            **{key: getattr(self, key) for key in _PLAIN},
            "objectives": list(self.objectives),
            "space": [_without_none(asdict(dimension)) for dimension in self.space],
            "model": self.model.to_dict(),
            "training": training,
            "data": self.data.to_dict(),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], threads: int) -> "StudyConfig":
        """Return the settings of which ``to_dict`` has made a dictionary.

        Raises
        ------
        ValueError, TypeError, KeyError
            If they are damaged.
        """
        space = tuple(
            Dimension(
                **{
                    **each,
                    "name": ALIASES.get(each["name"], each["name"]),
                    "choices": tuple(each["choices"]) if "choices" in each else None,
                }
            )
            for each in values["space"]
        )
        return cls(
            space,
            ModelConfig.from_dict(values["model"]),
            TrainingConfig.from_dict({**values["training"], "threads": threads}),
            DataConfig.from_dict(values["data"]),
            objectives=tuple(values["objectives"]),
            **{key: values[key] for key in _PLAIN},
        )


_PLAIN = ("sha256", "seconds", "sampler", "most_bytes", "least_speed", "prune")


def _without_none(values: Mapping[str, Any]) -> dict[str, Any]:
    set_values = {key: value for key, value in values.items() if value is not None}
    if "choices" in set_values:
        set_values["choices"] = list(set_values["choices"])
    return set_values


@dataclass(frozen=True)
class Budget:
    """The limits of a search, which ends at the first that is reached.

    Attributes
    ----------
    minutes : float or None
        No trial begins that would not end within this time.
    trials : int or None
        The number of trials of the study, earlier ones included, refused ones not.
    patience : int or None
        The number of trials in a row without a gain.
    """

    minutes: float | None = None
    trials: int | None = None
    patience: int | None = None


@dataclass(frozen=True)
class StudyRecord:
    """The record of a study in its folder.

    Attributes
    ----------
    study : str
        Its name in its database.
    source : dict
        Where the text comes from.
    own_database : bool
        Whether its database lies in the folder, too.
    command : str
        The command line that started it.
    machine : dict
        The hardware that it was started on.
    """

    study: str
    source: dict[str, Any]
    own_database: bool
    command: str = ""
    machine: dict[str, Any] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Write the record into a folder."""
        atomic_write(folder / STUDY_FILE, json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def read(cls, folder: Path) -> "StudyRecord":
        """Read the record of a folder.

        Raises
        ------
        ValueError
            If the folder is not a study, or its record is damaged.
        """
        try:
            record = json.loads(read_regular(folder / STUDY_FILE))
            kinds = [str, dict, bool, str, dict]
            fits = all(
                type(record[one.name]) is kind for one, kind in zip(fields(cls), kinds, strict=True)
            )
            if not fits:
                raise ValueError("a value is of another kind")
            return cls(**{**record, "source": located(record["source"], folder)})
        except (FileNotFoundError, NotADirectoryError):
            raise ValueError(f"{folder} is not a study: it has no {STUDY_FILE}") from None
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ValueError(f"{folder / STUDY_FILE} is damaged: {error}") from None

    def url(self, folder: Path, storage: str | None) -> str:
        """Return the address of its database.

        Raises
        ------
        ValueError
            If it has to be named, or does not exist any more.
        """
        if storage is not None:
            return storage
        if not self.own_database:
            raise ValueError(f"{folder} has its study in another database: name it with --storage")
        if not (folder / DATABASE_FILE).exists():
            raise ValueError(f"{folder} has no {DATABASE_FILE} any more, in which its trials were")
        return own_database(folder)


def own_database(folder: Path) -> str:
    """Return the address of the database in a study's folder.

    Raises
    ------
    ValueError
        If the path has characters with a meaning in addresses.
    """
    if set("?%") & set(str(folder)):
        raise ValueError(f"{folder} has ? or % in its name: a study's database cannot lie there")
    return f"sqlite:///{folder / DATABASE_FILE}"


def load_optuna() -> Any:
    """Return Optuna.

    Raises
    ------
    ValueError
        If it is not installed.
    """
    optuna = load_extra("tune needs", "optuna")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    return optuna


def open_storage(url: str, dead_seconds: float = DEAD_SECONDS) -> Any:
    """Return a database of studies.

    Parameters
    ----------
    url : str
        As for SQLAlchemy: ``sqlite:///study.db``, ``postgresql://user@host/name``.
    dead_seconds : float
        The age of the last heartbeat at which a trial is repeated.

    Raises
    ------
    ValueError
        If there is no such database, or its driver is not installed.
    """
    optuna = load_optuna()
    sqlalchemy = importlib.import_module("sqlalchemy")
    alembic = importlib.import_module("alembic.util")
    sqlite = url.startswith("sqlite")
    interval = max(int(min(_HEARTBEAT_SECONDS, dead_seconds / 3)), 1)
    for attempt in range(_ATTEMPTS):
        try:
            storage = optuna.storages.RDBStorage(
                url,
                engine_kwargs={"connect_args": {"timeout": 60}} if sqlite else {},
                heartbeat_interval=interval,
                grace_period=max(int(dead_seconds), 1),
                heartbeat_stale_trial_callback=optuna.storages.RetryHeartbeatStaleTrialCallback(),
            )
            break
        except (
            *(ImportError, ValueError, RuntimeError, AssertionError),
            *(sqlalchemy.exc.SQLAlchemyError, alembic.CommandError),
        ) as error:
            # Another process may be making the tables of a new database at the same time.
            made = "already exist" in str(error)
            meanwhile = made or isinstance(error, sqlalchemy.exc.IntegrityError)
            if not meanwhile or attempt == _ATTEMPTS - 1:
                raise ValueError(
                    f"{hide_password(url)} cannot be opened: {_first_line(error)}"
                ) from None
            time.sleep(0.5)
    if sqlite:
        # SQLite would let two processes read that a trial waits, and then both take it: here a
        # transaction locks the database from its beginning.
        event = sqlalchemy.event

        @event.listens_for(storage.engine, "connect")  # type: ignore[untyped-decorator]
        def _connect(connection: Any, _: Any) -> None:
            connection.isolation_level = None

        @event.listens_for(storage.engine, "begin")  # type: ignore[untyped-decorator]
        def _begin(connection: Any) -> None:
            connection.exec_driver_sql("BEGIN IMMEDIATE")

        storage.engine.dispose()
    weakref.finalize(storage, storage.engine.dispose)
    return storage


@contextlib.contextmanager
def study_at_hand() -> Iterator[None]:
    """Turn the errors of a database that is damaged, or goes away, into ``ValueError``."""
    optuna = load_optuna()
    sqlalchemy = importlib.import_module("sqlalchemy")
    alembic = importlib.import_module("alembic.util")
    known = (
        optuna.exceptions.OptunaError,
        sqlalchemy.exc.SQLAlchemyError,
        alembic.CommandError,
    )
    try:
        yield
    except (*known, LookupError, AssertionError, AttributeError, RuntimeError) as error:
        if not (isinstance(error, known) or _is_of(error, "optuna", "sqlalchemy", "alembic")):
            raise
        # The first error is the database's own; those of the library follow from it.
        own = (one for one in _behind(error) if isinstance(one, sqlalchemy.exc.DBAPIError))
        first = next(own, error)
        raise ValueError(f"the study's database cannot be used: {_first_line(first)}") from None


def _behind(error: BaseException) -> Iterator[BaseException]:
    """Yield the errors during which one was raised, the latest first."""
    while error.__context__ is not None:
        error = error.__context__
        yield error


def _is_of(error: Exception, *libraries: str) -> bool:
    """Return whether an error was raised in one of these libraries."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals["__name__"]).split(".")[0] in libraries


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]


def hide_password(url: str) -> str:
    """Return the address of a database without its password."""
    head, at, tail = url.rpartition("@")
    return f"{head.rsplit(':', 1)[0]}:***@{tail}" if at and head.count(":") > 1 else url


def _planned(plan: Sequence[Mapping[str, Any]] | GridSearch, rest: Any) -> Any:
    """Return a sampler with a plan for the first trials, and another sampler for the rest.

    The number of a trial is unique, so that no two processes run the same part of the plan.
    """

    class Planned(load_optuna().samplers.BaseSampler):  # type: ignore[misc]
        def infer_relative_search_space(self, study: Any, trial: Any) -> Any:
            if trial.number < len(plan):
                return {}
            return rest.infer_relative_search_space(study, trial)

        def sample_relative(self, study: Any, trial: Any, search_space: Any) -> Any:
            if trial.number < len(plan):
                return {}
            return rest.sample_relative(study, trial, search_space)

        def sample_independent(self, study: Any, trial: Any, name: str, where: Any) -> Any:
            if trial.number < len(plan) and name in plan[trial.number]:
                return plan[trial.number][name]
            return rest.sample_independent(study, trial, name, where)

        def before_trial(self, study: Any, trial: Any) -> None:
            rest.before_trial(study, trial)

        def after_trial(self, study: Any, trial: Any, state: Any, values: Any) -> None:
            rest.after_trial(study, trial, state, values)

    return Planned()


def open_study(
    storage: Any, name: str, config: StudyConfig | None, threads: int
) -> tuple[Any, StudyConfig]:
    """Return a study and its settings; it is created where there is none.

    Parameters
    ----------
    storage : a database, from ``open_storage``
    name : str
    config : StudyConfig, optional
        The settings of a new study, or of an existing one.
    threads : int
        The threads of a trial on this machine.

    Raises
    ------
    ValueError
        If there is no such study and no ``config``, or the study has other settings.
    """
    optuna = load_optuna()
    if config is not None:
        study = optuna.create_study(
            storage=storage,
            study_name=name,
            directions=[OBJECTIVES[objective] for objective in config.objectives],
            load_if_exists=True,
        )
        known = study.user_attrs.get("terms")
        if known is None:
            study.set_user_attr("terms", config.to_dict())
        elif (known := StudyConfig.from_dict(known, 1).to_dict()) != config.to_dict():
            different = [key for key, value in config.to_dict().items() if known.get(key) != value]
            raise ValueError(
                f"the study {name} has another {different[0]}: expected the same, or another name"
            )
        return study, config
    try:
        study = optuna.load_study(storage=storage, study_name=name)
        return study, StudyConfig.from_dict(study.user_attrs["terms"], threads)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"there is no study {name} that can be read: {error}") from None


# --- Trials ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrialResult:
    """The result of a trial that has ended.

    Attributes
    ----------
    number : int
    state : {"complete", "pruned", "refused", "failed"}
        "refused" where the settings are not a model, or it is beyond a limit; "failed" where its
        process ended.
    params : dict
        The values of the settings that are searched.
    model, training : dict
        All settings; empty where they do not go together.
    loss : float or None
        The validation loss in nats per token: of the best model of a complete trial, else of the
        last evaluation.
    bytes : int or None
        The size of the model's file.
    speed : float or None
        Generated tokens per second, where that was measured.
    seconds : float
        The training time.
    reason : str
        Why it was refused or pruned.
    """

    number: int
    state: str
    params: dict[str, Any]
    model: dict[str, Any]
    training: dict[str, Any]
    loss: float | None
    bytes: int | None
    speed: float | None
    seconds: float
    reason: str


def results_of(study: Any) -> list[TrialResult]:
    """Return the trials of a study that have ended, in their order."""
    results = []
    for trial in study.get_trials(deepcopy=False):
        state = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed"}.get(trial.state.name)
        if state is None:
            continue
        attributes = trial.user_attrs
        if "excess" in attributes:
            state = "refused"
        losses = trial.intermediate_values
        loss = attributes.get("loss", losses[max(losses)] if losses else None)
        results.append(
            TrialResult(
                trial.number,
                state,
                renamed(trial.params),
                attributes.get("model", {}),
                attributes.get("training", {}),
                loss,
                attributes.get("bytes"),
                attributes.get("speed"),
                attributes.get("seconds", 0.0),
                attributes.get("reason", ""),
            )
        )
    return results


def best_of(results: Sequence[TrialResult], objectives: Sequence[str]) -> list[TrialResult]:
    """Return the Pareto front of the complete trials, the lowest loss first."""

    def values(result: TrialResult) -> tuple[float, ...]:
        signs = (1 if OBJECTIVES[objective] == "minimize" else -1 for objective in objectives)
        return tuple(
            sign * getattr(result, objective)
            for sign, objective in zip(signs, objectives, strict=True)
        )

    front: list[TrialResult] = []
    complete = [result for result in results if result.state == "complete"]
    # In this order no trial dominates an earlier one.
    for result in sorted(complete, key=values):
        own = values(result)
        if not any(
            all(other <= one for other, one in zip(values(better), own, strict=True))
            for better in front
        ):
            front.append(result)
    return sorted(front, key=lambda result: (result.loss, result.number))


class Tuner:
    """Runs trials of a study, one after the other.

    Parameters
    ----------
    study : an Optuna study
    config : StudyConfig
    corpus_of : callable
        Called with a model's settings; returns a corpus for them, and the settings with the
        vocabulary size of the corpus.
    source : dict
        Where the corpus comes from.
    folder : Path
        The runs of the trials are in ``trials/0000`` and so on.
    on_evaluation : callable, optional
        Called with a trial's number, its progress from 0 to 1, and its loss.
    on_end : callable, optional
        Called with the result of every trial that has ended.
    """

    def __init__(
        self,
        study: Any,
        config: StudyConfig,
        corpus_of: Callable[[ModelConfig], tuple[Corpus, ModelConfig]],
        source: dict[str, Any],
        folder: Path,
        on_evaluation: Callable[[int, float, float], None] | None = None,
        on_end: Callable[[TrialResult], None] | None = None,
    ) -> None:
        self.study, self.config, self.folder = study, config, folder
        self._optuna = load_optuna()
        self._corpus_of, self._source = corpus_of, source
        self._on_evaluation, self._on_end = on_evaluation, on_end
        self.should_stop: Callable[[], bool] = lambda: False
        self._grid: GridSearch | None = None
        if config.sampler == "grid":
            self._grid = GridSearch({each.name: each.values() for each in config.space})
        study.sampler = self._sampler()
        study.pruner = self._optuna.pruners.NopPruner()
        if config.prune and len(config.objectives) == 1:
            study.pruner = self._optuna.pruners.PercentilePruner(
                _PRUNED_PERCENTILE, n_startup_trials=_COMPARED, n_warmup_steps=2
            )

    def _sampler(self) -> Any:
        samplers = self._optuna.samplers
        # Another process, or the same one later, draws other values.
        seed = (self.config.training.seed, len(self.study.get_trials(deepcopy=False)), os.getpid())
        drawn = int.from_bytes(_digest(seed)) % 2**32
        if self.config.sampler == "tpe":
            rest = samplers.TPESampler(
                seed=drawn,
                multivariate=True,
                n_startup_trials=_STARTING,
            )
        else:
            rest = samplers.RandomSampler(seed=drawn)
        return _planned([self._beginning()] if self._grid is None else self._grid, rest)

    def _beginning(self) -> dict[str, Any]:
        """Return the params of the first trial: the base settings that lie in the space."""
        base = {**asdict(self.config.model), **asdict(self.config.training)}
        return {
            each.name: base[each.name]
            for each in self.config.space
            if not each.of_steps and each.contains(base[each.name])
        }

    def run(self, budget: Budget, stop: Callable[[], bool] = lambda: False) -> None:
        """Run trials until the budget is used up, or ``stop`` returns true.

        Raises
        ------
        ValueError
            If the text cannot be read.
        OSError
            If a file, or the database, cannot be written.
        """
        end = math.inf if budget.minutes is None else time.monotonic() + 60 * budget.minutes
        self.should_stop = stop
        while not stop() and self._left(budget, end):
            try:
                self.study.optimize(self._objective, n_trials=1, callbacks=[self._ended])
            except _Stopped as stopped:
                # It is repeated when the study is resumed.
                again = self._optuna.storages.RetryHeartbeatStaleTrialCallback()
                again(self.study, self.study.get_trials(deepcopy=False)[stopped.number])

    def _left(self, budget: Budget, end: float) -> bool:
        """Return whether the budget allows another trial."""
        states = self._optuna.trial.TrialState
        trials = self.study.get_trials(deepcopy=False)
        waiting = any(trial.state == states.WAITING for trial in trials)
        if self._grid is not None and len(trials) >= len(self._grid) and not waiting:
            return False
        if time.monotonic() + (self.config.seconds or 0.0) > end:
            return False
        if budget.trials is not None:
            counted = (states.COMPLETE, states.PRUNED, states.RUNNING)
            done = sum(t.state in counted and "excess" not in t.user_attrs for t in trials)
            if done >= budget.trials:
                return False
        return budget.patience is None or self._gained(budget.patience)

    def _gained(self, patience: int) -> bool:
        """Return whether one of the last trials is among the best."""
        ended = [one for one in results_of(self.study) if one.state in ("complete", "pruned")]
        last = {one.number for one in ended[-patience:]}
        best = best_of(ended, self.config.objectives)
        return len(ended) < patience or any(one.number in last for one in best)

    # --- One trial

    def _objective(self, trial: Any) -> float | tuple[float, ...]:
        config = self.config
        if self._grid is not None and trial.number >= len(self._grid) and not trial.params:
            raise self._refused(trial, 1.0, "the grid has no more")
        params = {each.name: each.suggest(trial) for each in config.space}
        fractions = {each.name for each in config.space if each.of_steps}
        try:
            model, training = apply(
                {name: value for name, value in params.items() if name not in fractions},
                config.model,
                config.training,
            )
        except ValueError as error:
            raise self._refused(trial, 1.0, str(error)) from None
        corpus, model = self._corpus_of(model)
        speed = self._check_limits(trial, model, corpus)
        trial.set_constraint("limits", 0.0)
        try:
            if config.seconds is not None:
                steps = steps_within(config.seconds, model, training, corpus, config.data)
                training = replace(training, steps=steps)
            counted: dict[str, Any] = {
                each.name: each.steps_of(params[each.name], training.steps)
                for each in config.space
                if each.of_steps
            }
            every = max(-(-training.steps // _EVALUATIONS), 1)
            training = replace(training, evaluate_every=every, **counted)
            trial.set_user_attr("model", model.to_dict())
            trial.set_user_attr("training", training.to_dict())
            loss, seconds = self._train(trial, model, training, corpus)
        except (TrainingDiverged, MemoryError) as error:
            trial.set_user_attr("reason", str(error) or "not enough memory")
            raise self._optuna.TrialPruned from None
        size = Run(self._folder_of(trial.number)).model_bytes()
        trial.set_user_attr("loss", loss)
        trial.set_user_attr("bytes", size)
        trial.set_user_attr("seconds", seconds)
        results = {"loss": loss, "bytes": size, "speed": speed}
        values = tuple(float(results[objective] or 0.0) for objective in config.objectives)
        return values if len(values) > 1 else values[0]

    def _refused(self, trial: Any, excess: float, reason: str) -> Exception:
        """Return the error that ends a trial of a model beyond a limit."""
        trial.set_constraint("limits", excess)
        trial.set_user_attr("excess", excess)
        trial.set_user_attr("reason", reason)
        error: Exception = self._optuna.TrialPruned(reason)
        return error

    def _check_limits(self, trial: Any, config: ModelConfig, corpus: Corpus) -> float | None:
        """Refuse a model that is too large or too slow; return its speed, where that matters.

        Neither depends on the values of its weights.
        """
        model = create_legacy_llm(config, 0)
        path = self._folder_of(trial.number)
        path.mkdir(parents=True, exist_ok=True)
        save_model(model, path)
        most = self.config.most_bytes
        size = Run(path).weights_file.stat().st_size + _PROVENANCE_BYTES
        trial.set_user_attr("bytes", size)
        speed, least = None, self.config.least_speed
        if most is not None and size > most:
            shutil.rmtree(path)
            raise self._refused(trial, size / most - 1, f"{size:,} bytes, more than {most:,}")
        if least is not None or "speed" in self.config.objectives:
            generator = Generator(model, corpus.tokenizer, threads=self.config.training.threads)
            speed = max(_generation_speed(generator) for _ in range(3))
            trial.set_user_attr("speed", speed)
            if least is not None and speed < least:
                shutil.rmtree(path)
                raise self._refused(
                    trial, least / speed - 1, f"{speed:,.0f} tokens/s, fewer than {least:,.0f}"
                )
        return speed

    def _folder_of(self, number: int) -> Path:
        return self.folder / "trials" / f"{number:04}"

    def _train(
        self, trial: Any, model: ModelConfig, training: TrainingConfig, corpus: Corpus
    ) -> tuple[float, float]:
        """Return the loss of a trial, and its training time in seconds."""
        path = self._folder_of(trial.number)
        trainer = Trainer(path, model, training, corpus, self._source, self.config.data)
        if not trainer.train(MetricsLogger(path), _TrialCallback(self, trial, trainer)):
            raise _Stopped(trial.number)
        return trainer.best_model()[1].loss, trainer.seconds

    def report(self, trial: Any, trainer: Trainer, loss: float) -> None:
        """Report an evaluation of a trial, and prune it where others do better."""
        progress = trainer.step / trainer.config.steps
        if self._on_evaluation is not None:
            self._on_evaluation(trial.number, progress, loss)
        if progress < 1 and len(self.config.objectives) == 1:
            trial.report(loss, round(_EVALUATIONS * progress))
            if trial.should_prune():
                trial.set_user_attr("seconds", trainer.seconds)
                raise self._optuna.TrialPruned

    def _ended(self, study: Any, trial: Any) -> None:
        """Report a trial that has ended, and remove the weights of all but the best."""
        results = results_of(study)
        best = {result.number for result in best_of(results, self.config.objectives)}
        for result in results:
            run = Run(self._folder_of(result.number))
            if result.number not in best and run.weights_file.exists():
                run.remove_weights()
        if self._on_end is not None:
            self._on_end(next(one for one in results if one.number == trial.number))


class _TrialCallback(TrainingCallback):
    """Reports the evaluations of a trial, and stops it with its study."""

    def __init__(self, tuner: Tuner, trial: Any, trainer: Trainer) -> None:
        self._tuner, self._trial, self._trainer = tuner, trial, trainer

    def on_save(self, record: dict[str, Any]) -> None:
        self._tuner.report(self._trial, self._trainer, record["val_loss"])

    def should_stop(self) -> bool:
        return self._tuner.should_stop()


class _Stopped(Exception):
    """A trial was stopped before it ended."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def _generation_speed(generator: Generator) -> float:
    """Return the tokens per second that a model generates."""
    begin = time.perf_counter()
    for _ in generator.tokens([0], _PROBE_TOKENS, seed=0):
        pass
    return _PROBE_TOKENS / (time.perf_counter() - begin)


def _digest(values: Any) -> bytes:
    return hashlib.sha256(repr(values).encode()).digest()
