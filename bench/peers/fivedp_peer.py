"""What fivedp's own programs share, whatever they compute: the communicator, threads as ordered, what was used."""

from __future__ import annotations

import os
from typing import Any

from mpi4py import MPI
from worker import Peer

import fivedp
from fivedp.bench import ceiling, environment
from fivedp.kernels import gemm


class FivedpPeer(Peer):
    """To be the first base of a program, before what it computes."""

    def __init__(self) -> None:
        gemm.set_threads(int(os.environ.get("FIVEDP_BENCH_THREADS", "1")))
        self.comm = MPI.COMM_WORLD
        self.rank, self.size = self.comm.rank, self.comm.size

    def barrier(self) -> None:
        self.comm.Barrier()

    def facts(self) -> dict[str, Any]:
        peak = {name: ceiling.in_registers(self.comm, name) for name in ("float32", "float64", "bfloat16")}
        return {"fivedp": getattr(fivedp, "__version__", None), "isa": gemm.isa(), "threads": gemm.threads(),
                "mpi": environment.mpi(), "peak": peak}  # fmt: skip
