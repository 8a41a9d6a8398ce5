"""Experts over ranks are those of `numpy.array_split`, and each rank's are the fewest subtrees of one fixed tree."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fivedp.layout.experts import cut_experts, middle, subtrees

Range = tuple[int, int]
# Every count that published models have, and their neighbours.
COUNTS = (*range(1, 33), 48, 60, 61, 63, 64, 65, 72, 127, 128, 129, 160, 255, 256, 257, 384, 512)


def nodes(begin: int, end: int) -> dict[Range, Range | None]:
    """Every node of the tree over [begin, end), and its parent."""
    found: dict[Range, Range | None] = {(begin, end): None} if begin < end else {}
    if end - begin > 1:
        first = (end - begin + 1) // 2  # the first half gets the odd one
        for half in ((begin, begin + first), (begin + first, end)):
            found |= nodes(*half) | {half: (begin, end)}
    return found


def halved(begin: int, end: int, parts: int) -> list[Range]:
    """The range cut into 2^m parts by halving it m times."""
    if parts == 1:
        return [(begin, end)]
    half = begin + (end - begin + 1) // 2
    return halved(begin, half, parts // 2) + halved(half, end, parts // 2)


def owned(n_experts: int, n_ranks: int) -> list[Range]:
    pieces = np.array_split(np.arange(n_experts), n_ranks)
    borders = np.cumsum([0, *map(len, pieces)]).tolist()
    return list(itertools.pairwise(borders))


def test_first_half_gets_the_odd_one() -> None:
    assert [middle(0, n) for n in (2, 3, 4, 5, 7, 8)] == [1, 2, 2, 3, 4, 4]
    assert middle(4, 7) == 6


@given(n_experts=st.integers(0, 150), cut=st.lists(st.integers(0, 150), min_size=2, max_size=2))
def test_subtrees_are_the_largest_nodes_within_a_range(n_experts: int, cut: list[int]) -> None:
    begin, end = sorted(min(c, n_experts) for c in cut)
    tree = nodes(0, n_experts)
    found = subtrees(n_experts, (begin, end))
    assert [e for low, high in found for e in range(low, high)] == list(range(begin, end)), "not a cover, or no order"
    for node in found:
        assert node in tree
        parent = tree[node]
        assert parent is None or not (begin <= parent[0] and parent[1] <= end), "the parent lies within the range too"


@pytest.mark.parametrize("n_ranks", [*range(1, 17), 24, 64, 72])
def test_every_expert_has_its_owner_and_its_subtree(n_ranks: int) -> None:
    for n_experts in COUNTS:
        cut = cut_experts(n_experts, n_ranks)
        ranges = owned(n_experts, n_ranks)
        assert [cut.of(rank) for rank in range(n_ranks)] == ranges
        assert cut.owner.tolist() == [rank for rank, (begin, end) in enumerate(ranges) for _ in range(begin, end)]
        expected = [node for mine in ranges for node in subtrees(n_experts, mine)]
        numbered = [number for number, (begin, end) in enumerate(expected) for _ in range(begin, end)]
        assert cut.subtree.tolist() == numbered, n_experts


def agrees(n_experts: int, n_ranks: int) -> bool:
    """Whether halving gives every rank the experts that the block rule gives it."""
    return halved(0, n_experts, n_ranks) == owned(n_experts, n_ranks)


@pytest.mark.parametrize("n_ranks", [1, 2, 4, 8, 16, 32, 64])
def test_powers_of_two_own_one_subtree_each_where_halving_agrees_with_the_block_rule(n_ranks: int) -> None:
    agreeing = 0
    for n_experts in COUNTS:
        several = [rank for rank, mine in enumerate(owned(n_experts, n_ranks)) if len(subtrees(n_experts, mine)) > 1]
        if n_experts % n_ranks == 0:
            assert agrees(n_experts, n_ranks), n_experts
        if agrees(n_experts, n_ranks):
            agreeing += 1
            assert not several, f"{n_experts} experts: ranks {several}"
    assert agreeing >= 5


def test_where_halving_differs_a_rank_owns_a_few_subtrees() -> None:
    assert agrees(127, 8)
    assert not agrees(60, 8)
    # 60 halves into 30 + 30, 15 + 15, 8 + 7: rank 1 owns [8, 16), whose last expert is of the next quarter.
    assert subtrees(60, (8, 16)) == [(8, 15), (15, 16)]
    # No rank ever owns more than two subtrees of each size.
    for n_experts, n_ranks in itertools.product(COUNTS, range(1, 17)):
        for begin, end in owned(n_experts, n_ranks):
            assert len(subtrees(n_experts, (begin, end))) <= 2 * max(1, (end - begin).bit_length())


def test_tables_are_shared_and_cannot_be_written_to() -> None:
    cut = cut_experts(7, 3)
    assert cut_experts(7, 3) is cut
    for table in (cut.owner, cut.subtree):
        with pytest.raises(ValueError, match="read-only"):
            table[0] = 1
