"""Device memory straight into MPI, where the library is CUDA-aware: choice.py settles that.

MPI knows nothing of streams. A send is handed over when the work that writes its memory is done, a receive when the
work that still uses its memory is done; both are asked for, not waited for. A receive that has completed may be read
by any stream.
"""

from __future__ import annotations

from collections.abc import Callable

from mpi4py import MPI

from fivedp.comm.transport.gpu import DeviceMemory
from fivedp.comm.transport.mail import MAX_MESSAGE_BYTES, pieces
from fivedp.comm.transport.transfer import Link, Transfer


class CudaMpiTransfer(Transfer):
    """A send or a receive, which differ in the call of MPI alone."""

    def __init__(self, link: Link, channel: tuple[str, int, int], memory: DeviceMemory) -> None:
        super().__init__(channel, memory)
        self.gpu = link.gpu
        self._begin: Callable[..., MPI.Request] = link.comm.Isend if channel[0] == "send" else link.comm.Irecv
        self._ready = self.gpu.mark()
        self._requests: list[MPI.Request] = []

    def advance(self) -> bool:
        if not self.issued:
            if not self.gpu.reached(self._ready):
                return False
            for offset, size in pieces(self.memory.n_bytes, MAX_MESSAGE_BYTES):
                part = MPI.buffer.fromaddress(self.memory.pointer + offset, size)
                self._requests.append(self._begin([part, MPI.BYTE], self.rank, self.number))
            self.issued = True
        if MPI.Request.Testall(self._requests):
            self.arrived = self.done = True
        return self.done

    def receives(self) -> list[MPI.Request]:
        return self._requests if self.channel[0] == "receive" else []


class CudaMpiLink(Link):
    """CUDA-aware MPI between this rank and another."""

    name = "cuda_mpi"

    def send(self, memory: DeviceMemory, number: int) -> Transfer:
        return CudaMpiTransfer(self, ("send", self.rank, number), memory)

    def receive(self, memory: DeviceMemory, number: int) -> Transfer:
        return CudaMpiTransfer(self, ("receive", self.rank, number), memory)
