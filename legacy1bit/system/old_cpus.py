"""Packages whose wheels need a newer CPU than this package: importing them ends the process."""

import contextlib
import importlib
import os
import re
import sys

from legacy1bit.cpu import has_x86_64_v2
from legacy1bit.system.errors import refuse_import


def runs_here(package: str) -> bool:
    """Return whether importing a package leaves the process alive.

    On an old CPU a child process tries the import, because the instruction set of a wheel is not
    recorded anywhere. The child is a fork, which sees the same CPU under an emulator, too.
    """
    if has_x86_64_v2() or package in sys.modules or not hasattr(os, "fork"):
        return True
    import resource

    child = os.fork()
    if child == 0:
        try:
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            importlib.import_module(package)
        finally:
            # An error is raised again where the package is imported for good.
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return not os.WIFSIGNALED(status)


def check_numpy() -> None:
    """Refuse a NumPy that would end the process without a message.

    Raises
    ------
    ImportError
        With the version to install instead.
    SystemExit
        As ``refuse_import``.
    """
    if has_x86_64_v2():
        return
    # Loaded only here, because it takes longer than everything else in this module.
    import importlib.metadata

    version = ""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        version = importlib.metadata.version("numpy")
    # The wheels before 2.4 need only SSE3, and report that themselves.
    if (known := re.match(r"(\d+)\.(\d+)", version)) and tuple(map(int, known.groups())) < (2, 4):
        return
    if not runs_here("numpy"):
        refuse_import(
            f"NumPy {version} needs instructions that this CPU lacks (x86-64-v2, with SSE4.2): "
            "pip install 'numpy<2.4'"
        )
