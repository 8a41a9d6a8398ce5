"""The peak that shares are quoted of is not far above a product whose operands stay in the caches."""

from __future__ import annotations

import time
from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest

from fivedp.kernels import gemm

TYPES = [np.dtype(np.float32), np.dtype(np.float64), np.dtype(ml_dtypes.bfloat16)]


def fastest(*runs: Callable[[], float]) -> list[float]:
    """Operations per second of each, the best of many short turns: some of them are without neighbours."""
    best = [0.0] * len(runs)
    for _ in range(40):
        for i, run in enumerate(runs):
            start = time.perf_counter()
            work = run()
            best[i] = max(best[i], work / (time.perf_counter() - start))
    return best


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_a_product_in_the_caches_reaches_much_of_the_peak(dtype: np.dtype) -> None:
    """A loop that the compiler has shortened would give a peak that nothing comes near."""
    n = 384
    a, b = (np.random.default_rng().standard_normal((n, n)).astype(dtype) for _ in range(2))
    c = np.empty((n, n), dtype)

    def product() -> float:
        gemm.gemm(a, b, c)
        return 2.0 * n**3

    before = gemm.threads()
    gemm.set_threads(1)
    try:
        ours, peak = fastest(product, lambda: gemm.multiply_adds(dtype, 100_000))
    finally:
        gemm.set_threads(before)
    print(f"{gemm.isa()}: {ours / peak:.2f} of the peak")
    assert ours > 0.4 * peak


@pytest.mark.parametrize("threads", [1, 3])
def test_operations_grow_with_rounds_and_threads(threads: int) -> None:
    before = gemm.threads()
    try:
        gemm.set_threads(1)
        (one,) = {gemm.multiply_adds(np.float32, rounds) / rounds for rounds in (1, 7, 1000)}
        gemm.set_threads(threads)
        assert gemm.multiply_adds(np.float32, 50) == 50 * threads * one
        assert gemm.multiply_adds(np.float32, 0) == 0
    finally:
        gemm.set_threads(before)


def test_a_type_without_products_is_an_error() -> None:
    with pytest.raises(TypeError, match="like is int32; float32, float64 or bfloat16"):
        gemm.multiply_adds(np.int32, 1)
    with pytest.raises(ValueError, match="rounds is -1"):
        gemm.multiply_adds(np.float32, -1)
