"""The promise on bits: "tree" on 1, 2, 4 and 8 ranks, "canonical" on any number, forward and backward.

The judge is one rank: the whole product over a communicator of its own, in the same process.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

import fivedp
from mpi_products import (
    BFLOAT16,
    CONTRACT,
    F32,
    F64,
    OTHERS,
    draw,
    in_turn,
    index_names,
    layouts,
    mesh_of,
    meshes,
    names,
    operands,
    stored,
)

RANKS = (1, 2, 3, 4, 5, 6, 7, 8)
DTYPES = (F32, F64, BFLOAT16)


def digest(x: Any) -> str:
    """A fingerprint of an array's type, shape and bits."""
    return hashlib.blake2b(f"{x.dtype} {x.shape}".encode() + x.tobytes(), digest_size=8).hexdigest()


def orders(n_ranks: int) -> tuple[str, ...]:
    return ("tree", "canonical") if 8 % n_ranks == 0 else ("canonical",)


def sizes_of(spec: str, rng: np.random.Generator) -> dict[str, int]:
    """Summed indices that 8 does not divide, and some shorter than 8."""
    few = len(index_names(spec)) > 3
    return {name: int(rng.choice([3, 7, 9, 12] if few else [5, 8, 19, 41, 64, 77])) for name in index_names(spec)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_of_a_product_are_those_of_one_rank(comm: MPI.Intracomm, seed: int, dtype: np.dtype[Any]) -> None:
    rng = np.random.default_rng(seed)
    for spec, axes in CONTRACT + OTHERS:
        if (spec, axes) in OTHERS and dtype not in in_turn(spec, comm, DTYPES, 3):
            continue
        alone = mesh_of(MPI.COMM_SELF, axes, (1,) * len(axes))
        layout = layouts(spec)
        for mesh in meshes(comm, axes, 2 if (spec, axes) in CONTRACT else 1):
            for order in orders(comm.size):
                sizes = sizes_of(spec, rng)
                a, b = operands(spec, sizes, dtype, rng)
                title = f'"{spec}" {sizes} {order}'
                one = fivedp.sharded_matmul(a, b, spec, alone, order=order)
                a_local, b_local = (fivedp.shard(x, text, mesh) for x, text in zip((a, b), layout[:2], strict=True))
                c = fivedp.sharded_matmul(a_local, b_local, spec, mesh, order=order)
                assert digest(fivedp.gather(c, layout[2], mesh)) == digest(one), title
                # Storage is not part of the sum.
                again = fivedp.sharded_matmul(stored(a_local, "F"), stored(b_local, "strided"), spec, mesh, order=order)
                assert digest(again) == digest(c), title


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_of_gradients_are_those_of_one_rank(comm: MPI.Intracomm, seed: int, dtype: np.dtype[Any]) -> None:
    rng = np.random.default_rng(seed)
    for spec, axes in CONTRACT:
        alone = mesh_of(MPI.COMM_SELF, axes, (1,) * len(axes))
        layout = layouts(spec)
        for mesh in meshes(comm, axes, 1):
            for order in orders(comm.size):
                sizes = sizes_of(spec, rng)
                a, b = operands(spec, sizes, dtype, rng)
                dc = draw(tuple(sizes[name] for name in names(layout[2])), dtype, rng)
                ones = fivedp.sharded_matmul_backward(dc, a, b, spec, alone, order=order)
                a_local, b_local, dc_local = (
                    fivedp.shard(x, text, mesh) for x, text in zip((a, b, dc), layout, strict=True)
                )
                shares = fivedp.sharded_matmul_backward(dc_local, a_local, b_local, spec, mesh, order=order)
                for name, share, text, one in zip(("dA", "dB"), shares, layout, ones, strict=False):
                    title = f'{name} of "{spec}" {sizes} {order}'
                    assert digest(fivedp.gather(share, text, mesh)) == digest(one), title


def test_bits_of_an_accumulated_result(comm: MPI.Intracomm, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for spec, axes in CONTRACT:
        alone = mesh_of(MPI.COMM_SELF, axes, (1,) * len(axes))
        (mesh,), layout = meshes(comm, axes, 1), layouts(spec)
        for dtype, out in ((F32, F32), (BFLOAT16, F32), (BFLOAT16, BFLOAT16)):
            sizes, order = sizes_of(spec, rng), orders(comm.size)[0]
            a, b = operands(spec, sizes, dtype, rng)
            c = draw(tuple(sizes[name] for name in names(layout[2])), out, rng)
            a_local, b_local, c_local = (fivedp.shard(x, text, mesh) for x, text in zip((a, b, c), layout, strict=True))
            keywords: dict[str, Any] = {"alpha": 0.7, "beta": -1.3, "order": order}
            fivedp.sharded_matmul(a, b, spec, alone, out=c, **keywords)
            fivedp.sharded_matmul(a_local, b_local, spec, mesh, out=c_local, **keywords)
            assert digest(fivedp.gather(c_local, layout[2], mesh)) == digest(c), f'"{spec}" {sizes} {dtype} {out}'


def test_order_of_the_tree_is_the_order_of_the_shards(comm: MPI.Intracomm) -> None:
    # 2**24 + 1 - 2**24 in float32 is 0 or 1, by the order: the bits are decided by it, not by luck.
    k = 8
    rng = np.random.default_rng(0)
    for _ in range(20):
        a = rng.choice([2.0**24, -(2.0**24), 1.0, 3.0], k).astype(F32)[None]
        b = np.ones((k, 1), F32)
        s = [a[0, i] for i in range(k)]
        wanted = ((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7]))
        for order in orders(comm.size):
            a_local, b_local = fivedp.shard(a, "m k/p", comm), fivedp.shard(b, "k/p n", comm)
            c = fivedp.sharded_matmul(a_local, b_local, "m k/p, k/p n -> m n", comm, order=order)
            assert c[0, 0] == wanted
