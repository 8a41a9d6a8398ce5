"""`sharded_matmul` against float64 NumPy: every spec, type, order, storage, schedule and odd size."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from mpi4py import MPI

import fivedp
from mpi_products import (
    BFLOAT16,
    C64,
    CONTRACT,
    DTYPES,
    F32,
    F64,
    OTHERS,
    STORED,
    accumulator,
    check,
    draw,
    einsum,
    grids,
    in_turn,
    index_names,
    judge,
    layouts,
    meshes,
    names,
    operands,
    sizes_of,
)

RANKS = (1, 2, 3, 4, 5, 6, 7, 8)
ORDERS = ("tree", "canonical", "fast")


@pytest.mark.parametrize(("spec", "axes"), CONTRACT)
def test_contract_spec_in_every_type_and_order(
    comm: MPI.Intracomm, seed: int, spec: str, axes: tuple[str, ...]
) -> None:
    rng = np.random.default_rng(seed)
    for mesh in meshes(comm, axes, 2):
        for dtype, order in in_turn(spec, comm, itertools.product(DTYPES, ORDERS), 2):
            check(mesh, spec, sizes_of(spec, rng, 1, 40), dtype, rng, order=order)
            alpha: complex = complex(rng.standard_normal(), 0.5) if dtype == C64 else float(rng.standard_normal())
            check(mesh, spec, sizes_of(spec, rng, 8, 30), dtype, rng, order=order, alpha=alpha, beta=0.0, out=dtype)
            check(mesh, spec, sizes_of(spec, rng, 8, 30), dtype, rng, order=order, alpha=alpha, beta=-1.5, out=dtype)


@pytest.mark.parametrize(("spec", "axes"), OTHERS)
def test_other_specs(comm: MPI.Intracomm, seed: int, spec: str, axes: tuple[str, ...]) -> None:
    rng = np.random.default_rng(seed)
    for mesh in meshes(comm, axes, 1):
        for dtype in DTYPES:
            check(mesh, spec, sizes_of(spec, rng, 1, 14), dtype, rng, exact=True)
        check(mesh, spec, sizes_of(spec, rng, 5, 14), F32, rng, order="canonical")
        check(mesh, spec, sizes_of(spec, rng, 5, 14), F64, rng, alpha=0.5, beta=2.0, out=F64)


def test_sizes_below_the_rank_count_and_empty_ones(comm: MPI.Intracomm, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for spec, axes in CONTRACT + OTHERS[:6]:
        mesh = meshes(comm, axes, 1)[0]
        for _ in range(6):
            check(mesh, spec, sizes_of(spec, rng, 0, 4), F32, rng, exact=True, order=str(rng.choice(ORDERS)))
        for name in index_names(spec):
            for beta in (0.0, 2.0):
                sizes = sizes_of(spec, rng, 1, 9) | {name: 0}
                check(mesh, spec, sizes, F32, rng, exact=True, beta=beta, out=F32)
                check(mesh, spec, sizes, BFLOAT16, rng, exact=True, beta=beta, out=F32, order="canonical")


def test_operands_and_results_in_any_storage(comm: MPI.Intracomm, seed: int) -> None:
    rng = np.random.default_rng(seed)
    cases = CONTRACT + OTHERS
    for number, (spec, axes) in enumerate(cases):
        mesh = meshes(comm, axes, 1)[0]
        for turn, how in enumerate(itertools.product(STORED, repeat=2)):
            if (turn + number) % 5 == 0:  # five of the 25 pairs for each spec; together the specs see all of them
                target = STORED[int(rng.integers(len(STORED)))]
                dtype = DTYPES[int(rng.integers(len(DTYPES)))]
                check(mesh, spec, sizes_of(spec, rng, 2, 12), dtype, rng, exact=True, how=(*how, target), out=dtype)


def test_sixteen_bit_operands_with_float32_result(comm: MPI.Intracomm, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for spec, axes in CONTRACT:
        mesh = meshes(comm, axes, 1)[0]
        check(mesh, spec, sizes_of(spec, rng, 9, 50), BFLOAT16, rng, out=F32)
        check(mesh, spec, sizes_of(spec, rng, 9, 50), BFLOAT16, rng, out=F32, alpha=-2.0, beta=0.25)


def test_wire_in_the_type_of_the_operands(comm: MPI.Intracomm, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for spec, axes in CONTRACT:
        mesh = meshes(comm, axes, 1)[0]
        for dtype in (BFLOAT16, F32):
            for out, beta in ((None, 0.0), (dtype, 0.5), (accumulator(dtype), 0.5)):
                check(mesh, spec, sizes_of(spec, rng, 9, 40), dtype, rng, wire="same", out=out, beta=beta)


def test_result_may_lie_in_an_operand(comm: MPI.Intracomm, seed: int) -> None:
    rng = np.random.default_rng(seed)
    n = 4 * comm.size + 3
    for spec in ("m/p k, k/p n -> m/p n", "m k/p, k/p n -> m n/p", "m/p k, k n -> m/p n"):
        for which, (alpha, beta) in itertools.product("ab", ((1.0, 0.0), (0.5, 2.0))):
            a, b = operands(spec, {"m": n, "k": n, "n": n}, F64, rng, exact=True)
            a_layout, b_layout, c_layout = layouts(spec)
            a_local, b_local = fivedp.shard(a, a_layout, comm), fivedp.shard(b, b_layout, comm)
            operand = a_local if which == "a" else b_local
            c_shape = fivedp.shard(np.empty((n, n)), c_layout, comm).shape
            if operand.shape != c_shape:
                continue
            wanted = fivedp.shard(alpha * einsum(spec, a, b), c_layout, comm) + beta * operand
            # The whole operand, and one that overlaps by all but a row.
            got = fivedp.sharded_matmul(a_local, b_local, spec, comm, out=operand, alpha=alpha, beta=beta)
            assert got is operand
            judge(f'"{spec}" out is {which}', got, wanted, 0.0)
    memory = draw((n + 1, n), F64, rng, exact=True)
    b = draw((n, n), F64, rng, exact=True)
    wanted = memory[:-1] @ b
    fivedp.sharded_matmul(memory[:-1], fivedp.shard(b, "k n/p", comm), "m k, k n/p -> m n", comm, out=memory[1:])
    judge("out overlaps a by rows", memory[1:], wanted, 0.0)


def test_groups_of_a_mesh_call_independently(comm: MPI.Intracomm, seed: int) -> None:
    for dp, tp in grids(comm.size, 2):
        mesh = fivedp.Mesh(comm, dp=dp, tp=tp)
        group = mesh.coords["dp"]
        # Other shapes, specs, types and numbers of calls in every data-parallel group.
        own = np.random.default_rng((seed, group))
        for turn in range(2 + group % 3):
            spec = CONTRACT[(group + turn) % 5][0]
            dtype = (F32, F64, BFLOAT16)[(group + turn) % 3]
            check(mesh, spec, sizes_of(spec, own, 1, 20), dtype, own, exact=True)
        shared = np.random.default_rng(seed)
        check(mesh, "b/dp m k/tp, b/dp k/tp n -> b/dp m n", {"b": 5, "m": 4, "k": 9, "n": 3}, F32, shared, exact=True)


def test_call_seen_before_takes_other_values(comm: MPI.Intracomm, seed: int) -> None:
    rng = np.random.default_rng(seed)
    spec, sizes = "m k/p, k/p n -> m n", {"m": 11, "k": 13, "n": 7}
    for _ in range(4):
        check(comm, spec, sizes, F32, rng, exact=True)
        check(comm, spec, sizes, F32, rng, exact=True, alpha=2.0, beta=1.0, out=F32)
        check(comm, spec, sizes, F32, rng, exact=True, how=("F", "reversed", "C"))
    for shift in range(5):
        # The same share on this rank, another whole array.
        check(comm, spec, sizes | {"k": 8 * comm.size + shift}, F32, rng, exact=True)


def test_many_dimensions(comm: MPI.Intracomm, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for spec in (
        "b c m i/p j k, b c i/p j k n -> b c m n",
        "b c m o i j/p, i j/p n b c -> b c/p m o n",
        "i/p j k l m, n l k j i/p -> n m",
    ):
        check(comm, spec, sizes_of(spec, rng, 2, 5), F32, rng, exact=True)
        check(comm, spec, sizes_of(spec, rng, 2, 5), F64, rng, exact=True, how=("F", "strided", "C"), order="fast")
        assert math.prod(sizes_of(spec, rng, 2, 5).values()) > 0
        assert len(names(layouts(spec)[0])) > 4
