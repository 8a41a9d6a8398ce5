"""A mixture of experts on this rank: its tokens and experts, its call, its stages, its price in bytes, its check.

What a call is to send is worked out once more from who chose whom, and held against the plan of the dispatch. The
least is every token once to each other rank that has any of its experts and once back, and its pairs.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

import fivedp
from fivedp.bench import agree, operands
from fivedp.bench.cases.moe import STAGES, Case
from fivedp.bench.family import Row
from fivedp.bench.measure import Bench, digest
from fivedp.bench.mixture import Inputs, Weights
from fivedp.bench.moe_check import Check
from fivedp.bench.order_price import OrdersInTurns
from fivedp.bench.pieces import span
from fivedp.bench.stages import Stopwatch
from fivedp.kernels._select import sum_type
from fivedp.layout.dispatch import pair_type
from fivedp.layout.experts import cut_experts
from fivedp.layout.explain import plan_for
from fivedp.ops.dispatch_plan import pairs_bytes
from fivedp.ops.expert_dispatch import Dispatched, Returns, ScalarsHome
from fivedp.ops.work_sharing import SharedWork

Array = NDArray[Any]
STAGE_CALLS = 5


def watched_functions() -> dict[str, tuple[tuple[Any, str], ...]]:
    """The functions of the layer, forward and backward, by stage."""
    layer = importlib.import_module("fivedp.ops.mixture_layer")
    kernel = importlib.import_module("fivedp.kernels.experts")
    return {
        "route": tuple((layer, name) for name in ("router_logits", "gemm", "route", "route_backward", "over_tokens")),
        "dispatch": (
            (layer, "plan_dispatch"),
            (layer, "Dispatched"),
            *((Dispatched, name) for name in ("arrived", "wait", "rows", "release")),
            *((SharedWork, name) for name in ("visible", "begin", "_exchange")),
        ),
        "products": tuple(
            (kernel, name) for name in ("expert_hidden", "expert_hidden_backward", "grouped_matmul", "grouped_outer")
        ),
        "combine": tuple(
            (owner, name)
            for owner, names in ((Returns, ("send", "add")), (ScalarsHome, ("send", "table")))
            for name in names
        ),
    }


class Experts:
    """The tokens and experts of a case on this rank, its call, and its check."""

    def __init__(self, case: Case, bench: Bench) -> None:
        self.case, self.bench, self.grid = case, bench, bench.grid(case.strategy)
        comm = bench.comm
        self.inputs = Inputs(case, bench.seed)
        self.tokens = span(case.tokens, comm.size, comm.rank)
        self.experts = span(case.model.experts, comm.size, comm.rank)
        self.x = self.inputs.tokens("x", self.tokens)
        self.router = self.inputs.router()
        self.weights = self._weights()
        self.chosen = self.inputs.choices(range(case.tokens))
        self.traffic = traffic(self.chosen, case, comm.size, case.backward)
        self.bytes_planned, self.bytes_bound = self.traffic["planned"], self.traffic["bound"]
        self.results: tuple[Array, ...] = ()
        self.complaint = ""
        self.state: Any = None
        if case.backward:
            self.dy = self.inputs.tokens("dy", self.tokens)
            self.y, self.state = self._forward(keep=True)

    def _weights(self) -> Weights:
        """Of this rank's experts; those of the case before are kept where they are the same."""
        model = self.case.model
        key = (model.width, model.hidden, model.experts, model.activation, self.case.dtype)
        held = self.bench.kept.get("moe")
        if held is None or held[0] != key:
            self.bench.kept.pop("moe", None)
            gate = self.inputs.weights("w_gate", self.experts) if model.activation == "swiglu" else None
            up, down = (self.inputs.weights(name, self.experts) for name in ("w_up", "w_down"))
            held = self.bench.kept["moe"] = (key, Weights(gate, up, down))
        weights: Weights = held[1]
        return weights

    def _forward(self, keep: bool) -> Any:
        model, w = self.case.model, self.weights
        return fivedp.expert_layer(
            self.x, self.router, w.up, w.gate, w.down, self.grid.mesh, top_k=model.top_k, activation=model.activation,
            keep=keep, score=model.score, normalize=model.normalize,
        )  # fmt: skip

    def run(self) -> None:
        """One forward, or one backward."""
        if self.case.backward:
            gradients = fivedp.expert_layer_backward(self.dy, self.state)
            self.results = tuple(
                g for g in (gradients.x, gradients.router, gradients.w_gate, gradients.w_up, gradients.w_down)
                if g is not None
            )  # fmt: skip
        else:
            self.results = (self._forward(keep=False),)

    def facts(self) -> Row:
        """The stages, the price of the order, the load of the busiest rank over the mean, the bytes by what they are.

        Collective.
        """
        loads, stages = pairs_by_rank(self.chosen, self.case.model.experts, self.bench.comm.size), self._stages()
        price = self._order_price()
        return {
            "stages": stages,
            "canonical_price": price,
            "pairs": loads,
            "balance": max(loads) * len(loads) / max(1, sum(loads)),
            "traffic": {name: value for name, value in self.traffic.items() if name not in ("planned", "bound")},
        }

    def _stages(self) -> dict[str, float]:
        """Seconds of each stage, the mean over the ranks, of the quickest of a few calls; they add up to the call."""
        best: list[float] = []
        for _ in range(STAGE_CALLS):
            watch = Stopwatch(STAGES)
            self.bench.comm.Barrier()
            start = time.perf_counter()
            with watch.watching(watched_functions()):
                self.run()
            watch.seconds["rest"] = time.perf_counter() - start - sum(watch.seconds.values())
            mean = [x / self.bench.comm.size for x in agree.total(self.bench.comm, *watch.seconds.values())]
            best = mean if not best or sum(mean) < sum(best) else best
        # Where ranks share their products, each tells each where its arrays lie.
        words = watch.results.get("_exchange", [])
        told = sum(row.nbytes for row in words) * (self.bench.comm.size - 1) if words else 0
        self.traffic["board"] = told
        self.bytes_planned, self.bytes_bound = self.traffic["planned"] + told, self.traffic["bound"] + told
        self._compare(self.state.plan if self.state is not None else watch.results["plan_dispatch"])
        return dict(zip(STAGES, best, strict=True))

    def _order_price(self) -> Row | None:
        """What the canonical order costs in time, and in bytes: rows back beyond one a token and owner. Collective."""
        orders = OrdersInTurns()
        with orders.watching():
            self.run()
        price = orders.price(self.bench.comm)
        return None if price is None else price | {"bytes": self.traffic["returns"] - self.traffic["least_returns"]}

    def _compare(self, plan: Any) -> None:
        """Hold what the plan of the dispatch says against what follows from the choices. Collective."""
        said = plan.bytes_sent()
        names = ("pairs", "rows", "returns", "bound")
        found = agree.total(self.bench.comm, *(float(said[name]) for name in names))
        if plan.nodes.count > 1:  # the way between nodes, and what gateways pass on, are the plan's to say
            self.traffic |= {name: int(value) for name, value in zip(names[:3], found, strict=False)}
            t, back = self.traffic, self.case.backward
            crossing = 2 * t["rows"] + t["scalars"] + t["router"] if back else t["pairs"] + t["rows"]
            self.bytes_planned = crossing + t["returns"] + t["board"]
            return
        forward = traffic(self.chosen, self.case, self.bench.comm.size, backward=False)
        for name, value, right in zip(names, found, (*(forward[n] for n in names[:3]), forward["deduplicated"]),
                                      strict=True):  # fmt: skip
            if int(value) != right and not self.complaint:
                self.complaint = f"the plan says {int(value)} bytes of {name} where the choices need {right}"

    def bits(self) -> bytes:
        """The bits of all results on this rank."""
        return digest(*self.results)

    def bytes_made(self) -> int:
        """y, or the gradients."""
        return sum(int(x.nbytes) for x in self.results)

    def check(self) -> tuple[str, Row]:
        """Judge y, or dx and the gradients of the router and of the experts."""
        check = Check(self.bench.comm, self.inputs, self.tokens, self.experts, self.weights)
        if self.case.backward:
            dx, d_router, *gradients = self.results
            gate = gradients.pop(0) if self.weights.gate is not None else None
            check.backward(self.dy, self.y, dx, d_router, Weights(gate, *gradients))
        else:
            check.forward(self.results[0])
        return self.complaint or check.wrong, check.found()

    def rival(self, reference: Any, threads: int) -> Callable[[], Any] | None:
        """The whole layer on rank 0."""
        case = self.case
        if not reference.supports(case.dtype, "moe"):
            return None
        if self.bench.comm.rank:
            return lambda: None
        everything = range(case.model.experts)
        names = ("w_gate", "w_up", "w_down")
        gated = case.model.activation == "swiglu"
        weights = [self.inputs.weights(n, everything) if gated or n != "w_gate" else None for n in names]
        x = self.inputs.tokens("x", range(case.tokens))
        reference.set_threads(threads)
        model = case.model
        routing = {"top_k": model.top_k, "score": model.score, "normalize": model.normalize}
        if not case.backward:
            return lambda: reference.experts(x, self.router, *weights, **routing)
        dy = self.inputs.tokens("dy", range(case.tokens))
        call: Callable[[], Any] = reference.experts_backward(dy, x, self.router, *weights, **routing)
        return call

    def sibling(self) -> tuple[str, Callable[[], Any]] | None:
        """Nothing of ours to alternate with: the canonical order is the only one."""
        return None


def _owners(n_experts: int, ranks: int) -> NDArray[np.int64]:
    """For every expert, its rank."""
    return np.repeat(np.arange(ranks), [len(span(n_experts, ranks, rank)) for rank in range(ranks)])


def pairs_by_rank(chosen: NDArray[np.int32], n_experts: int, ranks: int) -> list[int]:
    """The pairs of a token and an expert that each rank computes."""
    loads: list[int] = np.bincount(_owners(n_experts, ranks)[chosen].ravel(), minlength=ranks).tolist()
    return loads


def traffic(chosen: NDArray[np.int32], case: Case, ranks: int, backward: bool) -> dict[str, int]:
    """Bytes of a call over all ranks, by what they are, from the experts (T, k) that all tokens chose.

    "planned" is what a call is to send, "bound" the least; "returns" are the rows on their way back, which are
    "least_returns" where an owner sends one for a token. "deduplicated" is one way of a token once to each other rank
    that has any of its experts, "naive" once for each of these experts.
    """
    width, dtype = case.model.width, operands.dtype_of(case.dtype)
    sums = sum_type(dtype)
    home = np.repeat(np.arange(ranks), [len(span(case.tokens, ranks, rank)) for rank in range(ranks)])[:, None]
    owner = _owners(case.model.experts, ranks)[chosen]
    away = owner != home
    by_way = np.bincount((home * ranks + owner)[away], minlength=ranks * ranks)
    n_pairs = int(away.sum())
    token = np.broadcast_to(np.arange(case.tokens)[:, None], chosen.shape)
    # one row comes back for each subtree of the tree of sums that an owner has whole
    subtree = cut_experts(case.model.experts, ranks).subtree[chosen].astype(np.int64)
    rows = len(np.unique((token * ranks + owner)[away]))
    returns = len(np.unique((token * case.model.experts + subtree)[away]))
    messages = [int(n) for way, n in enumerate(by_way) if way // ranks != way % ranks]
    found = {
        "pairs": sum(pairs_bytes(n, ranks, sums) for n in messages),
        "rows": rows * width * dtype.itemsize,
        "returns": returns * width * sums.itemsize,
        "least_returns": rows * width * sums.itemsize,
        "scalars": n_pairs * sums.itemsize if backward else 0,
        "router": 0,
        "deduplicated": rows * width * dtype.itemsize,
        "naive": n_pairs * width * dtype.itemsize,
    }
    if not backward:
        found["planned"] = found["pairs"] + found["rows"] + found["returns"]
        found["bound"] = found["rows"] + found["least_returns"] + n_pairs * pair_type(sums).itemsize
        return found
    plan = plan_for(
        "h t/ep, t/ep e -> h e", [(width, case.tokens), (case.tokens, case.model.experts)], {"ep": ranks},
        dtype=str(sums), order="canonical" if 8 % ranks else "tree",
    )  # fmt: skip
    found["router"] = plan.bytes_total  # its least is the business of the products
    found["planned"] = 2 * found["rows"] + found["returns"] + found["scalars"] + plan.bytes_total
    found["bound"] = 2 * found["rows"] + found["least_returns"] + found["scalars"] + plan.bytes_total
    return found
