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

from legacy1bit.data.origin import TEXT_PATH, VALIDATION_PATH
from legacy1bit.data.tokenizer import TOKENIZER_FILE
from legacy1bit.hyperparams import (
    CHANGEABLE,
    MOST_STEPS,
    SETTINGS_FILE,
    DataConfig,
    ModelConfig,
    TrainingConfig,
)
from legacy1bit.logger import METRICS_FILE, SAMPLES_FILE
from legacy1bit.model import (
    BEST_FOLDER,
    CHECKPOINT_FILE,
    CONFIG_FILE,
    WEIGHTS_FILE,
    ModelFileError,
)
from legacy1bit.system.errors import one_line, shown
from legacy1bit.system.files import atomic_copy, atomic_write, check_regular, serialize_tensors

EARLIER_FILE = "earlier.safetensors"

# The files of a saved run. The best one's checkpoint is copied last, and tells that all are there.
RUN_FILES = (TOKENIZER_FILE, WEIGHTS_FILE, CONFIG_FILE, SETTINGS_FILE, CHECKPOINT_FILE)
# All that a training writes into its folder.
WRITTEN_FILES = frozenset((METRICS_FILE, SAMPLES_FILE, EARLIER_FILE, *RUN_FILES))

_TENSORS = ("weights", "first", "second")

# What is fixed for the whole of a run, by its table in the file of settings.
FixedSettings = Mapping[str, Mapping[str, Any]]

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


class OtherRunError(ModelFileError):
    """A checkpoint is that of a run with other settings."""


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


def fixed_settings(
    model: ModelConfig, training: TrainingConfig, data: DataConfig, source: Mapping[str, Any]
) -> FixedSettings:
    """Return of a run's settings those that its checkpoints tell, too.

    So a checkpoint and settings of different runs are not taken for one.
    """
    chosen, text = training.to_dict(), dict(source)
    for name in CHANGEABLE:
        del chosen[name]
    # Where a text lies; which it is, its name and its hash tell.
    for name in (TEXT_PATH, VALIDATION_PATH):
        text.pop(name, None)
    return {"model": model.to_dict(), "training": chosen, "data": data.to_dict(), "source": text}


def write_checkpoint(folder: Path, checkpoint: Checkpoint, settings: FixedSettings) -> None:
    """Write the newest checkpoint of a run, and keep the one that was it.

    Raises
    ------
    OSError
        If it cannot be written; what was there stays.
    """
    header = {
        **{table: json.dumps(values) for table, values in settings.items()},
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
    folder: Path, settings: FixedSettings
) -> tuple[Checkpoint, list[ModelFileError | OSError]]:
    """Return the newest checkpoint of a run that is whole, and what is wrong with others.

    If there is nothing wrong with the one that was written last, others are not looked at.

    Raises
    ------
    OtherRunError
        If one is of another run: it is worth a question how it came there.
    ModelFileError, OSError
        If none is whole: what is wrong with the newest.
    """
    wrong: list[ModelFileError | OSError] = []
    found: Checkpoint | None = None
    for name in (CHECKPOINT_FILE, EARLIER_FILE, f"{BEST_FOLDER}/{CHECKPOINT_FILE}"):
        try:
            read = read_checkpoint(folder / name, settings)
        except OtherRunError:
            raise
        except (ModelFileError, OSError) as error:
            wrong.append(error)
            continue
        if found is None or read.step > found.step:
            found = read
        if not wrong:
            break
    if found is None:
        raise wrong[0]
    return found, wrong


def make_newest(folder: Path, checkpoint: Checkpoint) -> None:
    """Put a checkpoint in the place of the newest, which is damaged.

    Raises
    ------
    OSError
        If it cannot be written.
    """
    if checkpoint.path is not None and checkpoint.path != folder / CHECKPOINT_FILE:
        atomic_copy(checkpoint.path, folder / CHECKPOINT_FILE)


def read_checkpoint(path: Path, settings: FixedSettings) -> Checkpoint:
    """Read a checkpoint.

    Raises
    ------
    OtherRunError
        If it is that of a run with other settings.
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
        lowest, found_at = json.loads(header["best"])
        best = (float(lowest), int(found_at))
        for name, value, most in (
            ("step", step, MOST_STEPS),
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
    except OtherRunError:
        raise
    except DAMAGE as error:
        raise ModelFileError(f"{path} is not a checkpoint: {one_line(error)}") from None
    weights, first, second = (tensors[name] for name in _TENSORS)
    return Checkpoint(step, seconds, best, position, weights, first, second, path)


def _check_settings(path: Path, header: Mapping[str, str], settings: FixedSettings) -> None:
    for table, values in settings.items():
        # Checkpoints of earlier versions tell of the model only.
        if table in header or table == "model":
            for name, told in json.loads(header[table]).items():
                # A crash may have come before a newer version has told the settings beside it all.
                if name in values and values[name] != told:
                    raise OtherRunError(
                        f"{path} is of another run: its {name} is {shown(told)}, expected "
                        f"{shown(values[name])}"
                    )
