"""Which (token, expert) pairs an expert of limited capacity keeps, over all ranks of a batch.

By position: the first choices of all tokens, in the order of tokens, before the second choices. A pair's position is
how many pairs of its expert come before it; an exclusive scan of counts over slots and ranks says how many of those
are elsewhere. By score: the highest, ties to the lower token. All ranks find the lowest score that stays by a radix
select from the highest digit down: one histogram of 256 bins per expert and digit.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from fivedp.ops.batch_ranks import BatchRanks

Array = Any
Integers = npt.NDArray[np.int64]
_DIGIT_BITS = 8
_DIGITS = 1 << _DIGIT_BITS


def capacity_of(factor: float, tokens: int, top_k: int, n_experts: int) -> int:
    """ceil(factor * tokens * top_k / n_experts), the factor taken as the decimal number that it is written as."""
    return math.ceil(Fraction(repr(float(factor))) * tokens * top_k / n_experts)


def pairs_before(choices: Integers, rank: int) -> Integers:
    """How many pairs come before the first one of each slot and expert on a rank, (k, E), by position.

    Parameters
    ----------
    choices : int64 (ranks, k, E)
        How often every rank chose an expert in a slot.
    """
    of_slot = choices.sum(0)
    return np.asarray(np.cumsum(of_slot, axis=0) - of_slot + choices[:rank].sum(0))


def keep_highest(
    ranks: BatchRanks, experts: npt.NDArray[Any], scores: Array, totals: Integers, capacity: int
) -> npt.NDArray[np.bool_]:
    """Which of this rank's pairs are among the `capacity` highest of their expert over all ranks.

    Parameters
    ----------
    ranks : BatchRanks
    experts : int (pairs,)
        Without those that are known not to stay, if that is convenient.
    scores : float32 or float64 (pairs,)
        In the order of tokens, on each rank and over the ranks; equal scores go to the lower token.
    totals : int64 (E,)
        Pairs of every expert on all ranks, with those that were left out.
    capacity : int

    Notes
    -----
    Collective over the ranks where any expert has too many pairs.
    """
    kept: npt.NDArray[np.bool_] = (totals <= capacity)[experts]
    crowded = np.flatnonzero(totals > capacity)
    if not crowded.size:
        return kept
    place = np.zeros(len(totals), np.int64)
    place[crowded] = np.arange(crowded.size)
    # The pairs whose fate is open: the digits read so far are those of the lowest score that stays.
    pairs = np.flatnonzero(~kept)
    race, keys = place[experts[pairs]], _in_order(scores[pairs])
    wanted = np.full(crowded.size, capacity, np.int64)
    rows = np.arange(crowded.size)
    for shift in range(8 * keys.itemsize - _DIGIT_BITS, -1, -_DIGIT_BITS):
        digit = ((keys >> keys.dtype.type(shift)) & keys.dtype.type(_DIGITS - 1)).astype(np.int64)
        mine = np.bincount(race * _DIGITS + digit, minlength=crowded.size * _DIGITS).astype(np.int32)
        everyone = ranks.gather(mine.reshape(crowded.size, _DIGITS))
        histogram = everyone.sum(0, dtype=np.int64)
        at_least = np.cumsum(histogram[:, ::-1], axis=1)[:, ::-1]  # pairs with this digit or a higher one
        lowest = _DIGITS - 1 - np.argmax(at_least[:, ::-1] >= wanted[:, None], axis=1)
        wanted -= at_least[rows, lowest] - histogram[rows, lowest]
        kept[pairs[digit > lowest[race]]] = True
        open_still = digit == lowest[race]
        pairs, race, keys = pairs[open_still], race[open_still], keys[open_still]
    # What is left of an expert's pairs has one score; the first ones stay.
    on_lower_ranks = everyone[: ranks.index, rows, lowest].sum(0, dtype=np.int64)
    kept[pairs] = on_lower_ranks[race] + _running_number(race, crowded.size) < wanted[race]
    return kept


def _in_order(scores: Array) -> Array:
    """Unsigned numbers in the order of the scores; -0 as 0."""
    kind = np.dtype(f"u{scores.itemsize}")
    bits = (scores + 0).view(kind)
    sign = kind.type(1 << (8 * scores.itemsize - 1))
    return np.where(bits & sign, ~bits, bits | sign)


def _running_number(labels: Integers, n_labels: int) -> Integers:
    """For each entry, how many of the same label come before it."""
    order = np.argsort(labels, kind="stable")
    counts = np.bincount(labels, minlength=n_labels)
    numbers = np.empty(len(labels), np.int64)
    numbers[order] = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    return numbers


def slots_of(taken: npt.NDArray[np.bool_]) -> npt.NDArray[np.int32]:
    """The experts that took each token, rising, as wide as the token with most of them, filled up with -1."""
    tokens, experts = np.nonzero(taken)
    counts = taken.sum(1)
    result = np.full((len(taken), int(counts.max(initial=0))), -1, np.int32)
    result[tokens, np.arange(len(tokens)) - np.repeat(np.cumsum(counts) - counts, counts)] = experts
    return result
