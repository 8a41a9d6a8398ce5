"""Gradients of sharded products: float64 formulas, and finite differences of the product itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

import fivedp
from mpi_products import (
    BFLOAT16,
    C64,
    C128,
    CONTRACT,
    F32,
    F64,
    OTHERS,
    allowed_error,
    draw,
    einsum,
    in_turn,
    judge,
    layouts,
    meshes,
    names,
    operands,
    sizes_of,
)

RANKS = (1, 2, 3, 8)
DTYPES = (F32, F64, BFLOAT16, C64, C128)
# The gradient of a matrix-vector product is an outer product: nothing is summed.
CASES = tuple(case for case in CONTRACT + OTHERS if all(len(names(text)) > 1 for text in layouts(case[0])))


def backward_specs(spec: str) -> tuple[str, str]:
    a, b, c = layouts(spec)
    return f"{c}, {b} -> {a}", f"{a}, {c} -> {b}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_are_those_of_the_formula(comm: MPI.Intracomm, seed: int, dtype: np.dtype[Any]) -> None:
    rng = np.random.default_rng(seed)
    for spec, axes in CASES:
        if dtype not in in_turn(spec, comm, DTYPES, 2):
            continue
        (mesh,), layout = meshes(comm, axes, 1), layouts(spec)
        sizes = sizes_of(spec, rng, 1, 12)
        a, b = operands(spec, sizes, dtype, rng)
        dc = draw(tuple(sizes[name] for name in names(layout[2])), dtype, rng)
        a_local, b_local, dc_local = (fivedp.shard(x, text, mesh) for x, text in zip((a, b, dc), layout, strict=True))
        copies = [x.copy() for x in (dc_local, a_local, b_local)]
        da, db = fivedp.sharded_matmul_backward(dc_local, a_local, b_local, spec, mesh)
        for x, copy in zip((dc_local, a_local, b_local), copies, strict=True):
            np.testing.assert_array_equal(x, copy)
        spec_a, spec_b = backward_specs(spec)
        for name, got, text, back, x, y in (
            ("dA", da, layout[0], spec_a, dc, b.conj()),
            ("dB", db, layout[1], spec_b, a.conj(), dc),
        ):
            wanted, allowed = einsum(back, x, y), allowed_error(back, x, y, dtype)
            assert got.dtype == dtype
            judge(
                f'{name} of "{spec}" {sizes} {dtype}',
                got,
                fivedp.shard(wanted, text, mesh),
                fivedp.shard(allowed, text, mesh),
            )


@pytest.mark.parametrize("dtype", [F64, C128], ids=str)
def test_gradients_are_the_slope_of_the_product(comm: MPI.Intracomm, seed: int, dtype: np.dtype[Any]) -> None:
    # L = Re sum(conj(dC) * C) is linear in A and in B, so a difference of any length is its slope exactly.
    rng = np.random.default_rng(seed)
    for spec, axes in CASES:
        if dtype not in in_turn(spec, comm, (F64, C128), 2):
            continue
        (mesh,), layout = meshes(comm, axes, 1), layouts(spec)
        sizes = sizes_of(spec, rng, 2, 9)
        a, b = operands(spec, sizes, dtype, rng)
        dc = draw(tuple(sizes[name] for name in names(layout[2])), dtype, rng)

        def share(x: Any, number: int, layout: tuple[str, ...] = layout, mesh: Any = mesh) -> Any:
            return fivedp.shard(x, layout[number], mesh)

        def loss(a: Any, b: Any, spec: str = spec, mesh: Any = mesh, dc: Any = dc, text: str = layout[2]) -> float:
            c = fivedp.sharded_matmul(share(a, 0), share(b, 1), spec, mesh)
            return float(np.vdot(dc, fivedp.gather(c, text, mesh)).real)

        da, db = fivedp.sharded_matmul_backward(share(dc, 2), share(a, 0), share(b, 1), spec, mesh)
        step_a, step_b = draw(a.shape, dtype, rng), draw(b.shape, dtype, rng)
        base = loss(a, b)
        for slope, gradient, step, text in (
            (loss(a + step_a, b) - base, da, step_a, layout[0]),
            (loss(a, b + step_b) - base, db, step_b, layout[1]),
        ):
            predicted = float(np.vdot(fivedp.gather(gradient, text, mesh), step).real)
            scale = np.linalg.norm(step) * np.linalg.norm(a) * np.linalg.norm(b) * np.linalg.norm(dc)
            assert abs(slope - predicted) <= 1e-12 * scale, f'"{spec}" {sizes} {dtype}: {slope} and {predicted}'


def test_gradient_of_a_whole_result_sums_over_its_free_indices(comm: MPI.Intracomm) -> None:
    # dC of ones: dA is the row sums of B, dB the column sums of A, whatever the cut.
    a = np.arange(35.0).reshape(5, 7)
    b = np.arange(42.0).reshape(7, 6)
    for spec, axes in CONTRACT[:8]:
        (mesh,), layout = meshes(comm, axes, 1), layouts(spec)
        a_local, b_local, dc = (
            fivedp.shard(x, text, mesh) for x, text in zip((a, b, np.ones((5, 6))), layout, strict=True)
        )
        da, db = fivedp.sharded_matmul_backward(dc, a_local, b_local, spec, mesh)
        np.testing.assert_array_equal(fivedp.gather(da, layout[0], mesh), np.tile(b.sum(1), (5, 1)))
        np.testing.assert_array_equal(fivedp.gather(db, layout[1], mesh), np.tile(a.sum(0)[:, None], (1, 6)))
