"""What the transports need of a device: streams of their own, events, pinned memory, and copies that nobody waits for.

CuPy's current stream is the order that the user sees. `mark` notes a place in it; a copy stream waits for that place on
the device before it reads what the user's kernels write, or writes what they may still read. The other way round, the
user's stream waits for the event of a copy. The host never waits for a device, it only asks (`reached`), and no call
here synchronises more than one event.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fivedp.comm.transport.mail import Array, Buffer

_SUCCESS, _NOT_READY = 0, 600  # cudaSuccess, cudaErrorNotReady
Event = Any
Stream = Any


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Contiguous bytes on a device, and the array that keeps them from being used for something else."""

    pointer: int
    n_bytes: int
    owner: Array


class Gpu:
    """The device on which a process has its arrays.

    Parameters
    ----------
    xp : module
        cupy; the device is the current one.
    """

    def __init__(self, xp: Any) -> None:
        self.xp, self.cuda, self.runtime = xp, xp.cuda, xp.cuda.runtime
        self.device = int(xp.cuda.Device().id)
        self._idle_streams: list[Stream] = []

    def memory_of(self, array: Array) -> DeviceMemory:
        """The bytes of a contiguous array."""
        return DeviceMemory(int(array.data.ptr), int(array.nbytes), array)

    # -- order -----------------------------------------------------------------------------------------------------

    def current_stream(self) -> Stream:
        """The stream on which the caller's kernels run."""
        return self.cuda.get_current_stream()

    def mark(self, stream: Stream = None) -> Event:
        """An event that is reached when all work that now is in a stream (the caller's by default) is done."""
        event = self.cuda.Event(disable_timing=True)
        event.record(self.current_stream() if stream is None else stream)
        return event

    def reached(self, event: Event) -> bool:
        """Whether an event has been reached; raises what went wrong on the device before it."""
        status = self.runtime.eventQuery(event.ptr)
        if status not in (_SUCCESS, _NOT_READY):
            raise self.runtime.CUDARuntimeError(status)
        return bool(status == _SUCCESS)

    def take_stream(self) -> Stream:
        """A stream for copies, which waits for no other stream unless told to: not for the default stream either."""
        return self._idle_streams.pop() if self._idle_streams else self.cuda.Stream(non_blocking=True)

    def give_stream(self, stream: Stream) -> None:
        """Return a stream of which all work is done."""
        self._idle_streams.append(stream)

    # -- copies ----------------------------------------------------------------------------------------------------

    def pinned(self, n_bytes: int) -> tuple[Buffer, int]:
        """(bytes, address) of host memory that a device copies to and from while both go on; CuPy pools it."""
        memory = self.cuda.alloc_pinned_memory(n_bytes)
        return np.frombuffer(memory, dtype=np.uint8, count=n_bytes), int(memory.ptr)

    def copy(self, target: int, source: int, n_bytes: int, stream: Stream) -> None:
        """Copy between any two addresses, in the order of a stream."""
        self.runtime.memcpyAsync(target, source, n_bytes, self.runtime.memcpyDefault, stream.ptr)
