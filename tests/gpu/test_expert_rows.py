"""Rows of experts on the GPU: copies are exact, products rounded once, dot products and sums those of the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from device_operands import BF16, DTYPES, Guarded, bits, draw, guarded, scattered, sums_of

from fivedp.kernels import experts as cpu
from fivedp.kernels.cuda import experts as gpu
from fivedp.kernels.cuda.rows import CudaRows

Array = Any
SIZES = [(1, 1), (3, 7), (5, 64), (4, 1032), (2, 3001), (70, 24), (0, 8), (3, 0)]
# (elements before an aligned address, elements between rows)
PLACES = [(0, 0), (1, 0), (0, 3), (2, 8)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), SIZES)
@pytest.mark.parametrize(("offset", "pad"), PLACES)
def test_rows_are_copied(
    xp: Any, host: Any, seed: int, dtype: str, rows: int, columns: int, offset: int, pad: int
) -> None:
    rng, kind = np.random.default_rng(seed), DTYPES[dtype]
    x = draw(rng, (rows, columns), kind)
    out = Guarded(xp, (rows, columns), kind, offset, pad)
    gpu.gather_rows(CudaRows(*scattered(xp, rng, x, offset, pad)), out.array)
    assert bits(host(out.array)) == bits(x)
    out.check_guards(host)


def test_copies_keep_bits_that_are_no_numbers(xp: Any, host: Any, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 2**32, (9, 40), np.uint32).view(np.float32)
    index = rng.integers(0, 9, 30).astype(np.int32)
    out = xp.empty((30, 40), np.float32)
    gpu.gather_rows(CudaRows([xp.asarray(x)], None, index), out)
    assert bits(host(out)) == bits(x[index])


def test_entries_that_name_no_row_are_left_out(xp: Any, host: Any, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, weights = draw(rng, (4, 16), np.float32), draw(rng, (5,), np.float32)
    source, index = np.array([0, -1, 0, 1, 0], np.int32), np.array([2, 0, 4, 0, -1], np.int32)
    rows = CudaRows([xp.asarray(x)], source, index)
    for call in (gpu.gather_rows, lambda rows, out: gpu.weighted_rows(rows, xp.asarray(weights), out)):
        out = xp.full((5, 16), 7.0, np.float32)
        call(rows, out)
        first = x[2] if call is gpu.gather_rows else weights[0] * x[2]
        np.testing.assert_array_equal(host(out), np.stack([first, *[np.full(16, 7.0)] * 4]))
    gpu.row_dots(rows, xp.ones((5, 16), np.float32), dots := xp.full(5, np.nan, np.float32))
    assert (host(dots)[1:] == 0).all()
    gpu.combine_rows(
        rows, np.array([0, 5]), None, np.arange(5, dtype=np.int32), 5, out := xp.full((1, 16), np.nan, np.float32)
    )
    np.testing.assert_array_equal(host(out)[0], x[2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), SIZES)
@pytest.mark.parametrize(("offset", "pad"), PLACES)
def test_weighted_rows_are_rounded_once(
    xp: Any, host: Any, seed: int, dtype: str, rows: int, columns: int, offset: int, pad: int
) -> None:
    rng, kind = np.random.default_rng(seed), DTYPES[dtype]
    x, weights = draw(rng, (rows, columns), kind), draw(rng, (rows,), sums_of(kind))
    with np.errstate(all="ignore"):
        exact = weights[:, None] * x.astype(sums_of(kind))
    for result in [kind] if dtype == "float64" else [np.dtype(np.float32), BF16, np.dtype(np.float16)]:
        out = Guarded(xp, (rows, columns), result, offset, pad)
        table = CudaRows(*scattered(xp, rng, x, offset, pad))
        gpu.weighted_rows(table, xp.asarray(weights), out.array)
        assert bits(host(out.array)) == bits(exact.astype(result))
        out.check_guards(host)
    out = Guarded(xp, (rows, columns), kind, offset, pad)
    gpu.weighted_rows(guarded(xp, x, offset, pad), xp.asarray(weights), out.array)
    assert bits(host(out.array)) == bits(exact.astype(kind))


@pytest.mark.parametrize(
    ("a_type", "b_type"), [(a, b) for a in DTYPES for b in DTYPES if (a == b) or "64" not in a + b]
)
@pytest.mark.parametrize(("rows", "columns"), [*SIZES, (3, 33), (2, 1600)])
def test_dots_have_the_bits_of_the_cpu(
    xp: Any, host: Any, seed: int, a_type: str, b_type: str, rows: int, columns: int
) -> None:
    rng, kind = np.random.default_rng(seed), DTYPES[a_type]
    a, b = draw(rng, (rows, columns), kind), draw(rng, (rows, columns), DTYPES[b_type])
    out = Guarded(xp, (rows,), sums_of(kind))
    gpu.row_dots(CudaRows(*scattered(xp, rng, a, 1)), guarded(xp, b, 1, 1), out.array)
    # float16 is not known to the CPU; as float32 it has the same products and sums.
    wide = [x.astype(np.float32) if x.dtype == np.float16 else x for x in (a, b)]
    cpu.row_dots(*wide, expected := np.empty(rows, sums_of(kind)))
    assert bits(host(out.array)) == bits(expected)
    out.check_guards(host)
    with np.errstate(all="ignore"):
        exact = (a.astype(np.float64) * b.astype(np.float64)).sum(-1)
        size = (abs(a.astype(np.float64)) * abs(b.astype(np.float64))).sum(-1)
    unit = 2.0**-53 if a_type == "float64" else 2.0**-24
    assert (abs(host(out.array) - exact) <= (columns / 16 + 8) * unit * size).all()


def subsets(rng: np.random.Generator, n_outputs: int, n_experts: int, most: int) -> list[Array]:
    sizes = rng.integers(0, min(n_experts, most) + 1, n_outputs)
    return [np.sort(rng.choice(n_experts, size, replace=False)).astype(np.int32) for size in sizes]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 37, 264, 1024])
@pytest.mark.parametrize("most", [1, 2, 4, 8, 16, 21])
@pytest.mark.parametrize(("offset", "pad"), [(0, 0), (1, 0)])
def test_sums_have_the_bits_of_the_cpu(
    xp: Any, host: Any, seed: int, dtype: str, columns: int, most: int, offset: int, pad: int
) -> None:
    rng, kind = np.random.default_rng(seed), DTYPES[dtype]
    n_experts = int(rng.choice([1, 2, 3, 7, 60, 128, 256, 1000]))
    chosen = subsets(rng, 11, n_experts, most)
    starts = np.cumsum([0, *(len(ids) for ids in chosen)]).astype(np.int64)
    ids = np.concatenate([*chosen, np.zeros(0, np.int32)])
    x, weights = draw(rng, (len(ids), columns), kind), draw(rng, (len(ids),), sums_of(kind))
    known = x.astype(np.float32) if dtype == "float16" else x
    zeros, own = np.zeros(len(x), np.int32), np.arange(len(x), dtype=np.int32)
    table = CudaRows(*scattered(xp, rng, x, offset, pad))
    results = {"float64": [kind], "float16": [np.dtype(np.float32), kind]}.get(dtype, [np.dtype(np.float32), BF16])
    for given in (weights, None):
        for result in results:
            wide = np.dtype(np.float32) if result == np.float16 else result
            out = Guarded(xp, (len(chosen), columns), result, offset, pad)
            device_weights = None if given is None else xp.asarray(given)
            hint = int(rng.choice([most, 3])) if rng.random() < 0.7 else None
            gpu.combine_rows(
                table, xp.asarray(starts), device_weights, xp.asarray(ids), n_experts, out.array, most=hint
            )
            cpu.combine_rows(
                cpu.Rows([known], zeros, own),
                starts,
                given,
                ids,
                n_experts,
                right := np.empty((len(chosen), columns), wide),
            )
            assert bits(host(out.array)) == bits(right.astype(result)), (n_experts, hint)
            out.check_guards(host)


def test_a_row_for_every_warp_and_rows_that_are_cut(xp: Any, host: Any, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for n, columns in ((1, 5000), (200, 520)):
        ids = np.concatenate([np.sort(rng.choice(64, 3, replace=False)) for _ in range(n)]).astype(np.int32)
        x = draw(rng, (3 * n, columns), np.float32)
        starts, own = np.arange(0, 3 * n + 1, 3), np.arange(3 * n, dtype=np.int32)
        out = Guarded(xp, (n, columns), np.float32)
        gpu.combine_rows(guarded(xp, x), starts, None, ids, 64, out.array)
        rows = cpu.Rows([x], np.zeros_like(own), own)
        cpu.combine_rows(rows, starts, None, ids, 64, right := np.empty((n, columns), np.float32))
        assert bits(host(out.array)) == bits(right)


def test_outputs_without_rows_are_zero(xp: Any, host: Any) -> None:
    none = CudaRows([xp.ones((3, 24), np.float32)], None, np.zeros(0, np.int32))
    out = Guarded(xp, (4, 24), np.float32)
    gpu.combine_rows(none, np.zeros(5, np.int64), None, np.zeros(0, np.int32), 5, out.array)
    assert bits(host(out.array)) == bits(np.zeros((4, 24), np.float32))


def test_what_is_no_number_stays_in_its_row(xp: Any, host: Any, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = draw(rng, (6, 32), np.float32)
    x[1, 3], x[2, 4], x[3, 4] = np.nan, np.inf, np.inf
    ids, starts = np.array([0, 3, 1, 2, 0, 1], np.int32), np.array([0, 2, 4, 6])
    gpu.combine_rows(xp.asarray(x), starts, None, ids, 4, out := xp.empty((3, 32), np.float32))
    np.testing.assert_array_equal(host(out), x[::2] + x[1::2])


def test_the_public_functions_take_device_arrays(
    xp: Any, host: Any, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(seed)
    x, weights, starts = draw(rng, (6, 40), BF16), draw(rng, (6,), np.float32), np.array([0, 2, 6])
    ids, own, zeros = np.array([1, 4, 0, 1, 2, 4], np.int32), np.arange(6, dtype=np.int32), np.zeros(6, np.int32)

    def run(array: Any) -> list[bytes]:
        rows = cpu.Rows([array(x)], array(zeros), array(own))
        results = [array(np.zeros(shape, np.float32)) for shape in ((6, 40), (6,), (2, 40))]
        cpu.gather_rows(rows, copied := array(np.zeros((6, 40), BF16)))
        cpu.weighted_rows(rows, array(weights), results[0])
        cpu.row_dots(rows, array(x), results[1])
        cpu.combine_rows(rows, array(starts), array(weights), array(ids), 5, results[2])
        return [bits(np.array(host(result))) for result in (copied, *results)]

    on_cpu = run(np.array) if xp is np else None
    if xp is np:
        monkeypatch.setattr(cpu, "is_cupy", lambda array: True)
        assert run(xp.asarray) == on_cpu
    else:
        run(xp.asarray)


def test_arguments_that_do_not_fit(xp: Any) -> None:
    x, out = xp.zeros((4, 8), np.float32), xp.zeros((4, 8), np.float32)
    ids, starts = xp.zeros(4, np.int32), xp.zeros(5, np.int64)
    index = np.zeros(4, np.int32)
    for call, words in (
        (lambda: gpu.gather_rows(x, out[:3]), r"gather_rows: out has shape \(3, 8\); \(4, 8\) would be right"),
        (lambda: gpu.gather_rows(x, xp.zeros((8, 4), np.float32).T), "out is strided along its columns"),
        (lambda: gpu.weighted_rows(x, xp.zeros(3, np.float32), out), r"weights has shape \(3,\); \(4,\)"),
        (lambda: gpu.row_dots(x, x[:, :7], xp.zeros(4, np.float32)), r"b has shape \(4, 7\)"),
        (lambda: gpu.combine_rows(x, starts, None, ids, 70000, out), "n_experts is 70000; 0 to 65536"),
        (lambda: gpu.combine_rows(x, starts[:4], None, ids, 7, out), r"starts has shape \(4,\); \(5,\)"),
        (lambda: gpu.combine_rows(x, starts, None, ids[:3], 7, out), r"experts has shape \(3,\); \(4,\)"),
        (lambda: CudaRows([], None, index), "arrays is empty"),
        (lambda: CudaRows([x, x[:, :4]], None, index), r"array 1 has shape \(4, 4\)"),
        (lambda: CudaRows([x], index[:3], index), "source has 3 entries and index 4"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    for call, words in (
        (lambda: gpu.gather_rows(x, out.astype(np.float64)), "out is float64; float32"),
        (lambda: gpu.weighted_rows(x, xp.zeros(4), out), "weights has type f8; f4"),
        (lambda: gpu.combine_rows(x, starts, None, ids, 7, out.astype(np.float64)), "out is float64 beside rows of"),
        (lambda: CudaRows([x], None, index.astype(np.int64)), "index is int64"),
        (lambda: CudaRows([x, x.astype(np.float64)], None, index), "one type would be right"),
    ):
        with pytest.raises(TypeError, match=words):
            call()
