"""The mailbox of CuPy arrays: every array a transfer, over the link that was settled for its two ranks.

Between the user's stream and the transfers there are two rules. What is sent is what the current stream had written
when `send` was called: later kernels on it may go on. What has arrived may be read on the stream that is current in
`wait`: that stream is told to wait for the copy, the host is not. An array that is not contiguous is packed on the
device, by a kernel of the current stream.

Transfers go on while the host is inside a call of this mailbox: in every wait all of them are advanced, also those that
nobody waits for yet, so no circle of waits can close.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from fivedp.comm.grid import Group
from fivedp.comm.transport.choice import links_of
from fivedp.comm.transport.host import HostMailbox
from fivedp.comm.transport.mail import Array, Mailbox, Receipt, Workspace
from fivedp.comm.transport.transfer import Transfer
from fivedp.errors import TransportError

# A chunk takes about 100 microseconds from the device; who looks less often lets the pipeline run dry.
_LONGEST_REST_S = 50e-6


class DeviceMailbox(Mailbox):
    """A mailbox of CuPy arrays.

    Parameters
    ----------
    xp : module
        cupy.
    """

    def __init__(self, group: Group, what: str, xp: Any) -> None:
        super().__init__(group, what)
        self.xp = xp
        self._links = links_of(group, what, xp)
        self._gpu = self._links.gpu
        self._transfers: list[Transfer] = []
        self._sent: list[tuple[int, int, Transfer]] = []
        self._read: list[Transfer] = []
        self._host: HostMailbox | None = None

    @property
    def host(self) -> HostMailbox:
        if self._host is None:
            self._host = HostMailbox(self.group, self.what)
        return self._host

    def _advance(self) -> bool:
        """Advance every transfer that may go on; whether any did."""
        moved, waiting = False, set()
        for transfer in self._transfers:
            if transfer.channel not in waiting:
                moved |= transfer.advance()
                if not transfer.issued:
                    waiting.add(transfer.channel)
        self._transfers = [transfer for transfer in self._transfers if not transfer.done]
        return moved

    def _wait_until(self, reached: Callable[[Transfer], bool], transfers: list[Transfer]) -> None:
        """Advance everything until some transfers have come as far as `reached` says."""

        def done() -> bool:
            while not all(map(reached, transfers)):
                if not self._advance():
                    return False
            return True

        def missing() -> list[int]:
            return sorted({transfer.rank for transfer in transfers if not reached(transfer)})

        self.group.grid.watchdog.wait_until(done, missing, self.what, longest_rest_s=_LONGEST_REST_S)

    def _check(self, array: Array) -> None:
        if int(array.device.id) != self._gpu.device:
            raise TransportError(
                f"an array lies on device {int(array.device.id)}, but this rank's first array of the group lay on "
                f"device {self._gpu.device}; all on one device would be right"
            )

    # -- sending ---------------------------------------------------------------------------------------------------

    def workspace(self, shape: tuple[int, ...], dtype: Any) -> Workspace:
        return Workspace(self.xp.empty(shape, dtype=dtype))

    private = workspace

    def give_workspace(self, workspace: Workspace) -> None:
        workspace.array = None

    def place(self, array: Array) -> Array:
        return array

    def send(self, array: Array, peer: int, tag: int, stage: int) -> None:
        if not array.size:
            return
        self._check(array)
        rank = self.group.members[peer]
        self.group.grid.traffic.count(rank, array.nbytes)
        memory = self._gpu.memory_of(self.xp.ascontiguousarray(array))
        transfer = self._links.to[peer].send(memory, self._first_tag + tag)
        self._transfers.append(transfer)
        self._sent.append((tag, stage, transfer))
        self._advance()

    def send_rows(self, array: Array, rows: npt.NDArray[np.int32], peer: int, tag: int, stage: int) -> None:
        if len(rows):
            self.send(self.xp.take(array, self.xp.asarray(rows), axis=0), peer, tag, stage)

    def flush(self, stage: int | None = None, tags: tuple[int, ...] = ()) -> None:
        flushed, self._sent = self._sent, []
        if stage is not None:
            self._sent = [entry for entry in flushed if entry[1] > stage or entry[0] not in tags]
            flushed = [entry for entry in flushed if entry[1] <= stage and entry[0] in tags]
        self._wait_until(lambda transfer: transfer.done, [transfer for _, _, transfer in flushed])

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
        rank, dtype = self.group.members[peer], np.dtype(dtype)
        if target is not None:
            self._check(target)
        if target is not None and target.flags.c_contiguous:
            array, target = target, None
        else:
            array = self.xp.empty(shape, dtype=dtype)
        receipt = Receipt(array, rank, [], target, shape=shape, dtype=dtype)
        if math.prod(shape):
            memory = self._gpu.memory_of(array)
            receipt.transfer = self._links.to[peer].receive(memory, self._first_tag + tag)
            self._transfers.append(receipt.transfer)
            self._advance()
        return receipt

    def wait(self, receipts: list[Receipt]) -> None:
        arriving = [receipt.transfer for receipt in receipts if receipt.transfer is not None]
        self._wait_until(lambda transfer: transfer.arrived, arriving)
        stream = self._gpu.current_stream()
        for transfer in arriving:
            if transfer.event is not None:
                stream.wait_event(transfer.event)
        self._read = [transfer for transfer in self._read if not transfer.done] + arriving
        for receipt in receipts:
            receipt.transfer = None
            if receipt.target is not None:
                receipt.target[...] = receipt.array
                receipt.target = None

    def wait_some(self, receipts: Mapping[int, Receipt], *, least: int) -> list[int]:
        def arrived() -> list[int]:
            return [key for key, one in receipts.items() if one.transfer is None or one.transfer.arrived]

        def enough() -> bool:
            while len(arrived()) < least:
                if not self._advance():
                    return False
            return True

        def missing() -> list[int]:
            here = arrived()
            return sorted(receipt.peer for key, receipt in receipts.items() if key not in here)

        self.group.grid.watchdog.wait_until(enough, missing, self.what, longest_rest_s=_LONGEST_REST_S)
        here = arrived()
        self.wait([receipts[key] for key in here])
        return here

    def release(self, receipt: Receipt) -> None:
        # Its memory goes back to the pool of the stream that was current when it was made, behind the kernels there.
        receipt.array = None

    def close(self) -> None:
        self.flush()
        # A writer waits for the answer to its note, and pinned memory is in use, until the copies are done.
        self._wait_until(lambda transfer: transfer.done, self._read)
        self._read = []
        self._give_lent()
        if self._host is not None:
            self._host.close()

    def abandon(self) -> None:
        if self._host is not None:
            self._host.abandon()
        # The receive of an answer belongs to all transfers of a link: once each.
        for request in {id(r): r for transfer in self._transfers for r in transfer.receives()}.values():
            if not request.Test():
                request.Cancel()
        # MPI and the device end after Python has freed its objects; a reference that nobody gives back outlives both.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._transfers))

    def progress(self) -> Callable[[], object]:
        return self._advance
