"""Copies between the host and a device, several arrays at a time.

To the device: one copy for all of them, from pinned memory, which nobody waits for. To the host: copies to pinned
memory behind what is queued on the current stream, and one event behind them, which the host waits for; no stream and
no device is synchronised.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fivedp.kernels._select import is_cupy, library_of

__all__ = ["to_device", "to_host"]

Array = Any
# Every array begins at a multiple of it, for the widest loads of a kernel.
_ALIGNMENT = 16


def to_host(*arrays: Array) -> list[npt.NDArray[Any]]:
    """Arrays as NumPy's, with what the current stream will have written to them; NumPy's as they are."""
    if not any(map(is_cupy, arrays)):
        return list(arrays)
    cuda = library_of(next(filter(is_cupy, arrays))).cuda
    runtime, stream = cuda.runtime, cuda.get_current_stream()
    found: list[Array] = list(arrays)
    pinned: dict[int, tuple[Array, Array]] = {}
    for place, array in enumerate(arrays):
        if is_cupy(array):
            found[place] = np.empty(array.shape, array.dtype)
            if array.size:
                source = library_of(array).ascontiguousarray(array)
                memory = cuda.alloc_pinned_memory(source.nbytes)
                runtime.memcpyAsync(memory.ptr, source.data.ptr, source.nbytes, runtime.memcpyDefault, stream.ptr)
                pinned[place] = source, np.frombuffer(memory, np.uint8, source.nbytes)
    event = cuda.Event(disable_timing=True)
    event.record(stream)
    event.synchronize()
    for place, (_, values) in pinned.items():  # pinned memory is scarce: it goes back to CuPy's pool
        found[place].reshape(-1).view(np.uint8)[:] = values
    return found


def to_device(xp: Any, arrays: Sequence[npt.NDArray[Any]]) -> list[Array]:
    """NumPy arrays in the memory of `xp`'s current device, in the order of the current stream; for NumPy as they are.

    They share one allocation, which lives as long as any of them.
    """
    if xp is np:
        return list(arrays)
    begins = np.cumsum([0, *(-(-array.nbytes // _ALIGNMENT) * _ALIGNMENT for array in arrays)]).tolist()
    whole = np.zeros(begins[-1], np.uint8)
    for begin, array in zip(begins, arrays, strict=False):
        whole[begin : begin + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    # CuPy puts the bytes into pinned memory of its own, queues the copy and comes back.
    there = xp.asarray(whole)
    return [
        there[begin : begin + array.nbytes].view(array.dtype).reshape(array.shape)
        if array.size
        else xp.empty(array.shape, array.dtype)
        for begin, array in zip(begins, arrays, strict=False)
    ]
