"""Attention on this rank: its tokens, its call, its price in bytes, its load, its check.

Planned bytes are those of `layout.explain_attention` (and of the exchanges that it does not price: canonical order and
decode, written out below). The least is what this way must move if only tokens that somebody sees travel.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

import fivedp
from fivedp.bench import operands
from fivedp.bench.attention_check import Check, Shares
from fivedp.bench.cases.attention import ORDERS, Case, Strategy
from fivedp.bench.family import Row
from fivedp.bench.measure import Bench, digest
from fivedp.bench.visibility import Indices, Sight, held, offsets
from fivedp.kernels._select import sum_type
from fivedp.kernels.attention import Mask
from fivedp.layout.explain_attention import Price, attention_prices
from fivedp.layout.ring_travel import Sizes
from fivedp.layout.sequence import HeadCut

Array = NDArray[Any]
OPERATIONS = {
    "ring": "ring_attention",
    "Ulysses": "ulysses_attention",
    "hybrid": "hybrid_attention",
    "decode": "decode_attention",
}


class Attention:
    """The tokens of a case on this rank, its call, and its check."""

    def __init__(self, case: Case, bench: Bench) -> None:
        self.case, self.bench = case, bench
        self.grid = bench.grid(case.strategy)
        comm = bench.comm
        self.keys = held(case.strategy.layout, case.keys, comm.size, comm.rank)
        decode = case.strategy.way == "decode"
        self.queries = np.arange(case.queries, dtype=np.int64) if decode else self.keys
        self.shares = Shares(case, bench.seed)
        everything = slice(None)
        self.q = self._laid_out(self.shares.make("q", self.queries, everything))
        self.k = self._laid_out(self.shares.make("k", self.keys, everything))
        self.v = self._laid_out(self.shares.make("v", self.keys, everything))
        self.bytes_planned, self.bytes_bound = priced(case, comm.size)
        self.results: tuple[Array, ...] = ()
        self.do: Array | None = None
        if case.backward:
            self.do = self._laid_out(self.shares.make("do", self.queries, everything))
            self.o, self.lse = self._forward(case.strategy.order)

    def _laid_out(self, x: Array) -> Array:
        """(B, S_local, H, D), or (T_local, H, D) for packed documents."""
        return x[0] if self.case.mask.documents else x

    def _keywords(self, order: str) -> dict[str, Any]:
        case, mask = self.case, self.case.mask
        keywords: dict[str, Any] = {"causal": mask.causal, "window": mask.window or None}
        keywords["layout"] = case.strategy.layout
        if case.strategy.way != "decode":
            edges = offsets(mask, case.keys)
            keywords |= {"order": order, "cu_seqlens": None if edges is None else edges.astype(np.int32)}
        return keywords

    def _forward(self, order: str) -> tuple[Array, Array]:
        operation = getattr(fivedp, OPERATIONS[self.case.strategy.way])
        o, lse = operation(self.q, self.k, self.v, self.grid.mesh, **self._keywords(order))
        return o, lse

    def _call(self, order: str) -> tuple[Array, ...]:
        if not self.case.backward:
            return self._forward(order)
        backward = getattr(fivedp, OPERATIONS[self.case.strategy.way] + "_backward")
        gradients: tuple[Array, ...] = backward(
            self.do, self.q, self.k, self.v, self.o, self.lse, self.grid.mesh, **self._keywords(order)
        )
        return gradients

    def run(self) -> None:
        """One forward, or one backward."""
        self.results = self._call(self.case.strategy.order)

    def facts(self) -> Row:
        """The load of the busiest rank over the mean, and the logits that were not stored, per rank."""
        case, ranks = self.case, self.bench.comm.size
        loads = pairs_by_rank(case, ranks)
        logits = case.batch * case.heads * case.queries * case.keys
        sums = sum_type(operands.dtype_of(case.dtype)).itemsize
        return {
            "pairs": loads,
            "balance": max(loads) * len(loads) / max(1, sum(loads)),
            "memory": {"not_stored": logits * sums // ranks},
        }

    def bits(self) -> bytes:
        """The bits of all results on this rank."""
        return digest(*self.results)

    def bytes_made(self) -> int:
        """o and lse, or the gradients."""
        return sum(int(x.nbytes) for x in self.results)

    def check(self) -> tuple[str, Row]:
        """Judge o and lse, or dq, dk and dv."""
        case, packed = self.case, bool(self.case.mask.documents)
        results = [x[None] if packed else x for x in self.results]
        check = Check(self.bench, self.shares, self.queries, self.keys)
        if case.backward:
            check.backward(*results)
            check.conservation(self.o[None] if packed else self.o, *results)
        else:
            check.forward(*results)
        self._check_bits(check, results)
        return check.wrong, check.found()

    def _check_bits(self, check: Check, results: list[Array]) -> None:
        """Canonical order, and a forward with all keys of a head on one rank, promise the bits of one rank."""
        case = self.case
        canonical, whole = case.strategy.order == "canonical", case.strategy.way == "Ulysses" and not case.backward
        if not (canonical or whole) or case.mask.documents:  # positions cannot be given to packed documents
            return
        from mpi4py import MPI

        rows, heads, kv_heads = check.rows, check.heads, check.kv_heads
        if not rows.size:
            check.note_bits(True)
            return
        tokens = self.queries[rows]
        everything = np.arange(case.keys, dtype=np.int64)
        q = self.shares.make("q", tokens, heads)
        k, v = (self.shares.make(name, everything, kv_heads) for name in "kv")
        keywords = self._keywords("canonical") | {"positions": tokens, "kv_positions": everything}
        if not case.backward:
            o, lse = fivedp.ring_attention(q, k, v, MPI.COMM_SELF, **keywords)
            same = o.tobytes() == results[0][:, rows, heads].tobytes()
            check.note_bits(same and lse.tobytes() == results[1][:, heads, rows].tobytes())
            return
        do = self.shares.make("do", tokens, heads)
        o, lse = self.o[:, rows, heads], self.lse[:, heads, rows]
        dq, _, _ = fivedp.ring_attention_backward(do, q, k, v, o, lse, MPI.COMM_SELF, **keywords)
        check.note_bits(dq.tobytes() == results[0][:, rows, heads].tobytes())

    def rival(self, reference: Any, threads: int) -> Callable[[], Any] | None:
        """The attention of the whole sequence on rank 0."""
        case = self.case
        if not reference.supports(case.dtype, "attention"):
            return None
        if self.bench.comm.rank:
            return lambda: None
        sight, everything = Sight.of(case), np.arange(case.keys, dtype=np.int64)
        tokens = np.arange(case.queries, dtype=np.int64)
        q = self.shares.make("q", tokens, slice(None))
        k, v = (self.shares.make(name, everything, slice(None)) for name in "kv")
        edges = offsets(case.mask, case.keys)
        document = None if edges is None else (np.searchsorted(edges, everything, side="right") - 1).astype(np.int32)
        mask = Mask(
            (tokens + sight.first_query).astype(np.int32), everything.astype(np.int32), document, document,
            scale=case.size**-0.5, causal=case.mask.causal, window=case.mask.window,
        )  # fmt: skip
        reference.set_threads(threads)
        if not case.backward:
            return lambda: reference.attention(q, k, v, mask)
        do = self.shares.make("do", tokens, slice(None))
        call: Callable[[], Any] = reference.attention_backward(do, q, k, v, mask)
        return call

    def sibling(self) -> tuple[str, Callable[[], Any]] | None:
        """Beside canonical order, the same in the order of the ring."""
        if self.case.strategy.order != "canonical":
            return None
        return "canonical_price", lambda: self._call(ORDERS[0])


def _head_ranks(strategy: Strategy, ranks: int) -> int:
    """Over how many ranks heads are exchanged."""
    return {"Ulysses": ranks, "hybrid": strategy.mesh_shape(ranks).get("tp", 1)}.get(strategy.way, 1)


def _price(case: Case, ranks: int) -> Price:
    """What the library says of a ring, of heads exchanged, or of both."""
    prices = attention_prices(
        {"q": (case.batch, case.queries, case.heads, case.size),
         **dict.fromkeys("kv", (case.batch, case.keys, case.kv_heads, case.size))},
        ranks, causal=case.mask.causal, window=case.mask.window or None, layout=case.strategy.layout,
        cu_seqlens=offsets(case.mask, case.keys), itemsize=operands.dtype_of(case.dtype).itemsize,
    )  # fmt: skip
    width = _head_ranks(case.strategy, ranks)
    return next(price for price in prices if price.heads == width)


def pairs_by_rank(case: Case, ranks: int) -> list[int]:
    """The visible pairs that each rank computes, over its heads: of its queries, or of its keys where they stay."""
    sight, strategy = Sight.of(case), case.strategy
    places = [held(strategy.layout, case.keys, ranks, rank) for rank in range(ranks)]
    if strategy.way == "decode":
        return [case.batch * case.heads * int(sight.counts(place).sum()) for place in places]
    width, loads = _head_ranks(strategy, ranks), []
    every = sight.high - sight.low + 1
    round_the_ring = case.backward and strategy.order == "ring"
    travellers = _price(case, ranks).travellers if round_the_ring else ("keys",) * width
    for rank in range(ranks):
        first, part = rank - rank % width, rank % width
        block = np.concatenate(places[first : first + width])
        cut = HeadCut.of(case.heads, case.kv_heads, width, part)
        pairs = every[block] if travellers[part] == "keys" else sight.counts(block)
        loads.append(case.batch * (cut.end - cut.begin) * int(pairs.sum()))
    return loads


@lru_cache(maxsize=512)
def priced(case: Case, ranks: int) -> tuple[int, int]:
    """Bytes that a call of `case` is to send over all ranks, and the least that this way could."""
    itemsize = operands.dtype_of(case.dtype).itemsize
    sums = sum_type(operands.dtype_of(case.dtype)).itemsize
    kv, qo = 2 * case.kv_heads * case.size, 2 * case.heads * case.size
    if case.strategy.way == "decode":
        # every rank gives its state to every other; a reduction could add them on the way and give the sum back
        state = case.batch * case.queries * case.heads * (case.size + 2) * sums
        return ranks * (ranks - 1) * state, 2 * (ranks - 1) * state
    sight = Sight.of(case)
    places = [held(case.strategy.layout, case.keys, ranks, rank) for rank in range(ranks)]
    if case.strategy.order == "canonical":
        key, query = kv * itemsize, (qo * itemsize + 2 * case.heads * sums) * case.backward
        least = key * _foreign_keys(sight, places) + query * _foreign_queries(sight, places)
        return (ranks - 1) * case.batch * case.keys * (key + query), case.batch * least
    width, price = _head_ranks(case.strategy, ranks), _price(case, ranks)
    planned = price.backward if case.backward else price.forward

    # The least: heads of tokens to the rank of their group that computes them, and what it made of them back;
    # keys that any query of another block sees to that block, and their gradients home; or queries that see any key
    # of another block, with what belongs to them, and theirs.
    cuts = [HeadCut.of(case.heads, case.kv_heads, width, part) for part in range(width)]
    kept = [cut.kv_end - cut.kv_begin for cut in cuts]
    exchanged = 0
    for rank, place in enumerate(places):
        part = rank % width
        away = case.heads - (cuts[part].end - cuts[part].begin)
        keys_away = sum(kept) - kept[part]
        if case.backward:
            there = away * (2 * case.size * itemsize + 2 * sums) + keys_away * 2 * case.size * itemsize
            home = sums if case.kv_heads < width else itemsize  # partial sums of one key head are added at home
            back = away * case.size * itemsize + keys_away * 2 * case.size * home
        else:
            there = (away + 2 * keys_away) * case.size * itemsize
            back = away * (case.size * itemsize + sums)
        exchanged += len(place) * (there + back)
    blocks = [np.concatenate(places[first : first + width]) for first in range(0, ranks, width)]
    rings = [
        Sizes(case.batch, cut.end - cut.begin, n, case.size, case.size, itemsize)
        for cut, n in zip(cuts, kept, strict=True)
    ]
    keys, queries = _foreign_keys(sight, blocks), _foreign_queries(sight, blocks)
    ringed = sum(
        min(keys * ring.keys_backward, queries * ring.queries_backward) if case.backward else keys * ring.keys_forward
        for ring in rings
    )
    return planned, case.batch * exchanged + ringed


def _foreign_keys(sight: Sight, blocks: list[Indices]) -> int:
    """Keys that a block's queries see and the block does not hold, summed over the blocks."""
    total = 0
    for block in blocks:
        seen = sight.seen_by(block)
        total += int(seen.sum() - seen[block].sum())
    return total


def _foreign_queries(sight: Sight, blocks: list[Indices]) -> int:
    """Queries that see a key of a block and are not in it, summed over the blocks."""
    total = 0
    for block in blocks:
        sees = sight.counts(block) > 0
        total += int(sees.sum() - sees[block].sum())
    return total
