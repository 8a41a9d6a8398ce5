"""One case: make the inputs, count the first call, time the next ones, check the result.

The time of a call is that of the slowest rank, from a barrier; calls shorter than a few milliseconds are timed in
bundles. The median is reported and every sample is kept. The bytes are counted over one call, the memory during the
first. Operands are made from their seeds on the rank that needs them, so a case takes no more memory than its product.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

import fivedp
from fivedp.bench import account, agree, check, operands
from fivedp.bench.cases.gemm import Case
from fivedp.bench.pieces import Grid, Matrix, layouts, make, matrix, open_grid, place
from fivedp.bench.report import Row

BUNDLE_SECONDS = 2e-3  # a barrier between oversubscribed ranks costs up to a scheduler's slice
Array = NDArray[Any]


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
    """

    comm: Any
    peaks: dict[str, float]
    seed: int
    repeats: int = 15
    seconds: float = 0.5
    reference: Any = None
    reference_threads: int = 1
    order: str = "tree"
    grids: dict[tuple[Any, ...], Grid] = field(default_factory=dict)

    def grid(self, case: Case) -> Grid:
        """The mesh of a case; opened once, since every mesh holds communicators."""
        shape = tuple(case.strategy.mesh_shape(self.comm.size).items())
        if shape not in self.grids:
            self.grids[shape] = open_grid(self.comm, case.strategy)
        return self.grids[shape]


def run(bench: Bench, case: Case) -> Row:
    """Measure `case`. Collective; every rank returns the same row."""
    row: Row = {
        "kernel": "gemm",
        "label": case.label,
        "strategy": case.strategy.key,
        "known_as": case.strategy.known_as,
        "spec": case.strategy.spec,
        "shape": case.shape,
        "sizes": case.sizes,
        "dtype": case.dtype,
        "backward": case.backward,
        "scaled_by": case.scaled_by,
        "order": bench.order,
        "wrong": "",
    }
    why = unfit(bench, case)
    if why:
        return row | {"skipped": why}
    grid = bench.grid(case)
    row["mesh"] = grid.text
    product = Product(case, grid, bench.seed, bench.order)
    plan = account.planned(case, grid, bench.order)

    memory = account.Memory()
    account.forget_buffers(grid.mesh)
    bench.comm.Barrier()
    memory.start()
    before = account.bytes_sent(grid.mesh)
    product.run()
    (counted,) = agree.total(bench.comm, float(account.bytes_sent(grid.mesh) - before))
    extra = memory.peak()
    peak = agree.largest(bench.comm, -1.0 if extra is None else float(extra))[0]
    first = product.bits()
    once = _sample(bench.comm, product.run, 1)
    repeatable = agree.everywhere(bench.comm, product.bits() == first)

    row |= {
        "schedule": plan.schedule,
        "schedule_known_as": plan.known_as,
        "bytes": {"counted": int(counted), "planned": plan.bytes, "bound": plan.bound},
        "memory": {"peak": None if peak < 0 else int(peak), "panels": plan.panels},
    }
    row |= timed(bench, case, product.run, once)
    verdict = product.check(bench.comm, bench.seed)
    row |= {"error": verdict.error, "honest_error": verdict.honest, "freivalds": verdict.residual,
            "same_bits": verdict.same_bits, "repeatable": repeatable}  # fmt: skip
    row["wrong"] = verdict.wrong or ("" if repeatable else "two calls gave different bits")
    if not row["wrong"] and verdict.same_bits is False:
        row["wrong"] = f'order "{bench.order}" promises the bits of one rank here, and they differ'
    if not row["wrong"] and int(counted) != plan.bytes:
        row["wrong"] = f"sent {int(counted)} bytes where {plan.bytes} were planned"
    return row


def unfit(bench: Bench, case: Case) -> str:
    """Why `case` cannot run on these ranks; empty where it can. The same on every rank."""
    try:
        case.strategy.mesh_shape(bench.comm.size)
    except ValueError as error:
        return str(error)
    # shares, and as much again for panels, partial sums and the check
    shape, itemsize = case.strategy.mesh_shape(bench.comm.size), operands.dtype_of(case.dtype).itemsize
    elements = 0
    for layout in layouts(case.strategy.spec):
        parts = math.prod(shape[axis] for axis in layout.axes)
        elements += math.prod(case.sizes[name] for name in layout.names) * bench.comm.size // parts
    needed = 2.0 * itemsize * elements * (2 if case.backward else 1)
    room = account.available()
    least = -agree.largest(bench.comm, -float(room if room is not None else 2**62))[0]
    if needed > 0.8 * least:
        return f"needs about {needed / 1e9:.0f} GB, {least / 1e9:.0f} GB are free"
    return ""


class Product:
    """The operands of a case on this rank, its call, and its check."""

    def __init__(self, case: Case, grid: Grid, seed: int, order: str) -> None:
        self.case, self.grid, self.order = case, grid, order
        self.layouts = layouts(case.strategy.spec)
        self.a, self.matrix_a = make(case, self.layouts[0], grid, seed)
        self.b, self.matrix_b = make(case, self.layouts[1], grid, seed + 1)
        self.where = place(self.layouts[2], case.sizes, grid)
        self.c = np.zeros(self.where.shape, self.a.dtype)
        self.c.fill(0)  # touched, so that the output is resident before memory is watched
        self.gradients: tuple[Array, Array] | None = None
        if case.backward:
            self.dc, self.matrix_dc = make(case, self.layouts[2], grid, seed + 2)

    def run(self) -> None:
        """One call, with its gradients where the case has them."""
        spec, mesh = self.case.strategy.spec, self.grid.mesh
        fivedp.sharded_matmul(self.a, self.b, spec, mesh, out=self.c, order=self.order)
        if self.case.backward:
            self.gradients = fivedp.sharded_matmul_backward(self.dc, self.a, self.b, spec, mesh)

    def bits(self) -> bytes:
        """The bits of all results on this rank."""
        import hashlib

        digest = hashlib.blake2b(self.c.view(np.uint8).data if self.c.size else b"")
        for gradient in self.gradients or ():
            digest.update(np.ascontiguousarray(gradient).tobytes())
        return digest.digest()

    def check(self, comm: Any, seed: int) -> check.Verdict:
        """The verdict on C, or the worst of those on C, dA and dB."""
        sizes = self.case.sizes
        promised = self.order == "canonical" or 8 % comm.size == 0
        bitwise = self._one_rank if self.order != "fast" and promised and self.c.dtype.kind != "c" else None
        c = matrix(self.c, self.where)
        verdict = check.product(comm, self.matrix_a, self.matrix_b, c, seed, sizes["k"], bitwise)
        if self.gradients is None:
            return verdict
        da, db = self.gradients
        verdicts = [
            verdict,
            check.product(comm, self.matrix_dc, self.matrix_b.T, self._as(da, self.matrix_a), seed, sizes["n"]),
            check.product(
                comm, self.matrix_a.T, self.matrix_dc, self._as(db, self.matrix_b), seed, sizes["m"] * sizes.get("b", 1)
            ),
        ]
        return next((v for v in verdicts if v.wrong), verdict)

    @staticmethod
    def _as(result: Array, like: Matrix) -> Matrix:
        """A gradient, laid out as the operand `like` is."""
        return Matrix(result.reshape(like.data.shape), like.rows, like.columns, like.counts)

    def _one_rank(self, a: Array, b: Array) -> Array:
        """The product of two matrices on one rank in the same order of sums."""
        from mpi4py import MPI

        c: Array = fivedp.sharded_matmul(a, b, "m k, k n -> m n", MPI.COMM_SELF, order=self.order)
        return c


def timed(bench: Bench, case: Case, call: Callable[[], None], once: float) -> Row:
    """Samples, median, rate and share of the ceiling of `call`; the ratio to the reference where one is given.

    `once` is about the time of a call: short ones are bundled, and of those beyond 5 s two samples are enough.
    """
    inner = max(1, min(200, round(BUNDLE_SECONDS / max(once, 1e-7))))
    fewest = 2 if once > 5 else 3
    rival = _rival(bench, case)
    samples, ratios = [], []
    end = time.perf_counter() + bench.seconds
    while True:
        samples.append(_sample(bench.comm, call, inner))
        if rival is not None:
            ratios.append(_rival_sample(bench.comm, rival, inner) / samples[-1])
        late = agree.largest(bench.comm, time.perf_counter() - end)[0] > 0
        enough = len(samples) >= (7 if rival is not None else fewest)
        if len(samples) >= bench.repeats or (late and enough):
            break
    median = statistics.median(samples)
    row: Row = {
        "seconds": median,
        "samples": samples,
        "flops": case.flops,
        "gflops": case.flops / median / 1e9,
        "share_of_peak": case.flops / median / bench.peaks[case.dtype],
    }
    if ratios:
        row["reference"] = {
            "name": bench.reference.name,
            "threads": bench.reference_threads,
            "ratio": statistics.median(ratios),
            "spread": [min(ratios), max(ratios)],
        }
    return row


def _sample(comm: Any, call: Callable[[], None], inner: int) -> float:
    comm.Barrier()
    start = time.perf_counter()
    for _ in range(inner):
        call()
    return agree.largest(comm, time.perf_counter() - start)[0] / inner


def _rival(bench: Bench, case: Case) -> Callable[[], Any] | None:
    """The reference's call on whole operands: real on rank 0, nothing elsewhere; None where it has no such product."""
    reference = bench.reference
    if reference is None or not reference.supports(case.dtype):
        return None
    if bench.comm.rank:
        return lambda: None
    dtype = operands.dtype_of(case.dtype)
    rows, m, n, k = case.batch * case.m, case.m, case.n, case.k
    a = operands.block(bench.seed, range(rows), range(k), dtype)
    b = operands.block(bench.seed + 1, range(k), range(n), dtype)
    dc = operands.block(bench.seed + 2, range(rows), range(n), dtype)
    if case.strategy.batched:
        a, dc = a.reshape(-1, m, k), dc.reshape(-1, m, n)
    c = np.empty_like(dc)
    reference.set_threads(bench.reference_threads)

    def call() -> None:
        reference.matmul(a, b, out=c)
        if case.backward:
            reference.matmul_backward(dc, a, b)

    call()
    return call


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
