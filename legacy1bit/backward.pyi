from collections.abc import Collection, Mapping

import numpy as np
import numpy.typing as npt

from legacy1bit.hyperparams import ModelConfig
from legacy1bit.model import (
    FeedForward,
    LegacyLLM,
    LegacyLLMGradients,
    MultiHeadAttention,
    TernaryMatrix,
    TransformerBlock,
    TransformerBlockContext,
)

_Floats = npt.NDArray[np.float32]
_Gradients = Mapping[str, _Floats]
_Ids = npt.NDArray[np.int32]
_Matrix = TernaryMatrix | _Floats

class BackwardContext:
    def __init__(
        self, axes: Mapping[str, int], options: Collection[str], batch_size: int, time: int
    ) -> None: ...
    @property
    def nbytes(self) -> int: ...

def backward_bytes(config: ModelConfig, batch_size: int, time: int) -> int: ...
def cross_entropy_loss(probabilities: _Floats, target: int) -> float: ...
def d_loss_d_logits(probabilities: _Floats, target: int) -> _Floats: ...
def backward_output_layer(
    output: _Matrix, d_logits: _Floats, hidden: _Floats, gradients: _Gradients
) -> _Floats: ...
def backward_output_layer_batch(
    output: _Matrix, d_logits: _Floats, hidden: _Floats, gradients: _Gradients
) -> _Floats: ...
def backward_feed_forward(
    ffn: FeedForward,
    d_output: _Floats,
    x: _Floats,
    hidden: _Floats,
    gradients: _Gradients,
    gate: _Floats | None = None,
) -> _Floats: ...
def backward_feed_forward_batch(
    ffn: FeedForward,
    d_output: _Floats,
    x: _Floats,
    hidden: _Floats,
    gradients: _Gradients,
    gate: _Floats | None = None,
) -> _Floats: ...
def backward_layer_norm(
    d_output: _Floats,
    x: _Floats,
    gamma: _Floats,
    mean: float,
    inv_std: float,
    d_gamma: _Floats,
    d_beta: _Floats,
) -> _Floats: ...
def backward_layer_norm_batch(
    d_output: _Floats,
    x: _Floats,
    gamma: _Floats,
    mean: _Floats,
    inv_std: _Floats,
    d_gamma: _Floats,
    d_beta: _Floats,
) -> _Floats: ...
def backward_multi_head_attention(
    attention: MultiHeadAttention,
    d_output: _Floats,
    x: _Floats,
    context: TransformerBlockContext,
    gradients: _Gradients,
) -> _Floats: ...
def backward_multi_head_attention_batch(
    attention: MultiHeadAttention,
    d_output: _Floats,
    x: _Floats,
    context: TransformerBlockContext,
    gradients: _Gradients,
) -> _Floats: ...
def backward_transformer_block(
    block: TransformerBlock,
    d_output: _Floats,
    context: TransformerBlockContext,
    gradients: _Gradients,
) -> _Floats: ...
def backward_transformer_block_batch(
    block: TransformerBlock,
    d_output: _Floats,
    context: TransformerBlockContext,
    gradients: _Gradients,
) -> _Floats: ...
def backward_embedding(token_id: int, d_output: _Floats, d_embedding: _Floats) -> None: ...
def backward_embedding_batch(
    tokens: npt.ArrayLike, d_output: _Floats, d_embedding: _Floats
) -> None: ...
def ignore_padding(tokens: _Ids, targets: _Ids, pad_token: int) -> _Ids: ...

class BackwardPass:
    def __init__(
        self,
        model: LegacyLLM,
        batch_size: int,
        time: int,
        threads: int = 1,
        recompute: bool = False,
    ) -> None: ...
    @property
    def model(self) -> LegacyLLM: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def time(self) -> int: ...
    @property
    def threads(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    def run(
        self,
        tokens: npt.ArrayLike,
        targets: npt.ArrayLike,
        gradients: LegacyLLMGradients,
        total: int | None = None,
        starts: npt.ArrayLike | None = None,
        teacher: npt.NDArray[np.float32] | None = None,
        distillation_weight: float = 0.5,
        teacher_temperature: float = 1.0,
        dropout: float = 0.0,
        seed: int = 0,
        first_row: int = 0,
    ) -> tuple[float, int]: ...

def backward_llm(
    model: LegacyLLM, token_id: int, target: int, gradients: LegacyLLMGradients
) -> float: ...
def backward_llm_batch(
    model: LegacyLLM,
    tokens: npt.ArrayLike,
    targets: npt.ArrayLike,
    gradients: LegacyLLMGradients,
    threads: int = 1,
    starts: npt.ArrayLike | None = None,
) -> float: ...
