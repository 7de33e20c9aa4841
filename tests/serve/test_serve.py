"""The command `serve`: a process with a real model, signals, keys; OpenAI's own client."""

import contextlib
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from helpers.models import make_config, random_model
from helpers.paths import ROOT
from helpers.serving import ask, connect, events_of, serving
from legacy1bit.generator import Generator
from legacy1bit.hyperparams import SamplingConfig
from legacy1bit.model import save_model
from legacy1bit.serve.models import Models, named_sources

pytest.importorskip("uvicorn", reason="uvicorn is not installed: pip install uvicorn")
pytest.importorskip("starlette", reason="starlette is not installed: pip install starlette")

KEY = "0123456789abcdef0123"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny"
    save_model(random_model(make_config(vocab_size=256, sequence_length=250)), path)
    return path


class Running:
    """A process that serves."""

    def __init__(self, process, url):
        self.process, self.url = process, url


@contextlib.contextmanager
def process(*options):
    command = [sys.executable, "-m", "legacy1bit.main", "serve", "--port", "0", *map(str, options)]
    with subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        stderr=subprocess.PIPE, text=True,
    ) as running:  # fmt: skip
        try:
            line = running.stderr.readline()
            url = re.search(r"http://\S+", line)
            assert url, line + running.stderr.read()
            yield Running(running, url[0])
        finally:
            running.kill()


def test_texts_are_those_of_generate_until_a_signal(folder, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text(f"# of this test\n{KEY}\n")
    options = ("--model", f"a={folder}", "--model", folder, "--api-key-file", keys)
    with process(*options, "--template", "plain", "--threads", 1) as server:
        allowed = {"authorization": f"Bearer {KEY}"}
        assert ask(server, "/v1/models")[0] == 401
        _, listed = ask(server, "/v1/models", **allowed)
        assert [one["id"] for one in listed["data"]] == ["a", "tiny"]
        assert [one["loaded"] for one in listed["data"]] == [True, False]
        body = {"model": "tiny", "prompt": "Hello", "max_tokens": 30, "seed": 4}
        status, answer = ask(server, "/v1/completions", body, **allowed)
        assert status == 200
        with Generator.load(folder, 1, head="int8") as generator:
            expected = generator.complete("Hello", 30, SamplingConfig(temperature=1.0), 4)
        assert answer["choices"][0]["text"] == expected.text
        # Keys and models are read again.
        keys.write_text("another-key-of-this-test\n")
        server.process.send_signal(signal.SIGHUP)
        while "reload" not in (line := server.process.stderr.readline()):
            assert json.loads(line)["path"].startswith("/v1/")
        assert ask(server, "/v1/models", **allowed)[0] == 401
        again = {"authorization": "Bearer another-key-of-this-test"}
        _, answer = ask(server, "/v1/completions", body, **again)
        assert answer["choices"][0]["text"] == expected.text
        # A request that runs is answered; the server ends then.
        connection = connect(server)
        sent = json.dumps({**body, "max_tokens": 200, "stream": True})
        headers = {"content-type": "application/json", **again}
        connection.request("POST", "/v1/completions", sent, headers)
        answer = connection.getresponse()
        first = answer.readline()
        server.process.send_signal(signal.SIGTERM)
        *_, last = events_of(first + answer.read())
        assert last["choices"][0]["finish_reason"] == "length"
        connection.close()
        assert server.process.wait(20) == 0
        assert "Traceback" not in server.process.stderr.read()


def test_wrong_options_are_refused(fail, folder, tmp_path):
    assert "--api-key-file FILE says whom" in fail("serve", "--model", folder, "--host", "0.0.0.0")
    keys = tmp_path / "keys"
    for text, said in (("short\n", "key 1 of"), ("# none\n", "has no key"), ("ä" * 20, "ASCII")):
        keys.write_text(text, encoding="utf-8")
        assert said in fail("serve", "--model", folder, "--api-key-file", keys)
    for option, value in (("--port", 65536), ("--slots", 0), ("--context", 1), ("--timeout", 0),
                          ("--memory-limit", "much")):  # fmt: skip
        assert option in fail("serve", "--model", folder, option, value)
    assert "missing" in fail("serve", "--model", tmp_path / "missing")
    assert "two models" in fail("serve", "--model", folder, "--model", folder)
    assert "203.0.113.1" in fail(
        "serve", "--model", folder, "--host", "203.0.113.1", "--api-key-file", keys_of(tmp_path)
    )


def keys_of(folder):
    path = folder / "right"
    path.write_text(KEY)
    return path


# --- OpenAI's client ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def client(folder):
    openai = pytest.importorskip("openai", reason="openai is not installed: pip install openai")
    with Models(named_sources([str(folder)]), slots=3, threads=1) as models:
        keys = (hashlib.sha256(KEY.encode()).digest(),)
        with (
            serving(models, template=Path("plain"), keys=keys) as server,
            openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client,
        ):
            yield client


SAID = [{"role": "user", "content": "Hi"}]


def test_client_lists_models(client):
    assert [one.id for one in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "legacy1bit"


def test_client_chats(client, folder):
    asked = {"model": "tiny", "messages": SAID, "max_completion_tokens": 12, "seed": 3}
    whole = client.chat.completions.create(**asked, n=2)
    assert whole.usage.completion_tokens == 24
    with Generator.load(folder, 1, head="int8") as generator:
        for i, choice in enumerate(whole.choices):
            expected = generator.complete(
                "User: Hi\nAssistant: ", 12, SamplingConfig(temperature=1.0), 3 + i, ["\nUser:"]
            )
            assert choice.message.content == expected.text
    stream = client.chat.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(one.choices[0].delta.content or "" for one in chunks if one.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == 12
    assert chunks[-2].choices[0].finish_reason == "length"


def test_client_gets_logprobs(client):
    found = client.chat.completions.create(
        model="tiny", messages=SAID, max_tokens=5, logprobs=True, top_logprobs=3, temperature=0
    )
    content = found.choices[0].logprobs.content
    assert len(content) == 5
    for one in content:
        best = one.top_logprobs[0]
        assert len(one.top_logprobs) == 3
        # Without a temperature the likeliest token is taken.
        assert (one.token, one.logprob) == (best.token, best.logprob)
        assert one.logprob < 0
    found = client.completions.create(model="tiny", prompt="Hi", max_tokens=5, logprobs=2)
    assert len(found.choices[0].logprobs.token_logprobs) == 5


def test_client_gets_embeddings(client, folder):
    found = client.embeddings.create(model="tiny", input=["Hello", "It was"])
    with Generator.load(folder, 1, head="int8") as generator:
        for text, one in zip(["Hello", "It was"], found.data, strict=True):
            mean = generator.embed(text).astype(np.float64).mean(axis=0)
            expected = mean / np.linalg.norm(mean)
            np.testing.assert_allclose(one.embedding, expected, rtol=1e-4, atol=1e-6)


SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["a", "bcd"]}, "old": {"type": "boolean"}},
    "required": ["name", "old"],
    "additionalProperties": False,
}


def test_client_gets_json_of_a_schema(client):
    pytest.importorskip("llguidance", reason="llguidance is not installed")
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    found = client.chat.completions.create(
        model="tiny", messages=SAID, n=8, seed=1, max_tokens=100, response_format=form
    )
    for choice in found.choices:
        record = json.loads(choice.message.content)
        assert choice.finish_reason == "stop"
        assert record["name"] in ("a", "bcd")
        assert record["old"] in (True, False)
        assert set(record) == {"name", "old"}
    # Of other seeds, other texts.
    assert len({choice.message.content for choice in found.choices}) > 1
    grammar = {"grammar": 'start: "yes" | "no"'}
    found = client.completions.create(model="tiny", prompt="Hi", n=4, seed=1, extra_body=grammar)
    assert {choice.text for choice in found.choices} <= {"yes", "no"}


def test_wrong_schemas_are_refused(client):
    pytest.importorskip("llguidance", reason="llguidance is not installed")
    import openai

    outside = {"$ref": "https://example.org/schema"}
    for schema in ({"type": "nonsense"}, outside, {"enum": ["a" * (1 << 16)]}):
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(model="tiny", messages=SAID, response_format=form)
    for grammar in ("start: nope", "", "start: " + "(" * 10_000, 'start: "a" | start "b" start'):
        with pytest.raises(openai.BadRequestError):
            client.completions.create(
                model="tiny", prompt="Hi", max_tokens=5, extra_body={"grammar": grammar + "!"}
            )


def test_client_understands_errors(client):
    import openai

    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.completions.create(model="other", prompt="Hi")
    with pytest.raises(openai.BadRequestError, match="tools is not supported"):
        client.chat.completions.create(model="tiny", messages=SAID, tools=[{"type": "function"}])
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()


# --- Another client -------------------------------------------------------------------------------


def test_llm_chats(client, folder, tmp_path):
    """Simon Willison's llm, a command that people use with any server of this form."""
    pytest.importorskip("llm", reason="llm is not installed: pip install llm")
    about = {"model_id": "mine", "model_name": "tiny", "api_base": str(client.base_url)}
    # JSON is YAML.
    known = json.dumps([{**about, "api_key_name": "mine"}])
    (tmp_path / "extra-openai-models.yaml").write_text(known)
    (tmp_path / "keys.json").write_text(json.dumps({"mine": KEY}))
    command = [sys.executable, "-m", "llm", "-m", "mine", "Hi", "--no-log"]
    command += ["-o", "seed", "3", "-o", "max_tokens", "12"]
    environment = {
        **os.environ, "LLM_USER_PATH": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)
    }  # fmt: skip
    with Generator.load(folder, 1, head="int8") as generator:
        expected = generator.complete(
            "User: Hi\nAssistant: ", 12, SamplingConfig(temperature=1.0), 3, ["\nUser:"]
        ).text
    # One after the other: both write the same database.
    for more in ([], ["--no-stream"]):
        done = subprocess.run(
            [*command, *more], env=environment, capture_output=True, timeout=100
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.decode() == expected + "\n"
