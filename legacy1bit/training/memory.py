"""How much memory a training takes, and how much there is."""

import contextlib
import math
import resource
from pathlib import Path

from legacy1bit.backward import backward_bytes
from legacy1bit.forward import forward_bytes
from legacy1bit.hyperparams import ModelConfig, TrainingConfig
from legacy1bit.model import parameter_layout
from legacy1bit.system.cgroups import free_memory
from legacy1bit.training.evaluation import EVALUATION_TOKENS

_FLOAT = 4

# How many copies of the logits of a batch there are while they are compared with the truth.
_LOGIT_COPIES = 5


def training_bytes(model: ModelConfig, training: TrainingConfig) -> dict[str, int]:
    """Return how many bytes a training takes at most, by what they are for: the arrays.

    Parameters
    ----------
    model : ModelConfig
    training : TrainingConfig
    """
    layout = parameter_layout(model)
    sizes = {name: math.prod(shape) for name, shape, _ in layout}
    codes = sum(math.prod(shape) for _, shape, kind in layout if kind == "quantized")
    parameters = sum(sizes.values())
    shares = min(training.threads, training.batch_size)
    rows = -(-training.batch_size // shares)
    length = model.sequence_length
    sequence = backward_bytes(model, 1, length) + forward_bytes(
        model, 1, length, "inputs" if training.gradient_checkpointing else "all"
    )
    measured = max(EVALUATION_TOKENS, length)
    matrices = [math.prod(shape) for _, shape, _ in layout if len(shape) == 2]
    token = forward_bytes(model, 1, length, "none") // length
    look = measured * (token + _FLOAT * (_LOGIT_COPIES - 1) * model.vocab_size)
    return {
        "weights": _FLOAT * parameters + codes,
        "gradients": _FLOAT * parameters * shares,
        "the optimizer": _FLOAT * (2 * parameters + 3 * max(matrices)),
        "activations": shares * rows * sequence,
        # A checkpoint holds the weights and two moments, and is there once more while it is read.
        "looks and checkpoints": max(look, _FLOAT * 3 * parameters),
    }


def free_bytes() -> int | None:
    """Return how many bytes this process may still take, as far as the system tells."""
    found = []
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                found.append(1024 * int(line.split()[1]))
    found += free_memory()
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        with contextlib.suppress(OSError, ValueError):
            pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
            found.append(max(limit - pages * resource.getpagesize(), 0))
    return min(found, default=None)


def check_memory(model: ModelConfig, training: TrainingConfig) -> None:
    """Refuse a training that does not fit into memory.

    Raises
    ------
    MemoryError
        With the sum that shows it, and what makes it smaller.
    """
    needed, free = training_bytes(model, training), free_bytes()
    total = sum(needed.values())
    if free is None or total <= free:
        return
    parts = ", ".join(f"{name} {_shown(size)}" for name, size in needed.items())
    raise MemoryError(
        f"training takes about {_shown(total)} ({parts}), and {_shown(free)} are free: less of "
        "--batch-size, --sequence-length, --model-dim, --blocks or --threads takes less, and so "
        "does --gradient-checkpointing"
    )


def _shown(size: int) -> str:
    if size < 1 << 30:
        return f"{size / 2**20:,.0f} MiB"
    return f"{size / 2**30:,.1f} GiB"
