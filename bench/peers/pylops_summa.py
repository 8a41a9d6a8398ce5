"""pylops-mpi's MPIMatrixMult, kind="summa": C = A B with all three cut over a square grid of ranks.

Flattening the blocks into its vectors happens outside the timer; unwrapping the result does too.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from mpi4py import MPI
from pylops_mpi import DistributedArray, Partition
from pylops_mpi.basicoperators import MPIMatrixMult
from worker import ProductPeer, inputs, serve


class Summa(ProductPeer):
    def __init__(self) -> None:
        self.comm = MPI.COMM_WORLD
        self.rank, self.size = self.comm.rank, self.comm.size

    def barrier(self) -> None:
        self.comm.Barrier()

    def prepare(self, case: dict[str, Any]) -> str | None:
        side = math.isqrt(self.size)
        if side * side != self.size:
            return f"pylops-mpi wants a square number of ranks, not {self.size}"
        if case["dtype"] not in ("float32", "float64"):
            return f"not measured for {case['dtype']}"
        if any(case[x] % side for x in "mnk"):
            return f"sizes must divide by {side}"
        row, column = divmod(self.rank, side)
        m, n, k = (case[x] // side for x in "mnk")
        self.rows, self.columns = (row * m, row * m + m), (column * n, column * n + n)
        a, b = inputs(case, self.rows, (column * k, column * k + k), (row * k, row * k + k), self.columns)
        self.operator = MPIMatrixMult(a, case["n"], base_comm=self.comm, kind="summa", dtype=case["dtype"])
        local = [b.size] * self.size
        self.x = DistributedArray(global_shape=sum(local), local_shapes=local, base_comm=self.comm,
                                  partition=Partition.SCATTER, dtype=b.dtype)  # fmt: skip
        self.x.local_array[:] = b.ravel()
        self.shape = (m, n)
        return None

    def run(self) -> None:
        self.y = self.operator @ self.x

    def result(self) -> Any:
        return np.asarray(self.y.local_array).reshape(self.shape), self.rows, self.columns


if __name__ == "__main__":
    serve(Summa())
