import numpy as np
import numpy.typing as npt

from legacy1bit.model import LegacyLLM, LegacyLLMGradients

class AdamW:
    steps: int
    def __init__(
        self,
        model: LegacyLLM,
        beta1: float = 0.9,
        beta2: float = 0.99,
        epsilon: float = 1e-8,
        weight_decay: float = 0.1,
    ) -> None: ...
    @property
    def model(self) -> LegacyLLM: ...
    @property
    def first(self) -> npt.NDArray[np.float32]: ...
    @property
    def second(self) -> npt.NDArray[np.float32]: ...
    @property
    def beta1(self) -> float: ...
    @property
    def beta2(self) -> float: ...
    @property
    def epsilon(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...
    def step(
        self,
        gradients: LegacyLLMGradients,
        learning_rate: float,
        clip: float = 0.0,
        threads: int = 1,
    ) -> float: ...

class Muon(AdamW):
    def __init__(
        self,
        model: LegacyLLM,
        beta1: float = 0.9,
        beta2: float = 0.99,
        epsilon: float = 1e-8,
        weight_decay: float = 0.1,
        matrix_ratio: float = 7.0,
        momentum: float = 0.95,
    ) -> None: ...
    @property
    def matrix_ratio(self) -> float: ...
    @property
    def momentum(self) -> float: ...
