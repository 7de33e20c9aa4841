"""The vector vocabulary in C alone: ``simd.c``, compiled for each instruction set of this CPU."""

import importlib.util
import shutil
import subprocess
import sys

import pytest

from helpers.paths import ROOT, TESTS
from legacy1bit import math_ops

HEADERS = ROOT / "include"
AVX512 = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma"
FLAGS = {
    "scalar": "",
    "sse": "-msse",
    "sse2": "-msse2",
    "ssse3": "-mssse3",
    "sse41": "-msse4.1",
    "avx2": "-mavx2 -mfma",
    "avxvnni": "-mavx2 -mfma -mavxvnni",
    "avx512": AVX512,
    "avx512vnni": f"{AVX512} -mavx512vnni",
    "avx512bf16": f"{AVX512} -mavx512vnni -mavx512bf16",
    # With the matrix unit's tiles in C.
    "amx": f"{AVX512} -mavx512vnni -mavx512bf16 -mamx-tile -mamx-bf16 -mamx-int8 -DEMULATED_TILES",
}
# Those of other CPUs, where their compiler and their emulator are here.
ARM_FLAGS = {
    "neon": "",
    "neondot": "-march=armv8.2-a+dotprod",
    "i8mm": "-march=armv8.2-a+dotprod+i8mm",
}
COMMON = "-std=c99 -D_GNU_SOURCE -O1 -ffp-contract=off -w"
COMMON += " -fsanitize=undefined -fsanitize-undefined-trap-on-error"


def runs_here(name):
    levels = math_ops.simd_levels()
    if name != "amx":
        return name in levels
    # The compiler's flags may be too new for it.
    built = importlib.util.find_spec("legacy1bit._kernels_amx") is not None
    return built and "avx512bf16" in levels


needs_headers = pytest.mark.skipif(not HEADERS.exists(), reason="the headers are not here")


def run_words(compiler, name, flags, folder, emulator=()):
    command = [*compiler, *COMMON.split(), *flags.split(), f"-DLEGACY1BIT_TIER_{name.upper()}"]
    command += [f"-I{HEADERS}", f"-I{TESTS}", TESTS / "simd.c", "-o", "simd", "-lm", "-lpthread"]
    subprocess.run(command, cwd=folder, check=True)
    ran = subprocess.run([*emulator, folder / "simd"], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (0, "")


@needs_headers
@pytest.mark.skipif(sys.platform == "win32", reason="memory is protected in another way")
@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
@pytest.mark.parametrize("name", list(filter(runs_here, {**FLAGS, **ARM_FLAGS})))
def test_every_word_means_what_simd_h_says(name, tmp_path):
    run_words(["cc"], name, {**FLAGS, **ARM_FLAGS}[name], tmp_path)


@needs_headers
@pytest.mark.parametrize("name", ARM_FLAGS)
def test_every_word_means_the_same_on_arm(name, tmp_path):
    compiler, emulator = "aarch64-linux-gnu-gcc", "qemu-aarch64"
    if not shutil.which(compiler) or not shutil.which(emulator):
        pytest.skip(f"{compiler} or {emulator} is not installed")
    run_words([compiler, "-static"], name, ARM_FLAGS[name], tmp_path, [emulator, "-cpu", "max"])
