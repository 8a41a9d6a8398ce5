"""heat's matmul with the splits that match fivedp's specs.

heat 1.8 returns wrong products for small or uneven operands of equal split (helmholtz-analytics/heat #871, #2093), so
its answers are checked like everyone's and sizes are multiples of the rank count.
"""

from __future__ import annotations

from typing import Any

import heat as ht
import torch
from mpi4py import MPI
from torch_threads import tensor
from worker import ProductPeer, inputs, serve, span

# splits of A and B, and the one of C that heat returns
WAYS = {"block-rows": (0, 0), "sequence-column": (0, 1), "row": (1, 0), "column": (None, 1)}


class Heat(ProductPeer):
    def __init__(self) -> None:
        torch.set_num_threads(1)
        self.rank, self.size = MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size

    def barrier(self) -> None:
        MPI.COMM_WORLD.Barrier()

    def prepare(self, case: dict[str, Any]) -> str | None:
        if case["way"] not in WAYS:
            return f"heat has no splits for {case['way']}"
        if case["dtype"] not in ("float32", "float64"):
            return f"not measured for {case['dtype']}"
        if any(case[x] % self.size for x in "mnk"):
            return f"sizes must divide by {self.size}"
        self.shape = (case["m"], case["n"])
        split_a, split_b = WAYS[case["way"]]
        (ra, ca), (rb, cb) = self._ranges(split_a, case["m"], case["k"]), self._ranges(split_b, case["k"], case["n"])
        a, b = inputs(case, ra, ca, rb, cb)
        self.a = ht.array(tensor(a), is_split=split_a)
        self.b = ht.array(tensor(b), is_split=split_b)
        return None

    def _ranges(self, split: int | None, rows: int, columns: int) -> Any:
        whole = [(0, rows), (0, columns)]
        if split is not None:
            whole[split] = span(whole[split][1], self.size, self.rank)
        return whole

    def run(self) -> None:
        self.c = ht.matmul(self.a, self.b)

    def result(self) -> Any:
        if self.c.split is None and self.rank:
            return None
        rows, columns = self._ranges(self.c.split, *self.shape)
        return self.c.larray.double().numpy(), rows, columns

    def facts(self) -> dict[str, Any]:
        return {"heat": ht.__version__, "torch": torch.__version__}


if __name__ == "__main__":
    serve(Heat())
