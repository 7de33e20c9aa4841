"""What ranks exchange, against NumPy: run by mpirun, and fails where a rank finds a fault."""

import numpy as np

from legacy1bit.distributed import ranks as module
from legacy1bit.distributed.ranks import joined
from legacy1bit.training.local_steps import LocalSteps


def arrays(ranks, size):
    """Every rank's array, the same at all of them."""
    rng = np.random.default_rng(size)
    return [rng.normal(size=size).astype(np.float32) for _ in range(ranks.size)]


def check_sums(ranks, size, bounds):
    every = arrays(ranks, size)
    expected = every[0].copy()
    for other in every[1:]:
        expected += other
    own = slice(bounds[ranks.rank], bounds[ranks.rank + 1])
    values = every[ranks.rank].copy()
    ranks.reduce(values, bounds)
    np.testing.assert_array_equal(values[own], expected[own])
    ranks.gather(values, bounds)
    np.testing.assert_array_equal(values, expected)
    whole = ranks.gather_first(values[own], bounds)
    if ranks.is_first:
        np.testing.assert_array_equal(whole, expected)
    else:
        assert whole is None


def check_compressed(ranks, bits, size, bounds):
    ranks, every = ranks.compressed(bits, 2), arrays(ranks, size)
    own = slice(bounds[ranks.rank], bounds[ranks.rank + 1])
    expected, total = np.sum(every, axis=0), np.zeros(size)
    steps = 200 if bits == 8 else 1000
    for _ in range(steps):
        values = every[ranks.rank].copy()
        ranks.reduce(values, bounds)
        total[own] += values[own]
    # What is left out does not add up: its share of the sum becomes small.
    error = np.abs(total[own] / steps - expected[own]).max(initial=0.0)
    assert error < (0.001 if bits == 8 else 0.5), (bits, error)
    # Changes of weights: the same bits at every rank, and in the end what was meant.
    weights, meant = np.zeros(size, np.float32), np.zeros(size)
    for _ in range(20):
        with ranks.sharing(weights, bounds):
            weights[own] += every[0][own]
        meant += every[0]
        for other in ranks.collect(weights):
            np.testing.assert_array_equal(weights, other)
    np.testing.assert_allclose(weights, meant, rtol=0, atol=0.05)


def check_local_steps(ranks, size):
    start = np.linspace(-1.0, 1.0, size).astype(np.float32)
    weights = start.copy()
    local, velocity, exact = LocalSteps(weights, ranks), np.zeros(size), start.astype(float)
    for step in range(4):
        changes = [np.sin(np.arange(size) + 3 * rank + step) for rank in range(ranks.size)]
        weights += changes[ranks.rank].astype(np.float32)
        local.synchronize()
        gradient = -np.mean(changes, axis=0)
        velocity = 0.5 * velocity + gradient
        exact -= 0.7 * (gradient + 0.5 * velocity)
        np.testing.assert_allclose(weights, exact, rtol=0, atol=1e-5)
    moments = {"first": np.full(3, ranks.rank, np.float32)}
    gathered = local.gather_moments(moments)
    np.testing.assert_array_equal(moments["first"], np.zeros(3))
    if ranks.is_first:
        np.testing.assert_allclose(gathered["outer"], velocity, rtol=0, atol=1e-5)
        other = LocalSteps(weights, ranks)
    gathered = ranks.broadcast(gathered)
    other = LocalSteps(weights, ranks)
    other.load_moments(gathered)
    np.testing.assert_array_equal(other._velocity, local._velocity)


def main():
    with joined() as ranks:
        assert ranks.collect(ranks.rank) == list(range(ranks.size))
        assert ranks.broadcast(ranks.rank) == 0
        assert ranks.any(ranks.rank == ranks.size - 1)
        assert not ranks.any(False)
        pieces = [ranks.part(3, 3 + ranks.size + 1)]
        numbers = [n for piece in ranks.collect(pieces[0]) for n in range(piece.start, piece.stop)]
        assert numbers == list(range(3, 3 + ranks.size + 1))
        module.CHUNK = 100
        for size in (1, 5, 99, 1000):
            even = [size * rank // ranks.size for rank in range(ranks.size + 1)]
            # A rank may have nothing, and another one all.
            uneven = [0, *(0 for _ in range(ranks.size - 1)), size]
            for bounds in (even, uneven):
                check_sums(ranks, size, np.array(bounds, np.int64))
                for bits in (8, 1) if size in (5, 1000) else ():
                    check_compressed(ranks, bits, size, np.array(bounds, np.int64))
            check_local_steps(ranks, size)
        order = []
        with ranks.first_alone():
            order.append(ranks.rank)
        print(f"rank {ranks.rank} is right", flush=True)


main()
