"""Writing files so that a crash in the middle loses nothing."""

import os
import tempfile
from pathlib import Path


def atomic_write(path: str | os.PathLike[str], content: bytes | str) -> None:
    """Write a file as a whole or not at all.

    The content goes to a temporary file in the same folder and onto the disk before that file
    takes the old one's place, so that at every moment one of the two is there complete.

    Parameters
    ----------
    path : path-like
    content : bytes or str
        Text is written as UTF-8.

    Raises
    ------
    OSError
        If the folder is missing or read-only, or the disk is full; the old file is untouched.
    """
    path = Path(path)
    data = content.encode("utf-8") if isinstance(content, str) else content
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files that only their owner can read; a new file should obey the umask.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Put a rename onto the disk, where the system lets a folder be opened."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)
