"""``generate``: generate text.

The text goes to standard output, byte for byte as the model generates it; everything else goes to
standard error.
"""

import argparse
import json
import os
import sys
import time

from legacy1bit.commands.lines import history, lines
from legacy1bit.commands.options import (
    add_generation,
    add_model,
    generation_of,
    latest_run,
    load_generator,
    write_bytes,
)
from legacy1bit.data.sources import decode_text, standard_input
from legacy1bit.generator import Completion, Generator, new_seed
from legacy1bit.hyperparams import SamplingConfig
from legacy1bit.system.errors import INTERRUPTED

_MOST_TEXTS = 1 << 20

# Largest file of a prompt: the model sees only its end, and a device may be endless.
_MOST_BYTES = 1 << 26

# Texts that are generated side by side.
_BATCH = 32

# Bytes that are not UTF-8 pass through text and come out unchanged.
_BYTES = "surrogateescape"


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    command.description = (
        "Generate a text, and write the prompt and its continuation to standard output."
    )
    add_model(command)
    prompt = command.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", help="beginning of the text (default: none)")
    prompt.add_argument(
        "--prompt-file",
        metavar="FILE",
        help="a file with the prompt, -: standard input; a line break at its end is removed",
    )
    prompt.add_argument(
        "--interactive",
        action="store_true",
        help="ask for prompts, with a history; an empty line continues the last text",
    )
    command.add_argument(
        "--count",
        type=int,
        default=1,
        metavar="N",
        help="number of texts, of this seed and the next ones (default: 1)",
    )
    command.add_argument("--json", action="store_true", help="print each text as a line of JSON")
    add_generation(command, "a text", 250)


def run(arguments: argparse.Namespace) -> int:
    """Generate the texts."""
    sampling, threads = generation_of(arguments, max_tokens=0, count=1)
    if arguments.count > _MOST_TEXTS:
        raise ValueError(f"--count is {arguments.count}, expected at most {_MOST_TEXTS}")
    if arguments.interactive and (arguments.json or arguments.count > 1):
        raise ValueError("--interactive excludes --json and --count")
    if arguments.interactive and sys.stdin is None:
        raise ValueError("standard input is closed")
    if sys.stdout is None:
        raise ValueError("standard output is closed")
    prompt = b"" if arguments.interactive else _prompt(arguments)
    folder = arguments.model or latest_run()
    generator = load_generator(arguments, folder, threads)
    seed = new_seed() if arguments.seed is None else arguments.seed
    if arguments.interactive:
        return _interact(generator, arguments, sampling, seed)
    _warn_of_length(generator, prompt)
    if arguments.count == 1 and not arguments.json:
        return _stream(generator, prompt, arguments, sampling, seed)[0]
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


def _warn_of_length(generator: Generator, prompt: bytes) -> None:
    tokens, limit = len(generator.tokenizer.encode(prompt)), generator.context
    if tokens > limit:
        print(
            f"the prompt has {tokens} tokens: truncated to its last {limit}, the model's context",
            file=sys.stderr,
        )


def _print_end(
    arguments: argparse.Namespace, sampling: SamplingConfig, seed: int, tokens: int, seconds: float
) -> None:
    """Print a random seed, if it matters, and the speed."""
    if tokens:
        if arguments.seed is None and sampling.temperature > 0:
            print(f"seed {seed} (--seed {seed} repeats it)", file=sys.stderr)
        rate = tokens / max(seconds, 1e-9)
        print(f"{tokens:,} tokens in {seconds:.2f} s: {rate:,.0f} tokens/s", file=sys.stderr)


def _stream(
    generator: Generator,
    prompt: bytes,
    arguments: argparse.Namespace,
    sampling: SamplingConfig,
    seed: int,
) -> tuple[int, bytes]:
    """Write a text as it is generated; return the status and the whole text."""
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
    _print_end(arguments, sampling, seed, stream.tokens, seconds)
    return status, text


def _write_all(
    generator: Generator,
    prompt: bytes,
    arguments: argparse.Namespace,
    sampling: SamplingConfig,
    seed: int,
) -> int:
    """Write several texts, or JSON, each when it is complete."""
    # JSON cannot hold bytes that are not UTF-8.
    errors = "replace" if arguments.json else _BYTES
    begin, tokens = time.perf_counter(), 0
    for first in range(0, arguments.count, _BATCH):
        settings = (arguments.max_tokens, sampling, seed + first, arguments.stop, errors)
        count = min(_BATCH, arguments.count - first)
        if count > 1:
            texts = generator.batch([prompt] * count, *settings)
        else:
            texts = [generator.complete(prompt, *settings)]
        for text in texts:
            tokens += text.tokens
            if arguments.json:
                _print_json(prompt, text)
                continue
            number = text.seed - seed + 1
            print(f"text {number} of {arguments.count}, seed {text.seed}:", file=sys.stderr)
            write_bytes(prompt + text.text.encode("utf-8", _BYTES) + b"\n")
    _print_end(arguments, sampling, seed, tokens, time.perf_counter() - begin)
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
    """Ask for prompts and continue them, until standard input ends."""
    print(
        "An empty line continues the last text. Ctrl-C stops a text, Ctrl-D ends.",
        file=sys.stderr,
    )
    text = b""
    with history("history"):
        for line in lines(lambda: "> "):
            prompt = line or text
            try:
                _warn_of_length(generator, prompt)
                _, text = _stream(generator, prompt, arguments, sampling, seed)
            except (IndexError, ValueError) as error:
                print(f"legacy1bit: {error}", file=sys.stderr)
                continue
            write_bytes(b"\n")
            seed += 1
    return 0
