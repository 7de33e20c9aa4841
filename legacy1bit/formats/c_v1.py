"""The C original's ``llm_model.bin``, and what it has no room for.

The file itself is ``model.save_model``'s and ``load_model``'s, as in C; where the weights come from
lies in a second file beside it.
"""

import json
import os
from pathlib import Path

from legacy1bit.files import atomic_write
from legacy1bit.model import LegacyLLM, ModelFileError, load_model, save_model
from legacy1bit.provenance import Provenance


def _beside(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    return path.with_name(f"{path.name}.json")


def export_c_v1(model: LegacyLLM, path: str | os.PathLike[str]) -> None:
    """Write a model as the C original keeps it, and its provenance as JSON beside it.

    Raises
    ------
    ValueError
        If the C original has no such models.
    OSError
        If a file cannot be written.
    """
    save_model(model, path, "c-v1")
    content = {
        "config": model.config.to_dict(),
        "scheme": model.config.scheme,
        "provenance": model.provenance.to_dict(),
    }
    atomic_write(_beside(path), json.dumps(content, indent=2) + "\n")


def import_c_v1(path: str | os.PathLike[str]) -> LegacyLLM:
    """Read a file of the C original, and its provenance where that lies beside it.

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
            found = json.loads(beside.read_bytes())["provenance"]
            model.provenance = Provenance.from_json(json.dumps(found))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ModelFileError(f"{beside} is damaged: {error}") from None
    return model
