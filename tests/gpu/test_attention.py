"""Attention on the GPU against float64, by the rule of tests/attention_operands.py.

The sums of a row come in tiles and in pairs of lanes, never more than on the CPU; products of 16-bit numbers are exact
in float32. Weights, and the derivatives of logits, are rounded to the 16 bits of the inputs as factors, which may cost
half a unit of each.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import attention_operands as operands
import ml_dtypes
import numpy as np
import pytest

from fivedp.kernels.attention import Mask, State
from fivedp.kernels.cuda import attention as kernel
from fivedp.reference import attention_reference as oracle

Array = Any
BF16 = np.dtype(ml_dtypes.bfloat16)
TYPES = {"bfloat16": BF16, "float16": np.dtype(np.float16), "float32": np.dtype(np.float32), "float64": np.dtype(np.float64)}
HALF_UNITS = {BF16: 2.0**-9, np.dtype(np.float16): 2.0**-12, np.dtype(np.float32): 0.0, np.dtype(np.float64): 0.0}
SMALLEST = {np.dtype(np.float16): 2.0**-25}  # half of what float16 tells apart near 0
GUARD = 96


class Guarded:
    """Arrays that lie between others of which not an element may change."""

    def __init__(self, xp: Any) -> None:
        self.xp, self.zones = xp, []

    def like(self, x: Array) -> Array:
        """A contiguous copy of `x` on the device."""
        room = self.xp.full(x.size + 2 * GUARD, 77, x.dtype)
        room[GUARD : GUARD + x.size] = self.xp.asarray(np.ascontiguousarray(x).reshape(-1))
        self.zones.append((room, x.size))
        return room[GUARD : GUARD + x.size].reshape(x.shape)

    def state(self, q: Array, v_size: int) -> State:
        empty = kernel.empty_state(q, v_size)
        return State(*(self.like(np.asarray(x)) for x in (empty.highest, empty.total, empty.output)))

    def check(self) -> None:
        for room, size in self.zones:
            assert bool((room[:GUARD] == 77).all()) and bool((room[GUARD + size :] == 77).all())


def forward(xp: Any, host: Any, case: operands.Case, borders: list[int] | None = None) -> tuple[Array, Array]:
    """Output and lse, the keys given piece by piece."""
    guarded = Guarded(xp)
    q, k, v = (xp.asarray(x) for x in (case.q, case.k, case.v))
    state = guarded.state(q, case.v.shape[-1])
    for keys in operands.pieces(borders or [0, case.k.shape[1]]):
        kernel.forward(q, k[:, keys], v[:, keys], operands.part(case.mask, keys=keys), state)
    out = guarded.like(np.full((*case.q.shape[:3], case.v.shape[-1]), np.nan, case.q.dtype))
    lse = kernel.finish(state, out)
    guarded.check()
    return host(out), host(lse)


def backward(
    xp: Any,
    host: Any,
    case: operands.Case,
    lse: Array,
    delta: Array,
    q_borders: list[int] | None = None,
    k_borders: list[int] | None = None,
) -> tuple[Array, ...]:
    """The gradients, queries and keys given piece by piece; they begin as ones, which are taken off again."""
    guarded = Guarded(xp)
    d_out, q, k, v = (xp.asarray(x) for x in (case.d_out, case.q, case.k, case.v))
    dtype = kernel.sum_type(case.q.dtype)
    d_q, d_k, d_v = (np.zeros(x.shape, dtype) for x in (case.q, case.k, case.v))
    for keys in operands.pieces(k_borders or [0, case.k.shape[1]]):
        k_part, v_part = (guarded.like(d[:, keys]) for d in (d_k, d_v))
        for rows in operands.pieces(q_borders or [0, case.q.shape[1]]):
            q_part = guarded.like(d_q[:, rows])
            kernel.backward(
                d_out[:, rows], q[:, rows], k[:, keys], v[:, keys], operands.part(case.mask, rows, keys),
                xp.ascontiguousarray(xp.asarray(lse)[..., rows]), xp.ascontiguousarray(xp.asarray(delta)[..., rows]),
                q_part, k_part, v_part,
            )  # fmt: skip
            d_q[:, rows] = host(q_part)
        d_k[:, keys], d_v[:, keys] = host(k_part), host(v_part)
    guarded.check()
    return d_q, d_k, d_v


def check(xp: Any, host: Any, case: operands.Case, borders: list[int] | None = None) -> None:
    """Forward and backward against the oracle, the backward from the oracle's lse and delta, rounded."""
    right, dtype = oracle.attention(case.q, case.k, case.v, case.mask), case.q.dtype
    size, sums = operands.sizes(case, right), kernel.sum_type(dtype)
    allowance = operands.ULPS * (2.0**-24 if sums == np.float32 else 2 * 2.0**-53)
    half = HALF_UNITS[dtype]

    found, usual = forward(xp, host, case, borders), operands.plain_forward(case)
    assert found[0].dtype == dtype
    near(operands, "out", found[0], usual[0], right.out, size["out"], allowance + 2 * half, dtype)
    near(operands, "lse", found[1], usual[1], right.lse, size["lse"], allowance, dtype)

    lse = right.lse.astype(sums)
    delta = (case.d_out.astype(np.float64) * right.out).sum(axis=-1).transpose(0, 2, 1).astype(sums)
    rights = oracle.attention_backward(case.d_out, case.q, case.k, case.v, case.mask)
    results, usuals = backward(xp, host, case, lse, delta, k_borders=borders), operands.plain_backward(case, lse, delta)
    for name, result, plain, exact in zip(("d_q", "d_k", "d_v"), results, usuals, rights, strict=True):
        near(operands, name, result, plain, exact, size[name], allowance + half, dtype)


def near(_: Any, name: str, result: Array, plain: Array, right: Array, size: Array, allowance: float, dtype: Any) -> None:
    # What float16 can't tell apart near 0 is a rounding of its own: at most this much of a factor below 1.
    size = size + np.where(size > 0, SMALLEST.get(np.dtype(dtype), 0.0) / max(allowance, 1e-30), 0)
    operands.assert_as_exact(name, result, plain, right, size, allowance)


PLAIN: dict[str, Any] = {"queries": 70, "keys": 130, "size": 64, "v_size": 64}


@pytest.mark.parametrize("dtype", TYPES.values(), ids=TYPES)
@pytest.mark.parametrize(
    "options",
    [
        PLAIN,
        PLAIN | {"causal": True},
        PLAIN | {"queries": 129, "causal": True, "window": 40, "kv_heads": 2, "batch": 2},
        PLAIN | {"window": 33, "order": "sorted"},
        PLAIN | {"causal": True, "documents": 3, "order": "sorted", "group": 2},
        PLAIN | {"causal": True, "documents": 4, "order": "random"},
        PLAIN | {"softcap": 2.5, "causal": True},
        PLAIN | {"slopes": True, "causal": True, "group": 3, "queries": 20},
        PLAIN | {"slopes": True, "softcap": 5.0, "window": 50, "order": "random", "group": 2, "queries": 33},
        {"queries": 1, "keys": 200, "size": 128, "v_size": 128, "causal": True, "group": 4},
        {"queries": 66, "keys": 65, "size": 128, "v_size": 64, "causal": True},
        {"queries": 9, "keys": 70, "size": 20, "v_size": 72, "kv_heads": 2},
        {"queries": 17, "keys": 33, "size": 80, "v_size": 17, "causal": True},
        {"queries": 5, "keys": 66, "size": 256, "v_size": 192},
        {"queries": 3, "keys": 1, "size": 1, "v_size": 1},
    ],
    ids=lambda options: "-".join(f"{name}{value}" for name, value in options.items() if value != PLAIN.get(name)) or "-",
)
def test_attention_is_that_of_float64(xp: Any, host: Any, seed: int, dtype: Any, options: dict[str, Any]) -> None:
    check(xp, host, operands.draw_case(np.random.default_rng(seed), dtype, **options))
