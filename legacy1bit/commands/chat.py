"""``chat``: talk with a model.

Answers go to standard output; everything else goes to standard error.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from legacy1bit.commands.lines import history, lines
from legacy1bit.commands.options import (
    add_generation,
    add_model,
    generation_of,
    latest_run,
    load_generator,
    path_of,
    write_bytes,
)
from legacy1bit.formats.adapters import resolve
from legacy1bit.formats.conversation import THINKING, Conversation, choose_template
from legacy1bit.system.errors import INTERRUPTED
from legacy1bit.system.files import atomic_write

_HELP = """\
/help         these lines
/reset        forget the conversation
/system TEXT  say to the model how it is to answer; without TEXT, nothing
/save FILE    write the conversation as JSON
/quit         end, as Ctrl-D does
A line that ends with \\ goes on in the next one; lines between \"\"\" and \"\"\" are one message.
A message that begins with / is written with //. Ctrl-C stops an answer, and a second one ends."""

_QUOTES = '"""'


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    command.description = (
        "Talk with a model. Each line is a message; /help lists what else can be typed."
    )
    add_model(command)
    command.add_argument(
        "--system",
        default="",
        metavar="TEXT",
        help="how the model is to answer (default: nothing)",
    )
    command.add_argument(
        "--template",
        metavar="FILE",
        type=path_of,
        help="a chat template in Jinja; plain: lines of User: and Assistant: "
        "(default: the model's own)",
    )
    command.add_argument(
        "--thinking",
        action=argparse.BooleanOptionalAction,
        help="whether the model thinks before it answers, where its template has a variable "
        f"{THINKING} (default: as the template has it)",
    )
    add_generation(command, "an answer", 1024)


def run(arguments: argparse.Namespace) -> int:
    """Talk until standard input ends."""
    sampling, threads = generation_of(arguments, max_tokens=1)
    for stream, name in ((sys.stdin, "input"), (sys.stdout, "output")):
        if stream is None:
            raise ValueError(f"standard {name} is closed")
    path = arguments.model or latest_run()
    with load_generator(arguments, path, threads) as generator:
        path, named = resolve(path, arguments.adapter)
        adapters = [adapter for adapter, _ in named]
        template = choose_template(arguments.template, path, generator.tokenizer, adapters)
        with Conversation(generator, template, sampling, arguments.max_tokens) as conversation:
            if arguments.thinking is not None:
                _set_thinking(conversation, arguments.thinking)
            conversation.system = arguments.system
            conversation.stop += tuple(arguments.stop)
            if arguments.seed is not None:
                conversation.seed = arguments.seed
            return _talk(conversation)


def _set_thinking(conversation: Conversation, thinking: bool) -> None:
    try:
        conversation.set_thinking(thinking)
    except ValueError as error:
        raise ValueError(f"--{'' if thinking else 'no-'}thinking: {error}") from None


# --- The terminal ---------------------------------------------------------------------------------


def _talk(conversation: Conversation) -> int:
    """Answer what is typed, until it ends."""
    terminal, interrupted = sys.stdin.isatty(), False
    if terminal:
        print("/help lists the commands. Ctrl-C stops an answer, Ctrl-D ends.", file=sys.stderr)
    with history("chat_history"):
        for text in _messages():
            try:
                if text.startswith("/") and not text.startswith("//"):
                    if not _obey(conversation, *text[1:].split(maxsplit=1)):
                        return 0
                    continue
                stopped = _answer(conversation, text.removeprefix("/"), terminal)
            except (IndexError, OSError, ValueError) as error:
                if isinstance(error, BrokenPipeError):
                    raise
                print(f"legacy1bit: {error}", file=sys.stderr)
                continue
            # Where nothing is typed, the second Ctrl-C comes in another answer.
            if stopped and interrupted and not terminal:
                return INTERRUPTED
            interrupted = stopped or interrupted
    return 0


def _answer(conversation: Conversation, text: str, terminal: bool) -> bool:
    """Write an answer as it is generated; return whether Ctrl-C stopped it."""
    begin, dropped, answer, stopped = time.perf_counter(), conversation.dropped, "", False
    try:
        stream = conversation.ask(text)
    except KeyboardInterrupt:
        print("the message is left out", file=sys.stderr)
        return True
    if conversation.dropped > dropped:
        print(
            f"the context is full: the first {conversation.dropped} messages are left out",
            file=sys.stderr,
        )
    try:
        for piece in stream:
            answer += piece
            write_bytes(piece.encode("utf-8", "replace"))
    except KeyboardInterrupt:
        stopped = True
    stream.close()
    answered = conversation.finish(answer)
    write_bytes(b"\n")
    if conversation.full and not stream.stopped and not stopped:
        print("the context is full: the answer ends here", file=sys.stderr)
    elif not answered and not stopped:
        print(
            "the model was still thinking: --max-tokens N gives it more, --no-thinking has it "
            "answer at once",
            file=sys.stderr,
        )
    if terminal:
        seconds = max(time.perf_counter() - begin, 1e-9)
        print(
            f"({stream.tokens:,} tokens, {stream.tokens / seconds:,.1f} tokens/s; "
            f"{conversation.decoder.length:,} of {conversation.decoder.capacity:,} in the context)",
            file=sys.stderr,
        )
    return stopped


def _obey(conversation: Conversation, command: str = "", rest: str = "") -> bool:
    """Do what a line with a slash says; return whether the conversation goes on."""
    if command == "quit":
        return False
    if command == "help":
        print(_HELP, file=sys.stderr)
    elif command == "reset":
        conversation.reset()
        print("the conversation is forgotten", file=sys.stderr)
    elif command == "system":
        conversation.system = rest
        print(f"the system message is {rest or 'empty'!r}", file=sys.stderr)
    elif command == "save":
        if not rest:
            raise ValueError("/save needs the name of a file")
        said = json.dumps(conversation.transcript(), indent=1, ensure_ascii=False)
        file = Path(rest.strip()).expanduser()
        atomic_write(file, said + "\n")
        print(f"{len(conversation.messages)} messages are in {file}", file=sys.stderr)
    else:
        raise ValueError(f"/{command} is unknown: /help lists what there is")
    return True


def _messages() -> Iterator[str]:
    """Yield messages of one line or several; empty ones are none."""
    parts: list[str] = []
    quoted = False
    for data in lines(lambda: "... " if parts else "> "):
        line = data.decode("utf-8", "replace")
        if not parts and line.lstrip().startswith(_QUOTES):
            quoted, line = True, line.lstrip().removeprefix(_QUOTES)
        goes_on = not line.rstrip().endswith(_QUOTES) if quoted else line.endswith("\\")
        if quoted and not goes_on:
            line = line.rstrip().removesuffix(_QUOTES)
        elif goes_on and not quoted:
            line = line.removesuffix("\\")
        parts.append(line)
        if goes_on:
            continue
        text, quoted = "\n".join(parts).strip("\n"), False
        parts.clear()
        if text.strip():
            yield text
    if text := "\n".join(parts).strip():
        yield text
