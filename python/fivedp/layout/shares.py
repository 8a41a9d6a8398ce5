"""Who holds what: the block rule, and boxes of index ranges.

A dimension of size n in p parts is cut as `numpy.array_split` cuts it: part i starts at i*(n // p) + min(i, n % p), so
the first n % p parts hold one element more. A dimension cut over several axes has one part per combination of their
coordinates, the first axis slowest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

Range = tuple[int, int]
Box = tuple[Range, ...]


def border(size: int, parts: int, part: int) -> int:
    """Where part `part` of `parts` starts; `part == parts` gives the size itself."""
    return part * (size // parts) + min(part, size % parts)


def share(size: int, parts: int, part: int) -> Range:
    """The range of part `part` of a dimension of `size` elements in `parts` parts."""
    return border(size, parts, part), border(size, parts, part + 1)


def part_number(axes: Sequence[str], sizes: Mapping[str, int], coords: Mapping[str, int]) -> tuple[int, int]:
    """(number of parts, this rank's part) of a dimension that is cut over `axes`."""
    parts, part = 1, 0
    for axis in axes:
        parts, part = parts * sizes[axis], part * sizes[axis] + coords[axis]
    return parts, part


def intersect(x: Box, y: Box) -> Box | None:
    """The box that x and y have in common, or None where it is empty."""
    box = tuple((max(p[0], q[0]), min(p[1], q[1])) for p, q in zip(x, y, strict=True))
    return box if all(start < stop for start, stop in box) else None


def volume(box: Box) -> int:
    """The number of elements in a box."""
    elements = 1
    for start, stop in box:
        elements *= max(0, stop - start)
    return elements


def shape_of(box: Box) -> tuple[int, ...]:
    """The shape of an array that holds `box`."""
    return tuple(stop - start for start, stop in box)


def local_slices(box: Box, origin: Box) -> tuple[slice, ...]:
    """The slices that select `box` in an array that holds `origin`."""
    return tuple(slice(start - base, stop - base) for (start, stop), (base, _) in zip(box, origin, strict=True))
