"""The server's description in OpenAPI 3.1, made of the tables that requests are read by."""

from collections.abc import Mapping
from typing import Any

from legacy1bit.serve.openai import (
    DETOKENIZE,
    TOKENIZE,
    Limits,
    chat_parameters,
    completion_parameters,
    embedding_parameters,
)
from legacy1bit.serve.parameters import Json, schema_of
from legacy1bit.version import __version__

_REASONS = {
    400: "The request is wrong.",
    401: "A key is needed.",
    403: "This host or origin may not ask.",
    404: "There is no such model.",
    413: "The body is too long.",
    415: "The body is not JSON by its type.",
    429: "Too many requests are waiting; Retry-After says until when.",
    500: "The model is damaged.",
    503: "The server is stopping, or the model cannot be loaded.",
}

_TEXT: Json = {"type": "string"}
_COUNT: Json = {"type": "integer", "minimum": 0}
_LOGPROB: Json = {"type": "number", "maximum": 0}
_BYTES = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 255}}


def _object(**properties: Json) -> Json:
    """Return the schema of an object that has all of these and nothing else."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _array(items: Json) -> Json:
    return {"type": "array", "items": items}


def _nullable(schema: Json) -> Json:
    return {"anyOf": [schema, {"type": "null"}]}


def _of(name: str) -> Json:
    return {"$ref": f"#/components/schemas/{name}"}


def _schemas() -> Json:
    """Return what answers look like."""
    ends = {"enum": ["stop", "length"]}
    likely = {"token": _TEXT, "logprob": _LOGPROB, "bytes": _BYTES}
    usage = _object(
        prompt_tokens=_COUNT,
        completion_tokens=_COUNT,
        total_tokens=_COUNT,
        prompt_tokens_details=_object(cached_tokens=_COUNT),
    )
    chat_logprobs = _object(
        content=_array(_object(**likely, top_logprobs=_array(_object(**likely)))),
        refusal={"type": "null"},
    )
    logprobs = _object(
        tokens=_array(_TEXT),
        token_logprobs=_array(_LOGPROB),
        top_logprobs=_array({"type": "object", "additionalProperties": _LOGPROB}),
        text_offset=_array(_COUNT),
    )

    def answer(kind: str, logprobs: Json, **said: Json) -> Json:
        return _object(
            id=_TEXT,
            object={"const": kind},
            created=_COUNT,
            model=_TEXT,
            choices=_array(
                _object(index=_COUNT, **said, logprobs=_nullable(logprobs), finish_reason=ends)
            ),
            usage=_of("Usage"),
        )

    message = _object(role={"const": "assistant"}, content=_TEXT, refusal={"type": "null"})
    vector = {"anyOf": [_array({"type": "number"}), {"type": "string", "format": "byte"}]}
    embedding = _object(object={"const": "embedding"}, index=_COUNT, embedding=vector)
    known = _object(
        id=_TEXT, object={"const": "model"}, created=_COUNT, owned_by=_TEXT,
        loaded={"type": "boolean"},
    )  # fmt: skip
    return {
        "Error": _object(
            error=_object(message=_TEXT, type=_TEXT, param=_nullable(_TEXT), code=_nullable(_TEXT))
        ),
        "Usage": usage,
        "Completion": answer("text_completion", logprobs, text=_TEXT),
        "ChatCompletion": answer("chat.completion", chat_logprobs, message=message),
        "Embeddings": _object(
            object={"const": "list"},
            data=_array(embedding),
            model=_TEXT,
            usage=_object(prompt_tokens=_COUNT, total_tokens=_COUNT),
        ),
        "Tokens": _object(tokens=_array(_COUNT)),
        "Content": _object(content=_TEXT),
        # While a model is loaded, more is known of it.
        "Model": {**known, "additionalProperties": True},
        "Models": _object(object={"const": "list"}, data=_array(_of("Model"))),
        "Health": _object(status={"const": "ok"}),
    }


def _answers(schema: Json | None, kind: str, statuses: tuple[int, ...], stream: bool) -> Json:
    content: Json = {kind: {} if schema is None else {"schema": schema}}
    if stream:
        # Of each event; the last has [DONE].
        event = {"type": "object", "properties": {"data": _TEXT}, "required": ["data"]}
        content["text/event-stream"] = {"schema": event}
    refused = {"application/json": {"schema": _of("Error")}}
    return {
        "200": {"description": "The answer.", "content": content},
        **{str(one): {"description": _REASONS[one], "content": refused} for one in statuses},
    }


def describe(limits: Limits) -> Json:
    """Return the description of a server, which ``GET /openapi.json`` answers.

    Parameters
    ----------
    limits : Limits
        Of its requests.
    """

    def get(what: str, name: str | None, kind: str = "application/json", **more: Any) -> Json:
        schema = None if name is None else _of(name)
        statuses = more.pop("statuses", (401, 403))
        return {
            "get": {"summary": what, "responses": _answers(schema, kind, statuses, False), **more}
        }

    def post(what: str, name: str, parameters: Mapping[str, Any], stream: bool = False) -> Json:
        body = {"application/json": {"schema": schema_of(parameters)}}
        answers = _answers(_of(name), "application/json", tuple(_REASONS), stream)
        request = {"required": True, "content": body}
        return {"post": {"summary": what, "requestBody": request, "responses": answers}}

    open_to_all: Json = {"security": []}
    name = {"name": "name", "in": "path", "required": True, "schema": _TEXT}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "legacy1bit serve",
            "version": __version__,
            "description": "Models of ternary weights in the form of OpenAI's API.",
        },
        # Keys are needed where the server was given some.
        "security": [{}, {"key": []}],
        "paths": {
            "/": get("The page.", None, "text/html", **open_to_all, statuses=(403,)),
            "/health": get("Whether it runs.", "Health", **open_to_all, statuses=(403, 503)),
            "/metrics": get("Numbers for Prometheus.", None, "text/plain"),
            "/openapi.json": get("This description.", None),
            "/v1/models": get("The models.", "Models"),
            "/v1/models/{name}": get(
                "A model.", "Model", parameters=[name], statuses=(401, 403, 404)
            ),
            "/v1/completions": post(
                "Go on with prompts.", "Completion", completion_parameters(limits), True
            ),
            "/v1/chat/completions": post(
                "Answer in a chat.", "ChatCompletion", chat_parameters(limits), True
            ),
            "/v1/embeddings": post("Vectors of texts.", "Embeddings", embedding_parameters(limits)),
            "/tokenize": post("From text to tokens.", "Tokens", TOKENIZE),
            "/detokenize": post("From tokens to text.", "Content", DETOKENIZE),
        },
        "components": {
            "schemas": _schemas(),
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }
