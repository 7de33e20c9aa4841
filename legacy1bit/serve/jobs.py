"""What engines do for requests, on its way from their threads to the event loop."""

import asyncio
import contextlib
import math
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from functools import partial

from legacy1bit.serve.engine import Ticket
from legacy1bit.serve.errors import ApiError
from legacy1bit.serve.requests import Closed, Event, Finished, QueueFull


class Mailbox:
    """Events on their way to a loop, which is woken once for all that are there.

    Parameters
    ----------
    loop : asyncio.AbstractEventLoop
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._events: deque[tuple[Jobs, int, Event]] = deque()
        self._woken = False

    def put(self, jobs: "Jobs", index: int, event: Event) -> None:
        """Send an event, from any thread."""
        self._events.append((jobs, index, event))
        if not self._woken:
            self._woken = True
            # The loop may have ended before the engine.
            with contextlib.suppress(RuntimeError):
                self.loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        # First, so that an event that comes from now on wakes the loop again.
        self._woken = False
        events = self._events
        while events:
            jobs, index, event = events.popleft()
            jobs.receive(index, event)


class Jobs:
    """Requests on their way through an engine, and their events in the order of time.

    Parameters
    ----------
    mailbox : Mailbox
    submits : sequence of callable
        Each hands a request to an engine, with the receiver of its events.
    stream : bool
        Whether each event is of interest at once, or all when the requests are finished.
    fault : int
        The status of a request that fails on its way.

    Attributes
    ----------
    first : float
        When the first event came, by ``time.perf_counter``.

    Raises
    ------
    ApiError
        If they are refused.
    """

    def __init__(
        self,
        mailbox: Mailbox,
        submits: Sequence[Callable[[Callable[[Event], None]], Ticket]],
        stream: bool = False,
        fault: int = 500,
    ) -> None:
        self._loop, self._stream, self._fault = mailbox.loop, stream, fault
        self._events: list[tuple[int, Event]] = []
        self._ready = False
        self._waiter: asyncio.Future[None] | None = None
        self._tickets: dict[int, Ticket] = {}
        self._unfinished = len(submits)
        self.first = 0.0
        try:
            for index, submit in enumerate(submits):
                self._tickets[index] = submit(partial(mailbox.put, self, index))
        except QueueFull as error:
            self.cancel()
            after = {"retry-after": str(max(math.ceil(error.seconds), 1))}
            raise ApiError(str(error), 429, code="queue_full", headers=after) from None
        except Closed:
            self.cancel()
            raise stopping() from None
        except (IndexError, TypeError, ValueError) as error:
            self.cancel()
            raise ApiError(str(error), code="invalid_value") from None
        except BaseException:
            self.cancel()
            raise

    def receive(self, index: int, event: Event) -> None:
        """Take an event, in the loop."""
        if not self.first:
            self.first = time.perf_counter()
        self._events.append((index, event))
        if isinstance(event, Finished):
            self._unfinished -= 1
            self._ready |= not self._unfinished or event.reason in ("error", "cancelled")
        waiter, wanted = self._waiter, self._stream or self._ready
        if wanted and waiter is not None and not waiter.done():
            waiter.set_result(None)

    async def batches(self) -> AsyncGenerator[list[tuple[int, Event]], None]:
        """Yield what has happened, until all requests are finished. Raises ``ApiError``."""
        while self._tickets:
            if not (self._ready or (self._stream and self._events)):
                # As asyncio.Event, which takes twice the time, and there is one for each token.
                self._waiter = self._loop.create_future()
                await self._waiter
            batch, self._events = self._events, []
            for index, event in batch:
                if isinstance(event, Finished):
                    del self._tickets[index]
                    if event.reason == "error":
                        raise ApiError(event.message, self._fault, code="generation_failed")
                    if event.reason == "cancelled":
                        raise stopping()
            yield batch

    def cancel(self) -> None:
        """Stop what is not finished."""
        for ticket in self._tickets.values():
            ticket.cancel()


def stopping() -> ApiError:
    """Return how requests are refused when the server ends."""
    return ApiError("the server is stopping", 503, code="stopping", headers={"retry-after": "5"})
