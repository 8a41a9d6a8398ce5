"""CuPy arrays, without a GPU: a module of that name whose arrays refuse what CuPy's refuse.

Its arrays are not NumPy's, live behind `asnumpy` and `asarray`, and can't be mixed with NumPy's: what CuPy would raise
on a device is raised here.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

import fivedp
from fivedp import DTypeError
from mpi_products import C64, CONTRACT, F32, F64, OTHERS, draw, einsum, index_names, judge, layouts, meshes, names

RANKS = (1, 2, 3)


def _host(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        raise TypeError("Unsupported type <class 'numpy.ndarray'>")
    return value.on_device if isinstance(value, Device) else value


class Device:
    """An array on a pretended device."""

    __array_priority__ = 100
    __slots__ = ("on_device",)

    def __init__(self, array: Any) -> None:
        self.on_device = array

    def __array__(self, *arguments: Any, **keywords: Any) -> Any:
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()`")

    shape = property(lambda self: self.on_device.shape)
    strides = property(lambda self: self.on_device.strides)
    dtype = property(lambda self: self.on_device.dtype)
    ndim = property(lambda self: self.on_device.ndim)
    size = property(lambda self: self.on_device.size)
    nbytes = property(lambda self: self.on_device.nbytes)
    T = property(lambda self: Device(self.on_device.T))

    @property
    def flags(self) -> Any:
        return types.SimpleNamespace(
            c_contiguous=self.on_device.flags.c_contiguous, f_contiguous=self.on_device.flags.f_contiguous
        )

    def get(self) -> Any:
        return np.array(self.on_device, order="C")

    def __getitem__(self, key: Any) -> Any:
        return Device(np.asarray(self.on_device[key]) if self.on_device[key].ndim == 0 else self.on_device[key])

    def __setitem__(self, key: Any, value: Any) -> None:
        self.on_device[key] = _host(value)

    def __len__(self) -> int:
        return len(self.on_device)

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))

    def __add__(self, other: Any) -> Any:
        return Device(self.on_device + _host(other))

    def __mul__(self, other: Any) -> Any:
        return Device(self.on_device * _host(other))

    __radd__, __rmul__ = __add__, __mul__

    def _same(name: str) -> Any:  # type: ignore[misc]
        def method(self: Any, *arguments: Any, **keywords: Any) -> Any:
            return Device(getattr(self.on_device, name)(*arguments, **keywords))

        return method

    transpose, reshape, swapaxes = _same("transpose"), _same("reshape"), _same("swapaxes")
    astype, copy, conj, view = _same("astype"), _same("copy"), _same("conj"), _same("view")


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> Any:
    module: Any = types.ModuleType("cupy")
    kind = type("ndarray", (Device,), {"__module__": "cupy"})
    # Every array that comes out of an operation has the module's type.
    monkeypatch.setattr(sys.modules[__name__], "Device", kind)
    module.ndarray = kind
    module.asarray = lambda x: x if isinstance(x, kind) else kind(np.array(x))
    module.asnumpy = lambda x: x.get()
    module.empty = lambda shape, dtype: kind(np.full(shape, np.nan, dtype))
    module.matmul = lambda x, y: kind(np.matmul(_host(x), _host(y)))
    module.concatenate = lambda arrays, axis: kind(np.concatenate([_host(x) for x in arrays], axis))
    module.may_share_memory = lambda x, y: np.may_share_memory(_host(x), _host(y))
    monkeypatch.setitem(sys.modules, "cupy", module)
    return module


@pytest.mark.parametrize("dtype", [F32, F64, C64, np.dtype(np.float16)], ids=str)
def test_products_of_device_arrays(comm: MPI.Intracomm, seed: int, cupy: Any, dtype: np.dtype[Any]) -> None:
    rng = np.random.default_rng(seed)
    for spec, axes in CONTRACT + OTHERS:
        (mesh,), layout = meshes(comm, axes, 1), layouts(spec)
        sizes = {name: int(rng.integers(0, 9)) for name in index_names(spec)}
        a, b, c = (draw(tuple(sizes[n] for n in names(text)), dtype, rng, exact=True) for text in layout)
        a_local, b_local, out = (cupy.asarray(fivedp.shard(x, t, mesh)) for x, t in zip((a, b, c), layout, strict=True))
        got = fivedp.sharded_matmul(a_local, b_local, spec, mesh)
        assert type(got) is cupy.ndarray
        wanted = fivedp.shard(einsum(spec, a, b), layout[2], mesh)
        judge(f'"{spec}" {sizes}', cupy.asnumpy(got), wanted, 0.0)
        for alpha, beta in ((1.0, 0.0), (2.0, -1.0)):
            before = cupy.asnumpy(out).astype(wanted.dtype)
            got = fivedp.sharded_matmul(a_local, b_local, spec, mesh, out=out, alpha=alpha, beta=beta)
            assert got is out
            judge(f'"{spec}" {sizes} {alpha} {beta}', cupy.asnumpy(out), alpha * wanted + beta * before, 0.0)


def test_gradients_and_shares_of_device_arrays(comm: MPI.Intracomm, seed: int, cupy: Any) -> None:
    rng = np.random.default_rng(seed)
    for spec, axes in CONTRACT:
        (mesh,), layout = meshes(comm, axes, 1), layouts(spec)
        sizes = {name: int(rng.integers(2, 9)) for name in index_names(spec)}
        a, b, dc = (draw(tuple(sizes[n] for n in names(text)), C64, rng, exact=True) for text in layout)
        whole = [cupy.asarray(x) for x in (a, b, dc)]
        a_local, b_local, dc_local = (fivedp.shard(x, t, mesh) for x, t in zip(whole, layout, strict=True))
        assert type(a_local) is cupy.ndarray
        da, db = fivedp.sharded_matmul_backward(dc_local, a_local, b_local, spec, mesh)
        for got, text, back, x, y in (
            (da, layout[0], f"{layout[2]}, {layout[1]} -> {layout[0]}", dc, b.conj()),
            (db, layout[1], f"{layout[0]}, {layout[2]} -> {layout[1]}", a.conj(), dc),
        ):
            gathered = fivedp.gather(got, text, mesh)
            assert type(gathered) is cupy.ndarray
            judge(f'"{back}"', cupy.asnumpy(gathered), einsum(back, x, y), 0.0)


def test_ranks_that_mix_libraries_raise_the_same(comm: MPI.Intracomm, cupy: Any) -> None:
    spec = "m k/p, k/p n -> m n"
    a, b = np.ones((3, 2), F32), np.ones((2, 4), F32)
    if comm.size > 1:
        if comm.rank == 1:
            a, b = cupy.asarray(a), cupy.asarray(b)
        with pytest.raises(DTypeError) as raised:
            fivedp.sharded_matmul(a, b, spec, comm)
        texts = comm.allgather(str(raised.value))
        assert len(set(texts)) == 1
        assert "the kind of arrays is cupy on rank 1 and numpy on rank 0" in texts[0] or comm.size == 2
        assert "all ranks must give NumPy arrays or all CuPy arrays" in texts[0]
    with pytest.raises(DTypeError, match="`a` is cupy, `b` is numpy; all arrays must be NumPy's or all CuPy's"):
        fivedp.sharded_matmul(cupy.asarray(np.ones((3, 2), F32)), np.ones((2, 4), F32), spec, comm)
    c = fivedp.sharded_matmul(np.ones((3, 2), F32), np.ones((2, 4), F32), spec, comm)
    np.testing.assert_array_equal(c, np.full((3, 4), 2 * comm.size))
