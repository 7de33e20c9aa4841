"""``import``: a model from a file of another program."""

import argparse
from pathlib import Path

from legacy1bit.data_utils import ByteTokenizer
from legacy1bit.model import LegacyLLM, save_model

_GGUF_MAGIC = b"GGUF"
_MOST_BYTES = 256


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Tell the parser what the command takes."""
    command.description = (
        "Read a model from a GGUF file that this program wrote, or from a file of the C original, "
        "and write a model folder."
    )
    command.add_argument("--model", type=Path, required=True, metavar="FILE", help="what to read")
    command.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="the model's folder, a new one"
    )


def run(arguments: argparse.Namespace) -> int:
    """Read the file and write the folder."""
    folder = arguments.out
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"{folder} is no empty folder: name another")
    model = _read(arguments.model)
    save_model(model, folder)
    if model.config.vocab_size <= _MOST_BYTES:
        ByteTokenizer(model.config.vocab_size).save(folder)
    print(
        f"{folder}: {model.num_parameters:,} parameters, {model.stored_bytes():,} bytes of weights"
    )
    return 0


def _read(path: Path) -> LegacyLLM:
    with open(path, "rb") as file:
        magic = file.read(len(_GGUF_MAGIC))
    if magic == _GGUF_MAGIC:
        from legacy1bit.formats.gguf import import_gguf

        return import_gguf(path)
    from legacy1bit.formats.c_v1 import import_c_v1

    return import_c_v1(path)
