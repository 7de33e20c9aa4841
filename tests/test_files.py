"""Writing files whole or not at all (departure 12)."""

import errno
import os
import stat
import threading

import pytest

from legacy1bit.files import atomic_write

OLD, NEW = b"the old content", b"the new content, longer"


@pytest.fixture
def old_file(tmp_path):
    path = tmp_path / "file.bin"
    path.write_bytes(OLD)
    return path


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


def fail_with(error):
    def fail(*args, **kwargs):
        raise error

    return fail


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


FAILURES = (
    OSError(errno.ENOSPC, "No space left on device"),
    KeyboardInterrupt(),
)


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("function", ["fsync", "replace", "fdopen", "chmod"])
def test_atomic_write_that_fails_leaves_what_was_there(old_file, monkeypatch, function, error):
    with monkeypatch.context() as patch:
        patch.setattr(os, function, fail_with(error))
        with pytest.raises(type(error)):
            atomic_write(old_file, NEW)
        with pytest.raises(type(error)):
            atomic_write(old_file.with_name("other"), NEW)
    assert old_file.read_bytes() == OLD
    assert names(old_file.parent) == [old_file.name]


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")
@pytest.mark.parametrize("function", ["fsync", "replace", "chmod"])
def test_atomic_write_closes_its_file_when_it_fails(old_file, monkeypatch, function):
    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(os, function, fail_with(FAILURES[0]))
    with pytest.raises(OSError, match="space"):
        atomic_write(old_file, NEW)
    assert len(os.listdir("/proc/self/fd")) == before


def test_atomic_write_rejects_text_that_is_no_unicode(old_file):
    with pytest.raises(UnicodeEncodeError):
        atomic_write(old_file, "\ud800")
    assert old_file.read_bytes() == OLD
    assert names(old_file.parent) == [old_file.name]


def test_atomic_write_demands_a_folder(tmp_path):
    with pytest.raises(FileNotFoundError):
        atomic_write(tmp_path / "missing" / "file", NEW)
    (tmp_path / "file").write_bytes(OLD)
    with pytest.raises(NotADirectoryError):
        atomic_write(tmp_path / "file" / "file", NEW)
    with pytest.raises(OSError, match="directory"):
        atomic_write(tmp_path, NEW)
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
