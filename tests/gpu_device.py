"""A device without a GPU: memory, streams and events on the host, with the asynchrony of a device.

What is queued on a stream happens later: each piece of work gets a random latency, and a thread that plays the device
carries out what is due, stream by stream, or somebody synchronises. What has been allocated holds poison until it is
written, and memory that is given back is used again at once, by whoever asks next on that stream; so who forgets a wait
reads poison, or writes over somebody else's array. Events order streams as CUDA's do. A synchronisation of the whole
device is an error.

Handles of memory and events cross between processes: the heap is a file without a name that others open through
/proc. Reading through the handle of an allocation that is gone gives poison, opening one twice is an error.
"""

from __future__ import annotations

import collections
import ctypes
import functools
import itertools
import mmap
import os
import random
import struct
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np

POISON = 0xA5
HEAP_BYTES = 1 << 30
SLOTS = 4096
_TABLE_BYTES = 3 * 8 * SLOTS
_PAGE = mmap.PAGESIZE
SUCCESS, NOT_READY = 0, 600
_MEMORY_HANDLE, _EVENT_HANDLE = struct.Struct("<5q24x"), struct.Struct("<3q40x")
_COUNTS = ("synchronizations", "opened", "closed", "exported", "events_opened", "streams")


class CUDARuntimeError(RuntimeError):
    """What the runtime answers where something is wrong."""

    def __init__(self, status: int) -> None:
        super().__init__(f"cudaError {status}")
        self.status = status


class Tables:
    """The first pages of a heap, mapped by others too: which allocation is in a slot, what events have seen."""

    def __init__(self, memory: Any) -> None:
        whole = np.frombuffer(memory, np.int64, 3 * SLOTS).reshape(3, SLOTS)
        self.allocation, self.recorded, self.completed = whole


class Event:
    """A place in a stream. An interprocess event has its counters where other processes see them."""

    def __init__(self, gpu: Device, tables: Tables | None = None, slot: int = 0) -> None:
        self.gpu = gpu
        self.tables, self.slot = tables, slot
        self._recorded, self._completed = 0, 0
        self.ptr = gpu.register(self)

    @property
    def recorded(self) -> int:
        return self._recorded if self.tables is None else int(self.tables.recorded[self.slot])

    @property
    def completed(self) -> int:
        return self._completed if self.tables is None else int(self.tables.completed[self.slot])

    def record(self, stream: Any = None) -> None:
        with self.gpu.lock:
            target = self.gpu.null if stream is None else stream
            number = self.recorded + 1
            if self.tables is None:
                self._recorded = number
            else:
                self.tables.recorded[self.slot] = number
            target.enqueue(lambda: self._complete(number))

    def _complete(self, number: int) -> None:
        if self.tables is None:
            self._completed = max(self._completed, number)
        else:
            self.tables.completed[self.slot] = max(self.completed, number)

    @property
    def done(self) -> bool:
        return self.completed >= self.recorded

    def synchronize(self) -> None:
        self.gpu.hurry(lambda: self.done)


class Stream:
    """Work in order; each piece is due some time after it was queued."""

    def __init__(self, gpu: Device) -> None:
        self.gpu = gpu
        self.queue: collections.deque[tuple[float, Callable[[], None] | None, Callable[[], bool] | None]]
        self.queue = collections.deque()
        self.ptr = gpu.register(self)
        with gpu.lock:
            gpu.streams.add(self)

    def enqueue(self, work: Callable[[], None], delay: float = 0.0) -> None:
        with self.gpu.lock:
            self.queue.append((time.monotonic() + self.gpu.latency() + delay, work, None))

    def wait_event(self, event: Event) -> None:
        with self.gpu.lock:
            number = event.recorded
            self.queue.append((0.0, None, lambda: event.completed >= number))

    def step(self, hurry: bool) -> bool:
        """Carry out the first piece of work if it may begin; the lock is held."""
        if not self.queue:
            return False
        due, work, condition = self.queue[0]
        if condition is not None and not condition():
            return False
        if not hurry and time.monotonic() < due:
            return False
        self.queue.popleft()
        if work is not None:
            work()
        return True

    def record(self, event: Event) -> Event:
        event.record(self)
        return event

    def synchronize(self) -> None:
        self.gpu.counts["synchronizations"] += 1
        self.gpu.hurry(lambda: not self.queue)

    def __enter__(self) -> Stream:
        self.gpu.current.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        self.gpu.current.pop()


class Heap:
    """Allocations of the driver, and CuPy's pool, which cuts arrays out of them."""

    def __init__(self) -> None:
        self.descriptor = os.memfd_create("device")
        os.ftruncate(self.descriptor, HEAP_BYTES)
        self.memory = mmap.mmap(self.descriptor, HEAP_BYTES)
        self.tables = Tables(self.memory)
        self.bytes = np.frombuffer(self.memory, np.uint8)
        self.base = self.bytes.__array_interface__["data"][0]
        self.allocations: dict[int, tuple[int, int, int]] = {}  # offset: (size, number, slot)
        self.used: dict[int, int] = {}  # arrays in an allocation
        self._tail: dict[int, int] = {}
        self._free: dict[tuple[int, int], list[int]] = {}
        self._numbers = itertools.count(1)
        self._slots = list(range(SLOTS))
        self.in_use = 0

    def malloc(self, size: int) -> int:
        """A new allocation, at the lowest offset where it fits: often where another one was."""
        size = -(-size // _PAGE) * _PAGE
        start = -(-_TABLE_BYTES // _PAGE) * _PAGE
        for offset in sorted(self.allocations):
            if start + size <= offset:
                break
            start = offset + self.allocations[offset][0]
        if start + size > HEAP_BYTES:
            raise CUDARuntimeError(2)
        number, slot = next(self._numbers), self._slots.pop()
        self.allocations[start] = (size, number, slot)
        self.tables.allocation[slot] = number
        self.used[start], self._tail[start] = 0, 0
        return start

    def take(self, size: int, stream: int) -> tuple[int, int]:
        """(offset, size) of memory for an array on a stream; what came back last goes out first."""
        size = -(-max(size, 1) // 512) * 512
        self.in_use += size
        free = self._free.get((size, stream))
        if free:
            offset = free.pop()
        else:
            home = next((o for o, (n, _, _) in self.allocations.items() if self._tail[o] + size <= n), None)
            home = self.malloc(max(size, 1 << 16)) if home is None else home
            offset = home + self._tail[home]
            self._tail[home] += size
        self.used[self.home(offset)] += 1
        return offset, size

    def give(self, offset: int, size: int, stream: int) -> None:
        self.in_use -= size
        self.used[self.home(offset)] -= 1
        self._free.setdefault((size, stream), []).append(offset)

    def home(self, offset: int) -> int:
        for start, (size, _, _) in self.allocations.items():
            if start <= offset < start + size:
                return start
        raise OSError("no allocation there")

    def free_all_blocks(self) -> None:
        """Give allocations without arrays back to the driver."""
        for start in [start for start, used in self.used.items() if not used]:
            size, _, slot = self.allocations.pop(start)
            del self.used[start], self._tail[start]
            self.tables.allocation[slot] = 0
            self._slots.append(slot)
            for offsets in self._free.values():
                offsets[:] = [offset for offset in offsets if not start <= offset < start + size]


class Device:
    """Streams, memory and handles of one process."""

    def __init__(self, seed: int = 0) -> None:
        self.lock = threading.RLock()
        self.random = random.Random(seed ^ os.getpid())
        self.heap = Heap()
        self.streams: weakref.WeakSet[Stream] = weakref.WeakSet()
        self._named: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
        self._names = itertools.count(1)
        self.null = Stream(self)
        self.current = [self.null]
        self.counts = dict.fromkeys(_COUNTS, 0)
        self.pinned: dict[int, list[Any]] = {}
        self.pinned_in_use = 0
        self.opened: dict[int, tuple[Any, Tables, int, int, int]] = {}
        self._event_slots = list(range(SLOTS))
        self._remote_events: dict[int, Event] = {}
        self._peers: dict[tuple[int, int], Tables] = {}
        self.copy_delay = 0.0
        """Seconds by which copies between addresses come later than kernels."""
        self.running = True
        threading.Thread(target=self._run, daemon=True).start()

    def register(self, thing: Any) -> int:
        name = next(self._names)
        self._named[name] = thing
        return name

    def give(self, offset: int, size: int, stream: int) -> None:
        with self.lock:
            self.heap.give(offset, size, stream)

    def latency(self) -> float:
        kind = self.random.random()
        return self.random.random() * (5e-5 if kind < 0.6 else 5e-4 if kind < 0.9 else 2e-3)

    def _run(self) -> None:
        while self.running:
            with self.lock:
                streams = list(self.streams)
                self.random.shuffle(streams)
                busy = [stream.step(hurry=False) for stream in streams]
            time.sleep(0 if any(busy) else 2e-4)

    def hurry(self, reached: Callable[[], bool]) -> None:
        """Carry out work, whatever its latency, until something is the case; other processes may have to do theirs."""
        end = time.monotonic() + 60
        while True:
            with self.lock:
                if reached():
                    return
                busy = [stream.step(hurry=True) for stream in list(self.streams)]
            if not any(busy):
                time.sleep(5e-5)
            assert time.monotonic() < end, "a stream waits for what does not come"

    # -- the runtime ---------------------------------------------------------------------------------------------

    def copy(self, target: int, source: int, n_bytes: int, kind: int, stream: int) -> None:
        assert kind == 4, "memcpyDefault"

        def work() -> None:
            for address, (_, tables, slot, number, size) in self.opened.items():
                if address <= source < address + size and tables.allocation[slot] != number:
                    ctypes.memset(target, POISON, n_bytes)
                    return
            ctypes.memmove(target, source, n_bytes)

        self._named[stream].enqueue(work, self.copy_delay)

    def wait_event(self, stream: int, event: int) -> None:
        self._named[stream].wait_event(self._remote_events.get(event) or self._named[event])

    def event_query(self, event: int) -> int:
        return SUCCESS if self._named[event].done else NOT_READY

    def allocation_of(self, pointer: int) -> tuple[int, int, int]:
        start = self.heap.home(pointer - self.heap.base)
        size, number, _ = self.heap.allocations[start]
        return self.heap.base + start, size, number

    def get_memory_handle(self, pointer: int) -> bytes:
        start = pointer - self.heap.base
        if start not in self.heap.allocations:
            raise CUDARuntimeError(1)
        size, number, slot = self.heap.allocations[start]
        self.counts["exported"] += 1
        return _MEMORY_HANDLE.pack(os.getpid(), self.heap.descriptor, start, size, number * SLOTS + slot)

    def open_memory_handle(self, handle: bytes) -> int:
        pid, descriptor, start, size, both = _MEMORY_HANDLE.unpack(handle)
        number, slot = divmod(both, SLOTS)
        tables = self._tables_of(pid, descriptor)
        if any((t, s, n) == (tables, slot, number) for _, t, s, n, _ in self.opened.values()):
            raise CUDARuntimeError(208)  # already mapped
        if tables.allocation[slot] != number:
            raise CUDARuntimeError(1)
        memory = self._map(pid, descriptor, size, start)
        view = np.frombuffer(memory, np.uint8)
        address: int = view.__array_interface__["data"][0]
        with self.lock:
            self.opened[address] = ((memory, view), tables, slot, number, size)
        self.counts["opened"] += 1
        return address

    def close_memory_handle(self, address: int) -> None:
        with self.lock:
            if self.opened.pop(address, None) is None:
                raise CUDARuntimeError(1)
        self.counts["closed"] += 1

    def get_event_handle(self, event: int) -> bytes:
        return _EVENT_HANDLE.pack(os.getpid(), self.heap.descriptor, self._named[event].slot)

    def open_event_handle(self, handle: bytes) -> int:
        pid, descriptor, slot = _EVENT_HANDLE.unpack(handle)
        event = Event(self, self._tables_of(pid, descriptor), slot)
        self._remote_events[event.ptr] = event
        self.counts["events_opened"] += 1
        return event.ptr

    def _map(self, pid: int, descriptor: int, size: int, start: int) -> mmap.mmap:
        if pid == os.getpid():
            raise CUDARuntimeError(201)  # a process can't open its own handles
        try:
            with open(f"/proc/{pid}/fd/{descriptor}", "r+b") as file:
                return mmap.mmap(file.fileno(), size, offset=start)
        except OSError:
            raise CUDARuntimeError(1) from None

    def _tables_of(self, pid: int, descriptor: int) -> Tables:
        if (pid, descriptor) not in self._peers:
            self._peers[pid, descriptor] = Tables(self._map(pid, descriptor, -(-_TABLE_BYTES // _PAGE) * _PAGE, 0))
        return self._peers[pid, descriptor]

    def stream(self, non_blocking: bool = False) -> Stream:
        assert non_blocking, "a stream that waits for the default stream"
        self.counts["streams"] += 1
        return Stream(self)

    def event(self, block: bool = False, disable_timing: bool = False, interprocess: bool = False) -> Event:
        assert disable_timing or not interprocess
        return Event(self, self.heap.tables, self._event_slots.pop()) if interprocess else Event(self)

    def alloc_pinned_memory(self, n_bytes: int) -> Any:
        size = 1 << max(9, (n_bytes - 1).bit_length())
        free = self.pinned.setdefault(size, [])
        raw = free.pop() if free else np.empty(size, np.uint8)
        raw[:] = POISON
        memory = _pinned_type(size).from_buffer(raw)
        memory.ptr = raw.__array_interface__["data"][0]
        self.pinned_in_use += size
        weakref.finalize(memory, self._give_pinned, raw, size)
        return memory

    def _give_pinned(self, raw: Any, size: int) -> None:
        self.pinned_in_use -= size
        self.pinned[size].append(raw)


@functools.cache
def _pinned_type(size: int) -> Any:
    """Host memory that a device copies to and from: bytes that know their address."""
    return type("PinnedMemory", (ctypes.c_ubyte * size,), {"ptr": 0})


def no_device_wide_synchronisation() -> None:
    raise AssertionError("the whole device was synchronised")
