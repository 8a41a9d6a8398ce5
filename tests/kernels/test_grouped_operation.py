"""`fivedp.grouped_matmul` and its backward: values, gradients, errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from kernel_operands import REAL_TYPES, assert_as_exact_as_numpy, bits, draw

import fivedp
from fivedp import DTypeError, ShapeError


@pytest.mark.parametrize("dtype", REAL_TYPES, ids=str)
def test_values_and_gradients(rng: np.random.Generator, dtype: Any) -> None:
    counts = [3, 0, 12]
    x, w, dy = (draw(rng, shape, dtype) for shape in ((15, 40), (3, 40, 30), (15, 30)))
    y = fivedp.grouped_matmul(x, w, counts)
    dx, dw = fivedp.grouped_matmul_backward(dy, x, w, np.array(counts))
    assert y.dtype == dx.dtype == dw.dtype == dtype
    for e, rows in ((0, slice(0, 3)), (2, slice(3, 15))):
        assert_as_exact_as_numpy(y[rows], x[rows], w[e])
        assert_as_exact_as_numpy(dx[rows], dy[rows], w[e].T)
        assert_as_exact_as_numpy(dw[e], x[rows].T, dy[rows])
    assert bits(dw[1]) == bits(np.zeros((40, 30), dtype))


def test_gradients_are_those_of_finite_differences(rng: np.random.Generator) -> None:
    counts = [2, 0, 3]
    x, w, dy = draw(rng, (5, 4), np.float64), draw(rng, (3, 4, 6), np.float64), draw(rng, (5, 6), np.float64)
    dx, dw = fivedp.grouped_matmul_backward(dy, x, w, counts)
    for array, gradient in ((x, dx), (w, dw)):
        direction = draw(rng, array.shape, np.float64)
        before = array.copy()
        values = []
        for sign in (1, -1):
            array[...] = before + sign * 0.5 * direction
            values.append((dy * fivedp.grouped_matmul(x, w, counts)).sum())
        array[...] = before
        # The product is linear in either operand, so the difference is exact but for rounding.
        assert abs(values[0] - values[1] - (gradient * direction).sum()) <= 1e-12 * (1 + abs(values[0]))


def test_no_rows_and_no_experts() -> None:
    w = np.ones((2, 3, 4))
    assert fivedp.grouped_matmul(np.ones((0, 3)), w, [0, 0]).shape == (0, 4)
    dx, dw = fivedp.grouped_matmul_backward(np.ones((0, 4)), np.ones((0, 3)), w, [0, 0])
    assert dx.shape == (0, 3)
    assert bits(dw) == bits(np.zeros((2, 3, 4)))
    assert fivedp.grouped_matmul(np.ones((0, 3)), w[:0], []).shape == (0, 4)


def test_errors_say_what_came_and_what_is_right() -> None:
    x, w, dy = np.ones((5, 3)), np.ones((2, 3, 4)), np.ones((5, 4))
    for wrong, kind, words in (
        ((x, w, [5]), ShapeError, r"`counts` has shape \(1,\); expected \(2,\)"),
        ((x, w, [2, 2]), ShapeError, "adds up to 4 and `x` has 5 rows"),
        ((x, w, [6, -1]), ShapeError, "`counts` has -1"),
        ((x, w, [2.0, 3.0]), DTypeError, "`counts` has dtype float64"),
        ((x[:, :2], w, [2, 3]), ShapeError, "K is 2 in `x` and 3 in `w`"),
        ((x[0], w, [2, 3]), ShapeError, "expected"),
        ((x.astype(np.float32), w, [2, 3]), DTypeError, "`x` is float32 and `w` is float64"),
        ((x.astype(np.float16), w, [2, 3]), DTypeError, "`x` has dtype float16"),
        (([[1.0]], w, [2, 3]), DTypeError, "`x` is a list"),
    ):
        with pytest.raises(kind, match=words):
            fivedp.grouped_matmul(*wrong)
    with pytest.raises(ShapeError, match=r"`dy` has shape \(5, 3\); expected \(5, 4\)"):
        fivedp.grouped_matmul_backward(x, x, w, [2, 3])
    with pytest.raises(DTypeError, match="`dy` is float32 and `x` is float64"):
        fivedp.grouped_matmul_backward(dy.astype(np.float32), x, w, [2, 3])
