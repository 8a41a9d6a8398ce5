"""What torch's mixtures of experts share: routing, a forward or a forward with all gradients, and what a check gets."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from moe_peer import MoePeer
from torch_threads import TYPES, tensor


def route(x: Any, router: Any, top_k: int) -> tuple[Any, Any]:
    """Weights (T, k), normalised, and experts (T, k)."""
    scores = torch.softmax((x @ router).float(), dim=1)
    weights, experts = torch.topk(scores, top_k, dim=1)
    return weights / weights.sum(dim=1, keepdim=True), experts


class TorchLayer(MoePeer):
    """`leaves` are x, the router and the experts' three weights; gradients are autograd's."""

    leaves: list[Any]

    def prepare(self, case: dict[str, Any]) -> str | None:
        if case["dtype"] not in TYPES:
            return f"not measured for {case['dtype']}"
        inputs, router, weights = self.take(case)
        self.leaves = [tensor(a) for a in (inputs["x"], router, *weights)]
        self.dy = tensor(inputs["dy"]) if case["backward"] else None
        for leaf in self.leaves:
            leaf.requires_grad_(case["backward"])
        return None

    @abstractmethod
    def forward(self) -> Any:
        """y of this rank's tokens."""

    def run(self) -> None:
        if self.dy is None:
            with torch.no_grad():
                self.y = self.forward()
            return
        self.y = self.forward()
        self.gradients = torch.autograd.grad(self.y, self.leaves, self.dy, materialize_grads=True)

    def outcome(self) -> dict[str, Any]:
        found = {"y": self.y.detach().double().numpy()}
        if self.dy is not None:
            dx, _, *weights = (g.double().numpy() for g in self.gradients)
            found |= {"dx": dx, **dict(zip(("d_gate", "d_up", "d_down"), weights, strict=True))}
        return found
