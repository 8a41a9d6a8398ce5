"""What gemm computes, against NumPy in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from kernel_operands import BF16, REAL_TYPES, STRIDES, assert_as_exact_as_numpy, bits, cut, draw, exact, with_strides

from fivedp.kernels.gemm import gemm

SHAPES = [
    (1, 1, 1),
    (1, 300, 70),
    (2, 65, 9),
    (7, 129, 1030),
    (8, 700, 257),
    (9, 33, 2049),
    (64, 64, 64),
    (97, 101, 103),
    (300, 5, 512),
    (260, 530, 300),
    (131, 1100, 90),
    (1050, 40, 33),
]


@pytest.mark.parametrize("dtype", REAL_TYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_product_is_as_exact_as_numpys(rng: np.random.Generator, shape: tuple[int, int, int], dtype: Any) -> None:
    m, n, k = shape
    a, b = draw(rng, (m, k), dtype), draw(rng, (k, n), dtype)
    c = np.full((m, n), np.nan, dtype)
    gemm(a, b, c)
    assert_as_exact_as_numpy(c, a, b)


@pytest.mark.parametrize("dtype", REAL_TYPES, ids=str)
def test_random_shapes_strides_and_pieces(rng: np.random.Generator, dtype: Any) -> None:
    for _ in range(25):
        m, n, k = rng.integers(1, 90), rng.integers(1, 90), rng.integers(1, 700)
        a, b = draw(rng, (m, k), dtype), draw(rng, (k, n), dtype)
        a_pieces = [with_strides(rng, piece, rng.choice(STRIDES)) for piece in cut(rng, a, 1, rng.integers(1, 5))]
        b_pieces = [with_strides(rng, piece, rng.choice(STRIDES)) for piece in cut(rng, b, 0, rng.integers(1, 5))]
        c = with_strides(rng, np.full((m, n), np.nan, dtype), rng.choice(STRIDES))
        gemm(a_pieces, b_pieces, c)
        assert_as_exact_as_numpy(c, a, b)


@pytest.mark.parametrize("dtype", REAL_TYPES, ids=str)
def test_memory_between_the_elements_of_c_is_left_alone(rng: np.random.Generator, dtype: Any) -> None:
    for m, n in ((5, 70), (30, 31), (70, 3)):
        whole = draw(rng, (2 * m + 1, 2 * n + 1), dtype)
        before = whole.copy()
        c = whole[1::2, 1::2]
        gemm(draw(rng, (m, 40), dtype), draw(rng, (40, n), dtype), c)
        before[1::2, 1::2] = c
        assert bits(whole) == bits(before)


@pytest.mark.parametrize("dtype", REAL_TYPES, ids=str)
@pytest.mark.parametrize("which", ["both", "a", "b", "a repeated"])
def test_batches_and_broadcast(rng: np.random.Generator, dtype: Any, which: str) -> None:
    for m, n in ((5, 6), (3, 200), (40, 20)):
        batch, k = 4, 33
        a = draw(rng, (batch, m, k), dtype) if which in ("both", "a") else draw(rng, (m, k), dtype)
        b = draw(rng, (k, n) if which == "a" else (batch, k, n), dtype)
        if which == "a repeated":
            a = np.broadcast_to(a, (batch, m, k))
        c = np.full((batch, m, n), np.nan, dtype)
        gemm(a, b, c)
        for i in range(batch):
            assert_as_exact_as_numpy(c[i], a[i] if a.ndim == 3 else a, b[i] if b.ndim == 3 else b)


@pytest.mark.parametrize("dtype", REAL_TYPES, ids=str)
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (-0.5, 0.0), (2.0, 3.0), (0.0, 1.0), (1.0, -0.25)])
def test_alpha_and_beta(rng: np.random.Generator, dtype: Any, alpha: float, beta: float) -> None:
    for m, n, k in ((3, 90, 40), (33, 35, 300), (50, 2, 64)):
        a, b, c = draw(rng, (m, k), dtype), draw(rng, (k, n), dtype), draw(rng, (m, n), dtype)
        right = alpha * exact(a, b) + beta * c.astype(np.float64)
        wide = np.float32 if dtype == BF16 else dtype
        honest = (wide.type(alpha) if hasattr(wide, "type") else wide(alpha)) * np.matmul(
            a.astype(wide), b.astype(wide)
        ) + np.dtype(wide).type(beta) * c.astype(wide)
        numpy_error = abs(honest.astype(dtype).astype(np.float64) - right).max()
        gemm(a, b, c, alpha=alpha, beta=beta)
        eps = {8: 2.0**-52, 4: 2.0**-23, 2: 2.0**-8}[dtype.itemsize]
        assert abs(c.astype(np.float64) - right).max() <= 2 * numpy_error + eps * abs(right).max()


def test_products_of_bfloat16_may_stay_in_float32_and_are_rounded_once(rng: np.random.Generator) -> None:
    for m, n, k in ((4, 100, 77), (40, 41, 600)):
        a, b = draw(rng, (m, k), BF16), draw(rng, (k, n), BF16)
        wide, narrow = np.zeros((m, n), np.float32), np.zeros((m, n), BF16)
        gemm(a, b, wide)
        gemm(a, b, narrow)
        assert_as_exact_as_numpy(wide, a, b)
        assert bits(wide.astype(BF16)) == bits(narrow)


def test_bfloat16_rounds_to_nearest_even_and_keeps_the_special_values() -> None:
    above = np.float32(1 + 2.0**-9)  # half way between 1 and the next bfloat16
    a = np.array([[1.0, 2.0**-8, 0.0], [1.0, 2.0**-7, 2.0**-8]], np.float32).astype(BF16)
    # rows: 1 + 2^-8 is a tie to even (1), 1 + 2^-7 + 2^-8 a tie to even (1 + 2^-6)
    c = np.zeros((2, 1), BF16)
    gemm(a, np.ones((3, 1), BF16), c)
    assert above < 1 + 2.0**-8
    assert c[:, 0].astype(np.float64).tolist() == [1.0, 1 + 2.0**-6]
    for value in (np.inf, -np.inf, np.nan):
        gemm(np.full((2, 1), value, BF16), np.ones((1, 40), BF16), d := np.zeros((2, 40), BF16))
        assert np.array_equal(d.astype(np.float32), np.full((2, 40), value, np.float32), equal_nan=True)
    big = np.full((1, 1), 3.3895314e38, BF16)  # the largest bfloat16: twice it is infinite
    gemm(big, np.full((1, 1), 2.0, BF16), d := np.zeros((1, 1), BF16))
    assert np.isinf(d.astype(np.float32)).all()


@pytest.mark.parametrize("dtype", REAL_TYPES, ids=str)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_infinity_reach_their_rows_and_columns_and_no_others(
    rng: np.random.Generator, dtype: Any, value: float
) -> None:
    for m, n, k in ((3, 130, 50), (20, 37, 300), (100, 3, 40)):
        a, b = draw(rng, (m, k), dtype), draw(rng, (k, n), dtype)
        i, j, at = rng.integers(m), rng.integers(n), rng.integers(k)
        a[i, at] = value
        b[at, j] = value
        c = np.zeros((m, n), dtype)
        gemm(a, b, c)
        finite = np.isfinite(c.astype(np.float32))
        expected = np.ones((m, n), bool)
        expected[i, :] = expected[:, j] = False
        assert np.array_equal(finite, expected)


@pytest.mark.parametrize("dtype", REAL_TYPES, ids=str)
def test_empty_sums_and_empty_results(dtype: Any) -> None:
    c = np.full((5, 70), np.nan, dtype)
    gemm(np.zeros((5, 0), dtype), np.zeros((0, 70), dtype), c)
    assert (c.astype(np.float32) == 0).all()
    gemm(np.zeros((5, 0), dtype), np.zeros((0, 70), dtype), c := np.full((5, 70), 3.0, dtype), beta=0.5)
    assert (c.astype(np.float32) == 1.5).all()
    for m, n in ((0, 5), (5, 0), (0, 0)):
        gemm(np.ones((m, 3), dtype), np.ones((3, n), dtype), np.zeros((m, n), dtype))
    gemm(np.ones((0, 2, 3), dtype), np.ones((3, 4), dtype), np.zeros((0, 2, 4), dtype))


@pytest.mark.parametrize("dtype", [np.complex64, np.complex128], ids=["c64", "c128"])
def test_complex_products(rng: np.random.Generator, dtype: Any) -> None:
    a = (rng.standard_normal((6, 50)) + 1j * rng.standard_normal((6, 50))).astype(dtype)
    b = (rng.standard_normal((50, 7)) + 1j * rng.standard_normal((50, 7))).astype(dtype)
    c = np.ones((6, 7), dtype)
    right = (2 - 1j) * (a.astype(np.complex128) @ b.astype(np.complex128)) + 0.5j
    gemm([a[:, :13], a[:, 13:]], [b[:20], b[20:]], c, alpha=2 - 1j, beta=0.5j)
    eps = np.finfo(dtype).eps
    assert abs(c - right).max() <= 50 * eps * (abs(a) @ abs(b)).max() * abs(2 - 1j)


def test_a_product_with_a_huge_stride() -> None:
    rows = 3
    memory = np.lib.stride_tricks.as_strided  # 3 rows 1 GB apart in address space that is never touched between
    block = np.empty((rows, 1 << 28), np.float32)
    view = memory(block, (rows, 17), block.strides)
    view[...] = np.arange(rows * 17, dtype=np.float32).reshape(rows, 17)
    c = np.zeros((rows, 2), np.float32)
    gemm(view, np.ones((17, 2), np.float32), c)
    assert (c[:, 0] == view.sum(axis=1)).all()


def test_blas_on_request(rng: np.random.Generator, backend_from: Callable[[str], None]) -> None:
    backend_from("blas")
    a, b = draw(rng, (20, 30), np.float32), draw(rng, (30, 25), np.float32)
    c = np.full((20, 25), np.nan, np.float32)
    gemm([a[:, :7], a[:, 7:]], b, c)
    assert bits(c) == bits(np.matmul(a, b))
    gemm(a, b, c, alpha=2.0, beta=1.0)
    assert np.allclose(c, 3 * exact(a, b), rtol=1e-5, atol=1e-4)
    narrow = np.zeros((20, 25), ml_dtypes.bfloat16)
    gemm(a.astype(BF16), b.astype(BF16), narrow)
    assert_as_exact_as_numpy(narrow, a.astype(BF16), b.astype(BF16))
