"""The command `chat`: conversations, what is typed in them, and how they end."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from helpers.conversations import answers
from helpers.models import make_config, random_model
from helpers.paths import ROOT
from legacy1bit.commands import chat as chat_command
from legacy1bit.generator import Generator
from legacy1bit.model import save_model


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


# As Qwen3's: the last line says whether the model thinks.
THINKING = (
    "{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}assistant:"
    "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}"
)


def test_thinking_without_an_end_says_so(folder, tmp_path):
    pytest.importorskip("jinja2", reason="jinja2 is not installed")
    file = tmp_path / "template"
    file.write_text(f"{THINKING}{{% if enable_thinking is undefined %}}<think>{{% endif %}}")
    told = "the model was still thinking: --max-tokens N gives it more"
    assert told in run(folder, b"Hi\n", "--template", str(file))[1]
    assert run(folder, b"Hi\n", "--template", str(file), "--no-thinking")[1] == ""
    for option in ("--thinking", "--no-thinking"):
        _, errors = run(folder, b"Hi\n", option, status=2)
        assert f"{option}: the chat template has no variable enable_thinking" in errors
