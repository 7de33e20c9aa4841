"""What the system allows this process: the control groups around it (Linux, versions 1 and 2), and
threads."""

import contextlib
import math
import os
import threading
from collections.abc import Iterator
from pathlib import Path

# Which groups a process is in, and where what they allow is told.
_TABLE, _FOLDER = "/proc/self/cgroup", "/sys/fs/cgroup"

_Path = str | os.PathLike[str]

# Of memory: the limit, what is taken, and what of that files have, which make room when asked.
_MEMORY_FILES = (
    ("memory.max", "memory.current", ("active_file", "inactive_file")),
    (
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        ("total_active_file", "total_inactive_file"),
    ),
)


def core_quotas(table: _Path = _TABLE, folder: _Path = _FOLDER) -> list[int]:
    """Return the cores that each control group around this process allows, rounded up."""
    quotas = []
    for group in _groups("cpu", table, folder):
        # A group that is not there, or "max": no limit.
        with contextlib.suppress(OSError, ValueError, OverflowError):
            if (group / "cpu.max").exists():
                quota, period = map(float, (group / "cpu.max").read_text().split())
            else:
                quota = float((group / "cpu.cfs_quota_us").read_text())
                period = float((group / "cpu.cfs_period_us").read_text())
            if quota > 0 and period > 0:
                quotas.append(math.ceil(quota / period))
    return quotas


def free_memory(table: _Path = _TABLE, folder: _Path = _FOLDER) -> list[int]:
    """Return how many bytes each control group around this process has left."""
    found = []
    for group in _groups("memory", table, folder):
        for limit, taken, of_files in _MEMORY_FILES:
            with contextlib.suppress(OSError, ValueError):
                most = int((group / limit).read_text())
                used = int((group / taken).read_text()) - _told(group / "memory.stat", of_files)
                found.append(max(most - used, 0))
    return found


def can_start_threads(count: int = 1) -> bool:
    """Return whether the system gives this process another ``count`` threads at the same time."""
    end = threading.Event()
    started: list[threading.Thread] = []
    try:
        for _ in range(count):
            thread = threading.Thread(target=end.wait, daemon=True)
            thread.start()
            started.append(thread)
    except RuntimeError:
        return False
    finally:
        end.set()
        for thread in started:
            thread.join()
    return True


def _told(path: Path, names: tuple[str, ...]) -> int:
    """Return the sum of some of the numbers in a file of names and numbers; 0 without it."""
    total = 0
    with contextlib.suppress(OSError):
        for line in path.read_text().splitlines():
            name, _, number = line.partition(" ")
            if name in names:
                total += int(number)
    return total


def _groups(controller: str, table: _Path, folder: _Path) -> Iterator[Path]:
    """Yield where the groups tell of something, from the outermost to the process's own."""
    # A group's name is bytes, of which some end a line elsewhere.
    try:
        lines = os.fsdecode(Path(table).read_bytes()).split("\n")
    except OSError:
        return
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, colon, path = rest.partition(":")
        if not (number and colon):
            continue
        if controllers and controller not in controllers.split(","):
            continue
        # The limits of all groups above hold, too; inside a container the path may not be visible.
        group = Path(folder, controllers)
        yield group
        for part in filter(None, path.split("/")):
            group /= part
            yield group
