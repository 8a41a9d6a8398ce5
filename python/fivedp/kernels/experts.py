"""One rank's share of a mixture of experts: products of rows grouped by expert, and what lies between and around them.

Rows are ordered by expert: group e is the rows offsets[e] <= i < offsets[e + 1], and may be empty. One call multiplies
all groups; its threads take tiles (expert, rows, columns) from one counter. An operand's rows need not lie together:
`Rows` names them where they are, and packing gathers them, so that no copy is made before the product.

Several processes may call a function for one job, on arrays in memory that they share, with `tiles`: two int64, 0 at
first, that all of them see. Each takes tiles from the first, counts in the second those it has finished, and returns
the number of all tiles when none is left; the job is done when the second has come to that number. Without `tiles` all
are this call's own.

CuPy arrays are served by `fivedp.kernels.cuda`, as far as it has the function.

Every element has the bits that `gemm` gives for its row and expert with the whole sum as one shard (``cuts=(0, k)``),
whatever the number of rows in the group, the threads or the tiles. Types: float32, float64, and bfloat16 with sums in
float32. Results are written in place.

For CuPy arrays the three products are those of `fivedp.kernels.cuda.grouped`: `offsets` lies on the device as well,
`Rows` are those of that module, `progress` and `tiles` are not needed, and 0 is returned.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fivedp import _cpu
from fivedp.kernels._select import is_cupy, raw

__all__ = [
    "ACTIVATIONS",
    "Rows",
    "combine_rows",
    "expert_hidden",
    "expert_hidden_backward",
    "gather_rows",
    "grouped_matmul",
    "grouped_outer",
    "row_dots",
    "weighted_rows",
]

Array = Any
Progress = Callable[[], object]
Tiles = npt.NDArray[np.int64]

# What lies between an expert's two products; the first is gated, the others have no gate.
ACTIVATIONS = ("swiglu", "gelu", "gelu_tanh", "relu", "silu")


class Rows:
    """Rows that lie anywhere: row i is ``arrays[source[i]][index[i]]``.

    Parameters
    ----------
    arrays : sequence of arrays, each (T_s, H)
        Of one type, contiguous along H, any stride between rows; kept alive by this object.
    source, index : int32 (R,)
        Which array, and which of its rows. A row may be named more than once. On the GPU they lie on the device or on
        the host, and source may be None, where all rows are in one array.

    Raises
    ------
    ValueError
        Where an entry of `source` or `index` names no row, or shapes do not fit together.
    TypeError
        Element types other than float32, float64 and bfloat16, or more than one.

    Notes
    -----
    Entries are checked and turned into pointers once, here; the arrays' values are read when a kernel is called. On the
    GPU entries are read by the kernels alone: see `fivedp.kernels.cuda.rows.CudaRows`.
    """

    def __init__(
        self, arrays: Sequence[Array], source: npt.NDArray[np.int32] | None, index: npt.NDArray[np.int32]
    ) -> None:
        arrays = list(arrays)
        self._table: Any
        if arrays and is_cupy(arrays[0]):
            from fivedp.kernels.cuda.rows import CudaRows

            self._table = CudaRows(arrays, source, index)
        else:
            self._table = _cpu.RowTable([raw(array, "Rows: an array") for array in arrays], source, index)
        self.dtype: np.dtype[Any] = arrays[0].dtype
        self.shape: tuple[int, int] = (len(index), int(arrays[0].shape[1]))

    def __len__(self) -> int:
        return self.shape[0]


def grouped_matmul(
    x: Array | Rows | Sequence[Array | Rows],
    w: Array | Sequence[Array],
    offsets: npt.NDArray[np.int64],
    out: Array,
    *,
    progress: Progress | None = None,
    tiles: Tiles | None = None,
) -> int:
    """out[i] = x[i] @ w[e] for the rows i of every group e.

    Parameters
    ----------
    x : (R, K) array or Rows, or a sequence of such pieces along K
        Any strides.
    w : (E, K, N) array, or a sequence of such pieces along K
        Any strides: a transposed view is multiplied as fast.
    offsets : int64 (E + 1,)
        Borders of the groups, rising from 0 to R.
    out : (R, N)
        The type of x, or float32 where that is bfloat16. Any strides; must not overlap the operands.
    progress : callable, optional
        As in `gemm`.

    Raises
    ------
    ValueError
        Shapes or offsets that do not fit together.
    TypeError
        Element types other than those above.
    """
    if is_cupy(out):
        from fivedp.kernels.cuda import grouped

        pieces = x if isinstance(x, list | tuple) else [x]
        grouped.grouped_matmul([_on_gpu(piece) for piece in pieces], w, offsets, out)
        return 0
    return _cpu.grouped_matmul(
        _operand(x, "grouped_matmul: x"),
        _weights(w, "grouped_matmul: w"),
        offsets,
        raw(out, "grouped_matmul: out"),
        progress,
        tiles,
    )


def grouped_outer(
    x: Array | Rows,
    dy: Array | Rows,
    offsets: npt.NDArray[np.int64],
    out: Array,
    *,
    progress: Progress | None = None,
    tiles: Tiles | None = None,
) -> int:
    """out[e] = x_e^T @ dy_e, the sum over the rows of every group e, in their order.

    The sum is over the group's rows (``cuts=(0, rows)``); an empty group gives zeros.

    Parameters
    ----------
    x : (R, K) array or Rows
    dy : (R, N) array or Rows
    offsets : int64 (E + 1,)
    out : (E, K, N)
        The type of x, or float32 where that is bfloat16. Any strides; must not overlap the operands.
    progress : callable, optional
        As in `gemm`.

    Raises
    ------
    ValueError, TypeError
        As in `grouped_matmul`.
    """
    if is_cupy(out):
        from fivedp.kernels.cuda import grouped

        grouped.grouped_outer(_on_gpu(x), _on_gpu(dy), offsets, out)
        return 0
    return _cpu.grouped_outer(
        _rows(x, "grouped_outer: x"),
        _rows(dy, "grouped_outer: dy"),
        offsets,
        raw(out, "grouped_outer: out"),
        progress,
        tiles,
    )


def expert_hidden(
    x: Array | Rows,
    w_gate: Array | None,
    w_up: Array,
    offsets: npt.NDArray[np.int64],
    hidden: Array,
    *,
    gate: Array | None = None,
    up: Array | None = None,
    activation: str = "swiglu",
    progress: Progress | None = None,
    tiles: Tiles | None = None,
) -> int:
    """hidden = silu(x Wg) * (x Wu), or an activation of x Wu alone, group by group.

    Both products of a block are computed by one thread, and the activation is applied while they are in the cache.

    Parameters
    ----------
    x : (R, H) array or Rows
    w_gate : (E, H, F), or None for an activation without gate
    w_up : (E, H, F)
        Any strides.
    offsets : int64 (E + 1,)
    hidden : (R, F)
        Written; the type of x, contiguous along F.
    gate, up : (R, F), optional
        Where given, x Wg and x Wu are kept here, in the type of x, for the backward.
    activation : str
        "swiglu" with w_gate; "gelu" (of erf), "gelu_tanh", "relu" or "silu" without.
    progress : callable, optional
        As in `gemm`.

    Raises
    ------
    ValueError, TypeError
        As in `grouped_matmul`; an activation that is not one of these.

    Notes
    -----
    For bfloat16 the activation is of gate and up as they are stored, rounded to bfloat16, whether they are kept or not:
    so the backward, which knows only the stored ones, differentiates the function that was computed.
    """
    if is_cupy(hidden):
        from fivedp.kernels.cuda import grouped

        grouped.expert_hidden(_on_gpu(x), w_gate, w_up, offsets, hidden, gate=gate, up=up, activation=activation)
        return 0
    return _cpu.expert_hidden(
        _rows(x, "expert_hidden: x"),
        _optional(w_gate, "expert_hidden: w_gate"),
        raw(w_up, "expert_hidden: w_up"),
        offsets,
        raw(hidden, "expert_hidden: hidden"),
        _optional(gate, "expert_hidden: gate"),
        _optional(up, "expert_hidden: up"),
        activation,
        progress,
        tiles,
    )


def expert_hidden_backward(
    d_hidden: Array,
    gate: Array | None,
    up: Array,
    weights: Array | None,
    *,
    d_gate: Array | None,
    d_up: Array,
    hidden_weighted: Array | None = None,
    d_weights: Array | None = None,
    activation: str = "swiglu",
    tiles: Tiles | None = None,
) -> int:
    """The backward of `expert_hidden`'s activation and of the combine weight, in one pass over memory.

    With hidden_i recomputed from gate_i and up_i as the forward had it, for every row i::

        d_weights[i] = <d_hidden_i, hidden_i>
        d_gate_i, d_up_i = the gradients of hidden_i, applied to weights[i] * d_hidden_i
        hidden_weighted_i = weights[i] * hidden_i

    Parameters
    ----------
    d_hidden : (R, F)
        dy Wd^T of rows dy that are not weighted yet. The type of up, or float32 where that is bfloat16.
    gate, up : (R, F)
        As `expert_hidden` kept them; gate is None for an activation without gate.
    weights : (R,), or None for ones
        The rows' weights in the combine, in the type of sums: float64 for float64, else float32.
    d_gate, d_up : (R, F)
        Written, in the type of up; d_gate is None exactly where gate is.
    hidden_weighted : (R, F), optional
        Written, in the type of up: what the gradient of the second product's weights needs.
    d_weights : (R,), optional
        Written, in the type of sums; the sum has a fixed order, the same on every instruction set.
    activation : str
        As in `expert_hidden`.

    Raises
    ------
    ValueError, TypeError
        Shapes or types that do not fit together; an unknown activation.

    Notes
    -----
    Arrays are contiguous along F. An output may be the same array as an input of its type (d_gate that of gate, say);
    they may not overlap otherwise. CuPy arrays go to the kernels of the GPU, which take all of the work: `tiles` is
    None, and 0 is returned.
    """
    if is_cupy(up):
        from fivedp.kernels.cuda import activations

        if tiles is not None:
            raise ValueError("expert_hidden_backward: tiles is given for arrays on a GPU; None would be right")
        activations.expert_hidden_backward(
            d_hidden,
            gate,
            up,
            weights,
            d_gate=d_gate,
            d_up=d_up,
            hidden_weighted=hidden_weighted,
            d_weights=d_weights,
            activation=activation,
        )
        return 0
    return _cpu.expert_hidden_backward(
        raw(d_hidden, "expert_hidden_backward: d_hidden"),
        _optional(gate, "expert_hidden_backward: gate"),
        raw(up, "expert_hidden_backward: up"),
        weights,
        _optional(d_gate, "expert_hidden_backward: d_gate"),
        raw(d_up, "expert_hidden_backward: d_up"),
        _optional(hidden_weighted, "expert_hidden_backward: hidden_weighted"),
        d_weights,
        activation,
        tiles,
    )


def combine_rows(
    rows: Rows,
    starts: npt.NDArray[np.int64],
    weights: Array | None,
    experts: npt.NDArray[np.int32],
    n_experts: int,
    out: Array,
) -> None:
    """out[i] = the sum of weights[p] * rows[p] over starts[i] <= p < starts[i + 1], in a fixed tree over expert ids.

    The tree halves [0, n_experts) again and again, the first half getting the odd one; a node is the sum of its two
    halves, and absent experts are skipped. So a sum over all experts of a node, computed elsewhere with the same tree,
    may stand in for them under any of their ids, and the bits are those of the whole. Each product is rounded before it
    is added.

    Parameters
    ----------
    rows : Rows, (P, H)
    starts : int64 (n + 1,)
        Rising from 0 to P. An output without rows is zero.
    weights : (P,), or None for ones
        In the type of sums: float64 for float64 rows, else float32.
    experts : int32 (P,)
        The expert of each row, strictly rising within an output.
    n_experts : int
    out : (n, H)
        float32 or bfloat16 for rows of these types, float64 for float64 rows; contiguous along H.

    Raises
    ------
    ValueError
        Shapes, starts or experts that do not fit together.
    TypeError
        Element types other than those above.
    """
    if is_cupy(out):
        _gpu().combine_rows(_only_rows(rows, "combine_rows: rows"), starts, weights, experts, n_experts, out)
        return
    _cpu.combine_rows(
        _only_rows(rows, "combine_rows: rows"), starts, weights, experts, n_experts, raw(out, "combine_rows: out")
    )


def gather_rows(rows: Rows, out: Array) -> None:
    """Copy rows into out (R, H), of their type and contiguous along H."""
    if is_cupy(out):
        _gpu().gather_rows(_only_rows(rows, "gather_rows: rows"), out)
        return
    _cpu.gather_rows(_only_rows(rows, "gather_rows: rows"), raw(out, "gather_rows: out"))


def weighted_rows(dy: Array | Rows, weights: Array, out: Array) -> None:
    """out[i] = weights[i] * dy[i]: the backward of a combine towards its rows.

    Parameters
    ----------
    dy : (R, H) array or Rows
        Contiguous along H.
    weights : (R,)
        In the type of sums: float64 for float64, else float32.
    out : (R, H)
        float32 or bfloat16 for dy of these types, float64 for float64; contiguous along H.
    """
    if is_cupy(out):
        _gpu().weighted_rows(_table_or_array(dy), weights, out)
        return
    _cpu.weighted_rows(_rows(dy, "weighted_rows: dy"), weights, raw(out, "weighted_rows: out"))


def row_dots(a: Array | Rows, b: Array | Rows, out: Array) -> None:
    """out[i] = <a[i], b[i]>, in a fixed order, the same on every instruction set.

    Parameters
    ----------
    a, b : (R, H) array or Rows
        Contiguous along H; both float64, or each float32 or bfloat16.
    out : (R,)
        In the type of sums: float64 for float64, else float32.
    """
    if is_cupy(out):
        _gpu().row_dots(_table_or_array(a), _table_or_array(b), out)
        return
    _cpu.row_dots(_rows(a, "row_dots: a"), _rows(b, "row_dots: b"), out)


def _gpu() -> Any:
    """The kernels for CuPy arrays; an ImportError says why where there are none."""
    from fivedp.kernels.cuda import experts

    return experts


def _table_or_array(x: Array | Rows) -> Any:
    return x._table if isinstance(x, Rows) else x


def _on_gpu(x: Array | Rows) -> Any:
    return x._table if isinstance(x, Rows) else x


def _rows(x: Array | Rows, who: str) -> Any:
    return x._table if isinstance(x, Rows) else raw(x, who)


def _only_rows(rows: Rows, who: str) -> Any:
    if not isinstance(rows, Rows):
        raise TypeError(f"{who} is a {type(rows).__name__}; fivedp.kernels.experts.Rows would be right")
    return rows._table


def _operand(x: Array | Rows | Sequence[Array | Rows], who: str) -> list[Any]:
    pieces = list(x) if isinstance(x, list | tuple) else [x]
    return [_rows(piece, who) for piece in pieces]


def _weights(w: Array | Sequence[Array], who: str) -> list[Any]:
    pieces = list(w) if isinstance(w, list | tuple) else [w]
    return [raw(piece, who) for piece in pieces]


def _optional(array: Array | None, who: str) -> Any:
    return None if array is None else raw(array, who)
