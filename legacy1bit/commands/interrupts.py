"""How a command is stopped: the first Ctrl-C lets it save, the second ends it at once."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable

from legacy1bit.system.errors import END_SIGNALS


class Interrupts:
    """Turn the first Ctrl-C, SIGTERM or SIGHUP into a request to stop; the second acts at once.

    Outside the main thread, where Python handles no signals, nothing is installed.

    Parameters
    ----------
    answer : callable, optional
        Called at the first signal, from a thread of its own, because the main thread may be in a
        kernel; from the main thread if the system gives no more threads.

    Attributes
    ----------
    requested : bool
        Whether the first signal has come.
    """

    def __init__(self, answer: Callable[[], None] = lambda: None) -> None:
        self.requested = False
        self._answer = answer
        self._watcher: threading.Thread | None = None

    def __enter__(self) -> "Interrupts":
        self._installed = threading.current_thread() is threading.main_thread()
        if not self._installed:
            return self
        # None: a handler installed by another language, which Python cannot restore.
        self._before = {
            number: signal.signal(number, self._request)
            for number in (signal.SIGINT, *END_SIGNALS)
            if signal.getsignal(number) not in (signal.SIG_IGN, None)
        }
        # Python's C handler writes a byte there for every signal, whatever the main thread does.
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._earlier = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        watcher = threading.Thread(target=self._watch, name="signals", daemon=True)
        with contextlib.suppress(RuntimeError):
            watcher.start()
            self._watcher = watcher
        return self

    def __exit__(self, *_: object) -> None:
        if not self._installed:
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._earlier)
        os.close(self._write)
        if self._watcher is not None:
            self._watcher.join()
        os.close(self._read)

    def _watch(self) -> None:
        answered = False
        while number := os.read(self._read, 1):
            if number[0] in self._before and not answered:
                answered = True
                self._answer()

    def _request(self, *_: object) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        if self._watcher is None:
            # The same file may be in the middle of a write, which refuses a second one.
            with contextlib.suppress(RuntimeError):
                self._answer()
