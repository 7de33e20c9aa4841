"""The package on CPUs that this machine is not: under QEMU's user-mode emulation, which stops at
the first instruction that the emulated CPU lacks.

``make test-old-cpus`` runs the tests of native code that way, too, and skips nothing here.
"""

import functools
import importlib.metadata
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from helpers.published import golden, with_golden_models
from legacy1bit import cpu as this_cpu
from legacy1bit.data.tokenizer import ByteTokenizer
from legacy1bit.hyperparams import ModelConfig
from legacy1bit.model import create_legacy_llm, save_model
from legacy1bit.system import old_cpus

QEMU = shutil.which("qemu-x86_64")
CPUS = {"core2duo": "ssse3", "Nehalem": "sse41", "Haswell": "avx2"}

unable = pytest.fail if os.environ.get("LEGACY1BIT_OLD_CPUS") else pytest.skip


@pytest.fixture(scope="module")
def qemu():
    if QEMU is None:
        unable("qemu-x86_64 is not installed")
    if subprocess.run([QEMU, "-version"], capture_output=True).returncode:
        unable("qemu-x86_64 does not run here")
    newest = subprocess.run([QEMU, "-cpu", "max", sys.executable, "-c", ""], capture_output=True)
    if newest.returncode:
        unable("qemu-x86_64 does not run this Python")


@pytest.fixture(
    scope="module",
    params=["core2duo", "Nehalem", pytest.param("Haswell", marks=pytest.mark.slow)],
)
def cpu(request, qemu):
    if not runs_numpy(request.param):
        unable(f"NumPy {np.__version__} itself does not run on a {request.param}")
    return request.param


def emulated(cpu, *arguments):
    command = [QEMU, "-cpu", cpu, sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, timeout=300)


@functools.cache
def runs_numpy(cpu):
    return emulated(cpu, "-c", "import numpy").returncode == 0


# Starting Python takes seconds there.
WRITE = """
import sys
from legacy1bit.main import main
from legacy1bit.math_ops import simd_level
print(simd_level(), flush=True)
sys.exit(main(sys.argv[1:]))
"""


def test_a_model_writes_in_the_widest_instruction_set_that_the_cpu_has(cpu, tmp_path):
    config = ModelConfig(model_dim=96, num_blocks=2, sequence_length=64)
    save_model(create_legacy_llm(config, 1, trainable=False), tmp_path)
    ByteTokenizer().save(tmp_path)
    options = ["--model", tmp_path, "--prompt", "abc", "--max-tokens", 100, "--seed", 3]
    ran = emulated(cpu, "-c", WRITE, "generate", *options)
    assert ran.returncode == 0, ran.stderr.decode()
    level, text = ran.stdout.split(b"\n", 1)
    assert level.decode() == CPUS[cpu]
    assert text.startswith(b"abc")
    assert len(text) >= 103


# Two threads, a prompt of several tokens, greedy sampling; and the hidden states of a text.
WRITE_EACH = """
import sys
from legacy1bit.generator import Generator
from legacy1bit.hyperparams import SamplingConfig
for path in sys.argv[1:]:
    with Generator.load(path, threads=2) as generator:
        text = generator.complete("Before we proceed", 32, SamplingConfig(temperature=0)).text
        print(ascii(text), generator.embed("Before we " + text).tobytes().hex())
"""


@pytest.mark.slow
@with_golden_models
def test_models_of_others_write_the_same_bytes_on_every_cpu(cpu):
    paths = [path for path, _ in golden()]
    ran = emulated(cpu, "-c", WRITE_EACH, *paths)
    assert ran.returncode == 0, ran.stderr.decode()
    here = subprocess.run([sys.executable, "-c", WRITE_EACH, *paths], capture_output=True)
    lines = ran.stdout.splitlines()
    assert len(lines) == len(paths)
    for path, line, expected in zip(paths, lines, here.stdout.splitlines(), strict=True):
        assert line == expected, path.name


@pytest.mark.parametrize(
    ("name", "has_it"), [("Opteron_G1", False), ("core2duo", False), ("Nehalem", True)]
)
def test_has_x86_64_v2_is_true_from_nehalem_on(name, has_it, qemu):
    # Without the package's own __init__, which may refuse NumPy.
    script = f"""
import importlib.machinery, importlib.util
loader = importlib.machinery.ExtensionFileLoader("legacy1bit.cpu", {this_cpu.__file__!r})
cpu = importlib.util.module_from_spec(importlib.util.spec_from_loader("legacy1bit.cpu", loader))
loader.exec_module(cpu)
print(cpu.has_x86_64_v2())
"""
    ran = emulated(name, "-c", script)
    assert ran.stdout.decode().strip() == str(has_it), ran.stderr.decode()


@pytest.mark.parametrize("name", [pytest.param("Opteron_G1", marks=pytest.mark.slow), "core2duo"])
def test_check_numpy_says_what_to_install(name, qemu):
    library = emulated(name, "-c", "import legacy1bit.model")
    program = emulated(name, "-m", "legacy1bit.main", "info", "--help")
    if runs_numpy(name):
        assert (library.returncode, program.returncode) == (0, 0), program.stderr.decode()
        return
    said = last_words(np.__version__)
    assert library.returncode == 1
    assert library.stderr.decode().splitlines()[-1] == f"ImportError: {said}"
    # The emulator tells of the child process that found out.
    errors = [line for line in program.stderr.decode().splitlines() if "qemu:" not in line]
    assert (program.returncode, errors) == (2, [f"legacy1bit: error: {said}"])


def last_words(version):
    return (
        f"NumPy {version} needs instructions that this CPU lacks (x86-64-v2, with SSE4.2): "
        "pip install 'numpy<2.4'"
    )


@pytest.fixture
def old_cpu(monkeypatch):
    monkeypatch.setattr(old_cpus, "has_x86_64_v2", lambda: False)


@pytest.mark.usefixtures("old_cpu")
def test_runs_here_is_false_where_an_import_ends_the_process(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    ends = "import faulthandler, os, signal; faulthandler.disable(); os.kill(os.getpid(), {})"
    (tmp_path / "needs_more.py").write_text(ends.format("signal.SIGILL"))
    (tmp_path / "needs_others.py").write_text("import missing")
    (tmp_path / "needs_nothing.py").write_text("")
    assert not old_cpus.runs_here("needs_more")
    assert old_cpus.runs_here("needs_others")
    assert old_cpus.runs_here("needs_nothing")
    assert old_cpus.runs_here("missing")
    assert not {"needs_more", "needs_nothing"} & sys.modules.keys()


@pytest.mark.usefixtures("old_cpu")
@pytest.mark.parametrize(
    ("version", "runs", "refused"),
    [
        ("1.26.4", False, False),
        ("2.3.5", False, False),
        ("2.4.0rc1", False, True),
        ("2.10.0", False, True),
        ("3.0", False, True),
        ("2.4.0", True, False),
    ],
)
def test_check_numpy_refuses_what_does_not_run(version, runs, refused, monkeypatch, capsys):
    monkeypatch.setattr(importlib.metadata, "version", lambda _: version)
    monkeypatch.setattr(old_cpus, "runs_here", lambda _: runs)
    if not refused:
        old_cpus.check_numpy()
        return
    with pytest.raises(ImportError) as error:
        old_cpus.check_numpy()
    assert str(error.value) == last_words(version)
    for program in ("-m", "/usr/bin/legacy1bit"):
        monkeypatch.setattr(sys, "argv", [program, "info"])
        with pytest.raises(SystemExit) as end:
            old_cpus.check_numpy()
        assert end.value.code == 2
        assert capsys.readouterr().err == f"legacy1bit: error: {last_words(version)}\n"


def test_check_numpy_costs_nothing_on_other_cpus(monkeypatch):
    monkeypatch.setattr(old_cpus, "has_x86_64_v2", lambda: True)
    monkeypatch.setattr(importlib.metadata, "version", lambda _: pytest.fail("was asked"))
    monkeypatch.setattr(os, "fork", lambda: pytest.fail("a process was made"))
    old_cpus.check_numpy()
    assert old_cpus.runs_here("missing")
