"""Trainings on several ranks: the bits of as many threads, and what happens when one is lost."""

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import time

import pytest

from helpers.paths import TESTS
from helpers.ranks import COMMANDS, PROGRAM, needs_mpi, run, start
from helpers.runs import assert_same_files, measured, tiny
from legacy1bit.commands import options
from legacy1bit.commands.train import slow_ranks
from legacy1bit.distributed.ranks import ALONE, in_job
from legacy1bit.main import main
from legacy1bit.training.run import Run

# `make test-mpi` asks for 50.
KILLS = int(os.environ.get("LEGACY1BIT_KILLS", 2))

# Trainings of several steps, whose batches the ranks divide evenly or not.
SIZES = {"steps": 6, "evaluate_every": 3, "blocks": 2, "heads": 2, "batch_size": 6}
KINDS = {
    "muon": {},
    "adamw": {"optimizer": "adamw", "batch_size": 7, "scheme": "2bit"},
    "8bit": {"optimizer_bits": 8, "quantization_warmup": 3},
    "sgd": {"optimizer": "sgd", "float_steps": 3, "batch_size": 5},
}


def command(out, **changes):
    """The arguments of a short training, with one thread unless told."""
    return tiny(out=out, **{**SIZES, **changes})


def without_ranks(folder):
    """The records of a run, without what depends on the clock or on who has trained."""
    records = measured(Run(folder).metrics())
    return [{k: value for k, value in record.items() if k != "ranks"} for record in records]


def assert_same_runs(one, other):
    assert without_ranks(one) == without_ranks(other)
    threads = []
    for folder in (one, other):
        settings = json.loads((folder / "training.json").read_text())
        threads.append(settings["training"].pop("threads", None))
        (folder / "training.json").write_text(json.dumps(settings))
    assert_same_files(one, other)
    return threads


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def cores(monkeypatch):
    """A function that lets this process have so many cores: threads are no more than these."""
    return lambda count: monkeypatch.setattr(options, "available_cores", lambda: count)


def test_one_process_is_alone(monkeypatch):
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_NTASKS", "8")
    assert not in_job()
    assert ALONE.collect(3) == [3]
    assert ALONE.part(2, 9) == slice(2, 9)


@pytest.mark.parametrize(
    "variables",
    [
        {"OMPI_COMM_WORLD_SIZE": "2"},
        {"PMI_SIZE": "4"},
        {"PMIX_RANK": "0", "SLURM_NTASKS": "2"},
    ],
)
def test_jobs_are_known_by_their_launchers(monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert in_job()


def test_slow_ranks_are_named():
    times = (1.0, 1.1, 2.0, 0.9)
    ranks = [{"host": f"node{n}", "computing": seconds} for n, seconds in enumerate(times)]
    remark = slow_ranks({"ranks": ranks})
    assert remark == "slow: rank 2 on node2 takes 2 s for a step, others 1 s"
    assert slow_ranks({"ranks": ranks[:2]}) == slow_ranks({}) == ""


@needs_mpi
@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_exchanges_are_those_of_numpy(tmp_path, ranks):
    said = run(ranks, [TESTS / "distributed" / "exchanges.py"], tmp_path)
    assert all(f"rank {rank} is right" in said for rank in range(ranks)), said


@needs_mpi
@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_have_the_bits_of_as_many_threads(tmp_path, ranks, cores):
    cores(ranks)
    together = [command(f"{kind}-ranks", **changes) for kind, changes in KINDS.items()]
    said = run(ranks, [*COMMANDS, json.dumps(together)], tmp_path)
    assert said.count("the run is in") == len(KINDS), said
    for kind, changes in KINDS.items():
        assert main(command(f"{kind}-threads", **changes, threads=ranks)) == 0
        assert_same_runs(tmp_path / f"{kind}-threads", tmp_path / f"{kind}-ranks")
    every = Run(tmp_path / "muon-ranks").metrics()[-1]["ranks"]
    assert len(every) == ranks
    assert all(one["computing"] > 0 and one["exchanging"] > 0 for one in every)


@needs_mpi
@pytest.mark.slow
def test_other_numbers_of_ranks_have_losses_within_a_bound(tmp_path):
    changes = {"scheme": "float", "precision": "float32", "steps": 20, "evaluate_every": 10}
    for ranks in (2, 4):
        run(ranks, [*PROGRAM, *command(f"of-{ranks}", **changes)], tmp_path)
    assert main(command("of-1", **changes)) == 0
    losses = [
        [record["val_loss"] for record in Run(tmp_path / f"of-{ranks}").metrics()]
        for ranks in (1, 2, 4)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[2] == pytest.approx(losses[0], rel=1e-4)


@needs_mpi
@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_compression": "8bit"},
        {"gradient_compression": "1bit", "optimizer": "adamw"},
        {"local_steps": 2},
        {"local_steps": 2, "gradient_compression": "8bit"},
    ],
)
@pytest.mark.slow
def test_the_same_ranks_have_the_same_bits_and_go_on_with_them(tmp_path, changes):
    changes = {**changes, "steps": 12, "evaluate_every": 4}
    jobs = [command(name, **changes) for name in ("one", "other")]
    run(2, [*COMMANDS, json.dumps(jobs)], tmp_path)
    assert_same_runs(tmp_path / "one", tmp_path / "other")
    # The schedule is that of twelve steps.
    part = [command("part", **changes | {"steps": 8, "warmup_steps": 1, "decay_fraction": 0})]
    whole = [command("whole", **changes | {"warmup_steps": 1, "decay_fraction": 0})]
    more = [["train", "--resume", "part", "--steps", "12"]]
    run(2, [*COMMANDS, json.dumps([*part, *whole])], tmp_path)
    run(2, [*PROGRAM, *more[0], "--threads", "1"], tmp_path)
    assert without_ranks(tmp_path / "part")[2:] == without_ranks(tmp_path / "whole")[2:]
    run(1, [*PROGRAM, "train", "--resume", "whole", "--steps", "13", "--threads", "1"], tmp_path)


@needs_mpi
@pytest.mark.slow
def test_runs_go_on_with_other_numbers_of_ranks(tmp_path, cores):
    cores(4)
    changes = {"steps": 4, "evaluate_every": 2, "decay_fraction": 0, "warmup_steps": 1}
    run(4, [*PROGRAM, *command("ranks", **changes)], tmp_path)
    assert main(command("threads", **changes, threads=4)) == 0
    for ranks, steps in ((2, 8), (1, 10), (4, 12)):
        more = ["--steps", str(steps), "--threads"]
        said = run(ranks, [*PROGRAM, "train", "--resume", "ranks", *more, "1"], tmp_path)
        assert "going on with ranks" in said
        assert main(["train", "--resume", "threads", *more, str(ranks)]) == 0
    assert_same_runs(tmp_path / "ranks", tmp_path / "threads")


@needs_mpi
@pytest.mark.slow
def test_eight_ranks_end_on_few_cores_and_with_few_sequences(tmp_path):
    said = run(8, [*PROGRAM, *command("eight", batch_size=3)], tmp_path)
    assert "8 ranks, each with its part of every batch" in said
    assert len(Run(tmp_path / "eight").metrics()) == 2


def rank_processes(process):
    """The processes of a job, by their ranks."""
    found = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=False
    )
    return [int(number) for number in found.stdout.split()]


@needs_mpi
@pytest.mark.parametrize(
    "which", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGKILL]
)
def test_ranks_are_stopped_or_killed_and_go_on(tmp_path, which):
    changes = {"steps": 60, "evaluate_every": 5}
    run(2, [*PROGRAM, *command("whole", **changes)], tmp_path)
    choice, times = random.Random(KILLS), KILLS if which == signal.SIGKILL else 1
    for number in range(times):
        part = tmp_path / f"part{number}"
        times -= interrupted(part, which, choice, times, changes)
        if which == signal.SIGKILL:
            assert_same_runs(tmp_path / "whole", part)
        else:
            ends = [without_ranks(folder)[-1]["val_loss"] for folder in (tmp_path / "whole", part)]
            assert ends[0] == ends[1]
        if not times:
            break
    assert not times


def interrupted(part, which, choice, times, changes):
    """Train, stopped so many times at most, until the end; return how often it was."""
    words = command(part.name, **changes)
    for stopped in range(times + 1):
        with start(2, [*PROGRAM, *words], part.parent) as process:
            told = b""
            for line in process.stdout:
                told += line
                if b"step   " in line:
                    break
            if stopped < times:
                time.sleep(choice.uniform(0.0, 0.2))
                if which == signal.SIGKILL:
                    found = rank_processes(process)
                    # They may have ended.
                    with contextlib.suppress(ProcessLookupError):
                        for number in choice.sample(found, min(len(found), 1)):
                            os.kill(number, which)
                else:
                    process.send_signal(which)
            told += process.communicate(timeout=300)[0]
        if process.returncode == 0 or b"has had its" in told:
            return stopped
        again = "if a rank is lost, go on with: mpirun -n 2 legacy1bit train --resume " + part.name
        assert again.encode() in told, told
        if (part / "training.json").exists():
            words = ["train", "--resume", part.name, "--threads", "1"]
    raise AssertionError(told)


@needs_mpi
def test_a_rank_that_fails_is_named_and_ends_all(tmp_path):
    words = command("run")
    said = run(1, [*PROGRAM, *words], tmp_path, None, [((), [*PROGRAM, *words, "--seed", "2"])])
    assert re.search(
        r"error: rank 1 on \S+ differs from rank 0 in its settings: expected the same", said
    ), said
    assert not (tmp_path / "run").exists()


@needs_mpi
def test_errors_of_all_are_said_once(tmp_path):
    said = run(2, [*PROGRAM, *command("run"), "--data", "nowhere.txt"], tmp_path, 2)
    assert said.count("error:") == 1


@needs_mpi
@pytest.mark.slow
def test_instruction_sets_may_differ_and_are_told(tmp_path):
    words = command("run", precision="float32")
    said = run(
        1, [*PROGRAM, *words], tmp_path, 0, [(["LEGACY1BIT_SIMD=scalar"], [*PROGRAM, *words])]
    )
    if "their instruction sets differ" not in said:
        assert "(scalar" in said
    assert len(Run(tmp_path / "run").metrics()) == 2
