"""Rows that lie anywhere on the GPU: the `Rows` of fivedp.kernels.experts, with its tables in device memory."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from fivedp.kernels.cuda._extension import library_of, raw

Array = Any


class CudaRows:
    """Rows that lie anywhere: row i is ``arrays[source[i]][index[i]]``.

    Parameters
    ----------
    arrays : sequence of arrays, each (T_s, H)
        Of one type, contiguous along H, any stride between rows; kept alive by this object.
    source : int32 (R,), or None where all rows are in the first array
    index : int32 (R,)
        Which array, and which of its rows. On the GPU, or NumPy arrays, which are copied there.

    Raises
    ------
    ValueError, TypeError
        Shapes or types that do not fit together.

    Notes
    -----
    `source` and `index` are read when a kernel runs, so they may be results of kernels themselves; an entry that names
    no row (-1, say) is no error: see the functions of `fivedp.kernels.cuda.experts`. What a kernel reads is a table of
    pointers, strides and numbers of rows, one entry for each array.
    """

    def __init__(self, arrays: Sequence[Array], source: Array | None, index: Array) -> None:
        arrays = [raw(array, "Rows: an array") for array in arrays]
        if not arrays:
            raise ValueError("Rows: arrays is empty; at least one array would be right")
        first = arrays[0]
        xp = library_of(first)
        for number, array in enumerate(arrays):
            if array.ndim != 2 or array.shape[1] != first.shape[-1]:
                raise ValueError(
                    f"Rows: array {number} has shape {array.shape} and array 0 {first.shape}; "
                    "(rows, columns) with as many columns would be right"
                )
            if array.dtype != first.dtype:
                raise TypeError(f"Rows: the arrays are {first.dtype} and {array.dtype}; one type would be right")
            if array.shape[0] > 0 and array.shape[1] > 1 and array.strides[1] != array.itemsize:
                raise ValueError(f"Rows: array {number} is strided along its columns; contiguous rows would be right")
        table = np.array([[_pointer(array), array.strides[0], array.shape[0]] for array in arrays], np.int64)
        self._arrays = arrays
        self._table = xp.asarray(table)
        self._source = None if source is None else _indices(xp, source, "source")
        self._index = _indices(xp, index, "index")
        if self._source is not None and self._source.shape != self._index.shape:
            raise ValueError(
                f"Rows: source has {len(self._source)} entries and index {len(self._index)}; as many would be right"
            )
        self._empty = xp.empty(0, first.dtype)
        if source is None and len(arrays) != 1:
            raise ValueError(f"Rows: source is None and there are {len(arrays)} arrays; one array would be right")
        strides = table[table[:, 2] > 1, 1]
        self._bits = int(np.bitwise_or.reduce(np.concatenate([table[:, 0], strides]))) % 16
        self.shape: tuple[int, int] = (len(self._index), int(first.shape[1]))

    def __len__(self) -> int:
        return self.shape[0]

    @functools.cached_property
    def addresses(self) -> Array:
        """Where each row begins, int64 (R,) on the device; entries that name no row give no address."""
        where = 0 if self._source is None else self._source
        addresses: Array = self._index.astype(np.int64) * self._table[where, 1] + self._table[where, 0]
        return addresses

    @property
    def aligned(self) -> bool:
        """Whether every row begins at a multiple of 16 bytes."""
        return self._bits % 16 == 0

    @property
    def columns(self) -> int:
        """Elements of a row."""
        return self.shape[1]

    @property
    def type(self) -> str:
        """The element type as the array interface has it, without the byte order; bfloat16 is u2."""
        return str(self._empty.dtype.str[1:])

    def packed(self) -> tuple[Any, ...]:
        """What the extension takes: the table, source, index, an array of the type, columns, and how far all addresses
        and strides are aligned (or-ed)."""
        return (self._table, self._source, self._index, self._empty, self.shape[1], self._bits)


def _pointer(array: Array) -> int:
    return int(array.ctypes.data if isinstance(array, np.ndarray) else array.data.ptr)


def _indices(xp: Any, values: Array, name: str) -> Array:
    if values.dtype != np.int32 or values.ndim != 1:
        raise TypeError(f"Rows: {name} is {values.dtype} of shape {values.shape}; int32 of (rows,) would be right")
    return xp.ascontiguousarray(xp.asarray(values))
