"""Arguments of Python functions as the options of a command."""

import contextlib
import json
from pathlib import Path

import pytest

from helpers.cases import together
from legacy1bit.api.arguments import arguments_of, check_names, naming_arguments
from legacy1bit.commands import evaluate, train
from legacy1bit.main import parser_of
from legacy1bit.system.errors import SettingError


def parsed(*words):
    """What the command line makes of these options."""
    arguments = vars(parser_of("train").parse_args(["train", *words]))
    arguments.pop("run")
    return arguments


ALIKE = [
    ({}, []),
    (
        {"steps": 3, "learning_rate": 1, "blocks": 2, "heads": 1},
        ["--steps=3", "--learning-rate=1", "--blocks=2", "--heads=1"],
    ),
    (
        {"tensorboard": True, "document_mask": False, "gated": True},
        ["--tensorboard", "--no-document-mask", "--gated"],
    ),
    (
        {"architecture": "llama", "optimizer": "sgd", "vocab_size": 300, "tokenizer": "bpe"},
        ["--architecture=llama", "--optimizer=sgd", "--vocab-size=300", "--tokenizer=bpe"],
    ),
    (
        {"data": Path("a"), "out": "b", "config": Path("c"), "validation": ["d", Path("e")]},
        ["--data", "a", "--out=b", "--config=c", "--validation", "d", "e"],
    ),
    ({"data": ["a", Path("b")]}, ["--data", "a", "b"]),
    ({"data": {"a": 1, Path("b"): 0.3}}, ["--data", "a:1", "--data", "b:0.3"]),
    ({"data": [("a", 1), (["b", "c"], 0.3)]}, ["--data", "a:1", "--data", "b", "c:.3"]),
    ({"steps": None, "data": None}, []),
    ({"separator": "-x", "minutes": 2}, ["--separator=-x", "--minutes=2"]),
]


@together(("settings", "words"), ALIKE)
def test_arguments_are_those_of_the_command_line(settings, words):
    ours, theirs = vars(arguments_of(train, settings)), parsed(*words)
    assert ours == theirs
    # 1 and 1.0 are equal, but not the same in a file of settings.
    assert {name: type(value) for name, value in ours.items()} == {
        name: type(value) for name, value in theirs.items()
    }


@together(
    ("settings", "kind", "message"),
    [
        ({"batchsize": 2}, TypeError, "unknown argument batchsize: the nearest is batch_size"),
        ({"batch-size": 2}, TypeError, "unknown argument batch-size: the nearest is batch_size"),
        ({"num_blocks": 2}, TypeError, "unknown argument num_blocks: the nearest is blocks"),
        ({"lr": 0.1}, TypeError, "unknown argument lr: the nearest is learning_rate"),
        ({"max_lr": 0.1}, TypeError, "unknown argument max_lr: the nearest is learning_rate"),
        ({"print_config": True}, TypeError, "unknown argument print_config: the nearest is config"),
        ({"steps": "3"}, TypeError, "steps is '3', expected a whole number"),
        ({"steps": 3.0}, TypeError, r"steps is 3\.0, expected a whole number"),
        ({"steps": True}, TypeError, "steps is True, expected a whole number"),
        ({"learning_rate": "1"}, TypeError, "learning_rate is '1', expected a number"),
        ({"minutes": True}, TypeError, "minutes is True, expected a number"),
        ({"gated": 1}, TypeError, "gated is 1, expected true or false"),
        ({"tensorboard": "yes"}, TypeError, "tensorboard is 'yes', expected true or false"),
        ({"optimizer": 3}, TypeError, "optimizer is 3, expected text"),
        ({"optimizer": "adam"}, ValueError, "optimizer is 'adam', expected one of muon, adamw"),
        ({"out": 3}, TypeError, "out is 3, expected a path"),
        ({"out": ""}, ValueError, "out is empty, expected a path"),
        ({"data": 3}, TypeError, "data is 3, expected a path, or several"),
        ({"data": [3]}, TypeError, r"data is \[3\], expected a path, or several"),
        ({"data": [("a", 1), "b"]}, TypeError, r"data is \[\('a', 1\), 'b'\], expected a path"),
        ({"data": [("a", 1, 2)]}, TypeError, r".* or pairs of a path and a weight"),
        ({"data": [([("a", 1), ("b", 1)], 1)]}, TypeError, r"data is \[\(\[.*, expected a path"),
        ({"data": [([("a", 1)], 1)]}, TypeError, r"data is .*, expected a path, or several"),
        ({"data": {"a": "x"}}, ValueError, "the weight of a text is 'x', expected a number above"),
        ({"data": []}, ValueError, "data names no path, expected one or more"),
        ({"data": [([], 1.0)]}, ValueError, "data names no path, expected one or more"),
        ({"data": {"a": 0}}, ValueError, "the weight of a text is 0, expected a number above"),
    ],
)
def test_what_does_not_fit_is_refused(settings, kind, message):
    with pytest.raises(kind, match=f"^{message}"):
        arguments_of(train, settings, ["print_config"])


def test_a_name_like_a_word_of_python_has_a_dash_behind_it():
    class Command:
        @staticmethod
        def add_arguments(command):
            command.add_argument("--from", dest="source")

    assert arguments_of(Command, {"from_": "a"}).source == "a"
    with pytest.raises(TypeError, match=r"the nearest is from_$"):
        arguments_of(Command, {"form": "a"})


def test_evaluate_has_arguments_too():
    assert arguments_of(evaluate, {"field": "body"}, ["model"]).field == "body"
    with pytest.raises(TypeError, match="unknown argument model"):
        arguments_of(evaluate, {"model": "a"}, ["model"])


def test_known_names_are_no_error():
    check_names([], ["a"])
    check_names(["a_b"], ["a_b"])


@together(
    ("raised", "message"),
    [
        (ValueError("--minutes and --steps exclude each other"), "minutes and steps exclude each"),
        (ValueError("a--b is --batch-size, -- and ---x"), "a--b is batch_size, -- and ---x"),
        (MemoryError("lower --batch-size"), "lower batch_size"),
        (SettingError("num_blocks is 0", "num_blocks"), "blocks is 0"),
        (SettingError("vocab_size is 0", "vocab_size"), "vocab_size is 0"),
        (ValueError(3, "--steps"), "(3, '--steps')"),
        (ValueError(), ""),
    ],
)
def test_errors_name_arguments(raised, message):
    with pytest.raises(type(raised)) as told, naming_arguments(arguments_of(train, {"blocks": 0})):
        raise raised
    assert told.value is raised
    assert str(raised).startswith(message)


def test_errors_of_a_file_name_the_file():
    raised = SettingError("num_blocks is 0", "num_blocks")
    raised.place = "a.toml"
    with contextlib.suppress(ValueError), naming_arguments(arguments_of(train, {"config": "a"})):
        raise raised
    assert str(raised) == "a.toml: num_blocks is 0"


def test_other_errors_stay():
    raised = ValueError("--steps")
    with contextlib.suppress(ValueError), naming_arguments(kinds=(json.JSONDecodeError,)):
        raise raised
    assert str(raised) == "--steps"
