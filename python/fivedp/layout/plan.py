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

Pricing a new shape is about thirty NumPy operations over (candidates x ranks x dimensions), prepared once per spec.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

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
        return next((axes for index, axes in self.cuts if index == name), ())

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
        n_candidates, n_ranks = len(self.candidates), self.n_ranks
        slots = [(tensor, name) for tensor in "ABC" for name in self.layouts[tensor].names]
        position = {name: i for i, name in enumerate(self.indices)}
        self._slot_index = np.array([position[name] for _, name in slots])
        tensors = [tensor for tensor, _ in slots]
        self._tensor_start = np.array([tensors.index(t) for t in "ABC"])

        # One flat table of borders: first the cuts of the computation, then those of the shares.
        needed = [
            (position[name], *self.cut_numbers(candidate, name, rank))
            for name in self.indices
            for candidate in self.candidates
            for rank in range(n_ranks)
        ]
        owned = []
        for tensor, name in slots:
            for rank in range(n_ranks):
                parts, part = part_number(self.layouts[tensor].cut_of(name), self.sizes, self.coords[rank])
                owned.append((position[name], parts, part, part + 1))
        table = np.array(needed + owned, dtype=np.int64)
        self._entry_index, self._entry_parts, self._entry_borders = table[:, 0], table[:, 1], table[:, 2:].T.copy()
        self._n_needed = len(needed)
        self._needed_shape = (2, len(self.indices), n_candidates, n_ranks)
        self._owned_shape = (2, len(slots), 1, n_ranks)

        self._rank_nodes = np.array([[len(spans) for spans in ranks] for ranks in self.nodes], dtype=np.int64)
        distinct = [self._k_parts(candidate) for candidate in self.candidates]
        self._k_replication = np.array([n_ranks // parts for parts in distinct], dtype=np.int64)
        # Every brick is computed once: the partial results of one element are those of ranks that differ in k only.
        self.total_nodes = self._rank_nodes.sum(axis=1) // self._k_replication

        # Two-phase reduction: the replicas of a share of C each reduce a slice of it, cut along one of C's dimensions.
        self._replicas = math.prod(self.sizes[axis] for axis in self.replica_axes)
        variants = self.spec.c.names if self._replicas > 1 else ()
        slice_parts = np.ones((len(self.spec.c.names), len(variants), 1, 1), dtype=np.int64)
        slice_part = np.zeros((2, len(self.spec.c.names), len(variants), n_candidates, n_ranks), dtype=np.int64)
        for v, name in enumerate(variants):
            slice_parts[v, v] = self._replicas
            for c, candidate in enumerate(self.candidates):
                for rank in range(n_ranks):
                    slice_part[0, v, v, c, rank] = self.slice_number(candidate, name, rank)
        slice_part[1] = slice_part[0] + 1
        self._slice_parts, self._slice_part = slice_parts, slice_part
        self._messages = self._count_messages(len(variants))

    def _k_parts(self, candidate: Assignment) -> int:
        return math.prod(self.sizes[axis] for name in self.spec.k for axis in candidate.axes_of(name))

    def slice_number(self, candidate: Assignment, name: str, rank: int) -> int:
        """Which slice of its share of C a replica reduces; axes that the schedule puts on `name` vary slowest."""
        axes = [axis for axis in candidate.axes_of(name) if axis in self.replica_axes]
        axes += [axis for axis in self.replica_axes if axis not in axes]
        return part_number(axes, self.sizes, self.coords[rank])[1]

    def _count_messages(self, n_variants: int) -> npt.NDArray[np.int64]:
        """About how many messages a rank receives, by candidate and reduction: the tie-break between equal bytes."""
        counts = np.zeros((1 + n_variants, len(self.candidates)), dtype=np.int64)
        for c, candidate in enumerate(self.candidates):
            for tensor in "ABC":
                moved: set[str] = set()
                for name in self.indices:
                    own, need = self.layouts[tensor].cut_of(name), candidate.axes_of(name)
                    if name in self.layouts[tensor].names and own != need:
                        moved |= set(own) | (set(need) if tensor == "C" else set())
                if tensor == "C":
                    moved |= {axis for name in self.spec.k for axis in candidate.axes_of(name)}
                counts[:, c] += math.prod(self.sizes[axis] for axis in moved) - 1
            # A second phase is one more exchange between the replicas.
            counts[1:, c] += self._replicas - 1
        return counts

    def price(self, sizes: Sequence[int], itemsizes: ItemSizes) -> tuple[npt.NDArray[np.int64], ...]:
        """Bytes sent by all ranks together, for every schedule.

        Parameters
        ----------
        sizes : sequence of int
            The global size of every index, in the order of `indices`.
        itemsizes : ItemSizes
            Bytes per element.

        Returns
        -------
        moves : int64 array, (2, candidates)
            Bytes of A and of B.
        result : int64 array, (1 + variants, candidates)
            Bytes of C: direct, then two-phase with the slices along each dimension of C.
        """
        n = np.asarray(sizes, dtype=np.int64)[self._entry_index]
        quotient = n // self._entry_parts
        borders = self._entry_borders * quotient + np.minimum(self._entry_borders, n - quotient * self._entry_parts)
        needed = borders[:, : self._n_needed].reshape(self._needed_shape)[:, self._slot_index]
        owned = borders[:, self._n_needed :].reshape(self._owned_shape)
        overlap = np.minimum(needed[1], owned[1]) - np.maximum(needed[0], owned[0])
        np.maximum(overlap, 0, out=overlap)
        starts = self._tensor_start
        held = np.multiply.reduceat(overlap, starts)
        wanted = np.multiply.reduceat(needed[1] - needed[0], starts)
        # A brick without elements of C needs nothing.
        moves = ((wanted[:2] - held[:2]) * (wanted[2] > 0)).sum(axis=2)
        moves[0] *= itemsizes.a
        moves[1] *= itemsizes.b

        owned_c = owned[:, starts[2] :]
        own_length = owned_c[1] - owned_c[0]
        own_volume = np.multiply.reduce(own_length)
        wire = np.where(self.total_nodes == 1, itemsizes.whole, itemsizes.partial)
        total = self.total_nodes[:, None]
        direct = (own_volume * total - held[2] * self._rank_nodes).sum(axis=1) * wire
        if self._replicas == 1:
            return moves, direct[None]

        length = own_length[:, None]
        quotient = length // self._slice_parts
        inside = self._slice_part * quotient + np.minimum(self._slice_part, length - quotient * self._slice_parts)
        slices = inside + owned_c[0][:, None]
        needed_c = needed[:, starts[2] :, None]
        overlap_c = np.minimum(needed_c[1], slices[1]) - np.maximum(needed_c[0], slices[0])
        np.maximum(overlap_c, 0, out=overlap_c)
        slice_volume = np.multiply.reduce(slices[1] - slices[0])
        held_c = np.multiply.reduce(overlap_c)
        reduce_bytes = (slice_volume * total - held_c * self._rank_nodes).sum(axis=2) * wire
        gather_bytes = (own_volume - slice_volume).sum(axis=2) * itemsizes.c
        return moves, np.concatenate([direct[None], reduce_bytes + gather_bytes])

    def plan(self, sizes: Sequence[int], itemsizes: ItemSizes) -> Plan:
        """The schedule with the fewest bytes for these global sizes; see `price` for the arguments."""
        moves, result = self.price(sizes, itemsizes)
        total = result + moves.sum(axis=0)
        ties = np.flatnonzero(total.ravel() == total.min())
        best = int(ties[self._messages.ravel()[ties].argmin()])
        return self.plan_of(best, sizes, itemsizes, moves, result)

    def plan_of(
        self,
        number: int,
        sizes: Sequence[int],
        itemsizes: ItemSizes,
        moves: npt.NDArray[np.int64],
        result: npt.NDArray[np.int64],
    ) -> Plan:
        """The plan of schedule `number` (reduction x candidates, flattened)."""
        variant, candidate = divmod(number, len(self.candidates))
        return Plan(
            family=self,
            candidate=candidate,
            slice_index=self.spec.c.names[variant - 1] if variant else None,
            sizes=dict(zip(self.indices, map(int, sizes), strict=True)),
            itemsizes=itemsizes,
            bytes_a=int(moves[0, candidate]),
            bytes_b=int(moves[1, candidate]),
            bytes_c=int(result[variant, candidate]),
        )

    def all_plans(self, sizes: Sequence[int], itemsizes: ItemSizes) -> list[Plan]:
        """One plan per schedule, cheapest first."""
        moves, result = self.price(sizes, itemsizes)
        plans = [self.plan_of(i, sizes, itemsizes, moves, result) for i in range(result.size)]
        messages = self._messages.ravel()
        order = sorted(range(len(plans)), key=lambda i: (plans[i].bytes_total, messages[i]))
        return [plans[i] for i in order]


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
        return int(self.family.total_nodes[self.candidate])

    def spans(self, rank: int) -> list[tuple[int, int]]:
        """The subtrees (first leaf, number of leaves) that a rank computes."""
        return self.family.nodes[self.candidate][rank]

    def owned(self, tensor: str, rank: int) -> Box:
        """The box of A, B or C that a rank holds, one range per dimension."""
        family = self.family
        layout = family.layouts[tensor]
        return tuple(
            share(self.sizes[index.name], *part_number(index.axes, family.sizes, family.coords[rank]))
            for index in layout.indices
        )

    def brick(self, rank: int) -> dict[str, Range]:
        """The range of every index that a rank computes."""
        brick = {}
        for name in self.family.indices:
            parts, first, stop = self.family.cut_numbers(self.assignment, name, rank)
            brick[name] = (border(self.sizes[name], parts, first), border(self.sizes[name], parts, stop))
        return brick

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
        low, high = share(stop - start, self.family._replicas, number)
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
