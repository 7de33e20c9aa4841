"""The search for settings: what it keeps, and that no trial is lost or run twice."""

import collections
import concurrent.futures
import contextlib
import errno
import itertools
import os
import signal
import sqlite3
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.studies import SPACE
from legacy1bit.config_files import read_config
from legacy1bit.formats.native import WEIGHTS_FILE
from legacy1bit.hyperparams import ModelConfig, TrainingConfig
from legacy1bit.logger import read_metrics
from legacy1bit.main import main
from legacy1bit.model import load_model
from legacy1bit.search import study as tune
from legacy1bit.search.space import (
    default_space,
)
from legacy1bit.search.study import TrialResult, best_of, results_of
from legacy1bit.training.evaluation import Metrics
from legacy1bit.training.run import Run
from legacy1bit.training.trainer import Trainer

# Set where a PostgreSQL server runs for the tests: the address of a database of its own.
POSTGRES = os.environ.get("LEGACY1BIT_POSTGRES")

few = settings(max_examples=60, deadline=None)

# What the command line names is not searched, a file's settings are.
TINY = """
[model]
num_blocks = 1
num_heads = 2
sequence_length = 16
[training]
batch_size = 2
seed = 3
"""


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # What is tried depends on the process otherwise: here on the seed and the trials so far.
    digest = tune._digest
    monkeypatch.setattr(tune, "_digest", lambda values: digest(values[:2]))
    Path("space.toml").write_text(SPACE)
    Path("tiny.toml").write_text(TINY)
    Path("text.txt").write_text("".join(f"{n} times {n} is {n * n}.\n" for n in range(200)))


def search(out, *options):
    """Options of a quick search."""
    arguments = ["tune", "--data", "text.txt", "--space", "space.toml", "--config", "tiny.toml"]
    arguments += ["--threads", "1", "--out", out]
    if "--steps" not in options and "--seconds" not in options:
        arguments += ["--steps", "6"]
    return [*arguments, "--cache", "cache", *map(str, options)]


def trials_of(folder, url=None, name="study"):
    pytest.importorskip("optuna")
    storage = tune.open_storage(url or f"sqlite:///{folder}/study.db")
    return tune.open_study(storage, name, None, 1)[0].get_trials()


def results_in(folder, url=None, name="study"):
    storage = tune.open_storage(url or f"sqlite:///{folder}/study.db")
    return results_of(tune.open_study(storage, name, None, 1)[0])


# --- The best -------------------------------------------------------------------------------------


def result(number, state, loss, size, speed):
    return TrialResult(number, state, {}, {}, {}, loss, size, speed, 1.0, "")


results = st.lists(
    st.tuples(
        st.sampled_from(["complete", "complete", "pruned", "refused", "failed"]),
        st.integers(1, 4).map(float),
        st.integers(1, 4),
        st.integers(1, 4).map(float),
    ),
    max_size=12,
).map(lambda many: [result(number, *one) for number, one in enumerate(many)])


@few
@given(results, st.permutations(["loss", "bytes", "speed"]), st.integers(1, 3))
def test_best_is_what_no_other_beats(found, objectives, count):
    objectives = objectives[:count]

    def values(one):
        return [(-1 if name == "speed" else 1) * getattr(one, name) for name in objectives]

    complete = [one for one in found if one.state == "complete"]
    front = best_of(found, objectives)
    assert [one.loss for one in front] == sorted(one.loss for one in front)
    for one in complete:
        beaten = any(
            all(a <= b for a, b in zip(values(other), values(one), strict=True))
            and values(other) != values(one)
            for other in complete
        )
        # Of equal ones, one.
        assert (values(one) in [values(best) for best in front]) == (not beaten)
    assert len({tuple(values(one)) for one in front}) == len(front)


# --- A search -------------------------------------------------------------------------------------


def test_search_writes_settings_that_train(say):
    pytest.importorskip("optuna")
    output = say(*search("study", "--trials", 5)).out.decode()
    assert "5 trials: " in output
    found = results_in("study")
    assert [one.number for one in found] == list(range(5))
    (best,) = best_of(found, ("loss",))
    assert f"trial {best.number:>4}  loss {best.loss:.4f}" in output
    # The search begins where one stands.
    assert found[0].params["learning_rate"] == TrainingConfig().learning_rate
    assert found[0].params["activation"] == "relu2"
    for one in found:
        assert one.state in ("complete", "pruned")
        assert 1e-3 <= one.params["learning_rate"] <= 1e-2
        assert one.model["model_dim"] in (8, 16, 24)
        assert one.training["float_steps"] == round(6 * one.params["float_steps"])
        folder = Path(f"study/trials/{one.number:04}")
        records = read_metrics(folder / "metrics.jsonl")
        if one.state == "complete":
            assert records[-1]["val_loss"] == one.loss
        # Weights are kept of the best alone.
        assert (folder / WEIGHTS_FILE).exists() == (one.number == best.number)
    read = read_config("study/best.toml")
    assert ModelConfig(**{**read["model"], "vocab_size": 256}) == ModelConfig.from_dict(best.model)
    # The warm-up is what it is in a run of as many steps.
    training = TrainingConfig(**{**read["training"], "warmup_steps": None})
    assert training == TrainingConfig.from_dict(best.training)
    say("train", "--config", "study/best.toml", "--data", "text.txt", "--cache", "cache",
        "--out", "again")  # fmt: skip
    again = read_metrics("again/metrics.jsonl")[-1]
    assert again["val_loss"] == best.loss
    path = Path(f"study/trials/{best.number:04}")
    assert (path / WEIGHTS_FILE).stat().st_size == best.bytes
    assert load_model(path).config == ModelConfig.from_dict(best.model)


@pytest.mark.parametrize("sampler", ["tpe", "grid"])
def test_search_leaves_what_the_command_line_names(say, fail, sampler):
    """What a file of settings names is only where it begins."""
    pytest.importorskip("optuna")
    Path("space.toml").write_text(
        "[learning_rate]\nchoices = [1e-3, 2e-3]\n[num_heads]\nchoices = [2, 4]\n"
        "[model_dim]\nchoices = [8, 16]\n[final_norm]\nchoices = [true, false]\n"
    )
    named = ("--model-dim", 24, "--learning-rate", 0.001, "--no-final-norm")
    options = ("--sampler", sampler, "--trials", 2, "--no-prune")
    errors = say(*search("study", *options, *named)).err.decode()
    line = "not searched, as the command line sets it: --learning-rate, --model-dim, --final-norm"
    assert line in errors.splitlines()
    assert "searching 1 settings" in errors
    trials = results_in("study")
    assert len(trials) == 2
    for one in trials:
        assert one.params.keys() == {"num_heads"}
        assert (one.model["model_dim"], one.model["final_norm"]) == (24, False)
        assert one.training["learning_rate"] == 0.001
    assert trials[0].params == {"num_heads": 2}
    # A study that goes on has the space that it began with.
    say("tune", "--resume", "study", "--trials", 3, "--cache", "cache", "--threads", 1)
    assert all(one.params.keys() == {"num_heads"} for one in results_in("study"))
    message = fail(*search("none", *options, *named, "--heads", 4))
    assert "leave out one of --learning-rate, --heads, --model-dim, --final-norm" in message
    assert not Path("none").exists()


@pytest.mark.usefixtures("no_threads")
@pytest.mark.parametrize(("jobs", "needed"), [(1, 1), (3, 7)])
def test_search_needs_threads(fail, tmp_path, monkeypatch, jobs, needed):
    monkeypatch.chdir(tmp_path)
    assert fail("tune", "--stories", 20, "--jobs", jobs, "--out", "study") == (
        f"the system does not allow the {needed} threads or processes more that tune needs: lower "
        "--jobs, or raise the limit (ulimit -u)"
    )
    assert not Path("study").exists()


def test_trial_is_measured_by_its_best_model(say, monkeypatch):
    pytest.importorskip("optuna")
    # As it looks while it trains, each look is worse than the one before.
    losses = {1: 2.0}

    def look(self, limit, stop=None):
        return Metrics(losses.get(self.step, 1.0 + self.step), 0.25, 0.5, 0.75, 100, 100)

    Path("space.toml").write_text("[activation]\nchoices = ['relu2']\n")
    monkeypatch.setattr(Trainer, "_measure", look)
    say(*search("study", "--trials", 1))
    (one,) = results_in("study")
    path = Path("study/trials/0000")
    best = load_model(path / "best")
    assert best.provenance.steps == 1
    assert read_metrics(path / "metrics.jsonl")[-1]["val_loss"] == 7.0
    output = say("evaluate", "--model", path / "best", "--cache", "cache").out.decode()
    assert output.startswith(f"validation loss   {one.loss:.4f} ")
    assert one.bytes == (path / "best" / WEIGHTS_FILE).stat().st_size
    # The option is the study's, a file's is that of each trial.
    Path("tiny.toml").write_text(TINY + "patience = 2\n")
    output = say(*search("patient", "--patience", 1, "--trials", 3)).out
    assert b"1 trials: 1 to their end" in output or b"2 trials" in output
    assert read_metrics("patient/trials/0000/metrics.jsonl")[-1]["step"] == 3


def test_search_keeps_to_a_limit_in_bytes(say):
    pytest.importorskip("optuna")
    say(*search("all", "--sampler", "random", "--trials", 6, "--no-prune"))
    sizes = sorted(one.bytes for one in results_in("all"))
    assert sizes[0] < sizes[-1]
    limit = (sizes[0] + sizes[-1]) // 2
    say(*search("study", "--max-bytes", limit, "--trials", 5))
    found = results_in("study")
    trained = [one for one in found if one.state != "refused"]
    assert len(trained) == 5
    assert all(one.bytes <= limit for one in trained)
    for one in found:
        if one.state == "refused":
            assert one.bytes > limit
            assert not Path(f"study/trials/{one.number:04}").exists()
            assert f"more than {limit:,}" in one.reason
    assert load_model(f"study/trials/{best_of(found, ['loss'])[0].number:04}") is not None


def test_search_keeps_to_a_limit_in_speed(say):
    pytest.importorskip("optuna")
    arguments = search("study", "--min-speed", 1e12, "--minutes", 0.005)
    with pytest.raises(AssertionError):
        say(*arguments)
    assert {one.state for one in results_in("study")} == {"refused"}
    say(*search("other", "--min-speed", 1, "--trials", 2))
    assert all(one.speed > 1 for one in results_in("other"))


def test_search_for_loss_and_bytes_tells_the_front(say):
    pytest.importorskip("optuna")
    output = say(*search("study", "--objectives", "loss,bytes", "--trials", 6)).out.decode()
    found = results_in("study")
    assert {one.state for one in found} == {"complete"}
    front = best_of(found, ("loss", "bytes"))
    assert output.count("  loss ") == len(front)
    for one in found:
        kept = Path(f"study/trials/{one.number:04}/{WEIGHTS_FILE}")
        assert kept.exists() == (one in front)
    assert len({one.bytes for one in found}) > 1


def test_trial_takes_about_its_time(say):
    pytest.importorskip("optuna")
    say(*search("study", "--seconds", 0.5, "--trials", 2))
    for one in results_in("study"):
        assert one.training["steps"] > 5
        # A busy machine may take far longer than it seemed.
        assert 0.05 < one.seconds < 10


def test_search_goes_on_after_models_that_fail(say):
    """Where heads do not divide the width, and where the rate is far too high."""
    pytest.importorskip("optuna")
    Path("space.toml").write_text(
        "[model_dim]\nchoices = [8, 10]\n[num_heads]\nchoices = [2, 4]\n"
        '[learning_rate]\nchoices = [1e-3, 1e3]\n[optimizer]\nchoices = ["sgd"]\n'
    )
    say(*search("study", "--sampler", "grid"))
    found = results_in("study")
    assert len(found) == 8
    for one in found:
        if one.params["model_dim"] == 10 and one.params["num_heads"] == 4:
            assert one.state == "refused"
            assert "expected a multiple" in one.reason
        elif one.state == "pruned":
            assert one.params["learning_rate"] == 1e3
    assert any(one.state == "complete" for one in found)


def test_search_goes_on_where_it_diverges_at_once(say):
    """While it is found out how many steps a trial has."""
    pytest.importorskip("optuna")
    Path("space.toml").write_text("[learning_rate]\nchoices = [1e3]\n")
    options = ("--seconds", 1, "--trials", 2, "--optimizer", "sgd", "--warmup-steps", 0)
    say(*search("study", *options, "--clip", 0), status=1)
    for one in results_in("study"):
        assert one.state == "pruned"
        assert "try a lower --learning-rate" in one.reason


def test_trials_warm_up_for_a_share_of_their_steps(say, monkeypatch):
    pytest.importorskip("optuna")
    monkeypatch.setattr(tune, "steps_within", lambda *arguments: 20)
    say(*search("study", "--seconds", 1, "--trials", 1))
    assert Run(Path("study/trials/0000")).settings().training.warmup_steps == 2
    # The best settings have a share, too, whatever the run's length then is.
    assert "warmup_steps" not in read_config("study/best.toml")["training"]
    say(*search("named", "--seconds", 1, "--trials", 1, "--warmup-steps", 15))
    assert Run(Path("named/trials/0000")).settings().training.warmup_steps == 15


def test_search_ends_without_a_gain(say, monkeypatch):
    pytest.importorskip("optuna")
    real, count = tune.Tuner._train, itertools.count()

    def train(self, *arguments):
        real(self, *arguments)
        return max(1.0, 4.0 - next(count)), 0.1

    monkeypatch.setattr(tune.Tuner, "_train", train)
    say(*search("study", "--patience", 4, "--no-prune"))
    # The fourth is the best, and four come behind it.
    assert [one.loss for one in results_in("study")] == [4.0, 3.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0]


def test_bad_trials_end_early(say, monkeypatch):
    pytest.importorskip("optuna")
    Path("space.toml").write_text(
        "[learning_rate]\nchoices = [0.01, 0.009, 0.008, 0.007, 0.006, 1e-6, 2e-6]\n"
    )
    options = ("--steps", 20, "--optimizer", "adamw", "--sampler", "grid", "--warmup-steps", 0)
    say(*search("study", *options))
    found = results_in("study")
    ended = [one for one in found if one.state == "pruned"]
    assert {5, 6} <= {one.number for one in ended}
    for one in ended:
        assert one.number >= 4
        records = read_metrics(f"study/trials/{one.number:04}/metrics.jsonl")
        assert records[-1]["step"] < 20
    assert any(one.state == "complete" for one in found)


# --- Going on -------------------------------------------------------------------------------------


def test_study_goes_on(say, fail):
    pytest.importorskip("optuna")
    say(*search("study", "--trials", 2))
    say("tune", "--resume", "study", "--trials", 4, "--cache", "cache", "--threads", 1)
    assert [one.number for one in results_in("study")] == [0, 1, 2, 3]
    for options, message in (
        (("--seconds", 3), "--seconds cannot be changed"),
        (("--model-dim", 3), "--model-dim cannot be changed"),
        (("--heads", 3), "--heads cannot be changed"),
        (("--vocab-size", 300), "--vocab-size cannot be changed"),
        (("--no-prune",), "--no-prune cannot be changed"),
        (("--validation", "text.txt"), "--validation names a text that study does not have"),
    ):
        assert message in fail("tune", "--resume", "study", "--trials", 5, *options)
    assert "holds a study already" in fail(*search("study", "--trials", 3))
    Path("text.txt").rename("moved.txt")
    go_on = ("tune", "--resume", "study", "--cache", "cache", "--threads", 1, "--trials")
    assert "--data or --validation says where" in fail(*go_on, 5)
    say(*go_on, 5, "--data", "moved.txt")
    Path("text.txt").write_text("other " * 1000)
    for more in ((), ("--data", "text.txt")):
        message = fail(*go_on, 6, *more)
        assert "has changed" in message
        assert "the run" not in message
    # Beside a study that has moved its text is known by its name.
    Path("moved.txt").rename("text.txt")
    Path("there").mkdir()
    for name in ("study", "text.txt"):
        Path(name).rename(Path("there", name))
    say("tune", "--resume", "there/study", *go_on[3:], 6)


def test_study_that_is_resumed_warns_of_a_separator_that_separates_nothing(say):
    pytest.importorskip("optuna")
    warning = b"warning: the separator '<|end|>' separates nothing in text.txt: 1 document\n"
    assert warning in say(*search("study", "--trials", 1, "--separator", "<|end|>")).err
    go_on = ("tune", "--resume", "study", "--trials", 2, "--cache", "cache", "--threads", 1)
    assert say(*go_on).err.count(warning) == 1


def test_search_says_what_is_wrong(fail):
    pytest.importorskip("optuna")
    Path("full").mkdir()
    Path("full/old").write_text("old")
    Path("broken").mkdir()
    Path("broken/tune.json").write_text("{")
    for options, message in (
        (("--trials", 0), "--trials is 0"),
        (("--minutes", "nan"), "--minutes is nan"),
        (("--jobs", -1), "--jobs is -1"),
        (("--max-bytes", "much"), "'much', expected bytes"),
        (("--objectives", "loss,size"), "'loss,size', expected some of loss, bytes, speed"),
        (("--objectives", "loss,loss"), "expected some of"),
        (("--seconds", 2, "--steps", 3), "exclude each other"),
        (("--sampler", "grid"), "learning_rate has a range"),
        (("--max-bytes", "9" * 400), "expected at most"),
        (("--storage", ""), "--storage is empty"),
        (("--jobs", 257), "--jobs is 257, expected 1 to 256"),
        (("--minutes", "1e308"), "--minutes is 1e+308"),
        (("--minutes", 0.5, "--seconds", 31), "a trial of 31 s does not fit into 0.5 minutes"),
        (("--space", "nowhere"), "nowhere: No such file"),
        (("--storage", "sqlite:////nowhere/at/all.db"), "cannot be opened"),
        (("--storage", "klingon://here"), "cannot be opened"),
    ):
        assert message in fail(*search("new", "--trials", 1, *options)), options
    assert "not an empty folder" in fail(*search("full", "--trials", 1))
    assert "is not a study" in fail("tune", "--resume", "full")
    assert "is damaged" in fail("tune", "--resume", "broken")


def test_only_errors_of_the_database_are_called_so():
    optuna = pytest.importorskip("optuna")
    with pytest.raises(KeyError, match="ours"), tune.study_at_hand():
        {}["ours"]
    storage = tune.open_storage("sqlite:///study.db")
    with pytest.raises(ValueError, match="database cannot be used: "), tune.study_at_hand():
        optuna.load_study(study_name="missing", storage=storage)
    with pytest.raises(AssertionError), tune.study_at_hand():
        raise AssertionError


def test_databases_of_another_version_or_damaged_are_refused_in_a_line(say, fail):
    pytest.importorskip("optuna")
    say(*search("study", "--trials", 1))
    intact = Path("study/study.db").read_bytes()
    go_on = ("tune", "--resume", "study", "--trials", 2, "--cache", "cache", "--threads", 1)
    for change, message in (
        ("UPDATE alembic_version SET version_num = 'v9'", "study.db cannot be opened: "),
        ("UPDATE study_directions SET direction = 'BOGUS'", "database cannot be used: "),
        ("DELETE FROM studies", "there is no study study that can be read"),
    ):
        Path("study/study.db").write_bytes(intact)
        with contextlib.closing(sqlite3.connect("study/study.db")) as database, database:
            database.execute(change)
        assert message in fail(*go_on), change
    Path("study/study.db").write_bytes(intact[: len(intact) // 2])
    assert "malformed" in fail(*go_on)


def test_what_was_wrong_is_told_where_the_library_fails_once_more():
    pytest.importorskip("optuna")
    errors = pytest.importorskip("sqlalchemy").exc
    library = {"__name__": "optuna.study"}
    exec(
        "def work(error):\n"
        "    try:\n        raise error\n"
        "    except Exception:\n        assert False, 'Should not reach.'",
        library,
    )
    full = errors.OperationalError("UPDATE", None, Exception("database or disk is full"))
    with pytest.raises(ValueError, match=r"used: .*disk is full"), tune.study_at_hand():
        library["work"](full)


def test_share_that_rounds_to_nothing_is_the_least_there_is(say, fail):
    pytest.importorskip("optuna")
    Path("space.toml").write_text("[decay_every]\nlow = 0.01\nhigh = 0.05\nof_steps = true\n")
    say(*search("study", "--trials", 1))
    assert results_in("study")[0].training["decay_every"] == 1
    for name in ("a?b", "a%20b"):
        assert "a study's database cannot lie there" in fail(*search(name, "--trials", 1))
        assert not Path(name).exists()


def test_what_only_size_asks_for_is_searched_only_then(say, fail):
    pytest.importorskip("optuna")
    Path("space.toml").write_text(
        "[learning_rate]\nlow = 1e-3\nhigh = 1e-2\n"
        "[ternary_embedding]\nchoices = [false, true]\nfor_bytes = true\n"
        "[model_dim]\nlow = 8\nhigh = 16\nstep = 8\nfor_bytes = true\n"
    )
    options = ("--trials", 1)
    say(*search("plain", *options))
    assert set(results_in("plain")[0].params) == {"learning_rate"}
    sized = {"limit": ("--max-bytes", "1MB"), "front": ("--objectives", "bytes,loss")}
    for name, more in sized.items():
        say(*search(name, *options, *more))
        chosen = set(results_in(name)[0].params)
        assert chosen == {"learning_rate", "ternary_embedding", "model_dim"}
    Path("space.toml").write_text("[num_heads]\nchoices = [2]\nfor_bytes = true\n")
    assert "nothing to search without --max-bytes" in fail(*search("none", *options))


def test_default_space_is_printed(say):
    assert say("tune", "--print-space").out.decode() == default_space().read_text()


def test_password_is_not_shown(fail):
    pytest.importorskip("optuna")
    message = fail(*search("new", "--storage", "postgresql+nodriver://me:secret@host/name"))
    assert "secret" not in message


# --- Several processes ----------------------------------------------------------------------------

ASK = """
import sys
from legacy1bit.search.study import load_optuna, open_storage
optuna = load_optuna()
study = optuna.load_study(storage=open_storage(sys.argv[1]), study_name=sys.argv[2])
for _ in range(10):
    trial = study.ask()
    print(trial.number, trial.suggest_int("x", 0, 1000), flush=True)
    study.tell(trial, 0.0)
"""


@pytest.fixture(params=["sqlite", "postgres"])
def database(request, tmp_path):
    """A database for studies, and a name that is new in it."""
    pytest.importorskip("optuna")
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/shared.db", "study"
    if POSTGRES is None:
        pytest.skip("LEGACY1BIT_POSTGRES names no server: see make test-postgres")
    return POSTGRES, f"study {uuid.uuid4().hex}"


def started(*arguments, session=False):
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        text=True,
        start_new_session=session,
    )


def test_trials_are_taken_once(database):
    """Those that wait, and new ones."""
    url, name = database
    study = tune.load_optuna().create_study(storage=tune.open_storage(url), study_name=name)
    for number in range(12):
        study.enqueue_trial({"x": number})
    processes = [started("-c", ASK, url, name) for _ in range(2)]
    taken = []
    for process in processes:
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        taken += [tuple(map(int, line.split())) for line in output.splitlines()]
    assert sorted(number for number, _ in taken) == list(range(20))
    waiting = sorted(value for number, value in taken if number < 12)
    assert waiting == list(range(12))


def test_two_processes_share_a_grid(database):
    url, name = database
    Path("space.toml").write_text(
        "[model_dim]\nchoices = [8, 16, 24]\n[activation]\nchoices = ['relu', 'relu2']\n"
    )
    options = ("--sampler", "grid", "--storage", url, "--study", name, "--steps", 30)
    first = started("-m", "legacy1bit.main", *search("one", *options))
    second = started("-m", "legacy1bit.main", *search("two", *options))
    for process in (first, second):
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    found = results_in(None, url, name)
    chosen = collections.Counter(tuple(one.params.values()) for one in found if one.params)
    assert len(chosen) == 6
    assert set(chosen.values()) == {1}
    folders = [sorted(Path(out, "trials").glob("*")) for out in ("one", "two")]
    assert len(folders[0]) + len(folders[1]) == 6


def wait_for(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.05)


SLOW = ("--steps", 4000, "--evaluate-every", 10)
WORK = """
import sys
from legacy1bit.search import study as tune
from legacy1bit.main import main
tune.DEAD_SECONDS = 2
tune.open_storage.__defaults__ = (2,)
sys.exit(main(sys.argv[1:]))
"""


def test_killed_process_loses_its_running_trial_at_most(database, say):
    url, name = database
    options = ("--storage", url, "--study", name, "--trials", 4, "--no-prune")
    process = started("-c", WORK, *search("study", *options, "--steps", 400))
    folder = Path("study/trials/0001")
    wait_for(lambda: (folder / "metrics.jsonl").exists())
    process.kill()
    process.communicate()
    before = {t.number: t for t in trials_of(None, url, name)}
    assert before[0].state.name == "COMPLETE"
    killed = [t for t in before.values() if t.state.name == "RUNNING"]
    assert len(killed) == 1
    # It is known to be dead after a while; the times of SQLite are whole seconds.
    time.sleep(5)
    arguments = ("--resume", "study", "--storage", url, "--trials", 4, "--threads", 1)
    process = started("-c", WORK, "tune", *arguments, "--cache", "cache")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    after = trials_of(None, url, name)
    assert after[0].values == before[0].values
    assert after[0].datetime_complete == before[0].datetime_complete
    lost = after[killed[0].number]
    assert lost.state.name == "FAIL"
    again = [t for t in after if t.params == lost.params and t.number != lost.number]
    assert [t.state.name for t in again] == ["COMPLETE"]
    assert sum(t.state.name == "COMPLETE" for t in after) == 4
    assert len(after) == 5


def test_trial_that_is_stopped_begins_again(say):
    pytest.importorskip("optuna")
    process = started(
        "-m", "legacy1bit.main", *search("study", "--trials", 2, "--steps", 100_000, "--no-prune")
    )
    wait_for(lambda: Path("study/trials/0000/metrics.jsonl").exists())
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "--resume study" in errors
    first, again = trials_of("study")
    assert (first.state.name, again.state.name) == ("FAIL", "WAITING")
    assert first.params == again.params


def at_work():
    """A search of two processes, each of which is at a trial that has no end."""
    options = ("--trials", 2, "--steps", 100_000, "--no-prune", "--jobs", 2)
    process = started("-m", "legacy1bit.main", *search("study", *options))
    paths = [Path(f"study/trials/{number:04}/metrics.jsonl") for number in range(2)]
    wait_for(lambda: all(path.exists() for path in paths))
    return process


def test_jobs_end_with_the_process_that_began_them(say):
    pytest.importorskip("optuna")
    process = at_work()
    process.kill()
    process.communicate()
    wait_for(lambda: [t.state.name for t in trials_of("study")][:2] == ["FAIL", "FAIL"])


@pytest.mark.parametrize(
    "signals",
    [[signal.SIGTERM], pytest.param([signal.SIGINT] * 2, marks=pytest.mark.slow)],
    ids=len,
)
def test_jobs_end_when_the_first_process_is_told(signals):
    """As by a terminal, which tells all of them, and as by somebody who tells that one only."""
    pytest.importorskip("optuna")
    process = at_work()
    for number in signals:
        process.send_signal(number)
        time.sleep(0.2)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    if len(signals) == 1:
        assert "--resume study" in errors
        states = [trial.state.name for trial in trials_of("study")]
        assert sorted(states) == ["FAIL", "FAIL", "WAITING", "WAITING"]


@pytest.mark.parametrize("seconds", [0.1, 0.6])
def test_jobs_that_are_starting_end_without_a_traceback(seconds):
    """A terminal's Ctrl-C comes to those, too, that have just begun to load."""
    pytest.importorskip("optuna")
    process = started("-m", "legacy1bit.main", *search("study", "--jobs", 2), session=True)
    assert any("searching" in line for line in process.stderr)
    time.sleep(seconds)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert "--resume study" in errors


def test_study_that_could_not_begin_can_be_begun_again(say, fail, monkeypatch):
    pytest.importorskip("optuna")

    def full(self, folder):
        raise OSError(errno.ENOSPC, "No space left on device", str(folder))

    with monkeypatch.context() as patch:
        patch.setattr(tune.StudyRecord, "save", full)
        assert "No space left" in fail(*search("study", "--trials", 1))
        assert not Path("study").exists()
        # What was there is another's, who may be about to begin a study there.
        Path("other").mkdir()
        assert "No space left" in fail(*search("other", "--trials", 1))
        assert Path("other", "study.db").exists()
    say(*search("study", "--trials", 1))


@pytest.mark.parametrize("jobs", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_tune_works_in_any_thread(jobs):
    pytest.importorskip("optuna")
    arguments = list(map(str, search("study", "--trials", jobs, "--jobs", jobs)))
    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        assert threads.submit(main, arguments).result() == 0
    assert Path("study/best.toml").exists()


def test_jobs_share_the_cores(say):
    pytest.importorskip("optuna")
    say(*search("study", "--trials", 4, "--jobs", 2, "--threads", 2))
    found = results_in("study")
    # Both may begin a last one.
    assert 4 <= len(found) <= 5
    assert all(one.training["threads"] == 1 for one in found if one.training)
