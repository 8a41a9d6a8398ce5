"""Heads exchanged for sequence (Ulysses), alone and inside a ring: bytes and errors.

Values, bits and prices of all ways are in `test_attention_hypothesis.py`.
"""

from __future__ import annotations

import numpy as np
import pytest
from mpi4py import MPI

import fivedp
from fivedp.comm.grid import grid_of
from mpi_attention import ULYSSES, Case, judge

RANKS = (1, 2, 3, 4, 6, 8)
TIMEOUT = 300


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
    judge(case, case.run(comm, ULYSSES), comm)
