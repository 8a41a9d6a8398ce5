"""RMSNorm and LayerNorm on the GPU, and their gradients, against float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pointwise_operands import BF16, F64, TYPES, Guarded, draw, error_is_below, smallest, sum_type, unit

from fivedp.kernels.cuda import norms

# One warp a row, two, all eight; rows beyond the registers; no rows; a row of one element.
SHAPES = [(1, 1), (9, 7), (17, 256), (5, 1030), (3, 4097), (2, 17000), (0, 8)]


def places(rng: np.random.Generator) -> dict[str, int]:
    """Aligned or not, rows apart or not."""
    return [{}, {"offset": 1, "gap": 3}, {"gap": 16}][rng.integers(3)]


class Case:
    """Operands of a norm, and what float64 makes of them."""

    def __init__(self, rng: np.random.Generator, rows: int, columns: int, dtype: Any, centered: bool, far: float = 0):
        self.x = (draw(rng, (rows, columns), F64) + far).astype(dtype)
        self.residual = draw(rng, (rows, columns), dtype)
        self.gain = (1 + 0.3 * draw(rng, columns, F64)).astype(dtype)
        self.bias = draw(rng, columns, dtype)
        self.dy, self.d_sum = draw(rng, (rows, columns), dtype), draw(rng, (rows, columns), dtype)
        self.centered, self.epsilon = centered, 1e-4

    def exact(self, s: Any) -> tuple[Any, Any, Any]:
        """(mean, inverse, h) of rows s."""
        s = s.astype(F64)
        mean = s.mean(axis=1, keepdims=True) if self.centered else np.zeros((len(s), 1))
        inverse = 1 / np.sqrt(((s - mean) ** 2).mean(axis=1, keepdims=True) + self.epsilon)
        return mean, inverse, (s - mean) * inverse

    def forward(self, s: Any) -> Any:
        _, _, h = self.exact(s)
        return h * self.gain.astype(F64) + (self.bias.astype(F64) if self.centered else 0)

    def backward(self, s: Any) -> tuple[Any, Any, Any]:
        _, inverse, h = self.exact(s)
        dy = self.dy.astype(F64)
        a = dy * self.gain.astype(F64)
        mean_a = a.mean(axis=1, keepdims=True) if self.centered else 0
        dx = inverse * (a - mean_a - h * (a * h).mean(axis=1, keepdims=True))
        return dx, (dy * h).sum(axis=0), dy.sum(axis=0)


def run_forward(xp: Any, case: Case, place: dict[str, int], *, residual: bool) -> dict[str, Guarded]:
    shape, dtype = case.x.shape, case.x.dtype
    x = Guarded(xp, shape, dtype, values=case.x, **place)
    results = {"y": Guarded(xp, shape, dtype, **place)}
    results |= {name: Guarded(xp, len(case.x), sum_type(dtype)) for name in ("mean", "inverse")}
    gain, bias = xp.asarray(case.gain), xp.asarray(case.bias)
    more: dict[str, Any] = {"epsilon": case.epsilon, "inverse": results["inverse"].array}
    if residual:
        results["sum"] = Guarded(xp, shape, dtype, **place)
        more |= {"residual": Guarded(xp, shape, dtype, values=case.residual, **place).array}
        more |= {"sum": results["sum"].array}
    if case.centered:
        norms.layer_norm(x.array, gain, bias, results["y"].array, mean=results["mean"].array, **more)
    else:
        norms.rms_norm(x.array, gain, results["y"].array, **more)
    return results


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("centered", [False, True], ids=["rms", "layer"])
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
def test_forward(xp: Any, host: Any, seed: int, dtype: Any, shape: Any, centered: bool, residual: bool) -> None:
    rng = np.random.default_rng(seed)
    case = Case(rng, *shape, dtype, centered)
    got = run_forward(xp, case, places(rng), residual=residual)
    s = case.x
    if residual:
        s = (case.x.astype(sum_type(dtype)) + case.residual.astype(sum_type(dtype))).astype(dtype)
        np.testing.assert_array_equal(host(got["sum"].array), s)  # one addition, one rounding
    mean, inverse, _ = case.exact(s)
    # Sums are chains below 80 elements and a tree: 90 roundings; then a root, a quotient, products and a sum.
    small = 100 * unit(sum_type(dtype))
    error_is_below(host(got["inverse"].array), inverse[:, 0], small * inverse[:, 0])
    size = abs(s.astype(F64)).mean(axis=1) if shape[0] else np.zeros(0)
    if centered:
        error_is_below(host(got["mean"].array), mean[:, 0], small * size)
    right = case.forward(s)
    terms = (abs(s.astype(F64)) + size[:, None]) * inverse * abs(case.gain.astype(F64)) + abs(case.bias.astype(F64))
    error_is_below(host(got["y"].array), right, unit(dtype) * abs(right) + 2 * small * terms + smallest(dtype))
    for guarded in got.values():
        guarded.check(host)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (300, 40), (600, 1030)], ids=str)
@pytest.mark.parametrize("centered", [False, True], ids=["rms", "layer"])
def test_backward(xp: Any, host: Any, seed: int, dtype: Any, shape: Any, centered: bool) -> None:
    rng = np.random.default_rng(seed)
    if shape[0] > 300 and dtype != BF16:
        pytest.skip("more rows than blocks: one type is enough")
    case, place = Case(rng, *shape, dtype, centered), places(rng)
    sums = sum_type(dtype)
    mean, inverse, h = case.exact(case.x)
    add, gradient_type = bool(rng.integers(2)), [dtype, sums][rng.integers(2)]
    dx = Guarded(xp, shape, dtype, **place)
    d_gain, d_bias = (Guarded(xp, shape[1], gradient_type) for _ in range(2))
    arguments = [Guarded(xp, shape, dtype, values=values, **place).array for values in (case.dy, case.x)]
    arguments += [xp.asarray(case.gain)]
    arguments += [xp.asarray(mean[:, 0].astype(sums))] if centered else []
    arguments += [xp.asarray(inverse[:, 0].astype(sums))]
    more: dict[str, Any] = {"dx": dx.array, "d_gain": d_gain.array}
    if add:
        more["d_sum"] = Guarded(xp, shape, dtype, values=case.d_sum, **place).array
    if centered:
        norms.layer_norm_backward(*arguments, d_bias=d_bias.array, **more)
    else:
        norms.rms_norm_backward(*arguments, **more)
    right, right_gain, right_bias = case.backward(case.x)
    added = case.d_sum.astype(F64) if add else 0.0
    a = abs(case.dy.astype(F64) * case.gain.astype(F64))
    size = inverse * (a + (a.mean(axis=1, keepdims=True) + abs(h) * (a * abs(h)).mean(axis=1, keepdims=True)))
    small = 200 * unit(sums)
    error_is_below(
        host(dx.array), right + added, unit(dtype) * abs(right + added) + small * (size + abs(added)) + smallest(dtype)
    )
    # Over rows: at most rows / partials + partials / 8 + 8 additions one after another.
    depth = shape[0] / 200 + 60
    for result, wanted, terms in (
        (d_gain, right_gain, abs(case.dy.astype(F64) * h)),
        (d_bias, right_bias, abs(case.dy.astype(F64))),
    ):
        if centered or result is d_gain:
            error_is_below(
                host(result.array),
                wanted,
                unit(gradient_type) * abs(wanted) + depth * unit(sums) * terms.sum(axis=0) + smallest(gradient_type),
            )
    for guarded in (dx, d_gain, d_bias):
        guarded.check(host)


@pytest.mark.parametrize("shape", [(33, 257), (4, 9000)], ids=str)
def test_bits_depend_on_neither_alignment_nor_order_of_threads(xp: Any, host: Any, seed: int, shape: Any) -> None:
    case = Case(np.random.default_rng(seed), *shape, BF16, True)
    runs = []
    for place in ({}, {"offset": 1}, {"gap": 5}):
        got = run_forward(xp, case, place, residual=False)
        dx, d_gain = Guarded(xp, shape, BF16, **place), xp.full(shape[1], np.nan, np.float32)
        d_bias = xp.full(shape[1], np.nan, np.float32)
        dy, x = (Guarded(xp, shape, BF16, values=values, **place).array for values in (case.dy, case.x))
        norms.layer_norm_backward(
            dy,
            x,
            xp.asarray(case.gain),
            got["mean"].array,
            got["inverse"].array,
            dx=dx.array,
            d_gain=d_gain,
            d_bias=d_bias,
        )
        runs.append([host(array).tobytes() for array in (got["y"].array, dx.array, d_gain, d_bias)])
    assert runs[0] == runs[1] == runs[2]


def test_far_mean_does_not_cancel(xp: Any, host: Any, seed: int) -> None:
    case = Case(np.random.default_rng(seed), 4, 3000, np.dtype(np.float32), True, far=1000.0)
    got = run_forward(xp, case, {}, residual=False)
    mean, inverse, _ = case.exact(case.x)
    # The mean is wrong by 100 roundings of 1000 at most; its square is all the variance can be wrong by.
    assert (abs(host(got["inverse"].array) / inverse[:, 0] - 1) < (100 * 2.0**-24 * 1000) ** 2 + 1e-5).all()
    assert abs(mean).min() > 900


def test_results_may_take_the_place_of_operands(xp: Any, host: Any, seed: int) -> None:
    rng = np.random.default_rng(seed)
    shape = (3, 9000)  # longer than the registers hold in the backward
    case = Case(rng, *shape, np.dtype(np.float32), False)
    apart = run_forward(xp, case, {}, residual=True)
    x, residual, gain = xp.asarray(case.x.copy()), xp.asarray(case.residual.copy()), xp.asarray(case.gain)
    norms.rms_norm(x, gain, x, residual=residual, sum=residual, epsilon=case.epsilon)
    np.testing.assert_array_equal(host(x), host(apart["y"].array))
    np.testing.assert_array_equal(host(residual), host(apart["sum"].array))
    dy, dx = xp.asarray(case.dy.copy()), xp.full(shape, np.nan, np.float32)
    norms.rms_norm_backward(dy, residual, gain, apart["inverse"].array, dx=dx)
    norms.rms_norm_backward(dy, residual, gain, apart["inverse"].array, dx=dy)
    np.testing.assert_array_equal(host(dy), host(dx))


def test_non_finite_rows_stay_alone(xp: Any, host: Any, seed: int) -> None:
    case = Case(np.random.default_rng(seed), 5, 40, np.dtype(np.float16), True)
    case.x[1, 3], case.x[3, 5] = np.nan, np.inf
    y = host(run_forward(xp, case, {}, residual=False)["y"].array).astype(F64)
    assert np.isnan(y[[1, 3]]).all()
    assert np.isfinite(y[[0, 2, 4]]).all()


def test_what_does_not_fit_is_named(xp: Any) -> None:
    x, y = xp.zeros((2, 3), np.float32), xp.zeros((2, 3), np.float32)
    with pytest.raises(ValueError, match=r"norm: y has shape \(2, 4\); \(2, 3\) would be right"):
        norms.rms_norm(x, None, xp.zeros((2, 4), np.float32))
    with pytest.raises(TypeError, match="norm: gain has type f8; f4 would be right"):
        norms.rms_norm(x, xp.zeros(3), y)
    with pytest.raises(ValueError, match="norm: one of residual and sum is None; both, or neither, would be right"):
        norms.rms_norm(x, None, y, residual=y)
    with pytest.raises(ValueError, match="norm: y is not contiguous along its last index"):
        norms.rms_norm(x, None, xp.zeros((3, 2), np.float32).T)
    with pytest.raises(ValueError, match="norm: mean is None; what the forward wrote would be right"):
        norms.layer_norm_backward(x, x, None, None, xp.zeros(2, np.float32), dx=y)
