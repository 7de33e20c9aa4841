"""Where the text of a run comes from."""

import argparse
import contextlib
import filecmp
import hashlib
import os
import stat
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

from legacy1bit.commands.options import add_settings, path_of
from legacy1bit.commands.progress import progress_of_bytes
from legacy1bit.data.cache import STREAMS, mark_used, text_of, trim
from legacy1bit.data.corpus import Corpus, shard_corpus, source_corpus, story_corpus, token_corpus
from legacy1bit.data.places import TEXT_PATH, VALIDATION_PATH, check_there, path_entry, paths_of
from legacy1bit.data.shards import INDEX_FILE, cache_key, default_cache
from legacy1bit.data.sources import (
    NANOGPT_TOKENS,
    STANDARD_INPUT,
    Source,
    is_token_file,
    open_source,
    read_token_file,
    standard_input,
    token_file_info,
)
from legacy1bit.data.tokenizer import (
    TOKENIZER_FILE,
    ByteTokenizer,
    Tokenizer,
    character_tokenizer,
    load_tokenizer,
    train_bpe,
)
from legacy1bit.hyperparams import DataConfig, ModelConfig
from legacy1bit.system.errors import SettingError
from legacy1bit.system.files import remove_left_behind, shared, temporary_of

STORIES = "stories"

# Settings of texts of one's own; the stories are bytes, each from its beginning.
_OF_READING = ("tokenizer", "field", "encoding", "separator", "split")
_OF_TEXTS = (*_OF_READING, "vocabulary", "validation_fraction", "order", "document_mask")

DEFAULT_STORIES = 20000
_MOST_STORIES = 10_000_000
_HELD_OUT_STORIES = 256

# Tokens of BPE that nobody has asked for in other numbers; the bytes are among them.
_VOCABULARY = 1024

# Of several texts, whose names are that of all.
_MOST_NAMES = 3

# A vocabulary is learned from the beginning of a text, where there is more of it than this: more
# text hardly changes it.
_LEARNED_BYTES = 200_000_000


def add_data(command: argparse.ArgumentParser) -> None:
    """Give a command the options that say where text is and what becomes of it."""
    command.add_argument(
        "--data",
        metavar="PATH",
        nargs="+",
        action="extend",
        help="text files, folders, patterns or -; .jsonl, .parquet, .gz, .zst, .xz and .bz2, and "
        ".bin of tokens, too (default: the stories); with --resume, where the text has moved to",
    )
    command.add_argument(
        "--validation",
        metavar="PATH",
        nargs="+",
        action="extend",
        help="a text of its own to validate on",
    )
    command.add_argument(
        "--tokenizer-from",
        metavar="DIR",
        type=path_of,
        help="take the tokenizer of this folder, rather than make one",
    )
    command.add_argument("--stories", type=int, metavar="N", help="how many to learn from")
    add_cache(command)
    add_settings(command, "the data", DataConfig)


def add_cache(command: argparse.ArgumentParser) -> None:
    """Give a command the option that says where tokens are kept."""
    command.add_argument(
        "--cache",
        metavar="DIR",
        type=path_of,
        help="where tokens are kept from one run to the next (default: legacy1bit in the user's "
        "cache)",
    )


def source_of(arguments: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Return where a corpus comes from, so that it can be made again."""
    data, count = arguments.data, arguments.stories
    if data is None:
        if arguments.validation is not None:
            raise ValueError("--validation goes with --data")
        count = DEFAULT_STORIES if count is None else count
        return {"name": STORIES, "stories": count, "seed": seed}
    if count is not None:
        raise ValueError("--stories and --data exclude each other")
    validation = _paths_named(arguments.validation, "validation")
    data = _paths_named(data, "data", arguments.cache)
    return {
        "name": _name_of(data),
        TEXT_PATH: path_entry(data),
        VALIDATION_PATH: path_entry(validation) if validation else None,
    }


def _paths_named(paths: Sequence[str] | None, option: str, cache: Path | None = None) -> list[str]:
    """Return the absolute paths that an option names, none where it is not given.

    Only --data may name streams.
    """
    paths = paths or []
    for path in paths:
        if not path:
            raise ValueError(f"--{option} is empty, expected a path")
        if option != "data" and _is_stream(path):
            raise ValueError(f"--{option} is {path}, which is a stream: expected a file")
    return [_absolute(path) for path in kept(paths, cache)]


def _name_of(paths: Sequence[str]) -> str:
    """Return what a text is called."""
    names = [Path(path).name for path in paths]
    return " + ".join(names if len(names) <= _MOST_NAMES else [*names[:_MOST_NAMES], "..."])


def _absolute(path: str) -> str:
    try:
        return os.path.abspath(path)
    except FileNotFoundError:
        raise ValueError(f"{path} is in the current folder, which has been removed") from None


def moved(
    source: dict[str, Any],
    folder: Path,
    named: dict[str, Sequence[str] | None],
    cache: Path | None,
) -> dict[str, Any]:
    """Return the source that a run or a study has recorded, with its texts where they lie now.

    Parameters
    ----------
    source : dict
    folder : Path
        Of the run or the study.
    named : dict of str to list of str or None
        What two options say of where its text and its validation text have moved to.
    cache : Path or None

    Raises
    ------
    ValueError
        If the run has no text to be named, or no hash to compare it with.
    OSError
        If a text is nowhere.
    """
    for (option, paths), key in zip(named.items(), (TEXT_PATH, VALIDATION_PATH), strict=True):
        if paths is None:
            continue
        if not paths_of(source, key):
            raise ValueError(f"--{option} goes with a run that has such a text, unlike {folder}")
        if "sha256" not in source:
            raise ValueError(f"--{option} cannot be checked: {folder} tells no SHA-256 of its text")
        source = {**source, key: path_entry(_paths_named(paths, option, cache))}
    options = " or ".join(f"--{option}" for option in named)
    check_there(source, f"{options} says where the text has moved to")
    return source


def kept(paths: Sequence[str], cache: Path | None) -> list[str]:
    """Return paths that can be read more than once: what a stream carries is kept."""
    return [
        _keep_stream(cache or default_cache(), path) if _is_stream(path) else path for path in paths
    ]


def _is_stream(path: str) -> bool:
    """Whether what a path leads to can be read once only, and not by a run that goes on."""
    if path == STANDARD_INPUT:
        return True
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def _keep_stream(cache: Path, data: str) -> str:
    """Write what a stream carries to a file, which can be read again, and return its path."""
    if data != STANDARD_INPUT:
        if Path(data).suffix.lower() in (".bin", ".parquet"):
            raise ValueError(f"{data} is a stream, expected a file")
        with open(data, "rb") as stream:
            mode = os.fstat(stream.fileno()).st_mode
            if stat.S_ISBLK(mode) or (stat.S_ISCHR(mode) and not stream.isatty()):
                raise ValueError(f"{data} is a device, expected a file or a pipe")
            return _keep(cache, stream, data)
    return _keep(cache, standard_input(), "standard input")


def _keep(cache: Path, stream: BinaryIO, name: str) -> str:
    folder = cache / STREAMS
    temporary = temporary_of(folder / "stream")
    digest = hashlib.sha256()
    try:
        with _named(cache):
            folder.mkdir(parents=True, exist_ok=True)
            remove_left_behind(folder)
            file = open(temporary, "xb")  # noqa: SIM115
        with file, _in_use(temporary):
            while block := stream.read(1 << 20):
                digest.update(block)
                with _named(cache):
                    file.write(block)
            with _named(cache):
                file.flush()
                os.fsync(file.fileno())
        if temporary.stat().st_size == 0:
            raise ValueError(f"{name} is empty, expected text")
        # Without a suffix, its beginning says what it is.
        path = folder / digest.hexdigest()[:16]
        # The same text keeps its file with its time, and so its tokens.
        if not (path.exists() and filecmp.cmp(temporary, path, shallow=False)):
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    return str(path)


@contextlib.contextmanager
def _in_use(path: Path) -> Iterator[None]:
    """Keep a file that is written from being taken for one that was left behind."""
    handle = shared(path)
    try:
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def _named(cache: Path) -> Iterator[None]:
    """Say of what goes wrong in the cache that there may be another one."""
    try:
        yield
    except OSError as error:
        path = cache if error.filename is None else Path(error.filename)
        if not (path.is_relative_to(cache) or cache.is_relative_to(path)):
            raise
        reason = f"{error.strerror} (tokens are kept there; --cache names another folder)"
        raise OSError(error.errno, reason, str(cache)) from None


def corpus_of(
    source: dict[str, Any],
    data: DataConfig,
    config: ModelConfig,
    cache: Path | None = None,
    tokenizer: Tokenizer | None = None,
) -> tuple[Corpus, ModelConfig]:
    """Return the corpus that ``source_of`` described, and the model with as many tokens.

    Parameters
    ----------
    source : dict
        Gets the hash of the text where it has none yet.
    data : DataConfig
    config : ModelConfig
    cache : Path, optional
    tokenizer : Tokenizer, optional
        That of a run that goes on; made of the text when not given.

    Raises
    ------
    ValueError
        If the text has changed since, is too short, or cannot be read.
    """
    told = source.get("name") == STORIES and "path" not in source
    if told:
        _refuse(data, _OF_TEXTS, "the stories")
        return _stories(source, config), config
    _check_kind(source, "name", str)
    paths, others = _places(source, TEXT_PATH), _places(source, VALIDATION_PATH)
    if not paths:
        raise ValueError("the run's source has no path, which is damaged")
    path, other = paths[0], others[0] if others else None
    for one in others:
        if is_token_file(one) != is_token_file(path):
            raise ValueError(f"of {path} and {one} one holds tokens, the other one text")
    if len(paths) == 1 and is_token_folder(path):
        _refuse(data, (*_OF_READING, "vocabulary"), "a folder of tokens")
        if others:
            raise ValueError("--validation goes with a text, and not with a folder of tokens")
        found_beside = load_tokenizer(path)
        if tokenizer is not None and tokenizer.sha256 != found_beside.sha256:
            raise ValueError(f"{path} has tokens of its own tokenizer, and not of another")
        corpus = shard_corpus(Path(path), found_beside, data, config.sequence_length)
    elif is_token_file(path) and max(len(paths), len(others)) == 1:
        tokens = read_token_file(path)
        _refuse(data, _OF_READING, "a file of tokens")
        if tokenizer is not None and tokenizer.kind in ("chars", "bpe"):
            raise ValueError(f"{path} has tokens of another program, and not of a tokenizer's")
        validation_tokens = None if other is None else read_token_file(other)
        formats = [token_file_info(file).format for file in (path, other) if file is not None]
        # A run that goes on has had its vocabulary from the start.
        most = {"most": NANOGPT_TOKENS} if tokenizer is None and "nanoGPT" in formats else {}
        corpus = token_corpus(
            tokens, source["name"], data, config.sequence_length, validation_tokens, **most
        )
    else:
        found = _open(paths, data)
        validation = _open(others, data) if others else None
        cache = cache or default_cache()
        with _named(cache):
            corpus = _text_corpus(found, validation, data, config, cache, tokenizer)
    if data.subword_splitting and (corpus.tokenizer.parents < 0).all():
        raise SettingError(
            "subword_splitting splits merged tokens: expected tokenizer bpe",
            *("subword_splitting", "tokenizer"),
        )
    if source.setdefault("sha256", corpus.sha256) != corpus.sha256:
        whose = "its SHA-256" + (" with the others'" if len(paths) + len(others) > 1 else "")
        raise ValueError(
            f"{path} has changed since the run began, or is another text: {whose} is "
            f"{corpus.sha256}, expected {source['sha256']}"
        )
    return corpus, replace(config, vocab_size=corpus.training.pad_token)


def _refuse(data: DataConfig, names: Sequence[str], what: str) -> None:
    """Raise ``SettingError`` for settings that would be ignored."""
    for name in names:
        if getattr(data, name) != getattr(DataConfig(), name):
            raise SettingError(f"{name} goes with --data of text, and not with {what}", name)


def _text_corpus(
    source: Source,
    validation: Source | None,
    data: DataConfig,
    config: ModelConfig,
    cache: Path,
    tokenizer: Tokenizer | None,
) -> Corpus:
    if tokenizer is None:
        tokenizer = tokenizer_for(source, data, cache)
    with progress_of_bytes("tokens", source.nbytes) as on_progress:
        corpus = source_corpus(
            source,
            tokenizer,
            data,
            config.sequence_length,
            tokenizer.vocab_size,
            cache,
            validation,
            on_progress,
        )
    # As long as the corpus is in use, so is what a stream has carried.
    for path in source.files:
        if path.parent == (cache / STREAMS).resolve():
            weakref.finalize(corpus, os.close, shared(path))
    return corpus


def is_token_folder(path: str) -> bool:
    """Whether a path is that of a folder that ``data tokenize`` has written."""
    return all((Path(path) / name).is_file() for name in (INDEX_FILE, TOKENIZER_FILE))


def _open(paths: Sequence[str], data: DataConfig) -> Source:
    return open_source(paths, data.field, data.encoding, data.separator)


def _check_kind(source: dict[str, Any], key: str, kind: type) -> None:
    if type(source.get(key)) is not kind:
        raise ValueError(f"the run's source has {key} {source.get(key)!r}, which is damaged")


def _places(source: dict[str, Any], key: str) -> list[str]:
    """Return the paths of a text, each of which can be read again and again."""
    paths = paths_of(source, key)
    for path in paths:
        if not path or "\0" in path or _is_stream(path):
            raise ValueError(f"the run's source has {key} {path!r}, expected a file or a folder")
    return paths


def _stories(source: dict[str, Any], config: ModelConfig) -> Corpus:
    for key in ("stories", "seed"):
        _check_kind(source, key, int)
    if not 1 <= source["stories"] <= _MOST_STORIES:
        raise SettingError(
            f"stories is {source['stories']}, expected 1 to {_MOST_STORIES}", "stories"
        )
    return story_corpus(
        source["stories"],
        _HELD_OUT_STORIES,
        source["seed"],
        config.sequence_length,
        config.pad_token,
    )


def tokenizer_for(source: Source, data: DataConfig, cache: Path) -> Tokenizer:
    """Return the tokenizer that settings ask for, made of a text where need be, and kept.

    Raises
    ------
    ValueError
        If the text cannot be read, or a library is missing.
    OSError
        If a file cannot be read or written.
    """
    if data.tokenizer == "bytes":
        if data.vocabulary not in (None, 256):
            raise SettingError(
                f"vocabulary is {data.vocabulary}, expected 256 for bytes", "vocabulary"
            )
        return ByteTokenizer()
    size = data.vocabulary
    if size is None and data.tokenizer == "bpe":
        size = _VOCABULARY
    fingerprint = source.fingerprint()
    known = {"source": fingerprint, "kind": data.tokenizer, "size": size}
    folder = cache / f"tokenizer-{cache_key(known)}"
    text = text_of(source.files)
    with contextlib.suppress(OSError, ValueError):
        tokenizer = load_tokenizer(folder)
        mark_used(folder, text)
        return tokenizer
    total = min(source.nbytes, _LEARNED_BYTES)
    with progress_of_bytes("vocabulary", total) as on_progress:
        pieces = _beginning(source, on_progress)
        if data.tokenizer == "bpe":
            assert size is not None
            tokenizer = train_bpe(pieces, size)
        else:
            tokenizer = character_tokenizer(pieces, size)
    if source.fingerprint() != fingerprint:
        raise ValueError(f"{source.name} has changed while it was read")
    # What is there is damaged, or another process has just written the same.
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(folder)
    mark_used(folder, text)
    trim(cache, folder)
    return tokenizer


def _beginning(source: Source, on_progress: Callable[[int], None]) -> Iterator[bytes]:
    done = 0
    for piece in source.pieces():
        yield piece.text
        done += len(piece.text)
        on_progress(done)
        if done >= _LEARNED_BYTES:
            break
