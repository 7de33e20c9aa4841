"""Files of published models for tests: where they are, the keys of a GGUF file; damaged files."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest

from helpers import paths
from legacy1bit.formats import gguf_file

# A folder of small models with the tokens, chats and logits that other software gives for them.
GOLDEN = paths.GOLDEN / "models"
with_golden_models = pytest.mark.skipif(
    not GOLDEN.is_dir(), reason="the golden models are not here, which lie beside the source"
)


def golden():
    """Return for each file or folder of the golden models its path, and what is said about it."""
    abouts = [json.loads(path.read_text("utf-8")) for path in sorted(GOLDEN.glob("*.json"))]
    return [(GOLDEN / file, about) for about in abouts for file in about["files"]]


def golden_logits(about):
    """Return the logits that other software gives, float64[2, T, V]: as the model is defined."""
    logits = np.fromfile(GOLDEN / about["references"][0]["file"], "<f4")
    return logits.reshape(about["logits_shape"]).astype(np.float64)


_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q",
            12: "d"}  # fmt: skip


def gguf_keys(path):
    """Return the metadata of a GGUF file, read without the package."""
    data, at = Path(path).read_bytes(), 24

    def number(kind, count=None):
        nonlocal at
        layout = f"<{1 if count is None else count}{_NUMBERS[kind]}"
        values = struct.unpack_from(layout, data, at)
        at += struct.calcsize(layout)
        return values[0] if count is None else list(values)

    def value(kind):
        nonlocal at
        if kind == 8:
            size = number(10)
            at += size
            return data[at - size : at].decode()
        if kind == 9:
            inner, count = number(4), number(10)
            return number(inner, count) if inner in _NUMBERS else [
                value(inner) for _ in range(count)]  # fmt: skip
        return number(kind)

    return {value(8): value(number(4)) for _ in range(struct.unpack_from("<Q", data, 16)[0])}


def parts_of(path):
    """The files of a model, each with the end of its header: what is not weights."""
    files = [path] if path.is_file() else sorted(path.iterdir())
    for file in files:
        if file.suffix == ".safetensors":
            (length,) = struct.unpack("<Q", file.read_bytes()[:8])
            yield file, 8 + length
        elif file.suffix == ".gguf":
            with file.open("rb") as opened:
                reader = gguf_file.GgufReader(opened)
            reader.tensors(reader.head()[1])
            yield file, reader._at
        else:
            yield file, file.stat().st_size


def damages(path, rng, cuts, flips):
    """What is done to the files of a model: where a file ends, or which bit of a byte changes."""
    parts = list(parts_of(path))
    sizes = [file.stat().st_size for file, _ in parts]
    for _ in range(cuts):
        which = rng.randrange(len(parts))
        yield parts[which][0], rng.randrange(sizes[which]), None
    in_headers = [(file, 0, end) for file, end in parts]
    elsewhere = [(file, end, size) for (file, end), size in zip(parts, sizes, strict=True)]
    for places in (in_headers, [place for place in elsewhere if place[1] < place[2]]):
        for _ in range(flips):
            file, begin, end = rng.choices(places, [end - begin for _, begin, end in places])[0]
            yield file, rng.randrange(begin, end), 1 << rng.randrange(8)


def damaged(path, rng, cuts, flips):
    """Yield for each of ``damages`` while it is done to the files of a model."""
    for file, place, bit in damages(path, rng, cuts, flips):
        file.chmod(0o600)
        good = file.read_bytes()
        flipped = b"" if bit is None else bytes([good[place] ^ bit]) + good[place + 1 :]
        file.write_bytes(good[:place] + flipped)
        yield
        file.write_bytes(good)
