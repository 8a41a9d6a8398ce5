"""Schedules of a product: stages, every point of the planner's space, bytes and messages."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

import fivedp
from fivedp.comm import messages
from fivedp.comm.grid import grid_of
from fivedp.layout import schedule
from fivedp.layout.explain import plan_for
from fivedp.layout.plan import ItemSizes, PlanFamily
from fivedp.ops.matmul import matmul_with
from mpi_products import (
    BFLOAT16,
    CONTRACT,
    EVERYTHING_UP_TO,
    F32,
    F64,
    OTHERS,
    accumulator,
    allowed_error,
    check,
    einsum,
    in_turn,
    index_names,
    judge,
    layouts,
    meshes,
    operands,
    same_bits,
    sizes_of,
    total,
)

RANKS = (2, 3, 4, 8)
ORDERS = ("tree", "canonical", "fast")
MODES = ((F32, "tree", "sum"), (BFLOAT16, "canonical", "sum"), (BFLOAT16, "tree", "same"))


class Pick:
    """Chooses the schedule of a number, and keeps its plan."""

    def __init__(self, number: int = 0) -> None:
        self.number = number
        self.plan: Any = None

    def __call__(self, plans: list[Any]) -> Any:
        self.plan = plans[self.number]
        return self.plan


def count_schedules(spec: str, sizes: dict[str, int], mesh: Any) -> int:
    """How many schedules a spec has on this mesh."""
    family = plan_for(spec, sizes, mesh).family
    return len(family.all_plans([sizes[name] for name in family.indices], ItemSizes(1, 1, 1, 1, 1)))


def sample(n_schedules: int, most: int, rng: np.random.Generator) -> list[int]:
    """Some of them, the same on all ranks, for a spec may have a thousand on three axes."""
    return sorted(rng.choice(n_schedules, min(n_schedules, most), replace=False).tolist())


@pytest.fixture
def listed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Schedules of the same sizes are listed once: there may be a thousand, and a test takes them one by one."""
    lists: dict[Any, list[Any]] = {}
    all_plans = PlanFamily.all_plans

    def listed(family: PlanFamily, sizes: Any, itemsizes: ItemSizes) -> list[Any]:
        key = (id(family), tuple(sizes), itemsizes)  # families live as long as the process
        if key not in lists:
            lists[key] = all_plans(family, sizes, itemsizes)
        return lists[key]

    monkeypatch.setattr(PlanFamily, "all_plans", listed)


def many_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make tiles so small that little arrays take many stages."""
    for name, value in (
        ("SINGLE_STAGE_BYTES", 0), ("SINGLE_STAGE_BYTES_IN_PLACE", 0),
        ("MIN_ROWS", 3), ("MAX_ROWS", 5), ("MIN_COLUMNS", 4), ("MAX_COLUMNS", 7),
    ):  # fmt: skip
        monkeypatch.setattr(schedule, name, value)


def test_many_stages_give_the_bits_of_one(comm: MPI.Intracomm, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(seed)
    staged = 0
    for (spec, axes), order in itertools.product(CONTRACT + OTHERS, ORDERS):
        mesh = meshes(comm, axes, 1)[0]
        a_layout, b_layout, _ = layouts(spec)
        high = 45 if len(index_names(spec)) < 4 else 18
        dtype = (F32, F64, BFLOAT16)[int(rng.integers(3))]
        a, b = operands(spec, sizes_of(spec, rng, high // 2, high), dtype, rng)
        a_local, b_local = fivedp.shard(a, a_layout, mesh), fivedp.shard(b, b_layout, mesh)
        first = Pick()
        one = matmul_with(a_local, b_local, spec, mesh, first, order=order)
        with monkeypatch.context() as patch:
            many_stages(patch)
            many = matmul_with(a_local, b_local, spec, mesh, first, order=order)
            staged += schedule.Schedule(first.plan, 0).n_stages > 2
        assert same_bits(one, many), f'"{spec}" {order} {dtype} {first.plan.sizes}'
    assert comm.size == 1 or staged > 20


@pytest.mark.usefixtures("listed_once")
def test_every_schedule_of_a_spec_gives_the_same_result(
    comm: MPI.Intracomm, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(seed)
    for number, (spec, axes) in enumerate(CONTRACT + OTHERS):
        mesh = meshes(comm, axes, 1)[0]
        a_layout, b_layout, c_layout = layouts(spec)
        dtype = (F32, F64, BFLOAT16)[number % 3]
        sizes = sizes_of(spec, rng, 6, 22 if len(index_names(spec)) < 4 else 11)
        a, b = operands(spec, sizes, dtype, rng)
        a_local, b_local = fivedp.shard(a, a_layout, mesh), fivedp.shard(b, b_layout, mesh)
        wanted = fivedp.shard(einsum(spec, a, b), c_layout, mesh)
        allowed = fivedp.shard(allowed_error(spec, a, b, dtype), c_layout, mesh)
        chosen = fivedp.sharded_matmul(a_local, b_local, spec, mesh)
        picks = sample(count_schedules(spec, sizes, mesh), 10 if comm.size <= EVERYTHING_UP_TO else 6, rng)
        for pick, staged in itertools.product(picks, (False, True)):
            with monkeypatch.context() as patch:
                if staged:
                    many_stages(patch)
                choose = Pick(pick)
                c = matmul_with(a_local, b_local, spec, mesh, choose)
            plan = choose.plan
            title = f'"{spec}" {sizes} {dtype} schedule {pick}: {plan.assignment}, slices of {plan.slice_index}'
            judge(title, c, wanted, allowed)
            if 8 % comm.size == 0:
                assert same_bits(c, chosen), title


def test_bytes_counted_are_the_bytes_planned(comm: MPI.Intracomm, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(seed)
    moved = 0
    for (spec, axes), staged in itertools.product(CONTRACT + OTHERS, (False, True)):
        for mesh in meshes(comm, axes, 1):
            for dtype, order, wire in in_turn(spec, comm, MODES, 3):
                a_layout, b_layout, _ = layouts(spec)
                sizes = sizes_of(spec, rng, 1, 25 if len(index_names(spec)) < 4 else 12)
                a, b = operands(spec, sizes, dtype, rng)
                a_local, b_local = fivedp.shard(a, a_layout, mesh), fivedp.shard(b, b_layout, mesh)
                traffic = grid_of(mesh).traffic
                traffic.reset()
                with monkeypatch.context() as patch:
                    if staged:
                        many_stages(patch)
                    fivedp.sharded_matmul(a_local, b_local, spec, mesh, order=order, wire=wire)
                planned = plan_for(spec, sizes, mesh, dtype=dtype, order=order, wire=wire).bytes_total
                counted = total(comm, traffic.bytes_sent)
                assert counted == planned, f'"{spec}" {sizes} {dtype} {order} {wire}: {counted} sent, {planned} planned'
                moved += counted
    assert comm.size == 1 or moved > 0


def test_long_messages_are_cut(comm: MPI.Intracomm, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "MAX_MESSAGE_BYTES", 40)
    rng = np.random.default_rng(seed)
    for spec, axes in CONTRACT:
        check(meshes(comm, axes, 1)[0], spec, sizes_of(spec, rng, 5, 20), F64, rng, exact=True)
    x = rng.standard_normal((17, 5))
    np.testing.assert_array_equal(fivedp.gather(fivedp.shard(x, "m/p n", comm), "m/p n", comm), x)


def test_error_is_at_most_twice_that_of_one_numpy_product(comm: MPI.Intracomm, seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes = {"m": 31, "k": 999, "n": 29, "b": 2}
    for spec, axes in CONTRACT:
        mesh = meshes(comm, axes, 1)[0]
        a_layout, b_layout, c_layout = layouts(spec)
        for dtype in (F32, F64, BFLOAT16):
            a, b = operands(spec, sizes, dtype, rng)
            # NumPy multiplies longdouble by itself, without BLAS: slow, and exact enough to judge float64.
            wanted = np.matmul(a.astype(np.longdouble), b.astype(np.longdouble))
            plain = np.matmul(a.astype(accumulator(dtype)), b.astype(accumulator(dtype))).astype(dtype)
            c = fivedp.sharded_matmul(fivedp.shard(a, a_layout, mesh), fivedp.shard(b, b_layout, mesh), spec, mesh)
            whole = fivedp.gather(c, c_layout, mesh)
            error, honest = (
                float(np.linalg.norm((x.astype(np.longdouble) - wanted).ravel().astype(F64))) for x in (whole, plain)
            )
            assert error <= 2 * honest, f'"{spec}" {dtype}: error {error:.3g}, one NumPy product has {honest:.3g}'


@pytest.mark.usefixtures("listed_once")
def test_three_summed_indices_cut_three_ways(comm: MPI.Intracomm, seed: int) -> None:
    rng = np.random.default_rng(seed)
    spec = "m x/r y/c z/d, x y z n -> m n"
    for mesh in meshes(comm, ("r", "c", "d"), 2):
        # A cut of 18 in 2 falls into the middle of a virtual shard.
        sizes = {"m": 5, "x": 18, "y": 18, "z": 18, "n": 3}
        a, b = operands(spec, sizes, F64, rng, exact=True)
        a_local, wanted = fivedp.shard(a, layouts(spec)[0], mesh), einsum(spec, a, b)
        for pick in sample(count_schedules(spec, sizes, mesh), 12 if comm.size <= EVERYTHING_UP_TO else 6, rng):
            choose = Pick(pick)
            c = matmul_with(a_local, b, spec, mesh, choose)
            judge(f"{choose.plan.family.sizes} {choose.plan.assignment}", c, wanted, 0.0)
