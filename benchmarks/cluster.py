"""How long a step takes on several ranks: measured, and predicted for others.

    mpirun -n 2 python -m benchmarks.cluster measure
    python -m benchmarks.cluster predict

``measure`` trains some steps under mpirun, and times exchanges of several sizes, to which it fits
latency and bandwidth. ``predict`` computes the time of a step of N ranks from a model: each rank
computes its part of the batch and of the update; then it sends and receives (N - 1) / N of all
gradients and, in another exchange, of all weights::

    step = 6 P tokens / (N rate) + P update / N + P quantize + 2 (N - 1) latency
         + P (gradient bytes + weight bytes) (N - 1) / N / bandwidth
"""

import argparse
import contextlib
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from legacy1bit.data.corpus import text_corpus
from legacy1bit.distributed.ranks import Ranks, joined
from legacy1bit.hyperparams import OPTIMIZERS, ModelConfig, TrainingConfig
from legacy1bit.training.trainer import Trainer

# Bytes of a number that is exchanged: of a gradient, and of a weight. Blocks of 256 have a scale.
_CODE = 1 + 4 / 256
BYTES = {"none": (4.0, 4.0), "8bit": (_CODE, _CODE), "1bit": (1 / 8 + 4 / 256, _CODE)}

# Tokens of a step of models by their parameters.
TOKENS = {10_000_000: 1 << 15, 100_000_000: 1 << 17, 1_000_000_000: 1 << 19}
RANKS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Machine:
    """What a rank computes and how it is connected.

    Attributes
    ----------
    rate : float
        Operations per second of forward and backward pass, 6 for each parameter and token.
    update, quantize, coding : float
        Seconds for each weight: of the optimizer, of the codes that every rank takes anew, and of
        a code and its decoding.
    latency : float
        Seconds of a message.
    bandwidth : float
        Bytes per second, in each direction.
    """

    rate: float
    update: float
    quantize: float
    coding: float
    latency: float
    bandwidth: float

    def step(
        self, parameters: int, tokens: int, ranks: int, compression: str = "none", local: int = 1
    ) -> tuple[float, float]:
        """Return the seconds of a step, computing and exchanging; of ``local`` steps on average."""
        own = 1 if local > 1 else ranks
        computing = 6.0 * parameters * tokens / (ranks * self.rate)
        computing += parameters * (self.update / own + self.quantize)
        if ranks == 1:
            return computing, 0.0
        moved = parameters * sum(BYTES[compression]) * (ranks - 1) / ranks
        exchanging = 2 * (ranks - 1) * self.latency + moved / self.bandwidth
        if compression != "none":
            exchanging += 2 * parameters * self.coding
        return computing, exchanging / local


def fitted(sizes: Sequence[float], seconds: Sequence[float]) -> tuple[float, float]:
    """Return latency and bandwidth of exchanges: least squares of relative errors."""
    x, y = np.asarray(sizes, float), np.asarray(seconds, float)
    rows = np.stack([np.ones(x.size), x], axis=1) / y[:, None]
    (latency, per_byte), *_ = np.linalg.lstsq(rows, np.ones(x.size), rcond=None)
    return max(float(latency), 0.0), 1.0 / max(float(per_byte), 1e-15)


def timed_exchanges(ranks: Ranks) -> tuple[list[float], list[float]]:
    """Return how many bytes a rank sends in exchanges of several sizes, and the seconds of each."""
    sizes, seconds = [], []
    for power in (8, 12, 16, 20, 22):
        count = ranks.size << power
        values, bounds = np.ones(count, np.float32), np.arange(ranks.size + 1) << power
        best = float("inf")
        for _ in range(4):
            ranks.any(False)
            begin = time.perf_counter()
            ranks.reduce(values, bounds)
            ranks.gather(values, bounds)
            best = min(best, time.perf_counter() - begin)
        sizes.append(2.0 * 4 * (count - (1 << power)))
        seconds.append(max(ranks.collect(best)))
    return sizes, seconds


def timed_steps(ranks: Ranks, arguments: argparse.Namespace) -> tuple[Trainer, float, float]:
    """Train for a while; return the trainer, and the seconds of a step and of its exchanges."""
    config = ModelConfig(
        model_dim=arguments.width,
        num_blocks=arguments.blocks,
        num_heads=max(arguments.width // 64, 1),
        sequence_length=arguments.length,
    )
    text = np.random.default_rng(0).integers(32, 127, 200_000, np.uint8).tobytes()
    training = TrainingConfig(
        steps=1_000_000,
        batch_size=arguments.batch,
        optimizer=arguments.optimizer,
        threads=arguments.threads,
        gradient_compression=arguments.compression,
        local_steps=arguments.local_steps,
    )
    corpus = text_corpus(text, "random", config.sequence_length, config.pad_token)
    folder = Path(tempfile.gettempdir())
    trainer = Trainer(folder, config, training, corpus, {"name": "random"}, ranks=ranks)
    with contextlib.closing(trainer):
        trainer.train_step()
        before, begin, steps, passed = trainer.ranks.seconds, time.perf_counter(), 0, 0.0
        while passed < arguments.seconds:
            trainer.train_step()
            steps += 1
            if arguments.local_steps and steps % arguments.local_steps == 0:
                trainer.meet()
            passed = ranks.broadcast(time.perf_counter() - begin)
    return trainer, passed / steps, (trainer.ranks.seconds - before) / steps


def measure(arguments: argparse.Namespace) -> None:
    """Print the speed of training on the ranks that there are, and that of their exchanges."""
    with joined() as ranks:
        trainer, step, exchanging = timed_steps(ranks, arguments)
        every = ranks.collect((ranks.host, step, exchanging))
        tokens = arguments.batch * arguments.length
        sizes, seconds = timed_exchanges(ranks) if ranks.size > 1 else ([], [])
        if not ranks.is_first:
            return
        print(f"{trainer.model.num_parameters:,} parameters, {tokens:,} tokens a step")
        print(f"{tokens / step:,.0f} tokens/s")
        for rank, (host, whole, part) in enumerate(every):
            print(f"rank {rank} on {host}: {whole:.3f} s a step, {part:.3f} s of it in exchanges")
        for size, time_of in zip(sizes, seconds, strict=True):
            print(f"{size:>14,.0f} bytes {time_of * 1e3:10.2f} ms")
        if sizes:
            latency, bandwidth = fitted(sizes, seconds)
            print(f"latency {latency * 1e6:.0f} us, bandwidth {bandwidth / 1e6:.0f} MB/s")


def predict(arguments: argparse.Namespace) -> None:
    """Print a table of efficiencies: tokens per second over those of as many ranks alone."""
    kinds = [("none", 1), ("8bit", 1), ("1bit", 1), ("none", arguments.local_steps or 50)]
    print(f"| parameters | Gbit/s | exchange | {' | '.join(map(str, RANKS))} |")
    print(f"| ---: | ---: | --- |{' ---: |' * len(RANKS)}")
    for parameters, tokens in TOKENS.items():
        for gigabits in (1, 10, 100):
            machine = Machine(
                arguments.rate * 1e9,
                arguments.update * 1e-9,
                arguments.quantize * 1e-9,
                arguments.coding * 1e-9,
                arguments.latency * 1e-6,
                gigabits * 1e9 / 8 * arguments.share,
            )
            alone = sum(machine.step(parameters, tokens, 1))
            for compression, local in kinds:
                times = [
                    sum(machine.step(parameters, tokens, ranks, compression, local))
                    for ranks in RANKS
                ]
                shares = [
                    f"{alone / ranks / each:.2f}" for ranks, each in zip(RANKS, times, strict=True)
                ]
                name = f"{local} local steps" if local > 1 else compression
                print(f"| {parameters:,} | {gigabits} | {name} | {' | '.join(shares)} |")


def main(words: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="benchmarks.cluster", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("what", choices=("measure", "predict"))
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--compression", choices=tuple(BYTES), default="none")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="muon")
    parser.add_argument("--local-steps", type=int, default=0)
    for name, default, what in (
        ("rate", 476.0, "10^9 operations per second of a rank"),
        ("update", 47.0, "nanoseconds of the optimizer for each weight"),
        ("quantize", 2.0, "nanoseconds of quantization for each weight"),
        ("coding", 2.5, "nanoseconds of a code for each weight"),
        ("latency", 35.0, "microseconds of a message"),
        ("share", 0.95, "of a link's nominal bandwidth"),
    ):
        parser.add_argument(f"--{name}", type=float, default=default, help=what)
    arguments = parser.parse_args(words)
    {"measure": measure, "predict": predict}[arguments.what](arguments)


if __name__ == "__main__":
    main()
