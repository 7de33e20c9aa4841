"""llama.cpp's benchmark: its build, random ternary models of our shapes, and what it tells."""

import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

from benchmarks.models import DECODED, PROMPT
from legacy1bit.formats.gguf import export_gguf
from legacy1bit.hyperparams import ModelConfig
from legacy1bit.model import create_legacy_llm
from legacy1bit.threads import available_cores

# Its two ternary types, and the form of packing that each is compared with.
TYPES = {"tq2_0": "2bit", "tq1_0": "trits"}

_CMAKE = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DLLAMA_CURL=OFF",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_SERVER=OFF",
    "-DGGML_OPENMP=ON",
)
# For this CPU, for one with AVX2 and no more, and for one without AVX.
BUILDS = {
    "native": ("-DGGML_NATIVE=ON",),
    "only-avx2": (
        "-DGGML_NATIVE=OFF",
        "-DGGML_SSE42=ON",
        "-DGGML_AVX=ON",
        "-DGGML_AVX2=ON",
        "-DGGML_FMA=ON",
        "-DGGML_F16C=ON",
        "-DGGML_BMI2=ON",
    ),
    "noavx": (
        "-DGGML_NATIVE=OFF",
        "-DGGML_SSE42=ON",
        "-DGGML_AVX=OFF",
        "-DGGML_AVX2=OFF",
        "-DGGML_FMA=OFF",
        "-DGGML_F16C=OFF",
        "-DGGML_BMI2=OFF",
    ),
}


def run(command: list[str], what: str) -> str:
    """Run a program and return its output.

    Raises
    ------
    ValueError
        With its last line, if it fails or is not installed.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise ValueError(f"{what}: {command[0]}: {error.strerror}") from None
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        raise ValueError(f"{what} failed with status {done.returncode}: {last}")
    return done.stdout


def fetch_source(folder: Path) -> Path:
    """Return llama.cpp's source, which the distribution of its Python binding has in it.

    Raises
    ------
    ValueError
        If it cannot be had.
    """
    places = sorted(folder.glob("llama_cpp_python-*/vendor/llama.cpp"))
    if places:
        return places[-1]
    folder.mkdir(parents=True, exist_ok=True)
    run(
        [
            *(sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:"),
            *("--no-build-isolation", "--dest", str(folder), "llama-cpp-python"),
        ],
        "the download of llama-cpp-python (which needs scikit-build-core)",
    )
    for archive in folder.glob("llama_cpp_python-*.tar.gz"):
        with tarfile.open(archive) as file:
            file.extractall(folder, filter="data")
    places = sorted(folder.glob("llama_cpp_python-*/vendor/llama.cpp"))
    if not places:
        raise ValueError(f"there is no llama.cpp in what was downloaded to {folder}")
    return places[-1]


def build(source: Path, folder: Path, name: str) -> Path:
    """Return the path of ``llama-bench``, built unless it is there.

    Parameters
    ----------
    source : Path
    folder : Path
    name : str
        One of ``BUILDS``.

    Raises
    ------
    ValueError
        If it cannot be built.
    """
    place = folder / name
    program = place / "bin" / "llama-bench"
    if program.exists():
        return program
    print(f"building llama-bench in {place}", file=sys.stderr, flush=True)
    generator = ["-GNinja"] if shutil.which("ninja") else []
    run(
        ["cmake", "-S", str(source), "-B", str(place), *generator, *_CMAKE, *BUILDS[name]],
        "cmake",
    )
    jobs = str(available_cores())
    run(["cmake", "--build", str(place), "--target", "llama-bench", "-j", jobs], "the build")
    return program


def write_model(config: ModelConfig, kind: str, file: Path) -> None:
    """Write a random model of our shape.

    Parameters
    ----------
    config : ModelConfig
    kind : str
        One of ``TYPES``.
    file : Path

    Raises
    ------
    ValueError
        If gguf is not installed, or the type does not hold such a model.
    """
    export_gguf(create_legacy_llm(config, 0, trainable=False), file, kind)


def read_rates(told: str) -> dict[str, list[float]]:
    """Return the tokens per second that ``llama-bench -o json`` has printed.

    Returns
    -------
    dict of str to list of float
        Of "prompt" and of "decoding", one for each repetition.
    """
    rates: dict[str, list[float]] = {}
    for test in json.loads(told):
        what = "decoding" if test["n_gen"] else "prompt"
        rates.setdefault(what, []).extend(float(value) for value in test["samples_ts"])
    return rates


def run_bench(
    program: Path,
    model: Path,
    threads: int,
    repeats: int,
    prompt: int = PROMPT,
    decoded: int = DECODED,
) -> dict[str, list[float]]:
    """Run ``llama-bench`` and return what ``read_rates`` does.

    Raises
    ------
    ValueError
        If it fails.
    """
    counts = ["-p", str(prompt), "-n", str(decoded), "-t", str(threads), "-r", str(repeats)]
    return read_rates(run([str(program), "-m", str(model), *counts, "-o", "json"], "llama-bench"))
