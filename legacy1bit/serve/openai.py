"""OpenAI's API: from the JSON of a request to what an engine is asked, and back.

The source is OpenAI's description of its API (``/v1/completions``, ``/v1/chat/completions``,
``/v1/embeddings``).
"""

import base64
import json
import math
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from legacy1bit.data.tokenizer import Tokenizer
from legacy1bit.hyperparams import SamplingConfig
from legacy1bit.serve.errors import ApiError
from legacy1bit.serve.parameters import (
    Biases,
    Flag,
    Form,
    Json,
    Messages,
    Number,
    Parameter,
    Prompts,
    Stops,
    StreamOptions,
    Text,
    Tokens,
    read,
)
from legacy1bit.serve.requests import Finished, GenerationRequest, Piece

# What JSON has for a probability of 0, as in OpenAI's API.
_LEAST_LOGPROB = -9999.0


@dataclass(frozen=True)
class Limits:
    """The most that one request may ask for.

    Attributes
    ----------
    texts : int
        Texts, of all prompts together.
    tokens : int
        Of an answer.
    stops, stop_characters : int
        Stop strings, and characters of one.
    biases : int
        Tokens with a bias.
    """

    texts: int = 16
    tokens: int = 1 << 20
    stops: int = 16
    stop_characters: int = 256
    biases: int = 1024


@dataclass(frozen=True)
class TextRequest:
    """What the body of a request for texts asks for.

    Attributes
    ----------
    model : str or None
    prompts : list of str or of list of int
        Of a completion; empty for a chat.
    messages : list of dict
        Of a chat, each with ``role`` and ``content``; empty for a completion.
    count : int
        Texts of each prompt.
    stream, usage : bool
        Whether pieces are sent, and behind them what was used.
    settings : GenerationRequest
        With the tokens of no prompt, and the first seed.
    form : dict or str or None
        The JSON schema or the grammar that the texts follow.
    """

    model: str | None
    prompts: list[str | list[int]]
    messages: list[dict[str, str]]
    count: int
    stream: bool
    usage: bool
    settings: GenerationRequest
    form: Json | str | None


@dataclass(frozen=True)
class EmbeddingRequest:
    """What the body of a request for embeddings asks for."""

    model: str | None
    inputs: list[str | list[int]]
    base64: bool
    dimensions: int | None


# --- Reading --------------------------------------------------------------------------------------


def parse_json(body: bytes) -> Json:
    """Return the object that a body holds. Raises ``ApiError``."""

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not a number of JSON")

    try:
        value = json.loads(body.decode("utf-8"), parse_constant=refuse)
    except RecursionError:
        raise ApiError("the body is nested too deeply") from None
    except ValueError as error:
        raise ApiError(f"the body is not JSON: {str(error)[:200]}") from None
    if not isinstance(value, dict):
        raise ApiError("the body is not a JSON object")
    return value


def _text_parameters(limits: Limits) -> Mapping[str, Parameter]:
    """Return what requests for texts of both kinds may ask for."""
    return {
        "model": Text("Its name; the first without."),
        "n": Number(1, limits.texts, 1, "Texts, of all prompts together no more than that."),
        "stream": Flag("Whether texts are sent as they come about, as server-sent events."),
        "stream_options": StreamOptions(),
        "temperature": Number(0.0, 2.0, 1.0, "0: the likeliest token."),
        # -1 is what some clients send for all tokens.
        "top_k": Number(-1, 1 << 31, 0, "Of this server: the likeliest tokens; 0 or -1: all."),
        "top_p": Number(0.0, 1.0, 1.0, "The likeliest tokens of this probability together."),
        "min_p": Number(0.0, 1.0, 0.0, "Of this server: in proportion to the likeliest token."),
        "repetition_penalty": Number(1e-3, 1e3, 1.0, "Of this server, as of generate."),
        "frequency_penalty": Number(-2.0, 2.0, 0.0, "For each time a token was sampled."),
        "presence_penalty": Number(-2.0, 2.0, 0.0, "Once a token was sampled."),
        "logit_bias": Biases(limits.biases),
        "seed": Number(-(1 << 63), (1 << 64) - 1, None, "Text number i has seed + i."),
        "stop": Stops(limits.stops, limits.stop_characters),
        "response_format": Form(),
        "grammar": Text("Of this server, in llguidance's form of Lark."),
    }


def _alternatives() -> Number:
    # As many as OpenAI's API reports at most.
    return Number(0, 20, None, "The likeliest tokens to report beside each.")


@cache
def completion_parameters(limits: Limits) -> Mapping[str, Parameter]:
    """Return the parameters of ``/v1/completions``."""
    return {
        "prompt": Prompts(limits.texts),
        "max_tokens": Number(1, limits.tokens, 16, "Fewer where the context is full."),
        "logprobs": _alternatives(),
        **_text_parameters(limits),
    }


@cache
def chat_parameters(limits: Limits) -> Mapping[str, Parameter]:
    """Return the parameters of ``/v1/chat/completions``."""
    most = Number(1, limits.tokens, None, "By default the rest of the context.")
    return {
        "messages": Messages(),
        "max_tokens": most,
        "max_completion_tokens": most,
        "logprobs": Flag("Whether log-probabilities are reported."),
        "top_logprobs": _alternatives(),
        **_text_parameters(limits),
    }


@cache
def embedding_parameters(limits: Limits) -> Mapping[str, Parameter]:
    """Return the parameters of ``/v1/embeddings``."""
    return {
        "input": Prompts(limits.texts),
        "model": Text("Its name; the first without."),
        "encoding_format": Text("Of the vectors.", "float", ("float", "base64")),
        "dimensions": Number(1, 1 << 31, None, "Those of the model, nothing else."),
    }


TOKENIZE: Mapping[str, Parameter] = {
    "content": Text("The text.", required=True),
    "add_special": Flag("Whether it begins with a beginning-of-text token."),
    "model": Text("Its name; the first without."),
}

DETOKENIZE: Mapping[str, Parameter] = {
    "tokens": Tokens(),
    "model": Text("Its name; the first without."),
}


def parse_completion(body: Json, limits: Limits) -> TextRequest:
    """Return what a body of ``/v1/completions`` asks for. Raises ``ApiError``."""
    given = read(body, completion_parameters(limits))
    return _text_request(given, limits, given["prompt"], [], given["max_tokens"], given["logprobs"])


def parse_chat(body: Json, limits: Limits) -> TextRequest:
    """Return what a body of ``/v1/chat/completions`` asks for. Raises ``ApiError``."""
    given = read(body, chat_parameters(limits))
    wanted, alternatives = given["logprobs"], given["top_logprobs"]
    if alternatives is not None and not wanted:
        raise ApiError("top_logprobs needs logprobs to be true", param="top_logprobs")
    max_tokens = given["max_completion_tokens"] or given["max_tokens"] or limits.tokens
    logprobs = (alternatives or 0) if wanted else None
    return _text_request(given, limits, [], given["messages"], max_tokens, logprobs)


def parse_embedding(body: Json, limits: Limits) -> EmbeddingRequest:
    """Return what a body of ``/v1/embeddings`` asks for. Raises ``ApiError``."""
    given = read(body, embedding_parameters(limits))
    packed = given["encoding_format"] == "base64"
    return EmbeddingRequest(given["model"], given["input"], packed, given["dimensions"])


def parse_tokenize(body: Json) -> tuple[str | None, str, bool]:
    """Return the model, the text, and whether it begins with a beginning-of-text token."""
    given = read(body, TOKENIZE)
    return given["model"], given["content"], given["add_special"]


def parse_detokenize(body: Json) -> tuple[str | None, list[int]]:
    """Return the model and the tokens."""
    given = read(body, DETOKENIZE)
    return given["model"], given["tokens"]


def _text_request(
    given: Json,
    limits: Limits,
    prompts: list[str | list[int]],
    messages: list[dict[str, str]],
    max_tokens: int,
    logprobs: int | None,
) -> TextRequest:
    """Return what a body asks for, with the parameters that both kinds have."""
    usage = given["stream_options"]
    if usage is not None and not given["stream"]:
        raise ApiError("stream_options needs stream to be true", param="stream_options")
    count = given["n"]
    if count * len(prompts) > limits.texts:
        raise ApiError(
            f"{len(prompts)} prompts with n {count} are {count * len(prompts)} texts, expected at "
            f"most {limits.texts}",
            param="n",
        )
    form, grammar, seed = given["response_format"], given["grammar"], given["seed"]
    if form is not None and grammar is not None:
        raise ApiError("response_format stands beside grammar, expected one", param="grammar")
    settings = GenerationRequest(
        np.zeros(0, np.int32),
        max_tokens,
        SamplingConfig(
            temperature=given["temperature"],
            top_k=max(given["top_k"], 0),
            # The least is the token of the highest probability alone, as with 0.
            top_p=max(given["top_p"], 1e-9),
            min_p=given["min_p"],
            repetition_penalty=given["repetition_penalty"],
        ),
        secrets.randbits(32) if seed is None else seed % (1 << 64),
        given["stop"],
        logprobs,
        given["frequency_penalty"],
        given["presence_penalty"],
        given["logit_bias"],
    )
    return TextRequest(
        given["model"], prompts, messages, count, given["stream"], bool(usage), settings,
        grammar if form is None else form,
    )  # fmt: skip


# --- Writing --------------------------------------------------------------------------------------


_to_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode


def to_bytes(record: Any) -> bytes:
    """Return JSON of one line."""
    return _to_json(record).encode("utf-8", "replace")


def event_of(record: Json) -> bytes:
    """Return a server-sent event."""
    return b"data: " + to_bytes(record) + b"\n\n"


# The end of a stream of events.
DONE = b"data: [DONE]\n\n"


@dataclass
class _Text:
    """What there is of one text.

    Attributes
    ----------
    parts : list of str
    length : int
        Of all parts, in characters.
    pieces : list of Piece
        Those with log-probabilities.
    finished : Finished, optional
    frame : tuple of str
        What is around the text of a piece in a server-sent event.
    """

    parts: list[str] = field(default_factory=list)
    length: int = 0
    pieces: list[Piece] = field(default_factory=list)
    finished: Finished | None = None
    frame: tuple[str, str] = ("", "")

    def take(self, event: Piece | Finished) -> None:
        if isinstance(event, Finished):
            self.finished = event
            return
        self.parts.append(event.text)
        self.length += len(event.text)
        if event.logprob is not None:
            self.pieces.append(event)


class Reply:
    """The answer to a request for texts, as it comes about.

    Parameters
    ----------
    request : TextRequest
    model : str
        Its name.
    tokenizer : Tokenizer
    """

    def __init__(self, request: TextRequest, model: str, tokenizer: Tokenizer) -> None:
        self._chat = bool(request.messages)
        self._request, self._model, self._tokenizer = request, model, tokenizer
        prompts = 1 if self._chat else len(request.prompts)
        self._texts = [_Text() for _ in range(prompts * request.count)]
        self._id = f"{'chatcmpl' if self._chat else 'cmpl'}-{secrets.token_hex(12)}"
        self._created = int(time.time())
        self._begun = False

    def take(self, events: Sequence[tuple[int, Any]]) -> None:
        """Note events, each of a text."""
        for index, event in events:
            self._texts[index].take(event)

    def texts(self) -> list[str]:
        """Return the texts so far."""
        return ["".join(about.parts) for about in self._texts]

    def events(self, events: Sequence[tuple[int, Any]]) -> bytes:
        """Note events, each of a text, and return what a stream says of them."""
        said = [] if self._begun else self._beginning()
        for index, event in events:
            about = self._texts[index]
            offset = about.length
            about.take(event)
            if isinstance(event, Finished):
                empty: Json = {"delta": {}} if self._chat else {"text": ""}
                said.append(event_of(self._chunk(index, empty, None, event.reason)))
            elif event.logprob is not None:
                logprobs = self._logprobs([event], offset)
                said.append(event_of(self._chunk(index, self._said(event.text), logprobs, None)))
            elif event.text:
                # There is one for each token: only the text itself is written anew.
                before, behind = about.frame
                said.append(f"{before}{_to_json(event.text)}{behind}".encode())
        return b"".join(said)

    def _beginning(self) -> list[bytes]:
        """Return what a stream begins with, and prepare the frames of its pieces."""
        self._begun = True
        said = []
        for index, about in enumerate(self._texts):
            # As it is in the record, it cannot be a part of anything else.
            chunk = self._chunk(index, self._said(self._id * 2), None, None)
            before, behind = event_of(chunk).decode().split(_to_json(self._id * 2))
            about.frame = before, behind
            if self._chat:
                delta = {"role": "assistant", "content": ""}
                said.append(event_of(self._chunk(index, {"delta": delta}, None, None)))
        return said

    def _said(self, text: str) -> Json:
        return {"delta": {"content": text}} if self._chat else {"text": text}

    def end(self) -> bytes:
        """Return what a stream ends with."""
        if not self._request.usage:
            return DONE
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        return event_of({**self._record(kind, []), "usage": self.usage()}) + DONE

    def whole(self) -> Json:
        """Return the answer, when all texts are finished."""
        choices = []
        for index, (about, text) in enumerate(zip(self._texts, self.texts(), strict=True)):
            assert about.finished is not None
            message = {"role": "assistant", "content": text, "refusal": None}
            said: Json = {"message": message} if self._chat else {"text": text}
            asked = self._request.settings.logprobs is not None
            logprobs = self._logprobs(about.pieces, 0) if asked else None
            choices.append(self._choice(index, said, logprobs, about.finished.reason))
        kind = "chat.completion" if self._chat else "text_completion"
        return {**self._record(kind, choices), "usage": self.usage()}

    def usage(self) -> Json:
        """Return what all texts used; a prompt counts once."""
        ends = [about.finished for about in self._texts if about.finished is not None]
        first = ends[:: self._request.count]
        prompt = sum(end.prompt_tokens for end in first)
        completion = sum(end.completion_tokens for end in ends)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": sum(end.cached_tokens for end in first)},
        }

    def _chunk(self, index: int, said: Json, logprobs: Json | None, reason: str | None) -> Json:
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        record = self._record(kind, [self._choice(index, said, logprobs, reason)])
        return {**record, "usage": None} if self._request.usage else record

    @staticmethod
    def _choice(index: int, said: Json, logprobs: Json | None, reason: str | None) -> Json:
        return {"index": index, **said, "logprobs": logprobs, "finish_reason": reason}

    def _record(self, kind: str, choices: list[Json]) -> Json:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._model,
            "choices": choices,
        }

    def _logprobs(self, pieces: Sequence[Piece], offset: int) -> Json:
        """Return log-probabilities in the form of a chat or of a completion."""
        if self._chat:
            content = [
                {
                    **self._likely(piece.token, piece.logprob or 0.0),
                    "top_logprobs": [self._likely(*one) for one in piece.top],
                }
                for piece in pieces
            ]
            return {"content": content, "refusal": None}
        offsets = []
        for piece in pieces:
            offsets.append(offset)
            offset += len(piece.text)
        return {
            "tokens": [self._name(piece.token) for piece in pieces],
            "token_logprobs": [_finite(piece.logprob or 0.0) for piece in pieces],
            "top_logprobs": [
                {self._name(token): _finite(value) for token, value in piece.top}
                for piece in pieces
            ],
            "text_offset": offsets,
        }

    def _likely(self, token: int, logprob: float) -> Json:
        return {
            "token": self._name(token),
            "logprob": _finite(logprob),
            "bytes": list(self._tokenizer.decode([token])),
        }

    def _name(self, token: int) -> str:
        """Return the text of a token; that of an incomplete character is its bytes."""
        data = self._tokenizer.decode([token])
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _finite(logprob: float) -> float:
    return max(logprob, _LEAST_LOGPROB) if math.isfinite(logprob) else _LEAST_LOGPROB


def embedding_reply(
    request: EmbeddingRequest, model: str, vectors: Sequence[npt.NDArray[np.float32]], tokens: int
) -> Json:
    """Return the answer to a request for embeddings."""
    form: Callable[[npt.NDArray[np.float32]], Any] = (
        (lambda vector: base64.b64encode(vector.astype("<f4").tobytes()).decode("ascii"))
        if request.base64
        else (lambda vector: vector.tolist())
    )
    data = [
        {"object": "embedding", "index": i, "embedding": form(vector)}
        for i, vector in enumerate(vectors)
    ]
    return {
        "object": "list",
        "data": data,
        "model": model,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }
