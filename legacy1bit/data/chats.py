"""Conversations to learn from: records of JSON, checked, and how they become tokens.

A conversation is ``{"messages": [{"role": …, "content": …}, …]}``, or a question and an answer as
``{"prompt": …, "completion": …}``. Only answers are predicted; the rest is read.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from legacy1bit.data.tokenizer import Tokenizer
from legacy1bit.data_utils import Tokens

MESSAGES = "messages"
_PROMPT, _COMPLETION = "prompt", "completion"
_ROLES = ("system", "user", "assistant")

# What values of JSON are called.
JSON_KINDS = {
    dict: "an object",
    list: "a list",
    str: "a string",
    bool: "true or false",
    int: "a number",
    float: "a number",
    type(None): "null",
}

# What a message has: its ``role`` and its ``content``.
Message = dict[str, str]


class ChatTokens(NamedTuple):
    """Tokens of a conversation, or of a part of it, to be read from their beginning.

    Attributes
    ----------
    tokens : int32[N]
    predicted : bool[N]
        Which of them are predicted: the answers, and what ends them.
    """

    tokens: Tokens
    predicted: npt.NDArray[np.bool_]


class ChatEncoder(Protocol):
    """Makes tokens of conversations, by a chat template.

    Attributes
    ----------
    source : str
        The template, in Jinja.
    sha256 : str
        Of all that the tokens depend on, beside the tokenizer's file, in hexadecimal digits.
    """

    @property
    def source(self) -> str: ...
    @property
    def sha256(self) -> str: ...

    def encode(self, messages: Sequence[Message]) -> list[ChatTokens]:
        """Return the tokens of a conversation.

        They are in several parts where later messages change what a model is shown of earlier ones.

        Raises
        ------
        ValueError
            If the template refuses the conversation, or shows a model something else than what it
            has to continue.
        """
        ...

    def close(self) -> None:
        """End the template's process."""
        ...


# Returns the encoder that goes with a tokenizer.
EncoderOf = Callable[[Tokenizer], ChatEncoder]


def is_conversation(record: Mapping[str, Any], field: str, default: str) -> bool:
    """Whether a record is a conversation, where a text would be in a field.

    One that has a text in the default field is none; another field has to be ``messages``.
    """
    if field not in (default, MESSAGES) or isinstance(record.get(field), str):
        return False
    if MESSAGES in record:
        return not isinstance(record[MESSAGES], str)
    return field == default and default not in record and {_PROMPT, _COMPLETION} <= record.keys()


def messages_of(record: Mapping[str, Any], where: str) -> list[Message]:
    """Return the messages of a record.

    Parameters
    ----------
    record : mapping
    where : str
        Its file and line, for errors.

    Raises
    ------
    ValueError
        If it is no conversation: of messages by user and assistant in turn, perhaps behind one of
        the system, the last by the assistant.
    """
    if MESSAGES in record:
        messages = record[MESSAGES]
    elif {_PROMPT, _COMPLETION} <= record.keys():
        pair = zip(("user", "assistant"), (_PROMPT, _COMPLETION), strict=True)
        messages = [{"role": role, "content": record[name]} for role, name in pair]
    else:
        expected = f"{MESSAGES!r}, or {_PROMPT!r} and {_COMPLETION!r}"
        raise ValueError(f"{where}: no conversation, expected {expected}")
    if not isinstance(messages, list) or not messages:
        came = "empty" if messages == [] else JSON_KINDS[type(messages)]
        raise ValueError(f"{where}: {MESSAGES!r} is {came}, expected a list of messages")
    checked = [
        _checked(message, f"{where}, message {number}")
        for number, message in enumerate(messages, 1)
    ]
    _check_turns([message["role"] for message in checked], where)
    return checked


def _checked(message: Any, where: str) -> Message:
    """Return the role and the content of a message."""
    if not isinstance(message, dict):
        came = JSON_KINDS[type(message)]
        raise ValueError(f"{where}: {came}, expected an object with 'role' and 'content'")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or role not in _ROLES:
        came = f"{role[:40]!r}" if isinstance(role, str) else JSON_KINDS[type(role)]
        raise ValueError(f"{where}: the role is {came}, expected one of {', '.join(_ROLES)}")
    if not isinstance(content, str):
        came = JSON_KINDS[type(content)]
        raise ValueError(f"{where}: the content is {came}, expected text")
    try:
        content.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: the content has {content[error.start]!a} at character {error.start}, half "
            "of a surrogate pair, expected text"
        ) from None
    return {"role": role, "content": content}


def _check_turns(roles: Sequence[str], where: str) -> None:
    """Raise ``ValueError`` unless user and assistant take turns, and the assistant ends."""
    first = int(roles[0] == "system")
    for number, role in enumerate(roles[first:]):
        expected = ("user", "assistant")[number % 2]
        if role != expected:
            raise ValueError(
                f"{where}: message {first + number + 1} is of {role}, expected of {expected}: they "
                "take turns, perhaps behind one message of system"
            )
    if roles[-1] != "assistant":
        raise ValueError(f"{where}: the last message is of {roles[-1]}, expected of assistant")


def text_of(messages: Sequence[Message]) -> bytes:
    """Return what is said in a conversation, a line break between messages."""
    return "\n".join(message["content"] for message in messages).encode()


def encoded(
    conversations: Iterator[tuple[str, list[Message]]], encoder: ChatEncoder
) -> Iterator[tuple[list[Message], list[ChatTokens]]]:
    """Yield conversations with their tokens.

    Parameters
    ----------
    conversations : iterator of (str, list of dict)
        Where each is, for errors, and its messages.
    encoder : ChatEncoder

    Raises
    ------
    ValueError
        As ``ChatEncoder.encode``, with the conversation's place.
    """
    for where, messages in conversations:
        try:
            yield messages, encoder.encode(messages)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
