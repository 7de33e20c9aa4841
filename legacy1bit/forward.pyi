from typing import Literal

import numpy as np
import numpy.typing as npt

from legacy1bit.hyperparams import ModelConfig
from legacy1bit.model import (
    FeedForward,
    LegacyLLM,
    MultiHeadAttention,
    TernaryMatrix,
    TransformerBlock,
    TransformerBlockContext,
)

_Floats = npt.NDArray[np.float32]
_Ids = npt.NDArray[np.int32]
_Mask = npt.NDArray[np.uint8]
_Matrix = TernaryMatrix | _Floats

class ForwardContext:
    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        time: int,
        keep: Literal["all", "inputs", "none"] = "all",
    ) -> None: ...
    @property
    def config(self) -> ModelConfig: ...
    @property
    def blocks(self) -> list[TransformerBlockContext]: ...
    @property
    def normed(self) -> _Floats: ...
    @property
    def mean(self) -> _Floats: ...
    @property
    def inv_std(self) -> _Floats: ...
    @property
    def logits(self) -> _Floats: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def time(self) -> int: ...
    @property
    def nbytes(self) -> int: ...

def forward_bytes(
    config: ModelConfig,
    batch_size: int,
    time: int,
    keep: Literal["all", "inputs", "none"] = "all",
) -> int: ...
def as_token_rows(tokens: npt.ArrayLike, name: str = "tokens") -> _Ids: ...
def padding_mask(tokens: _Ids, pad_token: int) -> _Mask | None: ...
def document_starts(starts: npt.ArrayLike, batch: int, time: int) -> _Ids: ...
def forward_embedding(embedding: _Matrix, token_id: int) -> _Floats: ...
def forward_embedding_batch(embedding: _Matrix, tokens: npt.ArrayLike) -> _Floats: ...
def forward_multi_head_attention(attention: MultiHeadAttention, x: _Floats) -> _Floats: ...
def forward_multi_head_attention_batch(
    attention: MultiHeadAttention,
    x: _Floats,
    allowed: npt.ArrayLike | None = None,
    context: TransformerBlockContext | None = None,
    starts: npt.ArrayLike | None = None,
) -> _Floats: ...

class FeedForwardWorkspace:
    def __init__(self, ffn: FeedForward, rows: int) -> None: ...

def forward_feed_forward(ffn: FeedForward, x: _Floats) -> _Floats: ...
def forward_feed_forward_batch(
    ffn: FeedForward,
    x: _Floats,
    hidden: _Floats | None = None,
    gate: _Floats | None = None,
) -> _Floats: ...
def forward_transformer_block(block: TransformerBlock, x: _Floats) -> _Floats: ...
def forward_transformer_block_with_context(
    block: TransformerBlock, x: _Floats, context: TransformerBlockContext
) -> _Floats: ...
def forward_transformer_block_batch(
    block: TransformerBlock,
    x: _Floats,
    allowed: npt.ArrayLike | None = None,
    starts: npt.ArrayLike | None = None,
) -> _Floats: ...
def forward_transformer_block_batch_with_context(
    block: TransformerBlock,
    x: _Floats,
    context: TransformerBlockContext | None,
    allowed: npt.ArrayLike | None = None,
    starts: npt.ArrayLike | None = None,
) -> _Floats: ...
def forward_output_layer_batch(output: _Matrix, bias: _Floats, hidden: _Floats) -> _Floats: ...
def forward_llm(model: LegacyLLM, token_id: npt.ArrayLike, threads: int = 1) -> _Floats: ...
def forward_llm_batch(
    model: LegacyLLM,
    tokens: npt.ArrayLike,
    threads: int = 1,
    logits: bool = False,
    starts: npt.ArrayLike | None = None,
    context: ForwardContext | None = None,
) -> _Floats: ...
