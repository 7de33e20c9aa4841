"""An adapter that is trained: its model, and its files in the run (``train --from M --adapter R``).

The weights of the model are packed as for decoding and stay as they are, so that a model of two
billion weights takes less than a gigabyte. What learns, what the optimizer and checkpoints hold, is
the adapter alone. A run has PEFT's two files in place of a model's.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from legacy1bit.formats.adapters import LoraPair, LoraWeights, read_adapters, write_peft
from legacy1bit.hyperparams import ModelConfig, TrainingConfig
from legacy1bit.layout import AdapterConfig
from legacy1bit.model import LegacyLLM, TernaryMatrix, create_adapted_llm
from legacy1bit.packed import Int8Matrix, PackedMatrix, PackedModel


def adapter_config(training: TrainingConfig) -> AdapterConfig | None:
    """Return the adapter that a training is of; None: it is of a model."""
    if not training.adapter:
        return None
    alpha = 2.0 * training.adapter if training.adapter_alpha is None else training.adapter_alpha
    return AdapterConfig(training.adapter, alpha, training.adapter_layers)


def adapted(path: Path, model: ModelConfig, training: TrainingConfig) -> LegacyLLM:
    """Return a model with an adapter that learns.

    Parameters
    ----------
    path : Path
        Of the model, in any format that ``load_model`` reads.
    model : ModelConfig
        Its settings; its context may be shorter.
    training : TrainingConfig

    Raises
    ------
    ModelFileError, ValueError, OSError
        If the model cannot be read.
    """
    adapter = adapter_config(training)
    assert adapter is not None
    packed = PackedModel.load(path, threads=training.threads)
    return create_adapted_llm(model, packed.parameters, adapter, training.seed)


def weights_hash(parameters: Mapping[str, Any]) -> str:
    """Return the SHA-256 of weights, packed or not, in hexadecimal digits.

    It is the same in whichever format files store them.
    """
    digest = hashlib.sha256()
    for value in parameters.values():
        arrays: tuple[npt.NDArray[Any], ...] = (value,)
        if isinstance(value, PackedMatrix):
            arrays = value.tiles, value.scales
        elif isinstance(value, Int8Matrix):
            arrays = value.codes, value.scales
        elif isinstance(value, TernaryMatrix):
            arrays = value.values, value.scales
        for array in arrays:
            digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def save_adapter(model: LegacyLLM, folder: Path, base: str, dropout: float) -> None:
    """Write the adapter of a model as PEFT's files, each atomically.

    Parameters
    ----------
    model : LegacyLLM
    folder : Path
        Of the run.
    base : str
        Where the model is that it is on.
    dropout : float
        Of the training.

    Raises
    ------
    OSError
        If a file cannot be written.
    """
    assert model.adapter is not None
    assert model.pairs is not None
    scaling = model.adapter.scale
    pairs = {name: LoraPair(a, b, scaling) for name, (a, b) in model.pairs.items()}
    weights = LoraWeights(pairs, base, dropout, model.provenance)
    write_peft(weights, model.config, folder, beside=True)


def best_adapted(model: LegacyLLM, folder: Path) -> LegacyLLM:
    """Return a model with the adapter that was the best of a run."""
    return model.with_adapter(read_adapters([(folder, 1.0)], model.config))
