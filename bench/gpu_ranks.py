"""Every distributed call that takes device arrays against the same call on host arrays, on the ranks of this launch.

    mpirun -np 2 python bench/gpu_ranks.py

All ranks share one GPU. Inputs are fresh; results must agree within the rounding of two orders of a sum.
"""

from __future__ import annotations

import sys
from typing import Any

import cupy
import numpy as np
from mpi4py import MPI

import fivedp


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


def main() -> int:
    """Run all calls."""
    comm = MPI.COMM_WORLD
    rng = np.random.default_rng(comm.bcast(np.random.default_rng().integers(2**31), 0) + comm.rank)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    good = []
    a, b = normal(48, 40), normal(40, 24)
    mesh = fivedp.Mesh(comm, tp=comm.size)
    for spec in ("m k, k n/tp -> m n/tp", "m k/tp, k/tp n -> m n", "m/tp k, k n -> m/tp n"):
        on_host = fivedp.sharded_matmul(a, b, spec, mesh)
        on_device = fivedp.sharded_matmul(cupy.asarray(a), cupy.asarray(b), spec, mesh)
        good.append(compare(spec, [on_device], [on_host], 1e-5))
    on_device = fivedp.gather(fivedp.shard(cupy.asarray(a), "m/tp k", mesh), "m/tp k", mesh)
    good.append(compare("shard, gather", [on_device], [a], 0.0))
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
    return int(not all(good))


if __name__ == "__main__":
    sys.exit(main())
