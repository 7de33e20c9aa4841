"""How many tokens a second an engine generates for many clients at once, without HTTP.

``python -m benchmarks.serving``: each client asks again as soon as it has its text. A token's delay
is the time since the one before it, of the same text.
"""

import argparse
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


def main(argv: Sequence[str] | None = None, config: ModelConfig = SMALL) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__)
    parser.add_argument("--clients", type=int, nargs="+", default=CLIENTS, metavar="N")
    parser.add_argument("--seconds", type=float, default=5.0, metavar="X", help="default: 5")
    parser.add_argument("--threads", type=int, default=min(2, available_cores()), metavar="N")
    arguments = parser.parse_args(argv)
    model = PackedModel(create_legacy_llm(config, 0, trainable=False), head="int8")
    generator = Generator(model, threads=arguments.threads)
    print(f"{'clients':>8} {'tokens/s':>10} {'median':>10} {'99 %':>10}")
    for clients in arguments.clients:
        rate, middle, late = measure(generator, clients, arguments.seconds)
        print(f"{clients:8} {rate:10.0f} {1e3 * middle:7.2f} ms {1e3 * late:7.2f} ms", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
