"""What attention over a cut sequence moves: ring, Ulysses and every hybrid of the two, in bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fivedp.errors import LayoutError, ShapeError
from fivedp.layout.ring_travel import Sizes, Travellers, Visibility, backward_travel, forward_travel
from fivedp.layout.sequence import LAYOUTS, HeadCut, Tokens, join, place, reading_order, token_indices

Shape = tuple[int, int, int, int]


@dataclass(frozen=True)
class Price:
    """Bytes that all ranks send: `heads` neighbouring ranks exchange heads, blocks travel round rings of `ring`.

    There is one ring for each of the `heads`; `travellers` says of each whether keys or queries travel in the backward.
    """

    heads: int
    ring: int
    forward: int
    backward: int
    travellers: tuple[Travellers, ...]

    @property
    def name(self) -> str:
        """ring, Ulysses, or the hybrid with its sizes."""
        if self.heads == 1:
            return "ring"
        return "Ulysses" if self.ring == 1 else f"hybrid, heads {self.heads} x ring {self.ring}"


def attention_prices(
    shapes: Mapping[str, Shape],
    ranks: int,
    *,
    causal: bool = False,
    window: int | None = None,
    layout: str = "zigzag",
    cu_seqlens: Any = None,
    itemsize: int = 4,
) -> list[Price]:
    """The price of every way to use `ranks` ranks, the one that moves least in the forward first.

    Parameters
    ----------
    shapes : mapping
        Global shapes: "q" (B, S, H, D), "k" (B, S_k, H_kv, D), "v" (B, S_k, H_kv, Dv).
    ranks : int
    causal, window, layout, cu_seqlens
        As in `ring_attention`.
    itemsize : int
        Bytes of an element; sums have 4 (8 where it is 8).
    """
    (batch, n_q, heads, size), (_, n_k, kv_heads, _), (_, _, _, v_size) = (shapes[name] for name in ("q", "k", "v"))
    offsets = None if cu_seqlens is None else tuple(int(x) for x in cu_seqlens)
    sums = max(4, itemsize)

    def tokens(length: int) -> list[Tokens]:
        return [place(token_indices(layout, length, ranks, part), offsets) for part in range(ranks)]

    queries, keys = tokens(n_q), tokens(n_k)
    prices = []
    for width in (d for d in range(1, ranks + 1) if ranks % d == 0):
        cuts = [HeadCut.of(heads, kv_heads, width, part) for part in range(width)]
        blocks = [range(first, first + width) for first in range(0, ranks, width)]
        # Heads exchanged: a token's heads go to every other rank of its group, and the result comes back.
        there = back = there_b = back_b = 0
        replicated = kv_heads < width
        for block in blocks:
            for part, rank in enumerate(block):
                others = [cut for number, cut in enumerate(cuts) if number != part]
                q_heads = sum(cut.end - cut.begin for cut in others)
                k_heads = sum(cut.kv_end - cut.kv_begin for cut in others)
                q, k = batch * len(queries[rank]) * q_heads, batch * len(keys[rank]) * k_heads
                there += (q * size + k * (size + v_size)) * itemsize
                back += q * (v_size * itemsize + sums)
                there_b += (q * (size + v_size) + k * (size + v_size)) * itemsize + 2 * q * sums
                back_b += q * size * itemsize + k * (size + v_size) * (sums if replicated else itemsize)
        # Round the rings: to every other block what it needs of a block's tokens, of the heads of one ring.
        q_blocks = tuple(_in_order([queries[r] for r in block]) for block in blocks)
        k_blocks = tuple(_in_order([keys[r] for r in block]) for block in blocks)
        visibility = Visibility(q_blocks, k_blocks, causal, window or 0)
        rings = [
            Sizes(batch, cut.end - cut.begin, _held(cut, heads // kv_heads, replicated), size, v_size, itemsize)
            for cut in cuts
        ]
        round_b = [backward_travel(visibility, ring) for ring in rings]
        prices.append(
            Price(
                width,
                ranks // width,
                there + back + sum(forward_travel(visibility, ring).n_bytes for ring in rings),
                there_b + back_b + sum(travel.n_bytes for travel in round_b),
                tuple(travel.what for travel in round_b),
            )
        )
    return sorted(prices, key=lambda price: price.forward)


def _in_order(parts: list[Tokens]) -> Tokens:
    """The tokens of a block as the exchange of heads leaves them: in the order of the sequence."""
    joined = join(parts)
    order = reading_order(joined)
    return Tokens(joined.position[order], joined.document[order])


def _held(cut: HeadCut, group: int, replicated: bool) -> int:
    """The key heads that a rank has: repeated where its query heads read several, not evenly perhaps."""
    readers = cut.readers(group)
    return len(readers) if replicated and len(set(readers)) > 1 else len(set(readers))


def _travellers(price: Price) -> str:
    """What travels in the backward, where it is not keys as in the forward."""
    with_queries = price.travellers.count("queries")
    if not with_queries:
        return ""
    rings = "" if with_queries == price.heads else f" in {with_queries} of {price.heads} rings"
    return f"   queries travel{rings}"


def explain_attention(
    shapes: Mapping[str, Shape],
    ranks: Any,
    *,
    causal: bool = False,
    window: int | None = None,
    layout: str = "zigzag",
    cu_seqlens: Any = None,
    dtype: Any = np.float32,
) -> str:
    """What attention moves in a ring, with heads exchanged (Ulysses), and in every hybrid, as a table.

    Parameters
    ----------
    shapes : mapping
        Global shapes: "q" (B, S, H, D), "k" (B, S_k, H_kv, D), "v" (B, S_k, H_kv, Dv).
    ranks : int, communicator or Mesh
        How many ranks share the sequence, or what they are.
    causal, window, layout, cu_seqlens
        As in `ring_attention`.
    dtype : dtype
        Of q, k and v.

    Returns
    -------
    text : str
        A line for each way; it ends with "queries travel" where these, not keys, travel in the backward of a ring.

    Raises
    ------
    LayoutError, ShapeError
        Where the layout is unknown, or shapes do not fit together.

    Notes
    -----
    Not collective: nothing is sent.
    """
    if layout not in LAYOUTS:
        raise LayoutError(f"explain_attention: layout is {layout!r}; expected one of {', '.join(LAYOUTS)}")
    q, k, v = (tuple(shapes[name]) for name in ("q", "k", "v"))
    if not (len(q) == len(k) == len(v) == 4 and q[0] == k[0] and q[3] == k[3] and k[:3] == v[:3]) or q[2] % max(
        1, k[2]
    ):
        raise ShapeError(
            f"explain_attention: q {q}, k {k} and v {v} do not fit; expected (B, S, H, D) with H a multiple"
        )
    count = ranks if isinstance(ranks, int) else getattr(ranks, "comm", ranks).Get_size()
    prices = attention_prices(
        shapes, count, causal=causal, window=window, layout=layout, cu_seqlens=cu_seqlens,
        itemsize=np.dtype(dtype).itemsize,
    )  # fmt: skip
    mask = [f"window {window}"] * bool(window) + ["causal"] * causal + ["packed documents"] * (cu_seqlens is not None)
    lines = [
        f"attention of q {q}, k {k}, v {v} in {np.dtype(dtype)}",
        f"on {count} ranks, {layout}, {', '.join(mask) or 'no mask'}",
        f"  {'way':<30}{'forward':>14}{'backward':>14}   MB sent by a rank on average",
    ]
    for price in prices:
        forward, backward = (f"{x / count / 1e6:.3f}" for x in (price.forward, price.backward))
        lines.append(f"  {price.name:<30}{forward:>14}{backward:>14}{_travellers(price)}")
    together = min(prices, key=lambda price: price.forward + price.backward)
    lines.append(f"  least forward: {prices[0].name}; least forward and backward: {together.name}")
    return "\n".join(lines)
