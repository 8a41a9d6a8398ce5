"""The prices of attention: closed forms, and the text. That they are the bytes sent is shown in tests/mpi."""

from __future__ import annotations

from typing import Any

import pytest

import fivedp
from fivedp.layout.explain_attention import Price, attention_prices

SHAPES = {"q": (2, 64, 8, 16), "k": (2, 64, 4, 16), "v": (2, 64, 4, 16)}


def price(name: str, **options: Any) -> Price:
    return next(p for p in attention_prices(SHAPES, 4, **options) if p.name == name)


def test_a_full_ring_sends_every_block_to_every_other_rank() -> None:
    elements = 3 * (2 * 64 * 4 * 16) * 2  # k and v, to three other ranks
    found = price("ring")
    assert (found.forward, found.backward) == (4 * elements, 8 * elements)
    assert price("ring", itemsize=2).backward == (2 + 4) * elements


def test_a_causal_ring_sends_what_is_seen_and_documents_on_one_rank_nothing() -> None:
    full = price("ring").forward
    assert price("ring", causal=True, layout="contiguous").forward == full // 2
    # Later ranks see the first half of a share, earlier ones all of it.
    assert price("ring", causal=True, layout="zigzag").forward == full * 3 // 4
    # Striped, an earlier rank does not see the last token of a later one.
    striped = sum(16 if r > s else 15 for r in range(4) for s in range(4) if r != s)
    assert price("ring", causal=True, layout="striped").forward == full * striped // (12 * 16)
    documents = {name: (1, *shape[1:]) for name, shape in SHAPES.items()}
    prices = attention_prices(documents, 4, layout="contiguous", cu_seqlens=(0, 16, 32, 48, 64))
    assert prices[0].name == "ring"
    assert prices[0].forward == prices[0].backward == 0


def test_ulysses_sends_every_head_once() -> None:
    q, k = 2 * 64 * 8 * 16, 2 * 64 * 4 * 16
    assert price("Ulysses").forward == 4 * (2 * q + 2 * k + 2 * 64 * 8) * 3 // 4  # q, o, k, v and lse


def test_the_text_says_in_which_rings_queries_travel_backward() -> None:
    own = {**SHAPES, "k": SHAPES["q"], "v": SHAPES["q"]}  # every head has its own keys
    tokens = 2 * 64 * 8
    ring = next(p for p in attention_prices(own, 4) if p.name == "ring")
    assert ring.travellers == ("queries",)
    assert ring.backward == 3 * tokens * (3 * 16 + 2) * 4  # q, do, dq, lse, delta
    lines = fivedp.explain_attention(own, 4).splitlines()
    assert [line.endswith("   queries travel") for line in lines[3:6]] == [
        not line.startswith("  Ulysses") for line in lines[3:6]
    ]
    assert "travel" not in fivedp.explain_attention(SHAPES, 4)
    # Three heads over two ranks: one has two of them that share a key head, the other one.
    uneven = {name: (1, 64, heads, 16) for name, heads in (("q", 3), ("k", 1), ("v", 1))}
    assert "hybrid, heads 2 x ring 2" in fivedp.explain_attention(uneven, 4)
    assert "queries travel in 1 of 2 rings" in fivedp.explain_attention(uneven, 4)


def test_hybrids_are_every_factorisation_and_the_least_comes_first() -> None:
    prices = attention_prices(SHAPES, 12)
    assert sorted((p.heads, p.ring) for p in prices) == [(1, 12), (2, 6), (3, 4), (4, 3), (6, 2), (12, 1)]
    assert [p.forward for p in prices] == sorted(p.forward for p in prices)
    text = fivedp.explain_attention(SHAPES, 12)
    assert "hybrid, heads 4 x ring 3" in text
    assert f"least forward: {prices[0].name}" in text


def test_wrong_shapes_and_layouts_are_told() -> None:
    with pytest.raises(fivedp.ShapeError, match="do not fit"):
        fivedp.explain_attention({**SHAPES, "v": (2, 63, 4, 16)}, 4)
    with pytest.raises(fivedp.LayoutError, match="layout is 'round'"):
        fivedp.explain_attention(SHAPES, 4, layout="round")
