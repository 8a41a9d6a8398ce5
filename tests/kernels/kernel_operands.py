"""Operands and oracles that the kernel tests share."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

Array = Any

BF16 = np.dtype(ml_dtypes.bfloat16)
REAL_TYPES = [np.dtype(np.float32), np.dtype(np.float64), BF16]


def draw(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any) -> Array:
    """Normal numbers, rounded to `dtype`."""
    return rng.standard_normal(shape).astype(dtype)


def exact(a: Array, b: Array) -> Array:
    """The product in float64; for float64 operands in the longest float there is."""
    wide = np.longdouble if a.dtype == np.float64 else np.float64
    return np.matmul(a.astype(wide), b.astype(wide))


def honest(a: Array, b: Array, c_dtype: Any) -> Array:
    """The same product by NumPy in the same type: bfloat16 summed in float32 and rounded once."""
    if a.dtype == BF16:
        return np.matmul(a.astype(np.float32), b.astype(np.float32)).astype(c_dtype)
    return np.matmul(a, b)


def assert_as_exact_as_numpy(c: Array, a: Array, b: Array) -> None:
    """The largest error is at most twice NumPy's in the same type, plus one rounding of the largest sum of sizes.

    NumPy's own error may by chance be nought for a handful of elements; the second term is what any order of summation
    may lose in its last addition.
    """
    right = exact(a, b)
    if right.size == 0:
        assert c.shape == right.shape
        return
    sizes = np.matmul(abs(a.astype(np.float64)), abs(b.astype(np.float64)))
    rounding = {8: 2.0**-53, 4: 2.0**-24, 2: 2.0**-9}[c.dtype.itemsize]
    error = abs(c.astype(right.dtype) - right).max()
    numpy_error = abs(honest(a, b, c.dtype).astype(right.dtype) - right).max()
    assert error <= 2 * numpy_error + rounding * sizes.max()


def bits(array: Array) -> bytes:
    """The bytes of an array in C order: NaN, -0 and all."""
    return np.ascontiguousarray(array).tobytes()


def with_strides(rng: np.random.Generator, array: Array, kind: str) -> Array:
    """An array of the same values that lies in memory another way."""
    if kind == "c":
        return np.ascontiguousarray(array)
    if kind == "f":
        return np.ascontiguousarray(array.swapaxes(-1, -2)).swapaxes(-1, -2)
    if kind == "negative":
        return np.ascontiguousarray(array[..., ::-1, ::-1])[..., ::-1, ::-1]
    if kind == "gaps":
        wide = np.zeros((*array.shape[:-2], 2 * array.shape[-2], 3 * array.shape[-1]), array.dtype)
        view = wide[..., ::2, 1::3]
        view[...] = array
        return view
    if kind == "unaligned":
        raw = np.zeros(array.nbytes + 1, np.uint8)
        view = np.frombuffer(raw.data, array.dtype, array.size, offset=1).reshape(array.shape)
        view[...] = array
        return view
    raise ValueError(kind)


STRIDES = ["c", "f", "negative", "gaps", "unaligned"]


def cut(rng: np.random.Generator, array: Array, axis: int, n_pieces: int) -> list[Array]:
    """The array in pieces along `axis` at random places; some may be empty."""
    borders = np.sort(rng.integers(0, array.shape[axis] + 1, n_pieces - 1))
    return np.split(array, borders, axis=axis)
