"""What is kept of texts, so that the next run finds it: tokens, tokenizers, and what pipes carried.

The folder has an entry for each: tokens in a folder called by a key, tokenizers in one called
``tokenizer-`` and a key, and below ``standard-input`` texts that came once only. A note in each
folder tells which text it is of, and its time when it was used last. Whatever else lies there is
not ours.
"""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from legacy1bit.system.files import atomic_write, read_regular, remove_unused, temporaries

NOTE_FILE = "about.json"
STREAMS = "standard-input"
LIMIT_VARIABLE = "LEGACY1BIT_CACHE_GB"

# Tokens may have this share of the disk where nothing else is said.
_SHARE = 10

TOKENS, TOKENIZER, TEXT, UNFINISHED = "tokens", "tokenizer", "text", "unfinished"
_FOLDERS = {TOKENS: re.compile("[0-9a-f]{32}"), TOKENIZER: re.compile("tokenizer-[0-9a-f]{32}")}
# How the names begin of what is written into the folder, and into that of texts.
_UNFINISHED = re.compile("[0-9a-f]{24}|tokenizer-[0-9a-f]{14}")
_STREAM = "stream"

_UNKNOWN = "unknown"


@dataclass(frozen=True)
class Entry:
    """What is kept of a text.

    Attributes
    ----------
    path : Path
    kind : {"tokens", "tokenizer", "text", "unfinished"}
        The last: a process is writing it, or was killed while it did.
    text : str
        Which text it is of.
    bytes : int
    used : float
        When it was used last, in seconds since 1970.
    """

    path: Path
    kind: str
    text: str
    bytes: int
    used: float


def text_of(files: Sequence[Path]) -> str:
    """Return what to call a text of some files, in a way that tells where it lies."""
    if len(files) == 1:
        return str(files[0])
    return f"{os.path.commonpath(files)} ({len(files):,} files)" if files else "standard input"


def mark_used(folder: Path, text: str) -> None:
    """Say that an entry is used now, and of which text it is, as far as it can be written."""
    with contextlib.suppress(OSError):
        if not (folder / NOTE_FILE).exists():
            atomic_write(folder / NOTE_FILE, json.dumps({"text": text}))
        os.utime(folder)


def entries(cache: Path) -> list[Entry]:
    """Return what a cache has, what was used last first.

    Raises
    ------
    OSError
        If it cannot be read.
    """
    present = [_entry(path, kind) for path, kind in _places(cache)]
    return sorted(filter(None, present), key=lambda entry: -entry.used)


def _places(cache: Path) -> Iterator[tuple[Path, str]]:
    """Yield the places of entries, and their kinds."""
    if not cache.exists():
        return
    for path in cache.iterdir():
        for kind, form in _FOLDERS.items():
            if form.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
                yield path, kind
    for path, name in temporaries(cache):
        if _UNFINISHED.fullmatch(name):
            yield path, UNFINISHED
    streams = cache / STREAMS
    if streams.is_dir() and not streams.is_symlink():
        for path in streams.iterdir():
            if path.name[0] != "." and path.is_file():
                yield path, TEXT
        yield from ((path, UNFINISHED) for path, name in temporaries(streams) if name == _STREAM)


def _entry(path: Path, kind: str) -> Entry | None:
    """Return an entry, or None if it has been removed meanwhile."""
    try:
        status = path.stat()
        files = list(path.iterdir()) if path.is_dir() else [path]
        size = sum(file.stat().st_size for file in files)
    except FileNotFoundError:
        return None
    # The time of a text is that of its tokens, too.
    used = max(status.st_atime, status.st_mtime) if kind == TEXT else status.st_mtime
    text = f"standard input, {path.stem}" if kind == TEXT else _noted(path)
    return Entry(path, kind, text, size, used)


def _noted(folder: Path) -> str:
    try:
        text = json.loads(read_regular(folder / NOTE_FILE))["text"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return _UNKNOWN
    if not isinstance(text, str):
        return _UNKNOWN
    path = Path(text)
    came_once = path.parent == folder.parent.resolve() / STREAMS
    return f"standard input, {path.stem}" if came_once else text


def limit_of(cache: Path) -> int:
    """Return how many bytes a cache may have: LEGACY1BIT_CACHE_GB, or a tenth of its disk.

    Raises
    ------
    ValueError
        If the variable is not a number of gigabytes.
    """
    wanted = os.environ.get(LIMIT_VARIABLE, "")
    if not wanted:
        place = next(
            path for path in (cache.absolute(), *cache.absolute().parents) if path.exists()
        )
        return shutil.disk_usage(place).total // _SHARE
    try:
        size = float(wanted)
    except ValueError:
        size = -1.0
    if not 0 <= size <= 1e9:
        raise ValueError(f"{LIMIT_VARIABLE} is {wanted!r}, expected gigabytes, as 20 or 0.5")
    return round(size * 1e9)


def trim(cache: Path, used: Path) -> None:
    """Remove what was used longest ago while a cache has more bytes than it may.

    What a process uses stays, and so does the entry that is about to be used. Texts that pipes have
    carried stay, too: they are nowhere else, and a run that goes on needs its text.

    Raises
    ------
    ValueError
        As for ``limit_of``.
    """
    most = limit_of(cache)
    there = entries(cache)
    total = sum(entry.bytes for entry in there)
    for entry in reversed(there):
        if total <= most:
            return
        # What others have written may be theirs alone to remove.
        with contextlib.suppress(OSError):
            if entry.path != used and entry.kind != TEXT and remove_unused(entry.path):
                total -= entry.bytes


def clear(cache: Path, before: float) -> tuple[list[Entry], list[Entry]]:
    """Remove what has not been used since a time, unless a process uses it.

    Returns
    -------
    removed, kept : list of Entry
        The second: what is in use.

    Raises
    ------
    OSError
        If something cannot be removed.
    """
    removed: list[Entry] = []
    kept: list[Entry] = []
    for entry in entries(cache):
        if entry.used <= before:
            (removed if remove_unused(entry.path) else kept).append(entry)
    return removed, kept
