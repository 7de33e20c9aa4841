"""What the CPU can run, asked without NumPy: that may need more than the CPU has."""

cdef extern from "cpu.h" nogil:
    bint cpu_has_x86_64_v2()


def has_x86_64_v2() -> bool:
    """Return whether the CPU has all of x86-64-v2 (SSE4.2, POPCNT, CX16, LAHF); other kinds do."""
    return cpu_has_x86_64_v2()
