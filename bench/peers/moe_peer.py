"""What the programs that compute a mixture of experts share: inputs, who chooses whom, and what a check asks for.

A case is {"tokens", "width", "hidden", "experts", "top_k", "workload", "backward", "outside", "dtype", "seed", "way",
"keywords"}; tokens are those of all ranks, cut as `numpy.array_split` cuts them, and so are the experts. Everybody
routes the same: a token's logits are its first features, and the router picks them up (`expert_workload.py`). With
`backward` a run is the forward and all gradients; with `outside` the experts' products do not count.
"""

from __future__ import annotations

import contextlib
import time
from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

import numpy as np
from worker import Peer, load, operands, span

Array = Any
workload = load("expert_workload")
NUMBERS = {"x": 0, "dy": 1, "w_gate": 2, "w_up": 3, "w_down": 4, "logits": 5}


def token_inputs(case: dict[str, Any], tokens: Any) -> dict[str, Array]:
    """x (n, H) and, for a backward, dy of some tokens."""
    dtype, columns = operands.dtype_of(case["dtype"]), range(case["width"])
    names = ("x", "dy") if case["backward"] else ("x",)
    made = {name: operands.block(case["seed"] + NUMBERS[name], tokens, columns, dtype) for name in names}
    workload.put_logits(made["x"], logits(case, tokens))
    return made


def logits(case: dict[str, Any], tokens: Any) -> Array:
    """(n, E) in float32, exact in every type."""
    draws = operands.block(case["seed"] + NUMBERS["logits"], tokens, range(case["experts"]), np.dtype(np.float32))
    return workload.logits(case["workload"], draws)


def router(case: dict[str, Any]) -> Array:
    """(H, E)."""
    return workload.router(case["width"], case["experts"], operands.dtype_of(case["dtype"]))


def expert_weights(case: dict[str, Any], experts: range) -> list[Array]:
    """w_gate and w_up (n, H, F) and w_down (n, F, H) of some experts."""
    dtype, made = operands.dtype_of(case["dtype"]), []
    for name in ("w_gate", "w_up", "w_down"):
        rows, columns = (case["hidden"], case["width"])[:: 1 if name == "w_down" else -1]
        numbers = range(experts.start * rows, experts.stop * rows)
        block = operands.block(case["seed"] + NUMBERS[name], numbers, range(columns), dtype)
        block *= np.asarray(workload.weight_scale(rows), dtype)
        made.append(block.reshape(len(experts), rows, columns))
    return made


class MoePeer(Peer):
    """A program that computes a mixture of experts.

    `take` sets this rank's `tokens` and `experts` (ranges), and returns its arrays. The weights of the last layer are
    kept, so that a program that does two things in turn does not spend its time on them.
    """

    case: dict[str, Any]
    tokens: range
    experts: range
    _weights: tuple[Any, list[Array]] | None = None

    def take(self, case: dict[str, Any]) -> tuple[dict[str, Array], Array, list[Array]]:
        """x and dy, the router, and the weights of this rank's experts."""
        self.case = case
        self.tokens = range(*span(case["tokens"], self.size, self.rank))
        self.experts = range(*span(case["experts"], self.size, self.rank))
        key = [case[name] for name in ("width", "hidden", "experts", "dtype", "seed")]
        if self._weights is None or self._weights[0] != key:
            self._weights = None
            self._weights = (key, expert_weights(case, self.experts))
        return token_inputs(case, self.tokens), router(case), self._weights[1]

    @contextlib.contextmanager
    def products(self) -> Iterator[None]:
        """What is done inside does not count where only the rest is asked for."""
        start = time.perf_counter()
        yield
        if self.case["outside"]:
            self.excluded += time.perf_counter() - start

    @abstractmethod
    def outcome(self) -> dict[str, Array]:
        """By name: y and dx, one row for each of this rank's tokens; d_gate, d_up and d_down as the weights are."""

    def check(self, order: dict[str, Any]) -> dict[str, Any]:
        """The rows of some tokens and the gradients of some hidden units that this rank has, and which they are."""
        found: dict[str, Any] = {}
        for name, x in self.outcome().items():
            if name in ("y", "dx"):
                places = [i for i, token in enumerate(order["tokens"]) if token in self.tokens]
                rows = [np.asarray(x[order["tokens"][i] - self.tokens.start]) for i in places]
            else:
                places = [i for i, (expert, _) in enumerate(order["units"]) if expert in self.experts]
                chosen = [(order["units"][i][0] - self.experts.start, order["units"][i][1]) for i in places]
                rows = [np.asarray(x[e][u] if name == "d_down" else x[e][:, u]) for e, u in chosen]
            found[name] = {"places": places, "values": [row.astype(np.float64).tolist() for row in rows]}
        return found
