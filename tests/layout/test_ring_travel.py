"""What travels in a ring: counted once more from every pair of tokens, and who then computes how much in which step."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fivedp.layout.ring_travel import Sizes, Travel, Visibility, backward_travel, forward_travel
from fivedp.layout.sequence import LAYOUTS, Tokens, place, token_indices

MANY_HEADS, GROUPED = Sizes(2, 8, 8, 16, 12, 4), Sizes(2, 8, 2, 16, 12, 4)


def visibility(layout: str, queries: int, keys: int, ranks: int, causal: bool = False, window: int = 0,
               offsets: Any = None) -> Visibility:  # fmt: skip
    places = (
        tuple(place(token_indices(layout, length, ranks, rank), offsets) for rank in range(ranks))
        for length in (queries, keys)
    )
    return Visibility(*places, causal, window)


def at(positions: list[int]) -> Tokens:
    return Tokens(np.array(positions, np.int32), np.zeros(len(positions), np.int32))


def sees(queries: Tokens, keys: Tokens, causal: bool, window: int) -> Any:
    """The matrix of every query and every key."""
    apart = queries.position[:, None].astype(np.int64) - keys.position
    seen = queries.document[:, None] == keys.document
    if causal:
        seen &= apart >= 0
    return seen & (np.maximum(apart, -apart if not causal else apart) < window) if window else seen


def counted(seen: Any, axis: int) -> int:
    """How long the range of tokens is that see, or are seen by, any of the others."""
    numbers = np.flatnonzero(seen.any(axis=axis))
    return int(numbers[-1] - numbers[0]) + 1 if len(numbers) else 0


def token_bytes(sizes: Sizes) -> tuple[int, int]:
    """Of a key and of a query on its way in the backward, array by array."""
    b, s = sizes.itemsize, 8 if sizes.itemsize == 8 else 4
    arrays = {
        "k": (sizes.kv_heads * sizes.size, b), "v": (sizes.kv_heads * sizes.v_size, b),
        "dk": (sizes.kv_heads * sizes.size, s), "dv": (sizes.kv_heads * sizes.v_size, s),
        "q": (sizes.heads * sizes.size, b), "do": (sizes.heads * sizes.v_size, b),
        "lse": (sizes.heads, s), "delta": (sizes.heads, s), "dq": (sizes.heads * sizes.size, s),
    }  # fmt: skip
    cost = {name: sizes.batch * elements * n_bytes for name, (elements, n_bytes) in arrays.items()}
    return sum(cost[x] for x in ("k", "v", "dk", "dv")), sum(cost[x] for x in ("q", "do", "lse", "delta", "dq"))


@given(data=st.data())
def test_what_is_fewer_bytes_travels_unless_work_is_uneven(data: st.DataObject) -> None:
    draw = data.draw
    ranks, layout = draw(st.integers(1, 6)), draw(st.sampled_from([*LAYOUTS, "anywhere"]))
    queries = draw(st.integers(0, 40))
    keys = draw(st.just(queries) | st.integers(0, 40))
    causal, window = draw(st.booleans()), draw(st.sampled_from([0, 1, 3, 10]))
    group, kv_heads = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    sizes = Sizes(draw(st.integers(1, 2)), kv_heads * group, kv_heads, draw(st.integers(1, 20)),
                  draw(st.integers(1, 60)), draw(st.sampled_from([2, 4, 8])))  # fmt: skip
    if layout == "anywhere":
        positions = st.lists(st.lists(st.integers(0, 30), max_size=8).map(at), min_size=ranks, max_size=ranks)
        view = Visibility(tuple(draw(positions)), tuple(draw(positions)), causal, window)
    else:
        ends = sorted({0, *draw(st.lists(st.integers(0, 40), max_size=3)), max(queries, keys)})
        view = visibility(layout, queries, keys, ranks, causal, window, draw(st.sampled_from([None, ends])))

    n_keys = n_queries = 0
    work = np.zeros((ranks, ranks), int)
    for r, mine in enumerate(view.queries):
        for s, theirs in enumerate(view.keys):
            seen = sees(mine, theirs, causal, window)
            keys_seen, queries_seeing = counted(seen, 0), counted(seen, 1)
            work[r, s] = keys_seen * queries_seeing
            if r != s:
                n_keys, n_queries = n_keys + keys_seen, n_queries + queries_seeing
    key_bytes, query_bytes = token_bytes(sizes)
    with_keys, with_queries = n_keys * key_bytes, n_queries * query_bytes
    uneven = work.sum(axis=0).max() > 1.25 * work.sum(axis=1).max()

    found = backward_travel(view, sizes)
    assert found.n_bytes == (with_keys if uneven else min(with_keys, with_queries))
    assert found.what == ("queries" if with_queries < with_keys and not uneven else "keys")
    assert found.spans == (view.seen if found.what == "keys" else view.seeing)
    forward = forward_travel(view, sizes)
    assert forward.what == "keys"
    assert forward.n_bytes == n_keys * sizes.batch * sizes.kv_heads * (sizes.size + sizes.v_size) * sizes.itemsize


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("causal", [False, True])
def test_queries_travel_where_every_head_has_its_own_keys_or_they_are_few(layout: str, causal: bool) -> None:
    whole = visibility(layout, 96, 96, 4, causal)
    assert backward_travel(whole, MANY_HEADS).what == "queries"
    assert backward_travel(whole, GROUPED).what == "keys"
    few = visibility(layout, 16, 96, 4)
    assert backward_travel(few, GROUPED).what == "queries"


def test_keys_travel_where_queries_would_meet_them_all_on_one_rank() -> None:
    queries = tuple(at([2 * rank, 2 * rank + 1]) for rank in range(4))
    keys = (at(list(range(8))), *[at([])] * 3)
    view = Visibility(queries, keys, causal=False, window=0)
    assert view.n_seeing * MANY_HEADS.queries_backward < view.n_seen * MANY_HEADS.keys_backward
    assert backward_travel(view, MANY_HEADS).what == "keys"
    scattered = Visibility(keys, queries, causal=False, window=0)  # the other way round work becomes more even
    assert scattered.most_pairs == (64, 16)


def pairs_by_step(view: Visibility, travel: Travel) -> Any:
    """[step, rank]: the visible pairs that a rank computes in a step."""
    ranks = len(view.keys)
    pairs = np.zeros((ranks, ranks), int)
    for rank in range(ranks):
        for step in range(ranks):
            other = (rank - travel.stride * step) % ranks
            r, s = (rank, other) if travel.what == "keys" else (other, rank)
            seen = sees(view.queries[r], view.keys[s], view.causal, view.window)
            pairs[step, rank] = seen.sum()
            if r != s:  # everything that is seen has travelled
                begin, end = travel.spans[rank][other]
                assert seen.sum() == (seen[:, begin:end] if travel.what == "keys" else seen[begin:end]).sum()
    return pairs


@pytest.mark.parametrize("sizes", [GROUPED, MANY_HEADS], ids=["keys travel", "queries travel"])
@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_a_causal_zigzag_gives_every_rank_equally_much_in_every_step(ranks: int, sizes: Sizes) -> None:
    n = 12
    view = visibility("zigzag", n * ranks, n * ranks, ranks, causal=True)
    pairs = pairs_by_step(view, backward_travel(view, sizes))
    assert (pairs[1:] == n * n // 2).all()
    assert len(set(pairs[0])) == 1


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("window", [0, 9])
def test_work_is_mirrored_where_queries_travel(layout: str, window: int) -> None:
    """Rank r does in each step what rank p - 1 - r does where keys travel: no layout becomes worse by it."""
    view = visibility(layout, 60, 60, 5, causal=True, window=window)
    queries, keys = (backward_travel(view, sizes) for sizes in (MANY_HEADS, GROUPED))
    assert (queries.what, keys.what) == ("queries", "keys")
    with_queries, with_keys = pairs_by_step(view, queries), pairs_by_step(view, keys)
    if layout == "zigzag":  # its mirror is another order of the ranks
        with_queries, with_keys = np.sort(with_queries), np.sort(with_keys)
    else:
        with_queries = with_queries[:, ::-1]
    assert (with_queries == with_keys).all()
