"""torch in one process with as many threads as the others have ranks: the experts in a loop, as Mixtral's block is."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.nn.functional as F
from torch_layer import TorchLayer, route
from worker import serve


class Experts(TorchLayer):
    def prepare(self, case: dict[str, Any]) -> str | None:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        return super().prepare(case)

    def forward(self) -> Any:
        """Every expert takes its tokens out and adds what it makes of them."""
        x, router, gate, up, down = self.leaves
        weights, experts = route(x, router, self.case["top_k"])
        y, weights = torch.zeros_like(x), weights.to(x.dtype)
        for expert in torch.unique(experts).tolist():
            token, slot = torch.where(experts == expert)
            rows = x[token]
            with self.products():
                made = (F.silu(rows @ gate[expert]) * (rows @ up[expert])) @ down[expert]
            y = y.index_add(0, token, made * weights[token, slot, None])
        return y

    def facts(self) -> dict[str, Any]:
        return {"torch": torch.__version__, "threads": torch.get_num_threads(),
                "capability": torch.backends.cpu.get_cpu_capability()}  # fmt: skip


if __name__ == "__main__":
    serve(Experts())
