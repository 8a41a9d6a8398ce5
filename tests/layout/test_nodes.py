"""Nodes: gateways that share the work evenly, and the price of the two ways between nodes against its definition."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fivedp.layout.nodes import PER_NODE, PER_RANK, Network, Nodes, cheapest, row_ways

LABELS = st.lists(st.sampled_from("abcd"), min_size=1, max_size=12)


def test_nodes_are_numbered_by_their_first_rank() -> None:
    nodes = Nodes.named(["b", "a", "b", "c"])
    assert nodes.of == (0, 1, 0, 2)
    assert nodes.members == [[0, 2], [1], [3]]
    assert nodes.count == 3


@given(labels=LABELS)
def test_gateways_share_the_ranks_of_every_other_node_evenly(labels: list[str]) -> None:
    nodes = Nodes.named(labels)
    ranks = range(len(labels))
    served: list[set[int]] = [set() for _ in ranks]
    for rank in ranks:
        for node in set(range(nodes.count)) - {nodes.of[rank]}:
            gateway = nodes.gateway(rank, node)
            assert nodes.of[gateway] == node
            served[gateway].add(rank)
    assert [nodes.served(rank) for rank in ranks] == [sorted(others) for others in served]
    for members in nodes.members:
        for others in nodes.members:
            if members is not others:
                of_each = [len(served[gateway] & set(others)) for gateway in members]
                assert max(of_each) - min(of_each) <= 1


@given(labels=LABELS, seed=st.integers(0, 2**32 - 1), in_place=st.booleans())
def test_prices_are_those_of_the_busiest(labels: list[str], seed: int, in_place: bool) -> None:
    nodes, rng = Nodes.named(labels), np.random.default_rng(seed)
    per_rank = rng.integers(0, 1000, (len(labels), nodes.count))
    for rank, node in enumerate(nodes.of):
        per_rank[rank, node] = 0
    per_node = per_rank - rng.integers(0, 1000, per_rank.shape).clip(max=per_rank)
    network = Network(link=1e6, copy=3e6, hop=1e-3)
    ways = row_ways(nodes, per_rank, per_node, 10, 20, network, in_place=in_place)
    inside = [0.0] * len(labels)
    for way, counts, hops in zip(ways, (per_rank, per_node), (2, 5), strict=True):
        link = 0.0
        for node, members in enumerate(nodes.members):
            leaving = sum(int(counts[rank].sum()) for rank in members)
            arriving = sum(int(counts[rank, node]) for rank in range(len(labels)))
            link = max(link, 30 * leaving / 1e6, 30 * arriving / 1e6)
        if way.name == PER_NODE:
            for rank in range(len(labels)):
                for node in set(range(nodes.count)) - {nodes.of[rank]}:
                    sums = 20 * (int(per_rank[rank, node]) + int(per_node[rank, node]))
                    rows = 0 if in_place else 10 * int(per_rank[rank, node])
                    inside[nodes.gateway(rank, node)] += (sums + rows) / 3e6
            link += max(inside)
        assert way.seconds == pytest.approx(link + 1e-3 * hops)
        assert (way.rows, way.n_bytes) == (counts.sum(), 30 * counts.sum())
    assert [way.name for way in ways] == [PER_RANK, PER_NODE]


def test_few_rows_go_to_every_rank_and_many_to_every_node() -> None:
    """Two nodes of 8 with 8 of 256 experts: 3.26 rows of a token cross, or 1."""
    nodes = Nodes.named([0] * 8 + [1] * 8)
    per_rank, per_node = np.zeros((2, 16, 2), np.int64)
    for rank, node in enumerate(nodes.of):
        per_rank[rank, 1 - node], per_node[rank, 1 - node] = 326, 100

    def way(tokens: int, link: float) -> str:
        ways = row_ways(nodes, per_rank * tokens // 100, per_node * tokens // 100, 14336, 28672, Network(link=link))
        return cheapest(ways).name

    assert way(0, 12.5e9) == way(1, 12.5e9) == PER_RANK
    assert way(4096, 12.5e9) == way(4096, 1e9) == PER_NODE
    assert way(4096, 1e12) == PER_RANK
