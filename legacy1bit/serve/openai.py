"""OpenAI's API: from the JSON of a request to what an engine is asked, and back.

The source is OpenAI's description of its API (``/v1/completions``, ``/v1/chat/completions``,
``/v1/embeddings``). What changes nothing in an answer is ignored, what would change it and is not
implemented is refused unless it asks for nothing, and so is what the API does not know.
"""

import base64
import json
import math
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from legacy1bit.data.tokenizer import Tokenizer
from legacy1bit.hyperparams import SamplingConfig
from legacy1bit.serve.requests import Finished, GenerationRequest, Piece

Json = dict[str, Any]

# Parameters that change no text.
_IGNORED = frozenset(
    [
        "metadata",
        "parallel_tool_calls",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    ]
)

# Parameters that are not implemented, and the values with which they ask for nothing.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "prediction": (),
    "reasoning_effort": ("none",),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": ("medium",),
    "web_search_options": (),
}

_ROLES = {"developer": "system", "system": "system", "user": "user", "assistant": "assistant"}

# As many alternatives as OpenAI's API reports at most.
_MOST_ALTERNATIVES = 20

# What JSON has for a probability of 0, as in OpenAI's API.
_LEAST_LOGPROB = -9999.0

# Parts of a message of the client in an error message.
_LONGEST_QUOTE = 60

_Number = TypeVar("_Number", int, float)


class ApiError(Exception):
    """A request that is refused.

    Parameters
    ----------
    message : str
    status : int
        Of HTTP.
    param, code : str, optional
        The parameter, and the kind of fault.
    headers : mapping of str to str
        Of the answer.
    """

    def __init__(
        self,
        message: str,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.status, self.param, self.code = message, status, param, code
        self.headers = dict(headers or {})

    def record(self) -> Json:
        """Return the error in OpenAI's form."""
        kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {
            "error": {
                "message": self.message,
                "type": kinds.get(self.status, kind),
                "param": self.param,
                "code": self.code,
            }
        }


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


def parse_completion(body: Json, limits: Limits) -> TextRequest:
    """Return what a body of ``/v1/completions`` asks for. Raises ``ApiError``."""
    fields = _Fields(body)
    prompts = _prompts(fields, "prompt", limits.texts)
    logprobs = fields.number("logprobs", None, 0, _MOST_ALTERNATIVES)
    max_tokens = fields.number("max_tokens", 16, 1, limits.tokens)
    return _text_request(fields, limits, prompts, [], max_tokens, logprobs)


def parse_chat(body: Json, limits: Limits) -> TextRequest:
    """Return what a body of ``/v1/chat/completions`` asks for. Raises ``ApiError``."""
    fields = _Fields(body)
    messages = fields.required("messages", list)
    if not messages:
        raise ApiError("messages is empty, expected at least one", param="messages")
    read = [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]
    wanted, alternatives = fields.flag("logprobs"), fields.number(
        "top_logprobs", None, 0, _MOST_ALTERNATIVES
    )  # fmt: skip
    if alternatives is not None and not wanted:
        raise ApiError("top_logprobs needs logprobs to be true", param="top_logprobs")
    older = fields.number("max_tokens", limits.tokens, 1, limits.tokens)
    max_tokens = fields.number("max_completion_tokens", older, 1, limits.tokens)
    logprobs = (alternatives or 0) if wanted else None
    return _text_request(fields, limits, [], read, max_tokens, logprobs)


def parse_embedding(body: Json, limits: Limits) -> EmbeddingRequest:
    """Return what a body of ``/v1/embeddings`` asks for. Raises ``ApiError``."""
    fields = _Fields(body)
    inputs = _prompts(fields, "input", limits.texts)
    form = fields.text("encoding_format", "float")
    if form not in ("float", "base64"):
        raise ApiError(
            f"encoding_format is {_quote(form)}, expected float or base64", param="encoding_format"
        )
    dimensions = fields.number("dimensions", None, 1, 1 << 31)
    model = fields.text("model", None)
    fields.end()
    return EmbeddingRequest(model, inputs, form == "base64", dimensions)


def parse_tokenize(body: Json) -> tuple[str | None, str, bool]:
    """Return the model, the text, and whether it begins with a beginning-of-text token."""
    fields = _Fields(body)
    found = (
        fields.text("model", None),
        _text(fields.required("content", str), "content"),
        fields.flag("add_special"),
    )
    fields.end()
    return found


def parse_detokenize(body: Json) -> tuple[str | None, list[int]]:
    """Return the model and the tokens."""
    fields = _Fields(body)
    model, tokens = fields.text("model", None), fields.required("tokens", list)
    fields.end()
    return model, _tokens(tokens, "tokens")


class _Fields:
    """The fields of a body, each of which is taken once; null is as good as none."""

    def __init__(self, body: Json) -> None:
        self._left = {name: value for name, value in body.items() if value is not None}

    def take(self, name: str) -> Any:
        return self._left.pop(name, None)

    def required(self, name: str, kind: type) -> Any:
        value = self.take(name)
        if value is None:
            raise ApiError(
                f"you must provide {name}", param=name, code="missing_required_parameter"
            )
        if not isinstance(value, kind):
            what = "text" if kind is str else "an array"
            raise ApiError(f"{name} is {_quote(value)}, expected {what}", param=name)
        return value

    def number(
        self, name: str, default: _Number | None, low: _Number, high: _Number
    ) -> _Number | Any:
        """Return a number: a whole one, if its bounds are."""
        value = self.take(name)
        if value is None:
            return default
        whole = isinstance(low, int)
        right = isinstance(value, int) if whole else isinstance(value, (int, float))
        if isinstance(value, bool) or not right or not low <= value <= high:
            raise ApiError(
                f"{name} is {_quote(value)}, expected a{' whole' if whole else ''} number from "
                f"{low} to {high}",
                param=name,
            )
        return value

    def flag(self, name: str) -> bool:
        value = self.take(name)
        if not isinstance(value, (bool, type(None))):
            raise ApiError(f"{name} is {_quote(value)}, expected true or false", param=name)
        return bool(value)

    def text(self, name: str, default: str | None) -> str | None:
        value = self.take(name)
        if not isinstance(value, (str, type(None))):
            raise ApiError(f"{name} is {_quote(value)}, expected text", param=name)
        return default if value is None else value

    def end(self) -> None:
        """Refuse what is left, unless it asks for nothing."""
        for name, value in self._left.items():
            if name in _NEUTRAL and value not in _NEUTRAL[name]:
                raise ApiError(
                    f"{name} is not supported by this server", param=name, code="unsupported_value"
                )
            if name not in _NEUTRAL and name not in _IGNORED:
                raise ApiError(
                    f"Unrecognized request argument supplied: {name[:_LONGEST_QUOTE]}",
                    param=name[:_LONGEST_QUOTE],
                    code="unknown_parameter",
                )


def _text_request(
    fields: _Fields,
    limits: Limits,
    prompts: list[str | list[int]],
    messages: list[dict[str, str]],
    max_tokens: int,
    logprobs: int | None,
) -> TextRequest:
    """Return what a body asks for, with the parameters that both kinds have."""
    stream, usage = fields.flag("stream"), False
    options = fields.take("stream_options")
    if options is not None:
        if not isinstance(options, dict) or not stream:
            raise ApiError(
                "stream_options needs to be an object, and stream to be true",
                param="stream_options",
            )
        known = {name: options[name] for name in options if name != "include_obfuscation"}
        chosen = _Fields(known)
        usage = chosen.flag("include_usage")
        chosen.end()
    count = fields.number("n", 1, 1, limits.texts)
    if count * len(prompts) > limits.texts:
        raise ApiError(
            f"{len(prompts)} prompts with n {count} are {count * len(prompts)} texts, expected at "
            f"most {limits.texts}",
            param="n",
        )
    seed = fields.number("seed", None, -(1 << 63), (1 << 64) - 1)
    settings = GenerationRequest(
        np.zeros(0, np.int32),
        max_tokens,
        SamplingConfig(
            temperature=float(fields.number("temperature", 1.0, 0.0, 2.0)),
            # -1 is what some clients send for all tokens.
            top_k=max(fields.number("top_k", 0, -1, 1 << 31), 0),
            # The least is the token of the highest probability alone, as with 0.
            top_p=max(float(fields.number("top_p", 1.0, 0.0, 1.0)), 1e-9),
            min_p=float(fields.number("min_p", 0.0, 0.0, 1.0)),
            repetition_penalty=float(fields.number("repetition_penalty", 1.0, 1e-3, 1e3)),
        ),
        secrets.randbits(32) if seed is None else seed % (1 << 64),
        _stops(fields.take("stop"), limits),
        logprobs,
        float(fields.number("frequency_penalty", 0.0, -2.0, 2.0)),
        float(fields.number("presence_penalty", 0.0, -2.0, 2.0)),
        _biases(fields.take("logit_bias"), limits),
    )
    model, form = fields.text("model", None), _form(fields)
    fields.end()
    return TextRequest(model, prompts, messages, count, stream, usage, settings, form)


def _form(fields: _Fields) -> Json | str | None:
    """Return the JSON schema or the grammar that texts are to follow."""
    grammar, wanted = fields.text("grammar", None), fields.take("response_format")
    if wanted is None or wanted == {"type": "text"}:
        return None if grammar is None else _text(grammar, "grammar")
    kind = wanted.get("type") if isinstance(wanted, dict) else None
    about = wanted.get("json_schema") if kind == "json_schema" else None
    schema = about.get("schema") if isinstance(about, dict) else None
    if kind == "json_object":
        schema = {"type": "object"}
    if not isinstance(schema, dict) or grammar is not None:
        raise ApiError(
            f"response_format is {_quote(wanted)}, expected the type text, json_object or "
            "json_schema with a json_schema.schema, and no grammar beside it",
            param="response_format",
        )
    return schema


def _prompts(fields: _Fields, name: str, most: int) -> list[str | list[int]]:
    """Return prompts: a text, tokens, or an array of either."""
    value = fields.take(name)
    if value is None:
        raise ApiError(f"you must provide {name}", param=name, code="missing_required_parameter")
    if isinstance(value, str) or (isinstance(value, list) and value and _is_token(value[0])):
        value = [value]
    if not isinstance(value, list) or not value:
        raise ApiError(f"{name} is {_quote(value)}, expected text or tokens", param=name)
    if len(value) > most:
        raise ApiError(f"{name} has {len(value)} parts, expected at most {most}", param=name)
    return [
        _tokens(one, name) if isinstance(one, list) else _text(one, name) for one in value
    ]  # fmt: skip


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _tokens(values: list[Any], name: str) -> list[int]:
    for value in values:
        if not _is_token(value) or not 0 <= value < 1 << 31:
            raise ApiError(f"{name} holds {_quote(value)}, expected tokens", param=name)
    return values


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise ApiError(f"{name} is {_quote(value)}, expected text", param=name)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise ApiError(f"{name} has half of a character (a surrogate)", param=name) from None
    return value


def _message(message: Any, name: str) -> dict[str, str]:
    """Return a message of a chat with its role and its text; parts of a text are joined."""
    if not isinstance(message, dict):
        raise ApiError(f"{name} is {_quote(message)}, expected an object", param=name)
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or role not in _ROLES:
        expected = ", ".join(_ROLES)
        raise ApiError(f"{name}.role is {_quote(role)}, expected one of {expected}", param=name)
    for key in message:
        empty = message[key] is None or message[key] == []
        if key not in ("role", "content", "name", "reasoning_content") and not empty:
            raise ApiError(f"{name}.{key[:_LONGEST_QUOTE]} is not supported", param=name)
    if isinstance(content, list):
        parts = []
        for part in content:
            if not isinstance(part, dict) or part.get("type") != "text":
                raise ApiError(
                    f"{name}.content has a part {_quote(part)}, expected those of type text",
                    param=name,
                )
            parts.append(_text(part.get("text"), f"{name}.content"))
        content = "".join(parts)
    return {"role": _ROLES[role], "content": _text(content, f"{name}.content")}


def _stops(value: Any, limits: Limits) -> tuple[str, ...]:
    if value is None:
        return ()
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or len(values) > limits.stops:
        raise ApiError(
            f"stop is {_quote(value)}, expected text or at most {limits.stops} texts", param="stop"
        )
    for one in values:
        if not 0 < len(_text(one, "stop")) <= limits.stop_characters:
            raise ApiError(
                f"stop has {_quote(one)}, expected 1 to {limits.stop_characters} characters",
                param="stop",
            )
    return tuple(values)


def _biases(value: Any, limits: Limits) -> dict[int, float]:
    if value is None:
        return {}
    fault = ApiError(
        f"logit_bias is {_quote(value)}, expected an object from at most {limits.biases} tokens to "
        "numbers from -100 to 100",
        param="logit_bias",
    )
    if not isinstance(value, dict) or len(value) > limits.biases:
        raise fault
    biases = {}
    for token, bias in value.items():
        number = isinstance(bias, (int, float)) and not isinstance(bias, bool)
        if not (number and -100 <= bias <= 100 and token.isascii() and token.isdecimal()):
            raise fault
        if len(token) > 10:
            raise fault
        biases[int(token)] = float(bias)
    return biases


def _quote(value: Any) -> str:
    """Return a value for an error message, cut off where it is long."""
    if isinstance(value, int) and abs(value) > 1 << 128:
        return "a large number"
    if isinstance(value, (list, dict)) and value:
        return "an array" if isinstance(value, list) else "an object"
    text = json.dumps(value)
    return text if len(text) <= _LONGEST_QUOTE else f"{text[:_LONGEST_QUOTE]}..."


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
