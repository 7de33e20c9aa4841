"""The training loop, its measurements and its checkpoints (C: the loop of ``main.c``)."""

import contextlib
import errno
import json
import math
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from legacy1bit.backward import BackwardPass, ignore_padding
from legacy1bit.data import stories
from legacy1bit.data.augment import Augmentation
from legacy1bit.data.corpus import Corpus
from legacy1bit.data.origin import located
from legacy1bit.data.tokenizer import TOKENIZER_FILE, Tokenizer, fit_tokenizer
from legacy1bit.data_utils import create_padded_sequence, tokenize_text
from legacy1bit.dataset import Batch, Prefetcher, TokenDataset
from legacy1bit.formats.provenance import Provenance
from legacy1bit.forward import forward_llm_batch
from legacy1bit.hyperparams import (
    MOST_STEPS,
    SETTINGS_FILE,
    DataConfig,
    ModelConfig,
    TrainingConfig,
)
from legacy1bit.logger import MetricsLogger
from legacy1bit.math_ops import product_precision, product_precisions
from legacy1bit.model import (
    BEST_FOLDER,
    CHECKPOINT_FILE,
    LegacyLLM,
    ModelFileError,
    TernaryMatrix,
    create_legacy_llm,
    create_legacy_llm_gradients,
    load_model,
    save_model,
    zero_legacy_llm_gradients,
)
from legacy1bit.optimizer import SGD, AdamW, Muon, Optimizer
from legacy1bit.schemes import SCHEMES
from legacy1bit.system.errors import SettingError
from legacy1bit.system.files import (
    atomic_copies,
    atomic_write,
    mistaken_file,
    read_regular,
    remove,
    temporary_of,
)
from legacy1bit.system.hardware import machine
from legacy1bit.training.checkpoint import (
    DAMAGE,
    RUN_FILES,
    Checkpoint,
    FixedSettings,
    fixed_settings,
    make_newest,
    read_checkpoint,
    write_checkpoint,
)
from legacy1bit.training.divergence import diverged
from legacy1bit.training.memory import EVALUATION_TOKENS, check_memory

# While it trains, a run is measured on about this many tokens of its validation set, spread
# evenly; at the end on as many as the settings say.
_QUICK_TOKENS = 16384

# The share of a run's time in which it is found out how many steps fit into the whole, and how
# long that takes at least and at most, in seconds.
_PROBE_SHARE, _PROBE_SECONDS = 0.05, (0.5, 10.0)


@dataclass(frozen=True)
class Metrics:
    """How well a model predicts a set of sequences.

    Attributes
    ----------
    loss : float
        The mean of -log p of the true token, in nats.
    top1, top3, top5 : float
        The share of tokens that are among the model's 1, 3 and 5 likeliest.
    tokens : int
        How many were predicted.
    bytes : int
        How many bytes they stand for.
    """

    loss: float
    top1: float
    top3: float
    top5: float
    tokens: int
    bytes: int

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """The loss in bits, over the bytes: what models with different tokens are compared by."""
        nats = self.loss * self.tokens
        return nats / self.bytes / math.log(2.0) if self.bytes else math.inf

    def record(self) -> dict[str, float]:
        """Return what ``metrics.jsonl`` keeps of the numbers."""
        return {
            "val_loss": self.loss,
            "val_tokens": self.tokens,
            "val_bytes": self.bytes,
            "perplexity": self.perplexity,
            **({"bits_per_byte": self.bits_per_byte} if self.bytes else {}),
            "top1": self.top1,
            "top3": self.top3,
            "top5": self.top5,
        }


class NotFiniteError(ValueError):
    """A model predicts what is no number.

    Attributes
    ----------
    batch : Batch
        Of what.
    """

    def __init__(self, batch: Batch) -> None:
        super().__init__("the model's logits are not finite: its weights are damaged")
        self.batch = batch


def evaluate(
    model: LegacyLLM,
    dataset: TokenDataset,
    threads: int = 1,
    limit: int = 0,
    tokenizer: Tokenizer | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Metrics:
    """Measure a model on a dataset.

    Parameters
    ----------
    model : LegacyLLM
    dataset : TokenDataset
    threads : int
    limit : int
        Measure only about so many tokens, spread evenly over the dataset; 0: all.
    tokenizer : Tokenizer, optional
        That of the dataset; bytes when not given.
    stop : callable, optional
        Asked after every batch; then what was measured so far is all there is.

    Raises
    ------
    NotFiniteError
        If the model's predictions are not finite.
    ValueError
        If there is nothing to measure.
    """
    loss, tokens, size = 0.0, 0, 0
    within = np.zeros(3, np.int64)
    for batch in dataset.sweep(_evaluation_batch(dataset.sequence_length), limit):
        logits = forward_llm_batch(
            model, batch.tokens, threads=threads, logits=True, starts=batch.starts
        )
        targets = ignore_padding(batch.tokens, batch.targets, model.config.pad_token)
        chosen = logits[targets >= 0]
        if not np.isfinite(chosen).all():
            raise NotFiniteError(batch)
        truth = targets[targets >= 0]
        goal = np.take_along_axis(chosen, truth[:, None], axis=1)
        top = chosen.max(axis=1, keepdims=True)
        exponentials = np.exp(chosen - top)
        log_sums = np.log(exponentials.sum(axis=1, dtype=np.float64)) + top[:, 0]
        loss += float((log_sums - goal[:, 0]).sum())
        # Of equal tokens the first ranks first, as argmax would have it.
        before = np.arange(chosen.shape[1]) < truth[:, None]
        ranks = ((chosen > goal) | ((chosen == goal) & before)).sum(axis=1)
        within += [(ranks < k).sum() for k in (1, 3, 5)]
        tokens += truth.size
        size += truth.size if tokenizer is None else int(tokenizer.byte_lengths[truth].sum())
        if tokens and stop():
            break
    if tokens == 0:
        raise ValueError("there is nothing to measure: every token is padding")
    top1, top3, top5 = (within / tokens).tolist()
    return Metrics(loss / tokens, top1, top3, top5, tokens, size)


def _evaluation_batch(sequence_length: int) -> int:
    return max(EVALUATION_TOKENS // sequence_length, 1)


def weight_shares(
    model: LegacyLLM, before: dict[str, npt.NDArray[np.int8]] | None = None
) -> dict[str, dict[str, float]]:
    """Return how the codes of each quantized matrix are distributed.

    Parameters
    ----------
    model : LegacyLLM
    before : dict of str to int8 array, optional
        The codes at an earlier time.

    Returns
    -------
    dict of str to dict of str to float
        By matrix, the share of each code, such as ``"-1"``, and as ``"flipped"`` the share of
        those that have changed since.
    """
    shares = {}
    for name, codes in _codes(model).items():
        levels = SCHEMES[model.config.scheme].levels
        shares[name] = {str(level): _share(codes == level) for level in levels}
        if before is not None:
            shares[name]["flipped"] = _share(codes != before[name])
    return shares


def _share(chosen: npt.NDArray[np.bool_]) -> float:
    return round(float(np.mean(chosen)), 6)


def _codes(model: LegacyLLM, copied: bool = False) -> dict[str, npt.NDArray[np.int8]]:
    return {
        name: value.values.copy() if copied else value.values
        for name, value in model.parameters.items()
        if isinstance(value, TernaryMatrix)
    }


def recall_of_heroes(model: LegacyLLM, told: tuple[str, ...], threads: int = 1) -> float:
    """Return the share of endings in which the model names the right hero.

    The model reads each story up to the hero's name in its last sentence; it is right if it finds
    every letter of the name the likeliest.
    """
    pad_token = model.config.pad_token
    right = asked = 0
    batch = _evaluation_batch(model.config.sequence_length)
    for first in range(0, len(told), batch):
        part = told[first : first + batch]
        length = min(max(len(story) for story in part) + 1, model.config.sequence_length)
        rows = np.stack(
            [
                create_padded_sequence(tokenize_text("\n" + story), 0, length, pad_token)
                for story in part
            ]
        )
        likeliest = forward_llm_batch(model, rows, threads=threads, logits=True).argmax(axis=2)
        for story, row, guess in zip(part, rows, likeliest, strict=True):
            for ending in stories.endings(story):
                if ending.kind == "hero" and ending.stop < length:
                    name = slice(ending.start + 1, ending.stop + 1)
                    asked += 1
                    right += bool((guess[ending.start : ending.stop] == row[name]).all())
    return right / max(asked, 1)


class Trainer:
    """A model on its way through a corpus.

    Parameters
    ----------
    folder : Path
        The run: where model, checkpoint and metrics go; made if need be.
    model_config : ModelConfig
    config : TrainingConfig
    corpus : Corpus
    source : dict
        Where the corpus came from, kept with the run as JSON: its ``name``, and whatever else is to
        be kept. ``--resume`` finds a text by its ``path``, bundled stories by ``stories`` and
        ``seed``.
    data : DataConfig, optional
        What becomes of its text; kept, too.

    Raises
    ------
    ValueError
        If the settings do not go together, or the source has no name or is not JSON.
    MemoryError
        If the training does not fit into memory.

    Attributes
    ----------
    tokenizer : Tokenizer
        The corpus's, which is saved with the model; of bytes, as many as the model knows.
    step : int
        Updates done so far.
    metrics : Metrics or None
        The last measurement; at the end of the run that of the whole validation set.
    best : (float, int)
        The lowest loss so far of the part of the validation set that every look is at, and the
        step it was measured after. What was saved then lies in the folder ``best`` of the run.
    """

    def __init__(
        self,
        folder: Path,
        model_config: ModelConfig,
        config: TrainingConfig,
        corpus: Corpus,
        source: dict[str, Any],
        data: DataConfig | None = None,
    ) -> None:
        scheme = SCHEMES.get(model_config.scheme)
        if config.float_steps and not (scheme and scheme.learns):
            raise SettingError(
                f"float_steps is {config.float_steps}, expected 0: the scheme "
                f"{model_config.scheme} has no codes that follow float weights",
                "float_steps",
            )
        _check_source(source)
        check_memory(model_config, config)
        self.folder = folder
        if config.precision == "auto":
            config = replace(config, precision=product_precisions()[-1])
        # A number from here on, which a run that gets more steps later keeps.
        config = replace(config, warmup_steps=config.warmup)
        try:
            with product_precision(config.precision):
                pass  # a precision that is not there is refused before anything is made
        except ValueError as error:
            raise SettingError(str(error), "precision") from None
        self.config = config
        self.corpus = corpus
        self.tokenizer = fit_tokenizer(corpus.tokenizer, model_config.vocab_size)
        for dataset in (corpus.training, corpus.validation):
            if dataset.pad_token != model_config.pad_token:
                raise ValueError(
                    f"the corpus has {dataset.pad_token} tokens, and the model "
                    f"{model_config.vocab_size}: expected as many"
                )
        self.source = source
        self.data = DataConfig() if data is None else data
        self.model = create_legacy_llm(model_config, config.seed)
        self.optimizer = _optimizer(self.model, config)
        self.gradients = create_legacy_llm_gradients(model_config)
        self.passes = BackwardPass(
            self.model,
            config.batch_size,
            model_config.sequence_length,
            config.threads,
            config.gradient_checkpointing,
        )
        self.reader = corpus.training.reader(
            config.batch_size * config.gradient_accumulation, config.seed
        )
        self._augmentation = Augmentation(
            self.data, self.tokenizer, model_config.pad_token, config.seed
        )
        self._prefetcher: Prefetcher | None = None
        # The step that a batch was last taken for, and the position before it.
        self._taken: tuple[int, tuple[int, ...]] = (-1, ())
        self._saved = 0
        self._places_seen = self._padding_seen = 0
        self.step = 0
        self.seconds = 0.0
        self.metrics: Metrics | None = None
        self.best = (math.inf, 0)

    def __reduce__(self) -> NoReturn:
        raise TypeError("a trainer cannot be copied or pickled: save the run, and restore another")

    def train(
        self,
        logger: MetricsLogger,
        on_step: Callable[[float, float], None],
        on_report: Callable[[dict[str, Any]], None],
        stop: Callable[[], bool],
        on_look: Callable[[], None] = lambda: None,
    ) -> bool:
        """Train until the last step, or until told to stop.

        Parameters
        ----------
        logger : MetricsLogger
        on_step : callable
            Gets the batch's loss and the tokens trained a second after every step.
        on_report : callable
            Gets every record that goes to ``metrics.jsonl``.
        stop : callable
            Asked after every step.
        on_look : callable, optional
            Called when a record was written, and before the run is saved: to write others.

        Returns
        -------
        bool
            Whether the run has ended: by its last step, or by its patience. Either way it is saved.

        Raises
        ------
        TrainingDiverged
            If the loss or a gradient is not finite; what was saved before stays as it was.
        OSError
            If the run cannot be saved in its folder, which is found out before the first step, or
            no longer.
        KeyboardInterrupt
            If it is interrupted, as in a notebook. The last whole step is saved before, but not
            measured; unless ``stop`` says by then that it was told to stop.
        """
        self._check_saving()
        try:
            return self._train(logger, on_step, on_report, stop, on_look)
        except KeyboardInterrupt:
            if not stop():
                self._save_interrupted()
            raise

    def _train(
        self,
        logger: MetricsLogger,
        on_step: Callable[[float, float], None],
        on_report: Callable[[dict[str, Any]], None],
        stop: Callable[[], bool],
        on_look: Callable[[], None],
    ) -> bool:
        with contextlib.closing(self):
            config = self.config
            if best_is_behind(self.folder, self.fixed_settings, self.best, self.step):
                # The checkpoint is there already, and the one before stays that.
                self._save_model()
                self._save_settings()
            per_step = (
                config.batch_size * config.gradient_accumulation * self.model.config.sequence_length
            )
            begin, first = time.perf_counter() - self.seconds, self.step
            began_here = self.seconds
            self._places_seen = self._padding_seen = 0
            losses: list[float] = []
            norms: list[float] = []
            codes = _codes(self.model, copied=True)
            while self.step < config.steps:
                loss, norm = self.train_step()
                losses.append(loss)
                norms.append(norm)
                self.seconds = time.perf_counter() - begin
                speed = (self.step - first) * per_step / max(self.seconds - began_here, 1e-9)
                on_step(loss, speed)
                last, ended = self.step == config.steps, False
                stopped = stop()
                if last or stopped or self.step % config.evaluate_every == 0:
                    ended = self._look(last, stop)
                    assert self.metrics is not None
                    record = {
                        "step": self.step,
                        "train_loss": sum(losses) / len(losses),
                        **self.metrics.record(),
                        "learning_rate": config.learning_rate_at(self.step - 1),
                        "gradient_norm": sum(norms) / len(norms),
                        "tokens_per_second": speed,
                        "elapsed_seconds": self.seconds,
                        "padding": self._padding_seen / self._places_seen,
                        "full_precision": self.model.full_precision,
                        "weights": weight_shares(self.model, codes),
                    }
                    # Records first: what is ahead of the checkpoint a resume drops, but what the
                    # checkpoint is ahead of would be missing for good.
                    logger.log(record)
                    on_look()
                    self.save()
                    on_report(record)
                    losses.clear()
                    norms.clear()
                    self._places_seen = self._padding_seen = 0
                    codes = _codes(self.model, copied=True)
                    # Measuring is not training: it counts for nothing in the speed.
                    begin = time.perf_counter() - self.seconds
                if ended:
                    return True
                if stopped:
                    return False
            return True

    def _look(self, last: bool, stop: Callable[[], bool] = lambda: False) -> bool:
        """Measure the model and note whether it is the best so far; return whether the run ends."""
        self._check_weights()
        # What a run ends with are its codes.
        self.model.use_full_precision(not last and self.step < self.config.float_steps)
        self.metrics = self._measure(_QUICK_TOKENS)
        if self.metrics.loss < self.best[0] and not self.model.full_precision:
            self.best = (self.metrics.loss, self.step)
        ended = last or self.config.patience_ends(self.step, self.best[1])
        if ended:
            self.metrics = self._measure(self.config.validation_tokens, stop)
        return ended

    def _check_weights(self) -> None:
        """Raise ``TrainingDiverged`` where a checkpoint would hold what is not finite."""
        held = {
            **self.model.latent,
            "the first moments": self.optimizer.first,
            "the second moments": self.optimizer.second,
        }
        for name, values in held.items():
            if not np.isfinite(values).all():
                raise diverged(
                    f"after step {self.step} {name} are no longer finite", self.model, self.config
                )

    def _measure(self, limit: int, stop: Callable[[], bool] = lambda: False) -> Metrics:
        try:
            return evaluate(
                self.model, self.corpus.validation, self.config.threads, limit, self.tokenizer, stop
            )
        except NotFiniteError as error:
            what = f"after step {self.step} the model's logits are not finite"
            raise diverged(what, self.model, self.config, error.batch) from None

    def train_step(self) -> tuple[float, float]:
        """Take one step and return the loss of its batch and the norm of the gradient."""
        config = self.config
        self.model.use_full_precision(self.step < config.float_steps)
        with product_precision(config.precision):
            return self._train_step(config)

    def _train_step(self, config: TrainingConfig) -> tuple[float, float]:
        batch = self._next_batch()
        tokens, targets, starts = batch.tokens, batch.targets, batch.starts
        zero_legacy_llm_gradients(self.gradients)
        counted = ignore_padding(tokens, targets, self.model.config.pad_token) >= 0
        total = int(counted.sum())
        self._places_seen += counted.size
        self._padding_seen += counted.size - total
        loss = 0.0
        # Where sequences are shorter, there are as many more of them.
        size = config.batch_size * (self.model.config.sequence_length // tokens.shape[1])
        for first in range(0, len(tokens), size):
            rows = slice(first, first + size)
            seen = None if starts is None else starts[rows]
            loss += self.passes.run(tokens[rows], targets[rows], self.gradients, total, seen)[0]
        loss /= max(total, 1)
        if not math.isfinite(loss):
            what = f"the loss is {loss} at step {self.step + 1}"
            raise diverged(what, self.model, config, batch, self.gradients)
        self.optimizer.weight_decay = config.weight_decay_at(self.step)
        norm = self.optimizer.step(
            self.gradients, config.learning_rate_at(self.step), config.clip, config.threads
        )
        if not math.isfinite(norm):
            what = f"the gradient's norm is {norm} at step {self.step + 1}"
            raise diverged(what, self.model, config, batch, self.gradients)
        self.step += 1
        return loss, norm

    def _next_batch(self) -> Batch:
        """Return what the next step learns from; from the first on, more are made meanwhile."""
        if self._taken[0] == self.step:
            self.close()
        self._taken = (self.step, self.position)
        if self._prefetcher is None:
            change = self._augmentation if self._augmentation.active else None
            self._prefetcher = Prefetcher(self.reader, change)
        return self._prefetcher.next_batch()

    def best_model(self) -> tuple[LegacyLLM, Metrics]:
        """Return the model of a run that has ended, its best, and how well it predicts.

        That is measured on the whole validation set, as far as the settings say.
        """
        model, metrics = self.model, self.metrics
        if 0 < self.best[1] < self.step:
            kept = load_model(self.folder)
            if kept.provenance.steps != self.step:
                model, metrics = kept, None
        if metrics is None:
            metrics = evaluate(
                model,
                self.corpus.validation,
                self.config.threads,
                self.config.validation_tokens,
                self.tokenizer,
            )
        return model, metrics

    @property
    def fixed_settings(self) -> FixedSettings:
        """What holds for the whole of the run."""
        return fixed_settings(self.model.config, self.config, self.data, self.source)

    @property
    def position(self) -> tuple[int, ...]:
        """Where in the data the next batch begins."""
        step, before = self._taken
        if step == self.optimizer.steps:
            # Something came between this batch and its update.
            return before
        return self.reader.position if self._prefetcher is None else self._prefetcher.position

    def close(self) -> None:
        """Stop making batches; those that were not learned from are made again if need be."""
        if self._prefetcher is not None:
            self._prefetcher.close()
        self.reader.position = self.position
        self._prefetcher = None

    def save(self) -> None:
        """Write tokenizer, model, checkpoint and settings, each as a whole or not at all.

        The settings come last: they are what makes a folder a run, which has all the rest.
        """
        self._save_model()
        checkpoint = Checkpoint(
            self.step,
            self.seconds,
            self.best,
            self.position,
            np.concatenate([w.reshape(-1) for w in self.model.latent.values()]),
            self.optimizer.first,
            self.optimizer.second,
        )
        write_checkpoint(self.folder, checkpoint, self.fixed_settings)
        self._save_settings()
        self._saved = self.step

    def _save_interrupted(self) -> None:
        """Save the last whole step, wherever Python has interrupted what followed."""
        # The optimizer counts before it changes a weight, and comes back when all are changed.
        self.step = self.optimizer.steps
        if self.step > self._saved:
            self._check_weights()
            self.metrics = None
            self.save()

    def _check_saving(self) -> None:
        """Raise ``OSError`` where the run could not be saved, before there is something to save."""
        trial = temporary_of(self.folder / TOKENIZER_FILE)
        try:
            trial.mkdir(parents=True)
            self.tokenizer.save(trial)
        except OSError as error:
            error.filename = str(self.folder)
            raise
        finally:
            remove(trial)
        if not (self.folder / CHECKPOINT_FILE).exists():
            # Weights and two moments, beside the model.
            needed = 12 * self.model.num_parameters + self.model.stored_bytes()
            total, _, free = shutil.disk_usage(self.folder)
            # Some file systems do not know their size.
            if needed > free and total:
                message = f"a checkpoint takes {needed:,} bytes, and {free:,} are free"
                raise OSError(errno.ENOSPC, message, str(self.folder))

    def _save_model(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save(self.folder)
        self.model.provenance = self._provenance()
        save_model(self.model, self.folder)

    def _save_settings(self) -> None:
        """Write the settings, and keep the run if it is the best so far."""
        settings = {
            "model": self.model.config.to_dict(),
            "training": self.config.to_dict(),
            "data": self.data.to_dict(),
            "source": self.source,
            "machine": machine(),
        }
        atomic_write(self.folder / SETTINGS_FILE, json.dumps(settings, indent=2) + "\n")
        if 0 < self.best[1] == self.step:
            keep_best(self.folder)

    def _provenance(self) -> Provenance:
        """Return what the model's files are to tell of where it comes from."""
        loss = self.metrics.loss if self.metrics else None
        if loss is None and 0 < self.best[1] == self.step:
            loss = self.best[0]
        return Provenance(self.source["name"], self.corpus.sha256, self.step, loss)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go back to a checkpoint of the run.

        It is the newest then; what was newer and is damaged does not come in its way any more.

        Raises
        ------
        ModelFileError
            If it is not of this run.
        OSError
            If it cannot be made the newest.
        """
        size, path = self.model.num_parameters, checkpoint.path
        if checkpoint.weights.size != size:
            raise ModelFileError(f"{path}: weights is not float32[{size}]")
        self.close()
        try:
            self.reader.check(checkpoint.position)
        except ValueError as error:
            raise ModelFileError(f"{path} is not a checkpoint of this run: {error}") from None
        make_newest(self.folder, checkpoint)
        self._taken = (-1, ())
        start = 0
        for weights in self.model.latent.values():
            part = checkpoint.weights[start : start + weights.size]
            weights[...] = part.reshape(weights.shape)
            start += weights.size
        self.model.quantize(self.config.threads)
        self.optimizer.first[...] = checkpoint.first
        self.optimizer.second[...] = checkpoint.second
        self.optimizer.steps = self.step = self._saved = checkpoint.step
        self.seconds = checkpoint.seconds
        self.best = checkpoint.best
        self.reader.position = checkpoint.position


def _check_source(source: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` unless the files of a run can keep where its corpus came from."""
    name = source.get("name")
    if type(name) is not str:
        raise ValueError(
            f"the source's name is {name!r}, expected a text, as in {{'name': 'my text'}}"
        )
    try:
        kept = json.loads(json.dumps(source))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"the source cannot be kept as JSON: {error}") from None
    if kept != source:
        raise ValueError(f"the source would come back as {kept}: expected what JSON has")


def keep_best(folder: Path) -> None:
    """Keep a run as it is now as its best."""
    files = (folder / name for name in RUN_FILES)
    # Tokens of another program have no tokenizer.
    atomic_copies((file for file in files if file.exists()), folder / BEST_FOLDER)


def best_is_behind(
    folder: Path, settings: FixedSettings, best: tuple[float, int], step: int
) -> bool:
    """Return whether a crash came after this very step was found best, and before it was kept.

    Somebody may have gone on from the best, which then is ahead, and stays as it is.
    """
    if not 0 < best[1] == step:
        return False
    try:
        kept = read_checkpoint(folder / BEST_FOLDER / CHECKPOINT_FILE, settings)
    except (ModelFileError, OSError):
        return True
    return kept.step < step


def steps_within(
    seconds: float,
    model_config: ModelConfig,
    config: TrainingConfig,
    corpus: Corpus,
    data: DataConfig | None = None,
) -> int:
    """Return how many steps a run can take in a time, looks at the validation set not counted.

    Found by training for about a twentieth of that time, which nothing else comes of.

    Raises
    ------
    TrainingDiverged
        If it does not get that far.
    """
    probe = Trainer(Path(), model_config, config, corpus, {"name": corpus.name}, data)
    shortest, longest = _PROBE_SECONDS
    least = min(max(_PROBE_SHARE * seconds, shortest), longest, seconds)
    with contextlib.closing(probe):
        # The first step makes and fetches what the others find there.
        probe.train_step()
        begin, passed = time.perf_counter(), 0.0
        while passed < least:
            probe.train_step()
            passed = time.perf_counter() - begin
    return min(max(round(seconds * (probe.step - 1) / passed), 1), MOST_STEPS)


def _optimizer(model: LegacyLLM, config: TrainingConfig) -> Optimizer:
    decay, direction = config.weight_decay, config.sign_direction
    if config.optimizer == "sgd":
        return SGD(model, config.momentum, decay, direction)
    shared = (config.beta1, config.beta2, config.epsilon, decay, direction)
    if config.optimizer == "adamw":
        return AdamW(model, *shared)
    return Muon(model, *shared, config.matrix_ratio, config.momentum)


def read_settings(
    folder: Path,
) -> tuple[ModelConfig, TrainingConfig, DataConfig, dict[str, Any]]:
    """Return the settings that a run was started with.

    Raises
    ------
    ModelFileError
        If the folder is no run, or its settings are damaged.
    """
    path = folder / SETTINGS_FILE
    if not path.is_file():
        reason = mistaken_file(folder) if folder.is_file() else None
        reason = reason or f"it has no {SETTINGS_FILE}"
        raise ModelFileError(f"{folder} is not a training run: {reason}")
    try:
        settings = json.loads(read_regular(path))
        model = ModelConfig.from_dict(settings["model"])
        training = TrainingConfig.from_dict(settings["training"])
        data = DataConfig.from_dict(settings.get("data", {}))
        source = located(settings["source"], folder)
    except KeyError as error:
        raise ModelFileError(f"{path} is not a run's settings: it has no {error}") from None
    except DAMAGE as error:
        raise ModelFileError(
            f"{path} is not a run's settings: {mistaken_file(path) or error}"
        ) from None
    return model, training, data, source
