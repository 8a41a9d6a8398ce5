"""Which part of an operand a rank holds, worked out from the spec alone.

A benchmark that asked the library where its shares lie would agree with the library's mistakes, so the block rule is
written out here once more: index i of size n, split over p, is cut as `numpy.array_split` cuts it; `x*y` counts the
coordinates of x slowest. A batch index is folded into the rows, so every operand is a matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fivedp.bench import operands
from fivedp.bench.cases.gemm import Case
from fivedp.bench.family import Strategy
from fivedp.layout.spec import Layout, parse_product

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Grid:
    """The ranks a case runs on: the argument for fivedp, axis sizes, and this rank's coordinates."""

    comm: Any
    mesh: Any
    shape: dict[str, int]
    coords: dict[str, int]

    @property
    def text(self) -> str:
        """Sizes for a heading: `tp=8` or `r x c = 2 x 4`."""
        if len(self.shape) == 1:
            return "=".join(str(x) for x in next(iter(self.shape.items())))
        return f"{' x '.join(self.shape)} = {' x '.join(map(str, self.shape.values()))}"


def open_grid(comm: Any, strategy: Strategy) -> Grid:
    """The mesh that `strategy` wants on the ranks of `comm`, by the means a user has for it. Collective.

    Axes named as degrees make a `fivedp.Mesh`, `r`, `c` and `d` a Cartesian communicator, any other name the plain one.
    """
    import fivedp

    shape = strategy.mesh_shape(comm.size)
    if set(shape) <= {"pp", "dp", "sp", "ep", "tp"}:
        mesh = fivedp.Mesh(comm, **shape)
        coords = {name: int(mesh.coords[name]) for name in shape}
        return Grid(comm, mesh, shape, coords)
    places = np.unravel_index(comm.rank, tuple(shape.values()))
    coords = {name: int(i) for name, i in zip(shape, places, strict=True)}
    mesh = comm if len(shape) == 1 else comm.Create_cart(tuple(shape.values()), reorder=False)
    return Grid(comm, mesh, shape, coords)


def layouts(spec: str) -> tuple[Layout, Layout, Layout]:
    """The layouts of A, B and C in `spec`; the benchmark knows the letters b, m, n and k.

    Raises
    ------
    ValueError
        Where the spec is no product of matrices [b] m k, k n -> [b] m n.
    """
    product = parse_product(spec)
    letters = ["".join(layout.names) for layout in (product.a, product.b, product.c)]
    if letters not in (["mk", "kn", "mn"], ["bmk", "kn", "bmn"]):
        raise ValueError(f'spec "{spec}": the benchmark measures "m k, k n -> m n" and "b m k, k n -> b m n"')
    return product.a, product.b, product.c


def span(size: int, parts: int, part: int) -> range:
    """Part `part` of `size` cut into `parts` blocks, the first `size % parts` one longer."""
    base, longer = divmod(size, parts)
    start = part * base + min(part, longer)
    return range(start, start + base + (part < longer))


@dataclass(frozen=True)
class Place:
    """Where a rank's share of an operand lies: global ranges per index, and whether this rank is its first holder."""

    ranges: tuple[range, ...]
    sizes: tuple[int, ...]
    first_holder: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """The local shape."""
        return tuple(len(r) for r in self.ranges)

    @property
    def rows(self) -> Indices:
        """Global row indices of the share, the batch folded in."""
        rows = np.asarray(self.ranges[-2], dtype=np.int64)
        if len(self.ranges) == 3:
            rows = (np.asarray(self.ranges[0], dtype=np.int64)[:, None] * self.sizes[1] + rows).ravel()
        return rows

    @property
    def columns(self) -> Indices:
        """Global column indices of the share."""
        return np.asarray(self.ranges[-1], dtype=np.int64)


def place(layout: Layout, sizes: dict[str, int], grid: Grid) -> Place:
    """The share of an operand laid out as `layout` that this rank of `grid` holds."""
    ranges, used = [], set()
    for index in layout.indices:
        parts, part = 1, 0
        for axis in index.axes:
            parts, part = parts * grid.shape[axis], part * grid.shape[axis] + grid.coords[axis]
            used.add(axis)
        ranges.append(span(sizes[index.name], parts, part))
    first = all(grid.coords[axis] == 0 for axis in grid.shape if axis not in used)
    return Place(tuple(ranges), tuple(sizes[name] for name in layout.names), first)


@dataclass(frozen=True)
class Matrix:
    """A distributed matrix: this rank's piece of it, and how to make any other part again from its seed.

    `data` is the piece, (len(rows), len(columns)); `seed` is None for a result, which cannot be made again.
    """

    data: NDArray[Any]
    rows: Indices
    columns: Indices
    counts: bool
    seed: int | None = None
    turned: bool = False

    @property
    def T(self) -> Matrix:
        """The transpose; nothing is copied."""
        return Matrix(self.data.T, self.columns, self.rows, self.counts, self.seed, not self.turned)

    def take(self, rows: Indices | range, columns: Indices | range) -> NDArray[Any]:
        """Global `rows` and `columns` of a seeded matrix, whoever holds them."""
        if self.seed is None:
            raise ValueError("only a seeded matrix can be made again")
        if self.turned:
            return operands.block(self.seed, columns, rows, self.data.dtype).T
        return operands.block(self.seed, rows, columns, self.data.dtype)


def matrix(local: NDArray[Any], where: Place, seed: int | None = None) -> Matrix:
    """`local`, which lies at `where`, as a distributed matrix."""
    flat = local.reshape(len(where.rows), len(where.columns))
    return Matrix(flat, where.rows, where.columns, where.first_holder, seed)


def make(case: Case, layout: Layout, grid: Grid, seed: int) -> tuple[NDArray[Any], Matrix]:
    """This rank's share of an input, as fivedp takes it and as a check takes it."""
    where = place(layout, case.sizes, grid)
    local = operands.block(seed, where.rows, where.columns, operands.dtype_of(case.dtype)).reshape(where.shape)
    return local, matrix(local, where, seed)
