"""The ranks whose tokens are one batch: they agree on a call, and then see each other's small arrays.

What a batch needs of its ranks is counts: so many tokens, so many choices of an expert. Every rank sends its own to
every other, and each adds them up in the order of ranks. A rank alone is a batch of one, without MPI.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from mpi4py import MPI

from fivedp.comm.grid import Group, grid_of
from fivedp.comm.mesh import TOKEN_AXES, Mesh
from fivedp.comm.messages import TAGS, mailbox
from fivedp.errors import ShapeError
from fivedp.ops.arguments import agree_on

Array = Any
Shape = tuple[int, ...]


class BatchRanks:
    """The ranks of one call, after they have agreed on it.

    Parameters
    ----------
    operation : str
        For messages.
    comm : Mesh or MPI.Intracomm, optional
        Of a mesh, the axes over which tokens are cut; None for this rank alone.
    arrays : dict of str to array
        What the call was given; only the first dimension may differ from rank to rank, and only where it is `free`.
    text : str
        The keywords, which must be the same on all ranks.
    error : ValueError, optional
        What this rank has found wrong.
    free : bool
        Whether the first dimension of the first array may differ.

    Raises
    ------
    LayoutError, ShapeError, DTypeError
        On every rank, where any has found an error or they were called differently.
    """

    def __init__(
        self,
        operation: str,
        comm: Mesh | MPI.Intracomm | None,
        arrays: dict[str, Array],
        text: str,
        error: ValueError | None,
        free: bool = False,
    ) -> None:
        self.operation, self.what = operation, f"called {operation} with {text}"
        self.group: Group | None = None
        self.size, self.index = 1, 0
        shapes = [None if error else tuple(array.shape) for array in arrays.values()]
        self.shapes: list[Shape] = [shapes[0] or ()]
        if comm is None:
            if error is not None:
                raise error
            return
        grid = grid_of(comm)
        self.group = grid.group(TOKEN_AXES) if isinstance(comm, Mesh) else grid.everyone()
        self.size, self.index = self.group.size, self.group.index
        _, others = agree_on(operation, self.group, text, list(arrays.values()), error)
        everyone = [other.shapes for other in others]
        for i, name in enumerate(arrays):
            _check_shapes(operation, name, [shapes[i] or () for shapes in everyone], skip=int(free and i == 0))
        self.shapes = [shapes[0] or () for shapes in everyone]

    @property
    def lengths(self) -> list[int]:
        """The first dimension of the first array, on every rank."""
        return [shape[0] for shape in self.shapes]

    def alone(self) -> BatchRanks:
        """This rank as a batch of its own."""
        single = object.__new__(BatchRanks)
        single.operation, single.what, single.group = self.operation, self.what, None
        single.size, single.index, single.shapes = 1, 0, [self.shapes[self.index]]
        return single

    def gather(self, mine: Array) -> Array:
        """The arrays of all ranks, (ranks, *shape); they have the same shape and type on each. Collective."""
        group = self.group
        if group is None or group.size == 1 or not mine.size:
            return np.broadcast_to(mine, (self.size, *mine.shape))
        result = np.empty((group.size, *mine.shape), mine.dtype)
        result[group.index] = mine
        with mailbox(group, self.what, np) as mail:
            peers = [(group.index + step) % group.size for step in range(1, group.size)]
            receipts = [mail.receive(mine.shape, mine.dtype, peer, TAGS["A"], target=result[peer]) for peer in peers]
            for peer in peers:
                mail.send(result[group.index], peer, TAGS["A"], 0)
            mail.wait(receipts)
        return result


def _check_shapes(operation: str, name: str, shapes: Sequence[Shape], skip: int) -> None:
    for rank, shape in enumerate(shapes):
        if shape[skip:] != shapes[0][skip:]:
            raise ShapeError(
                f"{operation}: `{name}` has shape {shape} on rank {rank} and {shapes[0]} on rank 0; "
                + ("only the number of tokens may differ" if skip else "they must be the same")
            )
