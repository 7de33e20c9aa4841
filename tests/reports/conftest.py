"""A run that the tests of figures and of pages look at, trained once."""

import shutil
from pathlib import Path

import pytest

from helpers.runs import SHORT
from legacy1bit.main import main


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "finished"
    assert main([*SHORT, "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def run(finished, tmp_path, monkeypatch):
    """A copy of a run, to change; the working folder is where it lies."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(finished, tmp_path / "run"))
