"""Arguments of Python functions that are the options of a command, under the same names.

``--batch-size 8`` is ``batch_size=8``. Nothing is listed twice: names, kinds and choices are those
of the command's own parser.
"""

import argparse
import contextlib
import difflib
import keyword
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from types import ModuleType
from typing import Any

from legacy1bit.commands.names import nearest_option
from legacy1bit.commands.options import option_typed
from legacy1bit.commands.texts import TextsAction, texts_of_python
from legacy1bit.system.errors import SettingError

_WORDS = {int: "a whole number", float: "a number"}


def arguments_of(
    command: ModuleType, settings: Mapping[str, Any], without: Collection[str] = ()
) -> argparse.Namespace:
    """Return the arguments of a command, as its parser would.

    Parameters
    ----------
    command : module
        With ``add_arguments``; no option is required.
    settings : mapping of str to Any
        By the names of options with underscores; None: not given.
    without : collection of str
        Options that Python code does not have.

    Raises
    ------
    TypeError
        If a name is unknown; the message has the nearest one. If a value is of another kind.
    ValueError
        If a value is not one of an option's choices.
    """
    parser = argparse.ArgumentParser(add_help=False)
    command.add_arguments(parser)
    actions = {_argument_of(action.option_strings[0]): action for action in parser._actions}
    check_names(settings, [name for name in actions if name not in without])
    arguments = parser.parse_args([])
    for name, value in settings.items():
        if value is not None:
            setattr(arguments, actions[name].dest, _fitting(name, actions[name], value))
    return arguments


def _argument_of(option: str) -> str:
    name = option.lstrip("-").replace("-", "_")
    return f"{name}_" if keyword.iskeyword(name) else name


def check_names(given: Iterable[str], known: Iterable[str]) -> None:
    """Raise ``TypeError`` with the nearest known name if a name is unknown."""
    known = list(known)
    options = [name.replace("_", "-") for name in known]
    for name in (name for name in given if name not in known):
        near = nearest_option(name, options)
        known_one = near or difflib.get_close_matches(name, options, 1, cutoff=0.0)[0]
        raise TypeError(f"unknown argument {name}: the nearest is {_argument_of(known_one)}")


def _fitting(name: str, action: argparse.Action, value: Any) -> Any:
    """Return a value as the parser would have made it of text."""
    kind = action.type
    if isinstance(action, TextsAction):
        try:
            return texts_of_python(value)
        except TypeError:
            raise TypeError(
                f"{name} is {value!r}, expected a path, or several, or pairs of a path and a weight"
            ) from None
    if isinstance(action, (argparse._ExtendAction, argparse._AppendAction)):
        values = [value] if isinstance(value, (str, os.PathLike)) else value
        try:
            return [os.fspath(one) for one in values]
        except TypeError:
            raise TypeError(f"{name} is {value!r}, expected a path, or several") from None
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise TypeError(f"{name} is {value!r}, expected true or false")
    elif kind is int or kind is float:
        if isinstance(value, bool) or not isinstance(value, int if kind is int else (int, float)):
            raise TypeError(f"{name} is {value!r}, expected {_WORDS[kind]}")
        return kind(value)
    elif kind is None or kind is str:
        if not isinstance(value, str):
            raise TypeError(f"{name} is {value!r}, expected text")
        if action.choices is not None and value not in action.choices:
            expected = ", ".join(action.choices)
            raise ValueError(f"{name} is {value!r}, expected one of {expected}")
    else:
        if not isinstance(value, (str, os.PathLike)):
            raise TypeError(f"{name} is {value!r}, expected a path")
        assert callable(kind)
        try:
            return kind(os.fspath(value))
        except argparse.ArgumentTypeError as error:
            raise ValueError(f"{name} {error}") from None
    return value


@contextlib.contextmanager
def naming_arguments(
    arguments: argparse.Namespace | None = None,
    kinds: tuple[type[Exception], ...] = (ValueError, TypeError, MemoryError),
) -> Iterator[None]:
    """Let errors name arguments where those of the command line name options: steps, not --steps.

    Parameters
    ----------
    arguments : Namespace, optional
        Of ``arguments_of``, where errors may be about settings.
    kinds : tuple of types
        Of the errors; others are not the package's own.
    """
    try:
        yield
    except kinds as error:
        if arguments is not None and isinstance(error, SettingError):
            error.args = (error.named(lambda name: option_typed(arguments, name)),)
            error.place = None
        if error.args and isinstance(error.args[0], str):
            error.args = (
                _OPTION.sub(lambda option: _argument_of(option[0]), error.args[0]),
                *error.args[1:],
            )
        raise


_OPTION = re.compile(r"(?<![\w-])--[a-z][a-z\d-]*")
