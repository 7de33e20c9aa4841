from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from legacy1bit.model import LegacyLLM
from legacy1bit.packed import PackedModel

def sample_token(
    logits: npt.NDArray[np.float32],
    rng: np.random.Generator,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> int: ...
def check_sampling(temperature: float, top_k: int, top_p: float) -> None: ...

class Decoder:
    def __init__(
        self, model: PackedModel, threads: int = 1, capacity: int | None = None
    ) -> None: ...
    @property
    def model(self) -> PackedModel: ...
    @property
    def capacity(self) -> int: ...
    @property
    def length(self) -> int: ...
    @property
    def threads(self) -> int: ...
    def clear(self) -> None: ...
    def extend(self, tokens: npt.ArrayLike) -> npt.NDArray[np.float32]: ...
    def write(
        self,
        tokens: npt.ArrayLike,
        uniforms: npt.ArrayLike,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
    ) -> npt.NDArray[np.int32]: ...

def generate(
    model: PackedModel | LegacyLLM,
    prompt: npt.ArrayLike,
    max_tokens: int,
    seed: int = 0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    threads: int = 1,
) -> Iterator[int]: ...
