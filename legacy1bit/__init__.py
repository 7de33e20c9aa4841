"""Small language models with weights of -1, 0 and 1, trained and run on an ordinary CPU.

The modules carry what the files of the same name carried in the C program *Legacy-1bit LLM*; start
with ``model``, ``forward`` and ``backward``, or type ``python -m legacy1bit.main``.
"""

from legacy1bit.math_ops import set_simd_level, simd_level, simd_levels

__all__ = ["__version__", "set_simd_level", "simd_level", "simd_levels"]

__version__ = "0.1.0"
