"""Attention on a GPU: the functions of `fivedp.kernels.attention`, for CuPy arrays, with the same meaning.

bfloat16, float16, float32 and float64; head sizes to 256. `Mask` and `State` are those of the CPU. The places of a mask
may be NumPy arrays, which are copied to the device, in one piece and without waiting; a state is on the device.

FIVEDP_ATTENTION_KERNEL=sm90 chooses the kernels with the instructions of compute capability 9.x (H100, H200) for
bfloat16 and float16; they have not run on a GPU yet. The default, sm80, is for every chip from 8.0, and serves under
sm90 too where the chip is another one or rows do not begin at multiples of 16 bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fivedp.kernels._select import sum_type
from fivedp.kernels.attention import Mask, State
from fivedp.kernels.cuda._extension import asked_kernel, extension, library_of, raw, stream_of

Array = Any
_TILE = 64  # attention_tile of csrc/cuda/attention.hpp


def empty_state(q: Array, v_size: int) -> State:
    """The state of queries (B, S, H, D) that have seen no key, for values of `v_size` elements."""
    batch, queries, heads, _ = q.shape
    xp, dtype = library_of(q), sum_type(q.dtype)
    return State(
        xp.full((batch, heads, queries), -np.inf, dtype),
        xp.zeros((batch, heads, queries), dtype),
        xp.zeros((batch, queries, heads, v_size), dtype),
    )


def forward(q: Array, k: Array, v: Array, mask: Mask, state: State) -> str:
    """Add keys to the state of queries, in place.

    Parameters
    ----------
    q : (B, S, H, D)
    k : (B, S_k, H_kv, D)
    v : (B, S_k, H_kv, Dv)
        bfloat16, float16, float32 or float64, the last dimension contiguous; H is a multiple of H_kv, and query head h
        reads key head h // (H / H_kv).
    mask : Mask
    state : State
        As `empty_state` or an earlier call left it.

    Returns
    -------
    str
        The kernel that ran: 'sm80', 'sm90' (see above), 'plain' for float32 and float64, 'none' where there
        is nothing to do.

    Raises
    ------
    ValueError
        Shapes that do not fit together, head sizes above 256, FIVEDP_ATTENTION_KERNEL.
    TypeError
        Element types other than those above.
    """
    q_rows, k_rows, v_rows = _rows(q=q, k=k, v=v)
    ran: str = extension().attention_forward(
        q_rows, k_rows, v_rows, _on_device(mask, q), _spans(mask, q), *_arrays(state),
        asked_kernel("ATTENTION") == "sm90", stream_of(q),
    )  # fmt: skip
    return ran


def join(states: Sequence[State]) -> State:
    """The state of queries that have seen the keys of all `states`, added in their order."""
    first = states[0]
    xp, stream = library_of(first.total), stream_of(first.total)
    result = State(*(xp.empty_like(x) for x in _arrays(first)))
    if len(states) == 1:
        for to, x in zip(_arrays(result), _arrays(first), strict=True):
            to[...] = x
    for state in states[1:]:
        extension().attention_join(_arrays(first), _arrays(state), _arrays(result), stream)
        first = result
    return result


def finish(state: State, out: Array) -> Array:
    """The attention of a state: `out` (B, S, H, Dv) is written, and lse (B, H, S) returned.

    A row that has seen no key gives zeros and -inf.
    """
    lse = library_of(out).empty_like(state.highest)
    extension().attention_finish(_arrays(state), raw(out, "attention: out"), lse, stream_of(out))
    return lse


def delta(d_out: Array, out: Array) -> Array:
    """(B, H, S) in the type of sums: the sum over a row of d_out * out, which the backward needs."""
    batch, queries, heads, _ = out.shape
    result = library_of(out).empty((batch, heads, queries), sum_type(out.dtype))
    d_out_rows, out_rows = _rows(d_out=d_out, out=out)
    extension().attention_delta(d_out_rows, out_rows, result, stream_of(out))
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
) -> str:
    """Add to the gradients what some queries and keys contribute to them.

    Parameters
    ----------
    d_out : (B, S, H, Dv)
    q, k, v, mask
        As in `forward`.
    lse, delta_rows : (B, H, S)
        Of the finished output over all keys, in the type of sums.
    d_q, d_k, d_v
        Of the shapes of q, k and v, contiguous, in the type of sums; added to, each element in one order.

    Returns
    -------
    str
        The kernel that ran, as `forward` says.
    """
    d_out_rows, q_rows, k_rows, v_rows = _rows(d_out=d_out, q=q, k=k, v=v)
    ran: str = extension().attention_backward(
        d_out_rows, q_rows, k_rows, v_rows, _on_device(mask, q), _spans(mask, q), lse, delta_rows, d_q, d_k, d_v,
        asked_kernel("ATTENTION") == "sm90", stream_of(q),
    )  # fmt: skip
    return ran


def _arrays(state: State) -> tuple[Array, Array, Array]:
    return state.highest, state.total, state.output


def _rows(**arrays: Array) -> list[Array]:
    """The arrays as the extension takes them: the last dimension contiguous, bfloat16 as its bits."""
    rows = []
    for name, x in arrays.items():
        if x.ndim == 4 and x.shape[-1] > 1 and x.strides[-1] != x.itemsize:
            x = library_of(x).ascontiguousarray(x)
        rows.append(raw(x, f"attention: {name}"))
    return rows


def _on_device(mask: Mask, like: Array) -> tuple[Any, ...]:
    """The mask with its places and slopes in the memory of `like`; those that NumPy has come in one copy."""
    xp = library_of(like)
    places: list[Any] = [mask.q_position, mask.k_position, mask.q_document, mask.k_document]
    from_host = [i for i, x in enumerate(places) if isinstance(x, np.ndarray)]
    if xp is not np and from_host:
        borders = np.cumsum([0, *(places[i].size for i in from_host)])
        copy = xp.asarray(np.concatenate([places[i] for i in from_host]))
        for i, begin, end in zip(from_host, borders, borders[1:], strict=False):
            places[i] = copy[begin:end]
    slopes = None if mask.slopes is None else xp.asarray(np.asarray(mask.slopes, np.float64))
    return (*places, mask.scale, mask.causal, mask.window, mask.softcap, slopes)


def _spans(mask: Mask, like: Array) -> Array:
    """Workspace: for every tile of queries and of keys its lowest and highest place."""
    tiles = sum(-(-len(x) // _TILE) for x in (mask.q_position, mask.k_position))
    return library_of(like).empty((tiles, 4), np.int32)
