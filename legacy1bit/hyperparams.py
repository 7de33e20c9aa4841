"""The settings of a model and of its training (C: ``hyperparams.c``, the macros of ``config.h``).

``ModelConfig`` has a model's shape and arithmetic, ``DataConfig`` the way from a text to batches,
``TrainingConfig`` the training, and ``SamplingConfig`` the choice of the next token. A field has
its range and its meaning: the records check themselves, and the command line and config files are
made from the fields. The learning-rate schedules keep the names of their C functions.
"""

import math
from collections.abc import Mapping
from dataclasses import Field, asdict, dataclass, field, fields
from types import MappingProxyType
from typing import Any, Self

from legacy1bit.schemes import FLOAT, SCHEMES
from legacy1bit.system.errors import SettingError, format_value

# The file of a run that holds its settings.
SETTINGS_FILE = "training.json"

MOST_STEPS = 1 << 40
MAX_LENGTH = 1 << 17

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

# How ranks exchange gradients, and the bits of a number; 0: as it is.
COMPRESSED_BITS = {"none": 0, "8bit": 8, "1bit": 1}

SCALES = ("tensor", "row", "64", "128", "256", "one")
NORMS = ("layer", "rms")
ACTIVATIONS = ("relu2", "relu", "silu", "gelu")
BIASES = ("all", "qkv", "none")
# The matrices of a block that have an adapter, by the beginnings of their names.
ADAPTED = {
    "all": ("attention.", "ffn."),
    "attention": ("attention.",),
    "ffn": ("ffn.",),
}
OPTIMIZERS = ("muon", "adamw", "sgd")
SCHEDULES = ("cosine", "linear", "step", "constant")
TOKENIZERS = ("bytes", "chars", "bpe")
SPLITS = ("auto", "documents", "tail")
BATCH_ORDERS = ("windows", "epochs", "packed", "buckets")

# Where an option stands in the help of a command.
BASIC, EXPERIMENTAL = "basic", "experimental"

# The default peak of the learning rate, by optimizer.
DEFAULT_RATES = {"muon": 5.7e-3, "adamw": 3e-3, "sgd": 0.1}


def _later(setting: Any) -> Any:
    """Mark a setting that files of earlier versions do not have.

    It is written only where it differs from its default, so that a model that does not need it has
    the same file as before.
    """
    setting.metadata = MappingProxyType({**setting.metadata, "later": True})
    return setting


def _integer(default: int | None, low: int, high: int, meaning: str, group: str = "") -> Any:
    limits = {"kind": int, "low": low, "high": high}
    return field(default=default, metadata={**limits, "meaning": meaning, "group": group})


def _number(default: float | None, low: float, high: float, meaning: str, group: str = "") -> Any:
    limits = {"kind": float, "low": low, "high": high}
    return field(default=default, metadata={**limits, "meaning": meaning, "group": group})


def _choice(
    default: str | int, choices: tuple[str, ...] | tuple[int, ...], meaning: str, group: str = ""
) -> Any:
    meta = {"kind": type(default), "choices": choices, "meaning": meaning, "group": group}
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
    fits = isinstance(value, (int, float) if kind is float else kind)
    if kind is not str and (not fits or (kind is not bool and isinstance(value, bool))):
        raise TypeError(f"{name} is {format_value(value)}, expected {_WORDS[kind]}")
    if "choices" in setting.metadata:
        if value not in setting.metadata["choices"]:
            expected = ", ".join(map(str, setting.metadata["choices"]))
            raise SettingError(f"{name} is {format_value(value)}, expected one of {expected}", name)
    elif kind is not bool:
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
        for setting in fields(self):  # type: ignore[arg-type]
            name = setting.name
            if setting.metadata.get("later") and settings[name] == self._default(setting):
                del settings[name]
        return {FILE_KEYS.get(name, name): value for name, value in settings.items()}

    def _default(self, setting: Field[Any]) -> Any:
        """Return the value of a setting that is not given."""
        return setting.default

    def with_settings(self, **changes: Any) -> Self:
        """Return a copy with some settings changed; those that derive from others follow them."""
        settings = asdict(self)  # type: ignore[call-overload]
        for setting in fields(self):  # type: ignore[arg-type]
            if settings[setting.name] == self._default(setting):
                del settings[setting.name]
        return type(self)(**settings | changes)

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


def _parse_windows(pattern: str) -> list[int]:
    """Return the numbers of a ``window_pattern``."""
    parts = [part.strip() for part in pattern.split(",")]
    if not all(part.isdecimal() and part.isascii() and len(part) <= 6 for part in parts) or any(
        int(part) > MAX_LENGTH for part in parts
    ):
        raise SettingError(
            f"window_pattern is {format_value(pattern)}, expected whole numbers from 0 to "
            f"{MAX_LENGTH}, separated by commas",
            "window_pattern",
        )
    return [int(part) for part in parts]


# The upper limits of the sizes: a larger number in a file or on a command line is a mistake or an
# attack, not a model.
@dataclass(frozen=True)
class ModelConfig(_Record):
    """The shape and the arithmetic of a model; each field's metadata has its meaning."""

    vocab_size: int = _integer(256, 1, 1 << 20, "V, the number of tokens; the id V is padding")
    model_dim: int = _integer(192, 1, 1 << 14, "C, the width of the residual stream", BASIC)
    num_blocks: int = _integer(2, 1, 1 << 10, "transformer blocks", BASIC)
    num_heads: int = _integer(4, 1, 1 << 10, "H, attention heads of a block", BASIC)
    num_kv_heads: int = _later(
        _integer(
            None,
            1,
            1 << 10,
            "heads of keys and values, each for H / N heads of queries: grouped-query attention "
            "(default: H)",
        )
    )
    head_dim: int = _later(_integer(None, 1, 1 << 12, "D, the width of a head (default: C / H)"))
    ffn_multiplier: int = _integer(3, 1, 1 << 6, "the feed-forward layer's width over C")
    ffn_dim: int = _later(
        _integer(
            None, 1, 1 << 18, "F, the feed-forward layer's width (default: C times ffn_multiplier)"
        )
    )
    sequence_length: int = _integer(256, 1, MAX_LENGTH, "T, the context length, in tokens", BASIC)
    scheme: str = _choice("ternary", (*SCHEMES, FLOAT), "quantization of the blocks' matrices")
    scale: str = _choice(
        "tensor",
        SCALES,
        "the weights that share a scale: a matrix, a row, 64, 128 or 256 weights of a row; one: "
        "the scale is 1",
    )
    scale_shards: int = _later(
        _integer(1, 1, 1 << 10, "with scale tensor: shards of rows, each with a scale of its own")
    )
    ternary_embedding: bool = _flag(False, "quantize embedding and output matrix, too")
    tied_embeddings: bool = _later(_flag(False, "the output matrix is the embedding"))
    int8_activations: bool = _flag(
        False, "round the inputs of quantized layers to int8, with one scale per token"
    )
    norm: str = _later(
        _choice("layer", NORMS, "layer: layer norm; rms: RMS norm, without mean and bias")
    )
    norm_bias: bool = _later(_flag(True, "layer norms have a bias"))
    norm_epsilon: float = _later(
        _number(1e-5, 1e-12, 0.1, "added to the variance under the root of a norm")
    )
    sub_norm: bool = _flag(False, "a norm before every linear layer (SubLN)")
    qk_norm: bool = _later(_flag(False, "an RMS norm of each head's queries and keys"))
    biases: str = _later(
        _choice(
            "all",
            BIASES,
            "linear layers of the blocks that have a bias: qkv: queries, keys and values only",
        )
    )
    gated: bool = _later(_flag(False, "feed-forward layer with a gate: act(wg x) times wi x (GLU)"))
    activation: str = _choice("relu2", ACTIVATIONS, "the feed-forward layer's activation")
    positions: str = _choice("rope", ("rope", "none"), "rotary position embedding, or none")
    rope_base: float = _number(10000.0, 1.0, 1e9, "base of the rotary wavelengths")
    rope_pairs: str = _later(
        _choice(
            "halves",
            ("halves", "adjacent"),
            "elements of a head that rotate together: halves: i and i + D / 2; adjacent: 2 i and "
            "2 i + 1",
        )
    )
    rope_fraction: float = _later(
        _number(1.0, 1e-3, 1.0, "fraction of a head, its first elements, that rotates")
    )
    rope_factor: float = _later(
        _number(1.0, 1.0, 1e3, "YaRN: the context length over that of the pretraining; 1: no YaRN")
    )
    rope_original_length: int = _later(
        _integer(0, 0, MAX_LENGTH, "YaRN: the context length of the pretraining")
    )
    final_norm: bool = _flag(True, "a norm before the output layer")
    attention_window: int = _integer(
        0,
        0,
        MAX_LENGTH,
        "the last tokens that a token attends to, itself included; 0: all",
        EXPERIMENTAL,
    )
    window_pattern: str | None = _later(
        _text(
            None,
            "attention windows by block, separated by commas and repeated: 512,512,0 lets every "
            "third block attend to all tokens",
        )
    )
    output_bias: bool = _flag(False, "a bias for each token in the output layer")

    def __post_init__(self) -> None:
        super().__post_init__()
        derived = self.derived()
        missing = [name for name in derived if getattr(self, name) is None]
        if "head_dim" in missing and self.model_dim % self.num_heads:
            raise SettingError(
                f"model_dim is {self.model_dim}, expected a multiple of num_heads "
                f"({self.num_heads}), or a head_dim",
                *("model_dim", "num_heads"),
            )
        for name in missing:
            object.__setattr__(self, name, derived[name])
        if self.num_heads % self.num_kv_heads:
            raise SettingError(
                f"num_kv_heads is {self.num_kv_heads}, expected a divisor of num_heads "
                f"({self.num_heads})",
                *("num_kv_heads", "num_heads"),
            )
        if self.positions == "rope" and (
            self.rotary_dim % 2 or abs(self.rotary_dim - self.head_dim * self.rope_fraction) > 1e-9
        ):
            size = "model_dim / num_heads" if "head_dim" in missing else "head_dim"
            raise SettingError(
                f"{size if self.rope_fraction == 1.0 else f'{size} * rope_fraction'} is "
                f"{self.head_dim * self.rope_fraction:g}, expected an even number: rotary "
                "positions rotate pairs",
                *size.split(" / "),
            )
        if self.positions == "none" and (self.rope_factor, self.rope_fraction) != (1.0, 1.0):
            raise SettingError("rope_factor and rope_fraction need positions rope", "positions")
        if (self.rope_factor > 1.0) != (self.rope_original_length > 0):
            raise SettingError(
                f"rope_factor is {self.rope_factor:g} and rope_original_length "
                f"{self.rope_original_length}: YaRN needs a factor above 1 and a length",
                *("rope_factor", "rope_original_length"),
            )
        if self.rope_factor > 1.0 and self.rope_base == 1.0:
            raise SettingError(
                "rope_base is 1 with a rope_factor: YaRN needs wavelengths that differ",
                *("rope_base", "rope_factor"),
            )
        if self.scale_shards > 1 and self.scale != "tensor":
            raise SettingError(
                f"scale_shards is {self.scale_shards} with scale {self.scale}, expected scale "
                "tensor",
                *("scale_shards", "scale"),
            )
        if self.window_pattern is not None and self.attention_window:
            raise SettingError(
                f"window_pattern is {self.window_pattern} and attention_window "
                f"{self.attention_window}, expected one of them",
                *("window_pattern", "attention_window"),
            )
        if self.window_pattern is not None:
            _parse_windows(self.window_pattern)

    def derived(self) -> dict[str, int]:
        """Return the values of settings that follow from others where they are not given."""
        return {
            "num_kv_heads": self.num_heads,
            "head_dim": self.model_dim // self.num_heads,
            "ffn_dim": self.model_dim * self.ffn_multiplier,
        }

    def _default(self, setting: Field[Any]) -> Any:
        return self.derived().get(setting.name, setting.default)

    @property
    def has_int8_products(self) -> bool:
        """Whether training can multiply the quantized matrices in int8."""
        return self.scheme != FLOAT and self.scale in ("tensor", "row", "one")

    @property
    def query_dim(self) -> int:
        """H D, the width of all heads' queries."""
        return self.num_heads * self.head_dim

    @property
    def kv_dim(self) -> int:
        """The width of all heads' keys, and of their values."""
        return self.num_kv_heads * self.head_dim

    @property
    def rotary_dim(self) -> int:
        """The elements of a head that rotate with the position."""
        return round(self.head_dim * self.rope_fraction)

    @property
    def windows(self) -> tuple[int, ...]:
        """The attention window of each block; 0: all tokens."""
        if self.window_pattern is None:
            return (self.attention_window,) * self.num_blocks
        windows = _parse_windows(self.window_pattern)
        return tuple(windows[i % len(windows)] for i in range(self.num_blocks))

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
            sequence_length=sequence_length,
            **ARCHITECTURES["c-original"],
        )


# The settings that make up the architectures that other programs know; the others are free.
_ROOT_MEAN_SQUARE = {"norm": "rms", "norm_bias": False, "biases": "none", "gated": True}
ARCHITECTURES: Mapping[str, Mapping[str, Any]] = {
    "nemotron": {},
    "llama": {**_ROOT_MEAN_SQUARE, "activation": "silu"},
    "qwen3": {**_ROOT_MEAN_SQUARE, "activation": "silu", "norm_epsilon": 1e-6, "qk_norm": True},
    "bitnet": {
        **_ROOT_MEAN_SQUARE,
        "activation": "relu2",
        "sub_norm": True,
        "int8_activations": True,
        "tied_embeddings": True,
    },
    "c-original": {
        "ffn_multiplier": 4,
        "scale": "one",
        "ternary_embedding": True,
        "activation": "relu",
        "positions": "none",
        "final_norm": False,
        "attention_window": 1,
        "output_bias": True,
    },
}


def architecture_settings(name: str) -> dict[str, Any]:
    """Return the settings of an architecture, and the defaults of what other ones set."""
    defaults = {setting.name: setting.default for setting in fields(ModelConfig)}
    names = {setting for settings in ARCHITECTURES.values() for setting in settings}
    return {setting: defaults[setting] for setting in sorted(names)} | dict(ARCHITECTURES[name])


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
    field: str = _text(
        "text", "field of JSON lines and Parquet files that holds the text; messages: conversations"
    )
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
    optimizer_bits: int = _later(
        _choice(32, (32, 8), "bits of each of the optimizer's moments: 8 take less memory")
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
    quantization_warmup: int = _later(
        _integer(
            0,
            0,
            1 << 40,
            "steps, after the float steps, in which quantization sets in: w + x (q(w) - w) with x "
            "from 0 to 1",
        )
    )
    distillation_weight: float = _later(
        _number(0.5, 0.0, 1.0, "with --teacher: the weight of the teacher's term in the loss")
    )
    teacher_temperature: float = _later(
        _number(
            1.0, 0.1, 100.0, "with --teacher: divisor of both models' logits in the teacher's term"
        )
    )
    adapter: int = _later(
        _integer(
            0,
            0,
            1 << 12,
            "with --from: train a LoRA adapter of rank N, and leave the model's weights as they "
            "are",
        )
    )
    adapter_alpha: float | None = _later(
        _number(
            None,
            1e-6,
            1e6,
            "what the adapter adds is multiplied by this over the rank (default: twice the rank)",
        )
    )
    adapter_dropout: float = _later(
        _number(0.0, 0.0, 0.99, "fraction of an adapter's inputs that are left out in training")
    )
    adapter_layers: str = _later(
        _choice("all", tuple(ADAPTED), "the layers whose matrices have an adapter")
    )
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
    gradient_compression: str = _later(
        _choice(
            "none",
            tuple(COMPRESSED_BITS),
            "several ranks exchange gradients in so many bits, with error feedback, and the "
            "changes of weights in eight",
            EXPERIMENTAL,
        )
    )
    local_steps: int = _later(
        _integer(
            0,
            0,
            1 << 20,
            "each rank takes N steps by itself, before all average what these have changed "
            "(DiLoCo); 0: every step is of all ranks",
            EXPERIMENTAL,
        )
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

    def quantized_share_at(self, step: int) -> float:
        """Return how far the weights of update ``step``, counted from 0, are quantized, 0 to 1."""
        since = step - self.float_steps
        if since < 0:
            return 0.0
        return since / self.quantization_warmup if since < self.quantization_warmup else 1.0

    def patience_ends(self, step: int, best_step: int) -> bool:
        """Return whether a run ends early after ``step``, where ``best_step`` was its best.

        The evaluations count from the first step with codes: it is for them that one waits.
        """
        warm = self.float_steps + self.quantization_warmup
        since = max(best_step, warm) // self.evaluate_every
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
