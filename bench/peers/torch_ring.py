"""torch's own ring attention on gloo, around its flash kernel for CPUs.

`context_parallel` of torch 2.13 refuses that kernel, but the schedule under it takes any: k and v go round while a
block is computed, blocks are merged by their log-sum-exp, gradients of k and v go home in float32. Causal sequences are
cut head and tail (zigzag) and their steps are half blocks, full ones in a row. The rotation is torch's default, an
all-gather in the background, which is faster on gloo than its other one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from attention_peer import AttentionPeer, inputs
from torch.distributed.tensor.experimental._context_parallel import _attention as ring
from torch_sdpa import heads_first, tokens_first
from torch_threads import TYPES
from worker import serve, span

aten = torch.ops.aten


def block_forward(q: Any, k: Any, v: Any, is_causal: bool = False) -> Any:
    """o and lse of a block."""
    return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, is_causal)


def block_backward(grad_out: Any, query: Any, key: Any, value: Any, out: Any, logsumexp: Any, is_causal: bool) -> Any:
    """dq, dk and dv of a block."""
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad_out, query, key, value, out, logsumexp, 0.0, is_causal
    )


class Ring(AttentionPeer):
    def __init__(self) -> None:
        torch.set_num_threads(1)
        dist.init_process_group("gloo")
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.group = dist.group.WORLD

    def barrier(self) -> None:
        dist.barrier()

    def prepare(self, case: dict[str, Any]) -> str | None:
        if case["dtype"] not in TYPES:
            return f"not measured for {case['dtype']}"
        if case["window"] or case["documents"]:
            return "torch's ring has no window and no documents"
        if case["tokens"] % (2 * self.size):
            return f"torch's ring wants a multiple of {2 * self.size} tokens"
        self.case = case
        blocks = (self.rank, 2 * self.size - 1 - self.rank) if case["causal"] else (2 * self.rank, 2 * self.rank + 1)
        self.tokens = np.concatenate([np.arange(*span(case["tokens"], 2 * self.size, b)) for b in blocks])
        arrays = {name: heads_first(x) for name, x in inputs(case, self.tokens).items()}
        self.do, self.qkv = arrays.pop("do", None), tuple(arrays.values())
        ring._cp_options.enable_load_balance = case["causal"]  # zigzag; torch refuses it for full attention
        if case["backward"]:
            self.o, self.lse = self._forward()
        return None

    def _forward(self) -> Any:
        return ring._templated_ring_attention(self.group, 2, block_forward, *self.qkv, is_causal=self.case["causal"])

    def run(self) -> None:
        if self.case["backward"]:
            self.gradients = ring._templated_ring_attention_backward(
                self.group, 2, block_backward, self.do, "grad_out", *self.qkv, self.o, self.lse, self.case["causal"]
            )
        else:
            self.o, self.lse = self._forward()

    def outcome(self) -> dict[str, Any]:
        if self.case["backward"]:
            return {name: tokens_first(x) for name, x in zip(("dq", "dk", "dv"), self.gradients, strict=True)}
        return {"o": tokens_first(self.o)}

    def facts(self) -> dict[str, Any]:
        return {"torch": torch.__version__, "threads": torch.get_num_threads(), "backend": dist.get_backend(),
                "rotation": ring._cp_options.rotate_method.name.lower()}  # fmt: skip


if __name__ == "__main__":
    peer = Ring()
    serve(peer)
    dist.destroy_process_group()
