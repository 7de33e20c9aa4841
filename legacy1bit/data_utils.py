"""Text in, tokens out, and back (C: ``data_utils.c``).

A token is a byte, as in the C original: nothing to download, no character it cannot spell, and
every text comes back as it was.
"""

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from legacy1bit.files import atomic_write

Tokens = npt.NDArray[np.int32]

TOKENIZER_FILE = "tokenizer.json"

_LINE_BREAK = 10


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
    tokens = np.frombuffer(data, np.uint8).astype(np.int32)
    outside = np.flatnonzero(tokens >= vocab_size)
    if outside.size:
        raise IndexError(
            f"byte {tokens[outside[0]]} at offset {outside[0]} is outside the vocabulary of "
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


def visible_bytes() -> list[str]:
    """Return a printable character for each byte, as byte-level BPE files write them.

    Bytes that print as themselves in Latin-1 stand for themselves, the others for the characters
    from U+0100 on (Radford et al. 2019, section 2.2).
    """
    kept = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in kept else next(others)) for byte in range(256)]


class ByteTokenizer:
    """Bytes as tokens; token i is byte i.

    Its file is one that Hugging Face's ``tokenizers`` reads: byte-level BPE without merges.

    Parameters
    ----------
    vocab_size : int
        How many bytes are tokens, at most 256.

    Attributes
    ----------
    bos_token : int or None
        What a text begins behind, the line break: what a model has learned of beginnings, it has
        learned there. None where that is no token.
    """

    def __init__(self, vocab_size: int = 256) -> None:
        if not 1 <= vocab_size <= 256:
            raise ValueError(f"the vocabulary has {vocab_size} tokens, expected 1 to 256 bytes")
        self.vocab_size = vocab_size
        self.bos_token = _LINE_BREAK if vocab_size > _LINE_BREAK else None

    def encode(self, text: str | bytes) -> Tokens:
        """Return the token ids of a text, int32[N].

        Raises
        ------
        IndexError
            If a byte of it is no token.
        """
        return tokenize_text(text, self.vocab_size)

    def decode(self, tokens: npt.ArrayLike) -> bytes:
        """Return the bytes that token ids stand for.

        Raises
        ------
        IndexError
            If an id is no byte.
        """
        ids = np.asarray(tokens)
        if ids.size and (ids.min() < 0 or ids.max() >= self.vocab_size):
            raise IndexError(
                f"a token id is outside 0 to {self.vocab_size - 1}: {ids.min()} to {ids.max()}"
            )
        return ids.astype(np.uint8).tobytes()

    def description(self) -> dict[str, Any]:
        """Return what the tokenizer's file says."""
        byte_level = {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": False,
        }
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [],
            "normalizer": None,
            "pre_tokenizer": byte_level,
            "post_processor": None,
            "decoder": byte_level,
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": False,
                "vocab": {
                    character: i for i, character in enumerate(visible_bytes()[: self.vocab_size])
                },
                "merges": [],
            },
        }

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``tokenizer.json`` into a folder."""
        content = json.dumps(self.description(), ensure_ascii=False, indent=1)
        atomic_write(Path(folder) / TOKENIZER_FILE, content + "\n")

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "ByteTokenizer":
        """Read a folder's ``tokenizer.json``.

        Raises
        ------
        OSError
            If it cannot be read.
        ValueError
            If it is not the tokenizer that ``save`` writes.
        """
        path = Path(folder) / TOKENIZER_FILE
        try:
            found = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not JSON: {error}") from None
        try:
            tokenizer = cls(len(found["model"]["vocab"]))
            known = found == tokenizer.description()
        except (KeyError, TypeError, ValueError):
            known = False
        if not known:
            raise ValueError(f"{path} is not a tokenizer of bytes, the only kind known here")
        return tokenizer
