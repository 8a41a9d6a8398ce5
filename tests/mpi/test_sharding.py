"""`shard` cuts as `numpy.array_split` cuts, and `gather` is its inverse."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

import fivedp
from fivedp import LayoutError, ShapeError
from fivedp.comm.grid import grid_of
from mpi_products import BFLOAT16, C64, C128, F32, F64, draw, meshes, same_bits, stored, total

RANKS = (1, 2, 3, 6, 8)
LAYOUTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("m", ("p",)),
    ("m/p", ("p",)),
    ("m n", ("p",)),
    ("m n/p", ("p",)),
    ("m/r n/c", ("r", "c")),
    ("m/c n/r", ("r", "c")),
    ("m n/c", ("r", "c")),
    ("m/r*c n", ("r", "c")),
    ("m/c*r n", ("r", "c")),
    ("b/dp m n/tp", ("dp", "tp")),
    ("b m/tp", ("dp", "tp")),
    ("a b/c c/r*d e", ("r", "c", "d")),
)


def cut(x: Any, layout: str, coords: dict[str, int], sizes: dict[str, int]) -> Any:
    """A share by `numpy.array_split`, one axis of the mesh after the other."""
    for dimension, word in enumerate(layout.split()):
        axes = word.partition("/")[2].split("*") if "/" in word else []
        parts, part = 1, 0
        for axis in axes:
            parts, part = parts * sizes[axis], part * sizes[axis] + coords[axis]
        x = np.array_split(x, parts, axis=dimension)[part]
    return x


def place(mesh: Any, axes: tuple[str, ...]) -> tuple[dict[str, int], dict[str, int]]:
    """(coordinates, sizes) of this rank, as MPI or the Mesh itself states them."""
    if isinstance(mesh, fivedp.Mesh):
        return mesh.coords, mesh.shape
    if isinstance(mesh, MPI.Cartcomm):
        return dict(zip(axes, mesh.coords, strict=True)), dict(zip(axes, mesh.dims, strict=True))
    return dict.fromkeys(axes, mesh.rank), dict.fromkeys(axes, mesh.size)


@pytest.mark.parametrize(("layout", "axes"), LAYOUTS)
def test_shares_are_those_of_array_split_and_come_back(
    comm: MPI.Intracomm, seed: int, layout: str, axes: tuple[str, ...]
) -> None:
    rng = np.random.default_rng(seed)
    types = (F32, F64, BFLOAT16, C64, C128)
    for number, mesh in enumerate(meshes(comm, axes, 4)):
        for turn, dtype in itertools.product(range(2), types):
            shape = tuple(int(n) for n in rng.integers(0 if turn else 1, 14, len(layout.split())))
            x = draw(shape, dtype, rng)
            share = fivedp.shard(x, layout, mesh)
            assert share.flags.c_contiguous
            assert not np.shares_memory(share, x)
            assert same_bits(share, np.ascontiguousarray(cut(x, layout, *place(mesh, axes))))
            whole = fivedp.gather(stored(share, "strided" if turn else "C"), layout, mesh)
            assert same_bits(whole, x), f"{layout} {shape} {dtype}"
            root = (number + turn) % comm.size
            at_root = fivedp.gather(share, layout, mesh, root)
            if comm.rank == root:
                assert same_bits(at_root, x)
            else:
                assert at_root is None


def test_each_share_is_received_once(comm: MPI.Intracomm) -> None:
    x = np.arange(24.0 * 10).reshape(24, 10)
    for layout, axes in LAYOUTS:
        if len(layout.split()) != 2:
            continue
        mesh = meshes(comm, axes, 1)[0]
        traffic = grid_of(mesh).traffic
        share = fivedp.shard(x, layout, mesh)
        traffic.reset()
        fivedp.gather(share, layout, mesh)
        received = comm.size * x.nbytes - total(comm, share.nbytes)
        assert total(comm, traffic.bytes_sent) == received, layout
        traffic.reset()
        fivedp.gather(share, layout, mesh, root=0)
        # Rank 0 holds one share already; replicas stay silent.
        assert total(comm, traffic.bytes_sent) == x.nbytes - comm.bcast(share.nbytes), layout


def test_shard_takes_any_type(comm: MPI.Intracomm) -> None:
    x = np.arange(30, dtype=np.int16).reshape(10, 3)
    np.testing.assert_array_equal(fivedp.shard(x, "m/p n", comm), np.array_split(x, comm.size)[comm.rank])
    words = np.array(["one", "two", "three", "four"])
    np.testing.assert_array_equal(fivedp.shard(words, "m/p", comm), np.array_split(words, comm.size)[comm.rank])


def test_errors_of_shard(comm: MPI.Intracomm) -> None:
    x = np.zeros((3, 4))
    with pytest.raises(ShapeError, match=r"`x` has 2 dimensions, shape \(3, 4\); layout \"m/p\" has 1"):
        fivedp.shard(x, "m/p", comm)
    with pytest.raises(LayoutError, match="axis q is named, but this mesh has r, c"):
        fivedp.shard(x, "m/q n", comm.Create_cart((1, comm.size)))
    with pytest.raises(LayoutError, match="got list"):
        fivedp.shard(x, ["m/p", "n"], comm)  # type: ignore[arg-type]
    with pytest.raises(LayoutError, match="expected a communicator"):
        fivedp.shard(x, "m/p n", 3)  # type: ignore[arg-type]
