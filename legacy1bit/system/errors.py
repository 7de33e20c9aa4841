"""Error messages of one line, and the exit status of a command that fails."""

import os
import re
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn

# The exit status after Ctrl-C.
INTERRUPTED = 130
# What ends a program from outside; Windows has no SIGHUP.
END_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)
)

# Longer messages are cut in the middle: a file may have a value of a megabyte.
_LONGEST = 2000


class SettingError(ValueError):
    """A setting has a value that does not fit, alone or with another.

    Parameters
    ----------
    message : str
    names : str
        The settings in the message, by their names in the records; options may have other names.

    Attributes
    ----------
    place : str or None
        The file that they come from.
    """

    def __init__(self, message: str, *names: str) -> None:
        super().__init__(message, *names)
        self.place: str | None = None

    def __str__(self) -> str:
        return self.named(lambda _: None)

    def named(self, option_of: Callable[[str], str | None]) -> str:
        """Return the message with the names of options, and with the file unless all are options.

        Parameters
        ----------
        option_of : callable
            Takes a setting's name and returns its option, or None to keep the name.
        """
        message, *names = self.args
        options = [option_of(name) for name in names]
        for name, option in zip(names, options, strict=True):
            if option is not None:
                message = re.sub(rf"(?<![\w-]){re.escape(name)}(?![\w-])", option, message, count=1)
        inside = self.place is not None and None in options
        return f"{self.place}: {message}" if inside else message


def describe(error: Exception) -> str:
    """Return the message of an error, for users who do not know Python."""
    if isinstance(error, OSError) and error.strerror:
        names = [str(name) for name in (error.filename, error.filename2) if name is not None]
        return ": ".join([*names[-1:], error.strerror])
    if isinstance(error, MemoryError):
        return f"not enough memory: {error}" if str(error) else "not enough memory"
    text = str(error)
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"
    return text


def refuse_import(message: str) -> NoReturn:
    """Raise ``ImportError``; where the package is the program, end it with one line instead."""
    # `python -m legacy1bit.main` imports the package before it sets the name of the program.
    if sys.argv[0] == "-m" or os.path.basename(sys.argv[0]) == "legacy1bit":
        print(f"legacy1bit: error: {message}", file=sys.stderr)
        raise SystemExit(2)
    raise ImportError(message)


def one_line(error: Exception) -> str:
    """Return the message of another library's error on one line."""
    return " ".join(str(error).split())


def format_value(value: Any) -> str:
    """Return a value for an error message; Python does not spell numbers of too many digits."""
    try:
        return repr(value)
    except ValueError:
        return f"a number of more than {sys.get_int_max_str_digits()} digits"
