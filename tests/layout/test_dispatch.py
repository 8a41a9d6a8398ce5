"""The tables of a dispatch against their definition, slot by slot, over all ranks of a drawn mesh at once.

Sums are compared as expressions, not as numbers: a token's sum, partly made by owners and finished at home, must be the
very same nesting of additions that the tree of the experts prescribes for one rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fivedp.layout.dispatch import Incoming, Outgoing, SumTable, pair_type
from fivedp.layout.experts import ExpertCut, cut_experts

Array = Any
EXAMPLES = settings(max_examples=60)
RANKS = st.integers(1, 9)


@dataclass
class World:
    """The routing tables of every rank, and what each makes of them."""

    cut: ExpertCut
    experts: list[Array]
    weights: list[Array]

    def __post_init__(self) -> None:
        self.ranks = range(self.cut.n_ranks)
        tables = zip(self.experts, self.weights, strict=True)
        self.outgoing = [Outgoing(e, w, self.cut, rank) for rank, (e, w) in enumerate(tables)]
        self.incoming = [
            Incoming([out.pairs[out.of_owner[owner]] for out in self.outgoing], self.cut, owner) for owner in self.ranks
        ]

    def chosen(self, rank: int, token: int) -> dict[int, int]:
        """{expert: slot}, the experts rising."""
        row = self.experts[rank][token].tolist()
        return {expert: row.index(expert) for expert in sorted(row) if expert >= 0}

    def tokens(self, rank: int) -> range:
        return range(len(self.experts[rank]))

    def of_owner(self, rank: int, owner: int) -> list[tuple[int, int, Array]]:
        """(token, expert, weight) of the pairs that an owner has from a rank."""
        begin, end = self.cut.of(owner)
        return [
            (token, expert, self.weights[rank][token, slot])
            for token in self.tokens(rank)
            for expert, slot in self.chosen(rank, token).items()
            if begin <= expert < end
        ]


@st.composite
def worlds(draw: Any, ranks: st.SearchStrategy[int] = RANKS) -> World:
    """Any number of experts and ranks, ranks without tokens, empty slots, favourite experts, k up to E."""
    n_ranks = draw(ranks)
    n_experts = draw(st.one_of(st.integers(1, 12), st.sampled_from([16, 31, 32, 60, 64, 128, 300])))
    k = draw(st.integers(1, min(n_experts, 8)) | st.just(n_experts if n_experts <= 12 else 1))
    sizes = draw(st.lists(st.sampled_from([0, 0, 1, 2, 5, 17]), min_size=n_ranks, max_size=n_ranks))
    empty = draw(st.sampled_from([0.0, 0.0, 0.3, 1.0]))
    skew = draw(st.sampled_from([0.0, 0.0, 1.1, 20.0]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    favour = -skew * np.log(1 + np.arange(n_experts))
    experts, weights = [], []
    for size in sizes:
        # Gumbel's trick: the first k of a permutation in which frequent experts come first.
        order = np.argsort(-(favour + rng.gumbel(size=(size, n_experts))), axis=1)[:, :k].astype(np.int32)
        order[rng.random(order.shape) < empty] = -1
        experts.append(order)
        weights.append(rng.random((size, k)).astype(np.float32))
    return World(cut_experts(n_experts, n_ranks), experts, weights)


@EXAMPLES
@given(world=worlds())
def test_pairs_are_the_slots_in_use_by_token_and_expert(world: World) -> None:
    for rank, out in enumerate(world.outgoing):
        expected = [
            (token, expert, slot) for token in world.tokens(rank) for expert, slot in world.chosen(rank, token).items()
        ]
        assert [*zip(out.pairs["token"].tolist(), out.pairs["expert"].tolist(), out.slots.tolist(), strict=True)] == (
            expected
        )
        assert out.pairs.dtype == pair_type(np.float32)
        assert out.pairs["weight"].tolist() == [world.weights[rank][token, slot] for token, _, slot in expected]
        assert out.n_tokens == len(world.experts[rank])
        for owner in world.ranks:
            numbers = [i for i, (_, expert, _) in enumerate(expected) if world.cut.owner[expert] == owner]
            assert out.of_owner[owner].tolist() == numbers


@EXAMPLES
@given(world=worlds())
def test_a_token_goes_to_an_owner_once_and_comes_back_once_for_each_subtree(world: World) -> None:
    for rank, out in enumerate(world.outgoing):
        for owner in world.ranks:
            pairs = world.of_owner(rank, owner)
            assert out.rows[owner].tolist() == sorted({token for token, _, _ in pairs})
            assert out.rows[owner].dtype == np.int32
            assert out.n_returns[owner] == len({(token, world.cut.subtree[expert]) for token, expert, _ in pairs})
            assert len(out.rows[owner]) <= out.n_returns[owner] <= len(pairs)


@EXAMPLES
@given(world=worlds(ranks=st.sampled_from([1, 2, 4, 8])))
def test_on_powers_of_two_nothing_comes_back_that_did_not_go(world: World) -> None:
    """Where experts divide by the ranks, halving and the block rule agree, and an owner is one subtree."""
    n_experts = -(-world.cut.n_experts // world.cut.n_ranks) * world.cut.n_ranks
    world = World(cut_experts(n_experts, world.cut.n_ranks), world.experts, world.weights)
    for out in world.outgoing:
        assert out.n_returns == [len(rows) for rows in out.rows]


@EXAMPLES
@given(world=worlds())
def test_rows_of_an_owner_are_ordered_by_expert_rank_and_token(world: World) -> None:
    for owner, incoming in enumerate(world.incoming):
        experts = range(*world.cut.of(owner))
        tokens_from = [sorted({token for token, _, _ in world.of_owner(rank, owner)}) for rank in world.ranks]
        rows = [
            (expert, rank, token, tokens_from[rank].index(token), weight)
            for expert in experts
            for rank in world.ranks
            for token, other, weight in world.of_owner(rank, owner)
            if other == expert
        ]
        assert incoming.source.tolist() == [row[1] for row in rows]
        assert incoming.token.tolist() == [row[2] for row in rows]
        assert incoming.row.tolist() == [row[3] for row in rows]
        assert incoming.weights.tolist() == [row[4] for row in rows]
        assert incoming.counts.tolist() == [sum(row[0] == expert for row in rows) for expert in experts]
        assert incoming.offsets.tolist() == np.cumsum([0, *incoming.counts]).tolist()
        assert incoming.n_rows == [len(tokens) for tokens in tokens_from]
        for table, dtype in ((incoming.source, np.int32), (incoming.token, np.int32), (incoming.row, np.int32)):
            assert table.dtype == dtype
        places = {row[:3]: place for place, row in enumerate(rows)}
        for rank in world.ranks:
            expected = [places[expert, rank, token] for token, expert, _ in world.of_owner(rank, owner)]
            assert incoming.positions[rank].tolist() == expected


def added(leaves: dict[int, Any], begin: int, end: int) -> Any:
    """The expression of a sum: nested pairs, in the tree over [begin, end); None where nothing is there."""
    there = [expert for expert in leaves if begin <= expert < end]
    if len(there) < 2:
        return leaves[there[0]] if there else None
    half = begin + (end - begin + 1) // 2
    parts = [part for part in (added(leaves, begin, half), added(leaves, half, end)) if part is not None]
    return tuple(parts) if len(parts) == 2 else parts[0]


def carried_out(table: SumTable, arrays: dict[int, list[Any]], n_experts: int) -> list[Any]:
    """What a table says, on expressions. A weight is written at its leaf; one where nothing is to be done."""
    results = []
    for begin, end in zip(table.starts[:-1], table.starts[1:], strict=True):
        experts = table.experts[begin:end].tolist()
        assert experts == sorted(set(experts)), "experts of a sum must rise"
        leaves = {}
        for place in range(begin, end):
            leaf = arrays[int(table.source[place])][int(table.index[place])]
            weight = table.weights[place]
            leaves[int(table.experts[place])] = leaf if weight == 1 else (float(weight), leaf)
        results.append(added(leaves, 0, n_experts))
    return results


@EXAMPLES
@pytest.mark.parametrize("weighted", [True, False])
@given(world=worlds())
def test_sums_are_those_of_one_rank_to_the_last_bracket(world: World, weighted: bool) -> None:
    n_experts = world.cut.n_experts
    # A row of an owner is named by whose it is: (expert, rank, token).
    rows = []
    for owner, incoming in enumerate(world.incoming):
        experts = np.repeat(np.arange(*world.cut.of(owner)), incoming.counts).tolist()
        rows.append([*zip(experts, incoming.source.tolist(), incoming.token.tolist(), strict=True)])
    for rank, out in enumerate(world.outgoing):
        arrays = {0: rows[rank]}
        for owner in world.ranks:
            if owner != rank:
                table = world.incoming[owner].sums([rank], weighted)
                assert len(table.starts) == 1 + out.n_returns[owner]
                arrays[1 + owner] = carried_out(table, {0: rows[owner]}, n_experts)
        table = out.sums(world.incoming[rank].positions[rank], weighted)
        assert len(table.starts) == 1 + out.n_tokens
        found = carried_out(table, arrays, n_experts)
        for token in world.tokens(rank):
            leaves = {
                expert: (float(world.weights[rank][token, slot]), (expert, rank, token))
                if weighted
                else (expert, rank, token)
                for expert, slot in world.chosen(rank, token).items()
            }
            assert found[token] == added(leaves, 0, n_experts)


def test_tables_of_a_dispatch_by_hand() -> None:
    """Five experts on two ranks are 0 1 2 | 3 4, and one tree over both: ((0 1) 2) (3 4)."""
    cut = cut_experts(5, 2)
    experts = np.array([[4, 0], [2, -1], [-1, -1], [1, 0]], np.int32)
    weights = np.array([[0.5, 0.25], [2.0, 9.0], [9.0, 9.0], [3.0, 4.0]], np.float32)
    out = Outgoing(experts, weights, cut, 0)
    assert out.pairs.tolist() == [(0, 0, 0.25), (0, 4, 0.5), (1, 2, 2.0), (3, 0, 4.0), (3, 1, 3.0)]
    assert [rows.tolist() for rows in out.rows] == [[0, 1, 3], [0]]
    assert out.n_returns == [3, 1]
    nothing = np.empty(0, out.pairs.dtype)
    incoming = Incoming([out.pairs[out.of_owner[0]], nothing], cut, 0)
    assert incoming.counts.tolist() == [2, 1, 1]
    assert incoming.token.tolist() == [0, 3, 3, 1]
    assert incoming.row.tolist() == [0, 2, 2, 1]
    assert incoming.n_rows == [3, 0]
    home = out.sums(incoming.positions[0])
    assert home.starts.tolist() == [0, 2, 3, 3, 5]
    assert home.source.tolist() == [0, 2, 0, 0, 0]
    assert home.index.tolist() == [0, 0, 3, 1, 2]
    assert home.weights.tolist() == [0.25, 1.0, 2.0, 4.0, 3.0]
