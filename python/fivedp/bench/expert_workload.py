"""Logits that make a router choose as a workload says: evenly, by Zipf's law, or the same experts for every token.

An expert has a popularity p_e; a token's experts in the order of log p_e plus a Gumbel deviate are a draw without
replacement from p (Gumbel-top-k, Kool et al. 2019). The logits only keep that order, in equal steps that differ from
token to token, so that they are exact in bfloat16 and never tie. A layer multiplies its tokens with a router, so the
logits are put into the tokens' first E features, and the router picks these up: every program that is measured, in any
order of sums and any type, routes the same. Only NumPy is needed here: a program that is compared takes this file
without fivedp.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

WORKLOADS = ("uniform", "zipf", "one_expert")
EXPONENT = 1.1  # of Zipf's law; the most popular experts have the lowest numbers, so they are neighbours on rank 0
_STEPS = np.array([0.125, 0.25, 0.5], np.float32)
_FARTHEST = 255  # a product of a step and so many of them still has 8 bits; later experts tie, far from being chosen


def popularity(workload: str, n_experts: int) -> NDArray[np.float64]:
    """The probability of each expert to be a token's first.

    Raises
    ------
    ValueError
        Where there is no such workload.
    """
    if workload not in WORKLOADS:
        raise ValueError(f"workload {workload!r} is not one of {', '.join(WORKLOADS)}")
    weights: NDArray[np.float64] = np.ones(n_experts)
    if workload == "zipf":
        weights = np.arange(1, n_experts + 1, dtype=np.float64) ** -EXPONENT
    if workload == "one_expert":
        weights[1:] = 0
    shares: NDArray[np.float64] = weights / weights.sum()
    return shares


def logits(workload: str, draws: NDArray[np.float32]) -> NDArray[np.float32]:
    """The logits (n, E) of some tokens, from uniform numbers (n, E) in [-1, 1) that are the tokens' own."""
    n_tokens, n_experts = draws.shape
    uniform = np.clip((draws.astype(np.float64) + 1) / 2, 2.0**-25, 1 - 2.0**-25)
    if workload == "one_expert":  # expert 0, and the next ones where a token takes more
        scores = np.broadcast_to(-np.arange(n_experts, dtype=np.float64), draws.shape)
    else:
        scores = np.log(popularity(workload, n_experts)) - np.log(-np.log(uniform))
    places = np.empty((n_tokens, n_experts), np.int64)
    np.put_along_axis(places, np.argsort(-scores, axis=1, kind="stable"), np.arange(n_experts)[None], axis=1)
    steps = _STEPS[(uniform[:, :1] * 2**20).astype(np.int64) % len(_STEPS)]
    found: NDArray[np.float32] = -steps * np.minimum(places, _FARTHEST).astype(np.float32)
    return found


def choices(values: NDArray[np.float32], top_k: int) -> NDArray[np.int32]:
    """The experts (n, k) of the largest logits, the largest first."""
    return np.argsort(-values, axis=1, kind="stable")[:, :top_k].astype(np.int32)


def factor(n_experts: int) -> float:
    """By what the router multiplies the features it picks: a power of two that keeps them about as large as others."""
    return float(2 ** max(0, math.ceil(math.log2(n_experts / 4))))


def put_logits(x: NDArray[Any], values: NDArray[np.float32]) -> None:
    """Write logits into the first features of the tokens x (n, H)."""
    n_experts = values.shape[1]
    x[:, :n_experts] = (values / np.float32(factor(n_experts))).astype(x.dtype)


def router(width: int, n_experts: int, dtype: np.dtype[Any]) -> NDArray[Any]:
    """The router (H, E) that picks the logits up; needs H >= E."""
    weights = np.zeros((width, n_experts), dtype)
    np.fill_diagonal(weights, np.asarray(factor(n_experts), dtype))
    return weights


def weight_scale(features_in: int) -> float:
    """A power of two that gives products of uniform numbers in [-1, 1) with so many terms a deviation of about 1."""
    return float(2 ** -round(math.log2(math.sqrt(features_in) / 3)))
