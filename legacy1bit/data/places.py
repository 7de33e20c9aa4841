"""Where the texts of a run lie, also after it has moved together with them.

A run records the absolute paths of its texts, and their hash, which is checked wherever they are
read from.
"""

import errno
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# What in a run's source names texts, by a path or by several.
TEXT_PATH, VALIDATION_PATH = "path", "validation"

# How many folders above a run are searched for its text: `best` lies one deeper than the run.
_LEVELS = 3


def paths_of(source: Mapping[str, Any], key: str) -> list[str]:
    """Return the paths of a run's text, or of its validation text; none if it has none.

    Raises
    ------
    ValueError
        If what is there names no paths.
    """
    value = source.get(key)
    if value is None:
        return []
    paths = value if isinstance(value, list) and value else [value]
    for path in paths:
        if not isinstance(path, str):
            raise ValueError(f"the run's source has {key} {value!r}, which is damaged")
    return paths


def path_entry(paths: list[str]) -> str | list[str]:
    """Return paths as a source has them: a single one without a list."""
    return paths[0] if len(paths) == 1 else paths


def located(source: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return the source that the folder of a run or a study has recorded, with paths that exist.

    The longest end of a missing path that exists in the folder, or in one of those above it, takes
    its place: ``/old/data/text.txt`` may have become ``/new/data/text.txt``, where the run has
    moved to ``/new/runs/mine``. A path without such an end stays.

    Raises
    ------
    ValueError
        If what is recorded names no paths.
    """
    updated = dict(source)
    base = Path(os.path.realpath(folder))
    bases = [base, *list(base.parents)[:_LEVELS]]
    for key in (TEXT_PATH, VALIDATION_PATH):
        if paths := paths_of(source, key):
            updated[key] = path_entry([_moved(path, bases) for path in paths])
    return updated


def check_there(source: Mapping[str, Any], remedy: str) -> None:
    """Raise ``FileNotFoundError`` for a text that is not there, with what is to be done."""
    for key in (TEXT_PATH, VALIDATION_PATH):
        for path in paths_of(source, key):
            if not _leads(path):
                raise FileNotFoundError(errno.ENOENT, f"No such file or directory ({remedy})", path)


def _moved(path: str, bases: Sequence[Path]) -> str:
    """Return where a path leads to now, or itself."""
    if _leads(path):
        return path
    parts = Path(path).parts[1:]
    ends = (Path(*parts[first:]) for first in range(len(parts)))
    places = (str(base / end) for end in ends for base in bases)
    return next((place for place in places if _leads(place)), path)


def _is_pattern(path: str) -> bool:
    return any(sign in path for sign in "*?[")


def _leads(path: str) -> bool:
    """Whether a path leads to something; what is damaged is for others to tell."""
    if not path or "\0" in path or path == "-" or os.path.exists(path):
        return True
    # What a pattern matches may take a walk through everything.
    fixed = re.split(r"[^/]*[*?[]", path, maxsplit=1)[0]
    return _is_pattern(path) and os.path.isdir(fixed)
