"""``report``: write a page about a run, or about a search for settings."""

import argparse
import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

from legacy1bit.commands.options import latest_run, option_of, path_of
from legacy1bit.commands.texts import words_of
from legacy1bit.data.origin import DataOrigin, Kind
from legacy1bit.data.tokenizer_files import load_tokenizer
from legacy1bit.hyperparams import DataConfig, ModelConfig, TrainingConfig
from legacy1bit.reports.figures import check_suffix, load_matplotlib
from legacy1bit.reports.run_page import defaults_of, report
from legacy1bit.reports.study_page import study_report
from legacy1bit.search.study import (
    STUDY_FILE,
    StudyRecord,
    open_storage,
    open_study,
    results_of,
    study_at_hand,
)
from legacy1bit.system.files import atomic_write
from legacy1bit.training.run import Run

# Settings whose defaults depend on the machine.
_ALWAYS = ("threads", "precision")


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    command.description = (
        "Write an HTML page about a run: curves, samples, evaluations, settings, weights, "
        "hardware; or about a study of tune: its trials, the best of them, and the effect of each "
        "setting. The page is one file, and fetches nothing."
    )
    command.add_argument(
        "run_folder",
        metavar="RUN",
        type=path_of,
        nargs="?",
        help="a run's folder, or a study's (default: the latest run)",
    )
    command.add_argument(
        "--out", metavar="FILE", type=path_of, required=True, help="output file: .html or .htm"
    )

    command.add_argument(
        "--storage", metavar="URL", help="address of a study's database, if it is not in its folder"
    )


def run(arguments: argparse.Namespace) -> int:
    """Write the page."""
    out = arguments.out
    check_suffix(out, (".html", ".htm"))
    load_matplotlib()
    folder = arguments.run_folder or latest_run()
    if (folder / STUDY_FILE).exists():
        text = _about_study(folder, arguments.storage)
    elif arguments.storage is not None:
        raise ValueError(f"--storage goes with a study, and {folder} is not one")
    else:
        text = report(Run(folder), train_command(folder))
    atomic_write(out, text)
    print(f"{out}: {len(text.encode()):,} bytes about {folder}")
    return 0


def _about_study(folder: Path, storage: str | None) -> str:
    record = StudyRecord.read(folder)
    with study_at_hand():
        study, config = open_study(open_storage(record.url(folder, storage)), record.study, None, 1)
        results = results_of(study)
    return study_report(folder, record, config, results)


def train_command(folder: Path) -> str:
    """Return the command line that trains with a run's settings.

    Raises
    ------
    OSError
        If a file of the run cannot be read.
    ValueError
        If one is damaged.
    """
    run = Run(folder)
    settings = run.settings()
    origin = settings.origin
    options = _of_tokenizer(run, settings.data, origin)
    for record in (settings.model, settings.training, settings.data):
        options |= _given(record)
    words = ["legacy1bit", "train", *words_of(origin)]
    for name, value in options.items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        elif str(value).startswith("-"):
            words.append(f"--{name}={value}")
        else:
            words += [f"--{name}", str(value)]
    return shlex.join(words)


def _given(record: ModelConfig | TrainingConfig | DataConfig) -> dict[str, Any]:
    usual = defaults_of(record)
    values = {setting.name: getattr(record, setting.name) for setting in fields(record)}
    return {
        option: values[name]
        for name in values
        if (option := option_of(name)) is not None
        and (name in _ALWAYS or values[name] != usual[name])
    }


def _of_tokenizer(run: Run, data: DataConfig, origin: DataOrigin) -> dict[str, Any]:
    """Return the option for a tokenizer that was not made as the settings say."""
    if origin.kind not in (Kind.TEXT, Kind.MIX) or not run.tokenizer_file.exists():
        return {}
    if load_tokenizer(run.folder).kind == data.tokenizer:
        return {}
    return {"tokenizer-from": run.folder.resolve()}
