"""Requests that nobody expects: every one is answered, none with a fault of the server.

LEGACY1BIT_REQUESTS says how many; ``make test-serve`` sends a million. Request number i is the same
each time.
"""

import asyncio
import json
import os
import random
from pathlib import Path

import pytest

from helpers.models import make_config, random_model
from helpers.serving import SlowEngine, SomeModels
from legacy1bit.generator import Generator

pytest.importorskip("starlette", reason="starlette is not installed: pip install starlette")

from legacy1bit.serve import app
from legacy1bit.serve.app import Application, ServeSettings
from legacy1bit.serve.openai import Limits
from legacy1bit.serve.openapi import describe

REQUESTS = int(os.environ.get("LEGACY1BIT_REQUESTS", "2000"))

LIMITS = Limits(texts=4, tokens=6, stops=2, stop_characters=9, biases=3)
DESCRIPTION = describe(LIMITS)
PATHS = list(DESCRIPTION["paths"])
BODIES = {
    path: methods["post"]["requestBody"]["content"]["application/json"]["schema"]
    for path, methods in DESCRIPTION["paths"].items()
    if "post" in methods
}
WORDS = [
    *("", "a", "Hi", "tiny", "user", "assistant", "text", "json_schema", "json_object", "base64"),
    *("\ud800", "<think>", "\x00", "é€😀", "../tiny", 'start: "a"', "start: start", "9" * 300, "{"),
]
NUMBERS = [
    *(0, 1, -1, 2, 3, 7, 65, 255, 256, 300, 1 << 31, -(1 << 63), 1 << 64, 10**400, 0.5, -0.0, 1e-9),
    *(1e308, float("nan"), float("inf")),
]
HEADERS = [(b"host", b"localhost"), (b"content-type", b"application/json")]


def any_value(rng, depth=0):
    kind = rng.randrange(8 if depth < 3 else 5)
    if kind >= 5:
        parts = [any_value(rng, depth + 1) for _ in range(rng.randrange(4))]
        return (
            parts if kind == 5 else {rng.choice([*WORDS, "role", "content"]): one for one in parts}
        )
    if kind <= 1:
        return rng.choice(NUMBERS)
    return rng.choice(WORDS) if kind <= 3 else rng.choice([None, True, False])


def value_of(rng, schema):
    """A value as a schema has it, most of the time."""
    if rng.random() < 0.03 or not schema.keys() & {"const", "enum", "anyOf", "type"}:
        return any_value(rng)
    if "const" in schema or "enum" in schema:
        return rng.choice(schema.get("enum") or [schema["const"]])
    if "anyOf" in schema:
        return value_of(rng, rng.choice(schema["anyOf"]))
    kind = schema["type"]
    kind = rng.choice(kind) if isinstance(kind, list) else kind
    if kind in ("integer", "number"):
        low, high = schema["minimum"], schema["maximum"]
        small = [one for one in (low, low + 1, high, 1, 65, 72) if low <= one <= high]
        return rng.choice([*small, rng.choice(NUMBERS)] if rng.random() < 0.1 else small)
    if kind == "array":
        count = rng.randint(schema.get("minItems", 0), 3)
        return [value_of(rng, schema["items"]) for _ in range(count)]
    if kind == "object":
        known, needed = schema.get("properties", {}), schema.get("required", [])
        names = [one for one in known if one in needed or rng.random() < 0.1]
        made = {name: value_of(rng, known[name]) for name in names}
        if "propertyNames" in schema:
            made["65"] = value_of(rng, schema["additionalProperties"])
        if rng.random() < 0.05:
            made[rng.choice([*WORDS, *known])] = any_value(rng)
        return made
    return {"string": rng.choice(WORDS), "boolean": rng.random() < 0.5, "null": None}[kind]


def request_of(number):
    """The method, the path, the headers and the body of a request."""
    rng = random.Random(number)
    path, headers, method = rng.choice(list(BODIES)), HEADERS, "POST"
    # NaN and surrogates pass json.dumps as they do in other programs.
    body = bytearray(json.dumps(value_of(rng, BODIES[path])).encode())
    kind = rng.random()
    if kind < 0.15:
        for _ in range(rng.randint(1, 4)):
            place = rng.randrange(len(body) + 1)
            body[place : place + rng.randrange(3)] = rng.randbytes(rng.randrange(3))
    elif kind < 0.3:
        method = rng.choice(["GET", "HEAD", "GET", "PUT", "OPTIONS", "DELETE", "X" * 40])
        path = rng.choice([*PATHS, "/v1/models/" + rng.choice(WORDS), "/" + rng.choice(WORDS)])
    elif kind < 0.4:
        names = [
            b"host",
            b"origin",
            b"content-type",
            b"content-length",
            b"authorization",
            b"expect",
        ]
        values = [b"", b"x", b"-1", b"1" * 30, b"application/json; charset=x", b"[::1]:80", b"null"]
        more = [
            (rng.choice(names), rng.choice([*values, rng.randbytes(9)]))
            for _ in range(rng.randint(1, 3))
        ]
        headers = [*more, *HEADERS] if rng.random() < 0.5 else more
    return method, path, headers, bytes(body)


class Engine(SlowEngine):
    """Answers at once, in the thread that asks."""

    def _begin(self, work, asked, on_event):
        ticket = super()._begin(lambda *_: None, asked, on_event)
        work(asked, on_event, ticket)
        return ticket


async def exchange(application, method, path, headers, body):
    """The messages that an application answers a request with."""
    parts = [{"type": "http.request", "body": body, "more_body": False}]
    said, gone = [], asyncio.Event()

    async def receive():
        if parts:
            return parts.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message):
        said.append(message)

    scope = {"type": "http", "method": method, "path": path, "headers": headers,
             "client": ("127.0.0.1", 1)}  # fmt: skip
    await application(scope, receive, send)
    return said


def check(said):
    """Whether an answer has the form of its kind; its status."""
    start, *rest = said
    assert start["type"] == "http.response.start"
    assert start["status"] < 500
    assert [message.get("more_body", False) for message in rest] == [True] * (len(rest) - 1) + [
        False
    ]
    data = b"".join(message["body"] for message in rest)
    kind = dict(start["headers"])[b"content-type"]
    if kind == b"application/json":
        record = json.loads(data)
        # The description, too, has the word.
        assert "openapi" in record or ("error" in record) == (start["status"] >= 400)
    elif kind.startswith(b"text/event-stream"):
        *events, _, end = data.decode().split("\n\n")
        assert (_, end) == ("data: [DONE]", "") or "error" in json.loads(_.removeprefix("data: "))
        assert all(json.loads(event.removeprefix("data: ")) for event in events)
    return start["status"]


def test_any_request_is_answered(monkeypatch):
    generator = Generator(random_model(make_config(vocab_size=256, sequence_length=64)))
    models, faults, statuses = SomeModels(tiny=Engine(generator)), [], {}
    monkeypatch.setattr(app, "log", lambda record: faults.append(record.get("error")))
    application = Application(models, ServeSettings(template=Path("plain"), limits=LIMITS))

    async def send_all():
        for number in range(REQUESTS):
            try:
                status = check(await exchange(application, *request_of(number)))
                assert faults in ([None], []), faults
                assert models.held == 0
            except Exception as error:
                raise AssertionError(f"request {number}") from error
            statuses[status] = statuses.get(status, 0) + 1
            faults.clear()

    try:
        asyncio.run(send_all())
    finally:
        application.close()
    # Enough of them reach what lies behind the reader.
    assert min(statuses[200], statuses[400]) > REQUESTS // 5
    assert {403, 404, 405, 415} <= set(statuses)
