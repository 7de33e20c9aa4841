"""Figures hold the numbers of the metrics, whatever these are, and become whole files."""

import dataclasses
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers import oracle
from helpers.models import make_config, random_model
from helpers.paths import ROOT
from helpers.runs import STRANGE, with_metrics
from legacy1bit.data.stories import entropy_per_character
from legacy1bit.data.tokenizer import ByteTokenizer
from legacy1bit.hyperparams import ModelConfig
from legacy1bit.logger import read_metrics
from legacy1bit.main import main
from legacy1bit.model import create_legacy_llm, load_model
from legacy1bit.reports import figures as plots
from legacy1bit.reports.figures import (
    CURVES,
    Panel,
    Series,
    attention_of,
    draw,
    inline_svg,
    map_attention,
    map_weights,
    panels_of,
    save_figure,
    size_panel,
)
from legacy1bit.reports.records import RunRecords, printable, read_records
from legacy1bit.training.run import Run

pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install matplotlib")


# The numbers that kinds of one line show.
KEYS = {
    "perplexity": "perplexity",
    "accuracy": "top1",
    "learning-rate": "learning_rate",
    "gradient-norm": "gradient_norm",
    "speed": "tokens_per_second",
}


def lines_of(figure):
    """For each axes the lines' data, as floats."""
    return [
        [
            (np.asarray(line.get_xdata(), float), np.asarray(line.get_ydata(), float))
            for line in axes.get_lines()
        ]
        for axes in figure.axes
    ]


def numbers(records, *path):
    found = []
    for record in records:
        value = record
        for key in path:
            value = value.get(key) if value else None
        found.append(math.nan if value is None else value)
    return found


def assert_parses(svg):
    root = ET.fromstring(svg)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    return root


# --- What curves show -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KEYS)
def test_curve_is_the_metrics(finished, kind):
    records = read_metrics(finished / "metrics.jsonl")
    [[(x, y)]] = lines_of(draw(panels_of([read_records(Run(finished))], kind)))
    np.testing.assert_array_equal(x, numbers(records, "step"))
    np.testing.assert_array_equal(y, numbers(records, KEYS[kind]))
    assert len(x) == 3


def test_loss_shows_both_losses_and_the_floor(finished):
    records = read_metrics(finished / "metrics.jsonl")
    figure = draw(panels_of([read_records(Run(finished))], "loss"))
    [[validation, training, floor]] = lines_of(figure)
    np.testing.assert_array_equal(validation[1], numbers(records, "val_loss"))
    np.testing.assert_array_equal(training[1], numbers(records, "train_loss"))
    np.testing.assert_array_equal(floor[1], [entropy_per_character()] * 2)
    told = [text.get_text() for text in figure.legends[0].get_texts()]
    floor_label = f"entropy floor, {entropy_per_character():.4f}"
    assert told == ["validation", "training", floor_label]
    assert figure.axes[0].get_ylabel() == "nats per character"


def test_training_loss_is_a_line_of_its_own_points(run):
    records = read_metrics(run / "metrics.jsonl")
    points = [[1, 5.0], [2, 4.0], [4, 3.0], [5, 2.0], [6, 1.5]]
    for record, part in zip(records, (points[:2], points[2:3], points[3:]), strict=True):
        record["train_losses"] = part
    with_metrics(run, records)
    [[_, (x, y), _]] = lines_of(draw(panels_of([read_records(Run(run))], "loss")))
    assert [list(point) for point in zip(x, y, strict=True)] == points


def test_training_loss_of_an_earlier_version_has_a_point_for_each_record(run):
    records = read_metrics(run / "metrics.jsonl")
    for record in records:
        del record["train_losses"]
    with_metrics(run, records)
    [[_, (x, y), _]] = lines_of(draw(panels_of([read_records(Run(run))], "loss")))
    np.testing.assert_array_equal(x, numbers(records, "step"))
    np.testing.assert_array_equal(y, numbers(records, "train_loss"))


@pytest.mark.parametrize("points", [3, {}, [3], [[1]], [[1, "x"]], [[None, True]]])
def test_damaged_training_loss_is_refused(run, fail, points):
    with_metrics(run, [{"step": 1, "train_losses": points}])
    (run / "training.json").unlink()
    assert "of step 1 is" in fail("plot", run, "--kind", "loss", "--out", "a.svg")


def test_first_steps_do_not_flatten_the_loss():
    losses = [[10 * n, 100.0 if n < 3 else 2.0 - n / 50] for n in range(1, 51)]
    records = [{"step": 500, "val_loss": 1.25, "train_losses": losses}]
    [axes] = draw(panels_of([RunRecords(Run(Path("a")), records)], "loss")).axes
    low, high = axes.get_ylim()
    assert low < 1.0
    assert 1.9 < high < 20


def test_text_of_ones_own_has_no_floor(run):
    settings_file = run / "training.json"
    told = json.loads(settings_file.read_text())
    told["source"] = {"name": "stories", "path": "stories", "validation": None}
    settings_file.write_text(json.dumps(told))
    assert read_records(Run(run)).floor is None
    assert len(lines_of(draw(panels_of([read_records(Run(run))], "loss")))[0]) == 2


@pytest.mark.parametrize(("kind", "codes"), [("shares", ["-1", "0", "1"]), ("flips", ["flipped"])])
def test_shares_by_matrix_are_the_metrics(finished, kind, codes):
    records = read_metrics(finished / "metrics.jsonl")
    figure = draw(panels_of([read_records(Run(finished))], kind), 3)
    matrices = list(records[0]["weights"])
    assert len(figure.axes) == len(codes)
    assert len(matrices) == 12
    for lines, code in zip(lines_of(figure), codes, strict=True):
        for (x, y), matrix in zip(lines, matrices, strict=True):
            np.testing.assert_array_equal(x, numbers(records, "step"))
            np.testing.assert_array_equal(y, numbers(records, "weights", matrix, code))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == matrices


def test_matrices_can_be_told_apart(finished):
    """No two have colour, line and marker in common."""
    lines = draw(panels_of([read_records(Run(finished))], "flips")).axes[0].get_lines()
    looks = {(line.get_color(), line.get_linestyle(), line.get_marker()) for line in lines}
    assert len(looks) == len(lines)


def test_page_has_the_main_curves_of_each_run(finished, run):
    runs = [read_records(Run(finished)), read_records(Run(run))]
    figure = draw(panels_of(runs, "page"))
    assert len(figure.axes) == 6
    loss, *others = lines_of(figure)
    assert len(loss) == 5
    assert [len(lines) for lines in others] == [2] * 5
    told = [text.get_text() for text in figure.legends[0].get_texts()]
    assert told[:2] == ["finished", "run"]


def test_runs_of_one_name_are_told_by_their_paths(finished, tmp_path):
    other = Path(shutil.copytree(finished, tmp_path / finished.name))
    figure = draw(panels_of([read_records(Run(finished)), read_records(Run(other))], "speed"))
    told = [text.get_text() for text in figure.legends[0].get_texts()]
    assert told == [str(finished), str(other)]


def test_size_panel_has_a_point_for_each_run(finished, run):
    runs, models = (
        [read_records(Run(finished)), read_records(Run(run))],
        [load_model(finished), load_model(run)],
    )
    # The model of one is its best, that of the other a step that has no record.
    records = runs[0].records
    steps = (records[0]["step"], 10**6)
    for model, step in zip(models, steps, strict=True):
        model.provenance = dataclasses.replace(model.provenance, steps=step)
    [lines] = lines_of(draw([size_panel(runs, models)]))
    size = models[0].stored_bytes()
    losses = [records[place]["bits_per_byte"] for place in (0, -1)]
    assert losses[0] != losses[1]
    assert [(x.tolist(), y.tolist()) for x, y in lines] == [([size], [loss]) for loss in losses]


# --- Runs that went wrong -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "name"),
    [*(("page", name) for name in STRANGE),
     *itertools.product(("shares", "flips"), ("empty", "no weights", "matrices come and go"))],
)  # fmt: skip
def test_strange_runs_are_drawn(run, say, kind, name):
    with_metrics(run, STRANGE[name])
    (run / "training.json").unlink()
    say("plot", run, run, "--kind", kind, "--out", "a.svg")
    assert_parses(Path("a.svg").read_bytes())
    if name in ("empty", "diverged", "too large for a float"):
        say("plot", run, "--kind", kind, "--out", "a.png")
        assert Path("a.png").read_bytes().startswith(b"\x89PNG")


def test_gaps_stay_gaps():
    records = [{"step": 1, "top1": 0.25}, {"step": 2, "top1": None}, {"step": 3, "top1": 0.75}]
    [[(x, y)]] = lines_of(draw(panels_of([RunRecords(Run(Path("a")), records)], "accuracy")))
    np.testing.assert_array_equal(x, [1, 2, 3])
    np.testing.assert_array_equal(y, [0.25, math.nan, 0.75])


def test_nothing_measured_is_said():
    figure = draw(panels_of([RunRecords(Run(Path("a")), [])], "speed"))
    assert [text.get_text() for text in figure.axes[0].texts] == ["no data"]


VALUES = st.none() | st.floats(-1e299, 1e299) | st.integers(-(10**30), 10**30)


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(st.integers(0, 10**15), VALUES, VALUES), max_size=50))
def test_any_numbers_are_drawn_as_they_are(found):
    records = [{"step": s, "val_loss": a, "train_loss": b} for s, a, b in found]
    figure = draw(panels_of([RunRecords(Run(Path("a")), records)], "loss"))
    assert_parses(inline_svg(figure, "a", "a"))
    [[validation, training]] = lines_of(figure)
    np.testing.assert_array_equal(validation[0], numbers(records, "step"))
    np.testing.assert_array_equal(validation[1], np.array(numbers(records, "val_loss"), float))
    np.testing.assert_array_equal(training[1], np.array(numbers(records, "train_loss"), float))


NAMES = ["$x_1$", r"$\frac", "_hidden", "<b>&\"'", "a\nb", "\u4e16\u754c", "\udcff", 'id="x"']


@pytest.mark.parametrize("name", NAMES)
def test_any_name_is_only_text(name):
    run = RunRecords(Run(Path("runs") / name), [{"step": 1, "top1": 0.5}])
    figure = draw(panels_of([run, RunRecords(Run(Path("other")), [])], "accuracy"))
    root = assert_parses(inline_svg(figure, "a", name.replace("\udcff", "")))
    texts = ["".join(text.itertext()) for text in root.iter("{http://www.w3.org/2000/svg}text")]
    assert printable(name) in texts
    assert not any(text.startswith("a-") for text in texts)


def test_printable_is_what_xml_can_hold():
    text = "".join(map(chr, range(0x3000))) + "\ud800\udfff\ufffe\uffff\U0001f600\U0001ffff"
    shown = printable(text)
    assert len(shown) == len(text)
    ET.fromstring(f"<a>{shown.replace('&', '').replace('<', '')}</a>".encode())
    assert printable("a \u00e9\n\x00") == "a \u00e9\u23ce\ufffd"


# --- Panels of plain data -------------------------------------------------------------------------


def test_panel_draws_series_of_any_source():
    front = Series("front", [1, 2], [4.0, 3.0], 1)
    trials = Series("trials", [1, 2, 3], [4.0, 3.0, 5.0], joined=False)
    figure = draw([Panel("Trials", "bytes", "loss", [trials, front], whole=False)])
    [lines] = lines_of(figure)
    assert [y.tolist() for _, y in lines] == [[4.0, 3.0, 5.0], [4.0, 3.0]]
    assert [line.get_linestyle() for line in figure.axes[0].get_lines()] == ["None", "-"]


def test_drawing_leaves_the_users_style_alone(finished):
    import matplotlib

    matplotlib.rcParams["lines.linewidth"] = 9.0
    try:
        before = dict(matplotlib.rcParams)
        draw(panels_of([read_records(Run(finished))], "page"))
        assert dict(matplotlib.rcParams) == before
    finally:
        matplotlib.rcdefaults()


# Pyplot is what keeps figures alive and looks for a display.
WITHOUT_PYPLOT = """
import sys
from legacy1bit.main import main
main(sys.argv[1:])
assert "matplotlib.pyplot" not in sys.modules
"""


def test_drawing_needs_no_display(run):
    environment = {name: value for name, value in os.environ.items() if name != "DISPLAY"}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, "-c", WITHOUT_PYPLOT, "plot", str(run), "--out", "a.png"]
    subprocess.run(command, env=environment | {"MPLBACKEND": "tkagg"}, check=True)
    assert Path("a.png").read_bytes().startswith(b"\x89PNG")


# --- Maps -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["ternary", "2bit", "float"])
def test_map_of_weights_shows_them(scheme):
    model = create_legacy_llm(ModelConfig(model_dim=8, num_blocks=1, num_heads=1, scheme=scheme), 1)
    for layer in ("blocks.0.ffn.wo", "embedding.weight", None):
        figure = map_weights(model, layer)
        [image] = figure.axes[0].get_images()
        matrix = model.parameters[layer or "blocks.0.attention.wq"]
        np.testing.assert_array_equal(image.get_array(), getattr(matrix, "values", matrix))
        assert_parses(inline_svg(figure, "a", "a"))
        assert (layer or "blocks.0.attention.wq") in figure.axes[0].get_title("left")


def test_each_code_has_one_colour():
    model = create_legacy_llm(ModelConfig(model_dim=8, num_blocks=1, num_heads=1), 1)
    figure = map_weights(model)
    [image] = figure.axes[0].get_images()
    told = {text.get_text().split(":")[0] for text in figure.legends[0].get_texts()}
    assert told == {"\u22121", "0", "1"}
    colours = [tuple(image.to_rgba(code)) for code in (-1, 0, 1)]
    assert len(set(colours)) == 3
    patches = figure.legends[0].get_patches()
    np.testing.assert_allclose([patch.get_facecolor() for patch in patches], colours)


@pytest.mark.parametrize("options", [{}, {"positions": "none"}, {"attention_window": 3}])
def test_attention_is_that_of_the_oracle(options):
    config = make_config(model_dim=8, num_blocks=2, num_heads=2, sequence_length=16, **options)
    model = random_model(config, 3)
    tokens = np.arange(1, 8, dtype=np.int32)
    found = attention_of(model, tokens)
    assert found.shape == (2, 2, 7, 7)
    parameters = {
        name: np.asarray(value.dense() if hasattr(value, "dense") else value, np.float64)
        for name, value in model.parameters.items()
    }
    settings_ = dataclasses.asdict(config)
    x = oracle.embedding(tokens[None], parameters["embedding.weight"])
    for i in range(2):
        weights = oracle._part(parameters, f"blocks.{i}.")
        normed = oracle._norm(x, weights, "norm1.", settings_)
        expected = oracle._attend(
            normed, tokens[None], oracle._part(weights, "attention."), settings_
        )[3]
        np.testing.assert_allclose(found[i], expected[0], atol=1e-5)
        x = oracle.block(x, tokens[None], weights, settings_)


def test_map_of_attention_shows_it(finished):
    model = load_model(finished)
    figure = map_attention(model, ByteTokenizer(256), "Kim was")
    tokens = np.frombuffer(b"\nKim was", np.uint8).astype(np.int32)
    expected = attention_of(model, tokens)
    grid = [axes for axes in figure.axes if axes.get_images() and axes.get_title("left")]
    assert [axes.get_title("left") for axes in grid] == [
        f"block {i}, head {j}" for i in range(2) for j in range(2)
    ]
    for axes, probabilities in zip(grid, expected.reshape(4, 8, 8), strict=True):
        [image] = axes.get_images()
        shown = image.get_array()
        np.testing.assert_array_equal(shown.filled(0.0), probabilities)
        np.testing.assert_allclose(shown.filled(0.0).sum(axis=1), 1.0, rtol=1e-5)
        assert shown.mask.sum() == 28
    assert [text.get_text() for text in grid[2].get_xticklabels()] == list("\u23ceKim\u2423was")


def test_map_of_attention_of_one_block(finished):
    figure = map_attention(load_model(finished), ByteTokenizer(256), "Kim", 1)
    titles = [axes.get_title("left") for axes in figure.axes]
    assert titles[:2] == ["block 1, head 0", "block 1, head 1"]


# --- Files and the command ------------------------------------------------------------------------

KINDS = [[], *(["--kind", kind] for kind in (*CURVES, "bytes", "weights"))]
KINDS.append(["--kind", "attention", "--prompt", "Kim was a"])


@pytest.mark.parametrize("more", KINDS, ids=" ".join)
def test_plot_writes_every_kind(run, say, more):
    output, errors = say("plot", run, *more, "--out", "a.svg")
    assert output.decode().startswith("a.svg: ")
    assert errors == b""
    root = assert_parses(Path("a.svg").read_bytes())
    assert len(list(root.iter("{http://www.w3.org/2000/svg}text"))) > 3


# Curves, a map of colors, and one with words.
@pytest.mark.parametrize("more", [KINDS[0], *KINDS[-2:]], ids=" ".join)
def test_plot_of_the_same_run_is_the_same_file(run, say, more):
    for name in ("a.svg", "b.svg"):
        say("plot", run, *more, "--out", name)
    assert Path("a.svg").read_bytes() == Path("b.svg").read_bytes()


def test_plot_takes_the_latest_run_and_writes_what_the_suffix_says(run, say):
    Path("runs").mkdir()
    run.rename("runs/latest")
    for name, begin in (("a.PNG", b"\x89PNG"), ("a.pdf", b"%PDF"), ("a.svg", b"<?xml")):
        assert b"latest" in say("plot", "--kind", "loss", "--out", name).out
        assert Path(name).read_bytes().startswith(begin)


def test_plot_does_not_touch_the_run(run, say):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    say("plot", run, "--out", "a.png")
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


MISTAKES = {
    (
        "--out",
        "a.jpg",
    ): r"a\.jpg: expected a name that ends in \.png, \.svg, \.pdf",
    ("--out", "a"): "expected a name that ends in",
    ("--out", "nowhere/a.png"): "nowhere/a.png: No such file",
    ("--kind", "pie", "--out", "a.png"): "invalid choice",
    ("--kind", "weights", "--layer", "wq", "--out", "a.png"): (
        r"no layer 'wq', expected one of embedding\.weight.*blocks\.1\.ffn\.wo"
    ),
    ("--layer", "wq", "--out", "a.png"): "--layer goes with --kind weights, and not with page",
    ("--prompt", "a", "--out", "a.png"): "--prompt goes with --kind attention",
    ("--kind", "attention", "--out", "a.png"): "needs a --prompt",
    ("--kind", "attention", "--prompt", "", "--out", "a.png"): "needs a --prompt",
    ("--kind", "attention", "--prompt", "a" * 32, "--out", "a.png"): (
        "the prompt has 33 tokens, expected at most 32"
    ),
    ("--kind", "attention", "--prompt", "a", "--block", "2", "--out", "a.png"): (
        "there is no block 2, expected 0 to 1"
    ),
    ("run", "--kind", "weights", "--out", "a.png"): "takes one run, and not 2",
    ("nowhere", "--out", "a.png"): "nowhere is not a training run",
    (".", "--out", "a.png"): "is not a training run: it has no metrics.jsonl",
}


@pytest.mark.parametrize("arguments", MISTAKES, ids=" ".join)
def test_plot_refuses(run, fail, arguments):
    assert re.search(MISTAKES[arguments], fail("plot", "run", *arguments))
    assert not Path("a.png").exists()


DAMAGES = {
    '{"step": 1, "val_loss": "low"}\n': r"val_loss of step 1 is \"low\", expected a number",
    '{"step": 1, "val_loss": true}\n': "val_loss of step 1 is true",
    '{"step": 1}\nnothing\n{"step": 2}\n': "line 2: expected a JSON object",
    '{"steps": 1}\n': "line 1: expected a JSON object with its step",
}


@pytest.mark.parametrize("content", DAMAGES)
def test_damaged_metrics_are_one_line(run, fail, content):
    (run / "metrics.jsonl").write_text(content)
    message = fail("plot", run, "--out", "a.png")
    assert "metrics.jsonl" in message
    assert re.search(DAMAGES[content], message)


@pytest.mark.parametrize("weights", ['"x"', '{"a": 3}', '{"a": {"0": "x"}}'])
def test_damaged_shares_are_one_line(run, fail, weights):
    (run / "metrics.jsonl").write_text(f'{{"step": 1, "weights": {weights}}}\n')
    assert "metrics.jsonl" in fail("plot", run, "--kind", "shares", "--out", "a.png")


def test_damaged_settings_are_one_line(run, fail):
    (run / "training.json").write_text("{")
    assert "training.json is not a run's settings" in fail("plot", run, "--out", "a.png")


def test_plot_needs_matplotlib(run, fail, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for command in (("plot", run, "--out", "a.png"), ("report", run, "--out", "a.html")):
        assert "matplotlib, which is not installed: pip install matplotlib" in fail(*command)


def test_too_many_maps_are_refused():
    model = create_legacy_llm(ModelConfig(model_dim=20, num_blocks=13, num_heads=5), 1)
    with pytest.raises(ValueError, match="more than 64 maps: name one block"):
        map_attention(model, ByteTokenizer(256), "a")


def test_unknown_kinds_and_no_runs_are_refused():
    with pytest.raises(ValueError, match="expected one of page, loss"):
        panels_of([RunRecords(Run(Path("a")), [])], "pie")
    with pytest.raises(ValueError, match="no run to draw"):
        panels_of([], "loss")
    with pytest.raises(ValueError, match="expected a name that ends in"):
        save_figure(draw([]), Path("a.txt"))


def test_a_file_that_cannot_be_written_leaves_the_old_one(run, say, monkeypatch):
    say("plot", run, "--out", "a.png")
    before = Path("a.png").read_bytes()

    def full(path, content):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(plots, "atomic_write", full)
    with pytest.raises(SystemExit):
        main(["plot", str(run), "--kind", "loss", "--out", "a.png"])
    assert Path("a.png").read_bytes() == before
