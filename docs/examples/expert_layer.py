"""A mixture of experts, forward and backward, with the bits of one rank: mpirun -np 4 python expert_layer.py"""

from typing import Any

import numpy as np
from mpi4py import MPI

import fivedp

comm = MPI.COMM_WORLD
rng = np.random.default_rng(0)  # every rank draws the same batch and weights; a model would hold its own share only
tokens, width, inner, n_experts, top_k = 1003, 64, 96, 16, 4
x, dy = rng.standard_normal((2, tokens, width), dtype=np.float32)
router = rng.standard_normal((width, n_experts), dtype=np.float32)
w_up, w_gate = rng.standard_normal((2, n_experts, width, inner), dtype=np.float32) / 8
w_down = rng.standard_normal((n_experts, inner, width), dtype=np.float32) / 8


def train_step(ranks: MPI.Intracomm) -> tuple[Any, list[Any]]:
    """(state, results) of the layer, tokens and experts cut over some ranks; whole results on the first of them."""
    x_local, dy_local = (fivedp.shard(a, "t/ep h", ranks) for a in (x, dy))
    up, gate, down = (fivedp.shard(w, "e/ep i o", ranks) for w in (w_up, w_gate, w_down))
    y_local, state = fivedp.expert_layer(x_local, router, up, gate, down, ranks, top_k=top_k, keep=True)
    d = fivedp.expert_layer_backward(dy_local, state)
    by_token = [fivedp.gather(a, "t/ep h", ranks, root=0) for a in (y_local, d.x)]
    by_expert = [fivedp.gather(w, "e/ep i o", ranks, root=0) for w in (d.w_up, d.w_gate, d.w_down)]
    return state, [*by_token, *by_expert, d.router]


state, results = train_step(comm)
_, of_one_rank = train_step(MPI.COMM_SELF)
sent = state.plan.bytes_sent()
if comm.rank == 0:
    names = ("y", "dx", "dw_up", "dw_gate", "dw_down", "drouter")
    same = [a is not None and a.tobytes() == b.tobytes() for a, b in zip(results, of_one_rank, strict=True)]
    naive = np.count_nonzero(state.plan.cut.owner[state.routing.experts] != comm.rank)
    print(f"{comm.size} ranks, {len(state.x)} of {tokens} tokens here, {len(state.w_up)} of {n_experts} experts")
    print("same bits as one rank:", *(f"{name} {equal}" for name, equal in zip(names, same, strict=True)))
    print(f"rows to other ranks: {sent['rows'] // x[0].nbytes}; one for every pair would be {naive}")
