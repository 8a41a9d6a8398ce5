"""Copies of hot experts on other nodes: which pairs are computed where their tokens are.

A copy serves the tokens of its own node: every rank there computes rows of its own tokens, so these rows cross to no
other rank, and neither do their results. Who makes them follows from numbers that all ranks have: of the pairs of one
rank and one expert, in the order of tokens, the first so many are computed at home. The owner and the gateways are told
all pairs, as ever, and so know which ones are missing.

On the way back a row that was made at home is a leaf of the combine tree. The owner, and its node, may therefore add up
only what no such leaf stands between: of a token with such rows, one sum for each largest subtree that has none of
them. Of all other tokens sums are as before.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fivedp.layout.experts import ExpertCut, tree_paths
from fivedp.layout.hot_experts import ExpertSizes, Replica
from fivedp.layout.nodes import Counts, Nodes
from fivedp.layout.order import begins, stable_order

if TYPE_CHECKING:
    from fivedp.layout.dispatch import Outgoing

Array = npt.NDArray[Any]
Mask = npt.NDArray[np.bool_]


class Copies:
    """The copies of one dispatch.

    Parameters
    ----------
    cut : ExpertCut
    nodes : Nodes
    sizes : ExpertSizes
    taken : sequence of Replica

    Attributes
    ----------
    at_home : (P, E) int64
        Of every rank's pairs with every expert, how many are computed where the token is.
    """

    def __init__(self, cut: ExpertCut, nodes: Nodes, sizes: ExpertSizes, taken: Sequence[Replica]) -> None:
        self.cut, self.nodes, self.sizes = cut, nodes, sizes
        self.at_home: Counts = np.zeros((cut.n_ranks, cut.n_experts), np.int64)
        for replica in taken:
            for rank, n in replica.at_home:
                self.at_home[rank, replica.expert] = n

    # -- where copies are ------------------------------------------------------------------------------------------

    def used_by(self, rank: int) -> list[int]:
        """The experts of which a rank computes rows of its own tokens, rising."""
        return np.flatnonzero(self.at_home[rank]).tolist()

    @cached_property
    def on_node(self) -> list[list[int]]:
        """The experts that every node has copies of, rising."""
        return [np.flatnonzero(self.at_home[ranks].any(axis=0)).tolist() for ranks in self.nodes.members]

    def receiver(self, expert: int, node: int) -> int:
        """The rank of a node that takes in a copy from the owner."""
        return self.nodes.gateway(int(self.cut.owner[expert]), node)

    def taken_in(self, rank: int) -> list[int]:
        """The copies that a rank takes in for its node, rising."""
        node = self.nodes.of[rank]
        return [expert for expert in self.on_node[node] if self.receiver(expert, node) == rank]

    def given(self, rank: int) -> list[tuple[int, int]]:
        """What an owner sends: (expert, receiver), by expert."""
        mine = range(*self.cut.of(rank))
        return [
            (expert, self.receiver(expert, node))
            for expert in mine
            for node, there in enumerate(self.on_node)
            if expert in there
        ]

    def passed_on(self, rank: int, mate: int) -> list[int]:
        """Of what a rank has taken in, the places of what another rank of its node uses."""
        used = set(self.used_by(mate))
        return [place for place, expert in enumerate(self.taken_in(rank)) if expert in used]

    def n_kept(self, rank: int, owner: int) -> int:
        """How many rows of an owner's experts a rank computes."""
        return int(self.at_home[rank, slice(*self.cut.of(owner))].sum())

    # -- which pairs -----------------------------------------------------------------------------------------------

    def moved(self, rank: int, experts: Array) -> Mask:
        """Which pairs of a rank's tokens are computed at home.

        Parameters
        ----------
        experts : (n,) int
            Of all pairs that the rank has for the experts among them, in the order of its tokens.
        """
        quota = self.at_home[rank]
        if not quota.any():
            return np.zeros(len(experts), np.bool_)
        order, counts = stable_order(experts), np.bincount(experts, minlength=len(quota))
        place = np.empty(len(experts), np.int64)
        place[order] = np.arange(len(experts)) - np.repeat(np.cumsum(counts) - counts, counts)
        found: Mask = place < quota[experts]
        return found

    def sum_begins(self, token: Array, expert: Array, part: Array, moved: Mask) -> Mask:
        """Of the pairs that are not moved: where a sum begins.

        Parameters
        ----------
        token, expert : (n,) int
            Of pairs, by token, then by expert.
        part : (n,) int
            The number of the largest subtree that may be summed up in any case.
        moved : (n,) bool
        """
        stays = np.flatnonzero(~moved)
        first = begins(token[stays], part[stays])
        if len(stays) in (0, len(token)):
            return first
        paths = tree_paths(self.cut.n_experts)[expert]
        before, after = _nearest(moved)
        left, right = paths[np.roll(stays, 1)], paths[stays]
        for nearest in (before[stays], after[stays]):
            at = np.maximum(nearest, 0)
            same = (nearest >= 0) & (token[at] == token[stays])
            # The moved leaf lies within the smallest subtree that has both: no higher bit differs.
            first |= same & ~_lower(left ^ right, paths[at] ^ right)
        return first


def crossing_change(before: Outgoing, after: Outgoing, nodes: Nodes) -> Counts:
    """(2, N): by how much a rank's rows to every other node, and the sums that come back from it, are more."""
    found = np.zeros((2, nodes.count), np.int64)
    for node, members in enumerate(nodes.members):
        if node != nodes.of[before.rank]:
            found[0, node] = sum(len(after.rows[rank]) - len(before.rows[rank]) for rank in members)
            found[1, node] = sum(after.n_returns[rank] - before.n_returns[rank] for rank in members)
    return found


def _nearest(marked: Mask) -> tuple[Array, Array]:
    """For every place, the nearest marked one before it and after it; -1 for none."""
    n, places = len(marked), np.flatnonzero(marked)
    at = np.searchsorted(places, np.arange(n))
    around = np.concatenate([[-1], places, [-1]])
    return around[at], around[at + 1]


def _lower(a: Array, b: Array) -> Mask:
    """Whether the highest bit of a is lower than that of b."""
    found: Mask = (a < b) & (a < (a ^ b))
    return found
