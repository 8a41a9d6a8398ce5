"""What attention computes, against float64 with all logits stored; and that oracle against others."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_operands import BF16, REAL_TYPES, with_strides

from attention_operands import Case, backward, check_values, draw_case, forward, gradients, places
from fivedp.kernels import attention as kernel
from fivedp.kernels.attention import Mask
from fivedp.reference import attention_reference as oracle

ORDERS = ["sequence", "sorted", "random"]
F64 = np.dtype(np.float64)


def lying(rng: np.random.Generator, x: Any, kind: str) -> Any:
    """(B, S, H, D) of the same values that lies in memory another way."""
    if kind == "heads first":
        return np.ascontiguousarray(x.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3)
    if kind == "tokens first":
        return np.ascontiguousarray(x.transpose(1, 0, 2, 3)).transpose(1, 0, 2, 3)
    if kind == "every second token, from the last":
        wide = np.full((x.shape[0], 2 * x.shape[1], *x.shape[2:]), np.nan, x.dtype)
        view = wide[:, ::-2]
        view[...] = x
        return view
    if kind == "one of three":  # as the projection to q, k and v in one leaves it
        wide = np.full((*x.shape[:3], 3, x.shape[3]), np.nan, x.dtype)
        wide[..., 1, :] = x
        return wide[..., 1, :]
    return with_strides(rng, x, kind)


LYING = ["c", "heads first", "tokens first", "every second token, from the last", "one of three", "f", "unaligned"]
NEAR_BORDERS = st.sampled_from([0, 1, 83, 84, 85, 168, 335, 336, 337, 400])


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from(REAL_TYPES),
    heads=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4)),
    queries=st.integers(0, 130),
    keys=st.integers(0, 400) | NEAR_BORDERS,
    head_sizes=st.tuples(st.integers(1, 140), st.integers(1, 140)),
    causal=st.booleans(),
    window=st.sampled_from([0, 0, 1, 7, 100, 2**40]),
    softcap=st.sampled_from([0.0, 0.0, 0.7, 4.0]),
    slopes=st.booleans(),
    documents=st.integers(0, 4),
    order=st.sampled_from(ORDERS),
    lie=st.tuples(*[st.sampled_from(LYING)] * 4),
    n_pieces=st.integers(1, 3),
)
def test_any_attention_is_as_exact_as_a_plain_one(
    seed: int, dtype: Any, heads: tuple[int, int, int], queries: int, keys: int, head_sizes: tuple[int, int],
    causal: bool, window: int, softcap: float, slopes: bool, documents: int, order: str, lie: tuple[str, ...],
    n_pieces: int,
) -> None:  # fmt: skip
    rng = np.random.default_rng(seed)
    if math.prod(heads) * queries * keys * sum(head_sizes) > 2e7:  # the oracle is slow
        queries = 1 + queries % 16
    case = draw_case(
        rng, dtype, batch=heads[0], kv_heads=heads[1], group=heads[2], queries=queries, keys=keys, size=head_sizes[0],
        v_size=head_sizes[1], causal=causal, window=window, softcap=softcap, slopes=slopes, documents=documents,
        order=order,
    )  # fmt: skip
    arrays = [lying(rng, x, kind) for x, kind in zip((case.q, case.k, case.v, case.d_out), lie, strict=True)]
    inner = sorted(int(border) for border in rng.integers(0, keys + 1, n_pieces - 1))
    check_values(Case(*arrays, case.mask), [0, *inner, keys])


@pytest.mark.parametrize("dtype", REAL_TYPES, ids=str)
@pytest.mark.parametrize("softcap", [0.1, 30.0, 1000.0])
def test_a_softcap_far_below_or_above_the_logits_costs_no_digits(seed: int, dtype: Any, softcap: float) -> None:
    rng = np.random.default_rng(seed)
    case = draw_case(rng, dtype, queries=40, keys=100, size=32, softcap=softcap)
    for factor in (1.0, 0.01):
        check_values(replace(case, mask=replace(case.mask, scale=factor * case.mask.scale)))


@pytest.mark.parametrize("dtype", REAL_TYPES, ids=str)
def test_one_query_against_many_keys_and_many_against_one(seed: int, dtype: Any) -> None:
    rng = np.random.default_rng(seed)
    for queries, keys in ((1, 1000), (1, 1), (700, 1)):
        check_values(draw_case(rng, dtype, kv_heads=2, group=3, queries=queries, keys=keys, causal=True))


@pytest.mark.parametrize("dtype", REAL_TYPES, ids=str)
def test_logits_of_ten_thousand(seed: int, dtype: Any) -> None:
    rng = np.random.default_rng(seed)
    case = draw_case(rng, dtype, queries=30, keys=200, size=4, group=2)
    check_values(replace(case, mask=replace(case.mask, scale=1e4)))


@pytest.mark.parametrize("dtype", REAL_TYPES, ids=str)
def test_a_maximum_that_rises_with_every_piece(seed: int, dtype: Any) -> None:
    rng = np.random.default_rng(seed)
    case = draw_case(rng, dtype, queries=20, keys=400, size=6, group=2, order="random")
    rising = np.linspace(0, 60, 400)[None, :, None, None]
    q, k = abs(case.q), (abs(case.k) * rising.astype(dtype)).astype(dtype)
    for turn in (slice(None), slice(None, None, -1)):  # and one that is met first
        check_values(replace(case, q=q, k=k[:, turn]), [0, 10, 85, 200, 201, 400])


@pytest.mark.parametrize("dtype", REAL_TYPES, ids=str)
@pytest.mark.parametrize("size", [1e2, 1e4, 1e30])
def test_large_negative_logits_are_as_good_as_any(seed: int, dtype: Any, size: float) -> None:
    rng = np.random.default_rng(seed)
    case = draw_case(rng, dtype, queries=5, keys=130, size=1)
    q, k = np.ones_like(case.q), np.full_like(case.k, -size)
    out, lse = forward(replace(case, q=q, k=k))
    assert np.isfinite(out.astype(np.float64)).all()
    mean = case.v.astype(np.float64).mean(axis=1, keepdims=True)  # equal logits
    assert abs(out.astype(np.float64) - mean).max() <= {8: 1e-14, 4: 1e-5, 2: 1e-2}[out.dtype.itemsize]
    expected = k[0, 0, 0, 0].astype(np.float64) + math.log(130)
    assert np.allclose(lse, expected, rtol=4 * np.finfo(lse.dtype).eps, atol=0)


@pytest.mark.parametrize("dtype", REAL_TYPES, ids=str)
@pytest.mark.parametrize("why", ["documents", "causal", "window"])
def test_a_row_that_sees_no_key_gives_zeros_and_minus_infinity(seed: int, dtype: Any, why: str) -> None:
    rng = np.random.default_rng(seed)
    case = draw_case(rng, dtype, batch=2, kv_heads=2, group=2, queries=37, keys=190, size=20, slopes=True)
    blind = rng.random(37) < 0.3
    blind[rng.integers(37)] = True
    positions = places(37, 300)
    mask = replace(case.mask, q_position=positions, k_position=places(190, 150))
    if why == "documents":
        mask = replace(mask, q_document=blind.astype(np.int32), k_document=np.zeros(190, np.int32))
    elif why == "causal":
        mask = replace(mask, causal=True, q_position=np.where(blind, 149, positions).astype(np.int32))
    else:
        mask = replace(mask, window=60, q_position=np.where(blind, 400, positions).astype(np.int32))
    case = replace(case, mask=mask)
    check_values(case, [0, 3, 190])
    out, lse = forward(case)
    d_q, _, _ = gradients(case)
    assert not out[:, blind].astype(np.float64).any()
    assert np.isneginf(lse[..., blind]).all()
    assert np.isfinite(lse[..., ~blind]).all()
    assert not d_q[:, blind].any()


@pytest.mark.parametrize("dtype", REAL_TYPES, ids=str)
def test_no_queries_and_no_keys(dtype: Any) -> None:
    for queries, keys in ((0, 5), (5, 0), (0, 0)):
        q, k, v = np.ones((2, queries, 4, 3), dtype), np.ones((2, keys, 2, 3), dtype), np.ones((2, keys, 2, 6), dtype)
        d_out = np.ones((2, queries, 4, 6), dtype)
        case = Case(q, k, v, d_out, Mask(places(queries), places(keys), causal=True))
        out, lse = forward(case)
        assert out.shape == (2, queries, 4, 6)
        assert not out.astype(np.float64).any()
        assert np.isneginf(lse).all()
        assert not any(d.any() for d in gradients(case))


@pytest.mark.parametrize("dtype", REAL_TYPES, ids=str)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["k", "v"])
def test_nan_and_infinity_reach_the_rows_that_see_them_and_no_others(
    seed: int, dtype: Any, value: float, where: str
) -> None:
    rng = np.random.default_rng(seed)
    for keys, window in ((60, 0), (200, 0), (400, 50)):
        case = draw_case(rng, dtype, group=2, queries=90, keys=keys, size=9, v_size=7, causal=True, window=window)
        case = replace(case, q=-abs(case.q) if value == -np.inf else abs(case.q))  # the logit is +inf, not -inf
        at, element = int(rng.integers(keys - 90 if keys > 90 else 0, keys)), int(rng.integers(7))
        x = getattr(case, where).copy()
        x[0, at, 0, element] = value
        dirty = replace(case, **{where: x})
        sees = oracle.seen(case.mask)[:, at]
        (out, lse), (clean_out, clean_lse) = forward(dirty), forward(case)
        to = kernel.sum_type(dtype)
        assert np.allclose(out[:, ~sees].astype(to), clean_out[:, ~sees].astype(to), rtol=1e-2, atol=1e-5)
        hit = np.isin(np.arange(7), [element]) if where == "v" else np.ones(7, bool)
        finite = np.isfinite(out[:, sees].astype(to))
        assert not finite[..., hit].any()
        assert finite[..., ~hit].all()
        assert np.allclose(lse[..., ~sees], clean_lse[..., ~sees])
        assert np.isfinite(lse[..., sees]).all() == (where == "v" or not sees.any())
        delta, clean_delta = (kernel.delta(case.d_out, o) for o in (out, clean_out))
        d_q, clean_d_q = backward(dirty, lse, delta)[0], backward(case, clean_lse, clean_delta)[0]
        assert np.allclose(d_q[:, ~sees], clean_d_q[:, ~sees], rtol=1e-2, atol=1e-2 if dtype == BF16 else 1e-4)
        assert not np.isfinite(d_q[:, sees]).any()


@pytest.mark.parametrize(("dtype", "bits"), [(np.float32, 0x7FC00000), (np.float64, 0x7FF8000000000000)])
def test_a_nan_of_any_payload_reaches_the_rows_that_see_it(seed: int, dtype: Any, bits: int) -> None:
    rng = np.random.default_rng(seed)
    pattern = np.dtype(f"u{np.dtype(dtype).itemsize}")
    for payload in (1, int(rng.integers(1, 2**20)), 2**22 - 1):
        for sign in (0, 1 << (8 * pattern.itemsize - 1)):
            case = draw_case(rng, dtype, queries=3, keys=5)
            case.k.view(pattern)[0, 2, 0, 1] = bits | payload | sign
            out, lse = forward(case)
            assert np.isnan(out).all()
            assert np.isnan(lse).all()


@pytest.mark.parametrize("dtype", REAL_TYPES, ids=str)
def test_delta_is_the_sum_of_products(seed: int, dtype: Any) -> None:
    rng = np.random.default_rng(seed)
    for shape in ((2, 50, 3, 70), (1, 0, 2, 5), (1, 1, 1, 1)):
        d_out, out = rng.standard_normal(shape).astype(dtype), rng.standard_normal(shape).astype(dtype)
        terms = (d_out.astype(np.float64) * out.astype(np.float64)).transpose(0, 2, 1, 3)
        found = kernel.delta(lying(rng, d_out, "heads first"), lying(rng, out, "f"))
        assert found.dtype == kernel.sum_type(dtype)
        # one rounding a term and one a sum
        assert (abs(found - terms.sum(-1)) <= (shape[-1] + 1) * np.finfo(found.dtype).eps * abs(terms).sum(-1)).all()


@pytest.mark.parametrize("dtype", REAL_TYPES, ids=str)
def test_gradients_are_added_to_what_is_there(seed: int, dtype: Any) -> None:
    rng = np.random.default_rng(seed)
    case = draw_case(rng, dtype, batch=2, kv_heads=2, group=2, queries=30, keys=100, causal=True, documents=2)
    out, lse = forward(case)
    delta = kernel.delta(case.d_out, out)
    fresh = backward(case, lse, delta)
    before = [rng.standard_normal(d.shape).astype(d.dtype) for d in fresh]
    after = [d.copy() for d in before]
    kernel.backward(case.d_out, case.q, case.k, case.v, case.mask, lse, delta, *after)
    for d, start, total in zip(fresh, before, after, strict=True):
        assert np.allclose(total, start + d, rtol=0, atol=200 * np.finfo(d.dtype).eps * (1 + abs(d)).max())


CURVED = {
    "plain": {},
    "softcap": {"softcap": 1.3},
    "slopes": {"slopes": True},
    "window": {"window": 2, "order": "random"},
    "documents": {"documents": 2},
    "all": {"softcap": 0.8, "slopes": True, "window": 3, "documents": 2, "causal": True},
}


@pytest.mark.parametrize("what", CURVED)
@pytest.mark.parametrize("which", ["kernel", "oracle"])
def test_gradients_are_those_of_finite_differences(seed: int, what: str, which: str) -> None:
    rng = np.random.default_rng(seed)
    keywords: Any = CURVED[what]
    case = draw_case(rng, F64, batch=2, kv_heads=1, group=2, queries=4, keys=6, size=2, v_size=3, **keywords)
    d_lse = rng.standard_normal((2, 2, 4))

    def loss(case: Case) -> float:
        if which == "kernel":
            out, lse = forward(case)
        else:
            out, lse, _ = oracle.attention(case.q, case.k, case.v, case.mask)
        return float((case.d_out * out).sum() + (d_lse * np.where(np.isneginf(lse), 0, lse)).sum())

    if which == "kernel":
        out, lse = forward(case)
        found = backward(case, lse, kernel.delta(case.d_out, out) - d_lse)
    else:
        found = oracle.attention_backward(case.d_out, case.q, case.k, case.v, case.mask, d_lse)
    h = 1e-5  # the error is h^2 of a third derivative, and 1e-15 / h of rounding
    for name, gradient in zip("qkv", found, strict=True):
        for at in np.ndindex(gradient.shape):
            x = getattr(case, name)
            up, down = x.copy(), x.copy()
            up[at] += h
            down[at] -= h
            slope = (loss(replace(case, **{name: up})) - loss(replace(case, **{name: down}))) / (2 * h)
            assert abs(gradient[at] - slope) <= 1e-7


def test_the_oracle_is_a_loop_over_pairs(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for order in ORDERS:
        case = draw_case(
            rng, F64, kv_heads=2, group=2, queries=5, keys=7, size=3, v_size=2, window=4, softcap=2.0, slopes=True,
            documents=2, causal=order == "random", order=order,
        )  # fmt: skip
        m, right = case.mask, oracle.attention(case.q, case.k, case.v, case.mask)
        assert m.q_document is not None
        assert m.k_document is not None
        assert m.slopes is not None
        for h in range(4):
            for i in range(5):
                total, value = 0.0, np.zeros(2)
                for j in range(7):
                    apart = int(m.q_position[i]) - int(m.k_position[j])
                    if m.q_document[i] != m.k_document[j] or apart >= 4 or apart < (0 if m.causal else -3):
                        continue
                    x = m.scale * sum(case.q[0, i, h, e] * case.k[0, j, h // 2, e] for e in range(3))
                    weight = math.exp(2 * math.tanh(x / 2) - m.slopes[h] * abs(apart))
                    total, value = total + weight, value + weight * case.v[0, j, h // 2]
                assert np.allclose(right.out[0, i, h], value / total if total else 0.0, rtol=1e-12, atol=1e-13)
                expected = math.log(total) if total else -math.inf
                assert right.lse[0, h, i] == pytest.approx(expected, rel=1e-12, abs=1e-13)


@pytest.mark.parametrize("causal", [False, True])
def test_the_oracle_is_that_of_torch(seed: int, causal: bool) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is another implementation to hold the oracle to")
    rng = np.random.default_rng(seed)
    case = draw_case(rng, F64, batch=2, kv_heads=2, group=3, queries=20, keys=20, size=5, v_size=4, causal=causal)
    leaves = [torch.tensor(x).requires_grad_() for x in (case.q, case.k, case.v)]
    q, k, v = (x.transpose(1, 2) for x in leaves)
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True).transpose(1, 2)
    out.backward(torch.tensor(case.d_out))
    assert np.allclose(oracle.attention(case.q, case.k, case.v, case.mask).out, out.detach().numpy(), atol=1e-12)
    found = oracle.attention_backward(case.d_out, case.q, case.k, case.v, case.mask)
    for d, leaf in zip(found, leaves, strict=True):
        assert np.allclose(d, leaf.grad.numpy(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", REAL_TYPES, ids=str)
@pytest.mark.parametrize("poisoned", ["q", "d_out"])
@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("tokens", [99, 100])
def test_a_poisoned_query_reaches_the_gradients_of_the_keys_it_sees_only(
    seed: int, dtype: Any, poisoned: str, poison: float, tokens: int
) -> None:
    rng = np.random.default_rng(seed)
    d_out, q, k, v = (rng.standard_normal((1, tokens, 2, 8)).astype(dtype) for _ in range(4))
    mask = Mask(places(tokens), places(tokens), scale=0.3, causal=True)
    state = kernel.empty_state(q, 8)
    kernel.forward(q, k, v, mask, state)
    out = np.empty_like(q)
    lse = kernel.finish(state, out)
    {"q": q, "d_out": d_out}[poisoned][0, 40, 1, 3] = poison
    d_q, d_k, d_v = (np.zeros(x.shape, kernel.sum_type(q.dtype)) for x in (q, k, v))
    kernel.backward(d_out, q, k, v, mask, lse, kernel.delta(d_out, out), d_q, d_k, d_v)
    for d in (d_k, d_v):
        assert np.isfinite(d[0, 41:]).all()  # these keys come after query 40
        assert np.isfinite(d[0, :, 0]).all()  # and the other head knows nothing of it
    assert not np.isfinite(d_k[0, :41, 1]).all()
    assert np.isfinite(d_q[0, :40]).all()
    assert np.isfinite(d_q[0, 41:]).all()
