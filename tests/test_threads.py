"""The thread pool, seen through what runs on it: the same bits, whatever else happens."""

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import legacy1bit.threads
from helpers.arrays import assert_same_bits, gamma
from helpers.models import every_tier, make_config, model_of, random_model, random_tokens, run_child
from helpers.runs import make, state_of, train
from legacy1bit.backward import BackwardPass
from legacy1bit.forward import forward_llm_batch
from legacy1bit.inference import Decoder
from legacy1bit.math_ops import matmul, product_precisions
from legacy1bit.model import create_legacy_llm, create_legacy_llm_gradients
from legacy1bit.optimizer import Muon
from legacy1bit.packed import PackedMatrix, PackedModel
from legacy1bit.threads import available_cores, default_threads

CONFIG = make_config(model_dim=24)
TOKENS = random_tokens(CONFIG, 6, 16)
A = np.random.default_rng(1).normal(size=(97, 65)).astype(np.float32)
B = np.random.default_rng(2).normal(size=(65, 83)).astype(np.float32)

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
needs_affinity = pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity") or not os.path.isdir("/proc/self/task"),
    reason="needs Linux's affinity",
)


def gradients_of(threads):
    gradients = create_legacy_llm_gradients(CONFIG)
    loss, _ = BackwardPass(model_of(CONFIG), 6, 16, threads).run(TOKENS, TOKENS[:, ::-1], gradients)
    return np.append(gradients.flat, np.float32(loss))


# Each gives the same bits every time it is called with the same number of threads.
WORK = {
    "matmul": lambda threads: matmul(A, B, threads=threads),
    "forward": lambda threads: forward_llm_batch(model_of(CONFIG), TOKENS, threads),
    "backward": gradients_of,
}
works = pytest.mark.parametrize("work", WORK.values(), ids=WORK)


# --- How many cores there are ---------------------------------------------------------------------


def test_default_threads_are_all_cores_or_what_the_environment_says(monkeypatch):
    monkeypatch.delenv("LEGACY1BIT_THREADS", raising=False)
    assert default_threads() == available_cores()
    monkeypatch.setenv("LEGACY1BIT_THREADS", "1")
    assert default_threads() == 1
    monkeypatch.setenv("LEGACY1BIT_THREADS", "100000")
    assert default_threads() == available_cores()


@pytest.mark.parametrize("wanted", ["0", "-1", "two", "1.5", " "])
def test_default_threads_rejects_what_is_no_number(wanted, monkeypatch):
    monkeypatch.setenv("LEGACY1BIT_THREADS", wanted)
    with pytest.raises(ValueError, match=r"LEGACY1BIT_THREADS is .*, expected a whole number"):
        default_threads()


def test_available_cores_is_at_least_one():
    assert 1 <= available_cores() <= os.cpu_count()


def test_available_cores_follows_the_affinity_where_there_is_one(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 5, 7}, raising=False)
    monkeypatch.setattr(legacy1bit.threads, "core_quotas", list)
    assert available_cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert available_cores() == 6
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert available_cores() == 1
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    monkeypatch.setattr(legacy1bit.threads, "core_quotas", lambda: [4, 2])
    assert available_cores() == 2


# --- The same bits --------------------------------------------------------------------------------


@works
@pytest.mark.parametrize("threads", [2, 3, 5, 300])
def test_threaded_work_can_be_repeated(work, threads):
    first = work(threads)
    for _ in range(30):
        assert_same_bits(work(threads), first)


@works
def test_threaded_work_does_not_depend_on_what_ran_before(work):
    # The number of threads in use goes up and down.
    expected = {threads: work(threads) for threads in (1, 2, 4)}
    for threads in (4, 1, 2, 2, 4, 4, 1, 4, 2, 1):
        assert_same_bits(work(threads), expected[threads])


@works
def test_threaded_work_of_several_python_threads_at_once(work):
    # One of them has the pool; the others do their work themselves.
    expected = {threads: work(threads) for threads in (1, 2, 3)}
    start, errors = threading.Barrier(4), []

    def run(threads):
        start.wait()
        try:
            for _ in range(20):
                assert_same_bits(work(threads), expected[threads])
        except BaseException as error:
            errors.append(error)

    together(run, (1, 2, 2, 3))
    assert not errors


def test_different_work_of_several_python_threads_at_once():
    expected = {name: work(2) for name, work in WORK.items()}
    errors = []

    def run(name):
        try:
            for _ in range(20):
                assert_same_bits(WORK[name](2), expected[name], name)
        except BaseException as error:
            errors.append(error)

    together(run, [*WORK, *WORK])
    assert not errors


@pytest.mark.parametrize("precisions", list(itertools.product(product_precisions(), repeat=2)))
def test_two_trainings_in_two_threads_learn_what_each_does_alone(tmp_path, precisions):
    """Each with its own number of threads, settings and precision."""
    settings = (
        {"threads": 1, "seed": 1, "model_dim": 24, "optimizer": "muon"},
        {"threads": 3, "seed": 2, "model_dim": 32, "num_blocks": 2},
    )
    settings = [one | {"precision": name} for one, name in zip(settings, precisions, strict=True)]
    alone, side_by_side = [], [None, None]
    for i, one in enumerate(settings):
        run = make(tmp_path / f"alone {i}", **one)
        alone.append((train(run)[1], state_of(run)))
    start = threading.Barrier(2)

    def learn(i):
        run = make(tmp_path / f"with another {i}", **settings[i])
        start.wait()
        side_by_side[i] = train(run)[1], state_of(run)

    together(learn, range(2))
    for found, expected in zip(side_by_side, alone, strict=True):
        assert found[0] == expected[0]
        for name, value in expected[1].items():
            assert_same_bits(found[1][name], value, name)


def together(run, arguments):
    threads = [threading.Thread(target=run, args=(argument,)) for argument in arguments]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()


# --- Other numbers of threads ---------------------------------------------------------------------


@every_tier
def test_what_has_the_same_bits_for_any_number_of_threads():
    packed = PackedModel(model_of(CONFIG))
    works = (
        WORK["matmul"],
        WORK["forward"],
        lambda threads: Decoder(packed, threads).prefill_logits(TOKENS[0]),
        lambda threads: Decoder(packed, threads).generate([1, 2, 3], np.linspace(0, 0.99, 6)),
    )
    for work in works:
        alone = work(1)
        for threads in (2, 3, 7):
            assert_same_bits(work(threads), alone, f"{threads} threads")


@every_tier
@pytest.mark.parametrize("changes", [{}, {"scheme": "float", "num_blocks": 3}, {"sub_norm": True}])
def test_gradients_of_any_number_of_threads_are_within_the_bound(changes):
    """Each sequence's own gradient is the same; what they are added up to, is rounded otherwise."""
    config, batch, time = make_config(**changes), 13, 16
    tokens, targets = (random_tokens(config, batch, time, seed=seed) for seed in (3, 4))

    def gradient_of(rows, threads=1):
        gradients = create_legacy_llm_gradients(config)
        run = BackwardPass(model_of(config), len(tokens[rows]), time, threads)
        loss, _ = run.run(tokens[rows], targets[rows], gradients, total=tokens.size)
        return loss, gradients.flat.astype(np.float64)

    loss, alone = gradient_of(slice(None))
    size = sum(np.linalg.norm(gradient_of(slice(i, i + 1))[1]) for i in range(batch))
    for threads in (2, 3, 5, 13, 64):
        other_loss, other = gradient_of(slice(None), threads)
        assert np.linalg.norm(other - alone) <= 2 * gamma(batch * time) * size
        # Losses are float64 sums of the same numbers.
        assert abs(other_loss - loss) <= 2.0**-45 * loss


# --- Fork -----------------------------------------------------------------------------------------


def exit_code_of_child(run, seconds=30):
    """Run in a forked child that must end by itself; what it exits with."""
    child = os.fork()
    if child == 0:
        # Nothing of pytest may run on in the child.
        code = 1
        try:
            run()
            code = 0
        finally:
            os._exit(code)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "it hangs"


@needs_fork
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@works
def test_threaded_work_goes_on_in_a_forked_child(work):
    expected = work(3)

    def in_child():
        for _ in range(3):
            assert_same_bits(work(3), expected)

    def in_grandchild():
        in_child()
        assert exit_code_of_child(in_child) == 0
        in_child()

    assert exit_code_of_child(in_child) == 0
    assert exit_code_of_child(in_grandchild) == 0
    assert_same_bits(work(3), expected)


@needs_fork
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_fork_while_another_thread_works():
    expected, stop = matmul(A, B, threads=3), threading.Event()

    def work_on():
        while not stop.is_set():
            matmul(A, B, threads=3)

    worker = threading.Thread(target=work_on)
    worker.start()
    try:
        for _ in range(20):
            code = exit_code_of_child(
                lambda: assert_same_bits(matmul(A, B, threads=3), expected), seconds=10
            )
            assert code == 0
    finally:
        stop.set()
        worker.join()


def learn_and_write(threads=3):
    """A few steps of a training, and tokens of what it has learned: all bits as one array."""
    model = random_model(CONFIG)
    optimizer, run = Muon(model), BackwardPass(model, 6, 16, threads)
    for _ in range(3):
        gradients = create_legacy_llm_gradients(CONFIG)
        run.run(TOKENS, TOKENS[:, ::-1], gradients)
        optimizer.step(gradients, 0.01, 1.0, threads)
    written = Decoder(PackedModel(model), threads).generate([1, 2, 3], np.linspace(0, 0.99, 6))
    weights = [values.ravel() for values in model.latent.values()]
    return np.concatenate([written.astype(np.float32), *weights])


@needs_fork
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
def test_forked_child_trains_and_writes(busy):
    """Whether the pool has run and waits, or runs in another thread at that moment."""
    expected, stop = learn_and_write(), threading.Event()

    def work_on():
        while not stop.is_set():
            learn_and_write()

    others = [threading.Thread(target=work_on) for _ in range(busy)]
    for thread in others:
        thread.start()
    try:
        for _ in range(2):
            code = exit_code_of_child(lambda: assert_same_bits(learn_and_write(), expected))
            assert code == 0
    finally:
        stop.set()
        for thread in others:
            thread.join()
    assert_same_bits(learn_and_write(), expected)


@needs_fork
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_of_multiprocessing_train_and_write(method, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import multiprocessing, sys, warnings\n"
        "from test_threads import learn_and_write\n"
        "if __name__ == '__main__':\n"
        "    warnings.simplefilter('ignore', DeprecationWarning)\n"
        "    here = learn_and_write().tobytes()\n"
        "    with multiprocessing.get_context(sys.argv[1]).Pool(2) as pool:\n"
        "        there = [one.tobytes() for one in pool.map(learn_and_write, [3] * 2)]\n"
        "    print(len(there), all(one == here for one in there))\n"
    )
    folders = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, script, method],
        env={**os.environ, "PYTHONPATH": folders},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["2", "True"]


def test_subprocesses_are_started_while_the_pool_works():
    expected, stop = matmul(A, B, threads=3), threading.Event()

    def work_on():
        while not stop.is_set():
            assert_same_bits(matmul(A, B, threads=3), expected)

    worker = threading.Thread(target=work_on)
    worker.start()
    try:
        for _ in range(10):
            done = subprocess.run(
                [sys.executable, "-Sc", "print(1)"], capture_output=True, timeout=60
            )
            assert done.stdout == b"1\n"
    finally:
        stop.set()
        worker.join()


# --- Signals and the interpreter ------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs a timer")
@pytest.mark.parametrize("threads", [1, 3])
def test_signals_during_a_step_change_nothing(threads):
    expected, seen = learn_and_write(threads), []
    before = signal.signal(signal.SIGALRM, lambda *_: seen.append(1))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
        deadline = time.monotonic() + 60
        while len(seen) < 50 and time.monotonic() < deadline:
            assert_same_bits(learn_and_write(threads), expected)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert len(seen) >= 50


def long_kernels():
    """Calls that compute for a while, each in one go."""
    config = make_config(vocab_size=256, model_dim=192, num_heads=4, sequence_length=128)
    model = create_legacy_llm(config, 1)
    tokens, gradients = random_tokens(config, 4, 128), create_legacy_llm_gradients(config)
    optimizer, packed = Muon(model), PackedModel(model)
    a = np.ones((600, 600), np.float32)
    codes = PackedMatrix(np.ones((600, 600), np.int8))
    run = BackwardPass(model, 4, 128, 2)
    return {
        "matmul": lambda: matmul(a, a, threads=2),
        "forward": lambda: forward_llm_batch(model, tokens, 2),
        "backward": lambda: run.run(tokens, tokens, gradients),
        "step": lambda: optimizer.step(gradients, 0.0, 0.0, 2),
        "decode": lambda: Decoder(packed, 2).prefill(tokens[0]),
        "packed": lambda: codes.multiply(a),
    }


@pytest.mark.parametrize("kernel", ["matmul", "forward", "backward", "step", "decode", "packed"])
def test_other_python_threads_go_on_while_a_kernel_works(kernel):
    """In the slowest instruction set: each call takes some hundredths of a second."""
    former = legacy1bit.math_ops.simd_level()
    legacy1bit.math_ops.set_simd_level("scalar")
    try:
        call = long_kernels()[kernel]
        call()
        inside, ended, turns = threading.Event(), threading.Event(), 0

        def work():
            inside.set()
            call()
            ended.set()

        # One turn may come before the kernel has begun, and one after it, or it is too quick.
        for _ in range(20):
            inside.clear()
            ended.clear()
            worker, turns = threading.Thread(target=work), 0
            worker.start()
            inside.wait()
            while not ended.is_set():
                turns += 1
                time.sleep(0.0005)
            worker.join()
            if turns > 5:
                break
        assert turns > 5
    finally:
        legacy1bit.math_ops.set_simd_level(former)


# --- The process around it ------------------------------------------------------------------------


def affinities():
    """The affinity of every thread of the process; those that have just ended are left out."""
    found = {}
    for task in map(int, os.listdir("/proc/self/task")):
        with contextlib.suppress(ProcessLookupError):
            found[task] = os.sched_getaffinity(task)
    return found


@needs_affinity
def test_threaded_work_leaves_every_affinity():
    before = os.sched_getaffinity(0)
    for _ in range(100):
        matmul(A, B, threads=3)
    after = affinities()
    assert len(after) >= 3
    assert os.sched_getaffinity(0) == before
    assert all(cores == before for cores in after.values())


@needs_affinity
@needs_fork
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_threaded_work_stays_on_the_cores_it_is_given():
    expected, core = matmul(A, B, threads=3), min(os.sched_getaffinity(0))

    def in_child():
        os.sched_setaffinity(0, {core})
        for _ in range(20):
            assert_same_bits(matmul(A, B, threads=3), expected)
        assert all(cores == {core} for cores in affinities().values())

    assert exit_code_of_child(in_child) == 0


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc")
def test_threads_that_end_give_their_memory_back():
    # Each has packing buffers of its own, of the order of a megabyte.
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")

    def run(_):
        matmul(A, B)

    for _ in range(20):
        together(run, [0])
    before = resident()
    for _ in range(200):
        together(run, [0])
    assert resident() - before < 20 << 20


def test_a_process_with_threads_ends():
    printed = run_child(
        "from legacy1bit.math_ops import matmul\n"
        "print(matmul(np.ones((64, 64), 'f4'), np.ones((64, 64), 'f4'), threads=4)[0, 0])\n"
    )
    assert printed == "64.0"


@needs_affinity
def test_workers_leave_signals_to_the_program():
    printed = run_child(
        "import os, threading\n"
        "from legacy1bit.math_ops import matmul\n"
        "matmul(np.ones((64, 64), 'f4'), np.ones((64, 64), 'f4'), threads=4)\n"
        "for task in os.listdir('/proc/self/task'):\n"
        "    lines = open(f'/proc/self/task/{task}/status').read().splitlines()\n"
        "    blocked = int(*(line.split()[1] for line in lines if line.startswith('SigBlk')), 16)\n"
        "    print('main' if int(task) == os.getpid() else 'worker', blocked & 0x4002)\n"
    )
    # SIGINT and SIGTERM; NumPy's own threads do not block them.
    assert printed.count("worker 16386") == 3
    assert "main 0" in printed
