"""Packages whose wheels need a newer CPU than this one does: they end the process at import."""

import contextlib
import importlib
import os
import re
import resource
import sys

from legacy1bit.cpu import has_x86_64_v2
from legacy1bit.system.errors import refuse_import


def runs_here(package: str) -> bool:
    """Return whether importing a package leaves the process alive.

    Only an old CPU gives a reason to try, and a child process does: what a package was compiled for
    is not written anywhere. The child is a fork, which sees the same CPU under an emulator, too.
    """
    if has_x86_64_v2() or package in sys.modules:
        return True
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
    """Refuse a NumPy that would end the process without a word.

    Raises
    ------
    ImportError
        With what to install instead.
    SystemExit
        As ``refuse_import``.
    """
    if has_x86_64_v2():
        return
    # Loaded where it is needed: that takes longer than all else here.
    import importlib.metadata

    version = ""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        version = importlib.metadata.version("numpy")
    # The wheels before 2.4 need SSE3 alone, and tell of it themselves.
    if (known := re.match(r"(\d+)\.(\d+)", version)) and tuple(map(int, known.groups())) < (2, 4):
        return
    if not runs_here("numpy"):
        refuse_import(
            f"NumPy {version} needs instructions that this CPU lacks (x86-64-v2, with SSE4.2): "
            "pip install 'numpy<2.4'"
        )
