"""What a model and a training run can be told (C: ``hyperparams.c``, the macros of ``config.h``).

``ModelConfig`` fixes a model's shape and arithmetic; ``TrainingConfig`` how it is trained. A field
carries its range and what it means; both records check themselves by that when they are made, the
command line makes its options of it, and they travel as plain dictionaries. The learning-rate
schedules keep the names of their C functions.
"""

import math
from dataclasses import Field, asdict, dataclass, field, fields
from typing import Any, Self

from legacy1bit.schemes import FLOAT, SCHEMES
from legacy1bit.system.errors import SettingError, shown

# The file of a run that holds both records.
SETTINGS_FILE = "training.json"

MOST_STEPS = 1 << 40

# What a run that goes on may be told anew.
CHANGEABLE = ("steps", "threads", "precision", "patience")

SCALES = ("tensor", "row", "128", "256", "one")
OPTIMIZERS = ("muon", "adamw", "sgd")
SCHEDULES = ("cosine", "linear", "step", "constant")
TOKENIZERS = ("bytes", "chars", "bpe")
SPLITS = ("auto", "documents", "tail")
BATCH_ORDERS = ("windows", "passes", "packed", "buckets")

# The peak learning rate where none is given.
DEFAULT_RATES = {"muon": 5.7e-3, "adamw": 3e-3, "sgd": 0.1}


def _integer(default: int | None, low: int, high: int, meaning: str) -> Any:
    return field(
        default=default, metadata={"kind": int, "low": low, "high": high, "meaning": meaning}
    )


def _number(default: float | None, low: float, high: float, meaning: str) -> Any:
    return field(
        default=default, metadata={"kind": float, "low": low, "high": high, "meaning": meaning}
    )


def _choice(default: str, choices: tuple[str, ...], meaning: str) -> Any:
    return field(default=default, metadata={"kind": str, "choices": choices, "meaning": meaning})


def _text(default: str | None, meaning: str) -> Any:
    return field(default=default, metadata={"kind": str, "meaning": meaning})


def _flag(default: bool, meaning: str) -> Any:
    return field(default=default, metadata={"kind": bool, "meaning": meaning})


_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def check_setting(setting: Field[Any], value: Any, name: str | None = None) -> None:
    """Check that a value is what a field takes.

    Parameters
    ----------
    setting : Field
    value : Any
    name : str, optional
        What an error calls the setting; its own name when not given.

    Raises
    ------
    TypeError, ValueError
        If it is of another kind, or out of range.
    """
    kind, name = setting.metadata["kind"], name or setting.name
    if value is None and setting.default is None:
        return
    if kind is str and "choices" not in setting.metadata:
        if not isinstance(value, str):
            raise TypeError(f"{name} is {shown(value)}, expected text")
        if not value:
            raise SettingError(f"{name} is '', expected text", name)
        return
    if kind is str:
        if value not in setting.metadata["choices"]:
            expected = ", ".join(setting.metadata["choices"])
            raise SettingError(f"{name} is {shown(value)}, expected one of {expected}", name)
        return
    fits = isinstance(value, (int, float) if kind is float else kind)
    if not fits or (kind is not bool and isinstance(value, bool)):
        raise TypeError(f"{name} is {shown(value)}, expected {_WORDS[kind]}")
    if kind is not bool:
        low, high = setting.metadata["low"], setting.metadata["high"]
        if not low <= value <= high:
            raise SettingError(f"{name} is {shown(value)}, expected {low} to {high}", name)


class _Record:
    """A dataclass that checks itself, and turns into a dictionary and back."""

    def __post_init__(self) -> None:
        for setting in fields(self):  # type: ignore[arg-type]
            check_setting(setting, getattr(self, setting.name))

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as a plain dictionary."""
        return dict(asdict(self))  # type: ignore[call-overload]

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> Self:
        """Make a record of a dictionary; keys that are missing take their defaults.

        Raises
        ------
        TypeError, ValueError
            If ``settings`` is no dictionary, a key is unknown or a value does not fit.
        """
        if not isinstance(settings, dict):
            raise TypeError(f"expected a dictionary of settings, not {type(settings).__name__}")
        known = {setting.name for setting in fields(cls)}  # type: ignore[arg-type]
        unknown = sorted(set(settings) - known)
        if unknown:
            raise ValueError(f"unknown setting {unknown[0]!r}, expected {', '.join(sorted(known))}")
        return cls(**settings)


# The upper ends of the sizes: beyond them a number in a file or on a command line is a mistake or
# an attack, not a model.
@dataclass(frozen=True)
class ModelConfig(_Record):
    """The shape and the arithmetic of a model; each field says what it means."""

    vocab_size: int = _integer(256, 1, 1 << 20, "V, the tokens; the id V itself is padding")
    model_dim: int = _integer(192, 1, 1 << 14, "C, the width of the residual stream")
    num_blocks: int = _integer(2, 1, 1 << 10, "the transformer blocks")
    num_heads: int = _integer(4, 1, 1 << 10, "H, attention heads a block; divides the width")
    ffn_multiplier: int = _integer(3, 1, 1 << 6, "the feed-forward layer's width over C")
    sequence_length: int = _integer(256, 1, 1 << 17, "T, the longest context, in tokens")
    scheme: str = _choice("ternary", (*SCHEMES, FLOAT), "what the blocks' matrices hold")
    scale: str = _choice(
        "tensor", SCALES, "which weights share a scale: a matrix, a row, so many of a row; one: 1"
    )
    ternary_embedding: bool = _flag(False, "quantize embedding and output matrix, too")
    int8_activations: bool = _flag(
        False, "round the inputs of quantized layers to int8, with one scale a token"
    )
    sub_norm: bool = _flag(False, "a layer norm before every linear layer (SubLN)")
    activation: str = _choice("relu2", ("relu2", "relu"), "the feed-forward layer's activation")
    positions: str = _choice("rope", ("rope", "none"), "rotary positions, or none")
    rope_base: float = _number(10000.0, 1.0, 1e9, "the base of the rotary positions' wavelengths")
    final_norm: bool = _flag(True, "a layer norm before the output layer")
    attention_span: int = _integer(
        0, 0, 1 << 17, "how many tokens back a token sees, itself included; 0: all"
    )
    output_bias: bool = _flag(False, "a bias for each token in the output layer")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model_dim % self.num_heads:
            raise SettingError(
                f"model_dim is {self.model_dim}, expected a multiple of num_heads "
                f"({self.num_heads})",
                *("model_dim", "num_heads"),
            )
        if self.positions == "rope" and self.head_dim % 2:
            raise SettingError(
                f"model_dim / num_heads is {self.head_dim}, expected an even number: rotary "
                "positions turn pairs",
                *("model_dim", "num_heads"),
            )

    @property
    def head_dim(self) -> int:
        """D = C / H."""
        return self.model_dim // self.num_heads

    @property
    def ffn_dim(self) -> int:
        """F, the width of the feed-forward network's hidden layer."""
        return self.model_dim * self.ffn_multiplier

    @property
    def pad_token(self) -> int:
        """The id of padding: the first that is no token (C: ``PAD_TOKEN``)."""
        return self.vocab_size

    @property
    def is_c_original(self) -> bool:
        """Whether the C original computes just what a model of these settings does."""
        return self == ModelConfig.c_original(
            self.vocab_size,
            self.model_dim,
            self.num_blocks,
            num_heads=self.num_heads,
            sequence_length=self.sequence_length,
        )

    @classmethod
    def c_original(
        cls,
        vocab_size: int = 256,
        model_dim: int = 256,
        num_blocks: int = 2,
        *,
        num_heads: int = 4,
        sequence_length: int = 128,
    ) -> Self:
        """Return the settings of the C original: its options, and by default its sizes."""
        return cls(
            vocab_size=vocab_size,
            model_dim=model_dim,
            num_blocks=num_blocks,
            num_heads=num_heads,
            ffn_multiplier=4,
            sequence_length=sequence_length,
            scale="one",
            ternary_embedding=True,
            activation="relu",
            positions="none",
            final_norm=False,
            attention_span=1,
            output_bias=True,
        )


@dataclass(frozen=True)
class DataConfig(_Record):
    """What becomes of a text on its way to training; each field says what it means.

    What changes sequences (the last five) does so in training only, another way each time they are
    seen. Subword splitting takes merges back, as BPE-dropout leaves them out (Provilkov et al.,
    arXiv 1910.13267, section 3).
    """

    tokenizer: str = _choice("bytes", TOKENIZERS, "what a token is")
    vocabulary: int | None = _integer(
        None, 256, 1 << 20, "tokens of chars (default: as many as it takes) and bpe (default: 1024)"
    )
    field: str = _text("text", "which field of JSON lines and Parquet files holds the text")
    encoding: str = _text("utf-8", "how the text is encoded")
    separator: str | None = _text(
        None, "what stands between the documents of a text file; \\n: a line break"
    )
    split: str = _choice(
        "auto",
        SPLITS,
        "what validates: some documents, or the tail of the text; auto: documents, where there is "
        "more than one",
    )
    validation_share: float = _number(0.1, 1e-9, 0.9, "how much of the text validates")
    order: str = _choice(
        "windows",
        BATCH_ORDERS,
        "what a batch has: random windows; passes, each of which takes every sequence once; "
        "documents in passes, packed, or in rows of their own, by length",
    )
    apart: bool = _flag(False, "a token sees its own document only")
    token_dropout: float = _number(0.0, 0.0, 1.0, "the share of inputs replaced by random ones")
    span_masking: float = _number(0.0, 0.0, 0.9, "the share of inputs hidden, three in a row")
    subword_splitting: float = _number(0.0, 0.0, 1.0, "how often a merged token is split in two")
    case_noise: float = _number(0.0, 0.0, 1.0, "the share of words whose case changes")
    space_noise: float = _number(0.0, 0.0, 1.0, "the share of spaces doubled or made line breaks")


@dataclass(frozen=True)
class SamplingConfig(_Record):
    """How the next token is drawn; each field says what it means.

    The filters apply in the order of the fields. Top-p: Holtzman et al., arXiv 1904.09751, section
    3.1; min-p: Nguyen et al., arXiv 2407.01082, section 3; the repetition penalty: Keskar et al.,
    arXiv 1909.05858, equation 2, with divided logits where they are positive, multiplied ones
    where they are not.
    """

    temperature: float = _number(
        0.8,
        0.0,
        1e30,
        "divides the logits: below 1 likely tokens become likelier; 0: the likeliest",
    )
    top_k: int = _integer(0, 0, 1 << 31, "only so many of the likeliest tokens; 0: all")
    top_p: float = _number(1.0, 1e-9, 1.0, "only the likeliest that together have this probability")
    min_p: float = _number(0.0, 0.0, 1.0, "only tokens so likely, compared with the likeliest")
    repetition_penalty: float = _number(
        1.0, 1e-3, 1e3, "above 1 what was there lately becomes less likely"
    )
    repetition_window: int = _integer(
        64, 0, 1 << 31, "how many tokens back that looks; 0: the whole context"
    )


@dataclass(frozen=True)
class TrainingConfig(_Record):
    """How a model is trained; each field says what it means.

    The learning rate rises over ``warmup_steps``, stays at its peak, and falls over the last
    ``decay_share`` of the steps along the ``schedule``, but not before it has risen.
    """

    steps: int = _integer(1500, 1, MOST_STEPS, "updates of the weights")
    batch_size: int = _integer(8, 1, 1 << 20, "sequences in a batch")
    gradient_accumulation: int = _integer(
        1, 1, 1 << 20, "batches whose gradients are added up for one step"
    )
    optimizer: str = _choice(
        "muon", OPTIMIZERS, "muon: for the blocks' matrices, and AdamW for the rest"
    )
    learning_rate: float | None = _number(
        None, 1e-12, 1e3, "the peak; default: 0.0057, with adamw 0.003, with sgd 0.1"
    )
    matrix_ratio: float = _number(2.3, 1e-6, 1e6, "Muon's learning rate over AdamW's")
    momentum: float = _number(0.95, 0.0, 0.999999, "what Muon and SGD keep of the last direction")
    beta1: float = _number(0.9, 0.0, 0.999999, "what AdamW keeps of the gradient's mean")
    beta2: float = _number(0.99, 0.0, 0.999999, "what AdamW keeps of the gradient's mean square")
    epsilon: float = _number(1e-8, 1e-20, 1.0, "AdamW's smallest divisor")
    weight_decay: float = _number(0.027, 0.0, 1e3, "decoupled, on matrices only")
    weight_decay_until: float = _number(
        1.0, 0.0, 1.0, "the share of the steps that have weight decay"
    )
    clip: float = _number(1.0, 0.0, 1e9, "the largest norm of the whole gradient; 0: no limit")
    schedule: str = _choice("linear", SCHEDULES, "how the learning rate falls")
    warmup_steps: int | None = _integer(
        None,
        0,
        1 << 40,
        "steps in which the learning rate rises; default: a tenth of the steps, at most 100",
    )
    decay_share: float = _number(0.75, 0.0, 1.0, "the share of the steps in which it falls")
    final_learning_rate: float = _number(
        0.0, 0.0, 1.0, "its end over its peak, for cosine and linear"
    )
    decay_factor: float = _number(0.5, 0.0, 1.0, "what it falls by at every stair of step")
    decay_every: int = _integer(100, 1, 1 << 40, "the length of such a stair, in steps")
    float_steps: int = _integer(
        0, 0, 1 << 40, "steps, from the first, in full precision: a warm start"
    )
    sign_direction: str = _choice(
        "descend", ("descend", "ascend"), "of the scheme sign; ascend is the C program's own"
    )
    precision: str = _choice(
        "auto",
        ("auto", "float32", "bf16"),
        "of the matrix products while training; bf16 needs a CPU with AMX, and is what auto means "
        "there",
    )
    gradient_checkpointing: bool = _flag(
        False, "work the blocks' activations out twice rather than keep them: slower, smaller"
    )
    seed: int = _integer(1, 0, (1 << 63) - 1, "fixes the initial weights and the data's order")
    threads: int = _integer(
        1, 1, 256, "the same number, seed and instruction set give the same losses to the bit"
    )
    evaluate_every: int = _integer(
        250, 1, 1 << 40, "steps between two looks at the validation set, each with a checkpoint"
    )
    patience: int = _integer(
        0, 0, 1 << 40, "evaluations without a lower validation loss that end a run early; 0: none"
    )
    validation_tokens: int = _integer(
        1 << 20,
        0,
        1 << 40,
        "of a larger validation set, about so many are measured at the end, spread evenly; 0: all",
    )

    def __post_init__(self) -> None:
        if self.learning_rate is None and self.optimizer in OPTIMIZERS:
            # How a frozen record is filled in; an unknown optimizer is refused right after.
            object.__setattr__(self, "learning_rate", DEFAULT_RATES[self.optimizer])
        super().__post_init__()

    @property
    def warmup(self) -> int:
        """``warmup_steps``, or what they are by default in a run of this length."""
        return default_warmup(self.steps) if self.warmup_steps is None else self.warmup_steps

    def learning_rate_at(self, step: int) -> float:
        """Return the learning rate of update ``step``, counted from 0."""
        peak, warmup = self.learning_rate or 0.0, self.warmup
        warmed = lr_scheduler_warmup(step, warmup, peak)
        begin = max(self.steps - round(self.steps * self.decay_share), warmup)
        falling, decay_steps = step - begin, self.steps - begin
        if falling < 0 or self.schedule == "constant":
            return warmed
        if self.schedule == "step":
            return lr_scheduler_step(falling, peak, self.decay_factor, self.decay_every)
        lowest = peak * self.final_learning_rate
        fall = lr_scheduler_cosine if self.schedule == "cosine" else lr_scheduler_linear
        return fall(falling, decay_steps, peak, lowest)

    def patience_ends(self, step: int, best_step: int) -> bool:
        """Return whether a run ends early after ``step``, where ``best_step`` was its best.

        Models of a warm start are not compared, so that what follows counts from its end.
        """
        since = max(best_step, self.float_steps) // self.evaluate_every
        return 0 < self.patience <= step // self.evaluate_every - since

    def weight_decay_at(self, step: int) -> float:
        """Return the weight decay of update ``step``, counted from 0."""
        return self.weight_decay if step < round(self.steps * self.weight_decay_until) else 0.0


def default_warmup(steps: int) -> int:
    """Return the warm-up steps of a run that names none."""
    return min(100, steps // 10)


def lr_scheduler_warmup(step: int, warmup_steps: int, initial_lr: float) -> float:
    """Return the learning rate of a linear warm-up: ``initial_lr (step + 1) / warmup_steps``.

    From ``warmup_steps`` on it is ``initial_lr``. C: ``hyperparams.c``, ``lr_scheduler_warmup``,
    whose first step has rate 0 and moves nothing.
    """
    if step >= warmup_steps:
        return initial_lr
    return initial_lr * (step + 1) / warmup_steps


def lr_scheduler_cosine(step: int, total_steps: int, initial_lr: float, min_lr: float) -> float:
    """Return the learning rate on half a cosine from ``initial_lr`` down to ``min_lr``.

    At ``total_steps`` and after, it is ``min_lr``. C: ``hyperparams.c``, ``lr_scheduler_cosine``;
    Loshchilov & Hutter, arXiv 1608.03983, equation 5.
    """
    if step >= total_steps:
        return min_lr
    return min_lr + 0.5 * (initial_lr - min_lr) * (1.0 + math.cos(math.pi * step / total_steps))


def lr_scheduler_linear(step: int, total_steps: int, initial_lr: float, min_lr: float) -> float:
    """Return the learning rate on the line from ``initial_lr`` down to ``min_lr``.

    At ``total_steps`` and after, it is ``min_lr``. The C original has no such schedule; "straight
    to zero" is what Bergsma et al., arXiv 2502.15938, found best.
    """
    if step >= total_steps:
        return min_lr
    return initial_lr + (min_lr - initial_lr) * step / total_steps


def lr_scheduler_step(
    epoch: int, initial_lr: float, decay_factor: float, decay_epochs: int
) -> float:
    """Return ``initial_lr`` times ``decay_factor`` once for every ``decay_epochs`` epochs gone by.

    C: ``hyperparams.c``, ``lr_scheduler_step``.
    """
    if decay_epochs < 1:
        raise ValueError(f"decay_epochs is {decay_epochs}, expected at least 1")
    return initial_lr * decay_factor ** (epoch // decay_epochs)
