"""The kernels for compute capability 9.x beyond what tests/gpu/test_attention.py asks of both: longer walks over
tiles, sizes that the copy engine pads, and which kernel runs when."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from test_attention import BF16, backward, check, forward, has_hopper, select

import attention_operands as operands
from fivedp.kernels.attention import Mask
from fivedp.kernels.cuda import attention as kernel
from fivedp.kernels.cuda._extension import asked_kernel
from fivedp.reference import attention_reference as oracle

Array = Any
HALVES = {"bfloat16": BF16, "float16": np.dtype(np.float16)}
each_half = pytest.mark.parametrize("dtype", HALVES.values(), ids=HALVES)


@pytest.fixture(autouse=True)
def sm90(xp: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    if not has_hopper(xp):
        pytest.skip("this GPU is not of compute capability 9.x")
    select(monkeypatch, "sm90")
    yield
    asked_kernel.cache_clear()


def statistics(case: operands.Case) -> tuple[Array, Array]:
    """lse and delta as the backward takes them."""
    right = oracle.attention(case.q, case.k, case.v, case.mask)
    delta = (case.d_out.astype(np.float64) * right.out).sum(axis=-1).transpose(0, 2, 1)
    return right.lse.astype(np.float32), delta.astype(np.float32)


def gradients(xp: Any, host: Any, case: operands.Case) -> tuple[Array, ...]:
    return backward(xp, host, case, *statistics(case))


@each_half
@pytest.mark.parametrize(("size", "stages"), [(64, 4), (128, 2), (256, 2)])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_more_tiles_than_stages(
    xp: Any, host: Any, seed: int, dtype: Any, size: int, stages: int, causal: bool
) -> None:
    keys = (2 * stages + 1) * (64 if size > 128 else 128) - 30
    rng = np.random.default_rng(seed)
    check(xp, host, operands.draw_case(rng, dtype, queries=70, keys=keys, size=size, v_size=size, causal=causal))


@each_half
@pytest.mark.parametrize(("size", "v_size", "stages"), [(64, 64, 4), (128, 128, 2), (192, 128, 2), (256, 256, 2)])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_gradients_of_more_tiles_than_stages(
    xp: Any, host: Any, seed: int, dtype: Any, size: int, v_size: int, stages: int, causal: bool
) -> None:
    """Of several heads that share their keys, and of several keys' tiles, with an uneven end on either side."""
    rng, tiles = np.random.default_rng(seed), (2 * stages + 1) * 64
    shape: dict[str, Any] = {"group": 2, "queries": tiles - 30, "keys": tiles - 50}
    check(xp, host, operands.draw_case(rng, dtype, size=size, v_size=v_size, causal=causal, **shape))


# Every shape that attention_hopper_gradients.cuh has for heads above 128, most with columns that are not there.
WIDE = [(129, 1), (136, 160), (72, 256), (160, 128), (192, 192), (192, 200), (256, 128), (250, 136), (256, 256)]


@each_half
@pytest.mark.parametrize(("size", "v_size"), [*WIDE, (64, 136)])
@pytest.mark.parametrize(
    "options",
    [
        {"queries": 67, "keys": 131},
        {"queries": 131, "keys": 70, "causal": True, "documents": 2, "order": "sorted", "group": 2},
        {"queries": 65, "keys": 140, "window": 20, "softcap": 3.0, "slopes": True, "kv_heads": 2, "order": "random"},
    ],
    ids=["full", "causal documents", "bent window"],
)
def test_wide_heads(xp: Any, host: Any, seed: int, dtype: Any, size: int, v_size: int, options: dict[str, Any]) -> None:
    check(xp, host, operands.draw_case(np.random.default_rng(seed), dtype, size=size, v_size=v_size, **options))


@each_half
@pytest.mark.parametrize(("size", "v_size"), [(192, 128), (256, 192), (130, 250)])
def test_gradients_of_wide_heads_have_one_order_of_sums(
    xp: Any, host: Any, seed: int, dtype: Any, size: int, v_size: int
) -> None:
    """The same bits whatever warp comes first."""
    case = operands.draw_case(
        np.random.default_rng(seed), dtype, queries=150, keys=140, group=2, size=size, v_size=v_size, causal=True
    )
    first, *others = (gradients(xp, host, case) for _ in range(3))
    for other in others:
        assert all(np.array_equal(x, y) for x, y in zip(first, other, strict=True))


@each_half
@pytest.mark.parametrize(("size", "v_size"), [(192, 128), (256, 256), (136, 200)])
def test_gradients_of_wide_heads_beside_what_is_masked(
    xp: Any, host: Any, seed: int, dtype: Any, size: int, v_size: int
) -> None:
    """Single elements of queries, of d_out and of keys that are not finite, in columns of both warpgroups: who sees
    them has them in their column, everyone else has the bits of a case without them."""
    rng = np.random.default_rng(seed)
    case = operands.draw_case(rng, dtype, queries=150, keys=150, size=size, v_size=v_size, causal=True)
    want, numbers = gradients(xp, host, case), statistics(case)
    tokens, columns = np.arange(150), (0, 63, 64, size - 1)
    v_columns, places = (0, 63, 64, v_size - 1), (20, 63, 64, 101)

    q, d_out = case.q.copy(), case.d_out.copy()
    for token, column, v_column, value in zip(
        places, columns, v_columns, (np.nan, np.inf, -np.inf, np.inf), strict=True
    ):
        q[0, token, 0, column], d_out[0, token, 0, v_column] = value, value
    _, d_k, d_v = (d[0, :, 0] for d in backward(xp, host, replace(case, q=q, d_out=d_out), *numbers))
    # A key's own rows are NaN where a query that sees it is not finite: its weight is.
    unseen = tokens > max(places)
    assert np.array_equal(d_k[unseen], want[1][0, unseen, 0])
    assert np.array_equal(d_v[unseen], want[2][0, unseen, 0])
    assert np.isnan(d_k[: places[0] + 1, 0]).all()
    assert not np.isfinite(d_v[: places[0] + 1, 0]).any()

    # d_out alone: weights are what they were, so infinity stays in its column and keeps its sign.
    d_out = case.d_out.copy()
    for token, v_column, value in zip(places, v_columns, (np.nan, np.inf, -np.inf, np.inf), strict=True):
        d_out[0, token, 0, v_column] = value
    _, d_k, d_v = (d[0, :, 0] for d in backward(xp, host, replace(case, d_out=d_out), *numbers))
    for token, v_column, value in zip(places, v_columns, (np.nan, np.inf, -np.inf, np.inf), strict=True):
        assert np.array_equal(d_v[tokens <= token, v_column], np.full(token + 1, value), equal_nan=True)
        assert np.array_equal(d_v[tokens > token, v_column], want[2][0, tokens > token, 0, v_column])
        assert not np.isfinite(d_k[tokens <= token]).any()
    others = [c for c in range(v_size) if c not in v_columns]
    assert np.array_equal(d_v[:, others], want[2][0][:, 0, others])
    assert np.array_equal(d_k[unseen], want[1][0, unseen, 0])

    k = case.k.copy()
    k[0, 101, 0, size - 1] = np.inf
    d_q = backward(xp, host, replace(case, k=k), *numbers)[0][0, :, 0]
    assert np.array_equal(d_q[:101], want[0][0, :101, 0])
    assert not np.isfinite(d_q[101:, size - 1]).any()


@each_half
@pytest.mark.parametrize(("size", "v_size"), [(1, 1), (20, 72), (81, 7), (136, 129), (65, 250)])
def test_any_head_size(xp: Any, host: Any, seed: int, dtype: Any, size: int, v_size: int) -> None:
    rng = np.random.default_rng(seed)
    shape: dict[str, Any] = {"batch": 2, "kv_heads": 2, "group": 2, "queries": 9, "keys": 150}
    check(xp, host, operands.draw_case(rng, dtype, size=size, v_size=v_size, causal=True, **shape))


@each_half
def test_a_walk_over_more_than_32_tiles(xp: Any, host: Any, seed: int, dtype: Any) -> None:
    """A warp asks about 32 tiles at a time: those that are seen lie on both sides of the border."""
    case = operands.draw_case(np.random.default_rng(seed), dtype, queries=66, keys=4300, size=64, v_size=8, window=200)
    check(xp, host, replace(case, mask=replace(case.mask, q_position=operands.places(66, 2000))))


@each_half
def test_tiles_that_nobody_sees_are_left_out(xp: Any, host: Any, seed: int, dtype: Any) -> None:
    """Documents and a window leave single tiles of 64 keys: halves of a tile, and gaps between tiles."""
    rng = np.random.default_rng(seed)
    case = operands.draw_case(rng, dtype, queries=150, keys=700, size=64, v_size=64)
    documents = np.arange(700, dtype=np.int32) // 64 % 5
    mask = Mask(
        rng.integers(0, 700, 150).astype(np.int32), np.arange(700, dtype=np.int32),
        np.sort(rng.choice([1, 4], 150)).astype(np.int32), documents, scale=0.125, window=300,
    )  # fmt: skip
    k, v = case.k.copy(), case.v.copy()
    unseen = ~np.isin(documents, [1, 4])
    k[:, unseen], v[:, unseen] = np.nan, np.nan
    clean = forward(xp, host, replace(case, mask=mask))
    found = forward(xp, host, replace(case, k=k, v=v, mask=mask))
    assert all(np.array_equal(x, y) for x, y in zip(clean, found, strict=True))
    check(xp, host, replace(case, mask=mask))


@each_half
def test_values_that_are_not_finite_in_both_halves_of_a_block(xp: Any, host: Any, seed: int, dtype: Any) -> None:
    """Queries of both warpgroups, tiles of several stages; what a row sees decides what becomes of it."""
    case = operands.draw_case(
        np.random.default_rng(seed), dtype, queries=128, keys=700, size=64, v_size=80, causal=True, window=500
    )
    v = case.v.copy()
    for key, column, value in (
        (3, 0, np.nan),
        (200, 1, np.inf),
        (620, 70, -np.inf),
        (650, 79, np.nan),
        (699, 2, np.inf),
    ):
        v[0, key, 0, column] = value
    out = forward(xp, host, replace(case, v=v))[0].astype(np.float64)[0, :, 0]
    with np.errstate(invalid="ignore"):
        right = oracle.attention(case.q, case.k, case.v, case.mask).out[0, :, 0]
    queries = np.arange(572, 700)
    for key, column, value in ((200, 1, np.inf), (620, 70, -np.inf), (650, 79, np.nan), (699, 2, np.inf)):
        seen = (queries >= key) & (queries - key < 500)
        assert np.array_equal(out[seen, column], np.full(seen.sum(), value), equal_nan=True)
        assert np.isfinite(out[~seen, column]).all()
    finite = [c for c in range(80) if c not in (1, 2, 70, 79)]
    np.testing.assert_allclose(out[:, finite], right[:, finite], atol=0.05)


def test_who_runs_when(xp: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def ran(q: Array, k: Array) -> str:
        mask = Mask(operands.places(q.shape[1]), operands.places(k.shape[1]))
        return kernel.forward(q, k, k, mask, kernel.empty_state(q, k.shape[-1]))

    q = xp.zeros((2, 3, 4, 24), BF16)
    assert ran(q, q) == "sm90"
    assert ran(q[:1, :, :, :16], q[:1, :, :, :16]) == "sm90"
    assert ran(q[..., :23], q[..., :23]) == "sm90"
    assert ran(q[..., 8:], q[..., 8:]) == "sm90"
    assert ran(q[..., 1:], q[..., 1:]) == "sm80"  # addresses
    assert ran(xp.zeros((2, 3, 4, 20), BF16), xp.zeros((2, 3, 4, 20), BF16)) == "sm80"  # steps
    assert ran(q, xp.broadcast_to(q[:, :1], q.shape)) == "sm80"  # one row for all tokens
    assert ran(q[:, ::-1], q) == "sm80"
    assert ran(q.astype(np.float32), q.astype(np.float32)) == "plain"
    assert ran(q, q[:, :0]) == "none"

    def ran_backward(q: Array, d_out: Array) -> str:
        mask = Mask(operands.places(q.shape[1]), operands.places(q.shape[1]))
        rows = xp.zeros((q.shape[0], q.shape[2], q.shape[1]), np.float32)
        gradients = [xp.zeros(q.shape, np.float32) for _ in range(3)]
        return kernel.backward(d_out, q, q, q, mask, rows, rows, *gradients)

    assert ran_backward(q, q) == "sm90"
    assert ran_backward(q, xp.broadcast_to(q[:, :1], q.shape)) == "sm80"
    large = xp.zeros((1, 3, 2, 136), BF16)
    assert (ran(large, large), ran_backward(large, large)) == ("sm90", "sm90")
    select(monkeypatch, "sm80")
    assert (ran(q, q), ran_backward(q, q)) == ("sm80", "sm80")
    select(monkeypatch, "sm70")
    with pytest.raises(ValueError, match="FIVEDP_ATTENTION_KERNEL is 'sm70'; 'sm80' or 'sm90' would be right"):
        ran(q, q)
