"""torch.mm in one process with as many threads as the others have ranks."""

from __future__ import annotations

import os
from typing import Any

import torch
from worker import ProductPeer, inputs, serve

TYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


def tensor(array: Any) -> torch.Tensor:
    """A NumPy array, bfloat16 included, as a tensor."""
    if array.dtype.itemsize == 2:
        return torch.from_numpy(array.view("int16")).view(torch.bfloat16)
    return torch.from_numpy(array)


class TorchThreads(ProductPeer):
    def prepare(self, case: dict[str, Any]) -> str | None:
        if case["dtype"] not in TYPES:
            return f"not measured for {case['dtype']}"
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        m, n, k = case["m"], case["n"], case["k"]
        a, b = inputs(case, (0, m), (0, k), (0, k), (0, n))
        self.a, self.b = tensor(a), tensor(b)
        self.c = torch.zeros((m, n), dtype=TYPES[case["dtype"]])
        return None

    def run(self) -> None:
        torch.mm(self.a, self.b, out=self.c)

    def result(self) -> Any:
        return self.c.double().numpy(), (0, self.c.shape[0]), (0, self.c.shape[1])

    def facts(self) -> dict[str, Any]:
        return {"torch": torch.__version__, "threads": torch.get_num_threads(),
                "capability": torch.backends.cpu.get_cpu_capability()}  # fmt: skip


if __name__ == "__main__":
    serve(TorchThreads())
