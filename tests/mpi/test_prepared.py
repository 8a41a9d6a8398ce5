"""Small calls that come again: prepared requests give what ordinary messages give."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

import fivedp
from fivedp.comm.grid import grid_of
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


def test_prepared_calls_give_the_bits_and_bytes_of_ordinary_messages(
    comm: MPI.Intracomm, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(seed)
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


def test_a_call_whose_messages_are_large_is_not_prepared(comm: MPI.Intracomm, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = count_runs(monkeypatch)
    a = np.ones((512, 512), F32)
    part = fivedp.shard(a, "m/p k", comm)
    for _ in range(3):
        fivedp.sharded_matmul(part, part, "m/p k, k/p n -> m/p n", comm)
    assert not runs
