"""Which transport carries device arrays between two ranks: settled once for a group, alike on both sides.

    FIVEDP_TRANSPORT     that one, or an error on every rank
    cuda_mpi             where every rank of the group has proven that its MPI takes device memory (proof.py)
    ipc                  between two processes of a node that have read each other's device memory here
    staged               everywhere else

At the first call with device arrays the members of a group exchange greetings, which say what each asks for and can do.
A greeting carries the handle of 16 random bytes on the sender's device as well; who is on the same node opens it, reads
them and compares: this proves in one go that handles cross between the two processes (other containers, other users),
that the devices reach each other, and that events do. The verdicts are exchanged in turn, for a pair is settled by
both, and an error has to be the same everywhere.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import struct
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from mpi4py import MPI

from fivedp.comm.grid import Group
from fivedp.comm.transport import staged
from fivedp.comm.transport.cuda_mpi import CudaMpiLink
from fivedp.comm.transport.gpu import Gpu
from fivedp.comm.transport.ipc import Allocation, Handles, IpcLink, Note, read
from fivedp.comm.transport.mail import ACKNOWLEDGE_TAG, GREETING_TAG, MAX_MESSAGE_BYTES, VERDICT_TAG, tag_number
from fivedp.comm.transport.proof import Verdict, cuda_mpi_verdict
from fivedp.comm.transport.staged import StagedLink
from fivedp.comm.transport.transfer import Link
from fivedp.errors import TransportError

NAMES = ("cuda_mpi", "ipc", "staged")
_CUDA_MPI, _IPC, _STAGED = range(len(NAMES))
VARIABLE, CHUNK_VARIABLE = "FIVEDP_TRANSPORT", "FIVEDP_STAGING_CHUNK"
_FREE, _UNKNOWN = -1, -2
_GREETING = struct.Struct(f"<4q16s200s{Note.N_BYTES}s")
_NONCE_BYTES = 16
_IPC_DEADLINE_S = 10.0
# What a rank found of another, and how that reads.
_READ, _ITSELF, _FAR, _NO_HANDLE, _CLOSED, _WRONG, _NOT_TRIED = range(7)
_FINDINGS = {
    _READ: "they have read each other's device memory",
    _ITSELF: "a process can't open its own handles",
    _FAR: "they are on different nodes",
    _NO_HANDLE: "device memory has no handles there",
    _CLOSED: "a handle can't be opened: other containers, or devices that don't reach each other",
    _WRONG: "what was read through a handle was wrong",
    _NOT_TRIED: "it was not tried",
}


@dataclass(frozen=True)
class Links:
    """The ways from this rank to the members of its group.

    Attributes
    ----------
    gpu : Gpu
    to : list of Link
        By member.
    why : list of str
        For each, what speaks for it.
    """

    gpu: Gpu
    to: list[Link]
    why: list[str]


@dataclass(frozen=True)
class _Greeting:
    """What a rank tells the others about itself."""

    asks_for: int
    cuda_mpi: bool
    chunk_bytes: int
    pid: int
    nonce: bytes
    why: str
    note: Note

    def pack(self) -> npt.NDArray[np.uint8]:
        numbers = (self.asks_for, int(self.cuda_mpi), self.chunk_bytes, self.pid)
        why = self.why.encode()[:200]
        return np.frombuffer(_GREETING.pack(*numbers, self.nonce, why, self.note.pack().tobytes()), np.uint8)

    @staticmethod
    def unpack(data: npt.NDArray[np.uint8]) -> _Greeting:
        asks_for, cuda, chunk, pid, nonce, why, note = _GREETING.unpack(data.tobytes())
        text = why.rstrip(b"\0").decode(errors="replace")
        return _Greeting(asks_for, bool(cuda), chunk, pid, nonce, text, Note.unpack(np.frombuffer(note, np.uint8)))


_devices: dict[tuple[int, int], tuple[Gpu, Handles]] = {}
_kept: list[Any] = []
"""Memory into which a device may still write."""


def links_of(group: Group, what: str, xp: Any) -> Links:
    """The links of a group, settled at its first call with device arrays, which is collective over it.

    Raises
    ------
    TransportError
        On every member, where FIVEDP_TRANSPORT asks for what can't be had.
    """
    links = group.cache.get("links")
    if not isinstance(links, Links):
        try:
            links = group.cache["links"] = _settle(group, what, xp)
        except TransportError:
            raise
        except BaseException as failure:  # of this rank alone, such as no memory on the device
            group.grid.watchdog.fail(failure)
            raise
    return links


def _settle(group: Group, what: str, xp: Any) -> Links:
    """Exchange greetings, then what each found of the others."""
    gpu, handles = _device(xp)
    asks_for, chunk_bytes = _settings()
    verdict = Verdict(False, f"it was not tried: {VARIABLE} asks for another")
    if group.size > 1 and asks_for in (_FREE, _CUDA_MPI):
        verdict = cuda_mpi_verdict(gpu, forced=asks_for != _FREE)
    nonce = secrets.token_bytes(_NONCE_BYTES)
    probe = xp.asarray(np.frombuffer(nonce, np.uint8))
    event, note = None, Note(0, Allocation(0, 0, 0))
    if group.size > 1 and asks_for in (_FREE, _IPC):
        event, note = _note_of(gpu, handles, int(probe.data.ptr))
    mine = _Greeting(asks_for, verdict.works, chunk_bytes, os.getpid(), nonce, verdict.why, note)
    greetings = [_Greeting.unpack(row) for row in _exchange(group, mine.pack(), GREETING_TAG, what)]
    _check_settings(group, greetings)
    asked = greetings[0].asks_for
    by_mpi = group.size > 1 and (asked == _CUDA_MPI or (asked == _FREE and all(g.cuda_mpi for g in greetings)))
    tried = not by_mpi and asked != _STAGED
    row = [_try_ipc(group, gpu, handles, peer, greetings[peer]) if tried else _NOT_TRIED for peer in range(group.size)]
    findings = np.stack(_exchange(group, np.array(row, np.uint8), VERDICT_TAG, what))
    findings = np.maximum(findings, findings.T)
    if event is not None:
        handles.exports.give_event(event)  # and `probe` may go: everybody has read it
    _check_choice(group, greetings, findings)
    links, why = list[Link](), list[str]()
    for peer, rank in enumerate(group.members):
        plain = StagedLink(gpu, group.grid.data, rank, chunk_bytes)
        if by_mpi:
            links.append(CudaMpiLink(gpu, group.grid.data, rank))
            why.append(greetings[peer].why)
        elif findings[group.index, peer] == _READ:
            links.append(IpcLink(greetings[peer].pid, plain, handles, tag_number(group, ACKNOWLEDGE_TAG)))
            why.append(_FINDINGS[_READ])
        else:
            links.append(plain)
            why.append(f"{VARIABLE} asks for it" if asked == _STAGED else _lacking(group, greetings, findings, peer))
    return Links(gpu, links, why)


def _note_of(gpu: Gpu, handles: Handles, pointer: int) -> tuple[tuple[Any, bytes] | None, Note]:
    """(event, note) for an array that the current stream writes; a note without handles where there are none."""
    found = handles.exports.find(pointer)
    if found is not None:
        with contextlib.suppress(gpu.runtime.CUDARuntimeError):
            event = handles.exports.take_event()
            event[0].record(gpu.current_stream())
            return event, Note(0, found[0], pointer - found[0].base, found[1], event[1])
    return None, Note(0, Allocation(0, 0, 0))


def _device(xp: Any) -> tuple[Gpu, Handles]:
    """The current device and this process's handles on it."""
    gpu = Gpu(xp)
    key = (id(xp), gpu.device)
    if key not in _devices:
        _devices[key] = gpu, Handles(gpu)
    return _devices[key]


def _settings() -> tuple[int, int]:
    """(transport asked for, bytes of a chunk) by the environment; unknown values as numbers that all ranks see."""
    name, text = os.environ.get(VARIABLE, ""), os.environ.get(CHUNK_VARIABLE, str(staged.CHUNK_BYTES))
    asks_for = NAMES.index(name) if name in NAMES else _UNKNOWN if name else _FREE
    return asks_for, min(int(text), MAX_MESSAGE_BYTES) if text.isdigit() and int(text) else _UNKNOWN


def _exchange(group: Group, mine: npt.NDArray[np.uint8], tag: int, what: str) -> list[npt.NDArray[np.uint8]]:
    """Every member's bytes, of one size."""
    data, number = group.grid.data, tag_number(group, tag)
    everyone = [mine if peer == group.index else np.empty_like(mine) for peer in range(group.size)]
    peers = [peer for peer in range(group.size) if peer != group.index]
    requests = [data.Irecv([everyone[peer], MPI.BYTE], group.members[peer], number) for peer in peers]
    requests += [data.Isend([mine, MPI.BYTE], group.members[peer], number) for peer in peers]
    group.grid.watchdog.wait(requests, [group.members[peer] for peer in peers] * 2, what)
    return everyone


def _try_ipc(group: Group, gpu: Gpu, handles: Handles, peer: int, greeting: _Greeting) -> int:
    """What this rank finds when it reads the other's random bytes through their handle."""
    if peer == group.index or greeting.pid == os.getpid():
        return _ITSELF
    if group.members[peer] not in group.grid.on_node:
        return _FAR
    if not greeting.note.memory_handle:
        return _NO_HANDLE
    stream = gpu.take_stream()
    copy = gpu.xp.asarray(np.zeros(_NONCE_BYTES, np.uint8))
    stream.wait_event(gpu.mark())
    buffer, address = gpu.pinned(_NONCE_BYTES)
    try:
        memory = gpu.memory_of(copy)
        read(gpu, handles.imports(greeting.pid), greeting.note, memory, stream)
        gpu.copy(address, memory.pointer, _NONCE_BYTES, stream)
        arrived, end = gpu.mark(stream), time.monotonic() + _IPC_DEADLINE_S
        while not gpu.reached(arrived):
            if time.monotonic() > end:
                _kept.append((copy, buffer, stream))
                return _CLOSED
            time.sleep(20e-6)
    except gpu.runtime.CUDARuntimeError:
        return _CLOSED
    gpu.give_stream(stream)
    return _READ if buffer.tobytes() == greeting.nonce else _WRONG


# -- errors, the same on every member ----------------------------------------------------------------------------------


def _check_settings(group: Group, greetings: list[_Greeting]) -> None:
    for rank, greeting in zip(group.members, greetings, strict=True):
        if greeting.asks_for == _UNKNOWN:
            raise TransportError(
                f"{VARIABLE} on rank {rank} is no transport; cuda_mpi, ipc, staged, or unset would be right"
            )
        if greeting.chunk_bytes == _UNKNOWN:
            raise TransportError(f"{CHUNK_VARIABLE} on rank {rank} is no positive number of bytes")
        for name, value, first in (
            (VARIABLE, greeting.asks_for, greetings[0].asks_for),
            (CHUNK_VARIABLE, greeting.chunk_bytes, greetings[0].chunk_bytes),
        ):
            if value != first:
                raise TransportError(
                    f"{name} differs between ranks {group.members[0]} and {rank}; the same on all would be right"
                )


def _check_choice(group: Group, greetings: list[_Greeting], findings: npt.NDArray[np.uint8]) -> None:
    asked = greetings[0].asks_for
    if group.size == 1:
        return
    if asked == _CUDA_MPI:
        for rank, greeting in zip(group.members, greetings, strict=True):
            if not greeting.cuda_mpi:
                raise TransportError(
                    f"{VARIABLE}=cuda_mpi can't be had on rank {rank}: {greeting.why}; unset, or staged, would be right"
                )
    if asked == _IPC:
        for first, second in np.argwhere(findings > _ITSELF):
            raise TransportError(
                f"{VARIABLE}=ipc can't be had between ranks {group.members[first]} and {group.members[second]}: "
                f"{_FINDINGS[int(findings[first, second])]}; unset would be right, which is ipc where it can be had"
            )


def _lacking(group: Group, greetings: list[_Greeting], findings: npt.NDArray[np.uint8], peer: int) -> str:
    """Why neither of the faster transports leads to a member."""
    without = next((greeting.why for greeting in greetings if not greeting.cuda_mpi), "")
    return f"no cuda_mpi: {without}; no ipc: {_FINDINGS[int(findings[group.index, peer])]}"
