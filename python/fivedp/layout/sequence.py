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
Span = tuple[int, int]
Spans = tuple[tuple[Span, ...], ...]


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


@dataclass(frozen=True, eq=False)
class Tokens:
    """Where the tokens of one rank are: position (int32) in their documents, and document (int32; all 0 if one).

    Two are equal only where they are one object, so what follows from them can be looked up by them.
    """

    position: npt.NDArray[np.int32]
    document: npt.NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.position)

    def part(self, span: Span) -> Tokens:
        """The tokens of a range."""
        return self if span == (0, len(self)) else Tokens(self.position[slice(*span)], self.document[slice(*span)])


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


_SPREAD = np.int64(1) << 33  # more than any difference of positions


def _numbers(tokens: Tokens) -> Indices:
    """A number for each token, sorted: positions of different documents are far apart."""
    return np.sort(tokens.document * _SPREAD + tokens.position)


def _seen_span(queries: Indices, keys: Tokens, causal: bool, window: int) -> Span:
    if not len(queries) or not len(keys):
        return (0, 0)
    window = min(window, int(_SPREAD) // 2)  # a wider one must not reach into the next document
    # The positions of the queries that see a key, both ends included.
    j = keys.position.astype(np.int64)
    low = j if causal else (np.maximum(j - window + 1, 0) if window else np.zeros_like(j))
    high = j + window - 1 if window else np.full_like(j, _SPREAD // 2)
    base = keys.document * _SPREAD
    first = np.searchsorted(queries, base + low, side="left")
    seen = np.flatnonzero(first < np.searchsorted(queries, base + high, side="right"))
    return (int(seen[0]), int(seen[-1]) + 1) if len(seen) else (0, 0)


def seen_spans(queries: Sequence[Tokens], keys: Sequence[Tokens], causal: bool, window: int) -> Spans:
    """[r][s]: the shortest range [begin, end) of the keys of s that holds all that queries of r see; (0, 0) for none.

    A query sees the keys of its document with j <= i if causal, and within the window.
    """
    sorted_queries = [_numbers(q) for q in queries]
    return tuple(tuple(_seen_span(numbers, k, causal, window) for k in keys) for numbers in sorted_queries)


def seeing_spans(queries: Sequence[Tokens], keys: Sequence[Tokens], causal: bool, window: int) -> Spans:
    """[s][r]: the shortest range [begin, end) of the queries of r that holds all that see keys of s; (0, 0) for none.

    Query i sees key j exactly where a query at -j sees a key at -i, so this is `seen_spans` in the mirror.
    """
    return seen_spans([_mirrored(k) for k in keys], [_mirrored(q) for q in queries], causal, window)


def _mirrored(tokens: Tokens) -> Tokens:
    """The tokens with the last position first; positions, which end before 2^31 - 1, stay positive."""
    return Tokens(np.iinfo(np.int32).max - tokens.position, tokens.document)


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
