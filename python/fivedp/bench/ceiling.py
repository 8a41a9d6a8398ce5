"""The rates that shares are quoted of, measured before any share of them is quoted.

Arithmetic: sums of products in registers, which load and store nothing, on one core and on all ranks at once, for each
type. Should a product be faster, ours or NumPy's with operands in the caches, then that. Memory: copying arrays larger
than the caches.
Messages: MPI ping-pong between rank 0 and the last rank. All of it takes about three seconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from fivedp.bench import agree, operands

CACHED = 384  # three 384^2 float32 matrices are 1.7 MB: near the core, yet long enough to fill the pipes
LARGE = 1024  # a large product reuses its panels more, and on many cores runs closer to the peak
IN_REGISTERS = 100_000  # rounds: about a millisecond
ROUNDS = 3
COPY_BYTES = 1 << 26
MESSAGE_BYTES = 1 << 22


def measure(comm: Any, dtypes: list[str], threads: int, seconds: float = 2.5) -> dict[str, Any]:
    """Ceilings of this machine for the ranks of `comm`. Collective; the same record on every rank.

    Returns
    -------
    dict
        `flops`: per type `one_core` and `all` in FLOP/s; `copy` in bytes read plus written per second, all ranks
        together; `pingpong` with `bandwidth` (bytes/s, one direction) and `latency` (s), absent on one rank.
    """
    from fivedp.kernels import gemm

    share = seconds / (2 * len(dtypes) + 2)
    flops = {}
    for name in dtypes:
        gemm.set_threads(1)
        one = agree.largest(comm, _alone(comm, name, share))[0]
        gemm.set_threads(threads)
        every = max(one, _together(comm, name, share))
        flops[name] = {"one_core": one, "all": every}
    record: dict[str, Any] = {"flops": flops, "copy": _copy(comm, share)}
    if comm.size > 1:
        record["pingpong"] = _pingpong(comm)
    return record


def peak(record: dict[str, Any], dtype: str) -> float:
    """FLOP/s of all ranks together for `dtype`."""
    return float(record["flops"][dtype]["all"])


def _contestants(name: str, size: int) -> list[Callable[[], float]]:
    """What competes for the peak of type `name`; each says how many operations it has done."""
    from fivedp.kernels import gemm

    dtype = operands.dtype_of(name)
    a = operands.block(1, range(size), range(size), dtype)
    b = operands.block(2, range(size), range(size), dtype)
    c = np.zeros((size, size), dtype)

    def product(multiply: Callable[[], Any]) -> float:
        multiply()
        return (8.0 if dtype.kind == "c" else 2.0) * size**3

    found = [lambda: product(lambda: np.matmul(a, b, out=c))] if dtype.itemsize >= 4 else []
    if dtype.kind != "c":
        found.append(lambda: product(lambda: gemm.gemm(a, b, c)))
    if dtype.kind != "c" and size == CACHED:  # has no size
        found.append(lambda: gemm.multiply_adds(dtype, IN_REGISTERS))
    return found


def _best_rate(contestant: Callable[[], float], seconds: float) -> float:
    """Of the repetitions that fit into `seconds` the fastest, as operations per second."""
    contestant()
    best, end = 0.0, time.perf_counter() + seconds
    while True:
        start = time.perf_counter()
        work = contestant()
        stop = time.perf_counter()
        best = max(best, work / (stop - start))
        if stop > end:
            return best


def _alone(comm: Any, name: str, seconds: float) -> float:
    """Peak of one core: rank 0 computes, the others sleep."""
    from threadpoolctl import threadpool_limits

    rate = 0.0
    if comm.rank == 0:
        with threadpool_limits(1, "blas"):
            contestants = _contestants(name, CACHED)
            rate = max(_best_rate(contestant, seconds / len(contestants)) for contestant in contestants)
    agree.wait_asleep(comm)
    return rate


def in_registers(comm: Any, name: str) -> float:
    """FLOP/s of all ranks at once where nothing is loaded or stored: what products come near. Collective.

    Takes a third of a second: ranks that have just been woken may share a core for some of it.
    """
    from fivedp.kernels import gemm

    dtype = operands.dtype_of(name)
    return _at_once(comm, lambda: gemm.multiply_adds(dtype, IN_REGISTERS), 0.03, rounds=11)


def _together(comm: Any, name: str, seconds: float) -> float:
    """Peak of all ranks at once."""
    contestants = [contestant for size in (CACHED, LARGE) for contestant in _contestants(name, size)]
    return max(_at_once(comm, contestant, seconds / (4 * ROUNDS)) for contestant in contestants)


def _at_once(comm: Any, contestant: Callable[[], float], seconds: float, rounds: int = ROUNDS) -> float:
    """The best round of all ranks: the work that all finish over the slowest's time, as operations per second."""
    best = 0.0
    contestant()
    for _ in range(rounds):
        done = 0.0
        comm.Barrier()
        start = time.perf_counter()
        while done == 0 or time.perf_counter() - start < seconds:
            done += contestant()
        (slowest,) = agree.largest(comm, time.perf_counter() - start)
        (work,) = agree.total(comm, done)
        best = max(best, work / slowest)
    return best


def _copy(comm: Any, seconds: float) -> float:
    """Bytes read and written per second by all ranks together, from memory to memory."""
    source = np.ones(max(1 << 23, COPY_BYTES // comm.size) // 8)
    target = np.zeros_like(source)
    np.copyto(target, source)
    comm.Barrier()
    rounds, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        np.copyto(target, source)
        rounds += 1
    (slowest,) = agree.largest(comm, time.perf_counter() - start)
    (moved,) = agree.total(comm, 2.0 * rounds * source.nbytes)
    return moved / slowest


def _pingpong(comm: Any) -> dict[str, float]:
    """Bandwidth and latency between rank 0 and the last rank, the others asleep."""
    last = comm.size - 1
    buffer = np.zeros(MESSAGE_BYTES, np.uint8)
    times = {}
    for size, rounds in ((1, 200), (MESSAGE_BYTES, 12)):
        part = buffer[:size]
        best = float("inf")
        if comm.rank in (0, last):
            for attempt in range(rounds + 2):
                start = time.perf_counter()
                if comm.rank == 0:
                    comm.Send(part, dest=last)
                    comm.Recv(part, source=last)
                else:
                    comm.Recv(part, source=0)
                    comm.Send(part, dest=0)
                if attempt > 1:
                    best = min(best, time.perf_counter() - start)
        agree.wait_asleep(comm)
        times[size] = -agree.largest(comm, -best)[0] / 2
    return {"bandwidth": MESSAGE_BYTES / times[MESSAGE_BYTES], "latency": times[1]}
