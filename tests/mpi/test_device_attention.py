"""Attention of CuPy arrays, without a GPU: on a double as asynchronous as a device, whose kernels are the CPU's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

import fivedp
import gpu_double
from device_kernels import attention_kernels, draw, same_bits
from fivedp import DTypeError

RANKS = (1, 2, 3, 4)
TIMEOUT = 240


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch, seed: int) -> Iterator[Any]:
    module = gpu_double.install(monkeypatch, seed, cuda_mpi=False)
    attention_kernels(module, monkeypatch)
    yield module
    module.gpu.running = False


WAYS = {
    "ring": (fivedp.ring_attention, fivedp.ring_attention_backward, {}),
    "ring of any placement": (fivedp.ring_attention, fivedp.ring_attention_backward, {"positions": True}),
    "canonical": (fivedp.ring_attention, fivedp.ring_attention_backward, {"order": "canonical"}),
    "Ulysses": (fivedp.ulysses_attention, fivedp.ulysses_attention_backward, {}),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2)])
def test_device_arrays_give_the_bits_of_host_arrays(
    comm: MPI.Intracomm, seed: int, cupy: Any, way: str, heads: int, kv_heads: int
) -> None:
    rng = np.random.default_rng([seed, comm.rank])
    forward, backward, more = WAYS[way]
    queries, batch = 2 * comm.size, 2  # zigzag deals equal shares
    if "positions" in more:
        places = np.random.default_rng(seed).permutation(queries * comm.size)
        more = {"positions": places[comm.rank * queries : (comm.rank + 1) * queries]}
    keywords = {"causal": True, "softcap": 5.0, **more}
    q, do = draw(rng, batch, queries, heads, 8), draw(rng, batch, queries, heads, 12)
    k, v = draw(rng, batch, queries, kv_heads, 8), draw(rng, batch, queries, kv_heads, 12)
    dlse = draw(rng, batch, heads, queries)
    o, lse = forward(q, k, v, comm, **keywords)
    gradients = backward(do, q, k, v, o, lse, comm, dlse=dlse, **keywords)
    there = [cupy.asarray(x) for x in (q, k, v)]
    o_there, lse_there = forward(*there, comm, **keywords)
    same_bits(cupy, (o_there, lse_there), (o, lse))
    do_there, dlse_there = cupy.asarray(do), cupy.asarray(dlse)
    same_bits(cupy, backward(do_there, *there, o_there, lse_there, comm, dlse=dlse_there, **keywords), gradients)


def test_packed_documents_on_a_device(comm: MPI.Intracomm, seed: int, cupy: Any) -> None:
    rng = np.random.default_rng([seed, comm.rank])
    keywords = {"cu_seqlens": [0, 3, 3, 4 * comm.size], "layout": "contiguous", "causal": True}
    q, k, v, do = (draw(rng, 4, 2, 8) for _ in range(4))
    o, lse = fivedp.ring_attention(q, k, v, comm, **keywords)
    there = [cupy.asarray(x) for x in (q, k, v)]
    found = fivedp.ring_attention(*there, comm, **keywords)
    same_bits(cupy, found, (o, lse))
    gradients = fivedp.ring_attention_backward(do, q, k, v, o, lse, comm, **keywords)
    same_bits(cupy, fivedp.ring_attention_backward(cupy.asarray(do), *there, *found, comm, **keywords), gradients)


def test_decoding_on_a_device(comm: MPI.Intracomm, seed: int, cupy: Any) -> None:
    q = draw(np.random.default_rng(seed), 2, 1, 4, 8)
    k, v = (draw(np.random.default_rng([seed, comm.rank, i]), 2, 5, 2, 8) for i in range(2))
    found = fivedp.decode_attention(*(cupy.asarray(x) for x in (q, k, v)), comm, layout="contiguous")
    same_bits(cupy, found, fivedp.decode_attention(q, k, v, comm, layout="contiguous"))


@pytest.mark.parametrize("layout", ["zigzag", "striped", "contiguous"])
def test_sequences_are_cut_and_joined_on_a_device(comm: MPI.Intracomm, seed: int, cupy: Any, layout: str) -> None:
    whole = draw(np.random.default_rng(seed), 2, 11, 3)
    part = fivedp.sequence_shard(cupy.asarray(whole), comm, layout=layout)
    same_bits(cupy, [part], [fivedp.sequence_shard(whole, comm, layout=layout)])
    same_bits(cupy, [fivedp.sequence_gather(part, comm, layout=layout)], [whole])


def test_arrays_of_two_places_are_refused_on_all_ranks(comm: MPI.Intracomm, cupy: Any) -> None:
    here, there = np.zeros((1, 2, 1, 4), np.float32), cupy.zeros((1, 2, 1, 4), np.float32)
    with pytest.raises(DTypeError, match="`q` is cupy and `k` numpy; all arrays must be NumPy's or all CuPy's"):
        fivedp.ring_attention(there, here, here, comm)
    arrays = (there, there, there) if comm.rank == 0 else (here, here, here)
    if comm.size > 1:
        with pytest.raises(DTypeError, match="all ranks must give NumPy arrays or all CuPy arrays"):
            fivedp.ring_attention(*arrays, comm)
