"""Inputs made where they are used, from global indices.

Element (i, j) of an operand is a hash of (seed, i, j), so each rank makes its own share, and a check makes again the
rows and columns it wants, and no rank ever holds or sends the whole. Values are uniform in [-1, 1) on a grid of 2^-23,
exact in float32; 16-bit types round them, and float64 adds a second draw below, or its sums would have no rounding
error to check. The hash is the finaliser of MurmurHash3 over a 32-bit mix of row and column keys.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_CHUNK = 1 << 18  # elements hashed at once: their three 32-bit arrays stay in a second-level cache


def dtype_of(name: str) -> np.dtype[Any]:
    """The NumPy type called `name`, bfloat16 included."""
    if name == "bfloat16":
        import ml_dtypes

        brain_float: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
        return brain_float
    return np.dtype(name)


def accumulator_of(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The type that products of `dtype` are summed in: float32 for 16-bit types, else `dtype` itself."""
    return np.dtype(np.float32) if dtype.itemsize == 2 else dtype


def exact_of(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The type of the reference: float64, or complex128 for complex numbers."""
    return np.dtype(np.complex128 if dtype.kind == "c" else np.float64)


def block(seed: int, rows: NDArray[Any] | range, columns: NDArray[Any] | range, dtype: np.dtype[Any]) -> NDArray[Any]:
    """The elements of operand `seed` in `rows` and `columns`, given as global indices.

    Returns
    -------
    array, (len(rows), len(columns)), C order
    """
    if dtype.kind == "c":
        part = np.dtype(np.float32 if dtype.itemsize == 8 else np.float64)
        whole = np.empty((len(rows), len(columns)), dtype)
        whole.real = block(seed, rows, columns, part)
        whole.imag = block(seed ^ 0x5BD1E995, rows, columns, part)
        return whole
    row_keys, column_keys = _keys(rows, seed, 1), _keys(columns, seed, 2)
    out = np.empty((len(row_keys), len(column_keys)), dtype)
    step = max(1, _CHUNK // max(1, len(column_keys)))
    for start in range(0, len(row_keys), step):
        bits = row_keys[start : start + step, None] ^ column_keys[None, :]
        if dtype.itemsize < 8:
            out[start : start + step] = _uniform(bits)
        else:
            fine = _uniform(bits * np.uint32(0x9E3779B1))
            out[start : start + step] = _uniform(bits)
            out[start : start + step] += 2.0**-24 * fine.astype(np.float64)
    return out


def _keys(indices: NDArray[Any] | range, seed: int, salt: int) -> NDArray[np.uint32]:
    """A well mixed 32-bit key for each index (splitmix64, upper half)."""
    x = np.asarray(indices, dtype=np.uint64) * np.uint64(4) + np.uint64(salt)
    x += np.uint64((seed * 0x9E3779B97F4A7C15) % 2**64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x ^= x >> np.uint64(shift)
        x *= np.uint64(factor)
    return np.asarray((x ^ (x >> np.uint64(31))) >> np.uint64(32), dtype=np.uint32)


def _uniform(bits: NDArray[np.uint32]) -> NDArray[np.float32]:
    """Finish the hash in place and read its upper 24 bits as a number in [-1, 1)."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits ^= bits >> np.uint32(shift)
        bits *= np.uint32(factor)
    bits ^= bits >> np.uint32(16)
    bits >>= np.uint32(8)
    values = bits.astype(np.float32)
    values *= np.float32(2.0**-23)
    values -= np.float32(1.0)
    return values
