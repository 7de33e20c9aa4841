"""A conversation with a model, whose beginning stays in the decoder's cache."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn, Self

from legacy1bit.data.published_tokenizer import TEMPLATE_FILE
from legacy1bit.data.tokenizer import Tokenizer
from legacy1bit.formats.chat_template import JinjaTemplate, PlainTemplate, Template
from legacy1bit.formats.chat_tokens import THINK, chat_text, chat_tokens, without_thoughts
from legacy1bit.formats.published import read_template
from legacy1bit.generator import Generator, Stream, new_seed
from legacy1bit.hyperparams import SamplingConfig
from legacy1bit.system.files import read_regular

# The variable of templates (Qwen3's) that says whether models are to think before they answer.
THINKING = "enable_thinking"

# Tokens of a prompt that are read before Ctrl-C is heard.
_BLOCK = 256


def choose_template(
    wanted: Path | None, model: Path, tokenizer: Tokenizer, adapters: Sequence[Path] = ()
) -> Template:
    """Return the chat template that is asked for, or the model's own.

    Parameters
    ----------
    wanted : Path or None
        A file with a template in Jinja; ``Path("plain")``: lines of User: and Assistant:.
    model : Path
    tokenizer : Tokenizer
        The model's.
    adapters : sequence of Path
        On the model. The template that the last of them was trained with comes before the model's.

    Raises
    ------
    ValueError
        If the template is damaged, or the model has none.
    OSError
        If a file cannot be read.
    """
    if wanted == Path("plain"):
        return PlainTemplate()
    if wanted is not None:
        names: dict[str, str] = getattr(tokenizer, "names", {})
        return JinjaTemplate(read_regular(wanted).decode("utf-8"), names)
    trained = [path for path in adapters if (path / TEMPLATE_FILE).is_file()]
    template = read_template(trained[-1] if trained else model, tokenizer)
    if template is None:
        raise ValueError(
            f"{model} has no chat template: it was not trained for conversations; --template plain "
            "makes lines of User: and Assistant: of them, and --template FILE reads one"
        )
    return template


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
    seed : int
        Of the first answer; each later one has the next.

    Notes
    -----
    ``close``, or the end of a ``with``, ends the process of the template. A conversation is for one
    thread at a time; several conversations with one generator may be held side by side.
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

    def __reduce__(self) -> NoReturn:
        raise TypeError("a conversation cannot be copied or pickled: its messages can")

    def close(self) -> None:
        """End the process of the template."""
        self._template.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def set_thinking(self, thinking: bool) -> None:
        """Have the model think before it answers, or not.

        Raises
        ------
        ValueError
            If its template has no variable for that.
        """
        template = self._template
        if not isinstance(template, JinjaTemplate) or THINKING not in template.source:
            raise ValueError(f"the chat template has no variable {THINKING}")
        template.variables[THINKING] = thinking

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

    def answer(self, text: str) -> str:
        """Add a message of the user, and return the whole answer; errors are those of ``ask``."""
        return "".join(self.stream(text))

    def stream(self, text: str) -> Iterator[str]:
        """Add a message of the user, and yield the answer piece by piece.

        What was yielded is taken in when the answer ends, or when the iterator is closed before.
        Errors are those of ``ask``, at the first piece.
        """
        said = ""
        with self.ask(text) as stream:
            try:
                for piece in stream:
                    said += piece
                    yield piece
            finally:
                self.finish(said)

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
        tokenizer = self._generator.tokenizer
        text = chat_text(self._template, tokenizer, self.transcript(self.dropped))
        self._thinks = text.rstrip().endswith(THINK)
        tokens = chat_tokens(self._template, tokenizer, text)
        if not tokens.size:
            raise ValueError("the chat template makes no text of the conversation")
        return [int(token) for token in tokens]
