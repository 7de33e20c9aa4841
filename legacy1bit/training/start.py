"""What a training begins with where it goes on from a model (``train --from``).

Training needs latent float weights. A run has them in its checkpoint, with the model that was best.
Some published models are float weights that are quantized when they are loaded: these are taken. Of
any other model they are made: codes times scales, enlarged until the quantization of these numbers
gives the same codes and scales again.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from legacy1bit.data.tokenizer import Tokenizer
from legacy1bit.formats.published import read_model, read_tokenizer
from legacy1bit.hyperparams import ModelConfig, TrainingConfig
from legacy1bit.layout import parameter_layout, views
from legacy1bit.model import LegacyLLM, TernaryMatrix, create_legacy_llm, load_model
from legacy1bit.optimizer import moment_bytes
from legacy1bit.schemes import SCHEMES
from legacy1bit.training.adapters import adapted, weights_hash
from legacy1bit.training.checkpoint import read_checkpoint
from legacy1bit.training.memory import model_bytes
from legacy1bit.training.run import START_HASH, START_PATH, Run

# The settings in which the new model may differ: a model of floats becomes one of codes, and
# rotary positions take any length.
CHANGEABLE_SETTINGS = ("sequence_length", "scheme")

_Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class StoredModel:
    """A model in a file or a folder, whose weights are not read yet.

    Attributes
    ----------
    path : Path
        A run, or a model of any format that ``load_model`` reads.
    config : ModelConfig
    tokenizer : Tokenizer
    """

    path: Path
    config: ModelConfig
    tokenizer: Tokenizer

    @classmethod
    def read(cls, path: Path) -> Self:
        """Return the model of a path.

        Raises
        ------
        ModelFileError, ValueError
            If it is damaged.
        OSError
            If it cannot be read.
        """
        config, *_ = read_model(path, floats=True)
        return cls(path, config, read_tokenizer(path, config.vocab_size))


@dataclass(frozen=True)
class Start(StoredModel):
    """A model to go on from."""

    def nbytes(self) -> int:
        """Return the most bytes that reading the weights takes beside those that are filled."""
        if _is_run(self.path):
            # All of a checkpoint.
            bits = Run(self.path).settings().training.optimizer_bits
            layout = parameter_layout(self.config)
            return 4 * layout[-1].stop + moment_bytes(layout, bits)
        return model_bytes(self.config)

    def model(self, config: ModelConfig, training: TrainingConfig) -> LegacyLLM:
        """Return the model that is trained: with these weights, or with an adapter on them.

        Parameters
        ----------
        config : ModelConfig
            May differ from that of the model in ``CHANGEABLE_SETTINGS``.
        training : TrainingConfig

        Raises
        ------
        ModelFileError, ValueError
            If a file is damaged, or the codes would not come back.
        OSError
            If a file cannot be read.
        """
        if training.adapter:
            # A run that goes on may name another model.
            wanted = started(self, asdict(config))
            if wanted.scheme != self.config.scheme:
                raise ValueError(
                    f"scheme is {wanted.scheme}, expected {self.config.scheme}, that of "
                    f"{self.path}: with an adapter its weights stay as they are"
                )
            return adapted(self.path, config, training)
        model = create_legacy_llm(config, training.seed)
        self.fill(model)
        return model

    def recorded_in(self, source: dict[str, Any], model: LegacyLLM) -> dict[str, Any]:
        """Return a run's source with this model, of which ``model`` is what is trained.

        Raises
        ------
        ValueError
            If the run has an adapter that began on other weights.
        """
        recorded = source | {START_PATH: str(self.path.absolute())}
        if model.adapter is None:
            return recorded
        found = weights_hash(model.parameters)
        if source.get(START_HASH, found) != found:
            raise ValueError(
                f"{self.path} is not the model that the adapter is on: its weights are others; "
                "--from says where that is"
            )
        return recorded | {START_HASH: found}

    def fill(self, model: LegacyLLM) -> None:
        """Give a trainable model these weights.

        Parameters
        ----------
        model : LegacyLLM
            Its settings may differ from ``config`` in ``CHANGEABLE_SETTINGS``.

        Raises
        ------
        ModelFileError, ValueError
            If a file is damaged, or there are no float weights that would give the codes.
        OSError
            If a file cannot be read.
        """
        scheme = SCHEMES.get(self.config.scheme)
        if scheme is not None and not scheme.learns:
            raise ValueError(
                f"{self.path} has the scheme {self.config.scheme}, whose codes have no float "
                "weights to go on from"
            )
        values = _of_checkpoint(self.path, self.config)
        if values is not None:
            for name, weights in model.latent.items():
                weights[...] = values[name]
            model.quantize()
            return
        given = load_model(self.path, floats=True).parameters
        matrices = {}
        for name, weights in model.latent.items():
            value = given[name]
            if isinstance(value, TernaryMatrix):
                matrices[name], value = value, _dense(value)
            weights[...] = value
        quantized = []
        for part in read_model(self.path, floats=True)[2]:
            if part.masters is not None:
                model.latent[part.name][...] = part.masters()
                quantized.append(part.name)
        model.quantize()
        for name in quantized:
            if _has_codes(model, name, matrices[name]):
                del matrices[name]
            else:
                # Our scale is rounded, and a weight lay on the border of two codes.
                model.latent[name][...] = _dense(matrices[name])
        model.quantize()
        if model.config.scheme == self.config.scheme:
            _match(model, matrices)


def _is_run(path: Path) -> bool:
    return path.is_dir() and Run(path).is_saved


def _of_checkpoint(path: Path, config: ModelConfig) -> dict[str, _Floats] | None:
    """Return the latent weights of a run's model by name; None if it is no run."""
    if not _is_run(path):
        return None
    run = Run(path)
    settings = run.settings()
    chosen = Run(run.model_folder)
    checkpoint = read_checkpoint(chosen.checkpoint_file, settings.fixed())
    return views(checkpoint.weights, parameter_layout(config))


def _dense(matrix: TernaryMatrix) -> _Floats:
    """Return codes times scales."""
    return matrix.values * _wide(matrix.scales, matrix)


def _wide(scales: _Floats, matrix: TernaryMatrix) -> _Floats:
    """Return numbers for each scale of a matrix as numbers for each weight."""
    cols = matrix.shape[1]
    return np.repeat(scales, matrix.group, axis=1)[:, :cols]


def _has_codes(model: LegacyLLM, name: str, matrix: TernaryMatrix) -> bool:
    return np.array_equal(_codes(model, name).values, matrix.values)


def _match(model: LegacyLLM, matrices: Mapping[str, TernaryMatrix]) -> None:
    """Enlarge latent weights until their codes and scales are the given ones.

    A scale is a mean or a median of magnitudes, some of which are 0 here: it is proportional to
    the weights, and codes depend on their ratios to it alone.
    """
    latent = model.latent
    for name, value in matrices.items():
        with np.errstate(divide="ignore", invalid="ignore"):
            factor = value.scales / _codes(model, name).scales
        latent[name] *= _wide(np.where(np.isfinite(factor), factor, np.float32(1.0)), value)
    model.quantize()
    for name, value in matrices.items():
        if not _has_codes(model, name, value):
            raise ValueError(
                f"{name}: float weights that quantize to these codes are not known for the scheme "
                f"{model.config.scheme}"
            )


def _codes(model: LegacyLLM, name: str) -> TernaryMatrix:
    found = model.parameters[name]
    assert isinstance(found, TernaryMatrix)
    return found


def started(start: Start, settings: Mapping[str, Any]) -> ModelConfig:
    """Return the settings of a model that goes on from another one.

    Parameters
    ----------
    start : Start
    settings : dict
        Those that are asked for.

    Raises
    ------
    ValueError
        If one is fixed by the model.
    """
    for name, value in settings.items():
        if name not in CHANGEABLE_SETTINGS and value != getattr(start.config, name):
            raise ValueError(
                f"{name} is {value}, expected {getattr(start.config, name)}, that of {start.path}"
            )
    wanted = replace(start.config, **settings)
    if wanted.scheme != start.config.scheme and start.config.scheme != "float":
        raise ValueError(
            f"scheme is {wanted.scheme}, expected {start.config.scheme}, that of {start.path}: "
            "only a model of floats can become another one"
        )
    return wanted
