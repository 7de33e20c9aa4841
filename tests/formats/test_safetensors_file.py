"""Safetensors files as containers: what is read, and each way in which one can be wrong."""

import json
import re
import struct

import pytest

from helpers.cases import together
from legacy1bit.formats.safetensors_file import read_tensors

DATA = bytes(range(24))


def entry(dtype="F32", shape=(2, 1), ends=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(ends)}


def write(folder, header, data=DATA, name="model.safetensors"):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / name).write_bytes(struct.pack("<Q", len(text)) + text + data)


def test_tensors_are_read_in_any_order(tmp_path):
    header = {"b": entry("U8", (3,), (12, 15)), "a": entry(), "c": entry("BF16", (2,), (8, 12))}
    write(tmp_path, {**header, "__metadata__": {"format": "pt"}}, DATA[:15])
    found = read_tensors(tmp_path)
    assert list(found) == ["b", "a", "c"]
    assert (found["a"].dtype, found["a"].shape) == ("F32", (2, 1))
    assert {name: tensor.data.tobytes() for name, tensor in found.items()} == {
        "b": DATA[12:15],
        "a": DATA[:8],
        "c": DATA[8:12],
    }


WRONG = [
    (b"{", "model.safetensors has a damaged header"),
    (b"[" * 50_000, "model.safetensors has a damaged header"),
    (b'{"a": 1, "a": 1}', "a key is there twice"),
    (b"[1]", "model.safetensors has a header that is not a JSON object"),
    ({"a": 1}, "a has not data_offsets, dtype, shape in the header"),
    ({"a": {**entry(), "more": 1}}, "a has not data_offsets, dtype, shape in the header"),
    ({"a": entry("F31")}, "a has the unknown dtype 'F31'"),
    ({"a": entry(3)}, "a has the unknown dtype '3'"),
    ({"a": entry(["F32"])}, "a has the unknown dtype"),
    ({"a": {**entry(), "shape": "x"}}, "a has a shape that is not a list of positive numbers"),
    ({"a": entry(shape=[2, True])}, "a has a shape that is not a list of positive numbers"),
    ({"a": entry(shape=[2, -1])}, "a has a shape that is not a list of positive numbers"),
    ({"a": entry(shape=[2, 1 << 63])}, "a has a shape that is not a list of positive numbers"),
    ({"a": entry(shape=[0], ends=[0, 0])}, "a has a shape that is not a list of positive numbers"),
    ({"a": entry(shape=[2, *[1] * 8])}, "a has a shape that is not a list of positive numbers"),
    ({"a": entry(ends=[0])}, "a has offsets that are not a begin and an end"),
    ({"a": entry(ends=[0, 4, 8])}, "a has offsets that are not a begin and an end"),
    ({"a": entry(ends=[8, 0])}, "a has offsets that are not a begin and an end"),
    ({"a": entry(ends=[0, 0.5])}, "a has offsets that are not a begin and an end"),
    ({"a": entry(ends=[17, 25])}, "a ends at offset 25, and the file's data has a size of 24"),
    ({"a": entry(ends=[0, 9])}, "a has shape [2, 1] of F32 in 9 bytes"),
    ({"a": entry("F16")}, "a has shape [2, 1] of F16 in 8 bytes"),
    ({"a": entry(), "b": entry(ends=[7, 15])}, "b has offset 7, and overlaps a"),
    (
        {"a": entry(), "b": entry(ends=[16, 24])},
        "b has offset 16, and the tensors before it end at",
    ),
    ({"a": entry(), "b": entry(ends=[8, 16])}, "has 8 bytes after its last tensor"),
]


@together(("header", "told"), WRONG)
def test_what_is_wrong_in_a_header_is_told(tmp_path_factory, header, told):
    folder = tmp_path_factory.mktemp("model")
    write(folder, header)
    with pytest.raises(ValueError, match=re.escape(told)):
        read_tensors(folder)


def test_what_may_be_is_read(tmp_path):
    write(tmp_path, {"a": entry(shape=[2, *[1] * 7]), "b": entry(ends=[8, 16])}, DATA[:16])
    assert read_tensors(tmp_path)["a"].shape == (2, 1, 1, 1, 1, 1, 1, 1)
    write(tmp_path, {}, b"")
    assert read_tensors(tmp_path) == {}


@pytest.mark.parametrize("size", range(9))
def test_short_files_are_refused(tmp_path, size):
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", 1)[:size])
    told = "too few for a header" if size < 8 else "its header has 1 bytes"
    with pytest.raises(ValueError, match=told):
        read_tensors(tmp_path)


def write_index(folder, places):
    (folder / "model.safetensors.index.json").write_text(json.dumps(places))


def test_files_of_an_index_are_read(tmp_path):
    write(tmp_path, {"a": entry(), "b": entry(ends=[8, 16])}, DATA[:16], "1.safetensors")
    write(tmp_path, {"c": entry()}, DATA[:8], name="2.safetensors")
    two = "2.safetensors"
    write_index(tmp_path, {"weight_map": {**dict.fromkeys("ab", "1.safetensors"), "c": two}})
    assert [*read_tensors(tmp_path)] == ["a", "b", "c"]


@together(
    ("index", "told"),
    [
        ([], "has no weight_map"),
        ({}, "has no weight_map"),
        ({"weight_map": {}}, "has no weight_map"),
        ({"weight_map": ["a"]}, "has no weight_map"),
        ({"weight_map": {"a": 1}}, "names '1', expected a file in the same folder"),
        ({"weight_map": {"a": "../1.safetensors"}}, "expected a file in the same folder"),
        ({"weight_map": {"a": "b\\1.safetensors"}}, "expected a file in the same folder"),
        ({"weight_map": {"a": "1.bin"}}, "expected a file in the same folder"),
        ({"weight_map": {"a": "3.safetensors"}}, "names 3.safetensors, which is missing"),
        ({"weight_map": {"b": "1.safetensors"}}, "1.safetensors has a, which"),
        (
            {"weight_map": {"a": "1.safetensors", "b": "1.safetensors"}},
            "places b in a file where it is missing",
        ),
    ],
)
def test_what_is_wrong_in_an_index_is_told(tmp_path_factory, index, told):
    folder = tmp_path_factory.mktemp("model")
    write(folder, {"a": entry()}, DATA[:8], "1.safetensors")
    write_index(folder, index)
    with pytest.raises(ValueError, match=re.escape(told)):
        read_tensors(folder)


def test_other_files_are_no_weights(tmp_path):
    with pytest.raises(ValueError, match=r"it has neither model\.safetensors nor"):
        read_tensors(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is a pickle, which is not read"):
        read_tensors(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        read_tensors(tmp_path)
