"""Where a model comes from: what travels with its weights in every file."""

import json
import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from legacy1bit.version import __version__


@dataclass(frozen=True)
class Provenance:
    """What is known of a model besides its settings and weights.

    Attributes
    ----------
    data : str
        The name of what it was trained on; empty: not known.
    data_sha256 : str
        Of that text, in hexadecimal digits.
    steps : int
        Updates of the weights.
    validation_loss : float or None
        In nats a token, as last measured.
    license : str
        What others may do with the model, such as an SPDX identifier; empty: not stated.
    """

    data: str = ""
    data_sha256: str = ""
    steps: int = 0
    validation_loss: float | None = None
    license: str = ""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "validation_loss":
                fits = value is None or (type(value) is float and math.isfinite(value))
            elif field.name == "steps":
                fits = type(value) is int and value >= 0
            else:
                fits = type(value) is str
            if not fits:
                raise ValueError(f"provenance: {field.name} is {value!r}")

    def to_dict(self) -> dict[str, Any]:
        """Return all of it, and which program wrote it, as a plain dictionary."""
        return {"generator": f"legacy1bit {__version__}", **asdict(self)}

    def lines(self) -> list[str]:
        """Return it for people to read, a line each."""
        loss = self.validation_loss
        return [
            f"trained on {self.data or 'unknown data'}"
            + (f" (SHA-256 {self.data_sha256})" if self.data_sha256 else ""),
            f"steps: {self.steps}",
            f"validation loss: {'unknown' if loss is None else f'{loss:.4f} nats a token'}",
            f"licence: {self.license or 'not stated'}",
        ]

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what ``json.dumps`` makes of ``to_dict``; keys that are not known are passed over.

        Raises
        ------
        ValueError
            If it is no such text.
        """
        try:
            found = json.loads(text)
        except RecursionError:
            found = None
        if not isinstance(found, dict):
            raise ValueError("provenance: no JSON object")
        names = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in found.items() if name in names})
