"""One case: make the inputs, count the first call, time the next ones, check the result.

The time of a call is that of the slowest rank, from a barrier; calls shorter than a few milliseconds are timed in
bundles. The median is reported and every sample is kept. The bytes are counted over one call, the memory during the
first. What a case is made of is the business of its trial (`family.py`); nothing here knows one kernel from another.
"""

from __future__ import annotations

import hashlib
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fivedp.bench import account, agree
from fivedp.bench.family import Case, Row, Strategy, Trial
from fivedp.bench.pieces import Grid, open_grid

BUNDLE_SECONDS = 2e-3  # a barrier between oversubscribed ranks costs up to a scheduler's slice
PAIRS = 7  # a ratio is the median of at least so many pairs


@dataclass
class Bench:
    """What all cases of a run share.

    Attributes
    ----------
    peaks : dict
        FLOP/s of all ranks together, by type: the ceiling of the shares.
    seconds : float
        Time to spend on one case after warm-up, between 3 and `repeats` samples.
    reference : fivedp.reference.Reference, optional
        Timed in alternation on rank 0 with `reference_threads` threads while the other ranks sleep.
    kept : dict
        What trials of one kernel keep for the next ones.
    """

    comm: Any
    peaks: dict[str, float]
    seed: int
    repeats: int = 15
    seconds: float = 0.5
    reference: Any = None
    reference_threads: int = 1
    grids: dict[tuple[Any, ...], Grid] = field(default_factory=dict)
    kept: dict[Any, Any] = field(default_factory=dict)

    def grid(self, strategy: Strategy) -> Grid:
        """The mesh of a strategy; opened once, since every mesh holds communicators."""
        shape = tuple(strategy.mesh_shape(self.comm.size).items())
        if shape not in self.grids:
            self.grids[shape] = open_grid(self.comm, strategy)
        return self.grids[shape]


def run(bench: Bench, case: Case) -> Row:
    """Measure `case`. Collective; every rank returns the same row."""
    row: Row = case.record() | {"ranks": bench.comm.size, "wrong": ""}
    why = unfit(bench, case)
    if why:
        return row | {"skipped": why}
    trial = case.open(bench)
    row["mesh"] = trial.grid.text

    memory = account.Memory()
    account.forget_buffers(trial.grid.mesh)
    bench.comm.Barrier()
    memory.start()
    before = account.bytes_sent(trial.grid.mesh)
    trial.run()
    (counted,) = agree.total(bench.comm, float(account.bytes_sent(trial.grid.mesh) - before))
    extra = memory.peak()
    peak = agree.largest(bench.comm, -1.0 if extra is None else max(0.0, float(extra - trial.bytes_made())))[0]
    first = trial.bits()
    once = _sample(bench.comm, trial.run, 1)
    repeatable = agree.everywhere(bench.comm, trial.bits() == first)

    row |= trial.facts()
    row["bytes"] = {"counted": int(counted), "planned": trial.bytes_planned, "bound": trial.bytes_bound}
    row["memory"] = {"peak": None if peak < 0 else int(peak), **row.get("memory", {})}
    row |= timed(bench, case, trial, once)
    row["wrong"], found = trial.check()
    row |= found | {"repeatable": repeatable}
    if not row["wrong"] and not repeatable:
        row["wrong"] = "two calls gave different bits"
    if not row["wrong"] and int(counted) != trial.bytes_planned:
        row["wrong"] = f"sent {int(counted)} bytes where {trial.bytes_planned} were planned"
    return row


def digest(*arrays: NDArray[Any]) -> bytes:
    """A short value that differs where any bit of the arrays does."""
    hashed = hashlib.blake2b()
    for array in arrays:
        if array.size:
            hashed.update(np.ascontiguousarray(array).view(np.uint8).data)
    return hashed.digest()


def unfit(bench: Bench, case: Case) -> str:
    """Why `case` cannot run on these ranks; empty where it can. The same on every rank."""
    try:
        case.strategy.mesh_shape(bench.comm.size)
    except ValueError as error:
        return str(error)
    needed = case.memory_needed(bench.comm.size)
    room = account.available()
    least = -agree.largest(bench.comm, -float(room if room is not None else 2**62))[0]
    if needed > 0.8 * least:
        return f"needs about {needed / 1e9:.0f} GB, {least / 1e9:.0f} GB are free"
    return ""


def timed(bench: Bench, case: Case, trial: Trial, once: float) -> Row:
    """Samples, median, rate and share of the ceiling of a trial; its ratios to what runs in turns with it.

    `once` is about the time of a call: short ones are bundled, and of those beyond 5 s two samples are enough.
    """
    inner = max(1, min(200, round(BUNDLE_SECONDS / max(once, 1e-7))))
    rival = trial.rival(bench.reference, bench.reference_threads) if bench.reference is not None else None
    sibling = trial.sibling()
    if rival is not None:
        rival()
    if sibling is not None:
        sibling[1]()
    fewest = PAIRS if rival is not None or sibling is not None else 2 if once > 5 else 3
    samples: list[float] = []
    speeds: list[float] = []
    prices: list[float] = []
    end = time.perf_counter() + bench.seconds
    while True:
        samples.append(_sample(bench.comm, trial.run, inner))
        if rival is not None:
            speeds.append(_rival_sample(bench.comm, rival, inner) / samples[-1])
        if sibling is not None:
            prices.append(samples[-1] / _sample(bench.comm, sibling[1], inner))
        late = agree.largest(bench.comm, time.perf_counter() - end)[0] > 0
        if len(samples) >= bench.repeats or (late and len(samples) >= fewest):
            break
    median = statistics.median(samples)
    row: Row = {
        "seconds": median,
        "samples": samples,
        "flops": case.flops,
        "gflops": case.flops / median / 1e9,
        "share_of_peak": case.flops / median / bench.peaks[case.dtype],
    }
    if speeds:
        row["reference"] = {
            "name": bench.reference.name,
            "threads": bench.reference_threads,
            **ratio_and_spread(speeds),
        }
    if sibling is not None:
        row[sibling[0]] = ratio_and_spread(prices)
    return row


def ratio_and_spread(ratios: list[float]) -> Row:
    """The median of ratios, and the least and largest of them."""
    return {"ratio": statistics.median(ratios), "spread": [min(ratios), max(ratios)]}


def _sample(comm: Any, call: Callable[[], None], inner: int) -> float:
    comm.Barrier()
    start = time.perf_counter()
    for _ in range(inner):
        call()
    return agree.largest(comm, time.perf_counter() - start)[0] / inner


def _rival_sample(comm: Any, rival: Callable[[], Any], inner: int) -> float:
    """Time of the reference on rank 0; the others sleep until it is done."""
    agree.wait_asleep(comm)
    elapsed = 0.0
    if comm.rank == 0:
        start = time.perf_counter()
        for _ in range(inner):
            rival()
        elapsed = (time.perf_counter() - start) / inner
    agree.wait_asleep(comm)
    return agree.largest(comm, elapsed)[0]
