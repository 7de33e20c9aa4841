"""Settings in files: what is read and written, what is refused, and runs that are trained again."""

import dataclasses
import json
import os
import shutil
import tomllib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.runs import assert_same_files
from legacy1bit.config_files import (
    TABLES,
    check_settings,
    config_text,
    hyperparams_init_defaults,
    hyperparams_load_from_file,
    hyperparams_print,
    hyperparams_save_to_file,
    read_config,
    read_toml,
    records_of,
    unknown_key,
    write_config,
)
from legacy1bit.hyperparams import DEFAULT_RATES, DataConfig, ModelConfig, TrainingConfig
from legacy1bit.logger import METRICS_FILE, read_metrics
from legacy1bit.training.run import Run

DEFAULTS = (ModelConfig(), TrainingConfig(), DataConfig())
TINY = """
[model]
model_dim = 8
num_blocks = 1
num_heads = 1
sequence_length = 16

[training]
steps = 3
batch_size = 2
threads = 1
"""
TEXT = "The cat sat on the m\u00e4t.\r\nThe dog lay by the log.\n" * 20


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def file_of(content, name="mine.toml"):
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return Path(name)


def refused(content, name="mine.toml"):
    """What is said of a file that is no config file."""
    with pytest.raises(ValueError, match=rf"^{name}") as error:
        read_config(file_of(content, name))
    return str(error.value)


# --- TOML -----------------------------------------------------------------------------------------

TRICKY = '''# a file
top = 1
"quoted key" = "a = 1 # no comment"
a . b = { c = 1, 'd.e' = [1, {f = 2}], "g\\"" = {} }   # a comment: [no.table]

[training]
text = """
[inside]
none = 1 \\""" ""two"""""
raw = \'\'\'
x = '' 1\'\'\'
list = [
    # in = 1
    [1.5, "]"], {deep = 1e-3},
    07:32:00,
]
steps = 5
[ "odd . name" . y ]
z = 1979-05-27 07:32:00
[[many]]
first = 1
[[many]]
first = 2
second = 3
[training.more]
'''
LINES = {
    "top": 2,
    "quoted key": 3,
    "a.b": 4,
    "a.b.c": 4,
    "a.b.d.e": 4,
    "a.b.d.e.f": 4,
    'a.b.g"': 4,
    "training": 6,
    "training.text": 7,
    "training.raw": 10,
    "training.list": 12,
    "training.list.deep": 14,
    "training.steps": 17,
    "odd . name.y": 18,
    "odd . name.y.z": 19,
    "many": 20,
    "many.first": 21,
    "many.second": 24,
    "training.more": 25,
}


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_read_toml_tells_the_line_of_each_key(ending):
    content, lines = read_toml(file_of(TRICKY.replace("\n", ending)))
    assert content == tomllib.loads(TRICKY)
    assert lines == LINES


keys = st.text("ab-_1", min_size=1, max_size=3) | st.just('"q.\\"]= #"')
values = st.recursive(
    st.sampled_from(["1", "0.5", "true", '"a = [1"', "'x, {'", '"""\n# y = 1\n"""', "'''\n]'''"]),
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda some: "[\n" + ", # z = [\n".join([*some, "]"]))
        | st.dictionaries(keys, inner, max_size=3).map(
            lambda some: "{" + ", ".join(f"{key} = {value}" for key, value in some.items()) + "}"
        )
    ),
    max_leaves=6,
)


@settings(deadline=None)
@given(st.dictionaries(keys, values, max_size=4))
def test_read_toml_finds_each_key_where_it_is(some):
    text, expected = "# first\n[table]\n", {}
    for key, value in some.items():
        expected["table." + tomllib.loads(f"{key} = 1").popitem()[0]] = text.count("\n") + 1
        text += f"{key} = {value} # comment\n"
    content, lines = read_toml(file_of(text))
    assert content == tomllib.loads(text)
    assert {key: lines[key] for key in expected} == expected


BAD_TOML = {
    b"[training]\nclip = 1\nclip = 2\n": "line 3 is not TOML: Cannot overwrite a value",
    b"[training]\nclip =\n": "line 2 is not TOML: Invalid value",
    b"[training\n": "line 1 is not TOML: Expected ']'",
    b'[data]\nfield = """\n\n': "line 2 is not TOML: ",
    b"[data]\n\nfield = '\xe4'": "line 3: byte 0xe4 is not UTF-8",
    b"\x00\x01\x02\x00": "line 1 is not TOML",
    b"\x7fELF\x02\xff\xfe": "line 1: byte 0xff is not UTF-8",
    b"[a]\nx = " + b"[" * 50_000: "brackets are too deep",
    b"[a]\nx = " + b"9" * 5000: "is not TOML: ",
    b"#" * ((1 << 16) + 1): "larger than 65536 bytes",
    b"a." * 300 + b"a = 1": "line 1 has more than 256 dots",
    b"x = 1\n[" + b"a." * 300 + b"a]": "line 2 has more than 256 dots",
}


@pytest.mark.parametrize("content", BAD_TOML, ids=BAD_TOML.values())
def test_read_toml_says_where_a_file_is_none(content):
    path = file_of(content)
    with pytest.raises(ValueError, match=r"^mine\.toml") as error:
        read_toml(path)
    assert BAD_TOML[content] in str(error.value)
    assert "\n" not in str(error.value)


def test_unknown_key_names_the_nearest():
    error = unknown_key("f.toml", 3, "stpes", ["steps", "seed"])
    assert isinstance(error, ValueError)
    assert str(error) == "f.toml, line 3: unknown key 'stpes', did you mean 'steps'?"
    error = unknown_key("f.toml", None, "colour", ["steps", "seed"])
    assert str(error) == "f.toml: unknown key 'colour', expected steps, seed"


def test_number_that_python_does_not_spell_is_refused():
    """Hexadecimal digits have no limit in TOML's reader, decimal ones do in what prints them."""
    path = file_of(b"[training]\nsteps = 0x" + b"f" * 5000)
    with pytest.raises(ValueError, match=r"line 2: training\.steps is a number of more than 4300"):
        read_config(path)


# --- Config files ---------------------------------------------------------------------------------


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_read_config_returns_what_the_file_names(mark):
    content = b"[training]\nsteps = 7\nclip = 2\n[model]\nsub_norm = true\n[data]\nfield = 'a'"
    told = read_config(file_of(mark + content))
    assert told == {
        "training": {"steps": 7, "clip": 2.0},
        "model": {"sub_norm": True},
        "data": {"field": "a"},
    }
    assert type(told["training"]["clip"]) is float


@pytest.mark.parametrize("content", ["", "\n# nothing\n", "[model]\n[data]\n"])
def test_read_config_of_nothing_means_the_defaults(content):
    assert records_of(read_config(file_of(content))) == DEFAULTS


BAD_CONFIGS = {
    "[modle]\n": "mine.toml, line 1: unknown key 'modle', did you mean 'model'?",
    "\n\n[training]\nstpes = 1": "mine.toml, line 4: unknown key 'stpes', did you mean 'steps'?",
    "[model]\nblocks = 1": "line 2: unknown key 'blocks', did you mean 'num_blocks'?",
    "[model]\nModel-Dim = 1": "line 2: unknown key 'Model-Dim', did you mean 'model_dim'?",
    "[data]\nvocab-size = 1": "line 2: unknown key 'vocab-size', did you mean 'vocabulary'?",
    "[data]\ncolour = 1": "line 2: unknown key 'colour', expected tokenizer, vocabulary, ",
    "[model]\nsteps = 1": "line 2: steps belongs below [training]",
    "[model]\nmatrix_ratio = 1": "line 2: muon_lr_ratio belongs below [training]",
    "[training]\nmuon_lr_ratio = 1\nmatrix_ratio = 1": (
        "line 3: matrix_ratio and muon_lr_ratio are the same setting"
    ),
    "[training]\ndecay_share = 2": "line 2: training.decay_share is 2, expected 0.0 to 1.0",
    "[training]\ndecay_shares = 2": "line 2: unknown key 'decay_shares', did you mean ",
    "steps = 1": "line 1: steps belongs below [training]",
    "steps = 1\n[model]": "line 1: steps belongs below [training]",
    "model = 1": "line 1: model is 1, expected a table",
    "model.sub_norm = 1": "line 1: model.sub_norm is 1, expected true or false",
    "training = {clip = 1,\tclap = 2}": "line 1: unknown key 'clap', did you mean 'clip'?",
    "[training]\nsteps = 0": "line 2: training.steps is 0, expected 1 to ",
    "[training]\nsteps = true": "line 2: training.steps is True, expected a whole number",
    "[training]\nsteps = 5.0": "line 2: training.steps is 5.0, expected a whole number",
    "[training]\nsteps = '5'": "line 2: training.steps is '5', expected a whole number",
    "[training]\nclip = '5'": "line 2: training.clip is '5', expected a number",
    "[training]\nclip = true": "line 2: training.clip is True, expected a number",
    "[training]\nclip = nan": "line 2: training.clip is nan, expected 0.0 to ",
    "[training]\nclip = -inf": "line 2: training.clip is -inf, expected 0.0 to ",
    "[training]\nclip = 1" + "0" * 400: "line 2: training.clip is 1000",
    "[model]\n\nscale = 128": "line 3: model.scale is 128, expected one of tensor, ",
    "[model]\nscale = ['row']": "line 2: model.scale is ['row'], expected one of ",
    "[data]\nfield = ''": "line 2: data.field is '', expected text",
    '{"model": {}}': "begins as JSON, expected TOML, or a run's training.json or config.json",
}


@pytest.mark.parametrize("content", BAD_CONFIGS)
def test_read_config_says_where_and_what_was_expected(content):
    assert BAD_CONFIGS[content] in refused(content)


def test_read_config_needs_a_file():
    with pytest.raises(FileNotFoundError):
        read_config("nothing.toml")
    with pytest.raises(ValueError, match=r"it has no training\.json"):
        read_config(".")


def test_check_settings_does_with_what_no_file_has():
    with pytest.raises(ValueError, match=r"^space: unknown key 'x'"):
        check_settings("space", {"model": {"x": 1}}, {})


def test_records_of_checks_settings_against_each_other():
    for content in ("[model]\nmodel_dim = 97", "num_heads = 5"):
        path = file_of(content)
        with pytest.raises(ValueError, match=r"^mine.toml: model_dim is \d+, expected a multiple"):
            records_of(read_config(path), path)


def setting_values(setting):
    meta = setting.metadata
    if "choices" in meta:
        found = st.sampled_from(meta["choices"])
    elif meta["kind"] is bool:
        found = st.booleans()
    elif meta["kind"] is int:
        found = st.integers(meta["low"], meta["high"])
    elif meta["kind"] is float:
        found = st.floats(meta["low"], meta["high"])
    else:
        found = st.text(st.characters(codec="utf-8"), min_size=1)
    return found | st.none() if setting.default is None else found


def settings_of(record, **fixed):
    some = {setting.name: setting_values(setting) for setting in dataclasses.fields(record)}
    return st.fixed_dictionaries(some | {name: st.just(value) for name, value in fixed.items()})


# Settings that go with few others.
SINGLE = {
    **{"num_kv_heads": 1, "head_dim": 6, "rope_fraction": 1.0, "scale_shards": 1},
    **{"rope_factor": 1.0, "rope_original_length": 0, "window_pattern": None},
}


@settings(max_examples=50, deadline=None)
@given(
    st.integers(1, 64).flatmap(
        lambda heads: settings_of(ModelConfig, num_heads=heads, model_dim=heads * 4, **SINGLE)
    ),
    settings_of(TrainingConfig),
    settings_of(DataConfig),
)
def test_write_config_is_read_back(model, training, data):
    written = ModelConfig(**model), TrainingConfig(**training), DataConfig(**data)
    write_config("mine.toml", *written)
    assert hyperparams_load_from_file("mine.toml") == written


def test_write_config_shows_every_setting_and_its_meaning():
    text = config_text(*DEFAULTS)
    tables = tomllib.loads(text)
    for table, record in TABLES.items():
        names = [setting.name for setting in dataclasses.fields(record)]
        shown = text.partition(f"\n[{table}]\n")[2].partition("\n[")[0]
        keys = [line.partition(" = ")[0] for line in shown.split("\n") if line[:2] != "# "]
        assert [key.removeprefix("#").removesuffix(" =") for key in keys if key] == names
        unset = {key.removeprefix("#").removesuffix(" =") for key in keys if key[:1] == "#"}
        assert set(tables[table]) == set(names) - unset
        assert unset <= {
            "vocab_size",
            "learning_rate",
            "warmup_steps",
            "vocabulary",
            "separator",
            "num_kv_heads",
            "head_dim",
            "ffn_dim",
            "window_pattern",
            "adapter_alpha",
        }
    assert "\n# updates of the weights (1 to 1099511627776)\nsteps = 1500\n" in text
    assert "\n# how the learning rate falls (cosine, linear, step, constant)\n" in text
    assert max(map(len, text.split("\n"))) <= 100


def test_write_config_leaves_open_what_follows_from_something_else():
    text = config_text(*DEFAULTS, unset=("threads",))
    assert "\n#threads = 1\n" in text
    path = file_of(text.replace('optimizer = "muon"', 'optimizer = "sgd"'))
    assert hyperparams_load_from_file(path)[1].learning_rate == DEFAULT_RATES["sgd"]


def test_write_config_refuses_what_utf8_cannot_spell():
    with pytest.raises(ValueError, match=r"^separator is '\\udcff', expected text"):
        write_config("mine.toml", *DEFAULTS[:2], DataConfig(separator="\udcff"))
    assert not Path("mine.toml").exists()


# --- The C original's files -----------------------------------------------------------------------

C_FILE = """# hyperparameters
learning_rate=0.010000
learning_rate_decay=0.95
min_learning_rate = 0.0001  # comment

model_dim=16
num_transformer_blocks=5
num_heads=2
ffn_dim_multiplier=3
num_epochs=10
batch_size=6
max_sequence_length=32
quantization_scheme=2
use_adam=1
weight_decay=0
"""


def test_hyperparams_load_from_file_reads_the_c_originals(capsys):
    path = file_of(C_FILE, "hyperparams.txt")
    assert hyperparams_load_from_file(path) == (
        ModelConfig(
            model_dim=16,
            num_blocks=5,
            num_heads=2,
            ffn_multiplier=3,
            sequence_length=32,
            scheme="2bit",
        ),
        TrainingConfig(
            batch_size=6,
            optimizer="adamw",
            learning_rate=0.01,
            final_learning_rate=0.01,
            weight_decay=0.0,
        ),
        DataConfig(),
    )
    output, errors = capsys.readouterr()
    assert output == ""
    assert errors == (
        "hyperparams.txt: skipped num_epochs and learning_rate_decay: no counterpart here\n"
    )


def test_read_config_passes_over_no_other_key_of_c(capsys):
    assert read_config(file_of("use_adam=0\nquantization_scheme=0")) == {
        "model": {"scheme": "ternary"},
        "training": {"optimizer": "sgd"},
    }
    assert read_config(file_of("quantization_scheme=1"))["model"] == {"scheme": "binary"}
    # Of what it is a share is the optimizer's default.
    told = read_config(file_of("min_learning_rate=0.05\nuse_adam=0"))
    assert told["training"]["final_learning_rate"] == 0.5
    assert capsys.readouterr() == ("", "")


BAD_C_FILES = {
    "model_dim=0": "mine.toml, line 1: model_dim is 0, expected 1 to 16384",
    "#\n\nnum_transformer_blocks=-1": "line 3: num_transformer_blocks is -1, expected 1 to 1024",
    "model_dim=1o": "line 1: model_dim is '1o', expected a whole number",
    "model_dim=16.0": "line 1: model_dim is '16.0', expected a whole number",
    "learning_rate=fast": "line 1: learning_rate is 'fast', expected a number",
    "learning_rate=": "line 1: learning_rate is '', expected a number",
    "learning_rate=nan": "line 1: learning_rate is nan, expected 1e-12 to ",
    "learning_rate=1e999": "line 1: learning_rate is inf, expected 1e-12 to ",
    "use_adam=yes": "line 1: use_adam is 'yes', expected 0 (sgd), 1 (adamw)",
    "quantization_scheme=3": "is '3', expected 0 (ternary), 1 (binary), 2 (2bit)",
    "use_adam=1\nuse_adam=1": "line 2: use_adam is there twice, first in line 1",
    "use_adam=1\nmodel_dim 5": "line 2 is 'model_dim 5', expected key=value",
    "model_dims=5": "line 1: unknown key 'model_dims', did you mean 'model_dim'?",
    "learning_rate=0.1\nmin_learning_rate=0.2": "line 2: min_learning_rate is 0.2, expected 0 to ",
}


@pytest.mark.parametrize("content", BAD_C_FILES)
def test_read_config_says_what_is_wrong_with_a_file_of_c(content):
    assert BAD_C_FILES[content] in refused(content)


def test_hyperparams_load_from_file_needs_one():
    """Departure 16: C goes on with the defaults."""
    with pytest.raises(FileNotFoundError):
        hyperparams_load_from_file("hyperparams.txt")


def test_hyperparams_save_to_file_writes_what_print_shows(capsys):
    assert hyperparams_init_defaults() == DEFAULTS
    hyperparams_save_to_file("mine.toml", *DEFAULTS)
    hyperparams_print(*DEFAULTS)
    assert capsys.readouterr().out == Path("mine.toml").read_text()
    assert hyperparams_load_from_file("mine.toml") == DEFAULTS


# --- train --config -------------------------------------------------------------------------------


def test_train_takes_settings_from_a_file_and_options_before_them(say):
    file_of(TINY)
    say("train", "--config", "mine.toml", "--stories", 20, "--steps", 2, "--out", "run")
    settings = Run(Path("run")).settings()
    model, training = settings.model, settings.training
    assert (model.model_dim, model.num_blocks, model.sequence_length) == (8, 1, 16)
    assert (training.steps, training.batch_size, training.threads) == (2, 2, 1)
    assert settings.source["stories"] == 20


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Runs of short trainings, by the kind of text."""
    from legacy1bit.main import main

    folder = tmp_path_factory.mktemp("runs")
    (folder / "tiny.toml").write_text(TINY)
    (folder / "text.txt").write_text(TEXT)
    (folder / "other.txt").write_text(TEXT.replace("cat", "cow"))
    bpe = ("--data", folder / "text.txt", "--tokenizer", "bpe", "--vocab-size", 270)
    runs = {
        "stories": ("--stories", 20, "--seed", 5),
        "text": ("--data", folder / "text.txt", "--schedule", "linear", "--document-mask"),
        "both": ("--data", folder / "text.txt", "--validation", folder / "other.txt"),
        "bpe": (*bpe, "--space-noise", 0.1),
        "taken": ("--data", folder / "other.txt", "--tokenizer-from", folder / "bpe"),
    }
    for name, options in runs.items():
        arguments = ("train", "--config", folder / "tiny.toml", *options, "--out", folder / name)
        assert main(list(map(str, arguments))) == 0
    return folder


@pytest.mark.parametrize("name", ["stories", "text", "both", "bpe", "taken"])
@pytest.mark.parametrize("file", ["", "config.json", "training.json"])
def test_train_repeats_a_run_to_the_bit(base, say, name, file):
    say("train", "--config", base / name / file, "--out", "again")
    assert_same_files(base / name, Path("again"))
    assert_same_files(base / name / "best", Path("again/best"))
    told, again = (read_metrics(folder / METRICS_FILE) for folder in (base / name, Path("again")))
    assert [record["train_loss"] for record in told] == [record["train_loss"] for record in again]


def test_train_makes_the_tokenizer_of_a_run_again_where_it_is_gone(base, say):
    shutil.copytree(base / "bpe", "bpe")
    Path("bpe/tokenizer.json").unlink()
    say("train", "--config", "bpe", "--out", "again")
    assert_same_files(base / "bpe", Path("again"))


def test_train_repeats_a_run_with_another_text_or_tokenizer(base, say):
    expected = Run(base / "bpe").settings()
    say("train", "--config", base / "bpe", "--data", base / "other.txt", "--out", "text")
    settings = Run(Path("text")).settings()
    assert (settings.training, settings.data) == (expected.training, expected.data)
    assert settings.source["path"] == str(base / "other.txt")
    assert settings.source["sha256"] != expected.source["sha256"]
    say("train", "--config", base / "bpe", "--vocab-size", 260, "--out", "tokens")
    settings = Run(Path("tokens")).settings()
    assert (settings.model.vocab_size, settings.data.vocabulary) == (260, 260)
    assert (settings.training, settings.source) == (expected.training, expected.source)
    taken = ("--tokenizer-from", base / "bpe", "--cache", "cache")
    say("train", "--config", base / "text", *taken, "--out", "taken")
    assert Run(Path("taken")).settings().model.vocab_size == expected.model.vocab_size
    say("train", "--config", base / "stories", "--stories", 30, "--out", "stories")
    assert Run(Path("stories")).settings().source["stories"] == 30


@pytest.mark.parametrize("other", [False, True])
def test_train_says_that_weights_are_new(base, say, other):
    more = ("--data", base / "other.txt") if other else ()
    for path in (base / "text", base / "text/training.json"):
        errors = say("train", "--config", path, *more, "--out", f"again{path.name}").err.decode()
        (line,) = [line for line in errors.splitlines() if line.startswith("new weights, ")]
        assert f"the settings of {base / 'text'};" in line
        assert line.endswith(f": --resume {base / 'text'}")
    assert b"new weights" not in say("train", "--config", base / "tiny.toml", "--out", "new").err


def test_train_takes_another_optimizer_with_its_own_rate(base, say):
    say("train", "--config", base / "stories", "--optimizer", "sgd", "--out", "again")
    assert Run(Path("again")).settings().training.learning_rate == DEFAULT_RATES["sgd"]


def test_train_refuses_a_text_that_has_changed_or_gone(base, fail):
    shutil.copytree(base / "text", "run")
    settings = json.loads(Path("run/training.json").read_text())
    settings["source"]["path"] = os.path.abspath("text.txt")
    Path("run/training.json").write_text(json.dumps(settings))
    assert "text.txt: No such file" in fail("train", "--config", "run", "--out", "again")
    file_of(TEXT.replace("cat", "cow"), "text.txt")
    assert "has changed, or is another text" in fail("train", "--config", "run", "--out", "again")
    assert not Path("again").exists()


DAMAGED = {
    "it has no 'source'": lambda settings: settings.pop("source"),
    "unknown setting 'stpes'": lambda settings: settings["training"].update(stpes=1),
    "steps is 0": lambda settings: settings["training"].update(steps=0),
    "has path 5": lambda settings: settings["source"].update(path=5),
}


@pytest.mark.parametrize("message", DAMAGED)
def test_train_refuses_a_run_that_is_damaged(base, fail, message):
    Path("run").mkdir()
    settings = json.loads((base / "text/training.json").read_text())
    DAMAGED[message](settings)
    Path("run/training.json").write_text(json.dumps(settings))
    assert message in fail("train", "--config", "run/training.json")
    Path("run/training.json").write_text("{")
    assert "is not a run's settings" in fail("train", "--config", "run")
    Path("run/training.json").rename("run/config.json")
    assert "run is not a training run" in fail("train", "--config", "run/config.json")


def test_train_refuses_settings_that_do_not_fit(base, fail):
    config = ("train", "--config", "mine.toml")
    file_of("[model]\nmodel_dim = 100\n")
    assert "mine.toml: model_dim is 100, expected a multiple" in fail(*config, "--heads", 3)
    file_of(TINY.replace("[model]", "[model]\nvocab_size = 300"))
    assert "vocab_size is 300, expected 256, the tokenizer's" in fail(*config, "--stories", 20)
    alone = ("--validation", base / "other.txt")
    assert "--validation goes with --data" in fail("train", "--config", base / "text", *alone)
    file_of("[training]\nstpes = 1\n")
    assert "mine.toml, line 2: unknown key 'stpes', did you mean 'steps'?" in fail(*config)
    assert not Path("runs").exists()


def test_train_goes_on_without_a_config(base, fail):
    resume = ("train", "--resume", base / "stories")
    assert "--config cannot change in a run" in fail(*resume, "--config", base / "text")
    assert "not with --resume" in fail(*resume, "--print-config")


def test_print_config_prints_all_settings(base, say):
    settings = Run(base / "bpe").settings()
    model, training, data = settings.model, settings.training, settings.data
    assert training.warmup_steps == 0
    # What follows from the steps is left to them.
    training = dataclasses.replace(training, warmup_steps=None)
    for options, expected in (
        ((), DEFAULTS),
        (("--steps", 5), (DEFAULTS[0], TrainingConfig(steps=5), DEFAULTS[2])),
        (("--config", base / "bpe"), (model, training, data)),
    ):
        output, errors = say("train", *options, "--print-config")
        assert errors == b""
        assert hyperparams_load_from_file(file_of(output)) == expected
    assert b"\n#threads = 1\n" in say("train", "--print-config").out
    assert b"\nthreads = 1\n" in say("train", "--config", base / "bpe", "--print-config").out
    assert not Path("runs").exists()


def test_print_config_makes_toml_of_a_file_of_c(say):
    output, errors = say("train", "--config", file_of(C_FILE, "c.txt"), "--print-config")
    assert b"skipped num_epochs" in errors
    assert hyperparams_load_from_file(file_of(output)) == hyperparams_load_from_file("c.txt")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
def test_read_toml_takes_files_with_any_mark(tmp_path, encoding):
    """Such as PowerShell writes where --print-config is sent to a file."""
    path = tmp_path / "settings.toml"
    text = "[training]\r\nsteps = 5 # \u00e9\r\nseed = 7\r\n"
    mark = "\ufeff" if encoding.endswith("be") else ""
    path.write_bytes((mark + text).encode(encoding))
    content, lines = read_toml(path)
    assert content == {"training": {"steps": 5, "seed": 7}}
    assert lines["training.seed"] == 3
    path.write_bytes(b"\xff\xfea\0\0\xd8")
    with pytest.raises(ValueError, match=r"settings\.toml: byte 0x00 at offset 4 is not utf-16"):
        read_toml(path)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"<!DOCTYPE html>\n<html>", "an HTML page"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
            "a Git LFS pointer",
        ),
        (b"GGUF\3\0\0\0" + bytes(16), "a GGUF model"),
    ],
)
def test_read_toml_says_what_a_file_is(tmp_path, content, what):
    path = tmp_path / "settings.toml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"settings.toml is {what}.*, expected a file of settings"):
        read_toml(path)
