"""Which rank holds which token, and whose tokens see each other."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fivedp.layout.sequence import (
    LAYOUTS,
    Span,
    Tokens,
    join,
    place,
    reading_order,
    seeing_spans,
    seen_spans,
    token_indices,
)


@pytest.mark.parametrize("layout", LAYOUTS)
@given(length=st.integers(0, 200), parts=st.integers(1, 9))
def test_every_token_has_one_rank_and_shares_are_even(layout: str, length: int, parts: int) -> None:
    shares = [token_indices(layout, length, parts, part) for part in range(parts)]
    assert sorted(np.concatenate(shares).tolist()) == list(range(length))
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 2  # zigzag's two blocks may both be one longer
    assert all((np.diff(share) > 0).all() for share in shares)


def test_zigzag_pairs_the_first_block_with_the_last() -> None:
    assert token_indices("zigzag", 16, 4, 0).tolist() == [0, 1, 14, 15]
    assert token_indices("zigzag", 16, 4, 3).tolist() == [6, 7, 8, 9]
    assert token_indices("striped", 7, 3, 1).tolist() == [1, 4]
    assert token_indices("contiguous", 7, 3, 1).tolist() == [3, 4]


def test_positions_begin_anew_in_every_document_and_empty_ones_hold_nothing() -> None:
    tokens = place(np.arange(6), (0, 2, 2, 6))
    assert tokens.document.tolist() == [0, 0, 2, 2, 2, 2]
    assert tokens.position.tolist() == [0, 1, 0, 1, 2, 3]
    assert place(np.array([4, 1]), None).position.tolist() == [4, 1]


def test_reading_order_sorts_by_document_and_position() -> None:
    offsets = (0, 5, 9)
    shares = [place(token_indices("zigzag", 9, 3, part), offsets) for part in range(3)]
    joined = join(shares)
    order = reading_order(joined)
    assert joined.document[order].tolist() == [0] * 5 + [1] * 4
    assert joined.position[order].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3]


@given(
    queries=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 40)), max_size=6),
    keys=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 40)), max_size=6),
    causal=st.booleans(),
    window=st.integers(0, 20) | st.just(2**40),
)
def test_the_spans_are_what_looking_at_every_pair_finds(
    queries: list[tuple[int, int]], keys: list[tuple[int, int]], causal: bool, window: int
) -> None:
    def sees(query: tuple[int, int], key: tuple[int, int]) -> bool:
        apart = query[1] - key[1]
        near = not window or (apart < window and (causal or -apart < window))
        return query[0] == key[0] and (apart >= 0 or not causal) and near

    def tokens(pairs: list[tuple[int, int]]) -> Tokens:
        documents, positions = ([pair[i] for pair in pairs] for i in (0, 1))
        return Tokens(np.array(positions, np.int32), np.array(documents, np.int32))

    def span(numbers: list[int]) -> Span:
        return (numbers[0], numbers[-1] + 1) if numbers else (0, 0)

    seen = [number for number, key in enumerate(keys) if any(sees(query, key) for query in queries)]
    seeing = [number for number, query in enumerate(queries) if any(sees(query, key) for key in keys)]
    given_tokens = ((tokens(queries),), (tokens(keys),), causal, window)
    assert seen_spans(*given_tokens) == ((span(seen),),)
    assert seeing_spans(*given_tokens) == ((span(seeing),),)


def test_under_a_causal_mask_later_ranks_of_a_zigzag_see_the_first_half_of_a_share() -> None:
    ranks = tuple(place(token_indices("zigzag", 24, 3, part), None) for part in range(3))
    assert seen_spans(ranks, ranks, True, 0) == (
        ((0, 8), (0, 8), (0, 8)),
        ((0, 4), (0, 8), (0, 8)),
        ((0, 4), (0, 4), (0, 8)),
    )


def test_under_a_causal_mask_the_queries_of_later_ranks_of_a_zigzag_all_see_an_earlier_one() -> None:
    ranks = tuple(place(token_indices("zigzag", 24, 3, part), None) for part in range(3))
    assert seeing_spans(ranks, ranks, True, 0) == (
        ((0, 8), (0, 8), (0, 8)),
        ((4, 8), (0, 8), (0, 8)),
        ((4, 8), (4, 8), (0, 8)),
    )


def test_positions_near_the_largest_are_seen() -> None:
    high = np.array([2**31 - 2])
    ends = (place(np.array([0]), None), place(high, None))
    none, one = (0, 0), (0, 1)
    assert seen_spans(ends, ends, True, 1) == seeing_spans(ends, ends, True, 1) == ((one, none), (none, one))
    assert seen_spans(ends, ends, True, 0) == ((one, none), (one, one))
    assert seeing_spans(ends, ends, True, 0) == ((one, one), (none, one))
    assert seen_spans(ends, ends, False, 0) == seeing_spans(ends, ends, False, 0) == ((one, one), (one, one))
