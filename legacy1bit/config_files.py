"""Settings in files (C: ``hyperparams.c``, its files).

A file is TOML, with a table for each record of settings; or a run's own, which also has its text;
or one of the C original, with lines of ``key=value``. Each value is checked against the field's
range, and an error names the line.
"""

import contextlib
import difflib
import json
import re
import sys
import textwrap
import tomllib
from collections.abc import Collection, Iterable, Iterator
from dataclasses import Field, asdict, fields
from os import PathLike
from pathlib import Path
from typing import Any

from legacy1bit.data.sources import decode_text
from legacy1bit.formats.native import CONFIG_FILE
from legacy1bit.hyperparams import (
    DEFAULT_RATES,
    SETTINGS_FILE,
    DataConfig,
    ModelConfig,
    TrainingConfig,
    check_setting,
    default_warmup,
    renamed,
)
from legacy1bit.system.errors import SettingError, format_value
from legacy1bit.system.files import HEAD_BYTES, atomic_write, kind_of_file
from legacy1bit.training.run import Run

# The tables of a config file, and the record of each.
TABLES: dict[str, type[Any]] = {
    "model": ModelConfig,
    "training": TrainingConfig,
    "data": DataConfig,
}

Records = tuple[ModelConfig, TrainingConfig, DataConfig]

# A larger file is not one of settings.
_MOST_BYTES = 1 << 16
# Nor is one with longer keys: tomllib takes the square of a key's parts.
_MOST_DOTS = 256

# The keys of the C original: our table and setting, and the names of its numbers where they are
# names here. Its epochs have no counterpart, because the length of a run is in steps here; nor has
# the decay of its learning rate, which goes by epochs.
_C_KEYS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "learning_rate": ("training", "learning_rate", ()),
    "min_learning_rate": ("training", "final_learning_rate", ()),
    "model_dim": ("model", "model_dim", ()),
    "num_transformer_blocks": ("model", "num_blocks", ()),
    "num_heads": ("model", "num_heads", ()),
    "ffn_dim_multiplier": ("model", "ffn_multiplier", ()),
    "batch_size": ("training", "batch_size", ()),
    "max_sequence_length": ("model", "sequence_length", ()),
    "quantization_scheme": ("model", "scheme", ("ternary", "binary", "2bit")),
    "use_adam": ("training", "optimizer", ("sgd", "adamw")),
    "weight_decay": ("training", "weight_decay", ()),
}
_C_ALONE = ("num_epochs", "learning_rate_decay")


# --- TOML -----------------------------------------------------------------------------------------


def read_toml(path: str | PathLike[str]) -> tuple[dict[str, Any], dict[str, int]]:
    """Return the content of a TOML file, and the line of each of its keys.

    Parameters
    ----------
    path : path-like

    Returns
    -------
    content : dict
    lines : dict of str to int
        From 1, by dotted key, such as ``training.steps``, or by table. In an array of tables, the
        line of the first table that has the key.

    Raises
    ------
    ValueError
        If it is not TOML; the message names file and line.
    OSError
        If it cannot be read.
    """
    return _parse_toml(Path(path), _read_text(Path(path)))


def _read_text(path: Path) -> str:
    with open(path, "rb") as file:
        content = file.read(_MOST_BYTES + 1)
    if len(content) > _MOST_BYTES:
        raise ValueError(f"{path} is larger than {_MOST_BYTES} bytes, expected a file of settings")
    kind = kind_of_file(content[:HEAD_BYTES])
    if kind is not None:
        raise ValueError(f"{path} is {kind.name}, expected a file of settings")
    # Some editors write a byte order mark before UTF-8, and some shells UTF-16.
    content = decode_text(content, str(path))
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        byte = content[error.start]
        raise ValueError(
            f"{path}, line {line}: byte 0x{byte:02x} is not UTF-8, expected a file of settings"
        ) from None
    return text.replace("\r\n", "\n")


def _parse_toml(path: Path, text: str) -> tuple[dict[str, Any], dict[str, int]]:
    for number, each in enumerate(text.split("\n"), 1):
        if each.count(".") > _MOST_DOTS:
            raise ValueError(
                f"{path}, line {number} has more than {_MOST_DOTS} dots, expected a file of "
                "settings"
            )
    try:
        content = tomllib.loads(text)
    except RecursionError:
        raise ValueError(f"{path} is not TOML: its brackets are too deep") from None
    except ValueError as error:
        place = re.fullmatch(r"(.*) \(at (?:line (\d+), column \d+|end of document)\)", str(error))
        reason, line = place.groups() if place else (str(error), None)
        number = int(line) if line else text.rstrip().count("\n") + 1
        raise ValueError(f"{path}, line {number} is not TOML: {reason}") from None
    return content, dict(_lines_of(text))


_TOKEN = re.compile(
    r"""
    (?P<nothing> [ \t]+ | \#[^\n]* )
    | (?P<newline> \n )
    | (?P<text> \"{3} (?: [^\\] | \\. )*? \"{3,5} | '{3} .*? '{3,5}
              | \" (?: [^"\\] | \\. )* \" | ' [^']* ' )
    | (?P<mark> [][{}=,.] )
    | (?P<word> [^][{}=,."'\#\s]+ )
    """,
    re.VERBOSE | re.DOTALL,
)


def _lines_of(text: str) -> Iterator[tuple[str, int]]:
    """Yield the dotted keys of a valid TOML text and their lines, the last of equal keys first.

    A key stands before an equals sign, or between the brackets of a line of its own; the keys of an
    inline table continue the key before it.
    """
    keys: list[tuple[str, int]] = []
    table: list[str] = []
    key: list[str] = []
    # The open brackets around a value: the key before each brace, and None for each bracket.
    around: list[list[str] | None] = []
    line, in_value = 1, False
    for token in _TOKEN.finditer(text):
        part, kind = token[0], token.lastgroup
        if kind == "newline" and not around:
            key, in_value = [], False
        elif in_value and part in "[{":
            around.append(None if part == "[" else key)
            in_value = part == "["
            key = key if in_value else []
        elif around and part in "]}":
            before = around.pop()
            key, in_value = key if before is None else before, True
        elif part == "," and around and around[-1] is not None:
            key, in_value = [], False
        elif not in_value and kind in ("text", "word"):
            key = [*key, tomllib.loads(f"key = {part}")["key"] if kind == "text" else part]
        elif not in_value and part == "]" and key:
            table, key = key, []
            keys.append((".".join(table), line))
        elif not in_value and part == "=":
            outer = next((names for names in reversed(around) if names is not None), table)
            key, in_value = [*outer, *key], True
            keys.append((".".join(key), line))
        line += part.count("\n")
    return reversed(keys)


def unknown_key(
    path: str | PathLike[str], line: int | None, key: str, known: Iterable[str]
) -> ValueError:
    """Return the error for an unknown key: its place, and the nearest known key."""
    known = list(known)
    near = difflib.get_close_matches(key.lower().replace("-", "_"), known, 1)
    expected = f"did you mean {near[0]!r}?" if near else f"expected {', '.join(known)}"
    return ValueError(f"{_place(path, line)}: unknown key {key!r}, {expected}")


def _place(path: str | PathLike[str], line: int | None) -> str:
    return f"{path}" if line is None else f"{path}, line {line}"


# --- Config files ---------------------------------------------------------------------------------


def read_config(path: str | PathLike[str]) -> dict[str, Any]:
    """Return the settings of a file.

    Parameters
    ----------
    path : path-like
        TOML with the tables ``model``, ``training`` and ``data``; a run, its folder or one of its
        files of settings; or a file of the C original, which has lines of ``key=value``. Keys of
        the latter without a counterpart are skipped; a warning on standard error says so. Names of
        earlier versions are understood (``hyperparams.ALIASES``).

    Returns
    -------
    dict
        ``model``, ``training`` and ``data``: the settings of each record that the file has, each of
        them checked. Of a run also ``source``, where its text is, and ``run``, its folder.

    Raises
    ------
    ValueError
        If a key is unknown, or a value does not fit; the message names file, line and key, and the
        values that are expected.
    OSError
        If it cannot be read.

    Notes
    -----
    C: ``hyperparams.c``, ``hyperparams_load_from_file``.
    """
    path = Path(path)
    if path.is_dir():
        return _read_run(path)
    text = _read_text(path)
    if text.lstrip().startswith("{"):
        if path.name not in (SETTINGS_FILE, CONFIG_FILE):
            raise ValueError(
                f"{path} begins as JSON, expected TOML, or a run's {SETTINGS_FILE} or {CONFIG_FILE}"
            )
        return _read_run(path.parent)
    if _is_c_file(text):
        return _read_c_file(path, text)
    content, lines = _parse_toml(path, text)
    return check_settings(path, content, lines)


def check_settings(
    path: str | PathLike[str], content: dict[str, Any], lines: dict[str, int]
) -> dict[str, Any]:
    """Check the tables of settings of a TOML file, and return them under the names of today.

    Raises
    ------
    ValueError
        As ``read_config``.
    """
    checked: dict[str, Any] = {}
    for table, settings in content.items():
        line = lines.get(table)
        if table not in TABLES:
            raise _misplaced(path, line, table, TABLES)
        if not isinstance(settings, dict):
            came = format_value(settings)
            raise ValueError(f"{_place(path, line)}: {table} is {came}, expected a table")
        known = {setting.name: setting for setting in fields(TABLES[table])}
        values = checked[table] = {}
        for key, given in settings.items():
            line = lines.get(f"{table}.{key}")
            [(name, value)] = renamed({key: given}).items()
            if name not in known:
                raise _misplaced(path, line, name, known)
            if name in values:
                raise ValueError(f"{_place(path, line)}: {key} and {name} are the same setting")
            values[name] = _fitting(path, line, known[name], value, f"{table}.{key}")
    return checked


def _misplaced(
    path: str | PathLike[str], line: int | None, key: str, known: Iterable[str]
) -> ValueError:
    """Return the error for an unknown key, which may be one of another table."""
    known = list(known)
    if key.replace("-", "_") == "vocab_size" and "vocabulary" in known:
        # The option's name, too far from the setting's for difflib.
        place = _place(path, line)
        return ValueError(f"{place}: unknown key {key!r}, did you mean 'vocabulary'?")
    for table, record in TABLES.items():
        if any(setting.name == key for setting in fields(record)):
            return ValueError(f"{_place(path, line)}: {key} belongs below [{table}]")
    return unknown_key(path, line, key, known)


def _fitting(
    path: str | PathLike[str], line: int | None, setting: Field[Any], value: Any, name: str
) -> Any:
    """Return a checked value, as a float where the setting is one."""
    try:
        check_setting(setting, value, name)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{_place(path, line)}: {error}") from None
    return float(value) if setting.metadata["kind"] is float else value


def _read_run(folder: Path) -> dict[str, Any]:
    settings = Run(folder).settings()
    config = settings.training
    training = asdict(config)
    if config.learning_rate == DEFAULT_RATES[config.optimizer]:
        # Another optimizer on the command line has its own default.
        del training["learning_rate"]
    if config.warmup_steps == default_warmup(config.steps):
        # So has another number of steps.
        del training["warmup_steps"]
    return {
        "model": asdict(settings.model),
        "training": training,
        "data": asdict(settings.data),
        "source": settings.source,
        "run": folder,
    }


# --- The C original's files -----------------------------------------------------------------------


def _is_c_file(text: str) -> bool:
    """Whether a text begins with a key and a value outside of any table, and has no table."""
    lines = _stripped(text)
    first = next((line for line in lines if line), "")
    key = re.match(r"([\w-]+)\s*=", first)
    return key is not None and key[1] not in TABLES and not any(line[:1] == "[" for line in lines)


def _stripped(text: str) -> list[str]:
    return [line.partition("#")[0].strip() for line in text.split("\n")]


def _read_c_file(path: Path, text: str) -> dict[str, Any]:
    checked: dict[str, Any] = {"model": {}, "training": {}}
    values: dict[str, Any] = {}
    lines: dict[str, int] = {}
    for number, line in enumerate(_stripped(text), 1):
        if not line:
            continue
        place = _place(path, number)
        key, equals, value = (part.strip() for part in line.partition("="))
        if not equals:
            raise ValueError(f"{place} is {line!r}, expected key=value")
        if key in lines:
            raise ValueError(f"{place}: {key} is there twice, first in line {lines[key]}")
        lines[key] = number
        if key in _C_ALONE:
            continue
        if key not in _C_KEYS:
            raise _misplaced(path, number, key, (*_C_KEYS, *_C_ALONE))
        values[key] = _c_value(path, number, key, value)
    lowest = values.pop("min_learning_rate", None)
    for key, value in values.items():
        table, name, _ = _C_KEYS[key]
        checked[table][name] = value
    if lowest is not None:
        # Ours is a fraction of the peak.
        training = checked["training"]
        optimizer = training.get("optimizer", TrainingConfig().optimizer)
        peak = training.get("learning_rate", DEFAULT_RATES[optimizer])
        if lowest > peak:
            raise ValueError(
                f"{_place(path, lines['min_learning_rate'])}: min_learning_rate is {lowest}, "
                f"expected 0 to {peak}, the learning rate"
            )
        training["final_learning_rate"] = lowest / peak
    skipped = [key for key in _C_ALONE if key in lines]
    if skipped:
        print(
            f"{path}: skipped {' and '.join(skipped)}: no counterpart here",
            file=sys.stderr,
        )
    return checked


def _c_value(path: Path, line: int, key: str, text: str) -> Any:
    table, name, codes = _C_KEYS[key]
    if codes:
        known = {str(code): meaning for code, meaning in enumerate(codes)}
        if text not in known:
            expected = ", ".join(f"{code} ({meaning})" for code, meaning in known.items())
            raise ValueError(f"{_place(path, line)}: {key} is {text!r}, expected {expected}")
        return known[text]
    setting = next(setting for setting in fields(TABLES[table]) if setting.name == name)
    value: Any = text
    # A text that is not a number is refused by the check.
    with contextlib.suppress(ValueError):
        value = setting.metadata["kind"](text)
    return _fitting(path, line, setting, value, key)


# --- Records of settings --------------------------------------------------------------------------


def records_of(settings: dict[str, Any], path: str | PathLike[str] | None = None) -> Records:
    """Return records of settings; missing ones have their defaults.

    Parameters
    ----------
    settings : dict
        ``model``, ``training`` and ``data``, as ``read_config`` returns them.
    path : path-like, optional
        The file that they come from, for errors.

    Raises
    ------
    TypeError, ValueError
        If a value does not fit, alone or with another.
    """
    try:
        model, training, data = (
            record.from_dict(settings.get(table, {})) for table, record in TABLES.items()
        )
    except SettingError as error:
        error.place = None if path is None else str(path)
        raise
    except (TypeError, ValueError) as error:
        if path is None:
            raise
        raise ValueError(f"{path}: {error}") from None
    return model, training, data


def config_text(
    model: ModelConfig, training: TrainingConfig, data: DataConfig, unset: Collection[str] = ()
) -> str:
    """Return a config file of all settings, with their meanings.

    Parameters
    ----------
    model : ModelConfig
    training : TrainingConfig
    data : DataConfig
    unset : collection of str
        Settings that are commented out. Settings without a value always are, and so are defaults
        that depend on something else: the vocabulary's size on the tokenizer, the learning rate on
        the optimizer, sizes on other sizes.

    Raises
    ------
    ValueError
        If a text cannot be encoded in UTF-8.
    """
    lines = [
        "# Settings for train --config; command-line options take precedence. A line that begins",
        '# with "#" sets nothing. The text is not among them: --data names it.',
    ]
    defaults = {
        "vocab_size": ModelConfig().vocab_size,
        "learning_rate": DEFAULT_RATES[training.optimizer],
        **model.derived(),
    }
    for (table, kind), record in zip(TABLES.items(), (model, training, data), strict=True):
        lines += ["", f"[{table}]"]
        for setting in fields(kind):
            name, value = setting.name, getattr(record, setting.name)
            implied = value is None or name in unset or value == defaults.get(name)
            line = f"{name} = {_toml(name, value)}".rstrip()
            lines += ["", *_comment(setting), f"#{line}" if implied else line]
    return "\n".join(lines) + "\n"


def _comment(setting: Field[Any]) -> list[str]:
    meta = setting.metadata
    takes = ""
    if "choices" in meta:
        takes = f" ({', '.join(map(str, meta['choices']))})"
    elif "low" in meta:
        kind = "g" if meta["kind"] is float else "d"
        takes = f" ({meta['low']:{kind}} to {meta['high']:{kind}})"
    return textwrap.wrap(
        meta["meaning"] + takes, 100, initial_indent="# ", subsequent_indent="#   "
    )


def _toml(name: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if not isinstance(value, str):
        return repr(value)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name} is {value!r}, expected text that UTF-8 can encode") from None
    # The one difference between JSON's strings and TOML's basic ones: DEL.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def write_config(
    path: str | PathLike[str], model: ModelConfig, training: TrainingConfig, data: DataConfig
) -> None:
    """Write a config file of all settings, with their meanings; ``read_config`` reads it.

    Raises
    ------
    ValueError
        If a text cannot be encoded in UTF-8.
    OSError
        If it cannot be written; an earlier file is untouched.
    """
    atomic_write(path, config_text(model, training, data))


# --- Under the names of the C functions -----------------------------------------------------------


def hyperparams_init_defaults() -> Records:
    """Return the defaults of all settings (C: ``hyperparams.c``, the same)."""
    return ModelConfig(), TrainingConfig(), DataConfig()


def hyperparams_load_from_file(path: str | PathLike[str]) -> Records:
    """Return the settings of a file; missing ones have their defaults.

    C: ``hyperparams.c``, the same, which takes the defaults where there is no file (departure 16).

    Raises
    ------
    ValueError
        As ``read_config``, and if one value does not fit with another.
    OSError
        If the file cannot be read.
    """
    return records_of(read_config(path), path)


def hyperparams_save_to_file(
    path: str | PathLike[str], model: ModelConfig, training: TrainingConfig, data: DataConfig
) -> None:
    """Write all settings to a file (C: ``hyperparams.c``, the same); see ``write_config``."""
    write_config(path, model, training, data)


def hyperparams_print(model: ModelConfig, training: TrainingConfig, data: DataConfig) -> None:
    """Print all settings as a config file (C: ``hyperparams.c``, the same)."""
    print(config_text(model, training, data), end="")
