"""What the CPU is, asked without NumPy: that may need more than the CPU has."""

import os

cdef extern from "cpu.h" nogil:
    bint cpu_has_x86_64_v2()
    long cpu_cache_bytes(int level)


def has_x86_64_v2() -> bool:
    """Return whether the CPU has all of x86-64-v2 (SSE4.2, POPCNT, CX16, LAHF); other kinds do."""
    return cpu_has_x86_64_v2()


def cache_sizes() -> tuple:
    """Return the sizes of a core's first and second level data cache, in bytes.

    The environment variable LEGACY1BIT_CACHES names others, in KiB, as in ``32,512``. A CPU that
    does not say has 32 KiB and 256 KiB here.

    Returns
    -------
    (int, int)

    Raises
    ------
    ImportError
        If the variable is not two numbers, 4 to 1,048,576 each.
    """
    wanted = os.environ.get("LEGACY1BIT_CACHES", "")
    if not wanted:
        return cpu_cache_bytes(1) or 32 << 10, cpu_cache_bytes(2) or 256 << 10
    parts = wanted.split(",")
    if len(parts) != 2 or not all(part.isdecimal() and 4 <= int(part) <= 1 << 20
                                  for part in parts):
        raise ImportError(f"LEGACY1BIT_CACHES is {wanted!r}, expected the KiB of the first and the "
                          "second level, as in 32,512")
    first, second = parts
    return int(first) << 10, int(second) << 10
