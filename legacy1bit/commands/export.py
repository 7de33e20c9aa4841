"""``export``: a model as a file for other programs."""

import argparse
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from legacy1bit.commands.options import add_model, latest_run, path_of, read_model
from legacy1bit.data.tokenizer import Tokenizer
from legacy1bit.formats.published import read_tokenizer
from legacy1bit.model import LegacyLLM
from legacy1bit.training.run import Run

_TYPES = ("tq2_0", "tq1_0", "q2_0", "f16", "f32")
_EMBEDDING_TYPES = ("f32", "f16", "q8_0", "tq2_0", "tq1_0", "q2_0")


class _Types(NamedTuple):
    """The types that a GGUF file may be told to have; None: the default."""

    matrices: str | None
    embeddings: str | None


def _quote(path: Path) -> str:
    # A name that begins with a dash would be taken for an option.
    return shlex.quote(f"./{path}" if str(path).startswith("-") else str(path))


def _export_gguf(model: LegacyLLM, path: Path, types: _Types, tokenizer: Tokenizer | None) -> str:
    from legacy1bit.formats.gguf import export_gguf

    export_gguf(model, path, types.matrices, tokenizer, types.embeddings)
    return f"run it with llama.cpp: llama-completion -m {_quote(path)} -p TEXT"


def _export_c(model: LegacyLLM, path: Path, types: _Types, tokenizer: Tokenizer | None) -> str:
    from legacy1bit.formats.c_source import export_c

    export_c(model, path, tokenizer)
    if path.suffix == ".c":
        program, source = path.with_suffix(""), _quote(path)
    else:
        program, source = path.with_name(f"{path.name}.out"), f"-x c {_quote(path)}"
    return f"compile it: cc -std=c99 -O2 -o {_quote(program)} {source} -lm"


def _export_hugging_face(
    model: LegacyLLM, path: Path, types: _Types, tokenizer: Tokenizer | None
) -> str:
    from legacy1bit.formats.hugging_face import export_hugging_face

    export_hugging_face(model, path, tokenizer)
    return f"load it: transformers.AutoModelForCausalLM.from_pretrained({str(path)!r})"


def _export_c_v1(model: LegacyLLM, path: Path, types: _Types, tokenizer: Tokenizer | None) -> str:
    from legacy1bit.formats.c_v1 import export_c_v1

    export_c_v1(model, path, tokenizer)
    return "it is a file of the C program Legacy-1bit LLM"


FORMATS: dict[str, Callable[[LegacyLLM, Path, _Types, Tokenizer | None], str]] = {
    "gguf": _export_gguf,
    "c": _export_c,
    "safetensors": _export_hugging_face,
    "c-v1": _export_c_v1,
}


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    command.description = (
        "Write a model as a file for other programs. gguf: for llama.cpp, with its tokenizer. "
        "c: one C99 file, weights inside. safetensors: a folder that Hugging Face's transformers "
        "loads. c-v1: the file of the C original, with the provenance as .json beside it."
    )
    add_model(command)
    command.add_argument(
        "--out",
        type=path_of,
        required=True,
        metavar="FILE",
        help="the file to write; a folder for safetensors",
    )
    command.add_argument("--format", choices=FORMATS, required=True, help="format of the file")
    command.add_argument(
        "--type",
        choices=_TYPES,
        help="of the matrices in gguf (default: tq2_0, f16 or f32, the first that holds the model "
        "exactly)",
    )
    command.add_argument(
        "--embedding-type",
        choices=_EMBEDDING_TYPES,
        help="of embedding and output matrix in gguf: f16 and q8_0 round them (default: f32; of "
        "ternary ones that of --type)",
    )
    command.add_argument("--license", metavar="TEXT", help="license of the model, stored with it")


def _check_output(out: Path, model: Path) -> None:
    """Raise ``ValueError`` for a file that is a part of the model, or of its run."""
    parts = [model] if model.is_file() else Run(model).files()
    if out.exists() and any(part.exists() and out.samefile(part) for part in parts):
        raise ValueError(f"{out} is a part of the model that is to be exported: name another file")


def run(arguments: argparse.Namespace) -> int:
    """Write the file, and print how to use it."""
    types = _Types(arguments.type, arguments.embedding_type)
    for option, given in zip(("--type", "--embedding-type"), types, strict=True):
        if given is not None and arguments.format != "gguf":
            raise ValueError(f"{option} is for --format gguf, not {arguments.format}")
    path = arguments.model or latest_run()
    _check_output(arguments.out, path)
    model = read_model(path)
    known = read_tokenizer(path, model.config.vocab_size)
    tokenizer = None if known.kind == "unknown" else known
    if arguments.license is not None:
        model.provenance = replace(model.provenance, license=arguments.license)
    hint = FORMATS[arguments.format](model, arguments.out, types, tokenizer)
    files = [arguments.out] if arguments.out.is_file() else sorted(arguments.out.iterdir())
    size = sum(file.stat().st_size for file in files)
    print(f"{arguments.out}: {size:,} bytes; {hint}")
    return 0
