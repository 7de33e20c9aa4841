"""Figures of runs: curves, shares of codes, maps of weights and of attention.

What a curve shows are the numbers of ``metrics.jsonl`` as they stand there. matplotlib is loaded
when the first figure is drawn, without a display and without its global state.
"""

import contextlib
import html
import io
import json
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from legacy1bit.data.origin import is_stories
from legacy1bit.data.stories import entropy_per_character
from legacy1bit.data.tokenizer import Tokenizer
from legacy1bit.forward import (
    forward_embedding_batch,
    forward_transformer_block_batch_with_context,
)
from legacy1bit.hyperparams import SETTINGS_FILE
from legacy1bit.logger import METRICS_FILE, read_metrics
from legacy1bit.model import LegacyLLM, TernaryMatrix, TransformerBlockContext
from legacy1bit.system.files import atomic_write, mistaken_file
from legacy1bit.system.optional import load_extra
from legacy1bit.training.trainer import read_settings

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg", ".pdf")

# Of Okabe and Ito, who chose them so that everybody can tell them apart; black is the ink's, and
# yellow, hard to see on white, the last.
_COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#7f7f7f",
    "#c9b900",
)
_MARKERS = "os^DvPX*"
_LINES = ("-", "--", "-.", ":")

# Colours that nothing else has, so that a page can put its own in their place.
INK = "#1f2023"
GRID = "#d9dade"

_STYLE = {
    "axes.edgecolor": INK,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.labelcolor": INK,
    "axes.labelsize": 9,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "figure.constrained_layout.use": True,
    "font.size": 9,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "image.cmap": "Blues",
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "legend.handlelength": 2.6,
    "lines.linewidth": 1.6,
    "lines.markersize": 3.8,
    "savefig.dpi": 160,
    "svg.fonttype": "none",
    # Names of runs and tokens are text, whatever signs are in them.
    "text.parse_math": False,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}

# Inches.
_PANEL = (4.2, 2.5)
_LEGEND_LINE = 0.2
_CHARACTER = 0.07
_SMALLEST_CELL, _LARGEST_MAP = 0.02, 9.0

# Beyond so many the tokens beside a map of attention cannot be read, and maps cannot be told apart.
_MOST_LABELS = 64
_MOST_MAPS = 64
_MOST_TOKENS = 1024


def load_matplotlib() -> Any:
    """Return the package that draws.

    Raises
    ------
    ValueError
        If it is not installed.
    """
    modules = ("colors", "figure", "patches", "style", "ticker")
    return load_extra("figures need", "matplotlib", *modules)


def printable(text: str) -> str:
    """Return a text of which every character can be seen, and stand in XML."""
    return "".join(map(_visible, text))


def _visible(character: str) -> str:
    code = ord(character)
    if character == "\n":
        return "\u23ce"
    if code < 0x20 or 0x7F <= code < 0xA0 or 0xD800 <= code < 0xE000 or code & 0xFFFE == 0xFFFE:
        return "\ufffd"
    return character


# --- Runs -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """What a run has recorded.

    Attributes
    ----------
    folder : Path
    records : list of dict
        The lines of ``metrics.jsonl``, oldest first.
    floor : float or None
        The lowest loss that any model can reach, where it is known.
    """

    folder: Path
    records: list[dict[str, Any]]
    floor: float | None = None

    @property
    def name(self) -> str:
        """The folder's own name."""
        return printable(self.folder.name or self.folder.resolve().name)

    @property
    def unit(self) -> str:
        """What a loss is of: a character, where each token is one byte, or a token."""
        last = self.records[-1] if self.records else {}
        size = last.get("val_bytes")
        same = size is not None and size == last.get("val_tokens")
        return "character" if same or self.floor is not None else "token"

    def steps(self) -> list[float]:
        """Return the steps of the records."""
        return self.column("step")

    def place_of(self, step: int) -> int:
        """Return which record is that of a step; the last, where none is."""
        steps = [record.get("step") for record in self.records]
        return steps.index(step) if step in steps else len(steps) - 1

    def column(self, key: str) -> list[float]:
        """Return a number of every record, NaN where there is none or it was not finite.

        Raises
        ------
        ValueError
            If something else stands there.
        """
        return [self._number(record.get(key), key, record) for record in self.records]

    def matrices(self) -> list[str]:
        """Return the names of the matrices whose codes were counted, in the model's order."""
        return list(
            dict.fromkeys(name for record in self.records for name in self._weights(record))
        )

    def share(self, matrix: str, code: str) -> list[float]:
        """Return the share of a matrix's code, or of ``flipped``, in every record, or NaN.

        Raises
        ------
        ValueError
            If something else than a number stands there.
        """
        found = []
        for record in self.records:
            shares = self._weights(record).get(matrix, {})
            if not isinstance(shares, dict):
                raise self._damaged(f"weights of {matrix}", shares, "shares", record)
            found.append(self._number(shares.get(code), f"{code} of {matrix}", record))
        return found

    def codes(self) -> list[str]:
        """Return the codes that were counted, in rising order."""
        found = {
            code
            for record in self.records
            for shares in self._weights(record).values()
            if isinstance(shares, dict)
            for code in shares
            if re.fullmatch(r"-?\d{1,3}", code)
        }
        return sorted(found, key=int)

    def _weights(self, record: dict[str, Any]) -> dict[str, Any]:
        weights = record.get("weights")
        if weights is None:
            return {}
        if not isinstance(weights, dict):
            raise self._damaged("weights", weights, "shares by matrix", record)
        return weights

    def _number(self, value: Any, key: str, record: dict[str, Any]) -> float:
        if value is None:
            return math.nan
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self._damaged(key, value, "a number", record)
        try:
            number = float(value)
        except OverflowError:
            return math.nan
        # What is larger no axis can hold.
        return number if abs(number) < 1e300 else math.nan

    def _damaged(self, key: str, value: Any, wanted: str, record: dict[str, Any]) -> ValueError:
        told = json.dumps(value)[:40]
        return ValueError(
            f"{self.folder / METRICS_FILE}: {key} of step {str(record['step'])[:20]} is {told}, "
            f"expected {wanted}"
        )


def read_run(folder: Path) -> Run:
    """Read what a run has recorded; one that ended before it was saved has no settings.

    Raises
    ------
    OSError
        If a file cannot be read.
    ValueError
        If the folder is no run, or its metrics or settings are damaged.
    """
    if not folder.is_dir():
        reason = mistaken_file(folder) if folder.is_file() else None
        reason = reason or "expected a run's folder"
        raise ValueError(f"{folder} is not a training run: {reason}")
    if not (folder / METRICS_FILE).is_file():
        raise ValueError(f"{folder} is not a training run: it has no {METRICS_FILE}")
    records = read_metrics(folder / METRICS_FILE)
    floor = None
    if (folder / SETTINGS_FILE).exists():
        source = read_settings(folder)[3]
        if is_stories(source):
            floor = entropy_per_character()
    return Run(folder, records, floor)


# --- Panels: what is drawn, as plain data ---------------------------------------------------------


@dataclass(frozen=True)
class Series:
    """A line of a panel, or points.

    Attributes
    ----------
    label : str
        What the legend calls it; the same label is told once, none not at all.
    x, y : sequence of float
        Where y is NaN the line is interrupted.
    colour, line, marker : int
        Which of the colours, line styles and markers; there are always more.
    joined : bool
        Whether a line joins the points.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int = 0
    line: int = 0
    marker: int = 0
    joined: bool = True


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Attributes
    ----------
    title, x_label, y_label : str
        The labels with their units.
    series : list of Series
    floors : dict of str to float
        Horizontal lines by their labels.
    percent : bool
        Whether y is a share, to be shown in percent.
    whole : bool
        Whether x counts something.
    """

    title: str
    x_label: str
    y_label: str
    series: list[Series]
    floors: dict[str, float] = field(default_factory=dict)
    percent: bool = False
    whole: bool = True


def _unit(runs: Sequence[Run]) -> str:
    units = {run.unit for run in runs}
    return units.pop() if len(units) == 1 else "token"


def _names(runs: Sequence[Run]) -> list[str]:
    """Return what tells runs apart: their folders' names, or their paths where those are alike."""
    names = [run.name for run in runs]
    return names if len(set(names)) == len(names) else [printable(str(run.folder)) for run in runs]


def _curves(runs: Sequence[Run], key: str, title: str, y_label: str) -> list[Panel]:
    """Return the panel of one number of the metrics."""
    labels = _names(runs) if len(runs) > 1 else [""]
    series = [
        Series(label, run.steps(), run.column(key), i, i // len(_COLOURS), i)
        for i, (run, label) in enumerate(zip(runs, labels, strict=True))
    ]
    return [Panel(title, "step", y_label, series)]


def _loss(runs: Sequence[Run]) -> list[Panel]:
    floor = next((run.floor for run in runs if run.floor is not None), None)
    floors = {} if floor is None else {"entropy floor": floor}
    label = f"nats a {_unit(runs)}"
    if len(runs) == 1:
        [run] = runs
        series = [
            Series("validation", run.steps(), run.column("val_loss")),
            Series("training", run.steps(), run.column("train_loss"), 1, 1, 1),
        ]
        return [Panel("Loss", "step", label, series, floors)]
    series = []
    for i, (run, name) in enumerate(zip(runs, _names(runs), strict=True)):
        series.append(Series(name, run.steps(), run.column("val_loss"), i, 0, i))
        series.append(Series("", run.steps(), run.column("train_loss"), i, 3, i))
    return [Panel("Loss (line: validation, dots: training)", "step", label, series, floors)]


def _perplexity(runs: Sequence[Run]) -> list[Panel]:
    return _curves(runs, "perplexity", "Perplexity", f"of a {_unit(runs)}")


def _learning_rate(runs: Sequence[Run]) -> list[Panel]:
    return _curves(runs, "learning_rate", "Learning rate", "at this step")


def _gradient_norm(runs: Sequence[Run]) -> list[Panel]:
    return _curves(runs, "gradient_norm", "The gradient's norm", "mean since the last look")


def _speed(runs: Sequence[Run]) -> list[Panel]:
    return _curves(runs, "tokens_per_second", "Speed of training", "tokens a second")


def _accuracy(runs: Sequence[Run]) -> list[Panel]:
    [panel] = _curves(runs, "top1", "Tokens that were the likeliest", "of the validation set")
    return [replace(panel, percent=True)]


def _page(runs: Sequence[Run]) -> list[Panel]:
    main = (_loss, _perplexity, _accuracy, _learning_rate, _gradient_norm, _speed)
    return [panel for panels in main for panel in panels(runs)]


_MATRIX = re.compile(r"(?:blocks\.(\d{1,6})\.)?(.*)", re.DOTALL)


def _by_matrix(run: Run, code: str, title: str) -> Panel:
    """Return a panel with a line for each matrix of a run: its colour tells the kind of matrix,
    its style and marker the block."""
    kinds: dict[str, int] = {}
    series = []
    for matrix in run.matrices():
        found = _MATRIX.fullmatch(matrix)
        assert found
        colour, block = kinds.setdefault(found[2], len(kinds)), int(found[1] or 0)
        label, y = printable(matrix), run.share(matrix, code)
        series.append(Series(label, run.steps(), y, colour, block, block))
    return Panel(title, "step", "of a matrix's weights", series, percent=True)


def _shares(runs: Sequence[Run]) -> list[Panel]:
    return [
        _by_matrix(run, code, f"{prefix}Weights that are {minus(code)}")
        for run, prefix in zip(runs, _prefixes(runs), strict=True)
        for code in run.codes() or ["0"]
    ]


def _flips(runs: Sequence[Run]) -> list[Panel]:
    return [
        _by_matrix(run, "flipped", f"{prefix}Weights changed since the last look")
        for run, prefix in zip(runs, _prefixes(runs), strict=True)
    ]


def _prefixes(runs: Sequence[Run]) -> list[str]:
    return [f"{name}: " for name in _names(runs)] if len(runs) > 1 else [""]


def minus(number: str) -> str:
    """Return a number with the sign that is as wide as a plus."""
    return number.replace("-", "\u2212")


# What can be drawn of the metrics alone, of one run or of several.
CURVES: dict[str, Callable[[Sequence[Run]], list[Panel]]] = {
    "page": _page,
    "loss": _loss,
    "perplexity": _perplexity,
    "accuracy": _accuracy,
    "learning-rate": _learning_rate,
    "gradient-norm": _gradient_norm,
    "speed": _speed,
    "shares": _shares,
    "flips": _flips,
}


def panels_of(runs: Sequence[Run], kind: str) -> list[Panel]:
    """Return what a kind of curves shows of runs.

    Raises
    ------
    ValueError
        If there is no run or no such kind, or the metrics are damaged.
    """
    if kind not in CURVES:
        raise ValueError(f"kind is {kind!r}, expected one of {', '.join(CURVES)}")
    if not runs:
        raise ValueError("there is no run to draw")
    return CURVES[kind](runs)


def size_panel(runs: Sequence[Run], models: Sequence[LegacyLLM]) -> Panel:
    """Return the panel of what the models of runs have come to, over the bytes of their weights.

    Losses of different tokens compare by the bytes that these stand for.
    """
    series = [
        Series(name, [model.stored_bytes()], [_bits_of(run, model)], i, 0, i, joined=False)
        for i, (run, name, model) in enumerate(zip(runs, _names(runs), models, strict=True))
    ]
    return Panel("Loss against size", "bytes of weights", "bits a byte", series)


def _bits_of(run: Run, model: LegacyLLM) -> float:
    bits = run.column("bits_per_byte")
    return bits[run.place_of(model.provenance.steps)] if bits else math.nan


# --- Figures --------------------------------------------------------------------------------------


@contextlib.contextmanager
def _style() -> Iterator[Any]:
    """Draw by the package's defaults and ours, whatever the user has set for other figures."""
    package = load_matplotlib()
    with warnings.catch_warnings(), package.style.context(["default", _STYLE]):
        # A sign that the font lacks is drawn as a box, which says as much.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield package


def draw(panels: Sequence[Panel], columns: int = 2) -> "Figure":
    """Return a figure of panels, so many beside each other, with one legend below them."""
    columns = max(min(columns, len(panels)), 1)
    rows = -(-len(panels) // columns)
    width = _PANEL[0] * columns
    with _style() as package:
        figure: Figure = package.figure.Figure()
        told: dict[str, Any] = {}
        for place, panel in enumerate(panels, 1):
            axes = figure.add_subplot(rows, columns, place)
            for label, line in _draw_panel(package, axes, panel):
                told.setdefault(label, line)
        lines = 0
        if len(told) > 1 or (told and any(panel.floors for panel in panels)):
            # What stands beside the text is as wide as seven characters.
            sizes = [_CHARACTER * (len(label) + 7) for label in told]
            beside = len(told) if sum(sizes) <= width else max(int(width / max(sizes)), 1)
            lines = -(-len(told) // beside)
            figure.legend(list(told.values()), list(told), loc="outside lower center", ncols=beside)
        figure.set_size_inches(width, _PANEL[1] * rows + _LEGEND_LINE * lines)
    return figure


def _number(x: float, _: object = None) -> str:
    """Return what stands at a tick."""
    for factor, name in ((1e9, " G"), (1e6, " M")):
        if factor <= abs(x) < 1e13:
            return minus(f"{x / factor:.10g}{name}")
    return minus(f"{x:,.10g}")


def _percent(x: float, _: object = None) -> str:
    return minus(f"{100 * x:.10g}%")


def _draw_panel(package: Any, axes: "Axes", panel: Panel) -> Iterator[tuple[str, Any]]:
    """Draw a panel and yield what the legend is to tell."""
    axes.set(title=panel.title, xlabel=panel.x_label, ylabel=panel.y_label)
    ticker = package.ticker
    steps = [1, 2, 2.5, 5, 10]
    axes.xaxis.set_major_locator(ticker.MaxNLocator(6, steps=steps, integer=panel.whole))
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(_number))
    axes.yaxis.set_major_formatter(ticker.FuncFormatter(_percent if panel.percent else _number))
    for one in panel.series:
        y = np.asarray(one.y, float)
        every = max(len(y) // 12, 1) if len(y) > 40 and np.isfinite(y).all() else None
        [line] = axes.plot(
            one.x,
            y,
            color=_COLOURS[one.colour % len(_COLOURS)],
            linestyle=_LINES[one.line % len(_LINES)] if one.joined else "none",
            marker=_MARKERS[one.marker % len(_MARKERS)],
            markevery=every,
            markersize=_STYLE["lines.markersize"] if one.joined else 7,
        )
        if one.label:
            yield one.label, line
    for label, height in panel.floors.items():
        line = axes.axhline(height, color=INK, linewidth=1.0, linestyle=(0, (1, 1.5)))
        yield f"{label}, {height:.4f}", line
    if not any(np.isfinite(np.asarray(one.y, float)).any() for one in panel.series):
        axes.text(0.5, 0.5, "nothing was measured", ha="center", transform=axes.transAxes)
        if not panel.floors:
            axes.set(xticks=[], yticks=[])


def map_weights(model: LegacyLLM, layer: str | None = None) -> "Figure":
    """Return a map of a matrix: a row for each output, a column for each input.

    Parameters
    ----------
    model : LegacyLLM
    layer : str, optional
        The matrix by its name; the first quantized one, or the first, when not given.

    Raises
    ------
    ValueError
        If there is no such matrix.
    """
    matrices = {
        name: value
        for name, value in model.parameters.items()
        if isinstance(value, TernaryMatrix) or value.ndim == 2
    }
    if layer is None:
        of_blocks = (name for name in matrices if name.startswith("blocks."))
        layer = next(of_blocks, next(iter(matrices)))
    if layer not in matrices:
        raise ValueError(f"there is no layer {layer!r}, expected one of {', '.join(matrices)}")
    matrix = matrices[layer]
    rows, cols = matrix.shape
    cell = min(max(_SMALLEST_CELL, 3.2 / max(rows, cols)), _LARGEST_MAP / max(rows, cols))
    with _style() as package:
        figure: Figure = package.figure.Figure(
            figsize=(max(cols * cell, 3.0) + 1.6, max(rows * cell, 0.6) + 1.0)
        )
        figure.set_layout_engine("compressed", h_pad=0.08)
        axes = figure.add_subplot()
        axes.set(xlabel="input", ylabel="output", title=f"{layer}, {rows} \u00d7 {cols}")
        axes.grid(visible=False)
        for spine in axes.spines.values():
            spine.set_visible(True)
        if isinstance(matrix, TernaryMatrix):
            _draw_codes(package, figure, axes, matrix.values)
        else:
            most = float(np.abs(matrix).max()) or 1.0
            image = axes.imshow(matrix, _signs(package), vmin=-most, vmax=most, **_BLENDED)
            figure.colorbar(image, ax=axes, label="weight", pad=0.02)
    return figure


# Where a map has more weights than pixels, these have the mean of the weights' colours.
_BLENDED: dict[str, Any] = {"interpolation_stage": "rgba"}


def _signs(package: Any) -> Any:
    ends = [_COLOURS[0], "#f4f4f2", _COLOURS[1]]
    return package.colors.LinearSegmentedColormap.from_list("signs", ends, N=255)


def _draw_codes(package: Any, figure: "Figure", axes: "Axes", values: npt.NDArray[np.int8]) -> None:
    """Draw the codes of a matrix, each in a colour of its own, and a legend with their shares."""
    codes = sorted({sign * int(code) for code in np.unique(values) for sign in (1, -1)})
    most = codes[-1] or 1
    colours = [_signs(package)(0.5 + code / most / 2) for code in codes]
    edges = [codes[0] - 0.5, *((a + b) / 2 for a, b in pairwise(codes)), codes[-1] + 0.5]
    axes.imshow(
        values,
        package.colors.ListedColormap(colours),
        package.colors.BoundaryNorm(edges, len(codes)),
        **_BLENDED,
    )
    patches = [package.patches.Patch(facecolor=one, edgecolor=GRID) for one in colours]
    told = [f"{minus(str(code))}: {np.mean(values == code):.1%}" for code in codes]
    figure.legend(patches, told, loc="outside lower center", ncols=len(told), handlelength=1.0)


def attention_of(model: LegacyLLM, tokens: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
    """Return how much each token looks at each before it: float32[blocks, H, T, T].

    Parameters
    ----------
    model : LegacyLLM
    tokens : int32[T]

    Raises
    ------
    IndexError
        If a token is none of the model's.
    ValueError
        If there are more than the model's positions reach.
    """
    config = model.config
    found = []
    x = forward_embedding_batch(model.parameters["embedding.weight"], tokens[None])
    for block in model.blocks:
        context = TransformerBlockContext(
            config.model_dim, config.ffn_dim, config.num_heads, 1, tokens.size, config.sub_norm
        )
        x = forward_transformer_block_batch_with_context(block, x, context)
        found.append(context.probs.reshape(config.num_heads, tokens.size, tokens.size).copy())
    return np.stack(found)


def map_attention(
    model: LegacyLLM, tokenizer: Tokenizer, prompt: str | bytes, block: int | None = None
) -> "Figure":
    """Return maps of where each token of a prompt looks, a row for each block, a column a head.

    Parameters
    ----------
    model : LegacyLLM
    tokenizer : Tokenizer
    prompt : str or bytes
    block : int, optional
        Only this one, counted from 0.

    Raises
    ------
    IndexError
        If a byte of the prompt is no token of the model's.
    ValueError
        If the prompt is empty or longer than the model's context, or there is no such block.
    """
    config = model.config
    if block is not None and not 0 <= block < config.num_blocks:
        raise ValueError(f"there is no block {block}, expected 0 to {config.num_blocks - 1}")
    chosen = range(config.num_blocks) if block is None else [block]
    if len(chosen) * config.num_heads > _MOST_MAPS:
        raise ValueError(
            f"{len(chosen)} blocks of {config.num_heads} heads are more than {_MOST_MAPS} maps: "
            "name one block"
        )
    tokens = tokenizer.encode(prompt)
    if not tokens.size:
        raise ValueError("the prompt is empty, expected text for the model to look at")
    if tokenizer.bos_token is not None:
        tokens = np.concatenate([np.array([tokenizer.bos_token], np.int32), tokens])
    most = min(config.sequence_length, _MOST_TOKENS)
    if tokens.size > most:
        raise ValueError(f"the prompt has {tokens.size} tokens, expected at most {most}")
    maps = attention_of(model, tokens)[list(chosen)]
    labels = [_token_label(tokenizer, int(token)) for token in tokens]
    side = min(max(0.13 * tokens.size, 1.7), 5.5)
    heads = config.num_heads
    columns = heads if len(chosen) > 1 else math.ceil(math.sqrt(heads))
    rows = -(-len(chosen) * heads // columns)
    with _style() as package:
        figure: Figure = package.figure.Figure(figsize=(side * columns + 1.6, side * rows + 1.1))
        figure.set_layout_engine("compressed", h_pad=0.08)
        grid: Any = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
        for axes in grid.flat[len(chosen) * heads :]:
            axes.set_axis_off()
        for axes, (i, j) in zip(grid.flat, np.ndindex(len(chosen), heads), strict=False):
            seen = np.ma.masked_array(maps[i, j], np.triu(np.ones_like(maps[i, j], bool), 1))
            # One scale for all, or they could not be compared.
            image = axes.imshow(seen, vmin=0.0, vmax=float(maps.max()), aspect="equal")
            axes.set_title(f"block {chosen[i]}, head {j}")
            axes.set_facecolor("#e8e8e8")
            axes.grid(visible=False)
            if tokens.size <= _MOST_LABELS:
                size = min(side / tokens.size * 72 * 0.8, 8.0)
                style = {"fontsize": size, "family": "monospace"}
                axes.set_xticks(range(tokens.size), labels, rotation=90, **style)
                axes.set_yticks(range(tokens.size), labels, **style)
                axes.tick_params(length=0)
        figure.supxlabel("is looked at", fontsize=9)
        figure.supylabel("looks", fontsize=9)
        bar = figure.colorbar(image, ax=grid, fraction=0.03, pad=0.02, aspect=30)
        bar.ax.yaxis.set_major_formatter(package.ticker.PercentFormatter(1.0))
        bar.set_label("share of a token's attention")
    return figure


def _token_label(tokenizer: Tokenizer, token: int) -> str:
    text = printable(tokenizer.decode([token]).decode("utf-8", "replace"))
    return text.replace(" ", "\u2423") or f"#{token}"


def save_figure(figure: "Figure", path: Path) -> None:
    """Write a figure as PNG, SVG or PDF, as the file's name says; the same figure as the same
    bytes.

    Raises
    ------
    OSError
        If the file cannot be written; an earlier one is untouched.
    ValueError
        If the name ends in something else, or the figure is too large for a picture.
    """
    check_suffix(path, SUFFIXES)
    atomic_write(path, _render(figure, path.suffix.lower()[1:]))


def check_suffix(path: Path, suffixes: Sequence[str]) -> None:
    """Raise ``ValueError`` for a file whose name does not end in one of these."""
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"{path} is to be written, expected a name in {', '.join(suffixes)}")


def _render(figure: "Figure", form: str, **more: Any) -> bytes:
    buffer = io.BytesIO()
    # What would be the time of writing.
    undated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(form, {})
    with _style() as package, package.rc_context({"svg.hashsalt": "legacy1bit"}):
        figure.savefig(buffer, format=form, metadata=undated, **more)
    return buffer.getvalue()


_TAG = re.compile(r"<[^>]*>")
_IDENTITY = re.compile(r"(\bid=\"|url\(#|href=\"#)")


def inline_svg(figure: "Figure", name: str, title: str) -> str:
    """Return a figure as an element of a page, in the page's own colours.

    Parameters
    ----------
    figure : Figure
    name : str
        Stands before every id in it, so that figures of a page do not share any.
    title : str
        What the figure shows, for those who cannot see it.
    """
    text = _render(figure, "svg", transparent=True).decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, count=1, flags=re.DOTALL)
    text = _TAG.sub(lambda tag: _IDENTITY.sub(rf"\g<1>{name}-", tag[0]), text)
    text = text.replace(INK, "currentColor").replace(GRID, "var(--grid)")
    head, rest = text.split(">", 1)
    head = re.sub(r' (width|height)="[^"]*"', "", head)
    return f'{head} role="img" aria-label="{html.escape(title)}">{rest}'
