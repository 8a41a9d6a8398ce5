"""Which rows of a dispatch go where, and in which order they are summed on their way back.

A pair is a token and one of its experts. Pairs of a rank's tokens are numbered by token, then by expert. `Outgoing` is
what a rank knows of its own tokens: the pairs of each owner, the rows that the owner needs (a token once, however many
of its experts live there) and the rows that come back (one for each of the owner's subtrees that the token touches).
Over several nodes a gateway may take the owners' place on both ways (`layout.relay`). `Incoming` is what an owner knows
of everybody's pairs: the order of its rows (expert, source rank, source row), and the sums that it sends back.

Nothing is compared and nothing is searched: rows are placed by stable counting (NumPy's stable argsort of 16-bit
numbers is a radix sort), so their order is that of their definition.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from fivedp.layout.copies import Copies
from fivedp.layout.experts import BALANCED, ExpertCut
from fivedp.layout.nodes import Nodes, seen_from
from fivedp.layout.order import begins, stable_order, starts

Array = npt.NDArray[Any]
Indices = npt.NDArray[np.int32]


def pair_type(weight: Any) -> np.dtype[Any]:
    """A pair as it travels: the token's row on its rank, the expert, the weight in the type of sums."""
    return np.dtype([("token", np.int32), ("expert", np.int32), ("weight", weight)])


@dataclass(frozen=True)
class SumTable:
    """Rows to be added: out[i] is the sum of entries starts[i] <= p < starts[i + 1], in rising order of experts.

    Attributes
    ----------
    starts : (n + 1,) int64
    source, index : (entries,) int32
        Row `index` of array `source`.
    weights : (entries,)
    experts : (entries,) int32
        The expert, or any of the subtree's where the row is a sum over a subtree.
    """

    starts: npt.NDArray[np.int64]
    source: Indices
    index: Indices
    weights: Array
    experts: Indices


def _split(keys: Array, n: int) -> list[npt.NDArray[np.int64]]:
    """The places of each of n keys, rising."""
    return np.split(stable_order(keys), np.cumsum(np.bincount(keys, minlength=n))[:-1])


class Outgoing:
    """The pairs of one rank's tokens.

    Parameters
    ----------
    experts : (T, k) int32
        -1 for a slot that is empty or was dropped. No expert twice in a row.
    weights : (T, k)
    cut : ExpertCut
    rank : int
        This rank's number among the owners.

    Attributes
    ----------
    pairs : (n,) of `pair_type`
    slots : (n,) int32
        The slot of each pair in its row of `experts`.
    of_owner : list of int arrays
        For each rank, the numbers of the pairs that it computes: those of its experts, and what a copy makes at home.
    n_told : list of int
        For each owner, how many pairs it is told: all that are of its experts.
    rows : list of int32 arrays
        For each rank, the tokens that go there, rising: to their owners, or to the gateway of the owner's node.
    n_returns : list of int
        For each rank, how many rows it sends back.
    """

    def __init__(self, experts: Indices, weights: Array, cut: ExpertCut, rank: int) -> None:
        self.n_tokens, self.cut, self.rank = len(experts), cut, rank
        order = np.argsort(experts, axis=1, kind="stable")
        sorted_experts = np.take_along_axis(experts, order, axis=1)
        token, column = np.nonzero(sorted_experts >= 0)
        self.slots: Indices = order[token, column].astype(np.int32)
        self.pairs = np.empty(len(token), pair_type(weights.dtype))
        self.pairs["token"] = token
        self.pairs["expert"] = expert = sorted_experts[token, column]
        self.pairs["weight"] = weights[token, self.slots]
        owner = cut.owner[expert]
        self.of_owner = _split(owner, cut.n_ranks)
        self.n_told = [len(numbers) for numbers in self.of_owner]
        self._beyond = np.zeros(cut.n_ranks, np.bool_)
        self._copies: Copies | None = None
        self._moved = np.zeros(len(token), np.bool_)
        self._lead(owner, cut.subtree[expert])

    def through_gateways(self, nodes: Nodes) -> Outgoing:
        """The same pairs where rows go once to every other node, and come back from there once for its subtrees."""
        other = copy.copy(self)
        expert = self.pairs["expert"]
        receiver, part = seen_from(self.cut, nodes, self.rank)
        other._beyond = np.array(nodes.of) != nodes.of[self.rank]
        other._lead(receiver[expert], part[expert])
        return other

    def with_copies(self, copies: Copies) -> Outgoing:
        """The same pairs where some are computed by this rank, from copies of their experts; no others are told."""
        other = copy.copy(self)
        other._copies = copies
        other._moved = copies.moved(self.rank, self.pairs["expert"])
        other.of_owner = _split(other.computed_by, self.cut.n_ranks)
        other._lead(np.where(other._moved, self.rank, self._receiver), self._part)
        return other

    @property
    def computed_by(self) -> Array:
        """(n,): the rank that makes each pair's row."""
        return np.where(self._moved, self.rank, self.cut.owner[self.pairs["expert"]])

    def _lead(self, receiver: Array, part: Array) -> None:
        """Send the rows of each pair to a receiver, and await one row from it for every part that a token has there."""
        self._receiver, self._part = receiver, part
        self.rows: list[Indices] = []
        self.n_returns: list[int] = []
        # Counted for every receiver alone: the number of each pair's row, and of the row that comes back for it.
        self._row, self._returned = np.empty(len(receiver), np.int32), np.empty(len(receiver), np.int32)
        self._begins = np.empty(len(receiver), np.bool_)
        for numbers in _split(receiver, self.cut.n_ranks):
            tokens = self.pairs["token"][numbers]
            first = begins(tokens)
            self.rows.append(tokens[first])
            self._row[numbers] = np.cumsum(first) - 1
            first = self._sum_begins(numbers)
            self._begins[numbers] = first
            self._returned[numbers] = np.cumsum(first) - 1
            self.n_returns.append(int(np.count_nonzero(first)))

    def _sum_begins(self, numbers: Array) -> npt.NDArray[np.bool_]:
        """Which of the pairs that one receiver has are the first of a row that comes back."""
        tokens = self.pairs["token"]
        if self._copies is None or not self._moved.any() or self._moved[numbers].any():
            return begins(tokens[numbers], self._part[numbers])  # what a rank has itself does not come back
        beside = self._moved.copy()
        beside[numbers] = True
        all_of = np.flatnonzero(beside)
        expert = self.pairs["expert"][all_of]
        return self._copies.sum_begins(tokens[all_of], expert, self._part[all_of], self._moved[all_of])

    def pairs_for(self, owner: int) -> Array:
        """What an owner is told. One on another node can't see the token: it is told the row's number on the way."""
        numbers = self.of_owner[owner]
        pairs = self.pairs[numbers]
        if self._beyond[owner]:
            pairs["token"] = self._row[numbers]
        return pairs

    def sums(self, own_positions: Array, weighted: bool = True) -> SumTable:
        """How a token's row is added up at home: array 0 is this rank's own rows, array 1 + s what rank s sends.

        Parameters
        ----------
        own_positions : (own pairs,) int
            Where the rows of this rank's own pairs lie.
        weighted : bool
            Whether own rows are still to be weighted; those that come back are.
        """
        own = self._receiver == self.rank
        entries = np.flatnonzero(own | self._begins)
        is_own = own[entries]
        index = self._returned[entries]
        index[is_own] = own_positions
        weights = np.ones(len(entries), self.pairs["weight"].dtype)
        if weighted:
            weights[is_own] = self.pairs["weight"][self.of_owner[self.rank]]
        counts = np.bincount(self.pairs["token"][entries], minlength=self.n_tokens)
        starts = np.zeros(self.n_tokens + 1, np.int64)
        np.cumsum(counts, out=starts[1:])
        source = np.where(is_own, 0, 1 + self._receiver[entries]).astype(np.int32)
        return SumTable(starts, source, index, weights, np.ascontiguousarray(self.pairs["expert"][entries]))


@dataclass(frozen=True)
class WholeOrder:
    """All rows of an owner's experts in their order, some of which another rank has made.

    Attributes
    ----------
    offsets : (experts of this rank + 1,) int64
    source, index : (rows,) int32
        Row `index` of those that the owner has made, array 0, or of what rank s has made for it, array 1 + s, by expert
        and token.
    """

    offsets: npt.NDArray[np.int64]
    source: Indices
    index: Indices


class Incoming:
    """The pairs of one owner's experts, from the tokens of all ranks.

    Parameters
    ----------
    pairs : sequence of arrays of `pair_type`
        From each rank, by token and expert; of this rank's own tokens those that it computes.
    cut : ExpertCut
    rank : int
        The owner.
    copies : Copies, optional

    Attributes
    ----------
    told : list of arrays of `pair_type`
        The pairs from each rank.
    pairs : list of arrays of `pair_type`
        Those of them that this rank computes.
    counts : (experts of this rank,) int64
    offsets : (experts of this rank + 1,) int64
        Borders of the experts among the rows.
    n_own : int
        How many rows are of this rank's experts. Behind them are those of copies, all of this rank's tokens.
    copy_offsets : (copies used + 1,) int64
        Borders of the experts among these.
    source, token, row : (R,) int32
        Of every row: the rank it came from, the token's row there, and its number among the rows which that rank sends.
    weights : (R,)
    positions : list of int arrays
        For each rank, where the rows of its pairs lie.
    n_rows : list of int
        How many rows each rank sends.
    """

    def __init__(self, pairs: Sequence[Array], cut: ExpertCut, rank: int, copies: Copies | None = None) -> None:
        self.cut, self.rank, self.copies, self.told = cut, rank, copies, list(pairs)
        begin, end = cut.of(rank)
        used: list[int] = []
        self._moved = [np.zeros(len(p), np.bool_) for p in pairs]
        if copies is not None:
            used = copies.used_by(rank)
            for source in set(range(len(pairs))) - {rank}:
                self._moved[source] = copies.moved(source, pairs[source]["expert"])
        self.pairs = [p[~moved] if moved.any() else p for p, moved in zip(pairs, self._moved, strict=True)]
        lengths = [len(p) for p in self.pairs]
        joined = np.concatenate(self.pairs)
        rows = [np.cumsum(begins(p["token"])) - 1 for p in self.pairs]
        self.n_rows = [int(r[-1]) + 1 if len(r) else 0 for r in rows]
        local = joined["expert"] - begin
        if used:  # rows of copies stand behind all others
            places = np.concatenate([np.arange(begin, end), used])
            local = np.argsort(places)[np.searchsorted(np.sort(places), joined["expert"])]
        order = stable_order(local)
        counts = np.bincount(local, minlength=end - begin + len(used)).astype(np.int64)
        borders = np.zeros(len(counts) + 1, np.int64)
        np.cumsum(counts, out=borders[1:])
        self.counts, self.offsets = counts[: end - begin], borders[: end - begin + 1]
        self.n_own, self.copy_offsets = int(self.offsets[-1]), borders[end - begin :] - self.offsets[-1]
        self.source = np.repeat(np.arange(len(pairs), dtype=np.int32), lengths)[order]
        self.token = joined["token"][order]
        self.row = np.concatenate(rows).astype(np.int32)[order]
        self.weights = joined["weight"][order]
        positions = np.empty(len(joined), np.int32)
        positions[order] = np.arange(len(joined), dtype=np.int32)
        self.positions = np.split(positions, np.cumsum(lengths)[:-1])

    @cached_property
    def n_sums(self) -> list[int]:
        """How many rows go back to each rank."""
        return [int(np.count_nonzero(self._sum_begins(source))) for source in range(len(self.pairs))]

    def _sum_begins(self, source: int) -> npt.NDArray[np.bool_]:
        """Which of the pairs from a rank are the first of a row that goes back."""
        pairs, moved = self.told[source], self._moved[source]
        part = self.cut.subtree[pairs["expert"]]
        if self.copies is None or not moved.any():
            return begins(pairs["token"], part)
        return self.copies.sum_begins(pairs["token"], pairs["expert"], part, moved)

    def in_order(self) -> WholeOrder:
        """All rows of this rank's experts, those made elsewhere among them, by expert, source rank and token."""
        begin, end = self.cut.of(self.rank)
        own = [(begin <= p["expert"]) & (p["expert"] < end) for p in self.told]
        expert = np.concatenate([p["expert"][mine] for p, mine in zip(self.told, own, strict=True)]) - begin
        moved = np.concatenate([m[mine] for m, mine in zip(self._moved, own, strict=True)])
        source, index = np.zeros(len(expert), np.int32), np.empty(len(expert), np.int32)
        index[~moved] = np.concatenate(
            [places[mine] if len(places) == len(mine) else places
             for places, mine in zip(self.positions, own, strict=True)]
        )  # fmt: skip
        for rank, (pairs, there) in enumerate(zip(self.told, self._moved, strict=True)):
            if there.any():
                kept = np.empty(np.count_nonzero(there), np.int32)
                kept[stable_order(pairs["expert"][there])] = np.arange(len(kept))
                at = np.flatnonzero(moved & (np.repeat(np.arange(len(own)), [m.sum() for m in own]) == rank))
                source[at], index[at] = 1 + rank, kept
        order = stable_order(expert)
        borders = np.zeros(end - begin + 1, np.int64)
        np.cumsum(np.bincount(expert, minlength=end - begin), out=borders[1:])
        return WholeOrder(borders, source[order], index[order])

    def sums(self, sources: Sequence[int], weighted: bool = True) -> SumTable:
        """The rows that go back to ranks, one rank's after another's, as sums of this owner's rows (array 0)."""
        pairs = np.concatenate([self.pairs[source] for source in sources])
        first = np.concatenate([self._sum_begins(source) for source in sources])
        weights = np.ascontiguousarray(pairs["weight"]) if weighted else np.ones(len(pairs), pairs["weight"].dtype)
        return SumTable(
            starts(first),
            np.zeros(len(pairs), np.int32),
            np.concatenate([self.positions[source] for source in sources]),
            weights,
            np.ascontiguousarray(pairs["expert"]),
        )


# What a core multiplies in the time in which it copies a byte of a weight: about 100 GFLOP/s and 2.5 GB/s.
_FLOPS_PER_COPIED_BYTE = 40


def owners_to_help(loads: Sequence[int], n_experts: Sequence[int], width: int, hidden: int, itemsize: int) -> list[int]:
    """Which owners' products the other ranks of their node should share.

    An owner whose products others share must show them its experts' weights, so it copies them into shared memory; that
    pays where the time saved, that of the rows it has above the mean, is longer than the copying.

    Parameters
    ----------
    loads, n_experts : sequence of int
        Rows and experts of every owner.
    width, hidden, itemsize : int
        H, F and the bytes of an element.
    """
    mean = sum(loads) / len(loads)
    per_row, per_expert = 6 * width * hidden, 3 * width * hidden * itemsize
    return [
        owner
        for owner, (load, experts) in enumerate(zip(loads, n_experts, strict=True))
        if load > BALANCED * mean and (load - mean) * per_row > _FLOPS_PER_COPIED_BYTE * per_expert * min(experts, load)
    ]
