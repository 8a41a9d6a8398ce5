"""Attention on bfloat16, in every set of instructions that multiplies pairs of it.

A pair is two neighbours along the index that is summed: features, keys or queries. Whole numbers are multiplied and
summed without any rounding, so a pair put together wrongly is a wrong number. Of random ones the error is held to that
of a computation which rounds the same factors once: a second rounding would make it sqrt(2) times as large.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kernel_operands import BF16

from attention_operands import (
    Case,
    backward,
    draw_case,
    forward,
    in_pairs,
    part,
    pieces,
    places,
    plain_backward,
    plain_sums,
)
from fivedp.kernels import attention as kernel
from fivedp.kernels import gemm
from fivedp.kernels.attention import Mask
from fivedp.reference import attention_reference as oracle

Array = Any
TIMEOUT = 1200  # seconds for an emulated set

MASKS: dict[str, Any] = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window": 41, "order": "random"},
    "documents": {"documents": 3, "order": "random", "causal": True},
}
# queries, keys, group, head size, size of values: an odd end of everything that is summed, and none
SIZES = [(1, 1, 1, 1, 1), (65, 85, 1, 20, 20), (43, 337, 3, 33, 72), (64, 84, 2, 80, 64), (131, 167, 1, 72, 129)]


def whole_numbers(rng: np.random.Generator, shape: tuple[int, ...], most: int) -> Array:
    return rng.integers(-most, most + 1, shape).astype(BF16)


def draw_whole(rng: np.random.Generator, sizes: tuple[int, ...], kind: str) -> Case:
    """A case of small whole numbers, of scale 1."""
    queries, keys, group, size, v_size = sizes
    case = draw_case(
        rng, BF16, batch=2, kv_heads=2, group=group, queries=queries, keys=keys, size=size, v_size=v_size, **MASKS[kind]
    )
    q, k = (whole_numbers(rng, x.shape, 3) for x in (case.q, case.k))
    v, d_out = (whole_numbers(rng, x.shape, 1) for x in (case.v, case.d_out))
    return Case(q, k, v, d_out, replace(case.mask, scale=1.0))


def by_group(x: Array, kv_heads: int) -> Array:
    """(B, S, H, D) of queries as float64 (B, S, H_kv, group, D)."""
    batch, tokens, heads, size = x.shape
    return x.astype(np.float64).reshape(batch, tokens, kv_heads, heads // kv_heads, size)


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_weights_of_one_give_the_sum_of_the_values_that_are_seen(seed: int, sizes: tuple[int, ...], kind: str) -> None:
    rng = np.random.default_rng(seed)
    case = draw_whole(rng, sizes, kind)
    case = replace(case, q=np.zeros_like(case.q))
    sees = oracle.seen(case.mask).astype(np.float64)
    right = np.einsum("ij,bjhe->bihe", sees, case.v.astype(np.float64))
    for cuts in ([], sorted(rng.integers(0, sizes[1] + 1, 2).tolist())):
        state = kernel.empty_state(case.q, sizes[4])
        for keys in pieces([0, *cuts, sizes[1]]):
            kernel.forward(case.q, case.k[:, keys], case.v[:, keys], part(case.mask, keys=keys), state)
        assert np.array_equal(by_group(state.output, 2), np.repeat(right[:, :, :, None], sizes[2], axis=3))
        assert np.array_equal(state.total, np.broadcast_to(sees.sum(axis=1), state.total.shape))


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_gradients_of_whole_numbers_are_exact(seed: int, sizes: tuple[int, ...], kind: str) -> None:
    rng = np.random.default_rng(seed)
    case = draw_whole(rng, sizes, kind)
    shape = (2, case.q.shape[2], sizes[0])
    # With lse = 0 a weight is 1 where q or k is 0; a logit's derivative is a whole number up to 129 + 100, a bfloat16.
    lse, delta = np.zeros(shape, np.float32), rng.integers(-100, 101, shape).astype(np.float32)
    sees = oracle.seen(case.mask).astype(np.float64)
    gradient, values = by_group(case.d_out, 2), case.v.astype(np.float64)
    share = delta.astype(np.float64).reshape(2, 2, sizes[2], sizes[0]).transpose(0, 3, 1, 2)
    d_logits = np.einsum("bihge,bjhe->bihgj", gradient, values) - share[..., None]
    d_logits *= sees[None, :, None, None, :]
    d_v = np.einsum("ij,bihge->bjhe", sees, gradient)
    for zero in ("q", "k"):
        one = replace(case, **{zero: np.zeros_like(getattr(case, zero))})
        found = backward(one, lse, delta)
        d_q = np.einsum("bihgj,bjhe->bihge", d_logits, one.k.astype(np.float64))
        d_k = np.einsum("bihgj,bihge->bjhe", d_logits, by_group(one.q, 2))
        assert np.array_equal(found[0], d_q.reshape(case.q.shape))
        assert np.array_equal(found[1], d_k)
        assert np.array_equal(found[2], d_v)


@pytest.mark.parametrize("size", [1, 2, 20, 33, 72, 80, 129])
def test_logits_of_whole_numbers_are_rounded_by_their_scale_only(seed: int, size: int) -> None:
    rng = np.random.default_rng(seed)
    keys = 170
    q, k = whole_numbers(rng, (1, 90, 2, size), 50), whole_numbers(rng, (1, keys, 1, size), 50)
    at = rng.integers(0, keys, 90).astype(np.int32)
    mask = Mask(at, places(keys), scale=0.37, causal=True, window=1)  # a query sees one key: lse is its logit
    _, lse = forward(Case(q, k, k, q, mask))
    wide_q, wide_k = q[0].astype(np.float64), k[0, at, 0].astype(np.float64)
    right = 0.37 * np.einsum("ihe,ie->hi", wide_q, wide_k)
    sizes = 0.37 * np.einsum("ihe,ie->hi", abs(wide_q), abs(wide_k))
    assert (abs(lse[0] - right) <= 8 * 2.0**-24 * sizes).all()


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("sizes", [(150, 337, 1, 20, 20), (67, 501, 3, 72, 72), (129, 255, 2, 80, 33)], ids=str)
def test_the_error_is_that_of_rounding_the_factors(seed: int, sizes: tuple[int, ...], kind: str) -> None:
    if not in_pairs(BF16):
        pytest.skip("the set in use rounds no factors: test_attention_values.py judges it as float32")
    rng = np.random.default_rng(seed)
    queries, keys, group, size, v_size = sizes
    case = draw_case(
        rng, BF16, kv_heads=2, group=group, queries=queries, keys=keys, size=size, v_size=v_size, **MASKS[kind]
    )
    case = replace(case, mask=replace(case.mask, scale=2 * case.mask.scale))  # some weights count more than others
    right = oracle.attention(case.q, case.k, case.v, case.mask)
    state = kernel.empty_state(case.q, v_size)
    kernel.forward(case.q, case.k, case.v, case.mask, state)
    total = state.total.transpose(0, 2, 1)[..., None]
    out = state.output / np.where(total == 0, 1, total)
    lse = right.lse.astype(np.float32)
    delta = (case.d_out.astype(np.float64) * right.out).sum(axis=-1).transpose(0, 2, 1).astype(np.float32)
    found = {"out": out, **dict(zip("qkv", backward(case, lse, delta), strict=True))}
    plain = {"out": plain_sums(case)[0], **dict(zip("qkv", plain_backward(case, lse, delta), strict=True))}
    exact = oracle.attention_backward(case.d_out, case.q, case.k, case.v, case.mask)
    for name, truth in {"out": right.out, **dict(zip("qkv", exact, strict=True))}.items():
        error, usual = (np.linalg.norm(x[name].astype(np.float64) - truth) for x in (found, plain))
        assert error <= 1.2 * usual, f"{name}: {error:.3g}, plain {usual:.3g}"


@pytest.mark.parametrize("isa", [isa for isa in gemm.supported_isas() if "bf16" in isa])
def test_all_of_this_holds_in_other_sets_that_multiply_pairs(isa: str) -> None:
    if isa == gemm.isa():
        pytest.skip(f"{isa} is the set in use")
    here = Path(__file__).parent
    files = [here / f"test_attention_{name}.py" for name in ("bfloat16", "values", "bits")]
    chosen = "(bfloat16 or test_any) and not other_sets"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen, *map(str, files)]
    done = subprocess.run(
        command, env={**os.environ, "FIVEDP_ISA": isa}, capture_output=True, text=True, timeout=TIMEOUT, check=False
    )
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr
