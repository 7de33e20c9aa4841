"""The structure: imports run one way, and tests share helpers only; read from the files."""

import ast
import functools
import re
from collections import Counter, defaultdict
from graphlib import TopologicalSorter

import pytest

from helpers.cases import together
from helpers.paths import ROOT, TESTS

PACKAGE = ROOT / "legacy1bit"

in_the_source = pytest.mark.skipif(
    not (ROOT / "setup.py").exists(), reason="the source is not here"
)

# The parts of the package, and the parts that each may import. "engine" is what lies flat; the
# command line is "main", which imports a command when it is called; and so is the package itself,
# which imports the library when that is used.
MAY_IMPORT = {
    "system": set(),
    "distributed": {"system"},
    "engine": {"system", "distributed", "data", "formats"},
    "data": {"system", "engine"},
    "formats": {"system", "engine", "data"},
    "training": {"system", "distributed", "engine", "data", "formats"},
    "search": {"system", "engine", "data", "formats", "training"},
    "reports": {"system", "engine", "data", "formats", "training", "search"},
    "serve": {"system", "engine", "data", "formats"},
    "commands": {
        *("system", "distributed", "engine", "data", "formats", "training", "search", "reports"),
        "serve",
    },
    "api": {"system", "engine", "data", "formats", "training", "commands"},
    "main": {"system", "engine", "formats", "training", "commands", "api"},
}

# Modules, another that each imports against this order, and why.
EXCEPTIONS = {
    ("system.old_cpus", "cpu"): "it runs before NumPy is loaded, and cpu imports nothing",
    ("system.hardware", "math_ops"): "the instruction set in use",
    ("system.hardware", "threads"): "the cores in use",
    ("distributed.compression", "threads"): "codes are made on several threads",
    ("config_files", "training.run"): "the settings of a run are a config file, too",
}


def imports_of_python(source):
    """Yield the names that Python code imports, those of functions included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


CYTHON_IMPORT = re.compile(
    r"^[ \t]*(?:from[ \t]+([\w.]+)[ \t]+c?import[ \t]+(\([^)]*\)|.+)|c?import[ \t]+([\w., \t]+))$",
    re.M,
)


def imports_of_cython(source):
    """Yield the names that the import and cimport lines of Cython code name."""
    for origin, names, modules in CYTHON_IMPORT.findall(source):
        if origin:
            yield from (f"{origin}.{name}" for name in re.findall(r"\w+", names))
        else:
            yield from (words.split()[0] for words in modules.split(","))


def modules():
    """Return the names of the package's modules, each with its files."""
    files = defaultdict(list)
    for path in sorted(PACKAGE.rglob("*")):
        if path.suffix in (".py", ".pyx", ".pxd"):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            files[name.removesuffix(".__init__")].append(path)
    return files


@functools.cache
def imports_of(path):
    """Return the names that a file imports."""
    read = imports_of_python if path.suffix == ".py" else imports_of_cython
    return list(read(path.read_text(encoding="utf-8")))


def graph():
    """Return the names of the modules, each with those of the modules that it imports."""
    files, edges = modules(), {}
    for module, paths in files.items():
        edges[module] = set()
        for name in (name for path in paths for name in imports_of(path)):
            while name and name not in files:
                name = name.rpartition(".")[0]
            if name and name != module:
                edges[module].add(name)
    return edges


def part_of(module):
    """Return the part of the package that a module belongs to."""
    _, *names = module.split(".")
    if names and names[0] in MAY_IMPORT:
        return names[0]
    return "main" if names in ([], ["__main__"]) else "engine"


@in_the_source
def test_every_import_is_seen():
    edges = graph()
    assert "legacy1bit.kernels" in edges["legacy1bit.math_ops"]
    assert "legacy1bit.model" in edges["legacy1bit.forward"]
    assert "legacy1bit.system.errors" in edges["legacy1bit"]
    assert list(imports_of_cython("from a cimport (\n    b,\n    c)\ncimport d.e as f, g\n")) == [
        *("a.b", "a.c"),
        *("d.e", "g"),
    ]


@in_the_source
def test_no_imports_are_circular():
    TopologicalSorter(graph()).prepare()


@in_the_source
def test_imports_run_one_way():
    against = {
        (module.removeprefix("legacy1bit."), other.removeprefix("legacy1bit."))
        for module, others in graph().items()
        for other in others
        if part_of(other) not in {part_of(module), *MAY_IMPORT[part_of(module)]}
    }
    new, gone = sorted(against - set(EXCEPTIONS)), sorted(set(EXCEPTIONS) - against)
    assert not new, "modules, and what they import against the order of MAY_IMPORT"
    assert not gone, "EXCEPTIONS that no module needs any more"


@in_the_source
def test_package_imports_nothing_beside_it():
    beside = {"benchmarks", "tests", "tools", "helpers"}
    for path in (path for paths in modules().values() for path in paths):
        assert not beside & {name.partition(".")[0] for name in imports_of(path)}, path


@in_the_source
def test_few_modules_lie_flat():
    flat = [path for path in PACKAGE.iterdir() if path.suffix in (".py", ".pyx")]
    assert len(flat) <= 24, "what the C program never had belongs in a folder (ARCHITECTURE.md)"


@together("path", sorted(TESTS.rglob("*.py")))
def test_no_test_module_is_imported(path):
    names = {name.partition(".")[0] for name in imports_of_python(path.read_text("utf-8"))}
    imported = {name for name in names if name.startswith("test_") or name == "conftest"}
    assert not imported, f"{path.name} imports a test module: what tests share is in helpers/"


def test_test_modules_have_different_names():
    counts = Counter(path.name for path in TESTS.rglob("test_*.py"))
    several = [name for name, count in counts.items() if count > 1]
    assert not several, "names that two test modules have"
