"""The HTTP application on a real socket: routes, OpenAI's forms, who may ask, limits, the end."""

import asyncio
import base64
import contextlib
import http.client
import json
import socket
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from helpers.models import make_config, random_model
from helpers.serving import SlowEngine, SomeModels, ask, connect, events_of, port_of, serving
from legacy1bit.formats.chat_template import PlainTemplate
from legacy1bit.generator import Generator
from legacy1bit.hyperparams import SamplingConfig
from legacy1bit.serve.requests import Closed, QueueFull

pytest.importorskip("uvicorn", reason="uvicorn is not installed: pip install uvicorn")
pytest.importorskip("starlette", reason="starlette is not installed: pip install starlette")

HI = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 6, "seed": 3}
KEY = "a-key-of-this-test"


@pytest.fixture(scope="module")
def generator():
    return Generator(random_model(make_config(vocab_size=256, sequence_length=250)))


@pytest.fixture(scope="module")
def models(generator):
    return SomeModels(first=SlowEngine(generator), second=SlowEngine(generator))


@pytest.fixture
def engine(models):
    """The first model's engine, as it was made."""
    engine = models.acquire("first").engine
    yield engine
    engine.seconds, engine.fault = 0.0, None
    models.held = 0


@pytest.fixture(scope="module")
def server(models):
    with serving(models, template=Path("plain")) as server:
        yield server


def until(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def refuses(server):
    """Whether nobody listens any more."""
    with contextlib.suppress(ConnectionError):
        ask(server, "/health")
        return False
    return True


# --- Answers --------------------------------------------------------------------------------------


def test_completion_is_what_generate_writes(server, generator):
    body = {"prompt": "Hello", "max_tokens": 20, "seed": 5, "temperature": 0.9, "top_p": 0.8}
    status, answer = ask(server, "/v1/completions", {**body, "n": 2, "model": "second"})
    assert status == 200
    assert answer["object"] == "text_completion"
    assert answer["model"] == "second"
    sampling = SamplingConfig(temperature=0.9, top_p=0.8)
    for i, choice in enumerate(answer["choices"]):
        expected = generator.complete("Hello", 20, sampling, 5 + i)
        assert choice == {
            "index": i, "text": expected.text, "logprobs": None, "finish_reason": "length"
        }  # fmt: skip
    assert answer["usage"] == {
        "prompt_tokens": 6, "completion_tokens": 40, "total_tokens": 46,
        "prompt_tokens_details": {"cached_tokens": 1},
    }  # fmt: skip


def test_chat_is_what_chat_asks(server, generator, engine):
    said = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]},
        {"role": "assistant", "content": "  Ho \n"},
        {"role": "user", "content": "And?", "name": "me"},
    ]
    status, answer = ask(server, "/v1/chat/completions", {**HI, "messages": said})
    assert status == 200
    text = "System: Be brief.\nUser: Hi\nAssistant: Ho\nUser: And?\nAssistant: "
    expected = generator.complete(text, 6, SamplingConfig(temperature=1.0), 3, ["\nUser:"])
    [choice] = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": expected.text, "refusal": None}
    np.testing.assert_array_equal(engine.requests[-1].tokens, generator.encode(text))
    assert engine.requests[-1].stop == PlainTemplate.stop


def test_thoughts_of_earlier_answers_are_left_out(server, engine):
    thinks = {"role": "assistant", "content": "<think>hm</think> Ho"}
    ask(server, "/v1/chat/completions", {**HI, "messages": [thinks]})
    assert b"hm" not in bytes(engine.requests[-1].tokens.astype(np.uint8))


@pytest.mark.parametrize("usage", [False, True])
@pytest.mark.parametrize("chat", [False, True])
def test_stream_is_the_whole_in_parts(server, chat, usage):
    path = "/v1/chat/completions" if chat else "/v1/completions"
    body = {**HI, "n": 2} if chat else {"prompt": ["a", "b"], "max_tokens": 9, "seed": 1}
    _, whole = ask(server, path, body)
    options = {"stream_options": {"include_usage": True}} if usage else {}
    status, data = ask(server, path, {**body, "stream": True, **options})
    assert status == 200
    events = events_of(data)
    if usage:
        last = events.pop()
        assert last["choices"] == []
        assert last["usage"] == whole["usage"]
        assert all(event["usage"] is None for event in events)
    assert len({event["id"] for event in events}) == 1
    for index, expected in enumerate(whole["choices"]):
        mine = [c for event in events for c in event["choices"] if c["index"] == index]
        assert [one["finish_reason"] for one in mine[:-1]] == [None] * (len(mine) - 1)
        assert mine[-1]["finish_reason"] == expected["finish_reason"]
        if chat:
            assert mine[0]["delta"] == {"role": "assistant", "content": ""}
            text = "".join(one["delta"].get("content", "") for one in mine)
            assert text == expected["message"]["content"]
        else:
            assert "".join(one["text"] for one in mine) == expected["text"]


def test_http_1_0_streams_without_chunks(server, generator):
    body = json.dumps({"prompt": "Hello", "max_tokens": 9, "seed": 5, "stream": True}).encode()
    head = b"POST /v1/completions HTTP/1.0\r\nHost: localhost\r\nContent-Type: application/json"
    with socket.create_connection(("127.0.0.1", port_of(server)), 30) as client:
        client.sendall(b"%b\r\nContent-Length: %d\r\n\r\n%b" % (head, len(body), body))
        answer = b"".join(iter(lambda: client.recv(1 << 16), b""))
    headers, _, data = answer.partition(b"\r\n\r\n")
    assert b"chunked" not in headers.lower()
    text = "".join(event["choices"][0]["text"] for event in events_of(data))
    assert text == generator.complete("Hello", 9, SamplingConfig(temperature=1.0), 5).text


def test_stop_ends_before_it(server, generator):
    whole = generator.complete("Hello", 20, SamplingConfig(temperature=1.0), 5).text
    stop = whole[6:8]
    body = {"prompt": "Hello", "max_tokens": 20, "seed": 5, "stop": [stop, "never"]}
    _, answer = ask(server, "/v1/completions", body)
    assert answer["choices"][0]["text"] == whole[: whole.index(stop)]
    assert answer["choices"][0]["finish_reason"] == "stop"


def test_logprobs_have_the_form_of_each_path(server):
    body = {"prompt": "Hi", "max_tokens": 4, "seed": 2, "logprobs": 2}
    _, answer = ask(server, "/v1/completions", body)
    [choice] = answer["choices"]
    about = choice["logprobs"]
    assert about["token_logprobs"] == [-1.5] * 4
    assert about["top_logprobs"] == [{"\x00": -1.0, "\x01": -2.0}] * 4
    assert about["text_offset"][0] == 0
    assert len(about["tokens"]) == 4
    chat = {**HI, "logprobs": True, "top_logprobs": 1, "max_tokens": 2}
    _, answer = ask(server, "/v1/chat/completions", chat)
    content = answer["choices"][0]["logprobs"]["content"]
    assert [one["logprob"] for one in content] == [-1.5] * 2
    assert content[0]["top_logprobs"] == [{"token": "\x00", "logprob": -1.0, "bytes": [0]}]
    for one in content:
        data = bytes(one["bytes"])
        spelled = "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
        assert one["token"] in (data.decode("utf-8", "replace"), spelled)


def test_parameters_reach_the_engine(server, engine):
    body = {
        "prompt": [72, 105], "max_tokens": 1, "temperature": 0, "top_p": 0, "min_p": 0.1,
        "top_k": -1,
        "repetition_penalty": 1.2, "frequency_penalty": -0.5, "presence_penalty": 2, "seed": -1,
        "logit_bias": {"65": -100}, "user": "me", "tools": [], "response_format": {"type": "text"},
        "stop": None,
    }  # fmt: skip
    status, _ = ask(server, "/v1/completions", body)
    assert status == 200
    asked = engine.requests[-1]
    assert asked.tokens.tolist() == [72, 105]
    assert asked.sampling == SamplingConfig(
        temperature=0.0, top_p=1e-9, min_p=0.1, top_k=0, repetition_penalty=1.2
    )
    assert (asked.frequency_penalty, asked.presence_penalty) == (-0.5, 2.0)
    assert (asked.seed, asked.logit_bias, asked.stop) == ((1 << 64) - 1, {65: -100.0}, ())


def test_embeddings_are_means_of_states(server, generator):
    texts = ["Hello", "It was"]
    status, answer = ask(server, "/v1/embeddings", {"input": texts})
    assert status == 200
    _, packed = ask(server, "/v1/embeddings", {"input": texts, "encoding_format": "base64"})
    for text, one, other in zip(texts, answer["data"], packed["data"], strict=True):
        mean = generator.embed(text).astype(np.float64).mean(axis=0)
        np.testing.assert_allclose(one["embedding"], mean / np.linalg.norm(mean), rtol=1e-5)
        data = np.frombuffer(base64.b64decode(other["embedding"]), "<f4")
        np.testing.assert_array_equal(data, np.array(one["embedding"], np.float32))
    _, single = ask(server, "/v1/embeddings", {"input": generator.encode("Hello").tolist()})
    assert single["data"][0]["embedding"] == answer["data"][0]["embedding"]


def test_tokens_and_back(server):
    assert ask(server, "/tokenize", {"content": "Hi"}) == (200, {"tokens": [72, 105]})
    assert ask(server, "/tokenize", {"content": "H", "add_special": True})[1]["tokens"][-1] == 72
    assert ask(server, "/detokenize", {"tokens": [72, 105]}) == (200, {"content": "Hi"})
    assert ask(server, "/detokenize", {"tokens": []}) == (200, {"content": ""})
    assert ask(server, "/detokenize", {"tokens": [256]})[0] == 400


def test_models_health_metrics_and_page(server):
    _, listed = ask(server, "/v1/models")
    assert [one["id"] for one in listed["data"]] == ["first", "second"]
    assert ask(server, "/v1/models/second")[1] == listed["data"][1]
    assert ask(server, "/health") == (200, {"status": "ok"})
    status, text = ask(server, "/metrics")
    assert status == 200
    assert b'legacy1bit_slots{model="first"} 4\n' in text
    assert b'legacy1bit_http_requests_total{path="/health",status="200"} ' in text
    assert b"legacy1bit_http_request_seconds_count " in text
    with contextlib.closing(connect(server)) as connection:
        connection.request("GET", "/")
        answer = connection.getresponse()
        assert b"<!doctype html>" in answer.read()
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'sha256-")
        assert "unsafe" not in policy
        assert "access-control-allow-origin" not in answer.headers


# --- What is refused ------------------------------------------------------------------------------

REFUSED = [
    ("/v1/completions", {}, "provide prompt"),
    ("/v1/completions", {"prompt": 3}, "prompt is 3"),
    ("/v1/completions", {"prompt": []}, "prompt is []"),
    ("/v1/completions", {"prompt": [256]}, "256"),
    ("/v1/completions", {"prompt": [True]}, "prompt is true"),
    ("/v1/completions", {"prompt": "\ud800"}, "half of a character"),
    ("/v1/completions", {"prompt": ["a"] * 17}, "at most 16"),
    ("/v1/completions", {"prompt": ["a"] * 9, "n": 2}, "18 texts"),
    ("/v1/completions", {"prompt": "a" * 300}, "301 tokens"),
    ("/v1/completions", {"prompt": "a", "n": 0}, "n is 0"),
    ("/v1/completions", {"prompt": "a", "max_tokens": 1.5}, "max_tokens is 1.5"),
    ("/v1/completions", {"prompt": "a", "max_tokens": True}, "max_tokens is true"),
    ("/v1/completions", {"prompt": "a", "temperature": "hot"}, "temperature is"),
    ("/v1/completions", {"prompt": "a", "temperature": 10**400}, "a large number"),
    ("/v1/completions", {"prompt": "a", "stop": ["a"] * 17}, "at most 16"),
    ("/v1/completions", {"prompt": "a", "stop": ""}, "1 to 256"),
    ("/v1/completions", {"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias"),
    ("/v1/completions", {"prompt": "a", "suffix": "b"}, "suffix is not supported"),
    ("/v1/completions", {"prompt": "a", "unheard_of": 1}, "Unrecognized request argument"),
    ("/v1/completions", {"prompt": "a", "stream_options": {}}, "stream_options"),
    ("/v1/chat/completions", {"messages": []}, "messages is empty"),
    ("/v1/chat/completions", {"messages": [1]}, "messages[0] is 1"),
    ("/v1/chat/completions", {"messages": [{"role": "tool", "content": ""}]}, "role is"),
    ("/v1/chat/completions", {"messages": [{"role": "user"}]}, "content is null"),
    ("/v1/chat/completions", {**HI, "top_logprobs": 2}, "top_logprobs needs"),
    ("/v1/chat/completions", {**HI, "tools": [{}]}, "tools is not supported"),
    ("/v1/chat/completions", {**HI, "response_format": {"type": "xml"}},
     "response_format is an object"),
    ("/v1/chat/completions", {**HI, "response_format": {"type": "json_schema"}}, "json_schema.sch"),
    ("/v1/completions", {"prompt": "a", "grammar": 3}, "grammar is 3"),
    ("/v1/embeddings", {"input": ""}, "empty"),
    ("/v1/embeddings", {"input": "a", "dimensions": 5}, "dimensions"),
    ("/v1/embeddings", {"input": "a", "encoding_format": "hex"}, "encoding_format"),
    ("/tokenize", {"content": 1}, "content is 1"),
    ("/detokenize", {"tokens": [-1]}, "tokens holds -1"),
]  # fmt: skip


def test_wrong_requests_are_refused_in_openai_form(server):
    for path, body, said in REFUSED:
        status, answer = ask(server, path, body)
        assert status == 400, (body, answer)
        assert said in answer["error"]["message"], body
        assert set(answer["error"]) == {"message", "type", "param", "code"}
        assert answer["error"]["type"] == "invalid_request_error"


def test_what_is_no_request_is_refused(server):
    assert ask(server, "/v1/completions", {"prompt": "a", "model": "../first"})[0] == 404
    assert ask(server, "/v1/models/%2e%2e%2fsecret")[0] == 404
    assert ask(server, "/../../etc/passwd")[0] == 404
    assert ask(server, "/v1/completions")[0] == 405
    assert ask(server, "/health", b"{}")[0] == 405
    path = "/v1/completions"
    for body in (b"", b"{", b"[1]", b"\xff", b'{"prompt": NaN}', b"[" * 100_000, b"1" * 5000):
        assert ask(server, path, body)[0] == 400, body[:20]
    assert ask(server, path, b'{"prompt": "a"}', content_type="text/plain")[0] == 415
    status, answer = ask(server, path, b" " * ((1 << 21) + 1))
    assert status == 413
    assert "bytes" in answer["error"]["message"]


def test_faults_of_the_engine_are_told(server, engine, models, capsys):
    engine.fault = QueueFull(2.2)
    with contextlib.closing(connect(server)) as connection:
        body = json.dumps({"prompt": "a"})
        connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
        answer = connection.getresponse()
        assert answer.status == 429
        assert answer.headers["retry-after"] == "3"
        assert json.loads(answer.read())["error"]["type"] == "rate_limit_error"
    engine.fault = Closed()
    assert ask(server, "/v1/completions", {"prompt": "a"})[0] == 503
    engine.fault = "the weights are damaged"
    status, answer = ask(server, "/v1/completions", {"prompt": "a"})
    assert (status, answer["error"]["message"]) == (500, "the weights are damaged")
    # Behind the beginning of a stream only its last event can say so.
    engine.seconds = 0.05
    _, data = ask(server, "/v1/completions", {"prompt": "a", "stream": True})
    assert json.loads(data.decode().split("data: ")[-1])["error"]["code"] == "generation_failed"
    engine.fault = RuntimeError("a fault of ours")
    status, answer = ask(server, "/v1/completions", {"prompt": "a"})
    assert (status, answer["error"]["message"]) == (500, "the server has failed")
    until(lambda: models.held == 1)
    # The log is written behind the answer.
    errors = []
    until(lambda: errors.append(capsys.readouterr().err) or "a fault of ours" in errors[-1])
    assert "Traceback" not in "".join(errors)


# --- Who may ask ----------------------------------------------------------------------------------


def test_other_names_and_pages_are_not_let_in(server):
    for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", "", "[::2]:80"):
        assert ask(server, "/v1/models", host=host)[0] == 403, host
    for host in ("localhost", "127.0.0.1:99", "[::1]:80", "LOCALHOST:1"):
        assert ask(server, "/v1/models", host=host)[0] == 200, host
    mine = f"127.0.0.1:{port_of(server)}"
    assert ask(server, "/v1/models", origin=f"http://{mine}")[0] == 200
    for origin in ("null", "http://evil.example", "http://127.0.0.1:1"):
        assert ask(server, "/v1/models", origin=origin)[0] == 403, origin


def test_key_is_needed(models):
    import hashlib

    keys = (hashlib.sha256(b"another").digest(), hashlib.sha256(KEY.encode()).digest())
    with serving(models, keys=keys) as server:
        for path in ("/v1/models", "/metrics", "/nothing"):
            status, answer = ask(server, path)
            assert (status, answer["error"]["type"]) == (401, "authentication_error")
        for wrong in (KEY, f"Basic {KEY}", f"Bearer {KEY}x", "Bearer", "Bearer \xff"):
            assert ask(server, "/v1/models", authorization=wrong)[0] == 401
        assert ask(server, "/v1/models", authorization=f"Bearer {KEY}")[0] == 200
        assert ask(server, "/health")[0] == 200
        assert ask(server, "/")[0] == 200


# --- Clients that do harm -------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_client_that_is_gone_stops_its_request(server, engine, models, stream):
    engine.seconds, cancelled, sampled = 0.02, engine.cancelled, engine.sampled
    connection = connect(server)
    body = json.dumps({"prompt": "a", "max_tokens": 240, "n": 2, "stream": stream})
    connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
    until(lambda: engine.sampled > sampled + 2)
    connection.sock.shutdown(socket.SHUT_RDWR)
    connection.close()
    until(lambda: engine.cancelled == cancelled + 2)
    assert engine.sampled < sampled + 240
    # Only this test's own.
    until(lambda: models.held == 1)


def test_slow_requests_are_cut_off(models):
    with serving(models, receive_seconds=0.2) as server:
        for data in (b"", b"GET / HT", b"GET / HTTP/1.1\r\nHost: localhost\r\nX: ",
                     b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json"
                     b"\r\nContent-Length: 99\r\n\r\n{"):  # fmt: skip
            with socket.create_connection(("127.0.0.1", port_of(server)), 10) as client:
                client.sendall(data)
                with contextlib.suppress(ConnectionResetError):
                    assert client.recv(1000) == b""
        assert ask(server, "/health")[0] == 200


def test_long_answers_are_cut_off(models, engine):
    engine.seconds, cancelled = 0.05, engine.cancelled
    with serving(models, request_seconds=0.3) as server:
        with pytest.raises((http.client.HTTPException, ConnectionError)):
            ask(server, "/v1/completions", {"prompt": "a", "max_tokens": 240})
        until(lambda: engine.cancelled == cancelled + 1)


def test_idle_connections_give_their_place(models, engine):
    engine.seconds = 0.01
    with serving(models, most_connections=5) as server, contextlib.ExitStack() as stack:
        answers = []
        working = threading.Thread(
            target=lambda: answers.append(
                ask(server, "/v1/completions", {"prompt": "a", "max_tokens": 60})
            )
        )
        sampled = engine.sampled
        working.start()
        until(lambda: engine.sampled > sampled)
        for _ in range(40):
            address = ("127.0.0.1", port_of(server))
            stack.enter_context(socket.create_connection(address, 10))
        assert ask(server, "/health")[0] == 200
        working.join(20)
        assert answers[0][0] == 200


class NoTransport(asyncio.Transport):
    """Where a connection leads that nobody is behind."""

    closed = False

    def abort(self):
        self.closed = True

    def close(self):
        self.closed = True

    def is_closing(self):
        return self.closed

    def write(self, data):
        pass


@pytest.mark.parametrize("count", [3000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_any_number_of_idle_connections_is_held_by_few(models, count):
    """Silent ones, and ones with a part of a request: the newest are kept."""
    import uvicorn.server

    from legacy1bit.serve.app import Application, ServeSettings
    from legacy1bit.serve.server import protocol_of

    application = Application(models, ServeSettings(most_connections=50))
    config = uvicorn.Config(application, log_config=None, log_level="critical")
    make, state = protocol_of(application), uvicorn.server.ServerState()

    async def connect_all():
        transports = []
        for i in range(count):
            protocol = make(config, state, {})
            transports.append((protocol, NoTransport()))
            protocol.connection_made(transports[-1][1])
            if begun := b"GET / HTTP/1.1\r\nHost:"[: i % 22]:
                protocol.data_received(begun)
            if i >= 50:
                oldest, gone = transports[i - 50]
                assert gone.closed
                # As asyncio does.
                oldest.connection_lost(None)
                transports[i - 50] = None
            assert application.connections() == min(i + 1, 50)
        assert not any(transport.closed for _, transport in transports[-50:])
        assert len(state.connections) == 50

    asyncio.run(connect_all())
    application.close()


def test_garbage_ends_its_connection_alone(server, capfd):
    for data in (b"\x00" * 100, b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\x16\x03\x01" * 50,
                 b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 9000,
                 b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
                 # Refused before its body has come, which is wrong then.
                 b"POST /no HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n",
                 b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n\x00\x00\r\n\r\n",
                 b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\n"
                 b"Transfer-Encoding: chunked\r\n\r\nzz\r\n"):  # fmt: skip
        address = ("127.0.0.1", port_of(server))
        with contextlib.suppress(ConnectionError), socket.create_connection(address, 10) as client:
            client.sendall(data)
            assert b" 500 " not in client.recv(4000)
            client.sendall(b"zz\r\n\r\n")
            client.settimeout(0.1)
            with contextlib.suppress(TimeoutError):
                client.recv(4000)
    assert ask(server, "/health")[0] == 200
    assert "Traceback" not in capfd.readouterr().err


# --- Logs, and the end ----------------------------------------------------------------------------


def test_logs_have_prompts_only_if_asked(models, capsys):
    body = {"prompt": "a secret", "max_tokens": 2}
    for wanted in (False, True):
        with serving(models, log_prompts=wanted) as server:
            ask(server, "/v1/completions", body)
        # Another test's server may have written its last line late.
        lines = map(json.loads, capsys.readouterr().err.splitlines())
        [line] = [one for one in lines if one["path"] == "/v1/completions"]
        assert ("a secret" in json.dumps(line)) == wanted
        assert (line["path"], line["status"], line["completion_tokens"]) == (
            "/v1/completions", 200, 2,
        )  # fmt: skip


def test_running_requests_end_before_the_server_does(models, engine):
    engine.seconds, answers = 0.01, []
    with serving(models) as server:
        sampled = engine.sampled
        asking = threading.Thread(
            target=lambda: answers.append(
                ask(server, "/v1/completions", {"prompt": "a", "max_tokens": 40})
            )
        )
        asking.start()
        until(lambda: engine.sampled > sampled)
        server.stop()
        until(lambda: refuses(server))
        asking.join(20)
    assert answers[0][0] == 200
    assert answers[0][1]["usage"]["completion_tokens"] == 40


def test_second_signal_ends_requests_too(models, engine):
    engine.seconds, cancelled, sampled = 0.05, engine.cancelled, engine.sampled
    with serving(models) as server:
        connection = connect(server)
        body = json.dumps({"prompt": "a", "max_tokens": 240})
        connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
        until(lambda: engine.sampled > sampled)
        server.stop()
        # The fixture's end is a first signal here, and this one is the second.
        server.stop()
        until(lambda: engine.cancelled == cancelled + 1)
        connection.close()
