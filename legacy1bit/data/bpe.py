"""What byte-level BPE merges, learned from a text in a process of its own.

The library hears no signal while it learns, for seconds or for minutes; a process can be ended.
It gets the text on its standard input, each part behind its length, and answers with one line of
JSON.
"""

import contextlib
import itertools
import json
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

from legacy1bit.system.cgroups import can_start_threads
from legacy1bit.system.child import end_child, ready_line, start_child, why_ended
from legacy1bit.system.optional import load_extra
from legacy1bit.threads import available_cores

# The characters of a text that is learned from before a process would have started.
_SHORT = 1 << 16

# The module as the process runs it, and the length that no part of a text has.
_MODULE = "legacy1bit.data.bpe"
_LENGTH_BYTES = 4
_END = b"\xff" * _LENGTH_BYTES


def load_tokenizers() -> Any:
    """Return Hugging Face's package of tokenizers.

    It panics where it cannot start its threads, a core each; there it does without.

    Raises
    ------
    ValueError
        If it is not installed.
    """
    if not can_start_threads(available_cores()):
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
    return load_extra("tokenizers other than bytes need", "tokenizers")


def learn_merges(texts: Iterable[str], vocab_size: int) -> list[list[str]]:
    """Return the merges, in visible bytes, that spell a text shortly.

    Ctrl-C, or whatever else raises meanwhile, ends the process that learns. Where no process can
    be started, this one learns, and hears of signals afterwards.

    Parameters
    ----------
    texts : iterable of str
        The text in parts, over which no merge reaches.
    vocab_size : int
        The number of tokens, bytes included; a short text gives fewer.

    Raises
    ------
    ValueError
        If ``tokenizers`` is not installed, or it fails.
    """
    load_tokenizers()
    rest = iter(texts)
    first: list[str] = []
    size = 0
    for text in rest:
        first.append(text)
        size += len(text)
        if size > _SHORT:
            break
    whole = itertools.chain(first, rest)
    if size > _SHORT and (process := start_child(_MODULE, str(vocab_size))) is not None:
        return _learn_there(process, whole)
    return _learn(whole, vocab_size)


def _learn(texts: Iterable[str], vocab_size: int) -> list[list[str]]:
    library = load_tokenizers()
    learner = library.Tokenizer(library.models.BPE())
    learner.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size,
        show_progress=False,
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
    )
    learner.train_from_iterator(texts, trainer)
    merges: list[list[str]] = json.loads(learner.to_str())["model"]["merges"]
    return merges


# --- The process that has the text ----------------------------------------------------------------


def _learn_there(process: subprocess.Popen[bytes], texts: Iterable[str]) -> list[list[str]]:
    """Return what a process learns, and end it."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        for text in texts:
            data = text.encode()
            try:
                process.stdin.write(len(data).to_bytes(_LENGTH_BYTES) + data)
            except BrokenPipeError:
                break
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(_END)
            process.stdin.flush()
        line = process.stdout.read()
        answer: dict[str, Any]
        answer = json.loads(line) if line else {"error": why_ended(process.wait())}
    finally:
        end_child(process)
    if "error" in answer:
        raise ValueError(f"the vocabulary could not be learned: {answer['error']}")
    merges: list[list[str]] = answer["merges"]
    return merges


# --- The process that learns ----------------------------------------------------------------------


def _main() -> None:
    # A terminal's Ctrl-C comes to all of its processes; the one that has the text answers it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    load_tokenizers()
    # Where no thread can be started, the library cannot learn either.
    with contextlib.suppress(RuntimeError):
        threading.Thread(target=_end_with_the_other, daemon=True).start()
    # What the library prints is not the answer.
    with open(os.dup(1), "wb") as output:
        os.dup2(2, 1)
        output.write(ready_line(_MODULE))
        output.flush()
        answer: dict[str, Any]
        try:
            answer = {"merges": _learn(_received(sys.stdin.buffer), int(sys.argv[1]))}
        except BaseException as error:  # a panic of the library is not an Exception
            answer = {"error": " ".join(str(error).split()) or type(error).__name__}
        output.write(json.dumps(answer).encode())


def _received(stream: BinaryIO) -> Iterator[str]:
    """Yield the parts of a text that another process writes."""
    while (head := stream.read(_LENGTH_BYTES)) != _END:
        size = int.from_bytes(head)
        data = stream.read(size)
        if len(head) < _LENGTH_BYTES or len(data) < size:
            raise EOFError("the text has no end")
        yield data.decode()


def _end_with_the_other() -> None:
    """End this process when the one that has the text ends."""
    other = select.poll()
    # No event is asked for: a closed end is always reported.
    other.register(sys.stdin, 0)
    other.poll()
    os._exit(1)


if __name__ == "__main__":
    _main()
