"""The settings of a model and of its training (C: ``hyperparams.c``, the macros of ``config.h``).

``ModelConfig`` has a model's shape and arithmetic, ``DataConfig`` the way from a text to batches,
``TrainingConfig`` the training, and ``SamplingConfig`` the choice of the next token. A field has
its range and its meaning: the records check themselves, and the command line and config files are
made from the fields. The learning-rate schedules keep the names of their C functions.
"""

import math
from collections.abc import Mapping
from dataclasses import Field, asdict, dataclass, field, fields
from typing import Any, Self

from legacy1bit.schemes import FLOAT, SCHEMES
from legacy1bit.system.errors import SettingError, format_value

# The file of a run that holds its settings.
SETTINGS_FILE = "training.json"

MOST_STEPS = 1 << 40

# Names of settings in files of earlier versions, and their names today.
ALIASES = {
    "matrix_ratio": "muon_lr_ratio",
    "attention_span": "attention_window",
    "apart": "document_mask",
    "decay_share": "decay_fraction",
    "validation_share": "validation_fraction",
}
# Values that have another name today, by the setting.
VALUE_ALIASES = {"order": {"passes": "epochs"}}

# The keys of settings in files of models (config.json, headers, legacy1bit.config of GGUF) where
# they differ from the names, so that the bytes of these files stay the same.
FILE_KEYS = {"attention_window": "attention_span"}

# Settings that may change when a run is resumed.
CHANGEABLE = ("steps", "threads", "precision", "patience")

SCALES = ("tensor", "row", "128", "256", "one")
OPTIMIZERS = ("muon", "adamw", "sgd")
SCHEDULES = ("cosine", "linear", "step", "constant")
TOKENIZERS = ("bytes", "chars", "bpe")
SPLITS = ("auto", "documents", "tail")
BATCH_ORDERS = ("windows", "epochs", "packed", "buckets")

# Where an option stands in the help of a command.
BASIC, EXPERIMENTAL = "basic", "experimental"

# The default peak of the learning rate, by optimizer.
DEFAULT_RATES = {"muon": 5.7e-3, "adamw": 3e-3, "sgd": 0.1}


def _integer(default: int | None, low: int, high: int, meaning: str, group: str = "") -> Any:
    limits = {"kind": int, "low": low, "high": high}
    return field(default=default, metadata={**limits, "meaning": meaning, "group": group})


def _number(default: float | None, low: float, high: float, meaning: str, group: str = "") -> Any:
    limits = {"kind": float, "low": low, "high": high}
    return field(default=default, metadata={**limits, "meaning": meaning, "group": group})


def _choice(default: str, choices: tuple[str, ...], meaning: str, group: str = "") -> Any:
    meta = {"kind": str, "choices": choices, "meaning": meaning, "group": group}
    return field(default=default, metadata=meta)


def _text(default: str | None, meaning: str) -> Any:
    return field(default=default, metadata={"kind": str, "meaning": meaning, "group": ""})


def _flag(default: bool, meaning: str) -> Any:
    return field(default=default, metadata={"kind": bool, "meaning": meaning, "group": ""})


_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def check_setting(setting: Field[Any], value: Any, name: str | None = None) -> None:
    """Check a value against the kind and the range of a field.

    Parameters
    ----------
    setting : Field
    value : Any
    name : str, optional
        The setting's name in an error; its own when not given.

    Raises
    ------
    TypeError, ValueError
        If the value is of another kind, or out of range.
    """
    kind, name = setting.metadata["kind"], name or setting.name
    if value is None and setting.default is None:
        return
    if kind is str and "choices" not in setting.metadata:
        if not isinstance(value, str):
            raise TypeError(f"{name} is {format_value(value)}, expected text")
        if not value:
            raise SettingError(f"{name} is '', expected text", name)
        return
    if kind is str:
        if value not in setting.metadata["choices"]:
            expected = ", ".join(setting.metadata["choices"])
            raise SettingError(f"{name} is {format_value(value)}, expected one of {expected}", name)
        return
    fits = isinstance(value, (int, float) if kind is float else kind)
    if not fits or (kind is not bool and isinstance(value, bool)):
        raise TypeError(f"{name} is {format_value(value)}, expected {_WORDS[kind]}")
    if kind is not bool:
        low, high = setting.metadata["low"], setting.metadata["high"]
        if not low <= value <= high:
            raise SettingError(f"{name} is {format_value(value)}, expected {low} to {high}", name)


def renamed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings of a file, perhaps of an earlier version, under the names of today.

    Raises
    ------
    ValueError
        If a setting is there under both names.
    """
    result: dict[str, Any] = {}
    for key, value in settings.items():
        name = ALIASES.get(key, key)
        if name in result:
            raise ValueError(f"{name} is there twice, once under its earlier name")
        values = VALUE_ALIASES.get(name, {})
        result[name] = values.get(value, value) if isinstance(value, str) else value
    return result


class _Record:
    """A dataclass that checks itself, and turns into a dictionary and back."""

    def __post_init__(self) -> None:
        for setting in fields(self):  # type: ignore[arg-type]
            check_setting(setting, getattr(self, setting.name))

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as a plain dictionary, under the keys of files (``FILE_KEYS``)."""
        settings = asdict(self)  # type: ignore[call-overload]
        return {FILE_KEYS.get(name, name): value for name, value in settings.items()}

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> Self:
        """Create a record from a dictionary; missing keys take their defaults.

        Keys and values of earlier versions are understood (``ALIASES``).

        Raises
        ------
        TypeError, ValueError
            If ``settings`` is not a dictionary, a key is unknown or a value does not fit.
        """
        if not isinstance(settings, dict):
            raise TypeError(f"expected a dictionary of settings, not {type(settings).__name__}")
        settings = renamed(settings)
        known = {setting.name for setting in fields(cls)}  # type: ignore[arg-type]
        unknown = sorted(set(settings) - known)
        if unknown:
            raise ValueError(f"unknown setting {unknown[0]!r}, expected {', '.join(sorted(known))}")
        return cls(**settings)


# The upper limits of the sizes: a larger number in a file or on a command line is a mistake or an
# attack, not a model.
@dataclass(frozen=True)
class ModelConfig(_Record):
    """The shape and the arithmetic of a model; each field's metadata has its meaning."""

    vocab_size: int = _integer(256, 1, 1 << 20, "V, the number of tokens; the id V is padding")
    model_dim: int = _integer(192, 1, 1 << 14, "C, the width of the residual stream", BASIC)
    num_blocks: int = _integer(2, 1, 1 << 10, "transformer blocks", BASIC)
    num_heads: int = _integer(
        4, 1, 1 << 10, "H, attention heads of a block; divides the width", BASIC
    )
    ffn_multiplier: int = _integer(3, 1, 1 << 6, "the feed-forward layer's width over C")
    sequence_length: int = _integer(256, 1, 1 << 17, "T, the context length, in tokens", BASIC)
    scheme: str = _choice("ternary", (*SCHEMES, FLOAT), "quantization of the blocks' matrices")
    scale: str = _choice(
        "tensor",
        SCALES,
        "the weights that share a scale: a matrix, a row, 128 or 256 weights of a row; one: the "
        "scale is 1",
    )
    ternary_embedding: bool = _flag(False, "quantize embedding and output matrix, too")
    int8_activations: bool = _flag(
        False, "round the inputs of quantized layers to int8, with one scale per token"
    )
    sub_norm: bool = _flag(False, "a layer norm before every linear layer (SubLN)")
    activation: str = _choice("relu2", ("relu2", "relu"), "the feed-forward layer's activation")
    positions: str = _choice("rope", ("rope", "none"), "rotary position embedding, or none")
    rope_base: float = _number(10000.0, 1.0, 1e9, "base of the rotary wavelengths")
    final_norm: bool = _flag(True, "a layer norm before the output layer")
    attention_window: int = _integer(
        0,
        0,
        1 << 17,
        "the last tokens that a token attends to, itself included; 0: all",
        EXPERIMENTAL,
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
                "positions rotate pairs",
                *("model_dim", "num_heads"),
            )

    @property
    def has_int8_products(self) -> bool:
        """Whether training can multiply the quantized matrices in int8."""
        return self.scheme != FLOAT and self.scale in ("tensor", "row", "one")

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
        """The id of padding: the first after the tokens (C: ``PAD_TOKEN``)."""
        return self.vocab_size

    @property
    def is_c_original(self) -> bool:
        """Whether the C original computes the same as a model of these settings."""
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
            attention_window=1,
            output_bias=True,
        )


@dataclass(frozen=True)
class DataConfig(_Record):
    """The way from a text to batches; each field's metadata has its meaning.

    The last five augment training sequences, differently each time they are read. Subword splitting
    is related to BPE-dropout (Provilkov et al., arXiv 1910.13267, section 3), which skips merges
    while a text is encoded; here merges are undone afterwards.
    """

    tokenizer: str = _choice("bytes", TOKENIZERS, "kind of tokens", BASIC)
    vocabulary: int | None = _integer(
        None,
        256,
        1 << 20,
        "size of the vocabulary of chars (default: all characters of the text) and bpe (default: "
        "1024)",
        BASIC,
    )
    field: str = _text("text", "field of JSON lines and Parquet files that holds the text")
    encoding: str = _text("utf-8", "encoding of the text")
    separator: str | None = _text(
        None, "text between the documents of a text file; \\n: a line break"
    )
    split: str = _choice(
        "auto",
        SPLITS,
        "validation data: some documents, or the tail of the text; auto: documents, if there are "
        "several",
    )
    validation_fraction: float = _number(0.1, 1e-9, 0.9, "fraction of the text that validates")
    order: str = _choice(
        "windows",
        BATCH_ORDERS,
        "order of the sequences: windows: at random positions; epochs: every sequence once, then "
        "again; packed: epochs of whole documents, packed into rows; buckets: epochs of documents "
        "in rows of their own, by length",
    )
    document_mask: bool = _flag(False, "a token attends to its own document only")
    token_dropout: float = _number(
        0.0, 0.0, 1.0, "fraction of inputs replaced by random tokens", EXPERIMENTAL
    )
    span_masking: float = _number(
        0.0, 0.0, 0.9, "fraction of inputs masked, three in a row", EXPERIMENTAL
    )
    subword_splitting: float = _number(
        0.0, 0.0, 1.0, "probability that a merged token is split in two", EXPERIMENTAL
    )
    case_noise: float = _number(
        0.0, 0.0, 1.0, "fraction of words written in another case", EXPERIMENTAL
    )
    space_noise: float = _number(
        0.0, 0.0, 1.0, "fraction of spaces doubled or made line breaks", EXPERIMENTAL
    )


@dataclass(frozen=True)
class SamplingConfig(_Record):
    """How the next token is sampled; each field's metadata has its meaning.

    The filters apply in the order of the fields. Top-p: Holtzman et al., arXiv 1904.09751, section
    3.1; min-p: Nguyen et al., arXiv 2407.01082, section 3; the repetition penalty: Keskar et al.,
    arXiv 1909.05858, equation 2, which divides positive logits, and here multiplies the others.
    """

    temperature: float = _number(
        0.8,
        0.0,
        1e30,
        "divisor of the logits: below 1 probable tokens become more probable; 0: greedy",
        BASIC,
    )
    top_k: int = _integer(0, 0, 1 << 31, "sample from the N most probable tokens; 0: from all")
    top_p: float = _number(
        1.0, 1e-9, 1.0, "sample from the most probable tokens that together have probability X"
    )
    min_p: float = _number(
        0.0, 0.0, 1.0, "sample from tokens with at least X times the highest probability"
    )
    repetition_penalty: float = _number(
        1.0, 1e-3, 1e3, "above 1 recent tokens become less probable"
    )
    repetition_window: int = _integer(
        64, 0, 1 << 31, "number of recent tokens that are penalized; 0: the whole context"
    )


@dataclass(frozen=True)
class TrainingConfig(_Record):
    """How a model is trained; each field's metadata has its meaning.

    The learning rate rises over ``warmup_steps``, stays at its peak, and falls over the last
    ``decay_fraction`` of the steps along the ``schedule``, but not before the warm-up has ended.
    """

    steps: int = _integer(1500, 1, MOST_STEPS, "updates of the weights", BASIC)
    batch_size: int = _integer(8, 1, 1 << 20, "sequences in a batch", BASIC)
    gradient_accumulation: int = _integer(
        1, 1, 1 << 20, "batches whose gradients are added for one step"
    )
    optimizer: str = _choice(
        "muon", OPTIMIZERS, "muon: for the blocks' matrices, with AdamW for the rest"
    )
    learning_rate: float | None = _number(
        None,
        1e-12,
        1e3,
        "peak of the learning rate (default: 0.0057, with adamw 0.003, with sgd 0.1)",
        BASIC,
    )
    muon_lr_ratio: float = _number(2.3, 1e-6, 1e6, "Muon's learning rate over AdamW's")
    momentum: float = _number(0.95, 0.0, 0.999999, "momentum of Muon and SGD")
    beta1: float = _number(0.9, 0.0, 0.999999, "decay rate of AdamW's first moment")
    beta2: float = _number(0.99, 0.0, 0.999999, "decay rate of AdamW's second moment")
    epsilon: float = _number(1e-8, 1e-20, 1.0, "AdamW's epsilon, added to the denominator")
    weight_decay: float = _number(0.027, 0.0, 1e3, "decoupled weight decay, of matrices only")
    weight_decay_until: float = _number(
        1.0, 0.0, 1.0, "fraction of the steps that have weight decay", EXPERIMENTAL
    )
    clip: float = _number(1.0, 0.0, 1e9, "largest norm of the whole gradient; 0: no limit")
    schedule: str = _choice("linear", SCHEDULES, "how the learning rate falls")
    warmup_steps: int | None = _integer(
        None,
        0,
        1 << 40,
        "steps in which the learning rate rises (default: a tenth of the steps, at most 100)",
    )
    decay_fraction: float = _number(
        0.75, 0.0, 1.0, "fraction of the steps, the last ones, in which the learning rate falls"
    )
    final_learning_rate: float = _number(
        0.0, 0.0, 1.0, "last learning rate over its peak, for cosine and linear"
    )
    decay_factor: float = _number(
        0.5, 0.0, 1.0, "factor of the learning rate at each decay of the schedule step"
    )
    decay_every: int = _integer(100, 1, 1 << 40, "steps between two decays of the schedule step")
    float_steps: int = _integer(0, 0, 1 << 40, "first steps in full precision: a warm start")
    sign_direction: str = _choice(
        "descend", ("descend", "ascend"), "of the scheme sign; ascend is the C program's own"
    )
    precision: str = _choice(
        "auto",
        ("auto", "float32", "int8", "bf16"),
        "of the matrix products in training; int8: of ternary matrices; bf16 needs AMX or AVX-512 "
        "BF16; auto: the fastest",
    )
    gradient_checkpointing: bool = _flag(
        False, "compute the blocks' activations twice rather than store them: less memory"
    )
    seed: int = _integer(
        1, 0, (1 << 63) - 1, "fixes the initial weights and the order of the data", BASIC
    )
    threads: int = _integer(
        1,
        1,
        256,
        "the same number, seed and instruction set give the same losses, to the bit",
        BASIC,
    )
    evaluate_every: int = _integer(
        250, 1, 1 << 40, "steps between two evaluations, each with a checkpoint"
    )
    patience: int = _integer(
        0,
        0,
        1 << 40,
        "end after N evaluations without a lower validation loss; 0: do not",
        BASIC,
    )
    validation_tokens: int = _integer(
        1 << 20,
        0,
        1 << 40,
        "tokens of a larger validation set that are measured at the end, spread evenly; 0: all",
    )

    def __post_init__(self) -> None:
        if self.learning_rate is None and self.optimizer in OPTIMIZERS:
            # A frozen record is set so; an unknown optimizer is refused right after.
            object.__setattr__(self, "learning_rate", DEFAULT_RATES[self.optimizer])
        super().__post_init__()

    @property
    def warmup(self) -> int:
        """``warmup_steps``, or their default in a run of this length."""
        return default_warmup(self.steps) if self.warmup_steps is None else self.warmup_steps

    def learning_rate_at(self, step: int) -> float:
        """Return the learning rate of update ``step``, counted from 0."""
        peak, warmup = self.learning_rate or 0.0, self.warmup
        warmed = lr_scheduler_warmup(step, warmup, peak)
        begin = max(self.steps - round(self.steps * self.decay_fraction), warmup)
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

        Models of a warm start are not compared, so that the evaluations count from its end.
        """
        since = max(best_step, self.float_steps) // self.evaluate_every
        return 0 < self.patience <= step // self.evaluate_every - since

    def weight_decay_at(self, step: int) -> float:
        """Return the weight decay of update ``step``, counted from 0."""
        return self.weight_decay if step < round(self.steps * self.weight_decay_until) else 0.0


def default_warmup(steps: int) -> int:
    """Return the default of ``warmup_steps``."""
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

    At ``total_steps`` and after, it is ``min_lr``. The C original has no such schedule; Bergsma
    et al., arXiv 2502.15938, recommend it down to zero.
    """
    if step >= total_steps:
        return min_lr
    return initial_lr + (min_lr - initial_lr) * step / total_steps


def lr_scheduler_step(
    epoch: int, initial_lr: float, decay_factor: float, decay_epochs: int
) -> float:
    """Return ``initial_lr`` times ``decay_factor`` once for every ``decay_epochs`` epochs.

    C: ``hyperparams.c``, ``lr_scheduler_step``.
    """
    if decay_epochs < 1:
        raise ValueError(f"decay_epochs is {decay_epochs}, expected at least 1")
    return initial_lr * decay_factor ** (epoch // decay_epochs)
