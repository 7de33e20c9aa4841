"""Files of published models for tests: where they are, and the keys of a GGUF file."""

import json
import os
import struct
from pathlib import Path

import pytest

# A folder of small models with the tokens, chats and logits that other software gives for them.
GOLDEN = os.environ.get("LEGACY1BIT_GOLDEN_MODELS", "")
with_golden_models = pytest.mark.skipif(
    not GOLDEN, reason="LEGACY1BIT_GOLDEN_MODELS does not name a folder of published models"
)


def golden():
    """Return for each file or folder of the golden models its path, and what is said about it."""
    abouts = [json.loads(path.read_text("utf-8")) for path in sorted(Path(GOLDEN).glob("*.json"))]
    return [(Path(GOLDEN, file), about) for about in abouts for file in about["files"]]


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
