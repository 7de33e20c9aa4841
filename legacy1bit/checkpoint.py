"""What a training run goes on from: its latent weights, the optimizer's moments, and where it was.

A run keeps its newest checkpoint and the one before. Each has a checksum, so that one which the
disk has damaged is known, and the other is taken.
"""

import json
import math
import sys
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from legacy1bit.errors import one_line
from legacy1bit.files import atomic_copy, atomic_write, open_regular, serialize_tensors
from legacy1bit.hyperparams import ModelConfig
from legacy1bit.model import ModelFileError

CHECKPOINT_FILE = "checkpoint.safetensors"
EARLIER_FILE = "earlier.safetensors"
BEST_FOLDER = "best"

_MOST_STEPS = 1 << 40

_TENSORS = ("weights", "first", "second")

# What reading a damaged file can raise, in the libraries that read it.
DAMAGE = (
    SafetensorError,
    AttributeError,
    KeyError,
    OverflowError,
    RecursionError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True)
class Checkpoint:
    """A moment of a training run.

    Attributes
    ----------
    step : int
        Updates done so far.
    seconds : float
        How long they took.
    best : (float, int)
        The lowest loss so far, and the step it was measured after.
    position : tuple of int
        Where in the data the next batch begins.
    weights, first, second : float32[parameters]
        The latent weights, and the optimizer's moments.
    path : Path, optional
        Where it was read.
    """

    step: int
    seconds: float
    best: tuple[float, int]
    position: tuple[int, ...]
    weights: npt.NDArray[np.float32]
    first: npt.NDArray[np.float32]
    second: npt.NDArray[np.float32]
    path: Path | None = None


def write_checkpoint(folder: Path, checkpoint: Checkpoint, model_config: ModelConfig) -> None:
    """Write the newest checkpoint of a run, and keep the one that was it.

    Raises
    ------
    OSError
        If it cannot be written; what was there stays.
    """
    header = {
        "model": json.dumps(model_config.to_dict()),
        "step": str(checkpoint.step),
        "seconds": repr(checkpoint.seconds),
        "best": json.dumps(checkpoint.best),
        "position": json.dumps(checkpoint.position),
    }
    tensors = {name: getattr(checkpoint, name) for name in _TENSORS}
    header["crc32"] = _checksum(header, tensors)
    path = folder / CHECKPOINT_FILE
    if path.exists():
        atomic_copy(path, folder / EARLIER_FILE)
    atomic_write(path, serialize_tensors(tensors, header))


def _checksum(header: Mapping[str, str], tensors: Mapping[str, npt.NDArray[Any]]) -> str:
    told = {key: value for key, value in header.items() if key != "crc32"}
    found = zlib.crc32(json.dumps(told, sort_keys=True).encode())
    for name in _TENSORS:
        found = zlib.crc32(np.ascontiguousarray(tensors[name]).data, found)
    return f"{found:08x}"


def newest_checkpoint(
    folder: Path, model_config: ModelConfig
) -> tuple[Checkpoint, list[ModelFileError | OSError]]:
    """Return the newest checkpoint of a run that is whole, and what is wrong with newer ones.

    Raises
    ------
    ModelFileError, OSError
        If none is whole: what is wrong with the newest.
    """
    wrong: list[ModelFileError | OSError] = []
    for name in (CHECKPOINT_FILE, EARLIER_FILE, f"{BEST_FOLDER}/{CHECKPOINT_FILE}"):
        try:
            return read_checkpoint(folder / name, model_config), wrong
        except (ModelFileError, OSError) as error:
            wrong.append(error)
    raise wrong[0]


def read_checkpoint(path: Path, model_config: ModelConfig) -> Checkpoint:
    """Read a checkpoint.

    Raises
    ------
    ModelFileError
        If it is damaged, or that of a model with other settings.
    OSError
        If it cannot be read.
    """
    with open_regular(path):
        pass  # what cannot be read is an OSError with its name
    try:
        with safe_open(path, "np") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if json.loads(header["model"]) != model_config.to_dict():
            raise ModelFileError(f"{path} is of a model with other settings")
        step, seconds = int(header["step"]), float(header["seconds"])
        lowest, found_at = json.loads(header["best"])
        best = (float(lowest), int(found_at))
        for name, value, most in (
            ("step", step, _MOST_STEPS),
            ("time", seconds, sys.float_info.max),
            ("best loss", best[0], math.inf),
            ("best step", best[1], step),
        ):
            if not 0 <= value <= most:
                raise ValueError(f"its {name} is {value}, expected 0 to {most}")
        # Runs that knew windows only have kept none.
        position = tuple(json.loads(header.get("position", f"[{step}]")))
        if not all(type(n) is int for n in position):
            raise ValueError(f"its position is {position}, expected whole numbers")
        for name in _TENSORS:
            values, others = tensors.get(name), tensors.get("weights")
            if values is None or others is None or values.dtype != np.float32:
                raise ValueError(f"{name} is missing, or not of float32")
            if values.ndim != 1 or values.size != others.size:
                raise ValueError(f"{name} is {values.shape}, expected one axis as weights has")
        # Checkpoints of earlier versions have no checksum.
        if "crc32" in header and header["crc32"] != _checksum(header, tensors):
            raise ValueError("its checksum does not fit its content")
        for name in _TENSORS:
            if not np.isfinite(tensors[name]).all():
                raise ValueError(f"{name} holds a number that is not finite")
    except ModelFileError:
        raise
    except DAMAGE as error:
        raise ModelFileError(f"{path} is not a checkpoint: {one_line(error)}") from None
    weights, first, second = (tensors[name] for name in _TENSORS)
    return Checkpoint(step, seconds, best, position, weights, first, second, path)
