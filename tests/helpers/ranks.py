"""Programs on several ranks of MPI, on this machine."""

import functools
import importlib.util
import os
import shutil
import subprocess
import sys

import pytest

from helpers.paths import ROOT, TESTS

MPIRUN = shutil.which("mpirun")

needs_mpi = pytest.mark.skipif(
    MPIRUN is None or importlib.util.find_spec("mpi4py") is None,
    reason="mpirun or mpi4py is not here: make test-mpi installs them",
)

# Of Open MPI, which else refuses root, and more ranks than cores; others do not know them.
_SETTINGS = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
    "OMPI_MCA_hwloc_base_binding_policy": "none",
    "OMPI_MCA_mpi_yield_when_idle": "1",
    "OMPI_MCA_btl_base_warn_component_unused": "0",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
}

# Runs several command lines, one after the other.
_COMMANDS = """
import json, sys
from legacy1bit.main import main
for arguments in json.loads(sys.argv[1]):
    status = main(arguments)
    if status:
        sys.exit(status)
"""
COMMANDS = ["-c", _COMMANDS]
PROGRAM = ["-m", "legacy1bit"]


@functools.cache
def environment():
    """The environment of a program on several ranks."""
    paths = [str(ROOT), str(TESTS), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return {**os.environ, **_SETTINGS, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def start(ranks, words, folder, each=()):
    """Start Python on some ranks; ``each`` has words of further ranks, with their variables."""
    command = [MPIRUN, "-n", str(ranks), sys.executable, *map(str, words)]
    for variables, others in each:
        command += [":", "-n", "1", "env", *variables, sys.executable, *map(str, others)]
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def run(ranks, words, folder, status=0, each=(), timeout=300):
    """Run Python on some ranks; return what they say."""
    with start(ranks, words, folder, each) as process:
        try:
            said = process.communicate(timeout=timeout)[0].decode(errors="replace")
        except subprocess.TimeoutExpired:
            process.kill()
            raise AssertionError(process.communicate()[0].decode(errors="replace")) from None
    assert status is None or process.returncode == status, said
    return said
