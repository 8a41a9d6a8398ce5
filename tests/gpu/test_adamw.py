"""AdamW on the GPU, and the squared norm of gradients, against float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pointwise_operands import BF16, F64, Guarded, draw, error_is_below, sum_type, unit

from fivedp.kernels.cuda.adamw import adamw, squared_norm

F32, F16 = np.dtype(np.float32), np.dtype(np.float16)
PAIRS = [(F32, F32), (np.dtype(F64), np.dtype(F64)), (BF16, BF16), (BF16, F32), (F16, F16), (F16, F32)]
RATES = {"learning_rate": 0.01, "betas": (0.9, 0.95), "epsilon": 1e-6, "weight_decay": 0.1}


def exact(w: Any, m: Any, v: Any, g: Any, step: int) -> tuple[Any, Any, Any]:
    (beta1, beta2), rate = RATES["betas"], RATES["learning_rate"]  # type: ignore[misc]
    m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
    change = (m / (1 - beta1**step)) / (np.sqrt(v / (1 - beta2**step)) + RATES["epsilon"])
    return w - rate * RATES["weight_decay"] * w - rate * change, m, v


@pytest.mark.parametrize("types", PAIRS, ids=str)
@pytest.mark.parametrize("shape", [(1,), (7, 11), (2051,), (0,)], ids=str)
@pytest.mark.parametrize("step", [1, 1000])
def test_one_step(xp: Any, host: Any, seed: int, types: Any, shape: Any, step: int) -> None:
    rng = np.random.default_rng(seed)
    dtype, gradient_type = types
    sums, own = sum_type(dtype), dtype in (F32, F64)
    place: dict[str, int] = [{}, {"offset": 1}][rng.integers(2)]
    w, m, v = (draw(rng, shape, sums), draw(rng, shape, sums), draw(rng, shape, sums) ** 2)
    g, scale, zero = draw(rng, shape, gradient_type), rng.uniform(0.1, 2), bool(rng.integers(2))
    master = Guarded(xp, shape, sums, values=w, **place)
    parameter = master if own else Guarded(xp, shape, dtype, **place)
    first, second = Guarded(xp, shape, sums, values=m, **place), Guarded(xp, shape, sums, values=v, **place)
    gradient = Guarded(xp, shape, gradient_type, values=g, **place)
    adamw(
        parameter.array,
        gradient.array,
        None if own else master.array,
        first.array,
        second.array,
        step=step,
        scale=xp.asarray(np.array([scale], sums)),
        factor=0.5,
        zero_gradient=zero,
        **RATES,
    )
    scaled = 0.5 * float(np.array(scale, sums)) * g.astype(F64)
    right = exact(w.astype(F64), m.astype(F64), v.astype(F64), scaled, step)
    small = 16 * unit(sums)  # below a dozen roundings on the way to any of them
    terms = (abs(w), abs(m) + abs(scaled), v + scaled**2)
    # The change is m / sqrt(v): the error of m counts relative to the root of v.
    root = np.sqrt(right[2] / (1 - RATES["betas"][1] ** step)) + RATES["epsilon"]  # type: ignore[index]
    change = 0.01 * (abs(m) + abs(scaled)) / (1 - 0.9**step) / root
    for result, wanted, size in zip((master, first, second), right, (terms[0] + change, *terms[1:]), strict=True):
        error_is_below(host(result.array), wanted, small * size)
    if not own:
        np.testing.assert_array_equal(host(parameter.array), host(master.array).astype(dtype))
    kept = host(gradient.array)
    assert (kept == 0).all() if zero else (kept == g).all()
    for guarded in (parameter, master, first, second, gradient):
        guarded.check(host)


@pytest.mark.parametrize("scale", [np.inf, np.nan])
def test_a_scale_that_is_not_finite_changes_nothing(xp: Any, host: Any, seed: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    before = [draw(rng, 100, dtype) for dtype in (F16, F16, F32, F32, F32)]
    parameter, gradient, master, m, v = arrays = [xp.asarray(array.copy()) for array in before]
    adamw(
        parameter,
        gradient,
        master,
        m,
        v,
        step=3,
        scale=xp.full(1, scale, F32),
        zero_gradient=True,
        **RATES,  # type: ignore[arg-type]
    )
    before[1][:] = 0
    for array, old in zip(arrays, before, strict=True):
        np.testing.assert_array_equal(host(array), old)


@pytest.mark.parametrize("dtype", [F32, np.dtype(F64), BF16, F16], ids=str)
@pytest.mark.parametrize("n", [0, 1, 1000, 70001])
def test_squared_norm(xp: Any, host: Any, seed: int, dtype: Any, n: int) -> None:
    rng = np.random.default_rng(seed)
    x = draw(rng, n, dtype)
    if dtype == F32 and n:
        x[0] = 1e30  # its square is beyond float32
    right, totals = (x.astype(F64) ** 2).sum(), []
    for offset in (0, 1):
        total = Guarded(xp, (1,), F64, values=3.0)
        given = Guarded(xp, (n,), dtype, values=x, offset=offset)
        squared_norm(given.array, total.array, add=True)
        error_is_below(host(total.array), right + 3.0, 300 * 2.0**-53 * (right + 3.0))
        squared_norm(given.array, total.array)
        error_is_below(host(total.array), right, 300 * 2.0**-53 * right)
        total.check(host)
        totals.append(float(host(total.array)[0]))
    assert totals[0] == totals[1]


def test_what_does_not_fit_is_named(xp: Any) -> None:
    p, s = xp.zeros(5, F16), [xp.zeros(5, F32) for _ in range(3)]
    with pytest.raises(ValueError, match="adamw: step is 0; 1 for the first would be right"):
        adamw(p, p, *s, step=0, learning_rate=1.0)
    with pytest.raises(TypeError, match="adamw: gradient has type f8; f2 would be right"):
        adamw(p, xp.zeros(5), *s, step=1, learning_rate=1.0)
    with pytest.raises(ValueError, match="adamw: master is not the parameter"):
        adamw(s[0], s[0], s[1], *s[1:], step=1, learning_rate=1.0)
    with pytest.raises(ValueError, match=r"adamw: scale has type f8 and shape \(1,\); one number of f4"):
        adamw(p, p, *s, step=1, learning_rate=1.0, scale=xp.ones(1))
