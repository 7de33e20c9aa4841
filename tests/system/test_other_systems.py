"""What only Unix has is asked for where it is used: every module can be imported without it."""

import ast
import subprocess
import sys

import pytest

from helpers.paths import ROOT
from legacy1bit.data.tokenizer import ByteTokenizer
from legacy1bit.hyperparams import ModelConfig
from legacy1bit.model import create_legacy_llm, save_model

PACKAGE = ROOT / "legacy1bit"
OF_UNIX = ("fcntl", "grp", "pwd", "resource", "termios", "tty", "readline")
# Imported by these where they are missing, too: in a branch, or where a process is its own.
ASKED_FOR = {
    "system/files.py": {"fcntl"},
    "system/old_cpus.py": {"resource"},
    "training/memory.py": {"resource"},
    "formats/chat_template.py": {"resource"},
    "commands/lines.py": {"readline"},
}

IMPORT_ALL = f"""
import importlib, os, pkgutil, signal, sys
for name in {OF_UNIX!r}:
    sys.modules[name] = None
for name in ("fork", "chown", "O_NONBLOCK", "sched_getaffinity", "register_at_fork"):
    if hasattr(os, name):
        delattr(os, name)
for name in ("SIGHUP", "SIGPROF", "setitimer", "pthread_sigmask"):
    delattr(signal, name)
import legacy1bit
for module in pkgutil.walk_packages(legacy1bit.__path__, "legacy1bit."):
    if not module.name.endswith("__main__") and "._kernels_" not in module.name:
        importlib.import_module(module.name)
from legacy1bit.system.files import atomic_write, held
from legacy1bit.training.memory import free_bytes
from legacy1bit.main import main
os.makedirs(sys.argv[1])
with held(sys.argv[1]):
    atomic_write(os.path.join(sys.argv[1], "file"), "text")
    atomic_write(os.path.join(sys.argv[1], "file"), "another")
    print(open(os.path.join(sys.argv[1], "file")).read())
sys.exit(main(sys.argv[2:]))
"""


def test_every_module_is_imported_and_text_written_without_unix(tmp_path):
    config = ModelConfig(model_dim=12, num_heads=3, num_blocks=1, sequence_length=16)
    save_model(create_legacy_llm(config, 1, trainable=False), tmp_path / "model")
    ByteTokenizer().save(tmp_path / "model")
    words = ["generate", "--model", tmp_path / "model", "--prompt", "abc", "--max-tokens", "5"]
    ran = subprocess.run(
        [sys.executable, "-P", "-c", IMPORT_ALL, tmp_path / "folder", *words],
        capture_output=True,
    )
    assert ran.returncode == 0, ran.stderr.decode()
    assert ran.stdout.startswith(b"another\nabc")


@pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="the source is not here")
def test_modules_of_unix_are_imported_in_known_places():
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in set(names) & set(OF_UNIX):
                found.setdefault(path.relative_to(PACKAGE).as_posix(), set()).add(name)
    assert found == ASKED_FOR
