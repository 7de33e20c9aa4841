"""The memory that a training needs, and the memory that is free."""

import contextlib
import resource
from pathlib import Path

from legacy1bit.backward import backward_bytes
from legacy1bit.forward import forward_bytes
from legacy1bit.hyperparams import ModelConfig, TrainingConfig
from legacy1bit.layout import parameter_layout
from legacy1bit.system.cgroups import free_memory
from legacy1bit.training.evaluation import EVALUATION_TOKENS

_FLOAT = 4

# Copies of the logits while their loss is computed.
_LOGIT_COPIES = 5


def training_bytes(model: ModelConfig, training: TrainingConfig) -> dict[str, int]:
    """Return an upper bound of the bytes of a training's arrays, by their purpose.

    Parameters
    ----------
    model : ModelConfig
    training : TrainingConfig
    """
    layout = parameter_layout(model)
    codes = sum(part.size for part in layout if part.kind == "quantized")
    parameters = layout[-1].stop
    slices = min(training.threads, training.batch_size)
    rows = -(-training.batch_size // slices)
    length = model.sequence_length
    sequence = backward_bytes(model, 1, length) + forward_bytes(
        model, 1, length, "inputs" if training.gradient_checkpointing else "all"
    )
    measured = max(EVALUATION_TOKENS, length)
    matrices = [part.size for part in layout if len(part.shape) == 2]
    token = forward_bytes(model, 1, length, "none") // length
    evaluation = measured * (token + _FLOAT * (_LOGIT_COPIES - 1) * model.vocab_size)
    return {
        "weights": _FLOAT * parameters + codes,
        "gradients": _FLOAT * parameters * slices,
        "the optimizer": _FLOAT * (2 * parameters + 3 * max(matrices)),
        "activations": slices * rows * sequence,
        # A checkpoint holds the weights and two moments, twice while it is read.
        "evaluation and checkpoints": max(evaluation, _FLOAT * 3 * parameters),
    }


def free_bytes() -> int | None:
    """Return the bytes that this process may still allocate, or None where that is unknown."""
    limits = []
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                limits.append(1024 * int(line.split()[1]))
    limits += free_memory()
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        with contextlib.suppress(OSError, ValueError):
            pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
            limits.append(max(limit - pages * resource.getpagesize(), 0))
    return min(limits, default=None)


def check_memory(model: ModelConfig, training: TrainingConfig) -> None:
    """Check that a training fits into memory.

    Raises
    ------
    MemoryError
        If it does not; with the bytes of each part, and options that need less.
    """
    needed, free = training_bytes(model, training), free_bytes()
    total = sum(needed.values())
    if free is None or total <= free:
        return
    parts = ", ".join(f"{name} {_format_bytes(size)}" for name, size in needed.items())
    raise MemoryError(
        f"training needs about {_format_bytes(total)} ({parts}), and {_format_bytes(free)} are "
        "free: lower --batch-size, --sequence-length, --model-dim, --blocks or --threads, or use "
        "--gradient-checkpointing"
    )


def _format_bytes(size: int) -> str:
    if size < 1 << 30:
        return f"{size / 2**20:,.0f} MiB"
    return f"{size / 2**30:,.1f} GiB"
