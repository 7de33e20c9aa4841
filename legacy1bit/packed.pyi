from typing import NoReturn

import numpy as np
import numpy.typing as npt

from legacy1bit.hyperparams import ModelConfig
from legacy1bit.model import LegacyLLM, RotaryTable, TernaryMatrix
from legacy1bit.schemes import FLOAT as FLOAT
from legacy1bit.schemes import SCHEMES as SCHEMES

_Bytes = npt.NDArray[np.uint8]
_Codes = npt.NDArray[np.int8]
_Floats = npt.NDArray[np.float32]

FORMS: tuple[str, ...]

def packed_size(shape: tuple[int, int], form: str = "2bit") -> int: ...

class PackedMatrix:
    def __init__(
        self,
        values: _Codes | TernaryMatrix,
        scale: float | _Floats | None = None,
        group: int = 0,
        levels: tuple[int, ...] = (-1, 0, 1),
        form: str = "2bit",
        room: _Bytes | None = None,
    ) -> None: ...
    @property
    def tiles(self) -> _Bytes: ...
    @property
    def scales(self) -> _Floats: ...
    @property
    def shape(self) -> tuple[int, int]: ...
    @property
    def levels(self) -> tuple[int, ...]: ...
    @property
    def group(self) -> int: ...
    @property
    def trits(self) -> bool: ...
    @property
    def values(self) -> _Codes: ...
    @property
    def nbytes(self) -> int: ...
    def multiply(self, x: _Floats, bias: _Floats | None = None) -> _Floats: ...

class RoundedRows:
    def __init__(self, rows: int, cols: int) -> None: ...

class PackedModel:
    def __init__(self, model: LegacyLLM, form: str = "2bit") -> None: ...
    @property
    def config(self) -> ModelConfig: ...
    @property
    def parameters(self) -> dict[str, PackedMatrix | _Floats]: ...
    @property
    def rotary(self) -> RotaryTable | None: ...
    @property
    def nbytes(self) -> int: ...
    def __reduce__(self) -> NoReturn: ...
