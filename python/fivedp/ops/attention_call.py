"""A call of a distributed attention: its arguments agreed between all ranks, and who needs whose tokens.

What sizes and options alone decide (the tokens of every rank, which rank's queries see which rank's keys) is worked out
once and kept.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from fivedp.comm.agreement import agreement_of
from fivedp.comm.grid import Group, RankGrid
from fivedp.comm.messages import TAGS, mailbox
from fivedp.errors import LayoutError, ShapeError
from fivedp.kernels._select import library_of, sum_type
from fivedp.kernels.attention import Mask
from fivedp.kernels.attention import delta as delta_of
from fivedp.layout.ring_travel import Sizes, Visibility
from fivedp.layout.sequence import Tokens, place, token_indices
from fivedp.ops.arguments import Arguments, array_kind, pack, unpack, verdict
from fivedp.ops.attention_arguments import Expected, Options, check_arrays, read_options

Array = Any


@dataclass
class Part:
    """An attention between the tokens of a group of ranks: what the steps of a ring need to know."""

    grid: RankGrid
    group: Group
    what: str
    options: Options
    packed: bool
    q: Array
    k: Array
    v: Array
    visibility: Visibility
    slopes: tuple[float, ...] | None

    @property
    def xp(self) -> Any:
        """Where the arrays live: numpy or cupy."""
        return library_of(self.q)

    @property
    def queries(self) -> Tokens:
        """This member's."""
        return self.visibility.queries[self.group.index]

    @property
    def keys(self) -> Tokens:
        """This member's."""
        return self.visibility.keys[self.group.index]

    @property
    def sizes(self) -> Sizes:
        """The same on every member."""
        batch, _, heads, size = self.q.shape
        return Sizes(batch, heads, self.k.shape[2], size, self.v.shape[3], self.q.dtype.itemsize)

    def mask(self, queries: Tokens, keys: Tokens) -> Mask:
        """The kernel's mask between some queries and some keys."""
        options = self.options
        return Mask(
            queries.position,
            keys.position,
            queries.document if self.packed else None,
            keys.document if self.packed else None,
            scale=options.scale if options.scale is not None else 1.0 / math.sqrt(self.q.shape[-1]),
            causal=options.causal,
            window=options.window or 0,
            softcap=options.softcap or 0.0,
            slopes=self.slopes,
        )


class AttentionCall:
    """One call on one rank, agreed with all others: the arrays as (B, S, H, D), and everybody's tokens.

    Parameters
    ----------
    operation : str
        For messages.
    group : Group
        The ranks that share the sequence.
    q, k, v : array
    keywords : dict
        As users give them.
    others : dict of str to (array, shape), optional
        Further arrays and the shapes that they must have.
    queries_everywhere : bool
        Whether every rank has all queries, and only the keys are cut.

    Raises
    ------
    LayoutError, ShapeError, DTypeError
        On every rank, before any payload moves.
    """

    def __init__(
        self,
        operation: str,
        group: Group,
        q: Array,
        k: Array,
        v: Array,
        keywords: dict[str, Any],
        others: Expected | None = None,
        *,
        queries_everywhere: bool = False,
    ) -> None:
        self.grid, self.group = group.grid, group
        self.operation = operation
        error: ValueError | None = None
        options = Options()
        shapes: tuple[tuple[int, ...] | None, ...] = (None, None, None)
        dtypes: tuple[str | None, ...] = (None, None, None)
        kind = "numpy"
        self.xp: Any = np
        """Where the arrays live: numpy or cupy."""
        try:
            options = read_options(operation, **keywords)
            self.packed = options.cu_seqlens is not None
            kind = array_kind(q, "q", operation)
            self.xp = library_of(q)
            check_arrays(operation, q, k, v, options, keywords, others or {})
            shapes = tuple(tuple(x.shape) for x in (q, k, v))
            dtypes = tuple(str(x.dtype) for x in (q, k, v))
        except ValueError as found:
            error = found
        self.options = options
        text = options.text()
        if queries_everywhere and options.placed:
            text += f" positions {zlib.crc32(np.asarray(keywords['positions'], np.int64).tobytes()):x}"
        self.what = f"called {operation} with {text}"
        arguments = Arguments(operation, text, shapes, dtypes, kind, "tree", "sum", 1.0, 0.0, error)
        headers = agreement_of(self.group).exchange(pack(arguments), self.what)
        verdict(headers, (), *self.group.numbering)
        everyone = [unpack(row.tobytes()).shapes for row in headers]
        axis = 0 if self.packed else 1
        q_shapes, k_shapes = ([shapes[i] or () for shapes in everyone] for i in (0, 1))
        for name, found_shapes in (("q", q_shapes), ("k", k_shapes), ("v", [s[2] or () for s in everyone])):
            _check_same_but(operation, name, found_shapes, axis)
        self.q_lengths = tuple(shape[axis] for shape in q_shapes)
        self.k_lengths = tuple(shape[axis] for shape in k_shapes)
        self.q, self.k, self.v = (x[None] if self.packed else x for x in (q, k, v))
        if queries_everywhere:
            self._place_keys(keywords)
        else:
            self._place(keywords)

    def _place_keys(self, keywords: dict[str, Any]) -> None:
        """Find out where this rank's keys are, and the queries that all ranks have."""
        options, operation, mine, size = self.options, self.operation, self.group.index, self.group.size
        count, total = self.q_lengths[0], sum(self.k_lengths)
        if len(set(self.q_lengths)) > 1:
            odd = next(rank for rank, length in enumerate(self.q_lengths) if length != count)
            raise ShapeError(
                f"{operation}: `q` has {self.q_lengths[odd]} tokens on rank {odd} and {count} on rank 0; "
                "every rank must give the same queries"
            )
        if not options.placed and (options.kv_placed or count > total):
            raise LayoutError(
                f"{operation}: `q` has {count} tokens, the cache {total}; positions are needed where the queries are "
                "not its last tokens or kv_positions are given"
            )
        positions = np.asarray(keywords["positions"], np.int32) if options.placed else np.arange(total - count, total)
        self.queries = (place(positions.astype(np.int64), None),) * size
        if options.kv_placed:
            keys = place(np.asarray(keywords["kv_positions"], np.int64), None)
        else:
            keys = _tokens(operation, "k", options.layout, self.k_lengths, None)[mine]
        self.keys = (keys,) * size
        self.visibility = Visibility(self.queries, self.keys, options.causal, options.window or 0)

    def _place(self, keywords: dict[str, Any]) -> None:
        """Find out where the tokens of every rank are."""
        options, operation = self.options, self.operation
        q_offsets, k_offsets = options.cu_seqlens, options.cu_seqlens_k or options.cu_seqlens
        same = options.placed and not options.kv_placed
        if options.placed:
            self.queries = self._exchange(np.asarray(keywords["positions"], np.int32), self.q_lengths)
        else:
            self.queries = _tokens(operation, "q", options.layout, self.q_lengths, q_offsets)
        if options.kv_placed:
            self.keys = self._exchange(np.asarray(keywords["kv_positions"], np.int32), self.k_lengths)
        elif same:
            if self.q_lengths != self.k_lengths:
                raise ShapeError(
                    f"{operation}: positions are given, `q` has {sum(self.q_lengths)} tokens and `k` "
                    f"{sum(self.k_lengths)}; keys of another length need kv_positions"
                )
            self.keys = self.queries
        else:
            self.keys = _tokens(operation, "k", options.layout, self.k_lengths, k_offsets)
        fixed = not (options.placed or options.kv_placed)
        see = _visibility if fixed else Visibility
        self.visibility = see(self.queries, self.keys, options.causal, options.window or 0)

    def _exchange(self, mine: Array, lengths: tuple[int, ...]) -> tuple[Tokens, ...]:
        """Everybody's positions."""
        group = self.group
        with mailbox(group, self.what, np) as mail:
            receipts = {
                s: mail.receive((lengths[s],), np.int32, s, TAGS["A"]) for s in range(group.size) if s != group.index
            }
            for peer in receipts:
                mail.send(np.ascontiguousarray(mine), peer, TAGS["A"], 0)
            mail.wait(list(receipts.values()))
            positions = [mine if s == group.index else receipts[s].array.copy() for s in range(group.size)]
            for receipt in receipts.values():
                mail.release(receipt)
        return tuple(Tokens(p, np.zeros(len(p), np.int32)) for p in positions)

    def rows(self, do: Array, o: Array, lse: Array, dlse: Array | None) -> tuple[Array, Array, Array]:
        """do, lse and delta as the kernel's backward takes them, with a batch."""
        if self.packed:
            do, o, lse, dlse = do[None], o[None], lse[None], None if dlse is None else dlse[None]
        dtype, sums = self.q.dtype, sum_type(self.q.dtype)
        do, lse = do.astype(dtype, copy=False), self.xp.ascontiguousarray(lse, sums)
        delta = delta_of(do, o.astype(dtype, copy=False))
        if dlse is not None:
            delta -= dlse.astype(sums, copy=False)
        return do, lse, delta

    @property
    def part(self) -> Part:
        """The attention between all ranks of the call."""
        return Part(
            self.grid, self.group, self.what, self.options, self.packed, self.q, self.k, self.v, self.visibility,
            self.options.alibi_slopes,
        )  # fmt: skip


# For tokens that `_tokens` keeps.
_visibility = lru_cache(maxsize=256)(Visibility)


@lru_cache(maxsize=256)
def _tokens(
    operation: str, name: str, layout: str, lengths: tuple[int, ...], offsets: tuple[int, ...] | None
) -> tuple[Tokens, ...]:
    """The tokens of every rank under a layout, whose shares must have these lengths."""
    total, parts = sum(lengths), len(lengths)
    if offsets is not None and offsets[-1] != total:
        raise ShapeError(
            f"{operation}: cu_seqlens ends with {offsets[-1]}, but `{name}` has {total} tokens on all ranks together"
        )
    placed = [token_indices(layout, total, parts, part) for part in range(parts)]
    for rank, (length, indices) in enumerate(zip(lengths, placed, strict=True)):
        if length != len(indices):
            raise ShapeError(
                f"{operation}: `{name}` has {length} tokens on rank {rank}, of {total} in all; "
                f'layout "{layout}" gives that rank {len(indices)}'
            )
    return tuple(place(indices, offsets) for indices in placed)


def _check_same_but(operation: str, name: str, shapes: Sequence[tuple[int, ...]], axis: int) -> None:
    """All dimensions but that of the tokens are the same on every rank."""

    def rest(shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape[:axis] + shape[axis + 1 :]

    for rank, shape in enumerate(shapes):
        if rest(shape) != rest(shapes[0]):
            raise ShapeError(
                f"{operation}: `{name}` has shape {shape} on rank {rank} and {shapes[0]} on rank 0; "
                "only the number of tokens may differ"
            )
