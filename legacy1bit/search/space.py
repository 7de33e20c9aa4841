"""The search space, and the grid of every combination of values (C: ``hyperparams.c``)."""

import importlib.resources
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from legacy1bit.config_files import read_toml, unknown_key
from legacy1bit.hyperparams import (
    ALIASES,
    DEFAULT_RATES,
    ModelConfig,
    TrainingConfig,
    check_setting,
)
from legacy1bit.system.errors import format_value

# The vocabulary is the tokenizer's, studies have no teacher, and the others do not make a model
# better.
_NOT_SEARCHED = (
    *("vocab_size", "steps", "seed", "threads"),
    *("evaluate_every", "patience", "validation_tokens"),
    *("distillation_weight", "teacher_temperature"),
)


@dataclass(frozen=True)
class Dimension:
    """A setting that is searched, and the values it may take.

    Attributes
    ----------
    name : str
        A field of ``ModelConfig`` or ``TrainingConfig``.
    choices : tuple, optional
        All values; the other attributes are unused then.
    low, high : int or float, optional
    step : int or float, optional
        The distance of neighboring values, the first of which is ``low``.
    log : bool
        Whether to sample on a log scale.
    of_steps : bool
        Whether values are fractions of a run's steps.
    for_bytes : bool
        Whether to search it only where the size of the model's file matters.
    """

    name: str
    choices: tuple[Any, ...] | None = None
    low: float | None = None
    high: float | None = None
    step: float | None = None
    log: bool = False
    of_steps: bool = False
    for_bytes: bool = False

    @property
    def whole(self) -> bool:
        """Whether values are whole numbers."""
        return _SETTINGS[self.name].metadata["kind"] is int and not self.of_steps

    def suggest(self, trial: Any) -> Any:
        """Return the value that a trial gets."""
        if self.choices is not None:
            return trial.suggest_categorical(self.name, self.choices)
        if self.whole:
            step = 1 if self.step is None else int(self.step)
            return trial.suggest_int(self.name, self.low, self.high, step=step, log=self.log)
        return trial.suggest_float(self.name, self.low, self.high, step=self.step, log=self.log)

    def steps_of(self, fraction: float, steps: int) -> int:
        """Return a fraction of a run's steps, no less than the setting's lower bound."""
        return max(round(fraction * steps), int(_SETTINGS[self.name].metadata["low"]))

    def contains(self, value: Any) -> bool:
        """Return whether a value is in the space."""
        if self.choices is not None:
            return value in self.choices
        if value is None or not self.low <= value <= self.high:
            return False
        step = 1 if self.whole and self.step is None else self.step
        part = 0.0 if step is None else (value - self.low) / step % 1.0
        # A sum of steps may be rounded.
        return min(part, 1.0 - part) < 1e-9

    def values(self) -> tuple[Any, ...]:
        """Return all values.

        Raises
        ------
        ValueError
            If there are infinitely many, or too many to try.
        """
        if self.choices is not None:
            return self.choices
        assert self.low is not None
        assert self.high is not None
        step = 1 if self.whole and self.step is None else self.step
        if step is None or self.log:
            raise ValueError(
                f"a grid needs every value: {self.name} has a range, expected choices or a step"
            )
        # With the smallest of steps this is infinite.
        steps = (self.high - self.low) / step + 1e-9
        if steps >= _MOST_VALUES:
            raise ValueError(
                f"a grid needs every value: {self.name} has {steps:.3g}, expected at most "
                f"{_MOST_VALUES:,}"
            )
        count = int(steps) + 1
        values = (self.low + i * step for i in range(count))
        return tuple(int(value) if self.whole else value for value in values)


_SETTINGS = {
    setting.name: setting
    for record in (ModelConfig, TrainingConfig)
    for setting in fields(record)
    if setting.name not in _NOT_SEARCHED
}
# The largest number of values of a setting in a grid.
_MOST_VALUES = 1_000_000

_FLAGS = ("log", "of_steps", "for_bytes")
_KEYS = ("low", "high", "step", "choices", *_FLAGS)
_COUNTING_STEPS = ("float_steps", "quantization_warmup", "warmup_steps", "decay_every")


def default_space() -> Path:
    """Return the file of the default search space."""
    return Path(str(importlib.resources.files("legacy1bit.search").joinpath("space.toml")))


def read_space(path: str | os.PathLike[str]) -> tuple[Dimension, ...]:
    """Read a search space.

    Parameters
    ----------
    path : path-like
        A TOML file with a table for each setting; ``space.toml`` in this folder explains the keys.

    Raises
    ------
    OSError
        If it cannot be read.
    ValueError
        If it is not TOML or a value is wrong, with the line, the key and the expected values.
    """
    content, lines = read_toml(path)
    if not content:
        raise ValueError(f"{path} has no settings to search, expected a table for each")
    return tuple(_read_dimension(path, lines, name, table) for name, table in content.items())


def _read_dimension(
    path: str | os.PathLike[str], lines: Mapping[str, int], name: str, table: Any
) -> Dimension:
    line, setting = lines.get(name, 1), ALIASES.get(name, name)
    if setting not in _SETTINGS:
        raise unknown_key(path, line, name, _SETTINGS)
    if not isinstance(table, dict):
        came = format_value(table)
        raise ValueError(f"{path}, line {line}: {name} is {came}, expected a table [{name}]")

    def refuse(key: str, expected: str) -> ValueError:
        place = lines.get(f"{name}.{key}", line)
        return ValueError(
            f"{path}, line {place}: {name}.{key} is {format_value(table.get(key))}, expected "
            f"{expected}"
        )

    for key in table:
        if key not in _KEYS:
            raise unknown_key(path, lines.get(f"{name}.{key}", line), key, _KEYS)
    for key in _FLAGS:
        if not isinstance(table.get(key, False), bool):
            raise refuse(key, "true or false")
    meta, of_steps = _SETTINGS[setting].metadata, table.get("of_steps", False)
    if of_steps and setting not in _COUNTING_STEPS:
        raise refuse("of_steps", f"it for {', '.join(_COUNTING_STEPS)} only")
    if "choices" in table:
        choices = table["choices"]
        if not isinstance(choices, list) or not choices:
            raise refuse("choices", "a list of values")
        for_bytes = table.get("for_bytes", False)
        if not table.keys() <= {"choices", "for_bytes"}:
            raise ValueError(f"{path}, line {line}: {name} has choices, expected nothing beside")
        for choice in choices:
            try:
                check_setting(_SETTINGS[setting], choice)
            except (TypeError, ValueError) as error:
                raise refuse("choices", f"values that it may have: {error}") from None
        return Dimension(setting, tuple(choices), for_bytes=for_bytes)
    if meta["kind"] not in (int, float):
        raise ValueError(f"{path}, line {line}: {name} is not a number, expected choices")
    whole = meta["kind"] is int and not of_steps
    least, most = (0.0, 1.0) if of_steps else (meta["low"], meta["high"])
    for key in ("low", "high", "step"):
        value: Any = table.get(key)
        if value is None and key == "step":
            continue
        fits = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
        if not fits or (isinstance(value, float) and not math.isfinite(value)):
            raise refuse(key, "a whole number" if whole else "a number")
        if key == "step" and not 0 < value <= most:
            raise refuse(key, f"it above 0, and at most {most}")
        if key != "step" and not least <= value <= most:
            raise refuse(key, f"{least} to {most}")
    low, high, step, log = table["low"], table["high"], table.get("step"), table.get("log", False)
    if low > high:
        raise refuse("high", f"{low} or more")
    if step is not None and (high - low) / (_MOST_VALUES - 1) > step:
        raise refuse("step", f"at most {_MOST_VALUES:,} values")
    if log and step is not None:
        raise refuse("step", "none beside log")
    if log and low <= 0:
        raise refuse("low", "it above 0 where log is true")
    return Dimension(setting, None, low, high, step, log, of_steps, table.get("for_bytes", False))


# --- The grid -------------------------------------------------------------------------------------


class GridSearch:
    """Every combination of the values of some settings. C: ``GridSearchConfig``.

    Parameters
    ----------
    values : mapping of str to sequence
        The values of each setting.

    Attributes
    ----------
    total : int
        The number of combinations.
    """

    def __init__(self, values: Mapping[str, Sequence[Any]]) -> None:
        for name, some in values.items():
            if not some:
                raise ValueError(f"{name} has no values, expected at least one")
        self._values = {name: tuple(some) for name, some in values.items()}
        self.total = math.prod(len(some) for some in self._values.values())
        self._next = 0

    def __getitem__(self, number: int) -> dict[str, Any]:
        """Return a combination; the last setting changes the fastest."""
        if not 0 <= number < self.total:
            raise IndexError(f"there are {self.total} combinations, and no number {number}")
        combination = {}
        for name, some in reversed(self._values.items()):
            number, place = divmod(number, len(some))
            combination[name] = some[place]
        return dict(reversed(combination.items()))

    def __len__(self) -> int:
        return self.total


def grid_search_create(
    learning_rates: Sequence[float],
    model_dims: Sequence[int],
    num_blocks: Sequence[int],
    batch_sizes: Sequence[int],
) -> GridSearch:
    """Return a search over all combinations of four settings. C: ``grid_search_create``."""
    return GridSearch(
        {
            "learning_rate": learning_rates,
            "model_dim": model_dims,
            "num_blocks": num_blocks,
            "batch_size": batch_sizes,
        }
    )


def grid_search_next_config(
    search: GridSearch, model: ModelConfig, training: TrainingConfig
) -> tuple[ModelConfig, TrainingConfig] | None:
    """Return settings with the next combination, or None after the last.

    C: ``hyperparams.c``, ``grid_search_next_config``.
    """
    if search._next == search.total:
        return None
    params = search[search._next]
    search._next += 1
    return apply(params, model, training)


def grid_search_reset(search: GridSearch) -> None:
    """Start again with the first combination. C: ``grid_search_reset``."""
    search._next = 0


def grid_search_destroy(search: GridSearch) -> None:
    """Do nothing: Python frees the memory. C: ``grid_search_destroy``."""


def apply(
    params: Mapping[str, Any], model: ModelConfig, training: TrainingConfig
) -> tuple[ModelConfig, TrainingConfig]:
    """Return settings with some values replaced.

    Raises
    ------
    ValueError
        If they do not go together.
    """
    names = {setting.name for setting in fields(ModelConfig)}
    of_model = {name: value for name, value in params.items() if name in names}
    of_training = {name: value for name, value in params.items() if name not in names}
    if "optimizer" in of_training and training.learning_rate == DEFAULT_RATES[training.optimizer]:
        # Each has a default of its own.
        of_training = {"learning_rate": None, **of_training}
    return model.with_settings(**of_model), replace(training, **of_training)
