"""The compilers and CPUs that models as C source are tested with."""

import functools
import shutil
import subprocess

SANITIZERS = ["-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all"]
PENTIUM3 = ["gcc", "-m32", "-march=pentium3", "-static"]
BUILDS = {
    "gcc": ["gcc"],
    "gcc, plain C": ["gcc", "-DUSE_SSE=0"],
    "gcc, sanitizers": ["gcc", *SANITIZERS],
    "gcc, sanitizers, plain C": ["gcc", *SANITIZERS, "-DUSE_SSE=0"],
    "gcc -m32": ["gcc", "-m32"],
    "clang": ["clang"],
    "clang, plain C": ["clang", "-DUSE_SSE=0"],
    "clang -m32": ["clang", "-m32"],
    "Pentium III": [*PENTIUM3, "-mfpmath=sse"],
    "Pentium III, x87": [*PENTIUM3, "-mfpmath=387"],
    "Pentium III, plain C": [*PENTIUM3, "-mfpmath=387", "-DUSE_SSE=0"],
}


@functools.cache
def why_not(build):
    """What is missing to compile and run a build's programs, or an empty text."""
    command = BUILDS[build]
    if shutil.which(command[0]) is None:
        return f"{command[0]} is not installed"
    if "-march=pentium3" in command and shutil.which("qemu-i386") is None:
        return "qemu-i386 is not installed"
    trial = subprocess.run(
        [*command, "-x", "c", "-", "-o", "/dev/null", "-lm"],
        input=b"#include <math.h>\nint main(int n, char **v) { (void)v; return sin(n) > 2.0; }",
        capture_output=True,
    )
    return f"{' '.join(command)} makes no programs here" if trial.returncode else ""
