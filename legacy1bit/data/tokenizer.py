"""Text to tokens and back: bytes, characters, or pieces of words.

Every tokenizer is byte-level BPE (Radford et al. 2019, section 2.2): the bytes, and tokens that are
merged from two others. Without merges tokens are bytes, as in the C original; merges that make
nothing but a text's characters give characters; merges that were learned from a text give the
pieces of words that are frequent there. So one format of file holds them all, which Hugging Face's
``tokenizers`` reads, too, and every text comes back as it was: they can spell every byte.

The first 256 tokens are the bytes in their order, then come the merged ones in the order of their
merges. The last two stand for no text: what documents begin behind and end with, and padding.
"""

import functools
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from legacy1bit.data.bpe import learn_merges, load_tokenizers
from legacy1bit.data_utils import Tokens, tokenize_text, view_bytes
from legacy1bit.system.files import atomic_write
from legacy1bit.threads import available_cores

TOKENIZER_FILE = "tokenizer.json"

END_OF_TEXT, PADDING = "<|endoftext|>", "<|padding|>"
SPECIAL_TOKENS = (END_OF_TEXT, PADDING)

_LINE_BREAK = 10
_BYTES = 256

# Text is given to the library in parts of about this many bytes, which is what its threads share,
# and this many parts for each core at a time: it hears no signal before all are done.
_PART = 1 << 15
_PARTS_OF_A_CORE = 2

# Behind a printable character no token reaches over a space or a line break: words are cut off
# there before they are looked at.
_SAFE = re.compile(rb"[!-~](?=[ \n])")

# Bytes that are no UTF-8, decoded with "surrogateescape", which nothing else decodes to.
_INVALID = re.compile("([\udc80-\udcff]+)")

# Merging takes the square of a word's length, and what is longer than this is none: a vocabulary is
# learned from parts of it.
_VERY_LONG = re.compile(r"\S{1000}|\s{1000}")
_LONG = re.compile(r"\s{0,64}\S{1,64}|\s{1,64}")

# The first bytes of a character tell how many it has.
_CHARACTER = re.compile(
    rb"[\xc2-\xdf][\x80-\xbf]"
    rb"|(?:\xe0[\xa0-\xbf]|[\xe1-\xec\xee\xef][\x80-\xbf]|\xed[\x80-\x9f])[\x80-\xbf]?"
    rb"|(?:\xf0[\x90-\xbf]|[\xf1-\xf3][\x80-\xbf]|\xf4[\x80-\x8f])[\x80-\xbf]{0,2}"
)


class Tokenizer(Protocol):
    """What all tokenizers have in common.

    Attributes
    ----------
    kind : {"bytes", "chars", "bpe", "unknown"}
        "chars" where no token is more than a character.
    vocab_size : int
        V, how many tokens there are, special ones included.
    bos_token : int or None
        What every document begins behind: what a model has learned of beginnings, it has learned
        there. A line break for bytes, None where that is not a token; ``<|endoftext|>`` for others.
    eos_token : int or None
        What ends a text when it is drawn: ``<|endoftext|>``. Texts of bytes have no such end.
    stop_tokens : tuple of int
        All tokens that end a text, ``eos_token`` first: models of chats end each turn with another.
    byte_lengths : int32[V]
        How many bytes each token stands for; 0 for special ones.
    parents : int32[V, 2]
        The two tokens that each token was merged from; -1 where it was not.
    sha256 : str
        Of the file that ``save`` writes, in hexadecimal digits.
    """

    @property
    def kind(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def bos_token(self) -> int | None: ...
    @property
    def eos_token(self) -> int | None: ...
    @property
    def stop_tokens(self) -> tuple[int, ...]: ...
    @property
    def byte_lengths(self) -> Tokens: ...
    @property
    def parents(self) -> Tokens: ...
    @property
    def sha256(self) -> str: ...

    def encode(self, text: str | bytes) -> Tokens:
        """Return the token ids of a text, int32[N]."""
        ...

    def encode_special(self, text: str | bytes) -> Tokens:
        """Return the token ids of a text in which the names of special tokens stand for them.

        So chat templates name them, and ``encode`` never does. Only tokenizers of published models
        have special tokens with names.
        """
        ...

    def encode_batch(self, texts: Sequence[bytes]) -> Sequence[npt.NDArray[Any]]:
        """Return the token ids of several texts, in parallel; bytes as uint8, others as int32."""
        ...

    def decode(self, tokens: npt.ArrayLike) -> bytes:
        """Return the bytes that token ids stand for."""
        ...

    def description(self) -> dict[str, Any]:
        """Return what the tokenizer's file says."""
        ...

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``tokenizer.json`` into a folder."""
        ...


def visible_bytes() -> list[str]:
    """Return a printable character for each byte, as byte-level BPE files write them.

    Bytes that print as themselves in Latin-1 stand for themselves, the others for the characters
    from U+0100 on (Radford et al. 2019, section 2.2).
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def check_ids(tokens: npt.ArrayLike, vocab_size: int) -> npt.NDArray[Any]:
    """Return token ids as an array. Raises ``IndexError`` if one is not below ``vocab_size``."""
    ids = np.asarray(tokens)
    if ids.size and (ids.min() < 0 or ids.max() >= vocab_size):
        raise IndexError(f"a token id is outside 0 to {vocab_size - 1}: {ids.min()} to {ids.max()}")
    return ids


def constant(values: npt.ArrayLike) -> Tokens:
    """Return numbers as an array that nobody changes."""
    array = np.array(values, np.int32)
    array.setflags(write=False)
    return array


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": use_regex,
    }


def _description(
    vocabulary: Iterable[str],
    merges: Iterable[tuple[str, str]],
    special_tokens: Iterable[tuple[int, str]],
    use_regex: bool,
) -> dict[str, Any]:
    """Return a tokenizer's file; tokens are spelled in visible bytes."""
    byte_level = _byte_level(use_regex)
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": token, "content": name, **flags, "special": True}
            for token, name in special_tokens
        ],
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
            "vocab": {spelled: token for token, spelled in enumerate(vocabulary)},
            "merges": [list(merge) for merge in merges],
        },
    }


def _file(description: dict[str, Any]) -> str:
    return json.dumps(description, ensure_ascii=False, indent=1) + "\n"


def _sha256(description: dict[str, Any]) -> str:
    return hashlib.sha256(_file(description).encode()).hexdigest()


class ByteTokenizer:
    """Bytes as tokens; token i is byte i. For its members see ``Tokenizer``.

    Parameters
    ----------
    vocab_size : int
        How many bytes are tokens, at most 256.
    """

    kind = "bytes"
    eos_token = None
    stop_tokens = ()

    def __init__(self, vocab_size: int = _BYTES) -> None:
        if not 1 <= vocab_size <= _BYTES:
            raise ValueError(f"the vocabulary has {vocab_size} tokens, expected 1 to 256 bytes")
        self.vocab_size = vocab_size
        self.bos_token = _LINE_BREAK if vocab_size > _LINE_BREAK else None
        self.byte_lengths = constant(np.ones(vocab_size))
        self.parents = constant(np.full((vocab_size, 2), -1))

    @functools.cached_property
    def sha256(self) -> str:
        return _sha256(self.description())

    def encode(self, text: str | bytes) -> Tokens:
        """Return the token ids of a text, int32[N].

        Raises
        ------
        IndexError
            If a byte of it is not a token.
        """
        return tokenize_text(text, self.vocab_size)

    encode_special = encode

    def encode_batch(self, texts: Sequence[bytes]) -> list[npt.NDArray[np.uint8]]:
        """Return several texts as they are, uint8[N] each; errors are those of ``encode``."""
        return [view_bytes(text, self.vocab_size) for text in texts]

    def decode(self, tokens: npt.ArrayLike) -> bytes:
        """Return the bytes that token ids stand for.

        Raises
        ------
        IndexError
            If an id is not a byte.
        """
        return check_ids(tokens, self.vocab_size).astype(np.uint8).tobytes()

    def description(self) -> dict[str, Any]:
        """Return what the tokenizer's file says."""
        return _description(visible_bytes()[: self.vocab_size], (), (), use_regex=False)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``tokenizer.json`` into a folder."""
        atomic_write(Path(folder) / TOKENIZER_FILE, _file(self.description()))


class UnknownTokenizer:
    """Tokens of another program's, of which only the number is known. See ``Tokenizer``.

    Parameters
    ----------
    vocab_size : int
    """

    kind = "unknown"
    bos_token = eos_token = None
    stop_tokens = ()
    sha256 = ""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.byte_lengths = constant(np.zeros(vocab_size))
        self.parents = constant(np.full((vocab_size, 2), -1))

    def encode(self, text: str | bytes) -> Tokens:
        """Raise ``ValueError``."""
        raise ValueError(
            f"what the model's tokens stand for is not known: there is no {TOKENIZER_FILE} beside "
            "it, as for tokens of another program; expected token ids, as Generator.tokens takes "
            "them"
        )

    encode_special = encode

    def encode_batch(self, texts: Sequence[bytes]) -> list[Tokens]:
        """Raise ``ValueError``."""
        return [self.encode(text) for text in texts]

    def decode(self, tokens: npt.ArrayLike) -> bytes:
        """Raise ``ValueError``."""
        return self.encode(b"").tobytes()

    def description(self) -> dict[str, Any]:
        """Raise ``ValueError``."""
        self.encode(b"")
        return {}

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write nothing: there is nothing that could be read."""


class SubwordTokenizer:
    """Bytes, and what is merged of them. For its members see ``Tokenizer``.

    Parameters
    ----------
    merges : iterable of (bytes, bytes)
        What the two tokens of each merge stand for; those that come first are done first. Each is
        a byte or was merged before. Two merges may make the same token.

    Raises
    ------
    ValueError
        If a merge is not of tokens, comes twice or makes what a special token is called, or
        if ``tokenizers`` is not installed.
    """

    def __init__(self, merges: Iterable[tuple[bytes, bytes]]) -> None:
        self.merges = tuple(merges)
        ids = {bytes([byte]): byte for byte in range(_BYTES)}
        parents = [(-1, -1)] * _BYTES
        for left, right in self.merges:
            for part in (left, right):
                if part not in ids:
                    raise ValueError(f"a merge is of {part!r}, which is not a token before it")
            if left + right not in ids:
                ids[left + right] = len(ids)
                parents.append((ids[left], ids[right]))
        if len(set(self.merges)) < len(self.merges):
            raise ValueError("a merge comes twice")
        for name in SPECIAL_TOKENS:
            if name.encode() in ids:
                raise ValueError(f"{name} is merged from text, and is the name of a special token")
        self.eos_token = self.bos_token = len(ids)
        self.stop_tokens = (self.eos_token,)
        self.padding_token = len(ids) + 1
        self._texts = [*ids, *(b"" for _ in SPECIAL_TOKENS)]
        self.vocab_size = len(self._texts)
        characters = all(_CHARACTER.fullmatch(text) for text in [*ids][_BYTES:])
        self.kind = "chars" if characters else "bpe"
        self.byte_lengths = constant([len(text) for text in self._texts])
        self.parents = constant([*parents, *((-1, -1) for _ in SPECIAL_TOKENS)])
        self._library = load_tokenizers().Tokenizer.from_str(_file(self.description()))
        # A special token's name in a text is text like any other.
        self._library.encode_special_tokens = True

    def __reduce__(self) -> tuple[Any, ...]:
        # Copies of the library's object forget the line above.
        return type(self), (self.merges,)

    @functools.cached_property
    def sha256(self) -> str:
        return _sha256(self.description())

    def encode(self, text: str | bytes) -> Tokens:
        """Return the token ids of a text, int32[N]; bytes that are no UTF-8 stay single."""
        return self.encode_batch([text.encode("utf-8") if isinstance(text, str) else text])[0]

    encode_special = encode

    def encode_batch(self, texts: Sequence[bytes]) -> list[Tokens]:
        """Return the token ids of several texts, in parallel."""
        ids: list[Tokens] = []
        counts: list[int] = []
        together: list[str | bytes] = []
        most, waiting = _PARTS_OF_A_CORE * _PART * available_cores(), 0
        for text in texts:
            before = len(ids) + len(together)
            for part in _parts(text):
                together.append(part)
                waiting += len(part)
                if waiting >= most:
                    ids += self._encode(together)
                    together, waiting = [], 0
            counts.append(len(ids) + len(together) - before)
        ids += self._encode(together)
        encoded, start = [], 0
        for count in counts:
            own = ids[start : start + count]
            start += count
            encoded.append(own[0] if count == 1 else np.concatenate([_NO_TOKENS, *own]))
        return encoded

    def _encode(self, parts: list[str | bytes]) -> list[Tokens]:
        """Return the token ids of each part, in parallel."""
        valid = [part for part in parts if isinstance(part, str)]
        encoded = iter(self._library.encode_batch_fast(valid, add_special_tokens=False))
        return [
            np.array(next(encoded).ids, np.int32) if isinstance(part, str) else tokenize_text(part)
            for part in parts
        ]

    def decode(self, tokens: npt.ArrayLike) -> bytes:
        """Return the bytes that token ids stand for; of special ones, none.

        Raises
        ------
        IndexError
            If an id is not a token.
        """
        ids, texts = check_ids(tokens, self.vocab_size), self._texts
        return b"".join([texts[token] for token in ids.ravel().tolist()])

    def description(self) -> dict[str, Any]:
        """Return what the tokenizer's file says."""
        special = len(SPECIAL_TOKENS)
        return _description(
            self.spelled_tokens()[:-special],
            self.spelled_merges(),
            enumerate(SPECIAL_TOKENS, self.vocab_size - special),
            use_regex=True,
        )

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``tokenizer.json`` into a folder."""
        atomic_write(Path(folder) / TOKENIZER_FILE, _file(self.description()))

    def spelled_tokens(self) -> list[str]:
        """Return what each token is called in files: visible bytes, or the special token's name."""
        return [*map(_spell, self._texts[: -len(SPECIAL_TOKENS)]), *SPECIAL_TOKENS]

    def spelled_merges(self) -> list[tuple[str, str]]:
        """Return the merges in visible bytes."""
        return [(_spell(left), _spell(right)) for left, right in self.merges]

    @classmethod
    def of_spelled(cls, merges: Iterable[Iterable[str]]) -> "SubwordTokenizer":
        """Make a tokenizer of merges in visible bytes.

        Raises
        ------
        ValueError
            If they are none, or ``tokenizers`` is not installed.
        """
        read = []
        for merge in merges:
            parts = [_read(part) for part in merge]
            if len(parts) != 2:
                raise ValueError(f"a merge is of {len(parts)} tokens, expected 2")
            read.append((parts[0], parts[1]))
        return cls(read)


_NO_TOKENS = constant([])

_SPELLING = visible_bytes()
_BYTE_OF = {character: byte for byte, character in enumerate(_SPELLING)}


def _spell(text: bytes) -> str:
    return "".join([_SPELLING[byte] for byte in text])


def _read(spelled: str) -> bytes:
    try:
        return bytes([_BYTE_OF[character] for character in spelled])
    except KeyError as error:
        raise ValueError(f"{error} stands for no byte") from None


def _parts(text: bytes) -> Iterator[str | bytes]:
    """Cut a text where no token reaches over: into UTF-8 as str, and what is none as bytes."""
    for part in cut(text):
        yield from valid_parts(part)


def valid_parts(text: bytes) -> Iterator[str | bytes]:
    """Cut a text into UTF-8 as str, and what is none as bytes."""
    try:
        yield text.decode()
    except UnicodeDecodeError:
        runs = _INVALID.split(text.decode("utf-8", "surrogateescape"))
        for i, run in enumerate(runs):
            if run:
                yield run.encode("utf-8", "surrogateescape") if i % 2 else run


def cut(text: bytes) -> Iterator[bytes]:
    """Cut a text into parts of about 32 KiB, where no token reaches over."""
    start = 0
    while len(text) - start > _PART and (place := _SAFE.search(text, start + _PART)):
        yield text[start : place.end()]
        start = place.end()
    if start < len(text):
        yield text[start:] if start else text


# ---------------------------------------------------------------------------------------------
# Made from a text


def _check_size(vocab_size: int) -> None:
    least = _BYTES + len(SPECIAL_TOKENS) + 1
    if vocab_size < least:
        raise ValueError(
            f"the vocabulary has {vocab_size} tokens, expected {least} or more: {_BYTES} bytes, "
            f"{len(SPECIAL_TOKENS)} special tokens, and what is merged"
        )


def train_bpe(
    pieces: Iterable[bytes], vocab_size: int, on_progress: Callable[[int], None] | None = None
) -> SubwordTokenizer:
    """Learn from a text which tokens spell it shortly.

    Parameters
    ----------
    pieces : iterable of bytes
        The text, read once and never held as a whole. Bytes that are no UTF-8 are passed over.
    vocab_size : int
        How many tokens there may be; a short text gives fewer.
    on_progress : callable, optional
        Gets the number of bytes read so far, after each piece.

    Raises
    ------
    ValueError
        If the vocabulary is too small for a merge, or ``tokenizers`` is not installed.

    Notes
    -----
    Sennrich et al. 2016, algorithm 1, on the words that GPT-2 cuts a text into.
    """
    _check_size(vocab_size)
    texts = _valid_text(pieces, on_progress)
    return SubwordTokenizer.of_spelled(learn_merges(texts, vocab_size - len(SPECIAL_TOKENS)))


def _valid_text(
    pieces: Iterable[bytes], on_progress: Callable[[int], None] | None = None
) -> Iterator[str]:
    done = 0
    for piece in pieces:
        for part in _parts(piece):
            if isinstance(part, str):
                yield from _LONG.findall(part) if _VERY_LONG.search(part) else (part,)
        done += len(piece)
        if on_progress is not None:
            on_progress(done)


def character_tokenizer(pieces: Iterable[bytes], vocab_size: int | None = None) -> SubwordTokenizer:
    """Make tokens of a text's characters; those that are there without it are the bytes.

    Parameters
    ----------
    pieces : iterable of bytes
        The text, read once and never held as a whole. Bytes that are no UTF-8 are passed over.
    vocab_size : int, optional
        How many tokens there may be: the most frequent characters get one. Characters of three
        and four bytes need others on the way, which stand for their beginnings.

    Raises
    ------
    ValueError
        If the vocabulary is too small for a character, or ``tokenizers`` is not installed.
    """
    if vocab_size is not None:
        _check_size(vocab_size)
    counts: Counter[str] = Counter()
    for text in _valid_text(pieces):
        if not text.isascii():
            counts.update(text)
    free = np.inf if vocab_size is None else vocab_size - _BYTES - len(SPECIAL_TOKENS)
    merges: dict[tuple[bytes, bytes], None] = {}
    for character in sorted(counts, key=lambda one: (-counts[one], one)):
        data = character.encode()
        steps = ((data[:size], data[size : size + 1]) for size in range(1, len(data)))
        missing = [step for step in steps if step not in merges]
        if len(merges) + len(missing) <= free:
            merges.update(dict.fromkeys(missing))
    return SubwordTokenizer(merges)


# ---------------------------------------------------------------------------------------------
# Beside a model


def description_in_template(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return a tokenizer's file that puts what texts begin behind before them.

    So Hugging Face's libraries need it. A template does that: as a special token of the tokenizer
    the line break would be looked for in the text, under the name of another character.
    """
    content = tokenizer.description()
    bos = tokenizer.bos_token
    if bos is not None:
        name = visible_bytes()[bos] if tokenizer.eos_token is None else END_OF_TEXT
        content["post_processor"] = begin_template(name, bos)
    return content


def begin_template(name: str, token: int | None) -> dict[str, Any]:
    """Return the part of a tokenizer's file that puts a token before texts."""
    first = {"SpecialToken": {"id": name, "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [first, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [
            first,
            {"Sequence": {"id": "A", "type_id": 0}},
            {"Sequence": {"id": "B", "type_id": 1}},
        ],
        "special_tokens": {name: {"id": name, "ids": [token], "tokens": [name]}},
    }


def fit_tokenizer(tokenizer: Tokenizer | None, vocab_size: int) -> Tokenizer:
    """Return a tokenizer as a model of ``vocab_size`` tokens needs it.

    Where that is bytes, or None, it is as many bytes as the model has tokens, at most all.

    Raises
    ------
    ValueError
        If another one has more or fewer tokens than the model.
    """
    if tokenizer is None or tokenizer.kind == "bytes":
        most = _BYTES if tokenizer is None else tokenizer.vocab_size
        return ByteTokenizer(min(most, vocab_size))
    if tokenizer.vocab_size != vocab_size:
        raise ValueError(
            f"the model has {vocab_size} tokens, and its tokenizer {tokenizer.vocab_size}"
        )
    return tokenizer


def check_bytes(tokenizer: Tokenizer | None) -> None:
    """Raise ``ValueError``, with what to train instead, for a C program's sake: it knows bytes."""
    if tokenizer is not None and tokenizer.kind != "bytes":
        raise ValueError(
            f"a C program reads and writes bytes, and the model's tokens are {tokenizer.kind}: "
            "train with --tokenizer bytes"
        )
