"""The ranks of a communicator as a grid with named axes, and the private communicators that fivedp talks over.

A plain communicator has one axis, which answers to any one name; a Cartcomm has axes r, c (and d); a Mesh has pp, dp,
sp, ep, tp. Ranks are numbered with the last axis fastest. A group is the set of ranks that a call runs over: those that
agree with this rank on every axis that the call's spec does not name. Groups are lists of ranks; all messages are
point to point over one duplicate of the communicator, so no communicator is made per group and a user's own
messages are never met.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import socket
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from mpi4py import MPI

from fivedp.comm import shared_window
from fivedp.comm.launch_check import check_launch
from fivedp.comm.shared_window import SharedWindow
from fivedp.comm.traffic import Traffic
from fivedp.comm.watchdog import Watchdog, timed_wait, watch_process
from fivedp.errors import LayoutError

_CART_NAMES = ("r", "c", "d")
ANY_NAME = ""
# GB/s of a link of 100 Gb/s.
_LINK = 12.5


class RankGrid:
    """One communicator with named axes.

    Collective over `comm` when it is made (two duplicates of the communicator); kept with the communicator, so that
    it is made once.

    Attributes
    ----------
    names, sizes : tuple
        The axes; a plain communicator has the single name "".
    data, control : MPI.Intracomm
        Private duplicates: payload, and notices of failure.
    traffic : Traffic
        Bytes this rank has sent.
    node_of : list of int
        The node of every rank, numbered by its first rank. A host is a node; `FIVEDP_NODE` names another.
    on_node : list of int
        The ranks on this node.
    link : int
        Bytes a second between nodes, for prices: `FIVEDP_LINK` in GB/s, the least that any rank has.
    on_these_cores : int
        How many of them may run on the same cores as this rank, itself included.
    shared : SharedWindow or None
        Memory that they share, where there is any.
    """

    def __init__(self, comm: MPI.Intracomm, names: tuple[str, ...], sizes: tuple[int, ...]) -> None:
        check_launch(MPI.COMM_WORLD.Get_size())
        self.comm, self.names, self.sizes = comm, names, sizes
        self.rank, self.size = comm.Get_rank(), comm.Get_size()
        self.coords = list(itertools.product(*(range(size) for size in sizes)))
        self.data, request = comm.Idup()
        timed_wait([request], "the duplicate of the communicator that carries data")
        self.control, request = comm.Idup()
        timed_wait([request], "the duplicate of the communicator that carries notices")
        self._exchange_nodes()
        self.traffic = Traffic(names, self.coords, self.rank, self.node_of)
        crowded = self.on_these_cores > len(os.sched_getaffinity(0))
        self.watchdog = Watchdog(self.control, self.pids, crowded)
        self.cache: dict[str, Any] = {}
        self.calls: dict[Any, Any] = {}
        """Calls seen before, kept by the operations."""
        self._groups: dict[tuple[str, ...], Group] = {}
        watch_process(self.watchdog)

    def _exchange_nodes(self) -> None:
        """Find out which ranks are on this node and on this rank's cores, and map their shared window."""
        cores = os.sched_getaffinity(0)
        names = (os.environ.get("FIVEDP_NODE") or socket.gethostname(), ",".join(map(str, sorted(cores))))
        window = None
        if self.size > 1 and shared_window.wanted():
            with contextlib.suppress(OSError):
                window = SharedWindow(self.rank)
        mine = np.array(
            [*(zlib.crc32(n.encode()) for n in names), os.getpid(), window.number if window else -1, _link()], np.int64
        )
        everyone = np.empty((self.size, mine.size), dtype=np.int64)
        try:
            timed_wait([self.data.Iallgather(mine, everyone)], "the process numbers of all ranks")
            hosts = everyone[:, 0].tolist()
            self.node_of = [sorted(set(hosts), key=hosts.index).index(host) for host in hosts]
            self.link = int(everyone[:, 4].min())
            if not self.link:  # on all ranks, so that none waits for another
                rank = int(everyone[:, 4].argmin())
                raise LayoutError(
                    f"FIVEDP_LINK on rank {rank} is no rate; expected GB/s between nodes, such as {_LINK}"
                )
            on_node = everyone[:, 0] == mine[0]
            self.on_node = np.flatnonzero(on_node).tolist()
            self.on_these_cores = int((on_node & (everyone[:, 1] == mine[1])).sum())
            pids = [int(pid) for pid in everyone[:, 2]]
            self.pids = [pid if on_node[rank] and _visible(pid) else 0 for rank, pid in enumerate(pids)]
            self.shared = self._map_window(window, {r: (pids[r], int(everyone[r, 3])) for r in self.on_node})
        finally:
            if window is not None:
                window.unlink()

    def _map_window(self, window: SharedWindow | None, owners: dict[int, tuple[int, int]]) -> SharedWindow | None:
        """The window with all segments of this node, or None on all ranks where any of them can't have it."""
        mapped = window is not None and all(number >= 0 for _, number in owners.values())
        if mapped and window is not None:
            try:
                window.attach(owners)
            except OSError:  # hosts of one name that share no memory, such as two containers
                mapped = False
        everywhere = np.array([mapped], dtype=np.int64)
        timed_wait([self.data.Iallreduce(MPI.IN_PLACE, everywhere, MPI.MIN)], "the mapping of the shared window")
        return window if everywhere[0] else None

    def group(self, axes: tuple[str, ...]) -> Group:
        """The group of this rank over `axes` (as `resolve_axes` returns them)."""
        group = self._groups.get(axes)
        if group is None:
            places = tuple(0 if self.names == (ANY_NAME,) else self.names.index(axis) for axis in axes)
            group = self._groups[axes] = Group(self, axes, places)
        return group

    def everyone(self) -> Group:
        """The group of all ranks, whatever the axes."""
        return self.group(self.names)


def _link() -> int:
    """Bytes a second between nodes, by `FIVEDP_LINK`; 0 where that is no number that can be."""
    try:
        link = float(os.environ.get("FIVEDP_LINK", _LINK))
    except ValueError:
        return 0
    return max(1, int(1e9 * link)) if 0 < link < 1e9 else 0


def _visible(pid: int) -> bool:
    """Whether `pid` is another process that this one can watch; in another process namespace it means nothing."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


class Group:
    """The ranks of one call: those that differ from this rank along the named axes only.

    Attributes
    ----------
    axes, sizes : tuple
        The named axes and their sizes.
    members : list of int
        Ranks of the grid, with the last axis fastest.
    index : int
        This rank's place among them.
    node_of : tuple of int
        The node of every member.
    in_place : bool
        Whether all members share memory, so that they can read each other's boxes where they lie.
    channel : int
        A number that belongs to this set of axes; message tags are made of it.
    """

    def __init__(self, grid: RankGrid, axes: tuple[str, ...], places: tuple[int, ...]) -> None:
        self.grid, self.axes = grid, axes
        self.sizes = tuple(grid.sizes[place] for place in places)
        mine = grid.coords[grid.rank]
        fixed = [place for place in range(len(grid.names)) if place not in places]
        self.members = [r for r, c in enumerate(grid.coords) if all(c[place] == mine[place] for place in fixed)]
        self.index = self.members.index(grid.rank)
        self.size = math.prod(self.sizes)
        self.channel = sum(1 << place for place in places)
        self.node_of = tuple(grid.node_of[rank] for rank in self.members)
        self.in_place = grid.shared is not None and all(grid.shared.reaches(rank) for rank in self.members)
        self.cache: dict[str, Any] = {}
        places_of = dict(zip(axes, places, strict=True))
        self.numbering = (
            dict(zip(axes, self.sizes, strict=True)),
            [{axis: grid.coords[r][place] for axis, place in places_of.items()} for r in self.members],
        )
        """(size of every axis, coordinates of every member)."""


def _free_grid(comm: MPI.Comm, keyval: int, grid: RankGrid) -> None:
    """Drop the grid with its communicator; its duplicates end with MPI, for freeing them would be collective."""


_KEYVAL = MPI.Comm.Create_keyval(delete_fn=_free_grid)


def axes_of(mesh: object) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The axis names and sizes of a communicator, a Cartcomm or a Mesh; no rank talks to another.

    Raises
    ------
    LayoutError
        Where `mesh` is none of these, or a Cartcomm of more than three dimensions.
    """
    grid = getattr(mesh, "_grid", None)
    if isinstance(grid, RankGrid):
        return grid.names, grid.sizes
    if not isinstance(mesh, MPI.Intracomm):
        raise LayoutError(f"expected a communicator, a Cartcomm or a fivedp.Mesh, got {type(mesh).__name__}")
    if mesh.Get_topology() == MPI.CART:
        cart = mesh if isinstance(mesh, MPI.Cartcomm) else MPI.Cartcomm(mesh)
        if cart.Get_dim() > len(_CART_NAMES):
            raise LayoutError(
                f"a Cartcomm of {cart.Get_dim()} dimensions has no axis names; use 2 (r, c) or 3 (r, c, d)"
            )
        if cart.Get_dim() > 1:
            return _CART_NAMES[: cart.Get_dim()], tuple(cart.Get_topo()[0])
    return (ANY_NAME,), (mesh.Get_size(),)


def resolve_axes(names: tuple[str, ...], axes: Sequence[str]) -> tuple[str, ...]:
    """The axes that a spec names, in the order of the grid whose axes are `names`.

    Raises
    ------
    LayoutError
        Where one is no axis of the grid.
    """
    if names == (ANY_NAME,):
        if len(axes) > 1:
            raise LayoutError(
                f"axes {' and '.join(axes)} are named, but a plain communicator has one axis; "
                "use a fivedp.Mesh or a Cartcomm for several"
            )
        return tuple(axes)
    for axis in axes:
        if axis not in names:
            raise LayoutError(f"axis {axis} is named, but this mesh has {', '.join(names)}")
    return tuple(name for name in names if name in axes)


def grid_of(mesh: object) -> RankGrid:
    """The grid of a communicator, a Cartcomm or a Mesh; made at the first call, which is collective over it."""
    grid = getattr(mesh, "_grid", None)
    if isinstance(grid, RankGrid):
        return grid
    names, sizes = axes_of(mesh)
    assert isinstance(mesh, MPI.Intracomm)
    grid = mesh.Get_attr(_KEYVAL)
    if not isinstance(grid, RankGrid):
        grid = RankGrid(mesh, names, sizes)
        mesh.Set_attr(_KEYVAL, grid)
    return grid
