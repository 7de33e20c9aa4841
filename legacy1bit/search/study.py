"""The search for the best settings within the time and the bytes at hand.

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
# What a trial is measured by, and which way is better.
OBJECTIVES = {"loss": "minimize", "bytes": "minimize", "speed": "maximize"}

# How a trial can end, and what is said of some that did.
STATES = {
    "complete": "to their end",
    "pruned": "ended early",
    "refused": "not begun, beyond a limit",
    "failed": "lost",
}

# What a study is called in its database where nothing else is said, its own database, and what its
# folder says of it.
STUDY_NAME, DATABASE_FILE, STUDY_FILE = "study", "study.db", "tune.json"

# A trial is looked at so often; bad ones end at a look.
_EVALUATIONS = 8
# As many trials run to their end before one is compared with them, and before what is tried next
# depends on how they went.
_COMPARED, _STARTING = 4, 8

# Who comes behind so many of them at a look, in percent, ends. Half is too few: while the learning
# rate is high, the best of all may well lie in the lower half.
_BEHIND = 75.0

# A process that has not been heard of for so long is dead, and its trial begins again elsewhere.
_HEARTBEAT_SECONDS, DEAD_SECONDS = 20, 90

# What the file of a trained model has more than that of one which was not: where it comes from.
_PROVENANCE_BYTES = 400

# How often a database is opened before it is given up.
_ATTEMPTS = 10

# So much is decoded to measure how fast that is.
_PROBE_TOKENS = 100


# --- What a study is ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Terms:
    """What all trials of a study have in common, wherever they run.

    Attributes
    ----------
    space : tuple of Dimension
    model, training, data : records
        The settings that are not searched, and where the search begins.
    sha256 : str
        Of the text.
    seconds : float or None
        How long a trial trains, which gives its number of steps; None: ``training.steps``.
    sampler : {"tpe", "random", "grid"}
    objectives : tuple of {"loss", "bytes", "speed"}
        The validation loss in nats a token, the size of the model's file, and how many tokens a
        second it writes. Of several, the trials are wanted that no other beats in all.
    most_bytes : int or None
        Larger models are not trained.
    least_speed : float or None
        Nor are those that write fewer tokens a second.
    prune : bool
        Whether bad trials end early.
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
        """How long a trial is, in words."""
        if self.seconds is None:
            return f"{self.training.steps:,} steps"
        return f"{self.seconds:g} seconds"

    def to_dict(self) -> dict[str, Any]:
        """Return what has to be the same wherever a trial runs; threads are a machine's own."""
        terms = {key: getattr(self, key) for key in _PLAIN}
        training = {**self.training.to_dict(), "threads": 1}
        return {
            **terms,
            "objectives": list(self.objectives),
            "space": [_without_none(asdict(dimension)) for dimension in self.space],
            "model": self.model.to_dict(),
            "training": training,
            "data": self.data.to_dict(),
        }

    @classmethod
    def from_dict(cls, terms: Mapping[str, Any], threads: int) -> "Terms":
        """Make terms of what ``to_dict`` has returned.

        Raises
        ------
        ValueError, TypeError, KeyError
            If they are damaged.
        """
        space = tuple(
            Dimension(
                **{
                    **told,
                    "name": ALIASES.get(told["name"], told["name"]),
                    "choices": tuple(told["choices"]) if "choices" in told else None,
                }
            )
            for told in terms["space"]
        )
        return cls(
            space,
            ModelConfig.from_dict(terms["model"]),
            TrainingConfig.from_dict({**terms["training"], "threads": threads}),
            DataConfig.from_dict(terms["data"]),
            objectives=tuple(terms["objectives"]),
            **{key: terms[key] for key in _PLAIN},
        )


_PLAIN = ("sha256", "seconds", "sampler", "most_bytes", "least_speed", "prune")


def _without_none(values: Mapping[str, Any]) -> dict[str, Any]:
    found = {key: value for key, value in values.items() if value is not None}
    return {**found, "choices": list(found["choices"])} if "choices" in found else found


@dataclass(frozen=True)
class Budget:
    """When a search is over: whatever comes first.

    Attributes
    ----------
    minutes : float or None
        No trial begins that would not end within this time.
    trials : int or None
        How many trials the study has then, those of earlier times included; models that are too
        large, or none, do not count.
    patience : int or None
        So many trials, one behind the other, were no gain.
    """

    minutes: float | None = None
    trials: int | None = None
    patience: int | None = None


@dataclass(frozen=True)
class StudyRecord:
    """What a study's folder says of it.

    Attributes
    ----------
    study : str
        What it is called in its database.
    source : dict
        Where the text is.
    own_database : bool
        Whether its database lies in the folder, too.
    command : str
        The command line that began it.
    machine : dict
        What it was begun on.
    """

    study: str
    source: dict[str, Any]
    own_database: bool
    command: str = ""
    machine: dict[str, Any] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Write it into a folder."""
        atomic_write(folder / STUDY_FILE, json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def read(cls, folder: Path) -> "StudyRecord":
        """Read what a folder says.

        Raises
        ------
        ValueError
            If it is no study's, or that is damaged.
        """
        try:
            told = json.loads(read_regular(folder / STUDY_FILE))
            kinds = [str, dict, bool, str, dict]
            fits = all(
                type(told[one.name]) is kind for one, kind in zip(fields(cls), kinds, strict=True)
            )
            if not fits:
                raise ValueError("a value is of another kind")
            return cls(**{**told, "source": located(told["source"], folder)})
        except (FileNotFoundError, NotADirectoryError):
            raise ValueError(f"{folder} is no study: it has no {STUDY_FILE}") from None
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ValueError(f"{folder / STUDY_FILE} is damaged: {error}") from None

    def url(self, folder: Path, storage: str | None) -> str:
        """Return where its database is.

        Raises
        ------
        ValueError
            If that has to be named, or is gone.
        """
        if storage is not None:
            return storage
        if not self.own_database:
            raise ValueError(f"{folder} has its study in another database: name it with --storage")
        if not (folder / DATABASE_FILE).exists():
            raise ValueError(f"{folder} has no {DATABASE_FILE} any more, in which its trials were")
        return own_database(folder)


def own_database(folder: Path) -> str:
    """Return where the database of a study lies that has none elsewhere.

    Raises
    ------
    ValueError
        If a name on the way there means something else in a database's address.
    """
    if set("?%") & set(str(folder)):
        raise ValueError(f"{folder} has ? or % in its name: a study's database cannot lie there")
    return f"sqlite:///{folder / DATABASE_FILE}"


def load_optuna() -> Any:
    """Return the library that proposes what to try next.

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
        As SQLAlchemy writes it: ``sqlite:///study.db``, ``postgresql://user@host/name``.
    dead_seconds : float
        A trial that has not been heard of for so long begins again.

    Raises
    ------
    ValueError
        If there is no such database, or its driver is not installed.
    """
    optuna = load_optuna()
    sqlalchemy = importlib.import_module("sqlalchemy")
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
        except (ImportError, ValueError, sqlalchemy.exc.SQLAlchemyError) as error:
            # Another process may be making the tables of a new database at the same time.
            made = "already exist" in str(error)
            meanwhile = made or isinstance(error, sqlalchemy.exc.IntegrityError)
            if not meanwhile or attempt == _ATTEMPTS - 1:
                raise ValueError(f"{shown(url)} cannot be opened: {_first_line(error)}") from None
            time.sleep(0.5)
    if sqlite:
        # SQLite would let two processes read that a trial waits, and then both take it: here a
        # transaction has the database to itself from its beginning.
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
    """Work with a study whose database may be damaged, or go away.

    Raises
    ------
    ValueError
        In place of what the libraries raise.
    """
    optuna = load_optuna()
    sqlalchemy = importlib.import_module("sqlalchemy")
    known = (optuna.exceptions.OptunaError, sqlalchemy.exc.SQLAlchemyError)
    try:
        yield
    except (*known, KeyError, AssertionError) as error:
        if not (isinstance(error, known) or _is_of(error, "optuna")):
            raise
        # The database's own error is what was wrong; what the library makes of it comes later.
        own = (one for one in _behind(error) if isinstance(one, sqlalchemy.exc.DBAPIError))
        first = next(own, error)
        raise ValueError(f"the study's database cannot be used: {_first_line(first)}") from None


def _behind(error: BaseException) -> Iterator[BaseException]:
    """Yield the errors during which one was raised, the latest first."""
    while error.__context__ is not None:
        error = error.__context__
        yield error


def _is_of(error: Exception, library: str) -> bool:
    """Whether it was raised in a library."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals["__name__"]).split(".")[0] == library


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]


def shown(url: str) -> str:
    """Return a database's name without the password in it."""
    head, at, tail = url.rpartition("@")
    return f"{head.rsplit(':', 1)[0]}:***@{tail}" if at and head.count(":") > 1 else url


def _planned(plan: Sequence[Mapping[str, Any]] | GridSearch, rest: Any) -> Any:
    """Return a sampler that gives the first trials what is planned, and leaves the others to one.

    A trial's number is its own, so no two processes take the same of a plan.
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


def open_study(storage: Any, name: str, terms: Terms | None, threads: int) -> tuple[Any, Terms]:
    """Return a study and its terms; it is made where there is none.

    Parameters
    ----------
    storage : a database, from ``open_storage``
    name : str
    terms : Terms, optional
        Those of a new study, or of one that has the same.
    threads : int
        How many a trial has here.

    Raises
    ------
    ValueError
        If there is no such study and no terms for one, or it has others.
    """
    optuna = load_optuna()
    if terms is not None:
        study = optuna.create_study(
            storage=storage,
            study_name=name,
            directions=[OBJECTIVES[objective] for objective in terms.objectives],
            load_if_exists=True,
        )
        known = study.user_attrs.get("terms")
        if known is None:
            study.set_user_attr("terms", terms.to_dict())
        elif (known := Terms.from_dict(known, 1).to_dict()) != terms.to_dict():
            different = [key for key, value in terms.to_dict().items() if known.get(key) != value]
            raise ValueError(
                f"the study {name} has another {different[0]}: expected the same, or another name"
            )
        return study, terms
    try:
        study = optuna.load_study(storage=storage, study_name=name)
        return study, Terms.from_dict(study.user_attrs["terms"], threads)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"there is no study {name} that can be read: {error}") from None


# --- Trials ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrialResult:
    """What is known of a trial that has ended.

    Attributes
    ----------
    number : int
    state : {"complete", "pruned", "refused", "failed"}
        "refused" where there is no such model, or it is beyond a limit; "failed" where its process
        ended.
    chosen : dict
        The values of the settings that are searched.
    model, training : dict
        All settings; empty where they do not go together.
    loss : float or None
        Of a complete trial its best model's, on the validation set, in nats a token; else that of
        its last look.
    bytes : int or None
        The size of the model's file.
    speed : float or None
        Tokens written a second, where that was measured.
    seconds : float
        How long it trained.
    reason : str
        Why it was refused or ended early.
    """

    number: int
    state: str
    chosen: dict[str, Any]
    model: dict[str, Any]
    training: dict[str, Any]
    loss: float | None
    bytes: int | None
    speed: float | None
    seconds: float
    reason: str


def results_of(study: Any) -> list[TrialResult]:
    """Return the trials of a study that have ended, in their order."""
    found = []
    for trial in study.get_trials(deepcopy=False):
        state = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed"}.get(trial.state.name)
        if state is None:
            continue
        told = trial.user_attrs
        if "excess" in told:
            state = "refused"
        looks = trial.intermediate_values
        loss = told.get("loss", looks[max(looks)] if looks else None)
        found.append(
            TrialResult(
                trial.number,
                state,
                renamed(trial.params),
                told.get("model", {}),
                told.get("training", {}),
                loss,
                told.get("bytes"),
                told.get("speed"),
                told.get("seconds", 0.0),
                told.get("reason", ""),
            )
        )
    return found


def best_of(results: Sequence[TrialResult], objectives: Sequence[str]) -> list[TrialResult]:
    """Return the complete trials that no other beats in all objectives, the lowest loss first."""

    def values(result: TrialResult) -> tuple[float, ...]:
        found = (getattr(result, objective) for objective in objectives)
        signs = (1 if OBJECTIVES[objective] == "minimize" else -1 for objective in objectives)
        return tuple(sign * value for sign, value in zip(signs, found, strict=True))

    front: list[TrialResult] = []
    complete = [result for result in results if result.state == "complete"]
    # In this order none is beaten by a later one.
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
    terms : Terms
    corpus_of : callable
        Gets a model's settings and returns a corpus for them, and the settings with as many tokens
        as that has.
    source : dict
        Where the corpus comes from.
    folder : Path
        Where the trials' runs go: ``trials/0000`` and so on.
    on_evaluation : callable, optional
        Gets a trial's number, its share that is done, and its loss, whenever it was measured.
    on_end : callable, optional
        Gets the result of every trial that has ended.
    """

    def __init__(
        self,
        study: Any,
        terms: Terms,
        corpus_of: Callable[[ModelConfig], tuple[Corpus, ModelConfig]],
        source: dict[str, Any],
        folder: Path,
        on_evaluation: Callable[[int, float, float], None] | None = None,
        on_end: Callable[[TrialResult], None] | None = None,
    ) -> None:
        self.study, self.terms, self.folder = study, terms, folder
        self._optuna = load_optuna()
        self._corpus_of, self._source = corpus_of, source
        self._on_evaluation, self._on_end = on_evaluation, on_end
        self.should_stop: Callable[[], bool] = lambda: False
        self._grid: GridSearch | None = None
        if terms.sampler == "grid":
            self._grid = GridSearch({each.name: each.values() for each in terms.space})
        study.sampler = self._sampler()
        study.pruner = self._optuna.pruners.NopPruner()
        if terms.prune and len(terms.objectives) == 1:
            study.pruner = self._optuna.pruners.PercentilePruner(
                _BEHIND, n_startup_trials=_COMPARED, n_warmup_steps=2
            )

    def _sampler(self) -> Any:
        samplers = self._optuna.samplers
        # A process that begins anew has not drawn the same before.
        seed = (self.terms.training.seed, len(self.study.get_trials(deepcopy=False)), os.getpid())
        drawn = int.from_bytes(_digest(seed)) % 2**32
        if self.terms.sampler == "tpe":
            rest = samplers.TPESampler(
                seed=drawn,
                multivariate=True,
                n_startup_trials=_STARTING,
            )
        else:
            rest = samplers.RandomSampler(seed=drawn)
        return _planned([self._beginning()] if self._grid is None else self._grid, rest)

    def _beginning(self) -> dict[str, Any]:
        """Return the settings that are not searched for yet, as far as they lie in the space."""
        base = {**asdict(self.terms.model), **asdict(self.terms.training)}
        return {
            each.name: base[each.name]
            for each in self.terms.space
            if not each.of_steps and each.contains(base[each.name])
        }

    def run(self, budget: Budget, stop: Callable[[], bool] = lambda: False) -> None:
        """Run trials until the budget is used up, or one is told to stop.

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
                # It begins again when the study goes on.
                again = self._optuna.storages.RetryHeartbeatStaleTrialCallback()
                again(self.study, self.study.get_trials(deepcopy=False)[stopped.number])

    def _left(self, budget: Budget, end: float) -> bool:
        """Whether there is something to do, and time for it."""
        states = self._optuna.trial.TrialState
        trials = self.study.get_trials(deepcopy=False)
        waiting = any(trial.state == states.WAITING for trial in trials)
        if self._grid is not None and len(trials) >= len(self._grid) and not waiting:
            return False
        if time.monotonic() + (self.terms.seconds or 0.0) > end:
            return False
        if budget.trials is not None:
            counted = (states.COMPLETE, states.PRUNED, states.RUNNING)
            done = sum(t.state in counted and "excess" not in t.user_attrs for t in trials)
            if done >= budget.trials:
                return False
        return budget.patience is None or self._gained(budget.patience)

    def _gained(self, patience: int) -> bool:
        """Whether one of the last trials is among the best."""
        ended = [one for one in results_of(self.study) if one.state in ("complete", "pruned")]
        last = {one.number for one in ended[-patience:]}
        best = best_of(ended, self.terms.objectives)
        return len(ended) < patience or any(one.number in last for one in best)

    # --- One trial

    def _objective(self, trial: Any) -> float | tuple[float, ...]:
        terms = self.terms
        if self._grid is not None and trial.number >= len(self._grid) and not trial.params:
            raise self._refused(trial, 1.0, "the grid has no more")
        chosen = {each.name: each.suggest(trial) for each in terms.space}
        shares = {each.name for each in terms.space if each.of_steps}
        try:
            model, training = apply(
                {name: value for name, value in chosen.items() if name not in shares},
                terms.model,
                terms.training,
            )
        except ValueError as error:
            raise self._refused(trial, 1.0, str(error)) from None
        corpus, model = self._corpus_of(model)
        speed = self._check_limits(trial, model, corpus)
        trial.set_constraint("limits", 0.0)
        try:
            if terms.seconds is not None:
                steps = steps_within(terms.seconds, model, training, corpus, terms.data)
                training = replace(training, steps=steps)
            counted: dict[str, Any] = {
                each.name: each.steps_of(chosen[each.name], training.steps)
                for each in terms.space
                if each.of_steps
            }
            looks = max(-(-training.steps // _EVALUATIONS), 1)
            training = replace(training, evaluate_every=looks, **counted)
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
        found = {"loss": loss, "bytes": size, "speed": speed}
        values = tuple(float(found[objective] or 0.0) for objective in terms.objectives)
        return values if len(values) > 1 else values[0]

    def _refused(self, trial: Any, excess: float, reason: str) -> Exception:
        """Return what ends a trial of a model that is beyond a limit."""
        trial.set_constraint("limits", excess)
        trial.set_user_attr("excess", excess)
        trial.set_user_attr("reason", reason)
        error: Exception = self._optuna.TrialPruned(reason)
        return error

    def _check_limits(self, trial: Any, config: ModelConfig, corpus: Corpus) -> float | None:
        """Refuse a model that is too large or too slow; return how fast it writes, if that counts.

        Neither depends on what its weights are.
        """
        model = create_legacy_llm(config, 0)
        path = self._folder_of(trial.number)
        path.mkdir(parents=True, exist_ok=True)
        save_model(model, path)
        most = self.terms.most_bytes
        size = Run(path).weights_file.stat().st_size + _PROVENANCE_BYTES
        trial.set_user_attr("bytes", size)
        speed, least = None, self.terms.least_speed
        if most is not None and size > most:
            shutil.rmtree(path)
            raise self._refused(trial, size / most - 1, f"{size:,} bytes, more than {most:,}")
        if least is not None or "speed" in self.terms.objectives:
            generator = Generator(model, corpus.tokenizer, threads=self.terms.training.threads)
            speed = max(_writing(generator) for _ in range(3))
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
        """Return the loss that a trial comes to, and how long it trained."""
        path = self._folder_of(trial.number)
        trainer = Trainer(path, model, training, corpus, self._source, self.terms.data)
        if not trainer.train(MetricsLogger(path), _TrialCallback(self, trial, trainer)):
            raise _Stopped(trial.number)
        return trainer.best_model()[1].loss, trainer.seconds

    def report(self, trial: Any, trainer: Trainer, loss: float) -> None:
        """Report an evaluation of a trial, and prune it where others do better."""
        progress = trainer.step / trainer.config.steps
        if self._on_evaluation is not None:
            self._on_evaluation(trial.number, progress, loss)
        if progress < 1 and len(self.terms.objectives) == 1:
            trial.report(loss, round(_EVALUATIONS * progress))
            if trial.should_prune():
                trial.set_user_attr("seconds", trainer.seconds)
                raise self._optuna.TrialPruned

    def _ended(self, study: Any, trial: Any) -> None:
        """Tell how a trial has ended, and keep the weights of the best alone."""
        results = results_of(study)
        best = {result.number for result in best_of(results, self.terms.objectives)}
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


def _writing(generator: Generator) -> float:
    """Return how many tokens a second a model writes."""
    begin = time.perf_counter()
    for _ in generator.tokens([0], _PROBE_TOKENS, seed=0):
        pass
    return _PROBE_TOKENS / (time.perf_counter() - begin)


def _digest(values: Any) -> bytes:
    return hashlib.sha256(repr(values).encode()).digest()
