"""torch DTensor on gloo: the same layouts as fivedp's specs, redistribution included in the time.

`way` is a fivedp strategy; the placements are DTensor's own for the same layout of A, B and C.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch_threads import TYPES, tensor
from worker import ProductPeer, inputs, serve, span

R, ROWS, COLUMNS = Replicate(), Shard(0), Shard(1)
# placements of A, B and C on a line of ranks
LINES = {
    "column": (R, COLUMNS, COLUMNS),
    "column-gathered": (R, COLUMNS, R),
    "row": (COLUMNS, ROWS, R),
    "row-sequence": (COLUMNS, ROWS, ROWS),
    "sequence-column": (ROWS, COLUMNS, COLUMNS),
    "block-rows": (ROWS, ROWS, ROWS),
}


class Tensors(ProductPeer):
    def __init__(self) -> None:
        torch.set_num_threads(1)
        dist.init_process_group("gloo")
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.mesh = init_device_mesh("cpu", (self.size,))

    def barrier(self) -> None:
        dist.barrier()

    def prepare(self, case: dict[str, Any]) -> str | None:
        if case["dtype"] not in TYPES:
            return f"not measured for {case['dtype']}"
        m, n, k = case["m"], case["n"], case["k"]
        if case["way"] in LINES:
            self.mesh = init_device_mesh("cpu", (self.size,))
            a, b, c = ((placement,) for placement in LINES[case["way"]])
        elif case["way"] == "summa":
            r = next(f for f in range(int(self.size**0.5), 0, -1) if self.size % f == 0)
            self.mesh = init_device_mesh("cpu", (r, self.size // r))
            a = b = c = (ROWS, COLUMNS)
        else:
            return f"no placements written down for {case['way']}"
        self.wanted = c
        self.a = self._distribute(case, (m, k), a, 0)
        self.b = self._distribute(case, (k, n), b, 1)
        return None

    def _span(self, shape: tuple[int, int], placements: Any) -> tuple[tuple[int, int], tuple[int, int]]:
        """Global rows and columns of this rank's share; every case here splits a dimension over one mesh axis."""
        ranges = [(0, shape[0]), (0, shape[1])]
        for axis, placement in enumerate(placements):
            if isinstance(placement, Shard):
                ranges[placement.dim] = span(shape[placement.dim], self.mesh.size(axis), self.mesh.get_local_rank(axis))
        return ranges[0], ranges[1]

    def _distribute(self, case: dict[str, Any], shape: tuple[int, int], placements: Any, which: int) -> DTensor:
        rows, columns = self._span(shape, placements)
        empty = (0, 0)
        local = (
            inputs(case, rows, columns, empty, empty)[0] if which == 0 else inputs(case, empty, empty, rows, columns)[1]
        )
        return DTensor.from_local(tensor(local), self.mesh, placements, run_check=False, shape=torch.Size(shape),
                                  stride=(shape[1], 1))  # fmt: skip

    def run(self) -> None:
        self.c = torch.mm(self.a, self.b).redistribute(placements=self.wanted)

    def result(self) -> Any:
        rows, columns = self._span(tuple(self.c.shape), self.wanted)
        if not any(isinstance(p, Shard) for p in self.wanted) and self.rank:
            return None
        return self.c.to_local().double().numpy(), rows, columns

    def facts(self) -> dict[str, Any]:
        return {"torch": torch.__version__, "threads": torch.get_num_threads(), "backend": dist.get_backend()}


if __name__ == "__main__":
    peer = Tensors()
    serve(peer)
    dist.destroy_process_group()
