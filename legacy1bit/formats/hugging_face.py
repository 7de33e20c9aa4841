"""Folders that Hugging Face's transformers loads: NemotronForCausalLM, and the tokenizer.

The weights are float32, codes times scales. Such a folder cannot be imported.
"""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from legacy1bit.data.tokenizer import (
    END_OF_TEXT,
    PADDING,
    TOKENIZER_FILE,
    Tokenizer,
    description_in_template,
    fit_tokenizer,
)
from legacy1bit.formats.families import check_model, tensor_names
from legacy1bit.formats.native import CONFIG_FILE, WEIGHTS_FILE
from legacy1bit.hyperparams import ModelConfig
from legacy1bit.model import LAYER_NORM_EPSILON, LegacyLLM, TernaryMatrix
from legacy1bit.system.files import atomic_write_all, read_regular, serialize_tensors

TOKENIZER_CONFIG_FILE = "tokenizer_config.json"

# The key of settings and provenance, by which an earlier export is recognized.
_OURS = "legacy1bit"


def export_hugging_face(
    model: LegacyLLM, folder: str | os.PathLike[str], tokenizer: Tokenizer | None = None
) -> None:
    """Write a model for ``transformers``.

    Parameters
    ----------
    model : LegacyLLM
    folder : path-like
        A new or empty folder, or an earlier export, which is replaced.
    tokenizer : Tokenizer, optional
        The model's; by default tokens are bytes.

    Raises
    ------
    ValueError
        If ``transformers`` does not have such models, a weight is nonfinite, the tokenizer is of
        another model, or the folder holds something else.
    OSError
        If a file cannot be written; an earlier export is untouched.
    """
    check_model(model, "transformers")
    tokenizer = fit_tokenizer(tokenizer, model.config.vocab_size)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()) and not _is_export(folder):
        raise ValueError(f"{folder} holds something else than an earlier export: choose another")
    known = {"config": model.config.to_dict(), "provenance": model.provenance.to_dict()}
    header = {"format": "pt", **{name: json.dumps(value) for name, value in known.items()}}
    contents = {
        CONFIG_FILE: {**_config(model.config, tokenizer), _OURS: known},
        TOKENIZER_FILE: description_in_template(tokenizer),
        TOKENIZER_CONFIG_FILE: _tokenizer_config(model.config, tokenizer),
    }
    atomic_write_all(
        {folder / WEIGHTS_FILE: serialize_tensors(_tensors(model), header)}
        | {
            folder / name: json.dumps(content, indent=2) + "\n"
            for name, content in contents.items()
        }
    )


def _is_export(folder: Path) -> bool:
    try:
        json.loads(read_regular(folder / CONFIG_FILE))[_OURS]["config"]
    except (KeyError, OSError, RecursionError, TypeError, ValueError):
        return False
    return True


def _tensors(model: LegacyLLM) -> dict[str, Any]:
    tensors = {}
    for ours, names in tensor_names(model.config).items():
        value = model.parameters[ours]
        dense = value.dense() if isinstance(value, TernaryMatrix) else value
        # Nemotron's norms multiply by 1 + weight.
        tensors[names.transformers] = dense - np.float32(1.0) if ours.endswith("gamma") else dense
    return tensors


def _config(config: ModelConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "architectures": ["NemotronForCausalLM"],
        "model_type": "nemotron",
        "vocab_size": config.vocab_size,
        "hidden_size": config.model_dim,
        "intermediate_size": config.ffn_dim,
        "num_hidden_layers": config.num_blocks,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.sequence_length,
        "hidden_act": "relu2",
        "norm_eps": LAYER_NORM_EPSILON,
        "rope_theta": config.rope_base,
        "partial_rotary_factor": 1.0,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "bos_token_id": tokenizer.bos_token,
        # The default is token 3; texts of bytes have no end-of-text token.
        "eos_token_id": tokenizer.eos_token,
        "pad_token_id": None if tokenizer.eos_token is None else tokenizer.vocab_size - 1,
    }


def _tokenizer_config(config: ModelConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    special = {
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": PADDING,
        # The names of special tokens in a text are plain text.
        "split_special_tokens": True,
    }
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.sequence_length,
        "clean_up_tokenization_spaces": False,
        **({} if tokenizer.eos_token is None else special),
    }
