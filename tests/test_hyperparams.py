"""Settings: what they refuse, how they travel, and the learning-rate schedules."""

import dataclasses
import json
import math

import pytest

from helpers import oracle
from helpers.cases import together
from legacy1bit.hyperparams import (
    ALIASES,
    ARCHITECTURES,
    DEFAULT_RATES,
    FILE_KEYS,
    OPTIMIZERS,
    SCALES,
    SCHEDULES,
    DataConfig,
    ModelConfig,
    TrainingConfig,
    lr_scheduler_cosine,
    lr_scheduler_linear,
    lr_scheduler_step,
    lr_scheduler_warmup,
)
from legacy1bit.system.errors import SettingError

NAN, INF = math.nan, math.inf

# Values that an integer, a number, a flag or a choice of any field must refuse, by the error.
NOT_INTEGERS = (None, True, 1.0, "1", [1])
NOT_NUMBERS = (None, True, "1", [1.0])
NOT_FLAGS = (None, 0, 1, "true")
NOT_CHOICES = (None, "", "RELU", 1, True, ["relu"])

# For each field: values it takes, values out of its range, values of the wrong kind. The two
# extremes of a range stand next to what lies just outside.
MODEL_FIELDS = {
    "vocab_size": ((1, 1 << 20), (0, -1, (1 << 20) + 1, 1 << 80), NOT_INTEGERS),
    "model_dim": ((1, 1 << 14), (0, -8, (1 << 14) + 4), NOT_INTEGERS),
    "num_blocks": ((1, 1 << 10), (0, -1, (1 << 10) + 1), NOT_INTEGERS),
    "num_heads": ((1, 2, 1 << 10), (0, -1, (1 << 10) + 1), NOT_INTEGERS),
    # None is the number of heads, C / H, and C times the multiplier.
    "num_kv_heads": ((1, 2, 1 << 10), (0, -1, (1 << 10) + 1), NOT_INTEGERS[1:]),
    "head_dim": ((1, 6, 1 << 12), (0, -2, (1 << 12) + 1), NOT_INTEGERS[1:]),
    "ffn_multiplier": ((1, 1 << 6), (0, -4, (1 << 6) + 1), NOT_INTEGERS),
    "ffn_dim": ((1, 7, 1 << 18), (0, -1, (1 << 18) + 1), NOT_INTEGERS[1:]),
    "sequence_length": ((1, 1 << 17), (0, -1, (1 << 17) + 1), NOT_INTEGERS),
    "scheme": (
        ("ternary", "ternary-median", "binary", "2bit", "sign", "float"),
        (*NOT_CHOICES, "ternary_median", "1bit"),
        (),
    ),
    "scale": (
        ("tensor", "row", "64", "128", "256", "one"),
        (*NOT_CHOICES, "absmean", 128, "32"),
        (),
    ),
    "scale_shards": ((1, 2, 1 << 10), (0, -1, (1 << 10) + 1), NOT_INTEGERS),
    "ternary_embedding": ((False, True), (), NOT_FLAGS),
    "tied_embeddings": ((False, True), (), NOT_FLAGS),
    "int8_activations": ((False, True), (), NOT_FLAGS),
    "norm": (("layer", "rms"), (*NOT_CHOICES, "batch"), ()),
    "norm_bias": ((False, True), (), NOT_FLAGS),
    "norm_epsilon": ((1e-12, 1e-6, 0.1), (0, 1e-13, -1e-5, 0.11, NAN, INF), NOT_NUMBERS),
    "sub_norm": ((False, True), (), NOT_FLAGS),
    "qk_norm": ((False, True), (), NOT_FLAGS),
    "biases": (("all", "qkv", "none"), (*NOT_CHOICES, "q"), ()),
    "gated": ((False, True), (), NOT_FLAGS),
    "activation": (("relu2", "relu", "silu", "gelu"), NOT_CHOICES, ()),
    "positions": (("rope", "none"), NOT_CHOICES, ()),
    "rope_base": ((1, 1.0, 1e9), (0.999, -1e4, 1.1e9, NAN, INF, -INF), NOT_NUMBERS),
    "rope_pairs": (("halves", "adjacent"), (*NOT_CHOICES, "half"), ()),
    "rope_fraction": ((1e-3, 0.5, 1), (0, -0.5, 9e-4, 1.1, NAN, INF), NOT_NUMBERS),
    "rope_factor": ((1, 4.0, 1e3), (0, 0.99, -4.0, 1.1e3, NAN, INF), NOT_NUMBERS),
    "rope_original_length": ((0, 64, 1 << 17), (-1, (1 << 17) + 1), NOT_INTEGERS),
    "final_norm": ((False, True), (), NOT_FLAGS),
    "attention_window": ((0, 1, 1 << 17), (-1, (1 << 17) + 1), NOT_INTEGERS),
    "window_pattern": (
        ("0", "1", "3,0", " 512, 512,0"),
        ("", ",", "3,", "3,,0", "3;0", "-1", "1.5", "three", "٣", "9999999"),
        (0, True, [3, 0]),
    ),
    "output_bias": ((False, True), (), NOT_FLAGS),
}
TRAINING_FIELDS = {
    "steps": ((1, 1 << 40), (0, -1, (1 << 40) + 1), NOT_INTEGERS),
    "batch_size": ((1, 1 << 20), (0, -1, (1 << 20) + 1), NOT_INTEGERS),
    "gradient_accumulation": ((1, 1 << 20), (0, -1, (1 << 20) + 1), NOT_INTEGERS),
    "optimizer": (("muon", "adamw", "sgd"), (*NOT_CHOICES, "adam"), ()),
    # None is the optimizer's default.
    "learning_rate": ((1e-12, 1, 1e3), (0.0, -1e-3, 1.1e3, NAN, INF), NOT_NUMBERS[1:]),
    "schedule": (("cosine", "linear", "step", "constant"), NOT_CHOICES, ()),
    "decay_factor": ((0, 1.0), (-0.1, 1.1, NAN, INF), NOT_NUMBERS),
    "decay_every": ((1, 1 << 40), (0, -1, (1 << 40) + 1), NOT_INTEGERS),
    "final_learning_rate": ((0, 1.0), (-0.1, 1.1, NAN, INF), NOT_NUMBERS),
    "decay_fraction": ((0, 1.0), (-0.1, 1.1, NAN, INF), NOT_NUMBERS),
    # None is the default for the steps.
    "warmup_steps": ((0, 1 << 40), (-1, (1 << 40) + 1), NOT_INTEGERS[1:]),
    "beta1": ((0, 0.999999), (-0.1, 1.0, NAN, INF), NOT_NUMBERS),
    "beta2": ((0, 0.999999), (-0.1, 1.0, NAN, INF), NOT_NUMBERS),
    "epsilon": ((1e-20, 1), (0.0, 9e-21, -1e-8, 1.1, NAN, INF), NOT_NUMBERS),
    "weight_decay": ((0, 1e3), (-0.1, 1.1e3, NAN, INF), NOT_NUMBERS),
    "weight_decay_until": ((0, 1.0), (-0.1, 1.1, NAN, INF), NOT_NUMBERS),
    "float_steps": ((0, 1 << 40), (-1, (1 << 40) + 1), NOT_INTEGERS),
    "quantization_warmup": ((0, 1 << 40), (-1, (1 << 40) + 1), NOT_INTEGERS),
    "distillation_weight": ((0, 1.0), (-0.1, 1.1, NAN, INF), NOT_NUMBERS),
    "teacher_temperature": ((0.1, 100), (0.0, 101.0, NAN, INF), NOT_NUMBERS),
    "adapter": ((0, 1 << 12), (-1, (1 << 12) + 1), NOT_INTEGERS),
    "adapter_alpha": ((1e-6, 1e6), (0.0, -1.0, 1.1e6, NAN, INF), NOT_NUMBERS[1:]),
    "adapter_dropout": ((0, 0.99), (-0.1, 1.0, NAN, INF), NOT_NUMBERS),
    "adapter_layers": (("all", "attention", "ffn"), NOT_CHOICES, ()),
    "optimizer_bits": ((32, 8), (0, 7, 16, 33, 64), NOT_INTEGERS),
    "momentum": ((0, 0.999999), (-0.1, 1.0, NAN, INF), NOT_NUMBERS),
    "sign_direction": (("descend", "ascend"), (*NOT_CHOICES, "up"), ()),
    "precision": (("auto", "float32", "int8", "bf16"), NOT_CHOICES, ()),
    "gradient_checkpointing": ((False, True), (), NOT_FLAGS),
    "muon_lr_ratio": ((1e-6, 1, 1e6), (0.0, -1.0, 1.1e6, NAN, INF), NOT_NUMBERS),
    "clip": ((0, 1e9), (-1.0, 1.1e9, NAN, INF), NOT_NUMBERS),
    "gradient_compression": (("none", "8bit", "1bit"), (*NOT_CHOICES, "4bit", 8), ()),
    "local_steps": ((0, 1 << 20), (-1, (1 << 20) + 1), NOT_INTEGERS),
    "seed": ((0, (1 << 63) - 1), (-1, 1 << 63), NOT_INTEGERS),
    "threads": ((1, 256), (0, -1, 257), NOT_INTEGERS),
    "evaluate_every": ((1, 1 << 40), (0, -1, (1 << 40) + 1), NOT_INTEGERS),
    "patience": ((0, 1 << 40), (-1, (1 << 40) + 1), NOT_INTEGERS),
    "validation_tokens": ((0, 1 << 40), (-1, (1 << 40) + 1), NOT_INTEGERS),
}
# What a value needs beside it.
BESIDE = {
    "model_dim": {"num_heads": 1, "positions": "none"},
    "num_kv_heads": {"num_heads": 1 << 10},
    "head_dim": {"positions": "none"},
    "rope_fraction": {"head_dim": 4000},
}
RECORDS = ((ModelConfig, MODEL_FIELDS), (TrainingConfig, TRAINING_FIELDS))
records = pytest.mark.parametrize("record", [ModelConfig, TrainingConfig])


def cases(which):
    """(record, field, value) for the first, second or third entry of every field."""
    return [
        (record, field, value)
        for record, table in RECORDS
        for field, values in table.items()
        for value in values[which]
    ]


@pytest.mark.parametrize(("record", "table"), RECORDS)
def test_every_field_has_cases(record, table):
    assert set(table) == {field.name for field in dataclasses.fields(record)}


@pytest.mark.parametrize(("record", "table"), RECORDS)
def test_fields_say_what_they_take(record, table):
    """The command line makes its options of this: kind, range or choices, and meaning."""
    for field in dataclasses.fields(record):
        accepted, out_of_range, _ = table[field.name]
        kind, meaning = field.metadata["kind"], field.metadata["meaning"]
        expected = {"kind", "meaning", "group"} | {"later"} & set(field.metadata)
        if kind is str and "choices" not in field.metadata:
            assert field.default is None
        elif "choices" in field.metadata:
            expected |= {"choices"}
            assert field.metadata["choices"] == accepted, field.name
            assert field.default in accepted, field.name
        elif kind in (int, float):
            expected |= {"low", "high"}
            low, high = field.metadata["low"], field.metadata["high"]
            assert (low, high) == (accepted[0], accepted[-1]), field.name
            assert field.default is None or low <= field.default <= high, field.name
            assert all(not low <= value <= high for value in out_of_range), field.name
        else:
            assert kind is bool
        assert set(field.metadata) == expected, field.name
        assert field.default is None or isinstance(field.default, kind), field.name
        # One line, of one clause.
        assert meaning.strip() == meaning, field.name
        assert meaning, field.name
        assert "\n" not in meaning, field.name
        assert not meaning.endswith("."), field.name


def test_choices_are_those_of_the_fields():
    choices = {
        field.name: field.metadata.get("choices")
        for record, _ in RECORDS
        for field in dataclasses.fields(record)
    }
    assert choices["scale"] == SCALES
    assert choices["optimizer"] == OPTIMIZERS
    assert choices["schedule"] == SCHEDULES


@together("record, field, value", cases(0))
def test_configs_accept_their_ranges(record, field, value):
    base = {}
    if record is ModelConfig:
        # A width that even the largest number of heads divides.
        base = {"model_dim": 1 << 12, **BESIDE.get(field, {})}
    if field in ("rope_factor", "rope_original_length") and value > 1:
        base |= {"rope_factor": 2.0, "rope_original_length": 64}
    config = record(**{**base, field: value})
    assert getattr(config, field) == value
    assert record.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@together("record, field, value", cases(1))
def test_configs_reject_values_out_of_range(record, field, value):
    with pytest.raises(ValueError, match=f"{field} is .*expected") as caught:
        record(**{field: value})
    assert "\n" not in str(caught.value)


@together("record, field, value", cases(2))
def test_configs_reject_other_kinds(record, field, value):
    with pytest.raises(TypeError, match=f"{field} is .*expected"):
        record(**{field: value})


@records
def test_configs_cannot_be_changed(record):
    config = record()
    name = dataclasses.fields(record)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, name, 7)
    assert config == record()
    assert hash(config) == hash(record())


@pytest.mark.parametrize(("dim", "heads"), [(9, 2), (8, 3), (3, 4), (128, 5)])
def test_model_config_demands_that_heads_divide_the_dimension(dim, heads):
    with pytest.raises(ValueError, match=r"model_dim is .*multiple of num_heads"):
        ModelConfig(model_dim=dim, num_heads=heads)


@pytest.mark.parametrize(("dim", "heads"), [(1, 1), (9, 3), (6, 2), (21, 7)])
def test_model_config_demands_even_heads_of_rotary_positions_only(dim, heads):
    with pytest.raises(ValueError, match="even"):
        ModelConfig(model_dim=dim, num_heads=heads, positions="rope")
    assert ModelConfig(model_dim=dim, num_heads=heads, positions="none").head_dim == dim // heads


def sizes(config):
    return config.num_kv_heads, config.head_dim, config.ffn_dim, config.query_dim, config.kv_dim


def test_model_config_derives_its_other_sizes():
    config = ModelConfig(vocab_size=50, model_dim=24, num_heads=3, ffn_multiplier=5)
    assert sizes(config) == (3, 8, 120, 24, 24)
    assert config.pad_token == 50
    # Given as None they are derived, too; what is derived is written into no file.
    same = ModelConfig(vocab_size=50, model_dim=24, num_heads=3, ffn_multiplier=5,
                       num_kv_heads=None, head_dim=None, ffn_dim=None)  # fmt: skip
    assert same == config
    assert {"num_kv_heads", "head_dim", "ffn_dim"}.isdisjoint(config.to_dict())
    config = ModelConfig(model_dim=25, num_heads=6, num_kv_heads=2, head_dim=10, ffn_dim=7)
    assert sizes(config) == (2, 10, 7, 60, 20)
    assert config.to_dict()["ffn_dim"] == 7


def test_with_settings_derives_anew_what_was_derived():
    config = ModelConfig(model_dim=24, num_heads=3)
    assert sizes(config.with_settings(model_dim=12)) == (3, 4, 36, 12, 12)
    assert sizes(config.with_settings(num_heads=6)) == (6, 4, 72, 24, 24)
    assert sizes(config.with_settings(ffn_multiplier=2)) == (3, 8, 48, 24, 24)
    given = config.with_settings(ffn_dim=7, num_kv_heads=1, head_dim=10)
    assert sizes(given.with_settings(model_dim=12)) == (1, 10, 7, 30, 10)
    assert given.with_settings() == given
    with pytest.raises(ValueError, match="num_kv_heads"):
        given.with_settings(num_kv_heads=2)


@together(
    "settings, expected",
    [
        ({"num_heads": 3}, "model_dim is 256, expected a multiple of num_heads (3), or a head_dim"),
        ({"num_kv_heads": 3}, "num_kv_heads is 3, expected a divisor of num_heads (4)"),
        ({"num_kv_heads": 8}, "num_kv_heads is 8, expected a divisor of num_heads (4)"),
        ({"head_dim": 5}, "head_dim is 5, expected an even number"),
        (
            {"rope_fraction": 0.25, "head_dim": 20},
            "head_dim * rope_fraction is 5, expected an even",
        ),
        (
            {"rope_fraction": 0.3, "head_dim": 8},
            "head_dim * rope_fraction is 2.4, expected an even",
        ),
        ({"rope_fraction": 1e-3}, "num_heads * rope_fraction is 0.064, expected an even number"),
        ({"positions": "none", "rope_fraction": 0.5}, "rope_fraction need positions rope"),
        (
            {"positions": "none", "rope_factor": 2.0, "rope_original_length": 64},
            "rope_factor and rope_fraction need positions rope",
        ),
        ({"rope_factor": 4.0}, "rope_factor is 4 and rope_original_length 0: YaRN needs"),
        ({"rope_original_length": 64}, "rope_factor is 1 and rope_original_length 64: YaRN needs"),
        (
            {"rope_factor": 2.0, "rope_original_length": 64, "rope_base": 1.0},
            "rope_base is 1 with a rope_factor",
        ),
        *(
            ({"scale_shards": 2, "scale": scale}, f"scale_shards is 2 with scale {scale}, expected")
            for scale in SCALES
            if scale != "tensor"
        ),
        (
            {"window_pattern": "3,0", "attention_window": 5},
            "window_pattern is 3,0 and attention_window 5, expected one of them",
        ),
    ],
)
def test_model_config_refuses_settings_that_contradict_each_other(settings, expected):
    with pytest.raises(SettingError) as caught:
        ModelConfig(**{"model_dim": 256, **settings})
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
    # Each of them is right alone, or with what it needs.
    assert len(caught.value.args) > 1


@pytest.mark.parametrize(("head_dim", "fraction", "rotary_dim"), [
    (10, 0.4, 4), (20, 0.7, 14), (50, 0.28, 14), (100, 0.58, 58), (128, 0.25, 32), (6, 1.0, 6),
    (90, 2 / 3, 60),
])  # fmt: skip
def test_rotary_dim_is_the_fraction_of_a_head(head_dim, fraction, rotary_dim):
    """Though the product may be off by a rounding."""
    assert ModelConfig(head_dim=head_dim, rope_fraction=fraction).rotary_dim == rotary_dim


def test_windows_repeat_along_the_blocks():
    for settings, expected in (
        ({}, (0, 0, 0, 0, 0)),
        ({"attention_window": 7}, (7, 7, 7, 7, 7)),
        ({"window_pattern": "3"}, (3, 3, 3, 3, 3)),
        ({"window_pattern": "3, 4,0"}, (3, 4, 0, 3, 4)),
        ({"window_pattern": "1,2,3,4,5,6"}, (1, 2, 3, 4, 5)),
    ):
        assert ModelConfig(num_blocks=5, **settings).windows == expected


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures_are_settings_with_every_size(name):
    """Their bundles leave the sizes open, and are told apart by what they have."""
    sizes = {"vocab_size", "model_dim", "num_blocks", "num_heads", "num_kv_heads", "head_dim",
             "ffn_dim", "sequence_length"}  # fmt: skip
    assert sizes.isdisjoint(ARCHITECTURES[name])
    config = ModelConfig(model_dim=24, num_heads=6, num_kv_heads=2, head_dim=10, ffn_dim=7,
                         **ARCHITECTURES[name])  # fmt: skip
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    of_other_programs = {
        "nemotron": ("layer", "relu2", "all", False, False, False, False),
        "llama": ("rms", "silu", "none", True, False, False, False),
        "qwen3": ("rms", "silu", "none", True, True, False, False),
        "bitnet": ("rms", "relu2", "none", True, False, True, True),
        "c-original": ("layer", "relu", "all", False, False, False, False),
    }
    assert of_other_programs[name] == (
        config.norm, config.activation, config.biases, config.gated, config.qk_norm,
        config.sub_norm, config.tied_embeddings,
    )  # fmt: skip


@pytest.mark.parametrize(("optimizer", "rate"), [("muon", 5.7e-3), ("adamw", 3e-3), ("sgd", 0.1)])
def test_learning_rate_is_the_optimizers_unless_it_is_given(optimizer, rate):
    assert DEFAULT_RATES[optimizer] == rate
    assert TrainingConfig(optimizer=optimizer).learning_rate == rate
    assert TrainingConfig(optimizer=optimizer, learning_rate=None).learning_rate == rate
    assert TrainingConfig(optimizer=optimizer, learning_rate=0.5).learning_rate == 0.5
    # What travels is the number, so that another default leaves old runs as they were.
    settings = TrainingConfig(optimizer=optimizer).to_dict()
    assert settings["learning_rate"] == rate
    assert TrainingConfig.from_dict({**settings, "learning_rate": None}).learning_rate == rate


@pytest.mark.parametrize("optimizer", [None, "adam", ["sgd"], {}])
def test_learning_rate_has_no_default_for_an_unknown_optimizer(optimizer):
    with pytest.raises(ValueError, match=r"optimizer is .*expected one of muon, adamw, sgd"):
        TrainingConfig(optimizer=optimizer, learning_rate=None)


# --- Dictionaries ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "earlier", "name", "value", "today"),
    [
        (ModelConfig, "attention_span", "attention_window", 3, 3),
        (TrainingConfig, "matrix_ratio", "muon_lr_ratio", 1.5, 1.5),
        (TrainingConfig, "decay_share", "decay_fraction", 0.5, 0.5),
        (DataConfig, "apart", "document_mask", True, True),
        (DataConfig, "validation_share", "validation_fraction", 0.2, 0.2),
        (DataConfig, "order", "order", "passes", "epochs"),
    ],
)
def test_from_dict_takes_the_names_of_earlier_versions(record, earlier, name, value, today):
    assert getattr(record.from_dict({earlier: value}), name) == today
    if earlier != name:
        assert earlier in ALIASES
        with pytest.raises(ValueError, match=f"{name} is there twice"):
            record.from_dict({earlier: value, name: value})
        with pytest.raises(TypeError):
            record(**{earlier: value})


def test_to_dict_keeps_the_keys_of_files():
    assert ModelConfig(attention_window=3).to_dict()["attention_span"] == 3


@pytest.mark.parametrize("step", [0, 2, 3, 4, 5, 7, 8, 100])
def test_quantization_sets_in_after_the_float_steps(step):
    config = TrainingConfig(float_steps=3, quantization_warmup=4)
    assert config.quantized_share_at(step) == min(max((step - 3) / 4, 0.0), 1.0)
    assert TrainingConfig(float_steps=3).quantized_share_at(step) == (step >= 3)
    assert TrainingConfig().quantized_share_at(step) == 1.0


def test_patience_begins_with_the_first_step_of_codes_alone():
    config = TrainingConfig(
        float_steps=10, quantization_warmup=20, evaluate_every=10, patience=2, steps=100
    )
    assert [config.patience_ends(step, 5) for step in (30, 40, 50)] == [False, False, True]
    assert config.patience_ends(60, 40)
    assert not config.patience_ends(50, 40)


@records
def test_to_dict_has_every_field_but_later_ones_with_their_defaults(record):
    assert list(record().to_dict()) == [
        FILE_KEYS.get(field.name, field.name)
        for field in dataclasses.fields(record)
        if "later" not in field.metadata
    ]


def test_to_dict_of_a_model_of_earlier_versions_has_their_keys_alone():
    """The bytes of its files stay the same."""
    assert list(ModelConfig().to_dict()) == [
        "vocab_size", "model_dim", "num_blocks", "num_heads", "ffn_multiplier", "sequence_length",
        "scheme", "scale", "ternary_embedding", "int8_activations", "sub_norm", "activation",
        "positions", "rope_base", "final_norm", "attention_span", "output_bias",
    ]  # fmt: skip


@records
def test_from_dict_fills_in_defaults(record):
    assert record.from_dict({}) == record()


@pytest.mark.parametrize(("record", "key"), [(ModelConfig, "steps"), (TrainingConfig, "lr")])
def test_from_dict_rejects_unknown_keys(record, key):
    with pytest.raises(ValueError, match=f"'{key}', expected .*"):
        record.from_dict({key: 1})


@records
@pytest.mark.parametrize("settings", [None, [], "vocab_size", 3, [("vocab_size", 3)]])
def test_from_dict_rejects_other_kinds(record, settings):
    with pytest.raises(TypeError, match="dictionary"):
        record.from_dict(settings)


def test_from_dict_checks_the_values():
    with pytest.raises(ValueError, match="model_dim"):
        ModelConfig.from_dict({"model_dim": -1})
    with pytest.raises(TypeError, match="threads"):
        TrainingConfig.from_dict({"threads": None})


# --- The C original's settings --------------------------------------------------------------------


def test_c_original_has_the_settings_of_c():
    config = ModelConfig.c_original()
    sizes = config.vocab_size, config.model_dim, config.num_blocks, config.num_heads
    assert sizes == (256, 256, 2, 4)
    assert (config.ffn_multiplier, config.sequence_length) == (4, 128)
    assert (config.scheme, config.scale, config.ternary_embedding) == ("ternary", "one", True)
    assert (config.activation, config.positions, config.final_norm) == ("relu", "none", False)
    assert (config.attention_window, config.int8_activations, config.sub_norm) == (1, False, False)


@pytest.mark.parametrize(
    "change",
    [
        {"vocab_size": 9},
        {"model_dim": 64},
        {"num_blocks": 5},
        {"num_heads": 8},
        {"sequence_length": 7},
    ],
    ids=lambda change: next(iter(change)),
)
def test_is_c_original_does_not_mind_sizes(change):
    assert ModelConfig.c_original().with_settings(**change).is_c_original


@pytest.mark.parametrize(
    "change",
    [
        {"scheme": "float"},
        {"scheme": "binary"},
        {"scale": "tensor"},
        {"scale": "row"},
        {"ternary_embedding": False},
        {"int8_activations": True},
        {"sub_norm": True},
        {"activation": "relu2"},
        {"positions": "rope"},
        {"final_norm": True},
        {"attention_window": 0},
        {"attention_window": 2},
        {"ffn_multiplier": 2},
        {"output_bias": False},
        {"num_kv_heads": 2},
        {"head_dim": 6},
        {"ffn_dim": 7},
        {"norm": "rms"},
        {"norm_bias": False},
        {"norm_epsilon": 1e-6},
        {"qk_norm": True},
        {"biases": "qkv"},
        {"gated": True},
        {"activation": "silu"},
        {"tied_embeddings": True},
    ],
    ids=lambda change: next(iter(change)),
)
def test_is_c_original_minds_every_option(change):
    assert not ModelConfig.c_original().with_settings(**change).is_c_original
    assert not ModelConfig().is_c_original


# --- Schedules ------------------------------------------------------------------------------------

# Both sides work in float64, from the same formulas in another order.
FLOAT64 = {"rel": 1e-14, "abs": 1e-18}


@together("final", [0.0, 0.1, 1.0])
@together("share", [0.0, 0.4, 1.0])
@together("warmup", [0, 1, 7, 39, 100])
@together("steps", [1, 2, 40])
@together("schedule", SCHEDULES)
def test_learning_rate_at_is_the_oracles(schedule, steps, warmup, share, final):
    config = TrainingConfig(
        steps=steps,
        schedule=schedule,
        warmup_steps=warmup,
        learning_rate=3e-3,
        final_learning_rate=final,
        decay_fraction=share,
        decay_factor=0.3,
        decay_every=5,
    )
    for step in range(steps + 3):
        expected = oracle.learning_rate(
            step,
            peak=3e-3,
            warmup_steps=warmup,
            total_steps=steps,
            falling_steps=round(steps * share),
            schedule=schedule,
            final_fraction=final,
            factor=0.3,
            stair=5,
        )
        assert config.learning_rate_at(step) == pytest.approx(expected, **FLOAT64), step


@pytest.mark.parametrize(
    ("changes", "rates"),
    [
        ({"schedule": "cosine"}, [0.5, 1.0, 1.0, 1.0, 0.625, 0.25, 0.25]),
        ({"schedule": "linear"}, [0.5, 1.0, 1.0, 1.0, 0.625, 0.25, 0.25]),
        ({"schedule": "constant"}, [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ({"schedule": "step"}, [0.5, 1.0, 1.0, 1.0, 0.125, 0.015625, 0.125**9]),
        ({"schedule": "step", "decay_every": 2}, [0.5, 1.0, 1.0, 1.0, 1.0, 0.125, 0.125**4]),
        ({"schedule": "step", "decay_factor": 0.0}, [0.5, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0]),
        ({"schedule": "step", "decay_factor": 1.0}, [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
    ],
    ids=str,
)
def test_learning_rate_at_by_hand(changes, rates):
    # Of five steps the last two fall: at step 3 the way begins.
    options = {"decay_factor": 0.125, "decay_every": 1, "final_learning_rate": 0.25, **changes}
    config = TrainingConfig(
        steps=5, warmup_steps=2, learning_rate=1.0, decay_fraction=0.4, **options
    )
    actual = [config.learning_rate_at(step) for step in (0, 1, 2, 3, 4, 5, 12)]
    assert actual == pytest.approx(rates, **FLOAT64)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_learning_rate_at_rises_to_its_peak_before_it_falls(schedule):
    config = TrainingConfig(
        steps=10, warmup_steps=8, decay_fraction=1.0, schedule=schedule, learning_rate=8.0,
        decay_every=1,
    )  # fmt: skip
    assert [config.learning_rate_at(step) for step in range(8)] == list(range(1, 9))
    # Two steps are left to fall in.
    falling = [config.learning_rate_at(step) for step in (8, 9)]
    expected = [8.0, 8.0 if schedule == "constant" else 4.0]
    assert falling == pytest.approx(expected, **FLOAT64)


@pytest.mark.parametrize(
    ("steps", "warmup"),
    [(1, 0), (9, 0), (10, 1), (60, 6), (98, 9), (999, 99), (1000, 100), (1500, 100), (10**6, 100)],
)
def test_learning_rate_at_warms_up_for_a_tenth_of_a_short_run(steps, warmup):
    config = TrainingConfig(steps=steps, learning_rate=1.0, schedule="constant")
    assert config.warmup == warmup
    assert [config.learning_rate_at(step) for step in range(warmup)] == pytest.approx(
        [(step + 1) / warmup for step in range(warmup)], **FLOAT64
    )
    assert config.learning_rate_at(warmup) == 1.0
    # One that is named stays, whatever else changes.
    assert TrainingConfig(steps=steps, warmup_steps=100).warmup == 100
    assert dataclasses.replace(config, steps=2000).warmup == 100


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_learning_rate_at_stays_at_the_end(schedule):
    config = TrainingConfig(
        steps=10, warmup_steps=3, learning_rate=1.0, final_learning_rate=0.25, schedule=schedule
    )
    assert config.learning_rate_at(2) == 1.0
    assert config.learning_rate_at(10) == config.learning_rate_at(1000) == 0.25


@pytest.mark.parametrize(
    ("until", "decayed"),
    [(0.0, 0), (0.04, 0), (0.05, 0), (0.1, 1), (0.14, 1), (0.5, 5), (0.96, 10), (1.0, 10)],
)
def test_weight_decay_at_stops_where_it_is_told(until, decayed):
    config = TrainingConfig(steps=10, weight_decay=0.25, weight_decay_until=until)
    assert [config.weight_decay_at(step) for step in range(10)] == [0.25] * decayed + [0.0] * (
        10 - decayed
    )


def test_weight_decay_at_is_the_weight_decay_by_default():
    config = TrainingConfig(steps=3)
    assert [config.weight_decay_at(step) for step in range(3)] == [config.weight_decay] * 3


@pytest.mark.parametrize(
    ("patience", "warm", "best", "ends"),
    [(0, 0, 10, None), (1, 0, 10, 20), (2, 0, 10, 30), (2, 0, 13, 30), (3, 0, 19, 40),
     (2, 35, 0, 50), (2, 35, 40, 60), (2, 0, 0, 20)],
)  # fmt: skip
def test_patience_ends_a_run_after_as_many_evaluations(patience, warm, best, ends):
    """A step between two of them, where a run was interrupted, does not count."""
    config = TrainingConfig(patience=patience, evaluate_every=10, float_steps=warm)
    steps = [step for step in range(best, 100) if config.patience_ends(step, best)]
    assert steps[:1] == ([] if ends is None else [ends])
    assert steps == list(range(steps[0], 100)) if steps else ends is None


def test_lr_scheduler_warmup_rises_by_equal_steps_from_the_first():
    rates = [lr_scheduler_warmup(step, 4, 2.0) for step in range(6)]
    assert rates == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]
    assert lr_scheduler_warmup(0, 0, 2.0) == 2.0


def test_lr_scheduler_cosine_falls_from_end_to_end():
    rates = [lr_scheduler_cosine(step, 4, 2.0, 1.0) for step in range(6)]
    assert rates == pytest.approx(
        [2.0, 1.5 + 0.5**0.5 / 2, 1.5, 1.5 - 0.5**0.5 / 2, 1.0, 1.0], **FLOAT64
    )
    assert lr_scheduler_cosine(0, 0, 2.0, 1.0) == 1.0


def test_lr_scheduler_linear_falls_from_end_to_end():
    rates = [lr_scheduler_linear(step, 4, 2.0, 1.0) for step in range(6)]
    assert rates == [2.0, 1.75, 1.5, 1.25, 1.0, 1.0]
    assert lr_scheduler_linear(0, 0, 2.0, 1.0) == 1.0


def test_lr_scheduler_step_falls_once_an_interval():
    rates = [lr_scheduler_step(epoch, 8.0, 0.5, 3) for epoch in range(8)]
    assert rates == [8.0, 8.0, 8.0, 4.0, 4.0, 4.0, 2.0, 2.0]


@pytest.mark.parametrize("epochs", [0, -1])
def test_lr_scheduler_step_rejects_intervals_below_one(epochs):
    with pytest.raises(ValueError, match=r"decay_epochs is .*expected"):
        lr_scheduler_step(3, 1.0, 0.5, epochs)
