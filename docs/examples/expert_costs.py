"""What experts on other ranks send and need, counted: mpirun -np 4 python expert_costs.py

Bytes sent by all ranks together, counted where they are sent; and the peak of what NumPy holds beside the arguments
(largest rank), results included. FIVEDP_SHARED=0 makes ranks of one node talk as nodes do.
"""

import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
from mpi4py import MPI

import fivedp

comm = MPI.COMM_WORLD
p = comm.size
T, H, F, E, k = 512, 96, 160, 12, 4  # T tokens on every rank
rng = np.random.default_rng(comm.rank)
x, dy = rng.standard_normal((2, T, H), dtype=np.float32)
w_up, w_gate, w_down = (
    np.array_split(rng.standard_normal(shape, dtype=np.float32), p)[comm.rank]
    for shape in ((E, H, F), (E, H, F), (E, F, H))
)
router = np.zeros((H, E), np.float32)  # the choices are given
uniform, hot = (
    fivedp.routing_workload(kind, T, E, k, seed=1, first_token=comm.rank * T) for kind in ("uniform", "one_expert")
)


def row(name: str, mesh: fivedp.Mesh, call: Callable[[fivedp.Mesh], Any]) -> Any:
    """Measure a call and print it; its result."""
    before = sum(mesh.bytes_sent.values())
    tracemalloc.start()
    result = call(mesh)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    sent = comm.allreduce(sum(mesh.bytes_sent.values()) - before, MPI.SUM)
    peak = comm.allreduce(peak, MPI.MAX)
    if comm.rank == 0:
        print(f"{name:<22} {sent:>14,} {peak:>14,}")
    return result


def layer(mesh: fivedp.Mesh, routing: fivedp.Routing = uniform, keep: bool = True) -> Any:
    """The layer with the given choices."""
    return fivedp.expert_layer(x, router, w_up, w_gate, w_down, mesh, routing=routing, keep=keep)


def layer_and_back(mesh: fivedp.Mesh, routing: fivedp.Routing = uniform) -> Any:
    """The layer and its gradients."""
    _, state = layer(mesh, routing)
    return fivedp.expert_layer_backward(dy, state)


layer_and_back(fivedp.Mesh(comm, ep=p))  # whatever is made once in a process
if comm.rank == 0:
    print(f"p={p} T={T} H={H} F={F} E={E} k={k} e=4 s=4")
    print(f"{'':<22}          bytes         memory")
mesh = fivedp.Mesh(comm, ep=p)
logits = rng.standard_normal((T, E), dtype=np.float32)
row("route", mesh, lambda mesh: fivedp.route(logits, k, comm=mesh))
batch = row("dispatch", mesh, lambda mesh: fivedp.expert_dispatch(x, uniform, mesh))
row("combine", mesh, lambda mesh: fivedp.expert_combine(batch.tokens, batch))
row("combine, backward", mesh, lambda mesh: fivedp.expert_combine_backward(dy, batch.tokens, batch))
row("dispatch, backward", mesh, lambda mesh: fivedp.expert_dispatch_backward(batch.tokens, batch))
narrow = row("dispatch, bfloat16", mesh, lambda mesh: fivedp.expert_dispatch(x, uniform, mesh, wire="bfloat16"))
row("combine, bfloat16", mesh, lambda mesh: fivedp.expert_combine(narrow.tokens, narrow))
# On meshes of their own, so that no buffer is there from the call before.
row("layer, nothing kept", fivedp.Mesh(comm, ep=p), lambda mesh: layer(mesh, keep=False))
row("layer", fivedp.Mesh(comm, ep=p), layer)
row("layer and backward", fivedp.Mesh(comm, ep=p), layer_and_back)
row("... with hot experts", fivedp.Mesh(comm, ep=p), lambda mesh: layer_and_back(mesh, hot))
