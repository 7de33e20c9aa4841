"""Tokens on disk: of any number, none of them in memory until they are read.

A folder of shards has an ``index.json``, and for each part files of little-endian numbers:
``<part>-00000.tokens`` and so on, ``<part>.documents`` with the places where documents begin, and
``<part>.hashes`` with a hash of each document, by which a text is split without being tokenized
again. The index has checksums of all of them, and of itself.
"""

import bisect
import contextlib
import errno
import functools
import hashlib
import json
import math
import os
import re
import shutil
import weakref
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple, NoReturn, Protocol, Self

import numpy as np
import numpy.typing as npt

from legacy1bit.data_utils import Tokens
from legacy1bit.system.errors import one_line
from legacy1bit.system.files import (
    access_of,
    give_access,
    open_regular,
    read_regular,
    remove,
    remove_left_behind,
    shared,
    temporary_of,
)

INDEX_FILE = "index.json"
_FORMAT = "legacy1bit tokens"
# The first version had no hashes of documents.
_FORMAT_VERSION, _FORMAT_VERSIONS = 2, (1, 2)

# What tokens can be stored as, and what a part can be called: its files are called after it.
_DTYPES = ("|u1", "<u2", "<u4")
_PART_NAME = re.compile(r"[A-Za-z0-9_-]+")

# A shard is of this size, so that a damaged or a missing one is a small loss, and that any file
# system holds it.
SHARD_BYTES = 1 << 28

# How much of a file is checked at once.
_BLOCK_BYTES = 1 << 22

# A subset reads blocks of this number of documents, and remembers the last: a few megabytes, which
# are all blocks of a million documents.
_BLOCK_DOCUMENTS, _REMEMBERED = 256, 4096
# How many blocks are counted at once.
_COUNTED = 256


class ShardError(ValueError):
    """A folder of shards is damaged."""


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the smallest type that holds every token of a vocabulary."""
    for name in _DTYPES:
        if vocab_size - 1 <= np.iinfo(name).max:
            return np.dtype(name)
    raise ValueError(f"the vocabulary has {vocab_size} tokens, expected at most 2^32")


class Integers(Protocol):
    """Token ids, or places of tokens, that are read in slices: an array, or a file."""

    @property
    def size(self) -> int: ...
    def __getitem__(self, places: slice, /) -> npt.NDArray[Any]: ...


class IntegerFile:
    """Integers in a file, each slice of which is read when it is asked for.

    Were it mapped into memory, its pages would stay there once they were touched, up to 2 MiB for
    each row of a batch; and a file that becomes shorter would end the process.

    Parameters
    ----------
    path : path-like
    dtype : dtype-like
    offset : int
        Where in the file they begin, in bytes.
    size : int, optional
        How many there are; all up to the file's end when not given.

    Raises
    ------
    OSError
        If it cannot be read, now or later.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        dtype: npt.DTypeLike,
        offset: int = 0,
        size: int | None = None,
    ) -> None:
        self.path, self.dtype = Path(path), np.dtype(dtype)
        self._offset = offset
        self._file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)
        if size is None:
            size = (os.fstat(self._file).st_size - offset) // self.dtype.itemsize
        self.size = size

    def __reduce__(self) -> NoReturn:
        # The number of an open file is another file's elsewhere, or after this one is closed.
        raise TypeError(f"{self.path} is open, and cannot be copied or pickled: open it once more")

    def __getitem__(self, places: slice, /) -> npt.NDArray[Any]:
        """Return a slice without a step, read-only.

        Raises
        ------
        OSError
            If the file cannot be read, or has become shorter.
        """
        start, stop, _ = places.indices(self.size)
        place, size = (
            self._offset + start * self.dtype.itemsize,
            (stop - start) * self.dtype.itemsize,
        )
        data = os.pread(self._file, size, place) if size > 0 else b""
        # The system reads no more than two gigabytes together.
        while len(data) < size:
            more = os.pread(self._file, size - len(data), place + len(data))
            if not more:
                raise OSError(errno.EIO, "has become shorter while it was read", str(self.path))
            data += more
        return np.frombuffer(data, self.dtype)


class TokenStore:
    """A sequence of tokens in one or more arrays or files.

    Parameters
    ----------
    parts : sequence of integer arrays or files
        All but the last have the same size.
    documents : int64 array or file, optional
        Where documents begin, from 0 on, each behind the one before; one, at 0, when not given. A
        document ends where the next begins, or at ``stop``.
    stop : int, optional
        Where the last document ends; the end of the tokens when not given. The one token that may
        follow is the target of the last.

    Attributes
    ----------
    size : int
        N, the number of tokens.
    document_count : int
    """

    def __init__(
        self,
        parts: Sequence[Integers],
        documents: Integers | None = None,
        stop: int | None = None,
    ) -> None:
        self._parts: list[Integers] = list(parts) or [np.zeros(0, np.uint8)]
        self._part_size = max(self._parts[0].size, 1)
        self._documents = np.zeros(1, np.int64) if documents is None else documents
        # A window's first token, and the document that lies in.
        self._origin = self._first = 0
        self.size = sum(part.size for part in self._parts)
        self.document_count = self._documents.size
        self.stop = self.size if stop is None else stop

    def window(self, start: int, stop: int) -> "TokenStore":
        """Return the tokens from ``start`` up to ``stop`` as a store of their own, not a copy.

        A document that begins before it begins at its start.
        """
        if not 0 <= start < stop <= self.size:
            raise ValueError(f"the window is {start} to {stop}, expected it in 0 to {self.size}")
        view = TokenStore(self._parts, self._documents, max(min(self.stop, stop) - start, 0))
        view._origin, view.size = self._origin + start, stop - start
        view._first = self._document_at(start)
        view.document_count = self._document_at(stop - 1) - view._first + 1
        return view

    def _document_at(self, place: int) -> int:
        """Return the number of the document that a token lies in, of those of all parts."""
        numbers = range(self._first, self._first + self.document_count)
        later = bisect.bisect_right(
            numbers,
            self._origin + place,
            key=lambda number: self._documents[number : number + 1][0],
        )
        return max(self._first + later - 1, 0)

    def __len__(self) -> int:
        return self.size

    def document_bounds(
        self, numbers: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return where documents begin and end, int64[K] each."""
        bounds = np.zeros((numbers.size, 2), np.int64)
        for pair, number in zip(bounds, (self._first + numbers).tolist(), strict=True):
            pair_bounds = self._documents[number : number + 2]
            pair[: pair_bounds.size] = pair_bounds
        bounds = np.maximum(bounds - self._origin, 0)
        begins, ends = bounds[:, 0], bounds[:, 1]
        return begins, np.where(numbers == self.document_count - 1, self.stop, ends)

    def longer_documents(self, width: int) -> int:
        """Return how many documents have more than ``width`` tokens."""
        count, first, last = 0, self._first, self._first + self.document_count
        for at in range(first, last, _COUNTED * _BLOCK_DOCUMENTS):
            stop = min(at + _COUNTED * _BLOCK_DOCUMENTS, last)
            begins = self._documents[at : min(stop + 1, last)] - self._origin
            bounds = begins if stop < last else np.append(begins, self.stop)
            count += int((np.diff(bounds) > width).sum())
        return count

    def document_begins(self, starts: npt.NDArray[np.int64], width: int) -> npt.NDArray[np.int64]:
        """Return where the documents begin that the tokens of some rows lie in.

        Parameters
        ----------
        starts : int64[R]
            Where the rows begin.
        width : int
            W, what each measures.

        Returns
        -------
        int64[R, W]
        """
        out = np.empty((starts.size, width), np.int64)
        last = self._first + self.document_count
        for row, start in zip(out, starts.tolist(), strict=True):
            number = self._document_at(start)
            begins = self._documents[number : min(number + width, last)]
            places = np.arange(self._origin + start, self._origin + start + width)
            row[:] = begins[np.searchsorted(begins, places, side="right") - 1]
        return np.maximum(out - self._origin, 0)

    def read(self, start: int, stop: int) -> Tokens:
        """Return the tokens from ``start`` up to ``stop``, or to the end: int32[K]."""
        stop = min(stop, self.size)
        out = np.empty(max(stop - start, 0), np.int32)
        self._read_into(out, start)
        return out

    def rows(
        self,
        starts: npt.NDArray[np.int64],
        stops: npt.NDArray[np.int64],
        width: int,
        pad_token: int,
    ) -> Tokens:
        """Return rows of tokens, each from its start up to its stop, then padding.

        Parameters
        ----------
        starts, stops : int64[R]
        width : int
            W; a row holds no more tokens.
        pad_token : int

        Returns
        -------
        int32[R, W]
        """
        sizes = np.clip(np.minimum(stops, self.size) - starts, 0, width)
        out = np.empty((starts.size, width), np.int32)
        for row, start, size in zip(out, starts.tolist(), sizes.tolist(), strict=True):
            if size < width:
                row[size:] = pad_token
                row = row[:size]
            self._read_into(row, start)
        return out

    def _read_into(self, out: Tokens, start: int) -> None:
        done = 0
        while done < out.size:
            number, place = divmod(self._origin + start + done, self._part_size)
            piece = self._parts[number][place : place + out.size - done]
            out[done : done + piece.size] = piece
            done += piece.size


class _Block(NamedTuple):
    """The documents of a subset among some that are neighbors in the whole text.

    Attributes
    ----------
    starts : int64[K]
        Where they begin, counted from the first of them.
    runs : int64[R, 2]
        Where documents that are neighbors begin in the whole text, and their size.
    """

    starts: npt.NDArray[np.int64]
    runs: npt.NDArray[np.int64]


class _Subset:
    """Some documents of a store, one behind the other, as one sequence of tokens.

    Only the number of tokens and documents before each block is in memory: 16 bytes for
    ``_BLOCK_DOCUMENTS`` documents.

    Parameters
    ----------
    store : TokenStore
        A whole one, whose last token is a boundary.
    documents : Integers
        Where its documents begin.
    inside : callable
        Gets two numbers of documents, and returns which of those between are of the subset,
        bool[K].

    Attributes
    ----------
    size : int
        The number of tokens, with the boundary behind the last.
    document_count : int
    """

    def __init__(
        self,
        store: TokenStore,
        documents: Integers,
        inside: Callable[[int, int], npt.NDArray[np.bool_]],
    ) -> None:
        self._store = store
        count, stop = documents.size, store.stop

        # It does not hold this object: a circle would keep files open.
        @functools.lru_cache(_REMEMBERED)
        def block(number: int) -> _Block:
            first = number * _BLOCK_DOCUMENTS
            last = min(first + _BLOCK_DOCUMENTS, count)
            bounds = np.append(documents[first : last + 1], stop)[: last + 1 - first]
            ours = inside(first, last)
            sizes = np.diff(bounds)[ours]
            edges = np.flatnonzero(np.diff(ours, prepend=False, append=False))
            begins, ends = bounds[edges[::2]], bounds[edges[1::2]]
            return _Block(np.cumsum(sizes) - sizes, np.stack([begins, ends - begins], axis=1))

        self._block = block
        totals = [np.zeros((2, 1), np.int64)]
        for first in range(0, count, step := _BLOCK_DOCUMENTS * _COUNTED):
            last = min(first + step, count)
            bounds = np.append(documents[first : last + 1], stop)[: last + 1 - first]
            ours = inside(first, last)
            edges = np.arange(0, last - first, _BLOCK_DOCUMENTS)
            sizes = np.stack([np.diff(bounds) * ours, ours])
            totals.append(np.add.reduceat(sizes, edges, axis=1))
        before = np.cumsum(np.concatenate(totals, axis=1), axis=1)
        self._tokens_before, self._documents_before = np.ascontiguousarray(before)
        self.document_count = int(self._documents_before[-1])
        self.size = int(self._tokens_before[-1]) + 1

    def __getitem__(self, places: slice, /) -> Tokens:
        """Return a slice without a step."""
        start, stop, _ = places.indices(self.size)
        out = np.empty(max(stop - start, 0), np.int32)
        done = 0
        while done < out.size:
            number = _block_of(self._tokens_before, start + done)
            if number == self._tokens_before.size - 1:
                # Behind every document there is a boundary.
                out[done:] = self._store.read(self._store.size - 1, self._store.size)
                break
            runs = self._block(number).runs
            ends = np.cumsum(runs[:, 1])
            at = start + done - int(self._tokens_before[number])
            first = int(np.searchsorted(ends, at, side="right"))
            for (begin, size), end in zip(
                runs[first:].tolist(), ends[first:].tolist(), strict=True
            ):
                place = begin + size - (end - at)
                piece = self._store.read(place, min(begin + size, place + out.size - done))
                out[done : done + piece.size] = piece
                done, at = done + piece.size, end
                if done == out.size:
                    break
        return out


class _SubsetStarts:
    """Where the documents of a subset begin, int64[N]."""

    def __init__(self, subset: _Subset) -> None:
        self._subset = subset
        self.size = subset.document_count

    def __getitem__(self, places: slice, /) -> npt.NDArray[np.int64]:
        """Return a slice without a step."""
        start, stop, _ = places.indices(self.size)
        out = np.empty(max(stop - start, 0), np.int64)
        done = 0
        while done < out.size:
            number = _block_of(self._subset._documents_before, start + done)
            first = start + done - int(self._subset._documents_before[number])
            piece = self._subset._block(number).starts[first : first + out.size - done]
            out[done : done + piece.size] = piece + self._subset._tokens_before[number]
            done += piece.size
        return out


def _block_of(before: npt.NDArray[np.int64], place: int) -> int:
    """Return the block that a place lies in, of which so much is before each."""
    return int(np.searchsorted(before, place, side="right")) - 1


@dataclass(frozen=True)
class PartIndex:
    """The sizes and checksums of one part.

    Attributes
    ----------
    tokens, documents, bytes : int
        ``tokens`` counts the one at the end that only is a target, too; bytes are those of the
        text.
    tokens_crc, documents_crc : int
        CRC-32 of all shards, one behind the other, and of the documents' places.
    hashes_crc : int or None
        CRC-32 of the documents' hashes; None where the first version of the format has none.
    """

    tokens: int
    documents: int
    bytes: int
    tokens_crc: int
    documents_crc: int
    hashes_crc: int | None = None

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if name == "hashes_crc" and value is None:
                continue
            if type(value) is not int or value < 0:
                raise ValueError(f"{name} is {value!r}, expected a whole number from 0 on")
        if self.documents > self.tokens or (self.tokens > 1 and not self.documents):
            raise ValueError(f"{self.tokens} tokens are not those of {self.documents} documents")


@dataclass(frozen=True)
class Index:
    """What a folder of shards holds.

    Attributes
    ----------
    dtype : str
    shard_tokens : int
        How many tokens a shard has; the last of a part may have fewer.
    source : str
        A fingerprint of what was read.
    tokenizer : str
        The SHA-256 of the tokenizer.
    sha256 : str
        Of all the text in its order, in hexadecimal digits; between documents stands the byte 0xff.
    parts : dict of str to PartIndex
    """

    dtype: str
    shard_tokens: int
    source: str
    tokenizer: str
    sha256: str
    parts: dict[str, PartIndex]

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}, expected one of {', '.join(_DTYPES)}")
        if type(self.shard_tokens) is not int or self.shard_tokens < 1:
            raise ValueError(f"shard_tokens is {self.shard_tokens!r}, expected 1 or more")
        for name in ("source", "tokenizer", "sha256"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected text")
        for name in self.parts:
            if not _PART_NAME.fullmatch(name):
                raise ValueError(f"a part is called {name!r}, expected letters and digits")


class _PartWriter:
    """The files of one part while they are written."""

    def __init__(self, folder: Path, name: str, dtype: np.dtype[Any], shard_tokens: int) -> None:
        self.folder, self.name = folder, name
        self._dtype, self._shard_tokens = dtype, shard_tokens
        self._documents: BinaryIO = open(folder / f"{name}.documents", "xb")  # noqa: SIM115
        self._hashes: BinaryIO | None = None
        self._shard: BinaryIO | None = None
        self.tokens = self.documents = self.bytes = self._shards = 0
        self._tokens_crc = self._documents_crc = self._hashes_crc = 0
        try:
            self._hashes = open(folder / f"{name}.hashes", "xb")  # noqa: SIM115
        except BaseException:
            self.abandon()
            raise

    def begin_document(self, hashed: int) -> None:
        assert self._hashes is not None
        place, digest = self.tokens.to_bytes(8, "little"), hashed.to_bytes(4, "little")
        self._documents.write(place)
        self._hashes.write(digest)
        self._documents_crc = zlib.crc32(place, self._documents_crc)
        self._hashes_crc = zlib.crc32(digest, self._hashes_crc)
        self.documents += 1

    def write(self, tokens: npt.NDArray[Any]) -> None:
        while tokens.size:
            free = self._shard_tokens - self.tokens % self._shard_tokens
            if self._shard is None or free == self._shard_tokens:
                self._shard = self._next_shard()
            data = np.ascontiguousarray(tokens[:free], self._dtype).data
            self._shard.write(data)
            self._tokens_crc = zlib.crc32(data, self._tokens_crc)
            self.tokens += min(free, tokens.size)
            tokens = tokens[free:]

    def _next_shard(self) -> BinaryIO:
        if self._shard is not None:
            _close(self._shard)
        self._shards += 1
        return open(self.folder / _shard_name(self.name, self._shards - 1), "xb")

    def finish(self) -> PartIndex:
        for file in self._files():
            _close(file)
        return PartIndex(
            *(self.tokens, self.documents, self.bytes),
            *(self._tokens_crc, self._documents_crc, self._hashes_crc),
        )

    def _files(self) -> list[BinaryIO]:
        files = (self._shard, self._documents, self._hashes)
        return [file for file in files if file is not None]

    def abandon(self) -> None:
        for file in self._files():
            with contextlib.suppress(OSError):
                file.close()


def _shard_name(part: str, number: int) -> str:
    return f"{part}-{number:05}.tokens"


def _close(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()


class ShardWriter:
    """Writes a folder of shards, as a whole or not at all.

    As a context it leaves nothing behind where ``finish`` was not reached.

    Parameters
    ----------
    folder : Path
        What is there already is replaced at the end.
    parts : sequence of str
    vocab_size : int
    shard_bytes : int
    replace : bool
        Whether what else is there may go; it is an error where not.

    Raises
    ------
    OSError
        If the folder cannot be written; the error names it, or the one above that is in the way.
    """

    def __init__(
        self,
        folder: Path,
        parts: Sequence[str],
        vocab_size: int,
        shard_bytes: int = SHARD_BYTES,
        replace: bool = True,
    ) -> None:
        self._replace = replace
        self.folder = folder
        self._dtype = token_dtype(vocab_size)
        self._shard_tokens = max(shard_bytes // self._dtype.itemsize, 1)
        self._temporary = temporary_of(folder)
        self._release: Callable[[], Any] = lambda: None
        self._parts: dict[str, _PartWriter] = {}
        try:
            with self._named():
                folder.parent.mkdir(parents=True, exist_ok=True)
                remove_left_behind(folder.parent)
                self._temporary.mkdir()
                self._release = weakref.finalize(self, os.close, shared(self._temporary))
                give_access(self._temporary, access_of(folder))
                for name in parts:
                    self._parts[name] = _PartWriter(
                        self._temporary, name, self._dtype, self._shard_tokens
                    )
        except BaseException:
            self.abandon()
            raise

    def put_beside(self, save: Callable[[Path], None]) -> None:
        """Have something else written into the folder."""
        with self._named():
            save(self._temporary)

    def begin_document(self, part: str, hashed: int = 0) -> None:
        """Begin a document with the next token of a part; its hash has 32 bits."""
        with self._named():
            self._parts[part].begin_document(hashed)

    def write(self, part: str, tokens: npt.NDArray[Any], size: int = 0) -> None:
        """Add tokens to a part, which stand for ``size`` bytes of text."""
        writer = self._parts[part]
        writer.bytes += size
        with self._named():
            writer.write(tokens)

    def finish(self, source: str, tokenizer: str, sha256: str) -> Index:
        """Write the index, put the folder in its place and return what it holds."""
        with self._named():
            parts = {name: writer.finish() for name, writer in self._parts.items()}
            index = Index(self._dtype.str, self._shard_tokens, source, tokenizer, sha256, parts)
            record = {"format": _FORMAT, "format_version": _FORMAT_VERSION, **asdict(index)}
            with open(self._temporary / INDEX_FILE, "x", encoding="utf-8") as file:
                json.dump({**record, "crc": _crc_of(record)}, file, indent=2)
                file.flush()
                os.fsync(file.fileno())
            self._put_in_place(index)
        return index

    def _put_in_place(self, index: Index) -> None:
        """Rename the folder, unless another process has written the same meanwhile."""
        while True:
            try:
                os.rename(self._temporary, self.folder)
                return
            except OSError as error:
                # A folder takes the place of an empty one only, and not that of a file.
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise
                if not self._replace:
                    raise ValueError(
                        f"{self.folder} has come to hold something else meanwhile: name another"
                    ) from None
            with contextlib.suppress(OSError, ShardError):
                if read_index(self.folder) == index:
                    # Whoever has written it may be about to open it.
                    return self.abandon()
            damaged = temporary_of(self.folder)
            with contextlib.suppress(FileNotFoundError):
                os.rename(self.folder, damaged)
                remove(damaged)

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            # A name below the folder is one of a file that will not be there any more.
            above = error.filename is not None and self.folder.is_relative_to(error.filename)
            path = error.filename if above else str(self.folder)
            raise OSError(error.errno, error.strerror, path) from None

    def abandon(self) -> None:
        """Remove what was written, unless it is in its place."""
        for writer in self._parts.values():
            writer.abandon()
        shutil.rmtree(self._temporary, ignore_errors=True)
        self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.abandon()


def read_index(folder: Path) -> Index:
    """Return the index of a folder of shards, after checking all of the folder.

    That takes about a second for two gigabytes, and detects any damage.

    Raises
    ------
    OSError
        If there is no such folder.
    ShardError
        If it is damaged.
    """
    path = folder / INDEX_FILE
    content = read_regular(path)
    try:
        record = json.loads(content)
        crc = record.pop("crc")
        if record["format"] != _FORMAT or record["format_version"] not in _FORMAT_VERSIONS:
            versions = " or ".join(map(str, _FORMAT_VERSIONS))
            raise ValueError(f"it is not an index of tokens of version {versions}")
        if _crc_of(record) != crc:
            raise ValueError("its checksum does not match")
        del record["format"], record["format_version"]
        parts = {name: PartIndex(**part) for name, part in record.pop("parts").items()}
        index = Index(**record, parts=parts)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ShardError(f"{path} is damaged: {one_line(error)}") from None
    for name, part in parts.items():
        _check_tokens(folder, index, name)
        _check_documents(folder / f"{name}.documents", part)
        if part.hashes_crc is not None:
            _check_hashes(folder / f"{name}.hashes", part)
    return index


def _crc_of(record: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(record).encode())


def _shard_names(index: Index, part: str) -> Iterator[str]:
    count = -(-index.parts[part].tokens // index.shard_tokens)
    return (_shard_name(part, number) for number in range(count))


def _check_tokens(folder: Path, index: Index, name: str) -> None:
    """Raise ``ShardError`` unless the shards of a part are what they were."""
    part, itemsize = index.parts[name], np.dtype(index.dtype).itemsize
    left, crc = part.tokens, 0
    # An index may promise more shards than memory has names for: the first that is missing ends it.
    for shard in _shard_names(index, name):
        count = min(left, index.shard_tokens)
        for block in _blocks(folder / shard, count * itemsize):
            crc = zlib.crc32(block, crc)
        left -= count
    if crc != part.tokens_crc:
        raise ShardError(f"{folder / name}: the checksum of its tokens does not match")


def _check_documents(path: Path, part: PartIndex) -> None:
    """Raise ``ShardError`` unless the places of documents are what they were, and are places."""
    crc, last = 0, -1
    for block in _blocks(path, part.documents * 8):
        crc = zlib.crc32(block, crc)
        places = np.frombuffer(block, "<i8")
        rising = places[0] > last and (places[1:] > places[:-1]).all()
        if not rising or (last < 0 and places[0] != 0) or places[-1] >= part.tokens:
            raise ShardError(
                f"{path}: expected where documents begin, from 0 on, each behind the one before "
                f"and below {part.tokens}"
            )
        last = int(places[-1])
    if crc != part.documents_crc:
        raise ShardError(f"{path}: its checksum does not match")


def _check_hashes(path: Path, part: PartIndex) -> None:
    """Raise ``ShardError`` unless the hashes of documents are what they were."""
    crc = 0
    for block in _blocks(path, part.documents * 4):
        crc = zlib.crc32(block, crc)
    if crc != part.hashes_crc:
        raise ShardError(f"{path}: its checksum does not match")


def _blocks(path: Path, size: int) -> Iterator[bytes]:
    """Yield the content of a file of ``size`` bytes, some megabytes at a time."""
    try:
        with open_regular(path) as file:
            actual = os.fstat(file.fileno()).st_size
            if actual != size:
                raise ShardError(f"{path} has {actual} bytes, expected a file of {size}")
            while block := file.read(_BLOCK_BYTES):
                yield block
    except OSError as error:
        raise ShardError(f"{path}: {error.strerror}") from None


def open_store(folder: Path, index: Index, part: str) -> TokenStore:
    """Return a part of a folder of shards, which is in use as long as the part is.

    Raises
    ------
    OSError
        If a file cannot be read.
    ShardError
        If there is no such part.
    """
    if part not in index.parts:
        raise ShardError(f"{folder} has the parts {', '.join(index.parts)}, expected {part}")
    parts = [IntegerFile(folder / name, index.dtype) for name in _shard_names(index, part)]
    documents = IntegerFile(folder / f"{part}.documents", "<i8")
    # All windows of the tokens have it.
    weakref.finalize(documents, os.close, shared(folder))
    # The last token is the first of a document that is not there.
    return TokenStore(parts, documents, max(index.parts[part].tokens - 1, 0))


def split_documents(folder: Path, index: Index, part: str, share: float) -> list[TokenStore]:
    """Return the documents of a part for training, and those for validation.

    A document's hash decides, so that copies of one are on the same side. Both keep the order of
    the whole text, and end with the boundary behind their last document.

    Parameters
    ----------
    folder : Path
    index : Index
    part : str
    share : float
        The fraction of the documents for validation.

    Raises
    ------
    OSError
        If a file cannot be read.
    ShardError
        If there is no such part, or it has no hashes.
    """
    store = open_store(folder, index, part)
    if index.parts[part].hashes_crc is None:
        raise ShardError(f"{folder} has no hashes of documents, by which they could be split")
    hashes = IntegerFile(folder / f"{part}.hashes", "<u4")
    limit = math.ceil(share * 2**32)

    def validates(first: int, last: int) -> npt.NDArray[np.bool_]:
        return hashes[first:last].astype(np.int64) < limit

    def trains(first: int, last: int) -> npt.NDArray[np.bool_]:
        return ~validates(first, last)

    subsets = [_Subset(store, store._documents, inside) for inside in (trains, validates)]
    return [
        TokenStore([subset], _SubsetStarts(subset), max(subset.size - 1, 0)) for subset in subsets
    ]


def default_cache() -> Path:
    """Return the default cache of tokens: ``legacy1bit`` in the user's cache folder.

    Raises
    ------
    ValueError
        If the user has none.
    """
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if base.startswith("~"):
        raise ValueError("there is no home folder for the cache of tokens: name one with --cache")
    return Path(base) / "legacy1bit"


def cache_key(parts: Mapping[str, Any]) -> str:
    """Return a folder's name for what tokens depend on."""
    text = json.dumps(dict(parts), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def cached(folder: Path, write: Callable[[Path], Index], source: str, tokenizer: str) -> Index:
    """Return the index of a folder of shards, which is written where there is none that fits.

    Parameters
    ----------
    folder : Path
    write : callable
        Gets the folder, writes it, and returns its index.
    source, tokenizer : str
        What the index has to tell.
    """
    with contextlib.suppress(OSError, ShardError):
        index = read_index(folder)
        if (index.source, index.tokenizer) == (source, tokenizer):
            return index
    return write(folder)
