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
