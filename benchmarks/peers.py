"""The package beside others, in turns: ``make bench-peers``.

Training beside a twin of the model in PyTorch, eagerly and under ``torch.compile``; decoding and
prompts beside llama.cpp, built for this CPU and compared with our widest instruction set, and built
without AVX and compared with our narrower ones; products of ternary matrices beside bitnet.cpp's
I2_S kernels, where its source is given, and with --published the whole model beside its program, if
that is built. Every row names its CPU and instruction set.
"""

import argparse
import functools
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks import bitnet_cpp, llama_cpp, torch_twin
from benchmarks.kernels import packed_products
from benchmarks.measure import Benchmark, Call, machine_load, rate
from benchmarks.models import (
    DECODED,
    LARGE,
    PROMPT,
    SMALL,
    TRAINING,
    TRAINING_BATCH,
    decode_call,
    packed_model,
    prompt_call,
    training_step,
)
from benchmarks.published import BITNET_2B, BONSAI_1_7B, write_random
from benchmarks.report import Result, content, markdown, median, number, prepare, publish
from legacy1bit import math_ops
from legacy1bit.hyperparams import ModelConfig
from legacy1bit.inference import Decoder
from legacy1bit.packed import PackedModel
from legacy1bit.system.hardware import cpu_name
from legacy1bit.threads import available_cores

PARTS = ("torch", "llama", "bitnet")
PAUSE = 0.2
# Longer than our own kernels take: what starts threads of its own varies more.
LEAST_SECONDS = 0.2

# Our instruction sets beside a build of llama.cpp; beside the native one the widest.
BESIDE = {
    "only-avx2": ("avx2",),
    "noavx": ("sse2", "ssse3", "sse41"),
    # Its kernels are written for AVX2.
    "bitnet.cpp": ("avx2",),
}

# Shapes of published models, with the types of their matrices and of their heads.
PUBLISHED = {
    "BitNet 2B-4T, F16 head": (BITNET_2B, "TQ2_0", "F16"),
    "BitNet 2B-4T, Q6_K head": (BITNET_2B, "TQ2_0", "Q6_K"),
    "Bonsai 1.7B": (BONSAI_1_7B, "Q2_0", ""),
}
# The same for bitnet.cpp, whose type it is.
OF_BITNET = {"BitNet 2B-4T, I2_S, F16 head": (BITNET_2B, "I2_S", "F16")}
_LONG_PROMPT, _FEW_TOKENS = 512, 16

# By column; ratios are to the first of a row.
_PEERS = {
    "torch": "PyTorch",
    "torch.compile": "PyTorch, torch.compile",
    **{build: f"llama.cpp, {build}" for build in llama_cpp.BUILDS},
    "bitnet.cpp": "bitnet.cpp, I2_S",
}

# A turn: the row, the column, and what returns rates.
Turn = tuple[str, str, Callable[[], Sequence[float]]]


def take_turns(
    turns: Sequence[Turn], rounds: int, pause: float = PAUSE, unit: str = "tokens/s"
) -> dict[str, Result]:
    """Run everything in turns; the first warms up.

    All threads of one peer have time to fall asleep before the next one's turn.
    """
    results: dict[str, Result] = {}
    for turn in range(rounds + 1):
        for name, column, call in turns:
            time.sleep(pause)
            values = call()
            if turn:
                rates = results.setdefault(name, Result(unit, {})).rates
                rates.setdefault(column, []).extend(values)
    return results


def training_turns(
    threads: int,
    config: ModelConfig = TRAINING,
    batch: int = TRAINING_BATCH,
    least: float = LEAST_SECONDS,
) -> list[Turn]:
    """Return the turns of training: PyTorch's, and ours in each precision of products.

    Where ``torch.compile`` fails, a line on standard error gives the reason.

    Raises
    ------
    ValueError
        If PyTorch is not installed.
    """
    work = float(batch * config.sequence_length)
    name = f"training, {_threads(threads)}"
    twin = torch_twin.twin_step(config, batch, threads)
    ours = training_step(config, batch, threads)

    def run_ours(precision: str) -> list[float]:
        with math_ops.product_precision(precision):
            return [rate(work, ours, least=least)]

    turns: list[Turn] = [(name, "torch", lambda: [rate(work, twin, least=least)])]
    if compiled := _compiled_step(config, batch, threads):
        turns.append((name, "torch.compile", lambda: [rate(work, compiled, least=least)]))
    for one in math_ops.product_precisions():
        turns.append((name, one, functools.partial(run_ours, one)))
    return turns


def _compiled_step(config: ModelConfig, batch: int, threads: int) -> Call | None:
    """Return PyTorch's step under ``torch.compile``, compiled, or None where that fails."""
    try:
        step = torch_twin.twin_step(config, batch, threads, compiled=True)
        step()
    except Exception as error:  # the compiler's parts have errors of their own
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        print(f"torch.compile failed, and is left out: {reason}", file=sys.stderr, flush=True)
        return None
    return step


def decoding_turns(
    programs: Mapping[str, Path],
    models: Mapping[str, tuple[Path, Decoder]],
    prompt: int = PROMPT,
    decoded: int = DECODED,
    least: float = LEAST_SECONDS,
) -> list[Turn]:
    """Return the turns of decoding and of the prompt: llama.cpp's and ours.

    Parameters
    ----------
    programs : mapping of str to Path
        ``llama-bench`` by the name of its build.
    models : mapping of str to (Path, Decoder)
        llama.cpp's file, and a decoder of such a model, by name.
    prompt, decoded : int
        How many tokens a call takes in, and writes.
    least : float
        What a measurement of ours takes at least, in seconds.
    """
    turns: list[Turn] = []
    levels = math_ops.simd_levels()
    for label, (file, decoder) in models.items():
        threads = decoder.threads
        calls = {
            "prompt": (prompt, prompt_call(decoder, prompt)),
            "decoding": (decoded, decode_call(decoder, decoded)),
        }
        for build, program in programs.items():
            ours = [one for one in BESIDE.get(build, levels[-1:]) if one in levels]
            for what, (count, call) in calls.items():
                name = f"{what} {label}, {_threads(threads)}, {build}"

                def run_theirs(
                    program: Path = program,
                    file: Path = file,
                    what: str = what,
                    threads: int = threads,
                ) -> list[float]:
                    # A count of 0 leaves the other test out.
                    counts = {"prompt": prompt, "decoding": decoded}
                    wanted = {key: counts[key] if key == what else 0 for key in counts}
                    told = llama_cpp.run_bench(
                        program, file, threads, 1, wanted["prompt"], wanted["decoding"]
                    )
                    return told[what]

                turns.append((name, build, run_theirs))
                for level in ours:

                    def run_ours(
                        level: str = level, count: int = count, call: Callable[[], object] = call
                    ) -> list[float]:
                        math_ops.set_simd_level(level)
                        return [rate(float(count), call, least=least)]

                    turns.append((name, level, run_ours))
    return turns


def bitnet_turns(
    program: Path, size: int = 2048, rows: int = 128, least: float = LEAST_SECONDS
) -> list[Turn]:
    """Return the turns of products of ternary matrices: bitnet.cpp's and ours, on one thread.

    Parameters
    ----------
    program : Path
        What ``bitnet_cpp.build`` returned.
    size : int
        Rows and columns of the matrix.
    rows : int
        Rows of activations; one row is measured, too.
    least : float
        How long a measurement takes at least, in seconds.
    """
    turns: list[Turn] = []
    levels = math_ops.simd_levels()
    # Its kernels are written for AVX2.
    ours = [level for level in levels if level in ("avx2", levels[-1])]
    products = [one for one in packed_products(size, rows) if one.name.startswith("2bit")]
    for one, count in zip(products, (1, rows), strict=True):

        def run_theirs(count: int = count) -> list[float]:
            return [bitnet_cpp.run_kernels(program, size, count, least)]

        turns.append((one.name, "bitnet.cpp", run_theirs))
        for level in ours:

            def run_ours(level: str = level, one: Benchmark = one) -> list[float]:
                math_ops.set_simd_level(level)
                return [rate(one.work, one.call, least=least)]

            turns.append((one.name, level, run_ours))
    return turns


def published_results(
    programs: Mapping[str, Path],
    shapes: Mapping[str, tuple[ModelConfig, str, str]],
    folder: Path,
    threads: Sequence[int],
    rounds: int,
) -> dict[str, Result]:
    """Time prompts and decoding of random models of published shapes: theirs and ours.

    Parameters
    ----------
    programs : mapping of str to Path
        ``llama-bench`` by the name of its build.
    shapes : mapping of str to (ModelConfig, str, str)
        By a model's name its settings, and the types of its matrices and of its head.
    folder : Path
        Where the models are, or are written to.
    threads : sequence of int
    rounds : int

    Raises
    ------
    ValueError
        If a program fails, or gguf is needed and not installed.
    """
    results: dict[str, Result] = {}
    for label, shape in shapes.items():
        file = find_published(folder, *shape)
        packed = PackedModel.load(file)
        for count in threads:
            beside = {label: (file, Decoder(packed, count, 1024))}
            turns = decoding_turns(programs, beside, _LONG_PROMPT, _FEW_TOKENS)
            results |= take_turns(turns, rounds)
    return results


def _threads(count: int) -> str:
    return f"{count} thread{'s' if count > 1 else ''}"


def table(results: Mapping[str, Result], cpu: str, tiers: Mapping[str, str]) -> list[str]:
    """Return the lines of a table: every rate with its CPU, and its ratio to the peer's.

    Parameters
    ----------
    results : mapping of str to Result
    cpu : str
        The CPU's name.
    tiers : mapping of str to str
        The instruction sets of columns that are not named after one.
    """
    rows = []
    for name, result in results.items():
        peer = next(column for column in result.rates if column in _PEERS)
        theirs = median(result.rates[peer])
        for column, values in result.rates.items():
            middle = median(values)
            rows.append(
                (
                    name,
                    _PEERS.get(column, f"ours, {column}"),
                    f"{cpu}, {tiers.get(column, column)}",
                    number(middle),
                    f"{number(min(values))} to {number(max(values))}",
                    result.unit,
                    "" if column == peer else f"{middle / theirs:.2f}",
                )
            )
    head = ("what", "who", "CPU", "rate", "from turn to turn", "unit", "x the peer")
    return markdown(head, rows, texts=3)


def find_programs(arguments: argparse.Namespace) -> dict[str, Path]:
    """Return ``llama-bench`` by the name of its build: what was named, and the rest built.

    Raises
    ------
    ValueError
        If one cannot be built.
    """
    programs = {}
    for name in arguments.builds:
        program = getattr(arguments, f"llama_bench_{name.replace('-', '_')}")
        if program is None:
            source = arguments.llama_source or llama_cpp.fetch_source(arguments.folder)
            program = llama_cpp.build(source, arguments.folder, name)
        if not program.is_file():
            raise ValueError(f"{program} is no program")
        programs[name] = program.resolve()
    return programs


def find_models(folder: Path, config: ModelConfig, label: str) -> dict[str, Path]:
    """Return llama.cpp's models of a shape by the type of their weights, written unless there.

    Raises
    ------
    ValueError
        If gguf is needed and not installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    models = {}
    for kind in llama_cpp.TYPES:
        models[kind] = (folder / f"{label}-{kind}.gguf").resolve()
        if not models[kind].exists():
            llama_cpp.write_model(config, kind, models[kind])
    return models


def find_published(folder: Path, config: ModelConfig, kind: str, head: str) -> Path:
    """Return a random model of a published shape, written unless it is there.

    Raises
    ------
    ValueError
        If gguf is needed and not installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / f"{config.model_dim}-{kind}-{head}.gguf").resolve()
    if not file.exists():
        write_random(config, kind, head, file)
    return file


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="some parts")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="default: 5")
    parser.add_argument("--threads", type=int, nargs="+", metavar="N", help="default: 1 and 2")
    parser.add_argument(
        "--large", action="store_true", help="a model that no cache holds, too: 400 M"
    )
    parser.add_argument(
        "--published", action="store_true", help=f"the shapes of {', '.join(PUBLISHED)}, too"
    )
    group = parser.add_argument_group("llama.cpp")
    builds = tuple(llama_cpp.BUILDS)
    group.add_argument("--builds", nargs="+", choices=builds, default=("native", "noavx"))
    group.add_argument("--llama-source", type=Path, metavar="DIR", help="llama.cpp's source")
    for name in builds:
        group.add_argument(f"--llama-bench-{name}", type=Path, metavar="FILE", help="a built one")
    parser.add_argument(
        "--bitnet-cpp", type=Path, metavar="DIR", help="the source of bitnet.cpp, whose kernels "
        f"are compiled and measured, too; with --published also its {bitnet_cpp.PROGRAM}",
    )  # fmt: skip
    parser.add_argument("--folder", type=Path, default=Path("build/peers"), metavar="DIR")
    parser.add_argument(
        "--json",
        type=Path,
        default=Path("build/peers.json"),
        metavar="FILE",
        help="write all rates there, and the table beside it (default: build/peers.json)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    try:
        prepare(arguments.json)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    cores = available_cores()
    counts = arguments.threads or list(range(1, min(cores, 2) + 1))
    if arguments.rounds < 1 or not all(1 <= count <= cores for count in counts):
        parser.error(f"expected at least 1 round, and 1 to {cores} threads")
    if arguments.bitnet_cpp is None and list(arguments.only) == ["bitnet"]:
        parser.error("expected the source of bitnet.cpp: --bitnet-cpp DIR")
    load = machine_load()
    before = math_ops.simd_level()
    tiers = {"float32": before, "bf16": before, "bitnet.cpp": "native"}
    results: dict[str, Result] = {}
    time_published = functools.partial(
        published_results, folder=arguments.folder, threads=counts, rounds=arguments.rounds
    )
    try:
        # Compiled first: a wrong path is known before minutes have passed.
        kernels = None
        if "bitnet" in arguments.only:
            if arguments.bitnet_cpp is not None:
                kernels = bitnet_cpp.build(arguments.bitnet_cpp, arguments.folder)
            else:
                print("bitnet.cpp is left out: BITNET_CPP=DIR names its source", file=sys.stderr)
        if "torch" in arguments.only:
            tiers |= dict.fromkeys(("torch", "torch.compile"), torch_twin.capability())
            for count in counts:
                results |= take_turns(training_turns(count), arguments.rounds)
        if "llama" in arguments.only:
            programs = find_programs(arguments)
            shapes = [("25 M", SMALL)] + ([("400 M", LARGE)] if arguments.large else [])
            for label, config in shapes:
                models = find_models(arguments.folder, config, label.replace(" ", ""))
                for count in counts:
                    beside = {
                        f"{label}, {form}": (
                            models[kind],
                            Decoder(packed_model(config, form), count),
                        )
                        for kind, form in llama_cpp.TYPES.items()
                    }
                    results |= take_turns(decoding_turns(programs, beside), arguments.rounds)
            if arguments.published:
                results |= time_published(programs, PUBLISHED)
        if kernels is not None:
            results |= take_turns(bitnet_turns(kernels), arguments.rounds, unit="GMAC/s")
            if arguments.published:
                program = bitnet_cpp.find_bench(arguments.bitnet_cpp)
                results |= time_published({"bitnet.cpp": program}, OF_BITNET)
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    finally:
        math_ops.set_simd_level(before)
    report = content(results, math_ops.simd_levels(), counts, arguments.rounds, load)
    publish(report, table(results, cpu_name(), tiers), arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
