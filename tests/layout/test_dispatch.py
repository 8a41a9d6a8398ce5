"""The tables of a dispatch against their definition, slot by slot, over all ranks of a drawn mesh at once.

Sums are compared as expressions, not as numbers: a token's sum, partly made by owners and finished at home, must be the
very same nesting of additions that the tree of the experts prescribes for one rank.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fivedp.layout.dispatch import Incoming, Outgoing, pair_type
from fivedp.layout.experts import cut_experts
from layout.dispatch_worlds import NodeWorld, World, added, carried_out, node_maps, worlds

Array = Any
EXAMPLES = settings(max_examples=60)


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


def parts_of(node_of_expert: list[int], node: int, begin: int, end: int) -> list[range]:
    """The largest subtrees within the experts of a node."""
    experts = range(begin, end)
    if all(node_of_expert[expert] == node for expert in experts):
        return [experts]
    if end - begin < 2:
        return []
    half = begin + (end - begin + 1) // 2
    return parts_of(node_of_expert, node, begin, half) + parts_of(node_of_expert, node, half, end)


@EXAMPLES
@given(data=st.data(), world=worlds())
def test_a_token_crosses_to_a_node_once(data: Any, world: World) -> None:
    there = NodeWorld(world, nodes := data.draw(node_maps(world)))
    node_of_expert = [nodes.of[owner] for owner in world.cut.owner.tolist()]
    for rank, view in enumerate(there.views):
        for node, members in enumerate(nodes.members):
            if node == nodes.of[rank]:
                assert [view.rows[m].tolist() for m in members] == [
                    world.outgoing[rank].rows[m].tolist() for m in members
                ]
                continue
            pairs = [(t, e) for t in world.tokens(rank) for e in world.chosen(rank, t) if node_of_expert[e] == node]
            gateway = nodes.gateway(rank, node)
            assert gateway in members
            parts = parts_of(node_of_expert, node, 0, world.cut.n_experts)
            for member in members:
                takes_in = member == gateway
                assert view.rows[member].tolist() == (sorted({t for t, _ in pairs}) if takes_in else [])
                back = {(t, next(i for i, part in enumerate(parts) if e in part)) for t, e in pairs}
                assert view.n_returns[member] == (len(back) if takes_in else 0)


@EXAMPLES
@given(data=st.data(), world=worlds())
def test_owners_find_their_rows_in_the_boxes_of_gateways(data: Any, world: World) -> None:
    there = NodeWorld(world, nodes := data.draw(node_maps(world)))
    boxes = [
        [(source, token) for source in nodes.served(gateway) for token in there.views[source].rows[gateway].tolist()]
        for gateway in there.ranks
    ]
    for rank, relay in enumerate(there.relays):
        incoming, mates = there.incoming[rank], there.mates(rank)
        # Some arrays are read in place, of others the rows that are needed have come as a message.
        near, far = (np.array(data.draw(st.lists(st.booleans(), min_size=len(there.ranks), max_size=len(there.ranks))))
                     for _ in range(2))  # fmt: skip
        near[rank] = far[rank] = True
        arrays: list[list[Any]] = [[]] * (2 * len(there.ranks))
        for mate in mates:
            rows = world.tokens(mate) if near[mate] else there.views[mate].rows[rank].tolist()
            arrays[mate] = [(mate, token) for token in rows]
            box, passed = boxes[mate], there.relays[mate].passes_on.get(rank)
            arrays[len(there.ranks) + mate] = box if far[mate] else [box[i] for i in passed.tolist()]
            assert relay.n_needed[mate] == (len(passed) if passed is not None else len({*relay.needs(mate)["row"]}))
            assert relay.box_borders[mate][-1] == len(box)
        index = np.where(near[incoming.source], incoming.token, incoming.row)
        source, index = relay.places(incoming.source, index, far)
        assert source.dtype == index.dtype == np.int32
        right = world.incoming[rank]
        found = [arrays[s][i] for s, i in zip(source.tolist(), index.tolist(), strict=True)]
        assert found == [*zip(right.source.tolist(), right.token.tolist(), strict=True)]


@EXAMPLES
@pytest.mark.parametrize("weighted", [True, False])
@given(data=st.data(), world=worlds())
def test_sums_of_a_node_are_those_of_one_rank_to_the_last_bracket(data: Any, world: World, weighted: bool) -> None:
    there = NodeWorld(world, nodes := data.draw(node_maps(world)))
    n_experts = world.cut.n_experts
    rows = []
    for owner, incoming in enumerate(world.incoming):
        experts = np.repeat(np.arange(*world.cut.of(owner)), incoming.counts).tolist()
        rows.append([*zip(experts, incoming.source.tolist(), incoming.token.tolist(), strict=True)])
    home: list[dict[int, list[Any]]] = [{0: rows[rank]} for rank in there.ranks]
    for gateway, relay in enumerate(there.relays):
        for mate in relay.mates:
            table = there.incoming[gateway].sums([mate], weighted)
            home[mate][1 + gateway] = carried_out(table, {0: rows[gateway]}, n_experts)
        if not (served := nodes.served(gateway)):
            continue
        arrays = {0: rows[gateway]}
        for mate in relay.mates:
            table = there.incoming[mate].sums(served, weighted)
            assert len(table.starts) - 1 == relay.n_sums_from(mate) == there.relays[mate].n_sums(gateway)
            arrays[1 + mate] = carried_out(table, {0: rows[mate]}, n_experts)
        sums, borders = carried_out(relay.sums(weighted), arrays, n_experts), relay.sum_borders
        assert len(sums) == borders[-1]
        for place, rank in enumerate(served):
            home[rank][1 + gateway] = sums[borders[place] : borders[place + 1]]
            assert len(home[rank][1 + gateway]) == there.views[rank].n_returns[gateway]
    for rank, view in enumerate(there.views):
        found = carried_out(view.sums(there.incoming[rank].positions[rank], weighted), home[rank], n_experts)
        alone = world.outgoing[rank]
        for token in world.tokens(rank):
            leaves = {
                expert: (float(world.weights[rank][token, slot]), (expert, rank, token))
                if weighted
                else (expert, rank, token)
                for expert, slot in world.chosen(rank, token).items()
            }
            assert found[token] == added(leaves, 0, n_experts)
        assert [out.tolist() for out in alone.of_owner] == [out.tolist() for out in view.of_owner]


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
