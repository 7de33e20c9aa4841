"""Files of published models for tests: where they are, and the keys of a GGUF file."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest

from helpers import paths

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
