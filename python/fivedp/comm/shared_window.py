"""Payload between ranks of one node without copies: read where it lies, in an MPI shared-memory window.

Every rank has a segment of the window. A sender puts a box into its segment once, however many ranks read it (a partial
result is computed there in the first place), and each reader gets a note of 128 bytes: where the box lies and
which cell to set when it has been read. The copy of a message is done by the cores that compute, so on one node what is
not copied is time gained; eight readers of one panel share one copy in the last-level cache.

A segment is a fixed amount of memory. What does not fit in it travels as an ordinary message.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import numpy.typing as npt
from mpi4py import MPI

# Below this a message is cheaper than a note and an answer.
MIN_BYTES = 32 << 10
_SEGMENT_BYTES = 24 << 20
_CELLS = 4096
_CELL_BYTES = 8 * _CELLS
_GRAIN = 4096
NOTE_WORDS = 16


def wanted() -> bool:
    """Whether this process may use shared windows: `FIVEDP_SHARED` is not 0, and /dev/shm has room for segments."""
    if os.environ.get("FIVEDP_SHARED", "1") == "0":
        return False
    try:
        room = os.statvfs("/dev/shm")
    except OSError:
        return False
    return room.f_bavail * room.f_frsize >= 2 * _SEGMENT_BYTES * (os.cpu_count() or 1)


class SharedWindow:
    """The segments of the ranks of one node.

    Collective over `node` when it is made.

    Parameters
    ----------
    node : MPI.Comm
        Ranks that share memory.
    node_rank_of : dict of int to int
        For each rank of the grid that is on this node, its rank in `node`.
    """

    def __init__(self, node: MPI.Comm, node_rank_of: dict[int, int]) -> None:
        self.node_rank_of = node_rank_of
        n_bytes = _CELL_BYTES + _SEGMENT_BYTES
        self.window = MPI.Win.Allocate_shared(n_bytes, 1, comm=MPI.Intracomm(node))
        self.window.Lock_all(MPI.MODE_NOCHECK)  # one epoch for good: Sync, the memory barrier, needs one
        self._segments: dict[int, npt.NDArray[np.uint8]] = {}
        for rank, node_rank in node_rank_of.items():
            memory: Any = self.window.Shared_query(node_rank)[0]
            self._segments[rank] = np.frombuffer(memory, dtype=np.uint8)
        self._cells = {rank: s[:_CELL_BYTES].view(np.int64) for rank, s in self._segments.items()}
        mine = next(rank for rank, node_rank in node_rank_of.items() if node_rank == node.Get_rank())
        self.mine = self._segments[mine]
        self.my_cells = self._cells[mine]
        self._base = self.mine.__array_interface__["data"][0]
        self._free = [(_CELL_BYTES, n_bytes)]
        self._free_cells = list(range(_CELLS))

    # -- the sender's side -----------------------------------------------------------------------------------------

    def take(self, n_bytes: int) -> tuple[int, int] | None:
        """A free range of this rank's segment, or None where there is no room."""
        size = -(-n_bytes // _GRAIN) * _GRAIN
        for i, (start, stop) in enumerate(self._free):
            if stop - start >= size:
                if stop - start == size:
                    del self._free[i]
                else:
                    self._free[i] = (start + size, stop)
                return start, start + size
        return None

    def give(self, extent: tuple[int, int]) -> None:
        """Return a range that nobody reads any more."""
        self._free.append(extent)
        self._free.sort()
        merged = [self._free[0]]
        for start, stop in self._free[1:]:
            if start == merged[-1][1]:
                merged[-1] = (merged[-1][0], stop)
            else:
                merged.append((start, stop))
        self._free = merged

    def take_cell(self) -> int | None:
        """A cell, cleared, that one reader sets when it has read."""
        if not self._free_cells:
            return None
        cell = self._free_cells.pop()
        self.my_cells[cell] = 0
        return cell

    def give_cell(self, cell: int) -> None:
        """Return a cell that its reader has set."""
        self._free_cells.append(cell)

    def array(self, extent: tuple[int, int], shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        """A range of this rank's segment as an array."""
        return np.ndarray(shape, dtype, buffer=self.mine.data, offset=extent[0])

    def offset_of(self, array: npt.NDArray[Any]) -> int | None:
        """Where an array begins in this rank's segment; None where it lies elsewhere."""
        offset: int = array.__array_interface__["data"][0] - self._base
        return offset if 0 <= offset < self.mine.size else None

    # -- the reader's side -----------------------------------------------------------------------------------------

    def view(
        self, rank: int, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], dtype: np.dtype[Any]
    ) -> npt.NDArray[Any]:
        """An array in the segment of another rank, read only."""
        view: npt.NDArray[Any] = np.ndarray(
            shape, dtype, buffer=self._segments[rank].data, offset=offset, strides=strides
        )
        view.flags.writeable = False
        return view

    def acknowledge(self, rank: int, cell: int) -> None:
        """Tell the sender that its box has been read."""
        self.window.Sync()
        self._cells[rank][cell] = 1
