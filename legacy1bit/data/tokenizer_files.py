"""Tokenizers beside models: files of our own, and of others."""

import json
import os
from pathlib import Path
from typing import Any

from legacy1bit.data.bpe import load_tokenizers
from legacy1bit.data.published_tokenizer import (
    STOP_TOKENS,
    TOKENIZER_CONFIG_FILE,
    PublishedTokenizer,
)
from legacy1bit.data.sources import is_token_file
from legacy1bit.data.tokenizer import (
    SPECIAL_TOKENS,
    TOKENIZER_FILE,
    ByteTokenizer,
    SubwordTokenizer,
    Tokenizer,
    UnknownTokenizer,
    description_in_template,
    fit_tokenizer,
)
from legacy1bit.hyperparams import SETTINGS_FILE
from legacy1bit.system.files import mistaken_file, read_regular

# Tokens that are bytes.
_BYTES = 256


def load_tokenizer(folder: str | os.PathLike[str], vocab_size: int | None = None) -> Tokenizer:
    """Read a folder's ``tokenizer.json``.

    Parameters
    ----------
    folder : path-like
    vocab_size : int, optional
        How many tokens the model knows: one that others published may have fewer.

    Raises
    ------
    OSError
        If it cannot be read.
    ValueError
        If it is damaged or of a kind that is not known, or ``tokenizers`` is not installed, and is
        needed.
    """
    path = Path(folder) / TOKENIZER_FILE
    try:
        record = json.loads(read_regular(path))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {mistaken_file(path) or error}") from None
    if isinstance(record, dict) and record.get("added_tokens"):
        # Where it is not installed, the file is not to blame.
        load_tokenizers()
    if _is_published(Path(folder), record):
        return PublishedTokenizer.of_folder(folder, vocab_size)
    tokenizer: Tokenizer | None
    try:
        model = record["model"]
        if record["added_tokens"]:
            tokenizer = SubwordTokenizer.of_spelled(model["merges"])
        else:
            tokenizer = ByteTokenizer(len(model["vocab"]))
    except (KeyError, TypeError, ValueError):
        tokenizer = None
    if tokenizer is None or record not in (
        tokenizer.description(),
        description_in_template(tokenizer),
    ):
        raise ValueError(f"{path} is not a tokenizer that legacy1bit wrote, or it is damaged")
    return tokenizer


def _is_published(folder: Path, record: Any) -> bool:
    """Whether a tokenizer is another program's, by the file beside it and its special tokens."""
    try:
        config = json.loads(read_regular(folder / TOKENIZER_CONFIG_FILE))
        names = [entry["content"] for entry in record["added_tokens"]]
    except (OSError, ValueError, RecursionError, LookupError, TypeError):
        return False
    return STOP_TOKENS in config or names not in ([], [*SPECIAL_TOKENS])


def tokenizer_of(model: str | os.PathLike[str], vocab_size: int) -> Tokenizer:
    """Return the tokenizer that lies beside a model; bytes, as many as it knows, where none does.

    What tokens of another program stand for is not known, however few there are.

    Raises
    ------
    ValueError
        If the file is damaged, or is of other tokens than the model.
    """
    if not (Path(model) / TOKENIZER_FILE).exists():
        if vocab_size > _BYTES or _has_learned_tokens(Path(model)):
            return UnknownTokenizer(vocab_size)
        return ByteTokenizer(vocab_size)
    tokenizer = load_tokenizer(model, vocab_size)
    if tokenizer.vocab_size < vocab_size:
        raise ValueError(
            f"{model} has {vocab_size} tokens, and its {TOKENIZER_FILE} {tokenizer.vocab_size}"
        )
    return fit_tokenizer(tokenizer, vocab_size)


def _has_learned_tokens(run: Path) -> bool:
    """Whether the text of a run is a file of tokens; what tells of none, or is damaged, is not."""
    try:
        source = json.loads(read_regular(run / SETTINGS_FILE))["source"]
        # The module that knows such records imports this one.
        texts = [text["path"] for text in source.get("texts", [source])]
        paths = (path for text in texts for path in ([text] if isinstance(text, str) else text))
        return any(map(is_token_file, paths))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False
