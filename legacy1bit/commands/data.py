"""``data``: statistics of a text, its tokens on disk, and tokenizers."""

import argparse
import array
import hashlib
import itertools
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from legacy1bit.commands.options import add_settings, given, new_folder
from legacy1bit.commands.progress import progress_of_bytes
from legacy1bit.commands.texts import add_cache, check_different
from legacy1bit.data.cache import cache_errors, saved_streams
from legacy1bit.data.corpus import TEXT, text_source, tokenize_source, tokenizer_for, tokens_of
from legacy1bit.data.shards import default_cache, open_store
from legacy1bit.data.sources import Source, is_token_file
from legacy1bit.data.tokenizer import TOKENIZER_FILE, Tokenizer
from legacy1bit.hyperparams import DataConfig

# The settings of reading and tokenizing a text.
_READING = ("tokenizer", "vocabulary", "field", "encoding", "separator")

_MOST_FREQUENT = 20
# Tokens that are counted at once.
_COUNTED = 1 << 20
_BAR = 40


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the command's arguments to its parser."""
    command.description = (
        "Inspect a text, turn it into tokens on disk, or make a tokenizer of it. PATH is as for "
        "train --data."
    )
    actions = command.add_subparsers(metavar="ACTION", dest="action", required=True)
    for name, meaning in (
        ("inspect", "count documents, copies among them, characters and tokens"),
        ("tokenize", "write tokens into a folder, which train --data takes"),
        ("train-tokenizer", f"write a {TOKENIZER_FILE}, which train --tokenizer-from takes"),
    ):
        action = actions.add_parser(name, help=meaning, description=meaning)
        action.add_argument(
            "paths", metavar="PATH", nargs="+", help="a file, a folder, a pattern or -"
        )
        add_cache(action)
        add_settings(action, "the data", DataConfig, _READING)
        if name == "inspect":
            action.add_argument("--json", action="store_true", help="one line of JSON")
        else:
            action.add_argument("--out", type=new_folder, required=True, metavar="DIR")


def run(arguments: argparse.Namespace) -> int:
    """Run the action."""
    data = DataConfig(**given(arguments, DataConfig))
    cache = arguments.cache or default_cache()
    # A vocabulary is learned in one reading, and text turned into tokens in another.
    check_different(arguments.paths)
    paths = saved_streams(arguments.paths, cache)
    for path in paths:
        if is_token_file(path):
            raise ValueError(f"{path} holds tokens already, expected text")
    source = text_source(paths, data)
    actions = {"inspect": _inspect, "tokenize": _tokenize, "train-tokenizer": _train_tokenizer}
    return actions[arguments.action](arguments, source, data, cache)


# --- inspect --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inspection:
    """The statistics of a text.

    Attributes
    ----------
    files, file_bytes : int
        The number of files, and their sizes on disk, compressed where they are.
    documents, duplicates : int
        The second: the number of copies of an earlier one.
    bytes, characters, lines, tokens : int
    bytes_per_token : float
    lengths : dict of str to int
        Of documents, in bytes: the shortest, the median, the mean, the longest.
    histogram : list of (int, int)
        The number of documents shorter than a power of two, and not shorter than the one before.
    most_frequent : list of (str, int)
        Tokens as text, and their counts.
    """

    files: int
    file_bytes: int
    documents: int
    duplicates: int
    bytes: int
    characters: int
    lines: int
    tokens: int
    bytes_per_token: float
    lengths: dict[str, int]
    histogram: list[tuple[int, int]]
    most_frequent: list[tuple[str, int]]


def inspect(source: Source, tokenizer: Tokenizer, cache: Path) -> Inspection:
    """Return the statistics of a text; its tokens are counted in the cache, as runs use them.

    Raises
    ------
    ValueError, OSError
        If it cannot be read.
    """
    with cache_errors(cache):
        counts = _token_counts(source, tokenizer, cache)
    lengths, digests = array.array("q"), array.array("Q")
    digest = hashlib.blake2b(digest_size=8)
    characters = lines = size = 0
    with progress_of_bytes("text", source.nbytes) as on_progress:
        for piece in source.pieces():
            if piece.begins:
                if lengths:
                    digests.append(int.from_bytes(digest.digest()))
                digest = hashlib.blake2b(digest_size=8)
                lengths.append(0)
            digest.update(piece.text)
            lengths[-1] += len(piece.text)
            characters += len(piece.text.decode("utf-8"))
            lines += piece.text.count(b"\n")
            size += len(piece.text)
            on_progress(size)
    digests.append(int.from_bytes(digest.digest()))
    tokens_seen = int(counts.sum())
    frequent = np.argsort(-counts, kind="stable")[:_MOST_FREQUENT]
    return Inspection(
        files=len(source.files),
        file_bytes=source.nbytes,
        documents=len(lengths),
        duplicates=len(digests) - np.unique(np.array(digests)).size,
        bytes=size,
        characters=characters,
        lines=lines,
        tokens=tokens_seen,
        bytes_per_token=size / max(tokens_seen, 1),
        lengths={
            "shortest": min(lengths),
            "median": int(np.median(lengths)),
            "mean": round(size / len(lengths)),
            "longest": max(lengths),
        },
        histogram=_histogram(np.array(lengths)),
        most_frequent=[
            (tokenizer.decode([token]).decode("utf-8", "backslashreplace"), int(counts[token]))
            for token in frequent.tolist()
            if counts[token]
        ],
    )


def _token_counts(source: Source, tokenizer: Tokenizer, cache: Path) -> npt.NDArray[np.int64]:
    """Return how often each token is in a text, int64[V], without those between documents."""
    store = open_store(*tokens_of(source, tokenizer, cache, progress_of_bytes), TEXT)
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    for start in range(0, store.size, _COUNTED):
        counts += np.bincount(store.read(start, start + _COUNTED), minlength=counts.size)
    (boundary,) = store.read(store.size - 1, store.size)
    counts[boundary] -= store.document_count + 1
    return counts


def _histogram(lengths: npt.NDArray[np.int64]) -> list[tuple[int, int]]:
    """Count lengths below each power of two, from the first to the last that there is."""
    # frexp has an exponent that is exact: 2^(e - 1) <= length < 2^e.
    exponents = np.frexp(lengths.astype(np.float64))[1]
    counts = np.bincount(exponents)
    first = int(np.flatnonzero(counts)[0])
    return [(1 << i, int(counts[i])) for i in range(first, counts.size)]


def _inspect(arguments: argparse.Namespace, source: Source, data: DataConfig, cache: Path) -> int:
    tokenizer = tokenizer_for(source, data, cache, progress_of_bytes)
    inspection = inspect(source, tokenizer, cache)
    _warn(source, inspection.documents)
    if arguments.json:
        print(json.dumps(asdict(inspection)))
        return 0
    print(f"{'text':<18}{source.name}")
    print(f"{'on disk':<18}{inspection.file_bytes:,} bytes in {inspection.files:,} files")
    print(f"{'documents':<18}{inspection.documents:,}, {inspection.duplicates:,} of them copies")
    print(f"{'bytes':<18}{inspection.bytes:,}")
    print(f"{'characters':<18}{inspection.characters:,}")
    print(f"{'lines':<18}{inspection.lines:,}")
    print(f"{'tokens':<18}{inspection.tokens:,} ({tokenizer.kind}, {tokenizer.vocab_size:,} kinds)")
    print(f"{'bytes per token':<18}{inspection.bytes_per_token:.3f}")
    for name, length in inspection.lengths.items():
        print(f"{name:<18}{length:,} bytes")
    print("\nbytes per document")
    _print_bars([(f"< {limit:,}", count) for limit, count in inspection.histogram])
    print("\nthe most frequent tokens")
    _print_bars([(json.dumps(text, ensure_ascii=False), n) for text, n in inspection.most_frequent])
    return 0


def _warn(source: Source, documents: int) -> None:
    for warning in source.warnings(documents):
        print(warning, file=sys.stderr)


def _print_bars(rows: Sequence[tuple[str, int]]) -> None:
    most = max((count for _, count in rows), default=1) or 1
    width = max((len(name) for name, _ in rows), default=0)
    for name, count in rows:
        print(f"{name:>{width}} {count:>14,} {'#' * round(_BAR * count / most)}")


# --- tokenize, train-tokenizer --------------------------------------------------------------------


def _check_empty(folder: Path) -> None:
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"{folder} is not an empty folder: name another")


def _tokenize(arguments: argparse.Namespace, source: Source, data: DataConfig, cache: Path) -> int:
    _check_empty(arguments.out)
    if source.has_chats:
        raise ValueError(
            f"{source.name} holds conversations, whose tokens depend on the model's chat template: "
            "train --data takes them as they are"
        )
    tokenizer = tokenizer_for(source, data, cache, progress_of_bytes)
    begin = time.perf_counter()
    with progress_of_bytes("tokens", source.nbytes) as on_progress:
        index = tokenize_source(
            source, tokenizer, arguments.out, on_progress=on_progress, replace=False
        )
    seconds = time.perf_counter() - begin
    part = index.parts[TEXT]
    _warn(source, part.documents)
    print(
        f"{arguments.out}: {part.tokens:,} tokens of {part.documents:,} documents, "
        f"{part.bytes / 1e6 / max(seconds, 1e-9):,.0f} MB/s"
    )
    return 0


def _train_tokenizer(
    arguments: argparse.Namespace, source: Source, data: DataConfig, cache: Path
) -> int:
    if data.tokenizer == "bytes":
        raise ValueError("bytes need no training: expected --tokenizer bpe or chars")
    _check_empty(arguments.out)
    tokenizer = tokenizer_for(source, data, cache, progress_of_bytes)
    arguments.out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(arguments.out)
    # One document more than files shows that a separator separates something.
    most = 0 if source.separator is None else len(source.files) + 1
    begins = (piece for piece in source.pieces() if piece.begins)
    _warn(source, sum(1 for _ in itertools.islice(begins, most)))
    print(f"{arguments.out / TOKENIZER_FILE}: {tokenizer.vocab_size:,} tokens")
    return 0
