"""Packages that some of what there is needs, and that are not installed with it."""

import importlib
from typing import Any


def load_extra(who: str, package: str, *modules: str) -> Any:
    """Return a package, some modules of it imported.

    Parameters
    ----------
    who : str
        What needs it, with its verb: the beginning of the message.
    package : str
        Its name here and where it is installed from.
    modules : str
        Names within the package.

    Raises
    ------
    ValueError
        If it is not installed.
    """
    try:
        found = importlib.import_module(package)
        for name in modules:
            importlib.import_module(f"{package}.{name}")
    except ImportError as error:
        raise ValueError(
            f"{who} {package}, which is not installed: pip install {package} ({error})"
        ) from None
    return found
