"""Who owns which expert, and the tree in which a token's experts are summed.

Experts are cut over the ranks by the block rule. The sum over a token's experts has an order of its own that knows
nothing of ranks: the binary tree that halves [0, E) again and again (the first half gets the odd one), with the experts
that the token did not choose left out. An owner whose experts are a whole subtree can therefore add what it has and
send one row home; where its experts are not one subtree, it sends one row for each of the largest subtrees inside
them. Either way the bits are those of one rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from fivedp.layout.shares import Range, border, share

Indices = npt.NDArray[np.int32]
# Below this imbalance of ranks, the busiest over the mean, their own noise is larger.
BALANCED = 1.1


def middle(begin: int, end: int) -> int:
    """Where the subtree over [begin, end) is halved."""
    return begin + (end - begin + 1) // 2


def uniform_subtrees(labels: Sequence[int]) -> list[Range]:
    """The largest subtrees of the tree over all experts whose experts have one label, in rising order."""
    if not len(labels):
        return []
    # The number of the run of equal labels in which each expert is.
    runs = np.cumsum(np.diff(np.asarray(labels), prepend=labels[0]) != 0).tolist()
    found: list[Range] = []
    open_nodes = [(0, len(labels))]
    while open_nodes:
        begin, end = open_nodes.pop()
        if runs[begin] == runs[end - 1]:
            found.append((begin, end))
        else:
            half = middle(begin, end)
            open_nodes += [(half, end), (begin, half)]
    return found


def subtrees(n_experts: int, experts: Range) -> list[Range]:
    """The largest subtrees of the tree over [0, n_experts) that lie within a range of experts, in rising order."""
    inside = [experts[0] <= expert < experts[1] for expert in range(n_experts)]
    return [(begin, end) for begin, end in uniform_subtrees(inside) if inside[begin]]


@lru_cache(maxsize=64)
def tree_paths(n_experts: int) -> npt.NDArray[np.int64]:
    """(E,): the way from the root to every expert, a bit for each step, the first one highest; 1 is the second half.

    The higher the highest bit in which two differ, the higher the smallest subtree that has both.
    """
    found = np.zeros(n_experts, np.int64)
    highest = max(0, n_experts - 1).bit_length() - 1
    open_nodes = [(0, n_experts, highest)]
    while open_nodes:
        begin, end, bit = open_nodes.pop()
        if end - begin > 1:
            half = middle(begin, end)
            found[half:end] |= 1 << bit
            open_nodes += [(begin, half, bit - 1), (half, end, bit - 1)]
    found.flags.writeable = False
    return found


@dataclass(frozen=True)
class ExpertCut:
    """Experts over ranks, as tables by expert; shared by all calls, so not to be written to.

    Attributes
    ----------
    n_experts, n_ranks : int
    borders : tuple of int
        Rank r owns the experts borders[r] <= e < borders[r + 1].
    owner : (n_experts,) int32
    subtree : (n_experts,) int32
        The number of the largest subtree within its owner's experts to which an expert belongs, rising with the expert.
    """

    n_experts: int
    n_ranks: int
    borders: tuple[int, ...]
    owner: Indices
    subtree: Indices

    def of(self, rank: int) -> Range:
        """The experts of a rank."""
        return self.borders[rank], self.borders[rank + 1]


@lru_cache(maxsize=64)
def cut_experts(n_experts: int, n_ranks: int) -> ExpertCut:
    """`n_experts` over `n_ranks` by the block rule."""
    owner, subtree = np.empty(n_experts, np.int32), np.empty(n_experts, np.int32)
    for rank in range(n_ranks):
        owner[slice(*share(n_experts, n_ranks, rank))] = rank
    for number, (begin, end) in enumerate(uniform_subtrees(owner.tolist())):
        subtree[begin:end] = number
    owner.flags.writeable = subtree.flags.writeable = False
    borders = tuple(border(n_experts, n_ranks, rank) for rank in range(n_ranks + 1))
    return ExpertCut(n_experts, n_ranks, borders, owner, subtree)
