"""The tables of docs/RESULTS.md: what they run, what they say, where they go."""

import json
import shlex
import subprocess
from pathlib import Path

import pytest

from benchmarks import results
from benchmarks.results import TABLES, Outcome, Variant
from helpers.paths import ROOT
from legacy1bit import main
from legacy1bit.commands import run_settings
from legacy1bit.hyperparams import ARCHITECTURES, ModelConfig, TrainingConfig

VARIANTS = sorted(
    {variant for table in TABLES.values() for variant in table}, key=lambda one: one.options
)
DOCUMENT = ROOT / "docs/RESULTS.md"


def parsed(arguments):
    """The settings that a command line of ``results.command`` asks for."""
    assert arguments[:2] == ["-m", "legacy1bit.main"]
    values = main.parser_of(arguments[2]).parse_args(arguments[2:])
    return run_settings._records(values, run_settings.merged_settings(values))[:2]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.label)
def test_commands_are_understood(variant):
    model, training = parsed(results.command(variant, 3, "text", Path("out")))
    assert (training.seed, training.threads, training.steps) == (3, 1, 2000)
    assert model.sequence_length == 64
    # Each variant differs from the first recipe in what it says, and in nothing else.
    base_model, base_training = parsed(results.command(Variant("base"), 3, "text", Path("out")))
    records = (
        (model.to_dict(), base_model.to_dict()),
        (training.to_dict(), base_training.to_dict()),
    )
    changes = [
        name
        for new, base in records
        for name in new.keys() | base.keys()
        if new.get(name) != base.get(name)
    ]
    words = variant.options.split()
    expected = sum(word.startswith("--") for word in words)
    if "--architecture" in words:
        expected += len(ARCHITECTURES[words[words.index("--architecture") + 1]]) - 1
    assert len(changes) == expected


def test_the_first_recipe_does_not_depend_on_defaults():
    model, training = parsed(results.command(Variant("base"), 1, "text", Path("out")))
    shape = {"num_blocks": 4, "num_heads": 4, "model_dim": 128, "ffn_multiplier": 4}
    shape |= {"sequence_length": 64}
    assert model == ModelConfig(**shape)
    rates = {"learning_rate": 0.003, "muon_lr_ratio": 3.3, "weight_decay": 0.02}
    schedule = {"schedule": "cosine", "decay_fraction": 1.0, "steps": 2000}
    assert training == TrainingConfig(batch_size=12, evaluate_every=500, **rates, **schedule)


def test_variants_have_folders_of_their_own():
    folders = {results._folder(Path("out"), one, seed) for one in VARIANTS for seed in (1, 2)}
    assert len(folders) == 2 * len(VARIANTS)


def test_a_variant_has_one_label():
    labels = {}
    for one in (variant for table in TABLES.values() for variant in table):
        assert labels.setdefault(one.options, one.label) == one.label


def test_outcome_has_mean_and_deviation():
    outcome = Outcome([1.0, 2.0, 4.0], 10)
    assert outcome.mean == pytest.approx(7 / 3)
    assert outcome.deviation == pytest.approx((7 / 3) ** 0.5)


def test_table_compares_with_the_first_recipe():
    variants = (Variant("ternary"), Variant("other", "--scheme float"))
    outcomes = {
        variants[0]: Outcome([1.5, 1.5, 1.5], 1000),
        variants[1]: Outcome([1.25, 1.5, 1.75], 2048000),
    }
    lines = list(results.table(variants, outcomes))
    assert len(lines) == 4
    assert len({line.count("|") for line in lines}) == 1
    assert "| 1.5000 ± 0.0000 | +0.0000 | 1.5000 | 1.5000 | 1.5000 | 1,000 |" in lines[2]
    assert "`--scheme float` | 1.5000 ± 0.2500 | +0.0000 | 1.2500 |" in lines[3]


def test_fill_replaces_what_is_between_the_marks():
    text = "a\n<!-- x -->\nold\n<!-- end of x -->\nb\n<!-- y -->\n<!-- end of y -->\n"
    filled = results.fill(text, "x", ["1", "2"])
    assert filled == text.replace("old\n", "1\n2\n")
    assert results.fill(filled, "x", ["1", "2"]) == filled


def test_fill_refuses_a_document_without_the_table():
    with pytest.raises(ValueError, match=r"no place for x: expected <!-- x -->"):
        results.fill("nothing", "x", [])


@pytest.mark.skipif(not DOCUMENT.exists(), reason="docs/RESULTS.md lies beside the source only")
def test_the_document_has_a_place_for_every_table():
    text = DOCUMENT.read_text(encoding="utf-8")
    for name in (*TABLES, *results._ALONE):
        assert results.fill(text, name, ["new"]) != text


@pytest.fixture
def calls(monkeypatch, tmp_path):
    """The command lines that would have been run; each leaves a finished run."""
    made = []

    def run(arguments, **_):
        made.append(arguments[1:])
        where = arguments.index("--resume" if "--resume" in arguments else "--out") + 1
        folder = Path(arguments[where])
        folder.mkdir(parents=True, exist_ok=True)
        record = json.dumps({"step": 2000, "val_loss": 1.5})
        (folder / "metrics.jsonl").write_text(record + "\n")
        return subprocess.CompletedProcess(arguments, 0, "", "")

    monkeypatch.setattr(results.subprocess, "run", run)
    monkeypatch.setattr(
        results, "load_model", lambda _: type("Model", (), {"stored_bytes": lambda self: 7})()
    )
    return made


def test_train_runs_what_is_missing_and_nothing_else(calls, tmp_path):
    variant = Variant("binary", "--scheme binary")
    for _ in range(2):
        assert results.train(variant, 2, "text", tmp_path) == Outcome([1.5], 7)
    assert calls == [results.command(variant, 2, "text", results._folder(tmp_path, variant, 2))]


def test_train_goes_on_with_a_run_that_was_stopped(calls, tmp_path):
    folder = results._folder(tmp_path, Variant("base"), 1)
    folder.mkdir(parents=True)
    (folder / "training.json").write_text("{}")
    (folder / "metrics.jsonl").write_text('{"step": 500, "val_loss": 2.0}\n')
    results.train(Variant("base"), 1, "text", tmp_path)
    assert calls == [["-m", "legacy1bit.main", "train", "--resume", str(folder)]]


def test_train_tells_what_failed(monkeypatch, tmp_path, capsys):
    failed = subprocess.CompletedProcess(["x"], 2, "", "legacy1bit: error: no such file\n")
    monkeypatch.setattr(results.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(subprocess.CalledProcessError):
        results.train(Variant("base"), 1, "text", tmp_path)
    assert "no such file" in capsys.readouterr().err


@pytest.mark.memory
def test_run_alone_measures_a_run_once(tmp_path):
    arguments = ["--steps", "3", "--stories", "20", "--model-dim", "8", "--sequence-length", "8"]
    outcome = results.run_alone(arguments, tmp_path / "run")
    assert outcome["step"] == 3
    assert outcome["run_seconds"] > outcome["elapsed_seconds"]
    # Python and NumPy alone take 20 MiB; nothing here takes a fifth of a GiB.
    assert 20 * 2**20 < outcome["peak_bytes"] < 200 * 2**20
    assert results.run_alone(arguments, tmp_path / "run") == outcome


@pytest.mark.slow
@pytest.mark.memory
def test_the_default_job_stays_under_200_mib(tmp_path):
    """Its first steps have all the room that the others need, and so has the look at their end."""
    outcome = results.run_alone(["--steps", "2", "--threads", "2"], tmp_path / "run")
    assert outcome["peak_bytes"] < 200 * 2**20


def test_run_alone_tells_what_failed(tmp_path, capsys):
    with pytest.raises(subprocess.CalledProcessError):
        results.run_alone(["--steps", "0"], tmp_path / "run")
    assert "steps is 0" in capsys.readouterr().err


@pytest.fixture
def alone(monkeypatch):
    """Runs that would have had all cores: twice as slow where activations are worked out twice."""
    made = []

    def run(arguments, folder):
        made.append(arguments)
        twice = "--gradient-checkpointing" in arguments
        return {
            "val_loss": 0.2,
            "run_seconds": 90.0,
            "peak_bytes": (100 if twice else 150) * 2**20,
            "tokens_per_second": 500.0 if twice else 1000.0,
            "elapsed_seconds": 30.0,
            "bits_per_byte": 2.0 + 0.1 * ("bpe" in arguments),
            "stored_bytes": 7000,
            "file_bytes": 8000,
            "step": 1234,
        }

    monkeypatch.setattr(results, "run_alone", run)
    return made


def test_story_table_compares_with_the_floor(alone, tmp_path, monkeypatch):
    monkeypatch.setattr(results, "entropy_per_character", lambda: 0.16)
    lines = list(results.story_table("text", tmp_path))
    assert alone == [["--seed", "1"], ["--seed", "2"], ["--seed", "3"]]
    assert lines[2] == "| seed 1 | 0.2000 | 25.0% | 90 s | 150 MiB |"
    assert len({line.count("|") for line in lines}) == 1


def test_token_table_compares_bits_a_byte(alone, tmp_path):
    lines = list(results.token_table("text", tmp_path))
    assert all(arguments[:2] == ["--data", "text"] for arguments in alone)
    assert len(alone) == 3 * len(lines[2:])
    assert lines[2] == "| bytes | `--steps 2000` | 2.0000 ± 0.0000 | 0.2000 | 30 s | 7,000 |"
    assert all("| 2.1000 ± 0.0000 |" in line for line in lines[3:])
    assert len({line.count("|") for line in lines}) == 1


def test_budget_table_tells_time_and_size(alone, tmp_path):
    lines = list(results.budget_table("text", tmp_path))
    # Those of ten minutes once.
    assert len(lines[2:]) == len(results._BUDGETS) == 5
    assert len(alone) == 4 * len(results.SEEDS) + 1
    row = "`--minutes 1` | 0.2000 ± 0.0000 | 0.2000 | 0.2000 | 0.2000 | 1,234 | 30 s | 8,000 |"
    assert row in lines[3]
    assert len({line.count("|") for line in lines}) == 1


@pytest.mark.skipif(not DOCUMENT.exists(), reason="docs/settings lies beside the source only")
def test_budgets_are_understood(monkeypatch):
    monkeypatch.chdir(DOCUMENT.parents[1])
    for options in results._BUDGETS.values():
        values = main.parser_of("train").parse_args(["train", *shlex.split(options)])
        model = run_settings._records(values, run_settings.merged_settings(values))[0]
        assert values.minutes in (1, 10)
        assert model.scheme == "ternary"


def test_memory_table_compares_in_turns(alone, tmp_path):
    lines = list(results.memory_table("text", tmp_path))
    assert len(alone) == 6
    assert alone[0] != alone[1]
    assert alone[:2] == alone[2:4] == alone[4:]
    assert lines[2:] == [
        "|  | 150 MiB | 1,000 | 1.00 |",
        "| `--gradient-checkpointing` | 100 MiB | 500 | 0.50 |",
    ]


def test_main_fills_in_the_document(calls, alone, tmp_path):
    document = tmp_path / "RESULTS.md"
    places = (*TABLES, *results._ALONE)
    document.write_text("".join(f"<!-- {name} -->\n<!-- end of {name} -->\n" for name in places))
    arguments = ["--data", "text", "--out", str(tmp_path / "runs"), "--document", str(document)]
    assert results.main([*arguments, "--jobs", "2"]) == 0
    assert len(calls) == len(VARIANTS) * len(results.SEEDS)
    text = document.read_text()
    for one in VARIANTS:
        assert f"| {one.label} | " in text
    assert text.count("1.5000 ± 0.0000") == sum(map(len, TABLES.values()))
    made = len(alone)
    assert results.main([*arguments, "--only", "stories"]) == 0
    assert len(alone) == made + len(results.SEEDS)
    assert document.read_text() == text
