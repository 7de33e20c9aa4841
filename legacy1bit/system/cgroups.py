"""The limits of this process: control groups (Linux, versions 1 and 2), and threads."""

import contextlib
import math
import os
import threading
from collections.abc import Iterator
from pathlib import Path

# The groups of this process, and the folder of their limits.
_TABLE, _FOLDER = "/proc/self/cgroup", "/sys/fs/cgroup"

_Path = str | os.PathLike[str]

# Of memory: the limit, the usage, and the part of it in cached files, which can be freed.
_MEMORY_FILES = (
    ("memory.max", "memory.current", ("active_file", "inactive_file")),
    (
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        ("total_active_file", "total_inactive_file"),
    ),
)


def core_quotas(table: _Path = _TABLE, folder: _Path = _FOLDER) -> list[int]:
    """Return the cores that each control group of this process allows, rounded up."""
    quotas = []
    for group in _groups("cpu", table, folder):
        # A missing group, or "max": no limit.
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
    """Return the free bytes of each control group of this process."""
    free = []
    for group in _groups("memory", table, folder):
        for limit, taken, of_files in _MEMORY_FILES:
            with contextlib.suppress(OSError, ValueError):
                most = int((group / limit).read_text())
                used = int((group / taken).read_text()) - _sum_of(group / "memory.stat", of_files)
                free.append(max(most - used, 0))
    return free


def can_start_threads(count: int = 1) -> bool:
    """Return whether this process can start another ``count`` threads at the same time."""
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


def _sum_of(path: Path, names: tuple[str, ...]) -> int:
    """Return the sum of some of the numbers in a file of names and numbers; 0 without it."""
    total = 0
    with contextlib.suppress(OSError):
        for line in path.read_text().splitlines():
            name, _, number = line.partition(" ")
            if name in names:
                total += int(number)
    return total


def _groups(controller: str, table: _Path, folder: _Path) -> Iterator[Path]:
    """Yield the folders of the groups, from the outermost to the process's own."""
    # A group's name is bytes; str.splitlines would split at some of them.
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
