"""How many instructions decoding a token takes, as callgrind counts them.

Other than time these repeat to the last digit as long as build, libraries and folder stay the same,
no matter what else is running: copying alone depends on where things lie. Callgrind of valgrind
3.19 knows no AVX-512.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.measure import package_environment

NAME, UNIT = "decoding a token", "instructions"
NO_VALGRIND = "valgrind is not installed"
NOT_COUNTED = "not counted"

TOKENS = 16

_CHILD = """
import sys
import numpy as np
from legacy1bit.hyperparams import ModelConfig
from legacy1bit.inference import Decoder
from legacy1bit.model import create_legacy_llm
from legacy1bit.packed import PackedModel

config = ModelConfig(
    model_dim=128, num_blocks=4, num_heads=4, ffn_multiplier=4, sequence_length=64
)
decoder = Decoder(PackedModel(create_legacy_llm(config, 1, trainable=False)))
decoder.generate([1], np.linspace(0.01, 0.99, int(sys.argv[1])))
"""


def _environment(level: str) -> dict[str, str]:
    """Return an environment with nothing in it that changes from run to run: it is on the stack."""
    full = package_environment(LEGACY1BIT_SIMD=level, OPENBLAS_NUM_THREADS="1", PYTHONHASHSEED="0")
    kept = {"PATH", "HOME", "LD_LIBRARY_PATH", "PYTHONPATH", "PYTHONHASHSEED"}
    kept |= {"LEGACY1BIT_SIMD", "OPENBLAS_NUM_THREADS"}
    return {name: value for name, value in full.items() if name in kept}


def count(level: str, tokens: int = TOKENS) -> float | None:
    """Return how many instructions a token takes in an instruction set.

    It is a model of 4 blocks of 128, and all that is between a token and its logits counts.

    Returns
    -------
    float or None
        None where callgrind's CPU lacks the instruction set.
    """
    with tempfile.TemporaryDirectory() as place:
        told = Path(place, "callgrind.out")
        subprocess.run(
            [
                "valgrind",
                "--tool=callgrind",
                f"--callgrind-out-file={told}",
                "--toggle-collect=*forward_tokens*",
                sys.executable,
                "-c",
                _CHILD,
                str(tokens),
            ],
            capture_output=True,
            env=_environment(level),
        )
        # The package refuses to be imported where the CPU lacks the set: nothing is collected then.
        found = re.search(r"^totals: (\d+)", told.read_text() if told.exists() else "", re.M)
    total = int(found[1]) if found else 0
    return total / tokens if total else None


def count_all(
    levels: Sequence[str], times: int = 1
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Count in every instruction set.

    Parameters
    ----------
    levels : sequence of str
    times : int
        How often, which should make no difference.

    Returns
    -------
    dict of str to list of float
        By instruction set the counts.
    dict of str to str
        Why others have none.
    """
    if shutil.which("valgrind") is None:
        return {}, dict.fromkeys(levels, NO_VALGRIND)
    # Once without counting. It leaves Python's modules compiled: compiling them would move what is
    # allocated later, and how that is aligned decides what copying takes.
    subprocess.run([sys.executable, "-c", _CHILD, "1"], env=_environment(levels[-1]), check=True)
    counts: dict[str, list[float]] = {}
    missing: dict[str, str] = {}
    for level in levels:
        for _ in range(times):
            value = count(level)
            if value is None:
                missing[level] = NOT_COUNTED
                break
            counts.setdefault(level, []).append(value)
    return counts, missing
