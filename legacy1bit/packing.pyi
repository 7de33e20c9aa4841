import numpy as np
import numpy.typing as npt

_Bytes = npt.NDArray[np.uint8]
_Floats = npt.NDArray[np.float32]

LAYOUTS: dict[str, int]

class _Target:
    @property
    def array(self) -> npt.NDArray[np.int8] | _Bytes: ...
    @property
    def levels(self) -> tuple[int, ...]: ...
    @property
    def threads(self) -> int: ...
    def write(
        self, layout: str, data: _Bytes, rows: int, places: npt.NDArray[np.intp], first: int = 0
    ) -> None: ...

class Tiles(_Target):
    def __init__(
        self,
        array: _Bytes,
        shape: tuple[int, int],
        levels: tuple[int, ...],
        trits: bool = False,
        threads: int = 1,
    ) -> None: ...

class Values(_Target):
    def __init__(
        self, array: npt.NDArray[np.int8], levels: tuple[int, ...], threads: int = 1
    ) -> None: ...

def stored_size(layout: str, rows: int, cols: int) -> int: ...
def block_scales(layout: str, data: _Bytes) -> _Floats: ...
def merge_scales(scales: _Floats, each: int) -> _Floats | None: ...
def read_floats(kind: str, data: _Bytes) -> _Floats: ...
