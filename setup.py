"""Build the Cython modules: ``kernels.pyx`` once for each instruction set, the others once.

The environment variable MEASURE_PERFORMANCE=1 builds the kernels' timers in, and CHECKED=debug,
asan, fuzz or trace chooses a build that looks for mistakes and is slow. Generated C, objects and a
note of the flags they were made with lie in ``build/``; other flags rebuild everything.
"""

import itertools
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
from pathlib import Path

import Cython
from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

# The instruction sets and what the compiler needs to hear for each; cpu.h asks for the same
# features at run time. Where there are others, the scalar one is the reference, so the compiler
# may not vectorise it (clang knows these two options as well).
SCALAR = ["-fno-tree-vectorize", "-fno-tree-slp-vectorize"]
TIERS = {
    "scalar": SCALAR,
    "sse": ["-msse", *SCALAR],
    "sse2": ["-msse2"],
    "ssse3": ["-mssse3"],
    "sse41": ["-msse4.1"],
    "avx2": ["-mavx2", "-mfma"],
    "avxvnni": ["-mavx2", "-mfma", "-mavxvnni"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"],
}
TIERS["avx512vnni"] = [*TIERS["avx512"], "-mavx512vnni"]
TIERS["avx512bf16"] = [*TIERS["avx512vnni"], "-mavx512bf16"]
# That with products on the matrix unit, where compiler and system know it.
if sys.platform == "linux":
    TIERS["amx"] = [*TIERS["avx512bf16"], "-mamx-tile", "-mamx-bf16", "-mamx-int8"]
# What is compiled for, which need not be this computer: linux-x86_64, macosx-11.0-arm64, win-amd64.
# A Python for two kinds of Mac would compile for both at once, and one has no AVX.
MACHINE = sysconfig.get_platform().split("-")[-1]
if sys.platform == "darwin" and MACHINE.startswith("universal"):
    MACHINE = platform.machine()
    os.environ.setdefault("ARCHFLAGS", f"-arch {MACHINE}")
if MACHINE in ("aarch64", "arm64"):
    TIERS = {
        "scalar": SCALAR,
        "neon": [],
        "neondot": ["-march=armv8.2-a+dotprod"],
        "i8mm": ["-march=armv8.2-a+dotprod+i8mm"],
    }
elif MACHINE not in ("x86_64", "amd64"):
    TIERS = {"scalar": []}

# These check and call, but for those with loops of their own, which alone are worth -O3. The
# longest comes first, so that no core waits for it in the end.
LOOPS = ("packing", "distributed.compression")
MODULES = [
    "projection",
    "model",
    "forward",
    "packed",
    "packing",
    "inference",
    "backward",
    "math_ops",
    "optimizer",
    "distributed.compression",
    "threads",
    "cpu",
]

# No -ffast-math: infinities and NaN keep their meaning. Contraction is off so that a multiply
# and an add round twice unless a kernel asks for the fused form.
FLAGS = ["-std=c99", "-D_GNU_SOURCE", "-g0", "-ffp-contract=off", "-fno-math-errno"]
FLAGS += ["-Wno-unused-function", "-Wno-unreachable-code"]
if os.environ.get("MEASURE_PERFORMANCE", "0") not in ("", "0"):
    FLAGS.append("-DMEASURE_PERFORMANCE")

DIRECTIVES = {
    "language_level": 3,
    "boundscheck": False,
    "initializedcheck": False,
    "cdivision": True,
    "embedsignature": True,
}

# Builds that look for mistakes: what compiler and Cython are told after all the above. Division by
# 0 and overflow are left to the sanitizer: C's rules are what the code is written for. Where lines
# are counted, two threads may count one for both, but never none, and a function that is inlined
# would be counted twice.
# The one for fuzzing is clang's: it counts which branches are taken, and has libFuzzer's runtime.
# All of them have the matrix unit's tiles in C, where what is read and written can be watched.
SANITIZE = "-fsanitize=address,undefined,float-cast-overflow"
FRAMES = ["-O1", "-g1", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all"]
CHECKS = {
    "": ([], {}),
    "debug": (
        ["-O1", "-UNDEBUG", "-fstack-protector-all"],
        {"boundscheck": True, "initializedcheck": True, "nonecheck": True},
    ),
    "asan": ([*FRAMES, SANITIZE], {}),
    "fuzz": ([*FRAMES, SANITIZE, "-fsanitize=fuzzer-no-link"], {}),
    "trace": (
        ["-O1", "-fno-inline", "-DFORCE_INLINE=static", "--coverage", "-fprofile-update=single"],
        {},
    ),
}
CHECKED = os.environ.get("CHECKED", "")
if CHECKED not in CHECKS:
    sys.exit(f"CHECKED is {CHECKED!r}, expected one of {', '.join(filter(None, CHECKS))}")
DIRECTIVES |= CHECKS[CHECKED][1]
HEADERS = ["include"]
if CHECKED:
    HEADERS.append("tests")
    FLAGS += ["-DEMULATED_TILES", "-Itests"]


def extension(module, source, flags):
    """Return one extension module; it is compiled anew when any header changes."""
    return Extension(
        f"legacy1bit.{module}",
        [f"legacy1bit/{source.replace('.', '/')}.pyx"],
        include_dirs=["include"],
        depends=sorted(str(path) for folder in HEADERS for path in Path(folder).glob("*.h")),
        libraries=["m", "pthread"],
        extra_compile_args=[*FLAGS, *flags, *CHECKS[CHECKED][0]],
        extra_link_args=CHECKS[CHECKED][0],
    )


KERNELS = [
    extension(f"_kernels_{tier}", "kernels", ["-O3", *flags, f"-DLEGACY1BIT_TIER_{tier.upper()}"])
    for tier, flags in TIERS.items()
]


class BuildExt(build_ext):
    """Compile in parallel, and everything when the flags are not those of the last build."""

    def finalize_options(self):
        super().finalize_options()
        self.parallel = self.parallel or True
        if self.editable_mode:
            # pip would give fresh folders every time, and so compile everything every time.
            tag = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
            self.build_lib, self.build_temp = f"build/lib.{tag}", f"build/temp.{tag}"

    def build_extensions(self):
        compiler = self.compiler.compiler_so
        check_tools(compiler[0])
        # A Python that was built by hand looks for its own library where it lies; ours need none.
        linker = [part for part in self.compiler.linker_so if not part.startswith("-Wl,-rpath")]
        self.compiler.linker_so = linker
        self.extensions = [
            module for module in self.extensions if understands(compiler, module.extra_compile_args)
        ]
        arguments = [module.extra_compile_args for module in self.extensions]
        flags = f"{sys.version} {Cython.__version__} {compiler} {linker} {arguments} {DIRECTIVES}"
        note = Path(self.build_temp, "flags")
        self.force = self.force or not note.exists() or note.read_text() != flags
        note.unlink(missing_ok=True)
        self.built, self.in_cython = itertools.count(1), threading.Lock()
        super().build_extensions()
        note.write_text(flags)

    def build_extension(self, module):
        # Cython is for one thread at a time; the others' C is compiled meanwhile. Each module has a
        # folder of its own, because the kernels' modules have one source.
        with self.in_cython:
            [made] = cythonize(
                [module],
                build_dir=str(Path(self.build_temp).parent / "c" / module.name),
                compiler_directives=DIRECTIVES,
                force=self.force,
                emit_linenums=CHECKED in ("asan", "fuzz"),
                quiet=True,
            )
        module.sources = made.sources
        super().build_extension(module)
        count = f"{next(self.built)} of {len(self.extensions)}"
        print(f"{count} modules are built: {module.name}", flush=True)


class BuildPy(build_py):
    """Install the C headers with the package; one that is linked to its source has ``include/``."""

    def run(self):
        super().run()
        if not self.editable_mode:
            folder = Path(self.build_lib, "legacy1bit", "include")
            folder.mkdir(parents=True, exist_ok=True)
            for header in sorted(Path("include").glob("*.h")):
                self.copy_file(str(header), str(folder))


def understands(compiler, flags):
    """Return whether the compiler takes these flags; the newest instruction sets are optional."""
    newest = {
        "-mavxvnni": "AVX-VNNI",
        "-mavx512bf16": "AVX-512 BF16",
        "-mamx-tile": "AMX",
        "-march=armv8.2-a+dotprod+i8mm": "I8MM",
    }
    lacking = [name for flag, name in newest.items() if flag in flags]
    if not lacking:
        return True
    with tempfile.TemporaryDirectory() as folder:
        command = [*compiler, *flags, "-x", "c", "-c", os.devnull]
        known = subprocess.run(command, capture_output=True, cwd=folder).returncode == 0
    if not known:
        print(f"legacy1bit: {compiler[0]} is too old for {lacking[-1]}: built without")
    return known


def check_tools(compiler):
    """Stop with one clear line where the C compiler or Python's header is missing."""
    header = Path(sysconfig.get_path("include"), "Python.h")
    if shutil.which(compiler) is None:
        sys.exit(f"legacy1bit needs a C compiler, and there is no {compiler}: install gcc or clang")
    if not header.exists():
        sys.exit(f"legacy1bit needs Python's C headers, and there is no {header}: see python3-dev")


setup(
    ext_modules=[
        *(extension(name, name, ["-O3" if name in LOOPS else "-O2"]) for name in MODULES),
        *KERNELS,
    ],
    cmdclass={"build_ext": BuildExt, "build_py": BuildPy},
)
