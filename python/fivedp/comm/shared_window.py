"""Payload between ranks of one node without copies: read where it lies, in memory that all of them have mapped.

Every rank has a segment. A sender puts a box into its segment once, however many ranks read it (a partial result is
computed there in the first place), and each reader gets a note of 128 bytes: where the box lies and which cell to set
when it has been read. The copy of a message is done by the cores that compute, so on one node what is not copied is
time gained; eight readers of one panel share one copy in the last-level cache.

A segment is a fixed amount of memory for boxes; what does not fit in it travels as an ordinary message. Behind it lies
address space for working memory that ranks share (`take_large`): its pages are asked for when they are first needed.
The files behind the segments are unlinked as soon as all ranks have mapped them, so nothing is left behind, however a
run ends.
"""

from __future__ import annotations

import contextlib
import itertools
import mmap
import os
import platform
from typing import Any

import numpy as np
import numpy.typing as npt

from fivedp.comm.lent import lend

# Below this a message is cheaper than a note and an answer; above it, MPI takes several steps of both sides for one.
MIN_BYTES = 8 << 10
NOTE_WORDS = 16
Note = npt.NDArray[np.int64]
_SHARED, _BY_MESSAGE = 0, 1
_FOLDER = "/dev/shm"
_SEGMENT_BYTES = 24 << 20
_LARGE_BYTES = 4 << 30
_CELLS = 4096
_CELL_BYTES = 8 * _CELLS
_LARGE_BEGIN = _CELL_BYTES + _SEGMENT_BYTES
_FILE_BYTES = _LARGE_BEGIN + _LARGE_BYTES
_GRAIN = 4096
_numbers = itertools.count()
Extent = tuple[int, int]


def wanted() -> bool:
    """Whether this process may share memory: `FIVEDP_SHARED` is not 0, and /dev/shm has room for the segments.

    A cell is set by a plain store after the box has been read. That answer can't overtake the reading where stores keep
    their order behind loads: on x86, not on every other machine.
    """
    if os.environ.get("FIVEDP_SHARED", "1") == "0" or platform.machine() not in ("x86_64", "AMD64"):
        return False
    try:
        room = os.statvfs(_FOLDER)
    except OSError:
        return False
    return room.f_bavail * room.f_frsize >= 2 * _SEGMENT_BYTES * (os.cpu_count() or 1)


class SharedWindow:
    """The segments of the ranks of one node, as one of them sees them.

    Made in three steps, for all ranks must have made theirs before any can map them, and mapped them before any name
    can go: `SharedWindow(rank)`, `attach(owners)`, `unlink()`.

    Parameters
    ----------
    rank : int
        This rank's number in the grid.
    """

    def __init__(self, rank: int) -> None:
        self.rank, self.number = rank, next(_numbers)
        self._path = _path(os.getpid(), self.number)
        descriptor = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        try:
            os.ftruncate(descriptor, _FILE_BYTES)
            self.mine = _map(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor = descriptor  # open as long as the process: `take_large` asks for pages through it
        self._segments = {rank: self.mine}
        self._cells: dict[int, npt.NDArray[np.int64]] = {}
        self.my_cells = self._cells[rank] = self.mine[:_CELL_BYTES].view(np.int64)
        self._base = self.mine.__array_interface__["data"][0]
        self._free = [(_CELL_BYTES, _LARGE_BEGIN)]
        self._free_large = [(_LARGE_BEGIN, _FILE_BYTES)]
        self._returned: list[Extent] = []
        """Working memory that was lent and that nobody has any more."""
        self._backed = _LARGE_BEGIN
        """Up to here the file has its pages."""
        self._free_cells = list(range(_CELLS))

    def attach(self, owners: dict[int, tuple[int, int]]) -> None:
        """Map the segments of the other ranks: {rank: (process number, window number)}; OSError where one can't be."""
        for rank, (pid, number) in owners.items():
            if rank != self.rank:
                descriptor = os.open(_path(pid, number), os.O_RDWR)
                try:
                    self._segments[rank] = _map(descriptor)
                finally:
                    os.close(descriptor)
                self._cells[rank] = self._segments[rank][:_CELL_BYTES].view(np.int64)

    def unlink(self) -> None:
        """Take this rank's segment out of the file system; it lives on in those who have mapped it."""
        with contextlib.suppress(OSError):
            os.unlink(self._path)

    def reaches(self, rank: int) -> bool:
        """Whether a rank of the grid shares this memory."""
        return rank in self._cells

    def carries(self, rank: int, n_bytes: int) -> bool:
        """Whether a box for a rank of the grid goes through the window: both sides come to the same answer."""
        return n_bytes >= MIN_BYTES and rank in self._cells

    # -- the sender's side -----------------------------------------------------------------------------------------

    def take(self, n_bytes: int) -> Extent | None:
        """A free range of this rank's segment, or None where there is no room."""
        return _take(self._free, n_bytes)

    def take_large(self, n_bytes: int) -> Extent | None:
        """A free range of working memory, or None where the file system has no room; kept for the next call."""
        while self._returned:
            self.give(self._returned.pop())
        extent = _take(self._free_large, n_bytes)
        if extent is not None and extent[1] > self._backed:
            try:
                # Memory that is not there must be an answer now, and not a signal at the first touch.
                os.posix_fallocate(self._descriptor, self._backed, extent[1] - self._backed)
            except OSError:
                self._free_large = _merged([*self._free_large, extent])
                return None
            self._backed = extent[1]
        return extent

    def give(self, extent: Extent) -> None:
        """Return a range that nobody reads any more."""
        if extent[0] < _LARGE_BEGIN:
            self._free = _merged([*self._free, extent])
        else:
            self._free_large = _merged([*self._free_large, extent])

    def take_cell(self) -> int | None:
        """A cell, cleared, that one reader sets when it has read; None where all are in use."""
        if not self._free_cells:
            return None
        cell = self._free_cells.pop()
        self.my_cells[cell] = 0
        return cell

    def give_cell(self, cell: int) -> None:
        """Return a cell that its reader has set."""
        self._free_cells.append(cell)

    def array(self, extent: Extent, shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        """A range of this rank's segment as an array."""
        return np.ndarray(shape, dtype, buffer=self.mine.data, offset=extent[0])

    def lend(self, extent: Extent, shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        """A range as an array, with what it holds, which returns to this segment when nobody has the array any more."""
        return lend(self.mine[extent[0] : extent[1]], shape, dtype, self._returned, extent)

    def offset_of(self, array: npt.NDArray[Any]) -> int | None:
        """Where an array begins in this rank's segment; None where it lies elsewhere."""
        offset: int = array.__array_interface__["data"][0] - self._base
        return offset if 0 <= offset < self.mine.size else None

    @staticmethod
    def note(array: npt.NDArray[Any], offset: int, cell: int) -> Note:
        """What tells a reader where an array lies and which cell to set when it has been read."""
        note = np.zeros(NOTE_WORDS, dtype=np.int64)
        note[:3] = _SHARED, offset, cell
        note[3 : 3 + array.ndim] = array.strides
        return note

    @staticmethod
    def note_of_message() -> Note:
        """What tells a reader that the array comes as a message, because it found no room."""
        return np.full(NOTE_WORDS, _BY_MESSAGE, dtype=np.int64)

    # -- the reader's side -----------------------------------------------------------------------------------------

    @staticmethod
    def by_message(note: Note) -> bool:
        """Whether the array of a note comes as a message."""
        return bool(note[0] == _BY_MESSAGE)

    def noted(self, rank: int, note: Note, shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        """The array of a note, in the segment of another rank."""
        return self.view(rank, int(note[1]), shape, tuple(note[3 : 3 + len(shape)].tolist()), dtype)

    @staticmethod
    def cell_of(note: Note) -> int:
        """The cell to set when the array of a note has been read."""
        return int(note[2])

    def view(
        self,
        rank: int,
        offset: int,
        shape: tuple[int, ...],
        strides: tuple[int, ...] | None,
        dtype: np.dtype[Any],
        *,
        writeable: bool = False,
    ) -> npt.NDArray[Any]:
        """An array in the segment of another rank; contiguous where `strides` is None."""
        view: npt.NDArray[Any] = np.ndarray(
            shape, dtype, buffer=self._segments[rank].data, offset=offset, strides=strides
        )
        view.flags.writeable = writeable
        return view

    def acknowledge(self, rank: int, cell: int) -> None:
        """Tell the sender that its box has been read."""
        self._cells[rank][cell] = 1


def _path(pid: int, number: int) -> str:
    return f"{_FOLDER}/fivedp-{pid}-{number}"


def _map(descriptor: int) -> npt.NDArray[np.uint8]:
    memory: Any = mmap.mmap(descriptor, _FILE_BYTES)
    return np.frombuffer(memory, dtype=np.uint8)


def _take(free: list[Extent], n_bytes: int) -> Extent | None:
    """The first of the free ranges that is large enough, cut out of the list; None where there is none."""
    size = -(-n_bytes // _GRAIN) * _GRAIN
    for i, (start, stop) in enumerate(free):
        if stop - start >= size:
            if stop - start == size:
                del free[i]
            else:
                free[i] = (start + size, stop)
            return start, start + size
    return None


def _merged(free: list[Extent]) -> list[Extent]:
    """Free ranges in order, neighbours joined."""
    ordered = sorted(free)
    merged = ordered[:1]
    for start, stop in ordered[1:]:
        if start == merged[-1][1]:
            merged[-1] = (merged[-1][0], stop)
        else:
            merged.append((start, stop))
    return merged
