"""GGUF files as containers: what is read, and each way in which one can be wrong."""

import re
import struct

import numpy as np
import pytest

from helpers.cases import together
from legacy1bit.formats.gguf_file import is_gguf, read_container, read_keys


def text(told):
    return struct.pack("<Q", len(told.encode())) + told.encode()


def key(name, kind, content):
    return text(name) + struct.pack("<I", kind) + content


def tensor(name, shape, kind, offset):
    head = text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return head + struct.pack("<IQ", kind, offset)


def whole(keys=(), tensors=(), data=b"", alignment=32):
    raw = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys)) + b"".join((*keys, *tensors))
    return raw.ljust(-(-len(raw) // alignment) * alignment, b"\0") + data


def read(folder, content):
    path = folder / "it.gguf"
    path.write_bytes(content)
    return read_container(path)


NUMBERS = {
    **{0: ("B", 255), 1: ("b", -1), 2: ("H", 1 << 15), 3: ("h", -3), 4: ("I", 1 << 31)},
    **{5: ("i", -5), 6: ("f", 0.5), 7: ("?", True), 10: ("Q", 1 << 63), 11: ("q", -7)},
    **{12: ("d", 0.1)},
}


def test_keys_of_every_type_are_read(tmp_path):
    keys = [key(f"n{kind}", kind, struct.pack(f"<{layout}", value))
            for kind, (layout, value) in NUMBERS.items()]  # fmt: skip
    keys += [key(f"l{kind}", 9, struct.pack(f"<IQ3{layout}", kind, 3, value, value, value))
             for kind, (layout, value) in NUMBERS.items()]  # fmt: skip
    keys += [key("t", 8, text("\u00e4b")), key("e", 8, text(""))]
    keys.append(key("ts", 9, struct.pack("<IQ", 8, 3) + text("a") + text("") + text("\u00e9")))
    found, tensors = read(tmp_path, whole(keys))
    assert tensors == {}
    for kind, (_, value) in NUMBERS.items():
        assert found[f"n{kind}"] == value
        assert type(found[f"n{kind}"]) is type(value)
        assert found[f"l{kind}"].tolist() == [value] * 3
    assert (found["t"], found["e"]) == ("\u00e4b", "")
    assert found["ts"].tolist() == ["a", "", "\u00e9"]
    assert len(found["ts"]) == 3
    assert read_keys(tmp_path / "it.gguf").keys() == found.keys()


@pytest.mark.parametrize("alignment", [8, 32, 256])
def test_tensors_are_read_where_they_lie(tmp_path, alignment):
    second = -(-12 // alignment) * alignment
    data = bytes(range(12)).ljust(second, b"\0") + bytes(range(20, 28))
    keys = [key("general.alignment", 4, struct.pack("<I", alignment))]
    # In the file, the second one comes first.
    entries = [tensor("b", (2,), 0, second), tensor("a", (3, 1), 0, 0)]
    _, found = read(tmp_path, whole(keys, entries, data, alignment))
    assert [*found] == ["b", "a"]
    assert (found["a"].shape, found["a"].kind.name) == ((1, 3), "F32")
    np.testing.assert_array_equal(found["a"].data, range(12))
    np.testing.assert_array_equal(found["b"].data, range(20, 28))


def test_four_axes_are_read(tmp_path):
    _, found = read(tmp_path, whole([], [tensor("a", (1, 2, 1, 3), 0, 0)], bytes(24)))
    assert found["a"].shape == (3, 1, 2, 1)


ENTRY = tensor("a", (2,), 0, 0)
WRONG = [
    (b"GGUX" + whole()[4:], "it starts with b'GGUX', expected b'GGUF'"),
    (b"", "it ends too early: it is empty"),
    (b"GGUF" + struct.pack("<IQQ", 3, 1 << 40, 0), f"it ends too early for {1 << 40} tensors"),
    (b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 40), f"too early for {1 << 40} metadata keys"),
    (whole([key("a", 8, text("x"))])[:40], "it ends too early"),
    (whole([struct.pack("<Q", 1 << 40)]).ljust(60), "for a text of length"),
    (whole([key("a", 13, bytes(8))]), "a key has the unknown type 13"),
    (whole([key("a", 9, struct.pack("<IQ", 9, 1))]), "a key has the unknown type 9"),
    (whole([key("a", 9, struct.pack("<IQ", 4, 1 << 40))]), "it ends too early"),
    (whole([key("a", 9, struct.pack("<IQ", 8, 1 << 40))]), "it ends too early"),
    (whole([key("a", 0, b"1"), key("a", 0, b"1")]), "its key a is there twice"),
    (whole([], [ENTRY, ENTRY], bytes(8)), "its tensor a is there twice"),
    (whole([], [tensor("a", (), 0, 0)]), "a has 0 dimensions, expected 1 to 4"),
    (whole([], [tensor("a", (1,) * 5, 0, 0)], bytes(32)), "a has 5 dimensions, expected 1 to 4"),
    (whole([], [tensor("a", (2, 0), 0, 0)]), "a has shape [0, 2], without a weight"),
    (whole([], [tensor("a", (2,), 200, 0)], bytes(8)), "a has type 200, which is unknown"),
    (whole([], [tensor("a", (2,), 38, 0)], bytes(8)), "a has type 38, which is TL1"),
    (whole([], [tensor("a", (2,), 0, 4)], bytes(12)), "a has offset 4, expected a multiple of"),
    (whole([], [tensor("a", (2,), 0, 32)], bytes(40)), "the tensors before it end at 0"),
    (whole([], [ENTRY], bytes(7)), "a has offset 0 and a size of 8 bytes, beyond the end of file"),
    (whole([], [ENTRY, tensor("b", (2,), 0, 0)], bytes(40)), "has offset 0, and by their sizes"),
    (whole([], [tensor("a", (33,), 8, 0)], bytes(99)), "a has shape [33], expected rows of whole"),
    (whole([], [tensor("a", (64,), 36, 0)], bytes(99)), "a has 64 weights, expected a multiple of"),
    *(
        (
            whole([key("general.alignment", kind, content)]),
            "its key general.alignment is ",
        )
        for kind, content in (
            (4, struct.pack("<I", 0)),
            (4, struct.pack("<I", 12)),
            (4, struct.pack("<I", (1 << 20) + 8)),
            (5, struct.pack("<i", -8)),
            (6, struct.pack("<f", 8.0)),
            (7, b"\1"),
            (8, text("8")),
        )
    ),
]


@together(("content", "told"), WRONG)
def test_what_is_wrong_in_a_file_is_told(tmp_path_factory, content, told):
    with pytest.raises(ValueError, match=re.escape(told)):
        read(tmp_path_factory.mktemp("model"), content)


def test_the_largest_alignment_is_read(tmp_path):
    keys = [key("general.alignment", 4, struct.pack("<I", 1 << 20))]
    _, found = read(tmp_path, whole(keys, [ENTRY], bytes(8), 1 << 20))
    assert found["a"].data.size == 8


def test_one_number_in_two_forms_is_told_by_the_places(tmp_path):
    """Blocks of 64 and of 128 weights have the type 42."""
    first, second = tensor("a", (128,), 42, 0), tensor("b", (128,), 42, 64)
    for size, block in ((36, 64), (34, 128)):
        _, found = read(tmp_path, whole([], [first, second], bytes(64 + size)))
        assert {one.kind.block for one in found.values()} == {block}
        assert found["b"].data.size == size


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [("a.gguf", b"x", True), ("a.bin", b"GGUF", True), ("a.bin", b"GGU", False), ("a", b"", False)],
)
def test_is_gguf_by_name_or_content(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    assert is_gguf(tmp_path / name) is expected
