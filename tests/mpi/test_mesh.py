"""The mesh: where a rank stands, its axes, and what is said where the degrees don't fit."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from mpi4py import MPI

import fivedp
from fivedp import LayoutError, MeshError
from mpi_products import grids

RANKS = (1, 2, 3, 8)
AXES = ("pp", "dp", "sp", "ep", "tp")


def test_coordinates_count_with_tp_fastest(comm: MPI.Intracomm) -> None:
    for sizes in grids(comm.size, 5)[::3]:
        mesh = fivedp.Mesh(comm, **dict(zip(AXES, sizes, strict=True)))
        assert mesh.shape == dict(zip(AXES, sizes, strict=True))
        assert list(mesh.shape) == list(mesh.coords) == list(AXES)
        assert tuple(mesh.coords.values()) == tuple(map(int, np.unravel_index(comm.rank, sizes)))


def test_neighbours_along_tp_are_neighbouring_ranks(comm: MPI.Intracomm) -> None:
    if comm.size % 2:
        pytest.skip("an even number of ranks is needed")
    mesh = fivedp.Mesh(comm, dp=comm.size // 2, tp=2)
    assert mesh.coords["tp"] == comm.rank % 2
    assert mesh.coords["dp"] == comm.rank // 2


def test_axis_knows_its_ranks(comm: MPI.Intracomm) -> None:
    for sizes in grids(comm.size, 3):
        mesh = fivedp.Mesh(comm, dp=sizes[0], sp=sizes[1], tp=sizes[2])
        places = comm.allgather(mesh.coords)
        for length in (1, 2, 3):
            for names in itertools.combinations(("dp", "sp", "tp"), length):
                axis = mesh.axis(*names)
                members = [
                    rank
                    for rank, coords in enumerate(places)
                    if all(coords[name] == mesh.coords[name] for name in AXES if name not in names)
                ]
                assert axis.size == len(members)
                assert members[axis.rank] == comm.rank
                assert mesh.axis(*names) is axis
    axis = mesh.axis("dp", "tp")
    assert axis.comm.size == axis.size
    assert axis.comm.rank == axis.rank
    assert axis.comm.allgather(comm.rank) == sorted(axis.comm.allgather(comm.rank))
    assert axis.comm is axis.comm
    assert repr(axis) == f"Axis(dp*tp: rank {axis.rank} of {axis.size})"


def test_sums_over_an_axis_stay_on_it(comm: MPI.Intracomm) -> None:
    for dp, tp in grids(comm.size, 2):
        mesh = fivedp.Mesh(comm, dp=dp, tp=tp)
        assert mesh.axis("tp").comm.allreduce(comm.rank) == sum(range(comm.size)[mesh.coords["dp"] * tp :][:tp])
        assert mesh.axis("dp").comm.allreduce(1) == dp


def test_one_degree_is_filled_in(comm: MPI.Intracomm) -> None:
    for name in AXES:
        assert fivedp.Mesh(comm, **{name: -1}).shape[name] == comm.size
    if comm.size == 8:
        assert fivedp.Mesh(comm, pp=2, dp=-1, tp=2).shape == {"pp": 2, "dp": 2, "sp": 1, "ep": 1, "tp": 2}
        assert fivedp.Mesh(comm, dp=8, tp=-1).shape["tp"] == 1
    assert fivedp.Mesh(tp=-1).shape["tp"] == MPI.COMM_WORLD.size


def message(comm: MPI.Intracomm, **degrees: object) -> str:
    """The text of the MeshError that every rank raises."""
    with pytest.raises(MeshError) as raised:
        fivedp.Mesh(comm, **degrees)  # type: ignore[arg-type]
    assert isinstance(raised.value, ValueError)
    texts = comm.allgather(str(raised.value))
    assert len(set(texts)) == 1
    return texts[0]


def test_wrong_degrees_name_the_nearest_choice(comm: MPI.Intracomm) -> None:
    if comm.size == 8:
        assert message(comm, pp=2, dp=2, tp=3) == (
            "pp=2 x dp=2 x tp=3 is 12 ranks, but mpirun started 8; nearest: tp=2"
        )
        assert message(comm) == "tp=1 is 1 ranks, but mpirun started 8; nearest: tp=8"
        assert "nearest: tp=4" in message(comm, dp=2, tp=8) or "nearest: dp=1" in message(comm, dp=2, tp=8)
        text = message(comm, dp=3, tp=-1)
        assert "the given degrees make 3, no divisor of the 8 ranks" in text
        assert "dp=2" in text or "dp=4" in text
    if comm.size == 3:
        text = message(comm, tp=2)
        assert text == "tp=2 is 2 ranks, but mpirun started 3; nearest: tp=3"
    if comm.size > 1:
        assert f"{7 * comm.size} ranks, but mpirun started {comm.size}" in message(comm, tp=7 * comm.size)
    for wrong in (0, -2, 1.5, "2", True):
        assert message(comm, tp=wrong) == f"tp={wrong!r} is no degree; expected a positive integer, or -1 to fill it in"
    assert "only one degree can be -1" in message(comm, dp=-1, tp=-1)


def test_nearest_choice_is_a_mesh(comm: MPI.Intracomm) -> None:
    # Every choice that a message offers works, changing only what it names.
    for dp, tp in itertools.product((1, 2, 3, 5), repeat=2):
        if dp * tp == comm.size:
            continue
        choices = message(comm, dp=dp, tp=tp).partition("nearest: ")[2].split(" or ")
        assert 1 <= len(choices) <= 3
        for choice in choices:
            change = {name: int(number) for name, _, number in (word.partition("=") for word in choice.split())}
            mesh = fivedp.Mesh(comm, **({"dp": dp, "tp": tp} | change))
            assert mesh.shape["dp"] * mesh.shape["tp"] == comm.size


def test_unknown_axis(comm: MPI.Intracomm) -> None:
    mesh = fivedp.Mesh(comm, tp=-1)
    with pytest.raises(LayoutError, match="axis xp is named, but this mesh has pp, dp, sp, ep, tp"):
        mesh.axis("xp")
    with pytest.raises(LayoutError, match=r"axis\(\) needs a name"):
        mesh.axis()


def test_bytes_are_counted_by_axis(comm: MPI.Intracomm) -> None:
    if comm.size != 8:
        pytest.skip("8 ranks are needed")
    mesh = fivedp.Mesh(comm, dp=2, tp=4)
    x = np.ones((8, 64))
    fivedp.sharded_matmul(fivedp.shard(x, "m k/tp", mesh), np.ones((16, 5)), "m k/tp, k/tp n -> m/tp n", mesh)
    assert set(mesh.bytes_sent) == {"tp"}
    # 8 x 5 partial sums in float64, of which a rank keeps a quarter.
    assert mesh.bytes_sent["tp"] == 8 * 5 * 8 * 3 // 4
    assert repr(mesh) == "Mesh(dp=2, tp=4)"
