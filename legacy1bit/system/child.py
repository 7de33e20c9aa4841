"""Processes of this package's own modules, for work that must be ended from outside."""

import contextlib
import os
import signal
import subprocess
import sys


def ready_line(module: str) -> bytes:
    """Return what a module's process writes to its standard output when it can begin."""
    return f"{module}: ready\n".encode()


def start_child(module: str, *arguments: str) -> subprocess.Popen[bytes] | None:
    """Return a process that runs a module and is ready, or None where it cannot be started.

    Its standard input and output are pipes, and what it writes to standard error is lost.
    """
    # A program that Python is only a part of would start itself again.
    if "python" not in os.path.basename(sys.executable or "").lower():
        return None
    search = [path or os.curdir for path in sys.path if isinstance(path, str)]
    try:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(search)},
        )
    except (OSError, ValueError):
        return None
    ready = False
    try:
        assert process.stdout is not None
        # Before it, whatever is loaded in every process may have printed something.
        ready = any(line == ready_line(module) for line in process.stdout)
        return process if ready else None
    finally:
        if not ready:
            end_child(process)


def end_child(process: subprocess.Popen[bytes]) -> None:
    """End a process, and close its pipes."""
    process.kill()
    assert process.stdin is not None
    assert process.stdout is not None
    with contextlib.suppress(OSError):
        process.stdin.close()
    process.stdout.close()
    process.wait()


def why_ended(status: int) -> str:
    """Return what a process's exit status says."""
    if status >= 0:
        return f"its process ended with status {status}"
    name = signal.Signals(-status).name
    return f"its process was ended by {name}, as where memory is short"
