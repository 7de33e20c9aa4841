"""What a command that fails says, and the status it ends with."""

# The status of a command that Ctrl-C has ended.
INTERRUPTED = 130


def describe(error: Exception) -> str:
    """Return what an error says, for somebody who need not know the language."""
    if isinstance(error, OSError) and error.strerror:
        names = [str(name) for name in (error.filename, error.filename2) if name is not None]
        return ": ".join([*names[-1:], error.strerror])
    if isinstance(error, MemoryError):
        return f"not enough memory: {error}" if str(error) else "not enough memory"
    return str(error)
