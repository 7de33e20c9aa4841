"""Random models with the shapes of published ones, as GGUF files of llama.cpp and bitnet.cpp.

Speed depends on shapes and types alone, so that no weights need to be downloaded.
"""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from legacy1bit.formats.families import family_of, tensor_names
from legacy1bit.formats.ggml import load_gguf
from legacy1bit.formats.gguf import shape_keys
from legacy1bit.formats.tensor_types import TYPES
from legacy1bit.hyperparams import ModelConfig, architecture_settings
from legacy1bit.layout import parameter_layout
from legacy1bit.system.files import atomic_path

# microsoft/bitnet-b1.58-2B-4T; llama.cpp's bitnet has SiLU for its squared ReLU, at equal cost.
BITNET_2B = ModelConfig(
    **architecture_settings("bitnet")
    | {
        "vocab_size": 128256,
        "model_dim": 2560,
        "num_blocks": 30,
        "num_heads": 20,
        "num_kv_heads": 5,
        "head_dim": 128,
        "ffn_dim": 6912,
        "sequence_length": 4096,
        "rope_base": 500000.0,
        "activation": "silu",
        "int8_activations": True,
    }
)
# prism-ml/Ternary-Bonsai-1.7B; two blocks of its type Q2_0 have the same scale.
BONSAI_1_7B = ModelConfig(
    **architecture_settings("qwen3")
    | {
        "vocab_size": 151936,
        "model_dim": 2048,
        "num_blocks": 28,
        "num_heads": 16,
        "num_kv_heads": 8,
        "head_dim": 128,
        "ffn_dim": 6144,
        "sequence_length": 4096,
        "rope_base": 1000000.0,
        "tied_embeddings": True,
        "ternary_embedding": True,
        "scale": "128",
    }
)

# Where the scale of a block is, and the scale.
_SCALE_AT = {"TQ2_0": 64, "Q2_0": 0, "Q8_0": 0, "Q6_K": 208}
_SCALE = np.array([2.0**-6], "<f2").view(np.uint8)
# The bytes of four codes of two bits, none of which is 3.
_FOURS = np.array(
    [byte for byte in range(256) if not byte & byte >> 1 & 0x55],
    np.uint8,
)


def write_random(config: ModelConfig, kind: str, head: str, file: Path) -> None:
    """Write a random model.

    Parameters
    ----------
    config : ModelConfig
    kind, head : str
        The types of matrices of codes (TQ2_0, Q2_0, or I2_S for bitnet.cpp), and of embedding and
        output matrix where they are floats (F16, Q8_0 or Q6_K).
    file : Path

    Raises
    ------
    ValueError
        If gguf is not installed.
    """
    gguf = load_gguf()
    rng = np.random.default_rng(1)
    with atomic_path(file) as temporary:
        writer = gguf.GGUFWriter(temporary, family_of(config, "llama_cpp").architecture)
        for key, value in shape_keys(config).items():
            add = writer.add_uint32 if isinstance(value, int) else writer.add_float32
            add(key, value)
        writer.add_tokenizer_model("no_vocab")
        names = tensor_names(config)
        for part in parameter_layout(config):
            if part.kind == "vector":
                writer.add_tensor(names[part.name].llama_cpp, np.ones(part.shape, np.float32))
                continue
            stored = kind if part.kind == "quantized" else head
            data = _random_tensor(rng, stored, part.shape, config.scale)
            number = next(number for number, one in TYPES.items() if one.name == stored)
            writer.add_tensor(
                names[part.name].llama_cpp,
                data.view(np.int8),
                raw_shape=part.shape,
                raw_dtype=number,
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _random_tensor(
    rng: np.random.Generator, kind: str, shape: tuple[int, ...], scale: str
) -> npt.NDArray[Any]:
    """Return the bytes of a matrix, uint8[R, bytes] or uint8[bytes]."""
    rows, cols = shape
    stored = next(one for one in TYPES.values() if one.name == kind)
    blocks = rng.integers(0, 256, (rows, cols // stored.block, stored.bytes), np.uint8)
    if kind == "F16":
        return (rng.random(shape, np.float32) - 0.5).astype("<f2").view(np.uint8)
    if stored.is_ternary:
        blocks = _FOURS[blocks % len(_FOURS)]
        if kind == "I2_S":
            # One scale for the matrix, behind its codes, and 28 other bytes.
            last = np.array([2.0**-6] * 8, "<f4").view(np.uint8)
            return np.concatenate([blocks.reshape(-1), last])
        at = _SCALE_AT[kind]
        blocks[..., at : at + 2] = _SCALE
        if scale.isdigit():
            # Scales of 64 or more weights, from 2^-6 to 2^-5.
            each = int(scale) // stored.block
            low = rng.integers(0, 256, (rows, -(-blocks.shape[1] // each)), np.uint8)
            blocks[..., at] = np.repeat(low, each, axis=1)[:, : blocks.shape[1]]
    else:
        blocks[..., _SCALE_AT[kind] : _SCALE_AT[kind] + 2] = _SCALE
    return blocks.reshape(rows, -1)
