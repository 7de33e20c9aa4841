"""llama.cpp's benchmark: its build, random ternary models of our shapes, and what it tells."""

import importlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np

from legacy1bit.bench.models import DECODED, PROMPT
from legacy1bit.hyperparams import ModelConfig
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
# For this CPU, and for one without AVX.
BUILDS = {
    "native": ("-DGGML_NATIVE=ON",),
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


def _run(command: list[str], what: str) -> str:
    """Run a program and return what it printed.

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
    _run(
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
    _run(
        ["cmake", "-S", str(source), "-B", str(place), *generator, *_CMAKE, *BUILDS[name]],
        "cmake",
    )
    jobs = str(available_cores())
    _run(["cmake", "--build", str(place), "--target", "llama-bench", "-j", jobs], "the build")
    return program


def load_gguf() -> Any:
    """Return the package that writes llama.cpp's files.

    Raises
    ------
    ValueError
        If it is not installed.
    """
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise ValueError(
            f"llama.cpp's files need gguf, which is not installed: pip install gguf ({error})"
        ) from None


def write_model(config: ModelConfig, kind: str, file: Path) -> None:
    """Write a random ternary model of our shape, of the architecture that is nearest: nemotron.

    It has layer norms and biases, rotary positions and the squared ReLU, as ours.

    Parameters
    ----------
    config : ModelConfig
        ``model_dim`` is a multiple of 256.
    kind : str
        One of ``TYPES``.
    file : Path

    Raises
    ------
    ValueError
        If gguf is not installed, or the width is no multiple of 256.
    """
    gguf = load_gguf()
    dim, wide, vocab = config.model_dim, config.ffn_dim, config.vocab_size
    if dim % 256:
        raise ValueError(f"model_dim is {dim}, expected a multiple of 256")
    quantize = importlib.import_module("gguf.quants").quantize
    tensor_type = getattr(gguf.GGMLQuantizationType, kind.upper())
    rng = np.random.default_rng(0)
    partial = file.with_suffix(".part")
    writer = gguf.GGUFWriter(partial, "nemotron")
    writer.add_context_length(1024)
    writer.add_embedding_length(dim)
    writer.add_block_count(config.num_blocks)
    writer.add_feed_forward_length(wide)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_heads)
    writer.add_layer_norm_eps(1e-5)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_base)
    writer.add_vocab_size(vocab)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([f"<{token}>".encode() for token in range(vocab - 2)] + [b"a", b"b"])
    writer.add_token_types([1] * vocab)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)

    def norm(name: str) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(dim, np.float32))
        writer.add_tensor(f"{name}.bias", np.zeros(dim, np.float32))

    def matrix(name: str, rows: int, cols: int) -> None:
        values = rng.integers(-1, 2, (rows, cols)).astype(np.float32) * np.float32(0.02)
        writer.add_tensor(f"{name}.weight", quantize(values, tensor_type), raw_dtype=tensor_type)
        writer.add_tensor(f"{name}.bias", np.zeros(rows, np.float32))

    writer.add_tensor("token_embd.weight", rng.standard_normal((vocab, dim), np.float32))
    norm("output_norm")
    output = rng.standard_normal((vocab, dim), np.float32) * np.float32(0.02)
    writer.add_tensor("output.weight", output)
    for i in range(config.num_blocks):
        norm(f"blk.{i}.attn_norm")
        norm(f"blk.{i}.ffn_norm")
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            matrix(f"blk.{i}.{name}", dim, dim)
        matrix(f"blk.{i}.ffn_up", wide, dim)
        matrix(f"blk.{i}.ffn_down", dim, wide)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(partial, file)


def read_rates(told: str) -> dict[str, list[float]]:
    """Return the tokens a second that ``llama-bench -o json`` has printed.

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
    return read_rates(_run([str(program), "-m", str(model), *counts, "-o", "json"], "llama-bench"))
