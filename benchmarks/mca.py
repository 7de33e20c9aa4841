"""What the kernels' inner loops take on CPUs that are absent: ``make mca``.

The compiled kernels are disassembled by ``objdump``, and each function's loop with the most vector
arithmetic is simulated by ``llvm-mca``, which models the ports and latencies of many CPUs. It knows
no caches, no branches and no aliasing stores: its figures are what a loop takes while its data lie
in the first cache. Other than times they repeat to the digit.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import legacy1bit
from benchmarks.report import markdown

# By tier the CPUs that are simulated: those that choose it by themselves, and for SSE older ones.
CPUS = {
    "scalar": ("core2",),
    "sse": ("core2",),
    "sse2": ("core2", "silvermont"),
    "ssse3": ("core2", "silvermont", "btver2"),
    "sse41": ("nehalem", "silvermont", "btver2"),
    "avx2": ("haswell", "skylake", "znver1", "znver2", "znver3"),
    "avxvnni": ("alderlake",),
    "avx512": ("skylake-avx512",),
    "avx512vnni": ("icelake-server", "znver4"),
    "avx512bf16": ("cooperlake", "znver4"),
    "amx": ("sapphirerapids",),
    "neon": ("cortex-a53", "cortex-a72", "apple-m1"),
    "neondot": ("cortex-a76", "neoverse-n1", "apple-m1"),
    "i8mm": ("neoverse-v1",),
}
VERSIONS = range(30, 13, -1)
ITERATIONS = 400
FAR_FROM_BOUND = 1.3
# Products in a loop that may have other forms.
MANY = 16
# Longer ones are no inner loops, but whole kernels inside a loop over blocks.
LONGEST = 1000

_FUNCTION = re.compile(r"[0-9a-f]+ <(.+)>:$")
_INSTRUCTION = re.compile(r"\s+([0-9a-f]+):\s+(.+)")
# What follows it is the target, in hexadecimal digits.
_JUMPS = r"(?:notrack )?j\w+\s+|b(?:\.\w+)?\s+|cbn?z\s+\w+, |tbn?z\s+\w+, #\d+, "
_JUMP = re.compile(rf"(?:{_JUMPS})([0-9a-f]+)")
_NOT_SIMULATED = re.compile(rf"{_JUMPS}|(?:data16 |cs )*nop|xchg\s+%ax,%ax")
_LEAVES = re.compile(r"call|ret|blr?\s|br\s")

_MULTIPLIES = (
    r"fn?m(?:add|sub)\d+p[sd]|mulp[sd]|pmul\w+|pmadd\w+|pdp\w+|dpbf16ps|tdp\w+"  # and may add
)
_ARITHMETIC = (
    r"(?:add|sub|div|min|max|sqrt|rsqrt|rcp|round|rndscale|and|andn|or|xor|cmp\w*|scalef)p[sd]"
    r"|hadd\w+|cvt\w+p[sdh]|cvt\w*dq|p(?:add|sub|min|max|and|andn|or|xor|cmp|s[lr][la]|abs|avg|sad"
    r"|sign|ternlog|ro[lr]|had)\w*"
)
_PACKED_MULTIPLIES = re.compile(rf"v?(?:{_MULTIPLIES})\b")
_PACKED = re.compile(rf"v?(?:{_MULTIPLIES}|{_ARITHMETIC})\b")
# In the tier without vectors a number is what a vector is elsewhere.
_SCALAR_MULTIPLIES = re.compile(r"(?:muls[sd]|imul\w?)\b")
_SCALAR = re.compile(
    r"(?:(?:add|sub|mul|div|min|max|sqrt|u?comi|cmp\w+)s[sd]|(?:and|or|xor)p[sd]|cvt\w+s[sd]|imul\w?)\b"
)
# On ARM the first operand tells a vector from a number; what moves lanes is no arithmetic there.
_NEON_MULTIPLIES = re.compile(
    r"(?:fml[as]|fmul|[su]ml[as]l2?|[su]mull2?|[su]dot|smmla|mla|mul)\s+v"
)
_NEON = re.compile(
    rf"{_NEON_MULTIPLIES.pattern}|(?:f?(?:add|sub|neg|abs|max|min|cm)\w*|f(?:div|sqrt|rint\w|cvt\w*)"
    r"|[su](?:add|sub|hadd|ada|cvtf|shl|shr|sra|q)\w*|sh[lr]\w*|sli|sri|and|orr|eor|bic|b[is][tfl])\s+v"
)


@dataclass(frozen=True)
class Architecture:
    """How programs name an architecture, and how its instructions are written.

    Attributes
    ----------
    triple : str
        LLVM's name.
    objdump : str
        The program that disassembles it.
    comment : str
        What begins a comment.
    """

    triple: str
    objdump: str
    comment: str


X86 = Architecture("x86_64", "objdump", "#")
ARM = Architecture("aarch64", "aarch64-linux-gnu-objdump", "//")


def architecture(tier: str) -> Architecture:
    """Return the architecture of a tier with vectors; "scalar" is that of x86."""
    return ARM if tier in ("neon", "neondot", "i8mm") else X86


@dataclass(frozen=True)
class Loop:
    """An inner loop of a compiled kernel.

    Attributes
    ----------
    kernel, tier : str
    body : tuple of str
        Its instructions, those of x86 in AT&T's syntax, without jumps: most are fused with the
        comparison before.
    vectors : int
        How many of these are vector arithmetic.
    multiplied : int
        How many of those multiply, most of which add, too.
    """

    kernel: str
    tier: str
    body: tuple[str, ...]
    vectors: int
    multiplied: int

    @property
    def on_tiles(self) -> bool:
        """Whether it multiplies on the matrix unit."""
        return any(text.startswith("tdp") for text in self.body)


@dataclass(frozen=True)
class Figure:
    """What a loop takes on a CPU.

    Attributes
    ----------
    loop : Loop
    cpu : str
    cycles : float
        Of an iteration, simulated.
    bound : float
        Cycles of an iteration as resources alone allow, with no instruction waiting for another.
    binds : str
        The resource with the highest pressure.
    """

    loop: Loop
    cpu: str
    cycles: float
    bound: float
    binds: str

    @property
    def ratio(self) -> float:
        """Simulated cycles over the bound."""
        return self.cycles / self.bound


# --- Loops ----------------------------------------------------------------------------------------


def kernel_name(symbol: str) -> str:
    """Return a kernel's name from its symbol; the compiler's variants of it have numbers."""
    fused, plain, variant = re.fullmatch(
        r"(?:__pyx_fuse_(\d+))?(?:__pyx_f_\d+legacy1bit_\d+_kernels_[a-z0-9]+?_)?"
        r"(.+?)((?:\.\w+)*)",
        symbol,
    ).groups()  # type: ignore[union-attr]
    number = re.search(r"\.constprop\.(\d+)", variant)
    return plain + (f"[{fused}]" if fused else "") + (f".{number[1]}" if number else "")


def inner_loops(listing: str, tier: str) -> list[Loop]:
    """Return the innermost loops with vector arithmetic in what ``objdump -d`` printed.

    A loop is what lies between a jump backward and its target, without calls.
    """
    loops = []
    name, instructions = "", list[tuple[int, str]]()
    not_code = re.compile(rf"\s*({architecture(tier).comment}.*|<.*>)")
    for line in [*listing.splitlines(), "0 <end>:"]:
        if begins := _FUNCTION.match(line):
            # Cython's own functions, and those that Python calls, compute nothing.
            if not re.match(r"__Pyx|__pyx_(pymod|pw|tp)|PyInit", name):
                bodies = _innermost(instructions)
                loops += [_classified(kernel_name(name), tier, body) for body in bodies]
            name, instructions = begins[1], []
        elif found := _INSTRUCTION.match(line):
            text = not_code.sub("", found[2]).strip()
            # LLVM takes no address without a name here; the time is the same for any.
            text = re.sub(r"^(adrp?\s+\w+, )\w+$", r"\1#0", text)
            instructions.append((int(found[1], 16), text))
    return [loop for loop in loops if loop.vectors]


def _innermost(instructions: Sequence[tuple[int, str]]) -> list[list[str]]:
    """Return the instructions of the loops of a function that contain no other."""
    places = {address: index for index, (address, _) in enumerate(instructions)}
    ends: dict[int, int] = {}
    for index, (address, text) in enumerate(instructions):
        jump = _JUMP.match(text)
        target = int(jump[1], 16) if jump else address
        if target < address and target in places:
            begin = places[target]
            ends[begin] = max(index, ends.get(begin, 0))
    bodies = []
    for begin, end in sorted(ends.items()):
        body = [text for _, text in instructions[begin : end + 1]]
        inside = any(begin < other and last <= end for other, last in ends.items())
        if not inside and len(body) <= LONGEST and not any(map(_LEAVES.match, body)):
            bodies.append([text for text in body if not _NOT_SIMULATED.match(text)])
    return bodies


def _classified(kernel: str, tier: str, body: Sequence[str]) -> Loop:
    # A prefix in braces chooses an encoding.
    plain = [re.sub(r"^\{\w+\}\s*", "", text) for text in body]
    every, multiplies = _PACKED, _PACKED_MULTIPLIES
    if tier == "scalar":
        every, multiplies = _SCALAR, _SCALAR_MULTIPLIES
    elif architecture(tier) is ARM:
        every, multiplies = _NEON, _NEON_MULTIPLIES
    return Loop(
        kernel,
        tier,
        tuple(body),
        sum(every.match(text) is not None for text in plain),
        sum(multiplies.match(text) is not None for text in plain),
    )


def hottest(loops: Iterable[Loop]) -> list[Loop]:
    """Return of each kernel the loops that its time goes to, by name.

    That is the loop that multiplies most, or has the most vector arithmetic where none multiplies;
    and with many products, other forms of the same product: loops that multiply a third as much,
    and do little else. Loops over the rest of a row, and those that pack, prefetch or reduce, are
    not among them.
    """
    kernels: dict[str, list[Loop]] = {}
    for loop in loops:
        kernels.setdefault(loop.kernel, []).append(loop)
    chosen = []
    for _, ours in sorted(kernels.items()):
        # The compiler may make the same loop twice.
        forms = {(loop.multiplied, loop.vectors): loop for loop in reversed(ours)}
        best, *others = (forms[form] for form in sorted(forms, reverse=True))
        chosen.append(best)
        if best.multiplied >= MANY:
            chosen += [
                loop
                for loop in others
                if 3 * loop.multiplied >= best.multiplied and 3 * loop.vectors > len(loop.body)
            ]
    return chosen


# --- Programs -------------------------------------------------------------------------------------


def find_llvm_mca() -> str:
    """Return the path of the newest ``llvm-mca``.

    Raises
    ------
    ValueError
        If there is none.
    """
    for name in (*(f"llvm-mca-{version}" for version in VERSIONS), "llvm-mca"):
        if path := shutil.which(name):
            return path
    raise ValueError("llvm-mca is not installed: see the package llvm-19, or a later one")


def disassemble(module: Path, objdump: str) -> str:
    """Return what a form of ``objdump`` prints of a compiled module.

    Raises
    ------
    ValueError
        If it is not installed, or fails.
    """
    return _run([objdump, "-d", "--no-show-raw-insn", str(module)], "see the package binutils")


def _run(command: Sequence[str], advice: str, given: str = "") -> str:
    try:
        done = subprocess.run(command, input=given, capture_output=True, text=True)
    except FileNotFoundError:
        raise ValueError(f"{command[0]} is not installed: {advice}") from None
    if done.returncode:
        # llvm-mca prints a note with the instruction after the error.
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        message = "; ".join(lines[:2]) or f"status {done.returncode}"
        raise ValueError(f"{Path(command[0]).name}: {message}")
    return done.stdout


def known_cpus(program: str, triple: str) -> set[str]:
    """Return the names of an architecture's CPUs that an ``llvm-mca`` knows."""
    done = subprocess.run(
        [program, f"-mtriple={triple}", "-mcpu=help"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    known = set(re.findall(r"^\s+(\S+)\s+- Select the", done.stderr + done.stdout, re.M))
    # The cores are the same; LLVM takes both names, and lists one.
    return known | {"apple-m1"} if "apple-a14" in known else known


def simulate(program: str, loops: Sequence[Loop], cpu: str) -> dict[str, Any]:
    """Return the report of ``llvm-mca``, one region for each loop.

    Raises
    ------
    ValueError
        If it fails, as it does where the CPU lacks an instruction.
    """
    made_for = architecture(loops[0].tier)
    lines: list[str] = []
    for index, loop in enumerate(loops):
        lines += [f"# LLVM-MCA-BEGIN {index}", *loop.body, "# LLVM-MCA-END"]
    command = [program, f"-mtriple={made_for.triple}", f"-mcpu={cpu}", "-json"]
    command.append(f"-iterations={ITERATIONS}")
    report: dict[str, Any] = json.loads(_run(command, "", "\n".join(lines) + "\n"))
    return report


def figures(report: Mapping[str, Any], loops: Sequence[Loop], cpu: str) -> list[Figure]:
    """Return what ``llvm-mca`` reports of loops."""
    # Units of one kind have one name, and a control character after it.
    names = [re.sub(r"\.[\x00-\x1f]$", "", name) for name in report["TargetInfo"]["Resources"]]
    found = []
    for loop, region in zip(loops, report["CodeRegions"], strict=True):
        summary = region["SummaryView"]
        rows = region["ResourcePressureView"]["ResourcePressureInfo"]
        # What follows the last instruction is their sum.
        pressure = [
            (row["ResourceUsage"], -row["ResourceIndex"])
            for row in rows
            if row["InstructionIndex"] == len(loop.body)
        ]
        usage, index = max(pressure, default=(0.0, 0))
        issue = summary["TotaluOps"] / summary["Iterations"] / summary["DispatchWidth"]
        found.append(
            Figure(
                loop,
                cpu,
                summary["TotalCycles"] / summary["Iterations"],
                summary["BlockRThroughput"],
                "dispatch" if issue >= usage else names[-index],
            )
        )
    return found


# --- The table ------------------------------------------------------------------------------------


def table(found: Sequence[Figure]) -> list[str]:
    """Return the lines of the table, and below it the loops that are far from their bounds."""
    head = (
        "kernel",
        "tier",
        "CPU",
        "vectors",
        "multiply",
        "cycles",
        "a vector",
        "binds",
        "x bound",
    )
    rows = [
        (
            one.loop.kernel,
            one.loop.tier,
            one.cpu,
            str(one.loop.vectors),
            str(one.loop.multiplied),
            f"{one.cycles:.2f}",
            f"{one.cycles / one.loop.vectors:.2f}",
            one.binds,
            f"{one.ratio:.2f}",
        )
        for one in found
    ]
    far: dict[tuple[str, str], list[Figure]] = {}
    for one in sorted(found, key=lambda one: -one.ratio):
        if one.ratio > FAR_FROM_BOUND and not one.loop.on_tiles:
            far.setdefault((one.loop.kernel, one.loop.tier), []).append(one)
    lines = [*markdown(head, rows, texts=3), ""]
    if not far:
        return [*lines, f"No loop takes more than {FAR_FROM_BOUND} x its bound."]
    # Where tiers have the same loop, one line names it.
    tiers: dict[tuple[str, str], list[str]] = {}
    for (kernel, tier), those in far.items():
        each = ", ".join(
            f"{one.cpu} {one.ratio:.2f} x ({one.cycles:.2f} of {one.bound:.2f} cycles)"
            for one in those
        )
        tiers.setdefault((kernel, each), []).append(tier)
    return [
        *lines,
        f"More than {FAR_FROM_BOUND} x their bounds, because instructions wait for others:",
        "",
        *(f"- {kernel}, {' '.join(names)}: {each}" for (kernel, each), names in tiers.items()),
    ]


def notes(found: Sequence[Figure], borrowed: Iterable[str]) -> list[str]:
    """Return what has to be known of figures.

    Parameters
    ----------
    found : sequence of Figure
    borrowed : iterable of str
        CPUs that LLVM has no model of.
    """
    lines = [f"{cpu}: LLVM takes the ports and latencies of Sandy Bridge." for cpu in borrowed]
    if any(one.loop.on_tiles for one in found):
        lines.append(
            "amx: LLVM knows how long a product of tiles takes, not how often one can begin; "
            "bounds of such loops are not those of the CPU."
        )
    return lines


def pairs(tiers: Sequence[str] | None, cpus: Sequence[str] | None) -> list[tuple[str, str]]:
    """Return the tiers and CPUs to simulate: of ``CPUS``, or all combinations of both if given.

    Whether such a CPU has the tier is not checked: LLVM simulates most instructions on every CPU.
    """
    if tiers and cpus:
        return [(tier, cpu) for tier in tiers for cpu in cpus]
    return [(tier, cpu) for tier in tiers or CPUS for cpu in CPUS[tier] if not cpus or cpu in cpus]


def module_of(folders: Sequence[Path], tier: str) -> Path | None:
    """Return the compiled kernels of a tier, in the first folder that has them."""
    return next((path for one in folders for path in one.glob(f"_kernels_{tier}.*.so")), None)


def loops_of(
    folders: Sequence[Path], tier: str, patterns: Sequence[str], every: bool
) -> list[Loop]:
    """Return the loops of a tier's module.

    Parameters
    ----------
    folders : sequence of Path
        Where the compiled modules are.
    tier : str
    patterns : sequence of str
        Names of kernels, with wildcards; all if empty.
    every : bool
        Whether all inner loops are meant, instead of one of each kernel.

    Raises
    ------
    ValueError
        If the module is missing or cannot be disassembled.
    """
    module = module_of(folders, tier)
    if not module:
        looked = ", ".join(map(str, folders))
        raise ValueError(f"{looked}: no compiled kernels of {tier}; make mca compiles them")
    loops = inner_loops(disassemble(module, architecture(tier).objdump), tier)
    if patterns:
        loops = [one for one in loops if any(fnmatch(one.kernel, name) for name in patterns)]
    return sorted(loops, key=lambda one: one.kernel) if every else hottest(loops)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mca", description=__doc__)
    parser.add_argument(
        "--tiers", nargs="+", choices=CPUS, metavar="TIER", help="of " + ", ".join(CPUS)
    )
    parser.add_argument("--cpus", nargs="+", metavar="CPU", help="as llvm-mca calls them")
    parser.add_argument("--kernels", nargs="+", default=[], metavar="NAME", help="with wildcards")
    parser.add_argument("--all", action="store_true", help="every inner loop of a kernel, not one")
    parser.add_argument(
        "--folder", type=Path, nargs="+", default=[Path(legacy1bit.__file__).parent],
        metavar="DIR", help="where the compiled kernels are",
    )  # fmt: skip
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    found: list[Figure] = []
    borrowed: list[str] = []
    try:
        program = find_llvm_mca()
        wanted = [
            (tier, cpu)
            for tier, cpu in pairs(arguments.tiers, arguments.cpus)
            if arguments.tiers or module_of(arguments.folder, tier)
        ]
        loops = {
            tier: loops_of(arguments.folder, tier, arguments.kernels, arguments.all)
            for tier in dict.fromkeys(tier for tier, _ in wanted)
        }
        for tier, cpu in wanted:
            if cpu not in known_cpus(program, architecture(tier).triple):
                note = f"{Path(program).name} does not know {cpu}, which is left out"
                print(note, file=sys.stderr)
            elif loops[tier]:
                report = simulate(program, loops[tier], cpu)
                if report["TargetInfo"]["Resources"][0].startswith("SB"):
                    borrowed.append(cpu)
                found += figures(report, loops[tier], cpu)
        if not found:
            raise ValueError("no kernel, tier and CPU fit together")
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    found.sort(key=lambda one: one.loop.kernel)
    lines = table(found)
    if below := notes(found, dict.fromkeys(borrowed)):
        lines += ["", *below]
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
