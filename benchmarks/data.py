"""``make bench-data``: how fast text becomes tokens, and tokens batches, and in how much memory.

A text of words that follow Zipf's law is made first: in a temporary folder, of as many bytes as
``--megabytes`` says.
"""

import argparse
import importlib
import importlib.util
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.models import peak_memory
from legacy1bit.data.corpus import TEXT, tokenize_source
from legacy1bit.data.shards import open_store, read_index
from legacy1bit.data.sources import open_source
from legacy1bit.data.tokenizer import ByteTokenizer, Tokenizer, cut, train_bpe
from legacy1bit.dataset import Prefetcher, TokenDataset

_WORDS = 50_000
_BLOCK = 1 << 20
_ROUNDS = 3

# Of the text, BPE gets so much; it is more than a second's work, and it is done several times.
_BPE_MEGABYTES = 32
_VOCABULARY = 4096

_LENGTH, _BATCH = 256, 64
_READ_SECONDS = 3.0


def write_text(path: Path, megabytes: int) -> None:
    """Write text of made-up words, an own line after every 12, of so many MiB."""
    rng = np.random.default_rng(0)
    letters = np.frombuffer(b"etaoinshrdlucmfwypvbgkjqxz", np.uint8)
    likely = 1.0 / np.arange(1, 27)
    words = [
        bytes(rng.choice(letters, rng.integers(1, 10), p=likely / likely.sum()))
        for _ in range(_WORDS)
    ]
    ranks = 1.0 / np.arange(2, _WORDS + 2)
    with open(path, "wb") as file:
        while file.tell() < megabytes << 20:
            chosen = rng.choice(_WORDS, (_BLOCK // 60, 12), p=ranks / ranks.sum())
            lines = [b" ".join([words[number] for number in line]) for line in chosen.tolist()]
            file.write(b"\n".join(lines) + b"\n")
        file.truncate(megabytes << 20)


def seconds_of(call: Callable[[], object]) -> float:
    """Return how long a call takes."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def tokenize(path: Path, tokenizer: Tokenizer, folder: Path) -> None:
    """Turn a text into tokens on disk."""
    tokenize_source(open_source(str(path)), tokenizer, folder)


def reading(folder: Path, order: str, seconds: float, ahead: bool) -> float:
    """Return how many tokens per second come from shards, in batches or from a thread that reads
    ahead."""
    index = read_index(folder)
    store = open_store(folder, index, TEXT)
    dataset = TokenDataset(store, _LENGTH, 256, order=order)
    reader = dataset.reader(_BATCH, 1)
    batches = Prefetcher(reader) if ahead else reader
    done, begin = 0, time.perf_counter()
    try:
        while (passed := time.perf_counter() - begin) < seconds:
            done += batches.next_batch().tokens.size
    finally:
        if isinstance(batches, Prefetcher):
            batches.close()
    return done / passed


def main() -> int:
    """Print a table."""
    parser = argparse.ArgumentParser(prog="make bench-data", description=__doc__)
    parser.add_argument("--megabytes", type=int, default=1024, metavar="N", help="default: 1024")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="where to (default: temporary)")
    parser.add_argument("--only-read", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only_read is not None:
        print(reading(arguments.only_read, "windows", _READ_SECONDS, False))
        return 0
    if arguments.megabytes < 1:
        parser.error(f"--megabytes is {arguments.megabytes}, expected 1 or more")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        _measure(Path(name), arguments.megabytes)
    return 0


def _measure(folder: Path, megabytes: int) -> None:
    text, small = folder / "text.txt", folder / "small.txt"
    write_text(text, megabytes)
    size = text.stat().st_size
    part = min(megabytes, _BPE_MEGABYTES) << 20
    with open(text, "rb") as file:
        small.write_bytes(file.read(part))
    print("| what | median | from turn to turn | unit |\n| --- | ---: | ---: | --- |")
    tokens = folder / "tokens"
    turns = [
        size / 1e6 / seconds_of(lambda: tokenize(text, ByteTokenizer(), tokens))
        for _ in range(_ROUNDS)
    ]
    _row(f"bytes, {megabytes} MiB to shards", turns, "MB/s")
    if importlib.util.find_spec("tokenizers"):
        _measure_bpe(folder, small, part)
    for order in ("windows", "epochs", "packed"):
        for ahead, how in ((False, ""), (True, ", through a thread")):
            turns = [reading(tokens, order, 1.0, ahead) / 1e6 for _ in range(_ROUNDS)]
            _row(f"batches of {_BATCH} x {_LENGTH}, {order}{how}", turns, "M tokens/s")
    command = ["-m", "benchmarks.data", "--only-read", str(tokens)]
    _row("peak memory of a program that reads them", [peak_memory(command) / 2**20], "MiB")
    command = ["-m", "legacy1bit.main", "data", "tokenize", str(text)]
    peak = peak_memory([*command, "--out", str(folder / "out")])
    _row("peak memory of data tokenize", [peak / 2**20], "MiB")


def _measure_bpe(folder: Path, small: Path, size: int) -> None:
    def texts() -> list[bytes]:
        return [piece.text for piece in open_source(str(small)).pieces()]

    begin = time.perf_counter()
    tokenizer = train_bpe(iter(texts()), _VOCABULARY)
    seconds = time.perf_counter() - begin
    _row(f"BPE, learning {_VOCABULARY:,} tokens of {size >> 20} MiB", [seconds], "s")
    tokenizer.save(folder)
    library = importlib.import_module("tokenizers")
    alone = library.Tokenizer.from_file(str(folder / "tokenizer.json"))
    parts = [part.decode() for part in cut(small.read_bytes())]
    encode = alone.encode_batch_fast
    ours, theirs = [], []
    for _ in range(_ROUNDS):
        ours.append(size / 1e6 / seconds_of(lambda: tokenize(small, tokenizer, folder / "bpe")))
        theirs.append(size / 1e6 / seconds_of(lambda: encode(parts, add_special_tokens=False)))
    _row(f"BPE, {size >> 20} MiB to shards", ours, "MB/s")
    _row("tokenizers alone, the same text in memory", theirs, "MB/s")
    ratio = [one / other for one, other in zip(ours, theirs, strict=True)]
    _row("BPE to tokenizers alone", ratio, "x")


def _row(what: str, turns: list[float], unit: str) -> None:
    spread = f"{min(turns):,.4g} to {max(turns):,.4g}" if len(turns) > 1 else ""
    print(f"| {what} | {statistics.median(turns):,.4g} | {spread} | {unit} |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
