"""Text in, tokens out, and back (C: ``data_utils.c``).

Here a token is a byte, as in the C original. What else can be one is in ``tokenizer.py``.
"""

import os
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.int32]


def initialize_vocabulary() -> int:
    """Return the size of the vocabulary: one token for each byte, 256.

    C: ``data_utils.c``, ``initialize_vocabulary``.
    """
    return 256


def load_text_from_file(path: str | os.PathLike[str]) -> bytes:
    """Return what a text file holds.

    Raises
    ------
    OSError
        If there is no such file, or it cannot be read.
    ValueError
        If the file is empty.

    Notes
    -----
    C: ``data_utils.c``, ``load_text_from_file``.
    """
    text = Path(path).read_bytes()
    if not text:
        raise ValueError(f"{path} is empty, expected text")
    return text


def with_line_breaks(text: str) -> str:
    """Return what a user has typed with line breaks for the ``\\n`` and ``\\r`` that spell them."""
    return text.replace("\\r", "\r").replace("\\n", "\n")


def tokenize_text(text: str | bytes, vocab_size: int = 256) -> Tokens:
    """Return a text's bytes (UTF-8 for ``str``) as int32[N] token ids.

    Raises
    ------
    IndexError
        If a byte lies outside a vocabulary of fewer than 256 tokens; C drops such bytes.

    Notes
    -----
    C: ``data_utils.c``, ``tokenize_text``.
    """
    data = text.encode("utf-8") if isinstance(text, str) else text
    return view_bytes(data, vocab_size).astype(np.int32)


def view_bytes(data: bytes, vocab_size: int = 256) -> npt.NDArray[np.uint8]:
    """Return a text's bytes as uint8[N] token ids, read-only and not copied.

    Errors are those of ``tokenize_text``.
    """
    tokens = np.frombuffer(data, np.uint8)
    if vocab_size < 256 and tokens.size and tokens.max() >= vocab_size:
        place = int((tokens >= vocab_size).argmax())
        raise IndexError(
            f"byte {tokens[place]} at offset {place} is outside the vocabulary of "
            f"{vocab_size} tokens"
        )
    return tokens


def create_padded_sequence(tokens: Tokens, start: int, length: int, pad_token: int) -> Tokens:
    """Return int32[length]: the tokens from ``start`` on, then padding.

    C: ``data_utils.c``, ``create_padded_sequence``.
    """
    sequence = np.full(length, pad_token, np.int32)
    part = tokens[start : start + length]
    sequence[: part.size] = part
    return sequence


def get_time_in_ms() -> int:
    """Return a clock's milliseconds, for differences only. C: ``get_time_in_ms``."""
    return time.monotonic_ns() // 1_000_000
