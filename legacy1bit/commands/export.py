"""``export``: a model as a file for other programs."""

import argparse
import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from legacy1bit.commands.options import add_model, latest_run, path_of, read_model
from legacy1bit.data.tokenizer import Tokenizer
from legacy1bit.formats.adapters import (
    combine,
    each_adapter,
    merged_model,
    resolve,
    write_gguf,
    write_peft,
)
from legacy1bit.formats.published import read_model as read_settings
from legacy1bit.formats.published import read_tokenizer
from legacy1bit.model import LegacyLLM
from legacy1bit.training.run import Run

# Adapters alone, for the model that they are on.
ADAPTER_FORMATS = ("peft", "gguf-adapter")

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
        "loads. c-v1: the file of the C original, with the provenance as .json beside it. An "
        "--adapter is added to the weights, which become floats; peft and gguf-adapter write the "
        "adapters alone, as a folder for Hugging Face's PEFT or a file for llama.cpp."
    )
    add_model(command)
    command.add_argument(
        "--out",
        type=path_of,
        required=True,
        metavar="FILE",
        help="the file to write; a folder for safetensors",
    )
    command.add_argument(
        "--format",
        choices=(*FORMATS, *ADAPTER_FORMATS),
        required=True,
        help="format of the file",
    )
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


def export_model(
    path: Path,
    out: Path,
    kind: str,
    types: tuple[str | None, str | None] = (None, None),
    license: str | None = None,
    adapters: Sequence[str] = (),
) -> str:
    """Write a model as a file for other programs, and return how that is used.

    Parameters
    ----------
    path : Path
        Of a model of any known format.
    out : Path
    kind : str
        One of ``FORMATS`` or ``ADAPTER_FORMATS``.
    types : (str or None, str or None)
        Of the matrices, and of embedding and output matrix, in GGUF; None: the default.
    license : str, optional
    adapters : sequence of str
        On the model, ``PATH[:SCALE]`` each.

    Raises
    ------
    ValueError, OSError
        If the model cannot be read, or has no such form.
    """
    _check_output(out, path)
    path, named = resolve(path, adapters)
    if kind in ADAPTER_FORMATS:
        return _export_adapters(path, named, out, kind)
    model = read_model(path)
    if named:
        model = merged_model(model, each_adapter(named, model.config))
    known = read_tokenizer(path, model.config.vocab_size)
    tokenizer = None if known.kind == "unknown" else known
    if license is not None:
        model.provenance = replace(model.provenance, license=license)
    return FORMATS[kind](model, out, _Types(*types), tokenizer)


def _export_adapters(path: Path, named: Sequence[tuple[Path, float]], out: Path, kind: str) -> str:
    """Write the sum of adapters, and return how it is used."""
    if not named:
        raise ValueError(f"--format {kind} needs an --adapter")
    config, *_ = read_settings(path)
    adapters = each_adapter(named, config)
    # A single one keeps its alpha.
    single = len(adapters) == 1 and adapters[0][1] == 1.0
    adapter = replace(
        adapters[0][0] if single else combine(adapters), base_model=str(path.absolute())
    )
    if kind == "peft":
        write_peft(adapter, config, out)
        return f"load it: peft.PeftModel.from_pretrained(model, {str(out)!r})"
    write_gguf(adapter, config, out)
    return f"use it with llama.cpp: llama-completion -m MODEL --lora {_quote(out)} -p TEXT"


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
    hint = export_model(
        path, arguments.out, arguments.format, types, arguments.license, arguments.adapter
    )
    files = [arguments.out] if arguments.out.is_file() else sorted(arguments.out.iterdir())
    size = sum(file.stat().st_size for file in files)
    print(f"{arguments.out}: {size:,} bytes; {hint}")
    return 0
