"""The model that training is measured on, once more in PyTorch.

The same sizes and the same layers (layer norms before attention and feed-forward, rotary positions,
squared ReLU, biases everywhere), in float32, eagerly or under ``torch.compile``, trained by AdamW
with the gradient's norm limited. It has no ternary weights.
"""

import importlib
from typing import Any

from benchmarks.measure import Call
from legacy1bit.hyperparams import ModelConfig


def load_torch() -> Any:
    """Return PyTorch.

    Raises
    ------
    ValueError
        If it is not installed.
    """
    try:
        return importlib.import_module("torch")
    except ImportError as error:
        raise ValueError(
            f"the twin needs PyTorch, which is not installed: pip install torch ({error})"
        ) from None


def create_twin(torch: Any, config: ModelConfig) -> Any:
    """Return the model, from token rows to logits.

    Parameters
    ----------
    torch : module
    config : ModelConfig
        Its sizes count; the arithmetic is that of its defaults.
    """
    nn, functional = torch.nn, torch.nn.functional
    module: Any = nn.Module
    dim, heads, length = config.model_dim, config.num_heads, config.sequence_length
    half = config.head_dim // 2

    def turned(x: Any, cosines: Any, sines: Any) -> Any:
        first, second = x[..., :half], x[..., half:]
        return torch.cat(
            (first * cosines - second * sines, first * sines + second * cosines), dim=-1
        )

    class Block(module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
            self.qkv, self.wo = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
            self.wi, self.wo_ffn = nn.Linear(dim, config.ffn_dim), nn.Linear(config.ffn_dim, dim)

        def forward(self, x: Any, cosines: Any, sines: Any) -> Any:
            batch, time, _ = x.shape
            q, k, v = (
                part.view(batch, time, heads, -1).transpose(1, 2)
                for part in self.qkv(self.norm1(x)).split(dim, dim=2)
            )
            y = functional.scaled_dot_product_attention(
                turned(q, cosines, sines), turned(k, cosines, sines), v, is_causal=True
            )
            x = x + self.wo(y.transpose(1, 2).reshape(batch, time, dim))
            return x + self.wo_ffn(functional.relu(self.wi(self.norm2(x))).square())

    class Twin(module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(config.vocab_size, dim)
            self.blocks = nn.ModuleList(Block() for _ in range(config.num_blocks))
            self.final_norm = nn.LayerNorm(dim)
            self.output = nn.Linear(dim, config.vocab_size, bias=config.output_bias)
            waves = config.rope_base ** (-torch.arange(half) / half)
            angles = torch.arange(length)[:, None] * waves
            self.register_buffer("cosines", angles.cos())
            self.register_buffer("sines", angles.sin())

        def forward(self, tokens: Any) -> Any:
            x = self.embedding(tokens)
            time = tokens.shape[1]
            for block in self.blocks:
                x = block(x, self.cosines[:time], self.sines[:time])
            return self.output(self.final_norm(x))

    return Twin()


def capability() -> str:
    """Return the instruction set that PyTorch's kernels use here, as PyTorch names it."""
    return str(load_torch().backends.cpu.get_cpu_capability())


def _optimizers(torch: Any, model: Any, muon: bool) -> list[Any]:
    """Return AdamW, or Muon for the matrices of the blocks and AdamW for the rest."""
    matrices = {name for name, value in model.blocks.named_parameters() if value.ndim == 2}
    by_muon: list[Any] = []
    others: list[Any] = []
    for name, value in model.named_parameters():
        chosen = muon and name.removeprefix("blocks.") in matrices
        (by_muon if chosen else others).append(value)
    found = [torch.optim.AdamW(others, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.1)]
    if by_muon:
        found.append(torch.optim.Muon(by_muon, lr=1e-3, weight_decay=0.1, momentum=0.95))
    return found


def twin_step(
    config: ModelConfig, batch: int, threads: int, compiled: bool = False, muon: bool = False
) -> Call:
    """Return a call that does one step of training.

    Parameters
    ----------
    config : ModelConfig
    batch, threads : int
    compiled : bool
        Whether the model runs under ``torch.compile``; the first call compiles it then, and raises
        errors of the compiler.
    muon : bool
        Whether the matrices of the blocks are updated by PyTorch's Muon, with its defaults.

    Raises
    ------
    ValueError
        If PyTorch is not installed.
    """
    torch = load_torch()
    torch.manual_seed(0)
    model = create_twin(torch, config)
    optimizers = _optimizers(torch, model, muon)
    # Compiled code may be for one number of threads.
    if compiled:
        torch.compiler.reset()
    predict = torch.compile(model) if compiled else model
    rows = torch.randint(0, config.vocab_size, (64, batch, config.sequence_length + 1))
    steps = 0

    def step() -> None:
        nonlocal steps
        torch.set_num_threads(threads)
        tokens = rows[steps % len(rows)]
        model.zero_grad(set_to_none=True)
        logits = predict(tokens[:, :-1])
        loss = torch.nn.functional.cross_entropy(
            logits.reshape(-1, config.vocab_size), tokens[:, 1:].reshape(-1)
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        steps += 1

    return step
