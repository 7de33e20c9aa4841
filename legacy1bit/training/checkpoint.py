"""Checkpoints: the latent weights, the optimizer's moments, and the position in the data.

A run keeps its newest checkpoint and the one before. Each has a checksum: where the disk has
damaged one, the run resumes from the other.
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
from safetensors import safe_open

from legacy1bit.hyperparams import MOST_STEPS, renamed
from legacy1bit.model import ModelFileError
from legacy1bit.system.errors import format_value, one_line
from legacy1bit.system.files import atomic_copy, atomic_write, check_regular, serialize_tensors
from legacy1bit.training.run import DAMAGE, FixedSettings, Run

_TENSORS = ("weights", "first", "second")
# What moments in eight bits have besides; see ``Optimizer.moments``.
_SCALES = ("first_scales", "second_scales")
# And what runs have whose ranks take steps by themselves; see ``LocalSteps``.
OUTER = "outer"


class OtherRunError(ModelFileError):
    """A checkpoint belongs to a run with other settings."""


@dataclass(frozen=True)
class Checkpoint:
    """A moment of a training run.

    Attributes
    ----------
    step : int
        Updates done so far.
    seconds : float
        The training time so far.
    best : (float, int)
        The lowest validation loss so far, and its step.
    position : tuple of int
        The position of the next batch in the data.
    weights : float32[parameters]
        The latent weights.
    moments : dict of str to array
        ``Optimizer.moments``, and ``LocalSteps``'s.
    path : Path, optional
        The file that it was read from.
    """

    step: int
    seconds: float
    best: tuple[float, int]
    position: tuple[int, ...]
    weights: npt.NDArray[np.float32]
    moments: Mapping[str, npt.NDArray[Any]]
    path: Path | None = None


def write_checkpoint(run: Run, checkpoint: Checkpoint, settings: FixedSettings) -> None:
    """Write the newest checkpoint of a run, and keep the one before.

    Raises
    ------
    OSError
        If it cannot be written; the files of the run are unchanged then.
    """
    header = {
        **{table: json.dumps(values) for table, values in settings.items()},
        "step": str(checkpoint.step),
        "seconds": repr(checkpoint.seconds),
        "best": json.dumps(checkpoint.best),
        "position": json.dumps(checkpoint.position),
    }
    tensors = {"weights": checkpoint.weights, **checkpoint.moments}
    header["crc32"] = _checksum(header, tensors)
    if run.checkpoint_file.exists():
        atomic_copy(run.checkpoint_file, run.earlier_file)
    atomic_write(run.checkpoint_file, serialize_tensors(tensors, header))


def _checksum(header: Mapping[str, str], tensors: Mapping[str, npt.NDArray[Any]]) -> str:
    checked = {key: value for key, value in header.items() if key != "crc32"}
    checksum = zlib.crc32(json.dumps(checked, sort_keys=True).encode())
    for name in (name for name in (*_TENSORS, *_SCALES, OUTER) if name in tensors):
        checksum = zlib.crc32(np.ascontiguousarray(tensors[name]).data, checksum)
    return f"{checksum:08x}"


def newest_checkpoint(
    run: Run, settings: FixedSettings
) -> tuple[Checkpoint, list[ModelFileError | OSError]]:
    """Return the newest undamaged checkpoint of a run, and the errors of damaged ones.

    If the checkpoint that was written last is undamaged, the others are not read.

    Raises
    ------
    OtherRunError
        If a checkpoint belongs to another run: the user has to find out how it came there.
    ModelFileError, OSError
        If all are damaged: the error of the newest.
    """
    errors: list[ModelFileError | OSError] = []
    newest: Checkpoint | None = None
    for path in (run.checkpoint_file, run.earlier_file, run.best.checkpoint_file):
        try:
            checkpoint = read_checkpoint(path, settings)
        except OtherRunError:
            raise
        except (ModelFileError, OSError) as error:
            errors.append(error)
            continue
        if newest is None or checkpoint.step > newest.step:
            newest = checkpoint
        if not errors:
            break
    if newest is None:
        raise errors[0]
    return newest, errors


def make_newest(run: Run, checkpoint: Checkpoint) -> None:
    """Replace the newest checkpoint, which is damaged, by an older one.

    Raises
    ------
    OSError
        If it cannot be written.
    """
    if checkpoint.path is not None and checkpoint.path != run.checkpoint_file:
        atomic_copy(checkpoint.path, run.checkpoint_file)


def best_is_missing(run: Run, settings: FixedSettings, best: tuple[float, int], step: int) -> bool:
    """Return whether a crash came after a step became the best, and before it was copied.

    A best model that was trained further is ahead of the run, and stays as it is.
    """
    if not 0 < best[1] == step:
        return False
    try:
        copied = read_checkpoint(run.best.checkpoint_file, settings)
    except (ModelFileError, OSError):
        return True
    return copied.step < step


def read_checkpoint(path: Path, settings: FixedSettings) -> Checkpoint:
    """Read a checkpoint.

    Raises
    ------
    OtherRunError
        If it belongs to a run with other settings.
    ModelFileError
        If it is damaged.
    OSError
        If it cannot be read.
    """
    check_regular(path)
    try:
        with safe_open(path, "np") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        _check_settings(path, header, settings)
        step, seconds = int(header["step"]), float(header["seconds"])
        loss, best_step = json.loads(header["best"])
        best = (float(loss), int(best_step))
        for name, value, most in (
            ("step", step, MOST_STEPS),
            ("time", seconds, sys.float_info.max),
            ("best loss", best[0], math.inf),
            ("best step", best[1], step),
        ):
            if not 0 <= value <= most:
                raise ValueError(f"its {name} is {value}, expected 0 to {most}")
        # Checkpoints of versions that knew only windows have no position.
        position = tuple(json.loads(header.get("position", f"[{step}]")))
        if not all(type(n) is int for n in position):
            raise ValueError(f"its position is {position}, expected whole numbers")
        tensors = _of_checkpoint(tensors)
        # Checkpoints of earlier versions have no checksum.
        if "crc32" in header and header["crc32"] != _checksum(header, tensors):
            raise ValueError("its checksum does not fit its content")
        for name, values in tensors.items():
            if not np.isfinite(values).all():
                raise ValueError(f"{name} has a value that is not finite")
    except OtherRunError:
        raise
    except DAMAGE as error:
        raise ModelFileError(f"{path} is not a checkpoint: {one_line(error)}") from None
    return Checkpoint(step, seconds, best, position, tensors.pop("weights"), tensors, path)


def _of_checkpoint(tensors: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
    """Return weights and moments, of 32 or of eight bits; other tensors do not matter."""
    if missing := [name for name in _TENSORS if name not in tensors]:
        raise ValueError(f"{missing[0]} is missing, or not of float32")
    expected: dict[str, Any] = dict.fromkeys(_TENSORS, np.float32)
    if tensors["first"].dtype == np.uint8:
        expected |= {"first": np.uint8, "second": np.uint8, **dict.fromkeys(_SCALES, np.float32)}
    if OUTER in tensors:
        expected[OUTER] = np.float32
    for name, dtype in expected.items():
        values = tensors.get(name)
        if values is None or values.dtype != dtype:
            raise ValueError(f"{name} is missing, or not of {np.dtype(dtype)}")
        like = _SCALES[0] if name in _SCALES else "weights"
        if values.ndim != 1 or values.size != tensors[like].size:
            raise ValueError(f"{name} is {values.shape}, expected one axis as {like} has")
        if name in _SCALES and (values < 0.0).any():
            raise ValueError(f"{name} has a scale below 0")
    return {name: tensors[name] for name in expected}


def _check_settings(path: Path, header: Mapping[str, str], settings: FixedSettings) -> None:
    for table, own in settings.items():
        # Checkpoints of earlier versions have the model's settings only.
        if table in header or table == "model":
            values = renamed(own)
            for name, recorded in renamed(json.loads(header[table])).items():
                # After a crash of a newer version the settings file may lack some of them.
                if name in values and values[name] != recorded:
                    raise OtherRunError(
                        f"{path} is of another run: its {name} is {format_value(recorded)}, "
                        f"expected {format_value(values[name])}"
                    )
