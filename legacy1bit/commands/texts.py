"""The options that name a text, as a ``DataOrigin``, and back."""

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from legacy1bit.commands.options import add_settings, path_of
from legacy1bit.data.cache import saved_streams
from legacy1bit.data.origin import DataOrigin
from legacy1bit.data.sources import STANDARD_INPUT, is_stream
from legacy1bit.hyperparams import DataConfig

DEFAULT_STORIES = 20000


def add_data(command: argparse.ArgumentParser) -> None:
    """Give a command the options that name a text and its settings."""
    command.add_argument(
        "--data",
        metavar="PATH",
        nargs="+",
        action="extend",
        help="text files, folders, patterns or -; .jsonl, .parquet, .gz, .zst, .xz and .bz2, and "
        ".bin of tokens, too (default: the stories); with --resume, where the text has moved to",
    )
    command.add_argument(
        "--validation",
        metavar="PATH",
        nargs="+",
        action="extend",
        help="a separate text to validate on",
    )
    command.add_argument(
        "--tokenizer-from",
        metavar="DIR",
        type=path_of,
        help="use the tokenizer of this folder instead of making one",
    )
    command.add_argument(
        "--stories", type=int, metavar="N", help="the number of stories to train on"
    )
    add_cache(command)
    add_settings(command, "the data", DataConfig)


def add_cache(command: argparse.ArgumentParser) -> None:
    """Give a command the option for the cache of tokens."""
    command.add_argument(
        "--cache",
        metavar="DIR",
        type=path_of,
        help="the cache of tokens, which runs share (default: legacy1bit in the user's cache)",
    )


def origin_of(arguments: argparse.Namespace, seed: int) -> DataOrigin:
    """Return the origin that the options of ``add_data`` name.

    Raises
    ------
    ValueError
        If they exclude each other, or name no text.
    OSError
        If a stream cannot be saved.
    """
    data, count = arguments.data, arguments.stories
    if data is None:
        if arguments.validation is not None:
            raise ValueError("--validation goes with --data")
        return DataOrigin.of_stories(DEFAULT_STORIES if count is None else count, seed)
    if count is not None:
        raise ValueError("--stories and --data exclude each other")
    validation = paths_named(arguments.validation or [], "validation", None)
    return DataOrigin.of_texts(paths_named(data, "data", arguments.cache), validation)


def paths_named(paths: Sequence[str], option: str, cache: Path | None) -> list[str]:
    """Return the absolute paths that an option names; a stream is saved in the cache first.

    Only --data may name streams. Errors are those of ``origin_of``.
    """
    for path in paths:
        if not path:
            raise ValueError(f"--{option} is empty, expected a path")
        if option != "data" and is_stream(path):
            raise ValueError(f"--{option} is {path}, which is a stream: expected a file")
    check_different(paths)
    return [_absolute(path) for path in saved_streams(paths, cache)]


def check_different(paths: Sequence[str]) -> None:
    """Raise ``ValueError`` if a text is named twice."""
    seen: set[str] = set()
    for path in paths:
        place = path if path == STANDARD_INPUT else _absolute(path)
        if place in seen:
            raise ValueError(f"{path} is named twice, expected each text once")
        seen.add(place)


def _absolute(path: str) -> str:
    try:
        return os.path.abspath(path)
    except FileNotFoundError:
        raise ValueError(f"{path} is in the current folder, which has been removed") from None


def moved(
    origin: DataOrigin,
    folder: Path,
    options: Mapping[str, Sequence[str] | None],
    cache: Path | None,
) -> DataOrigin:
    """Return the origin that a run or a study has recorded, with its texts where they are now.

    Parameters
    ----------
    origin : DataOrigin
    folder : Path
        Of the run or the study.
    options : mapping of str to sequence of str or None
        The two options for where its text and its validation text have moved to.
    cache : Path or None

    Raises
    ------
    ValueError
        If there is no such text, none with a path, or no hash to compare it with.
    OSError
        If a text does not exist.
    """
    origin.check_path()
    changes: dict[str, Any] = {}
    for (option, paths), field in zip(options.items(), ("paths", "validation_paths"), strict=True):
        if paths is None:
            continue
        if not getattr(origin, field):
            raise ValueError(f"--{option} names a text that {folder} does not have")
        if origin.sha256 is None:
            raise ValueError(f"--{option} cannot be checked: {folder} has no SHA-256 of its text")
        changes[field] = tuple(paths_named(paths, option, cache))
    origin = replace(origin, **changes)
    names = " or ".join(f"--{option}" for option in options)
    origin.check_there(f"{names} says where the text has moved to")
    return origin


def options_of(origin: DataOrigin) -> dict[str, Any]:
    """Return the options that name an origin, without those that are the default."""
    if origin.stories not in (None, DEFAULT_STORIES):
        return {"stories": origin.stories}
    texts = {"data": origin.paths, "validation": origin.validation_paths}
    return {option: list(paths) for option, paths in texts.items() if paths}
