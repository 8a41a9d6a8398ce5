"""What an operation may ask of a mailbox, wherever its arrays live, and what the transports share."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from mpi4py import MPI

from fivedp.comm.grid import Group
from fivedp.comm.lent import lend

Array = Any
Buffer = npt.NDArray[np.uint8]
MAX_MESSAGE_BYTES = 1 << 30
# Buffers kept for the next call: those of a layer of a few thousand tokens and what it returns.
_POOL_BYTES = 512 << 20
# Below it the allocator has pages at hand.
_LENT_BYTES = 1 << 20
# Tags of a group are 16 apart: `tag` carries payload or the note of a box that is read in place, `tag + OVERFLOW` what
# could not be read in place. The agreement on a call has 1.
TAGS = {"A": 2, "B": 3, "C": 4, "replica": 5, "rows": 6}
GREETING_TAG, ACKNOWLEDGE_TAG, VERDICT_TAG, PROBE_TAG = 0, 7, 8, 15
OVERFLOW = 8
_TAGS_PER_CHANNEL = 16


def tag_number(group: Group, tag: int) -> int:
    """The tag of MPI that stands for one of `TAGS` within a group."""
    return _TAGS_PER_CHANNEL * group.channel + tag


def pieces(n_bytes: int, largest: int) -> list[tuple[int, int]]:
    """(offset, size) of the pieces in which `n_bytes` travel, none larger than `largest`."""
    return [(start, min(largest, n_bytes - start)) for start in range(0, n_bytes, largest)]


def cut(flat: Buffer) -> list[Buffer]:
    """The messages in which contiguous bytes travel."""
    if flat.size <= MAX_MESSAGE_BYTES:
        return [flat]
    return [flat[start : start + size] for start, size in pieces(flat.size, MAX_MESSAGE_BYTES)]


class BufferPool:
    """Host buffers that are used again, for fresh pages cost as much as the copy into them, or more.

    How many rows an expert gets differs from call to call, and its buffers shall fit the next: sizes are rounded up by
    a thirty-second at most, and a buffer is used for what is up to an eighth smaller. Where more is kept than may be,
    the sizes go that were not used for longest.
    """

    def __init__(self) -> None:
        self._free: dict[int, list[Buffer]] = {}  # by size, the one that was used last at the end
        self._kept = 0
        self._returned: list[Buffer] = []

    def take(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> tuple[npt.NDArray[Any], Buffer]:
        """(array, buffer): an uninitialised array and the buffer to give back."""
        while self._returned:
            self.give(self._returned.pop())
        n_bytes = math.prod(shape) * dtype.itemsize
        step = max(4096, 1 << max(0, n_bytes.bit_length() - 6))
        size = max(step, -(-n_bytes // step) * step)
        fitting = (self._free.get(larger) for larger in range(size, size + size // 8 + 1, step))
        free = next(filter(None, fitting), None)
        if free is None:
            buffer = np.empty(size, dtype=np.uint8)
        else:
            buffer = free.pop()
            self._kept -= buffer.size
        return buffer[:n_bytes].view(dtype).reshape(shape), buffer

    def give(self, buffer: Buffer) -> None:
        """Return a buffer that nothing reads or writes any more."""
        same = self._free.pop(buffer.size, [])
        same.append(buffer)
        self._free[buffer.size] = same
        self._kept += buffer.size
        while self._kept > _POOL_BYTES:
            oldest = next(iter(self._free))
            if self._free[oldest]:
                self._free[oldest].pop()
                self._kept -= oldest
            else:
                del self._free[oldest]

    def lend(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        """An uninitialised array to be returned to the user; its memory comes back when nobody has it any more."""
        if math.prod(shape) * dtype.itemsize < _LENT_BYTES:
            return np.empty(shape, dtype)
        _, buffer = self.take(shape, dtype)
        return lend(buffer, shape, dtype, self._returned, buffer)


@dataclass(slots=True)
class Workspace:
    """Memory for a result that will be sent: where readers reach it if there is room, else from a pool."""

    array: Array
    extent: tuple[int, int] | None = None
    buffer: Buffer | None = None


@dataclass(slots=True)
class Receipt:
    """An array that is on its way; `array` may be read after `Mailbox.wait`."""

    array: Array
    peer: int
    requests: list[MPI.Request]
    target: Array | None = None
    for_later: bool = False
    buffer: Buffer | None = None
    note: npt.NDArray[np.int64] | None = None
    shape: tuple[int, ...] = ()
    dtype: Any = None
    number: int = 0
    cell: int | None = None
    whole_shape: tuple[int, ...] | None = None
    """Of the array whose rows are awaited; None where a whole array is."""
    whole: bool = False
    """Whether `array` is that array, read in place, instead of the rows alone."""
    transfer: Any = None
    """What brings a device array, until it has been waited for."""

    @property
    def under_way(self) -> bool:
        """Whether the array must be waited for."""
        return bool(self.requests) or self.transfer is not None


class Mailbox(ABC):
    """The messages of one call.

    Parameters
    ----------
    group : Group
    what : str
        The call, for messages of errors.
    """

    def __init__(self, group: Group, what: str) -> None:
        self.group, self.what = group, what
        self.xp: Any = np
        """numpy or cupy: where the arrays live."""
        self.pool: BufferPool = group.grid.cache.setdefault("buffer_pool", BufferPool())
        self._first_tag = tag_number(group, 0)
        self._lent: list[Workspace] = []

    @property
    def host(self) -> Mailbox:
        """The mailbox of this call for NumPy arrays, such as what is decided about the others: this one, if it is that.

        Both have the same tags. So all that is sent by one of them is waited for before anything goes by the other.
        """
        return self

    @abstractmethod
    def workspace(self, shape: tuple[int, ...], dtype: Any) -> Workspace:
        """Memory in which to compute what will be sent."""

    @abstractmethod
    def private(self, shape: tuple[int, ...], dtype: Any) -> Workspace:
        """Memory of this rank alone, to be returned as a workspace is: what is sent from it travels as messages."""

    @abstractmethod
    def give_workspace(self, workspace: Workspace) -> None:
        """Return a workspace of which every message has been received."""

    def give_at_end(self, workspace: Workspace) -> None:
        """Return a workspace when the call ends."""
        self._lent.append(workspace)

    def _give_lent(self) -> None:
        """Return them, at the end of `close`."""
        while self._lent:
            self.give_workspace(self._lent.pop())

    @abstractmethod
    def place(self, array: Array) -> Array:
        """The array, or a copy of it where readers reach it until the call ends: for sending parts that overlap."""

    @abstractmethod
    def send(self, array: Array, peer: int, tag: int, stage: int) -> None:
        """Send an array to a member; it must not change until a `flush` of its stage."""

    @abstractmethod
    def send_rows(self, array: Array, rows: npt.NDArray[np.int32], peer: int, tag: int, stage: int) -> None:
        """Send some rows of an array to a member, who reads them where they lie if it can; see `receive_rows`.

        The array must not change until a `flush` of its stage.
        """

    @abstractmethod
    def flush(self, stage: int | None = None, tags: tuple[int, ...] = ()) -> None:
        """Wait until the messages with `tags` of all stages up to `stage` (every one by default) have been received."""

    @abstractmethod
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
        """Receive an array from a member, into `target` where it is given; `for_later`: nobody here reads that soon."""

    def receive_rows(self, n_rows: int, whole: tuple[int, ...], dtype: Any, peer: int, tag: int) -> Receipt:
        """Receive `n_rows` rows of a member's array, which has shape `whole`.

        After `wait`, the receipt's `array` is either those rows or, where `receipt.whole` says so, the member's whole
        array, to be read in place.
        """
        receipt = self.receive((n_rows, *whole[1:]), dtype, peer, tag)
        receipt.whole_shape = whole
        return receipt

    @abstractmethod
    def wait(self, receipts: list[Receipt]) -> None:
        """Wait until the arrays can be read; copy those that have a target."""

    @abstractmethod
    def wait_some(self, receipts: Mapping[int, Receipt], *, least: int) -> list[int]:
        """The keys of those that have come, after waiting until they are `least`; their arrays can be read."""

    @abstractmethod
    def release(self, receipt: Receipt) -> None:
        """This rank has read the array for the last time."""

    @abstractmethod
    def close(self) -> None:
        """Wait until every message has been received, and return what the call had placed."""

    @abstractmethod
    def abandon(self) -> None:
        """The call has failed: take back the receives, and keep for good the memory that may still be touched."""

    @abstractmethod
    def progress(self) -> Callable[[], object]:
        """A function to call now and then while computing: MPI moves messages only inside its own calls."""
