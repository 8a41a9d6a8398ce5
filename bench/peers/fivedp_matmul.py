"""fivedp's own product, as one of the programs that are compared."""

from __future__ import annotations

from typing import Any

import numpy as np
from fivedp_peer import FivedpPeer
from worker import ProductPeer, serve

import fivedp
from fivedp.bench import operands
from fivedp.bench.cases.gemm import Case, strategy
from fivedp.bench.pieces import layouts, make, open_grid, place


class Fivedp(FivedpPeer, ProductPeer):
    def __init__(self) -> None:
        super().__init__()
        self.grids: dict[str, Any] = {}

    def prepare(self, case: dict[str, Any]) -> str | None:
        self.strategy = strategy(case["way"])
        try:
            self.strategy.mesh_shape(self.size)
        except ValueError as why:
            return str(why)
        if case["way"] not in self.grids:
            self.grids[case["way"]] = open_grid(self.comm, self.strategy)
        grid = self.grids[case["way"]]
        local = Case(self.strategy, case["m"], case["n"], case["k"], case["dtype"])
        a, b, c = layouts(self.strategy.spec)
        self.a, _ = make(local, a, grid, case["seed"])
        self.b, _ = make(local, b, grid, case["seed"] + 1)
        self.where = place(c, local.sizes, grid)
        self.c = np.zeros(self.where.shape, operands.dtype_of(case["dtype"]))
        self.mesh, self.keywords = grid.mesh, case.get("keywords", {})
        return None

    def run(self) -> None:
        fivedp.sharded_matmul(self.a, self.b, self.strategy.spec, self.mesh, out=self.c, **self.keywords)

    def result(self) -> Any:
        if not self.where.first_holder:
            return None
        return self.c.reshape(len(self.where.rows), -1), self.where.rows, self.where.columns


if __name__ == "__main__":
    serve(Fivedp())
