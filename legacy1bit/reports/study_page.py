"""The page about a study: its trials, the best of them, and the effect of each setting.

The charts are our own, and not those of ``optuna.visualization.matplotlib``: these take pyplot's
global state and style, and a study with its database instead of results.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from legacy1bit.hyperparams import ModelConfig, TrainingConfig
from legacy1bit.reports.figures import Panel, Series, minus
from legacy1bit.reports.page import (
    escape,
    figure,
    folded,
    page,
    paragraph,
    section,
    side_by_side,
    table,
    tiles,
)
from legacy1bit.reports.records import read_records
from legacy1bit.reports.run_page import defaults_of, machine_table
from legacy1bit.search.space import Dimension
from legacy1bit.search.study import STATES, StudyConfig, StudyRecord, TrialResult, best_of
from legacy1bit.training.run import Run

# Curves in the figure, and rows in the table, of the best trials.
_MOST_CURVES, _MOST_ROWS = 6, 10

_NONE = "\u2013"


def study_report(
    folder: Path, record: StudyRecord, config: StudyConfig, results: Sequence[TrialResult]
) -> str:
    """Return the page about a study.

    Parameters
    ----------
    folder : Path
        The folder of the study, with the runs of the trials of this machine.
    record : StudyRecord
    config : StudyConfig
    results : sequence of TrialResult

    Raises
    ------
    OSError, ValueError
        If a trial's metrics cannot be read, or matplotlib is missing.
    """
    complete = [one for one in results if one.state == "complete"]
    front = best_of(results, config.objectives)
    best = sorted(complete, key=lambda one: (one.loss, one.number))
    sections = [tiles(_numbers(results, best))]
    if best:
        sections += [
            section("Best trials", *_table_of_best(config, front, best)),
            section("Trials", side_by_side(_figures(folder, config, results, front, best))),
            section("Effect of each setting", *_differences(config, results)),
        ]
    sections += [
        section("All trials", folded(f"{len(results)} trials", _table(config, results))),
        section("Search space", *_space(config)),
        section("Hardware", machine_table(record.machine)),
        section(
            "Reproduce",
            paragraph("The command that started the search. Run again, it tries other settings."),
            f"<pre>{escape(record.command or _NONE)}</pre>",
        ),
    ]
    return page(folder.resolve().name, _lead(record, config, results), sections)


def _lead(record: StudyRecord, config: StudyConfig, results: Sequence[TrialResult]) -> str:
    wanted = {"loss": "the lowest loss", "bytes": "the fewest bytes", "speed": "the highest speed"}
    limits = []
    if config.most_bytes is not None:
        limits.append(f"of at most {config.most_bytes:,} bytes")
    if config.least_speed is not None:
        limits.append(f"of at least {config.least_speed:,.0f} tokens/s")
    of = f", of models {' and '.join(limits)}" if limits else ""
    name = record.source.get("name", "unknown data")
    return (
        f"{len(results)} trials of {config.length} on {name}, in search of "
        f"{' and '.join(wanted[one] for one in config.objectives)}{of}."
    )


def _numbers(results: Sequence[TrialResult], best: Sequence[TrialResult]) -> dict[str, str]:
    states = [one.state for one in results]
    numbers = {}
    if best:
        numbers["lowest loss"] = f"{best[0].loss:.4f}"
        if results[0].state == "complete":
            numbers["loss of the first trial"] = f"{results[0].loss:.4f}"
        numbers["bytes of the best"] = _whole(best[0].bytes)
    numbers |= {
        words: f"{states.count(state)}" for state, words in STATES.items() if state in states
    }
    return numbers | {"training time": f"{sum(one.seconds for one in results) / 60:,.1f} min"}


def _whole(value: float | None) -> str:
    return _NONE if value is None else f"{value:,.0f}"


def _value(value: Any) -> str:
    return minus(f"{value:.4g}") if isinstance(value, float) else str(value)


def _table(config: StudyConfig, results: Sequence[TrialResult]) -> str:
    """Return a table of trials, their settings last."""
    with_speed = any(one.speed is not None for one in results)
    names = [dimension.name for dimension in config.space]
    head = ["trial", "loss", "bytes", *(["tokens/s"] if with_speed else []), "seconds", *names, ""]
    rows = [
        [
            f"{one.number}",
            _NONE if one.loss is None else f"{one.loss:.4f}",
            _whole(one.bytes),
            *([_whole(one.speed)] if with_speed else []),
            f"{one.seconds:.0f}",
            *(_value(one.params.get(name, _NONE)) for name in names),
            one.reason or ("" if one.state == "complete" else STATES[one.state]),
        ]
        for one in results
    ]
    return table("", head, rows, words=0)


def _table_of_best(
    config: StudyConfig, front: Sequence[TrialResult], best: Sequence[TrialResult]
) -> list[str]:
    first = best[0]
    model, training = ModelConfig.from_dict(first.model), TrainingConfig.from_dict(first.training)
    changed = [
        [name, _value(value), _value(usual[name])]
        for record in (model, training)
        for usual in (defaults_of(record),)
        for name, value in asdict(record).items()
        if value != usual[name]
    ]
    several = len(config.objectives) > 1
    listed = front if several else best[:_MOST_ROWS]
    what = "The Pareto front." if several else "The lowest losses."
    return [
        paragraph(what),
        _table(config, listed),
        table(
            f"Settings of trial {first.number} that are not the defaults",
            ["setting", "value", "default"],
            changed,
            words=3,
        ),
    ]


def _points(label: str, pairs: Sequence[tuple[float, float | None]], kind: int) -> Series:
    x = [pair[0] for pair in pairs]
    y = [math.nan if pair[1] is None else pair[1] for pair in pairs]
    return Series(label, x, y, kind, 0, kind, joined=False)


def _by_state(results: Sequence[TrialResult], x_of: Any) -> list[Series]:
    """Return a series of points for the complete trials, and one for the pruned ones."""
    series = []
    for kind, (state, label) in enumerate((("complete", "complete"), ("pruned", "pruned"))):
        pairs = [(x_of(one), one.loss) for one in results if one.state == state]
        if pairs:
            series.append(_points(label, pairs, kind))
    return series


def _figures(
    folder: Path,
    config: StudyConfig,
    results: Sequence[TrialResult],
    front: Sequence[TrialResult],
    best: Sequence[TrialResult],
) -> list[str]:
    label = "nats per token"
    steps: list[tuple[float, float]] = []
    for one in sorted(best, key=lambda one: one.number):
        assert one.loss is not None
        steps.append((one.number, min(one.loss, steps[-1][1] if steps else math.inf)))
    so_far = Series("best so far", [x for x, _ in steps], [y for _, y in steps], 2, 0, 2)
    points = _by_state(results, lambda one: one.number)
    by_trial = Panel("Validation loss by trial", "trial", label, [*points, so_far])
    sizes = [(one.bytes / 1000, one.loss) for one in best if one.bytes is not None]
    marked = [(one.bytes / 1000, one.loss) for one in front if one.bytes is not None]
    by_size = Panel(
        "Validation loss by model size",
        "model file, kB",
        label,
        [_points("complete", sizes, 0), _points("Pareto front", marked, 1)],
        whole=False,
    )
    drawn = [
        figure([by_trial], "trials", "Validation loss of each trial, and the lowest so far"),
        figure([by_size], "sizes", "Validation loss of each model by its size"),
    ]
    curves = _curves(folder, best)
    if curves:
        panel = Panel("Validation loss during training", "% of the steps", label, curves)
        drawn.append(
            figure([panel], "curves", "Validation loss of the best trials during training")
        )
    return drawn


def _curves(folder: Path, best: Sequence[TrialResult]) -> list[Series]:
    """Return the curves of the best trials, of those that ran on this machine."""
    curves: list[Series] = []
    for one in best:
        of_trial = Run(folder / "trials" / f"{one.number:04}")
        if not of_trial.metrics_file.exists() or len(curves) == _MOST_CURVES:
            continue
        run = read_records(of_trial)
        progress = [100 * step / one.training["steps"] for step in run.steps()]
        i = len(curves)
        curves.append(Series(f"trial {one.number}", progress, run.column("val_loss"), i, 0, i))
    return curves


def _differences(config: StudyConfig, results: Sequence[TrialResult]) -> list[str]:
    """Return a figure for each setting: the losses of trials by its value."""
    drawn = []
    for number, dimension in enumerate(config.space):
        with_it = [one for one in results if dimension.name in one.params]
        panel = Panel(
            dimension.name,
            _axis(dimension),
            "nats per token",
            _by_state(with_it, lambda one, d=dimension: _place(d, one.params[d.name])),
            whole=False,
        )
        title = f"Validation loss of each trial by its {dimension.name}"
        drawn.append(figure([panel], f"setting{number}", title))
    return [
        paragraph("Each point is a trial, whose other settings differ, too."),
        side_by_side(drawn),
    ]


def _of_words(dimension: Dimension) -> bool:
    choices = dimension.choices or ()
    return any(isinstance(value, (str, bool)) for value in choices)


def _axis(dimension: Dimension) -> str:
    if _of_words(dimension):
        assert dimension.choices is not None
        return ", ".join(f"{i}: {value}" for i, value in enumerate(dimension.choices))
    return f"log10 of {dimension.name}" if dimension.log else dimension.name


def _place(dimension: Dimension, value: Any) -> float:
    """Return the position of a value on its axis."""
    if _of_words(dimension):
        assert dimension.choices is not None
        return float(dimension.choices.index(value))
    return math.log10(value) if dimension.log else float(value)


def _space(config: StudyConfig) -> list[str]:
    rows = []
    for each in config.space:
        if each.choices is not None:
            where = ", ".join(map(str, each.choices))
        else:
            assert each.low is not None
            assert each.high is not None
            step = "" if each.step is None else f", in steps of {_value(each.step)}"
            scale = ", on a log scale" if each.log else ""
            share = " of the steps" if each.of_steps else ""
            where = f"{_value(each.low)} to {_value(each.high)}{share}{step}{scale}"
        rows.append([each.name, where])
    rules = [
        ["trials", config.length],
        ["sampler", config.sampler],
        ["pruning", "yes" if config.prune and len(config.objectives) == 1 else "no"],
        ["seed", str(config.training.seed)],
    ]
    return [table("", ["setting", "range"], rows, words=2), table("", ["name", "value"], rules, 2)]
