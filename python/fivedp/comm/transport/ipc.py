"""Device memory of another process of this node, opened and read in place of a message: no copy through the host.

The writer sends a note of 176 bytes: the handle of the allocation its array lies in, where in it, and the handle of an
event that is reached when the array is written. The reader opens the allocation (once: handles are kept, for opening
takes as long as copying megabytes), lets a stream of its own wait for the event, copies from device to device, and
when the copy is done answers with the number of the note. Until then the writer keeps the array.

Memory that has no handle, as that of a stream-ordered pool has none, goes through the host after a note that says so.
A process can't open its own handles; to itself a rank sends through the host as well.

An address says nothing for long: memory may be freed and another allocation begin there. The driver numbers
allocations, and the number is compared on both sides. What was opened before is closed when something new lies there,
and everything at exit.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from mpi4py import MPI

from fivedp.comm.transport.gpu import DeviceMemory, Event, Gpu
from fivedp.comm.transport.mail import OVERFLOW
from fivedp.comm.transport.staged import StagedLink
from fivedp.comm.transport.transfer import Link, Transfer

_IN_PLACE, _BY_MESSAGE = 0, 1
_HANDLE_BYTES = 64
_NOTE = struct.Struct(f"<6q{_HANDLE_BYTES}s{_HANDLE_BYTES}s")
_BUFFER_ID = 7  # CU_POINTER_ATTRIBUTE_BUFFER_ID


@dataclass(frozen=True, slots=True)
class Allocation:
    """The allocation that an address lies in, and its number, which no other of the process ever has."""

    base: int
    n_bytes: int
    number: int


def allocation_of(pointer: int) -> Allocation:
    """Ask the driver for an allocation; CuPy's pool cuts many arrays out of one.

    Raises
    ------
    OSError
        Where the driver does not know the address, or there is no driver.
    """
    driver = ctypes.CDLL("libcuda.so.1")
    base, n_bytes, number = ctypes.c_uint64(), ctypes.c_size_t(), ctypes.c_uint64()
    address = ctypes.c_uint64(pointer)
    status = driver.cuMemGetAddressRange_v2(ctypes.byref(base), ctypes.byref(n_bytes), address)
    status = status or driver.cuPointerGetAttribute(ctypes.byref(number), _BUFFER_ID, address)
    if status:
        raise OSError(f"the CUDA driver does not know the address {pointer:#x} (error {status})")
    return Allocation(base.value, n_bytes.value, number.value)


@dataclass(frozen=True, slots=True)
class Note:
    """Where a reader finds an array, or that it comes by message."""

    number: int
    allocation: Allocation
    offset: int = 0
    memory_handle: bytes = b""
    event_handle: bytes = b""

    N_BYTES = _NOTE.size

    def pack(self) -> npt.NDArray[np.uint8]:
        where = self.allocation
        kind = _IN_PLACE if self.memory_handle else _BY_MESSAGE
        numbers = (kind, self.number, where.base, where.n_bytes, where.number, self.offset)
        return np.frombuffer(_NOTE.pack(*numbers, self.memory_handle, self.event_handle), np.uint8)

    @staticmethod
    def unpack(data: npt.NDArray[np.uint8]) -> Note:
        kind, number, base, n_bytes, identity, offset, memory, event = _NOTE.unpack(data.tobytes())
        allocation = Allocation(base, n_bytes, identity)
        return Note(number, allocation, offset, memory, event) if kind == _IN_PLACE else Note(number, allocation)


class Exports:
    """This process's handles: one for each allocation, and events that come back when they have been read."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self._handles: dict[int, tuple[Allocation, bytes]] = {}
        self._idle_events: list[tuple[Event, bytes]] = []

    def find(self, pointer: int) -> tuple[Allocation, bytes] | None:
        """The allocation of an address and its handle; None where it can't have one."""
        try:
            allocation = allocation_of(pointer)
            known = self._handles.get(allocation.base)
            if known is None or known[0] != allocation:
                handle = self.gpu.runtime.ipcGetMemHandle(allocation.base)
                known = self._handles[allocation.base] = (allocation, handle)
        except (OSError, self.gpu.runtime.CUDARuntimeError):
            return None
        return known

    def take_event(self) -> tuple[Event, bytes]:
        """An event that other processes can wait for, and its handle."""
        if self._idle_events:
            return self._idle_events.pop()
        event = self.gpu.cuda.Event(disable_timing=True, interprocess=True)
        return event, self.gpu.runtime.ipcGetEventHandle(event.ptr)

    def give_event(self, event: tuple[Event, bytes]) -> None:
        """Return an event that no other process waits for any more."""
        self._idle_events.append(event)


class Imports:
    """What this process has opened of one other process."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self._memory: dict[int, tuple[Allocation, int]] = {}
        self._events: dict[bytes, int] = {}
        self._copies: list[Event] = []

    def memory(self, note: Note) -> int:
        """The address, in this process, of the array of a note."""
        wanted = note.allocation
        known = self._memory.get(wanted.base)
        if known is None or known[0] != wanted:
            # Every copy out of what lay here is done: its writer has freed it, for which it had waited for our answers.
            for base, (old, address) in list(self._memory.items()):
                if base < wanted.base + wanted.n_bytes and wanted.base < base + old.n_bytes:
                    del self._memory[base]
                    self.gpu.runtime.ipcCloseMemHandle(address)
            known = self._memory[wanted.base] = (wanted, self.gpu.runtime.ipcOpenMemHandle(note.memory_handle))
        return known[1] + note.offset

    def event(self, note: Note) -> int:
        """The event of a note, as the runtime names it."""
        event = self._events.get(note.event_handle)
        if event is None:
            event = self._events[note.event_handle] = self.gpu.runtime.ipcOpenEventHandle(note.event_handle)
        return event

    def note_copy(self, event: Event) -> None:
        """A copy out of the other process's memory is done when `event` is reached."""
        self._copies = [copy for copy in self._copies if not self.gpu.reached(copy)]
        self._copies.append(event)

    def close(self) -> None:
        """Close everything; the process ends, so what can't be closed is left to the driver."""
        try:
            # A call that ended halfway leaves copies that still read, or wait for an event that nobody will record.
            if not all(self.gpu.reached(copy) for copy in self._copies):
                return
        except self.gpu.runtime.CUDARuntimeError:
            return
        for _, address in self._memory.values():
            with contextlib.suppress(self.gpu.runtime.CUDARuntimeError):
                self.gpu.runtime.ipcCloseMemHandle(address)
        for event in self._events.values():
            with contextlib.suppress(self.gpu.runtime.CUDARuntimeError):
                self.gpu.runtime.eventDestroy(event)
        self._memory, self._events = {}, {}


class Handles:
    """All handles of this process, whatever communicators its ranks talk over: an allocation is opened once."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu, self.exports = gpu, Exports(gpu)
        self._imports: dict[int, Imports] = {}
        atexit.register(self.close)

    def imports(self, pid: int) -> Imports:
        """Those of process `pid` of this node."""
        return self._imports.setdefault(pid, Imports(self.gpu))

    def close(self) -> None:
        """Close what was opened."""
        for imports in self._imports.values():
            imports.close()


def read(gpu: Gpu, imports: Imports, note: Note, target: DeviceMemory, stream: Any) -> Event:
    """Copy the array of a note, once it is written; the event of the copy."""
    source = imports.memory(note)
    gpu.runtime.streamWaitEvent(stream.ptr, imports.event(note))
    gpu.copy(target.pointer, source, target.n_bytes, stream)
    done = gpu.mark(stream)
    imports.note_copy(done)
    return done


class IpcSend(Transfer):
    """A note, and then the wait for its answer."""

    def __init__(self, link: IpcLink, channel: tuple[str, int, int], memory: DeviceMemory) -> None:
        super().__init__(channel, memory)
        self.link = link
        self._inner: Transfer | None = None
        self._event: tuple[Event, bytes] | None = None
        found = link.handles.exports.find(memory.pointer)
        note_number = link.next_number()
        if found is None:
            note = Note(note_number, Allocation(0, 0, 0))
            self._inner = link.staged.send(memory, self.number + OVERFLOW)
        else:
            allocation, handle = found
            self._event = link.handles.exports.take_event()
            self._event[0].record(link.gpu.current_stream())
            note = Note(note_number, allocation, memory.pointer - allocation.base, handle, self._event[1])
        self._note, self._note_number = note.pack(), note_number
        self._request: MPI.Request | None = None

    def advance(self) -> bool:
        moved = False
        if self._request is None:
            self._request = self.link.comm.Isend([self._note, MPI.BYTE], self.rank, self.number)
            if self._event is not None:
                self.link.expect_answer(self._note_number)
            moved = True
        if self._inner is not None:
            moved |= self._inner.advance()
            self.issued, answered = self._inner.issued, self._inner.done
        else:
            self.issued, answered = True, self.link.answered(self._note_number)
        if answered and self._request.Test():
            if self._event is not None:
                self.link.handles.exports.give_event(self._event)
            self.done = moved = True
        return moved

    def receives(self) -> list[MPI.Request]:
        return self.link.answers()


class IpcReceive(Transfer):
    """A note, the copy that it leads to, and the answer."""

    def __init__(self, link: IpcLink, channel: tuple[str, int, int], memory: DeviceMemory) -> None:
        super().__init__(channel, memory)
        self.link, self.gpu = link, link.gpu
        self._ready = self.gpu.mark()
        self._note = np.empty(Note.N_BYTES, np.uint8)
        self._note_request: MPI.Request | None = None
        self._note_number = 0
        self._inner: Transfer | None = None
        self._stream: Any = None
        self._answer: MPI.Request | None = None
        self._words = np.empty(1, np.int64)

    def advance(self) -> bool:
        if self._note_request is None:
            self._note_request = self.link.comm.Irecv([self._note, MPI.BYTE], self.rank, self.number)
        moved = False
        if self._inner is None and self.event is None:
            if not self._note_request.Test():
                return False
            self._open(Note.unpack(self._note))
            moved = True
        if self._inner is not None:
            moved |= self._inner.advance()
            self.issued, self.arrived = self._inner.issued, self._inner.arrived
            self.done, self.event = self._inner.done, self._inner.event
            return moved
        if self._answer is None and self.gpu.reached(self.event):
            self.gpu.give_stream(self._stream)
            self._answer = self.link.answer(self._note_number, self._words)
            moved = True
        if self._answer is not None and self._answer.Test():
            self.done = moved = True
        return moved

    def _open(self, note: Note) -> None:
        """Begin the copy, or the receive of what comes by message."""
        self._note_number = note.number
        if not note.memory_handle:
            self._inner = self.link.staged.receive(self.memory, self.number + OVERFLOW)
            return
        self._stream = self.gpu.take_stream()
        self._stream.wait_event(self._ready)
        self.event = read(self.gpu, self.link.imports, note, self.memory, self._stream)
        self.issued = self.arrived = True

    def receives(self) -> list[MPI.Request]:
        if self._inner is not None:
            return self._inner.receives()
        return [self._note_request] if self._note_request is not None and self.event is None else []


class IpcLink(Link):
    """Memory of another process of this node.

    Parameters
    ----------
    pid : int
        The process.
    staged : StagedLink
        The way of what has no handle.
    handles : Handles
        Those of this process.
    answer_tag : int
        The MPI tag of answers, of which a rank and its peer have one in each direction.
    """

    name = "ipc"

    def __init__(self, pid: int, staged: StagedLink, handles: Handles, answer_tag: int) -> None:
        super().__init__(staged.gpu, staged.comm, staged.rank)
        self.staged, self.handles = staged, handles
        self.imports = handles.imports(pid)
        self._answer_tag = answer_tag
        self._last_number = 0
        self._awaited: set[int] = set()
        self._word = np.empty(1, np.int64)
        self._request: MPI.Request | None = None

    def send(self, memory: DeviceMemory, number: int) -> Transfer:
        return IpcSend(self, ("send", self.rank, number), memory)

    def receive(self, memory: DeviceMemory, number: int) -> Transfer:
        return IpcReceive(self, ("receive", self.rank, number), memory)

    # -- answers ---------------------------------------------------------------------------------------------------

    def next_number(self) -> int:
        """The number of the next note."""
        self._last_number += 1
        return self._last_number

    def expect_answer(self, number: int) -> None:
        """The reader will answer note `number`."""
        self._awaited.add(number)

    def answered(self, number: int) -> bool:
        """Whether the reader is done with what note `number` told it; answers come in any order."""
        while self._awaited:
            if self._request is None:
                self._request = self.comm.Irecv([self._word, MPI.INT64_T], self.rank, self._answer_tag)
            if not self._request.Test():
                break
            self._request = None
            self._awaited.discard(int(self._word[0]))
        return number not in self._awaited

    def answer(self, number: int, words: npt.NDArray[np.int64]) -> MPI.Request:
        """Tell the writer that note `number` has been read; `words` is where the message lies."""
        words[0] = number
        return self.comm.Isend([words, MPI.INT64_T], self.rank, self._answer_tag)

    def answers(self) -> list[MPI.Request]:
        """The receive of the next answer, where one is awaited."""
        return [] if self._request is None else [self._request]
