"""Writing files whole or not at all (departure 12)."""

import errno
import os
import stat
import threading

import pytest

from legacy1bit import files
from legacy1bit.files import atomic_write, atomic_write_all

OLD, NEW = b"the old content", b"the new content, longer"


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

    def call(*args):
        if function == "fsync" and stat.S_ISDIR(os.fstat(args[0]).st_mode):
            return real(*args)
        if next(calls) != failing:
            return real(*args)
        if function == "write":
            return FullFile(real(*args), error())
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
