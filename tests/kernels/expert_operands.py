"""Operands, oracles and activations that the tests of the experts' kernels share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from kernel_operands import BF16, draw

from fivedp.kernels.experts import Rows

Array = Any

# What is behind a poisoned result: no sum of the operands comes near.
POISON = -3e30


def poisoned(shape: tuple[int, ...], dtype: Any) -> Array:
    return np.full(shape, POISON, dtype)


def sum_type(dtype: Any) -> Any:
    return np.float64 if np.dtype(dtype) == np.float64 else np.float32


def offsets_of(counts: Sequence[int]) -> Array:
    return np.cumsum([0, *counts]).astype(np.int64)


def scattered(rng: np.random.Generator, x: Array, n_sources: int = 3) -> Rows:
    """The rows of x, strewn over arrays of different sizes and strides."""
    source = rng.integers(0, n_sources, len(x)).astype(np.int32)
    index = np.zeros(len(x), np.int32)
    arrays = []
    for number in range(n_sources):
        mine = np.flatnonzero(source == number)
        places = rng.permutation(len(mine) + 3)[: len(mine)]
        home = draw(rng, (len(mine) + 3, x.shape[1] + number), x.dtype)[:, : x.shape[1]]
        home[places] = x[mine]
        index[mine] = places
        arrays.append(home)
    return Rows(arrays, source, index)


def silu(x: Array) -> Array:
    with np.errstate(over="ignore"):
        return x / (1 + np.exp(-x))


def gelu(x: Array) -> Array:
    return 0.5 * x * np.vectorize(math.erfc, otypes=[np.float64])(-x / math.sqrt(2))


def gelu_tanh(x: Array) -> Array:
    # (1 + tanh u) / 2 = 1 / (1 + exp(-2 u)), which keeps its digits for negative u
    with np.errstate(over="ignore"):
        return x / (1 + np.exp(-2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def relu(x: Array) -> Array:
    return np.maximum(x, 0)


PLAIN: dict[str, Callable[[Array], Array]] = {"silu": silu, "gelu": gelu, "gelu_tanh": gelu_tanh, "relu": relu}


def hidden_of(activation: str, gate: Array | None, up: Array) -> Array:
    """The hidden layer in float64."""
    if activation == "swiglu":
        assert gate is not None
        return silu(gate.astype(np.float64)) * up.astype(np.float64)
    return PLAIN[activation](up.astype(np.float64))


def rounding(dtype: Any) -> float:
    """Half a unit in the last place, of 1."""
    return {8: 2.0**-53, 4: 2.0**-24, 2: 2.0**-8}[2 if dtype == BF16 else np.dtype(dtype).itemsize]


def activation_error(activation: str, gate: Array | None, up: Array) -> Array:
    """How far an activation may be from the oracle, in roundings of the result.

    The documented units in the last place are two roundings each; the product with `up` and the store add one each.
    gelu_tanh passes on the rounding of its argument. The oracle is float64 itself: its gelu passes on the rounding of
    x / sqrt(2), times the square of x.
    """
    x = (up if gate is None else gate).astype(np.float64)
    allowed = np.full(x.shape, 18.0)
    if activation == "gelu_tanh":
        allowed += 8 * abs(1.6 * x + 0.0714 * x**3)
    if activation == "gelu" and up.dtype == np.float64:
        allowed += 2 * x**2
    if up.dtype == BF16:  # computed in float32, rounded once
        allowed = 1 + allowed * 2.0**-16
    return allowed
