"""Cutting whole arrays into shares and joining shares into whole arrays, by the same layouts as the product's."""

from __future__ import annotations

from typing import Any

import numpy as np
from mpi4py import MPI

from fivedp.comm.agreement import agreement_of
from fivedp.comm.grid import ANY_NAME, axes_of, grid_of, resolve_axes
from fivedp.comm.mesh import Mesh
from fivedp.comm.messages import mailbox
from fivedp.errors import LayoutError, ShapeError
from fivedp.layout.shares import Box, part_number, share
from fivedp.layout.spec import Layout, parse_layout
from fivedp.ops.arguments import MAX_DIMENSIONS, Arguments, array_kind, check_dtype, pack, verdict

Array = Any
_TAG = 2


def shard(x: Array, layout: str, mesh: Mesh | MPI.Intracomm) -> Array:
    """This rank's share of an array that it holds whole.

    Parameters
    ----------
    x : array
        The whole array; NumPy or CuPy, any type.
    layout : str
        One index per dimension and the axes that cut it: "m/r k/c".
    mesh : Mesh or MPI.Intracomm
        As in `sharded_matmul`.

    Returns
    -------
    x_local : array
        A contiguous copy of the share; dimensions may be empty.

    Raises
    ------
    LayoutError
        Where the layout can't be read or names an axis that the mesh lacks.
    ShapeError
        Where `x` has another number of dimensions than the layout.

    Notes
    -----
    Not collective: no rank talks to another.
    """
    parsed = parse_layout(layout)
    names, sizes = axes_of(mesh)
    axes = resolve_axes(names, parsed.axes)
    if x.ndim != len(parsed.indices):
        raise ShapeError(
            f'shard: `x` has {x.ndim} dimensions, shape {tuple(x.shape)}; layout "{layout}" has {len(parsed.indices)}'
        )
    comm = mesh.comm if isinstance(mesh, Mesh) else mesh
    coords = np.unravel_index(comm.Get_rank(), sizes)
    by_name = dict(zip(names, zip(sizes, map(int, coords), strict=True), strict=True))
    if names == (ANY_NAME,):
        by_name = dict.fromkeys(axes, by_name[ANY_NAME])
    box = _box(parsed, tuple(x.shape), {a: by_name[a][0] for a in axes}, {a: by_name[a][1] for a in axes})
    return x[tuple(slice(*extent) for extent in box)].copy(order="C")


def gather(x_local: Array, layout: str, mesh: Mesh | MPI.Intracomm, root: int | None = None) -> Array | None:
    """The whole array, from the shares of all ranks.

    Parameters
    ----------
    x_local : array
        This rank's share, by `layout`; the types of `sharded_matmul`.
    layout, mesh
        As in `shard`.
    root : int, optional
        The rank of the communicator that receives the array; every rank where it is None.

    Returns
    -------
    x : array or None
        The whole array; None on ranks other than `root`.

    Raises
    ------
    LayoutError, ShapeError, DTypeError
        On every rank, before any payload moves, as in `sharded_matmul`.

    Notes
    -----
    Collective over the whole communicator. A rank receives every share once, from the replica nearest to itself.
    """
    grid = grid_of(mesh)
    group = grid.everyone()
    error: ValueError | None = None
    text, shape, dtype, kind = f"{layout} to {'every rank' if root is None else f'rank {root}'}", None, None, "numpy"
    parsed: Layout | None = None
    try:
        parsed = parse_layout(layout)
        axes = resolve_axes(grid.names, parsed.axes)
        kind = array_kind(x_local, "a", "gather")
        dtype = check_dtype(x_local, "a", "gather")
        if x_local.ndim != len(parsed.indices) or x_local.ndim > MAX_DIMENSIONS:
            raise ShapeError(
                f'gather: the array has {x_local.ndim} dimensions, shape {tuple(x_local.shape)}; layout "{layout}" has '
                f"{len(parsed.indices)} (at most {MAX_DIMENSIONS})"
            )
        if root is not None and not 0 <= root < group.size:
            raise LayoutError(f"gather: root is {root}; expected a rank from 0 to {group.size - 1}")
        shape = tuple(x_local.shape)
    except ValueError as found:
        error = found
    what = f'called gather with layout "{layout}"'
    arguments = Arguments(
        "gather", text, (shape, None, None), (dtype, None, None), kind, "tree", "sum", 1.0, 0.0, error
    )
    headers = agreement_of(group).exchange(pack(arguments), what)
    sizes, coords = group.numbering
    if parsed is not None and error is None and grid.names == (ANY_NAME,) and axes:
        # The single axis of a plain communicator answers to the name that the layout uses.
        sizes = dict.fromkeys(axes, group.size)
        coords = [dict.fromkeys(axes, rank) for rank in range(group.size)]
    found_sizes = verdict(headers, (parsed,) if parsed is not None and error is None else (), sizes, coords)
    assert parsed is not None
    whole = tuple(found_sizes[name] for name in parsed.names)
    xp: Any = np
    if kind == "cupy":
        import cupy

        xp = cupy

    def nearest(receiver: int, source: int) -> bool:
        return all(coords[receiver][axis] == coords[source][axis] for axis in sizes if axis not in parsed.axes)

    mine, n_ranks = group.index, group.size
    result, receipts = None, []
    with mailbox(group, what, xp) as mail:
        if root in (None, mine):
            result = xp.empty(whole, dtype=x_local.dtype)
            for shift in range(n_ranks):
                source = (mine + shift) % n_ranks
                if nearest(mine, source):
                    box = _box(parsed, whole, sizes, coords[source])
                    target = result[tuple(slice(*extent) for extent in box)]
                    if source == mine:
                        target[...] = x_local
                    else:
                        receipts.append(mail.receive(target.shape, x_local.dtype, source, _TAG, target, for_later=True))
        for shift in range(1, n_ranks):
            receiver = (mine + shift) % n_ranks
            if root in (None, receiver) and nearest(receiver, mine):
                mail.send(x_local, receiver, _TAG, 0)
        mail.wait(receipts)
        for receipt in receipts:
            mail.release(receipt)
    return result


def _box(layout: Layout, whole: tuple[int, ...], sizes: dict[str, int], coords: dict[str, int]) -> Box:
    return tuple(
        share(n, *part_number(index.axes, sizes, coords)) for n, index in zip(whole, layout.indices, strict=True)
    )
