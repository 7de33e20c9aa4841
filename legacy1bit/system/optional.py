"""Optional packages, which are not installed with this one."""

import importlib
from typing import Any


def load_extra(who: str, package: str, *modules: str) -> Any:
    """Return a package, with some of its modules imported.

    Parameters
    ----------
    who : str
        Subject and verb of the message, such as "tune needs".
    package : str
        Its name, for import and for pip.
    modules : str
        Names within the package.

    Raises
    ------
    ValueError
        If it is not installed.
    """
    try:
        loaded = importlib.import_module(package)
        for name in modules:
            importlib.import_module(f"{package}.{name}")
    except ImportError as error:
        raise ValueError(
            f"{who} {package}, which is not installed: pip install {package} ({error})"
        ) from None
    return loaded
