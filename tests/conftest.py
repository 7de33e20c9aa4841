"""Fixtures shared by the tests."""

import contextlib
import functools
import os
import re
import signal
import sys
import threading

import pytest

pytest.register_assert_rewrite("helpers")

try:
    from legacy1bit import math_ops
    from legacy1bit.data import stories
    from legacy1bit.system.old_cpus import runs_here
except ImportError:
    # The oracle's own tests need no package; a test that needs it imports it, and fails.
    math_ops = stories = None
else:
    # Tests that need it are skipped where importing it would end them all.
    if not runs_here("pyarrow"):
        sys.modules["pyarrow"] = None


# The same examples every time; whoever asks for more of them gets others, too.
with contextlib.suppress(ImportError):
    from hypothesis import settings

    settings.register_profile("same", derandomize="EXTREMES" not in os.environ)
    settings.load_profile("same")


# All of this CPU, or those that the Makefile chooses (test-old-cpus).
CHOSEN = os.environ.get("LEGACY1BIT_TEST_TIERS")
TIERS = CHOSEN.split(",") if CHOSEN else math_ops.simd_levels() if math_ops else []


@contextlib.contextmanager
def in_use(level):
    """An instruction set, in use until the end of the block."""
    former = math_ops.simd_level()
    math_ops.set_simd_level(level)
    yield level
    math_ops.set_simd_level(former)


@pytest.fixture(params=TIERS)
def tier(request):
    """The name of an instruction set this CPU has, in use while the test runs."""
    with in_use(request.param) as level:
        yield level


@pytest.fixture(params=[level for level in TIERS if level in ("avx512bf16", "amx")])
def bf16_tier(request):
    """The same of those with products in bfloat16."""
    with in_use(request.param) as level:
        yield level


@pytest.fixture(params=dict.fromkeys([*TIERS[:1], *TIERS[-1:]]))
def outer_tier(request):
    """The same of the first and the last one only."""
    with in_use(request.param) as level:
        yield level


@pytest.fixture(autouse=True, scope="session")
def _cache_of_its_own(tmp_path_factory):
    """Tokens that tests make stay out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True, scope="session")
def _no_waiting_for_the_disk():
    """The files of tests need not outlive a power cut."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.fixture(autouse=True, scope="session")
def _each_story_once():
    """Most trainings of tests learn from the same stories; to write these is half of the work."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("generate_stories", "endings") if stories else ():
            once = functools.lru_cache(4096, typed=True)(getattr(stories, name))
            patch.setattr(stories, name, once)
        yield


@pytest.fixture(autouse=True, scope="session")
def _signals_as_at_a_terminal():
    """Whoever runs the tests in the background may have had some ignored; programs inherit that."""
    usual = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGHUP: signal.SIG_DFL,
        signal.SIGTERM: signal.SIG_DFL,
    }
    for number, handler in usual.items():
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, handler)


@pytest.fixture
def no_threads(monkeypatch):
    """The system gives this process no more threads."""

    def start(_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)


@pytest.fixture
def say(capsysbinary):
    """Run a command that succeeds; return its standard output and standard error."""
    from legacy1bit.main import main

    def run(*arguments, status=0):
        capsysbinary.readouterr()
        assert main(list(map(str, arguments))) == status
        return capsysbinary.readouterr()

    return run


@pytest.fixture
def fail(capsysbinary):
    """Run a command that is refused; return the one line that says why."""
    from legacy1bit.main import main

    def run(*arguments):
        capsysbinary.readouterr()
        with pytest.raises(SystemExit) as stop:
            main(list(map(str, arguments)))
        output, errors = capsysbinary.readouterr()
        assert stop.value.code == 2
        assert output == b""
        lines = errors.decode("utf-8", "surrogateescape").splitlines()
        assert lines[-1].startswith("legacy1bit: error: ")
        assert len(lines[-1]) > len("legacy1bit: error: ") + 10
        # What went well before the error may have been told.
        assert all(
            re.match(r"training [\d,]+ parameters|memory: about|(.*; )?going on with ", line)
            for line in lines[:-1]
        )
        return lines[-1].removeprefix("legacy1bit: error: ")

    return run
