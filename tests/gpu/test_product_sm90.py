"""The products for compute capability 9.x beyond what tests/gpu/test_gemm.py and test_grouped.py ask of both kernels:
several tiles a block, more blocks of k than stages, what lies beside a factor or group, and which kernel runs when."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from product_operands import Guarded, dtype_of, has_hopper, laid_out, rounding, select, sum_bound

from fivedp.kernels._array_library import combine, default_cuts
from fivedp.kernels.cuda._extension import asked_kernel, extension, raw, stream_of
from fivedp.kernels.cuda.gemm import gemm
from fivedp.kernels.cuda.grouped import expert_hidden, grouped_matmul, grouped_outer
from fivedp.kernels.cuda.rows import CudaRows

Array = Any
each_half = pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
FLOAT = np.dtype(np.float32)


@pytest.fixture(autouse=True)
def sm90(xp: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if not has_hopper(xp):
        pytest.skip("this GPU is not of compute capability 9.x")
    select(monkeypatch, "sm90")
    yield
    asked_kernel.cache_clear()


def normal(rng: np.random.Generator, dtype: str, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(dtype_of(dtype))


def right(dtype: str, found: np.ndarray, a: np.ndarray, b: np.ndarray, out: str = "float32") -> None:
    """`found` is a @ b as closely as its sums can be, rounded to `out`."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    bound = sum_bound(dtype, a.shape[-1], np.abs(a) @ np.abs(b))
    want = a @ b
    assert (np.abs(found - want) <= bound + rounding(out, np.abs(want) + bound)).all()


def within_nan(xp: Any, values: np.ndarray, along: str = "rows") -> Array:
    """The values with NaN around them, whose rows (columns) begin at multiples of 16 bytes."""
    *batch, rows, columns = values.shape
    if along == "columns":
        return within_nan(xp, np.swapaxes(values, -1, -2)).swapaxes(-1, -2)
    whole = xp.full((*batch, rows + 5, (columns + 15) // 8 * 8 + 8), np.nan, values.dtype)
    array = whole[..., 2 : rows + 2, 8 : columns + 8]
    array[...] = xp.asarray(values)
    return array


@each_half
@pytest.mark.parametrize("cuts", [1, 8])
def test_several_tiles_and_more_blocks_than_stages(xp: Any, host: Any, seed: int, dtype: str, cuts: int) -> None:
    """The same bits however the factors lie: as boxes of either kind, copied, or one of each."""
    rng = np.random.default_rng(seed)
    m, k, n = 290, 8 * 70 + 6, 530
    a, b = normal(rng, dtype, m, k), normal(rng, dtype, k, n)
    results = []
    for left, other in [("rows", "rows"), ("columns", "rows"), ("rows", "columns"), ("columns", "shifted")]:
        c = Guarded(xp, (m, n), FLOAT)
        arrays = [
            laid_out(xp, values, layout) if layout == "shifted" else within_nan(xp, values, layout)
            for values, layout in ((a, left), (b, other))
        ]
        assert gemm(*arrays, c.array, cuts=(0, k) if cuts == 1 else None) == "sm90"
        results.append(c.values(host))
    right(dtype, results[0], a, b)
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


@each_half
def test_bits_do_not_depend_on_the_ranks_or_how_their_shares_lie(xp: Any, host: Any, seed: int, dtype: str) -> None:
    rng = np.random.default_rng(seed)
    m, k, n = 70, 8 * 131 + int(rng.integers(1, 8)), 40
    a, b, cuts, results = normal(rng, dtype, m, k), normal(rng, dtype, k, n), default_cuts(k), []
    layouts = itertools.cycle(["rows", "shifted", "columns", "strided"])
    for ranks in (1, 2, 4, 8):
        partials, shards = [], 8 // ranks
        for rank in range(ranks):
            borders = cuts[rank * shards : (rank + 1) * shards + 1]
            share, partial = slice(borders[0], borders[-1]), Guarded(xp, (m, n), FLOAT)
            factors = laid_out(xp, a[:, share], next(layouts)), within_nan(xp, b[share])
            gemm(*factors, partial.array, cuts=[border - borders[0] for border in borders])
            partials.append((shards, xp.asarray(partial.values(host).astype(np.float32))))
        results.append(host(combine(partials)))
    right(dtype, results[0], a, b)
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


@each_half
def test_any_shape(xp: Any, host: Any, seed: int, dtype: str) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(12):
        m, k, n = (int(rng.choice([1, 7, 64, 65, 128, 129, 200])) for _ in range(3))
        n += int(rng.choice([0, 127, 256]))
        shards = int(rng.integers(1, 6))
        cuts = [0, *np.sort(rng.integers(0, k + 1, shards - 1)).tolist(), k]
        a, b = normal(rng, dtype, m, k), normal(rng, dtype, k, n)
        layouts = [str(rng.choice(["rows", "columns", "shifted", "strided"])) for _ in range(3)]
        c = Guarded(xp, (m, n), a.dtype, "columns" if layouts[2] == "columns" else "rows")
        gemm(laid_out(xp, a, layouts[0]), laid_out(xp, b, layouts[1]), c.array, cuts=cuts)
        right(dtype, c.values(host), a, b, dtype)


@each_half
def test_pieces_that_lie_in_several_ways(xp: Any, host: Any, seed: int, dtype: str) -> None:
    rng = np.random.default_rng(seed)
    k = 3 * 128
    a, b = normal(rng, dtype, 40, k), normal(rng, dtype, k, 300)
    whole, pieces = Guarded(xp, (40, 300), FLOAT), Guarded(xp, (40, 300), FLOAT)
    gemm(xp.asarray(a), xp.asarray(b), whole.array, cuts=(0, k))
    layouts = rng.permutation(["rows", "columns", "shifted"])
    gemm(
        [laid_out(xp, part, str(layout)) for part, layout in zip(np.split(a, 3, axis=1), layouts, strict=True)],
        [laid_out(xp, part, str(layout)) for part, layout in zip(np.split(b, 3), layouts[::-1], strict=True)],
        pieces.array,
        cuts=(0, k),
    )
    right(dtype, whole.values(host), a, b)
    np.testing.assert_array_equal(pieces.values(host), whole.values(host))


@each_half
@pytest.mark.parametrize("shared", ["a", "b", "neither"])
def test_batches(xp: Any, host: Any, seed: int, dtype: str, shared: str) -> None:
    rng = np.random.default_rng(seed)
    a, b = normal(rng, dtype, 3, 40, 96), normal(rng, dtype, 3, 96, 72)
    if shared == "a":
        a = a[0]
    if shared == "b":
        b = b[1]
    c = Guarded(xp, (3, 40, 72), a.dtype)
    gemm(within_nan(xp, a), within_nan(xp, b, "columns"), c.array)
    right(dtype, c.values(host), a, b, dtype)


@each_half
def test_less_workspace_means_fewer_blocks(xp: Any, host: Any, seed: int, dtype: str) -> None:
    rng = np.random.default_rng(seed)
    k = 8 * 20
    a, b, cuts = normal(rng, dtype, 200, k), normal(rng, dtype, k, 500), default_cuts(k)
    whole, few = Guarded(xp, (200, 500), FLOAT), Guarded(xp, (200, 500), FLOAT)
    factors = xp.asarray(a), xp.asarray(b)
    gemm(*factors, whole.array)
    bits = [raw(factor, "factor") for factor in factors]
    room = xp.full(extension().gemm_workspace(bits[0], 1, 1, 1, len(cuts) - 1, True), 255, np.uint8)
    stream = stream_of(few.array)
    ran = extension().gemm([bits[0]], [bits[1]], few.array, cuts, 1.0, 0.0, None, 0, False, room, True, stream)
    assert ran == "sm90"
    right(dtype, whole.values(host), a, b)
    np.testing.assert_array_equal(few.values(host), whole.values(host))


@each_half
@pytest.mark.parametrize("along", ["k", "m"])
def test_blocks_brought_by_warps_do_not_wait_for_the_flags_of_later_ones(
    xp: Any, host: Any, seed: int, dtype: str, along: str
) -> None:
    """One block has all tiles. Rows of the next tile come when those of the tile before are seen in C; the k of the
    second shard when the open sums of the first are seen in the workspace."""
    rng = np.random.default_rng(seed)
    m, k, n, panel = 290, 3 * 64 + 6, 20, 128 if along == "m" else 70
    a, b, cuts = normal(rng, dtype, m, k), normal(rng, dtype, k, n), [0, 70, k]
    filled = np.full((m, k + 1), np.nan, a.dtype)  # rows of it begin at no multiple of 16 bytes
    late, c = xp.asarray(filled.copy()), xp.full((m, n), np.nan, np.float32)
    raised = np.zeros(-(-(m if along == "m" else k) // panel), np.int32)
    ready, seen = xp.asarray(raised.copy()), []
    stream = None if xp is np else xp.cuda.Stream(non_blocking=True)

    def put(to: Any, values: np.ndarray) -> None:
        if stream is None:
            to[...] = values
        else:  # by the copy engine, which needs no multiprocessor
            to.set(values, stream=stream)
            stream.synchronize()

    def stored(i: int, here: slice) -> bool:
        if along == "k" and i > 0:
            return True
        array = c[here] if along == "m" else room
        values = array if stream is None else array.get(stream=stream)
        return not np.isnan(values).any() if along == "m" else bool((values != 255).any())

    def arrive() -> None:
        for i in range(len(raised)):
            here = slice(i * panel, (i + 1) * panel)
            if along == "m":
                filled[here, 1:] = a[here]
            else:
                filled[:, 1:][:, here] = a[:, here]
            raised[i] = 1
            put(late, filled)
            put(ready, raised)
            end = time.monotonic() + 20
            while not stored(i, here) and time.monotonic() < end:
                time.sleep(0.001)
            seen.append(stored(i, here))

    factors = [raw(late[:, 1:], "a")], [raw(xp.asarray(b), "b")]
    room = xp.full(extension().gemm_workspace(factors[0][0], 1, 1, 1, len(cuts) - 1, True), 255, np.uint8)
    stream_of_c = stream_of(c)
    thread = threading.Thread(target=arrive)
    thread.start()
    ran = extension().gemm(*factors, c, cuts, 1.0, 0.0, ready, panel, along == "m", room, True, stream_of_c)
    thread.join()
    assert (ran, seen) == ("sm90", [True] * len(raised))
    right(dtype, host(c).astype(np.float64), a, b)


GROUPS = [0, 1, 63, 64, 65, 0, 128, 150]


@each_half
def test_rows_of_other_groups_are_not_multiplied(xp: Any, host: Any, seed: int, dtype: str) -> None:
    """Groups that end inside a block of rows, of which one is not finite, and rows behind the last border."""
    rng = np.random.default_rng(seed)
    counts = rng.permutation(GROUPS)
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    n_rows, spoilt = int(offsets[-1]), int(rng.choice(np.flatnonzero(counts)))
    x, dy = normal(rng, dtype, n_rows + 9, 72), normal(rng, dtype, n_rows + 9, 296)
    w = normal(rng, dtype, len(counts), 72, 296)
    of_spoilt, behind = slice(int(offsets[spoilt]), int(offsets[spoilt + 1])), slice(n_rows, None)
    for rows in (of_spoilt, behind):
        x[rows] = np.nan
        dy[rows] = np.inf
    out, outer = Guarded(xp, (n_rows + 9, 296), FLOAT), Guarded(xp, (len(counts), 72, 296), FLOAT)
    on_device = within_nan(xp, x), within_nan(xp, dy), xp.asarray(offsets)
    assert grouped_matmul(on_device[0], within_nan(xp, w), on_device[2], out.array) == "sm90"
    assert grouped_outer(*on_device, outer.array) == "sm90"
    products, sums = out.values(host), outer.values(host)
    assert np.isnan(products[behind]).all()  # as they were
    for e, count in enumerate(counts):
        rows = slice(int(offsets[e]), int(offsets[e + 1]))
        if e == spoilt:
            assert np.isnan(products[rows]).all()
            assert np.isnan(sums[e]).all()
            continue
        right(dtype, products[rows], x[rows], w[e])
        right(dtype, sums[e], x[rows].T, dy[rows])
        if count == 0:
            assert (sums[e] == 0).all()


@each_half
def test_all_rows_in_one_group_of_many(xp: Any, host: Any, seed: int, dtype: str) -> None:
    """Boxes, gathered rows and rows that lie unaligned give the same bits, those of the plain product."""
    rng = np.random.default_rng(seed)
    n_rows, k, n = 300, 330, 264
    table, w = normal(rng, dtype, 40, k), normal(rng, dtype, 5, k, n)
    index = rng.integers(0, 40, n_rows).astype(np.int32)
    x, chosen = table[index], int(rng.integers(0, 5))
    offsets = xp.asarray(np.where(np.arange(6) > chosen, n_rows, 0).astype(np.int64))
    plain = Guarded(xp, (n_rows, n), x.dtype)
    gemm(xp.asarray(x), xp.asarray(w[chosen]), plain.array, cuts=(0, k))
    right(dtype, plain.values(host), x, w[chosen], dtype)
    gathered = CudaRows([xp.asarray(table)], None, xp.asarray(index))
    for rows, layout in ((within_nan(xp, x), "rows"), (gathered, "columns"), (laid_out(xp, x, "shifted"), "shifted")):
        out = Guarded(xp, (n_rows, n), x.dtype)
        grouped_matmul(rows, laid_out(xp, w, layout), offsets, out.array)
        np.testing.assert_array_equal(out.values(host), plain.values(host), err_msg=layout)


@each_half
@pytest.mark.parametrize("layout", ["rows", "columns", "shifted"])
def test_gate_and_up_meet_in_a_tile(xp: Any, host: Any, seed: int, dtype: str, layout: str) -> None:
    """Of three tiles of columns, the last of them not full."""
    rng = np.random.default_rng(seed)
    offsets = xp.asarray(np.array([0, 70, 70, 215], np.int64))
    x, weights = normal(rng, dtype, 215, 136), [normal(rng, dtype, 3, 136, 280) for _ in range(2)]
    gate, up, hidden = (Guarded(xp, (215, 280), x.dtype) for _ in range(3))
    on_device = [laid_out(xp, w, layout) for w in weights]
    assert expert_hidden(within_nan(xp, x), *on_device, offsets, hidden.array, gate=gate.array, up=up.array) == "sm90"
    for found, w in zip((gate, up), on_device, strict=True):
        plain = Guarded(xp, (215, 280), x.dtype)
        grouped_matmul(within_nan(xp, x), w, offsets, plain.array)
        np.testing.assert_array_equal(found.values(host), plain.values(host))
    right(dtype, gate.values(host)[:70], x[:70], weights[0][0], dtype)
    right(dtype, up.values(host)[70:], x[70:], weights[1][2], dtype)
    v = gate.values(host)
    want = v / (1 + np.exp(-v)) * up.values(host)
    assert (np.abs(hidden.values(host) - want) <= 16 * 2.0**-24 * np.abs(want) + rounding(dtype, want)).all()


def test_who_runs_when(xp: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def ran(dtype: str, layout: str = "rows") -> str:
        a = laid_out(xp, np.zeros((4, 6), dtype_of(dtype)), layout)
        return gemm(a, laid_out(xp, np.zeros((6, 5), a.dtype), layout), xp.zeros((4, 5), a.dtype))

    assert {ran("bfloat16"), ran("float16"), ran("bfloat16", "shifted"), ran("bfloat16", "strided")} == {"sm90"}
    assert (ran("float32"), ran("float64")) == ("sm80", "sm80")
    select(monkeypatch, "sm80")
    assert (ran("bfloat16"), ran("float32")) == ("sm80", "sm80")
    select(monkeypatch, "sm70")
    with pytest.raises(ValueError, match="FIVEDP_PRODUCT_KERNEL is 'sm70'; 'sm80' or 'sm90' would be right"):
        ran("bfloat16")
