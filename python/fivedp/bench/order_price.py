"""What the canonical order of a token's sum costs: the tree over its experts against adding the same rows in a row.

While a layer runs, every `combine_rows` in it is repeated in turns on its own arrays: with the experts it was given,
and with experts whose tree is a chain, (((r0 + r1) + r2) + r3) + ..., which is how a plain weighted accumulation goes
through the rows of a token. Kernel, rows and output are the same, so the ratio is that of the orders alone.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fivedp.bench import agree
from fivedp.bench.family import Row
from fivedp.bench.measure import PAIRS, ratio_and_spread
from fivedp.kernels import experts as kernel

# The shortest of up to 5 calls counts, as long as they are short enough for another program to get in between.
TURN_SECONDS, TURN_CALLS = 5e-3, 5
LONGEST_CHAIN = 31  # its tree has 2^30 experts, and their number is one of 32 bits


def chain(starts: NDArray[np.int64]) -> tuple[NDArray[np.int32], int]:
    """Experts, and how many there are in all, for which the rows of each output are added one after another.

    The rows of an output get 0, 1, 2, 4, 8, ...: each is the first of the upper half of the smallest subtree that has
    it and those before it, so it is added to their sum.

    Raises
    ------
    ValueError
        An output has more than 31 rows.
    """
    lengths = np.diff(starts)
    longest = int(lengths.max(initial=1))
    if longest > LONGEST_CHAIN:
        raise ValueError(f"an output has {longest} rows; a chain has at most {LONGEST_CHAIN}")
    place = np.arange(starts[-1]) - np.repeat(starts[:-1], lengths)
    experts = np.where(place == 0, 0, 1 << np.maximum(place - 1, 0)).astype(np.int32)
    return experts, 1 << max(0, longest - 1)


class OrdersInTurns:
    """Adds rows in both orders in turns while `watching`; the canonical one comes last, so results are what they were.

    Attributes
    ----------
    canonical, plain : (PAIRS,) float
        Seconds of all sums so far, turn by turn.
    """

    def __init__(self) -> None:
        self.canonical, self.plain = np.zeros(PAIRS), np.zeros(PAIRS)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Within it the sums of the layer are made in turns."""
        combine = kernel.combine_rows

        def in_turns(
            rows: Any, starts: NDArray[np.int64], weights: Any, experts: NDArray[np.int32], n_experts: int, out: Any
        ) -> None:
            def canonical() -> None:
                combine(rows, starts, weights, experts, n_experts, out)

            if len(experts) == 0 or int(np.diff(starts).max()) > LONGEST_CHAIN:
                return canonical()
            in_a_row, number = chain(starts)

            def plain() -> None:
                combine(rows, starts, weights, in_a_row, number, out)

            plain()  # the rows are in whatever cache they fit
            calls = max(1, min(TURN_CALLS, round(TURN_SECONDS / max(_shortest(canonical, 1), 1e-7))))
            for turn in range(PAIRS):
                self.plain[turn] += _shortest(plain, calls)
                self.canonical[turn] += _shortest(canonical, calls)

        kernel.combine_rows = in_turns
        try:
            yield
        finally:
            kernel.combine_rows = combine

    def price(self, comm: Any) -> Row | None:
        """How many times the plain order's time the canonical one takes over all ranks, and the seconds that it adds.

        None where nothing was added, or too many rows to be added in a chain. Collective. The seconds are the mean over
        the ranks.
        """
        sums = agree.total(comm, *self.canonical, *self.plain)
        canonical, plain = sums[:PAIRS], sums[PAIRS:]
        if not all(plain):
            return None
        pairs = list(zip(canonical, plain, strict=True))
        more = statistics.median(a - b for a, b in pairs) / comm.size
        return {**ratio_and_spread([a / b for a, b in pairs]), "seconds": more}


def _shortest(call: Callable[[], None], calls: int) -> float:
    """The time of the shortest of some calls."""
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)
