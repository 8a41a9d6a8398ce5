"""A mixture of experts written out in NumPy: any part of its inputs, its router, one expert, and their derivatives.

Inputs are made from a seed and global numbers, so a check needs nobody else's memory for them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fivedp.bench import expert_workload, operands
from fivedp.bench.cases.moe import Case
from fivedp.bench.sampled_check import Arithmetic

Array = NDArray[Any]
Indices = NDArray[np.int64]
NUMBERS = {"x": 0, "dy": 1, "w_gate": 2, "w_up": 3, "w_down": 4, "logits": 5}


@dataclass(frozen=True)
class Inputs:
    """Any part of the inputs, made from their seed."""

    case: Case
    seed: int

    def logits(self, tokens: Indices | range) -> NDArray[np.float32]:
        """(n, E)."""
        draws = operands.block(self.seed + NUMBERS["logits"], tokens, range(self.case.model.experts),
                               np.dtype(np.float32))  # fmt: skip
        return expert_workload.logits(self.case.workload, draws)

    def choices(self, tokens: Indices | range) -> NDArray[np.int32]:
        """(n, k): the experts of some tokens."""
        return expert_workload.choices(self.logits(tokens), self.case.model.top_k)

    def tokens(self, name: str, tokens: Indices | range) -> Array:
        """(n, H) of x or dy."""
        rows = operands.block(self.seed + NUMBERS[name], tokens, range(self.case.model.width),
                              operands.dtype_of(self.case.dtype))  # fmt: skip
        if name == "x":
            expert_workload.put_logits(rows, self.logits(tokens))
        return rows

    def weights(self, name: str, experts: range) -> Array:
        """(n, H, F), or (n, F, H) of w_down."""
        m, dtype = self.case.model, operands.dtype_of(self.case.dtype)
        rows, columns = (m.hidden, m.width) if name == "w_down" else (m.width, m.hidden)
        numbers = range(experts.start * rows, experts.stop * rows)
        made = operands.block(self.seed + NUMBERS[name], numbers, range(columns), dtype)
        made *= np.asarray(expert_workload.weight_scale(rows), dtype)
        return made.reshape(len(experts), rows, columns)

    def router(self) -> Array:
        """(H, E)."""
        m = self.case.model
        return expert_workload.router(m.width, m.experts, operands.dtype_of(self.case.dtype))


class Weights(NamedTuple):
    """The matrices of one expert, or of this rank's experts; no gate where the activation has none."""

    gate: Array | None
    up: Array
    down: Array

    def of(self, expert: int) -> Weights:
        """The matrices of one of several experts."""
        return Weights(None if self.gate is None else self.gate[expert], self.up[expert], self.down[expert])

    def units(self, units: Indices) -> Weights:
        """Of one expert, what some hidden units need."""
        gate = None if self.gate is None else self.gate[:, units]
        return Weights(gate, self.up[:, units], self.down[units])


def choice_weights(logits: Array, chosen: Array, case: Case) -> Array:
    """(n, k): with what the experts of a token are weighted, in the type of the logits."""
    scores = _scores(logits, case)
    weights = np.take_along_axis(scores, chosen.astype(np.int64), axis=1)
    return weights / weights.sum(axis=1, keepdims=True) if case.model.normalize else weights


def _scores(logits: Array, case: Case) -> Array:
    """(n, E)."""
    if case.model.score == "sigmoid":
        gentle: Array = np.exp(-np.logaddexp(0, -logits))  # no overflow far from the choice
        return gentle
    risen = np.exp(logits - logits.max(axis=1, keepdims=True))
    scores: Array = risen / risen.sum(axis=1, keepdims=True)
    return scores


def logit_gradients(logits: Array, chosen: Array, d_weights: Array, case: Case) -> Array:
    """(n, E): the gradient of the logits, from that of the weights (n, k)."""
    chosen = chosen.astype(np.int64)
    scores, weights = _scores(logits, case), choice_weights(logits, chosen, case)
    mean = (weights * d_weights).sum(axis=1, keepdims=True)
    if case.model.normalize:
        inner = weights * (d_weights - mean)
        if case.model.score == "sigmoid":
            inner *= 1 - np.take_along_axis(scores, chosen, axis=1)
        gradients = np.zeros_like(logits)
    else:
        inner = weights * d_weights
        gradients = -scores * mean  # of the softmax; nothing else is measured without normalization
    np.put_along_axis(gradients, chosen, np.take_along_axis(gradients, chosen, axis=1) + inner, axis=1)
    return gradients


class Passed(NamedTuple):
    """Rows that went through one expert: the products before the activation, the activation, and its derivatives."""

    hidden: Array
    d_gate: Array | None
    d_up: Array


def through(x: Array, weights: Weights, how: Arithmetic) -> Passed:
    """The hidden units of rows x, and how they change with the gate and with up."""
    x = x.astype(how.sums, copy=False)
    up = how.rounded(x @ weights.up.astype(how.sums, copy=False))
    if weights.gate is None:
        positive = (up > 0).astype(how.sums)
        return Passed(how.rounded(up * positive), None, positive)
    gate = how.rounded(x @ weights.gate.astype(how.sums, copy=False))
    sigmoid = 1 / (1 + np.exp(-gate))
    silu = gate * sigmoid
    return Passed(how.rounded(silu * up), up * sigmoid * (1 + gate * (1 - sigmoid)), silu)
