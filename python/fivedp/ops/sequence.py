"""Cutting a sequence over ranks as attention wants it, and joining it again."""

from __future__ import annotations

from typing import Any

import numpy as np
from mpi4py import MPI

from fivedp.comm.agreement import agreement_of
from fivedp.comm.grid import axes_of, grid_of
from fivedp.comm.mesh import Mesh
from fivedp.comm.messages import TAGS, mailbox
from fivedp.errors import LayoutError, ShapeError
from fivedp.kernels._select import library_of
from fivedp.layout.sequence import LAYOUTS, token_indices
from fivedp.ops.arguments import MAX_DIMENSIONS, Arguments, array_kind, check_dtype, pack, unpack, verdict

Array = Any


def sequence_shard(x: Array, comm: Mesh | MPI.Intracomm, axis: int = 1, layout: str = "zigzag") -> Array:
    """This rank's tokens of an array that it holds whole.

    Parameters
    ----------
    x : array
        The whole array, with the sequence along `axis`.
    comm : Mesh or MPI.Intracomm
    axis : int
        1 for (B, S, H, D); negative ones count from the end.
    layout : {"zigzag", "striped", "contiguous"}
        As in `ring_attention`.

    Returns
    -------
    x_local : array
        A contiguous copy of this rank's tokens.

    Raises
    ------
    LayoutError, ShapeError
        Where there is no such layout or axis.

    Notes
    -----
    Not collective: no rank talks to another.
    """
    place = _check(x, axis, layout, "sequence_shard")
    _, sizes = axes_of(comm)
    rank = (comm.comm if isinstance(comm, Mesh) else comm).Get_rank()
    indices = token_indices(layout, x.shape[place], int(np.prod(sizes)), rank)
    xp = library_of(x)
    return xp.take(x, xp.asarray(indices), axis=place)


def sequence_gather(
    x_local: Array, comm: Mesh | MPI.Intracomm, axis: int = 1, layout: str = "zigzag", root: int | None = None
) -> Array | None:
    """The whole array, from the tokens of all ranks.

    Parameters
    ----------
    x_local : array
        This rank's tokens, as `sequence_shard` gives them.
    comm, axis, layout
        As in `sequence_shard`.
    root : int, optional
        The rank that receives the array; every rank where it is None.

    Returns
    -------
    x : array or None
        The whole array; None on ranks other than `root`.

    Raises
    ------
    LayoutError, ShapeError, DTypeError
        On every rank, before any payload moves.

    Notes
    -----
    Collective over all ranks of `comm`.
    """
    name = "sequence_gather"
    grid = grid_of(comm)
    group = grid.everyone()
    text = f"axis={axis} layout={layout} root={root}"
    error: ValueError | None = None
    shape, dtype, place, kind, xp = None, None, 0, "numpy", library_of(x_local)
    try:
        place = _check(x_local, axis, layout, name)
        kind = array_kind(x_local, "x_local", name)
        dtype = check_dtype(x_local, "a", name)
        if root is not None and not 0 <= root < group.size:
            raise LayoutError(f"{name}: root is {root}; expected a rank from 0 to {group.size - 1}")
        shape = tuple(x_local.shape)
    except ValueError as found:
        error = found
    what = f"called {name} with {text}"
    arguments = Arguments(name, text, (shape, None, None), (dtype, None, None), kind, "tree", "sum", 1.0, 0.0, error)
    headers = agreement_of(group).exchange(pack(arguments), what)
    verdict(headers, (), *group.numbering)
    shapes = [unpack(row.tobytes()).shapes[0] or () for row in headers]
    length = sum(s[place] for s in shapes)
    held = [token_indices(layout, length, group.size, rank) for rank in range(group.size)]
    for rank, (found_shape, indices) in enumerate(zip(shapes, held, strict=True)):
        wanted = (*shapes[0][:place], len(indices), *shapes[0][place + 1 :])
        if found_shape != wanted:
            raise ShapeError(f'{name}: the array has shape {found_shape} on rank {rank}; layout "{layout}" of {length} '
                             f"tokens gives that rank {wanted}")  # fmt: skip
    result = None
    with mailbox(group, what, xp) as mail:
        receipts = {}
        if root in (None, group.index):
            receipts = {
                s: mail.receive(shapes[s], x_local.dtype, s, TAGS["A"]) for s in range(group.size) if s != group.index
            }
        for step in range(1, group.size):
            peer = (group.index + step) % group.size
            if root in (None, peer):
                mail.send(x_local, peer, TAGS["A"], 0)
        if root in (None, group.index):
            mail.wait(list(receipts.values()))
            result = xp.empty((*shapes[0][:place], length, *shapes[0][place + 1 :]), x_local.dtype)
            for source, indices in enumerate(held):
                xp.moveaxis(result, place, 0)[xp.asarray(indices)] = xp.moveaxis(
                    x_local if source == group.index else receipts[source].array, place, 0
                )
            for receipt in receipts.values():
                mail.release(receipt)
    return result


def _check(x: Array, axis: int, layout: str, name: str) -> int:
    """The axis counted from the front."""
    if layout not in LAYOUTS:
        raise LayoutError(f"{name}: layout is {layout!r}; expected one of {', '.join(LAYOUTS)}")
    dimensions = getattr(x, "ndim", 0)
    if not -dimensions <= axis < dimensions or dimensions > MAX_DIMENSIONS:
        raise ShapeError(f"{name}: axis is {axis} and the array has {dimensions} dimensions (at most {MAX_DIMENSIONS})")
    return axis % dimensions
