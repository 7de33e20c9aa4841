"""Writing files: the same content as the same bytes, and a crash in the middle loses nothing."""

import contextlib
import errno
import fcntl
import json
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

# What can be written: bytes, text, or bytes in parts.
Buffer = bytes | memoryview
Content = bytes | str | list[Buffer]

# The permissions of a file or folder, its user and its group.
Access = tuple[int, int, int]

# Of settings, tokenizers and indexes; the largest tokenizers there are have some tens of megabytes.
_MOST_BYTES = 1 << 28

# What temporary files and folders are called, and what they would have become: of a longer name its
# first characters, so that every name that a file system takes can be written to. None of a run's
# own files has as many.
_TEMPORARY = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{32}\.tmp", re.DOTALL)
NAME_CHARACTERS = 24

# What says that something did not get onto the disk; others, that a folder cannot be put there.
_LOST = (errno.EIO, errno.ENOSPC, errno.EDQUOT)

# What is that old was left behind by a process that was killed.
_LEFT_BEHIND_SECONDS = 24 * 3600

# What safetensors calls the types that are stored here.
_DTYPES = {"float32": "F32", "float16": "F16", "uint8": "U8", "int8": "I8"}


class FileKind(NamedTuple):
    """A kind of file.

    Attributes
    ----------
    name : str
        With its article, as in "a GGUF model".
    remedy : str
        What to do with such a file, where text or a model folder is expected.
    """

    name: str
    remedy: str


HTML_PAGE = FileKind("an HTML page", "download the file that it shows or links to")
GIT_LFS_POINTER = FileKind("a Git LFS pointer", "git lfs pull fetches what it points to")

_PYTORCH = FileKind(
    "a PyTorch checkpoint or another pickle", "convert it with the program that made it"
)
_UNPACK = "unpack it first"

# How many bytes a file is known by.
HEAD_BYTES = 512

# How the files of each kind begin; the first that matches counts.
_KINDS = (
    (rb"version https://git-lfs\.github\.com/spec/", GIT_LFS_POINTER),
    (
        rb"(?i)(?:\xef\xbb\xbf)?\s*(?:<\?xml[^>]*>\s*)?<(?:!doctype\s+html|html)[\s>]",
        HTML_PAGE,
    ),
    (
        # The version, in either order of bytes.
        rb"GGUF(?:[\1-\x0f]\0\0\0|\0\0\0[\1-\x0f])",
        FileKind("a GGUF model", "legacy1bit import --model FILE --out DIR makes a folder of it"),
    ),
    (
        # The header's length, and its first name.
        rb".{4}\0{4}\{\"",
        FileKind("a safetensors file of weights", "--model takes the folder that it lies in"),
    ),
    (rb"PK\x03\x04.{26}[^\0]{0,200}data\.pkl", _PYTORCH),
    # A protocol of pickle, and what its first object can be; PyTorch's older number.
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
    """Return which of the kinds that are easily mistaken for a text or a model a file is.

    Parameters
    ----------
    head : bytes
        Its first ``HEAD_BYTES``, or all of it.
    """
    for pattern, kind in _KINDS:
        if re.match(pattern, head, re.DOTALL):
            return kind
    return None


def mistaken_file(path: str | os.PathLike[str]) -> str | None:
    """Return what a file is, and what to do with it, as an error tells it; None for other kinds.

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
    """Return a safetensors file in parts, without a copy of what is in the arrays.

    The same content gives the same bytes, which the library leaves to chance: those that it would
    write otherwise.

    Parameters
    ----------
    tensors : mapping of str to array
        float32, float16, uint8 or int8.
    header : mapping of str to str
        What is to be told besides.
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
    one, complete, and where one cannot be written none is changed. Only between two renames, a
    crash or an error can leave some files new and others old. A file that takes another's place has
    its permissions, and its owner where the system allows that.

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
    """Give another program, or a library, where to write a file as a whole or not at all.

    What it has written and closed takes the file's place at the end; where anything is raised
    before, the old file stays.

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
        # What else cannot be opened there has a name of its own.
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
    # NumPy says neither; what is written next fails as its own did.
    try:
        with open(path, "ab") as file:
            file.write(bytes(1 << 16))
    except OSError as again:
        return again.errno or errno.EIO, again.strerror or str(again)
    return errno.EIO, f"it could not be written whole ({error})"


def atomic_copies(sources: Iterable[Path], folder: Path) -> None:
    """Put copies of files into a folder, each as a whole or not at all.

    Where the file system can, a copy is a second name for the same content, which costs nothing:
    what ``atomic_write`` does to one name later leaves the other alone.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for source in sources:
        atomic_copy(source, folder / source.name)
    _sync_folder(folder)


def atomic_copy(source: Path, target: Path) -> None:
    """Put a copy of a file in a place, as a whole or not at all; see ``atomic_copies``.

    Nobody may read it who may not read the file, or what it replaces.
    """
    temporary = temporary_of(target)
    access, replaced = access_of(source), access_of(target)
    if access is not None and replaced is not None:
        access = replaced[0] & access[0], *replaced[1:]
    try:
        try:
            if access != access_of(source):
                raise OSError(errno.EPERM, "A second name would have other permissions")
            # What a link leads to: the next content takes that one's name.
            os.link(os.path.realpath(source), temporary)
        except OSError:
            temporary = _write_beside(target, source.read_bytes(), access)
        os.replace(temporary, target)
    finally:
        # Two names of one content are not renamed into each other: then this one is left.
        with contextlib.suppress(OSError):
            temporary.unlink()


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Have a folder for oneself, as far as others ask for it in this way.

    It ends with the process, too, however that ends. Some network file systems know no such
    thing; there nobody is kept out.

    Raises
    ------
    ValueError
        If another process, or another part of this one, has it.
    OSError
        If there is no such folder.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder} is in use: another process is training there") from None
        except OSError:
            pass
        yield
    finally:
        os.close(handle)


def shared(path: Path) -> int:
    """Return a handle of a file or folder; while it is open, ``remove_unused`` leaves that alone.

    Raises
    ------
    OSError
        If there is none.
    """
    handle = os.open(path, os.O_RDONLY)
    with contextlib.suppress(OSError):
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    return handle


def remove_unused(path: Path) -> bool:
    """Remove a file or folder unless a process has it ``shared``; return whether it is gone.

    Nobody finds half of it meanwhile.

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
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return False
    except OSError:
        # Some file systems have no locks; what is open stays readable.
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
    """Open a file to be read that has come with others.

    Raises
    ------
    OSError
        If it cannot be read, or is a pipe, which would be waited for without end, or a device.
    """
    file = open(path, "rb", opener=lambda name, how: os.open(name, how | os.O_NONBLOCK))  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise _no_regular_file(path)
    return file


def check_regular(path: str | os.PathLike[str]) -> None:
    """Raise the ``OSError`` of ``open_regular``, which names the file: libraries may not."""
    with open_regular(path):
        pass


def read_regular(path: str | os.PathLike[str]) -> bytes:
    """Return the content of a file that has come with others; see ``open_regular``.

    One of more than 256 MiB is refused: it may take no room on the disk, and all of the memory.
    """
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size > _MOST_BYTES:
            raise OSError(errno.EFBIG, f"Is larger than {_MOST_BYTES} bytes", str(path))
        return file.read()


def _no_regular_file(path: str | os.PathLike[str]) -> OSError:
    return OSError(errno.EINVAL, "Is no regular file", str(path))


def _target(path: Path) -> Path:
    """Return what a rename may replace: a file that is there, or none; a link's own stays a link.

    Raises
    ------
    OSError
        If it is a folder, a device or a pipe.
    """
    target = Path(os.path.realpath(path)) if path.is_symlink() else path
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, "Is a directory", str(path))
    if target.exists() and not target.is_file():
        raise _no_regular_file(path)
    return target


def temporary_of(path: Path) -> Path:
    """Return where to write a file or folder until it is complete: beside it, under a new name."""
    return path.with_name(f".{path.name[:NAME_CHARACTERS]}.{uuid.uuid4().hex}.tmp")


def temporaries(folder: Path) -> Iterator[tuple[Path, str]]:
    """Yield what is temporary in a folder, and the name that each would have taken.

    Of a name of ``NAME_CHARACTERS`` or more, its beginning.
    """
    for path in folder.glob(".*.tmp"):
        if known := _TEMPORARY.fullmatch(path.name):
            yield path, known["name"]


def remove_left_behind(folder: Path) -> None:
    """Remove what processes that were killed while they wrote into a folder have left there."""
    for path, _ in temporaries(folder):
        with contextlib.suppress(OSError):
            changed = max(found.stat().st_mtime for found in (path, *path.glob("*")))
            if time.time() - changed > _LEFT_BEHIND_SECONDS:
                remove(path)


def remove(path: Path) -> None:
    """Remove a folder or a file, as far as that can be done."""
    shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(OSError):
        path.unlink()


def access_of(path: Path) -> Access | None:
    """Return who may do what with a file or folder, or None if there is none.

    A right to run a program as its owner is not among it.
    """
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return stat.S_IMODE(status.st_mode) & 0o777, status.st_uid, status.st_gid


def give_access(place: int | Path, access: Access | None) -> None:
    """Give a file or folder what ``access_of`` has returned, as far as the system allows."""
    if access is None:
        return
    mode, user, group = access
    with contextlib.suppress(OSError):
        os.chmod(place, mode)
    for owner in (user, -1):
        with contextlib.suppress(OSError):
            os.chown(place, owner, group)
            return


def _create(path: Path, access: Access | None) -> BinaryIO:
    """Make a new file; one that is to be given access to is nobody else's until then."""
    mode = 0o666 if access is None else 0o600
    return open(path, "xb", opener=lambda name, how: os.open(name, how, mode))


def _write_beside(path: Path, content: Content, access: Access | None = None) -> Path:
    """Write content to a new file in the folder of ``path``, onto the disk.

    It is accessible as ``access`` says, or else as what is at ``path``.
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
    """Put a rename onto the disk, where the system can do that with a folder."""
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
