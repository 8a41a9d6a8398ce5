"""Activations and their gradients on the GPU against float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pointwise_operands import BF16, F64, TYPES, Guarded, draw, error_is_below, smallest, sum_type, unit
from scipy.special import expit, ndtr

from fivedp.kernels.cuda.activations import activate, expert_hidden_backward

ACTIVATIONS = ["swiglu", "gelu", "gelu_tanh", "relu", "silu"]
SHAPES = [(1, 1), (9, 7), (5, 1031), (2, 5000), (0, 8)]


def exact(activation: str, x: Any) -> tuple[Any, Any]:
    """(value, slope) in float64."""
    if activation in ("swiglu", "silu"):
        return x * expit(x), expit(x) * (1 + x * expit(-x))
    if activation == "gelu":
        return x * ndtr(x), ndtr(x) + x * np.exp(-x * x / 2) / np.sqrt(2 * np.pi)
    if activation == "gelu_tanh":
        u = 2 * np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)
        inner = 2 * np.sqrt(2 / np.pi) * (1 + 3 * 0.044715 * x**2)
        return x * expit(u), expit(u) * (1 + x * expit(-u) * inner)
    return np.maximum(x, 0), (x > 0).astype(F64)


def value_error(activation: str, x: Any) -> Any:
    """In units of the last place: a few, and where an exponential's argument was rounded, that argument."""
    if activation == "gelu_tanh":
        return 20 + 4 * abs(1.6 * (x + 0.044715 * x**3))
    return 20 + 4 * x * x if activation == "gelu" else 20


def spread(rng: np.random.Generator, shape: Any, dtype: Any) -> Any:
    """From where exponentials underflow to where everything is saturated, dense around 0."""
    wide = rng.uniform(-12, 12, shape)
    return np.where(rng.random(shape) < 0.5, wide, rng.standard_normal(shape)).astype(dtype)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_forward(xp: Any, host: Any, seed: int, dtype: Any, activation: str) -> None:
    rng = np.random.default_rng(seed)
    for number, shape in enumerate(SHAPES):
        place: dict[str, int] = [{}, {"offset": 1, "gap": 2}, {"gap": 16}][number % 3]
        x, up = spread(rng, shape, dtype), draw(rng, shape, dtype)
        hidden = Guarded(xp, shape, dtype, **place)
        gate = Guarded(xp, shape, dtype, values=x, **place).array
        if activation == "swiglu":
            activate(gate, Guarded(xp, shape, dtype, values=up, **place).array, hidden.array)
        else:
            activate(None, gate, hidden.array, activation=activation)
        value = exact(activation, x.astype(F64))[0]
        right = value * up.astype(F64) if activation == "swiglu" else value
        small = value_error(activation, x.astype(F64)) * unit(sum_type(dtype))
        error_is_below(host(hidden.array), right, (small + unit(dtype)) * abs(right) + smallest(dtype) + 1e-36)
        hidden.check(host)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_backward(xp: Any, host: Any, seed: int, dtype: Any, activation: str) -> None:
    rng = np.random.default_rng(seed)
    gated, sums = activation == "swiglu", sum_type(dtype)
    for number, shape in enumerate(SHAPES):
        place: dict[str, int] = [{"gap": 16}, {"offset": 1, "gap": 2}, {}][number % 3]
        x, up = spread(rng, shape, dtype), draw(rng, shape, dtype)
        weights, d_hidden = draw(rng, shape[0], sums), draw(rng, shape, [dtype, sums][rng.integers(2)])
        results = {name: Guarded(xp, shape, dtype, **place) for name in ("d_gate", "d_up", "hidden_weighted")}
        results["d_weights"] = Guarded(xp, shape[0], sums) if shape[0] else Guarded(xp, (0,), sums)
        given = {name: guarded.array for name, guarded in results.items()}
        if not gated:
            given["d_gate"] = None
        expert_hidden_backward(
            Guarded(xp, shape, d_hidden.dtype, values=d_hidden, **place).array,
            Guarded(xp, shape, dtype, values=x, **place).array if gated else None,
            Guarded(xp, shape, dtype, values=up if gated else x, **place).array,
            xp.asarray(weights),
            activation=activation,
            **given,
        )
        value, slope = exact(activation, x.astype(F64))
        d, w, u = d_hidden.astype(F64), weights.astype(F64)[:, None], up.astype(F64)
        hidden = value * u if gated else value
        right = {"d_up": w * d * (value if gated else slope), "hidden_weighted": w * hidden}
        size = {"d_up": abs(right["d_up"]) if gated else abs(w * d), "hidden_weighted": abs(right["hidden_weighted"])}
        if gated:
            right["d_gate"], size["d_gate"] = w * d * u * slope, abs(w * d * u)
        small = value_error(activation, x.astype(F64)) * unit(sums)
        # hidden is rounded as it was stored before it is weighted.
        rounded = {"hidden_weighted": unit(dtype) * abs(right["hidden_weighted"]) + smallest(dtype) * abs(w)}
        for name, wanted in right.items():
            bound = small * size[name] + unit(dtype) * abs(wanted) + smallest(dtype) + rounded.get(name, 0) + 1e-36
            error_is_below(host(results[name].array), wanted, bound)
        # A chain of at most 160 products, then a tree, of hidden as it was stored.
        terms = abs(d * hidden) * (small + unit(dtype) + 170 * unit(sums)) + abs(d) * smallest(dtype)
        error_is_below(host(results["d_weights"].array), (d * hidden).sum(axis=1), terms.sum(axis=1) + 1e-36)
        for name, guarded in results.items():
            guarded.check(host)
            assert name != "d_gate" or gated or np.isnan(host(guarded.array).astype(F64)).all()


def test_bits_do_not_depend_on_alignment(xp: Any, host: Any, seed: int) -> None:
    rng = np.random.default_rng(seed)
    shape, runs = (3, 2500), []
    x, up, d_hidden = spread(rng, shape, BF16), draw(rng, shape, BF16), draw(rng, shape, np.float32)
    for place in ({}, {"offset": 1}, {"gap": 5}):
        arrays = [Guarded(xp, shape, values.dtype, values=values, **place).array for values in (d_hidden, x, up)]
        d_weights = xp.full(3, np.nan, np.float32)
        expert_hidden_backward(*arrays, None, d_gate=arrays[1], d_up=arrays[2], d_weights=d_weights)  # in place
        runs.append([host(array).tobytes() for array in (*arrays, d_weights)])
    assert runs[0] == runs[1] == runs[2]


def test_saturated_and_missing_numbers(xp: Any, host: Any) -> None:
    x = np.array([[-1e30, -200.0, 200.0, 1e30, np.nan, 0.0]], np.float32)
    for activation in ACTIVATIONS[1:]:
        hidden, d_up = xp.full(x.shape, 7, np.float32), xp.full(x.shape, 7, np.float32)
        activate(None, xp.asarray(x), hidden, activation=activation)
        ones = xp.ones(x.shape, np.float32)
        expert_hidden_backward(ones, None, xp.asarray(x), None, d_gate=None, d_up=d_up, activation=activation)
        value, slope = host(hidden)[0], host(d_up)[0]
        np.testing.assert_array_equal(value[[0, 1, 2, 3, 5]], [0, 0, 200, np.float32(1e30), 0])
        np.testing.assert_array_equal(slope[:4], [0, 0, 1, 1])
        assert np.isnan(value[4]), activation


def test_what_does_not_fit_is_named(xp: Any) -> None:
    x, y = xp.zeros((2, 3), np.float32), xp.zeros((2, 3), np.float32)
    with pytest.raises(ValueError, match="activation: activation is swiglu without a gate"):
        activate(None, x, y)
    with pytest.raises(ValueError, match="activation: activation is tanh; swiglu, gelu, gelu_tanh, relu or silu"):
        activate(None, x, y, activation="tanh")
    with pytest.raises(ValueError, match="expert_hidden_backward: one of gate and d_gate is None"):
        expert_hidden_backward(x, x, x, None, d_gate=None, d_up=y)
    with pytest.raises(TypeError, match="expert_hidden_backward: weights has type f8; f4 would be right"):
        expert_hidden_backward(x, x, x, xp.zeros(2), d_gate=y, d_up=y)
