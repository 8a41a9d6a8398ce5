"""The arguments of an attention as one rank gives them: its keywords with their meaning, its arrays and their shapes.

Nothing here speaks to another rank; `attention_call.py` agrees on what these say.
"""

from __future__ import annotations

import itertools
import math
import zlib
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from fivedp.errors import DTypeError, LayoutError, ShapeError
from fivedp.layout.sequence import LAYOUTS
from fivedp.ops.arguments import same_kind

Array = Any
Expected = dict[str, tuple[Array, tuple[int, ...] | None]]
"""Further arrays by name, and the shapes that they must have (None where that is not known)."""
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


def backward_arrays(q: Array, v: Array, do: Array, o: Array, lse: Array, dlse: Array | None) -> Expected:
    """The further arrays of a backward, and the shapes that they must have (None where q or v are no good)."""
    out_shape, rows = None, None
    if getattr(q, "ndim", 0) >= 3 and getattr(v, "ndim", 0):
        out_shape = (*q.shape[:-1], v.shape[-1])
        rows = (*q.shape[:-3], q.shape[-2], q.shape[-3])
    arrays = {"do": (do, out_shape), "o": (o, out_shape), "lse": (lse, rows)}
    return arrays if dlse is None else arrays | {"dlse": (dlse, rows)}


def check_arrays(
    operation: str,
    q: Array,
    k: Array,
    v: Array,
    options: Options,
    keywords: dict[str, Any],
    others: Expected,
) -> None:
    """What one rank can know alone."""
    packed = options.cu_seqlens is not None
    dims, form = (3, "(T_local, H, D), for cu_seqlens is given") if packed else (4, "(B, S_local, H, D)")
    same_kind(operation, {"q": q, "k": k, "v": v, **{name: x for name, (x, _) in others.items()}})
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
