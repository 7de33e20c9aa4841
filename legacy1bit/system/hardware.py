"""Describe the hardware: CPU, cores, instruction set."""

import json
import os
import platform
from pathlib import Path
from typing import Any

from legacy1bit.hyperparams import SETTINGS_FILE
from legacy1bit.math_ops import simd_level
from legacy1bit.system.files import read_regular
from legacy1bit.threads import available_cores


def cpu_name(table: str | os.PathLike[str] = "/proc/cpuinfo") -> str:
    """Return the name of the CPU."""
    try:
        # Virtual machines may give it any name.
        text = Path(table).read_text(encoding="utf-8", errors="replace")
        for line in text.splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def machine() -> dict[str, Any]:
    """Return a description of this computer, as runs record it."""
    return {
        "cpu": cpu_name(),
        "cores": available_cores(),
        "instruction_set": simd_level(),
        "system": platform.system(),
        "python": platform.python_version(),
    }


def read_machine(folder: Path) -> dict[str, Any]:
    """Return the recorded computer of a run; runs of earlier versions have none."""
    recorded = json.loads(read_regular(folder / SETTINGS_FILE)).get("machine")
    return recorded if isinstance(recorded, dict) else {}
