"""How many cases a test draws."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence


def cases(number: float) -> int:
    """`number`, or the share of it that FIVEDP_TEST_CASES says: 0.25, say, for a run on another MPI."""
    return max(5, math.ceil(number * float(os.environ.get("FIVEDP_TEST_CASES", "1"))))


def dealt(number: int, ranks: Sequence[int], n_ranks: int) -> int:
    """What the launch on `n_ranks` draws of `number` cases, which launches on all of `ranks` draw together.

    Every rank draws and builds a case, so on two cores it takes time by the number of ranks beyond two. Cases are dealt
    so that each launch takes as long as the others.
    """

    def speed(n: int) -> float:
        return 1 / max(2, n)

    return cases(number * speed(n_ranks) / sum(map(speed, ranks)))
