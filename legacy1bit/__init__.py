"""Small language models with weights of -1, 0 and 1, trained and run on an ordinary CPU.

The modules carry what the files of the same name carried in the C program *Legacy-1bit LLM*; start
with ``model``, ``forward`` and ``backward``, or type ``python -m legacy1bit.main``.
"""

import os
from typing import Any

from legacy1bit.system.errors import refuse_import
from legacy1bit.version import __version__

__all__ = ["__version__", "get_include", "set_simd_level", "simd_level", "simd_levels"]

try:
    from legacy1bit.system.old_cpus import check_numpy
except ModuleNotFoundError:
    # A folder of the source comes before an installed package in the folder above it.
    refuse_import(
        f"the package in {os.path.dirname(os.path.abspath(__file__))} is not compiled: make build, "
        "or use the command legacy1bit of an installed one"
    )

# Every module but a few imports NumPy.
check_numpy()


def get_include() -> str:
    """Return the folder of the C headers for Cython code that cimports from this package."""
    package = os.path.dirname(os.path.abspath(__file__))
    installed = os.path.join(package, "include")
    if os.path.isdir(installed):
        return installed
    return os.path.join(os.path.dirname(package), "include")


def __getattr__(name: str) -> Any:
    # The kernels are loaded, and LEGACY1BIT_SIMD obeyed, when they are first asked for: so the
    # command line can tell of a wrong name in its own words.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from legacy1bit import math_ops

    return getattr(math_ops, name)
