"""Partial products over aligned spans of virtual shards, joined by tree_sum, are the whole product, bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from kernel_operands import BF16, REAL_TYPES, STRIDES, bits, draw, with_strides

from fivedp.kernels.gemm import gemm, tree_sum

SPANS = [
    [(0, 8)],
    [(0, 4), (4, 4)],
    [(0, 2), (2, 2), (4, 2), (6, 2)],
    [(i, 1) for i in range(8)],
    [(0, 2), (2, 1), (3, 1), (4, 4)],
    [(0, 1), (1, 1), (2, 2), (4, 4)],
    [(0, 4), (4, 2), (6, 1), (7, 1)],
]


def borders(k: int) -> list[int]:
    return [0, *np.cumsum([len(part) for part in np.array_split(np.arange(k), 8)]).tolist()]


def partials_of(a: Any, b: Any, spans: list[tuple[int, int]]) -> list[Any]:
    wide = np.float32 if a.dtype == BF16 else a.dtype
    edges = borders(a.shape[-1])
    partials = []
    for first, count in spans:
        begin, end = edges[first], edges[first + count]
        c = np.full((*a.shape[:-1], b.shape[-1]), np.nan, wide)
        gemm(a[..., begin:end], b[begin:end], c, cuts=[cut - begin for cut in edges[first : first + count + 1]])
        partials.append(c)
    return partials


@pytest.mark.parametrize("dtype", [*REAL_TYPES, np.dtype(np.complex64)], ids=str)
@pytest.mark.parametrize("spans", SPANS, ids=str)
def test_partials_join_to_the_bits_of_the_whole(rng: np.random.Generator, dtype: Any, spans: Any) -> None:
    for m, n, k in ((3, 100, 30), (40, 50, 700), (33, 600, 3000)):
        a, b = draw(rng, (m, k), dtype), draw(rng, (k, n), dtype)
        c0 = draw(rng, (m, n), dtype)
        for alpha, beta in ((1.0, 0.0), (0.75, 0.0), (1.0, 1.0), (-2.0, 0.5)):
            gemm(a, b, whole := c0.copy(), alpha=alpha, beta=beta)
            tree_sum(partials_of(a, b, spans), spans, joined := c0.copy(), alpha=alpha, beta=beta)
            if dtype.kind == "c" and spans != [(0, 8)]:
                # NumPy multiplies an equal shard from other memory; the tree is the same, the shard's bits are its own.
                assert np.allclose(joined, whole, rtol=1e-3, atol=1e-3)
            else:
                assert bits(joined) == bits(whole)


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["f32", "f64"])
def test_strides_batches_and_poisoned_results(rng: np.random.Generator, dtype: Any) -> None:
    spans = [(0, 2), (2, 2), (4, 4)]
    partials = [draw(rng, (3, 20, 70), dtype) for _ in spans]
    right = (partials[0] + partials[1]) + partials[2]
    for kind in STRIDES:
        out = with_strides(rng, np.full((3, 20, 70), np.nan, dtype), kind)
        tree_sum([with_strides(rng, partial, kind) for partial in partials], spans, out)
        assert bits(out) == bits(right)


def test_large_sums_are_shared_between_threads_without_loss(rng: np.random.Generator) -> None:
    partials = [draw(rng, (700, 900), np.float32) for _ in range(4)]
    out = np.full((700, 900), np.nan, np.float32)
    tree_sum(partials, [(0, 2), (2, 2), (4, 2), (6, 2)], out)
    assert bits(out) == bits((partials[0] + partials[1]) + (partials[2] + partials[3]))


def test_spans_that_are_no_tree_are_refused(rng: np.random.Generator) -> None:
    x = draw(rng, (2, 3), np.float32)
    for dtype in (np.float32, np.complex64):
        p, out = x.astype(dtype), np.zeros((2, 3), dtype)
        for spans in ([(0, 3), (3, 5)], [(0, 2), (4, 4)], [(4, 4), (0, 4)], [(0, 4), (2, 2)], [(1, 2), (3, 1)]):
            with pytest.raises(ValueError, match="span"):
                tree_sum([p, p], spans, out)
        with pytest.raises(ValueError, match="spans"):
            tree_sum([p, p], [(0, 8)], out)
        with pytest.raises(ValueError, match="shape"):
            tree_sum([p], [(0, 8)], np.zeros((3, 3), dtype))
    with pytest.raises(ValueError, match="empty"):
        tree_sum([], [], np.zeros((2, 3), np.float32))
    with pytest.raises(TypeError, match="float32"):
        tree_sum([x], [(0, 8)], np.zeros((2, 3), np.float64))
    with pytest.raises(TypeError, match="float32"):
        tree_sum([x, x.astype(np.float64)], [(0, 4), (4, 4)], np.zeros((2, 3), np.float32))
