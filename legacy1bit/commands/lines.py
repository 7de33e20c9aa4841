"""Lines that are typed, or come through a pipe."""

import codecs
import contextlib
import io
import itertools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from legacy1bit.data.sources import decode_text, standard_input

_HISTORY_LINES = 1000


def lines(prompt: Callable[[], str]) -> Iterator[bytes]:
    """Yield lines of standard input; without a terminal they are any bytes.

    Parameters
    ----------
    prompt : callable
        Returns what a terminal shows before the next line.
    """
    if sys.stdin.isatty():
        with contextlib.suppress(EOFError):
            while True:
                yield os.fsencode(input(prompt()))
        return
    stream = standard_input()
    first = stream.readline()
    if first.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        # Line breaks are other bytes there.
        stream = io.BytesIO(decode_text(first + stream.read(), "standard input"))
        first = stream.readline()
    for line in itertools.chain([first.removeprefix(codecs.BOM_UTF8)] if first else [], stream):
        yield line.removesuffix(b"\n").removesuffix(b"\r")


@contextlib.contextmanager
def history(name: str) -> Iterator[None]:
    """Edit lines, with a history of earlier sessions, if the system has readline.

    Parameters
    ----------
    name : str
        The name of the file that keeps it.
    """
    try:
        import readline
    except ImportError:
        yield
        return
    if not sys.stdin.isatty():
        yield
        return
    state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    if state.startswith("~"):
        print("there is no home folder to keep a history in", file=sys.stderr)
        yield
        return
    file = Path(state) / "legacy1bit" / name
    with contextlib.suppress(OSError):
        readline.read_history_file(file)
    readline.set_history_length(_HISTORY_LINES)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(file)
