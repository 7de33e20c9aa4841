"""Where the library tells what it does: the logger ``legacy1bit``, which is silent by default."""

import contextlib
import logging
from collections.abc import Callable, Iterator

from legacy1bit.commands.progress import Output

logger = logging.getLogger("legacy1bit")
logger.addHandler(logging.NullHandler())


def output_of(check: Callable[[], None] = lambda: None) -> Output:
    """Return an output whose lines go to the logger.

    Parameters
    ----------
    check : callable
        Called while a text is read; what it raises ends that.
    """

    @contextlib.contextmanager
    def progress(description: str, total: int) -> Iterator[Callable[[int], None]]:
        logger.debug("%s: %d bytes", description, total)
        yield lambda done: check()

    return Output(lambda line: logger.info("%s", line), progress)
