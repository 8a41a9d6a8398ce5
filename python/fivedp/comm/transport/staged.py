"""Device memory through pinned host memory: works everywhere.

An array travels in chunks. On the sender chunk i + 1 is copied from the device while MPI sends chunk i, and on the
receiver chunk i goes to the device while MPI receives chunk i + 1:

    sender     copy 0 | copy 1   copy 2   ...        two pinned buffers, used in turn
                      | send 0   send 1   ...
    receiver          | recv 0   recv 1   recv 2
                               | copy 0   copy 1

so a long array takes the longer of the two times, not their sum. A chunk is one message: both sides must cut alike,
and the ranks of a group agree on the size at their first call.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

from mpi4py import MPI

from fivedp.comm.transport.gpu import DeviceMemory, Event, Gpu
from fivedp.comm.transport.mail import Buffer, pieces
from fivedp.comm.transport.transfer import Link, Transfer

# Long enough that the start of a copy (about 10 microseconds) does not count, short enough to fill the pipeline.
CHUNK_BYTES = 4 << 20
CHUNKS_IN_FLIGHT = 2


@dataclass(slots=True)
class _Chunk:
    """A chunk in pinned memory: on its way between device and host (`event`) or between ranks (`request`)."""

    offset: int
    buffer: Buffer
    address: int
    event: Event = None
    request: MPI.Request | None = None


class _Staged(Transfer):
    """What both directions have: the chunks to come, those in flight, and a stream for copies."""

    def __init__(self, link: StagedLink, channel: tuple[str, int, int], memory: DeviceMemory) -> None:
        super().__init__(channel, memory)
        self.link, self.gpu = link, link.gpu
        # The caller's stream now: behind its kernels that write the array, or that still read what lies there.
        self._ready = self.gpu.mark()
        self._to_come = deque(pieces(memory.n_bytes, link.chunk_bytes))
        self._copying: deque[_Chunk] = deque()
        self._travelling: deque[_Chunk] = deque()
        self._stream: Any = None

    def _begin_chunk(self) -> _Chunk | None:
        """A pinned buffer for the next chunk; None where enough are in flight or all have begun."""
        if not self._to_come or len(self._copying) + len(self._travelling) >= CHUNKS_IN_FLIGHT:
            return None
        if self._stream is None:
            self._stream = self.gpu.take_stream()
            self._stream.wait_event(self._ready)
        offset, size = self._to_come.popleft()
        return _Chunk(offset, *self.gpu.pinned(size))

    def _finish(self) -> None:
        self.done = True
        if self._stream is not None:
            self.gpu.give_stream(self._stream)
            self._stream = None


class StagedSend(_Staged):
    """Device, pinned memory, MPI."""

    def advance(self) -> bool:
        moved = False
        while self._travelling and self._travelling[0].request.Test():  # type: ignore[union-attr]
            self._travelling.popleft()
            moved = True
        while self._copying and self.gpu.reached(self._copying[0].event):
            chunk = self._copying.popleft()
            chunk.request = self.link.comm.Isend([chunk.buffer, MPI.BYTE], self.rank, self.number)
            self._travelling.append(chunk)
            moved = True
        while (begun := self._begin_chunk()) is not None:
            self.gpu.copy(begun.address, self.memory.pointer + begun.offset, begun.buffer.size, self._stream)
            begun.event = self.gpu.mark(self._stream)
            self._copying.append(begun)
            moved = True
        self.issued = not self._to_come and not self._copying
        if self.issued and not self._travelling:
            self._finish()
        return moved

    def receives(self) -> list[MPI.Request]:
        return []


class StagedReceive(_Staged):
    """MPI, pinned memory, device."""

    def advance(self) -> bool:
        moved = False
        while self._copying and self.gpu.reached(self._copying[0].event):
            self._copying.popleft()
            moved = True
        while self._travelling and self._travelling[0].request.Test():  # type: ignore[union-attr]
            chunk = self._travelling.popleft()
            self.gpu.copy(self.memory.pointer + chunk.offset, chunk.address, chunk.buffer.size, self._stream)
            self.event = chunk.event = self.gpu.mark(self._stream)
            self._copying.append(chunk)
            moved = True
        while (begun := self._begin_chunk()) is not None:
            begun.request = self.link.comm.Irecv([begun.buffer, MPI.BYTE], self.rank, self.number)
            self._travelling.append(begun)
            moved = True
        self.issued = not self._to_come
        self.arrived = self.issued and not self._travelling
        if self.arrived and not self._copying:
            self._finish()
        return moved

    def receives(self) -> list[MPI.Request]:
        return [chunk.request for chunk in self._travelling if chunk.request is not None]


class StagedLink(Link):
    """Pinned staging between this rank and another.

    Parameters
    ----------
    chunk_bytes : int
        The same on both sides.
    """

    name = "staged"

    def __init__(self, gpu: Gpu, comm: MPI.Intracomm, rank: int, chunk_bytes: int = CHUNK_BYTES) -> None:
        super().__init__(gpu, comm, rank)
        self.chunk_bytes = chunk_bytes

    def send(self, memory: DeviceMemory, number: int) -> Transfer:
        return StagedSend(self, ("send", self.rank, number), memory)

    def receive(self, memory: DeviceMemory, number: int) -> Transfer:
        return StagedReceive(self, ("receive", self.rank, number), memory)
