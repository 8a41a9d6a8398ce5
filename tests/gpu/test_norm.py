"""Norms on the GPU against float64."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from fivedp.kernels.cuda import pointwise

BF16 = np.dtype(ml_dtypes.bfloat16)
UNITS = {"float32": 2.0**-24, "float64": 2.0**-53, "bfloat16": 2.0**-8, "float16": 2.0**-11}


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 7), (5, 256), (2, 1000), (2, 9001), (0, 8)])
def test_rms_norm_is_that_of_float64(xp: Any, host: Any, seed: int, dtype: str, rows: int, columns: int) -> None:
    rng, kind = np.random.default_rng(seed), np.dtype(BF16 if dtype == "bfloat16" else dtype)
    x, gain = rng.standard_normal((rows, columns)).astype(kind), rng.standard_normal(columns).astype(kind)
    sums = np.dtype(np.float64 if dtype == "float64" else np.float32)
    y, inverse = xp.full((rows, columns), np.nan, kind), xp.full(rows, np.nan, sums)
    pointwise.rms_norm(xp.asarray(x), xp.asarray(gain), y, inverse=inverse, epsilon=1e-5)
    exact = 1 / np.sqrt((x.astype(np.float64) ** 2).mean(axis=1) + 1e-5)
    want = x.astype(np.float64) * exact[:, None] * gain.astype(np.float64)
    # a sum of squares in a tree below 64 rounded additions deep, then a root, a quotient, two products, a rounding
    small = 40 * (2.0**-53 if dtype == "float64" else 2.0**-24)
    np.testing.assert_allclose(host(inverse), exact, rtol=small)
    np.testing.assert_allclose(
        host(y).astype(np.float64), want, rtol=small + UNITS[dtype], atol=2.0**-24 if dtype == "float16" else 1e-30
    )


def test_rms_norm_names_what_does_not_fit(xp: Any) -> None:
    x = xp.zeros((2, 3), np.float32)
    with pytest.raises(ValueError, match=r"rms_norm: y has shape \(2, 4\); \(2, 3\) would be right"):
        pointwise.rms_norm(x, None, xp.zeros((2, 4), np.float32))
    with pytest.raises(TypeError, match="rms_norm: gain has type f8; f4 would be right"):
        pointwise.rms_norm(x, xp.zeros(3), xp.zeros((2, 3), np.float32))
