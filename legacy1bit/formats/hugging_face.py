"""Folders that Hugging Face's transformers loads, and that come back as the models they were.

The class is that of the model's family. Weights are float32, codes times scales; where transformers
rounds activations to int8 as the model does, matrices of codes are four codes to a byte, with their
scale (transformers: ``integrations/bitnet.py``). The tokenizer is in the folder.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from legacy1bit.data.published_tokenizer import TOKENIZER_CONFIG_FILE, PublishedTokenizer
from legacy1bit.data.tokenizer import (
    END_OF_TEXT,
    PADDING,
    TOKENIZER_FILE,
    Tokenizer,
    description_in_template,
    fit_tokenizer,
)
from legacy1bit.formats.families import (
    Family,
    check_model,
    family_of,
    reordered,
    row_order,
    stored_config,
    tensor_names,
)
from legacy1bit.formats.native import CONFIG_FILE, WEIGHTS_FILE, check_finite, open_tensors
from legacy1bit.formats.provenance import Provenance
from legacy1bit.formats.safetensors_file import Tensor
from legacy1bit.hyperparams import ModelConfig
from legacy1bit.layout import Parameter, parameter_layout
from legacy1bit.model import LegacyLLM, ModelFileError, TernaryMatrix
from legacy1bit.schemes import FLOAT, SCHEMES
from legacy1bit.system.files import atomic_write_all, read_regular, serialize_tensors

# The key of settings and provenance, by which an earlier export is recognized.
_OURS = "legacy1bit"
# In the header of the weights: numbers that follow from the tensors only roughly.
_EXACT = "exact"

_Floats = npt.NDArray[np.float32]
_Codes = npt.NDArray[np.int8]


class _Form(NamedTuple):
    """How the parameters of a model are stored.

    Attributes
    ----------
    linear_class : {"bitlinear", "autobitlinear"} or None
        The class of transformers' packed layers: the first divides by the stored scale, the second
        multiplies. None: all weights are float32.
    shift : float32
        What is subtracted from the gamma of norms.
    """

    linear_class: Literal["bitlinear", "autobitlinear"] | None
    shift: np.float32


def _form_of(config: ModelConfig, family: Family) -> _Form:
    # Nemotron's norms multiply by 1 + weight, and its files are all float.
    if family.model_type == "nemotron":
        return _Form(None, np.float32(1.0))
    packs = (
        config.int8_activations
        and config.scheme != FLOAT
        and SCHEMES[config.scheme].outer == 1
        and config.scale in ("tensor", "one")
        and config.scale_shards == 1
        and not config.ternary_embedding
        and all(part.shape[0] % 4 == 0 for part in parameter_layout(config) if part.group)
    )
    if not packs:
        return _Form(None, np.float32(0.0))
    return _Form("autobitlinear" if family.model_type == "bitnet" else "bitlinear", np.float32(0.0))


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
    family = check_model(model, "transformers")
    form = _form_of(model.config, family)
    tokenizer = fit_tokenizer(tokenizer, model.config.vocab_size)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()) and not _is_export(folder):
        raise ValueError(f"{folder} holds something else than an earlier export: choose another")
    known = {"config": model.config.to_dict(), "provenance": model.provenance.to_dict()}
    tensors, exact = _encode_all(model, form)
    header = {"format": "pt", **{name: json.dumps(value) for name, value in known.items()}}
    if exact:
        header[_EXACT] = json.dumps(exact)
    contents = {
        CONFIG_FILE: {**_config(model.config, family, form, tokenizer), _OURS: known},
        TOKENIZER_FILE: tokenizer.description()
        if isinstance(tokenizer, PublishedTokenizer)
        else description_in_template(tokenizer),
        TOKENIZER_CONFIG_FILE: _tokenizer_config(model.config, tokenizer),
    }
    atomic_write_all(
        {folder / WEIGHTS_FILE: serialize_tensors(tensors, header)}
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


def _config(
    config: ModelConfig, family: Family, form: _Form, tokenizer: Tokenizer
) -> dict[str, Any]:
    content: dict[str, Any] = {
        "architectures": [family.class_name],
        "model_type": family.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.model_dim,
        "intermediate_size": config.ffn_dim,
        "num_hidden_layers": config.num_blocks,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.sequence_length,
        "hidden_act": config.activation,
        "norm_eps" if config.norm == "layer" else "rms_norm_eps": config.norm_epsilon,
        "rope_theta": config.rope_base,
        "partial_rotary_factor": _partial_rotary_factor(config),
        "attention_bias": config.biases == "all",
        "mlp_bias": config.biases == "all",
        "tie_word_embeddings": config.tied_embeddings,
        "torch_dtype": "float32",
        **_token_ids(tokenizer),
    }
    if config.rope_factor > 1.0:
        # The name in all versions of transformers.
        content["rope_scaling"] = {
            "rope_type": "yarn",
            "factor": config.rope_factor,
            "original_max_position_embeddings": config.rope_original_length,
        }
    if form.linear_class is not None:
        content["quantization_config"] = {
            "quant_method": "bitnet",
            "linear_class": form.linear_class,
            "quantization_mode": "offline",
            "modules_to_not_convert": ["lm_head"],
        }
    return content


def _token_ids(tokenizer: Tokenizer) -> dict[str, int | list[int] | None]:
    """Return the settings that name tokens; the default of the first two is one of others."""
    if isinstance(tokenizer, PublishedTokenizer):
        ends: list[int] | None = [*tokenizer.stop_tokens] or None
        return {"bos_token_id": tokenizer.bos_token, "eos_token_id": ends}
    return {
        "bos_token_id": tokenizer.bos_token,
        # The default is token 3; texts of bytes have no end-of-text token.
        "eos_token_id": tokenizer.eos_token,
        "pad_token_id": None if tokenizer.eos_token is None else tokenizer.vocab_size - 1,
    }


def _partial_rotary_factor(config: ModelConfig) -> float:
    """Return the fraction of a head that rotates, such that its product rounds down correctly."""
    if int(config.head_dim * config.rope_fraction) == config.rotary_dim:
        return config.rope_fraction
    return math.nextafter(config.rotary_dim / config.head_dim, 1.0)


def _tokenizer_config(config: ModelConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    if isinstance(tokenizer, PublishedTokenizer):
        return {"model_max_length": config.sequence_length, **tokenizer.config()}
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


# --- Tensors --------------------------------------------------------------------------------------


def _encode_all(
    model: LegacyLLM, form: _Form
) -> tuple[dict[str, npt.NDArray[Any]], dict[str, list[float]]]:
    """Return the tensors by transformers' names, and by ours what they do not hold exactly."""
    config = model.config
    tensors: dict[str, npt.NDArray[Any]] = {}
    exact: dict[str, list[float]] = {}
    layout = {part.name: part for part in parameter_layout(config)}
    for ours, names in tensor_names(config).items():
        value = reordered(model, ours, "halves")
        stored = _encode(value, form, ours)
        tensors |= {names.transformers + suffix: tensor for suffix, tensor in stored.items()}
        numbers = value.scales if isinstance(value, TernaryMatrix) else value
        if not np.array_equal(_decode(stored, layout[ours], form, config)[-1], numbers):
            exact[ours] = numbers.ravel().tolist()
    return tensors, exact


@np.errstate(all="ignore")
def _encode(value: _Floats | TernaryMatrix, form: _Form, name: str) -> dict[str, npt.NDArray[Any]]:
    """Return the tensors of a parameter by the ends of their names."""
    if not isinstance(value, TernaryMatrix):
        return {"": value - form.shift if name.endswith("gamma") else value}
    if form.linear_class is None:
        return {"": value.dense()}
    return {"": _pack(value.values), "_scale": _times_or_over(value.scales.reshape(1), form)}


def _times_or_over(scale: _Floats, form: _Form) -> _Floats:
    return np.float32(1.0) / scale if form.linear_class == "bitlinear" else scale


def _pack(codes: _Codes) -> npt.NDArray[np.uint8]:
    """Return codes -1 to 1, int8[R, C], as uint8[R / 4, C]: a byte has rows R / 4 apart."""
    rows, cols = codes.shape
    quarters = codes.reshape(4, rows // 4, cols).transpose(1, 2, 0).reshape(-1, 4)
    return SCHEMES["ternary"].pack(quarters).reshape(rows // 4, cols)


def _unpack(packed: npt.NDArray[np.uint8]) -> _Codes:
    """Undo ``_pack``."""
    rows, cols = packed.shape
    quarters = SCHEMES["ternary"].unpack(packed.reshape(-1, 1), 4)
    return quarters.reshape(rows, cols, 4).transpose(2, 0, 1).reshape(4 * rows, cols)


@np.errstate(all="ignore")
def _decode(
    stored: Mapping[str, npt.NDArray[Any]],
    part: Parameter,
    form: _Form,
    config: ModelConfig,
    scales: _Floats | None = None,
) -> tuple[npt.NDArray[Any], ...]:
    """Undo ``_encode``.

    Parameters
    ----------
    stored : mapping of str to array
    part : Parameter
    form : _Form
    config : ModelConfig
    scales : float32[1, 1] or float32[R, G], optional
        By default they follow from the tensors.

    Returns
    -------
    values : (float32 array,) or (int8[R, C], float32[1, 1] or float32[R, G])
        Numbers, or codes and scales. The codes times the scales may be other numbers than
        ``stored``.
    """
    tensor = stored[""]
    if part.kind != "quantized":
        return (tensor + form.shift if part.name.endswith("gamma") else tensor,)
    scheme = SCHEMES[config.scheme]
    if form.linear_class is not None:
        if scales is None:
            # Scales are float16, and a quotient of quotients is near them.
            scale = _times_or_over(stored["_scale"], form).astype(np.float16)
            scales = scale.astype(np.float32).reshape(1, 1)
        return _unpack(tensor), scales
    sizes = np.abs(tensor)
    if scales is None and config.scale == "one":
        scales = np.ones(part.scale_shape, np.float32)
    elif scales is None:
        # A group of weights has the inner code, or if that is 0, the outer one.
        extreme = np.minimum if scheme.inner else np.maximum
        starts = np.arange(0, part.shape[1], part.group)
        scales = extreme.reduceat(sizes, starts, axis=1)
        if part.scale_shape == (1, 1):
            scales = extreme.reduce(scales, axis=0, keepdims=True)
    wide = np.repeat(scales, part.group, axis=1)[:, : part.shape[1]]
    codes = np.where((sizes == scheme.outer * wide) & (wide > 0.0), scheme.outer, scheme.inner)
    return np.where(np.signbit(tensor), -codes, codes).astype(np.int8), scales


# --- Reading --------------------------------------------------------------------------------------


def import_hugging_face(folder: str | os.PathLike[str]) -> LegacyLLM:
    """Read a model from a folder that ``export_hugging_face`` wrote.

    Parameters
    ----------
    folder : path-like

    Returns
    -------
    LegacyLLM
        The model as it was, to the bit; it has no latent weights.

    Raises
    ------
    ModelFileError
        If it is not such a folder, or a file in it is damaged.
    OSError
        If a file cannot be read.
    """
    folder = Path(folder)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise ModelFileError(f"{folder} is not a model for transformers: it has no {name}")
    tensors, header = open_tensors(folder / WEIGHTS_FILE)
    try:
        config, provenance = _settings_of(folder, header)
        form = _form_of(config, family_of(config, "transformers"))
        # The settings may declare more than fits memory.
        _check_types(config, form, tensors)
        model = LegacyLLM(config)
        model.provenance = provenance
        _fill(model, form, tensors, _exact_of(header))
    except (OverflowError, RecursionError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ModelFileError(f"{folder} cannot be read: {reason}") from None
    return model


def _settings_of(folder: Path, header: Mapping[str, str]) -> tuple[ModelConfig, Provenance]:
    content = json.loads(read_regular(folder / CONFIG_FILE))
    known = content.get(_OURS) if isinstance(content, dict) else None
    if not isinstance(known, dict) or "config" not in known:
        raise ValueError(
            f"its {CONFIG_FILE} has no settings of {_OURS}; only folders that legacy1bit wrote can "
            "be read (generate, chat and export take those of others as they are)"
        )
    settings = known["config"]
    # The weights come with the settings they had when they were written.
    if "config" in header and json.loads(header["config"]) != settings:
        raise ValueError(f"its {CONFIG_FILE} is not the one that {WEIGHTS_FILE} was saved with")
    return stored_config(settings), Provenance.from_json(json.dumps(known.get("provenance")))


@np.errstate(over="ignore")
def _exact_of(header: Mapping[str, str]) -> dict[str, _Floats]:
    exact = json.loads(header.get(_EXACT, "{}"))
    if not isinstance(exact, dict):
        raise TypeError(f"{_EXACT} is not a JSON object")
    return {name: np.asarray(numbers, np.float32) for name, numbers in exact.items()}


def _check_types(config: ModelConfig, form: _Form, tensors: Mapping[str, Tensor]) -> None:
    types = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    names = tensor_names(config)
    expected = {
        names[part.name].transformers + suffix: kind
        for part in parameter_layout(config)
        for suffix, kind in _types_of(part, form).items()
    }
    for name in sorted(expected.keys() | types.keys()):
        if types.get(name) != expected.get(name):
            found, wanted = (_type_name(kinds.get(name)) for kinds in (types, expected))
            raise ValueError(f"its tensor {name} is {found}, expected {wanted}")


def _fill(
    model: LegacyLLM, form: _Form, tensors: Mapping[str, Tensor], exact: Mapping[str, _Floats]
) -> None:
    """Fill a model with the tensors of a file.

    Raises
    ------
    ValueError
        If they are not those of such a model.
    """
    config = model.config
    names = tensor_names(config)
    for part in parameter_layout(config):
        theirs, value = names[part.name].transformers, model.parameters[part.name]
        stored = {suffix: tensors[theirs + suffix].array() for suffix in _types_of(part, form)}
        numbers = exact.get(part.name)
        order = row_order(config, part.name, "halves")
        rows: Any = slice(None) if order is None else order
        if isinstance(value, TernaryMatrix):
            scales = None if numbers is None else numbers.reshape(part.scale_shape)
            codes, scales = _decode(stored, part, form, config, scales)
            check_finite(part.name, scales)
            fits = bool(np.isin(codes, SCHEMES[config.scheme].levels).all())
            value.values[rows] = codes
            value.scales[rows if len(scales) > 1 else slice(None)] = scales
        else:
            fits = True
            value[rows] = (
                _decode(stored, part, form, config)[0]
                if numbers is None
                else numbers.reshape(part.shape)
            )
            check_finite(part.name, value)
        if numbers is not None or isinstance(value, TernaryMatrix):
            again = _encode(reordered(model, part.name, "halves"), form, part.name)
            fits &= all(np.array_equal(again[suffix], stored[suffix]) for suffix in stored)
        if not fits:
            raise ValueError(f"{part.name} holds a number that its codes and scales do not give")


def _types_of(part: Parameter, form: _Form) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return dtypes and shapes of a parameter's tensors by the ends of their names."""
    if part.kind != "quantized" or form.linear_class is None:
        return {"": ("F32", part.shape)}
    return {"": ("U8", (part.shape[0] // 4, part.shape[1])), "_scale": ("F32", (1,))}


def _type_name(kind: tuple[str, tuple[int, ...]] | None) -> str:
    return "absent" if kind is None else f"{kind[0]}{list(kind[1])}"
