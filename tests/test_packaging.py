"""What an installed package must have besides code that works."""

import importlib.metadata
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import legacy1bit

PACKAGE = Path(legacy1bit.__file__).parent

# What importing the package brings in, beside the standard library and Cython's own.
IMPORTED = """
import sys
before = {name.partition(".")[0] for name in sys.modules}
import legacy1bit
after = {name.partition(".")[0] for name in sys.modules}
new = after - before - sys.stdlib_module_names
print(*sorted(name for name in new if not name.startswith(("_", "cython"))))
"""


def test_version_is_that_of_the_metadata():
    assert legacy1bit.__version__ == importlib.metadata.version("legacy1bit")


def test_console_command_is_main():
    [command] = importlib.metadata.entry_points(group="console_scripts", name="legacy1bit")
    assert command.load() is importlib.import_module("legacy1bit.main").main


def test_every_public_compiled_module_has_a_stub():
    files = PACKAGE.glob(f"[!_]*{EXTENSION_SUFFIXES[0]}")
    compiled = {path.name.partition(".")[0] for path in files}
    assert compiled
    assert compiled == {path.stem for path in PACKAGE.glob("*.pyi")}
    assert (PACKAGE / "py.typed").is_file()


def test_cython_declarations_are_installed():
    declared = {path.stem for path in PACKAGE.glob("*.pxd")}
    assert declared >= {"kernels", "threads", "math_ops", "model", "forward", "backward"}


def test_import_brings_in_nothing_else():
    done = subprocess.run(
        [sys.executable, "-c", IMPORTED], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["legacy1bit"]
