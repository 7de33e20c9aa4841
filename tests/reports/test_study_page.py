"""The page about a search: every trial of it, and the figures' numbers are those of the study."""

import gc
import math
import shutil
from pathlib import Path

import pytest

from helpers.pages import Parsed
from helpers.studies import make_study
from legacy1bit.hyperparams import DataConfig, ModelConfig, TrainingConfig
from legacy1bit.reports import study_page as study_report
from legacy1bit.reports.records import read_records
from legacy1bit.search.space import Dimension
from legacy1bit.search.study import StudyConfig, StudyRecord, TrialResult, best_of
from legacy1bit.training.run import Run

pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install matplotlib")
pytest.importorskip("optuna", reason="optuna is not installed: pip install optuna")


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return make_study(tmp_path_factory.mktemp("studies"))


def test_page_has_every_trial(study, tmp_path, say):
    out = tmp_path / "page.html"
    assert b"page.html" in say("report", study, "--out", out).out
    parsed = Parsed(out.read_text())
    text = " ".join("".join(parsed.text).split())
    _, config, results = opened(study)
    assert len(results) >= 9
    for one in results:
        assert f"{one.loss:.4f}" in text if one.loss is not None else one.reason in text
    assert parsed.all("b") == []
    assert "<b>study" in text
    assert len(parsed.all("svg")) == 3 + len(config.space)
    assert len(set(parsed.ids)) == len(parsed.ids)
    assert "legacy1bit tune --data" in text
    for dimension in config.space:
        assert dimension.name in text


def opened(folder):
    from legacy1bit.search.study import open_storage, open_study, results_of

    record = StudyRecord.read(folder)
    found, config = open_study(open_storage(record.url(folder, None)), record.study, None, 1)
    return record, config, results_of(found)


def test_figures_show_the_trials(study, monkeypatch):
    panels = []
    monkeypatch.setattr(
        study_report, "figure", lambda some, name, title: panels.extend(some) or "<p></p>"
    )
    _, config, results = opened(study)
    study_report.study_report(study, *opened(study))
    by_title = {panel.title: panel for panel in panels}
    complete = [one for one in results if one.state == "complete"]
    trials = by_title["Validation loss by trial"].series
    assert list(zip(trials[0].x, trials[0].y, strict=True)) == [
        (one.number, one.loss) for one in complete
    ]
    assert trials[-1].label == "best so far"
    assert trials[-1].y == [
        min(one.loss for one in complete[: i + 1]) for i in range(len(complete))
    ]
    sizes, front = by_title["Validation loss by model size"].series
    assert sorted(zip(sizes.x, sizes.y, strict=True)) == sorted(
        (one.bytes / 1000, one.loss) for one in complete
    )
    assert [*front.y] == [one.loss for one in best_of(results, config.objectives)]
    for line in by_title["Validation loss during training"].series:
        number = int(line.label.split()[1])
        assert line.y == read_records(Run(study / f"trials/{number:04}")).column("val_loss")
        assert line.x[-1] == 100
    rates = by_title["learning_rate"].series[0]
    assert [*rates.x] == [math.log10(one.params["learning_rate"]) for one in complete]
    words = by_title["activation"]
    assert words.x_label == "0: relu2, 1: relu"
    assert [*words.series[0].x] == [
        ["relu2", "relu"].index(one.params["activation"]) for one in complete
    ]


def test_page_of_a_study_without_results():
    space = (Dimension("model_dim", (8, 16)),)
    config = StudyConfig(space, ModelConfig(), TrainingConfig(), DataConfig(), "0" * 64)
    record = StudyRecord("study", {"name": "text"}, True)
    for results in (
        [],
        [TrialResult(0, "refused", {"model_dim": 8}, {}, {}, None, 9, None, 0.0, "too large")],
        [TrialResult(0, "pruned", {"model_dim": 8}, {}, {}, None, None, None, 1.0, "diverged")],
        [TrialResult(0, "failed", {}, {}, {}, math.nan, None, None, 1.0, "")],
    ):
        text = "".join(Parsed(study_report.study_report(Path(), record, config, results)).text)
        assert f"{len(results)} trials" in text


def test_report_says_what_is_wrong_with_a_study(study, fail, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "tune.json").write_text("{}")
    out = tmp_path / "page.html"
    assert "is damaged" in fail("report", broken, "--out", out)
    StudyRecord("study", {}, True).save(broken)
    assert "has no study.db any more" in fail("report", broken, "--out", out)
    StudyRecord("study", {}, False).save(broken)
    assert "name it with --storage" in fail("report", broken, "--out", out)
    assert "no study other" in fail(
        "report", broken, "--out", out, "--storage", f"sqlite:///{study}/other.db"
    ).replace("study study", "study other")
    assert not out.exists()


DAMAGE = {
    "half a file": lambda content: content[: len(content) // 2],
    "zeros": lambda content: content[:4096] + bytes(len(content) - 4096),
    "another's head": lambda content: b"SQLite format 4" + content[15:],
    "another table": lambda content: content.replace(b"TABLE trials", b"TABLE trialz"),
    "another key": lambda content: content.replace(b'"log"', b'"lag"'),
    "no JSON": lambda content: content.replace(b'"log": true', b'"log": nope'),
}


# What a library leaves open that fails to open a database, later Pythons warn of.
@pytest.mark.filterwarnings("ignore:unclosed database:ResourceWarning")
@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_database_takes_one_line(study, tmp_path, fail, name):
    folder = Path(shutil.copytree(study, tmp_path / "study"))
    database = folder / "study.db"
    content = database.read_bytes()
    damaged = DAMAGE[name](content)
    assert damaged != content
    database.write_bytes(damaged)
    fail("report", folder)
    fail("tune", "--resume", folder, "--trials", 1)
    gc.collect()
    assert database.read_bytes() == damaged


@pytest.mark.parametrize("address", ["sqlite://", "sqlite:///:memory:"])
def test_study_in_memory_alone_is_refused(tmp_path, monkeypatch, fail, address):
    monkeypatch.chdir(tmp_path)
    assert "gone with the process" in fail("tune", "--stories", 20, "--storage", address)
    assert not any(tmp_path.iterdir())
