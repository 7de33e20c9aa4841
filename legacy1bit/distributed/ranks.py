"""The processes that train one model together: this one alone, or the ranks of an MPI job.

All ranks call the same methods in the same order. A process that is alone exchanges nothing, so
that those who call need not know how many ranks there are.
"""

import atexit
import contextlib
import os
import socket
import time
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from legacy1bit.system.errors import INTERRUPTED, describe
from legacy1bit.system.optional import load_extra

_T = TypeVar("_T")
_Array = npt.NDArray[Any]

# How many processes there are, as the launchers say: Open MPI; MPICH, Intel MPI and srun.
_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
# Of srun with PMIx; without the first, what the second says is that of an allocation.
_PMIX = ("PMIX_RANK", "SLURM_NTASKS")

# Elements of each rank's part that are exchanged at a time.
CHUNK = 1 << 20

# Seconds that the first rank has to say what all others may have found, too.
_FIRST_SPEAKS = 2.0


class RankError(ValueError):
    """An error of one rank among several, which is named in the message."""


class Ranks:
    """A process that trains alone: everything that ranks exchange stays as it is.

    Attributes
    ----------
    rank, size : int
        The number of this process, and how many there are.
    host : str
        The machine.
    neighbors : int
        How many ranks are on this machine, this one included.
    seconds : float
        The time in exchanges so far, waiting for other ranks included.
    """

    rank, size, neighbors = 0, 1, 1

    def __init__(self) -> None:
        self.host = socket.gethostname()
        self.seconds = 0.0

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which alone writes and speaks."""
        return self.rank == 0

    def part(self, start: int, stop: int) -> slice:
        """Return which of the numbers from ``start`` up to ``stop`` are this rank's."""
        count = stop - start
        return slice(
            start + count * self.rank // self.size, start + count * (self.rank + 1) // self.size
        )

    def reduce(self, values: _Array, bounds: Sequence[int]) -> None:
        """Add up an array over all ranks, each part of it at the rank that it belongs to.

        The sum of each element is that of rank 0, plus that of rank 1, and so on.

        Parameters
        ----------
        values : float32[N]
            This rank's part becomes the sum; the other parts stay as they are.
        bounds : sequence of int
            Rank r has the elements from ``bounds[r]`` up to ``bounds[r + 1]``.
        """

    def gather(self, values: _Array, bounds: Sequence[int]) -> None:
        """Give every rank the parts of an array that others have; see ``reduce``."""

    @contextlib.contextmanager
    def sharing(self, values: _Array, bounds: Sequence[int]) -> Iterator[None]:
        """Let each rank change its own part of an array, and then give every rank the others."""
        yield
        self.gather(values, bounds)

    def gather_first(self, part: _Array, bounds: Sequence[int]) -> _Array | None:
        """Return the parts of an array behind each other at rank 0, elsewhere None."""
        return part

    def collect(self, value: _T) -> list[_T]:
        """Return the values that the ranks have, in their order, at every rank."""
        return [value]

    def broadcast(self, value: _T) -> _T:
        """Return rank 0's value, at every rank."""
        return value

    def broadcast_array(self, values: _Array) -> None:
        """Copy rank 0's array to every rank."""

    def any(self, flag: bool) -> bool:
        """Return whether a flag is set at any rank."""
        return any(self.collect(flag))

    @contextlib.contextmanager
    def first_alone(self) -> Iterator[None]:
        """Let rank 0 do something, and the others after it, all at once."""
        yield

    def forget(self) -> None:
        """Drop what is carried from one exchange to the next, which no checkpoint has."""

    def threads(self, cores: int) -> int:
        """Return how many of this process's cores are its own: some share theirs."""
        return cores


class MPIRanks(Ranks):
    """The ranks of an MPI job.

    Parameters
    ----------
    mpi : module
        ``mpi4py.MPI``.
    """

    def __init__(self, mpi: Any) -> None:
        super().__init__()
        self._mpi, self._comm = mpi, mpi.COMM_WORLD
        self.rank, self.size = self._comm.Get_rank(), self._comm.Get_size()
        self.neighbors = self._comm.Split_type(mpi.COMM_TYPE_SHARED).Get_size()

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - begin

    def reduce(self, values: _Array, bounds: Sequence[int]) -> None:
        with self._timed():
            first, stop = bounds[self.rank : self.rank + 2]
            sizes = np.diff(bounds)
            count = min(CHUNK, int(sizes.max()))
            received = np.empty((self.size, count), values.dtype)
            places = np.arange(self.size) * count
            for done in range(0, int(sizes.max()), count):
                sent = np.clip(sizes - done, 0, count)
                own = min(max(stop - first - done, 0), count)
                self._comm.Alltoallv(
                    [values, (sent, np.minimum(bounds[:-1] + done * (sent > 0), values.size))],
                    [received, (np.full(self.size, own), places)],
                )
                total = received[0, :own]
                for other in received[1:, :own]:
                    total += other
                values[first + done : first + done + own] = total

    def gather(self, values: _Array, bounds: Sequence[int]) -> None:
        with self._timed():
            layout = (np.diff(bounds), np.asarray(bounds[:-1]))
            self._comm.Allgatherv(self._mpi.IN_PLACE, [values, layout])

    def gather_first(self, part: _Array, bounds: Sequence[int]) -> _Array | None:
        with self._timed():
            whole = np.empty(bounds[-1], part.dtype) if self.is_first else None
            layout = (np.diff(bounds), np.asarray(bounds[:-1]))
            self._comm.Gatherv(part, None if whole is None else [whole, layout])
            return whole

    def collect(self, value: _T) -> list[_T]:
        with self._timed():
            values: list[_T] = self._comm.allgather(value)
            return values

    def broadcast(self, value: _T) -> _T:
        with self._timed():
            first: _T = self._comm.bcast(value)
            return first

    def broadcast_array(self, values: _Array) -> None:
        with self._timed():
            self._comm.Bcast(values)

    @contextlib.contextmanager
    def first_alone(self) -> Iterator[None]:
        if not self.is_first:
            self._comm.Barrier()
        yield
        if self.is_first:
            self._comm.Barrier()

    def threads(self, cores: int) -> int:
        own = (self.host, tuple(sorted(os.sched_getaffinity(0))))
        return max(cores // self.collect(own).count(own), 1)

    def abort_at_exit(self, status: int) -> None:
        """End all ranks when this process ends, which has its error still to say."""
        atexit.register(self._comm.Abort, status)

    def barrier(self) -> None:
        """Return when every rank has called it."""
        self._comm.Barrier()


ALONE = Ranks()


def in_job() -> bool:
    """Return whether this process was started as one of several, by mpirun or srun."""
    sizes = [os.environ.get(name, "") for name in _SIZES]
    if _PMIX[0] in os.environ:
        sizes.append(os.environ.get(_PMIX[1], ""))
    return any(size.isdecimal() and int(size) > 1 for size in sizes)


@contextlib.contextmanager
def joined() -> Iterator[Ranks]:
    """Join the job that this process was started in, if there is one, until its end.

    An error of one rank ends all of them: it names the rank, unless it is the first's.

    Raises
    ------
    ValueError
        If there is a job, and mpi4py is missing.
    """
    if not in_job():
        yield ALONE
        return
    ranks = MPIRanks(load_extra("several ranks need", "mpi4py", "MPI").MPI)
    try:
        yield ranks
        ranks.barrier()
    except (Exception, KeyboardInterrupt, SystemExit) as error:
        status = 2 if isinstance(error, Exception) else INTERRUPTED
        ranks.abort_at_exit(status)
        if ranks.is_first:
            raise
        time.sleep(_FIRST_SPEAKS)
        if isinstance(error, (ValueError, TypeError, IndexError, OSError, MemoryError)):
            raise RankError(f"rank {ranks.rank} on {ranks.host}: {describe(error)}") from error
        raise
