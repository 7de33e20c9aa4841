"""Small language models with weights of -1, 0 and 1, trained and run on an ordinary CPU.

``train`` and ``load`` are the package as a library (docs/PYTHON.md), ``legacy1bit`` is the command
line. The modules are named after the files of the C program *Legacy-1bit LLM*: ``model``,
``forward`` and ``backward`` are a beginning.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

from legacy1bit.system.errors import refuse_import
from legacy1bit.version import __version__

if TYPE_CHECKING:
    from legacy1bit.api.events import (
        CheckpointEvent,
        EndEvent,
        EvaluationEvent,
        StepEvent,
        TrainingEvent,
    )
    from legacy1bit.api.models import Model, load
    from legacy1bit.api.runs import Cancelled, Run, train
    from legacy1bit.formats.native import ModelFileError
    from legacy1bit.math_ops import set_simd_level, simd_level, simd_levels
    from legacy1bit.training.divergence import TrainingDiverged

__all__ = [
    "Cancelled",
    "CheckpointEvent",
    "EndEvent",
    "EvaluationEvent",
    "Model",
    "ModelFileError",
    "Run",
    "StepEvent",
    "TrainingDiverged",
    "TrainingEvent",
    "__version__",
    "get_include",
    "load",
    "set_simd_level",
    "simd_level",
    "simd_levels",
    "train",
]

# The modules of names that are loaded when they are used first: most need NumPy and the kernels.
_MODULES = {
    **dict.fromkeys(("set_simd_level", "simd_level", "simd_levels"), "math_ops"),
    **dict.fromkeys(
        ("CheckpointEvent", "EndEvent", "EvaluationEvent", "StepEvent", "TrainingEvent"),
        "api.events",
    ),
    **dict.fromkeys(("Model", "load"), "api.models"),
    **dict.fromkeys(("Cancelled", "Run", "train"), "api.runs"),
    "ModelFileError": "formats.native",
    "TrainingDiverged": "training.divergence",
}

try:
    from legacy1bit.system.old_cpus import check_numpy
except ModuleNotFoundError:
    # In the folder of the source, the source hides an installed package.
    refuse_import(
        f"the package in {os.path.dirname(os.path.abspath(__file__))} is not compiled: make build, "
        "or use the command legacy1bit of an installed one"
    )

# Every module but a few imports NumPy.
check_numpy()


def get_include() -> str:
    """Return the folder of the C headers for Cython code that cimports from this package."""
    package = os.path.dirname(os.path.abspath(__file__))
    installed = os.path.join(package, "include")
    if os.path.isdir(installed):
        return installed
    return os.path.join(os.path.dirname(package), "include")


def __getattr__(name: str) -> Any:
    # The kernels are loaded, and LEGACY1BIT_SIMD is read, at the first use: the command line can
    # report a wrong name then.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
