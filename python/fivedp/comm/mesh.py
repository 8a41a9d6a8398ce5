"""Mesh: the ranks of a communicator as a grid of pipeline, data, sequence, expert and tensor parallelism.

tp varies fastest, so tensor-parallel neighbours are neighbouring ranks, usually on one node; then ep, sp, dp, pp.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from mpi4py import MPI

from fivedp.comm.grid import RankGrid, resolve_axes
from fivedp.errors import LayoutError, MeshError

AXES = ("pp", "dp", "sp", "ep", "tp")
TOKEN_AXES = ("dp", "sp", "ep")
"""Those over which the tokens of a batch are cut; along the others ranks hold the same tokens."""


class Axis:
    """One axis of a mesh, or several combined, seen from this rank.

    Attributes
    ----------
    names : tuple of str
        The mesh axes that it combines.
    rank, size : int
        This rank's place along the axis and the number of ranks along it.
    """

    def __init__(self, grid: RankGrid, names: tuple[str, ...]) -> None:
        self.names = names
        self._group = grid.group(resolve_axes(grid.names, names))
        self._comm: MPI.Intracomm | None = None
        self.rank, self.size = self._group.index, self._group.size

    @property
    def comm(self) -> MPI.Intracomm:
        """A communicator over the ranks of this axis; made at the first use, which is collective over them."""
        if self._comm is None:
            grid = self._group.grid
            ranks = grid.data.Get_group().Incl(self._group.members)
            self._comm = grid.data.Create_group(ranks, tag=self._group.channel)
        return self._comm

    def __repr__(self) -> str:
        return f"Axis({'*'.join(self.names)}: rank {self.rank} of {self.size})"


class Mesh:
    """Ranks in up to five dimensions of parallelism.

    Parameters
    ----------
    comm : MPI.Intracomm
        The ranks; every rank of it makes the mesh together (collective).
    pp, dp, sp, ep, tp : int
        Degrees of pipeline, data, sequence, expert and tensor parallelism. One may be -1: it is filled in.

    Attributes
    ----------
    shape : dict of str to int
        The degrees, slowest axis first.
    coords : dict of str to int
        This rank's coordinate along every axis.

    Raises
    ------
    MeshError
        On every rank, where the product of the degrees is not the number of ranks.
    """

    def __init__(
        self,
        comm: MPI.Intracomm | None = None,
        *,
        pp: int = 1,
        dp: int = 1,
        sp: int = 1,
        ep: int = 1,
        tp: int = 1,
    ) -> None:
        comm = MPI.COMM_WORLD if comm is None else comm
        degrees = _fill((pp, dp, sp, ep, tp), comm.Get_size())
        self.comm = comm
        self._grid = RankGrid(comm, AXES, degrees)
        self.shape = dict(zip(AXES, degrees, strict=True))
        self.coords = dict(zip(AXES, self._grid.coords[self._grid.rank], strict=True))
        self._axes: dict[tuple[str, ...], Axis] = {}

    def axis(self, *names: str) -> Axis:
        """The axis of that name, or the combined axis of several, the slowest first.

        Raises
        ------
        LayoutError
            Where a name is none of pp, dp, sp, ep, tp, or none is given.
        """
        if not names:
            raise LayoutError(f"axis() needs a name; this mesh has {', '.join(AXES)}")
        key = resolve_axes(AXES, names)
        if key not in self._axes:
            self._axes[key] = Axis(self._grid, key)
        return self._axes[key]

    @property
    def bytes_sent(self) -> dict[str, int]:
        """Payload bytes that this rank has sent since the mesh was made, by mesh axis."""
        return dict(self._grid.traffic.bytes_by_axis)

    def __repr__(self) -> str:
        degrees = ", ".join(f"{name}={degree}" for name, degree in self.shape.items() if degree > 1) or "one rank"
        return f"Mesh({degrees})"


def _fill(degrees: Sequence[int], n_ranks: int) -> tuple[int, ...]:
    """The degrees with a -1 filled in, or a MeshError that names the nearest valid choices."""
    given = " x ".join(f"{name}={d}" for name, d in zip(AXES, degrees, strict=True) if d != 1) or "tp=1"
    for name, degree in zip(AXES, degrees, strict=True):
        if not isinstance(degree, int) or isinstance(degree, bool) or (degree < 1 and degree != -1):
            raise MeshError(f"{name}={degree!r} is no degree; expected a positive integer, or -1 to fill it in")
    if list(degrees).count(-1) > 1:
        raise MeshError(f"{given}: only one degree can be -1, the others must be given")
    known = math.prod(d for d in degrees if d != -1)
    if -1 in degrees:
        if n_ranks % known:
            raise MeshError(
                f"{given}: the given degrees make {known}, no divisor of the {n_ranks} ranks that mpirun started; "
                f"nearest: {_nearest(degrees, n_ranks)}"
            )
        return tuple(n_ranks // known if d == -1 else d for d in degrees)
    if known != n_ranks:
        raise MeshError(
            f"{given} is {known} ranks, but mpirun started {n_ranks}; nearest: {_nearest(degrees, n_ranks)}"
        )
    return tuple(degrees)


def _nearest(degrees: Sequence[int], n_ranks: int) -> str:
    """Up to three valid meshes that change the given degrees least, as text: only what has to change is named."""
    divisors = [d for d in range(1, n_ranks + 1) if n_ranks % d == 0]
    named = [i for i, d in enumerate(degrees) if d != 1] or [len(degrees) - 1]
    choices = []
    for combination in itertools.product(divisors, repeat=len(named)):
        if math.prod(combination) == n_ranks:
            changed = [(i, d) for i, d in zip(named, combination, strict=True) if degrees[i] not in (d, -1)]
            distance = sum(abs(math.log(d / degrees[i])) for i, d in changed)
            choices.append((len(changed), distance, " ".join(f"{AXES[i]}={d}" for i, d in changed)))
    fewest = min(changes for changes, _, _ in choices)
    return " or ".join(text for changes, _, text in sorted(choices)[:3] if changes == fewest)
