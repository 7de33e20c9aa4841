"""The documents: their links, commands, options, make targets and examples are right."""

import argparse
import contextlib
import io
import re
import shlex
from itertools import chain

import numpy as np
import pytest

from helpers import oracle
from helpers.paths import ROOT
from legacy1bit.api.output import logger
from legacy1bit.main import COMMANDS, main, parser_of

DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])

pytestmark = pytest.mark.skipif(
    not (ROOT / "README.md").exists(), reason="the documents lie beside the source only"
)
every_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
# The changelog keeps the names of its day.
every_lasting_document = pytest.mark.parametrize(
    "document",
    [path for path in DOCUMENTS if path.name != "CHANGELOG.md"],
    ids=lambda path: path.name,
)


def text_of(document):
    return document.read_text(encoding="utf-8")


FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
INDENTED = re.compile(r"(?<=\n\n)(?: {4}.*\n)+")


def blocks_of(text, language=""):
    """The code blocks of a language; those without one are fenced or indented."""
    blocks = [block for name, block in FENCED.findall(text) if name == language]
    return blocks if language else blocks + INDENTED.findall(FENCED.sub("", text))


def prose_of(text):
    """A document without its code blocks."""
    return INDENTED.sub("", FENCED.sub("", text))


def spans_of(text):
    """What stands between backquotes."""
    return re.findall(r"`([^`\n]+)`", prose_of(text))


@pytest.mark.parametrize(("name", "most"), [("README.md", 10_240), ("docs/SPEED.md", 12_288)])
def test_document_is_short(name, most):
    assert (ROOT / name).stat().st_size <= most


# --- Links ----------------------------------------------------------------------------------------


def anchors_of(text):
    """The anchors that GitHub makes of a document's headings."""
    anchors = set()
    for heading in re.findall(r"^#+ (.+)$", prose_of(text), re.M):
        words = re.sub(r"[^\w\- ]", "", heading.lower())
        anchors.add(words.replace(" ", "-"))
    return anchors


@every_document
def test_links_lead_somewhere(document):
    prose = re.sub(r"`[^`\n]*`", "code", prose_of(text_of(document)))
    links = re.findall(r"\]\(([^)\s]+)\)", prose)
    for link in links:
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = document.parent / path if path else document
        assert target.exists(), link
        assert not anchor or anchor in anchors_of(text_of(target)), link


def test_every_document_is_linked_from_the_readme():
    links = set(re.findall(r"\]\(([^)#\s]+)", text_of(ROOT / "README.md")))
    links |= {"README.md", "CHANGELOG.md"}
    missing = sorted({str(path.relative_to(ROOT)) for path in DOCUMENTS} - links)
    assert not missing, "documents that README.md does not link to"


# --- Commands -------------------------------------------------------------------------------------


def commands_of(block):
    """The command lines of this program in a block of code, as lists of words."""
    for line in block.replace("\\\n", " ").splitlines():
        line = line.strip().removeprefix("$ ")
        if not re.search(r"(^|\| )(legacy1bit|python -m legacy1bit.main)( |$)", line):
            continue
        words = shlex.split(line, comments=True)
        for part in " ".join(map(shlex.quote, words)).split(" '|' "):
            part = shlex.split(part)
            if ">" in part:
                part = part[: part.index(">")]
            if part[:1] == ["legacy1bit"]:
                yield part[1:]
            elif part[:3] == ["python", "-m", "legacy1bit.main"]:
                yield part[3:]


@every_lasting_document
def test_commands_are_understood(document):
    for words in chain.from_iterable(map(commands_of, blocks_of(text_of(document)))):
        if words:
            parser_of(words[0]).parse_args(words)


def options_of(parser):
    for action in parser._actions:
        yield from action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            yield from chain.from_iterable(map(options_of, action.choices.values()))


OPTIONS = {command: set(options_of(parser_of(command))) for command in COMMANDS}


@every_lasting_document
def test_options_exist(document):
    every = set().union(*OPTIONS.values())
    for span in spans_of(text_of(document)):
        command, _, rest = span.removeprefix("legacy1bit ").partition(" ")
        if span.startswith("--"):
            assert set(re.findall(r"--[a-z][\w-]*", span)) <= every, span
        elif command in COMMANDS:
            assert set(re.findall(r"--[a-z][\w-]*", rest)) <= OPTIONS[command], span
        else:
            assert not span.startswith("legacy1bit "), span


def targets_of(texts):
    return set(re.findall(r"\bmake ([a-z]+(?:-[a-z0-9]+)*)", "\n".join(texts)))


@every_lasting_document
def test_make_targets_exist(document):
    known = set(" ".join(re.findall(r"^\.PHONY: (.*)", text_of(ROOT / "Makefile"), re.M)).split())
    text = text_of(document)
    assert targets_of([*spans_of(text), *blocks_of(text)]) <= known


def test_contributing_lists_every_target():
    listed = targets_of(re.findall(r"@echo '(.*)'", text_of(ROOT / "Makefile")))
    missing = sorted(listed - targets_of(spans_of(text_of(ROOT / "CONTRIBUTING.md"))))
    assert not missing, "targets of make help that CONTRIBUTING.md lacks"


def test_names_of_contributing_exist():
    """Of functions, constants and files, wherever in the sources."""
    kinds = {".py", ".pyx", ".pxd", ".pyi", ".h", ".c", ".toml"}
    folders = ("legacy1bit", "include", "tests", "benchmarks", "tools")
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    paths = [path for path in [*ROOT.iterdir(), *paths] if path.suffix in kinds]
    here = [path for path in paths if path.name != "test_documents.py"]
    known = {path.name for path in paths}
    known.update(*(re.findall(r"\w+", path.read_text(encoding="utf-8")) for path in here))
    spans = spans_of(text_of(ROOT / "CONTRIBUTING.md"))
    names = [span for span in spans if re.fullmatch(r"[\w.]*\w\w", span) and span[0] != "."]
    lost = [name for name in names if name not in known and not known.issuperset(name.split("."))]
    assert not lost, "names in CONTRIBUTING.md that the sources do not have"


# --- Examples -------------------------------------------------------------------------------------


def run(code, names):
    """Execute a block of code, and return what it prints."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        exec(compile(code, "a document", "exec"), names)
    return output.getvalue()


@pytest.fixture(scope="module")
def learned():
    """The names that LEARN.md defines, and its blocks' outputs beside what it says they are."""
    text = text_of(ROOT / "docs/LEARN.md")
    names, outputs = {}, []
    pair = r"^```python\n(.*?)^```\n(?:```text\n(.*?)^```$)?"
    for code, said in re.findall(pair, text, re.M | re.S):
        outputs.append((run(code, names), said))
    return names, outputs


def test_learn_prints_what_it_says(learned):
    _, outputs = learned
    assert len(outputs) > 5
    for printed, said in outputs:
        assert printed == said


def test_learn_computes_what_the_oracle_does(learned):
    page, _ = learned
    rng = np.random.default_rng(0)
    weight, x, d_output = rng.normal(size=(3, 5)), rng.normal(size=(4, 5)), rng.normal(size=(4, 3))
    codes, scales = oracle.quantize(weight)
    np.testing.assert_array_equal(page["quantize"](weight)[0], codes)
    assert page["quantize"](weight)[1] == scales
    bias = rng.normal(size=3)
    np.testing.assert_array_equal(page["linear"](x, weight, bias), oracle.linear(x, weight, bias))
    for ours, its in zip(
        page["linear_backward"](d_output, x, weight),
        oracle.linear_backward(d_output, x, weight),
        strict=True,
    ):
        np.testing.assert_allclose(ours, its, rtol=1e-14)
    for ours, its in zip(page["round_to_int8"](x), oracle.round_to_int8(x), strict=True):
        np.testing.assert_array_equal(ours, its)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a model in runs/mine."""
    folder = tmp_path_factory.mktemp("examples")
    sizes = "--stories 20 --steps 2 --model-dim 8 --blocks 1 --heads 2 --sequence-length 64"
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        main(["train", *sizes.split(), "--out", str(folder / "runs/mine")])
    return folder


@pytest.mark.parametrize("name", ["README.md", "docs/PYTHON.md"])
def test_examples_run(name, folder, monkeypatch):
    monkeypatch.chdir(folder)
    # Handlers and levels that an example sets end with it.
    monkeypatch.setattr(logger, "handlers", [*logger.handlers])
    monkeypatch.setattr(logger, "level", logger.level)
    names = {}
    blocks = blocks_of(text_of(ROOT / name), "python")
    assert blocks
    for block in blocks:
        run(block, names)


def test_first_test_of_contributing_passes(tier):
    [code] = blocks_of(text_of(ROOT / "CONTRIBUTING.md"), "python")
    names = {}
    run(code, names)
    for size in (1, 7, 97):
        names["test_relu2_is_correctly_rounded"](tier, size)
    names["test_relu2_refuses_an_empty_vector"]()


# --- The map --------------------------------------------------------------------------------------


def files_of_map(text):
    """The files of the package and its headers that ARCHITECTURE.md lists, by its indentation."""
    [tree] = [block for block in blocks_of(text) if block.startswith("include/")]
    top = folder = ""
    for line in filter(None, tree.splitlines()):
        indent = len(line) - len(line.lstrip())
        words = re.sub(r"\[.*?\]", "", line).split()
        if indent == 0:
            top, folder = words[0], ""
        elif indent == 2:
            folder = words[0] if words[0].endswith("/") else ""
        for word in words:
            if re.fullmatch(r"\w+\.(py|pyx|h|c|toml)", word):
                yield top + folder + word


def test_the_map_has_every_file():
    known = {
        str(path.relative_to(ROOT))
        for kind in ("include/*.h", "legacy1bit/**/*.py", "legacy1bit/**/*.pyx",
                     "legacy1bit/**/*.toml", "legacy1bit/formats/*.c")
        for path in ROOT.glob(kind)
        if path.name != "__init__.py"
    }  # fmt: skip
    listed = set(files_of_map(text_of(ROOT / "docs/ARCHITECTURE.md")))
    missing, gone = sorted(known - listed), sorted(listed - known)
    assert not missing, "files that the map in docs/ARCHITECTURE.md lacks"
    assert not gone, "files in the map in docs/ARCHITECTURE.md that do not exist"
