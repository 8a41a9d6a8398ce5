"""What travels in a ring of attention: keys in the forward, keys or queries in the backward. Pure functions of sizes.

In step t the queries of rank r meet the keys of rank r - t. One of the two has travelled; with D elements in a query or
key, Dv in a value, b bytes an element and s bytes a sum, a token of it takes

    forward, keys travel        k, v there                                  H_kv (D + Dv) b
    backward, keys travel       k, v there, dk, dv home                     H_kv (D + Dv) (b + s)
    backward, queries travel    q, do, lse, delta there, dq home            H ((D + Dv) b + 2 s + D s)

Only the range of a share travels that has to do with the other rank's tokens. The pairs of the two are computed where
what stays is. In the backward travels what is fewer bytes over all ranks; but keys where queries would leave one rank
with far more to do, as where one holds most of the keys. That follows from what every rank knows, so all come to the
same decision without a message.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from fivedp.layout.sequence import Span, Spans, Tokens, seeing_spans, seen_spans

Travellers = Literal["keys", "queries"]
# Queries are seldom less than two thirds of the bytes; for that much a rank may get a quarter more to do, not more.
_MORE_WORK = 5 / 4


@dataclass(frozen=True)
class Sizes:
    """An attention but for its tokens; `size` and `v_size` are D and Dv, `itemsize` the bytes of an element.

    Its properties are bytes that one token takes on its way, in all of the batch.
    """

    batch: int
    heads: int
    kv_heads: int
    size: int
    v_size: int
    itemsize: int

    @property
    def sum_bytes(self) -> int:
        """Of one element of lse or of a gradient on its way: float32, float64 for float64."""
        return max(4, self.itemsize)

    @property
    def keys_forward(self) -> int:
        """k and v there."""
        return self.batch * self.kv_heads * (self.size + self.v_size) * self.itemsize

    @property
    def keys_backward(self) -> int:
        """k and v there, dk and dv home."""
        return self.batch * self.kv_heads * (self.size + self.v_size) * (self.itemsize + self.sum_bytes)

    @property
    def queries_backward(self) -> int:
        """q, do, lse and delta there, dq home."""
        there = (self.size + self.v_size) * self.itemsize + 2 * self.sum_bytes
        return self.batch * self.heads * there + self.queries_home

    @property
    def queries_home(self) -> int:
        """dq home."""
        return self.batch * self.heads * self.size * self.sum_bytes


@dataclass(frozen=True, eq=False)
class Visibility:
    """Where the tokens of every member of a ring are, and whose see each other; worked out once, when first asked."""

    queries: tuple[Tokens, ...]
    keys: tuple[Tokens, ...]
    causal: bool
    window: int

    @cached_property
    def seen(self) -> Spans:
        """[r][s]: the range of the keys of s that queries of r see."""
        return seen_spans(self.queries, self.keys, self.causal, self.window)

    @cached_property
    def seeing(self) -> Spans:
        """[s][r]: the range of the queries of r that see keys of s."""
        return seeing_spans(self.queries, self.keys, self.causal, self.window)

    @cached_property
    def n_seen(self) -> int:
        """Keys that travel to other members, counted once for each of them."""
        return _foreign(self.seen)

    @cached_property
    def n_seeing(self) -> int:
        """Queries that travel to other members where those do, counted once for each of them."""
        return _foreign(self.seeing)

    @cached_property
    def most_pairs(self) -> tuple[int, int]:
        """The most that a member computes where keys travel, and where queries do: pairs of ranges that travel."""
        everyone = range(len(self.keys))
        pairs = [[_length(self.seen[r][s]) * _length(self.seeing[s][r]) for s in everyone] for r in everyone]
        return max(map(sum, pairs)), max(map(sum, zip(*pairs, strict=True)))


@dataclass(frozen=True)
class Travel:
    """One pass of a ring: the range of the tokens of member s that goes to member r is `spans[r][s]`.

    `n_bytes` is what all members send, there and home.
    """

    what: Travellers
    spans: Spans
    n_bytes: int

    @property
    def stride(self) -> int:
        """How far on a block goes in a step: keys to the next rank, queries to the one before it.

        So the same pairs of ranks meet in the same step, whichever of them travels; a layout that gives every rank
        equally much to do in each step of the one does so in the other.
        """
        return 1 if self.what == "keys" else -1


def forward_travel(visibility: Visibility, sizes: Sizes) -> Travel:
    """What travels in the forward: keys."""
    return Travel("keys", visibility.seen, visibility.n_seen * sizes.keys_forward)


def backward_travel(visibility: Visibility, sizes: Sizes) -> Travel:
    """What travels in the backward: queries where they are fewer bytes and the work stays as even, else keys."""
    keys = Travel("keys", visibility.seen, visibility.n_seen * sizes.keys_backward)
    queries = Travel("queries", visibility.seeing, visibility.n_seeing * sizes.queries_backward)
    with_keys, with_queries = visibility.most_pairs
    return queries if queries.n_bytes < keys.n_bytes and with_queries <= _MORE_WORK * with_keys else keys


def _length(span: Span) -> int:
    return span[1] - span[0]


def _foreign(spans: Spans) -> int:
    return sum(_length(span) for r, row in enumerate(spans) for s, span in enumerate(row) if r != s)
