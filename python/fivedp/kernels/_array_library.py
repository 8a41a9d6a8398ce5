"""Products and tree sums through the array library itself: complex numbers, CuPy arrays, and FIVEDP_GEMM=blas.

Complex products keep the tree over the virtual shards (a shard is one call of the library), so cuts of 1, 2, 4 or 8
ranks give the same tree; the bits within a shard are the library's. CuPy and BLAS products sum all of K in one call.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

Array = Any
DEFAULT_SHARDS = 8


def default_cuts(k: int, n_shards: int = DEFAULT_SHARDS) -> list[int]:
    """Borders of `n_shards` virtual shards of `k`, cut as `numpy.array_split` cuts."""
    return [shard * (k // n_shards) + min(shard, k % n_shards) for shard in range(n_shards + 1)]


def combine(sums: Sequence[tuple[int, Array]]) -> Array:
    """Add (leaves, array) pairs by the binary counter: equal sizes as they come, what is left from the smallest up."""
    stack: list[tuple[int, Array]] = []
    for leaves, value in sums:
        while stack and stack[-1][0] == leaves:
            left, other = stack.pop()
            leaves, value = left + leaves, other + value
        stack.append((leaves, value))
    leaves, value = stack.pop()
    while stack:
        value = stack.pop()[1] + value
    return value


def finish(total: Array, c: Array, alpha: complex, beta: complex) -> None:
    """Write alpha * total + beta * c into c, which is not read where beta is 0."""
    if alpha != 1:
        total = total * total.dtype.type(alpha)
    if beta != 0:
        total = total + total.dtype.type(beta) * c.astype(total.dtype, copy=False)
    c[...] = total.astype(c.dtype, copy=False)


def _join(xp: Any, pieces: Sequence[Array], axis: int) -> Array:
    return pieces[0] if len(pieces) == 1 else xp.concatenate(pieces, axis=axis)


def _wide(array: Array) -> Array:
    """bfloat16 as float32: NumPy's own bfloat16 product is slow and rounds every step."""
    return array.astype(np.float32) if array.dtype.kind == "V" or array.dtype.name == "bfloat16" else array


def check_shapes(a: Sequence[Array], b: Sequence[Array], c: Array) -> int:
    """Check what one product needs, and return k."""
    if not a or not b:
        raise ValueError(f"gemm: {'b' if a else 'a'} has no pieces; at least one array would be right")
    for name, pieces in (("a", a), ("b", b)):
        for piece in pieces:
            if piece.ndim not in (2, 3):
                raise ValueError(f"gemm: {name} has {piece.ndim} dimensions; 2, or 3 with a batch, would be right")
            if piece.dtype != pieces[0].dtype:
                raise TypeError(f"gemm: {name} has pieces of {pieces[0].dtype} and {piece.dtype}; one type is right")
    k_a, k_b = sum(p.shape[-1] for p in a), sum(p.shape[-2] for p in b)
    if k_a != k_b:
        raise ValueError(f"gemm: k is {k_a} in a and {k_b} in b; they must agree")
    batch = a[0].shape[:-2] or b[0].shape[:-2]
    wanted = (*batch, a[0].shape[-2], b[0].shape[-1])
    if tuple(c.shape) != wanted:
        raise ValueError(f"gemm: c has shape {tuple(c.shape)}; a and b give {wanted}")
    if a[0].dtype != b[0].dtype:
        raise TypeError(f"gemm: a is {a[0].dtype} and b is {b[0].dtype}; one type would be right")
    return int(k_a)


def whole_product(
    xp: Any, a: Sequence[Array], b: Sequence[Array], c: Array, alpha: float | complex, beta: float | complex
) -> None:
    """C = alpha * A B + beta * C in one call of the library over all of K.

    Where beta is 0 and C is of the product's type and contiguous, or the transpose of what is, the library writes C
    itself; elsewhere the product is made first.
    """
    check_shapes(a, b, c)
    left, right = _join(xp, a, -1), _join(xp, b, -2)
    if xp is np:
        left, right = _wide(left), _wide(right)
    if beta == 0 and left.dtype == c.dtype:
        # CuPy makes a temporary for an `out` that is not C-contiguous: the transposed product is the same.
        turned = c.swapaxes(-1, -2)
        if xp is not np and not c.flags.c_contiguous and turned.flags.c_contiguous:
            xp.matmul(right.swapaxes(-1, -2), left.swapaxes(-1, -2), out=turned)
        else:
            xp.matmul(left, right, out=c)
        if alpha != 1:
            xp.multiply(c, c.dtype.type(alpha), out=c)
        return
    finish(xp.matmul(left, right), c, alpha, beta)


def shard_product(
    a: Sequence[Array],
    b: Sequence[Array],
    c: Array,
    cuts: Sequence[int] | None,
    alpha: float | complex,
    beta: float | complex,
) -> None:
    """C = alpha * A B + beta * C, one call of NumPy per virtual shard, joined in the tree."""
    k = check_shapes(a, b, c)
    borders = default_cuts(k) if cuts is None else [int(cut) for cut in cuts]
    if len(borders) < 2 or borders[0] != 0 or borders[-1] != k or any(x > y for x, y in itertools.pairwise(borders)):
        raise ValueError(f"gemm: cuts is {borders}; rising borders from 0 to k = {k} would be right")
    left, right = _join(np, a, -1), _join(np, b, -2)
    finish(
        combine([(1, np.matmul(left[..., :, i:j], right[..., i:j, :])) for i, j in itertools.pairwise(borders)]),
        c,
        alpha,
        beta,
    )
