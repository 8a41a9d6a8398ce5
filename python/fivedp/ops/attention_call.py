"""The arguments of a distributed attention: checked on every rank, agreed between all, and who needs whose tokens.

What sizes and options alone decide (the tokens of every rank, which rank's queries see which rank's keys) is worked out
once and kept.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import ml_dtypes
import numpy as np

from fivedp.comm.agreement import agreement_of
from fivedp.comm.grid import Group, RankGrid
from fivedp.comm.messages import TAGS, mailbox
from fivedp.errors import DTypeError, LayoutError, ShapeError
from fivedp.kernels._select import library_of, sum_type
from fivedp.kernels.attention import Mask
from fivedp.kernels.attention import delta as delta_of
from fivedp.layout.ring_travel import Sizes, Visibility
from fivedp.layout.sequence import LAYOUTS, Tokens, place, token_indices
from fivedp.ops.arguments import Arguments, array_kind, pack, unpack, verdict

Array = Any
ORDERS = ("ring", "canonical")
_TYPES = tuple(np.dtype(t) for t in (np.float32, np.float64, ml_dtypes.bfloat16))
_HIGHEST_POSITION = np.iinfo(np.int32).max


@dataclass(frozen=True)
class Options:
    """The keywords of an attention, the same on every rank; None stands for none."""

    causal: bool = False
    layout: str = "zigzag"
    scale: float | None = None
    window: int | None = None
    softcap: float | None = None
    cu_seqlens: tuple[int, ...] | None = None
    cu_seqlens_k: tuple[int, ...] | None = None
    alibi_slopes: tuple[float, ...] | None = None
    order: str = "ring"
    placed: bool = False
    """Whether positions of queries were given, and so the layout does not hold."""
    kv_placed: bool = False

    def text(self) -> str:
        """All of it in a line, for the agreement; long ones as a checksum."""
        parts = [f"causal={self.causal}", "positions" if self.placed else f"layout={self.layout}"]
        parts += ["kv_positions"] if self.kv_placed else []
        for name in ("scale", "window", "softcap"):
            value = getattr(self, name)
            parts += [] if value is None else [f"{name}={value:g}"]
        for name in ("cu_seqlens", "cu_seqlens_k", "alibi_slopes"):
            values = getattr(self, name)
            parts += (
                [] if values is None else [f"{name}=({len(values)} numbers, {zlib.crc32(repr(values).encode()):x})"]
            )
        return " ".join([*parts, f"order={self.order}"])


# The keywords of every attention.
DEFAULTS: dict[str, Any] = {
    "causal": False, "layout": "zigzag", "scale": None, "window": None, "softcap": None, "cu_seqlens": None,
    "cu_seqlens_k": None, "positions": None, "kv_positions": None, "alibi_slopes": None, "order": "ring",
}  # fmt: skip


def with_defaults(operation: str, given: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Keywords filled up with the defaults, and with `more` for this operation.

    Raises
    ------
    TypeError
        Where one is not known, as Python does.
    """
    known = DEFAULTS | more
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise TypeError(f"{operation}() got an unexpected keyword argument {unknown[0]!r}; it takes {', '.join(known)}")
    return known | given


def backward_arrays(
    q: Array, v: Array, do: Array, o: Array, lse: Array, dlse: Array | None
) -> dict[str, tuple[Array, tuple[int, ...] | None]]:
    """The further arrays of a backward, and the shapes that they must have (None where q or v are no good)."""
    out_shape, rows = None, None
    if isinstance(q, np.ndarray) and isinstance(v, np.ndarray) and q.ndim >= 3 and v.ndim:
        out_shape = (*q.shape[:-1], v.shape[-1])
        rows = (*q.shape[:-3], q.shape[-2], q.shape[-3])
    arrays = {"do": (do, out_shape), "o": (o, out_shape), "lse": (lse, rows)}
    return arrays if dlse is None else arrays | {"dlse": (dlse, rows)}


def read_options(operation: str, **given: Any) -> Options:
    """Options from keywords as users give them.

    Raises
    ------
    LayoutError, ShapeError
        Where one has no meaning.
    """
    layout, order, window, softcap = given["layout"], given["order"], given["window"], given["softcap"]
    if layout not in LAYOUTS:
        raise LayoutError(f"{operation}: layout is {layout!r}; expected one of {', '.join(LAYOUTS)}")
    if order not in ORDERS:
        raise LayoutError(f"{operation}: order is {order!r}; expected one of {', '.join(ORDERS)}")
    if window is not None and (isinstance(window, bool) or window != int(window) or window < 1):
        raise LayoutError(f"{operation}: window is {window!r}; expected a whole number from 1, or None")
    if softcap is not None and not (softcap > 0 and math.isfinite(softcap)):
        raise LayoutError(f"{operation}: softcap is {softcap!r}; expected a positive number, or None")
    scale = given["scale"]
    if scale is not None and not math.isfinite(scale):
        raise LayoutError(f"{operation}: scale is {scale!r}; expected a finite number, or None for 1/sqrt(D)")
    placed, kv_placed = given["positions"] is not None, given["kv_positions"] is not None
    offsets: dict[str, tuple[int, ...] | None] = {}
    for name in ("cu_seqlens", "cu_seqlens_k"):
        value = given[name]
        if value is None:
            offsets[name] = None
            continue
        numbers = tuple(int(x) for x in np.asarray(value).reshape(-1))
        if not numbers or numbers[0] != 0 or any(y < x for x, y in itertools.pairwise(numbers)):
            raise ShapeError(f"{operation}: {name} begins {numbers[:4]}; expected offsets that rise from 0")
        offsets[name] = numbers
    if offsets["cu_seqlens_k"] is not None and offsets["cu_seqlens"] is None:
        raise LayoutError(f"{operation}: cu_seqlens_k is given without cu_seqlens; expected both, or cu_seqlens alone")
    if offsets["cu_seqlens"] is not None and (placed or kv_placed):
        raise LayoutError(f"{operation}: cu_seqlens and positions are given; expected one of them")
    slopes = given["alibi_slopes"]
    return Options(
        causal=bool(given["causal"]),
        layout=layout,
        scale=None if scale is None else float(scale),
        window=None if window is None else int(window),
        softcap=None if softcap is None else float(softcap),
        cu_seqlens=offsets["cu_seqlens"],
        cu_seqlens_k=offsets["cu_seqlens_k"],
        alibi_slopes=None if slopes is None else tuple(float(x) for x in np.asarray(slopes).reshape(-1)),
        order=order,
        placed=placed,
        kv_placed=kv_placed,
    )


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
    others : dict of str to (array, array)
        Further arrays and those whose shape they must have.
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
        others: dict[str, tuple[Array, tuple[int, ...] | None]] | None = None,
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
            _check_arrays(operation, q, k, v, options, keywords, others or {})
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


def _check_arrays(
    operation: str,
    q: Array,
    k: Array,
    v: Array,
    options: Options,
    keywords: dict[str, Any],
    others: dict[str, tuple[Array, tuple[int, ...] | None]],
) -> None:
    """What one rank can know alone."""
    packed = options.cu_seqlens is not None
    dims, form = (3, "(T_local, H, D), for cu_seqlens is given") if packed else (4, "(B, S_local, H, D)")
    for name, x in (("q", q), ("k", k), ("v", v), *((name, x) for name, (x, _) in others.items())):
        if array_kind(x, name, operation) != array_kind(q, "q", operation):
            raise DTypeError(
                f"{operation}: `q` is {array_kind(q, 'q', operation)} and `{name}` {array_kind(x, name, operation)}; "
                "all arrays must be NumPy's or all CuPy's"
            )
    types = _TYPES if isinstance(q, np.ndarray) else (*_TYPES, np.dtype(np.float16))
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype not in types or not x.dtype.isnative:
            raise DTypeError(f"{operation}: `{name}` has dtype {x.dtype}; expected {', '.join(map(str, types))}")
        if x.dtype != q.dtype:
            raise DTypeError(f"{operation}: `q` has dtype {q.dtype} and `{name}` {x.dtype}; they must be the same")
        if x.ndim != dims:
            raise ShapeError(f"{operation}: `{name}` has shape {x.shape}; expected {form}")
    if k.shape[:-1] != v.shape[:-1]:
        raise ShapeError(f"{operation}: `k` has shape {k.shape} and `v` {v.shape}; all but the last must be the same")
    if q.shape[-1] != k.shape[-1] or not q.shape[-1] or not v.shape[-1]:
        raise ShapeError(
            f"{operation}: `q` has shape {q.shape} and `k` {k.shape}; the head size must be the same, from 1"
        )
    if not packed and q.shape[0] != k.shape[0]:
        raise ShapeError(f"{operation}: `q` has batch {q.shape[0]} and `k` {k.shape[0]}; they must be the same")
    heads, kv_heads = q.shape[-2], k.shape[-2]
    if kv_heads == 0 or heads % kv_heads:
        raise ShapeError(f"{operation}: `q` has {heads} heads and `k` {kv_heads}; the first must be a multiple")
    if options.alibi_slopes is not None and len(options.alibi_slopes) != heads:
        raise ShapeError(f"{operation}: there are {len(options.alibi_slopes)} alibi_slopes for {heads} heads; one each")
    for name, count in (("positions", q.shape[-3]), ("kv_positions", k.shape[-3])):
        if keywords[name] is not None:
            _check_positions(operation, name, keywords[name], count)
    for name, (x, shape) in others.items():
        if shape is not None and x.shape != shape:
            raise ShapeError(f"{operation}: `{name}` has shape {x.shape}; expected {shape}")


def _check_positions(operation: str, name: str, given: Any, count: int) -> None:
    array = np.asarray(given)
    if array.dtype.kind not in "iu" or array.shape != (count,):
        raise ShapeError(
            f"{operation}: {name} has dtype {array.dtype} and shape {array.shape}; expected integers, ({count},)"
        )
    if array.size and (array.min() < 0 or array.max() >= _HIGHEST_POSITION):
        raise ShapeError(f"{operation}: {name} reaches from {array.min()} to {array.max()}; expected 0 to 2^31 - 2")


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
