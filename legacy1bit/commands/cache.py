"""``cache``: show or clear the cache of texts."""

import argparse
import math
import time
from pathlib import Path

from legacy1bit.commands.options import check_above_zero
from legacy1bit.commands.texts import add_cache
from legacy1bit.data.cache import LIMIT_VARIABLE, Entry, clear, entries, limit_of
from legacy1bit.data.shards import default_cache

_DAY = 24 * 3600

_SHOW, _CLEAR = "show", "clear"


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the command's arguments to its parser."""
    command.description = (
        "Show the cache of texts, which runs share: their tokens, their tokenizers, and texts from "
        "standard input. Or clear it: runs and models stay, but to resume a run of a text from "
        "standard input then needs --data."
    )
    command.add_argument(
        "action", choices=(_SHOW, _CLEAR), nargs="?", default=_SHOW, help="default: show"
    )
    command.add_argument(
        "--older-than",
        metavar="DAYS",
        type=float,
        help="clear only entries that have not been used for this time",
    )
    add_cache(command)


def run(arguments: argparse.Namespace) -> int:
    """Show or clear."""
    check_above_zero(arguments, "older_than")
    cache = arguments.cache or default_cache()
    if arguments.action == _CLEAR:
        days = arguments.older_than
        return _clear(cache, math.inf if days is None else time.time() - days * _DAY)
    if arguments.older_than is not None:
        raise ValueError("--older-than goes with clear")
    most = limit_of(cache)
    listed = entries(cache)
    print(f"{'folder':<18}{cache}")
    if listed:
        print(f"\n{'last used':<18}{'kind':<12}{'bytes':>16}  text")
    for entry in listed:
        print(_line(entry))
    if listed:
        print()
    print(f"{'total':<18}{_sum_of(listed)}")
    print(
        f"{'limit':<18}{most:,} bytes; beyond it the oldest are removed ({LIMIT_VARIABLE} sets it)"
    )
    return 0


def _clear(cache: Path, before: float) -> int:
    removed, in_use = clear(cache, before)
    print(f"{'removed':<18}{_sum_of(removed)}")
    for entry in in_use:
        print(f"{'in use':<18}{entry.kind} of {_text(entry)}")
    return 0


def _sum_of(some: list[Entry]) -> str:
    return f"{len(some):,} entries, {sum(entry.bytes for entry in some):,} bytes"


def _line(entry: Entry) -> str:
    used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used))
    return f"{used:<18}{entry.kind:<12}{entry.bytes:>16,}  {_text(entry)}"


def _text(entry: Entry) -> str:
    # A file's name may have what a terminal obeys.
    return entry.text if entry.text.isprintable() else ascii(entry.text)
