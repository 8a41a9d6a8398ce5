"""Attention on the GPU against float64, by the rule of tests/attention_operands.py.

The sums of a row come in tiles and in pairs of lanes, never more than on the CPU; products of 16-bit numbers are exact
in float32. Weights, and the derivatives of logits, are rounded to the 16 bits of the inputs as factors, which may cost
half a unit of each.

Types of 16 bits have two kernels forward: every test of them runs with each.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import attention_operands as operands
from fivedp.kernels import attention as either
from fivedp.kernels.attention import Mask, State
from fivedp.kernels.cuda import attention as kernel
from fivedp.kernels.cuda._extension import asked_kernel
from fivedp.reference import attention_reference as oracle

Array = Any
BF16 = np.dtype(ml_dtypes.bfloat16)
TYPES = {
    "bfloat16": BF16,
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
}
HALF_UNITS = {BF16: 2.0**-9, np.dtype(np.float16): 2.0**-12, np.dtype(np.float32): 0.0, np.dtype(np.float64): 0.0}
SMALLEST = {np.dtype(np.float16): 2.0**-25}  # half of what float16 tells apart near 0
GUARD = 96

# (type, kernel), the latter for the fixture `selected`.
BOTH = ("sm80", "sm90")
each_type = pytest.mark.parametrize(
    ("dtype", "selected"),
    [
        pytest.param(dtype, asked, id=f"{name}-{asked}" if dtype.itemsize == 2 else name)
        for name, dtype in TYPES.items()
        for asked in (BOTH if dtype.itemsize == 2 else BOTH[:1])
    ],
    indirect=["selected"],
)
each_kernel = pytest.mark.parametrize("selected", BOTH, indirect=True)


@pytest.fixture(autouse=True)
def selected(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The kernels that FIVEDP_ATTENTION_KERNEL asks for."""
    select(monkeypatch, getattr(request, "param", "sm80"))
    yield asked_kernel("ATTENTION")
    asked_kernel.cache_clear()


def select(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("FIVEDP_ATTENTION_KERNEL", name)
    asked_kernel.cache_clear()


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
            assert bool((room[:GUARD] == 77).all())
            assert bool((room[GUARD + size :] == 77).all())


def aligned(xp: Any, x: Array) -> Array:
    """The same numbers in rows that begin at multiples of 16 bytes, with NaN between them where there is room."""
    room = np.full((*x.shape[:3], -(-x.shape[3] // 8) * 8), np.nan, x.dtype)
    room[..., : x.shape[3]] = x
    return xp.asarray(room)[..., : x.shape[3]]


def has_hopper(xp: Any) -> bool:
    """Whether the kernel for 9.x runs here; the emulated GPU is one of these."""
    return xp is np or xp.cuda.Device().compute_capability[0] == "9"


def forward(xp: Any, host: Any, case: operands.Case, borders: list[int] | None = None) -> tuple[Array, Array]:
    """Output and lse, the keys given piece by piece."""
    guarded = Guarded(xp)
    hopper = asked_kernel("ATTENTION") == "sm90" and has_hopper(xp)
    q, k, v = (aligned(xp, x) if hopper else xp.asarray(x) for x in (case.q, case.k, case.v))
    state = guarded.state(q, case.v.shape[-1])
    for keys in operands.pieces(borders or [0, case.k.shape[1]]):
        ran = kernel.forward(q, k[:, keys], v[:, keys], operands.part(case.mask, keys=keys), state)
        assert ran == "none" or hopper == (ran == "sm90")  # a piece may be empty
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
    """The gradients, queries and keys given piece by piece."""
    guarded = Guarded(xp)
    hopper = asked_kernel("ATTENTION") == "sm90" and has_hopper(xp)
    d_out, q, k, v = (aligned(xp, x) if hopper else xp.asarray(x) for x in (case.d_out, case.q, case.k, case.v))
    dtype = kernel.sum_type(case.q.dtype)
    d_q, d_k, d_v = (np.zeros(x.shape, dtype) for x in (case.q, case.k, case.v))
    for keys in operands.pieces(k_borders or [0, case.k.shape[1]]):
        k_part, v_part = (guarded.like(d[:, keys]) for d in (d_k, d_v))
        for rows in operands.pieces(q_borders or [0, case.q.shape[1]]):
            q_part = guarded.like(d_q[:, rows])
            ran = kernel.backward(
                d_out[:, rows], q[:, rows], k[:, keys], v[:, keys], operands.part(case.mask, rows, keys),
                xp.ascontiguousarray(xp.asarray(lse)[..., rows]), xp.ascontiguousarray(xp.asarray(delta)[..., rows]),
                q_part, k_part, v_part,
            )  # fmt: skip
            assert ran == "none" or hopper == (ran == "sm90")
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
    near("out", case, found[0], usual[0], right.out, size["out"], allowance + 2 * half)
    near("lse", case, found[1], usual[1], right.lse, size["lse"], allowance)

    lse = right.lse.astype(sums)
    delta = (case.d_out.astype(np.float64) * right.out).sum(axis=-1).transpose(0, 2, 1).astype(sums)
    rights = oracle.attention_backward(case.d_out, case.q, case.k, case.v, case.mask)
    results, usuals = backward(xp, host, case, lse, delta, k_borders=borders), operands.plain_backward(case, lse, delta)
    for name, result, plain, exact in zip(("d_q", "d_k", "d_v"), results, usuals, rights, strict=True):
        near(name, case, result, plain, exact, size[name], allowance + half)


def near(
    name: str, case: operands.Case, result: Array, plain: Array, right: Array, size: Array, allowance: float
) -> None:
    smallest = SMALLEST.get(np.dtype(case.q.dtype), 0.0)
    if (
        smallest and name != "lse"
    ):  # what float16 can't tell apart near 0 is an error of every factor, and of the output
        errors = smallest * (operands.factor_sums(case)[name] + (name == "out"))
        size = size + np.where(size > 0, errors / allowance, 0)
    operands.assert_as_exact(name, result, plain, right, size, allowance)


PLAIN: dict[str, Any] = {"queries": 70, "keys": 130, "size": 64, "v_size": 64}


@each_type
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
    ids=lambda options: (
        "-".join(f"{name}{value}" for name, value in options.items() if value != PLAIN.get(name)) or "-"
    ),
)
def test_attention_is_that_of_float64(xp: Any, host: Any, seed: int, dtype: Any, options: dict[str, Any]) -> None:
    check(xp, host, operands.draw_case(np.random.default_rng(seed), dtype, **options))


@each_type
def test_keys_may_come_in_pieces(xp: Any, host: Any, seed: int, dtype: Any) -> None:
    rng = np.random.default_rng(seed)
    case = operands.draw_case(
        rng, dtype, queries=67, keys=150, size=64, v_size=40, causal=True, documents=2, order="sorted", group=2
    )
    check(xp, host, case, [0, 1, 64, 64, 131, 150])


@each_type
def test_queries_of_a_zigzag_are_two_ranges(xp: Any, host: Any, seed: int, dtype: Any) -> None:
    rng = np.random.default_rng(seed)
    case = operands.draw_case(rng, dtype, queries=140, keys=100, size=64, v_size=64, causal=True)
    places = np.concatenate([operands.places(70, 30), operands.places(70, 300)])
    keys = np.concatenate([operands.places(50, 0), operands.places(50, 330)])
    check(xp, host, replace(case, mask=replace(case.mask, q_position=places, k_position=keys)))


@each_type
def test_backward_adds_up_over_pieces_of_queries(xp: Any, host: Any, seed: int, dtype: Any) -> None:
    rng = np.random.default_rng(seed)
    case = operands.draw_case(rng, dtype, queries=90, keys=80, size=64, v_size=64, causal=True, order="random", group=2)
    right = oracle.attention(case.q, case.k, case.v, case.mask)
    lse = right.lse.astype(kernel.sum_type(case.q.dtype))
    delta = (case.d_out.astype(np.float64) * right.out).sum(axis=-1).transpose(0, 2, 1).astype(lse.dtype)
    size = operands.sizes(case, right)
    found = backward(xp, host, case, lse, delta, [0, 7, 70, 90], [0, 66, 80])
    rights = oracle.attention_backward(case.d_out, case.q, case.k, case.v, case.mask)
    usuals = operands.plain_backward(case, lse, delta)
    allowance = operands.ULPS * (2.0**-24 if lse.dtype == np.float32 else 2.0**-52) + HALF_UNITS[np.dtype(dtype)]
    for name, result, plain, exact in zip(("d_q", "d_k", "d_v"), found, usuals, rights, strict=True):
        near(name, case, result, plain, exact, size[name], allowance)


@each_type
def test_what_is_masked_may_be_anything(xp: Any, host: Any, seed: int, dtype: Any) -> None:
    """NaN and infinity in keys, values and rows that nobody sees change nothing; those that are seen show."""
    rng = np.random.default_rng(seed)
    case = operands.draw_case(rng, dtype, queries=100, keys=100, size=64, v_size=64, causal=True)
    clean = forward(xp, host, case)
    k, v, q, d_out = (x.copy() for x in (case.k, case.v, case.q, case.d_out))
    k[:, 60:], v[:, 60:] = np.nan, np.inf  # seen by queries from 60
    v[:, 80:] = np.nan
    found = forward(xp, host, replace(case, k=k, v=v))
    assert np.array_equal(found[0][:, :60], clean[0][:, :60])
    assert np.array_equal(found[1][..., :60], clean[1][..., :60])
    assert np.isnan(found[0][:, 60:].astype(np.float32)).all()

    right = oracle.attention(case.q, case.k, case.v, case.mask)
    lse = right.lse.astype(kernel.sum_type(case.q.dtype))
    delta = (case.d_out.astype(np.float64) * right.out).sum(axis=-1).transpose(0, 2, 1).astype(lse.dtype)
    want = backward(xp, host, case, lse, delta)
    q[:, :40], d_out[:, :40] = np.nan, np.inf  # keys from 40 are not seen by these
    d_q, d_k, d_v = backward(xp, host, replace(case, q=q, d_out=d_out), lse, delta)
    assert np.array_equal(d_q[:, 40:], want[0][:, 40:])
    assert np.array_equal(d_k[:, 40:], want[1][:, 40:])
    assert np.array_equal(d_v[:, 40:], want[2][:, 40:])
    assert not np.isfinite(d_k[:, :40]).any()
    assert not np.isfinite(d_v[:, :40]).any()
    d_q, _, _ = backward(xp, host, replace(case, k=k), lse, delta)
    assert np.array_equal(d_q[:, :60], want[0][:, :60])
    assert np.isnan(d_q[:, 60:]).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_an_infinity_that_is_seen_stays_in_its_column(xp: Any, host: Any, seed: int, dtype: str) -> None:
    case = operands.draw_case(np.random.default_rng(seed), TYPES[dtype], queries=70, keys=70, size=64, causal=True)
    v = case.v.copy()
    v[0, 30, 0, 3], v[0, 50, 0, 3], v[0, 20, 0, 6] = np.inf, -np.inf, -np.inf
    out = forward(xp, host, replace(case, v=v))[0].astype(np.float64)[0, :, 0]
    clean = forward(xp, host, case)[0].astype(np.float64)[0, :, 0]
    assert np.isfinite(out[:30, 3]).all()
    assert (out[30:50, 3] == np.inf).all()
    assert np.isnan(out[50:, 3]).all()
    assert np.isfinite(out[:20, 6]).all()
    assert (out[20:, 6] == -np.inf).all()
    others = [c for c in range(out.shape[1]) if c not in (3, 6)]
    assert np.array_equal(out[:, others], clean[:, others])


@each_type
def test_rows_without_keys_and_extreme_logits(xp: Any, host: Any, seed: int, dtype: Any) -> None:
    rng = np.random.default_rng(seed)
    case = operands.draw_case(rng, dtype, queries=70, keys=66, size=64, v_size=24, causal=True)
    case = replace(case, mask=replace(case.mask, q_position=operands.places(70), k_position=operands.places(66, 5)))
    case = replace(case, mask=replace(case.mask, scale=300.0))  # logits of thousands: one weight is nearly all
    out, lse = forward(xp, host, case)
    assert not out[:, :5].any()
    assert np.isneginf(lse[..., :5]).all()
    right = oracle.attention(case.q, case.k, case.v, case.mask)
    assert np.isfinite(lse[..., 5:]).all()
    # Logits of 16-bit numbers are exact in float64; a relative error of 16 units of the type of sums in the largest.
    np.testing.assert_allclose(lse[..., 5:], right.lse[..., 5:], rtol=16 * 2.0**-24, atol=1e-3)
    d_q, d_k, d_v = backward(xp, host, case, lse, kernel.delta(xp.asarray(case.d_out), xp.asarray(out)))
    assert not d_q[:, :5].any()
    assert all(np.isfinite(d).all() for d in (d_q, d_k, d_v))


@each_type
def test_rows_may_lie_anywhere(
    xp: Any, host: Any, seed: int, monkeypatch: pytest.MonkeyPatch, dtype: Any, selected: str
) -> None:
    """Rows at odd addresses, with gaps, and whole at multiples of 16 bytes: the same bits."""
    case = operands.draw_case(np.random.default_rng(seed), dtype, batch=2, kv_heads=2, queries=66, keys=70, size=24)
    for gap in (1, 8):
        select(monkeypatch, "sm80" if gap == 1 else selected)  # odd addresses are always for this one
        right = forward(xp, host, case)
        select(monkeypatch, selected)
        moved = []
        for x in (case.q, case.k, case.v):
            room = np.full((*x.shape[:3], x.shape[3] + gap), np.nan, x.dtype)
            room[..., : x.shape[3]] = x
            moved.append(xp.asarray(room)[..., : x.shape[3]])
        state = kernel.empty_state(moved[0], case.v.shape[-1])
        ran = kernel.forward(moved[0], moved[1], moved[2], case.mask, state)
        assert (ran == "sm90") == (gap == 8 and selected == "sm90" and has_hopper(xp))
        out = xp.full(case.q.shape[:3] + case.v.shape[3:], np.nan, case.q.dtype)
        lse = kernel.finish(state, out)
        assert np.array_equal(host(out), right[0])
        assert np.array_equal(host(lse), right[1])


@each_type
def test_states_of_parts_join_to_that_of_all(xp: Any, host: Any, seed: int, dtype: Any) -> None:
    case = operands.draw_case(np.random.default_rng(seed), dtype, group=2, queries=20, keys=100, size=16, causal=True)
    states = []
    for keys in operands.pieces([0, 30, 90, 100]):
        state = kernel.empty_state(xp.asarray(case.q), case.v.shape[-1])
        k, v = (xp.asarray(x[:, keys]) for x in (case.k, case.v))
        kernel.forward(xp.asarray(case.q), k, v, operands.part(case.mask, keys=keys), state)
        states.append(state)
    before = [host(x).copy() for state in states for x in (state.highest, state.total, state.output)]
    joined = kernel.join(states)
    after = [host(x) for state in states for x in (state.highest, state.total, state.output)]
    assert all(np.array_equal(x, y) for x, y in zip(before, after, strict=True))
    out = xp.full((*case.q.shape[:3], case.v.shape[-1]), np.nan, case.q.dtype)
    lse = kernel.finish(joined, out)
    right, usual = oracle.attention(case.q, case.k, case.v, case.mask), operands.plain_forward(case)
    size, half = operands.sizes(case, right), HALF_UNITS[np.dtype(dtype)]
    allowance = (operands.ULPS + 4) * (2.0**-24 if lse.dtype == np.float32 else 2.0**-52)
    near("out", case, host(out), usual[0], right.out, size["out"], allowance + 2 * half)
    near("lse", case, host(lse), usual[1], right.lse, size["lse"], allowance)
    alone = kernel.join(states[:1])
    assert np.array_equal(host(alone.output), host(states[0].output))
    assert alone.output is not states[0].output


@each_type
@pytest.mark.parametrize(("batch", "queries", "keys"), [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_nothing_is_nothing(xp: Any, host: Any, dtype: Any, batch: int, queries: int, keys: int) -> None:
    q, k = xp.zeros((batch, queries, 2, 8), dtype), xp.zeros((batch, keys, 1, 8), dtype)
    mask = Mask(operands.places(queries), operands.places(keys), causal=True)
    state = kernel.empty_state(q, 8)
    kernel.forward(q, k, k, mask, state)
    out = xp.full(q.shape, np.nan, dtype)
    lse = kernel.finish(state, out)
    assert not host(out).any()
    assert np.isneginf(host(lse)).all()
    gradients = [xp.ones(x.shape, kernel.sum_type(dtype)) for x in (q, k, k)]
    kernel.backward(q, q, k, k, mask, lse, lse, *gradients)
    assert all((host(x) == 1).all() for x in gradients)


@each_kernel
def test_the_same_bits_every_time(xp: Any, host: Any, seed: int) -> None:
    case = operands.draw_case(np.random.default_rng(seed), BF16, group=2, queries=80, keys=140, size=64, causal=True)
    out, lse = forward(xp, host, case)
    delta = host(kernel.delta(xp.asarray(case.d_out), xp.asarray(out)))
    first = [out, lse, *backward(xp, host, case, lse, delta)]
    again = [*forward(xp, host, case), *backward(xp, host, case, lse, delta)]
    assert all(np.array_equal(x, y) for x, y in zip(first, again, strict=True))


def test_attention_names_what_does_not_fit(xp: Any) -> None:
    q, k = xp.zeros((1, 3, 4, 8), np.float32), xp.zeros((1, 5, 2, 8), np.float32)
    mask, state = Mask(operands.places(3), operands.places(5)), kernel.empty_state(q, 8)
    with pytest.raises(ValueError, match=r"attention: k has shape \(1, 5, 2, 7\); \(1, 5, 2, 8\) would be right"):
        kernel.forward(q, xp.zeros((1, 5, 2, 7), np.float32), k, mask, state)
    with pytest.raises(ValueError, match="q has 4 heads and k has 3; a multiple would be right"):
        kernel.forward(q, xp.zeros((1, 5, 3, 8), np.float32), k, mask, state)
    with pytest.raises(ValueError, match="the head sizes are 8 and 257; 1 to 256 would be right on a GPU"):
        kernel.forward(q, k, xp.zeros((1, 5, 2, 257), np.float32), mask, state)
    with pytest.raises(TypeError, match="attention: v is of another type"):
        kernel.forward(q, k, k.astype(np.float16), mask, state)
    with pytest.raises(ValueError, match=r"attention: q_position has shape \(4,\); \(3,\) would be right"):
        kernel.forward(q, k, k, replace(mask, q_position=operands.places(4)), state)
    with pytest.raises(ValueError, match=r"attention: total has shape \(1, 4, 2\)"):
        kernel.forward(q, k, k, mask, State(state.highest, xp.zeros((1, 4, 2), np.float32), state.output))


@each_kernel
def test_cupy_arrays_go_to_the_gpu(xp: Any, host: Any, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through `fivedp.kernels.attention`, as the distributed calls use it."""
    case = operands.draw_case(np.random.default_rng(seed), np.float16, queries=9, keys=20, causal=True)
    right = forward(xp, host, case)
    if xp is np:
        monkeypatch.setattr(either, "is_cupy", lambda array: True)
    d_out, q, k, v = (xp.asarray(x) for x in (case.d_out, case.q, case.k, case.v))
    state = either.empty_state(q, 8)
    either.forward(q, k, v, case.mask, state)
    out = xp.empty_like(d_out)
    lse = either.finish(either.join([state]), out)
    assert np.array_equal(host(out), right[0])
    assert np.array_equal(host(lse), right[1])
    delta = either.delta(d_out, out)
    gradients = [xp.zeros(x.shape, np.float32) for x in (q, k, v)]
    either.backward(d_out, q, k, v, case.mask, lse, delta, *gradients)
    want = backward(xp, host, case, right[1], host(delta))
    assert all(np.array_equal(host(x), y) for x, y in zip(gradients, want, strict=True))
