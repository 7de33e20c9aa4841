"""What an installed package must have besides code that works."""

import importlib.metadata
import importlib.util
import io
import os
import pkgutil
import re
import subprocess
import sys
import sysconfig
import tarfile
import tokenize
import tomllib
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest

import legacy1bit
from helpers.paths import ROOT
from helpers.runs import tiny
from legacy1bit.math_ops import simd_levels

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


def test_console_command_is_the_program():
    [command] = importlib.metadata.entry_points(group="console_scripts", name="legacy1bit")
    assert command.load() is importlib.import_module("legacy1bit.main").program


def test_console_command_trains_and_writes(tmp_path):
    program = Path(sysconfig.get_path("scripts"), "legacy1bit")
    if not program.exists():
        pytest.skip("the package is not installed in this environment")
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}

    def run(*arguments):
        done = subprocess.run(
            [program, *arguments], cwd=tmp_path, env=environment, capture_output=True, check=True
        )
        return done.stdout

    assert run("--version").decode().strip().endswith(legacy1bit.__version__)
    run(*tiny(out="run"))
    text = run("generate", "--model", "run", "--prompt", "Kim", "--max-tokens", "9")
    assert text.startswith(b"Kim")
    assert len(text) >= 12


def test_every_public_compiled_module_has_a_stub():
    files = PACKAGE.glob(f"[!_]*{EXTENSION_SUFFIXES[0]}")
    compiled = {path.name.partition(".")[0] for path in files}
    assert compiled
    assert compiled == {path.stem for path in PACKAGE.glob("*.pyi")}
    assert (PACKAGE / "py.typed").is_file()


def test_cython_declarations_are_installed():
    declared = {path.stem for path in PACKAGE.glob("*.pxd")}
    assert declared >= {"kernels", "threads", "math_ops", "model", "forward", "backward"}


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The package's folder as a wheel has it, without what is compiled if the source is here."""
    if not (ROOT / "setup.py").exists():
        return PACKAGE
    if not all(importlib.util.find_spec(name) for name in ("setuptools", "Cython")):
        pytest.skip("a wheel needs setuptools and Cython")
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", folder]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return folder / "legacy1bit"


def test_wheel_has_every_file_of_the_package(installed):
    def files(folder):
        kinds = {".py", ".pyi", ".pxd", ".toml", ".c", ".typed", ".html"}
        paths = (path.relative_to(folder) for path in folder.rglob("*"))
        return {path for path in paths if path.suffix in kinds}

    assert files(installed) == files(PACKAGE)


def test_every_module_can_be_imported():
    names = {one.name for one in pkgutil.walk_packages(legacy1bit.__path__, "legacy1bit.")}
    # Those of wider instruction sets may end the process.
    kernels = {name for name in names if name.startswith("legacy1bit._kernels_")}
    assert kernels >= {f"legacy1bit._kernels_{level}" for level in simd_levels()}
    for name in names - kernels - {"legacy1bit.__main__"}:
        importlib.import_module(name)


def test_wheel_has_every_header_that_a_declaration_names(installed):
    sources = [path.read_text("utf-8") for path in installed.glob("*.pxd")]
    named = set(re.findall(r'cdef extern from "(.+?)"', "\n".join(sources)))
    assert named >= {"team.h"}
    assert named <= {path.name for path in (installed / "include").glob("*.h")}


def test_get_include_has_every_header_of_the_wheel(installed):
    headers = {path.name for path in (installed / "include").glob("*.h")}
    assert headers == {path.name for path in Path(legacy1bit.get_include()).glob("*.h")}


OTHER_MODULE = """
from legacy1bit.inference cimport Decoder
from legacy1bit.threads cimport parallel_for

cdef void add(void *context, long index) noexcept nogil:
    (<long *>context)[0] += index

def total():
    cdef long total = 0
    parallel_for(add, &total, 10, 1)
    return total

def is_decoder(candidate):
    return isinstance(candidate, Decoder)
"""

OTHER_SETUP = """
import sys
from Cython.Build import cythonize
from setuptools import Extension, setup

extension = Extension("other", ["other.pyx"], include_dirs=[sys.argv.pop()])
extension.extra_compile_args = ["-O0"]
modules = cythonize([extension], include_path=[sys.argv.pop()], language_level=3)
setup(name="other", ext_modules=modules)
"""


@pytest.mark.slow
def test_every_declaration_can_be_cimported(installed, tmp_path):
    pytest.importorskip("Cython")
    pytest.importorskip("setuptools")
    cimports = [f"cimport legacy1bit.{path.stem}\n" for path in sorted(installed.glob("*.pxd"))]
    (tmp_path / "other.pyx").write_text("".join(cimports) + OTHER_MODULE)
    (tmp_path / "setup.py").write_text(OTHER_SETUP)
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    command += [installed.parent, installed / "include"]
    made = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert made.returncode == 0, made.stdout + made.stderr
    script = "import other; print(other.total(), other.is_decoder(3))"
    ran = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True)
    assert ran.stdout.split() == [b"45", b"False"], ran.stderr


def test_source_that_is_not_compiled_says_so(tmp_path):
    package = tmp_path / "legacy1bit"
    for path in PACKAGE.glob("**/*.py"):
        copy = package / path.relative_to(PACKAGE)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    said = f"the package in {package} is not compiled: make build, or use the command legacy1bit "
    said += "of an installed one"
    for options, status, last in [
        (["-m", "legacy1bit.main", "info"], 2, f"legacy1bit: error: {said}"),
        (["-c", "import legacy1bit"], 1, f"ImportError: {said}"),
    ]:
        # Without site-packages, where the compiled one is.
        command = [sys.executable, "-S", *options]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert (done.returncode, done.stderr.splitlines()[-1]) == (status, last)
        assert status == 1 or done.stderr.count("\n") == 1


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
    sources = {".py", ".pyi", ".pxd", ".h", ".toml", ".c", ".html"}
    assert kinds == sources | {EXTENSION_SUFFIXES[0], ".typed"}
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
