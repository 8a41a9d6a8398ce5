"""Products of rows grouped by expert on a GPU: the meaning of `fivedp.kernels.experts`, with the groups' borders there.

`offsets` is an int64 array in device memory; no function reads it on the host, so nothing waits for the kernels that
count. It rises from 0 to at most R; rows after the last border are left as they are. All of K is one virtual shard:
an element's bits depend on its row and its expert alone, and are those of `fivedp.kernels.cuda.gemm.gemm` with
``cuts=(0, K)`` where K is one piece, of the same kernel: FIVEDP_PRODUCT_KERNEL chooses it for both.

Every function returns the kernel that it was, 'sm80' or 'sm90'.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fivedp.kernels.cuda._extension import asked_kernel, extension, raw, stream_of
from fivedp.kernels.cuda.rows import CudaRows

__all__ = ["expert_hidden", "grouped_matmul", "grouped_outer"]

Array = Any


def grouped_matmul(
    x: Array | CudaRows | Sequence[Array | CudaRows], w: Array | Sequence[Array], offsets: Array, out: Array
) -> str:
    """out[i] = x[i] @ w[e] for the rows i of every group e.

    Parameters
    ----------
    x : (R, K) array or CudaRows, or a sequence of such pieces along K
        float32, float64, bfloat16 or float16; any strides.
    w : (E, K, N) array, or a sequence of such pieces along K, cut like x
        Any strides: a transposed view is multiplied as fast.
    offsets : int64 (E + 1,)
        In device memory: borders of the groups.
    out : (R, N)
        The type of x, or float32 where that has 16 bits. Any strides; must not overlap the operands.

    Raises
    ------
    ValueError, TypeError
        Shapes or types that do not fit together.
    """
    xs = list(x) if isinstance(x, list | tuple) else [x]
    ws = list(w) if isinstance(w, list | tuple) else [w]
    ran: str = extension().grouped_matmul(
        [_rows(piece, "grouped_matmul: x") for piece in xs],
        [raw(piece, "grouped_matmul: w") for piece in ws],
        offsets,
        raw(out, "grouped_matmul: out"),
        _hopper(),
        stream_of(out),
    )
    return ran


def grouped_outer(x: Array | CudaRows, dy: Array | CudaRows, offsets: Array, out: Array) -> str:
    """out[e] = x_e^T @ dy_e, the sum over the rows of every group e, in their order; zeros for an empty group.

    Parameters
    ----------
    x : (R, K) array or CudaRows
    dy : (R, N) array or CudaRows
    offsets : int64 (E + 1,)
        In device memory.
    out : (E, K, N)
        The type of x, or float32 where that has 16 bits. Any strides; must not overlap the operands.
    """
    ran: str = extension().grouped_outer(
        _rows(x, "grouped_outer: x"),
        _rows(dy, "grouped_outer: dy"),
        offsets,
        raw(out, "grouped_outer: out"),
        _hopper(),
        stream_of(out),
    )
    return ran


def expert_hidden(
    x: Array | CudaRows,
    w_gate: Array | None,
    w_up: Array,
    offsets: Array,
    hidden: Array,
    *,
    gate: Array | None = None,
    up: Array | None = None,
    activation: str = "swiglu",
) -> str:
    """hidden = silu(x Wg) * (x Wu), or an activation of x Wu alone, group by group; both products in one kernel.

    Parameters
    ----------
    x : (R, H) array or CudaRows
    w_gate : (E, H, F), or None for an activation without gate
    w_up : (E, H, F)
        Any strides; the same as those of w_gate for the fastest copies.
    offsets : int64 (E + 1,)
        In device memory.
    hidden : (R, F)
        Written, in the type of x.
    gate, up : (R, F), optional
        Where given, x Wg and x Wu are kept here, in the type of x, for the backward.
    activation : str
        "swiglu" with w_gate; "gelu" (of erf), "gelu_tanh", "relu" or "silu" without.

    Notes
    -----
    For 16-bit types the activation is of gate and up as they are stored, whether they are kept or not.
    """

    def optional(array: Array | None, who: str) -> Any:
        return None if array is None else raw(array, who)

    ran: str = extension().expert_hidden(
        _rows(x, "expert_hidden: x"),
        optional(w_gate, "expert_hidden: w_gate"),
        raw(w_up, "expert_hidden: w_up"),
        offsets,
        raw(hidden, "expert_hidden: hidden"),
        optional(gate, "expert_hidden: gate"),
        optional(up, "expert_hidden: up"),
        activation,
        _hopper(),
        stream_of(hidden),
    )
    return ran


def _rows(x: Array | CudaRows, who: str) -> Any:
    return x if isinstance(x, CudaRows) else raw(x, who)


def _hopper() -> bool:
    return asked_kernel("PRODUCT") == "sm90"
