"""The product of rows grouped by expert, and its backward, on one rank.

Rows are ordered by expert and `counts` says how many each one has. Nothing is padded, nothing is sent; the bits of a
row do not depend on the rows beside it. See `fivedp.kernels.experts` for rows that lie anywhere, and for activations
fused with the products.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from fivedp.errors import DTypeError, ShapeError
from fivedp.kernels import experts as kernel
from fivedp.kernels._select import is_cupy, library_of
from fivedp.kernels.device_copies import to_device
from fivedp.ops.arguments import same_kind

Array = Any

DTYPES = tuple(np.dtype(t) for t in (np.float32, np.float64, ml_dtypes.bfloat16))


def grouped_matmul(x: Array, w: Array, counts: Sequence[int] | npt.NDArray[np.integer[Any]]) -> Array:
    """Multiply each group of rows by its expert's matrix.

    Parameters
    ----------
    x : array, (R, K)
        Rows ordered by expert, NumPy's or CuPy's; float32, float64 or bfloat16.
    w : array, (E, K, N)
        One matrix per expert, of the type of x. Any strides.
    counts : (E,) integers
        Rows of each expert, R in all; some may be 0. On the host, wherever x is.

    Returns
    -------
    y : array, (R, N)
        y[i] = x[i] @ w[e] for every row i of expert e, in the type of x; bfloat16 is summed in float32.

    Raises
    ------
    ShapeError
        Where shapes and counts do not fit together.
    DTypeError
        Where x and w differ in type, or have another than those above.

    Notes
    -----
    Local: no rank waits for another. Each element has the bits of `sharded_matmul` on one rank.

    Examples
    --------
    >>> import numpy as np, fivedp
    >>> w = np.stack([np.eye(2), 2 * np.eye(2)])
    >>> fivedp.grouped_matmul(np.ones((3, 2)), w, [1, 2])
    array([[1., 1.],
           [2., 2.],
           [2., 2.]])
    """
    offsets = _checked("grouped_matmul", x, w, counts)
    y = library_of(x).empty((x.shape[0], w.shape[2]), x.dtype)
    kernel.grouped_matmul(x, w, offsets, y)
    return y


def grouped_matmul_backward(
    dy: Array, x: Array, w: Array, counts: Sequence[int] | npt.NDArray[np.integer[Any]]
) -> tuple[Array, Array]:
    """The gradients of `grouped_matmul`.

    Parameters
    ----------
    dy : array, (R, N)
        The gradient of y, in the type of x.
    x, w, counts
        As `grouped_matmul` had them.

    Returns
    -------
    dx : array, (R, K)
        dy[i] @ w[e]^T.
    dw : array, (E, K, N)
        x_e^T @ dy_e, summed over the rows of expert e in their order; zero for an expert without rows.

    Raises
    ------
    ShapeError, DTypeError
        As `grouped_matmul`, and where dy does not fit.
    """
    operation = "grouped_matmul_backward"
    offsets = _checked(operation, x, w, counts, dy)
    wanted = (x.shape[0], w.shape[2])
    if dy.shape != wanted:
        raise ShapeError(f"{operation}: `dy` has shape {dy.shape}; expected {wanted}, the rows of `x` by N of `w`")
    if dy.dtype != x.dtype:
        raise DTypeError(f"{operation}: `dy` is {dy.dtype} and `x` is {x.dtype}; one type is expected")
    xp = library_of(x)
    dx, dw = xp.empty(x.shape, x.dtype), xp.empty(w.shape, x.dtype)
    kernel.grouped_matmul(dy, w.transpose(0, 2, 1), offsets, dx)
    kernel.grouped_outer(x, dy, offsets, dw)
    return dx, dw


def _check_type(operation: str, name: str, array: Array) -> None:
    if array.dtype not in DTYPES or not array.dtype.isnative:
        raise DTypeError(
            f"{operation}: `{name}` has dtype {array.dtype}; expected one of {', '.join(str(t) for t in DTYPES)}"
        )


def _checked(
    operation: str, x: Array, w: Array, counts: Sequence[int] | npt.NDArray[np.integer[Any]], dy: Array | None = None
) -> Array:
    """The borders of the groups, where the kernel reads them, if all arguments fit together."""
    arrays = {"x": x, "w": w} if dy is None else {"x": x, "w": w, "dy": dy}
    same_kind(operation, arrays)
    for name, array in arrays.items():
        _check_type(operation, name, array)
    if x.dtype != w.dtype:
        raise DTypeError(f"{operation}: `x` is {x.dtype} and `w` is {w.dtype}; one type is expected")
    if x.ndim != 2 or w.ndim != 3:
        raise ShapeError(f"{operation}: `x` has shape {x.shape} and `w` {w.shape}; expected (R, K) and (E, K, N)")
    if x.shape[1] != w.shape[1]:
        raise ShapeError(f"{operation}: K is {x.shape[1]} in `x` and {w.shape[1]} in `w`; they must agree")
    if is_cupy(counts):
        raise DTypeError(f"{operation}: `counts` is a CuPy array; expected a list or a NumPy array, as a batch has")
    given = np.asarray(counts)
    if given.size == 0:
        given = given.astype(np.int64)
    if given.dtype.kind not in "iu":
        raise DTypeError(f"{operation}: `counts` has dtype {given.dtype}; expected integers")
    if given.shape != (w.shape[0],):
        raise ShapeError(f"{operation}: `counts` has shape {given.shape}; expected ({w.shape[0]},), one per expert")
    if (given < 0).any():
        raise ShapeError(f"{operation}: `counts` has {given.min()}; expected 0 or more rows for every expert")
    offsets = np.zeros(len(given) + 1, np.int64)
    np.cumsum(given, out=offsets[1:])
    if offsets[-1] != x.shape[0]:
        raise ShapeError(
            f"{operation}: `counts` adds up to {offsets[-1]} and `x` has {x.shape[0]} rows; they must agree"
        )
    return to_device(library_of(x), [offsets])[0]
