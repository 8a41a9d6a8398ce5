"""Operands of the GPU's tests: types, arrays between guard zones, rows scattered over several arrays."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

Array = Any
BF16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = {
    name: np.dtype(BF16 if name == "bfloat16" else name) for name in ("float32", "float64", "bfloat16", "float16")
}


def sums_of(dtype: Any) -> np.dtype[Any]:
    """The type in which sums over a type are kept."""
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


def draw(rng: np.random.Generator, shape: Any, dtype: Any) -> Array:
    return rng.standard_normal(shape).astype(dtype)


def bits(array: Array) -> bytes:
    return np.ascontiguousarray(array).tobytes()


class Guarded:
    """An array of NaN (integers: a number that nobody writes) on the device, with as much around it.

    Parameters
    ----------
    xp : module
    shape : tuple of int
    offset : int
        In elements, from an address that is a multiple of 16.
    pad : int
        Elements between rows.
    """

    def __init__(self, xp: Any, shape: tuple[int, ...], dtype: Any, offset: int = 0, pad: int = 0) -> None:
        dtype = np.dtype(dtype)
        self._poison: Any = -77 if dtype.kind == "i" else np.nan
        rows, columns = (1, shape[0]) if len(shape) == 1 else shape
        stride = columns + pad
        guard = 64
        whole = xp.full(rows * stride + 2 * guard + 16, self._poison, dtype)
        address = whole.ctypes.data if xp is np else whole.data.ptr
        begin = guard + (-(address // dtype.itemsize + guard)) % (16 // dtype.itemsize) + offset
        self._whole, self._begin, self._rows, self._columns, self._stride = whole, begin, rows, columns, stride
        inner = whole[begin : begin + rows * stride].reshape(rows, stride)[:, :columns]
        self.array = inner[0] if len(shape) == 1 else inner

    def check_guards(self, host: Any) -> None:
        """Nothing around the array was written."""
        whole = host(self._whole)
        outside = np.ones(whole.shape, bool)
        places = self._begin + np.arange(self._rows)[:, None] * self._stride + np.arange(self._columns)
        outside[places.reshape(-1)] = False
        around = whole[outside].astype(np.float64)
        assert (np.isnan(around) if np.isnan(self._poison) else around == self._poison).all()


def guarded(xp: Any, values: Array, offset: int = 0, pad: int = 0) -> Array:
    """`values` on the device, with NaN around."""
    room = Guarded(xp, values.shape, values.dtype, offset, pad)
    room.array[...] = xp.asarray(values)
    return room.array


def scattered(
    xp: Any, rng: np.random.Generator, x: Array, offset: int = 0, pad: int = 0
) -> tuple[list[Array], Array, Array]:
    """(arrays, source, index) whose rows are those of x."""
    n = len(x)
    source = rng.integers(0, 3, n).astype(np.int32)
    index = np.empty(n, np.int32)
    arrays = []
    for number in range(3):
        mine = np.flatnonzero(source == number)
        order = rng.permutation(len(mine) + 2)[: len(mine)]  # two rows that nobody names
        values = np.full((len(mine) + 2, x.shape[1]), np.nan).astype(x.dtype)
        values[order] = x[mine]
        index[mine] = order
        arrays.append(guarded(xp, values, offset, pad))
    return arrays, source, index
