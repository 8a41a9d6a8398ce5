"""Rows that cross to a node once: what its gateways pass on, and what they add up on the way back.

Every gateway has a box: the rows of the ranks that it serves, one rank's after another's. An owner knows from its pairs
the number of each row in the box (`Outgoing.pairs_for`) and tells the gateway which ones it needs and for which
experts. From that the gateway knows both ways: what to pass on, and how the owners' sums of a token make that of the
node. Owners of a node have rising experts, so its sums follow the same tree: a node whose experts are one subtree
sends one row back for a token, any other node one for each of its subtrees.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from fivedp.layout.dispatch import Incoming, Indices, SumTable
from fivedp.layout.nodes import Counts, Nodes, node_parts
from fivedp.layout.order import begins, stable_order, starts

Array = npt.NDArray[Any]
# What an owner tells a gateway of a pair: the row in the gateway's box, and the expert.
NEED = np.dtype([("row", np.int32), ("expert", np.int32)])


class Relay:
    """What a rank does for rows from other nodes, as an owner and as a gateway.

    Parameters
    ----------
    nodes : Nodes
    incoming : Incoming
        Of this rank.
    crossing : (P, N) int64
        Rows that every rank sends to every node.

    Attributes
    ----------
    mates : list of int
        The other ranks of this node, the next one first.
    served : dict of int to list of int
        For each rank of this node, the ranks whose gateway it is.
    box_borders : dict of int to list of int
        For each rank of this node, where the rows of those that it serves begin in its box, and the end.
    n_needed : dict of int to int
        For each rank of this node, how many rows of its box this rank needs.
    """

    def __init__(self, nodes: Nodes, incoming: Incoming, crossing: Counts) -> None:
        self.incoming, self.rank, self.nodes = incoming, incoming.rank, nodes
        node = nodes.of[self.rank]
        here = nodes.members[node]
        place = here.index(self.rank)
        self.mates = here[place + 1 :] + here[:place]
        self.served = {gateway: nodes.served(gateway) for gateway in here}
        self.box_borders = {g: [0, *np.cumsum(crossing[ranks, node]).tolist()] for g, ranks in self.served.items()}
        needed = {g: np.cumsum([0, *(incoming.n_rows[rank] for rank in ranks)]) for g, ranks in self.served.items()}
        self.n_needed = {gateway: int(borders[-1]) for gateway, borders in needed.items()}
        # For every rank of another node: its gateway, its first row there, and the first among those this rank needs.
        self._gateway, self._in_box, self._in_needed = np.full((3, len(nodes.of)), -1, np.int32)
        for gateway, ranks in self.served.items():
            self._gateway[ranks] = gateway
            self._in_box[ranks] = self.box_borders[gateway][:-1]
            self._in_needed[ranks] = needed[gateway][:-1]
        self.passes_on: dict[int, Indices] = {}
        """As a gateway: the rows of the box that each of the others needs, rising."""
        self.arriving: list[Indices] | None = None
        """As a gateway: the rows of the box that come from each of the ranks served; None where all of them do."""

    # -- as an owner -----------------------------------------------------------------------------------------------

    def needs(self, gateway: int) -> Array:
        """What this rank tells a gateway, of `NEED`, one for every pair that it was told, by row and expert."""
        parts = []
        for rank in self.served[gateway]:
            pairs = self.incoming.told[rank]
            part = np.empty(len(pairs), NEED)
            part["row"], part["expert"] = pairs["token"] + self._in_box[rank], pairs["expert"]
            parts.append(part)
        return np.concatenate([np.empty(0, NEED), *parts])

    def n_sums(self, gateway: int) -> int:
        """How many sums this rank sends to a gateway."""
        return sum(self.incoming.n_sums[rank] for rank in self.served[gateway])

    def places(
        self, source: Indices, index: Indices, whole: npt.NDArray[np.bool_], part: slice = slice(None)
    ) -> tuple[Indices, Indices]:
        """Where this rank's rows are: tables (array, row) in which array P + g is what gateway g has for this rank.

        Parameters
        ----------
        source, index : (rows of the part,) int32
            The same for rows that come straight from their ranks.
        whole : (P,) bool
            Of every rank of this node, whether its array is its whole box, read in place; else the needed rows alone.
        part : slice
            Of this rank's rows.
        """
        incoming, gateway = self.incoming, self._gateway[source]
        far = gateway >= 0
        in_box = self._in_box[source] + incoming.token[part]
        in_needed = self._in_needed[source] + incoming.row[part]
        found = np.where(whole[gateway], in_box, in_needed)
        moved = (np.where(far, len(self.nodes.of) + gateway, source), np.where(far, found, index))
        return moved[0].astype(np.int32), moved[1].astype(np.int32)

    # -- as a gateway ----------------------------------------------------------------------------------------------

    def n_pairs(self, counts: Counts, owner: int) -> int:
        """How many needs an owner of this node has of this rank, from the pairs (from, to) of all ranks."""
        return int(counts[self.served[self.rank], owner].sum())

    def hear(self, needs: Mapping[int, Array]) -> None:
        """Take in what every rank of this node, this one included, needs of the box."""
        cut, copies = self.incoming.cut, self.incoming.copies
        self.passes_on = {}
        self._n_sums_from: dict[int, int] = {}
        rows, experts, sources, indices, own, moves, needed = [], [], [], [], [], [], []
        for owner in sorted(needs):
            row, expert = needs[owner]["row"], needs[owner]["expert"]
            moved = self._moved(row, expert)
            first = np.ones(int(np.count_nonzero(~moved)), np.bool_)
            needed.append(row[~moved])
            if owner != self.rank:
                self.passes_on[owner] = np.ascontiguousarray(needed[-1][begins(needed[-1])])
                part = cut.subtree[expert]
                first = begins(row, part) if copies is None else copies.sum_begins(row, expert, part, moved)
                self._n_sums_from[owner] = int(np.count_nonzero(first))
            # One entry for each of the owner's sums; and what was made elsewhere, which cuts the node's sums as well.
            entry = moved.copy()
            entry[~moved] = first
            number = np.cumsum(entry & ~moved) - 1
            n = int(np.count_nonzero(entry))
            rows.append(row[entry])
            experts.append(expert[entry])
            sources.append(np.full(n, 0 if owner == self.rank else 1 + owner, np.int32))
            indices.append(number[entry].astype(np.int32))
            own.append(np.full(n, owner == self.rank))
            moves.append(moved[entry])
        arrays = [np.concatenate(parts) for parts in (rows, experts, sources, indices, own, moves)]
        order = stable_order(arrays[0])  # experts rise with the owners, so a row's stay in their order
        row, expert, source, index, is_own, moved = (array[order] for array in arrays)
        part = node_parts(cut, self.nodes)[expert]
        stays = ~moved
        self._sum_begins = begins(row, part) if copies is None else copies.sum_begins(row, expert, part, moved)
        self._row, self._expert = row[stays], np.ascontiguousarray(expert[stays])
        self._source, self._index, self._is_own = source[stays], index[stays], is_own[stays]
        if copies is not None and copies.at_home[self.served[self.rank]].any():
            come, borders = np.unique(np.concatenate(needed)), self.box_borders[self.rank]
            self.arriving = np.split(come, np.searchsorted(come, borders[1:-1]))

    def _moved(self, row: Indices, expert: Indices) -> npt.NDArray[np.bool_]:
        """Which of an owner's needs are computed where their tokens are."""
        copies, borders = self.incoming.copies, self.box_borders[self.rank]
        if copies is None:
            return np.zeros(len(row), np.bool_)
        cuts = [0, *np.searchsorted(row, borders[1:-1]).tolist(), len(row)]
        parts = [
            copies.moved(rank, expert[begin:end])
            for rank, begin, end in zip(self.served[self.rank], cuts, cuts[1:], strict=False)
        ]
        return np.concatenate([np.zeros(0, np.bool_), *parts])

    def n_sums_from(self, owner: int) -> int:
        """How many sums another owner of this node sends to this gateway."""
        return self._n_sums_from[owner]

    @cached_property
    def sum_borders(self) -> list[int]:
        """Where the sums for each of the ranks that this one serves begin, and the end."""
        rows = self._row[self._sum_begins]
        return [int(place) for place in np.searchsorted(rows, self.box_borders[self.rank])]

    def sums(self, weighted: bool = True) -> SumTable:
        """How the sums that go back are made: array 0 is this rank's own rows, array 1 + s the sums of rank s."""
        ranks = self.served[self.rank]
        pairs = np.concatenate([self.incoming.pairs[rank] for rank in ranks])
        weights = np.ones(len(self._row), pairs["weight"].dtype)
        if weighted:
            weights[self._is_own] = pairs["weight"][self._index[self._is_own]]
        index = self._index.copy()
        positions = np.concatenate([self.incoming.positions[rank] for rank in ranks])
        index[self._is_own] = positions[index[self._is_own]]
        return SumTable(starts(self._sum_begins), self._source, index, weights, self._expert)
