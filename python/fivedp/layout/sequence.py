"""Which rank holds which token of a sequence, and which ranks' tokens see each other. Pure functions of sizes.

    contiguous   rank r holds the r-th block of the sequence
    striped      rank r holds positions r, r + p, r + 2p, ...
    zigzag       the sequence is cut into 2p blocks, rank r holds blocks r and 2p - 1 - r: under a causal mask every
                 rank has equally much to do

Blocks are those of `numpy.array_split`, so no length has to divide by anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fivedp.layout.shares import border, share

LAYOUTS = ("zigzag", "striped", "contiguous")
Indices = npt.NDArray[np.int64]


def token_indices(layout: str, length: int, parts: int, part: int) -> Indices:
    """The tokens that `part` of `parts` holds of a sequence of `length`, in the order of its share."""
    if layout == "striped":
        return np.arange(part, length, parts, dtype=np.int64)
    if layout == "contiguous":
        return np.arange(border(length, parts, part), border(length, parts, part + 1), dtype=np.int64)
    blocks = (part, 2 * parts - 1 - part)
    return np.concatenate(
        [np.arange(border(length, 2 * parts, b), border(length, 2 * parts, b + 1), dtype=np.int64) for b in blocks]
    )


@dataclass(frozen=True)
class Tokens:
    """Where the tokens of one rank are: position (int32) in their documents, and document (int32; all 0 if one)."""

    position: npt.NDArray[np.int32]
    document: npt.NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.position)


def place(indices: Indices, offsets: Sequence[int] | None) -> Tokens:
    """The tokens at `indices` of a sequence, or of packed documents that begin at `offsets` (and end at the last)."""
    if offsets is None:
        return Tokens(indices.astype(np.int32), np.zeros(len(indices), np.int32))
    edges = np.asarray(offsets, np.int64)
    document = np.searchsorted(edges, indices, side="right") - 1
    return Tokens((indices - edges[document]).astype(np.int32), document.astype(np.int32))


def join(parts: Sequence[Tokens]) -> Tokens:
    """The tokens of several ranks, one after the other."""
    return Tokens(np.concatenate([t.position for t in parts]), np.concatenate([t.document for t in parts]))


def reading_order(tokens: Tokens) -> Indices:
    """The permutation that sorts tokens by document and position; equal ones stay in their order."""
    return np.lexsort((tokens.position, tokens.document)).astype(np.int64)


def any_visible(queries: Tokens, keys: Tokens, causal: bool, window: int) -> bool:
    """Whether any of the queries sees any of the keys: same document, j <= i if causal, and within the window."""
    if not len(queries) or not len(keys):
        return False
    spread = np.int64(1) << 33  # more than any difference of positions
    ordered = np.sort(keys.document * spread + keys.position)
    i, base = queries.position.astype(np.int64), queries.document * spread
    low = i - window + 1 if window else np.zeros_like(i)
    high = i if causal else (i + window - 1 if window else np.full_like(i, spread // 2))
    first = np.searchsorted(ordered, base + np.maximum(low, 0), side="left")
    return bool((first < np.searchsorted(ordered, base + high, side="right")).any())


def who_sees(
    queries: tuple[Tokens, ...], keys: tuple[Tokens, ...], causal: bool, window: int
) -> tuple[tuple[bool, ...], ...]:
    """[r][s]: whether any of the queries of r sees any of the keys of s."""
    return tuple(tuple(any_visible(q, k, causal, window) for k in keys) for q in queries)


@dataclass(frozen=True)
class HeadCut:
    """The query heads [begin, end) of a rank, and the key heads [kv_begin, kv_end) that they read.

    By the block rule: key heads with their query heads, or query heads where there are fewer key heads than ranks.
    """

    begin: int
    end: int
    kv_begin: int
    kv_end: int

    @classmethod
    def of(cls, heads: int, kv_heads: int, parts: int, part: int) -> HeadCut:
        """The heads of `part` of `parts`."""
        group = heads // kv_heads
        if kv_heads >= parts:
            kv_begin, kv_end = share(kv_heads, parts, part)
            return cls(kv_begin * group, kv_end * group, kv_begin, kv_end)
        begin, end = share(heads, parts, part)
        return cls(begin, end, begin // group, -(-end // group) if end > begin else begin // group)

    def readers(self, group: int) -> list[int]:
        """For each query head, which of the rank's key heads it reads."""
        return [head // group - self.kv_begin for head in range(self.begin, self.end)]
