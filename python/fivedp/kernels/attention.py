"""Attention on one rank: adds keys to the state of queries, and the gradients.

A state is what the keys seen so far have made of each query: the largest logit, the sum of the weights and the sum of
the weighted values, neither normalised nor rounded to 16 bits. `forward` takes a state up where another call left it,
so the blocks of a ring need no merging; `finish` divides once, at the end. Which query sees which key depends on
(document, position) of the two alone, so any placement of tokens is one code path.

CuPy arrays are served by `fivedp.kernels.cuda.attention`, which has the same functions.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fivedp import _cpu
from fivedp.kernels._select import is_cupy, raw, sum_type

Array = Any
Places = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Mask:
    """Which query sees which key, and what its logit is beyond the product.

    Attributes
    ----------
    q_position, k_position : int32 (queries,), (keys,)
        Positions, not negative, in the tokens' documents or in the whole sequence.
    q_document, k_document : int32, optional
        Documents; tokens of different ones don't see each other.
    scale : float
        The logit is scale * (q . k), with `softcap` c then c * tanh(logit / c), with `slopes` less
        slope * |i - j| (ALiBi).
    causal : bool
        Query i sees keys j <= i only.
    window : int
        Query i sees keys with i - j < window (causal) or |i - j| < window; 0 for none.
    softcap : float
        0 for none.
    slopes : sequence of float, optional
        One per query head.
    """

    q_position: Places
    k_position: Places
    q_document: Places | None = None
    k_document: Places | None = None
    scale: float = 1.0
    causal: bool = False
    window: int = 0
    softcap: float = 0.0
    slopes: Sequence[float] | None = None

    def _packed(self) -> tuple[Any, ...]:
        return (
            self.q_position, self.k_position, self.q_document, self.k_document,
            self.scale, self.causal, self.window, self.softcap, self.slopes,
        )  # fmt: skip


@dataclass
class State:
    """What the keys seen so far have made of some queries, in the type of sums.

    Attributes
    ----------
    highest, total : (B, H, S)
        The largest logit in units of log 2 (-inf where no key was seen), and the sum of 2^(logit - highest).
    output : (B, S, H, Dv)
        The sum of the values with these weights.
    """

    highest: Array
    total: Array
    output: Array


def empty_state(q: Array, v_size: int) -> State:
    """The state of queries (B, S, H, D) that have seen no key, for values of `v_size` elements."""
    if is_cupy(q):
        empty: State = _on_gpu().empty_state(q, v_size)
        return empty
    batch, queries, heads, _ = q.shape
    dtype = sum_type(q.dtype)
    return State(
        np.full((batch, heads, queries), -np.inf, dtype),
        np.zeros((batch, heads, queries), dtype),
        np.zeros((batch, queries, heads, v_size), dtype),
    )


def forward(q: Array, k: Array, v: Array, mask: Mask, state: State) -> None:
    """Add keys to the state of queries, in place.

    Parameters
    ----------
    q : (B, S, H, D)
    k : (B, S_k, H_kv, D)
    v : (B, S_k, H_kv, Dv)
        float32, float64 or bfloat16, the last dimension contiguous; H is a multiple of H_kv, and query head h reads key
        head h // (H / H_kv).
    mask : Mask
    state : State
        As `empty_state` or an earlier call left it.

    Raises
    ------
    ValueError
        Shapes that do not fit together.
    TypeError
        Element types other than those above.
    """
    forward_blocks(q, [(k, v, mask)], state)


def forward_blocks(q: Array, blocks: Sequence[tuple[Array, Array, Mask]], state: State) -> None:
    """`forward` for each of some blocks (k, v, mask), in their order and with the same bits, in one call.

    Queries and state are brought into the order that the arithmetic needs, and the state back from it, once instead of
    once a block. The masks differ in the places of keys alone.
    """
    if is_cupy(q):
        for k, v, mask in blocks:
            _on_gpu().forward(q, k, v, mask, state)
        return
    (q_rows,) = _rows(q=q)
    rows = [(*_rows(k=k, v=v), mask._packed()) for k, v, mask in blocks]
    _cpu.attention_forward(q_rows, rows, state.highest, state.total, state.output)


def join(states: Sequence[State]) -> State:
    """The state of queries that have seen the keys of all `states`, added in their order."""
    if is_cupy(states[0].total):
        joined: State = _on_gpu().join(states)
        return joined
    highest = np.maximum.reduce([state.highest for state in states])
    from_here = np.where(np.isneginf(highest), 0, highest)
    total, output = np.zeros_like(highest), np.zeros_like(states[0].output)
    with np.errstate(invalid="ignore"):  # infinite logits give NaN, as on one rank
        for state in states:
            factor = np.exp2(state.highest - from_here)
            total += factor * state.total
            output += factor.transpose(0, 2, 1)[..., None] * state.output
    return State(highest, total, output)


def finish(state: State, out: Array) -> Array:
    """The attention of a state: `out` (B, S, H, Dv) is written, and lse (B, H, S) returned.

    A row that has seen no key gives zeros and -inf.
    """
    if is_cupy(out):
        return _on_gpu().finish(state, out)
    lse = np.empty_like(state.highest)
    _cpu.attention_finish(state.highest, state.total, state.output, raw(out, "attention: out"), lse)
    return lse


def delta(d_out: Array, out: Array) -> Array:
    """(B, H, S) in the type of sums: the sum over a row of d_out * out, which the backward needs."""
    if is_cupy(out):
        return _on_gpu().delta(d_out, out)
    batch, queries, heads, _ = out.shape
    result = np.empty((batch, heads, queries), sum_type(out.dtype))
    d_out_rows, out_rows = _rows(d_out=d_out, out=out)
    _cpu.attention_delta(d_out_rows, out_rows, result)
    return result


def backward(
    d_out: Array,
    q: Array,
    k: Array,
    v: Array,
    mask: Mask,
    lse: Array,
    delta_rows: Array,
    d_q: Array,
    d_k: Array,
    d_v: Array,
) -> None:
    """Add to the gradients what some queries and keys contribute to them.

    Parameters
    ----------
    d_out : (B, S, H, Dv)
    q, k, v, mask
        As in `forward`.
    lse, delta_rows : (B, H, S)
        Of the finished output over all keys, in the type of sums.
    d_q, d_k, d_v
        Of the shapes of q, k and v, contiguous, in the type of sums; added to.
    """
    backward_blocks([Queries(d_out, q, mask, lse, delta_rows, d_q)], k, v, d_k, d_v)


@dataclass(frozen=True)
class Queries:
    """Some queries of a backward, with all that belongs to them; as the arguments of `backward`."""

    d_out: Array
    q: Array
    mask: Mask
    lse: Array
    delta: Array
    d_q: Array


def backward_blocks(blocks: Sequence[Queries], k: Array, v: Array, d_k: Array, d_v: Array) -> None:
    """`backward` for each of some blocks of queries, in their order and with the same bits, in one call.

    Keys, values and their gradients are brought into the order that the arithmetic needs, and the gradients back from
    it, once instead of once a block. The masks differ in the places of queries alone.
    """
    if is_cupy(k):
        for x in blocks:
            _on_gpu().backward(x.d_out, x.q, k, v, x.mask, x.lse, x.delta, x.d_q, d_k, d_v)
        return
    rows = [(*_rows(d_out=x.d_out, q=x.q), x.mask._packed(), x.lse, x.delta, x.d_q) for x in blocks]
    k_rows, v_rows = _rows(k=k, v=v)
    _cpu.attention_backward(rows, k_rows, v_rows, d_k, d_v)


def _on_gpu() -> Any:
    return importlib.import_module("fivedp.kernels.cuda.attention")


def _rows(**arrays: Array) -> list[Array]:
    """The arrays as the extension takes them: the last dimension contiguous, bfloat16 as its bits."""
    rows = []
    for name, x in arrays.items():
        if x.ndim == 4 and x.shape[-1] > 1 and x.strides[-1] != x.itemsize:
            x = np.ascontiguousarray(x)
        rows.append(raw(x, f"attention: {name}"))
    return rows
