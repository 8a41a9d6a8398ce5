"""Every distributed call that takes device arrays against the same call on host arrays, on the ranks of this launch.

    mpirun -np 2 python bench/gpu_ranks.py

All ranks share one GPU. Inputs are fresh; results must agree within the rounding of two orders of a sum.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import cupy
import numpy as np
from mpi4py import MPI

import fivedp
from fivedp.comm.grid import grid_of
from fivedp.comm.messages import TAGS, mailbox


def compare(name: str, device: Any, host: Any, tolerance: float) -> bool:
    """Whether all arrays of two results agree; says so on rank 0."""
    comm, worst = MPI.COMM_WORLD, 0.0
    for got, want in zip(device, host, strict=True):
        scale = max(1e-30, float(np.abs(want).max(initial=0)))
        worst = max(worst, float(np.abs(cupy.asnumpy(got).astype(np.float64) - want).max(initial=0)) / scale)
    worst = comm.allreduce(worst, MPI.MAX)
    good = worst <= tolerance
    if comm.rank == 0:
        print(f"{name:32} {worst:.2e} {'ok' if good else f'WRONG: at most {tolerance:.0e} is right'}", flush=True)
    return bool(good)


def experts(comm: MPI.Intracomm, rng: np.random.Generator) -> list[bool]:
    """A layer of experts and its backward, routed here and with a routing that was made elsewhere; and its parts."""
    tokens, width, hidden, n_experts = 160 + comm.rank, 64, 96, 12
    share = len(np.array_split(np.arange(n_experts), comm.size)[comm.rank])
    same = np.random.default_rng(1)  # what every rank has whole

    def normal(*shape: int, rng: np.random.Generator = rng) -> np.ndarray:
        return (rng.standard_normal(shape) * shape[-2] ** -0.5).astype(np.float32)

    # Eighths: the logits are exact, so both libraries choose the same experts.
    x, router = rng.integers(-16, 17, (tokens, width)) / 8, same.integers(-4, 5, (width, n_experts)) / 8
    weights = [normal(share, *shape) for shape in ((width, hidden), (width, hidden), (hidden, width))]
    arrays, dy = [x.astype(np.float32), router.astype(np.float32), *weights], normal(tokens, width)
    shared = [normal(*shape, rng=same) for shape in ((width, hidden), (width, hidden), (hidden, width))]
    given = fivedp.routing_workload("zipf", tokens, n_experts, 3, seed=comm.rank)
    on_device = [cupy.asarray(a) for a in arrays]
    good = []
    for name, keywords in (
        ("expert_layer", {"top_k": 2}),
        ("expert_layer, a capacity", {"top_k": 3, "capacity_factor": 0.7}),
        ("expert_layer, routing given", {"routing": given}),
    ):
        results = []
        for xp, own in ((cupy, on_device), (np, arrays)):
            beside = fivedp.SharedExperts(*(xp.asarray(a) for a in shared))
            y, state = fivedp.expert_layer(*own, comm, keep=True, shared=beside, **keywords)
            d = fivedp.expert_layer_backward(xp.asarray(dy), state)
            of_shared = d.shared.w_up, d.shared.w_gate, d.shared.w_down
            results.append([y, d.x, d.router, d.w_up, d.w_gate, d.w_down, d.weights, *of_shared])
        good.append(compare(name, *results, 1e-4))
    batches = [fivedp.expert_dispatch(a[0], given, comm) for a in (on_device, arrays)]
    good.append(compare("expert_dispatch", *([batch.tokens] for batch in batches), 0.0))
    home = [
        [fivedp.expert_combine(batch.tokens, batch), fivedp.expert_dispatch_backward(batch.tokens, batch)]
        for batch in batches
    ]
    good.append(compare("expert_combine", *home, 0.0))
    return good


def transport_rate(comm: MPI.Intracomm, n_bytes: int = 256 << 20) -> None:
    """Print how fast an array goes from rank 0 to rank 1, beside the copy from the device to pinned memory."""
    array = cupy.full(n_bytes // 4, comm.rank, np.float32)
    best = float("inf")
    for _ in range(5):
        comm.Barrier()
        begin = time.perf_counter()
        with mailbox(grid_of(comm).everyone(), "the rate of a transport", cupy) as mail:
            if comm.rank == 0:
                mail.send(array, 1, TAGS["A"], 0)
            elif comm.rank == 1:
                mail.wait([mail.receive(array.shape, array.dtype, 0, TAGS["A"], target=array)])
        cupy.cuda.get_current_stream().synchronize()
        comm.Barrier()
        best = min(best, time.perf_counter() - begin)
    if comm.rank:
        return
    pinned, stream, copy = cupy.cuda.alloc_pinned_memory(n_bytes), cupy.cuda.get_current_stream(), float("inf")
    for _ in range(5):
        begin = time.perf_counter()
        cupy.cuda.runtime.memcpyAsync(pinned.ptr, array.data.ptr, n_bytes, 4, stream.ptr)
        stream.synchronize()
        copy = min(copy, time.perf_counter() - begin)
    rates = n_bytes / best / 1e9, n_bytes / copy / 1e9
    way = os.environ.get("FIVEDP_TRANSPORT", "as chosen")
    print(f"transport {way}: {rates[0]:.1f} GB/s, {rates[0] / rates[1]:.2f} of a pinned copy ({rates[1]:.1f} GB/s)")


def main() -> int:
    """Run all calls."""
    comm = MPI.COMM_WORLD
    seed = comm.bcast(int(np.random.default_rng().integers(2**31)), 0)
    same, own = np.random.default_rng(seed), np.random.default_rng([seed, comm.rank])

    def normal(*shape: int, rng: np.random.Generator = own) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    good = []
    a, b = normal(48, 41, rng=same), normal(41, 24, rng=same)
    mesh = fivedp.Mesh(comm, tp=comm.size)
    for spec in ("m k, k n/tp -> m n/tp", "m k/tp, k/tp n -> m n", "m/tp k, k n -> m/tp n"):
        left, right = spec.partition(" -> ")[0].split(", ")
        on_host = [fivedp.shard(a, left, mesh), fivedp.shard(b, right, mesh)]
        on_device = [fivedp.shard(cupy.asarray(a), left, mesh), fivedp.shard(cupy.asarray(b), right, mesh)]
        product = fivedp.sharded_matmul(*on_device, spec, mesh)
        good.append(compare(spec, [product], [fivedp.sharded_matmul(*on_host, spec, mesh)], 1e-5))
    whole = fivedp.gather(fivedp.shard(cupy.asarray(a), "m/tp k", mesh), "m/tp k", mesh)
    good.append(compare("shard, gather", [whole], [a], 0.0))
    q, k, v, do = normal(1, 96, 4, 64), normal(1, 96, 2, 64), normal(1, 96, 2, 64), normal(1, 96, 4, 64)
    for order in ("ring", "canonical"):
        keywords: dict[str, Any] = {"causal": True, "order": order}
        out, lse = fivedp.ring_attention(q, k, v, comm, **keywords)
        on = [cupy.asarray(x) for x in (q, k, v)]
        out_d, lse_d = fivedp.ring_attention(*on, comm, **keywords)
        good.append(compare(f"ring_attention {order}", [out_d, lse_d], [out, lse], 1e-4))
        host = fivedp.ring_attention_backward(do, q, k, v, out, lse, comm, **keywords)
        device = fivedp.ring_attention_backward(cupy.asarray(do), *on, out_d, lse_d, comm, **keywords)
        good.append(compare(f"ring_attention_backward {order}", device, host, 1e-4))
    good += experts(comm, own)
    if comm.size > 1:
        transport_rate(comm)
    return int(not all(good))


if __name__ == "__main__":
    sys.exit(main())
