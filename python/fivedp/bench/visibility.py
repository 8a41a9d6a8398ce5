"""Who sees whom, and who holds what, worked out once more from the definitions.

A benchmark that asked the library whose tokens are visible would agree with the library's mistakes. Every mask that is
measured lets a query see one interval of the sequence, so visibility is two numbers per query, and everything that is
counted (pairs, the load of a rank, the least that must move) follows from them. Layouts are cut with
`numpy.array_split`, as their definition says.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from fivedp.bench.cases.attention import Case, Mask

Indices = NDArray[np.int64]


def held(layout: str, length: int, ranks: int, rank: int) -> Indices:
    """The positions that `rank` holds, in the order of its share."""
    everything = np.arange(length, dtype=np.int64)
    if layout == "striped":
        return everything[rank::ranks]
    if layout == "contiguous":
        return np.array_split(everything, ranks)[rank]
    blocks = np.array_split(everything, 2 * ranks)
    return np.concatenate([blocks[rank], blocks[2 * ranks - 1 - rank]])


def offsets(mask: Mask, length: int) -> Indices | None:
    """Where packed documents of equal length begin, and the end of the last; None without documents."""
    if not mask.documents:
        return None
    return np.linspace(0, length, mask.documents + 1).astype(np.int64)


@dataclass(frozen=True)
class Sight:
    """Query i, the `first_query + i`-th token of the sequence, sees keys low[i] to high[i], both included."""

    low: Indices
    high: Indices
    first_query: int
    keys: int

    @classmethod
    def of(cls, case: Case) -> Sight:
        """The sight of the queries of a case; they are the last tokens of the sequence."""
        return _sight(case.mask, case.queries, case.keys)

    @property
    def pairs(self) -> int:
        """Visible pairs of a query and a key, for one head."""
        return int((self.high - self.low + 1).sum())

    def matrix(self, queries: Indices, keys: Indices) -> NDArray[np.bool_]:
        """Whether each of some queries sees each of some keys."""
        result: NDArray[np.bool_] = (keys >= self.low[queries, None]) & (keys <= self.high[queries, None])
        return result

    def seen_by(self, queries: Indices) -> NDArray[np.bool_]:
        """For every key, whether any of `queries` sees it."""
        edges = np.zeros(self.keys + 1, np.int64)
        np.add.at(edges, self.low[queries], 1)
        np.add.at(edges, self.high[queries] + 1, -1)
        return np.cumsum(edges[:-1]) > 0

    def counts(self, keys: Indices) -> Indices:
        """For every query, how many of `keys` it sees."""
        before = np.zeros(self.keys + 1, np.int64)
        before[keys + 1] = 1
        before = np.cumsum(before)
        result: Indices = before[self.high + 1] - before[self.low]
        return result


@lru_cache(maxsize=64)
def _sight(mask: Mask, queries: int, keys: int) -> Sight:
    position = np.arange(keys - queries, keys, dtype=np.int64)
    low, high = np.zeros_like(position), np.full_like(position, keys - 1)
    edges = offsets(mask, keys)
    if edges is not None:
        document = np.searchsorted(edges, position, side="right") - 1
        low, high = edges[document], edges[document + 1] - 1
    if mask.window:
        low = np.maximum(low, position - mask.window + 1)
        high = high if mask.causal else np.minimum(high, position + mask.window - 1)
    if mask.causal:
        high = np.minimum(high, position)
    return Sight(low, high, keys - queries, keys)
