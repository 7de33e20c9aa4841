"""The page about a run: all that it should tell, in one file that asks for nothing."""

import dataclasses
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from helpers.pages import Parsed
from helpers.runs import SHORT, STRANGE, with_metrics
from legacy1bit.commands.report import train_command
from legacy1bit.commands.run_settings import plan_run
from legacy1bit.hyperparams import DataConfig, ModelConfig, TrainingConfig
from legacy1bit.logger import read_metrics
from legacy1bit.main import main, parser_of
from legacy1bit.math_ops import simd_level
from legacy1bit.reports.figures import panels_of
from legacy1bit.reports.page import escape, page, quotation, section, some, table, tiles
from legacy1bit.reports.records import read_records
from legacy1bit.system.hardware import machine
from legacy1bit.training.evaluation import Metrics
from legacy1bit.training.run import Run
from legacy1bit.training.trainer import Trainer

pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install matplotlib")


@pytest.fixture
def written(say):
    """Write the page about a run and take it apart."""

    def write(run):
        say("report", run, "--out", "page.html")
        content = Path("page.html").read_text(encoding="utf-8")
        return content, Parsed(content)

    return write


@pytest.fixture(scope="module")
def finished_page(finished, tmp_path_factory):
    """The page about a run that nothing was changed in, and its parts."""
    path = tmp_path_factory.mktemp("pages") / "page.html"
    assert main(["report", str(finished), "--out", str(path)]) == 0
    content = path.read_text(encoding="utf-8")
    return content, Parsed(content)


def test_report_tells_everything(finished, finished_page):
    run, (_, page) = finished, finished_page
    text = " ".join(page.text)
    last = read_metrics(run / "metrics.jsonl")[-1]
    for wanted in (
        f"{last['val_loss']:.4f}",
        f"{last['perplexity']:.4f}",
        f"{last['top1']:.1%}",
        f"{last['weights']['blocks.1.ffn.wo']['0']:.2%}",
        "blocks.1.ffn.wo",
        "entropy floor",
        "C, the width of the residual stream",
        machine()["cpu"],
        simd_level(),
        Run(run).settings().training.precision,
        train_command(run),
        *(f"step {step}" for step in (2, 4, 6)),
    ):
        assert wanted in text
    for sample in read_metrics(run / "samples.jsonl"):
        assert escape(sample["text"].strip("\n")) in {escape(part) for part in page.text}
    changed, rest = text.index("Changed from the defaults"), text.index("All other settings")
    assert changed < text.index("model_dim") < rest < text.index("rope_base")


def test_report_is_about_the_best_model(run, written, finished_page, monkeypatch):
    def look(self, limit, stop=None):
        return Metrics(5.0 + (self.step != 4), 0.25, 0.5, 0.75, 100, 100)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_measure", look)
        main([*SHORT, "--out", "worse"])
    _, page = written(Path("worse"))
    text = " ".join(page.text)
    assert "after 6 of 6 steps" in text
    assert "The model is the best one, of step 4." in text
    assert text.index("5.0000") < text.index("Curves") < text.index("6.0000")
    record = read_metrics("worse/metrics.jsonl")[1]
    weights = text[text.index("Fraction of each code") :]
    assert f"{record['weights']['blocks.1.ffn.wo']['0']:.2%}" in weights
    assert "The model is the best" not in " ".join(finished_page[1].text)


def test_report_has_figures_with_descriptions(finished_page):
    _, page = finished_page
    figures = page.all("svg")
    assert len(figures) == 7
    assert all(figure["role"] == "img" and figure["aria-label"] for figure in figures)
    assert all("width" not in figure and figure["viewbox"] for figure in figures)
    assert len(set(page.ids)) == len(page.ids)


def test_report_asks_for_nothing(finished_page):
    """No address in it leads anywhere, but to itself; names of XML's vocabularies are no
    addresses."""
    content, page = finished_page
    assert page.all("script") == page.all("link") == page.all("img") == []
    for _, attributes in page.elements:
        for name, value in attributes.items():
            assert name != "src"
            assert not name.startswith("on")
            if name.endswith("href"):
                assert value.startswith("#")
                assert value[1:] in page.ids
    assert re.findall(r"url\((?!#)", content) == []
    assert "@import" not in content
    [policy] = [one for one in page.all("meta") if "http-equiv" in one]
    assert policy["content"].startswith("default-src 'none'")


def test_report_of_the_same_run_is_the_same_page(finished, finished_page, tmp_path, say):
    say("report", finished, "--out", tmp_path / "a.htm")
    assert (tmp_path / "a.htm").read_text(encoding="utf-8") == finished_page[0]


def test_what_users_supply_is_text(run, written):
    evil = "<script>alert('1')</script> & \"x\" \x00\udcff $\\frac"
    run = run.rename("<b>bold & 'x'")
    with open(run / "samples.jsonl", "a") as file:
        file.write(json.dumps({"step": 6, "text": evil}) + "\n")
    settings = json.loads((run / "training.json").read_text())
    settings["source"]["name"] = "<i>data</i>"
    settings["machine"]["cpu"] = "<u>cpu</u>"
    (run / "training.json").write_text(json.dumps(settings))
    _, page = written(run)
    assert page.all("script") == page.all("b") == page.all("i") == page.all("u") == []
    text = " ".join(page.text)
    for wanted in ("<b>bold & 'x'", "<i>data</i>", "<u>cpu</u>"):
        assert wanted in text
    assert "<script>alert('1')</script> & \"x\" \ufffd\ufffd $\\frac" in text


@pytest.mark.parametrize("name", STRANGE)
def test_strange_runs_have_a_page(run, written, name):
    with_metrics(run, STRANGE[name])
    (run / "samples.jsonl").unlink()
    (run / "model.safetensors").unlink()
    settings = json.loads((run / "training.json").read_text())
    del settings["machine"]
    (run / "training.json").write_text(json.dumps(settings))
    _, page = written(run)
    assert "The run has no samples.jsonl." in " ".join(page.text)
    assert "not recorded" in page.text


def test_report_has_the_losses_of_texts_that_are_mixed(written, monkeypatch, tmp_path, say):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        Path(f"{name}.txt").write_text(f"{name} b c d. " * 100)
    small = ("--model-dim", 8, "--blocks", 1, "--heads", 1, "--sequence-length", 8, "--steps", 2)
    say("train", "--data", "a.txt", "--data", "b.txt:2", *small, "--threads", 1, "--out", "mix")
    _, parsed = written(Path("mix"))
    text = " ".join(parsed.text)
    for name, loss in read_metrics("mix/metrics.jsonl")[-1]["val_losses"].items():
        assert f"loss of {name}" in text
        assert f"{loss:.4f}" in text
    assert f"weight of b.txt 2 ({tmp_path / 'b.txt'})" in " ".join(text.split())
    (panel,) = panels_of([read_records(Run(Path("mix")))], "loss")
    curves = {one.label: list(one.y) for one in panel.series}
    assert [label for label in curves if "on " in label] == [
        "validation on a.txt",
        "validation on b.txt",
    ]
    assert curves["validation on b.txt"][-1] == loss
    for losses, told in (("[1]", "a loss for each text"), ('{"a.txt": "x"}', "a number")):
        line = Path("mix/metrics.jsonl").read_text().splitlines()[-1]
        damaged = re.sub(r'"val_losses": {[^}]*}', f'"val_losses": {losses}', line)
        Path("mix/metrics.jsonl").write_text(f"{damaged}\n{line}\n")
        with pytest.raises(ValueError, match=f"expected {told}"):
            read_records(Run(Path("mix"))).losses()


def test_report_has_the_times_of_ranks(run, written):
    every = [
        [{"host": "node<1>", "computing": 0.3, "exchanging": 0.1}],
        [
            {"host": "node<1>", "computing": 0.2, "exchanging": 0.2},
            {"host": "node2", "computing": 0.5, "exchanging": 0.5},
        ],
        [
            {"host": "node<1>", "computing": 0.4, "exchanging": 0.0},
            {"host": "node2", "computing": 0.25, "exchanging": 0.5},
        ],
    ]
    with_metrics(run, [{"step": step, "ranks": ranks} for step, ranks in enumerate(every, 1)])
    # The run went on with another number of ranks: the first record does not count.
    assert read_records(Run(run)).ranks() == [
        ("node<1>", pytest.approx(0.3), pytest.approx(0.1)),
        ("node2", pytest.approx(0.375), pytest.approx(0.5)),
    ]
    text, _ = written(run)
    for cell in ("node&lt;1&gt;", "0.3000", "25.0%", "75.0%", "57.1%", "42.9%"):
        assert cell in text, cell


@pytest.mark.parametrize("ranks", ["all", [3], [{"host": "a", "computing": "long"}]])
def test_damaged_times_of_ranks_are_refused(run, ranks):
    with_metrics(run, [{"step": 1, "ranks": ranks}])
    with pytest.raises(ValueError, match="step 1"):
        read_records(Run(run)).ranks()


def test_report_needs_a_saved_run(run, fail):
    (run / "training.json").unlink()
    assert "it has no training.json" in fail("report", run, "--out", "a.html")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("nowhere", "--out", "a.html"), "nowhere is not a training run"),
        (("run", "--out", "a.txt"), "expected a name that ends in .html, .htm"),
        (("run", "--out", "nowhere/a.html"), "nowhere/a.html: No such file"),
        (("run", "run", "--out", "a.html"), "unrecognized arguments"),
        (("--out", "a.html"), "there is no run in runs/ yet: train one first, or name one"),
    ],
)
def test_report_refuses(run, fail, arguments, told):
    assert told in fail("report", *arguments)


@pytest.mark.parametrize("line", ['{"step": 1}', '{"step": 1, "text": 3}', "x\nx"])
def test_damaged_samples_are_one_line(run, fail, line):
    (run / "samples.jsonl").write_text(line + "\n")
    assert "samples.jsonl, line 1" in fail("report", run, "--out", "a.html")


# --- The command that repeats a run ---------------------------------------------------------------

OPTIONS = [
    [],
    ["--scheme", "binary", "--sub-norm", "--no-final-norm", "--seed", "7", "--stories", "30"],
    ["--optimizer", "sgd", "--schedule", "step", "--learning-rate", "0.05", "--clip", "0"],
    ["--data", "a text's.txt", "--separator=-x", "--tokenizer", "chars", "--order", "epochs"],
    ["--data", "a text's.txt", "--validation", "a text's.txt", "--vocab-size", "300"],
]


@pytest.mark.parametrize("options", OPTIONS, ids=" ".join)
def test_command_gives_the_same_settings(tmp_path, monkeypatch, say, options):
    monkeypatch.chdir(tmp_path)
    Path("a text's.txt").write_text("The cat sat on the mat. The dog -x sat there.\n" * 40)
    if "--vocab-size" in options:
        options = [*options, "--tokenizer", "bpe"]
        pytest.importorskip("tokenizers")
    if "chars" in options:
        pytest.importorskip("tokenizers")
    base = SHORT if "--stories" not in options else SHORT[: SHORT.index("--stories")]
    if "--data" in options:
        base = SHORT[: SHORT.index("--stories")]
    say(*base, *options, "--out", "run")
    settings = Run(Path("run")).settings()
    program_name, *arguments = shlex.split(train_command(Path("run")))
    assert program_name == "legacy1bit"
    parsed = parser_of("train").parse_args(arguments)
    begun = plan_run(parsed)
    # The number of warm-up steps follows from that of all.
    begun_training = dataclasses.replace(begun.training, warmup_steps=begun.training.warmup)
    assert (begun.model, begun_training) == (settings.model, settings.training)
    say(*arguments, "--out", "again")
    assert Run(Path("again")).settings() == settings
    assert (
        Path("again/model.safetensors").read_bytes() == Path("run/model.safetensors").read_bytes()
    )


def test_command_names_the_tokenizer_that_was_taken(tmp_path, monkeypatch, say):
    pytest.importorskip("tokenizers")
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("The cat sat on the mat.\n" * 40)
    base = [*SHORT[: SHORT.index("--stories")], "--data", "a.txt"]
    say(*base, "--tokenizer", "chars", "--out", "chars")
    say(*base, "--tokenizer-from", "chars", "--out", "run")
    arguments = shlex.split(train_command(Path("run")))
    assert arguments[arguments.index("--tokenizer-from") + 1] == str(tmp_path / "run")
    say(*arguments[1:], "--out", "again")
    assert (
        Path("again/model.safetensors").read_bytes() == Path("run/model.safetensors").read_bytes()
    )


def test_a_run_tells_of_its_machine(run):
    assert Run(run).settings().machine == machine()
    assert set(machine()) == {"cpu", "cores", "instruction_set", "system", "python"}


# --- Samples --------------------------------------------------------------------------------------


def test_every_look_has_its_sample(run, say):
    from legacy1bit.generator import Generator

    samples = read_metrics(run / "samples.jsonl")
    steps = [record["step"] for record in read_metrics(run / "metrics.jsonl")]
    assert [sample["step"] for sample in samples] == steps == [2, 4, 6]
    assert all(sample["prompt"] == "" for sample in samples)
    assert samples[-1]["text"] == Generator.load(run).complete("", 120, seed=0).text


def test_samples_change_no_bit_of_the_training(run, say, monkeypatch):
    from legacy1bit.commands import train

    class Nothing:
        def __init__(self, *_):
            pass

        def log(self, record):
            pass

    monkeypatch.setattr(train, "StepLog", Nothing)
    say(*SHORT, "--out", "without")
    for name in ("checkpoint.safetensors", "model.safetensors"):
        # The seconds it took stand in the checkpoint's head.
        size = 4000 if name.startswith("checkpoint") else 0
        one, other = (Path(folder, name).read_bytes()[-size:] for folder in (run, "without"))
        assert one == other


def test_a_run_that_goes_on_drops_the_samples_after_its_checkpoint(run, say):
    samples = read_metrics(run / "samples.jsonl")
    with open(run / "samples.jsonl", "a") as file:
        file.write('{"step": 7, "prompt": "", "text": "too far"}\n{"step": 8, "pro')
    say("train", "--resume", run, "--steps", "8")
    again = read_metrics(run / "samples.jsonl")
    assert again[:3] == samples
    assert [sample["step"] for sample in again] == [2, 4, 6, 8]
    assert again[3]["text"] != "too far"


def test_a_run_that_ended_early_is_not_in_the_way(run, say):
    for path in run.iterdir():
        if path.name not in ("metrics.jsonl", "samples.jsonl"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    say(*SHORT, "--out", run)
    assert len(read_metrics(run / "samples.jsonl")) == 3


# --- The parts of a page --------------------------------------------------------------------------


def test_parts_take_plain_data():
    parts = (
        tiles({"a <": "1"}),
        table("c >", ["name", "loss"], [["x&y", "1.5"]]),
        quotation("step 1", "a\n<b>"),
    )
    parsed = Parsed(page("a & b", "it's", [section("one <", *parts)]))
    text = " ".join(parsed.text)
    for wanted in ("a <", "c >", "x&y", "a\n<b>", "a & b", "it's", "one <"):
        assert wanted in text
    assert [cell.get("class") for cell in parsed.all("td")] == [None, "number"]


@pytest.mark.parametrize(("count", "most"), [(0, 3), (1, 3), (3, 3), (4, 3), (100, 12)])
def test_some_are_even_with_both_ends(count, most):
    chosen = some(range(count), most)
    assert len(chosen) == min(count, most)
    assert chosen == sorted(set(chosen))
    if count:
        assert (chosen[0], chosen[-1]) == (0, count - 1)


def test_records_without_options_are_the_defaults():
    from legacy1bit.reports.run_page import defaults_of

    for record in (ModelConfig(), DataConfig(), TrainingConfig()):
        assert defaults_of(record) == dataclasses.asdict(record)
    slow = TrainingConfig(optimizer="sgd")
    assert defaults_of(slow)["learning_rate"] == slow.learning_rate
    assert defaults_of(slow)["optimizer"] == "muon"
    # A run's warm-up is a number.
    assert defaults_of(TrainingConfig(steps=60, warmup_steps=6))["warmup_steps"] == 6
    assert defaults_of(TrainingConfig(steps=60, warmup_steps=0))["warmup_steps"] == 6
