"""How often a token crosses between nodes on its way to its experts: mpirun -np 4 python expert_nodes.py

The ranks of this machine play two nodes: FIVEDP_NODE names the node of a rank. FIVEDP_LINK says how fast the link
between nodes is; it decides whether rows cross once per rank or once per node, and whether hot experts are copied.
"""

import os

import numpy as np
from mpi4py import MPI

import fivedp
from fivedp.layout.experts import cut_experts

comm = MPI.COMM_WORLD
P, T, H = comm.size, 500, 32  # T tokens on every rank
nodes = [2 * rank // P for rank in range(P)]
os.environ["FIVEDP_NODE"] = f"node {nodes[comm.rank]}"
ways = {}
for name, link in (("once per rank", "1e6"), ("once per node", "1e-6")):  # GB/s
    os.environ["FIVEDP_LINK"] = link
    ways[name] = fivedp.Mesh(comm, ep=P)
rng = np.random.default_rng(comm.rank)
x = rng.standard_normal((T, H), dtype=np.float32)


def rows(n_bytes: int) -> str:
    """Per token, on average."""
    return f"{comm.allreduce(n_bytes) / (4 * H * T * P):8.2f}"


if comm.rank == 0:
    print(f"{P} ranks on {len(set(nodes))} nodes: rows of a token to another node, and sums back")
    print("experts  top-k  once per pair    once per rank    once per node   same bits")
for n_experts, top_k in ((8, 2), (64, 6), (128, 4), (128, 8), (60, 4)):
    routing = fivedp.routing_workload("uniform", T, n_experts, top_k, seed=0, first_token=comm.rank * T)
    far = np.array(nodes)[cut_experts(n_experts, P).owner[routing.experts]] != nodes[comm.rank]
    cells, results = [rows(4 * H * int(far.sum()))], []
    for mesh in ways.values():
        batch = fivedp.expert_dispatch(x, routing, mesh)
        results.append(fivedp.expert_combine(batch.tokens, batch).tobytes())
        sent = batch.plan.bytes_sent()
        cells.append(rows(sent["rows_between"]) + rows(sent["returns_between"]))
    same = comm.allreduce(results[0] == results[1], MPI.LAND)
    if comm.rank == 0:
        print(f"{n_experts:7}{top_k:7}", *cells, f"  {same}", sep="   ")

# Some experts are chosen far more often than others. On a link of 2 GB/s it pays to send their weights to the other
# node, whose ranks then compute rows of their own tokens; on the slow one it does not.
H, F = 96, 256
x = rng.standard_normal((T, H), dtype=np.float32)
os.environ["FIVEDP_LINK"] = "2"
meshes = ways["once per node"], fivedp.Mesh(comm, ep=P)
if comm.rank == 0:
    print("\nhot experts: rows of the busiest rank, KB between the nodes, forward and backward")
    print("experts  top-k  copies     rows  weights   tokens and sums   to owners   same bits")
for n_experts, top_k in ((64, 6), (128, 8), (60, 4)):
    routing = fivedp.routing_workload("zipf", T, n_experts, top_k, seed=0, first_token=comm.rank * T)
    mine, shared = range(*cut_experts(n_experts, P).of(comm.rank)), np.random.default_rng(1)
    w = [shared.standard_normal((n_experts, *s), dtype=np.float32)[mine] / 8 for s in ((H, F), (H, F), (F, H))]
    router, results = np.zeros((H, n_experts), np.float32), []
    for mesh in meshes:
        y, state = fivedp.expert_layer(x, router, *w, mesh, routing=routing, keep=True)
        d = fivedp.expert_layer_backward(y, state)
        results.append([a.tobytes() for a in (y, d.x, d.w_up, d.w_gate, d.w_down, d.weights)])
        same = comm.allreduce(results[0] == results[-1], MPI.LAND)
        busiest, sent, copies = comm.allreduce(state.plan.n_rows, MPI.MAX), state.plan.bytes_sent(), state.plan.copies
        # Rows cross three times (x, x and dy), sums twice, weights twice, and rows that were made elsewhere once.
        moved = 2 * sent["copies_between"], 3 * sent["rows_between"] + 2 * sent["returns_between"], sent["kept_between"]
        weights, rows_and_sums, kept = (comm.allreduce(n) / 1000 for n in moved)
        n_copies = 0 if copies is None else sum(map(len, copies.on_node))
        if comm.rank == 0:
            print(
                f"{n_experts:7}{top_k:7}{n_copies:8}{busiest:9}{weights:9.0f}{rows_and_sums:18.0f}{kept:12.0f}   {same}"
            )
