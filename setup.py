"""Build the Cython modules: ``kernels.pyx`` once for each instruction set, the rest once.

The environment variable MEASURE_PERFORMANCE=1 builds the kernels' timers in. The flags of the
last build are kept in ``build/flags``; other flags rebuild everything.
"""

import os
import platform
import shutil
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

os.chdir(Path(__file__).parent)

X86 = platform.machine().lower() in ("x86_64", "amd64")

# The instruction sets and what the compiler needs to hear for each; cpu.h asks for the same
# features at run time. The scalar tier is the reference, so the compiler may not vectorise it.
TIERS = {
    "scalar": ["-fno-tree-vectorize"],
    "sse2": ["-msse2"],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"],
}
if not X86:
    TIERS = {"scalar": []}

MODULES = ["threads", "math_ops", "model", "forward", "backward", "optimizer"]

# No -ffast-math: infinities and NaN keep their meaning. Contraction is off so that a multiply
# and an add round twice unless a kernel asks for the fused form.
FLAGS = ["-O3", "-std=c99", "-D_GNU_SOURCE", "-ffp-contract=off", "-fno-math-errno",
         "-Wno-unused-function", "-Wno-unreachable-code"]
MEASURE = os.environ.get("MEASURE_PERFORMANCE", "0") not in ("", "0")
if MEASURE:
    FLAGS.append("-DMEASURE_PERFORMANCE")

DIRECTIVES = {
    "language_level": 3,
    "boundscheck": False,
    "initializedcheck": False,
    "cdivision": True,
    "embedsignature": True,
}


def write_if_new(path, text):
    """Write ``text`` to ``path`` unless that is what it holds, so that make-like dates stay."""
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return True
    return False


def extensions():
    """Return the extension modules, the kernels' one for each tier first."""
    headers = sorted(str(path) for path in Path("include").glob("*.h"))
    options = {
        "include_dirs": ["include"],
        "depends": headers,
        "libraries": ["m", "pthread"],
    }
    source = Path("legacy1bit/kernels.pyx").read_text(encoding="utf-8")
    made = []
    for tier, flags in TIERS.items():
        copy = Path("build/tiers") / f"_kernels_{tier}.pyx"
        write_if_new(copy, source)
        made.append(Extension(f"legacy1bit._kernels_{tier}", [str(copy)],
                              extra_compile_args=[*FLAGS, *flags,
                                                  f"-DLEGACY1BIT_TIER_{tier.upper()}"],
                              **options))
    for module in MODULES:
        made.append(Extension(f"legacy1bit.{module}", [f"legacy1bit/{module}.pyx"],
                              extra_compile_args=FLAGS, **options))
    return made


class BuildExt(build_ext):
    """Rebuild everything when the flags are not those of the last build."""

    def run(self):
        if write_if_new(Path("build/flags"), repr((TIERS, FLAGS, DIRECTIVES))):
            self.force = True
            shutil.rmtree(self.build_temp, ignore_errors=True)
        super().run()


setup(
    ext_modules=cythonize(extensions(), build_dir="build/c", compiler_directives=DIRECTIVES),
    cmdclass={"build_ext": BuildExt},
)
