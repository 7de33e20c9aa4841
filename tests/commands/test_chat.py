"""The command `chat`: conversations, what is typed in them, and how they end."""

import contextlib
import copy
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from helpers.models import make_config, random_model
from helpers.paths import ROOT
from helpers.published import golden, with_golden_models
from legacy1bit.commands import chat as chat_command
from legacy1bit.commands.chat import Conversation
from legacy1bit.data.tokenizer import ByteTokenizer
from legacy1bit.formats.chat_template import PlainTemplate
from legacy1bit.formats.published import read_template
from legacy1bit.generator import Generator
from legacy1bit.hyperparams import SamplingConfig
from legacy1bit.model import save_model

SAMPLING = SamplingConfig()


@pytest.fixture(scope="module")
def model():
    return random_model(make_config(vocab_size=256, sequence_length=250))


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "model"
    save_model(model, path)
    return path


@pytest.fixture
def generator(model):
    return Generator(model)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def run(folder, typed, *options, status=0):
    """Return what the program answers to lines that come through a pipe."""
    command = [sys.executable, "-m", "legacy1bit.main", "chat", "--model", str(folder)]
    done = subprocess.run(
        [*command, "--template", "plain", "--seed", "3", "--max-tokens", "20", *options],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, input=typed, capture_output=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == status, done.stderr
    assert b"Traceback" not in done.stderr
    return done.stdout, done.stderr.decode()


def answers(generator, *messages, system="", tokens=20):
    """Return the answers as they are without a cache, each to the whole text before it."""
    text, found = f"System: {system}\n" if system else "", []
    for number, message in enumerate(messages):
        text += f"User: {message}\nAssistant: "
        done = generator.complete(text, tokens, seed=3 + number, stop=["\nUser:"])
        found.append(done.text)
        text += f"{done.text.strip()}\n"
    return found


def test_answers_continue_the_conversation(folder, generator):
    output, errors = run(folder, b"Hi\n\nHow are you?\n")
    assert output.decode().rstrip("\n") == "\n".join(
        answers(generator, "Hi", "How are you?")
    ).rstrip("\n")
    # Nothing is asked for, and nothing is told, where nobody types.
    assert errors == ""
    assert run(folder, b"") == (b"", "")
    output, _ = run(folder, b"Hi\n", "--system", "Be brief.")
    assert output.decode() == answers(generator, "Hi", system="Be brief.")[0] + "\n"


def test_commands(folder, generator, tmp_path):
    file = tmp_path / "said.json"
    typed = f"Hi\n/save {file}\n/reset\nHi\n/help\n/unheard\n/save\n/quit\nHo\n"
    output, errors = run(folder, typed.encode())
    first = answers(generator, "Hi")[0]
    assert output.decode() == 2 * f"{first}\n"
    assert json.loads(file.read_text("utf-8")) == [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": first.strip()},
    ]
    for told in ("2 messages are in", "is forgotten", "/reset        forget", "/unheard is unknown",
                 "/save needs the name of a file"):  # fmt: skip
        assert told in errors
    output, errors = run(folder, b"/system Be brief.\nHi\n/save /nowhere/x\n")
    assert output.decode() == answers(generator, "Hi", system="Be brief.")[0] + "\n"
    assert "the system message is 'Be brief.'" in errors
    assert "legacy1bit: " in errors
    output, _ = run(folder, b"//Hi\n")
    assert output.decode() == answers(generator, "/Hi")[0] + "\n"


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("a\\\nb\\\n c\nd", ["a\nb\n c", "d"]),
        ('"""\na\n\n b\n"""\nc', ["a\n\n b", "c"]),
        ('"""a\nb"""', ["a\nb"]),
        ('  """a"""\nb', ["a", "b"]),
        ('"""a\\\nb"""', ["a\\\nb"]),
        ('"""a\nb', ["a\nb"]),
        ("a\\", ["a"]),
        ("a\n\n  \nb\r\n", ["a", "b"]),
        ('a """b"""', ['a """b"""']),
        ("\ufeffd\u00e9", ["d\u00e9"]),
    ],
)
def test_messages_of_several_lines(monkeypatch, typed, expected):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed.encode())))
    assert list(chat_command._messages()) == expected


def test_the_beginning_of_the_conversation_stays_in_the_cache(generator):
    conversation = Conversation(generator, PlainTemplate(), SAMPLING, 20)
    conversation.seed = 3
    said = []
    for message in ("Hi", "How are you?", "Well."):
        before = len(conversation._history)
        stream = conversation.ask(message)
        # All but what the answer's end and the message added.
        assert len(conversation._cached) >= before - 20
        assert before == 0 or len(conversation._cached) > 10
        said.append("".join(stream))
        conversation.finish(said[-1])
    assert said == answers(generator, "Hi", "How are you?", "Well.")


def test_an_answer_may_be_left(generator):
    conversation = Conversation(generator, PlainTemplate(), SAMPLING, 20)
    conversation.seed = 3
    stream = conversation.ask("Hi")
    part = next(stream) + next(stream)
    stream.close()
    conversation.finish(part)
    text = "".join(conversation.ask("Ho"))
    prompt = f"User: Hi\nAssistant: {part.strip()}\nUser: Ho\nAssistant: "
    assert text == generator.complete(prompt, 20, seed=4, stop=["\nUser:"]).text


def test_the_oldest_messages_are_dropped_where_the_context_is_full(folder, generator):
    output, errors = run(folder, b"How do you do?\n" * 6, "--context", "100")
    assert "the context is full: the first " in errors
    assert len(output) > 60
    output, errors = run(folder, b"x" * 300 + b"\nHi\n")
    assert "the message has " in errors
    assert "expected fewer than 250, the context" in errors
    # It is not part of the conversation.
    assert output.decode() == answers(generator, "Hi")[0] + "\n"
    _, errors = run(folder, b"Hi\n", "--max-tokens=90", "--context=60")
    assert errors == "the context is full: the answer ends here\n"


def test_stop_tokens_end_an_answer(model):
    tokenizer = ByteTokenizer()
    drawn = list(
        Generator(model).tokens(Generator(model).encode("User: a\nAssistant: "), 20, seed=3)
    )
    tokenizer = copy.copy(tokenizer)
    tokenizer.stop_tokens = (drawn[7],)
    conversation = Conversation(Generator(model, tokenizer), PlainTemplate(), SAMPLING, 20)
    conversation.seed = 3
    text = "".join(conversation.ask("a"))
    assert text == bytes(drawn[: drawn.index(drawn[7])]).decode("utf-8", "replace")


def test_what_cannot_be_is_one_line(folder, tmp_path, fail):
    (tmp_path / "loop").write_text("{% for i in range(9) %}{{ ''.__class__ }}{% endfor %}")
    (tmp_path / "long").write_text("x" * 300000)
    for options, told in (
        ((), "has no chat template"),
        (("--template", tmp_path / "nowhere"), "nowhere"),
        (("--template", tmp_path / "long"), "has 300000 characters"),
        (("--template=plain", "--max-tokens=0"), "--max-tokens is 0, expected 1 or more"),
        (("--template=plain", "--context=1"), "--context is 1, expected 2 or more"),
        (("--template=plain", "--seed=-1"), "--seed is -1"),
        (("--template=plain", "--stop="), "--stop is empty"),
    ):
        assert told in fail("chat", "--model", folder, *options)
    pytest.importorskip("jinja2", reason="jinja2 is not installed")
    # A template that is refused when it is rendered ends no conversation.
    output, errors = run(folder, b"Hi\nHo\n", "--template", str(tmp_path / "loop"))
    assert output == b""
    assert errors.count("asks for the attribute '__class__'") == 2


# As the program, but each piece of an answer takes a moment.
SLOW = """
import sys, time
from legacy1bit.commands import chat
from legacy1bit.main import program
write = chat.write_bytes
def slowly(data):
    write(data)
    time.sleep(0.05)
chat.write_bytes = slowly
sys.argv[0] = "legacy1bit"
program()
"""


@contextlib.contextmanager
def slow(folder, stdin, stdout):
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, "chat", "--model", str(folder), "--template", "plain",
         "--seed", "3", "--max-tokens", "200"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm"}, stdin=stdin, stdout=stdout,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    alarm = threading.Timer(60, process.kill)
    alarm.start()
    try:
        with process:
            yield process
    finally:
        process.kill()
        alarm.cancel()


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a terminal of its own")
def test_ctrl_c_stops_an_answer_and_a_second_one_ends(folder):
    ours, theirs = os.openpty()
    with slow(folder, theirs, theirs) as process:
        os.close(theirs)
        seen = b""

        def wait_for(done):
            nonlocal seen
            while not done():
                seen += os.read(ours, 4096)

        wait_for(lambda: seen.endswith(b"> "))
        os.write(ours, b"Hi\n")
        wait_for(lambda: len(seen) > 20)
        process.send_signal(signal.SIGINT)
        wait_for(lambda: seen.endswith(b"\n> "))
        # The conversation goes on.
        os.write(ours, b"/save /dev/null/x\n")
        wait_for(lambda: seen.count(b"> ") >= 3)
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        errors = process.stderr.read()
        assert process.wait(30) == 130, errors
    os.close(ours)
    assert b"/help lists the commands" in errors
    assert b"in the context)" in errors
    assert b"Traceback" not in errors


def test_ctrl_c_twice_ends_a_conversation_through_a_pipe(folder):
    with slow(folder, subprocess.PIPE, subprocess.PIPE) as process:
        process.stdin.write(b"Hi\nHo\nHa\n")
        process.stdin.close()
        assert process.stdout.read(3)
        process.send_signal(signal.SIGINT)
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        process.stdout.read()
        assert b"Traceback" not in process.stderr.read()
        assert process.wait(30) == 130


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a terminal of its own")
def test_a_terminal_keeps_a_history(folder, tmp_path):
    pytest.importorskip("readline", reason="this Python has no readline")
    ours, theirs = os.openpty()
    with slow(folder, theirs, theirs) as process:
        os.close(theirs)
        seen = b""
        for typed in (b"/reset\n", b"\x04"):
            while not seen.endswith(b"> "):
                seen += os.read(ours, 4096)
            seen = b""
            os.write(ours, typed)
        with contextlib.suppress(OSError):
            while os.read(ours, 4096):
                pass
        assert process.wait(30) == 0
    os.close(ours)
    assert "/reset" in (tmp_path / "state" / "legacy1bit" / "chat_history").read_text()


@with_golden_models
def test_conversations_have_the_tokens_of_other_software():
    pytest.importorskip("jinja2", reason="jinja2 is not installed")
    seen = 0
    for path, about in golden():
        renderings = (about.get("chat") or {}).get("renderings", ())
        cases = [case for case in renderings if case["add_generation_prompt"]]
        if not cases:
            continue
        with Generator.load(path) as generator:
            template = read_template(path, generator.tokenizer.names)
            for case in cases:
                conversation = Conversation(generator, template, SAMPLING, 8)
                conversation.messages = list(case["messages"])
                assert conversation._tokens() == case["ids"], path
                conversation.messages.pop()
                # What is typed is no special token.
                end, *_ = generator.tokenizer.stop_tokens
                ends = conversation._tokens().count(end)
                said = [name for name, token in generator.tokenizer.special_tokens.items()
                        if token == end]  # fmt: skip
                conversation.messages.append({"role": "user", "content": f"a{said[0]}b"})
                found = conversation._tokens()
                assert found.count(end) - ends in (0, 1), path
                assert f"a{said[0]}b" in generator.tokenizer.decode(found).decode()
                conversation.messages.pop()
                text = "".join(conversation.ask("Hello?"))
                conversation.finish(text)
                seen += 1
            template.close()
    assert seen
