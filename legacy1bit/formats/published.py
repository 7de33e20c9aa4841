"""Models that others have published: GGUF files and folders of Hugging Face, read as they are.

A file becomes ``ModelConfig`` and parameters one after the other, as ``native.read_folder`` gives
those of our own. All matrices of the blocks must be ternary; embedding and output matrix may be
floats of any type. What cannot be read right is refused: a key, a setting or a tensor that is not
known could mean that the model computes something else.
"""

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from legacy1bit.data.published_tokenizer import PublishedTokenizer, template_in
from legacy1bit.data.tokenizer import TOKENIZER_FILE, Tokenizer, UnknownTokenizer
from legacy1bit.data.tokenizer_files import tokenizer_of
from legacy1bit.formats import native, safetensors_file
from legacy1bit.formats.chat_template import PLAIN, JinjaTemplate, PlainTemplate, Template
from legacy1bit.formats.families import FAMILIES, Family, Pairs, row_order, tensor_names
from legacy1bit.formats.gguf_file import Keys, Texts, is_gguf, read_container, read_keys
from legacy1bit.formats.native import CONFIG_FILE, ModelFileError, StoredParameter, stored_codes
from legacy1bit.formats.provenance import Provenance
from legacy1bit.formats.tensor_types import (
    BF16,
    F16,
    F32,
    I2_S,
    UNITS,
    Blocks,
    Codes,
    Floats,
    Masters,
    Quarters,
    RunsOf128,
    Scales,
    TensorType,
    TernaryFloats,
    in_coarsest_unit,
    scales_in,
)
from legacy1bit.hyperparams import ModelConfig
from legacy1bit.layout import Parameter, parameter_layout
from legacy1bit.packing import Values
from legacy1bit.schemes import FLOAT, SCHEMES
from legacy1bit.system.errors import one_line
from legacy1bit.system.files import read_regular, release

Model = tuple[ModelConfig, Provenance, Iterator[StoredParameter]]
# The result of ``row_order``.
_Order = npt.NDArray[np.intp] | None

# The longest context; files may promise more.
_MOST_TOKENS = 1 << 17
_COMPARED_AT_ONCE = 1 << 22  # bytes


def read_model(path: Path, floats: bool = False) -> Model:
    """Read a model of any known format one parameter at a time, without creating a model.

    Parameters
    ----------
    path : Path
        A folder, of this program or of Hugging Face; a GGUF file; or a file of the C original. Of
        a run, its best model is read.
    floats : bool
        Whether a model of others may have matrices of floats that are not ternary, with which a
        training begins: it has the scheme float then. Such a model is refused otherwise.

    Returns
    -------
    config : ModelConfig
    provenance : Provenance
    stored : iterator of StoredParameter

    Raises
    ------
    ModelFileError
        If it is not a complete, valid model, or one that would not be computed right; errors in
        the content of a tensor are raised when it is reached.
    OSError
        If it cannot be read.
    """
    if not path.is_dir():
        return read_gguf(path, floats) if is_gguf(path) else _read_c_v1(path)
    if is_hugging_face(path):
        return read_hugging_face(path, floats)
    return native.read_folder(native.model_folder(path))


def read_tokenizer(path: Path, vocab_size: int) -> Tokenizer:
    """Return the tokenizer of a model that ``read_model`` reads.

    Raises
    ------
    ValueError
        If it is damaged, or is of other tokens than the model.
    OSError
        If a file cannot be read.
    """
    if path.is_file() and is_gguf(path):
        with refusing(path):
            keys = read_keys(path)
            if f"{_TOKENIZER}model" not in keys:
                return UnknownTokenizer(vocab_size)
            # Our own files, too: their tokenizers are byte-level BPEs.
            return PublishedTokenizer.of_gguf(keys, vocab_size)
    if is_hugging_face(path) and (path / TOKENIZER_FILE).exists():
        return PublishedTokenizer.of_folder(path, vocab_size)
    return tokenizer_of(path, vocab_size)


def read_template(path: Path, tokenizer: Tokenizer) -> Template | None:
    """Return the chat template of a model that ``read_model`` reads; None where it has none.

    Parameters
    ----------
    path : Path
    tokenizer : Tokenizer
        The model's; one that others published has its template, and the names of tokens in it.

    Raises
    ------
    ValueError
        If it is damaged or too long, or jinja2 is needed and not installed.
    OSError
        If a file cannot be read.
    """
    if isinstance(tokenizer, PublishedTokenizer):
        source, names = tokenizer.template, tokenizer.names
    else:
        with refusing(path):
            source, names = template_in(path) if path.is_dir() else None, {}
    if source == PLAIN:
        return PlainTemplate()
    return None if source is None else JinjaTemplate(source, names)


def _read_c_v1(path: Path) -> Model:
    config, parameters = native.read_c_v1(path)

    def stored() -> Iterator[StoredParameter]:
        for part in parameter_layout(config):
            values = parameters[part.name]
            if part.kind == "quantized":
                ones = np.ones((1, 1), np.float32)
                codes = values.view(np.uint8)
                yield stored_codes(part.name, "int8", codes, part.shape, ones, part.group)
            else:
                yield StoredParameter(part.name, part.shape, values)

    return config, Provenance(), stored()


@contextlib.contextmanager
def refusing(path: Path) -> Iterator[None]:
    """Turn errors into those of this file."""
    try:
        yield
    except ModelFileError:
        raise
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise ModelFileError(f"{path} cannot be read: {one_line(error)}") from None


# --- Tensors and settings to parameters -----------------------------------------------------------


class _Source(NamedTuple):
    """A tensor of a file that is to become a parameter.

    Attributes
    ----------
    shape : tuple of int
        Of the matrix, however it is packed.
    codes : Codes or None
        A matrix that is ternary, or may turn out to be.
    floats : Floats or None
        A tensor that may be floats.
    factor : float
        Multiplies the scales.
    """

    shape: tuple[int, ...]
    codes: Codes | None
    floats: Floats | None
    factor: float = 1.0

    def scales(self) -> Scales | None:
        """Return the scales of the codes, in the coarsest unit; None if it is not ternary."""
        found = None if self.codes is None else self.codes.scales()
        if found is None:
            return None
        scales, group = found
        if self.factor != 1.0:
            with np.errstate(all="ignore"):
                scales = scales * np.float32(self.factor)
        if not np.isfinite(scales).all():
            raise ValueError("has a scale that is not finite (NaN or infinite)")
        return in_coarsest_unit(scales, group, self.shape[1])

    def dense(self) -> npt.NDArray[np.float32]:
        """Return codes times scales, float32[R, C]."""
        found = self.scales()
        assert self.codes is not None
        assert found is not None
        codes = np.empty(self.shape, np.int8)
        self.codes.write(Values(codes, SCHEMES["ternary"].levels), np.arange(len(codes)))
        return codes * np.repeat(found.values, found.group, axis=1)[:, : self.shape[1]]


def _of_type(kind: TensorType, data: npt.NDArray[np.uint8], shape: tuple[int, ...]) -> _Source:
    if not kind.is_ternary:
        floats = Floats(kind, data, shape)
        return _Source(shape, TernaryFloats(floats) if len(shape) == 2 else None, floats)
    if len(shape) != 2:
        raise ValueError(f"is {kind.name} with shape {list(shape)}, expected a matrix")
    matrix = shape[0], shape[1]
    return _Source(
        shape, RunsOf128(data, matrix) if kind is I2_S else Blocks(kind, data, matrix), None
    )


def _check_names(expected: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Compare the names of tensors."""
    for name in expected:
        if name not in found:
            raise ValueError(f"the tensor {name} is missing")
    unknown = sorted(found.keys() - expected.keys())
    if unknown:
        raise ValueError(f"it has the unexpected tensor {unknown[0]}, which no such model has")


def _model_of(
    path: Path,
    draft: ModelConfig,
    names: Mapping[str, str],
    sources: Mapping[str, _Source],
    pairs: Pairs,
    provenance: Provenance,
    shift: float = 0.0,
    floats: bool = False,
) -> Model:
    """Return a model of these tensors.

    Parameters
    ----------
    path : Path
    draft : ModelConfig
        Without the unit of the scales, and whether the embedding is ternary.
    names : dict of str to str
        Those of the file, by our own.
    sources : dict of str to _Source
        The file's tensors.
    pairs : {"halves", "adjacent"}
        How the file's rows of queries and keys rotate.
    provenance : Provenance
    shift : float
        What is added to the gamma of norms.
    floats : bool
        Whether the blocks may have matrices of floats.
    """
    _check_names(dict.fromkeys(names.values()), sources)
    for part in parameter_layout(draft):
        shape = sources[names[part.name]].shape
        if shape != part.shape:
            raise ValueError(
                f"{names[part.name]} has shape {list(shape)}, expected {list(part.shape)}"
            )
    inner = [part.name for part in parameter_layout(draft) if part.kind == "quantized"]
    outer = [name for name in ("embedding.weight", "output.weight") if name in names]
    # Of each matrix the coarsest unit, in which its scales are the fewest.
    found: dict[str, Scales] = {}
    for name in inner + outer:
        with telling(names[name]):
            scales = sources[names[name]].scales()
            if scales is not None:
                found[name] = scales
            elif name in inner and not (floats and sources[names[name]].floats is not None):
                raise ValueError(_why_not_ternary(sources[names[name]]))
    if found.keys() >= set(inner):
        ternary = found.keys() >= set(outer)
        unit = max((found[name].unit for name in inner + outer * ternary), key=UNITS.index)
        config = replace(draft, scale=unit, ternary_embedding=ternary)
    else:
        config = replace(draft, scheme=FLOAT)

    def stored() -> Iterator[StoredParameter]:
        for part in parameter_layout(config):
            theirs = names[part.name]
            with refusing(path), telling(theirs):
                order = row_order(config, part.name, pairs)
                source = sources[theirs]
                if part.kind == "quantized":
                    read = _codes(part, source, found[part.name], config.scale, order)
                elif part.kind == "matrix" and source.floats is not None and order is None:
                    rows = _Rows(path, theirs, source.floats)
                    read = StoredParameter(part.name, part.shape, rows)
                else:
                    read = _floats(part, source, order)
                if shift and part.name.endswith("gamma"):
                    read = read._replace(values=read.array() + np.float32(shift))
            if read.write is not None:
                # It is called after this.
                read = read._replace(write=refusing(path)(telling(theirs)(read.write)))
            if read.masters is not None:
                read = read._replace(masters=refusing(path)(telling(theirs)(read.masters)))
            yield read

    return config, provenance, stored()


def _why_not_ternary(source: _Source) -> str:
    if source.codes is not None and source.codes.scales() is not None:
        return (
            "has scales of 32 weights, expected one for 64 weights or for more: a model's kernels "
            "know no smaller groups"
        )
    return (
        "is not ternary: 64 weights have more than one magnitude, and legacy1bit runs ternary "
        "models"
    )


@contextlib.contextmanager
def telling(name: str) -> Iterator[None]:
    """Put the name of a tensor before an error."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name} {error}") from None


class _Rows(NamedTuple):
    """A float matrix of a file; see ``native.FloatRows``."""

    path: Path
    name: str
    floats: Floats

    def each(self, use: Callable[[slice, npt.NDArray[np.float32]], None], threads: int) -> None:
        with refusing(self.path), telling(self.name):
            self.floats.each(use, threads)

    def all(self) -> npt.NDArray[np.float32]:
        with refusing(self.path), telling(self.name):
            return self.floats.all()


def _codes(
    part: Parameter, source: _Source, found: Scales, unit: str, order: _Order
) -> StoredParameter:
    """Return a matrix of codes, with scales in this unit."""
    scales = scales_in(unit, found.values, found.group, part.shape[1])
    assert source.codes is not None
    assert scales is not None
    scales = np.ascontiguousarray(np.broadcast_to(scales, part.scale_shape))
    places = np.arange(part.shape[0]) if order is None else order
    masters = source.codes.floats if isinstance(source.codes, Masters) else None
    return StoredParameter(
        part.name,
        part.shape,
        scales=scales if len(scales) == 1 else _in_order(scales, order),
        group=part.group,
        write=partial(source.codes.write, places=places),
        masters=None if masters is None else lambda: _in_order(masters.all(), order),
    )


def _floats(part: Parameter, source: _Source, order: _Order) -> StoredParameter:
    """Return a matrix or vector of floats."""
    values = source.dense() if source.floats is None else source.floats.all()
    return StoredParameter(part.name, part.shape, _in_order(values, order))


def _in_order(values: npt.NDArray[Any], order: _Order) -> npt.NDArray[Any]:
    """Return the rows of ours, of which ``values[i]`` is row ``order[i]``."""
    if order is None:
        return values
    result = np.empty_like(values)
    result[order] = values
    return result


# --- Settings that both kinds of files have -------------------------------------------------------


class Settings:
    """The settings of a file, looked up with checks of their kind.

    Parameters
    ----------
    values : mapping of str to Any
    prefix : str
        Before the names.
    """

    def __init__(self, values: Mapping[str, Any], prefix: str = "") -> None:
        self._values, self._prefix = values, prefix

    def __contains__(self, name: str) -> bool:
        return self._values.get(self._prefix + name) is not None

    def any(self, name: str) -> Any:
        """Return a setting, None if it is absent."""
        return self._values.get(self._prefix + name)

    def integer(self, name: str, default: int | None = None) -> int:
        """Return a whole number above 0."""
        value = self.any(name)
        if isinstance(value, np.ndarray) and value.size and (value == value[0]).all():
            # One for each block.
            value = value[0].item()
        if value is None and default is not None:
            return default
        if type(value) is not int or value < 1:
            raise ValueError(self._wrong(name, value, "a whole number above 0"))
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """Return a number."""
        value = self.any(name)
        if value is None and default is not None:
            return default
        if type(value) not in (int, float) or not math.isfinite(value):
            raise ValueError(self._wrong(name, value, "a number"))
        # The number that was written: GGUF has single precision, in which 1e-5 is another one.
        with np.errstate(over="ignore"):
            single = np.float32(value)
        return float(str(single)) if float(single) == value else float(value)

    def text(self, name: str, default: str | None = None) -> str:
        """Return a text."""
        value = self.any(name)
        if value is None and default is not None:
            return default
        if not isinstance(value, str):
            raise ValueError(self._wrong(name, value, "a text"))
        return value

    def refuse_unless(self, name: str, *allowed: Any) -> None:
        """Raise ``ValueError`` if a setting has a value that is not computed here."""
        value = self.any(name)
        if value is not None and value not in allowed:
            raise ValueError(self._wrong(name, value, " or ".join(map(repr, allowed))))

    def _wrong(self, name: str, value: Any, expected: str) -> str:
        if value is None:
            return f"its setting {self._prefix}{name} is missing"
        return f"its setting {self._prefix}{name} is {str(value)[:100]!r}, expected {expected}"


def _base_settings(family: Family) -> dict[str, Any]:
    """Return the settings of a family's models where they may have one value only."""
    return {name: values[0] for name, values in family.settings.items()}


def _head_settings(heads: int, kv_heads: int, dim: int, head_dim: int | None) -> dict[str, int]:
    if heads % kv_heads:
        raise ValueError(f"it has {heads} heads, expected a multiple of the {kv_heads} of keys")
    if head_dim is None and dim % heads:
        raise ValueError(f"its width is {dim}, expected a multiple of its {heads} heads")
    return {"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": head_dim or dim // heads}


# --- GGUF -----------------------------------------------------------------------------------------

_MODEL_TYPES = {family.model_type: family for family in FAMILIES}

# Architectures, their families, and the activation of the feed-forward layer.
ARCHITECTURES = {
    **{family.architecture: (family, family.settings["activation"][0]) for family in FAMILIES},
    # The first BitNets, of 1bitLLM, and those of Microsoft.
    "bitnet": (_MODEL_TYPES["bitnet"], "silu"),
    "bitnet-b1.58": (_MODEL_TYPES["bitnet"], "relu2"),
    "bitnet-25": (_MODEL_TYPES["bitnet"], "relu2"),
}

_TOKENIZER = "tokenizer.ggml."
# All bits set.
_NO_TOKEN = (1 << 32) - 1

# The keys of an architecture that are read.
_READ = {
    *("context_length", "embedding_length", "block_count", "feed_forward_length", "vocab_size"),
    *("attention.head_count", "attention.head_count_kv", "attention.key_length"),
    *("attention.value_length", "attention.layer_norm_rms_epsilon"),
    *("attention.layer_norm_epsilon", "rope.dimension_count", "rope.freq_base"),
    *("rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length"),
}
# Those that change nothing, or only with other values than these.
_WITHOUT_EFFECT: Mapping[str, tuple[Any, ...] | None] = {
    "rope.scaling.finetuned": None,
    "tensor_data_layout": None,
    "attention.causal": (True,),
    "attention.sliding_window": (0,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "rope.scale_linear": (1.0,),
    "rope.scaling.attn_factor": (1.0,),
    "rope.scaling.yarn_ext_factor": (1.0, -1.0),
    "rope.scaling.yarn_attn_factor": (1.0,),
    "rope.scaling.yarn_beta_fast": (32.0,),
    "rope.scaling.yarn_beta_slow": (1.0,),
}


def read_gguf(path: Path, floats: bool = False) -> Model:
    """Read a GGUF file; see ``read_model``."""
    with refusing(path):
        keys, tensors = read_container(path)
        foreign = sorted(name for name in keys if name.startswith("prism."))
        if foreign:
            raise ValueError(
                f"its key {foreign[0]} says that its weights are not used as they are (after a "
                "Hadamard transform, if it is prism.hadamard), which is not known here"
            )
        # An adapter has the architecture of its model.
        Settings(keys).refuse_unless("general.type", "model")
        Settings(keys).refuse_unless("split.count", 0, 1)
        architecture = Settings(keys).text("general.architecture")
        if architecture not in ARCHITECTURES:
            raise ValueError(
                f"its architecture is {architecture[:100]!r}, expected one of "
                f"{', '.join(sorted(ARCHITECTURES))}"
            )
        family, activation = ARCHITECTURES[architecture]
        sources = {}
        for name, tensor in tensors.items():
            with telling(name):
                sources[name] = _of_type(tensor.kind, tensor.data, tensor.shape)
        tied = "output.weight" not in tensors
        if not tied and _are_same(tensors["output.weight"], tensors.get("token_embd.weight")):
            # As in the first file of BitNet b1.58 2B-4T.
            tied = True
            del sources["output.weight"]
        has_runs = any(tensor.kind is I2_S for tensor in tensors.values())
        draft = replace(
            _gguf_config(architecture, family, keys, tensors),
            activation=activation,
            tied_embeddings=tied,
            # Programs that know the type round activations for it.
            int8_activations=family.name == "BitNet" or has_runs,
        )
        _check_tokens(keys, draft.vocab_size)
        names = {ours: name.llama_cpp for ours, name in tensor_names(draft).items()}
        _apply_scale_tensors(sources, names)
        pairs, provenance = family.llama_cpp_pairs, _provenance_of(keys)
        return _model_of(path, draft, names, sources, pairs, provenance, floats=floats)


def _are_same(one: Any, other: Any) -> bool:
    return (
        other is not None
        and one.kind is other.kind
        and one.shape == other.shape
        and _have_same_bytes(one.data, other.data)
    )


def _have_same_bytes(one: npt.NDArray[np.uint8], other: npt.NDArray[np.uint8]) -> bool:
    """Compare mapped tensors, without leaving them in memory."""
    for first in range(0, max(one.size, other.size), _COMPARED_AT_ONCE):
        ours, theirs = (data[first : first + _COMPARED_AT_ONCE] for data in (one, other))
        if not np.array_equal(ours, theirs):
            return False
        release(ours)
        release(theirs)
    return True


def _gguf_config(
    architecture: str, family: Family, keys: Keys, tensors: Mapping[str, Any]
) -> ModelConfig:
    own = Settings(keys, f"{architecture}.")
    for key in keys:
        name = key.removeprefix(f"{architecture}.")
        if name == key or name in _READ:
            continue
        if name not in _WITHOUT_EFFECT:
            raise ValueError(f"its key {key} is not known: it could change what the model computes")
        allowed = _WITHOUT_EFFECT[name]
        if allowed is not None:
            own.refuse_unless(name, *allowed)
    dim, heads = own.integer("embedding_length"), own.integer("attention.head_count")
    head_dim = own.integer("attention.key_length") if "attention.key_length" in own else None
    sizes = _head_settings(heads, own.integer("attention.head_count_kv", heads), dim, head_dim)
    own.refuse_unless("attention.value_length", sizes["head_dim"])
    if "token_embd.weight" not in tensors:
        raise ValueError("the tensor token_embd.weight is missing")
    vocab = tensors["token_embd.weight"].shape[0]
    own.refuse_unless("vocab_size", vocab)
    rms = family.settings["norm"][0] == "rms"
    rotating = own.integer("rope.dimension_count", sizes["head_dim"])
    settings = {
        **_base_settings(family),
        **sizes,
        "vocab_size": vocab,
        "model_dim": dim,
        "num_blocks": own.integer("block_count"),
        "ffn_dim": own.integer("feed_forward_length"),
        "sequence_length": min(own.integer("context_length"), _MOST_TOKENS),
        "norm_epsilon": own.number(f"attention.layer_norm_{'rms_' if rms else ''}epsilon"),
        "rope_base": own.number("rope.freq_base", 10000.0),
        "rope_fraction": rotating / sizes["head_dim"],
        "biases": _biases(family, "blk.0.ffn_up.bias" in tensors),
    }
    kind, factor = own.text("rope.scaling.type", "none"), own.number("rope.scaling.factor", 1.0)
    if kind not in ("none", "yarn") and not (kind == "linear" and factor == 1.0):
        raise ValueError(
            f"its key {architecture}.rope.scaling.type is {kind[:100]!r}, expected none or yarn"
        )
    if kind == "yarn" and factor != 1.0:
        settings["rope_factor"] = factor
        settings["rope_original_length"] = own.integer(
            "rope.scaling.original_context_length", settings["sequence_length"]
        )
    return _config_of(settings)


def _config_of(settings: dict[str, Any]) -> ModelConfig:
    """Return the settings of a model, whose positions must rotate."""
    if settings["rope_base"] <= 1.0:
        raise ValueError(f"its base of rotary positions is {settings['rope_base']}, expected more")
    return ModelConfig(**settings)


def _biases(family: Family, has_bias: bool) -> str:
    """Return the setting of biases, which those of the feed-forward layer tell."""
    return "all" if has_bias and "all" in family.settings["biases"] else "none"


def _check_tokens(keys: Keys, vocab_size: int) -> None:
    """Compare the tokenizer with the number of tokens."""
    own = Settings(keys, _TOKENIZER)
    for name in ("tokens", "token_type", "scores"):
        value = own.any(name)
        if isinstance(value, Texts | np.ndarray) and len(value) != vocab_size:
            raise ValueError(
                f"its key {_TOKENIZER}{name} has {len(value)} tokens, expected {vocab_size}: the "
                "rows of token_embd.weight"
            )
    for name in ("bos", "eos", "eot", "eom"):
        token = own.any(f"{name}_token_id")
        is_token = type(token) is int and (0 <= token < vocab_size or token == _NO_TOKEN)
        if token is not None and not is_token:
            raise ValueError(
                f"its key {_TOKENIZER}{name}_token_id is {str(token)[:100]}, expected a token"
            )


def _apply_scale_tensors(sources: dict[str, _Source], names: Mapping[str, str]) -> None:
    """Multiply matrices by the numbers that llama.cpp's converter stores beside them."""
    for ours, theirs in names.items():
        extra = f"{theirs.removesuffix('.weight')}.scale"
        if ours.startswith("blocks.") and extra in sources and theirs in sources:
            own = sources.pop(extra)
            if own.shape != (1,) or own.floats is None:
                raise ValueError(f"{extra} has shape {list(own.shape)}, expected one number")
            with telling(extra):
                factor = float(own.floats.all()[0])
            sources[theirs] = sources[theirs]._replace(factor=factor)


def _provenance_of(keys: Keys) -> Provenance:
    """Return what a file says about its origin."""
    own, license_name = keys.get("legacy1bit.provenance"), keys.get("general.license")
    if isinstance(own, str):
        return Provenance.from_json(own)
    return Provenance(license=license_name if isinstance(license_name, str) else "")


# --- Folders of Hugging Face ----------------------------------------------------------------------

_ACTIVATIONS = {"relu2": "relu2", "silu": "silu", "swish": "silu"}
# Defaults of transformers where files may leave a setting out.
_BASES = {"bitnet": 500000.0}
_HEAD_DIMS = {"qwen3": 128}
_ROPE_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "beta_fast": (32, 32.0),
    "beta_slow": (1, 1.0),
    "truncate": (True,),
    "mscale": (1, 1.0),
    "mscale_all_dim": (0, 0.0),
}
# Names of the first BitNets.
_EARLIER_NAMES = {
    "self_attn.inner_attn_ln.weight": "self_attn.attn_sub_norm.weight",
    "mlp.ffn_layernorm.weight": "mlp.ffn_sub_norm.weight",
}
FLOAT_TYPES = {"F32": F32, "F16": F16, "BF16": BF16}


def is_hugging_face(folder: Path) -> bool:
    """Return whether a folder's settings are those of transformers."""
    try:
        settings = json.loads(read_regular(folder / CONFIG_FILE))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(settings, dict) and "model_type" in settings


def read_hugging_face(folder: Path, floats: bool = False) -> Model:
    """Read a folder of Hugging Face; see ``read_model``."""
    with refusing(folder):
        content = json.loads(read_regular(folder / CONFIG_FILE))
        own = Settings(content)
        kind = own.text("model_type")
        if kind not in _MODEL_TYPES:
            code = ": its auto_map names remote code, which is not run" if "auto_map" in own else ""
            raise ValueError(
                f"its model_type is {kind[:100]!r}, expected one of "
                f"{', '.join(sorted(_MODEL_TYPES))}{code}"
            )
        family = _MODEL_TYPES[kind]
        packing = _Packing.of(own, kind)
        if packing.is_first_bitnet:
            family = _MODEL_TYPES["bitnet"]
        tensors = {
            _name_today(name): tensor
            for name, tensor in safetensors_file.read_tensors(folder).items()
            if not name.endswith("rotary_emb.inv_freq")
        }
        tied = own.any("tie_word_embeddings")
        if tied not in (None, False, True):
            raise ValueError("its setting tie_word_embeddings is neither true nor false")
        if tied is None:
            tied = "lm_head.weight" not in tensors
        if tied and "lm_head.weight" in tensors:
            output = tensors.pop("lm_head.weight")
            embedding = tensors.get("model.embed_tokens.weight")
            if embedding is not None and not _have_same_bytes(output.data, embedding.data):
                raise ValueError("lm_head.weight differs from the embedding, and both are tied")
        draft = replace(
            _hugging_face_config(kind, family, own, tensors),
            tied_embeddings=tied,
            int8_activations=family.name == "BitNet" or packing.quantizes,
        )
        names = {ours: name.transformers for ours, name in tensor_names(draft).items()}
        sources = _sources_of(tensors, names, packing)
        shift = 1.0 if family.model_type == "nemotron" else 0.0
        return _model_of(folder, draft, names, sources, "halves", Provenance(), shift, floats)


def _name_today(name: str) -> str:
    for earlier, today in _EARLIER_NAMES.items():
        if name.endswith(f".{earlier}"):
            return name.removesuffix(earlier) + today
    return name


class _Packing(NamedTuple):
    """How the matrices of a folder are quantized.

    Attributes
    ----------
    quantizes : bool
        Whether activations are rounded to int8.
    online : bool
        Whether float matrices are to be quantized.
    divides : bool
        Whether a product is divided by the scale.
    is_first_bitnet : bool
        Whether it is one of the first BitNets, whose model_type is llama.
    """

    quantizes: bool = False
    online: bool = False
    divides: bool = False
    is_first_bitnet: bool = False

    @classmethod
    def of(cls, own: Settings, kind: str) -> "_Packing":
        """Return that of a folder's settings."""
        settings = own.any("quantization_config")
        if settings is None:
            first = own.any("weight_bits") == 1 and own.any("input_bits") == 8
            return cls(first, first, False, first)
        if not isinstance(settings, dict):
            raise ValueError("its setting quantization_config is not an object")
        about = Settings(settings)
        method = about.text("quant_method")
        if method != "bitnet":
            raise ValueError(f"its quant_method is {method[:100]!r}, expected bitnet")
        about.refuse_unless("linear_class", "bitlinear", "autobitlinear")
        about.refuse_unless("quantization_mode", "offline", "online")
        about.refuse_unless("use_rms_norm", False)
        return cls(
            True,
            about.any("quantization_mode") == "online",
            about.any("linear_class") != "autobitlinear",
        )


def _sources_of(
    tensors: Mapping[str, safetensors_file.Tensor], names: Mapping[str, str], packing: _Packing
) -> dict[str, _Source]:
    """Return the tensors of a folder, without the scales of packed ones, by their names."""
    # Matrices of the blocks, which may be packed.
    inner = {theirs for ours, theirs in names.items() if ours.startswith("blocks.")}
    sources, scales = {}, set()
    for name, tensor in tensors.items():
        with telling(name):
            if tensor.dtype == "U8" and len(tensor.shape) == 2 and name in inner:
                sources[name] = _packed_source(name, tensor, tensors, packing)
                scales.add(f"{name}_scale")
            elif tensor.dtype in FLOAT_TYPES:
                source = _of_type(FLOAT_TYPES[tensor.dtype], tensor.data, tensor.shape)
                if packing.online and name in inner and source.codes is not None:
                    assert source.floats is not None
                    source = source._replace(codes=Masters(source.floats))
                sources[name] = source
            else:
                raise ValueError(f"is {tensor.dtype}, expected F32, F16, BF16 or packed codes")
    return {name: source for name, source in sources.items() if name not in scales}


def _packed_source(
    name: str,
    tensor: safetensors_file.Tensor,
    tensors: Mapping[str, safetensors_file.Tensor],
    packing: _Packing,
) -> _Source:
    if not packing.quantizes:
        raise ValueError("is packed, and config.json has no quantization_config")
    scale = tensors.get(f"{name}_scale")
    if scale is None:
        raise ValueError("is packed, and its weight_scale is missing")
    if scale.dtype not in FLOAT_TYPES or scale.shape not in ((), (1,)):
        raise ValueError(f"has a weight_scale of {scale.dtype}{list(scale.shape)}, not one number")
    number = Floats(FLOAT_TYPES[scale.dtype], scale.data, (1,)).all()[0]
    if number <= 0.0:
        raise ValueError(f"has weight_scale {number}, expected a number above 0")
    if packing.divides:
        with np.errstate(over="ignore"):
            number = np.float32(1.0) / number
    codes = Quarters(tensor.data.reshape(tensor.shape), float(number))
    return _Source(codes.shape, codes, None)


def _hugging_face_config(
    kind: str, family: Family, own: Settings, tensors: Mapping[str, Any]
) -> ModelConfig:
    dim, heads = own.integer("hidden_size"), own.integer("num_attention_heads")
    head_dim = own.integer("head_dim") if "head_dim" in own else _HEAD_DIMS.get(kind)
    sizes = _head_settings(heads, own.integer("num_key_value_heads", heads), dim, head_dim)
    activation = own.text("hidden_act")
    allowed = family.settings["activation"]
    if _ACTIVATIONS.get(activation) not in allowed:
        raise ValueError(f"its hidden_act is {activation[:100]!r}, expected {' or '.join(allowed)}")
    own.refuse_unless("use_sliding_window", False)
    layer_types = own.any("layer_types")
    if layer_types is not None and set(map(str, layer_types)) != {"full_attention"}:
        raise ValueError("its setting layer_types has others than full_attention")
    layer_norm = family.settings["norm"][0] == "layer"
    rope = own.any("rope_parameters") or own.any("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ValueError("its setting rope_scaling is not an object")
    about = Settings(rope)
    base = own.number("rope_theta", about.number("rope_theta", _BASES.get(kind, 10000.0)))
    settings = {
        **_base_settings(family),
        **sizes,
        "vocab_size": own.integer("vocab_size"),
        "model_dim": dim,
        "num_blocks": own.integer("num_hidden_layers"),
        "ffn_dim": own.integer("intermediate_size"),
        "sequence_length": min(own.integer("max_position_embeddings"), _MOST_TOKENS),
        "activation": _ACTIVATIONS[activation],
        "norm_epsilon": own.number("norm_eps" if layer_norm else "rms_norm_eps"),
        "rope_base": base,
        "biases": _biases(family, "model.layers.0.mlp.up_proj.bias" in tensors),
    }
    if kind == "nemotron":
        settings["rope_fraction"] = own.number("partial_rotary_factor", 0.5)
    else:
        own.refuse_unless("partial_rotary_factor", 1, 1.0)
    _add_yarn(settings, about)
    return _config_of(settings)


def _add_yarn(settings: dict[str, Any], about: Settings) -> None:
    """Add the settings of YaRN, if a folder has it."""
    kind = about.any("rope_type") or about.any("type") or "default"
    if kind == "default":
        return
    if kind != "yarn":
        raise ValueError(f"its rope_type is {str(kind)[:100]!r}, expected default or yarn")
    for name, values in _ROPE_NEUTRAL.items():
        about.refuse_unless(name, *values)
    factor = about.number("factor")
    amplitude = 1.0 + 0.1 * math.log(max(factor, 1.0))
    if not math.isclose(about.number("attention_factor", amplitude), amplitude, rel_tol=1e-6):
        raise ValueError("its rope attention_factor is not that of YaRN")
    if factor != 1.0:
        length = about.integer("original_max_position_embeddings", settings["sequence_length"])
        settings |= {"rope_factor": factor, "rope_original_length": length}
