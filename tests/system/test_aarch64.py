"""The package on ARM CPUs, under QEMU's user-mode emulation: ``make test-aarch64`` makes a Python
for them, and names its folder in LEGACY1BIT_AARCH64."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.models import MODELS, OPTION_MODELS
from helpers.published import golden, with_golden_models
from legacy1bit.data.tokenizer import ByteTokenizer
from legacy1bit.hyperparams import ModelConfig
from legacy1bit.model import create_legacy_llm, save_model

FOLDER = os.environ.get("LEGACY1BIT_AARCH64")
CPUS = {"cortex-a53": "neon", "neoverse-n1": "neondot", "max": "i8mm"}
# Sums of products of floats have other last bits in each instruction set.
SAME = {
    name: options
    for name, options in {**MODELS, **OPTION_MODELS}.items()
    if options.get("scheme") != "float"
}

pytestmark = pytest.mark.skipif(FOLDER is None, reason="LEGACY1BIT_AARCH64 names no Python")


# Two threads, a prompt of several tokens, greedy and random text; and the hidden states of a text.
WRITE_EACH = """
import sys
from legacy1bit import math_ops
from legacy1bit.generator import Generator
from legacy1bit.hyperparams import SamplingConfig
for level in math_ops.simd_levels() if sys.argv[1] == "all" else [math_ops.simd_level()]:
    math_ops.set_simd_level(level)
    print(level, file=sys.stderr)
    for path in sys.argv[2:]:
        with Generator.load(path, threads=2) as generator:
            one = generator.complete("Before we proceed", 24, SamplingConfig(temperature=0)).text
            two = generator.complete("Then", 24, SamplingConfig(temperature=1), seed=1).text
            hidden = generator.embed("Before we proceed, then").tobytes().hex()
            print(ascii(one), ascii(two), hidden)
"""


def written(command, levels, paths):
    """The instruction sets that were used, and what was printed for each of the models."""
    ran = subprocess.run([*command, "-P", "-c", WRITE_EACH, levels, *paths], capture_output=True)
    assert ran.returncode == 0, ran.stderr.decode()
    lines = ran.stdout.splitlines()
    used = ran.stderr.decode().split()
    assert len(lines) == len(used) * len(paths)
    return used, [lines[i : i + len(paths)] for i in range(0, len(lines), len(paths))]


def emulated(cpu):
    root = Path(FOLDER).resolve()
    paths = f"PYTHONPATH={root / 'package'}:{root / 'site'}"
    qemu = ["qemu-aarch64", "-cpu", cpu, "-L", root, "-E", paths]
    return [*qemu, root / "usr/bin/python3.11"]


def same_everywhere(paths, levels):
    _, [expected] = written([sys.executable], "", paths)
    for cpu, widest in CPUS.items():
        used, found = written(emulated(cpu), levels, paths)
        assert used[-1] == widest
        for level, lines in zip(used, found, strict=True):
            for path, line, right in zip(paths, lines, expected, strict=True):
                assert line == right, (cpu, level, path.name)


def test_models_of_every_kind_write_the_same_bytes(tmp_path):
    paths = []
    for index, (name, options) in enumerate(SAME.items()):
        shape = {"model_dim": 36, "num_heads": 3, "num_blocks": 2, "sequence_length": 64}
        config = ModelConfig(**{**shape, **options, "vocab_size": 256})
        paths.append(tmp_path / f"{index} {name}")
        save_model(create_legacy_llm(config, index, trainable=False), paths[-1])
        ByteTokenizer().save(paths[-1])
    same_everywhere(paths, "all")


@with_golden_models
def test_models_of_others_write_the_same_bytes():
    same_everywhere([path for path, _ in golden()], "")
