"""NumPy arrays: read in place where ranks share memory, else sent as bytes from where they lie.

Arrays travel as bytes, so every element type is one path and no message needs a datatype. A message above
`MAX_MESSAGE_BYTES` is cut, for counts are 32-bit integers in many an MPI. A box that is not contiguous is packed into a
buffer from the pool; one that is travels from where it lies. Between ranks of one node large boxes are read in place,
from a shared window.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from mpi4py import MPI

from fivedp.comm import shared_window
from fivedp.comm.boxes import copy_box
from fivedp.comm.grid import Group
from fivedp.comm.shared_window import NOTE_WORDS, SharedWindow
from fivedp.comm.transport.mail import OVERFLOW, PROBE_TAG, Array, Buffer, Mailbox, Receipt, Workspace, cut


@dataclass(slots=True)
class _Sent:
    """A message under way, and what comes free when it has been received."""

    tag: int
    stage: int
    rank: int
    requests: list[MPI.Request]
    keep: Any
    buffer: Buffer | None = None
    cell: int | None = None
    box: _Box | None = None


@dataclass(slots=True)
class _Box:
    """A box copied into the shared window, and how many readers have not yet read it."""

    array: Array
    extent: tuple[int, int]
    readers: int = 0
    key: tuple[Any, ...] = field(default_factory=tuple)
    source: Any = None
    """What was copied: while it is held, no other array can have its address."""


class HostMailbox(Mailbox):
    """A mailbox of NumPy arrays."""

    def __init__(self, group: Group, what: str) -> None:
        super().__init__(group, what)
        self._window = group.grid.shared
        self._sent: list[_Sent] = []
        self._boxes: dict[tuple[Any, ...], _Box] = {}
        self._receiving: list[Receipt] = []

    def _in_window(self, rank: int, n_bytes: int) -> bool:
        return self._window is not None and self._window.carries(rank, n_bytes)

    # -- sending ---------------------------------------------------------------------------------------------------

    def workspace(self, shape: tuple[int, ...], dtype: Any) -> Workspace:
        dtype = np.dtype(dtype)
        n_bytes = math.prod(shape) * dtype.itemsize
        if self._window is not None and n_bytes >= shared_window.MIN_BYTES:
            extent = self._window.take(n_bytes)
            if extent is not None:
                return Workspace(self._window.array(extent, shape, dtype), extent=extent)
        return self.private(shape, dtype)

    def private(self, shape: tuple[int, ...], dtype: Any) -> Workspace:
        array, buffer = self.pool.take(shape, np.dtype(dtype))
        return Workspace(array, buffer=buffer)

    def place(self, array: Array) -> Array:
        if self._window is None or array.nbytes < shared_window.MIN_BYTES:
            return array
        extent = self._window.take(array.nbytes)
        if extent is None:
            return array
        copy = self._window.array(extent, array.shape, array.dtype)
        self.give_at_end(Workspace(copy, extent))
        copy_box(copy, array)
        return copy

    def give_workspace(self, workspace: Workspace) -> None:
        if workspace.extent is not None and self._window is not None:
            self._window.give(workspace.extent)
        if workspace.buffer is not None:
            self.pool.give(workspace.buffer)

    def send(self, array: Array, peer: int, tag: int, stage: int) -> None:
        if not array.size:
            return
        rank = self.group.members[peer]
        in_window = self._in_window(rank, array.nbytes)
        if in_window and self._send_note(array, rank, tag, stage):
            self.group.grid.traffic.count(rank, array.nbytes)
            return
        buffer, host = None, array
        if not array.flags.c_contiguous:
            host, buffer = self.pool.take(array.shape, array.dtype)
            copy_box(host, array)
        self._count_and_send(host, rank, tag, stage, buffer, note=in_window)

    def _count_and_send(self, host: Array, rank: int, tag: int, stage: int, buffer: Buffer | None, note: bool) -> None:
        """Send a contiguous array as messages; with a note before it where the reader expects one."""
        grid, number = self.group.grid, self._first_tag + tag
        grid.traffic.count(rank, host.nbytes)
        if note:
            words = SharedWindow.note_of_message()
            self._sent.append(_Sent(tag, stage, rank, [grid.data.Isend([words, MPI.INT64_T], rank, number)], words))
            number += OVERFLOW
        requests = [grid.data.Isend([part, MPI.BYTE], rank, number) for part in cut(host.reshape(-1).view(np.uint8))]
        self._sent.append(_Sent(tag, stage, rank, requests, host, buffer=buffer))

    def send_rows(self, array: Array, rows: npt.NDArray[np.int32], peer: int, tag: int, stage: int) -> None:
        if not len(rows):
            return
        rank = self.group.members[peer]
        n_bytes = array[:1].nbytes * len(rows)
        if self._in_window(rank, n_bytes) and self._send_note(array, rank, tag, stage):
            self.group.grid.traffic.count(rank, n_bytes)
            return
        packed, buffer = self.pool.take((len(rows), *array.shape[1:]), array.dtype)
        np.take(array, rows, axis=0, out=packed)
        self._count_and_send(packed, rank, tag, stage, buffer, note=self._in_window(rank, n_bytes))

    def _send_note(self, array: Array, rank: int, tag: int, stage: int) -> bool:
        """Put a box into the shared window, where it is not there already, and say where; False if there is no room."""
        window = self._window
        assert window is not None
        cell = window.take_cell()
        if cell is None:
            return False
        box = None
        offset = window.offset_of(array)
        if offset is None:
            key = (array.__array_interface__["data"][0], array.shape, array.strides, tag, stage)
            box = self._boxes.get(key)
            if box is None:
                extent = window.take(array.nbytes)
                if extent is None:
                    window.give_cell(cell)
                    return False
                box = self._boxes[key] = _Box(window.array(extent, array.shape, array.dtype), extent, 0, key, array)
                copy_box(box.array, array)
            box.readers += 1
            array, offset = box.array, box.extent[0]
        note = window.note(array, offset, cell)
        request = self.group.grid.data.Isend([note, MPI.INT64_T], rank, self._first_tag + tag)
        self._sent.append(_Sent(tag, stage, rank, [request], note, cell=cell, box=box))
        return True

    def flush(self, stage: int | None = None, tags: tuple[int, ...] = ()) -> None:
        done, self._sent = self._sent, []
        if stage is not None:
            self._sent = [entry for entry in done if entry.stage > stage or entry.tag not in tags]
            done = [entry for entry in done if entry.stage <= stage and entry.tag in tags]
        if not done:
            return
        requests = [request for entry in done for request in entry.requests]
        cells = [entry.cell for entry in done if entry.cell is not None]
        read = self._window.my_cells if self._window is not None else None

        def finished() -> bool:
            return MPI.Request.Testall(requests) and (read is None or not cells or bool(read[cells].all()))

        def missing() -> list[int]:
            return sorted(
                {
                    entry.rank
                    for entry in done
                    if (read is not None and entry.cell is not None and not read[entry.cell])
                    or not all(request.Test() for request in entry.requests)
                }
            )

        self.group.grid.watchdog.wait_until(finished, missing, self.what)
        for entry in done:
            if entry.buffer is not None:
                self.pool.give(entry.buffer)
            if self._window is not None and entry.cell is not None:
                self._window.give_cell(entry.cell)
                if entry.box is not None:
                    entry.box.readers -= 1
                    if not entry.box.readers:
                        self._window.give(entry.box.extent)
                        del self._boxes[entry.box.key]

    # -- receiving -------------------------------------------------------------------------------------------------

    def receive(
        self,
        shape: tuple[int, ...],
        dtype: Any,
        peer: int,
        tag: int,
        target: Array | None = None,
        *,
        for_later: bool = False,
    ) -> Receipt:
        rank = self.group.members[peer]
        dtype = np.dtype(dtype)
        n_bytes = math.prod(shape) * dtype.itemsize
        number = self._first_tag + tag
        if n_bytes and self._in_window(rank, n_bytes):
            note = np.empty(NOTE_WORDS, dtype=np.int64)
            request = self.group.grid.data.Irecv([note, MPI.INT64_T], rank, number)
            receipt = Receipt(
                None, rank, [request], target, for_later, note=note, shape=shape, dtype=dtype, number=number
            )
        else:
            receipt = Receipt(None, rank, [], target, shape=shape, dtype=dtype, number=number)
            self._post(receipt)
        self._receiving.append(receipt)
        return receipt

    def _post(self, receipt: Receipt) -> None:
        """Post the receives of an ordinary message, straight into the target where that is contiguous."""
        target = receipt.target
        if target is not None and target.flags.c_contiguous:
            receipt.array, receipt.target = target, None
        else:
            receipt.array, receipt.buffer = self.pool.take(receipt.shape, receipt.dtype)
        if receipt.array.size:
            data = self.group.grid.data
            flat = receipt.array.reshape(-1).view(np.uint8)
            receipt.requests = [data.Irecv([part, MPI.BYTE], receipt.peer, receipt.number) for part in cut(flat)]

    def wait(self, receipts: list[Receipt]) -> None:
        self._wait_requests(receipts)
        overflow = [r for r in receipts if r.note is not None and SharedWindow.by_message(r.note)]
        for receipt in overflow:
            receipt.number += OVERFLOW
            self._post(receipt)
        self._wait_requests(overflow)
        for receipt in receipts:
            note = receipt.note
            if note is not None and not SharedWindow.by_message(note):
                assert self._window is not None
                shape, receipt.whole = receipt.whole_shape or receipt.shape, receipt.whole_shape is not None
                receipt.array = self._window.noted(receipt.peer, note, shape, receipt.dtype)
                receipt.cell = SharedWindow.cell_of(note)
            receipt.note = None
            if receipt.target is not None:
                copy_box(receipt.target, receipt.array, for_later=receipt.for_later)
                receipt.target = None
                self.release(receipt)

    def _wait_requests(self, receipts: list[Receipt]) -> None:
        requests = [request for receipt in receipts for request in receipt.requests]
        if requests:
            peers = [receipt.peer for receipt in receipts for _ in receipt.requests]
            self.group.grid.watchdog.wait(requests, peers, self.what)
            for receipt in receipts:
                receipt.requests = []

    def wait_some(self, receipts: Mapping[int, Receipt], *, least: int) -> list[int]:
        here: list[int] = []

        def enough() -> bool:
            here[:] = [key for key, receipt in receipts.items() if MPI.Request.Testall(receipt.requests)]
            return len(here) >= least

        def missing() -> list[int]:
            return sorted(receipt.peer for key, receipt in receipts.items() if key not in here)

        self.group.grid.watchdog.wait_until(enough, missing, self.what)
        self.wait([receipts[key] for key in here])
        return here

    def release(self, receipt: Receipt) -> None:
        if receipt.buffer is not None:
            self.pool.give(receipt.buffer)
            receipt.buffer = None
        if receipt.cell is not None and self._window is not None:
            self._window.acknowledge(receipt.peer, receipt.cell)
            receipt.cell = None

    def close(self) -> None:
        self.flush()
        self._give_lent()

    def abandon(self) -> None:
        for receipt in self._receiving:
            for request in receipt.requests:
                if not request.Test():
                    request.Cancel()
        # MPI ends after Python has freed its objects; a reference that nobody gives back outlives both.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object((self._receiving, self._sent, self._boxes)))

    def progress(self) -> Callable[[], object]:
        data, tag = self.group.grid.data, self._first_tag + PROBE_TAG
        return lambda: data.Iprobe(MPI.ANY_SOURCE, tag)
