"""Tokenizers of published models, as their files describe them: GGUF keys, or ``tokenizer.json``.

Hugging Face's ``tokenizers`` does the work. Byte-level BPE (Radford et al. 2019, section 2.2) cuts
a text into words first, and each model has rules of its own for that: a GGUF file names them with
the key ``tokenizer.ggml.pre``, and ``RULES`` has them. A vocabulary of SentencePiece (Kudo and
Richardson 2018) has scores instead of merges: the pair of neighbors with the best one is merged.
What is read from one of the two forms can be written in both.
"""

import functools
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from legacy1bit.data.bpe import load_tokenizers
from legacy1bit.data.tokenizer import (
    TOKENIZER_FILE,
    begin_template,
    check_ids,
    constant,
    valid_parts,
    visible_bytes,
)
from legacy1bit.data_utils import Tokens
from legacy1bit.system.files import atomic_write, read_regular

TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE, _TEMPLATE_KEY = "chat_template.jinja", "tokenizer.chat_template"

# What is written into ``tokenizer_config.json``, besides what other programs read.
STOP_TOKENS = "stop_tokens"

# Files of a folder that may say which tokens end a text.
_GENERATION_FILES = ("generation_config.json", "config.json")

# What tokens are, by their numbers in ``tokenizer.ggml.token_type``.
_NORMAL, _UNKNOWN, _SPECIAL, _ADDED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6

# llama.cpp needs at least one merge. This one never applies: it is not of tokens.
NO_MERGE = "\u2581 \u2581"

# What chat templates call tokens, and their keys ``tokenizer.ggml.*_token_id``.
_NAMED = {
    **{"bos_token": "bos", "eos_token": "eos"},
    **{"unk_token": "unknown", "pad_token": "padding"},
}

# Special tokens that end a text in every model that has them: of a text, of a message, of a turn.
_ENDS = (
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|eom_id|>", "</s>"),
    *("<|endoftext|>", "<|end_of_text|>"),
)

_SPACE = "\u2581"

# Inside the name of a special token, it makes text of it. No text has it: it is no character.
_MARK = "\U0010fffe"

_BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")

# --- How a text is split into words ---------------------------------------------------------------

_CONTRACTIONS = "'(?:s|t|re|ve|m|ll|d)"
_ENDING = r"\s*[\r\n]+|\s+(?!\S)|\s+"


def _of_today(digits: str, marks: str = "") -> tuple[str, ...]:
    """Return the rule of Llama 3 and Qwen 2, which differ in how many digits make a word."""
    letters = rf"[\p{{L}}{marks}]" if marks else r"\p{L}"
    return (
        rf"(?i:{_CONTRACTIONS})|[^\r\n\p{{L}}\p{{N}}]?{letters}+|{digits}"
        rf"| ?[^\s\p{{L}}{marks}\p{{N}}]+[\r\n]*|{_ENDING}",
    )


_GPT2 = rf"{_CONTRACTIONS}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+(?!\S)|\s+"
_LLAMA3, _QWEN2 = _of_today(r"\p{N}{1,3}"), _of_today(r"\p{N}")

# Regular expressions that cut a text one after another, by the value of ``tokenizer.ggml.pre``.
RULES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), _LLAMA3),
    **dict.fromkeys(("falcon3", "falcon-h1", "falcon_e"), _LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), _QWEN2),
    "qwen35": _of_today(r"\p{N}", r"\p{M}"),
    **dict.fromkeys(("gpt-2", "gpt-neox", "mpt", "olmo", "phi-2", "jais"), (_GPT2,)),
    **dict.fromkeys(("starcoder", "refact", "command-r", "smollm"), (r"\p{N}", _GPT2)),
    "falcon": (r"[\p{P}$+<=>^~|`]+", _GPT2, "[0-9][0-9][0-9]"),
    "default": (r"[\p{P}$+<=>^~|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
}

# With this many tokens, or of these architectures, a file without ``tokenizer.ggml.pre`` is of
# Llama 3's vocabulary: Microsoft's own file of BitNet 2B-4T lacks the key.
_LLAMA3_TOKENS = 128256
_LLAMA3_ARCHITECTURES = ("bitnet", "bitnet-25", "bitnet-b1.58")


# Where the file of Microsoft's BitNet 2B-4T has a template that the model was not trained with, and
# the one of its training: ``gpu/tokenizer.py`` of microsoft/BitNet.
_WRONG_TEMPLATE = "BITNETAssistant"
_RIGHT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ message.role | title }}: {{ message.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}Assistant: {% endif %}"
)


# --- The tokenizer --------------------------------------------------------------------------------


class PublishedTokenizer:
    """A tokenizer of another program's model. For its members see ``Tokenizer``.

    Parameters
    ----------
    description : str
        A ``tokenizer.json``.
    vocab_size : int
        How many tokens the model knows. Those behind the tokenizer's own are padding.
    bos_token : int, optional
        What texts begin behind, if anything.
    stop_tokens : sequence of int
        Each of them ends a text; the first is ``eos_token``.
    names : mapping of str to str
        What chat templates call ``bos_token``, ``eos_token`` and the like.
    unused : iterable of int
        Tokens that stand for no text.
    template : str, optional
        The chat template, a program in Jinja.

    Raises
    ------
    ValueError
        If the description is damaged, of another kind of tokenizer, or larger than the model; or if
        ``tokenizers`` is not installed.
    """

    kind = "bpe"

    def __init__(
        self,
        description: str,
        vocab_size: int | None = None,
        bos_token: int | None = None,
        stop_tokens: Sequence[int] = (),
        names: Mapping[str, str] | None = None,
        unused: Iterable[int] = (),
        template: str | None = None,
    ) -> None:
        library = load_tokenizers()
        self._library = library_of(lambda: library.Tokenizer.from_str(description))
        self._setup(vocab_size, bos_token, stop_tokens, names, unused, template)

    def _setup(
        self,
        vocab_size: int | None,
        bos_token: int | None,
        stop_tokens: Sequence[int],
        names: Mapping[str, str] | None,
        unused: Iterable[int],
        template: str | None,
    ) -> None:
        library = self._library
        added = library.get_added_tokens_decoder()
        size = max(library.get_vocab_size(), max(added, default=-1) + 1)
        self.vocab_size = size if vocab_size is None else vocab_size
        if size > self.vocab_size:
            raise ValueError(f"the model has {self.vocab_size} tokens, and its tokenizer {size}")
        for token in (*([] if bos_token is None else [bos_token]), *stop_tokens):
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"a token that begins or ends texts is {token}, expected a token")
        unknown = getattr(library.model, "unk_token", None)
        if unknown is not None and library.model.token_to_id(unknown) is None:
            raise ValueError(
                f"its token for unknown characters, {unknown[:40]!r}, is not in its vocabulary"
            )
        self._bytes_of = _spelling_of(library)
        self.bos_token = bos_token
        self.stop_tokens = tuple(dict.fromkeys(stop_tokens))
        self.eos_token = self.stop_tokens[0] if self.stop_tokens else None
        self.names = dict(names or {})
        self.template = template
        self._added = {token: entry.content for token, entry in added.items()}
        self._silent = {token for token, entry in added.items() if entry.special} | {*unused}
        self.special_tokens = {
            entry.content: token for token, entry in added.items() if entry.special
        }
        # The library's switch between names of special tokens as tokens, and as text.
        self._lock = threading.Lock()
        self._known: dict[int, bytes] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        unused = sorted(self._silent - {*self.special_tokens.values()})
        return type(self), (
            self._library.to_str(),
            *(self.vocab_size, self.bos_token, self.stop_tokens, self.names, unused),
            self.template,
        )

    @functools.cached_property
    def sha256(self) -> str:
        return hashlib.sha256(json.dumps(self.description()).encode()).hexdigest()

    @functools.cached_property
    def byte_lengths(self) -> Tokens:
        return constant([len(self._text_of(token)) for token in range(self.vocab_size)])

    @functools.cached_property
    def parents(self) -> Tokens:
        """Not known: the merges of other programs may make a token in several ways."""
        return constant(np.full((self.vocab_size, 2), -1))

    # Text to tokens

    def encode(self, text: str | bytes) -> Tokens:
        """Return the token ids of a text, int32[N].

        The name of a special token is text like any other. Added tokens that are not special, such
        as ``<think>``, are recognized.
        """
        return self._encode([text], special=False)[0]

    def encode_special(self, text: str | bytes) -> Tokens:
        """Return the token ids of a text in which the names of special tokens stand for them.

        Except in what ``protect`` returned.
        """
        text = text.decode("utf-8", "surrogateescape") if isinstance(text, bytes) else text
        if _MARK not in text:
            return self._encode([text], special=True)[0]
        parts = self._names.split(text)
        plain = iter(self.encode_batch([part.replace(_MARK, "").encode() for part in parts[::2]]))
        return np.concatenate(
            [
                np.array([self.special_tokens[part]], np.int32) if number % 2 else next(plain)
                for number, part in enumerate(parts)
            ]
        )

    def protect(self, text: str) -> str:
        """Return a text in which names of special tokens are text to ``encode_special``, too.

        A template puts messages between special tokens; what somebody writes must not be one.
        """
        return self._names.sub(lambda name: name[0][0] + _MARK + name[0][1:], text)

    @functools.cached_property
    def _names(self) -> re.Pattern[str]:
        """A special token's name; the longest where one begins another."""
        names = sorted(self.special_tokens, key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, names))})" if names else "(?!)()")

    def encode_batch(self, texts: Sequence[bytes]) -> list[Tokens]:
        """Return the token ids of several texts, in parallel."""
        return self._encode(texts, special=False)

    def _encode(self, texts: Sequence[str | bytes], special: bool) -> list[Tokens]:
        parts = [[*valid_parts(text.encode() if isinstance(text, str) else text)] for text in texts]
        valid = [part for text in parts for part in text if isinstance(part, str)]
        with self._lock:
            self._library.encode_special_tokens = not special
            encoded = library_of(
                lambda: self._library.encode_batch_fast(valid, add_special_tokens=False)
            )
        ids = iter(encoded)

        def tokens_of(part: str | bytes) -> list[int]:
            if isinstance(part, str):
                found: list[int] = next(ids).ids
                return found
            return [self._token_of_byte(byte) for byte in part]

        return [
            np.array([token for part in text for token in tokens_of(part)], np.int32)
            for text in parts
        ]

    def _token_of_byte(self, byte: int) -> int:
        """Return the token of a byte in a text that is not UTF-8."""
        byte_level = self._bytes_of is _read_byte_level
        token = self._library.token_to_id(_VISIBLE[byte] if byte_level else f"<0x{byte:02X}>")
        if token is None:
            raise IndexError(f"byte {byte} is outside the vocabulary of the model")
        return int(token)

    # Tokens to text

    def decode(self, tokens: npt.ArrayLike) -> bytes:
        """Return the bytes that token ids stand for; of special ones, none.

        The space that a SentencePiece model puts before a text is part of it.

        Raises
        ------
        IndexError
            If an id is not a token.
        """
        ids = check_ids(tokens, self.vocab_size)
        return b"".join([self._text_of(token) for token in ids.ravel().tolist()])

    def _text_of(self, token: int) -> bytes:
        if token not in self._known:
            name = None if token in self._silent else self._library.id_to_token(token)
            if name is None:
                text = b""
            elif token in self._added:
                text = name.encode("utf-8", "replace")
            else:
                text = self._bytes_of(name)
            self._known[token] = text
        return self._known[token]

    # Files

    def description(self) -> dict[str, Any]:
        """Return what the tokenizer's file says, which puts ``bos_token`` before texts."""
        described: dict[str, Any] = json.loads(self._library.to_str())
        begins = self._name_of(self.bos_token)
        if begins is not None and _begins_with(described, {}, {}) != begins:
            described["post_processor"] = begin_template(begins, self.bos_token)
        return described

    def config(self) -> dict[str, Any]:
        """Return what the file beside it says: which tokens begin and end texts."""
        names = {name: token for name, token in self.names.items() if name in _NAMED}
        ends = [self._name_of(token) for token in self.stop_tokens]
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            **names,
            "add_bos_token": self.bos_token is not None,
            **({} if self.bos_token is None else {"bos_token": self._name_of(self.bos_token)}),
            "eos_token": ends[0] if ends else None,
            STOP_TOKENS: [name for name in ends if name is not None],
            **({} if self.template is None else {"chat_template": self.template}),
        }

    def _name_of(self, token: int | None) -> str | None:
        """Return the name of a token; None of one that is padding."""
        name: str | None = None if token is None else self._library.id_to_token(token)
        return name

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``tokenizer.json``, and beside it which tokens begin and end texts."""
        for file, content in (
            (TOKENIZER_FILE, self.description()),
            (TOKENIZER_CONFIG_FILE, self.config()),
        ):
            text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
            atomic_write(Path(folder) / file, text)

    def gguf_keys(self) -> dict[str, Any]:
        """Return the keys of a GGUF file that describe the tokenizer, for ``of_gguf``.

        A step that changes a text first (NFC of Qwen's) is left out: the format has no key for it,
        and llama.cpp does without.

        Raises
        ------
        ValueError
            If the format has no name for the way it splits words, its merges have no scores, or it
            has none.
        """
        record = json.loads(self._library.to_str())
        model = record["model"]
        if model["type"] != "BPE":
            raise ValueError(
                f"GGUF files have tokenizers of the type BPE, and it is {model['type']}"
            )
        names = [self._name_of(token) for token in range(self.vocab_size)]
        kinds = [self._kind_of(token, name, model) for token, name in enumerate(names)]
        named = [self.special_tokens.get(name) for name in _ENDS]
        rest = [token for token in self.stop_tokens[1:] if token not in named]
        ids = {
            key: self._library.token_to_id(self.names.get(name, "")) for name, key in _NAMED.items()
        }
        ids |= {"bos": ids["bos"] if self.bos_token is None else self.bos_token}
        ids |= {"eos": self.eos_token, **dict(zip(("eot", "eom"), rest, strict=False))}
        byte_level = self._bytes_of is _read_byte_level
        keys = {
            "model": "gpt2" if byte_level else "llama",
            "pre": _pre_of(record) if byte_level else "default",
            "tokens": [
                f"[PAD{token}]" if name is None else name for token, name in enumerate(names)
            ],
            "token_type": kinds,
            **({"merges": _spelled(model["merges"])} if byte_level else _scores_of(record, names)),
            "add_bos_token": self.bos_token is not None,
            "add_eos_token": False,
            **{f"{name}_token_id": token for name, token in ids.items() if token is not None},
        }
        found = {f"tokenizer.ggml.{name}": value for name, value in keys.items()}
        return found if self.template is None else {**found, _TEMPLATE_KEY: self.template}

    def _kind_of(self, token: int, name: str | None, model: Mapping[str, Any]) -> int:
        if name is None:
            return _UNUSED
        if token in self._added and name == model["unk_token"]:
            return _UNKNOWN
        if token in self._added:
            return _SPECIAL if token in self._silent else _ADDED
        if token in self._silent:
            return _UNUSED
        is_byte = self._bytes_of is _read_sentence_piece and _BYTE_TOKEN.fullmatch(name)
        return _BYTE if is_byte else _NORMAL

    @classmethod
    def of_gguf(
        cls, keys: Mapping[str, Any], vocab_size: int | None = None
    ) -> "PublishedTokenizer":
        """Make the tokenizer that a GGUF file describes.

        Parameters
        ----------
        keys : mapping
            The file's metadata. Lists may be lists or arrays.
        vocab_size : int, optional
            How many tokens the model knows; the file has a name for each.

        Raises
        ------
        ValueError
            If it is damaged, or of a kind that is not known.
        """
        about = _GgufKeys(keys)
        library = _byte_level_of(about) if about.model == "gpt2" else _sentence_piece_of(about)
        special = [about.kinds[token] in (_UNKNOWN, _SPECIAL) for token in range(about.size)]
        added = load_tokenizers().AddedToken
        library.add_tokens(
            [
                added(about.tokens[token], special=special[token], normalized=False)
                for token in about.ids.values()
                if special[token] or about.kinds[token] == _ADDED
            ]
        )
        if vocab_size is not None and vocab_size != about.size:
            raise ValueError(f"the model has {vocab_size} tokens, and its tokenizer {about.size}")
        tokenizer = cls.__new__(cls)
        tokenizer._library = library
        tokenizer._setup(
            about.size,
            about.bos if about.adds_bos else None,
            about.stop_tokens(),
            about.names(),
            (token for token in about.ids.values() if about.kinds[token] == _UNUSED),
            _checked_template(keys.get(_TEMPLATE_KEY)),
        )
        return tokenizer

    @classmethod
    def of_folder(
        cls, folder: str | os.PathLike[str], vocab_size: int | None = None
    ) -> "PublishedTokenizer":
        """Read a folder's ``tokenizer.json``, and what the files beside it say.

        Raises
        ------
        ValueError
            If a file is damaged, or the tokenizer is of a kind that is not known.
        OSError
            If ``tokenizer.json`` cannot be read.
        """
        folder = Path(folder)
        path = folder / TOKENIZER_FILE
        try:
            text = read_regular(path).decode()
            record = json.loads(text)
            added = {entry["content"]: entry["id"] for entry in record["added_tokens"]}
            vocabulary = {**dict(record["model"]["vocab"]), **added}
            config = _json_of(folder / TOKENIZER_CONFIG_FILE)
            names = {
                name: _name_of(config[name]) for name in _NAMED if config.get(name) is not None
            }
            ends = [names["eos_token"]] if "eos_token" in names else []
            stops = [vocabulary[name] for name in [*ends, *config.get(STOP_TOKENS, [])]]
            for file in _GENERATION_FILES:
                ids = _json_of(folder / file).get("eos_token_id")
                stops += [] if ids is None else ids if isinstance(ids, list) else [ids]
            stops += [added[name] for name in _ENDS if name in added]
            if not all(type(token) is int for token in stops):
                raise ValueError("an end-of-text token is not a number")
            begins = _begins_with(record, config, names)
            begin = None if begins is None else vocabulary[begins]
            template = template_in(folder)
            tokenizer = cls(text, vocab_size, begin, stops, names, (), template)
        except KeyError as error:
            raise ValueError(f"{path} cannot be read: {error} is missing") from None
        except (TypeError, AttributeError, ValueError, RecursionError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from None
        return tokenizer


def library_of(call: Callable[[], Any]) -> Any:
    """Return what the library returns. Its panics, too, are a ``ValueError``."""
    try:
        return call()
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        line = " ".join(str(error).split())[:200]
        raise ValueError(f"tokenizers refuses it: {line}") from None


def template_in(folder: Path) -> str | None:
    """Return the chat template of a folder of Hugging Face; None where it has none.

    Raises
    ------
    ValueError
        If it is not a text.
    OSError
        If a file cannot be read.
    """
    if (folder / TEMPLATE_FILE).exists():
        return _checked_template(read_regular(folder / TEMPLATE_FILE).decode())
    source = _json_of(folder / TOKENIZER_CONFIG_FILE).get("chat_template")
    if isinstance(source, list):
        # Several, with names.
        source = {one["name"]: one["template"] for one in source}.get("default")
    return _checked_template(source)


def _checked_template(source: Any) -> str | None:
    """Return a chat template, the right one where it is known to be wrong."""
    if not isinstance(source, str | None):
        raise ValueError("its chat template is not a text")
    return _RIGHT_TEMPLATE if source is not None and _WRONG_TEMPLATE in source else source


def _json_of(path: Path) -> dict[str, Any]:
    """Return the content of a file of JSON; nothing where there is none."""
    if not path.exists():
        return {}
    try:
        content = json.loads(read_regular(path))
    except ValueError as error:
        raise ValueError(f"{path.name} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} is a {type(content).__name__}, expected an object of JSON")
    return content


def _name_of(entry: Any) -> str:
    """Return the name of a token in ``tokenizer_config.json``: a text, or an object with one."""
    name = entry["content"] if isinstance(entry, dict) else entry
    if not isinstance(name, str):
        raise ValueError(f"a special token is {name!r}, expected a text")
    return name


def _begins_with(
    record: dict[str, Any], config: dict[str, Any], names: dict[str, str]
) -> str | None:
    """Return the name of the token that texts begin behind.

    The post-processor says it; only where there is none, ``add_bos_token``.
    """
    steps = [record.get("post_processor") or {}]
    for step in steps:
        steps += step.get("processors", [])
        if step.get("type") == "TemplateProcessing" and "SpecialToken" in step["single"][0]:
            return str(step["single"][0]["SpecialToken"]["id"])
    templates = any(step.get("type") == "TemplateProcessing" for step in steps)
    return names.get("bos_token") if config.get("add_bos_token") and not templates else None


# --- Spellings of tokens --------------------------------------------------------------------------

_VISIBLE = visible_bytes()
_BYTE_OF = {character: byte for byte, character in enumerate(_VISIBLE)}


def _read_byte_level(name: str) -> bytes:
    """Return the bytes of a token's name in visible characters, or of the name itself."""
    read = [_BYTE_OF.get(character, -1) for character in name]
    return name.encode("utf-8", "replace") if -1 in read else bytes(read)


def _read_sentence_piece(name: str) -> bytes:
    """Return the bytes of a token's name in which spaces are written as U+2581."""
    if byte := _BYTE_TOKEN.fullmatch(name):
        return bytes.fromhex(byte[1])
    return name.replace(_SPACE, " ").encode("utf-8", "replace")


def _spelling_of(library: Any) -> Callable[[str], bytes]:
    """Return the function that reads the names of a tokenizer's tokens.

    Raises
    ------
    ValueError
        If it is neither byte-level nor SentencePiece's.
    """
    decoder = library.decoder
    described = "" if decoder is None else decoder.__getstate__().decode()
    if '"ByteLevel"' in described:
        return _read_byte_level
    if '"ByteFallback"' in described or _SPACE in described or '"Metaspace"' in described:
        return _read_sentence_piece
    raise ValueError("the tokenizer is neither byte-level BPE nor SentencePiece's")


# --- GGUF -----------------------------------------------------------------------------------------


class _GgufKeys:
    """The keys of a tokenizer, checked."""

    def __init__(self, keys: Mapping[str, Any]) -> None:
        self._keys = keys
        self.architecture = str(keys.get("general.architecture"))
        self.model = self._get("model", str)
        if self.model not in ("gpt2", "llama"):
            raise ValueError(
                f"its tokenizer is {self.model!r}, expected gpt2 (byte-level BPE) or llama "
                "(SentencePiece)"
            )
        self.tokens = [
            name or f"[EMPTY_{token}]" for token, name in enumerate(self._list("tokens", str))
        ]
        self.size = len(self.tokens)
        if not self.tokens or len({*self.tokens}) < self.size:
            raise ValueError("its list of tokens is empty, or has a token twice")
        kinds = "tokenizer.ggml.token_type" in keys
        self.kinds = self._list("token_type", int) if kinds else [1] * self.size
        if len(self.kinds) != self.size:
            raise ValueError(f"it has {self.size} tokens, and types of {len(self.kinds)}")
        # Rows of the model behind the last token are padding, as in other files.
        used = 1 + max(
            token for token, kind in enumerate(self.kinds) if kind != _UNUSED or not token
        )
        self.ids = {name: token for token, name in enumerate(self.tokens[:used])}
        self.bos, self.eos = self._token("bos"), self._token("eos")
        pre = self._get("pre", str, "")
        self.pre = pre or ("llama-bpe" if self._is_llama3() else "default")
        self.adds_bos = self._get("add_bos_token", bool, self._begins_by_default())
        if self.adds_bos and self.bos is None:
            raise ValueError("its key tokenizer.ggml.bos_token_id is missing")

    def _is_llama3(self) -> bool:
        return self.size == _LLAMA3_TOKENS or self.architecture in _LLAMA3_ARCHITECTURES

    def _begins_by_default(self) -> bool:
        of_llama3 = RULES.get(self.pre) is _LLAMA3
        return self.bos is not None and (self.model == "llama" or of_llama3)

    def _get(self, name: str, kind: type, default: Any = None) -> Any:
        value = self._keys.get(f"tokenizer.ggml.{name}", default)
        value = value.item() if isinstance(value, np.generic) else value
        if type(value) is not kind:
            raise ValueError(
                f"its key tokenizer.ggml.{name} is {str(value)[:40]!r}, expected {kind.__name__}"
            )
        return value

    def _list(self, name: str, kind: type) -> list[Any]:
        value = self._keys.get(f"tokenizer.ggml.{name}")
        if value is None or isinstance(value, (str, int, float)):
            raise ValueError(f"its key tokenizer.ggml.{name} is missing, or no list")
        values = value.tolist() if hasattr(value, "tolist") else list(value)
        if not all(type(one) is kind for one in values):
            raise ValueError(f"its key tokenizer.ggml.{name} is not a list of {kind.__name__}")
        return values

    def _token(self, name: str) -> int | None:
        key = f"{name}_token_id"
        if f"tokenizer.ggml.{key}" not in self._keys:
            return {"bos": 1, "eos": 2}[name] if self.model == "llama" and self.size > 2 else None
        token: int = self._get(key, int)
        if not 0 <= token < self.size:
            raise ValueError(
                f"its key tokenizer.ggml.{key} is {token}, expected 0 to {self.size - 1}"
            )
        return token

    def names(self) -> dict[str, str]:
        """Return what chat templates call some tokens."""
        known = {"bos": self.bos, "eos": self.eos}
        ids = {name: known.get(key, self._id_of(key)) for name, key in _NAMED.items()}
        return {name: self.tokens[token] for name, token in ids.items() if token is not None}

    def _id_of(self, name: str) -> int | None:
        """Return the token of a key; None where there is none, or it is no token."""
        token: int = self._get(f"{name}_token_id", int, -1)
        return token if 0 <= token < self.size else None

    def merges(self) -> list[tuple[str, ...]]:
        """Return the pairs that byte-level BPE merges, but for those of what is no token."""
        pairs = [tuple(merge.split(" ")) for merge in self._list("merges", str)]
        return [pair for pair in pairs if len(pair) == 2 and "".join(pair) in self.ids]

    def scores(self) -> list[float]:
        """Return a score for each token of SentencePiece."""
        scores: list[float] = self._list("scores", float)
        if len(scores) != self.size or not np.isfinite(scores).all():
            raise ValueError("its key tokenizer.ggml.scores is not a number for each token")
        return scores

    def begins_with_space(self) -> bool:
        """Return whether SentencePiece puts a space before a text."""
        begins: bool = self._get("add_space_prefix", bool, True)
        return begins

    def stop_tokens(self) -> list[int]:
        """Return the tokens that end a text: the file's, and those that are known by name."""
        given = [self._id_of(name) for name in ("eot", "eom")]
        named = [self.ids[name] for name in _ENDS if name in self.ids]
        return [
            *([] if self.eos is None else [self.eos]),
            *(token for token in given if token is not None),
            *(token for token in named if self.kinds[token] in (_SPECIAL, _ADDED)),
        ]


def _byte_level_of(about: _GgufKeys) -> Any:
    """Return the library's tokenizer of byte-level BPE."""
    if about.pre not in RULES:
        raise ValueError(
            f"how its tokenizer splits words is not known: tokenizer.ggml.pre is {about.pre!r}, "
            f"expected one of {', '.join(sorted(RULES))}"
        )
    library = load_tokenizers()
    rules = RULES[about.pre]
    merges = about.merges()
    tokenizer = library_of(
        lambda: library.Tokenizer(
            library.models.BPE(about.ids, merges, ignore_merges=rules is _LLAMA3)
        )
    )
    pre = library.pre_tokenizers
    tokenizer.pre_tokenizer = pre.Sequence(
        [
            *(pre.Split(library.Regex(rule), "isolated") for rule in rules),
            pre.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = library.decoders.ByteLevel()
    return tokenizer


def _sentence_piece_of(about: _GgufKeys) -> Any:
    """Return the library's tokenizer of a SentencePiece vocabulary.

    What its scores say is said in merges: all pairs that make a token, the best scores first.
    """
    scores, ids = about.scores(), about.ids
    merges = []
    for token, name in enumerate(about.tokens):
        if about.kinds[token] not in (_UNKNOWN, _SPECIAL, _BYTE):
            cuts = ((name[:at], name[at:]) for at in range(1, len(name)))
            pairs = [pair for pair in cuts if pair[0] in ids and pair[1] in ids]
            merges += [(-scores[token], pair) for pair in pairs]
    merges.sort(key=lambda merge: merge[0])
    unknown = next((name for name, token in ids.items() if about.kinds[token] == _UNKNOWN), None)
    library = load_tokenizers()
    tokenizer = library_of(
        lambda: library.Tokenizer(
            library.models.BPE(
                ids,
                [pair for _, pair in merges],
                unk_token=unknown,
                fuse_unk=True,
                byte_fallback=True,
            )
        )
    )
    change, decoders = library.normalizers, library.decoders
    tokenizer.normalizer = change.Sequence(
        [
            *([change.Prepend(_SPACE)] if about.begins_with_space() else []),
            change.Replace(" ", _SPACE),
        ]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return tokenizer


# --- Back to GGUF ---------------------------------------------------------------------------------

_PLAIN_CONTRACTIONS = "'s|'t|'re|'ve|'m|'ll|'d"


def _pre_of(record: Mapping[str, Any]) -> str:
    """Return the name of the rules by which a ``tokenizer.json`` splits words."""
    rules: list[str] = []
    for step in _steps(record["pre_tokenizer"]):
        kind = step.get("type")
        is_cut = (step.get("behavior"), step.get("invert")) in (
            ("Isolated", False),
            ("Removed", True),
        )
        if kind == "Split" and is_cut and "Regex" in step["pattern"]:
            rules.append(step["pattern"]["Regex"].replace(_PLAIN_CONTRACTIONS, _CONTRACTIONS))
        elif kind == "Digits" and step["individual_digits"]:
            rules.append(r"\p{N}")
        elif kind == "ByteLevel" and not step["add_prefix_space"]:
            rules += [_GPT2] if step["use_regex"] else []
        else:
            rules.append(str(kind))
    found = next((name for name, known in RULES.items() if known == tuple(rules)), None)
    if found is None:
        raise ValueError(
            "GGUF has no name for how the tokenizer splits words: "
            f"{' then '.join(rules)[:200] or 'not at all'}"
        )
    return found


def _spelled(merges: Sequence[str | Sequence[str]]) -> list[str]:
    """Return merges in words with a space between them."""
    words = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
    return words or [NO_MERGE]


def _scores_of(record: Mapping[str, Any], names: Sequence[str | None]) -> dict[str, Any]:
    """Return the scores of a SentencePiece vocabulary: how early a token is merged."""
    scores: dict[str, float] = {}
    last = ""
    for merge in record["model"]["merges"]:
        name = "".join(merge.split(" ") if isinstance(merge, str) else merge)
        if name != last and name in scores:
            raise ValueError(
                "GGUF has a score for each token of SentencePiece, and the tokenizer merges "
                f"{name!r} sooner and later"
            )
        last = name
        scores.setdefault(name, -float(len(scores)))
    first = [step.get("prepend_scheme") for step in _steps(record["pre_tokenizer"])]
    first += [step["type"] for step in _steps(record["normalizer"])]
    return {
        "scores": [scores.get(name or "", 0.0) for name in names],
        "add_space_prefix": bool({*first} & {"always", "first", "Prepend"}),
    }


def _steps(whole: Any) -> list[Any]:
    """Return the steps of a normalizer or pre-tokenizer, which may be a sequence."""
    if whole is None:
        return []
    steps: list[Any] = whole.get("normalizers") or whole.get("pretokenizers") or [whole]
    return steps
