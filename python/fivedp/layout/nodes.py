"""Ranks on nodes: who takes in what comes from another node, and whether a row should cross to it once.

Between nodes a row is dear, inside a node it is nearly free: ranks read it where it lies. So a token may cross once to
every *node* that has any of its experts, to one rank there, its gateway, from which the others have it; on the way back
the gateway adds up what its node has of the token (DeepEP and HybridEP, 2025, on GPUs). The gateway of a rank on
another node is the rank of the same number there: every rank then takes in from as many others, in one message each,
and everybody knows the gateway from the numbers alone.

That is two journeys instead of one, and a second sum. `row_ways` gives both ways their price.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt

from fivedp.layout.experts import ExpertCut, uniform_subtrees

Counts = npt.NDArray[np.int64]
Indices = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Nodes:
    """On which node every rank is; nodes are numbered by their first rank."""

    of: tuple[int, ...]

    @classmethod
    def named(cls, names: Sequence[object]) -> Nodes:
        """From anything that tells nodes apart, for every rank."""
        first = {name: number for number, name in enumerate(dict.fromkeys(names))}
        return cls(tuple(first[name] for name in names))

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self.members)

    @cached_property
    def members(self) -> list[list[int]]:
        """The ranks of every node, rising."""
        found: list[list[int]] = [[] for _ in range(max(self.of) + 1)]
        for rank, node in enumerate(self.of):
            found[node].append(rank)
        return found

    def gateway(self, rank: int, node: int) -> int:
        """The rank of another node through which rows come from `rank` and go back to it."""
        there = self.members[node]
        return there[self.members[self.of[rank]].index(rank) % len(there)]

    def served(self, gateway: int) -> list[int]:
        """The ranks of other nodes whose gateway a rank is, rising."""
        mine = self.of[gateway]
        return [rank for rank, node in enumerate(self.of) if node != mine and self.gateway(rank, mine) == gateway]


def node_parts(cut: ExpertCut, nodes: Nodes) -> Indices:
    """(E,): the number of the largest subtree within the experts of one node to which an expert belongs."""
    return _numbered(tuple(nodes.of[owner] for owner in cut.owner.tolist()))


def seen_from(cut: ExpertCut, nodes: Nodes, rank: int) -> tuple[Indices, Indices]:
    """Where a rank's rows go, (E,): the owner on its own node, else the gateway; and as `subtree`, what comes back."""
    receiver = cut.owner.copy()
    node_of = np.array(nodes.of)[cut.owner]
    for node in set(range(nodes.count)) - {nodes.of[rank]}:
        receiver[node_of == node] = nodes.gateway(rank, node)
    # Of the gateway's node come the sums of all its ranks, so it is the node's subtrees that count.
    labels = np.where(node_of == nodes.of[rank], cut.owner, len(nodes.of) + node_of)
    return receiver, _numbered(tuple(labels.tolist()))


@lru_cache(maxsize=256)
def _numbered(labels: tuple[int, ...]) -> Indices:
    """The number of the largest subtree of one label, for every expert."""
    parts = np.empty(len(labels), np.int32)
    for number, (begin, end) in enumerate(uniform_subtrees(labels)):
        parts[begin:end] = number
    parts.flags.writeable = False
    return parts


@dataclass(frozen=True)
class Network:
    """What prices are made of.

    Attributes
    ----------
    link : float
        Bytes a second that a node sends, or receives; all its ranks share them.
    copy : float
        Bytes a second that one rank copies or adds up.
    hop : float
        Seconds until a message has come and Python has seen to it.
    flops : float
        Operations a second that one rank's products make.
    """

    link: float = 12.5e9
    copy: float = 2.5e9
    hop: float = 30e-6
    flops: float = 100e9


@dataclass(frozen=True)
class RowWay:
    """One way for rows to cross between nodes, there and back.

    Attributes
    ----------
    name : str
    rows : int
        That cross to another node in a dispatch, of all ranks.
    n_bytes : int
        Of them, with the sums that come back.
    seconds : float
        Of a dispatch and a combine, as far as the ways differ.
    """

    name: str
    rows: int
    n_bytes: int
    seconds: float


PER_RANK, PER_NODE = "once per rank", "once per node"


def row_ways(
    nodes: Nodes,
    per_rank: Counts,
    per_node: Counts,
    there: int,
    back: int,
    network: Network,
    *,
    in_place: bool = True,
) -> list[RowWay]:
    """The price of sending rows once to every rank and once to every node; take the first of the cheapest.

    The busiest node's link carries rows there and as many sums back, for sums of several subtrees are left out on both
    sides. Once per node the busiest gateway also reads the sums of its ranks and writes those of the node, and passes
    rows on where its node can't read them in place; and three more messages follow each other.

    Parameters
    ----------
    nodes : Nodes
    per_rank, per_node : (P, N) int64
        Rows that every rank has for the ranks of every other node, counted once per rank, and once per node.
    there, back : int
        Bytes of a row on its way to an expert, and of a sum on its way home.
    network : Network
    in_place : bool
        Whether ranks of a node share memory.
    """

    def on_link(counts: Counts) -> float:
        leaving = [int(counts[members].sum()) for members in nodes.members]
        busiest: int = max([*leaving, *counts.sum(axis=0).tolist()])
        return busiest * (there + back) / network.link

    busiest = 0
    for gateway, node in enumerate(nodes.of):
        served = nodes.served(gateway)
        inside, out = int(per_rank[served, node].sum()), int(per_node[served, node].sum())
        busiest = max(busiest, (inside + out) * back + (0 if in_place else inside * there))
    ways = (
        (PER_RANK, per_rank, on_link(per_rank) + 2 * network.hop),
        (PER_NODE, per_node, on_link(per_node) + busiest / network.copy + 5 * network.hop),
    )
    return [RowWay(name, int(n.sum()), int(n.sum()) * (there + back), seconds) for name, n, seconds in ways]


def cheapest(ways: Sequence[RowWay]) -> RowWay:
    """The way of fewest seconds; of equal ones the first."""
    return min(ways, key=lambda way: way.seconds)
