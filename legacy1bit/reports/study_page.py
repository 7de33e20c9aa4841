"""The page about a search for settings: its trials, the best, and what made the difference."""

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
from legacy1bit.search.study import STATES, StudyRecord, Terms, TrialResult, best_of
from legacy1bit.training.run import Run

# Curves that are drawn, and rows of the table of the best.
_MOST_CURVES, _MOST_ROWS = 6, 10

_NONE = "\u2013"


def study_report(
    folder: Path, record: StudyRecord, terms: Terms, results: Sequence[TrialResult]
) -> str:
    """Return the page about a study.

    Parameters
    ----------
    folder : Path
        Where the runs of its trials lie, as far as they ran here.
    record : StudyRecord
    terms : Terms
    results : sequence of TrialResult

    Raises
    ------
    OSError, ValueError
        If a trial's metrics cannot be read, or matplotlib is missing.
    """
    complete = [one for one in results if one.state == "complete"]
    front = best_of(results, terms.objectives)
    best = sorted(complete, key=lambda one: (one.loss, one.number))
    sections = [tiles(_numbers(results, best))]
    if best:
        sections += [
            section("The best", *_table_of_best(terms, front, best)),
            section("Trials", side_by_side(_figures(folder, terms, results, front, best))),
            section("What made the difference", *_differences(terms, results)),
        ]
    sections += [
        section("All trials", folded(f"{len(results)} trials", _table(terms, results))),
        section("What was searched", *_space(terms)),
        section("Machine", machine_table(record.machine)),
        section(
            "Once more",
            paragraph("The command that began the search. Another run of it tries other settings."),
            f"<pre>{escape(record.command or _NONE)}</pre>",
        ),
    ]
    return page(folder.resolve().name, _lead(record, terms, results), sections)


def _lead(record: StudyRecord, terms: Terms, results: Sequence[TrialResult]) -> str:
    wanted = {"loss": "the lowest loss", "bytes": "the fewest bytes", "speed": "the highest speed"}
    limits = []
    if terms.most_bytes is not None:
        limits.append(f"of at most {terms.most_bytes:,} bytes")
    if terms.least_speed is not None:
        limits.append(f"that write at least {terms.least_speed:,.0f} tokens/s")
    of = f", of models {' and '.join(limits)}" if limits else ""
    name = record.source.get("name", "unknown data")
    return (
        f"{len(results)} trials of {terms.length} on {name}, in search of "
        f"{' and '.join(wanted[one] for one in terms.objectives)}{of}."
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
    return numbers | {"time in training": f"{sum(one.seconds for one in results) / 60:,.1f} min"}


def _whole(value: float | None) -> str:
    return _NONE if value is None else f"{value:,.0f}"


def _value(value: Any) -> str:
    return minus(f"{value:.4g}") if isinstance(value, float) else str(value)


def _table(terms: Terms, results: Sequence[TrialResult]) -> str:
    """Return a table of trials, their settings last."""
    with_speed = any(one.speed is not None for one in results)
    names = [dimension.name for dimension in terms.space]
    head = ["trial", "loss", "bytes", *(["tokens/s"] if with_speed else []), "seconds", *names, ""]
    rows = [
        [
            f"{one.number}",
            _NONE if one.loss is None else f"{one.loss:.4f}",
            _whole(one.bytes),
            *([_whole(one.speed)] if with_speed else []),
            f"{one.seconds:.0f}",
            *(_value(one.chosen.get(name, _NONE)) for name in names),
            one.reason or ("" if one.state == "complete" else STATES[one.state]),
        ]
        for one in results
    ]
    return table("", head, rows, words=0)


def _table_of_best(
    terms: Terms, front: Sequence[TrialResult], best: Sequence[TrialResult]
) -> list[str]:
    first = best[0]
    model, training = ModelConfig.from_dict(first.model), TrainingConfig.from_dict(first.training)
    changed = [
        [name, _value(value), _value(usual[name])]
        for record in (model, training)
        for usual in (asdict(defaults_of(record)),)
        for name, value in asdict(record).items()
        if value != usual[name]
    ]
    several = len(terms.objectives) > 1
    shown = front if several else best[:_MOST_ROWS]
    what = "No other trial beats these in all that counts." if several else "The lowest losses."
    return [
        paragraph(what),
        _table(terms, shown),
        table(
            f"Settings of trial {first.number} that are not the defaults",
            ["setting", "here", "default"],
            changed,
            words=3,
        ),
    ]


def _points(label: str, pairs: Sequence[tuple[float, float | None]], kind: int) -> Series:
    x = [pair[0] for pair in pairs]
    y = [math.nan if pair[1] is None else pair[1] for pair in pairs]
    return Series(label, x, y, kind, 0, kind, joined=False)


def _by_state(results: Sequence[TrialResult], x_of: Any) -> list[Series]:
    """Return a series of points for those that came to their end, and one for the others."""
    found = []
    for kind, (state, label) in enumerate((("complete", "to the end"), ("pruned", "ended early"))):
        pairs = [(x_of(one), one.loss) for one in results if one.state == state]
        if pairs:
            found.append(_points(label, pairs, kind))
    return found


def _figures(
    folder: Path,
    terms: Terms,
    results: Sequence[TrialResult],
    front: Sequence[TrialResult],
    best: Sequence[TrialResult],
) -> list[str]:
    label = "nats a token"
    steps: list[tuple[float, float]] = []
    for one in sorted(best, key=lambda one: one.number):
        assert one.loss is not None
        steps.append((one.number, min(one.loss, steps[-1][1] if steps else math.inf)))
    so_far = Series("best so far", [x for x, _ in steps], [y for _, y in steps], 2, 0, 2)
    by_trial = Panel(
        "Loss by trial", "trial", label, [*_by_state(results, lambda one: one.number), so_far]
    )
    sizes = [(one.bytes / 1000, one.loss) for one in best if one.bytes is not None]
    marked = [(one.bytes / 1000, one.loss) for one in front if one.bytes is not None]
    by_size = Panel(
        "Loss against size",
        "kB of the model's file",
        label,
        [_points("to the end", sizes, 0), _points("the best", marked, 1)],
        whole=False,
    )
    drawn = [
        figure([by_trial], "trials", "Loss of each trial, and the lowest so far"),
        figure([by_size], "sizes", "Loss of each model over its size"),
    ]
    curves = _curves(folder, best)
    if curves:
        panel = Panel("Loss on the way", "% of the steps", label, curves)
        drawn.append(
            figure([panel], "curves", "Validation loss of the best trials as they trained")
        )
    return drawn


def _curves(folder: Path, best: Sequence[TrialResult]) -> list[Series]:
    """Return how the best trials went, of those that ran here."""
    found: list[Series] = []
    for one in best:
        of_trial = Run(folder / "trials" / f"{one.number:04}")
        if not of_trial.metrics_file.exists() or len(found) == _MOST_CURVES:
            continue
        run = read_records(of_trial)
        share = [100 * step / one.training["steps"] for step in run.steps()]
        i = len(found)
        found.append(Series(f"trial {one.number}", share, run.column("val_loss"), i, 0, i))
    return found


def _differences(terms: Terms, results: Sequence[TrialResult]) -> list[str]:
    """Return a figure for each setting: its values, and the losses with them."""
    drawn = []
    for number, dimension in enumerate(terms.space):
        with_it = [one for one in results if dimension.name in one.chosen]
        panel = Panel(
            dimension.name,
            _axis(dimension),
            "nats a token",
            _by_state(with_it, lambda one, d=dimension: _place(d, one.chosen[d.name])),
            whole=False,
        )
        title = f"Loss of each trial over its {dimension.name}"
        drawn.append(figure([panel], f"setting{number}", title))
    return [
        paragraph("Each point is a trial; its other settings differ, too."),
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
    """Return where a value stands on its axis."""
    if _of_words(dimension):
        assert dimension.choices is not None
        return float(dimension.choices.index(value))
    return math.log10(value) if dimension.log else float(value)


def _space(terms: Terms) -> list[str]:
    rows = []
    for each in terms.space:
        if each.choices is not None:
            where = ", ".join(map(str, each.choices))
        else:
            assert each.low is not None
            assert each.high is not None
            step = "" if each.step is None else f", in steps of {_value(each.step)}"
            scale = ", ratios alike" if each.log else ""
            share = " of the steps" if each.of_steps else ""
            where = f"{_value(each.low)} to {_value(each.high)}{share}{step}{scale}"
        rows.append([each.name, where])
    told = [
        ["trials", terms.length],
        ["proposed by", terms.sampler],
        ["bad ones end early", "yes" if terms.prune and len(terms.objectives) == 1 else "no"],
        ["seed", str(terms.training.seed)],
    ]
    return [table("", ["setting", "where"], rows, words=2), table("", ["what", "which"], told, 2)]
