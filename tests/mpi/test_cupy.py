"""Products of CuPy arrays, without a GPU: on a double as asynchronous as a device, which refuses what CuPy refuses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

import fivedp
import gpu_double
from fivedp import DTypeError
from mpi_products import C64, CONTRACT, F32, F64, OTHERS, draw, einsum, index_names, judge, layouts, meshes, names

RANKS = (1, 2, 3)


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch, seed: int) -> Iterator[Any]:
    module = gpu_double.install(monkeypatch, seed, cuda_mpi=False)
    yield module
    module.gpu.running = False


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
