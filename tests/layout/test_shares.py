"""Shares are those of `numpy.array_split`, and boxes are sets of elements."""

from __future__ import annotations

import itertools

import numpy as np

from fivedp.layout.shares import border, intersect, local_slices, part_number, share, volume


def test_shares_are_those_of_array_split() -> None:
    for size, parts in itertools.product(range(40), range(1, 13)):
        pieces = np.array_split(np.arange(size), parts)
        for part, piece in enumerate(pieces):
            start, stop = share(size, parts, part)
            assert list(range(start, stop)) == piece.tolist()
        assert border(size, parts, 0) == 0
        assert border(size, parts, parts) == size


def test_first_axis_of_a_product_is_the_slowest(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(100):
        sizes = dict(zip("xyz", map(int, rng.integers(1, 5, 3)), strict=True))
        coords = {axis: int(rng.integers(size)) for axis, size in sizes.items()}
        axes = tuple(rng.permutation(list("xyz"))[: rng.integers(4)])
        parts, part = part_number(axes, sizes, coords)
        shape = tuple(sizes[axis] for axis in axes)
        assert parts == int(np.prod(shape, dtype=int))
        assert part == (int(np.ravel_multi_index(tuple(coords[axis] for axis in axes), shape)) if axes else 0)


def test_boxes_are_sets_of_elements(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n_empty = 0
    for _ in range(300):
        marks = np.zeros((2, 6, 7, 5), dtype=bool)
        boxes = []
        for mark in marks:
            box = tuple(tuple(sorted(map(int, rng.integers(0, n + 1, 2)))) for n in mark.shape)
            mark[tuple(slice(*extent) for extent in box)] = True
            boxes.append(box)
            assert volume(box) == mark.sum()
        both = marks[0] & marks[1]
        common = intersect(*boxes)
        n_empty += common is None
        assert (0 if common is None else volume(common)) == both.sum()
        if common is not None:
            assert both[tuple(slice(*extent) for extent in common)].all()
            # A box within an array that holds another.
            held = np.arange(6 * 7 * 5).reshape(6, 7, 5)
            whole = held[tuple(slice(*extent) for extent in boxes[0])]
            np.testing.assert_array_equal(
                whole[local_slices(common, boxes[0])], held[tuple(slice(*extent) for extent in common)]
            )
    assert 0 < n_empty < 300
