"""The compilers and CPUs that models as C source are tested with."""

import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

SANITIZERS = ["-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all"]
PENTIUM3 = ["gcc", "-m32", "-march=pentium3", "-static"]
ARMV6 = ["-march=armv6", "-mfpu=vfp", "-mfloat-abi=softfp", "-static"]
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
    # A Raspberry Pi Zero; a Raspberry Pi 3; Windows.
    "ARMv6": ["arm-linux-gnueabi-gcc", *ARMV6],
    "aarch64": ["aarch64-linux-gnu-gcc", "-static"],
    "Windows": ["x86_64-w64-mingw32-gcc"],
    "Windows, 32 bits": ["i686-w64-mingw32-gcc"],
}
# Debian's wine64 alone puts nothing on the PATH.
WINE = shutil.which("wine") or "/usr/lib/wine/wine64"
EMULATORS = {
    **{name: ["qemu-i386", "-cpu", "pentium3"] for name in BUILDS if name.startswith("Pentium")},
    "ARMv6": ["qemu-arm", "-cpu", "arm1176"],
    "aarch64": ["qemu-aarch64", "-cpu", "cortex-a53"],
    "Windows": [WINE],
    "Windows, 32 bits": [WINE],
}
TRIAL = b"""
#include <errno.h>
#include <math.h>
#include <stdio.h>
int main(int n, char **v) { errno = 0; printf("%d\\n", sin(n) > 2.0 || v == NULL); return 0; }
"""


@functools.cache
def why_not(build):
    """What is missing to compile and run a build's programs, or an empty text."""
    command, emulator = BUILDS[build], EMULATORS.get(build, [])
    for program in (command[0], *emulator[:1]):
        if shutil.which(program) is None:
            return f"{program} is not installed"
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "trial.exe")
        made = subprocess.run(
            [*command, "-x", "c", "-", "-o", program, "-lm"],
            input=TRIAL,
            capture_output=True,
        )
        if made.returncode:
            return f"{' '.join(command)} makes no programs here"
        # Wine may end without a word, and as if nothing were wrong.
        if subprocess.run([*emulator, program], capture_output=True).stdout.strip() != b"0":
            return f"{' '.join([*emulator, *command])} makes no programs that run here"
    return ""
