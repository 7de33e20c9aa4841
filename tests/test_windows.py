"""What is C on Windows, where its compilers (mingw-w64) and Wine are installed: the vector
vocabulary and the thread pool. Models as C source are tested in formats/test_c_source.py."""

import subprocess

import pytest

from helpers.compilers import BUILDS, EMULATORS, why_not
from helpers.paths import ROOT, TESTS

HEADERS = ROOT / "include"
# gcc believes that stacks on Windows are aligned as its vectors are.
COMMON = ["-std=c99", "-O2", "-ffp-contract=off", "-Wa,-muse-unaligned-vector-move", "-Wall"]
COMMON += ["-Wextra", "-Werror", "-Wno-unused-function", f"-I{HEADERS}", f"-I{TESTS}"]
TIERS = {"sse2": "", "ssse3": "-mssse3", "sse41": "-msse4.1", "avx2": "-mavx2 -mfma"}

pytestmark = pytest.mark.skipif(not HEADERS.exists(), reason="the headers are not here")


@pytest.fixture(params=["Windows", "Windows, 32 bits"])
def run(request, tmp_path, monkeypatch):
    """Compile a C file and run it; its output."""
    if why_not(request.param):
        pytest.skip(why_not(request.param))
    monkeypatch.setenv("WINEDEBUG", "-all")

    def compile_and_run(source, *flags):
        program = tmp_path / "program.exe"
        made = [*BUILDS[request.param], *COMMON, *flags, TESTS / source, "-o", program, "-lm"]
        subprocess.run(made, check=True)
        ran = subprocess.run([*EMULATORS[request.param], program], capture_output=True, text=True)
        assert ran.returncode == 0, ran.stdout
        return ran.stdout

    return compile_and_run


@pytest.mark.parametrize("name", TIERS)
def test_every_word_means_what_simd_h_says_on_windows(name, run):
    flags = ["-msse2", "-mfpmath=sse", *TIERS[name].split()]
    assert run("simd.c", *flags, f"-DLEGACY1BIT_TIER_{name.upper()}") == ""


def test_thread_pool_works_on_windows(run):
    assert run("threads.c").endswith(" 0 wrong\n")
