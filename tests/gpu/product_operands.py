"""Operands of the products' tests: random values, laid out in every way; results with a guard zone; error bounds; which
kernel is asked for."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from fivedp.kernels.cuda._extension import asked_kernel

DTYPES = ["float32", "float64", "bfloat16", "float16"]
LAYOUTS = ["rows", "columns", "shifted", "strided"]


BOTH = ("sm80", "sm90")


def each(*names: str) -> Any:
    """A test for types, those of 16 bits with both kernels that FIVEDP_PRODUCT_KERNEL may ask for."""
    cases = [(name, asked) for name in names for asked in (BOTH if name in ("bfloat16", "float16") else BOTH[:1])]
    ids = ["-".join(case) for case in cases]
    cut = pytest.mark.parametrize(("dtype", "product_kernel"), cases, ids=ids, indirect=["product_kernel"])
    return lambda test: pytest.mark.usefixtures("product_kernel")(cut(test))


def select(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Ask for a kernel."""
    monkeypatch.setenv("FIVEDP_PRODUCT_KERNEL", name)
    asked_kernel.cache_clear()


def has_hopper(xp: Any) -> bool:
    """Whether the GPU, the emulated one included, has the instructions of sm90."""
    return xp is np or int(xp.cuda.Device().compute_capability) // 10 == 9


def dtype_of(name: str) -> np.dtype[Any]:
    """The NumPy type of a name, bfloat16 among them."""
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def laid_out(xp: Any, values: np.ndarray, layout: str) -> Any:
    """A device array of these values whose last two indices lie in memory in the given way."""
    *batch, rows, columns = values.shape
    if layout == "rows":
        array = xp.empty(values.shape, values.dtype)
    elif layout == "columns":
        array = xp.empty((*batch, columns, rows), values.dtype).swapaxes(-1, -2)
    elif layout == "shifted":  # by one element, in rows that are one longer: unaligned
        array = xp.empty((*batch, rows, columns + 1), values.dtype)[..., 1:]
    else:
        array = xp.empty((*batch, 2 * rows, 3 * columns), values.dtype)[..., ::2, ::3]
    array[...] = xp.asarray(values)
    return array


class Guarded:
    """A poisoned result within a larger array, which a kernel must leave alone."""

    def __init__(self, xp: Any, shape: tuple[int, ...], dtype: np.dtype[Any], layout: str = "rows") -> None:
        *batch, rows, columns = shape
        self._whole = xp.full((*batch, rows + 2, columns + 3), 7, dtype)
        if layout == "columns":
            self._whole = xp.full((*batch, columns + 3, rows + 2), 7, dtype).swapaxes(-1, -2)
        self.array = self._whole[..., 1 : rows + 1, 2 : columns + 2]
        self.array[...] = np.nan

    def values(self, host: Any) -> np.ndarray:
        """The result in float64, after a look at what lies around it."""
        whole = host(self._whole).astype(np.float64)
        rows, columns = self.array.shape[-2:]
        result = whole[..., 1 : rows + 1, 2 : columns + 2].copy()
        whole[..., 1 : rows + 1, 2 : columns + 2] = 7
        assert (whole == 7).all(), "written outside of the result"
        return result


def sum_bound(dtype: str, k: int, magnitude: np.ndarray) -> np.ndarray:
    """The most that a sum of k products of total magnitude `magnitude` may be wrong by.

    A matrix instruction may cut off what lies below the last bit of its float32 sum: 2^-23 for each addition. A factor
    of float32 is two parts of 11 bits: 2^-22 for each of the two, and as much for the product of the two low parts.
    """
    if dtype == "float64":
        return (k + 8) * 2.0**-53 * magnitude
    return ((k + 8) * 2.0**-23 + (3 * 2.0**-22 if dtype == "float32" else 0)) * magnitude


def rounding(name: Any, values: np.ndarray) -> np.ndarray:
    """The most that rounding a result to a type changes it."""
    unit = {"float32": 2.0**-24, "float64": 2.0**-53, "bfloat16": 2.0**-8, "float16": 2.0**-11}[str(name)]
    return 1.01 * unit * np.abs(values) + (2.0**-24 if str(name) == "float16" else 1e-38)
