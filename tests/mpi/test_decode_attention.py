"""A few queries against a cache of keys that is cut over the ranks. Drawn cases are in another file."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

import fivedp
from fivedp.comm.grid import grid_of
from fivedp.kernels.attention import Mask
from fivedp.reference import attention_reference

RANKS = (1, 2, 3, 8)


def exact(q: Any, k: Any, v: Any, positions: Any, kv_positions: Any, **mask: Any) -> Any:
    places = [np.asarray(p, np.int32) for p in (positions, kv_positions)]
    return attention_reference.attention(q, k, v, Mask(*places, scale=q.shape[-1] ** -0.5, **mask))


def test_a_cache_that_grows_rank_after_rank(comm: MPI.Intracomm, seed: int) -> None:
    rng = np.random.default_rng(seed)
    whole = [rng.standard_normal((1, 20, 2, 8)).astype(np.float32) for _ in range(3)]
    traffic = grid_of(comm).traffic
    for length in range(1, 21):
        mine = np.arange(comm.rank, length, comm.size)  # token t was appended on rank t modulo p
        q = whole[0][:, length - 1 : length]
        k, v = whole[1][:, mine], whole[2][:, mine]
        traffic.reset()
        o, _ = fivedp.decode_attention(q, k, v, comm, positions=[length - 1], kv_positions=mine)
        assert traffic.bytes_sent == (comm.size - 1) * 4 * 2 * (8 + 2)  # heads, Dv + 2, whatever the length
        wanted = exact(q, whole[1][:, :length], whole[2][:, :length], [length - 1], np.arange(length), causal=True)
        assert np.abs(o - wanted.out).max() < 1e-5


def test_queries_that_see_nothing_give_zeros(comm: MPI.Intracomm) -> None:
    q, nothing = np.ones((1, 2, 2, 4), np.float32), np.ones((1, 0, 2, 4), np.float32)
    o, lse = fivedp.decode_attention(q, nothing, nothing, comm, positions=[3, 4], kv_positions=np.arange(0))
    assert not o.any()
    assert np.isneginf(lse).all()


def test_wrong_arguments_raise_on_all_ranks(comm: MPI.Intracomm) -> None:
    x = np.ones((1, 4, 2, 4), np.float32)
    odd = comm.rank == comm.size - 1
    calls: list[tuple[str, Any]] = [
        ("positions are needed", lambda: fivedp.decode_attention(x, x, x, comm, kv_positions=np.arange(4))),
        ("must be the same", lambda: fivedp.decode_attention(x, x.astype(np.float64) if odd else x, x, comm)),
    ]
    if comm.size > 1:
        calls += [
            ("the same queries", lambda: fivedp.decode_attention(x[:, : 3 if odd else 4], x, x, comm)),
            ("the same keywords", lambda: fivedp.decode_attention(x, x, x, comm, positions=[1, 2, 3, 4 + odd])),
        ]
    for text, call in calls:
        with pytest.raises(ValueError, match=text) as caught:
            call()
        assert len(set(comm.allgather(str(caught.value)))) == 1
