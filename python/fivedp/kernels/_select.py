"""Which kernels serve an array: the CPU extension, or the array library itself.

Arrays are told apart by their type, without importing CuPy where nobody else has. FIVEDP_GEMM=blas replaces the
extension's products by NumPy's (fast where its BLAS is, without the promise on bits); FIVEDP_GEMM=canonical replaces
cuBLAS, which multiplies CuPy arrays by default, by the extension's own product with its fixed order.
"""

from __future__ import annotations

import functools
import os
import sys
from typing import Any

import ml_dtypes
import numpy as np

_BF16 = np.dtype(ml_dtypes.bfloat16)
_U16 = np.dtype(np.uint16)


def is_cupy(array: Any) -> bool:
    """Whether `array` is a CuPy array."""
    cupy = sys.modules.get("cupy")
    return cupy is not None and isinstance(array, cupy.ndarray)


def library_of(array: Any) -> Any:
    """The array library of `array`: cupy for its arrays, numpy for all others."""
    return sys.modules["cupy"] if is_cupy(array) else np


def setting(name: str, *values: str) -> str:
    """The environment variable `name`, one of `values`; the first of them where it is not set.

    Raises
    ------
    ValueError
        Where it is none of these.
    """
    wanted = os.environ.get(name) or values[0]
    if wanted not in values:
        *others, last = map(repr, values)
        raise ValueError(f"{name} is {wanted!r}; {', '.join(others)} or {last} would be right")
    return wanted


@functools.cache
def gemm_backend() -> str:
    """What multiplies: FIVEDP_GEMM.

    ``fivedp``, the default, is the extension's own kernels for NumPy arrays and cuBLAS for CuPy's; ``blas`` the array
    library's product for both; ``canonical`` the extension's own for both. Asked once: a small product has no time to
    read the environment.
    """
    return setting("FIVEDP_GEMM", "fivedp", "blas", "canonical")


def raw(array: Any, who: str) -> Any:
    """An array as the extension takes it: bfloat16 as its bits, in uint16. `who` names it in the error.

    Raises
    ------
    TypeError
        Where it is uint16: the extension could not tell it from bfloat16.
    """
    dtype = getattr(array, "dtype", None)
    if dtype == _BF16:
        return array.view(_U16)
    if dtype == _U16:
        raise TypeError(f"{who} is uint16; float32, float64 or bfloat16 would be right")
    return array


def sum_type(dtype: Any) -> np.dtype[Any]:
    """The type in which sums over elements of `dtype` are kept and travel: float64 for float64, else float32."""
    return np.dtype(np.float64) if np.dtype(dtype) == np.float64 else np.dtype(np.float32)
