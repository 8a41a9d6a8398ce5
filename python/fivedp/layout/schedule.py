"""From a plan to the work of one rank: tiles of its brick in order, and the messages that feed and drain them.

A brick is cut into tiles along one row index (of m, or batch) and one column index (of n), never along k, so that an
element of C is finished in one pass and the tree over k needs no copy of C. A stage is one tile. Panels of A and B that
travel arrive one stage before the tile that reads them first; partial results leave after their tile and are
added while the next one is computed:

    stage t:   post A, B of t+1 | multiply tile t | send partial C of t | add partial C of t-1

Tiles end where shares end, so that a panel is one rank's rows (or columns). Without a reduction a rank begins with the
tile whose inputs it holds. With one, the ranks that add to the same elements go through the same tiles in the same
order, taken in turn from every owner.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from functools import cached_property

from fivedp.layout.plan import Plan
from fivedp.layout.shares import Box, Range, border, intersect, volume

# A call whose messages fit here is one stage: nothing is gained by overlapping it.
SINGLE_STAGE_BYTES = 256 * 1024
# Where ranks read in place there is no transfer to hide, and every stage is one more time to wait for the others.
SINGLE_STAGE_BYTES_IN_PLACE = 1024 * 1024
# Heights and widths of tiles: enough rows to pay for packing B again, one or two of the kernel's own blocks of C.
MIN_ROWS, MAX_ROWS = 256, 512
MIN_COLUMNS, MAX_COLUMNS = 256, 1024
# Elements of a tile of partial sums.
MIN_TILE, MAX_TILE = 512 * 512, 512 * 1024
# Where more partial sums than this meet, a stage is a wait for so many ranks that tiles are twice as large, and half as
# many.
FEW_SUMS = 4


@dataclass(frozen=True)
class Message:
    """A box of A, B or C that moves between this rank and `peer` (numbered within the group).

    It is there in stage `stage`; an input is read for the last time in stage `last`.
    """

    stage: int
    peer: int
    box: Box
    last: int = -1


@dataclass(frozen=True)
class Panel:
    """A part of A or B that tiles `first` to `last` read."""

    box: Box
    first: int
    last: int


@dataclass
class Tiling:
    """The tiles of one rank's brick: boxes of C in the order of work, and the panels of A and B they read."""

    boxes: list[Box] = field(default_factory=list)
    panels: dict[str, list[Panel]] = field(default_factory=dict)
    panel_of: dict[str, list[int]] = field(default_factory=dict)
    """For A and B: the number of the panel that each tile reads."""


class Schedule:
    """The stages of a plan, seen from one rank.

    Parameters
    ----------
    plan : Plan
    rank : int
        This rank's number within the group.
    single_stage : bool or None
        Force one stage (no overlap) or many; None lets the bytes decide.
    in_place : bool
        Whether all ranks read each other's boxes where they lie: what others hold then takes no memory here, and tiles
        can be larger.
    """

    def __init__(self, plan: Plan, rank: int, *, single_stage: bool | None = None, in_place: bool = False) -> None:
        self.plan, self.rank, self.in_place = plan, rank, in_place
        self.n_ranks = plan.family.n_ranks
        if single_stage is None:
            most = SINGLE_STAGE_BYTES_IN_PLACE if in_place else SINGLE_STAGE_BYTES
            single_stage = plan.bytes_total <= most * self.n_ranks
        self.single_stage = single_stage
        self.tilings = [self._tiling(r) for r in range(self.n_ranks)]
        self.tiling = self.tilings[rank]
        self.n_stages = max(len(tiling.boxes) for tiling in self.tilings)

    # -- tiles -----------------------------------------------------------------------------------------------------

    @cached_property
    def row_index(self) -> str | None:
        """The index along which bricks are cut into rows of tiles."""
        plan, spec = self.plan, self.plan.family.spec
        longest = max(spec.m, key=lambda name: plan.sizes[name], default=None)
        if spec.batch and (longest is None or (plan.moves("A") and plan.moves("B"))):
            return max(spec.batch, key=lambda name: plan.sizes[name])
        return longest

    @cached_property
    def column_index(self) -> str | None:
        """The index along which bricks are cut into columns of tiles."""
        return max(self.plan.family.spec.n, key=lambda name: self.plan.sizes[name], default=None)

    @cached_property
    def budget_bytes(self) -> int:
        """What the panels in flight may take: a quarter of the largest share."""
        plan = self.plan
        shares = [volume(plan.owned(tensor, 0)) * size for tensor, size in zip("ABC", plan.itemsizes[:3], strict=True)]
        return max(SINGLE_STAGE_BYTES, max(shares) // 4)

    def _tile_size(self) -> tuple[int, int]:
        """(rows, columns) of a tile; 0 leaves the brick whole in that direction."""
        plan = self.plan
        brick = plan.brick(0)  # rank 0 has the largest shares; every rank must find the same size
        moved = [t for t in "ABC" if plan.moves(t)]
        if self.single_stage or not moved:
            return 0, 0
        height = self._length(brick, self.row_index)
        # Two panels of every moving operand in flight, each at most its part of the budget.
        each = self.budget_bytes // (2 * (len(moved) - bool(self.stays)))
        rows = columns = 0
        if "A" in moved:
            fitting = MAX_ROWS if self.stays == "A" else each // (self._depth("A") * plan.itemsizes.a)
            rows = max(MIN_ROWS, min(MAX_ROWS, fitting))
        if "B" in moved:
            fitting = MAX_COLUMNS if self.stays == "B" else each // (self._depth("B") * plan.itemsizes.b)
            columns = max(MIN_COLUMNS, min(MAX_COLUMNS, fitting))
        if "C" in moved and plan.total_nodes > 1:
            # Two tiles of partial sums are being added while the next is made; those of others may have to be received.
            tiles = 4 if self.in_place else 2 * plan.total_nodes
            rows = max(1, min(rows or MAX_ROWS, height))
            fitting = self.budget_bytes // len(moved) // (tiles * plan.itemsizes.partial * rows)
            most = MAX_TILE if plan.total_nodes <= FEW_SUMS else 2 * MAX_TILE
            columns = min(columns or most // rows, max(MIN_TILE // rows, fitting))
        elif "C" in moved and not rows and not columns:
            rows, columns = MAX_ROWS, MAX_COLUMNS
        return rows, columns

    @cached_property
    def stays(self) -> str:
        """Of A and B, if both move, the one whose panels stay once they have come: that which needs less memory.

        The other's come and go. Narrow panels of what stays would save nothing.
        """
        plan = self.plan
        if not (plan.moves("A") and plan.moves("B")):
            return ""
        a, b = (volume(plan.needed(x, 0)) * size for x, size in zip("AB", plan.itemsizes[:2], strict=True))
        return "A" if a < b else "B"

    def _depth(self, tensor: str) -> int:
        """Summed elements in a row of A's panel (or column of B's) that take memory on one rank."""
        plan, spec = self.plan, self.plan.family.spec
        names = plan.family.layouts[tensor].names
        box = plan.owned(tensor, 0) if self.in_place else plan.needed(tensor, 0)
        return math.prod(max(1, box[names.index(name)][1] - box[names.index(name)][0]) for name in spec.k)

    @staticmethod
    def _length(brick: dict[str, Range], name: str | None) -> int:
        return 1 if name is None else brick[name][1] - brick[name][0]

    def _ranges(self, name: str | None, size: int, rank: int, tensors: str) -> list[Range]:
        """The brick's range of an index, cut at the shares of the moving tensors and then to at most `size`."""
        if name is None:
            return [(0, 1)]
        plan = self.plan
        start, stop = plan.brick(rank)[name]
        if not size:
            return [(start, stop)]
        borders = {start, stop}
        for tensor in tensors:
            layout = plan.family.layouts[tensor]
            if name in layout.names and plan.moves(tensor):
                place = layout.names.index(name)
                for other in range(self.n_ranks):
                    box = plan.reduced(other) if tensor == "C" else plan.owned(tensor, other)
                    borders |= {edge for edge in box[place] if start < edge < stop}
        edges = _spaced(sorted(borders), min(size, MIN_ROWS))
        cells = []
        for low, high in itertools.pairwise(edges):
            parts = -(-(high - low) // size)
            cells.append(
                [(low + border(high - low, parts, i), low + border(high - low, parts, i + 1)) for i in range(parts)]
            )
        if plan.total_nodes > 1:
            longest = max(map(len, cells), default=0)
            return [cell[i] for i in range(longest) for cell in cells if i < len(cell)]
        own = 0
        for tensor in tensors[:1]:
            layout = plan.family.layouts[tensor]
            if name in layout.names and plan.moves(tensor):
                edge = plan.owned(tensor, rank)[layout.names.index(name)][0]
                own = next((i for i, cell in enumerate(cells) if cell[0][0] <= edge < cell[-1][1]), 0)
        return [piece for cell in cells[own:] + cells[:own] for piece in cell]

    def _tiling(self, rank: int) -> Tiling:
        plan, spec = self.plan, self.plan.family.spec
        brick = plan.brick(rank)
        tiling = Tiling(panels={"A": [], "B": []}, panel_of={"A": [], "B": []})
        if not plan.spans(rank) or any(start >= stop for start, stop in plan.needed("C", rank)):
            return tiling
        rows, columns = self._tile_size()
        row_ranges = self._ranges(self.row_index, rows, rank, "AC")
        column_ranges = self._ranges(self.column_index, columns, rank, "BC")
        if plan.moves("B") and self.stays != "B":
            pairs = [(i, j) for j in range(len(column_ranges)) for i in range(len(row_ranges))]
        else:
            pairs = [(i, j) for i in range(len(row_ranges)) for j in range(len(column_ranges))]
        seen: dict[tuple[str, int, int], int] = {}
        for stage, (i, j) in enumerate(pairs):
            ranges = dict(brick)
            if self.row_index is not None:
                ranges[self.row_index] = row_ranges[i]
            if self.column_index is not None:
                ranges[self.column_index] = column_ranges[j]
            tiling.boxes.append(tuple(ranges[name] for name in spec.c.names))
            for tensor in "AB":
                names = plan.family.layouts[tensor].names
                key = (tensor, i if self.row_index in names else -1, j if self.column_index in names else -1)
                panels = tiling.panels[tensor]
                if key not in seen:
                    seen[key] = len(panels)
                    panels.append(Panel(tuple(ranges[name] for name in names), stage, stage))
                number = seen[key]
                panels[number] = Panel(panels[number].box, panels[number].first, stage)
                tiling.panel_of[tensor].append(number)
        return tiling

    # -- messages --------------------------------------------------------------------------------------------------

    def _parts(self, tensor: str, receiver: int, panel: Panel) -> list[tuple[int, Box]]:
        """Who holds which part of a panel, from the receiver's own number upwards."""
        plan, parts = self.plan, []
        for shift in range(self.n_ranks):
            source = (receiver + shift) % self.n_ranks
            if plan.holder(tensor, receiver, source):
                box = intersect(panel.box, plan.owned(tensor, source))
                if box is not None:
                    parts.append((source, box))
        return parts

    @cached_property
    def panel_parts(self) -> dict[str, list[list[tuple[int, Box]]]]:
        """For A and B, for each of this rank's panels: the ranks that hold its parts, this rank perhaps among them."""
        return {t: [self._parts(t, self.rank, p) for p in self.tiling.panels[t]] for t in "AB" if self.plan.moves(t)}

    @cached_property
    def input_sends(self) -> dict[str, list[Message]]:
        """For A and B: what this rank sends, by the stage in which the receiver first reads it."""
        sends: dict[str, list[Message]] = {}
        for tensor in "AB":
            if self.plan.moves(tensor):
                sends[tensor] = [
                    Message(panel.first, receiver, box, panel.last)
                    for receiver in range(self.n_ranks)
                    if receiver != self.rank and self.plan.holder(tensor, receiver, self.rank)
                    for panel in self.tilings[receiver].panels[tensor]
                    if (box := intersect(panel.box, self.plan.owned(tensor, self.rank))) is not None
                ]
                sends[tensor].sort(key=lambda message: message.stage)
        return sends

    @cached_property
    def result_sends(self) -> list[list[Message]]:
        """For each of this rank's tiles: the parts that other ranks finish."""
        order = [(self.rank + shift) % self.n_ranks for shift in range(1, self.n_ranks)]
        return [
            [Message(t, peer, box) for peer in order if (box := intersect(tile, self.plan.reduced(peer))) is not None]
            for t, tile in enumerate(self.tiling.boxes)
        ]

    @cached_property
    def result_receives(self) -> list[list[list[Message]]]:
        """For each stage: groups of messages that are added to one box of C, this rank's own part among them."""
        mine = self.plan.reduced(self.rank)
        stages: list[list[list[Message]]] = []
        for t in range(self.n_stages):
            groups: dict[Box, list[Message]] = {}
            for source, tiling in enumerate(self.tilings):
                if t < len(tiling.boxes):
                    box = intersect(tiling.boxes[t], mine)
                    if box is not None:
                        groups.setdefault(box, []).append(Message(t, source, box))
            stages.append(list(groups.values()))
        return stages

    @cached_property
    def replica_receives(self) -> list[list[Message]]:
        """For each stage of a two-phase reduction: finished boxes from the other replicas of this rank's share."""
        if self.plan.slice_index is None:
            return [[] for _ in range(self.n_stages)]
        sources = [s for s in range(self.n_ranks) if s != self.rank and self._replica(s)]
        return [
            [Message(t, source, box) for source in sources for box in self._finished(t, source)]
            for t in range(self.n_stages)
        ]

    @cached_property
    def replica_sends(self) -> list[list[Message]]:
        """For each stage of a two-phase reduction: what this rank has finished, to the other replicas of its share."""
        if self.plan.slice_index is None:
            return [[] for _ in range(self.n_stages)]
        peers = [s for s in range(self.n_ranks) if s != self.rank and self._replica(s)]
        return [
            [Message(t, peer, box) for peer in peers for box in self._finished(t, self.rank)]
            for t in range(self.n_stages)
        ]

    def _replica(self, rank: int) -> bool:
        """Whether `rank` holds the same share of C as this rank."""
        cut, coords = self.plan.family.spec.c.axes, self.plan.family.coords
        return all(coords[rank][axis] == coords[self.rank][axis] for axis in cut)

    def _finished(self, stage: int, rank: int) -> list[Box]:
        """The boxes of C whose sum `rank` finishes with the tiles of a stage, in one order for sender and receiver."""
        reduced = self.plan.reduced(rank)
        boxes = dict.fromkeys(tiling.boxes[stage] for tiling in self.tilings if stage < len(tiling.boxes))
        return [box for tile in boxes if (box := intersect(tile, reduced)) is not None]

    # -- accounts --------------------------------------------------------------------------------------------------

    @cached_property
    def buffer_bytes(self) -> int:
        """The most that panels and partial results of this rank take at one time, beyond the shares."""
        plan, peak = self.plan, 0
        sizes = {"A": plan.itemsizes.a, "B": plan.itemsizes.b}
        partial = plan.itemsizes.partial if plan.total_nodes > 1 else plan.itemsizes.whole
        for stage in range(self.n_stages):
            live = 0
            for tensor, parts in self.panel_parts.items():
                for panel, sources in zip(self.tiling.panels[tensor], parts, strict=True):
                    if panel.first - 1 <= stage <= panel.last:
                        live += sum(volume(box) for source, box in sources if source != self.rank) * sizes[tensor]
                live += (
                    sum(volume(m.box) for m in self.input_sends[tensor] if stage <= m.stage <= stage + 1)
                    * sizes[tensor]
                )
            for t in (stage - 1, stage):
                if plan.moves("C") and 0 <= t < self.n_stages:
                    if t < len(self.tiling.boxes):
                        live += volume(self.tiling.boxes[t]) * len(plan.spans(self.rank)) * partial
                    for group in self.result_receives[t]:
                        received = (volume(m.box) * len(plan.spans(m.peer)) for m in group if m.peer != self.rank)
                        live += sum(received) * partial
            peak = max(peak, live)
        return peak


def _spaced(edges: list[int], least: int) -> list[int]:
    """The edges without those that would make a piece shorter than `least`; the first and the last stay."""
    kept = edges[:1]
    for edge in edges[1:-1]:
        if edge - kept[-1] >= least and edges[-1] - edge >= least:
            kept.append(edge)
    return kept + edges[1:][-1:]
