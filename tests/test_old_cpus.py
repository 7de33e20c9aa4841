"""The package on CPUs that this machine is not: under QEMU's user-mode emulation, which stops at
the first instruction that the emulated CPU lacks.

``make test-old-cpus`` runs the whole suite that way.
"""

import shutil
import subprocess
import sys

import numpy as np
import pytest

from legacy1bit.hyperparams import ModelConfig
from legacy1bit.model import create_legacy_llm, save_model
from legacy1bit.tokenizer import ByteTokenizer

QEMU = shutil.which("qemu-x86_64")
CPUS = {"core2duo": "ssse3", "Nehalem": "sse41", "Haswell": "avx2"}


@pytest.fixture(
    scope="module",
    params=["core2duo", "Nehalem", pytest.param("Haswell", marks=pytest.mark.slow)],
)
def cpu(request):
    if QEMU is None:
        pytest.skip("qemu-x86_64 is not installed")
    if subprocess.run([QEMU, "-version"], capture_output=True).returncode:
        pytest.skip("qemu-x86_64 does not run here")
    newest = subprocess.run([QEMU, "-cpu", "max", sys.executable, "-c", ""], capture_output=True)
    if newest.returncode:
        pytest.skip("qemu-x86_64 does not run this Python")
    if emulated(request.param, "-c", "import numpy").returncode:
        pytest.skip(f"NumPy {np.__version__} itself does not run on a {request.param}")
    return request.param


def emulated(cpu, *arguments):
    command = [QEMU, "-cpu", cpu, sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, timeout=300)


def test_the_instruction_set_is_the_widest_that_the_cpu_has(cpu):
    script = "from legacy1bit.math_ops import simd_level; print(simd_level())"
    ran = emulated(cpu, "-c", script)
    assert (ran.returncode, ran.stdout.decode().strip()) == (0, CPUS[cpu]), ran.stderr.decode()


def test_a_model_writes(cpu, tmp_path):
    config = ModelConfig(model_dim=96, num_blocks=2, sequence_length=64)
    save_model(create_legacy_llm(config, 1, trainable=False), tmp_path)
    ByteTokenizer().save(tmp_path)
    options = ["--model", tmp_path, "--prompt", "abc", "--max-tokens", 100, "--seed", 3]
    ran = emulated(cpu, "-m", "legacy1bit.main", "generate", *options)
    assert ran.returncode == 0, ran.stderr.decode()
    assert ran.stdout.startswith(b"abc")
    assert len(ran.stdout) >= 103
