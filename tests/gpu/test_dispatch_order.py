"""The order of dispatched rows on the GPU is that of layout/dispatch.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from device_operands import bits

from fivedp.kernels.cuda.dispatch import RowOrder, dispatch_order
from fivedp.layout.dispatch import Incoming, Outgoing
from fivedp.layout.experts import cut_experts

Array = Any


def draw_experts(rng: np.random.Generator, tokens: int, top_k: int, n_experts: int, dropped: float) -> Array:
    """(T, k) different experts for each token, some of them -1."""
    chosen = np.argsort(rng.random((tokens, n_experts)), axis=1)[:, :top_k].astype(np.int32)
    chosen[rng.random(chosen.shape) < dropped] = -1
    return chosen


def check(host: Any, order: RowOrder, incoming: Incoming, weights: bool) -> None:
    n = len(incoming.source)
    np.testing.assert_array_equal(host(order.counts), incoming.counts)
    np.testing.assert_array_equal(host(order.offsets), incoming.offsets)
    np.testing.assert_array_equal(host(order.n_rows), incoming.n_rows)
    for found, right in ((order.source, incoming.source), (order.token, incoming.token), (order.row, incoming.row)):
        np.testing.assert_array_equal(host(found)[:n], right)
        assert (host(found)[n:] == -1).all()
    if weights:
        assert bits(host(order.weights)[:n]) == bits(incoming.weights)
        assert (host(order.weights)[n:] == 0).all()
    else:
        assert order.weights is None


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("tokens", "top_k", "n_experts"),
    [([5], 2, 4), ([0, 7, 0], 3, 8), ([700, 1500, 3], 4, 60), ([0], 1, 1), ([900], 8, 256), ([1, 1, 1, 1], 1, 3)],
)
def test_pairs_of_many_ranks(
    xp: Any, host: Any, seed: int, dtype: str, tokens: list[int], top_k: int, n_experts: int
) -> None:
    rng = np.random.default_rng(seed)
    cut = cut_experts(n_experts, len(tokens))
    experts = [draw_experts(rng, n, top_k, n_experts, 0.2) for n in tokens]
    outgoing = [Outgoing(e, rng.random(e.shape).astype(dtype), cut, rank) for rank, e in enumerate(experts)]
    for rank in range(len(tokens)):
        pairs = [one.pairs[one.of_owner[rank]] for one in outgoing]
        joined = np.concatenate(pairs)
        begin, end = cut.of(rank)
        fields = [xp.asarray(np.ascontiguousarray(joined[name])) for name in ("expert", "token", "weight")]
        lengths = [len(p) for p in pairs]
        order = dispatch_order(*fields, end - begin, first_expert=begin, lengths=lengths)
        incoming = Incoming(pairs, cut, rank)
        check(host, order, incoming, True)
        np.testing.assert_array_equal(host(order.positions), np.concatenate(incoming.positions))
        check(
            host, dispatch_order(*fields[:2], None, end - begin, first_expert=begin, lengths=lengths), incoming, False
        )


@pytest.mark.parametrize(
    ("tokens", "top_k", "n_experts"), [(6, 2, 3), (1100, 8, 130), (0, 2, 5), (2048, 1, 1), (3, 0, 2)]
)
@pytest.mark.parametrize("dropped", [0.0, 0.3, 1.0])
def test_slots_of_one_rank_some_of_them_empty(
    xp: Any, host: Any, seed: int, tokens: int, top_k: int, n_experts: int, dropped: float
) -> None:
    rng = np.random.default_rng(seed)
    experts = draw_experts(rng, tokens, top_k, n_experts, dropped)
    weights = rng.random(experts.shape).astype(np.float32)
    cut = cut_experts(n_experts, 1)
    incoming = Incoming([Outgoing(experts, weights, cut, 0).pairs], cut, 0)
    order = dispatch_order(xp.asarray(experts), None, xp.asarray(weights), n_experts)
    check(host, order, incoming, True)
    positions = host(order.positions).reshape(experts.shape)
    assert ((positions == -1) == (experts < 0)).all()
    for token, slot in np.argwhere(experts >= 0):
        place = positions[token, slot]
        assert incoming.token[place] == token
        assert incoming.offsets[experts[token, slot]] <= place < incoming.offsets[experts[token, slot] + 1]


def test_experts_of_others_have_no_place(xp: Any, host: Any, seed: int) -> None:
    rng = np.random.default_rng(seed)
    experts = draw_experts(rng, 500, 4, 16, 0.0)
    mine = np.where((experts >= 5) & (experts < 9), experts, -1)
    weights = rng.random(experts.shape).astype(np.float32)
    all_of_them, only_mine = (
        dispatch_order(xp.asarray(e), None, xp.asarray(weights), 4, first_expert=5) for e in (experts, mine)
    )
    for found, right in zip(all_of_them, only_mine, strict=True):
        np.testing.assert_array_equal(host(found), host(right))


def test_all_tokens_to_one_expert(xp: Any, host: Any) -> None:
    n = 5000
    order = dispatch_order(xp.full((n, 1), 2, np.int32), None, None, 4)
    np.testing.assert_array_equal(host(order.token), np.arange(n))
    np.testing.assert_array_equal(host(order.row), np.arange(n))
    np.testing.assert_array_equal(host(order.offsets), [0, 0, 0, n, n])


def test_arguments_that_do_not_fit(xp: Any) -> None:
    pairs = xp.zeros(6, np.int32)
    for call, words in (
        (lambda: dispatch_order(pairs, pairs, None, 3, lengths=[2, 3]), r"lengths is \[2, 3\] of 6 pairs"),
        (lambda: dispatch_order(pairs, None, None, 3), "expert has 1 dimensions and token is None"),
        (lambda: dispatch_order(pairs, pairs[:5], None, 3), r"token has shape \(5,\); \(6,\) would be right"),
        (lambda: dispatch_order(pairs, pairs, None, 3000), "there are 3000 experts; 0 to 2048"),
        (lambda: dispatch_order(pairs, pairs, xp.zeros(5, np.float32), 3), r"weights has shape \(5,\)"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    with pytest.raises(TypeError, match="expert has type i8; i4"):
        dispatch_order(pairs.astype(np.int64), pairs, None, 3)
