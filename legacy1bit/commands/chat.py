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
from legacy1bit.data.published_tokenizer import PublishedTokenizer
from legacy1bit.formats.chat_template import JinjaTemplate, PlainTemplate, Template
from legacy1bit.formats.published import read_template
from legacy1bit.generator import Generator, Stream, new_seed
from legacy1bit.hyperparams import SamplingConfig
from legacy1bit.system.errors import INTERRUPTED
from legacy1bit.system.files import atomic_write, read_regular

_HELP = """\
/help         these lines
/reset        forget the conversation
/system TEXT  say to the model how it is to answer; without TEXT, nothing
/save FILE    write the conversation as JSON
/quit         end, as Ctrl-D does
A line that ends with \\ goes on in the next one; lines between \"\"\" and \"\"\" are one message.
A message that begins with / is written with //. Ctrl-C stops an answer, and a second one ends."""

_QUOTES = '"""'

# What models that think write before their answer, between these; and the variable of their
# templates (Qwen3's) that says whether they are to.
_THINK, _THOUGHT, _THINKING = "<think>", "</think>", "enable_thinking"

# Tokens of a prompt that are read before Ctrl-C is heard.
_BLOCK = 256


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
        f"{_THINKING} (default: as the template has it)",
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
        template = _template(arguments.template, path, generator)
        try:
            if arguments.thinking is not None:
                _set_thinking(template, arguments.thinking)
            conversation = Conversation(generator, template, sampling, arguments.max_tokens)
            conversation.system = arguments.system
            conversation.stop += tuple(arguments.stop)
            if arguments.seed is not None:
                conversation.seed = arguments.seed
            return _talk(conversation)
        finally:
            template.close()


def _template(wanted: Path | None, model: Path, generator: Generator) -> Template:
    """Return the template that is asked for, or the model's own."""
    if wanted == Path("plain"):
        return PlainTemplate()
    if wanted is not None:
        names: dict[str, str] = getattr(generator.tokenizer, "names", {})
        return JinjaTemplate(read_regular(wanted).decode("utf-8"), names)
    template = read_template(model, generator.tokenizer)
    if template is None:
        raise ValueError(
            f"{model} has no chat template: it was not trained for conversations; --template plain "
            "makes lines of User: and Assistant: of them, and --template FILE reads one"
        )
    return template


def _set_thinking(template: Template, thinking: bool) -> None:
    """Have the model think before it answers, or not."""
    if not isinstance(template, JinjaTemplate) or _THINKING not in template.source:
        raise ValueError(
            f"--{'' if thinking else 'no-'}thinking: the chat template has no variable {_THINKING}"
        )
    template.variables[_THINKING] = thinking


def without_thoughts(answer: str, begun: bool = False) -> str | None:
    """Return an answer without what the model thought before it.

    Parameters
    ----------
    answer : str
    begun : bool
        Whether the thoughts began before the answer, in what the model read.

    Returns
    -------
    str or None
        None if the thoughts have no end.
    """
    if not begun and not answer.lstrip().startswith(_THINK):
        return answer
    _, thought, said = answer.partition(_THOUGHT)
    return said if thought else None


class Conversation:
    """Messages, and the tokens of them that a decoder has in its cache.

    Parameters
    ----------
    generator : Generator
    template : Template
    sampling : SamplingConfig
    max_tokens : int
        The longest answer.

    Attributes
    ----------
    system : str
        What the conversation begins with, if anything.
    messages : list of dict
        All messages so far, of which ``dropped`` are not in the context any more.
    stop : tuple of str
        What answers end before.
    """

    def __init__(
        self,
        generator: Generator,
        template: Template,
        sampling: SamplingConfig,
        max_tokens: int,
    ) -> None:
        self.system = ""
        self.stop = template.stop
        self.seed = new_seed()
        self.messages: list[dict[str, str]] = []
        self.dropped = 0
        self._generator, self._template = generator, template
        self._sampling, self._max_tokens = sampling, max_tokens
        self.decoder = generator.decoder()
        # The tokens that the decoder has, or the first of them.
        self._cached: list[int] = []
        self._thinks = False
        self._history: list[int] = []

    def reset(self) -> None:
        """Forget all messages."""
        self.messages, self.dropped = [], 0

    def ask(self, text: str) -> Stream:
        """Add a message of the user, and return the answer as it is generated.

        ``finish`` takes the answer in.

        Raises
        ------
        ValueError
            If the message alone is longer than the context, or the template refuses it. It is not
            part of the conversation then, nor after Ctrl-C.
        """
        before = self.dropped
        self.messages.append({"role": "user", "content": text})
        try:
            tokens = self._prompt()
            self._read(tokens)
        except BaseException:
            self.messages.pop()
            self.dropped = before
            raise
        self._history = tokens
        return self._generator.resume(
            self.decoder,
            self._history,
            min(self._max_tokens, self.decoder.capacity - len(tokens)),
            self._sampling,
            self.seed + len(self.messages) // 2,
            self.stop,
        )

    def _read(self, tokens: list[int]) -> None:
        """Have the decoder read tokens, but for the last ones, which are read with the answer."""
        same = 0
        for old, new in zip(self._cached, tokens[:-1], strict=False):
            if old != new:
                break
            same += 1
        self._cached = tokens[:same]
        self.decoder.truncate(same)
        while len(tokens) - self.decoder.length > _BLOCK:
            self.decoder.prefill(tokens[self.decoder.length : self.decoder.length + _BLOCK])
            self._cached = tokens[: self.decoder.length]

    def finish(self, answer: str) -> bool:
        """Take in an answer, or as much of it as there is; return whether there is any.

        What the model thought is left out, as the cards of such models demand: they were trained on
        conversations without.
        """
        self._cached = self._history[: self.decoder.length]
        said = without_thoughts(answer, self._thinks)
        self.messages.append({"role": "assistant", "content": (said or "").strip()})
        return said is not None

    @property
    def full(self) -> bool:
        """Whether an answer ended because the context did."""
        return len(self._history) >= self.decoder.capacity

    def _prompt(self) -> list[int]:
        """Return the tokens of the conversation; the oldest messages are dropped if they must be.

        Half of the context is free then: what is dropped moves the rest, which is read again.
        """
        capacity = self.decoder.capacity
        tokens = self._tokens()
        if len(tokens) + min(self._max_tokens, capacity // 4) > capacity:
            while len(tokens) > capacity // 2 and self.dropped + 2 < len(self.messages):
                self.dropped += 2
                tokens = self._tokens()
        if len(tokens) >= capacity:
            raise ValueError(
                f"the message has {len(tokens)} tokens, with what comes before it, expected fewer "
                f"than {capacity}, the context"
            )
        return tokens

    def transcript(self, first: int = 0) -> list[dict[str, str]]:
        """Return the system message, if there is one, and the messages from number ``first`` on."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, *self.messages[first:]]

    def _tokens(self) -> list[int]:
        messages = self.transcript(self.dropped)
        tokenizer = self._generator.tokenizer
        names_tokens = self._template.names_tokens
        if names_tokens and isinstance(tokenizer, PublishedTokenizer):
            messages = [{**one, "content": tokenizer.protect(one["content"])} for one in messages]
        text = self._template.render(messages)
        self._thinks = text.rstrip().endswith(_THINK)
        tokens = tokenizer.encode_special(text) if names_tokens else self._generator.encode(text)
        if not tokens.size:
            raise ValueError("the chat template makes no text of the conversation")
        return [int(token) for token in tokens]


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
