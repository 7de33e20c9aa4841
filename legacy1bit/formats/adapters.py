"""LoRA adapters: folders of Hugging Face's PEFT, and GGUF files of llama.cpp.

An adapter adds ``scaling B A x`` to the product of a matrix and x (arXiv 2106.09685, equation 3);
PEFT's scaling is ``lora_alpha / r``, or ``lora_alpha / sqrt(r)`` with ``use_rslora``. Only matrices
of the blocks have one. What would be computed otherwise than by PEFT or llama.cpp is refused.
"""

import contextlib
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from legacy1bit.formats.families import Pairs, family_of, row_order, tensor_names
from legacy1bit.formats.ggml import load_gguf
from legacy1bit.formats.gguf_file import is_gguf, read_container
from legacy1bit.formats.native import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILE,
    WEIGHTS_FILE,
    check_finite,
    model_folder,
)
from legacy1bit.formats.provenance import Provenance
from legacy1bit.formats.published import ARCHITECTURES, FLOAT_TYPES, Settings, refusing, telling
from legacy1bit.formats.safetensors_file import read_file
from legacy1bit.formats.tensor_types import Floats
from legacy1bit.hyperparams import SETTINGS_FILE, ModelConfig
from legacy1bit.layout import parameter_layout
from legacy1bit.model import LegacyLLM, TernaryMatrix
from legacy1bit.schemes import FLOAT
from legacy1bit.system.files import (
    atomic_path,
    atomic_write_all,
    read_regular,
    serialize_tensors,
)

_Floats = npt.NDArray[np.float32]

_PEFT_PREFIX = "base_model.model."
_PROVENANCE = "legacy1bit.provenance"
_BASE_MODEL = "general.base_model.0.name"

# Settings of PEFT that are read, or that do not change what a finished adapter computes. All others
# must be empty.
_PEFT_SETTINGS = {
    *("peft_type", "r", "lora_alpha", "lora_dropout", "bias", "use_rslora", "init_lora_weights"),
    *("rank_pattern", "alpha_pattern", "base_model_name_or_path", "target_modules"),
    *("exclude_modules", "layers_to_transform", "layers_pattern", "task_type", "auto_mapping"),
    *("inference_mode", "revision", "peft_version", "runtime_config", "megatron_core"),
    *("loftq_config", "eva_config", "qalora_group_size"),
}
# Ways to begin a training that leave the weights of the model as they are.
_BEGINNINGS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")


class LoraPair(NamedTuple):
    """What an adapter adds to one matrix W: ``W x + scaling b a x``.

    Attributes
    ----------
    a : float32[r, C]
    b : float32[R, r]
        Its rows are those of W, in our order.
    scaling : float
    """

    a: _Floats
    b: _Floats
    scaling: float

    @property
    def rank(self) -> int:
        """The rank r."""
        return len(self.a)

    @property
    def alpha(self) -> float:
        """The scaling as ``lora_alpha``, which is divided by the rank."""
        return self.scaling * self.rank

    def dense(self) -> _Floats:
        """Return what is added to the matrix, float32[R, C]."""
        return np.asarray((np.float32(self.scaling) * self.b) @ self.a, np.float32)


@dataclass(frozen=True)
class LoraWeights:
    """A LoRA adapter.

    Attributes
    ----------
    pairs : mapping of str to LoraPair
        By our names of matrices, such as "blocks.3.attention.wq", in the order of the layout.
    base_model : str
        The name or path of the model that it belongs to; empty: not stated.
    dropout : float
        Of the training.
    provenance : Provenance
        Of the training.
    """

    pairs: Mapping[str, LoraPair]
    base_model: str = ""
    dropout: float = 0.0
    provenance: Provenance = field(default_factory=Provenance)

    @property
    def rank(self) -> int:
        """The largest rank."""
        return max(pair.rank for pair in self.pairs.values())

    @property
    def targets(self) -> tuple[str, ...]:
        """The matrices of a block that have a pair in any, such as "attention.wq"."""
        return tuple(dict.fromkeys(name.split(".", 2)[2] for name in self.pairs))


# The adapters of a model, each with a factor of its own.
Adapters = Sequence[tuple[LoraWeights, float]]


def adaptable(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Return the matrices that an adapter may have, with their shapes (R, C), in layout order."""
    return {
        part.name: (part.shape[0], part.shape[1])
        for part in parameter_layout(config)
        if part.name.startswith("blocks.") and len(part.shape) == 2
    }


def check_adapter(config: ModelConfig, adapter: LoraWeights) -> None:
    """Compare an adapter with a model.

    Raises
    ------
    ValueError
        If it has no matrices, one that the model has not, one of another shape, or a number that
        is not finite.
    """
    if not adapter.pairs:
        raise ValueError("it has no matrices, expected at least one")
    shapes = adaptable(config)
    for name, (a, b, scaling) in adapter.pairs.items():
        if name not in shapes:
            raise ValueError(f"it has the matrix {name}, which the model does not have")
        found = tuple(part.shape for part in (a, b))
        rows, cols = shapes[name]
        if found != ((len(a), cols), (rows, len(a))) or not len(a):
            raise ValueError(
                f"{name} has A of shape {list(a.shape)} and B of shape {list(b.shape)}, expected "
                f"[r, {cols}] and [{rows}, r]: it is an adapter of another model"
            )
        check_finite(f"{name} (A)", a)
        check_finite(f"{name} (B)", b)
        if not abs(scaling) <= float(np.finfo(np.float32).max):
            raise ValueError(f"{name} has the scaling {scaling}, expected a finite number")


def split_scale(text: str) -> tuple[str, float]:
    """Return path and factor of ``PATH[:SCALE]``; by default the factor is 1.

    What ends in a colon and a number and exists is a path.

    Raises
    ------
    ValueError
        If there is no path, or the factor is not a finite number.
    """
    if not text:
        raise ValueError("--adapter is empty, expected a path")
    path, colon, scale = text.rpartition(":")
    try:
        factor = float(scale)
    except ValueError:
        return text, 1.0
    if not colon or not path or os.path.exists(text):
        return text, 1.0
    if not math.isfinite(factor):
        raise ValueError(f"the scale of the adapter {path} is {scale}, expected a finite number")
    return path, factor


def resolve(model: Path, adapters: Sequence[str]) -> tuple[Path, list[tuple[Path, float]]]:
    """Return where a model is, and the adapters on it with their factors.

    Parameters
    ----------
    model : Path
        A model; or a run that has trained an adapter, which stands for its model and that.
    adapters : sequence of str
        Each as ``PATH[:SCALE]``.

    Raises
    ------
    ValueError
        If a factor is no finite number, or the model of an adapter is not named, or not there.
    """
    named = [(Path(path), factor) for path, factor in map(split_scale, adapters)]
    if not (model / ADAPTER_CONFIG_FILE).is_file() or (model / WEIGHTS_FILE).exists():
        return model, named
    base = None
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        base = json.loads(read_regular(model / SETTINGS_FILE))["source"]["from"]
    if not isinstance(base, str) or not base:
        raise ValueError(
            f"{model} is an adapter: name its model with --model, and this with --adapter"
        )
    if not Path(base).exists():
        raise ValueError(
            f"{base} is not there, the model of the adapter {model}: name its new place with "
            "--model, and the adapter with --adapter"
        )
    return Path(base), [(model, 1.0), *named]


def read_adapters(
    named: Sequence[tuple[Path, float]], config: ModelConfig
) -> dict[str, tuple[_Floats, _Floats]]:
    """Return the sum of adapters as ``LegacyLLM.with_adapter`` takes it; errors are theirs."""
    pairs = combine(each_adapter(named, config)).pairs
    return {name: (pair.a, pair.b) for name, pair in pairs.items()}


def each_adapter(
    named: Sequence[tuple[Path, float]], config: ModelConfig
) -> list[tuple[LoraWeights, float]]:
    """Read adapters of a model, each with its factor; errors are those of ``read_adapter``."""
    return [(read_adapter(path, config), factor) for path, factor in named]


# --- Several adapters; merging --------------------------------------------------------------------


def combine(adapters: Adapters) -> LoraWeights:
    """Return several adapters as one that computes their sum.

    Parameters
    ----------
    adapters : sequence of (LoraWeights, float)
        Each is multiplied by its factor.

    Returns
    -------
    LoraWeights
        Their matrices, stacked along the rank; all scalings are in B.

    Raises
    ------
    ValueError
        If a number times its factor is not finite.
    """
    stacks: dict[str, list[tuple[_Floats, _Floats]]] = {}
    for adapter, factor in adapters:
        for name, pair in adapter.pairs.items():
            with np.errstate(all="ignore"):
                scaled = np.float32(factor * pair.scaling) * pair.b
            check_finite(f"{name} (B, scaled)", scaled)
            stacks.setdefault(name, []).append((pair.a, scaled))
    return LoraWeights(
        {
            name: LoraPair(
                np.concatenate([a for a, _ in stack]),
                np.concatenate([b for _, b in stack], axis=1),
                1.0,
            )
            for name, stack in stacks.items()
        }
    )


def merge(
    config: ModelConfig, parameters: Mapping[str, TernaryMatrix | _Floats], adapters: Adapters
) -> dict[str, _Floats]:
    """Return the parameters of a model with adapters added to its matrices.

    Parameters
    ----------
    config : ModelConfig
    parameters : mapping of str to float32 array or TernaryMatrix
    adapters : sequence of (LoraWeights, float)
        Each is multiplied by its factor.

    Returns
    -------
    dict of str to float32 array
        All parameters, those without an adapter as they are: codes times scales, or numbers.

    Raises
    ------
    ValueError
        If an adapter is of another model, or a sum is not finite.
    """
    for adapter, _ in adapters:
        check_adapter(config, adapter)
    added = combine(adapters).pairs
    merged = {}
    for name, value in parameters.items():
        numbers = value if isinstance(value, np.ndarray) else value.dense()
        if name in added:
            with np.errstate(all="ignore"):
                numbers = numbers + added[name].dense()
            check_finite(name, numbers)
        merged[name] = numbers
    return merged


def merged_model(model: LegacyLLM, adapters: Adapters) -> LegacyLLM:
    """Return a model of scheme float that has adapters in its weights; see ``merge``."""
    parameters = merge(model.config, model.parameters, adapters)
    result = LegacyLLM(replace(model.config, scheme=FLOAT))
    result.provenance = model.provenance
    for name, value in result.parameters.items():
        assert isinstance(value, np.ndarray)
        value[...] = parameters[name]
    return result


# --- Reading --------------------------------------------------------------------------------------


def read_adapter(path: str | os.PathLike[str], config: ModelConfig) -> LoraWeights:
    """Read an adapter of a model: a folder of PEFT, or a GGUF file of llama.cpp.

    Parameters
    ----------
    path : path-like
    config : ModelConfig
        The model's settings.

    Returns
    -------
    LoraWeights
        With rows in the order of the model.

    Raises
    ------
    ModelFileError
        If it is damaged, an adapter of another model, or one that would not be computed right.
    OSError
        If it cannot be read.
    """
    path = Path(path)
    with refusing(path):
        if path.is_file() and not is_gguf(path):
            raise ValueError("it is neither a folder of PEFT nor a GGUF file")
        # Of a run that of its best step.
        adapter = (
            _read_peft(model_folder(path), config) if path.is_dir() else _read_gguf(path, config)
        )
        names = adaptable(config)
        pairs = {name: adapter.pairs[name] for name in names if name in adapter.pairs}
        adapter = replace(adapter, pairs=pairs)
        check_adapter(config, adapter)
    return adapter


def _read_peft(folder: Path, config: ModelConfig) -> LoraWeights:
    if not (folder / ADAPTER_CONFIG_FILE).exists():
        raise ValueError(f"it is no adapter: it has no {ADAPTER_CONFIG_FILE}")
    content = json.loads(read_regular(folder / ADAPTER_CONFIG_FILE))
    if not isinstance(content, dict):
        raise ValueError(f"{ADAPTER_CONFIG_FILE} holds no JSON object")
    own = Settings(content)
    _check_peft_settings(own, content)
    if not (folder / ADAPTER_FILE).exists():
        pickled = ADAPTER_FILE.replace(".safetensors", ".bin")
        if (folder / pickled).exists():
            raise ValueError(
                f"{pickled} is a pickle, which is not read because it could run any code: expected "
                f"weights in {ADAPTER_FILE}"
            )
        raise ValueError(f"it has no {ADAPTER_FILE}")
    tensors, header = read_file(folder / ADAPTER_FILE)
    names = tensor_names(config)
    modules = {_module(names[ours].transformers): ours for ours in adaptable(config)}
    found: dict[str, dict[str, Floats]] = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", name)
        ours = modules.get(match[1]) if match else None
        if match is None or ours is None:
            raise ValueError(
                f"it has the tensor {name[:200]}, expected lora_A and lora_B of matrices in the "
                "model's blocks only"
            )
        if tensor.dtype not in FLOAT_TYPES:
            raise ValueError(f"{name} is {tensor.dtype}, expected F32, F16 or BF16")
        kind = FLOAT_TYPES[tensor.dtype]
        found.setdefault(ours, {})[match[2]] = Floats(kind, tensor.data, tensor.shape)
    rank, alpha = own.integer("r"), own.number("lora_alpha")
    pairs = {}
    for ours, parts in found.items():
        module = _module(names[ours].transformers)
        a, b = _both(ours, parts)
        expected = _by_pattern(own, "rank_pattern", module, rank)
        if len(a) != expected:
            raise ValueError(f"{module} has rank {len(a)}, expected {expected} by its settings")
        divisor = math.sqrt(len(a)) if own.any("use_rslora") else len(a)
        scaling = _by_pattern(own, "alpha_pattern", module, alpha) / divisor
        pairs[ours] = LoraPair(a, _in_our_order(config, ours, b, "halves"), scaling)
    return LoraWeights(
        pairs,
        own.text("base_model_name_or_path", ""),
        own.number("lora_dropout", 0.0),
        Provenance.from_json(header.get("provenance", "{}")),
    )


def _check_peft_settings(own: Settings, content: Mapping[str, Any]) -> None:
    """Refuse settings of PEFT with which an adapter computes something else."""
    kind = own.text("peft_type")
    if kind != "LORA":
        raise ValueError(f"its peft_type is {kind[:100]!r}, expected LORA")
    if own.any("use_dora"):
        raise ValueError("it is a DoRA adapter (use_dora), expected plain LoRA")
    own.refuse_unless("bias", "none")
    own.refuse_unless("use_rslora", True, False)
    beginning = own.any("init_lora_weights")
    if beginning not in _BEGINNINGS:
        raise ValueError(
            f"its init_lora_weights is {str(beginning)[:100]!r}, which changes the weights of the "
            "model: save it as plain LoRA (path_initial_model_for_weight_conversion of PEFT)"
        )
    for name, value in content.items():
        if name not in _PEFT_SETTINGS and value not in (None, False, [], {}, ""):
            raise ValueError(
                f"its setting {name[:100]} is {json.dumps(value)[:100]}, expected none: it could "
                "change what the adapter computes"
            )


def _by_pattern(own: Settings, name: str, module: str, default: Any) -> Any:
    """Return the number of a module, which PEFT looks up by the end of the module's name."""
    patterns = own.any(name) or {}
    if not isinstance(patterns, dict):
        raise ValueError(f"its setting {name} is not an object")
    about = Settings(patterns)
    for pattern in patterns:
        # PEFT takes any regular expression, and some never end.
        if not re.fullmatch(r"\^?[\w.]+\$?", pattern):
            raise ValueError(f"its {name} has {pattern[:100]!r}, expected names of modules")
        ending = pattern.removeprefix("^").removesuffix("$")
        if module == ending or (pattern[0] != "^" and module.endswith(f".{ending}")):
            return about.integer(pattern) if name == "rank_pattern" else about.number(pattern)
    return default


def _read_gguf(path: Path, config: ModelConfig) -> LoraWeights:
    keys, tensors = read_container(path)
    own = Settings(keys)
    for name, expected in (("general.type", "adapter"), ("adapter.type", "lora")):
        if own.text(name, "model") != expected:
            raise ValueError(f"its key {name} is {own.text(name, 'model')[:100]!r}, not {expected}")
    if "adapter.alora.invocation_tokens" in own:
        raise ValueError("it is an aLoRA adapter, which begins at certain tokens, not plain LoRA")
    architecture = own.text("general.architecture")
    family = ARCHITECTURES[architecture][0] if architecture in ARCHITECTURES else None
    if family is None or not family.fits(config):
        raise ValueError(f"it is an adapter of {architecture[:100]!r}, and the model is another")
    names = tensor_names(config)
    matrices = {names[ours].llama_cpp: ours for ours in adaptable(config)}
    found: dict[str, dict[str, Floats]] = {}
    for name, tensor in tensors.items():
        theirs, _, part = name.rpartition(".lora_")
        ours = matrices.get(theirs)
        if part not in ("a", "b") or ours is None:
            raise ValueError(
                f"it has the tensor {name[:200]}, expected lora_a and lora_b of matrices in the "
                "model's blocks only"
            )
        if tensor.kind.is_ternary:
            raise ValueError(f"{name} is {tensor.kind.name}, expected floats")
        found.setdefault(ours, {})[part.upper()] = Floats(tensor.kind, tensor.data, tensor.shape)
    alpha = own.number("adapter.lora.alpha", 0.0)
    pairs = {}
    for ours, parts in found.items():
        a, b = _both(ours, parts)
        # llama.cpp does the same: without alpha the product is taken as it is.
        scaling = alpha / len(a) if alpha else 1.0
        pairs[ours] = LoraPair(a, _in_our_order(config, ours, b, family.llama_cpp_pairs), scaling)
    return LoraWeights(
        pairs,
        own.text(_BASE_MODEL, ""),
        provenance=Provenance.from_json(own.text(_PROVENANCE, "{}")),
    )


def _module(tensor: str) -> str:
    return tensor.removesuffix(".weight")


def _both(name: str, parts: Mapping[str, Floats]) -> tuple[_Floats, _Floats]:
    """Return A and B of a matrix."""
    for part in "AB":
        if part not in parts:
            raise ValueError(f"{name} has no {part}")
        if len(parts[part].shape) != 2:
            raise ValueError(f"{name} has {part} of shape {list(parts[part].shape)}")
    with telling(name):
        return parts["A"].all(), parts["B"].all()


def _in_our_order(config: ModelConfig, name: str, b: _Floats, pairs: Pairs) -> _Floats:
    """Return the rows of B in our order of the matrix, if their number is right."""
    order = row_order(config, name, pairs)
    if order is None or len(b) != len(order):
        return b
    result = np.empty_like(b)
    result[order] = b
    return result


# --- Writing --------------------------------------------------------------------------------------


def write_peft(
    adapter: LoraWeights,
    config: ModelConfig,
    folder: str | os.PathLike[str],
    beside: bool = False,
) -> None:
    """Write an adapter as a folder of Hugging Face's PEFT.

    Parameters
    ----------
    adapter : LoraWeights
    config : ModelConfig
        The model's settings.
    folder : path-like
        A new or empty folder, or one with an adapter, which is replaced.
    beside : bool
        Whether the folder may hold something else, too.

    Raises
    ------
    ValueError
        If the adapter is not of such a model, or the folder holds something else.
    OSError
        If a file cannot be written; an earlier adapter is untouched.
    """
    check_adapter(config, adapter)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if not beside and any(folder.iterdir()) and not (folder / ADAPTER_CONFIG_FILE).exists():
        raise ValueError(f"{folder} holds something else than an adapter: choose another")
    names = tensor_names(config)
    modules = {ours: _module(names[ours].transformers) for ours in adapter.pairs}
    tensors = {}
    for ours, pair in adapter.pairs.items():
        name = f"{_PEFT_PREFIX}{modules[ours]}"
        tensors[f"{name}.lora_A.weight"] = pair.a
        tensors[f"{name}.lora_B.weight"] = _in_their_order(config, ours, pair.b, "halves")
    first = next(iter(adapter.pairs.values()))
    content = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base_model or None,
        "inference_mode": True,
        "r": first.rank,
        "lora_alpha": _plain(first.alpha),
        "lora_dropout": adapter.dropout,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": _target_modules(config, adapter, modules),
        "rank_pattern": {
            modules[ours]: pair.rank
            for ours, pair in adapter.pairs.items()
            if pair.rank != first.rank
        },
        "alpha_pattern": {
            modules[ours]: _plain(pair.alpha)
            for ours, pair in adapter.pairs.items()
            if pair.alpha != first.alpha
        },
    }
    header = {"format": "pt", "provenance": json.dumps(adapter.provenance.to_dict())}
    atomic_write_all(
        {
            folder / ADAPTER_FILE: serialize_tensors(tensors, header),
            folder / ADAPTER_CONFIG_FILE: json.dumps(content, indent=2) + "\n",
        }
    )


def _plain(number: float) -> int | float:
    """Return a whole number as an integer, which is what older versions of PEFT expect."""
    return int(number) if number.is_integer() else number


def _target_modules(
    config: ModelConfig, adapter: LoraWeights, modules: Mapping[str, str]
) -> list[str]:
    """Return the names by which PEFT finds the matrices: short ones where all blocks have them."""
    if len(adapter.pairs) < config.num_blocks * len(adapter.targets):
        return list(modules.values())
    return list(dict.fromkeys(name.rpartition(".")[2] for name in modules.values()))


def write_gguf(adapter: LoraWeights, config: ModelConfig, path: str | os.PathLike[str]) -> None:
    """Write an adapter as a GGUF file of llama.cpp.

    Parameters
    ----------
    adapter : LoraWeights
    config : ModelConfig
        The model's settings.
    path : path-like
        The file; an existing one is replaced.

    Raises
    ------
    ValueError
        If the adapter is not of such a model, llama.cpp does not have such models, or gguf is not
        installed.
    OSError
        If the file cannot be written; an earlier one is untouched.
    """
    gguf = load_gguf()
    family = family_of(config, "llama_cpp")
    check_adapter(config, adapter)
    names = tensor_names(config)
    # A file has one alpha; where matrices differ, or it is 0, which means none, B has the scaling.
    alphas = {pair.alpha for pair in adapter.pairs.values()}
    alpha = alphas.pop() if len(alphas) == 1 else 0.0
    with (
        atomic_path(path) as temporary,
        contextlib.closing(gguf.GGUFWriter(temporary, family.architecture)) as writer,
    ):
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", alpha)
        if adapter.base_model:
            writer.add_uint32("general.base_model.count", 1)
            # Bytes that were not UTF-8 become question marks.
            writer.add_string(_BASE_MODEL, adapter.base_model.encode(errors="replace").decode())
        writer.add_string(_PROVENANCE, json.dumps(adapter.provenance.to_dict()))
        for ours, pair in adapter.pairs.items():
            b = pair.b if alpha else np.float32(pair.scaling) * pair.b
            theirs = names[ours].llama_cpp
            writer.add_tensor(f"{theirs}.lora_a", np.ascontiguousarray(pair.a))
            writer.add_tensor(
                f"{theirs}.lora_b", _in_their_order(config, ours, b, family.llama_cpp_pairs)
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()


def _in_their_order(config: ModelConfig, name: str, b: _Floats, pairs: Pairs) -> _Floats:
    order = row_order(config, name, pairs)
    return np.ascontiguousarray(b if order is None else b[order])
