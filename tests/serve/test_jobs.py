"""Events on their way from the threads of engines to the event loop."""

import asyncio
import threading

import pytest

from legacy1bit.serve.errors import ApiError
from legacy1bit.serve.jobs import Jobs, Mailbox
from legacy1bit.serve.requests import Finished, Piece


class Ticket:
    def __init__(self):
        self.cancelled = False

    def cancel(self):
        self.cancelled = True


class Engine:
    """Hands over the receivers of its requests."""

    def __init__(self):
        self.receivers, self.tickets = [], []

    def submit(self, on_event):
        self.receivers.append(on_event)
        self.tickets.append(Ticket())
        return self.tickets[-1]


def begin(engine, count, **settings):
    return Jobs(Mailbox(asyncio.get_running_loop()), [engine.submit] * count, **settings)


def test_loop_is_woken_once_for_all_that_is_there():
    woken, taken = [], []

    class Loop:
        def call_soon_threadsafe(self, call):
            woken.append(call)

    class Taker:
        def receive(self, index, event):
            taken.append((index, event))

    mailbox, taker = Mailbox(Loop()), Taker()
    for turn in range(3):
        for i in range(16):
            mailbox.put(taker, i, turn)
        assert len(woken) == turn + 1
        woken[-1]()
        assert taken == [(i, one) for one in range(turn + 1) for i in range(16)]


def test_no_event_is_lost_and_each_text_keeps_its_order():
    engine, count, length = Engine(), 4, 2000

    def work(receiver):
        for token in range(length):
            receiver(Piece("", token))
        receiver(Finished("length", 1, 0, length))

    async def collect():
        jobs, found = begin(engine, count, stream=True), {i: [] for i in range(count)}
        threads = [threading.Thread(target=work, args=(one,)) for one in engine.receivers]
        for thread in threads:
            thread.start()
        async for batch in jobs.batches():
            for index, event in batch:
                found[index].append(event.token if isinstance(event, Piece) else event.reason)
        return found

    found = asyncio.run(asyncio.wait_for(collect(), 60))
    assert all(one == [*range(length), "length"] for one in found.values())


@pytest.mark.parametrize("stream", [False, True])
def test_only_streams_are_told_before_the_end(stream):
    async def batches():
        engine, sizes = Engine(), []
        jobs = begin(engine, 2, stream=stream)

        async def listen():
            async for batch in jobs.batches():
                sizes.append(len(batch))

        listening = asyncio.ensure_future(listen())
        for event in (Piece("a", 1), Piece("b", 2), Finished("stop", 1)):
            for receiver in engine.receivers:
                receiver(event)
            for _ in range(5):
                await asyncio.sleep(0)
        await listening
        return sizes

    assert asyncio.run(asyncio.wait_for(batches(), 60)) == ([2, 2, 2] if stream else [6])


@pytest.mark.parametrize("reason", ["error", "cancelled"])
def test_a_fault_is_told_while_others_run(reason):
    async def fail():
        engine = Engine()
        jobs = begin(engine, 2, fault=400)
        engine.receivers[1](Finished(reason, 1, message="the weights are damaged"))
        with pytest.raises(ApiError) as caught:
            async for _ in jobs.batches():
                pass
        jobs.cancel()
        return caught.value, [ticket.cancelled for ticket in engine.tickets]

    error, cancelled = asyncio.run(asyncio.wait_for(fail(), 60))
    assert error.status == (400 if reason == "error" else 503)
    # The failed one has ended by itself.
    assert cancelled == [True, False]


def test_events_of_a_request_that_is_gone_disturb_nobody():
    async def go():
        engine, found = Engine(), []
        mailbox = Mailbox(asyncio.get_running_loop())
        jobs, others = (Jobs(mailbox, [engine.submit], stream=True) for _ in range(2))
        gone = asyncio.ensure_future(anext(jobs.batches()))
        await asyncio.sleep(0)
        # Cancelled, and not yet told so, when the loop delivers.
        gone.cancel()
        for receiver in engine.receivers:
            receiver(Finished("stop", 1))
        async for batch in others.batches():
            found += batch
        return found

    assert asyncio.run(asyncio.wait_for(go(), 60)) == [(0, Finished("stop", 1))]
