"""Whole models: training, taking in a prompt, decoding, and the memory all that needs."""

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.measure import Benchmark, Call, package_environment
from benchmarks.peaks import MEMORY, peak_name
from legacy1bit.backward import BackwardPass
from legacy1bit.data.shards import TokenStore
from legacy1bit.dataset import TokenDataset
from legacy1bit.hyperparams import ModelConfig
from legacy1bit.inference import Decoder
from legacy1bit.model import (
    create_legacy_llm,
    create_legacy_llm_gradients,
    save_model,
    zero_legacy_llm_gradients,
)
from legacy1bit.optimizer import AdamW
from legacy1bit.packed import PackedModel

TRAINING = ModelConfig(
    model_dim=128, num_blocks=4, num_heads=4, ffn_multiplier=4, sequence_length=64
)
TRAINING_BATCH = 12

# The sizes of the C original, and the rate it trains at, for reference. Its work is less than ours:
# its tokens see only themselves.
C_SHAPE = ModelConfig(
    model_dim=256, num_blocks=2, num_heads=4, ffn_multiplier=4, sequence_length=128
)
C_BATCH, C_TOKENS_PER_SECOND = 8, 55.0

SMALL = ModelConfig(model_dim=512, num_blocks=8, num_heads=8, ffn_multiplier=4, sequence_length=256)
LARGE = ModelConfig(
    model_dim=2048, num_blocks=8, num_heads=16, ffn_multiplier=4, sequence_length=256
)
DECODED, PROMPT = 64, 128

_GENERATING = ModelConfig(
    model_dim=256, num_blocks=6, num_heads=4, ffn_multiplier=4, sequence_length=256
)

# The peak of a program that has ended is its parent's to ask, who must have had no other children.
_PEAK_OF = """
import resource, subprocess, sys
done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
if done.returncode:
    sys.exit(done.stderr.decode(errors="replace"))
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
print(peak if sys.platform == "darwin" else 1024 * peak)
"""


def training_step(config: ModelConfig, batch: int, threads: int) -> Call:
    """Return a call that does one step of training by AdamW."""
    rng = np.random.default_rng(0)
    model = create_legacy_llm(config, 0)
    gradients = create_legacy_llm_gradients(config)
    passes = BackwardPass(model, batch, config.sequence_length, threads)
    optimizer = AdamW(model)
    tokens = rng.integers(0, config.vocab_size, 100_000, np.int32)
    data = TokenDataset(TokenStore([tokens]), config.sequence_length, config.pad_token)

    def step() -> None:
        zero_legacy_llm_gradients(gradients)
        found = data.batch(optimizer.steps, batch, 0)
        passes.run(found.tokens, found.targets, gradients)
        optimizer.step(gradients, 1e-4, 1.0, threads)

    return step


def training(
    threads: int,
    config: ModelConfig = TRAINING,
    batch: int = TRAINING_BATCH,
    c_config: ModelConfig = C_SHAPE,
    c_batch: int = C_BATCH,
) -> Iterator[Benchmark]:
    """Yield training at our usual shape, and at the C original's."""
    yield Benchmark(
        "training",
        "tokens/s",
        float(batch * config.sequence_length),
        training_step(config, batch, threads),
        precisions=("int8", "bf16"),
    )
    yield Benchmark(
        "training, C's shape",
        "tokens/s",
        float(c_batch * c_config.sequence_length),
        training_step(c_config, c_batch, threads),
        precisions=("int8", "bf16"),
        known={"C original": C_TOKENS_PER_SECOND},
    )


def packed_model(config: ModelConfig, form: str) -> PackedModel:
    """Return a random model, packed."""
    return PackedModel(create_legacy_llm(config, 1, trainable=False), form)


def decode_call(decoder: Decoder, count: int = DECODED) -> Call:
    """Return a call that lets a model write so many tokens from scratch."""
    uniforms = np.random.default_rng(0).random(count)

    def decode() -> None:
        decoder.clear()
        decoder.generate([1], uniforms)

    return decode


def prompt_call(decoder: Decoder, count: int = PROMPT) -> Call:
    """Return a call that takes in a prompt of so many tokens."""
    tokens = np.arange(count, dtype=np.int32) % decoder.model.config.vocab_size

    def prompt() -> None:
        decoder.clear()
        decoder.prefill(tokens)

    return prompt


def token_bytes(packed: PackedModel) -> int:
    """Return how many bytes of weights decoding a token reads: all but the other embeddings."""
    return packed.nbytes - packed.parameters["embedding.weight"].nbytes


def decoding(
    threads: int,
    config: ModelConfig = SMALL,
    label: str = "25 M",
    forms: tuple[str, ...] = ("2bit", "trits"),
    decoded: int = DECODED,
    prompt: int = PROMPT,
    from_memory: bool = False,
) -> Iterator[Benchmark]:
    """Yield decoding and taking in a prompt, for each form of packing.

    Parameters
    ----------
    threads : int
    config : ModelConfig
    label : str
        The model's size, for the names.
    forms : tuple of str
    decoded, prompt : int
        How many tokens a call writes, or takes in; with a prompt of 0 only the first is measured.
    from_memory : bool
        Whether the weights are too large for the caches, so that reading them is the limit.
    """
    for form in forms:
        packed = packed_model(config, form)
        decoder = Decoder(packed, threads)
        yield Benchmark(
            f"decoding {label}, {form}",
            "tokens/s",
            float(decoded),
            decode_call(decoder, decoded),
            share_of=peak_name(MEMORY, threads) if from_memory else None,
            per_unit=1e-9 * token_bytes(packed),
        )
        if prompt:
            call = prompt_call(decoder, prompt)
            yield Benchmark(f"prompt {label}, {form}", "tokens/s", float(prompt), call)


def peak_memory(arguments: list[str]) -> int:
    """Return how many bytes Python with these arguments had resident at most.

    Raises
    ------
    subprocess.CalledProcessError
        If it fails.
    """
    done = subprocess.run(
        [sys.executable, "-c", _PEAK_OF, sys.executable, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env=package_environment(),
        check=True,
    )
    return int(done.stdout)


def memory(
    config: ModelConfig = _GENERATING, training_arguments: tuple[str, ...] = ()
) -> Iterator[tuple[str, int]]:
    """Yield the names and the peak bytes of the command line's own children.

    Parameters
    ----------
    config : ModelConfig
        Of the model that writes.
    training_arguments : tuple of str
        More options for the training; by default it is the default one, stopped after 2 steps,
        which have all the room that the others need.
    """
    with tempfile.TemporaryDirectory() as place:
        saved = Path(place, "model")
        save_model(create_legacy_llm(config, 1, trainable=False), saved)
        program = ["-m", "legacy1bit.main"]
        writing = ["generate", "--prompt", "Once", "--max-tokens", "64", "--seed", "0", "--model"]
        yield "memory: generate, 5 M", peak_memory([*program, *writing, str(saved)])
        options = ["--steps", "2", *training_arguments, "--out", str(Path(place, "run"))]
        yield "memory: default training", peak_memory([*program, "train", *options])
