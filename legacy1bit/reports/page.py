"""Pages about runs: one HTML file with everything in it, which asks for nothing else.

The parts of a page (``table``, ``figure``, ``section``, ``page``) take plain data, escape it, and
know nothing of runs. No script is needed to read one, and it fits a telephone.
"""

import html
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from legacy1bit.hyperparams import (
    DEFAULT_RATES,
    DataConfig,
    ModelConfig,
    TrainingConfig,
    default_warmup,
)
from legacy1bit.logger import METRICS_FILE, SAMPLES_FILE, read_metrics
from legacy1bit.model import CHECKPOINT_FILE, WEIGHTS_FILE, LegacyLLM, load_model
from legacy1bit.reports.figures import Panel, Run, draw, inline_svg, minus, panels_of, printable
from legacy1bit.system.hardware import read_machine
from legacy1bit.training.trainer import read_settings
from legacy1bit.version import __version__

# Texts on a page; of more looks some are left out, evenly.
_MOST_SAMPLES = 12

# Settings that are told of with the machine, which chooses them.
_OF_MACHINE = ("threads", "precision")

# Rows of the table of metrics.
_MOST_LOOKS = 25

_CSS = """
:root { color-scheme: light dark; --back: #ffffff; --ink: #1f2023; --soft: #5c6068;
  --grid: #d9dade; --card: #f5f6f8; --link: #0072b2; }
@media (prefers-color-scheme: dark) { :root { --back: #16181c; --ink: #e6e7ea; --soft: #a4a8b0;
  --grid: #3a3e46; --card: #202329; --link: #56b4e9; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.2rem 1rem 3rem; max-width: 72rem; background: var(--back);
  color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { margin: 0; font-size: 1.6rem; line-height: 1.2; }
h2 { margin: 2.4rem 0 .8rem; font-size: 1.15rem; border-bottom: 1px solid var(--grid); }
p { margin: .5rem 0; }
.soft, figcaption, caption { color: var(--soft); font-size: .875rem; }
.tiles { display: grid; gap: .6rem; margin: 1.2rem 0 0; padding: 0;
  grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); }
.tiles div { background: var(--card); border-radius: .5rem; padding: .5rem .8rem; }
.tiles dt { color: var(--soft); font-size: .8rem; }
.tiles dd { margin: 0; font-size: 1.2rem; font-variant-numeric: tabular-nums; }
.figures { display: grid; gap: 1.2rem 2rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); }
.samples { display: grid; gap: .8rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); }
figure { margin: 0; min-width: 0; }
figure svg { display: block; width: 100%; height: auto; }
svg text { font-family: system-ui, sans-serif !important; }
.scroll { overflow-x: auto; margin-bottom: 1rem; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding-bottom: .3rem; }
th, td { overflow-wrap: normal; padding: .2rem .8rem .2rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--grid); }
th { font-weight: 600; }
td.number, th.number { text-align: right; white-space: nowrap; }
pre { margin: .2rem 0 0; padding: .6rem .8rem; background: var(--card); border-radius: .5rem;
  font: .82rem/1.45 ui-monospace, monospace; white-space: pre-wrap; }
details { margin: .8rem 0; }
summary { cursor: pointer; color: var(--link); }
"""

# Nothing may be fetched, whatever a page says.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


# --- The parts of a page --------------------------------------------------------------------------


def escape(text: str) -> str:
    """Return a text as HTML shows it, with its line breaks, and every character to be seen."""
    return html.escape("\n".join(map(printable, text.split("\n"))))


def page(title: str, lead: str, sections: Sequence[str]) -> str:
    """Return a whole page.

    Parameters
    ----------
    title, lead : str
        Plain text: the heading, and a sentence below it.
    sections : sequence of str
        HTML, as the functions below return it.
    """
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="generator" content="legacy1bit {__version__}">\n'
        f"<title>{escape(title)}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n"
        f"<header><h1>{escape(title)}</h1>\n<p>{escape(lead)}</p></header>\n<main>\n"
        + "\n".join(sections)
        + "\n</main>\n</body>\n</html>\n"
    )


def section(title: str, *parts: str) -> str:
    """Return a section of a page: a heading, plain text, and parts, HTML."""
    return f"<section>\n<h2>{escape(title)}</h2>\n" + "\n".join(parts) + "\n</section>"


def paragraph(text: str) -> str:
    """Return a remark, plain text."""
    return f'<p class="soft">{escape(text)}</p>'


def tiles(numbers: dict[str, str]) -> str:
    """Return a few numbers with their names, in large type."""
    pairs = (f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in numbers.items())
    return f'<dl class="tiles">{"".join(pairs)}</dl>'


def table(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> str:
    """Return a table of plain text.

    Parameters
    ----------
    caption : str
        Empty: none.
    head : sequence of str
    rows : sequence of sequences of str
        As many in each as in the head.
    words : int
        So many columns, the first ones, hold words, and the others numbers.
    """

    def line(tag: str, cells: Sequence[str]) -> str:
        kinds = ("" if i < words else ' class="number"' for i in range(len(cells)))
        told = (
            f"<{tag}{kind}>{escape(cell)}</{tag}>" for kind, cell in zip(kinds, cells, strict=True)
        )
        return f"<tr>{''.join(told)}</tr>"

    named = f"<caption>{escape(caption)}</caption>" if caption else ""
    body = "\n".join(line("td", row) for row in rows)
    return (
        f'<div class="scroll"><table>{named}<thead>{line("th", head)}</thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def figure(panels: Sequence[Panel], name: str, title: str) -> str:
    """Return a figure of panels, one below the other.

    Parameters
    ----------
    panels : sequence of Panel
    name : str
        Of letters, and another one for each figure of a page.
    title : str
        What it shows, for those who cannot see it.
    """
    return f"<figure>{inline_svg(draw(panels, 1), name, title)}</figure>"


def side_by_side(parts: Sequence[str], kind: str = "figures") -> str:
    """Return parts beside each other, as many as there is room for."""
    return f'<div class="{kind}">\n' + "\n".join(parts) + "\n</div>"


def quotation(caption: str, text: str) -> str:
    """Return a text as it is, with its line breaks, and what is to be said of it."""
    return f"<figure><figcaption>{escape(caption)}</figcaption><pre>{escape(text)}</pre></figure>"


def folded(title: str, *parts: str) -> str:
    """Return parts that are shown when somebody asks for them."""
    return f"<details><summary>{escape(title)}</summary>\n" + "\n".join(parts) + "\n</details>"


def some(items: Sequence[Any], most: int) -> list[Any]:
    """Return items, or so many of them, evenly chosen, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


# --- A run ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Told:
    """What a run says of itself."""

    run: Run
    model: ModelConfig
    training: TrainingConfig
    data: DataConfig
    source: dict[str, Any]
    machine: dict[str, Any]
    samples: list[dict[str, Any]]
    weights: LegacyLLM | None

    @property
    def place(self) -> int:
        """Which record is that of the run's model."""
        return -1 if self.weights is None else self.run.place_of(self.weights.provenance.steps)


def report(run: Run, command: str) -> str:
    """Return the page about a run.

    Parameters
    ----------
    run : Run
    command : str
        The command line that trains the same once more.

    Raises
    ------
    OSError
        If a file of the run cannot be read.
    ValueError
        If one is damaged, the run was never saved, or matplotlib is missing.
    """
    folder = run.folder
    weights = load_model(folder) if (folder / WEIGHTS_FILE).exists() else None
    told = _Told(run, *read_settings(folder), read_machine(folder), _read_samples(folder), weights)
    sections = [
        tiles(_numbers(told)),
        section("Curves", _curves(run)),
        section("What it wrote on the way", *_samples(told)),
        section("Measurements", _measurements(run)),
        section("Settings", *_settings(told)),
        section("Weights", *_weights(told)),
        section("Machine", machine_table(told.machine, told.training)),
        section(
            "Once more",
            paragraph(
                "The command with all these settings. On a machine of this kind a run that is not "
                "interrupted repeats to the bit."
            ),
            f"<pre>{escape(command)}</pre>",
        ),
    ]
    return page(run.name, _lead(told), sections)


def _read_samples(folder: Path) -> list[dict[str, Any]]:
    path = folder / SAMPLES_FILE
    samples = read_metrics(path) if path.exists() else []
    for number, sample in enumerate(samples, 1):
        if not isinstance(sample.get("text"), str):
            raise ValueError(f"{path}, line {number}: expected a sample with its text")
    return samples


def _lead(told: _Told) -> str:
    model, source, run = told.model, told.source, told.run
    steps = run.records[-1]["step"] if run.records else 0
    name = source.get("name", "unknown data")
    of = f"{source['stories']:,} {name}" if isinstance(source.get("stories"), int) else f"{name}"
    best = run.records[told.place]["step"] if run.records else 0
    which = "" if best == steps else f" The model is the best one, of step {best:,}."
    return (
        f"A model of {model.num_blocks} blocks, {model.model_dim} wide, {model.scheme}, after "
        f"{steps:,} of {told.training.steps:,} steps on {of}.{which}"
    )


def _show(value: float, form: str) -> str:
    return "\u2013" if value != value else minus(format(value, form))


def _numbers(told: _Told) -> dict[str, str]:
    """Return the numbers that matter most: of the model, and of the whole training."""
    run = told.run

    def number(key: str, place: int = told.place) -> float:
        return (run.column(key) or [float("nan")])[place]

    numbers = {"validation loss": _show(number("val_loss"), ".4f")}
    if run.floor is not None:
        numbers["entropy floor"] = f"{run.floor:.4f}"
        numbers["above the floor"] = _show(number("val_loss") / run.floor - 1, ".1%")
    return numbers | {
        "perplexity": _show(number("perplexity"), ".4f"),
        "bits a byte": _show(number("bits_per_byte"), ".4f"),
        "right at once": _show(number("top1"), ".1%"),
        "training": f"{_show(number('elapsed_seconds', -1), ',.0f')} s",
        "tokens a second": _show(number("tokens_per_second", -1), ",.0f"),
    }


_TITLES = {
    "loss": "Loss by step",
    "perplexity": "Perplexity by step",
    "accuracy": "Share of tokens that were the likeliest, by step",
    "learning-rate": "Learning rate by step",
    "gradient-norm": "Norm of the gradient by step",
    "speed": "Tokens a second by step",
}


def _curves(run: Run) -> str:
    drawn = (figure(panels_of([run], kind), kind, title) for kind, title in _TITLES.items())
    return side_by_side(list(drawn))


def _samples(told: _Told) -> list[str]:
    if not told.samples:
        return [paragraph(f"The run has no {SAMPLES_FILE}.")]
    chosen = some(told.samples, _MOST_SAMPLES)
    count = len(told.samples)
    parts = [paragraph(f"{len(chosen)} of {count} texts.")] if len(chosen) < count else []
    shown = [quotation(f"step {sample['step']:,}", sample["text"].strip("\n")) for sample in chosen]
    return [*parts, side_by_side(shown, "samples")]


_COLUMNS = {
    "train_loss": ("training loss", ".4f"),
    "val_loss": ("validation loss", ".4f"),
    "perplexity": ("perplexity", ".4f"),
    "bits_per_byte": ("bits a byte", ".4f"),
    "top1": ("top 1", ".1%"),
    "top3": ("top 3", ".1%"),
    "top5": ("top 5", ".1%"),
    "val_tokens": ("measured on", ",.0f"),
    "elapsed_seconds": ("seconds", ",.1f"),
}


def _measurements(run: Run) -> str:
    columns = {key: run.column(key) for key in _COLUMNS}
    rows = [
        [f"{run.records[i]['step']:,}"]
        + [_show(columns[key][i], form) for key, (_, form) in _COLUMNS.items()]
        for i in some(range(len(run.records)), _MOST_LOOKS)
    ]
    return table("", ["step", *(name for name, _ in _COLUMNS.values())], rows, words=0)


def _shown(value: Any) -> str:
    if value is None:
        return "\u2013"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _settings(told: _Told) -> list[str]:
    changed: list[list[str]] = []
    rest: list[list[str]] = []
    for record in (told.model, told.training, told.data):
        usual = defaults_of(record)
        for setting in fields(record):
            if setting.name in _OF_MACHINE:
                continue
            value, default = getattr(record, setting.name), getattr(usual, setting.name)
            row = [setting.name, _shown(value), _shown(default), setting.metadata["meaning"]]
            (rest if value == default else changed).append(row)
    head = ["setting", "here", "default", "meaning"]
    source = [[name, _shown(value)] for name, value in told.source.items()]
    others = [[name, value, meaning] for name, value, _, meaning in rest]
    return [
        table("Other than by default", head, changed, words=4)
        if changed
        else paragraph("All settings are the defaults."),
        table("Data", ["what", "which"], source, words=2),
        folded("The other settings", table("", ["setting", "here", "meaning"], others, words=3)),
    ]


def defaults_of(record: Any) -> Any:
    """Return the record of settings that nobody has changed."""
    if isinstance(record, TrainingConfig):
        # The learning rate's default is its optimizer's, and a run's warm-up goes by its steps.
        warmup = None if record.warmup_steps is None else default_warmup(record.steps)
        rate = DEFAULT_RATES[record.optimizer]
        return replace(TrainingConfig(), learning_rate=rate, warmup_steps=warmup)
    return type(record)()


def _weights(told: _Told) -> list[str]:
    run, folder = told.run, told.run.folder
    parts = []
    if told.weights is not None:
        sizes = [
            ["parameters", f"{told.weights.num_parameters:,}"],
            ["bytes of weights", f"{told.weights.stored_bytes():,}"],
        ]
        for name in (WEIGHTS_FILE, CHECKPOINT_FILE, METRICS_FILE):
            if (folder / name).exists():
                sizes.append([f"bytes of {name}", f"{(folder / name).stat().st_size:,}"])
        parts.append(table("Sizes", ["what", "how much"], sizes))
    matrices, codes = run.matrices(), run.codes()
    if not matrices:
        return [*parts, paragraph("No matrix is quantized, or none was looked at yet.")]
    rows = [
        [
            matrix,
            *(_show(run.share(matrix, code)[told.place], ".2%") for code in (*codes, "flipped")),
        ]
        for matrix in matrices
    ]
    head = ["matrix", *map(minus, codes), "changed"]
    panels = [*panels_of([run], "shares"), *panels_of([run], "flips")]
    title = "Shares of the codes of each matrix, and of those that changed, by step"
    return [
        *parts,
        side_by_side(
            [
                table("Codes of the model, and those changed since the look before", head, rows),
                figure(panels, "weights", title),
            ]
        ),
    ]


def machine_table(machine: dict[str, Any], training: TrainingConfig | None = None) -> str:
    """Return a table of what a computer is, and of the settings that go by it."""
    rows: list[tuple[str, Any]] = [
        ("CPU", machine.get("cpu")),
        ("cores", machine.get("cores")),
        *([] if training is None else [("threads", training.threads)]),
        ("instruction set", machine.get("instruction_set")),
        *([] if training is None else [("precision of products", training.precision)]),
        ("system", machine.get("system")),
        ("Python", machine.get("python")),
    ]
    shown = [[name, "not recorded" if value is None else str(value)] for name, value in rows]
    return table("", ["what", "which"], shown, words=2)
