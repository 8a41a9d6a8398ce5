"""Products of the rows that have come, while others still travel.

Rows are ordered by expert, then by the rank that sent them, so those of one sender are a few runs, one in each expert,
and a product of a run writes the elements that the product of the whole group would write, with the same bits. Who
sends rows as messages also waits for sums to come back, so its rows are taken first. Those that lie near (this rank's
own, and those that it reads in place) are for the time while nothing has come yet, or while the last sums travel.

When this happens is each rank's own choice: neither its messages nor its results depend on it. Rows that came through
gateways are taken as a whole: a gateway passes them on when it comes to read its own. So are those of CuPy arrays,
whose kernels for all experts are launched at once, and all where there are copies of hot experts, whose products are
for the time in which sums travel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from fivedp.ops.expert_dispatch import Dispatched, in_type
from fivedp.ops.work_sharing import Job, SharedWork, Work

# Each call packs the weights again. So rows are taken apart only where what is taken and what is left are this many for
# each expert, on average; the products of parts of that size take about a tenth longer than that of the whole.
ENOUGH_ROWS = 128


def run_as_rows_come(
    work: SharedWork, name: str, travel: Dispatched, phases: Sequence[Work], finished: Callable[[list[int]], None]
) -> None:
    """Carry out the first phases of this rank's job, for rows of some sources before those of others where that pays.

    Parameters
    ----------
    work : SharedWork
    name : str
        What the phases call the rows.
    travel : Dispatched
    phases : sequence of Work
        Each of which makes a row of its results from the same row of others.
    finished : callable
        Given the sources whose rows have gone through all phases, as soon as they have.
    """
    size = travel.plan.group.size
    plan = travel.plan
    at_once = bool(work.owners) or plan.relay is not None or plan.copies is not None or plan.on_device
    for sources in [list(range(size))] if at_once else _batches(travel):
        if len(sources) == size:
            work.own.rows[name] = in_type(travel.rows(), travel.plan)
            for number, phase in enumerate(phases):
                work.run(number, phase)
        else:
            for job in _runs(work, name, travel, sources):
                for phase in phases:
                    phase(job, None)
        finished(sources)


def _batches(travel: Dispatched) -> Iterator[list[int]]:
    """All sources, in one batch or several; when a batch is given, its rows are here."""
    incoming = travel.plan.incoming
    rows = np.bincount(incoming.source, minlength=travel.plan.group.size)
    enough = max(1, ENOUGH_ROWS * int(np.count_nonzero(incoming.counts)))
    left, near, far = int(rows.sum()), list(travel.near), [s for s in range(len(rows)) if s not in travel.near]
    travel.wait(near)

    def pays(sources: list[int]) -> bool:
        return bool(enough <= rows[sources].sum() <= left - enough)

    come: list[int] = []
    while far:
        found = travel.arrived()
        if not found and not pays(come) and not pays(near):
            found = travel.arrived(least=1)
        come, far = come + found, [source for source in far if source not in found]
        if pays(come):
            batch, come = come, []
        elif far and pays(near):
            batch, near = near, []
        else:
            continue
        yield sorted(batch)
        left -= int(rows[batch].sum())
    yield sorted(come + near)


def _runs(work: SharedWork, name: str, travel: Dispatched, sources: list[int]) -> Iterator[Job]:
    """The rows of some sources in every expert, as jobs of rows that lie one behind the other."""
    plan, incoming = travel.plan, travel.plan.incoming
    size, n_experts = plan.group.size, len(incoming.counts)
    place = np.repeat(np.arange(n_experts), incoming.counts) * size + incoming.source
    borders = np.zeros(n_experts * size + 1, np.int64)
    np.cumsum(np.bincount(place, minlength=n_experts * size), out=borders[1:])
    for expert in range(n_experts):
        for first, last in _consecutive(sources):
            begin, end = (int(borders[expert * size + source]) for source in (first, last + 1))
            if begin < end:
                yield work.part(expert, slice(begin, end), {name: in_type(travel.rows(slice(begin, end)), plan)})


def _consecutive(numbers: list[int]) -> list[tuple[int, int]]:
    """The first and the last of every run of rising numbers without a gap."""
    begins = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    return list(zip(begins, ends, strict=True))
