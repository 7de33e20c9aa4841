"""The notebook of docs/: it is stored without outputs, and runs from top to bottom."""

import ast
import importlib.util
import json
import os
import shutil
import subprocess
import sys

import pytest

import legacy1bit
from helpers.paths import ROOT

NOTEBOOK = ROOT / "docs" / "tour.ipynb"

pytestmark = pytest.mark.skipif(
    not NOTEBOOK.exists(), reason="the documents lie beside the source only"
)


def cells_of(path):
    """The cells of code."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def test_the_notebook_is_stored_without_outputs():
    cells = cells_of(NOTEBOOK)
    assert len(cells) > 8
    for cell in cells:
        assert cell["outputs"] == []
        assert cell["execution_count"] is None
        assert cell["metadata"] == {}


def test_names_of_the_notebook_exist():
    used = set()
    for cell in cells_of(NOTEBOOK):
        for node in ast.walk(ast.parse("".join(cell["source"]))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                used |= {node.attr} if node.value.id == "legacy1bit" else set()
    assert {"train", "load"} <= used
    assert used <= {*legacy1bit.__all__}


@pytest.mark.slow
def test_the_notebook_runs(tmp_path):
    for name in ("nbmake", "matplotlib"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    shutil.copy(NOTEBOOK, tmp_path)
    # Away from the settings of these tests, whose warnings are errors.
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    folders = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": folders, "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--nbmake", "--overwrite",
         "--nbmake-timeout=900", NOTEBOOK.name],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1800,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    outputs = [output for cell in cells_of(tmp_path / NOTEBOOK.name) for output in cell["outputs"]]
    printed = "".join("".join(output.get("text", [])) for output in outputs)
    values = [output.get("data", {}) for output in outputs]
    assert "cancelled after " in printed
    assert "done at step " in printed
    # The line of progress is written over.
    assert printed.count("tokens/s") > printed.count("validation loss") >= 2
    assert sum("image/png" in value for value in values) == 1
    assert ["True"] in [value.get("text/plain") for value in values]
    assert not [output for output in outputs if output.get("name") == "stderr"], "it is silent"
