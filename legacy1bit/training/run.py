"""The folder of a training run: its files, its settings, and its lock.

Nothing else knows how the files of a run are called, except for the modules that write one of them.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from legacy1bit.data.origin import DataOrigin, located, without_paths
from legacy1bit.data.published_tokenizer import TEMPLATE_FILE, TOKENIZER_CONFIG_FILE
from legacy1bit.data.tokenizer import TOKENIZER_FILE
from legacy1bit.formats.native import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILE,
    BEST_FOLDER,
    CHECKPOINT_FILE,
    CONFIG_FILE,
    WEIGHTS_FILE,
    ModelFileError,
    model_folder,
)
from legacy1bit.hyperparams import (
    CHANGEABLE,
    SETTINGS_FILE,
    DataConfig,
    ModelConfig,
    TrainingConfig,
)
from legacy1bit.logger import EVENTS_FOLDER, METRICS_FILE, SAMPLES_FILE, read_metrics
from legacy1bit.system.files import (
    atomic_copies,
    atomic_write,
    held,
    mistaken_file,
    read_regular,
    remove,
    temporaries,
)

EARLIER_FILE = "earlier.safetensors"

# The files of a saved run. The checkpoint of the best model is copied last: it marks a whole copy.
RUN_FILES = (
    *(TOKENIZER_FILE, TOKENIZER_CONFIG_FILE, TEMPLATE_FILE),
    *(WEIGHTS_FILE, CONFIG_FILE, ADAPTER_FILE, ADAPTER_CONFIG_FILE),
    *(SETTINGS_FILE, CHECKPOINT_FILE),
)
# Every file that a training writes into its folder.
WRITTEN_FILES = frozenset((METRICS_FILE, SAMPLES_FILE, EARLIER_FILE, *RUN_FILES))

# The settings that hold for the whole of a run, by their table in the file of settings.
FixedSettings = Mapping[str, Mapping[str, Any]]

# What ``RunSettings.source`` has of a teacher: where it is, and the hash of its weights.
TEACHER_PATH, TEACHER_HASH = "teacher", "teacher_sha256"

# And of the model that a training has gone on from; the hash, if it is needed again.
START_PATH, START_HASH = "from", "from_sha256"

# What the libraries that read a damaged file can raise.
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
class RunSettings:
    """The settings of a run.

    Attributes
    ----------
    model : ModelConfig
    training : TrainingConfig
    data : DataConfig
    source : dict
        ``origin`` as it is stored, with what a program has noted beside it.
    machine : dict
        The hardware that it was trained on; empty in runs of earlier versions.
    """

    model: ModelConfig
    training: TrainingConfig
    data: DataConfig
    source: dict[str, Any]
    machine: dict[str, Any] = field(default_factory=dict)

    @property
    def origin(self) -> DataOrigin:
        """Where the corpus comes from, without what a program has noted beside it."""
        return DataOrigin.from_dict(self.source)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Return the settings as plain dictionaries, a table for each record."""
        return {
            "model": self.model.to_dict(),
            "training": self.training.to_dict(),
            "data": self.data.to_dict(),
            "source": self.source,
            "machine": self.machine,
        }

    def fixed(self) -> FixedSettings:
        """Return the settings that every checkpoint of the run repeats.

        They keep the checkpoint of one run from being resumed with the settings of another.
        """
        tables = self.to_dict()
        del tables["machine"]
        for name in CHANGEABLE:
            del tables["training"][name]
        # Texts and other models may move; their hashes identify them.
        tables["source"] = without_paths(self.source)
        for path, sha256 in ((TEACHER_PATH, TEACHER_HASH), (START_PATH, START_HASH)):
            if sha256 in self.source:
                tables["source"].pop(path, None)
        return tables


@dataclass(frozen=True)
class Run:
    """The folder of a training run, which need not exist yet.

    Attributes
    ----------
    folder : Path
    """

    folder: Path

    # --- Files

    @property
    def settings_file(self) -> Path:
        """The settings, written last: a folder that has them has all the other files."""
        return self.folder / SETTINGS_FILE

    @property
    def metrics_file(self) -> Path:
        """A record of every evaluation."""
        return self.folder / METRICS_FILE

    @property
    def samples_file(self) -> Path:
        """A generated text of every evaluation."""
        return self.folder / SAMPLES_FILE

    @property
    def weights_file(self) -> Path:
        """The weights of the last model."""
        return self.folder / WEIGHTS_FILE

    @property
    def tokenizer_file(self) -> Path:
        """The tokenizer; missing where the tokens are those of another program."""
        return self.folder / TOKENIZER_FILE

    @property
    def template_file(self) -> Path:
        """The chat template of a model that has learned from conversations."""
        return self.folder / TEMPLATE_FILE

    @property
    def checkpoint_file(self) -> Path:
        """The newest checkpoint."""
        return self.folder / CHECKPOINT_FILE

    @property
    def earlier_file(self) -> Path:
        """The checkpoint before the newest."""
        return self.folder / EARLIER_FILE

    @property
    def best(self) -> "Run":
        """The copy of the run as it was after its best evaluation."""
        return Run(self.folder / BEST_FOLDER)

    @property
    def model_folder(self) -> Path:
        """The folder of the run's model: its best, or else its last."""
        return model_folder(self.folder)

    def files(self) -> list[Path]:
        """Return the files that a training writes, those of the best model included."""
        return [run.folder / name for run in (self, self.best) for name in sorted(WRITTEN_FILES)]

    def sizes(self) -> dict[str, int]:
        """Return the bytes of the largest files by their names, as far as they exist."""
        files = (self.weights_file, self.checkpoint_file, self.metrics_file)
        return {file.name: file.stat().st_size for file in files if file.exists()}

    def model_bytes(self) -> int:
        """Return the size of the weights file of the run's model."""
        return (self.model_folder / WEIGHTS_FILE).stat().st_size

    # --- Content

    @property
    def is_saved(self) -> bool:
        """Whether the run was saved at least once."""
        return self.settings_file.exists()

    def settings(self) -> RunSettings:
        """Return the settings that the run was started with, its texts located.

        Raises
        ------
        ModelFileError
            If the folder is not a run, or its settings are damaged.
        OSError
            If they cannot be read.
        """
        path = self.settings_file
        if not path.is_file():
            reason = mistaken_file(self.folder) if self.folder.is_file() else None
            reason = reason or f"it has no {SETTINGS_FILE}"
            raise ModelFileError(f"{self.folder} is not a training run: {reason}")
        try:
            tables = json.loads(read_regular(path))
            machine = tables.get("machine")
            return RunSettings(
                ModelConfig.from_dict(tables["model"]),
                TrainingConfig.from_dict(tables["training"]),
                DataConfig.from_dict(tables.get("data", {})),
                located(tables["source"], self.folder, (TEACHER_PATH,)),
                machine if isinstance(machine, dict) else {},
            )
        except KeyError as error:
            raise ModelFileError(f"{path} is not a run's settings: it has no {error}") from None
        except DAMAGE as error:
            raise ModelFileError(
                f"{path} is not a run's settings: {mistaken_file(path) or error}"
            ) from None

    def write_settings(self, settings: RunSettings) -> None:
        """Write the settings."""
        atomic_write(self.settings_file, json.dumps(settings.to_dict(), indent=2) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """Return the records of the evaluations, oldest first.

        Raises
        ------
        OSError
            If they cannot be read.
        ValueError
            If the folder is not a run, or a record is damaged.
        """
        if not self.folder.is_dir():
            reason = mistaken_file(self.folder) if self.folder.is_file() else None
            reason = reason or "expected a run's folder"
            raise ValueError(f"{self.folder} is not a training run: {reason}")
        if not self.metrics_file.is_file():
            raise ValueError(f"{self.folder} is not a training run: it has no {METRICS_FILE}")
        return read_metrics(self.metrics_file)

    def samples(self) -> list[dict[str, Any]]:
        """Return the generated texts of the evaluations, oldest first; none without a file.

        Raises
        ------
        OSError
            If they cannot be read.
        ValueError
            If a record is damaged.
        """
        path = self.samples_file
        samples = read_metrics(path) if path.exists() else []
        for number, sample in enumerate(samples, 1):
            if not isinstance(sample.get("text"), str):
                raise ValueError(f"{path}, line {number}: expected a sample with its text")
        return samples

    # --- Changes

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes out of the folder, and remove the temporary files of killed ones.

        Raises
        ------
        ValueError
            If another process trains there.
        OSError
            If there is no such folder.
        """
        with held(self.folder):
            for run in (self, self.best):
                for path in run._temporaries():
                    remove(path)
            yield

    def _temporaries(self) -> set[Path]:
        return {path for path, name in temporaries(self.folder) if name in WRITTEN_FILES}

    def check_new(self) -> None:
        """Raise ``ValueError`` for a folder in which a new run would overwrite something.

        An empty folder will do, and so will what a run leaves that ended before it was saved: its
        records, and some of its files.
        """
        if not self.folder.exists():
            return
        if self.is_saved:
            raise ValueError(
                f"{self.folder} holds a run already: name another folder, or --resume it"
            )
        paths = set(self.folder.iterdir()) if self.folder.is_dir() else {self.folder}
        paths -= self._temporaries()
        ours = {path.name for path in paths} <= {*WRITTEN_FILES, EVENTS_FOLDER}
        if paths and not (ours and self._has_metrics()):
            raise ValueError(f"{self.folder} is not an empty folder: name another")

    def _has_metrics(self) -> bool:
        """Whether the file of metrics is that of a run, which may have no record yet."""
        try:
            return all("train_loss" in record for record in read_metrics(self.metrics_file))
        except (OSError, ValueError):
            return False

    def remove_unstarted(self, created: list[Path]) -> None:
        """Remove the files of a training that ended before its first record.

        Parameters
        ----------
        created : list of Path
            The folder and its parents, as far as the training has created them, innermost first.
        """
        records = [self.metrics_file, self.samples_file]
        events = self.folder / EVENTS_FOLDER
        with contextlib.suppress(OSError):
            others = {*self.folder.iterdir()} - {*records, events}
            if others or any(path.exists() and path.stat().st_size for path in records):
                return
            for path in records:
                remove(path)
            if created:
                remove(events)
            for path in created:
                path.rmdir()

    def keep_best(self) -> None:
        """Copy the run as it is now to its best."""
        files = (self.folder / name for name in RUN_FILES)
        # Tokens of another program have no tokenizer.
        atomic_copies((file for file in files if file.exists()), self.best.folder)

    def remove_weights(self) -> None:
        """Remove all but the settings and the metrics."""
        for path in self.folder.iterdir():
            if path not in (self.metrics_file, self.settings_file):
                remove(path)


def latest_run(folder: Path) -> Run | None:
    """Return the run that was saved last, of those in a folder."""
    saved = [Run(path.parent) for path in folder.glob(f"*/{SETTINGS_FILE}")]
    return max(saved, key=lambda run: run.settings_file.stat().st_mtime_ns, default=None)
