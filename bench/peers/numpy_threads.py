"""NumPy in one process with as many threads as the others have ranks: the machine's own product."""

from __future__ import annotations

from typing import Any

import numpy as np
from worker import ProductPeer, inputs, serve


class NumpyThreads(ProductPeer):
    def prepare(self, case: dict[str, Any]) -> str | None:
        if case["dtype"] not in ("float32", "float64", "complex64", "complex128"):
            return f"NumPy has no BLAS for {case['dtype']}"
        m, n, k = case["m"], case["n"], case["k"]
        self.a, self.b = inputs(case, (0, m), (0, k), (0, k), (0, n))
        self.c = np.zeros((m, n), self.a.dtype)
        return None

    def run(self) -> None:
        np.matmul(self.a, self.b, out=self.c)

    def result(self) -> Any:
        return self.c, (0, self.c.shape[0]), (0, self.c.shape[1])


if __name__ == "__main__":
    serve(NumpyThreads())
