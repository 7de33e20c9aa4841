"""Bodies and paths that nobody expects: every one is answered, none with a fault of the server."""

import asyncio
import json

import pytest

from helpers.models import make_config, random_model
from helpers.serving import SlowEngine, SomeModels
from legacy1bit.generator import Generator

hypothesis = pytest.importorskip("hypothesis")
pytest.importorskip("starlette", reason="starlette is not installed: pip install starlette")
from hypothesis import strategies as st  # noqa: E402

from legacy1bit.serve.app import Application, ServeSettings  # noqa: E402
from legacy1bit.serve.openai import Limits  # noqa: E402

PATHS = [
    "/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/tokenize", "/detokenize",
    "/v1/models", "/v1/models/tiny", "/metrics", "/",
]  # fmt: skip
NAMES = [
    "model",
    "prompt",
    "messages",
    "input",
    "content",
    "tokens",
    "add_special",
    "n",
    "stream",
    "stream_options",
    "max_tokens",
    "stop",
    "seed",
    "max_completion_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "frequency_penalty",
    "logprobs",
    "presence_penalty",
    "top_logprobs",
    "logit_bias",
    "user",
    "tools",
    "response_format",
    "encoding_format",
    "dimensions",
    "echo",
]
LEAVES = (
    st.none() | st.booleans() | st.integers(-3, 300) | st.integers() | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["tiny", "user", "assistant", "text", "float", "base64", "\ud800", "<think>"])
)  # fmt: skip
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["role", "content", "type", "text", "include_usage", "65"]) | st.text(),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant", "tool"]) | LEAVES,
         "content": st.text(max_size=20) | VALUES}
    ), max_size=4,
)  # fmt: skip
BODIES = st.dictionaries(
    st.sampled_from(NAMES) | st.text(max_size=4), VALUES, max_size=5
) | st.fixed_dictionaries(
    {}, optional={"messages": MESSAGES, "prompt": st.text(max_size=9),
                  "max_tokens": st.integers(1, 9), "stream": st.booleans(),
                  "n": st.integers(1, 3), "input": VALUES},
)  # fmt: skip


@pytest.fixture(scope="module")
def models():
    generator = Generator(random_model(make_config(vocab_size=256, sequence_length=64)))
    return SomeModels(tiny=SlowEngine(generator))


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


def answer_of(application, method, path, headers, body):
    start, *rest = asyncio.run(exchange(application, method, path, headers, body))
    assert start["type"] == "http.response.start"
    assert start["status"] < 500
    assert [message.get("more_body", False) for message in rest] == [True] * (len(rest) - 1) + [
        False
    ]
    data = b"".join(message["body"] for message in rest)
    kind = dict(start["headers"])[b"content-type"]
    if kind == b"application/json":
        record = json.loads(data)
        assert ("error" in record) == (start["status"] >= 400)
    return start["status"], data


@pytest.fixture(scope="module")
def application(models):
    from pathlib import Path

    application = Application(
        models, ServeSettings(template=Path("plain"), limits=Limits(tokens=30))
    )
    yield application
    application.close()


HEADERS = [(b"host", b"localhost"), (b"content-type", b"application/json")]


def test_any_json_is_answered(application, models, capsys):
    statuses = set()

    @hypothesis.settings(max_examples=200, deadline=None)
    @hypothesis.given(st.sampled_from(PATHS[:5]), BODIES)
    @hypothesis.example("/v1/completions", {"prompt": "a", "max_tokens": 2})
    def check(path, body):
        # NaN and surrogates pass json.dumps as they do in other programs.
        data = json.dumps(body).encode()
        statuses.add(answer_of(application, "POST", path, HEADERS, data)[0])

    check()
    assert statuses >= {200, 400}
    assert models.held == 0
    assert "Traceback" not in capsys.readouterr().err


def test_any_bytes_are_answered(application, models, capsys):
    names = st.sampled_from(
        [b"host", b"origin", b"content-type", b"content-length", b"authorization"]
    )
    headers = st.lists(st.tuples(names, st.binary(max_size=12)), max_size=3)

    @hypothesis.settings(max_examples=200, deadline=None)
    @hypothesis.given(
        st.sampled_from(["GET", "POST", "HEAD", "PUT", "OPTIONS"]),
        st.sampled_from(PATHS) | st.text(max_size=20).map("/{}".format),
        st.just(HEADERS) | headers.map(lambda more: HEADERS + more) | headers,
        st.binary(max_size=60),
    )
    def check(method, path, headers, body):
        answer_of(application, method, path, headers, body)

    check()
    assert models.held == 0
    assert "Traceback" not in capsys.readouterr().err
