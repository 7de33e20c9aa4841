from collections.abc import Sequence
from typing import Self

import numpy as np
import numpy.typing as npt

from legacy1bit.hyperparams import SamplingConfig
from legacy1bit.packed import PackedModel

ACTIVATIONS: tuple[str, ...]

def sample_token(
    logits: npt.NDArray[np.float32],
    rng: np.random.Generator,
    sampling: SamplingConfig = ...,
    history: Sequence[int] = (),
) -> int: ...
def check_tokens(tokens: npt.ArrayLike, vocab: int, name: str) -> npt.NDArray[np.int32]: ...

class Decoder:
    def __init__(
        self,
        model: PackedModel,
        threads: int = 1,
        capacity: int | None = None,
        sequences: int = 1,
        activations: str = "int8",
    ) -> None: ...
    @property
    def model(self) -> PackedModel: ...
    @property
    def capacity(self) -> int: ...
    @property
    def sequences(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def length(self) -> int: ...
    @property
    def threads(self) -> int: ...
    def close(self) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, *error: object) -> None: ...
    def length_of(self, sequence: int) -> int: ...
    def clear(self) -> None: ...
    def truncate(self, length: int, sequence: int = 0) -> None: ...
    def prefill(self, tokens: npt.ArrayLike, sequence: int = 0) -> npt.NDArray[np.float32]: ...
    def prefill_logits(
        self, tokens: npt.ArrayLike, sequence: int = 0
    ) -> npt.NDArray[np.float32]: ...
    def prefill_states(
        self, tokens: npt.ArrayLike, sequence: int = 0
    ) -> npt.NDArray[np.float32]: ...
    def generate(
        self,
        tokens: npt.ArrayLike,
        uniforms: npt.ArrayLike,
        sampling: SamplingConfig = ...,
        sequence: int = 0,
    ) -> npt.NDArray[np.int32]: ...
    def generate_batch(
        self,
        tokens: npt.ArrayLike,
        uniforms: npt.ArrayLike,
        sampling: SamplingConfig = ...,
        sequences: Sequence[int] | None = None,
    ) -> npt.NDArray[np.int32]: ...
