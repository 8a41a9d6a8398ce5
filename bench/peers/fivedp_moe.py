"""fivedp's layer of experts, as one of the programs that are compared."""

from __future__ import annotations

import os
from typing import Any

from moe_peer import MoePeer
from mpi4py import MPI
from worker import serve

import fivedp
from fivedp.bench.stages import Stopwatch
from fivedp.bench.trials.moe import watched_functions


class Fivedp(MoePeer):
    def __init__(self) -> None:
        from fivedp.kernels import gemm

        gemm.set_threads(int(os.environ.get("FIVEDP_BENCH_THREADS", "1")))
        self.comm = MPI.COMM_WORLD
        self.rank, self.size = self.comm.rank, self.comm.size

    def barrier(self) -> None:
        self.comm.Barrier()

    def prepare(self, case: dict[str, Any]) -> str | None:
        self.inputs, self.router, self.weights = self.take(case)
        return None

    def run(self) -> None:
        if not self.case["outside"]:
            self._layer()
            return
        watch = Stopwatch(("products",))
        with watch.watching({"products": watched_functions()["products"]}):
            self._layer()
        self.excluded += watch.seconds["products"]

    def _layer(self) -> None:
        gate, up, down = self.weights
        backward, keywords = self.case["backward"], {"top_k": self.case["top_k"], **self.case["keywords"]}
        found = fivedp.expert_layer(self.inputs["x"], self.router, up, gate, down, self.comm, keep=backward, **keywords)
        if not backward:
            self.results = {"y": found}
            return
        y, state = found
        gradients = fivedp.expert_layer_backward(self.inputs["dy"], state)
        self.results = {"y": y, "dx": gradients.x, "d_gate": gradients.w_gate, "d_up": gradients.w_up,
                        "d_down": gradients.w_down}  # fmt: skip

    def outcome(self) -> dict[str, Any]:
        return self.results

    def facts(self) -> dict[str, Any]:
        from fivedp.bench import environment
        from fivedp.kernels import gemm

        return {"fivedp": getattr(fivedp, "__version__", None), "isa": gemm.isa(), "threads": gemm.threads(),
                "mpi": environment.mpi()}  # fmt: skip


if __name__ == "__main__":
    serve(Fivedp())
