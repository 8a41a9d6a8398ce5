"""Small calls that come again: prepared requests give what ordinary messages give."""

from __future__ import annotations

import itertools
import time
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

import fivedp
from fivedp.comm import shared_window
from fivedp.comm.grid import grid_of
from fivedp.comm.shared_window import SharedWindow
from fivedp.ops import prepared
from fivedp.ops.execution import Sum
from fivedp.ops.matmul import matmul_with
from fivedp.ops.prepared import Prepared
from mpi_products import (
    BFLOAT16,
    CONTRACT,
    F32,
    F64,
    OTHERS,
    draw,
    in_turn,
    layouts,
    meshes,
    names,
    operands,
    same_bits,
    sizes_of,
)

RANKS = (2, 3, 4, 8)
MODES: tuple[dict[str, Any], ...] = (
    {},
    {"order": "canonical"},
    {"order": "fast", "alpha": 0.5},
    {"wire": "same"},
    {"alpha": -2.0, "beta": 1.5},
)


def count_runs(monkeypatch: pytest.MonkeyPatch) -> list[Prepared]:
    """From now on, every prepared call is noted in the list."""
    runs: list[Prepared] = []
    run = Prepared.run

    def counted(self: Prepared, *arguments: Any) -> None:
        runs.append(self)
        run(self, *arguments)

    monkeypatch.setattr(Prepared, "run", counted)
    return runs


def ordinary(*arguments: Any, **keywords: Any) -> Any:
    """The same product with messages made for this call."""
    return matmul_with(*arguments, lambda plans: plans[0], **keywords)


@pytest.fixture(params=[shared_window.MIN_BYTES, 1], ids=["messages", "in place"])
def from_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """From how many bytes on a box is read where it lies: none of these tests has as many, or all have."""
    monkeypatch.setattr(shared_window, "MIN_BYTES", request.param)
    return int(request.param)


def test_prepared_calls_give_the_bits_and_bytes_of_ordinary_messages(
    comm: MPI.Intracomm, seed: int, from_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng((seed, from_bytes))
    runs = count_runs(monkeypatch)
    for (spec, axes), mode in itertools.product(CONTRACT + OTHERS, MODES):
        if mode not in in_turn(spec, comm, MODES, 2):
            continue
        mesh = meshes(comm, axes, 1)[0]
        traffic = grid_of(mesh).traffic
        layout_a, layout_b, layout_c = layouts(spec)
        dtype = (F32, F64, BFLOAT16)[int(rng.integers(3))]
        sizes = sizes_of(spec, rng, 0, 14)  # shares of nothing, shares of one
        for call in range(3):  # the first is an ordinary one
            a, b = operands(spec, sizes, dtype, rng)
            local_a, local_b = fivedp.shard(a, layout_a, mesh), fivedp.shard(b, layout_b, mesh)
            c = fivedp.shard(draw(tuple(sizes[name] for name in names(layout_c)), dtype, rng), layout_c, mesh)
            results, sent = [], []
            for multiply in (ordinary, fivedp.sharded_matmul):
                traffic.reset()
                out = {"out": c.copy()} if "beta" in mode else {}
                results.append(multiply(local_a, local_b, spec, mesh, **mode, **out))
                sent.append((traffic.bytes_sent, traffic.messages))
            assert same_bits(*results), (spec, mode, sizes, call)
            assert sent[0] == sent[1], (spec, mode, sizes, call)
    assert len(runs) > len(CONTRACT)
    read_in_place = sum(len(phase.in_place) for run in set(runs) for phase in run._phases)
    assert (read_in_place > len(CONTRACT)) == (from_bytes == 1 and grid_of(comm).shared is not None)


def test_calls_that_follow_one_another_on_other_ranks_do_not_overwrite_what_is_still_read(
    comm: MPI.Intracomm, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_window, "MIN_BYTES", 1)
    mesh = meshes(comm, ("r", "c"), 1)[0]
    rng = np.random.default_rng(seed)
    add = Sum.add

    def late(self: Sum, *arguments: Any) -> None:
        time.sleep(2e-3 * (comm.rank % 2))  # the others are in their next call by now, on the other axis
        add(self, *arguments)

    monkeypatch.setattr(Sum, "add", late)
    for _ in range(6):
        for axis in ("r", "c"):
            a, b = (rng.standard_normal((24, 24)) for _ in range(2))
            spec = f"m k/{axis}, k/{axis} n -> m n"
            local = (fivedp.shard(a, f"m k/{axis}", mesh), fivedp.shard(b, f"k/{axis} n", mesh))
            assert np.allclose(fivedp.sharded_matmul(*local, spec, mesh), a @ b)


def test_a_rank_whose_shared_memory_is_full_meets_ranks_that_are_prepared(
    comm: MPI.Intracomm, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid, runs = grid_of(comm), count_runs(monkeypatch)
    monkeypatch.setattr(shared_window, "MIN_BYTES", 1)
    if comm.rank == 0:
        monkeypatch.setitem(grid.cache, "arena", None)
        monkeypatch.setattr(SharedWindow, "take", lambda self, n_bytes: None)
    rng = np.random.default_rng((seed, 5))
    a, b = rng.standard_normal((37, 41)), rng.standard_normal((41, 39))
    for spec in ("m/p k, k/p n -> m/p n", "m k/p, k/p n -> m n", "m k, k n/p -> m n"):
        layout_a, layout_b, _ = layouts(spec)
        local = fivedp.shard(a, layout_a, comm), fivedp.shard(b, layout_b, comm)
        for _ in range(3):
            c = fivedp.sharded_matmul(*local, spec, comm)
            assert np.allclose(c, fivedp.shard(a @ b, layouts(spec)[2], comm)), spec
    if grid.shared is not None:
        assert bool(runs) == (comm.rank != 0)


def test_a_call_whose_buffers_are_large_is_not_prepared(comm: MPI.Intracomm, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = count_runs(monkeypatch)
    monkeypatch.setattr(prepared, "_ARENA_BYTES", 1 << 16)
    monkeypatch.setitem(grid_of(comm).cache, "arena", None)  # one of this size, for this test
    a = np.ones((512, 512), F32)
    part = fivedp.shard(a, "m/p k", comm)
    for _ in range(3):
        fivedp.sharded_matmul(part, part, "m/p k, k/p n -> m/p n", comm)
    assert not runs
