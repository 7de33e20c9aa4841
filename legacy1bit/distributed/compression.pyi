import numpy as np
import numpy.typing as npt

def coded_bytes(size: int, bits: int) -> int: ...
def encode(
    values: npt.NDArray[np.float32],
    rest: npt.NDArray[np.float32],
    bits: int,
    code: npt.NDArray[np.uint8],
    threads: int = 1,
) -> None: ...
def add_decoded(
    code: npt.NDArray[np.uint8], bits: int, values: npt.NDArray[np.float32], threads: int = 1
) -> None: ...
