"""fivedp's attention, as one of the programs that are compared; `way` is the layout of the sequence."""

from __future__ import annotations

from typing import Any

from attention_peer import AttentionPeer, inputs
from fivedp_peer import FivedpPeer
from worker import serve

import fivedp
from fivedp.layout.sequence import token_indices


class Fivedp(FivedpPeer, AttentionPeer):
    def prepare(self, case: dict[str, Any]) -> str | None:
        self.case, layout = case, case["way"] or "contiguous"
        self.tokens = token_indices(layout, case["tokens"], self.size, self.rank)
        packed = bool(case["documents"])
        arrays = {name: x if packed else x[None] for name, x in inputs(case, self.tokens).items()}
        self.do, self.qkv = arrays.pop("do", None), tuple(arrays.values())
        self.keywords = {
            "causal": case["causal"], "window": case["window"] or None, "layout": layout,
            "cu_seqlens": case["documents"] or None, **case["keywords"],
        }  # fmt: skip
        if case["backward"]:
            self.forward = fivedp.ring_attention(*self.qkv, self.comm, **self.keywords)
        return None

    def run(self) -> None:
        if self.case["backward"]:
            names = ("dq", "dk", "dv")
            results = fivedp.ring_attention_backward(self.do, *self.qkv, *self.forward, self.comm, **self.keywords)
        else:
            names, results = ("o",), fivedp.ring_attention(*self.qkv, self.comm, **self.keywords)[:1]
        self.results = dict(zip(names, results, strict=True))

    def outcome(self) -> dict[str, Any]:
        return {name: x.reshape(len(self.tokens), *x.shape[-2:]) for name, x in self.results.items()}


if __name__ == "__main__":
    serve(Fivedp())
