"""The page about a run: curves, generated texts, settings, weights, hardware."""

from dataclasses import asdict, dataclass, fields
from typing import Any

from legacy1bit.data.origin import MIXED
from legacy1bit.hyperparams import (
    DEFAULT_RATES,
    DataConfig,
    ModelConfig,
    TrainingConfig,
    default_warmup,
)
from legacy1bit.model import LegacyLLM, load_model
from legacy1bit.reports.figures import minus, panels_of
from legacy1bit.reports.page import (
    escape,
    figure,
    folded,
    page,
    paragraph,
    quotation,
    section,
    side_by_side,
    some,
    table,
    tiles,
)
from legacy1bit.reports.records import RunRecords, read_records
from legacy1bit.training.run import Run, RunSettings

# Generated texts of a page, and rows of its table of metrics; some are left out where there are
# more.
_MOST_SAMPLES, _MOST_ROWS = 12, 25

# Settings that the table of the hardware has.
_OF_MACHINE = ("threads", "precision")


@dataclass(frozen=True)
class _Content:
    """Everything that the page shows; ``model`` is None where the weights were removed."""

    run: Run
    records: RunRecords
    settings: RunSettings
    samples: list[dict[str, Any]]
    model: LegacyLLM | None

    @property
    def index(self) -> int:
        """The index of the record of the run's model."""
        return -1 if self.model is None else self.records.index_of(self.model.provenance.steps)


def report(run: Run, command: str) -> str:
    """Return the page about a run.

    Parameters
    ----------
    run : Run
    command : str
        The command line that repeats the training.

    Raises
    ------
    OSError
        If a file of the run cannot be read.
    ValueError
        If one is damaged, the run was never saved, or matplotlib is missing.
    """
    records = read_records(run)
    model = load_model(run.folder) if run.weights_file.exists() else None
    content = _Content(run, records, run.settings(), run.samples(), model)
    settings = content.settings
    sections = [
        tiles(_numbers(content)),
        section("Curves", _curves(records)),
        section("Samples during training", *_samples(content)),
        section("Evaluations", _evaluations(records)),
        section("Settings", *_settings(settings)),
        section("Weights", *_weights(content)),
        *([section("Ranks", _ranks(records))] if records.ranks() else []),
        section("Hardware", machine_table(settings.machine, settings.training)),
        section(
            "Reproduce",
            paragraph(
                "The command with all these settings. On the same kind of machine, a run that was "
                "not interrupted repeats bit for bit."
            ),
            f"<pre>{escape(command)}</pre>",
        ),
    ]
    return page(records.name, _lead(content), sections)


def _lead(content: _Content) -> str:
    model, source, records = content.settings.model, content.settings.source, content.records
    steps = records.records[-1]["step"] if records.records else 0
    name = source.get("name", "unknown data")
    of = f"{source['stories']:,} {name}" if isinstance(source.get("stories"), int) else f"{name}"
    best = records.records[content.index]["step"] if records.records else 0
    which = "" if best == steps else f" The model is the best one, of step {best:,}."
    return (
        f"A model of {model.num_blocks} blocks, {model.model_dim} wide, {model.scheme}, after "
        f"{steps:,} of {content.settings.training.steps:,} steps on {of}.{which}"
    )


def _format(value: float, form: str) -> str:
    return "\u2013" if value != value else minus(format(value, form))


def _numbers(content: _Content) -> dict[str, str]:
    """Return the numbers that matter most, of the model and of the whole training."""
    records = content.records

    def number(key: str, index: int = content.index) -> float:
        return (records.column(key) or [float("nan")])[index]

    numbers = {"validation loss": _format(number("val_loss"), ".4f")}
    if records.floor is not None:
        numbers["entropy floor"] = f"{records.floor:.4f}"
        numbers["above the floor"] = _format(number("val_loss") / records.floor - 1, ".1%")
    return numbers | {
        "perplexity": _format(number("perplexity"), ".4f"),
        "bits per byte": _format(number("bits_per_byte"), ".4f"),
        "top-1 accuracy": _format(number("top1"), ".1%"),
        "training time": f"{_format(number('elapsed_seconds', -1), ',.0f')} s",
        "tokens per second": _format(number("tokens_per_second", -1), ",.0f"),
    }


_TITLES = {
    "loss": "Training and validation loss by step",
    "perplexity": "Validation perplexity by step",
    "accuracy": "Top-1 accuracy by step",
    "learning-rate": "Learning rate by step",
    "gradient-norm": "Gradient norm by step",
    "speed": "Tokens per second by step",
}


def _curves(records: RunRecords) -> str:
    drawn = (figure(panels_of([records], kind), kind, title) for kind, title in _TITLES.items())
    return side_by_side(list(drawn))


def _samples(content: _Content) -> list[str]:
    count = len(content.samples)
    if not count:
        return [paragraph(f"The run has no {content.run.samples_file.name}.")]
    samples = some(content.samples, _MOST_SAMPLES)
    remark = [paragraph(f"{len(samples)} of {count} texts.")] if len(samples) < count else []
    parts = [quotation(f"step {one['step']:,}", one["text"].strip("\n")) for one in samples]
    return [*remark, side_by_side(parts, "samples")]


_COLUMNS = {
    "train_loss": ("training loss", ".4f"),
    "val_loss": ("validation loss", ".4f"),
    "perplexity": ("perplexity", ".4f"),
    "bits_per_byte": ("bits per byte", ".4f"),
    "top1": ("top-1", ".1%"),
    "top3": ("top-3", ".1%"),
    "top5": ("top-5", ".1%"),
    "val_tokens": ("validation tokens", ",.0f"),
    "elapsed_seconds": ("seconds", ",.1f"),
}


def _evaluations(records: RunRecords) -> str:
    columns = {name: (records.column(key), form) for key, (name, form) in _COLUMNS.items()}
    columns |= {f"loss of {name}": (losses, ".4f") for name, losses in records.losses().items()}
    rows = [
        [f"{records.records[i]['step']:,}"]
        + [_format(values[i], form) for values, form in columns.values()]
        for i in some(range(len(records.records)), _MOST_ROWS)
    ]
    return table("", ["step", *columns], rows, words=0)


def _ranks(records: RunRecords) -> str:
    """Return a table of the ranks, with means over the whole training."""
    rows = []
    for number, (host, computing, exchanging) in enumerate(records.ranks()):
        seconds = computing + exchanging
        share = exchanging / seconds if seconds else float("nan")
        cells = [_format(computing, ".4f"), _format(exchanging, ".4f")]
        rows.append([f"{number}", host, *cells, _format(share, ".1%"), _format(1 - share, ".1%")])
    head = ["rank", "machine", "computing (s)", "exchanging (s)", "share", "efficiency"]
    caption = (
        "Time of a step; exchanging includes waiting for slower ranks, and the efficiency is the "
        "share of the time in which a rank computes"
    )
    return table(caption, head, rows, words=2)


def _format_setting(value: Any) -> str:
    if value is None:
        return "\u2013"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _settings(settings: RunSettings) -> list[str]:
    changed: list[list[str]] = []
    rest: list[list[str]] = []
    for record in (settings.model, settings.training, settings.data):
        defaults = defaults_of(record)
        for setting in fields(record):
            if setting.name in _OF_MACHINE:
                continue
            value, default = getattr(record, setting.name), defaults[setting.name]
            row = [setting.name, *map(_format_setting, (value, default))]
            (rest if value == default else changed).append([*row, setting.metadata["meaning"]])
    head = ["setting", "value", "default", "meaning"]
    source = [
        row
        for name, value in settings.source.items()
        for row in (_texts(settings) if name == MIXED else [[name, _format_setting(value)]])
    ]
    others = [[name, value, meaning] for name, value, _, meaning in rest]
    return [
        table("Changed from the defaults", head, changed, words=4)
        if changed
        else paragraph("All settings are the defaults."),
        table("Data", ["name", "value"], source, words=2),
        folded("All other settings", table("", ["setting", "value", "meaning"], others, words=3)),
    ]


def _texts(settings: RunSettings) -> list[list[str]]:
    """Return a row for each text that is mixed."""
    return [
        [f"weight of {text.name}", f"{text.weight:g} ({', '.join(text.paths)})"]
        for text in settings.origin.texts
    ]


def defaults_of(record: ModelConfig | TrainingConfig | DataConfig) -> dict[str, Any]:
    """Return the defaults that go with a record of settings, by name."""
    if isinstance(record, TrainingConfig):
        # The default learning rate depends on the optimizer, and the warm-up on the steps.
        warmup = None if record.warmup_steps is None else default_warmup(record.steps)
        rate = DEFAULT_RATES[record.optimizer]
        return asdict(TrainingConfig(learning_rate=rate, warmup_steps=warmup))
    if isinstance(record, ModelConfig):
        return asdict(ModelConfig()) | record.derived()
    return asdict(type(record)())


def _weights(content: _Content) -> list[str]:
    records = content.records
    parts = []
    if content.model is not None:
        sizes = [
            ["parameters", f"{content.model.num_parameters:,}"],
            ["bytes of weights", f"{content.model.stored_bytes():,}"],
            *([f"bytes of {name}", f"{size:,}"] for name, size in content.run.sizes().items()),
        ]
        parts.append(table("Sizes", ["name", "value"], sizes))
    matrices, codes = records.matrices(), records.codes()
    if not matrices:
        return [*parts, paragraph("No matrix is quantized, or none was evaluated yet.")]
    rows = [
        [
            matrix,
            *(
                _format(records.fraction(matrix, code)[content.index], ".2%")
                for code in (*codes, "flipped")
            ),
        ]
        for matrix in matrices
    ]
    head = ["matrix", *map(minus, codes), "flipped"]
    panels = [*panels_of([records], "shares"), *panels_of([records], "flips")]
    title = "Fraction of each code in each matrix, and of the codes that flipped, by step"
    caption = "Fraction of each code, and of the codes that flipped since the evaluation before"
    return [
        *parts,
        side_by_side([table(caption, head, rows), figure(panels, "weights", title)]),
    ]


def machine_table(machine: dict[str, Any], training: TrainingConfig | None = None) -> str:
    """Return a table of the hardware, and of the settings that depend on it."""
    rows: list[tuple[str, Any]] = [
        ("CPU", machine.get("cpu")),
        ("cores", machine.get("cores")),
        *([] if training is None else [("threads", training.threads)]),
        ("instruction set", machine.get("instruction_set")),
        *([] if training is None else [("matrix precision", training.precision)]),
        ("operating system", machine.get("system")),
        ("Python", machine.get("python")),
    ]
    cells = [[name, "not recorded" if value is None else str(value)] for name, value in rows]
    return table("", ["name", "value"], cells, words=2)
