"""Rotary position embedding of queries and keys on a GPU, and its backward, which is the inverse rotation."""

from __future__ import annotations

from typing import Any

from fivedp.kernels.cuda._extension import extension, raw, stream_of

__all__ = ["rotary"]

Array = Any


def rotary(
    x: Array,
    y: Array,
    *,
    cosines: Array | None = None,
    sines: Array | None = None,
    positions: Array | None = None,
    base: float = 10000.0,
    rotated: int | None = None,
    interleaved: bool = False,
    inverse: bool = False,
) -> None:
    """y = x with the pairs of each head turned by the angles of the token's position (Su et al. 2021).

    Pair (a, b) becomes (a cos - b sin, a sin + b cos). Pair i is elements 2 i and 2 i + 1 where `interleaved`, else i
    and i + rotated / 2. Its angle is position * base^(-2 i / rotated), unless tables are given.

    Parameters
    ----------
    x : (tokens, heads, head_size) or (batch, tokens, heads, head_size)
        float32, float64, bfloat16 or float16; contiguous along head_size, any other strides.
    y : array of its shape and type
        Written; may be x.
    cosines, sines : (positions, rotated / 2), optional
        Tables in the type of sums: float64 for float64, else float32; contiguous. A position beyond them gives NaN.
    positions : int64 (tokens,) or (batch, tokens), optional
        A token's position; by default its number in its sequence, from 0.
    base : float
        Of the angles where there are no tables; they are computed in float64.
    rotated : int, optional
        How many elements of each head are rotated, even; the others are copied. Default: all.
    interleaved : bool
        Where the two of a pair lie.
    inverse : bool
        Turn back, as the backward does with dy for x and dx for y.

    Raises
    ------
    ValueError, TypeError
        Shapes or types that do not fit together.
    """
    extension().rotary(
        raw(x, "rotary: x"),
        raw(y, "rotary: y"),
        cosines,
        sines,
        positions,
        base,
        x.shape[-1] if rotated is None else rotated,
        interleaved,
        inverse,
        stream_of(x),
    )
