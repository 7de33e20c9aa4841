"""Figures of runs: curves, shares of codes, maps of weights and of attention.

What a curve shows are the numbers of ``metrics.jsonl`` as they stand there. matplotlib is loaded
when the first figure is drawn, without a display and without its global state.
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


def _unit(runs: Sequence[RunRecords]) -> str:
    units = {run.unit for run in runs}
    return units.pop() if len(units) == 1 else "token"


def _names(runs: Sequence[RunRecords]) -> list[str]:
    """Return the names of the runs' folders, or their paths where two have the same name."""
    names = [each.name for each in runs]
    unique = len(set(names)) == len(names)
    return names if unique else [printable(str(each.run.folder)) for each in runs]


def _curves(runs: Sequence[RunRecords], key: str, title: str, y_label: str) -> list[Panel]:
    """Return the panel of one number of the metrics."""
    labels = _names(runs) if len(runs) > 1 else [""]
    series = [
        Series(label, run.steps(), run.column(key), i, i // len(_COLOURS), i)
        for i, (run, label) in enumerate(zip(runs, labels, strict=True))
    ]
    return [Panel(title, "step", y_label, series)]


def _loss(runs: Sequence[RunRecords]) -> list[Panel]:
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


def _perplexity(runs: Sequence[RunRecords]) -> list[Panel]:
    return _curves(runs, "perplexity", "Perplexity", f"of a {_unit(runs)}")


def _learning_rate(runs: Sequence[RunRecords]) -> list[Panel]:
    return _curves(runs, "learning_rate", "Learning rate", "at this step")


def _gradient_norm(runs: Sequence[RunRecords]) -> list[Panel]:
    return _curves(runs, "gradient_norm", "The gradient's norm", "mean since the last look")


def _speed(runs: Sequence[RunRecords]) -> list[Panel]:
    return _curves(runs, "tokens_per_second", "Speed of training", "tokens a second")


def _accuracy(runs: Sequence[RunRecords]) -> list[Panel]:
    [panel] = _curves(runs, "top1", "Tokens that were the likeliest", "of the validation set")
    return [replace(panel, percent=True)]


def _page(runs: Sequence[RunRecords]) -> list[Panel]:
    main = (_loss, _perplexity, _accuracy, _learning_rate, _gradient_norm, _speed)
    return [panel for panels in main for panel in panels(runs)]


_MATRIX = re.compile(r"(?:blocks\.(\d{1,6})\.)?(.*)", re.DOTALL)


def _by_matrix(run: RunRecords, code: str, title: str) -> Panel:
    """Return a panel with a line for each matrix of a run: its colour tells the kind of matrix,
    its style and marker the block."""
    kinds: dict[str, int] = {}
    series = []
    for matrix in run.matrices():
        found = _MATRIX.fullmatch(matrix)
        assert found
        colour, block = kinds.setdefault(found[2], len(kinds)), int(found[1] or 0)
        label, y = printable(matrix), run.fraction(matrix, code)
        series.append(Series(label, run.steps(), y, colour, block, block))
    return Panel(title, "step", "of a matrix's weights", series, percent=True)


def _shares(runs: Sequence[RunRecords]) -> list[Panel]:
    return [
        _by_matrix(run, code, f"{prefix}Weights that are {minus(code)}")
        for run, prefix in zip(runs, _prefixes(runs), strict=True)
        for code in run.codes() or ["0"]
    ]


def _flips(runs: Sequence[RunRecords]) -> list[Panel]:
    return [
        _by_matrix(run, "flipped", f"{prefix}Weights changed since the last look")
        for run, prefix in zip(runs, _prefixes(runs), strict=True)
    ]


def _prefixes(runs: Sequence[RunRecords]) -> list[str]:
    return [f"{name}: " for name in _names(runs)] if len(runs) > 1 else [""]


def minus(number: str) -> str:
    """Return a number with the sign that is as wide as a plus."""
    return number.replace("-", "\u2212")


# What can be drawn of the metrics alone, of one run or of several.
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


def size_panel(runs: Sequence[RunRecords], models: Sequence[LegacyLLM]) -> Panel:
    """Return the panel of what the models of runs have come to, over the bytes of their weights.

    Losses of different tokens compare by the bytes that these stand for.
    """
    series = [
        Series(name, [model.stored_bytes()], [_bits_of(run, model)], i, 0, i, joined=False)
        for i, (run, name, model) in enumerate(zip(runs, _names(runs), models, strict=True))
    ]
    return Panel("Loss against size", "bytes of weights", "bits a byte", series)


def _bits_of(run: RunRecords, model: LegacyLLM) -> float:
    bits = run.column("bits_per_byte")
    return bits[run.index_of(model.provenance.steps)] if bits else math.nan


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
