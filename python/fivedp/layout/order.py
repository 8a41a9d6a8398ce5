"""Runs and orders of small numbers, without comparing."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def stable_order(keys: Array) -> npt.NDArray[np.int64]:
    """The permutation that sorts small numbers and keeps equal ones in their order."""
    small = keys.max(initial=0) < 1 << 16
    order: npt.NDArray[np.int64] = np.argsort(keys.astype(np.uint16) if small else keys, kind="stable")
    return order


def begins(*columns: Array) -> npt.NDArray[np.bool_]:
    """Where any of the columns differs from the element before; the first is True."""
    changes = np.ones(len(columns[0]), np.bool_)
    if len(columns[0]):
        changes[1:] = columns[0][1:] != columns[0][:-1]
        for column in columns[1:]:
            changes[1:] |= column[1:] != column[:-1]
    return changes


def starts(first: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """The borders of runs, from whether each element is the first of its run."""
    return np.append(np.flatnonzero(first), len(first)).astype(np.int64)
