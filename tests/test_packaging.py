"""What an installed package must have besides code that works."""

import importlib.metadata
import importlib.util
import io
import subprocess
import sys
import tarfile
import tokenize
import tomllib
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest

import legacy1bit

PACKAGE = Path(legacy1bit.__file__).parent
ROOT = Path(__file__).parents[1]

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


def test_console_command_is_the_program():
    [command] = importlib.metadata.entry_points(group="console_scripts", name="legacy1bit")
    assert command.load() is importlib.import_module("legacy1bit.main").program


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


def test_wheel_has_the_package_and_nothing_else():
    files = importlib.metadata.files("legacy1bit")
    if any(path.name.startswith("__editable__") for path in files):
        pytest.skip("what is installed is a link to the source: make test-wheel")
    files = [path for path in files if ".." not in path.parts and path.suffix != ".pyc"]
    info = f"legacy1bit-{legacy1bit.__version__}.dist-info"
    assert {path.parts[0] for path in files} == {"legacy1bit", info}
    kinds = {"".join(path.suffixes) for path in files if path.parts[0] == "legacy1bit"}
    assert kinds == {".py", ".pyi", ".pxd", ".toml", ".c", EXTENSION_SUFFIXES[0], ".typed"}
    assert [path.name for path in files if path.suffix == ".c"] == ["model.c"]


@pytest.mark.skipif(
    PACKAGE.parent == ROOT and not (ROOT / "setup.py").exists(),
    reason="a build that looks for mistakes says where its source is",
)
def test_compiled_modules_tell_nothing_of_the_machine_that_built_them():
    home = str(Path.home())
    told = {str(ROOT), *([home] if home != "/" else [])}
    for path in PACKAGE.glob(f"*{EXTENSION_SUFFIXES[0]}"):
        content = path.read_bytes()
        assert not [place for place in told if f"{place}/".encode() in content], path.name


@pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="there is no source here")
def test_source_distribution_has_the_source_and_nothing_else(tmp_path):
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    if not all(importlib.util.find_spec(name) for name in ("setuptools", "Cython")):
        pytest.skip(f"not installed: {settings['build-system']['requires']}")
    made = subprocess.run(
        [
            *(sys.executable, "setup.py", "-q", "egg_info", "--egg-base", tmp_path),
            *("sdist", "--formats", "tar", "--dist-dir", tmp_path),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert made.returncode == 0, made.stderr
    [archive] = tmp_path.glob("*.tar")
    with tarfile.open(archive) as file:
        found = {name.partition("/")[2] for name in file.getnames()}
    found = {name for name in found if (ROOT / name).is_file()} - {"setup.cfg"}
    known = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if known.returncode:
        pytest.skip("this is no clone of the repository")
    expected = {name for name in known.stdout.splitlines() if not name.startswith(".")}
    assert found == {name for name in expected if (ROOT / name).is_file()}


# What turns data into code, or a file into a connection.
UNSAFE = {
    *("eval", "exec", "compile", "__import__", "pickle", "cPickle", "marshal", "shelve", "dill"),
    *("joblib", "allow_pickle", "cloudpickle", "ctypes", "runpy", "imp", "code", "torch"),
}


def test_hostile_input_cannot_run():
    files = [
        path
        for path in sorted([*PACKAGE.rglob("*.py"), *PACKAGE.rglob("*.pyx")])
        if path.parent.name != "bench"
    ]
    assert len(files) > 30
    for path in files:
        for words in statements(path.read_text("utf-8")):
            assert not unsafe(words), f"{path.name}: {' '.join(words)}"


def statements(source):
    """Yield the names and operators of each statement; Cython's, too."""
    words = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in (tokenize.NAME, tokenize.OP):
            words.append(token.string)
        elif token.type in (tokenize.NEWLINE, tokenize.ENDMARKER):
            yield words
            words = []


def unsafe(words):
    if {"import", "cimport"} & set(words):
        return bool(UNSAFE & set(words))
    calls = (
        word in UNSAFE and after == "(" and before != "."
        for before, word, after in zip(["", *words], words, [*words[1:], ""], strict=False)
    )
    return "allow_pickle" in words or any(calls)


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "import os, pickle", "from os import path, eval as x", "x = 5 + eval(y)",
        "import a.b, marshal as m", "from pickle import (\n    loads,\n)", "exec(code)",
        "np.load(path, allow_pickle=True)", "if x:\n    import pickle", "if x: import pickle",
    ],
)  # fmt: skip
def test_what_could_run_is_found(source):
    assert any(unsafe(words) for words in statements(source))


@pytest.mark.parametrize("source", ["re.compile(x)", "pickled = 1", "model.eval()", "code = 5"])
def test_what_could_not_run_is_not(source):
    assert not any(unsafe(words) for words in statements(source))
