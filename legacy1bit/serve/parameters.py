"""Parameters in the body of a request: each reads its value, and describes it as a JSON Schema.

So a range is written once: requests are read by the tables of ``openai``, and ``openapi`` describes
these. What changes nothing in an answer is ignored, what would change it and is not implemented is
refused unless it asks for nothing, and so is what the API does not know.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from legacy1bit.serve.errors import ApiError

Json = dict[str, Any]

# Parameters that change no text.
_IGNORED = (
    "metadata",
    "parallel_tool_calls",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
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

# Parts of a message of the client in an error message.
_LONGEST_QUOTE = 60


class Parameter(Protocol):
    """A parameter of a request.

    Attributes
    ----------
    about : str
    required : bool
    """

    @property
    def about(self) -> str: ...

    @property
    def required(self) -> bool: ...

    def read(self, value: Any, name: str) -> Any:
        """Return what a value asks for, None where there is none. Raises ``ApiError``."""

    def schema(self) -> Json:
        """Return what a value may be."""


def read(body: Json, parameters: Mapping[str, Parameter]) -> Json:
    """Return what a body asks for, by the names of all parameters; null is as good as none.

    Raises
    ------
    ApiError
        If a value is wrong, a parameter is missing, or there is one that nobody knows.
    """
    for name, value in body.items():
        if name in parameters or name in _IGNORED or value is None:
            continue
        if name not in _NEUTRAL:
            raise ApiError(
                f"Unrecognized request argument supplied: {name[:_LONGEST_QUOTE]}",
                param=name[:_LONGEST_QUOTE],
                code="unknown_parameter",
            )
        if not any(_same(value, one) for one in _NEUTRAL[name]):
            raise ApiError(
                f"{name} is not supported by this server", param=name, code="unsupported_value"
            )
    given = {}
    for name, parameter in parameters.items():
        value = body.get(name)
        if value is None and parameter.required:
            raise ApiError(
                f"you must provide {name}", param=name, code="missing_required_parameter"
            )
        given[name] = parameter.read(value, name)
    return given


def schema_of(parameters: Mapping[str, Parameter]) -> Json:
    """Return the JSON Schema of a body with these parameters."""
    known = {}
    for name, parameter in parameters.items():
        schema = parameter.schema()
        about = {"description": parameter.about} if parameter.about else {}
        known[name] = {**(schema if parameter.required else _or_null(schema)), **about}
    ignored = {name: {"description": "Changes no text."} for name in _IGNORED}
    neutral = {
        name: {"enum": [*values, None], "description": "Not supported."}
        for name, values in _NEUTRAL.items()
        if name not in parameters
    }
    return {
        "type": "object",
        "properties": {**known, **ignored, **neutral},
        "required": [name for name, one in parameters.items() if one.required],
        "additionalProperties": {"type": "null"},
    }


def _same(value: Any, other: Any) -> bool:
    """Return whether two values are the same in JSON, where false is not 0."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)


def _or_null(schema: Json) -> Json:
    if isinstance(schema.get("type"), str):
        more = {"enum": [*schema["enum"], None]} if "enum" in schema else {}
        return {**schema, "type": [schema["type"], "null"], **more}
    return {"anyOf": [schema, {"type": "null"}]}


@dataclass(frozen=True)
class Number:
    """A number: a whole one, if its bounds are."""

    low: float
    high: float
    default: float | None
    about: str
    required: ClassVar[bool] = False

    @property
    def _whole(self) -> bool:
        return isinstance(self.low, int)

    def read(self, value: Any, name: str) -> Any:
        if value is None:
            return self.default
        right = isinstance(value, int) if self._whole else isinstance(value, (int, float))
        if isinstance(value, bool) or not right or not self.low <= value <= self.high:
            raise ApiError(
                f"{name} is {_quote(value)}, expected a{' whole' if self._whole else ''} number "
                f"from {self.low} to {self.high}",
                param=name,
            )
        return value if self._whole else float(value)

    def schema(self) -> Json:
        return {
            "type": "integer" if self._whole else "number",
            "minimum": self.low,
            "maximum": self.high,
            **({} if self.default is None else {"default": self.default}),
        }


@dataclass(frozen=True)
class Flag:
    """True or false; the latter without a value."""

    about: str
    required: ClassVar[bool] = False

    def read(self, value: Any, name: str) -> bool:
        if not isinstance(value, (bool, type(None))):
            raise ApiError(f"{name} is {_quote(value)}, expected true or false", param=name)
        return bool(value)

    def schema(self) -> Json:
        return {"type": "boolean", "default": False}


@dataclass(frozen=True)
class Text:
    """A text, or one of some words."""

    about: str
    default: str | None = None
    choices: tuple[str, ...] = ()
    required: bool = False

    def read(self, value: Any, name: str) -> str | None:
        if value is None:
            return self.default
        text = _text(value, name)
        if self.choices and text not in self.choices:
            expected = " or ".join(self.choices)
            raise ApiError(f"{name} is {_quote(value)}, expected {expected}", param=name)
        return text

    def schema(self) -> Json:
        return {
            "type": "string",
            **({"enum": list(self.choices)} if self.choices else {}),
            **({} if self.default is None else {"default": self.default}),
        }


_TOKENS = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": (1 << 31) - 1}}


class Tokens:
    """Tokens, in order."""

    about, required = "Those of the model.", True

    def read(self, value: Any, name: str) -> list[int]:
        if not isinstance(value, list):
            raise ApiError(f"{name} is {_quote(value)}, expected an array", param=name)
        return _tokens(value, name)

    def schema(self) -> Json:
        return _TOKENS


@dataclass(frozen=True)
class Prompts:
    """A text, tokens, or an array of either."""

    most: int
    about: ClassVar[str] = "A text, tokens, or an array of either."
    required: ClassVar[bool] = True

    def read(self, value: Any, name: str) -> list[str | list[int]]:
        if isinstance(value, str) or (isinstance(value, list) and value and _is_token(value[0])):
            value = [value]
        if not isinstance(value, list) or not value:
            raise ApiError(f"{name} is {_quote(value)}, expected text or tokens", param=name)
        if len(value) > self.most:
            raise ApiError(
                f"{name} has {len(value)} parts, expected at most {self.most}", param=name
            )
        return [
            _tokens(one, name) if isinstance(one, list) else _text(one, name) for one in value
        ]  # fmt: skip

    def schema(self) -> Json:
        text, tokens = {"type": "string"}, {**_TOKENS, "minItems": 1}
        several = {"anyOf": [text, tokens]}
        parts = {"type": "array", "items": several, "minItems": 1, "maxItems": self.most}
        return {"anyOf": [text, tokens, parts]}


class Messages:
    """The messages of a chat, with their roles and texts; parts of a text are joined."""

    about, required = "What was said so far.", True

    def read(self, value: Any, name: str) -> list[dict[str, str]]:
        if not isinstance(value, list):
            raise ApiError(f"{name} is {_quote(value)}, expected an array", param=name)
        if not value:
            raise ApiError(f"{name} is empty, expected at least one", param=name)
        return [self._message(message, f"{name}[{i}]") for i, message in enumerate(value)]

    @staticmethod
    def _message(message: Any, name: str) -> dict[str, str]:
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

    def schema(self) -> Json:
        part = {
            "type": "object",
            "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
            "required": ["type", "text"],
        }
        content = {"anyOf": [{"type": "string"}, {"type": "array", "items": part}]}
        message = {
            "type": "object",
            "properties": {
                "role": {"enum": list(_ROLES)},
                "content": content,
                "name": {},
                "reasoning_content": {},
            },
            "required": ["role", "content"],
            "additionalProperties": {"enum": [None, []]},
        }
        return {"type": "array", "items": message, "minItems": 1}


class StreamOptions:
    """What a stream says beside its texts: whether it ends with what was used."""

    about, required = "Only with stream.", False

    def read(self, value: Any, name: str) -> bool | None:
        if value is None:
            return None
        if not isinstance(value, dict):
            raise ApiError(f"{name} is {_quote(value)}, expected an object", param=name)
        for key in value:
            if key not in self._properties():
                raise ApiError(f"{name}.{key[:_LONGEST_QUOTE]} is unknown", param=name)
        return Flag("").read(value.get("include_usage"), f"{name}.include_usage")

    @staticmethod
    def _properties() -> Json:
        usage = Flag("").schema()
        # Noise of OpenAI's own streams.
        return {"include_usage": _or_null(usage), "include_obfuscation": {}}

    def schema(self) -> Json:
        return {
            "type": "object",
            "properties": self._properties(),
            "additionalProperties": False,
        }


@dataclass(frozen=True)
class Stops:
    """Texts before which an answer ends."""

    most: int
    characters: int
    about: ClassVar[str] = "Texts before which an answer ends."
    required: ClassVar[bool] = False

    def read(self, value: Any, name: str) -> tuple[str, ...]:
        if value is None:
            return ()
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list) or len(values) > self.most:
            raise ApiError(
                f"{name} is {_quote(value)}, expected text or at most {self.most} texts", param=name
            )
        for one in values:
            if not 0 < len(_text(one, name)) <= self.characters:
                raise ApiError(
                    f"{name} has {_quote(one)}, expected 1 to {self.characters} characters",
                    param=name,
                )
        return tuple(values)

    def schema(self) -> Json:
        one = {"type": "string", "minLength": 1, "maxLength": self.characters}
        return {"anyOf": [one, {"type": "array", "items": one, "maxItems": self.most}]}


@dataclass(frozen=True)
class Biases:
    """Numbers that are added to the logits of tokens."""

    most: int
    about: ClassVar[str] = "From tokens to what is added to their logits."
    required: ClassVar[bool] = False

    def read(self, value: Any, name: str) -> dict[int, float]:
        if value is None:
            return {}
        fault = ApiError(
            f"{name} is {_quote(value)}, expected an object from at most {self.most} tokens to "
            "numbers from -100 to 100",
            param=name,
        )
        if not isinstance(value, dict) or len(value) > self.most:
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

    def schema(self) -> Json:
        return {
            "type": "object",
            "propertyNames": {"pattern": "^[0-9]{1,10}$"},
            "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
            "maxProperties": self.most,
        }


class Form:
    """Text, any JSON object, or JSON of a schema."""

    about, required = "What the texts are: text, JSON, or JSON of a schema.", False

    def read(self, value: Any, name: str) -> Json | None:
        """Return a JSON schema; None for text."""
        if value is None or value == {"type": "text"}:
            return None
        kind = value.get("type") if isinstance(value, dict) else None
        about = value.get("json_schema") if kind == "json_schema" else None
        schema = about.get("schema") if isinstance(about, dict) else None
        if kind == "json_object":
            schema = {"type": "object"}
        if not isinstance(schema, dict):
            raise ApiError(
                f"{name} is {_quote(value)}, expected the type text, json_object or json_schema "
                "with a json_schema.schema",
                param=name,
            )
        return schema

    def schema(self) -> Json:
        text: Json = {"const": {"type": "text"}}
        free = {
            "type": "object",
            "properties": {"type": {"const": "json_object"}},
            "required": ["type"],
        }
        about = {
            "type": "object",
            "properties": {"schema": {"type": "object"}},
            "required": ["schema"],
        }
        bound = {
            "type": "object",
            "properties": {"type": {"const": "json_schema"}, "json_schema": about},
            "required": ["type", "json_schema"],
        }
        return {"anyOf": [text, free, bound]}


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


def _quote(value: Any) -> str:
    """Return a value for an error message, cut off where it is long."""
    if isinstance(value, int) and abs(value) > 1 << 128:
        return "a large number"
    if isinstance(value, (list, dict)) and value:
        return "an array" if isinstance(value, list) else "an object"
    text = json.dumps(value)
    return text if len(text) <= _LONGEST_QUOTE else f"{text[:_LONGEST_QUOTE]}..."
