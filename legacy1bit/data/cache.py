"""The cache of texts: their tokens, their tokenizers, and texts that came from pipes.

The folder has an entry for each: tokens in a folder named by a key, tokenizers in one named
``tokenizer-`` and a key, and below ``standard-input`` texts that can be read only once. A note in
each folder names its text, and the folder's time is that of its last use. Other files there are
left alone.
"""

import contextlib
import filecmp
import hashlib
import json
import os
import re
import shutil
import stat
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from legacy1bit.data.shards import default_cache
from legacy1bit.data.sources import STANDARD_INPUT, STREAMS, is_stream, standard_input
from legacy1bit.system.files import (
    atomic_write,
    read_regular,
    remove_left_behind,
    remove_unused,
    shared,
    temporaries,
    temporary_of,
)

NOTE_FILE = "about.json"
LIMIT_VARIABLE = "LEGACY1BIT_CACHE_GB"

# By default the cache may take one part in this number of its disk.
_DISK_PART = 10

TOKENS, TOKENIZER, TEXT, UNFINISHED = "tokens", "tokenizer", "text", "unfinished"
_FOLDERS = {TOKENS: re.compile("[0-9a-f]{32}"), TOKENIZER: re.compile("tokenizer-[0-9a-f]{32}")}
# The beginnings of the names of unfinished entries, in the folder and in that of texts.
_UNFINISHED = re.compile("[0-9a-f]{24,32}|tokenizer-[0-9a-f]{14,22}")
_STREAM = "stream"

_UNKNOWN = "unknown"


@dataclass(frozen=True)
class Entry:
    """An entry of a cache.

    Attributes
    ----------
    path : Path
    kind : {"tokens", "tokenizer", "text", "unfinished"}
        The last: a process is writing it, or was killed while it did.
    text : str
        The text it is made of.
    bytes : int
    used : float
        The time of its last use, in seconds since 1970.
    """

    path: Path
    kind: str
    text: str
    bytes: int
    used: float


def text_of(files: Sequence[Path]) -> str:
    """Return the name of a text of some files, with its folder."""
    if len(files) == 1:
        return str(files[0])
    return f"{os.path.commonpath(files)} ({len(files):,} files)" if files else "standard input"


def mark_used(folder: Path, text: str) -> None:
    """Record that an entry is used now, and its text, if the cache can be written."""
    with contextlib.suppress(OSError):
        if not (folder / NOTE_FILE).exists():
            atomic_write(folder / NOTE_FILE, json.dumps({"text": text}))
        os.utime(folder)


def entries(cache: Path) -> list[Entry]:
    """Return the entries of a cache, the most recently used first.

    Raises
    ------
    OSError
        If it cannot be read.
    """
    present = [_entry(path, kind) for path, kind in _paths(cache)]
    return sorted(filter(None, present), key=lambda entry: -entry.used)


def _paths(cache: Path) -> Iterator[tuple[Path, str]]:
    """Yield the paths of entries, and their kinds."""
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
    """Return the size limit of a cache in bytes: LEGACY1BIT_CACHE_GB, or a tenth of its disk.

    Raises
    ------
    ValueError
        If the variable is not a number of gigabytes.
    """
    wanted = os.environ.get(LIMIT_VARIABLE, "")
    if not wanted:
        existing = next(
            path for path in (cache.absolute(), *cache.absolute().parents) if path.exists()
        )
        return shutil.disk_usage(existing).total // _DISK_PART
    try:
        size = float(wanted)
    except ValueError:
        size = -1.0
    if not 0 <= size <= 1e9:
        raise ValueError(f"{LIMIT_VARIABLE} is {wanted!r}, expected gigabytes, as 20 or 0.5")
    return round(size * 1e9)


def trim(cache: Path, used: Path) -> None:
    """Remove the least recently used entries while a cache is above its limit.

    Entries that a process uses stay, and so does the one that is about to be used. Texts from pipes
    stay, too: they exist nowhere else, and a resumed run needs its text.

    Raises
    ------
    ValueError
        As for ``limit_of``.
    """
    most = limit_of(cache)
    present = entries(cache)
    total = sum(entry.bytes for entry in present)
    for entry in reversed(present):
        if total <= most:
            return
        # Entries of other users may not be removable.
        with contextlib.suppress(OSError):
            if entry.path != used and entry.kind != TEXT and remove_unused(entry.path):
                total -= entry.bytes


def clear(cache: Path, before: float) -> tuple[list[Entry], list[Entry]]:
    """Remove the entries that have not been used since a time, unless a process uses them.

    Returns
    -------
    removed, in_use : list of Entry

    Raises
    ------
    OSError
        If something cannot be removed.
    """
    removed: list[Entry] = []
    in_use: list[Entry] = []
    for entry in entries(cache):
        if entry.used <= before:
            (removed if remove_unused(entry.path) else in_use).append(entry)
    return removed, in_use


# --- Texts from pipes -----------------------------------------------------------------------------


def saved_streams(paths: Sequence[str], cache: Path | None = None) -> list[str]:
    """Return paths that can be read again: a stream is saved in the cache first, or the user's.

    Raises
    ------
    ValueError
        If a stream is empty, a device, or of a kind that cannot be read in order.
    OSError
        If the stream cannot be read, or the cache cannot be written.
    """
    return [
        _save_stream(cache or default_cache(), path) if is_stream(path) else path for path in paths
    ]


def _save_stream(cache: Path, path: str) -> str:
    if path == STANDARD_INPUT:
        return _save(cache, standard_input(), "standard input")
    if Path(path).suffix.lower() in (".bin", ".parquet"):
        raise ValueError(f"{path} is a stream, expected a file")
    with open(path, "rb") as stream:
        mode = os.fstat(stream.fileno()).st_mode
        if stat.S_ISBLK(mode) or (stat.S_ISCHR(mode) and not stream.isatty()):
            raise ValueError(f"{path} is a device, expected a file or a pipe")
        return _save(cache, stream, path)


def _save(cache: Path, stream: BinaryIO, name: str) -> str:
    folder = cache / STREAMS
    temporary = temporary_of(folder / _STREAM)
    digest = hashlib.sha256()
    try:
        with cache_errors(cache):
            folder.mkdir(parents=True, exist_ok=True)
            remove_left_behind(folder)
            file = open(temporary, "xb")  # noqa: SIM115
        with file, _in_use(temporary):
            while block := stream.read(1 << 20):
                digest.update(block)
                with cache_errors(cache):
                    file.write(block)
            with cache_errors(cache):
                file.flush()
                os.fsync(file.fileno())
        if temporary.stat().st_size == 0:
            raise ValueError(f"{name} is empty, expected text")
        # Without a suffix, its beginning says what it is.
        path = folder / digest.hexdigest()[:16]
        # The same text keeps its file with its time, and so its tokens.
        if not (path.exists() and filecmp.cmp(temporary, path, shallow=False)):
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    return str(path)


@contextlib.contextmanager
def _in_use(path: Path) -> Iterator[None]:
    """Protect a file that is being written from being removed as one that was left behind."""
    handle = shared(path)
    try:
        yield
    finally:
        os.close(handle)


def hold_streams(user: object, files: Iterable[Path], cache: Path) -> None:
    """Mark those of some files that came from pipes as in use, as long as an object exists."""
    folder = (cache / STREAMS).resolve()
    for path in files:
        if path.parent == folder:
            weakref.finalize(user, os.close, shared(path))


@contextlib.contextmanager
def cache_errors(cache: Path) -> Iterator[None]:
    """Name the cache, and the option for another one, in errors that concern its files."""
    try:
        yield
    except OSError as error:
        path = cache if error.filename is None else Path(error.filename)
        if not (path.is_relative_to(cache) or cache.is_relative_to(path)):
            raise
        reason = f"{error.strerror} (the cache of tokens; --cache names another folder)"
        raise OSError(error.errno, reason, str(cache)) from None
