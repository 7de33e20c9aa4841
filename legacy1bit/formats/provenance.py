"""The provenance of a model, which is stored with its weights in every file."""

import json
import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from legacy1bit.version import __version__


@dataclass(frozen=True)
class Provenance:
    """The origin of a model's weights, and its license.

    Attributes
    ----------
    data : str
        The name of the training text; empty: unknown.
    data_sha256 : str
        The SHA-256 of that text, in hexadecimal digits.
    steps : int
        Updates of the weights.
    validation_loss : float or None
        In nats per token, as last measured.
    license : str
        The license of the model, such as an SPDX identifier; empty: not stated.
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
        """Return the provenance and the generating program as a plain dictionary."""
        return {"generator": f"legacy1bit {__version__}", **asdict(self)}

    def lines(self) -> list[str]:
        """Return the provenance as lines of text."""
        # C files have these lines: other words would change the bytes of earlier exports.
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
        """Read the JSON of ``to_dict``; unknown keys are skipped.

        Raises
        ------
        ValueError
            If the text is not such JSON.
        """
        try:
            values = json.loads(text)
        except RecursionError:
            values = None
        if not isinstance(values, dict):
            raise ValueError("provenance: not a JSON object")
        names = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in names})
