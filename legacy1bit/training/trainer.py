"""The training loop (C: the loop of ``main.c``)."""

import contextlib
import errno
import json
import math
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from legacy1bit.backward import BackwardPass, ignore_padding
from legacy1bit.data.augment import Augmentation
from legacy1bit.data.corpus import Corpus
from legacy1bit.data.tokenizer import fit_tokenizer
from legacy1bit.dataset import Batch, Prefetcher
from legacy1bit.distributed.ranks import ALONE, Ranks
from legacy1bit.formats.provenance import Provenance
from legacy1bit.hyperparams import (
    COMPRESSED_BITS,
    MOST_STEPS,
    DataConfig,
    ModelConfig,
    TrainingConfig,
)
from legacy1bit.logger import Log
from legacy1bit.math_ops import fastest_precision, product_precision
from legacy1bit.model import (
    LegacyLLM,
    ModelFileError,
    create_legacy_llm,
    create_legacy_llm_gradients,
    load_model,
    save_model,
    zero_legacy_llm_gradients,
)
from legacy1bit.optimizer import SGD, AdamW, Muon, Optimizer, moment_bytes
from legacy1bit.schemes import SCHEMES
from legacy1bit.system.errors import SettingError
from legacy1bit.system.files import atomic_write, remove, temporary_of
from legacy1bit.system.hardware import machine
from legacy1bit.training.adapters import best_adapted, save_adapter
from legacy1bit.training.checkpoint import (
    Checkpoint,
    best_is_missing,
    make_newest,
    write_checkpoint,
)
from legacy1bit.training.divergence import diverged
from legacy1bit.training.evaluation import (
    Metrics,
    NotFiniteError,
    code_fractions,
    evaluate,
    model_codes,
)
from legacy1bit.training.local_steps import LocalSteps
from legacy1bit.training.memory import check_memory, training_bytes
from legacy1bit.training.run import START_PATH, TEACHER_HASH, FixedSettings, Run, RunSettings
from legacy1bit.training.start import Start
from legacy1bit.training.teacher import Teacher

# An evaluation during training is of about this many tokens of the validation set, spread evenly;
# the settings say of how many the last one is.
_QUICK_TOKENS = 16384

# Steps between the points of the curve of the training loss, and points between two evaluations.
_CURVE_STEPS, _CURVE_POINTS = 10, 50

# The fraction of a run's time in which its speed is measured, and the bounds of that time in
# seconds.
_PROBE_FRACTION, _PROBE_SECONDS = 0.05, (0.5, 10.0)


# 64 bits, and an odd number of them by which seeds are spread.
_MASK, _ODD = (1 << 64) - 1, 0x9E3779B97F4A7C15


class TrainingCallback:
    """Methods that ``Trainer.train`` calls; those that are not overridden do nothing."""

    def on_step(self, loss: float, tokens_per_second: float) -> None:
        """Called after every step, with the loss of its batch and the speed of training."""

    def on_evaluation(self, record: dict[str, Any]) -> None:
        """Called with the record of an evaluation, before the run is saved."""

    def on_save(self, record: dict[str, Any]) -> None:
        """Called with the record of an evaluation, after the run was saved."""

    def should_stop(self) -> bool:
        """Called after every step; if it returns true, the run is saved and the training ends."""
        return False


@dataclass
class _Statistics:
    """Statistics of the steps since the last evaluation.

    Attributes
    ----------
    losses, norms : list of float
        The loss and the gradient norm of each step.
    positions, padding : int
        The number of positions in the batches, and of those that are padding.
    seconds, exchanging : float
        The time of the steps, and how much of it was in exchanges with other ranks.
    """

    def of_ranks(self, ranks: Ranks) -> dict[str, Any]:
        """Return the entry of a record about several ranks: seconds of a step, in their order."""
        count = len(self.losses)
        own = {
            "host": ranks.host,
            "computing": (self.seconds - self.exchanging) / count,
            "exchanging": self.exchanging / count,
        }
        every = ranks.collect(own)
        return {"ranks": every} if ranks.size > 1 else {}

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    positions: int = 0
    padding: int = 0
    seconds: float = 0.0
    exchanging: float = 0.0

    def train_losses(self, step: int, evaluate_every: int) -> list[list[float]]:
        """Return a curve of the training loss: steps, each with the mean loss since the last one.

        Its points lie ``_CURVE_STEPS`` apart, or further where there would be more than
        ``_CURVE_POINTS`` between two evaluations.

        Parameters
        ----------
        step : int
            The last step.
        evaluate_every : int
            Steps between two evaluations.
        """
        every = max(_CURVE_STEPS, -(-evaluate_every // _CURVE_POINTS))
        first = step - len(self.losses)
        ends = [n for n in range(first + 1, step) if n % every == 0] + [step]
        parts = [
            self.losses[begin - first : end - first] for begin, end in pairwise([first, *ends])
        ]
        return [[end, sum(part) / len(part)] for end, part in zip(ends, parts, strict=True)]


class Trainer:
    """Trains a model on a corpus.

    Parameters
    ----------
    folder : Path
        The folder of the run, which is created if necessary.
    model_config : ModelConfig
    config : TrainingConfig
    corpus : Corpus
    source : dict
        Where the corpus comes from, stored with the run as JSON: its ``name``, and anything else.
        ``--resume`` reads a text from its ``path``, bundled stories from ``stories`` and ``seed``.
    data : DataConfig, optional
        How the text was read and tokenized, also stored.
    start : Start, optional
        The model that the training goes on from; by default the weights are random.
    teacher : Teacher, optional
        The model whose predictions are learned beside the text.
    ranks : Ranks, optional
        The processes that train together, each of which has a trainer with the same arguments, and
        calls the same methods; by default this one alone. The first writes all files.

    Raises
    ------
    ValueError
        If the settings do not go together, or the source has no name or is not JSON.
    MemoryError
        If the training does not fit into memory.

    Attributes
    ----------
    run : Run
    memory : dict of str to int
        The bytes that it needs, by their purpose; see ``memory.training_bytes``.
    tokenizer : Tokenizer
        That of the corpus, saved with the model.
    step : int
        Updates done so far.
    metrics : Metrics or None
        The last evaluation; at the end of the run that of the whole validation set.
    best : (float, int)
        The lowest loss so far on the part of the validation set that every evaluation is of, and
        its step. The run as it was then is in its folder ``best``.
    """

    def __init__(
        self,
        folder: Path,
        model_config: ModelConfig,
        config: TrainingConfig,
        corpus: Corpus,
        source: dict[str, Any],
        data: DataConfig | None = None,
        start: Start | None = None,
        teacher: Teacher | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        scheme = SCHEMES.get(model_config.scheme)
        for name in ("float_steps", "quantization_warmup"):
            value = getattr(config, name)
            if value and config.adapter:
                raise SettingError(
                    f"{name} is {value}, expected 0 with an adapter: the weights of its model stay "
                    "as they are",
                    name,
                )
            if value and not (scheme and scheme.learns):
                raise SettingError(
                    f"{name} is {value}, expected 0: the scheme {model_config.scheme} has no codes "
                    "that follow float weights",
                    name,
                )
        for name in ("distillation_weight", "teacher_temperature"):
            value = getattr(config, name)
            if teacher is None and value != getattr(TrainingConfig, name):
                raise SettingError(f"{name} is {value:g}, and there is no --teacher", name)
        if config.adapter and start is None:
            raise SettingError(
                f"adapter is {config.adapter}, and there is no --from: expected a model for it",
                "adapter",
            )
        for name in ("adapter_alpha", "adapter_dropout", "adapter_layers"):
            value = getattr(config, name)
            if not config.adapter and value != getattr(TrainingConfig, name):
                raise SettingError(f"{name} is {value}, and there is no --adapter", name)
        _check_source(source)
        self.memory = training_bytes(
            model_config,
            config,
            None if teacher is None else teacher.config,
            0 if start is None else start.nbytes(),
            ranks.size,
        )
        check_memory(self.memory, config, ranks.neighbors)
        bits = COMPRESSED_BITS[config.gradient_compression]
        self.ranks = ranks.compressed(bits, config.threads) if bits else ranks
        # Those that exchange in every step.
        self._every_step = ALONE if config.local_steps else self.ranks
        self.run = Run(Path(folder))
        if config.precision == "auto":
            fastest = ranks.broadcast(fastest_precision(model_config.has_int8_products))
            config = replace(config, precision=fastest)
        # Fixed from here on: more steps later do not change the warm-up.
        config = replace(config, warmup_steps=config.warmup)
        try:
            with product_precision(config.precision):
                pass  # refuse an unavailable precision before anything is allocated
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
        self.teacher = teacher
        self.source = source
        if teacher is not None:
            teacher.check(model_config, self.tokenizer)
            self.source = teacher.recorded_in(source)
        elif TEACHER_HASH in source:
            raise ValueError("the run has a teacher: expected it")
        self.data = DataConfig() if data is None else data
        if start is None:
            self.model = create_legacy_llm(model_config, config.seed)
        else:
            self.model = start.model(model_config, config)
            self.source = start.recorded_in(self.source, self.model)
        self.optimizer = _optimizer(self.model, config, self._every_step)
        self._local: LocalSteps | None = None
        if config.local_steps:
            self._local = LocalSteps(self.optimizer.weights, self.ranks)
        self.gradients = create_legacy_llm_gradients(model_config, self.model.adapter)
        self.passes = BackwardPass(
            self.model,
            -(-config.batch_size // ranks.size),
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
        # The last step that took a batch, and the position before it.
        self._taken: tuple[int, tuple[int, ...]] = (-1, ())
        self._saved = 0
        self._since = _Statistics()
        self.step = 0
        self.seconds = 0.0
        self.metrics: Metrics | None = None
        self.best = (math.inf, 0)

    def __reduce__(self) -> NoReturn:
        raise TypeError("a trainer cannot be copied or pickled: save the run, and restore another")

    def train(self, logger: Log, callback: TrainingCallback | None = None) -> bool:
        """Train until the last step, or until the callback stops it.

        Parameters
        ----------
        logger : Log
            Writes a record of every evaluation.
        callback : TrainingCallback, optional

        Returns
        -------
        bool
            Whether the run has ended: by its last step, or by its patience. Either way it is saved.

        Raises
        ------
        TrainingDiverged
            If the loss or a gradient is not finite; the files of the run are unchanged then.
        OSError
            If the run cannot be saved in its folder, which is checked before the first step.
        KeyboardInterrupt
            If it is interrupted, as in a notebook. The last completed step is saved before, but not
            evaluated; unless ``should_stop`` returns true by then.
        """
        callback = TrainingCallback() if callback is None else callback
        if self.ranks.is_first:
            self._check_saving()
        try:
            return self._train(logger, callback)
        except KeyboardInterrupt:
            # Several ranks save together or not at all.
            if not callback.should_stop() and self.ranks.size == 1:
                self._save_interrupted()
            raise

    def _train(self, logger: Log, callback: TrainingCallback) -> bool:
        with contextlib.closing(self):
            config = self.config
            if self.ranks.is_first and best_is_missing(
                self.run, self.fixed_settings, self.best, self.step
            ):
                # The checkpoint exists already, and the one before stays as it is.
                self._save_model()
                self._save_settings()
            per_step = (
                config.batch_size * config.gradient_accumulation * self.model.config.sequence_length
            )
            # Whatever was computed on other CPUs before: one model for all.
            self.ranks.broadcast_array(self.optimizer.weights)
            if not self.ranks.is_first:
                self.model.quantize(config.threads)
            if self._local is not None:
                self._local.begin()
            begin, first = time.perf_counter() - self.seconds, self.step
            began_here = self.seconds
            self._since = _Statistics()
            codes = model_codes(self.model, copy=True)
            while self.step < config.steps:
                loss, norm = self.train_step()
                self._since.losses.append(loss)
                self._since.norms.append(norm)
                self.seconds = time.perf_counter() - begin
                speed = (self.step - first) * per_step / max(self.seconds - began_here, 1e-9)
                callback.on_step(loss, speed)
                last, ended = self.step == config.steps, False
                due = last or self.step % config.evaluate_every == 0
                meet = due or not config.local_steps or self.step % config.local_steps == 0
                if meet:
                    self.meet()
                stopped = meet and self.ranks.any(callback.should_stop())
                if due or stopped:
                    ended = self._evaluate(last, callback.should_stop)
                    record = self._record(speed, codes)
                    # Records first: a resumed run drops those after its checkpoint, but could not
                    # repeat those before it.
                    logger.log(record)
                    callback.on_evaluation(record)
                    self.save()
                    callback.on_save(record)
                    self._since = _Statistics()
                    codes = model_codes(self.model, copy=True)
                    # The speed is that of training: evaluations do not count.
                    begin = time.perf_counter() - self.seconds
                if ended:
                    return True
                if stopped:
                    return False
            return True

    def _record(
        self, tokens_per_second: float, codes: dict[str, npt.NDArray[np.int8]]
    ) -> dict[str, Any]:
        """Return the record of an evaluation; ``codes`` are those of the evaluation before."""
        since = self._since
        if self._local is not None:
            losses = self.ranks.collect(since.losses)
            since.losses = [sum(each) / len(each) for each in zip(*losses, strict=True)]
        assert self.metrics is not None
        return {
            "step": self.step,
            "train_loss": sum(since.losses) / len(since.losses),
            "train_losses": since.train_losses(self.step, self.config.evaluate_every),
            **self.metrics.record(),
            "learning_rate": self.config.learning_rate_at(self.step - 1),
            "gradient_norm": sum(since.norms) / len(since.norms),
            "tokens_per_second": tokens_per_second,
            "elapsed_seconds": self.seconds,
            "padding": since.padding / since.positions,
            "full_precision": self.model.full_precision,
            "weights": code_fractions(self.model, codes),
            **since.of_ranks(self.ranks),
        }

    def _evaluate(self, last: bool, stop: Callable[[], bool] = lambda: False) -> bool:
        """Evaluate the model, update ``best``, and return whether the run ends."""
        self._check_weights()
        # A run ends with its codes, never in full precision; and what is saved while quantization
        # sets in are codes, too.
        self.model.use_full_precision(not last and self.step < self.config.float_steps)
        self.metrics = self._measure(_QUICK_TOKENS)
        # A run that was stopped between two evaluations ends like one that was not stopped.
        regular = last or self.step % self.config.evaluate_every == 0
        if regular and self.metrics.loss < self.best[0] and not self.model.full_precision:
            self.best = (self.metrics.loss, self.step)
        ended = last or self.config.patience_ends(self.step, self.best[1])
        if ended:
            self.metrics = self._measure(self.config.validation_tokens, stop)
        return ended

    def _check_weights(self) -> None:
        """Raise ``TrainingDiverged`` where a checkpoint would not be finite."""
        moments = self.optimizer.moments
        # Of moments in eight bits only the scales can be no numbers.
        arrays = {
            **self.model.latent,
            "the first moments": moments.get("first_scales", moments["first"]),
            "the second moments": moments.get("second_scales", moments["second"]),
        }
        for name, values in arrays.items():
            if not np.isfinite(values).all():
                raise diverged(
                    f"after step {self.step} {name} are no longer finite", self.model, self.config
                )

    def _measure(self, limit: int, stop: Callable[[], bool] = lambda: False) -> Metrics:
        try:
            return evaluate(
                self.model,
                self.corpus.validation,
                self.config.threads,
                limit,
                self.tokenizer,
                stop,
                self.ranks,
            )
        except NotFiniteError as error:
            what = f"after step {self.step} the model's logits are not finite"
            raise diverged(what, self.model, self.config, error.batch) from None

    def train_step(self) -> tuple[float, float]:
        """Do one update, and return the loss of its batch and the norm of the gradient."""
        config = self.config
        begin, exchanging = time.perf_counter(), self.ranks.seconds
        self.model.use_blend(config.quantized_share_at(self.step), config.threads)
        with product_precision(config.precision):
            loss, norm = self._train_step(config)
        self._since.seconds += time.perf_counter() - begin
        self._since.exchanging += self.ranks.seconds - exchanging
        return loss, norm

    def _train_step(self, config: TrainingConfig) -> tuple[float, float]:
        batch = self._next_batch()
        tokens, targets, starts = batch.tokens, batch.targets, batch.starts
        zero_legacy_llm_gradients(self.gradients)
        counted = ignore_padding(tokens, targets, self.model.config.pad_token) >= 0
        total = int(counted.sum())
        self._since.positions += counted.size
        self._since.padding += counted.size - total
        loss = 0.0
        # Shorter sequences come in larger batches.
        size = config.batch_size * (self.model.config.sequence_length // tokens.shape[1])
        firsts = range(0, len(tokens), size)
        parts = [self.ranks.part(first, min(first + size, len(tokens))) for first in firsts]
        if self._local is not None:
            total = sum(int(counted[rows].sum()) for rows in parts)
        for first, rows in zip(firsts, parts, strict=True):
            if rows.start == rows.stop:
                continue
            part = None if starts is None else starts[rows]
            loss += self.passes.run(
                tokens[rows],
                targets[rows],
                self.gradients,
                total,
                part,
                self._logits_of_teacher(tokens[rows], part),
                config.distillation_weight,
                config.teacher_temperature,
                config.adapter_dropout,
                self._dropout_seed(first),
                rows.start - first,
            )[0]
        loss = sum(self._every_step.collect(loss)) / max(total, 1)
        if not math.isfinite(loss):
            what = f"the loss is {loss} at step {self.step + 1}"
            raise diverged(what, self.model, config, batch, self.gradients)
        self.optimizer.weight_decay = config.weight_decay_at(self.step)
        norm = self.optimizer.step(
            self.gradients, config.learning_rate_at(self.step), config.clip, config.threads
        )
        if not math.isfinite(norm):
            self._check_teacher(batch)
            self._every_step.gather(self.gradients.flat, self.optimizer.bounds)
            what = f"the gradient's norm is {norm} at step {self.step + 1}"
            raise diverged(what, self.model, config, batch, self.gradients)
        self.step += 1
        return loss, norm

    def meet(self) -> None:
        """Give all ranks the same weights, where they have taken steps by themselves."""
        if self._local is not None:
            self._local.synchronize()
            self.model.quantize(self.config.threads)

    def _dropout_seed(self, row: int) -> int:
        """Return the seed of the dropout of a pass, that from this row of the batch on."""
        return (self.config.seed * _ODD + self.step * (_ODD ^ _MASK) + row) & _MASK

    def _logits_of_teacher(
        self, tokens: npt.NDArray[Any], starts: npt.NDArray[Any] | None
    ) -> npt.NDArray[np.float32] | None:
        if self.teacher is None:
            return None
        return self.teacher.logits(tokens, starts, self.config.threads)

    def _check_teacher(self, batch: Batch) -> None:
        """Raise ``ValueError`` if it is the teacher whose numbers are not finite."""
        logits = self._logits_of_teacher(batch.tokens, batch.starts)
        used = batch.tokens != self.model.config.pad_token
        if logits is not None and not np.isfinite(logits[used]).all():
            assert self.teacher is not None
            raise ValueError(
                f"the logits of the teacher {self.teacher.path} are not finite at step "
                f"{self.step + 1}: its weights are damaged"
            )

    def _next_batch(self) -> Batch:
        """Return the batch of the next step; a thread reads ahead from the first on."""
        if self._taken[0] == self.step:
            self.close()
        self._taken = (self.step, self.position)
        if self._prefetcher is None:
            change = self._augmentation if self._augmentation.active else None
            self._prefetcher = Prefetcher(self.reader, change)
        return self._prefetcher.next_batch()

    def best_model(self) -> tuple[LegacyLLM, Metrics]:
        """Return the best model of a run that has ended, and its metrics.

        They are those of the whole validation set, or of as many tokens as the settings say.
        """
        model, metrics = self.model, self.metrics
        if 0 < self.best[1] < self.step:
            adapted = self.model.adapter is not None
            best = best_adapted(self.model, self.folder) if adapted else load_model(self.folder)
            if best.provenance.steps != self.step:
                model, metrics = best, None
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
        """The settings that hold for the whole of the run."""
        return self.settings.fixed()

    @property
    def settings(self) -> RunSettings:
        """The settings of the run, as its folder has them."""
        return RunSettings(self.model.config, self.config, self.data, self.source, machine())

    @property
    def folder(self) -> Path:
        """The folder of the run."""
        return self.run.folder

    @property
    def position(self) -> tuple[int, ...]:
        """The position of the next batch in the data."""
        step, before = self._taken
        if step == self.optimizer.steps:
            # The update of this batch was interrupted.
            return before
        return self.reader.position if self._prefetcher is None else self._prefetcher.position

    def close(self) -> None:
        """Stop reading ahead; unused batches are read again if necessary."""
        if self._prefetcher is not None:
            self._prefetcher.close()
        self.reader.position = self.position
        self._prefetcher = None

    def save(self) -> None:
        """Write tokenizer, model, checkpoint and settings, each atomically.

        The settings come last: a folder that has them has all the other files.
        """
        moments = self.optimizer.gather_moments()
        if self._local is not None and moments is not None:
            moments = self._local.gather_moments(moments)
        # What a resumed run does not have, none has from here on.
        self.ranks.forget()
        if self.ranks.is_first and moments is not None:
            self._write(moments)
        self._saved = self.step

    def _write(self, moments: Mapping[str, npt.NDArray[Any]]) -> None:
        self._save_model()
        checkpoint = Checkpoint(
            self.step,
            self.seconds,
            self.best,
            self.position,
            self.optimizer.weights,
            moments,
        )
        write_checkpoint(self.run, checkpoint, self.fixed_settings)
        self._save_settings()

    def _save_interrupted(self) -> None:
        """Save the last completed step, wherever Python was interrupted after it."""
        # The optimizer counts a step before it changes a weight, and returns when all are changed.
        self.step = self.optimizer.steps
        if self.step > self._saved:
            self._check_weights()
            self.metrics = None
            self.save()

    def _check_saving(self) -> None:
        """Raise ``OSError`` where the run could not be saved."""
        trial = temporary_of(self.run.tokenizer_file)
        try:
            trial.mkdir(parents=True)
            self.tokenizer.save(trial)
        except OSError as error:
            error.filename = str(self.folder)
            raise
        finally:
            remove(trial)
        if not self.run.checkpoint_file.exists():
            # Weights and two moments, beside the model.
            weights = 4 * self.model.num_trainable
            learned = self.model.learned
            assert learned is not None
            moments = moment_bytes(learned, self.config.optimizer_bits)
            needed = weights + moments + self.model.stored_bytes()
            total, _, free = shutil.disk_usage(self.folder)
            # Some file systems report no size.
            if needed > free and total:
                message = f"a checkpoint takes {needed:,} bytes, and {free:,} are free"
                raise OSError(errno.ENOSPC, message, str(self.folder))

    def _save_model(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save(self.folder)
        if self.corpus.template is not None:
            atomic_write(self.run.template_file, self.corpus.template)
        self.model.provenance = self._provenance()
        if self.model.adapter is not None:
            base = str(self.source[START_PATH])
            save_adapter(self.model, self.folder, base, self.config.adapter_dropout)
        else:
            save_model(self.model, self.folder)

    def _save_settings(self) -> None:
        """Write the settings, and copy the run if it is the best so far."""
        self.run.write_settings(self.settings)
        if 0 < self.best[1] == self.step:
            self.run.keep_best()

    def _provenance(self) -> Provenance:
        """Return where the model comes from, for its files."""
        loss = self.metrics.loss if self.metrics else None
        if loss is None and 0 < self.best[1] == self.step:
            loss = self.best[0]
        return Provenance(self.source["name"], self.corpus.sha256, self.step, loss)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Restore a checkpoint of the run.

        It becomes the newest: it replaces a newer one that is damaged.

        Raises
        ------
        ModelFileError
            If it does not belong to this run.
        OSError
            If it cannot be made the newest.
        """
        size, path = self.model.num_trainable, checkpoint.path
        if checkpoint.weights.size != size:
            raise ModelFileError(f"{path}: weights is not float32[{size}]")
        self.close()
        try:
            self.reader.check(checkpoint.position)
        except ValueError as error:
            raise ModelFileError(f"{path} is not a checkpoint of this run: {error}") from None
        try:
            self.optimizer.load_moments(checkpoint.moments)
            if self._local is not None:
                self._local.load_moments(checkpoint.moments)
        except ValueError as error:
            raise ModelFileError(f"{path}: {error}") from None
        if self.ranks.is_first:
            make_newest(self.run, checkpoint)
        self._taken = (-1, ())
        self.optimizer.weights[...] = checkpoint.weights
        self.model.quantize(self.config.threads)
        self.optimizer.steps = self.step = self._saved = checkpoint.step
        self.seconds = checkpoint.seconds
        self.best = checkpoint.best
        self.reader.position = checkpoint.position


def _check_source(source: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` unless the files of a run can store where its corpus comes from."""
    name = source.get("name")
    if type(name) is not str:
        raise ValueError(
            f"the source's name is {name!r}, expected a text, as in {{'name': 'my text'}}"
        )
    try:
        stored = json.loads(json.dumps(source))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"the source cannot be stored as JSON: {error}") from None
    if stored != source:
        raise ValueError(f"the source would be read back as {stored}: expected JSON types only")


def steps_within(
    seconds: float,
    model_config: ModelConfig,
    config: TrainingConfig,
    corpus: Corpus,
    data: DataConfig | None = None,
    start: Start | None = None,
    teacher: Teacher | None = None,
    ranks: Ranks = ALONE,
) -> int:
    """Return the number of steps that a run can do in a time, evaluations not counted.

    A trial run of about a twentieth of that time measures the speed.

    Raises
    ------
    TrainingDiverged
        If the trial run diverges.
    """
    source = {"name": corpus.name}
    probe = Trainer(Path(), model_config, config, corpus, source, data, start, teacher, ranks)
    shortest, longest = _PROBE_SECONDS
    least = min(max(_PROBE_FRACTION * seconds, shortest), longest, seconds)
    with contextlib.closing(probe):
        # The first step allocates and loads, and is slower.
        probe.train_step()
        begin, passed = time.perf_counter(), 0.0
        while passed < least:
            probe.train_step()
            passed = ranks.broadcast(time.perf_counter() - begin)
    return min(max(round(seconds * (probe.step - 1) / passed), 1), MOST_STEPS)


def _optimizer(model: LegacyLLM, config: TrainingConfig, ranks: Ranks) -> Optimizer:
    decay, direction = config.weight_decay, config.sign_direction
    bits = config.optimizer_bits
    if config.optimizer == "sgd":
        return SGD(model, config.momentum, decay, direction, bits, ranks)
    shared = (config.beta1, config.beta2, config.epsilon, decay, direction)
    if config.optimizer == "adamw":
        return AdamW(model, *shared, bits, ranks)
    return Muon(model, *shared, config.muon_lr_ratio, config.momentum, bits, ranks)
