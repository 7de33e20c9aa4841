"""Text from wherever it lies, as a stream: files, folders, patterns, pipes; compressed or not.

Documents come in pieces of about a mebibyte, so that a corpus of any size is read in little memory.
Text is checked on its way, and leaves as UTF-8. Files of token ids, which other programs prepare,
are read here, too.
"""

import codecs
import contextlib
import dataclasses
import errno
import glob
import gzip
import hashlib
import importlib
import io
import itertools
import json
import os
import re
import shlex
import stat
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

import numpy as np

from legacy1bit.data.chats import (
    JSON_KINDS,
    MESSAGES,
    Message,
    is_conversation,
    messages_of,
    text_of,
)
from legacy1bit.data.shards import IntegerFile
from legacy1bit.data_utils import with_line_breaks
from legacy1bit.logger import is_run
from legacy1bit.system.errors import SettingError
from legacy1bit.system.files import HEAD_BYTES, HTML_PAGE, kind_of_file
from legacy1bit.system.old_cpus import runs_here

STANDARD_INPUT = "-"
# The folder of the cache with the texts of streams, each in a file named by its hash.
STREAMS = "standard-input"

# The field of a JSON line that has the text, where nothing else is said.
DEFAULT_FIELD = "text"

# How much is read, or decompressed, at once.
BLOCK_BYTES = 1 << 20
# A longer document is cut into pieces of at most this size ...
PIECE_BYTES = 1 << 20
# ... unless there is no place to cut it at: then a piece grows up to this.
MOST_PIECE_BYTES = 16 << 20
# A line of JSON has to be in memory as a whole, about four times over.
MOST_LINE_BYTES = 256 << 20
# Text beyond ASCII is checked in parts of this size; at least a character's four bytes.
CHECKED_BYTES = 1 << 16
# Places to cut at are searched from the end, in windows of this size.
WINDOW_BYTES = 1 << 12
# A text whose name tells nothing is JSON lines if its first line is, and is no longer than this.
FIRST_LINE_BYTES = 16 << 20
# What a decompressor may take: the windows of zstd -19 and xz -9 are half of that or less.
MOST_WINDOW_BYTES = 1 << 27
# Four bytes of Zstandard can hold a block of 128 KiB: no more than 4 MiB come out of this many.
ZSTD_BYTES = 128
# Rows of Parquet read at once; texts of some pages make it a mebibyte.
BATCH_ROWS = 64

# Of several paths, the names that are part of the text's.
_MOST_NAMES = 3

# How compressed files begin, and what follows that in no text.
_COMPRESSED = {
    ".gz": (b"\x1f\x8b\x08", b""),
    ".zst": (b"\x28\xb5\x2f\xfd", b""),
    ".xz": (b"\xfd7zXZ\0", b""),
    ".bz2": (b"BZh", rb"[1-9](?:1AY&SY|\x17rE8P\x90)"),
}
_UNPACK = {".gz": "gzip -dc", ".zst": "zstd -dc", ".xz": "xz -dc", ".bz2": "bzip2 -dc"}
_JSON_LINES = (".jsonl", ".ndjson")
_PLAIN = (".txt", ".md", ".text")
_PARQUET = ".parquet"
# What a folder is searched for; all but Parquet may be compressed.
_KNOWN = (*_PLAIN, *_JSON_LINES, _PARQUET)
_HTML = (".html", ".htm", ".xhtml")

_UTF8_MARK = codecs.BOM_UTF8
# UTF-32's in little-endian order begins with UTF-16's.
_OTHER_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}

# Printable bytes that are no space, the two bytes to cut before, all others.
_PRINTABLE, _SPACE = b"x", b" "
_CLASSES = bytes(
    _PRINTABLE[0] if 0x21 <= byte <= 0x7E else _SPACE[0] if byte in b" \n" else 0
    for byte in range(256)
)

# A document's beginning, or what follows of it.
_Part = tuple[bool, bytes]


@dataclass(frozen=True)
class Piece:
    """Some text of a document.

    Attributes
    ----------
    text : bytes
        UTF-8, whole characters; never empty unless the document is.
    begins : bool
        Whether a document begins here.
    """

    text: bytes
    begins: bool


class _Stream:
    """What a source that can be read once remembers: whether it was, and a name like no other."""

    def __init__(self) -> None:
        self.begun = False
        self.token = os.urandom(16).hex()


@dataclass(frozen=True)
class Source:
    """The text that ``open_source`` returns; nothing is read before ``pieces`` is.

    Attributes
    ----------
    files : tuple of Path
        Absolute, and sorted if one path means them all; none for standard input. A link keeps its
        own name, which tells what kind of file it is.
    name : str
        What to call it in front of people: a file's name, or "data/*.txt (12 files)".
    field : str
        Which field of a JSON line, or column of a Parquet file, has the text.
    encoding : str
        As ``codecs`` spells it.
    separator : str or None
        What lies between the documents of a plain text, line breaks as ``\\n``; each file is one
        where None.
    """

    files: tuple[Path, ...]
    name: str
    field: str = "text"
    encoding: str = "utf-8"
    separator: str | None = None
    _stream: _Stream = dataclasses.field(
        default_factory=_Stream, init=False, repr=False, compare=False
    )

    def __getstate__(self) -> dict[str, Any]:
        if self._is_stream():
            raise TypeError(f"{self.name} is a stream, and cannot be copied or pickled")
        return self.__dict__

    def pieces(self) -> Iterator[Piece]:
        """Go through the text once.

        A document of more than ``PIECE_BYTES`` comes in several pieces. It is cut before a space or
        line break that follows a printable ASCII character, where GPT-2's regular expression would
        part words anyway (Radford et al. 2019, ``encoder.py``): so the words of the pieces are the
        words of the document. Where there is no such place in ``MOST_PIECE_BYTES``, it is cut
        between any two characters.

        Yields
        ------
        Piece

        Raises
        ------
        OSError
            If a file cannot be read.
        ValueError
            If a file is damaged, not the text it should be, or changes meanwhile; if a stream is
            read twice; at the end, if there was no text at all.
        """
        if self._is_stream():
            if self._stream.begun:
                raise ValueError(f"{self.name} is a stream, which can be read only once")
            self._stream.begun = True
        any_text = False
        for piece in self._read():
            any_text = any_text or bool(piece.text)
            yield piece
        if not any_text:
            raise ValueError(f"{self.name} holds no text")

    def fingerprint(self) -> str:
        """Return a SHA-256 in hexadecimal digits that changes when a file or an option does.

        It knows files by path and by what the system knows of them, and reads none: a file that
        takes another's place, with the same size and time, has another inode, and one that is
        written over has another time of change, which no program can set. A stream's is like no
        other's, as nobody knows what it will carry.

        Raises
        ------
        OSError
            If a file is not there any more.
        """
        is_stream = self._is_stream()
        files = () if is_stream else self.files
        known = {
            "files": [(str(path), *_state(os.stat(path))) for path in files],
            "field": self.field,
            "encoding": self.encoding,
            "separator": self.separator,
            "stream": self._stream.token if is_stream else None,
        }
        return hashlib.sha256(json.dumps(known).encode()).hexdigest()

    @property
    def nbytes(self) -> int:
        """The sizes of the files on the disk, added up; a stream has none."""
        return sum(os.stat(path).st_size for path in self.files)

    @property
    def has_documents(self) -> bool:
        """Whether there may be more than one document.

        Raises
        ------
        OSError, ValueError
            If the text's name does not tell, and its beginning cannot be read.
        """
        if len(self.files) > 1 or self.separator is not None:
            return True
        if self._is_stream():
            return any(_holds_rows(path.name) for path in self.files)
        (path,) = self.files
        if _holds_rows(path.name) or not _may_hold_rows(path.name) or not self.nbytes:
            return _holds_rows(path.name)
        with open(path, "rb") as file:
            return self._rows_or_text(_Input(file), str(path), path.name)[0]

    @property
    def has_chats(self) -> bool:
        """Whether its documents are conversations, as the first file's first one says.

        Raises
        ------
        OSError, ValueError
            If the beginning of the text cannot be read.
        """
        if self._is_stream() or self.field not in (DEFAULT_FIELD, MESSAGES):
            return False
        path = self.files[0]
        if path.suffix.lower() == _PARQUET or not _may_hold_rows(path.name) or not self.nbytes:
            return False
        with open(path, "rb") as file:
            has_rows, blocks = self._rows_or_text(_Input(file), str(path), path.name)
            if not has_rows:
                return False
            # What is damaged is told where it is read.
            with contextlib.suppress(ValueError):
                for _, record in _json_records(blocks, str(path)):
                    return is_conversation(record, self.field, DEFAULT_FIELD)
        return False

    def conversations(self) -> Iterator[tuple[str, list[Message]]]:
        """Go through the conversations once: where each is, for errors, and its messages.

        Raises
        ------
        OSError, ValueError
            As ``pieces``, and if a record is no conversation.
        """
        for path in self.files:
            with _opened(path) as file:
                has_rows, blocks = self._rows_or_text(file, str(path), path.name)
                if not has_rows:
                    raise ValueError(
                        f"{path} is not JSON lines, expected conversations as in {self.files[0]}"
                    )
                for where, record in _json_records(blocks, str(path)):
                    yield where, messages_of(record, where)

    def warnings(self, documents: int) -> tuple[str, ...]:
        """Return lines about a text that was read: on its separator, and on JSON taken for text.

        Parameters
        ----------
        documents : int
            The number of its documents.

        Raises
        ------
        OSError, ValueError
            If it cannot be read any more.
        """
        return tuple(filter(None, (self._warning_of_separator(documents), self._warning_of_json())))

    def _warning_of_json(self) -> str | None:
        """Return a warning if the first file called .json holds JSON, but not lines of objects."""
        path = next((one for one in self.files if _parted(one.name)[0].endswith(".json")), None)
        if path is None or self._is_stream():
            return None
        with open(path, "rb") as file:
            has_rows, blocks = self._rows_or_text(_Input(file), str(path), path.name)
            if has_rows or not re.match(rb"\s*[{\[]", next(blocks, b"")):
                return None
        return (
            f"warning: {path.name} is JSON without an object on each line: its brackets, names and "
            "numbers are read as text (jq -c . makes lines of objects)"
        )

    def _warning_of_separator(self, documents: int) -> str | None:
        """Return a warning if the separator separates nothing."""
        if self.separator is None:
            return None
        if self.files and all(_holds_rows(path.name) for path in self.files):
            return f"warning: the separator is for plain text, and {self.name} has none"
        if documents > max(len(self.files), 1):
            return None
        count = "1 document" if documents == 1 else f"{documents:,} documents"
        return (
            f"warning: the separator {self.separator!r} separates nothing in {self.name}: {count}"
        )

    def _is_stream(self) -> bool:
        # Of several files, none is a stream: only what is named directly may be one.
        return not self.files or (len(self.files) == 1 and not _is_regular(self.files[0]))

    def _read(self) -> Iterator[Piece]:
        if not self.files:
            yield from _cut(self._documents(_Input(standard_input()), self.name, ""))
        for path in self.files:
            with _opened(path) as file:
                if path.suffix.lower() == _PARQUET:
                    yield from _cut(_parquet_documents(file, path, self.field))
                else:
                    yield from _cut(self._documents(file, str(path), path.name))

    def _documents(self, file: "_Input", path: str, name: str) -> Iterator[_Part]:
        has_rows, blocks = self._rows_or_text(file, path, name)
        if has_rows and self.has_chats:
            records = _json_records(blocks, path)
            return ((True, text_of(messages_of(record, where))) for where, record in records)
        if has_rows:
            return _json_documents(blocks, path, self.field)
        if self.field != DEFAULT_FIELD and not any(_holds_rows(path.name) for path in self.files):
            raise _no_fields(path, self.field)
        if self.separator is None:
            return _one_document(blocks)
        return _separated(blocks, self.separator.encode())

    def _rows_or_text(self, file: "_Input", path: str, name: str) -> tuple[bool, Iterator[bytes]]:
        """Return whether a file has JSON lines, and what is in it, as UTF-8."""
        stem, compression = _parted(name)
        compression = _compression_of(file, compression)
        blocks = _decompressed(file, path, compression)
        head, blocks = _peek(blocks, lambda head: len(head) >= HEAD_BYTES)
        if kind := kind_of_file(head):
            # One page among many texts may be meant; the only one is what came for a text.
            meant = stem.endswith(_HTML) or (len(self.files) > 1 and not stem.endswith(_JSON_LINES))
            if kind is not HTML_PAGE or not meant:
                hint = "; .html at its name's end means the page itself" * (kind is HTML_PAGE)
                raise ValueError(f"{path} holds {kind.name}, expected text: {kind.remedy}{hint}")
        blocks = _in_utf8(blocks, path, self.encoding)
        if stem.endswith(_PLAIN):
            return False, blocks
        head, blocks = _peek(blocks, _has_first_line)
        of_objects = re.match(rb'\s*\[\s*\{\s*"', head)
        # A list of words in brackets may begin a text that is no JSON.
        if of_objects or (stem.endswith(".json") and re.match(rb'\s*\[\s*"', head)):
            command = "jq -c '.[]'" if of_objects else "jq -c '.[] | {text: .}'"
            if compression:
                command = f"{_UNPACK[compression]} {shlex.quote(path)} | {command}"
            else:
                command = f"{command} {shlex.quote(path)}"
            raise ValueError(
                f"{path} holds one JSON list, expected an object on each line: "
                f"{command} > lines.jsonl; .txt at its name's end means the list as text"
            )
        return stem.endswith(_JSON_LINES) or _begins_with_object(head), blocks


def _parted(name: str) -> tuple[str, str]:
    """Return a file's name without the suffix that says how it is compressed, and that suffix."""
    stem, last = os.path.splitext(name.lower())
    return (stem, last) if last in _COMPRESSED else (name.lower(), "")


def _holds_rows(name: str) -> bool:
    """Whether a file has a document per line or row, by its name."""
    return _parted(name)[0].endswith((*_JSON_LINES, _PARQUET))


def _may_hold_rows(name: str) -> bool:
    """Whether a file's name leaves that open, or says so."""
    return not _parted(name)[0].endswith(_PLAIN)


def _no_fields(name: str, field: str) -> ValueError:
    return ValueError(f"{name} has no fields, and no {field!r}: expected JSON lines or Parquet")


def _peek(
    blocks: Iterator[bytes], enough: Callable[[bytes], bool]
) -> tuple[bytes, Iterator[bytes]]:
    """Return what blocks begin with, up to the first that makes it enough, and all of them."""
    held: list[bytes] = []
    head = b""
    for block in blocks:
        held.append(block)
        head += block
        if enough(head):
            break
    return head, itertools.chain(held, blocks)


def _has_first_line(head: bytes) -> bool:
    """Whether this much of a text tells whether it begins with an object or a list of JSON."""
    text = head.lstrip()
    if len(head) > FIRST_LINE_BYTES:
        return True
    if text.startswith(b"{"):
        return b"\n" in text
    # A list of objects has the first one's first name soon.
    return bool(text) and (not text.startswith(b"[") or len(text) >= 64)


def _begins_with_object(head: bytes) -> bool:
    line = head.lstrip().partition(b"\n")[0]
    if not line.startswith(b"{") or len(line) > FIRST_LINE_BYTES:
        return False
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def open_source(
    data: str | Sequence[str],
    field: str = DEFAULT_FIELD,
    encoding: str = "utf-8",
    separator: str | None = None,
) -> Source:
    """Find the text that a user points at.

    Parameters
    ----------
    data : str or sequence of str
        A file; a folder, for all files below it with a known suffix (.txt, .md, .text, .jsonl,
        .ndjson, each also with .gz, .zst, .xz or .bz2 behind it; .parquet), leaving out hidden ones
        and runs; a pattern such as "data/**/*.txt", for all files that match; "-" for standard
        input. Any other file that is named, or matches, is JSON lines if it begins with an object
        on a line, and plain text otherwise. What is there goes before a pattern.
        Several of these, but no pipes, are read one after the other, and no file twice.
    field : str, optional
        Which field of a JSON line, or column of a Parquet file, has the text; "messages": it has a
        conversation, as lines without a "text" may have, too.
    encoding : str, optional
        Of plain text and JSON lines. A byte order mark is dropped.
    separator : str, optional
        What lies between the documents of a plain text, and belongs to none; ``\\n`` in it is a
        line break, of Windows (``\\r\\n``), too. Empty documents are dropped. Without one, each
        file is a document.

    Raises
    ------
    FileNotFoundError
        If there is no such file, or none in the folder, or none that matches.
    OSError
        If a folder cannot be read.
    ValueError
        If the encoding is unknown, the separator empty, or a library is missing; if a pipe or
        tokens are among several paths.
    """
    encoding = _known_encoding(encoding)
    if separator is not None:
        separator = with_line_breaks(separator).replace("\r\n", "\n")
        _check_separator(separator)
    files, name = _find(data) if isinstance(data, str) else _find_several(data)
    for path in files:
        _check_suffix(path)
        if library := _LIBRARIES.get(path.suffix.lower()):
            library()
    if field != DEFAULT_FIELD and files and not any(_may_hold_rows(path.name) for path in files):
        raise _no_fields(name, field)
    return Source(files, name, field, encoding, separator)


def _check_suffix(path: Path) -> None:
    """Raise ``ValueError`` for a file that has to be decompressed before it can be read."""
    stem, compression = _parted(path.name)
    quoted = shlex.quote(str(path))
    if stem.endswith(".lzma"):
        raise ValueError(
            f"{path} is compressed by an earlier form of xz, which is not read: "
            f"xz -dc {quoted} | legacy1bit train --data -"
        )
    if compression and is_token_file(stem):
        raise ValueError(
            f"{path} holds compressed tokens, expected a file of tokens: "
            f"{_UNPACK[compression]} {quoted} > {shlex.quote(stem)}"
        )


def _known_encoding(encoding: str) -> str:
    try:
        codec = codecs.lookup(encoding)
        # Some codecs turn bytes into bytes, which this refuses.
        "".encode(codec.name)
    except (LookupError, ValueError):
        codec = None
    if codec is None or codec.incrementaldecoder is None:
        raise SettingError(
            f"encoding is {encoding!r}, which is unknown; expected utf-8, utf-16, latin-1 or such",
            "encoding",
        )
    return "utf-8" if codec.name == "utf-8-sig" else codec.name


def _check_separator(separator: str) -> None:
    if not separator:
        raise SettingError(
            "separator is empty, expected what lies between two documents", "separator"
        )
    try:
        separator.encode()
    except UnicodeEncodeError:
        raise SettingError(f"separator is {separator!r}, which is not text", "separator") from None


# --- Finding files --------------------------------------------------------------------------------


def _find(data: str) -> tuple[tuple[Path, ...], str]:
    """Return the files that are meant, and what to call them."""
    if data == STANDARD_INPUT:
        return (), "standard input"
    try:
        mode = os.stat(data).st_mode
    except (FileNotFoundError, NotADirectoryError):
        if not any(sign in data for sign in "*?["):
            raise
        matches = [path for path in map(Path, glob.iglob(data, recursive=True)) if path.is_file()]
        if not matches:
            raise FileNotFoundError(errno.ENOENT, "No file matches", data) from None
    else:
        if not stat.S_ISDIR(mode):
            path = _absolute(Path(data))
            # A pipe's own name may be no more than a number.
            return (path,), text_name(path) if stat.S_ISREG(mode) else data
        matches = [Path(path) for path in _files_below(data)]
        if not matches:
            kinds = ", ".join(_KNOWN)
            raise FileNotFoundError(errno.ENOENT, f"No file with text in it ({kinds})", data)
    files = sorted({_absolute(path) for path in matches}, key=lambda path: path.parts)
    if len(files) == 1:
        return (files[0],), files[0].name
    return tuple(files), f"{data} ({len(files):,} files)"


def _find_several(paths: Sequence[str]) -> tuple[tuple[Path, ...], str]:
    """Return the files that are meant by several paths, in their order."""
    if len(paths) == 1:
        return _find(paths[0])
    if not paths:
        raise ValueError("data names no path, expected one or more")
    texts = []
    for path in paths:
        if is_token_file(path):
            raise ValueError(f"{path} holds tokens, expected texts only where there are several")
        files, name = _find(path)
        if not files or not all(map(_is_regular, files)):
            raise ValueError(f"{path} is a stream, expected files where there are several paths")
        texts.append((files, name))
    every = tuple(dict.fromkeys(path for files, _ in texts for path in files))
    names = [name for _, name in texts]
    if len(names) > _MOST_NAMES:
        return every, f"{' + '.join(names[:_MOST_NAMES])} + ... ({len(every):,} files)"
    return every, " + ".join(names)


def _absolute(path: Path) -> Path:
    # Not path.resolve(): a link's own name has the suffix, where data lies in a cache under its
    # hash; and what /dev/stdin links to may have no name at all.
    return path.parent.resolve() / path.name if path.name not in ("", "..") else path.resolve()


def _files_below(folder: str) -> Iterator[str]:
    def fail(error: OSError) -> None:
        raise error

    seen = set()
    for parent, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        status = os.stat(parent)
        # Links may lead in circles.
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        if is_run(names):
            # A run may lie below its own text.
            folders.clear()
            continue
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            path = os.path.join(parent, name)
            if not name.startswith(".") and _is_known(name) and os.path.isfile(path):
                yield path


def _is_known(name: str) -> bool:
    stem, compression = _parted(name)
    return stem.endswith(_KNOWN) and not (compression and stem.endswith(_PARQUET))


def _state(status: os.stat_result) -> tuple[int, ...]:
    """Return what changes with a file's content, whatever its size and its time are set to."""
    return (
        *(status.st_size, status.st_mtime_ns, status.st_ctime_ns),
        *(status.st_dev, status.st_ino),
    )


def standard_input() -> BinaryIO:
    """Return the bytes of standard input, or of the text that stands in for it.

    Raises
    ------
    ValueError
        If it is closed.
    """
    if sys.stdin is None:
        raise ValueError("standard input is closed")
    stream: BinaryIO | None = getattr(sys.stdin, "buffer", None)
    if stream is None:
        stream = io.BytesIO(sys.stdin.read().encode("utf-8", "surrogateescape"))
    return stream


def is_stream(path: str) -> bool:
    """Whether a path leads to something that can be read only once, or never ends."""
    if path == STANDARD_INPUT:
        return True
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def text_name(path: Path) -> str:
    """Return the name of a text: that of its file, which a stream does not have."""
    saved = path.parent.name == STREAMS and re.fullmatch("[0-9a-f]{16}", path.name)
    return "standard input" if saved else path.name


def _is_regular(path: Path) -> bool:
    return stat.S_ISREG(os.stat(path).st_mode)


# --- Bytes ----------------------------------------------------------------------------------------


class _Input(io.BufferedIOBase):
    """A file whose first bytes can be looked at, and which counts what is taken from it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.taken = 0
        self._head = b""

    def peek(self, size: int) -> bytes:
        """Return the next bytes, fewer only at the end of the file."""
        self._head += self.file.read(size - len(self._head))
        return self._head

    def read(self, size: int | None = -1, /) -> bytes:
        """Return ``size`` bytes, fewer only at the end of the file."""
        head = self._head
        if head:
            wanted = len(head) if size is None or size < 0 else size
            data, self._head = head[:wanted], head[wanted:]
            if size is None or size < 0 or size > len(data):
                data += self.file.read(-1 if size is None or size < 0 else size - len(data))
        else:
            data = self.file.read(-1 if size is None else size)
        self.taken += len(data)
        return data


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[_Input]:
    """Open a file that must not change until all of it is read."""
    with open(path, "rb") as raw:
        before = os.fstat(raw.fileno())
        # A file of no size is empty, or one that the system makes up and that may have no end.
        empty = stat.S_ISREG(before.st_mode) and before.st_size == 0
        file = _Input(io.BytesIO() if empty else raw)
        error = None
        try:
            yield file
        except OSError as raised:
            raised.filename = raised.filename or str(path)
            raise
        except ValueError as raised:
            # A file that is written meanwhile looks damaged: then that is what to say.
            error = raised
        after = os.fstat(raw.fileno())
    changed = _state(before) != _state(after)
    # A Parquet file is not read from its beginning to its end, nor through this object.
    short = error is None and 0 < file.taken < before.st_size
    if stat.S_ISREG(before.st_mode) and (changed or short):
        raise ValueError(f"{path} has changed while it was read")
    if error is not None:
        raise error


def _blocks(file: io.BufferedIOBase) -> Iterator[bytes]:
    while block := file.read(BLOCK_BYTES):
        yield block


def _compression_of(file: _Input, suffix: str) -> str:
    """Return how a file is compressed, as its first bytes or else its suffix say."""
    head = file.peek(16)
    for known, (magic, more) in _COMPRESSED.items():
        if re.match(re.escape(magic) + more, head):
            return known
    return suffix


def _decompressed(file: _Input, path: str, compression: str) -> Iterator[bytes]:
    if not compression:
        return _blocks(file)
    head, magic = file.peek(16), _COMPRESSED[compression][0]
    if len(head) < len(magic) and magic.startswith(head):
        raise _cut_off(path)
    return _READERS[compression](file, path)


def _cut_off(path: str) -> ValueError:
    return ValueError(f"{path} ends too early: what is compressed in it is cut off")


def _gunzipped(file: _Input, path: str) -> Iterator[bytes]:
    try:
        with gzip.GzipFile(fileobj=file, mode="rb") as inside:
            yield from _blocks(inside)
    except EOFError:
        raise _cut_off(path) from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is damaged, or not of gzip: {error}") from None


def _zstd_decompressed(file: _Input, path: str) -> Iterator[bytes]:
    library = _zstd_library()
    try:
        if library.__name__ == "zstandard":
            yield from _of_about(BLOCK_BYTES, _zstd_frames(library, file, path))
        else:
            with library.ZstdFile(file) as inside:
                yield from _blocks(inside)
    except EOFError:
        raise _cut_off(path) from None
    except library.ZstdError as error:
        if "too much memory" in str(error):
            raise _needs_memory(path, "zstd -dc --long=31") from None
        raise ValueError(f"{path} is damaged, or not of Zstandard: {error}") from None


def _needs_memory(path: str, command: str) -> ValueError:
    return ValueError(
        f"{path} needs more than {MOST_WINDOW_BYTES >> 20} MiB of memory to be decompressed: "
        f"{command} {shlex.quote(path)} | legacy1bit train --data -"
    )


def _zstd_frames(library: ModuleType, file: _Input, path: str) -> Iterator[bytes]:
    # The library's own reader takes the end of a file for the end of a frame, and its other
    # objects know no limit to what they return: so each is given little.
    frame = None
    for block in _blocks(file):
        for start in range(0, len(block), ZSTD_BYTES):
            rest = block[start : start + ZSTD_BYTES]
            while rest:
                if frame is None:
                    frame = library.ZstdDecompressor().decompressobj()
                yield frame.decompress(rest)
                rest = frame.unused_data if frame.eof else b""
                if frame.eof:
                    frame = None
    if frame is not None:
        raise _cut_off(path)


def _xz_decompressed(file: _Input, path: str) -> Iterator[bytes]:
    library = _lzma_library()

    def begin() -> Any:
        return library.LZMADecompressor(library.FORMAT_XZ, MOST_WINDOW_BYTES)

    try:
        # Its streams may be padded.
        yield from _of_about(BLOCK_BYTES, _streams(begin, ".xz", b"\0", file, path))
    except library.LZMAError as error:
        if "limit" in str(error):
            raise _needs_memory(path, "xz -dc") from None
        raise ValueError(f"{path} is damaged, or not of xz: {error}") from None


def _bz2_decompressed(file: _Input, path: str) -> Iterator[bytes]:
    try:
        begin = _bz2_library().BZ2Decompressor
        yield from _of_about(BLOCK_BYTES, _streams(begin, ".bz2", b"", file, path))
    except OSError as error:
        # The library's own have no number.
        if error.errno is not None:
            raise
        raise ValueError(f"{path} is damaged, or not of bzip2: {error}") from None


def _streams(
    begin: Callable[[], Any], compression: str, padding: bytes, file: _Input, path: str
) -> Iterator[bytes]:
    """Return what is in compressed streams that follow each other.

    The libraries' own readers take what follows the first stream and is none for its end.
    """
    magic, _ = _COMPRESSED[compression]
    stream, ended = begin(), False
    for block in _blocks(file):
        while block:
            if ended:
                block = block.lstrip(padding)
                if not block:
                    break
                # The library waits for more of too few other bytes.
                if not (block.startswith(magic) or magic.startswith(block)):
                    raise ValueError(
                        f"{path} is damaged, or not of {_UNPACK[compression].split()[0]}: "
                        "other bytes follow its end"
                    )
                stream, ended = begin(), False
            yield stream.decompress(block, BLOCK_BYTES)
            while not (stream.eof or stream.needs_input):
                yield stream.decompress(b"", BLOCK_BYTES)
            ended, block = stream.eof, stream.unused_data
    if not ended:
        raise _cut_off(path)


_READERS: dict[str, Callable[[_Input, str], Iterator[bytes]]] = {
    ".gz": _gunzipped,
    ".zst": _zstd_decompressed,
    ".xz": _xz_decompressed,
    ".bz2": _bz2_decompressed,
}


def _of_about(size: int, chunks: Iterable[bytes]) -> Iterator[bytes]:
    held: list[bytes] = []
    count = 0
    for chunk in chunks:
        held.append(chunk)
        count += len(chunk)
        if count >= size:
            yield b"".join(held)
            held, count = [], 0
    if count:
        yield b"".join(held)


def _zstd_library() -> ModuleType:
    for name in ("compression.zstd", "zstandard"):
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise ValueError(
        "Zstandard files need zstandard, which is not installed: pip install zstandard"
    )


def _parquet_library() -> ModuleType:
    if not runs_here("pyarrow"):
        raise ValueError(
            "Parquet files need pyarrow, which needs instructions that this CPU lacks: "
            "make JSON lines of them on another computer"
        )
    try:
        return importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise ValueError(
            "Parquet files need pyarrow, which is not installed: pip install pyarrow"
        ) from None


def _lzma_library() -> ModuleType:
    return _own_library("lzma", "xz")


def _bz2_library() -> ModuleType:
    return _own_library("bz2", "bzip2")


def _own_library(name: str, files: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ValueError(
            f"{files} files need Python's module {name}, which this Python was built without"
        ) from None


_LIBRARIES = {
    _PARQUET: _parquet_library,
    ".zst": _zstd_library,
    ".xz": _lzma_library,
    ".bz2": _bz2_library,
}


# --- Characters -----------------------------------------------------------------------------------


def _in_utf8(blocks: Iterator[bytes], path: str, encoding: str) -> Iterator[bytes]:
    """Return text in UTF-8 without a byte order mark, in blocks of whole characters."""
    texts = _checked(blocks, path) if encoding == "utf-8" else _recoded(blocks, path, encoding)
    yield next(texts, b"").removeprefix(_UTF8_MARK)
    yield from texts


def decode_text(data: bytes, name: str) -> bytes:
    """Return a text in memory as UTF-8, by its byte order mark; without one, as it is.

    Parameters
    ----------
    data : bytes
    name : str
        What to call the text in an error.

    Raises
    ------
    ValueError
        If it is not in the encoding that its mark names.
    """
    for mark, encoding in _OTHER_MARKS.items():
        if data.startswith(mark):
            try:
                return data.decode(encoding).encode()
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{name}: byte 0x{data[error.start]:02x} at offset {error.start} is not "
                    f"{encoding}, which its byte order mark names"
                ) from None
    return data.removeprefix(_UTF8_MARK)


def _checked(blocks: Iterator[bytes], path: str) -> Iterator[bytes]:
    offset = 0
    pending = b""  # of a character that the next block ends
    part = CHECKED_BYTES
    for block in blocks:
        if not pending and block.isascii():
            offset += len(block)
            yield block
            continue
        text = pending + block
        view = memoryview(text)
        size = 0
        try:
            # Reading it is the one way to check it that is fast in Python; in parts, as their
            # characters stay in the cache.
            while done := codecs.utf_8_decode(view[size : size + part], "strict", False)[1]:
                size += done
        except UnicodeDecodeError as error:
            if offset == 0:
                _refuse_mark(text, path)
            at = size + error.start
            raise _not_text(path, "UTF-8", text[at], offset + at) from None
        offset += size
        pending = text[size:]
        if size:
            yield text[:size]
    if pending:
        raise _not_text(path, "UTF-8", pending[0], offset)


def _refuse_mark(text: bytes, path: str) -> None:
    for mark, encoding in _OTHER_MARKS.items():
        if text.startswith(mark):
            raise ValueError(
                f"{path} begins with the byte order mark of {encoding}, expected UTF-8; "
                f"--encoding {encoding} reads it"
            ) from None


def _recoded(blocks: Iterator[bytes], path: str, encoding: str) -> Iterator[bytes]:
    decoder = codecs.getincrementaldecoder(encoding)()
    taken = 0

    def recode(block: bytes, final: bool) -> bytes:
        try:
            return decoder.decode(block, final).encode()
        except UnicodeDecodeError as error:
            # A decoder's error is about the rest of former blocks, and this one.
            offset = taken - len(error.object) + error.start
            raise _not_text(path, encoding, error.object[error.start], offset) from None
        except UnicodeError as error:
            raise ValueError(
                f"{path}: bytes {taken - len(block)} to {taken} are not {encoding}, expected "
                f"text; --encoding names another ({error})"
            ) from None

    for block in blocks:
        taken += len(block)
        if text := recode(block, False):
            yield text
    if text := recode(b"", True):
        yield text


def _not_text(path: str, encoding: str, byte: int, offset: int) -> ValueError:
    return ValueError(
        f"{path}: byte 0x{byte:02x} at offset {offset} is not {encoding}, expected text; "
        "--encoding names another"
    )


# --- Documents ------------------------------------------------------------------------------------


def _one_document(blocks: Iterator[bytes]) -> Iterator[_Part]:
    begins = True
    for block in blocks:
        yield begins, block
        begins = False
    if begins:
        yield True, b""


def _separated(blocks: Iterator[bytes], separator: bytes) -> Iterator[_Part]:
    """Return what lies between separators, which may lie across blocks."""
    lines = separator.split(b"\n")
    pattern = re.compile(rb"\r?\n".join(map(re.escape, lines)))
    longest = len(separator) + len(lines) - 1
    begins = True
    held = b""  # what may be the beginning of a separator
    for block in blocks:
        text = held + block
        *ended, last = pattern.split(text) if b"\r\n" in text else text.split(separator)
        for document in ended:
            if document:
                yield begins, document
            begins = True
        size = max(len(last) - longest + 1, 0)
        if size:
            yield begins, last[:size]
            begins = False
        held = last[size:]
    if held:
        yield begins, held


def _lines(blocks: Iterator[bytes], path: str) -> Iterator[bytes]:
    held: list[bytes] = []
    size = count = 0
    for block in blocks:
        first, *others = block.split(b"\n")
        held.append(first)
        size += len(first)
        if size > MOST_LINE_BYTES:
            raise ValueError(
                f"{path}, line {count + 1}: it is longer than {MOST_LINE_BYTES:,} bytes, "
                "expected an object of JSON"
            )
        if others:
            *whole, last = others
            yield b"".join(held)
            yield from whole
            held, size = [last], len(last)
            count += len(others)
    yield b"".join(held)


def _json_records(blocks: Iterator[bytes], path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield objects of JSON, each with the line where it is."""
    for number, line in enumerate(_lines(blocks, path), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line.decode())
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: not JSON, {error.msg} (column {error.colno})") from None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: not JSON that can be read, {error}") from None
        if not isinstance(record, dict):
            raise ValueError(f"{where}: {JSON_KINDS[type(record)]}, expected an object")
        yield where, record


def _json_documents(blocks: Iterator[bytes], path: str, field: str) -> Iterator[_Part]:
    for where, record in _json_records(blocks, path):
        if field not in record:
            raise ValueError(f"{where}: no field {field!r}; {_there_are(record)}")
        text = record[field]
        if not isinstance(text, str):
            raise ValueError(
                f"{where}: field {field!r} is {JSON_KINDS[type(text)]}, expected a string"
            )
        try:
            yield True, text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{where}: field {field!r} has {text[error.start]!a} at character {error.start}, "
                "half of a surrogate pair, expected text"
            ) from None


def _there_are(names: Iterable[str]) -> str:
    listed = [repr(name) for name in names]
    if not listed:
        return "there are none"
    more = f" and {len(listed) - 20:,} more" if len(listed) > 20 else ""
    return f"there are {', '.join(listed[:20])}{more}; --field names another"


def _parquet_documents(file: _Input, path: Path, field: str) -> Iterator[_Part]:
    library = _parquet_library()
    arrow = importlib.import_module("pyarrow")
    if not file.file.seekable():
        raise ValueError(f"{path} is a stream, expected a file: Parquet is not read in order")
    row = 0
    try:
        # Without the buffer, the column is read for a whole group of rows, however large; ahead of
        # it another thread would read, which the system may not give.
        table = library.ParquetFile(
            file.file, buffer_size=BLOCK_BYTES, pre_buffer=False, page_checksum_verification=True
        )
        names = table.schema_arrow.names
        if field not in names:
            raise ValueError(f"{path}: no column {field!r}; {_there_are(names)}")
        kind = table.schema_arrow.field(field).type
        if not _is_text(arrow.types, kind):
            raise ValueError(f"{path}: column {field!r} is of type {kind}, expected strings")
        for batch in table.iter_batches(BATCH_ROWS, columns=[field], use_threads=False):
            for text in _texts(arrow, batch.column(0)):
                row += 1
                if text is None:
                    raise ValueError(f"{path}, row {row}: {field!r} is null, expected a string")
                _check_row(text, f"{path}, row {row}")
                yield True, text
    except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path} is damaged, or not of Parquet: {reason}") from None


def _is_text(types: Any, kind: Any) -> bool:
    if types.is_dictionary(kind):
        kind = kind.value_type
    # Some programs write strings without saying that they are strings.
    wanted = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")
    return str(kind) in wanted


def _texts(arrow: Any, column: Any) -> Iterator[bytes | None]:
    if arrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    for value in column.cast(arrow.large_binary()):
        yield value.as_py()


def _check_row(text: bytes, where: str) -> None:
    if not text.isascii():
        try:
            codecs.utf_8_decode(text, "strict", True)
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{where}: byte 0x{text[error.start]:02x} at offset {error.start} is not UTF-8, "
                "expected text"
            ) from None


# --- Pieces ---------------------------------------------------------------------------------------


def _cut(parts: Iterable[_Part]) -> Iterator[Piece]:
    """Make pieces of documents."""
    held: bytes | None = None
    first = True  # whether what is held begins a document
    searched = 0  # there is no place to cut up to here
    for begins, part in parts:
        if held is None or begins:
            if held is not None:
                yield Piece(held, first)
            held, first, searched = part, True, 0
        else:
            held += part
        start = 0
        while len(held) - start > PIECE_BYTES:
            limit = start + MOST_PIECE_BYTES
            stop = min(searched + PIECE_BYTES, limit, len(held) - 1)
            place = _last_place(held, searched, stop)
            if not place:
                searched = stop
                if stop == limit:
                    place = _character_start(held, limit)
                elif stop == len(held) - 1:
                    break
                else:
                    continue
            yield Piece(held[start:place], first)
            first = False
            start = searched = place
        if start:
            held = held[start:]
            searched -= start
    if held is not None:
        yield Piece(held, first)


def _last_place(text: bytes, low: int, high: int) -> int:
    """Return the last place in low < place <= high to cut a text before; 0 if there is none."""
    while high > low:
        start = max(high - WINDOW_BYTES, low)
        window = text[start : high + 1].translate(_CLASSES)
        at = window.rfind(_PRINTABLE + _SPACE)
        if at >= 0:
            return start + at + 1
        high = start
    return 0


def _character_start(text: bytes, place: int) -> int:
    while text[place] & 0xC0 == 0x80:
        place -= 1
    return place


# --- Files of tokens ------------------------------------------------------------------------------

# llm.c's dev/data/data_common.py: 256 words of 32 bits, the first three the format's number, its
# version, and how many tokens follow. As two tokens of 16 bits, each of these numbers would begin
# with one beyond GPT-2's 50,257: no file without a header can look like it.
_HEADER_WORDS = 256
_LLM_C = {20240520: (1, "uint16"), 20240801: (7, "uint32")}
# That program's models, their activations, and its multiple-choice questions.
_LLM_C_OTHERS = (20240326, 20240327, 20240522)

# GPT-2's vocabulary, the largest of what nanoGPT writes: in a file without a header, a token beyond
# it says that these are other numbers, unless somebody says that they are not.
NANOGPT_TOKENS = 50257


@dataclass(frozen=True)
class TokenFileInfo:
    """What a file of token ids holds.

    Attributes
    ----------
    format : str
        "llm.c", or "nanoGPT" for one without a header.
    dtype : str
        "uint16" or "uint32", little-endian in the file.
    offset : int
        Where the tokens begin, in bytes.
    count : int
        How many there are.
    """

    format: str
    dtype: str
    offset: int
    count: int


def is_token_file(path: str | os.PathLike[str]) -> bool:
    """Return whether a file's name says that it holds token ids: its suffix is .bin."""
    return Path(path).suffix.lower() == ".bin"


def token_file_info(path: str | os.PathLike[str]) -> TokenFileInfo:
    """Return what a file of token ids holds.

    Known are llm.c's, of 16 bits per token for GPT-2 and 32 for Llama 3, and nanoGPT's, which are
    tokens of 16 bits and nothing else: so a file of another kind, or of text, is refused.

    Raises
    ------
    OSError
        If it cannot be read.
    ValueError
        If its header and its size do not fit together, or it holds something else than tokens.
    """
    with open(path, "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{path} is a stream, expected a file of tokens")
        size = status.st_size
        head = file.read(4 * _HEADER_WORDS)
    words = np.frombuffer(head[: len(head) // 4 * 4], "<i4")
    magic = int(words[0]) if words.size else 0
    if magic in _LLM_C_OTHERS:
        raise ValueError(f"{path} is a file of llm.c that holds no tokens: its number is {magic}")
    if magic not in _LLM_C:
        if kind := kind_of_file(head):
            raise ValueError(f"{path} holds {kind.name}, expected tokens: {kind.remedy}")
        if _is_readable(head):
            raise ValueError(f"{path} holds text, expected tokens: let its name end in .txt")
        if size == 0 or size % 2:
            raise ValueError(
                f"{path} has {size:,} bytes, expected llm.c's header or tokens of 2 bytes each"
            )
        return TokenFileInfo("nanoGPT", "uint16", 0, size // 2)
    if words.size < _HEADER_WORDS:
        raise ValueError(f"{path} has {size:,} bytes and ends within its header of {4 * 256:,}")
    version, dtype = _LLM_C[magic]
    count, expected = int(words[2]), 4 * _HEADER_WORDS + int(words[2]) * np.dtype(dtype).itemsize
    if words[1] != version:
        raise ValueError(
            f"{path} is of llm.c's version {words[1]}, expected {version} for number {magic}"
        )
    if count < 1:
        raise ValueError(f"{path} says it holds {count:,} tokens, expected at least one")
    if size != expected:
        raise ValueError(
            f"{path} says it holds {count:,} tokens of {dtype}, which makes {expected:,} bytes, "
            f"but has {size:,}"
        )
    return TokenFileInfo("llm.c", dtype, 4 * _HEADER_WORDS, count)


def _is_readable(head: bytes) -> bool:
    """Whether the beginning of a file is UTF-8 without control characters."""
    try:
        text, _ = codecs.utf_8_decode(head, "strict", False)
    except UnicodeDecodeError:
        return False
    return bool(text) and all(character >= " " or character in "\t\n\r\f" for character in text)


def read_token_file(path: str | os.PathLike[str]) -> IntegerFile:
    """Return a file's token ids, uint16[N] or uint32[N], left on the disk.

    Raises
    ------
    OSError, ValueError
        As for ``token_file_info``.
    """
    info = token_file_info(path)
    dtype = np.dtype(info.dtype).newbyteorder("<")
    return IntegerFile(path, dtype, info.offset, info.count)
