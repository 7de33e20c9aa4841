"""bitnet.cpp: its I2_S kernels, compiled alone from a source tree that is given; its program."""

import shutil
from pathlib import Path

from benchmarks.llama_cpp import run

KERNELS = Path("src/ggml-bitnet-mad.cpp")
# Where its own build, ``setup_env.py`` or CMake in ``build``, leaves it.
PROGRAM = Path("build/bin/llama-bench")
_DRIVER = Path(__file__).with_suffix(".cpp")
# Of llama.cpp, which is not in every copy of the source; the driver declares what is used of them.
_NOT_NEEDED = ("ggml.h", "ggml-backend.h", "ggml-quants.h", "ggml-cpu-impl.h")


def build(source: Path, folder: Path) -> Path:
    """Return the path of a program that times the kernels, compiled for this CPU.

    Parameters
    ----------
    source : Path
        bitnet.cpp's source tree.
    folder : Path
        Where the program goes.

    Raises
    ------
    ValueError
        If the tree is not bitnet.cpp's, or cannot be compiled.
    """
    if not (source / KERNELS).is_file():
        raise ValueError(f"{source}: not the source of bitnet.cpp, {KERNELS} is missing")
    compiler = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
    if compiler is None:
        raise ValueError("bitnet.cpp's kernels need a C++ compiler, which is not installed")
    place = folder / "bitnet"
    place.mkdir(parents=True, exist_ok=True)
    for name in _NOT_NEEDED:
        (place / name).touch()
    program = place.resolve() / "bitnet_cpp"
    includes = [f"-I{source / KERNELS.parent}", f"-I{source / 'include'}", f"-I{place}"]
    command = [compiler, "-std=c++17", "-O3", "-march=native", "-DNDEBUG", "-w", *includes]
    run([*command, str(_DRIVER), "-o", str(program)], "the build of bitnet.cpp's kernels")
    return program


def run_kernels(program: Path, size: int, rows: int, least: float) -> float:
    """Return the GMAC/s of a square ternary matrix times rows of int8 activations, on one thread.

    Rounding activations to int8 is not part of it; of our product it is.

    Raises
    ------
    ValueError
        If the program fails, or its sums are wrong.
    """
    return float(run([str(program), str(size), str(rows), str(least)], "bitnet.cpp"))


def find_bench(source: Path) -> Path:
    """Return the path of bitnet.cpp's ``llama-bench``, which runs whole models.

    Raises
    ------
    ValueError
        If it is not built.
    """
    program = (source / PROGRAM).resolve()
    if not program.is_file():
        raise ValueError(f"{program} is missing: build bitnet.cpp there, as its README says")
    return program
