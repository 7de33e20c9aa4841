"""Small language models with weights of -1, 0 and 1, trained and run on an ordinary CPU.

The modules are named after the files of the C program *Legacy-1bit LLM*; start with ``model``,
``forward`` and ``backward``, or type ``legacy1bit``.
"""

import os
from typing import Any

from legacy1bit.system.errors import refuse_import
from legacy1bit.version import __version__

__all__ = ["__version__", "get_include", "set_simd_level", "simd_level", "simd_levels"]

try:
    from legacy1bit.system.old_cpus import check_numpy
except ModuleNotFoundError:
    # In the folder of the source, the source hides an installed package.
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
    # The kernels are loaded, and LEGACY1BIT_SIMD is read, at the first use: the command line can
    # report a wrong name then.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from legacy1bit import math_ops

    return getattr(math_ops, name)
