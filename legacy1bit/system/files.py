"""Writing files: the same content as the same bytes, and a crash in the middle loses nothing."""

import contextlib
import errno
import json
import mmap
import os
import re
import shlex
import shutil
import stat
import struct
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

try:
    import fcntl
except ImportError:
    # Windows: processes do not lock each other out.
    fcntl = None  # type: ignore[assignment]

# Content to write: bytes, text, or bytes in parts.
Buffer = bytes | memoryview
Content = bytes | str | list[Buffer]

# The permissions of a file or folder, its user and its group.
Access = tuple[int, int, int]

# Largest file of settings, of a tokenizer or an index; large tokenizers have tens of megabytes.
_MOST_BYTES = 1 << 28

# The names of temporary files and folders contain the beginning of the target's name, so that they
# fit wherever the target does. The names of a run's files are shorter.
_TEMPORARY = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{32}\.tmp", re.DOTALL)
NAME_CHARACTERS = 32

# Errors of a write that was lost; other errors mean that a folder cannot be synced.
_LOST = (errno.EIO, errno.ENOSPC, errno.EDQUOT)

# Older temporary files were left by a process that was killed.
_LEFT_BEHIND_SECONDS = 24 * 3600

# The stored types in safetensors' terms.
_DTYPES = {"float32": "F32", "float16": "F16", "uint8": "U8", "int8": "I8"}


class FileKind(NamedTuple):
    """A kind of file.

    Attributes
    ----------
    name : str
        With its article, as in "a GGUF model".
    remedy : str
        Instructions for such a file, if text or a model folder is expected.
    """

    name: str
    remedy: str


HTML_PAGE = FileKind("an HTML page", "download the file that it shows or links to")
GIT_LFS_POINTER = FileKind("a Git LFS pointer", "git lfs pull fetches what it points to")

_PYTORCH = FileKind(
    "a PyTorch checkpoint or another pickle", "convert it with the program that made it"
)
_UNPACK = "unpack it first"

# The first bytes, by which a kind is recognized.
HEAD_BYTES = 512

# The beginnings of the files of each kind; the first match counts.
_KINDS = (
    (rb"version https://git-lfs\.github\.com/spec/", GIT_LFS_POINTER),
    (
        rb"(?i)(?:\xef\xbb\xbf)?\s*(?:<\?xml[^>]*>\s*)?<(?:!doctype\s+html|html)[\s>]",
        HTML_PAGE,
    ),
    (
        # The version, in either order of bytes.
        rb"GGUF(?:[\1-\x0f]\0\0\0|\0\0\0[\1-\x0f])",
        FileKind("a GGUF model", "legacy1bit generate --model FILE runs it"),
    ),
    (
        # The header's length, and its first name.
        rb".{4}\0{4}\{\"",
        FileKind("a safetensors file of weights", "--model takes the folder that it lies in"),
    ),
    (rb"PK\x03\x04.{26}[^\0]{0,200}data\.pkl", _PYTORCH),
    # A pickle protocol and the possible first opcodes; PyTorch's older magic number.
    (rb"\x80[\x02\x03](?:[\]}]q\0|c[a-z_]+[.\n]|\x8a\nl\xfc\x9cF)", _PYTORCH),
    (rb"\x80[\x04\x05]\x95.{5}\0{3}", _PYTORCH),
    (
        rb"PK\x03\x04.{26}(?:\[Content_Types\]|_rels/|mimetypeapplication/)",
        FileKind("an office document or an e-book", "save it as plain text"),
    ),
    (rb"PK\x03\x04.{26}[^\0]{0,200}\.npy", FileKind("a NumPy archive", "write its text to a file")),
    (rb"PK(?:\x03\x04|\x05\x06)", FileKind("a ZIP archive", _UNPACK)),
    (rb".{257}ustar[\0 ]", FileKind("a tar archive", _UNPACK)),
    (rb"7z\xbc\xaf\x27\x1c", FileKind("a 7z archive", _UNPACK)),
    (rb"Rar!\x1a\x07", FileKind("a RAR archive", _UNPACK)),
    (rb"\x1f\x8b\x08", FileKind("a gzip file", "gzip -d unpacks it")),
    (rb"\x28\xb5\x2f\xfd", FileKind("a Zstandard file", "zstd -d unpacks it")),
    (rb"\xfd7zXZ\0", FileKind("an xz file", "xz -d unpacks it")),
    (rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)", FileKind("a bzip2 file", "bzip2 -d unpacks it")),
    (rb"%PDF-", FileKind("a PDF document", "pdftotext FILE makes text of it")),
    (rb"PAR1\x15", FileKind("a Parquet file", "let its name end in .parquet")),
    (rb"ARROW1\0\0", FileKind("an Arrow file", "write it as Parquet or as JSON lines")),
    (rb"\x93NUMPY", FileKind("a NumPy array", "write its text to a file")),
    (rb"\x89HDF\r\n\x1a\n", FileKind("an HDF5 file", "write its text to a file")),
)


def kind_of_file(head: bytes) -> FileKind | None:
    """Return the kind of a file that is easily mistaken for a text or a model; else None.

    Parameters
    ----------
    head : bytes
        The file's first ``HEAD_BYTES``, or all of them.
    """
    for pattern, kind in _KINDS:
        if re.match(pattern, head, re.DOTALL):
            return kind
    return None


def mistaken_file(path: str | os.PathLike[str]) -> str | None:
    """Return the kind and the remedy of a mistaken file, for an error message; else None.

    Raises
    ------
    OSError
        If it cannot be read; see ``open_regular``.
    """
    with open_regular(path) as file:
        kind = kind_of_file(file.read(HEAD_BYTES))
    if kind is None:
        return None
    own, folder = (shlex.quote(str(one)) for one in (path, Path(path).parent))
    remedy = kind.remedy.replace("FILE", own).replace("the folder that it lies in", folder)
    return f"it is {kind.name} ({remedy})"


def serialize_tensors(
    tensors: Mapping[str, npt.NDArray[Any]], header: Mapping[str, str]
) -> list[Buffer]:
    """Return a safetensors file in parts, without copying the arrays.

    The same content gives the same bytes; the library's order of the header is random.

    Parameters
    ----------
    tensors : mapping of str to array
        float32, float16, uint8 or int8.
    header : mapping of str to str
        The metadata.
    """
    content: dict[str, Any] = {"__metadata__": dict(header)}
    parts: list[Buffer] = []
    end = 0
    # Wide numbers first, so that all are aligned.
    for name in sorted(tensors, key=lambda name: (-tensors[name].itemsize, name)):
        values = np.ascontiguousarray(tensors[name])
        begin, end = end, end + values.nbytes
        content[name] = {
            "dtype": _DTYPES[values.dtype.name],
            "shape": list(tensors[name].shape),
            "data_offsets": [begin, end],
        }
        parts.append(values.reshape(-1).view(np.uint8).data)
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return [struct.pack("<Q", len(text)), text, *parts]


def atomic_write(path: str | os.PathLike[str], content: Content) -> None:
    """Write a file as a whole or not at all; see ``atomic_write_all``."""
    atomic_write_all({Path(path): content})


def atomic_write_all(contents: Mapping[Path, Content]) -> None:
    """Write files that belong together.

    Each content goes to a temporary file beside its target and onto the disk; only when all are
    there do they take the old files' places. So at every moment each file is the old or the new
    one, complete, and if one cannot be written none is changed. Only between two renames, a crash
    or an error can leave some files new and others old. A new file has the permissions of the old
    one, and its owner if the system allows that.

    Parameters
    ----------
    contents : mapping of Path to bytes, str or list
        Text is written as UTF-8, a list part by part.

    Raises
    ------
    OSError
        If a folder is missing or read-only, or the disk is full; the old files are untouched.
    """
    written: dict[Path, Path] = {}
    try:
        for path, content in contents.items():
            written[_target(path)] = _write_beside(_target(path), content)
        for path, temporary in written.items():
            os.replace(temporary, path)
    except BaseException:
        for temporary in written.values():
            with contextlib.suppress(OSError):
                temporary.unlink()
        raise
    for folder in {path.parent for path in written}:
        _sync_folder(folder)


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path to which a library writes a file, as a whole or not at all.

    At the end the file takes its place; after an exception the old file stays.

    Raises
    ------
    OSError
        As for ``atomic_write_all``.
    """
    target = _target(Path(path))
    temporary = temporary_of(target)
    access = access_of(target)
    try:
        if access is not None:
            _create(temporary, access).close()
        yield temporary
        with open(temporary, "r+b") as file:
            give_access(file.fileno(), access)
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException as error:
        # An error of another file has its name.
        reason = None
        if isinstance(error, OSError) and error.filename in (None, str(temporary)):
            reason = _reason(error, temporary)
        with contextlib.suppress(OSError):
            temporary.unlink()
        if reason is not None:
            raise OSError(*reason, str(path)) from None
        raise
    _sync_folder(target.parent)


def _reason(error: OSError, path: Path) -> tuple[int, str]:
    """Return the number and the text of an error in writing a file."""
    if error.errno and error.strerror:
        return error.errno, error.strerror
    # NumPy gives neither; another write fails for the same reason.
    try:
        with open(path, "ab") as file:
            file.write(bytes(1 << 16))
    except OSError as again:
        return again.errno or errno.EIO, again.strerror or str(again)
    return errno.EIO, f"it could not be written whole ({error})"


def atomic_copies(sources: Iterable[Path], folder: Path) -> None:
    """Copy files into a folder, each as a whole or not at all.

    A copy is a hard link if the file system has them, which costs nothing: ``atomic_write`` to one
    name later does not change the other.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for source in sources:
        atomic_copy(source, folder / source.name)
    _sync_folder(folder)


def atomic_copy(source: Path, target: Path) -> None:
    """Copy a file as a whole or not at all; see ``atomic_copies``.

    The copy has only permissions that both the file and the replaced one have.
    """
    temporary = temporary_of(target)
    access, replaced = access_of(source), access_of(target)
    if access is not None and replaced is not None:
        access = replaced[0] & access[0], *replaced[1:]
    try:
        try:
            if access != access_of(source):
                raise OSError(errno.EPERM, "A second name would have other permissions")
            # The target of a link: new content takes its name.
            os.link(os.path.realpath(source), temporary)
        except OSError:
            temporary = _write_beside(target, source.read_bytes(), access)
        os.replace(temporary, target)
    finally:
        # os.replace does nothing between two names of the same content: this one remains.
        with contextlib.suppress(OSError):
            temporary.unlink()


def _lock(handle: int, exclusive: bool) -> None:
    """Lock an open file or folder; ``BlockingIOError`` if another process has it."""
    if fcntl is not None:
        fcntl.flock(handle, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Lock a folder against other users of this function.

    The lock ends with the process, too. Some network file systems have no locks; there it does
    nothing.

    Raises
    ------
    ValueError
        If another process, or another part of this one, has the lock.
    OSError
        If the folder does not exist.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            _lock(handle, exclusive=True)
        except BlockingIOError:
            raise ValueError(f"{folder} is in use: another process is training there") from None
        except OSError:
            pass
        yield
    finally:
        os.close(handle)


def shared(path: Path) -> int:
    """Open a file or folder with a shared lock, against ``remove_unused``; return the handle.

    Raises
    ------
    OSError
        If it does not exist.
    """
    handle = os.open(path, os.O_RDONLY)
    with contextlib.suppress(OSError):
        _lock(handle, exclusive=False)
    return handle


def remove_unused(path: Path) -> bool:
    """Remove a file or folder unless a process has it ``shared``; return whether it is removed.

    It is renamed first, so that it is never there in part.

    Raises
    ------
    OSError
        If it may not be removed.
    """
    try:
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return True
    try:
        _lock(handle, exclusive=True)
    except BlockingIOError:
        os.close(handle)
        return False
    except OSError:
        # Some file systems have no locks; open files stay readable.
        pass
    gone = temporary_of(path)
    try:
        os.rename(path, gone)
    except FileNotFoundError:
        return True
    finally:
        os.close(handle)
    remove(gone)
    return not gone.exists()


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a regular file for reading.

    Raises
    ------
    OSError
        If it cannot be read, or is a device or a pipe, which might never end.
    """
    at_once = getattr(os, "O_NONBLOCK", 0)
    file = open(path, "rb", opener=lambda name, how: os.open(name, how | at_once))  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise _not_regular(path)
    return file


def check_regular(path: str | os.PathLike[str]) -> None:
    """Raise the ``OSError`` of ``open_regular``, which names the file: libraries may not."""
    with open_regular(path):
        pass


def read_regular(path: str | os.PathLike[str]) -> bytes:
    """Return the content of a regular file; see ``open_regular``.

    More than 256 MiB are refused: a sparse file may be small on disk, and fill the memory.
    """
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size > _MOST_BYTES:
            raise OSError(errno.EFBIG, f"Is larger than {_MOST_BYTES} bytes", str(path))
        return file.read()


def release(array: npt.NDArray[Any]) -> None:
    """Take the pages of an array out of this process's memory, if it is mapped from a file.

    They are read again when they are needed. Other arrays stay as they are.
    """
    owner: Any = array
    while isinstance(owner, (np.ndarray, memoryview)):
        owner = owner.base if isinstance(owner, np.ndarray) else owner.obj
    if not isinstance(owner, mmap.mmap) or not hasattr(mmap, "MADV_DONTNEED"):
        return
    start = array.ctypes.data - np.frombuffer(owner, np.uint8).ctypes.data
    first = start // mmap.PAGESIZE * mmap.PAGESIZE
    if start + array.nbytes > first:
        owner.madvise(mmap.MADV_DONTNEED, first, start + array.nbytes - first)


def _not_regular(path: str | os.PathLike[str]) -> OSError:
    return OSError(errno.EINVAL, "Is not a regular file", str(path))


def _target(path: Path) -> Path:
    """Return the path that a rename replaces: the target of a symbolic link, which stays a link.

    Raises
    ------
    OSError
        If it is a folder, a device or a pipe.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "Is a directory", str(path))
    # What a link such as /dev/stdout leads to may have no name of its own.
    if path.exists() and not path.is_file():
        raise _not_regular(path)
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def temporary_of(path: Path) -> Path:
    """Return a new name beside a file or folder, for its content until it is complete."""
    return path.with_name(f".{path.name[:NAME_CHARACTERS]}.{uuid.uuid4().hex}.tmp")


def temporaries(folder: Path) -> Iterator[tuple[Path, str]]:
    """Yield the temporary files of a folder, and the target's name of each.

    Of a longer name, its first ``NAME_CHARACTERS``.
    """
    for path in folder.glob(".*.tmp"):
        if known := _TEMPORARY.fullmatch(path.name):
            yield path, known["name"]


def remove_left_behind(folder: Path) -> None:
    """Remove the temporary files that killed processes have left in a folder."""
    for path, _ in temporaries(folder):
        with contextlib.suppress(OSError):
            changed = max(one.stat().st_mtime for one in (path, *path.glob("*")))
            if time.time() - changed > _LEFT_BEHIND_SECONDS:
                remove(path)


def remove(path: Path) -> None:
    """Remove a folder or a file, as far as possible."""
    shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(OSError):
        path.unlink()


def access_of(path: Path) -> Access | None:
    """Return the permissions, user and group of a file or folder; None if it does not exist.

    Set-user-ID and similar bits are left out.
    """
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return stat.S_IMODE(status.st_mode) & 0o777, status.st_uid, status.st_gid


def give_access(place: int | Path, access: Access | None) -> None:
    """Set the permissions of ``access_of``, as far as the system allows."""
    if access is None or not hasattr(os, "chown"):
        return
    mode, user, group = access
    with contextlib.suppress(OSError):
        os.chmod(place, mode)
    for owner in (user, -1):
        with contextlib.suppress(OSError):
            os.chown(place, owner, group)
            return


def _create(path: Path, access: Access | None) -> BinaryIO:
    """Create a new file; if it gets other permissions later, it is private until then."""
    mode = 0o666 if access is None else 0o600
    return open(path, "xb", opener=lambda name, how: os.open(name, how, mode))


def _write_beside(path: Path, content: Content, access: Access | None = None) -> Path:
    """Write content to a new file in the folder of ``path``, and sync it to the disk.

    Its permissions are ``access``, or else those of the file at ``path``.
    """
    access = access or access_of(path)
    whole = content.encode("utf-8") if isinstance(content, str) else content
    parts = whole if isinstance(whole, list) else [whole]
    temporary = temporary_of(path)
    try:
        with _create(temporary, access) as file:
            for part in parts:
                file.write(part)
            file.flush()
            give_access(file.fileno(), access)
            os.fsync(file.fileno())
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            error.filename = str(path)
        raise
    return temporary


def _sync_folder(folder: Path) -> None:
    """Sync a rename to the disk, if the system can sync folders."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno in _LOST:
            error.filename = str(folder)
            raise
    finally:
        os.close(handle)
