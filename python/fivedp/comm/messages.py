"""Payload between the members of a group: boxes of arrays, sent without blocking and counted.

Arrays travel as bytes, so every element type is one path and no message needs a datatype. A message above
`MAX_MESSAGE_BYTES` is cut, for counts are 32-bit integers in many an MPI. A box that is not contiguous is packed into a
buffer from the pool; one that is travels from where it lies. Device arrays pass through host buffers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from mpi4py import MPI

from fivedp.comm.grid import Group

Array = Any
MAX_MESSAGE_BYTES = 1 << 30
# Buffers kept for the next call; a product of 4096 needs less than this at any rank count.
_POOL_BYTES = 64 << 20


class BufferPool:
    """Host buffers that are used again, for fresh pages cost as much as the copy into them."""

    def __init__(self) -> None:
        self._free: dict[int, list[np.ndarray[Any, Any]]] = {}
        self._kept = 0

    def take(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """(array, buffer): an uninitialised array and the buffer to give back."""
        n_bytes = math.prod(shape) * dtype.itemsize
        size = max(4096, -(-n_bytes // 65536) * 65536 if n_bytes > 65536 else 1 << max(0, n_bytes - 1).bit_length())
        free = self._free.get(size)
        if free:
            buffer = free.pop()
            self._kept -= size
        else:
            buffer = np.empty(size, dtype=np.uint8)
        return buffer[:n_bytes].view(dtype).reshape(shape), buffer

    def give(self, buffer: np.ndarray[Any, Any]) -> None:
        """Return a buffer that nothing reads or writes any more."""
        if self._kept + buffer.size <= _POOL_BYTES:
            self._free.setdefault(buffer.size, []).append(buffer)
            self._kept += buffer.size


class Receipt:
    """An array that is on its way; `array` may be read after `Mailbox.wait`."""

    __slots__ = ("array", "buffer", "peer", "requests", "target")

    def __init__(
        self,
        array: Array,
        buffer: np.ndarray[Any, Any] | None,
        requests: list[MPI.Request],
        peer: int,
        target: Array | None,
    ) -> None:
        self.array, self.buffer, self.requests, self.peer, self.target = array, buffer, requests, peer, target


class Mailbox:
    """The messages of one call.

    Parameters
    ----------
    group : Group
    what : str
        The call, for messages of errors.
    xp : module
        numpy or cupy: where the arrays live.
    """

    def __init__(self, group: Group, what: str, xp: Any) -> None:
        self.group, self.what, self.xp = group, what, xp
        self._on_host = xp is np
        pool = group.grid.__dict__.setdefault("buffer_pool", BufferPool())
        self.pool: BufferPool = pool
        self._sent: list[tuple[int, list[MPI.Request], int, np.ndarray[Any, Any] | None, Array]] = []

    def send(self, array: Array, peer: int, tag: int, stage: int) -> None:
        """Send an array to a member; it must not change until a `flush` of its stage."""
        if not array.size:
            return
        group = self.group
        rank, buffer = group.members[peer], None
        host = array
        if not self._on_host:
            host = self.xp.asnumpy(array)
        elif not array.flags.c_contiguous:
            host, buffer = self.pool.take(array.shape, array.dtype)
            host[...] = array
        flat = host.reshape(-1).view(np.uint8)
        data, number = group.grid.data, 8 * group.channel + tag
        requests = [data.Isend([part, MPI.BYTE], rank, number) for part in _cut(flat)]
        group.grid.traffic.count(rank, flat.size)
        self._sent.append((stage, requests, rank, buffer, host))

    def receive(self, shape: tuple[int, ...], dtype: Any, peer: int, tag: int, target: Array | None = None) -> Receipt:
        """Receive an array from a member, straight into `target` where that is contiguous."""
        group = self.group
        rank = group.members[peer]
        if target is not None and self._on_host and target.flags.c_contiguous:
            array, buffer, copy_to = target, None, None
        else:
            array, buffer = self.pool.take(shape, np.dtype(dtype))
            copy_to = target
        requests: list[MPI.Request] = []
        if array.size:
            data, number = group.grid.data, 8 * group.channel + tag
            flat = array.reshape(-1).view(np.uint8)
            requests = [data.Irecv([part, MPI.BYTE], rank, number) for part in _cut(flat)]
        return Receipt(array, buffer, requests, rank, copy_to)

    def wait(self, receipts: list[Receipt]) -> None:
        """Wait until the arrays have arrived; copy those that could not be received in place."""
        requests = [request for receipt in receipts for request in receipt.requests]
        if requests:
            peers = [receipt.peer for receipt in receipts for _ in receipt.requests]
            self.group.grid.watchdog.wait(requests, peers, self.what)
        for receipt in receipts:
            if receipt.requests or receipt.target is not None:
                receipt.requests = []
                if not self._on_host:
                    receipt.array = self.xp.asarray(receipt.array)
                if receipt.target is not None:
                    receipt.target[...] = receipt.array
                    receipt.target = None

    def release(self, receipt: Receipt) -> None:
        """Give the memory of a received array back; it is not read any more."""
        if receipt.buffer is not None:
            self.pool.give(receipt.buffer)
            receipt.buffer = None

    def flush(self, stage: int | None = None) -> None:
        """Wait until the messages of all stages up to `stage` (every one by default) have left; free their buffers."""
        if stage is None:
            done, self._sent = self._sent, []
        else:
            done = [entry for entry in self._sent if entry[0] <= stage]
            self._sent = [entry for entry in self._sent if entry[0] > stage]
        if not done:
            return
        requests = [request for entry in done for request in entry[1]]
        peers = [entry[2] for entry in done for _ in entry[1]]
        self.group.grid.watchdog.wait(requests, peers, self.what)
        for entry in done:
            if entry[3] is not None:
                self.pool.give(entry[3])

    def progress(self) -> Callable[[], object]:
        """A function to call now and then while computing: MPI moves messages only inside its own calls."""
        data, tag = self.group.grid.data, 8 * self.group.channel + 6
        return lambda: data.Iprobe(MPI.ANY_SOURCE, tag)


def _cut(flat: np.ndarray[Any, Any]) -> list[np.ndarray[Any, Any]]:
    if flat.size <= MAX_MESSAGE_BYTES:
        return [flat]
    return [flat[start : start + MAX_MESSAGE_BYTES] for start in range(0, flat.size, MAX_MESSAGE_BYTES)]
