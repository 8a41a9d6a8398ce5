"""A sharded product on this rank: its operands, its call, its price in bytes, its check.

Planned bytes come from the planner, the least from the closed forms below or, on grids of several axes, from the
cheapest of all schedules priced. Both are sums over the ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

import fivedp
from fivedp.bench import operands
from fivedp.bench.cases.gemm import Case
from fivedp.bench.check import Verdict
from fivedp.bench.check import product as check_product
from fivedp.bench.family import Row
from fivedp.bench.measure import digest
from fivedp.bench.pieces import Grid, Matrix, layouts, make, matrix, place
from fivedp.layout.explain import known_as
from fivedp.layout.plan import ItemSizes, Plan, plan_family
from fivedp.layout.schedule import Schedule
from fivedp.layout.spec import ProductSpec, parse_product

Array = NDArray[Any]


class Product:
    """The operands of a case on this rank, its call, and its check."""

    def __init__(self, case: Case, grid: Grid, seed: int) -> None:
        self.case, self.grid, self.seed, self.order = case, grid, seed, case.order
        self.plan = planned(case, grid)
        self.bytes_planned, self.bytes_bound = self.plan.bytes, self.plan.bound
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

    def facts(self) -> Row:
        """The schedule, and the memory of its panels."""
        plan = self.plan
        return {
            "schedule": plan.schedule,
            "schedule_known_as": plan.known_as,
            "memory": {"panels": plan.panels},
        }

    def bits(self) -> bytes:
        """The bits of all results on this rank."""
        return digest(self.c, *(self.gradients or ()))

    def bytes_made(self) -> int:
        """The gradients; C is there before the call."""
        return sum(int(gradient.nbytes) for gradient in self.gradients or ())

    def check(self) -> tuple[str, Row]:
        """Judge C, or the worst of C, dA and dB."""
        verdict = self._verdict(self.grid.comm)
        why = verdict.wrong
        if not why and verdict.same_bits is False:
            why = f'order "{self.order}" promises the bits of one rank here, and they differ'
        found = {"error": verdict.error, "honest_error": verdict.honest, "freivalds": verdict.residual}
        return why, found | {"same_bits": verdict.same_bits}

    def _verdict(self, comm: Any) -> Verdict:
        seed, sizes = self.seed, self.case.sizes
        promised = self.order == "canonical" or 8 % comm.size == 0
        bitwise = self._one_rank if self.order != "fast" and promised and self.c.dtype.kind != "c" else None
        c = matrix(self.c, self.where)
        verdict = check_product(comm, self.matrix_a, self.matrix_b, c, seed, sizes["k"], bitwise)
        if self.gradients is None:
            return verdict
        da, db = self.gradients
        verdicts = [
            verdict,
            check_product(comm, self.matrix_dc, self.matrix_b.T, self._as(da, self.matrix_a), seed, sizes["n"]),
            check_product(
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

    def rival(self, reference: Any, threads: int) -> Callable[[], Any] | None:
        """The product of whole operands on rank 0."""
        case, seed = self.case, self.seed
        if not reference.supports(case.dtype):
            return None
        if self.grid.comm.rank:
            return lambda: None
        dtype = operands.dtype_of(case.dtype)
        rows, m, n, k = case.batch * case.m, case.m, case.n, case.k
        a = operands.block(seed, range(rows), range(k), dtype)
        b = operands.block(seed + 1, range(k), range(n), dtype)
        dc = operands.block(seed + 2, range(rows), range(n), dtype)
        if case.strategy.batched:
            a, dc = a.reshape(-1, m, k), dc.reshape(-1, m, n)
        c = np.empty_like(dc)
        reference.set_threads(threads)

        def call() -> None:
            reference.matmul(a, b, out=c)
            if case.backward:
                reference.matmul_backward(dc, a, b)

        return call

    def sibling(self) -> None:
        """Nothing of ours to alternate with."""


def memory_needed(case: Case, ranks: int) -> float:
    """Bytes of all ranks: shares, and as much again for panels, partial sums and the check."""
    shape, itemsize = case.strategy.mesh_shape(ranks), operands.dtype_of(case.dtype).itemsize
    elements = 0
    for layout in layouts(case.strategy.spec):
        parts = math.prod(shape[axis] for axis in layout.axes)
        elements += math.prod(case.sizes[name] for name in layout.names) * ranks // parts
    return 2.0 * itemsize * elements * (2 if case.backward else 1)


@dataclass(frozen=True)
class Planned:
    """The schedule of a case in words, the bytes it sends, the least that any sends, and its panels' memory.

    `panels` is the largest over the ranks, of the product alone.
    """

    schedule: str
    known_as: str
    bytes: int
    bound: int
    panels: int


def planned(case: Case, grid: Grid) -> Planned:
    """What the planner means to send for `case`, its gradients included, over all ranks."""
    product = parse_product(case.strategy.spec)
    specs = [product, *product.backward()] if case.backward else [product]
    priced = [(spec, plans(spec, case, grid, case.order)) for spec in specs]
    chosen = priced[0][1][0]
    total = sum(of_spec[0].bytes_total for _, of_spec in priced)
    bound = 0
    for spec, of_spec in priced:
        closed = line_bound(spec, case, next(iter(grid.shape.values()))) if len(grid.shape) == 1 else None
        bound += min(p.bytes_total for p in of_spec) if closed is None else closed
    panels = max(Schedule(chosen, rank).buffer_bytes for rank in range(chosen.family.n_ranks))
    return Planned(describe(chosen), known_as(chosen), total, bound, panels)


def _itemsizes(case: Case) -> ItemSizes:
    dtype = operands.dtype_of(case.dtype)
    own = dtype.itemsize
    return ItemSizes(a=own, b=own, c=own, partial=operands.accumulator_of(dtype).itemsize, whole=own)


def plans(spec: ProductSpec, case: Case, grid: Grid, order: str) -> list[Plan]:
    """Every schedule of `spec` for the sizes of `case`, the cheapest in bytes first."""
    axes = tuple(axis for axis in grid.shape if axis in spec.axes)
    family = plan_family(spec, axes, tuple(grid.shape[axis] for axis in axes), order)
    return family.all_plans([case.sizes[name] for name in family.indices], _itemsizes(case))


def describe(plan: Plan) -> str:
    """`m/r n/c: AB`: how the work is cut, and what moves."""
    cut = " ".join(f"{name}/{'*'.join(axes)}" for name, axes in plan.assignment.cuts if axes) or "whole"
    moves = "".join(t for t, n in zip("ABC", (plan.bytes_a, plan.bytes_b, plan.bytes_c), strict=True) if n)
    return f"{cut}: {moves or '-'}"


def line_bound(spec: ProductSpec, case: Case, ranks: int) -> int | None:
    """The least bytes of all ranks for a product on one axis, by closed forms; None where sizes do not divide.

    The axis may cut m, n or k in the computation. An operand that must be whole is all-gathered, (p-1) |X|; one that is
    cut along another index is exchanged, (p-1)/p |X|; C is reduced from partial sums, (p-1) |C| to a cut C, and
    gathered after that to a whole one, or sent by each to each, p (p-1) |C|.
    """
    p, sizes = ranks, case.sizes
    if any(sizes[i.name] % (p * (8 if i.name in spec.k else 1)) for x in (spec.a, spec.b, spec.c) for i in x.indices):
        return None
    item = _itemsizes(case)
    best = None
    for index in spec.batch + spec.m + spec.n + spec.k:
        total = 0
        for layout, itemsize in ((spec.a, item.a), (spec.b, item.b)):
            whole = _volume(layout.names, sizes) * itemsize
            cut = next((i.name for i in layout.indices if i.axes), None)
            if cut is not None and cut != index:
                total += (p - 1) * whole if index not in layout.names else (p - 1) * whole // p
        elements = _volume(spec.c.names, sizes)
        cut = next((i.name for i in spec.c.indices if i.axes), None)
        if index in spec.k:
            # the type on the wire is that of partial sums only where there is more than one
            two_phase = (p - 1) * elements * (item.partial + item.c)
            direct = p * (p - 1) * elements * item.partial
            reduced = (p - 1) * elements * item.partial
            total += reduced if cut is not None else min(two_phase, direct)
        elif cut != index:
            total += (p - 1) * elements * item.c if cut is None else (p - 1) * elements * item.c // p
        best = total if best is None else min(best, total)
    return best


def _volume(names: tuple[str, ...], sizes: dict[str, int]) -> int:
    volume = 1
    for name in names:
        volume *= sizes[name]
    return volume
