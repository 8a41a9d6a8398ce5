"""The order of an owner's rows, found on the GPU: what `fivedp.layout.dispatch.Incoming` finds on the CPU."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from fivedp.kernels.cuda._extension import extension, library_of, stream_of

Array = Any


class RowOrder(NamedTuple):
    """Rows by expert, then source, then row of the source; all arrays on the GPU.

    Attributes
    ----------
    counts, offsets : int64 (E_local,), (E_local + 1,)
        Rows of every expert, and where they begin.
    source, token, row : int32 (n,)
        Of every place: the rank it came from, the token's row there, and its number among the rows which that rank
        sends. n is the number of pairs; behind the last row, offsets[E_local], all are -1.
    weights : (n,) or None
        0 behind the last row.
    positions : int32 (n,)
        The place of every pair; -1 where its expert is none of these.
    n_rows : int64 (sources,)
        How many rows each rank sends.
    """

    counts: Array
    offsets: Array
    source: Array
    token: Array
    row: Array
    weights: Array | None
    positions: Array
    n_rows: Array


def dispatch_order(
    expert: Array,
    token: Array | None,
    weights: Array | None,
    n_experts: int,
    *,
    first_expert: int = 0,
    lengths: Sequence[int] | None = None,
) -> RowOrder:
    """Where the row of every pair goes.

    Parameters
    ----------
    expert : int32 (n,), or (T, k)
        The expert of every pair. A pair has no place unless first_expert <= expert < first_expert + n_experts: slots
        that are empty or were dropped are -1.
    token : int32 (n,), or None
        The token's row on its source, rising within a source, no expert twice for one. None where pairs are (T, k):
        one source, a token for every row.
    weights : float32 or float64, as many as pairs; or None
    n_experts : int
        At most 2048.
    first_expert : int
    lengths : sequence of int, optional
        How many pairs come from each source, in this order; one source by default.

    Raises
    ------
    ValueError, TypeError
        Shapes or types that do not fit together.
    """
    xp, module = library_of(expert), extension()
    if (token is None) != (expert.ndim == 2):
        raise ValueError(
            f"dispatch_order: expert has {expert.ndim} dimensions and token is "
            f"{'None' if token is None else 'an array'}; one dimension with tokens, or two without, would be right"
        )
    n = expert.size
    lengths = [n] if lengths is None else list(lengths)
    if sum(lengths) != n or not lengths or min(lengths) < 0 or (token is None and len(lengths) != 1):
        raise ValueError(f"dispatch_order: lengths is {lengths} of {n} pairs; the pairs of every source would be right")
    tiles = [-(-length // module.TILE_PAIRS) for length in lengths]
    borders = np.array([[0, *itertools.accumulate(lengths)], [0, *itertools.accumulate(tiles)]], np.int64)
    starts, first_tile = xp.asarray(borders)
    order = RowOrder(
        counts=xp.empty(n_experts, np.int64),
        offsets=xp.empty(n_experts + 1, np.int64),
        source=xp.empty(n, np.int32),
        token=xp.empty(n, np.int32),
        row=xp.empty(n, np.int32),
        weights=None if weights is None else xp.empty(n, weights.dtype),
        positions=xp.empty(n, np.int32),
        n_rows=xp.empty(len(lengths), np.int64),
    )
    module.dispatch_order(
        expert.reshape(-1), token, max(1, expert.shape[-1]) if token is None else 1, starts, first_tile, sum(tiles),
        first_expert, None if weights is None else weights.reshape(-1), order.source, order.token, order.row,
        order.weights, order.positions, order.counts, order.offsets, order.n_rows,
        xp.empty((n_experts + 1) * (sum(tiles) + 1), np.int32), stream_of(expert),
    )  # fmt: skip
    return order
