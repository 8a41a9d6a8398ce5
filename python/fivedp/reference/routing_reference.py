"""Routing in float64, one step after the other, all tokens on one rank: the oracle of kernels and ranks.

Choices are made token by token with a plain sort, drops by walking over the pairs in their order. Gradients come from
finite differences of `smooth_loss`, in which choices are fixed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fivedp.kernels.routing import Rule

Array = NDArray[Any]
EPSILON = 1e-20


def softmax(z: Array) -> Array:
    """Of the last dimension."""
    power = np.exp(z - z.max(-1, keepdims=True))
    return np.asarray(power / power.sum(-1, keepdims=True))


def log_sum_exp(z: Array) -> Array:
    """Of the last dimension."""
    highest = z.max(-1, keepdims=True)
    return np.asarray(highest[..., 0] + np.log(np.exp(z - highest).sum(-1)))


def scores(logits: Array, rule: Rule) -> Array:
    """(T, E): what experts are weighed by."""
    z = logits.astype(np.float64)
    if not rule.sigmoid:
        return softmax(z)
    power = np.exp(-abs(z))
    return np.asarray(np.where(z >= 0, 1, power) / (1 + power))


def probabilities(logits: Array, rule: Rule) -> Array:
    """(T, E): what the balance loss takes for a token's probabilities."""
    s = scores(logits, rule)
    return np.asarray(s / (s.sum(-1, keepdims=True) + EPSILON)) if rule.sigmoid else s


def keys(logits: Array, rule: Rule) -> Array:
    """(T, E): what the choice compares; -inf for experts out of reach."""
    if rule.bias is None and rule.groups[0] == 1:
        return logits.astype(np.float64)
    found = scores(logits, rule) + (0 if rule.bias is None else rule.bias.astype(np.float64))
    n_groups, top_groups = rule.groups
    if n_groups > 1:
        grouped = found.reshape(len(found), n_groups, -1)
        of_group = np.sort(grouped, axis=-1)[..., -2:].sum(-1)
        best = np.argsort(-of_group, axis=-1, kind="stable")[:, :top_groups]
        reached = np.zeros((len(found), n_groups), bool)
        np.put_along_axis(reached, best, True, axis=1)
        outside = 0.0 if rule.zero_mask else -np.inf
        found = np.where(reached[..., None], grouped, outside).reshape(found.shape)
    return found


def choose(logits: Array, top_k: int, rule: Rule) -> Array:
    """(T, k): the experts with the highest keys, equal ones by number."""
    return np.argsort(-keys(logits, rule), axis=-1, kind="stable")[:, :top_k].astype(np.int32)


def weights(logits: Array, experts: Array, rule: Rule) -> Array:
    """(T, k): the weights of chosen experts, 0 in empty slots."""
    s = np.take_along_axis(scores(logits, rule), np.maximum(experts, 0), axis=1) * (experts >= 0)
    if rule.normalize:
        total = s.sum(-1, keepdims=True)
        s = s / (total + EPSILON) if rule.sigmoid else s / np.where(total > 0, total, 1)
    return np.asarray(rule.scale * s)


def balance_loss(logits: Array, counts: Array, divisor: float, rule: Rule) -> float:
    """E sum_e counts_e / divisor * (mean probability of e)."""
    return float(logits.shape[1] * (counts / divisor * probabilities(logits, rule).mean(0)).sum())


def z_loss(logits: Array) -> float:
    """The mean square of the log of the sum of exponentials."""
    return float((log_sum_exp(logits.astype(np.float64)) ** 2).mean())


def keep_by_position(experts: Array, capacity: int, n_experts: int) -> Array:
    """The experts with -1 where one has had its tokens: slot after slot, in each token after token."""
    kept, taken = np.full_like(experts, -1), np.zeros(n_experts, int)
    for slot in range(experts.shape[1]):
        for token in range(len(experts)):
            expert = experts[token, slot]
            if expert >= 0 and taken[expert] < capacity:
                kept[token, slot] = expert
                taken[expert] += 1
    return kept


def keep_by_score(experts: Array, score: Array, capacity: int, n_experts: int) -> Array:
    """The experts with -1 for all but the highest scores of each, ties to the lower token."""
    kept = np.full_like(experts, -1)
    for expert in range(n_experts):
        tokens, slots = np.nonzero(experts == expert)
        order = np.argsort(-score[tokens, slots], kind="stable")[:capacity]
        kept[tokens[order], slots[order]] = expert
    return kept


def experts_choose(score: Array, capacity: int) -> Array:
    """(T, E) bool: the tokens that each expert takes."""
    taken = np.zeros(score.shape, bool)
    for expert in range(score.shape[1]):
        taken[np.argsort(-score[:, expert], kind="stable")[:capacity], expert] = True
    return taken


def smooth_loss(
    logits: Array, rule: Rule, chosen: Array, d_weights: Array, balance: tuple[Array, float, float], d_z_loss: float
) -> float:
    """What the gradient is tested on: weights times `d_weights`, and the losses times their factors; choices are fixed.

    `balance` is (counts, divisor, d_aux_loss).
    """
    counts, divisor, d_aux_loss = balance
    total = float((weights(logits, chosen, rule) * d_weights).sum())
    return total + d_aux_loss * balance_loss(logits, counts, divisor, rule) + d_z_loss * z_loss(logits)
