"""Small language models with weights of -1, 0 and 1, trained and run on an ordinary CPU.

The modules carry what the files of the same name carried in the C program *Legacy-1bit LLM*; start
with ``model``, ``forward`` and ``backward``, or type ``python -m legacy1bit.main``.
"""

from typing import Any

from legacy1bit.version import __version__

__all__ = ["__version__", "set_simd_level", "simd_level", "simd_levels"]


def __getattr__(name: str) -> Any:
    # The kernels are loaded, and LEGACY1BIT_SIMD obeyed, when they are first asked for: so the
    # command line can tell of a wrong name in its own words.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from legacy1bit import math_ops

    return getattr(math_ops, name)
