"""Shared experts beside routed ones, with the bits of one rank: mpirun -np 4 python shared_experts.py"""

from typing import Any

import numpy as np
from mpi4py import MPI

import fivedp

comm = MPI.COMM_WORLD
rng = np.random.default_rng(0)  # every rank draws the same batch and weights; a model would hold its own share only
tokens, width, inner, n_experts, top_k = 501, 48, 32, 12, 3
x, dy = rng.standard_normal((2, tokens, width), dtype=np.float32)
router = rng.standard_normal((width, n_experts), dtype=np.float32)
w_up, w_gate = rng.standard_normal((2, n_experts, width, inner), dtype=np.float32) / 8
w_down = rng.standard_normal((n_experts, inner, width), dtype=np.float32) / 8
# Two experts that every token passes, side by side, and a gate of their own.
up, gate = rng.standard_normal((2, width, 2 * inner), dtype=np.float32) / 8
down = rng.standard_normal((2 * inner, width), dtype=np.float32) / 8
shared = fivedp.SharedExperts(up, gate, down, router=rng.standard_normal((width, 1), dtype=np.float32))


def train_step(ranks: MPI.Intracomm) -> list[Any]:
    """Whole y and dx on the first of some ranks, and the gradients of the shared experts."""
    x_local, dy_local = (fivedp.shard(a, "t/ep h", ranks) for a in (x, dy))
    experts = (fivedp.shard(w, "e/ep i o", ranks) for w in (w_up, w_gate, w_down))
    y_local, state = fivedp.expert_layer(x_local, router, *experts, ranks, top_k=top_k, shared=shared, keep=True)
    d = fivedp.expert_layer_backward(dy_local, state)
    assert d.shared is not None
    whole = [fivedp.gather(a, "t/ep h", ranks, root=0) for a in (y_local, d.x)]
    return [*whole, d.shared.w_up, d.shared.w_gate, d.shared.w_down, d.shared.router]


results, of_one_rank = train_step(comm), train_step(MPI.COMM_SELF)
if comm.rank == 0:
    names = ("y", "dx", "dw_up", "dw_gate", "dw_down", "drouter")
    same = [a is not None and a.tobytes() == b.tobytes() for a, b in zip(results, of_one_rank, strict=True)]
    print(f"{comm.size} ranks, each with all {2 * inner} hidden features of the shared experts")
    print("same bits as one rank:", *(f"{name} {equal}" for name, equal in zip(names, same, strict=True)))
