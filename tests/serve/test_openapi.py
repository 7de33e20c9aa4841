"""The description at /openapi.json: it says what the server does."""

import subprocess
import sys
from pathlib import Path

import pytest

from helpers.models import make_config, random_model
from helpers.serving import SlowEngine, SomeModels, ask, serving
from legacy1bit.generator import Generator
from legacy1bit.model import save_model
from legacy1bit.serve.models import Models, named_sources

pytest.importorskip("uvicorn", reason="uvicorn is not installed: pip install uvicorn")
pytest.importorskip("starlette", reason="starlette is not installed: pip install starlette")

from legacy1bit.serve.errors import ApiError
from legacy1bit.serve.openai import Limits, parse_chat, parse_completion, parse_embedding
from legacy1bit.serve.openapi import describe

SAID = [{"role": "user", "content": "Hi"}]
# What each kind of request needs, and its reader.
KINDS = {
    "/v1/completions": ({"prompt": "a"}, parse_completion),
    "/v1/chat/completions": ({"messages": SAID, "logprobs": True}, parse_chat),
    "/v1/embeddings": ({"input": "a"}, parse_embedding),
}


@pytest.fixture(scope="module")
def server():
    generator = Generator(random_model(make_config(vocab_size=256, sequence_length=64)))
    with serving(SomeModels(tiny=SlowEngine(generator)), template=Path("plain")) as server:
        yield server


@pytest.fixture(scope="module")
def description(server):
    status, description = ask(server, "/openapi.json")
    assert status == 200
    return description


def test_paths_and_methods_are_those_of_the_server(server, description):
    assert len(description["paths"]) == 11
    for path, methods in description["paths"].items():
        status, answer = ask(server, path.replace("{name}", "tiny"), method="PATCH")
        allowed = answer["error"]["message"].partition(" takes ")[2].split(", ")
        assert (status, sorted({*allowed} - {"HEAD"})) == (405, [m.upper() for m in methods])


def bodies_of(description, path):
    operation = description["paths"][path]["post"]
    return operation["requestBody"]["content"]["application/json"]["schema"]["properties"]


@pytest.mark.parametrize("path", KINDS)
def test_ranges_are_those_of_the_reader(path):
    needed, parse = KINDS[path]
    tested = 0
    for name, schema in bodies_of(describe(Limits()), path).items():
        if "minimum" not in schema:
            continue
        tested += 1
        low, high = schema["minimum"], schema["maximum"]
        step = 1 if schema["type"][0] == "integer" else 1e-3
        for value in (low, high, None):
            parse({**needed, name: value}, Limits())
        for value in (low - step, high + step, str(low), True):
            with pytest.raises(ApiError, match=f"{name} is "):
                parse({**needed, name: value}, Limits())
    assert tested == {"/v1/completions": 11, "/v1/chat/completions": 12, "/v1/embeddings": 1}[path]


@pytest.mark.parametrize("path", KINDS)
def test_defaults_are_those_of_the_reader(path):
    needed, parse = KINDS[path]
    known = bodies_of(describe(Limits()), path)
    defaults = {name: known[name]["default"] for name in known if "default" in known[name]}
    needed = {**needed, **({} if path == "/v1/embeddings" else {"seed": 1})}
    assert len(defaults) >= (1 if path == "/v1/embeddings" else 9)
    assert repr(parse({**defaults, **needed}, Limits())) == repr(parse(needed, Limits()))


def test_answers_are_as_described(server, description):
    jsonschema = pytest.importorskip("jsonschema")
    asked = [
        ("/v1/models", "get", None), ("/health", "get", None),
        ("/v1/completions", "post", {"prompt": "a", "logprobs": 2, "n": 2}),
        ("/v1/completions", "post", {"prompt": "a"}),
        ("/v1/completions", "post", {"prompt": "a", "n": 99}),
        ("/v1/chat/completions", "post", {"messages": SAID, "max_tokens": 3}),
        ("/v1/chat/completions", "post",
         {"messages": SAID, "max_tokens": 3, "logprobs": True, "top_logprobs": 2}),
        ("/v1/embeddings", "post", {"input": "a"}),
        ("/v1/embeddings", "post", {"input": "a", "encoding_format": "base64"}),
        ("/v1/embeddings", "post", {"input": "a", "model": "none"}),
        ("/tokenize", "post", {"content": "a"}), ("/detokenize", "post", {"tokens": [65]}),
    ]  # fmt: skip
    for path, method, body in asked:
        status, answer = ask(server, path, body)
        described = description["paths"][path][method]["responses"][str(status)]["content"]
        schema = {
            **described["application/json"]["schema"], "components": description["components"]
        }  # fmt: skip
        jsonschema.Draft202012Validator.check_schema(schema)
        jsonschema.validate(answer, schema, jsonschema.Draft202012Validator)
        if method == "post":
            bodies = description["paths"][path]["post"]["requestBody"]["content"]
            right = jsonschema.Draft202012Validator(bodies["application/json"]["schema"])
            assert right.is_valid(body) == (status != 400), (path, body)


@pytest.mark.slow
def test_schemathesis_finds_no_fault(tmp_path, capfd):
    """Some hundred requests of each kind, right and wrong ones, and sequences of them."""
    pytest.importorskip("schemathesis", reason="make test-serve installs schemathesis")
    folder = tmp_path / "tiny"
    save_model(random_model(make_config(vocab_size=256, sequence_length=64)), folder)
    program = "from schemathesis.cli import schemathesis; schemathesis()"
    with (
        Models(named_sources([str(folder)]), slots=3, threads=1) as models,
        serving(models, template=Path("plain")) as server,
    ):
        command = [
            *(sys.executable, "-c", program, "run", f"{server.url}/openapi.json"),
            *("--max-examples", "300", "--seed", "1", "--no-color", "--no-shrink"),
            # What a schema cannot say: which tokens the model has, which parameters need others.
            *("--exclude-checks", "positive_data_acceptance"),
        ]
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path
        )
    assert done.returncode == 0, done.stdout[-10_000:]
    assert "Tested: 10" in done.stdout  # all but the description itself
    log = capfd.readouterr().err
    assert '"path": "/v1/completions"' in log
    assert "Traceback" not in log
