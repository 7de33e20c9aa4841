"""What strangers may send: every input that fuzzing has kept, and the promises of SECURITY.md."""

import contextlib
import functools
import importlib
import json
import marshal
import os
import pickle
import random
import struct
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from fuzz.fuzz import SPLIT, TARGETS, FaultError, Memory, changed, gguf_file, run, seeds, stored

INPUTS = {target: stored(target) for target in TARGETS}
WHOLE = dict(seeds())


def test_corpus_is_small():
    assert all(INPUTS.values())
    assert sum(len(data) for kept in INPUTS.values() for data in kept.values()) < 300_000


@pytest.mark.parametrize("target", TARGETS)
def test_every_input_is_read_or_refused_in_one_line(target):
    for data in INPUTS[target].values():
        run(target, data)


@pytest.mark.parametrize("target", TARGETS)
def test_inputs_of_others_are_read_or_refused_in_one_line(target):
    for other, kept in INPUTS.items():
        if other != target:
            for name, data in kept.items():
                if name.startswith("whole"):
                    run(target, data)


@pytest.mark.parametrize("target", TARGETS)
def test_files_that_are_whole_are_read(target):
    """What fuzzing begins with reaches the end of each reader, checksums included."""
    if not WHOLE[target]:
        pytest.skip("pyarrow is not there, which makes these files")
    for parts in WHOLE[target]:
        error = run(target, SPLIT.join(parts))
        if error is not None:
            raise error


# --- What counts as a fault -----------------------------------------------------------------------


def reading(monkeypatch, function):
    monkeypatch.setitem(TARGETS, "study", function)
    return run("study", b"")


LEADS_OUTSIDE = {
    "open": lambda folder: open(__file__).close(),
    "relative": lambda folder: os.listdir(),
    "above": lambda folder: open(folder / ".." / "x", "w").close(),
    "beside": lambda folder: open(f"{folder}x", "w").close(),
    "list": lambda folder: os.listdir("/"),
    "move": lambda folder: os.rename(folder / "a", "/nowhere/x"),
}


@pytest.mark.parametrize("way", LEADS_OUTSIDE.values(), ids=LEADS_OUTSIDE)
def test_run_finds_what_is_outside_of_the_folder(monkeypatch, way):
    def read(folder, parts):
        with contextlib.suppress(OSError):
            way(folder)
        for left in (f"{folder}x", folder.parent / "x"):
            Path(left).unlink(missing_ok=True)

    with pytest.raises(FaultError, match=r"^/.* was opened: "):
        reading(monkeypatch, read)


@pytest.mark.parametrize(
    "call",
    [
        lambda: pickle.loads(pickle.dumps(Path("x"))),
        lambda: marshal.loads(marshal.dumps(1)),
        lambda: eval("1 + 1"),
        lambda: subprocess.run(["true"], check=True),
    ],
)
def test_run_finds_what_no_reader_may_call(monkeypatch, call):
    with pytest.raises(FaultError, match="was called"):
        reading(monkeypatch, lambda folder, parts: call())


def test_run_lets_modules_be_loaded(monkeypatch):
    monkeypatch.delitem(sys.modules, "this", raising=False)
    assert reading(monkeypatch, lambda folder, parts: importlib.import_module("this")) is None


@pytest.mark.memory
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_memory_finds_what_a_file_does_not_account_for(monkeypatch):
    watch = Memory("study")
    for size in (1 << 20, 1 << 26):
        take = functools.partial(lambda size, folder, parts: bytearray(b"x") * size, size)
        with contextlib.nullcontext() if size == 1 << 20 else pytest.raises(FaultError, match="of"):
            reading(monkeypatch, take)
            watch.check(b"")


@pytest.mark.parametrize("message", ["damaged", "{folder} is\ndamaged", "{folder}" + "x" * 5000])
def test_run_finds_errors_that_are_no_line_with_a_name(monkeypatch, message):
    def read(folder, parts):
        raise ValueError(message.replace("{folder}", str(folder)))

    if message.endswith("x"):
        # What a command prints is cut.
        assert len(str(reading(monkeypatch, read))) > 5000
    else:
        with pytest.raises(FaultError, match="no line that names the file"):
            reading(monkeypatch, read)


@pytest.mark.parametrize("error", [KeyError, TypeError, MemoryError, RecursionError, OverflowError])
def test_run_lets_other_errors_through(monkeypatch, error):
    def read(folder, parts):
        raise error

    with pytest.raises(error):
        reading(monkeypatch, read)


def test_changed_leaves_what_it_gets():
    told = json.loads(WHOLE["shards"][0][0])
    others = [changed(told, random.Random(seed)) for seed in range(50)]
    assert told == json.loads(WHOLE["shards"][0][0])
    assert sum(other != told for other in others) > 40


# --- Promises -------------------------------------------------------------------------------------


def with_index(**changes):
    """An input of tokens whose index says other things, and has the checksum of that."""
    index, *files = WHOLE["shards"][0]
    told = json.loads(index)
    inside = {name: value for name, value in changes.items() if name in told["parts"]["text"]}
    told["parts"]["text"] |= inside
    told |= {name: value for name, value in changes.items() if name not in inside}
    return SPLIT.join([json.dumps(told).encode(), *files])


PART = dict.fromkeys(("tokens", "documents", "bytes", "tokens_crc", "documents_crc"), 1)

OUTSIDE = {
    "a part above": {"parts": {"../x": PART}},
    "a part far above": {"parts": {"../../../../etc/passwd": PART}},
    "a part at the root": {"parts": {"/etc/x": PART}},
    "a part of nothing": {"parts": {"": PART}},
    "a part that ends early": {"parts": {"text\0": PART}},
    "a part in a folder": {"parts": {"a/b": PART}},
    "a part of half a character": {"parts": {"\ud800": PART}},
}


@pytest.mark.parametrize("changes", OUTSIDE.values(), ids=OUTSIDE)
def test_names_in_an_index_lead_nowhere(changes):
    assert "is damaged: a part is called" in str(run("shards", with_index(**changes)))


HEADER = (
    b'{"weights":{"dtype":"F32","shape":[1152921504606846976],'
    b'"data_offsets":[0,4611686018427387904]}}'
)
HUGE = {
    "10^12 shards": ("shards", with_index(tokens=10**12, shard_tokens=1)),
    "10^400 tokens": ("shards", with_index(tokens=10**400, shard_tokens=10**300)),
    "10^400 documents": ("shards", with_index(documents=10**400, tokens=10**400)),
    "a list of 2^60 numbers": ("gguf", b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1)
                               + b"x" + struct.pack("<IIQ", 9, 5, 1 << 60)),
    "a list of 2^60 texts": ("gguf_tokenizer", b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1)
                             + b"x" + struct.pack("<IIQ", 9, 8, 1 << 60)),
    "2^60 keys": ("gguf", b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 60) + bytes(500)),
    "2^60 tensors": ("gguf", b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0) + bytes(500)),
    "a text of 2^60 bytes": ("gguf", b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1 << 60)),
    "2^60 keys of others": ("published_gguf", b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 60)),
    "2^60 tensors of others": ("published_gguf", b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0)),
    "2^60 texts of others": ("published_gguf", b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1)
                             + b"x" + struct.pack("<IIQ", 9, 8, 1 << 60)),
    "a header of others of 2^60 bytes": ("published_folder", SPLIT.join(
        [WHOLE["published_folder"][0][0], struct.pack("<Q", 1 << 60) + b"{}"])),
    "a tensor of others of 2^60 numbers": ("published_folder", SPLIT.join(
        [WHOLE["published_folder"][0][0], struct.pack("<Q", len(HEADER)) + HEADER])),
    "a C model of gigabytes": ("c_v1", struct.pack("<IIiii", 0x1B1B1, 1, 16384, 16384, 1024)),
    "a header of 2^60 bytes": ("model", SPLIT.join(
        [WHOLE["model"][0][0], struct.pack("<Q", 1 << 60) + b"{}"])),
    "a tensor of 2^60 numbers": ("checkpoint", struct.pack("<Q", len(HEADER)) + HEADER),
    "2^31 tokens": ("token_file", struct.pack("<3i", 20240520, 1, 2**31 - 1).ljust(1024, b"\0")),
    "a long key": ("settings", b"a." * 20_000 + b"a = 1"),
    "a long table": ("space", b"[" + b"a." * 20_000 + b"a]"),
    "keys in a deep table": (
        "settings", b"[" + b"a." * 250 + b"a]\n" + b"".join(b"k%d=1\n" % i for i in range(5000))),
    "deep brackets": ("settings", b"a = " + b"[" * 50_000),
    "deep tables": ("settings", b"a = " + b"{a=" * 15_000),
    "a setting of 5,000 digits": ("settings", b"[training]\nsteps = 0x" + b"f" * 5000),
    "a bound of 400 digits": ("space", b"[clip]\nlow = " + b"9" * 400 + b"\nhigh = 1"),
    "a step of 400 digits": ("space", b"[clip]\nlow=0\nhigh=1\nstep=" + b"9" * 400),
    "a step of 5,000 digits": ("space", b"[clip]\nlow=0\nhigh=1\nstep=0x" + b"f" * 5000),
    "deep JSON": ("study", b"[" * 100_000),
    "a number of 10^5 digits": ("run", b'{"model": ' + b"9" * 100_000 + b"}"),
    "a text of 50,000 letters": ("run", b'{"model": {"scheme": "' + b"x" * 50_000 + b'"}}'),
}  # fmt: skip


@pytest.mark.parametrize("name", HUGE)
def test_promises_of_a_file_take_neither_time_nor_memory(name):
    target, data = HUGE[name]
    tracemalloc.start()
    try:
        begin = time.process_time()
        error = run(target, data)
        took = time.process_time() - begin
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert error is not None
    # A model of 1,024 blocks has some thousand names.
    assert most < (1 << 24) + 100 * len(data)
    # Tracing makes it slower; without its check each of these took minutes or failed otherwise.
    assert took < 20


@pytest.mark.parametrize("step", ["5e-324", "1e-300", "1e-9"])
def test_steps_that_are_tiny_make_no_list(step):
    error = run("space", f"[clip]\nlow = 0.0\nhigh = 1e9\nstep = {step}\n".encode())
    assert "expected at most 1,000,000 values" in str(error)


BAD_PLACES = {
    "one after another": [0, 5, 3],
    "twice": [0, 3, 3],
    "below 0": [-1, 3, 5],
    "not from 0": [1, 3, 5],
    "beyond the end": [0, 3, 9],
    "far beyond": [0, 3, 2**62],
    "none": [],
}


@pytest.mark.parametrize("places", BAD_PLACES.values(), ids=BAD_PLACES)
def test_documents_lie_one_behind_the_other(places):
    """Rows that begin below 0 were read for ever."""
    index, _, *tokens = WHOLE["shards"][0]
    documents = np.array(places, "<i8").tobytes()
    assert run("shards", SPLIT.join([index, documents, *tokens])) is not None


def test_shards_have_the_size_that_the_index_tells():
    """A first shard that was too short made others be looked for at wrong places."""
    index, documents, first, second, third = WHOLE["shards"][0]
    moved = [first[:1], first[1:] + second, third]
    assert "expected a file of 4" in str(run("shards", SPLIT.join([index, documents, *moved])))


def test_gguf_of_parts_is_the_file():
    """The form in which fuzzing changes a file comes to the same file."""
    parts = WHOLE["gguf"][0]
    assert gguf_file(parts).startswith(b"GGUF\3\0\0\0")
    assert run("gguf", gguf_file(parts)) is None
