"""One array on its way between two devices, and the line between two ranks that makes them.

A transfer goes on only when it is asked to (`advance`), and never waits: every wait of a mailbox asks all its transfers
again and again. Those of one direction, rank and tag are begun in order, the next when all messages of the one before
have been handed to MPI (`issued`), for MPI keeps the order of messages and knows no names for them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from mpi4py import MPI

from fivedp.comm.transport.gpu import DeviceMemory, Event


class Transfer(ABC):
    """An array on its way.

    Attributes
    ----------
    channel : tuple
        What it shares with the transfers that must keep their order.
    rank : int
        The grid rank at the other end.
    issued : bool
        Whether the next transfer of the channel may begin.
    arrived : bool
        Of a receive: whether the array is complete as soon as `event` is reached (at once where that is None).
    done : bool
        Whether neither MPI nor the device touches its memory any more.
    """

    def __init__(self, channel: tuple[str, int, int], memory: DeviceMemory) -> None:
        self.channel, self.memory = channel, memory
        self.rank, self.number = channel[1:]
        self.issued = self.arrived = self.done = False
        self.event: Event = None

    @abstractmethod
    def advance(self) -> bool:
        """Do what can be done without waiting; whether anything was done."""

    @abstractmethod
    def receives(self) -> list[MPI.Request]:
        """The receives that MPI has not completed."""


class Link(ABC):
    """The way of device arrays between this rank and another.

    Attributes
    ----------
    name : {"cuda_mpi", "ipc", "staged"}
    """

    name = ""

    def __init__(self, gpu: Any, comm: MPI.Intracomm, rank: int) -> None:
        self.gpu, self.comm, self.rank = gpu, comm, rank

    @abstractmethod
    def send(self, memory: DeviceMemory, number: int) -> Transfer:
        """Send what the current stream has written so far, as messages with tag `number`."""

    @abstractmethod
    def receive(self, memory: DeviceMemory, number: int) -> Transfer:
        """Receive into memory that work queued so far on the current stream may still use."""
