"""The model of a step's time on several ranks."""

import numpy as np
import pytest

from benchmarks.cluster import RANKS, TOKENS, Machine, fitted, main

MACHINE = Machine(1e11, 1e-8, 1e-9, 1e-9, 1e-4, 1e8)


def test_latency_and_bandwidth_are_found_again():
    sizes = np.array([1e3, 1e5, 1e7])
    latency, bandwidth = fitted(sizes, 2e-4 + sizes / 5e7)
    assert (latency, bandwidth) == (pytest.approx(2e-4), pytest.approx(5e7))


def test_a_step_is_the_sum_of_its_parts():
    # 6 * 1e7 * 1e4 operations in 6 s, 0.1 s of updates, 0.01 s of quantization.
    assert MACHINE.step(10**7, 10**4, 1) == (pytest.approx(6.11), 0.0)
    # Half of the batch and of the updates; half of 8 bytes for each weight.
    computing, exchanging = MACHINE.step(10**7, 10**4, 2)
    assert (computing, exchanging) == (pytest.approx(3.06), pytest.approx(0.4002))
    compressed = MACHINE.step(10**7, 10**4, 2, "8bit")[1]
    assert compressed == pytest.approx(0.0002 + 2.03125 * 0.05 + 0.02)
    # Local steps exchange in one of ten steps, and do all updates at each rank.
    computing, exchanging = MACHINE.step(10**7, 10**4, 2, local=10)
    assert (computing, exchanging) == (pytest.approx(3.11), pytest.approx(0.04002))


def test_predictions_have_a_row_for_each_model_network_and_exchange(capsys):
    main(["predict"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(TOKENS) * 3 * 4
    assert all(line.count("|") == len(RANKS) + 4 for line in lines)
