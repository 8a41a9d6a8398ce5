"""From a spec and the sizes to the cheapest schedule.

A schedule assigns every mesh axis that the spec names to one index of the product. The axis then cuts that index in
the computation, and each rank owns a brick of the (batch, m, n, k) space:

    an axis on m    B is gathered over it where B lacks it      (stationary C or A, column parallel, ring)
    an axis on n    A is gathered over it where A lacks it
    an axis on k    partial results are reduced over it         (row parallel, stationary A or B, 2.5-D)

What moves is a matter of boxes: a rank receives the part of A and B that its brick needs and its share lacks, and the
owners of C receive partial results that other bricks made. Column parallel, ring, all-to-all, SUMMA with A, B or C
stationary and 2.5-D are all points of this one space, so pricing the space prices them all. The sum of bytes over all
ranks decides; ties go to fewer messages.

The sum over k has a fixed order: 8 virtual shards of k (the block rule of 8), added in a binary tree. Where the parts
of k divide 8, every rank computes one subtree, so bits do not depend on the number of ranks and no byte is added.
A cut of 8 may differ from a cut of p by up to two slices of k where 8 does not divide k; those slices travel as inputs.
With `order="canonical"` any number of parts gets whole virtual shards and sends one partial result per subtree.

What a price needs beside the sizes is prepared once per spec and grid, so a new shape is planned in microseconds.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import NamedTuple

from fivedp._cpu import SchedulePrices
from fivedp.layout.shares import Box, Range, border, intersect, part_number, share, volume
from fivedp.layout.spec import Layout, ProductSpec

VIRTUAL_SHARDS = 8
ORDERS = ("tree", "canonical", "fast")
# With more axes than this, an axis is only tried on indices that it cuts somewhere: the full space grows as 3^axes.
_EXHAUSTIVE_AXES = 3


@dataclass(frozen=True)
class Assignment:
    """A schedule: for each index, the axes that cut it in the computation, the first slowest."""

    cuts: tuple[tuple[str, tuple[str, ...]], ...]

    def axes_of(self, name: str) -> tuple[str, ...]:
        """The axes assigned to index `name`."""
        return self._axes.get(name, ())

    @cached_property
    def _axes(self) -> dict[str, tuple[str, ...]]:
        return dict(self.cuts)

    def __str__(self) -> str:
        return " ".join(f"{name}/{'*'.join(axes)}" if axes else name for name, axes in self.cuts)


class ItemSizes(NamedTuple):
    """Bytes of an element of A, B and finished C; of a partial sum; and of a whole sum that another rank finishes."""

    a: int
    b: int
    c: int
    partial: int
    whole: int


@dataclass(frozen=True)
class LeafCut:
    """How one summed index is cut into leaves of the tree, and which leaves each part computes."""

    leaves: int
    first: tuple[int, ...]
    """`first[i]` is the first leaf of part i; `first[parts]` is `leaves`."""


def leaf_cut(parts: int, order: str) -> LeafCut:
    """The leaves of a summed index in `parts` parts under `order`.

    Where `parts` divides 8, and always under "canonical", the parts get whole virtual shards by the block rule.
    Otherwise each part is one leaf: the order is fixed for that number of parts, but is not that of another number.
    """
    if parts == 1 or order == "canonical" or (order == "tree" and VIRTUAL_SHARDS % parts == 0):
        return LeafCut(VIRTUAL_SHARDS, tuple(border(VIRTUAL_SHARDS, parts, part) for part in range(parts + 1)))
    return LeafCut(parts, tuple(range(parts + 1)))


def subtrees(first: int, stop: int) -> list[tuple[int, int]]:
    """Cut the leaves [first, stop) into the fewest aligned subtrees, as (first leaf, number of leaves)."""
    spans = []
    while first < stop:
        size = first & -first or 1 << (stop - first).bit_length()
        while size > stop - first:
            size //= 2
        spans.append((first, size))
        first += size
    return spans


class PlanFamily:
    """Every schedule of one spec on one grid of ranks: what can be prepared before the sizes are known.

    Parameters
    ----------
    spec : ProductSpec
    axes, sizes : tuple of str, tuple of int
        The mesh axes that the spec names and their sizes; ranks are numbered with the last axis fastest.
    order : {"tree", "canonical", "fast"}
    """

    def __init__(self, spec: ProductSpec, axes: tuple[str, ...], sizes: tuple[int, ...], order: str) -> None:
        self.spec, self.axes, self.order = spec, axes, order
        self.sizes = dict(zip(axes, sizes, strict=True))
        self.n_ranks = math.prod(sizes)
        self.coords = [dict(zip(axes, c, strict=True)) for c in itertools.product(*(range(s) for s in sizes))]
        self.indices = spec.batch + spec.m + spec.n + spec.k
        self.layouts: dict[str, Layout] = {"A": spec.a, "B": spec.b, "C": spec.c}
        self.replica_axes = tuple(axis for axis in axes if axis not in spec.c.axes)
        self.candidates = self._enumerate()
        self.nodes = [[self._spans(c, rank) for rank in range(self.n_ranks)] for c in self.candidates]
        self._prepare_prices()

    # -- what the schedules are ------------------------------------------------------------------------------------

    def _enumerate(self) -> list[Assignment]:
        allowed = self.spec.batch + self.spec.m + self.spec.n + self.spec.tree_indices
        choices = []
        for axis in self.axes:
            cut_somewhere = [n for n in allowed if any(axis in layout.cut_of(n) for layout in self.layouts.values())]
            choices.append(allowed if len(self.axes) <= _EXHAUSTIVE_AXES else cut_somewhere or allowed)
        found: dict[Assignment, None] = {}
        for chosen in itertools.product(*choices):
            groups = {n: [axis for axis, c in zip(self.axes, chosen, strict=True) if c == n] for n in self.indices}
            for orders in itertools.product(*(itertools.permutations(groups[n]) for n in self.indices)):
                found[Assignment(tuple(zip(self.indices, orders, strict=True)))] = None
        return list(found)

    def leaf_cuts(self, candidate: Assignment) -> dict[str, LeafCut]:
        """For each tree index, its leaves under this schedule."""
        return {
            name: leaf_cut(part_number(candidate.axes_of(name), self.sizes, self.coords[0])[0], self.order)
            for name in self.spec.tree_indices
        }

    def _spans(self, candidate: Assignment, rank: int) -> list[tuple[int, int]]:
        """The subtrees that `rank` computes: leaves of several tree indices are numbered with the last fastest."""
        cuts = self.leaf_cuts(candidate)
        ranges = [(0, 1)]
        total = 1
        for name, cut in cuts.items():
            _, part = part_number(candidate.axes_of(name), self.sizes, self.coords[rank])
            low, high = cut.first[part], cut.first[part + 1]
            if (low, high) == (0, cut.leaves):
                ranges = [(start * cut.leaves, stop * cut.leaves) for start, stop in ranges]
            else:
                ranges = [(i * cut.leaves + low, i * cut.leaves + high) for r in ranges for i in range(*r)]
            total *= cut.leaves
        if ranges == [(0, total)]:
            return [(0, total)]
        return [span for start, stop in ranges for span in subtrees(start, stop)]

    def cut_numbers(self, candidate: Assignment, name: str, rank: int) -> tuple[int, int, int]:
        """(parts, first, stop): the rank computes `name` from border `first` to border `stop` of `parts`."""
        axes = candidate.axes_of(name)
        parts, part = part_number(axes, self.sizes, self.coords[rank])
        if name in self.spec.tree_indices and axes:
            cut = leaf_cut(parts, self.order)
            return cut.leaves, cut.first[part], cut.first[part + 1]
        return parts, part, part + 1

    # -- what they cost --------------------------------------------------------------------------------------------

    def _prepare_prices(self) -> None:
        n_ranks = self.n_ranks
        ranks = range(n_ranks)
        slots = [(tensor, name) for tensor in "ABC" for name in self.layouts[tensor].names]
        tensors = [tensor for tensor, _ in slots]
        needed = [
            [[self.cut_numbers(candidate, name, rank) for rank in ranks] for candidate in self.candidates]
            for name in self.indices
        ]
        owned = []
        for tensor, name in slots:
            numbers = [part_number(self.layouts[tensor].cut_of(name), self.sizes, self.coords[rank]) for rank in ranks]
            owned.append([(parts, part, part + 1) for parts, part in numbers])
        nodes = [[len(spans) for spans in by_rank] for by_rank in self.nodes]
        # Every brick is computed once: the partial results of one element are those of ranks that differ in k only.
        self.total_nodes = [
            sum(by_rank) * self._k_parts(candidate) // n_ranks
            for by_rank, candidate in zip(nodes, self.candidates, strict=True)
        ]
        # Two-phase reduction: the replicas of a share of C each reduce a slice of it, cut along one of C's dimensions.
        self.replicas = math.prod(self.sizes[axis] for axis in self.replica_axes)
        variants = self.spec.c.names if self.replicas > 1 else ()
        slice_part = [
            [[self.slice_number(candidate, name, rank) for rank in ranks] for candidate in self.candidates]
            for name in variants
        ]
        self._messages = self._count_messages(len(variants))
        self._prices = SchedulePrices(
            needed,
            owned,
            [self.indices.index(name) for _, name in slots],
            [tensors.index(tensor) for tensor in "ABC"],
            nodes,
            self.total_nodes,
            self.replicas,
            slice_part,
            self._messages,
        )

    def _k_parts(self, candidate: Assignment) -> int:
        return math.prod(self.sizes[axis] for name in self.spec.k for axis in candidate.axes_of(name))

    def slice_number(self, candidate: Assignment, name: str, rank: int) -> int:
        """Which slice of its share of C a replica reduces; axes that the schedule puts on `name` vary slowest."""
        axes = [axis for axis in candidate.axes_of(name) if axis in self.replica_axes]
        axes += [axis for axis in self.replica_axes if axis not in axes]
        return part_number(axes, self.sizes, self.coords[rank])[1]

    def _count_messages(self, n_variants: int) -> list[int]:
        """About how many messages a rank receives, by reduction and candidate: the tie-break between equal bytes."""
        counts = []
        for candidate in self.candidates:
            count = 0
            for tensor in "ABC":
                moved: set[str] = set()
                for name in self.layouts[tensor].names:
                    own, need = self.layouts[tensor].cut_of(name), candidate.axes_of(name)
                    if own != need:
                        moved |= set(own) | (set(need) if tensor == "C" else set())
                if tensor == "C":
                    moved |= {axis for name in self.spec.k for axis in candidate.axes_of(name)}
                count += math.prod(self.sizes[axis] for axis in moved) - 1
            counts.append(count)
        # A second phase is one more exchange between the replicas.
        return counts + [count + self.replicas - 1 for count in counts] * n_variants

    def plan(self, sizes: Sequence[int], itemsizes: ItemSizes) -> Plan:
        """The schedule with the fewest bytes, summed over all ranks; among equals the one with the fewest messages.

        Parameters
        ----------
        sizes : sequence of int
            The global size of every index, in the order of `indices`.
        itemsizes : ItemSizes
            Bytes per element.
        """
        return self._plan_of(sizes, itemsizes, *self._prices.cheapest(sizes, itemsizes))

    def all_plans(self, sizes: Sequence[int], itemsizes: ItemSizes) -> list[Plan]:
        """One plan per schedule (and, where C has replicas, per kind of reduction), cheapest first."""
        moves, result = self._prices.price(sizes, itemsizes)
        n = len(self.candidates)
        plans = [
            self._plan_of(sizes, itemsizes, i, moves[i % n], moves[n + i % n], n_bytes)
            for i, n_bytes in enumerate(result)
        ]
        order = sorted(range(len(plans)), key=lambda i: (plans[i].bytes_total, self._messages[i]))
        return [plans[i] for i in order]

    def _plan_of(
        self, sizes: Sequence[int], itemsizes: ItemSizes, number: int, bytes_a: int, bytes_b: int, bytes_c: int
    ) -> Plan:
        """The plan of schedule `number`, which counts candidates within kinds of reduction."""
        variant, candidate = divmod(number, len(self.candidates))
        slice_index = self.spec.c.names[variant - 1] if variant else None
        by_name = dict(zip(self.indices, sizes, strict=True))
        return Plan(self, candidate, slice_index, by_name, itemsizes, bytes_a, bytes_b, bytes_c)


@lru_cache(maxsize=1024)
def plan_family(spec: ProductSpec, axes: tuple[str, ...], sizes: tuple[int, ...], order: str) -> PlanFamily:
    """The (cached) family of schedules of a spec on a grid of ranks."""
    return PlanFamily(spec, axes, sizes, order)


@dataclass(frozen=True)
class Plan:
    """One schedule with its sizes: pure data, the same on every rank.

    `bytes_a`, `bytes_b`, `bytes_c` are sums over all ranks of the bytes sent.
    """

    family: PlanFamily
    candidate: int
    slice_index: str | None
    sizes: dict[str, int]
    itemsizes: ItemSizes
    bytes_a: int
    bytes_b: int
    bytes_c: int
    # What a schedule asks for again and again while it cuts tiles: filled in where it is first asked for.
    _bricks: dict[int, dict[str, Range]] = field(default_factory=dict, init=False, repr=False, compare=False)
    _owned: dict[tuple[str, int], Box] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def assignment(self) -> Assignment:
        """Which axis cuts which index in the computation."""
        return self.family.candidates[self.candidate]

    @property
    def bytes_total(self) -> int:
        """Bytes sent by all ranks together."""
        return self.bytes_a + self.bytes_b + self.bytes_c

    @property
    def total_nodes(self) -> int:
        """How many partial results are added to make one element of C."""
        return self.family.total_nodes[self.candidate]

    def spans(self, rank: int) -> list[tuple[int, int]]:
        """The subtrees (first leaf, number of leaves) that a rank computes."""
        return self.family.nodes[self.candidate][rank]

    def owned(self, tensor: str, rank: int) -> Box:
        """The box of A, B or C that a rank holds, one range per dimension."""
        if (tensor, rank) not in self._owned:
            family = self.family
            self._owned[tensor, rank] = tuple(
                share(self.sizes[index.name], *part_number(index.axes, family.sizes, family.coords[rank]))
                for index in family.layouts[tensor].indices
            )
        return self._owned[tensor, rank]

    def brick(self, rank: int) -> dict[str, Range]:
        """The range of every index that a rank computes; not to be written to."""
        if rank not in self._bricks:
            numbers = {name: self.family.cut_numbers(self.assignment, name, rank) for name in self.family.indices}
            self._bricks[rank] = {
                name: (border(self.sizes[name], parts, first), border(self.sizes[name], parts, stop))
                for name, (parts, first, stop) in numbers.items()
            }
        return self._bricks[rank]

    def needed(self, tensor: str, rank: int) -> Box:
        """The box of A or B that a rank's brick reads, or the box of C that it writes."""
        brick = self.brick(rank)
        return tuple(brick[name] for name in self.family.layouts[tensor].names)

    def reduced(self, rank: int) -> Box:
        """The box of C whose sum is finished on this rank: its share, or its slice of it in a two-phase reduction."""
        box = self.owned("C", rank)
        if self.slice_index is None:
            return box
        place = self.family.spec.c.names.index(self.slice_index)
        number = self.family.slice_number(self.assignment, self.slice_index, rank)
        start, stop = box[place]
        low, high = share(stop - start, self.family.replicas, number)
        return (*box[:place], (start + low, start + high), *box[place + 1 :])

    def holder(self, tensor: str, rank: int, source: int) -> bool:
        """Whether `rank` takes the share of `source` from `source` itself, the replica that agrees elsewhere."""
        cut = self.family.layouts[tensor].axes
        mine, theirs = self.family.coords[rank], self.family.coords[source]
        return all(mine[axis] == theirs[axis] for axis in self.family.axes if axis not in cut)

    @cached_property
    def leaf_borders(self) -> dict[str, list[int]]:
        """For each tree index, the global positions where its leaves begin, and its size."""
        cuts = self.family.leaf_cuts(self.assignment)
        return {n: [border(self.sizes[n], c.leaves, i) for i in range(c.leaves + 1)] for n, c in cuts.items()}

    def moves(self, tensor: str) -> bool:
        """Whether any byte of the tensor travels."""
        return bool({"A": self.bytes_a, "B": self.bytes_b, "C": self.bytes_c}[tensor])

    def received_elements(self, tensor: str, rank: int) -> int:
        """Elements of A or B that this rank receives; the slow and plain account that tests hold against `price`."""
        box = self.needed(tensor, rank)
        held = intersect(box, self.owned(tensor, rank))
        return volume(box) - (volume(held) if held else 0)
