"""Products of experts that the ranks of a node share, so that a rank with few rows helps one with many.

An owner with far more rows than the mean puts its job on the board: where its row table, weights and results lie in its
shared window. Every rank then takes tiles of its own job and, when those are all taken, of the jobs on the board, from
a counter in the owner's window. A tile has one writer and its bits do not depend on who that is. Rows are read where
they lie, in the windows of the ranks whose tokens they are; only weights are copied, once, by the owner, and only where
that pays (`layout.dispatch.owners_to_help`).

Device memory is in no window: of CuPy arrays every rank computes its own rows, however few or many.

A job has phases, since the second product needs all of the first. A phase of a job begins when every tile of the phase
before is done, whoever made it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from fivedp.comm.messages import TAGS, Buffer, Mailbox
from fivedp.comm.shared_window import Extent, SharedWindow
from fivedp.kernels.experts import Rows
from fivedp.layout.dispatch import owners_to_help
from fivedp.ops.dispatch_plan import DispatchPlan

Array = Any
# A kernel call on a job: takes tiles until there are none, and says how many there were in all.
Work = Callable[["Job", Array | None], int]
_WORDS_OF_A_LINE = 8  # each counter has a cache line of its own
_NONE = -1


@dataclass(frozen=True)
class Item:
    """An array of a job, with an entry of shape `tail` for each of its rows or experts.

    Attributes
    ----------
    per : {"row", "expert"}
    tail : tuple of int
    dtype : dtype
    given : array or None
        What it holds; None for a result, which the phases write.
    kept : bool
        Whether it outlives the call.
    """

    per: Literal["row", "expert"]
    tail: tuple[int, ...]
    dtype: np.dtype[Any]
    given: Array | None = None
    kept: bool = False

    @classmethod
    def of(cls, per: Literal["row", "expert"], array: Array) -> Item:
        """An array that is there."""
        return cls(per, tuple(array.shape[1:]), array.dtype, array)


@dataclass
class Job:
    """The rows of one owner's experts and what is to be done with them.

    Attributes
    ----------
    rank : int
        The owner, as a member of the group.
    rows : dict of str to Rows or array
        The tokens, and what else has a row per token.
    offsets : int64
        Borders of the experts among them.
    arrays : dict of str to array
        Weights and results.
    counters : (phases + members, 8) int64, or None
        In the owner's window: of each phase the next tile and the tiles done; then, for each member, whether it has
        left. None where nobody else takes part.
    """

    rank: int
    rows: dict[str, Any]
    offsets: Array
    arrays: dict[str, Array]
    counters: Array | None = None
    tiles: list[int] = field(default_factory=list)
    """Of each phase that this rank has begun, of all ranks together."""


class SharedWork:
    """This rank's job and those on the board; a context for one call.

    Parameters
    ----------
    mail : Mailbox
    plan : DispatchPlan
    hidden : int
        F, for the price.
    n_phases : int
    """

    def __init__(self, mail: Mailbox, plan: DispatchPlan, hidden: int, n_phases: int) -> None:
        self.mail, self.plan, self.n_phases = mail, plan, n_phases
        within_reach = plan.group.in_place and not plan.on_device
        self.window: SharedWindow | None = plan.group.grid.shared if within_reach else None
        self.owners: list[int] = []
        """Who may put a job on the board; all ranks come to the same list."""
        if self.window is not None and plan.group.size > 1 and plan.wire == "same":
            n_experts = [end - begin for begin, end in itertools.pairwise(plan.cut.borders)]
            self.owners = owners_to_help(plan.loads, n_experts, plan.width, hidden, plan.dtype.itemsize)
        # Ranks see each other's tables by the loads of the plan, which leave no room for rows made elsewhere.
        assert plan.copies is None or not self.owners
        self.jobs: list[Job] = []
        self._whole: dict[str, Array] = {}
        self._rows_of_copies: dict[str, Array] = {}
        self._items: dict[str, Item] = {}
        self._used: Array | None = None
        self._extents: list[Extent] = []
        self._buffers: list[Buffer] = []

    @property
    def own(self) -> Job:
        """This rank's job."""
        return self.jobs[0]

    def visible(self, array: Array) -> Array:
        """An array that others shall read, in the window where they may have to and there is room."""
        if not self.owners:
            return array
        copy = self._put(array)
        return array if copy is None else copy

    def begin(self, tokens: Mapping[str, Array], items: Mapping[str, Item]) -> None:
        """Make the jobs; this rank's own has no rows yet. Collective over the group.

        Parameters
        ----------
        tokens : dict of str to (T, H) arrays
            Of this rank, by the names of its rows: `visible`.
        items : dict of str to Item
        """
        plan = self.plan
        self._items = dict(items)
        own = Job(plan.group.index, {}, plan.tables.offsets, {})
        self.jobs, self._whole = [own], {}
        words = None
        if own.rank in self.owners:
            words = self._publish(own)
        if words is None:
            words = [_NONE] * (3 + len(items))
            for name, item in items.items():
                own.arrays[name] = self._private(item) if item.given is None else item.given
        if plan.copies is not None:
            self._whole = own.arrays
            n_own = plan.incoming.n_own
            rows = {name: array for name, array in own.arrays.items() if items[name].per == "row"}
            own.arrays = own.arrays | {name: array[:n_own] for name, array in rows.items()}
            self._rows_of_copies = {name: array[n_own:] for name, array in rows.items()}
        if self.owners:
            boards = self._exchange(np.array([*map(self._offset, tokens.values()), *words], np.int64))
            others = [self._job(boards, rank, list(tokens)) for rank in self.owners if rank != own.rank]
            self.jobs += [job for job in others if job is not None]

    def run(self, phase: int, work: Work) -> None:
        """Carry out a phase of all jobs; when this returns, this rank's own is done."""
        for job in self.jobs:
            if phase:
                self._wait(job, phase - 1)
            job.tiles.append(work(job, None if job.counters is None else job.counters[phase]))
        self._wait(self.own, phase)

    def part(self, expert: int, rows: slice, given: dict[str, Any]) -> Job:
        """Some rows of one expert of this rank's job, for a call of their own; nobody else takes part."""
        arrays = {
            name: array[rows] if self._items[name].per == "row" else array[expert : expert + 1]
            for name, array in self.own.arrays.items()
        }
        return Job(self.own.rank, given, np.array([0, rows.stop - rows.start], np.int64), arrays)

    def of_copies(
        self, rows: Mapping[str, Callable[[slice], Any]], weights: Sequence[Mapping[str, Array]]
    ) -> list[Job]:
        """The rows of each copy that this rank uses, as a job of its own.

        Parameters
        ----------
        rows : dict of str to callable
            Gives a part of the tokens' rows.
        weights : list of dict of str to (1, ., .) arrays
            Of each copy.
        """
        borders = self.plan.incoming.copy_offsets.tolist()
        jobs = []
        for begin, end, given in zip(borders, borders[1:], weights, strict=False):
            arrays = {name: array[begin:end] for name, array in self._rows_of_copies.items()}
            some = {name: of(slice(begin, end)) for name, of in rows.items()}
            jobs.append(Job(self.own.rank, some, np.array([0, end - begin], np.int64), arrays | dict(given)))
        return jobs

    def rows_of_copies(self, name: str) -> Array:
        """What copies that this rank uses have made, of all of their rows."""
        return self._rows_of_copies[name]

    def result(self, name: str) -> Array:
        """A result of this rank's job, for all of its experts."""
        item, array = self._items[name], (self._whole or self.own.arrays)[name]
        n_experts = len(self.plan.incoming.counts)
        if item.per == "row" or self._used is None or len(self._used) == n_experts:
            return self._keep(array) if item.kept else array
        whole: Array = self.mail.pool.lend((n_experts, *item.tail), item.dtype)
        whole[self._used] = array
        whole[np.setdiff1d(np.arange(n_experts), self._used)] = 0
        return whole

    def end(self) -> None:
        """Say that this rank takes no further part, wait until nobody does in its own job, and return the memory."""
        mine, members = self.plan.group.index, self.plan.group.members
        for job in self.jobs:
            if job.counters is not None:
                job.counters[self.n_phases + mine, 0] = 1
        counters = self.own.counters
        if counters is not None:
            left = counters[self.n_phases :, 0]
            self.plan.group.grid.watchdog.wait_until(
                lambda: bool(left.all()), lambda: [members[r] for r in np.flatnonzero(left == 0)], self.mail.what
            )
        self._release()

    # -- waiting ---------------------------------------------------------------------------------------------------

    def _wait(self, job: Job, phase: int) -> None:
        """Wait until every tile of a phase of a job is done."""
        if job.counters is None:
            return
        done, wanted = job.counters[phase], job.tiles[phase]
        members = self.plan.group.members
        self.plan.group.grid.watchdog.wait_until(
            lambda: bool(done[1] == wanted), lambda: [members[job.rank]], self.mail.what
        )

    # -- memory ----------------------------------------------------------------------------------------------------

    def _put(self, array: Array) -> Array | None:
        """The array if it lies in this rank's window, else a copy there; None without room."""
        assert self.window is not None
        if array.flags.c_contiguous and self.window.offset_of(array) is not None:
            return array
        copy = self._empty(array.shape, array.dtype)
        if copy is not None:
            copy[...] = array
        return copy

    def _empty(self, shape: tuple[int, ...], dtype: Any) -> Array | None:
        """Memory in this rank's window until the call ends, or None where there is no room."""
        assert self.window is not None
        dtype = np.dtype(dtype)
        extent = self.window.take_large(max(1, int(np.prod(shape)) * dtype.itemsize))
        if extent is None:
            return None
        self._extents.append(extent)
        return self.window.array(extent, shape, dtype)

    def _keep(self, array: Array) -> Array:
        """A result that outlives the call; memory of the window goes back when it is no longer used."""
        window = self.window
        offset = None if window is None else window.offset_of(array)
        if window is None or offset is None:
            return array
        extent = next(extent for extent in self._extents if extent[0] == offset)
        self._extents.remove(extent)
        return window.lend(extent, array.shape, array.dtype)

    def _private(self, item: Item) -> Array:
        """Memory for a result that nobody else needs to see."""
        shape = (self.plan.n_rows if item.per == "row" else len(self.plan.incoming.counts), *item.tail)
        if self.plan.on_device:
            return self.plan.xp.empty(shape, item.dtype)
        if item.kept:
            return self.mail.pool.lend(shape, item.dtype)
        array, buffer = self.mail.pool.take(shape, item.dtype)
        self._buffers.append(buffer)
        return array

    def _release(self) -> None:
        """Return the memory, which nobody reads any more, but for what `result` gave away."""
        window = self.window
        for extent in self._extents:
            assert window is not None
            window.give(extent)
        for buffer in self._buffers:
            self.mail.pool.give(buffer)
        self._extents, self._buffers = [], []

    # -- the board -------------------------------------------------------------------------------------------------

    def _offset(self, array: Array) -> int:
        """Where an array lies in this rank's window; -1 for elsewhere."""
        assert self.window is not None
        offset = self.window.offset_of(array)
        return _NONE if offset is None or not array.flags.c_contiguous else offset

    def _publish(self, own: Job) -> list[int] | None:
        """Put this rank's job into its window: where everything lies, or None where there is no room.

        [tables, counters, experts with rows, the items...], as offsets in this rank's window. The tables are the
        sources and rows of the tokens, and the borders of the experts that have any.
        """
        incoming, n_rows = self.plan.incoming, self.plan.n_rows
        used = np.flatnonzero(incoming.counts)
        tables = self._empty((2 * n_rows + 2 * (len(used) + 1),), np.int32)
        counters = self._empty((self.n_phases + self.plan.group.size, _WORDS_OF_A_LINE), np.int64)
        arrays: dict[str, Array | None] = {}
        for name, item in self._items.items():
            if item.given is not None and item.per == "row":
                arrays[name] = self._put(item.given)
            else:
                arrays[name] = self._empty((n_rows if item.per == "row" else len(used), *item.tail), item.dtype)
        found = {name: array for name, array in arrays.items() if array is not None}
        if tables is None or counters is None or len(found) < len(arrays):
            return None
        tables[:n_rows], tables[n_rows : 2 * n_rows] = incoming.source, incoming.token
        offsets = tables[2 * n_rows :].view(np.int64)
        offsets[:-1], offsets[-1] = incoming.offsets[used], incoming.offsets[-1]
        counters[...] = 0
        for name, item in self._items.items():
            if item.given is not None and item.per == "expert":
                for place, expert in enumerate(used):
                    found[name][place] = item.given[expert]
        own.offsets, own.arrays, own.counters = offsets, found, counters
        self._used = used
        return [self._offset(tables), self._offset(counters), len(used), *map(self._offset, found.values())]

    def _exchange(self, words: Array) -> list[Array]:
        """Everybody's words."""
        mail, plan = self.mail, self.plan
        receipts = {s: mail.receive(words.shape, np.int64, s, TAGS["B"]) for s in plan.peers}
        for peer in plan.peers:
            mail.send(words, peer, TAGS["B"], 0)
        mail.wait(list(receipts.values()))
        everyone = [words] * plan.group.size
        for source, receipt in receipts.items():
            everyone[source] = receipt.array.copy()
            mail.release(receipt)
        return everyone

    def _job(self, boards: list[Array], rank: int, names: list[str]) -> Job | None:
        """The job of another rank as this one sees it; None where it is not on the board, or out of reach."""
        plan, n_rows = self.plan, self.plan.loads[rank]
        tables_at, counters_at, n_used, *items_at = boards[rank][len(names) :].tolist()
        if tables_at == _NONE:
            return None
        n_counters = self.n_phases + plan.group.size
        counters = self._view(rank, counters_at, (n_counters, _WORDS_OF_A_LINE), np.int64, writeable=True)
        tables = self._view(rank, tables_at, (2 * n_rows + 2 * (n_used + 1),), np.int32)
        source, token = tables[:n_rows], tables[n_rows : 2 * n_rows]
        there = np.array([bool((board[: len(names)] != _NONE).all()) for board in boards])
        if not there[source].all():
            counters[self.n_phases + plan.group.index, 0] = 1  # rows that this rank can't see: it takes no part
            return None
        rows = {}
        for place, name in enumerate(names):
            arrays = [
                self._view(r, boards[r][place], (n_tokens, plan.width), plan.dtype)
                if there[r]
                else np.empty((0, plan.width), plan.dtype)
                for r, n_tokens in enumerate(plan.n_tokens)
            ]
            rows[name] = Rows(arrays, source, token)
        found = {
            name: self._view(
                rank, at, (n_rows if item.per == "row" else n_used, *item.tail), item.dtype, writeable=True
            )
            for at, (name, item) in zip(items_at, self._items.items(), strict=True)
        }
        return Job(rank, rows, tables[2 * n_rows :].view(np.int64), found, counters)

    def _view(self, rank: int, offset: int, shape: tuple[int, ...], dtype: Any, *, writeable: bool = False) -> Array:
        """An array in the window of a member."""
        assert self.window is not None
        member = self.plan.group.members[rank]
        return self.window.view(member, int(offset), shape, None, np.dtype(dtype), writeable=writeable)
