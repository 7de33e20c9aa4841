"""What several commands share: options made of settings, and where models lie."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from legacy1bit.formats.c_v1 import import_c_v1
from legacy1bit.model import LegacyLLM, load_model
from legacy1bit.threads import available_cores, default_threads
from legacy1bit.training import run as training_run

RUNS = Path("runs")

# What no number of an option may be beyond: sums of them are numbers, too.
_MOST = 1e15

ALL_CORES = "LEGACY1BIT_THREADS, or the cores there are"

# Settings whose options are not named like them; None: the command line has none.
_OPTIONS = {
    "vocab_size": None,
    "vocabulary": "vocab-size",
    "num_blocks": "blocks",
    "num_heads": "heads",
    # A study's, beside that of each training.
    "trial_patience": "patience",
}


def option_of(name: str) -> str | None:
    """Return the command line's name of a setting, without its dashes."""
    option = _OPTIONS.get(name, name)
    return None if option is None else option.replace("_", "-")


def add_settings(
    command: argparse.ArgumentParser,
    title: str,
    record: type[Any],
    names: Sequence[str] | None = None,
) -> None:
    """Give a command an option for each field of a record of settings, or for some."""
    group = command.add_argument_group(title)
    for setting in fields(record):
        option, meta = option_of(setting.name), setting.metadata
        if option is None or (names is not None and setting.name not in names):
            continue
        default = ALL_CORES if setting.name == "threads" else setting.default
        meaning = meta["meaning"] + ("" if default is None else f" (default: {default})")
        settings: dict[str, Any] = {"dest": setting.name, "help": meaning}
        if meta["kind"] is bool:
            settings["action"] = argparse.BooleanOptionalAction
            settings["default"] = None
        elif "choices" in meta:
            settings["choices"] = meta["choices"]
        else:
            settings["type"] = meta["kind"]
            settings["metavar"] = {int: "N", float: "X", str: "TEXT"}[meta["kind"]]
        group.add_argument(f"--{option}", **settings)


def path_of(text: str) -> Path:
    """Return a path that an option names; nothing is not the folder one is in."""
    if not text:
        raise argparse.ArgumentTypeError("is empty, expected a path")
    return Path(text)


def add_model(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--model", metavar="PATH", type=path_of, help="a run's folder (default: the latest)"
    )


def given(arguments: argparse.Namespace, record: type[Any]) -> dict[str, Any]:
    """Return the settings of a record that the command line names."""
    values = {setting.name: getattr(arguments, setting.name, None) for setting in fields(record)}
    return {name: value for name, value in values.items() if value is not None}


def check_above_zero(arguments: argparse.Namespace, *names: str) -> None:
    """Raise ``ValueError`` unless each of some options is a number above 0, or was not given."""
    for name in names:
        value = getattr(arguments, name)
        if value is not None and not 0 < value <= _MOST:
            raise ValueError(
                f"--{option_of(name)} is {value:.15g}, expected it above 0, up to {_MOST:g}"
            )


def threads_of(arguments: argparse.Namespace) -> int:
    """Return how many threads to use: never more than there are cores."""
    if arguments.threads is None:
        return default_threads()
    if not 1 <= arguments.threads <= 256:
        raise ValueError(f"--threads is {arguments.threads}, expected 1 to 256")
    return min(int(arguments.threads), available_cores())


def read_model(path: Path) -> LegacyLLM:
    """Return a model of a folder, or of a file of the C original, with where it comes from.

    Raises
    ------
    ModelFileError, OSError
        If it cannot be read.
    """
    return import_c_v1(path) if path.is_file() else load_model(path)


def write_bytes(data: bytes) -> None:
    """Write to standard output, as text where what stands in for it takes nothing else."""
    output = sys.stdout
    if hasattr(output, "buffer"):
        output.buffer.write(data)
    else:
        output.write(data.decode("utf-8", "replace"))
    output.flush()


def latest_run() -> Path:
    """Return the run under ``runs/`` that was saved last.

    Raises
    ------
    ValueError
        If there is none.
    """
    run = training_run.latest_run(RUNS)
    if run is None:
        raise ValueError(f"there is no run in {RUNS}/ yet: train one first, or name one")
    return run.folder
