"""The GPU's product against float64, and its bits against those of the same product cut in other ways."""

from __future__ import annotations

import itertools
import threading
import time
from typing import Any

import numpy as np
import pytest
from product_operands import DTYPES, LAYOUTS, Guarded, dtype_of, each, laid_out, rounding, sum_bound

from fivedp.kernels._array_library import combine, default_cuts, whole_product
from fivedp.kernels.cuda.gemm import gemm


def check(host: Any, dtype: str, c: Guarded, a: np.ndarray, b: np.ndarray, out: Any) -> None:
    wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
    want = wide_a @ wide_b
    bound = sum_bound(dtype, a.shape[-1], np.abs(wide_a) @ np.abs(wide_b))
    error = np.abs(c.values(host) - want)
    assert (error <= bound + rounding(out, np.abs(want) + bound)).all(), float(error.max())


@each(*DTYPES)
@pytest.mark.parametrize(("m", "k", "n"), [(1, 1, 1), (3, 40, 9), (130, 200, 70), (0, 4, 3), (5, 0, 6), (4, 9, 0)])
def test_product_is_that_of_float64(xp: Any, host: Any, seed: int, dtype: str, m: int, k: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = (rng.standard_normal(shape).astype(dtype_of(dtype)) for shape in ((m, k), (k, n)))
    c = Guarded(xp, (m, n), a.dtype)
    gemm(xp.asarray(a), xp.asarray(b), c.array)
    check(host, dtype, c, a, b, dtype)


@each(*DTYPES)
def test_operands_may_lie_in_any_way(xp: Any, host: Any, seed: int, dtype: str) -> None:
    rng = np.random.default_rng(seed)
    a, b = (rng.standard_normal(shape).astype(dtype_of(dtype)) for shape in ((24, 72), (72, 40)))
    reference = Guarded(xp, (24, 40), a.dtype)
    gemm(xp.asarray(a), xp.asarray(b), reference.array)
    check(host, dtype, reference, a, b, dtype)
    for (left, right), layout in zip(itertools.product(LAYOUTS, repeat=2), itertools.cycle(["rows", "columns"])):
        c = Guarded(xp, (24, 40), a.dtype, layout)
        gemm(laid_out(xp, a, left), laid_out(xp, b, right), c.array)
        np.testing.assert_array_equal(c.values(host), reference.values(host), err_msg=f"{left}, {right}, {layout}")


@each(*DTYPES)
def test_bits_are_the_same_for_any_number_of_ranks_that_share_k(xp: Any, host: Any, seed: int, dtype: str) -> None:
    rng = np.random.default_rng(seed)
    m, k, n = 17, 8 * 21 + 5, 19
    a, b = (rng.standard_normal(shape).astype(dtype_of(dtype)) for shape in ((m, k), (k, n)))
    sums, cuts = np.dtype(np.float64 if dtype == "float64" else np.float32), default_cuts(k)
    results = []
    for ranks in (1, 2, 4, 8):
        partials, shards = [], 8 // ranks
        for rank in range(ranks):
            borders = cuts[rank * shards : (rank + 1) * shards + 1]
            begin, end = borders[0], borders[-1]
            partial = xp.full((m, n), np.nan, sums)
            gemm(
                xp.asarray(np.ascontiguousarray(a[:, begin:end])),
                xp.asarray(b[begin:end]),
                partial,
                cuts=[border - begin for border in borders],
            )
            partials.append((shards, partial))
        results.append(host(combine(partials)))
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


@each(*DTYPES)
def test_bits_do_not_depend_on_the_tile_or_the_place_in_it(xp: Any, host: Any, seed: int, dtype: str) -> None:
    rng = np.random.default_rng(seed)
    a, b = (rng.standard_normal(shape).astype(dtype_of(dtype)) for shape in ((137, 24), (24, 141)))
    whole, part = xp.full((137, 141), np.nan, a.dtype), xp.full((33, 31), np.nan, a.dtype)
    gemm(xp.asarray(a), xp.asarray(b), whole)
    row, column = rng.integers(0, 137 - 33), rng.integers(0, 141 - 31)
    gemm(xp.asarray(a[row : row + 33]), xp.asarray(b[:, column : column + 31]), part)
    np.testing.assert_array_equal(host(part), host(whole)[row : row + 33, column : column + 31])


@each("float32", "bfloat16")
@pytest.mark.parametrize("n_shards", [1, 3, 5, 11])
def test_any_number_of_shards_is_joined_in_the_tree(xp: Any, host: Any, seed: int, dtype: str, n_shards: int) -> None:
    rng = np.random.default_rng(seed)
    k = 64
    a, b = (xp.asarray(rng.standard_normal(shape).astype(dtype_of(dtype))) for shape in ((9, k), (k, 7)))
    cuts = [0, *np.sort(rng.integers(0, k + 1, n_shards - 1)).tolist(), k]  # some may be empty
    c, partials = xp.full((9, 7), np.nan, np.float32), []
    gemm(a, b, c, cuts=cuts)
    for begin, end in itertools.pairwise(cuts):
        partial = xp.full((9, 7), np.nan, np.float32)
        gemm(a[:, begin:end], b[begin:end], partial, cuts=(0, end - begin))
        partials.append((1, partial))
    np.testing.assert_array_equal(host(combine(partials)), host(c))


@each("float32", "float16")
def test_alpha_and_beta(xp: Any, host: Any, seed: int, dtype: str) -> None:
    rng = np.random.default_rng(seed)
    a, b = (rng.standard_normal(shape).astype(dtype_of(dtype)) for shape in ((9, 30), (30, 11)))
    c = rng.standard_normal((9, 11)).astype(np.float32)
    plain, scaled = xp.full((9, 11), np.nan, np.float32), xp.asarray(c.copy())
    gemm(xp.asarray(a), xp.asarray(b), plain)
    gemm(xp.asarray(a), xp.asarray(b), scaled, alpha=0.3, beta=-1.7)
    want = host(plain) * np.float32(0.3) + np.float32(-1.7) * c
    np.testing.assert_array_equal(host(scaled), want)


@each("bfloat16", "float16")
def test_sums_of_16_bit_types_may_be_kept(xp: Any, host: Any, seed: int, dtype: str) -> None:
    rng = np.random.default_rng(seed)
    a, b = (rng.standard_normal(shape).astype(dtype_of(dtype)) for shape in ((9, 70), (70, 11)))
    c = Guarded(xp, (9, 11), np.dtype(np.float32))
    gemm(xp.asarray(a), xp.asarray(b), c.array)
    check(host, dtype, c, a, b, "float32")


@each("float32", "bfloat16")
def test_batches_and_pieces(xp: Any, host: Any, seed: int, dtype: str) -> None:
    rng = np.random.default_rng(seed)
    kind, k = dtype_of(dtype), 8 * 70
    a, b = rng.standard_normal((3, 10, k)).astype(kind), rng.standard_normal((k, 12)).astype(kind)
    whole = Guarded(xp, (3, 10, 12), kind)
    gemm(xp.asarray(a), xp.asarray(b), whole.array)
    check(host, dtype, whole, a, b, dtype)
    many = tuple(range(20, k, 20))  # more pieces than a call takes
    for a_cuts, b_cuts in ([(70,), (140, 280)], [(134,), (280,)], [(3, 9, 200), (11,)], [many, ()]):
        c = Guarded(xp, (3, 10, 12), kind)
        gemm(
            [xp.asarray(np.ascontiguousarray(piece)) for piece in np.split(a, a_cuts, axis=2)],
            [xp.asarray(piece) for piece in np.split(b, b_cuts)],
            c.array,
        )
        np.testing.assert_array_equal(c.values(host), whole.values(host), err_msg=f"{a_cuts}, {b_cuts}")


@each("float32", "bfloat16")
@pytest.mark.parametrize("along", ["k", "m"])
def test_product_waits_for_the_panels_it_reads(xp: Any, host: Any, seed: int, dtype: str, along: str) -> None:
    rng = np.random.default_rng(seed)
    a, b = (rng.standard_normal(shape).astype(dtype_of(dtype)) for shape in ((150, 96), (96, 20)))
    extent, panel = (96, 40) if along == "k" else (150, 60)
    late, ready = xp.full(a.shape, np.nan, a.dtype), xp.zeros(-(-extent // panel), np.int32)
    right, c = xp.asarray(b), Guarded(xp, (150, 20), a.dtype)
    stream = None if xp is np else xp.cuda.Stream(non_blocking=True)

    def put(to: Any, values: np.ndarray) -> None:
        if stream is None:
            to[...] = values
        else:  # by the copy engine, which needs no multiprocessor
            to.set(values, stream=stream)
            stream.synchronize()

    def arrive() -> None:
        filled, raised = np.full_like(a, np.nan), np.zeros(len(ready), np.int32)
        for i in range(len(ready)):
            time.sleep(0.05)
            here = slice(i * panel, (i + 1) * panel)
            if along == "k":
                filled[:, here] = a[:, here]
            else:
                filled[here] = a[here]
            raised[i] = 1
            put(late, filled)
            put(ready, raised)

    thread = threading.Thread(target=arrive)
    thread.start()
    gemm(late, right, c.array, ready=ready, panel=panel, ready_along=along)
    thread.join()
    check(host, dtype, c, a, b, dtype)


@each(*DTYPES)
def test_a_row_that_is_not_finite_spoils_no_other(xp: Any, host: Any, seed: int, dtype: str) -> None:
    rng = np.random.default_rng(seed)
    a, b = (rng.standard_normal(shape).astype(dtype_of(dtype)) for shape in ((20, 50), (50, 21)))
    clean, c = xp.full((20, 21), np.nan, a.dtype), xp.full((20, 21), np.nan, a.dtype)
    gemm(xp.asarray(a), xp.asarray(b), clean)
    a[3, 7], a[11, 49] = np.nan, np.inf
    gemm(xp.asarray(a), xp.asarray(b), c)
    result = host(c).astype(np.float64)
    assert np.isnan(result[3]).all()
    assert not np.isfinite(result[11]).any()
    others = [row for row in range(20) if row not in (3, 11)]
    np.testing.assert_array_equal(result[others], host(clean).astype(np.float64)[others])


def test_what_does_not_fit_is_named(xp: Any) -> None:
    a, b, c = (xp.zeros(shape, np.float32) for shape in ((4, 6), (6, 5), (4, 5)))
    with pytest.raises(ValueError, match="k is 6 in a and 5 in b"):
        gemm(a, b[:5], c)
    with pytest.raises(ValueError, match=r"gemm: c has shape \(4, 4\); \(4, 5\) would be right"):
        gemm(a, b, c[:, :4])
    with pytest.raises(ValueError, match="gemm: cuts is"):
        gemm(a, b, c, cuts=(0, 4))
    with pytest.raises(TypeError, match="a has type f4 and b f8"):
        gemm(a, b.astype(np.float64), c)
    with pytest.raises(ValueError, match="'k' or 'm' would be right"):
        gemm(a, b, c, ready=xp.zeros(1, np.int32), panel=6, ready_along="n")
    with pytest.raises(ValueError, match="panel is 0"):
        gemm(a, b, c, ready=xp.zeros(1, np.int32))


@pytest.mark.parametrize("layout", ["rows", "columns", "strided"])
def test_the_librarys_product_writes_c_in_place(xp: Any, host: Any, seed: int, layout: str) -> None:
    rng = np.random.default_rng(seed)
    a, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((9, 30), (30, 11)))
    c = laid_out(xp, np.full((9, 11), np.nan, np.float32), layout)

    outs = []

    class Library:  # another than NumPy: the way of CuPy
        concatenate, multiply = xp.concatenate, xp.multiply

        @staticmethod
        def matmul(left: Any, right: Any, out: Any) -> None:
            outs.append(out)
            xp.matmul(left, right, out=out)

    whole_product(Library, [xp.asarray(a)], [xp.asarray(b)], c, 2.0, 0.0)
    np.testing.assert_allclose(host(c), 2 * (a @ b), rtol=1e-4, atol=1e-4)
    assert outs[0].flags.c_contiguous == (layout != "strided")
