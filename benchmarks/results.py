"""``make results``: train every variant that docs/RESULTS.md compares, and fill in its tables.

Each run is one call of the command line. Those of the tables of losses have one thread, and there
are as many at a time as cores; those of speed and memory have all cores, one after the other. What
is finished is not run again, so that a stopped ``make results`` goes on where it was.
"""

import argparse
import json
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from legacy1bit.data.stories import entropy_per_character
from legacy1bit.model import load_model
from legacy1bit.system.files import atomic_write
from legacy1bit.threads import available_cores
from legacy1bit.training.run import Run

SEEDS = (1, 2, 3)

# How training was told to learn before any of that was searched for.
_RATES = (
    "--learning-rate 0.003 --muon-lr-ratio 3.3 --schedule cosine --decay-fraction 1 "
    "--weight-decay 0.02"
)

# The shape that all but the stories share; later options override earlier ones.
_SHAPE = (
    "--blocks 4 --heads 4 --model-dim 128 --ffn-multiplier 4 --sequence-length 64 --batch-size 12 "
    f"{_RATES} --steps 2000 --evaluate-every 500"
)
_BASE = "ternary"


@dataclass(frozen=True)
class Variant:
    """One line of a table.

    Attributes
    ----------
    label : str
    options : str
        What its command line says besides data, shape and seed.
    """

    label: str
    options: str = ""


TABLES = {
    "schemes": (
        Variant(_BASE),
        Variant("ternary, a scale per row", "--scale row"),
        Variant("ternary, a scale for 128 weights", "--scale 128"),
        Variant("ternary-median", "--scheme ternary-median"),
        Variant("binary", "--scheme binary"),
        Variant("2bit", "--scheme 2bit"),
        Variant("float", "--scheme float"),
        Variant("sign", "--scheme sign"),
    ),
    "optimizers": (
        Variant(_BASE),
        Variant("ternary, AdamW", "--optimizer adamw"),
        Variant("ternary, SGD with momentum", "--optimizer sgd --learning-rate 0.1"),
        Variant("float", "--scheme float"),
        Variant("float, AdamW", "--scheme float --optimizer adamw"),
    ),
    "options": (
        Variant(_BASE),
        Variant("int8 activations", "--int8-activations"),
        Variant("ternary embedding and head", "--ternary-embedding"),
        Variant("a norm before every linear layer", "--sub-norm"),
        Variant("float for the first 20 %", "--float-steps 400"),
        Variant("products in float32", "--precision float32"),
    ),
    "precisions": (
        Variant("float32", "--optimizer adamw --precision float32"),
        Variant("int8", "--optimizer adamw --precision int8"),
    ),
    "shapes": (
        Variant("1 block of 176", "--blocks 1 --model-dim 176"),
        Variant("2 blocks of 152", "--blocks 2 --model-dim 152"),
        Variant(_BASE),
        Variant("8 blocks of 104", "--blocks 8 --model-dim 104"),
    ),
    # The hidden layer is as wide as makes the weights take as many bytes.
    "architectures": (
        Variant(_BASE),
        Variant("RMS norms", "--norm rms"),
        Variant("gated", "--gated --ffn-dim 341"),
        Variant("gated, SiLU", "--gated --activation silu --ffn-dim 341"),
        Variant("QK-norm", "--qk-norm"),
        Variant("2 heads of keys and values", "--num-kv-heads 2 --ffn-dim 576"),
        Variant("tied embeddings", "--tied-embeddings --ffn-dim 1024"),
        Variant("tied, gated, SiLU", "--tied-embeddings --gated --activation silu --ffn-dim 683"),
        Variant(
            "the same as Llama: RMS norms, no biases",
            "--architecture llama --tied-embeddings --ffn-dim 683",
        ),
    ),
    "sizes": (
        Variant(_BASE),
        Variant("float", "--scheme float"),
        Variant("ternary, 256 wide", "--model-dim 256"),
    ),
}


@dataclass(frozen=True)
class Outcome:
    """What the runs of a variant came to.

    Attributes
    ----------
    losses : list of float
        By seed, on the whole validation set.
    stored : int
        The bytes of the model's weights.
    """

    losses: list[float]
    stored: int

    @property
    def mean(self) -> float:
        """The mean loss."""
        return statistics.fmean(self.losses)

    @property
    def deviation(self) -> float:
        """The standard deviation of the losses, as one of a sample."""
        return statistics.stdev(self.losses)


def command(variant: Variant, seed: int, data: str, folder: Path) -> list[str]:
    """Return the command line that trains a variant, without the interpreter."""
    options = shlex.split(f"{_SHAPE} {variant.options} --seed {seed} --threads 1")
    return ["-m", "legacy1bit.main", "train", "--data", data, *options, "--out", str(folder)]


def _folder(out: Path, variant: Variant, seed: int) -> Path:
    name = variant.options.replace("--", "").replace(" ", "-") or "base"
    return out / f"{name}-{seed}"


def _is_finished(folder: Path) -> bool:
    run = Run(folder)
    records = run.metrics() if run.metrics_file.exists() else []
    return bool(records) and records[-1]["step"] == 2000


def _run(arguments: list[str]) -> str:
    """Run Python and return what it said on standard error, or print that and raise."""
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, errors="replace"
    )
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        done.check_returncode()
    return done.stderr


def train(variant: Variant, seed: int, data: str, out: Path) -> Outcome:
    """Train a variant with one seed, unless that is done already, and return what came of it.

    Raises
    ------
    subprocess.CalledProcessError
        If the training failed; its error is on standard error.
    """
    folder = _folder(out, variant, seed)
    if not _is_finished(folder):
        arguments = command(variant, seed, data, folder)
        if Run(folder).is_saved:
            arguments = ["-m", "legacy1bit.main", "train", "--resume", str(folder)]
        _run(arguments)
    loss = Run(folder).metrics()[-1]["val_loss"]
    print(f"{loss:.4f}  seed {seed}  {variant.label}", file=sys.stderr, flush=True)
    return Outcome([loss], load_model(folder).stored_bytes())


def run_all(data: str, out: Path, jobs: int) -> dict[Variant, Outcome]:
    """Train every variant of every table with every seed."""
    variants = list(dict.fromkeys(variant for table in TABLES.values() for variant in table))
    tasks = [(variant, seed) for seed in SEEDS for variant in variants]
    with ThreadPoolExecutor(jobs) as pool:
        outcomes = list(pool.map(lambda task: train(task[0], task[1], data, out), tasks))
    by_variant: dict[Variant, Outcome] = {}
    for (variant, _), outcome in zip(tasks, outcomes, strict=True):
        losses = by_variant[variant].losses if variant in by_variant else []
        by_variant[variant] = Outcome([*losses, *outcome.losses], outcome.stored)
    return by_variant


def table(variants: Sequence[Variant], outcomes: dict[Variant, Outcome]) -> Iterator[str]:
    """Yield the lines of one table in Markdown."""
    base = outcomes[Variant(_BASE)].mean
    seeds = " | ".join(f"seed {seed}" for seed in SEEDS)
    yield f"| | options | loss | to the first recipe | {seeds} | bytes |"
    yield "| --- | --- | --- | ---: |" + " ---: |" * (len(SEEDS) + 1)
    for variant in variants:
        outcome = outcomes[variant]
        each = " | ".join(f"{loss:.4f}" for loss in outcome.losses)
        options = f"`{variant.options}`" if variant.options else ""
        yield (
            f"| {variant.label} | {options} | {outcome.mean:.4f} ± {outcome.deviation:.4f} | "
            f"{outcome.mean - base:+.4f} | {each} | {outcome.stored:,} |"
        )


# Runs the command line and then tells the most memory it had, in KiB, as the last line of standard
# error. (What the system tells of an ended child counts its parent's memory in, too.)
_WITH_PEAK = """
import sys
from legacy1bit.main import main
status = main(sys.argv[1:])
with open("/proc/self/status") as file:
    peak = next(line for line in file if line.startswith("VmHWM:"))
print(peak.split()[1], file=sys.stderr)
sys.exit(status)
"""


def run_alone(arguments: list[str], folder: Path) -> dict[str, float]:
    """Train with all cores, unless that is done already.

    Returns
    -------
    dict
        The run's last record, ``peak_bytes``, ``stored_bytes``, ``file_bytes``, and
        ``run_seconds``, which counts everything in.
    """
    note = folder / "alone.json"
    if not note.exists():
        shutil.rmtree(folder, ignore_errors=True)
        begin = time.perf_counter()
        told = _run(["-c", _WITH_PEAK, "train", *arguments, "--out", str(folder)])
        seconds = time.perf_counter() - begin
        record = Run(folder).metrics()[-1]
        record["peak_bytes"] = 1024 * int(told.split()[-1])
        record["run_seconds"] = seconds
        record["stored_bytes"] = load_model(folder).stored_bytes()
        record["file_bytes"] = Run(folder).weights_file.stat().st_size
        atomic_write(note, json.dumps(record))
    outcome: dict[str, float] = json.loads(note.read_text(encoding="utf-8"))
    print(f"{outcome['val_loss']:.4f}  {' '.join(arguments)}", file=sys.stderr, flush=True)
    return outcome


def _run_seed(data: str, options: str, seed: int, folder: Path) -> dict[str, float]:
    """Train on a text with all cores; see ``run_alone``."""
    return run_alone(["--data", data, *shlex.split(options), "--seed", str(seed)], folder)


def _mean(values: Sequence[float]) -> str:
    """Return the mean of some values and, where there are several, their deviation."""
    spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.4f}{spread}"


# What is compared at equal training time: the steps are as many as that leaves.
_TOKENS = {
    "bytes": "--steps 2000",
    "BPE, 512": "--tokenizer bpe --vocab-size 512 --steps 1750",
    "BPE, 1,024": "--tokenizer bpe --vocab-size 1024 --steps 1650",
    "BPE, 4,096": "--tokenizer bpe --vocab-size 4096 --steps 1000",
}


def token_table(data: str, out: Path) -> Iterator[str]:
    """Yield the lines of the table of what a token is, at equal training time."""
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in _TOKENS}
    for seed in SEEDS:
        for name, options in _TOKENS.items():
            folder = out / f"tokens-{name.replace(', ', '-').replace(',', '')}-{seed}"
            runs[name].append(_run_seed(data, f"{_SHAPE} {options}", seed, folder))
    yield "| tokens | options | bits per byte | nats per token | training | bytes |"
    yield "| --- | --- | --- | ---: | ---: | ---: |"
    for name, done in runs.items():
        bits = [run["bits_per_byte"] for run in done]
        nats = statistics.fmean(run["val_loss"] for run in done)
        seconds = statistics.median(run["elapsed_seconds"] for run in done)
        yield (
            f"| {name} | `{_TOKENS[name]}` | {_mean(bits)} | {nats:.4f} | {seconds:.0f} s | "
            f"{done[0]['stored_bytes']:,.0f} |"
        )


# What training began from, before any of it was searched for.
_BEFORE = (
    "--model-dim 96 --blocks 3 --heads 4 --ffn-multiplier 4 --sequence-length 256 --batch-size 8 "
    f"{_RATES}"
)

# What is the best within a time, and a size of the model's file. The settings of the default and of
# the two sizes were found by ``tune``.
_BUDGETS = {
    "one minute, before the search": f"--minutes 1 {_BEFORE}",
    "one minute: the default": "--minutes 1",
    "one minute, 500 kB": "--minutes 1 --config docs/settings/500kB.toml",
    "one minute, 200 kB": "--minutes 1 --config docs/settings/200kB.toml",
    "ten minutes": "--minutes 10 --config docs/settings/ten-minutes.toml",
}


def budget_table(data: str, out: Path) -> Iterator[str]:
    """Yield the lines of the table of budgets, whose runs have all cores."""
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in _BUDGETS}
    short = [name for name in _BUDGETS if not name.startswith("ten")]
    tasks = [(name, seed) for seed in SEEDS for name in short]
    for name, seed in [*tasks, *((name, SEEDS[0]) for name in _BUDGETS if name not in short)]:
        folder = out / f"budget-{re.sub(r'[^a-z0-9]+', '-', name)}-{seed}"
        options = f"{_BUDGETS[name]} --evaluate-every {1 << 40}"
        runs[name].append(_run_seed(data, options, seed, folder))
    seeds = " | ".join(f"seed {seed}" for seed in SEEDS)
    yield f"| budget | options | loss | {seeds} | steps | training | file, bytes |"
    yield "| --- | --- | --- |" + " ---: |" * (len(SEEDS) + 3)
    for name, done in runs.items():
        losses = [run["val_loss"] for run in done]
        each = " | ".join([*(f"{loss:.4f}" for loss in losses), "", ""][: len(SEEDS)])
        steps = statistics.median(run["step"] for run in done)
        seconds = statistics.median(run["elapsed_seconds"] for run in done)
        yield (
            f"| {name} | `{_BUDGETS[name]}` | {_mean(losses)} | {each} | {steps:,.0f} | "
            f"{seconds:.0f} s | {max(run['file_bytes'] for run in done):,.0f} |"
        )


def story_table(_: str, out: Path) -> Iterator[str]:
    """Yield the lines of the table of the stories, which the default job learns."""
    floor = entropy_per_character()
    yield "| | loss | above the floor | whole command | peak memory |"
    yield "| --- | ---: | ---: | ---: | ---: |"
    for seed in SEEDS:
        run = run_alone(["--seed", str(seed)], out / f"stories-{seed}")
        yield (
            f"| seed {seed} | {run['val_loss']:.4f} | {run['val_loss'] / floor - 1:.1%} | "
            f"{run['run_seconds']:.0f} s | {run['peak_bytes'] / 2**20:.0f} MiB |"
        )


def memory_table(_: str, out: Path) -> Iterator[str]:
    """Yield the lines of the table of what gradient checkpointing saves and costs.

    The runs take turns, so that a change in the machine's speed meets all of them.
    """
    options = {"": [], "`--gradient-checkpointing`": ["--gradient-checkpointing"]}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in options}
    for turn in range(3):
        for name, given in options.items():
            folder = out / f"memory-{len(given)}-{turn}"
            runs[name].append(run_alone(["--steps", "150", *given], folder))
    speeds = {
        name: statistics.median(run["tokens_per_second"] for run in done)
        for name, done in runs.items()
    }
    yield "| options | peak memory | tokens/s | speed |"
    yield "| --- | ---: | ---: | ---: |"
    for name, done in runs.items():
        peak = statistics.median(run["peak_bytes"] for run in done) / 2**20
        yield f"| {name} | {peak:.0f} MiB | {speeds[name]:,.0f} | {speeds[name] / speeds['']:.2f} |"


# The tables of runs that have all cores.
_ALONE = {
    "tokens": token_table,
    "budgets": budget_table,
    "stories": story_table,
    "memory": memory_table,
}


def fill(text: str, name: str, lines: Sequence[str]) -> str:
    """Return a document with new lines between the marks of a table.

    Raises
    ------
    ValueError
        If the document has no such marks.
    """
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    if begin not in text or end not in text:
        raise ValueError(f"the document has no place for {name}: expected {begin.strip()}")
    head, rest = text.split(begin, 1)
    return head + begin + "".join(f"{line}\n" for line in lines) + end + rest.split(end, 1)[1]


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing and fill in the document."""
    parser = argparse.ArgumentParser(prog="benchmarks.results", description=__doc__)
    parser.add_argument("--data", required=True, help="tinyshakespeare's input.txt")
    parser.add_argument("--out", type=Path, default=Path("runs/results"), help="where runs go")
    parser.add_argument("--document", type=Path, default=Path("docs/RESULTS.md"))
    parser.add_argument("--jobs", type=int, default=available_cores(), help="runs at a time")
    parser.add_argument("--only", choices=("losses", *_ALONE), help="these tables and no others")
    arguments = parser.parse_args(argv)
    data, out = arguments.data, arguments.out
    text = arguments.document.read_text(encoding="utf-8")
    if arguments.only in (None, "losses"):
        outcomes = run_all(data, out, arguments.jobs)
        for name, variants in TABLES.items():
            text = fill(text, name, list(table(variants, outcomes)))
    for name, lines in _ALONE.items():
        if arguments.only in (None, name):
            text = fill(text, name, list(lines(data, out)))
    atomic_write(arguments.document, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
