"""Attention in float64 with all logits stored: the oracle for small inputs, one rank, any mask."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fivedp.kernels.attention import Mask

Array = NDArray[Any]


class Attention(NamedTuple):
    """The output (B, S, H, Dv), the log of the sum of exp(logit) (B, H, S), and the weights (B, H, S, S_k)."""

    out: Array
    lse: Array
    weights: Array


def seen(mask: Mask) -> Array:
    """(queries, keys): whether a query sees a key."""
    i, j = mask.q_position.astype(np.int64)[:, None], mask.k_position.astype(np.int64)[None, :]
    result = np.ones((len(mask.q_position), len(mask.k_position)), bool)
    if mask.q_document is not None and mask.k_document is not None:
        result &= mask.q_document[:, None] == mask.k_document[None, :]
    if mask.causal:
        result &= j <= i
    if mask.window:
        result &= i - j < mask.window
        if not mask.causal:
            result &= j - i < mask.window
    return result


def _heads(x: Array, group: int) -> Array:
    """(B, S, H_kv, D) to (B, H, S, D) in float64, each head `group` times."""
    return np.repeat(x.astype(np.float64).transpose(0, 2, 1, 3), group, axis=1)


def _logits(q: Array, k: Array, mask: Mask) -> tuple[Array, Array]:
    """The logits before and after softcap and slopes, masked ones -inf in the second."""
    group = q.shape[2] // k.shape[2]
    with np.errstate(invalid="ignore", over="ignore"):
        x = mask.scale * np.einsum("bhid,bhjd->bhij", _heads(q, 1), _heads(k, group))
        y = mask.softcap * np.tanh(x / mask.softcap) if mask.softcap else x
    if mask.slopes is not None:
        apart = np.abs(mask.q_position.astype(np.float64)[:, None] - mask.k_position[None, :])
        y = y - np.asarray(mask.slopes, np.float64)[None, :, None, None] * apart
    return x, np.where(seen(mask), y, -np.inf)


def attention(q: Array, k: Array, v: Array, mask: Mask) -> Attention:
    """Attention as `fivedp.kernels.attention` defines it, in float64."""
    group = q.shape[2] // k.shape[2]
    _, logits = _logits(q, k, mask)
    top = np.max(logits, axis=-1, initial=-np.inf)
    safe = np.where(np.isneginf(top), 0.0, top)
    weights = np.exp(logits - safe[..., None])
    total = weights.sum(axis=-1)
    weights = weights / np.where(total == 0, 1.0, total)[..., None]
    with np.errstate(divide="ignore"):
        lse = safe + np.log(total)
    # A masked value may be NaN: it is not multiplied, not even by zero.
    values = np.where(np.isfinite(_heads(v, group)), _heads(v, group), 0.0)
    out = np.einsum("bhij,bhjd->bhid", weights, values)
    return Attention(out.transpose(0, 2, 1, 3), lse, weights)


def attention_backward(
    d_out: Array, q: Array, k: Array, v: Array, mask: Mask, d_lse: Array | None = None
) -> tuple[Array, Array, Array]:
    """The gradients of q, k and v in float64, for finite inputs."""
    group = q.shape[2] // k.shape[2]
    x, _ = _logits(q, k, mask)
    weights = attention(q, k, v, mask).weights
    gradient = _heads(d_out, 1)
    d_weights = np.einsum("bhid,bhjd->bhij", gradient, _heads(v, group))
    share = (weights * d_weights).sum(axis=-1, keepdims=True)
    if d_lse is not None:
        share = share - d_lse.astype(np.float64)[..., None]
    d_logits = weights * (d_weights - share)
    if mask.softcap:
        d_logits = d_logits * (1 - np.tanh(x / mask.softcap) ** 2)
    d_logits = mask.scale * d_logits
    d_q = np.einsum("bhij,bhjd->bihd", d_logits, _heads(k, group))

    def shared(d: Array) -> Array:
        batch, heads, keys, size = d.shape
        summed: Array = d.reshape(batch, heads // group, group, keys, size).sum(axis=2)
        return summed.transpose(0, 2, 1, 3)

    d_k = shared(np.einsum("bhij,bhid->bhjd", d_logits, _heads(q, 1)))
    d_v = shared(np.einsum("bhij,bhid->bhjd", weights, gradient))
    return d_q, d_k, d_v
