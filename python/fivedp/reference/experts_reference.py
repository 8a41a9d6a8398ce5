"""A mixture of experts from given routing tables, expert by expert: the oracle for small inputs, one rank.

In float64 it is the judge. In another type it is the plain computation whose error is the yardstick: sums in `dtype`,
and what lies between two products rounded to `stored`, as a layer of 16 bits keeps it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Function = Callable[[Array], Array]


class Activation(NamedTuple):
    """A function of one number and its derivative."""

    value: Function
    slope: Function


class Gradients(NamedTuple):
    """Of x (T, H), of the weights (T, k) and of the experts' matrices; `w_gate` is None where there is none."""

    x: Array
    weights: Array
    w_up: Array
    w_gate: Array | None
    w_down: Array


def _sigmoid(z: Array) -> Array:
    result: Array = 1 / (1 + np.exp(-z))
    return result


def _silu_slope(z: Array) -> Array:
    s = _sigmoid(z)
    slope: Array = s * (1 + z * (1 - s))
    return slope


def _normal(z: Array) -> Array:
    """The distribution function of the normal distribution."""
    return np.asarray([(1 + math.erf(v / math.sqrt(2))) / 2 for v in z.reshape(-1).tolist()], z.dtype).reshape(z.shape)


def _gelu_slope(z: Array) -> Array:
    return _normal(z) + z * np.exp(-z * z / 2) / math.sqrt(2 * math.pi)


_TANH_SCALE, _TANH_CUBE = math.sqrt(2 / math.pi), 0.044715


def _bend(z: Array) -> Array:
    result: Array = np.tanh(_TANH_SCALE * (z + _TANH_CUBE * z**3))
    return result


def _gelu_tanh_slope(z: Array) -> Array:
    t = _bend(z)
    slope: Array = (1 + t) / 2 + z / 2 * (1 - t * t) * _TANH_SCALE * (1 + 3 * _TANH_CUBE * z * z)
    return slope


_SILU = Activation(lambda z: z * _sigmoid(z), _silu_slope)
ACTIVATIONS = {
    "swiglu": _SILU,  # of the gate, which multiplies x w_up
    "silu": _SILU,
    "gelu": Activation(lambda z: z * _normal(z), _gelu_slope),
    "gelu_tanh": Activation(lambda z: z / 2 * (1 + _bend(z)), _gelu_tanh_slope),
    "relu": Activation(lambda z: np.maximum(z, 0), lambda z: (z > 0).astype(z.dtype)),
}


class Experts:
    """The experts of a layer.

    Parameters
    ----------
    w_up : (E, H, F)
    w_gate : (E, H, F) or None
        None: the activation is of x w_up itself.
    w_down : (E, F, H)
    activation : str or Activation
    dtype : dtype
        The type of sums.
    stored : dtype, optional
        The type to which everything between two products is rounded.
    """

    def __init__(
        self,
        w_up: Array,
        w_gate: Array | None,
        w_down: Array,
        activation: str | Activation,
        *,
        dtype: Any = np.float64,
        stored: Any = None,
    ) -> None:
        self.dtype, self.stored = np.dtype(dtype), stored
        self.w_up, self.w_down = w_up.astype(dtype), w_down.astype(dtype)
        self.w_gate = None if w_gate is None else w_gate.astype(dtype)
        self.activation = ACTIVATIONS[activation] if isinstance(activation, str) else activation

    def _kept(self, array: Array) -> Array:
        return array if self.stored is None else array.astype(self.stored).astype(self.dtype)

    def _products(self, x: Array, expert: int) -> tuple[Array | None, Array]:
        gate = None if self.w_gate is None else self._kept(x @ self.w_gate[expert])
        return gate, self._kept(x @ self.w_up[expert])

    def _hidden(self, gate: Array | None, up: Array) -> Array:
        return self.activation.value(up) if gate is None else self.activation.value(gate) * up

    def __call__(self, x: Array, experts: Array, weights: Array) -> Array:
        """y (T, H): the weighted sum of every token's experts; a slot of -1 adds nothing."""
        x, weights = x.astype(self.dtype), weights.astype(self.dtype)
        y = np.zeros(x.shape, self.dtype)
        for expert in range(len(self.w_up)):
            token, slot = np.nonzero(experts == expert)
            hidden = self._kept(self._hidden(*self._products(x[token], expert)))
            y[token] += weights[token, slot, None] * (hidden @ self.w_down[expert])
        return y

    def backward(self, dy: Array, x: Array, experts: Array, weights: Array) -> Gradients:
        """The gradients for given choices: what made the weights is not looked at."""
        dy, x, weights = (array.astype(self.dtype) for array in (dy, x, weights))
        d_x, d_weights = np.zeros(x.shape, self.dtype), np.zeros(weights.shape, self.dtype)
        d_up, d_down = np.zeros(self.w_up.shape, self.dtype), np.zeros(self.w_down.shape, self.dtype)
        d_w_gate = None if self.w_gate is None else np.zeros(self.w_up.shape, self.dtype)
        for expert in range(len(self.w_up)):
            token, slot = np.nonzero(experts == expert)
            rows, weight = x[token], weights[token, slot, None]
            gate, up = self._products(rows, expert)
            hidden = self._hidden(gate, up)
            d_hidden = dy[token] @ self.w_down[expert].T
            d_weights[token, slot] = (d_hidden * hidden).sum(axis=1)
            d_down[expert] = self._kept(weight * hidden).T @ dy[token]
            d_hidden = weight * d_hidden
            if gate is None or self.w_gate is None or d_w_gate is None:
                d_product = self._kept(d_hidden * self.activation.slope(up))
            else:
                d_product = self._kept(d_hidden * self.activation.value(gate))
                d_gate = self._kept(d_hidden * up * self.activation.slope(gate))
                d_w_gate[expert] = rows.T @ d_gate
                d_x[token] += d_gate @ self.w_gate[expert].T
            d_up[expert] = rows.T @ d_product
            d_x[token] += d_product @ self.w_up[expert].T
        return Gradients(d_x, d_weights, d_up, d_w_gate, d_down)


def chosen_softmax(logits: Array, experts: Array) -> Array:
    """(T, k): the softmax over a token's chosen experts, 0 for a slot of -1. A token has at least one expert."""
    there = experts >= 0
    chosen = np.where(there, np.take_along_axis(logits, np.where(there, experts, 0), axis=1), -np.inf)
    powers = np.exp(chosen - chosen.max(axis=1, keepdims=True))
    weights: Array = powers / powers.sum(axis=1, keepdims=True)
    return weights


def chosen_softmax_backward(d_weights: Array, weights: Array, experts: Array, n_experts: int) -> Array:
    """The gradient of the logits (T, E): 0 for an expert that was not chosen."""
    d_chosen = weights * (d_weights - (weights * d_weights).sum(axis=1, keepdims=True))
    d_logits = np.zeros((len(experts), n_experts), d_chosen.dtype)
    token, slot = np.nonzero(experts >= 0)
    d_logits[token, experts[token, slot]] = d_chosen[token, slot]
    return d_logits
