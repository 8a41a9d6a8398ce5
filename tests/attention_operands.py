"""Attention's inputs, its kernel in one call, a plain computation in the same type, and the bound of the error.

The bound: with u the rounding of the type of sums, an element whose sum of sizes is `size` may be off by

    2 * (the largest error/size of the plain computation) * size + ULPS * u * size

`size` is the sum that makes the element, of absolute values, each term times what a relative error u of everything that
goes into its weight can make of it: exp turns an error u * |logit| of its argument into a relative one of the weight.
So it is not nought where the element is nought by chance, and grows where the problem is ill-conditioned.

Where the kernel multiplies pairs of bfloat16, the weights and the derivatives of the logits are rounded to bfloat16 as
they become factors of a product: the plain computation does so too, and 2^-9 * size, what such a rounding may cost at
most, comes on top.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np

from fivedp.kernels import attention as kernel
from fivedp.kernels import gemm
from fivedp.kernels.attention import Mask
from fivedp.reference import attention_reference as oracle

Array = Any
BF16 = np.dtype(ml_dtypes.bfloat16)

ULPS = 8  # scale, its product with q, the product, exp2, the sums and the division round once each


@dataclass(frozen=True)
class Case:
    q: Array
    k: Array
    v: Array
    d_out: Array
    mask: Mask

    @property
    def wide(self) -> Case:
        """The same with q, k, v and d_out in the type of sums."""
        to = kernel.sum_type(self.q.dtype)
        return Case(self.q.astype(to), self.k.astype(to), self.v.astype(to), self.d_out.astype(to), self.mask)


def in_pairs(dtype: Any) -> bool:
    """Whether products of this type are products of pairs of bfloat16."""
    return dtype == BF16 and "bf16" in gemm.isa()


def as_factor(x: Array, narrow: Case) -> Array:
    """Numbers of the type of sums as a product with the arrays of a case takes them."""
    return x.astype(BF16).astype(x.dtype) if in_pairs(narrow.q.dtype) else x


def places(n: int, begin: int = 0) -> Array:
    return np.arange(begin, begin + n, dtype=np.int32)


def draw_places(rng: np.random.Generator, queries: int, keys: int, order: str) -> tuple[Array, Array]:
    """Positions of queries and keys: the end of one sequence, or any, in order or not."""
    if order == "sequence":
        return places(queries, max(0, keys - queries)), places(keys)
    high = max(1, queries + keys)
    q, k = (rng.integers(0, high, n).astype(np.int32) for n in (queries, keys))
    return (np.sort(q), np.sort(k)) if order == "sorted" else (q, k)


def draw_case(
    rng: np.random.Generator,
    dtype: Any,
    *,
    batch: int = 1,
    kv_heads: int = 1,
    group: int = 1,
    queries: int = 9,
    keys: int = 11,
    size: int = 8,
    v_size: int = 8,
    causal: bool = False,
    window: int = 0,
    softcap: float = 0.0,
    slopes: bool = False,
    documents: int = 0,
    order: str = "sequence",
) -> Case:
    """Normal inputs, the scale of most models; `documents` is how many there are, 0 for no documents."""
    heads = kv_heads * group
    shapes = [
        (batch, queries, heads, size), (batch, keys, kv_heads, size),
        (batch, keys, kv_heads, v_size), (batch, queries, heads, v_size),
    ]  # fmt: skip
    q_position, k_position = draw_places(rng, queries, keys, order)
    mask = Mask(q_position, k_position, scale=size**-0.5, causal=causal, window=window, softcap=softcap)
    if documents:
        q_document, k_document = (rng.integers(0, documents, n).astype(np.int32) for n in (queries, keys))
        if order != "random":
            q_document.sort()
            k_document.sort()
        mask = replace(mask, q_document=q_document, k_document=k_document)
    if slopes:
        mask = replace(mask, slopes=[float(2.0 ** -rng.uniform(0, 8)) for _ in range(heads)])
    return Case(*[rng.standard_normal(shape).astype(dtype) for shape in shapes], mask)


def part(mask: Mask, queries: slice = slice(None), keys: slice = slice(None)) -> Mask:
    """The mask of some queries and keys."""
    return replace(
        mask,
        q_position=mask.q_position[queries],
        k_position=mask.k_position[keys],
        q_document=None if mask.q_document is None else mask.q_document[queries],
        k_document=None if mask.k_document is None else mask.k_document[keys],
    )


def pieces(borders: list[int]) -> list[slice]:
    return [slice(begin, end) for begin, end in itertools.pairwise(borders)]


def forward(case: Case, borders: list[int] | None = None) -> tuple[Array, Array]:
    """The kernel's output and lse, the keys given piece by piece."""
    state = kernel.empty_state(case.q, case.v.shape[-1])
    for keys in pieces(borders or [0, case.k.shape[1]]):
        kernel.forward(case.q, case.k[:, keys], case.v[:, keys], part(case.mask, keys=keys), state)
    out = np.full((*case.q.shape[:3], case.v.shape[-1]), np.nan, case.q.dtype)
    return out, kernel.finish(state, out)


def backward(
    case: Case, lse: Array, delta: Array, q_borders: list[int] | None = None, k_borders: list[int] | None = None
) -> tuple[Array, Array, Array]:
    """The kernel's gradients, queries and keys given piece by piece, each in rising order."""
    dtype = kernel.sum_type(case.q.dtype)
    d_q, d_k, d_v = (np.zeros(x.shape, dtype) for x in (case.q, case.k, case.v))
    for keys in pieces(k_borders or [0, case.k.shape[1]]):
        k_part, v_part = (np.ascontiguousarray(d[:, keys]) for d in (d_k, d_v))
        for rows in pieces(q_borders or [0, case.q.shape[1]]):
            q_part = np.ascontiguousarray(d_q[:, rows])
            kernel.backward(
                case.d_out[:, rows], case.q[:, rows], case.k[:, keys], case.v[:, keys], part(case.mask, rows, keys),
                np.ascontiguousarray(lse[..., rows]), np.ascontiguousarray(delta[..., rows]), q_part, k_part, v_part,
            )  # fmt: skip
            d_q[:, rows] = q_part
        d_k[:, keys], d_v[:, keys] = k_part, v_part
    return d_q, d_k, d_v


def gradients(case: Case) -> tuple[Array, Array, Array]:
    """Forward and backward of the kernel, as a training step calls them."""
    out, lse = forward(case)
    return backward(case, lse, kernel.delta(case.d_out, out))


def _heads(x: Array, group: int = 1) -> Array:
    return np.repeat(np.ascontiguousarray(x.transpose(0, 2, 1, 3)), group, axis=1)


def _tokens(x: Array, group: int = 1) -> Array:
    batch, heads, tokens, size = x.shape
    return x.reshape(batch, heads // group, group, tokens, size).sum(axis=2).transpose(0, 2, 1, 3)


def _apart(mask: Mask, dtype: Any) -> Array:
    """slope * |i - j|, (H, S, S_k)."""
    apart = np.abs(mask.q_position.astype(np.int64)[:, None] - mask.k_position).astype(dtype)
    return np.asarray(mask.slopes, dtype)[:, None, None] * apart


def _plain_logits(case: Case) -> tuple[Array, Array]:
    """The logits and the derivative of each to q . k, in the type of the case."""
    mask, dtype = case.mask, case.q.dtype.type
    x = np.matmul(_heads(case.q), _heads(case.k, case.q.shape[2] // case.k.shape[2]).swapaxes(-1, -2))
    x = x * dtype(mask.scale)
    slope = np.full(x.shape, mask.scale, dtype)
    if mask.softcap:
        bent = np.tanh(x / dtype(mask.softcap))
        x, slope = dtype(mask.softcap) * bent, slope * (1 - bent * bent)
    if mask.slopes is not None:
        x = x - _apart(mask, dtype)
    return np.where(oracle.seen(mask), x, dtype(-np.inf)), slope


def plain_sums(narrow: Case) -> tuple[Array, Array]:
    """Output and lse as NumPy makes them of the formula in the type of sums."""
    case = narrow.wide
    logits, _ = _plain_logits(case)
    top = logits.max(axis=-1, initial=-np.inf)
    safe = np.where(np.isneginf(top), 0, top)
    weights = np.exp(logits - safe[..., None])
    total = weights.sum(axis=-1)
    out = np.matmul(as_factor(weights, narrow), _heads(case.v, case.q.shape[2] // case.k.shape[2]))
    out = out / np.where(total == 0, 1, total)[..., None]
    with np.errstate(divide="ignore"):
        return _tokens(out), safe + np.log(total)


def plain_forward(narrow: Case) -> tuple[Array, Array]:
    """The same, the output rounded once at the end."""
    out, lse = plain_sums(narrow)
    return out.astype(narrow.q.dtype), lse


def plain_backward(narrow: Case, lse: Array, delta: Array) -> tuple[Array, Array, Array]:
    """What NumPy makes of the formula in the type of sums."""
    case = narrow.wide
    group = case.q.shape[2] // case.k.shape[2]
    logits, slope = _plain_logits(case)
    weights = np.exp(logits - np.where(np.isneginf(lse), np.inf, lse)[..., None])
    gradient = _heads(case.d_out)
    d_weights = np.matmul(gradient, _heads(case.v, group).swapaxes(-1, -2))
    d_logits = as_factor(weights * (d_weights - delta[..., None]) * slope, narrow)
    weights = as_factor(weights, narrow)
    d_q = np.matmul(d_logits, _heads(case.k, group))
    d_k = np.matmul(d_logits.swapaxes(-1, -2), _heads(case.q))
    d_v = np.matmul(weights.swapaxes(-1, -2), gradient)
    return _tokens(d_q), _tokens(d_k, group), _tokens(d_v, group)


def sizes(
    narrow: Case, right: oracle.Attention, d_lse: Array | None = None, *, from_output: bool = False
) -> dict[str, Array]:
    """The sums of sizes that the bound is relative to, in float64, from what the oracle makes of the case.

    `from_output` says that delta is made from the output, whose error is then in the gradients.
    """
    case = Case(*(x.astype(np.float64) for x in (narrow.q, narrow.k, narrow.v, narrow.d_out)), narrow.mask)
    mask, group = case.mask, case.q.shape[2] // case.k.shape[2]
    type_of_sums = np.finfo(kernel.sum_type(narrow.q.dtype))
    # A weight below the smallest normal number may be 0: an error of u relative to this one at most.
    weights = np.where(oracle.seen(mask), right.weights + 2 * type_of_sums.tiny / type_of_sums.eps, 0)
    q, k, v, d_out = (
        abs(_heads(case.q)),
        abs(_heads(case.k, group)),
        abs(_heads(case.v, group)),
        abs(_heads(case.d_out)),
    )
    logit = 1 + abs(mask.scale) * np.matmul(q, k.swapaxes(-1, -2))
    if mask.slopes is not None:
        logit = logit + _apart(mask, np.float64)
    row = (weights * logit).sum(axis=-1, keepdims=True)
    lse_size = row[..., 0] + np.where(np.isneginf(right.lse), 0, abs(right.lse))
    spread = weights * (logit + lse_size[..., None])  # the error of a weight made from lse
    d_weights = np.matmul(d_out, v.swapaxes(-1, -2))
    share = (weights * d_weights).sum(axis=-1, keepdims=True)
    if d_lse is not None:
        share = share + abs(d_lse.astype(np.float64))[..., None]
    d_logits = spread * (d_weights + share)
    if from_output:
        d_logits = d_logits + weights * (weights * (logit + row) * d_weights).sum(axis=-1, keepdims=True)
    d_logits = abs(mask.scale) * d_logits
    return {
        "out": _tokens(np.matmul(weights * (logit + row), v)),
        "lse": lse_size,
        "d_q": _tokens(np.matmul(d_logits, k)),
        "d_k": _tokens(np.matmul(d_logits.swapaxes(-1, -2), q), group),
        "d_v": _tokens(np.matmul(spread.swapaxes(-1, -2), d_out), group),
    }


def factor_sums(case: Case) -> dict[str, Array]:
    """What an error of 1 in every weight, and in every derivative of a logit, can make of each sum."""
    wide, group = case.wide, case.q.shape[2] // case.k.shape[2]
    seen, scale = oracle.seen(case.mask).astype(np.float64), abs(case.mask.scale)
    q, k, v, d_out = (
        abs(_heads(wide.q)),
        abs(_heads(wide.k, group)),
        abs(_heads(wide.v, group)),
        abs(_heads(wide.d_out)),
    )
    return {
        "out": _tokens(np.matmul(seen, v)),
        "d_q": scale * _tokens(np.matmul(seen, k)),
        "d_k": scale * _tokens(np.matmul(seen.T, q), group),
        "d_v": _tokens(np.matmul(seen.T, d_out), group),
    }


def assert_as_exact(name: str, result: Array, plain: Array, right: Array, size: Array, allowance: float) -> None:
    """The rule of the head of this file; the infinities of `right` must be met."""
    assert result.shape == right.shape
    result, plain = result.astype(np.float64), plain.astype(np.float64)
    finite = np.isfinite(right)
    assert np.array_equal(result[~finite], right[~finite]), name
    result, plain, right, size = (x[finite] for x in (result, plain, right, size))
    assert np.isfinite(result).all(), name
    nought = size == 0
    assert not result[nought].any(), f"{name}: not 0 where nothing is summed"
    if nought.all():
        return
    error, usual = ((abs(x - right) / np.where(nought, 1, size)).max() for x in (result, plain))
    assert error <= 2 * usual + allowance, f"{name}: {error:.3g}, plain {usual:.3g}"


def check_values(case: Case, borders: list[int] | None = None) -> None:
    """Forward and backward of a case against the oracle; backward from the oracle's lse and delta, rounded."""
    q, k, v, d_out, mask = case.q, case.k, case.v, case.d_out, case.mask
    right = oracle.attention(q, k, v, mask)
    size = sizes(case, right)
    to = kernel.sum_type(q.dtype)
    # The oracle is itself in float64: there its own error may come on top.
    allowance = ULPS * (2.0**-24 if to == np.float32 else 2 * 2.0**-53)

    found, usual = forward(case, borders), plain_forward(case)
    once_more = 2.0**-9 if q.dtype == BF16 else 0.0
    of_factors = 2.0**-9 if in_pairs(q.dtype) else 0.0
    assert found[0].dtype == q.dtype
    assert_as_exact("out", found[0], usual[0], right.out, size["out"], allowance + once_more + of_factors)
    assert_as_exact("lse", found[1], usual[1], right.lse, size["lse"], allowance)

    lse = right.lse.astype(to)
    delta = (d_out.astype(np.float64) * right.out).sum(axis=-1).transpose(0, 2, 1).astype(to)
    rights = oracle.attention_backward(d_out, q, k, v, mask)
    results, usuals = backward(case, lse, delta, k_borders=borders), plain_backward(case, lse, delta)
    for name, found_d, usual_d, right_d in zip(("d_q", "d_k", "d_v"), results, usuals, rights, strict=True):
        assert_as_exact(name, found_d, usual_d, right_d, size[name], allowance + of_factors)


def check_step(
    case: Case,
    found: Sequence[Array],
    d_lse: Array,
    rows: Array | None = None,
    keys: Array | None = None,
    roundings: int = 0,
) -> None:
    """Output and lse, and the three gradients where there are any, the backward made from its own output.

    `rows` and `keys` choose the queries and the keys that are judged, all of them by default; `roundings` is how many
    more sums an element is made of than in one computation of the whole.
    """
    right = oracle.attention(case.q, case.k, case.v, case.mask)
    size = sizes(case, right, d_lse, from_output=True)
    to = kernel.sum_type(case.q.dtype)
    plain, rights = list(plain_forward(case)), [right.out, right.lse]
    if len(found) > 2:
        delta = (case.d_out.astype(to) * plain[0].astype(to)).sum(axis=-1).transpose(0, 2, 1) - d_lse.astype(to)
        plain += [d.astype(case.q.dtype) for d in plain_backward(case, plain[1], delta)]
        rights += oracle.attention_backward(case.d_out, case.q, case.k, case.v, case.mask, d_lse)
    allowance = (ULPS + roundings) * (2.0**-24 if to == np.float32 else 2 * 2.0**-53)
    # The output in 16 bits is rounded once; a gradient itself, and by way of the output that delta is made of.
    narrow = {"out": 1, "lse": 0, "d_q": 2, "d_k": 2, "d_v": 2}
    if in_pairs(case.q.dtype):  # and so are the factors: the weights, and in a gradient d_logits and what made delta
        narrow = {"out": 2, "lse": 0, "d_q": 4, "d_k": 4, "d_v": 4}
    for (name, times), x, usual, exact in zip(narrow.items(), found, plain, rights, strict=False):
        chosen = keys if name in ("d_k", "d_v") else rows
        axis = 2 if name == "lse" else 1
        parts = [y if chosen is None else np.compress(chosen, y, axis=axis) for y in (x, usual, exact, size[name])]
        assert x.dtype == (to if name == "lse" else case.q.dtype), name
        assert_as_exact(name, *parts, allowance + (times * 2.0**-9 if case.q.dtype == BF16 else 0.0))
