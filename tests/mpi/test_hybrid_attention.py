"""Heads exchanged for sequence (Ulysses), alone and inside a ring: values, bits, bytes and errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

import fivedp
from fivedp.comm.grid import grid_of
from fivedp.layout.explain_attention import attention_prices
from mpi_attention import Case, Way, draw, judge

RANKS = (1, 2, 3, 4, 6, 8)
TIMEOUT = 300
ULYSSES: Way = (fivedp.ulysses_attention, fivedp.ulysses_attention_backward)


def over(mesh: fivedp.Mesh, **axes: str) -> Way:
    """The hybrid on a mesh, called as the ring is called on a communicator."""

    def forward(q: Any, k: Any, v: Any, comm: Any, **keywords: Any) -> Any:
        return fivedp.hybrid_attention(q, k, v, mesh, **axes, **keywords)

    def backward(do: Any, q: Any, k: Any, v: Any, o: Any, lse: Any, comm: Any, **keywords: Any) -> Any:
        return fivedp.hybrid_attention_backward(do, q, k, v, o, lse, mesh, **axes, **keywords)

    return forward, backward


def test_ulysses_on_drawn_cases(comm: MPI.Intracomm, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(15):  # most have fewer key heads than ranks, some fewer heads
        case = draw(rng)
        judge(case, case.run(comm, ULYSSES), case.exact())


def test_hybrid_on_drawn_cases_and_every_mesh(comm: MPI.Intracomm, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for tp in (d for d in range(1, comm.size + 1) if comm.size % d == 0):
        mesh = fivedp.Mesh(comm, tp=tp, sp=comm.size // tp)
        for axes in ({}, {"heads": "sp", "ring": "tp"}):
            for _ in range(4):
                case = draw(rng)
                judge(case, case.run(comm, over(mesh, **axes)), case.exact())


def test_ulysses_forward_has_the_bits_of_one_rank(comm: MPI.Intracomm, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(6):
        case = draw(rng)
        several = case.run(comm, ULYSSES)
        alone = case.run(MPI.COMM_SELF, ULYSSES, layout="contiguous")
        for name, x, y in zip(("o", "lse"), several, alone, strict=False):
            assert x.tobytes() == y.tobytes(), (name, case.keywords)


def test_ulysses_moves_every_head_once(comm: MPI.Intracomm, seed: int) -> None:
    rng, p = np.random.default_rng(seed), comm.size
    tokens, heads, kv_heads, size = 4 * p, 4 * p, 2 * p, 8
    q, k, v = (rng.standard_normal((1, tokens, h, size)).astype(np.float32) for h in (heads, kv_heads, kv_heads))
    local = [fivedp.sequence_shard(x, comm) for x in (q, k, v)]
    traffic = grid_of(comm).traffic
    traffic.reset()
    fivedp.ulysses_attention(*local, comm)
    elements = tokens * (2 * heads * size + 2 * kv_heads * size + heads)  # q, o; k, v; lse
    assert comm.allreduce(traffic.bytes_sent) == 4 * elements * (p - 1) // p


def test_wrong_arguments_raise_on_all_ranks(comm: MPI.Intracomm) -> None:
    x = np.ones((1, 8, 2, 4), np.float32)
    mesh = fivedp.Mesh(comm, tp=comm.size)
    for error, text, call in (
        (fivedp.LayoutError, "expected a fivedp.Mesh", lambda: fivedp.hybrid_attention(x, x, x, comm)),  # type: ignore[arg-type]
        (fivedp.LayoutError, "both 'tp'", lambda: fivedp.hybrid_attention(x, x, x, mesh, ring="tp")),
        (fivedp.LayoutError, "axis xp", lambda: fivedp.hybrid_attention(x, x, x, mesh, ring="xp")),
        (fivedp.DTypeError, "`k` float64", lambda: fivedp.ulysses_attention(x, x.astype(np.float64), x, comm)),
        (TypeError, "'windows'", lambda: fivedp.ulysses_attention(x, x, x, comm, windows=3)),
    ):
        with pytest.raises(error) as caught:
            call()
        assert text in str(caught.value)
    case = Case(x, x, x, x, np.zeros((1, 2, 8), np.float32))
    judge(case, case.run(comm, ULYSSES), case.exact())


def test_prices_are_the_bytes_that_are_sent(comm: MPI.Intracomm, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(4):
        case = draw(rng)
        shapes = {name: getattr(case, name).shape for name in "qkv"}
        mask = {name: case.keywords.get(name) for name in ("window", "cu_seqlens")}
        prices = attention_prices(
            shapes, comm.size, causal=case.keywords["causal"], layout=case.keywords["layout"],
            itemsize=case.q.dtype.itemsize, **mask,
        )  # fmt: skip
        for price in prices:
            mesh = fivedp.Mesh(comm, tp=price.heads, sp=price.ring)
            sent = sum(mesh.bytes_sent.values())
            layout = case.keywords["layout"]
            local = [fivedp.sequence_shard(x, comm, layout=layout) for x in (case.q, case.k, case.v, case.do)]
            local = [x[0] for x in local] if case.packed else local
            o, lse = fivedp.hybrid_attention(*local[:3], mesh, **case.keywords)
            forward = sum(mesh.bytes_sent.values()) - sent
            assert comm.allreduce(forward) == price.forward, (price, case.keywords, shapes)
            fivedp.hybrid_attention_backward(local[3], *local[:3], o, lse, mesh, **case.keywords)
            backward = sum(mesh.bytes_sent.values()) - sent - forward
            assert comm.allreduce(backward) == price.backward, (price, case.keywords, shapes)
