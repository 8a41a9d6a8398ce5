"""Bytes and memory: what a product was to send, what it sent, and what it needed besides its operands.

Planned bytes come from the planner, counted ones from the counters of the communication layer, the least from the
closed forms below or, on grids of several axes, from the cheapest of all schedules priced. All are sums over the ranks.
Memory is the peak of the resident set during the first call above what was resident before it; inputs and output are
resident by then, and the buffers of earlier calls have been dropped. The kernels' own scratch is kept by its threads
and counts where it is first used.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fivedp.bench import operands
from fivedp.bench.cases.gemm import Case
from fivedp.bench.pieces import Grid
from fivedp.layout.explain import known_as
from fivedp.layout.plan import ItemSizes, Plan, plan_family
from fivedp.layout.schedule import Schedule
from fivedp.layout.spec import ProductSpec, parse_product


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


def planned(case: Case, grid: Grid, order: str = "tree") -> Planned:
    """What the planner means to send for `case`, its gradients included, over all ranks."""
    product = parse_product(case.strategy.spec)
    specs = [product, *product.backward()] if case.backward else [product]
    priced = [(spec, plans(spec, case, grid, order)) for spec in specs]
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


def bytes_sent(mesh: Any) -> int:
    """Payload bytes that this rank has sent over `mesh` so far."""
    from fivedp.comm.grid import grid_of

    return int(grid_of(mesh).traffic.bytes_sent)


class Memory:
    """The peak of this process's memory between `start` and `peak`; Linux only, None elsewhere."""

    def start(self) -> None:
        """Set the peak back to what is resident now."""
        self._known = False
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
            self._known = True
        self._before = _status("VmRSS")

    def peak(self) -> int | None:
        """Bytes above those at `start`."""
        after = _status("VmHWM")
        if not self._known or after is None or self._before is None:
            return None
        return max(0, after - self._before)


def forget_buffers(mesh: Any) -> None:
    """Drop the buffers that earlier calls left behind, so that the next call's memory is its own."""
    from fivedp.comm.grid import grid_of

    vars(grid_of(mesh)).pop("buffer_pool", None)
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # glibc keeps freed memory resident, and would hand it out again unseen


def _status(field: str) -> int | None:
    """A line of /proc/self/status in bytes."""
    with contextlib.suppress(OSError):
        if found := re.search(rf"^{field}:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.M):
            return 1024 * int(found[1])
    return None


def available() -> int | None:
    """Bytes of memory this node can still give."""
    with contextlib.suppress(OSError):
        if found := re.search(r"^MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text(), re.M):
            return 1024 * int(found[1])
    return None
