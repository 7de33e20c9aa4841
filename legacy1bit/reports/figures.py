"""Figures of runs: curves, fractions of codes, maps of weights and of attention.

Curves show the numbers of ``metrics.jsonl`` unchanged. matplotlib is loaded when the first figure
is drawn, without a display and without its global state.
"""

import contextlib
import html
import io
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

from legacy1bit.data.tokenizer import Tokenizer
from legacy1bit.forward import ForwardContext, forward_llm_batch
from legacy1bit.model import LegacyLLM, TernaryMatrix
from legacy1bit.reports.records import RunRecords, printable
from legacy1bit.system.files import atomic_write
from legacy1bit.system.optional import load_extra

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg", ".pdf")

# The palette of Okabe and Ito, which color-blind readers can tell apart; black is the ink, and
# yellow, hard to see on white, comes last.
_COLORS = (
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

# Colors that nothing else has, so that a page can replace them.
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
    # Names of runs and tokens are plain text.
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

# Limits of maps of attention: with more, token labels and maps become unreadable.
_MOST_LABELS = 64
_MOST_MAPS = 64
_MOST_TOKENS = 1024


def load_matplotlib() -> Any:
    """Return matplotlib.

    Raises
    ------
    ValueError
        If it is not installed.
    """
    modules = ("colors", "figure", "patches", "style", "ticker")
    return load_extra("figures need", "matplotlib", *modules)


# --- Panels: what is drawn, as plain data ---------------------------------------------------------


@dataclass(frozen=True)
class Series:
    """A line of a panel, or points.

    Attributes
    ----------
    label : str
        The name in the legend, which has each name once; empty: not in the legend.
    x, y : sequence of float
        Where y is NaN the line is interrupted.
    color, line, marker : int
        Numbers of a color, line style and marker, modulo the number of those.
    joined : bool
        Whether a line joins the points.
    thin : bool
        Whether the line is thin and has no markers, as for a curve with noise.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    color: int = 0
    line: int = 0
    marker: int = 0
    joined: bool = True
    thin: bool = False


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Attributes
    ----------
    title, x_label, y_label : str
        The labels name the units.
    series : list of Series
    floors : dict of str to float
        Horizontal lines by their labels.
    percent : bool
        Whether y is a fraction, labeled in percent.
    whole : bool
        Whether the ticks of x are whole numbers.
    top : float, optional
        The largest y to show; by default all are shown.
    """

    title: str
    x_label: str
    y_label: str
    series: list[Series]
    floors: dict[str, float] = field(default_factory=dict)
    percent: bool = False
    whole: bool = True
    top: float | None = None


def _unit(runs: Sequence[RunRecords]) -> str:
    units = {run.unit for run in runs}
    return units.pop() if len(units) == 1 else "token"


def _names(runs: Sequence[RunRecords]) -> list[str]:
    """Return the names of the runs' folders, or their paths where two have the same name."""
    names = [each.name for each in runs]
    unique = len(set(names)) == len(names)
    return names if unique else [printable(str(each.run.folder)) for each in runs]


def _labels(runs: Sequence[RunRecords]) -> list[str]:
    """Return the labels of runs in a legend; a single run needs none."""
    return _names(runs) if len(runs) > 1 else [""]


def _curves(runs: Sequence[RunRecords], key: str, title: str, y_label: str) -> list[Panel]:
    """Return the panel of one number of the metrics."""
    series = [
        Series(label, run.steps(), run.column(key), i, i // len(_COLORS), i)
        for i, (run, label) in enumerate(zip(runs, _labels(runs), strict=True))
    ]
    return [Panel(title, "step", y_label, series)]


def _loss(runs: Sequence[RunRecords]) -> list[Panel]:
    """Return the panel of the losses: training a thin line, validation a line with markers.

    The first tenth of the training loss may lie above the axes, or it would flatten the rest.
    """
    floor = next((run.floor for run in runs if run.floor is not None), None)
    floors = {} if floor is None else {"entropy floor": floor}
    series: list[Series] = []
    highest: list[float] = []
    alone = len(runs) == 1
    for i, (run, name) in enumerate(zip(runs, _names(runs), strict=True)):
        steps, losses = run.train_losses()
        val_losses = run.column("val_loss")
        # The colors of a single run tell its losses apart, those of several the runs.
        series += [
            Series("validation" if alone else name, run.steps(), val_losses, i, 0, i),
            Series("training" if alone else "", steps, losses, i + alone, thin=True),
        ]
        highest += [*val_losses, *losses[len(losses) // 10 :]]
        # Of texts that are mixed, below the mean of them.
        for number, (text, part) in enumerate(run.losses().items() if alone else ()):
            label = f"validation on {printable(text)}"
            series.append(Series(label, run.steps(), part, number + 2, 1, number + 2))
            highest += part
    title = "Loss" if alone else "Loss (thick: validation, thin: training)"
    return [Panel(title, "step", f"nats per {_unit(runs)}", series, floors, top=_largest(highest))]


def _largest(values: Sequence[float]) -> float | None:
    return max((value for value in values if math.isfinite(value)), default=None)


def _perplexity(runs: Sequence[RunRecords]) -> list[Panel]:
    return _curves(runs, "perplexity", "Validation perplexity", f"perplexity per {_unit(runs)}")


def _learning_rate(runs: Sequence[RunRecords]) -> list[Panel]:
    return _curves(runs, "learning_rate", "Learning rate", "learning rate")


def _gradient_norm(runs: Sequence[RunRecords]) -> list[Panel]:
    return _curves(runs, "gradient_norm", "Gradient norm", "mean L2 norm")


def _speed(runs: Sequence[RunRecords]) -> list[Panel]:
    return _curves(runs, "tokens_per_second", "Training speed", "tokens per second")


def _accuracy(runs: Sequence[RunRecords]) -> list[Panel]:
    [panel] = _curves(runs, "top1", "Top-1 accuracy", "validation accuracy")
    return [replace(panel, percent=True)]


def _page(runs: Sequence[RunRecords]) -> list[Panel]:
    main = (_loss, _perplexity, _accuracy, _learning_rate, _gradient_norm, _speed)
    return [panel for panels in main for panel in panels(runs)]


_MATRIX = re.compile(r"(?:blocks\.(\d{1,6})\.)?(.*)", re.DOTALL)


def _by_matrix(run: RunRecords, code: str, title: str) -> Panel:
    """Return a panel with a line for each matrix: colors are layers, styles are blocks."""
    layers: dict[str, int] = {}
    series = []
    for matrix in run.matrices():
        match = _MATRIX.fullmatch(matrix)
        assert match
        color, block = layers.setdefault(match[2], len(layers)), int(match[1] or 0)
        label, y = printable(matrix), run.fraction(matrix, code)
        series.append(Series(label, run.steps(), y, color, block, block))
    return Panel(title, "step", "fraction of weights", series, percent=True)


def _shares(runs: Sequence[RunRecords]) -> list[Panel]:
    return [
        _by_matrix(run, code, f"{prefix}Weights equal to {minus(code)}")
        for run, prefix in zip(runs, _prefixes(runs), strict=True)
        for code in run.codes() or ["0"]
    ]


def _flips(runs: Sequence[RunRecords]) -> list[Panel]:
    return [
        _by_matrix(run, "flipped", f"{prefix}Weights flipped since the last evaluation")
        for run, prefix in zip(runs, _prefixes(runs), strict=True)
    ]


def _prefixes(runs: Sequence[RunRecords]) -> list[str]:
    return [f"{name}: " if name else "" for name in _labels(runs)]


def minus(number: str) -> str:
    """Return a number with a minus sign in place of a hyphen."""
    return number.replace("-", "\u2212")


# The kinds of figures that need only metrics, of one run or of several.
CURVES: dict[str, Callable[[Sequence[RunRecords]], list[Panel]]] = {
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


def panels_of(runs: Sequence[RunRecords], kind: str) -> list[Panel]:
    """Return the panels of a kind of figure.

    Raises
    ------
    ValueError
        If ``runs`` is empty, there is no such kind, or the metrics are damaged.
    """
    if kind not in CURVES:
        raise ValueError(f"kind is {kind!r}, expected one of {', '.join(CURVES)}")
    if not runs:
        raise ValueError("there is no run to draw")
    return CURVES[kind](runs)


def size_panel(runs: Sequence[RunRecords], models: Sequence[LegacyLLM]) -> Panel:
    """Return the panel of the loss of runs over the bytes of their models' weights.

    The loss is in bits per byte, which compares models with different tokenizers.
    """
    series = [
        Series(name, [model.stored_bytes()], [_bits_of(run, model)], i, 0, i, joined=False)
        for i, (run, name, model) in enumerate(zip(runs, _names(runs), models, strict=True))
    ]
    return Panel("Validation loss by model size", "bytes of weights", "bits per byte", series)


def _bits_of(run: RunRecords, model: LegacyLLM) -> float:
    bits = run.column("bits_per_byte")
    return bits[run.index_of(model.provenance.steps)] if bits else math.nan


# --- Figures --------------------------------------------------------------------------------------


@contextlib.contextmanager
def _style() -> Iterator[Any]:
    """Use matplotlib's defaults and ``_STYLE``, not the user's settings."""
    package = load_matplotlib()
    with warnings.catch_warnings(), package.style.context(["default", _STYLE]):
        # A character that the font lacks is drawn as a box, which says as much.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield package


def draw(panels: Sequence[Panel], columns: int = 2) -> "Figure":
    """Return a figure of panels in columns, with one legend below them."""
    columns = max(min(columns, len(panels)), 1)
    rows = -(-len(panels) // columns)
    width = _PANEL[0] * columns
    with _style() as package:
        figure: Figure = package.figure.Figure()
        legend: dict[str, Any] = {}
        for place, panel in enumerate(panels, 1):
            axes = figure.add_subplot(rows, columns, place)
            for label, line in _draw_panel(package, axes, panel):
                legend.setdefault(label, line)
        lines = 0
        if len(legend) > 1 or (legend and any(panel.floors for panel in panels)):
            # A line and the space around it are as wide as seven characters.
            sizes = [_CHARACTER * (len(label) + 7) for label in legend]
            beside = len(legend) if sum(sizes) <= width else max(int(width / max(sizes)), 1)
            lines = -(-len(legend) // beside)
            handles, labels = list(legend.values()), list(legend)
            figure.legend(handles, labels, loc="outside lower center", ncols=beside)
        figure.set_size_inches(width, _PANEL[1] * rows + _LEGEND_LINE * lines)
    return figure


def _number(x: float, _: object = None) -> str:
    """Return the label of a tick."""
    for factor, name in ((1e9, " G"), (1e6, " M")):
        if factor <= abs(x) < 1e13:
            return minus(f"{x / factor:.10g}{name}")
    return minus(f"{x:,.10g}")


def _percent(x: float, _: object = None) -> str:
    return minus(f"{100 * x:.10g}%")


def _draw_panel(package: Any, axes: "Axes", panel: Panel) -> Iterator[tuple[str, Any]]:
    """Draw a panel, and yield the entries of the legend."""
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
            color=_COLORS[one.color % len(_COLORS)],
            linestyle=_LINES[one.line % len(_LINES)] if one.joined else "none",
            linewidth=0.9 if one.thin else _STYLE["lines.linewidth"],
            marker="none" if one.thin and len(y) > 1 else _MARKERS[one.marker % len(_MARKERS)],
            markevery=every,
            markersize=_STYLE["lines.markersize"] if one.joined else 7,
        )
        if one.label:
            yield one.label, line
    bottom, top = axes.get_ylim()
    if panel.top is not None and bottom < panel.top < top:
        axes.set_ylim(top=panel.top + 0.05 * (panel.top - bottom))
    for label, height in panel.floors.items():
        line = axes.axhline(height, color=INK, linewidth=1.0, linestyle=(0, (1, 1.5)))
        yield f"{label}, {height:.4f}", line
    if not any(np.isfinite(np.asarray(one.y, float)).any() for one in panel.series):
        axes.text(0.5, 0.5, "no data", ha="center", transform=axes.transAxes)
        if not panel.floors:
            axes.set(xticks=[], yticks=[])


def map_weights(model: LegacyLLM, layer: str | None = None) -> "Figure":
    """Return a map of a matrix: a row for each output, a column for each input.

    Parameters
    ----------
    model : LegacyLLM
    layer : str, optional
        The name of the matrix; by default the first one of the blocks.

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


# Where a map has more weights than pixels, a pixel has the mean color of its weights.
_BLENDED: dict[str, Any] = {"interpolation_stage": "rgba"}


def _signs(package: Any) -> Any:
    ends = [_COLORS[0], "#f4f4f2", _COLORS[1]]
    return package.colors.LinearSegmentedColormap.from_list("signs", ends, N=255)


def _draw_codes(package: Any, figure: "Figure", axes: "Axes", values: npt.NDArray[np.int8]) -> None:
    """Draw the codes of a matrix, each in its own color, and a legend with their fractions."""
    codes = sorted({sign * int(code) for code in np.unique(values) for sign in (1, -1)})
    most = codes[-1] or 1
    colors = [_signs(package)(0.5 + code / most / 2) for code in codes]
    edges = [codes[0] - 0.5, *((a + b) / 2 for a, b in pairwise(codes)), codes[-1] + 0.5]
    axes.imshow(
        values,
        package.colors.ListedColormap(colors),
        package.colors.BoundaryNorm(edges, len(codes)),
        **_BLENDED,
    )
    patches = [package.patches.Patch(facecolor=one, edgecolor=GRID) for one in colors]
    labels = [f"{minus(str(code))}: {np.mean(values == code):.1%}" for code in codes]
    figure.legend(patches, labels, loc="outside lower center", ncols=len(labels), handlelength=1.0)


def attention_of(model: LegacyLLM, tokens: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
    """Return the attention weights of a text: float32[blocks, H, T, T], queries by keys.

    Parameters
    ----------
    model : LegacyLLM
    tokens : int32[T]

    Raises
    ------
    IndexError
        If an id is not a token of the model.
    ValueError
        If the text is longer than the model's positions.
    """
    context = ForwardContext(model.config, 1, tokens.size)
    forward_llm_batch(model, tokens[None], context=context)
    return np.concatenate([block.probs for block in context.blocks])


def map_attention(
    model: LegacyLLM, tokenizer: Tokenizer, prompt: str | bytes, block: int | None = None
) -> "Figure":
    """Return maps of the attention weights of a prompt: blocks are rows, heads are columns.

    Parameters
    ----------
    model : LegacyLLM
    tokenizer : Tokenizer
    prompt : str or bytes
    block : int, optional
        Only this block, counted from 0.

    Raises
    ------
    IndexError
        If a byte of the prompt is not a token of the model.
    ValueError
        If the prompt is empty or longer than the model's context, or there is no such block.
    """
    config = model.config
    if block is not None and not 0 <= block < config.num_blocks:
        raise ValueError(f"there is no block {block}, expected 0 to {config.num_blocks - 1}")
    blocks = range(config.num_blocks) if block is None else [block]
    if len(blocks) * config.num_heads > _MOST_MAPS:
        raise ValueError(
            f"{len(blocks)} blocks of {config.num_heads} heads are more than {_MOST_MAPS} maps: "
            "name one block"
        )
    tokens = tokenizer.encode(prompt)
    if not tokens.size:
        raise ValueError("the prompt is empty, expected text for the model to read")
    if tokenizer.bos_token is not None:
        tokens = np.concatenate([np.array([tokenizer.bos_token], np.int32), tokens])
    most = min(config.sequence_length, _MOST_TOKENS)
    if tokens.size > most:
        raise ValueError(f"the prompt has {tokens.size} tokens, expected at most {most}")
    maps = attention_of(model, tokens)[list(blocks)]
    labels = [_token_label(tokenizer, int(token)) for token in tokens]
    side = min(max(0.13 * tokens.size, 1.7), 5.5)
    heads = config.num_heads
    columns = heads if len(blocks) > 1 else math.ceil(math.sqrt(heads))
    rows = -(-len(blocks) * heads // columns)
    with _style() as package:
        figure: Figure = package.figure.Figure(figsize=(side * columns + 1.6, side * rows + 1.1))
        figure.set_layout_engine("compressed", h_pad=0.08)
        grid: Any = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
        for axes in grid.flat[len(blocks) * heads :]:
            axes.set_axis_off()
        for axes, (i, j) in zip(grid.flat, np.ndindex(len(blocks), heads), strict=False):
            causal = np.ma.masked_array(maps[i, j], np.triu(np.ones_like(maps[i, j], bool), 1))
            # One scale for all, so that they can be compared.
            image = axes.imshow(causal, vmin=0.0, vmax=float(maps.max()), aspect="equal")
            axes.set_title(f"block {blocks[i]}, head {j}")
            axes.set_facecolor("#e8e8e8")
            axes.grid(visible=False)
            if tokens.size <= _MOST_LABELS:
                size = min(side / tokens.size * 72 * 0.8, 8.0)
                style = {"fontsize": size, "family": "monospace"}
                axes.set_xticks(range(tokens.size), labels, rotation=90, **style)
                axes.set_yticks(range(tokens.size), labels, **style)
                axes.tick_params(length=0)
        figure.supxlabel("key", fontsize=9)
        figure.supylabel("query", fontsize=9)
        bar = figure.colorbar(image, ax=grid, fraction=0.03, pad=0.02, aspect=30)
        bar.ax.yaxis.set_major_formatter(package.ticker.PercentFormatter(1.0))
        bar.set_label("attention weight")
    return figure


def _token_label(tokenizer: Tokenizer, token: int) -> str:
    text = printable(tokenizer.decode([token]).decode("utf-8", "replace"))
    return text.replace(" ", "\u2423") or f"#{token}"


def save_figure(figure: "Figure", path: Path) -> None:
    """Write a figure as PNG, SVG or PDF, by the suffix of the file; equal figures have equal bytes.

    Raises
    ------
    OSError
        If the file cannot be written; an earlier one is unchanged.
    ValueError
        If the suffix is another, or the figure is too large for an image.
    """
    check_suffix(path, SUFFIXES)
    atomic_write(path, _render(figure, path.suffix.lower()[1:]))


def check_suffix(path: Path, suffixes: Sequence[str]) -> None:
    """Raise ``ValueError`` for a file whose name does not end in one of these."""
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"{path}: expected a name that ends in {', '.join(suffixes)}")


def _render(figure: "Figure", form: str, **more: Any) -> bytes:
    buffer = io.BytesIO()
    # Without the time of writing.
    undated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(form, {})
    with _style() as package, package.rc_context({"svg.hashsalt": "legacy1bit"}):
        figure.savefig(buffer, format=form, metadata=undated, **more)
    return buffer.getvalue()


_TAG = re.compile(r"<[^>]*>")
_IDENTITY = re.compile(r"(\bid=\"|url\(#|href=\"#)")


def inline_svg(figure: "Figure", name: str, title: str) -> str:
    """Return a figure as an SVG element in the colors of the page.

    Parameters
    ----------
    figure : Figure
    name : str
        A prefix of every id, so that the figures of a page do not share any.
    title : str
        The text that screen readers read.
    """
    text = _render(figure, "svg", transparent=True).decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, count=1, flags=re.DOTALL)
    text = _TAG.sub(lambda tag: _IDENTITY.sub(rf"\g<1>{name}-", tag[0]), text)
    text = text.replace(INK, "currentColor").replace(GRID, "var(--grid)")
    head, rest = text.split(">", 1)
    head = re.sub(r' (width|height)="[^"]*"', "", head)
    return f'{head} role="img" aria-label="{html.escape(title)}">{rest}'
