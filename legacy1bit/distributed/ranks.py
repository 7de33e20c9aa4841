"""The processes that train one model together: this one alone, or the ranks of an MPI job.

All ranks call the same methods in the same order. A process that is alone exchanges nothing, so
that those who call need not know how many ranks there are.
"""

import atexit
import contextlib
import itertools
import os
import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from legacy1bit.distributed.compression import add_decoded, coded_bytes, encode
from legacy1bit.system.errors import INTERRUPTED, describe
from legacy1bit.system.optional import load_extra

_T = TypeVar("_T")
_Array = npt.NDArray[Any]
Bounds = npt.NDArray[np.int64]

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

    def reduce(self, values: _Array, bounds: Bounds) -> None:
        """Add up an array over all ranks, each part of it at the rank that it belongs to.

        The sum of each element is that of rank 0, plus that of rank 1, and so on.

        Parameters
        ----------
        values : float32[N]
            This rank's part becomes the sum; the other parts stay as they are.
        bounds : int64[ranks + 1]
            Rank r has the elements from ``bounds[r]`` up to ``bounds[r + 1]``.
        """

    def gather(self, values: _Array, bounds: Bounds) -> None:
        """Give every rank the parts of an array that others have; see ``reduce``."""

    @contextlib.contextmanager
    def sharing(self, values: _Array, bounds: Bounds) -> Iterator[None]:
        """Let each rank change its own part of an array, and then give every rank the others."""
        yield
        self.gather(values, bounds)

    def gather_first(self, part: _Array, bounds: Bounds) -> _Array | None:
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

    def compressed(self, bits: int, threads: int) -> "Ranks":
        """Return the same ranks, which exchange sums in so many bits, and changes in eight."""
        return self

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

    def reduce(self, values: _Array, bounds: Bounds) -> None:
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

    def gather(self, values: _Array, bounds: Bounds) -> None:
        with self._timed():
            layout = (np.diff(bounds), np.asarray(bounds[:-1]))
            self._comm.Allgatherv(self._mpi.IN_PLACE, [values, layout])

    def gather_first(self, part: _Array, bounds: Bounds) -> _Array | None:
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

    def compressed(self, bits: int, threads: int) -> Ranks:
        return CompressedRanks(self._mpi, bits, threads)

    def threads(self, cores: int) -> int:
        own = (self.host, tuple(sorted(os.sched_getaffinity(0))))
        return max(cores // self.collect(own).count(own), 1)

    def abort_at_exit(self, status: int) -> None:
        """End all ranks when this process ends, which has its error still to say."""
        atexit.register(self._comm.Abort, status)

    def barrier(self) -> None:
        """Return when every rank has called it."""
        self._comm.Barrier()


# Bits of what ``sharing`` sends.
_CHANGE_BITS = 8


class CompressedRanks(MPIRanks):
    """Ranks that round what they exchange, and add what that leaves out the next time.

    ``sharing`` sends the changes of the weights, so that all ranks, the sender included, have the
    same ones.

    Parameters
    ----------
    mpi : module
        ``mpi4py.MPI``.
    bits : {8, 1}
        Of the numbers that ``reduce`` adds up.
    threads : int
        Those that make codes.
    """

    def __init__(self, mpi: Any, bits: int, threads: int) -> None:
        super().__init__(mpi)
        self._bits, self._threads = bits, threads
        self.forget()

    def forget(self) -> None:
        self._rest = self._rest_of_changes = np.zeros(0, np.float32)

    def reduce(self, values: _Array, bounds: Bounds) -> None:
        if self._rest.size != values.size:
            self._rest = np.zeros(values.size, np.float32)
        parts = [slice(*pair) for pair in pairwise(bounds)]
        sizes = [coded_bytes(part.stop - part.start, self._bits) for part in parts]
        sent = _segments(0 if rank == self.rank else size for rank, size in enumerate(sizes))
        for rank, part in enumerate(parts):
            if rank != self.rank:
                encode(values[part], self._rest[part], self._bits, sent[rank], self._threads)
        received = _segments(
            0 if rank == self.rank else sizes[self.rank] for rank in range(self.size)
        )
        with self._timed():
            self._comm.Alltoallv(_message(sent), _message(received))
        own = values[parts[self.rank]]
        total = np.zeros_like(own)
        for rank, code in enumerate(received):
            if rank == self.rank:
                total += own
            else:
                add_decoded(code, self._bits, total, self._threads)
        own[...] = total

    @contextlib.contextmanager
    def sharing(self, values: _Array, bounds: Bounds) -> Iterator[None]:
        parts = [slice(*pair) for pair in pairwise(bounds)]
        own = values[parts[self.rank]]
        if self._rest_of_changes.size != own.size:
            self._rest_of_changes = np.zeros(own.size, np.float32)
        before = own.copy()
        yield
        codes = _segments(coded_bytes(part.stop - part.start, _CHANGE_BITS) for part in parts)
        rest, code = self._rest_of_changes, codes[self.rank]
        encode(own - before, rest, _CHANGE_BITS, code, self._threads)
        own[...] = before
        with self._timed():
            self._comm.Allgatherv(self._mpi.IN_PLACE, _message(codes))
        for part, code in zip(parts, codes, strict=True):
            add_decoded(code, _CHANGE_BITS, values[part], self._threads)


def _segments(sizes: Iterable[int]) -> list[npt.NDArray[np.uint8]]:
    """Return consecutive pieces of one array of bytes."""
    bounds = [0, *itertools.accumulate(sizes)]
    whole = np.zeros(bounds[-1], np.uint8)
    return [whole[start:stop] for start, stop in pairwise(bounds)]


def _message(segments: Sequence[npt.NDArray[np.uint8]]) -> list[Any]:
    """Return such pieces as mpi4py takes them: the whole, and the sizes."""
    whole = segments[0].base
    return [whole, [segment.size for segment in segments]]


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
