"""Conversations as tokens: those that a model reads before it answers, and those it learns from."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from legacy1bit.data.chats import ChatTokens
from legacy1bit.data.published_tokenizer import PublishedTokenizer
from legacy1bit.data.tokenizer import Tokenizer
from legacy1bit.data_utils import Tokens
from legacy1bit.formats.chat_template import JinjaTemplate, PlainTemplate, Template
from legacy1bit.formats.published import read_template

# What models that think write before their answer, between these.
THINK, _THOUGHT = "<think>", "</think>"

Messages = Sequence[Mapping[str, str]]


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
    if not begun and not answer.lstrip().startswith(THINK):
        return answer
    _, thought, said = answer.partition(_THOUGHT)
    return said if thought else None


def chat_text(
    template: Template, tokenizer: Tokenizer, messages: Messages, answer: bool = True
) -> str:
    """Return the text of a conversation, as ``chat_tokens`` takes it.

    Names of special tokens in messages stand for text. Parameters and errors are those of
    ``Template.render``.
    """
    if template.names_tokens and isinstance(tokenizer, PublishedTokenizer):
        messages = [{**one, "content": tokenizer.protect(one["content"])} for one in messages]
    return template.render(messages, answer)


def chat_tokens(template: Template, tokenizer: Tokenizer, text: str) -> Tokens:
    """Return the tokens of the text of a conversation, int32[N].

    A template that names no tokens leaves it to the tokenizer what texts begin behind.

    Raises
    ------
    IndexError
        If a byte of the text is not a token of the model.
    """
    if template.names_tokens:
        return tokenizer.encode_special(text)
    tokens = tokenizer.encode(text)
    begin = [] if tokenizer.bos_token is None else [tokenizer.bos_token]
    return np.concatenate([np.array(begin, np.int32), tokens])


@dataclass(frozen=True)
class TemplateEncoder:
    """Makes tokens of conversations, by a template. For its members see ``ChatEncoder``."""

    template: Template
    tokenizer: Tokenizer

    @property
    def source(self) -> str:
        """The template, in Jinja."""
        return self.template.source

    @property
    def sha256(self) -> str:
        """Of the template, its variables, and the tokens that end answers."""
        variables = getattr(self.template, "variables", {})
        known = [self.source, self.template.ending, variables, self.tokenizer.stop_tokens]
        return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()

    def close(self) -> None:
        """End the template's process."""
        self.template.close()

    def encode(self, messages: Messages) -> list[ChatTokens]:
        """Return the tokens of a conversation.

        Before each answer stand the tokens that a model reads when it is asked for that one. Where
        these go on from the answer before, both are in one part.
        """
        parts: list[ChatTokens] = []
        history: list[Mapping[str, str]] = []
        for message in messages:
            if message["role"] == "assistant":
                read, answer = self._answer(history, message)
                before = parts[-1].predicted if parts else np.zeros(0, bool)
                if parts and np.array_equal(read[: before.size], parts[-1].tokens):
                    parts.pop()
                else:
                    before = np.zeros(0, bool)
                predicted = np.ones(read.size + answer.size, bool)
                predicted[: read.size] = False
                predicted[: before.size] = before
                parts.append(ChatTokens(np.concatenate([read, answer]), predicted))
                # As ``Conversation`` takes answers in.
                said = (without_thoughts(message["content"]) or "").strip()
                message = {**message, "content": said}
            history.append(message)
        return parts

    def _answer(self, history: Messages, message: Mapping[str, str]) -> tuple[Tokens, Tokens]:
        """Return the tokens that are read before an answer, and those of it up to its end."""
        template, tokenizer = self.template, self.tokenizer
        prompt = chat_text(template, tokenizer, history)
        whole = chat_text(template, tokenizer, [*history, message], False) + template.ending
        if not whole.startswith(prompt):
            raise ValueError(
                "the chat template asks for an answer with another text than it writes before the "
                "answer, so that a model would learn what it is never asked"
            )
        read = chat_tokens(template, tokenizer, prompt)
        tokens = chat_tokens(template, tokenizer, whole)
        answer = tokens[read.size :]
        if not np.array_equal(tokens[: read.size], read):
            # Some token would hold the prompt's end and the answer's beginning.
            rest = whole[len(prompt) :]
            encode = tokenizer.encode_special if template.names_tokens else tokenizer.encode
            answer = encode(rest)
            if tokenizer.decode([*read, *answer]) != tokenizer.decode(tokens):
                raise ValueError("the tokenizer makes another text of an answer that stands alone")
        ends = np.flatnonzero(np.isin(answer, tokenizer.stop_tokens))
        return read, answer[: ends[0] + 1] if ends.size else answer


def chat_encoder(folder: Path | None, tokenizer: Tokenizer) -> TemplateEncoder:
    """Return the encoder of a model's conversations.

    Parameters
    ----------
    folder : Path or None
        The model, whose template it has, if it has one; else lines of User: and Assistant:.
    tokenizer : Tokenizer

    Raises
    ------
    ValueError
        If the template is damaged or too long, or jinja2 is needed and not installed.
    OSError
        If a file cannot be read.
    """
    template: Template | None = None
    if folder is not None:
        template = read_template(folder, tokenizer)
    elif isinstance(tokenizer, PublishedTokenizer) and tokenizer.template is not None:
        template = JinjaTemplate(tokenizer.template, tokenizer.names)
    return TemplateEncoder(template or PlainTemplate(), tokenizer)
