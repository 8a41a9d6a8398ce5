"""Products of rows grouped by expert on the GPU against float64, expert by expert."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from product_operands import DTYPES, LAYOUTS, Guarded, dtype_of, each, laid_out, rounding, sum_bound
from scipy.special import erf

from fivedp.kernels.cuda.gemm import gemm
from fivedp.kernels.cuda.grouped import expert_hidden, grouped_matmul, grouped_outer
from fivedp.kernels.cuda.rows import CudaRows


def drawn_groups(rng: np.random.Generator, sizes: str) -> np.ndarray:
    """Borders of groups: some of them empty, or all, or one that fills more than a tile."""
    counts = {"mixed": [3, 0, 140, 1, 0, 30], "empty": [0, 0, 0], "one": [37], "none": []}[sizes]
    return np.concatenate([[0], np.cumsum(rng.permutation(counts))]).astype(np.int64)


def normal(rng: np.random.Generator, dtype: str, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(dtype_of(dtype))


def expected(x: np.ndarray, w: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    result = np.zeros((len(x), w.shape[2]))
    for e in range(len(w)):
        rows = slice(offsets[e], offsets[e + 1])
        result[rows] = x[rows].astype(np.float64) @ w[e].astype(np.float64)
    return result


@each(*DTYPES)
@pytest.mark.parametrize("sizes", ["mixed", "empty", "one", "none"])
def test_grouped_product_is_that_of_float64(xp: Any, host: Any, seed: int, dtype: str, sizes: str) -> None:
    rng = np.random.default_rng(seed)
    offsets = drawn_groups(rng, sizes)
    x, w = normal(rng, dtype, int(offsets[-1]), 72), normal(rng, dtype, len(offsets) - 1, 72, 40)
    out = Guarded(xp, (len(x), 40), x.dtype)
    grouped_matmul(xp.asarray(x), xp.asarray(w), xp.asarray(offsets), out.array)
    want, magnitude = expected(x, w, offsets), expected(np.abs(x), np.abs(w), offsets)
    bound = sum_bound(dtype, 72, magnitude)
    assert (np.abs(out.values(host) - want) <= bound + rounding(dtype, np.abs(want) + bound)).all()


@each(*DTYPES)
def test_bits_are_those_of_the_plain_product(xp: Any, host: Any, seed: int, dtype: str) -> None:
    rng = np.random.default_rng(seed)
    offsets = drawn_groups(rng, "mixed")
    x, w = normal(rng, dtype, int(offsets[-1]), 40), normal(rng, dtype, len(offsets) - 1, 40, 24)
    out, plain = xp.full((len(x), 24), np.nan, x.dtype), xp.full((len(x), 24), np.nan, x.dtype)
    for layout in LAYOUTS:
        grouped_matmul(laid_out(xp, x, layout), laid_out(xp, w, layout), xp.asarray(offsets), out)
        for e in range(len(w)):
            rows = slice(int(offsets[e]), int(offsets[e + 1]))
            gemm(xp.asarray(x[rows]), xp.asarray(w[e]), plain[rows], cuts=(0, 40))
        np.testing.assert_array_equal(host(out), host(plain), err_msg=layout)


@each("float32", "bfloat16")
@pytest.mark.parametrize("columns", [64, 50])
def test_rows_are_gathered_and_pieces_added(xp: Any, host: Any, seed: int, dtype: str, columns: int) -> None:
    rng = np.random.default_rng(seed)
    offsets = drawn_groups(rng, "mixed")
    n_rows, n_experts = int(offsets[-1]), len(offsets) - 1
    arrays = [normal(rng, dtype, 30, columns), normal(rng, dtype, 7, columns)]
    source = rng.integers(0, 2, n_rows).astype(np.int32)
    index = np.where(source == 0, rng.integers(0, 30, n_rows), rng.integers(0, 7, n_rows)).astype(np.int32)
    first = np.stack([arrays[s][i] for s, i in zip(source, index, strict=True)])
    second = normal(rng, dtype, n_rows, 24)
    w = [normal(rng, dtype, n_experts, k, 20) for k in (columns, 24)]
    rows = CudaRows([xp.asarray(array) for array in arrays], xp.asarray(source), xp.asarray(index))
    out = Guarded(xp, (n_rows, 20), np.dtype(np.float32))
    grouped_matmul(
        [rows, xp.asarray(second)], [xp.asarray(w[0]), laid_out(xp, w[1], "columns")], xp.asarray(offsets), out.array
    )
    want = expected(first, w[0], offsets) + expected(second, w[1], offsets)
    magnitude = expected(np.abs(first), np.abs(w[0]), offsets) + expected(np.abs(second), np.abs(w[1]), offsets)
    bound = sum_bound(dtype, columns + 24, magnitude)
    assert (np.abs(out.values(host) - want) <= bound + rounding("float32", want)).all()


@each(*DTYPES)
@pytest.mark.parametrize("sizes", ["mixed", "empty"])
def test_outer_product_sums_the_rows_of_a_group(xp: Any, host: Any, seed: int, dtype: str, sizes: str) -> None:
    rng = np.random.default_rng(seed)
    offsets = drawn_groups(rng, sizes)
    n_rows, n_experts = int(offsets[-1]), len(offsets) - 1
    table, dy = normal(rng, dtype, 50, 40), normal(rng, dtype, n_rows, 25)
    index = rng.integers(0, 50, n_rows).astype(np.int32)
    out = Guarded(xp, (n_experts, 40, 25), table.dtype)
    grouped_outer(
        CudaRows([xp.asarray(table)], None, xp.asarray(index)), xp.asarray(dy), xp.asarray(offsets), out.array
    )
    result, x = out.values(host), table[index]
    for e in range(n_experts):
        left, right = (v[offsets[e] : offsets[e + 1]].astype(np.float64) for v in (x, dy))
        want, count = left.T @ right, len(left)
        bound = sum_bound(dtype, count, np.abs(left).T @ np.abs(right))
        assert (np.abs(result[e] - want) <= bound + rounding(dtype, np.abs(want) + bound)).all()
        if count == 0:
            assert (result[e] == 0).all()


def activated(name: str, v: np.ndarray) -> np.ndarray:
    if name == "relu":
        return np.maximum(v, 0)
    if name == "gelu":
        return v * (1 + erf(v / np.sqrt(2))) / 2
    if name == "gelu_tanh":
        return v * (1 + np.tanh(np.sqrt(2 / np.pi) * (v + 0.044715 * v**3))) / 2
    return v / (1 + np.exp(-v))


@each(*DTYPES)
@pytest.mark.parametrize("layout", ["rows", "columns", "shifted"])
def test_hidden_is_the_gate_times_the_other_product(xp: Any, host: Any, seed: int, dtype: str, layout: str) -> None:
    rng = np.random.default_rng(seed)
    offsets = drawn_groups(rng, "mixed")
    n_rows, n_experts = int(offsets[-1]), len(offsets) - 1
    x = normal(rng, dtype, n_rows, 24)
    weights = [normal(rng, dtype, n_experts, 24, 72) for _ in range(2)]
    gate, up, hidden, alone = (Guarded(xp, (n_rows, 72), x.dtype) for _ in range(4))
    on_device = [laid_out(xp, w, layout) for w in weights]
    expert_hidden(xp.asarray(x), *on_device, xp.asarray(offsets), hidden.array, gate=gate.array, up=up.array)
    expert_hidden(xp.asarray(x), *on_device, xp.asarray(offsets), alone.array)
    np.testing.assert_array_equal(alone.values(host), hidden.values(host))
    plain = xp.full((n_rows, 72), np.nan, x.dtype)
    for product, w in zip((gate, up), on_device, strict=True):
        grouped_matmul(xp.asarray(x), w, xp.asarray(offsets), plain)
        np.testing.assert_array_equal(product.values(host), host(plain).astype(np.float64))
    want = activated("silu", gate.values(host)) * up.values(host)
    # an exponential, a sum, a quotient and two products of the stored values, a few units each
    near = 16 * (2.0**-53 if dtype == "float64" else 2.0**-24) * np.abs(want)
    assert (np.abs(hidden.values(host) - want) <= near + rounding(dtype, want)).all()


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu", "silu"])
@each("float32", "float64", "bfloat16")
def test_hidden_without_a_gate(xp: Any, host: Any, seed: int, dtype: str, activation: str) -> None:
    rng = np.random.default_rng(seed)
    offsets = drawn_groups(rng, "one")
    x, w = normal(rng, dtype, 37, 24), normal(rng, dtype, 1, 24, 40)
    up, hidden = (Guarded(xp, (37, 40), x.dtype) for _ in range(2))
    expert_hidden(
        xp.asarray(x), None, xp.asarray(w), xp.asarray(offsets), hidden.array, up=up.array, activation=activation
    )
    v = up.values(host)
    want = activated(activation, v)
    # exp(-v) and erfc err by a few units and by the rounding of their argument, times its size (below 64 in all)
    near = 64 * (1 + v**2) * (2.0**-53 if dtype == "float64" else 2.0**-24) * np.abs(want)
    floor = 1e-13 if dtype == "float64" else 1e-6  # where erf of the oracle cancels
    assert (np.abs(hidden.values(host) - want) <= near + rounding(dtype, want) + floor).all()


def test_what_does_not_fit_is_named(xp: Any) -> None:
    x, w, offsets = xp.zeros((4, 6), np.float32), xp.zeros((2, 6, 5), np.float32), xp.zeros(3, np.int64)
    out = xp.zeros((4, 5), np.float32)
    with pytest.raises(ValueError, match=r"w has a piece of shape \(2, 5, 5\); \(2, 6, 5\) would be right"):
        grouped_matmul(x, w[:, :5], offsets, out)
    with pytest.raises(ValueError, match=r"offsets has shape \(2,\); \(3,\) would be right"):
        grouped_matmul(x, w, offsets[:2], out)
    with pytest.raises(TypeError, match="offsets has type i4; i8 would be right"):
        grouped_matmul(x, w, offsets.astype(np.int32), out)
    with pytest.raises(ValueError, match="activation is swiglu without a gate"):
        expert_hidden(x, None, w, offsets, out)
    with pytest.raises(ValueError, match="activation is magic; swiglu"):
        expert_hidden(x, None, w, offsets, out, activation="magic")
    with pytest.raises(ValueError, match="x has 4 rows and dy 3; they must agree"):
        grouped_outer(x, out[:3], offsets, w)
