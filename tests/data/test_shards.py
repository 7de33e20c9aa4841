"""Tokens on disk: what is read is what was written, whatever happens between."""

import copy
import errno
import gc
import json
import mmap
import os
import pickle
import re
import shutil
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.arrays import assert_same_bits
from helpers.paths import ROOT
from legacy1bit.data import shards
from legacy1bit.data.shards import (
    INDEX_FILE,
    IntegerFile,
    ShardError,
    ShardWriter,
    TokenStore,
    cached,
    open_store,
    read_index,
    remove_left_behind,
    split_documents,
    token_dtype,
)
from legacy1bit.system.files import remove_unused

VOCABULARIES = {"|u1": 256, "<u2": 65536, "<u4": 65537}
KNOWN = ("source", "tokenizer", "0" * 64)
DAY = 86400

few = settings(max_examples=40, deadline=None)


# --- Reading --------------------------------------------------------------------------------------


def split(tokens, size):
    return [tokens[first : first + size] for first in range(0, tokens.size, size)]


@st.composite
def stores(draw):
    """A store in parts of any size, maybe a window of it, and its tokens in one array."""
    size = draw(st.integers(1, 60))
    tokens = np.random.default_rng(size).integers(0, 250, size).astype(draw(st.sampled_from("BHI")))
    inner = draw(st.sets(st.integers(1, size), max_size=6)) - {size}
    documents = np.array([0, *sorted(inner)], np.int64)
    stop = draw(st.integers(int(documents[-1]), size))
    store = TokenStore(split(tokens, draw(st.integers(1, size + 3))), documents, stop)
    for _ in range(draw(st.integers(0, 2))):
        first = draw(st.integers(0, tokens.size - 1))
        last = draw(st.integers(first + 1, tokens.size))
        store, tokens = store.window(first, last), tokens[first:last]
        inside = documents[(documents > first) & (documents < last)] - first
        documents = np.array([0, *inside], np.int64)
        stop = max(min(stop, last) - first, 0)
    return store, tokens, documents, stop


@few
@given(stores(), st.data())
def test_store_reads_like_an_array(made, data):
    store, tokens, _, _ = made
    assert len(store) == store.size == tokens.size
    start = data.draw(st.integers(0, tokens.size))
    stop = data.draw(st.integers(start, tokens.size + 5))
    assert_same_bits(store.read(start, stop), tokens[start:stop].astype(np.int32))


@few
@given(stores(), st.data())
def test_store_rows_are_slices_and_padding(made, data):
    store, tokens, _, _ = made
    width = data.draw(st.integers(1, tokens.size + 4))
    places = st.lists(st.integers(0, tokens.size), min_size=1, max_size=8)
    starts = np.array(data.draw(places), np.int64)
    sizes = data.draw(
        st.lists(st.integers(0, width + 3), min_size=starts.size, max_size=starts.size)
    )
    rows = store.rows(starts, starts + sizes, width, 999)
    assert rows.shape == (starts.size, width)
    for row, start, size in zip(rows, starts, sizes, strict=True):
        expected = tokens[start : start + min(size, width)].astype(np.int32)
        assert_same_bits(row[: expected.size].copy(), expected)
        assert (row[expected.size :] == 999).all()


@few
@given(stores())
def test_store_knows_where_documents_begin_and_end(made):
    store, _, documents, stop = made
    assert store.document_count == documents.size
    numbers = np.random.default_rng(0).permutation(documents.size)
    begins, ends = store.document_bounds(numbers)
    assert_same_bits(begins, documents[numbers])
    assert_same_bits(ends, np.append(documents[1:], stop)[numbers])


@few
@given(stores(), st.integers(1, 70))
def test_store_knows_in_which_documents_tokens_lie(made, width):
    store, _, documents, _ = made
    starts = np.random.default_rng(0).permutation(store.size)
    found = store.document_begins(starts, width)
    assert (found.shape, found.dtype) == ((store.size, width), np.int64)
    places = starts[:, None] + np.arange(width)
    expected = documents[np.searchsorted(documents, places, side="right") - 1]
    assert (found == expected).all()


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (3, 3), (4, 3), (0, 11), (10, 12)])
def test_store_has_no_window_outside_itself(start, stop):
    with pytest.raises(ValueError, match=f"the window is {start} to {stop}, expected it in 0 to"):
        TokenStore([np.arange(10)]).window(start, stop)


def test_store_of_nothing_reads_nothing():
    for parts in ([], [np.zeros(0, np.uint16)]):
        store = TokenStore(parts)
        assert store.size == 0
        assert store.read(0, 5).size == 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_reading_a_file_keeps_no_memory(tmp_path):
    path = tmp_path / "zeros"
    size = 256 << 20
    with open(path, "wb") as file:
        file.truncate(size)
    store = TokenStore([IntegerFile(path, "<u2")])
    assert store.size == size // 2

    def resident():
        return int(Path("/proc/self/statm").read_text().split()[2]) * mmap.PAGESIZE

    before, most = resident(), 0
    starts = np.arange(0, size // 2, 16 << 10)
    for first in range(0, starts.size, 64):
        store.rows(starts[first : first + 64], starts[first : first + 64] + 9, 9, 0)
        most = max(most, resident() - before)
    for start in range(0, size // 2, 1 << 20):
        store.read(start, start + (1 << 20))
        most = max(most, resident() - before)
    # What is read is four megabytes, and two as they lie in the file.
    assert most < 16 << 20


def numbers_in(path, count=20, offset=3):
    path.write_bytes(bytes(offset) + np.arange(count, dtype="<u4").tobytes())
    return IntegerFile(path, "<u4", offset)


@few
@given(st.integers(0, 25), st.integers(0, 25))
def test_file_is_sliced_like_an_array(tmp_path_factory, start, stop):
    tokens = numbers_in(tmp_path_factory.mktemp("sliced") / "tokens")
    assert_same_bits(tokens[start:stop].copy(), np.arange(20, dtype="<u4")[start:stop])
    assert not tokens[start:stop].flags.writeable


def test_file_is_read_in_turns_where_the_system_gives_less(tmp_path, monkeypatch):
    tokens, real = numbers_in(tmp_path / "tokens"), os.pread
    monkeypatch.setattr(os, "pread", lambda file, size, place: real(file, min(size, 7), place))
    assert tokens[2:19].tolist() == list(range(2, 19))


def test_file_that_has_become_shorter_is_named(tmp_path):
    tokens = numbers_in(tmp_path / "tokens")
    os.truncate(tmp_path / "tokens", 3 + 40)
    assert tokens[:10].size == 10
    with pytest.raises(OSError, match="has become shorter") as raised:
        tokens[9:11]
    assert raised.value.filename == str(tmp_path / "tokens")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_file_is_closed_when_nobody_reads_it(tmp_path):
    tokens = numbers_in(tmp_path / "tokens")
    opened = os.readlink(f"/proc/self/fd/{tokens._file}")
    assert opened == str(tmp_path / "tokens")
    del tokens
    gc.collect()
    others = [os.path.realpath(link) for link in Path("/proc/self/fd").iterdir()]
    assert opened not in others


# --- Writing --------------------------------------------------------------------------------------


def documents_of(vocab_size, count, seed=0):
    rng = np.random.default_rng(seed)
    made = [rng.integers(0, vocab_size, rng.integers(0, 30)) for _ in range(count)]
    return [document.astype(np.uint32).view(np.int32) for document in made]


def write(folder, documents, vocab_size=256, parts=("text",), shard_bytes=64, known=KNOWN):
    """Write documents to parts in turn, a 1 before each and at a part's end."""
    one = np.ones(1, np.int32)
    with ShardWriter(folder, parts, vocab_size, shard_bytes) as writer:
        for number, document in enumerate(documents):
            part = parts[number % len(parts)]
            writer.begin_document(part)
            writer.write(part, one)
            for piece in np.array_split(document, 3):
                writer.write(part, piece, piece.size)
        for part in parts:
            writer.write(part, one)
        return writer.finish(*known)


def assert_holds(folder, documents, parts=("text",)):
    index = read_index(folder)
    for i, part in enumerate(parts):
        own = documents[i :: len(parts)]
        expected = np.concatenate([np.append(1, document) for document in own] + [np.ones(1)])
        store = open_store(folder, index, part)
        assert (store.read(0, store.size) == expected.astype(np.uint32).view(np.int32)).all()
        assert store.size == expected.size == index.parts[part].tokens
        assert index.parts[part].bytes == sum(document.size for document in own)
        begins, ends = store.document_bounds(np.arange(len(own)))
        assert (ends - begins == [document.size + 1 for document in own]).all()


@pytest.mark.parametrize("dtype", VOCABULARIES)
@pytest.mark.parametrize("parts", [("text",), ("training", "validation")])
@pytest.mark.parametrize("shard_bytes", [1, 24, 64, 1 << 20])
def test_written_tokens_are_read_back(tmp_path, dtype, parts, shard_bytes):
    documents = documents_of(VOCABULARIES[dtype], 11)
    folder = tmp_path / "cache" / "entry"
    index = write(folder, documents, VOCABULARIES[dtype], parts, shard_bytes)
    assert index == read_index(folder)
    assert index.dtype == dtype
    assert (index.source, index.tokenizer, index.sha256) == KNOWN
    assert_holds(folder, documents, parts)
    assert [path.name for path in folder.parent.iterdir()] == ["entry"]
    itemsize = np.dtype(dtype).itemsize
    sizes = [path.stat().st_size for path in folder.glob("*.tokens")]
    assert max(sizes) <= max(shard_bytes, itemsize)
    assert sum(sizes) == sum(part.tokens for part in index.parts.values()) * itemsize


@pytest.mark.parametrize("size", [1, 256, 257, 65536, 65537, 1 << 32])
def test_token_dtype_is_the_smallest(size):
    dtype = token_dtype(size)
    assert size - 1 <= np.iinfo(dtype).max
    assert dtype.itemsize == 1 or size - 1 > np.iinfo(f"u{dtype.itemsize // 2}").max


def test_token_dtype_has_an_end():
    with pytest.raises(ValueError, match="expected at most 2\\^32"):
        token_dtype((1 << 32) + 1)


def test_parts_may_be_empty(tmp_path):
    with ShardWriter(tmp_path / "entry", ("text",), 256) as writer:
        writer.finish(*KNOWN)
    store = open_store(tmp_path / "entry", read_index(tmp_path / "entry"), "text")
    assert store.size == store.stop == store.document_count == 0


# --- Crashes --------------------------------------------------------------------------------------


def cached_write(folder, documents, calls, **options):
    def make(folder):
        calls.append(folder)
        return write(folder, documents, **options)

    return cached(folder, make, *KNOWN[:2])


@pytest.fixture
def documents():
    return documents_of(256, 9)


@pytest.mark.parametrize("error", [ValueError("bad text"), KeyboardInterrupt(), OSError(5, "EIO")])
@pytest.mark.parametrize("earlier", [False, True])
def test_exception_while_writing_changes_nothing(tmp_path, documents, error, earlier):
    folder = tmp_path / "entry"
    if earlier:
        write(folder, documents)

    def stop():
        with ShardWriter(folder, ("text",), 256, 8) as writer:
            writer.begin_document("text")
            writer.write("text", np.arange(50))
            raise error

    with pytest.raises(type(error)) as raised:
        stop()
    assert raised.value is error
    assert [path.name for path in tmp_path.iterdir()] == ["entry"] * earlier
    if earlier:
        assert_holds(folder, documents)


class FullDisk:
    """Stands in for a file that takes so many bytes."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, data):
        if len(data) > self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.room -= len(data)
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()


@pytest.mark.parametrize("name", ["documents", "tokens", INDEX_FILE])
def test_full_disk_is_named_by_the_folder(tmp_path, monkeypatch, documents, name):
    def open_full(path, *arguments, **options):
        file = open(path, *arguments, **options)  # noqa: SIM115
        return FullDisk(file, 10) if str(path).endswith(name) else file

    folder = tmp_path / "cache" / "entry"
    with monkeypatch.context() as patch:
        patch.setattr(shards, "open", open_full, raising=False)
        with pytest.raises(OSError, match="No space left") as error:
            write(folder, documents)
    assert error.value.errno == errno.ENOSPC
    assert error.value.filename == str(folder)
    assert not list((tmp_path / "cache").iterdir())
    cached_write(folder, documents, [])
    assert_holds(folder, documents)


@pytest.mark.parametrize("after", range(6))
def test_full_disk_is_noticed_at_any_sync(tmp_path, monkeypatch, documents, after):
    calls = []

    def sync(handle):
        calls.append(handle)
        if len(calls) > after:
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(os, "fsync", sync)
    with pytest.raises(OSError, match=os.strerror(errno.EDQUOT)) as error:
        write(tmp_path / "entry", documents, shard_bytes=40)
    assert error.value.filename == str(tmp_path / "entry")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_cache_that_is_no_folder_is_an_error(tmp_path, documents, place):
    (tmp_path / "file").write_bytes(b"kept")
    with pytest.raises(OSError, match=r"(File exists|Not a directory)") as error:
        write(tmp_path / place / "entry", documents)
    assert error.value.filename == str(tmp_path / place)
    assert (tmp_path / "file").read_bytes() == b"kept"


DIES = """
import os, sys, numpy as np
from pathlib import Path
from legacy1bit.data import shards
writer = shards.ShardWriter(Path(sys.argv[1]), ("text",), 256, 64)
writer.begin_document("text")
writer.write("text", np.arange(200))
if sys.argv[2] == "renaming":
    os.rename = lambda *_: os._exit(7)
    writer.finish("source", "tokenizer", "0" * 64)
os._exit(7)
"""


@pytest.mark.parametrize("when", ["writing", "renaming"])
def test_killed_writer_leaves_nothing_in_the_way(tmp_path, documents, when):
    folder = tmp_path / "entry"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    died = subprocess.run(
        [sys.executable, "-c", DIES, str(folder), when], env=environment, check=False, timeout=60
    )
    assert died.returncode == 7
    (left,) = tmp_path.iterdir()
    assert left.name.endswith(".tmp")
    cached_write(folder, documents, [])
    assert_holds(folder, documents)
    # It may still be written, for all that others know.
    assert left.exists()
    age(left, DAY + 60)
    write(tmp_path / "other", documents)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["entry", "other"]


def age(path, seconds):
    for found in (path, *path.glob("*")):
        then = found.stat().st_mtime - seconds
        os.utime(found, (then, then))


def temporary(name):
    """What a temporary file or folder is called."""
    return f".{name}.{'0123456789abcdef' * 2}.tmp"


def test_only_what_is_old_and_temporary_is_removed(tmp_path):
    for name in (
        temporary("old"),
        temporary("new"),
        temporary("busy"),
        "old.tmp",
        ".old",
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_bytes(b"")
        if "new" not in name:
            age(tmp_path / name, DAY + 60)
    os.utime(tmp_path / temporary("busy") / "file")
    (tmp_path / temporary("file")).write_bytes(b"")
    age(tmp_path / temporary("file"), DAY + 60)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / temporary("link")).symlink_to(tmp_path / "elsewhere")
    age(tmp_path / "elsewhere", DAY + 60)
    remove_left_behind(tmp_path)
    kept = {path.name for path in tmp_path.iterdir()}
    assert kept == {
        temporary("new"),
        temporary("busy"),
        "old.tmp",
        ".old",
        "elsewhere",
    }
    remove_left_behind(tmp_path / "nowhere")


# --- Races ----------------------------------------------------------------------------------------


def test_second_writer_keeps_what_the_first_has_written(tmp_path, documents):
    folder = tmp_path / "entry"
    with ShardWriter(folder, ("text",), 256) as writer:
        writer.begin_document("text")
        writer.write("text", np.arange(9))
        first = os.fspath(folder / INDEX_FILE)
        with ShardWriter(folder, ("text",), 256) as other:
            other.begin_document("text")
            other.write("text", np.arange(9))
            index = other.finish(*KNOWN)
        inode = os.stat(first).st_ino
        assert writer.finish(*KNOWN) == index
    assert os.stat(first).st_ino == inode
    assert [path.name for path in tmp_path.iterdir()] == ["entry"]


@pytest.mark.parametrize("kind", ["older", "damaged", "foreign", "file", "empty"])
def test_writer_replaces_what_is_something_else(tmp_path, documents, kind):
    folder = tmp_path / "entry"
    if kind == "file":
        folder.write_bytes(b"")
    elif kind == "empty":
        folder.mkdir()
    elif kind == "foreign":
        folder.mkdir()
        (folder / "note").write_bytes(b"")
    else:
        write(folder, documents, known=("older", *KNOWN[1:]) if kind == "older" else KNOWN)
        if kind == "damaged":
            (folder / "text-00000.tokens").unlink()
    write(folder, documents)
    assert_holds(folder, documents)
    assert not (folder / "note").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["entry"]


def test_folder_that_is_replaced_can_be_read_on(tmp_path, documents):
    folder = tmp_path / "entry"
    write(folder, documents, known=("older", *KNOWN[1:]))
    store = open_store(folder, read_index(folder), "text")
    before = store.read(0, store.size)
    write(folder, documents_of(256, 9, seed=1))
    assert_same_bits(store.read(0, store.size), before)


def test_many_writers_of_one_folder_all_end_well(tmp_path, documents):
    folder, errors = tmp_path / "entry", []
    barrier = threading.Barrier(4)

    def work():
        try:
            for _ in range(10):
                barrier.wait(20)
                cached_write(folder, documents, [])
                assert_holds(folder, documents)
                if barrier.wait(20) == 0:
                    shutil.rmtree(folder)
                barrier.wait(20)
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert not list(tmp_path.iterdir())


TOGETHER = """
import sys, numpy as np
from pathlib import Path
from legacy1bit.data.shards import ShardWriter, open_store
folder = Path(sys.argv[1])
with ShardWriter(folder, ("text",), 256, 64) as writer:
    writer.begin_document("text")
    writer.write("text", np.arange(200))
    print("written", flush=True)
    sys.stdin.readline()
    index = writer.finish("source", "tokenizer", "0" * 64)
store = open_store(folder, index, "text")
assert (store.read(0, 200) == np.arange(200)).all()
"""


def test_processes_that_finish_at_once_all_end_well(tmp_path):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", TOGETHER, str(tmp_path / "entry")]
    started = [subprocess.Popen(command, env=environment, **pipes) for _ in range(3)]
    for process in started:
        assert process.stdout.readline() == b"written\n"
    for process in started:
        process.stdin.write(b"\n")
        process.stdin.flush()
    for process in started:
        process.communicate(timeout=60)
        assert process.returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["entry"]


# --- Damage ---------------------------------------------------------------------------------------


def assert_found_out(folder, documents):
    """A damaged folder is no folder of shards, and is written anew."""
    with pytest.raises((ShardError, FileNotFoundError)) as error:
        read_index(folder)
    assert str(folder) in str(error.value)
    calls = []
    cached_write(folder, documents, calls)
    assert calls == [folder]
    assert_holds(folder, documents)


@pytest.fixture
def entry(tmp_path, documents):
    write(tmp_path / "cache" / "entry", documents)
    return tmp_path / "cache" / "entry"


def test_flipped_bits_are_found_out(entry, documents):
    good = read_index(entry)
    choice = np.random.default_rng(3)
    for path in sorted(entry.iterdir()):
        whole = path.read_bytes()
        for place in choice.integers(0, len(whole), 60):
            damaged = bytearray(whole)
            damaged[place] ^= 1 << int(choice.integers(8))
            path.write_bytes(damaged)
            # Some of the white space between JSON's words is any other.
            try:
                assert path.name == INDEX_FILE
                assert read_index(entry) == good
            except (ShardError, AssertionError):
                with pytest.raises(ShardError, match=re.escape(str(path.parent))):
                    read_index(entry)
        path.write_bytes(whole)
    (entry / "text-00001.tokens").write_bytes(bytes(64))
    assert_found_out(entry, documents)


@pytest.mark.parametrize("name", [INDEX_FILE, "text.documents", "text.hashes", "text-00000.tokens"])
@pytest.mark.parametrize(
    "damage", ["deleted", "emptied", "cut", "longer", "folder", "swapped", "noise"]
)
def test_damaged_files_are_found_out(entry, documents, name, damage):
    path = entry / name
    content = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage == "swapped":
        path.write_bytes((entry / "text-00001.tokens").read_bytes())
    elif damage != "deleted":
        changed = {"emptied": b"", "cut": content[:-1], "longer": content + b"x"}
        path.write_bytes(changed.get(damage, bytes(range(255, 0, -1))))
    if damage == "folder" and name == INDEX_FILE:
        with pytest.raises(OSError, match=INDEX_FILE):
            read_index(entry)
        cached_write(entry, documents, [])
        assert_holds(entry, documents)
    else:
        assert_found_out(entry, documents)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b'"text"',
        b"1e999",
        b"\xff\xfe",
        b"[" * 100_000,
        b"1" * 5000,
        b'{"crc": 0}',
        b'{"format": "legacy1bit tokens", "format_version": 1, "crc": 0}',
        b'{"format": "legacy1bit tokens", "format_version": 2, "crc": 0, "parts": {}}',
        b'{"format": null, "format_version": [], "crc": {}}',
    ],
)
def test_foreign_index_is_found_out(entry, documents, content):
    (entry / INDEX_FILE).write_bytes(content)
    assert_found_out(entry, documents)


@few
@given(st.data())
def test_index_with_other_values_is_found_out(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("cache") / "entry"
    write(folder, documents_of(256, 2))
    told = json.loads((folder / INDEX_FILE).read_bytes())
    inside = told["parts"]["text"]
    record = data.draw(st.sampled_from([told, inside]))
    name = data.draw(st.sampled_from(sorted(record)))
    before = record[name]
    record[name] = data.draw(
        st.sampled_from([None, -1, 10**30, 1.5, True, "", "|u1x", [], {}, [[]], "\ud800"])
    )
    if record[name] != before:
        (folder / INDEX_FILE).write_text(json.dumps(told))
        with pytest.raises(ShardError):
            read_index(folder)


def tell(folder, **changes):
    """Give an index other values, of its part where that has them, and the checksum of them."""
    told = json.loads((folder / INDEX_FILE).read_bytes())
    del told["crc"]
    for name, value in changes.items():
        place = told["parts"]["text"] if name in told["parts"]["text"] else told
        place[name] = value
    told["crc"] = shards._crc_of(told)
    (folder / INDEX_FILE).write_text(json.dumps(told))


FORGED = {
    "no shards": ({"shard_tokens": 0}, "shard_tokens is 0, expected 1 or more"),
    "fewer than none": ({"shard_tokens": -1}, "shard_tokens is -1"),
    "half a token": ({"shard_tokens": 1.5}, "shard_tokens is 1.5"),
    "tokens of text": ({"tokens": "9"}, "tokens is '9', expected a whole number"),
    "tokens below 0": ({"tokens": -1}, "tokens is -1, expected a whole number"),
    "tokens as truth": ({"tokens": True}, "tokens is True, expected a whole number"),
    "tokens of nobody": ({"documents": 0}, "tokens are not those of 0 documents"),
    "many documents": ({"documents": 10**30}, "tokens are not those of 1000000"),
    "shards without end": ({"tokens": 10**12, "shard_tokens": 1}, "has 64 bytes, expected"),
    "numbers with a point": ({"dtype": "<f4"}, "dtype is '<f4', expected one of"),
    "objects": ({"dtype": "O"}, "dtype is 'O'"),
    "nothing": ({"dtype": "<U0"}, "dtype is '<U0'"),
    "a list": ({"dtype": [["a", "<u1"]]}, r"dtype is \[\['a', '<u1'\]\]"),
    "no text": ({"source": ["source"]}, "source is"),
    "a key with a line break": ({"more\nof it": 0}, "unexpected keyword argument 'more of it'$"),
}


@pytest.mark.parametrize(("changes", "message"), FORGED.values(), ids=FORGED)
def test_index_that_is_forged_is_found_out(entry, changes, message):
    """A checksum that fits is no reason to believe the rest."""
    tell(entry, **changes)
    with pytest.raises(ShardError, match=message):
        read_index(entry)


@pytest.mark.parametrize("name", ["", "..", "../text", "/text", "a/b", "text\0", "\ud800", "t\n"])
def test_parts_are_in_the_folder(entry, name):
    told = json.loads((entry / INDEX_FILE).read_bytes())
    tell(entry, parts={name: told["parts"]["text"]})
    with pytest.raises(ShardError, match="a part is called"):
        read_index(entry)


def test_part_that_is_not_there_is_named(entry):
    index = read_index(entry)
    with pytest.raises(ShardError, match="has the parts text, expected training"):
        open_store(entry, index, "training")


@pytest.mark.parametrize("change", ["swapped", "equal", "negative", "late", "beyond"])
def test_documents_lie_one_behind_the_other(entry, change):
    """Rows of places below 0 were read for ever."""
    path = entry / "text.documents"
    places = np.frombuffer(path.read_bytes(), "<i8").copy()
    if change == "swapped":
        places[1:3] = places[2:0:-1].copy()
    elif change == "equal":
        places[1] = places[2]
    else:
        place, value = {"negative": (0, -1), "late": (0, 1), "beyond": (-1, 1 << 40)}[change]
        places[place] = value
    path.write_bytes(places.tobytes())
    tell(entry, documents_crc=zlib.crc32(places.tobytes()))
    with pytest.raises(ShardError, match="expected where documents begin"):
        read_index(entry)


def test_shards_of_other_sizes_are_found_out(entry):
    """All together they hold what they held."""
    first, second = (entry / f"text-0000{number}.tokens" for number in range(2))
    both = first.read_bytes() + second.read_bytes()
    first.write_bytes(both[:1])
    second.write_bytes(both[1:])
    with pytest.raises(ShardError, match=r"text-00000\.tokens has 1 bytes, expected a file of 64"):
        read_index(entry)


# --- Splits ---------------------------------------------------------------------------------------


@few
@given(st.data(), st.sampled_from([1, 2, 3, 1024]), st.sampled_from([0.0, 1e-9, 0.25, 0.5, 1.0]))
def test_documents_are_split_by_their_hashes(tmp_path_factory, data, block, share):
    """As if each part had been written alone, whatever number of documents is read at once."""
    folder = tmp_path_factory.mktemp("split") / "entry"
    hashes = data.draw(st.lists(st.sampled_from([0, 1 << 30, (1 << 31) - 1, 1 << 31, 2**32 - 1])))
    sizes = data.draw(st.lists(st.integers(0, 5), min_size=len(hashes), max_size=len(hashes)))
    documents = [np.full(size, 2 + number % 200) for number, size in enumerate(sizes)]
    one = np.ones(1, np.int32)
    with ShardWriter(folder, ("text",), 256, 7) as writer:
        for document, hashed in zip(documents, hashes, strict=True):
            writer.begin_document("text", hashed)
            writer.write("text", np.concatenate([one, document]), document.size)
        writer.write("text", one)
        index = writer.finish(*KNOWN)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "_BLOCK_DOCUMENTS", block)
        stores = split_documents(folder, index, "text", share)
        for validates, store in zip((False, True), stores, strict=True):
            own = [
                np.concatenate([one, document])
                for document, hashed in zip(documents, hashes, strict=True)
                if (hashed < share * 2**32) == validates
            ]
            expected = np.concatenate([*own, one])
            assert (store.size, store.stop) == (expected.size, expected.size - 1)
            start = data.draw(st.integers(0, store.size))
            stop = data.draw(st.integers(start, store.size))
            assert_same_bits(store.read(start, stop), expected[start:stop].astype(np.int32))
            assert store.document_count == len(own)
            begins, ends = store.document_bounds(np.arange(len(own)))
            assert (ends - begins).tolist() == [document.size for document in own]
            if own:
                assert begins[0] == 0
                width = store.size
                found = store.document_begins(np.zeros(1, np.int64), width)[0]
                each = [np.full(e - b, b) for b, e in zip(begins, ends, strict=True)]
                assert found[:-1].tolist() == np.concatenate(each).tolist()


def test_split_keeps_files_open_no_longer_than_it_is_used(entry):
    stores = split_documents(entry, read_index(entry), "text", 0.5)
    assert not remove_unused(entry)
    del stores
    assert remove_unused(entry)


def test_folders_of_the_first_version_are_read(entry, documents):
    """They had no hashes, and were never split."""
    tell(entry, format_version=1)
    record = json.loads((entry / INDEX_FILE).read_bytes())
    del record["parts"]["text"]["hashes_crc"], record["crc"]
    (entry / INDEX_FILE).write_text(json.dumps({**record, "crc": shards._crc_of(record)}))
    (entry / "text.hashes").unlink()
    assert_holds(entry, documents)
    with pytest.raises(ShardError, match="has no hashes of documents"):
        split_documents(entry, read_index(entry), "text", 0.5)


# --- The cache ------------------------------------------------------------------------------------


def test_cached_writes_once(entry, documents):
    calls = []
    for _ in range(2):
        assert cached_write(entry, documents, calls) == read_index(entry)
    assert not calls


@pytest.mark.parametrize("known", [("other", "tokenizer"), ("source", "other")])
def test_cached_writes_anew_what_is_of_something_else(entry, documents, known):
    calls = []
    write(entry, documents_of(256, 3, seed=5), known=(*known, "0" * 64))
    cached_write(entry, documents, calls)
    assert calls == [entry]
    assert_holds(entry, documents)


def test_default_cache_needs_a_home(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert shards.default_cache() == Path("/somewhere/legacy1bit")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert shards.default_cache() == Path("/home/me/.cache/legacy1bit")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    with pytest.raises(ValueError, match="--cache"):
        shards.default_cache()


def test_token_store_copies_have_the_same_tokens_or_are_refused(tmp_path):
    tokens = np.arange(90, dtype=np.uint8)
    path = tmp_path / "tokens.bin"
    path.write_bytes(tokens.tobytes())
    for copied in (copy.copy, copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))):
        store = TokenStore([tokens], np.array([0, 40])).window(10, 80)
        twin = copied(store)
        assert_same_bits(twin.read(0, 70), store.read(0, 70))
        assert_same_bits(
            twin.document_begins(np.array([0]), 70), store.document_begins(np.array([0]), 70)
        )
    for copied in (copy.copy, copy.deepcopy, pickle.dumps):
        # The number that the system gives an open file would be another's one day.
        with pytest.raises(TypeError, match=r"tokens\.bin is open, and cannot be copied"):
            copied(IntegerFile(path, np.uint8))
    with pytest.raises(TypeError, match="is open, and cannot be copied"):
        copy.deepcopy(TokenStore([IntegerFile(path, np.uint8)]))


@pytest.mark.parametrize("width", [0, 1, 2, 5, 9])
def test_documents_that_are_longer_than_a_width_are_counted(width, monkeypatch):
    monkeypatch.setattr(shards, "_BLOCK_DOCUMENTS", 2)
    monkeypatch.setattr(shards, "_COUNTED", 2)
    lengths = np.array([3, 1, 9, 2, 2, 6, 1, 1, 10])
    ends = np.cumsum(lengths)
    store = TokenStore([np.arange(ends[-1] + 1)], ends - lengths, int(ends[-1]))
    assert store.longer_documents(width) == (lengths > width).sum()
    # What a window cuts off of documents does not count.
    cut = np.array([8, 2, 2, 6, 1, 1, 7])
    assert store.window(5, 32).longer_documents(width) == (cut > width).sum()
