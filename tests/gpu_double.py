"""CuPy without a GPU: the part of it that fivedp uses, on the device of gpu_device.py.

Arrays refuse what CuPy's refuse: they are not NumPy's, can't be mixed with them, and are read through `get`.
"""

from __future__ import annotations

import sys
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from fivedp.comm.transport import choice, ipc, proof
from gpu_device import POISON, CUDARuntimeError, Device, no_device_wide_synchronisation


class Block:
    """Memory of one array, given back with the last array that lies in it."""

    def __init__(self, gpu: Device, n_bytes: int) -> None:
        stream = gpu.current[-1]
        with gpu.lock:
            offset, size = gpu.heap.take(n_bytes, stream.ptr)
        weakref.finalize(self, gpu.give, offset, size, stream.ptr)
        self.bytes = gpu.heap.bytes[offset : offset + n_bytes]
        memory = self.bytes
        stream.enqueue(lambda: memory.fill(POISON))


def install(monkeypatch: Any, seed: int, *, cuda_mpi: bool = True) -> Any:
    """Put a double in the place of cupy and of what is asked of the driver; its MPI takes device memory or not."""
    module = make_module(seed)
    why = "it does in this test" if cuda_mpi else "it does not in this test"
    monkeypatch.setitem(sys.modules, "cupy", module)
    monkeypatch.setattr(ipc, "allocation_of", lambda pointer: ipc.Allocation(*module.gpu.allocation_of(pointer)))
    monkeypatch.setattr(choice, "cuda_mpi_verdict", lambda gpu, forced: proof.Verdict(cuda_mpi, why))
    return module


def make_module(seed: int = 0) -> Any:
    """A module in the place of cupy, with a device of its own."""
    gpu = Device(seed)

    def host(value: Any) -> Any:
        if isinstance(value, np.ndarray) and value.ndim:
            raise TypeError("Unsupported type <class 'numpy.ndarray'>")
        return value.view_ if isinstance(value, ndarray) else value

    def launch(work: Callable[[], None]) -> None:
        gpu.current[-1].enqueue(work)

    def new(shape: Any, dtype: Any) -> Any:
        dtype = np.dtype(dtype)
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        block = Block(gpu, int(np.prod(shape, dtype=np.int64)) * dtype.itemsize)
        return ndarray(block, block.bytes.view(dtype).reshape(shape))

    def computed(shape: Any, dtype: Any, work: Callable[[], Any]) -> Any:
        out = new(shape, dtype)
        view = out.view_
        launch(lambda: view.__setitem__(..., work()))
        return out

    def binary(function: Any, x: Any, y: Any) -> Any:
        a, b = host(x), host(y)
        # Scalars of Python are weak, as in NumPy: their type is asked of an empty array.
        dtype = function(np.empty(0, a.dtype) if hasattr(a, "dtype") else a, b if not hasattr(b, "dtype")
                         else np.empty(0, b.dtype)).dtype  # fmt: skip
        return computed(np.broadcast_shapes(np.shape(a), np.shape(b)), dtype, lambda: function(a, b))

    class ndarray:
        """An array on the device."""

        __array_priority__ = 100

        def __init__(self, block: Block, view: Any) -> None:
            self.block, self.view_ = block, view

        def __array__(self, *arguments: Any, **keywords: Any) -> Any:
            raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()`")

        shape = property(lambda self: self.view_.shape)
        strides = property(lambda self: self.view_.strides)
        dtype = property(lambda self: self.view_.dtype)
        ndim = property(lambda self: self.view_.ndim)
        size = property(lambda self: self.view_.size)
        nbytes = property(lambda self: self.view_.nbytes)
        itemsize = property(lambda self: self.view_.itemsize)
        T = property(lambda self: ndarray(self.block, self.view_.T))
        device = property(lambda self: OneDevice())
        data = property(lambda self: types.SimpleNamespace(ptr=self.view_.__array_interface__["data"][0]))

        @property
        def flags(self) -> Any:
            flags = self.view_.flags
            return types.SimpleNamespace(c_contiguous=flags.c_contiguous, f_contiguous=flags.f_contiguous)

        def get(self) -> Any:
            """The values, as they are when the current stream has come here."""
            result, view = np.empty(self.shape, self.dtype), self.view_
            launch(lambda: result.__setitem__(..., view))
            gpu.current[-1].synchronize()
            return result

        def __getitem__(self, key: Any) -> Any:
            key = key if isinstance(key, tuple) else (key,)
            if any(isinstance(part, list | ndarray) for part in key):
                source, index = self.view_, tuple(host(part) for part in key)
                return computed(source[index].shape, self.dtype, lambda: source[index])
            return ndarray(self.block, self.view_[key if Ellipsis in key else (*key, ...)])

        def __setitem__(self, key: Any, value: Any) -> None:
            view, source = self.view_, host(value)
            place = tuple(host(part) for part in key) if isinstance(key, tuple) else host(key)
            launch(lambda: view.__setitem__(place, source))

        def __len__(self) -> int:
            return len(self.view_)

        def __iter__(self) -> Iterator[Any]:
            return (self[i] for i in range(len(self)))

        def __add__(self, other: Any) -> Any:
            return binary(np.add, self, other)

        def __mul__(self, other: Any) -> Any:
            return binary(np.multiply, self, other)

        __radd__, __rmul__ = __add__, __mul__

        def __iadd__(self, other: Any) -> Any:
            view, source = self.view_, host(other)
            launch(lambda: np.add(view, source, out=view))
            return self

        def __imul__(self, other: Any) -> Any:
            view, source = self.view_, host(other)
            launch(lambda: np.multiply(view, source, out=view))
            return self

        def __isub__(self, other: Any) -> Any:
            view, source = self.view_, host(other)
            launch(lambda: np.subtract(view, source, out=view))
            return self

        def transpose(self, *axes: Any) -> Any:
            return ndarray(self.block, self.view_.transpose(*axes))

        def swapaxes(self, first: int, second: int) -> Any:
            return ndarray(self.block, self.view_.swapaxes(first, second))

        def view(self, dtype: Any) -> Any:
            return ndarray(self.block, self.view_.view(dtype))

        def reshape(self, *shape: Any) -> Any:
            try:
                view = self.view_.view()
                view.shape = np.broadcast_to(0, self.shape).reshape(*shape).shape
            except AttributeError:  # it can't be done without a copy
                source = self.view_
                wanted = np.broadcast_to(0, self.shape).reshape(*shape).shape
                return computed(wanted, self.dtype, lambda: source.reshape(wanted))
            return ndarray(self.block, view)

        def copy(self, order: str = "C") -> Any:
            source = self.view_
            return computed(self.shape, self.dtype, lambda: source)

        def conj(self) -> Any:
            source = self.view_
            return computed(self.shape, self.dtype, lambda: source.conj()) if self.dtype.kind == "c" else self

        def astype(self, dtype: Any, copy: bool = True) -> Any:
            source = self.view_
            if np.dtype(dtype) == self.dtype and not copy:
                return self
            return computed(self.shape, dtype, lambda: source.astype(dtype))

    def asarray(x: Any, dtype: Any = None) -> Any:
        if isinstance(x, ndarray):
            return x
        whole = np.array(x, dtype=dtype, order="C")
        return computed(whole.shape, whole.dtype, lambda: whole)

    def contiguous(x: Any, dtype: Any = None) -> Any:
        x = x if dtype is None else x.astype(dtype, copy=False)
        return x if x.flags.c_contiguous else x.copy()

    def matmul(x: Any, y: Any, out: Any = None) -> Any:
        a, b = host(x), host(y)
        if out is not None:
            view = out.view_
            launch(lambda: np.matmul(a, b, out=view))
            return out
        shape = np.matmul(*(np.broadcast_to(np.zeros((), np.int8), v.shape) for v in (a, b))).shape
        return computed(shape, np.result_type(a, b), lambda: np.matmul(a, b))

    def multiply(x: Any, y: Any, out: Any) -> Any:
        a, b, view = host(x), host(y), out.view_
        launch(lambda: np.multiply(a, b, out=view))
        return out

    def concatenate(arrays: Any, axis: int = 0) -> Any:
        views = [host(x) for x in arrays]
        shape = list(views[0].shape)
        shape[axis] = sum(view.shape[axis] for view in views)
        return computed(shape, np.result_type(*views), lambda: np.concatenate(views, axis))

    def take(x: Any, rows: Any, axis: int) -> Any:
        source, index = host(x), host(rows)
        shape = (*source.shape[:axis], *index.shape, *source.shape[axis + 1 :])
        return computed(shape, source.dtype, lambda: np.take(source, index, axis))

    class OneDevice:
        """The only device there is. No kernel was ever compiled for it."""

        compute_capability = "00"

        def __init__(self, number: int = 0) -> None:
            self.id = number

        def use(self) -> None:
            assert self.id == 0

        synchronize = staticmethod(no_device_wide_synchronisation)

    ndarray.__module__ = "cupy"
    module: Any = types.ModuleType("cupy")
    module.__version__ = "double"
    module.gpu, module.ndarray = gpu, ndarray
    module.asarray, module.empty, module.matmul, module.concatenate, module.take = (
        asarray, new, matmul, concatenate, take,
    )  # fmt: skip
    module.asnumpy = lambda x: x.get()
    module.ascontiguousarray = contiguous
    module.multiply = multiply
    module.zeros = lambda shape, dtype=float: asarray(np.zeros(shape, dtype))
    module.ones = lambda shape, dtype=float: asarray(np.ones(shape, dtype))
    module.stack = lambda arrays: concatenate([x[None] for x in arrays])
    module.moveaxis = lambda x, source, target: ndarray(x.block, np.moveaxis(x.view_, source, target))
    module.split = lambda x, places: [ndarray(x.block, part) for part in np.split(x.view_, places)]
    module.may_share_memory = lambda x, y: np.may_share_memory(host(x), host(y))
    module.arange = lambda *arguments, **keywords: asarray(np.arange(*arguments, **keywords))
    module.full = lambda shape, value, dtype=None: asarray(np.full(shape, value, dtype))
    module.cuda = types.SimpleNamespace(
        Device=OneDevice,
        Event=gpu.event,
        Stream=gpu.stream,
        get_current_stream=lambda: gpu.current[-1],
        alloc_pinned_memory=gpu.alloc_pinned_memory,
        runtime=types.SimpleNamespace(
            CUDARuntimeError=CUDARuntimeError,
            memcpyDefault=4,
            memcpyAsync=gpu.copy,
            streamWaitEvent=gpu.wait_event,
            eventQuery=gpu.event_query,
            eventDestroy=lambda event: gpu._remote_events.pop(event),
            ipcGetMemHandle=gpu.get_memory_handle,
            ipcOpenMemHandle=gpu.open_memory_handle,
            ipcCloseMemHandle=gpu.close_memory_handle,
            ipcGetEventHandle=gpu.get_event_handle,
            ipcOpenEventHandle=gpu.open_event_handle,
            deviceSynchronize=no_device_wide_synchronisation,
            driverGetVersion=lambda: 13000,
            getDeviceCount=lambda: 1,
            getDeviceProperties=lambda device: {"name": b"double", "uuid": bytes(16)},
        ),
    )
    module.get_default_memory_pool = lambda: types.SimpleNamespace(free_all_blocks=gpu.heap.free_all_blocks)
    return module
