"""How many cases a test draws."""

from __future__ import annotations

import os


def cases(number: int) -> int:
    """`number`, or the share of it that FIVEDP_TEST_CASES says: 0.25, say, for a run on another MPI."""
    return max(5, round(number * float(os.environ.get("FIVEDP_TEST_CASES", "1"))))
