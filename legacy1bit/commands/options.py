"""Options that commands share: those made from settings, and the path of a model."""

import argparse
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

from legacy1bit.data_utils import with_line_breaks
from legacy1bit.formats.adapters import read_adapters
from legacy1bit.formats.c_v1 import import_c_v1
from legacy1bit.formats.gguf_file import is_gguf
from legacy1bit.generator import MOST_CONTEXT, Generator
from legacy1bit.hyperparams import (
    ARCHITECTURES,
    BASIC,
    EXPERIMENTAL,
    ModelConfig,
    SamplingConfig,
)
from legacy1bit.inference import ACTIVATIONS
from legacy1bit.model import LegacyLLM, load_model
from legacy1bit.packed import HEADS
from legacy1bit.threads import available_cores, default_threads
from legacy1bit.training import run as training_run

RUNS = Path("runs")

# The largest number of an option, so that sums are finite.
_MOST = 1e15

# A size may have a unit: powers of a thousand.
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kMG]?)B?", re.IGNORECASE)
_MOST_BYTES = 1 << 50
_UNITS = {"": 1, "K": 1000, "M": 1000**2, "G": 1000**3}

ALL_CORES = "LEGACY1BIT_THREADS, or all cores"

# Settings whose options have other names; None: without an option.
_OPTIONS = {
    "vocab_size": None,
    "vocabulary": "vocab-size",
    "num_blocks": "blocks",
    "num_heads": "heads",
    # ``from`` is a word of Python.
    "start": "from",
    # Of a study, beside that of each training.
    "trial_patience": "patience",
}


def option_of(name: str) -> str | None:
    """Return the option of a setting, without its dashes; None where it has none."""
    option = _OPTIONS.get(name, name)
    return None if option is None else option.replace("_", "-")


def option_typed(parsed: argparse.Namespace, name: str) -> str | None:
    """Return the option of a setting with its dashes, unless its value comes from a file."""
    option = option_of(name) if hasattr(parsed, name) else None
    of_file = any(getattr(parsed, source, None) for source in ("config", "resume", "model"))
    if option is None or (of_file and getattr(parsed, name) is None):
        return None
    return f"--{option}"


def add_settings(
    command: argparse.ArgumentParser,
    title: str,
    record: type[Any],
    names: Sequence[str] | None = None,
) -> None:
    """Add an option for each field of a record of settings, or for some.

    Basic options go to the first group of the command's help, experimental ones to the last, and
    the others to a group of the given title.
    """
    group, experimental = command.add_argument_group(title), _experimental_group(command)
    for setting in fields(record):
        option, meta = option_of(setting.name), setting.metadata
        if option is None or (names is not None and setting.name not in names):
            continue
        meaning = f"{meta['meaning']}{_default_of(setting)}"
        if meta["group"] == EXPERIMENTAL:
            meaning += f" ({EXPERIMENTAL})"
        settings: dict[str, Any] = {"dest": setting.name, "help": meaning}
        if meta["kind"] is bool:
            settings["action"] = argparse.BooleanOptionalAction
            settings["default"] = None
        elif "choices" in meta:
            settings |= {"choices": meta["choices"], "type": meta["kind"]}
        else:
            settings["type"] = meta["kind"]
            settings["metavar"] = {int: "N", float: "X", str: "TEXT"}[meta["kind"]]
        place = {BASIC: command, EXPERIMENTAL: experimental}.get(meta["group"], group)
        place.add_argument(f"--{option}", **settings)


def add_model_settings(command: argparse.ArgumentParser) -> None:
    """Add the options of a model's settings, and the one that names an architecture."""
    command.add_argument(
        "--architecture",
        choices=tuple(ARCHITECTURES),
        help="the settings of an architecture that other programs know; other options of the model "
        "take precedence (default: nemotron)",
    )
    add_settings(command, "the model", ModelConfig)


def _experimental_group(command: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Return the group of experimental options, which is the last one."""
    title, groups = f"{EXPERIMENTAL} options", command._action_groups
    group = next((one for one in groups if one.title == title), None)
    if group is not None:
        groups.remove(group)
        groups.append(group)
    return group or command.add_argument_group(title)


def _default_of(setting: Field[Any]) -> str:
    """Return the default of a setting for the help; none where its meaning has it."""
    default: Any = setting.default
    if setting.name == "threads":
        default = ALL_CORES
    elif isinstance(default, bool):
        default = "on" if default else "off"
    return "" if default is None else f" (default: {default})"


def path_of(text: str) -> Path:
    """Return the path of an option; an empty text is not the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("is empty, expected a path")
    return Path(text)


def size_of(text: str) -> int:
    """Return the bytes that an option says, as 500000, 500kB or 2G."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise argparse.ArgumentTypeError(f"it is {text!r}, expected bytes, as 500000 or 500kB")
    size = float(match[1]) * _UNITS[match[2].upper()]
    if size > _MOST_BYTES:
        raise argparse.ArgumentTypeError(f"it is {text[:40]!r}, expected at most {_MOST_BYTES:,}")
    return round(size)


def new_folder(text: str) -> Path:
    """Return the path of an option for a folder that is written, unless it is a dangling link."""
    folder = path_of(text)
    if folder.is_symlink() and not folder.exists():
        raise argparse.ArgumentTypeError(
            f"{folder} is a link to {os.readlink(folder)}, which does not exist"
        )
    return folder


def add_model(command: argparse.ArgumentParser) -> None:
    """Add the options that name a model, and adapters on it."""
    command.add_argument(
        "--model",
        metavar="PATH",
        type=path_of,
        help="a run's folder (default: the latest), a GGUF file, or a folder of Hugging Face",
    )
    command.add_argument(
        "--adapter",
        metavar="PATH[:SCALE]",
        action="append",
        default=[],
        help="a LoRA adapter on the model: a run, a folder of PEFT, or a GGUF file; may be given "
        "several times, and each may be multiplied by a factor",
    )


def add_generation(command: argparse.ArgumentParser, what: str, max_tokens: int) -> None:
    """Add the options of all texts that are generated.

    Parameters
    ----------
    command : ArgumentParser
    what : str
        What is generated, with its article.
    max_tokens : int
        The default of its length.
    """
    command.add_argument(
        "--max-tokens",
        type=int,
        default=max_tokens,
        metavar="N",
        help=f"length of {what} (default: {max_tokens})",
    )
    command.add_argument(
        "--seed",
        type=int,
        metavar="N",
        help=f"repeat {what} (default: another one each time)",
    )
    command.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        type=with_line_breaks,
        help="end before this text, \\n: a line break; may be given several times",
    )
    command.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help=f"number of threads (default: 1 for a small model, else {ALL_CORES})",
    )
    command.add_argument(
        "--context",
        type=int,
        metavar="N",
        help=f"tokens that are kept (default: the model's context, at most {MOST_CONTEXT})",
    )
    command.add_argument(
        "--activations",
        choices=ACTIVATIONS,
        default=ACTIVATIONS[0],
        help="inputs of matrices of codes; float32 takes several times as long (default: int8)",
    )
    command.add_argument(
        "--head",
        choices=HEADS,
        help="how a float embedding and output matrix are stored (default: int8 from 32 million "
        "weights on)",
    )
    add_settings(command, "sampling", SamplingConfig)


def load_generator(arguments: argparse.Namespace, model: Path, threads: int | None) -> Generator:
    """Return a generator of a model with these options."""
    return Generator.load(
        model,
        threads,
        head=arguments.head,
        activations=arguments.activations,
        context=arguments.context,
        adapters=arguments.adapter,
    )


def generation_of(arguments: argparse.Namespace, **least: int) -> tuple[SamplingConfig, int | None]:
    """Return the sampling and the number of threads that these options say.

    Parameters
    ----------
    arguments : Namespace
    least : int
        The smallest values of options, by their names.

    Raises
    ------
    ValueError
        If one is out of range.
    """
    sampling = SamplingConfig(**given(arguments, SamplingConfig))
    for name, low in {"seed": 0, "context": 2, **least}.items():
        value = getattr(arguments, name)
        if value is not None and value < low:
            raise ValueError(f"--{option_of(name)} is {value}, expected {low} or more")
    if "" in arguments.stop:
        raise ValueError("--stop is empty, expected text")
    return sampling, None if arguments.threads is None else threads_of(arguments)


def given(arguments: argparse.Namespace, record: type[Any]) -> dict[str, Any]:
    """Return the settings of a record that are on the command line."""
    values = {setting.name: getattr(arguments, setting.name, None) for setting in fields(record)}
    return {name: value for name, value in values.items() if value is not None}


def check_above_zero(arguments: argparse.Namespace, *names: str) -> None:
    """Raise ``ValueError`` unless each of these options is above 0, or was not given."""
    for name in names:
        value = getattr(arguments, name)
        if value is not None and not 0 < value <= _MOST:
            raise ValueError(
                f"--{option_of(name)} is {value:.15g}, expected it above 0, up to {_MOST:g}"
            )


def threads_of(arguments: argparse.Namespace) -> int:
    """Return the number of threads: at most that of the cores."""
    if arguments.threads is None:
        return default_threads()
    if not 1 <= arguments.threads <= 256:
        raise ValueError(f"--threads is {arguments.threads}, expected 1 to 256")
    return min(int(arguments.threads), available_cores())


def read_model(path: Path, adapters: Sequence[tuple[Path, float]] = ()) -> LegacyLLM:
    """Return a model of any known format, with its provenance and adapters on it.

    Raises
    ------
    ModelFileError, OSError
        If it cannot be read.
    """
    is_c_v1 = path.is_file() and not is_gguf(path)
    model = import_c_v1(path) if is_c_v1 else load_model(path)
    return model.with_adapter(read_adapters(adapters, model.config)) if adapters else model


def write_bytes(data: bytes) -> None:
    """Write to standard output; as text where its replacement takes only text."""
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
        If there are no runs.
    """
    run = training_run.latest_run(RUNS)
    if run is None:
        raise ValueError(f"there is no run in {RUNS}/ yet: train one first, or name one")
    return run.folder
