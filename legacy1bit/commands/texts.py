"""The options that name a text, as a ``DataOrigin``, and back."""

import argparse
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from legacy1bit.commands.options import add_settings, path_of
from legacy1bit.data.cache import saved_streams
from legacy1bit.data.origin import DataOrigin, check_weight
from legacy1bit.data.sources import STANDARD_INPUT, is_stream
from legacy1bit.hyperparams import DataConfig

DEFAULT_STORIES = 20000

# A path, and a weight behind its last colon.
_WEIGHTED = re.compile(r"(.+):([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)", re.DOTALL)


class Text(NamedTuple):
    """What one ``--data`` names.

    Attributes
    ----------
    paths : tuple of str
    weight : float or None
    """

    paths: tuple[str, ...]
    weight: float | None = None


class TextsAction(argparse.Action):
    """An option of paths that may be given several times; the last path may have a weight."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Add what was given once."""
        try:
            text = _text_of(values)
        except ValueError as error:
            raise argparse.ArgumentError(self, str(error)) from None
        setattr(namespace, self.dest, [*(getattr(namespace, self.dest) or ()), text])


def _text_of(paths: Sequence[str]) -> Text:
    """Return the text of some paths, of which the last may have a weight."""
    parted = [_parted(path) for path in paths]
    *others, (last, weight) = parted
    for path, (_, other) in zip(paths, others, strict=False):
        if other is not None:
            raise ValueError(
                f"{path} is one of several files of a text, whose weight goes behind the last: "
                "give each text a --data of its own"
            )
    return Text((*(path for path, _ in others), last), weight)


def _parted(path: str) -> tuple[str, float | None]:
    """Return a path without the weight behind it, and that: None if there is none."""
    match = _WEIGHTED.fullmatch(path)
    if match is None or os.path.lexists(path):
        return path, None
    weight = float(match[2])
    check_weight(weight)
    return match[1], weight


def texts_of_python(given: Any) -> list[Text]:
    """Return texts as Python names them, in the way of ``TextsAction``.

    Parameters
    ----------
    given : path-like, sequence of path-like, mapping of path-like to float, or sequence of pairs
        A text, by one path or several; or texts to be mixed: a path, or several, and a weight each.

    Raises
    ------
    TypeError
        If it is something else.
    ValueError
        If a weight is out of range.
    """
    if isinstance(given, (str, os.PathLike)):
        return [Text((os.fspath(given),))]
    texts = list(given.items() if isinstance(given, Mapping) else given)
    if not texts:
        raise ValueError("data names no path, expected one or more")
    pairs = [text for text in texts if isinstance(text, (tuple, list))]
    if not pairs:
        return [Text(tuple(map(os.fspath, texts)))]
    mixed = []
    for pair in texts:
        if len(pairs) < len(texts) or len(pair) != 2:
            raise TypeError(f"a text is {pair!r}, expected a pair of a path and a weight")
        paths, weight = pair
        check_weight(weight)
        text, *others = texts_of_python(paths)
        if others or text.weight is not None:
            raise TypeError(f"a text is {paths!r}, expected a path, or several")
        mixed.append(text._replace(weight=float(weight)))
    return mixed


def add_data(command: argparse.ArgumentParser) -> None:
    """Give a command the options that name a text and its settings."""
    command.add_argument(
        "--data",
        metavar="PATH",
        nargs="+",
        action=TextsAction,
        help="text files, folders, patterns or -; .jsonl (of conversations, too), .parquet, .gz, "
        ".zst, .xz and .bz2, and .bin of tokens (default: the stories); PATH:WEIGHT, where --data "
        "is given several times, mixes texts, and all are one where none has a weight; with "
        "--resume, where the text has moved to",
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
    if all(text.weight is None for text in data):
        validation = paths_named(arguments.validation or [], "validation", None)
        return DataOrigin.of_texts(
            paths_named(_paths_of(data), "data", arguments.cache), validation
        )
    if len(data) == 1:
        raise ValueError(
            f"{data[0].paths[-1]} is the only text, and has a weight: give each text to mix a "
            "--data of its own"
        )
    if arguments.validation is not None:
        raise ValueError(
            "--validation goes with one text: texts that are mixed validate on parts of their own"
        )
    paths = iter(paths_named(_paths_of(data), "data", arguments.cache))
    texts = [DataOrigin.of_texts([next(paths) for _ in text.paths]) for text in data]
    return DataOrigin.of_mix(
        [
            replace(text, weight=1.0 if named.weight is None else named.weight)
            for text, named in zip(texts, data, strict=True)
        ]
    )


def _paths_of(texts: Sequence[Text]) -> list[str]:
    """Return all paths of some texts."""
    return [path for text in texts for path in text.paths]


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
    data: Sequence[Text] | None,
    validation: Sequence[str] | None,
    cache: Path | None,
    prefix: str = "",
) -> DataOrigin:
    """Return the origin that a run or a study has recorded, with its texts where they are now.

    Parameters
    ----------
    origin : DataOrigin
    folder : Path
        Of the run or the study.
    data, validation : sequence or None
        Where its texts (``TextsAction``) and its validation text have moved to.
    cache : Path or None
    prefix : str
        What the options begin with that name them, before "data" and "validation".

    Raises
    ------
    ValueError
        If there is no such text, none with a path, or no hash to compare it with.
    OSError
        If a text does not exist.
    """
    origin.check_path()
    texts, other = f"{prefix}data", f"{prefix}validation"
    for option, given, known in (
        (texts, data, origin.paths or origin.texts),
        (other, validation, origin.validation_paths),
    ):
        if given is not None and not known:
            raise ValueError(f"--{option} names a text that {folder} does not have")
        if given is not None and origin.sha256 is None:
            raise ValueError(f"--{option} cannot be checked: {folder} has no SHA-256 of its text")
    if data is not None:
        origin = _moved(origin, folder, texts, data, cache)
    if validation is not None:
        origin = replace(origin, validation_paths=tuple(paths_named(validation, other, cache)))
    origin.check_there(f"--{texts} or --{other} says where the text has moved to")
    return origin


def _moved(
    origin: DataOrigin, folder: Path, option: str, texts: Sequence[Text], cache: Path | None
) -> DataOrigin:
    """Return an origin with its text, or the texts that are mixed, where they are now."""
    paths = paths_named(_paths_of(texts), option, cache)
    if not origin.texts:
        for text in texts:
            if text.weight is not None:
                raise ValueError(f"--{option} has a weight, and {folder} has one text")
        return replace(origin, paths=tuple(paths))
    if len(texts) != len(origin.texts):
        raise ValueError(
            f"--{option} is there {len(texts)} times, expected {len(origin.texts)}: once for each "
            f"text of {folder}, in their order"
        )
    found, left = [], iter(paths)
    for text, known in zip(texts, origin.texts, strict=True):
        if text.weight not in (None, known.weight):
            raise ValueError(
                f"--{option} has the weight {text.weight:g}, expected {known.weight:g}: weights "
                "cannot change in a run that goes on"
            )
        found.append(replace(known, paths=tuple(next(left) for _ in text.paths)))
    return replace(origin, texts=tuple(found))


def words_of(origin: DataOrigin) -> list[str]:
    """Return the words of a command line that name an origin, unless it is the default."""
    if origin.stories is not None:
        return [] if origin.stories == DEFAULT_STORIES else ["--stories", str(origin.stories)]
    if origin.texts:
        named = [[*text.paths[:-1], f"{text.paths[-1]}:{text.weight!r}"] for text in origin.texts]
        return [word for paths in named for word in ("--data", *paths)]
    texts = {"--data": origin.paths, "--validation": origin.validation_paths}
    return [word for option, paths in texts.items() if paths for word in (option, *paths)]
