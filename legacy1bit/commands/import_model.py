"""``import``: a model from files of another program."""

import argparse
from pathlib import Path

from legacy1bit.commands.options import new_folder, path_of
from legacy1bit.data.tokenizer import Tokenizer, fit_tokenizer
from legacy1bit.data.tokenizer_files import load_tokenizer
from legacy1bit.model import LegacyLLM, save_model
from legacy1bit.system.files import open_regular

_GGUF_MAGIC = b"GGUF"


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    command.description = (
        "Read a model from a GGUF file or a folder for transformers that export wrote, or from a "
        "file of the C original, and write a model folder."
    )
    command.add_argument(
        "--model", type=path_of, required=True, metavar="FILE", help="the file or folder to read"
    )
    command.add_argument(
        "--out", type=new_folder, required=True, metavar="DIR", help="the model's folder, a new one"
    )


def run(arguments: argparse.Namespace) -> int:
    """Read the model and write the folder."""
    folder = arguments.out
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"{folder} is not an empty folder: name another")
    model, tokenizer = _read(arguments.model)
    save_model(model, folder)
    # A C file with more than 256 tokens does not have their texts.
    if tokenizer.vocab_size == model.config.vocab_size:
        tokenizer.save(folder)
    print(
        f"{folder}: {model.num_parameters:,} parameters, {model.stored_bytes():,} bytes of weights"
    )
    return 0


def _read(path: Path) -> tuple[LegacyLLM, Tokenizer]:
    if path.is_dir():
        from legacy1bit.formats.hugging_face import import_hugging_face

        model = import_hugging_face(path)
        return model, load_tokenizer(path, model.config.vocab_size)
    with open_regular(path) as file:
        magic = file.read(len(_GGUF_MAGIC))
    if magic == _GGUF_MAGIC:
        from legacy1bit.formats.gguf import import_gguf, import_gguf_tokenizer

        return import_gguf(path), import_gguf_tokenizer(path)
    from legacy1bit.formats.c_v1 import import_c_v1

    model = import_c_v1(path)
    return model, fit_tokenizer(None, model.config.vocab_size)
