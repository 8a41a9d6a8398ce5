"""Routing of tokens to experts on one rank: scores, the best experts of each token, their weights, and the gradient.

What the losses need of all tokens comes as whole numbers (`Totals`): they can be added in any order, over any partition
of the tokens, to the same result.

CuPy arrays are served by `fivedp.kernels.cuda.routing`, with the same bits. Totals are NumPy arrays all the same, so
such a call waits, for one event of the current stream; experts and weights come to the host in the same wait.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import numpy as np
import numpy.typing as npt

from fivedp import _cpu
from fivedp.kernels._select import is_cupy, raw, sum_type

Array = Any
Integers = npt.NDArray[np.int64]

# One unit of `Totals.probabilities` and of the fraction in `Totals.squares` is 1 / UNITS.
UNITS = 2**40
# With more tokens on a rank, sums in these units could pass 2^63.
MAX_TOKENS = 2**22


@dataclass(frozen=True)
class Rule:
    """How a token's logits become experts and weights.

    Attributes
    ----------
    sigmoid : bool
        Scores are the sigmoid of the logits; else their softmax.
    normalize : bool
        Weights are divided by their sum over the token's experts (plus 1e-20 for sigmoids).
    scale : float
        Weights are multiplied by it.
    bias : (E,), optional
        Added to scores for the choice only.
    groups : (n_groups, top_groups)
        A token's experts come from the `top_groups` groups whose two best keys (score + bias) have the highest sum.
    zero_mask : bool
        Experts of the other groups have the key 0 instead of being out of reach.
    """

    sigmoid: bool = False
    normalize: bool = True
    scale: float = 1.0
    bias: Array | None = None
    groups: tuple[int, int] = (1, 1)
    zero_mask: bool = False

    def _packed(self, dtype: Any) -> tuple[Any, ...]:
        bias = None if self.bias is None else np.ascontiguousarray(self.bias, sum_type(dtype))
        return (self.sigmoid, self.normalize, float(self.scale), bias, *self.groups, self.zero_mask)


class Totals(NamedTuple):
    """Sums over tokens.

    Attributes
    ----------
    choices : int64 (k, E)
        How often an expert was chosen in a slot.
    probabilities : int64 (E,)
        The sum of a token's softmax (of sigmoids: their shares), each rounded to a multiple of 2^-40, in units of that.
    squares : int64 (3,)
        The sum of log_sum^2: its whole part, its fractions in units of 2^-40, and how many tokens are left out of it
        because their log_sum is beyond 2^20 in size.
    """

    choices: Integers
    probabilities: Integers
    squares: Integers


class Routed(NamedTuple):
    """Experts (T, k) int32 and weights (T, k), the best first, log_sum (T,), the log of the sum of exp(logit).

    `on_host` are experts and weights as NumPy arrays: the same ones, or copies of CuPy's.
    """

    experts: npt.NDArray[np.int32]
    weights: Array
    log_sum: Array
    totals: Totals
    on_host: tuple[npt.NDArray[np.int32], npt.NDArray[Any]]


def forward(logits: Array, top_k: int, rule: Rule) -> Routed:
    """The `top_k` experts of every token with the highest scores.

    Parameters
    ----------
    logits : (T, E)
        float32, float64 or bfloat16.
    top_k : int
    rule : Rule

    Returns
    -------
    Routed
        In the type of sums. Equal keys go to the lower expert, and -0 equals 0. Without bias and groups the logits
        themselves are compared, so scores that round to the same number are still told apart.

    Raises
    ------
    ValueError
        Shapes that do not fit, or a logit that is not finite, with the first row that has one.
    TypeError
        Element types other than those above.
    """
    if is_cupy(logits):
        return _read(logits, _gpu().forward(logits, top_k, rule))
    experts = np.empty((len(logits), top_k), np.int32)
    return _forward(logits, rule, experts, given=False)


def weights(logits: Array, experts: npt.NDArray[np.int32], rule: Rule) -> Routed:
    """The weights of experts that somebody else has chosen: `experts` (T, k) has -1 in empty slots."""
    if is_cupy(logits):
        return _read(logits, _gpu().weights(logits, experts, rule))
    return _forward(logits, rule, np.ascontiguousarray(experts, np.int32), given=True)


def _forward(logits: Array, rule: Rule, experts: npt.NDArray[np.int32], given: bool) -> Routed:
    dtype = sum_type(logits.dtype)
    tokens, slots = experts.shape
    found, log_sum = np.empty((tokens, slots), dtype), np.empty(tokens, dtype)
    totals = _call(logits, slots, rule, experts, given, found, log_sum, None)
    return Routed(experts, found, log_sum, totals, (experts, found))


def scores(logits: Array, rule: Rule) -> tuple[Array, Totals]:
    """The scores (T, E) of all experts, in the type of sums; nothing is chosen."""
    if is_cupy(logits):
        found, device_totals = _gpu().scores(logits, rule)
        return found, _read_totals(logits, device_totals)[0]
    dtype = sum_type(logits.dtype)
    found, log_sum = np.empty(logits.shape, dtype), np.empty(len(logits), dtype)
    return found, _call(logits, 0, rule, None, False, None, log_sum, found)


def _call(
    logits: Array, top_k: int, rule: Rule, chosen: Any, given: bool, found: Array, log_sum: Array, all_scores: Array
) -> Totals:
    n_experts = logits.shape[-1]
    choices, probabilities = np.empty((top_k, n_experts), np.int64), np.empty(n_experts, np.int64)
    invalid, *squares = _cpu.routing_forward(
        _rows(logits), top_k, rule._packed(logits.dtype), chosen, given, found, log_sum, all_scores, choices,
        probabilities,
    )  # fmt: skip
    if invalid >= 0:
        _raise_invalid(logits, invalid)
    return Totals(choices, probabilities, np.array(squares, np.int64))


def _gpu() -> Any:
    """The kernels for CuPy arrays; an ImportError says why where there are none."""
    from fivedp.kernels.cuda import routing

    return routing


def _read(logits: Array, routed: Any) -> Routed:
    totals, (experts, found) = _read_totals(logits, routed.totals, routed.experts, routed.weights)
    return Routed(routed.experts, routed.weights, routed.log_sum, totals, (experts, found))


def _read_totals(logits: Array, device_totals: Any, *beside: Array) -> tuple[Totals, list[Array]]:
    invalid, unknown, totals, others = device_totals.read(*beside)
    if invalid >= 0:
        _raise_invalid(logits, invalid)
    if unknown >= 0:
        raise ValueError(
            f"routing: row {unknown} of `experts` has an expert that there is not; -1 to {logits.shape[1] - 1} would "
            "be right"
        )
    return Totals(*totals), others


def _raise_invalid(logits: Array, row: int) -> NoReturn:
    values = (logits[row].get() if is_cupy(logits) else logits[row]).astype(np.float64)
    expert = int(np.flatnonzero(~np.isfinite(values))[0])
    raise ValueError(f"row {row} of `logits` has {values[expert]} for expert {expert}; expected finite numbers")


def backward(
    d_weights: Array,
    logits: Array,
    rule: Rule,
    chosen: npt.NDArray[np.int32],
    kept: npt.NDArray[np.int32],
    log_sum: Array,
    balance: Array | None = None,
    z_factor: float = 0.0,
) -> Array:
    """The gradient of the logits, (T, E) in the type of sums.

    Parameters
    ----------
    d_weights : (T, k)
        The gradient of the weights.
    logits, rule
        As in `forward`.
    chosen, log_sum
        As `forward` gave them.
    kept : int32 (T, k)
        -1 where the pair was dropped after weights were normalised: its weight is 0, its d_weights is not read.
    balance : (E,), optional
        The derivative of the balance loss by the probabilities of a token, without that of the counts.
    z_factor : float
        The z-loss is z_factor / 2 times the sum over tokens of log_sum^2.
    """
    if is_cupy(logits):
        return _gpu().backward(d_weights, logits, rule, chosen, kept, log_sum, balance, z_factor)
    dtype = sum_type(logits.dtype)
    d_logits = np.empty(logits.shape, dtype)
    _cpu.routing_backward(
        np.ascontiguousarray(d_weights, dtype), _rows(logits), rule._packed(logits.dtype),
        np.ascontiguousarray(chosen, np.int32), np.ascontiguousarray(kept, np.int32),
        np.ascontiguousarray(log_sum, dtype), None if balance is None else np.ascontiguousarray(balance, dtype),
        float(z_factor), d_logits,
    )  # fmt: skip
    return d_logits


def drop_by_position(chosen: npt.NDArray[np.int32], before: Integers, capacity: int) -> npt.NDArray[np.int32]:
    """`chosen` (T, k), with -1 where an expert has had `capacity` tokens before.

    Parameters
    ----------
    chosen : int32 (T, k)
    before : int64 (k, E)
        How many pairs of this slot and expert come before the first one here: all those of lower slots, and those of
        the same slot of earlier tokens that are elsewhere.
    capacity : int
    """
    if is_cupy(chosen):
        return _gpu().drop_by_position(chosen, before, capacity)  # type: ignore[no-any-return]
    kept = np.empty(chosen.shape, np.int32)
    _cpu.routing_drop(np.ascontiguousarray(chosen), capacity, np.array(before, np.int64), kept)
    return kept


def _rows(logits: Array) -> Array:
    """The logits as the extension takes them: rows contiguous, bfloat16 as its bits."""
    if logits.ndim == 2 and logits.shape[1] > 1 and logits.strides[1] != logits.itemsize:
        logits = np.ascontiguousarray(logits)
    return raw(logits, "routing: logits")
