"""Operands for tests of one-pass kernels: types, fresh numbers, results between guard zones."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

BF16 = np.dtype(ml_dtypes.bfloat16)
TYPES = [np.dtype(np.float32), np.dtype(np.float64), BF16, np.dtype(np.float16)]
F64 = np.float64


def sum_type(dtype: Any) -> np.dtype[Any]:
    return np.dtype(F64 if dtype == F64 else np.float32)


def unit(dtype: Any) -> float:
    """Half the distance from 1 to the next number: the relative error of one rounding."""
    return float(ml_dtypes.finfo(dtype).eps) / 2


def smallest(dtype: Any) -> float:
    """Half the distance of subnormal numbers: the absolute error of one rounding."""
    return float(ml_dtypes.finfo(dtype).smallest_subnormal)


def draw(rng: np.random.Generator, shape: Any, dtype: Any) -> Any:
    return rng.standard_normal(shape).astype(dtype)


def error_is_below(result: Any, right: Any, bound: Any) -> None:
    """|result - right| <= bound, element by element; the largest excess is named."""
    error = abs(np.asarray(result, F64) - right)
    excess = error / np.broadcast_to(np.maximum(bound, 1e-300), error.shape)
    assert excess.size == 0 or (excess <= 1).all(), f"error is {np.nanmax(excess):.3g} times the bound"


class Guarded:
    """An array filled with NaN in the midst of memory that must stay as it is.

    `offset` moves its begin by so many elements from a multiple of 16 bytes, `gap` elements lie between rows.
    """

    def __init__(self, xp: Any, shape: Any, dtype: Any, *, offset: int = 0, gap: int = 0, values: Any = None) -> None:
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        rows, columns = int(np.prod(shape[:-1])), shape[-1]
        size = rows * (columns + gap)
        memory = np.full(size + 80, -77.5, dtype)
        inside = np.zeros(memory.shape, bool)
        start = (-memory.ctypes.data // memory.itemsize) % 16 + 16 + offset if xp is np else 16 + offset

        def part(of: Any) -> Any:
            return of[start : start + size].reshape(*shape[:-1], columns + gap)[..., :columns]

        part(inside)[...] = True
        part(memory)[...] = np.nan if values is None else values
        self._inside = inside
        self._memory = memory if xp is np else xp.asarray(memory)  # CuPy's allocations are aligned
        self.array = part(self._memory)

    def check(self, host: Any) -> None:
        """Nothing around the array has changed."""
        assert (host(self._memory)[~self._inside].astype(F64) == -77.5).all(), "written beyond the array's end"
