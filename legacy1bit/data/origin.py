"""Where a corpus comes from: stories, a text, tokens, or a mix of texts; as options name it and
runs record it.

A run records the absolute paths of its texts, and their hash, which is checked wherever they are
read from: so a run is resumed after it has moved together with its texts.
"""

import enum
import errno
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from legacy1bit.data.shards import INDEX_FILE
from legacy1bit.data.sources import is_stream, is_token_file, text_name
from legacy1bit.data.tokenizer import TOKENIZER_FILE
from legacy1bit.system.errors import SettingError, format_value

STORIES = "stories"
MOST_STORIES = 10_000_000

# The keys of a record that name texts, by a path or by several.
TEXT_PATH, VALIDATION_PATH = "path", "validation"
# The key of the records of texts that are mixed, and in each the key of its weight.
MIXED, WEIGHT = "texts", "weight"
MOST_WEIGHT = 1e9

# How many folders above a run are searched for its text: `best` lies one deeper than the run.
_LEVELS = 3

# A name lists at most this number of texts.
_MOST_NAMES = 3


class TextChanged(ValueError):
    """A text is not the recorded one."""


class Kind(enum.Enum):
    """The kinds of corpora; each is opened in its own way."""

    STORIES = "the stories"
    TEXT = "a text"
    TOKEN_FILE = "a file of tokens"
    TOKEN_FOLDER = "a folder of tokens"
    MIX = "several texts with weights"
    UNKNOWN = "an unknown origin"


@dataclass(frozen=True)
class DataOrigin:
    """Where a corpus comes from.

    Attributes
    ----------
    name : str
        "stories" for the bundled ones; else the names of the texts.
    paths, validation_paths : tuple of str
        The text, and a separate one to validate on; none for the stories.
    stories, seed : int or None
        The number of stories to train on, and the seed they are generated from.
    sha256 : str or None
        The hash of the text, once it was read; None for the stories.
    texts : tuple of DataOrigin
        The texts that are mixed, each with its weight and a name of its own; two or more, or none.
    weight : float or None
        Of a text in a mix: its fraction of the sequences, over those of the others.
    """

    name: str
    paths: tuple[str, ...] = ()
    validation_paths: tuple[str, ...] = ()
    stories: int | None = None
    seed: int | None = None
    sha256: str | None = None
    texts: tuple["DataOrigin", ...] = ()
    weight: float | None = None

    @classmethod
    def of_stories(cls, count: int, seed: int) -> "DataOrigin":
        """Return the origin of bundled stories."""
        return cls(STORIES, stories=count, seed=seed)

    @classmethod
    def of_texts(cls, paths: Sequence[str], validation_paths: Sequence[str] = ()) -> "DataOrigin":
        """Return the origin of texts or tokens, by their absolute paths."""
        names = [text_name(Path(path)) for path in paths]
        if len(names) > _MOST_NAMES:
            names[_MOST_NAMES:] = ["..."]
        return cls(" + ".join(names), tuple(paths), tuple(validation_paths))

    @classmethod
    def of_mix(cls, texts: Sequence["DataOrigin"]) -> "DataOrigin":
        """Return the origin of several texts that are mixed; each has its weight."""
        named: dict[str, DataOrigin] = {}
        for text in texts:
            name, number = text.name, 1
            while name in named:
                number += 1
                name = f"{text.name} ({number})"
            named[name] = replace(text, name=name)
        names = [f"{name}:{text.weight:g}" for name, text in named.items()]
        return cls(" + ".join(names), texts=tuple(named.values()))

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> "DataOrigin":
        """Return the origin that a run or a study has recorded.

        Raises
        ------
        ValueError
            If the record is damaged.
        """
        paths, validation = paths_of(record, TEXT_PATH), paths_of(record, VALIDATION_PATH)
        required: dict[str, type] = {"name": str}
        texts = _records_of(record)
        for text in texts:
            check_weight(text.get(WEIGHT))
        if is_stories(record):
            required |= {"stories": int, "seed": int}
        for key, kind in required.items():
            if type(record.get(key)) is not kind:
                raise ValueError(
                    f"the recorded source has {key} {record.get(key)!r}, which is damaged"
                )
        return cls(
            record["name"],
            tuple(paths),
            tuple(validation),
            **{key: record.get(key) for key in ("stories", "seed", "sha256", WEIGHT)},
            texts=tuple(map(cls.from_dict, texts)),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the origin as runs and studies record it."""
        record: dict[str, Any] = {"name": self.name}
        if self.paths:
            record[TEXT_PATH] = _path_entry(self.paths)
            record[VALIDATION_PATH] = _path_entry(self.validation_paths)
        if self.texts:
            record[MIXED] = [text.to_dict() for text in self.texts]
        optional = {key: getattr(self, key) for key in ("stories", "seed", "sha256", WEIGHT)}
        return record | {key: value for key, value in optional.items() if value is not None}

    @property
    def kind(self) -> Kind:
        """The kind of corpus, as the paths and the folders they lead to say."""
        if self.texts:
            return Kind.MIX
        if not self.paths:
            return Kind.STORIES if self.name == STORIES else Kind.UNKNOWN
        if len(self.paths) == 1 and _is_token_folder(self.paths[0]):
            return Kind.TOKEN_FOLDER
        single = max(len(self.paths), len(self.validation_paths)) == 1
        return Kind.TOKEN_FILE if single and is_token_file(self.paths[0]) else Kind.TEXT

    def check(self) -> None:
        """Raise ``ValueError`` for an origin from which no corpus can be opened again."""
        self.check_path()
        for text in self.texts:
            text.check()
        if self.kind is Kind.STORIES and not 1 <= (self.stories or 0) <= MOST_STORIES:
            raise SettingError(
                f"stories is {self.stories}, expected 1 to {MOST_STORIES}", "stories"
            )
        for key, paths in ((TEXT_PATH, self.paths), (VALIDATION_PATH, self.validation_paths)):
            for path in paths:
                if not path or "\0" in path or is_stream(path):
                    raise ValueError(
                        f"the recorded source has {key} {path!r}, expected a file or a folder"
                    )
        for path in self.validation_paths:
            if is_token_file(path) != is_token_file(self.paths[0]):
                raise ValueError(
                    f"of {self.paths[0]} and {path} one holds tokens, the other one text"
                )
        if self.kind is Kind.TOKEN_FOLDER and self.validation_paths:
            raise ValueError("--validation goes with a text, and not with a folder of tokens")

    def check_path(self) -> None:
        """Raise ``ValueError`` for the text of a program, which has no path."""
        if self.kind is Kind.UNKNOWN:
            raise ValueError(
                f"the run's text was given by a program, as {self.name!r} and without a path: "
                "evaluate --data PATH and train --config RUN --data PATH take one"
            )

    def check_there(self, remedy: str) -> None:
        """Raise ``FileNotFoundError``, with a remedy, for a text that does not exist."""
        for text in self.texts:
            text.check_there(remedy)
        for path in (*self.paths, *self.validation_paths):
            if not _exists(path):
                raise FileNotFoundError(errno.ENOENT, f"No such file or directory ({remedy})", path)

    def with_hash(self, sha256: str) -> "DataOrigin":
        """Return the origin with the hash of its text, which is compared with a recorded one.

        Raises
        ------
        TextChanged
            If it is another one.
        """
        if self.sha256 not in (None, sha256):
            several = len(self.paths) + len(self.validation_paths) > 1
            whose = "its SHA-256" + (" with the others'" if several else "")
            raise TextChanged(
                f"{next(iter(self.paths), self.name)} has changed, or is another text: {whose} is "
                f"{sha256}, expected {self.sha256}"
            )
        return replace(self, sha256=sha256)


def check_weight(weight: object) -> None:
    """Raise ``ValueError`` unless it is the weight of a text."""
    number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
    if not (number and 0 < weight <= MOST_WEIGHT):  # type: ignore[operator]
        raise ValueError(
            f"the weight of a text is {format_value(weight)}, expected a number above 0, at most "
            f"{MOST_WEIGHT:,.0f}"
        )


def _records_of(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the records of the texts of a mix; none of anything else.

    Raises
    ------
    ValueError
        If the record is damaged.
    """
    texts = record.get(MIXED, [])
    # Of strangers' files: no mix has mixes in it.
    if not isinstance(texts, list) or any(
        not isinstance(text, dict) or MIXED in text or TEXT_PATH not in text for text in texts
    ):
        raise ValueError(f"the recorded source has {MIXED} that are damaged")
    return texts


def without_paths(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the record of a run without what may change: where its texts are."""
    kept = {key: v for key, v in record.items() if key not in (TEXT_PATH, VALIDATION_PATH)}
    if MIXED in record:
        kept[MIXED] = [without_paths(text) for text in _records_of(record)]
    return kept


def is_stories(record: Mapping[str, Any]) -> bool:
    """Whether a record is that of the bundled stories: a text may have their name, and a path."""
    return record.get("name") == STORIES and TEXT_PATH not in record


def paths_of(record: Mapping[str, Any], key: str) -> list[str]:
    """Return the paths of a run's text, or of its validation text; none if it has none.

    Raises
    ------
    ValueError
        If the record is damaged.
    """
    value = record.get(key)
    if value is None:
        return []
    paths = value if isinstance(value, list) and value else [value]
    for path in paths:
        if not isinstance(path, str):
            raise ValueError(f"the recorded source has {key} {value!r}, which is damaged")
    return paths


def _path_entry(paths: Sequence[str]) -> str | list[str] | None:
    """Return paths as a record has them: a single one without a list."""
    return list(paths) if len(paths) > 1 else next(iter(paths), None)


def located(record: Mapping[str, Any], folder: Path, others: Sequence[str] = ()) -> dict[str, Any]:
    """Return the record of a run or a study, in its folder, with paths that exist.

    The longest end of a missing path that exists in the folder, or in one of those above it, takes
    its place: ``/old/data/text.txt`` may have become ``/new/data/text.txt``, where the run has
    moved to ``/new/runs/mine``. A path without such an end stays. ``others`` are keys of further
    paths.

    Raises
    ------
    ValueError
        If the record is damaged.
    """
    updated = dict(record)
    base = Path(os.path.realpath(folder))
    bases = [base, *list(base.parents)[:_LEVELS]]
    for key in (TEXT_PATH, VALIDATION_PATH, *others):
        if paths := paths_of(record, key):
            updated[key] = _path_entry([_located(path, bases) for path in paths])
    if MIXED in record:
        updated[MIXED] = [located(text, folder) for text in _records_of(record)]
    return updated


def _located(path: str, bases: Sequence[Path]) -> str:
    """Return where a path leads to now, or itself."""
    if _exists(path):
        return path
    parts = Path(path).parts[1:]
    ends = (Path(*parts[first:]) for first in range(len(parts)))
    candidates = (str(base / end) for end in ends for base in bases)
    return next((candidate for candidate in candidates if _exists(candidate)), path)


def _exists(path: str) -> bool:
    """Whether a path leads to something; a damaged one is left to ``DataOrigin.check``."""
    if not path or "\0" in path or path == "-" or os.path.exists(path):
        return True
    # Expanding a pattern may mean a walk through everything.
    fixed = re.split(r"[^/]*[*?[]", path, maxsplit=1)[0]
    return any(sign in path for sign in "*?[") and os.path.isdir(fixed)


def _is_token_folder(path: str) -> bool:
    """Whether a path is that of a folder that ``data tokenize`` has written."""
    return all((Path(path) / name).is_file() for name in (INDEX_FILE, TOKENIZER_FILE))
