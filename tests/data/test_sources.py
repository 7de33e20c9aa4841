"""Text as a stream: every kind of file gives what it holds, and says what is wrong with it."""

import bz2
import codecs
import copy
import dataclasses
import gzip
import hashlib
import io
import json
import lzma
import os
import pickle
import re
import subprocess
import sys
import threading
import tracemalloc
import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from legacy1bit.data import sources
from legacy1bit.data.sources import (
    Piece,
    decode_text,
    is_token_file,
    open_source,
    read_token_file,
    token_file_info,
)

try:
    import zstandard
except ImportError:
    zstandard = None
try:
    import pyarrow
    import pyarrow.parquet
except ImportError:
    pyarrow = None

needs_zstd = pytest.mark.skipif(zstandard is None, reason="zstandard is not installed")
needs_arrow = pytest.mark.skipif(pyarrow is None, reason="pyarrow is not installed")

quick = settings(max_examples=40, deadline=None, database=None)

# Words of ASCII and others, all spaces that a cut has to beware of, a separator and halves of it.
SPACES = [" ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u3000"]
WORDS = ["a", "word", "'s", "7", ".", "\0", "\u00df", "\u65e5\u672c", "\U0001f600", "\ufeffx"]
texts = st.lists(
    st.sampled_from([*SPACES, *WORDS, "<|", "|>", "<|end|>"]),
    max_size=60,
).map("".join)
sizes = st.integers(1, 24)


@pytest.fixture
def small(monkeypatch):
    """Make blocks and pieces of some bytes, so that little text meets every border."""

    def shrink(block, piece=8, most=32, window=4, checked=4):
        monkeypatch.setattr(sources, "BLOCK_BYTES", block)
        monkeypatch.setattr(sources, "PIECE_BYTES", piece)
        monkeypatch.setattr(sources, "MOST_PIECE_BYTES", most)
        monkeypatch.setattr(sources, "WINDOW_BYTES", window)
        monkeypatch.setattr(sources, "CHECKED_BYTES", checked)

    return shrink


@pytest.fixture
def write(tmp_path):
    """Write a file, making the folders it lies in; return its path."""

    def put(name, content):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return put


def documents(pieces):
    """Return the documents that pieces make."""
    found = []
    for piece in pieces:
        assert isinstance(piece, Piece)
        piece.text.decode()  # whole characters
        if piece.begins:
            found.append(piece.text)
        else:
            assert piece.text
            found[-1] += piece.text
    return found


def read(path, **options):
    return documents(open_source(str(path), **options).pieces())


def fails(path, message, **options):
    """Expect reading to fail with a message, which begins with the path where it has a {}."""
    message = message.replace("{}", str(path))
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        list(open_source(str(path), **options).pieces())


def rows(texts, field="text"):
    return "".join(json.dumps({"id": i, field: text}) + "\n" for i, text in enumerate(texts))


def zstd(content):
    return zstandard.ZstdCompressor().compress(content)


PACKED = [
    (".gz", gzip.compress),
    pytest.param(".zst", zstd, marks=needs_zstd),
    (".xz", lzma.compress),
    (".bz2", bz2.compress),
]
KINDS = ["gzip", "zstd", "xz", "bzip2"]
only_compressed = pytest.mark.parametrize(("suffix", "compress"), PACKED, ids=KINDS)
compressed = pytest.mark.parametrize(
    ("suffix", "compress"), [("", bytes), *PACKED], ids=["plain", *KINDS]
)


# --- Pieces ---------------------------------------------------------------------------------------


def is_legal(text, place):
    """Return whether a text may be cut there: before a space, behind a printable character."""
    return text[place] in b" \n" and 0x21 <= text[place - 1] <= 0x7E


@quick
@given(text=texts, block=sizes, piece=sizes, window=st.integers(1, 9))
def test_pieces_of_a_file_are_its_text_cut_in_legal_places(
    tmp_path_factory, text, block, piece, window
):
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_bytes(b"x" + text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "BLOCK_BYTES", block)
        patch.setattr(sources, "PIECE_BYTES", piece)
        patch.setattr(sources, "MOST_PIECE_BYTES", 32)
        patch.setattr(sources, "WINDOW_BYTES", window)
        patch.setattr(sources, "CHECKED_BYTES", 4)
        found = [(part.text, part.begins) for part in open_source(str(path)).pieces()]
    whole = b"".join(part for part, _ in found)
    assert whole == path.read_bytes()
    assert [begins for _, begins in found] == [True] + [False] * (len(found) - 1)
    start = 0
    for part, _ in found:
        part.decode()
        places = [i for i in range(start + 1, len(whole)) if is_legal(whole, i)]
        end = start + len(part)
        if end < len(whole) and not is_legal(whole, end):
            assert 28 < len(part) <= 32
            assert not any(start < place <= start + 32 for place in places)
        elif len(part) > piece:
            # It grew because there was no place before.
            assert not any(start < place <= start + piece for place in places)
            assert len(part) <= 32
        elif end < len(whole):
            assert end == max(place for place in places if place <= start + piece)
        start = end


def test_cuts_part_no_words_of_gpt_2(small, write):
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    split = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)

    def words(text):
        return [word for word, _ in split.pre_tokenize_str(text)]

    text = (
        "It's  1 line,\n\n  and\u00a0 a\u3000 \r\n 2nd   one: \u00fcber \u65e5\u672c. \n x  y " * 20
    )
    small(16, piece=8, most=1000)
    pieces = list(open_source(str(write("a.txt", text))).pieces())
    assert len(pieces) > 100
    parts = [word for piece in pieces for word in words(piece.text.decode())]
    assert parts == words(text)


@quick
@given(
    text=texts,
    block=sizes,
    separator=st.sampled_from(
        ["<|end|>", "\n", "\n\n", "\r\n", r"\r\n\r\n", "aa", "\u65e5", "\r", "a\n"]
    ),
)
def test_separators_part_documents_wherever_blocks_end(tmp_path_factory, text, block, separator):
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_bytes(b"x" + text.encode() + b"aaa\n\n\nx")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "BLOCK_BYTES", block)
        patch.setattr(sources, "PIECE_BYTES", 8)
        found = read(path, separator=separator)
    breaks = separator.replace(r"\r\n", "\r\n").replace("\r\n", "\n").split("\n")
    pattern = "\r?\n".join(map(re.escape, breaks)).encode()
    expected = re.split(pattern, path.read_bytes())
    assert found == [document for document in expected if document]


@compressed
@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.text", "a.log", "a", "a.jsonl", "a.NDJSON"])
def test_every_kind_of_file_is_read(small, write, name, suffix, compress):
    told = ["One \u00df two.\nThree", "", "four " * 9]
    lines = name.lower().endswith(("jsonl", "ndjson"))
    path = write(name + suffix, compress((rows(told) if lines else told[2]).encode()))
    expected = [text.encode() for text in (told if lines else told[2:])]
    assert read(path) == expected
    small(5)
    assert read(path) == expected


@compressed
def test_compression_is_known_by_its_first_bytes(write, suffix, compress):
    for name in ("a", "a.txt", "a.jsonl"):
        content = rows(["a text"]) if name == "a.jsonl" else "a text"
        assert read(write(name, compress(content.encode()))) == [b"a text"]


@compressed
def test_compressed_parts_follow_each_other(write, suffix, compress):
    content = compress(b"one ") + compress(b"") + compress(b"two")
    assert read(write("a.txt" + suffix, content)) == [b"one two"]


def test_pieces_can_be_read_again_and_left_early(small, write):
    source = open_source(str(write("a.txt", "some words to read" * 9)))
    small(8)
    next(source.pieces())
    assert documents(source.pieces()) == documents(source.pieces())


def test_an_empty_file_among_others_is_an_empty_document(write, tmp_path):
    write("a.txt", "")
    write("b.txt", codecs.BOM_UTF8)
    write("c.txt", "c")
    assert read(tmp_path) == [b"", b"", b"c"]
    assert read(tmp_path, separator="|") == [b"c"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", ""),
        ("a.txt", codecs.BOM_UTF8),
        ("a.txt", "||"),
        ("a.txt.gz", gzip.compress(b"")),
        ("a.jsonl", ""),
        ("a.jsonl", "\n"),
        ("a.jsonl", rows([""])),
    ],
    ids=range(7),
)
def test_no_text_at_all_is_refused(write, name, content):
    fails(write(name, content), f"{name} holds no text", separator="|")


# --- Finding files --------------------------------------------------------------------------------


@pytest.fixture
def folder(write, tmp_path):
    for name in ["b.txt", "a/2.md", "a/1.TXT", "a-b/x.jsonl", "a/c/d.text", "n.ndjson"]:
        write(f"data/{name}", name)
    for name in [".hidden.txt", ".git/a.txt", "a.json", "b.log", "c.gz", "model.bin", "txt"]:
        write(f"data/{name}", name)
    for name in ["z.txt.gz", "z.jsonl.zst", "z.parquet", "z.txt.xz", "z.MD.BZ2"]:
        write(f"data/z/{name}", name)
    return tmp_path / "data"


@needs_zstd
@needs_arrow
def test_folder_gives_all_known_files_sorted(folder):
    source = open_source(str(folder))
    names = ["a/1.TXT", "a/2.md", "a/c/d.text", "a-b/x.jsonl", "b.txt", "n.ndjson"]
    names += ["z/z.MD.BZ2", "z/z.jsonl.zst", "z/z.parquet", "z/z.txt.gz", "z/z.txt.xz"]
    assert source.files == tuple(folder / name for name in names)
    assert source.name == f"{folder} (11 files)"
    assert source.nbytes == sum((folder / name).stat().st_size for name in names)


def test_pattern_gives_all_files_that_match(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert open_source("**/*.t*xt").files == (folder / "a/c/d.text", folder / "b.txt")
    source = open_source("[ab]*")
    assert source.files == (folder / "a.json", folder / "b.log", folder / "b.txt")
    assert source.name == "[ab]* (3 files)"
    assert open_source("?.log").name == "b.log"
    assert documents(open_source("a/*").pieces()) == [b"a/1.TXT", b"a/2.md"]


def test_what_is_there_goes_before_a_pattern(write, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    write("[a].txt", "this")
    write("a.txt", "that")
    assert documents(open_source("[a].txt").pieces()) == [b"this"]


def test_open_source_takes_several_paths_in_their_order(folder, write, monkeypatch):
    monkeypatch.chdir(folder.parent)
    write("z.txt", "z")
    source = open_source(["z.txt", "data/b.txt"])
    assert source.files == (folder.parent / "z.txt", folder / "b.txt")
    assert (source.name, source.has_documents) == ("z.txt + b.txt", True)
    assert documents(source.pieces()) == [b"z", b"b.txt"]
    again = open_source(["data/b.txt", "data/a", "data/?.txt", "data/b.txt"])
    names = ("b.txt", "a/1.TXT", "a/2.md", "a/c/d.text")
    assert again.files == tuple(folder / name for name in names)
    assert again.name == "b.txt + data/a (3 files) + b.txt + ... (4 files)"
    assert open_source(("z.txt",)) == open_source("z.txt")
    assert source.fingerprint() != open_source(["data/b.txt", "z.txt"]).fingerprint()


def test_open_source_refuses_what_goes_alone_among_several(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("a.txt", "a")
    os.mkfifo("pipe")
    for path in ("-", "pipe", os.devnull):
        with pytest.raises(ValueError, match=f"^{path} is a stream, expected files where there"):
            open_source(["a.txt", path])
    with pytest.raises(ValueError, match=r"^a\.bin holds tokens, expected texts only"):
        open_source(["a.txt", "a.bin"])
    with pytest.raises(FileNotFoundError) as error:
        open_source(["a.txt", "nowhere.txt"])
    assert error.value.filename == "nowhere.txt"
    with pytest.raises(ValueError, match="data names no path, expected one or more"):
        open_source([])


def test_links_keep_their_names_and_may_lead_in_circles(write, tmp_path):
    blob = write("blobs/0123", rows(["a", "b"]))
    (tmp_path / "data" / "more").mkdir(parents=True)
    (tmp_path / "data" / "a.jsonl").symlink_to(blob)
    (tmp_path / "data" / "more" / "circle").symlink_to(tmp_path / "data")
    assert open_source(str(tmp_path / "data")).files == (tmp_path / "data" / "a.jsonl",)
    assert read(tmp_path / "data") == [b"a", b"b"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("missing.txt", "No such file"),
        ("data/b.txt/c", "Not a directory"),
        ("data/*.html", "No file matches"),
        ("", "No such file"),
        ("empty", r"No file with text in it \(\.txt, \.md"),
    ],
)
def test_nothing_there_is_an_error(folder, monkeypatch, data, message):
    monkeypatch.chdir(folder.parent)
    (folder.parent / "empty").mkdir()
    with pytest.raises((FileNotFoundError, NotADirectoryError), match=message) as error:
        open_source(data)
    assert error.value.filename == data


def test_a_file_that_has_gone_is_an_error(write):
    path = write("a.txt", "text")
    source = open_source(str(path))
    path.unlink()
    with pytest.raises(FileNotFoundError):
        next(source.pieces())
    with pytest.raises(FileNotFoundError):
        source.fingerprint()


def test_fingerprint_changes_with_files_and_options(write, tmp_path):
    path = write("a.txt", "text")
    write("b.txt", "text")

    def fingerprint(data=path, **options):
        return open_source(str(data), **options).fingerprint()

    first = fingerprint()
    assert re.fullmatch("[0-9a-f]{64}", first)
    assert fingerprint() == first == fingerprint(encoding="UTF8")
    others = {
        fingerprint(tmp_path),
        fingerprint(tmp_path / "b.txt"),
        fingerprint(encoding="latin-1"),
        fingerprint(separator="\n"),
    }
    os.utime(path, ns=(0, 1))
    others.add(fingerprint())
    path.write_text("texts")
    os.utime(path, ns=(0, 1))
    others.add(fingerprint())
    assert len(others - {first}) == 6
    lines = write("a.jsonl", '{"text": "a", "content": "b"}')
    assert fingerprint(lines) != fingerprint(lines, field="content")


def put_in_place(path, content, how):
    """Give a file other content, but leave the size and the time that it is known by."""
    before = path.stat()
    assert len(content) == before.st_size
    new = path.with_name("new") if how == "replaced" else path
    new.write_bytes(content)
    os.utime(new, ns=(before.st_atime_ns, before.st_mtime_ns))
    # The clock of older kernels stands still for some milliseconds.
    while new.stat().st_ctime_ns == before.st_ctime_ns:
        os.utime(new, ns=(before.st_atime_ns, before.st_mtime_ns))
    os.replace(new, path)
    assert path.stat().st_mtime_ns == before.st_mtime_ns


@pytest.mark.parametrize("how", ["replaced", "written over"])
def test_fingerprint_changes_where_size_and_time_do_not(write, how):
    path = write("a.txt", "one text")
    source = open_source(str(path))
    first = source.fingerprint()
    assert source.fingerprint() == first
    put_in_place(path, b"two text", how)
    assert source.fingerprint() != first


def test_a_field_goes_with_what_has_fields(write, tmp_path):
    write("a.txt", "text")
    with pytest.raises(ValueError, match=r"a.txt has no fields, and no 'content': expected JSON"):
        open_source(str(tmp_path / "a.txt"), field="content")
    write("b.jsonl.gz", gzip.compress(b'{"content": "b"}'))
    assert len(open_source(str(tmp_path), field="content").files) == 2


def test_runs_are_no_text(write, tmp_path):
    """They may lie below the folder that they learn from."""
    for name in ("a.txt", "mine/metrics.jsonl", "mine/notes.txt", "new/metrics.jsonl",
                 "new/samples.jsonl", "run/metrics.jsonl", "run/training.json",
                 "run/best/c.txt"):  # fmt: skip
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text("text")
    found = [str(path.relative_to(tmp_path)) for path in open_source(str(tmp_path)).files]
    assert found == ["a.txt", "mine/metrics.jsonl", "mine/notes.txt"]


def test_a_separator_may_be_written_in_letters(write):
    path = str(write("a.txt", "one\n\ntwo\n\nthree"))
    assert open_source(path, separator=r"\n\n") == open_source(path, separator="\n\n")
    assert [piece.text for piece in open_source(path, separator=r"\n\n").pieces()] == [
        b"one",
        b"two",
        b"three",
    ]


@pytest.mark.parametrize("separator", [r"\n\n", r"\r\n\r\n", "\r\n\r\n"])
@pytest.mark.parametrize("line_break", ["\n", "\r\n"])
def test_a_separator_is_the_same_for_line_breaks_of_windows(write, separator, line_break):
    told = [f"line {i}{line_break}more" for i in range(400)]
    path = write("a.txt", (2 * line_break).join(told))
    assert read(path, separator=separator) == [text.encode() for text in told]
    assert read(path, separator="\r") == (
        [path.read_bytes()] if line_break == "\n" else path.read_bytes().split(b"\r")
    )


def test_warning_tells_of_a_separator_that_separates_nothing(write, tmp_path):
    path = write("a.txt", "a text")
    write("b.jsonl", rows(["one"]))

    def warnings(count, data=path, separator=r"\n\n"):
        return open_source(str(data), separator=separator).warnings(count)

    (warning,) = warnings(1)
    assert warning == r"warning: the separator '\n\n' separates nothing in a.txt: 1 document"
    assert warnings(2) == warnings(1, separator=None) == warnings(3, tmp_path) == ()
    assert warnings(2, tmp_path)[0].endswith("(2 files): 2 documents")
    assert warnings(1, "-")[0].endswith("in standard input: 1 document")
    assert warnings(9, tmp_path / "b.jsonl") == (
        "warning: the separator is for plain text, and b.jsonl has none",
    )


@pytest.mark.parametrize(
    ("name", "content", "warned"),
    [
        ("a.json", json.dumps({"text": "one"}, indent=2), True),
        ("a.json", "[1, 2, 3]", True),
        ("a.json.gz", gzip.compress(b"[0.5]", mtime=0), True),
        ("a.json", '{"text": "one"}\n{"text": "two"}\n', False),
        ("a.json", "a text", False),
        ("a.txt", "[1, 2, 3]", False),
        ("a", "[1, 2, 3]", False),
    ],
)
def test_warning_tells_of_json_that_is_read_as_text(write, name, content, warned):
    warnings = open_source(str(write(name, content))).warnings(1)
    assert len(warnings) == warned
    assert all(
        line.startswith(f"warning: {name} is JSON without an object on each line: ")
        for line in warnings
    )


def test_source_is_a_value(write):
    path = str(write("a.txt", "text"))
    assert open_source(path) == open_source(path)
    assert "_stream" not in repr(open_source(path))
    with pytest.raises(dataclasses.FrozenInstanceError):
        open_source(path).field = "other"


@pytest.mark.parametrize("encoding", ["utf-9", "zlib", "rot13", "undefined", "a\0b", ""])
def test_unknown_encodings_are_refused(write, encoding):
    with pytest.raises(
        ValueError, match=f"encoding is {encoding!r}, which is unknown".replace("\\", ".")
    ):
        open_source(str(write("a.txt", "text")), encoding=encoding)


def test_separators_that_are_none_are_refused(write):
    path = str(write("a.txt", "text"))
    with pytest.raises(ValueError, match="separator is empty"):
        open_source(path, separator="")
    with pytest.raises(ValueError, match=r"separator is '\\udc80', which is not text"):
        open_source(path, separator="\udc80")


# --- Streams --------------------------------------------------------------------------------------


def test_standard_input_is_read_once(monkeypatch, small):
    text = "some \u00df words to read " * 9
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    source = open_source("-")
    assert (source.files, source.name, source.nbytes) == ((), "standard input", 0)
    assert source.fingerprint() == source.fingerprint() != open_source("-").fingerprint()
    small(8)
    assert documents(source.pieces()) == [text.encode()]
    with pytest.raises(ValueError, match="standard input is a stream, which can be read only once"):
        next(source.pieces())


def test_standard_input_may_be_compressed_empty_or_missing(monkeypatch):
    packed = gzip.compress(b"a|b")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(packed)))
    assert read("-", separator="|") == [b"a", b"b"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\xff")))
    fails("-", "standard input: byte 0xff at offset 1 is not UTF-8")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    fails("-", "standard input holds no text")
    monkeypatch.setattr(sys, "stdin", None)
    fails("-", "standard input is closed")


def test_standard_input_may_be_text_that_stands_in(monkeypatch):
    for text in ("one \u00df|two \udcff", ""):
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        assert sources.standard_input().read() == text.encode("utf-8", "surrogateescape")
    monkeypatch.setattr(sys, "stdin", io.StringIO("one \u00df|two"))
    assert read("-", separator="|") == ["one \u00df".encode(), b"two"]


def test_source_copies_read_the_same_but_streams_have_none(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"one|two")
    source = open_source(str(path), separator="|")
    for copied in (copy.copy, copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))):
        assert copied(source) == source
        assert copied(source).fingerprint() == source.fingerprint()
        assert list(copied(source).pieces()) == list(source.pieces())
    for copied in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="standard input is a stream, and cannot be copied"):
            copied(open_source("-"))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_pipe_that_is_named_is_read(tmp_path, write):
    path = tmp_path / "pipe.jsonl"
    os.mkfifo(path)
    write("a.txt", "text")
    assert read(tmp_path) == [b"text"]
    content = rows(["one", "two " * 50_000]).encode()
    source = open_source(str(path))
    writer = threading.Thread(target=path.write_bytes, args=(content,))
    writer.start()
    assert documents(source.pieces()) == [b"one", b"two " * 50_000]
    writer.join()
    assert source.fingerprint() != open_source(str(path)).fingerprint()
    with pytest.raises(ValueError, match="can be read only once"):
        next(source.pieces())


@pytest.mark.skipif(not os.path.exists("/dev/stdin"), reason="this system has no /dev/stdin")
def test_device_of_standard_input_is_read():
    code = "from legacy1bit.data.sources import *; print(*open_source('/dev/stdin').pieces())"
    # The path of the package under test, not of one that is installed.
    run = subprocess.run(
        [sys.executable, "-c", code],
        input="a text",
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert run.stdout.strip() == repr(Piece(b"a text", True))


# --- Characters -----------------------------------------------------------------------------------


@quick
@given(
    head=texts,
    bad=st.sampled_from([b"\x80", b"\xc3(", b"\xc3", b"\xed\xa0\x80", b"\xf5\x80", b"\xe2\x82"]),
    tail=texts,
    block=sizes,
)
def test_invalid_utf_8_is_found_where_it_is(tmp_path_factory, head, bad, tail, block):
    path = tmp_path_factory.mktemp("text") / "a.txt"
    content = head.encode() + bad + tail.encode()
    path.write_bytes(content)
    with pytest.raises(UnicodeDecodeError) as expected:
        content.decode()
    at = expected.value.start
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "BLOCK_BYTES", block)
        patch.setattr(sources, "CHECKED_BYTES", 4)
        fails(
            path,
            f"{{}}: byte 0x{content[at]:02x} at offset {at} is not UTF-8, expected text; "
            "--encoding names another",
        )


def test_offset_is_that_of_the_decompressed_file(write):
    content = b"x" * (sources.BLOCK_BYTES + 7) + "\u00df".encode() + b"\xff"
    offset = sources.BLOCK_BYTES + 9
    for name, data in [("a.txt", content), ("a.gz", gzip.compress(content, 1))]:
        fails(write(name, data), f"{{}}: byte 0xff at offset {offset} is not UTF-8")


@pytest.mark.parametrize("block", [1, 2, 3, 1000])
@pytest.mark.parametrize("encoding", ["utf-8", "utf8", "utf-8-sig", "UTF_8", "utf-16", "utf-32-le"])
def test_byte_order_mark_is_dropped(small, write, block, encoding):
    small(block)
    text = "\u00dfa\ufeffb"
    marked = (
        text.encode(encoding)
        if encoding in ("utf-16", "utf-8-sig")
        else ("\ufeff" + text).encode(encoding)
    )
    assert read(write("a.txt", marked), encoding=encoding) == [text.encode()]
    line = ("\ufeff" + rows([text])).encode(encoding.replace("-sig", ""))
    assert read(write("a.jsonl", line), encoding=encoding) == [text.encode()]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-8", "utf-16", "utf-32"])
def test_decode_text_goes_by_the_mark(encoding):
    for text in ("", "a \u00df\r\n\u65e5\ufeff \U0001f600"):
        assert decode_text(text.encode(encoding), "a") == text.encode()
    big = {"utf-16": codecs.BOM_UTF16_BE, "utf-32": codecs.BOM_UTF32_BE}
    if mark := big.get(encoding):
        assert decode_text(mark + "\u00df".encode(f"{encoding}-be"), "a") == "\u00df".encode()


def test_decode_text_leaves_bytes_and_refuses_damage():
    assert decode_text(b"\xfe\xfe\0\xef\xbb", "a") == b"\xfe\xfe\0\xef\xbb"
    message = "^a.txt: byte 0x00 at offset 4 is not utf-16, which its byte order mark names$"
    with pytest.raises(ValueError, match=message):
        decode_text(b"\xff\xfea\0\0\xd8b\0", "a.txt")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_mark_of_another_encoding_names_it(write, encoding):
    for order in ("le", "be"):
        path = write("a.txt", "\ufefftext".encode(f"{encoding}-{order}"))
        fails(
            path,
            f"{{}} begins with the byte order mark of {encoding}, expected UTF-8; "
            f"--encoding {encoding} reads it",
        )
        assert read(path, encoding=encoding) == [b"text"]


@pytest.mark.parametrize("block", [1, 3, 64])
@pytest.mark.parametrize(
    "encoding", ["latin-1", "cp1252", "utf-16-be", "utf-7", "shift_jis", "gb18030", "iso2022_jp"]
)
def test_other_encodings_become_utf_8(small, write, block, encoding):
    text = "na\u00efve \u00df" if encoding in ("latin-1", "cp1252") else "na \u65e5\u672c\u8a9e x"
    small(block)
    assert read(write("a.txt", text.encode(encoding) * 9), encoding=encoding) == [
        (text * 9).encode()
    ]


@pytest.mark.parametrize("block", [1, 2, 5, 64])
@pytest.mark.parametrize(
    ("encoding", "content", "byte", "offset"),
    [
        ("ascii", b"abc\xe4", 0xE4, 3),
        ("cp1252", b"a\x81", 0x81, 1),
        ("shift_jis", b"ab\x93\xfa\xff\xffc", 0xFF, 4),
        ("utf-16-le", b"a\0b\0\x00\xdcc\0", 0x00, 4),
        ("utf-16", b"\xff\xfea\0b", 0x62, 4),
        ("gb18030", b"ab\x81", 0x81, 2),
    ],
)
def test_other_encodings_say_where_they_fail(small, write, block, encoding, content, byte, offset):
    small(block)
    name = codecs.lookup(encoding).name
    fails(
        write("a.txt", content),
        f"{{}}: byte 0x{byte:02x} at offset {offset} is not {name}, "
        "expected text; --encoding names another",
        encoding=encoding,
    )


def test_half_a_surrogate_pair_out_of_an_encoding_is_refused(write):
    path = write("a.txt", rb"abc \ud800")
    fails(path, "{}: bytes 0 to 10 are not unicode-escape", encoding="unicode_escape")


# --- Damaged and changing files -------------------------------------------------------------------

LONG = b"".join(hashlib.sha256(bytes([i])).hexdigest().encode() + b"\n" for i in range(256))


@only_compressed
def test_compressed_files_that_end_too_early_are_refused(write, suffix, compress):
    packed = compress(LONG)
    for size in (0, 1, 2, 3, 4, 9, len(packed) // 2, len(packed) - 5, len(packed) - 1):
        path = write("a.txt" + suffix, packed[:size])
        fails(path, "{} ends too early: what is compressed in it is cut off")
    path = write("b.txt" + suffix, packed + packed[:-1])
    fails(path, "{} ends too early")


@only_compressed
def test_compressed_files_that_are_damaged_are_refused(write, suffix, compress):
    kind = {".gz": "gzip", ".zst": "Zstandard", ".xz": "xz", ".bz2": "bzip2"}[suffix]
    if suffix == ".zst":
        # As the program does, and the library does not.
        compress = zstandard.ZstdCompressor(write_checksum=True).compress
    packed = compress(LONG)
    middle = len(packed) // 2
    for content in (
        b"not compressed",
        packed[:4] + b"\xff" * 20 + packed[24:],
        packed[:middle] + bytes(40) + packed[middle + 40 :],
        packed[:-5] + b"\xff" + packed[-4:],
        packed + b"what follows",
    ):
        fails(write("a.txt" + suffix, content), f"{{}} is damaged, or not of {kind}: ")


@needs_zstd
def test_zstd_that_needs_a_larger_window_says_what_to_type(write):
    sizes = zstandard.ZstdCompressionParameters(window_log=31, enable_ldm=True)
    packed = io.BytesIO()
    # As the program does with --long=31.
    writer = zstandard.ZstdCompressor(compression_params=sizes).stream_writer(packed, closefd=False)
    with writer:
        writer.write(LONG)
    path = write("a b.txt.zst", packed.getvalue())
    fails(
        path,
        "{} needs more than 128 MiB of memory to be decompressed: zstd -dc --long=31 "
        f"'{path}' | legacy1bit train --data -",
    )
    usual = zstandard.ZstdCompressionParameters(window_log=27, enable_ldm=True)
    packed = zstandard.ZstdCompressor(compression_params=usual).compress(LONG)
    assert read(write("a.txt.zst", packed)) == [LONG]


def test_xz_that_needs_more_memory_says_what_to_type(write):
    def packed(bytes_of_window):
        filters = [{"id": lzma.FILTER_LZMA2, "dict_size": bytes_of_window}]
        return lzma.compress(LONG, filters=filters)

    path = write("a.txt.xz", packed(1 << 27))
    fails(
        path,
        "{} needs more than 128 MiB of memory to be decompressed: xz -dc "
        f"{path} | legacy1bit train --data -",
    )
    # That of xz -9.
    assert read(write("a.txt.xz", packed(1 << 26))) == [LONG]


def test_xz_may_be_padded(write):
    packed = lzma.compress(b"one ") + bytes(4) + lzma.compress(b"two") + bytes(8)
    assert read(write("a.txt.xz", packed)) == [b"one two"]
    fails(write("a.txt.xz", bytes(16)), "{} is damaged, or not of xz")


@pytest.mark.parametrize(
    ("suffix", "compress", "kind"), [(".xz", lzma.compress, "xz"), (".bz2", bz2.compress, "bzip2")]
)
def test_few_bytes_after_the_end_are_not_taken_for_a_cut(write, suffix, compress, kind):
    """Fewer than a stream's header, for which a library waits."""
    packed = compress(b"one")
    for junk in (b"\n", b"junk"):
        path = write("a.txt" + suffix, packed + junk)
        fails(path, f"{{}} is damaged, or not of {kind}: other bytes follow its end")
    fails(write("a.txt" + suffix, packed + packed[:3]), "{} ends too early")


def test_files_that_have_to_be_decompressed_first_say_how(write):
    path = write("a.lzma", lzma.compress(b"text", lzma.FORMAT_ALONE))
    remedy = f"xz -dc {path} | legacy1bit train --data -"
    with pytest.raises(ValueError, match=re.escape(remedy)):
        open_source(str(path))
    path = write("a b.bin.gz", gzip.compress(bytes(64)))
    remedy = f"holds compressed tokens, expected a file of tokens: gzip -dc '{path}' > 'a b.bin'"
    with pytest.raises(ValueError, match=re.escape(remedy)):
        open_source(str(path))


@compressed
def test_file_that_changes_while_it_is_read_is_refused(write, suffix, compress, small):
    # What is read before the change must not be all of it.
    content = compress(LONG * 9)
    small(1000, piece=1000)

    def grow(path):
        with open(path, "ab") as file:
            file.write(compress(b"more"))

    def touch(path):
        os.utime(path, ns=(1, 1))

    def rewrite(path):
        path.write_bytes(content)
        os.utime(path, ns=(1, 1))

    def write_over(path):
        put_in_place(path, content[::-1], "written over")

    for change in (grow, touch, rewrite, write_over):
        path = write("a.txt" + suffix, content)
        pieces = open_source(str(path)).pieces()
        next(pieces)
        change(path)
        with pytest.raises(ValueError, match=re.escape(f"{path} has changed while it was read")):
            list(pieces)
    path = write("a.txt" + suffix, content)
    pieces = open_source(str(path)).pieces()
    next(pieces)
    os.truncate(path, len(content) // 2)
    with pytest.raises(ValueError, match="has changed while it was read"):
        list(pieces)
    if not suffix:
        # The size alone tells.
        path = write("a.txt", content)
        found = path.stat().st_mtime_ns
        pieces = open_source(str(path)).pieces()
        next(pieces)
        os.truncate(path, 5000)
        os.utime(path, ns=(found, found))
        with pytest.raises(ValueError, match="has changed while it was read"):
            list(pieces)


# --- JSON lines -----------------------------------------------------------------------------------


@quick
@given(told=st.lists(texts, min_size=1, max_size=5), block=sizes, ascii_only=st.booleans())
def test_lines_of_json_are_documents(tmp_path_factory, told, block, ascii_only):
    path = tmp_path_factory.mktemp("text") / "a.jsonl"
    told.append("last")
    lines = [json.dumps({"n": [1], "text": text}, ensure_ascii=ascii_only) for text in told]
    path.write_bytes("\r\n \n\n".join(lines).encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "BLOCK_BYTES", block)
        patch.setattr(sources, "PIECE_BYTES", 8)
        assert read(path) == [text.encode() for text in told]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{'text': 1}", "not JSON, Expecting property name"),
        ('{"text": "cut', "not JSON, Unterminated string starting at (column 10)"),
        ("[" * 100_000, "not JSON that can be read, "),
        ('{"text": 1' + "0" * 5000 + "}", "not JSON that can be read, "),
        ("[1]", "a list, expected an object"),
        ('"text"', "a string, expected an object"),
        ("1.5", "a number, expected an object"),
        ("null", "null, expected an object"),
        ("{}", "no field 'text'; there are none"),
        (
            '{"id": 1, "it\'s": ""}',
            "no field 'text'; there are 'id', \"it's\"; --field names another",
        ),
        (json.dumps({str(i): i for i in range(50)}), "no field 'text'; there are '0', '1', "),
        ('{"text": null}', "field 'text' is null, expected a string"),
        ('{"text": ["a"]}', "field 'text' is a list, expected a string"),
        ('{"text": true}', "field 'text' is true or false, expected a string"),
        ('{"text": {}}', "field 'text' is an object, expected a string"),
        (r'{"text": "ab\ud800c"}', r"field 'text' has '\ud800' at character 2, half of"),
    ],
    ids=range(16),
)
def test_lines_that_are_no_documents_are_refused(write, line, message):
    path = write("a.jsonl", rows(["good"]) + "\n" + line + "\n" + rows(["good"]))
    fails(path, f"{{}}, line 3: {message}")


def test_many_fields_are_not_all_told(write):
    path = write("a.jsonl", json.dumps({str(i): i for i in range(50)}))
    with pytest.raises(ValueError, match=r"'19' and 30 more; --field names another$"):
        list(open_source(str(path)).pieces())


def test_any_field_may_have_the_text(write):
    path = write("a.jsonl", rows(["one", "two"], "content \u00df"))
    assert read(path, field="content \u00df") == [b"one", b"two"]


def test_surrogate_pairs_are_characters(write):
    assert read(write("a.jsonl", r'{"text": "\ud83d\ude00"}')) == ["\U0001f600".encode()]


def test_lines_that_are_too_long_are_refused(write, monkeypatch):
    monkeypatch.setattr(sources, "BLOCK_BYTES", 16)
    monkeypatch.setattr(sources, "MOST_LINE_BYTES", 1000)
    path = write("a.jsonl", rows(["good"]) + rows(["x" * 2000]))
    fails(path, "{}, line 2: it is longer than 1,000 bytes, expected an object of JSON")


@compressed
@pytest.mark.parametrize("name", ["a.json", "a.log", "a", "a.JSON"])
@pytest.mark.parametrize("mark", ["", "\ufeff", " \n\r\n"])
def test_lines_of_json_are_known_by_the_first(write, small, name, suffix, compress, mark):
    lines = mark + rows(["one", "two \u00df"]).replace("\n", "\r\n")
    path = write(name + suffix, compress(lines.encode()))
    for block in (1 << 20, 3):
        small(block)
        assert read(path) == [b"one", "two \u00df".encode()]
        assert open_source(str(path)).has_documents
    number = 3 if mark.startswith(" ") else 1
    fails(path, f"{{}}, line {number}: no field 'x'; there are 'id', 'text'", field="x")
    # A name that says text is believed.
    path = write("a.txt" + suffix, compress(lines.encode()))
    assert read(path) == [lines.encode().removeprefix(codecs.BOM_UTF8)]
    assert not open_source(str(path)).has_documents


def test_lines_of_json_come_through_pipes(monkeypatch):
    for content in (rows(["one", "two"], "x").encode(), gzip.compress(rows(["one"], "x").encode())):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        assert read("-", field="x")[0] == b"one"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a text")))
    fails("-", "standard input has no fields, and no 'x': expected JSON lines", field="x")


@pytest.mark.parametrize(
    "content",
    [
        "{a text} in braces\n{}",
        '{\n  "text": "one"\n}\n',
        "[1, 2]\n",
        "[[link]] and more",
        '"text"\n{"text": "one"}',
        "{" * 100_000,
        '{"text": 1' + "0" * 5000 + "}",
    ],
    ids=range(7),
)
def test_what_does_not_begin_with_an_object_on_a_line_is_text(write, content):
    path = write("a.json", content)
    assert read(path) == [content.encode()]
    assert not open_source(str(path)).has_documents


def test_first_line_that_is_too_long_is_text(write, monkeypatch, small):
    monkeypatch.setattr(sources, "FIRST_LINE_BYTES", 100)
    content = rows(["x" * 200])
    path = write("a.json", content)
    assert read(path) == [content.encode()]
    small(16)
    assert b"".join(read(path)) == content.encode()
    assert read(write("a.json", rows(["x"]))) == [b"x"]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a"])
@pytest.mark.parametrize("indent", [None, 2])
def test_a_list_of_json_says_what_to_type(write, small, name, indent):
    content = json.dumps([{"text": "one"}, {"text": "two"}], indent=indent)
    path = write(name, content)
    for block in (1 << 20, 3):
        small(block, piece=1000)
        fails(
            path,
            "{} holds one JSON list, expected an object on each line: jq -c '.[]' " + str(path),
        )
    assert read(write("a.txt", content)) == [content.encode()]


def test_a_list_of_strings_named_json_says_what_to_type(write):
    content = json.dumps(["one", "two"])
    path = write("a.json", content)
    fails(
        path,
        "{} holds one JSON list, expected an object on each line: jq -c '.[] | {text: .}' "
        f"{path} > lines.jsonl; .txt at its name's end means the list as text",
    )
    assert read(write("a", content)) == [content.encode()]


@pytest.mark.parametrize("name", ["a.json.gz", "a"])
def test_a_list_of_json_that_is_compressed_says_how_to_unpack_it(write, name):
    path = write(name, gzip.compress(b'[{"text": "one"}, {"text": "two"}]'))
    fails(
        path,
        "{} holds one JSON list, expected an object on each line: "
        f"gzip -dc {path} | jq -c '.[]' > lines.jsonl",
    )


# --- Other things than text -----------------------------------------------------------------------

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 3\n"
PAGE = b"<!DOCTYPE html>\n<html><p>text</p></html>"


@compressed
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", POINTER, "a Git LFS pointer, expected text: git lfs pull fetches what"),
        ("a.html", POINTER, "a Git LFS pointer"),
        (
            "a.txt",
            PAGE,
            "an HTML page, expected text: download the file that it shows or links to; ",
        ),
        ("a.jsonl", PAGE, "an HTML page"),
        ("a", PAGE, "an HTML page"),
        ("a.tar", bytes(257) + b"ustar\0", "a tar archive, expected text: unpack it first"),
        ("a.gguf", b"GGUF\3\0\0\0", "a GGUF model, expected text: legacy1bit generate --model"),
        ("a.txt", b"PK\3\4" + bytes(26) + b"a", "a ZIP archive, expected text: unpack it first"),
        ("a.txt", b"%PDF-1.7", "a PDF document, expected text: pdftotext FILE makes text of it"),
        ("a.txt", b"PAR1\x15\4", "a Parquet file, expected text: let its name end in .parquet"),
    ],
    ids=range(10),
)
def test_what_is_no_text_is_named(write, name, content, message, suffix, compress):
    path = write(name + suffix, compress(content))
    for encoding in ("utf-8", "latin-1"):
        fails(path, f"{{}} holds {message}", encoding=encoding)


@only_compressed
def test_what_is_compressed_twice_is_named(write, suffix, compress):
    path = write("a.txt" + suffix, compress(compress(b"a text")))
    with pytest.raises(ValueError, match=r" holds an? \w+ file, expected text: \w+ -d unpacks it$"):
        list(open_source(str(path)).pieces())


@compressed
def test_pages_that_are_meant_are_text(write, tmp_path, suffix, compress):
    for name in ("a.html", "a.HTM", "a.xhtml"):
        assert read(write(name + suffix, compress(PAGE))) == [PAGE]
    write("more/a.txt" + suffix, compress(PAGE))
    write("more/b.txt", b"b")
    assert read(tmp_path / "more") == [PAGE, b"b"]


# --- Parquet --------------------------------------------------------------------------------------


@pytest.fixture
def write_table(tmp_path):
    def put(column, field="text", **options):
        path = tmp_path / "a.parquet"
        table = pyarrow.table({"id": pyarrow.array(range(len(column))), field: column})
        pyarrow.parquet.write_table(table, path, **options)
        return path

    return put


@needs_arrow
@pytest.mark.parametrize(
    "kind", ["string", "large_string", "binary", "large_binary", "string_view", "dictionary"]
)
def test_rows_of_parquet_are_documents(write_table, monkeypatch, kind):
    told = [f"row {i} \u00df" for i in range(200)] + ["", "long " * 10]
    if kind == "dictionary":
        column = pyarrow.array(told).dictionary_encode()
    else:
        column = pyarrow.array(told, getattr(pyarrow, kind)())
    monkeypatch.setattr(sources, "PIECE_BYTES", 16)
    try:
        path = write_table(column, "content", row_group_size=90)
    except pyarrow.ArrowNotImplementedError:
        pytest.skip("this pyarrow writes no such column")
    assert read(path, field="content") == [text.encode() for text in told]


@needs_arrow
def test_parquet_that_is_no_text_is_refused(write_table):
    fails(write_table(pyarrow.array(["a", None])), "{}, row 2: 'text' is null, expected a string")
    fails(write_table(pyarrow.array([1])), "{}: column 'text' is of type int64, expected strings")
    fails(
        write_table(pyarrow.array([b"a", b"b\xff"])),
        "{}, row 2: byte 0xff at offset 1 is not UTF-8, expected text",
    )
    path = write_table(pyarrow.array(["a"]), "content")
    fails(path, "{}: no column 'text'; there are 'id', 'content'; --field names another")
    fails(write_table(pyarrow.array([], pyarrow.string())), "a.parquet holds no text")


@needs_arrow
def test_damaged_parquet_is_refused(write_table, write):
    column = pyarrow.array([LONG.decode()] * 9)
    content = write_table(column, write_page_checksum=True, store_schema=False).read_bytes()
    middle = len(content) // 2
    changed = content[:middle] + bytes(99) + content[middle + 99 :]
    named = content.replace(b"text", b"\xff\xff\xff\xff")
    for damaged in (b"", b"PAR1", content[:-9], b"text" * 99, changed, named):
        fails(write("b.parquet", damaged), "{} is damaged, or not of Parquet: ")


@needs_arrow
def test_parquet_that_changes_while_it_is_read_is_refused(write_table):
    path = write_table(pyarrow.array(["a"] * 200))
    pieces = open_source(str(path)).pieces()
    next(pieces)
    os.utime(path, ns=(1, 1))
    with pytest.raises(ValueError, match="has changed while it was read"):
        list(pieces)


@needs_arrow
@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="needs /proc")
def test_parquet_is_read_without_threads(write_table):
    path = write_table(pyarrow.array([LONG.decode()] * 99))
    # In another process: the library keeps its threads.
    script = (
        "import os, pyarrow.parquet\n"
        "from legacy1bit.data.sources import open_source\n"
        "before = len(os.listdir('/proc/self/task'))\n"
        f"list(open_source({str(path)!r}).pieces())\n"
        "print(len(os.listdir('/proc/self/task')) - before)"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ran.stdout.split() == ["0"], ran.stderr


# --- Libraries that are missing -------------------------------------------------------------------


def test_missing_libraries_are_named(write, monkeypatch):
    for name in ("zstandard", "compression.zstd", "pyarrow", "pyarrow.parquet", "lzma", "bz2"):
        monkeypatch.setitem(sys.modules, name, None)
    no_zstd = "Zstandard files need zstandard, which is not installed: pip install zstandard"
    with pytest.raises(ValueError, match=f"^{no_zstd}$"):
        open_source(str(write("a.txt.zst", b"\x28\xb5\x2f\xfd")))
    fails(write("a.txt", b"\x28\xb5\x2f\xfdrest"), no_zstd)
    no_arrow = "Parquet files need pyarrow, which is not installed: pip install pyarrow"
    with pytest.raises(ValueError, match=f"^{no_arrow}$"):
        open_source(str(write("a.parquet", b"PAR1")))
    for suffix, module, packed in ((".xz", "lzma", b"\xfd7zXZ\0"), (".bz2", "bz2", b"BZh91AY&SY")):
        reason = f"files need Python's module {module}, which this Python was built without$"
        with pytest.raises(ValueError, match=reason):
            open_source(str(write("a" + suffix, packed)))
        with pytest.raises(ValueError, match=reason):
            list(open_source(str(write("a.txt", packed))).pieces())


def test_open_source_does_not_die_of_a_library_for_newer_cpus(write, monkeypatch):
    monkeypatch.setattr(sources, "runs_here", lambda package: package != "pyarrow")
    fails(
        write("a.parquet", b"PAR1"),
        "Parquet files need pyarrow, which needs instructions that this CPU lacks: "
        "make JSON lines of them on another computer",
    )


def test_zstd_of_the_standard_library_is_taken_where_there_is_one(write, monkeypatch):
    # A stand-in, which undoes gzip: what counts is how it is called, and what it raises.
    class ZstdError(Exception):
        pass

    library = types.ModuleType("compression.zstd")
    library.ZstdFile = lambda file: gzip.GzipFile(fileobj=file)
    library.ZstdError = ZstdError
    monkeypatch.setitem(sys.modules, "compression", types.ModuleType("compression"))
    monkeypatch.setitem(sys.modules, "compression.zstd", library)
    packed = gzip.compress(LONG)
    monkeypatch.delitem(sources._COMPRESSED, ".gz")
    assert read(write("a.zst", packed)) == [LONG]
    fails(write("a.zst", packed[:-1]), "{} ends too early")


# --- Memory ---------------------------------------------------------------------------------------


def size_and_peak(path):
    """The bytes of a text that is read in pieces, and the most memory that this takes."""
    tracemalloc.start()
    try:
        size = sum(len(piece.text) for piece in open_source(str(path)).pieces())
        return size, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@compressed
def test_memory_does_not_grow_with_the_file(tmp_path, suffix, compress):
    block = b"some words and a line break\n" * (1 << 15)
    path = tmp_path / ("a.txt" + suffix)
    part = compress(block)
    with open(path, "wb") as file:
        for _ in range(60):
            file.write(part)
    del block, part
    size, peak = size_and_peak(path)
    assert size > 50_000_000
    # The window of xz has 8 MiB, and is traced.
    assert peak < (20 if suffix == ".xz" else 12) << 20


@needs_zstd
def test_memory_does_not_grow_with_how_much_a_frame_holds(write):
    path = write("a.zst", zstd(bytes(50_000_000)))
    size, peak = size_and_peak(path)
    assert size == 50_000_000
    # Nowhere to cut: pieces of 16 MiB, and one at a time in the making.
    assert peak < 64 << 20


# --- Files of tokens ------------------------------------------------------------------------------


def llm_c(tokens, magic=20240520, version=1, count=None, dtype="<u2"):
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(tokens) if count is None else count
    return header.tobytes() + np.array(tokens, dtype).tobytes()


TOKENS = [50256, 0, 65535, 17]


@pytest.mark.parametrize(
    ("content", "info"),
    [
        (llm_c(TOKENS), ("llm.c", "uint16", 1024, 4)),
        (llm_c([128000, 5], 20240801, 7, dtype="<u4"), ("llm.c", "uint32", 1024, 2)),
        (np.array(TOKENS, "<u2").tobytes(), ("nanoGPT", "uint16", 0, 4)),
        (np.array([7], "<u2").tobytes(), ("nanoGPT", "uint16", 0, 1)),
    ],
)
def test_token_files_are_read(write, content, info):
    path = write("a.bin", content)
    assert dataclasses.astuple(token_file_info(path)) == info
    tokens = read_token_file(str(path))
    assert tokens.dtype == info[1]
    assert tokens.size == info[3]
    assert tokens[:].tobytes() == content[info[2] :]
    assert (
        tokens[1:3].tobytes()
        == content[info[2] :][tokens.dtype.itemsize :][: 2 * tokens.dtype.itemsize]
    )
    assert not tokens[:].flags.writeable


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has 0 bytes, expected llm.c's header or tokens of 2 bytes each"),
        (b"a\0c", "has 3 bytes, expected"),
        (b"some text\n", "holds text, expected tokens: let its name end in .txt"),
        ("\u65e5\u672c\u8a9e ".encode() * 200, "holds text, expected tokens"),
        (gzip.compress(b"a"), "holds a gzip file, expected tokens: gzip -d unpacks it"),
        (b"GGUF\3\0\0\0", "holds a GGUF model, expected tokens: legacy1bit generate --model FILE"),
        (llm_c(TOKENS)[:1000], "has 1,000 bytes and ends within its header of 1,024"),
        (llm_c(TOKENS)[:-2], "says it holds 4 tokens of uint16, which makes 1,032 bytes, but has"),
        (llm_c(TOKENS) + b"\0", "says it holds 4 tokens"),
        (llm_c(TOKENS, version=2), "is of llm.c's version 2, expected 1 for number 20240520"),
        (llm_c(TOKENS, 20240801), "is of llm.c's version 1, expected 7 for number 20240801"),
        (llm_c(TOKENS, 20240801, 7), "says it holds 4 tokens of uint32, which makes 1,040 bytes"),
        (llm_c([], count=0), "says it holds 0 tokens"),
        (llm_c(TOKENS, count=-4), "says it holds -4 tokens"),
        (llm_c(TOKENS, 20240326), "is a file of llm.c that holds no tokens"),
    ],
    ids=range(15),
)
def test_token_files_that_are_inconsistent_are_refused(write, content, message):
    path = write("a.bin", content)
    for function in (token_file_info, read_token_file):
        with pytest.raises(ValueError, match=f"^{re.escape(f'{path} {message}')}"):
            function(path)


def test_token_files_are_known_by_their_suffix(tmp_path):
    assert is_token_file("a/train.bin")
    assert is_token_file(tmp_path / "A.BIN")
    assert not is_token_file("bin")
    assert not is_token_file("a.bin.txt")
    with pytest.raises(FileNotFoundError):
        token_file_info(tmp_path / "a.bin")


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="there is no /proc here")
def test_what_the_system_makes_up_is_not_read():
    """Such files have no size, and some have no end."""
    with pytest.raises(ValueError, match="status holds no text"):
        list(open_source("/proc/self/status").pieces())
