"""The memory that a training needs, and the memory that is free."""

import contextlib
from collections.abc import Mapping
from pathlib import Path

from legacy1bit.backward import backward_bytes
from legacy1bit.distributed.ranks import CHUNK
from legacy1bit.forward import forward_bytes
from legacy1bit.hyperparams import ModelConfig, TrainingConfig
from legacy1bit.layout import adapter_layout, parameter_layout
from legacy1bit.optimizer import moment_bytes
from legacy1bit.packed import packed_bytes
from legacy1bit.projection import scratch_bytes
from legacy1bit.system.cgroups import free_memory
from legacy1bit.training.adapters import adapter_config
from legacy1bit.training.evaluation import evaluation_tokens

try:
    import resource
except ImportError:
    # Windows: a process has no limits of its own.
    resource = None  # type: ignore[assignment]

_FLOAT = 4

# Copies of the logits while their loss is computed.
_LOGIT_COPIES = 5


def training_bytes(
    model: ModelConfig,
    training: TrainingConfig,
    teacher: ModelConfig | None = None,
    start: int = 0,
    ranks: int = 1,
) -> dict[str, int]:
    """Return an upper bound of the bytes of a training's arrays, by their purpose.

    Parameters
    ----------
    model : ModelConfig
    training : TrainingConfig
    teacher : ModelConfig, optional
        The settings of the model whose predictions are learned.
    start : int
        The bytes of a model that the training goes on from (``Start.nbytes``), until its weights
        are copied.
    ranks : int
        The processes that share the training; what one of them needs is returned.
    """
    adapter = adapter_config(training)
    layout = parameter_layout(model) if adapter is None else adapter_layout(model, adapter)
    codes = sum(part.size for part in layout if part.kind == "quantized")
    parameters = layout[-1].stop
    batch = -(-training.batch_size // ranks)
    slices = min(training.threads, batch)
    rows = -(-batch // slices)
    length = model.sequence_length
    sequence = backward_bytes(model, 1, length) + forward_bytes(
        model, 1, length, "inputs" if training.gradient_checkpointing else "all"
    )
    blended = codes if training.quantization_warmup else 0
    moments = moment_bytes(layout, training.optimizer_bits)
    sharing = 1 if training.local_steps else ranks
    matrices = [part.size for part in layout if len(part.shape) == 2]
    measured = evaluation_tokens(model, length)
    token = forward_bytes(model, 1, length, "none") // length
    evaluation = measured * (token + _FLOAT * (_LOGIT_COPIES - 1) * model.vocab_size)
    # A checkpoint holds the weights and two moments, twice while it is read.
    checkpoint = _FLOAT * parameters + moments
    needed = {
        "weights": _FLOAT * (parameters + blended) + codes,
        "gradients": _FLOAT * parameters * slices,
        "the optimizer": -(-moments // sharing) + _FLOAT * 3 * max(matrices),
        "activations": slices * rows * sequence,
        "evaluation and checkpoints": max(evaluation, checkpoint, start),
    }
    if adapter is not None:
        # The model, and what is unpacked of it at a time.
        widest = max(model.model_dim, model.ffn_dim, model.query_dim)
        needed["the model"] = packed_bytes(model) + slices * scratch_bytes(
            rows * length, widest, widest, adapter.rank
        )
        needed["evaluation and checkpoints"] = max(evaluation, checkpoint)
    if teacher is not None:
        logits = _FLOAT * rows * length * teacher.vocab_size
        passes = logits + forward_bytes(teacher, rows, length, "none")
        needed["the teacher"] = model_bytes(teacher) + slices * passes
    if ranks > 1:
        # A rank's share has whole matrices; and what it receives at a time.
        needed["the optimizer"] += 2 * _FLOAT * max(matrices)
        needed["exchanges"] = _FLOAT * min(parameters, ranks * CHUNK)
        if training.gradient_compression != "none":
            # What codes have left out, and the codes of two exchanges.
            needed["exchanges"] = (_FLOAT + 3) * parameters
    if training.local_steps:
        # The weights of the last meeting, their change, and its momentum.
        needed["the outer optimizer"] = 3 * _FLOAT * parameters
    return needed


def model_bytes(model: ModelConfig) -> int:
    """Return the bytes of a model's weights without latent ones."""
    return sum(
        part.size if part.kind == "quantized" else _FLOAT * part.size
        for part in parameter_layout(model)
    )


def free_bytes() -> int | None:
    """Return the bytes that this process may still allocate, or None where that is unknown."""
    limits = []
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                limits.append(1024 * int(line.split()[1]))
    limits += free_memory()
    if resource is not None:
        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        if limit != resource.RLIM_INFINITY:
            with contextlib.suppress(OSError, ValueError):
                pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
                limits.append(max(limit - pages * resource.getpagesize(), 0))
    return min(limits, default=None)


def check_memory(needed: Mapping[str, int], training: TrainingConfig, processes: int = 1) -> None:
    """Check that a training fits into memory.

    Parameters
    ----------
    needed : mapping of str to int
        The result of ``training_bytes``.
    training : TrainingConfig
    processes : int
        How many of this machine need as much.

    Raises
    ------
    MemoryError
        If it does not; with the bytes of each part, and options that need less.
    """
    free = free_bytes()
    if free is None or processes * sum(needed.values()) <= free:
        return
    each = f" in each of {processes} ranks here" if processes > 1 else ""
    fewer = "" if training.optimizer_bits == 8 else " or --optimizer-bits 8"
    raise MemoryError(
        f"training needs {told_bytes(needed)}{each}, and {_format_bytes(free)} are free: lower "
        "--batch-size, --sequence-length, --model-dim, --blocks or --threads, or use "
        f"--gradient-checkpointing{fewer}"
    )


def told_bytes(needed: Mapping[str, int]) -> str:
    """Return the result of ``training_bytes`` in words: the sum, and its parts."""
    parts = ", ".join(f"{name} {_format_bytes(size)}" for name, size in needed.items())
    return f"about {_format_bytes(sum(needed.values()))} ({parts})"


def _format_bytes(size: int) -> str:
    if size < 1 << 30:
        return f"{size / 2**20:,.{0 if size >= 10 << 20 else 1}f} MiB"
    return f"{size / 2**30:,.1f} GiB"
