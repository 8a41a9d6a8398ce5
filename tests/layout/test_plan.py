"""The planner never overlooks a cheaper schedule, and its prices are those of plain counting.

The counting here shares nothing with the planner: shares are `numpy.array_split` of index lists, what moves is a
difference of sets, and schedules are enumerated by hand.
"""

from __future__ import annotations

import itertools
import math
import random
import time
from functools import cache

import numpy as np
import pytest

from fivedp.layout.explain import plan_for
from fivedp.layout.plan import ItemSizes, PlanFamily, leaf_cut, subtrees
from layout.drawing import ITEMS, draw_sizes, families

Coords = dict[str, int]
Cuts = dict[str, tuple[str, ...]]


# ---------------------------------------------------------------- plain counting


@cache
def pieces(size: int, parts: int) -> list[frozenset[int]]:
    return [frozenset(piece.tolist()) for piece in np.array_split(np.arange(size), parts)]


def part(axes: tuple[str, ...], sizes: dict[str, int], coords: Coords) -> tuple[int, int]:
    shape = [sizes[axis] for axis in axes]
    return math.prod(shape), int(np.ravel_multi_index([coords[axis] for axis in axes], shape)) if axes else 0


def shards(parts: int, order: str) -> list[list[int]]:
    """The leaves of the tree that each part of a summed index computes."""
    if parts == 1 or order == "canonical" or (order == "tree" and parts in (1, 2, 4, 8)):
        return [piece.tolist() for piece in np.array_split(np.arange(8), parts)]
    return [[i] for i in range(parts)]


def whole_subtrees(leaves: frozenset[int], start: int, size: int) -> int:
    """How many complete subtrees of a binary tree cover some of its leaves."""
    inside = sum(start <= leaf < start + size for leaf in leaves)
    if inside in (0, size):
        return int(inside > 0)
    return whole_subtrees(leaves, start, size // 2) + whole_subtrees(leaves, start + size // 2, size // 2)


class Counting:
    """Everything that one rank holds, reads and makes under one schedule."""

    def __init__(self, family: PlanFamily, cuts: Cuts) -> None:
        self.family, self.cuts = family, cuts
        self.spec, self.axis_sizes = family.spec, family.sizes
        self.layouts = {"A": self.spec.a, "B": self.spec.b, "C": self.spec.c}
        self.ranks: list[Coords] = [
            dict(zip(family.axes, places, strict=True))
            for places in itertools.product(*(range(size) for size in family.sizes.values()))
        ]
        self.nodes = [self.count_nodes(coords) for coords in self.ranks]
        k_axes = {axis for name in self.spec.k for axis in cuts[name]}
        replication = math.prod(size for axis, size in self.axis_sizes.items() if axis not in k_axes)
        self.total = sum(self.nodes) // replication

    def count_nodes(self, coords: Coords) -> int:
        """Partial results that a rank makes of every element of its brick."""
        chosen: list[list[int]] = []
        counts = []
        for name in self.spec.tree_indices:
            parts, number = part(self.cuts[name], self.axis_sizes, coords)
            dealt = shards(parts, self.family.order)
            chosen.append(dealt[number])
            counts.append(sum(map(len, dealt)))
        leaves = frozenset(int(np.ravel_multi_index(place, counts)) for place in itertools.product(*chosen))
        if len(leaves) == math.prod(counts):
            return 1
        return whole_subtrees(leaves, 0, 1 << math.prod(counts).bit_length())

    def brick(self, coords: Coords, sizes: dict[str, int]) -> dict[str, frozenset[int]]:
        found = {}
        for name in self.family.indices:
            parts, number = part(self.cuts[name], self.axis_sizes, coords)
            if name in self.spec.tree_indices and self.cuts[name]:
                dealt = shards(parts, self.family.order)
                slices = pieces(sizes[name], sum(map(len, dealt)))
                found[name] = frozenset().union(*(slices[leaf] for leaf in dealt[number]))
            else:
                found[name] = pieces(sizes[name], parts)[number]
        return found

    def owned(self, tensor: str, coords: Coords, sizes: dict[str, int]) -> list[frozenset[int]]:
        owned = []
        for index in self.layouts[tensor].indices:
            parts, number = part(index.axes, self.axis_sizes, coords)
            owned.append(pieces(sizes[index.name], parts)[number])
        return owned

    def prices(self, sizes: dict[str, int], item: ItemSizes) -> list[int]:
        """Bytes with a direct reduction, then with a two-phase one along each dimension of C."""
        wire = item.whole if self.total == 1 else item.partial
        names = self.layouts["C"].names
        replica_axes = tuple(axis for axis in self.family.axes if axis not in self.spec.c.axes)
        replicas = math.prod(self.axis_sizes[axis] for axis in replica_axes)
        bytes_ab = 0
        results = [0] * (1 + (len(names) if replicas > 1 else 0))
        for coords, nodes in zip(self.ranks, self.nodes, strict=True):
            brick = self.brick(coords, sizes)
            if all(brick[name] for name in names):
                for tensor, size in (("A", item.a), ("B", item.b)):
                    need = [brick[name] for name in self.layouts[tensor].names]
                    have = self.owned(tensor, coords, sizes)
                    both = math.prod(len(x & y) for x, y in zip(need, have, strict=True))
                    bytes_ab += (math.prod(map(len, need)) - both) * size
            own, made = self.owned("C", coords, sizes), [brick[name] for name in names]
            volume = math.prod(map(len, own))
            both = math.prod(len(x & y) for x, y in zip(own, made, strict=True))
            results[0] += (volume * self.total - both * nodes) * wire
            for variant in range(1, len(results)):
                place = variant - 1
                axes = tuple(axis for axis in self.cuts[names[place]] if axis in replica_axes)
                axes += tuple(axis for axis in replica_axes if axis not in axes)
                number = part(axes, self.axis_sizes, coords)[1]
                mine = np.array_split(sorted(own[place]), replicas)[number].tolist()
                sliced = [*own[:place], frozenset(mine), *own[place + 1 :]]
                part_volume = math.prod(map(len, sliced))
                both = math.prod(len(x & y) for x, y in zip(sliced, made, strict=True))
                results[variant] += (part_volume * self.total - both * nodes) * wire + (volume - part_volume) * item.c
        return [bytes_ab + result for result in results]


def every_schedule(family: PlanFamily) -> list[Counting]:
    """Each axis on each index that may be cut, in every order of the axes of one index."""
    spec = family.spec
    allowed = spec.batch + spec.m + spec.n + spec.tree_indices
    found = []
    for chosen in itertools.product(allowed, repeat=len(family.axes)):
        on = {name: [a for a, c in zip(family.axes, chosen, strict=True) if c == name] for name in family.indices}
        for orders in itertools.product(*(itertools.permutations(on[name]) for name in family.indices)):
            found.append(Counting(family, dict(zip(family.indices, orders, strict=True))))
    return found


# ---------------------------------------------------------------- the planner


def test_plan_is_the_cheapest_of_all_schedules(seed: int) -> None:
    rng = random.Random(seed)
    n_cases = 0
    for family in families(rng, 400):
        most = (9, 100, 20_000) if len(family.indices) < 4 else (9, 60, 200)
        for _ in range(25):
            sizes, item = draw_sizes(rng, family, rng.choice(most)), rng.choice(ITEMS)
            plan, everything = family.plan(sizes, item), family.all_plans(sizes, item)
            prices = [other.bytes_total for other in everything]
            assert plan.bytes_total == min(prices), f"{family.spec} {family.sizes} {sizes}"
            assert prices == sorted(prices)
            assert min(plan.bytes_a, plan.bytes_b, plan.bytes_c) >= 0
            n_cases += 1
    assert n_cases == 10_000


def test_prices_are_those_of_plain_counting(seed: int) -> None:
    rng = random.Random(seed)
    n_cases = n_prices = 0
    for family in families(rng, 170):
        if len(family.axes) > 2 and family.n_ranks > 4:
            continue  # many schedules, counted slowly
        schedules = every_schedule(family)
        for _ in range(12 if len(schedules) < 20 else 3):
            sizes, item = draw_sizes(rng, family, 12), rng.choice(ITEMS)
            named = dict(zip(family.indices, sizes, strict=True))
            counted = [price for schedule in schedules for price in schedule.prices(named, item)]
            title = f"{family.spec} {family.sizes} {named} {family.order} {item}"
            assert family.plan(sizes, item).bytes_total == min(counted), title
            assert sorted(plan.bytes_total for plan in family.all_plans(sizes, item)) == sorted(counted), title
            n_cases, n_prices = n_cases + 1, n_prices + len(counted)
    assert n_cases > 800
    assert n_prices > 5000
    print(f"{n_cases} cases, {n_prices} prices")


def test_subtrees_cover_their_leaves_with_the_fewest(seed: int) -> None:
    for first, stop in itertools.combinations(range(17), 2):
        spans = subtrees(first, stop)
        assert [leaf for start, size in spans for leaf in range(start, start + size)] == list(range(first, stop))
        for start, size in spans:
            assert size & (size - 1) == 0
            assert start % size == 0
        assert len(spans) == whole_subtrees(frozenset(range(first, stop)), 0, 32)


@pytest.mark.parametrize("order", ["tree", "canonical", "fast"])
def test_virtual_shards_are_dealt_whole(order: str) -> None:
    for parts in range(1, 13):
        cut = leaf_cut(parts, order)
        assert [list(range(i, j)) for i, j in itertools.pairwise(cut.first)] == shards(parts, order)


def test_new_shape_is_planned_quickly() -> None:
    family = next(families(random.Random(0), 1))
    begin = time.perf_counter()
    for size in range(100, 600):
        family.plan([size, size + 1, size + 2], ITEMS[0])
    microseconds = (time.perf_counter() - begin) / 500 * 1e6
    print(f"{microseconds:.0f} microseconds per plan")
    assert microseconds < 2000


# ---------------------------------------------------------------- closed forms


def per_rank(spec: str, axes: dict[str, int], m: int, k: int, n: int, dtype: str = "float32", **more: int) -> float:
    """Elements that a rank sends on average."""
    plan = plan_for(spec, {"m": m, "k": k, "n": n, **more}, axes, dtype=dtype)
    return plan.bytes_total / math.prod(axes.values()) / np.dtype(dtype).itemsize


@pytest.mark.parametrize("p", [2, 4, 8])
def test_named_strategies_move_what_their_papers_say(p: int) -> None:
    m, k, n = 64, 128, 96
    part = 1 - 1 / p
    assert per_rank("m k, k n/tp -> m n/tp", {"tp": p}, m, k, n) == 0
    assert per_rank("b/dp m k, k n/tp -> b/dp m n/tp", {"dp": 2, "tp": p}, m, k, n, b=6) == 0
    assert per_rank("m k, k n/tp -> m n", {"tp": p}, m, k, n) == part * m * n
    # k so long that moving the inputs instead would cost more.
    assert per_rank("m k/tp, k/tp n -> m n", {"tp": p}, m, 64 * k, n) == 2 * part * m * n
    assert per_rank("m k/tp, k/tp n -> m/tp n", {"tp": p}, m, 64 * k, n) == part * m * n
    # n so wide that moving B instead would cost more.
    assert per_rank("m/tp k, k n/tp -> m n/tp", {"tp": p}, m, k, 64 * n) == part * m * k


@pytest.mark.parametrize("p", [2, 4, 8])
def test_block_rows_take_the_lesser_of_ring_and_exchange(p: int) -> None:
    part = 1 - 1 / p
    for m, k, n in ((512, 64, 32), (16, 2048, 1024), (64, 64, 64), (8, 28672, 64)):
        ring, exchange = part * k * n, part * m * k / p + part * m * n
        assert per_rank("m/p k, k/p n -> m/p n", {"p": p}, m, k, n) == min(ring, exchange)


def test_decoding_moves_a_thousandth_of_the_weights() -> None:
    m, k, n, p = 8, 8192, 28672, 8
    moved = per_rank("m/p k, k/p n -> m/p n", {"p": p}, m, k, n)
    weights = (1 - 1 / p) * k * n
    assert moved == (1 - 1 / p) * (m * k / p + m * n)
    assert 900 < weights / moved < 1000


@pytest.mark.parametrize(("r", "c"), [(2, 2), (2, 4), (4, 2)])
def test_summa_keeps_the_dearest_operand_where_it_is(r: int, c: int) -> None:
    spec = "m/r k/c, k/r n/c -> m/r n/c"
    for m, k, n in ((256, 256, 256), (512, 64, 64), (64, 512, 64), (64, 64, 512), (32, 512, 512), (512, 512, 32)):
        a, b, result = m * k / (r * c), k * n / (r * c), m * n / (r * c)
        stationary_c = (c - 1) * a + (r - 1) * b
        stationary_a = (r - 1) * b * 1.0 + (c - 1) * result
        stationary_b = (c - 1) * a * 1.0 + (r - 1) * result
        moved = per_rank(spec, {"r": r, "c": c}, m, k, n)
        # With A stationary B's blocks go across as well as along, unless the grid is square; never fewer than this.
        assert moved <= stationary_c
        assert moved >= min(stationary_a, stationary_b, stationary_c) * 0.5
    # Long k: partial results are the least; short k: inputs are.
    assert plan_for(spec, {"m": 512, "k": 8, "n": 512}, {"r": r, "c": c}).bytes_c == 0
    assert plan_for(spec, {"m": 16, "k": 4096, "n": 4096}, {"r": r, "c": c}).bytes_b == 0
    assert plan_for(spec, {"m": 4096, "k": 4096, "n": 16}, {"r": r, "c": c}).bytes_a == 0


def test_layers_of_25d_halve_the_panels() -> None:
    n = 512
    flat = per_rank("m/r k/c, k/r n/c -> m/r n/c", {"r": 2, "c": 2}, n, n, n)
    deep = per_rank("m/r k/d*c, k/d*r n/c -> m/r n/c", {"r": 2, "c": 2, "d": 2}, n, n, n)
    # Half of SUMMA's panels, and an all-reduce of C over two layers: twice half a share of n x n over r x c.
    assert deep == flat / 2 + n * n / 4
    # With d fastest, half of the ranks hold nothing of the half of k that their layer multiplies.
    other = per_rank("m/r k/c*d, k/r*d n/c -> m/r n/c", {"r": 2, "c": 2, "d": 2}, n, n, n)
    assert other == deep + 2 * n * n / 16
