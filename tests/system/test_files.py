"""Writing files whole or not at all (departure 12)."""

import bz2
import errno
import gzip
import io
import lzma
import os
import pickle
import shutil
import stat
import subprocess
import sys
import tarfile
import threading
import zipfile
from os import fsync
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save

from helpers.arrays import assert_same_bits
from legacy1bit.system import files
from legacy1bit.system.files import (
    NAME_CHARACTERS,
    atomic_copies,
    atomic_copy,
    atomic_path,
    atomic_write,
    atomic_write_all,
    kind_of_file,
    read_regular,
    temporaries,
    temporary_of,
)
from legacy1bit.training.run import WRITTEN_FILES

OLD, NEW = b"the old content", b"the new content, longer"


@pytest.fixture(autouse=True)
def _waiting_for_the_disk(monkeypatch):
    """Here, unlike in other tests."""
    monkeypatch.setattr(os, "fsync", fsync)


@pytest.fixture
def old_file(tmp_path):
    path = tmp_path / "file.bin"
    path.write_bytes(OLD)
    return path


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


ERRORS = {
    "OSError": lambda *names: OSError(errno.ENOSPC, "No space left on device", *names),
    "KeyboardInterrupt": lambda *names: KeyboardInterrupt(),
}
FUNCTIONS = ("open", "write", "fsync", "replace")


class FullFile:
    """A file that takes one byte and no more."""

    def __init__(self, file, error):
        self.file, self.error = file, error

    def write(self, data):
        self.file.write(data[:1])
        self.file.flush()
        raise self.error

    def __enter__(self):
        return self

    def __exit__(self, *raised):
        self.file.close()


def fail_at(patch, function, failing=0, error=ERRORS["OSError"]):
    """Let a function fail at the call of that index, of those for files; folders do not count.

    The errors name what the system's would.
    """
    calls = iter(range(1000))
    real = open if function in ("open", "write") else getattr(os, function)

    def call(*args, **options):
        if function == "fsync" and stat.S_ISDIR(os.fstat(args[0]).st_mode):
            return real(*args)
        if next(calls) != failing:
            return real(*args, **options)
        if function == "write":
            return FullFile(real(*args, **options), error())
        if function == "replace":
            raise error(str(args[0]), None, str(args[1]))
        raise error(*(str(args[0]),) if function == "open" else ())

    if function in ("open", "write"):
        patch.setattr(files, "open", call, raising=False)
    else:
        patch.setattr(os, function, call)


@pytest.mark.parametrize("content", [b"", b"\x00\xff\n\r\n", NEW, bytes(1 << 20)], ids=len)
def test_atomic_write_writes_bytes(tmp_path, content):
    atomic_write(tmp_path / "new", content)
    assert (tmp_path / "new").read_bytes() == content
    assert names(tmp_path) == ["new"]


def test_atomic_write_writes_text_as_utf8_with_the_line_ends_it_has(tmp_path):
    atomic_write(tmp_path / "new", "naïve €\r\nline\n")
    assert (tmp_path / "new").read_bytes() == "naïve €\r\nline\n".encode()


@pytest.mark.parametrize("header", [{}, {"b": "2", "a": '\u00e4 "1"'}], ids=["plain", "told"])
def test_tensors_are_those_of_the_library(tmp_path, header):
    rng = np.random.default_rng(1)
    tensors = {
        "z": rng.standard_normal((3, 5), np.float32),
        "a": rng.standard_normal(7).astype(np.float16),
        "codes": rng.integers(0, 255, (4, 3), np.uint8),
        "alone": np.float32(1.5).reshape(()),
        "turned": rng.standard_normal((2, 6), np.float32).T,
        "none": np.zeros((0, 4), np.float32),
        "b": rng.integers(-9, 9, 5, np.int8),
    }
    parts = files.serialize_tensors(tensors, header)
    files.atomic_write(tmp_path / "file", parts)
    content = (tmp_path / "file").read_bytes()
    assert content == b"".join(parts)
    found = load_file(tmp_path / "file")
    assert found.keys() == tensors.keys()
    for name, values in tensors.items():
        assert_same_bits(found[name], np.ascontiguousarray(values).reshape(values.shape), name)
    with safe_open(tmp_path / "file", framework="numpy") as file:
        assert (file.metadata() or {}) == header
    # Not the head, whose order is left to chance there.
    whole = {name: np.array(values, order="C") for name, values in tensors.items()}
    size = sum(values.nbytes for values in whole.values())
    assert content[-size:] == save(whole)[-size:]


def test_atomic_write_replaces_a_file(old_file):
    atomic_write(old_file, NEW)
    assert old_file.read_bytes() == NEW
    assert names(old_file.parent) == [old_file.name]


def test_atomic_write_takes_strings_and_relative_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    atomic_write("plain", NEW)
    atomic_write(str(tmp_path / "absolute"), NEW)
    assert names(tmp_path) == ["absolute", "plain"]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_atomic_write_obeys_the_umask(tmp_path, umask):
    former = os.umask(umask)
    try:
        atomic_write(tmp_path / "new", NEW)
        assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o666 & ~umask
    finally:
        assert os.umask(former) == umask


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_atomic_write_that_fails_leaves_what_was_there(old_file, monkeypatch, function, error):
    for path in (old_file, old_file.with_name("other")):
        with monkeypatch.context() as patch:
            fail_at(patch, function, error=ERRORS[error])
            with pytest.raises(type(ERRORS[error]())):
                atomic_write(path, NEW)
    assert old_file.read_bytes() == OLD
    assert names(old_file.parent) == [old_file.name]


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")
@pytest.mark.parametrize("function", ["write", "fsync", "replace"])
def test_atomic_write_closes_its_file_when_it_fails(old_file, monkeypatch, function):
    before = len(os.listdir("/proc/self/fd"))
    fail_at(monkeypatch, function)
    with pytest.raises(OSError, match="space"):
        atomic_write(old_file, NEW)
    assert len(os.listdir("/proc/self/fd")) == before


def test_atomic_write_rejects_text_that_is_no_unicode(old_file):
    with pytest.raises(UnicodeEncodeError):
        atomic_write(old_file, "\ud800")
    assert old_file.read_bytes() == OLD
    assert names(old_file.parent) == [old_file.name]


def test_atomic_write_demands_a_folder(tmp_path):
    (tmp_path / "file").write_bytes(OLD)
    for error, path in (
        (FileNotFoundError, tmp_path / "missing" / "file"),
        (NotADirectoryError, tmp_path / "file" / "file"),
        (OSError, tmp_path),
    ):
        with pytest.raises(error, match="directory") as caught:
            atomic_write(path, NEW)
        assert f"'{path}'" in str(caught.value)
    assert names(tmp_path) == ["file"]


def test_atomic_write_has_the_content_on_the_disk_before_it_takes_the_name(old_file, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace

    def watched_fsync(handle):
        fsync(handle)
        events.append((os.fstat(handle).st_ino, os.fstat(handle).st_size))

    def watched_replace(source, target):
        # One of the two is complete at every moment, in the same file system.
        assert old_file.read_bytes() == OLD
        assert os.path.dirname(source) == str(old_file.parent)
        assert events == [(os.stat(source).st_ino, len(NEW))]
        replace(source, target)
        events.append("replaced")

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", watched_replace)
    atomic_write(old_file, NEW)
    assert events[1:] == ["replaced", (old_file.parent.stat().st_ino, events[2][1])]


def test_atomic_write_does_without_a_folder_that_cannot_be_synced(old_file, monkeypatch):
    fsync = os.fsync

    def only_files(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", only_files)
    atomic_write(old_file, NEW)
    assert old_file.read_bytes() == NEW


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_atomic_write_tells_of_a_name_that_may_be_lost(old_file, monkeypatch, number):
    fsync = os.fsync

    def only_files(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", only_files)
    with pytest.raises(OSError, match=os.strerror(number)) as caught:
        atomic_write(old_file, NEW)
    assert caught.value.filename == str(old_file.parent)


def test_atomic_write_from_several_threads_leaves_one_content_whole(tmp_path):
    path, contents = tmp_path / "file", [bytes([i]) * 10_000 for i in range(4)]

    def write(content):
        for _ in range(5):
            atomic_write(path, content)

    threads = [threading.Thread(target=write, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_bytes() in contents
    assert names(tmp_path) == ["file"]


# --- Names and permissions ------------------------------------------------------------------------


def write_through_path(path, content):
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def write_copy(path, content):
    source = path.with_name("source")
    source.write_bytes(content)
    atomic_copy(source, path)
    source.unlink()


WRITERS = pytest.mark.parametrize(
    "write", [atomic_write, write_through_path, write_copy], ids=["write", "path", "copy"]
)


@WRITERS
@pytest.mark.parametrize(
    "name", ["n" * 218, "n" * 255, "\u6587" * 80, "\U0001f600" * 63], ids=[218, 255, 240, 252]
)
def test_atomic_write_takes_every_name_that_the_system_takes(tmp_path, write, name):
    for content in (OLD, NEW):
        write(tmp_path / name, content)
        assert (tmp_path / name).read_bytes() == content
    assert names(tmp_path) == [name]


def test_temporaries_names_what_the_files_of_a_run_were_to_become(tmp_path):
    assert max(map(len, WRITTEN_FILES)) < NAME_CHARACTERS
    wanted = {temporary_of(tmp_path / name): name for name in WRITTEN_FILES}
    longer = temporary_of(tmp_path / "checkpoint.safetensors and more")
    for path in (*wanted, longer):
        path.touch()
    left = dict(temporaries(tmp_path))
    assert left.pop(longer) not in WRITTEN_FILES
    assert left == wanted


@pytest.fixture
def _usual_umask():
    former = os.umask(0o022)
    yield
    os.umask(former)


def mode_of(path):
    return stat.S_IMODE(path.stat().st_mode)


@WRITERS
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o400, 0o444])
@pytest.mark.usefixtures("_usual_umask")
def test_atomic_write_keeps_the_permissions_of_what_it_replaces(old_file, write, mode):
    old_file.chmod(mode)
    write(old_file, NEW)
    assert old_file.read_bytes() == NEW
    assert mode_of(old_file) == mode


@pytest.mark.usefixtures("_usual_umask")
def test_atomic_write_keeps_wider_permissions_for_all_but_copies(old_file):
    old_file.chmod(0o666)
    atomic_write(old_file, OLD)
    assert mode_of(old_file) == 0o666
    write_copy(old_file, NEW)
    assert mode_of(old_file) == 0o644


@pytest.mark.usefixtures("_usual_umask")
def test_atomic_write_is_private_before_it_is_complete(old_file, monkeypatch):
    old_file.chmod(0o640)
    seen = []

    class Watched(FullFile):
        def write(self, data):
            seen.append(stat.S_IMODE(os.fstat(self.file.fileno()).st_mode))
            self.file.write(data)

        def __getattr__(self, name):
            return getattr(self.file, name)

    real = open
    opened = lambda *names, **options: Watched(real(*names, **options), None)  # noqa: E731
    monkeypatch.setattr(files, "open", opened, raising=False)
    atomic_write(old_file, NEW)
    monkeypatch.undo()
    with atomic_path(old_file) as temporary:
        temporary.write_bytes(NEW)
        seen.append(mode_of(temporary))
    assert seen == [0o600, 0o600]
    assert mode_of(old_file) == 0o640


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
@WRITERS
def test_atomic_write_keeps_the_owner_of_what_it_replaces(old_file, write):
    os.chown(old_file, 12345, 23456)
    write(old_file, NEW)
    assert (old_file.stat().st_uid, old_file.stat().st_gid) == (12345, 23456)


@WRITERS
def test_atomic_write_does_without_an_owner_it_may_not_give(old_file, write, monkeypatch):
    def refuse(*names):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "chown", refuse)
    monkeypatch.setattr(os, "chmod", refuse)
    write(old_file, NEW)
    assert old_file.read_bytes() == NEW


@pytest.mark.parametrize("others", [0o644, None])
@pytest.mark.usefixtures("_usual_umask")
def test_atomic_copy_is_never_more_open_than_its_source(tmp_path, monkeypatch, others):
    source, target = tmp_path / "source", tmp_path / "target"

    def refuse(*names):
        raise OSError(errno.EPERM, "Operation not permitted", *map(str, names))

    for link in (os.link, refuse):
        monkeypatch.setattr(os, "link", link)
        source.write_bytes(NEW)
        source.chmod(0o600)
        target.unlink(missing_ok=True)
        if others is not None:
            target.write_bytes(OLD)
            target.chmod(others)
        atomic_copy(source, target)
        assert (target.read_bytes(), mode_of(target), mode_of(source)) == (NEW, 0o600, 0o600)


# --- Files that belong together -------------------------------------------------------------------


@pytest.fixture
def three(tmp_path):
    """What three files hold in two folders, one of them a new file, and what they are to hold."""
    (tmp_path / "deep").mkdir()
    paths = [tmp_path / "a", tmp_path / "deep" / "b", tmp_path / "c"]
    for path in paths[:2]:
        path.write_bytes(OLD)
    return {path: bytes([i]) * 100 for i, path in enumerate(paths)}


def contents(paths):
    """Every file beside those."""
    folders = {path.parent for path in paths}
    return {p: p.read_bytes() for folder in folders for p in folder.iterdir() if p.is_file()}


def test_atomic_write_all_writes_bytes_and_text(three):
    text = three.popitem()[0]
    atomic_write_all({**three, text: "naïve\r\n"})
    assert contents(three) == {**three, text: "naïve\r\n".encode()}


def test_atomic_write_all_of_nothing_does_nothing():
    atomic_write_all({})


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("failing", [0, 1, 2])
@pytest.mark.parametrize("function", ["open", "write", "fsync"])
def test_atomic_write_all_writes_all_or_none(three, monkeypatch, function, failing, error):
    before = contents(three)
    with monkeypatch.context() as patch:
        fail_at(patch, function, failing, ERRORS[error])
        with pytest.raises(type(ERRORS[error]())):
            atomic_write_all(three)
    assert contents(three) == before
    atomic_write_all(three)
    assert contents(three) == three


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("failing", [0, 1, 2])
def test_atomic_write_all_leaves_whole_files_where_one_cannot_take_its_place(
    three, monkeypatch, failing, error
):
    expected = {**contents(three), **dict(list(three.items())[:failing])}
    with monkeypatch.context() as patch:
        fail_at(patch, "replace", failing, ERRORS[error])
        with pytest.raises(type(ERRORS[error]())):
            atomic_write_all(three)
    assert contents(three) == expected


@pytest.mark.parametrize("failing", [0, 1, 2])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_atomic_write_all_names_the_file_it_could_not_write(three, monkeypatch, function, failing):
    with monkeypatch.context() as patch:
        fail_at(patch, function, failing)
        with pytest.raises(OSError, match="No space left on device") as caught:
            atomic_write_all(three)
    assert caught.value.errno == errno.ENOSPC
    assert f"'{list(three)[failing]}'" in str(caught.value)


@pytest.mark.parametrize("position", [0, 1, 2])
def test_atomic_write_all_writes_none_where_one_is_wrong(three, position):
    before, items = contents(three), list(three.items())
    missing = items[0][0].parent / "missing" / "file"
    for item, error in (((missing, NEW), FileNotFoundError),
                        ((missing.parent, "\ud800"), UnicodeEncodeError)):  # fmt: skip
        with pytest.raises(error):
            atomic_write_all(dict([*items[:position], item, *items[position:]]))
        assert contents(three) == before


def test_atomic_write_all_has_all_on_the_disk_before_any_takes_its_name(three, monkeypatch):
    events, fsync, replace = [], os.fsync, os.replace

    def watched_fsync(handle):
        fsync(handle)
        status = os.fstat(handle)
        is_folder = stat.S_ISDIR(status.st_mode)
        events.append("folder" if is_folder else (status.st_ino, status.st_size))

    def watched_replace(source, target):
        status = os.stat(source)
        assert (status.st_ino, status.st_size) in events[:3]
        assert os.path.dirname(source) == str(target.parent)
        replace(source, target)
        events.append(target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", watched_replace)
    atomic_write_all(three)
    assert [size for _, size in events[:3]] == [100] * 3
    assert events[3:] == [*three, "folder", "folder"]


# --- Files that others write ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", [str, lambda path: path], ids=["str", "Path"])
def test_atomic_path_lets_others_write_a_file(old_file, kind):
    for path in (old_file, old_file.with_name("other")):
        with atomic_path(kind(path)) as temporary:
            assert temporary.parent == old_file.parent
            temporary.write_bytes(NEW)
            assert old_file.read_bytes() == (OLD if path == old_file else NEW)
        assert path.read_bytes() == NEW
    assert names(old_file.parent) == [old_file.name, "other"]


def test_atomic_path_leaves_their_names_to_other_files(old_file, tmp_path):
    with (
        pytest.raises(FileNotFoundError, match="missing"),
        atomic_path(old_file),
        open(tmp_path / "missing"),
    ):
        pass
    assert old_file.read_bytes() == OLD


@pytest.mark.parametrize("error", ERRORS)
def test_atomic_path_leaves_what_was_there_where_writing_fails(old_file, error):
    raised = ERRORS[error]()

    def write():
        with atomic_path(old_file) as temporary:
            temporary.write_bytes(NEW[:1])
            raise raised

    with pytest.raises(type(raised)) as caught:
        write()
    assert error != "OSError" or caught.value.filename == str(old_file)
    assert old_file.read_bytes() == OLD
    assert names(old_file.parent) == [old_file.name]


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("function", ["open", "fsync", "replace"])
def test_atomic_path_leaves_what_was_there_where_it_fails_itself(
    old_file, monkeypatch, function, error
):
    for path in (old_file, old_file.with_name("other")):
        with monkeypatch.context() as patch:
            fail_at(patch, function, error=ERRORS[error])
            with pytest.raises(type(ERRORS[error]())), atomic_path(path) as temporary:
                temporary.write_bytes(NEW)
    assert old_file.read_bytes() == OLD
    assert names(old_file.parent) == [old_file.name]


LIMITED = """
import resource, sys, numpy as np
from legacy1bit.system.files import atomic_path
resource.setrlimit(resource.RLIMIT_FSIZE, (10000, 10000))
with atomic_path(sys.argv[1]) as path, open(path, "wb") as file:
    np.zeros(1 << 16).tofile(file)
"""


def test_atomic_path_says_what_numpy_does_not(old_file):
    """Why a file could not be written whole: its errors have neither number nor reason."""
    command = [sys.executable, "-c", LIMITED, old_file]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert f"File too large: '{old_file}'" in ended.stderr
    assert old_file.read_bytes() == OLD
    assert names(old_file.parent) == [old_file.name]


def test_atomic_path_says_what_an_error_without_a_number_says(old_file):
    def write():
        with atomic_path(old_file):
            raise OSError("some words")

    with pytest.raises(OSError, match=r"could not be written whole \(some words\)") as caught:
        write()
    assert caught.value.errno == errno.EIO


def test_atomic_path_demands_a_folder_and_a_file(tmp_path):
    missing = tmp_path / "missing" / "file"
    with (
        pytest.raises(FileNotFoundError, match="directory") as caught,
        atomic_path(missing) as temporary,
    ):
        temporary.write_bytes(NEW)
    assert f"'{missing}'" in str(caught.value)
    with pytest.raises(FileNotFoundError, match="never"), atomic_path(tmp_path / "never"):
        pass
    assert names(tmp_path) == []


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="no links to open files")
def test_atomic_writes_refuse_links_to_what_has_no_name():
    """As /dev/stdout is, where it is a pipe: what that leads to is called "pipe:[number]"."""
    reading, writing = os.pipe()
    try:
        path = Path(f"/proc/self/fd/{writing}")
        with pytest.raises(OSError, match="Is not a regular file") as caught:
            atomic_write(path, b"x")
        with pytest.raises(OSError, match="Is not a regular file") as same, atomic_path(path):
            pass
    finally:
        os.close(reading)
        os.close(writing)
    assert caught.value.filename == same.value.filename == str(path)


def test_atomic_path_has_the_content_on_the_disk_before_it_takes_the_name(old_file, monkeypatch):
    events, fsync, replace = [], os.fsync, os.replace

    def watched_fsync(handle):
        fsync(handle)
        events.append((os.fstat(handle).st_ino, os.fstat(handle).st_size))

    def watched_replace(source, target):
        assert old_file.read_bytes() == OLD
        assert events == [(os.stat(source).st_ino, len(NEW))]
        replace(source, target)
        events.append("replaced")

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", watched_replace)
    with atomic_path(old_file) as temporary:
        temporary.write_bytes(NEW)
    assert events[1:] == ["replaced", (old_file.parent.stat().st_ino, events[2][1])]


# --- Copies ---------------------------------------------------------------------------------------


@pytest.fixture
def originals(tmp_path):
    """Three files to copy."""
    paths = [tmp_path / name for name in "abc"]
    for i, path in enumerate(paths):
        path.write_bytes(bytes([i]) * 100)
    return paths


@pytest.fixture(params=["link", "copy"])
def _links(request, monkeypatch):
    """Whether the file system gives a file a second name."""

    def refuse(*names):
        raise OSError(errno.EPERM, "Operation not permitted", *map(str, names))

    if request.param == "copy":
        monkeypatch.setattr(os, "link", refuse)


def held(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.usefixtures("_links")
def test_atomic_copies_puts_copies_into_a_folder_it_makes(originals, tmp_path):
    expected = {path.name: path.read_bytes() for path in originals}
    atomic_copies(iter(originals), tmp_path / "deep" / "copies")
    assert held(tmp_path / "deep" / "copies") == expected
    assert {path.name: path.read_bytes() for path in originals} == expected


def test_atomic_copies_costs_no_room_where_files_have_second_names(originals, tmp_path):
    atomic_copies(originals, tmp_path / "copies")
    assert all(path.samefile(tmp_path / "copies" / path.name) for path in originals)


@pytest.mark.usefixtures("_links")
def test_atomic_copies_stay_when_their_originals_are_replaced(originals, tmp_path):
    before = {path.name: path.read_bytes() for path in originals}
    atomic_copies(originals, tmp_path / "copies")
    for path in originals:
        atomic_write(path, NEW)
    assert held(tmp_path / "copies") == before
    atomic_write(tmp_path / "copies" / "a", OLD)
    assert all(path.read_bytes() == NEW for path in originals)


@pytest.mark.usefixtures("_links")
def test_atomic_copies_are_of_what_links_lead_to(originals, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(originals[1])
    before = originals[1].read_bytes()
    atomic_copies([link], tmp_path / "copies")
    atomic_write(link, NEW)
    assert originals[1].read_bytes() == NEW
    assert held(tmp_path / "copies") == {"link": before}


@pytest.mark.usefixtures("_links")
def test_atomic_copies_takes_the_place_of_earlier_copies(originals, tmp_path):
    atomic_copies(originals, tmp_path / "copies")
    atomic_write(originals[1], NEW)
    # Two of three are two names of one content already.
    for _ in range(3):
        atomic_copies(originals, tmp_path / "copies")
        assert held(tmp_path / "copies") == {path.name: path.read_bytes() for path in originals}


@pytest.mark.usefixtures("_links")
def test_atomic_copies_leaves_other_files_alone(originals, tmp_path):
    (tmp_path / "copies").mkdir()
    (tmp_path / "copies" / "other").write_bytes(OLD)
    atomic_copies(originals[:1], tmp_path / "copies")
    assert held(tmp_path / "copies") == {"a": originals[0].read_bytes(), "other": OLD}


def breaking_copy(patch, failing, error):
    """Let no file have a second name, and the copy of that index fail with half of it written."""
    calls = iter(range(1000))
    real = os.fsync

    def refuse(*names):
        raise OSError(errno.EXDEV, "Invalid cross-device link", *map(str, names))

    def half_of_it(handle):
        if stat.S_ISREG(os.fstat(handle).st_mode) and next(calls) == failing:
            raise error()
        real(handle)

    def copyfile(source, target, **options):
        with open(source, "rb") as whole, open(target, "wb") as part:
            content = whole.read()
            part.write(content[:10])
            part.flush()
            half_of_it(part.fileno())
            part.write(content[10:])
        return target

    patch.setattr(os, "link", refuse)
    patch.setattr(os, "fsync", half_of_it)
    patch.setattr(shutil, "copyfile", copyfile)


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("failing", [0, 1, 2])
@pytest.mark.parametrize("function", ["copy", "replace"])
def test_atomic_copies_that_fail_leave_whole_files_alone(
    originals, tmp_path, monkeypatch, function, failing, error
):
    copies = tmp_path / "copies"
    atomic_copies(originals, copies)
    before = held(copies)
    for path in originals:
        atomic_write(path, NEW + path.name.encode())
    with monkeypatch.context() as patch:
        if function == "copy":
            breaking_copy(patch, failing, ERRORS[error])
        else:
            fail_at(patch, "replace", failing, ERRORS[error])
        with pytest.raises(type(ERRORS[error]())):
            atomic_copies(originals, copies)
    done = [path.name for path in originals[:failing]]
    assert held(copies) == before | {name: NEW + name.encode() for name in done}
    atomic_copies(originals, copies)
    assert held(copies) == {path.name: path.read_bytes() for path in originals}


@pytest.mark.usefixtures("_links")
def test_atomic_copies_demands_files_to_copy(originals, tmp_path):
    with pytest.raises(FileNotFoundError, match="missing"):
        atomic_copies([originals[0], tmp_path / "missing"], tmp_path / "copies")
    assert names(tmp_path / "copies") == ["a"]


def test_atomic_copies_demands_a_folder_to_copy_to(originals, tmp_path):
    with pytest.raises(FileExistsError, match=r"'.*/a'"):
        atomic_copies(originals, originals[0])


@pytest.mark.usefixtures("_links")
def test_atomic_copies_has_the_content_on_the_disk_before_it_takes_the_name(
    originals, tmp_path, monkeypatch
):
    """An original is on the disk, and so is its second name's content; a copy must be put there."""
    on_disk = {path.stat().st_ino for path in originals}
    fsync, replace = os.fsync, os.replace

    def watched_fsync(handle):
        fsync(handle)
        if os.fstat(handle).st_size == 100:
            on_disk.add(os.fstat(handle).st_ino)

    def watched_replace(source, target):
        assert os.stat(source).st_ino in on_disk
        replace(source, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", watched_replace)
    atomic_copies(originals, tmp_path / "copies")
    assert names(tmp_path / "copies") == ["a", "b", "c"]


def test_atomic_copies_puts_the_folder_onto_the_disk(originals, tmp_path, monkeypatch):
    synced, fsync = [], os.fsync

    def watched(handle):
        fsync(handle)
        synced.append((os.fstat(handle).st_ino, names(tmp_path / "copies")))

    monkeypatch.setattr(os, "fsync", watched)
    atomic_copies(originals, tmp_path / "copies")
    assert synced[-1] == ((tmp_path / "copies").stat().st_ino, ["a", "b", "c"])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_only_regular_files_are_read(tmp_path, old_file):
    assert read_regular(old_file) == OLD
    os.mkfifo(tmp_path / "pipe")
    before = len(os.listdir("/dev/fd"))
    for path in (tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(OSError, match=f"Is not a regular file: '{path}'"):
            read_regular(path)
    os.truncate(old_file, 1 << 30)
    with pytest.raises(OSError, match=f"Is larger than 268435456 bytes: '{old_file}'"):
        read_regular(old_file)
    with pytest.raises(IsADirectoryError):
        read_regular(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_regular(tmp_path / "none")
    assert len(os.listdir("/dev/fd")) == before


# --- Kinds of files -------------------------------------------------------------------------------


def zipped(name, content=b"abc"):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, content)
    return file.getvalue()


def tarred():
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a.txt"))
    return file.getvalue()


def saved(write, *values):
    file = io.BytesIO()
    write(file, *values)
    return file.getvalue()


PICKLED = "a PyTorch checkpoint or another pickle"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 3\n"


@pytest.mark.parametrize(
    ("head", "name"),
    [
        (POINTER, "a Git LFS pointer"),
        (b"<!DOCTYPE html>\n<html>", "an HTML page"),
        (b"\xef\xbb\xbf\r\n<HTML lang='en'>", "an HTML page"),
        (b'<?xml version="1.0"?>\n<html xmlns="http://www.w3.org/1999/xhtml">', "an HTML page"),
        (b"GGUF\3\0\0\0", "a GGUF model"),
        (b"GGUF\0\0\0\3", "a GGUF model"),
        (save({"a": np.zeros(3)}), "a safetensors file of weights"),
        (zipped("model/data.pkl"), PICKLED),
        (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", PICKLED),
        *((pickle.dumps({"a": 1}, n), PICKLED) for n in range(2, 6)),
        (pickle.dumps(np.zeros(3), 2), PICKLED),
        (zipped("[Content_Types].xml"), "an office document or an e-book"),
        (zipped("mimetype", b"application/epub+zip"), "an office document or an e-book"),
        (saved(np.savez, np.zeros(3)), "a NumPy archive"),
        (saved(np.save, np.zeros(3)), "a NumPy array"),
        (zipped("a.txt"), "a ZIP archive"),
        (saved(lambda file: zipfile.ZipFile(file, "w").close()), "a ZIP archive"),
        (tarred(), "a tar archive"),
        (gzip.compress(b"a"), "a gzip file"),
        (lzma.compress(b"a"), "an xz file"),
        (bz2.compress(b"a"), "a bzip2 file"),
        (bz2.compress(b""), "a bzip2 file"),
        (b"\x28\xb5\x2f\xfd", "a Zstandard file"),
        (b"%PDF-1.7\n", "a PDF document"),
        (b"PAR1\x15\x04", "a Parquet file"),
        (b"ARROW1\0\0", "an Arrow file"),
    ],
    # Some of the bytes have the time in them.
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_kind_of_file_knows_what_is_mistaken_for_text(head, name):
    kind = kind_of_file(head[: files.HEAD_BYTES])
    assert kind.name == name
    assert kind.remedy


@pytest.mark.parametrize(
    "head",
    [
        b"",
        b"a text",
        b"<html5 is a word>",
        b"<p>A part of a page</p>",
        b"versions of https://git-lfs.github.com/spec/v1",
        b'{"text": "GGUF"}',
        b"# README\n<!doctype html>",
        b"BZh9 is how a bzip2 file begins",
        b"\x80\x02\x00\x01",  # tokens 640 and 256
        b"PK is short for peak",
        b"GGUF is a file format",
        b"PAR1S is one, too",
    ],
)
def test_kind_of_file_leaves_texts_and_tokens_alone(head):
    assert kind_of_file(head) is None
