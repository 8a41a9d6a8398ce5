"""Routing of tokens to experts on a GPU, with the meaning and the bits of `fivedp.kernels.routing` on the CPU.

Up to 1024 experts and 32 slots. Nothing waits: a logit that is not finite is found when somebody reads the totals.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from fivedp.kernels._select import sum_type
from fivedp.kernels.cuda._extension import extension, library_of, raw, stream_of
from fivedp.kernels.device_copies import to_host
from fivedp.kernels.routing import Rule, Totals

Array = Any


@dataclass(frozen=True)
class DeviceTotals:
    """Sums over tokens, on the GPU.

    Attributes
    ----------
    numbers : int64, one after the other
        The first row with a logit that is not finite, the first with an expert that there is not (the largest int64
        where there is none), the three of `Totals.squares`, then `Totals.choices` and `Totals.probabilities`.
    top_k, n_experts : int
    """

    numbers: Array
    top_k: int
    n_experts: int

    def read(self, *beside: Array) -> tuple[int, int, Totals, list[Array]]:
        """(the first invalid row or -1, the first row with an unknown expert or -1, the totals, and what is `beside`
        them as NumPy arrays), for which the host waits once."""
        values, *others = to_host(self.numbers, *beside)
        begin, pairs = extension().ROUTING_NUMBERS, self.top_k * self.n_experts
        choices = values[begin : begin + pairs].reshape(self.top_k, self.n_experts)
        invalid, unknown = (-1 if row == np.iinfo(np.int64).max else int(row) for row in values[:2])
        return invalid, unknown, Totals(choices, values[begin + pairs :], values[2:begin]), others


class DeviceRouted(NamedTuple):
    """Experts (T, k) int32 and weights (T, k), the best first, log_sum (T,), and the totals; rows that are invalid are
    not written."""

    experts: Array
    weights: Array
    log_sum: Array
    totals: DeviceTotals


def forward(logits: Array, top_k: int, rule: Rule) -> DeviceRouted:
    """The `top_k` experts of every token with the highest scores.

    Parameters
    ----------
    logits : (T, E)
        float32, float64, bfloat16 or float16; E at most 1024.
    top_k : int
        At most 32.
    rule : Rule

    Returns
    -------
    DeviceRouted
        In the type of sums. Equal keys go to the lower expert, and -0 equals 0.

    Raises
    ------
    ValueError, TypeError
        Shapes or types that do not fit.
    """
    return _forward(logits, library_of(logits).empty((len(logits), top_k), np.int32), rule, given=False)


def weights(logits: Array, experts: Array, rule: Rule) -> DeviceRouted:
    """The weights of experts that somebody else has chosen: `experts` (T, k) int32 has -1 in empty slots."""
    xp = library_of(logits)
    return _forward(logits, xp.ascontiguousarray(xp.asarray(experts, np.int32)), rule, given=True)


def _forward(logits: Array, experts: Array, rule: Rule, given: bool) -> DeviceRouted:
    xp, sums = library_of(logits), sum_type(logits.dtype)
    found, log_sum = xp.empty(experts.shape, sums), xp.empty(len(logits), sums)
    totals = _call(logits, experts.shape[1], rule, experts, given, found, log_sum, None)
    return DeviceRouted(experts, found, log_sum, totals)


def scores(logits: Array, rule: Rule) -> tuple[Array, DeviceTotals]:
    """The scores (T, E) of all experts, in the type of sums; nothing is chosen."""
    xp, sums = library_of(logits), sum_type(logits.dtype)
    found, log_sum = xp.empty(logits.shape, sums), xp.empty(len(logits), sums)
    return found, _call(logits, 0, rule, None, False, None, log_sum, found)


def _call(
    logits: Array, top_k: int, rule: Rule, chosen: Array, given: bool, found: Array, log_sum: Array, all_scores: Array
) -> DeviceTotals:
    n_experts = logits.shape[-1]
    module = extension()
    numbers = library_of(logits).empty(module.ROUTING_NUMBERS + (top_k + 1) * n_experts, np.int64)
    module.routing_forward(
        _rows(logits), top_k, _packed(logits, rule), chosen, given, found, log_sum, all_scores, numbers,
        stream_of(logits),
    )  # fmt: skip
    return DeviceTotals(numbers, top_k, n_experts)


def backward(
    d_weights: Array,
    logits: Array,
    rule: Rule,
    chosen: Array,
    kept: Array,
    log_sum: Array,
    balance: Array | None = None,
    z_factor: float = 0.0,
) -> Array:
    """The gradient of the logits, (T, E) in the type of sums.

    Parameters are those of `fivedp.kernels.routing.backward`. A token's experts must differ; one that there is not
    counts as an empty slot.
    """
    xp, sums = library_of(logits), sum_type(logits.dtype)
    d_logits = xp.empty(logits.shape, sums)

    def contiguous(array: Array, dtype: Any) -> Array:
        return xp.ascontiguousarray(xp.asarray(array, dtype))

    extension().routing_backward(
        contiguous(d_weights, sums), _rows(logits), _packed(logits, rule), contiguous(chosen, np.int32),
        contiguous(kept, np.int32), contiguous(log_sum, sums), None if balance is None else contiguous(balance, sums),
        float(z_factor), d_logits, stream_of(logits),
    )  # fmt: skip
    return d_logits


def drop_by_position(chosen: Array, before: Array, capacity: int) -> Array:
    """`chosen` (T, k), with -1 where an expert has had `capacity` tokens before.

    Parameters
    ----------
    chosen : int32 (T, k)
    before : int64 (k, E)
        As in `fivedp.kernels.routing.drop_by_position`; may be a NumPy array. E is at most 2048.
    capacity : int
    """
    xp, module = library_of(chosen), extension()
    kept = xp.empty(chosen.shape, np.int32)
    tiles = -(-len(chosen) // module.TILE_PAIRS)
    workspace = xp.empty(before.size * (tiles + 1), np.int32)
    module.drop_by_position(
        xp.ascontiguousarray(chosen), xp.ascontiguousarray(xp.asarray(before, np.int64)), int(capacity), kept,
        workspace, stream_of(chosen),
    )  # fmt: skip
    return kept


def _rows(logits: Array) -> Array:
    """The logits as the extension takes them: rows contiguous, bfloat16 as its bits."""
    if logits.ndim == 2 and logits.shape[1] > 1 and logits.strides[1] != logits.itemsize:
        logits = library_of(logits).ascontiguousarray(logits)
    return raw(logits, "routing: logits")


def _packed(logits: Array, rule: Rule) -> tuple[Any, ...]:
    xp = library_of(logits)
    bias = None if rule.bias is None else xp.ascontiguousarray(xp.asarray(rule.bias, sum_type(logits.dtype)))
    return (rule.sigmoid, rule.normalize, float(rule.scale), bias, *rule.groups, rule.zero_mask)
