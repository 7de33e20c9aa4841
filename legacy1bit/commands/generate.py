"""``generate``: let a model write.

Standard output gets the text, byte for byte as the model has it; everything else goes to standard
error.
"""

import argparse
import codecs
import contextlib
import io
import itertools
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from legacy1bit.commands.options import (
    ALL_CORES,
    add_model,
    add_settings,
    given,
    latest_run,
    threads_of,
    write_bytes,
)
from legacy1bit.data.sources import decode_text, standard_input
from legacy1bit.data.tokenizer import tokenizer_of
from legacy1bit.data_utils import with_line_breaks
from legacy1bit.generator import Completion, Generator, new_seed
from legacy1bit.hyperparams import SamplingConfig
from legacy1bit.packed import PackedModel
from legacy1bit.system.errors import INTERRUPTED

_MOST_SAMPLES = 1 << 20
_REMEMBERED_LINES = 1000

# Of a prompt's file. A model sees its end only; and a device may have no end.
_MOST_BYTES = 1 << 26

# Texts that are written before any of them is shown.
_AT_ONCE = 32

# Bytes that are no UTF-8 pass through text and come out as they were.
_BYTES = "surrogateescape"


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Tell the parser what the command takes."""
    command.description = "Write the prompt and its continuation to standard output."
    add_model(command)
    prompt = command.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", help="what the text begins with")
    prompt.add_argument(
        "--prompt-file",
        metavar="FILE",
        help="a file with that, -: standard input; a line break at its end does not count",
    )
    prompt.add_argument(
        "--interactive",
        action="store_true",
        help="ask for prompts, with a history; an empty line goes on with the last text",
    )
    command.add_argument("--max-tokens", type=int, default=250, metavar="N", help="default: 250")
    command.add_argument(
        "--seed",
        type=int,
        metavar="N",
        help="repeats a text (default: another one each time, which standard error tells)",
    )
    command.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        type=with_line_breaks,
        help="end before this text, \\n: a line break; may be given several times",
    )
    command.add_argument(
        "--count",
        type=int,
        default=1,
        metavar="N",
        help="so many texts, of the seed and those that follow it (default: 1)",
    )
    command.add_argument(
        "--json", action="store_true", help="print each text as a line of JSON when it is done"
    )
    command.add_argument(
        "--threads", type=int, metavar="N", help=f"default: 1 for a small model, else {ALL_CORES}"
    )
    add_settings(command, "sampling", SamplingConfig)


def run(arguments: argparse.Namespace) -> int:
    """Write what is asked for."""
    sampling = SamplingConfig(**given(arguments, SamplingConfig))
    for name, value, low in (
        ("seed", 0 if arguments.seed is None else arguments.seed, 0),
        ("max-tokens", arguments.max_tokens, 0),
        ("count", arguments.count, 1),
    ):
        if value < low:
            raise ValueError(f"--{name} is {value}, expected {low} or more")
    if arguments.count > _MOST_SAMPLES:
        raise ValueError(f"--count is {arguments.count}, expected at most {_MOST_SAMPLES}")
    if "" in arguments.stop:
        raise ValueError("--stop is empty, expected text")
    if arguments.interactive and (arguments.json or arguments.count > 1):
        raise ValueError("--interactive excludes --json and --count")
    if arguments.interactive and sys.stdin is None:
        raise ValueError("standard input is closed")
    if sys.stdout is None:
        raise ValueError("standard output is closed")
    threads = None if arguments.threads is None else threads_of(arguments)
    prompt = b"" if arguments.interactive else _prompt(arguments)
    folder = arguments.model or latest_run()
    model = PackedModel.load(folder)
    generator = Generator(model, tokenizer_of(folder, model.config.vocab_size), threads)
    seed = new_seed() if arguments.seed is None else arguments.seed
    if arguments.interactive:
        return _interact(generator, arguments, sampling, seed)
    _tell_of_length(generator, prompt)
    if arguments.count == 1 and not arguments.json:
        return _write(generator, prompt, arguments, sampling, seed)[0]
    return _write_all(generator, prompt, arguments, sampling, seed)


def _prompt(arguments: argparse.Namespace) -> bytes:
    if arguments.prompt_file is None:
        return os.fsencode(arguments.prompt or "")
    if arguments.prompt_file == "-":
        text = standard_input().read(_MOST_BYTES + 1)
    else:
        with open(arguments.prompt_file, "rb") as file:
            text = file.read(_MOST_BYTES + 1)
    if len(text) > _MOST_BYTES:
        raise ValueError(
            f"--prompt-file {arguments.prompt_file} has more than {_MOST_BYTES} bytes, expected a "
            "prompt"
        )
    text = decode_text(text, f"--prompt-file {arguments.prompt_file}")
    return text.removesuffix(b"\n").removesuffix(b"\r")


def _tell_of_length(generator: Generator, prompt: bytes) -> None:
    tokens, reach = len(generator.tokenizer.encode(prompt)), generator.model.config.sequence_length
    if tokens > reach:
        print(
            f"the prompt has {tokens} tokens and the model sees {reach}: its newest count",
            file=sys.stderr,
        )


def _tell_end(
    arguments: argparse.Namespace, sampling: SamplingConfig, seed: int, tokens: int, seconds: float
) -> None:
    """Tell the seed that nobody has chosen, where it counts, and the speed."""
    if tokens:
        if arguments.seed is None and sampling.temperature > 0:
            print(f"seed {seed} (--seed {seed} repeats it)", file=sys.stderr)
        rate = tokens / max(seconds, 1e-9)
        print(f"{tokens:,} tokens in {seconds:.2f} s: {rate:,.0f} tokens/s", file=sys.stderr)


def _write(
    generator: Generator,
    prompt: bytes,
    arguments: argparse.Namespace,
    sampling: SamplingConfig,
    seed: int,
) -> tuple[int, bytes]:
    """Write a text as it comes; return the status and the whole of it."""
    text, status = prompt, 0
    begin = time.perf_counter()
    stream = generator.stream(
        prompt, arguments.max_tokens, sampling, seed, arguments.stop, errors=_BYTES
    )
    try:
        write_bytes(prompt)
        for piece in stream:
            data = piece.encode("utf-8", _BYTES)
            text += data
            write_bytes(data)
    except KeyboardInterrupt:
        status = INTERRUPTED
    seconds = time.perf_counter() - begin
    if sys.stdout.isatty():
        print(file=sys.stderr)
    _tell_end(arguments, sampling, seed, stream.tokens, seconds)
    return status, text


def _write_all(
    generator: Generator,
    prompt: bytes,
    arguments: argparse.Namespace,
    sampling: SamplingConfig,
    seed: int,
) -> int:
    """Write several texts, each when it is done."""
    # What JSON has no way to say is replaced there.
    errors = "replace" if arguments.json else _BYTES
    begin, tokens = time.perf_counter(), 0
    for first in range(0, arguments.count, _AT_ONCE):
        texts = generator.batch(
            [prompt] * min(_AT_ONCE, arguments.count - first),
            arguments.max_tokens,
            sampling,
            seed + first,
            arguments.stop,
            errors,
        )
        for text in texts:
            tokens += text.tokens
            if arguments.json:
                _print_json(prompt, text)
                continue
            number = text.seed - seed + 1
            print(f"text {number} of {arguments.count}, seed {text.seed}:", file=sys.stderr)
            write_bytes(prompt + text.text.encode("utf-8", _BYTES) + b"\n")
    _tell_end(arguments, sampling, seed, tokens, time.perf_counter() - begin)
    return 0


def _print_json(prompt: bytes, text: Completion) -> None:
    record = {
        "prompt": prompt.decode("utf-8", "replace"),
        "text": text.text,
        "tokens": text.tokens,
        "seed": text.seed,
        "stopped": text.stopped,
    }
    print(json.dumps(record), flush=True)


def _interact(
    generator: Generator, arguments: argparse.Namespace, sampling: SamplingConfig, seed: int
) -> int:
    """Ask for prompts and write what follows them, until there are no more."""
    print(
        "An empty line goes on with the last text. Ctrl-C stops a text, Ctrl-D ends.",
        file=sys.stderr,
    )
    text = b""
    with _history():
        for line in _lines():
            prompt = line or text
            try:
                _tell_of_length(generator, prompt)
                _, text = _write(generator, prompt, arguments, sampling, seed)
            except (IndexError, ValueError) as error:
                print(f"legacy1bit: {error}", file=sys.stderr)
                continue
            write_bytes(b"\n")
            seed += 1
    return 0


def _lines() -> Iterator[bytes]:
    """Yield what is typed, line by line; where there is no terminal, it is any bytes."""
    if sys.stdin.isatty():
        with contextlib.suppress(EOFError):
            while True:
                yield os.fsencode(input("> "))
        return
    stream = standard_input()
    first = stream.readline()
    if first.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        # Lines end with other bytes there.
        stream = io.BytesIO(decode_text(first + stream.read(), "standard input"))
        first = stream.readline()
    for line in itertools.chain([first.removeprefix(codecs.BOM_UTF8)] if first else [], stream):
        yield line.removesuffix(b"\n").removesuffix(b"\r")


@contextlib.contextmanager
def _history() -> Iterator[None]:
    """Edit lines, and remember those of earlier sessions, where the system can."""
    try:
        import readline
    except ImportError:
        yield
        return
    if not sys.stdin.isatty():
        yield
        return
    state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    if state.startswith("~"):
        print("there is no home folder to keep a history in", file=sys.stderr)
        yield
        return
    file = Path(state) / "legacy1bit" / "history"
    with contextlib.suppress(OSError):
        readline.read_history_file(file)
    readline.set_history_length(_REMEMBERED_LINES)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(file)
