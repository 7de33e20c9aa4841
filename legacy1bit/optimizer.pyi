from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from legacy1bit.distributed.ranks import ALONE as ALONE
from legacy1bit.distributed.ranks import Ranks
from legacy1bit.layout import Parameter
from legacy1bit.model import LegacyLLM, LegacyLLMGradients
from legacy1bit.schemes import SCHEMES as SCHEMES

def moment_bytes(layout: Sequence[Parameter], bits: int = 32) -> int: ...

class Optimizer:
    steps: int
    weight_decay: float
    def __init__(
        self,
        model: LegacyLLM,
        weight_decay: float,
        sign_direction: str,
        bits: int = 32,
        ranks: Ranks = ...,
    ) -> None: ...
    @property
    def weights(self) -> npt.NDArray[np.float32]: ...
    @property
    def bounds(self) -> npt.NDArray[np.int64]: ...
    @property
    def model(self) -> LegacyLLM: ...
    @property
    def moments(self) -> dict[str, npt.NDArray[Any]]: ...
    def gather_moments(self) -> dict[str, npt.NDArray[Any]] | None: ...
    def load_moments(self, moments: Mapping[str, npt.NDArray[Any]]) -> None: ...
    @property
    def first(self) -> npt.NDArray[Any]: ...
    @property
    def second(self) -> npt.NDArray[Any]: ...
    @property
    def nbytes(self) -> int: ...
    def step(
        self,
        gradients: LegacyLLMGradients,
        learning_rate: float,
        clip: float = 0.0,
        threads: int = 1,
    ) -> float: ...

class AdamW(Optimizer):
    def __init__(
        self,
        model: LegacyLLM,
        beta1: float = 0.9,
        beta2: float = 0.99,
        epsilon: float = 1e-8,
        weight_decay: float = 0.1,
        sign_direction: str = "descend",
        bits: int = 32,
        ranks: Ranks = ...,
    ) -> None: ...

class Muon(AdamW):
    def __init__(
        self,
        model: LegacyLLM,
        beta1: float = 0.9,
        beta2: float = 0.99,
        epsilon: float = 1e-8,
        weight_decay: float = 0.1,
        sign_direction: str = "descend",
        muon_lr_ratio: float = 3.3,
        momentum: float = 0.95,
        bits: int = 32,
        ranks: Ranks = ...,
    ) -> None: ...

class SGD(Optimizer):
    def __init__(
        self,
        model: LegacyLLM,
        momentum: float = 0.9,
        weight_decay: float = 0.1,
        sign_direction: str = "descend",
        bits: int = 32,
        ranks: Ranks = ...,
    ) -> None: ...
