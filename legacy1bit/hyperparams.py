"""What a model and a training run can be told (C: ``hyperparams.c``, the macros of ``config.h``).

``ModelConfig`` fixes a model's shape and arithmetic; ``TrainingConfig`` how it is trained. Both
check themselves when they are made, travel as plain dictionaries, and refuse keys they do not
know. The learning-rate schedules keep the names of their C functions.
"""

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

SCHEMES = ("ternary", "float")
SCALES = ("absmean", "one")
ACTIVATIONS = ("relu2", "relu")
POSITIONS = ("rope", "none")
OPTIMIZERS = ("muon", "adamw")

# Past these sizes a number in a file or on a command line is a mistake or an attack, not a model.
_LARGEST = {
    "vocab_size": 1 << 20,
    "model_dim": 1 << 14,
    "num_blocks": 1 << 10,
    "num_heads": 1 << 10,
    "ffn_multiplier": 1 << 6,
    "sequence_length": 1 << 17,
    "attention_span": 1 << 17,
}


def _check_integer(name: str, value: Any, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is {value!r}, expected a whole number")
    if not low <= value <= high:
        raise ValueError(f"{name} is {value}, expected {low} to {high}")


def _check_number(name: str, value: Any, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is {value!r}, expected a number")
    if not low <= value <= high:
        raise ValueError(f"{name} is {value}, expected {low:g} to {high:g}")


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(choices)}")


def _check_flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}, expected true or false")


class _Record:
    """A dataclass that turns into a dictionary and back."""

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
        known = {field.name for field in fields(cls)}  # type: ignore[arg-type]
        unknown = sorted(set(settings) - known)
        if unknown:
            raise ValueError(f"unknown setting {unknown[0]!r}, expected {', '.join(sorted(known))}")
        return cls(**settings)


@dataclass(frozen=True)
class ModelConfig(_Record):
    """The shape and the arithmetic of a model.

    Attributes
    ----------
    vocab_size : int
        V, the number of tokens; the id V itself is padding.
    model_dim : int
        C, the width of the residual stream.
    num_blocks : int
    num_heads : int
        H; it divides C, and with rotary positions C / H is even.
    ffn_multiplier : int
        F / C, the width of the hidden layer of the feed-forward network.
    sequence_length : int
        The longest context, in tokens.
    scheme : {"ternary", "float"}
        What the matrices of the blocks hold.
    scale : {"absmean", "one"}
        The scale of each ternary matrix: the mean of its latent weights' magnitudes (BitNet
        b1.58, arXiv 2402.17764, equation 3), or 1.
    ternary_embedding : bool
        Whether embedding and output matrix are ternary too.
    activation : {"relu2", "relu"}
    positions : {"rope", "none"}
    rope_base : float
    final_norm : bool
        Whether a layer norm stands before the output layer.
    attention_span : int
        How many tokens back a token sees, itself included; 0 means all.
    """

    vocab_size: int = 256
    model_dim: int = 96
    num_blocks: int = 3
    num_heads: int = 4
    ffn_multiplier: int = 4
    sequence_length: int = 256
    scheme: str = "ternary"
    scale: str = "absmean"
    ternary_embedding: bool = False
    activation: str = "relu2"
    positions: str = "rope"
    rope_base: float = 10000.0
    final_norm: bool = True
    attention_span: int = 0

    def __post_init__(self) -> None:
        for name, largest in _LARGEST.items():
            low = 0 if name == "attention_span" else 1
            _check_integer(name, getattr(self, name), low, largest)
        _check_choice("scheme", self.scheme, SCHEMES)
        _check_choice("scale", self.scale, SCALES)
        _check_choice("activation", self.activation, ACTIVATIONS)
        _check_choice("positions", self.positions, POSITIONS)
        _check_number("rope_base", self.rope_base, 1.0, 1e9)
        _check_flag("ternary_embedding", self.ternary_embedding)
        _check_flag("final_norm", self.final_norm)
        if self.model_dim % self.num_heads:
            raise ValueError(
                f"model_dim is {self.model_dim}, expected a multiple of num_heads "
                f"({self.num_heads})"
            )
        if self.positions == "rope" and self.head_dim % 2:
            raise ValueError(
                f"model_dim / num_heads is {self.head_dim}, expected an even number: rotary "
                "positions turn pairs"
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
        )


@dataclass(frozen=True)
class TrainingConfig(_Record):
    """How a model is trained.

    Attributes
    ----------
    steps : int
        Updates of the weights.
    batch_size : int
        Sequences in a step.
    optimizer : {"muon", "adamw"}
        Muon takes the matrices of the blocks and leaves the rest to AdamW.
    learning_rate : float
        The peak, reached after ``warmup_steps`` of linear warm-up.
    decay_share : float
        The share of the steps, at the end, in which the rate falls along half a cosine to
        ``learning_rate * final_learning_rate``. Until then it stays at its peak.
    matrix_ratio : float
        Muon's learning rate over AdamW's.
    weight_decay : float
        Decoupled, on matrices only.
    clip : float
        The largest norm of the whole gradient; 0 means no limit.
    seed : int
        Fixes the initial weights and the order of the data.
    threads : int
        The same seed, threads and instruction set give the same losses to the bit.
    evaluate_every : int
        Steps between two looks at the validation set.
    """

    steps: int = 1500
    batch_size: int = 8
    optimizer: str = "muon"
    learning_rate: float = 3e-3
    matrix_ratio: float = 7.0
    final_learning_rate: float = 0.0
    decay_share: float = 0.4
    warmup_steps: int = 100
    beta1: float = 0.9
    beta2: float = 0.99
    epsilon: float = 1e-8
    weight_decay: float = 0.02
    clip: float = 1.0
    seed: int = 1
    threads: int = 1
    evaluate_every: int = 250

    def __post_init__(self) -> None:
        _check_integer("steps", self.steps, 1, 1 << 40)
        _check_integer("batch_size", self.batch_size, 1, 1 << 20)
        _check_integer("warmup_steps", self.warmup_steps, 0, 1 << 40)
        _check_integer("seed", self.seed, 0, (1 << 63) - 1)
        _check_integer("threads", self.threads, 1, 256)
        _check_integer("evaluate_every", self.evaluate_every, 1, 1 << 40)
        _check_choice("optimizer", self.optimizer, OPTIMIZERS)
        _check_number("matrix_ratio", self.matrix_ratio, 1e-6, 1e6)
        _check_number("learning_rate", self.learning_rate, 1e-12, 1e3)
        _check_number("final_learning_rate", self.final_learning_rate, 0.0, 1.0)
        _check_number("decay_share", self.decay_share, 0.0, 1.0)
        _check_number("beta1", self.beta1, 0.0, 0.999999)
        _check_number("beta2", self.beta2, 0.0, 0.999999)
        _check_number("epsilon", self.epsilon, 1e-30, 1.0)
        _check_number("weight_decay", self.weight_decay, 0.0, 1e3)
        _check_number("clip", self.clip, 0.0, 1e9)

    def learning_rate_at(self, step: int) -> float:
        """Return the learning rate of update ``step``, counted from 0."""
        warmed = lr_scheduler_warmup(step, self.warmup_steps, self.learning_rate)
        decay_steps = round(self.steps * self.decay_share)
        falling = step - (self.steps - decay_steps)
        if falling < 0 or step < self.warmup_steps:
            return warmed
        lowest = self.learning_rate * self.final_learning_rate
        return lr_scheduler_cosine(falling, decay_steps, self.learning_rate, lowest)


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


def lr_scheduler_step(
    epoch: int, initial_lr: float, decay_factor: float, decay_epochs: int
) -> float:
    """Return ``initial_lr`` times ``decay_factor`` once for every ``decay_epochs`` epochs gone by.

    C: ``hyperparams.c``, ``lr_scheduler_step``.
    """
    if decay_epochs < 1:
        raise ValueError(f"decay_epochs is {decay_epochs}, expected at least 1")
    return initial_lr * decay_factor ** (epoch // decay_epochs)
