"""Standard error, which may be unwritable: that does not end a command."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO, cast


def unfailing(stream: TextIO | None) -> TextIO:
    """Return a stream that drops text which cannot be written, unless its reader has left.

    Parameters
    ----------
    stream : TextIO or None
        None: a closed one, for which print would take standard output.
    """
    return cast(TextIO, _Unfailing(stream or open(os.devnull, "w")))


def say(line: str) -> None:
    """Write a line, or several, to standard error, at once: a reader may leave after one."""
    print(f"{line}\n", end="", file=sys.stderr)


class _Unfailing:
    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write a text; nothing where the device is full or the stream closed."""
        with _without_failure():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Write buffered text, as far as that is possible."""
        with _without_failure():
            self._stream.flush()


@contextlib.contextmanager
def _without_failure() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except (OSError, ValueError):
        pass
