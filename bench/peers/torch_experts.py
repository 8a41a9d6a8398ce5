"""torch in one process with as many threads as the others have ranks: the experts in a loop, as Mixtral's block is."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.nn.functional as F
from moe_peer import MoePeer
from torch_moe import route
from torch_threads import TYPES, tensor
from worker import serve


class Experts(MoePeer):
    def prepare(self, case: dict[str, Any]) -> str | None:
        if case["dtype"] not in TYPES:
            return f"not measured for {case['dtype']}"
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        inputs, router, weights = self.take(case)
        self.leaves = [tensor(a) for a in (inputs["x"], router, *weights)]
        self.dy = tensor(inputs["dy"]) if case["backward"] else None
        for leaf in self.leaves:
            leaf.requires_grad_(case["backward"])
        return None

    def run(self) -> None:
        if self.dy is None:
            with torch.no_grad():
                self.y = self.forward()
            return
        self.y = self.forward()
        self.gradients = torch.autograd.grad(self.y, self.leaves, self.dy, materialize_grads=True)

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

    def outcome(self) -> dict[str, Any]:
        found = {"y": self.y.detach().double().numpy()}
        if self.dy is not None:
            dx, _, *weights = (g.double().numpy() for g in self.gradients)
            found |= {"dx": dx, **dict(zip(("d_gate", "d_up", "d_down"), weights, strict=True))}
        return found

    def facts(self) -> dict[str, Any]:
        return {"torch": torch.__version__, "threads": torch.get_num_threads(),
                "capability": torch.backends.cpu.get_cpu_capability()}  # fmt: skip


if __name__ == "__main__":
    serve(Experts())
