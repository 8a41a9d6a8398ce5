"""Routing tables of all ranks of a drawn mesh, what each rank makes of them, and sums as expressions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st

from fivedp.layout.dispatch import Incoming, Outgoing, SumTable
from fivedp.layout.experts import ExpertCut, cut_experts
from fivedp.layout.nodes import Nodes
from fivedp.layout.relay import Relay

Array = Any
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


class NodeWorld:
    """What all ranks of a world make of its nodes."""

    def __init__(self, world: World, nodes: Nodes) -> None:
        self.nodes, self.ranks = nodes, world.ranks
        self.views = [out.through_gateways(nodes) for out in world.outgoing]
        self.incoming = [
            Incoming([view.pairs_for(owner) for view in self.views], world.cut, owner) for owner in self.ranks
        ]
        self.crossing = np.zeros((world.cut.n_ranks, nodes.count), np.int64)
        for rank, view in enumerate(self.views):
            for node in set(range(nodes.count)) - {nodes.of[rank]}:
                self.crossing[rank, node] = len(view.rows[nodes.gateway(rank, node)])
        self.relays = [Relay(nodes, incoming, self.crossing) for incoming in self.incoming]
        for gateway, relay in enumerate(self.relays):
            relay.hear({mate: self.relays[mate].needs(gateway) for mate in self.mates(gateway)})

    def mates(self, rank: int) -> list[int]:
        """The ranks of a rank's node."""
        return self.nodes.members[self.nodes.of[rank]]


def node_maps(world: World) -> st.SearchStrategy[Nodes]:
    """Ranks on up to four nodes, which need not be neighbours."""
    n = world.cut.n_ranks
    return st.lists(st.integers(0, 3), min_size=n, max_size=n).map(Nodes.named)
