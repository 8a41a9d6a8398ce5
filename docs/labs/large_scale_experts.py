"""The lab "large-scale experts": mpirun -np 4 python large_scale_experts.py

Four measurements: rows as ranks grow, load with and without a balancing bias, drops under a capacity, and what one hot
expert costs. Lines that begin with "time" depend on the machine, those of part 1 that name these ranks on their number;
everything else is the same on every machine and on every number of ranks.
"""

from math import comb
from time import perf_counter
from typing import Any

import numpy as np
from mpi4py import MPI

import fivedp
from fivedp.layout.dispatch import Outgoing, owners_to_help
from fivedp.layout.experts import cut_experts, subtrees
from fivedp.layout.shares import share

comm = MPI.COMM_WORLD
TOKENS, E, K = 4096, 64, 8  # of the whole batch
RANKS = 8  # over which the experts of parts 2 and 4 are cut
begin, end = share(TOKENS, comm.size, comm.rank)


def say(*words: Any) -> None:
    """Print on rank 0."""
    if comm.rank == 0:
        print(*words, flush=True)


# -- 1. Rows that a token sends to other ranks -------------------------------------------------------------------------


def rows_of_a_token(experts: np.ndarray, n_ranks: int) -> tuple[float, float, float, float]:
    """(naive, sent, expected, returned): rows per token to other ranks, mean over the batch cut over `n_ranks`."""
    cut = cut_experts(E, n_ranks)
    naive = sent = returned = 0
    for rank in range(n_ranks):
        mine = experts[slice(*share(TOKENS, n_ranks, rank))]
        out = Outgoing(mine, np.ones(mine.shape, np.float32), cut, rank)
        others = [r for r in range(n_ranks) if r != rank]
        naive += sum(len(out.of_owner[r]) for r in others)
        sent += sum(len(out.rows[r]) for r in others)
        returned += sum(out.n_returns[r] for r in others)
    sizes = [stop - start for start, stop in (cut.of(rank) for rank in range(n_ranks))]
    distinct = sum(1 - comb(E - size, K) / comb(E, K) for size in sizes)
    return naive / TOKENS, sent / TOKENS, distinct * (1 - 1 / n_ranks), returned / TOKENS


uniform = fivedp.routing_workload("uniform", TOKENS, E, K, seed=0)
say(f"1. {TOKENS} tokens, {E} experts, {K} of them for each token, all choices alike. Rows to other ranks, per token")
say("ranks    naive     sent  expected  returned  all-gather  subtrees of a rank")
for n_ranks in (1, 2, 3, 4, 6, 8, 16, 32, 64):
    columns = rows_of_a_token(uniform.experts, n_ranks)
    parts = sum(len(subtrees(E, share(E, n_ranks, rank))) for rank in range(n_ranks)) / n_ranks
    say(f"{n_ranks:5}", *(f"{column:9.3f}" for column in columns), f"{n_ranks - 1:11} {parts:19.2f}")

mesh, width = fivedp.Mesh(comm, ep=comm.size), 16
x = np.ones((end - begin, width), np.float32)
routing = fivedp.routing_workload("uniform", end - begin, E, K, seed=0, first_token=begin)
batch = fivedp.expert_dispatch(x, routing, mesh)
counted = comm.allreduce(sum(mesh.bytes_sent.values()), MPI.SUM)
planned = batch.plan.bytes_sent()
pairs, rows = (comm.allreduce(planned[name], MPI.SUM) for name in ("pairs", "rows"))
say(f"these {comm.size} ranks: {rows / (4 * width * TOKENS):.3f} rows per token,",
    f"bytes counted - bytes planned = {counted - pairs - rows}")  # fmt: skip


# -- 2. Load under Zipf, with and without a balancing bias -------------------------------------------------------------

rng = np.random.default_rng(1)  # every rank draws the whole batch and takes its part
popularity = -1.1 * np.log1p(np.arange(E))  # expert e is wanted as (e + 1)^-1.1
logits = (popularity + rng.gumbel(size=(TOKENS, E))).astype(np.float32)[begin:end]
keywords: dict[str, Any] = {"score": "sigmoid", "comm": comm}

say("2. Choices after Zipf: load after so many steps of a bias that gains or loses 0.01 in each")
say("steps  most / mean per expert  per rank of 8  idle experts  balance loss")
bias = np.zeros(E, np.float32)
for step in range(81):
    routing = fivedp.route(logits, K, bias=bias, **keywords)
    if step in (0, 10, 20, 40, 60, 80):
        load = fivedp.load_report(routing, comm, ranks=RANKS)
        say(f"{step:5} {load.expert_ratio:23.2f} {load.rank_ratio:14.2f} {(load.experts == 0).sum():13}"
            f" {routing.aux_loss:13.3f}")  # fmt: skip
    bias = fivedp.update_bias(bias, routing.counts, rate=0.01, comm=comm)


# -- 3. Drops under a capacity -----------------------------------------------------------------------------------------

say("3. Pairs dropped under a capacity, in percent")
say("capacity factor   an expert takes  Zipf, by position  Zipf, by score  from the load alone  with the bias")


def dropped(capacity_factor: float, **more: Any) -> float:
    """Percent of all pairs."""
    routing = fivedp.route(logits, K, capacity_factor=capacity_factor, **keywords, **more)
    pairs: int = comm.allreduce(int(routing.dropped), MPI.SUM)
    return 100 * pairs / (TOKENS * K)


wanted = fivedp.load_report(fivedp.route(logits, K, **keywords), comm).experts
for factor in (0.5, 1.0, 1.25, 2.0, 4.0):
    capacity = int(np.ceil(factor * TOKENS * K / E))
    above = 100 * np.maximum(wanted - capacity, 0).sum() / (TOKENS * K)
    columns = (dropped(factor), dropped(factor, drop="score"), above, dropped(factor, bias=bias))
    say(f"{factor:15} {capacity:17}", *(f"{column:17.2f}" for column in columns))


# -- 4. One hot expert -------------------------------------------------------------------------------------------------

H, F, EXPERTS = 256, 512, 16
mine = slice(*share(EXPERTS, comm.size, comm.rank))
w_up, w_gate, w_down = (a[mine] / 8 for a in rng.standard_normal((3, EXPERTS, H, F), dtype=np.float32))
arguments = (w_up, w_gate, w_down.transpose(0, 2, 1), comm)
router = np.zeros((H, EXPERTS), np.float32)  # choices are given
x = rng.standard_normal((TOKENS, H), dtype=np.float32)[begin:end]
routings = {
    kind: fivedp.routing_workload(kind, end - begin, EXPERTS, 1, seed=0, first_token=begin)
    for kind in ("balanced", "one_expert")
}

say(f"4. {EXPERTS} experts, one for a token: rows of {RANKS} ranks' experts, whose products others of a node share")
for kind in routings:
    whole = fivedp.routing_workload(kind, TOKENS, EXPERTS, 1, seed=0)
    load = fivedp.load_report(whole, ranks=RANKS)
    shares = [stop - start for start, stop in (cut_experts(EXPERTS, RANKS).of(rank) for rank in range(RANKS))]
    helped = owners_to_help(load.ranks.tolist(), shares, H, F, 4)
    say(f"{kind:>12}: {load.ranks.tolist()}  most / mean {load.rank_ratio:.2f}  shared: {helped}")

seconds: dict[str, list[float]] = {kind: [] for kind in routings}
for _ in range(6):  # alternating; the first of each is warm-up
    for kind, routing in routings.items():
        comm.Barrier()
        start = perf_counter()
        fivedp.expert_layer(x, router, *arguments, top_k=1, routing=routing)
        comm.Barrier()
        seconds[kind].append(perf_counter() - start)
ratios = [hot / even for hot, even in zip(seconds["one_expert"][1:], seconds["balanced"][1:], strict=True)]
say(f"time: one expert / balanced {np.median(ratios):.2f} on {comm.size} ranks, median of {len(ratios)}")
