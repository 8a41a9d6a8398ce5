"""torch's scaled_dot_product_attention in one process: its flash kernel for CPUs, and autograd's backward of it.

Causal attention is asked for as such; any other mask is a dense one, of numbers to add, which that kernel reads faster
than booleans and which is made outside the timer. The kernel is fixed, for the mask must not fall back to the one that
stores all logits.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from attention_peer import AttentionPeer, inputs, sees
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch_threads import TYPES, tensor
from worker import serve


def heads_first(x: Any) -> torch.Tensor:
    """(tokens, heads, size) as torch's own layout (1, heads, tokens, size), in one piece."""
    return tensor(x).transpose(0, 1)[None].contiguous()


def tokens_first(x: torch.Tensor) -> Any:
    """The way back, as float64."""
    return x.detach()[0].transpose(0, 1).double().numpy()


class Sdpa(AttentionPeer):
    def prepare(self, case: dict[str, Any]) -> str | None:
        if case["dtype"] not in TYPES:
            return f"not measured for {case['dtype']}"
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        self.case, self.tokens = case, np.arange(case["tokens"])
        arrays = {name: heads_first(x) for name, x in inputs(case, self.tokens).items()}
        self.do, self.qkv = arrays.pop("do", None), tuple(arrays.values())
        dense = bool(case["window"] or case["documents"])
        self.how: dict[str, Any] = {"is_causal": case["causal"] and not dense}
        if dense:
            mask = torch.zeros((case["tokens"], case["tokens"]), dtype=TYPES[case["dtype"]])
            mask.masked_fill_(~torch.from_numpy(sees(case, self.tokens, self.tokens)), float("-inf"))
            self.how["attn_mask"] = mask
        if case["backward"]:
            for x in self.qkv:
                x.requires_grad_()
            self.o = self._forward()
        return None

    def _forward(self) -> torch.Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(*self.qkv, **self.how)

    def run(self) -> None:
        if self.case["backward"]:
            self.gradients = torch.autograd.grad(self.o, self.qkv, self.do, retain_graph=True)
        else:
            self.o = self._forward()

    def outcome(self) -> dict[str, Any]:
        if self.case["backward"]:
            return {name: tokens_first(x) for name, x in zip(("dq", "dk", "dv"), self.gradients, strict=True)}
        return {"o": tokens_first(self.o)}

    def facts(self) -> dict[str, Any]:
        return {"torch": torch.__version__, "threads": torch.get_num_threads(),
                "capability": torch.backends.cpu.get_cpu_capability()}  # fmt: skip


if __name__ == "__main__":
    serve(Sdpa())
