"""Rows that copies of hot experts make at home: who makes which, what comes back, and in which brackets it is added."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fivedp.layout.copies import Copies, crossing_change
from fivedp.layout.dispatch import Incoming
from fivedp.layout.experts import cut_experts, middle, tree_paths
from fivedp.layout.hot_experts import ExpertSizes, Replica
from fivedp.layout.nodes import Nodes
from fivedp.layout.relay import Relay
from layout.dispatch_worlds import World, added, carried_out, node_maps, worlds

EXAMPLES = settings(max_examples=60, deadline=None)
WAYS = pytest.mark.parametrize("once_per_node", [False, True])
SIZES = ExpertSizes(width=5, hidden=7, matrices=3, itemsize=4, there=4, back=4)


class CopiedWorld:
    """What all ranks of a world make of drawn copies: any share of any rank's pairs, of other nodes' experts."""

    def __init__(self, world: World, nodes: Nodes, seed: int, once_per_node: bool) -> None:
        rng, cut = np.random.default_rng(seed), world.cut
        self.world, self.nodes, self.ranks = world, nodes, world.ranks
        taken, density = [], rng.choice([0.1, 0.5, 1.0])
        for expert in range(cut.n_experts):
            for node, members in enumerate(nodes.members):
                owner = int(cut.owner[expert])
                if node != nodes.of[owner] and rng.random() < density:
                    counts = [int((world.experts[rank] == expert).sum()) for rank in members]
                    n = [(r, int(rng.integers(0, c + 1))) for r, c in zip(members, counts, strict=True)]
                    taken.append(Replica(expert, owner, node, tuple((r, k) for r, k in n if k), 0.0, 0.0))
        self.copies = Copies(cut, nodes, SIZES, taken)
        self.plain = [out.through_gateways(nodes) if once_per_node else out for out in world.outgoing]
        self.views = [view.with_copies(self.copies) for view in self.plain]
        self.incoming = self._incoming(self.plain)
        # The same rows, called by their tokens.
        self.by_token = self._incoming(world.outgoing)
        self.relays: list[Relay] = []
        if once_per_node:
            crossing = np.zeros((cut.n_ranks, nodes.count), np.int64)
            for rank, view in enumerate(self.plain):
                for node in set(range(nodes.count)) - {nodes.of[rank]}:
                    crossing[rank, node] = len(view.rows[nodes.gateway(rank, node)])
            self.relays = [Relay(nodes, incoming, crossing) for incoming in self.incoming]
            for gateway, relay in enumerate(self.relays):
                mates = nodes.members[nodes.of[gateway]]
                relay.hear({mate: self.relays[mate].needs(gateway) for mate in mates})

    def _incoming(self, views: list[Any]) -> list[Incoming]:
        found = []
        for owner in self.ranks:
            pairs = [view.pairs_for(owner) for view in views]
            pairs[owner] = self.views[owner].pairs[self.views[owner].of_owner[owner]]
            found.append(Incoming(pairs, self.world.cut, owner, self.copies))
        return found

    def at_home(self, rank: int) -> set[tuple[int, int]]:
        """(token, expert) of the pairs that a rank computes from copies, counted one by one."""
        left, found = self.copies.at_home[rank].tolist(), set()
        for token in self.world.tokens(rank):
            for expert in self.world.chosen(rank, token):
                if left[expert]:
                    left[expert] -= 1
                    found.add((token, expert))
        return found

    def rows(self, rank: int) -> list[tuple[int, int, int]]:
        """(expert, rank, token) of all rows that a rank makes."""
        incoming = self.by_token[rank]
        experts = np.repeat(np.arange(*self.world.cut.of(rank)), incoming.counts).tolist()
        experts += np.repeat(self.copies.used_by(rank), np.diff(incoming.copy_offsets)).tolist()
        return [*zip(experts, incoming.source.tolist(), incoming.token.tolist(), strict=True)]


@given(n_experts=st.integers(1, 70))
def test_paths_tell_the_smallest_subtree_of_two_experts(n_experts: int) -> None:
    paths = tree_paths(n_experts)
    assert paths.tolist() == sorted(set(paths.tolist()))

    def depth(a: int, b: int) -> int:
        begin, end, steps = 0, n_experts, 0
        while True:
            half = middle(begin, end)
            if a < half <= b or end - begin == 1:
                return steps
            begin, end, steps = (begin, half, steps + 1) if b < half else (half, end, steps + 1)

    highest = max(0, n_experts - 1).bit_length()
    for a in range(n_experts):
        for b in range(a + 1, n_experts):
            assert int(paths[a] ^ paths[b]).bit_length() == highest - depth(a, b)


@EXAMPLES
@WAYS
@given(data=st.data(), world=worlds(), seed=st.integers(0, 2**32 - 1))
def test_rows_are_made_once_and_cross_only_where_they_are_needed(
    once_per_node: bool, data: Any, world: World, seed: int
) -> None:
    there = CopiedWorld(world, nodes := data.draw(node_maps(world)), seed, once_per_node)
    made = [row for rank in there.ranks for row in there.rows(rank)]
    assert sorted(made) == sorted(
        (expert, rank, token) for rank in there.ranks for token in world.tokens(rank)
        for expert in world.chosen(rank, token)
    )  # fmt: skip
    for rank, view in enumerate(there.views):
        at_home = there.at_home(rank)
        incoming = there.by_token[rank]
        assert {(token, expert) for expert, _, token in there.rows(rank)[incoming.n_own :]} == at_home
        crossing = np.zeros(nodes.count, int)
        for node, members in enumerate(nodes.members):
            far = node != nodes.of[rank]
            for member in members:
                owners = range(*world.cut.of(member))
                if far and once_per_node:
                    takes_in = member == nodes.gateway(rank, node)
                    owners = [e for m in members for e in range(*world.cut.of(m))] if takes_in else []
                tokens = {
                    token for token in world.tokens(rank) for expert in world.chosen(rank, token)
                    if expert in owners and (token, expert) not in at_home
                }  # fmt: skip
                if member != rank:
                    assert view.rows[member].tolist() == sorted(tokens)
                    crossing[node] += len(tokens) * far
        before = [sum(len(there.plain[rank].rows[m]) for m in members) for members in nodes.members]
        change = crossing_change(there.plain[rank], view, nodes)
        assert [n + c for node, (n, c) in enumerate(zip(before, change[0], strict=True)) if node != nodes.of[rank]] == [
            n for node, n in enumerate(crossing.tolist()) if node != nodes.of[rank]
        ]
    for gateway, relay in enumerate(there.relays):
        served = nodes.served(gateway)
        for number, rank in enumerate(served):
            slots, come = there.plain[rank].rows[gateway].tolist(), there.views[rank].rows[gateway].tolist()
            if relay.arriving is None:
                assert come == slots
            else:
                begin = relay.box_borders[gateway][number]
                assert [slots[place - begin] for place in relay.arriving[number].tolist()] == come
        box = [(rank, token) for rank in served for token in there.plain[rank].rows[gateway].tolist()]
        for mate in relay.mates:
            other = there.incoming[mate]
            needed = [box[place] for place in relay.passes_on[mate].tolist()]
            right = {(r, t) for _, r, t in there.rows(mate)[: other.n_own] if r in served}
            assert needed == sorted(right)
            assert there.relays[mate].n_needed[gateway] == len(needed)


@EXAMPLES
@WAYS
@pytest.mark.parametrize("weighted", [True, False])
@given(data=st.data(), world=worlds(), seed=st.integers(0, 2**32 - 1))
def test_sums_are_those_of_one_rank_to_the_last_bracket(
    weighted: bool, once_per_node: bool, data: Any, world: World, seed: int
) -> None:
    check_sums(CopiedWorld(world, data.draw(node_maps(world)), seed, once_per_node), weighted, once_per_node)


@WAYS
@pytest.mark.parametrize("labels", [(0, 1), (0, 0, 1), (0, 1, 0, 1), (0, 0, 0, 1, 1), (0, 0, 1, 1, 2, 2)])
def test_sums_of_many_tokens_with_many_experts(labels: tuple[int, ...], once_per_node: bool, seed: int) -> None:
    """Drawn worlds are small, and few of their tokens have three experts in one subtree."""
    rng, P = np.random.default_rng(seed), len(labels)
    for n_experts in (8, 13, 32):
        sizes = rng.integers(0, 40, P).tolist()
        experts = [np.argsort(rng.random((n, n_experts)), axis=1)[:, :6].astype(np.int32) for n in sizes]
        weights = [rng.random(table.shape).astype(np.float32) for table in experts]
        world = World(cut_experts(n_experts, P), experts, weights)
        check_sums(CopiedWorld(world, Nodes(labels), int(rng.integers(1 << 30)), once_per_node), True, once_per_node)


def check_sums(there: CopiedWorld, weighted: bool, once_per_node: bool) -> None:
    """What comes home adds up to the expressions of one rank, with the fewest sums on the way."""
    world, nodes = there.world, there.nodes
    n_experts, rows = world.cut.n_experts, [there.rows(rank) for rank in there.ranks]
    home: list[dict[int, list[Any]]] = [{0: rows[rank]} for rank in there.ranks]
    for owner in there.ranks:
        direct = there.relays[owner].mates if once_per_node else [r for r in there.ranks if r != owner]
        for rank in direct:
            table = there.incoming[owner].sums([rank], weighted)
            home[rank][1 + owner] = carried_out(table, {0: rows[owner]}, n_experts)
            assert len(home[rank][1 + owner]) == there.incoming[owner].n_sums[rank]
    for gateway, relay in enumerate(there.relays):
        if not (served := nodes.served(gateway)):
            continue
        arrays = {0: rows[gateway]}
        for mate in relay.mates:
            table = there.incoming[mate].sums(served, weighted)
            assert len(table.starts) - 1 == relay.n_sums_from(mate) == there.relays[mate].n_sums(gateway)
            arrays[1 + mate] = carried_out(table, {0: rows[mate]}, n_experts)
        sums, borders = carried_out(relay.sums(weighted), arrays, n_experts), relay.sum_borders
        for place, rank in enumerate(served):
            home[rank][1 + gateway] = sums[borders[place] : borders[place + 1]]
    for rank, view in enumerate(there.views):
        for source, sums in home[rank].items():
            assert not source or len(sums) == view.n_returns[source - 1]
        found = carried_out(view.sums(there.incoming[rank].positions[rank], weighted), home[rank], n_experts)
        at_home = there.at_home(rank)
        for token in world.tokens(rank):
            leaves = {
                expert: (float(world.weights[rank][token, slot]), (expert, rank, token))
                if weighted
                else (expert, rank, token)
                for expert, slot in world.chosen(rank, token).items()
            }
            assert found[token] == added(leaves, 0, n_experts)
        # No sum more than there must be: the largest subtrees of a receiver's part that no leaf at home lies in.
        for receiver in there.ranks:
            if receiver != rank:
                least = fewest_sums(there, rank, receiver, at_home, once_per_node)
                assert view.n_returns[receiver] == least


def fewest_sums(
    there: CopiedWorld, rank: int, receiver: int, at_home: set[tuple[int, int]], once_per_node: bool
) -> int:
    world, nodes = there.world, there.nodes
    owners = {receiver}
    if once_per_node and nodes.of[rank] != nodes.of[receiver]:
        is_gateway = nodes.gateway(rank, nodes.of[receiver]) == receiver
        owners = set(nodes.members[nodes.of[receiver]]) if is_gateway else set()

    def counted(token: int, chosen: list[int], begin: int, end: int) -> int:
        inside = [e for e in chosen if begin <= e < end and int(world.cut.owner[e]) in owners]
        if all((token, e) in at_home for e in inside):
            return 0
        whole = all(int(owner) in owners for owner in world.cut.owner[begin:end])
        if whole and not any((token, e) in at_home for e in inside):
            return 1
        half = middle(begin, end)
        return counted(token, chosen, begin, half) + counted(token, chosen, half, end)

    return sum(counted(t, [*world.chosen(rank, t)], 0, world.cut.n_experts) for t in world.tokens(rank))


@EXAMPLES
@WAYS
@given(data=st.data(), world=worlds(), seed=st.integers(0, 2**32 - 1))
def test_owners_have_all_rows_in_their_order(once_per_node: bool, data: Any, world: World, seed: int) -> None:
    there = CopiedWorld(world, data.draw(node_maps(world)), seed, once_per_node)
    for owner, right in enumerate(world.incoming):
        order, begin = there.incoming[owner].in_order(), world.cut.borders[owner]
        arrays = {0: there.rows(owner)}
        for rank in there.ranks:
            of_copies = there.rows(rank)[there.by_token[rank].n_own :]
            arrays[1 + rank] = [row for row in of_copies if world.cut.owner[row[0]] == owner]
            assert len(arrays[1 + rank]) == there.copies.n_kept(rank, owner)
        found = [arrays[s][i] for s, i in zip(order.source.tolist(), order.index.tolist(), strict=True)]
        experts = (begin + np.repeat(np.arange(len(right.counts)), right.counts)).tolist()
        assert found == [*zip(experts, right.source.tolist(), right.token.tolist(), strict=True)]
        assert order.offsets.tolist() == right.offsets.tolist()


@EXAMPLES
@given(data=st.data(), world=worlds(), seed=st.integers(0, 2**32 - 1))
def test_every_copy_comes_to_its_node_once_and_from_there_to_who_uses_it(data: Any, world: World, seed: int) -> None:
    there = CopiedWorld(world, nodes := data.draw(node_maps(world)), seed, False)
    copies = there.copies
    given_to = [(expert, receiver) for rank in there.ranks for expert, receiver in copies.given(rank)]
    assert len(given_to) == sum(map(len, copies.on_node))
    for rank in there.ranks:
        assert copies.taken_in(rank) == [expert for expert, receiver in given_to if receiver == rank]
        found = []
        for mate in nodes.members[nodes.of[rank]]:
            places = copies.passed_on(mate, rank)
            assert mate != rank or set(copies.used_by(rank)) >= {copies.taken_in(rank)[p] for p in places}
            found += [copies.taken_in(mate)[place] for place in places]
        assert sorted(found) == copies.used_by(rank)
