"""Products nobody thought of: drawn specs, shapes, types, storage, scales and orders, exact against float64.

Operands are small integers, so every order of summation gives the same number and nothing is forgiven.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from mpi4py import MPI

import fivedp
from drawn_cases import dealt
from mpi_products import BFLOAT16, C64, F32, F64, STORED, check, grids, index_names

RANKS = (1, 2, 3, 4, 5, 6, 7, 8)
AXES = ("dp", "sp", "tp")

_meshes: dict[tuple[int, ...], Any] = {}


def mesh_of(sizes: tuple[int, ...]) -> Any:
    """One mesh per grid for the whole file: making one is collective, and examples are many."""
    if sizes not in _meshes:
        _meshes[sizes] = fivedp.Mesh(MPI.COMM_WORLD, **dict(zip(AXES, sizes, strict=True)))
    return _meshes[sizes]


@st.composite
def specs(draw: Any) -> str:
    """A product of at most five indices, each axis on at most one index of each array."""
    number = draw(st.sampled_from((1, 2, 2, 2, 2, 2, 3)))  # planning over three axes takes its time
    roles = {"k": draw(st.integers(1, 2)), "m": draw(st.integers(0, 2)), "n": draw(st.integers(0, 2))}
    roles["b"] = draw(st.integers(0, 1 if sum(roles.values()) > 3 else 2))
    if roles["m"] + roles["n"] + roles["b"] == 0:
        roles["m"] = 1
    named = {role: [f"{role}{i}" for i in range(number)] for role, number in roles.items()}
    texts = []
    for members in ("bmk", "bkn", "bmn"):
        indices = draw(st.permutations([name for role in members for name in named[role]]))
        cuts: dict[str, list[str]] = {name: [] for name in indices}
        for axis in draw(st.permutations(AXES[-number:])):
            place = draw(st.integers(0, len(indices)))
            if place < len(indices):
                cuts[indices[place]].append(axis)
        texts.append(" ".join(f"{name}/{'*'.join(axes)}" if axes else name for name, axes in cuts.items()))
    return f"{texts[0]}, {texts[1]} -> {texts[2]}"


@settings(max_examples=dealt(2000, RANKS, MPI.COMM_WORLD.size))
@given(data=st.data(), spec=specs(), seed=st.integers(0, 2**31))
def test_drawn_product_is_exact(data: st.DataObject, spec: str, seed: int) -> None:
    sizes = data.draw(st.sampled_from(grids(MPI.COMM_WORLD.size, 3)), label="grid")
    names = index_names(spec)
    most = 7 if len(names) > 4 else 11
    lengths = {name: data.draw(st.integers(0, most), label=name) for name in names}
    dtype = data.draw(st.sampled_from([F32, F64, BFLOAT16, C64]), label="dtype")
    out = data.draw(st.sampled_from([None, dtype, F32 if dtype == BFLOAT16 else dtype]), label="out")
    scales = st.sampled_from([1.0, 0.0, -1.0, 2.0, 0.5] + ([1j, 1 + 2j] if dtype == C64 else []))
    order = data.draw(st.sampled_from(["tree", "canonical", "fast"]), label="order")
    how = data.draw(st.tuples(*[st.sampled_from(STORED)] * 3), label="storage")
    alpha = data.draw(scales, label="alpha")
    beta = data.draw(scales, label="beta") if out is not None else 0.0
    if out == BFLOAT16 and beta not in (0.0, 1.0, -1.0):
        beta = 1.0  # half an integer plus an integer may lie between two bfloat16
    mesh = mesh_of(sizes)
    rng = np.random.default_rng(seed)
    check(mesh, spec, lengths, dtype, rng, exact=True, how=how, alpha=alpha, beta=beta, out=out, order=order)


@settings(max_examples=dealt(480, RANKS, MPI.COMM_WORLD.size))
@given(data=st.data(), seed=st.integers(0, 2**31))
def test_drawn_layout_comes_back_whole(data: st.DataObject, seed: int) -> None:
    spec = data.draw(specs())
    layout = data.draw(st.sampled_from([text.strip() for text in spec.replace("->", ",").split(",")]), label="layout")
    mesh = mesh_of(data.draw(st.sampled_from(grids(MPI.COMM_WORLD.size, 3)), label="grid"))
    shape = tuple(data.draw(st.integers(0, 9)) for _ in layout.split())
    x = np.random.default_rng(seed).standard_normal(shape)
    share = fivedp.shard(x, layout, mesh)
    np.testing.assert_array_equal(fivedp.gather(share, layout, mesh), x)
    assert math.prod(share.shape) <= x.size
