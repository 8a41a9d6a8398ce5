"""Rows of experts on a GPU: copied, weighted, multiplied row by row, and summed in the tree over expert ids.

Sums are kept in float32 for float32, bfloat16 and float16, in float64 for float64. Those of `combine_rows` and
`row_dots` have the CPU's order and its bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fivedp.kernels.cuda._extension import extension, library_of, raw, stream_of
from fivedp.kernels.cuda.rows import CudaRows

Array = Any


def gather_rows(rows: Array | CudaRows, out: Array) -> None:
    """Copy rows into out (R, H), of their type and contiguous along H.

    A row of `out` whose entry names no row is left as it is.
    """
    extension().gather_rows(_packed(rows, "gather_rows: rows"), raw(out, "gather_rows: out"), stream_of(out))


def weighted_rows(dy: Array | CudaRows, weights: Array, out: Array) -> None:
    """out[i] = weights[i] * dy[i]: the backward of a combine towards its rows.

    Parameters
    ----------
    dy : (R, H) array or CudaRows
        Contiguous along H. Where an entry names no row, `out` is left as it is.
    weights : (R,)
        In the type of sums.
    out : (R, H)
        float64 for float64; else float32, bfloat16 or float16. Contiguous along H.

    Raises
    ------
    ValueError, TypeError
        Shapes or types that do not fit together.
    """
    extension().weighted_rows(_packed(dy, "weighted_rows: dy"), weights, raw(out, "weighted_rows: out"), stream_of(out))


def row_dots(a: Array | CudaRows, b: Array | CudaRows, out: Array) -> None:
    """out[i] = <a[i], b[i]>, in the CPU's order; 0 where an entry names no row.

    Parameters
    ----------
    a, b : (R, H) array or CudaRows
        Contiguous along H; both float64 or neither.
    out : (R,)
        In the type of sums.

    Raises
    ------
    ValueError, TypeError
        Shapes or types that do not fit together.
    """
    extension().row_dots(_packed(a, "row_dots: a"), _packed(b, "row_dots: b"), out, stream_of(out))


def combine_rows(
    rows: Array | CudaRows,
    starts: Array,
    weights: Array | None,
    experts: Array,
    n_experts: int,
    out: Array,
    *,
    most: int | None = None,
) -> None:
    """out[i] = the sum of weights[p] * rows[p] over starts[i] <= p < starts[i + 1], in a fixed tree over expert ids.

    The same tree, and the same bits, as `fivedp.kernels.experts.combine_rows` on the CPU.

    Parameters
    ----------
    rows : (P, H) array or CudaRows
        Contiguous along H. An entry that names no row counts as zeros.
    starts : int64 (n + 1,)
        Rising from 0 to P. An output without rows is zero.
    weights : (P,), or None for ones
        In the type of sums.
    experts : int32 (P,)
        The expert of each row, strictly rising within an output.
    n_experts : int
        At most 65536.
    out : (n, H)
        float64 for float64 rows; else float32, bfloat16 or float16. Contiguous along H.
    most : int, optional
        How many rows most outputs have at most (top_k): outputs with more are slower. By default the mean.

    Raises
    ------
    ValueError, TypeError
        Shapes or types that do not fit together.

    Notes
    -----
    starts, weights and experts may be NumPy arrays, which are copied to the GPU. They are read by the kernel alone, so
    values that break these rules are not reported; starts have to be right.
    """
    xp = library_of(out)
    if most is None:
        most = -(-len(experts) // max(1, len(starts) - 1))
        if isinstance(starts, np.ndarray):
            most = int(np.diff(starts).max(initial=0))
    extension().combine_rows(
        _packed(rows, "combine_rows: rows"), xp.asarray(starts), None if weights is None else xp.asarray(weights),
        xp.asarray(experts), n_experts, raw(out, "combine_rows: out"), most, stream_of(out),
    )  # fmt: skip


def _packed(rows: Array | CudaRows, who: str) -> Any:
    return rows.packed() if isinstance(rows, CudaRows) else raw(rows, who)
