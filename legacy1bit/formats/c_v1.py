"""The C original's ``llm_model.bin``, with a second file for the model's provenance.

``native.py`` reads and writes the file itself.
"""

import hashlib
import json
import os
from pathlib import Path

from legacy1bit.data.tokenizer import Tokenizer, check_bytes
from legacy1bit.formats.provenance import Provenance
from legacy1bit.model import LegacyLLM, ModelFileError, load_model, serialize_c_v1
from legacy1bit.system.files import (
    NAME_CHARACTERS,
    atomic_copy,
    atomic_write_all,
    read_regular,
)

# The longest file name, in bytes.
_LONGEST_NAME = 255


def _beside(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    name = os.fsencode(f"{path.name}.json")
    if len(name) > _LONGEST_NAME:
        short = f"{path.name[:NAME_CHARACTERS]}.{hashlib.sha256(name).hexdigest()[:16]}.json"
        return path.parent / short
    return path.parent / f"{path.name}.json"


def _place_beside(path: str | os.PathLike[str]) -> Path:
    """Return where the provenance of a file goes, unless something else is there."""
    beside = _beside(path)
    if beside.is_file() and not _is_ours(beside):
        raise ValueError(f"{beside} is something else, expected the provenance of an earlier file")
    return beside


def _is_ours(path: Path) -> bool:
    try:
        return "provenance" in json.loads(read_regular(path))
    except (ValueError, TypeError, RecursionError):
        return False


def export_c_v1(
    model: LegacyLLM, path: str | os.PathLike[str], tokenizer: Tokenizer | None = None
) -> None:
    """Write a model in the C original's format, and its provenance as JSON beside it.

    Raises
    ------
    ValueError
        If the C original does not have such models, the model's tokens are not bytes, or another
        file has the name of the JSON.
    OSError
        If a file cannot be written.
    """
    check_bytes(tokenizer)
    beside = _place_beside(path)
    content = {
        "config": model.config.to_dict(),
        "scheme": model.config.scheme,
        "provenance": model.provenance.to_dict(),
    }
    text = json.dumps(content, indent=2) + "\n"
    atomic_write_all({Path(path): serialize_c_v1(model), beside: text})


def import_c_v1(path: str | os.PathLike[str]) -> LegacyLLM:
    """Read a file of the C original, and its provenance if there is one beside it.

    Raises
    ------
    ModelFileError
        If one of them is damaged.
    OSError
        If the file cannot be read.
    """
    model = load_model(path)
    beside = _beside(path)
    if beside.is_file():
        try:
            provenance = json.loads(read_regular(beside))["provenance"]
            model.provenance = Provenance.from_json(json.dumps(provenance))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ModelFileError(f"{beside} is damaged: {error}") from None
    return model


def copy_with_provenance(source: Path, target: Path) -> None:
    """Copy a file, with the provenance beside it if it has one.

    Raises
    ------
    ValueError
        If another file has the name of the copied provenance.
    OSError
        If a file cannot be read or written.
    """
    provenance, beside = _beside(source), _place_beside(target)
    atomic_copy(source, target)
    if provenance.is_file() and _is_ours(provenance):
        atomic_copy(provenance, beside)
    else:
        # Of the file that was replaced.
        beside.unlink(missing_ok=True)
