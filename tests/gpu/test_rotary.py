"""Rotary embedding on the GPU against float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pointwise_operands import BF16, F64, TYPES, Guarded, draw, error_is_below, smallest, sum_type, unit

from fivedp.kernels.cuda.rotary import rotary

# (shape, rotated elements): aligned halves, odd halves, a part of the head, one pair, none, no tokens.
CASES = [
    ((2, 5, 3, 32), 32),
    ((7, 2, 14), 14),
    ((3, 40, 1, 24), 16),
    ((2, 3, 2, 10), 6),
    ((9, 1, 2), 2),
    ((4, 2, 5), 0),
    ((0, 2, 8), 8),
    ((2, 1, 300, 128), 128),
]


def angles_of(positions: Any, rotated: int, base: float) -> Any:
    return positions[..., None] * base ** (-2.0 * np.arange(rotated // 2) / max(rotated, 1))


def turned(x: Any, angles: Any, interleaved: bool) -> Any:
    """x in float64 with its first 2 * angles.shape[-1] elements turned; angles: (..., tokens, pairs)."""
    y, half = x.astype(F64), angles.shape[-1]
    low, high = (
        (slice(0, 2 * half, 2), slice(1, 2 * half, 2)) if interleaved else (slice(0, half), slice(half, 2 * half))
    )
    a, b = y[..., low].copy(), y[..., high].copy()
    cosine, sine = np.cos(angles)[..., None, :], np.sin(angles)[..., None, :]
    y[..., low], y[..., high] = a * cosine - b * sine, a * sine + b * cosine
    return y


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("tables", [False, True], ids=["base", "tables"])
def test_pairs_are_turned_and_turned_back(
    xp: Any, host: Any, seed: int, dtype: Any, interleaved: bool, tables: bool
) -> None:
    rng, sums = np.random.default_rng(seed), sum_type(dtype)
    for number, (shape, rotated) in enumerate(CASES):
        tokens = shape[-3]
        place: dict[str, int] = [{}, {"offset": 1, "gap": 3}, {"gap": 16}][(number + int(rng.integers(3))) % 3]
        per_sequence = len(shape) == 4 and bool(rng.integers(2))
        positions = rng.integers(0, 50 if tables else 1_000_000, (shape[0], tokens) if per_sequence else tokens)
        angles, given = angles_of(positions.astype(F64), rotated, 1e4), {}
        if tables:
            all_angles = angles_of(np.arange(50.0), rotated, 1e4)
            given = {"cosines": xp.asarray(np.cos(all_angles).astype(sums))}
            given |= {"sines": xp.asarray(np.sin(all_angles).astype(sums))}
        x = draw(rng, shape, dtype)
        source, result = Guarded(xp, shape, dtype, values=x, **place), Guarded(xp, shape, dtype, **place)
        options: dict[str, Any] = {"rotated": rotated, "interleaved": interleaved, "positions": xp.asarray(positions)}
        rotary(source.array, result.array, **options, **given)
        right = turned(x, angles, interleaved)
        # An angle of 10^6 is right to 2^-53 of it in either computation, and the power to some units.
        size = abs(x.astype(F64)).max(initial=0) * (6 * unit(sums) + 1e6 * 40 * 2.0**-53)
        error_is_below(host(result.array), right, 2 * size + unit(dtype) * abs(right) + smallest(dtype))
        # Back, in place: the backward is the transposed rotation.
        stored = host(result.array).copy()
        rotary(result.array, result.array, inverse=True, **options, **given)
        back = turned(stored, -angles, interleaved)
        error_is_below(host(result.array), back, 3 * size + unit(dtype) * abs(back) + smallest(dtype))
        result.check(host)


def test_positions_count_from_zero_in_every_sequence(xp: Any, host: Any, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, y = draw(rng, (3, 11, 2, 8), F64), xp.full((3, 11, 2, 8), np.nan)
    rotary(xp.asarray(x), y, base=500.0)
    error_is_below(host(y), turned(x, angles_of(np.arange(11.0), 8, 500.0), False), 1e-13)


def test_heads_within_a_joined_projection(xp: Any, host: Any, seed: int) -> None:
    rng = np.random.default_rng(seed)
    joined = draw(rng, (6, 5, 16), BF16)  # queries and keys of a token side by side
    device = xp.asarray(joined.copy())
    rotary(device[:, 3:], device[:, 3:])
    right = turned(joined[:, 3:], angles_of(np.arange(6.0), 16, 1e4), False)
    error_is_below(host(device)[:, 3:], right, 2.0**-8 * abs(right) + 1e-5)
    np.testing.assert_array_equal(host(device)[:, :3], joined[:, :3])


def test_a_position_beyond_the_tables_is_nan(xp: Any, host: Any) -> None:
    table, x = xp.ones((4, 2), np.float32), xp.ones((3, 1, 4), np.float32)
    y = xp.zeros((3, 1, 4), np.float32)
    rotary(x, y, cosines=table, sines=table, positions=xp.asarray(np.array([3, 4, -1])))
    np.testing.assert_array_equal(np.isnan(host(y)).all(axis=(1, 2)), [False, True, True])


def test_what_does_not_fit_is_named(xp: Any) -> None:
    x, y = xp.zeros((3, 1, 4), np.float32), xp.zeros((3, 1, 4), np.float32)
    with pytest.raises(ValueError, match="rotary: rotated is 3 of a head size of 4; an even number up to it"):
        rotary(x, y, rotated=3)
    with pytest.raises(ValueError, match="rotary: one of cosines and sines is None; both, or neither, would be right"):
        rotary(x, y, cosines=xp.ones((4, 2), np.float32))
    with pytest.raises(ValueError, match=r"rotary: positions has shape \(4,\); \(3,\) would be right"):
        rotary(x, y, positions=xp.zeros(4, np.int64))
