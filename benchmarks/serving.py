"""How many tokens a second an engine generates for many clients at once.

``python -m benchmarks.serving`` asks an engine without HTTP; with ``--port N`` streaming clients
ask a server on this machine, this one or another of OpenAI's API. Each client asks again as soon as
it has its text. A token's delay is the time since the one before it, of the same text.
"""

import argparse
import asyncio
import json
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from benchmarks.models import SMALL
from legacy1bit.generator import Generator
from legacy1bit.hyperparams import ModelConfig
from legacy1bit.model import create_legacy_llm
from legacy1bit.packed import PackedModel
from legacy1bit.serve.engine import Engine
from legacy1bit.serve.requests import Event, Finished, GenerationRequest, Piece
from legacy1bit.threads import available_cores

CLIENTS = (1, 4, 16, 64)
PROMPT, SAMPLED = 64, 128


@dataclass
class Client:
    """Asks for one text after the other; called from the engine's thread.

    Attributes
    ----------
    delays : list of float
        Seconds between two tokens of a text.
    tokens : int
    """

    engine: Engine
    seed: int
    ended: threading.Event
    delays: list[float] = field(default_factory=list)
    tokens: int = 0
    last: float = 0.0

    def ask(self) -> None:
        """Send the next request."""
        rng = np.random.default_rng(self.seed)
        vocab = self.engine.generator.model.config.vocab_size
        prompt = rng.integers(0, vocab, PROMPT, np.int32)
        self.seed += 1000
        self.last = 0.0
        self.engine.submit(GenerationRequest(prompt, SAMPLED, seed=self.seed), self)

    def __call__(self, event: Event) -> None:
        if isinstance(event, Piece):
            now = time.perf_counter()
            if self.last:
                self.delays.append(now - self.last)
            self.last = now
            self.tokens += 1
        elif isinstance(event, Finished) and not self.ended.is_set():
            self.ask()


def measure(generator: Generator, clients: int, seconds: float) -> tuple[float, float, float]:
    """Return the tokens a second of all clients, and the median and 99th percentile of delays."""
    ended = threading.Event()
    with Engine(generator, clients) as engine:
        callers = [Client(engine, i, ended) for i in range(clients)]
        for caller in callers:
            caller.ask()
        time.sleep(0.2 * seconds)
        before, begin = sum(one.tokens for one in callers), time.perf_counter()
        time.sleep(seconds)
        tokens, end = sum(one.tokens for one in callers), time.perf_counter()
        ended.set()
    delays = np.concatenate([one.delays for one in callers])
    middle, late = np.percentile(delays, [50, 99])
    return (tokens - before) / (end - begin), float(middle), float(late)


@dataclass
class Stream:
    """A client of a server, over one connection for each text."""

    port: int
    rng: np.random.Generator
    delays: list[float] = field(default_factory=list)
    tokens: int = 0

    async def run(self) -> None:
        """Ask for one text after the other."""
        while True:
            letters = bytes(self.rng.integers(97, 123, PROMPT, np.uint8)).decode()
            seed = int(self.rng.integers(1 << 20))
            asked = {"prompt": letters, "max_tokens": SAMPLED, "stream": True, "seed": seed}
            body = json.dumps(asked).encode()
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
            writer.write(
                b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
                b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
            )
            writer.write(body)
            try:
                await self._read(reader)
            finally:
                writer.close()

    async def _read(self, reader: asyncio.StreamReader) -> None:
        last = 0.0
        while data := await reader.read(1 << 16):
            if data.startswith(b"HTTP/") and b" 200 " not in data[:20]:
                raise ValueError(f"the server answers {data[:200]!r}, expected status 200")
            if count := data.count(b'"text":'):
                now = time.perf_counter()
                if last:
                    self.delays += [now - last] + [0.0] * (count - 1)
                last, self.tokens = now, self.tokens + count


async def measure_server(port: int, clients: int, seconds: float) -> tuple[float, float, float]:
    """Return what ``measure`` does, of a server."""
    streams = [Stream(port, np.random.default_rng(i)) for i in range(clients)]
    tasks = [asyncio.create_task(one.run()) for one in streams]
    await asyncio.wait(tasks, timeout=0.2 * seconds)
    before, begin = sum(one.tokens for one in streams), time.perf_counter()
    await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
    tokens, end = sum(one.tokens for one in streams), time.perf_counter()
    for task in tasks:
        task.cancel()
    ended = await asyncio.gather(*tasks, return_exceptions=True)
    await asyncio.sleep(0)  # in which connections are closed
    for error in ended:
        if isinstance(error, Exception):
            raise error
    middle, late = np.percentile(np.concatenate([one.delays for one in streams]), [50, 99])
    return (tokens - before) / (end - begin), float(middle), float(late)


def main(argv: Sequence[str] | None = None, config: ModelConfig = SMALL) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__)
    parser.add_argument("--clients", type=int, nargs="+", default=CLIENTS, metavar="N")
    parser.add_argument("--seconds", type=float, default=5.0, metavar="X", help="default: 5")
    parser.add_argument("--threads", type=int, default=min(2, available_cores()), metavar="N")
    parser.add_argument("--port", type=int, metavar="N", help="of a server on this machine")
    arguments = parser.parse_args(argv)
    generator = None
    if arguments.port is None:
        model = PackedModel(create_legacy_llm(config, 0, trainable=False), head="int8")
        generator = Generator(model, threads=arguments.threads)
    print(f"{'clients':>8} {'tokens/s':>10} {'median':>10} {'99 %':>10}")
    for clients in arguments.clients:
        if generator is None:
            measured = asyncio.run(measure_server(arguments.port, clients, arguments.seconds))
        else:
            measured = measure(generator, clients, arguments.seconds)
        rate, middle, late = measured
        print(f"{clients:8} {rate:10.0f} {1e3 * middle:7.2f} ms {1e3 * late:7.2f} ms", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
