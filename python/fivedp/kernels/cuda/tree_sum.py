"""The sum of partial products on a GPU, in the tree of one whole product: the bits of the CPU's sum."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fivedp.kernels.cuda._extension import extension, raw, serves, stream_of

__all__ = ["MAX_PARTIALS", "serves", "tree_sum"]

Array = Any

# How many addresses a kernel is given.
MAX_PARTIALS = 64


def tree_sum(
    partials: Sequence[Array],
    spans: Sequence[tuple[int, int]],
    out: Array,
    *,
    alpha: float = 1.0,
    beta: float = 0.0,
) -> None:
    """out = alpha * (sum of the partial products, in the tree of one whole product) + beta * out.

    Parameters
    ----------
    partials : sequence of at most 64 arrays, each (m, n) or (batch, m, n)
        float32 or float64, on one device. Any strides.
    spans : sequence of (first_shard, n_shards)
        As for `fivedp.kernels.gemm.tree_sum`.
    out : array of the partials' shape
        The partials' type, or bfloat16 or float16 for float32 partials. Any strides; it may be one of the partials.
        Not read where beta is 0.

    Raises
    ------
    ValueError, TypeError
        Shapes, spans or types that do not fit together.
    """
    extension().tree_sum(list(partials), list(spans), raw(out, "tree_sum: out"), alpha, beta, stream_of(out))
