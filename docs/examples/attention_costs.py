"""What each way of attention sends and needs, counted: mpirun -np 4 python attention_costs.py

Bytes sent by a rank (mean over the ranks), counted where they are sent; and the peak of what NumPy holds beside the
arguments (largest rank), results included. FIVEDP_SHARED=0 makes ranks of one node talk as nodes do.
"""

import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
from mpi4py import MPI

import fivedp

comm = MPI.COMM_WORLD
p = comm.size
B, n, H, H_kv, D, Dv, window = 1, 1024, 8, 4, 64, 32, 256  # n tokens on every rank
rng = np.random.default_rng(0)  # decode wants the same queries on every rank
q, k, v, do, k_of_each, v_of_each = (
    rng.standard_normal((B, n, heads, size), dtype=np.float32)
    for heads, size in ((H, D), (H_kv, D), (H_kv, Dv), (H, Dv), (H, D), (H, Dv))
)
causal: dict[str, Any] = {"causal": True, "layout": "zigzag"}
striped: dict[str, Any] = {"causal": True, "layout": "striped"}
neighbours: dict[str, Any] = {"causal": True, "layout": "contiguous"}


def measure(call: Callable[[fivedp.Mesh], Any], tp: int) -> tuple[Any, int, int]:
    """(result, bytes, memory) of a call on a mesh of its own, so that no buffer is there from the call before."""
    mesh = fivedp.Mesh(comm, tp=tp, sp=p // tp)
    tracemalloc.start()
    result = call(mesh)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    sent = comm.allreduce(sum(mesh.bytes_sent.values()), MPI.SUM) // p
    return result, sent, comm.allreduce(peak, MPI.MAX)


def row(
    name: str,
    forward: Callable[..., Any],
    backward: Callable[..., Any] | None,
    tp: int = 1,
    keys: tuple[Any, Any] = (k, v),
    **keywords: Any,
) -> None:
    """Measure one way, forward and backward, and print it."""
    given = (q if backward else q[:, -2:], *keys)  # decode: two queries against the whole cache
    (o, lse), sent, peak = measure(lambda mesh: forward(*given, mesh, **keywords), tp)
    numbers = [sent, peak]
    if backward:
        _, sent, peak = measure(lambda mesh: backward(do, *given, o, lse, mesh, **keywords), tp)
        numbers += [sent, peak]
    if comm.rank == 0:
        print(f"{name:<30}", *(f"{number:>14,}" for number in numbers))


if comm.rank == 0:
    print(f"p={p} B={B} n={n} H={H} H_kv={H_kv} D={D} Dv={Dv} w={window} n_q=2 e=4 s=4")
    print(f"{'':<30}       forward: bytes, memory       backward: bytes, memory")
ring = (fivedp.ring_attention, fivedp.ring_attention_backward)
hybrid = (fivedp.hybrid_attention, fivedp.hybrid_attention_backward)
row("ring, causal zigzag", *ring, **causal)
row("ring, causal striped", *ring, **striped)
row("ring, causal contiguous", *ring, **neighbours)
row("ring, window, contiguous", *ring, **neighbours, window=window)
row("ring, keys for every head", *ring, keys=(k_of_each, v_of_each), **causal)
row("ring, canonical order", *ring, **causal, order="canonical")
row("Ulysses", fivedp.ulysses_attention, fivedp.ulysses_attention_backward, **causal)
if p % 2 == 0:
    row("hybrid, heads 2", *hybrid, tp=2, **causal)
row("decode", fivedp.decode_attention, None)
