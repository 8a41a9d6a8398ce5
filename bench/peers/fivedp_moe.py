"""fivedp's layer of experts, as one of the programs that are compared."""

from __future__ import annotations

from typing import Any

from fivedp_peer import FivedpPeer
from moe_peer import MoePeer
from worker import serve

import fivedp
from fivedp.bench.stages import Stopwatch
from fivedp.bench.trials.moe import watched_functions


class Fivedp(FivedpPeer, MoePeer):
    def prepare(self, case: dict[str, Any]) -> str | None:
        self.inputs, self.router, self.weights = self.take(case)
        return None

    def run(self) -> None:
        if not self.case["outside"]:
            self._layer()
            return
        watch = Stopwatch(("products",))
        with watch.watching({"products": watched_functions()["products"]}):
            self._layer()
        self.excluded += watch.seconds["products"]

    def _layer(self) -> None:
        gate, up, down = self.weights
        backward, keywords = self.case["backward"], {"top_k": self.case["top_k"], **self.case["keywords"]}
        found = fivedp.expert_layer(self.inputs["x"], self.router, up, gate, down, self.comm, keep=backward, **keywords)
        if not backward:
            self.results = {"y": found}
            return
        y, state = found
        gradients = fivedp.expert_layer_backward(self.inputs["dy"], state)
        self.results = {"y": y, "dx": gradients.x, "d_gate": gradients.w_gate, "d_up": gradients.w_up,
                        "d_down": gradients.w_down}  # fmt: skip

    def outcome(self) -> dict[str, Any]:
        return self.results


if __name__ == "__main__":
    serve(Fivedp())
