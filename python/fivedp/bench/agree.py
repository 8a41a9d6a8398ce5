"""Small facts between ranks, as buffers: the largest of a number, its sum, a record from every rank.

Benchmarks send these between timed parts only. Nothing is pickled: numbers travel as float64, records as JSON. On one
rank nothing is sent, and MPI is not even loaded.
"""

from __future__ import annotations

import itertools
import json
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray


def largest(comm: Any, *values: float) -> tuple[float, ...]:
    """The largest of each value over the ranks. Collective."""
    mine = np.array(values, dtype=np.float64)
    if comm.size > 1:
        from mpi4py import MPI

        comm.Allreduce(MPI.IN_PLACE, mine, MPI.MAX)
    return tuple(mine.tolist())


def total(comm: Any, *values: float) -> tuple[float, ...]:
    """The sum of each value over the ranks. Collective."""
    mine = np.array(values, dtype=np.float64)
    add_up(comm, mine)
    return tuple(mine.tolist())


def add_up(comm: Any, array: NDArray[Any]) -> None:
    """Replace `array` by its sum over the ranks. Collective."""
    if comm.size > 1:
        from mpi4py import MPI

        comm.Allreduce(MPI.IN_PLACE, array, MPI.SUM)


def everywhere(comm: Any, truth: bool) -> bool:
    """Whether `truth` holds on all ranks. Collective."""
    return largest(comm, 0.0 if truth else 1.0)[0] == 0.0


def collect(comm: Any, record: Any) -> list[Any]:
    """Every rank's `record` (anything JSON can say) as a list on every rank. Collective."""
    if comm.size == 1:
        return [json.loads(json.dumps(record))]
    from mpi4py import MPI

    mine = np.frombuffer(json.dumps(record).encode(), dtype=np.uint8)
    lengths = np.zeros(comm.size, dtype=np.int64)
    comm.Allgather(np.array([mine.size], dtype=np.int64), lengths)
    texts = np.empty(int(lengths.sum()), dtype=np.uint8)
    starts = np.concatenate(([0], np.cumsum(lengths)))
    comm.Allgatherv(mine, [texts, lengths, starts[:-1], MPI.BYTE])
    return [json.loads(texts[a:b].tobytes()) for a, b in itertools.pairwise(starts)]


def wait_asleep(comm: Any, pause: float = 1e-3) -> None:
    """A barrier whose waiters sleep, so that the last rank to come has the cores to itself. Collective."""
    if comm.size == 1:
        return
    request = comm.Ibarrier()
    while not request.Test():
        time.sleep(pause)
