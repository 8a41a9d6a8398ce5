"""torch on gloo, as expert parallelism is commonly written: rows sorted by expert, two all-to-alls, one expert a time.

Way "naive" sends a token once for each of its experts and adds up at home. Way "deduplicated" sends it once to each
rank with its choices beside it, and the rank returns one sum; its products are torch's grouped ones where those work.
Gradients are autograd's, the all-to-alls wrapped; that of the router is reduced over the ranks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch_layer import TorchLayer, route
from worker import serve, span


class AllToAll(torch.autograd.Function):
    """Rows to the other ranks; backward, their gradients the same way back."""

    @staticmethod
    def forward(ctx: Any, rows: Any, sent: list[int], received: list[int]) -> Any:
        ctx.sent, ctx.received = sent, received
        return exchanged(rows, sent, received)

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        return exchanged(gradient.contiguous(), ctx.received, ctx.sent), None, None


def exchanged(rows: Any, sent: list[int], received: list[int]) -> Any:
    """The rows that the others have for this rank, in the order of the ranks."""
    out = rows.new_empty((sum(received), *rows.shape[1:]))
    dist.all_to_all_single(out, rows.contiguous(), received, sent)
    return out


def one_by_one(rows: Any, counts: list[int], weights: list[Any]) -> Any:
    """Rows grouped by expert through SwiGLU experts, an expert at a time."""
    gate, up, down = weights
    parts = [
        (F.silu(part @ gate[e]) * (part @ up[e])) @ down[e] for e, part in enumerate(rows.split(counts)) if len(part)
    ]
    return torch.cat(parts) if parts else rows[:0]


def grouped(rows: Any, counts: list[int], weights: list[Any]) -> Any:
    """The same by torch's grouped product."""
    gate, up, down = weights
    ends = torch.tensor(counts).cumsum(0).to(torch.int32)
    hidden = F.silu(F.grouped_mm(rows, gate, offs=ends)) * F.grouped_mm(rows, up, offs=ends)
    return F.grouped_mm(hidden, down, offs=ends)


def grouped_works(dtype: Any) -> bool:
    """Whether this torch has a grouped product of this type, and its gradients, on a CPU."""
    try:
        rows, weights = (torch.ones(shape, dtype=dtype, requires_grad=True) for shape in ((32, 16), (2, 16, 16)))
        F.grouped_mm(rows, weights, offs=torch.tensor([16, 32], dtype=torch.int32)).sum().backward()
    except (AttributeError, RuntimeError, ValueError, TypeError):
        return False
    return True


class Moe(TorchLayer):
    def __init__(self) -> None:
        torch.set_num_threads(1)
        dist.init_process_group("gloo")
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def barrier(self) -> None:
        dist.barrier()

    def prepare(self, case: dict[str, Any]) -> str | None:
        if why := super().prepare(case):
            return why
        self.x, self.router, *self.weights = self.leaves
        edges = [span(case["experts"], self.size, rank) for rank in range(self.size)]
        self.n_experts = [end - begin for begin, end in edges]
        self.owner = torch.repeat_interleave(torch.arange(self.size), torch.tensor(self.n_experts))
        deduplicated = case["way"] == "deduplicated"
        self.way = self.deduplicated if deduplicated else self.naive
        self.through = grouped if deduplicated and grouped_works(self.x.dtype) else one_by_one
        return None

    def forward(self) -> Any:
        return self.way()

    def run(self) -> None:
        super().run()
        if self.dy is not None:
            dist.all_reduce(self.gradients[1])

    def experts_of(self, rows: Any, local: Any) -> Any:
        """What this rank's experts make of rows, in the order of the rows."""
        order = torch.argsort(local, stable=True)
        counts = torch.bincount(local, minlength=self.n_experts[self.rank]).tolist()
        sorted_rows = rows.index_select(0, order)
        with self.products():
            made = self.through(sorted_rows, counts, self.weights)
        return torch.empty_like(made).index_copy(0, order, made)

    def naive(self) -> Any:
        """A row for every pair of a token and an expert."""
        k = self.case["top_k"]
        weights, experts = route(self.x, self.router, k)
        order = torch.argsort(experts.flatten(), stable=True)
        token, chosen = order // k, experts.flatten()[order]
        counts = torch.bincount(chosen, minlength=self.case["experts"])
        theirs = exchanged(counts, self.n_experts, [len(self.experts)] * self.size).view(self.size, -1)
        sent = [part.sum().item() for part in counts.split(self.n_experts)]
        received = theirs.sum(dim=1).tolist()
        rows = AllToAll.apply(self.x.index_select(0, token), sent, received)
        local = torch.repeat_interleave(torch.arange(len(self.experts)).repeat(self.size), theirs.flatten())
        back = AllToAll.apply(self.experts_of(rows, local), received, sent)
        scaled = back * weights.flatten()[order, None].to(back.dtype)
        return torch.zeros_like(self.x).index_add(0, token, scaled)

    def deduplicated(self) -> Any:
        """A row for every token and rank, its choices beside it; a sum comes back."""
        weights, experts = route(self.x, self.router, self.case["top_k"])
        owner = self.owner[experts]
        needed = [torch.nonzero((owner == rank).any(dim=1)).flatten() for rank in range(self.size)]
        token, sent = torch.cat(needed), [len(part) for part in needed]
        received = exchanged(torch.tensor(sent), [1] * self.size, [1] * self.size).tolist()
        rows = AllToAll.apply(self.x.index_select(0, token), sent, received)
        choices = exchanged(experts.index_select(0, token), sent, received)
        shares = AllToAll.apply(weights.index_select(0, token), sent, received)
        row, slot = torch.nonzero((choices >= self.experts.start) & (choices < self.experts.stop), as_tuple=True)
        made = self.experts_of(rows.index_select(0, row), choices[row, slot] - self.experts.start)
        sums = torch.zeros(rows.shape, dtype=torch.promote_types(rows.dtype, torch.float32))
        sums = sums.index_add(0, row, made * shares[row, slot, None])
        back = AllToAll.apply(sums.to(self.x.dtype), received, sent)
        return torch.zeros_like(self.x).index_add(0, token, back)

    def facts(self) -> dict[str, Any]:
        return {"torch": torch.__version__, "threads": torch.get_num_threads(), "backend": dist.get_backend(),
                "products": self.through.__name__}  # fmt: skip


if __name__ == "__main__":
    peer = Moe()
    serve(peer)
    dist.destroy_process_group()
