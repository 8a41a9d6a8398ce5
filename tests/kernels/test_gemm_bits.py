"""The order of every sum is fixed: the bits depend on the numbers and the virtual shards alone."""

from __future__ import annotations

import itertools
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_operands import BF16, REAL_TYPES, STRIDES, bits, cut, draw, with_strides

from fivedp.kernels import gemm as kernel
from fivedp.kernels.gemm import gemm

KS = [1, 5, 8, 64, 300, 1000, 2048, 2500, 4500]
K_BLOCK = 256


def product(a: Any, b: Any, dtype: Any = None, **keywords: Any) -> Any:
    first, last = (a if isinstance(a, list) else [a]), (b if isinstance(b, list) else [b])
    c = np.full((first[0].shape[-2], last[0].shape[-1]), np.nan, dtype or first[0].dtype)
    gemm(a, b, c, **keywords)
    return c


def fused(x: Any, y: Any, z: Any) -> Any:
    """x * y + z in float32 with one rounding, by exact rational arithmetic."""
    right = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
    near = np.float64(right.numerator / right.denominator)  # rounded to nearest in float64 ...
    if Fraction(float(near)) != right:  # ... made odd, so that rounding again to float32 is right
        if abs(Fraction(float(near))) > abs(right):
            near = np.nextafter(near, 0)
        near = np.array([near.view(np.int64) | 1]).view(np.float64)[0]
    return np.float32(near)


@pytest.mark.parametrize("n_shards", [1, 2, 3, 4, 5, 6, 7, 8, 13])
def test_the_order_is_the_documented_one(rng: np.random.Generator, n_shards: int) -> None:
    k = int(rng.integers(1, 1200 if n_shards < 4 else 200))
    a, b = draw(rng, (2, k), np.float32), draw(rng, (k, 2), np.float32)
    borders = [0, *sorted(int(cut) for cut in rng.integers(0, k + 1, n_shards - 1)), k]
    c = product(a, b, cuts=borders)
    for i in range(2):
        for j in range(2):
            stack: list[tuple[int, Any]] = []
            for begin, end in itertools.pairwise(borders):
                shard = None
                for start in range(begin, max(end, begin + 1), K_BLOCK):
                    chain = np.float32(0)
                    for at in range(start, min(start + K_BLOCK, end)):
                        chain = fused(a[i, at], b[at, j], chain)
                    shard = chain if shard is None else shard + chain
                leaves = 1
                while stack and stack[-1][0] == leaves:
                    shard, leaves = stack.pop()[1] + shard, 2 * leaves
                stack.append((leaves, shard))
            total = stack.pop()[1]
            while stack:
                total = stack.pop()[1] + total
            assert bits(total) == bits(c[i, j])


@pytest.mark.parametrize("dtype", REAL_TYPES, ids=str)
@pytest.mark.parametrize("k", KS)
def test_bits_of_a_part_of_the_result_are_those_of_the_whole(rng: np.random.Generator, dtype: Any, k: int) -> None:
    m, n = 61, 230
    a, b = draw(rng, (m, k), dtype), draw(rng, (k, n), dtype)
    whole = product(a, b, np.float32 if dtype == BF16 else None)
    for rows in (1, 2, 3, 5, 8, 9, 10, 11, 17, 31):
        for columns in (1, 3, 40, 130, n):
            i, j = int(rng.integers(m - rows + 1)), int(rng.integers(n - columns + 1))
            part = product(a[i : i + rows], b[:, j : j + columns], whole.dtype)
            assert bits(part) == bits(whole[i : i + rows, j : j + columns])


@pytest.mark.parametrize("dtype", REAL_TYPES, ids=str)
@pytest.mark.parametrize(("k", "n_shards"), [(5000, 3), (2500, 8), (900, 13), (3000, 40)], ids=str)
def test_rows_of_a_high_product_have_the_bits_of_a_row_alone(
    rng: np.random.Generator, dtype: Any, k: int, n_shards: int
) -> None:
    # So many rows are packed in several strips; a single row takes the way of few rows, with no strips at all.
    m, n = 300, 400
    a, b = draw(rng, (m, k), dtype), draw(rng, (k, n), dtype)
    borders = [0, *sorted(int(cut) for cut in rng.integers(0, k + 1, n_shards - 1)), k]
    whole = product(a, b, cuts=borders)
    for row in (0, 62, 63, 134, 135, 270, 299, int(rng.integers(m))):
        assert bits(product(a[row : row + 1], b, cuts=borders)) == bits(whole[row : row + 1])


@pytest.mark.parametrize("dtype", REAL_TYPES, ids=str)
@pytest.mark.parametrize("m", [1, 4, 7, 50])
def test_bits_do_not_depend_on_strides_or_pieces(rng: np.random.Generator, dtype: Any, m: int) -> None:
    for k in KS:
        n = 150
        a, b = draw(rng, (m, k), dtype), draw(rng, (k, n), dtype)
        whole = bits(product(a, b))
        for kind in STRIDES:
            assert bits(product(with_strides(rng, a, kind), b)) == whole
            assert bits(product(a, with_strides(rng, b, kind))) == whole
            gemm(a, b, c := with_strides(rng, np.zeros((m, n), dtype), kind))
            assert bits(c) == whole
        a_pieces, b_pieces = cut(rng, a, 1, 4), cut(rng, b, 0, 3)
        assert bits(product(a_pieces, b_pieces)) == whole
        turned = [with_strides(rng, piece, "f") for piece in b_pieces]
        assert bits(product([with_strides(rng, piece, "f") for piece in a_pieces], turned)) == whole


@pytest.mark.parametrize("dtype", REAL_TYPES, ids=str)
def test_the_transposed_product_has_the_same_bits(rng: np.random.Generator, dtype: Any) -> None:
    for m, n, k in ((3, 200, 300), (70, 90, 1000), (200, 5, 2100)):
        a, b = draw(rng, (m, k), dtype), draw(rng, (k, n), dtype)
        assert bits(product(b.T, a.T).T) == bits(product(a, b))


@pytest.mark.parametrize("dtype", REAL_TYPES, ids=str)
@pytest.mark.usefixtures("restore_threads")
def test_bits_do_not_depend_on_the_number_of_threads(rng: np.random.Generator, dtype: Any) -> None:
    for m, n, k in ((4, 3000, 500), (300, 310, 700), (1500, 20, 300)):
        a, b = draw(rng, (m, k), dtype), draw(rng, (k, n), dtype)
        results = set()
        for count in (1, 2, 3, 5):
            kernel.set_threads(count)
            assert kernel.threads() == count
            results.add(bits(product(a, b)))
        assert len(results) == 1


@pytest.mark.parametrize("dtype", REAL_TYPES, ids=str)
def test_a_batch_has_the_bits_of_its_products(rng: np.random.Generator, dtype: Any) -> None:
    for m, n, k in ((3, 100, 300), (20, 30, 1000)):
        a, b = draw(rng, (5, m, k), dtype), draw(rng, (k, n), dtype)
        gemm(a, b, c := np.zeros((5, m, n), dtype))
        for i in range(5):
            assert bits(c[i]) == bits(product(a[i], b))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    m=st.integers(1, 40),
    n=st.integers(1, 80),
    k=st.integers(0, 700),
    n_shards=st.integers(1, 12),
    dtype=st.sampled_from(REAL_TYPES),
    a_kind=st.sampled_from(STRIDES),
    b_kind=st.sampled_from(STRIDES),
)
def test_any_pieces_and_strides_give_the_bits_of_the_plain_call(
    seed: int, m: int, n: int, k: int, n_shards: int, dtype: Any, a_kind: str, b_kind: str
) -> None:
    rng = np.random.default_rng(seed)
    a, b = draw(rng, (m, k), dtype), draw(rng, (k, n), dtype)
    borders = [0, *sorted(int(cut) for cut in rng.integers(0, k + 1, n_shards - 1)), k]
    whole = product(a, b, cuts=borders)
    a_pieces = [with_strides(rng, piece, a_kind) for piece in cut(rng, a, 1, int(rng.integers(1, 6)))]
    b_pieces = [with_strides(rng, piece, b_kind) for piece in cut(rng, b, 0, int(rng.integers(1, 6)))]
    assert bits(product(a_pieces, b_pieces, cuts=borders)) == bits(whole)


def test_default_cuts_are_those_of_array_split(rng: np.random.Generator) -> None:
    for k in (3, 8, 61, 1003):
        a, b = draw(rng, (9, k), np.float32), draw(rng, (k, 9), np.float32)
        lengths = [len(part) for part in np.array_split(np.arange(k), 8)]
        assert bits(product(a, b)) == bits(product(a, b, cuts=np.cumsum([0, *lengths])))


def test_a_sum_that_underflows_to_minus_zero_is_joined_to_plus_zero() -> None:
    # A chain of one term can give -0 by underflow; seven empty shards, each +0, make it +0 in any tree.
    tiny = np.full((1, 1), 1e-30, np.float32)
    assert bits(product(tiny, -tiny)) == bits(np.zeros((1, 1), np.float32))
    assert bits(product(tiny, -tiny, cuts=[0, 1])) == bits(np.full((1, 1), -0.0, np.float32))
